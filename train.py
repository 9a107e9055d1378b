"""Train a classifier from scratch on folders of images: synthetic, real, or a weighted mix.

Reads   DATA/train/<class id>/*.jpg of a generated dataset, DATA/<class id>/*.jpg of any other, or DATA/*.tar shards
Writes  RUN/checkpoint.pth (resume), RUN/<dataset>.pth (weights), RUN/args.json, RUN/log.jsonl, RUN/curves.png

The same command continues a run that was stopped or killed, and ends with the same weights; a finished run is left
alone. SIGTERM, SIGUSR1 and SIGUSR2 save a checkpoint within seconds and exit with 128 + the signal's number.

    python train.py --recipe demo --data data/digits --val data/digits/test          # a laptop, 15 seconds
    python train.py --data data/imagenet_100_sd --val data/imagenet_100/val          # one GPU, the paper's recipe
    python train.py --data /datasets/imagenet/train --classes imagenet_100 --val /datasets/imagenet/val
    python -m utils.launch --launcher slurm --nodes 1 --gpus-per-node 4 train.py --data data/imagenet_100_sd

Several --data PATH[:WEIGHT] are mixed in proportion to their weights; all must hold the same classes.
"""

import argparse
import datetime
import math
import os
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from utils.cli import (
    Launch,
    UserError,
    command_line,
    data_and_weight,
    make_parser,
    non_negative_int,
    positive_float,
    positive_int,
    run,
)
from utils.machine import snapshot
from utils.storage import atomic_path, read_json, write_json
from utils.training.distributed import take_own_cores

# Every key of a recipe is read; --set changes any of them. Where no source is named: "t-ReX" is the default of the
# paper authors' public trainer of the same line of work (t-ReX, ICLR 2023).
PAPER = {
    "arch": "resnet50",  # Sec. 4
    "head": "cosine",  # t-ReX: cosine softmax, temperature 0.1, no bias
    "epochs": 100,  # t-ReX
    "batch_size": 256,  # t-ReX: 4 GPUs x 64
    "batch_per_device": 64,  # t-ReX; with fewer devices gradients are accumulated up to batch_size
    "lr": 0.1,  # t-ReX, for a batch of 256; scaled by batch_size / 256
    "final_lr": 1e-6,  # t-ReX
    "warmup_epochs": 10,  # t-ReX
    "momentum": 0.9,  # t-ReX
    "weight_decay": 1e-4,  # t-ReX; not on biases and norms
    "interpolation": "bicubic",  # t-ReX
    "global_size": 224,  # t-ReX
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
    "val_resize": 256,  # t-ReX
    "val_crop": 224,  # t-ReX
}
# One crop, cross-entropy with bias: torchvision's reference recipe for ResNets (references/classification).
BASIC = PAPER | {
    "head": "linear",
    "epochs": 90,  # torchvision
    "final_lr": 0.0,  # not in torchvision, which steps by 0.1 every 30 epochs: our choice
    "warmup_epochs": 5,  # Goyal et al., 2017
    "interpolation": "bilinear",  # torchvision
    "global_scale": (0.08, 1.0),  # torchvision
    "local_count": 0,
    "jitter": 0.0,
    "grayscale": 0.0,
    "global_blur": 0.0,
    "global_solarize": 0.0,
}
# 32-pixel handwritten digits in seconds on two CPU cores. Not in paper: our choice throughout.
DEMO = BASIC | {
    "arch": "resnet10",
    "head": "cosine",
    "epochs": 12,
    "batch_size": 64,
    "lr": 0.4,
    "final_lr": 1e-3,
    "warmup_epochs": 2,
    "weight_decay": 5e-4,
    "global_size": 32,
    "global_scale": (0.6, 1.0),
    "flip": 0.0,  # a mirrored digit is another sign
    "val_resize": 32,
    "val_crop": 32,
}
RECIPES = {"paper": PAPER, "basic": BASIC, "demo": DEMO}
CHOICES = {"head": ("cosine", "linear"), "interpolation": ("bicubic", "bilinear")}
LIMITS = {  # lowest and highest value; of other numbers 0 and any
    **dict.fromkeys(("epochs", "batch_size", "batch_per_device", "global_size", "global_count"), (1, math.inf)),
    **dict.fromkeys(("local_size", "val_resize", "val_crop"), (1, math.inf)),
    **dict.fromkeys(("momentum", "flip", "jitter", "grayscale", "global_blur", "local_blur"), (0, 1)),
    **dict.fromkeys(("global_solarize", "local_solarize"), (0, 1)),
    "hue": (0, 0.5),  # of a turn
}
PROBE_STEPS, PROBE_SECONDS = 20, 60  # of --dry-run: whichever ends first
LAUNCH = Launch("train", "ranks")
CURVES_SECONDS = 300  # at least, between two drawings of curves.png


def get_args_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    # Data
    parser.add_argument("--data", action="append", required=True, metavar="PATH[:WEIGHT]", help="repeat to mix")
    parser.add_argument("--classes", metavar="SPEC", help="use these class folders only; SPEC as in generate.py --help")
    parser.add_argument("--val", metavar="DIR", help="real images to validate on each epoch, DIR/<class id>/<images>")
    parser.add_argument("--val-every", type=positive_int, default=1, metavar="EPOCHS", help="and after the last one")
    parser.add_argument("--images-per-class", type=positive_int, metavar="N", help="first N images of each class only")
    parser.add_argument("--max-bad-images", type=non_negative_int, default=0, help="damaged images to skip over")
    # Recipe
    parser.add_argument("--recipe", choices=list(RECIPES), default="paper", help="defaults of all that follows")
    parser.add_argument("--arch", help="any torchvision classification model, or resnet10 (default: the recipe's)")
    parser.add_argument("--head", choices=CHOICES["head"], help="cosine softmax or plain linear")
    parser.add_argument("--epochs", type=positive_int, help="passes over the data")
    parser.add_argument("--batch-size", type=positive_int, help="images of an optimizer step, over all devices")
    parser.add_argument("--batch-per-device", type=positive_int, help="images at a time on a device")
    parser.add_argument("--lr", type=positive_float, help="peak learning rate for a batch of 256; scaled linearly")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any other value of the recipe")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="of weights, data order and augmentations")
    # Device
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--dtype", default="auto", choices=["auto", "fp16", "bf16", "fp32"], help="of the forward pass")
    parser.add_argument("--workers", type=non_negative_int, help="loader processes per device (default: by the cores)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model: minutes first, then faster")
    parser.add_argument("--channels-last", action=argparse.BooleanOptionalAction, help="default: where it pays")
    # Output
    parser.add_argument("--out", metavar="RUN", help="run folder (default: runs/<dataset>)")
    parser.add_argument("--name", help="name of the exported weights (default: the data folder's; a mix: joined by +)")
    parser.add_argument("--checkpoint-minutes", type=positive_float, default=15, help="also saved after each epoch")
    parser.add_argument("--log-every", type=positive_int, default=50, metavar="STEPS", help="steps between log lines")
    parser.add_argument("--no-tensorboard", action="store_true", help="write no event files")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and a time estimate; write nothing")
    return parser


def main(args: argparse.Namespace) -> int:
    # Idle threads sleep instead of spinning: on a busy machine a step is then ten times faster. Read when torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    take_own_cores()
    with ExitStack() as closing:  # the process group and the run folder's lock, given back whatever happens
        return train_from_scratch(args, closing)


def train_from_scratch(args: argparse.Namespace, closing: ExitStack) -> int:
    from utils.training.image_sets import open_sources, open_validation

    # ===== what to do =====
    recipe = make_recipe(args)
    paths, weights = zip(*map(data_and_weight, args.data), strict=True)
    name = args.name or "+".join(dataset_name(path) for path in paths)
    out = Path(args.out or f"runs/{name}")
    images = open_sources(paths, args.images_per_class, args.classes)
    identity = make_identity(recipe, images, weights, args.seed)
    if not args.dry_run and is_finished(out, name, identity):
        print(f"{out}/{name}.pth: finished already; delete {out} to train again")
        return 0
    validation = open_validation(args.val, images[0].class_ids) if args.val else None

    # ===== preparing devices =====
    import torch

    from utils.machine import memory_format, resolve_device, resolve_dtype
    from utils.model import MultiCrop, build_model, compiled, parameter_groups, refuse_sizes, sync_batchnorm
    from utils.training import distributed
    from utils.training.checkpoint import own_run
    from utils.training.step import Training, make_plan
    from utils.training.stop_signals import StopRequested, StopSignals

    device = resolve_device(distributed.device_name(args.device))
    dtype = resolve_dtype(args.dtype, device)
    # ResNet50's step on a CPU is 1.13 times as fast with channels_last in fp32 too (row train_step_vs_fp32).
    automatic = torch.channels_last if device.type == "cpu" else memory_format(device, dtype)
    layout = {None: automatic, True: torch.channels_last, False: torch.contiguous_format}
    processes = closing.enter_context(distributed.process_group(device))
    plan = make_plan(recipe, sum(map(len, images)), processes.world_size)

    # ===== creating model =====
    torch.manual_seed(args.seed)
    model = build_model(recipe["arch"], len(images[0].class_ids), recipe["head"])
    refuse_sizes(
        model, [recipe["global_size"], recipe["local_size"]] if recipe["local_count"] else [recipe["global_size"]]
    )
    model = model.to(device=device, memory_format=layout[args.channels_last])
    if processes.world_size > 1:
        model = sync_batchnorm(model, device)
    forward: torch.nn.Module = MultiCrop(model)
    if args.compile:
        forward = compiled(forward)
    if processes.world_size > 1:
        forward = torch.nn.parallel.DistributedDataParallel(forward, [device] if device.type == "cuda" else None)
    groups = parameter_groups(model, recipe["weight_decay"])
    optimizer = torch.optim.SGD(groups, lr=plan.peak_lr, momentum=recipe["momentum"])
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    training = Training(model, forward, optimizer, scaler, device, dtype, recipe, plan, args.seed)
    batches = make_batches(images, weights, recipe, args.seed)
    distributed.print0(describe_plan(args, recipe, training, images, out))
    if args.dry_run:
        distributed.print0(probe(training, batches, args))
        return 0

    # ===== training =====
    stop = StopSignals(alone=processes.world_size == 1)
    stop.install()  # not sooner: until now a signal may end the process, there is nothing to save
    if processes.is_main:
        closing.enter_context(own_run(out))
    for line in training.resume(out, identity):
        distributed.print0(line)
    training.require_same_step(out)
    if processes.is_main:
        (out / f"{name}.pth").unlink(missing_ok=True)  # of an earlier run: args.json would take it for this one's
        write_json(out / "args.json", describe_run(args, recipe, name, images, identity, training))
    steps = range(training.step, plan.total_steps)
    loader = closing.enter_context(open_loader(training, batches, steps, args))  # closed last: saving comes first
    try:
        train(training, loader, validation, stop, out, identity, args)
    except StopRequested:
        training.abandon_step()
        if processes.is_main:
            training.save(out, identity)
        distributed.barrier()  # launchers that see one process leave soon kill the others
        distributed.print0(f"stopped by a signal; step {training.step} is saved, the same command continues from there")
        return stop.exit_code

    # ===== exporting =====
    if processes.is_main:
        export(training, out, name)
        print(f"wrote {out}/{name}.pth", flush=True)
    return 0


def make_recipe(args: argparse.Namespace) -> dict:
    """The chosen recipe with the command line's changes; unknown keys and values of another type are refused."""
    recipe = dict(RECIPES[args.recipe])
    for key in ("arch", "head", "epochs", "batch_size", "batch_per_device", "lr"):
        if getattr(args, key) is not None:
            recipe[key] = getattr(args, key)
    for text in args.set:
        key, _, value = text.partition("=")
        if key not in recipe:
            raise UserError(f"--set {text}: unknown key {key!r}; the recipe has {', '.join(recipe)}")
        try:
            recipe[key] = parse_value(value, recipe[key])
        except ValueError:
            raise UserError(f"--set {text}: {value!r} is no value for {key}, which is {recipe[key]!r}") from None
    for key, value in recipe.items():
        if key in CHOICES and value not in CHOICES[key]:
            raise UserError(f"--set {key}={value}: choose {' or '.join(CHOICES[key])}")
        low, high = LIMITS.get(key, (0, math.inf))
        if isinstance(value, int | float) and not (low <= value <= high and value < math.inf):
            most = f" and at most {high}" if high < math.inf else ""
            raise UserError(f"--set {key}={value}: must be a number, at least {low}{most}")
    return recipe


def parse_value(text: str, default):
    """TEXT as the type of DEFAULT: "0.4,1" -> (0.4, 1.0)."""
    if isinstance(default, tuple):
        low, high = (float(part) for part in text.split(","))
        if not 0 < low <= high <= 1:
            raise ValueError
        return (low, high)
    return type(default)(text)


def dataset_name(path: Path) -> str:
    """The data folder's name; of PATH/train the parent's."""
    path = path.resolve()
    return path.parent.name if path.name in ("train", "shards") else path.name


def make_identity(recipe: dict, images: Sequence, weights: Sequence[float], seed: int) -> dict:
    """What the final weights depend on, in plain types: a checkpoint is continued only by the same."""
    identity = {key: list(value) if isinstance(value, tuple) else value for key, value in recipe.items()}
    # How a step is spread over devices may change between stop and resume: only batch norm's batches feel it.
    del identity["batch_per_device"]
    return identity | {
        "seed": seed,
        "weights": list(weights),
        "data": [f"{len(one)} images {one.fingerprint()[:16]}" for one in images],
    }


def is_finished(out: Path, name: str, identity: dict) -> bool:
    """Whether OUT holds the exported weights of this very run."""
    if not (out / f"{name}.pth").exists() or not (out / "args.json").exists():
        return False
    described = read_json(out / "args.json")
    return (described.get("dataset"), described.get("identity")) == (name, identity)


def make_batches(images: Sequence, weights: Sequence[float], recipe: dict, seed: int):
    from utils.training.loader import CropBatches, CropSpec

    how = recipe["interpolation"]
    crops = [CropSpec(recipe["global_size"], recipe["global_count"], recipe["global_scale"], how)]
    if recipe["local_count"]:
        crops.append(CropSpec(recipe["local_size"], recipe["local_count"], recipe["local_scale"], how))
    return CropBatches(images, weights, crops, seed)


def open_loader(training, batches, steps: range, args: argparse.Namespace):
    """Context manager: the micro-batches of this process for optimizer steps STEPS, prepared ahead by workers."""
    from utils.training.distributed import ranks
    from utils.training.loader import make_loader, requests, worker_count

    plan = training.plan
    wanted = requests(steps, plan.steps_per_epoch, plan.batch_size, plan.micro_batches, ranks().rank, plan.world)
    on_cuda = training.device.type == "cuda"
    return make_loader(batches, wanted, worker_count(args.workers, training.device), pin=on_cuda)


def describe_plan(args: argparse.Namespace, recipe: dict, training, images: Sequence, out: Path) -> str:
    """Everything derived, once, before the first step."""
    plan = training.plan
    parameters = sum(parameter.numel() for parameter in training.model.parameters())
    sources = ", ".join(f"{one.root} ({len(one)})" for one in images)
    return "\n".join(
        [
            f"data    {plan.images} images, {len(images[0].class_ids)} classes: {sources}",
            f"model   {recipe['arch']}, {recipe['head']} head, {parameters / 1e6:.2f} M parameters, seed {args.seed}",
            f"device  {training.device} x {plan.world}, forward in {str(training.dtype).removeprefix('torch.')}",
            f"batch   {plan.batch_size} images = {plan.world} process{'es' if plan.world > 1 else ''}"
            f" x {plan.micro_batches} micro-batch{'es' if plan.micro_batches > 1 else ''} x {plan.micro_batch_size}",
            f"steps   {plan.total_steps} = {plan.epochs} epochs x {plan.steps_per_epoch}",
            f"lr      peak {plan.peak_lr:g} = {recipe['lr']:g} x {plan.batch_size} / 256; {plan.warmup_steps} steps"
            f" of warm-up, then cosine to {plan.final_lr:g}",
            f"recipe  {args.recipe}: {', '.join(f'{key}={as_text(value)}' for key, value in recipe.items())}",
            f"run     {out}; source {snapshot()['git_commit']}",
        ]
    )


def describe_run(args: argparse.Namespace, recipe: dict, name: str, images: Sequence, identity: dict, training) -> dict:
    """RUN/args.json: what evaluate.py needs to rebuild the model, and how the run was made."""
    from utils.training.image_sets import class_names

    class_ids = images[0].class_ids
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
        "plan": vars(training.plan),
        "options": vars(args),
        "command": command_line(),
        "device": str(training.device),
        "dtype": str(training.dtype).removeprefix("torch."),
        "identity": identity,
        "environment": snapshot(),
    }


def train(training, loader, validation, stop, out: Path, identity: dict, args: argparse.Namespace) -> None:
    """The loop: from training.step to the end, with log lines, validation and checkpoints on the way."""
    from utils.training.distributed import any_rank, is_main
    from utils.training.run_log import Clock, RunLog, draw_run

    plan = training.plan
    log = RunLog(out, training.step, tensorboard=not args.no_tensorboard) if is_main() else None
    if training.epoch_line_due():
        if any_rank(log is not None and not log.has_epoch(training.step), training.device):  # stopped while validating
            finish_epoch(training, validation, log, stop, args)
        training.start_epoch()
    clock = Clock(training.step)
    saved_at = drawn_at = time.monotonic()
    while training.step < plan.total_steps:
        with stop.interruptible():
            training.begin()
            for micro in range(plan.micro_batches):
                with clock.waiting():
                    batch = next(loader)
                training.note_bad_images(batch["bad"], args.max_bad_images)
                training.accumulate(batch, last=micro == plan.micro_batches - 1)
        training.update()
        epoch_ended = training.step % plan.steps_per_epoch == 0
        if training.step % args.log_every == 0 or epoch_ended:
            totals = training.flush_interval()
            if log:
                log.interval(training, totals, clock)
        stop.check(training.device)
        if is_main() and (epoch_ended or time.monotonic() - saved_at > 60 * args.checkpoint_minutes):
            training.save(out, identity)  # before validation, which takes long and may stop at a damaged image
            saved_at = time.monotonic()
        if epoch_ended:
            finish_epoch(training, validation, log, stop, args)
            training.start_epoch()
        if is_main() and epoch_ended and time.monotonic() - drawn_at > CURVES_SECONDS:
            draw_run(out)
            drawn_at = time.monotonic()


def finish_epoch(training, validation, log, stop, args: argparse.Namespace) -> None:
    """Validate if it is due, and write the epoch's line."""
    from utils.training.loader import worker_count
    from utils.training.step import validate

    epoch = training.step // training.plan.steps_per_epoch
    due = validation is not None and (epoch % args.val_every == 0 or epoch == training.plan.epochs)
    scores: dict = {}
    if due:
        with stop.interruptible():
            scores = validate(training, validation, worker_count(args.workers, training.device), stop)
    if log:
        log.epoch(training, epoch, scores)


def export(training, out: Path, name: str) -> None:
    """RUN/<name>.pth for torchvision, evaluate.py and anyone; its existence marks the run as finished."""
    from utils.model import export_state_dict
    from utils.training.checkpoint import write_tensors
    from utils.training.run_log import draw_run

    draw_run(out)
    with atomic_path(out / f"{name}.pth", fsync=True) as temporary:
        write_tensors(temporary, export_state_dict(training.model))


def probe(training, batches, args: argparse.Namespace) -> str:
    """Time some real steps and extrapolate. The weights they change are thrown away with the process."""
    import torch

    from utils.training.distributed import any_rank

    plan, device = training.plan, training.device
    steps = range(min(PROBE_STEPS, plan.total_steps))
    durations: list[float] = []
    with open_loader(training, batches, steps, args) as loader:
        for _ in steps:
            started = time.monotonic()
            training.begin()
            for micro in range(plan.micro_batches):
                training.accumulate(next(loader), last=micro == plan.micro_batches - 1)
            training.update()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)  # the clock would be ahead of its kernels
            durations.append(time.monotonic() - started)
            if any_rank(sum(durations) > PROBE_SECONDS, device):  # all leave at the same step
                break
    seconds = statistics.median(durations[1:] or durations)  # the first step also warms up
    return (
        f"probe   {len(durations)} steps, median {seconds:.3f} s = {plan.batch_size / seconds:.1f} img/s;"
        f" {plan.total_steps} steps take about {duration(seconds * plan.total_steps)}"
    )


def as_text(value) -> str:
    """(0.25, 1.0) -> "0.25,1.0", as --set reads it."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


if __name__ == "__main__":
    sys.exit(run(main, get_args_parser()))
