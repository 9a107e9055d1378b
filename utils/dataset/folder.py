"""A synthetic dataset on disk: dataset.json, one manifest a class, image files; what is done and what is open.

    OUT/dataset.json            recipe, model, classes, where it was made, counts; its copy is OUT/.dataset.json
    OUT/prompts.jsonl           where --prompts was given: the prompts of every class, whose hash the recipe records
    OUT/manifest/<id>.jsonl     one line an image, sorted by index: see records.Entry
    OUT/train/<id>/<id>_<index:06d>.<suffix>
    OUT/sessions.jsonl          one line a finished process: images, seconds, operations, joules, micro_batch ...
    OUT/.locks/                 empty files; flock marks the classes that a living process draws

An image counts as done when its manifest line is there and its file has the size the line says; --verify also compares
the hashes. Lines of a batch are written after its files, in one synced write: a kill leaves at worst files without a
line (drawn again, byte for byte) or half a last line (cut off). Imports no torch.
"""

from __future__ import annotations

import datetime
import json
import os
import shlex
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from stat import S_ISREG
from typing import Any

from msgspec.structs import asdict

from utils import storage
from utils.classes import ClassRow, ClassTable, images_per_class, safe_id
from utils.cli import UserError, safe_name
from utils.dataset.records import FORMAT, MOST_IMAGES, Entry, Record, SessionRecord
from utils.machine import add_costs, rounded_cost, snapshot

COPY = ".dataset.json"
PROMPTS = "prompts.jsonl"
SUFFIXES = {"jpg": ".jpg", "png": ".png", "webp": ".webp"}
TAIL = 1 << 18  # bytes at the end of a manifest that hold its last line: a prompt has at most some 12,000 characters


@dataclass(frozen=True)
class Dataset:
    """A dataset folder and what its dataset.json says, see records.Record."""

    root: Path
    info: dict[str, Any]

    @property
    def recipe(self) -> dict[str, Any]:
        return self.info["recipe"]

    @cached_property
    def folders(self) -> list[ClassFolder]:
        """One for each class, in label order."""
        suffix, batch = SUFFIXES[self.recipe["format"]], self.recipe["batch_size"]
        return [ClassFolder(self.root, row["id"], row["images"], suffix, batch) for row in self.info["classes"]]

    @cached_property
    def table(self) -> ClassTable:
        """The class table that it was drawn from."""
        keys = ("id", "name", "hypernym", "definition")
        return ClassTable(self.info["name"], tuple(ClassRow(*map(row.get, keys)) for row in self.info["classes"]))

    @property
    def images(self) -> int:
        return sum(folder.count for folder in self.folders)


@dataclass(frozen=True)
class ClassFolder:
    """The files of one class. Who writes here holds `lock()`."""

    root: Path
    id: str
    count: int  # images wanted
    suffix: str
    batch_size: int

    @property
    def images(self) -> Path:
        return self.root / "train" / self.id

    @property
    def manifest(self) -> Path:
        return self.root / "manifest" / f"{self.id}.jsonl"

    def name(self, index: int) -> str:
        return f"{self.id}_{index:06d}{self.suffix}"

    def path(self, index: int) -> Path:
        return self.images / self.name(index)

    def batches(self) -> list[range]:
        """The indices of each batch: cut at fixed positions within the class, whatever is already done."""
        size, count = self.batch_size, self.count
        return [range(start, min(start + size, count)) for start in range(0, count, size)]

    def lock(self) -> AbstractContextManager[None]:
        """Raises AlreadyOwned if a living process has the class; the kernel frees the lock of a dead one."""
        return storage.owner_lock(self.root / ".locks" / f"{self.id}.lock")

    def entries(self) -> dict[int, Any]:
        """{index: Entry}, sorted; torn, foreign and surplus lines are left out, the last of two wins."""
        lines = storage.read_jsonl(self.manifest, Entry)
        mine = {line["index"]: line for line in lines if line["id"] == self.id and 0 <= line["index"] < self.count}
        return dict(sorted(mine.items()))

    def files(self) -> dict[str, os.stat_result | None]:
        """{file name: stat} of the class folder without temporary files; None for what is no regular file."""
        found: dict[str, os.stat_result | None] = {}
        for entry in os.scandir(self.images) if self.images.is_dir() else ():
            if not entry.name.endswith(".tmp"):
                try:
                    status = entry.stat()
                except OSError:  # a dangling symlink, or gone meanwhile
                    status = None
                found[entry.name] = status if status and S_ISREG(status.st_mode) else None
        return found

    def done(self) -> dict[int, Any]:
        """{index: Entry} of the images whose file is there in full size."""
        files, entries = self.files(), self.entries()
        stats = {index: files.get(self.name(index)) for index in entries}
        return {index: entry for index, entry in entries.items() if (s := stats[index]) and s.st_size == entry["bytes"]}

    def open_batches(self) -> list[range]:
        """Batches of which an image is missing or has another size: to be drawn, each as a whole."""
        done = self.done()
        return [batch for batch in self.batches() if not all(index in done for index in batch)]

    def prepare(self) -> None:
        """Make the folders; remove what a killed process left: temporary files and half lines."""
        self.images.mkdir(parents=True, exist_ok=True)
        self.manifest.parent.mkdir(exist_ok=True)
        for leftover in [*self.images.glob(".*.tmp"), *self.manifest.parent.glob(f".{self.manifest.name}.*.tmp")]:
            leftover.unlink(missing_ok=True)
        self.rewrite(self.entries())

    def rewrite(self, entries: dict[int, Any]) -> None:
        """Make ENTRIES the manifest, sorted by index; untouched if it says so already."""
        lines = (json.dumps(entry, ensure_ascii=False) + "\n" for _, entry in sorted(entries.items()))
        data = "".join(lines).encode()  # as `append_jsonl` writes them
        if data != (self.manifest.read_bytes() if self.manifest.exists() else b""):
            storage.atomic_write(self.manifest, data, fsync=True)

    def commit(self, batch: list[Any]) -> None:
        """Record the entries of a batch whose files are written: appended, or merged if later ones are there."""
        if self._last_index() >= batch[0]["index"]:
            self.rewrite(self.entries() | {entry["index"]: entry for entry in batch})
        else:
            storage.append_jsonl(self.manifest, *batch, fsync=True)

    def _last_index(self) -> int:
        """The index of the manifest's last line, or -1: reads the end only, as a class may be large."""
        try:
            with open(self.manifest, "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
                lines = file.read().splitlines()
        except FileNotFoundError:
            return -1
        return json.loads(lines[-1])["index"] if lines else -1


def in_chunk(items: list, chunk: tuple[int, int] | None) -> list:
    """Every Nth item from the Ith: the N chunks share the items without overlap, equal to within one."""
    part, parts = chunk or (0, 1)
    return items[part::parts]


# ===== dataset.json =====


def open_dataset(root: str | Path) -> Dataset:
    """The dataset in ROOT. UserError if there is none, or dataset.json is not what generate.py wrote.

    Ids and names become paths, so they are checked here, where they enter.
    """
    root = Path(root)
    path, remedy = root / "dataset.json", way_back(root, "restore it from a copy")
    if not path.exists():
        what = way_back(root, "draw one first, or name its folder")
        raise UserError(f"--out {root}: no dataset here (no dataset.json); {what}")
    storage.read_json(path, Record, remedy)  # refuses what is of another type
    dataset = Dataset(root, storage.read_json(path))
    safe_name(dataset.info["name"], f"{path}, name")
    counts = {safe_id(folder.id, f"{path}, classes"): folder.count for folder in dataset.folders}
    known = len(counts) == len(dataset.folders) and dataset.table.sha256 == dataset.recipe["classes"]
    if not known or counts != images_per_class(dataset.table, dataset.recipe["images_per_class"]):
        raise UserError(f"--out {root}: dataset.json was changed: its classes are not those of its recipe; {remedy}")
    return dataset


def way_back(root: Path, otherwise: str) -> str:
    """What to do about a damaged or missing dataset.json: without it the images are of no known recipe."""
    command = shlex.join(["cp", str(root / COPY), str(root / "dataset.json")])
    return f"`{command}` brings it back" if (root / COPY).is_file() else otherwise


def record_lock(root: Path) -> AbstractContextManager[None]:
    """Waits for its turn to change dataset.json, which takes moments."""
    (root / ".locks").mkdir(parents=True, exist_ok=True)
    return storage.owner_lock(root / ".locks" / ".record.lock", wait=True)


def write_record(root: Path, info: dict[str, Any]) -> None:
    """dataset.json, and the copy that is the way back. The caller has the lock."""
    storage.write_json(root / "dataset.json", info)
    storage.write_json(root / COPY, info)


def known_images(root: Path) -> Iterator[tuple[str, dict[str, str]]] | None:
    """(class id, {file name: sha256}) of each class of the dataset in ROOT, by its manifests; None if there is none."""
    if not (root / "dataset.json").is_file() or not (root / "manifest").is_dir():
        return None
    return (
        (folder.id, {folder.name(index): entry["sha256"] for index, entry in folder.entries().items()})
        for folder in open_dataset(root).folders
    )


def create_dataset(root: Path, info: dict[str, Any], prompts: bytes = b"") -> Dataset:
    """Write dataset.json, or let the dataset there grow to the images of INFO if nothing else of its recipe differs.

    Returns what is there then: another process may have been first. PROMPTS: the content of OUT/prompts.jsonl, if any.
    """
    if any(row["images"] > MOST_IMAGES for row in info["classes"]):
        raise UserError(f"--images-per-class: more than {MOST_IMAGES:,} images of a class are not kept in one folder")
    with record_lock(root):
        storage.remove_leftovers(root)
        if not (root / "dataset.json").exists():
            if prompts:
                storage.atomic_write(root / PROMPTS, prompts, fsync=True)
            write_record(root, {"format": FORMAT, **info})
        dataset = open_dataset(root)
        larger = enlarged(dataset, info)
        wanted = {key: value for key, value in info["recipe"].items() if key != "attention"}
        if larger is not dataset and larger.recipe | wanted == wanted | larger.recipe:
            write_record(root, larger.info)
    return open_dataset(root)


def enlarged(dataset: Dataset, info: dict[str, Any]) -> Dataset:
    """DATASET as it is when it has grown to the images of INFO; itself if it has as many already."""
    classes = {row["id"]: row for row in info["classes"]}
    if all(classes.get(folder.id, {"images": 0})["images"] <= folder.count for folder in dataset.folders):
        return dataset
    recipe = dataset.recipe | {"images_per_class": info["recipe"]["images_per_class"]}
    grown = dataset.info | {"recipe": recipe, "classes": info["classes"], "command": info["command"]}
    grown.pop("completed", None)
    return Dataset(dataset.root, grown)


def record_session(dataset: Dataset, session: dict[str, Any]) -> dict[str, Any]:
    """Append SESSION to sessions.jsonl, bring the counts of dataset.json up to date and return them."""
    path = dataset.root / "sessions.jsonl"
    with record_lock(dataset.root):
        dataset = open_dataset(dataset.root)
        info, here = dataset.info, snapshot()
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        if session["images"]:
            known = "as in dataset.json" if here == info["environment"] else here
            storage.append_jsonl(path, {"time": now, **session, "environment": known})
        counts = info["counts"] = count_images(dataset)
        if counts["images"] == counts["wanted"]:
            info.setdefault("completed", now)
        sessions = storage.read_jsonl(path, SessionRecord)  # of processes that ended by themselves
        seconds, images = sum(line.seconds for line in sessions), sum(line.images for line in sessions)
        rate = round(images / seconds, 3) if seconds else None
        info["cost"] = rounded_cost(add_costs(*map(asdict, sessions)))
        info["cost"].pop("images", None)
        info["time"] = {"process_seconds": round(seconds, 1), "images_drawn": images, "images_per_s_per_process": rate}
        write_record(dataset.root, info)
    return counts


def count_images(dataset: Dataset) -> dict[str, Any]:
    """Totals over the images that are there: how many, what was rejected on the way and why, what is flagged."""
    images, flagged, redrawn = 0, 0, Counter[str]()
    for folder in dataset.folders:
        for entry in folder.done().values():
            images += 1
            flagged += entry.get("safety") is True
            redrawn.update(entry.get("rejected", []))
    return {"wanted": dataset.images, "images": images, "redrawn": dict(redrawn), "safety_flagged": flagged}
