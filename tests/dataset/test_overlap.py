"""Test images among training images: copies planted under other encodings, sizes, crops and mirrored, all found."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from models.fashion import read_part
from utils.cli import UserError
from utils.dataset import overlap
from utils.dataset.overlap import Found

PHOTOGRAPHS = load_sample_images().images
DAMAGES = ("jpeg", "resized", "cropped", "mirrored", "cropped and mirrored")


def leaves(rng: np.random.Generator, size: int = 64) -> np.ndarray:
    """A scene of occluding discs and boxes cut from two photographs ("dead leaves"): edges and spectrum of nature."""

    def patch(side: int) -> Image.Image:
        photograph = PHOTOGRAPHS[rng.integers(2)]
        y, x = rng.integers(0, np.array(photograph.shape[:2]) - side)
        return Image.fromarray(np.rot90(photograph[y : y + side, x : x + side], rng.integers(4)))

    scene = patch(size)
    for _ in range(16):
        radius = int(np.clip(6 * rng.pareto(1.5) + 4, 4, 40))
        mask = Image.new("L", (2 * radius, 2 * radius), 0)
        x, y = np.mgrid[: 2 * radius, : 2 * radius] - radius
        disc = np.uint8(255 * (x**2 + y**2 < radius**2)) if rng.random() < 0.6 else np.full(x.shape, 255, np.uint8)
        mask = Image.fromarray(disc)
        scene.paste(patch(2 * radius), tuple(rng.integers(-radius, size - radius, 2).tolist()), mask)
    return np.asarray(scene)


def digits() -> list[np.ndarray]:
    """The 1,797 handwritten digits as 64 x 64 RGB: 180 of each class, very much alike."""
    grey = np.uint8(load_digits().images * 255 / 16)
    return [np.asarray(Image.fromarray(one).resize((64, 64), Image.Resampling.BICUBIC).convert("RGB")) for one in grey]


def damaged(pixels: np.ndarray, kind: str, rng: np.random.Generator) -> bytes:
    """A copy as others make it: JPEG of quality 60 to 95 after resizing, cutting up to 10 % of each side, a mirror."""
    image = Image.fromarray(pixels)
    width, height = image.size
    if "resized" in kind:
        image = image.resize((round(width * rng.uniform(0.6, 1.5)), round(height * rng.uniform(0.6, 1.5))))
    if "cropped" in kind:
        wide, high = rng.uniform(0.9, 1, 2)
        left, top = rng.uniform(0, 1 - wide), rng.uniform(0, 1 - high)
        image = image.resize(image.size, box=(left * width, top * height, (left + wide) * width, (top + high) * height))
    if "mirrored" in kind:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return encoded(image, "JPEG", quality=int(rng.integers(60, 96)))


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def written(folder: Path, files: list[bytes]) -> list[str]:
    folder.mkdir(parents=True)
    places = [str(folder / f"{number:05d}.img") for number in range(len(files))]
    for place, data in zip(places, files, strict=True):
        Path(place).write_bytes(data)
    return places


def found_among(tmp_path: Path, test: list[bytes], train: list[bytes]) -> Found:
    places = written(tmp_path / "test", test), written(tmp_path / "train", train)
    return overlap.overlap(*(overlap.describe(some) for some in places))


# ===== planted copies =====


@pytest.mark.parametrize("world", ["scenes", "digits"])
def test_five_planted_among_two_thousand_are_found_and_no_other(tmp_path, world):
    rng = np.random.default_rng(7)
    test_count, train_count = (400, 2000) if world == "scenes" else (797, 1000)
    pool = [leaves(rng) for _ in range(test_count + train_count)] if world == "scenes" else digits()
    test, train = pool[:test_count], [encoded(one) for one in pool[test_count:]]
    planted = dict(zip(range(0, 50, 10), rng.choice(train_count, 5, replace=False).tolist(), strict=True))
    for kind, (mine, place) in zip(DAMAGES, planted.items(), strict=True):
        train[place] = damaged(test[mine], kind, rng)
    assert found_among(tmp_path, [encoded(one) for one in test], train) == Found({}, planted)


def test_pictures_too_small_to_tell_apart_count_only_when_their_pixels_are_equal(tmp_path):
    """Real clothes of 32 pixels, 40 of a class among 80: by their shapes most would pass for copies of another."""
    _, labels, images = read_part("test")
    some = [np.flatnonzero(labels == label)[:120] for label in range(10)]
    test, train = (
        [encoded(images[row]) for rows in some for row in rows[part]] for part in (slice(40), slice(40, 120))
    )
    train[17], train[300], train[301] = test[5], encoded(Image.open(io.BytesIO(test[200])), "BMP"), test[200]
    assert found_among(tmp_path, test, train) == Found({5: 17, 200: 300}, {})


@pytest.mark.parametrize("kind", DAMAGES)
def test_nineteen_of_twenty_copies_are_found_in_either_direction(tmp_path, kind):
    rng = np.random.default_rng(3)
    pictures = [leaves(rng) for _ in range(60)]
    whole, copies = [encoded(one) for one in pictures], [damaged(one, kind, rng) for one in pictures]
    for name, test, train in (("a", whole, copies), ("b", copies, whole)):
        found = found_among(tmp_path / name, test, train).near
        assert all(mine == theirs for mine, theirs in found.items()) and len(found) >= 57


def test_the_same_pixels_are_exact_in_any_format(tmp_path):
    rng = np.random.default_rng(1)
    pictures = [leaves(rng) for _ in range(6)]
    jpeg = encoded(pictures[2], "JPEG", quality=90)
    train = [encoded(pictures[0]), jpeg, encoded(Image.open(io.BytesIO(jpeg)), "BMP"), encoded(pictures[5])]
    test = [encoded(pictures[1]), encoded(pictures[0], "TIFF"), encoded(Image.open(io.BytesIO(jpeg)))]
    found = found_among(tmp_path, test, train)
    assert found.exact.keys() == {1, 2} and found.exact[1] == 0 and found.exact[2] in (1, 2) and not found.near


def test_pictures_without_structure_count_only_when_their_pixels_are_equal(tmp_path):
    def plain(grey: int, slope: float) -> bytes:
        ramp = grey + slope * np.arange(64)[None, :] + np.zeros((64, 64))
        return encoded(np.repeat(np.uint8(ramp)[..., None], 3, -1))

    found = found_among(tmp_path, [plain(0, 0), plain(10, 2), plain(40, 1)], [plain(0, 0), plain(20, 2), plain(1, 0)])
    assert found == Found({0: 0}, {})


def test_one_picture_many_times_keeps_memory_and_counts_bounded(tmp_path):
    rng = np.random.default_rng(2)
    same = encoded(leaves(rng))
    found = found_among(tmp_path, [same] * 60, [same] * 70)
    assert len(found.exact) == 60 and not found.near


def test_unreadable_images_are_left_out(tmp_path):
    rng = np.random.default_rng(5)
    picture = encoded(leaves(rng))
    places = written(tmp_path / "train", [b"no image", picture[:200], picture])
    os.mkfifo(tmp_path / "fifo")
    train = overlap.describe([*places, str(tmp_path / "fifo"), str(tmp_path / "gone")])
    assert train.rows["readable"].tolist() == [False, False, True, False, False]
    assert overlap.overlap(overlap.describe(places), train) == Found({2: 2}, {})
    again = overlap.describe(train.places, tmp_path / "cache")
    assert (again.rows == train.rows).all()


# ===== the search =====


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), tests=st.integers(1, 150), trains=st.integers(1, 150))
def test_the_search_by_blocks_finds_what_a_plain_loop_finds(seed, tests, trains):
    rng = np.random.default_rng(seed)

    def described(count: int) -> np.ndarray:
        rows = np.zeros(count, overlap.DESCRIPTION)
        base = rng.integers(0, 2**63, 4, dtype=np.uint64)
        noise = np.bitwise_and.reduce(rng.integers(0, 2**63, (3, count, len(overlap.VIEWS)), dtype=np.uint64))
        rows["hashes"] = rng.choice(np.uint64([1, 2**40, 77, *base]), (count, len(overlap.VIEWS))) ^ noise
        rows["readable"] = True
        rows["large"] = rng.random(count) < 0.9  # what cannot be read is not
        return rows

    test, train = described(tests), described(trains)
    wanted = {
        (i, j)
        for i in range(tests)
        for j in range(trains)
        if test["large"][i] and train["large"][j]
        and min(
            [(int(a) ^ int(train["hashes"][j][0])).bit_count() for a in test["hashes"][i]]
            + [(int(test["hashes"][i][0]) ^ int(b)).bit_count() for b in train["hashes"][j]]
        ) <= overlap.MAX_BITS
    }  # fmt: skip
    pairs = [pair for a, b, _ in overlap._near_hashes(test, train) for pair in zip(a.tolist(), b.tolist(), strict=True)]
    assert len(pairs) == len(wanted) and set(pairs) == wanted


def test_the_alignment_knows_a_crop_it_was_not_told_of():
    """A smooth picture and its part, drawn from one formula: what remains is the interpolation's error."""
    grid = (np.arange(overlap.SIDE) + 0.5) / overlap.SIDE * 2 - 1

    def picture(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return 120 + 50 * np.sin(5 * x[None, :] + 1) * np.cos(4 * y[:, None]) + 30 * np.sin(7 * y[:, None] - x[None, :])

    whole, part = picture(grid, grid), picture(0.93 * grid - 0.05, 0.96 * grid + 0.03)
    start = np.array([[1.0, 0, 1, 0]])
    remainder, flat = overlap._align(whole[None], 0.7 * part[None] + 20, start)  # also paler
    assert remainder[0] < 0.1 and not flat[0]
    other = picture(-grid, grid)
    assert overlap._align(whole[None], other[None], start)[0][0] > 0.5


# ===== the cache =====


def test_descriptions_are_kept_under_what_the_images_are(tmp_path, monkeypatch):
    rng = np.random.default_rng(4)
    places = written(tmp_path / "images", [encoded(leaves(rng)) for _ in range(5)])
    cache = tmp_path / "run" / "hashes"
    first = overlap.describe(places, cache)
    assert sorted(os.listdir(tmp_path / "images")) == [f"{k:05d}.img" for k in range(5)]  # nothing in the user's folder

    def made_again(some, what):
        raise AssertionError("not from the cache")

    with monkeypatch.context() as patch:
        patch.setattr(overlap, "_describe_all", made_again)
        assert (overlap.describe(places, cache).rows == first.rows).all()
        with pytest.raises(AssertionError, match="not from the cache"):
            overlap.describe(places[1:], cache)
        os.utime(places[0], ns=(1, 1))
        with pytest.raises(AssertionError, match="not from the cache"):
            overlap.describe(places, cache)


@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "note", "list"])
def test_a_damaged_cache_is_made_again(tmp_path, harm):
    rng = np.random.default_rng(4)
    places = written(tmp_path / "images", [encoded(leaves(rng)) for _ in range(3)])
    rows = overlap.describe(places, tmp_path / "cache").rows
    (path,), (note,) = (list((tmp_path / "cache").glob(f"*.{suffix}")) for suffix in ("npy", "json"))
    data = path.read_bytes()
    if harm == "flip":
        path.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    elif harm in ("cut", "empty"):
        path.write_bytes(data[: len(data) // 2 if harm == "cut" else 0])
    else:
        note.write_text("{" if harm == "note" else "[]")
    again = overlap.describe(places, tmp_path / "cache").rows
    assert (again == rows).all() and path.read_bytes() == data


# ===== a test set inside the training set =====


def test_a_subset_is_known_by_its_bytes_under_any_name(tmp_path):
    rng = np.random.default_rng(6)
    files = [encoded(leaves(rng)) for _ in range(12)]
    train, test = written(tmp_path / "train", files), written(tmp_path / "test", files[3:7][::-1])
    assert contained(train, test) and contained(train, train)
    assert not contained(test, train)
    Path(test[2]).write_bytes(Path(test[2]).read_bytes()[:-1] + b"x")  # as long as before
    assert not contained(train, test)
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for place in train:
            tar.add(place)
    with tarfile.open(tmp_path / "shard.tar") as tar:
        members = [(str(tmp_path / "shard.tar"), member.offset_data, member.size) for member in tar]
    assert contained(members, train) and contained(train, members)
    assert overlap.overlap(overlap.describe(train[:2]), overlap.describe(members)) == Found({0: 0, 1: 1}, {})
    os.mkfifo(tmp_path / "fifo")
    for lost in ("gone", "fifo"):  # told by whoever needs them
        assert not contained(train, [str(tmp_path / lost)]) and not contained([*train, str(tmp_path / lost)], test)


def contained(train, test) -> bool:
    try:
        overlap.refuse_contained(train, test, "--val")
        return False
    except UserError as error:
        if f"--val: all {len(test)} images are among" not in str(error):
            raise
        return True


def test_hashes_are_the_librarys(tmp_path):
    import imagehash

    rng = np.random.default_rng(8)
    picture = Image.fromarray(leaves(rng, 64)).convert("L")
    small = picture.resize((overlap.SIDE, overlap.SIDE), Image.Resampling.LANCZOS)
    code = overlap._hashes(picture)[0]
    assert f"{int.from_bytes(code.tobytes(), 'big'):016x}" == str(imagehash.phash(small))
    rows = np.zeros(1, overlap.DESCRIPTION)
    rows["thumb"][0], rows["large"] = np.asarray(small), True
    again = overlap.mirrored(overlap.mirrored(rows))
    assert (again["thumb"] == rows["thumb"]).all()
