"""Readers of the ImageNet family of test sets: how each set's folders are read, and which answers count as right.

Which set is read by which function stands in catalog.py. Everything is keyed by WordNet id, so that no set's own folder
order can shift labels. Each reader takes the set's name (for messages), its folder and the folder of all datasets, and
raises UserError where the folder is not what the set's authors publish.
"""

import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

from utils.classes import load_classes, read_list
from utils.cli import UserError, few
from utils.evaluation.matching import LoadedSet
from utils.evaluation.transfer_sets import read_mat
from utils.images import IMAGE_SUFFIXES, list_image_folder
from utils.storage import MOST_JSON, read_json, read_regular

INDICES = Path(__file__).resolve().parent / "indices"


@cache
def imagenet_ids() -> tuple[str, ...]:
    """The 1000 wnids in ImageNet's label order, which is their sorted order."""
    return tuple(load_classes("imagenet_1k").ids)


@cache
def read_index(name: str) -> tuple[tuple[str, ...], ...]:
    """Rows of utils/evaluation/indices/NAME, split at blanks; lines starting with # are notes."""
    return tuple(tuple(entry.split()) for _, entry in read_list(INDICES / name))


def read_wnid_folders(name: str, folder: Path, data_root: Path) -> LoadedSet:
    """FOLDER/<wnid>/<images>: the wnids must be ImageNet's."""
    class_ids, samples = list_image_folder(folder, option=name)
    strangers = sorted(set(class_ids) - set(imagenet_ids()))
    if strangers:
        raise UserError(f"{name}: {folder} has folders that are no ImageNet class ({few(strangers)}); remove them")
    return LoadedSet(name, class_ids, samples)


def read_val(name: str, folder: Path, data_root: Path) -> LoadedSet:
    """IN-Val: folders of wnids, or the 50,000 flat files as the tar holds them plus the devkit's ground truth."""
    flat = sorted(entry.name for entry in os.scandir(folder) if entry.name.startswith("ILSVRC2012_val_"))
    if not flat:
        return read_wnid_folders(name, folder, data_root)
    wnids = read_devkit(name, folder, data_root)
    if len(wnids) != len(flat):
        lacks = f"{len(flat):,} images but the devkit has {len(wnids):,} labels"
        raise UserError(f"{name}: {folder} has {lacks}; unpack both again")
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
        truth = read_regular(devkit / "ILSVRC2012_validation_ground_truth.txt", MOST_JSON).decode().split()
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
            raise UserError(f"{name}: {folder} is not this set: {len(wrong)} classes differ ({few(sorted(wrong))})")
        return LoadedSet(name, loaded.class_ids, loaded.samples, masked=True)

    return read


def read_real(name: str, folder: Path, data_root: Path) -> LoadedSet:
    """ReaL: IN-Val's images with new labels, several per image. Entry i is file i + 1; those without label drop out."""
    path, ids = folder.parent / "real.json", imagenet_ids()
    labels = read_json(path, list[list[int]])
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
        names = read_regular(mappings / "imagenet_to_label_2012_v2", MOST_JSON).decode().splitlines()
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
