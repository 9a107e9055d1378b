"""Image files and class folders: decoding to uint8 arrays, the label order that everything here shares, and pictures of
many images or of numbers (contact sheets, curves)."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import simplejpeg
from PIL import Image, ImageDraw, ImageFont

from utils.cli import UserError

if TYPE_CHECKING:
    import torch

# Channel statistics of ImageNet's training images, RGB in 0..1 (torchvision's reference values).
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
JPEG_MAGIC = b"\xff\xd8\xff"
INK = "#7d7d7d"  # of drawn figures: grey that reads on white paper and on a dark screen alike


class BadImage(Exception):
    """An image file that cannot be decoded; the message names it."""


def decode_rgb(
    source: str | Path | bytes,
    min_height: int = 0,
    min_width: int = 0,
    name: str | None = None,
    truncated: bool = False,
) -> np.ndarray:
    """Decode an image file (or its bytes) to uint8 RGB, (H, W, 3), at full size unless told what suffices.

    With min_height or min_width a JPEG may come out at 1/2, 1/4 or 1/8 size as long as it stays at least that large:
    libjpeg-turbo then skips most of the work. With truncated a JPEG that ends early is decoded as far as it goes, grey
    below, and named on stderr. Raises BadImage, naming the file.
    """
    name = name or (str(source) if not isinstance(source, bytes) else "image")
    data = None
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
        if data[:3] == JPEG_MAGIC:
            try:
                return simplejpeg.decode_jpeg(data, colorspace="RGB", min_height=min_height, min_width=min_width)
            except ValueError:
                pass  # CMYK and a few odd JPEGs in the wild: Pillow knows them
        with Image.open(io.BytesIO(data)) as image:
            image.load()  # a truncated file raises here
            return np.array(image.convert("RGB"))
    except OSError as error:
        if truncated and data is not None and data[:3] == JPEG_MAGIC:
            try:
                pixels = simplejpeg.decode_jpeg(data, colorspace="RGB", strict=False)
                print(f"truncated image {name}: read as far as it goes", file=sys.stderr, flush=True)
                return pixels
            except ValueError:
                pass
        raise BadImage(f"{name}: {error}") from None
    except (ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadImage(f"{name}: {error}") from None


def image_size(data: bytes, name: str = "image") -> tuple[int, int]:
    """(width, height) of an encoded image, by its header alone. Raises BadImage, naming the file."""
    try:
        if data[:3] == JPEG_MAGIC:
            try:
                height, width, _, _ = simplejpeg.decode_jpeg_header(data)
                return width, height
            except ValueError:
                pass  # as in decode_rgb
        with Image.open(io.BytesIO(data)) as image:
            return image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadImage(f"{name}: {error}") from None


def list_image_folder(root: str | Path, option: str = "--data") -> tuple[list[str], list[tuple[str, int]]]:
    """([class id, ...] sorted, [(path, label), ...]) of ROOT/<class id>/<image>, as torchvision's ImageFolder sorts.

    Raises UserError if ROOT is missing, holds no class folder, or a class folder holds no image.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{option}: no folder {root}; expected {root}/<class id>/<images>")
    ids = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if not ids:
        raise UserError(f"{option}: {root} holds no class folders; expected {root}/<class id>/<images>")
    samples = []
    for label, class_id in enumerate(ids):
        names = sorted(
            entry.name
            for entry in os.scandir(root / class_id)
            if entry.name.lower().endswith(IMAGE_SUFFIXES) and not entry.name.startswith(".")
        )
        if not names:
            raise UserError(f"{option}: class folder {root / class_id} holds no image; remove the folder or fill it")
        samples += [(f"{root}/{class_id}/{name}", label) for name in names]
    return ids, samples


def load_eval_image(
    path: str | Path | bytes,
    resize: int,
    crop: int,
    interpolation: str = "bilinear",
    name: str | None = None,
    border: int = 0,
    truncated: bool = False,
) -> torch.Tensor:
    """The test transform: shorter side to RESIZE, centre crop: uint8 (3, crop, crop), RGB.

    Pixel for pixel torchvision's Resize(RESIZE) and CenterCrop(CROP) on a Pillow image. BORDER pixels are cut off
    every side first (ObjectNet's red frame). TRUNCATED as in decode_rgb. Raises BadImage. The caller normalises on its
    device: `normalize`.
    """
    import torch

    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    image = Image.fromarray(decode_rgb(path, name=name, truncated=truncated))
    if border:
        image = image.crop((border, border, image.width - border, image.height - border))
    width, height = image.size
    short, long = min(width, height), max(width, height)
    if short != resize:
        size = (resize, int(resize * long / short))  # truncated, as torchvision's Resize
        image = image.resize(size if width <= height else size[::-1], filters[interpolation])
    width, height = image.size
    pad_x, pad_y = max(0, crop - width), max(0, crop - height)  # black borders, as torchvision's CenterCrop
    if pad_x or pad_y:
        canvas = Image.new("RGB", (width + pad_x, height + pad_y))
        canvas.paste(image, (pad_x // 2, pad_y // 2))
        image, (width, height) = canvas, canvas.size
    left, top = round((width - crop) / 2), round((height - crop) / 2)
    pixels = np.array(image.crop((left, top, left + crop, top + crop)))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def normalize(images: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """uint8 (B, 3, H, W), 0..255 -> float, ImageNet's mean 0 and deviation 1 a channel, on the images' device."""
    import torch

    mean, std = _statistics(images.device)
    return ((images.float() - mean) / std).to(dtype or torch.float32)


@lru_cache
def _statistics(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, deviation) of 0..255, each (3, 1, 1): made once a device, since copying them there waits for it."""
    import torch

    with torch.inference_mode(False):  # validation may be the first to ask, training uses them too
        mean = torch.tensor(IMAGENET_MEAN, device=device).view(3, 1, 1) * 255
        std = torch.tensor(IMAGENET_STD, device=device).view(3, 1, 1) * 255
    return mean, std


# ===== pictures =====


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[np.ndarray]]],
    side: int,
    columns: int,
    label_width: int = 0,
    gap: int = 0,
    paper: str = "white",
) -> np.ndarray:
    """uint8 (H, W, 3): one row of images for each (label, [uint8 (h, w, 3), ...]), its label on the left.

    SIDE: pixels of a square cell, into whose upper left corner an image is laid; COLUMNS: images of a row, at most;
    GAP: pixels between cells. A LABEL_WIDTH of 0 leaves the labels out.
    """
    step = side + gap
    sheet = Image.new("RGB", (label_width + columns * step - gap, len(rows) * step - gap), paper)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    for number, (label, images) in enumerate(rows):
        if label_width:
            draw.multiline_text((8, number * step + 8), label[:80], fill="black", font=font)
        for column, pixels in enumerate(images[:columns]):
            sheet.paste(Image.fromarray(pixels), (label_width + column * step, number * step))
    return np.asarray(sheet)


Curve = tuple[str, Sequence[float], Sequence[float], str | None]  # label, x, y, colour (None: matplotlib's next)


def draw_curves(panels: Mapping[str, tuple[str, Sequence[Curve]]], kind: str) -> bytes:
    """The plots of PANELS side by side, title -> (what x is, curves), as KIND "png" or "svg" (transparent).

    A label that several curves share is named once; one that is empty, never. The same numbers give the same bytes.
    """
    import matplotlib  # here: half a second, which no other use of this file should wait for

    matplotlib.use("Agg")
    from matplotlib import pyplot

    look: Any = {"svg.hashsalt": "curves", "font.size": 11, "text.parse_math": False}  # a name may hold a $
    with matplotlib.rc_context(look):
        figure, plots = pyplot.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.4), layout="constrained")
        for plot, (title, (unit, curves)) in zip(np.atleast_1d(plots), panels.items(), strict=True):
            named: dict[str, Any] = {}
            for label, x, y, color in curves:
                (line,) = plot.plot(x, y, color=color, linewidth=1.4, alpha=0.85)
                named.setdefault(label, line)
            plot.set_xlabel(unit, color=INK)
            plot.set_title(title, color=INK, fontsize=11)
            plot.tick_params(colors=INK)
            plot.grid(color=INK, alpha=0.25, linewidth=0.6)
            for spine in plot.spines.values():
                spine.set_color(INK)
            if any(named):
                plot.legend(named.values(), named.keys(), frameon=False, labelcolor=INK)
        buffer = io.BytesIO()
        options: Any = {"transparent": True, "metadata": {"Date": None}} if kind == "svg" else {"dpi": 110}
        figure.savefig(buffer, format=kind, **options)
        pyplot.close(figure)
    return buffer.getvalue()
