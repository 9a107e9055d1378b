"""The sentences of a study's page, and the wording of its numbers: nothing without an interval."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from utils.report.records import Described, Training, read_record
from utils.storage import read_json
from utils.study import curves
from utils.study.curves import Match
from utils.study.findings import Findings
from utils.study.plan import Plan, quality_of

BEYOND = 0.05  # a rate that would be written as 0.0
CERTAIN = 0.975  # of the resamples, from which on "no number suffices" is said without reserve


def labels(one: Findings) -> dict[str, str]:
    """Row or mix -> its label."""
    study = one.plan.study
    return {name: part.label or name for name, part in {**study.rows, **study.mixes}.items()}


def images(value: float, digits: int = 0) -> str:
    """ "1,150", "2.4" with a digit; "no number" where none suffices."""
    if math.isinf(value):
        return "no number"
    if digits:
        return f"{value:,.{digits}f}" if value < 100 else f"{value:,.0f}"
    scale = 10 ** max(0, math.floor(math.log10(max(value, 1))) - 2)  # three digits are more than the interval allows
    return f"{round(value / scale) * scale:,.0f}"


def between(value: Any, draws: np.ndarray, form: str) -> tuple[str, str]:
    """(value, its interval) as FORM writes numbers."""
    low, high = curves.interval(draws)
    return f"{value:{form}}", f"{low:{form}} to {high:{form}}"


def percent(value: float, draws: np.ndarray) -> tuple[str, str]:
    """(percent, interval) of shares."""
    return between(100 * value, 100 * draws, ".1f")


def rate(match: Match, one: Findings, row: str) -> tuple[str, str]:
    """A cell of the exchange table."""
    span = f"{images(match.rate_low, 1)} to {images(match.rate_high, 1)}"
    if math.isinf(match.needed):
        return "none", f"in {100 * match.never:.0f} % of resamples" + ("" if match.never >= CERTAIN else f"; {span}")
    return f"{images(match.rate, 1)}{beyond(match, one, row)}", f"{span}; {images(match.needed)} a class"


def beyond(match: Match, one: Findings, row: str) -> str:
    """ "°" where a match lies outside of the row's sizes, and only its curve's form says so."""
    sizes = [one.measured[title].size for title in one.titles(row)]
    return "" if min(sizes) <= match.needed <= max(sizes) else "°"


def answer(one: Findings) -> list[str]:
    """The answer in sentences, the exchange rate first."""
    names, said = labels(one), []
    if one.best:
        said.append(exchange_sentence(one, names))
    if sentence := same_size_sentence(one, names):
        said.append(sentence)
    worth = [(match, title) for title in one.of if (match := one.worth(title))]
    if worth:
        said.append(addition_sentence(one, names, worth))
    return said or ["No two rows have a size in common yet, so nothing is compared."]


def exchange_sentence(one: Findings, names: dict[str, str]) -> str:
    """How many images of the best row match the reference, at the largest size they do and at the largest."""
    best, reference = one.best, names[one.reference]
    matches = one.matches[best]
    finite = [size for size, match in matches.items() if math.isfinite(match.needed)]
    last = max(matches)
    within = [size for size in finite if not beyond(matches[size], one, best)]
    parts = []
    for size in dict.fromkeys([*(within or finite)[-1:], last]):
        match = matches[size]
        if math.isfinite(match.needed):
            span = f"{images(match.low)} to {images(match.high)}"
            outside = ", an extrapolation" if beyond(match, one, best) else ""
            parts.append(
                f"to match {size:,.0f} images a class of “{reference}” you need {images(match.needed)} (95 % interval "
                f"{span}{outside}) of “{names[best]}”"
            )
        elif match.never >= CERTAIN:
            curve, draws = one.curves[best]
            value, span = percent(1 - curve.e0, 1 - draws.e0)
            parts.append(
                f"to match {size:,.0f} of “{reference}” no number of “{names[best]}” suffices: its curve ends at "
                f"{value} % ({span})"
            )
        else:
            parts.append(
                f"whether any number of “{names[best]}” matches {size:,.0f} of “{reference}” is open (none does in "
                f"{100 * match.never:.0f} % of resamples, {images(match.low)} or more in the others)"
            )
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def same_size_sentence(one: Findings, names: dict[str, str]) -> str:
    """The best row beside the reference at the largest size that they share."""
    reference = {one.of[title].size: title for title in one.titles(one.reference)}
    others = [t for t, p in one.of.items() if p.group in one.plan.study.rows and p.group != one.reference]
    shared = [title for title in others if one.of[title].size in reference]
    if not shared:
        return ""
    size = max(one.of[title].size for title in shared)
    title = max((t for t in shared if one.of[t].size == size), key=lambda t: one.cell(t).value)
    value, low, high = one.difference(title, reference[size])
    mine, its = one.cell(title), one.cell(reference[size])
    verdict = "" if low > 0 or high < 0 else "; the interval includes zero, so no difference is shown"
    return (
        f"With {size:,} images a class “{names[one.of[title].group]}” reaches {mine.value:.1f} % ({mine.interval}) on "
        f"{one.test} and “{names[one.reference]}” {its.value:.1f} % ({its.interval}): {value:+.1f} points "
        f"({low:+.1f} to {high:+.1f}){verdict}."
    )


def worth_text(match: Match) -> tuple[str, str]:
    """How many added images do the work of one of the first, and its interval."""
    rate = "less than one" if match.rate < BEYOND else images(match.rate, 1)  # better than the first row's curve gets
    return rate, f"{images(match.rate_low, 1)} to {images(match.rate_high, 1)}"


def addition_sentence(one: Findings, names: dict[str, str], worth: Sequence[tuple[Match, str]]) -> str:
    """What the most added images are worth."""
    match, title = max(worth, key=lambda pair: pair[0].needed)
    point = one.of[title]
    base, other = (names[row] for row in point.rows)
    added = f"{match.needed:,.0f} images a class of “{other}” added to {point.first:,} of “{base}”"
    rate, span = worth_text(match)
    return f"{added}: of them {rate} (95 % interval {span}) do the work of one more of the latter."


def seeds_of(one: Findings) -> str:
    """ "3", or "1 to 3" where training sets differ."""
    counts = {len(measured.errors) for measured in one.measured.values()}
    return " to ".join(map(str, sorted({min(counts), max(counts)})))


def bars(one: Findings) -> str:
    """What the bars of a figure are."""
    n = max(measured.images for measured in one.measured.values())
    return f"Points: means over seeds ({seeds_of(one)} each). Bars: 95 % intervals over seeds and {n:,} test images."


def notes(one: Findings) -> list[str]:
    """What ± and intervals are, how many seeds, how many comparisons, and what the study does not vary."""
    study = one.plan.study
    several, fewest = seeds_of(one), min(len(measured.errors) for measured in one.measured.values())
    shown = len(one.of) + sum(map(len, one.matches.values()))
    budget = (
        "Every run has the recipe's epochs, so more images are also more training, and an epoch of a mix is as long as "
        "both of its rows."
    )
    if study.steps:
        budget = (
            f"Every run takes {study.steps:,} optimizer steps, to the nearest epoch: more images, no more training."
        )
    unpaired = sum(measured.hits is None for measured in one.measured.values())
    paired = "The same resampled test images serve all training sets, so differences are paired."
    if unpaired:
        paired = f"{unpaired} training sets have no answer of each image on record and are resampled by themselves."
    alone = " With one seed an interval speaks of the test images alone." if fewest == 1 else ""
    return [
        f"± is the standard deviation over seeds ({several} a training set); an interval is the central 95 % of "
        f"{curves.RESAMPLES:,} resamples of test images and seeds together. {paired} The seeds' deviations are pooled "
        f"over the sizes of a row.{alone}",
        f"The page shows {shown} intervals. At 95 % about one in twenty misses the truth by chance, and the row named "
        "first is the best of several on the same test images, so its own numbers are a little optimistic: confirm it "
        "with other seeds before it decides anything.",
        budget,
        "Smaller sets are the first images of larger ones. Seeds vary weights, order and augmentations, not which "
        "images were taken or drawn.",
        "Curves are least squares of err(n) = e0 + a n^-b with e0 and a not below 0; they say nothing certain beyond "
        "the sizes that were measured.",
    ]


# ===== what else is measured =====


def quality(plan: Plan, row: str) -> dict[str, Any]:
    """The totals of a row's dataset_report.json; {} where it was not measured."""
    found = quality_of(plan, row)
    path = found[0] / "dataset_report.json" if found else None
    return read_json(path).get("totals", {}) if path and path.is_file() else {}


def minutes(one: Findings, title: str) -> tuple[float, float]:
    """Device minutes of (drawing the images of a row's training set, training on them once), as their records say."""
    point, dataset = one.of[title], one.plan.datasets[one.of[title].group]
    record = read_record(dataset.folder / "dataset.json", Described) or Described()
    drawing = (record.cost.seconds or 0) * point.images / max(1, sum(dataset.counts.values()))
    runs = [read_record(run.folder / "args.json", Training) for run in one.plan.points if run.title == title]
    seconds = [run.cost.seconds for run in runs if run and run.cost.seconds]
    return drawing / 60, float(np.mean(seconds)) / 60 if seconds else 0.0
