"""The demo's real images: Fashion-MNIST (Xiao, Rasul, Vollgraf 2017; MIT licence), cut once for all into three parts.

generator  49,973 of the 60,000 training images: "the web", which the text-to-image model alone was trained on
real       10,000 of the training images, 1,000 a class: what classifiers of real images are trained on
test       the official 10,000 test images, on which every classifier is judged and nothing is ever trained

models/fashion/ ships the two parts that the demo needs, in the original's format, and split.json: which training image
is in which part, the seed and the checksums. The generator's part comes from the original download or Debian's
dataset-fashion-mnist. The original shows some products twice, in nearly the same pixels: a training image that is
nearly a test image, or nearly one of the real part, is in no part.

    python models/fashion.py --source /usr/share/datasets/fashion-mnist     # write models/fashion/ again
"""

from __future__ import annotations

import argparse
import gzip
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file, not installed

from utils.cli import UserError, make_parser, run
from utils.machine import ROOT
from utils.storage import atomic_write, read_json, require_writable, sha256_bytes, write_json

if TYPE_CHECKING:
    import numpy as np

FOLDER = ROOT / "models" / "fashion"
DEBIAN = "/usr/share/datasets/fashion-mnist"  # where Debian's dataset-fashion-mnist puts it
RESTORE = "restore it from the repository: git checkout -- models/fashion"
IMAGE_SIZE = 32  # pixels: the original's 28, framed by two of the background on each side
REAL_PER_CLASS = 1000
NEAR = 8.0  # grey levels: root mean square difference below which two images are one product photographed twice
SEED = 0
# Fashion-MNIST's labels 0 to 9, by the nouns of WordNet 3.0 that mean them.
WNIDS = (
    "n03595614",  # T-shirt/top: jersey, T-shirt, tee shirt
    "n04489008",  # Trouser
    "n04021028",  # Pullover
    "n03236735",  # Dress
    "n03057021",  # Coat
    "n04133789",  # Sandal
    "n04197391",  # Shirt
    "n03472535",  # Sneaker: gym shoe, sneaker, tennis shoe
    "n02774152",  # Bag
    "n02872752",  # Ankle boot: boot
)
# The original files, as https://github.com/zalandoresearch/fashion-mnist publishes them.
ORIGINALS = {
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}


class Split(msgspec.Struct):
    """split.json: the numbers, from 0, of training images in a part, and the SHA-256 of the shipped files."""

    seed: int
    near: float
    real: list[int]
    excluded: list[int]  # nearly a test image or nearly a real one
    sha256: dict[str, str]


def read_split(folder: Path = FOLDER) -> Split:
    """split.json of FOLDER; UserError if it is missing or damaged, or if an image would be in two parts."""
    path = folder / "split.json"
    if not path.is_file():
        raise UserError(f"{path} is missing; {RESTORE}")
    split = read_json(path, Split, RESTORE)
    placed = split.real + split.excluded
    if len(set(placed)) < len(placed):
        raise UserError(f"{path}: an image is in two parts; {RESTORE}")
    return split


def read_part(
    part: str, source: str | Path = DEBIAN, folder: Path = FOLDER
) -> tuple[list[int], np.ndarray, np.ndarray]:
    """One part as (numbers in the original file, labels (N,) int64, grey images (N, 32, 32) uint8).

    "generator" is read from SOURCE, the folder of the four original files; the other two from FOLDER. UserError for a
    file that is missing or has other bytes than the one that was split.
    """
    import numpy as np

    split = read_split(folder)
    if part == "generator":
        left_out = {*split.real, *split.excluded}
        images, labels = read_original(source, "train")
        numbers = [number for number in range(len(images)) if number not in left_out]
        images, labels = images[numbers], labels[numbers]
    else:
        stem = {"real": "real", "test": "t10k"}[part]
        images, labels = (
            read_idx(folder / name, split.sha256.get(name), RESTORE)
            for name in (f"{stem}-images-idx3-ubyte.gz", f"{stem}-labels-idx1-ubyte.gz")
        )
        numbers = split.real if part == "real" else list(range(len(images)))
    edge = (IMAGE_SIZE - images.shape[1]) // 2
    return numbers, labels.astype(np.int64), np.pad(images, ((0, 0), (edge, edge), (edge, edge)))


def read_original(source: str | Path, stem: str) -> tuple[np.ndarray, np.ndarray]:
    """(images (N, 28, 28), labels (N,)) uint8 of the original's "train" or "t10k" files in SOURCE."""
    remedy = (
        f"apt-get install dataset-fashion-mnist (then --source {DEBIAN}), or download the files that "
        "models/fashion/README.md names"
    )
    images, labels = (
        read_idx(Path(source) / name, ORIGINALS[name], remedy)
        for name in (f"{stem}-images-idx3-ubyte.gz", f"{stem}-labels-idx1-ubyte.gz")
    )
    return images, labels


def read_idx(path: Path, sha256: str | None, remedy: str) -> np.ndarray:
    """The array of bytes in a gzipped IDX file (http://yann.lecun.com/exdb/mnist), whose SHA-256 must be SHA256."""
    import numpy as np

    if not path.is_file():
        raise UserError(f"{path} is missing; {remedy}")
    packed = path.read_bytes()
    if sha256_bytes(packed) != sha256:
        raise UserError(f"{path} has another checksum than the file that was split; {remedy}")
    data = gzip.decompress(packed)
    sizes = np.frombuffer(data, ">u4", count=data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(*sizes)


# ===== making the parts =====


def get_args_parser() -> argparse.ArgumentParser:
    """The options; --help prints the docstring of this file above them."""
    parser = make_parser(__doc__)
    parser.add_argument("--source", default=DEBIAN, help="folder of the four original files")
    parser.add_argument("--out", default=FOLDER, type=Path, help="folder of the parts that the repository ships")
    return parser


def main(args: argparse.Namespace) -> int:
    """Cut the original into the three parts; exit code."""
    images, labels = read_original(args.source, "train")
    tests, _ = read_original(args.source, "t10k")
    split = {"seed": SEED, "near": NEAR} | cut(images, labels, tests)
    out = require_writable(args.out, "--out")
    files = {
        "real-images-idx3-ubyte.gz": pack_idx(images[split["real"]]),
        "real-labels-idx1-ubyte.gz": pack_idx(labels[split["real"]]),
    }
    for name in ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"):
        files[name] = (Path(args.source) / name).read_bytes()
    for name, packed in files.items():
        atomic_write(out / name, packed)
    write_json(out / "split.json", split | {"sha256": {name: sha256_bytes(data) for name, data in files.items()}})
    real, excluded = len(split["real"]), len(split["excluded"])
    print(
        f"{out}: {len(images) - real - excluded} images for the generator, {real} real, {len(tests)} test images; "
        f"{excluded} near-duplicates left out"
    )
    return 0


def cut(images: np.ndarray, labels: np.ndarray, tests: np.ndarray) -> dict[str, list[int]]:
    """{"real": numbers of training images, "excluded": those nearly equal to a test or real image}, both sorted."""
    import numpy as np

    near_test = set(near(images, tests).tolist())
    rng = np.random.default_rng(SEED)
    real: list[int] = []
    for label in range(len(WNIDS)):
        free = [number for number in np.flatnonzero(labels == label) if number not in near_test]
        real += rng.permutation(free)[:REAL_PER_CLASS].tolist()
    near_real = set(near(images, images[real]).tolist()) - set(real)
    return {"real": sorted(real), "excluded": sorted(int(number) for number in near_test | near_real)}


def near(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Numbers of the IMAGES (N, 28, 28) that differ from one of the OTHERS by less than NEAR grey levels."""
    import numpy as np
    from scipy.spatial import KDTree

    def coarse(array: np.ndarray) -> np.ndarray:
        """(N, 16) means of blocks of 7 x 7 pixels, scaled: two images are at least as far apart as these."""
        return 7 * array.reshape(-1, 4, 7, 4, 7).mean((2, 4)).reshape(-1, 16)

    candidates = KDTree(coarse(others)).query_ball_point(coarse(images), NEAR * 28)
    found = []
    for number in np.flatnonzero([len(some) > 0 for some in candidates]):
        difference = images[number].astype(np.int64) - others[candidates[number]]
        if (difference**2).mean((1, 2)).min() < NEAR**2:
            found.append(number)
    return np.array(found, np.int64)


def pack_idx(array: np.ndarray) -> bytes:
    """ARRAY of bytes as a gzipped IDX file: the same bytes on every run."""
    import numpy as np

    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return gzip.compress(head + array.tobytes(), 9, mtime=0)


if __name__ == "__main__":
    sys.exit(run(main, get_args_parser()))
