"""A synthetic dataset on disk: dataset.json, one manifest a class, image files; what is done, missing or damaged.

    OUT/dataset.json            recipe, model, classes, where it was made, counts
    OUT/manifest/<id>.jsonl     one line an image, sorted by index: id, index, prompt, seed, attempt, rejected, safety,
                                bytes, sha256
    OUT/train/<id>/<id>_<index:06d>.<suffix>
    OUT/sessions.jsonl          one line a finished process: images, seconds, images/s, micro_batch (denoised at once)
    OUT/.locks/                 empty files; flock marks the classes that a living process draws

An image counts as done when its manifest line is there and its file has the size the line says; --verify also compares
the hashes. Lines of a batch are written after its files, in one synced write: a kill leaves at worst files without a
line (drawn again, byte for byte) or half a last line (cut off). Imports no torch.
"""

from __future__ import annotations

import datetime
import errno
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from utils.cli import UserError
from utils.machine import snapshot
from utils.storage import (
    AlreadyOwned,
    append_jsonl,
    atomic_write,
    owner_lock,
    read_json,
    read_jsonl,
    write_json,
)

FORMAT = "imagenet-sd dataset 1"
SUFFIXES = {"jpg": ".jpg", "png": ".png", "webp": ".webp"}


@dataclass(frozen=True)
class Dataset:
    """A dataset folder and what its dataset.json says."""

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

    def path(self, index: int) -> Path:
        return self.images / f"{self.id}_{index:06d}{self.suffix}"

    def batches(self) -> list[range]:
        """The indices of each batch: cut at fixed positions within the class, whatever is already done."""
        return [
            range(start, min(start + self.batch_size, self.count)) for start in range(0, self.count, self.batch_size)
        ]

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Raises AlreadyOwned if a living process has the class; the kernel frees the lock of a dead one."""
        with owner_lock(self.root / ".locks" / f"{self.id}.lock"):
            yield

    def entries(self) -> dict[int, dict]:
        """{index: manifest line}, sorted; torn, foreign and surplus lines are left out, the last of two wins."""
        entries = {}
        for entry in read_jsonl(self.manifest):
            if not isinstance(entry, dict) or not entry.keys() >= {"id", "index", "bytes", "sha256"}:
                continue
            if entry["id"] == self.id and isinstance(entry["index"], int) and 0 <= entry["index"] < self.count:
                entries[entry["index"]] = entry
        return dict(sorted(entries.items()))

    def files(self) -> dict[str, os.stat_result]:
        """{file name: stat} of what lies in the class folder, temporary files left out."""
        try:
            with os.scandir(self.images) as found:
                return {entry.name: entry.stat() for entry in found if not entry.name.endswith(".tmp")}
        except FileNotFoundError:
            return {}

    def done(self) -> dict[int, dict]:
        """{index: manifest line} of the images whose file is there in full size."""
        files = self.files()
        entries = self.entries()
        return {
            index: entry
            for index, entry in entries.items()
            if (stat := files.get(self.path(index).name)) and stat.st_size == entry["bytes"]
        }

    def open_batches(self) -> list[range]:
        """Batches of which an image is missing or has another size: to be drawn, each as a whole."""
        done = self.done()
        return [batch for batch in self.batches() if not all(index in done for index in batch)]

    def prepare(self) -> None:
        """Make the folders; remove what a killed process left: temporary files and half lines."""
        self.images.mkdir(parents=True, exist_ok=True)
        self.manifest.parent.mkdir(exist_ok=True)
        for folder, pattern in ((self.images, ".*.tmp"), (self.manifest.parent, f".{self.manifest.name}.*.tmp")):
            for leftover in folder.glob(pattern):
                leftover.unlink(missing_ok=True)
        self.rewrite(self.entries())

    def rewrite(self, entries: dict[int, dict]) -> None:
        """Make ENTRIES the manifest, sorted by index; untouched if it says so already."""
        data = b"".join(as_line(entry) for _, entry in sorted(entries.items()))
        if data != (self.manifest.read_bytes() if self.manifest.exists() else b""):
            atomic_write(self.manifest, data, fsync=True)

    def commit(self, batch: list[dict]) -> None:
        """Record the entries of a batch whose files are written: appended, or merged if later ones are there."""
        size, last = self._end()
        if last >= batch[0]["index"]:
            self.rewrite(self.entries() | {entry["index"]: entry for entry in batch})
            return
        data = b"".join(map(as_line, batch))
        descriptor = os.open(self.manifest, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            if os.write(descriptor, data) != len(data):
                os.ftruncate(descriptor, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.manifest))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _end(self) -> tuple[int, int]:
        """(bytes of the manifest, index of its last line or -1): reads the end only, as a class may be large."""
        try:
            with open(self.manifest, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - 65536))  # a line is a few hundred bytes
                lines = file.read().splitlines()
        except FileNotFoundError:
            return 0, -1
        return size, json.loads(lines[-1])["index"] if lines else -1


def in_chunk(items: list, chunk: tuple[int, int] | None) -> list:
    """Every Nth item from the Ith: the N chunks share the items without overlap, equal to within one."""
    part, parts = chunk or (0, 1)
    return items[part::parts]


def as_line(entry: dict) -> bytes:
    return (json.dumps(entry, ensure_ascii=False) + "\n").encode()


# ===== dataset.json =====


def open_dataset(root: str | Path) -> Dataset:
    """The dataset in ROOT; UserError if there is none."""
    root = Path(root)
    path = root / "dataset.json"
    if not path.is_file():
        raise UserError(f"--out {root}: no dataset here (no dataset.json); draw one first, or name its folder")
    info = read_json(path)
    if not isinstance(info, dict) or info.get("format") != FORMAT or not {"recipe", "classes", "model"} <= info.keys():
        raise UserError(f"--out {root}: dataset.json was not written by this version; choose another --out")
    return Dataset(root, info)


def known_images(root: Path) -> Iterator[tuple[str, dict[str, str]]] | None:
    """(class id, {file name: sha256}) of each class of the dataset in ROOT, by its manifests; None if there is none."""
    if not (root / "dataset.json").is_file() or not (root / "manifest").is_dir():
        return None
    return (
        (folder.id, {folder.path(index).name: entry["sha256"] for index, entry in folder.entries().items()})
        for folder in open_dataset(root).folders
    )


def refuse_foreign_folder(root: Path) -> None:
    """UserError if ROOT holds files but no dataset.json: someone else's folder, or a dataset without its passport."""
    if not root.exists():
        return
    if not root.is_dir():
        raise UserError(f"--out {root} is a file; name a folder")
    foreign = [
        entry.name for entry in os.scandir(root) if not entry.name.startswith(".") and entry.name != "lost+found"
    ]
    if foreign and "dataset.json" not in foreign:
        raise UserError(f"--out {root} holds {foreign[0]!r} but no dataset.json; choose an empty or new folder")


def create_dataset(root: Path, info: dict[str, Any]) -> Dataset:
    """Write dataset.json, or let the dataset there grow to the images of INFO if nothing else of its recipe differs.

    Returns what is there then: another process may have been first.
    """
    (root / ".locks").mkdir(parents=True, exist_ok=True)
    with waiting_lock(root / ".locks" / "dataset.lock"):
        if not (root / "dataset.json").exists():
            write_json(root / "dataset.json", {"format": FORMAT, **info})
        dataset = open_dataset(root)
        larger = enlarged(dataset, info)
        same = all(
            larger.recipe.get(key, value) == value for key, value in info["recipe"].items() if key != "attention"
        )
        if same and larger is not dataset:
            write_json(root / "dataset.json", larger.info)
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
    with waiting_lock(dataset.root / ".locks" / "dataset.lock"):
        info = read_json(dataset.root / "dataset.json")
        here: dict | str = snapshot()
        if here == info["environment"]:
            here = "as in dataset.json"
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        if session["images"]:
            append_jsonl(dataset.root / "sessions.jsonl", {"time": now, **session, "environment": here})
        counts = count_images(dataset)
        info["counts"] = counts
        if counts["images"] == counts["wanted"]:
            info.setdefault("completed", now)
        sessions = read_jsonl(dataset.root / "sessions.jsonl")
        seconds, images = (sum(line[key] for line in sessions) for key in ("seconds", "images"))
        info["time"] = {
            "process_seconds": round(seconds, 1),  # of processes that ended by themselves; a killed one leaves none
            "images_drawn": images,
            "images_per_s_per_process": round(images / seconds, 3) if seconds else None,
        }
        write_json(dataset.root / "dataset.json", info)
    return counts


def count_images(dataset: Dataset) -> dict[str, Any]:
    """Totals of the manifests: images, what was rejected on the way and why, what the safety checker flagged."""
    images, flagged = 0, 0
    redrawn: dict[str, int] = {}
    for folder in dataset.folders:
        try:
            lines = folder.manifest.read_bytes().splitlines()
        except FileNotFoundError:
            continue
        images += len(lines)
        for line in lines:
            # Only the rare lines are parsed: a million of the others take a second this way.
            if b'"rejected": []' in line and b'"safety": true' not in line:
                continue
            try:
                entry = json.loads(line)
            except ValueError:  # half a line: its writer is at work or was killed
                images -= 1
                continue
            flagged += entry["safety"] is True
            for reason in entry["rejected"]:
                redrawn[reason] = redrawn.get(reason, 0) + 1
    return {"wanted": dataset.images, "images": images, "redrawn": redrawn, "safety_flagged": flagged}


@contextmanager
def waiting_lock(path: Path) -> Iterator[None]:
    """owner_lock that waits for its turn; what it guards takes moments."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            with owner_lock(path):
                yield
                return
        except AlreadyOwned:
            time.sleep(0.05)
