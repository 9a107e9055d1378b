"""Does the quick recipe order datasets as the full one does? The embedded world, nine datasets, three seeds of each.

Drawn with models/fashion-sd at several guidances, prompts and sizes, real images, and a mix of both; each is trained
under --recipe demo and --recipe demo-quick, the 32-pixel forms of `basic` with the paper's head and of `quick`, and
judged on data/fashion/test. Everything lies in runs/quick_ranks: the same command goes on where it was stopped.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

from scipy.stats import spearmanr

from utils.storage import read_json, read_jsonl

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs" / "quick_ranks"
FULL, QUICK = "demo", "demo-quick"
SEEDS = (3, 4, 5)  # on seed 0 the quick recipe's batch size was chosen: these it has not seen
DRAWN = {  # folder -> options of generate.py
    "g1": ("--guidance-scale", 1, "--images-per-class", 100),
    "g2": ("--guidance-scale", 2, "--images-per-class", 200),
    "g7.5": ("--guidance-scale", 7.5, "--images-per-class", 100),
    "g2_names": ("--guidance-scale", 2, "--images-per-class", 100, "--prompt", "c"),
}
REAL, TEST = "data/fashion/real", "data/fashion/test"
DATASETS = {  # name -> (images a class of each folder, folders)
    "guidance 1": (100, "g1"),
    "guidance 2": (100, "g2"),
    "guidance 7.5": (100, "g7.5"),
    "guidance 2, names alone": (100, "g2_names"),
    "guidance 2, twice as many": (200, "g2"),
    "guidance 2, a third as many": (33, "g2"),
    "real": (100, REAL),
    "real, a third as many": (33, REAL),
    "half real, half guidance 2": (50, REAL, "g2"),
}


def run(script: str, *options: object) -> None:
    """One script on one thread: networks this small gain little from a second."""
    command = [sys.executable, ROOT / script, *map(str, options), "--device", "cpu"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=ROOT)


def draw(folder: str) -> None:
    """One of DRAWN, in 10 steps: half the demo's, since their order counts and not their looks."""
    model = ("--classes", "fashion", "--model", ROOT / "models" / "fashion-sd", "--steps", 10, "--prompt", "c, d_c")
    run("generate.py", *model, *DRAWN[folder], "--out", RUNS / "data" / folder)


def train(job: tuple[str, str, int]) -> tuple[float, float]:
    """(top-1 in percent on TEST, operations) of a run on dataset, recipe, seed."""
    name, recipe, seed = job
    images, *folders = DATASETS[name]
    out = RUNS / f"{name.replace(', ', '-').replace(' ', '_')}-{recipe}-{seed}"
    data = [part for folder in folders for part in ("--data", RUNS / "data" / folder if folder in DRAWN else folder)]
    how = ("--recipe", recipe, "--seed", seed, "--images-per-class", images, "--name", "model")
    run("train.py", *data, *how, "--val", TEST, "--val-every", 1000, "--no-leak-check", "--workers", 0, "--out", out)
    top1 = [line["val_top1"] for line in read_jsonl(out / "log.jsonl") if "val_top1" in line][-1]
    print(f"{name:28} {recipe:10} seed {seed} top-1 {top1:.2f}", file=sys.stderr, flush=True)
    return top1, read_json(out / "args.json")["cost"]["flops"]


def quick_ranks() -> dict:
    """The row: Spearman's correlation of the datasets' mean top-1 under both recipes."""
    subprocess.run([sys.executable, ROOT / "models" / "export_fashion.py"], check=True, stdout=sys.stderr, cwd=ROOT)
    jobs = list(product(DATASETS, (FULL, QUICK), SEEDS))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(draw, DRAWN))
        found = dict(zip(jobs, pool.map(train, jobs), strict=True))
    mean = {
        recipe: [statistics.fmean(found[name, recipe, seed][0] for seed in SEEDS) for name in DATASETS]
        for recipe in (FULL, QUICK)
    }
    flops = {recipe: sum(found[name, recipe, seed][1] for name in DATASETS for seed in SEEDS) for recipe in mean}
    ranked = sorted(zip(DATASETS, mean[FULL], mean[QUICK], strict=True), key=lambda row: -row[1])
    single = [correlation([found[name, QUICK, seed][0] for name in DATASETS], mean[FULL]) for seed in SEEDS]
    return {
        "row": "quick_ranks",
        "ours": correlation(mean[QUICK], mean[FULL]),
        "peer": statistics.fmean(repeatability(found, seed) for seed in SEEDS),
        "unit": "rank correlation",
        "ratio": None,
        "target": 0.9,
        "what": f"Spearman's correlation of {len(DATASETS)} datasets' top-1 on real images, mean of {len(SEEDS)} "
        f"seeds, between `--recipe {QUICK}` and `--recipe {FULL}`. The peer: the full recipe with itself, a seed "
        "against the mean of the others, averaged over the seeds: how far seeds alone change the order.",
        "notes": [
            f"arithmetic: {flops[QUICK] / 1e12:.1f} TFLOP against {flops[FULL] / 1e12:.1f}, "
            f"1/{flops[FULL] / flops[QUICK]:.1f}; `--recipe quick` against `paper`: 1/33",
            "one quick seed against the full recipe's mean: " + ", ".join(f"{value:.3f}" for value in single),
            "top-1 (full, quick): " + "; ".join(f"{name} {full:.2f}, {quick:.2f}" for name, full, quick in ranked),
        ],
    }


def correlation(one: list[float], other: list[float]) -> float:
    """Spearman's, of two lists in the same order of datasets."""
    return float(spearmanr(one, other).statistic)


def repeatability(found: dict, seed: int) -> float:
    """Of the full recipe: the run of SEED against the mean of its other seeds."""
    others = [statistics.fmean(found[name, FULL, other][0] for other in SEEDS if other != seed) for name in DATASETS]
    return correlation([found[name, FULL, seed][0] for name in DATASETS], others)


ROWS = {"quick_ranks": quick_ranks}
