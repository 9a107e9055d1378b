"""`make bench-gpu`: how many images a second this GPU draws, trains on and turns into features.

Each row is measured through the project's own code, files included, and appended to benchmarks/gpu_rates.json, which
`generate.py --dry-run` reads on a card of the same name; docs/benchmarks.md shows the rows. Drawing needs no download:
Stable Diffusion 1.4's shape with random weights (4.3 GB, kept in ~/.cache/imagenet-sd) is as fast as the real ones.

    make bench-gpu                                               # every row: a quarter of an hour
    python benchmarks/bench_gpu.py --only generation
    python benchmarks/bench_gpu.py --device cpu --model models/fashion-sd --out /tmp/rates.json
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils.cli import UserError, make_parser, run  # noqa: E402
from utils.generation.plan import RATES  # noqa: E402
from utils.generation.recipe import RECIPES  # noqa: E402
from utils.machine import cpu_model, snapshot  # noqa: E402
from utils.storage import atomic_write, read_json, write_json  # noqa: E402

# One setting is varied at a time: all combinations would take a day.
DRAWING = {"recipe": "paper", "dtype": "fp16", "attention": "sdpa", "compile": False, "batch_size": 16}
TRAINING = {"recipe": "paper", "dtype": "fp16", "compile": False}
FEATURES: dict[str, Any] = {"dtype": "fp16"}
ROWS: list[tuple[str, dict[str, Any]]] = [
    *(("generation", DRAWING | change) for change in (
        {}, {"dtype": "bf16"}, {"dtype": "fp32"}, {"attention": "xformers"}, {"batch_size": 1}, {"batch_size": 4},
        {"batch_size": 64}, {"compile": True}, {"recipe": "fast"}, {"recipe": "fast", "compile": True})),
    ("training", TRAINING), ("training", TRAINING | {"compile": True}),
    ("features", FEATURES), ("features", FEATURES | {"dtype": "fp32"}),
]  # fmt: skip
CLASS = "n01440764"
FEATURE_IMAGES = 2000


def get_args_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = make_parser(__doc__)
    kinds = sorted({what for what, _ in ROWS})
    parser.add_argument("--only", nargs="+", choices=kinds, help="measure these alone")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu")
    parser.add_argument("--model", help="pipeline folder or hub id instead of random weights")
    parser.add_argument("--out", type=Path, default=RATES, help="table to append to")
    return parser


def main(args: argparse.Namespace) -> int:
    """Measure the rows that this device can, append them, print them."""
    import torch

    from utils.machine import resolve_device

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("no GPU here that torch can use; run this where there is one")
    device = resolve_device(args.device)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()
    environment = snapshot()
    about = {name: environment[name] for name in ("git_commit", "driver", "packages")}
    rows = []
    for what, settings in ROWS:
        if what in (args.only or what):
            try:
                measured = MEASURES[what](device, args.model, settings)
            except UserError as error:  # this card has no such kernels, or too little memory
                print(f"{described(what, settings)}: left out ({error})", flush=True)
                continue
            when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            rows.append({"card": card, "what": what, **settings, **measured, "time": when, **about})
            print(as_row(rows[-1]), flush=True)
    write_json(args.out, [*(read_json(args.out, list) if args.out.exists() else []), *rows])
    print(f"bench-gpu: {len(rows)} rows in {args.out}")
    if args.out == RATES:
        from benchmarks import bench

        atomic_write(bench.PAGE, bench.as_page(read_json(bench.RESULTS, list), read_json(RATES, list)).encode())
    return 0


# ===== measuring =====


def drawing_rate(device, model: str | None, settings: dict[str, Any]) -> dict[str, Any]:
    """Of two batches by generate.py's engine, from prompts to files, the second decoded beside nothing."""
    from benchmarks import bench_generate
    from utils.machine import resolve_dtype

    recipe = dict(RECIPES[settings["recipe"]])
    folder = Path(model) if model else bench_generate.build_sd14(bench_generate.CACHE)
    dtype, steps, batch = resolve_dtype(settings["dtype"], device), recipe.pop("steps"), settings["batch_size"]
    recipe |= {"name": settings["recipe"], **{key: settings[key] for key in ("attention", "compile", "batch_size")}}
    one = bench_generate.Ours(folder, CLASS, steps, device, dtype, **recipe)
    one.warm_up()
    rate = one.images_per_s(2 * batch)
    if one.sampler.denoising.size < batch:
        raise UserError(f"--batch-size {batch}: does not fit")
    pixels = one.sampler.height * one.sampler.width
    return {"images_per_s": rate, "forwards": one.sampler.forwards_per_image, "pixels": pixels}


def training_rate(device, model: str | None, settings: dict[str, Any]) -> dict[str, Any]:
    """Of train.py's own timing of twenty steps, loaders included; on a CPU by the demo's recipe."""
    from benchmarks.checks_training import many_images, run_command

    on_gpu = device.type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        many_images(Path(folder) / "images", 22 * (256 if on_gpu else 64), side=512 if on_gpu else 32)
        options = ["--dtype", settings["dtype"], "--dry-run", *["--compile"] * settings["compile"]]
        command = run_command(Path(folder) / "images", Path(folder) / "run", device, *options)
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return {"images_per_s": float(re.findall(r"= (\S+) img/s", done.stdout)[-1])}


def features_rate(device, model: str | None, settings: dict[str, Any]) -> dict[str, Any]:
    """Of evaluate.py's extractor with a ResNet50: decoding, resizing, the network."""
    import torch

    from benchmarks.checks_training import many_images
    from utils.evaluation.checkpoints import Transform
    from utils.evaluation.features import Extractor
    from utils.machine import resolve_dtype
    from utils.model import build_model

    network = build_model("resnet50", 1000).eval()
    network.fc = torch.nn.Identity()
    dtype, count = resolve_dtype(settings["dtype"], device), FEATURE_IMAGES if device.type == "cuda" else 16
    extractor = Extractor(network, "", device, dtype, batch_size=256, workers=len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as folder:
        many_images(Path(folder), count, side=512)
        samples = [(str(path), 0) for path in sorted(Path(folder).rglob("*.jpg"))]
        extractor(samples[:256], Transform(256, 224, "bilinear"), None, "warm-up")
        started = time.perf_counter()
        extractor(samples, Transform(256, 224, "bilinear"), None, "bench-gpu")
        return {"images_per_s": count / (time.perf_counter() - started)}


MEASURES = {"generation": drawing_rate, "training": training_rate, "features": features_rate}


# ===== showing =====


def described(what: str, settings: dict[str, Any]) -> str:
    """ "generation, paper, fp16, sdpa, batch 16" """
    shown = [str(settings[key]) for key in ("recipe", "dtype", "attention") if key in settings]
    shown += ["compiled"] * bool(settings.get("compile"))
    shown += [f"batch {settings[key]}" for key in ("batch_size",) if key in settings]
    return ", ".join([what, *shown])


def as_row(row: dict[str, Any]) -> str:
    """A line of the table in docs/benchmarks.md."""
    commit = (row.get("git_commit") or "")[:10]
    cells = (row["card"], described(row["what"], row), f"{row['images_per_s']:.4g}", row["time"][:10], commit)
    return f"| {' | '.join(cells)} |"


def as_table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The newest row of each card and setting, in the order of ROWS."""
    newest = {(row["card"], described(row["what"], row)): row for row in rows}
    yield from ["| card | what | images/s | measured | commit |", "|---|---|---|---|---|"]
    for card in sorted({card for card, _ in newest}):
        yield from (as_row(row) for (other, _), row in newest.items() if other == card)


if __name__ == "__main__":
    sys.exit(run(main, get_args_parser()))
