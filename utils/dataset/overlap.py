"""Test images among the training images: the same pixels, or the same picture re-encoded, cropped or mirrored.

    train = describe(training_places, cache)      # places: paths, or (tar file, offset, bytes)
    test = describe(test_places, cache)
    found = overlap(test, train)                  # Found(exact=..., near=...), of test images

A picture is found in three steps, each dearer than the one before and each for fewer pairs:

1. Perceptual hashes (pHash of the library ImageHash: 64 signs of low frequencies) of the whole picture and of eight
   views of it without 7 % of one or two sides. The hash of a cropped copy is near that of a view of the original, so
   each picture's whole is compared with the other's views; test pictures are also compared mirrored.
2. Pairs up to MAX_BITS apart are aligned: crop, contrast and brightness that carry one 32 x 32 thumbnail onto the
   other, by Gauss-Newton steps (Lucas and Kanade, 1981). A copy leaves a remainder that is small beside the picture's
   own detail (MAX_REMAINDER); two pictures of one kind of thing, such as two handwritten sevens, do not.
3. Pairs that remain are decoded whole and compared pixel by pixel.

A picture without structure (a grey level's deviation below MIN_DEVIATION) counts only where its pixels are the same.
The constants are measured: see tests/dataset/test_overlap.py. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image

from utils.cli import UserError
from utils.images import BadImage, decode_rgb
from utils.storage import atomic_path, read_json, read_regular, sha256_file, write_json

FORMAT = 1  # raise it when descriptions change: cached ones are then made again
SIDE = 32  # pixels of a thumbnail
SIDES = [(0.0, 1.0), (0.0, 0.93), (0.07, 1.0)]  # of a view, from left or top, as parts of the picture
VIEWS = list(product(SIDES, SIDES))  # (horizontal, vertical); the first is the whole picture
MAX_BITS = 10  # of 64 between two hashes: unrelated photographs have 32, and one pair in 100,000 has 10
MAX_REMAINDER = 0.15  # of the detail: 97 of 100 copies leave less, two digits of one class at least 0.21
MIN_DEVIATION = 8  # grey levels of a thumbnail
ROWS, COLUMNS = 64, 4096  # pictures compared at once: a block stays in a core's cache
PAIRS = 512  # aligned at once
STEPS = 8  # of the alignment
MOST_BYTES = 256 << 20  # of an image file
DESCRIPTION = np.dtype([("hashes", "<u8", len(VIEWS)), ("thumb", "u1", (SIDE, SIDE)), ("readable", "?")])

Place = str | tuple[str, int, int]  # a file, or (tar file, offset, bytes)


@dataclass(frozen=True)
class Described:
    """Pictures where they lie, and an array of DESCRIPTION (N,) of them."""

    places: Sequence[Place]
    rows: np.ndarray


@dataclass(frozen=True)
class Found:
    """{index of a test image: index of the training image}: of the same pixels, and of nearly the same picture."""

    exact: dict[int, int]
    near: dict[int, int]


# ===== identical folders =====


def read_place(place: Place) -> bytes:
    """The bytes of an image file. OSError if it cannot be read, is not a regular file or is larger than MOST_BYTES."""
    if isinstance(place, str):
        return read_regular(place, MOST_BYTES)
    path, offset, size = place
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(min(size, MOST_BYTES))


def refuse_contained(train: Sequence[Place], test: Sequence[Place], option: str) -> None:
    """UserError that opens with OPTION if every test image is byte for byte a training image."""
    if contains_all(train, test):
        raise UserError(
            f"{option}: all {len(test):,} images are among the training images, so their accuracy says nothing of new "
            "ones; name others, or give --no-leak-check"
        )


def contains_all(train: Sequence[Place], test: Sequence[Place]) -> bool:
    """Whether every test image is byte for byte one of the training images, under whatever name.

    Ends at the first that is not, so that it costs little where nothing is wrong: the sizes of all files, a few reads.
    """
    by_size: dict[int, list[Place]] = {}
    for place in train:
        by_size.setdefault(_stat(place)[1], []).append(place)

    @lru_cache(maxsize=100_000)
    def digest(place: Place) -> bytes:
        return hashlib.sha256(read_place(place)).digest()

    def known(place: Place) -> bool:
        return any(digest(other) == digest(place) for other in by_size.get(_stat(place)[1], []))

    try:
        return len(test) > 0 and all(known(place) for place in test)
    except OSError:  # an unreadable image is told by whoever needs it
        return False


def _stat(place: Place) -> tuple[str, int, int]:
    """(folder and name, bytes, time of change in ns) of an image. UserError names one that is not there."""
    path = place[0] if isinstance(place, tuple) else place
    try:
        found = Path(path).stat()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); restore the folder") from None
    name = "/".join(Path(path).parts[-2:])
    if isinstance(place, tuple):
        return f"{name}@{place[1]}", place[2], found.st_mtime_ns
    return name, found.st_size, found.st_mtime_ns


# ===== describing pictures =====


def describe(places: Sequence[Place], cache: Path | None = None, what: str = "hashes") -> Described:
    """Hashes and thumbnails of images, made once: kept in the folder CACHE under the images' names, sizes and times.

    About 1 ms of a core an image beside its decoding at a reduced size; 1.1 KB an image on disk. A damaged cache file
    is seen by its checksum and made again. An image that cannot be read is left out of every comparison.
    """
    if cache is None:
        return Described(places, _describe_all(places, what))
    facts = [FORMAT, SIDE, VIEWS, [_stat(place) for place in places]]
    name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
    path, note = cache / f"{name}.npy", cache / f"{name}.json"
    if (kept := _read_kept(path, note, len(places))) is None:
        cache.mkdir(parents=True, exist_ok=True)
        made = _describe_all(places, what)
        with atomic_path(path, fsync=True) as temporary, open(temporary, "wb") as file:
            np.save(file, made)
        write_json(note, {"what": what, "images": len(places), "sha256": sha256_file(path)})
        kept = made
    return Described(places, kept)


def _read_kept(path: Path, note: Path, count: int) -> np.ndarray | None:
    """The array that an earlier run kept, or None where it is missing or not what was written."""
    try:
        if read_json(note)["sha256"] != sha256_file(path):
            return None
        kept = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, KeyError, TypeError, UserError):
        return None
    return kept if kept.shape == (count,) and kept.dtype == DESCRIPTION else None


def _describe_all(places: Sequence[Place], what: str) -> np.ndarray:
    from tqdm import tqdm

    rows = np.zeros(len(places), DESCRIPTION)

    def fill(index: int) -> None:
        try:
            picture = _grey(read_place(places[index]))
        except (OSError, BadImage):
            return
        rows[index] = (_hashes(picture), _thumb(picture), True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in tqdm(pool.map(fill, range(len(places)), chunksize=64), total=len(places), desc=what, unit="img",
                      leave=False, disable=None):  # fmt: skip
            pass
    return rows


def _grey(data: bytes) -> Image.Image:
    return Image.fromarray(decode_rgb(data, min_height=2 * SIDE, min_width=2 * SIDE)).convert("L")


def _thumb(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS))


def _hashes(picture: Image.Image) -> np.ndarray:
    """(views,) uint64: pHash of each view of a grey picture."""
    import imagehash

    side = 2 * SIDE
    small = picture.resize((side, side), Image.Resampling.LANCZOS)
    codes = np.empty(len(VIEWS), np.uint64)
    for number, ((left, right), (top, bottom)) in enumerate(VIEWS):
        box = (left * side, top * side, right * side, bottom * side)
        view = small.resize((SIDE, SIDE), Image.Resampling.LANCZOS, box=box)
        codes[number] = np.packbits(imagehash.phash(view).hash).view(np.uint64)[0]
    return codes


def mirrored(rows: np.ndarray) -> np.ndarray:
    """DESCRIPTION of the mirrored pictures, from their thumbnails."""
    flipped = rows.copy()
    flipped["thumb"] = rows["thumb"][:, :, ::-1]
    for row in flipped:
        row["hashes"] = _hashes(Image.fromarray(row["thumb"]))
    return flipped


# ===== comparing them =====


def overlap(test: Described, train: Described) -> Found:
    """Which test images are among the training images. Memory is bounded by blocks, whatever the number of pairs."""
    nearest: dict[int, tuple[float, int]] = {}  # test index -> (remainder, training index)
    twins: dict[int, int] = {}  # pictures of the same pixels
    digest = lru_cache(maxsize=100_000)(_pixels)
    for flip in (False, True):
        rows = mirrored(test.rows) if flip else test.rows
        for mine, theirs, start in _near_hashes(rows, train.rows):
            remainder, flat = _align(rows["thumb"][mine], train.rows["thumb"][theirs], start)
            same = (rows["thumb"][mine] == train.rows["thumb"][theirs]).all((1, 2)) & (not flip)
            for i, j in zip(mine[same].tolist(), theirs[same].tolist(), strict=True):
                if i not in twins and digest(test.places[i]) == digest(train.places[j]):
                    twins[i] = j
            for at in np.flatnonzero((remainder <= MAX_REMAINDER) & ~flat):
                i, pair = int(mine[at]), (float(remainder[at]), int(theirs[at]))
                nearest[i] = min(nearest.get(i, pair), pair)
    for i, (_, j) in nearest.items():  # the same pixels in another format are decoded a little differently when small
        if i not in twins and digest(test.places[i]) == digest(train.places[j]):
            twins[i] = j
    return Found(twins, {i: j for i, (_, j) in sorted(nearest.items()) if i not in twins})


def _pixels(place: Place) -> bytes:
    """Hash of an image's size and pixels; of nothing where it cannot be read."""
    try:
        pixels = decode_rgb(read_place(place))
    except (OSError, BadImage):
        return b""
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest()


def _starts() -> np.ndarray:
    """(2 * views - 1, 4): where the alignment begins, for test view k on a training picture, then the reverse.

    Coordinates run from -1 to 1; training pixel g shows what test pixel scale * g + shift shows: (scale, shift) in x
    and in y.
    """
    ahead = [[f(low, high) for low, high in view for f in (lambda a, b: b - a, lambda a, b: a + b - 1)]
             for view in VIEWS]  # fmt: skip
    back = [[1 / x, -sx / x, 1 / y, -sy / y] for x, sx, y, sy in ahead[1:]]
    return np.array([*ahead, *back])


def _near_hashes(test: np.ndarray, train: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(test indices, training indices, starts) of readable pairs at most MAX_BITS apart, at most PAIRS at a time."""
    views, starts = len(VIEWS), _starts()
    mine, theirs = (np.ascontiguousarray(rows["hashes"].T) for rows in (test, train))  # (views, N)
    compared = [(k, 0) for k in range(views)] + [(0, k) for k in range(1, views)]

    def search(corner: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(test indices, training indices, numbers of the comparison with the fewest bits) in one block."""
        i, j = corner
        shape = len(mine[0, i : i + ROWS]), len(theirs[0, j : j + COLUMNS])
        differing, bits = np.empty(shape, np.uint64), np.empty(shape, np.uint8)
        best: dict[int, tuple[int, int]] = {}  # place in the block -> (bits, number): few
        for number, (a, b) in enumerate(compared):
            np.bitwise_xor(mine[a, i : i + ROWS, None], theirs[b, None, j : j + COLUMNS], out=differing)
            np.bitwise_count(differing, out=bits)
            for at in np.flatnonzero(bits <= MAX_BITS).tolist():
                pair = (int(bits.flat[at]), number)
                best[at] = min(best.get(at, pair), pair)
        where = np.array(list(best), np.int64)
        return i + where // shape[1], j + where % shape[1], np.array([number for _, number in best.values()], np.int64)

    corners = product(range(0, len(test), ROWS), range(0, len(train), COLUMNS))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while batch := [corner for _, corner in zip(range(256), corners, strict=False)]:
            for a, b, which in pool.map(search, batch):
                use = test["readable"][a] & train["readable"][b]
                a, b, which = a[use], b[use], which[use]
                for at in range(0, len(a), PAIRS):
                    yield a[at : at + PAIRS], b[at : at + PAIRS], starts[which[at : at + PAIRS]]


def _align(test: np.ndarray, train: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """((P,) remainder, (P,) whether the picture has no structure) of pairs of thumbnails (P, SIDE, SIDE).

    START (P, 4) as in _starts. The remainder is (1 - correlation) / (energy of the Laplacian / energy), where both
    show the same part of the picture.
    """
    a, b = (_smooth(one.astype(np.float32)) for one in (test, train))
    grid = ((np.arange(SIDE) + 0.5) / SIDE * 2 - 1).astype(np.float32)
    coarse, seen = grid[::2], b[:, ::2, ::2]  # every fourth pixel tells where to go
    place = start.astype(np.float32)
    for _ in range(STEPS):
        warped, along_x, along_y, shared = _warp(a, place, coarse)
        columns = [along_x * coarse, along_x, along_y * coarse[:, None], along_y, warped, np.ones_like(warped)]
        slopes = (np.stack(columns, 1) * shared[:, None]).reshape(len(a), len(columns), -1)
        left = ((seen - warped) * shared).reshape(len(a), -1, 1)
        normal = slopes @ slopes.transpose(0, 2, 1)
        damping = 1e-6 * np.trace(normal, axis1=1, axis2=2) / len(columns) + 1e-3
        normal += damping[:, None, None] * np.eye(len(columns), dtype=np.float32)
        step = np.linalg.solve(normal, slopes @ left)
        place += step[:, :4, 0].clip(-0.1, 0.1)
        place[:, 0::2] = place[:, 0::2].clip(0.75, 1.35)  # crops of up to a quarter of a side
        place[:, 1::2] = place[:, 1::2].clip(-0.4, 0.4)
    warped, _, _, shared = _warp(a, place, grid)
    area = shared.sum((1, 2)).clip(1)
    a, b = ((one - ((one * shared).sum((1, 2)) / area)[:, None, None]) * shared for one in (warped, b))  # centred
    energy = (b * b).sum((1, 2))
    correlation = (a * b).sum((1, 2)) / np.sqrt((a * a).sum((1, 2)) * energy + 1e-6)
    inner = shared[:, :-2, 1:-1] * shared[:, 2:, 1:-1] * shared[:, 1:-1, :-2] * shared[:, 1:-1, 2:]
    bend = 4 * b[:, 1:-1, 1:-1] - b[:, :-2, 1:-1] - b[:, 2:, 1:-1] - b[:, 1:-1, :-2] - b[:, 1:-1, 2:]
    detail = (bend * bend * inner).sum((1, 2)) / inner.sum((1, 2)).clip(1)
    remainder = (1 - correlation) * (energy / area) / (detail + 1e-6)
    return remainder, energy / area < MIN_DEVIATION**2


def _smooth(thumbs: np.ndarray) -> np.ndarray:
    """[1 2 1] / 4 along both sides of (P, SIDE, SIDE): what is finer is the encoder's."""
    wide = np.pad(thumbs, ((0, 0), (1, 1), (1, 1)), mode="edge")
    tall = (wide[:, :-2] + 2 * wide[:, 1:-1] + wide[:, 2:]) / 4
    return (tall[:, :, :-2] + 2 * tall[:, :, 1:-1] + tall[:, :, 2:]) / 4


def _warp(a: np.ndarray, place: np.ndarray, grid: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A (P, SIDE, SIDE) at scale * g + shift with its slopes along x and y, and 1 where that lies inside it.

    Cubic convolution (Keys, 1981). It is separable, so that two small matrices do it.
    """
    matrices = []
    for scale, shift in ((place[:, 0], place[:, 1]), (place[:, 2], place[:, 3])):
        where = scale[:, None] * grid + shift[:, None]  # (P, SIDE)
        pixel = ((where + 1) * SIDE / 2 - 0.5).clip(0, SIDE - 1)
        signed = pixel[:, :, None] - np.arange(SIDE, dtype=np.float32)
        far = np.abs(signed)
        near = far < 1
        weight = np.where(near, (1.5 * far - 2.5) * far**2 + 1, ((-0.5 * far + 2.5) * far - 4) * far + 2)
        slope = np.where(near, (4.5 * far - 5) * far, (-1.5 * far + 5) * far - 4) * np.sign(signed) * (SIDE / 2)
        inside = far < 2
        matrices.append((weight * inside, slope * inside, np.abs(where) <= 1 - 0.5 / SIDE))
    (x, slope_x, in_x), (y, slope_y, in_y) = matrices
    across = a @ x.transpose(0, 2, 1)
    shared = (in_y[:, :, None] & in_x[:, None, :]).astype(np.float32)
    return y @ across, y @ (a @ slope_x.transpose(0, 2, 1)), slope_y @ across, shared
