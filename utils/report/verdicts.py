"""What the numbers say, in sentences, each with the 95 % interval it stands on; if that includes zero, it says so."""

import math
import statistics
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from scipy.special import stdtrit

from utils.report.records import Described, Quality, dataset_root, read_record
from utils.report.tables import Cell, Difference, Model, difference

OPEN = "the interval includes zero, so no difference is shown"
# Keys of a dataset's recipe that say where and how much was drawn, not what.
MACHINE = {"name", "classes", "images_per_class", "dtype", "attention", "compile", "batch_size", "guidance_scale"}


def headline(models: Sequence[Model]) -> list[str]:
    """Sentences on runs of train.py that were judged on the same images; nothing for other kinds of report.

    They speak of the one set that was judged; of several of IN-Val, or else of the first folder of one's own (--test).
    """
    trained = [model for model in models if model.trainings]
    measured = {
        dataset: cell.group for model in trained for (dataset, metric), cell in model.cells.items() if metric == "top1"
    }
    folders = [dataset for dataset, group in measured.items() if group == "folder"]
    dataset = next(iter(measured)) if len(measured) == 1 else "IN-Val"
    if dataset not in measured and folders:
        dataset = folders[0]
    scored = scores(trained, dataset)
    if len(scored) < 2 or len({cell.size for _, cell in scored}) > 1:
        return []
    reference = next((pair for pair in scored if pair[0].kind == "real"), scored[0])
    others = [pair for pair in scored if pair[0] is not reference[0]]
    best = max(others, key=lambda pair: pair[1].value)
    said = [against_reference(best, reference, scored), about_guidance(scored)]
    transfers = [dataset for dataset, group in measured.items() if group == "transfer"]
    said += [about_transfer(dataset, scores((best[0], reference[0]), dataset)) for dataset in transfers]
    return list(filter(None, said))


def scores(models: Sequence[Model], dataset: str) -> list[tuple[Model, Cell]]:
    """Those of MODELS that were judged on DATASET, with their top-1."""
    return [(model, model.cells[dataset, "top1"]) for model in models if (dataset, "top1") in model.cells]


def against_reference(
    best: tuple[Model, Cell], reference: tuple[Model, Cell], scored: Sequence[tuple[Model, Cell]]
) -> str:
    """The best other model beside the reference, their sizes, and the one of equal budget where there is one."""
    model, cell = best
    sentences = [
        f"The classifier trained on “{model.name}”{_size(model)} recognises {cell} % of {cell.n or 0:,} real images, "
        f"the one trained on “{reference[0].name}”{_size(reference[0])} {reference[1]} %: "
        f"{_verdict(cell, reference[1])}."
    ]
    if not model.has_budget_of(reference[0]):
        fair = [pair for pair in scored if pair[0] is not reference[0] and pair[0].has_budget_of(reference[0])]
        if fair:
            other, its = max(fair, key=lambda pair: pair[1].value)
            sentences.append(f"At an equal budget “{other.name}” has {its} %: {_verdict(its, reference[1])}.")
        elif model.images and reference[0].images:
            sentences.append("The two differ in images or steps, and no run here has an equal budget.")
    for one, its in (best, reference):
        if its.leaked:
            sentences.append(f"“{one.name}” was trained on {its.leaked:,} of these images.")
    return " ".join(sentences)


def about_transfer(dataset: str, pair: Sequence[tuple[Model, Cell]]) -> str:
    """The best model's frozen features beside the reference's on other classes; "" where one was not judged there."""
    if len(pair) < 2:
        return ""
    (model, cell), (reference, its) = pair
    found = difference(cell, its)
    verdict = _verdict(cell, its)
    if found and not found.shown:
        most = max(-found.low, found.high)
        verdict = f"{found}; the interval includes zero: on a par, to within {most:.1f} points"
    return (
        f"Transfer to {dataset}, by linear probes of the frozen features: “{model.name}” {cell} %, “{reference.name}” "
        f"{its} %: {verdict}."
    )


def _size(model: Model) -> str:
    parts = [f"{model.trained_on} images"] * bool(model.images) + [f"{model.steps or 0:,} steps"] * bool(model.steps)
    return f" ({', '.join(parts)})" if parts else ""


def _verdict(a: Cell, b: Cell) -> str:
    found = difference(a, b)
    if found is None:
        return f"{a.value - b.value:+.2f} points, for which no interval can be given, so no difference is shown"
    excludes = "the interval excludes zero"
    if found.of_single_runs:
        excludes += " for these two runs; other seeds may differ"
    return f"{found}; {excludes if found.shown else OPEN}"


def about_guidance(scored: Sequence[tuple[Model, Cell]]) -> str:
    """Least against most guidance, of runs that saw as many images in as many steps; "" where there are no such two."""
    known = [(guidance, pair) for pair in scored if (guidance := guidance_of(pair[0])) is not None]
    pairs = [
        (low, high)
        for low, high in combinations(sorted(known, key=lambda one: one[0]), 2)
        if low[0] < high[0] and _same_budget(low[1][0], high[1][0])
    ]
    if not pairs:
        return ""
    (low, (less, cell)), (high, (more, other)) = max(pairs, key=lambda pair: pair[1][0] - pair[0][0])
    found = difference(cell, other)
    said = f"Guidance {low:g} against {high:g}: {found or f'{cell.value - other.value:+.2f} points'}; "
    differing = ", ".join(_other_differences(less, more))
    if found is None or not found.shown:
        said += OPEN if found else "no interval can be given, so no difference is shown"
    elif differing:
        said += f"but the datasets differ in {differing} too"
    else:
        better, like = ("less", "as the paper found") if found.value > 0 else ("more", "unlike in the paper")
        runs = " in these two runs" if found.of_single_runs else ""
        said += f"{better} guidance gave better training data{runs}, {like}"
    return f"{said}. {_about_diversity(less, more)}".strip()


def _same_budget(a: Model, b: Model) -> bool:
    unknown = None in (a.images, b.images, a.steps, b.steps)
    return a.has_budget_of(b) or (unknown and (a.images, a.steps) == (b.images, b.steps))


def guidance_of(model: Model) -> float | None:
    """The guidance scale of the one generated dataset that a model was trained on; None for other models."""
    value = _recipe_of(model).get("guidance_scale")
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _recipe_of(model: Model) -> dict:
    root = _dataset_of(model)
    described = read_record(root / "dataset.json", Described) if root else None
    return described.recipe if described else {}


def _dataset_of(model: Model) -> Path | None:
    paths = {Path(source.path) for training in model.trainings for source in training.data()}
    return dataset_root(paths.pop()) if len(paths) == 1 else None


def _other_differences(a: Model, b: Model) -> list[str]:
    first, second = _recipe_of(a), _recipe_of(b)
    return sorted(key for key in (first.keys() | second.keys()) - MACHINE if first.get(key) != second.get(key))


def _about_diversity(less: Model, more: Model) -> str:
    """Whether less guidance drew more varied images, if --dataset-report measured both datasets in the same way."""
    folders = _dataset_of(less), _dataset_of(more)
    first, second = (read_record(folder / "dataset_report.json", Quality) if folder else None for folder in folders)
    if not first or not second or first.descriptor != second.descriptor:
        return ""
    theirs = {row.id: row.diversity for row in second.classes}
    pairs = [(row.diversity, theirs[row.id]) for row in first.classes if row.id in theirs]
    gaps = [a - b for a, b in pairs if a is not None and b is not None]
    found = mean_difference(gaps)
    if found is None:
        return ""
    verdict = f"less guidance drew {'more' if found.value > 0 else 'less'} varied images"
    return (
        f"Mean cosine distance of two images of a class ({first.descriptor}): {found.value:+.3f} (95 % interval "
        f"{found.low:+.3f} to {found.high:+.3f} over {len(gaps)} classes), so "
        f"{verdict if found.shown else 'no difference in variety is shown'}."
    )


def mean_difference(gaps: Sequence[float]) -> Difference | None:
    """The mean of paired differences with Student's 95 % interval; None for fewer than two."""
    if len(gaps) < 2:
        return None
    mean = statistics.fmean(gaps)
    half = float(stdtrit(len(gaps) - 1, 0.975)) * statistics.stdev(gaps) / math.sqrt(len(gaps))
    return Difference(mean, mean - half, mean + half, "Student")
