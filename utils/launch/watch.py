"""Following submitted jobs from the queue and the log folder, and saying at the end what a person needs to know."""

import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import msgspec

from utils.cli import UserError
from utils.launch.checks import show_job
from utils.launch.processes import last_state
from utils.storage import read_json

RECORD = "launch.json"
LOG_LINES, LOG_BYTES = 10, 20_000  # of a failed job's log
# Between a job's leaving the queue and the last file of its node being seen here (network file systems cache names).
SETTLE_S = 10
ORDINARY_WAITS = ("None", "Priority", "Resources", "Dependency", "JobArrayTaskLimit", "BeginTime")
EXIT = msgspec.defstruct("Exit", [("code", Annotated[int, msgspec.Meta(ge=0, le=255)])])  # what a Task leaves
POLL_S = (1.0, 15.0)  # first and longest pause between two questions to the queue


class Element(msgspec.Struct):
    """A job or array element: what it draws, the shell lines that do it alone; its stage's name, and its id ("7_2")."""

    label: str
    commands: list[str]
    name: str = ""
    job: str = ""


class Queued(msgspec.Struct):
    """A stage of launch.json, whose content is {"cwd": folder, "stages": [...]}."""

    name: str
    job: Annotated[str, msgspec.Meta(pattern="^[0-9]+$")]
    elements: list[Element]


def watch(folder: Path) -> int:
    """Wait until every job recorded in FOLDER has left the queue; report. 0, or the first failure's exit code."""
    if not (folder / RECORD).exists():
        raise UserError(f"--watch {folder}: no {RECORD} there; give the folder that the launcher printed (--log-dir)")
    kind = msgspec.defstruct("Record", [("stages", list[Queued])])
    elements = []
    for stage in read_json(folder / RECORD, kind, "follow the jobs with squeue; their logs lie beside it").stages:
        for index, element in enumerate(stage.elements):
            element.name, element.job = stage.name, f"{stage.job}_{index}" if len(stage.elements) > 1 else stage.job
            elements.append(element)
    shown, pause = "", POLL_S[0]
    while True:
        queue = queued_states()
        if (summary := _summary(folder, elements, queue)) != shown:
            print(f"launch: {summary}", flush=True)
            shown, pause = summary, POLL_S[0]
        if not any(element.job in queue for element in elements):
            break
        time.sleep(pause)
        pause = min(pause * 1.3, POLL_S[1])
    deadline = time.monotonic() + SETTLE_S
    while any(exit_code(folder, element.job) is None for element in elements) and time.monotonic() < deadline:
        time.sleep(0.5)
    return _report(folder, elements)


def queued_states() -> dict[str, str]:
    """{"7" or "7_2": state} of this user's jobs in the queue; a controller that is restarting is asked again."""
    command = ["squeue", "--me", "--noheader", "--array", "--format=%i|%T|%r"]
    for attempt in range(20):
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except FileNotFoundError:
            raise UserError("--watch: no `squeue` on PATH; run this on a login node of the cluster") from None
        except subprocess.TimeoutExpired:
            continue
        if result.returncode == 0:
            # A waiting job's reason is part of its state where a person may have to act on it.
            rows = [line.split("|", 2) for line in result.stdout.splitlines() if line.strip()]
            told = {job: f" ({why})" for job, state, why in rows if state == "PENDING" and why not in ORDINARY_WAITS}
            return {job: state + told.get(job, "") for job, state, _ in rows}
        if attempt == 0:
            print("launch: the queue does not answer, asking again", file=sys.stderr, flush=True)
        time.sleep(3)
    raise UserError("squeue has not answered for a minute; the jobs go on, watch them later with the same command")


def exit_code(folder: Path, job: str) -> int | None:
    """What the Task of JOB left at its end: a failure of any of its nodes, else node 0's success, else None."""
    codes = _exit_codes(folder, job)
    return next(filter(None, codes.values()), codes.get("0"))


def _exit_codes(folder: Path, job: str) -> dict[str, int]:
    codes: dict[str, int] = {}
    for path in sorted(folder.glob(f"{job}-node*.exit.json")):
        with suppress(UserError):  # damaged: the job is reported as one that did not finish
            codes[path.name.removeprefix(f"{job}-node").removesuffix(".exit.json")] = read_json(path, EXIT).code
    return codes


def log_file(folder: Path, job: str) -> Path:
    """The output of JOB's node that failed, else of its first, by submitit's name for it."""
    failed = [node for node, code in _exit_codes(folder, job).items() if code and node.isdecimal()]
    return folder / f"{job}_{(failed or ['0'])[0]}_log.out"


def _summary(folder: Path, elements: Sequence[Element], queue: dict[str, str]) -> str:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for element in elements:
        state = queue.get(element.job) or {None: "ended", 0: "done"}.get(exit_code(folder, element.job), "failed")
        counts[element.name][state.replace("PENDING", "waiting").replace("RUNNING", "running")] += 1
    return "; ".join(f"{name}: " + ", ".join(f"{n} {s}" for s, n in sorted(v.items())) for name, v in counts.items())


def _report(folder: Path, elements: Sequence[Element]) -> int:
    failures = []
    for element in elements:
        code = exit_code(folder, element.job)
        known = show_job(element.job) if code is None else {}  # e.g. CANCELLED, DependencyNeverSatisfied
        state = " ".join(filter(None, (known.get("JobState"), known.get("Reason", "").replace("None", ""))))
        if code == 0 or state == "COMPLETED":  # the latter without a file of its own: the log folder's disk was full
            continue
        failures.append(code or 1)
        how = f"failed with exit code {code}" if code else f"did not finish ({state or 'SLURM no longer knows it'})"
        title = " ".join(filter(None, (element.name, element.label, f"(job {element.job})")))
        log = log_file(folder, element.job)
        if log.is_file():
            with open(log, "rb") as file:
                file.seek(max(0, log.stat().st_size - LOG_BYTES))
                last = file.read().rstrip().split(b"\n")[-LOG_LINES:]
            lines = [f"launch: the last lines of {log}:", *(f"  | {last_state(line)}" for line in last)]
        else:
            lines = [f"launch: no {log.name} in {folder}: it never ran, or its node cannot see that folder"]
        lines += [f"launch: run it again alone: {command}" for command in element.commands]
        print(f"\nlaunch: {title} {how}", *lines, sep="\n", file=sys.stderr)
    if not failures:
        print(f"launch: all {len(elements)} jobs done", flush=True)
        return 0
    count = f"{len(failures)} of {len(elements)}"
    print(f"\nlaunch: {count} jobs failed; the whole command again continues", file=sys.stderr)
    return failures[0]
