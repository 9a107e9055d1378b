"""Linear probes: the exact path against scikit-learn, SGD against torch's own, splits, memory of trials."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from tests.fake_cuda import FakeCuda
from utils.cli import UserError
from utils.evaluation import neighbours, probes
from utils.evaluation.logistic import LinearClassifier, LogisticSolver


@pytest.fixture(scope="module")
def features():
    """Real digits through a fixed random layer with ReLU: 600 + 1197 images, 96 features, 10 classes."""
    data = load_digits()
    rng = np.random.default_rng(0)
    x = np.maximum(data.data / 16 @ rng.normal(size=(64, 96)) / 4, 0).astype(np.float32)
    return {"trainval": (x[:600], data.target[:600]), "test": (x[600:], data.target[600:])}


def objective(x, y, c, weights, offset):
    """scikit-learn's: C times the summed loss plus half the squared weights, in float64."""
    logits = x.astype(np.float64) @ weights.astype(np.float64) + offset
    logits -= logits.max(1, keepdims=True)
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(y)), y]
    return c * losses.sum() + 0.5 * (weights.astype(np.float64) ** 2).sum()


@pytest.mark.parametrize("n", [600, 60])  # 60: fewer images than features
def test_the_path_finds_scikit_learns_minimum(features, n):
    x, y = (part[:n] for part in features["trainval"])
    test = features["test"][0]
    assert LogisticSolver(x, y).x.shape[1] < min(x.shape)  # axes along which nothing varies are left out
    same = []
    for c in (1e-4, 1e-2, 1.0, 100.0, 1e4):
        reference = LogisticRegression(C=c, max_iter=20000, tol=1e-8).fit(x.astype(np.float64), y)
        ours = LogisticSolver(x, y).solve(c).classifier
        lowest = objective(x, y, c, reference.coef_.T, reference.intercept_)
        assert objective(x, y, c, ours.weights.numpy(), ours.offset.numpy()) == pytest.approx(lowest, rel=1e-4)
        same.append((ours(test) == reference.predict(test)).mean())
    assert np.mean(same) >= 0.999  # of 5 x 1197 predictions a few lie on a border


def test_a_warm_start_ends_where_a_cold_one_does(features):
    x, y = features["trainval"]
    solver, warm = LogisticSolver(x, y), None
    for c in (1e-3, 1e-2, 0.1):
        warm = solver.fit(c, warm)
    warm = solver.fit(1.0, warm, exact=True)
    cold = LogisticSolver(x, y).solve(1.0)
    reached = [
        objective(x, y, 1.0, end.classifier.weights.numpy(), end.classifier.offset.numpy()) for end in (warm, cold)
    ]
    assert reached[0] == pytest.approx(reached[1], rel=1e-5)


def test_labels_need_not_be_consecutive(features):
    x, y = features["trainval"]
    predict = LogisticSolver(x, y * 7 + 3).fit(1.0).classifier
    assert set(predict(x)) <= {label * 7 + 3 for label in range(10)}
    assert (predict(x) == y * 7 + 3).mean() > 0.9


@pytest.mark.parametrize("kind", ["logreg", "sgd"])
def test_fast_is_as_accurate_as_the_suites_search(features, kind, monkeypatch):
    if kind == "logreg":
        monkeypatch.setattr(probes, "TRIALS", 8)  # 30 would take a minute
        monkeypatch.setattr(probes, "MAX_ITER", 300)
    fast = probes.run_probe(features, protocol="fast", seed=0, kind=kind)
    paper = probes.run_probe(features, protocol="paper", seed=0, kind=kind)
    assert fast["top1"] > paper["top1"] - 1.5  # 1197 images: a standard error is 0.8 points
    assert fast["top1"] > 88
    assert fast["mean_per_class"] == pytest.approx(fast["top1"], abs=3)


@pytest.mark.parametrize("scale", [0.03, 1.0, 30.0])
def test_the_path_goes_on_where_accuracy_stands_still(features, scale):
    """Small features and unbalanced classes: for decades of C one class wins everywhere, and accuracy is constant."""
    rng = np.random.default_rng(0)
    x, y = features["trainval"]
    kept = (y == 3) | (rng.random(len(y)) < 0.4)
    splits = {"trainval": (scale * x[kept], y[kept]), "test": (scale * features["test"][0], features["test"][1])}
    assert probes.run_probe(splits, protocol="fast", seed=0, kind="logreg")["top1"] > 85


def test_more_classes_than_features(features):
    x, y = features["trainval"]
    rng = np.random.default_rng(0)
    labels = y * 20 + rng.integers(0, 20, len(y))  # 200 classes of 96 features
    classifier = LogisticSolver(x, labels).solve(1.0).classifier
    assert classifier.weights.shape == (96, len(np.unique(labels)))
    reference = LogisticRegression(C=1.0, max_iter=20000, tol=1e-8).fit(x.astype(np.float64), labels)
    places = np.searchsorted(classifier.classes, labels)
    lowest = objective(x, places, 1.0, reference.coef_.T, reference.intercept_)
    assert objective(x, places, 1.0, classifier.weights.numpy(), classifier.offset.numpy()) == pytest.approx(
        lowest, rel=1e-4
    )


def test_loss_and_answers_of_a_classifier_by_hand(monkeypatch):
    monkeypatch.setattr("utils.evaluation.logistic.CHUNK_ROWS", 2)
    classifier = LinearClassifier(torch.eye(3), torch.zeros(3), np.array([4, 5, 9]))
    x, y = np.eye(3, dtype=np.float32) * 2, np.array([4, 5, 5])
    assert classifier(x).tolist() == [4, 5, 9]
    right = -math.log(math.e**2 / (math.e**2 + 2))
    assert classifier.loss(x, y) == pytest.approx((2 * right + right + 2) / 3)
    broken = LinearClassifier(torch.full((3, 3), math.nan), torch.zeros(3), np.array([4, 5, 9]))
    assert broken(x).tolist() == [4, 4, 4]


def test_the_probe_reports_what_its_classifier_gets_right(features):
    result = probes.run_probe(features, protocol="fast", seed=0, kind="logreg")
    predict = probes.fit_logreg(features["trainval"], result["chosen"], 0, "cpu")
    x, y = features["test"]
    assert result["top1"] == pytest.approx(100 * (predict(x) == y).mean(), abs=0.2)
    by_class = [100 * (predict(x[y == label]) == label).mean() for label in range(10)]
    assert result["mean_per_class"] == pytest.approx(np.mean(by_class), abs=0.2)


def test_sgd_is_torchs_own(features):
    """Two settings trained side by side equal two runs of torch.optim.SGD with its cosine schedule."""
    x, y = features["trainval"]
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    settings_ = [{"lr": 1.0, "weight_decay": 1e-4}, {"lr": 10.0, "weight_decay": 1e-10}]
    together = probes.train_together((x, y), settings_, seed=3, device="cpu", epochs=20)
    for setting, predict in zip(settings_, together, strict=True):
        generator = torch.Generator().manual_seed(3)
        start = (2 * torch.rand(x.shape[1] + 1, 10, generator=generator) - 1) / x.shape[1] ** 0.5
        layer = torch.nn.Linear(x.shape[1], 10)
        assert layer.weight.abs().max() <= start.abs().max() * 1.01  # the same range as torch's own start
        with torch.no_grad():
            layer.weight.copy_(start[:-1].T)
            layer.bias.copy_(start[-1])
        optimizer = torch.optim.SGD(layer.parameters(), momentum=0.9, **setting)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda epoch: 0.5 * (1 + math.cos(math.pi * max(0, epoch - 1) / 20))
        )
        for _ in range(20):  # 600 images are one batch of at most 1024
            rows = torch.randperm(len(x), generator=generator)
            loss = torch.nn.functional.cross_entropy(layer(torch.from_numpy(x)[rows]), torch.from_numpy(y)[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        logits = layer(torch.from_numpy(features["test"][0])).detach().numpy()
        assert (predict(features["test"][0]) == logits.argmax(1)).mean() > 0.995


@pytest.mark.parametrize("kind", ["logreg", "sgd"])
def test_features_may_be_a_read_only_map(features, tmp_path, kind):
    """As the cache gives them."""
    mapped = {}
    for split, (x, y) in features.items():
        np.save(tmp_path / f"{split}.npy", x[:100])
        mapped[split] = (np.load(tmp_path / f"{split}.npy", mmap_mode="r"), y[:100])
    in_memory = {split: (np.array(x), y) for split, (x, y) in mapped.items()}
    options = {"protocol": "fast", "seed": 0, "kind": kind}
    assert probes.run_probe(mapped, **options) == probes.run_probe(in_memory, **options)


def test_a_diverging_setting_loses_and_does_not_crash(features):
    x, y = features["trainval"]
    good, bad = probes.train_together(
        (x, y), [{"lr": 0.1, "weight_decay": 0}, {"lr": 1e30, "weight_decay": 1e3}], 0, "cpu", 30
    )
    assert (bad(x) == y).mean() < 0.3 < (good(x) == y).mean()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=2, max_size=80), st.integers(0, 3))
def test_a_fifth_of_every_class_is_held_out(labels, seed):
    labels = np.array(labels)
    part, held = probes.split_per_class(labels, seed)
    counts = np.bincount(labels)
    if counts.max() == 1:  # nothing can be held out: both are everything
        assert list(part) == list(held) == list(range(len(labels)))
        return
    assert sorted([*part, *held]) == list(range(len(labels)))
    for label in np.unique(labels):
        n = int(counts[label])
        assert (labels[held] == label).sum() == (0 if n == 1 else max(1, int(0.2 * n)))
        assert (labels[part] == label).any()


@pytest.mark.parametrize("protocol,kind", [("fast", "logreg"), ("fast", "sgd"), ("paper", "sgd")])
def test_a_killed_search_goes_on_with_the_same_result(features, tmp_path, protocol, kind):
    whole = tmp_path / "whole.jsonl"
    expected = probes.run_probe(features, protocol=protocol, seed=1, kind=kind, memo=whole)
    lines = whole.read_text().splitlines()
    assert len(lines) > 3
    for kept in (1, len(lines) // 2, len(lines)):
        memo = tmp_path / f"{kept}.jsonl"
        memo.write_text("\n".join(["null", "5", "{}", "[]", '{"key": 3}', *lines[:kept]]) + "\n" + '{"key": "torn')
        assert probes.run_probe(features, protocol=protocol, seed=1, kind=kind, memo=memo) == expected
    rows = [json.loads(line) for line in lines]
    assert {row["seed"] for row in rows} == {1} and {row["protocol"] for row in rows} == {protocol}


def test_seeds_and_protocols_do_not_share_their_trials(features, tmp_path):
    memo = tmp_path / "trials.jsonl"
    probes.run_probe(features, protocol="fast", seed=0, kind="sgd", memo=memo)
    first = len(memo.read_text().splitlines())
    probes.run_probe(features, protocol="fast", seed=1, kind="sgd", memo=memo)
    assert len(memo.read_text().splitlines()) == 2 * first


def test_nan_features_are_refused(features):
    broken = features["test"][0].copy()
    broken[5, 3] = np.nan
    with pytest.raises(UserError, match=r"test features are NaN for 1 of 1197"):
        probes.run_probe(features | {"test": (broken, features["test"][1])}, protocol="fast", seed=0, kind="logreg")


# ===== a GPU =====


@pytest.mark.parametrize("stored", [np.float16, np.float32])  # features of fp16 and bf16 are kept as float16
@pytest.mark.parametrize("kind", ["logreg", "sgd"])
def test_on_a_gpu_devices_and_types_agree_from_features_to_scores(features, kind, stored, monkeypatch):
    """Each step of L-BFGS, its line search, SGD, and what judges them: a few of the epochs, values of C and rounds.

    A fake device has no numbers, so those that control the search are made up: each way of the line search is taken.
    """
    for name, few in {"STAGES": ((2, 1), (1, 1)), "EPOCHS": 1, "PATH_POINTS": 2, "C_RANGE": (1, 10)}.items():
        monkeypatch.setattr(probes, name, few)
    monkeypatch.setattr("utils.evaluation.logistic.MAX_ROUNDS", 2)
    monkeypatch.setattr("utils.evaluation.logistic.ROUND", 4)
    splits = {split: (x.astype(stored), y) for split, (x, y) in features.items()}
    gpu = FakeCuda()
    gpu.numbers = itertools.cycle([0.0, 0.0, 1.0, 0.0, 1.0])
    with gpu.present():
        found = probes.run_probe(splits, protocol="fast", seed=0, kind=kind, device="cuda")
        assert neighbours.knn_top1(splits, "cuda") == pytest.approx(100 * np.mean(splits["test"][1] == 0))
    assert found["top1"] == pytest.approx(100 * np.mean(splits["test"][1] == 0))  # all indices read are 0
    assert gpu.kernels["addmm" if kind == "logreg" else "bmm"] >= 4, "it did not run on the device"


def test_a_probe_with_parts_on_two_devices_or_of_two_types_fails(features):
    """So that the test above can fail."""
    gpu, (x, y) = FakeCuda(), features["trainval"]
    x = x + np.random.default_rng(0).normal(scale=0.01, size=x.shape)  # all vary: a fake device cannot see which do
    here = LogisticSolver(x, y).fit(1.0)
    with gpu.present():
        with pytest.raises(RuntimeError, match="device"):
            LogisticSolver(x, y, "cuda").fit(1.0, here)
        weights, offset = here.classifier.weights.to("cuda"), here.classifier.offset.to("cuda")
        with pytest.raises(RuntimeError, match="type"):
            LinearClassifier(weights.double(), offset, np.arange(10))(x)
