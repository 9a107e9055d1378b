"""Running a study's commands through the launcher, and telling how far they are. A failed one does not stop the others.

Here: datasets one after the other, in as many processes as the launcher gives each, then points side by side, a device
each. On SLURM: an array a dataset, and arrays of points that wait for the datasets they need.
"""

import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from utils.cli import UserError
from utils.launch.command import read_stage, run_here
from utils.launch.processes import FORWARDED, Process, Team, visible_gpus
from utils.storage import AlreadyOwned, owner_lock, read_json, require_writable
from utils.study.plan import Dataset, Plan, Point, quality_of

MOST_AT_ONCE = 8  # processes on a machine without GPUs, unless more are asked for: each takes 0.7 GB


def show_status(plan: Plan) -> None:
    """What is done, from the folders alone: each dataset, the points by row and state, what no longer holds."""
    for dataset in plan.datasets.values():
        if dataset.words:
            print(f"dataset {dataset.name}: {'drawn' if dataset.drawn else 'to draw'} ({dataset.folder})")
    states: dict[str, Counter[str]] = {}
    for point in plan.points:
        states.setdefault(point.group, Counter())[point.state(plan.study.judged)] += 1
    for group, counts in states.items():
        parts = ", ".join(
            f"{counts[state]} {state}" for state in ("done", "trained", "begun", "to do") if counts[state]
        )
        print(f"{group}: {parts}")
    done = sum(counts["done"] for counts in states.values())
    print(f"{done} of {len(plan.points)} points done")
    show_stale(plan)


def show_stale(plan: Plan) -> None:
    """Name what an earlier form of the study left."""
    stale = plan.stale()
    for path in stale:
        print(f"stale: {path} is of an earlier form of {plan.study.path}; it is left alone and not used")
    if stale:
        print(f"{len(stale)} stale: only points that changed run again; delete the others when you need the room")


def run_study(plan: Plan, launcher: str, options: Sequence[str]) -> int:
    """Do what is left, with LAUNCHER and its OPTIONS; the exit code, 0 when every point is done."""
    require_writable(plan.out, "out")
    try:
        with owner_lock(plan.out / ".lock"):
            return _run(plan, launcher, options)
    except AlreadyOwned:
        raise UserError(f"{plan.study.path}: another process runs this study in {plan.out}; wait for it") from None


def _run(plan: Plan, launcher: str, options: Sequence[str]) -> int:
    show_stale(plan)
    tests = plan.study.judged
    todo = [point for point in plan.points if point.state(tests) != "done"]
    needed = {row for point in todo for row in point.rows}
    draw = [one for one in plan.datasets.values() if one.name in needed and not one.drawn]
    print(
        f"study: {len(plan.points) - len(todo)} of {len(plan.points)} points done, {len(draw)} datasets to draw",
        flush=True,
    )
    if not todo and not _looks(plan):
        return 0
    if launcher == "slurm":
        return _queue(plan, draw, todo, options)
    at_once = read_stage(options, ["train.py", "--data=x"], first=False).args.processes
    if launcher == "local" and at_once is None and not visible_gpus():
        at_once = min(MOST_AT_ONCE, len(os.sched_getaffinity(0)))
        options = [*options, "--processes", str(at_once)]
    code = 0
    for dataset in draw:
        print(f"study: drawing {dataset.name}: {dataset.folder}", flush=True)
        stage = read_stage(options, ["generate.py", *dataset.words], first=False)
        if failed := run_here(stage, launcher):
            if failed - 128 in FORWARDED:
                return failed
            code = failed
            print(f"study: {dataset.name} was not drawn (exit code {code}); its points wait", file=sys.stderr)
    ready = [point for point in todo if all(plan.datasets[row].drawn for row in point.rows)]
    if ready:
        _await_others(ready)
        works = [Work(point.name, point.command, point.folder / "study.log", point.reached) for point in ready]
        code = _side_by_side(works, launcher, at_once) or code
    if code - 128 not in FORWARDED and (works := _looks(plan)):
        code = _side_by_side(works, launcher, at_once) or code
    if waiting := len(todo) - len(ready):
        print(f"study: {waiting} points wait for datasets that could not be drawn", file=sys.stderr)
    return code


def _await_others(points: Sequence[Point]) -> None:
    """Of a study that was killed the last run may still be saving its weights: wait until its folder is free."""
    for lock in filter(Path.exists, (point.folder / ".lock" for point in points)):
        with owner_lock(lock, wait=f"study: a process is still at work in {lock.parent}; waiting for it"):
            pass


class Work(Process):
    """A command that knows nothing of the others: its words go to LOG, and at its end a line says what it REACHED."""

    def __init__(self, name: str, command: Sequence[str], log: Path, reached: Callable[[], str]) -> None:
        super().__init__(name, (sys.executable, *command))
        self.log, self.reached, self.place = log, reached, ""  # place: "2/5" of those side by side

    def start(self, alone: bool) -> None:
        """As of a process among several: the terminal would be the log's."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.write_bytes(b"")
        super().start(alone=False)

    def show(self, line: str) -> None:
        """Keep LINE."""
        with open(self.log, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def has_ended(self) -> bool:
        """As of any process; says at its end what was reached."""
        ended = super().has_ended()
        if ended:
            failed = f"failed with exit code {self.code}, see {self.log}"
            print(f"[{self.place}] {self.label}: {failed if self.code else self.reached()}", flush=True)
        return ended


def _side_by_side(works: Sequence[Work], launcher: str, at_once: int | None) -> int:
    """Do WORKS side by side, a device or core each, or one after the other if inline; the first failure's code."""
    gpus = [] if launcher == "inline" else visible_gpus()
    parallel = 1 if launcher == "inline" else min(at_once or len(gpus), len(works))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // parallel)))
    for number, work in enumerate(works, 1):
        work.place = f"{number}/{len(works)}"
    team = Team(works, parallel, devices=[gpus[place % len(gpus)] for place in range(parallel)] if gpus else [])
    team.run()
    if team.stopped_by is not None and team.failed():
        print("study: stopped; the same command continues", file=sys.stderr)
        return 128 + team.stopped_by
    code = team.report()
    if failed := [work for work in works if work.code != 0]:
        logs = "".join(f"\n  {work.label}: {work.log}" for work in failed)
        print(f"study: {len(failed)} of {len(works)} failed, the others are done; logs:{logs}", file=sys.stderr)
    return code


def _looks(plan: Plan) -> list[Work]:
    """The looks at datasets (coverage, density) that are wanted and not there."""
    works = []
    for row, dataset in plan.datasets.items():
        found = quality_of(plan, row)
        if found and dataset.drawn and not (found[0] / "dataset_report.json").is_file():
            folder, words = found
            works.append(Work(f"look at {row}", ("evaluate.py", *words), folder / "study.log", lambda: "measured"))
    return works


# ===== SLURM =====


def _queue(plan: Plan, draw: Sequence[Dataset], todo: Sequence[Point], options: Sequence[str]) -> int:
    """Queue an array a dataset, and one for all points that need the same of them; with --wait stay until they end."""
    from utils.launch.slurm import run_on_slurm  # submitit costs start-up time
    from utils.launch.watch import RECORD, queued_states

    for record in plan.out.glob(f"launch/*/{RECORD}"):
        jobs = {stage["job"] for stage in read_json(record)["stages"]}
        if jobs & {job.partition("_")[0] for job in queued_states()}:
            wait = f"wait for them: python -m utils.launch --watch {shlex.quote(str(record.parent))}"
            raise UserError(f"{plan.study.path}: jobs of an earlier call are still queued; {wait}")
    if "--log-dir" not in " ".join(options):
        options = [*options, "--log-dir", str(plan.out / "launch" / time.strftime("%Y%m%d-%H%M%S"))]
    stages = [
        replace(read_stage(options, ["generate.py", *one.words], first=False), name=f"draw-{one.name}", after=())
        for one in draw
    ]
    number = {one.name: index for index, one in enumerate(draw)}
    groups: dict[tuple[int, ...], list[Point]] = {}
    for point in todo:
        groups.setdefault(tuple(sorted(number[row] for row in point.rows if row in number)), []).append(point)
    train = read_stage(options, ["train.py", "--data=x"], first=False)
    for after, points in groups.items():
        each = tuple(point.command for point in points)
        name = "points" if not after else "points-" + "-".join(draw[index].name for index in after)
        stages.append(replace(train, name=name, out=plan.out, after=after, each=each))
    looks = [("evaluate.py", *found[1]) for row in plan.datasets if (found := quality_of(plan, row))]
    if looks:
        evaluate = read_stage(options, ["evaluate.py"], first=False)
        stages.append(replace(evaluate, name="looks", out=plan.out, after=tuple(range(len(stages))), each=tuple(looks)))
    return run_on_slurm(stages)
