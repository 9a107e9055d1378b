"""A look at a synthetic dataset before anything is trained: counts, near-duplicates, diversity, distance to real ones.

Images are described by the features of a checkpoint (--checkpoint) or, without one, by small grey thumbnails, which
suffice to find duplicates. What is measured against real images (--real, needs a checkpoint) stands in measures.py. FID
and KID are over all images, the others class by class, since a classifier learns classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from utils.cli import UserError, command_line
from utils.evaluation import checkpoints
from utils.images import BadImage, decode_rgb
from utils.machine import snapshot
from utils.report import measures
from utils.report.figures import Folder, Manifests, strip
from utils.storage import require_writable, write_json, write_page

THUMBNAIL = 16  # pixels a side of the descriptor without a checkpoint
PICTURES = 8  # images a class shown, from the least typical duplicates on
FIRST_CLASSES, LAST_CLASSES = 80, 20  # of the order, shown in pictures
COLUMNS = ("images", "duplicates", "diversity", "precision", "recall", "density", "coverage")


@dataclass(frozen=True)
class Network:
    """The checkpoint whose features describe the images, and how they are computed; values as evaluate.py's options."""

    checkpoint: str
    device: str
    dtype: str
    interpolation: str | None
    batch_size: int
    workers: int


def run(
    dataset: str, real_folder: str | None, network: Network | None, out: Path, dry_run: bool, manifests: Manifests
) -> int:
    """`evaluate.py --dataset-report DATASET [--real DIR] [--checkpoint MODEL]`. Returns the exit code."""
    # ===== finding the images =====
    synthetic = Folder(dataset, "--dataset-report", manifests)
    real = Folder(real_folder, "--real", manifests) if real_folder else None
    if real and not network:
        raise UserError("--real: comparing with real images needs features; give --checkpoint MODEL, such as resnet50")
    if real and not set(real.ids) & set(synthetic.ids):
        raise UserError(f"--real {real_folder}: none of its classes ({real.ids[0]}, ...) is in {dataset}")
    if dry_run:
        counts = f"{len(synthetic.samples):,} images of {len(synthetic.ids)} classes"
        print(f"{counts}, to compare with {real_folder or 'none'}")
        return 0
    require_writable(out, "--out")

    # ===== describing them =====
    describe, descriptor = descriptor_of(network, out)
    described = {"synthetic": describe(synthetic)}
    if real:
        described["real"] = describe(real)
    if network and not all(map(measures.is_finite, described.values())):
        raise UserError(f"--checkpoint {network.checkpoint}: its features are not finite; try --dtype fp32, or another")

    # ===== measuring =====
    centre = measures.moments(described["synthetic"])[0].astype(np.float32)
    classes = [measure_class(class_id, synthetic, real, described, centre) for class_id in synthetic.ids]
    classes.sort(key=worst_first)
    totals = summarize(classes)
    if real:
        both = [
            (described["synthetic"], synthetic.of_classes(real.ids)),
            (described["real"], real.of_classes(synthetic.ids)),
        ]
        some = [features[measures.evenly(rows, measures.MOST_IMAGES)] for features, rows in both]
        totals |= {
            "FID": measures.frechet_distance(*(measures.moments(*one) for one in both)),
            "KID": measures.kernel_distance(*some),
        }

    # ===== telling =====
    record = {
        "dataset": dataset,
        "real": real_folder,
        "descriptor": descriptor,
        "totals": totals,
        "classes": classes,
        "missing_classes": sorted(set(real.ids) - set(synthetic.ids)) if real else [],
        "command": command_line(),
        "environment": snapshot(),
    }
    write_json(out / "dataset_report.json", record)
    first, last = FIRST_CLASSES, LAST_CLASSES
    shown = classes if len(classes) <= first + last else classes[:first] + classes[-last:]
    write_page(
        out / "dataset_report.html",
        "report/dataset_quality.html.j2",
        **record,
        shown=pictures(shown, synthetic, real),
        columns=[column for column in COLUMNS if any(row.get(column) is not None for row in classes)],
        cut=measures.DUPLICATE,
        first=first,
        last=last,
        text=as_text,
    )
    for name, value in totals.items():
        print(f"{name:12} {as_text(value)}")
    print(f"written: {out / 'dataset_report.html'}\nwritten: {out / 'dataset_report.json'}")
    return 0


def descriptor_of(network: Network | None, out: Path) -> tuple[Callable[[Folder], np.ndarray], str]:
    """(function: Folder -> (N, D) float32 descriptors, what they are)."""
    if not network:
        return thumbnails, f"grey thumbnails of {THUMBNAIL} x {THUMBNAIL} pixels"
    from utils.evaluation.features import Extractor  # here: torch takes seconds to start
    from utils.evaluation.jobs import number_format
    from utils.evaluation.weights import load_classifier
    from utils.machine import resolve_device, resolve_dtype

    source = checkpoints.locate(network.checkpoint)
    classifier = load_classifier(source)
    device = resolve_device(network.device)
    dtype = resolve_dtype(number_format(network.dtype, network.device), device)
    extract = Extractor(classifier.backbone, source.sha256, device, dtype, network.batch_size, network.workers)
    transform = checkpoints.transform_of(source)
    if network.interpolation:
        transform = replace(transform, interpolation=network.interpolation)

    def describe(folder: Folder) -> np.ndarray:
        return extract(folder.samples, transform, out / "features", f"{source.label} on {folder.folder}")

    return describe, f"features of {source.label} ({source.sha256[:12]})"


def thumbnails(folder: Folder) -> np.ndarray:
    """(N, THUMBNAIL^2) float32 grey values, each image with mean 0."""
    from PIL import Image
    from tqdm import tqdm

    rows = np.empty((len(folder.samples), THUMBNAIL**2), dtype=np.float32)
    for row, (path, _) in enumerate(tqdm(folder.samples, unit="img", leave=False, disable=None)):
        try:
            grey = Image.fromarray(decode_rgb(path, min_height=THUMBNAIL, min_width=THUMBNAIL)).convert("L")
        except BadImage as error:
            raise UserError(f"damaged image {error}; generate.py --repair draws it again") from None
        small = np.asarray(grey.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX), dtype=np.float32).ravel()
        rows[row] = small - small.mean()
    return rows


# ===== measures =====


def measure_class(
    class_id: str, synthetic: Folder, real: Folder | None, described: dict, centre: np.ndarray
) -> dict[str, Any]:
    """One row: counts, near-duplicates, diversity, and the neighbourhoods' measures where the class has real images."""
    x = described["synthetic"][synthetic.rows[class_id]].astype(np.float32)
    duplicates, closest = measures.near_duplicates(x - centre)
    first = int(synthetic.rows[class_id][0])
    row: dict[str, Any] = {
        "id": class_id,
        "name": synthetic.names.get(class_id, ""),
        "images": len(x),
        "duplicates": 100 * duplicates / len(x),
        "diversity": measures.diversity(x - centre),
        "closest": [synthetic.samples[first + index][0] for index in closest],
    }
    if real and class_id in real.rows:
        row |= measures.neighbourhoods(described["real"][real.rows[class_id]].astype(np.float32), x)
        row["real_images"] = len(real.rows[class_id])
    return row


def summarize(classes: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums of counts, means over classes of the rest."""
    counts = [row["images"] for row in classes]
    totals = {"classes": len(counts), "images": sum(counts), "fewest": min(counts), "most": max(counts)}
    for column in COLUMNS[1:]:
        known = [row[column] for row in classes if row.get(column) is not None]
        if known:
            totals[column] = float(np.mean(known))
    return totals


def worst_first(row: dict[str, Any]) -> tuple:
    """Where real images are known, those least like them first; then most near-duplicates, least varied, by id."""
    likeness = row.get("coverage", 101), row.get("precision", 101)
    return *likeness, -row["duplicates"], row["diversity"] or 0, row["id"]


# ===== telling =====


def as_text(value: Any) -> str:
    """A number for people: counts in full, measures to four digits, "" for what is not known."""
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def pictures(classes: Sequence[dict[str, Any]], synthetic: Folder, real: Folder | None) -> list[dict[str, Any]]:
    """[{row, strips: [(name, data URI)]}] of CLASSES: their images, real ones, the pair most alike."""
    shown = []
    for row in classes:
        strips = [("synthetic", synthetic.strip(row["id"], PICTURES, "--dataset-report"))]
        if real and row["id"] in real.rows:
            strips.append(("real", real.strip(row["id"], PICTURES, "--real")))
        if row["duplicates"] > 0:
            strips.append(("most alike", strip(row["closest"], "--dataset-report")))
        shown.append({"row": row, "strips": strips})
    return shown
