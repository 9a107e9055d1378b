"""--dry-run: what a run would draw and cost, before any weight is loaded. Imports no torch."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from utils.cli import UserError
from utils.dataset.folder import in_chunk
from utils.generation.pipeline import NoiseSchedule, PipelineFolder, find_pipeline
from utils.generation.prompts import ClassTable, Templates, class_prompts, prompt_warnings
from utils.generation.recipe import Recipe
from utils.machine import gpus
from utils.storage import free_bytes

# Stable Diffusion 1.x at 512 px on an A100, 102 forwards an image: 3.6 iterations/s in batches of 16 and 4.68 compiled
# (diffusers, docs/source/en/optimization/torch2.0.md), less what the VAE takes. Other cards and models have no figure.
A100_IMAGES_PER_S = {False: 1.08, True: 1.40}  # without and with --compile
VAE_SHARE = 2.5 / 84.5  # of the TFLOP of such an image
SD1_NAME = re.compile(r"stable-diffusion-v1-\d")
BYTES_PER_PIXEL = {"jpg": 0.35, "png": 1.6, "webp": 0.25}  # a guess for photographs at drawing.QUALITY


def show_plan(
    recipe: Recipe,
    model: str,
    revision: str | None,
    table: ClassTable,
    template: Templates,
    counts: dict[str, int],
    chunk: tuple[int, int] | None,
    out: Path,
    device_name: str,
    images_per_s: float | None,
) -> None:
    """Print what a run by RECIPE would draw and cost. Downloads nothing; what it does not know of the MODEL is as in
    Stable Diffusion 1.4. The rate is IMAGES_PER_S if given, else see expected_rate()."""
    folder, schedule = None, NoiseSchedule()
    try:
        folder = find_pipeline(model, revision, download=False)
        recipe, schedule = recipe.with_model(folder), folder.settings("scheduler/scheduler_config.json", NoiseSchedule)
    except UserError as error:
        print(f"note: {error}", file=sys.stderr)
    height, width, save_size = recipe.height or 512, recipe.width or 512, recipe.save_size
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

    Measured where the model and a device to draw with are here: a step and a decode are timed. Else the published rate
    of Stable Diffusion 1.x on an A100, where nothing here contradicts it.
    """
    cards = gpus()["gpus"]
    on_a100 = device_name in ("auto", "cuda") and all("A100" in card for card in cards)  # none here: a cluster's
    published = on_a100 and SD1_NAME.search(model)
    if folder and (cards or not published):
        from utils.generation import loading  # imports torch

        try:
            return loading.measured_rate(folder, recipe, device_name)
        except UserError as error:
            print(f"note: {error}", file=sys.stderr)
    if published:
        scale = (1 - VAE_SHARE) * forwards / 102 + VAE_SHARE
        pixels = (recipe.height or 512) * (recipe.width or 512) / 512**2
        how = "published for Stable Diffusion 1.x on an A100, not measured here; give yours with --rate"
        return A100_IMAGES_PER_S[recipe.compile] / scale / pixels, "GPU", how
    return 0.0, "GPU", f"{model} on {', '.join(sorted(set(cards))) or 'this machine'}"


def expected_forwards(recipe: Recipe, schedule: NoiseSchedule) -> int:
    """UNet forwards an image, reckoned without the scheduler's code; exact but for a guidance interval's ends."""
    evaluations = recipe.steps + (recipe.scheduler == "pndm" and recipe.steps > 1)  # PNDM draws one step twice
    if recipe.guidance_scale <= 1:
        return evaluations
    if not recipe.guidance_interval:
        return 2 * evaluations
    betas = np.linspace(schedule.beta_start**0.5, schedule.beta_end**0.5, 1000) ** 2
    signal = np.cumprod(1 - betas)
    levels = np.sqrt((1 - signal) / signal)
    low, high = recipe.guidance_interval
    return evaluations + round(evaluations * float(np.mean((low < levels) & (levels <= high))))
