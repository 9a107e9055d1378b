"""Test images among the training images: the same pixels, or the same picture encoded anew, resized, cut or mirrored.

A picture is found in three steps, each dearer than the one before and each for fewer pairs:

1. Perceptual hashes (pHash of the library ImageHash: 64 signs of low frequencies) of the whole picture and of eight
   views of it without 7 % of one or two sides. The hash of a cut copy is near that of a view of the original, so each
   picture's whole is compared with the other's views; test pictures are also compared mirrored.
2. Pairs up to MAX_BITS apart are aligned: the cut, contrast and brightness that carry one thumbnail onto the other, by
   Gauss-Newton steps (Lucas and Kanade, 1981). A copy leaves a remainder that is small beside the picture's own detail
   (MAX_REMAINDER); two pictures of one kind of thing, such as two handwritten sevens, do not.
3. Pairs that remain are decoded whole and compared pixel by pixel.

A picture without structure (its grey levels deviate by less than MIN_DEVIATION), or of a side of no more than SIDE
pixels, counts only where all pixels are the same: two of three 28-pixel photographs of clothes would pass for copies
of another of their kind. The constants are measured: see tests/dataset/test_overlap.py. Imports no torch.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from itertools import islice, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from utils.cli import UserError
from utils.images import BadImage, decode_rgb, read_image
from utils.storage import atomic_path, read_json, sha256_bytes, sha256_file, write_json

FORMAT = 2  # raise it when descriptions change: cached ones are then made again
SIDE = 32  # pixels of a thumbnail
SIDES = [(0.0, 1.0), (0.0, 0.93), (0.07, 1.0)]  # of a view, from left or top, as parts of the picture
VIEWS = list(product(SIDES, SIDES))  # (horizontal, vertical); the first is the whole picture
MAX_BITS = 10  # of 64 between two hashes: unrelated photographs have 32, and one pair in 100,000 has 10
MAX_REMAINDER = 0.15  # of the detail: 97 of 100 copies leave less, two digits of one class at least 0.21
MIN_DEVIATION = 8  # grey levels of a thumbnail
ROWS, COLUMNS = 64, 4096  # pictures compared at once: a block stays in a core's cache
PAIRS = 512  # aligned at once
STEPS = 8  # of the alignment
FLAGS = [("readable", "?"), ("large", "?")]  # whether it could be decoded, and has more than SIDE pixels a side
DESCRIPTION = np.dtype([("hashes", "<u8", len(VIEWS)), ("thumb", "u1", (SIDE, SIDE)), *FLAGS])

Place = str | tuple[str, int, int]  # a file, or (tar file, offset, bytes)


class Described(NamedTuple):
    """Pictures where they lie, and an array of DESCRIPTION (N,) of them."""

    places: Sequence[Place]
    rows: np.ndarray


class Found(NamedTuple):
    """{index of a test image: index of the training image}: of the same pixels, and of nearly the same picture."""

    exact: dict[int, int]
    near: dict[int, int]


def read_place(place: Place) -> bytes:
    """The bytes of an image file. Raises BadImage if it cannot be read or is not a regular file."""
    if isinstance(place, str):
        return read_image(place)
    with open(place[0], "rb") as file:
        file.seek(place[1])
        return file.read(place[2])


def refuse_contained(train: Sequence[Place], test: Sequence[Place], option: str) -> None:
    """UserError that opens with OPTION if every test image is byte for byte a training image, under whatever name."""
    by_size: dict[int, list[Place]] = {}
    for place in train:
        by_size.setdefault(_stat(place)[1], []).append(place)
    digest = lru_cache(maxsize=100_000)(lambda place: sha256_bytes(read_place(place)))
    try:  # ends at the first new one: where nothing is wrong it costs the sizes of all files and a few reads
        new = any(all(digest(one) != digest(place) for one in by_size.get(_stat(place)[1], [])) for place in test)
    except (OSError, BadImage):  # an unreadable image is told by whoever needs it
        return
    if len(test) and not new:
        raise UserError(f"{option}: all {len(test):,} images are among the training images, so their accuracy says "
                        "nothing of new ones; name others, or give --no-leak-check")  # fmt: skip


def _stat(place: Place) -> tuple[str, int, int]:
    """(folder and name, bytes, time of change in ns) of an image; -1 bytes if it is not there."""
    path, *part = (place,) if isinstance(place, str) else place
    name = "/".join(Path(path).parts[-2:])
    try:
        found = Path(path).stat()
    except OSError:
        return name, -1, 0
    return (f"{name}@{part[0]}", part[1], found.st_mtime_ns) if part else (name, found.st_size, found.st_mtime_ns)


# ===== describing pictures =====


def describe(places: Sequence[Place], cache: Path | None = None, what: str = "hashes") -> Described:
    """Hashes and thumbnails of images, made once: kept in the folder CACHE under the images' names, sizes and times.

    A damaged cache file is seen by its checksum and made again; an image that cannot be read is never compared.
    """
    if cache is None:
        return Described(places, _describe_all(places, what))
    facts = [FORMAT, SIDE, VIEWS, [_stat(place) for place in places]]
    path = cache / f"{sha256_bytes(json.dumps(facts).encode())[:32]}.npy"
    note = path.with_suffix(".json")
    with suppress(UserError, OSError, ValueError, EOFError):  # missing or damaged: made again
        kept = np.load(path, mmap_mode="r", allow_pickle=False)
        if read_json(note) == {"images": len(kept), "sha256": sha256_file(path)} and kept.dtype == DESCRIPTION:
            return Described(places, kept)
    rows = _describe_all(places, what)
    cache.mkdir(parents=True, exist_ok=True)
    with atomic_path(path, fsync=True) as temporary, open(temporary, "wb") as file:
        np.save(file, rows)
    write_json(note, {"images": len(rows), "sha256": sha256_file(path)})
    return Described(places, rows)


def _describe_all(places: Sequence[Place], what: str) -> np.ndarray:
    rows = np.zeros(len(places), DESCRIPTION)

    def fill(index: int) -> None:
        with suppress(OSError, BadImage):
            pixels = decode_rgb(read_place(places[index]), min_height=2 * SIDE, min_width=2 * SIDE)
            picture = Image.fromarray(pixels).convert("L")
            thumb = np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS))
            large = min(picture.size) > SIDE
            rows[index] = (_hashes(picture) if large else 0, thumb, True, large)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = pool.map(fill, range(len(places)))
        list(tqdm(made, total=len(places), desc=what, unit="img", leave=False, disable=None))
    return rows


def _hashes(picture: Image.Image) -> np.ndarray:
    """(views,) uint64: pHash of each view of a grey picture."""
    import imagehash  # here: it loads scipy, which a training run without validation does not wait for

    small = picture.resize((2 * SIDE, 2 * SIDE), Image.Resampling.LANCZOS)
    codes = np.empty(len(VIEWS), np.uint64)
    for number, ((left, right), (top, bottom)) in enumerate(VIEWS):
        box = (2 * SIDE * left, 2 * SIDE * top, 2 * SIDE * right, 2 * SIDE * bottom)
        view = small.resize((SIDE, SIDE), Image.Resampling.LANCZOS, box=box)
        codes[number] = np.packbits(imagehash.phash(view).hash).view(np.uint64)[0]
    return codes


def mirrored(rows: np.ndarray) -> np.ndarray:
    """DESCRIPTION of the mirrored pictures, from their thumbnails."""
    flipped = rows.copy()
    flipped["thumb"] = rows["thumb"][:, :, ::-1]
    for index in np.flatnonzero(rows["large"]):
        flipped["hashes"][index] = _hashes(Image.fromarray(flipped["thumb"][index]))
    return flipped


# ===== comparing them =====


def overlap(test: Described, train: Described) -> Found:
    """Which test images are among the training images. Memory is bounded by blocks, whatever the number of pairs."""
    nearest: dict[int, tuple[float, int]] = {}  # test index -> (remainder, training index)
    exact: dict[int, int] = {}
    digest = lru_cache(maxsize=100_000)(_pixels)

    def compare(i: int, j: int) -> None:
        with suppress(OSError, BadImage):  # gone meanwhile
            if i not in exact and digest(test.places[i]) == digest(train.places[j]):
                exact[i] = j

    small: dict[bytes, list[int]] = {}
    for j in np.flatnonzero(train.rows["readable"] & ~train.rows["large"]).tolist():
        small.setdefault(train.rows["thumb"][j].tobytes(), []).append(j)
    for i in np.flatnonzero(~test.rows["large"]).tolist():
        for j in small.get(test.rows["thumb"][i].tobytes(), ()):
            compare(i, j)
    for flip in (False, True):
        rows = mirrored(test.rows) if flip else test.rows
        for mine, theirs, start in _near_hashes(rows, train.rows):
            thumbs = rows["thumb"][mine], train.rows["thumb"][theirs]
            remainder, flat = _align(*thumbs, start)
            for at in np.flatnonzero((thumbs[0] == thumbs[1]).all((1, 2)) & (not flip)):
                compare(int(mine[at]), int(theirs[at]))
            for at in np.flatnonzero((remainder <= MAX_REMAINDER) & ~flat):
                i, pair = int(mine[at]), (float(remainder[at]), int(theirs[at]))
                nearest[i] = min(nearest.get(i, pair), pair)
    for i, (_, j) in nearest.items():  # the same pixels in another format are decoded a little differently when small
        compare(i, j)
    return Found(exact, {i: j for i, (_, j) in sorted(nearest.items()) if i not in exact})


def _pixels(place: Place) -> bytes:
    """Hash of an image's size and pixels."""
    pixels = decode_rgb(read_place(place))
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest()


def _starts() -> np.ndarray:
    """(2 * views - 1, 4): where the alignment begins, for test view k on a training picture, then the reverse.

    Coordinates run from -1 to 1; training pixel g shows what test pixel scale * g + shift shows: (scale, shift) in x
    and in y.
    """
    low, high = np.moveaxis(np.array(VIEWS), 2, 0)  # (views, 2) each: in x and y
    scale, shift = high - low, high + low - 1
    ahead, back = np.stack([scale, shift], 2), np.stack([1 / scale, -shift / scale], 2)[1:]
    return np.concatenate([ahead, back]).reshape(-1, 4)


def _near_hashes(test: np.ndarray, train: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(test indices, training indices, starts) of large pairs at most MAX_BITS apart, at most PAIRS at a time."""
    views, starts = len(VIEWS), _starts()
    large = [np.flatnonzero(rows["large"]) for rows in (test, train)]
    both = zip((test, train), large, strict=True)
    mine, theirs = (np.ascontiguousarray(rows["hashes"][its].T) for rows, its in both)  # (views, N)
    compared = [(k, 0) for k in range(views)] + [(0, k) for k in range(1, views)]

    def search(corner: tuple[int, int]) -> np.ndarray:
        """(3, pairs): test index, training index, number of the comparison with the fewest bits, in one block."""
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
        pairs = [(i + at // shape[1], j + at % shape[1], number) for at, (_, number) in best.items()]
        return np.array(pairs, np.int64).reshape(-1, 3).T

    corners = product(range(0, len(large[0]), ROWS), range(0, len(large[1]), COLUMNS))
    bar = tqdm(total=len(large[0]), desc="overlap", unit="img", leave=False, disable=None)
    with bar, ThreadPoolExecutor(os.cpu_count()) as pool:
        while some := list(islice(corners, 256)):
            bar.update(some[-1][0] - bar.n)
            for found in pool.map(search, some):
                for a, b, which in (found[:, at : at + PAIRS] for at in range(0, found.shape[1], PAIRS)):
                    yield large[0][a], large[1][b], starts[which]


def _align(test: np.ndarray, train: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """((P,) remainder, (P,) whether the picture has no structure) of pairs of thumbnails (P, SIDE, SIDE).

    START (P, 4) as in _starts. The remainder is (1 - correlation) * energy / energy of the Laplacian, where both show
    the same part of the picture.
    """
    from scipy.ndimage import convolve1d  # here, as imagehash

    a, b = test.astype(np.float32), train.astype(np.float32)
    for axis in (1, 2):  # what is finer is the encoder's
        a, b = (convolve1d(one, [0.25, 0.5, 0.25], axis, mode="nearest") for one in (a, b))
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
