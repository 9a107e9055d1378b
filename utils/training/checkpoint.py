"""RUN, the folder of a training run: which run it holds, who may write there, and checkpoints that survive any kill.

A checkpoint is written aside, synced and renamed, and the one before is kept. torch is imported where it is needed: a
finished run is recognised without it.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from utils.cli import UserError, safe_name
from utils.storage import AlreadyOwned, atomic_path, owner_lock, read_json, require_writable, sha256_file
from utils.training.image_sets import ImageSet, dataset_name

NEWEST, PREVIOUS = "checkpoint.pth", "checkpoint_previous.pth"
Plain = str | int | float | bool | None


def run_name(asked: str | None, paths: Sequence[Path]) -> str:
    """What the exported weights are called: as ASKED, else after the data folders. UserError if no file can be."""
    name = safe_name(asked or "+".join(map(dataset_name, paths)), "--name")
    if f"{name}.pth" in (NEWEST, PREVIOUS):
        raise UserError(f"--name {name}: RUN/{name}.pth is what a stopped run continues from; give another --name")
    return name


def make_identity(recipe: Mapping[str, Any], images: Sequence[ImageSet], weights: Sequence[float], seed: int) -> dict:
    """What the final weights depend on, in plain types: a checkpoint is continued only by the same."""
    identity = {key: list(value) if isinstance(value, tuple) else value for key, value in recipe.items()}
    # How a step is spread over devices may change between stop and resume: only batch norm's batches feel it.
    del identity["batch_per_device"]
    # Values that came later and change nothing: runs of before go on, and finished ones are known.
    if identity["first_size"] in (0, identity["global_size"]):
        del identity["first_size"], identity["growth"]
    if not identity["label_smoothing"]:
        del identity["label_smoothing"]
    return identity | {"seed": seed, "weights": list(weights), "data": [one.summary() for one in images]}


def require_same_images(images: ImageSet, before: np.ndarray, now: np.ndarray) -> str | None:
    """UserError if some of IMAGES have changed between the stamps BEFORE and NOW; a line if they are another copy.

    Where most have a new time and all their old size somebody has copied them. Shards know no times.
    """
    resized = before[:, 0] != now[:, 0]
    redated = (before[:, 1] != now[:, 1]) & (before[:, 1] != 0) & (now[:, 1] != 0)
    changed = np.flatnonzero(resized | redated)
    if not len(changed):
        return None
    if redated.mean() > 0.5 and not resized.any():
        return f"--data {images.root}: the images have new dates and their old sizes, as a copy has"
    raise UserError(
        f"--data {images.root}: {len(changed)} images are not what they were when this run was last saved, e.g. "
        f"{images.name(int(changed[0]))}; put them back, or choose another --out"
    )


def is_finished(run: Path, name: str, identity: dict) -> bool:
    """Whether RUN holds the exported weights of this very run. UserError if they are damaged beyond help."""
    weights = run / f"{name}.pth"
    if not weights.exists() or not (run / "args.json").exists():
        return False
    described = read_json(run / "args.json")
    if (described.get("dataset"), described.get("identity")) != (name, identity):
        return False
    whole = described.get("weights_sha256") in (None, sha256_file(weights))  # runs of before did not record it
    if not whole and not any((run / checkpoint).exists() for checkpoint in (NEWEST, PREVIOUS)):
        remedy = "restore it, or delete it to train again"
        raise UserError(f"{weights} is damaged: its sha256 is not that in args.json; {remedy}")
    return whole


@contextmanager
def own_run(run: Path) -> Iterator[None]:
    """Two commands into one --out would overwrite each other's checkpoints: the first one owns the folder."""
    require_writable(run, "--out")
    try:
        with owner_lock(run / ".lock"):
            yield
    except AlreadyOwned:
        remedy = "wait for it or choose another --out"
        raise UserError(f"--out {run}: another process is training there; {remedy}") from None


# ===== checkpoints =====


class Optimizer(msgspec.Struct):
    """torch's own form of an optimizer's state; only tensors below `state`."""

    state: dict[int, dict[str, Any]]
    param_groups: list[dict[str, Plain | list[int]]]


class State(msgspec.Struct):
    """What a checkpoint holds; only tensors below `model` and in `stamps`."""

    identity: dict[str, Plain | list[Plain]]
    step: int
    model: dict[str, Any]
    optimizer: Optimizer
    scaler: dict[str, Plain]
    interval: list[float]
    epoch: list[float]
    bad_images: list[str]
    stamps: list[Any] = []
    cost: dict[str, float] = {}  # so far; checkpoints of before do not know it


def save_checkpoint(run: Path, state: dict) -> None:
    """Write STATE, of the form of State, as RUN/checkpoint.pth; the former one becomes checkpoint_previous.pth.

    A kill between the two renames leaves only the previous one, which load_checkpoint then takes.
    """
    import torch

    newest = run / NEWEST
    with atomic_path(newest, fsync=True) as temporary:
        with open(temporary, "wb") as file:  # by its name torch would put that of the temporary file into it
            torch.save(state, file)
        if newest.exists():
            newest.replace(run / PREVIOUS)


class Writer:
    """Writes checkpoints in a thread: a step waits for a copy of the state in memory, not for the disk."""

    def __init__(self) -> None:
        self._hand = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None  # until somebody has asked how it ended

    def start(self, run: Path, state: dict) -> None:
        """Write STATE as it is now; waits until the one before is written, and raises what has stopped that one."""
        # torch.save imports it at its first use: a loader's process forked meanwhile would find it half imported.
        import torch.utils.serialization.config  # noqa: F401

        self.wait()
        self._writing = self._hand.submit(save_checkpoint, run, on_host(state))

    def check(self) -> None:
        """Raise the error that has stopped the last checkpoint, once; does not wait for one that is being written."""
        if self._writing and self._writing.done():
            written, self._writing = self._writing, None
            written.result()

    def wait(self) -> None:
        """Until the last checkpoint is on the disk; raises the error that has stopped it."""
        self.close()
        self.check()

    def close(self) -> None:
        """Until nothing is being written any more."""
        if self._writing:
            wait([self._writing])


def on_host(value: Any) -> Any:
    """A copy of VALUE, dicts and lists of tensors and plain values, that no later step changes; its tensors on the CPU.

    torch.save writes the same bytes for it, but for the name of a tensor's device.
    """
    import torch

    if isinstance(value, dict):
        result = copy.copy(value)  # with its type, and the attribute that torch hangs on a model's state
        result.update({key: on_host(part) for key, part in value.items()})
        return result
    if isinstance(value, list):
        return [on_host(part) for part in value]
    return value.to("cpu", copy=True) if isinstance(value, torch.Tensor) else value


def load_checkpoint(run: Path) -> tuple[State, Path, list[str]] | None:
    """(state, path, [what was wrong with newer ones]) of the newest good checkpoint; None if there is none.

    UserError if there are some but none is good.
    """
    problems: list[str] = []
    for path in (run / NEWEST, run / PREVIOUS):
        if path.is_file():
            try:
                return read_checkpoint(path), path, problems
            except Exception as error:  # a damaged file can fail anywhere in unzipping or unpickling
                problems.append(f"{path}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
    if problems:
        raise UserError(f"--out {run}: no readable checkpoint ({'; '.join(problems)}); delete them to start again")
    return None


def read_checkpoint(path: Path) -> State:
    """The content of a checkpoint whose checksums hold and whose parts are of the types of State; else any error."""
    import torch

    from utils.model import verify_archive

    verify_archive(path)
    state = msgspec.convert(torch.load(path, map_location="cpu", weights_only=True), State)
    tensors = [*state.model.values(), *state.stamps]
    tensors += [value for values in state.optimizer.state.values() for value in values.values() if value is not None]
    if not all(isinstance(value, torch.Tensor) for value in tensors):
        raise ValueError("something other than a tensor stands where one belongs")
    return state
