"""Every file a report reads, damaged: it is drawn, or one line names the file, with exit code 2; nothing hangs."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import evaluate
from tests.dataset.test_folder import record_of
from utils.cli import run
from utils.dataset.records import FORMAT
from utils.report import figures
from utils.storage import append_jsonl, read_jsonl, write_json

VALUES = [None, True, 5, -1, 0.5, 10**30, float("nan"), float("inf"), "", "x", "\x1b[31m\x00\n", "$\\frac{$", [], {}]
VALUES += [[None], [5, "x"], {"a": {}}, [[[]]], "a" * 400, "é\ud800"]
FILES = ["run/results.jsonl", "run/args.json", "run/log.jsonl", "run/eval/d.json", "data/dataset.json"]
FILES += ["data/dataset_report.json", "data/manifest/a.jsonl"]


def make_world(root: Path) -> Path:
    """A run that is judged on a set, its log, its close look, and the dataset it was trained on."""
    (root / "run/eval").mkdir(parents=True)
    (root / "data/manifest").mkdir(parents=True)
    rows = [{"id": one, "name": f"the {one}", "hypernym": "", "definition": "", "images": 2} for one in "ab"]
    made = {"command": "python x.py", "environment": {"python": "3.11", "gpus": ["one"], "packages": {"torch": "2"}}}
    info = record_of("data", rows, batch_size=4)
    info |= {"format": FORMAT, "recipe": info["recipe"] | {"format": "png"}}
    write_json(root / "data/dataset.json", info | made)
    quality = {"descriptor": "thumbnails", "classes": [{"id": one, "diversity": 0.5} for one in "ab"]}
    write_json(root / "data/dataset_report.json", quality)
    for class_id in "ab":
        (root / "data/train" / class_id).mkdir(parents=True)
        for index in range(2):
            name = f"{class_id}_{index:06d}"
            Image.new("RGB", (8, 8)).save(root / f"data/train/{class_id}/{name}.png")
            entry = {"id": class_id, "index": index, "bytes": 1, "sha256": "00" * 32, "prompt": f"a {class_id}"}
            append_jsonl(root / f"data/manifest/{class_id}.jsonl", entry)
    plan = {"images": 4, "steps_per_epoch": 1, "epochs": 2}
    options = {"data": [str(root / "data")]}
    sources = [{"path": str(root / "data/train"), "synthetic": True}]
    write_json(root / "run/args.json", {"options": options, "plan": plan, "sources": sources} | made)
    for epoch in (1, 2):
        append_jsonl(root / "run/log.jsonl", {"kind": "train", "step": epoch, "loss": 1.0})
        append_jsonl(root / "run/log.jsonl", {"kind": "epoch", "step": epoch, "epoch": epoch, "loss": 1.0, "top1": 5.0})
    for model in ("m", "n"):
        for metric in ("top1", "top5"):
            row = {"model": model, "dataset": "d", "group": "folder", "metric": metric, "value": 75.0, "low": 30.0}
            row |= {"high": 95.0, "n": 4, "num_classes": 2, "seed": 0, "checkpoint_sha256": model, "key": "k"}
            append_jsonl(root / "run/results.jsonl", row)
    look = {"dataset": "d", "checkpoint_sha256": "m", "class_ids": ["a", "b"], "class_names": ["the a", "the b"]}
    look |= {"per_class": [{"id": "a", "n": 2, "top1": 50.0}, {"id": "b", "n": 2, "top1": 100.0}], "images": "f"}
    write_json(root / "run/eval/d.json", look | {"confusion": [[1, 1], [0, 2]], "correct": "sA=="} | made)
    return root


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def world(whole, tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(figures, "draw_curves", lambda panels, kind: b"<svg/>")  # its own tests draw
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "run/args.json",):
        path.write_text(path.read_text().replace(str(whole), str(tmp_path)))
    return tmp_path


def report(world: Path) -> int:
    arguments = ["--report", world / "run/results.jsonl", "--out", world / "out", "--show-data", f"sd={world}/data"]
    return run(evaluate.main, evaluate.get_args_parser(), [str(one) for one in arguments])


def is_said(code: int, capsys) -> bool:
    """Whether a damaged file cost nothing (code 0) or one line and code 2."""
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if ": error: " in line]
    return ": error: unexpected " not in said and (code, len(lines)) in ((0, 0), (2, 1))


def nodes(value, path=()):
    """The places of all values in a JSON value."""
    yield path
    for key, below in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from nodes(below, (*path, key))


def replaced(value, path, new):
    if not path:
        return new
    value = copy.deepcopy(value)
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return value


def damage_types(path: Path, rng: random.Random) -> None:
    """One value of the file becomes one of another type."""
    if path.suffix == ".jsonl":
        lines = read_jsonl(path)
        number = rng.randrange(len(lines))
        lines[number] = replaced(lines[number], rng.choice(list(nodes(lines[number]))), rng.choice(VALUES))
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    else:
        value = json.loads(path.read_text())
        path.write_text(json.dumps(replaced(value, rng.choice(list(nodes(value))), rng.choice(VALUES))))


def damage_bytes(path: Path, rng: random.Random) -> None:
    """The file is flipped, cut, zeroed, doubled or has a part swapped."""
    data = bytearray(path.read_bytes())
    first, second = sorted(rng.randrange(len(data)) for _ in range(2))
    kind = rng.choice(["flip", "cut", "zero", "double", "swap"])
    if kind == "flip":
        data[first] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del data[first:]
    elif kind == "zero":
        data[first:second] = bytes(second - first)
    elif kind == "double":
        data += data[first:second]
    else:
        data = data[second:] + data[first:second] + data[:first]
    path.write_bytes(bytes(data))


def test_the_whole_world_is_reported(world, capsys):
    assert report(world) == 0
    text = (world / "out/report.md").read_text()
    assert "4 synthetic" in text and "python x.py" in text and "the a" in text


@pytest.mark.parametrize("damage", [damage_types, damage_bytes])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(FILES), seed=st.integers(0, 2**32))
def test_damage_costs_a_line_or_nothing(world, whole, capsys, damage, name, seed):
    path = world / name
    before = path.read_bytes()
    try:
        damage(path, random.Random(seed))
        assert is_said(report(world), capsys), (name, path.read_text(errors="replace"))
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("name", [*FILES, "data/train/a/a_000000.png"])
@pytest.mark.parametrize("kind", ["fifo", "folder", "dangling", "itself", "empty", "deep"])
def test_what_is_no_regular_file_neither_hangs_nor_passes_unnoticed(world, capsys, name, kind):
    path = world / name
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind in ("dangling", "itself"):
        path.symlink_to("nowhere" if kind == "dangling" else path.name)
    else:
        path.write_text("[" * 100_000 if kind == "deep" else "")
    assert is_said(report(world), capsys)


@pytest.mark.parametrize("line", ["null", "5", "{}", "[]", '"x"'])
@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".jsonl")])
def test_a_line_of_another_kind(world, capsys, line, name):
    (world / name).write_text((world / name).read_text() + line + "\n")
    assert is_said(report(world), capsys)


@pytest.mark.parametrize("name", ["results.jsonl", "log.jsonl"])
def test_torn_lines_of_results_are_left_out_and_said(world, capsys, name):
    path = world / "run" / name
    path.write_text('{"model": "m", "data\n' + path.read_text() + '{"kind": "epo')
    assert report(world) == 0
    assert f"{name}: 2 damaged lines are left out" in capsys.readouterr().err


def test_a_damaged_image_is_named(world, capsys):
    path = world / "data/train/b/b_000001.png"
    path.write_bytes(path.read_bytes()[:40])
    assert report(world) == 2
    assert f"--show-data: {path}" in capsys.readouterr().err


def test_names_with_control_characters_are_refused(world, capsys):
    append_jsonl(world / "run/results.jsonl", read_jsonl(world / "run/results.jsonl")[0] | {"model": "\x1b[31mred"})
    assert report(world) == 2
    said = capsys.readouterr().err
    assert "has control characters" in said and "\x1b" not in said


def test_texts_with_control_characters_do_not_reach_the_pages(world):
    look = json.loads((world / "run/eval/d.json").read_text())
    look |= {"class_names": ["\x1b[31m a\x00", "|\u202e$<b>"], "command": "python \x9b x.py"}
    write_json(world / "run/eval/d.json", look)
    assert report(world) == 0
    for name in ("report.md", "report.html"):
        text = (world / "out" / name).read_text()
        assert "\ufffd[31m a\ufffd" in text and not set(text) & set("\x1b\x00\u202e\x9b")
    assert "|\ufffd$&lt;b&gt;" in (world / "out/report.html").read_text()
