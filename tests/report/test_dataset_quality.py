"""A look at a dataset: measures against their definitions, planted faults found, bad input refused."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image
from scipy.linalg import sqrtm

import evaluate
from tests.dataset.test_folder import record_of
from utils.cli import run
from utils.dataset.folder import known_images
from utils.report import measures
from utils.report.figures import Folder
from utils.storage import append_jsonl, read_json, write_json
from utils.training.image_sets import open_sources


def call(*arguments):
    return run(evaluate.main, evaluate.get_args_parser(), [str(argument) for argument in arguments])


def write_images(folder, per_class, seed, copies=0):
    """Noise in two colours; the last COPIES images of the first class repeat its first one."""
    rng = np.random.default_rng(seed)
    for label, class_id in enumerate(("apple", "pear")):
        (folder / class_id).mkdir(parents=True)
        base = np.array([(200, 60, 60), (60, 200, 60)][label])
        pixels = [np.clip(base + rng.normal(0, 60, (48, 48, 3)), 0, 255).astype(np.uint8) for _ in range(per_class)]
        if copies and label == 0:
            pixels[-copies:] = [pixels[0]] * copies
        for index, image in enumerate(pixels):
            Image.fromarray(image).save(folder / class_id / f"{index:03}.png")


def test_planted_duplicates_are_found_without_a_checkpoint(tmp_path, capsys):
    write_images(tmp_path / "data", 10, seed=0, copies=3)
    assert call("--dataset-report", tmp_path / "data", "--out", tmp_path / "look") == 0
    record = read_json(tmp_path / "look/dataset_report.json")
    assert [row["id"] for row in record["classes"]] == ["apple", "pear"]  # the less diverse class first
    apple, pear = record["classes"]
    assert (apple["duplicates"], pear["duplicates"]) == (30.0, 0.0)
    assert apple["diversity"] < pear["diversity"]
    assert apple["closest"][0].endswith("/000.png")
    page = (tmp_path / "look/dataset_report.html").read_text()
    assert "most alike" in page and page.count("data:image/webp;base64,") == 3
    assert "http" not in page.replace("http-equiv", "")
    assert "images       20" in capsys.readouterr().out


def test_against_real_images(tmp_path):
    write_images(tmp_path / "synthetic", 12, seed=0)
    write_images(tmp_path / "real", 12, seed=1)
    (tmp_path / "real/plum").mkdir()
    Image.new("RGB", (48, 48)).save(tmp_path / "real/plum/0.png")
    command = ("--dataset-report", tmp_path / "synthetic", "--checkpoint", checkpoint(tmp_path), "--device", "cpu")
    assert call(*command, "--real", tmp_path / "real", "--out", tmp_path / "look") == 0
    record = read_json(tmp_path / "look/dataset_report.json")
    assert record["missing_classes"] == ["plum"]
    assert {"FID", "KID", "precision", "recall", "density", "coverage"} <= record["totals"].keys()
    # the dataset against itself: nothing nearer
    assert call(*command, "--real", tmp_path / "synthetic", "--out", tmp_path / "same") == 0
    same = read_json(tmp_path / "same/dataset_report.json")["totals"]
    assert same["precision"] == same["recall"] == same["coverage"] == 100
    assert abs(same["FID"]) < 1e-3 * (1 + record["totals"]["FID"]) and same["FID"] < record["totals"]["FID"]


def checkpoint(folder, scale=1.0):
    """A ResNet18 of random weights, as a plain state dict."""
    import torch
    from torchvision.models import resnet18

    torch.manual_seed(0)
    weights = resnet18(num_classes=2).state_dict()
    torch.save(weights | {"conv1.weight": weights["conv1.weight"] * scale}, folder / "net.pth")
    (folder / "args.json").write_text(
        '{"arch": "resnet18", "head": "linear", "num_classes": 2, "class_ids": ["apple", "pear"], '
        '"class_names": ["apple", "pear"], "image_size": 32, "resize": 36}'
    )
    return folder / "net.pth"


def test_measures_are_their_definitions():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(300, 6)), rng.normal(0.5, 1.5, size=(200, 6))
    a, b = np.cov(x.T), np.cov(y.T)
    wanted = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert measures.frechet_distance(measures.moments(x), measures.moments(y)) == pytest.approx(wanted, rel=1e-6)

    def kernel(u, v):
        return (np.dot(u, v) / 6 + 1) ** 3

    x, y = x[:30], y[:20]
    same_x = np.mean([kernel(x[i], x[j]) for i in range(30) for j in range(30) if i != j])
    same_y = np.mean([kernel(y[i], y[j]) for i in range(20) for j in range(20) if i != j])
    between = np.mean([kernel(u, v) for u in x for v in y])
    assert measures.kernel_distance(x, y) == pytest.approx(1000 * (same_x + same_y - 2 * between))

    def radius(points, i):
        return sorted(np.linalg.norm(points[i] - other) for other in points)[measures.NEIGHBOURS]

    inside = np.array([[np.linalg.norm(u - v) <= radius(x, i) for v in y] for i, u in enumerate(x)])
    covered = np.array([[np.linalg.norm(u - v) <= radius(y, j) for j, v in enumerate(y)] for u in x])
    measured = measures.neighbourhoods(x, y)
    assert measured["precision"] == pytest.approx(100 * inside.any(0).mean())
    assert measured["recall"] == pytest.approx(100 * covered.any(1).mean())
    assert measured["density"] == pytest.approx(100 * inside.sum() / (measures.NEIGHBOURS * len(y)))
    assert measured["coverage"] == pytest.approx(100 * inside.any(1).mean())

    units = x / np.linalg.norm(x, axis=1, keepdims=True)
    pairs = [units[i] @ units[j] for i in range(30) for j in range(30) if i != j]
    assert measures.diversity(x) == pytest.approx(1 - np.mean(pairs))


def test_a_class_of_one_image_has_no_pairs():
    assert measures.near_duplicates(np.ones((1, 4))) == (0, [])
    assert measures.diversity(np.ones((1, 4))) is None
    assert measures.neighbourhoods(np.ones((1, 4)), np.ones((9, 4))) == {}


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--dataset-report", "{missing}"], "--dataset-report"),
        (["--dataset-report", "{data}", "--real", "{data}"], "needs features; give --checkpoint"),
        (["--dataset-report", "{data}", "--real", "{other}", "--checkpoint", "{net}"], "none of its classes"),
    ],
)
def test_bad_input(tmp_path, capsys, arguments, message):
    write_images(tmp_path / "data", 2, seed=0)
    (tmp_path / "other/fig").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "other/fig/0.png")
    places = {"missing": tmp_path / "gone", "data": tmp_path / "data", "other": tmp_path / "other", "net": "resnet18"}
    assert call(*(argument.format(**places) for argument in arguments), "--out", tmp_path / "look") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "look").exists()


def test_a_damaged_image_is_named(tmp_path, capsys):
    write_images(tmp_path / "data", 2, seed=0)
    (tmp_path / "data/pear/000.png").write_bytes(b"\x89PNG")
    assert call("--dataset-report", tmp_path / "data", "--out", tmp_path / "look") == 2
    assert "pear/000.png" in capsys.readouterr().err


def test_noise_does_not_look_best(tmp_path, capsys):
    """Noise is the most varied class of all: beside real images it comes first, without them nothing is called bad."""
    rng = np.random.default_rng(0)
    for folder, noisy in (("synthetic", ("apple",)), ("real", ())):
        for class_id, colour in (("apple", (200, 60, 60)), ("pear", (60, 200, 60)), ("plum", (90, 60, 200))):
            (tmp_path / folder / class_id).mkdir(parents=True)
            for index in range(12):
                base = np.full((48, 48, 3), colour) + rng.normal(0, 25, 3) + rng.normal(0, 5, (48, 48, 3))
                pixels = rng.integers(0, 256, (48, 48, 3)) if class_id in noisy else np.clip(base, 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / folder / class_id / f"{index}.png")
    data = ("--dataset-report", tmp_path / "synthetic", "--out", tmp_path / "look")
    assert call(*data) == 0
    alone = " ".join((tmp_path / "look/dataset_report.html").read_text().split())
    assert "worst" not in alone and "Variety is no merit by itself: noise is the most varied." in alone
    rows = {row["id"]: row for row in read_json(tmp_path / "look/dataset_report.json")["classes"]}
    assert max(rows, key=lambda one: rows[one]["diversity"]) == "apple"
    assert call(*data, "--real", tmp_path / "real", "--checkpoint", checkpoint(tmp_path), "--device", "cpu") == 0
    assert read_json(tmp_path / "look/dataset_report.json")["classes"][0]["id"] == "apple"
    assert (
        "Classes that look least like the real ones (lowest coverage) come first."
        in (tmp_path / "look/dataset_report.html").read_text()
    )


def test_strays_of_a_generated_dataset_are_named_and_left_out(tmp_path, capsys):
    """Eight images are in the manifests; a copied one, one of a class that was not drawn, are not looked at."""
    data = tmp_path / "data"
    write_images(data / "train", 5, seed=0)
    (data / "manifest").mkdir()
    for class_id in ("apple", "pear"):
        for index in range(5):
            (data / f"train/{class_id}/{index:03}.png").rename(data / f"train/{class_id}/{class_id}_{index:06}.png")
            if index < 4:
                append_jsonl(
                    data / f"manifest/{class_id}.jsonl",
                    {"id": class_id, "index": index, "bytes": 1, "sha256": "00" * 32},
                )
    (data / "train/fig").mkdir()
    Image.new("RGB", (48, 48)).save(data / "train/fig/mine.png")
    assert images_of(data, tmp_path / "look") == 11  # without a dataset.json it is anybody's folder
    rows = [{"id": i, "name": i, "hypernym": "", "definition": "", "images": 5} for i in ("apple", "pear")]
    write_json(data / "dataset.json", {"format": "imagenet-sd dataset 1"} | record_of("x", rows, format="png"))
    capsys.readouterr()
    assert images_of(data, tmp_path / "look") == 8
    said = capsys.readouterr().err
    assert "--dataset-report: 3 images that no manifest knows are left out: " in said
    assert "apple_000004.png" in said and "mine.png" in said
    shutil.rmtree(data / "train/fig")
    (trained,) = open_sources([data], None, None, known_images)
    looked_at = Folder(str(data), "--dataset-report", known_images)
    assert [trained.name(row) for row in range(len(trained))] == [path for path, _ in looked_at.samples]


def images_of(data, out):
    assert call("--dataset-report", data, "--out", out) == 0
    return read_json(out / "dataset_report.json")["totals"]["images"]


def test_near_duplicates_are_the_same_in_blocks(monkeypatch):
    x = np.random.default_rng(0).normal(size=(50, 8))
    x[[7, 30, 49]] = x[3] * 2, x[3] + 1e-4, x[20]
    whole = measures.near_duplicates(x)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    pairs = [(i, j) for i in range(50) for j in range(i) if unit[i] @ unit[j] >= measures.DUPLICATE]
    assert whole[0] == len({i for i, _ in pairs}) == 3 and (whole[1][1], whole[1][0]) in pairs
    monkeypatch.setattr(measures, "BLOCK", 7)
    assert measures.near_duplicates(x) == whole
    monkeypatch.setattr(measures, "MOST_IMAGES", 20)
    assert measures.neighbourhoods(x, x)["coverage"] == 100  # the same twenty of both


@pytest.mark.parametrize("kind", ["fifo", "itself", "folder"])
def test_an_image_that_is_no_file_is_named_and_nothing_hangs(tmp_path, capsys, kind):
    write_images(tmp_path / "data", 2, seed=0)
    path = tmp_path / "data/pear/000.png"
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "itself":
        path.symlink_to(path.name)
    else:
        path.mkdir()
    code = call("--dataset-report", tmp_path / "data", "--out", tmp_path / "look")
    said = capsys.readouterr().err
    assert (code == 2 and "pear/000.png" in said) or (code == 0 and kind == "folder")  # ImageFolder looks into folders
    assert "error: unexpected" not in said


def test_a_single_image_and_features_without_end(tmp_path, capsys):
    write_images(tmp_path / "data", 1, seed=0)
    command = (
        "--dataset-report",
        tmp_path / "data",
        "--real",
        tmp_path / "data",
        "--device",
        "cpu",
        "--out",
        tmp_path / "look",
    )
    assert call(*command, "--checkpoint", checkpoint(tmp_path)) == 0
    assert read_json(tmp_path / "look/dataset_report.json")["totals"]["images"] == 2
    capsys.readouterr()
    (tmp_path / "other").mkdir()
    assert call(*command, "--checkpoint", checkpoint(tmp_path / "other", scale=float("nan"))) == 2
    assert "the features are NaN for 2 of 2 images; check the checkpoint" in capsys.readouterr().err
    assert measures.is_finite(np.ones((3, 2))) and not measures.is_finite(np.array([[1, np.inf]]))  # of fp16
