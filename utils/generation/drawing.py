"""From open batches to files: claim a class, hand out its batches; judge, encode and write images beside the next ones.

The order of events makes a kill harmless: files of a batch (each renamed into place), then its manifest lines in one
synced write. What is drawn follows from the batch alone, redraws included, so a batch drawn twice gives the same bytes.
"""

from __future__ import annotations

import io
import itertools
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import simplejpeg
from PIL import Image
from tqdm import tqdm

from utils.cli import UserError
from utils.dataset.folder import ClassFolder, Dataset, open_dataset
from utils.generation.prompts import ClassTable, Prompt, Templates, class_prompts, image_seed
from utils.generation.recipe import CHROMA, QUALITY, Recipe
from utils.machine import NO_COST, Meter, add_costs
from utils.storage import AlreadyOwned, atomic_write, sha256_bytes

if TYPE_CHECKING:
    import torch

    from utils.generation.diffusion import Sampler

MAX_ATTEMPTS = 10  # --safety redraw: then the last image drawn is kept, flagged and counted
MAX_BROKEN = 3  # black or non-finite draws of one image in a row before the model is blamed
Result = TypeVar("Result")


@dataclass(frozen=True)
class Batch:
    """Images of one class that are denoised together."""

    folder: ClassFolder
    prompts: list[Prompt]  # with the seeds of this attempt
    lock: ExitStack | None = None  # to let go after the class's last batch
    attempt: int = 0
    rejected: dict[int, list[str]] = field(default_factory=dict)  # {index: why each attempt so far was not kept}

    def again(self, rejected: dict[int, list[str]], seed: int) -> Batch:
        """The next attempt: the REJECTED images alone, so that it follows from the batch, with seeds of base SEED."""
        left = [prompt for prompt in self.prompts if prompt.index in rejected]
        seeds = [image_seed(seed, prompt.wnid, prompt.index, self.attempt + 1) for prompt in left]
        prompts = [replace(prompt, seed=own) for prompt, own in zip(left, seeds, strict=True)]
        return replace(self, prompts=prompts, attempt=self.attempt + 1, rejected=rejected)


# ===== which batches, and what became of them =====


class ProgressBar(tqdm):
    """Images done, and the denoising step of those at work. In a log file it prints twice a minute."""

    def __init__(self, total: int, name: str, done: int = 0):
        every_s = 1 if sys.stderr.isatty() else 30
        super().__init__(total=total, initial=done, unit="img", desc=name, mininterval=every_s)

    def show_step(self, step: int, steps: int) -> None:
        self.set_postfix_str(f"step {step}/{steps}", refresh=False)
        self.update(0)  # draws the bar when it is time to


class Session:
    """What one process does for a dataset: it claims classes, hands out their open batches and commits them."""

    def __init__(self, dataset: Dataset, folders: list[ClassFolder], recipe: Recipe, device: torch.device):
        self.dataset, self.folders, self.recipe = dataset, folders, recipe
        self.pending = {folder.id: sum(map(len, folder.open_batches())) for folder in folders}
        wanted = sum(folder.count for folder in folders)
        self.bar = ProgressBar(wanted, dataset.root.name, wanted - sum(self.pending.values()))
        self.started, self.images, self.draws = time.monotonic(), 0, 0
        self.meter, self.cost = Meter(device), NO_COST

    def open_batches(self, table: ClassTable, template: Templates) -> Iterator[Batch | None]:
        """The batches to draw, class by class, each class locked. None asks that all before it be finished: those that
        are left belong to other processes, for which it then waits."""
        rows, left = {row.wnid: row for row in table.rows}, self.folders
        while left:
            owned_by_others = []
            for folder in left:
                lock = ExitStack()
                try:
                    lock.enter_context(folder.lock())
                except AlreadyOwned:
                    owned_by_others.append(folder)
                    continue
                if open_dataset(self.dataset.root).images != self.dataset.images:  # its new lines would be cut off
                    raise UserError(
                        f"--images-per-class: another process lets {self.dataset.root} grow; take its number"
                    )
                folder.prepare()
                batches = folder.open_batches()
                self.bar.update(self.pending[folder.id] - sum(map(len, batches)))  # drawn by another meanwhile
                for number, batch in enumerate(batches, 1):
                    prompts = class_prompts(rows[folder.id], template, batch, self.recipe.seed, self.recipe.names)
                    yield Batch(folder, list(prompts), lock if number == len(batches) else None)
                if not batches:
                    lock.close()
            if owned_by_others == left:
                yield None
                self.bar.set_postfix_str("waiting for other processes")
                time.sleep(1)
            left = owned_by_others

    def commit(self, batch: Batch, entries: dict[int, dict]) -> None:
        """Record the images of BATCH, whose files are written, by their manifest ENTRIES."""
        batch.folder.commit([entries[index] for index in sorted(entries)])
        if batch.lock:
            batch.lock.close()
        self.cost = add_costs(self.cost, self.meter.read())
        self.images += len(entries)
        self.draws += sum(1 + entry["attempt"] for entry in entries.values())
        self.bar.update(len(entries))

    def summary(self, sampler: Sampler, flops_per_image: int | None) -> dict[str, Any]:
        """The line of sessions.jsonl: images, seconds, images/s, UNet forwards, device and so on."""
        self.bar.close()
        seconds = time.monotonic() - self.started
        return {
            "images": self.images,
            "seconds": round(seconds, 2),
            "images_per_s": round(self.images / seconds, 3),
            "unet_forwards": sampler.forwards_per_image * self.draws,
            "flops": None if flops_per_image is None else float(flops_per_image * self.draws),
            **{key: round(value) for key, value in self.cost.items() if key != "seconds"},
            "device": str(sampler.device),
            "attention": sampler.recipe.attention,
            "micro_batch": sampler.denoising.size,  # less than the batch size where memory ran out
        }


def overlapped(
    batches: Iterable[Batch | None],
    denoise: Callable[[Batch], Any],
    decode: Callable[[Any], tuple],
    write: Callable[..., Result],
    sampler: Sampler,
) -> Iterator[tuple[Batch, Result]]:
    """(batch, write(batch, *decode(denoise(batch)))) of BATCHES, in order.

    While one batch is denoised, the one before is decoded and written by another thread. On a CPU decoding stays in
    the main thread: it would take the UNet's cores. A None in BATCHES finishes all before it.
    """

    def decode_and_write(batch: Batch, latents, ready) -> Result:
        with sampler.beside(latents, ready):
            decoded = decode(latents)
        return write(batch, *decoded)

    begun: deque[tuple[Batch, Future]] = deque()
    with ThreadPoolExecutor(1) as hand:
        for batch in itertools.chain(batches, [None]):
            if batch is not None:
                latents = denoise(batch)
                if sampler.side_stream:
                    begun.append((batch, hand.submit(decode_and_write, batch, latents, sampler.ready())))
                else:
                    begun.append((batch, hand.submit(write, batch, *decode(latents))))
            while len(begun) > (batch is not None):
                done, result = begun.popleft()
                yield done, result.result()


# ===== files =====


def write_images(
    batch: Batch, recipe: Recipe, pixels: np.ndarray, faults: list[str], flags: list[bool | None], beside_unet: bool
) -> tuple[dict[int, dict], dict[int, list[str]]]:
    """({index: manifest entry} of the images written, {index: reasons so far} of those to be drawn again).

    PIXELS: uint8 (B, H, W, 3); FAULTS: what is wrong with each image, or ""; FLAGS: what the safety checker says;
    BESIDE_UNET: on the CPU that it denoises on, so that one thread must do.
    """
    rejected: dict[int, list[str]] = {}
    accepted = []
    for number, (prompt, fault, flag) in enumerate(zip(batch.prompts, faults, flags, strict=True)):
        reasons = batch.rejected.get(prompt.index, [])
        if not fault and flag and recipe.safety == "redraw" and batch.attempt + 1 < MAX_ATTEMPTS:
            fault = "safety"
        if not fault:
            accepted.append((number, reasons))
            continue
        rejected[prompt.index] = [*reasons, fault]
        if [reason != "safety" for reason in rejected[prompt.index][-MAX_BROKEN:]] == [True] * MAX_BROKEN:
            wider = {"fp16": "try --dtype bf16 or fp32", "bf16": "try --dtype fp32"}
            raise UserError(
                f"--model: image {prompt.index} of {prompt.wnid} is {fault} with {MAX_BROKEN} seeds in a row; the "
                f"model overflows in {recipe.dtype} ({wider.get(recipe.dtype or '', 'the widest format there is')}) "
                "or its weights are bad"
            )

    def save(chosen: tuple[int, list[str]]) -> tuple[int, dict]:
        number, reasons = chosen
        prompt = batch.prompts[number]
        data = encode_image(pixels[number], recipe.format, recipe.save_size)
        atomic_write(batch.folder.path(prompt.index), data)
        entry = {"id": prompt.wnid, "index": prompt.index, "prompt": prompt.text, "seed": prompt.seed}
        entry |= {"attempt": batch.attempt, "rejected": reasons, "safety": flags[number]}
        return prompt.index, entry | {"bytes": len(data), "sha256": sha256_bytes(data)}

    with ThreadPoolExecutor(1 if beside_unet else min(8, os.cpu_count() or 1)) as pool:  # encoders free Python's lock
        return dict(pool.map(save, accepted)), rejected


def encode_image(pixels: np.ndarray, kind: str, save_size: int | None) -> bytes:
    """The file for uint8 RGB (H, W, 3), its shorter side reduced to SAVE_SIZE with a Lanczos filter if given."""
    if save_size and save_size < min(pixels.shape[:2]):
        height, width = (round(side * save_size / min(pixels.shape[:2])) for side in pixels.shape[:2])
        pixels = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))
    if kind == "jpg":
        pixels = np.ascontiguousarray(pixels)
        return simplejpeg.encode_jpeg(pixels, QUALITY, "RGB", CHROMA, fastdct=False)
    buffer = io.BytesIO()
    options = {"png": {"compress_level": 6}, "webp": {"quality": QUALITY, "method": 4}}[kind]
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()
