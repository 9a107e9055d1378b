"""Train a classifier from scratch on folders of images: synthetic, real, or a weighted mix.

Reads   DATA/train/<class id>/*.jpg of a generated dataset, DATA/<class id>/*.jpg of any other, or DATA/*.tar shards
Writes  RUN/checkpoint.pth (resume), RUN/<dataset>.pth (weights), RUN/args.json, RUN/log.jsonl, RUN/curves.png

The same command continues a run that was stopped or killed, and ends with the same weights; a finished run is left
alone. SIGTERM, SIGUSR1 and SIGUSR2 save a checkpoint within seconds and exit with 128 + the signal's number.

    python train.py --recipe demo --data data/fashion/real --images-per-class 200    # a laptop, half a minute
    python train.py --data data/imagenet_100_sd --val data/imagenet_100/val          # one GPU, the paper's recipe
    python train.py --data /datasets/imagenet/train --classes imagenet_100 --val /datasets/imagenet/val
    python -m utils.launch --launcher slurm --nodes 1 --gpus-per-node 4 train.py --data data/imagenet_100_sd

Several --data PATH[:WEIGHT] are mixed in proportion to their weights; all must hold the same classes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from utils import cli, machine
from utils.storage import atomic_path, read_json, sha256_file, write_json
from utils.training import distributed
from utils.training.distributed import any_rank
from utils.training.recipe import CHOICES, changed
from utils.training.stop_signals import StopRequested, StopSignals

if TYPE_CHECKING:
    import torch

    from utils.training.step import Training

# Every key of a recipe is read; --set changes any of them. Where no source is named: "t-ReX" is the default of the
# paper authors' public trainer of the same line of work (t-ReX, ICLR 2023).
PAPER = {
    "arch": "resnet50",  # Sec. 4
    "head": "cosine",  # t-ReX: cosine softmax, temperature 0.1, no bias
    "epochs": 100,  # t-ReX
    # t-ReX: 4 GPUs x 64. The iterations that Deliberate Practice (ICML 2025, Table 1) quotes for the paper (13k, 130k,
    # 635k) are 100 epochs at 1024: --batch-size 1024, for which lr is scaled.
    "batch_size": 256,
    "batch_per_device": 64,  # t-ReX; with fewer devices gradients are accumulated up to batch_size
    "lr": 0.1,  # t-ReX, for a batch of 256; scaled by batch_size / 256
    "final_lr": 1e-6,  # t-ReX
    "warmup_epochs": 10.0,  # t-ReX; of a run with fewer epochs than the recipe as much less
    "momentum": 0.9,  # t-ReX
    "weight_decay": 1e-4,  # t-ReX; not on biases and norms
    "interpolation": "bicubic",  # t-ReX
    "global_size": 224,  # t-ReX
    "first_size": 0,  # of the global crops at first; 0: global_size throughout, as t-ReX
    "growth": (0.4, 0.8),  # of the run, from first_size to global_size: Mosaic's ResNet recipes
    "global_count": 1,  # t-ReX
    "global_scale": (0.25, 1.0),  # t-ReX; t-ReX* takes (0.40, 1.0)
    "local_size": 96,  # t-ReX
    "local_count": 8,  # t-ReX
    "local_scale": (0.05, 0.25),  # t-ReX; t-ReX* takes (0.05, 0.40)
    "flip": 0.5,  # t-ReX
    "jitter": 0.8,  # t-ReX
    "brightness": 0.4,  # t-ReX
    "contrast": 0.4,  # t-ReX
    "saturation": 0.2,  # t-ReX
    "hue": 0.1,  # t-ReX
    "grayscale": 0.2,  # t-ReX
    "global_blur": 0.2,  # t-ReX
    "local_blur": 0.5,  # t-ReX
    "global_solarize": 0.2,  # t-ReX
    "local_solarize": 0.0,  # t-ReX
    "label_smoothing": 0.0,  # t-ReX
    "val_resize": 256,  # t-ReX
    "val_crop": 224,  # t-ReX
}
# One crop, cross-entropy with bias: torchvision's reference recipe for ResNets (references/classification).
BASIC = PAPER | {
    "head": "linear",
    "epochs": 90,  # torchvision
    "final_lr": 0.0,  # not in torchvision, which steps by 0.1 every 30 epochs: our choice
    "warmup_epochs": 5.0,  # Goyal et al., 2017
    "interpolation": "bilinear",  # torchvision
    "global_scale": (0.08, 1.0),  # torchvision
    "local_count": 0,
    "jitter": 0.0,
    "grayscale": 0.0,
    "global_blur": 0.0,
    "global_solarize": 0.0,
}
# A thirty-third of the paper's arithmetic, to rank datasets with. "FFCV": libffcv/ffcv-imagenet, rn50_16_epochs.yaml,
# 73.8 top-1 on ImageNet-1K in 15 minutes of 8 A100, with blur-pool, which torchvision's ResNet50 has not.
# "Mosaic": mosaicml/examples, blogs/resnet/recipes/resnet50_mild.yaml. No moving average of the weights, as FFCV: with
# half-lives of 2, 5 and 10 % of a run of the demo's size top-1 fell from 64.6 to 63.8, 60.6 and 48.7.
QUICK = BASIC | {
    "head": "cosine",  # as the paper's
    "epochs": 16,  # FFCV
    # FFCV's 8 x 512 would leave 30 steps an epoch of ImageNet-100; its lr of 1.7 is 0.106 for 256, near the paper's 0.1
    "batch_size": 256,
    "batch_per_device": 256,  # pixels of a device's batch as the paper's 64 images of nine crops
    "final_lr": 0.0,  # FFCV and Mosaic
    "warmup_epochs": 2.0,  # FFCV: lr_peak_epoch
    "global_size": 192,  # FFCV: max_res; tested at 224, as FFCV
    "first_size": 128,  # FFCV 160, Mosaic half the size: our choice between
    "label_smoothing": 0.1,  # FFCV; Mosaic 0.08
}
# 32-pixel photographs of clothes, 200 a class, in half a minute on a CPU core. Not in paper: our choice throughout.
DEMO = BASIC | {
    "arch": "resnet10",
    "head": "cosine",
    "epochs": 12,
    "batch_size": 64,
    "lr": 0.4,
    "final_lr": 1e-3,
    "warmup_epochs": 2.0,
    "weight_decay": 5e-4,
    "global_size": 32,
    "global_scale": (0.6, 1.0),
    "flip": 0.0,  # shoes are all photographed from one side
    "val_resize": 32,
    "val_crop": 32,
}
# QUICK's means at the demo's size, at 0.29 of its arithmetic; that it ranks alike: benchmarks/quick_ranks.py. Batches
# of 16: with 330 images those of 32 are too few steps, top-1 57 instead of 68 (a seed; chosen on four of the nine).
DEMO_QUICK = DEMO | {"epochs": 4, "warmup_epochs": 0.67, "batch_size": 16, "label_smoothing": 0.1}
DEMO_QUICK |= {"first_size": 24, "growth": (0.25, 0.5)}
RECIPES = {"paper": PAPER, "basic": BASIC, "quick": QUICK, "demo": DEMO, "demo-quick": DEMO_QUICK}
TIMED_STEPS, TIMED_SECONDS = 20, 60  # of --dry-run: whichever ends first
LAUNCH = cli.Launch("train", "ranks")
CURVES_SECONDS = 300  # at least, between two drawings of curves.png


def get_args_parser() -> argparse.ArgumentParser:
    """The options, grouped as --help shows them. An option of the recipe overrides the chosen recipe's value."""
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    # Data
    add("--data", action="append", required=True, metavar="PATH[:WEIGHT]", help="repeat to mix")
    add("--classes", metavar="SPEC", help="use these class folders only; SPEC as in generate.py --help")
    add("--label-map", type=cli.any_path, metavar="FILE", help="class ids of --data, --val: a .tsv with name and id")
    add("--val", type=cli.any_path, metavar="DIR", help="real images to validate on, DIR/<class id>/<images>")
    add("--no-leak-check", action="store_true", help="take --val even if all of it was trained on (evaluate.py counts)")
    add("--val-every", type=cli.positive_int, default=1, metavar="EPOCHS", help="epochs between; and after the last")
    add("--images-per-class", type=cli.one_or_more, metavar="N[,N...]", help="first N of each class only; one a --data")
    add("--max-bad-images", type=cli.non_negative_int, default=0, help="damaged images to skip over")
    # Recipe
    add("--recipe", choices=list(RECIPES), default="paper", help="defaults of all that follows")
    add("--arch", help="any torchvision classification model, or resnet10 (default: the recipe's)")
    add("--head", choices=CHOICES["head"], help="cosine softmax or plain linear")
    add("--epochs", type=cli.epoch_count, help="passes over the data; with fewer the warm-up shrinks")
    add("--batch-size", type=cli.positive_int, help="images of an optimizer step, over all devices")
    add("--batch-per-device", type=cli.positive_int, help="images at a time on a device")
    add("--lr", type=cli.positive_float, help="peak learning rate for a batch of 256; scaled linearly")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="any other value of the recipe")
    add("--seed", type=cli.seed_number, default=0, help="of weights, data order and augmentations")
    # Device
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--dtype", default="auto", choices=["auto", "fp16", "bf16", "fp32"], help="of the forward pass")
    add("--workers", type=cli.non_negative_int, help="loader processes per device (default: by the cores)")
    add("--compile", action="store_true", help="torch.compile the model: minutes first, then faster")
    add("--channels-last", action=argparse.BooleanOptionalAction, help="default: where it pays")
    # Output
    add("--out", type=cli.any_path, metavar="RUN", help="run folder (default: runs/<dataset>)")
    add("--name", type=cli.one_name, help="of the exported weights (default: the data folder's; a mix: joined by +)")
    add("--checkpoint-minutes", type=cli.positive_float, default=15, help="also saved after each epoch")
    add("--log-every", type=cli.positive_int, default=50, metavar="STEPS", help="steps between log lines")
    add("--dry-run", action="store_true", help="print the plan and a time estimate; write nothing")
    return parser


def main(args: argparse.Namespace) -> int:
    """Train as ARGS say; the exit code: 0 done, 128 + N stopped by signal N. UserError for what the user can mend."""
    # Idle threads sleep instead of spinning: on a busy machine a step is then ten times faster. Read when torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    distributed.take_own_cores()
    with ExitStack() as closing:  # the process group, the run folder's lock, the loaders: given back whatever happens
        return train_from_scratch(args, closing)


def train_from_scratch(args: argparse.Namespace, closing: ExitStack) -> int:
    """From options to exported weights: data, model, optimizer, then `train`. CLOSING ends what is opened here."""
    from utils.dataset.folder import known_images
    from utils.dataset.overlap import refuse_contained
    from utils.training.checkpoint import is_finished, make_identity, own_run, run_name
    from utils.training.image_sets import open_sources, open_validation
    from utils.training.labels import read_label_map

    # ===== what to do =====
    recipe = make_recipe(args)
    paths, weights = zip(*map(cli.data_and_weight, args.data), strict=True)
    name = run_name(args.name, paths)
    out = args.out or Path("runs") / name
    label_map = read_label_map(args.label_map) if args.label_map else None
    images = open_sources(paths, args.images_per_class, args.classes, known_images, label_map)
    identity = make_identity(recipe, images, weights, args.seed)
    if not args.dry_run and is_finished(out, name, identity):
        print(f"{out}/{name}.pth: finished already; delete {out} to train again")
        return 0
    val_images = open_validation(args.val, images[0].class_ids, label_map) if args.val else None
    if val_images is not None and not args.no_leak_check:
        refuse_contained([place for one in images for place in one.locations()], val_images.locations(), "--val")

    # ===== preparing the device, the model and the optimizer =====
    from utils.training.loader import CropBatches, crop_specs, worker_count
    from utils.training.run_log import describe_plan
    from utils.training.validation import validation_on

    device = machine.resolve_device(distributed.device_name(args.device))
    machine.require_memory(device, None, "--batch-per-device")
    processes = closing.enter_context(distributed.process_group(device))
    training = make_training(args, recipe, device, len(images[0].class_ids), sum(map(len, images)))

    # ===== preparing data =====
    batches = CropBatches(images, weights, partial(crop_specs, recipe), args.seed)
    workers = worker_count(args.workers, device)
    distributed.print0(describe_plan(args.recipe, training, images, out))
    if args.dry_run:
        loader = closing.enter_context(training.loader(batches, workers, most_steps=TIMED_STEPS))
        distributed.print0(time_steps(training, loader, args.max_bad_images))
        return 0
    validation = None
    if val_images is not None:
        validation = closing.enter_context(validation_on(val_images, recipe, workers, pin=device.type == "cuda"))

    # ===== resuming =====
    stop = StopSignals(alone=processes.world_size == 1)
    stop.install()  # not sooner: until now a signal may end the process, there is nothing to save
    if processes.is_main:
        closing.enter_context(own_run(out))
        closing.callback(training.writer.close)
    for line in training.resume(out, identity, images):
        distributed.print0(line)
    training.require_same_step(out)
    if processes.is_main:
        (out / f"{name}.pth").unlink(missing_ok=True)  # of an earlier run: args.json would take it for this one's
        write_json(out / "args.json", describe_run(args, name, images, identity, training))
    loader = closing.enter_context(training.loader(batches, workers))  # closed last: saving comes first

    # ===== training and exporting =====
    try:
        train(training, loader, validation, stop, out, identity, args)
    except StopRequested:
        training.abandon_step()
        if processes.is_main:
            training.save(out, identity)
            training.writer.wait()
        distributed.barrier()  # launchers that see one process leave soon kill the others
        distributed.print0(f"stopped by a signal; step {training.step} is saved, the same command continues from there")
        return stop.exit_code
    if processes.is_main:
        training.writer.wait()
        export(training, out, name)
        print(f"wrote {out}/{name}.pth", flush=True)
    return 0


def make_training(args: argparse.Namespace, recipe: dict, device: torch.device, classes: int, images: int) -> Training:
    """The network for CLASSES, its optimizer and the schedule of an epoch of IMAGES, on DEVICE, over all processes."""
    import torch

    from utils.model import MultiCrop, build_model, forward_flops, parameter_groups, sync_batchnorm
    from utils.training.loader import crop_specs
    from utils.training.step import Training, make_schedule

    crops = {spec for epoch in range(recipe["epochs"]) for spec in crop_specs(recipe, epoch)}
    dtype = machine.resolve_dtype(args.dtype, device, min(spec.size for spec in crops))
    world = distributed.ranks().world_size
    # ResNet50's step on a CPU is 1.13 times as fast with channels_last in fp32 too (row train_step_vs_fp32).
    automatic = torch.channels_last if device.type == "cpu" else machine.memory_format(device, dtype)
    layout = {None: automatic, True: torch.channels_last, False: torch.contiguous_format}[args.channels_last]
    schedule = make_schedule(recipe, images, world)
    torch.manual_seed(args.seed)
    model = build_model(recipe["arch"], classes, recipe["head"])
    at_once = schedule.batch_size // schedule.micro_batches  # images that share their batch norm
    flops = forward_flops(model, sorted((spec.size, spec.count * at_once) for spec in crops))
    model = model.to(device=device, memory_format=layout)
    if world > 1:
        model = sync_batchnorm(model)
    forward: torch.nn.Module = MultiCrop(model)
    if args.compile:
        machine.require_compiler(device)
        forward = torch.compile(forward, dynamic=False)  # each crop size on its own: kernels for any size are slower
    if world > 1:
        forward = torch.nn.parallel.DistributedDataParallel(forward, [device] if device.type == "cuda" else None)
    groups = parameter_groups(model, recipe["weight_decay"])
    optimizer = torch.optim.SGD(groups, lr=schedule.peak_lr, momentum=recipe["momentum"])
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    return Training(model, forward, optimizer, scaler, device, dtype, recipe, schedule, args.seed, flops)


def train(training, loader, validation, stop, out: Path, identity: dict, args: argparse.Namespace) -> None:
    """The loop: from training.step to the end, with log lines, checkpoints and validation on the way."""
    from utils.training.run_log import RunLog, draw_run

    schedule = training.schedule
    log = RunLog(out, training.step) if distributed.ranks().is_main else None
    if training.step % schedule.steps_per_epoch == 0 and training.epoch["seen"]:  # its line follows its checkpoint
        if any_rank(log is not None and training.step not in log.epochs, training.device):  # stopped while validating
            finish_epoch(training, validation, log, stop, args.val_every)
        training.epoch.clear()
    saved_at = drawn_at = time.monotonic()
    while training.step < schedule.total_steps:
        train_step(training, loader, stop.interruptible(), args.max_bad_images)
        epoch_ended = training.step % schedule.steps_per_epoch == 0
        if training.step % args.log_every == 0 or epoch_ended:
            totals = training.flush_interval()
            if log:
                log.interval(training, totals)
        stop.check(training.device)
        training.writer.check()
        if log and (epoch_ended or time.monotonic() - saved_at > 60 * args.checkpoint_minutes):
            training.save(out, identity)  # before validation, which takes long and may stop at a damaged image
            saved_at = time.monotonic()
        if epoch_ended:
            finish_epoch(training, validation, log, stop, args.val_every)
            training.epoch.clear()
        if log and epoch_ended and time.monotonic() - drawn_at > CURVES_SECONDS:
            draw_run(out)
            drawn_at = time.monotonic()


def train_step(training, loader, interruptible: AbstractContextManager, max_bad_images: int) -> None:
    """One optimizer step. Until the weights move, at its end, it may be left at any moment and leaves no trace."""
    import torch
    from torch.nn import functional

    schedule, optimizer, scaler = training.schedule, training.optimizer, training.scaler
    device, dtype = training.device, training.dtype
    with interruptible:
        training.begin_step()
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr(training.step)
        optimizer.zero_grad(set_to_none=True)
        for micro in range(schedule.micro_batches):
            asked = time.monotonic()
            batch = next(loader)
            training.waited += time.monotonic() - asked
            training.note_bad_images(batch["bad"], max_bad_images)
            crops = training.augmented(batch)  # paper: [(B, 3, 224, 224), (8 B, 3, 96, 96)], a sample's side by side
            labels = batch["labels"].to(device, non_blocking=True)  # (B,)
            targets = torch.cat([labels.repeat_interleave(len(crop) // len(labels)) for crop in crops])  # (9 B,)
            with training.gradients_shared(micro == schedule.micro_batches - 1):
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    logits = training.forward(crops)  # (9 B, K)
                smoothing = training.recipe["label_smoothing"]
                loss = functional.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
                scaler.scale(loss / schedule.micro_batches).backward()
            training.count(loss.detach(), logits.detach(), targets, len(labels), len(crops[0]))
    training.require_finite_loss()
    scaler.step(optimizer)
    scaler.update()
    training.end_step()


def finish_epoch(training, validation, log, stop, val_every: int) -> None:
    """Validate if it is due, and write the epoch's line."""
    epoch = training.step // training.schedule.steps_per_epoch
    scores: dict = {}
    if validation is not None and (epoch % val_every == 0 or epoch == training.schedule.epochs):
        with stop.interruptible():
            scores = validation.scores(training.model, training.device, training.dtype, stop)
    if log:
        log.epoch(training, epoch, scores)


def export(training, out: Path, name: str) -> None:
    """RUN/<name>.pth for torchvision, evaluate.py and anyone; with its sha256 in args.json the run is finished."""
    import torch

    from utils.model import export_state_dict
    from utils.training.run_log import draw_run

    draw_run(out)
    with atomic_path(out / f"{name}.pth", fsync=True) as temporary, open(temporary, "wb") as file:
        torch.save(export_state_dict(training.model), file)
    cost = machine.add_costs(training.cost, training.meter.read()) | {"flops": training.flops(0, training.step)}
    described = {"weights_sha256": sha256_file(out / f"{name}.pth"), "cost": machine.rounded_cost(cost)}
    write_json(out / "args.json", read_json(out / "args.json") | described)


def time_steps(training, loader, max_bad_images: int) -> str:
    """Time some real steps and extrapolate. The weights they change are thrown away with the process."""
    import torch

    from utils.training.run_log import duration

    schedule, device = training.schedule, training.device
    durations: list[float] = []
    while training.step < min(TIMED_STEPS, schedule.total_steps):
        started = time.monotonic()
        train_step(training, loader, nullcontext(), max_bad_images)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)  # the clock would be ahead of its kernels
        durations.append(time.monotonic() - started)
        if any_rank(sum(durations) > TIMED_SECONDS, device):  # all leave at the same step
            break
    seconds = statistics.median(durations[1:] or durations)  # the first step also warms up
    whole = seconds * training.flops(0, schedule.total_steps) / training.flops(0, 1)  # later crops may be larger
    return (
        f"probe   {len(durations)} steps, median {seconds:.3f} s = {schedule.batch_size / seconds:.1f} img/s;"
        f" {schedule.total_steps} steps take about {duration(whole)}"
    )


def make_recipe(args: argparse.Namespace) -> dict:
    """The chosen recipe with the command line's changes. UserError for an unknown key or a value that cannot be."""
    options = {key: getattr(args, key) for key in ("arch", "head", "epochs", "batch_size", "batch_per_device", "lr")}
    return changed(RECIPES[args.recipe], {key: value for key, value in options.items() if value is not None}, args.set)


def describe_run(args: argparse.Namespace, name: str, images: Sequence, identity: dict, training) -> dict:
    """RUN/args.json: what evaluate.py needs to rebuild the model, and how the run was made."""
    from utils.training.image_sets import class_names

    recipe, class_ids = training.recipe, images[0].class_ids
    return {
        "arch": recipe["arch"],
        "head": recipe["head"],
        "num_classes": len(class_ids),
        "class_ids": class_ids,
        "class_names": class_names(class_ids, images),
        "recipe": args.recipe,
        "image_size": recipe["val_crop"],
        "resize": recipe["val_resize"],
        "dataset": name,
        "seed": args.seed,
        "values": recipe,
        "plan": vars(training.schedule),
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "command": cli.command_line(),
        "device": str(training.device),
        "dtype": str(training.dtype).removeprefix("torch."),
        "sources": [one.source() for one in images],
        "identity": identity,
        "environment": machine.snapshot(),
        "weights_sha256": "",  # until it is finished: a kill between the weights and their hash leaves it so
    }


if __name__ == "__main__":
    sys.exit(cli.run(main, get_args_parser()))
