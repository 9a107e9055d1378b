"""Draw a sample of an existing dataset again, by its own record, and say how close the new files come.

Batches are drawn whole, as they were (their composition decides the last bits), so the sample is made of batches. The
new files go to a temporary folder; the dataset is only read.
"""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from utils.classes import ClassRow, ClassTable
from utils.cli import UserError
from utils.dataset import folder as datasets
from utils.dataset.folder import ClassFolder, Dataset
from utils.generation.drawing import Batch, Studio
from utils.generation.prompts import Prompt, Template, class_prompts
from utils.images import BadImage, decode_rgb
from utils.storage import read_jsonl, sha256_file

NEAR_DB = 30.0  # a peak signal-to-noise ratio from which two files show the same picture, low bits apart
EQUAL, NEAR, DIFFERENT, LOST = "byte-equal", "near-equal", "different", "damaged or missing in the dataset"


@dataclass(frozen=True)
class Comparison:
    """One image of the sample."""

    id: str
    index: int
    verdict: str  # EQUAL, NEAR, DIFFERENT or LOST
    psnr_db: float  # of the new pixels against the old; infinite if equal, nan where there is no picture to compare


# ===== the record =====


def open_record(path: Path) -> Dataset:
    """The dataset whose dataset.json (or folder) PATH is; UserError if there is none."""
    if not path.exists():
        raise UserError(f"--reproduce {path} does not exist; name a dataset's folder or its dataset.json")
    if path.is_file() and path.name != "dataset.json":
        raise UserError(f"--reproduce {path}: name a dataset's folder or its dataset.json")
    return datasets.open_dataset(path.parent if path.is_file() else path)


def recorded_classes(dataset: Dataset) -> ClassTable:
    """The class table the dataset was drawn with, from its own record."""
    rows = tuple(ClassRow(c["id"], c["name"], c["hypernym"], c["definition"]) for c in dataset.info["classes"])
    table = ClassTable(dataset.info["name"], rows)
    if table.sha256 != dataset.recipe["classes"]:
        raise UserError(
            f"--reproduce {dataset.root}: dataset.json was changed: its classes are not those of its recipe"
        )
    return table


def differences(recorded: Any, here: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, recorded, here) of every fact in which two records differ."""
    if isinstance(recorded, dict) and isinstance(here, dict):
        for key in recorded | here:
            yield from differences(recorded.get(key), here.get(key), f"{name}.{key}" if name else key)
    elif recorded != here:
        yield name, recorded, here


def other_environments(dataset: Dataset) -> int:
    """How many different environments, besides the one in dataset.json, took part in drawing it."""
    found = {repr(line.get("environment")) for line in read_jsonl(dataset.root / "sessions.jsonl")}
    return len(found - {repr("as in dataset.json")})


def smaller_batches(dataset: Dataset) -> int:
    """How many finished processes denoised fewer images at once than a batch has, because memory ran out."""
    sessions, size = read_jsonl(dataset.root / "sessions.jsonl"), dataset.recipe["batch_size"]
    return sum((line.get("micro_batch") or size) < size for line in sessions)


# ===== the sample =====


def choose_batches(dataset: Dataset, images: int, seed: int) -> list[tuple[ClassFolder, range]]:
    """Whole batches, chosen by SEED among those the manifests call done, with at least IMAGES images if there are."""
    done = [
        (folder, batch)
        for folder in dataset.folders
        for entries in [folder.entries()]
        for batch in folder.batches()
        if all(index in entries for index in batch)
    ]
    if not done:
        raise UserError(f"--reproduce {dataset.root}: no batch of it is drawn yet (generate.py --status shows more)")
    random.Random(seed).shuffle(done)
    chosen: list[tuple[ClassFolder, range]] = []
    while done and sum(len(batch) for _, batch in chosen) < images:
        chosen.append(done.pop())
    return chosen


def redraw(
    dataset: Dataset, chosen: list[tuple[ClassFolder, range]], sampler, table: ClassTable, template: Template, bar
) -> Iterator[Comparison]:
    """Draw CHOSEN again, as the first time, rejections included; compare every image."""
    rows, old = {row.wnid: row for row in table.rows}, {folder.id: folder for folder, _ in chosen}

    def batches(room: Path) -> Iterator[Batch]:
        for folder, indices in chosen:
            new = replace(folder, root=room)
            new.images.mkdir(parents=True, exist_ok=True)
            yield Batch(new, prompts_of(rows[folder.id], template, indices, dataset.recipe), None)

    with tempfile.TemporaryDirectory(prefix="imagenet-sd-") as room:
        for batch, entries in Studio(dataset.recipe, sampler, bar).draw(batches(Path(room))):
            assert batch  # batches() never waits
            recorded = old[batch.folder.id].entries()
            for index in sorted(entries):
                new = batch.folder.path(index)
                yield compare(old[batch.folder.id], index, recorded[index], new, entries[index])
                new.unlink()
                bar.update(1)


def prompts_of(row: ClassRow, template: Template, indices: range, recipe: dict) -> list[Prompt]:
    prompts = class_prompts(row, template, indices.stop, recipe["seed"], recipe["names"])
    return [prompt for prompt in prompts if prompt.index in indices]


def compare(folder: ClassFolder, index: int, recorded: dict, new: Path, entry: dict) -> Comparison:
    """The new file against the old one, which must be the one its manifest speaks of."""
    old = folder.path(index)
    if not old.is_file() or sha256_file(old) != recorded["sha256"]:
        return Comparison(folder.id, index, LOST, math.nan)
    if entry["sha256"] == recorded["sha256"]:
        return Comparison(folder.id, index, EQUAL, math.inf)
    try:
        psnr = psnr_db(decode_rgb(old), decode_rgb(new))
    except BadImage:
        psnr = math.nan
    return Comparison(folder.id, index, NEAR if psnr >= NEAR_DB else DIFFERENT, psnr)


def psnr_db(old: np.ndarray, new: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 images; infinite if they are equal, nan if their sizes differ."""
    if old.shape != new.shape:
        return math.nan
    error = np.mean((old.astype(np.float64) - new.astype(np.float64)) ** 2)
    return 10 * math.log10(255**2 / error) if error else math.inf
