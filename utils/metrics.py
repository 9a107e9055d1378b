"""How right a classifier is: counts first, one division at the end, an interval around every percentage.

All functions take numpy arrays: logits (N, C) and either labels (N,) of ints or accepted (N, C) of bools, for sets
where several answers are right (ReaL, ObjectNet). Percentages are 0..100. Nothing here imports torch.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from utils.cli import UserError

Z_95 = 1.959963984540054  # 97.5 % quantile of the normal distribution
ECE_BINS = 15  # equal-width bins, as in Guo et al., "On Calibration of Modern Neural Networks", ICML 2017
RESAMPLES = 200  # of the bootstrap
CHUNK_ROWS = 8192  # rows compared at a time: 1000 classes then need some 30 MB of temporaries


def best_ranks(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(N,) rank of the right answer, 0 = predicted first; with accepted (N, C) the best rank of any accepted class.

    Ties go to the lower index, as in a stable sort, so that a constant output does not count as right.
    Raises UserError when a logit is NaN: a comparison with NaN is silently false. -inf is a masked class.
    """
    logits, labels = np.asarray(logits), np.asarray(labels)
    if logits.ndim != 2 or len(labels) != len(logits):
        raise ValueError(f"logits {logits.shape} and labels {labels.shape} do not belong together")
    refuse_nan(logits, "the model's outputs")
    ranks = np.empty(len(logits), dtype=np.int64)
    columns = np.arange(logits.shape[1])
    for start in range(0, len(logits), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        block = logits[rows]
        if labels.ndim == 2:
            best = np.where(labels[rows], block, -np.inf).argmax(1)
            # argmax of a row of -inf is column 0: no class of this row is accepted
            best = np.where(labels[rows].any(1), best, -1)
        else:
            best = labels[rows]
        right = block[np.arange(len(block)), best][:, None]
        ahead = (block > right) | ((block == right) & (columns < best[:, None]))
        ranks[rows] = np.where(best >= 0, ahead.sum(1), logits.shape[1])
    return ranks


def topk_correct(logits: np.ndarray, labels: np.ndarray, ks: Sequence[int] = (1, 5)) -> dict[int, int]:
    """{k: number of rows whose right answer is among the k highest logits}. With k >= C every row counts."""
    ranks = best_ranks(logits, labels)
    return {k: int((ranks < k).sum()) for k in ks}


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """95 % interval of a proportion in percent (Wilson, 1927): stays inside 0..100 and is right near both ends."""
    from scipy.stats import binomtest  # here: half a second of start-up

    if not 0 <= correct <= n or n == 0:
        raise ValueError(f"{correct} of {n} is no proportion")
    interval = binomtest(int(correct), int(n)).proportion_ci(0.95, "wilson")
    return 100 * float(interval.low), 100 * float(interval.high)


def per_class(correct: np.ndarray, labels: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """(n (K,) images, top-1 (K,) percent) of each class; NaN where a class has no image."""
    counts = np.bincount(labels, minlength=num_classes)
    hits = np.bincount(labels, weights=np.asarray(correct, dtype=np.float64), minlength=num_classes)
    with np.errstate(invalid="ignore", divide="ignore"):
        return counts, 100 * hits / counts


def mean_per_class(correct: np.ndarray, labels: np.ndarray, num_classes: int) -> tuple[float, float, float]:
    """(mean over classes of their accuracy, low, high) in percent: a stratified normal interval, 95 %."""
    counts, accuracies = per_class(correct, labels, num_classes)
    seen = counts > 0
    n, share = counts[seen], accuracies[seen] / 100
    softened = (share * n + 2) / (n + 4)  # Agresti-Coull: a perfect class has a variance too
    spread = Z_95 * math.sqrt(float((softened * (1 - softened) / (n + 4)).sum())) / len(n)
    mean = float(share.mean())
    return 100 * mean, 100 * max(0.0, mean - spread), 100 * min(1.0, mean + spread)


def confusion(predicted: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """(K, K) counts: row = true class, column = predicted class."""
    flat = np.bincount(np.asarray(labels) * num_classes + predicted, minlength=num_classes**2)
    return flat.reshape(num_classes, num_classes)


def confidences(logits: np.ndarray) -> np.ndarray:
    """(N,) probability of the predicted class, in float64; a masked class (-inf) has none."""
    from scipy.special import softmax

    # In float64 50,000 x 1,000 would be 400 MB.
    blocks = (logits[start : start + CHUNK_ROWS] for start in range(0, len(logits), CHUNK_ROWS))
    return np.concatenate([softmax(block.astype(np.float64), axis=1).max(1) for block in blocks])


def expected_calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Mean gap between confidence (0..1) and accuracy over equal-width bins, weighted by their size; percent."""
    which = np.clip(np.ceil(np.asarray(confidence) * ECE_BINS).astype(int) - 1, 0, ECE_BINS - 1)  # bins are (low, high]
    gap = np.bincount(which, weights=np.asarray(correct, dtype=np.float64) - confidence, minlength=ECE_BINS)
    return float(100 * np.abs(gap).sum() / len(confidence))


def ece_with_interval(logits: np.ndarray, correct: np.ndarray) -> tuple[float, float, float]:
    """(ECE, low, high) in percent, by percentile bootstrap over images: the same predictions give the same interval."""
    confidence, correct = confidences(logits), np.asarray(correct, dtype=np.float64)
    n, rng = len(correct), np.random.default_rng(0)
    draws = (rng.integers(0, n, n) for _ in range(RESAMPLES))
    errors = [expected_calibration_error(confidence[rows], correct[rows]) for rows in draws]
    low, high = np.percentile(errors, (2.5, 97.5))
    return expected_calibration_error(confidence, correct), float(low), float(high)


def mean_and_std(values: Iterable[float]) -> tuple[float, float]:
    """Mean and sample standard deviation over seeds; 0 spread for a single one."""
    values = list(values)
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def log_odds_average(percentages: Iterable[float], n: Iterable[int] | None = None) -> float:
    """Mean over sets of log(acc / (1 - acc)), as the authors' transfer suite averages.

    An accuracy of 0 or 100 % has no finite log-odds: it is moved to half an image of the set's n (of 1e6 without n).
    """
    shares = np.asarray(list(percentages), dtype=np.float64) / 100
    margin = 0.5 / (np.asarray(list(n), dtype=np.float64) if n is not None else np.full(len(shares), 1e6))
    shares = np.clip(shares, margin, 1 - margin)
    return float(np.mean(np.log(shares / (1 - shares))))


def refuse_nan(values: np.ndarray, what: str) -> None:
    """Raise UserError if VALUES hold a NaN: the weights or the number format are broken, and no metric would say so."""
    # One pass without an (N, C) temporary: a NaN anywhere makes the minimum NaN.
    if values.size and np.isnan(values.min()):
        rows = int(np.isnan(values).reshape(len(values), -1).any(1).sum())
        raise UserError(f"{what} are NaN for {rows} of {len(values)} images; check the checkpoint or use --dtype fp32")
