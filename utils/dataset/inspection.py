"""The state of a dataset folder: what is done, missing, damaged or foreign, by sizes or hashes. Imports no torch."""

import datetime
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from msgspec import Struct
from tqdm import tqdm

from utils.cli import UserError, few
from utils.dataset.folder import PROMPTS, ClassFolder, Dataset, way_back
from utils.storage import AlreadyOwned, sha256_file

WINDOW_S = 600  # before the newest image, in which images are counted for the rate


class ClassState(Struct):
    """Indices of one class by state, and names of files that do not belong."""

    id: str
    count: int
    missing: list[int] = []  # no line or no file
    damaged: list[int] = []  # another size, or hash, than the line says
    foreign: list[str] = []
    times: list[float] = []  # modification times of the images done, seconds since the epoch

    @property
    def done(self) -> int:
        return len(self.times)


def inspect(folder: ClassFolder, hashes: bool = False) -> ClassState:
    """The state of one class by names and sizes; with HASHES every byte is read."""
    files, entries, state = folder.files(), folder.entries(), ClassState(folder.id, folder.count)
    for index in range(folder.count):
        stat, entry = files.pop(folder.name(index), None), entries.get(index)
        if entry is None or stat is None:
            state.missing.append(index)
        elif stat.st_size != entry["bytes"] or (hashes and not _same_hash(folder.path(index), entry["sha256"])):
            state.damaged.append(index)
        else:
            state.times.append(stat.st_mtime)
    state.foreign = sorted(files)
    return state


def _same_hash(path: Path, sha256: str) -> bool:
    try:
        return sha256_file(path) == sha256
    except OSError:  # unreadable: a failing disk, or gone meanwhile
        return False


def foreign_classes(dataset: Dataset) -> list[str]:
    """Names in OUT/train that are no class of the dataset: ImageFolder would count them as classes."""
    train = dataset.root / "train"
    names = {name for name in os.listdir(train) if not name.startswith(".")} if train.is_dir() else set()
    return sorted(names - {folder.id for folder in dataset.folders})


def refuse_foreign_folder(root: Path) -> None:
    """UserError if ROOT holds files but no dataset.json: somebody else's folder, or a dataset that has lost it."""
    if root.exists() and not root.is_dir():
        raise UserError(f"--out {root} is a file; name a folder")
    names = os.listdir(root) if root.is_dir() else []
    ours = ("lost+found", "dataset.json", PROMPTS)  # prompts alone: killed before dataset.json was written
    foreign = [name for name in names if not name.startswith(".") and name not in ours]
    if foreign and not (root / "dataset.json").exists():
        remedy = way_back(root, "choose an empty or new folder")
        raise UserError(f"--out {root} holds {foreign[0]!r} but no dataset.json; {remedy}")


def images_per_second(times: list[float]) -> tuple[float, float]:
    """(images/s, seconds since the last image) of all processes, from the modification TIMES of the last WINDOW_S."""
    if not times:
        return 0.0, float("inf")
    newest = max(times)
    recent = [moment for moment in times if moment > newest - WINDOW_S]
    span = newest - min(recent)
    return (len(recent) - 1) / span if span > 0 else 0.0, time.time() - newest


# ===== what generate.py prints of it =====


def show_status(dataset: Dataset, folders: list[ClassFolder]) -> None:
    """Print one line a class that is not complete, totals, and the time left from the ages of the files."""
    states = [inspect(folder) for folder in folders]
    for state in states:
        if state.done < state.count:
            lost = f"{len(state.missing)} missing, {len(state.damaged)} damaged"
            print(f"{state.id}: {state.done} of {state.count} done, {lost}")
    complete = sum(state.done == state.count for state in states)
    done, missing, damaged = (sum(len(getattr(s, part)) for s in states) for part in ("times", "missing", "damaged"))
    print(f"{dataset.root}: {done} of {done + missing + damaged} images done, {missing} missing, {damaged} damaged")
    print(f"classes: {complete} of {len(states)} complete")
    report_foreign(dataset, states)
    rate, age = images_per_second([moment for state in states for moment in state.times])
    if missing + damaged and rate:
        rest = datetime.timedelta(seconds=round((missing + damaged) / rate))
        pace = "newest image" if age < 1800 else "idle: newest image"
        print(f"{pace} {age:.0f} s old; at its last {rate:.2f} images/s the rest takes {rest}")


def verify(dataset: Dataset, folders: list[ClassFolder]) -> int:
    """Read every byte, print what is damaged or missing, return how many images are."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing frees Python's lock
        checked = pool.map(lambda folder: inspect(folder, hashes=True), folders)
        states = list(tqdm(checked, total=len(folders), unit="class", desc="verify"))
    for state in states:
        for word, indices in (("damaged", state.damaged), ("missing", state.missing)):
            if indices:
                print(f"{state.id}: {len(indices)} {word}: {few(indices, 8)}")
    bad = sum(len(state.damaged) + len(state.missing) for state in states)
    print(f"{dataset.root}: {sum(state.done for state in states)} images are as their manifests say, {bad} are not")
    report_foreign(dataset, states)
    return bad


def report_foreign(dataset: Dataset, states: list[ClassState]) -> None:
    """Warn of files and folders in OUT/train that are none of the dataset's."""
    for state in states:
        if state.foreign:
            print(f"warning: {state.id} holds files of other origin: {', '.join(state.foreign[:5])}", file=sys.stderr)
    if strangers := foreign_classes(dataset):
        print(f"warning: no class of this dataset, but in train/: {', '.join(strangers[:5])}", file=sys.stderr)


def repair(folders: list[ClassFolder]) -> None:
    """Strike what is damaged or missing from the manifests of FOLDERS, so that its batches are drawn again."""
    for folder in folders:
        try:
            with folder.lock():
                state = inspect(folder, hashes=True)
                if lost := {*state.damaged, *state.missing}:
                    print(f"{state.id}: {len(state.damaged)} damaged, {len(state.missing)} missing: to be drawn again")
                    folder.rewrite({index: one for index, one in folder.entries().items() if index not in lost})
        except AlreadyOwned:
            print(f"{folder.id}: being drawn by another process, not verified", file=sys.stderr)
