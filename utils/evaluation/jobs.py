"""What evaluate.py is to do: datasets chosen and found, and jobs, one checkpoint on one dataset, done or not."""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from utils.cli import UserError, command_line
from utils.evaluation import checkpoints, imagenet_sets, transfer_sets
from utils.machine import snapshot
from utils.storage import append_jsonl, read_json, read_jsonl, write_json

GROUPS = ("imagenet", "small", "inat", "cog")  # as the paper's tables and the radar plot group the datasets
LOGIT_METRICS = ("top1", "mean_per_class", "ece")  # of a set the model classifies itself; top5 too with > 5 classes
PROBE_METRICS = ("top1", "mean_per_class")  # of a transfer dataset, one of each a seed
FORMAT = 2  # raise it when numbers change: finished pairs are then computed again


@dataclass
class Dataset:
    """A dataset of this call; it is read from disk once."""

    name: str
    group: str
    folder: str  # --data-root, or DIR of --test
    asked_for: bool  # by name: then a model without its classes is an error

    @property
    def transfer(self) -> bool:
        return self.group in GROUPS[1:]

    @cached_property
    def loaded(self):
        if self.group == "folder":
            return imagenet_sets.load_folder(self.name, self.folder)
        if self.group == "imagenet":
            return imagenet_sets.load(self.name, self.folder)
        return transfer_sets.load(self.name, self.folder)


def known_datasets() -> dict[str, str]:
    """name -> group of every dataset with a row in a table."""
    names = {name: row.group for name, row in imagenet_sets.DATASETS.items()}
    return names | {name: row.group for name, row in transfer_sets.DATASETS.items()}


def find(name: str, data_root: str) -> tuple[bool, str]:
    return (imagenet_sets if name in imagenet_sets.DATASETS else transfer_sets).found(name, data_root)


def chosen_datasets(args: argparse.Namespace) -> list[Dataset]:
    """--test and --datasets; without either, every dataset found below --data-root."""
    groups = known_datasets()
    chosen: list[Dataset] = []
    for spec in args.test:
        name, _, folder = spec.partition("=")
        if not name or not folder or "/" in name:
            raise UserError(f"--test {spec}: expected NAME=DIR, such as digits=data/digits/test")
        if name in (dataset.name for dataset in chosen) or name in groups:
            raise UserError(f"--test {spec}: the name {name} is taken; choose another")
        chosen.append(Dataset(name, "folder", folder, True))
    if args.test and not args.datasets:
        return chosen
    unknown = [name for name in args.datasets if name not in (*groups, *GROUPS, "all")]
    if unknown:
        allowed = ", ".join((*GROUPS, "all", *groups))
        raise UserError(f"--datasets {unknown[0]}: unknown; use {allowed}")
    for name, group in groups.items():
        if name in args.datasets:
            chosen.append(Dataset(name, group, args.data_root, True))
        elif (not args.datasets or {group, "all"} & set(args.datasets)) and find(name, args.data_root)[0]:
            chosen.append(Dataset(name, group, args.data_root, False))
    if not chosen:
        raise UserError(
            f"--data-root {args.data_root}: none of the datasets is there; --list-datasets says where to get them, "
            "--test NAME=DIR judges on any folder"
        )
    return chosen


def read_datasets(chosen: Sequence[Dataset], look_at_images: bool) -> tuple[list[Dataset], int]:
    """(those that are right copies, how many are not), by their counts and, if wanted, by asking for every image file.

    A wrong copy that was merely found is left out with a line; one that was asked for stops here.
    """
    whole = []
    for dataset in chosen:
        try:
            _ = dataset.loaded.fingerprint if look_at_images else dataset.loaded
            whole.append(dataset)
        except UserError as error:
            if dataset.asked_for:
                raise
            print(f"left out: {error}", file=sys.stderr, flush=True)
    return whole, len(chosen) - len(whole)


# ===== jobs: one checkpoint on one dataset =====


@dataclass
class Job:
    args: argparse.Namespace
    source: checkpoints.Source
    dataset: Dataset

    @property
    def out(self) -> Path:
        if self.args.out:
            return Path(self.args.out)
        return Path("runs") / self.source.label if self.source.torchvision else Path(self.source.path).parent

    @cached_property
    def transform(self) -> tuple[int, int, str]:
        """(short side, crop, interpolation). The suite resizes to the crop's own size, with bicubic (t-ReX)."""
        resize, crop, interpolation = checkpoints.transform_of(self.source)
        if self.dataset.transfer:
            resize, interpolation = crop, "bicubic"
        return resize, crop, self.args.interpolation or interpolation

    @cached_property
    def protocol(self) -> str:
        resize, crop, interpolation = self.transform
        text = f"resize {resize} {interpolation}, crop {crop}, {number_format(self.args)}"
        if self.args.allow_truncated:
            text += ", truncated images read as far as they go"
        return f"{text}, {self.args.protocol} linear probe" if self.dataset.transfer else text

    @cached_property
    def key(self) -> str:
        """What a result depends on, hashed: rows of results.jsonl with this key need not be computed again."""
        facts = [FORMAT, self.source.sha256, self.dataset.name, self.dataset.loaded.fingerprint, self.protocol]
        if not self.dataset.transfer:  # which output answers for which class, and how confident it is
            classes = self.args.classes and checkpoints.ordered_classes(self.args.classes)[0]
            facts += [classes or self.source.args.get("class_ids"), self.source.args.get("head")]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    @property
    def sidecar(self) -> Path:
        return self.out / "eval" / f"{self.dataset.name}.{self.source.sha256[:12]}.json"

    def rows(self) -> list[dict]:
        """This job's finished rows; of rows written twice by a killed and a continued run, the newer."""
        newest = {
            (row["metric"], row.get("seed") if self.dataset.transfer else None): row
            for row in read_jsonl(self.out / "results.jsonl")
            if row.get("key") == self.key
        }
        return list(newest.values())

    @property
    def done(self) -> bool:
        if not self.source.sha256 or not self.sidecar.exists():
            return False
        rows = self.rows()
        if self.dataset.transfer:
            return not self.missing_seeds(rows)
        return {row["metric"] for row in rows} >= set(LOGIT_METRICS)

    def missing_seeds(self, rows: list[dict]) -> list[int]:
        have = {(row["seed"], row["metric"]) for row in rows}
        return [seed for seed in self.args.seeds if any((seed, metric) not in have for metric in PROBE_METRICS)]

    def finished_runs(self) -> list[dict]:
        """Probes of other seeds, whose choices the sidecar already holds."""
        kept = read_json(self.sidecar) if self.sidecar.exists() else {}
        return kept.get("runs", []) if kept.get("key") == self.key else []

    def plan(self) -> str:
        loaded = self.dataset.loaded
        if self.dataset.transfer:
            counts = ", ".join(f"{len(samples):,} {split}" for split, samples in loaded.splits.items())
            return f"to do: {loaded.num_classes} classes, {counts}; {self.protocol}; seeds {self.args.seeds}"
        return f"to do: {len(loaded.class_ids)} classes, {len(loaded.samples):,} images; {self.protocol}"

    def row(self, metric: str, value: float, interval: tuple[float, float] | None, **facts) -> dict:
        low, high = interval or (None, None)
        return {
            "model": self.source.label,
            "checkpoint": self.source.path,
            "checkpoint_sha256": self.source.sha256,
            "dataset": self.dataset.name,
            "group": self.dataset.group,
            "metric": metric,
            "value": round(value, 4),
            "low": None if low is None else round(low, 4),
            "high": None if high is None else round(high, 4),
            "protocol": self.protocol,
            **facts,
            "source": "measured",
            "key": self.key,
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }

    def save(self, rows: list[dict], sidecar: dict) -> None:
        """The sidecar first: a job counts as done when all of its rows are there."""
        head = {"dataset": self.dataset.name, "model": self.source.label, "checkpoint_sha256": self.source.sha256}
        made_by = {"key": self.key, "command": command_line(), "environment": snapshot()}
        write_json(self.sidecar, head | sidecar | made_by)
        for row in rows:
            append_jsonl(self.out / "results.jsonl", row)


def number_format(args: argparse.Namespace) -> str:
    """fp32, fp16 or bf16, as --dtype and --device come out here.

    On a CPU never bf16 by itself: its eight bits would move a score by more than a machine should.
    """
    if args.dtype != "auto":
        return args.dtype
    if args.device == "cpu":  # known without torch: keeps a dry run instant
        return "fp32"
    from utils.machine import resolve_device

    return "fp16" if resolve_device(args.device).type == "cuda" else "fp32"
