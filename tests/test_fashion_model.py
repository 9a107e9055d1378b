"""The demo's world: the three parts of Fashion-MNIST, the exporter, the embedded model and how it was trained.

pytest tests/test_fashion_model.py
"""

from __future__ import annotations

import gzip
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from models import export_fashion, fashion
from utils.cli import run
from utils.storage import read_json, write_json

ROOT = Path(__file__).resolve().parent.parent
needs_originals = pytest.mark.skipif(
    not Path(fashion.DEBIAN).is_dir(), reason=f"no {fashion.DEBIAN} (apt-get install dataset-fashion-mnist); CI has it"
)


def unpacked(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes())


@pytest.fixture(scope="module")
def real() -> tuple[list[int], np.ndarray, np.ndarray]:
    return fashion.read_part("real")


@pytest.fixture(scope="module")
def test() -> tuple[list[int], np.ndarray, np.ndarray]:
    return fashion.read_part("test")


# ===== the three parts =====


def test_the_parts_are_disjoint_by_number_and_balanced(real, test):
    split = fashion.read_split()
    assert not set(split.real) & set(split.excluded) and set(split.real + split.excluded) < set(range(60_000))
    assert len(split.real) == 10_000 and 60_000 - len(split.real) - len(split.excluded) == 49_973
    for numbers, labels, images in (real, test):
        assert np.bincount(labels).tolist() == [1000] * 10
        assert images.shape == (10_000, 32, 32) and images.dtype == np.uint8 and len(numbers) == 10_000
        frame = images.copy()
        frame[:, 2:-2, 2:-2] = 0
        assert not frame.any()


def test_no_real_image_is_nearly_a_test_image(real, test):
    """Every pair, by |a|^2 - 2 a b + |b|^2, where models/fashion.py looks for neighbours in a tree."""
    rows, others = (images.reshape(len(images), -1).astype(np.float32) for _, _, images in (real, test))
    lengths = (others**2).sum(1)
    closest = min(
        ((block**2).sum(1)[:, None] - 2 * block @ others.T + lengths).min() for block in np.array_split(rows, 20)
    )
    found = np.sqrt(closest) / 28  # 28 x 28 pixels: the frame differs in none
    assert fashion.NEAR <= found < 2 * fashion.NEAR  # a bound that nothing comes near would prove nothing


@needs_originals
def test_the_parts_are_rebuilt_from_the_originals(tmp_path, capsys):
    assert run(fashion.main, fashion.get_args_parser(), ["--out", str(tmp_path)]) == 0
    assert "49973 images for the generator, 10000 real, 10000 test images; 27 near" in capsys.readouterr().out
    ours, again = (read_json(folder / "split.json") for folder in (fashion.FOLDER, tmp_path))
    names = sorted(ours.pop("sha256"))
    again.pop("sha256")  # another zlib may pack the same bytes otherwise
    assert ours == again
    for name in names:
        assert unpacked(tmp_path / name) == unpacked(fashion.FOLDER / name)
    for name in fashion.ORIGINALS:
        if name.startswith("t10k"):
            assert (fashion.FOLDER / name).read_bytes() == (Path(fashion.DEBIAN) / name).read_bytes()


@needs_originals
def test_the_generators_part_shares_no_pixels_with_the_others(real, test):
    numbers, labels, images = fashion.read_part("generator")
    assert len(images) == 49_973 and not set(numbers) & set(real[0])
    others = {image.tobytes() for _, _, images in (real, test) for image in images}
    assert len(others) == 20_000
    assert not any(image.tobytes() in others for image in images)
    whole, its_labels = fashion.read_original(fashion.DEBIAN, "train")
    assert (images[7, 2:-2, 2:-2] == whole[numbers[7]]).all() and (labels == its_labels[numbers]).all()


def test_near_is_what_a_plain_loop_finds():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 28, 28)).astype(np.uint8)
    others = rng.integers(0, 256, (20, 28, 28)).astype(np.uint8)
    for number, level in zip((3, 8, 11, 40), (0, 7, 8, 9), strict=True):  # root mean square of the change
        others[number // 3] = np.where(images[number] < 128, images[number] + level, images[number] - level)
    wanted = [
        number
        for number, image in enumerate(images)
        if any(np.sqrt(((image.astype(float) - other) ** 2).mean()) < fashion.NEAR for other in others)
    ]
    assert wanted == fashion.near(images, others).tolist() == [3, 8]


# ===== files that are not as they should be: one line, the remedy, exit code 2 =====


def refused(capsys, main, parser, *argv) -> str:
    assert run(main, parser, [str(word) for word in argv]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Traceback" not in said
    return said


def test_originals_that_are_missing_or_others_are_refused(tmp_path, capsys):
    def cut(source: Path) -> str:
        return refused(capsys, fashion.main, fashion.get_args_parser(), "--source", source, "--out", tmp_path / "out")

    assert "train-images-idx3-ubyte.gz is missing; apt-get install dataset-fashion-mnist" in cut(tmp_path)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"something else")
    assert "has another checksum than the file that was split; apt-get install" in cut(tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "harm, message",
    [
        ("missing", "real-images-idx3-ubyte.gz is missing; restore it from the repository: git checkout"),
        ("other", "real-images-idx3-ubyte.gz has another checksum than the file that was split; restore it"),
        ("overlap", "split.json: an image is in two parts; restore it from the repository"),
        ("twice", "split.json: an image is in two parts"),
        ("torn", "split.json"),
        ("no split", "split.json"),
    ],
)
def test_shipped_files_that_are_not_as_they_were_are_refused(tmp_path, monkeypatch, capsys, harm, message):
    folder = tmp_path / "fashion"
    shutil.copytree(fashion.FOLDER, folder)
    images, split = folder / "real-images-idx3-ubyte.gz", folder / "split.json"
    content = read_json(split)
    if harm == "missing":
        images.unlink()
    elif harm == "other":
        images.write_bytes(images.read_bytes()[:-1] + b"x")
    elif harm in ("overlap", "twice"):
        write_json(split, content | {{"overlap": "excluded", "twice": "real"}[harm]: [*content["real"], 3]})
    elif harm == "torn":
        split.write_bytes(split.read_bytes()[:1000])
    else:
        split.unlink()
    monkeypatch.setattr(export_fashion, "read_part", lambda part: fashion.read_part(part, folder=folder))
    said = refused(capsys, export_fashion.main, export_fashion.get_args_parser(), "--out", tmp_path / "data")
    assert message in said and "restore it" in said
    assert not list((tmp_path / "data").rglob("*.png"))


# ===== the exporter =====


def test_export_gives_each_part_under_its_own_numbers(real, test):
    sets = {name: list(images) for name, images in export_fashion.all_sets()}
    assert {name: len(images) for name, images in sets.items()} == {
        "fashion/real": 10_000,
        "fashion/test": 10_000,
        "fashion/test_noise": 2_000,
        "digits/train": 898,
        "digits/test": 899,
    }
    for name, (numbers, labels, images) in (("fashion/real", real), ("fashion/test", test)):
        assert [(one, int(number)) for one, number, _ in sets[name]] == [
            (fashion.WNIDS[label], number) for label, number in zip(labels, numbers, strict=True)
        ]
        assert all((pixels == image).all() for (_, _, pixels), image in zip(sets[name], images, strict=True))


def test_noise_is_of_the_stated_strength_and_is_drawn_once_for_all():
    clean = {place: pixels for *place, pixels in map(tuple, export_fashion.clothes("test")) for place in [tuple(place)]}
    noisy, again = (list(export_fashion.with_noise(export_fashion.clothes("test"))) for _ in range(2))
    assert all((one[2] == other[2]).all() for one, other in zip(noisy, again, strict=True))
    changes = np.stack([pixels.astype(float) - clean[class_id, number] for class_id, number, pixels in noisy])
    middle = np.stack([((grey := clean[one[0], one[1]]) > 80) & (grey < 175) for one in noisy])  # nothing is clipped
    assert changes[middle].std() / 255 == pytest.approx(export_fashion.NOISE, rel=0.01)
    assert abs(changes[middle].mean()) < 0.2
    assert not np.array_equal(changes[0][middle[0] & middle[1]], changes[1][middle[0] & middle[1]])


def test_digits_are_the_enlarged_originals_in_their_order():
    data = load_digits()
    halves = [list(export_fashion.digits(half)) for half in ("train", "test")]
    both = halves[0] + halves[1]
    assert [int(one) for one, _, _ in both] == data.target.tolist()
    images = np.stack([pixels for _, _, pixels in both])
    blocks = images.reshape(-1, 8, 4, 8, 4).mean(axis=(2, 4))  # back to 8x8
    assert np.corrcoef(blocks.ravel(), data.images.ravel())[0, 1] > 0.99
    assert not {image.tobytes() for image in images[:898]} & {image.tobytes() for image in images[898:]}


def test_export_writes_once_and_mends_damage(tmp_path, monkeypatch, capsys):
    few = {part: tuple(column[:40] for column in fashion.read_part(part)) for part in ("real", "test")}
    monkeypatch.setattr(export_fashion, "read_part", few.__getitem__)
    some = {half: list(islice(export_fashion.digits(half), 40)) for half in ("train", "test")}
    monkeypatch.setattr(export_fashion, "digits", some.__getitem__)

    def export() -> str:
        assert run(export_fashion.main, export_fashion.get_args_parser(), ["--out", str(tmp_path)]) == 0
        return capsys.readouterr().out

    assert f"{tmp_path}/fashion/real: 40 images, 40 of them written now" in export()
    files = sorted(tmp_path.rglob("*.png"))
    content, times = files[7].read_bytes(), [file.stat().st_mtime_ns for file in files]
    assert len(files) == 5 * 40
    number, label, pixels = (column[3] for column in few["test"])
    class_id = fashion.WNIDS[label]
    with Image.open(tmp_path / f"fashion/test/{class_id}/{class_id}_{number:05d}.png") as image:
        assert image.mode == "L" and (np.asarray(image) == pixels).all()
    files[7].write_bytes(content[:50])  # torn
    assert "40 images, 1 of them written now" in export()
    assert files[7].read_bytes() == content
    changed = [file for file, time in zip(files, times, strict=True) if file.stat().st_mtime_ns != time]
    assert changed == [files[7]] and "1 of them" not in export()
