"""The statistics of a study against planted truths: curves, intervals that cover, exchange rates, floors."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import norm

from utils.study import curves
from utils.study.curves import Curve, Point

SIZES = (60.0, 120.0, 250.0, 500.0, 1000.0)


def planted(rng, truth: Curve, group="row", images=1000, seeds=3, spread=0.006, difficulty=None, sizes=SIZES):
    """Points as evaluate.py would leave them: images of shared difficulty, seeds that differ by SPREAD."""
    hard = rng.normal(size=images) if difficulty is None else difficulty
    points = []
    for size in sizes:
        right = np.empty((seeds, images), bool)
        for seed in range(seeds):
            error = np.clip(truth.error(size) + rng.normal() * spread, 1e-3, 0.999)
            # Of (hard + noise) the share above the threshold is the error, whichever image is how hard.
            right[seed] = math.sqrt(0.6) * hard + math.sqrt(0.4) * rng.normal(size=images) > norm.ppf(error)
        points.append(Point(group, size, 1 - right.mean(1), images, "test", right.mean(0, dtype=np.float32)))
    return points


@pytest.mark.parametrize(("e0", "a", "b"), [(0.1, 2.0, 0.5), (0.0, 1.0, 0.3), (0.2, 1.5, 1.0)])
def test_a_planted_curve_is_found_again(e0, a, b):
    sizes = [10, 20, 50, 100, 200, 500]
    curve = curves.fit(sizes, [e0 + a * n**-b for n in sizes])
    assert (curve.e0, curve.a, curve.b) == pytest.approx((e0, a, b), rel=1e-3, abs=1e-3)
    assert curve.error(80) == pytest.approx(e0 + a * 80**-b, abs=1e-4)
    assert float(curve.size(e0 + a * 80**-b)) == pytest.approx(80, rel=1e-2)


def test_many_fits_at_once_are_scipys():
    rng = np.random.default_rng(0)
    errors = np.array([[0.1 + 1.2 * n**-0.45 for n in SIZES]]) + rng.normal(size=(40, 5)) * 0.004
    together = curves.fit_all(SIZES, errors)
    for row, values in enumerate(errors):
        alone = curves.fit(SIZES, values)
        fitted = together.e0[row] + together.a[row] * np.power(SIZES, -together.b[row])
        assert fitted == pytest.approx(alone.error(np.array(SIZES)), abs=3e-4)  # the grid of b is 1.7 % wide
        assert together.e0[row] == pytest.approx(alone.e0, abs=4e-3)


@pytest.mark.parametrize("truth", [Curve(0.10, 1.2, 0.45), Curve(0.05, 1.0, 0.3), Curve(0.2, 2.0, 0.6)])
def test_the_truth_lies_within_the_interval_in_95_of_100_draws(truth):
    rng, draws, inside = np.random.default_rng(1), 200, np.zeros(4)
    for _ in range(draws):
        points = planted(rng, truth)
        found = curves.fit_all(SIZES, curves.resample(points, 300))
        for place, (values, true) in enumerate(
            [(found.e0, truth.e0), (found.a, truth.a), (found.b, truth.b), (found.error(300), truth.error(300))]
        ):
            low, high = curves.interval(values)
            inside[place] += low <= true <= high
    # 95 % of 200, less what chance takes from a right interval (two deviations, 3 %).
    assert (inside / draws >= 0.92).all(), inside / draws
    assert (inside / draws).mean() >= 0.95


def test_an_interval_is_as_wide_as_the_truth_scatters():
    """Wide intervals cover too: 95 % of repeated studies should lie in about as wide a band as one study's interval."""
    rng, truth, widths, found = np.random.default_rng(2), Curve(0.1, 1.2, 0.45), [], []
    for _ in range(60):
        points = planted(rng, truth)
        low, high = curves.interval(1 - curves.resample(points, 300)[:, 2])
        widths.append(high - low)
        found.append(points[2].error)
    assert 0.8 < np.median(widths) / (2 * 1.96 * np.std(found)) < 1.5


def matched(points, others, size, resamples=400):
    draws = curves.resample([*points, *others], resamples)
    parts = [(draws[:, : len(points)], points), (draws[:, len(points) :], others)]
    (real, reals), (other, these) = (
        (curves.fit(SIZES, [p.error for p in its]), curves.fit_all(SIZES, drawn)) for drawn, its in parts
    )
    return curves.substitution(real, other, reals, these, size)


def test_the_same_images_under_another_name_are_worth_one_each():
    rng = np.random.default_rng(3)
    real = planted(rng, Curve(0.08, 1.1, 0.4))
    renamed = [Point("renamed", p.size, p.errors, p.images, p.judged, p.hits) for p in real]
    for size in SIZES:
        match = matched(real, renamed, size)
        assert match.rate == pytest.approx(1, rel=1e-6) and match.rate_low < 1 < match.rate_high
        assert match.needed == pytest.approx(size, rel=1e-6) and match.never < 0.05


def test_a_planted_exchange_rate_is_found():
    """Three synthetic images do the work of one real: err_s(n) = err_r(n / 3)."""
    rng, hard = np.random.default_rng(4), np.random.default_rng(5).normal(size=1000)
    inside = 0
    for _ in range(40):
        real = planted(rng, Curve(0.08, 1.1, 0.4), difficulty=hard)
        drawn = planted(rng, Curve(0.08, 1.1 * 3**0.4, 0.4), "drawn", difficulty=hard)
        match = matched(real, drawn, 250)
        inside += match.rate_low <= 3 <= match.rate_high
    assert inside >= 36


def test_a_floor_above_the_real_accuracy_has_no_number():
    rng = np.random.default_rng(6)
    # At 60 real images the error is 0.26, at 1,000 it is 0.12; the drawn ones end at 0.2.
    real, drawn = planted(rng, Curve(0.05, 1.1, 0.4)), planted(rng, Curve(0.2, 1.3, 0.6), "drawn")
    match = matched(real, drawn, 1000)
    assert match.needed == math.inf and match.rate == math.inf and match.never >= 0.95
    low = matched(real, drawn, 60)  # where real images do not yet reach that floor
    assert 60 < low.needed < 1000 and low.never < 0.05


def test_added_images_are_worth_what_was_planted():
    """Beside 100 real images 400 synthetic ones reach what 200 real ones reach: four for one."""
    truth = Curve(0.05, 1.1, 0.5)
    resamples = Curve(np.full(50, 0.05), np.full(50, 1.1), np.full(50, 0.5))
    error = truth.error(200)
    match = curves.addition(truth, resamples, 100, 400, error, np.linspace(error - 0.002, error + 0.002, 50))
    assert match.rate == pytest.approx(4) and match.rate_low < 4 < match.rate_high
    worse = curves.addition(truth, resamples, 100, 400, truth.error(90), np.full(50, truth.error(90)))
    assert worse.rate == math.inf and worse.never == 1


def test_points_of_the_same_test_images_are_paired():
    """Two models that are right on nearly the same images differ by little, however few images there are."""
    rng = np.random.default_rng(7)
    hits = rng.random(400) < 0.6
    other = hits.copy()
    other[:8] = True
    points = [Point(name, 10, np.array([1 - h.mean()]), 400, "test", h.astype(np.float32)) for name, h in
              (("one", hits), ("other", other))]  # fmt: skip
    draws = curves.resample(points)
    low, high = curves.interval(draws[:, 0] - draws[:, 1])
    alone = curves.resample([Point(p.group, p.size, p.errors, 400) for p in points])  # counts alone cannot be paired
    wide = curves.interval(alone[:, 0] - alone[:, 1])
    assert high - low < 0.4 * (wide[1] - wide[0])
    # Binomial: the deviation of 400 answers of which 60 % are right.
    assert np.std(draws[:, 0]) == pytest.approx(math.sqrt(0.24 / 400), rel=0.1)


def test_the_same_points_give_the_same_numbers():
    points = planted(np.random.default_rng(8), Curve(0.1, 1.0, 0.5))
    assert np.array_equal(curves.resample(points, 100), curves.resample(points, 100))


def test_one_seed_speaks_of_images_alone_and_more_seeds_of_both():
    rng, truth = np.random.default_rng(9), Curve(0.1, 1.0, 0.5)
    one = planted(rng, truth, seeds=1, images=4000)
    three = planted(rng, truth, seeds=3, images=4000, spread=0.03)
    assert np.std(curves.resample(one)[:, 0]) < np.std(curves.resample(three)[:, 0])
