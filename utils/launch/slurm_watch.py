"""Following submitted jobs from the queue and the log folder, and saying at the end what a person needs to know."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from utils.cli import UserError
from utils.storage import read_json

RECORD = "launch.json"
LOG_LINES = 10
# Between a job's leaving the queue and the last file of its node being seen here (network file systems cache names).
SETTLE_S = 10
ORDINARY_WAITS = ("None", "Priority", "Resources", "Dependency", "JobArrayTaskLimit", "BeginTime")
POLL_S = (1, 15)  # first and longest pause between two questions to the queue


def watch(folder: Path) -> int:
    """Wait until every job recorded in FOLDER has left the queue; report. 0, or the first failure's exit code."""
    if not (folder / RECORD).exists():
        raise UserError(f"--watch {folder}: no {RECORD} there; give the folder that the launcher printed (--log-dir)")
    elements = [element for stage in read_json(folder / RECORD)["stages"] for element in _elements(stage)]
    shown, pause = "", float(POLL_S[0])
    while True:
        queue = queued_states()
        summary = _summary(folder, elements, queue)
        if summary != shown:
            print(f"launch: {summary}", flush=True)
            shown, pause = summary, float(POLL_S[0])
        if not any(element["job"] in queue for element in elements):
            break
        time.sleep(pause)
        pause = min(pause * 1.3, POLL_S[1])
    deadline = time.monotonic() + SETTLE_S
    while any(read_exit(folder, e["job"]) is None for e in elements) and time.monotonic() < deadline:
        time.sleep(0.5)
    return _report(folder, elements)


def queued_states() -> dict[str, str]:
    """{"7" or "7_2": state} of this user's jobs in the queue; a controller that is restarting is asked again."""
    for attempt in range(20):
        command = ["squeue", "--me", "--noheader", "--array", "--format=%i %T %r"]
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except FileNotFoundError:
            raise UserError("--watch: no `squeue` on PATH; run this on a login node of the cluster") from None
        except subprocess.TimeoutExpired:
            continue
        if result.returncode == 0:
            lines = [line.split(maxsplit=2) for line in result.stdout.splitlines() if line.strip()]
            return {job: _state(state, reason) for job, state, reason in lines}
        if attempt == 0:
            print("launch: the queue does not answer, asking again", file=sys.stderr, flush=True)
        time.sleep(3)
    raise UserError("squeue has not answered for a minute; the jobs go on, watch them later with the same command")


def _state(state: str, reason: str) -> str:
    """A waiting job's reason is shown where a person may have to act on it."""
    return state if state != "PENDING" or reason in ORDINARY_WAITS else f"{state} ({reason})"


def read_exit(folder: Path, job: str) -> dict[str, Any] | None:
    """What the Task of JOB left at its end: a failure of any of its nodes, else node 0's success, else None."""
    found = [read_json(path) for path in sorted(folder.glob(f"{job}-node*.exit.json"))]
    failures = [value for value in found if value["code"]]
    if failures:
        return failures[0]
    return {"code": 0, "failed": []} if (folder / f"{job}-node0.exit.json").exists() else None


def log_file(folder: Path, job: str) -> Path:
    return folder / f"{job}_0_log.out"  # submitit's name: job, task


def _elements(stage: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry a job or array element: {"job": "7_2", "name", "label", "commands": [shell lines]}."""
    several = len(stage["elements"]) > 1
    return [
        {"job": f"{stage['job']}_{index}" if several else stage["job"], "name": stage["name"], **element}
        for index, element in enumerate(stage["elements"])
    ]


def _summary(folder: Path, elements: list[dict[str, Any]], queue: dict[str, str]) -> str:
    counts: dict[str, dict[str, int]] = {}
    for element in elements:
        state = queue.get(element["job"])
        if state is None:
            left = read_exit(folder, element["job"])
            state = "done" if left and left["code"] == 0 else "ended" if left is None else "failed"
        states = counts.setdefault(element["name"], {})
        state = state.replace("PENDING", "waiting").replace("RUNNING", "running")
        states[state] = states.get(state, 0) + 1
    return "; ".join(f"{name}: " + ", ".join(f"{n} {s}" for s, n in sorted(v.items())) for name, v in counts.items())


def _report(folder: Path, elements: list[dict[str, Any]]) -> int:
    codes = []
    for element in elements:
        left = read_exit(folder, element["job"])
        if left is not None and left["code"] == 0:
            continue
        codes.append(left["code"] if left else 1)
        log = log_file(folder, element["job"])
        how = f"failed with exit code {left['code']}" if left else f"did not finish ({_last_state(element['job'])})"
        title = " ".join(filter(None, (element["name"], element["label"], f"(job {element['job']})")))
        print(f"\nlaunch: {title} {how}", file=sys.stderr)
        if log.exists():
            print(f"launch: the last lines of {log}:", file=sys.stderr)
            for line in log.read_text(errors="replace").splitlines()[-LOG_LINES:]:
                print(f"  | {line.split(chr(13))[-1]}", file=sys.stderr)
        else:
            print(
                f"launch: no {log.name} in {folder}: it never ran, or its node cannot see that folder", file=sys.stderr
            )
        for command in element["commands"]:
            print(f"launch: run it again alone: {command}", file=sys.stderr)
    if codes:
        print(
            f"\nlaunch: {len(codes)} of {len(elements)} jobs failed; the whole command again continues", file=sys.stderr
        )
        return codes[0]
    print(f"launch: all {len(elements)} jobs done", flush=True)
    return 0


def _last_state(job: str) -> str:
    """What SLURM remembers of a job that left the queue (for minutes), e.g. `CANCELLED DependencyNeverSatisfied`."""
    result = subprocess.run(["scontrol", "--oneliner", "show", "job", job], capture_output=True, text=True)
    words = dict(word.split("=", 1) for word in result.stdout.split() if "=" in word)
    known = [words.get("JobState", ""), "" if words.get("Reason") == "None" else words.get("Reason", "")]
    return " ".join(filter(None, known)) or "SLURM no longer knows it"
