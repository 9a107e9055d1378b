"""results.jsonl -> report.md and one self-contained report.html: the paper's tables, the radar plot, and a close look.

Everything shown comes from files: the results, and what lies beside each of them (args.json, log.jsonl, eval/*.json).
Runs that differ by their seed alone (`NAME-seed0`, `NAME-seed1`, ...) are one model: mean and standard deviation.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.cli import UserError
from utils.metrics import log_odds_average
from utils.radar import COLORS, draw_radar
from utils.report_figures import close_looks, contact_sheets, provenance, training_curves
from utils.storage import atomic_write, read_json, read_jsonl, require_writable

TEMPLATE = Path(__file__).with_name("report.html.j2")
IMAGENET_SETS = ("IN-Val", "IN-v2", "IN-Sketch", "IN-R", "IN-A")  # the paper's five, in its order
TRANSFER_GROUPS = {"cog": "ImageNet-CoG", "inat": "iNaturalist", "small": "8 small sets"}
SEED_SUFFIX = re.compile(r"[-_]seed\d+$")
CELL_LEGEND = (
    "Percent; ± is the standard deviation over seeds, (a to b) a 95 % interval; an empty cell was not measured."
)


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

    def __str__(self) -> str:
        if self.spread is not None:
            return f"{self.value:.1f} ± {self.spread:.1f}"
        return f"{self.value:.1f}"


@dataclass
class Model:
    """A model of the report: one run, or several that differ by their seed alone."""

    name: str
    color: str
    published: bool
    folders: list[Path] = field(default_factory=list)  # of its results.jsonl
    checkpoints: set[str] = field(default_factory=set)  # sha256
    cells: dict[tuple[str, str], Cell] = field(default_factory=dict)  # (dataset, metric)


def write_report(
    results: Sequence[Path], out: Path, title: str | None = None, show_data: Sequence[tuple[str, Path]] = ()
) -> list[Path]:
    """Write OUT/report.html, OUT/report.md and, where at least three axes are known, OUT/radar.{svg,png}.

    RESULTS: results.jsonl files. SHOW_DATA: (name, class-folder root or generated dataset) pairs whose images are set
    side by side, class by class. Returns the files written. Raises UserError on a missing or empty results file.
    """
    rows = read_results(results)
    models = group_models(rows)
    require_writable(out, "--out")
    page: dict[str, Any] = {
        "title": title or "Can synthetic images replace real ones?",
        "models": models,
        "headline": headline(models),
        "tables": make_tables(models, rows),
        "legend": CELL_LEGEND,
        "curves": training_curves({model.name: (model.color, model.folders) for model in models}),
        "looks": close_looks({model.name: (model.folders, model.checkpoints) for model in models}),
        "sheets": contact_sheets(show_data),
        **provenance([folder for model in models for folder in model.folders], show_data),
    }
    written = [out / "report.html", out / "report.md"]
    page["radar"] = None
    if axes := radar_axes(models):
        colors = {model.name: model.color for model in models}
        polygons = {model.name: radar_values(model) for model in models}
        draw_radar(axes, polygons, out / "radar.svg", out / "radar.png", colors)
        page["radar"] = (out / "radar.svg").read_text(encoding="utf-8")
        written += [out / "radar.svg", out / "radar.png"]
    atomic_write(out / "report.html", render_html(page).encode())
    atomic_write(out / "report.md", render_markdown(page).encode())
    return written


# ===== reading =====


def read_results(paths: Sequence[Path]) -> list[dict]:
    """The rows of all files that still hold, each with its "folder".

    In one file a model's last checkpoint counts, not an earlier one that was judged in mid-training, and so does the
    last protocol of each metric; a metric measured again replaces the earlier line. UserError if two files hold
    different checkpoints of one name.
    """
    kept: list[dict] = []
    owners: dict[str, tuple[Path, str | None]] = {}  # model -> its file and checkpoint
    for path in paths:
        rows = _read_rows(path)
        checkpoint = {row["model"]: row.get("checkpoint_sha256") for row in rows}
        protocol = {(row["model"], row["dataset"], row["metric"]): row.get("protocol") for row in rows}
        for model, sha256 in checkpoint.items():
            other, its = owners.setdefault(model, (path, sha256))
            if its != sha256:
                raise UserError(
                    f"--report: {other} and {path} hold two different models called {model}; judge one again under "
                    "another name (evaluate.py --checkpoint NAME=...)"
                )
        newest: dict[tuple, dict] = {}
        for row in rows:
            key = (row["model"], row["dataset"], row["metric"])
            if row.get("checkpoint_sha256") == checkpoint[row["model"]] and row.get("protocol") == protocol[key]:
                newest[*key, row.get("seed")] = row | {"folder": path.parent}
        kept += newest.values()
    return kept


def _read_rows(path: Path) -> list[dict]:
    if not path.is_file():
        raise UserError(f"--report: no file {path}; give results.jsonl files that evaluate.py wrote")
    rows = read_jsonl(path)
    if not rows:
        raise UserError(f"--report: {path} holds no result; run evaluate.py on its checkpoint first")
    for row in rows:
        if missing := {"model", "dataset", "metric", "value"} - row.keys():
            raise UserError(f"--report: {path} has a line without {', '.join(sorted(missing))}; is it a results.jsonl?")
    return rows


def group_models(rows: Iterable[dict]) -> list[Model]:
    """The models in order of appearance: blue for the first, red for the second, as on the paper's page."""
    models: dict[str, Model] = {}
    values: dict[tuple[str, str, str], list[dict]] = {}
    for row in rows:
        name = SEED_SUFFIX.sub("", row["model"])
        if name not in models:
            color = COLORS[len(models) % len(COLORS)]
            models[name] = Model(name, color, published=row.get("source") == "published")
        model = models[name]
        if row["folder"] not in model.folders and row.get("source") != "published":
            model.folders.append(row["folder"])
        if row.get("checkpoint_sha256"):
            model.checkpoints.add(row["checkpoint_sha256"])
        values.setdefault((name, row["dataset"], row["metric"]), []).append(row)
    for (name, dataset, metric), measured in values.items():
        models[name].cells[dataset, metric] = as_cell(measured)
    return list(models.values())


def as_cell(rows: Sequence[dict]) -> Cell:
    numbers = [row["value"] for row in rows]
    first = rows[0]
    cell = Cell(statistics.fmean(numbers), runs=len(rows), n=first.get("n"), num_classes=first.get("num_classes"))
    cell.group = first.get("group", "folder")
    if len(rows) > 1:
        cell.spread = statistics.stdev(numbers)
    else:
        cell.low, cell.high = first.get("low"), first.get("high")
    return cell


# ===== tables =====


def make_tables(models: Sequence[Model], rows: Sequence[dict]) -> list[dict]:
    """[{title, note, columns, rows: [(model, [Cell | None, ...])]}]: ImageNet sets, transfer groups, other folders."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        members = groups.setdefault(row.get("group", "folder"), [])
        if row["dataset"] not in members:
            members.append(row["dataset"])
    tables = []
    for dataset in groups.get("folder", []):
        columns = [(dataset, "top1", "top-1"), (dataset, "top5", "top-5"), (dataset, "ece", "calibration error")]
        tables.append(table(f"Real images: {dataset}", columns, models))
    sets = sorted(groups.get("imagenet", []), key=lambda name: (*IMAGENET_SETS, name).index(name))
    for metric, shown in (("top1", "top-1"), ("top5", "top-5")):
        if sets:
            tables.append(table(f"ImageNet test sets, {shown}", [(name, metric, name) for name in sets], models))
    for group, shown in TRANSFER_GROUPS.items():
        if names := groups.get(group):
            metric_columns = [(name, "top1", name) for name in names]
            tables.append(table(f"Transfer, {shown}: linear probe, top-1", metric_columns, models, average=True))
    if names := groups.get("average"):
        tables.append(table("Transfer, as published", [(name, "top1", name) for name in names], models))
    return [made for made in tables if made["rows"]]


def table(title: str, columns: Sequence[tuple[str, str, str]], models: Sequence[Model], average: bool = False) -> dict:
    """One table. The first model is the reference of the differences; a cell that was not measured stays empty."""
    columns = [column for column in columns if any((column[0], column[1]) in model.cells for model in models)]
    heads = [shown for _, _, shown in columns]
    body, reference = [], None
    for model in models:
        cells: list[Cell | None] = [model.cells.get((dataset, metric)) for dataset, metric, _ in columns]
        if not any(cells):
            continue
        if average:
            known = [cell.value for cell in cells if cell]
            whole = len(known) == len(columns)
            cells.append(Cell(statistics.fmean(known)) if whole else None)
            cells.append(Cell(log_odds_average(known)) if whole else None)
        reference = reference or cells
        differences = [a.value - b.value if a and b else None for a, b in zip(cells, reference, strict=True)]
        body.append({"model": model, "cells": cells, "differences": differences if cells is not reference else None})
    sizes = []
    for dataset, metric, shown in columns:
        cell = next(model.cells[dataset, metric] for model in models if (dataset, metric) in model.cells)
        if cell.n:
            classes = f", {cell.num_classes} classes" if cell.num_classes else ""
            sizes.append(f"{shown}: {cell.n:,} images{classes}")
    if len({size.partition(": ")[2] for size in sizes}) == 1:
        sizes = [sizes[0].partition(": ")[2]]
    heads += ["average", "log-odds average"] if average else []
    return {"title": title, "columns": heads, "rows": body, "note": "; ".join(sizes)}


def headline(models: Sequence[Model]) -> list[str]:
    """What the numbers say, in sentences that hold for these numbers only; nothing for other kinds of report."""
    folders = {dataset for model in models for dataset, metric in model.cells if metric == "top1"}
    if len(folders) != 1 or len(models) < 2:
        return []
    (dataset,) = folders
    scored = [(model, model.cells[dataset, "top1"]) for model in models if (dataset, "top1") in model.cells]
    reference, best = scored[0], max(scored[1:], key=lambda pair: pair[1].value, default=None)
    if best is None:
        return []
    gap = reference[1].value - best[1].value
    relation = f"{abs(gap):.1f} points {'below' if gap > 0 else 'above'}" if abs(gap) >= 0.05 else "the same as"
    said = [
        f"Trained on “{best[0].name}”, the classifier recognises {best[1]} % of {best[1].n:,} real images it never "
        f"saw: {relation} its twin trained on “{reference[0].name}” ({reference[1]} %)."
    ]
    by_guidance = {}
    for model, cell in scored:
        if (guidance := guidance_of(model)) is not None:
            by_guidance[guidance] = cell
    if len(by_guidance) == 2:
        low, high = sorted(by_guidance)
        margin = by_guidance[low].value - by_guidance[high].value
        spread = max(by_guidance[low].spread or 0, by_guidance[high].spread or 0)
        if margin > spread:
            verdict = "less guidance drew more varied images and gave better training data, as the paper found"
        elif margin < -spread:
            verdict = "here more guidance gave better training data, unlike in the paper"
        else:
            verdict = "the difference is within the spread over seeds"
        said.append(f"Guidance {low:g} against {high:g}: {margin:+.1f} points; {verdict}.")
    return said


def guidance_of(model: Model) -> float | None:
    """The guidance scale of the dataset that a model was trained on, by the dataset.json of its data folder."""
    for folder in model.folders:
        for data in data_folders(folder):
            if (data / "dataset.json").is_file():
                value = read_json(data / "dataset.json").get("recipe", {}).get("guidance_scale")
                return float(value) if value is not None else None
    return None


def data_folders(run: Path) -> list[Path]:
    """The folders of train.py's --data PATH[:WEIGHT] options, by the run's args.json."""
    if not (run / "args.json").is_file():
        return []
    options = read_json(run / "args.json").get("options", {})
    return [Path(re.sub(r":[0-9.]+$", "", text)) for text in options.get("data", [])]


# ===== radar =====


def radar_axes(models: Sequence[Model]) -> list[str]:
    """The paper's eight axes, those that at least one model knows; [] below three: no polygon then."""
    known = {axis for model in models for axis in radar_values(model)}
    wanted = [f"{name}\ntop-5" for name in IMAGENET_SETS] + [f"{name}\ntop-1" for name in TRANSFER_GROUPS.values()]
    axes = [axis for axis in wanted if axis in known]
    return axes if len(axes) >= 3 else []


def radar_values(model: Model) -> dict[str, float]:
    """{axis: percent}: a transfer group counts by the mean top-1 of its sets."""
    values = {}
    for name in IMAGENET_SETS:
        if cell := model.cells.get((name, "top5")):
            values[f"{name}\ntop-5"] = cell.value
    for group, shown in TRANSFER_GROUPS.items():
        scores = [cell.value for (_, metric), cell in model.cells.items() if metric == "top1" and cell.group == group]
        if scores:
            values[f"{shown}\ntop-1"] = statistics.fmean(scores)
    return values


# ===== rendering =====


def render_html(page: dict) -> str:
    """One file: pictures are inlined, nothing is loaded from elsewhere, every text is escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(**page)


def render_markdown(page: dict) -> str:
    """The same tables for a terminal or a repository; pictures stay in the HTML file and in radar.png."""
    lines = [f"# {page['title']}", "", *(f"{sentence}\n" for sentence in page["headline"])]
    for made in page["tables"]:
        lines += [f"## {made['title']}", ""]
        lines += [markdown_row(["model", *made["columns"]]), markdown_row(["---"] * (len(made["columns"]) + 1))]
        lines += [markdown_row([row["model"].name, *map(markdown_cell, row["cells"])]) for row in made["rows"]]
        lines += ["", f"{made['note']}. " * bool(made["note"]) + CELL_LEGEND, ""]
    if page["radar"]:
        lines += ["![radar plot](radar.png)", ""]
    for look in page["looks"]:
        lines += [f"## Per class: {look['dataset']}", ""]
        names = [model["name"] for model in look["models"]]
        lines += [markdown_row(["class", "n", *names]), markdown_row(["---"] * (len(names) + 2))]
        for row in look["classes"]:
            lines.append(markdown_row([row["name"], row["n"], *(f"{value:.1f}" for value in row["top1"])]))
        lines.append("")
    lines += ["## How this was made", "", *(f"    {command}" for command in page["commands"]), ""]
    lines += [f"- {name}: {value}" for name, value in page["versions"].items()]
    return "\n".join(lines) + "\n"


def markdown_row(cells: Iterable[Any]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def markdown_cell(cell: Cell | None) -> str:
    if cell is None:
        return ""
    interval = f" ({cell.low:.1f} to {cell.high:.1f})" if cell.low is not None and cell.high is not None else ""
    return f"{cell}{interval}"
