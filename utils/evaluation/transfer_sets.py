"""The fifteen transfer datasets: where each lies, how its official split is read, and the counts of a right copy.

A dataset is one row of DATASETS. The counts are those of the authors' transfer suite; a copy that differs is refused,
because its numbers could not be compared. Nothing here imports torch. torchvision's loaders know these layouts too, but
some check every file, mix train with val, or have no split; the annotation files are short, so they are read here, the
same way for all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from utils.cli import UserError
from utils.evaluation import pickles
from utils.images import list_image_folder
from utils.storage import read_json

Samples = list[tuple[str, int]]  # (path, label)
EUROSAT_TEST = 810  # test images a class (t-ReX's suite)
EUROSAT_SEED = "imagenet-sd EuroSAT split 0"  # the suite's shuffle is unseeded: this one is ours, fixed for ever


@dataclass(frozen=True)
class TransferSet:
    """One row: how to get the set, what lies where, its counts, the reader (folder) -> (trainval, test, classes)."""

    where: str
    layout: str  # below --data-root
    folders: tuple[str, ...]  # tried in this order below --data-root
    markers: tuple[str, ...]  # one of these files or folders is in it
    classes: int
    trainval: int
    test: int
    read: Callable[[Path], tuple[Samples, Samples, int]]
    group: str = "small"

    @property
    def counts(self) -> str:
        return f"{self.trainval:,} trainval and {self.test:,} test images of {self.classes:,} classes"


@dataclass(frozen=True)
class LoadedTransfer:
    """A dataset on disk: splits "trainval" and "test" of (path, label of 0..num_classes-1)."""

    name: str
    splits: dict[str, Samples]
    num_classes: int

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the images of each split and their labels. UserError naming images that are missing."""
        from utils.evaluation.features import fingerprint

        digest = hashlib.sha256()
        for split, samples in self.splits.items():
            labels = ",".join(str(label) for _, label in samples)
            try:
                images = fingerprint(samples)
            except UserError:
                self._refuse_missing()  # looked for only now: asking for a million files twice takes minutes
                raise
            digest.update(f"{split}\0{images}\0{labels}\n".encode())
        return digest.hexdigest()

    def _refuse_missing(self) -> None:
        paths = [path for samples in self.splits.values() for path, _ in samples]
        if missing := [path for path in paths if not Path(path).is_file()]:
            few = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise UserError(
                f"{self.name}: {len(missing):,} of {len(paths):,} images are missing ({few}); unpack it again"
            )


def load(name: str, data_root: str | Path) -> LoadedTransfer:
    """Read a set of DATASETS and check its counts. UserError if it is absent or is not a right copy."""
    row = DATASETS[name]
    folder = _folder(row, Path(data_root))
    if folder is None:
        raise UserError(f"{name}: not found below {data_root} (--data-root); expected {row.layout}. {row.where}")
    try:
        trainval, test, classes = row.read(folder)
    except OSError as error:
        raise UserError(f"{name}: cannot read {error.filename} ({error.strerror}); expected {row.layout}") from None
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise UserError(
            f"{name}: the annotations below {folder} are not as published ({error!r}); get it again"
        ) from None
    counts = (len(trainval), len(test), classes)
    if counts != (row.trainval, row.test, row.classes):
        raise UserError(
            f"{name}: {folder} has {counts[0]:,} trainval and {counts[1]:,} test images of {classes:,} classes; a "
            f"right copy has {row.counts}. Unpack it again. {row.where}"
        )
    if strays := {label for _, label in trainval + test} - set(range(classes)):
        raise UserError(
            f"{name}: the annotations below {folder} have {len(strays)} labels outside of its {classes:,} classes; "
            f"get it again. {row.where}"
        )
    return LoadedTransfer(name, {"trainval": trainval, "test": test}, classes)


def found(name: str, data_root: str | Path) -> tuple[bool, str]:
    """(is it there, where or what is expected). Looks at names only."""
    row = DATASETS[name]
    folder = _folder(row, Path(data_root))
    return (True, str(folder)) if folder else (False, f"expected {data_root}/{row.layout}")


def _folder(row: TransferSet, data_root: Path) -> Path | None:
    folders = (data_root / folder for folder in row.folders)
    return next((folder for folder in folders if any((folder / marker).exists() for marker in row.markers)), None)


def _inside(folder: Path, name: str) -> str:
    """FOLDER/NAME, where NAME comes from an annotation file and must not lead out of the folder."""
    if not name or name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise UserError(
            f"{folder}: an annotation names the file {name!r}, which is outside of the dataset; get it again"
        )
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
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


# ===== readers, one per layout =====


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
        trainval, test = (
            [
                (_inside(folder, str(row["relative_im_path"])), int(row["class"]) - 1)
                for row in rows
                if row["test"] == part
            ]
            for part in (0, 1)
        )
    else:
        trainval, test = (
            [
                (_inside(folder / images, str(row["fname"])), int(row["class"]) - 1)
                for row in read_mat(next(path for path in places if path.exists() or path == places[-1]), "annotations")
            ]
            for images, places in (
                ("cars_train", [folder / "devkit/cars_train_annos.mat"]),
                (
                    "cars_test",
                    [folder / "cars_test_annos_withlabels.mat", folder / "devkit/cars_test_annos_withlabels.mat"],
                ),
            )
        )
    return trainval, test, len({label for _, label in trainval + test})


def read_mat(path: Path, key: str) -> Any:
    """Variable KEY of a MATLAB file. scipy reads numbers and text only: nothing in it is run."""
    from scipy.io import loadmat

    if not path.exists():
        raise FileNotFoundError(2, "no such file", str(path))
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


def _by_folder_name(images: Path, trainval: list[str], test: list[str]) -> tuple[Samples, Samples, int]:
    label = _labels(_class_of(name) for name in trainval + test)
    return (
        [(_inside(images, name), label[_class_of(name)]) for name in trainval],
        [(_inside(images, name), label[_class_of(name)]) for name in test],
        len(label),
    )


def _class_of(name: str) -> str:
    """`a/abbey/sun_1.jpg` -> `a/abbey`."""
    return name.rpartition("/")[0]


def _labels(names: Iterable[str]) -> dict[str, int]:
    return {name: index for index, name in enumerate(sorted(set(names)))}


def read_eurosat(folder: Path) -> tuple[Samples, Samples, int]:
    """No official split: the 810 images of each class whose hash with EUROSAT_SEED comes first are the test half.

    A hash of the name rather than a stored list: the same split for ever, on any machine and in any listing order.
    """
    class_ids, samples = list_image_folder(folder, option="EuroSAT")
    by_class: list[Samples] = [[] for _ in class_ids]
    for sample in samples:
        by_class[sample[1]].append(sample)
    trainval: Samples = []
    test: Samples = []
    for members in by_class:
        members.sort(key=lambda sample: hashlib.sha256(f"{EUROSAT_SEED}/{Path(sample[0]).name}".encode()).digest())
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
    categories = sorted(known or {category for _, category in trainval + test})
    label = {category: index for index, category in enumerate(categories)}
    return (
        [(_inside(folder, name), label[category]) for name, category in trainval],
        [(_inside(folder, name), label[category]) for name, category in test],
        len(label),
    )


def read_cog(level: int, folder: Path) -> tuple[Samples, Samples, int]:
    """Two pickles: five lists of concepts (wnids), concept -> {"train", "test"} file lists. Labels: sorted concepts."""
    levels = pickles.load(folder / "cog_levels_mapping_file.pkl")
    with _as_published(folder / "cog_levels_mapping_file.pkl"):
        concepts = sorted({str(concept) for concept in levels[level - 1]})
    files = pickles.load(folder / "cog_concepts_split_file.pkl")

    def split(part: str) -> Samples:
        samples = []
        for label, concept in enumerate(concepts):
            for name in sorted(str(name) for name in files[concept][part]):  # the suite sorts them too
                _inside(folder, name.lstrip("/"))
                samples.append((_inside(folder / "images", f"{concept}/{name.rpartition('/')[2]}"), label))
        return samples

    with _as_published(folder / "cog_concepts_split_file.pkl"):
        return split("train"), split("test"), len(concepts)


def _inat_row(year: int, classes: int, trainval: int, test: int) -> TransferSet:
    return TransferSet(
        where=f"Get it from github.com/visipedia/inat_comp, {year}",
        layout=f"inat{year}/train_val{year}/... with train{year}.json and val{year}.json",
        folders=(f"inat{year}", f"iNat{year}"),
        markers=(f"train{year}.json",),
        classes=classes,
        trainval=trainval,
        test=test,
        read=partial(read_inat, year),
        group="inat",
    )


def _cog_row(level: int, trainval: int) -> TransferSet:
    return TransferSet(
        where="Get the two pickles: europe.naverlabs.com/cog-benchmark; the images: ImageNet-21K (image-net.org)",
        layout="cog/images/<wnid>/*.JPEG with cog_levels_mapping_file.pkl and cog_concepts_split_file.pkl",
        folders=("cog", "imagenet-cog"),
        markers=("cog_levels_mapping_file.pkl",),
        classes=1000,
        trainval=trainval,
        test=50_000,
        read=partial(read_cog, level),
        group="cog",
    )


# Counts: t-ReX's suite.
DATASETS: dict[str, TransferSet] = {
    "Aircraft": TransferSet(
        where="Get fgvc-aircraft-2013b.tar.gz: robots.ox.ac.uk/~vgg/data/fgvc-aircraft",
        layout="fgvc-aircraft-2013b/data/images/*.jpg with images_variant_{trainval,test}.txt",
        folders=("fgvc-aircraft-2013b/data", "aircraft/data", "aircraft"),
        markers=("images_variant_trainval.txt",),
        classes=100,
        trainval=6_667,
        test=3_333,
        read=read_aircraft,
    ),
    "Cars196": TransferSet(
        where="Get Stanford Cars (its first home is gone; copies: kaggle.com, search 'stanford cars dataset')",
        layout="stanford_cars/car_ims/*.jpg with cars_annos.mat, or cars_train/, cars_test/ and devkit/",
        folders=("stanford_cars", "cars196"),
        markers=("cars_annos.mat", "devkit"),
        classes=196,
        trainval=8_144,
        test=8_041,
        read=read_cars,
    ),
    "DTD": TransferSet(
        where="Get dtd-r1.0.1.tar.gz: robots.ox.ac.uk/~vgg/data/dtd",
        layout="dtd/images/<class>/*.jpg with labels/{train,val,test}1.txt",
        folders=("dtd", "dtd/dtd"),
        markers=("labels/train1.txt",),
        classes=47,
        trainval=3_760,
        test=1_880,
        read=read_dtd,
    ),
    "EuroSAT": TransferSet(
        where="Get EuroSAT.zip (RGB): github.com/phelber/EuroSAT",
        layout="eurosat/2750/<class>/*.jpg",
        folders=("eurosat/2750", "EuroSAT/2750", "eurosat", "EuroSAT"),
        markers=("AnnualCrop",),
        classes=10,
        trainval=18_900,
        test=8_100,
        read=read_eurosat,
    ),
    "Flowers": TransferSet(
        where="Get 102flowers.tgz, imagelabels.mat, setid.mat: robots.ox.ac.uk/~vgg/data/flowers/102",
        layout="flowers-102/jpg/*.jpg with imagelabels.mat and setid.mat",
        folders=("flowers-102", "flowers"),
        markers=("setid.mat",),
        classes=102,
        trainval=2_040,
        test=6_149,
        read=read_flowers,
    ),
    "Pets": TransferSet(
        where="Get images.tar.gz and annotations.tar.gz: robots.ox.ac.uk/~vgg/data/pets",
        layout="oxford-iiit-pet/images/*.jpg with annotations/{trainval,test}.txt",
        folders=("oxford-iiit-pet", "pets"),
        markers=("annotations/trainval.txt",),
        classes=37,
        trainval=3_680,
        test=3_669,
        read=read_pets,
    ),
    "Food101": TransferSet(
        where="Get food-101.tar.gz: data.vision.ee.ethz.ch/cvl/datasets_extra/food-101",
        layout="food-101/images/<class>/*.jpg with meta/{train,test}.txt",
        folders=("food-101", "food101"),
        markers=("meta/train.txt",),
        classes=101,
        trainval=75_750,
        test=25_250,
        read=read_food,
    ),
    "SUN397": TransferSet(
        where="Get SUN397.tar.gz and Partitions.zip: vision.princeton.edu/projects/2010/SUN",
        layout="SUN397/<letter>/<class>/*.jpg with ClassName.txt, Training_01.txt, Testing_01.txt (or in Partitions/)",
        folders=("SUN397",),
        markers=("Training_01.txt", "Partitions/Training_01.txt", "partitions/Training_01.txt"),
        classes=397,
        trainval=19_850,
        test=19_850,
        read=read_sun,
    ),
    "iNat2018": _inat_row(2018, 8_142, 437_513, 24_426),
    "iNat2019": _inat_row(2019, 1_010, 265_213, 3_030),
    "CoG-L1": _cog_row(1, 1_118_804),
    "CoG-L2": _cog_row(2, 1_115_788),
    "CoG-L3": _cog_row(3, 1_095_203),
    "CoG-L4": _cog_row(4, 1_107_128),
    "CoG-L5": _cog_row(5, 1_091_654),
}
