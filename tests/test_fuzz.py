"""Damaged and hostile files against every reader: a value, or one error that names the file; never anything else.

Each reader gets a good file with pieces flipped, cut out, zeroed, doubled, swapped or replaced, and plain noise. In the
test suite this takes seconds; `make fuzz` gives each reader FUZZ_SECONDS.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.training.test_checkpoint import state
from utils import classes, images, storage
from utils.cli import UserError
from utils.dataset import folder as datasets
from utils.dataset.records import FORMAT
from utils.evaluation import weights
from utils.evaluation.pickles import read_pickle
from utils.generation.pipeline import PipelineFolder
from utils.launch import command
from utils.report import records
from utils.training import checkpoint, image_sets

SECONDS = float(os.environ.get("FUZZ_SECONDS", "0"))
REFUSALS = (UserError, images.BadImage)
MOST_MB = 600  # that a reader may take for a file of a few KB


def picture(form: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(48 * 40 * 3, dtype=np.uint8).reshape(48, 40, 3)).save(buffer, form)
    return buffer.getvalue()


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name in ("n1/a.jpg", "n1_000001.jpg", "n2/b.png"):
            member = tarfile.TarInfo(name)
            member.size = len(data := picture("PNG" if name.endswith("png") else "JPEG"))
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def dataset_json() -> bytes:
    table = [classes.ClassRow(f"n{k}", "a, b", "", "c") for k in range(2)]
    recipe = {"format": "jpg", "batch_size": 4, "steps": 50, "prompt": "c", "images_per_class": 3, "scheduler": "ddim"}
    recipe |= {"guidance_scale": 2.0, "classes": classes.ClassTable("x", tuple(table)).sha256}
    info = {"format": FORMAT, "name": "x", "recipe": recipe, "model": {"id": "m", "revision": None, "files": {}}}
    rows = [{"id": row.wnid, "name": row.name, "hypernym": "", "definition": "c", "images": 3} for row in table]
    return json.dumps(info | {"classes": rows, "environment": {}, "command": "python"}).encode()


def manifest() -> bytes:
    line = {"id": "n0", "prompt": "a", "seed": 1, "attempt": 0, "rejected": [], "safety": None, "bytes": 3}
    return b"".join(json.dumps(line | {"index": k, "sha256": "0" * 64}).encode() + b"\n" for k in range(3))


def look_at_dataset(path: Path) -> list:
    dataset = datasets.open_dataset(path.parent)
    return [(folder.path(0), folder.entries(), folder.open_batches()) for folder in dataset.folders]


def look_at_manifest(path: Path) -> list:
    folder = datasets.ClassFolder(path.parent.parent, "n0", 3, ".jpg", 2)
    return [folder.entries(), folder.done(), folder.open_batches()]


def results() -> bytes:
    row = {"model": "m", "dataset": "IN-Val", "metric": "top1", "value": 50.0, "n": 100, "num_classes": 10}
    return b"".join((json.dumps(row | {"seed": k}) + "\n").encode() for k in range(2))


WEIGHTS = {"fc.weight": torch.ones(2, 3), "fc.bias": torch.zeros(2)}
TABLE = b'wnid\tname\thypernym\tdefinition\nn1\trobin, bird\tthrush\t"a ""red"" one"\nn2\tjay\t\t\n'
SITE = b'account = "vision"\nsetup = ["module load cuda"]\n[train]\nnodes = 2\n'
READERS: dict[str, tuple[str, bytes, Any]] = {
    "class table": ("birds.tsv", TABLE, classes.load_classes),
    "class list": ("birds.txt", b"# ten\nn01440764\ngoldfish\n", classes.load_classes),
    "site file": ("site.toml", SITE, lambda path: command.site_options(path, ["train"], command.get_args_parser())),
    "JSON": ("x.json", dataset_json(), storage.read_json),
    "JSON Lines": ("x.jsonl", manifest(), storage.read_jsonl),
    "dataset.json": ("dataset.json", dataset_json(), look_at_dataset),
    "manifest": ("manifest/n0.jsonl", manifest(), look_at_manifest),
    "results": ("results.jsonl", results(), lambda path: records.read_results([path])),
    "pickle": ("x.pkl", pickle.dumps({"L1": ["n1"], "x": np.arange(9.0), "y": {"a": 1}}, 2), read_pickle),
    "weights": ("x.pth", saved(WEIGHTS), weights.read_weights),
    "checkpoint": ("checkpoint.pth", saved(state(3, side=2)), lambda path: checkpoint.load_checkpoint(path.parent)),
    "pipeline settings": (
        "x.json",
        b'{"a": [1, 2], "b": {"c": "d"}}',
        lambda path: PipelineFolder("m", None, path.parent).settings(path.name),
    ),
    "tar shard": ("x.tar", tar(), lambda path: [image_sets.TarImages(path.parent, [path]).read(0)]),
    "image header": ("x.jpg", picture("JPEG"), lambda path: images.image_size(path.read_bytes(), str(path))),
    **{f"{form} image": ("x.jpg", picture(form), images.decode_rgb) for form in images.FORMATS},
}
piece = st.tuples(
    st.floats(0, 1), st.integers(1, 64), st.sampled_from(["flip", "cut", "zero", "double", "ones", "swap"]), st.binary()
)


def damaged(good: bytes, edits: list[tuple[float, int, str, bytes]]) -> bytes:
    data = bytearray(good)
    for place, length, kind, noise in edits:
        at = int(place * len(data))
        old = data[at : at + length]
        data[at : at + length] = {
            "flip": bytes(old[:1]).translate(bytes(byte ^ (1 << length % 8) for byte in range(256))) + old[1:],
            "cut": b"",
            "zero": bytes(len(old)),
            "double": old * 2,
            "ones": b"\xff" * len(old),
            "swap": noise,
        }[kind]
    return bytes(data)


@pytest.mark.filterwarnings("ignore")  # of Pillow, about damaged tags
@pytest.mark.timeout(60 + 2 * SECONDS)
@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_file_gives_a_value_or_one_error_that_names_it(reader, tmp_path):
    name, good, read = READERS[reader]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(good)
    read(path)  # the good one is read

    @settings(
        max_examples=1000 if SECONDS else 60,
        deadline=None,
        database=None,
        derandomize=not SECONDS,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(piece, min_size=1, max_size=5), st.booleans())
    def attack(edits: list, noise_only: bool) -> None:
        path.write_bytes(edits[0][3] if noise_only else damaged(good, edits))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started = time.monotonic()
        try:
            read(path)
        except REFUSALS as error:
            assert "\n" not in str(error) and len(str(error)) < 2000
            assert path.name in str(error) or path.parent.name in str(error)
        assert time.monotonic() - started < 10
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_MB * 1024

    attack()
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        attack()
