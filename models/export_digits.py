"""Write the demo's real images as folders of PNG files, one folder a class.

Reads  scikit-learn's UCI handwritten digits and models/digits_split.json
Writes OUT/train/<wnid>/<wnid>_<original index:06d>.png and OUT/test/...: 32x32 RGB, white ink on black

Files that are there are left alone, damaged ones are written again: run it at will.

    python models/export_digits.py                     # data/digits/train, data/digits/test
    python models/export_digits.py --out /tmp/digits   # elsewhere
    ls data/digits/test/n13742358                      # the held-out zeros
"""

import argparse
import io
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file, not installed

from models.digits import PARTS, real_digits
from utils.classes import load_classes
from utils.cli import any_path, make_parser, run
from utils.storage import atomic_write, require_writable


def get_args_parser() -> argparse.ArgumentParser:
    """The options; --help prints the docstring of this file above them."""
    parser = make_parser(__doc__)
    parser.add_argument("--out", type=any_path, default="data/digits", help="folder that receives train/ and test/")
    return parser


def main(args: argparse.Namespace) -> int:
    """Write the digits as PNG files of --out/<part>/<id>; exit code."""
    from PIL import Image

    out = require_writable(args.out, "--out")
    class_ids = load_classes("digits").ids
    for part in PARTS:
        written = 0
        indices, labels, images = real_digits(part)
        for index, label, image in zip(indices, labels, images, strict=True):
            path = out / part / class_ids[label] / f"{class_ids[label]}_{index:06d}.png"
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "PNG")
            if not path.exists() or path.read_bytes() != buffer.getvalue():
                path.parent.mkdir(parents=True, exist_ok=True)
                atomic_write(path, buffer.getvalue())
                written += 1
        print(f"{out / part}: {len(indices)} images, {written} of them written now")
    return 0


if __name__ == "__main__":
    sys.exit(run(main, get_args_parser()))
