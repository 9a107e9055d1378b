"""Speed of train.py's parts: the loader, the training step, the wait for data, and augmentation on the device."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as train.py

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageFilter
from torch.nn import functional
from torchvision import models, transforms

from benchmarks.bounds import bound, peak_bytes, profile_if_asked
from models.export_fashion import digits, write_set
from utils.model import count_flops

ROOT = Path(__file__).resolve().parent.parent
SIDE = 512  # pixels of a generated image
ROUNDS = 5  # of ours and the peer in turn; medians are compared
STEP_IMAGES = (4, 8, 16)  # images of a micro-batch, nine crops each
CURVE_STEPS, CURVE_TOLERANCE = 50, 0.1  # nats: mean distance of bf16 and fp32 losses, which fall from 2.4 to 0.2


def write_images(folder: Path, count: int, classes: int = 2, side: int = SIDE) -> None:
    """JPEGs with the detail of a photograph: quality 90, 4:2:0, about 80 kB at 512 pixels."""
    rng = np.random.default_rng(0)
    for index in range(count):
        pixels = np.zeros((side, side, 3), dtype=np.float32)
        for cells, weight in ((4, 0.5), (16, 0.3), (128, 0.2)):  # shapes, parts, texture
            layer = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
            pixels += weight * np.asarray(layer.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32)
        path = folder / f"n{index % classes:08d}" / f"n{index % classes:08d}_{index:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(simplejpeg.encode_jpeg(pixels.astype(np.uint8), quality=90, colorsubsampling="420"))


def in_turns(ours: Callable[[], None], peer: Callable[[], None], clock=time.perf_counter) -> tuple[float, float]:
    """Median seconds of both over ROUNDS, after one warm-up each."""
    profile_if_asked(ours)
    seconds: dict[Callable, list[float]] = {ours: [], peer: []}
    for number in range(ROUNDS + 1):
        for function in (ours, peer):
            start = clock()
            function()
            if number:
                seconds[function].append(clock() - start)
    return statistics.median(seconds[ours]), statistics.median(seconds[peer])


# ===== loader_vs_dino =====


class RandomBlur:
    """Gaussian blur of a random radius with Pillow, as DINO's and t-ReX's pipelines do."""

    def __init__(self, p: float):
        self.p = p

    def __call__(self, image: Image.Image) -> Image.Image:
        if torch.rand(1).item() >= self.p:
            return image
        return image.filter(ImageFilter.GaussianBlur(radius=torch.empty(1).uniform_(0.1, 2.0).item()))


def dino_transform(size: int, scale: tuple[float, float], blur: float, solarize: float) -> transforms.Compose:
    jitter = transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=scale, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([jitter], p=0.8),
            transforms.RandomGrayscale(0.2),
            RandomBlur(blur),
            transforms.RandomSolarize(128, solarize),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )


def loader_vs_dino() -> dict:
    from utils.training.image_sets import FolderImages
    from utils.training.loader import CropBatches, CropSpec, Request

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), 32)
        paths = sorted(Path(folder).rglob("*.jpg"))
        size = statistics.mean(path.stat().st_size for path in paths) / 1000
        crops = [CropSpec(224, 1, (0.25, 1.0)), CropSpec(96, 8, (0.05, 0.25))]
        batches = CropBatches([FolderImages(Path(folder))], [1.0], lambda epoch: crops, seed=0)
        large = dino_transform(224, (0.25, 1.0), 0.2, 0.2)
        small = dino_transform(96, (0.05, 0.25), 0.5, 0.0)

        def ours() -> None:
            batches[Request(0, 0, len(paths))]

        def peer() -> None:
            for path in paths:
                with Image.open(path) as file:
                    image = file.convert("RGB")
                [large(image), *(small(image) for _ in range(8))]

        def decode() -> None:
            for path in paths:
                simplejpeg.decode_jpeg(path.read_bytes(), "RGB")

        mine, theirs = in_turns(ours, peer, clock=time.process_time)
        decoding, _ = in_turns(decode, lambda: None, clock=time.process_time)
    return {
        "row": "loader_vs_dino",
        "ours": len(paths) / mine,
        "peer": len(paths) / theirs,
        "unit": "img/s/core",
        "ratio": theirs / mine,
        "target": 8.0,
        "bound": len(paths) / decoding,
        "bound_is": "decoding every file once at full size with libjpeg-turbo, and nothing else",
        "what": "From a 512 px JPEG file to 1 crop of 224 px and 8 of 96 px on one core, in CPU seconds.",
        "notes": [
            "ours: uint8 crops; flip, colour, blur, solarize, normalisation follow on the device (row augment_share)",
            "peer: the multi-crop of DINO and t-ReX, each image and crop on its own: Pillow and torchvision's v1 "
            "transforms, to normalised float tensors",
            f"{len(paths)} synthetic pictures of {size:.0f} kB on average, quality 90, 4:2:0",
        ],
    }


# ===== train_step_vs_fp32 =====


def train_step_vs_fp32() -> dict:
    """ResNet50 on 1 x 224 + 8 x 96 pixel crops: train.py's automatic number format and layout against fp32 NCHW.

    Each side at the number of images a micro-batch that suits it best.
    """
    from utils.machine import resolve_dtype

    chosen = resolve_dtype("auto", torch.device("cpu"))
    rates: dict[str, dict[int, float]] = {"ours": {}, "peer": {}}  # images/s by images a micro-batch
    for images in STEP_IMAGES:
        ours, peer = stepper(images, torch.channels_last, chosen), stepper(images, torch.contiguous_format)
        mine, theirs = in_turns(ours, peer)
        rates["ours"][images], rates["peer"][images] = images / mine, images / theirs
    best = {side: max(found, key=found.__getitem__) for side, found in rates.items()}
    fastest = {side: rates[side][images] for side, images in best.items()}
    if chosen == torch.bfloat16:
        reason = "bf16 is fast on this CPU, so --dtype auto is bf16"
    else:  # show that leaving bf16 out is right here
        in_bf16, _ = in_turns(stepper(best["ours"], torch.channels_last, torch.bfloat16), lambda: None)
        reason = (
            "the target assumes AMX tiles; bf16 is not fast on this CPU, so --dtype auto is fp32: bf16 makes "
            f"{best['ours'] / in_bf16:.2f} img/s"
        )
    distance, last = loss_curves()
    sizes = ", ".join(map(str, STEP_IMAGES))
    shown = {
        side: ", ".join(f"{rate:.2f} at {images}" for images, rate in found.items()) for side, found in rates.items()
    }
    return {
        "row": "train_step_vs_fp32",
        "ours": fastest["ours"],
        "peer": fastest["peer"],
        "unit": "img/s",
        "ratio": fastest["ours"] / fastest["peer"],
        "target": 2.8,
        **bound(count_flops(stepper(1, torch.contiguous_format)), torch.device("cpu")),
        "what": "A training step of ResNet50 on 1 crop of 224 px and 8 of 96 px: train.py's automatic number format "
        f"with channels_last against plain fp32 NCHW, each at the best of {sizes} images at a time.",
        "notes": [
            f"{torch.get_num_threads()} threads; ours {best['ours']} images a micro-batch, the peer {best['peer']}",
            f"images/s by images a micro-batch: ours {shown['ours']}; the peer {shown['peer']}",
            reason,
            f"losses of the first {CURVE_STEPS} steps of a run (resnet10, digits): bf16 is {distance:.3f} from fp32 on "
            f"average, tolerance {CURVE_TOLERANCE} ({'kept' if distance <= CURVE_TOLERANCE else 'not kept'}); "
            f"the last losses are {last[0]:.3f} and {last[1]:.3f}",
        ],
    }


def stepper(images: int, layout: torch.memory_format, dtype: torch.dtype = torch.float32) -> Callable[[], float]:
    """A training step on IMAGES images, to be called again and again."""
    torch.manual_seed(0)
    model = models.resnet50(num_classes=100).to(memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    crops = torch.randn(images, 3, 224, 224), torch.randn(8 * images, 3, 96, 96)
    views = [crop.to(memory_format=layout) for crop in crops]
    targets = torch.cat([torch.arange(images), torch.arange(images).repeat_interleave(8)])

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = torch.cat([model(view).float() for view in views])
        loss = functional.cross_entropy(logits, targets)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def loss_curves() -> tuple[float, tuple[float, float]]:
    """(mean |bf16 - fp32| loss over CURVE_STEPS steps of train.py on real digits, (last bf16, last fp32))."""
    with tempfile.TemporaryDirectory() as folder:
        write_set(Path(folder) / "digits", digits("train"))
        losses = {}
        for dtype in ("bf16", "fp32"):
            run_train(
                "--recipe",
                "demo",
                "--data",
                f"{folder}/digits",
                "--out",
                f"{folder}/{dtype}",
                "--epochs",
                4,
                "--log-every",
                1,
                "--dtype",
                dtype,
            )
            losses[dtype] = [line["loss"] for line in log_lines(Path(folder) / dtype)][:CURVE_STEPS]
    pairs = list(zip(losses["bf16"], losses["fp32"], strict=True))
    if len(pairs) != CURVE_STEPS:
        raise RuntimeError(f"{len(pairs)} steps were logged, not {CURVE_STEPS}")
    return statistics.mean(abs(a - b) for a, b in pairs), pairs[-1]


# ===== train_data_wait =====


def run_train(*options: object) -> None:
    command = [sys.executable, ROOT / "train.py", *map(str, options), "--device", "cpu"]
    subprocess.run(command, check=True, stdout=sys.stderr)


def log_lines(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


def train_data_wait() -> dict:
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder) / "images", 40)
        run_train(
            "--data",
            f"{folder}/images",
            "--out",
            f"{folder}/run",
            "--epochs",
            1,
            "--batch-size",
            4,
            "--batch-per-device",
            4,
            "--set",
            "warmup_epochs=0",
            "--log-every",
            1,
        )
        lines = log_lines(Path(folder) / "run")[1:]  # the first step starts the workers
    return {
        "row": "train_data_wait",
        "ours": 100 * statistics.mean(line["data_wait"] for line in lines),
        "peer": None,
        "unit": "% of a step",
        "ratio": None,
        "target": 5.0,
        "lower_is_better": True,
        "bound": 0.0,
        "bound_is": "a loader that is never waited for",
        "what": "Share of a training step's time spent waiting for the loader: `train.py`, paper recipe, CPU.",
        "notes": [
            f"{len(lines)} steps of 4 images at {statistics.median(line['images_per_s'] for line in lines):.2f} img/s, "
            "one loader process beside the model's threads"
        ],
    }


# ===== augment_share =====


def augment_share() -> dict:
    """Device-side augmentation as a share of forward + backward + augmentation, in turn on the same batch."""
    import train
    from utils.machine import resolve_device, resolve_dtype
    from utils.training.augment import augment_views, random_draws

    device = resolve_device("auto")
    dtype = resolve_dtype("auto", device)
    count = 64 if device.type == "cuda" else STEP_IMAGES[0]
    generator = torch.Generator().manual_seed(0)
    pixels = [
        torch.randint(0, 256, (count * n, size, size, 3), dtype=torch.uint8, generator=generator).permute(0, 3, 1, 2)
        for n, size in ((1, 224), (8, 96))
    ]
    samples, calls = np.arange(count), iter(range(10**6))
    model = models.resnet50(num_classes=100).to(device, memory_format=torch.channels_last)
    targets = torch.zeros(9 * count, dtype=torch.int64, device=device)

    def views() -> list[torch.Tensor]:
        epoch = np.full(count, next(calls))
        draws = [random_draws(train.PAPER, view, 0, epoch, samples, n) for view, n in enumerate((1, 8))]
        return augment_views([images.to(device) for images in pixels], draws)

    ready = [view.contiguous(memory_format=torch.channels_last) for view in views()]

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def augmentation() -> None:
        views()
        wait()

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = torch.cat([model(view).float() for view in ready])
        functional.cross_entropy(logits, targets).backward()
        wait()

    mine, rest = in_turns(augmentation, step)
    least: dict = {}
    if device.type == "cpu":
        moved, rate = sum(view.numel() * (1 + 4) for view in pixels), peak_bytes()
        how = f"each crop read once as uint8 and written once as float32, at the {rate / 1e9:.1f} GB/s of a copy"
        least = {"bound": 100 * (moved / rate) / (moved / rate + rest), "bound_is": how}
    where = (
        torch.cuda.get_device_name() if device.type == "cuda" else "CPU; no GPU was at hand, where the target is meant"
    )
    return {
        "row": "augment_share",
        "ours": 100 * mine / (mine + rest),
        "peer": None,
        "unit": "% of a step",
        "ratio": None,
        "target": 10.0,
        "lower_is_better": True,
        **least,
        "what": "Flip, colour jitter, grayscale, blur, solarize and normalisation of a batch on the device: share of "
        "the training step of ResNet50 on its 1 + 8 crops.",
        "notes": [
            f"measured on the {where}; {count} images, the step in {str(dtype).removeprefix('torch.')}: "
            f"{1000 * mine:.0f} ms of {1000 * (mine + rest):.0f} ms"
        ],
    }


ROWS = {
    "loader_vs_dino": loader_vs_dino,
    "train_step_vs_fp32": train_step_vs_fp32,
    "train_data_wait": train_data_wait,
    "augment_share": augment_share,
}
