"""The state of a dataset folder: what is done, missing, damaged or foreign, by sizes or by hashes. Imports no torch."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from utils.dataset.folder import ClassFolder, Dataset
from utils.storage import sha256_file


@dataclass
class ClassState:
    """Indices of one class by state, and names of files that do not belong."""

    id: str
    count: int
    done: int
    missing: list[int]  # no line or no file
    damaged: list[int]  # another size, or hash, than the line says
    foreign: list[str]
    times: list[float]  # modification times of the images done, seconds since the epoch


def inspect(folder: ClassFolder, hashes: bool = False) -> ClassState:
    """The state of one class by names and sizes; with HASHES every byte is read."""
    files, entries = folder.files(), folder.entries()
    missing, damaged, times = [], [], []
    for index in range(folder.count):
        path = folder.path(index)
        stat, entry = files.pop(path.name, None), entries.get(index)
        if entry is None or stat is None:
            missing.append(index)
        elif stat.st_size != entry["bytes"] or (hashes and not _same_hash(path, entry["sha256"])):
            damaged.append(index)
        else:
            times.append(stat.st_mtime)
    return ClassState(folder.id, folder.count, len(times), missing, damaged, sorted(files), times)


def _same_hash(path: Path, sha256: str) -> bool:
    try:
        return sha256_file(path) == sha256
    except OSError:  # unreadable: a failing disk, or gone meanwhile
        return False


def inspect_all(folders: Iterable[ClassFolder], hashes: bool = False) -> Iterator[ClassState]:
    """inspect() of every class, in order, in parallel where bytes are read (hashing frees Python's lock)."""
    if not hashes:
        yield from map(inspect, folders)
        return
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(lambda folder: inspect(folder, hashes=True), folders)


def foreign_classes(dataset: Dataset) -> list[str]:
    """Names in OUT/train that are no class of the dataset: ImageFolder would count them as classes."""
    try:
        names = {entry.name for entry in os.scandir(dataset.root / "train") if not entry.name.startswith(".")}
    except FileNotFoundError:
        return []
    return sorted(names - {folder.id for folder in dataset.folders})


def drop_damaged(folder: ClassFolder, state: ClassState) -> None:
    """Strike damaged and missing images from the manifest, so that their batches count as not drawn."""
    entries = folder.entries()
    for index in [*state.damaged, *state.missing]:
        entries.pop(index, None)
    folder.rewrite(entries)


def images_per_second(times: list[float], window_s: float = 600) -> tuple[float, float]:
    """(images/s, seconds since the last image) from modification times: the rate of all processes, as files show it.

    The rate is that of the last WINDOW_S seconds before the newest image.
    """
    if not times:
        return 0.0, float("inf")
    newest = max(times)
    recent = [moment for moment in times if moment > newest - window_s]
    span = newest - min(recent)
    return (len(recent) - 1) / span if span > 0 else 0.0, time.time() - newest
