"""Checkpoints that survive a kill at any moment: written aside, synced, renamed; the one before is kept."""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch

from utils.storage import atomic_path
from utils.training.run_folder import NEWEST, PREVIOUS


def save_checkpoint(run: Path, state: dict) -> None:
    """Write STATE (plain types and tensors) as RUN/checkpoint.pth; the former one becomes checkpoint_previous.pth.

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


def load_checkpoint(run: Path) -> tuple[dict, Path, list[str]] | None:
    """(state, path, [what was wrong with newer ones]) of the newest undamaged checkpoint; None if there is none."""
    problems: list[str] = []
    for path in (run / NEWEST, run / PREVIOUS):
        if not path.exists():
            continue
        try:
            damaged = zipfile.ZipFile(path).testzip()  # torch.save writes a CRC of every tensor, torch.load skips it
            if damaged is None:
                return torch.load(path, map_location="cpu", weights_only=True), path, problems
            problems.append(f"{path}: {damaged} fails its checksum")
        except Exception as error:  # a damaged file can fail anywhere in unzipping or unpickling
            problems.append(f"{path}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
    if problems:
        raise DamagedCheckpoints("; ".join(problems))
    return None


class DamagedCheckpoints(Exception):
    """No checkpoint of the run can be read; the message names each and what is wrong with it."""
