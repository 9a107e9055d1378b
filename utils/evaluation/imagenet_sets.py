"""The ImageNet family of test sets: where each lies, how its folders are read, and which answers count as right.

A set is one row of DATASETS. Everything is keyed by WordNet id, so that no set's own folder order can shift labels.
Nothing here imports torch: listing and checking datasets is instant.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

import numpy as np

from utils.classes import load_classes
from utils.cli import UserError
from utils.evaluation.transfer_sets import read_mat
from utils.images import IMAGE_SUFFIXES, list_image_folder
from utils.storage import read_json

INDICES = Path(__file__).resolve().parent / "indices"


class NoSharedClass(UserError):
    """The set and the model have no class in common."""


@dataclass(frozen=True)
class LoadedSet:
    """A set on disk. `samples` holds (path, index into class_ids)."""

    name: str
    class_ids: list[str]
    samples: list[tuple[str, int]]
    answers: list[tuple[str, ...]] = field(default_factory=list)  # class -> model classes that count; [] = itself
    sample_answers: list[tuple[str, ...]] = field(default_factory=list)  # the same per image (ReaL); [] = by class
    masked: bool = False  # compare the set's classes only, as its authors do
    border: int = 0  # pixels to cut off every side before anything else

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the images and of their right answers: a corrected label file gives other results."""
        from utils.evaluation.features import fingerprint

        labels = [label for _, label in self.samples]
        facts = [fingerprint(self.samples), self.class_ids, labels, self.answers, self.sample_answers, self.masked]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


@dataclass(frozen=True)
class TestSet:
    """One row: how to get the set, what lies where, and the counts that a right copy has."""

    __test__ = False  # not a pytest class

    where: str
    layout: str  # below --data-root
    folders: tuple[str, ...]  # tried in this order below --data-root
    classes: int
    images: tuple[int, int]  # lowest and highest count of a right copy
    read: Callable[[str, Path, Path], LoadedSet]  # (name, folder, data root)
    beside: str = ""  # what must lie beside the folder
    note: str = ""
    group: str = "imagenet"

    @property
    def counts(self) -> str:
        low, high = self.images
        images = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        return f"{images} images of {self.classes} classes" + (f"; {self.note}" if self.note else "")


@dataclass(frozen=True)
class MatchedSet:
    """A set seen by one model: images of classes it knows, and right answers as columns of its logits."""

    samples: list[tuple[str, int]]  # (path, index into class_ids)
    class_ids: list[str]
    columns: np.ndarray  # logits to compare, ascending
    labels: np.ndarray  # (N,) index into columns, or (N, len(columns)) bool where several answers are right
    classes_in_set: int
    images_in_set: int
    border: int

    @property
    def single_answer(self) -> bool:
        return self.labels.ndim == 1


def match(loaded: LoadedSet, model_ids: Sequence[str]) -> MatchedSet:
    """Cut LOADED to the classes the model knows; UserError if it knows none.

    A masked set (ImageNet-R, -A) also cuts the model to the classes of the set: with a 100-class model both become
    the classes they share.
    """
    position = {class_id: column for column, class_id in enumerate(model_ids)}
    answers = loaded.answers or [(class_id,) for class_id in loaded.class_ids]
    known = [tuple(position[a] for a in accepted if a in position) for accepted in answers]
    if loaded.sample_answers:
        by_sample = [tuple(position[a] for a in accepted if a in position) for accepted in loaded.sample_answers]
        # An image whose own class the model lacks stays out, even if one of its other labels is known.
        kept = [
            (path, label, right)
            for (path, label), right in zip(loaded.samples, by_sample, strict=True)
            if right and known[label]
        ]
    else:
        kept = [(path, label, known[label]) for path, label in loaded.samples if known[label]]
    if not kept:
        raise NoSharedClass(
            f"{loaded.name}: no class of the set ({_few(loaded.class_ids)}) is one of the model's {len(model_ids)} "
            f"({_few(list(model_ids))}); give the model's class ids in order with --classes"
        )
    labels_seen = sorted({label for _, label, _ in kept})
    renumbered = {label: index for index, label in enumerate(labels_seen)}
    columns = np.arange(len(model_ids))
    if loaded.masked:
        columns = np.array(sorted({column for label in labels_seen for column in known[label]}))
    place = {int(column): index for index, column in enumerate(columns)}
    if all(len(right) == 1 for _, _, right in kept):
        labels = np.array([place[right[0]] for _, _, right in kept])
    else:
        labels = np.zeros((len(kept), len(columns)), dtype=bool)
        for row, (_, _, right) in enumerate(kept):
            labels[row, [place[column] for column in right]] = True
    return MatchedSet(
        samples=[(path, renumbered[label]) for path, label, _ in kept],
        class_ids=[loaded.class_ids[label] for label in labels_seen],
        columns=columns,
        labels=labels,
        classes_in_set=len(loaded.class_ids),
        images_in_set=len(loaded.samples),
        border=loaded.border,
    )


def load(name: str, data_root: str | Path) -> LoadedSet:
    """Read a set of DATASETS and check its counts. UserError if it is absent or is not a right copy."""
    row, data_root = DATASETS[name], Path(data_root)
    folder = _folder(row, data_root)
    if folder is None:
        raise UserError(f"{name}: not found below {data_root} (--data-root); expected {row.layout}. {row.where}")
    loaded = row.read(name, folder, data_root)
    low, high = row.images
    if len(loaded.class_ids) != row.classes or not low <= len(loaded.samples) <= high:
        wanted = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        raise UserError(
            f"{name}: {folder} has {len(loaded.samples):,} images of {len(loaded.class_ids)} classes; a right copy has "
            f"{wanted} of {row.classes}. Unpack it again. {row.where}"
        )
    return loaded


def load_folder(name: str, folder: str | Path) -> LoadedSet:
    """`--test NAME=DIR`: any folder of DIR/<class id>/<images>."""
    class_ids, samples = list_image_folder(folder, option=f"--test {name}")
    return LoadedSet(name, class_ids, samples)


def found(name: str, data_root: str | Path) -> tuple[bool, str]:
    """(is it there, where or what is expected). Looks at names only: counting 50,000 files takes a while."""
    row = DATASETS[name]
    folder = _folder(row, Path(data_root))
    return (True, str(folder)) if folder else (False, f"expected {data_root}/{row.layout}")


def _folder(row: TestSet, data_root: Path) -> Path | None:
    folders = (data_root / folder for folder in row.folders)
    return next((folder for folder in folders if folder.is_dir() and (folder.parent / row.beside).exists()), None)


@cache
def imagenet_ids() -> tuple[str, ...]:
    """The 1000 wnids in ImageNet's label order, which is their sorted order."""
    return tuple(load_classes("imagenet_1k").ids)


@cache
def read_index(name: str) -> tuple[tuple[str, ...], ...]:
    """Rows of utils/evaluation/indices/NAME, split at blanks; lines starting with # are notes."""
    lines = (INDICES / name).read_text().splitlines()
    return tuple(tuple(line.split()) for line in lines if line.strip() and not line.startswith("#"))


# ===== readers, one per layout =====


def read_wnid_folders(name: str, folder: Path, data_root: Path) -> LoadedSet:
    """FOLDER/<wnid>/<images>: the wnids must be ImageNet's."""
    class_ids, samples = list_image_folder(folder, option=name)
    strangers = sorted(set(class_ids) - set(imagenet_ids()))
    if strangers:
        raise UserError(f"{name}: {folder} has folders that are no ImageNet class ({_few(strangers)}); remove them")
    return LoadedSet(name, class_ids, samples)


def read_val(name: str, folder: Path, data_root: Path) -> LoadedSet:
    """IN-Val: folders of wnids, or the 50,000 flat files as the tar holds them plus the devkit's ground truth."""
    flat = sorted(entry.name for entry in os.scandir(folder) if entry.name.startswith("ILSVRC2012_val_"))
    if not flat:
        return read_wnid_folders(name, folder, data_root)
    wnids = read_devkit(name, folder, data_root)
    if len(wnids) != len(flat):
        raise UserError(
            f"{name}: {folder} has {len(flat):,} images but the devkit has {len(wnids):,} labels; unpack both again"
        )
    class_ids = sorted(set(wnids))
    position = {wnid: label for label, wnid in enumerate(class_ids)}
    samples = []
    for file in flat:
        number = _val_number(file)
        if not 1 <= number <= len(wnids):
            raise UserError(f"{name}: {folder / file} is not one of the {len(wnids):,} validation files; remove it")
        samples.append((f"{folder}/{file}", position[wnids[number - 1]]))
    return LoadedSet(name, class_ids, samples)


def read_devkit(name: str, folder: Path, data_root: Path) -> list[str]:
    """wnid of each validation file, in file order. The devkit counts classes 1..1000 in an order of its own."""
    places = [folder.parent / "ILSVRC2012_devkit_t12", data_root / "ILSVRC2012_devkit_t12"]
    devkit = next((place / "data" for place in places if (place / "data").is_dir()), None)
    if devkit is None:
        raise UserError(f"{name}: {folder} has no class folders; unpack ILSVRC2012_devkit_t12.tar.gz to {places[0]}")
    try:
        truth = (devkit / "ILSVRC2012_validation_ground_truth.txt").read_text().split()
        synsets = read_mat(devkit / "meta.mat", "synsets")
        # Rows are (ILSVRC2012_ID, WNID, words, gloss, num_children, ...); inner nodes of the hierarchy have children.
        wnid_of = {int(row[0]): str(row[1]) for row in synsets if int(row[4]) == 0}
        return [wnid_of[int(number)] for number in truth]
    except (OSError, KeyError, ValueError, IndexError) as error:
        raise UserError(f"{name}: {devkit} is not the ILSVRC2012 devkit ({error}); unpack it again") from None


def read_v2(name: str, folder: Path, data_root: Path) -> LoadedSet:
    """IN-v2: folders 0..999 are label numbers. Sorted as text ("10" before "2") only 12 labels would be right."""
    numbers = sorted(int(entry.name) for entry in os.scandir(folder) if entry.is_dir() and entry.name.isdigit())
    if numbers != list(range(len(imagenet_ids()))):
        raise UserError(f"{name}: {folder} must hold the folders 0 to 999 and has {len(numbers)} numbered ones")
    samples = [
        (f"{folder}/{number}/{file}", number)
        for number in numbers
        for file in sorted(os.listdir(folder / str(number)))
        if file.lower().endswith(IMAGE_SUFFIXES) and not file.startswith(".")
    ]
    return LoadedSet(name, list(imagenet_ids()), samples)


def read_subset(index: str) -> Callable[[str, Path, Path], LoadedSet]:
    """IN-R, IN-A: the folders must be the set's 200 classes, and the logits are cut to them before the argmax."""

    def read(name: str, folder: Path, data_root: Path) -> LoadedSet:
        loaded = read_wnid_folders(name, folder, data_root)
        wanted = [wnid for (wnid,) in read_index(index)]
        if wrong := set(loaded.class_ids) ^ set(wanted):
            raise UserError(f"{name}: {folder} is not this set: {len(wrong)} classes differ ({_few(sorted(wrong))})")
        return LoadedSet(name, loaded.class_ids, loaded.samples, masked=True)

    return read


def read_real(name: str, folder: Path, data_root: Path) -> LoadedSet:
    """ReaL: IN-Val's images with new labels, several per image. Entry i is file i + 1; those without label drop out."""
    path, ids = folder.parent / "real.json", imagenet_ids()
    labels = read_json(path)
    val = read_val(name, folder, data_root)
    samples, answers = [], []
    for file, label in val.samples:
        number = _val_number(file)
        if not 1 <= number <= len(labels):
            raise UserError(f"{name}: {path} has {len(labels):,} entries, none for {file}")
        if labels[number - 1]:
            samples.append((file, label))
            answers.append(tuple(ids[index] for index in labels[number - 1]))
    return LoadedSet(name, val.class_ids, samples, sample_answers=answers)


def read_objectnet(name: str, folder: Path, data_root: Path) -> LoadedSet:
    """ObjectNet: the 113 of its 313 classes that ImageNet has, by the mapping files beside its images.

    The authors do not mask: a prediction outside the 125 ImageNet classes that map to the 113 is wrong. The mapping
    is compared with the shipped one. A red border of 2 pixels keeps search engines from the images: it is cut off.
    """
    mappings = folder.parent / "mappings"
    folder_label = read_json(mappings / "folder_to_objectnet_label.json")
    label_names = read_json(mappings / "objectnet_to_imagenet_1k.json")
    row_of_output = read_json(mappings / "pytorch_to_imagenet_2012_id.json")
    try:
        names = (mappings / "imagenet_to_label_2012_v2").read_text(encoding="utf-8").splitlines()
        wnid_of = {names[row].strip(): imagenet_ids()[int(output)] for output, row in row_of_output.items()}
        class_ids = sorted(place for place, label in folder_label.items() if label in label_names)
        answers = [
            tuple(wnid_of[part.strip()] for part in label_names[folder_label[class_id]].split("; "))
            for class_id in class_ids
        ]
    except (OSError, KeyError, IndexError, ValueError, json.JSONDecodeError) as error:
        raise UserError(f"{name}: the files of {mappings} do not fit together ({error!r}); unpack them again") from None
    shipped: dict[str, list[str]] = {}
    for wnid, number in read_index("objectnet.txt"):
        shipped.setdefault(number, []).append(wnid)
    if {frozenset(wnids) for wnids in shipped.values()} != {frozenset(wnids) for wnids in answers}:
        raise UserError(f"{name}: {mappings} maps other classes than the authors' published mapping; unpack it again")
    samples = []
    for label, class_id in enumerate(class_ids):
        if not (folder / class_id).is_dir():
            raise UserError(f"{name}: {folder / class_id} is missing; unpack every part of the archive")
        files = sorted(os.listdir(folder / class_id))
        samples += [(f"{folder}/{class_id}/{file}", label) for file in files if file.lower().endswith(IMAGE_SUFFIXES)]
    return LoadedSet(name, class_ids, samples, answers=answers, border=2)


def _val_number(file: str) -> int:
    """ "ILSVRC2012_val_00000293.JPEG" -> 293."""
    try:
        return int(Path(file).stem.rsplit("_", 1)[1])
    except (IndexError, ValueError):
        raise UserError(f"{file} is not named like a validation file (ILSVRC2012_val_00000001.JPEG)") from None


def _few(ids: Sequence[str]) -> str:
    return ", ".join(ids[:3]) + (", ..." if len(ids) > 3 else "")


# Counts: each set's paper or archive. The order is that of the reports and of the radar plot.
DATASETS: dict[str, TestSet] = {
    "IN-Val": TestSet(
        where="Get it from image-net.org (ILSVRC2012_img_val.tar; account needed)",
        layout="imagenet/val/<wnid>/*.JPEG, or flat files there and imagenet/ILSVRC2012_devkit_t12/",
        folders=("imagenet/val", "IN-Val"),
        classes=1000,
        images=(50_000, 50_000),
        read=read_val,
    ),
    "IN-v2": TestSet(
        where="Get imagenetv2-matched-frequency.tar.gz: github.com/modestyachts/ImageNetV2",
        layout="imagenetv2-matched-frequency-format-val/<0..999>/*.jpeg",
        folders=("imagenetv2-matched-frequency-format-val", "imagenetv2-matched-frequency", "IN-v2"),
        classes=1000,
        images=(10_000, 10_000),
        read=read_v2,
        note="folders are label numbers",
    ),
    "IN-Sketch": TestSet(
        where="Get ImageNet-Sketch.zip: github.com/HaohanWang/ImageNet-Sketch",
        layout="sketch/<wnid>/*.JPEG",
        folders=("sketch", "imagenet-sketch", "IN-Sketch"),
        classes=1000,
        images=(50_000, 50_889),  # the paper says 50,000, the archive holds 50,889
        read=read_wnid_folders,
    ),
    "IN-R": TestSet(
        where="Get imagenet-r.tar: github.com/hendrycks/imagenet-r",
        layout="imagenet-r/<wnid>/*.jpg",
        folders=("imagenet-r", "IN-R"),
        classes=200,
        images=(30_000, 30_000),
        read=read_subset("imagenet_r.txt"),
        note="logits cut to its 200 classes",
    ),
    "IN-A": TestSet(
        where="Get imagenet-a.tar: github.com/hendrycks/natural-adv-examples",
        layout="imagenet-a/<wnid>/*.jpg",
        folders=("imagenet-a", "IN-A"),
        classes=200,
        images=(7_500, 7_500),
        read=read_subset("imagenet_a.txt"),
        note="logits cut to its 200 classes",
    ),
    "IN-ReaL": TestSet(
        where="Get real.json: github.com/google-research/reassessed-imagenet",
        layout="imagenet/val (as for IN-Val) and imagenet/real.json",
        folders=("imagenet/val", "IN-Val"),
        classes=1000,
        images=(46_837, 46_837),  # 3,163 of the 50,000 have no label
        read=read_real,
        beside="real.json",
        note="several answers are right",
    ),
    "ObjectNet": TestSet(
        where="Get objectnet-1.0.zip: objectnet.dev (test use only, see its licence)",
        layout="objectnet-1.0/images/<folder>/*.png and objectnet-1.0/mappings/",
        folders=("objectnet-1.0/images", "ObjectNet/images"),
        classes=113,
        images=(18_574, 18_574),  # of its 50,273, those whose class ImageNet has
        read=read_objectnet,
        beside="mappings",
        note="125 ImageNet classes answer for its 113",
    ),
}
