"""What a report reads, each file against a type: results.jsonl, and args.json, log.jsonl and eval/*.json of its runs.

A file of another type is a UserError that names the file, the field and the remedy.
"""

import base64
import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np

from utils.cli import UserError, data_and_weight, safe_label
from utils.evaluation.results import Count, Row, with_v2_mean
from utils.storage import read_json, read_jsonl

Record = TypeVar("Record", bound=msgspec.Struct)
is_file = os.path.isfile  # False too for what no disk can hold, where Path.is_file raises
JUDGE_AGAIN = "delete it and run evaluate.py on its checkpoint again"


class Environment(msgspec.Struct):
    """The machine and the packages."""

    packages: dict[str, str | None] = {}
    python: str | None = None
    git_commit: str | None = None
    image_digest: str | None = None
    cpu: str | None = None
    cores: int | None = None
    gpus: list[str] | None = None
    driver: str | None = None


class Made(msgspec.Struct):
    """How a file was made, as dataset.json, args.json and eval/*.json record it."""

    command: str | None = None
    environment: Environment | None = None


Amount = Annotated[float, msgspec.Meta(ge=0, le=1e13)]


class Cost(msgspec.Struct, frozen=True):
    """What a dataset, a run or a judgement has cost: see Meter in utils/machine.py."""

    seconds: Amount | None = None
    flops: Annotated[float, msgspec.Meta(ge=0, le=1e30)] | None = None
    cpu_joules: Amount | None = None
    gpu_joules: Amount | None = None


class Source(msgspec.Struct):
    """A folder that a run was trained on."""

    path: str
    synthetic: bool
    supervision: str = ""  # of a synthetic one: "class names", "glosses" ..., see generate.py --supervision


class Plan(msgspec.Struct, frozen=True):
    """How much a run was trained."""

    images: Count | None = None
    steps_per_epoch: Count | None = None
    epochs: Count | None = None


class Options(msgspec.Struct, frozen=True):
    """What train.py was asked for."""

    data: list[str] = []


class Training(Made):
    """What a report needs of a run's args.json."""

    options: Options = Options()
    plan: Plan = Plan()
    cost: Cost = Cost()
    sources: list[Source] = []  # runs of earlier versions did not record them

    def data(self) -> list[Source]:
        """What the run was trained on; of an earlier version's run only the folders that are still there."""
        found = []
        for text in self.options.data if not self.sources else ():
            with contextlib.suppress(OSError, RuntimeError, ValueError):  # no name that a disk can hold
                path = data_and_weight(text)[0]
                found += [Source(str(path), dataset_root(path) is not None)] * path.is_dir()
        return self.sources or found

    @property
    def kind(self) -> str:
        """ "real", "synthetic", "mixed", or "" where it is not known."""
        kinds = {one.synthetic for one in self.data()}
        return {(False,): "real", (True,): "synthetic", (False, True): "mixed"}.get(tuple(sorted(kinds)), "")

    @property
    def supervision(self) -> str:
        """What people had to know of real images for it; "" where that is not known of some of its data."""
        grades = {one.supervision if one.synthetic else "labelled images" for one in self.data()}
        return "" if "" in grades else ", ".join(sorted(grades))

    @property
    def steps(self) -> int | None:
        """Optimizer steps of the whole run."""
        plan = self.plan
        return plan.epochs * plan.steps_per_epoch if plan.epochs and plan.steps_per_epoch else None


class ClassEntry(msgspec.Struct):
    """A class of a dataset.json or dataset_report.json."""

    id: str
    name: str = ""
    diversity: float | None = None  # see measures.py


class Described(Made):
    """What a report needs of a dataset.json."""

    classes: list[ClassEntry] = []
    recipe: dict[str, Any] = {}
    cost: Cost = Cost()

    @property
    def names(self) -> dict[str, str]:
        """Class id -> name."""
        return {row.id: row.name for row in self.classes}


class Quality(msgspec.Struct):
    """What a report needs of a dataset_report.json."""

    descriptor: str
    classes: list[ClassEntry] = []


class ClassScore(msgspec.Struct):
    """Top-1 of one class, in percent of its n images."""

    id: str
    n: Count
    top1: float | None = None  # none without images


class Sidecar(Made, kw_only=True):
    """What a report needs of eval/<dataset>.<checkpoint>.json: the close look at one result."""

    dataset: str
    checkpoint_sha256: str
    class_ids: list[str] = []
    class_names: list[str] = []
    per_class: list[ClassScore] = []
    confusion: list[list[Count]] | None = None  # rows: the right class; columns: the answer
    cost: Cost = Cost()
    images: str = ""  # fingerprint of the images judged, in their order
    correct: str = ""  # one bit an image, base64 of numpy's packbits

    def __post_init__(self) -> None:
        k = len(self.class_ids)
        if len(self.class_names) != k or {score.id for score in self.per_class} - set(self.class_ids):
            raise ValueError("class_ids, class_names and per_class do not belong together")
        if self.confusion is not None and [len(row) for row in self.confusion] != [k] * k:
            raise ValueError("the confusion matrix is not as large as class_ids")
        base64.b64decode(self.correct)  # a ValueError if it is none

    def outcomes(self) -> np.ndarray | None:
        """(n,) bools, whether each image was recognised; None where that was not recorded."""
        n = sum(score.n for score in self.per_class)
        bits = np.unpackbits(np.frombuffer(base64.b64decode(self.correct), np.uint8))[:n].astype(bool)
        return bits if n and len(bits) == n else None


class Epoch(msgspec.Struct, tag_field="kind", tag="epoch"):
    """A line of log.jsonl: means over an epoch of training."""

    epoch: Count
    loss: float
    top1: float


class Interval(msgspec.Struct, tag_field="kind", tag="train"):
    """A line of log.jsonl between those of the epochs, of which a report needs nothing."""


def read_results(paths: Sequence[Path]) -> list[Row]:
    """The rows of all files that still hold, each with its folder.

    A model's last checkpoint counts, not an earlier one that was judged in mid-training; of each metric the last way
    of measuring (protocol, images), never a mix; of rows written twice the newer. UserError if two files hold
    different checkpoints of one name.
    """
    rows: list[Row] = []
    owners: dict[str, tuple[Path, str | None]] = {}  # model -> its file and checkpoint
    for path in dict.fromkeys(paths):
        found = _read_rows(path)
        checkpoint = {row.model: row.checkpoint_sha256 for row in found}
        for model, sha256 in checkpoint.items():
            other, its = owners.setdefault(model, (path, sha256))
            if its != sha256:
                remedy = "judge one again under another name (evaluate.py --checkpoint NAME=...)"
                raise UserError(f"--report: {other} and {path} hold two different models called {model}; {remedy}")
        rows += [row for row in found if row.checkpoint_sha256 == checkpoint[row.model]]
    measured = [((row.model, row.dataset, row.metric), (row.key, row.protocol), row) for row in rows]
    last_way = {what: way for what, way, _ in measured}
    newest = {(*what, row.seed): row for what, way, row in measured if way == last_way[what]}
    return with_v2_mean(list(newest.values()))


def _read_rows(path: Path) -> list[Row]:
    if not path.is_file():
        raise UserError(f"--report: no file {path}; give results.jsonl files that evaluate.py wrote")
    values = read_jsonl(path, Any, "--report")
    if not values:
        raise UserError(f"--report: {path} holds no result; run evaluate.py on its checkpoint first")
    rows = []
    for value in values:
        try:
            rows.append(row := msgspec.convert(value, Row))
        except msgspec.ValidationError as error:
            remedy = "is it a results.jsonl? If so, remove the line and run evaluate.py again"
            raise UserError(f"--report: {path} has a line that is no result ({error}); {remedy}") from None
        row.folder = str(path.parent)
        for name in (row.model, row.dataset, row.metric):
            safe_label(name, f"--report: {path}")
    return rows


def dataset_root(data: Path) -> Path | None:
    """The generated dataset at DATA, which may also name its folder of images or shards; None for other images."""
    roots = (data, data.parent) if data.name in ("train", "shards") else (data,)
    return next((root for root in roots if is_file(root / "dataset.json")), None)


def read_record(path: Path, kind: type[Record]) -> Record | None:
    """The record of KIND at PATH; None where there is no file."""
    return read_json(path, kind) if is_file(path) else None


def read_sidecars(folder: Path) -> list[Sidecar]:
    """The close looks beside a results.jsonl; those of linear probes hold no classes."""
    return [read_json(path, Sidecar, JUDGE_AGAIN) for path in sorted((folder / "eval").glob("*.json"))]


def provenance(made: Sequence[Made]) -> dict[str, Any]:
    """{"commands": [...], "versions": {...}} as MADE, in the flow's order, recorded them; the last environment."""
    environment = next((one.environment for one in reversed(made) if one.environment), Environment())
    versions: dict[str, Any] = {name: version for name, version in environment.packages.items() if version}
    for key in Environment.__struct_fields__[1:]:
        if value := getattr(environment, key):
            versions[key.replace("_", " ")] = ", ".join(value) if isinstance(value, list) else value
    return {"commands": list(dict.fromkeys(one.command for one in made if one.command)), "versions": versions}
