"""docs/paper_results.jsonl against the published figures, typed here a second time, and their own arithmetic."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from utils.evaluation.catalog import PAPERS_FIVE, SETS, V2, V2_VARIANTS

ROOT = Path(__file__).resolve().parent.parent
ROWS = [json.loads(line) for line in (ROOT / "docs/paper_results.jsonl").read_text(encoding="utf-8").splitlines()]
VALUES = {(row["model"].removesuffix(" (paper)"), row["dataset"], row["metric"]): row["value"] for row in ROWS}

# Table 1 of arXiv 2502.15588 (Deliberate Practice, ICML 2025), its rows of this paper: top-1 on PAPERS_FIVE, and the
# training iterations and images that it gives.
QUOTED = {
    "ImageNet-100-SD, 1x": ((63.5, 62.7, 41.8, 64.2, 13.7), 13_000, 130_000),
    "ImageNet-100-SD, 50x": ((73.3, 72.3, 42.0, 59.4, 17.1), 635_000, 6_500_000),
    "ImageNet-1K-SD": ((42.9, 43.0, 16.6, 26.3, 3.6), 130_000, 1_300_000),
}


@pytest.mark.parametrize("model", QUOTED)
def test_the_quoted_table_is_here(model):
    assert tuple(VALUES[model, name, "top1"] for name in PAPERS_FIVE) == QUOTED[model][0]


def test_what_the_paper_and_its_page_state():
    top5 = {model: value for (model, dataset, metric), value in VALUES.items() if metric == "top5"}
    assert top5 == {"ImageNet-1K-SD": 70.3, "ImageNet-100-SD, 50x": 91.7}  # the abstract
    transfer = {model: value for (model, dataset, _), value in VALUES.items() if dataset == "average transfer"}
    assert transfer == {"ImageNet-1K-SD": 68.4, "ImageNet-100-SD, 50x": 63.2}  # the project page
    val = {
        model: value for (model, dataset, metric), value in VALUES.items() if (dataset, metric) == ("IN-Val", "top1")
    }
    assert val == {
        "ImageNet-1K-SD": 42.9,
        "ImageNet-100-SD, 1x": 63.5,
        "ImageNet-100-SD, 10x": 72.4,
        "ImageNet-100-SD, 20x": 72.4,
        "ImageNet-100-SD, 50x": 73.3,
        "ImageNet-1K-SD, c, d_c, guidance 7.5": 26.2,
        "ImageNet-1K-SD, c, h_c inside b, guidance 7.5": 30.1,
        "real ImageNet-1K, PyTorch's ResNet50": 76.1,
        "real ImageNet-1K, RSB-A1": 80.1,
    }


def test_the_numbers_agree_with_each_other():
    """More images never hurt on IN-Val, top-5 is no lower than top-1, and iterations are 100 epochs of 1024 images."""
    order = [VALUES[f"ImageNet-100-SD, {factor}", "IN-Val", "top1"] for factor in ("1x", "10x", "20x", "50x")]
    assert order == sorted(order)
    for (model, dataset, metric), value in VALUES.items():
        if metric == "top5":
            assert value > VALUES[model, dataset, "top1"]
    for _, iterations, images in QUOTED.values():
        assert iterations == pytest.approx(images * 100 / 1024, rel=0.03)


def test_every_row_says_where_it_is_from_and_on_what_it_was_measured():
    assert len(VALUES) == len(ROWS)
    for row in ROWS:
        assert row["source"] == "published" and re.search(r"arXiv 2\d{3}\.\d{5} \[(P|2)\]$", row["protocol"])
        assert 0 < row["value"] < 100
        if row["group"] == "imagenet" and row["model"].startswith("ImageNet-1K"):
            known = SETS[V2_VARIANTS[0] if row["dataset"] == V2 else row["dataset"]]  # V2: the mean of its variants
            assert row["num_classes"] == known.classes and row.get("n") in (None, *known.images)


def test_the_pages_promise_what_the_source_gives_for_that_many_images():
    """126,689 images of ImageNet-100 give about 63.5; 73.3 is the set of fifty times as many."""
    readme, page = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/reproduce-the-paper.md"))
    cells = re.findall(r"^\| ImageNet-100-SD, (\d+x) \| ([\d,]+) \| .*?(\d\d\.\d)\b.*$", readme, re.M)
    assert [(factor, float(value)) for factor, _, value in cells] == [("1x", 63.5), ("50x", 73.3)]
    assert [int(images.replace(",", "")) for _, images, _ in cells] == [126_689, 50 * 126_689]
    rows = re.findall(
        r"^\| ImageNet-100-SD, (\d+x) \| ([\d,]+) \|[^\n]*?\| (\d\d\.\d)[^|]*\*\*\[[P2]\]\*\*", page, re.M
    )
    assert {factor: float(value) for factor, _, value in rows} == {"1x": 63.5, "10x": 72.4, "20x": 72.4, "50x": 73.3}
    for factor, images, _ in rows:
        assert int(images.replace(",", "")) == 126_689 * int(factor[:-1])
