"""--dry-run: what a run would draw and cost, before any weight is loaded. Imports no torch."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from utils.cli import UserError
from utils.dataset.folder import in_chunk
from utils.generation.pipeline import find_pipeline
from utils.generation.prompts import ClassTable, Template, class_prompts, prompt_warnings
from utils.generation.recipe import Recipe
from utils.storage import free_bytes

# Where nothing was measured: 85 TFLOP an image at 125 TFLOP/s, 40 % of an A100's fp16 peak.
ASSUMED_IMAGES_PER_S = 1.5
BYTES_PER_PIXEL = {"jpg": 0.35, "png": 1.6, "webp": 0.25}  # a guess for photographs at drawing.QUALITY


def show_plan(
    recipe: Recipe,
    model: str,
    revision: str | None,
    table: ClassTable,
    template: Template,
    counts: dict[str, int],
    chunk: tuple[int, int] | None,
    out: Path,
    images_per_s: float | None,
) -> None:
    """Print what a run by RECIPE would draw and cost. Loads no model and downloads none; what it does not know of the
    MODEL is as in Stable Diffusion 1.4."""
    schedule: dict = {}
    try:
        folder = find_pipeline(model, revision, download=False)
        recipe, schedule = recipe.with_model(folder), folder.scheduler_config
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
    rate = images_per_s or ASSUMED_IMAGES_PER_S * (102 / forwards) * (512 * 512 / pixels)
    guess = "assumed for Stable Diffusion 1.4 on an A100, not measured; give yours with --rate"
    part, parts = chunk or (0, 1)
    print(f"out: {out}")
    print(f"classes: {len(rows)} of {table.name}" + (f" (chunk {part} of {parts})" if parts > 1 else ""))
    print(f"images: {images:,} of {width} x {height} pixels")
    print(f"UNet forwards: about {forwards} an image, {images * forwards:,} in all "
          f"({recipe.name}: {recipe.scheduler},\n  {recipe.steps} steps, "
          f"guidance {recipe.guidance_scale:g})")  # fmt: skip
    print(
        f"GPU hours: {images / rate / 3600:,.1f} at {rate:.2f} images/s a GPU ({'as given' if images_per_s else guess})"
    )
    print(f"disk: about {size / 1e9:,.2f} GB as {recipe.format}, {free_bytes(out) / 1e9:,.1f} GB free at {out}")
    sizes = [sum(counts[row.wnid] for row in in_chunk(list(table.rows), (i, 8))) for i in range(8)]
    print(f"chunks: --chunk 0/8 ... 7/8, for example, draw {min(sizes):,} to {max(sizes):,} images each")
    for row in rows[:3]:
        (first,) = class_prompts(row, template, [0], recipe.seed, recipe.names)
        print(f"prompt: {first.wnid}_{0:06d}, seed {first.seed}: {first.text}")
    for warning in prompt_warnings(table, template, recipe.names):
        print(f"warning: {warning}", file=sys.stderr)


def expected_forwards(recipe: Recipe, schedule: dict[str, Any]) -> int:
    """UNet forwards an image, reckoned without the scheduler's code; exact but for a guidance interval's ends.

    SCHEDULE is the model's scheduler_config.json; what it lacks is as in SD 1.4.
    """
    evaluations = recipe.steps + (recipe.scheduler == "pndm" and recipe.steps > 1)  # PNDM draws one step twice
    if recipe.guidance_scale <= 1:
        return evaluations
    if not recipe.guidance_interval:
        return 2 * evaluations
    betas = np.linspace(schedule.get("beta_start", 0.00085) ** 0.5, schedule.get("beta_end", 0.012) ** 0.5, 1000) ** 2
    signal = np.cumprod(1 - betas)
    levels = np.sqrt((1 - signal) / signal)
    low, high = recipe.guidance_interval
    return evaluations + round(evaluations * float(np.mean((low < levels) & (levels <= high))))
