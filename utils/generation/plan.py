"""--dry-run: what a run would draw and cost, before any weight is loaded. Imports no torch."""

import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np

from utils.cli import UserError
from utils.dataset.folder import in_chunk
from utils.generation.lora import shapes
from utils.generation.pipeline import NoiseSchedule, PipelineFolder
from utils.generation.prompts import ClassTable, Templates, class_prompts, prompt_warnings
from utils.generation.recipe import Recipe
from utils.machine import ROOT, gpus, is_out_of_memory
from utils.storage import free_bytes, read_json

RATES = ROOT / "benchmarks" / "gpu_rates.json"  # what `make bench-gpu` measured, by card; rows are sent in by users
VAE_FORWARDS = 2.5 / 0.803  # TFLOP of the VAE in those of a UNet forward: SD 1.x at 512 px
WORK_GB = 3.3  # with 2.6 of weights in 16 bits, the safety checker's too, the 6 that Stable Diffusion 1.4 is known for
SD1_NAME = re.compile(r"stable-diffusion-v1-\d")
BYTES_PER_PIXEL = {"jpg": 0.35, "png": 1.6, "webp": 0.25}  # a guess for photographs at drawing.QUALITY


class Rate(msgspec.Struct):
    """Images/s of Stable Diffusion 1.x on a card: a row of RATES, of which only generation is read here."""

    card: str  # as nvidia-smi names it
    what: str
    images_per_s: float
    dtype: str = "fp16"
    attention: str = "sdpa"
    compile: bool = False
    batch_size: int = 16
    forwards: float = 102  # of the UNet for an image
    pixels: int = 512**2
    time: str = ""


# 3.6 iterations/s in batches of 16 and 4.68 compiled (diffusers, docs/source/en/optimization/torch2.0.md), less what
# the VAE takes. No other card has a published figure of batches.
PUBLISHED = (Rate("A100", "generation", 1.08), Rate("A100", "generation", 1.40, compile=True))


def show_plan(
    recipe: Recipe,
    model: str,
    folder: PipelineFolder | None,
    table: ClassTable,
    template: Templates,
    counts: dict[str, int],
    chunk: tuple[int, int] | None,
    out: Path,
    device_name: str,
    images_per_s: float | None,
) -> None:
    """Print what a run by RECIPE would draw and cost. Without the FOLDER of the MODEL what is not known of it is as
    its family publishes it. The rate is IMAGES_PER_S if given, else see expected_rate()."""
    schedule = NoiseSchedule()
    try:
        if folder:
            recipe = recipe.with_model(folder)
            schedule = folder.settings("scheduler/scheduler_config.json", NoiseSchedule)
    except UserError as error:
        print(f"note: {error}", file=sys.stderr)
    native = recipe.family.size
    height, width, save_size = recipe.height or native, recipe.width or native, recipe.save_size
    recipe = replace(recipe, height=height, width=width)
    rows = in_chunk(list(table.rows), chunk)
    images = sum(counts[row.wnid] for row in rows)
    forwards = expected_forwards(recipe, schedule)
    pixels = height * width
    stored = pixels * (save_size / min(height, width)) ** 2 if save_size else pixels
    size = images * (1000 + stored * BYTES_PER_PIXEL[recipe.format])
    print(f"out: {out}")
    print(f"classes: {len(rows)} of {table.name}" + (f" (chunk {chunk[0]} of {chunk[1]})" if chunk else ""))
    print(f"images: {images:,} of {width} x {height} pixels")
    print(f"UNet forwards: about {forwards} an image, {images * forwards:,} in all "
          f"({recipe.name}: {recipe.scheduler},\n  {recipe.steps} steps, "
          f"guidance {recipe.guidance_scale:g})")  # fmt: skip
    given = images_per_s and (images_per_s, "GPU", "as given")
    rate, unit, how = given or expected_rate(recipe, folder, model, device_name, forwards)
    if rate:
        print(f"{unit} hours: {images / rate / 3600:,.1f} at {rate:.2f} images/s a {unit} ({how})")
    else:
        print(f"{unit} hours: not known for {how}; give its images/s with --rate")
    print(f"disk: about {size / 1e9:,.2f} GB as {recipe.format}, {free_bytes(out) / 1e9:,.1f} GB free at {out}")
    sizes = [sum(counts[row.wnid] for row in in_chunk(list(table.rows), (i, 8))) for i in range(8)]
    print(f"chunks: --chunk 0/8 ... 7/8, for example, draw {min(sizes):,} to {max(sizes):,} images each")
    for row in rows[:3]:
        (first,) = class_prompts(row, template, [0], recipe.seed, recipe.names)
        print(f"prompt: {first.wnid}_{0:06d}, seed {first.seed}: {first.text}")
    for warning in prompt_warnings(table, template, recipe.names):
        print(f"warning: {warning}", file=sys.stderr)


def expected_rate(
    recipe: Recipe, folder: PipelineFolder | None, model: str, device_name: str, forwards: int
) -> tuple[float, str, str]:
    """(images/s or 0, "GPU" or "CPU", how it is known or for what it is not).

    Of Stable Diffusion 1.x what `make bench-gpu` measured on a card of this name. Else measured where the model and a
    device to draw with are here. Else the published rate on an A100, where nothing here contradicts it.
    """
    cards = gpus()["gpus"]
    on_gpu = device_name in ("auto", "cuda") and "MIG" not in os.environ.get("CUDA_VISIBLE_DEVICES", "")  # not a slice
    is_sd1 = on_gpu and SD1_NAME.search(model)
    if is_sd1 and RATES.is_file():
        row = nearest_rate(read_json(RATES, list[Rate], "take it from the repository again"), cards, recipe, forwards)
        if row:
            kind = f"{row.dtype}, {row.attention}, {'compiled, ' * row.compile}batch {row.batch_size}"
            return scaled(row, recipe, forwards), "GPU", f"measured on {row.card}, {row.time[:10]}: {kind}"
    published = nearest_rate(PUBLISHED, cards, recipe, forwards) if is_sd1 else None
    if folder and (cards or not published):
        from utils.generation import loading  # imports torch

        try:
            return loading.measured_rate(folder, recipe, device_name)
        except (UserError, RuntimeError) as error:
            if not isinstance(error, UserError) and not is_out_of_memory(error):
                raise
            print(f"note: {str(error).splitlines()[0]}", file=sys.stderr)
    if published:
        how = "published for Stable Diffusion 1.x on an A100, not measured here; give yours with --rate"
        return scaled(published, recipe, forwards), "GPU", how
    return 0.0, "GPU", f"{model} on {', '.join(sorted(set(cards))) or 'this machine'}"


def nearest_rate(rows: Sequence[Rate], cards: Sequence[str], recipe: Recipe, forwards: int) -> Rate | None:
    """Of ROWS measured on the CARDS of this machine (without one, on an A100: a cluster's) the nearest to RECIPE."""

    def fits(row: Rate) -> bool:
        here = all(row.card == card or (row.card == "A100" and "A100" in card) for card in cards)
        same_format = (row.dtype == "fp32") == (recipe.dtype == "fp32")  # the 16-bit ones are equally fast
        known = here if cards else "A100" in row.card
        return known and row.what == "generation" and row.compile == recipe.compile and same_format

    def distance(row: Rate) -> tuple:
        batch = abs(row.batch_size - (recipe.batch_size or 16))
        other = row.attention != (recipe.attention or row.attention)
        return other, batch, abs(row.forwards - forwards), row.dtype != (recipe.dtype or "fp16"), -row.images_per_s

    return min(filter(fits, rows), key=distance, default=None)


def scaled(row: Rate, recipe: Recipe, forwards: int) -> float:
    """Images/s of ROW reckoned for FORWARDS an image of RECIPE's size."""
    pixels = (recipe.height or 512) * (recipe.width or 512)
    return row.images_per_s * (row.forwards + VAE_FORWARDS) / (forwards + VAE_FORWARDS) * row.pixels / pixels


def memory_gb(folder: PipelineFolder, recipe: Recipe) -> float:
    """GB to draw one image with the weights of FOLDER: WORK_GB for 512 x 512 pixels beside them. Of a pipeline that is
    called as a whole the network or all the rest, which take turns; its larger images' own numbers are not known."""
    parts, family = folder.parts(recipe.safety != "off"), folder.family
    counts = {part: sum(map(math.prod, shapes(folder.weights(part)).values())) for part in parts}
    together, size = sum(counts.values()), (recipe.height or 512) * (recipe.width or 512) / 512**2
    if not family.has_own_loop:
        together, size = max(counts[family.denoiser], together - counts[family.denoiser]), min(size, 1)
    return WORK_GB * size + together * (4 if recipe.dtype == "fp32" else 2) / 2**30


def expected_forwards(recipe: Recipe, schedule: NoiseSchedule) -> int:
    """Forwards of the network an image, reckoned without the scheduler's code; exact but for an interval's ends."""
    evaluations = recipe.steps + (recipe.scheduler == "pndm" and recipe.steps > 1)  # PNDM draws one step twice
    if recipe.guidance_scale <= 1 or recipe.family.guidance != "cfg":
        return evaluations
    if not recipe.guidance_interval:
        return 2 * evaluations
    signal = np.cumprod(1 - np.linspace(schedule.beta_start**0.5, schedule.beta_end**0.5, 1000) ** 2)
    levels = np.sqrt((1 - signal) / signal)
    if schedule.shift:  # of a flow, whose levels are s / (1 - s)
        levels = schedule.shift / (1 / np.linspace(0.0005, 0.9995, 1000) - 1)
    low, high = recipe.guidance_interval
    return evaluations + round(evaluations * float(np.mean((low < levels) & (levels <= (high or np.inf)))))
