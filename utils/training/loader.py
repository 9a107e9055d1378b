"""From image files to batches of uint8 crops, in worker processes; everything after the resize happens on the device.

What a sample looks like depends on (seed, epoch, sample) alone: not on workers, processes, or on where a run was
resumed. A batch is asked for by its place in the epoch's order, so that skipping is resuming.
"""

import math
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data._utils import signal_handling
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from utils.cli import UserError
from utils.images import BadImage, decode_rgb, image_size
from utils.training.image_sets import ImageSet
from utils.training.random_numbers import permutation, uniforms

ASPECT = (3 / 4, 4 / 3)  # aspect ratios of a random crop: torchvision's RandomResizedCrop defaults
CROP_ATTEMPTS = 10  # then the central crop, as torchvision does
DRAWS_PER_CROP = 4 * CROP_ATTEMPTS  # area, aspect, top, left of each attempt
MOST_WORKERS = 16  # loader processes of a GPU: at some 300 img/s each, more than a GPU trains on
WORKER_EXIT_SECONDS = 5  # for a killed one to be gone
KERNELS = {"bicubic": torch._C._nn._upsample_bicubic2d_aa, "bilinear": torch._C._nn._upsample_bilinear2d_aa}
SUBSTITUTES = 1000  # images tried in a row in place of a damaged one


@dataclass(frozen=True)
class CropSpec:
    """`count` random resized crops of `size` x `size` pixels that each cover `scale` (low, high) of the area."""

    size: int
    count: int
    scale: tuple[float, float]
    interpolation: str = "bicubic"


def crop_specs(recipe: Mapping[str, Any], epoch: int) -> list[CropSpec]:
    """The recipe's crops in EPOCH, one entry a size: global ones first, then local ones if it has any."""
    how = recipe["interpolation"]
    crops = [CropSpec(global_size(recipe, epoch), recipe["global_count"], recipe["global_scale"], how)]
    if recipe["local_count"]:
        crops.append(CropSpec(recipe["local_size"], recipe["local_count"], recipe["local_scale"], how))
    return crops


def global_size(recipe: Mapping[str, Any], epoch: int) -> int:
    """Pixels of the global crops in EPOCH, counted from 0: first_size, then half way, then global_size.

    Progressive resizing (Howard, DAWNBench 2018) as FFCV does it for ImageNet: rounded to few sizes, since each costs a
    search for kernels, or a compilation. A function of the epoch: nothing of it has to be saved.
    """
    last, first = recipe["global_size"], recipe["first_size"] or recipe["global_size"]
    start, end = recipe["growth"]
    progress = min(1.0, max(0.0, (epoch / recipe["epochs"] - start) / max(end - start, 1e-9)))
    return round(first + (last - first) * round(2 * progress) / 2)


@lru_cache(maxsize=1)
def epoch_order(sizes: tuple[int, ...], weights: tuple[float, ...], seed: int, epoch: int) -> np.ndarray:
    """Order of epoch EPOCH over several image sets of SIZES images, numbered one after the other; the last is kept.

    (2, N) int64: the samples, and how often each was drawn before.

    An epoch is as long as the sets together. Each set fills its weight's share of it by walking through its own
    endless series of shuffles, so its images are used equally often. With one set: a plain shuffle, passes == epoch.
    """
    total, counts = sum(sizes), share_out(sum(sizes), weights)
    parts, offset = [], 0
    for stream, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        start, stop = epoch * count, (epoch + 1) * count  # places in the series of shuffles
        for round_ in range(start // size, -(-stop // size)):
            shuffle = permutation(size, seed, round_, stream)
            part = shuffle[max(0, start - round_ * size) : max(0, stop - round_ * size)]
            parts.append(np.stack([part + offset, np.full(len(part), round_)]))
        offset += size
    order = np.concatenate(parts, axis=1)
    return order if len(sizes) == 1 else order[:, permutation(total, seed, epoch, stream=len(sizes))]


def share_out(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to WEIGHTS that add up to TOTAL (largest remainders)."""
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [math.floor(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


class Request(NamedTuple):
    """One micro-batch of one process: rows start..stop of an epoch's order."""

    epoch: int
    start: int
    stop: int


class CropBatches:
    """Request -> {"crops": [(B, n, s, s, 3) uint8, ...], "labels", "samples", "passes": (B,), "bad": [message]}.

    CROPS(epoch) are those of a sample in that epoch.
    """

    def __init__(
        self, sets: Sequence[ImageSet], weights: Sequence[float], crops: Callable[[int], Sequence[CropSpec]], seed: int
    ):
        self.sets, self.sizes, self.weights = list(sets), tuple(map(len, sets)), tuple(weights)
        self.crops, self.seed = crops, seed
        self.starts = np.cumsum([0, *self.sizes])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, request: Request) -> dict:
        order = epoch_order(self.sizes, self.weights, self.seed, request.epoch)
        samples, passes = order[:, request.start : request.stop]
        specs = self.crops(request.epoch)
        draws = uniforms(DRAWS_PER_CROP * sum(c.count for c in specs), "crops", self.seed, passes, samples)
        crops = [torch.empty(len(samples), c.count, c.size, c.size, 3, dtype=torch.uint8) for c in specs]
        labels = torch.empty(len(samples), dtype=torch.int64)
        bad: list[str] = []
        for row, sample in enumerate(samples):
            labels[row] = self._fill_row(int(sample), specs, draws[row], [batch[row] for batch in crops], bad)
        return {"crops": crops, "labels": labels, "samples": samples, "passes": passes, "bad": bad}

    def _fill_row(
        self, sample: int, specs: Sequence[CropSpec], draws: np.ndarray, out: list[torch.Tensor], bad: list[str]
    ) -> int:
        """Write one sample's crops into OUT and return its label; a damaged image is replaced by the next good one."""
        for step in range(SUBSTITUTES):
            place = (sample + step) % len(self)
            which = int(np.searchsorted(self.starts, place, side="right")) - 1
            images, index = self.sets[which], place - int(self.starts[which])
            try:
                random_crops(images.read_verified(index), specs, draws, out, images.name(index))
                return int(images.labels[index])
            except BadImage as error:
                bad.append(str(error))
        raise UserError(f"--data: {SUBSTITUTES} damaged images in a row, the last is {bad[-1]}")


def random_crops(
    data: bytes, specs: Sequence[CropSpec], draws: np.ndarray, out: Sequence[torch.Tensor], name: str = "image"
) -> None:
    """Decode one image and write its random resized crops into OUT[i] (n, s, s, 3), uint8.

    draws: DRAWS_PER_CROP uniform numbers a crop. A JPEG is decoded at 1/2, 1/4 or 1/8 size when every crop still
    comes out at least as large as it is asked for. Raises BadImage, with NAME.
    """
    width, height = image_size(data, name)
    rows = iter(draws.reshape(-1, CROP_ATTEMPTS, 4).tolist())
    boxes = [[crop_box(width, height, spec.scale, next(rows)) for _ in range(spec.count)] for spec in specs]
    enlargement = min(min(box[2:]) / spec.size for spec, of_spec in zip(specs, boxes, strict=True) for box in of_spec)
    divisor = next(d for d in (8, 4, 2, 1) if d <= max(1, enlargement))
    image = torch.from_numpy(decode_rgb(data, -(-height // divisor), -(-width // divisor), name))  # (H, W, 3)
    shrunk_y, shrunk_x = image.shape[0] / height, image.shape[1] / width
    planes = image.permute(2, 0, 1)[None]  # a channels_last view, for which torch has a vectorised uint8 kernel
    for spec, of_spec, slots in zip(specs, boxes, out, strict=True):
        for (top, left, high, wide), slot in zip(of_spec, slots.permute(0, 3, 1, 2).split(1), strict=True):
            y, x = round(top * shrunk_y), round(left * shrunk_x)
            y_end, x_end = round((top + high) * shrunk_y), round((left + wide) * shrunk_x)
            resize(planes[:, :, y:y_end, x:x_end], slot, spec.interpolation)


def crop_box(width: int, height: int, scale: tuple[float, float], draws: list) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random resized crop: torchvision's rule, from (10, 4) uniform draws."""
    low, high = math.log(ASPECT[0]), math.log(ASPECT[1])
    for area_draw, aspect_draw, top_draw, left_draw in draws:
        area = width * height * (scale[0] + (scale[1] - scale[0]) * area_draw)
        aspect = math.exp(low + (high - low) * aspect_draw)
        wide, tall = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < wide <= width and 0 < tall <= height:
            return int(top_draw * (height - tall + 1)), int(left_draw * (width - wide + 1)), tall, wide
    aspect = min(max(width / height, ASPECT[0]), ASPECT[1])
    wide, tall = min(width, round(height * aspect)), min(height, round(width / aspect))
    return (height - tall) // 2, (width - wide) // 2, tall, wide


def resize(planes: torch.Tensor, out: torch.Tensor, interpolation: str) -> None:
    """(1, 3, h, w) uint8 into OUT (1, 3, s, s), antialiased: Pillow's filter of that name within two grey levels.

    Both are channels_last. At hard edges of black and white bicubic may differ by thirty: between its two passes
    overshoot is clipped, and Pillow takes the vertical pass of some tall images first.
    """
    # What functional.interpolate calls, written where it belongs: a copy and its checks are two fifths of the time.
    KERNELS[interpolation](planes, out.shape[2:], False, None, out=out)  # type: ignore[call-arg]


class Loader(torch.utils.data.DataLoader):
    """Batches prepared ahead of their reader by worker processes, which serve every pass over it."""

    def __iter__(self) -> Iterator[dict]:  # type: ignore[override]
        """One pass; the workers start with the first."""
        before = {*multiprocessing.active_children()}
        try:
            items = super().__iter__()
        except OSError as error:
            for started in {*multiprocessing.active_children()} - before:  # it waits for work that will never come
                _end_process(started)
            fault = f"a loader process cannot be started ({error.strerror})"
            remedy = "choose fewer, or allow more processes and memory"
            raise UserError(f"--workers {self.num_workers}: {fault}; {remedy}") from None
        try:
            yield from items
        except UserError as error:  # from a worker it comes with its traceback for a message
            raise UserError(str(error).rpartition("UserError: ")[2].strip()) from None

    def close(self) -> None:
        """End the workers, whatever they are doing: they only read, and one may be blocked by a disk that is gone."""
        items = self._iterator
        if isinstance(items, _MultiProcessingDataLoaderIter):
            signal_handling._remove_worker_pids(id(items))  # torch would report each as a failure
            items._worker_pids_set, items._shutdown = False, True
            if hasattr(items, "_pin_memory_thread_done_event"):
                items._pin_memory_thread_done_event.set()
            for worker in items._workers:
                _end_process(worker)


def _end_process(process: multiprocessing.process.BaseProcess) -> None:
    process.kill()
    process.join(WORKER_EXIT_SECONDS)
    # One that the kernel does not end, in the middle of a read from a dead server, is not waited for at exit either.
    multiprocessing.process._children.discard(process)  # type: ignore[attr-defined]


@contextmanager
def make_loader(batches: Any, wanted: Iterable, workers: int, pin: bool) -> Iterator[Loader]:
    """Yield a loader of BATCHES[item] for the items WANTED in order, each prepared by one of WORKERS processes.

    WANTED is gone through once a pass; a generator allows one. The workers end with the block: later, an error's
    traceback would keep them alive until Python exits, which sends them SIGTERM, which they ignore. UserError for a
    batch's own UserError, and for a worker that dies or cannot start.
    """
    loader = Loader(
        batches,
        batch_size=None,
        sampler=wanted,
        num_workers=workers,
        pin_memory=pin,
        prefetch_factor=2 if workers else None,
        persistent_workers=workers > 0,
        worker_init_fn=_prepare_worker,
        generator=torch.Generator(),  # torch draws a seed for its workers: not from the generator that dropout uses
    )
    try:
        yield loader
    except RuntimeError as error:  # from the wait for a batch, or wherever SIGCHLD found the main thread
        if not re.search("DataLoader worker .*(killed|exited)|shared memory", str(error)):
            raise
        why, remedy = " ".join(str(error).split()), "memory or /dev/shm may be too small: choose fewer, or 0"
        raise UserError(f"--workers {workers}: a loader process died ({why}); {remedy}") from None
    finally:
        loader.close()


def worker_count(asked: int | None, device: torch.device) -> int:
    """Loader processes: as asked, else this process's share of the cores; on the CPU one, the model needs the rest."""
    if asked is not None or device.type == "cpu":
        return 1 if asked is None else asked
    return max(1, min(MOST_WORKERS, len(os.sched_getaffinity(0)) - 1))  # distributed.take_own_cores


def _prepare_worker(_worker: int) -> None:
    # A scheduler signals the whole process group. The parent saves and leaves; workers follow when it is gone.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # Python's thread that hands tensors over would print a traceback when the parent leaves; errors go by the queue.
    sys.excepthook = lambda *_: None
