"""How varied a set of images is, and how near another one, by their features.

    FID        Frechet distance of two Gaussians (Heusel et al., 2017)
    KID        squared MMD with the kernel (x.y / D + 1)^3, unbiased (Binkowski et al., 2018)
    precision, recall      share inside the other set's nearest-neighbour balls (Kynkaanniemi et al., 2019)
    density, coverage      the same, robust to outliers (Naeem et al., 2020)

On the features of a classifier FID and KID are not comparable with published ones, which use Inception; compare within
one checkpoint. All functions take and give numpy arrays.
"""

import numpy as np

NEIGHBOURS = 5  # of the balls of precision, recall, density and coverage (Naeem et al., 2020)
DUPLICATE = 0.995  # cosine similarity of centred descriptors from which two images of a class are near-duplicates
CHUNK_ROWS = 8192  # features summed at a time
BLOCK = 2048  # images compared at a time with all before them
MOST_IMAGES = 5000  # of a set whose distances or kernel, quadratic in them, are held at once


def is_finite(x: np.ndarray) -> bool:
    """Whether no number of x (N, D) is NaN or infinite; a block at a time, since x may be a file."""
    return all(np.isfinite(x[start : start + CHUNK_ROWS]).all() for start in range(0, len(x), CHUNK_ROWS))


def unit(x: np.ndarray) -> np.ndarray:
    """(N, D) rows of length 1."""
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def near_duplicates(x: np.ndarray) -> tuple[int, list[int]]:
    """(images (N, D) that have an earlier near-duplicate, the row numbers of the most similar pair)."""
    x, count, best, pair = unit(x), 0, -np.inf, []
    for start in range(0, len(x), BLOCK):
        similarity = x[start : start + BLOCK] @ x[: start + BLOCK].T  # (B, rows up to the block's end)
        before = np.tri(len(similarity), similarity.shape[1], start - 1, dtype=bool)  # column < row
        earlier = np.where(before, similarity, -np.inf)
        count += int((earlier.max(1) >= DUPLICATE).sum())
        if len(x) > 1 and earlier.max() > best:
            row, column = divmod(int(earlier.argmax()), earlier.shape[1])
            best, pair = earlier.max(), [column, start + row]
    return count, pair


def diversity(x: np.ndarray) -> float | None:
    """1 - mean cosine similarity of two different images: 0 all alike, about 1 unrelated."""
    if len(x) < 2:
        return None
    n = len(x)
    total = np.square(unit(x).sum(0, dtype=np.float64)).sum()  # sum over all pairs, with itself
    return float(1 - (total - n) / (n * (n - 1)))


def neighbourhoods(real: np.ndarray, fake: np.ndarray) -> dict[str, float]:
    """Precision, recall, density, coverage in percent (density may exceed 100) of real (N, D) and fake (M, D)."""
    from sklearn.metrics import pairwise_distances  # here: seconds of start-up

    # The distances of 65,000 images fill 34 GB.
    real, fake = (x[evenly(np.arange(len(x)), MOST_IMAGES)] for x in (real, fake))
    k = min(NEIGHBOURS, len(real) - 1, len(fake) - 1)
    if k < 1:
        return {}
    between = pairwise_distances(real, fake)  # (N, M)
    real_radius = np.partition(pairwise_distances(real), k, axis=1)[:, k]  # to the kth neighbour; column 0 is itself
    fake_radius = np.partition(pairwise_distances(fake), k, axis=1)[:, k]
    inside = between <= real_radius[:, None]
    return {
        "precision": 100 * float(inside.any(0).mean()),
        "recall": 100 * float((between <= fake_radius[None, :]).any(1).mean()),
        "density": 100 * float(inside.sum(0).mean()) / k,
        "coverage": 100 * float(inside.any(1).mean()),
    }


def moments(features: np.ndarray, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(mean (D,), covariance (D, D)) of some rows in float64, a block at a time: a million features stay on disk."""
    rows = np.arange(len(features)) if rows is None else rows
    origin = features[rows[0]].astype(np.float64)  # near the mean: sums of squares then cancel little
    total, squares = np.zeros_like(origin), np.zeros((len(origin), len(origin)))
    for start in range(0, len(rows), CHUNK_ROWS):
        block = features[rows[start : start + CHUNK_ROWS]].astype(np.float64) - origin
        total += block.sum(0)
        squares += block.T @ block
    mean = total / len(rows)
    return origin + mean, (squares - len(rows) * np.outer(mean, mean)) / max(1, len(rows) - 1)


def frechet_distance(x: tuple[np.ndarray, np.ndarray], y: tuple[np.ndarray, np.ndarray]) -> float:
    """|mean difference|^2 + trace(A + B - 2 sqrt(A B)) of two sets' moments."""
    (mean_x, a), (mean_y, b) = x, y
    difference = mean_x - mean_y
    # The eigenvalues of A B are real and not negative; symmetrized they need no matrix square root of A B.
    values, vectors = np.linalg.eigh(a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ b @ root).clip(0)).sum()
    return float(difference @ difference + np.trace(a) + np.trace(b) - 2 * cross)


def evenly(rows: np.ndarray, most: int) -> np.ndarray:
    """At most MOST of ROWS, at even distances."""
    return rows[np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int)]


def kernel_distance(x: np.ndarray, y: np.ndarray) -> float | None:
    """Unbiased squared MMD, times 1000 as is usual; None where a set has no two images."""
    n, m = len(x), len(y)
    if n < 2 or m < 2:
        return None

    def kernel(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return (left.astype(np.float64) @ right.T.astype(np.float64) / left.shape[1] + 1) ** 3

    within_x, within_y = kernel(x, x), kernel(y, y)
    same = (within_x.sum() - np.trace(within_x)) / (n * (n - 1)) + (within_y.sum() - np.trace(within_y)) / (m * (m - 1))
    return float(1000 * (same - 2 * kernel(x, y).mean()))
