"""One optimizer step, its state, and how that state is saved: everything a resumed run needs and nothing else.

Weights change only inside `Training.update`; until then a step can be abandoned and leaves no trace. Randomness comes
from counters (utils/training/random_numbers.py), so the state holds no generator.
"""

from __future__ import annotations

import math
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from utils.cli import UserError
from utils.images import normalize
from utils.metrics import topk_correct
from utils.training import checkpoint
from utils.training.augment import AugmentSpec, augment, draw
from utils.training.distributed import ranks, sum_counts
from utils.training.image_sets import ImageSet
from utils.training.loader import EvalBatches, make_loader
from utils.training.random_numbers import uniforms
from utils.training.schedule import learning_rate, scaled_lr
from utils.training.stop_signals import StopSignals

VAL_BATCH = 256  # images of a forward pass


@dataclass(frozen=True)
class Plan:
    """What follows from the recipe, the number of images and the number of processes."""

    images: int
    batch_size: int  # images of an optimizer step, over all processes
    micro_batches: int  # of a step, on each process
    world: int
    steps_per_epoch: int
    epochs: int
    warmup_steps: int
    peak_lr: float
    final_lr: float

    @property
    def total_steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def micro_batch_size(self) -> int:
        return self.batch_size // (self.micro_batches * self.world)

    def lr(self, step: int) -> float:
        return learning_rate(step, self.total_steps, self.warmup_steps, self.peak_lr, self.final_lr)


def make_plan(recipe: dict, images: int, world: int) -> Plan:
    """Steps and learning rates; the batch is cut into equal micro-batches of at most batch_per_device images."""
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


@dataclass
class Totals:
    """Sums over images; a mean is taken once, when it is shown."""

    loss: float = 0.0
    correct: int = 0
    seen: int = 0

    def add(self, other: Totals) -> None:
        self.loss += other.loss
        self.correct += other.correct
        self.seen += other.seen

    def as_list(self) -> list[float]:
        return [self.loss, self.correct, self.seen]

    @property
    def mean_loss(self) -> float:
        return self.loss / max(1, self.seen)

    @property
    def top1(self) -> float:
        return 100 * self.correct / max(1, self.seen)


@dataclass
class Training:
    """The state of a run and the step that advances it."""

    model: nn.Module
    forward: nn.Module  # the model over several crop sizes, compiled and wrapped for DDP as asked
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    device: torch.device
    dtype: torch.dtype
    recipe: dict
    plan: Plan
    seed: int
    step: int = 0  # optimizer steps done
    interval: Totals = field(default_factory=Totals)  # of this process, since the last log line
    epoch: Totals = field(default_factory=Totals)  # of all processes, up to the last log line
    bad_images: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        # Batch norm's running statistics: the only state that a forward pass changes.
        self._buffers = [buffer for _, buffer in self.model.named_buffers()]
        self._buffers_before = [buffer.clone() for buffer in self._buffers]
        self._pending: list[torch.Tensor] = []
        self._in_step = False
        self.augmentations = make_augmentations(self.recipe)

    def crops(self, batch: dict) -> list[torch.Tensor]:
        """Loader batch -> [(B * n, 3, s, s) float] augmented on the device; a sample's n crops side by side."""
        views = []
        for number, (pixels, spec) in enumerate(zip(batch["crops"], self.augmentations, strict=True)):
            images = pixels.to(self.device, non_blocking=True).flatten(0, 1).permute(0, 3, 1, 2)  # channels_last
            count = pixels.shape[1]
            views.append(
                augment(images, draw(spec, f"view{number}", self.seed, batch["passes"], batch["samples"], count))
            )
        return views

    def accumulate(self, batch: dict, last: bool) -> None:
        """Forward and backward of one micro-batch; gradients add up, and processes exchange them on the LAST one."""
        views = self.crops(batch)
        labels = batch["labels"].to(self.device, non_blocking=True)
        targets = torch.cat([labels.repeat_interleave(pixels.shape[1]) for pixels in batch["crops"]])
        forward = self.forward
        alone = isinstance(forward, nn.parallel.DistributedDataParallel) and not last
        with cast(nn.parallel.DistributedDataParallel, forward).no_sync() if alone else nullcontext():
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                logits = forward(views)
            loss = functional.cross_entropy(logits.float(), targets)
            self.scaler.scale(loss / self.plan.micro_batches).backward()
        first = slice(0, len(views[0]))  # accuracy on the global crops
        correct = (logits[first].argmax(1) == targets[first]).sum() / batch["crops"][0].shape[1]
        self._pending.append(torch.stack([loss.detach() * len(labels), correct]))

    def begin(self) -> None:
        """Start a step: its learning rate, its random state for dropout, a copy of what a forward pass changes."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.lr(self.step)
        draws = uniforms(1, "dropout", self.seed, np.array([self.step]), np.array([ranks().rank]))
        torch.manual_seed(int(draws[0, 0] * 2**53))
        if self._buffers:
            torch._foreach_copy_(self._buffers_before, self._buffers)
        self._in_step = True
        self.optimizer.zero_grad(set_to_none=True)
        self._pending = []

    def update(self) -> None:
        """The optimizer step. A loss that is not finite stops the run before the weights are touched."""
        loss, correct = torch.stack(self._pending).sum(0).tolist()
        if not math.isfinite(loss):
            self.abandon_step()
            raise NonFiniteLoss(self.step, self.plan)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.interval.add(Totals(loss, round(correct), self.plan.batch_size // self.plan.world))
        self.step += 1
        self._in_step = False

    def abandon_step(self) -> None:
        """Undo what the unfinished step has done: batch norm's statistics. Weights were not touched yet."""
        if self._in_step and self._buffers:
            torch._foreach_copy_(self._buffers, self._buffers_before)
        self._in_step = False

    def flush_interval(self) -> Totals:
        """Totals of all processes since the last call, which also join the epoch's."""
        sums = sum_counts(vars(self.interval), self.device)
        totals = Totals(sums["loss"], round(sums["correct"]), round(sums["seen"]))
        self.epoch.add(totals)
        self.interval = Totals()
        return totals

    def start_epoch(self) -> None:
        self.epoch = Totals()

    def epoch_line_due(self) -> bool:
        """Whether an epoch has ended that start_epoch has not closed: its checkpoint is written before validation."""
        return self.step % self.plan.steps_per_epoch == 0 and self.epoch.seen > 0

    # ===== saving and resuming =====

    def save(self, run: Path, identity: dict) -> None:
        """Write the state after self.step steps. Weights that are not finite are refused: the last good ones stay."""
        if not all(torch.isfinite(norm) for norm in torch._foreach_norm(list(self.model.parameters()))):
            raise NonFiniteLoss(self.step, self.plan)
        state = {
            "identity": identity,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "interval": self.interval.as_list(),
            "epoch": self.epoch.as_list(),
            "bad_images": self.bad_images,
        }
        checkpoint.save_checkpoint(run, state)

    def resume(self, run: Path, identity: dict) -> list[str]:
        """Continue from RUN's newest undamaged checkpoint, if it has one; returns lines to show.

        UserError if the checkpoint belongs to another run (the differences are named) or if all are damaged.
        """
        try:
            found = checkpoint.load_checkpoint(run)
        except checkpoint.DamagedCheckpoints as error:
            raise UserError(f"--out {run}: no readable checkpoint ({error}); delete them to start again") from None
        if found is None:
            return []
        state, path, problems = found
        require_same_run(state["identity"], identity, run)
        self.model.load_state_dict(state["model"], strict=True)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        self.epoch = Totals(*state["epoch"])
        if ranks().is_main:  # the other processes' part of the interval was not saved: its means are rank 0's alone
            self.interval = Totals(*state["interval"])
            self.bad_images = state["bad_images"]
        lines = [f"damaged checkpoint passed over: {problem}" for problem in problems]
        return [*lines, f"resuming from {path} at step {self.step} of {self.plan.total_steps}"]

    def require_same_step(self, run: Path) -> None:
        """UserError on every process unless all stand at the same step: each has read RUN by itself."""
        mine, world = ranks().rank, self.plan.world
        steps = sum_counts({f"{rank:06d}": self.step if rank == mine else 0 for rank in range(world)}, self.device)
        others = {rank: step for rank, step in enumerate(steps.values()) if step != steps["000000"]}
        if others:
            rank, step = next(iter(others.items()))
            raise UserError(
                f"--out {run}: rank 0 continues from step {steps['000000']:.0f} but rank {rank} from step {step:.0f}; "
                "put --out on a disk that all nodes share, or delete the checkpoint that not every rank could read"
            )

    def note_bad_images(self, found: list[str], allowed: int) -> None:
        """Remember damaged images by name; more than ALLOWED stop the run with the list."""
        for message in found:
            if message not in self.bad_images:
                self.bad_images.append(message)
                print(f"damaged image {len(self.bad_images)}, the next one takes its place: {message}", file=sys.stderr)
        if len(self.bad_images) > allowed:
            raise UserError(
                f"--max-bad-images {allowed}: {len(self.bad_images)} damaged: {'; '.join(self.bad_images)}; "
                "repair or delete them, or allow more"
            )


def make_augmentations(recipe: dict) -> list[AugmentSpec]:
    """One AugmentSpec a crop size."""
    shared = {
        key: recipe[key] for key in ("flip", "jitter", "brightness", "contrast", "saturation", "hue", "grayscale")
    }
    views = [AugmentSpec(**shared, blur=recipe["global_blur"], solarize=recipe["global_solarize"])]
    if recipe["local_count"]:
        views.append(AugmentSpec(**shared, blur=recipe["local_blur"], solarize=recipe["local_solarize"]))
    return views


class NonFiniteLoss(UserError):
    def __init__(self, step: int, plan: Plan):
        epoch, lr = step // plan.steps_per_epoch, plan.lr(min(step, plan.total_steps - 1))
        super().__init__(
            f"the loss is not finite at epoch {epoch}, step {step}, learning rate {lr:.3g}; the last good checkpoint "
            "is kept: try --dtype fp32, or a smaller --lr in a new --out"
        )


def require_same_run(saved: dict, wanted: dict, run: Path) -> None:
    """UserError that names what differs between a checkpoint's identity and the command's."""
    differences = [
        f"{key} was {saved.get(key)}, now {wanted.get(key)}"
        for key in sorted({*saved, *wanted})
        if saved.get(key) != wanted.get(key)
    ]
    if differences:
        raise UserError(f"--out {run} holds another run: {'; '.join(differences)}; choose another --out or delete it")


def validate(training: Training, images: ImageSet, workers: int, stop: StopSignals) -> dict:
    """{"val_top1", "val_top5": percent, "val_n"}: each image counted once, whatever the number of processes."""
    crops = EvalBatches(images, training.recipe["val_resize"], training.recipe["val_crop"])
    processes, device, dtype = ranks(), training.device, training.dtype
    share = range(processes.rank, len(images), processes.world_size)  # no padding: shares may differ by one image
    # But as many batches on each process, if need be an empty last one: all ask together whether to stop.
    starts = range(0, math.ceil(len(images) / processes.world_size), VAL_BATCH)
    wanted = [share[start : start + VAL_BATCH] for start in starts]
    counts: dict[str, float] = {"top1": 0, "top5": 0, "n": 0}
    training.model.eval()
    with (
        make_loader(crops, wanted, workers, pin=device.type == "cuda") as batches,
        torch.inference_mode(),
        torch.autocast(device.type, dtype, enabled=dtype != torch.float32),
    ):
        for batch in batches:
            stop.check(device)
            if not len(batch["labels"]):
                continue
            pixels = batch["images"].to(device, non_blocking=True)
            logits = training.model(normalize(pixels)).float().cpu().numpy()
            hits = topk_correct(logits, batch["labels"].numpy(), (1, 5))
            for name, count in (("top1", hits[1]), ("top5", hits[5]), ("n", len(pixels))):
                counts[name] += count
    training.model.train()
    total = sum_counts(counts, device)
    if total["n"] != len(images):
        raise RuntimeError(f"validation saw {total['n']:.0f} images of {len(images)}")
    return {f"val_{name}": 100 * total[name] / total["n"] for name in ("top1", "top5")} | {"val_n": len(images)}
