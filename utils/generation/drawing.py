"""From open batches to files: claim a class, denoise a batch; judge, encode and write it beside the next one.

The order of events makes a kill harmless: files of a batch (each renamed into place), then its manifest lines in one
synced write. What is drawn follows from the batch alone, redraws included, so a batch drawn twice gives the same bytes.
"""

from __future__ import annotations

import io
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image
from tqdm import tqdm

from utils.cli import UserError
from utils.dataset.folder import ClassFolder, Dataset
from utils.generation.prompts import ClassRow, ClassTable, Prompt, Template, class_prompts, image_seed
from utils.storage import AlreadyOwned, atomic_write, sha256_bytes

QUALITY = 95  # of JPEG and WebP; not in paper: our choice
CHROMA = "420"  # colour at half resolution, as in most of ImageNet's own files: a quarter fewer bytes, faster to decode
MAX_ATTEMPTS = 10  # --safety redraw: then the last draw is kept, flagged and counted
MAX_BROKEN = 3  # black or non-finite draws of one image in a row before the model is blamed


@dataclass
class Batch:
    """Images of one class that are denoised together, and the lock to let go after the class's last batch."""

    folder: ClassFolder
    prompts: list[Prompt]
    lock: ExitStack | None


def draw(dataset: Dataset, folders: list[ClassFolder], sampler, table: ClassTable, template: Template) -> dict:
    """Draw every open batch of FOLDERS; return {"images", "seconds", "images_per_s", "unet_forwards"} of this run."""
    rows = {row.wnid: row for row in table.rows}
    pending = {folder.id: sum(map(len, folder.open_batches())) for folder in folders}
    wanted = sum(folder.count for folder in folders)
    started, drawn, forwards = time.monotonic(), 0, 0
    bar = tqdm(total=wanted, initial=wanted - sum(pending.values()), unit="img", desc=dataset.root.name,
               mininterval=1 if sys.stderr.isatty() else 30)  # fmt: skip
    studio = Studio(dataset.recipe, sampler, bar)

    with bar:
        for batch, entries in studio.draw(claim_batches(folders, rows, template, dataset.recipe, pending, bar)):
            if batch is None:  # other processes draw all classes that are left
                bar.set_postfix_str("waiting for other processes")
                time.sleep(1)
                continue
            batch.folder.commit([entries[index] for index in sorted(entries)])
            if batch.lock:
                batch.lock.close()
            drawn += len(entries)
            forwards += sampler.forwards_per_image * sum(1 + entry["attempt"] for entry in entries.values())
            bar.update(len(entries))
    seconds = time.monotonic() - started
    return {
        "images": drawn,
        "seconds": round(seconds, 2),
        "images_per_s": round(drawn / seconds, 3),
        "unet_forwards": forwards,
    }


def claim_batches(
    folders: list[ClassFolder], rows: dict[str, ClassRow], template: Template, recipe: dict, pending: dict, bar
) -> Iterator[Batch | None]:
    """The open batches of FOLDERS, class by class, each class locked; None when all that are left belong to others."""
    left, refused = deque(folders), 0
    while left:
        folder = left.popleft()
        lock = ExitStack()
        try:
            lock.enter_context(folder.lock())
        except AlreadyOwned:
            left.append(folder)
            refused += 1
            if refused >= len(left):
                refused = 0
                yield None
            continue
        refused = 0
        folder.prepare()
        batches = folder.open_batches()
        bar.update(pending[folder.id] - sum(map(len, batches)))  # drawn by another process meanwhile
        prompts = class_prompts(rows[folder.id], template, folder.count, recipe["seed"], recipe["names"])
        for number, batch in enumerate(batches, 1):
            chosen: list[Prompt] = []
            while len(chosen) < len(batch):  # one walk over the class's prompts, skipping those of done batches
                prompt = next(prompts)
                if prompt.index in batch:
                    chosen.append(prompt)
            yield Batch(folder, chosen, lock if number == len(batches) else None)
        if not batches:
            lock.close()


class Studio:
    """Turns batches into files: denoise, decode, judge, encode, write, and again for what was rejected.

    One batch is denoised while the one before is decoded, checked, encoded and written by another thread. On a CPU
    decoding stays in the main thread: it would take the UNet's cores.
    """

    def __init__(self, recipe: dict, sampler, bar):
        self.recipe, self.sampler, self.bar = recipe, sampler, bar
        on_cpu = sampler.device.type == "cpu"
        self.decode_beside = sampler.device.type == "cuda"
        self.encoders = ThreadPoolExecutor(1 if on_cpu else min(8, os.cpu_count() or 1))

    def draw(self, batches: Iterable[Batch | None]) -> Iterator[tuple[Batch | None, dict[int, dict]]]:
        """(batch, {index: manifest entry}) of BATCHES, in order; a None comes out when all before it are written."""
        begun: deque[tuple[Batch, Future]] = deque()
        with ThreadPoolExecutor(1) as hand:
            for batch in batches:
                if batch is not None:
                    begun.append((batch, self.start(batch, hand)))
                while len(begun) > (1 if batch else 0):
                    yield self.finish(*begun.popleft())
                if batch is None:
                    yield None, {}
            while begun:
                yield self.finish(*begun.popleft())

    def start(self, batch: Batch, hand: ThreadPoolExecutor) -> Future:
        """Denoise BATCH here and have the rest done by HAND. Result: (manifest entries, rejected), see write()."""
        latents, ready = self.denoise(batch.prompts, 0), self.sampler.ready()
        if self.decode_beside:
            return hand.submit(lambda: self.write(batch, batch.prompts, 0, {}, *self.develop(latents, ready)))
        return hand.submit(self.write, batch, batch.prompts, 0, {}, *self.develop(latents))

    def finish(self, batch: Batch, drawing: Future) -> tuple[Batch, dict[int, dict]]:
        """BATCH with all its entries: the images rejected at one attempt make up the batch of the next.

        So the composition of every attempt follows from the batch alone.
        """
        entries, rejected = drawing.result()
        attempt = 0
        while rejected:
            attempt += 1
            prompts = [prompt for prompt in batch.prompts if prompt.index in rejected]
            pixels = self.develop(self.denoise(prompts, attempt))
            more, rejected = self.write(batch, prompts, attempt, rejected, *pixels)
            entries |= more
        return batch, entries

    def denoise(self, prompts: list[Prompt], attempt: int):
        seeds = [self.seed(prompt, attempt) for prompt in prompts]
        return self.sampler.denoise(seeds, [prompt.text for prompt in prompts], self.show_step)

    def show_step(self, step: int) -> None:
        self.bar.set_postfix_str(f"step {step}/{len(self.sampler.guided)}", refresh=False)
        self.bar.update(0)  # draws the bar when it is time to

    def develop(self, latents, ready=None):
        """(uint8 (B, H, W, 3), [what is wrong with it or ""], [safety flag or None])"""
        with self.sampler.beside(latents, ready):
            pixels, faults = self.sampler.decode(latents)
            checked = self.recipe["safety"] != "off"
            return pixels.numpy(), faults, self.sampler.flagged(pixels) if checked else [None] * len(pixels)

    def write(
        self, batch: Batch, prompts: list[Prompt], attempt: int, before: dict[int, list[str]], pixels, faults, flags
    ) -> tuple[dict[int, dict], dict[int, list[str]]]:
        """({index: manifest entry} of the images written, {index: reasons so far} of those to be drawn again)."""
        rejected, accepted = {}, []
        for number, (prompt, fault, flag) in enumerate(zip(prompts, faults, flags, strict=True)):
            reasons = before.get(prompt.index, [])
            if not fault and flag and self.recipe["safety"] == "redraw" and attempt + 1 < MAX_ATTEMPTS:
                fault = "safety"
            if not fault:
                accepted.append((number, reasons))
                continue
            rejected[prompt.index] = [*reasons, fault]
            if [reason != "safety" for reason in rejected[prompt.index][-MAX_BROKEN:]] == [True] * MAX_BROKEN:
                raise UserError(
                    f"--model: image {prompt.index} of {prompt.wnid} is {fault} with {MAX_BROKEN} seeds in a row; "
                    f"the model overflows in {self.recipe['dtype']} (try --dtype fp32 or bf16) or its weights are bad"
                )

        def save(chosen: tuple[int, list[str]]) -> tuple[int, dict]:
            number, reasons = chosen
            prompt = prompts[number]
            data = encode_image(pixels[number], self.recipe["format"], self.recipe["save_size"])
            atomic_write(batch.folder.path(prompt.index), data)
            return prompt.index, {
                "id": prompt.wnid,
                "index": prompt.index,
                "prompt": prompt.text,
                "seed": self.seed(prompt, attempt),
                "attempt": attempt,
                "rejected": reasons,
                "safety": flags[number],
                "bytes": len(data),
                "sha256": sha256_bytes(data),
            }

        return dict(self.encoders.map(save, accepted)), rejected

    def seed(self, prompt: Prompt, attempt: int) -> int:
        return image_seed(self.recipe["seed"], prompt.wnid, prompt.index, attempt)


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
