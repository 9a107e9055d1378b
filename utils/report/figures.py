"""The close look of a report: training curves, per-class accuracy, confusion, and the images themselves."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.cli import UserError
from utils.images import BadImage, decode_rgb, list_image_folder
from utils.report.radar import INK
from utils.storage import read_json, read_jsonl

MAX_CLASSES = 20  # classes that a page still shows whole
SHEET_COLUMNS, SHEET_SIDE = 10, 64  # images a class and source; pixels of each


def training_curves(models: Mapping[str, tuple[str, Sequence[Path]]]) -> str | None:
    """SVG of loss and top-1 by epoch, one line a run, from log.jsonl; None if no run left a log."""
    logs = []
    for name, (color, folders) in models.items():
        for folder in folders:
            epochs = [line for line in read_jsonl(folder / "log.jsonl") if line.get("kind") == "epoch"]
            if epochs:
                logs.append((name, color, epochs))
    if not logs:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": "curves", "font.size": 11}):
        figure, plots = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
        for plot, key, label in zip(plots, ("loss", "top1"), ("training loss", "training top-1 (%)"), strict=True):
            named = set()
            for name, color, epochs in logs:
                x, y = [line["epoch"] for line in epochs], [line[key] for line in epochs]
                plot.plot(x, y, color=color, linewidth=1.4, alpha=0.85, label=None if name in named else name)
                named.add(name)
            plot.set_xlabel("epoch", color=INK)
            plot.set_title(label, color=INK, fontsize=11)
            plot.tick_params(colors=INK)
            plot.grid(color=INK, alpha=0.25, linewidth=0.6)
            for spine in plot.spines.values():
                spine.set_color(INK)
        for text in plots[0].legend(frameon=False).get_texts():
            text.set_color(INK)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        pyplot.close(figure)
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def close_looks(models: Mapping[str, tuple[Sequence[Path], set[str]]]) -> list[dict[str, Any]]:
    """Per-class accuracy and confusion of each dataset, from eval/*.json; counts are summed over a model's seeds.

    MODELS: name -> (folders of its results, sha256 of its checkpoints); a folder may hold other models' files too.
    With more than MAX_CLASSES classes the worst ones of the first model are shown, without the matrix.
    """
    looks: dict[str, dict[str, Any]] = {}
    for name, (folders, checkpoints) in models.items():
        for folder in folders:
            for path in sorted((folder / "eval").glob("*.json")):
                found = read_json(path)
                if not found.get("per_class") or found["checkpoint_sha256"] not in checkpoints:
                    continue
                look = looks.setdefault(found["dataset"], {"dataset": found["dataset"], "models": {}, "names": {}})
                look["names"] |= dict(zip(found["class_ids"], found["class_names"], strict=True))
                mine = look["models"].setdefault(
                    name, {"ids": found["class_ids"], "correct": {}, "n": {}, "images": {}, "confusion": None}
                )
                for row in found["per_class"]:
                    class_id, n = row["id"], row["n"]
                    mine["images"][class_id] = n
                    mine["n"][class_id] = mine["n"].get(class_id, 0) + n  # over seeds
                    mine["correct"][class_id] = mine["correct"].get(class_id, 0) + n * row["top1"] / 100
                if found["class_ids"] == mine["ids"]:
                    add_confusion(mine, found.get("confusion"))
    return [shown_look(look) for look in looks.values()]


def add_confusion(mine: dict[str, Any], matrix: list[list[int]] | None) -> None:
    if matrix is None:
        return
    if mine["confusion"] is None:
        mine["confusion"] = matrix
    else:
        pairs = zip(mine["confusion"], matrix, strict=True)
        mine["confusion"] = [[a + b for a, b in zip(ours, more, strict=True)] for ours, more in pairs]


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


def shares(matrix: list[list[int]] | None) -> list[list[dict[str, float]]] | None:
    """Each cell as count and share of its row (the real class)."""
    if matrix is None:
        return None
    return [[{"count": count, "share": count / max(1, sum(row))} for count in row] for row in matrix]


# ===== pictures =====


def contact_sheets(shown: Sequence[tuple[str, Path]]) -> list[dict[str, Any]]:
    """[{id, name, strips: [{source, prompt, picture}]}]: the same classes of several datasets, one under the other.

    Images are taken at even distances through a class; pictures are data URIs of one WebP strip each.
    """
    sheets: dict[str, dict[str, Any]] = {}
    for source, folder in shown:
        root = folder / "train" if (folder / "train").is_dir() else folder
        ids, samples = list_image_folder(root, "--show-data")
        described = read_json(folder / "dataset.json") if (folder / "dataset.json").is_file() else {}
        names = {row["id"]: row.get("name", "") for row in described.get("classes", [])}
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
    from PIL import Image, ImageOps

    side, gap = SHEET_SIDE, 2
    picture = Image.new("RGB", (len(paths) * (side + gap) - gap, side), (128, 128, 128))
    for position, path in enumerate(paths):
        try:
            image = Image.fromarray(decode_rgb(path))
        except BadImage as error:
            raise UserError(
                f"--show-data: {error}; remove the file, or draw it again with generate.py --repair"
            ) from None
        picture.paste(ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS), (position * (side + gap), 0))
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=85, method=6)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


# ===== how it was made =====


def provenance(runs: Sequence[Path], shown: Sequence[tuple[str, Path]]) -> dict[str, Any]:
    """{"commands": [...], "versions": {...}} as the files beside the results recorded them, in the flow's order."""
    commands: list[str] = []
    environment: dict[str, Any] = {}
    files = [folder / "dataset.json" for _, folder in shown] + [run / "args.json" for run in runs]
    files += [path for run in runs for path in sorted((run / "eval").glob("*.json"))]
    for path in files:
        if path.is_file():
            recorded = read_json(path)
            environment = recorded.get("environment") or environment
            command = recorded.get("command")
            if command and command not in commands:
                commands.append(command)
    packages = environment.get("packages", {})
    versions = {name: version for name, version in packages.items() if version}
    for key in ("python", "git_commit", "image_digest", "cpu", "cores", "gpus", "driver"):
        if environment.get(key):
            value = environment[key]
            versions[key.replace("_", " ")] = ", ".join(value) if isinstance(value, list) else value
    return {"commands": commands, "versions": versions}
