"""Checkpoints that survive a kill at any moment: written aside, synced, renamed; the one before is kept."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from utils.cli import UserError
from utils.storage import AlreadyOwned, atomic_path, owner_lock, require_writable

NEWEST, PREVIOUS = "checkpoint.pth", "checkpoint_previous.pth"


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


@contextmanager
def own_run(out: Path) -> Iterator[None]:
    """Two commands into one --out would overwrite each other's checkpoints: the first one owns the folder."""
    require_writable(out, "--out")
    try:
        with owner_lock(out / ".lock"):
            remove_leftovers(out)
            yield
    except AlreadyOwned:
        raise UserError(
            f"--out {out}: another process is training there; wait for it or choose another --out"
        ) from None


def remove_leftovers(run: Path) -> None:
    """Delete temporary files of writers that were killed."""
    for path in run.glob(".*.tmp"):
        pid = path.name.split(".")[-2]
        if not (pid.isdigit() and Path(f"/proc/{pid}").exists() and int(pid) != os.getpid()):
            path.unlink(missing_ok=True)
