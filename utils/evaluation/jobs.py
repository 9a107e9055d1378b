"""What evaluate.py is to do: one checkpoint on one test set is a job, done already or not, with its rows on disk."""

import datetime
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from utils.cli import UserError, command_line
from utils.evaluation.catalog import TestSet
from utils.evaluation.checkpoints import Source, Transform, ordered_classes, transform_of
from utils.evaluation.results import Row
from utils.machine import add_costs, resolve_device, rounded_cost, snapshot
from utils.storage import append_jsonl, read_json, read_jsonl, sha256_json, write_json

LOGIT_METRICS = ("top1", "mean_per_class", "ece")  # of a set the model classifies itself; top5 too with > 5 classes
PROBE_METRICS = ("top1", "mean_per_class")  # of a transfer dataset, one of each a seed
FORMAT = 3  # raise it when numbers change: finished pairs are then computed again


@dataclass(frozen=True)
class Settings:
    """How the user wants models judged, as far as results depend on it."""

    number_format: str  # fp32, fp16, bf16
    probe_format: str  # the same for linear probes: t-ReX's suite keeps features in float32
    interpolation: str | None  # None: as the checkpoint or the transfer suite wants it
    truncated: bool  # JPEGs that end early are read as far as they go
    probe_protocol: str  # of linear probes: fast, paper
    seeds: tuple[int, ...]  # of linear probes
    knn: bool  # whether neighbours answer beside them
    classes: str | None  # --classes


Measured = Mapping[str, tuple[float, tuple[float, float] | None]]  # metric -> (value, its 95 % interval), in percent


class Sidecar(msgspec.Struct):
    """What is read again of a file in eval/."""

    key: str
    runs: list[dict[str, Any]] = []
    cost: dict[str, float] = {}


@dataclass
class Job:
    """One checkpoint on one test set; `out` is the folder of its results."""

    source: Source
    test_set: TestSet
    settings: Settings
    out: Path

    @property
    def title(self) -> str:
        """For a person, such as "my_run on IN-Val"."""
        return f"{self.source.label} on {self.test_set.name}"

    @cached_property
    def transform(self) -> Transform:
        """How images are prepared. t-ReX's suite resizes to the crop's own size, with bicubic."""
        transform = transform_of(self.source)
        if self.test_set.probed:
            transform = replace(transform, resize=transform.crop, interpolation="bicubic")
        if self.settings.interpolation:
            transform = replace(transform, interpolation=self.settings.interpolation)
        return replace(transform, border=self.test_set.loaded.border, truncated=self.settings.truncated)

    @property
    def number_format(self) -> str:
        """In which the network computes: fp32, fp16 or bf16."""
        return self.settings.probe_format if self.test_set.probed else self.settings.number_format

    @cached_property
    def protocol(self) -> str:
        """How the numbers come about, in words that go with them."""
        how = self.transform
        text = f"resize {how.resize} {how.interpolation}, crop {how.crop}, {self.number_format}"
        if how.truncated:
            text += ", truncated images read as far as they go"
        return f"{text}, {self.settings.probe_protocol} linear probe" if self.test_set.probed else text

    @cached_property
    def key(self) -> str:
        """What a result depends on, hashed: rows of results.jsonl with this key need not be computed again."""
        facts = [FORMAT, self.source.sha256, self.test_set.name, self.test_set.loaded.fingerprint, self.protocol]
        if not self.test_set.probed:  # which output answers for which class, and how confident it is
            classes = self.settings.classes and ordered_classes(self.settings.classes)[0]
            facts += [classes or self.source.recorded.class_ids, self.source.recorded.head]
        return sha256_json(facts)[:16]

    @property
    def sidecar(self) -> Path:
        """The file beside results.jsonl with what is too long for it: classes, confusion, the probes' choices."""
        return self.out / "eval" / f"{self.test_set.name}.{self.source.sha256[:12]}.json"

    @property
    def trials(self) -> Path:
        """The file in which probes remember the settings they tried."""
        return self.out / "eval" / f"{self.test_set.name}.{self.key}.trials.jsonl"

    def rows(self) -> list[Row]:
        """This job's finished rows; of rows written twice by a killed and a continued run, the newer."""
        mine = [row for row in read_jsonl(self.out / "results.jsonl", Row) if row.key == self.key and row.n]
        return list({(row.metric, row.seed if self.test_set.probed else None): row for row in mine}.values())

    @property
    def done(self) -> bool:
        """Whether every row of this job is on disk."""
        if not self.source.sha256 or not self._kept():
            return False
        if self.test_set.probed:
            return not self.missing_seeds()
        return {row.metric for row in self.rows()} >= set(LOGIT_METRICS)

    def missing_seeds(self) -> list[int]:
        """Seeds of linear probes that lack a row."""
        have = {(row.seed, row.metric) for row in self.rows()}
        wanted = (*PROBE_METRICS, "knn") if self.settings.knn else PROBE_METRICS
        return [seed for seed in self.settings.seeds if any((seed, metric) not in have for metric in wanted)]

    def finished_runs(self) -> list[dict]:
        """What the sidecar already holds of probes: {"seed", "top1", "chosen", "held_out"} each."""
        kept = self._kept()
        return kept.runs if kept and kept.key == self.key else []

    def _kept(self) -> Sidecar | None:
        """The sidecar; None where it is missing or damaged, and then to be written anew."""
        with suppress(UserError):
            return read_json(self.sidecar, Sidecar)
        return None

    def outline(self) -> str:
        """What is to be computed, for a dry run."""
        loaded = self.test_set.loaded
        counts = ", ".join(f"{len(samples):,} {split}" for split, samples in loaded.splits.items())
        if self.test_set.probed:
            return f"to do: {len(loaded.class_ids)} classes, {counts}; {self.protocol}; seeds {[*self.settings.seeds]}"
        return f"to do: {len(loaded.class_ids)} classes, {len(loaded.samples):,} images; {self.protocol}"

    def save(self, measured: Measured, facts: dict, sidecar: dict, cost: dict) -> None:
        """Append a row a metric of MEASURED, each with FACTS (n, num_classes, seed ...), to results.jsonl.

        COST is added to that of the probes with other seeds before.
        """
        kept = self._kept()
        spent = add_costs(kept.cost, cost) if kept and kept.key == self.key and kept.runs else cost
        head = {"dataset": self.test_set.name, "model": self.source.label, "checkpoint_sha256": self.source.sha256}
        made_by = {"cost": rounded_cost(spent), "key": self.key}
        made_by |= {"command": command_line(), "environment": snapshot()}
        write_json(self.sidecar, head | sidecar | made_by)  # first: a job counts as done when all of its rows are there
        for metric, (value, interval) in measured.items():
            low, high = [None if bound is None else round(bound, 4) for bound in interval or (None, None)]
            row = {
                "model": self.source.label,
                "checkpoint": self.source.path,
                "checkpoint_sha256": self.source.sha256,
                "dataset": self.test_set.name,
                "group": self.test_set.group,
                "metric": metric,
                "value": round(value, 4),
                "low": low,
                "high": high,
                "protocol": self.protocol,
                **facts,
                "unfinished": self.source.unfinished,
                "source": "measured",
                "key": self.key,
                "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            }
            append_jsonl(self.out / "results.jsonl", row)


def number_format(dtype: str, device: str) -> str:
    """fp32, fp16 or bf16, as --dtype DTYPE and --device DEVICE come out here."""
    if dtype != "auto":
        return dtype
    if device == "cpu":  # known without torch: keeps a dry run instant
        return "fp32"  # never bf16 by itself: its eight bits would move a score by more than a machine should
    return "fp16" if resolve_device(device).type == "cuda" else "fp32"
