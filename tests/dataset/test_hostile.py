"""Datasets that were damaged, edited or made to do harm: refused in one line or healed, never another number."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import generate
from tests.dataset.test_folder import entry_of, record_of
from utils.cli import UserError, run
from utils.dataset import folder as datasets
from utils.dataset.inspection import inspect
from utils.dataset.shards import write_shards
from utils.generation.drawing import encode_image
from utils.storage import sha256_bytes

LOOKS = ("--status", "--verify", "--preview", "--pack")
IDS = ("n01", "n02", "n03")


def look(out: Path, *options) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of generate.py on the folder OUT."""
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            code = run(generate.main, generate.get_args_parser(), ["--out", str(out), *options])
        except SystemExit as left:
            code = left.code
    lines = [line for line in errors.getvalue().splitlines() if "error" in line or "Traceback" in line]
    return code, output.getvalue(), "\n".join(lines)


def everything(root: Path) -> dict[str, bytes | str]:
    """{path: content} of all files below ROOT, without what every look may write."""
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else ""
        for path in sorted(root.rglob("*"))
        if not {"preview", "shards", ".locks"} & {*path.relative_to(root).parts} and path.name != "index.html"
    }


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """A complete dataset of 3 classes with 4 images each."""
    rng = np.random.default_rng(0)
    classes = [{"id": i, "name": "cat, kitty", "hypernym": "", "definition": "a pet", "images": 4} for i in IDS]
    dataset = datasets.create_dataset(tmp_path_factory.mktemp("data") / "cats", record_of("cats", classes))
    for folder in dataset.folders:
        folder.prepare()
        entries = []
        for index in range(4):
            data = encode_image(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8), "jpg", None)
            folder.path(index).write_bytes(data)
            entries.append(entry_of(folder, index, data))
        folder.commit(entries)
    datasets.record_session(dataset, {"images": 12, "seconds": 3.0})
    return dataset.root


@pytest.fixture
def out(drawn, tmp_path) -> Path:
    return shutil.copytree(drawn, tmp_path / "room" / "cats")


def edit(out: Path, change) -> None:
    info = json.loads((out / "dataset.json").read_text())
    (out / "dataset.json").write_text(json.dumps(change(info) or info))


# ===== dataset.json =====


def put(*keys_and_value):
    """A change that sets info[key]...[key] = value."""
    *keys, last, value = keys_and_value

    def change(info: dict) -> None:
        for key in keys:
            info = info[key]
        info[last] = value

    return change


def drop(*keys):
    def change(info: dict) -> None:
        for key in keys[:-1]:
            info = info[key]
        del info[keys[-1]]

    return change


HARM = {
    "absolute id": put("classes", 0, "id", "/tmp/victim"),
    "id upwards": put("classes", 0, "id", "../../victim"),
    "id of dots": put("classes", 0, "id", ".."),
    "empty id": put("classes", 0, "id", ""),
    "id with a newline": put("classes", 0, "id", "n01\n"),
    "id twice": put("classes", 1, "id", "n01"),
    "another id": put("classes", 0, "id", "n09"),
    "another class name": put("classes", 0, "name", "dog"),
    "a class less": lambda info: info["classes"].pop() and None,
    "fewer images": put("classes", 0, "images", 2),
    "more images": put("classes", 0, "images", 5),
    "endless images": put("classes", 0, "images", 10**15),
    "negative images": put("classes", 0, "images", -1),
    "images as text": put("classes", 0, "images", "4"),
    "name upwards": put("name", "../../victim"),
    "absolute name": put("name", "/tmp/victim"),
    "name as list": put("name", ["x"]),
    "no classes": put("classes", []),
    "classes as object": put("classes", {}),
    "class as number": put("classes", 0, 5),
    "definition of a megabyte": put("classes", 0, "definition", "x" * 2**20),
    "recipe as list": put("recipe", []),
    "batches of none": put("recipe", "batch_size", 0),
    "batch as text": put("recipe", "batch_size", "4"),
    "unknown format": put("recipe", "format", "exe"),
    "format as list": put("recipe", "format", ["jpg"]),
    "other hash": put("recipe", "classes", "0" * 64),
    "hash as number": put("recipe", "classes", 1),
    "images of no number": put("recipe", "images_per_class", "many"),
    "images of a huge factor": put("recipe", "images_per_class", "99999999x"),
    "no images": put("recipe", "images_per_class", 0),
    "prompt as number": put("recipe", "prompt", 1),
    "model as text": put("model", "m"),
    "files as list": put("model", "files", []),
    "another version": put("format", "imagenet-sd dataset 0"),
    "deep nesting": put("environment", json.loads("[" * 500 + "]" * 500)),
    "a list": lambda info: [info],
    **{f"no {key}": drop(key) for key in ("format", "name", "recipe", "model", "classes", "environment")},
    **{f"no recipe.{key}": drop("recipe", key) for key in ("classes", "batch_size", "format", "images_per_class")},
    **{f"class without {key}": drop("classes", 0, key) for key in ("id", "name", "images", "definition")},
}


@pytest.mark.parametrize("harm", HARM)
def test_a_dataset_json_that_was_edited_is_refused_by_every_look(out, harm):
    victim = out.parent.parent / "victim"
    victim.mkdir()
    (victim / "thesis.txt").write_text("precious")
    edit(out, HARM[harm])
    before = everything(out.parent.parent)
    for option in (*LOOKS, "--repair", "--dry-run"):
        code, _, error = look(out, option)
        assert code == 2 and error.count("\n") == 0 and str(out) in error, (option, error)
        assert "unexpected" not in error and "delete" not in error
    assert everything(out.parent.parent) == before


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"null", b"[" * 100_000])
def test_a_damaged_or_lost_dataset_json_has_a_way_back(out, content):
    (out / "dataset.json").write_bytes(content)
    code, _, error = look(out, "--status")
    command = f"cp {out}/.dataset.json {out}/dataset.json"
    assert code == 2 and f"`{command}` brings it back" in error
    (out / "dataset.json").unlink()
    for options in (["--status"], []):
        code, _, error = look(out, *options)
        assert code == 2 and f"`{command}` brings it back" in error
    (out / "dataset.json").symlink_to("nowhere")
    assert "brings it back" in look(out)[2]
    (out / "dataset.json").unlink()
    os.system(command)
    assert look(out, "--verify")[0] == 0


def test_without_its_copy_nothing_is_promised(out):
    (out / ".dataset.json").unlink()
    (out / "dataset.json").write_bytes(b"{")
    assert "restore it from a copy" in look(out, "--status")[2]
    (out / "dataset.json").unlink()
    assert "choose an empty or new folder" in look(out)[2]


# ===== manifests and files =====


def test_lines_of_any_kind_change_no_count(out):
    """Duplicates, lines of other classes, beyond the count, of other types: 12 of 12 images, in every place."""
    path = out / "manifest" / "n01.jsonl"
    lines = path.read_text().splitlines()
    entry = json.loads(lines[1])
    strange = ["null", "5", "{}", "[]", '"x"', "[" * 2000, '{"id": "n01"}', json.dumps(entry | {"index": 99})]
    strange += [
        json.dumps(entry | change) for change in ({"id": "n02"}, {"index": "1"}, {"index": -1}, {"bytes": None})
    ]
    strange += [json.dumps(entry | change) for change in ({"sha256": "../x"}, {"rejected": 5}, {"seed": []})]
    path.write_text("\n".join([*lines, *lines[:2], *strange]) + "\n")
    dataset = datasets.open_dataset(out)
    assert datasets.count_images(dataset) == {"wanted": 12, "images": 12, "redrawn": {}, "safety_flagged": 0}
    assert [look(out, option)[0] for option in LOOKS] == [0, 0, 0, 0]
    assert "12 of 12 images done, 0 missing, 0 damaged" in look(out, "--status")[1]
    dataset.folders[0].prepare()
    assert path.read_text().splitlines() == lines


def test_an_image_that_is_gone_does_not_count(out):
    (out / "train/n02/n02_000003.jpg").unlink()
    (out / "train/n03/n03_000000.jpg").write_bytes(b"torn")
    dataset = datasets.open_dataset(out)
    assert datasets.count_images(dataset)["images"] == 10
    assert datasets.record_session(dataset, {"images": 0, "seconds": 0})["images"] == 10


@pytest.mark.parametrize("kind", ["dangling symlink", "fifo", "folder", "endless symlink"])
def test_what_is_no_regular_file_is_a_missing_image_of_its_own(out, kind):
    path = out / "train/n02/n02_000001.jpg"
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("nowhere.jpg" if kind == "dangling symlink" else path.name)
    state = inspect(datasets.open_dataset(out).folders[1], hashes=True)
    assert (state.done, state.missing, state.damaged, state.foreign) == (3, [1], [], [])
    assert "11 of 12 images done, 1 missing" in look(out, "--status")[1]
    assert look(out, "--verify")[0] == 2 and look(out, "--preview")[0] == 0
    assert "n02 has 3 of 4 images" in look(out, "--pack")[2]


def test_a_manifest_that_is_no_file_is_told(out):
    path = out / "manifest/n01.jsonl"
    path.unlink()
    os.mkfifo(path)
    for option in LOOKS:
        code, _, error = look(out, option)
        assert code == 2 and str(path) in error and "not a regular file" in error


def test_damaged_lines_of_sessions_are_left_out(out):
    with open(out / "sessions.jsonl", "a") as file:
        file.write('null\n5\n{}\n[]\n{"images": "x", "seconds": 1}\n{"images": 1, "seconds": -5}\n{"images": 7')
    dataset = datasets.open_dataset(out)
    datasets.record_session(dataset, {"images": 12, "seconds": 1.0})
    assert datasets.open_dataset(out).info["time"]["images_drawn"] == 24


def test_leftovers_of_killed_processes_are_removed(out):
    from utils.storage import _where

    here = _where()
    (out / f".dataset.json.{here}00000000.999999999.tmp").write_bytes(b"x")
    (out / "shards").mkdir()
    (out / f"shards/.cats-000000.tar.{here}00000000.999999999.tmp").write_bytes(b"x")
    (out / "train/n01/.n01_000001.jpg.7.tmp").write_bytes(b"x")
    dataset = datasets.open_dataset(out)
    datasets.create_dataset(out, dataset.info)
    dataset.folders[0].prepare()
    write_shards(dataset)
    assert not list(out.rglob("*.tmp"))


def test_preview_follows_no_symlink(out, tmp_path):
    (tmp_path / "victim/n01").mkdir(parents=True)
    (tmp_path / "victim/n01/thesis.txt").write_text("precious")
    (out / "preview").symlink_to(tmp_path / "victim")
    code, _, error = look(out, "--preview")
    assert code == 2 and "is a symlink" in error and (tmp_path / "victim/n01/thesis.txt").exists()
    (out / "preview").unlink()
    (out / "preview").mkdir()
    (out / "preview/n01").symlink_to(tmp_path / "victim/n01")
    look(out, "--preview")
    assert (tmp_path / "victim/n01/thesis.txt").exists() and len(os.listdir(tmp_path / "victim/n01")) == 1


# ===== shards =====


@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "gone", "note gone", "note null", "note of another shard"])
def test_packing_again_rebuilds_a_shard_that_is_not_what_was_written(out, monkeypatch, harm):
    monkeypatch.setattr("utils.dataset.shards.IMAGES_A_SHARD", 5)
    assert look(out, "--pack")[0] == 0
    before = {path.name: path.read_bytes() for path in (out / "shards").iterdir()}
    shard, note = out / "shards/cats-000001.tar", out / "shards/cats-000001.json"
    data = shard.read_bytes()
    if harm == "flip":
        shard.write_bytes(data[:700] + bytes([data[700] ^ 4]) + data[701:])
    elif harm in ("cut", "empty"):
        shard.write_bytes(data[: len(data) // 2 if harm == "cut" else 0])
    elif harm == "gone":
        shard.unlink()
    elif harm == "note gone":
        note.unlink()
    else:
        note.write_bytes(b"null" if harm == "note null" else before["cats-000000.json"])
    assert look(out, "--pack")[0] == 0
    assert {path.name: path.read_bytes() for path in (out / "shards").iterdir()} == before


def test_shards_of_an_earlier_packing_go_and_others_stay(out, monkeypatch):
    monkeypatch.setattr("utils.dataset.shards.IMAGES_A_SHARD", 5)
    look(out, "--pack")
    shutil.copy(out / "shards/cats-000000.tar", out / "shards/mine-000007.tar")
    monkeypatch.setattr("utils.dataset.shards.IMAGES_A_SHARD", 100)
    look(out, "--pack")
    assert sorted(os.listdir(out / "shards")) == [
        "README.md",
        "SHA256SUMS",
        "cats-000000.json",
        "cats-000000.tar",
        "croissant.json",
        "dataset.json",
        "index.json",
        "mine-000007.tar",
    ]
    assert "mine" not in (out / "shards/README.md").read_text() + (out / "shards/SHA256SUMS").read_text()
    with tarfile.open(out / "shards/cats-000000.tar") as tar:
        assert len(tar.getnames()) == 36


def test_two_ids_of_one_stem_are_not_packed(tmp_path):
    classes = [{"id": i, "name": i, "hypernym": "", "definition": "", "images": 1} for i in ("a.b", "a_b")]
    dataset = datasets.create_dataset(tmp_path / "x", record_of("x", classes))
    for folder in dataset.folders:
        folder.prepare()
        folder.path(0).write_bytes(b"x")
        folder.commit([entry_of(folder, 0, b"x")])
    with pytest.raises(UserError, match=r"a\.b and a_b have one name in WebDataset"):
        write_shards(dataset)


# ===== any damage to any file =====


def harmed(data: bytes, kind: str, place: int, other: bytes) -> bytes:
    place %= len(data) or 1
    if kind == "flip":
        return data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :] if data else data
    changes = {"cut": data[:place], "zero": data[:place] + bytes(len(data) - place), "swap": other, "empty": b""}
    changes |= {"duplicate": data + data, "double line": data + data[data[:-1].rfind(b"\n") + 1 :]}
    return (changes | {"null": b"null\n", "list": b"[]\n", "number": b"5\n", "nest": b"[" * 5000})[kind]


KINDS = ["flip", "cut", "zero", "swap", "empty", "duplicate", "double line", "null", "list", "number", "nest"]


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(which=st.integers(0, 200), kind=st.sampled_from(KINDS), place=st.integers(0, 10**6), another=st.integers(0, 200))
def test_any_damage_to_any_file_is_refused_or_healed(drawn, tmp_path_factory, which, kind, place, another):
    """After it no look says "unexpected" or hangs, --verify passes only if all images are what they were, a packed
    shard holds the drawn images or none."""
    out = shutil.copytree(drawn, tmp_path_factory.mktemp("damaged") / "cats")
    files = sorted(path for path in out.rglob("*") if path.is_file() and ".locks" not in path.parts)
    path, other = files[which % len(files)], files[another % len(files)]
    path.write_bytes(harmed(path.read_bytes(), kind, place, other.read_bytes()))
    for option in LOOKS:
        code, _, error = look(out, option)
        assert code in (0, 2) and error.count("\n") == 0 and "unexpected" not in error, (path, kind, option, error)
        if option == "--verify" and code == 0:
            for image in (drawn / "train").rglob("*.jpg"):
                assert (out / image.relative_to(drawn)).read_bytes() == image.read_bytes()
        if option == "--pack" and code == 0:
            with tarfile.open(out / "shards/cats-000000.tar") as tar:
                packed = sorted(sha256_bytes(tar.extractfile(m).read()) for m in tar if m.name.endswith(".jpg"))
            assert packed == sorted(sha256_bytes(image.read_bytes()) for image in (drawn / "train").rglob("*.jpg"))
    shutil.rmtree(out.parent)
