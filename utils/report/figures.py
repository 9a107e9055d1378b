"""The figures of a report: training curves, per-class accuracy, confusion, the images themselves, the radar plot."""

from __future__ import annotations

import base64
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from utils.cli import UserError
from utils.images import INK, BadImage, Curve, contact_sheet, decode_rgb, draw_curves, list_image_folder
from utils.report.records import read_described, read_epochs, read_sidecars
from utils.storage import atomic_path, read_jsonl

MAX_CLASSES = 20  # classes that a page still shows whole
SHEET_COLUMNS, SHEET_SIDE = 10, 64  # images a class and source; pixels of each
# The paper's page draws the model of real images in blue and that of synthetic ones in red. Both stay apart from each
# other for colour-blind readers; further models follow matplotlib's order.
COLORS = ("#2166ac", "#d6303a", "#e08214", "#1b9e77", "#7b3294", "#8c6d31")


def training_curves(models: Mapping[str, tuple[str, Sequence[Path]]]) -> str | None:
    """SVG of loss and top-1 by epoch, one line a run, from log.jsonl; None if no run left a log."""
    panels: dict[str, tuple[str, list[Curve]]] = {"training loss": ("epoch", []), "training top-1 (%)": ("epoch", [])}
    for name, (color, folders) in models.items():
        for folder in folders:
            epochs = read_epochs(folder)
            for (_, curves), key in zip(panels.values(), ("loss", "top1"), strict=True):
                if epochs:
                    curves.append((name, [one.epoch for one in epochs], [getattr(one, key) for one in epochs], color))
    if not panels["training loss"][1]:
        return None
    drawn = draw_curves(panels, "svg").decode()
    return drawn[drawn.index("<svg") :]


def close_looks(models: Mapping[str, tuple[Sequence[Path], set[str]]]) -> list[dict[str, Any]]:
    """Per-class accuracy and confusion of each dataset, from eval/*.json; counts are summed over a model's seeds.

    MODELS: name -> (folders of its results, sha256 of its checkpoints); a folder may hold other models' files too.
    With more than MAX_CLASSES classes the worst ones of the first model are shown, without the matrix.
    """
    looks: dict[str, dict[str, Any]] = {}
    for name, (folders, checkpoints) in models.items():
        for found in (one for folder in folders for one in read_sidecars(folder)):
            if found.checkpoint_sha256 not in checkpoints:
                continue
            look = looks.setdefault(found.dataset, {"dataset": found.dataset, "models": {}, "names": {}})
            look["names"] |= dict(zip(found.class_ids, found.class_names, strict=True))
            mine = look["models"].setdefault(
                name, {"ids": found.class_ids, "correct": Counter(), "n": Counter(), "images": {}, "confusion": None}
            )
            for row in found.per_class:
                mine["images"][row.id] = row.n
                mine["n"][row.id] += row.n  # over seeds
                mine["correct"][row.id] += row.n * (row.top1 or 0) / 100
            if found.class_ids == mine["ids"] and found.confusion is not None:
                matrix = np.array(found.confusion, dtype=np.int64)
                mine["confusion"] = matrix if mine["confusion"] is None else mine["confusion"] + matrix
    return [shown_look(look) for look in looks.values()]


def shown_look(look: dict[str, Any]) -> dict[str, Any]:
    """{dataset, models: [{name, confusion}], classes: [{id, name, n, top1: [percent a model]}], labels, cut}"""
    models = look["models"]
    first = next(iter(models.values()))
    ids = [class_id for class_id in first["n"] if first["n"][class_id]]
    accuracy = {
        class_id: [
            100 * mine["correct"][class_id] / mine["n"][class_id] if mine["n"].get(class_id) else None
            for mine in models.values()
        ]
        for class_id in ids
    }
    cut = len(ids) > MAX_CLASSES
    if cut:
        ids = sorted(ids, key=lambda class_id: first["correct"][class_id] / first["n"][class_id])[:MAX_CLASSES]
    names = {class_id: name.split(",")[0] for class_id, name in look["names"].items()}
    return {
        "dataset": look["dataset"],
        "cut": cut,
        "labels": [names[class_id] for class_id in first["ids"]],
        "classes": [
            {"id": class_id, "name": names[class_id], "n": first["images"][class_id], "top1": accuracy[class_id]}
            for class_id in ids
        ],
        "models": [
            {"name": name, "confusion": None if cut or mine["ids"] != first["ids"] else shares(mine["confusion"])}
            for name, mine in models.items()
        ],
    }


def shares(matrix: np.ndarray | None) -> list[list[dict[str, Any]]] | None:
    """Each cell as count and share of its row (the real class)."""
    if matrix is None:
        return None
    totals = np.maximum(1, matrix.sum(1, keepdims=True))
    rows = zip(matrix.tolist(), (matrix / totals).tolist(), strict=True)
    return [
        [{"count": count, "share": share} for count, share in zip(counts, parts, strict=True)] for counts, parts in rows
    ]


# ===== pictures =====


def contact_sheets(shown: Sequence[tuple[str, Path]]) -> list[dict[str, Any]]:
    """[{id, name, strips: [{source, prompt, picture}]}]: the same classes of several datasets, one under the other.

    Images are taken at even distances through a class; pictures are data URIs of one WebP strip each.
    """
    sheets: dict[str, dict[str, Any]] = {}
    for source, folder in shown:
        root = folder / "train" if (folder / "train").is_dir() else folder
        ids, samples = list_image_folder(root, "--show-data")
        described = read_described(folder)
        names = described.names if described else {}
        for label, class_id in enumerate(ids):
            if class_id not in sheets and len(sheets) >= MAX_CLASSES:
                continue
            paths = [path for path, its_label in samples if its_label == label]
            step = max(1, len(paths) // SHEET_COLUMNS)
            prompts = read_jsonl(folder / "manifest" / f"{class_id}.jsonl")[:1]
            sheet = sheets.setdefault(class_id, {"id": class_id, "name": "", "strips": []})
            sheet["name"] = sheet["name"] or names.get(class_id, "").split(",")[0]
            prompt = prompts[0].get("prompt") if prompts else None
            sheet["strips"].append(
                {"source": source, "prompt": prompt, "picture": strip(paths[::step][:SHEET_COLUMNS]), "n": len(paths)}
            )
    return list(sheets.values())


def strip(paths: Sequence[str]) -> str:
    """A data URI of the images side by side, each fitted into a square."""
    fitted = []
    for path in paths:
        try:
            image = Image.fromarray(decode_rgb(path))
        except BadImage as error:
            raise UserError(
                f"--show-data: {error}; remove the file, or draw it again with generate.py --repair"
            ) from None
        fitted.append(np.asarray(ImageOps.fit(image, (SHEET_SIDE, SHEET_SIDE), Image.Resampling.LANCZOS)))
    buffer = io.BytesIO()
    sheet = contact_sheet([("", fitted)], SHEET_SIDE, len(fitted), gap=2, paper="#808080")
    Image.fromarray(sheet).save(buffer, "WEBP", quality=85, method=6)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


# ===== radar =====


def draw_radar(
    axes: Sequence[str], models: Mapping[str, Mapping[str, float]], svg: Path, png: Path, colors: Mapping[str, str]
) -> None:
    """Write the plot as SVG (transparent, for screens of any colour) and PNG (white, for print).

    AXES: names, clockwise from the top; at least three. MODELS: model -> {axis: percent}; a polygon skips an axis
    that its model lacks. COLORS: model -> colour.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.projections.polar import PolarAxes

    angles = [2 * math.pi * position / len(axes) for position in range(len(axes))]
    # A fixed salt: the same bytes for the same numbers.
    with matplotlib.rc_context(
        {"svg.hashsalt": "radar", "svg.fonttype": "path", "font.size": 11, "text.parse_math": False}
    ):
        figure, plot = pyplot.subplots(figsize=(7, 6.4), subplot_kw={"polar": True}, layout="constrained")
        assert isinstance(plot, PolarAxes)
        plot.set_theta_offset(math.pi / 2)
        plot.set_theta_direction(-1)
        plot.set_xticks(angles, axes)
        plot.set_ylim(0, 100)
        plot.set_yticks([20, 40, 60, 80, 100], ["20", "40", "60", "80", "100"])
        plot.tick_params(colors=INK)
        plot.grid(color=INK, alpha=0.35, linewidth=0.7)
        plot.spines["polar"].set_color(INK)
        for name, values in models.items():
            known = [(angle, values[axis]) for angle, axis in zip(angles, axes, strict=True) if axis in values]
            if not known:
                continue
            closed = [*known, known[0]]
            color = colors[name]
            plot.plot(*zip(*closed, strict=True), color=color, linewidth=2, marker="o", markersize=4, label=name)
            if len(known) == len(axes):
                plot.fill(*zip(*closed, strict=True), color=color, alpha=0.12)
        legend = plot.legend(loc="upper center", bbox_to_anchor=(0.5, -0.07), ncols=2, frameon=False)
        for text in legend.get_texts():
            text.set_color(INK)
        with atomic_path(svg) as temporary:
            figure.savefig(temporary, format="svg", transparent=True, metadata={"Date": None})
        with atomic_path(png) as temporary:
            figure.savefig(temporary, format="png", dpi=150, facecolor="white")
        pyplot.close(figure)
