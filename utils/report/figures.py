"""The figures of a report: training curves, per-class accuracy, confusion, the images themselves, the radar plot."""

import base64
import io
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from utils.cli import UserError
from utils.images import LOOK, BadImage, Curve, contact_sheet, decode_rgb, draw_curves, drop_strays, list_image_folder
from utils.report.measures import evenly
from utils.report.records import Described, Epoch, Interval, Sidecar, read_record
from utils.storage import atomic_path, read_jsonl

# (folder) -> (class id, file names) ... of a generated dataset's manifests, None for other folders
Manifests = Callable[[Path], Iterable[tuple[str, Iterable[str]]] | None]
MAX_CLASSES = 20  # classes that a page still shows whole
SHEET_COLUMNS, SHEET_SIDE = 10, 64  # images a class and source; pixels of each
# The paper's page draws the model of real images in blue and that of synthetic ones in red, whatever their order. The
# first two shades of each can be told apart by colour-blind readers.
COLORS = {
    "real": ("#2166ac", "#67a9cf", "#053061", "#35978f"),
    "synthetic": ("#d6303a", "#f4a582", "#7f0d1a", "#e7298a", "#b15928"),
    "mixed": ("#7b3294", "#b58bc9"),
    "": ("#e08214", "#1b9e77", "#8c6d31", "#555555"),  # not known, such as a model of torchvision
}


def training_curves(models: Mapping[str, tuple[str, Sequence[Path]]]) -> str | None:
    """SVG of loss and top-1 by epoch, one line a run, from log.jsonl; None if no run left a log."""
    panels: dict[str, tuple[str, list[Curve]]] = {"training loss": ("epoch", []), "training top-1 (%)": ("epoch", [])}
    for name, (color, folders) in models.items():
        for folder in folders:
            lines = read_jsonl(folder / "log.jsonl", Epoch | Interval, "--report")
            epochs = [line for line in lines if isinstance(line, Epoch)]
            for (_, curves), key in zip(panels.values(), ("loss", "top1"), strict=True):
                if epochs:
                    curves.append((name, [one.epoch for one in epochs], [getattr(one, key) for one in epochs], color))
    if not panels["training loss"][1]:
        return None
    drawn = draw_curves(panels, "svg").decode()
    return drawn[drawn.index("<svg") :]


def close_looks(models: Mapping[str, Sequence[Sidecar]]) -> list[dict[str, Any]]:
    """Per-class accuracy and confusion of each dataset, see shown_look. MODELS: name -> the sidecars of its runs."""
    looks: dict[str, dict[str, list[Sidecar]]] = {}
    for name, sidecars in models.items():
        for found in sidecars:
            if found.per_class:
                looks.setdefault(found.dataset, {}).setdefault(name, []).append(found)
    return [shown_look(dataset, runs) for dataset, runs in looks.items()]


def shown_look(dataset: str, models: Mapping[str, Sequence[Sidecar]]) -> dict[str, Any]:
    """{dataset, models: [{name, runs, confusion}], classes: [{id, name, n, top1: [percent a model]}], labels, cut}

    Counts are summed over a model's runs. Of more than MAX_CLASSES classes those that the first model knows worst are
    shown, without the matrix.
    """
    first = next(iter(models.values()))[0]
    sidecars = [one for runs in models.values() for one in runs]
    names = {
        one: name.split(",")[0] for its in sidecars for one, name in zip(its.class_ids, its.class_names, strict=True)
    }
    top1 = [mean_top1(runs) for runs in models.values()]
    images = {score.id: score.n for score in first.per_class if score.n}
    ids, cut = list(images), len(images) > MAX_CLASSES
    if cut:
        ids = sorted(ids, key=lambda class_id: top1[0][class_id])[:MAX_CLASSES]
    return {
        "dataset": dataset,
        "cut": cut,
        "labels": [names[class_id] for class_id in first.class_ids],
        "classes": [
            {"id": one, "name": names[one], "n": images[one], "top1": [its.get(one) for its in top1]} for one in ids
        ],
        "models": [
            {"name": name, "runs": len(runs), "confusion": None if cut else shares(runs, first.class_ids)}
            for name, runs in models.items()
        ],
    }


def mean_top1(runs: Sequence[Sidecar]) -> dict[str, float]:
    """Class id -> percent of its images that RUNS recognised."""
    right: defaultdict[str, float] = defaultdict(float)
    n: Counter[str] = Counter()
    for score in (score for one in runs for score in one.per_class if score.n):
        n[score.id] += score.n
        right[score.id] += score.n * (score.top1 or 0) / 100
    return {class_id: 100 * right[class_id] / n[class_id] for class_id in n}


def shares(runs: Sequence[Sidecar], class_ids: list[str]) -> list[list[dict[str, Any]]] | None:
    """RUNS' confusion as counts and shares of the rows (the real class); None if they know other classes or none."""
    matrices = [one.confusion for one in runs if one.confusion is not None and one.class_ids == class_ids]
    if not matrices:
        return None
    matrix = np.array(matrices, dtype=np.int64).sum(0)
    parts = matrix / np.maximum(1, matrix.sum(1, keepdims=True))
    return [
        [{"count": int(k), "share": float(p)} for k, p in zip(*row, strict=True)]
        for row in zip(matrix, parts, strict=True)
    ]


# ===== pictures =====


class Folder:
    """Images by class: ids, (path, label) samples without strays, the rows of each class, and the classes' names."""

    def __init__(self, folder: str | Path, option: str, manifests: Manifests) -> None:
        self.folder = Path(folder)
        train = self.folder / "train"
        ids, samples = list_image_folder(train if train.is_dir() else self.folder, option)
        self.samples = drop_strays(samples, manifests(self.folder), option)
        labels = np.array([label for _, label in self.samples])
        rows = {class_id: np.flatnonzero(labels == label) for label, class_id in enumerate(ids)}
        self.rows = {class_id: its for class_id, its in rows.items() if len(its)}
        self.ids = list(self.rows)
        if not self.ids:
            raise UserError(f"{option}: no image of {folder} is in its manifests; draw it with generate.py first")
        described = read_record(self.folder / "dataset.json", Described)
        self.names = described.names if described else {}

    def of_classes(self, ids: list[str]) -> np.ndarray:
        """The rows of those of IDS that are here."""
        return np.concatenate([self.rows[class_id] for class_id in self.ids if class_id in set(ids)])

    def strip(self, class_id: str, most: int, option: str) -> str:
        """`strip` of at most MOST images of a class, at even distances."""
        return strip([self.samples[row][0] for row in evenly(self.rows[class_id], most)], option)


def contact_sheets(shown: Sequence[tuple[str, Path]], manifests: Manifests) -> list[dict[str, Any]]:
    """[{id, name, strips: [{source, prompt, picture}]}]: the same classes of several datasets, one under the other."""
    sheets: dict[str, dict[str, Any]] = {}
    for source, path in shown:
        folder = Folder(path, "--show-data", manifests)
        for class_id, rows in folder.rows.items():
            if class_id not in sheets and len(sheets) >= MAX_CLASSES:
                continue
            sheet = sheets.setdefault(class_id, {"id": class_id, "name": "", "strips": []})
            sheet["name"] = sheet["name"] or folder.names.get(class_id, "").split(",")[0]
            prompts = read_jsonl(path / "manifest" / f"{class_id}.jsonl")[:1]
            prompt = prompts[0].get("prompt") if prompts else None
            picture = folder.strip(class_id, SHEET_COLUMNS, "--show-data")
            sheet["strips"].append({"source": source, "prompt": prompt, "picture": picture, "n": len(rows)})
    return list(sheets.values())


def strip(paths: Sequence[str], option: str) -> str:
    """A data URI of the images side by side, each fitted into a square. UserError that names OPTION for a bad one."""
    fitted = []
    for path in paths:
        try:
            image = Image.fromarray(decode_rgb(path))
        except BadImage as error:
            raise UserError(f"{option}: {error}; remove the file, or draw it again with generate.py --repair") from None
        fitted.append(np.asarray(ImageOps.fit(image, (SHEET_SIDE, SHEET_SIDE), Image.Resampling.LANCZOS)))
    buffer = io.BytesIO()
    sheet = contact_sheet([("", fitted)], SHEET_SIDE, len(fitted), gap=2, paper="#808080")
    Image.fromarray(sheet).save(buffer, "WEBP", quality=85, method=6)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


# ===== radar =====


@dataclass(frozen=True)
class RadarLine:
    """A model's polygon. VALUES: axis -> percent; one that lacks axes is not filled, and its corners are joined."""

    label: str
    color: str
    values: Mapping[str, float]
    dashed: bool = False


def draw_radar(axes: Sequence[str], lines: Sequence[RadarLine], svg: Path, png: Path) -> None:
    """The plot as transparent SVG, for screens, and white PNG, for print. AXES: three names or more, clockwise."""
    import matplotlib  # here: half a second, which only reports with a radar plot should wait for

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.projections.polar import PolarAxes

    angles = [2 * math.pi * position / len(axes) for position in range(len(axes))]
    # A fixed salt: the same bytes for the same numbers.
    look: Any = {"svg.hashsalt": "radar", "svg.fonttype": "path", "grid.alpha": 0.35, "grid.linewidth": 0.7}
    with matplotlib.rc_context(LOOK | look):
        figure, plot = pyplot.subplots(figsize=(7, 6.4), subplot_kw={"polar": True})
        assert isinstance(plot, PolarAxes)
        plot.set_theta_offset(math.pi / 2)
        plot.set_theta_direction(-1)
        plot.set_xticks(angles, axes)
        for label, angle in zip(plot.get_xticklabels(), angles, strict=True):
            label.set_horizontalalignment(
                "left" if math.sin(angle) > 0.1 else "right" if math.sin(angle) < -0.1 else "center"
            )
        plot.set_ylim(0, 100)
        plot.set_yticks([20, 40, 60, 80, 100], ["20", "40", "60", "80", "100"])
        handles = []
        for line in lines:
            known = [
                (angle, line.values[axis]) for angle, axis in zip(angles, axes, strict=True) if axis in line.values
            ]
            corners = list(zip(*known, known[0], strict=True))
            style: Any = {"color": line.color, "linestyle": "--" if line.dashed else "-", "linewidth": 2}
            handles += plot.plot(*corners, marker="o", markersize=4 if len(known) > 1 else 8, **style)
            if len(known) == len(axes):
                plot.fill(*corners, color=line.color, alpha=0.12)
        below: Any = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.1), "ncols": 1 + (len(lines) > 4)}
        plot.legend(handles, [line.label for line in lines], **below)
        whole: Any = {"bbox_inches": "tight", "pad_inches": 0.15}  # however long the labels are
        with atomic_path(svg) as temporary:
            figure.savefig(temporary, format="svg", transparent=True, metadata={"Date": None}, **whole)
        with atomic_path(png) as temporary:
            figure.savefig(temporary, format="png", dpi=150, facecolor="white", **whole)
        pyplot.close(figure)
