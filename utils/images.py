"""Image files and class folders: decoding to uint8 arrays, the label order that everything here shares, and pictures of
many images or of numbers (contact sheets, curves)."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import simplejpeg
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError

from utils.cli import UserError, few
from utils.storage import read_regular

if TYPE_CHECKING:
    import torch

# Channel statistics of ImageNet's training images, RGB in 0..1 (torchvision's reference values).
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
JPEG_MAGIC = b"\xff\xd8\xff"
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")  # by content, whatever the name says
MOST_BYTES = 512 << 20  # of an image file
Image.MAX_IMAGE_PIXELS = None  # most_pixels() bounds instead, and can be raised
MOST_NAMED = 12  # curves in a legend
MOST_DRAWN = 1e30  # near the largest number matplotlib finds no ticks
INK = "#7d7d7d"  # of drawn figures: grey that reads on white paper and on a dark screen alike
# What matplotlib's figures have in common; a name may hold a $.
LOOK: dict[Any, Any] = {"font.size": 11, "axes.titlesize": 11, "text.parse_math": False, "legend.frameon": False}
LOOK |= {"axes.grid": True, "grid.alpha": 0.25, "grid.linewidth": 0.6}
INKED = ("axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color", "grid.color")
LOOK |= dict.fromkeys((*INKED, "legend.labelcolor"), INK)


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
    below, and named on stderr. Of 16 bits a channel the upper eight are taken. Raises BadImage, naming the file.
    """
    name = name or (str(source) if not isinstance(source, bytes) else "image")
    data = source if isinstance(source, bytes) else read_image(source)
    jpeg = data[:3] == JPEG_MAGIC
    try:
        if jpeg:
            with contextlib.suppress(ValueError):  # a few odd JPEGs in the wild: Pillow knows them
                height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
                _refuse_huge(width, height, name)
                if colorspace not in ("CMYK", "YCCK"):  # of which libjpeg-turbo's RGB is a level or two off Pillow's
                    return simplejpeg.decode_jpeg(data, colorspace="RGB", min_height=min_height, min_width=min_width)
        with _open(data, name) as image:
            image.load()  # a truncated file raises here
            if image.mode.startswith("I;16"):  # which Pillow would cut off at 255
                return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
            if image.mode in ("I", "F"):
                raise BadImage(f"{name}: grey values of 32 bits have no known range; save it with 8 or 16 bits")
            return np.array(image.convert("RGB"))
    except (BadImage, UserError):
        raise
    except Exception as error:  # a damaged file can fail anywhere in a decoder
        if truncated and jpeg and isinstance(error, OSError):
            with contextlib.suppress(ValueError):
                pixels = simplejpeg.decode_jpeg(data, colorspace="RGB", strict=False)
                print(f"truncated image {name}: read as far as it goes", file=sys.stderr, flush=True)
                return pixels
        raise BadImage(f"{name}: {error}") from None


def read_image(path: str | Path) -> bytes:
    """The bytes of an image file; BadImage for anything but a regular file of at most MOST_BYTES."""
    try:
        return read_regular(path, MOST_BYTES)
    except OSError as error:
        raise BadImage(f"{path}: {error.strerror}") from None


def stat_files(paths: Sequence[str]) -> np.ndarray:
    """(N, 2) int64: size in bytes and time of change in ns of each file; -1, -1 where it is gone."""
    from multiprocessing.pool import ThreadPool  # here: start-up time

    def look(path: str) -> tuple[int, int]:
        try:
            status = Path(path).stat()
        except OSError:
            return -1, -1
        return status.st_size, status.st_mtime_ns

    with ThreadPool(16) as pool:  # a server of files answers each after a while
        return np.array(pool.map(look, paths, chunksize=1000), np.int64).reshape(-1, 2)


def image_size(data: bytes, name: str = "image") -> tuple[int, int]:
    """(width, height) of an encoded image, by its header alone. Raises BadImage, naming the file."""
    try:
        if data[:3] == JPEG_MAGIC:
            with contextlib.suppress(ValueError):  # as in decode_rgb
                height, width, *_ = simplejpeg.decode_jpeg_header(data)
                return width, height
        with _open(data, name) as image:
            return image.size
    except (BadImage, UserError):
        raise
    except Exception as error:  # as in decode_rgb
        raise BadImage(f"{name}: {error}") from None


def _open(data: bytes, name: str) -> Image.Image:
    """The header of an image of one of FORMATS: others may start a program (EPS) or read other files."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise BadImage(f"{name}: no {', '.join(FORMATS)} image") from None
    _refuse_huge(*image.size, name)
    return image


def _refuse_huge(width: int, height: int, name: str) -> None:
    """BadImage before the memory is taken: a file of 631 bytes may claim 65500 x 65500 pixels, 12 GB."""
    if width * height > most_pixels():
        remedy = f"remove it, or set MAX_IMAGE_PIXELS={width * height} if it is what you want"
        raise BadImage(f"{name}: {width} x {height} pixels are more than {most_pixels():,}; {remedy}")


@lru_cache
def most_pixels() -> int:
    """Pixels of an image that are decoded at most: $MAX_IMAGE_PIXELS, or Pillow's own limit, 178,956,970 (0.5 GB)."""
    try:
        return int(os.environ.get("MAX_IMAGE_PIXELS", 178_956_970))
    except ValueError:
        raise UserError(f"MAX_IMAGE_PIXELS={os.environ['MAX_IMAGE_PIXELS']} is not a whole number") from None


# ===== class folders =====


def in_label_order(names: Iterable[str]) -> list[str]:
    """Class ids sorted, so that the position is the label: as text, or, if all are numbers, as these (2 before 10)."""
    names = sorted(names)
    return sorted(names, key=int) if all(name.isascii() and name.isdigit() for name in names) else names


def list_image_folder(root: str | Path, option: str = "--data") -> tuple[list[str], list[tuple[str, int]]]:
    """([class id, ...], [(path, label), ...]) of ROOT/<class id>/**/<image>, sorted as torchvision's ImageFolder sorts;
    folders that are all numbers by these, see in_label_order.

    Files that are not read (other suffixes) are counted on stderr; hidden ones are left out. UserError if ROOT is
    missing, holds no class folder, none of them holds an image itself (ROOT is then likely a folder too high), or one
    holds none at all.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{option}: no folder {root}; expected {root}/<class id>/<images>")
    ids = in_label_order(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if not ids:
        raise UserError(f"{option}: {root} holds no class folders; expected {root}/<class id>/<images>")
    samples, unused, direct = [], Counter[str](), False
    for label, class_id in enumerate(ids):
        folder = f"{root}/{class_id}"
        if not class_id.isprintable():
            raise UserError(f"{option}: class folder {folder!r} is not UTF-8 or has control characters; rename it")
        found = _images_below(folder, unused)
        paths = [f"{at}/{name}" for at in sorted(found) for name in sorted(found[at])]
        if not paths:
            raise UserError(f"{option}: class folder {folder} holds no image; remove the folder or fill it")
        direct = direct or folder in found
        samples += [(path, label) for path in paths]
    if not direct:
        below = Path(samples[0][0]).parent
        raise UserError(f"{option}: no class folder of {root} holds images itself, but {below} does; name its parent")
    if unused and os.environ.get("RANK", "0") == "0":
        kinds = ", ".join(f"{count} {suffix or 'without a suffix'}" for suffix, count in unused.most_common(5))
        print(f"{option}: {sum(unused.values())} files in {root} are not read as images ({kinds})", file=sys.stderr)
    return ids, samples


def drop_strays(
    samples: Sequence[tuple[str, int]], known: Iterable[tuple[str, Iterable[str]]] | None, option: str
) -> list[tuple[str, int]]:
    """SAMPLES (path, label) without those that a dataset's manifests, KNOWN (class id, file names), do not know."""
    if known is None:  # another folder, of which all images count
        return list(samples)
    names = {(class_id, name) for class_id, its in known for name in its}
    kept: list[tuple[str, int]] = []
    strays: list[tuple[str, int]] = []
    for sample in samples:
        (kept if Path(sample[0]).parts[-2:] in names else strays).append(sample)
    if strays:
        shown = few(path for path, _ in strays)
        print(f"{option}: {len(strays)} images that no manifest knows are left out: {shown}", file=sys.stderr)
    return kept


def _images_below(top: str, unused: Counter[str]) -> dict[str, list[str]]:
    """{folder: names of its images} of TOP and what is below; UNUSED counts the suffixes of other files."""
    found: dict[str, list[str]] = {}
    folders, seen = [top], {os.path.realpath(top)}
    while folders:
        folder = folders.pop()
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    if not entry.is_symlink() or (real := os.path.realpath(entry.path)) not in seen:
                        seen |= {real} if entry.is_symlink() else set()  # a link to a folder above would never end
                        folders.append(entry.path)
                elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                    found.setdefault(folder, []).append(entry.name)
                else:
                    unused[Path(entry.name).suffix.lower()] += 1
    return found


# ===== the test transform =====


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
        size = size if width <= height else size[::-1]
        _refuse_huge(*size, name or ("image" if isinstance(path, bytes) else str(path)))
        image = image.resize(size, filters[interpolation])
    # Black borders where the image is smaller, as torchvision's CenterCrop; Pillow's crop adds them.
    left, top = (-((crop - side) // 2) if side < crop else round((side - crop) / 2) for side in image.size)
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

    with matplotlib.rc_context(LOOK | {"svg.hashsalt": "curves"}):
        figure, plots = pyplot.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.4), layout="constrained")
        for plot, (title, (unit, curves)) in zip(np.atleast_1d(plots), panels.items(), strict=True):
            named: dict[str, Any] = {}
            for label, x, y, color in curves:
                (line,) = plot.plot(
                    x, np.clip(np.asarray(y, float), -MOST_DRAWN, MOST_DRAWN), color=color, linewidth=1.4, alpha=0.85
                )
                named.setdefault(label, line)
            plot.set_xlabel(unit)
            plot.set_title(title)
            if any(named) and len(named) <= MOST_NAMED:  # a longer legend would leave no room for the curves
                plot.legend(named.values(), named.keys())
        buffer = io.BytesIO()
        options: Any = {"transparent": True, "metadata": {"Date": None}} if kind == "svg" else {"dpi": 110}
        figure.savefig(buffer, format=kind, **options)
        pyplot.close(figure)
    return buffer.getvalue()
