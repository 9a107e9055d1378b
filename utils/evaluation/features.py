"""Features of many images by a frozen model: decoded ahead of it, computed in fixed blocks, kept on disk.

A cache entry (feature_cache.py) is named by what determines its content: the checkpoint's hash, the images (path, size,
time), the transform and the number format. Blocks are written as they are ready, so a killed run continues; a lock that
the kernel frees makes a second run wait for the first one's features instead of computing them again.
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from utils.cli import UserError
from utils.evaluation import feature_cache
from utils.evaluation.checkpoints import Transform
from utils.evaluation.feature_cache import FeatureCache
from utils.evaluation.matching import Samples, fingerprint
from utils.images import BadImage, normalize
from utils.metrics import refuse_nan
from utils.storage import AlreadyOwned, owner_lock, write_json

FORMAT = 2  # raise it when the numbers change: old cache entries are then left alone
COMPILE_FROM = 1e7  # pixels (200 images of 224) from which tracing the model on a CPU, some seconds, pays
CPU_PIXELS = 8 * 224**2  # a forward pass on a CPU: activations of 8 images stay in its caches (measured: 2 to 64)


class Extractor:
    """One model on one device, ready to turn image files into features."""

    def __init__(self, backbone, sha256: str, device, dtype, batch_size: int, workers: int) -> None:
        self.backbone, self.sha256 = backbone, sha256
        self.device, self.dtype = device, dtype
        self.batch_size, self.workers = batch_size, workers
        self._fused: dict[int, torch.nn.Module] = {}  # side in pixels -> the network fused for this CPU

    def __call__(
        self, samples: Samples, transform: Transform, cache: Path | None, what: str, stamps: np.ndarray | None = None
    ) -> np.ndarray:
        """(N, D) features in the order of SAMPLES: float32, or float16 where the model computes in 16 bits.

        With a CACHE, a folder, the result is a read-only memory map. STAMPS: sizes and times of the images if they are
        known already (matching.stat_images). WHAT: for the progress bar. UserError for an image that cannot be decoded.
        """
        if cache is None:
            return np.concatenate(
                list(self._blocks(samples, transform, what, range(0, len(samples), feature_cache.BLOCK)))
            )
        facts = {
            "format": FORMAT,
            "checkpoint": self.sha256,
            "images": fingerprint(samples, stamps),
            "transform": asdict(transform),
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
        return self._cached(cache / name, facts, samples, transform, what)

    def _cached(self, entry: Path, facts: dict, samples: Samples, transform: Transform, what: str) -> np.ndarray:
        cache = FeatureCache(entry, len(samples))
        entry.mkdir(parents=True, exist_ok=True)
        waited = False
        while True:
            if (kept := cache.read()) is not None:
                return kept
            try:
                with owner_lock(entry / "lock"):
                    self._fill(cache, facts, samples, transform, what)
            except AlreadyOwned:
                if not waited:
                    print(f"{what}: another run is computing these features; waiting for it", flush=True)
                waited = True
                time.sleep(0.5)

    def _fill(self, cache: FeatureCache, facts: dict, samples: Samples, transform: Transform, what: str) -> None:
        """Compute the blocks that are missing and join them. The caller owns the entry."""
        if cache.read() is not None:  # another run finished it meanwhile
            return
        there = cache.blocks(what)
        write_json(cache.entry / "key.json", facts | {"what": what, "count": len(samples)})
        missing = [start for start in cache.starts if start not in there]
        for start, block in zip(missing, self._blocks(samples, transform, what, missing), strict=True):
            cache.write_block(start, block)
        cache.join(what)

    def _blocks(self, samples: Samples, transform: Transform, what: str, starts: Sequence[int]) -> Iterator[np.ndarray]:
        """Features of the blocks that begin at STARTS, one after the other."""
        spans = [samples[start : start + feature_cache.BLOCK] for start in starts]
        total = sum(map(len, spans))
        keep = np.float32 if self.dtype == torch.float32 else np.float16
        with tqdm(total=total, desc=what, unit="img", leave=False, disable=None) as bar:
            batches = read_ahead(
                [path for span in spans for path, _ in span], transform, self._cut(spans), self.workers
            )
            forward = self._prepare(total, transform.crop)
            for span in spans:
                parts: list[np.ndarray] = []
                done = 0
                while done < len(span):
                    pixels = next(batches)
                    parts.append(forward(pixels))
                    done += len(pixels)
                    bar.update(len(pixels))
                block = np.concatenate(parts)
                refuse_nan(block, f"{what}: the features")
                if not np.isfinite(block).all() or (keep == np.float16 and np.abs(block).max() > 65504):
                    raise UserError(f"{what}: the features overflow; check the checkpoint or use --dtype fp32")
                yield block.astype(keep)

    def _cut(self, spans: Sequence[Samples]) -> list[int]:
        """Batch sizes: batches do not cross blocks, so that a resumed run computes the same batches."""
        return [min(self.batch_size, len(span) - at) for span in spans for at in range(0, len(span), self.batch_size)]

    def _prepare(self, images: int, side: int) -> Callable[[torch.Tensor], np.ndarray]:
        """The forward pass: (B, side, side, 3) uint8 -> (B, D) float32 numpy."""
        model, sixteen_bit = self.backbone.to(self.device), self.dtype != torch.float32
        at_once = self.batch_size
        if self.device.type == "cpu":
            at_once = max(1, CPU_PIXELS // side**2)
            if not sixteen_bit and images * side**2 >= COMPILE_FROM:
                model = self._fused[side] = self._fused.get(side) or optimize_for_cpu(model, side)
        if self.device.type == "cuda" or sixteen_bit:
            model = model.to(memory_format=torch.channels_last)

        def forward(pixels: torch.Tensor) -> np.ndarray:
            parts = []
            with torch.no_grad(), torch.autocast(self.device.type, dtype=self.dtype, enabled=sixteen_bit):
                for part in pixels.split(at_once):
                    batch = part.to(self.device).permute(0, 3, 1, 2)  # (B, 3, H, W), channels last in memory
                    try:
                        parts.append(model(normalize(batch)).flatten(1).float().cpu().numpy())
                    except torch.OutOfMemoryError:
                        raise UserError(
                            f"--batch-size {self.batch_size}: the GPU is out of memory; try {max(1, at_once // 2)}"
                        ) from None
            return np.concatenate(parts)

        return forward


def optimize_for_cpu(model: torch.nn.Module, side: int) -> torch.nn.Module:
    """Batch norm folded into convolutions, ReLU and the residual sum fused into them, weights laid out for oneDNN.

    The result is compared with the plain model; where tracing a model would change it, the model stays as it is.
    """
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0))
    images = images.to(memory_format=torch.channels_last)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns of what the comparison below settles
        wanted = model(images)
        try:
            traced = torch.jit.optimize_for_inference(torch.jit.trace(model, images[:2], check_trace=False))
            if torch.allclose(traced(images), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max())):
                return traced
        except (RuntimeError, torch.jit.TracingCheckError):
            pass  # a model with control flow, or an operator that tracing does not know
    return model


def read_ahead(
    paths: Sequence[str], transform: Transform, batches: Sequence[int], workers: int
) -> Iterator[torch.Tensor]:
    """Decoded batches (B, crop, crop, 3) uint8 in order, a few batches ahead of the reader, on threads.

    Threads suffice: decoding and resizing release Python's lock. UserError names an image that cannot be decoded.
    """
    ahead = 2 * workers + 2 * max(batches, default=0)  # images in flight: bounds the memory
    queue: deque[Future[torch.Tensor]] = deque()
    upcoming = iter(paths)
    pool = ThreadPoolExecutor(workers)
    try:
        for count in batches:
            while len(queue) < ahead and (path := next(upcoming, None)) is not None:
                queue.append(pool.submit(transform.read, path))
            yield torch.stack([queue.popleft().result() for _ in range(count)])
    except BadImage as error:
        raise UserError(
            f"damaged image {error}; restore it from the dataset's archive (evaluate.py --allow-truncated reads "
            "JPEGs that end early as far as they go)"
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
