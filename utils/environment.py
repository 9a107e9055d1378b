"""What a result was made with: versions, git commit, lock, container image, hardware. Imports no torch."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from functools import cache
from pathlib import Path

from utils.storage import sha256_file

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "torchvision", "xformers", "diffusers", "transformers", "numpy", "pillow", "simplejpeg")


def snapshot() -> dict:
    """The facts that a dataset, checkpoint or report records about where it was made. Plain JSON types."""
    lock = ROOT / "requirements.lock"
    return {
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "git_commit": git_commit(),
        "lock_sha256": sha256_file(lock) if lock.exists() else None,
        "image_digest": os.environ.get("IMAGE_DIGEST"),  # set by the launcher, or docker run -e
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        **gpus(),
    }


def package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def git_commit() -> str | None:
    """The commit of this source tree, with `+changes` if files differ from it; the container passes $GIT_COMMIT."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
        changes = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=ROOT, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("GIT_COMMIT")
    return commit.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


@cache
def cpu_model() -> str:
    for line in _cpuinfo().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@cache
def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (AMX): elsewhere fp32 is faster.

    AVX512-BF16 alone is no reason: on a Xeon with it but without AMX, one forward of SD 1.4's UNet at 512 px took
    10.7 core-seconds in bf16 against 7.1 in fp32 (torch 2.10.0), and the demo's UNet drew 0.7 times as fast.
    """
    flags = next((line for line in _cpuinfo().splitlines() if line.startswith("flags")), "").split()
    return "amx_bf16" in flags


@cache
def gpus() -> dict:
    """{"gpus": [names], "driver": version} by nvidia-smi; empty where there is none."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        rows = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return {"gpus": [], "driver": None}
    cells = [row.rsplit(",", 1) for row in rows if "," in row]
    return {"gpus": [name.strip() for name, _ in cells], "driver": cells[0][1].strip() if cells else None}


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
