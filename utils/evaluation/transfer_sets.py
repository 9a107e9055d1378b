"""Readers of the fifteen transfer datasets: how each one's official split is read from its annotation files.

Which dataset is read by which function, and the counts of a right copy, stand in catalog.py. A reader takes the
dataset's folder and returns (trainval, test, number of classes), samples being (path, label from 0). torchvision's
loaders know these layouts too, but some check every file, mix train with val, or have no split; the annotation files
are short, so they are read here, the same way for all.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from utils.cli import UserError
from utils.evaluation.pickles import read_pickle
from utils.images import list_image_folder
from utils.storage import MOST_JSON, read_json, read_regular, sha256_bytes

Samples = list[tuple[str, int]]  # (path, label)
EUROSAT_TEST = 810  # test images a class (t-ReX's suite)
EUROSAT_SEED = "imagenet-sd EuroSAT split 0"  # the suite's shuffle is unseeded: this one is ours, fixed for ever


def _inside(folder: Path, name: str) -> str:
    """FOLDER/NAME, where NAME comes from an annotation file and must not lead out of the folder."""
    if not name or name.startswith("/") or ".." in name.split("/") or "\0" in name:
        where = f"the file {name!r}, which is outside of the dataset"
        raise UserError(f"{folder}: an annotation names {where}; get it again")
    return f"{folder}/{name}"


@contextmanager
def _as_published(path: Path) -> Iterator[None]:
    """What goes wrong in the block is the fault of the annotation file PATH: UserError names it."""
    try:
        yield
    except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not as published ({error!r}); get it again") from None


def _lines(path: Path) -> list[str]:
    with _as_published(path):  # not text
        return [line for line in read_regular(path, MOST_JSON).decode().splitlines() if line.strip()]


def read_aircraft(folder: Path) -> tuple[Samples, Samples, int]:
    """Lines are `<image> <variant>`; labels are the places in variants.txt."""
    label = {name: index for index, name in enumerate(_lines(folder / "variants.txt"))}

    def split(name: str) -> Samples:
        path = folder / f"images_variant_{name}.txt"
        with _as_published(path):
            pairs = (line.split(" ", 1) for line in _lines(path))
            return [(_inside(folder / "images", f"{image}.jpg"), label[variant]) for image, variant in pairs]

    return split("trainval"), split("test"), len(label)


def read_cars(folder: Path) -> tuple[Samples, Samples, int]:
    """Two layouts are in use: one cars_annos.mat for all images, or a devkit with two folders of images."""
    if (folder / "cars_annos.mat").exists():
        rows = read_mat(folder / "cars_annos.mat", "annotations")
        parts = [[(folder, row["relative_im_path"], row["class"]) for row in rows if row["test"] == k] for k in (0, 1)]
    else:
        test = folder / "cars_test_annos_withlabels.mat"
        lists = {"cars_train": folder / "devkit/cars_train_annos.mat"}
        lists["cars_test"] = test if test.exists() else folder / "devkit" / test.name
        parts = [
            [(folder / images, row["fname"], row["class"]) for row in read_mat(path, "annotations")]
            for images, path in lists.items()
        ]
    trainval, test_half = (
        [(_inside(place, str(name)), int(label) - 1) for place, name, label in part] for part in parts
    )
    return trainval, test_half, len({label for _, label in trainval + test_half})


def read_mat(path: Path, key: str) -> Any:
    """Variable KEY of a MATLAB file. scipy reads numbers and text only: nothing in it is run."""
    from scipy.io import loadmat

    read_regular(path, MOST_JSON)  # OSError where there is none, or no file
    try:
        return loadmat(str(path), squeeze_me=True)[key]
    except Exception as error:  # a damaged file raises anything: MatReadError, zlib.error, IndexError, OSError ...
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); get it again") from None


def read_dtd(folder: Path) -> tuple[Samples, Samples, int]:
    """Split 1 of ten; lines are `<class>/<image>`."""
    files = {part: _lines(folder / f"labels/{part}1.txt") for part in ("train", "val", "test")}
    return _by_folder_name(folder / "images", files["train"] + files["val"], files["test"])


def read_food(folder: Path) -> tuple[Samples, Samples, int]:
    """Lines are `<class>/<image>` without suffix."""
    trainval, test = ([f"{line}.jpg" for line in _lines(folder / f"meta/{part}.txt")] for part in ("train", "test"))
    return _by_folder_name(folder / "images", trainval, test)


def _by_folder_name(images: Path, *halves: list[str]) -> tuple[Samples, Samples, int]:
    return _by_class(images, *([(name, _class_of(name)) for name in half] for half in halves))


def _by_class(images: Path, trainval: list, test: list, known: Iterable = ()) -> tuple[Samples, Samples, int]:
    """From (file, class) pairs; labels are the places in the sorted classes, of KNOWN ones where there are any."""
    classes = sorted(set(known) or {kind for _, kind in trainval + test})
    label = {kind: index for index, kind in enumerate(classes)}
    trainval, test = ([(_inside(images, name), label[kind]) for name, kind in half] for half in (trainval, test))
    return trainval, test, len(label)


def _class_of(name: str) -> str:
    """`a/abbey/sun_1.jpg` -> `a/abbey`."""
    return name.rpartition("/")[0]


def read_eurosat(folder: Path) -> tuple[Samples, Samples, int]:
    """No official split: the 810 images of each class whose hash with EUROSAT_SEED comes first are the test half."""
    class_ids, samples = list_image_folder(folder, option="EuroSAT")
    trainval: Samples = []
    test: Samples = []
    for _, its in groupby(samples, key=itemgetter(1)):
        # By a hash of the name: the same split for ever, whatever the order of listing.
        members = sorted(its, key=lambda one: sha256_bytes(f"{EUROSAT_SEED}/{Path(one[0]).name}".encode()))
        test += sorted(members[:EUROSAT_TEST])
        trainval += sorted(members[EUROSAT_TEST:])
    return trainval, test, len(class_ids)


def read_flowers(folder: Path) -> tuple[Samples, Samples, int]:
    """setid.mat lists image numbers of train, val and test; imagelabels.mat their classes, from 1."""
    labels = read_mat(folder / "imagelabels.mat", "labels")
    parts = {part: read_mat(folder / "setid.mat", part) for part in ("trnid", "valid", "tstid")}

    def split(*names: str) -> Samples:
        numbers = sorted(int(number) for name in names for number in parts[name])
        return [(_inside(folder / "jpg", f"image_{number:05d}.jpg"), int(labels[number - 1]) - 1) for number in numbers]

    return split("trnid", "valid"), split("tstid"), len(set(labels.tolist()))


def read_pets(folder: Path) -> tuple[Samples, Samples, int]:
    """Lines are `<image> <class from 1> <species> <breed>`."""

    def split(name: str) -> Samples:
        path = folder / f"annotations/{name}.txt"
        with _as_published(path):
            rows = (line.split() for line in _lines(path) if not line.startswith("#"))
            return [(_inside(folder / "images", f"{row[0]}.jpg"), int(row[1]) - 1) for row in rows]

    trainval, test = split("trainval"), split("test")
    return trainval, test, len({label for _, label in trainval + test})


def read_sun(folder: Path) -> tuple[Samples, Samples, int]:
    """Split 1 of ten; lines are `/<letter>/<class>/<image>`, classes may have a second level."""
    places = [folder, folder / "Partitions", folder / "partitions", folder.parent / "Partitions"]
    lists = next((place for place in places if (place / "Training_01.txt").exists()), folder)
    label = {name: index for index, name in enumerate(_lines(lists / "ClassName.txt"))}

    def split(name: str) -> Samples:
        with _as_published(lists / name):
            return [(_inside(folder, line.removeprefix("/")), label[_class_of(line)]) for line in _lines(lists / name)]

    return split("Training_01.txt"), split("Testing_01.txt"), len(label)


def read_inat(year: int, folder: Path) -> tuple[Samples, Samples, int]:
    """The competition's json files: its validation half is the test set here. Labels: sorted category ids."""

    def read(part: str) -> tuple[list[tuple[str, int]], set[int]]:
        path = folder / f"{part}{year}.json"
        record = read_json(path)
        with _as_published(path):
            files = {image["id"]: image["file_name"] for image in record["images"]}
            pairs = [(files[row["image_id"]], row["category_id"]) for row in record["annotations"]]
            return pairs, {category["id"] for category in record.get("categories", [])}

    (trainval, known), (test, _) = read("train"), read("val")
    return _by_class(folder, trainval, test, known)


def _text(value: Any) -> str:
    """VALUE if it is text: of anything else str() may be endless (a list that shares its parts doubles with each)."""
    if not isinstance(value, str):
        raise TypeError(f"a {type(value).__name__} where a name is expected")
    return str(value)


def read_cog(level: int, folder: Path) -> tuple[Samples, Samples, int]:
    """Two pickles: five lists of concepts (wnids), concept -> {"train", "test"} file lists. Labels: sorted concepts."""
    levels = read_pickle(folder / "cog_levels_mapping_file.pkl")
    with _as_published(folder / "cog_levels_mapping_file.pkl"):
        concepts = sorted({_text(concept) for concept in levels[level - 1]})
    files = read_pickle(folder / "cog_concepts_split_file.pkl")

    def split(part: str) -> Samples:
        samples = []
        for label, concept in enumerate(concepts):
            for name in sorted(map(_text, files[concept][part])):  # the suite sorts them too
                _inside(folder, name.lstrip("/"))
                samples.append((_inside(folder / "images", f"{concept}/{name.rpartition('/')[2]}"), label))
        return samples

    with _as_published(folder / "cog_concepts_split_file.pkl"):
        return split("train"), split("test"), len(concepts)
