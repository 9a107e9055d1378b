"""A look at a dataset: contact sheets of neighbouring classes and OUT/index.html, a gallery to browse and search.

    OUT/index.html                        needs no server: it works from the file system, and without JavaScript
    OUT/preview/sheet_<nnn>.jpg           CLASSES_A_SHEET classes, one a row
    OUT/preview/<id>/<id>_<index>.jpg     thumbnails, loaded when they scroll into view

Images that are missing or cannot be read are left out, so it can be written while jobs run. Imports no torch.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import numpy as np
import simplejpeg
from PIL import Image
from tqdm import tqdm

from utils.cli import UserError
from utils.dataset.folder import ClassFolder, Dataset
from utils.images import BadImage, contact_sheet, decode_rgb
from utils.storage import atomic_write, write_page

SHOWN_A_CLASS = 24  # images of each class in the gallery: the first ones, so that recipes can be compared
CLASSES_A_SHEET, IMAGES_A_ROW = 10, 10
SIDE = 128  # pixels of a thumbnail
LABEL_WIDTH = 220  # pixels beside the rows of a contact sheet


def write_gallery(dataset: Dataset) -> Path:
    """Write OUT/preview/ and OUT/index.html and return the latter; what an earlier call wrote is replaced."""
    preview = dataset.root / "preview"
    if preview.is_symlink():
        raise UserError(f"--preview: {preview} is a symlink, and what lies there would be replaced; remove it")
    preview.mkdir(exist_ok=True)
    rows = {row["id"]: row for row in dataset.info["classes"]}
    classes: list[dict] = []
    sheets: list[str] = []
    sheet: list[tuple[str, list[np.ndarray]]] = []
    for folder in tqdm(dataset.folders, unit="class", desc="preview"):
        thumbs = write_thumbnails(folder, preview / folder.id)
        classes.append(describe(folder, rows[folder.id], thumbs))
        sheet.append((f"{rows[folder.id]['name'].split(',')[0]}\n{folder.id}", list(thumbs.values())))
        if len(sheet) == CLASSES_A_SHEET or folder is dataset.folders[-1]:
            sheets.append(f"sheet_{len(sheets):03d}.jpg")
            atomic_write(preview / sheets[-1], encode(contact_sheet(sheet, SIDE, IMAGES_A_ROW, LABEL_WIDTH)))
            sheet = []
    return write_page(
        dataset.root / "index.html",
        "dataset/gallery.html.j2",
        name=dataset.info["name"],
        images=sum(item["done"] for item in classes),
        classes=classes,
        sheets=sheets,
        model=dataset.info["model"]["id"],
        recipe=dataset.recipe,
        shown=SHOWN_A_CLASS,
    )


def write_thumbnails(folder: ClassFolder, target: Path) -> dict[int, np.ndarray]:
    """{index: uint8 (h, w, 3), longer side SIDE} of the first images of a class, each also written to TARGET."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)

    def make(index: int) -> tuple[int, np.ndarray | None]:
        try:
            pixels = decode_rgb(folder.path(index), min_height=SIDE, min_width=SIDE)
        except BadImage:  # not drawn yet, or damaged: --verify tells
            return index, None
        image = Image.fromarray(pixels)
        scale = SIDE / max(image.size)
        filter_ = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
        image = image.resize([max(1, round(side * scale)) for side in image.size], filter_)
        atomic_write(target / f"{folder.path(index).stem}.jpg", encode(np.asarray(image)))
        return index, np.asarray(image)

    with ThreadPoolExecutor(4) as pool:
        made = pool.map(make, range(min(folder.count, SHOWN_A_CLASS)))
        return {index: pixels for index, pixels in made if pixels is not None}


def describe(folder: ClassFolder, row: dict, thumbs: Iterable[int]) -> dict:
    """What the page says of one class."""
    entries = folder.entries()
    images = []
    for index in thumbs:
        entry = entries.get(index, {})
        title = f"{folder.id} · image {index}\n{entry.get('prompt', 'prompt not recorded')}\nseed {entry.get('seed')}"
        stem = folder.path(index).stem
        images.append(
            {
                "index": index,
                "href": quote(f"train/{folder.id}/{stem}{folder.suffix}"),
                "thumb": quote(f"preview/{folder.id}/{stem}.jpg"),
                "title": title,
            }
        )
    words = f"{row['id']} {row['name']} {row['hypernym']} {row['definition']}".lower()
    facts = {key: row[key] for key in ("id", "name", "definition")}
    return facts | {"done": len(entries), "wanted": folder.count, "words": words, "images": images}


def encode(pixels: np.ndarray) -> bytes:
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), 88, "RGB", "444", fastdct=False)
