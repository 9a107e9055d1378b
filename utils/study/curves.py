"""Scaling curves and exchange rates, with intervals: pure functions of error rates, sizes and random numbers.

    err(n) = e0 + a n^-b        error rate (0..1) of a classifier trained on n images a class; e0 is its floor

The form is that of Hestness et al. (2017) and Rosenfeld et al. (2020). Errors are resampled over test images and over
seeds together: one draw of test images serves every point that was judged on them, so that differences are paired.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

EXPONENTS = np.geomspace(0.05, 3, 240)  # b that are looked at, 1.7 % apart
FEWEST_SIZES = 3  # a curve has three unknowns
RESAMPLES = 1000
BLOCK = 50  # resamples at a time: 50 x 50,000 images are 10 MB


@dataclass(frozen=True)
class Point:
    """What was measured of one training set: its runs differ by their seed.

    group: the row it belongs to, whose points share the spread of their seeds. size: images a class. errors: (K,) error
    rate of each seed. hits: (N,) share of the seeds that were right on each test image; None where that was not
    recorded. judged: which test images; points of the same are resampled together. images: how many they are.
    """

    group: str
    size: float
    errors: np.ndarray
    images: int
    judged: str = ""
    hits: np.ndarray | None = None

    @property
    def error(self) -> float:
        """Mean over seeds."""
        return float(self.errors.mean())


@dataclass(frozen=True)
class Curve:
    """err(n) = e0 + a n^-b; each of the three a number, or (R,) of as many resamples."""

    e0: Any
    a: Any
    b: Any

    def error(self, size: Any) -> Any:
        """The error rate with SIZE images a class."""
        return self.e0 + self.a * np.power(size, -self.b)

    def size(self, error: Any) -> Any:
        """The images a class at which the curve comes down to ERROR; infinite where its floor is not below it."""
        above = np.asarray(error, float) - self.e0
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            needed = np.power(self.a / np.where(above > 0, above, np.nan), 1 / np.asarray(self.b))
        return np.where(above > 0, needed, np.inf)


def fit_all(sizes: Sequence[float], errors: np.ndarray) -> Curve:
    """The curve of least squares through each row of ERRORS (R, S), with e0 and a not below 0.

    For a given b the other two are a linear regression, so b alone is searched, on a grid.
    """
    scale = float(np.min(sizes))
    x = (np.asarray(sizes, float) / scale)[None, :] ** -EXPONENTS[:, None]  # (G, S)
    count = len(sizes)
    products, mean, mean_x, mean_xx = errors @ x.T / count, errors.mean(1)[:, None], x.mean(1), (x**2).mean(1)
    slope = np.maximum((products - mean * mean_x) / (mean_xx - mean_x**2), 0)
    floor = mean - slope * mean_x
    slope = np.where(floor < 0, np.maximum(products / mean_xx, 0), slope)
    floor = np.maximum(floor, 0)
    squares = slope**2 * mean_xx + floor**2 - 2 * slope * products - 2 * floor * mean + 2 * slope * floor * mean_x
    best = (np.arange(len(errors)), squares.argmin(1))  # the errors' own squares are the same for every b
    b = EXPONENTS[best[1]]
    return Curve(floor[best], slope[best] * scale**b, b)


def fit(sizes: Sequence[float], errors: Sequence[float]) -> Curve:
    """The curve of least squares through (SIZES, ERRORS), at least FEWEST_SIZES of them: scipy's, from the grid's."""
    from scipy.optimize import least_squares  # here: a second of start-up

    n, y = np.asarray(sizes, float), np.asarray(errors, float)
    scale, start = n.min(), fit_all(sizes, y[None])
    first = [float(start.e0[0]), float((start.a * scale**-start.b)[0]), float(start.b[0])]
    limits = ([0, 0, EXPONENTS[0]], [1, 2, EXPONENTS[-1]])
    found = least_squares(
        lambda p: p[0] + p[1] * (n / scale) ** -p[2] - y,
        np.clip(first, *limits),
        bounds=limits,
        x_scale=(0.1, 0.1, 0.5),
        xtol=1e-12,
        ftol=1e-12,
        gtol=1e-12,
    )
    e0, a, b = map(float, found.x)
    return Curve(e0, a * scale**b, b)


def resample(points: Sequence[Point], resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """(R, P) error rates of POINTS, drawn again over test images and seeds. The same points give the same numbers.

    Test images: a draw with replacement for each set of them, the same one for all points judged on it; where hits are
    not known, binomial counts of each point by itself. Seeds: each point's mean moves by as many of its row's
    deviations as it has seeds. They are pooled over the row's points, since two or three seeds of one say little, and
    widened by sqrt(K / (K - 1)), which their own mean has taken away.
    """
    rng = np.random.default_rng(seed)
    drawn = np.empty((resamples, len(points)))
    for judged in dict.fromkeys(point.judged for point in points if point.hits is not None):
        columns = [i for i, point in enumerate(points) if point.hits is not None and point.judged == judged]
        hits = np.stack([np.asarray(points[i].hits, np.float32) for i in columns], 1)  # (N, points)
        n = len(hits)
        for start in range(0, resamples, BLOCK):
            rows = range(start, min(start + BLOCK, resamples))
            picks = rng.integers(0, n, (len(rows), n))
            weights = np.stack([np.bincount(pick, minlength=n) for pick in picks]).astype(np.float32)
            drawn[rows.start : rows.stop, columns] = 1 - weights @ hits / n
    for i, point in enumerate(points):
        if point.hits is None:
            drawn[:, i] = rng.binomial(point.images, np.clip(point.error, 0, 1), resamples) / point.images
    deviations: dict[str, list[np.ndarray]] = {}
    for point in points:
        if (k := len(point.errors)) > 1:
            deviations.setdefault(point.group, []).append((point.errors - point.error) * np.sqrt(k / (k - 1)))
    for i, point in enumerate(points):
        if point.group in deviations:
            pool = np.concatenate(deviations[point.group])
            drawn[:, i] += rng.choice(pool, (resamples, len(point.errors))).mean(1)
    return np.clip(drawn, 0, 1)


def interval(draws: np.ndarray) -> tuple[float, float]:
    """The central 95 % of DRAWS (R,), which may be infinite."""
    ordered = np.sort(draws)
    last = len(ordered) - 1
    return float(ordered[int(0.025 * last)]), float(ordered[int(np.ceil(0.975 * last))])


@dataclass(frozen=True)
class Match:
    """How many images do the work of others: `needed` in all, `rate` for each of them; infinite: no number suffices."""

    needed: float
    low: float
    high: float
    rate: float
    rate_low: float
    rate_high: float
    never: float  # share of the resamples in which no number suffices


def _match(needed: Any, worth: Any) -> tuple[np.ndarray, np.ndarray]:
    with np.errstate(divide="ignore", invalid="ignore"):
        worth = np.asarray(worth, float)
        return np.asarray(needed, float), np.where(worth > 0, needed / np.where(worth > 0, worth, 1), np.inf)


def substitution(real: Curve, other: Curve, reals: Curve, others: Curve, size: float) -> Match:
    """The images of OTHER that reach REAL's error at SIZE images a class; REALS, OTHERS: their resamples.

    The rate k(n) is how many of them stand for one real image.
    """
    needed, rate = _match(other.size(real.error(size)), size)
    draws, rates = _match(others.size(reals.error(size)), size)
    return Match(float(needed), *interval(draws), float(rate), *interval(rates), float(np.isinf(draws).mean()))


def addition(real: Curve, reals: Curve, base: float, added: float, error: float, errors: np.ndarray) -> Match:
    """What ADDED images a class beside BASE real ones are worth; ERROR, with its resamples ERRORS, is what they reach.

    REAL's curve has that error at some number of real images; what it has above BASE did the added ones' work, and the
    rate is how many of them do that of one. No gain, or less than none: infinite.
    """
    _, rate = _match(added, np.minimum(real.size(error), 1e12) - base)
    _, rates = _match(added, np.minimum(reals.size(errors), 1e12) - base)
    return Match(added, added, added, float(rate), *interval(rates), float(np.isinf(rates).mean()))
