"""The tables of a report: one metric of one model on one dataset is a cell, with its interval and size."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import numpy as np
from scipy.special import stdtrit  # Student's quantiles; all of scipy.stats would take seconds to import

from utils.evaluation.catalog import GROUPS, PAPERS_FIVE, SETS
from utils.metrics import log_odds_average, mean_and_std
from utils.report.costs import cost_columns
from utils.report.records import Row, Sidecar, Training

TRANSFER_GROUPS = {group: GROUPS[group] for group in ("cog", "inat", "small")}  # from the farthest to the nearest task
TRANSFER_SETS = [row.name for row in SETS.values() if row.probed]
GROUP_SIZES = Counter(row.group for row in SETS.values())  # of the transfer groups: 8, 2, 5


@dataclass
class Cell:
    """One metric of one model on one dataset, in percent. `spread`: standard deviation over seeds, if several."""

    value: float
    spread: float | None = None
    runs: int = 1
    low: float | None = None  # 95 % interval of a single run
    high: float | None = None
    n: int | None = None
    num_classes: int | None = None
    group: str = "folder"
    digits: int = 1
    leaked: int = 0  # of the n images: the model was trained on them or on copies
    judged: str = ""  # fingerprint of the images of a single run
    outcomes: np.ndarray | None = None  # (n,) bools: whether each of them was recognised

    def __str__(self) -> str:
        if self.spread is not None:
            return f"{self.value:.{self.digits}f} ± {self.spread:.{self.digits}f}"
        return f"{self.value:.{self.digits}f}"

    @property
    def interval(self) -> str:
        """ "72.1 to 74.5", or "" where there is none."""
        return f"{self.low:.1f} to {self.high:.1f}" if self.low is not None and self.high is not None else ""

    @property
    def size(self) -> str:
        """ "5,000 images, 100 classes", or "" where it is not known."""
        parts = [f"{self.n:,} images" if self.n else "", f"{self.num_classes} classes" if self.num_classes else ""]
        return ", ".join(filter(None, parts))

    @property
    def leak(self) -> str:
        """ "3 of them trained on", or "" where none is known."""
        return f"{self.leaked:,} of them trained on" if self.leaked else ""

    def less(self, other: Cell) -> str:
        """ "-2.5 (-3.9 to -1.1)": the difference with its 95 % interval, or "" where other images were judged."""
        if self.size != other.size:  # what is not known of one may differ too; averages over sets have none
            return ""
        found = difference(self, other)
        text = f"{self.value - other.value:+.{self.digits}f}"
        return f"{text} ({found.low:+.1f} to {found.high:+.1f})" if found else text


@dataclass(frozen=True)
class Difference:
    """How far two numbers lie apart, in points, with the 95 % interval and where that comes from."""

    value: float
    low: float
    high: float
    source: str

    @property
    def shown(self) -> bool:
        """Whether the interval excludes zero: without that no sentence may name a winner."""
        return self.low > 0 or self.high < 0

    @property
    def of_single_runs(self) -> bool:
        """Whether the interval speaks of the images alone: other seeds of the same training may differ by more."""
        return "one run each" in self.source

    def __str__(self) -> str:
        return f"{self.value:+.2f} points (95 % interval {self.low:+.2f} to {self.high:+.2f}, {self.source})"


def difference(a: Cell, b: Cell) -> Difference | None:
    """a - b with its interval, None where none can be given.

    Two models with seeds: Welch's, over the seeds. Two runs that were judged image by image on the same images:
    Newcombe's for pairs (1998, Statistics in Medicine 17, 2635, method 10). Else two runs' own intervals: Newcombe's
    for independent samples (ibid., 873, method 10), which on the same images is a little too wide.
    """
    value = a.value - b.value
    if a.spread is not None and b.spread is not None:
        parts = a.spread**2 / a.runs, b.spread**2 / b.runs
        if sum(parts) < 1e-12:  # every seed alike: the spread is below what so few images can show, not zero
            return None
        freedom = sum(parts) ** 2 / (parts[0] ** 2 / (a.runs - 1) + parts[1] ** 2 / (b.runs - 1))
        half = float(stdtrit(freedom, 0.975)) * math.sqrt(sum(parts))
        return Difference(value, value - half, value + half, f"Welch over {a.runs} and {b.runs} seeds")
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return None
    correlation, source = 0.0, "Newcombe, one run each"
    if a.outcomes is not None and b.outcomes is not None and a.judged == b.judged:
        correlation, source = paired_correlation(a.outcomes, b.outcomes), "Newcombe for pairs, one run each"
    down, up = (a.value - a.low, b.high - b.value), (a.high - a.value, b.value - b.low)
    below = math.sqrt(max(0.0, down[0] ** 2 - 2 * correlation * math.prod(down) + down[1] ** 2))
    above = math.sqrt(max(0.0, up[0] ** 2 - 2 * correlation * math.prod(up) + up[1] ** 2))
    return Difference(value, value - below, value + above, source)


def paired_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Newcombe's phi of two (n,) arrays of right and wrong answers on the same images, with his correction."""
    n, both, neither = len(a), int((a & b).sum()), int((~a & ~b).sum())
    only_a, only_b = int(a.sum()) - both, int(b.sum()) - both
    margins = math.prod(int(k) for k in (a.sum(), n - a.sum(), b.sum(), n - b.sum()))
    excess = both * neither - only_a * only_b
    softened = max(0.0, excess - n / 2) if excess > 0 else excess
    return softened / math.sqrt(margins) if margins else 0.0


@dataclass
class Model:
    """A model of the report: one run, or several that differ by their seed alone."""

    name: str
    published: bool = False
    kind: str = ""  # of its training images: "real", "synthetic", "mixed", or "" where it is not known
    supervision: str = ""  # of its training images: "labelled images", "glosses" ..., or "" where it is not known
    color: str = "#000"
    unfinished: bool = False  # a run of it had not come to its end when it was judged
    images: int | None = None  # trained on
    steps: int | None = None  # of the optimizer
    runs: list[Path] = field(default_factory=list)  # folders of train.py's runs
    trainings: list[Training] = field(default_factory=list)  # their args.json
    checkpoints: set[str] = field(default_factory=set)  # sha256
    sidecars: list[Sidecar] = field(default_factory=list)
    cells: dict[tuple[str, str], Cell] = field(default_factory=dict)  # (dataset, metric)

    @property
    def trained_on(self) -> str:
        """ "2,000 synthetic", or what is known of it."""
        known = f"{self.images:,} {self.kind}".strip() if self.images else self.kind
        return ", ".join(filter(None, (known, "not finished" * self.unfinished)))

    def has_budget_of(self, other: Model) -> bool:
        """Whether both saw as many images (within 1 %: classes of real images are rarely equal) in as many steps."""
        if not (self.images and other.images and self.steps and other.steps):
            return False
        near = abs(self.images - other.images) <= 0.01 * other.images
        return near and abs(self.steps - other.steps) <= 0.01 * other.steps


def as_cell(rows: Sequence[Row], sidecars: Sequence[Sidecar] = ()) -> Cell:
    """One metric over a model's runs: mean and deviation, or a single run with its interval and SIDECARS' outcomes.

    Probe seeds of one run are averaged: they share its weights and images, and are no runs of their own.
    """
    first, runs = rows[0], defaultdict[str | int, list[Row]](list)
    for number, row in enumerate(rows):
        runs[row.checkpoint_sha256 or number].append(row)
    mean, deviation = mean_and_std(fmean(row.value for row in its) for its in runs.values())
    cell = Cell(mean, runs=len(runs), n=first.n, num_classes=first.num_classes, group=first.group)
    cell.leaked = max(row.train_overlap_exact + row.train_overlap_near for row in rows)
    if len(runs) > 1:
        cell.spread = deviation
        return cell
    if first.low is not None and first.high is not None:
        cell.low, cell.high = (fmean(getattr(row, end) for row in rows) for end in ("low", "high"))
    beside = next((one for one in sidecars if one.dataset == first.dataset), None)
    if beside and first.metric == "top1" and len(rows) == 1:
        cell.judged, cell.outcomes = beside.images, beside.outcomes()
    return cell


def make_tables(models: Sequence[Model], rows: Sequence[Row]) -> list[dict]:
    """The tables of the report, see as_table: ImageNet sets, transfer groups with averages, other folders."""
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for group, dataset in dict.fromkeys((row.group, row.dataset) for row in rows):
        groups[group].append(dataset)
    tables = []
    for dataset in groups["folder"]:
        columns = [(dataset, "top1", "top-1"), (dataset, "top5", "top-5"), (dataset, "ece", "calibration error")]
        tables.append(metric_table(f"Real images: {dataset}", columns, models))
    sets = sorted(groups["imagenet"], key=lambda name: (*PAPERS_FIVE, name).index(name))
    for metric, shown in (("top1", "top-1"), ("top5", "top-5")):
        columns = [(name, metric, name) for name in sets]
        tables.append(metric_table(f"ImageNet test sets, {shown}", columns, models))
    for group, shown in TRANSFER_GROUPS.items():
        tables.append(group_table(f"Transfer, {shown}: linear probe, top-1", group, groups[group], models))
    tables.append(all_transfer_table(models))
    own = [(name, "top1", name) for name in groups["transfer"]]
    tables.append(metric_table("Transfer, own sets: linear probe, top-1", own, models))
    votes = [(name, "knn", name) for name in (*TRANSFER_SETS, *groups["transfer"])]
    tables.append(metric_table("Transfer: votes of the nearest neighbours (--knn), top-1", votes, models))
    tables = [made for made in tables if made["rows"]]
    if tables:
        add_facts(tables[0])
    return tables


def add_facts(made: dict) -> None:
    """Columns before the numbers: images, steps, which rows have the budget of real images, and what all has cost."""
    shown = [row["model"] for row in made["rows"]]
    reference = next((model for model in shown if model.kind == "real"), shown[0])
    graded = any(model.supervision for model in shown if model.kind != "real")  # else it says nothing new
    costs = cost_columns(shown)
    facts = {
        "trained on": [model.trained_on for model in shown],
        "supervision": [model.supervision if graded else "" for model in shown],
        "steps": [f"{model.steps:,} steps" if model.steps else "" for model in shown],
        "budget": [
            f"the budget of {reference.name}" if model is not reference and model.has_budget_of(reference) else ""
            for model in shown
        ],
        **costs,
    }
    made["facts"] = [head for head, column in facts.items() if any(column)]
    for number, row in enumerate(made["rows"]):
        its = {head: facts[head][number] for head in made["facts"]}
        row["facts"] = [*its.values()]
        # A cost alone would not say what it is of.
        row["told"] = ", ".join(f"{head} {fact}" if head in costs else fact for head, fact in its.items() if fact)


def metric_table(title: str, columns: Sequence[tuple[str, str, str]], models: Sequence[Model]) -> dict:
    """COLUMNS: (dataset, metric, heading); those that no model knows are left out."""
    columns = [column for column in columns if any(column[:2] in model.cells for model in models)]
    body = [(model, [model.cells.get(column[:2]) for column in columns]) for model in models]
    return as_table(title, [shown for _, _, shown in columns], body)


def group_table(title: str, group: str, names: Sequence[str], models: Sequence[Model]) -> dict:
    """A transfer group with its averages, for models that know all the sets shown."""
    known = [(model, [model.cells.get((name, "top1")) for name in names]) for model in models]
    body = [(model, [*cells, *averages(cells)]) for model, cells in known]
    of = f" of {len(names)} of {GROUP_SIZES[group]} sets" if len(names) < GROUP_SIZES[group] else ""
    return as_table(title, [*names, f"average{of}", f"log-odds average{of}"], body)


def all_transfer_table(models: Sequence[Model]) -> dict:
    """The averages over all fifteen transfer sets, as the suite gives them, beside the published ones."""
    body = []
    for model in models:
        cells = averages([model.cells.get((name, "top1")) for name in TRANSFER_SETS])
        body.append((model, [cells[0] or model.cells.get(("average transfer", "top1")), cells[1]]))
    return as_table(f"Transfer, all {len(TRANSFER_SETS)} sets", ["average", "log-odds average"], body)


def averages(cells: Sequence[Cell | None]) -> list[Cell | None]:
    """[mean, mean of log(acc / (1 - acc))] of CELLS; [None, None] where one is missing."""
    known = [cell for cell in cells if cell]
    if not known or len(known) < len(cells):
        return [None, None]
    values, sizes = [cell.value for cell in known], [cell.n or 10**6 for cell in known]
    return [Cell(fmean(values)), Cell(log_odds_average(values, sizes), digits=3)]


def as_table(title: str, heads: list[str], body: Sequence[tuple[Model, list[Cell | None]]]) -> dict:
    """{title, note, columns, rows: [{model, cells, differences, sizes}]}, without models that know no cell.

    The first model is the reference of the differences. The number of images and classes stands in the note where all
    models agree on it, else in the cells.
    """
    body = [(model, cells) for model, cells in body if any(cells)]
    notes, agreed = [], []
    for head, *column in zip(heads, *(cells for _, cells in body), strict=True):
        sizes = {cell.size for cell in column if cell}  # "" where it is not known: that may be another
        agreed.append(len(sizes) <= 1)
        if len(sizes) == 1 and sizes != {""}:
            notes.append((head, *sizes))
    rows = []
    for model, cells in body:
        reference = body[0][1]
        rows.append(
            {
                "model": model,
                "facts": [],
                "told": "",  # the facts in a line
                "cells": cells,
                "differences": [
                    a.less(b) if a and b and cells is not reference else ""
                    for a, b in zip(cells, reference, strict=True)
                ],
                "sizes": [
                    ", ".join(filter(None, ["" if one else cell.size, cell.leak])) if cell else ""
                    for cell, one in zip(cells, agreed, strict=True)
                ],
            }
        )
    same = all(agreed) and len({size for _, size in notes}) == 1
    note = notes[0][1] if same else "; ".join(f"{head}: {size}" for head, size in notes)
    return {"title": title, "facts": [], "columns": heads, "rows": rows, "note": note}
