"""Checkpoints that survive a kill at any moment: written aside, synced, renamed; the one before is kept."""

from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile

import msgspec
import torch

from utils.cli import UserError
from utils.storage import atomic_path
from utils.training.run_folder import NEWEST, PREVIOUS

Plain = str | int | float | bool | None


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


def save_checkpoint(run: Path, state: dict) -> None:
    """Write STATE, of the form of State, as RUN/checkpoint.pth; the former one becomes checkpoint_previous.pth.

    A kill between the two renames leaves only the previous one, which load_checkpoint then takes.
    """
    newest = run / NEWEST
    with atomic_path(newest, fsync=True) as temporary:
        write_tensors(temporary, state)
        if newest.exists():
            newest.replace(run / PREVIOUS)


def write_tensors(path: Path, state: dict) -> None:
    """torch.save with the system's error, such as a full disk, where torch reports one of its own that hides it."""
    with open(path, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # from ending the archive, while the OSError of a write is on its way
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


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
    with ZipFile(path) as archive:
        if any(entry.compress_type != ZIP_STORED for entry in archive.infolist()):
            raise ValueError("it is compressed, which torch.save never does")
        if damaged := archive.testzip():  # torch.save writes a CRC of every tensor, torch.load skips it
            raise ValueError(f"{damaged} fails its checksum")
    state = msgspec.convert(torch.load(path, map_location="cpu", weights_only=True), State)
    tensors = [*state.model.values(), *state.stamps]
    tensors += [value for values in state.optimizer.state.values() for value in values.values() if value is not None]
    if not all(isinstance(value, torch.Tensor) for value in tensors):
        raise ValueError("something other than a tensor stands where one belongs")
    return state
