"""Features of many images by a frozen model: decoded ahead of it, computed in fixed blocks, kept on disk.

A cache entry (feature_cache.py) is named by what determines its content: the checkpoint's hash, the images (path, size,
time), the transform and the number format. Blocks are written as they are ready, so a killed run continues; a lock that
the kernel frees makes a second run wait for the first one's features instead of computing them again.
"""

import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from utils.cli import UserError
from utils.evaluation import feature_cache
from utils.evaluation.checkpoints import Transform
from utils.evaluation.feature_cache import FeatureCache
from utils.evaluation.matching import Samples, fingerprint
from utils.images import BadImage, normalize
from utils.machine import full_memory_said
from utils.metrics import refuse_nan
from utils.model import count_flops
from utils.storage import sha256_json, write_json

FORMAT = 2  # raise it when the numbers change: old cache entries are then left alone
COMPILE_FROM = 1e7  # pixels (200 images of 224) from which tracing the model on a CPU, some seconds, pays
CPU_PIXELS = 8 * 224**2  # a forward pass on a CPU: activations of 8 images stay in its caches (measured: 2 to 64)


@dataclass(frozen=True)
class Share:
    """This process's part of the work on features: RANK of SIZE processes in a torch.distributed group, or alone."""

    rank: int = 0
    size: int = 1

    def agree(self, value: Any) -> Any:
        """Rank 0's VALUE, for all."""
        box = [value]
        if self.size > 1:
            torch.distributed.broadcast_object_list(box)
        return box[0]

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            torch.distributed.barrier()


class Extractor:
    """One model on one device, ready to turn image files into features."""

    def __init__(
        self, backbone, sha256: str, device, dtype, batch_size: int, workers: int, share: Share | None = None
    ) -> None:
        self.backbone, self.sha256 = backbone, sha256
        self.device, self.dtype = device, dtype
        self.batch_size, self.workers, self.share = batch_size, workers, share or Share()
        self._fused: dict[int, torch.nn.Module] = {}  # side in pixels -> the network fused for this CPU
        self._flops: dict[int, int] = {}  # side in pixels -> of an image
        self._computed: Counter[int] = Counter()  # side in pixels -> images, by all processes

    def __call__(
        self, samples: Samples, transform: Transform, cache: Path | None, what: str, stamps: np.ndarray | None = None
    ) -> np.ndarray:
        """(N, D) features in the order of SAMPLES: float32, or float16 where the model computes in 16 bits.

        With a folder CACHE a read-only memory map of a file in it; on processes other than rank 0 it is then empty.
        STAMPS: sizes and times of the images if they are known already (stat_files). WHAT: for the progress bar.
        UserError for an image that cannot be decoded.
        """
        if cache is None:
            starts = range(0, len(samples), feature_cache.BLOCK)
            return np.concatenate(list(self._blocks(samples, transform, what, starts)))
        facts = {
            "format": FORMAT,
            "checkpoint": self.sha256,
            "images": fingerprint(samples, stamps),
            "transform": asdict(transform),
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        name = sha256_json(facts)[:32]
        kept = FeatureCache(cache / name, len(samples))
        kept.entry.mkdir(parents=True, exist_ok=True)
        if self.share.rank > 0:
            missing = self.share.agree(None)
            self._fill(kept, missing, samples, transform, what)
            return np.empty((0, 0), dtype=np.float32)
        with kept.owned(what) as complete:
            there = kept.blocks(what) if complete is None else kept.starts
            missing = self.share.agree([start for start in kept.starts if start not in there])
            self._fill(kept, missing, samples, transform, what)
            self._computed[transform.crop] += sum(min(feature_cache.BLOCK, len(samples) - start) for start in missing)
            if complete is None:
                write_json(kept.entry / "key.json", facts | {"what": what, "count": len(samples)})
                complete = kept.join(what)
        return complete

    def _fill(self, cache: FeatureCache, missing: list[int], samples: Samples, transform: Transform, what: str) -> None:
        """Compute this process's share of the blocks that are MISSING, and wait for the others'."""
        mine = missing[self.share.rank :: self.share.size]
        for start, block in zip(mine, self._blocks(samples, transform, what, mine) if mine else (), strict=True):
            cache.write_block(start, block)
        self.share.wait()

    def flops(self) -> int:
        """Operations of the features computed so far; what was kept already cost none."""
        return sum(images * self._flops_per_image(side) for side, images in self._computed.items() if images)

    def _flops_per_image(self, side: int) -> int:
        if side not in self._flops:
            image = torch.zeros(1, 3, side, side, device=self.device)
            with torch.inference_mode():
                self._flops[side] = count_flops(lambda: self.backbone(image))
        return self._flops[side]

    def _blocks(self, samples: Samples, transform: Transform, what: str, starts: Sequence[int]) -> Iterator[np.ndarray]:
        """Features of the blocks that begin at STARTS, one after the other."""
        spans = [samples[start : start + feature_cache.BLOCK] for start in starts]
        # Batches do not cross blocks, so that a resumed run computes the same batches.
        sizes = [min(self.batch_size, len(span) - at) for span in spans for at in range(0, len(span), self.batch_size)]
        # One program for all blocks, whichever process computes them and whenever: their low bits are then the same.
        forward = self._prepare(len(samples), transform.crop)
        keep = np.float32 if self.dtype == torch.float32 else np.float16
        with tqdm(total=sum(sizes), desc=what, unit="img", leave=False, disable=None) as bar:
            batches = read_ahead([path for span in spans for path, _ in span], transform, sizes, self.workers)
            for span in spans:
                parts: list[torch.Tensor] = []
                done = 0
                while done < len(span):
                    pixels = next(batches)
                    parts.append(forward(pixels))
                    done += len(pixels)
                    bar.update(len(pixels))
                block = torch.cat(parts).cpu().numpy()  # the one wait for the GPU
                refuse_nan(block, f"{what}: the features")
                if not np.isfinite(block).all() or (keep == np.float16 and np.abs(block).max() > 65504):
                    raise UserError(f"{what}: the features overflow; check the checkpoint or use --dtype fp32")
                yield block.astype(keep)

    def _prepare(self, images: int, side: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """The forward pass: (B, side, side, 3) uint8 -> (B, D) float32 on the device, not waited for."""
        model, sixteen_bit = self.backbone.to(self.device), self.dtype != torch.float32
        at_once, on_gpu = self.batch_size, self.device.type == "cuda"
        if self.device.type == "cpu":
            at_once = max(1, CPU_PIXELS // side**2)
            if not sixteen_bit and images * side**2 >= COMPILE_FROM:
                model = self._fused[side] = self._fused.get(side) or optimize_for_cpu(model, side)
        if on_gpu or sixteen_bit:
            model = model.to(memory_format=torch.channels_last)
        full = f"--batch-size {self.batch_size}: the GPU is out of memory; try {max(1, at_once // 2)}"

        def forward(pixels: torch.Tensor) -> torch.Tensor:
            parts = []
            with torch.no_grad(), torch.autocast(self.device.type, dtype=self.dtype, enabled=sixteen_bit):
                for part in pixels.split(at_once):
                    if on_gpu:
                        part = part.pin_memory()
                    batch = part.to(self.device, non_blocking=on_gpu).permute(0, 3, 1, 2)  # (B, 3, H, W), channels last
                    with full_memory_said(full):
                        parts.append(model(normalize(batch)).flatten(1).float())
            return torch.cat(parts)

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
