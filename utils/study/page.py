"""A study's page: the answer, then curves, exchange rates, prompts, mixes, diversity and cost; HTML, Markdown, CSV.

No number stands without its interval. A section is a figure, a table and a note, so that the three files say the same.
"""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.cli import command_line
from utils.machine import snapshot
from utils.report.records import Described, read_record
from utils.storage import MOST_TOML, atomic_write, read_regular, write_page
from utils.study import answers
from utils.study.answers import labels, percent
from utils.study.figures import Series, colors_of, draw
from utils.study.findings import Findings, read_findings
from utils.study.plan import Plan

Text = str | tuple[str, str]  # of a cell: what it says, and small below it


@dataclass
class Section:
    """A part of the page; without rows or a figure it is left out."""

    title: str
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[Text]] = ()
    note: str = ""
    figure: str = ""
    caption: str = ""


def write_study(plan: Plan) -> list[Path]:
    """Write study.html, study.md and study.csv of what is done into the study's folder; [] before anything is."""
    found = read_findings(plan)
    if not found:
        print("study: no point is done yet, so there is no page")
        return []
    first = next(iter(found.values()))
    sections: list[Section] = []
    for one in found.values():
        sections += [scaling(one), exchange(one), addition(one)]
    sections += [prompts(first), mixing(first), diversity(first), cost(first)]
    missing = len(plan.points) - sum(len(one.errors) for one in first.measured.values())
    page = {
        "title": plan.study.title,
        "answer": answers.answer(first) + [f"{missing} of {len(plan.points)} runs are not done yet."] * bool(missing),
        "sections": [section for section in sections if section.rows or section.figure],
        "notes": answers.notes(first),
        "command": command_line().replace("__main__.py", "-m utils.study"),
        "file": read_regular(plan.study.path, MOST_TOML).decode(),
        "versions": {name: version for name, version in snapshot()["packages"].items() if version},
    }
    out = plan.out
    written = [write_page(out / name, f"study/{name}.j2", **page) for name in ("study.html", "study.md")]
    atomic_write(out / "study.csv", as_csv(found.values()).encode())
    return [*written, out / "study.csv"]


def as_csv(found: Iterable[Findings]) -> str:
    """A line a training set and test: what it is, what it reached, each seed's number."""
    buffer = io.StringIO()
    lines = csv.writer(buffer, lineterminator="\n")
    head = ["test", "group", "images_per_class", "size", "share", "first", "seeds", "top1", "low", "high", "std"]
    lines.writerow([*head, "published", "top1_of_seeds"])
    for one in found:
        for title, point in one.of.items():
            cell, measured = one.cell(title), one.measured[title]
            row = [one.test, point.group, f"{measured.size:g}", point.size, point.share, point.first, cell.runs]
            numbers = [f"{value:.3f}" for value in (cell.value, cell.low, cell.high)]
            spread = "" if cell.spread is None else f"{cell.spread:.3f}"
            singles = " ".join(f"{100 * (1 - error):.3f}" for error in measured.errors)
            lines.writerow([*row, *numbers, spread, published(one, title), singles])
    return buffer.getvalue()


def published(one: Findings, title: str) -> str:
    """The published top-1 that the study file gives for a training set; "" where it gives none."""
    row = one.plan.study.rows.get(one.of[title].group)
    first = one.test == one.plan.study.judged[0]
    value = row.published.get(str(one.of[title].size)) if row and first else None
    return "" if value is None else f"{value:g}"


# ===== sections =====


def scaling(one: Findings) -> Section:
    """Accuracy against images a class, with the fitted curves."""
    study, names = one.plan.study, labels(one)
    colors = colors_of(list(study.rows), study.reference)
    series, rows = list[Series](), list[list[Text]]()
    sizes = sorted({point.size for point in one.of.values() if point.group in study.rows})
    for row in study.rows:
        values, cells = [], dict[int, Text]()
        for title in one.titles(row):
            cell, paper = one.cell(title), published(one, title)
            values.append((one.measured[title].size, cell))
            cells[one.of[title].size] = str(cell), cell.interval + f"; published {paper}" * bool(paper)
        if values:
            rows.append([names[row], *(cells.get(size, "") for size in sizes)])
            curve = one.curves.get(row)
            line = (lambda x, fitted=curve[0]: 100 * (1 - fitted.error(x))) if curve else None
            series.append(Series(names[row], colors[row][0], values, line, marker=colors[row][1]))
    figure = draw(series, "images a class (logarithmic)", f"top-1 on {one.test} (%)", log=True) if series else ""
    caption = f"{answers.bars(one)} Lines: err(n) = e0 + a n^-b, where a row has three sizes."
    columns = ["images a class", *(f"{size:,}" for size in sizes)]
    return Section(f"Accuracy by number of images: {one.test}", columns, rows, figure=figure, caption=caption)


def exchange(one: Findings) -> Section:
    """Where each curve ends, and how many images of a row replace those of the reference."""
    names = labels(one)
    sizes = sorted({size for matches in one.matches.values() for size in matches})
    rows: list[list[Text]] = []
    for row, (curve, resamples) in one.curves.items():
        floor, exponent = percent(1 - curve.e0, 1 - resamples.e0), answers.between(curve.b, resamples.b, ".2f")
        rates: list[Text] = []
        for size in sizes:
            match = one.matches.get(row, {}).get(size)
            rates.append("1 by definition" if match is None else answers.rate(match, one, row))
        rows.append([names[row], floor, exponent, *rates])
    columns = ["trained on", "curve ends at, %", "exponent b"]
    columns += [
        f"for one of {size:,.0f} real" if one.reference == "real" else f"for one of {size:,.0f}" for size in sizes
    ]
    note = (
        f"Images of a row that replace one image of “{names[one.reference]}”, at the number of those in the column's "
        "head, by the fitted curves; below it the images a class this needs. “None”: the row's curve ends below that "
        "accuracy. ° beyond the sizes that were measured, so an extrapolation."
    )
    return Section(f"Exchange rate: {one.test}", columns, rows, note if rows else "")


def addition(one: Findings) -> Section:
    """What images added to real ones are worth in real ones."""
    names = labels(one)
    rows: list[list[Text]] = []
    for mix in one.plan.study.mixes:
        for title in one.titles(mix):
            if match := one.worth(title):
                point, cell = one.of[title], one.cell(title)
                kinds = f"{point.first:,} + {match.needed:,.0f}"
                rows.append([names[mix], kinds, (str(cell), cell.interval), answers.worth_text(match)])
    columns = ["mix", "images a class", f"top-1 on {one.test}, %", "added images worth one of the first"]
    return Section(f"Images added to others: {one.test}", columns, rows)


def prompts(one: Findings) -> Section:
    """The paper's table: prompts by guidance, at the number of images that most drawn rows have."""
    study = one.plan.study
    drawn = {}
    for name, row in study.rows.items():
        if row.generate is not None:
            asked = {"prompt": "c, d_c", "guidance_scale": 2.0} | study.generate | row.generate
            made = read_record(one.plan.datasets[name].folder / "dataset.json", Described) or Described()
            recipe = {key: value for key, value in made.recipe.items() if value is not None}
            drawn[name] = str((asked | recipe)["prompt"]), float((asked | recipe)["guidance_scale"])
    counts: dict[int, int] = {}
    for name in drawn:
        for title in one.titles(name):
            counts[one.of[title].size] = counts.get(one.of[title].size, 0) + 1
    if not counts or len({*drawn.values()}) < 2:
        return Section("")
    size = max(counts, key=lambda n: (counts[n], n))
    cells: dict[tuple[str, float], Text] = {}
    for name, place in drawn.items():
        for title in one.titles(name):
            if one.of[title].size == size:
                cells.setdefault(place, (str(one.cell(title)), one.cell(title).interval))
    scales = sorted({guidance for _, guidance in cells})
    rows = [[prompt, *(cells.get((prompt, g), "") for g in scales)] for prompt in dict.fromkeys(p for p, _ in cells)]
    columns = ["prompt", *(f"guidance {scale:g}" for scale in scales)]
    return Section(f"Prompts and guidance: {one.test}, {size:,} images a class", columns, rows)


def mixing(one: Findings) -> Section:
    """Accuracy by the second row's share of every epoch, between the two rows alone."""
    study, names = one.plan.study, labels(one)
    series, rows = list[Series](), list[list[Text]]()
    shares = sorted({0.0, 1.0, *(point.share for point in one.of.values() if point.share)})
    colors = colors_of(list(study.mixes), "")
    for name, mix in study.mixes.items():
        for size in sorted({one.of[title].size for title in one.titles(name)} if mix.shares else ()):
            inner = [title for title in one.titles(name) if one.of[title].size == size]
            found = {one.of[title].share or 0.0: one.cell(title) for title in inner}
            ends = zip((0.0, 1.0), (f"{row}-n{size}" for row in mix.rows), strict=True)
            found |= {share: one.cell(title) for share, title in ends if title in one.of}
            values = [(100 * share, cell) for share, cell in sorted(found.items())]
            cells = [(str(found[share]), found[share].interval) if share in found else "" for share in shares]
            rows.append([f"{names[name]}, {size:,} a class of each", *cells])
            series.append(Series(f"{names[name]}, {size:,}", colors[name][0], values, None, True, colors[name][1]))
    axes = "share of the second row in every epoch (%)", f"top-1 on {one.test} (%)"
    figure = draw(series, *axes, log=False) if series else ""
    columns = ["share of the second row", *(f"{share:.0%}" for share in shares)]
    return Section(f"Mixing: {one.test}", columns, rows, figure=figure, caption=answers.bars(one))


def diversity(one: Findings) -> Section:
    """Accuracy against what evaluate.py --dataset-report measured of each dataset."""
    study, names = one.plan.study, labels(one)
    colors = colors_of(list(study.rows), study.reference)
    series, rows = list[Series](), list[list[Text]]()
    for name in study.rows:
        totals, titles = answers.quality(one.plan, name), one.titles(name)
        if totals and titles:
            cell, size = one.cell(titles[-1]), one.of[titles[-1]].size
            measures = [f"{totals[key]:.1f}" if key in totals else "" for key in ("coverage", "density")]
            rows.append([names[name], f"{totals['images']:,}", *measures, f"{size:,}", (str(cell), cell.interval)])
            if "coverage" in totals:
                values = [(totals["coverage"], cell)]
                series.append(Series(names[name], colors[name][0], values, marker=colors[name][1]))
    figure = draw(series, "coverage of real test images (%)", f"top-1 on {one.test} (%)", log=False) if series else ""
    columns = ["dataset", "images measured", "coverage, %", "density, %", "images a class", f"top-1 on {one.test}, %"]
    note = "Coverage and density (Naeem et al., 2020) depend on the number of images: compare rows of equal numbers."
    return Section(
        "Accuracy and diversity", columns, rows, note, figure, f"Each row at its largest size. {answers.bars(one)}"
    )


def cost(one: Findings) -> Section:
    """Minutes of drawing and training, and what the last point of accuracy cost."""
    names, rows = labels(one), list[list[Text]]()
    sizes = sorted({point.size for point in one.of.values() if point.group in one.plan.study.rows})
    for name in one.plan.study.rows:
        cells, before, spent = dict[int, Text](), "", 0.0
        for title in one.titles(name):
            drawing, training = answers.minutes(one, title)
            last = ""
            if before:
                more = drawing + training - spent
                gain, low, high = one.difference(title, before)
                last = "; no gain shown"
                if low > 0:
                    last = f"; {more / gain:.2g} a point, {more / high:.2g} to {more / low:.2g}"
            if drawing + training:
                cells[one.of[title].size] = f"{drawing + training:.3g}", f"{drawing:.2g} + {training:.2g}{last}"
            before, spent = title, drawing + training
        rows += [[names[name], *(cells.get(size, "") for size in sizes)]] * bool(cells)
    note = (
        "Device minutes as measured, below them drawing + one training; of real images only training is counted. Then "
        "the minutes from the size before for a point of top-1, with the interval that the gain's gives."
    )
    columns = ["images a class", *(f"{size:,}" for size in sizes)]
    return Section("What a point of accuracy costs, in device minutes", columns, rows, note)
