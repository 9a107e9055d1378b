"""Metrics against slow definitions, scikit-learn and known values."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, top_k_accuracy_score

from utils import metrics
from utils.cli import UserError


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(2, 12), st.booleans())
def test_topk_is_a_stable_sort(seed, rows, classes, ties):
    rng = np.random.default_rng(seed)
    logits = rng.integers(0, 3, (rows, classes)).astype(float) if ties else rng.normal(size=(rows, classes))
    labels = rng.integers(0, classes, rows)
    order = np.argsort(-logits, axis=1, kind="stable")
    for k in (1, 5, 100):
        wanted = sum(labels[i] in order[i, :k] for i in range(rows))
        assert metrics.topk_correct(logits, labels, (k,))[k] == wanted


def test_topk_agrees_with_sklearn_over_several_chunks(monkeypatch):
    monkeypatch.setattr(metrics, "CHUNK_ROWS", 7)
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(100, 20)), rng.integers(0, 20, 100)
    ours = metrics.topk_correct(logits, labels, (1, 5))
    for k in (1, 5):
        assert ours[k] == top_k_accuracy_score(labels, logits, k=k, labels=range(20), normalize=False)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 20))
def test_several_accepted_answers(seed, rows):
    rng = np.random.default_rng(seed)
    logits, accepted = rng.normal(size=(rows, 8)), rng.random((rows, 8)) < 0.2
    order = np.argsort(-logits, axis=1, kind="stable")
    for k in (1, 3):
        wanted = sum(accepted[i, order[i, :k]].any() for i in range(rows))
        assert metrics.topk_correct(logits, accepted, (k,))[k] == wanted


def test_constant_output_is_not_right():
    assert metrics.topk_correct(np.zeros((10, 4)), np.full(10, 3), (1,)) == {1: 0}


def test_nan_is_refused_and_a_masked_class_is_not():
    logits = np.zeros((4, 3))
    logits[2, 1] = np.nan
    with pytest.raises(UserError, match="NaN for 1 of 4"):
        metrics.best_ranks(logits, np.zeros(4, int))
    logits[:, 1] = -np.inf
    assert metrics.topk_correct(logits, np.zeros(4, int), (1,)) == {1: 4}


def test_wilson_known_values():
    # 81 of 263: Newcombe, Statistics in Medicine 1998, Table I, method 3 (0.2553 to 0.3662)
    low, high = metrics.wilson_interval(81, 263)
    assert (round(low, 2), round(high, 2)) == (25.53, 36.62)
    # 0 of 20: 0 to 0.1611 in the same table
    low, high = metrics.wilson_interval(0, 20)
    assert low == 0 and round(high, 2) == 16.11
    with pytest.raises(ValueError):
        metrics.wilson_interval(0, 0)


@given(st.integers(1, 10**6), st.data())
def test_wilson_is_the_published_formula(n, data):
    """Wilson, JASA 1927, equation (4), with z = 1.95996..."""
    correct = data.draw(st.integers(0, n))
    p, z = correct / n, 1.959963984540054
    centre, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    wanted = (100 * (centre - half) / (1 + z**2 / n), 100 * (centre + half) / (1 + z**2 / n))
    assert metrics.wilson_interval(correct, n) == pytest.approx(wanted, abs=1e-9)


@given(st.integers(1, 10**6), st.data())
def test_wilson_holds_its_estimate(n, data):
    correct = data.draw(st.integers(0, n))
    low, high = metrics.wilson_interval(correct, n)
    assert 0 <= low <= 100 * correct / n + 1e-9 and 100 * correct / n - 1e-9 <= high <= 100


def test_per_class_confusion_and_mean_agree_with_sklearn():
    rng = np.random.default_rng(1)
    labels, predicted = rng.integers(0, 6, 300), rng.integers(0, 6, 300)
    predicted[:150] = labels[:150]
    correct = predicted == labels
    table = metrics.confusion(predicted, labels, 6)
    assert (table == confusion_matrix(labels, predicted)).all()
    counts, accuracies = metrics.per_class(correct, labels, 6)
    assert (counts == table.sum(1)).all()
    assert np.allclose(accuracies, 100 * np.diag(table) / table.sum(1))
    mean, low, high = metrics.mean_per_class(correct, labels, 6)
    assert mean == pytest.approx(100 * balanced_accuracy_score(labels, predicted))
    assert low < mean < high


def test_absent_class_is_nan_and_left_out_of_the_mean():
    counts, accuracies = metrics.per_class(np.array([True]), np.array([0]), 2)
    assert counts.tolist() == [1, 0] and math.isnan(accuracies[1])
    assert metrics.mean_per_class(np.array([True]), np.array([0]), 2)[0] == 100


def test_mean_per_class_interval_covers():
    """The interval of a known truth holds it about 95 times in 100, small classes included."""
    rng = np.random.default_rng(2)
    truth, labels = np.linspace(0.5, 0.95, 10), np.repeat(np.arange(10), 20)
    inside = 0
    for _ in range(500):
        _, low, high = metrics.mean_per_class(rng.random(200) < truth[labels], labels, 10)
        inside += low <= 100 * truth.mean() <= high
    assert 460 <= inside <= 500


def test_ece_by_hand():
    # Two bins: 4 images at confidence 0.9, half of them right (gap 0.4); 6 at 0.6, all right (gap 0.4).
    confidence = np.array([0.9] * 4 + [0.6] * 6)
    correct = np.array([1, 1, 0, 0] + [1] * 6)
    assert metrics.expected_calibration_error(confidence, correct) == pytest.approx(40.0)
    assert metrics.expected_calibration_error(np.ones(5), np.ones(5)) == 0
    # Opposite gaps inside one bin cancel; in different bins they do not.
    assert metrics.expected_calibration_error(np.array([0.5, 0.5]), np.array([1, 0])) == pytest.approx(0)


def test_ece_interval_is_repeatable():
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(200, 5))
    correct = rng.random(200) < 0.5
    first, second = metrics.ece_with_interval(logits, correct), metrics.ece_with_interval(logits, correct)
    assert first == second
    assert first[1] <= first[2]


def test_confidences_ignore_masked_classes():
    logits = np.array([[0.0, 0.0, -np.inf, -np.inf]])
    assert metrics.confidences(logits) == pytest.approx([0.5])
    assert metrics.confidences(np.array([[1000.0, 0.0]])) == pytest.approx([1.0])  # no overflow


def test_log_odds_average():
    assert metrics.log_odds_average([50, 50]) == 0
    assert metrics.log_odds_average([75]) == pytest.approx(math.log(3))
    assert metrics.log_odds_average([80, 60]) == pytest.approx((math.log(4) + math.log(1.5)) / 2)
    # A perfect score on 100 images is not infinitely good: half an image is taken off.
    assert metrics.log_odds_average([100], [100]) == pytest.approx(math.log(0.995 / 0.005))


def test_mean_and_std():
    assert metrics.mean_and_std([1.0, 3.0]) == (2.0, pytest.approx(math.sqrt(2)))
    assert metrics.mean_and_std([4.0]) == (4.0, 0.0)
