"""Every file that the package writes, damaged, and the commands that read it run again: refused in one line, healed, or
without consequence; never a traceback, never another number.

The dataset, run and results are made once by the scripts; each case works on a copy.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest

from tests.evaluation.test_evaluate import make_images as make_test_images
from tests.test_kills import DRAW, Forker
from tests.tiny_sd import build_tiny_sd
from tests.training_runs import TINY
from utils.storage import read_jsonl

THOROUGH = bool(os.environ.get("FUZZ_SECONDS"))
SPECIAL = ("FIFO", "folder", "dangling link")
COMMANDS = ("status", "verify", "pack", "preview", "train", "evaluate", "report")


@pytest.fixture(scope="module")
def forker():
    made = Forker()
    yield made
    made.process.stdin.close()
    made.process.wait(timeout=30)


class World:
    """A drawn dataset, a model trained on it and what it was judged to be, below one folder."""

    def __init__(self, root: Path, inputs: Path, forker: Forker) -> None:
        self.root, self.inputs, self.forker = root, inputs, forker
        self.sd, self.run = root / "sd", root / "run"

    def command(self, name: str) -> tuple[int, str]:
        """(exit code, stderr) of one of COMMANDS, or of "draw"."""
        look = {"status": "--status", "verify": "--verify", "pack": "--pack", "preview": "--preview"}
        order = {
            "draw": ("generate", [*DRAW, "--model", str(self.inputs / "tiny"), "--out", str(self.sd)]),
            "train": ("train", ["--data", str(self.sd), "--out", str(self.run), *TINY, "--epochs", "1"]),
            "evaluate": (
                "evaluate",
                ["--checkpoint", str(self.run), "--test", f"toys={self.inputs / 'test'}", "--device", "cpu"],
            ),
            "report": ("evaluate", ["--report", str(self.run / "results.jsonl"), "--out", str(self.root / "report")]),
        } | {key: ("generate", ["--out", str(self.sd), option]) for key, option in look.items()}
        codes, _ = self.forker.run((*order[name], {}), said=self.root / "said", kill_after_s=100)  # then it hangs
        return codes[0], (self.root / "said").read_text()

    def numbers(self) -> set[str]:
        rows = read_jsonl(self.run / "results.jsonl")
        return {f"{row.get('dataset')} {row.get('metric')} {row.get('value')}" for row in rows}


@pytest.fixture(scope="module")
def world(tmp_path_factory, forker) -> World:
    made = World(tmp_path_factory.mktemp("world") / "clean", tmp_path_factory.mktemp("inputs"), forker)
    made.root.mkdir()
    build_tiny_sd(made.inputs / "tiny")
    assert made.command("draw")[0] == 0
    ids = sorted(path.name for path in (made.sd / "train").iterdir())
    make_test_images(made.inputs / "test", ids, each=2)
    for name in COMMANDS:
        code, said = made.command(name)
        assert code == 0, said
    return made


def damages(good: bytes, other: bytes, rng: random.Random) -> dict[str, bytes | str]:
    """{kind: content}, or for a path that is no file what is there instead."""
    at = rng.randrange(max(1, len(good)))
    cut = rng.randrange(1, max(2, len(good)))
    flipped = bytearray(good)
    flipped[at] ^= 1 << rng.randrange(8)
    return {
        "flip": bytes(flipped),
        "cut": good[:cut],
        "empty": b"",
        "zero": bytes(len(good)),
        "duplicate": good * 2,
        "swap": other,
        "list": b"[]\n",
        "number": b"5\n",
        "null": b"null\n",
        "object": b"{}\n",
        "nested": b"[" * 5000,
        "not UTF-8": b'{"a": "\xff\xfe"}\n',
        **{kind: kind for kind in SPECIAL},
    }


def damage(path: Path, content: bytes | str) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
        return
    path.unlink()
    make = {"FIFO": lambda: os.mkfifo(path), "folder": path.mkdir, "dangling link": lambda: path.symlink_to("nowhere")}
    make[content]()


# What is damaged -> the commands that read it.
LOOKS = ("status", "verify", "preview", "pack")
FILES = {
    "sd/dataset.json": (*LOOKS, "train", "report"),
    "sd/manifest/*.jsonl": LOOKS,
    "sd/sessions.jsonl": ("status", "draw"),
    "sd/train/*/*.jpg": LOOKS,
    "sd/shards/*.tar": ("pack",),
    "sd/shards/*-*.json": ("pack",),
    "sd/shards/index.json": ("pack",),
    "sd/shards/README.md": ("pack",),
    "sd/shards/SHA256SUMS": ("pack",),
    "run/args.json": ("train", "evaluate", "report"),
    "run/log.jsonl": ("train", "report"),
    "run/checkpoint.pth": ("train",),
    "run/sd.pth": ("train", "evaluate"),
    "run/results.jsonl": ("evaluate", "report"),
    "run/eval/*.json": ("evaluate", "report"),
    "run/features/*/features.npy": ("evaluate",),
    "run/features/*/*.json": ("evaluate",),
    "run/hashes/*.npy": ("evaluate",),
    "run/hashes/*.json": ("evaluate",),
}


@pytest.mark.parametrize("pattern", FILES)
def test_a_damaged_file_is_refused_or_healed_and_no_number_changes(pattern, world, tmp_path):
    rng = random.Random(pattern)
    path = sorted(world.root.glob(pattern))[0].relative_to(world.root)
    good, other = (world.root / path).read_bytes(), (world.inputs / "tiny/model_index.json").read_bytes()
    cases = damages(good, other, rng)
    chosen = cases if THOROUGH else [*rng.sample(sorted(cases), 4), rng.choice(SPECIAL)]
    wrong, clean = [], world.numbers()
    for kind in chosen:
        damaged = World(tmp_path / kind, world.inputs, world.forker)
        shutil.copytree(world.root, damaged.root)
        damage(damaged.root / path, cases[kind])
        for name in FILES[pattern]:
            code, said = damaged.command(name)
            last = (said.strip().splitlines() or [""])[-1]
            if code not in (0, 2) and not (name == "verify" and code == 1 and "unexpected" not in said):
                wrong.append(f"{kind}: {name} ends with {code}: {last}")
            if "Traceback" in said or "unexpected" in said:
                wrong.append(f"{kind}: {name} prints {last}")
            if pattern != "run/results.jsonl" and not damaged.numbers() <= clean:
                wrong.append(f"{kind}: {name} measures {damaged.numbers() - clean}")
        shutil.rmtree(damaged.root)
    assert not wrong, "\n".join(wrong)


def test_the_scripts_write_no_file_that_is_not_damaged_here(world):
    """A new kind of file needs a row in FILES, or a reason here: written for people, or read by nothing."""
    for_people = {"report", "preview", "index.html", "curves.png", ".locks", ".lock", "lock", "said", ".dataset.json"}
    known = {path for pattern in FILES for path in world.root.glob(pattern)}
    kinds = {(path.parent, path.suffix) for path in known}
    for path in world.root.rglob("*"):
        parts = set(path.relative_to(world.root).parts)
        if path.is_file() and not parts & for_people and path.name != "checkpoint_previous.pth":
            assert (path.parent, path.suffix) in kinds or path.parent.parent == world.sd / "train", path
    json.loads((world.sd / "dataset.json").read_text())
