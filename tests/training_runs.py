"""Tiny training runs as real processes, for the tests of train.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent

# The paper's recipe with everything made small: two crop sizes, every augmentation, two micro-batches a step.
TINY = [
    "--recipe",
    "paper",
    "--arch",
    "resnet10",
    "--epochs",
    "3",
    "--batch-size",
    "8",
    "--batch-per-device",
    "4",
    "--device",
    "cpu",
    "--dtype",
    "fp32",
    "--workers",
    "1",
    "--set",
    "warmup_epochs=1",
    "--set",
    "global_size=32",
    "--set",
    "local_size=16",
    "--set",
    "local_count=2",
    "--set",
    "val_resize=36",
    "--set",
    "val_crop=32",
    "--log-every",
    "1",
    "--no-leak-check",  # some validate on their training images
]
STEPS = 12  # of TINY on make_images: 34 images // 8 x 3 epochs


def make_images(root: Path, counts: dict[str, int], side: int = 40) -> Path:
    """ROOT/<class id>/*.jpg: each class has its own colours, so that a model can learn them."""
    for number, (class_id, count) in enumerate(counts.items()):
        (root / class_id).mkdir(parents=True)
        for index in range(count):
            rng = np.random.default_rng([number, index])
            coarse = rng.integers(0, 128, (5, 5, 3), dtype=np.uint8)
            coarse[:, :, number % 3] += 100
            pixels = np.array(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))
            (root / class_id / f"{class_id}_{index:06d}.jpg").write_bytes(simplejpeg.encode_jpeg(pixels, quality=90))
    return root


def start(*options: object, patch: str = "", **environment: str) -> subprocess.Popen:
    """train.py with OPTIONS in a process of its own; PATCH is Python that runs after `import train`."""
    script = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import train
from utils.cli import run
{textwrap.dedent(patch)}
sys.exit(run(train.main, train.get_args_parser(), sys.argv[1:]))
"""
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )


def finish(process: subprocess.Popen, code: int = 0) -> tuple[str, str]:
    """(stdout, stderr) of a process that must end with exit CODE."""
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, f"exit {process.returncode}, not {code}:\n{out}\n{err}"
    return out, err


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def log_without_clock(run: Path) -> list[dict]:
    """log.jsonl without what depends on the machine's speed."""
    clock = {"time", "images_per_s", "data_wait", "eta_s", "memory_mb"}
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in clock} for line in lines]
