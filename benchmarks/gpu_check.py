"""`make gpu-check`: does this GPU give the results that the CPU gives? One command, one page, under ten minutes.

Everything else of this project is tested on CPUs. Each check is a function of the device (checks_drawing.py,
checks_training.py) that returns figures, each with its limit; those that know no other limit than "the CPU's own
result" run on a CPU too, which is how the checks themselves are tested. Writes OUT/gpu-check.json and OUT/gpu-check.md:
card, driver, clocks, commit, every figure.

    make gpu-check                                          # exit code 0: all that apply pass; 1: some do not
    python benchmarks/gpu_check.py --only latents attention
    python benchmarks/gpu_check.py --device cpu             # the checks that a CPU can run; without a GPU else code 2
"""

import argparse
import datetime
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the scripts
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as utils/generation/loading.py, read when CUDA starts

from benchmarks.bench_gpu import as_table  # noqa: E402
from benchmarks.figures import SPEED, Figure  # noqa: E402
from utils.cli import UserError, make_parser, run  # noqa: E402
from utils.machine import cpu_model, resolve_device, snapshot  # noqa: E402
from utils.storage import atomic_write, write_json  # noqa: E402

NAMES = (
    "card", "attention", "attention_speed", "latents", "pictures", "repeated", "killed", "out_of_memory", "memory_cap",
    "other_gpu", "safety", "full_size", "compiled", "batch_size", "augmentation", "augmentation_share", "training_step",
    "half_precision", "resumed", "kept_busy", "joined_batch_norm", "scaling", "stopped_together", "features", "node",
)  # fmt: skip


def get_args_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = make_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="CHECK", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check"), help="folder of the page and the JSON")
    return parser


def main(args: argparse.Namespace) -> int:
    """Run the checks and write what they found; 0 if all pass, else 1."""
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "no GPU here that torch can use; run this where there is one (its checks of a CPU: --device cpu)"
        )
    from benchmarks import checks_drawing, checks_training  # not sooner: they import much

    device = resolve_device(args.device)
    budgets = checks_drawing.BUDGETS | checks_training.BUDGETS
    gpu_only = {*checks_drawing.GPU_ONLY, *checks_training.GPU_ONLY}
    figures: list[Figure] = []
    seconds: dict[str, float] = {}
    for check in budgets:
        name = check.__name__
        if args.only and name not in args.only:
            continue
        started = time.monotonic()
        found = [] if check in gpu_only and device.type != "cuda" else attempt(check, device)
        seconds[name] = round(time.monotonic() - started, 1)
        figures += [replace(figure, check=name) for figure in found]
        faults = sum(not figure.passed for figure in found)
        state = f"{faults} FAILED" if faults else "passed" if found else "does not apply"
        print(f"{name:18} {state} ({seconds[name]:.0f} s)", flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the next check may be another process's
    passed = all(figure.passed for figure in figures)
    args.out.mkdir(parents=True, exist_ok=True)
    facts = {
        "device": str(device),
        "card": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "passed": passed,
        **snapshot(),
        "clocks": clocks(),
        "seconds": seconds,
    }
    write_json(args.out / "gpu-check.json", {**facts, "figures": [asdict(figure) for figure in figures]})
    atomic_write(args.out / "gpu-check.md", page(facts, figures).encode())
    print(f"gpu-check: {'all pass' if passed else 'some FAILED'}; {args.out / 'gpu-check.md'}")
    return 0 if passed else 1


def attempt(check, device) -> list[Figure]:
    """The figures of CHECK; a check that breaks has failed, and the others still tell."""
    try:
        return check(device)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        return [Figure("", "ended with", f"{type(error).__name__}: {reason}", "no error", False)]


def clocks() -> str | None:
    """The GPU's clocks and power as nvidia-smi tells them; None without it."""
    query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def page(facts: dict, figures: Sequence[Figure]) -> str:
    """The Markdown page: the machine, every figure, and the rows that docs/benchmarks.md would have of it."""
    known = ("device", "card", "driver", "clocks", "git_commit", "packages", "time")
    lines = ["# gpu-check", "", *(f"- {name}: {facts[name]}" for name in known), ""]
    lines += ["| check | figure | value | limit | |", "|---|---|---|---|---|"]
    for f in figures:
        value = f"{f.value:.4g}" if isinstance(f.value, float) else f.value
        cells = (f.check, f.name, value, f.limit, "pass" if f.passed else "**FAIL**")
        lines.append("| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |")
    speeds = [
        {**facts, "what": f.name.removeprefix(SPEED), "images_per_s": f.value}
        for f in figures
        if f.name.startswith(SPEED)
    ]
    if speeds:
        lines += ["", "## Rows for docs/benchmarks.md", "", *as_table(speeds)]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(run(main, get_args_parser()))
