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
from PIL import Image, ImageDraw, ImageFont

from utils.dataset.folder import ClassFolder, Dataset
from utils.images import BadImage, decode_rgb
from utils.storage import atomic_write

SHOWN_A_CLASS = 24  # images of each class in the gallery: the first ones, so that recipes can be compared
CLASSES_A_SHEET, IMAGES_A_ROW = 10, 10
SIDE = 128  # pixels of a thumbnail
LABEL_WIDTH = 220  # pixels beside the rows of a contact sheet

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ name }}: {{ images }} synthetic images</title>
<style>
  body { font: 15px/1.4 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 1400px; color: #222;
         background: #fff; }
  header { position: sticky; top: 0; background: #fff; padding: .5rem 0; border-bottom: 1px solid #ccc; z-index: 1; }
  h1 { font-size: 1.3rem; margin: 0 0 .3rem; }
  input { font: inherit; width: min(100%, 30rem); padding: .4rem; box-sizing: border-box; }
  section { content-visibility: auto; contain-intrinsic-size: auto 240px; margin: 1.2rem 0; }
  h2 { font-size: 1rem; margin: 0; }
  p { margin: .1rem 0 .4rem; color: #555; }
  .images { display: flex; flex-wrap: wrap; gap: 4px; }
  img { width: 96px; height: 96px; object-fit: cover; background: #eee; }
  @media (prefers-color-scheme: dark) { body, header { background: #181818; color: #ddd; } p { color: #aaa; } }
</style>
</head>
<body>
<header>
<h1>{{ name }}</h1>
<p>{{ images }} images of {{ classes|length }} classes; {{ model }}, {{ recipe.scheduler }}, {{ recipe.steps }} steps,
guidance {{ recipe.guidance_scale }}, prompt &ldquo;{{ recipe.prompt }}&rdquo;. The first {{ shown }} of each class.</p>
<input id="search" type="search" placeholder="Search classes: name, id, words of the definition"
       aria-label="Search classes"> <span id="found" aria-live="polite"></span>
</header>
<main>
{% for class in classes %}
<section data-words="{{ class.words }}">
<h2 id="{{ class.id }}">{{ class.name }} <small>{{ class.id }}</small></h2>
<p>{{ class.definition }} ({{ class.done }} of {{ class.wanted }} images)</p>
<div class="images">
{% for image in class.images %}<a href="{{ image.href }}"><img loading="lazy" src="{{ image.thumb }}" \
width="96" height="96" alt="{{ class.name }}, image {{ image.index }}" title="{{ image.title }}"></a>
{% endfor %}</div>
</section>
{% endfor %}
</main>
<p>Contact sheets: {% for sheet in sheets %}<a href="preview/{{ sheet }}">{{ loop.index }}</a> {% endfor %}</p>
<script>
  const sections = [...document.querySelectorAll("section")];
  const search = document.getElementById("search"), found = document.getElementById("found");
  function filter() {
    const words = search.value.toLowerCase().split(/\\s+/).filter(Boolean);
    let shown = 0;
    for (const section of sections) {
      section.hidden = !words.every(word => section.dataset.words.includes(word));
      shown += !section.hidden;
    }
    found.textContent = words.length ? `${shown} of ${sections.length} classes` : "";
    history.replaceState(null, "", words.length ? "#?" + encodeURIComponent(search.value) : location.pathname);
  }
  search.addEventListener("input", filter);
  if (location.hash.startsWith("#?")) { search.value = decodeURIComponent(location.hash.slice(2)); filter(); }
</script>
</body>
</html>
"""


def write_gallery(dataset: Dataset) -> Path:
    """Write OUT/preview/ and OUT/index.html and return the latter; what an earlier call wrote is replaced."""
    from jinja2 import Environment, StrictUndefined
    from tqdm import tqdm

    preview = dataset.root / "preview"
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
            atomic_write(preview / sheets[-1], encode(contact_sheet(sheet)))
            sheet = []
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(PAGE)
    html = template.render(
        name=dataset.info["name"],
        images=sum(item["done"] for item in classes),
        classes=classes,
        sheets=sheets,
        model=dataset.info["model"]["id"],
        recipe=dataset.recipe,
        shown=SHOWN_A_CLASS,
    )
    index = dataset.root / "index.html"
    atomic_write(index, html.encode())
    return index


def write_thumbnails(folder: ClassFolder, target: Path) -> dict[int, np.ndarray]:
    """{index: uint8 (h, w, 3), longer side SIDE} of the first images of a class, each also written to TARGET."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)

    def make(index: int) -> tuple[int, np.ndarray | None]:
        try:
            pixels = decode_rgb(folder.path(index), min_side=SIDE)
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


def contact_sheet(rows: list[tuple[str, list[np.ndarray]]]) -> np.ndarray:
    """uint8 (H, W, 3): one row a class, its label on the left, up to IMAGES_A_ROW thumbnails."""
    sheet = Image.new("RGB", (LABEL_WIDTH + IMAGES_A_ROW * SIDE, len(rows) * SIDE), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    for number, (label, thumbs) in enumerate(rows):
        draw.multiline_text((8, number * SIDE + 8), label[:80], fill="black", font=font)
        for column, pixels in enumerate(thumbs[:IMAGES_A_ROW]):
            sheet.paste(Image.fromarray(pixels), (LABEL_WIDTH + column * SIDE, number * SIDE))
    return np.asarray(sheet)


def encode(pixels: np.ndarray) -> bytes:
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), 88, "RGB", "444", fastdct=False)
