"""results.jsonl -> report.md and one self-contained report.html: the paper's tables, the radar plot, and a close look.

Everything shown comes from files: the results, and what lies beside each of them (args.json, log.jsonl, eval/*.json).
Runs that differ by their seed alone (`NAME-seed0`, `NAME-seed1`, ...) are one model: mean and standard deviation.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any

from utils.evaluation.catalog import PAPERS_FIVE
from utils.images import MOST_NAMED
from utils.report import records
from utils.report.figures import COLORS, Manifests, RadarLine, close_looks, contact_sheets, draw_radar, training_curves
from utils.report.records import Row, is_file
from utils.report.tables import GROUP_SIZES, TRANSFER_GROUPS, Cell, Model, as_cell, averages, make_tables
from utils.report.verdicts import headline
from utils.storage import read_json, require_writable, write_page

SEED_SUFFIX = re.compile(r"[-_]seed\d+$")
LEGEND = (
    "Percent; ± is the standard deviation over seeds, (a to b) a 95 % interval, a signed number the difference to the "
    "first row on the same images; an empty cell was not measured. The interval of a single run speaks of its images, "
    "not of other seeds."
)
NOTHING_RECORDED = "Nothing was run for this report: its numbers are published ones, or their runs' records are gone."
FEWEST_AXES = 3  # of a radar plot: two would be a line
OWN_AXES = {"folder": "top-1", "transfer": "linear probe, top-1"}  # by the group of the set


def write_report(
    results: Sequence[Path],
    out: Path,
    title: str | None = None,
    show_data: Sequence[tuple[str, Path]] = (),
    manifests: Manifests = lambda folder: None,
) -> list[Path]:
    """Write OUT/report.html, OUT/report.md and, where at least three axes are known, OUT/radar.{svg,png}.

    RESULTS: results.jsonl files. SHOW_DATA: (name, class-folder root or generated dataset) pairs whose images are set
    side by side, class by class; MANIFESTS tells which files of a generated dataset are its images. Returns the files
    written. Raises UserError on a missing or damaged file.
    """
    rows = records.read_results(results)
    models = group_models(rows)
    require_writable(out, "--out")
    datasets = (records.read_record(folder / "dataset.json", records.Described) for _, folder in show_data)
    made: list[records.Made] = [found for found in datasets if found]
    made += [training for model in models for training in model.trainings]
    made += [sidecar for model in models for sidecar in model.sidecars]
    page: dict[str, Any] = {
        "title": title or "Can synthetic images replace real ones?",
        "headline": headline(models),
        "tables": make_tables(models, rows),
        "legend": LEGEND,
        "nothing_recorded": NOTHING_RECORDED,
        "curves": training_curves({model.name: (model.color, model.runs) for model in models}),
        "looks": close_looks({model.name: model.sidecars for model in models}),
        "sheets": contact_sheets(show_data, manifests),
        **records.provenance(made),
    }
    written = [out / "report.html", out / "report.md"]
    axes, values = radar_values(models)
    page |= {"radar": None, "radar_note": radar_note(axes, models)}
    if len(axes) >= FEWEST_AXES:
        draw_radar(axes, radar_lines(axes, values, models), out / "radar.svg", out / "radar.png")
        drawn = (out / "radar.svg").read_text(encoding="utf-8")
        page["radar"] = drawn[drawn.index("<svg") :]
        written += [out / "radar.svg", out / "radar.png"]
    for path in written[:2]:
        write_page(path, f"report/{path.name}.j2", **page)
    return written


def group_models(rows: Iterable[Row]) -> list[Model]:
    """The models in order of appearance, each with what its runs recorded; blue if trained on real images, else red."""
    models: dict[str, Model] = {}
    values: dict[tuple[str, str, str], list[Row]] = {}
    sidecars_in = cache(records.read_sidecars)
    for row in rows:
        name = SEED_SUFFIX.sub("", row.model)
        model = models.setdefault(name, Model(name, published=row.source == "published", kind=row.trained_on))
        model.unfinished |= row.unfinished
        values.setdefault((name, row.dataset, row.metric), []).append(row)
        if row.checkpoint_sha256 and row.checkpoint_sha256 not in model.checkpoints:
            model.checkpoints.add(row.checkpoint_sha256)
            beside = sidecars_in(Path(row.folder))
            model.sidecars += [one for one in beside if one.checkpoint_sha256 == row.checkpoint_sha256]
        run = run_of(row)
        if run and run not in model.runs:
            model.runs.append(run)
            model.trainings += [read_json(run / "args.json", records.Training)]
    for (name, dataset, metric), measured in values.items():
        models[name].cells[dataset, metric] = as_cell(measured, models[name].sidecars)
    used: Counter[str] = Counter()
    for model in models.values():
        describe_training(model)
        model.color = COLORS[model.kind][used[model.kind] % len(COLORS[model.kind])]
        used[model.kind] += 1
    return list(models.values())


def run_of(row: Row) -> Path | None:
    """The folder of the run of train.py that made the checkpoint: beside it or, where runs were moved, its results'."""
    beside = Path(row.checkpoint).parent if row.checkpoint and is_file(row.checkpoint) else Path(row.folder)
    return beside if row.source != "published" and is_file(beside / "args.json") else None


def describe_training(model: Model) -> None:
    """Set what all of the model's runs agree on: the kind, supervision and number of its training images, its steps."""
    for place in ("kind", "supervision", "plan.images", "steps"):
        found = set(map(attrgetter(place), model.trainings))
        if len(found) == 1:
            setattr(model, place.removeprefix("plan."), found.pop())


# ===== radar =====


def radar_values(models: Sequence[Model]) -> tuple[list[str], dict[str, dict[str, float]]]:
    """(the paper's axes that some model knows, {model: {axis: percent}}); without any, an axis each of one's own sets.

    A transfer group is the mean top-1 of the same sets for every model: one that lacks a set has no value there.
    """
    axes = {f"{name}\ntop-5": {model.name: model.cells.get((name, "top5")) for model in models} for name in PAPERS_FIVE}
    for group, shown in TRANSFER_GROUPS.items():
        measured = {name for model in models for (name, _), cell in model.cells.items() if cell.group == group}
        part = f" ({len(measured)} of {GROUP_SIZES[group]})" if len(measured) < GROUP_SIZES[group] else ""
        tops = {model.name: [model.cells.get((name, "top1")) for name in measured] for model in models}
        axes[f"{shown}{part}\ntop-1"] = {name: averages(cells)[0] for name, cells in tops.items()}
    known = {axis: cells for axis, cells in axes.items() if any(cells.values())} or own_axes(models)
    return list(known), {
        model.name: {axis: cell.value for axis, cells in known.items() if (cell := cells[model.name])}
        for model in models
    }


def own_axes(models: Sequence[Model]) -> dict[str, dict[str, Cell | None]]:
    """{axis: {model: cell}} of the sets given with --test and --transfer: top-1 of the classifier or of a probe."""
    axis_of = {
        name: f"{name}\n{OWN_AXES[cell.group]}"
        for model in models
        for (name, metric), cell in model.cells.items()
        if metric == "top1" and cell.group in OWN_AXES
    }
    return {axis: {model.name: model.cells.get((name, "top1")) for model in models} for name, axis in axis_of.items()}


def radar_lines(axes: Sequence[str], values: dict[str, dict[str, float]], models: Sequence[Model]) -> list[RadarLine]:
    """The polygons: each says what sets it apart, an axis it lacks or how many classes it chose between."""
    lines = []
    classes = {model.name: classes_of(model) for model in models}
    for model in models:
        known, k = values[model.name], classes[model.name]
        if not known:
            continue
        others = k and len({*classes.values()} - {0}) > 1
        marks = [f"{k:,} classes"] * bool(others)
        marks += [f"{len(known)} of {len(axes)} axes"] * (len(known) < len(axes))
        label = f"{model.name} ({', '.join(marks)})" if marks else model.name
        lines.append(RadarLine(label, model.color, known, dashed=bool(others and k < max(classes.values()))))
    return lines[:MOST_NAMED]


def classes_of(model: Model) -> int:
    """The classes that the model chose between on the ImageNet sets; 0 where it was not judged on them."""
    cells = [model.cells.get((name, "top5")) for name in PAPERS_FIVE]
    return max((cell.num_classes or 0 for cell in cells if cell), default=0)


def radar_note(axes: Sequence[str], models: Sequence[Model]) -> str:
    """What to bear in mind when looking at the plot, or why there is none."""
    if len(axes) < FEWEST_AXES:
        known = ", ".join(axis.replace("\n", " ") for axis in axes) or "none"
        return (
            f"No radar plot: it needs {FEWEST_AXES} of its {len(PAPERS_FIVE) + len(TRANSFER_GROUPS)} axes (top-5 on "
            f"{', '.join(PAPERS_FIVE)}; mean top-1 on {', '.join(TRANSFER_GROUPS.values())}), or as many of your own "
            f"sets; known here: {known}."
        )
    if axes == list(own_axes(models)):
        return "Top-1 of the classifiers, and of linear probes of their frozen features on other classes, in percent."
    note = "Top-5 on ImageNet's test sets, mean top-1 on the groups of transfer datasets, in percent."
    if len({*map(classes_of, models)} - {0}) > 1:
        note += " Models of fewer classes (dashed) answer an easier question: compare them among themselves only."
    if len(models) > MOST_NAMED:
        note += f" Of {len(models)} models the first {MOST_NAMED} are drawn."
    return note
