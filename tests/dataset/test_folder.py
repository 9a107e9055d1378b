"""Dataset folders: what counts as done, how manifests grow, refusals, and the looks at a folder that need no torch."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.classes import ClassRow, ClassTable
from utils.cli import UserError
from utils.dataset import folder as datasets
from utils.dataset import inspection
from utils.dataset.folder import ClassFolder, in_chunk
from utils.dataset.shards import write_shards
from utils.storage import AlreadyOwned, sha256_bytes

ROOT = Path(__file__).resolve().parents[2]
MODEL = {"id": "m", "revision": None, "files": {"unet/weights": "0" * 64}}


def record_of(name: str, classes: list[dict], **recipe) -> dict:
    """What generate.py records of a dataset, shortened."""
    rows = tuple(ClassRow(row["id"], row["name"], row["hypernym"], row["definition"]) for row in classes)
    recipe = {"name": "paper", "classes": ClassTable("x", rows).sha256, "prompt": "c"} | recipe
    recipe = {
        "images_per_class": classes[0]["images"],
        "scheduler": "pndm",
        "steps": 50,
        "guidance_scale": 2.0,
    } | recipe
    recipe = {"format": "jpg", "batch_size": 4} | recipe
    return {"name": name, "recipe": recipe, "model": MODEL, "classes": classes, "environment": {}, "command": "x"}


def entry_of(folder: ClassFolder, index: int, data: bytes, **changes) -> dict:
    entry = {"id": folder.id, "index": index, "prompt": 'a "cat", naïve', "seed": 2**62 + index, "attempt": 0}
    return entry | {"rejected": [], "safety": None, "bytes": len(data), "sha256": sha256_bytes(data)} | changes


def fill(folder: ClassFolder, indices) -> None:
    folder.prepare()
    for batch in folder.batches():
        chosen = [index for index in batch if index in indices]
        for index in chosen:
            folder.path(index).write_bytes(b"image %d" % index)
        if chosen:
            folder.commit([entry_of(folder, index, b"image %d" % index) for index in chosen])


@pytest.fixture
def folder(tmp_path) -> ClassFolder:
    return ClassFolder(tmp_path, "n01", 10, ".jpg", 4)


@pytest.fixture
def dataset(tmp_path):
    classes = [
        {"id": f"n0{k}", "name": "cat, kitty", "hypernym": "", "definition": "a pet", "images": 10} for k in range(3)
    ]
    made = datasets.create_dataset(tmp_path / "cats", record_of("cats", classes))
    for class_folder in made.folders:
        fill(class_folder, range(10))
    return made


# ===== partitions =====


@given(count=st.integers(1, 500), size=st.integers(1, 64))
def test_batches_cover_a_class_exactly_and_in_order(count, size):
    batches = ClassFolder(Path("x"), "n01", count, ".jpg", size).batches()
    assert [index for batch in batches for index in batch] == list(range(count))
    assert all(len(batch) == size for batch in batches[:-1]) and 1 <= len(batches[-1]) <= size


@given(classes=st.integers(0, 300), parts=st.integers(1, 400))
def test_any_chunking_partitions_the_classes_exactly(classes, parts):
    items = list(range(classes))
    chunks = [in_chunk(items, (part, parts)) for part in range(parts)]
    assert sorted(item for chunk in chunks for item in chunk) == items
    assert max(map(len, chunks)) - min(map(len, chunks)) <= 1


# ===== what is done =====


def test_a_batch_is_open_until_each_of_its_images_is_there_in_full(folder):
    assert folder.open_batches() == folder.batches() == [range(0, 4), range(4, 8), range(8, 10)]
    fill(folder, range(10))
    assert folder.open_batches() == []
    folder.path(5).unlink()
    folder.path(9).write_bytes(b"")
    assert folder.open_batches() == [range(4, 8), range(8, 10)]


def test_a_file_without_a_line_counts_as_missing(folder):
    fill(folder, range(4))
    folder.path(4).write_bytes(b"image 4")
    state = inspection.inspect(folder)
    assert (state.done, state.missing, state.damaged) == (4, [4, 5, 6, 7, 8, 9], [])


def test_prepare_removes_what_a_kill_left_and_nothing_else(folder):
    fill(folder, range(8))
    whole = folder.manifest.read_bytes()
    folder.manifest.write_bytes(whole + b'{"id": "n01", "index": 8, "pro')
    (folder.images / ".n01_000009.jpg.77.tmp").write_bytes(b"half")
    (folder.images / "holiday.jpg").write_bytes(b"mine")
    folder.prepare()
    assert folder.manifest.read_bytes() == whole
    assert sorted(path.name for path in folder.images.iterdir()) == [
        "holiday.jpg",
        *(f"n01_{k:06d}.jpg" for k in range(8)),
    ]


def test_manifest_bytes_do_not_depend_on_the_order_of_drawing(folder, tmp_path):
    fill(folder, range(10))
    other = ClassFolder(tmp_path / "other", "n01", 10, ".jpg", 4)
    other.prepare()
    for batch in (range(4, 8), range(8, 10), range(0, 4), range(4, 8)):
        other.commit([entry_of(other, index, b"image %d" % index) for index in batch])
    assert other.manifest.read_bytes() == folder.manifest.read_bytes()


def test_foreign_lines_of_a_manifest_are_left_out(folder):
    fill(folder, range(4))
    lines = [b"[]", b"null", b'{"id": "n01"}', json.dumps(entry_of(folder, 99, b"x")).encode()]
    with open(folder.manifest, "ab") as file:
        file.write(b"\n".join(lines) + b"\n\xff\xfe\n")
    assert list(folder.entries()) == [0, 1, 2, 3]


def test_inspection_by_hash_sees_a_changed_byte_and_by_size_does_not(folder):
    fill(folder, range(10))
    folder.path(3).write_bytes(b"IMAGE 3")
    assert inspection.inspect(folder).damaged == []
    state = inspection.inspect(folder, hashes=True)
    assert state.damaged == [3]
    (folder.root / ".locks").mkdir()
    inspection.repair([folder])
    assert folder.open_batches() == [range(0, 4)]


def test_foreign_files_and_classes_are_reported(dataset):
    (dataset.folders[0].images / "Thumbs.db").write_bytes(b"x")
    (dataset.root / "train" / "extra").mkdir()
    assert inspection.inspect(dataset.folders[0]).foreign == ["Thumbs.db"]
    assert inspection.foreign_classes(dataset) == ["extra"]


def test_a_class_has_one_owner(folder):
    (folder.root / ".locks").mkdir(parents=True)
    with folder.lock(), pytest.raises(AlreadyOwned), folder.lock():
        pass
    with folder.lock():
        pass


def test_a_class_may_be_called_dataset(folder):
    """Whoever draws it for hours does not hold the lock of dataset.json."""
    own = replace(folder, id="dataset")
    (folder.root / ".locks").mkdir(parents=True)
    with own.lock(), datasets.record_lock(folder.root):  # which would wait
        pass


# ===== dataset.json =====


def test_the_first_of_two_creators_wins(dataset):
    again = datasets.create_dataset(dataset.root, dataset.info | {"recipe": dataset.recipe | {"batch_size": 8}})
    assert again.recipe["batch_size"] == 4


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "imagenet-sd dataset 0"}'])
def test_a_dataset_json_of_other_origin_is_refused(tmp_path, text):
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(UserError, match=r"dataset\.json"):
        datasets.open_dataset(tmp_path)


def test_foreign_folders_are_refused(tmp_path):
    inspection.refuse_foreign_folder(tmp_path / "new")
    inspection.refuse_foreign_folder(tmp_path)
    (tmp_path / "thesis.docx").write_text("x")
    with pytest.raises(UserError, match=r"holds 'thesis\.docx' but no dataset\.json"):
        inspection.refuse_foreign_folder(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        inspection.refuse_foreign_folder(tmp_path / "thesis.docx")


def test_counts_come_from_the_manifests(dataset):
    folder = dataset.folders[1]
    entries = folder.entries()
    entries[2] |= {"attempt": 2, "rejected": ["black", "safety"], "safety": False}
    entries[3] |= {"safety": True}
    folder.rewrite(entries)
    counts = datasets.count_images(dataset)
    assert counts == {"wanted": 30, "images": 30, "redrawn": {"black": 1, "safety": 1}, "safety_flagged": 1}


def test_sessions_add_up(dataset):
    for images, seconds in ((10, 2.0), (20, 3.0)):
        datasets.record_session(dataset, {"images": images, "seconds": seconds})
    info = json.loads((dataset.root / "dataset.json").read_text())
    assert info["time"] == {"process_seconds": 5.0, "images_drawn": 30, "images_per_s_per_process": 6.0}
    assert info["counts"]["images"] == 30 and info["completed"]
    assert info["cost"] == {"seconds": 5.0}  # these sessions record nothing else


def test_the_cost_of_a_dataset_is_that_of_its_sessions(dataset):
    """But for what one of them could not read; a command that finds nothing to do adds nothing."""
    for joules in ({"cpu_joules": 30, "gpu_joules": 7}, {"cpu_joules": 12}):
        datasets.record_session(dataset, {"images": 10, "seconds": 2.0, "flops": 4e18} | joules)
    for _ in range(2):
        info = json.loads((dataset.root / "dataset.json").read_text())
        assert info["cost"] == {"seconds": 4.0, "flops": 8e18, "cpu_joules": 42}
        datasets.record_session(dataset, {"images": 0, "seconds": 0})


def test_rate_is_that_of_the_last_minutes():
    times = [0.0, 1.0, 2.0] + [10_000 + 2 * k for k in range(301)]
    rate, age = inspection.images_per_second(times)
    assert rate == pytest.approx(0.5) and age > 0
    assert inspection.images_per_second([])[0] == 0


# ===== without torch =====


@pytest.mark.parametrize("option", ["--help", "--dry-run", "--status", "--verify", "--preview", "--pack"])
def test_looking_needs_no_torch(dataset, option):
    import numpy as np

    from utils.generation.drawing import encode_image

    for folder in dataset.folders:
        data = encode_image(np.zeros((8, 8, 3), np.uint8), "jpg", None)
        for index in range(10):
            folder.path(index).write_bytes(data)
        folder.rewrite({index: entry_of(folder, index, data) for index in range(10)})
    where = [] if option in ("--help", "--dry-run") else ["--out", str(dataset.root)]
    if option == "--preview":
        info = json.loads((dataset.root / "dataset.json").read_text())
        info["recipe"] |= {"scheduler": "pndm", "guidance_scale": 2.0, "prompt": "c"}
        (dataset.root / "dataset.json").write_text(json.dumps(info))
    code = f"""
import sys
from generate import get_args_parser, main
from utils.cli import run
try:
    code = run(main, get_args_parser(), {[option, *where]!r})
finally:
    assert not {{"torch", "diffusers", "transformers"}} & sys.modules.keys()
sys.exit(code)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ===== shards =====


def test_shards_hold_every_image_once_and_the_same_bytes_again(dataset, monkeypatch):
    monkeypatch.setattr("utils.dataset.shards.IMAGES_A_SHARD", 12)
    assert "30 images in 3 shards; 3 written now" in write_shards(dataset)
    assert "30 images in 3 shards; 0 written now" in write_shards(dataset)
    shards = sorted((dataset.root / "shards").glob("*.tar"))
    before = [shard.read_bytes() for shard in shards]
    samples: dict[str, dict[str, bytes]] = {}
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                stem, suffix = member.name.split(".", 1)  # as WebDataset groups them
                samples.setdefault(stem, {})[suffix] = tar.extractfile(member).read()
    assert len(samples) == 30
    for label, folder in enumerate(dataset.folders):
        for index in range(10):
            sample = samples[f"{folder.id}_{index:06d}"]
            assert sample["jpg"] == folder.path(index).read_bytes()
            assert sample["cls"] == str(label).encode()
            assert json.loads(sample["json"])["label"] == label
    with tarfile.open(shards[0]) as tar:
        assert len({name[:3] for name in tar.getnames()}) == 3  # classes are mixed

    for shard in shards:
        shard.unlink()
    write_shards(dataset)
    assert [shard.read_bytes() for shard in shards] == before


def test_incomplete_or_damaged_datasets_are_not_packed(dataset):
    dataset.folders[2].path(1).write_bytes(b"IMAGE 1")
    with pytest.raises(UserError, match="damaged; run --repair"):
        write_shards(dataset)
    dataset.folders[2].path(1).unlink()
    with pytest.raises(UserError, match="9 of 10 images"):
        write_shards(dataset)
