"""Train a classifier from scratch on folders of images: synthetic, real, or a weighted mix.

Reads   DATA/train/<class id>/*.jpg of a generated dataset, DATA/<class id>/*.jpg of any other, or DATA/*.tar shards
Writes  RUN/checkpoint.pth (resume), RUN/<dataset>.pth (weights), RUN/args.json, RUN/log.jsonl, RUN/curves.png

The same command continues a run that was stopped or killed, and ends with the same weights; a finished run is left
alone. SIGTERM, SIGUSR1 and SIGUSR2 save a checkpoint within seconds and exit with 128 + the signal's number.

    python train.py --recipe demo --data data/digits --val data/digits/test          # a laptop, 15 seconds
    python train.py --data data/imagenet_100_sd --val data/imagenet_100/val          # one GPU, the paper's recipe
    python -m utils.launch --launcher slurm --nodes 1 --gpus-per-node 4 train.py --data data/imagenet_100_sd

Several --data PATH[:WEIGHT] are mixed in proportion to their weights; all must hold the same classes.
"""

import argparse
import datetime
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from utils.cli import UserError, make_parser, non_negative_int, positive_float, positive_int, run
from utils.environment import snapshot
from utils.storage import AlreadyOwned, owner_lock, read_json, require_writable, write_json

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
    "epochs": 16,
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
PROBE_STEPS, PROBE_SECONDS = 20, 60  # of --dry-run: whichever ends first
CURVES_SECONDS = 300  # between two drawings of curves.png
MOST_WORKERS = 16  # loader processes of a GPU: at some 300 img/s each, more than a GPU trains on


def get_args_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    # Data
    parser.add_argument("--data", action="append", required=True, metavar="PATH[:WEIGHT]", help="repeat to mix")
    parser.add_argument("--val", metavar="DIR", help="real images to validate on each epoch, DIR/<class id>/<images>")
    parser.add_argument("--val-every", type=positive_int, default=1, metavar="EPOCHS", help="and after the last one")
    parser.add_argument("--images-per-class", type=positive_int, metavar="N", help="first N images of each class only")
    parser.add_argument("--max-bad-images", type=non_negative_int, default=0, help="damaged images to skip over")
    # Recipe
    parser.add_argument("--recipe", choices=list(RECIPES), default="paper", help="defaults of all that follows")
    parser.add_argument("--arch", help="any torchvision classification model, or resnet10 (default: the recipe's)")
    parser.add_argument("--head", choices=["cosine", "linear"], help="cosine softmax or plain linear")
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
    with ExitStack() as group:  # the process group, left whatever happens
        return train_from_scratch(args, group)


def train_from_scratch(args: argparse.Namespace, group: ExitStack) -> int:
    # ===== what to do =====
    recipe = make_recipe(args)
    sources = [parse_source(text) for text in args.data]
    name = args.name or "+".join(dataset_name(path) for path, _ in sources)
    out = Path(args.out or f"runs/{name}")
    images = open_sources(sources, args.images_per_class)
    identity = make_identity(recipe, images, [weight for _, weight in sources], args.seed)
    if not args.dry_run and is_finished(out, name, identity):
        print(f"{out}/{name}.pth: finished already; delete {out} to train again")
        return 0
    validation = open_validation(args.val, images[0].class_ids) if args.val else None

    # ===== preparing devices =====
    import torch

    from utils import distributed
    from utils.device import resolve_device
    from utils.model import MultiCrop, build_model, parameter_groups, refuse_sizes, sync_batchnorm
    from utils.stop_signals import StopRequested, StopSignals
    from utils.training import Training

    stop = StopSignals()
    stop.install()
    device = resolve_device(distributed.device_name(args.device))
    dtype, layout = number_format(args, device)
    processes = distributed.ranks()
    plan = make_plan(recipe, sum(map(len, images)), processes.world_size)
    group.enter_context(distributed.process_group(device))

    # ===== creating model =====
    torch.manual_seed(args.seed)
    model = build_model(recipe["arch"], len(images[0].class_ids), recipe["head"])
    refuse_sizes(model, [recipe["global_size"], *([recipe["local_size"]] if recipe["local_count"] else [])])
    model = model.to(device=device, memory_format=layout)
    if processes.world_size > 1:
        model = sync_batchnorm(model, device)
    forward: torch.nn.Module = MultiCrop(model)
    if args.compile:
        forward = torch.compile(forward)
    if processes.world_size > 1:
        ids = [device] if device.type == "cuda" else None
        forward = torch.nn.parallel.DistributedDataParallel(forward, ids)
    groups = parameter_groups(model, recipe["weight_decay"])
    optimizer = torch.optim.SGD(groups, lr=plan.peak_lr, momentum=recipe["momentum"])
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    training = Training(model, forward, optimizer, scaler, device, dtype, recipe, plan, args.seed)
    batches = make_batches(images, [weight for _, weight in sources], recipe, args.seed)
    distributed.print0(describe_plan(args, recipe, training, images, out))
    if args.dry_run:
        distributed.print0(probe(training, batches, args))
        return 0

    # ===== training =====
    with own_run(out):
        for line in training.resume(out, identity):
            distributed.print0(line)
        if distributed.is_main():
            write_json(out / "args.json", describe_run(args, recipe, name, images, identity, training))
        try:
            train(training, batches, validation, stop, out, identity, args)
        except StopRequested:
            training.abandon_step()
            if distributed.is_main():
                training.save(out, identity)
            distributed.print0(f"stopped by a signal at step {training.step}, saved; the same command continues")
            return stop.exit_code
        if distributed.is_main():
            export(training, out, name)
        distributed.print0(f"wrote {out}/{name}.pth")
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
    if recipe["batch_size"] < 1 or recipe["epochs"] < 1 or recipe["global_count"] < 1:
        raise UserError("--set: batch_size, epochs and global_count must be at least 1")
    return recipe


def parse_value(text: str, default):
    """TEXT as the type of DEFAULT: "0.4,1" -> (0.4, 1.0)."""
    if isinstance(default, tuple):
        low, high = (float(part) for part in text.split(","))
        if not 0 < low <= high <= 1:
            raise ValueError
        return (low, high)
    return type(default)(text)


def parse_source(text: str) -> tuple[Path, float]:
    """PATH[:WEIGHT]; a path that exists is never cut at its colon."""
    path, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        value = float(weight)
    except ValueError:
        return Path(text), 1.0
    if not 0 < value < math.inf:
        raise UserError(f"--data {text}: the weight must be above 0")
    return Path(path), value


def dataset_name(path: Path) -> str:
    """The data folder's name; of PATH/train the parent's."""
    path = path.resolve()
    return path.parent.name if path.name in ("train", "shards") else path.name


def open_sources(sources: list[tuple[Path, float]], images_per_class: int | None) -> list:
    """The ImageSets of --data, which must agree on their classes."""
    from utils.image_sets import open_images, require_same_classes

    images = [open_images(path) for path, _ in sources]
    for (path, _), other in zip(sources[1:], images[1:], strict=True):
        require_same_classes(other.class_ids, images[0].class_ids, f"--data {path}", f"--data {sources[0][0]}")
    if images_per_class:
        for one in images:
            one.limit(images_per_class)
    return images


def open_validation(path: str, class_ids: list[str]):
    """Validation images with the labels of the training classes; folders of other classes are refused."""
    from utils.image_sets import FolderImages

    images = FolderImages(Path(path), "--val")
    unknown = sorted(set(images.class_ids) - set(class_ids))
    if unknown:
        raise UserError(f"--val {path}: {len(unknown)} class folders the training data lacks, e.g. {unknown[0]}")
    images.relabel(class_ids)
    return images


def make_identity(recipe: dict, images: list, weights: list[float], seed: int) -> dict:
    """What the final weights depend on, in plain types: a checkpoint is continued only by the same."""
    identity = {key: list(value) if isinstance(value, tuple) else value for key, value in recipe.items()}
    # How a batch is spread over devices may change when a run is resumed; see "batch norm" in docs/training.md.
    del identity["batch_per_device"]
    return identity | {"seed": seed, "weights": weights, "data": [one.fingerprint() for one in images]}


def is_finished(out: Path, name: str, identity: dict) -> bool:
    """Whether OUT holds the exported weights of this very run."""
    if not (out / f"{name}.pth").exists() or not (out / "args.json").exists():
        return False
    return read_json(out / "args.json").get("identity") == identity


def number_format(args: argparse.Namespace, device) -> tuple:
    """(dtype of the forward pass, memory format of the weights)."""
    import torch

    from utils.device import memory_format, resolve_dtype

    dtype = resolve_dtype(args.dtype, device)
    if args.channels_last is None:
        return dtype, memory_format(device, dtype)
    return dtype, torch.channels_last if args.channels_last else torch.contiguous_format


def make_plan(recipe: dict, images: int, world: int):
    """Steps and learning rates; the batch is cut into equal micro-batches of at most batch_per_device images."""
    from utils.schedule import scaled_lr
    from utils.training import Plan

    batch = recipe["batch_size"]
    if images < batch:
        raise UserError(f"--batch-size {batch}: only {images} images; choose at most {images}")
    micro = math.ceil(batch / (world * recipe["batch_per_device"]))
    while batch % (micro * world) and micro * world < batch:
        micro += 1
    if batch % (micro * world):
        raise UserError(f"--batch-size {batch} cannot be shared by {world} processes; use a multiple of {world}")
    steps = images // batch
    return Plan(
        images=images,
        batch_size=batch,
        micro_batches=micro,
        world=world,
        steps_per_epoch=steps,
        epochs=recipe["epochs"],
        warmup_steps=recipe["warmup_epochs"] * steps,
        peak_lr=scaled_lr(recipe["lr"], batch),
        final_lr=recipe["final_lr"],
    )


def make_batches(images: list, weights: list[float], recipe: dict, seed: int):
    from utils.loader import CropBatches, CropSpec

    how = recipe["interpolation"]
    crops = [CropSpec(recipe["global_size"], recipe["global_count"], recipe["global_scale"], how)]
    if recipe["local_count"]:
        crops.append(CropSpec(recipe["local_size"], recipe["local_count"], recipe["local_scale"], how))
    return CropBatches(images, weights, crops, seed)


def describe_plan(args: argparse.Namespace, recipe: dict, training, images: list, out: Path) -> str:
    """Everything derived, once, before the first step."""
    plan = training.plan
    parameters = sum(parameter.numel() for parameter in training.model.parameters())
    sources = ", ".join(f"{one.root} ({len(one)})" for one in images)
    lines = [
        f"data       {plan.images} images, {len(images[0].class_ids)} classes: {sources}",
        f"model      {recipe['arch']}, {recipe['head']} head, {parameters / 1e6:.2f} M parameters, seed {args.seed}",
        f"device     {training.device} x {plan.world}, forward in {str(training.dtype).removeprefix('torch.')}",
        f"batch      {plan.batch_size} = {plan.world} processes x {plan.micro_batches} micro-batches"
        f" x {plan.micro_batch_size}",
        f"steps      {plan.epochs} epochs x {plan.steps_per_epoch} = {plan.total_steps}",
        f"lr         peak {plan.peak_lr:g} = {recipe['lr']:g} x {plan.batch_size} / 256,"
        f" {plan.warmup_steps} steps warm-up, then cosine to {plan.final_lr:g}",
        f"recipe     {args.recipe}: {json.dumps(recipe)}",
        f"run        {out}, git {snapshot()['git_commit']}",
    ]
    return "\n".join(lines)


def describe_run(args: argparse.Namespace, recipe: dict, name: str, images: list, identity: dict, training) -> dict:
    """RUN/args.json: what evaluate.py needs to rebuild the model, and how the run was made."""
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
        "images": training.plan.images,
        "seed": args.seed,
        "values": recipe,
        "plan": vars(training.plan),
        "command": sys.argv,
        "options": {key: value for key, value in vars(args).items()},
        "device": str(training.device),
        "dtype": str(training.dtype).removeprefix("torch."),
        "identity": identity,
        "environment": snapshot(),
    }


def class_names(class_ids: list[str], images: list) -> list[str]:
    """Names from dataset.json beside the images, else from ImageNet's and the digits' tables, else the ids."""
    from utils.prompts import load_classes

    names = {row.wnid: row.first_name for table in ("imagenet_1k", "digits") for row in load_classes(table).rows}
    for one in images:
        described = one.root.parent / "dataset.json"
        if described.exists():
            rows = read_json(described).get("classes", [])
            names |= {row["id"]: row["name"].split(",")[0].strip() for row in rows}
    return [names.get(class_id, class_id) for class_id in class_ids]


@contextmanager
def own_run(out: Path) -> Iterator[None]:
    """Rank 0 owns the run folder: two commands into one --out would overwrite each other's checkpoints."""
    from utils import distributed
    from utils.checkpoint import remove_leftovers

    if not distributed.is_main():
        yield
        return
    require_writable(out, "--out")
    try:
        with owner_lock(out / ".lock"):
            remove_leftovers(out)
            yield
    except AlreadyOwned:
        raise UserError(
            f"--out {out}: another process is training there; wait for it or choose another folder"
        ) from None


def train(training, batches, validation, stop, out: Path, identity: dict, args: argparse.Namespace) -> None:
    """The loop: from training.step to the end, with log lines, validation and checkpoints on the way."""
    from utils import distributed
    from utils.loader import make_loader, requests
    from utils.run_log import RunLog, draw_curves
    from utils.stop_signals import StopRequested

    plan, processes = training.plan, distributed.ranks()
    log = RunLog(out, training.step, tensorboard=not args.no_tensorboard) if processes.is_main else None
    steps = range(training.step, plan.total_steps)
    wanted = requests(steps, plan.steps_per_epoch, plan.batch_size, plan.micro_batches, processes.rank, plan.world)
    loader = make_loader(batches, wanted, worker_count(args, training.device), training.device.type == "cuda")
    if training.step and training.epoch_line_due():  # stopped while validating
        log_epoch(training, validation, log, args)
    clock = Clock()
    saved_at = time.monotonic()
    for _ in steps:
        with stop.interruptible():
            training.begin()
            for micro in range(plan.micro_batches):
                with clock.waiting():
                    batch = next(loader)
                note_bad_images(training, batch["bad"], args.max_bad_images)
                training.accumulate(batch, last=micro == plan.micro_batches - 1)
        training.update()
        clock.step()
        end_of_epoch = training.step % plan.steps_per_epoch == 0
        if training.step % args.log_every == 0 or end_of_epoch:
            log_interval(training, clock, log)
        if end_of_epoch:
            with stop.interruptible():
                log_epoch(training, validation, log, args)
        stopping = stop.received is not None
        if processes.is_main and (
            stopping or end_of_epoch or time.monotonic() - saved_at > 60 * args.checkpoint_minutes
        ):
            training.save(out, identity)
            saved_at = time.monotonic()
        if processes.is_main and end_of_epoch and clock.curves_due():
            draw_curves(out)
        if stopping and training.step < plan.total_steps:
            raise StopRequested


class Clock:
    """Where the time of an interval went."""

    def __init__(self) -> None:
        self.started = self.interval_started = time.monotonic()
        self.steps = self.interval_steps = 0  # since the start of this process; since the last log line
        self.waited = 0.0  # seconds of the interval spent waiting for the loader
        self._curves_at = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.waited += time.monotonic() - start

    def step(self) -> None:
        self.steps += 1
        self.interval_steps += 1

    def interval(self) -> tuple[float, int, float]:
        """(seconds, steps, share of the seconds spent waiting for data) since the last call."""
        now = time.monotonic()
        seconds, steps, waited = now - self.interval_started, self.interval_steps, self.waited
        self.interval_started, self.interval_steps, self.waited = now, 0, 0.0
        return seconds, steps, waited / max(seconds, 1e-9)

    def eta(self, steps_left: int) -> float:
        return steps_left * (time.monotonic() - self.started) / max(1, self.steps)

    def curves_due(self) -> bool:
        """At most once in CURVES_SECONDS: drawing takes a second, an epoch of a small run less."""
        if time.monotonic() - max(self._curves_at, self.started) < CURVES_SECONDS:
            return False
        self._curves_at = time.monotonic()
        return True


def note_bad_images(training, found: list[str], allowed: int) -> None:
    """Remember damaged images by name; more than ALLOWED stop the run with the list."""
    for message in found:
        if message not in training.bad_images:
            training.bad_images.append(message)
            print(
                f"damaged image {len(training.bad_images)}, its neighbour takes its place: {message}", file=sys.stderr
            )
    if len(training.bad_images) > allowed:
        listed = "; ".join(training.bad_images)
        raise UserError(
            f"--max-bad-images {allowed}: {len(training.bad_images)} damaged images: {listed}; "
            "repair or delete them, or allow more"
        )


def log_interval(training, clock: Clock, log) -> None:
    """One line for people and one for machines about the steps since the last ones."""
    from utils import distributed

    totals = training.flush_interval()
    seconds, steps, waited = clock.interval()
    if log is None:
        return
    plan, step = training.plan, training.step
    eta = clock.eta(plan.total_steps - step)
    values = {
        "epoch": (step - 1) // plan.steps_per_epoch,
        "loss": totals.mean_loss,
        "top1": totals.top1,
        "lr": plan.lr(step - 1),
        "images_per_s": steps * plan.batch_size / seconds,
        "data_wait": waited,
        "eta_s": round(eta),
        "memory_mb": memory_mb(training.device),
        "bad_images": len(training.bad_images),
    }
    log.write("train", step, **values)
    distributed.print0(
        f"epoch {values['epoch'] + 1}/{plan.epochs} step {step}/{plan.total_steps} loss {values['loss']:.4f} "
        f"top-1 {values['top1']:.1f} lr {values['lr']:.3g} {values['images_per_s']:.1f} img/s "
        f"data wait {100 * waited:.1f}% memory {values['memory_mb']} MB eta {duration(eta)}"
    )


def log_epoch(training, validation, log, args: argparse.Namespace) -> None:
    """Means over the epoch and, if asked for, accuracy on the validation images."""
    from utils import distributed

    epoch = training.step // training.plan.steps_per_epoch
    due = validation is not None and (epoch % args.val_every == 0 or epoch == training.plan.epochs)
    scores = validate_all(training, validation, args) if due else {}
    if log is not None:
        log.write(
            "epoch", training.step, epoch=epoch, loss=training.epoch.mean_loss, top1=training.epoch.top1, **scores
        )
    if scores:
        distributed.print0(
            f"epoch {epoch}: validation top-1 {scores['val_top1']:.2f} top-5 {scores['val_top5']:.2f} "
            f"of {scores['val_n']} images"
        )
    training.epoch = type(training.epoch)()


def validate_all(training, validation, args: argparse.Namespace) -> dict:
    """Top-1 and top-5 in percent; every image is counted once, whatever the number of processes."""
    import torch

    from utils import distributed
    from utils.loader import EvalImages
    from utils.training import validate

    values = training.recipe
    dataset = EvalImages(validation, values["val_resize"], values["val_crop"])
    processes = distributed.ranks()
    mine = range(processes.rank, len(dataset), processes.world_size)  # no padding: shares may differ by one
    loader = torch.utils.data.DataLoader(
        torch.utils.data.Subset(dataset, mine), batch_size=256, num_workers=worker_count(args, training.device)
    )
    counts = validate(training.model, loader, training.device, training.dtype)
    total = distributed.sum_counts(counts, training.device)
    if total["n"] != len(dataset):
        raise RuntimeError(f"validation saw {total['n']:.0f} images of {len(dataset)}")
    return {f"val_{name}": 100 * total[name] / total["n"] for name in ("top1", "top5")} | {"val_n": int(total["n"])}


def export(training, out: Path, name: str) -> None:
    """RUN/<name>.pth for torchvision, evaluate.py and anyone; its existence marks the run as finished."""
    import torch

    from utils.model import export_state_dict
    from utils.run_log import draw_curves
    from utils.storage import atomic_path

    draw_curves(out)
    with atomic_path(out / f"{name}.pth", fsync=True) as temporary:
        torch.save(export_state_dict(training.model), temporary)


def probe(training, batches, args: argparse.Namespace) -> str:
    """Time some real steps and extrapolate. The weights they change are thrown away with the process."""
    from utils.loader import make_loader, requests

    plan = training.plan
    steps = range(min(PROBE_STEPS, plan.total_steps))
    wanted = requests(steps, plan.steps_per_epoch, plan.batch_size, plan.micro_batches, 0, plan.world)
    loader = make_loader(batches, wanted, worker_count(args, training.device), training.device.type == "cuda")
    started, done = time.monotonic(), 0
    training.begin()
    for micro, batch in enumerate(loader):
        if micro % plan.micro_batches == 0:
            training.begin()
        last = (micro + 1) % plan.micro_batches == 0
        training.accumulate(batch, last)
        if last:
            training.update()
        if micro == 0:
            started = time.monotonic()  # the first one also warms up
        else:
            done += 1
        if time.monotonic() - started > PROBE_SECONDS:
            break
    if not done:
        return "probe      too few steps to time"
    seconds = (time.monotonic() - started) / done
    total = seconds * plan.micro_batches * plan.total_steps
    return (
        f"probe      {done} micro-batches of {plan.micro_batch_size}: {plan.micro_batch_size / seconds:.1f} img/s a process; "
        f"the whole run about {duration(total)}"
    )


def worker_count(args: argparse.Namespace, device) -> int:
    """Loader processes: asked for, or this process's share of the cores; on the CPU one, the model needs the rest."""
    from utils import distributed

    if args.workers is not None:
        return args.workers
    if device.type == "cpu":
        return 1
    local = distributed.ranks().local_world_size
    return max(1, min(MOST_WORKERS, len(os.sched_getaffinity(0)) // local - 1))


def memory_mb(device) -> int:
    """Peak memory: of the GPU, else of this process."""
    import resource

    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024  # kilobytes on Linux


def duration(seconds: float) -> str:
    """3 -> "0:00:03"; days before the hours."""
    return str(datetime.timedelta(seconds=round(seconds)))


if __name__ == "__main__":
    sys.exit(run(main, get_args_parser()))
