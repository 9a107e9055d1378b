"""evaluate.py from its command line: rows, resume, refusals, and the road from a set's folder to a percentage."""

from __future__ import annotations

import base64
import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.datasets import ImageFolder

import evaluate
from utils.classes import load_classes
from utils.cli import run
from utils.evaluation import catalog, imagenet_sets, judge, matching, probes, transfer_sets, weights
from utils.evaluation.jobs import PROBE_METRICS
from utils.model import build_model, export_state_dict, forward_flops
from utils.storage import read_json, read_jsonl

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ["ant", "bee", "cow", "dog", "eel", "fox", "gnu"]


def call(*argv) -> int:
    return run(evaluate.main, evaluate.get_args_parser(), [str(part) for part in argv])


def make_run(folder: Path, class_ids: list[str], seed: int = 0, head: str = "cosine") -> Path:
    """A run folder as train.py leaves it, untrained but for batch norm."""
    torch.manual_seed(seed)
    model = build_model("resnet10", len(class_ids), head)
    with torch.no_grad():
        model.train()(torch.randn(16, 3, 32, 32))
    folder.mkdir(parents=True)
    torch.save(export_state_dict(model), folder / "toy.pth")
    args = {"arch": "resnet10", "head": head, "class_ids": class_ids, "class_names": [f"the {c}" for c in class_ids]}
    args |= {"dataset": "toy", "image_size": 32, "resize": 32, "seed": seed}
    (folder / "args.json").write_text(json.dumps(args))
    return folder


def make_images(folder: Path, class_ids: list[str], each: int = 4, suffix: str = "png") -> Path:
    rng = np.random.default_rng(0)
    for class_id in class_ids:
        (folder / class_id).mkdir(parents=True)
        for index in range(each):
            pixels = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((40, 36))
            pixels.save(folder / class_id / f"{index}.{suffix}")
    return folder


@pytest.fixture
def toy(tmp_path) -> tuple[Path, Path]:
    return make_run(tmp_path / "runs/toy-seed0", CLASSES), make_images(tmp_path / "test", CLASSES)


def test_a_run_that_has_not_ended_is_judged_and_said_to_be_unfinished(toy, capsys):
    folder, test = toy
    weights = torch.load(folder / "toy.pth", weights_only=True)
    (folder / "toy.pth").unlink()
    torch.save({"model": weights, "step": 3}, folder / "checkpoint.pth")
    assert call("--checkpoint", folder, "--test", f"toys={test}", "--device", "cpu") == 0
    assert "toy-seed0: its training is not finished; " in capsys.readouterr().out
    assert all(row["unfinished"] is True for row in read_jsonl(folder / "results.jsonl"))
    assert call("--report", folder / "results.jsonl", "--out", folder / "report") == 0
    assert "not finished" in (folder / "report/report.md").read_text()


def test_rows_and_sidecar(toy, capsys):
    folder, test = toy
    assert call("--checkpoint", folder, "--test", f"toys={test}", "--device", "cpu") == 0
    rows = read_jsonl(folder / "results.jsonl")
    assert [row["metric"] for row in rows] == ["top1", "top5", "mean_per_class", "ece"]
    for row in rows:
        assert row["model"] == "toy-seed0" and row["dataset"] == "toys" and row["group"] == "folder"
        assert (row["n"], row["num_classes"], row["seed"], row["source"]) == (28, 7, 0, "measured")
        assert row["protocol"] == "resize 32 bilinear, crop 32, fp32"
        assert 0 <= row["low"] <= row["value"] <= row["high"] <= 100
        assert len(row["checkpoint_sha256"]) == 64

    # An independent count with torchvision's own loader and the released way of loading (a plain linear layer).
    steps = transforms.Compose(
        [
            transforms.Resize(32),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    data = ImageFolder(str(test), steps)
    model = build_model("resnet10", 7, "linear")
    model.fc = torch.nn.Linear(256, 7, bias=False)
    model.load_state_dict(torch.load(folder / "toy.pth", weights_only=True), strict=True)
    with torch.no_grad():
        logits = model.eval()(torch.stack([image for image, _ in data]))
    labels = torch.tensor(data.targets)
    top5 = logits.topk(5).indices
    assert rows[0]["value"] == pytest.approx(100 * (top5[:, 0] == labels).float().mean().item(), abs=1e-3)
    assert rows[1]["value"] == pytest.approx(100 * (top5 == labels[:, None]).any(1).float().mean().item(), abs=1e-3)

    (path,) = (folder / "eval").glob("*.json")
    assert path.name == f"toys.{rows[0]['checkpoint_sha256'][:12]}.json"
    sidecar = json.loads(path.read_text())
    assert sidecar["class_ids"] == CLASSES and sidecar["class_names"][0] == "the ant"
    assert sum(map(sum, sidecar["confusion"])) == 28
    for index, row in enumerate(sidecar["per_class"]):
        assert row["n"] == 4 and row["top1"] == 100 * sidecar["confusion"][index][index] / 4
    right = np.unpackbits(np.frombuffer(base64.b64decode(sidecar["correct"]), np.uint8))[:28].reshape(7, 4)  # in order
    assert (100 * right.mean(1)).tolist() == [row["top1"] for row in sidecar["per_class"]]
    assert np.mean([row["top1"] for row in sidecar["per_class"]]) == pytest.approx(rows[2]["value"], abs=1e-3)
    shown = capsys.readouterr().out
    assert "toy-seed0" in shown and "28" in shown and "7" in shown
    last_layer = 2 * 256 * 7
    of_image = forward_flops(model.train(), [(32, 2)])[32] - last_layer  # features alone; their logits cost nothing
    assert sidecar["cost"]["flops"] == 28 * of_image and 0 <= sidecar["cost"]["seconds"] < 60


def test_features_that_are_kept_cost_no_operations_again(toy):
    folder, test = toy
    for names in ("toys", "again"):
        assert call("--checkpoint", folder, "--test", f"{names}={test}", "--device", "cpu") == 0
    costs = {path.name.split(".")[0]: read_json(path)["cost"] for path in (folder / "eval").glob("*.json")}
    assert costs["toys"]["flops"] > 0 and costs["again"]["flops"] == 0


def test_finished_pairs_are_not_computed_again(toy, monkeypatch, capsys):
    folder, test = toy
    command = ("--checkpoint", folder, "--test", f"toys={test}", "--device", "cpu")
    assert call(*command) == 0
    before = (folder / "results.jsonl").read_bytes()
    monkeypatch.setattr(judge, "load_classifier", lambda *_, **__: pytest.fail("loaded again"))
    first = capsys.readouterr().out
    assert call(*command) == 0
    assert (folder / "results.jsonl").read_bytes() == before
    assert capsys.readouterr().out == f"toy-seed0 on toys: done already\n{first}"  # the table is shown all the same


def test_what_changes_a_result_is_computed_again(toy):
    folder, test = toy
    command = ("--checkpoint", folder, "--test", f"toys={test}", "--device", "cpu")
    call(*command)
    assert call(*command, "--interpolation", "bicubic") == 0
    assert len(read_jsonl(folder / "results.jsonl")) == 8
    (test / "ant" / "0.png").unlink()
    assert call(*command) == 0
    rows = read_jsonl(folder / "results.jsonl")
    assert len(rows) == 12 and rows[-1]["n"] == 27


def test_half_written_rows_are_completed(toy):
    folder, test = toy
    command = ("--checkpoint", folder, "--test", f"toys={test}", "--device", "cpu")
    call(*command)
    results = folder / "results.jsonl"
    lines = results.read_bytes().splitlines(keepends=True)
    results.write_bytes(lines[0] + lines[1][:40])  # killed while appending
    assert call(*command) == 0
    metrics = [row["metric"] for row in read_jsonl(results)]
    assert sorted(set(metrics)) == ["ece", "mean_per_class", "top1", "top5"]


def test_damaged_lines_and_files_beside_the_results_heal(toy):
    folder, test = toy
    command = ("--checkpoint", folder, "--test", f"toys={test}", "--device", "cpu")
    call(*command)
    results, (sidecar,) = folder / "results.jsonl", (folder / "eval").iterdir()
    good = results.read_text()
    key = json.loads(good.splitlines()[0])["key"]
    bare = {"model": "m", "dataset": "d", "metric": "top1", "value": 5, "key": key, "n": 3}  # no interval
    strange = [
        "null",
        "5",
        "{}",
        "[]",
        '"x"',
        json.dumps({"key": key}),
        json.dumps({"key": key, "metric": 3}),
        json.dumps(bare),
        "{" * 50,
    ]
    results.write_text("\n".join(strange) + "\n" + good)
    assert call(*command) == 0 and results.read_text().endswith(good)  # nothing is computed again
    results.write_text("\n".join(strange) + "\n")
    for text in ("[]", "null", '{"key": 3}', "{", ""):
        sidecar.write_text(text)
        assert call(*command) == 0  # computed again, from the features that are kept
        assert json.loads(sidecar.read_text())["key"] == key
        assert [row["value"] for row in read_jsonl(results)[-4:]] == [
            json.loads(row)["value"] for row in good.splitlines()
        ]


def test_a_full_disk_names_the_file(toy, monkeypatch, capsys):
    folder, test = toy

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert call("--checkpoint", folder, "--test", f"toys={test}", "--device", "cpu") == 2
    error = capsys.readouterr().err
    assert "the disk is full" in error and "features" in error and "unexpected" not in error
    assert not (folder / "results.jsonl").exists() and not list(folder.rglob("*.tmp"))


def test_several_checkpoints_share_a_call(tmp_path, toy, capsys):
    first, test = toy
    second = make_run(tmp_path / "runs/toy-seed1", CLASSES, seed=1, head="linear")
    assert call("--checkpoint", first, f"other={second / 'toy.pth'}", "--test", f"toys={test}", "--device", "cpu") == 0
    assert {row["model"] for row in read_jsonl(second / "results.jsonl")} == {"other"}
    assert {row["model"] for row in read_jsonl(first / "results.jsonl")} == {"toy-seed0"}
    out = tmp_path / "all"
    assert call("--checkpoint", first, second, "--test", f"toys={test}", "--device", "cpu", "--out", out) == 0
    assert len(read_jsonl(out / "results.jsonl")) == 8 and len(list((out / "eval").iterdir())) == 2


def test_killed_evaluation_continues(tmp_path, toy):
    """kill -9 after the first model's rows: the second run adds the other model's and repeats nothing."""
    first, test = toy
    second = make_run(tmp_path / "runs/toy-seed1", CLASSES, seed=1)
    stop = "import evaluate as e, os, signal\nsave = e.Job.save\n" + (
        "def kill(*a):\n    save(*a)\n    os.kill(os.getpid(), signal.SIGKILL)\ne.Job.save = kill\n"
    )
    argv = ["--checkpoint", str(first), str(second), "--test", f"toys={test}", "--device", "cpu"]
    code = f"{stop}from utils.cli import run\nrun(e.main, e.get_args_parser(), {argv!r})"
    killed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert len(read_jsonl(first / "results.jsonl")) == 4 and not (second / "results.jsonl").exists()
    before = (first / "results.jsonl").read_bytes()
    assert call(*argv) == 0
    assert (first / "results.jsonl").read_bytes() == before
    assert len(read_jsonl(second / "results.jsonl")) == 4


def test_dry_run_writes_nothing(toy, capsys):
    folder, test = toy
    before = sorted(path.name for path in folder.rglob("*"))
    assert call("--checkpoint", folder, "--test", f"toys={test}", "--dry-run", "--device", "cpu") == 0
    assert sorted(path.name for path in folder.rglob("*")) == before
    assert "toy-seed0 on toys: to do: 7 classes, 28 images; resize 32 bilinear" in capsys.readouterr().out


def test_help_and_dry_run_start_without_torch(toy):
    folder, test = toy
    code = (
        "import sys, evaluate; from utils.cli import run\n"
        f"argv = ['--checkpoint', {str(folder)!r}, '--test', 'toys={test}', '--dry-run', '--device', 'cpu']\n"
        "assert run(evaluate.main, evaluate.get_args_parser(), argv) == 0\n"
        "assert 'torch' not in sys.modules and 'torchvision' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


# ===== the ImageNet family through the whole program =====


@pytest.fixture
def imagenet_r(tmp_path, monkeypatch):
    row = dataclasses.replace(catalog.SETS["IN-R"], images=(200, 200))
    monkeypatch.setitem(catalog.SETS, "IN-R", row)
    wnids = [wnid for (wnid,) in imagenet_sets.read_index("imagenet_r.txt")]
    make_images(tmp_path / "data/imagenet-r", wnids, each=1, suffix="jpg")
    return tmp_path / "data"


def test_imagenet_r_of_a_100_class_model(tmp_path, imagenet_r, capsys):
    folder = make_run(tmp_path / "runs/in100", load_classes("100").ids)
    assert call("--checkpoint", folder, "--data-root", imagenet_r, "--device", "cpu") == 0  # found, not asked for
    rows = read_jsonl(folder / "results.jsonl")
    assert {(row["n"], row["num_classes"], row["compared"], row["group"]) for row in rows} == {(19, 19, 19, "imagenet")}
    sidecar = json.loads(next((folder / "eval").iterdir()).read_text())
    assert (sidecar["classes_in_set"], sidecar["images_in_set"]) == (200, 200)
    assert np.shape(sidecar["confusion"]) == (19, 19)


def test_found_set_without_a_shared_class_is_left_out_but_an_asked_one_is_an_error(tmp_path, imagenet_r, toy, capsys):
    folder, test = toy
    command = ("--checkpoint", folder, "--data-root", imagenet_r, "--device", "cpu")
    assert call(*command, "--test", f"toys={test}", "--datasets", "imagenet") == 0
    assert "toy-seed0 on IN-R: left out" in capsys.readouterr().out
    assert {row["dataset"] for row in read_jsonl(folder / "results.jsonl")} == {"toys"}
    assert call(*command, "--datasets", "IN-R") == 2
    assert "--label-map FILE says which are the same" in capsys.readouterr().err


def test_a_wrong_copy_that_was_only_found_does_not_stop_the_others(tmp_path, imagenet_r, toy, capsys):
    folder, test = toy
    (imagenet_r / "cog").mkdir()
    (imagenet_r / "cog/cog_levels_mapping_file.pkl").write_bytes(b"torn")
    command = ("--checkpoint", folder, "--data-root", imagenet_r, "--test", f"toys={test}", "--device", "cpu")
    assert call(*command, "--datasets", "cog") == 2  # the others are judged, but not all is well
    assert {row["dataset"] for row in read_jsonl(folder / "results.jsonl")} == {"toys"}
    assert "left out: " in capsys.readouterr().err
    assert call(*command, "--datasets", "CoG-L1", "--out", tmp_path / "other") == 2
    assert not (tmp_path / "other").exists()  # asked for: refused before anything is computed


def test_features_suffice_for_transfer(toy, shapes, tmp_path, monkeypatch):
    """A foreign network with outputs that nobody can name."""
    folder, _ = toy
    shutil.copy(folder / "toy.pth", tmp_path / "foreign.pth")
    (tmp_path / "args.json").write_text(json.dumps({"arch": "resnet10"}))
    reads = []
    read_weights = weights.read_weights
    monkeypatch.setattr(weights, "read_weights", lambda path: reads.append(path) or read_weights(path))
    command = ("--checkpoint", tmp_path / "foreign.pth", "--data-root", tmp_path, "--device", "cpu")
    assert call(*command, "--datasets", "small") == 0 and len(shapes) == 1
    assert len(reads) == 1  # once, though nobody can name its outputs


def test_every_image_is_asked_for_its_size_once(toy, monkeypatch):
    """A million files on a network disk: asking once more for the features' key costs minutes."""
    folder, test = toy
    asked = Counter()
    stat_files = matching.stat_files
    monkeypatch.setattr(matching, "stat_files", lambda paths: asked.update(paths) or stat_files(paths))
    assert call("--checkpoint", folder, "--test", f"toys={test}", "--device", "cpu") == 0
    assert len(asked) == 28 and set(asked.values()) == {1}


def test_the_order_of_the_classes_is_part_of_the_key(tmp_path, toy):
    folder, test = toy
    shutil.copy(folder / "toy.pth", tmp_path / "foreign.pth")
    (tmp_path / "args.json").write_text(json.dumps({"arch": "resnet10"}))
    ids = load_classes("100").ids[: len(CLASSES)]
    for old, new in zip(CLASSES, ids, strict=True):
        (test / old).rename(test / new)
    order = tmp_path / "order.txt"
    command = ("--checkpoint", tmp_path / "foreign.pth", "--test", f"t={test}", "--classes", order, "--device", "cpu")
    for count, written in ((4, ids), (8, ids[::-1]), (8, ids[::-1])):
        order.write_text("\n".join(written))
        assert call(*command) == 0
        assert len(read_jsonl(tmp_path / "results.jsonl")) == count


@pytest.mark.parametrize("option", [["--real", "x"], ["--title", "x"], ["--show-data", "a=b"]])
def test_options_of_another_command_are_refused(option, capsys):
    assert call("--checkpoint", "x", *option) == 2
    assert f"{option[0]} goes with --" in capsys.readouterr().err


def test_wrong_count_is_refused(tmp_path, imagenet_r, capsys):
    folder = make_run(tmp_path / "runs/in100", load_classes("100").ids)
    next((imagenet_r / "imagenet-r").glob("*/0.jpg")).with_name("1.jpg").write_bytes(b"one too many")
    assert call("--checkpoint", folder, "--data-root", imagenet_r, "--device", "cpu") == 2
    assert "201 images of 200 classes; a right copy has 200" in capsys.readouterr().err


# ===== transfer, through the interface of utils/evaluation/transfer_sets.py and utils/evaluation/probes.py =====


@pytest.fixture
def shapes(tmp_path, monkeypatch):
    """A made-up transfer dataset of 3 classes and a probe that reports what it was given."""
    test = make_images(tmp_path / "shapes", ["x", "y", "z"], each=6)
    samples = [(str(path), label) for label, c in enumerate("xyz") for path in sorted((test / c).iterdir())]
    splits = {"trainval": samples[::3], "test": samples[2::3]}
    splits = ([str(label) for label in range(3)], splits["test"], splits["trainval"])
    loaded = matching.LoadedSet("Shapes", *splits)
    row = catalog.TestSet("Shapes", "small", lambda *_: loaded, (".",), 3, (6, 6), 6, layout="shapes/", where="Draw it")
    others = {name: row for name, row in catalog.SETS.items() if not row.probed}
    monkeypatch.setattr(catalog, "SETS", others | {"Shapes": row})
    calls = []

    def run_probe(features, *, protocol, seed, kind, device, memo):
        calls.append(
            (sorted(features), protocol, seed, kind, features["trainval"][0].shape, features["test"][1].tolist())
        )
        return {"top1": 50.0 + seed, "mean_per_class": 40.0, "chosen": {"C": 1.0}, "held_out": 60.0}

    monkeypatch.setattr(probes, "run_probe", run_probe)
    return calls


def test_transfer_runs_one_probe_a_seed_and_only_missing_seeds(toy, shapes, tmp_path, capsys):
    folder, _ = toy
    command = ("--checkpoint", folder, "--data-root", tmp_path, "--datasets", "small", "--device", "cpu")
    assert call(*command, "--seeds", 0, 1) == 0
    assert shapes == [(["test", "trainval"], "fast", seed, "logreg", (6, 256), [0, 0, 1, 1, 2, 2]) for seed in (0, 1)]
    assert "50.50 ± 0.71 (2 seeds)" in capsys.readouterr().out
    assert call(*command, "--seeds", 0, 1, 2) == 0
    assert [entry[2] for entry in shapes] == [0, 1, 2]
    rows = read_jsonl(folder / "results.jsonl")
    assert [(row["metric"], row["seed"]) for row in rows] == [(m, s) for s in range(3) for m in PROBE_METRICS]
    assert {row["n"] for row in rows} == {6} and {row["group"] for row in rows} == {"small"}
    (sidecar,) = (json.loads(path.read_text()) for path in (folder / "eval").glob("Shapes.*[0-9a-f].json"))
    assert [(run["seed"], run["top1"]) for run in sidecar["runs"]] == [(seed, 50.0 + seed) for seed in range(3)]
    assert rows[0]["protocol"] == "resize 32 bicubic, crop 32, fp32, fast linear probe"
    assert call(*command, "--protocol", "paper") == 0
    assert shapes[-1][1] == "paper"


def test_a_killed_probe_keeps_its_finished_seeds(toy, shapes, tmp_path, monkeypatch):
    folder, _ = toy
    command = ("--checkpoint", folder, "--data-root", tmp_path, "--datasets", "small", "--device", "cpu")
    whole = probes.run_probe
    monkeypatch.setattr(probes, "run_probe", lambda *a, seed, **k: whole(*a, seed=seed, **k) if seed < 2 else 1 / 0)
    assert call(*command, "--seeds", 0, 1, 2) == 1
    assert {row["seed"] for row in read_jsonl(folder / "results.jsonl")} == {0, 1}


def test_a_transfer_dataset_end_to_end(toy, tmp_path, monkeypatch, capsys):
    """Real readers, features and probes: two colours in EuroSAT's layout are told apart by a network of noise."""
    folder, _ = toy
    rng = np.random.default_rng(0)
    for kind, colour in (("AnnualCrop", (200, 60, 60)), ("Forest", (60, 200, 60))):
        (tmp_path / "data/eurosat/2750" / kind).mkdir(parents=True)
        for number in range(30):
            pixels = np.clip(rng.normal(colour, 40, (32, 32, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"data/eurosat/2750/{kind}/{kind}_{number}.jpg")
    monkeypatch.setattr(transfer_sets, "EUROSAT_TEST", 10)
    row = dataclasses.replace(catalog.SETS["EuroSAT"], classes=2, trainval=40, images=(20, 20))
    monkeypatch.setitem(catalog.SETS, "EuroSAT", row)
    command = ("--checkpoint", folder, "--data-root", tmp_path / "data", "--datasets", "EuroSAT", "--device", "cpu")
    assert call(*command, "--out", tmp_path / "out") == 0
    rows = {row["metric"]: row for row in read_jsonl(tmp_path / "out/results.jsonl")}
    assert rows["top1"]["value"] >= 95 and rows["top1"]["n"] == 20 and rows["top1"]["num_classes"] == 2
    assert "EuroSAT" in capsys.readouterr().out
    assert call(*command, "--out", tmp_path / "out") == 0  # finished: nothing is computed again
    assert len(read_jsonl(tmp_path / "out/results.jsonl")) == 2


def test_any_two_folders_of_other_classes_are_probed(toy, tmp_path, capsys):
    """Two colours that the model was never told of; under exchanged names every answer is wrong."""
    folder, _ = toy
    rng = np.random.default_rng(0)
    names = {"right": {"red": "red", "green": "green"}, "exchanged": {"red": "green", "green": "red"}}
    for pair, renamed in names.items():
        for kind, colour in (("red", (200, 60, 60)), ("green", (60, 200, 60))):
            for place, count in ((f"train/{kind}", 20), (f"test/{renamed[kind]}", 10)):
                (tmp_path / pair / place).mkdir(parents=True)
                for number in range(count):
                    pixels = np.clip(rng.normal(colour, 40, (32, 32, 3)), 0, 255).astype(np.uint8)
                    Image.fromarray(pixels).save(tmp_path / pair / place / f"{number}.png")
    pairs = [part for pair in names for part in ("--transfer", f"{pair}={tmp_path / pair}")]
    command = ("--checkpoint", folder, *pairs, "--device", "cpu")
    assert call(*command, "--dry-run") == 0
    assert "toy-seed0 on right: to do: 2 classes, 40 trainval, 20 test" in capsys.readouterr().out
    assert call(*command) == 0 and call(*command) == 0  # finished: nothing is computed again
    rows = [row for row in read_jsonl(folder / "results.jsonl") if row["metric"] == "top1"]
    assert [(row["dataset"], row["group"], row["n"]) for row in rows] == [(name, "transfer", 20) for name in names]
    assert rows[0]["value"] >= 95 and rows[1]["value"] <= 5 and "linear probe" in rows[0]["protocol"]


def test_list_datasets(tmp_path, shapes, capsys):
    (tmp_path / "imagenet/val").mkdir(parents=True)
    assert call("--list-datasets", "--data-root", tmp_path) == 0
    text = capsys.readouterr().out
    for name, row in catalog.SETS.items():
        assert name in text and row.where in text and row.layout in text
    assert f"IN-Val         found at {tmp_path}/imagenet/val" in text
    assert "50,000 images of 1,000 classes" in text and "Shapes" in text and "Draw it" in text


# ===== bad input: one line, exit 2, nothing half-written =====


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "--checkpoint is required"),
        (["--checkpoint", "RUN", "--test", "nonsense"], "expected NAME=DIR"),
        (["--checkpoint", "RUN", "--test", "a/b=DIR"], "expected NAME=DIR"),
        (["--checkpoint", "RUN", "--test", f"{'n' * 232}=DIR"], "is too long (232 characters)"),
        (["--checkpoint", "RUN", "--test", "a\nb=DIR"], "control characters"),
        (["--checkpoint", "RUN", "--test", "t=/nowhere"], "--test t: no folder /nowhere"),
        (["--checkpoint", "RUN", "--test", "t=DIR", "--test", "t=DIR"], "the name t is taken"),
        (["--checkpoint", "RUN", "--test", "IN-Val=DIR"], "the name IN-Val is taken"),
        (["--checkpoint", "RUN", "--test", "t=DIR", "--transfer", "t=DIR"], "the name t is taken"),
        (["--checkpoint", "RUN", "--transfer", "DIR"], "expected NAME=DIR, such as digits=data/digits"),
        (["--checkpoint", "RUN", "--transfer", "t=/nowhere"], "--transfer t: no folder /nowhere; expected /nowhere/tr"),
        (["--checkpoint", "RUN", "--transfer", "t=DIR"], "--transfer t: no folder"),
        (["--checkpoint", "RUN", "RUN/toy.pth", "--test", "t=DIR"], "are both called toy-seed0"),
        (["--checkpoint", "RUN", "--datasets", "IN-Vall"], "--datasets IN-Vall: unknown; use imagenet, small"),
        (["--checkpoint", "RUN", "--datasets", "IN-Val"], "IN-Val: not found below"),
        (["--checkpoint", "RUN"], "none of the datasets is there"),
        (["--checkpoint", "RUN", "--test", "t=DIR", "--classes", "100"], "records other classes"),
        (["--checkpoint", "RUN", "--test", "t=DIR", "--device", "gpu"], "--device gpu"),
        (["--checkpoint", "RUN", "--test", "t=DIR", "--dtype", "fp16", "--device", "cpu"], "--dtype fp16"),
        (["--checkpoint", "RUN", "--test", "t=DIR", "--out", "RUN/args.json"], "--out: cannot write"),
        (["--checkpoint", "gone.pth", "--test", "t=DIR"], "gone.pth: no such file"),
        (["--report", "gone.jsonl"], "--report"),
        (["--report", "RUN/args.json", "--show-data", "x"], "expected NAME=DIR"),
    ],
)
def test_refusals(toy, tmp_path, capsys, argv, message):
    folder, test = toy
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    argv = [part.replace("RUN", str(folder)).replace("DIR", str(test)) for part in argv]
    assert call(*argv, "--data-root", tmp_path / "empty") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "Traceback" not in error
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == before


def test_a_pair_of_folders_with_other_classes_is_refused(toy, tmp_path, capsys):
    make_images(tmp_path / "pair/train", ["a", "b"])
    make_images(tmp_path / "pair/test", ["a", "b", "c"])
    assert call("--checkpoint", toy[0], "--transfer", f"t={tmp_path}/pair") == 2
    error = capsys.readouterr().err
    assert f"--transfer t: class c is not in both of {tmp_path}/pair/train and" in error and error.count("\n") == 1


def test_damaged_image_leaves_no_rows(toy, capsys):
    folder, test = toy
    (test / "cow" / "2.png").write_bytes(b"\x89PNG broken")
    assert call("--checkpoint", folder, "--test", f"toys={test}", "--device", "cpu") == 2
    error = capsys.readouterr().err
    assert "damaged image" in error and "cow/2.png" in error and error.count("\n") == 1
    assert not (folder / "results.jsonl").exists() and not list((folder / "eval").iterdir())


def test_nan_weights_are_refused(toy, capsys):
    folder, test = toy
    state = torch.load(folder / "toy.pth", weights_only=True)
    state["layer4.0.conv2.weight"][:] = float("nan")
    torch.save(state, folder / "toy.pth")
    assert call("--checkpoint", folder, "--test", f"toys={test}", "--device", "cpu") == 2
    assert "NaN for 28 of 28 images" in capsys.readouterr().err
    assert not (folder / "results.jsonl").exists()


def test_read_only_folder(toy, capsys):
    folder, test = toy
    if os.geteuid() == 0:
        (folder / "eval").write_text("a file where the folder should be")  # root may write anywhere
    else:
        folder.chmod(0o500)
    assert call("--checkpoint", folder, "--test", f"toys={test}", "--device", "cpu") == 2
    assert "--out: cannot write" in capsys.readouterr().err
    folder.chmod(0o700)
    shutil.rmtree(folder)
