"""Top-1 and top-5 on real images after an epoch, every image counted once, whatever the number of processes."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from utils.cli import UserError
from utils.images import BadImage, load_eval_image, normalize
from utils.metrics import topk_correct
from utils.training.distributed import ranks, sum_counts
from utils.training.image_sets import ImageSet
from utils.training.loader import Loader, make_loader
from utils.training.stop_signals import StopSignals

BATCH = 256  # images of a forward pass


class EvalBatches:
    """Numbers of images -> {"images": uint8 (B, 3, crop, crop), "labels": (B,)}; a damaged image is a UserError."""

    def __init__(self, images: ImageSet, resize: int, crop: int):
        self.images, self.resize, self.crop = images, resize, crop

    def __getitem__(self, rows: range) -> dict:
        pixels = torch.empty(len(rows), 3, self.crop, self.crop, dtype=torch.uint8)
        for slot, index in zip(pixels, rows, strict=True):
            try:
                image = load_eval_image(self.images.read(index), self.resize, self.crop, name=self.images.name(index))
            except BadImage as error:
                raise UserError(f"damaged validation image {error}; repair or remove it") from None
            slot.copy_(image)
        return {"images": pixels, "labels": torch.from_numpy(self.images.labels[rows.start : rows.stop : rows.step])}


@dataclass(frozen=True)
class Validation:
    """The validation images, of which this process reads its share."""

    count: int  # images, over all processes
    batches: Loader

    def scores(self, model: nn.Module, device: torch.device, dtype: torch.dtype, stop: StopSignals) -> dict:
        """{"val_top1", "val_top5": percent, "val_n"} of MODEL, which is left in training mode."""
        counts: dict[str, float] = {"top1": 0, "top5": 0, "n": 0}
        model.eval()
        with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            for batch in self.batches:
                stop.check(device)
                if not len(batch["labels"]):
                    continue
                pixels = batch["images"].to(device, non_blocking=True)
                logits = model(normalize(pixels)).float().cpu().numpy()
                hits = topk_correct(logits, batch["labels"].numpy(), (1, 5))
                for name, count in (("top1", hits[1]), ("top5", hits[5]), ("n", len(pixels))):
                    counts[name] += count
        model.train()
        total = sum_counts(counts, device)
        if total["n"] != self.count:
            raise RuntimeError(f"validation saw {total['n']:.0f} images of {self.count}")
        return {f"val_{name}": 100 * total[name] / total["n"] for name in ("top1", "top5")} | {"val_n": self.count}


@contextmanager
def validation_on(images: ImageSet, recipe: Mapping[str, Any], workers: int, pin: bool) -> Iterator[Validation]:
    """Yield the Validation on IMAGES; its WORKERS start at the first use and end with the block."""
    processes = ranks()
    share = range(processes.rank, len(images), processes.world_size)  # no padding: shares may differ by one image
    # But as many batches on each process, if need be an empty last one: all ask together whether to stop.
    starts = range(0, math.ceil(len(images) / processes.world_size), BATCH)
    batches = EvalBatches(images, recipe["val_resize"], recipe["val_crop"])
    with make_loader(batches, [share[start : start + BATCH] for start in starts], workers, pin) as loader:
        yield Validation(len(images), loader)
