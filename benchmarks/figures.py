"""What the checks of `make gpu-check` return: measured values, each with the limit it is held against."""

from __future__ import annotations

import hashlib
import math
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SPEED = "images/s: "  # begins the name of a figure that docs/benchmarks.md can have as a row


@dataclass(frozen=True)
class Figure:
    """One measured value of a CHECK, what it is held against, and whether it passes."""

    check: str
    name: str
    value: float | str
    limit: str
    passed: bool


def at_most(name: str, value: float, limit: float) -> Figure:
    """A figure that is to be at most LIMIT; one that is no number fails."""
    return Figure("", name, value, f"<= {limit:g}", value <= limit)


def at_least(name: str, value: float, limit: float) -> Figure:
    """A figure that is to be at least LIMIT."""
    return Figure("", name, value, f">= {limit:g}", value >= limit)


def equal(name: str, value: str, wanted: str) -> Figure:
    """A figure that is to be WANTED; of hashes the first digits are shown."""
    return Figure("", name, value[:16], f"= {wanted[:16]}", value == wanted)


def told(name: str, value: float | str) -> Figure:
    """A figure without a limit, for the page."""
    return Figure("", name, value, "", True)


def psnr(one, other, span: float = 255) -> float:
    """Peak signal-to-noise ratio of two images or batches whose values reach over SPAN, dB; 99 for equal ones."""
    error = np.square(np.asarray(one, np.float64) - np.asarray(other, np.float64)).mean()
    return 10 * math.log10(span**2 / error) if error else 99.0


def sha256(values) -> str:
    """Of the bytes of a tensor or array."""
    return hashlib.sha256(np.ascontiguousarray(values.cpu()).tobytes()).hexdigest()


def quiet(command: Sequence[str], environment: dict[str, str] | None = None) -> subprocess.Popen:
    """Start COMMAND without its output."""
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
