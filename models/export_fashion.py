"""Write the demo's real images as folders of PNG files, one folder a class.

Reads  models/fashion/ (Fashion-MNIST, see models/fashion.py) and scikit-learn's UCI handwritten digits
Writes OUT/fashion/real/<wnid>/*.png        1,000 images a class to train classifiers on
       OUT/fashion/test/<wnid>/*.png        1,000 others a class to judge them on
       OUT/fashion/test_noise/<wnid>/*.png  the first 200 of these with Gaussian noise
       OUT/digits/{train,test}/<digit>/*.png  other classes altogether, for linear probes of frozen features

All are 32x32 and grey. Files that are there are left alone, damaged ones are written again: run it at will.

    python models/export_fashion.py                     # data/fashion, data/digits
    python models/export_fashion.py --out /tmp/data     # elsewhere
    ls data/fashion/test/n04133789                      # the sandals that nothing is trained on
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file, not installed

from models.fashion import IMAGE_SIZE, WNIDS, read_part
from utils.cli import any_path, make_parser, run
from utils.storage import atomic_write, require_writable

if TYPE_CHECKING:
    import numpy as np

# Gaussian noise of ImageNet-C (Hendrycks & Dietterich, ICLR 2019), severity 3: its standard deviation, of a range of 1.
NOISE = 0.18
NOISY_PER_CLASS = 200  # enough for an interval of two points
Named = tuple[str, str, "np.ndarray"]  # class folder, number of the image in its original, grey pixels (32, 32) uint8


def get_args_parser() -> argparse.ArgumentParser:
    """The options; --help prints the docstring of this file above them."""
    parser = make_parser(__doc__)
    parser.add_argument("--out", type=any_path, default="data", help="folder that receives fashion/ and digits/")
    return parser


def main(args: argparse.Namespace) -> int:
    """Write every set that is missing or damaged; exit code."""
    out = require_writable(args.out, "--out")
    for name, images in all_sets():
        count, written = write_set(out / name, images)
        print(f"{out / name}: {count} images, {written} of them written now")
    return 0


def write_set(folder: Path, images: Iterable[Named]) -> tuple[int, int]:
    """(images, those written now) of FOLDER/<class>/<class>_<number>.png."""
    from PIL import Image

    count = written = 0
    for class_id, number, pixels in images:
        path = folder / class_id / f"{class_id}_{number}.png"
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)  # a third of the default's time, as small
        count += 1
        if not path.exists() or path.read_bytes() != buffer.getvalue():
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, buffer.getvalue())
            written += 1
    return count, written


def all_sets() -> Iterator[tuple[str, Iterator[Named]]]:
    """(folder below OUT, its images) of each set, always in the same order."""
    yield "fashion/real", clothes("real")
    yield "fashion/test", clothes("test")
    yield "fashion/test_noise", with_noise(clothes("test"))
    yield "digits/train", digits("train")
    yield "digits/test", digits("test")


def clothes(part: str) -> Iterator[Named]:
    """The images of a part of Fashion-MNIST."""
    for number, label, pixels in zip(*read_part(part), strict=True):
        yield WNIDS[label], f"{number:05d}", pixels


def with_noise(images: Iterator[Named]) -> Iterator[Named]:
    """The first NOISY_PER_CLASS of each class, each with its own noise, drawn from its number."""
    import numpy as np

    seen: dict[str, int] = {}
    for class_id, number, pixels in images:
        seen[class_id] = seen.get(class_id, 0) + 1
        if seen[class_id] <= NOISY_PER_CLASS:
            noise = np.random.default_rng(int(number)).normal(0, 255 * NOISE, pixels.shape)
            yield class_id, number, (pixels + noise).round().clip(0, 255).astype(np.uint8)


def digits(half: str) -> Iterator[Named]:
    """Half of scikit-learn's digits, 8x8 counts of inked pixels enlarged by bicubic interpolation, white on black.

    The first half is for training and the second for testing, as in scikit-learn's own example of a classifier.
    """
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    found = load_digits()
    middle = len(found.images) // 2
    for number in range(middle) if half == "train" else range(middle, len(found.images)):
        grey = np.round(found.images[number] * (255 / 16)).astype(np.uint8)
        large = Image.fromarray(grey).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
        yield str(found.target[number]), f"{number:04d}", np.asarray(large)


if __name__ == "__main__":
    sys.exit(run(main, get_args_parser()))
