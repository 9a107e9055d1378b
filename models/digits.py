"""The demo's real images: scikit-learn's UCI handwritten digits, cut once and for all into two halves.

The generator is trained on the training half only; every classifier is tested on the other half.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from utils.cli import UserError
from utils.machine import ROOT
from utils.storage import read_json

if TYPE_CHECKING:
    import numpy as np

SPLIT_FILE = ROOT / "models" / "digits_split.json"
PARTS = ("train", "test")
IMAGE_SIZE = 32  # pixels: 8x8 counts, enlarged four times


def read_split(path: str | Path = SPLIT_FILE) -> dict[str, list[int]]:
    """{"train": indices, "test": indices} into load_digits; a file whose halves overlap is refused."""
    split = read_json(path)
    halves = {part: list(split[part]) for part in PARTS}
    if set(halves["train"]) & set(halves["test"]):
        raise UserError(f"{path}: an image is in both halves; restore the file from the repository")
    return halves


def real_digits(part: str, split: str | Path = SPLIT_FILE) -> tuple[list[int], np.ndarray, np.ndarray]:
    """One half as (indices into load_digits, labels (N,) int64, images (N, 32, 32, 3) uint8 RGB).

    The installed data must be the data that was split: its checksum is in the split file.
    """
    import numpy as np
    from sklearn.datasets import load_digits

    digits = load_digits()
    counts = digits.images.astype(np.uint8)  # (1797, 8, 8): inked pixels of a 4x4 block, 0..16
    sha256 = hashlib.sha256(counts.tobytes() + digits.target.astype(np.uint8).tobytes()).hexdigest()
    if sha256 != read_json(split)["data_sha256"]:
        raise UserError(f"{split} was made for other data than this scikit-learn's load_digits (run `make setup`)")
    indices = read_split(split)[part]
    return indices, digits.target[indices], np.stack([enlarge(counts[index]) for index in indices])


def enlarge(counts: np.ndarray) -> np.ndarray:
    """(8, 8) counts 0..16 -> (32, 32, 3) uint8 RGB, white ink on black, bicubic (not in paper: our choice)."""
    import numpy as np
    from PIL import Image

    grey = np.round(counts.astype(np.float32) * (255 / 16)).astype(np.uint8)
    large = Image.fromarray(grey).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    return np.repeat(np.asarray(large)[:, :, None], 3, axis=2)
