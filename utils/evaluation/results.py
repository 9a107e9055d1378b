"""A line of results.jsonl, one metric of one model on one test set, as evaluate.py and its reports read it again."""

from collections.abc import Sequence
from statistics import fmean
from typing import Annotated

import msgspec

from utils.evaluation.catalog import V2, V2_VARIANTS

Count = Annotated[int, msgspec.Meta(ge=0, le=10**12)]
Percent = Annotated[float, msgspec.Meta(ge=0, le=100)]


class Row(msgspec.Struct):
    """A line of results.jsonl, as evaluate.py writes it: one metric of one model on one dataset, in percent."""

    model: str
    dataset: str
    metric: str
    value: Percent
    low: Percent | None = None  # 95 % interval
    high: Percent | None = None
    n: Count | None = None  # images
    num_classes: Count | None = None
    group: str = "folder"
    seed: int | None = None
    source: str = "measured"  # or "published"
    protocol: str | None = None
    key: str | None = None  # hash of checkpoint, images, labels and protocol
    checkpoint: str | None = None
    checkpoint_sha256: str | None = None
    unfinished: bool = False  # the checkpoint of a run that had not come to its end
    trained_on: str = ""  # of published rows: "real" or "synthetic"
    train_overlap_exact: Count = 0  # test images the model was trained on
    train_overlap_near: Count = 0  # and those it was trained on a copy of, cut, mirrored or encoded otherwise
    folder: str = ""  # of the file; not in it


def with_v2_mean(rows: Sequence[Row]) -> list[Row]:
    """ROWS and, where a model was judged on all three variants of ImageNet-V2, their mean as "IN-v2".

    Its interval is the mean of theirs, which holds however many images the variants share. Rows named IN-v2 that were
    measured are of an earlier version, which knew the matched-frequency variant alone.
    """
    rows = list(rows)
    found: dict[tuple, dict[str, Row]] = {}
    for place, row in enumerate(rows):
        if (row.dataset, row.source) == (V2, "measured"):
            row = rows[place] = msgspec.structs.replace(row, dataset=V2_VARIANTS[0])
        if row.dataset in V2_VARIANTS:
            kind = (row.model, row.checkpoint_sha256, row.metric, row.seed, row.num_classes)
            found.setdefault(kind, {})[row.dataset] = row
    for three in (list(some.values()) for some in found.values() if len(some) == len(V2_VARIANTS)):
        value = fmean(row.value for row in three)
        bounds = [(row.low, row.high) for row in three if row.low is not None and row.high is not None]
        low, high = map(fmean, zip(*bounds, strict=True)) if len(bounds) == len(three) else (None, None)
        n = sum(row.n or 0 for row in three)
        rows.append(msgspec.structs.replace(three[0], dataset=V2, value=value, low=low, high=high, n=n, key=None))
    return rows
