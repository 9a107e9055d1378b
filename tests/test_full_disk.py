"""Disks that fill up in the middle, by bytes and by inodes: one line, code 2, nothing half-written, and the same end.

Each writer first runs on a disk with room, which tells what it needs; then on one with a share of that, which must stop
it; then room is made and the same command finishes. Needs root, to mount small file systems in memory.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.evaluation.test_evaluate import CLASSES, make_run
from tests.evaluation.test_evaluate import make_images as make_test_images
from tests.test_kills import Forker
from tests.tiny_sd import build_tiny_sd
from tests.training_runs import TINY, make_images
from utils.storage import append_jsonl

ROOMY = "size=64m,nr_inodes=5000"


class Disk:
    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        self.mount(ROOMY)

    def mount(self, options: str) -> None:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", self.path], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"mounting a small disk is not permitted here: {done.stderr.strip()}")

    def remount(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", self.path], check=True)

    def used(self) -> tuple[int, int]:
        """(KiB, inodes)."""
        found = os.statvfs(self.path)
        return (found.f_blocks - found.f_bfree) * found.f_frsize // 1024, found.f_files - found.f_ffree

    def empty(self) -> None:
        for entry in self.path.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def unmount(self) -> None:
        subprocess.run(["umount", "-l", self.path], check=True)


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    made = Disk(tmp_path_factory.mktemp("disk") / "small")
    yield made
    made.unmount()


@pytest.fixture(scope="module")
def forker():
    made = Forker()
    yield made
    made.process.stdin.close()
    made.process.wait(timeout=30)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """What the writers read lies on another disk."""
    folder = tmp_path_factory.mktemp("inputs")
    build_tiny_sd(folder / "tiny")
    make_images(folder / "shapes", {"n01": 20, "n02": 14})
    make_test_images(folder / "test", CLASSES)
    make_run(folder / "toy-seed0", CLASSES)
    for seed in range(2):
        row = {"model": "m", "dataset": "toys", "metric": "top1", "value": 50.0, "n": 28, "num_classes": 7}
        append_jsonl(folder / "results.jsonl", row | {"seed": seed, "source": "measured"})
    return folder


def drawing(inputs: Path, disk: Path) -> tuple:
    argv = ["--classes", "fashion", "--images-per-class", "4", "--steps", "2", "--batch-size", "2", "--seed", "1"]
    return "generate", [*argv, "--model", str(inputs / "tiny"), "--out", str(disk / "sd")], {}


def looking(option: str) -> Callable[[Path, Path], tuple]:
    return lambda inputs, disk: ("generate", ["--out", str(disk / "sd"), option], {})


def training(inputs: Path, disk: Path) -> tuple:
    argv = ["--data", str(inputs / "shapes"), "--out", str(disk / "run"), *TINY, "--epochs", "1"]
    return "train", argv, {}


def evaluation(inputs: Path, disk: Path) -> tuple:
    argv = ["--checkpoint", str(inputs / "toy-seed0"), "--test", f"toys={inputs / 'test'}", "--device", "cpu"]
    return "evaluate", [*argv, "--out", str(disk / "results")], {}


def report(inputs: Path, disk: Path) -> tuple:
    return "evaluate", ["--report", str(inputs / "results.jsonl"), "--out", str(disk / "report")], {}


# What is done, and what must lie on the disk before.
WRITERS: dict[str, tuple[Callable, list[Callable]]] = {
    "drawing": (drawing, []),
    "preview": (looking("--preview"), [drawing]),
    "pack": (looking("--pack"), [drawing]),
    "training": (training, []),
    "evaluation": (evaluation, []),
    "report": (report, []),
}
CALM: dict[str, tuple] = {}  # writer -> what is used before, used after, and the files, with room enough
CLOCK = {
    ".dataset.json",
    "sessions.jsonl",
    "log.jsonl",
    "dataset.json",
    "SHA256SUMS",  # of dataset.json too, which holds seconds
    "args.json",
    "checkpoint_previous.pth",
    "checkpoint.pth",
}


def content(disk: Path) -> dict[str, str]:
    """{file: hash}, without what holds times, or that the curves are drawn from."""
    return {
        str(path.relative_to(disk)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(disk.rglob("*"))
        if path.is_file() and path.name not in CLOCK and path.suffix not in (".lock", ".html", ".png")
        if path.parent.name not in ("eval", ".locks", "results")
    }


@pytest.mark.parametrize("kind,share", [("size", 0.2), ("size", 0.7), ("nr_inodes", 0.1), ("nr_inodes", 0.7)])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_stops_a_writer_and_room_lets_it_finish(writer, kind, share, disk, forker, inputs, tmp_path):
    act, before = WRITERS[writer]

    def begin() -> tuple[int, int]:
        disk.remount(ROOMY)
        disk.empty()
        for earlier in before:
            assert forker.run(earlier(inputs, disk.path))[0] == [0]
        return disk.used()

    if writer not in CALM:
        start = begin()
        assert forker.run(act(inputs, disk.path), said=tmp_path / "calm")[0] == [0], (tmp_path / "calm").read_text()
        CALM[writer] = start, disk.used(), content(disk.path)
    start, need, wanted = CALM[writer]
    assert wanted

    place = ("size", "nr_inodes").index(kind)
    free = round(share * (need[place] - start[place]))
    limit = begin()[place] + free
    disk.remount(f"size={limit}k" if kind == "size" else f"nr_inodes={limit}")
    codes, _ = forker.run(act(inputs, disk.path), said=tmp_path / "said")
    said = (tmp_path / "said").read_text()
    assert codes == [2] and "Traceback" not in said, said
    assert "the disk is full (" in said or "No space left on device" in said, said
    assert str(disk.path) in said.splitlines()[-1], said
    assert not [path for path in disk.path.rglob(".*.tmp")]

    disk.remount(ROOMY)
    assert forker.run(act(inputs, disk.path), said=tmp_path / "again")[0] == [0], (tmp_path / "again").read_text()
    assert content(disk.path) == wanted
