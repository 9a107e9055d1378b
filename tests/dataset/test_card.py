"""A packed dataset as its users read it: the hub's `datasets`, WebDataset, mlcroissant, sha256sum; and after a kill."""

import json
import logging
import shutil
import subprocess
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.dataset.test_folder import entry_of, record_of
from tests.dataset.test_hostile import look
from utils.dataset import card, shards
from utils.dataset import folder as datasets
from utils.generation.drawing import encode_image
from utils.training.image_sets import open_images

IDS, NAMES, IMAGES = ("n01.a", "n02", "n03"), ("crane", 'crane | "bird" <b>', "naïve, cat"), 4


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """Three classes in shards of five; one sample, not among the first five, was redrawn once."""
    rng = np.random.default_rng(0)
    classes = [
        {"id": i, "name": n, "hypernym": "", "definition": "a pet", "images": IMAGES}
        for i, n in zip(IDS, NAMES, strict=True)
    ]
    info = record_of("zoo", classes, seed=3, supervision="class names")
    info["model"] |= {"id": "CompVis/stable-diffusion-v1-4", "revision": "133a221b"}
    dataset = datasets.create_dataset(tmp_path_factory.mktemp("data") / "zoo", info)
    drawn = {}
    for folder in dataset.folders:
        folder.prepare()
        for index in range(IMAGES):
            data = encode_image(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8), "jpg", None)
            folder.path(index).write_bytes(data)
            drawn[folder.id, index] = entry_of(folder, index, data)
    last = max(drawn, key=lambda key: drawn[key]["sha256"])
    drawn[last] |= {"rejected": ["safety"], "attempt": 1, "safety": False}
    for folder in dataset.folders:
        folder.commit([drawn[folder.id, index] for index in range(IMAGES)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "IMAGES_A_SHARD", 5)
        assert look(dataset.root, "--pack")[0] == 0
    return dataset.root


def published(packed: Path, room: Path) -> Path:
    """The folder as somebody downloads it, without the dataset around it."""
    return shutil.copytree(packed / "shards", room / "zoo")


def files_of(packed: Path) -> dict[str, bytes]:
    """{key of the sample: file}."""
    found = datasets.open_dataset(packed)
    return {
        f"{folder.id.replace('.', '_')}_{index:06d}": folder.path(index).read_bytes()
        for folder in found.folders
        for index in range(IMAGES)
    }


def test_the_hub_s_library_reads_it(packed, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets as hub

    read = hub.load_dataset(str(published(packed, tmp_path)), split="train", cache_dir=str(tmp_path / "cache"))
    assert read.features["cls"].names == list(IDS)
    assert len(read) == 12 and sum(row["json"]["rejected"] == ["safety"] for row in read) == 1
    files = files_of(packed)
    for row in read:
        assert row["cls"] == row["json"]["label"] == IDS.index(row["json"]["id"])
        assert row["json"]["seed"] == 2**62 + row["json"]["index"]
        np.testing.assert_array_equal(
            np.asarray(row["jpg"]), np.asarray(Image.open(BytesIO(files.pop(row["__key__"]))))
        )
    assert not files


def test_webdataset_reads_it(packed, tmp_path):
    import webdataset

    tars = sorted(map(str, published(packed, tmp_path).glob("*.tar")))
    samples = list(webdataset.WebDataset(tars, shardshuffle=False))
    assert {sample["__key__"]: sample["jpg"] for sample in samples} == files_of(packed)
    decoded = list(webdataset.WebDataset(tars, shardshuffle=False).decode("rgb8").to_tuple("jpg", "cls"))
    assert sorted(label for _, label in decoded) == sorted(4 * [0, 1, 2]) and decoded[0][0].shape == (16, 16, 3)


def test_mlcroissant_finds_it_valid_and_reads_it(packed, tmp_path, caplog):
    import mlcroissant

    with caplog.at_level(logging.WARNING):
        found = mlcroissant.Dataset(published(packed, tmp_path) / "croissant.json")
    problems = [*found.metadata.ctx.issues.errors, *found.metadata.ctx.issues.warnings]
    # What nobody knows of a dataset before it is published.
    assert all("recommended, but does not exist" in line for line in problems), problems
    assert not [record for record in caplog.records if "not standard" in record.message]
    files = files_of(packed)
    for record in found.records("images"):
        image = record["images/image"]
        pixels = np.asarray(image)
        assert record["images/class"].decode() in ("n01_a", "n02", "n03")
        match = [key for key in files if np.array_equal(np.asarray(Image.open(BytesIO(files[key]))), pixels)]
        assert len(match) == 1 and match[0].startswith(record["images/class"].decode())
        del files[match[0]]
    assert not files
    assert [row["classes/label"] for row in found.records("classes")] == [0, 1, 2]


def test_training_knows_what_was_downloaded(packed, tmp_path):
    """Not as real images: a report would say so. Ids with dots, which WebDataset's names lack, come back."""
    own, theirs = open_images(packed / "shards"), open_images(published(packed, tmp_path))
    assert theirs.class_ids == own.class_ids == list(IDS) and theirs.summary() == own.summary()
    expected = {"path": str(tmp_path / "zoo"), "synthetic": True, "supervision": "class names"}
    assert theirs.source() == expected and own.source()["synthetic"]


def test_sha256sum_agrees(packed, tmp_path):
    folder = published(packed, tmp_path)
    assert (
        subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=folder, capture_output=True).returncode == 0
    )
    listed = {line.split("  ")[1] for line in (folder / "SHA256SUMS").read_text().splitlines()}
    assert listed == {path.name for path in folder.iterdir()} - {"SHA256SUMS", "README.md"}


def test_the_card_says_what_it_is(packed):
    text = (packed / "shards/README.md").read_text()
    _, header, body = text.split("---\n", 2)
    said = yaml.safe_load(header)
    assert said["license"] == "creativeml-openrail-m" and said["size_categories"] == ["n<1K"]
    assert said["task_categories"] == ["image-classification"] and said["pretty_name"] == "zoo"
    from huggingface_hub import DatasetCard

    DatasetCard(text)  # parses the header as the hub does
    assert "12 synthetic images of 3 classes" in body and "CompVis/stable-diffusion-v1-4`, revision `133a221b" in body
    assert "the template `c`. Supervision: class names." in body and "base seed 3" in body
    assert '| 1 | n02 | crane \\| "bird" &lt;b> | 4 |' in body and "\n    x\n" in body  # the command


@pytest.mark.parametrize(
    ("models", "header", "said"),
    [
        (["models/mine"], 'license: "other"\nlicense_name: "unknown"', "not known here: look it up"),
        (["black-forest-labs/FLUX.1-schnell"], 'license: "apache-2.0"', "`apache-2.0`"),
        (["stabilityai/sdxl-turbo"], 'license: "other"\nlicense_name: "sai-nc-community"', "`sai-nc-community`"),
        (["stabilityai/stable-diffusion-xl-base-1.0", "ByteDance/SDXL-Lightning/x.safetensors:1"],
         'license: "openrail++"', "`openrail++`"),
        (["stabilityai/stable-diffusion-xl-base-1.0", "mine.safetensors:1"], 'license: "other"', "not known here"),
        (["CompVis/stable-diffusion-v1-4", "latent-consistency/lcm-lora-sdv1-5:1"], 'license: "other"', "not known"),
    ],
)  # fmt: skip
def test_the_licence_is_that_of_model_and_lora_or_is_said_to_be_unknown(packed, models, header, said):
    info = json.loads((packed / "dataset.json").read_text())
    info["model"]["id"], info["recipe"]["lora"] = models[0], models[1:]
    text = card.card(datasets.Dataset(packed, info), [{"images": 1, "file": "x", "sha256": ""}])
    assert text.startswith(f"---\n{header}\n") and f"Licence of the generator: {said}" in text


# ===== kills =====


class Killed(BaseException):
    """Nothing in the code catches it, as nothing catches SIGKILL."""


class Disk:
    """Allows so many more changes below ROOM, then kills."""

    def __init__(self, room: Path, changes: int):
        self.room, self.left = room, changes

    def counting(self, change):
        def counted(path, *rest, **options):
            if path.is_relative_to(self.room) and path.exists():
                if self.left == 0:
                    raise Killed
                self.left -= 1
            return change(path, *rest, **options)

        return counted


def test_whatever_is_written_before_a_kill_claims_no_more_than_is_there(packed, tmp_path, monkeypatch):
    """A shard is of another packing; packing again is killed before each of its changes to the disk in turn."""
    monkeypatch.setattr(shards, "IMAGES_A_SHARD", 5)
    reference = {path.name: path.read_bytes() for path in (packed / "shards").iterdir()}
    room, changes, ended = tmp_path / "room", 0, False
    while not ended:
        shutil.rmtree(room, ignore_errors=True)
        shutil.copytree(packed, room)
        (room / "shards/zoo-000001.tar").write_bytes(b"of an earlier packing")
        disk = Disk(room, changes)
        with monkeypatch.context() as patch:
            for name in ("replace", "unlink"):
                patch.setattr(Path, name, disk.counting(getattr(Path, name)))
            try:
                shards.write_shards(datasets.open_dataset(room))
                ended = True
            except Killed:
                pass
        if changes and (room / "shards/README.md").exists():  # before the first nothing was done
            done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=room / "shards", capture_output=True)
            assert done.returncode == 0, changes
        shards.write_shards(datasets.open_dataset(room))
        assert {path.name: path.read_bytes() for path in (room / "shards").iterdir()} == reference
        changes += 1
    assert changes > 10


def test_packing_a_whole_dataset_again_touches_nothing(packed, monkeypatch):
    monkeypatch.setattr(shards, "IMAGES_A_SHARD", 5)
    before = {path.name: path.read_bytes() for path in (packed / "shards").iterdir()}
    monkeypatch.setattr(shards, "withdraw_card", None)
    assert "0 written now" in shards.write_shards(datasets.open_dataset(packed))
    assert {path.name: path.read_bytes() for path in (packed / "shards").iterdir()} == before
