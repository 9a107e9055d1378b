"""What a study's results say: points of each test from evaluate.py's files, their resamples, curves and matches."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from utils.evaluation.results import Row as Result
from utils.report.records import JUDGE_AGAIN, Sidecar
from utils.report.tables import Cell
from utils.storage import read_json
from utils.study import curves
from utils.study.curves import Curve, Match
from utils.study.plan import Plan, Point


class Findings:
    """The points of one TEST that are done, one a training set; draws (R, P) are their errors' resamples."""

    def __init__(self, plan: Plan, test: str, points: Sequence[tuple[Point, curves.Point]], draws: np.ndarray) -> None:
        self.plan, self.test = plan, test
        self.of = {point.title: point for point, _ in points}
        self.measured = {point.title: measured for point, measured in points}
        self.draws = {point.title: draws[:, column] for column, (point, _) in enumerate(points)}

    def titles(self, group: str) -> list[str]:
        """The training sets of a row or mix, smallest first."""
        found = [title for title, point in self.of.items() if point.group == group]
        return sorted(found, key=lambda title: (self.of[title].size, self.of[title].share or 0))

    def cell(self, title: str) -> Cell:
        """Top-1 of a training set in percent, with its 95 % interval over seeds and test images."""
        errors, (low, high) = 100 * self.measured[title].errors, curves.interval(100 * self.draws[title])
        spread = float(np.std(errors, ddof=1)) if len(errors) > 1 else None
        return Cell(100 - float(errors.mean()), spread, len(errors), 100 - high, 100 - low)

    def difference(self, title: str, other: str) -> tuple[float, float, float]:
        """Points of top-1 by which TITLE is better, with its paired interval."""
        value = 100 * (self.measured[other].error - self.measured[title].error)
        return (value, *curves.interval(100 * (self.draws[other] - self.draws[title])))

    @cached_property
    def curves(self) -> dict[str, tuple[Curve, Curve]]:
        """Row -> (curve, its resamples), of rows with enough sizes."""
        found = {}
        for row in self.plan.study.rows:
            titles = self.titles(row)
            sizes = [self.measured[title].size for title in titles]
            if len({*sizes}) >= curves.FEWEST_SIZES:
                errors = [self.measured[title].error for title in titles]
                resamples = np.stack([self.draws[title] for title in titles], 1)
                found[row] = curves.fit(sizes, errors), curves.fit_all(sizes, resamples)
        return found

    @property
    def reference(self) -> str:
        """The row that the others are to match."""
        return self.plan.study.reference

    @cached_property
    def matches(self) -> dict[str, dict[float, Match]]:
        """Row -> {images a class of the reference: how many of the row's match them}."""
        if self.reference not in self.curves:
            return {}
        sizes = [self.measured[title].size for title in self.titles(self.reference)]
        real, reals = self.curves[self.reference]
        return {
            row: {size: curves.substitution(real, curve, reals, resamples, size) for size in sizes}
            for row, (curve, resamples) in self.curves.items()
            if row != self.reference
        }

    @cached_property
    def best(self) -> str:
        """The row that matches most of the reference's sizes with the fewest images; "" if none has a curve."""

        def merit(row: str) -> tuple:
            needed = [match.needed for match in self.matches[row].values()]
            return (-sum(np.isfinite(needed)), sum(filter(np.isfinite, needed)), self.curves[row][0].e0)

        return min(self.matches, key=merit, default="")

    def worth(self, title: str) -> Match | None:
        """What the images that a mix adds are worth; None without a curve of the row that they are added to."""
        point, measured = self.of[title], self.measured[title]
        if not point.first or point.rows[0] not in self.curves:
            return None
        real, reals = self.curves[point.rows[0]]
        added = measured.size - point.first
        return curves.addition(real, reals, point.first, added, measured.error, self.draws[title])


def read_findings(plan: Plan) -> dict[str, Findings]:
    """Test -> what is known of it, in the study's order; tests that nothing was judged on are left out."""
    found: dict[str, dict[str, list[tuple[Point, Result, Sidecar | None]]]] = {}
    for point in plan.points:
        for row in point.results():
            path = point.judged / "eval" / f"{row.dataset}.{(row.checkpoint_sha256 or '')[:12]}.json"
            sidecar = read_json(path, Sidecar, JUDGE_AGAIN) if path.is_file() else None
            found.setdefault(row.dataset, {}).setdefault(point.title, []).append((point, row, sidecar))
    result = {}
    for test in (name for name in plan.study.judged if name in found):
        points = [(runs[0][0], _measured(plan, runs)) for runs in found[test].values()]
        result[test] = Findings(plan, test, points, curves.resample([measured for _, measured in points]))
    return result


def _measured(plan: Plan, runs: Sequence[tuple[Point, Result, Sidecar | None]]) -> curves.Point:
    """The runs of one training set as one point; without hits where some run lacks them or saw other images."""
    point = runs[0][0]
    outcomes = [sidecar.outcomes() if sidecar else None for _, _, sidecar in runs]
    judged = {sidecar.images if sidecar else "" for _, _, sidecar in runs}
    paired = len(judged) == 1 and all(one is not None for one in outcomes)
    return curves.Point(
        group=point.group,
        size=point.images / len(plan.datasets[point.rows[0]].counts),
        errors=1 - np.array([row.value for _, row, _ in runs]) / 100,
        images=max(1, runs[0][1].n or 1),
        judged=judged.pop() if paired else "",
        hits=np.stack([one for one in outcomes if one is not None]).mean(0, dtype=np.float32) if paired else None,
    )
