"""Draw a sample of an existing dataset again, by its own record, and say how close the new files come.

Batches are drawn whole, as they were (their composition decides the last bits), so the sample is made of batches. The
new files go to a temporary folder; the dataset is only read.
"""

import json
import math
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from utils.cli import UserError, differences
from utils.dataset.folder import ClassFolder, Dataset, open_dataset
from utils.generation.drawing import Batch, ProgressBar
from utils.generation.pipeline import find_pipeline
from utils.generation.prompt_files import recorded_template
from utils.generation.prompts import class_prompts
from utils.generation.recipe import Recipe
from utils.images import BadImage, decode_rgb
from utils.machine import resolve_device, snapshot
from utils.storage import read_jsonl, sha256_file

NEAR_DB = 30.0  # a peak signal-to-noise ratio from which two files show the same picture, low bits apart
EQUAL, NEAR, DIFFERENT, LOST = "byte-equal", "near-equal", "different", "damaged or missing in the dataset"
Draw = Callable[..., Iterator[tuple[Batch, dict[int, dict]]]]  # generate.draw
Comparison = tuple[str, str, float]  # name of an image, verdict, PSNR in dB of the new pixels against the old


def reproduce(
    record: Path, sample: int, seed: int, model: tuple[str, str | None] | None, device: str, choices: dict, draw: Draw
) -> int:
    """Draw about SAMPLE images of the dataset of RECORD again with DRAW, and print how they compare.

    The MODEL (with its revision; None: as recorded) and CHOICES (of dtype, attention, batch_size) may differ from the
    record, to see what that does; they are then listed with the other differences. Returns the exit code: 0 if all
    images are byte-equal or near-equal, else 1.
    """
    from utils.generation import loading  # imports torch

    dataset = open_record(record)
    recorded, chosen = Recipe.of(dataset), choose_batches(dataset, sample, seed)
    folder = find_pipeline(*model or recorded_model(dataset), recorded.lora or ())
    for name, _, _ in differences(dataset.info["model"]["files"], folder.hashes(recorded.safety != "off")):
        raise UserError(f"--model {folder.name} is not the model {dataset.root} was drawn with: {name} differs")

    here = resolve_device(device)
    for key, of_a_gpu in (("dtype", "fp16"), ("attention", "xformers")):
        if here.type != "cuda" and getattr(recorded, key) == of_a_gpu:
            choices = {key: None} | choices
    recipe = replace(recorded, **choices).with_device(here)
    sampler = loading.load_sampler(folder, recipe, here)
    images = sum(len(batch) for _, batch in chosen)
    print(f"{dataset.root}: drawing {images} of its {dataset.images} images again: {len(chosen)} whole batches of "
          f"{len({folder.id for folder, _ in chosen})} classes")  # fmt: skip
    with ProgressBar(images, "reproduce") as bar:
        found = list(redraw(dataset, chosen, lambda batches: draw(batches, recipe, sampler, bar), bar))
    show_comparisons(found)
    show_differences(dataset, recorded, recipe)
    if sampler.denoising.size < (recipe.batch_size or 1):
        print(f"note: memory ran out here, so at most {sampler.denoising.size} images were denoised at once")
    return 0 if all(verdict in (EQUAL, NEAR) for _, verdict, _ in found) else 1


def show_comparisons(found: list[Comparison]) -> None:
    """Print a line for each verdict: how many images, the lowest signal-to-noise ratio, the first names."""
    for verdict in (EQUAL, NEAR, DIFFERENT, LOST):
        names = [name for name, found_as, _ in found if found_as == verdict]
        psnrs_db = [psnr for _, found_as, psnr in found if found_as == verdict and math.isfinite(psnr)]
        shown = f", PSNR from {min(psnrs_db):.1f} dB" if psnrs_db else ""
        shown += f" ({', '.join(names[:5])})" if names and verdict != EQUAL else ""
        print(f"{verdict}: {len(names)}{shown}")


def show_differences(dataset: Dataset, recorded: Recipe, used: Recipe) -> None:
    """Print in what this machine and the recipe USED differ from the record."""
    differing = [*differences(dataset.info["environment"], snapshot())]
    differing += differences(recorded.record(), used.record(), "recipe")
    print(f"differs here from the record: {len(differing)} facts" if differing else "this machine: as recorded")
    for name, there, here in differing:
        print(f"  {name}: recorded {json.dumps(there)}, here {json.dumps(here)}")
    sessions = read_jsonl(dataset.root / "sessions.jsonl")
    if others := {repr(line.get("environment")) for line in sessions} - {repr("as in dataset.json")}:
        print(f"note: {len(others)} other environments drew parts of it (sessions.jsonl); "
              "which image each drew is not kept")  # fmt: skip
    whole = recorded.batch_size or 1
    if smaller := sum((line.get("micro_batch") or whole) < whole for line in sessions):
        print(f"note: memory ran out in {smaller} sessions, which denoised batches in parts (micro_batch in "
              "sessions.jsonl); low bits of their images may differ")  # fmt: skip


# ===== the record =====


def open_record(path: Path) -> Dataset:
    """The dataset of PATH, its folder or dataset.json."""
    if not path.exists() or (path.is_file() and path.name != "dataset.json"):
        fault = " is no dataset" if path.exists() else " does not exist"
        raise UserError(f"--reproduce {path}{fault}; name a dataset's folder or its dataset.json")
    return open_dataset(path.parent if path.is_file() else path)


def recorded_model(dataset: Dataset) -> tuple[str, str | None]:
    """(folder or hub id, revision) of the model DATASET was drawn with."""
    name, revision = dataset.info["model"]["id"], dataset.info["model"]["revision"]
    return name, None if Path(name).is_dir() else revision


# ===== the sample =====


def choose_batches(dataset: Dataset, images: int, seed: int) -> list[tuple[ClassFolder, range]]:
    """Whole batches, chosen by SEED among those the manifests call done, with at least IMAGES images if there are."""
    done: list[tuple[ClassFolder, range]] = []
    for folder in dataset.folders:
        entries = folder.entries()
        done += [(folder, batch) for batch in folder.batches() if entries.keys() >= set(batch)]
    if not done:
        raise UserError(f"--reproduce {dataset.root}: no batch of it is drawn yet (generate.py --status shows more)")
    random.Random(seed).shuffle(done)
    chosen: list[tuple[ClassFolder, range]] = []
    while done and sum(len(batch) for _, batch in chosen) < images:
        chosen.append(done.pop())
    return chosen


def redraw(
    dataset: Dataset, chosen: list[tuple[ClassFolder, range]], draw: Draw, bar: ProgressBar
) -> Iterator[Comparison]:
    """DRAW the CHOSEN batches again, as the first time, rejections included; compare every image."""
    recipe, template = Recipe.of(dataset), recorded_template(dataset)
    rows, old = {row.wnid: row for row in dataset.table.rows}, {folder.id: folder for folder, _ in chosen}
    with tempfile.TemporaryDirectory(prefix="imagenet-sd-") as room:
        batches = []
        for folder, indices in chosen:
            new = replace(folder, root=Path(room))
            new.images.mkdir(parents=True, exist_ok=True)
            prompts = class_prompts(rows[folder.id], template, indices, recipe.seed, recipe.names)
            batches.append(Batch(new, list(prompts)))
        for batch, entries in draw(batches):
            folder = old[batch.folder.id]
            recorded = folder.entries()
            for index in sorted(entries):
                redrawn = batch.folder.path(index)
                yield redrawn.stem, *compare(folder.path(index), recorded[index], redrawn, entries[index])
                redrawn.unlink()
                bar.update(1)


def compare(old: Path, recorded: dict, new: Path, entry: dict) -> tuple[str, float]:
    """(verdict, PSNR in dB) of the new file against the old one, which must be the one its manifest speaks of.

    The PSNR is infinite for the same bytes, nan where there is no picture to compare.
    """
    if not old.is_file() or sha256_file(old) != recorded["sha256"]:
        return LOST, math.nan
    if entry["sha256"] == recorded["sha256"]:
        return EQUAL, math.inf
    try:
        psnr = psnr_db(decode_rgb(old), decode_rgb(new))
    except BadImage:
        psnr = math.nan
    return NEAR if psnr >= NEAR_DB else DIFFERENT, psnr


def psnr_db(old: np.ndarray, new: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 images; infinite if they are equal, nan if their sizes differ."""
    if old.shape != new.shape:
        return math.nan
    error = np.mean((old.astype(np.float64) - new.astype(np.float64)) ** 2)
    return 10 * math.log10(255**2 / error) if error else math.inf
