"""A test set that was read from disk, and how it meets a model: which images count, and which outputs are right.

Three words for hashes, here and in jobs.py: a sha256 is that of one file's bytes; a fingerprint is that of images and
their labels; a key is that of everything a result depends on. Nothing here imports torch: a dry run is instant.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from utils.cli import UserError, few
from utils.images import stat_files
from utils.storage import sha256_json

Samples = Sequence[tuple[str, int]]  # (path, label)


class NoSharedClass(UserError):
    """The set and the model have no class in common."""


@dataclass(frozen=True)
class LoadedSet:
    """A set on disk: images to judge on and, where a linear probe is trained first, images to train it on."""

    name: str
    class_ids: list[str]  # of a set judged by a probe just "0", "1", ...: nobody else's classes are compared with them
    samples: list[tuple[str, int]]  # (path, index into class_ids) to judge on
    trainval: list[tuple[str, int]] = field(default_factory=list)  # to train a probe on
    answers: list[tuple[str, ...]] = field(default_factory=list)  # class -> model classes that count; [] = itself
    sample_answers: list[tuple[str, ...]] = field(default_factory=list)  # the same per image (ReaL); [] = by class
    masked: bool = False  # compare the set's classes only, as its authors do
    border: int = 0  # pixels to cut off every side before anything else

    @property
    def splits(self) -> dict[str, list[tuple[str, int]]]:
        """{"trainval", "test"}: samples of a set judged by a probe; {"test"} of any other."""
        return {"trainval": self.trainval, "test": self.samples} if self.trainval else {"test": self.samples}

    def labels(self, split: str) -> np.ndarray:
        """(N,) labels of the images of a split."""
        return np.array([label for _, label in self.splits[split]])

    @cached_property
    def stamps(self) -> dict[str, np.ndarray]:
        """split -> (N, 2) int64, size and time of change of each image. UserError naming images that are missing."""
        stamps = {split: stat_files([path for path, _ in samples]) for split, samples in self.splits.items()}
        pairs = [pair for split, samples in self.splits.items() for pair in zip(samples, stamps[split], strict=True)]
        if missing := [path for (path, _), (size, _) in pairs if size < 0]:
            what = f"{len(missing):,} of {len(pairs):,} images are missing ({few(missing)})"
            raise UserError(f"{self.name}: {what}; unpack it again")
        return stamps

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the images and of their right answers: a corrected label file gives other results."""
        labels = [label for _, label in self.samples]
        facts: list = [fingerprint(self.samples, self.stamps["test"]), self.class_ids, labels]
        facts += [self.answers, self.sample_answers, self.masked]
        if self.trainval:
            facts += [fingerprint(self.trainval, self.stamps["trainval"]), [label for _, label in self.trainval]]
        return sha256_json(facts)


def fingerprint(samples: Samples, stamps: np.ndarray | None = None) -> str:
    """Hash of what the images are: folder and file name, size and time of change of each (STAMPS, if known already)."""
    digest = hashlib.sha256()
    stamps = stat_files([path for path, _ in samples]) if stamps is None else stamps
    for (path, _), (size, changed) in zip(samples, stamps, strict=True):
        if size < 0:
            raise UserError(f"cannot read {path}; restore the dataset's folder")
        place = "/".join(Path(path).parts[-2:])
        digest.update(f"{place}\0{size}\0{changed}\n".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class MatchedSet:
    """A set seen by one model: images of classes it knows, and right answers as columns of its logits."""

    samples: list[tuple[str, int]]  # (path, index into class_ids)
    rows: np.ndarray  # (N,) their places among the set's samples
    class_ids: list[str]
    columns: np.ndarray  # logits to compare, ascending
    labels: np.ndarray  # (N,) index into columns, or (N, len(columns)) bool where several answers are right
    classes_in_set: int
    images_in_set: int


def match(loaded: LoadedSet, model_ids: Sequence[str]) -> MatchedSet:
    """Cut LOADED to the classes the model knows; NoSharedClass, a UserError, if it knows none.

    A masked set (ImageNet-R, -A) also cuts the model to the classes of the set: with a 100-class model both become
    the classes they share. So do the authors of these sets (Hendrycks et al., ICCV 2021 and CVPR 2021).
    """
    position = {class_id: column for column, class_id in enumerate(model_ids)}
    answers = loaded.answers or [(class_id,) for class_id in loaded.class_ids]
    known = [tuple(position[a] for a in accepted if a in position) for accepted in answers]
    right = [known[label] for _, label in loaded.samples]
    if loaded.sample_answers:
        # An image whose own class the model lacks stays out, even if one of its other labels is known.
        by_sample = [tuple(position[a] for a in accepted if a in position) for accepted in loaded.sample_answers]
        right = [mine if of_class else () for mine, of_class in zip(by_sample, right, strict=True)]
    rows = [row for row, columns in enumerate(right) if columns]
    if not rows:
        theirs = f"{len(model_ids)} ({few(model_ids)})"
        remedy = "--label-map FILE says which are the same (a .tsv with name and id); --classes names outputs"
        raise NoSharedClass(
            f"{loaded.name}: no class of the set ({few(loaded.class_ids)}) is one of the model's {theirs}; {remedy}"
        )
    labels_seen = sorted({loaded.samples[row][1] for row in rows})
    renumbered = {label: index for index, label in enumerate(labels_seen)}
    columns = np.arange(len(model_ids))
    if loaded.masked:
        columns = np.array(sorted({column for label in labels_seen for column in known[label]}))
    place = {int(column): index for index, column in enumerate(columns)}
    if all(len(right[row]) == 1 for row in rows):
        labels = np.array([place[right[row][0]] for row in rows])
    else:
        labels = np.zeros((len(rows), len(columns)), dtype=bool)
        for index, row in enumerate(rows):
            labels[index, [place[column] for column in right[row]]] = True
    return MatchedSet(
        samples=[(loaded.samples[row][0], renumbered[loaded.samples[row][1]]) for row in rows],
        rows=np.array(rows),
        class_ids=[loaded.class_ids[label] for label in labels_seen],
        columns=columns,
        labels=labels,
        classes_in_set=len(loaded.class_ids),
        images_in_set=len(loaded.samples),
    )
