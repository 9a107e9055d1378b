"""Judge frozen models on real images: ImageNet's test sets, fifteen transfer datasets, or any folder of classes.

Reads checkpoints (a run folder of train.py, a weights file, or a name of torchvision's) and the datasets it finds
below --data-root. Writes OUT/results.jsonl (one line a metric), OUT/eval/*.json (per class, confusion) and
OUT/features/ (the cache); OUT is the checkpoint's folder unless --out is given. Pairs of checkpoint and dataset that
are in results.jsonl already are not computed again: run the same command to continue.

    # without a GPU, in seconds, after `make demo`: two models side by side on one folder of real images
    python evaluate.py --checkpoint runs/demo/real-seed0 runs/demo/synthetic_g2-seed0 --test digits=data/digits/test

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
from collections.abc import Iterator
from pathlib import Path

from utils.cli import Launch, UserError, make_parser, non_negative_int, positive_int, run
from utils.evaluation import checkpoints, imagenet_sets, transfer_sets
from utils.evaluation.jobs import Job, chosen_datasets, find, known_datasets, number_format, read_datasets
from utils.storage import require_writable

LAUNCH = Launch("evaluate", "single")
MAX_CONFUSION = 200  # classes: a larger matrix is too large to read


def get_args_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    models = parser.add_argument_group("models")
    models.add_argument(
        "--checkpoint",
        nargs="+",
        default=[],
        metavar="[LABEL=]MODEL",
        help="run folder, weights file (.pth, .safetensors) or torchvision name (resnet50, resnet50:IMAGENET1K_V1)",
    )
    models.add_argument("--classes", help="classes of the outputs, if the checkpoint has no record: 100, 1000, a .txt")
    data = parser.add_argument_group("data")
    data.add_argument("--data-root", default="data", help="folder that holds the datasets; see --list-datasets")
    data.add_argument(
        "--datasets",
        nargs="+",
        default=[],
        metavar="NAME",
        help="names or groups (imagenet, small, inat, cog, all); default: those found, or --test's alone",
    )
    data.add_argument(
        "--test", action="append", default=[], metavar="NAME=DIR", help="a folder DIR/<class id>/<images>; repeatable"
    )
    data.add_argument("--list-datasets", action="store_true", help="each dataset: what, where from, whether found")
    protocol = parser.add_argument_group("protocol")
    protocol.add_argument(
        "--interpolation",
        choices=("bilinear", "bicubic"),
        help="filter of resizing (default: as torchvision published its weights, else bilinear; for transfer bicubic)",
    )
    protocol.add_argument(
        "--protocol",
        choices=("fast", "paper"),
        default="fast",
        help="linear probes: fast, or the search of t-ReX's transfer suite",
    )
    protocol.add_argument(
        "--seeds", nargs="+", type=non_negative_int, default=[0], help="seeds of the linear probes: one result each"
    )
    protocol.add_argument(
        "--allow-truncated",
        action="store_true",
        help="read JPEGs that end early as far as they go, as t-ReX's suite does",
    )
    runtime = parser.add_argument_group("runtime")
    runtime.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps")
    runtime.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "fp16", "bf16", "fp32"),
        help="auto: fp16 on CUDA, else fp32",
    )
    runtime.add_argument("--batch-size", type=positive_int, default=64, help="images of a forward pass")
    runtime.add_argument(
        "--workers", type=positive_int, default=min(16, os.cpu_count() or 1), help="threads that decode images"
    )
    runtime.add_argument("--out", help="folder of the results (default: the checkpoint's folder)")
    runtime.add_argument("--dry-run", action="store_true", help="say what would be computed, and stop")
    reports = parser.add_argument_group("reports")
    reports.add_argument("--report", nargs="+", metavar="JSONL", help="draw report.md, report.html and the radar plot")
    reports.add_argument("--title", help="with --report: its heading")
    reports.add_argument(
        "--show-data", action="append", default=[], metavar="NAME=DIR", help="with --report: images to show; repeatable"
    )
    reports.add_argument("--dataset-report", metavar="DATASET", help="look at a synthetic dataset: duplicates, FID ...")
    reports.add_argument("--real", metavar="DIR", help="with --dataset-report: real images to compare with")
    return parser


def main(args: argparse.Namespace) -> int:
    if args.list_datasets:
        return list_datasets(args.data_root)
    if args.dataset_report:
        from utils.report import dataset_quality

        return dataset_quality.run(args)
    if args.report:
        return draw_report(args)
    for option, needs in (("real", "dataset_report"), ("title", "report"), ("show_data", "report")):
        if getattr(args, option):
            raise UserError(f"--{option.replace('_', '-')} goes with --{needs.replace('_', '-')}; see --help")
    if not args.checkpoint:
        raise UserError("--checkpoint is required (or --report, --dataset-report, --list-datasets); see --help")

    # ===== finding checkpoints and datasets =====
    sources = [checkpoints.locate(spec, download=not args.dry_run) for spec in args.checkpoint]
    refuse_twins(sources)
    datasets, wrong_copies = read_datasets(chosen_datasets(args), look_at_images=not args.dry_run)
    if not datasets:
        raise UserError(f"--data-root {args.data_root}: none of the datasets found there is a right copy, see above")
    jobs = [Job(args, source, dataset) for source in sources for dataset in datasets]

    # ===== what is left to do =====
    for job in jobs:
        if args.dry_run or job.done:
            print(f"{job.source.label} on {job.dataset.name}: {'done already' if job.done else job.plan()}", flush=True)
    code = 2 if wrong_copies else 0
    if args.dry_run:
        return code
    todo = [job for job in jobs if not job.done]
    for folder in dict.fromkeys(job.out for job in todo):
        require_writable(folder / "eval", "--out")

    # ===== computing: one model at a time =====
    model = None
    for job in todo:
        if model is None or model.source is not job.source:
            model = LoadedModel(args, job.source)
        try:
            for rows, sidecar in (judge_by_probe if job.dataset.transfer else judge_by_logits)(args, job, model):
                job.save(rows, sidecar)
        except (imagenet_sets.NoSharedClass, checkpoints.NoClassifier) as error:
            if job.dataset.asked_for:
                raise
            print(f"{job.source.label} on {job.dataset.name}: left out; {error}", flush=True)

    # ===== telling =====
    print_table(jobs)
    return code


def list_datasets(data_root: str) -> int:
    for name in known_datasets():
        there, where = find(name, data_root)
        row = imagenet_sets.DATASETS.get(name) or transfer_sets.DATASETS[name]
        print(f"{name:14} {'found at ' + where if there else 'not found'}")
        print(f"{'':14} layout   {data_root}/{row.layout}")
        print(f"{'':14} content  {row.counts}")
        print(f"{'':14} source   {row.where}\n")
    print("any folder     --test NAME=DIR with DIR/<class id>/<images>")
    return 0


def refuse_twins(sources: list[checkpoints.Source]) -> None:
    """Two models of one name could not be told apart in a table."""
    seen: dict[str, str] = {}
    for source in sources:
        if (other := seen.setdefault(source.label, source.path)) is not source.path:
            raise UserError(
                f"--checkpoint: {other} and {source.path} are both called {source.label}; name them: A={other} "
                f"B={source.path}"
            )


class LoadedModel:
    """A checkpoint in memory with the machine it runs on."""

    def __init__(self, args: argparse.Namespace, source: checkpoints.Source):
        from utils.evaluation.features import Extractor
        from utils.machine import resolve_device, resolve_dtype

        self.source = source
        self.no_classifier: checkpoints.NoClassifier | None = None
        try:
            self.classifier = checkpoints.load(source, args.classes)
        except checkpoints.NoClassifier as error:  # enough for transfer datasets
            self.classifier, self.no_classifier = checkpoints.load(source, need_head=False), error
        if self.classifier.classes_from.startswith("assumed"):
            print(f"{source.label}: outputs {self.classifier.classes_from} (else give --classes)", flush=True)
        device = resolve_device(args.device)
        dtype = resolve_dtype(number_format(args), device)
        self.extract = Extractor(self.classifier.backbone, source.sha256, device, dtype, args.batch_size, args.workers)


def judge_by_logits(args: argparse.Namespace, job: Job, model: LoadedModel) -> Iterator[tuple[list[dict], dict]]:
    """(rows, sidecar): accuracy of the model's own classifier on a set whose classes it knows."""
    import numpy as np
    import torch

    from utils import metrics
    from utils.evaluation.features import Transform

    if model.no_classifier:
        raise model.no_classifier
    classifier = model.classifier
    matched = imagenet_sets.match(job.dataset.loaded, classifier.class_ids)
    transform = Transform(*job.transform, border=matched.border, truncated=args.allow_truncated)
    title = f"{job.source.label} on {job.dataset.name}"
    features = model.extract(matched.samples, transform, job.out / "features", title)
    with torch.inference_mode():
        blocks = (np.asarray(features[at : at + 8192], dtype=np.float32) for at in range(0, len(features), 8192))
        head = classifier.head.cpu()
        logits = np.concatenate([head(torch.from_numpy(block.copy())).numpy() for block in blocks])
    logits = logits[:, matched.columns]  # (N, compared classes)

    # ===== counts first, one division at the end =====
    ranks = metrics.best_ranks(logits, matched.labels)
    n, correct = len(ranks), ranks == 0
    labels = np.array([label for _, label in matched.samples])
    facts = {
        "n": n,
        "num_classes": len(matched.class_ids),
        "compared": len(matched.columns),  # classes the argmax is over
        "seed": job.source.args.get("seed"),
    }
    rows = [job.row("top1", 100 * int(correct.sum()) / n, metrics.wilson_interval(int(correct.sum()), n), **facts)]
    if len(matched.columns) > 5:
        hits = int((ranks < 5).sum())
        rows.append(job.row("top5", 100 * hits / n, metrics.wilson_interval(hits, n), **facts))
    mean, *interval = metrics.mean_per_class(correct, labels, len(matched.class_ids))
    rows.append(job.row("mean_per_class", mean, tuple(interval), **facts))
    error, *interval = metrics.ece_with_interval(logits, correct)
    rows.append(job.row("ece", error, tuple(interval), **facts))

    # ===== class by class =====
    counts, accuracies = metrics.per_class(correct, labels, len(matched.class_ids))
    names = dict(zip(classifier.class_ids, classifier.class_names, strict=True))
    sidecar = {
        "class_ids": matched.class_ids,
        "class_names": [names.get(class_id, class_id) for class_id in matched.class_ids],
        "classes_in_set": matched.classes_in_set,
        "images_in_set": matched.images_in_set,
        "per_class": [
            {"id": class_id, "n": int(count), "top1": round(float(accuracy), 4)}
            for class_id, count, accuracy in zip(matched.class_ids, counts, accuracies, strict=True)
        ],
    }
    compared = [classifier.class_ids[column] for column in matched.columns]
    if matched.single_answer and compared == matched.class_ids and len(compared) <= MAX_CONFUSION:
        table = metrics.confusion(logits.argmax(1), matched.labels, len(compared))
        sidecar["confusion"] = table.tolist()
    yield rows, sidecar


def judge_by_probe(args: argparse.Namespace, job: Job, model: LoadedModel) -> Iterator[tuple[list[dict], dict]]:
    """(rows, sidecar) of each seed: accuracy of a linear classifier trained on the frozen features."""
    import numpy as np

    from utils import metrics
    from utils.evaluation import probes
    from utils.evaluation.features import Transform

    loaded = job.dataset.loaded
    transform = Transform(*job.transform, truncated=args.allow_truncated)
    features = {}
    for split, samples in loaded.splits.items():
        title = f"{job.source.label} on {job.dataset.name}, {split}"
        labels = np.array([label for _, label in samples])
        features[split] = (model.extract(samples, transform, job.out / "features", title), labels)
    n = len(loaded.splits["test"])
    kind = "logreg" if job.dataset.group == "small" else "sgd"
    runs = job.finished_runs()
    memo = job.out / "eval" / f"{job.dataset.name}.{job.key}.trials.jsonl"
    for seed in job.missing_seeds(job.rows()):
        result = probes.run_probe(
            features, protocol=args.protocol, seed=seed, kind=kind, device=model.extract.device, memo=memo
        )
        facts = {"n": n, "num_classes": loaded.num_classes, "seed": seed}
        correct = round(result["top1"] * n / 100)
        rows = [
            job.row("top1", result["top1"], metrics.wilson_interval(correct, n), **facts),
            job.row("mean_per_class", result["mean_per_class"], None, **facts),
        ]
        runs = [run for run in runs if run["seed"] != seed]
        runs.append({"seed": seed, **{key: result[key] for key in ("top1", "chosen", "held_out")}})
        yield rows, {"class_ids": [], "class_names": [], "per_class": [], "runs": runs}


# ===== telling =====


def print_table(jobs: list[Job]) -> None:
    """One line a pair: accuracy with its 95 % interval, or mean +- deviation over seeds; always n and classes."""
    from utils.metrics import mean_and_std

    width = max(len(job.source.label) for job in jobs)
    print(f"\n{'model':{width}}  {'dataset':14} {'top-1':>22} {'top-5':>7} {'images':>8} {'classes':>8}")
    for job in jobs:
        by_metric: dict[str, list[dict]] = {}
        for row in job.rows():
            by_metric.setdefault(row["metric"], []).append(row)
        if "top1" not in by_metric:
            continue
        top1 = by_metric["top1"]
        if len(top1) > 1:
            mean, deviation = mean_and_std(row["value"] for row in top1)
            first = f"{mean:.2f} ± {deviation:.2f} ({len(top1)} seeds)"
        else:
            first = f"{top1[0]['value']:.2f} ({top1[0]['low']:.1f} to {top1[0]['high']:.1f})"
        top5 = f"{by_metric['top5'][0]['value']:.2f}" if "top5" in by_metric else ""
        row = top1[0]
        print(
            f"{job.source.label:{width}}  {job.dataset.name:14} {first:>22} {top5:>7} {row['n']:>8,} "
            f"{row['num_classes']:>8}"
        )
    for folder in dict.fromkeys(job.out for job in jobs):
        print(f"written: {folder / 'results.jsonl'}")


def draw_report(args: argparse.Namespace) -> int:
    from utils.report.page import write_report

    shown = []
    for spec in args.show_data:
        name, _, folder = spec.partition("=")
        if not name or not folder:
            raise UserError(f"--show-data {spec}: expected NAME=DIR")
        shown.append((name, Path(folder)))
    results = [Path(path) for path in args.report]
    for path in write_report(results, Path(args.out or results[0].parent), title=args.title, show_data=shown):
        print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main, get_args_parser()))
