"""`make bench`: speed as ratios to a named peer, both measured in this run on this machine.

Each row is a function in a bench_*.py module beside this file; it measures ours and the peer's way in turn and returns
    {"row", "ours", "peer", "unit", "ratio", "target", "what", "notes"} and, where there is a limit,
    "bound" (in the row's unit) with "bound_is" (where it comes from), measured in the same run
This script runs the rows (each in its own process, so that none inherits another's memory or threads), appends them to
benchmarks/results.json and writes docs/benchmarks.md from the newest result of every row. Seconds on a shared machine
drift; ratios of medians taken in turn do not. Nothing here is a test.

    make bench                        # every row, some three hours on two cores, half of it probe_vs_suite
    make bench ONLY=loader_vs_dino    # one row
    make bench ONLY=train_step_vs_fp32 ARGS=--profile     # where its time goes
    python benchmarks/bench.py --list
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import bench_gpu, bounds  # noqa: E402
from utils.cli import UserError, make_parser, run  # noqa: E402
from utils.generation.plan import RATES  # noqa: E402
from utils.machine import cpu_has_bf16, snapshot  # noqa: E402
from utils.storage import atomic_write, read_json, write_json  # noqa: E402

# row -> module that holds it; the order is the order of the pipeline and of the page
ROWS = {
    "generate_vs_plain": "bench_generate",
    "generate_vs_bound": "bench_generate",
    "demo_vs_plain": "bench_generate",
    "generate_scaling": "bench_generate",
    "loader_vs_dino": "bench_train",
    "train_step_vs_fp32": "bench_train",
    "train_data_wait": "bench_train",
    "augment_share": "bench_train",
    "features_vs_plain": "bench_features",
    "evaluate_two_processes": "bench_features",
    "probe_vs_suite": "bench_probe",
    "quick_ranks": "quick_ranks",
}
RESULTS = ROOT / "benchmarks" / "results.json"
PAGE = ROOT / "docs" / "benchmarks.md"


def get_args_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument("--only", choices=list(ROWS), help="run this row alone")
    parser.add_argument("--list", action="store_true", help="print the rows and leave")
    parser.add_argument("--page", action="store_true", help="only write docs/benchmarks.md again from results.json")
    parser.add_argument("--profile", action="store_true", help="of --only's row print where the time goes, no figure")
    parser.add_argument("--in-process", choices=list(ROWS), help=argparse.SUPPRESS)
    return parser


def main(args: argparse.Namespace) -> int:
    if args.list:
        print("\n".join(f"{row:20} benchmarks/{module}.py" for row, module in ROWS.items()))
        return 0
    if args.profile:
        if not args.only:
            raise UserError("--profile: name the row with --only (make bench ONLY=row ARGS=--profile)")
        bounds.profiling = True
        importlib.import_module(f"benchmarks.{ROWS[args.only]}").ROWS[args.only]()
        raise UserError(f"--profile: {args.only} measures processes of its own; run them under a profiler")
    if args.in_process:
        measured = importlib.import_module(f"benchmarks.{ROWS[args.in_process]}").ROWS[args.in_process]()
        print(json.dumps(measured))
        return 0
    failed = []
    for row in [] if args.page else [args.only] if args.only else ROWS:
        print(f"{row} ...", flush=True)
        command = [sys.executable, __file__, "--in-process", row]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode != 0:
            failed.append(row)
            continue
        measured = json.loads(done.stdout.strip().splitlines()[-1])
        environment = snapshot()
        machine = [environment["cpu"], f"{environment['cores']} cores" + " with fast bf16" * cpu_has_bf16()]
        measured |= {
            "machine": ", ".join([*machine, *environment["gpus"]]),
            "versions": environment["packages"] | {"python": environment["python"]},
            "git_commit": environment["git_commit"],
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        write_json(RESULTS, [*(read_json(RESULTS, list) if RESULTS.exists() else []), measured])
        print(as_line(measured), flush=True)
    if RESULTS.exists():
        atomic_write(PAGE, as_page(read_json(RESULTS, list), read_json(RATES, list)).encode())
        print("\n".join(as_table(newest_of(read_json(RESULTS, list)))))
        print(f"wrote {PAGE.relative_to(ROOT)}")
    if failed:
        raise UserError(f"these rows failed, see their output above: {', '.join(failed)}")
    return 0


def as_line(result: dict) -> str:
    """`row: ours 12.3 img/s, peer 4.5 img/s: 2.7 times (target 2.5, met)`"""
    verdict = "" if result["target"] is None else f" (target {result['target']}, {verdict_of(result)})"
    peer = "" if result["peer"] is None else f", peer {result['peer']:.4g} {result['unit']}"
    ratio = "" if result["ratio"] is None else f": {result['ratio']:.3g} times"
    bound = "" if result.get("bound") is None else f", {share_of(result)} of the bound"
    return f"{result['row']}: ours {result['ours']:.4g} {result['unit']}{peer}{ratio}{verdict}{bound}"


def verdict_of(result: dict) -> str:
    """A row says itself if lower is better (`"lower_is_better": true`: a share, a memory figure)."""
    value = result["ours"] if result["ratio"] is None else result["ratio"]
    met = value <= result["target"] if result.get("lower_is_better") else value >= result["target"]
    return "met" if met else "not met"


def share_of(result: dict) -> str:
    """ "83 %": how much of the bound ours reaches; seconds and megabytes reach it from above.

    Of a share of time that should be small, what counts is the rest: 2 % lost where none need be is 98 % reached.
    """
    if result.get("bound") is None:
        return ""
    ours, bound = result["ours"], result["bound"]
    if result["unit"].startswith("%"):
        return f"{100 * (100 - ours) / (100 - bound):.0f} %"
    from_above = result["unit"].startswith("s ") or result["unit"] == "MB"
    return f"{100 * (bound / ours if from_above else ours / bound):.0f} %"


def newest_of(results: list[dict]) -> list[dict]:
    """The newest result of every row, in the order of the pipeline."""
    newest = {result["row"]: result for result in results}
    return [newest[row] for row in ROWS if row in newest]


def as_table(shown: list[dict]) -> list[str]:
    lines = [
        "| row | ours | the peer's way | unit | ratio | target | | bound | reached |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in shown:
        peer = "" if result["peer"] is None else f"{result['peer']:.4g}"
        ratio = "" if result["ratio"] is None else f"{result['ratio']:.3g}"
        target = "" if result["target"] is None else f"{result['target']}"
        verdict = "" if result["target"] is None else verdict_of(result)
        bound = "" if result.get("bound") is None else f"{result['bound']:.4g}"
        cells = [f"`{result['row']}`", f"{result['ours']:.4g}", peer, result["unit"], ratio, target, verdict, bound]
        lines.append(f"| {' | '.join([*cells, share_of(result)])} |")
    return lines


def other_machines(result: dict, results: list[dict]) -> list[str]:
    """The newest figure of the same row on each other machine."""
    rows = {other["machine"]: other for other in results if other["row"] == result["row"]}
    return [
        f"{other['ours']:.4g} {other['unit']}"
        + ("" if other["ratio"] is None else f", ratio {other['ratio']:.3g}")
        + f"; {other['time'][:10]}, {machine}, commit {other['git_commit'][:10]}"
        for machine, other in rows.items()
        if machine != result["machine"]
    ]


def as_page(results: list[dict], rates: list[dict]) -> str:
    """docs/benchmarks.md: the table, what each row measures and where it was measured, and the RATES of GPUs."""
    shown = newest_of(results)
    lines = [
        "# Benchmarks",
        "",
        "Written by `make bench`; do not edit. A row measures ours and the peer's way in turn, in one run.",
        "Where the rest of the time goes: [speed](training.md#speed).",
        "",
    ]
    lines += as_table(shown)
    for result in shown:
        lines += ["", f"## {result['row']}", "", result.get("what", "")]
        lines += [f"- {note}" for note in result.get("notes", [])]
        if result.get("bound") is not None:
            lines.append(f"- bound: {result['bound_is']}")
        lines.append(f"- {result['time'][:10]}, {result['machine']}, commit {result['git_commit'][:10]}")
        lines += [f"- elsewhere: {text}" for text in other_machines(result, results)]
    lines += ["", "## Images a second on GPUs", "", "By `make bench-gpu`; docs/gpu.md says how to add yours."]
    lines += ["", *(bench_gpu.as_table(rates) if rates else ["None measured yet."])]
    versions: dict[str, list[str]] = {}  # said once where rows agree
    for result in shown:
        text = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
        versions.setdefault(text, []).append(result["row"])
    lines += ["", "## Versions", ""]
    for text, rows in versions.items():
        lines.append(f"- {text}" + (f" ({', '.join(rows)})" if len(versions) > 1 else ""))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(run(main, get_args_parser()))
