"""The state of a run: what a step changes, how a step is undone, and how all of it is saved and resumed.

The step itself, from crops to new weights, is `train_step` in train.py: weights change at its end only, until then it
can be abandoned and leaves no trace. Randomness comes from counters (utils/training/random_numbers.py) and the learning
rate is a function of the step, so that neither a generator nor a scheduler has to be saved.
"""

import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import nn

from utils.cli import UserError, differences
from utils.machine import NO_COST, Meter, add_costs, full_memory_said
from utils.training.augment import augment_views, random_draws
from utils.training.checkpoint import Writer, load_checkpoint, require_same_images
from utils.training.distributed import ranks, sum_counts
from utils.training.image_sets import ImageSet
from utils.training.loader import CropBatches, Request, crop_specs, make_loader
from utils.training.random_numbers import uniforms

COUNTS = ("loss", "correct", "seen")


@dataclass(frozen=True)
class Schedule:
    """Batches, steps and learning rates: what follows from the recipe and the numbers of images and processes."""

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

    def lr(self, step: int) -> float:
        """Of optimizer step STEP, from 0: linear warm-up to the peak, then half a cosine down to final_lr at the last.

        A run of at most warmup_steps ends in the warm-up. ValueError for a step outside the run.
        """
        last = self.total_steps - 1
        if not 0 <= step <= last:
            raise ValueError(f"step {step} is outside 0..{last}")
        if step < self.warmup_steps:
            return self.peak_lr * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, last - self.warmup_steps)  # 0..1
        return self.final_lr + (self.peak_lr - self.final_lr) * (1 + math.cos(math.pi * progress)) / 2

    def requests(self, steps: range, rank: int) -> Iterator[Request]:
        """The micro-batches of process RANK for optimizer steps STEPS, counted over all epochs.

        The rows of a batch are cut into micro_batches x world equal runs, so that the images of a step do not depend
        on how many processes share it.
        """
        rows = self.batch_size // (self.micro_batches * self.world)
        for step in steps:
            epoch, place = divmod(step, self.steps_per_epoch)
            for micro in range(self.micro_batches):
                start = place * self.batch_size + (micro * self.world + rank) * rows
                yield Request(epoch, start, start + rows)


def make_schedule(recipe: Mapping[str, Any], images: int, world: int) -> Schedule:
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
    return Schedule(
        images=images,
        batch_size=batch,
        micro_batches=micro,
        world=world,
        steps_per_epoch=steps,
        epochs=recipe["epochs"],
        warmup_steps=round(recipe["warmup_epochs"] * steps),
        peak_lr=recipe["lr"] * batch / 256,  # linear scaling: Goyal et al., 2017, and t-ReX
        final_lr=recipe["final_lr"],
    )


@dataclass
class Training:
    """Everything that a step reads or changes."""

    model: nn.Module
    forward: nn.Module  # the model over several crop sizes, compiled and wrapped for DDP as asked
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    device: torch.device
    dtype: torch.dtype
    recipe: Mapping[str, Any]
    schedule: Schedule
    seed: int
    forward_flops: Mapping[int, int]  # operations of one crop's forward pass, by its size
    step: int = 0  # optimizer steps done
    # Sums of loss and correct answers over the images "seen"; a mean is taken once, when it is shown.
    interval: Counter[str] = field(default_factory=Counter)  # of this process, since the last log line
    epoch: Counter[str] = field(default_factory=Counter)  # of all processes, up to the last log line
    bad_images: list[str] = field(default_factory=list)
    waited: float = 0.0  # seconds for data, since the last log line
    stamps: list[np.ndarray] = field(default_factory=list)  # of each image set, as it is on the disk: rank 0's
    writer: Writer = field(default_factory=Writer)
    cost: dict[str, float] = field(default_factory=NO_COST.copy)  # of all sessions of the run: rank 0's

    def __post_init__(self) -> None:
        # Batch norm's running statistics: the only state that a forward pass changes.
        self._buffers = [buffer for _, buffer in self.model.named_buffers()]
        self._buffers_before = [buffer.clone() for buffer in self._buffers]
        self._in_step = False
        self.meter = Meter(self.device)

    @contextmanager
    def loader(self, batches: CropBatches, workers: int, most_steps: int | None = None) -> Iterator[Iterator[dict]]:
        """Yield this process's micro-batches from the next step on, prepared ahead by WORKERS processes."""
        steps = range(self.step, self.schedule.total_steps)[:most_steps]
        wanted = self.schedule.requests(steps, ranks().rank)
        with make_loader(batches, wanted, workers, pin=self.device.type == "cuda") as loader:
            yield iter(loader)

    def flops(self, start: int, stop: int) -> int:
        """Operations of the optimizer steps START .. STOP, over all processes.

        The rule: a backward pass is two forward passes, one for the gradients of a layer's weights and one for those of
        its input; what is no convolution, matrix product or attention counts as free.
        """
        schedule, total = self.schedule, 0
        for epoch in range(start // schedule.steps_per_epoch, math.ceil(stop / schedule.steps_per_epoch)):
            first = epoch * schedule.steps_per_epoch
            images = (min(stop, first + schedule.steps_per_epoch) - max(start, first)) * schedule.batch_size
            crops = crop_specs(self.recipe, epoch)
            total += images * sum(3 * spec.count * self.forward_flops[spec.size] for spec in crops)
        return total

    # ===== the parts of a step =====

    def begin_step(self) -> None:
        """Set dropout's random state and keep a copy of what a forward pass changes."""
        draws = uniforms(1, "dropout", self.seed, np.array([self.step]), np.array([ranks().rank]))
        torch.manual_seed(int(draws[0, 0] * 2**53))
        if self._buffers:
            torch._foreach_copy_(self._buffers_before, self._buffers)
        self._in_step = True
        self._counted: list[torch.Tensor] = []  # of the step: (loss, correct answers) of each micro-batch

    def augmented(self, batch: dict) -> list[torch.Tensor]:
        """Loader batch -> [(B * n, 3, s, s) float] augmented on the device; a sample's n crops side by side."""
        views, draws = [], []
        for view, pixels in enumerate(batch["crops"]):
            views.append(pixels.to(self.device, non_blocking=True).flatten(0, 1).permute(0, 3, 1, 2))  # channels_last
            of = (batch["passes"], batch["samples"], pixels.shape[1])
            draws.append(random_draws(self.recipe, view, self.seed, *of))
        return augment_views(views, draws)

    @contextmanager
    def gradients_shared(self, last: bool) -> Iterator[None]:
        """Backward passes here add to the gradients, shared with the LAST micro-batch. UserError if memory is full."""
        images = self.schedule.batch_size // (self.schedule.micro_batches * self.schedule.world)
        full = f"--batch-per-device {images}: {self.device} is out of memory; try {images // 2 or 'another GPU'}"
        shared = self.forward if isinstance(self.forward, nn.parallel.DistributedDataParallel) else None
        with full_memory_said(full), shared.no_sync() if shared and not last else nullcontext():
            yield

    def count(self, loss: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor, images: int, first: int) -> None:
        """Note a micro-batch of IMAGES: its mean loss, and the accuracy on its FIRST rows, the global crops."""
        correct = (logits[:first].argmax(1) == targets[:first]).sum() / (first // images)
        self._counted.append(torch.stack([loss * images, correct]))

    def require_finite_loss(self) -> None:
        """Stop the run if a loss is no number, before its weights are touched: a step's one wait for the device.

        A gradient scaler waits by itself, and leaves the weights alone where gradients are no numbers: `end_step` then
        reads what is copied meanwhile.
        """
        self._sums = torch.stack(self._counted).sum(0)
        if self.scaler.is_enabled():
            self._sums = self._sums.to("cpu", non_blocking=True)
        else:
            self._read_sums()

    def _read_sums(self) -> None:
        loss, correct = self._sums.tolist()
        if not math.isfinite(loss):
            self.abandon_step()
            raise self._not_finite()
        images = self.schedule.batch_size // self.schedule.world
        self.interval.update({"loss": loss, "correct": round(correct), "seen": images})

    def end_step(self) -> None:
        """The weights have moved."""
        if self.scaler.is_enabled():
            self._read_sums()
        self.step += 1
        self._in_step = False

    def abandon_step(self) -> None:
        """Undo what the unfinished step has done: batch norm's statistics. Weights were not touched yet."""
        if self._in_step and self._buffers:
            torch._foreach_copy_(self._buffers, self._buffers_before)
        self._in_step = False

    # ===== counts =====

    def flush_interval(self) -> Counter[str]:
        """Sums of all processes since the last call, which also join the epoch's."""
        spent = self.meter.read()
        joules = {name: spent.get(name, math.nan) for name in NO_COST if name != "seconds"}
        sums = Counter(sum_counts({name: self.interval[name] for name in COUNTS} | joules, self.device))
        spent |= {name: sums.pop(name) for name in joules}
        self.cost = add_costs(self.cost, {name: value for name, value in spent.items() if not math.isnan(value)})
        self.epoch.update(sums)
        self.interval.clear()
        return sums

    # ===== saving and resuming =====

    def save(self, run: Path, identity: dict) -> None:
        """Write the state after self.step steps, while training goes on: `writer` says when it is on the disk.

        Weights that are not finite are refused: the last good ones stay.
        """
        if not all(torch.isfinite(norm) for norm in torch._foreach_norm(list(self.model.parameters()))):
            raise self._not_finite()
        self.cost = add_costs(self.cost, self.meter.read())
        state = {
            "identity": identity,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "interval": [self.interval[name] for name in COUNTS],
            "epoch": [self.epoch[name] for name in COUNTS],
            "bad_images": self.bad_images,
            "stamps": [torch.from_numpy(stamps) for stamps in self.stamps],
            "cost": self.cost,
        }
        self.writer.start(run, state)

    def resume(self, run: Path, identity: dict, images: Sequence[ImageSet]) -> list[str]:
        """Continue from RUN's newest undamaged checkpoint, if it has one; returns lines to show.

        UserError if the checkpoint belongs to another run (the differences are named), if all are damaged, or if IMAGES
        have changed since it was saved, which rank 0 looks at.
        """
        self.stamps = [one.stamps() for one in images] if ranks().is_main else []
        self.meter.read()  # the run costs from here on
        found = load_checkpoint(run)
        if found is None:
            return []
        state, path, problems = found
        if told := [f"{key} was {old}, now {new}" for key, old, new in differences(state.identity, identity)]:
            raise UserError(f"--out {run} holds another run: {'; '.join(told)}; choose another --out or delete it")
        lines: list[str | None] = [f"damaged checkpoint passed over: {problem}" for problem in problems]
        if ranks().is_main:
            for one, before, now in zip(images, state.stamps, self.stamps, strict=False):
                lines.append(require_same_images(one, before.numpy(), now))
        if not 0 <= state.step <= self.schedule.total_steps:
            place = f"step {state.step} of {self.schedule.total_steps}"
            raise UserError(f"{path}: {place} cannot be; delete it to go on without")
        try:
            self.model.load_state_dict(state.model, strict=True)
            self.optimizer.load_state_dict(msgspec.structs.asdict(state.optimizer))
            self.scaler.load_state_dict(state.scaler)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{path} does not fit this run's model ({reason}); delete it to go on without") from None
        self.step, self.cost = state.step, state.cost
        self.epoch = Counter(dict(zip(COUNTS, state.epoch, strict=True)))
        if ranks().is_main:  # the other processes' part of the interval was not saved: its means are rank 0's alone
            self.interval = Counter(dict(zip(COUNTS, state.interval, strict=True)))
            self.bad_images = state.bad_images
        return [*filter(None, lines), f"resuming from {path} at step {self.step} of {self.schedule.total_steps}"]

    def require_same_step(self, run: Path) -> None:
        """UserError on every process unless all stand at the same step: each has read RUN by itself."""
        own = ranks().rank
        named = {f"{rank:06d}": float(self.step * (rank == own)) for rank in range(self.schedule.world)}
        steps = list(sum_counts(named, self.device).values())
        for rank, step in enumerate(steps):
            if step != steps[0]:
                differ = f"rank 0 continues from step {steps[0]:.0f} but rank {rank} from step {step:.0f}"
                remedy = "delete the checkpoint that not every rank could read"
                raise UserError(f"--out {run}: {differ}; put --out on a disk that all nodes share, or {remedy}")

    def note_bad_images(self, found: list[str], allowed: int) -> None:
        """Remember damaged images by name; more than ALLOWED stop the run with the list."""
        for message in found:
            if message not in self.bad_images:
                self.bad_images.append(message)
                print(f"damaged image {len(self.bad_images)}, the next one takes its place: {message}", file=sys.stderr)
        if len(self.bad_images) > allowed:
            what = f"{len(self.bad_images)} damaged: {'; '.join(self.bad_images)}"
            raise UserError(f"--max-bad-images {allowed}: {what}; repair or delete them, or allow more")

    def _not_finite(self) -> UserError:
        """The loss or the weights are no numbers any more; nothing of it was saved."""
        step, schedule = self.step, self.schedule
        remedy = "--dtype fp32, or " * (self.dtype != torch.float32) + "a smaller --lr in a new --out"
        return UserError(
            f"the loss is not finite at epoch {step // schedule.steps_per_epoch}, step {step}, learning rate "
            f"{schedule.lr(min(step, schedule.total_steps - 1)):.3g}; the last good checkpoint is kept: try {remedy}"
        )
