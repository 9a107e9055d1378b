"""Judge frozen models on real images: ImageNet's test sets, fifteen transfer datasets, or any folder of classes.

Reads checkpoints (a run folder of train.py, a weights file, a name of torchvision's or timm's) and the datasets found
below --data-root. Writes OUT/results.jsonl (one line a metric), OUT/eval/*.json (per class, confusion) and the caches
OUT/features/ and OUT/hashes/ (are test images among the training images?); OUT is the checkpoint's folder unless --out
is given. Pairs of checkpoint and dataset that are in results.jsonl already are not computed again: run the same command
to continue.

    # without a GPU, in seconds, after `make demo`: two models side by side on one folder of real images
    python evaluate.py --checkpoint runs/demo/real-seed0 runs/demo/synthetic_g2-seed0 --test fashion=data/fashion/test

    # one GPU: everything found below data/, then the report with tables and the radar plot
    python evaluate.py --checkpoint runs/imagenet_100_sd --data-root data
    python evaluate.py --report runs/imagenet_100_sd/results.jsonl docs/paper_results.jsonl --out runs/report

    # SLURM
    python -m utils.launch --launcher slurm evaluate.py --checkpoint runs/imagenet_1k_sd --datasets imagenet small

What is missing and where to get it: python evaluate.py --list-datasets
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from utils.cli import Launch, UserError, data_and_weight, make_parser, non_negative_int, positive_int, run
from utils.dataset.folder import known_images
from utils.evaluation import checkpoints
from utils.evaluation.catalog import choose, list_sets, read_all
from utils.evaluation.jobs import Job, Settings, number_format
from utils.evaluation.matching import NoSharedClass, fingerprint, match
from utils.evaluation.results import Row, with_v2_mean
from utils.machine import require_memory, resolve_device
from utils.metrics import mean_and_std
from utils.storage import require_writable
from utils.training import distributed
from utils.training.labels import read_label_map, renamed

if TYPE_CHECKING:
    from utils.dataset.overlap import Found, Place
    from utils.evaluation.judge import FrozenModel

LAUNCH = Launch("evaluate", "ranks")
SHOWN_LEAKS = 1000  # pairs of a kind named in eval/*.json


def get_args_parser() -> argparse.ArgumentParser:
    """The options, grouped as --help shows them."""
    parser = make_parser(__doc__)
    several: dict[str, Any] = {"action": "append", "default": []}

    add = parser.add_argument_group("models").add_argument
    named = "name of torchvision (resnet50, resnet50:IMAGENET1K_V1) or timm (timm:resnet50.a1_in1k)"
    model = f"run folder, weights file (.pth, .safetensors), one of several in it (FILE:PLACE) or {named}"
    add("--checkpoint", nargs="+", default=[], metavar="[LABEL=]MODEL", help=model)
    add("--classes", help="classes of the outputs, if the checkpoint has no record: 100, 1000, a .txt")

    add = parser.add_argument_group("data").add_argument
    add("--data-root", default="data", help="folder that holds the datasets; see --list-datasets")
    names = "names or groups (imagenet, small, inat, cog, all); default: those found, or your own alone"
    add("--datasets", nargs="+", default=[], metavar="NAME", help=names)
    add("--test", **several, metavar="NAME=DIR", help="a folder DIR/<class id>/<images>; repeatable")
    pair = "other classes, for a linear probe: DIR/train/<class>/<images> and DIR/test/...; repeatable"
    add("--transfer", **several, metavar="NAME=DIR", help=pair)
    renaming = "other names of classes, of the model and of --test: a .tsv with name (or index) and id"
    add("--label-map", metavar="FILE", help=renaming)
    add("--list-datasets", action="store_true", help="each dataset: what, where from, whether found")

    add = parser.add_argument_group("protocol").add_argument
    default = "default: as torchvision published its weights, else bilinear; for transfer bicubic"
    add("--interpolation", choices=("bilinear", "bicubic"), help=f"filter of resizing ({default})")
    search = "linear probes: fast, or the search of t-ReX's transfer suite"
    add("--protocol", choices=("fast", "paper"), default="fast", help=search)
    add("--seeds", nargs="+", type=non_negative_int, default=[0], help="seeds of the linear probes: one result each")
    voting = "beside linear probes, DINO's: the 20 nearest training images vote (T = 0.07)"
    add("--knn", action="store_true", help=voting)
    truncated = "read JPEGs that end early as far as they go, as t-ReX's suite does"
    add("--allow-truncated", action="store_true", help=truncated)

    add = parser.add_argument_group("runtime").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps")
    add("--dtype", default="auto", choices=("auto", "fp16", "bf16", "fp32"), help="auto: fp16 on CUDA, else fp32")
    add("--batch-size", type=positive_int, default=64, help="images of a forward pass")
    add("--workers", type=positive_int, default=min(16, os.cpu_count() or 1), help="threads that decode images")
    add("--out", help="folder of the results (default: the checkpoint's folder)")
    leaks = "do not look for test images among the training images that a run recorded"
    add("--no-leak-check", action="store_true", help=leaks)
    add("--dry-run", action="store_true", help="say what would be computed, and stop")

    add = parser.add_argument_group("reports").add_argument
    add("--report", nargs="+", metavar="JSONL", help="draw report.md, report.html and the radar plot")
    add("--title", help="with --report: its heading")
    add("--show-data", **several, metavar="NAME=DIR", help="with --report: images to show; repeatable")
    add("--dataset-report", metavar="DATASET", help="look at a synthetic dataset: duplicates, FID ...")
    add("--real", metavar="DIR", help="with --dataset-report: real images to compare with")
    return parser


def main(args: argparse.Namespace) -> int:
    """Judge, or what is asked for instead. Returns the exit code: 2 if a dataset that was found is no right copy."""
    distributed.take_own_cores()
    if not distributed.ranks().is_main:  # of several processes one speaks, and does what is no work on features
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        if args.list_datasets or args.dataset_report or args.report:
            return 0
    if args.list_datasets:
        list_sets(args.data_root)
        return 0
    if args.dataset_report:
        from utils.report import dataset_quality

        if len(args.checkpoint) > 1:
            raise UserError("--dataset-report looks at one dataset through one --checkpoint")
        how = (args.device, args.dtype, args.interpolation, args.batch_size, args.workers)
        network = dataset_quality.Network(args.checkpoint[0], *how) if args.checkpoint else None
        out = Path(args.out or args.dataset_report)
        return dataset_quality.run(args.dataset_report, args.real, network, out, args.dry_run, known_images)
    if args.report:
        return draw_report(args)
    for option, needs in (("real", "dataset_report"), ("title", "report"), ("show_data", "report")):
        if getattr(args, option):
            raise UserError(f"--{option.replace('_', '-')} goes with --{needs.replace('_', '-')}; see --help")
    if not args.checkpoint:
        raise UserError("--checkpoint is required (or --report, --dataset-report, --list-datasets); see --help")

    # ===== finding checkpoints and test sets =====
    label_map = read_label_map(Path(args.label_map)) if args.label_map else {}
    rename = partial(renamed, label_map=label_map)
    found = [checkpoints.locate(spec, download=not args.dry_run) for spec in args.checkpoint]
    sources = [checkpoints.relabelled(source, rename) for source in found]
    checkpoints.refuse_twins(sources)
    for source in sources:
        if source.unfinished:
            print(f"{source.label}: its training is not finished; {source.path} is judged as it is now", flush=True)
    chosen = choose(args.datasets, args.test, args.data_root, args.transfer, rename)
    test_sets, wrong_copies = read_all(chosen, look_at_images=not args.dry_run)
    if not test_sets:
        raise UserError(f"--data-root {args.data_root}: none of the datasets found there is a right copy, see above")
    chosen_format = number_format(args.dtype, distributed.device_name(args.device))
    settings = Settings(
        number_format=chosen_format,
        probe_format="fp32" if (args.dtype, args.protocol) == ("auto", "paper") else chosen_format,
        interpolation=args.interpolation,
        truncated=args.allow_truncated,
        probe_protocol=args.protocol,
        seeds=tuple(args.seeds),
        knn=args.knn,
        classes=args.classes,
    )
    jobs = [
        Job(source, test_set, settings, Path(args.out) if args.out else source.folder)
        for source in sources
        for test_set in test_sets
    ]

    # ===== what is left to do =====
    for job in jobs:
        if args.dry_run or job.done:
            print(f"{job.title}: {'done already' if job.done else job.outline()}", flush=True)
    code = 2 if wrong_copies else 0
    if args.dry_run:
        return code
    todo = [job for job in jobs if not job.done]
    for folder in dict.fromkeys(job.out for job in todo):
        require_writable(folder / "eval", "--out")

    # ===== computing and telling =====
    if todo:
        judge_all(todo, args)
    print_table(jobs)
    return code


def judge_all(jobs: list[Job], args: argparse.Namespace) -> None:
    """One model at a time on this process's device; several processes share the work on features."""
    from utils.evaluation.features import Share  # here, since torch takes seconds to start
    from utils.evaluation.judge import FrozenModel

    device, model = resolve_device(distributed.device_name(args.device)), None
    require_memory(device, None, "--batch-size")
    seen: dict[tuple, Found] = {}  # runs of other seeds have the same training images
    with distributed.process_group(device, timedelta(days=30)) as ranks:  # rank 0 fits probes alone, for hours
        share = Share(ranks.rank, ranks.world_size)
        for job in jobs:
            if model is None or model.source is not job.source:
                model = FrozenModel(job.source, args.classes, device, args.batch_size, args.workers, share)
            leaks_seen = seen if ranks.is_main and not args.no_leak_check else None
            try:
                (judge_by_probe if job.test_set.probed else judge_by_logits)(job, model, leaks_seen)
            except (NoSharedClass, checkpoints.NoClassifier) as error:
                if job.test_set.asked_for:
                    raise
                print(f"{job.title}: left out; {error}", flush=True)
        share.wait()


def judge_by_logits(job: Job, model: FrozenModel, leaks_seen: dict[tuple, Found] | None) -> None:
    """Features -> logits of the model's own classifier -> metrics, on a set whose classes it knows."""
    from utils.evaluation.judge import metrics_of_logits

    model.classifier.require_head()
    loaded = job.test_set.loaded
    matched = match(loaded, model.classifier.class_ids)
    model.cost()  # what was before is not of this job
    leaks = training_images_in(job, matched.samples, leaks_seen)
    stamps = loaded.stamps["test"][matched.rows]
    features = model.features(job, matched.samples, stamps)  # (N, D)
    if model.share.rank > 0:
        return
    logits = model.classifier.logits(features)[:, matched.columns]  # (N, compared classes)
    measured, facts, sidecar = metrics_of_logits(logits, matched, model.classifier)
    sidecar |= leaks[1] | {"images": fingerprint(matched.samples, stamps)}
    job.save(measured, facts | leaks[0], sidecar, model.cost())


def judge_by_probe(job: Job, model: FrozenModel, leaks_seen: dict[tuple, Found] | None) -> None:
    """Features -> linear classifier trained on those of trainval -> metrics on those of test; seed by seed."""
    from utils.evaluation import neighbours, probes
    from utils.evaluation.judge import metrics_of_probe

    loaded = job.test_set.loaded
    model.cost()
    leaks = training_images_in(job, loaded.samples, leaks_seen)
    features = {
        split: model.features(job, samples, loaded.stamps[split], split)  # (N, D)
        for split, samples in loaded.splits.items()
    }
    if model.share.rank > 0:
        return
    splits = {split: (features[split], loaded.labels(split)) for split in features}
    options = {"protocol": job.settings.probe_protocol, "kind": job.test_set.probe, "device": model.device}
    knn = {"knn": neighbours.knn_top1(splits, model.device)} if job.settings.knn and job.missing_seeds() else {}
    for seed in job.missing_seeds():
        result = probes.run_probe(splits, seed=seed, memo=job.trials, **options) | knn
        found = ", ".join(f"{name} {value:.3g}" for name, value in result["chosen"].items())
        print(f"{job.title}, seed {seed}: {found} chosen, {result['held_out']:.2f} % on held-out images", flush=True)
        measured, facts, sidecar = metrics_of_probe(result, loaded, seed, job.finished_runs())
        job.save(measured, facts | leaks[0], sidecar | leaks[1], model.cost())


def training_images_in(
    job: Job, samples: Sequence[tuple[str, int]], seen: dict[tuple, Found] | None
) -> tuple[dict, dict]:
    """(facts, sidecar): how many of SAMPLES (path, label) the model was trained on, and which.

    SEEN: what was found before in this call; None to leave the check out. Both are empty then, and where nobody
    recorded the training images or they are no longer there. UserError if a model was trained on every one of SAMPLES.
    """
    from utils.dataset.overlap import describe, overlap

    if seen is None or (trained := recorded_images(job.source)) is None:
        return {}, {}
    tests, cache = [path for path, _ in samples], job.out / "hashes"
    key = tuple(tests), tuple(trained)
    if key not in seen:
        some, others = (describe(places, cache, f"{job.title}: hashes") for places in key)
        seen[key] = overlap(some, others)
    found = seen[key]
    if len(found.exact) == len(tests):
        remedy = "judge it on others, or give --no-leak-check"
        raise UserError(f"{job.title}: all {len(tests):,} test images are among the images it was trained on; {remedy}")
    if found.exact or found.near:
        of = f"{len(found.exact):,} of the {len(tests):,} test images, and on copies of {len(found.near):,}"
        how = f"(cut, mirrored or encoded otherwise); {job.sidecar} names them"
        print(f"{job.title}: it was trained on {of} {how}", flush=True)
    pairs = [
        {"test": tests[mine], "train": trained[theirs], "same_pixels": same}
        for same, those in ((True, found.exact), (False, found.near))
        for mine, theirs in sorted(those.items())[:SHOWN_LEAKS]
    ]
    counts = {"train_overlap_exact": len(found.exact), "train_overlap_near": len(found.near)}
    return counts, {"train_overlap": pairs}


class DataOptions(msgspec.Struct):
    """What train.py was told about its images."""

    data: list[str]
    images_per_class: int | list[int] | None = None
    classes: str | None = None
    label_map: str | None = None


class DataIdentity(msgspec.Struct):
    """Number and fingerprint of the images of each --data."""

    data: list[str]


class TrainingRecord(msgspec.Struct):
    """The part of a run's args.json that says which images it was trained on."""

    options: DataOptions
    identity: DataIdentity


def recorded_images(source: checkpoints.Source) -> list[Place] | None:
    """Where the images lie that args.json says a run was trained on; None, and a line, if they cannot be found."""
    from utils.training.image_sets import open_sources

    try:
        run = msgspec.convert(source.args, TrainingRecord)
    except msgspec.ValidationError:  # weights from elsewhere
        return None
    try:
        paths = [data_and_weight(text)[0] for text in run.options.data]
        label_map = read_label_map(Path(run.options.label_map)) if run.options.label_map else None
        options = run.options.images_per_class, run.options.classes, known_images, label_map
        images = open_sources(paths, *options)
        if [one.summary() for one in images] != run.identity.data:
            raise UserError("they have changed since")
    except UserError as error:
        print(f"{source.label}: no leak check, its training images are not where args.json says: {error}", flush=True)
        return None
    return [place for one in images for place in one.locations()]


# ===== telling =====


def print_table(jobs: list[Job]) -> None:
    """One line a pair: accuracy with its 95 % interval, or mean +- deviation over seeds; always n and classes."""
    width = max(len(job.source.label) for job in jobs)
    print(f"\n{'model':{width}}  {'dataset':14} {'top-1':>22} {'top-5':>7} {'images':>8} {'classes':>8}")
    found: dict[tuple[str, str], dict[str, list[Row]]] = {}  # (model, dataset) -> metric -> rows
    for row in with_v2_mean([row for job in jobs for row in job.rows()]):
        found.setdefault((row.model, row.dataset), {}).setdefault(row.metric, []).append(row)
    for (model, dataset), by_metric in found.items():
        if not (top1 := by_metric.get("top1")):
            continue
        if len(top1) > 1:
            mean, deviation = mean_and_std(row.value for row in top1)
            first = f"{mean:.2f} ± {deviation:.2f} ({len(top1)} seeds)"
        else:
            bounds = (top1[0].low, top1[0].high)
            first = f"{top1[0].value:.2f}" + ("" if None in bounds else f" ({bounds[0]:.1f} to {bounds[1]:.1f})")
        top5 = f"{by_metric['top5'][0].value:.2f}" if "top5" in by_metric else ""
        row = top1[0]
        leaked = row.train_overlap_exact + row.train_overlap_near
        mark = f"  k-NN {by_metric['knn'][0].value:.2f}" if "knn" in by_metric else ""
        mark += f"  {leaked:,} of them trained on" if leaked else ""
        print(f"{model:{width}}  {dataset:14} {first:>22} {top5:>7} {row.n:>8,} {row.num_classes or '':>8}{mark}")
    for folder in dict.fromkeys(job.out for job in jobs):
        print(f"written: {folder / 'results.jsonl'}")


def draw_report(args: argparse.Namespace) -> int:
    """--report: the tables, the page and the radar plot of results.jsonl files. Returns the exit code."""
    from utils.report.page import write_report

    shown = []
    for spec in args.show_data:
        name, _, folder = spec.partition("=")
        if not name or not folder:
            raise UserError(f"--show-data {spec}: expected NAME=DIR")
        shown.append((name, Path(folder)))
    results = [Path(path) for path in args.report]
    out = Path(args.out or results[0].parent)
    for path in write_report(results, out, args.title, shown, known_images):
        print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main, get_args_parser()))
