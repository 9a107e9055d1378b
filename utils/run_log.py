"""What a training run says about itself: log.jsonl, TensorBoard events where installed, curves.png."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path

from utils.storage import append_jsonl, atomic_path, atomic_write, read_jsonl

LOG, CURVES = "log.jsonl", "curves.png"


class RunLog:
    """One JSON object a line: kind "train" (an interval), "epoch" (its means, validation) or "done"."""

    def __init__(self, run: Path, step: int, tensorboard: bool):
        """Continue the log of a run that resumes at STEP."""
        self.path = run / LOG
        self.forget_after(step)
        self._events = None
        if tensorboard and importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(run / "tensorboard"))

    def forget_after(self, step: int) -> None:
        """Drop lines of steps that a resumed run will do again, so that the log reads as if never interrupted."""
        lines = read_jsonl(self.path)
        kept = [line for line in lines if line["step"] <= step]
        if len(kept) != len(lines):
            atomic_write(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def write(self, kind: str, step: int, **values) -> None:
        append_jsonl(self.path, {"kind": kind, "step": step, **values, "time": round(time.time(), 3)})
        if self._events is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._events.add_scalar(f"{kind}/{name}", value, step)
            self._events.flush()


def draw_curves(run: Path) -> None:
    """RUN/curves.png from RUN/log.jsonl: loss and learning rate by step, top-1 by epoch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read_jsonl(run / LOG)
    steps = [line for line in lines if line["kind"] == "train"]
    epochs = [line for line in lines if line["kind"] == "epoch"]
    if not steps and not epochs:
        return
    figure, (loss, accuracy) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    loss.plot([line["step"] for line in steps], [line["loss"] for line in steps], color="tab:blue")
    loss.set(xlabel="step", ylabel="training loss", title=f"{run.name}: loss")
    rate = loss.twinx()
    rate.plot([line["step"] for line in steps], [line["lr"] for line in steps], color="tab:gray", linewidth=0.8)
    rate.set_ylabel("learning rate (grey)")
    accuracy.plot([line["epoch"] for line in epochs], [line["top1"] for line in epochs], label="training crops")
    for name, label in (("val_top1", "validation top-1"), ("val_top5", "validation top-5")):
        known = [line for line in epochs if line.get(name) is not None]
        if known:
            accuracy.plot([line["epoch"] for line in known], [line[name] for line in known], label=label)
    accuracy.set(xlabel="epoch", ylabel="accuracy (%)", ylim=(0, 101), title="accuracy")
    accuracy.legend(loc="lower right")
    with atomic_path(run / CURVES) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    pyplot.close(figure)
