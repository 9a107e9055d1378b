"""Measure the embedded model: how its images lie beside photographs, and how near they come to those it learned from.

Reads  a dataset that models/fashion-sd drew, a run trained on the real part, data/fashion (models/export_fashion.py),
       and the generator's part of Fashion-MNIST
Writes CARD/nearest.png and the section "Quality" of CARD/README.md; the reports go to --work

    python generate.py --classes fashion --model models/fashion-sd --steps 20 --images-per-class 1000 --out data/drawn
    python train.py --recipe demo --data data/fashion/real --out runs/fashion_real
    python models/measure_fashion.py --data data/drawn --checkpoint runs/fashion_real

Precision, recall, density and coverage (Naeem et al., ICML 2020) are class by class; all are computed on the features
of the run, as evaluate.py --dataset-report does: of the drawn images and, to compare, photographs of the test part.
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file, not installed

from models.fashion import DEBIAN, IMAGE_SIZE, WNIDS, read_part
from utils.cli import UserError, any_path, make_parser, run
from utils.dataset.folder import known_images
from utils.images import contact_sheet, decode_rgb, list_image_folder
from utils.report import dataset_quality
from utils.report.records import Described
from utils.storage import atomic_path, atomic_write, read_json, require_writable

if TYPE_CHECKING:
    import numpy as np

START, END = "<!-- quality: written by models/measure_fashion.py -->\n", "<!-- end of quality -->"  # in the card
PER_CLASS, NEIGHBOURS = 2, 3  # samples of a class in the picture, and training images beside each
MEASURES = ("FID", "precision", "recall", "density", "coverage")


def get_args_parser() -> argparse.ArgumentParser:
    """The options; --help prints the docstring of this file above them."""
    parser = make_parser(__doc__)
    parser.add_argument("--data", required=True, help="dataset that the model drew")
    parser.add_argument("--checkpoint", required=True, metavar="RUN", help="trained on the real part: its features")
    parser.add_argument("--photographs", type=any_path, default="data/fashion", help="with real/ and test/")
    parser.add_argument("--source", default=DEBIAN, help="folder of Fashion-MNIST's original files")
    parser.add_argument("--card", type=any_path, default="models/fashion-sd", help="folder of the model and its card")
    parser.add_argument("--work", type=any_path, default="runs/fashion_quality", help="folder of the reports")
    return parser


def main(args: argparse.Namespace) -> int:
    """Measure, then write the picture and the section of the card; exit code."""
    import numpy as np
    from PIL import Image

    card = args.card / "README.md"
    before, _, rest = card.read_text(encoding="utf-8").partition(START)
    if END not in rest:
        raise UserError(f"--card {args.card}: its README.md has no section for this; train_fashion_sd.py writes it")
    require_writable(args.card, "--card")

    # ===== beside photographs =====
    network = dataset_quality.Network(args.checkpoint, "cpu", "fp32", None, 64, os.cpu_count() or 1)
    totals = {}
    for name, folder in (("drawn", args.data), ("test part", str(args.photographs / "test"))):
        out = require_writable(args.work / name.replace(" ", "_"), "--work")
        dataset_quality.run(folder, str(args.photographs / "real"), network, out, False, known_images)
        totals[name] = read_json(out / "dataset_report.json")["totals"]

    # ===== beside what the model learned from =====
    _, _, learned = read_part("generator", args.source)
    flat = learned.reshape(len(learned), -1).astype(np.float32)
    samples = some_of(Path(args.data) / "train")
    distances, nearest = neighbours(samples, flat)
    photographs = some_of(args.photographs / "test", per_class=20)
    usual = float(np.median(neighbours(photographs, flat)[0][:, 0]))
    with atomic_path(args.card / "nearest.png") as temporary:
        Image.fromarray(picture(samples, learned[nearest])).save(temporary, "PNG", optimize=True)

    # ===== telling =====
    said = quality(args.data, totals, len(learned), distances[:, 0], usual)
    atomic_write(card, (before + START + said + END + rest.partition(END)[2]).encode())
    print(f"written: {card}\nwritten: {args.card / 'nearest.png'}")
    return 0


def quality(data: str, totals: dict[str, dict], learned: int, closest: np.ndarray, usual: float) -> str:
    """The section. CLOSEST: each sample's difference to the nearest of LEARNED images; USUAL: a photograph's."""
    import numpy as np

    recipe = read_json(Path(data) / "dataset.json", Described).recipe
    drawn, photographs = totals["drawn"], totals["test part"]
    how = (
        f"Images drawn with `{recipe['prompt']}`, guidance {recipe['guidance_scale']:g}, {recipe['steps']} steps of "
        f"`{recipe['scheduler']}`, are set beside the photographs of the real part; in the last column photographs "
        "of the test part take their place. The features are those of a classifier of the real part: this FID is not "
        "comparable with Inception's."
    )
    rows = [f"| | drawn ({drawn['images']:,}) | photographs ({photographs['images']:,}) |", "|---|---|---|"]
    for name in MEASURES:
        unit = "" if name == "FID" else ", %"
        rows.append(f"| {name}{unit} | {drawn[name]:.1f} | {photographs[name]:.1f} |")
    copies = (
        f"Copies would be seen here: {PER_CLASS} samples of a class (first and fifth column), each followed by those "
        f"{NEIGHBOURS} of the {learned:,} training images that are nearest by pixels. They differ from the nearest by "
        f"{np.median(closest):.1f} grey levels (root mean square; median, the least {closest.min():.1f}), a photograph "
        f"of the test part by {usual:.1f}."
    )
    picture = "![samples and the training images nearest to them](nearest.png)"
    return "\n\n".join([textwrap.fill(how, 120), "\n".join(rows), textwrap.fill(copies, 120), picture]) + "\n"


def some_of(folder: Path, per_class: int = PER_CLASS) -> np.ndarray:
    """(10 * PER_CLASS, 32, 32) uint8 images of FOLDER's classes, at even distances through each."""
    import numpy as np

    ids, samples = list_image_folder(folder)
    chosen = []
    for class_id in sorted(WNIDS):
        paths = [path for path, label in samples if ids[label] == class_id]
        chosen += [paths[len(paths) * index // per_class] for index in range(per_class)]
    images = [decode_rgb(path).mean(2).round().astype(np.uint8) for path in chosen]
    if others := {image.shape for image in images} - {(IMAGE_SIZE, IMAGE_SIZE)}:
        raise UserError(f"--data {folder}: images of {others.pop()} pixels; name a dataset that models/fashion-sd drew")
    return np.stack(images)


def neighbours(images: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(root mean square differences (N, NEIGHBOURS) in grey levels of the 28 x 28 original, numbers of those ROWS)."""
    import numpy as np

    distances, numbers = [], []
    for image in images.reshape(len(images), -1).astype(np.float32):
        squares = ((rows - image) ** 2).sum(1) / 28**2
        nearest = np.argsort(squares)[:NEIGHBOURS]
        numbers.append(nearest)
        distances.append(np.sqrt(squares[nearest]))
    return np.array(distances), np.array(numbers)


def picture(samples: np.ndarray, nearest: np.ndarray) -> np.ndarray:
    """A row a class: each sample followed by its NEAREST (N, NEIGHBOURS, 32, 32), twice as large."""
    import numpy as np

    tiles = np.concatenate([samples[:, None], nearest], 1)[..., None].repeat(3, -1)  # (N, 1 + NEIGHBOURS, 32, 32, 3)
    columns = PER_CLASS * tiles.shape[1]
    rows = [("", list(row)) for row in tiles.reshape(-1, columns, *tiles.shape[2:])]
    return contact_sheet(rows, IMAGE_SIZE, columns, gap=2, paper="#808080").repeat(2, 0).repeat(2, 1)


if __name__ == "__main__":
    sys.exit(run(main, get_args_parser()))
