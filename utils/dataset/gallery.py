"""A look at a dataset: contact sheets of neighbouring classes and OUT/index.html, a gallery to browse and search.

    OUT/index.html                        needs no server: it works from the file system, and without JavaScript
    OUT/preview/sheet_<nnn>.jpg           CLASSES_A_SHEET classes, one a row
    OUT/preview/<id>/<id>_<index>.jpg     thumbnails, loaded when they scroll into view

Images that are missing or cannot be read are left out, so it can be written while jobs run. Imports no torch.
"""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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
SIDE, LABEL_WIDTH = 128, 220  # pixels of a thumbnail, and beside the rows of a contact sheet


def write_gallery(dataset: Dataset) -> Path:
    """Write OUT/preview/ and OUT/index.html and return the latter; what an earlier call wrote is replaced."""
    preview = dataset.root / "preview"
    if preview.is_symlink():
        raise UserError(f"--preview: {preview} is a symlink, and what lies there would be replaced; remove it")
    preview.mkdir(exist_ok=True)
    classes: list[dict] = []
    sheets: list[str] = []
    sheet: list[tuple[str, list[np.ndarray]]] = []
    for row, folder in zip(dataset.info["classes"], tqdm(dataset.folders, unit="class", desc="preview"), strict=True):
        thumbs, done = write_thumbnails(folder, preview / folder.id), folder.done()
        images = [(index, folder.path(index), done.get(index, {})) for index in thumbs]
        classes.append(row | {"done": len(done), "wanted": folder.count, "images": images})
        sheet.append((f"{row['name'].split(',')[0]}\n{folder.id}", list(thumbs.values())))
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


def encode(pixels: np.ndarray) -> bytes:
    """JPEG of uint8 (H, W, 3)."""
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), 88, "RGB", "444", fastdct=False)
