"""results.jsonl -> report.md and one self-contained report.html: the paper's tables, the radar plot, and a close look.

Everything shown comes from files: the results, and what lies beside each of them (args.json, log.jsonl, eval/*.json).
Runs that differ by their seed alone (`NAME-seed0`, `NAME-seed1`, ...) are one model: mean and standard deviation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from utils.report.figures import COLORS, close_looks, contact_sheets, draw_radar, training_curves
from utils.report.records import Row, provenance, read_described, read_results, read_training
from utils.report.tables import GROUP_SIZES, IMAGENET_SETS, TRANSFER_GROUPS, Cell, Model, as_cell, averages, make_tables
from utils.storage import atomic_write, require_writable, write_page

SEED_SUFFIX = re.compile(r"[-_]seed\d+$")
LEGEND = (
    "Percent; ± is the standard deviation over seeds, (a to b) a 95 % interval, a signed number the difference to the "
    "first row on the same images; an empty cell was not measured."
)


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
        "legend": LEGEND,
        "curves": training_curves({model.name: (model.color, model.folders) for model in models}),
        "looks": close_looks({model.name: (model.folders, model.checkpoints) for model in models}),
        "sheets": contact_sheets(show_data),
        **provenance([one for model in models for one in model.folders], [folder for _, folder in show_data]),
    }
    written = [out / "report.html", out / "report.md"]
    page["radar"] = None
    axes, polygons = radar_values(models)
    if axes:
        colors = {model.name: model.color for model in models}
        draw_radar(axes, polygons, out / "radar.svg", out / "radar.png", colors)
        page["radar"] = (out / "radar.svg").read_text(encoding="utf-8")
        written += [out / "radar.svg", out / "radar.png"]
    write_page(out / "report.html", "report/report.html.j2", **page)
    atomic_write(out / "report.md", render_markdown(page).encode())
    return written


def group_models(rows: Iterable[Row]) -> list[Model]:
    """The models in order of appearance: blue for the first, red for the second, as on the paper's page."""
    models: dict[str, Model] = {}
    values: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        name = SEED_SUFFIX.sub("", row.model)
        if name not in models:
            color = COLORS[len(models) % len(COLORS)]
            models[name] = Model(name, color, published=row.source == "published")
        model = models[name]
        if Path(row.folder) not in model.folders and row.source != "published":
            model.folders.append(Path(row.folder))
        if row.checkpoint_sha256:
            model.checkpoints.add(row.checkpoint_sha256)
        values.setdefault((name, row.dataset, row.metric), []).append(row)
    for (name, dataset, metric), measured in values.items():
        models[name].cells[dataset, metric] = as_cell(measured)
    return list(models.values())


# ===== in words =====


def headline(models: Sequence[Model]) -> list[str]:
    """What the numbers say of runs of train.py on one set of images; nothing for other kinds of report."""
    folders = {dataset for model in models for dataset, metric in model.cells if metric == "top1"}
    if len(folders) != 1:
        return []
    (dataset,) = folders
    trained = [model for model in models if any((folder / "args.json").is_file() for folder in model.folders)]
    scored = [(model, model.cells[dataset, "top1"]) for model in trained if (dataset, "top1") in model.cells]
    if len(scored) < 2 or len({cell.size for _, cell in scored}) > 1:
        return []
    reference, best = scored[0], max(scored[1:], key=lambda pair: pair[1].value)
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
        training = read_training(folder)
        for data in training.data if training else []:
            if described := read_described(data):
                return described.recipe.get("guidance_scale")
    return None


# ===== radar =====


def radar_values(models: Sequence[Model]) -> tuple[list[str], dict[str, dict[str, float]]]:
    """(the paper's axes that some model knows, {model: {axis: percent}}); no axes below three: no polygon then.

    A transfer group is the mean top-1 of the same sets for every model: one that lacks a set has no value there.
    """
    values: dict[str, dict[str, float]] = {model.name: {} for model in models}
    axes = [f"{name}\ntop-5" for name in IMAGENET_SETS]
    for axis, name in zip(axes, IMAGENET_SETS, strict=True):
        for model in models:
            if cell := model.cells.get((name, "top5")):
                values[model.name][axis] = cell.value
    for group, shown in TRANSFER_GROUPS.items():
        measured = {name for model in models for (name, _), cell in model.cells.items() if cell.group == group}
        part = f" ({len(measured)} of {GROUP_SIZES[group]})" if len(measured) < GROUP_SIZES[group] else ""
        axes.append(f"{shown}{part}\ntop-1")
        for model in models:
            if mean := averages([model.cells.get((name, "top1")) for name in measured])[0]:
                values[model.name][axes[-1]] = mean.value
    known = [axis for axis in axes if any(axis in its for its in values.values())]
    return known if len(known) >= 3 else [], values


# ===== rendering =====


def render_markdown(page: dict) -> str:
    """The same tables for a terminal or a repository; pictures stay in the HTML file and in radar.png."""
    lines = [f"# {page['title']}", "", *(f"{sentence}\n" for sentence in page["headline"])]
    for made in page["tables"]:
        lines += [f"## {made['title']}", ""]
        lines += [markdown_row(["model", *made["columns"]]), markdown_row(["---"] * (len(made["columns"]) + 1))]
        for row in made["rows"]:
            cells = map(markdown_cell, row["cells"], row["differences"], row["sizes"])
            lines.append(markdown_row([row["model"].name, *cells]))
        lines += ["", f"{made['note']}. " * bool(made["note"]) + LEGEND, ""]
    if page["radar"]:
        lines += ["![radar plot](radar.png)", ""]
    for look in page["looks"]:
        lines += [f"## Per class: {look['dataset']}", ""]
        names = [model["name"] for model in look["models"]]
        lines += [markdown_row(["class", "n", *names]), markdown_row(["---"] * (len(names) + 2))]
        for row in look["classes"]:
            lines.append(
                markdown_row(
                    [row["name"], row["n"], *("" if value is None else f"{value:.1f}" for value in row["top1"])]
                )
            )
        lines.append("")
    lines += ["## How this was made", "", *(f"    {command}" for command in page["commands"]), ""]
    lines += [f"- {name}: {value}" for name, value in page["versions"].items()]
    return "\n".join(lines) + "\n"


def markdown_row(cells: Iterable[Any]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def markdown_cell(cell: Cell | None, difference: str, size: str) -> str:
    if cell is None:
        return ""
    text = f"{cell} ({cell.interval})" if cell.interval else str(cell)
    return "; ".join(part for part in (text, difference, size) if part)
