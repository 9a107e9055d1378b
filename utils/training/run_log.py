"""What a training run says: a line for people, log.jsonl, TensorBoard events where installed, curves.png."""

from __future__ import annotations

import importlib.util
import json
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from utils.images import Curve, draw_curves
from utils.storage import append_jsonl, atomic_write, read_jsonl

if TYPE_CHECKING:
    from utils.training.step import Totals, Training

LOG, CURVES = "log.jsonl", "curves.png"


class Clock:
    """Where the time of a run and of an interval went."""

    def __init__(self, step: int):
        self.started = self._since = time.monotonic()
        self.first_step = self._step = step
        self._waited = 0.0  # seconds of the interval

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent in this block is time without data."""
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start

    def interval(self, step: int) -> tuple[float, float]:
        """(steps a second, share of the time spent waiting for data) since the last call."""
        now = time.monotonic()
        seconds = max(now - self._since, 1e-9)
        rate, share = (step - self._step) / seconds, self._waited / seconds
        self._since, self._step, self._waited = now, step, 0.0
        return rate, share

    def eta(self, step: int, total_steps: int) -> float:
        """Seconds left, at the mean speed since the process started."""
        return (total_steps - step) * (time.monotonic() - self.started) / max(1, step - self.first_step)


class RunLog:
    """log.jsonl: one JSON object a line, kind "train" (an interval of steps) or "epoch" (its means, validation)."""

    def __init__(self, run: Path, step: int, tensorboard: bool):
        """Continue the log of a run that resumes at STEP: lines of steps it will do again are dropped."""
        self.path = run / LOG
        lines = read_jsonl(self.path)
        kept = [line for line in lines if line["step"] <= step]
        self._epochs = {line["step"] for line in kept if line["kind"] == "epoch"}
        if len(kept) != len(lines):
            atomic_write(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._events = None
        if tensorboard and importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def has_epoch(self, step: int) -> bool:
        """Whether the log that was continued has the line of the epoch that ends with STEP."""
        return step in self._epochs

    def write(self, kind: str, step: int, **values: float) -> None:
        append_jsonl(self.path, {"kind": kind, "step": step, **values, "time": round(time.time(), 3)})
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(f"{kind}/{name}", value, step)
            self._events.flush()

    def interval(self, training: Training, totals: Totals, clock: Clock) -> None:
        """The steps since the last line: for people and for machines."""
        plan, step = training.plan, training.step
        rate, waited = clock.interval(step)
        eta = clock.eta(step, plan.total_steps)
        epoch, lr, memory = (step - 1) // plan.steps_per_epoch + 1, plan.lr(step - 1), peak_memory_mb(training.device)
        self.write(
            "train",
            step,
            epoch=epoch,
            loss=totals.mean_loss,
            top1=totals.top1,
            lr=lr,
            images_per_s=rate * plan.batch_size,
            data_wait=waited,
            eta_s=round(eta),
            memory_mb=memory,
            bad_images=len(training.bad_images),
        )
        print(
            f"epoch {epoch}/{plan.epochs} step {step}/{plan.total_steps} loss {totals.mean_loss:.4f} "
            f"top-1 {totals.top1:.1f} lr {lr:.3g} {rate * plan.batch_size:.1f} img/s data wait {100 * waited:.1f}% "
            f"memory {memory} MB eta {timedelta(seconds=round(eta))}",
            flush=True,
        )

    def epoch(self, training: Training, epoch: int, scores: dict) -> None:
        """Means over epoch EPOCH (from 1) and validation's SCORES, if any."""
        totals = training.epoch
        self.write("epoch", training.step, epoch=epoch, loss=totals.mean_loss, top1=totals.top1, **scores)
        if scores:
            print(
                f"epoch {epoch}: validation top-1 {scores['val_top1']:.2f} top-5 {scores['val_top5']:.2f} "
                f"of {scores['val_n']} images",
                flush=True,
            )


def peak_memory_mb(device: torch.device) -> int:
    """Of the GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024  # kilobytes on Linux


def draw_run(run: Path) -> None:
    """RUN/curves.png from RUN/log.jsonl: loss and learning rate by step, top-1 by epoch."""
    lines = read_jsonl(run / LOG)
    steps = [line for line in lines if line["kind"] == "train"]
    epochs = [line for line in lines if line["kind"] == "epoch"]
    if not steps and not epochs:
        return
    accuracies: list[Curve] = []
    for key, label in (("top1", "training crops"), ("val_top1", "validation top-1"), ("val_top5", "validation top-5")):
        known = [line for line in epochs if line.get(key) is not None]
        if known:
            accuracies.append((label, [line["epoch"] for line in known], [line[key] for line in known], None))
    x = [line["step"] for line in steps]
    panels: dict[str, tuple[str, list[Curve]]] = {
        f"{run.name}: training loss": ("step", [("", x, [line["loss"] for line in steps], None)]),
        "learning rate": ("step", [("", x, [line["lr"] for line in steps], None)]),
        "accuracy (%)": ("epoch", accuracies),
    }
    atomic_write(run / CURVES, draw_curves(panels, "png"))
