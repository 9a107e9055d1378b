"""What a training run says: its plan, a line for people, log.jsonl for machines, curves.png."""

import json
import resource
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import torch

from utils.images import Curve, draw_curves
from utils.machine import snapshot
from utils.storage import append_jsonl, atomic_write, read_jsonl
from utils.training.image_sets import ImageSet
from utils.training.recipe import as_text
from utils.training.step import Training

LOG, CURVES = "log.jsonl", "curves.png"


def describe_plan(name: str, training: Training, images: Sequence[ImageSet], out: Path) -> str:
    """Everything derived from recipe NAME and the data, once, before the first step."""
    schedule, recipe = training.schedule, training.recipe
    parameters = sum(parameter.numel() for parameter in training.model.parameters())
    sources = ", ".join(f"{one.root} ({len(one)})" for one in images)
    return "\n".join(
        [
            f"data    {schedule.images} images, {len(images[0].class_ids)} classes: {sources}",
            f"model   {recipe['arch']}, {recipe['head']} head, {parameters / 1e6:.2f} M parameters, "
            f"seed {training.seed}",
            f"device  {training.device} x {schedule.world}, forward in {str(training.dtype).removeprefix('torch.')}",
            f"batch   {schedule.batch_size} images = {schedule.world} process{'es' if schedule.world > 1 else ''}"
            f" x {schedule.micro_batches} micro-batch{'es' if schedule.micro_batches > 1 else ''}"
            f" x {schedule.batch_size // (schedule.micro_batches * schedule.world)}",
            f"steps   {schedule.total_steps} = {schedule.epochs} epochs x {schedule.steps_per_epoch}",
            f"lr      peak {schedule.peak_lr:g} = {recipe['lr']:g} x {schedule.batch_size} / 256; "
            f"{schedule.warmup_steps} steps of warm-up, then cosine to {schedule.final_lr:g}",
            f"recipe  {name}: {', '.join(f'{key}={as_text(value)}' for key, value in recipe.items())}",
            f"run     {out}; source {snapshot()['git_commit']}",
        ]
    )


def duration(seconds: float) -> str:
    """3725 -> "1:02:05"."""
    return str(timedelta(seconds=round(seconds)))


class RunLog:
    """log.jsonl: one JSON object a line, kind "train" (an interval of steps) or "epoch" (its means, validation)."""

    def __init__(self, run: Path, step: int):
        """Continue the log of a run that resumes at STEP: lines of steps it will do again are dropped."""
        self.path = run / LOG
        self._started = self._since = time.monotonic()
        self._first_step = self._step = step
        lines = read_jsonl(self.path)
        kept = [line for line in lines if line["step"] <= step]
        self.epochs = {line["step"] for line in kept if line["kind"] == "epoch"}  # their last steps
        if len(kept) != len(lines):
            atomic_write(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def write(self, kind: str, step: int, **values: float) -> None:
        """Append a line of KIND about the steps up to STEP."""
        append_jsonl(self.path, {"kind": kind, "step": step, **values, "time": round(time.time(), 3)})

    def interval(self, training: Training, totals: Mapping[str, float]) -> None:
        """The steps since the last line, with the sums TOTALS: for people and for machines."""
        schedule, step, now = training.schedule, training.step, time.monotonic()
        seconds = max(now - self._since, 1e-9)
        done = training.flops(self._first_step, step)  # since the process started
        left = training.flops(step, schedule.total_steps)
        memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes on Linux
        if training.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(training.device)
        values = {
            "epoch": (step - 1) // schedule.steps_per_epoch + 1,
            **means(totals),
            "lr": schedule.lr(step - 1),
            "images_per_s": (step - self._step) * schedule.batch_size / seconds,
            "data_wait": training.waited / seconds,
            "eta_s": round((now - self._started) * left / max(1, done)),
            "memory_mb": memory // 2**20,
            "bad_images": len(training.bad_images),
        }
        self._since, self._step, training.waited = now, step, 0.0
        self.write("train", step, **values)
        print(
            "epoch {epoch}/{epochs} step {step}/{steps} loss {loss:.4f} top-1 {top1:.1f} lr {lr:.3g} "
            "{images_per_s:.1f} img/s data wait {data_wait:.1%} memory {memory_mb} MB eta {eta}".format(
                epochs=schedule.epochs, step=step, steps=schedule.total_steps, eta=duration(values["eta_s"]), **values
            ),
            flush=True,
        )

    def epoch(self, training: Training, epoch: int, scores: dict) -> None:
        """Means over epoch EPOCH (from 1) and validation's SCORES, if any."""
        self.write("epoch", training.step, epoch=epoch, **means(training.epoch), **scores)
        if scores:
            found = "top-1 {val_top1:.2f} top-5 {val_top5:.2f} of {val_n} images".format(**scores)
            print(f"epoch {epoch}: validation {found}", flush=True)
            self._since = time.monotonic()  # validation is no part of the next steps' time


def means(totals: Mapping[str, float]) -> dict[str, float]:
    """Sums over images -> {"loss": mean, "top1": percent}."""
    seen = max(1, totals["seen"])
    return {"loss": totals["loss"] / seen, "top1": 100 * totals["correct"] / seen}


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
