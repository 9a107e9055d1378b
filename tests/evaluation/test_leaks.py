"""Test images among a run's training images: counted beside the number, named, and refused where all of them are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

import evaluate
from tests.evaluation.test_evaluate import CLASSES, make_run
from utils.cli import run
from utils.dataset import overlap
from utils.storage import read_jsonl
from utils.training.image_sets import open_images


def call(*argv) -> int:
    return run(evaluate.main, evaluate.get_args_parser(), [str(part) for part in argv])


def make_scenes(folder: Path, seed: int, each: int = 6) -> Path:
    rng = np.random.default_rng(seed)
    for class_id in CLASSES:
        (folder / class_id).mkdir(parents=True)
        for index in range(each):
            coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            scene = Image.fromarray(coarse).resize((64, 64), Image.Resampling.BICUBIC)
            for _ in range(6):
                left, top, side = rng.integers(0, 50, 3).tolist()
                ImageDraw.Draw(scene).ellipse((left, top, left + side, top + side), tuple(rng.integers(0, 256, 3)))
            scene.save(folder / class_id / f"{index}.png")
    return folder


@pytest.fixture
def world(tmp_path) -> tuple[Path, Path, Path]:
    """(run, training folder, test folder)"""
    return make_run(tmp_path / "run", CLASSES), make_scenes(tmp_path / "train", 0), make_scenes(tmp_path / "test", 1)


def record(folder: Path, train: Path, **options) -> None:
    """args.json as train.py writes it for a run on TRAIN."""
    args = json.loads((folder / "args.json").read_text())
    images = open_images(train)
    if options.get("images_per_class"):
        images.limit(options["images_per_class"])
    args["options"] = {"data": [f"{train}:1"], "images_per_class": None, "classes": None} | options
    args["identity"] = {"data": [images.summary()]}
    (folder / "args.json").write_text(json.dumps(args))


def test_overlap_stands_beside_every_number_and_is_named(world, capsys):
    folder, train, test = world
    shutil.copy(test / "ant/2.png", train / "cow/0.png")  # under another class and name
    Image.open(test / "fox/1.png").crop((3, 2, 62, 61)).save(train / "fox/4.png")
    Image.open(test / "gnu/5.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(train / "gnu/0.png")
    record(folder, train)
    assert call("--checkpoint", folder, "--test", f"toys={test}", "--device", "cpu") == 0
    rows = read_jsonl(folder / "results.jsonl")
    assert {(row["train_overlap_exact"], row["train_overlap_near"]) for row in rows} == {(1, 2)} and len(rows) == 4
    (sidecar,) = (folder / "eval").glob("*.json")
    pairs = [tuple(pair.values()) for pair in json.loads(sidecar.read_text())["train_overlap"]]
    assert pairs == [
        (f"{test}/ant/2.png", f"{train}/cow/0.png", True),
        (f"{test}/fox/1.png", f"{train}/fox/4.png", False),
        (f"{test}/gnu/5.png", f"{train}/gnu/0.png", False),
    ]
    said = capsys.readouterr().out
    assert "trained on 1 of the 42 test images, and on copies of 2" in said and str(sidecar) in said
    assert "  3 of them trained on\n" in said  # beside the number too
    assert len(list((folder / "hashes").glob("*.npy"))) == 2
    assert not [path for data in (train, test) for path in data.rglob("*") if path.suffix not in ("", ".png")]


def test_runs_on_the_same_images_are_compared_once(world, tmp_path, monkeypatch):
    folder, train, test = world
    other = make_run(tmp_path / "other", CLASSES, seed=1)
    for one in (folder, other):
        record(one, train)
    calls = []
    real = overlap.overlap
    monkeypatch.setattr(overlap, "overlap", lambda *some: calls.append(1) or real(*some))
    assert call("--checkpoint", folder, other, "--test", f"toys={test}", "--device", "cpu") == 0
    assert len(calls) == 1
    assert all(read_jsonl(one / "results.jsonl")[0]["train_overlap_exact"] == 0 for one in (folder, other))


def test_nothing_in_common_is_recorded_as_nothing(world):
    folder, train, test = world
    record(folder, train)
    assert call("--checkpoint", folder, "--test", f"toys={test}", "--device", "cpu") == 0
    row = read_jsonl(folder / "results.jsonl")[0]
    assert (row["train_overlap_exact"], row["train_overlap_near"]) == (0, 0)


@pytest.mark.parametrize("renamed", [False, True])
def test_a_test_set_out_of_the_training_set_is_refused(world, capsys, renamed):
    folder, train, test = world
    shutil.rmtree(test)
    for class_id in CLASSES[:3]:
        (test / class_id).mkdir(parents=True)
        shutil.copy(train / class_id / "3.png", test / class_id / ("a.png" if renamed else "3.png"))
    record(folder, train)
    command = ("--checkpoint", folder, "--test", f"toys={test}", "--device", "cpu")
    assert call(*command) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "all 3 test images are among the images it was trained on" in error
    assert not (folder / "results.jsonl").exists()
    assert call(*command, "--no-leak-check") == 0
    assert "train_overlap_exact" not in read_jsonl(folder / "results.jsonl")[0]


def test_only_the_images_that_were_used_count(world):
    folder, train, test = world
    shutil.copy(test / "ant/2.png", train / "ant/5.png")  # beyond the first three of each class
    record(folder, train, images_per_class=3)
    assert call("--checkpoint", folder, "--test", f"toys={test}", "--device", "cpu") == 0
    assert read_jsonl(folder / "results.jsonl")[0]["train_overlap_exact"] == 0


@pytest.mark.parametrize("harm", ["moved", "changed", "weights from elsewhere", "nonsense"])
def test_unknown_training_images_leave_the_count_out(world, capsys, harm):
    folder, train, test = world
    if harm != "weights from elsewhere":
        record(folder, train)
    if harm == "moved":
        train.rename(train.with_name("away"))
    elif harm == "changed":
        (train / "ant/0.png").unlink()
    elif harm == "nonsense":
        args = json.loads((folder / "args.json").read_text())
        (folder / "args.json").write_text(json.dumps(args | {"options": {"data": {"x": 5}}}))
    assert call("--checkpoint", folder, "--test", f"toys={test}", "--device", "cpu") == 0
    assert "train_overlap_exact" not in read_jsonl(folder / "results.jsonl")[0]
    assert ("no leak check" in capsys.readouterr().out) == (harm in ("moved", "changed"))
