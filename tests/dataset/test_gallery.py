"""Contact sheets and the gallery page, on disk and in a real browser."""

from __future__ import annotations

import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from tests.dataset.test_folder import record_of
from utils.dataset import folder as datasets
from utils.dataset.gallery import write_gallery
from utils.generation.drawing import encode_image
from utils.images import contact_sheet
from utils.storage import sha256_bytes

NAMES = ['ti & <b>ger</b> "big"', "crane", "crane", *(f"class {k}" for k in range(9))]
DEFINITIONS = ["a striped cat", "a wading bird", "lifts & moves heavy objects", *["something"] * 9]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    rows = [
        {"id": f"n{k:02d}", "name": name, "hypernym": "thing", "definition": definition, "images": 30}
        for k, (name, definition) in enumerate(zip(NAMES, DEFINITIONS, strict=True))
    ]
    info = record_of("zoo <1>", rows, batch_size=30)
    info["model"] = info["model"] | {"id": "some/model"}
    dataset = datasets.create_dataset(tmp_path_factory.mktemp("data") / "zoo", info)
    rng = np.random.default_rng(0)
    for folder, row in zip(dataset.folders, rows, strict=True):
        folder.prepare()
        entries = []
        for index in range(folder.count):
            data = encode_image(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8), "jpg", None)
            folder.path(index).write_bytes(data)
            entry = {"id": row["id"], "index": index, "prompt": f'{row["name"]}, "it"', "seed": 2**62 + index}
            entry |= {"attempt": 0, "rejected": [], "safety": None, "bytes": len(data), "sha256": sha256_bytes(data)}
            entries.append(entry)
        folder.commit(entries)
    dataset.folders[3].path(2).unlink()
    dataset.folders[3].path(4).write_bytes(b"torn")
    write_gallery(dataset)
    return dataset


def test_sheets_and_thumbnails(dataset):
    sheets = sorted((dataset.root / "preview").glob("sheet_*.jpg"))
    assert [Image.open(sheet).size for sheet in sheets] == [(1500, 1280), (1500, 256)]  # 12 classes
    thumbs = sorted((dataset.root / "preview" / "n00").iterdir())
    assert len(thumbs) == 24 and Image.open(thumbs[0]).size == (128, 96)
    assert len(list((dataset.root / "preview" / "n03").iterdir())) == 22  # one is missing, one torn


def test_page_escapes_names_and_loads_lazily(dataset):
    page = (dataset.root / "index.html").read_text()
    assert "<b>ger" not in page and "&lt;b&gt;ger" in page
    assert page.count('<img loading="lazy"') == page.count("<img ") == 11 * 24 + 22
    assert f"seed {2**62 + 5}" in page and "http" not in page  # whole seeds; nothing from elsewhere


def test_second_writing_leaves_no_stale_thumbnails(dataset):
    stale = dataset.root / "preview" / "n00" / "old.jpg"
    stale.write_bytes(b"x")
    write_gallery(dataset)
    assert not stale.exists()


def test_sheet_without_a_single_image_is_white():
    assert (contact_sheet([("nothing yet", [])], 128, 10, 220)[:, 300:] == 255).all()


@pytest.mark.browser
def test_gallery_in_a_browser(dataset, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("chromium is not installed (apt install chromium)")

    def dom(fragment: str, number: int) -> str:
        switches = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
        switches += " --disable-component-update --disable-sync --window-size=1200,900 --virtual-time-budget=3000"
        address = (dataset.root / "index.html").as_uri() + fragment
        command = [chromium, *switches.split(), f"--user-data-dir={tmp_path / str(number)}", "--dump-dom", address]
        return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout

    whole = dom("", 0)
    assert whole.count("<section") == 12 and 'hidden=""' not in whole

    found = dom("#?crane%20BIRD", 1)
    shown = [part for part in found.split("<section")[1:] if 'hidden=""' not in part.split(">")[0]]
    assert len(shown) == 1 and "a wading bird" in shown[0]
    assert "1 of 12 classes" in found

    picture = tmp_path / "page.png"
    switches = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    switches += ["--disable-background-networking", "--disable-component-update", "--window-size=1200,900"]
    switches += [f"--user-data-dir={tmp_path / 'shot'}", f"--screenshot={picture}", "--virtual-time-budget=3000"]
    subprocess.run([chromium, *switches, (dataset.root / "index.html").as_uri()], capture_output=True, timeout=120)
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    colourful = (pixels.max(axis=2) - pixels.min(axis=2)) > 40  # only the noise of the thumbnails is
    assert colourful[200:].mean() > 0.1
