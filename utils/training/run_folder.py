"""RUN, the folder of a training run: which run it holds, whether that is finished, and who may write there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from utils.cli import UserError, safe_name
from utils.storage import AlreadyOwned, owner_lock, read_json, require_writable, sha256_file
from utils.training.image_sets import ImageSet, dataset_name

NEWEST, PREVIOUS = "checkpoint.pth", "checkpoint_previous.pth"


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
    return identity | {
        "seed": seed,
        "weights": list(weights),
        "data": [f"{len(one)} images {one.fingerprint()[:16]}" for one in images],
    }


def require_same_run(saved: dict, wanted: dict, run: Path) -> None:
    """UserError that names what differs between a checkpoint's identity and the command's."""
    differences = [
        f"{key} was {saved.get(key)}, now {wanted.get(key)}"
        for key in sorted({*saved, *wanted})
        if saved.get(key) != wanted.get(key)
    ]
    if differences:
        raise UserError(f"--out {run} holds another run: {'; '.join(differences)}; choose another --out or delete it")


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
        return (
            f"--data {images.root}: the images have new dates and their old sizes, as a copy has: they are not compared"
        )
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
        raise UserError(
            f"{weights} is damaged: its sha256 is not that in args.json; restore it, or delete it to train again"
        )
    return whole


@contextmanager
def own_run(run: Path) -> Iterator[None]:
    """Two commands into one --out would overwrite each other's checkpoints: the first one owns the folder."""
    require_writable(run, "--out")
    try:
        with owner_lock(run / ".lock"):
            yield
    except AlreadyOwned:
        raise UserError(
            f"--out {run}: another process is training there; wait for it or choose another --out"
        ) from None
