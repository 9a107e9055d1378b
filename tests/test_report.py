"""The report: tables from files alone, seeds joined, the radar plot, one self-contained page that a browser draws."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import evaluate
from utils import report
from utils.cli import UserError, run
from utils.storage import append_jsonl, write_json

ROOT = Path(__file__).resolve().parent.parent
SETS = {"IN-Val": 73.3, "IN-v2": 60.1, "IN-Sketch": 20.2, "IN-R": 40.4, "IN-A": 5.5}
TRANSFER = {"small": {"DTD": 70.0, "Pets": 80.0}, "inat": {"iNat2018": 40.0}, "cog": {"CoG-L1": 60.0, "CoG-L2": 50.0}}


def write_run(folder: Path, model: str, shift: float = 0.0, seed: int = 0) -> Path:
    """results.jsonl of a run judged on everything."""
    results = folder / "results.jsonl"
    folder.mkdir()
    for name, value in SETS.items():
        for metric, more in (("top1", 0), ("top5", 15)):
            row = {"model": model, "checkpoint": f"{folder}/a.pth", "dataset": name, "group": "imagenet", "seed": seed}
            row |= {"metric": metric, "value": value + more + shift, "low": value - 1, "high": value + 1, "n": 5000}
            append_jsonl(results, row | {"num_classes": 100, "source": "measured"})
    for group, members in TRANSFER.items():
        for name, value in members.items():
            row = {"model": model, "dataset": name, "group": group, "metric": "top1", "value": value + shift}
            append_jsonl(results, row | {"n": 1000, "num_classes": 10, "seed": seed, "source": "measured"})
    return results


def call(*arguments) -> int:
    return run(evaluate.main, evaluate.get_args_parser(), [str(argument) for argument in arguments])


@pytest.fixture
def two_models(tmp_path):
    first = write_run(tmp_path / "real", "real <1K>")
    second = write_run(tmp_path / "sd", "synthetic", shift=-2.5)
    assert call("--report", first, second, ROOT / "docs/paper_results.jsonl", "--out", tmp_path / "report") == 0
    return tmp_path / "report"


def test_the_tables_hold_the_numbers(two_models):
    text = (two_models / "report.md").read_text()
    assert "| real <1K> | 73.3 (72.3 to 74.3) | 60.1 (59.1 to 61.1) |" in text
    assert "| ImageNet-100-SD (paper) | 73.3 |" in text
    groups = re.findall(r"^## (Transfer.*)$", text, re.M)
    assert groups == [
        "Transfer, ImageNet-CoG: linear probe, top-1",
        "Transfer, iNaturalist: linear probe, top-1",
        "Transfer, 8 small sets: linear probe, top-1",
        "Transfer, as published",
    ]
    # average 75; log-odds average of 0.7 and 0.8
    wanted = (np.log(0.7 / 0.3) + np.log(0.8 / 0.2)) / 2
    assert f"| real <1K> | 70.0 | 80.0 | 75.0 | {wanted:.1f} |" in text


def test_the_page_is_self_contained_escaped_and_shows_differences(two_models):
    page = (two_models / "report.html").read_text()
    assert "real &lt;1K&gt;" in page and "<1K>" not in page
    assert ">-2.5<" in page.replace(" ", "")
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", page)
    assert "<script" not in page and "<svg" in page


def test_the_radar_plot_has_the_papers_axes(two_models):
    picture = (two_models / "radar.svg").read_text()
    for axis in ("IN-Val", "IN-v2", "IN-Sketch", "IN-R", "IN-A", "ImageNet-CoG", "iNaturalist", "8 small sets"):
        assert axis in picture
    assert Image.open(two_models / "radar.png").width >= 600
    models = report.group_models(report.read_results([two_models.parent / "real/results.jsonl"]))
    values = report.radar_values(models[0])
    assert values["IN-Val\ntop-5"] == pytest.approx(88.3)
    assert values["ImageNet-CoG\ntop-1"] == pytest.approx(55.0)


def test_seeds_become_mean_and_deviation(tmp_path):
    files = [write_run(tmp_path / f"a-seed{seed}", f"a-seed{seed}", shift=seed, seed=seed) for seed in range(3)]
    (model,) = report.group_models(report.read_results(files))
    cell = model.cells["IN-Val", "top1"]
    assert (model.name, cell.runs) == ("a", 3)
    assert (cell.value, cell.spread) == (pytest.approx(74.3), pytest.approx(1.0))
    assert str(cell) == "74.3 ± 1.0"


def test_a_metric_measured_again_replaces_the_earlier(tmp_path):
    results = write_run(tmp_path / "a", "a")
    append_jsonl(results, {"model": "a", "dataset": "DTD", "group": "small", "metric": "top1", "value": 1.5, "seed": 0})
    (model,) = report.group_models(report.read_results([results]))
    assert model.cells["DTD", "top1"].value == 1.5


def write_row(results: Path, value: float, **facts) -> None:
    row = {"model": "a", "dataset": "DTD", "group": "small", "metric": "top1", "value": value, "seed": 0}
    append_jsonl(results, row | {"checkpoint_sha256": "f1", "protocol": "fast"} | facts)


def test_rows_of_an_earlier_checkpoint_or_protocol_are_no_seeds(tmp_path):
    results = tmp_path / "results.jsonl"
    write_row(results, 10, checkpoint_sha256="e0")  # judged in mid-training
    write_row(results, 11, checkpoint_sha256="e0", dataset="Pets")  # and not judged again
    write_row(results, 20, protocol="paper", seed=3)
    write_row(results, 30)
    write_row(results, 32, seed=1)
    (model,) = report.group_models(report.read_results([results]))
    assert list(model.cells) == [("DTD", "top1")] and model.checkpoints == {"f1"}
    assert (model.cells["DTD", "top1"].value, model.cells["DTD", "top1"].runs) == (31, 2)


def test_two_models_of_one_name_are_refused(tmp_path):
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        write_row(tmp_path / f"{number}/results.jsonl", 10, checkpoint_sha256=f"f{number}")
    with pytest.raises(UserError, match=r"0/results.jsonl and .*1/results.jsonl hold two different models called a;"):
        report.read_results([tmp_path / f"{number}/results.jsonl" for number in range(2)])


def test_a_look_at_classes_counts_a_sets_images_once(tmp_path):
    for seed in range(2):
        folder = tmp_path / f"a-seed{seed}"
        (folder / "eval").mkdir(parents=True)
        row = {"model": f"a-seed{seed}", "dataset": "fruit", "group": "folder", "metric": "top1", "value": 75, "n": 8}
        append_jsonl(folder / "results.jsonl", row | {"seed": seed, "checkpoint_sha256": f"f{seed}"})
        other = {"dataset": "fruit", "checkpoint_sha256": "e0", "class_ids": ["a"], "class_names": ["a"]}
        write_json(folder / "eval/fruit.e0.json", other | {"per_class": [{"id": "a", "n": 50, "top1": 0.0}]})
        write_json(
            folder / "eval/fruit.json",
            {
                "dataset": "fruit",
                "checkpoint_sha256": f"f{seed}",
                "class_ids": ["a", "b"],
                "class_names": ["apple, malus", "pear"],
                "per_class": [{"id": "a", "n": 4, "top1": 100.0}, {"id": "b", "n": 4, "top1": 50.0 * seed}],
                "confusion": [[4, 0], [4 - 2 * seed, 2 * seed]],
            },
        )
    files = [tmp_path / f"a-seed{seed}/results.jsonl" for seed in range(2)]
    assert call("--report", *files, "--out", tmp_path / "out") == 0
    text = (tmp_path / "out/report.md").read_text()
    assert "| apple | 4 | 100.0 |" in text and "| pear | 4 | 25.0 |" in text


@pytest.mark.parametrize(
    "content,message",
    [(None, "no file"), ("", "holds no result"), ('{"model": "a"}\n', "without dataset, metric, value")],
)
def test_bad_results_are_named(tmp_path, content, message):
    path = tmp_path / "results.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        report.write_report([path], tmp_path / "out")
    assert not (tmp_path / "out/report.html").exists()


def test_published_numbers_are_the_project_pages():
    rows = [json.loads(line) for line in (ROOT / "docs/paper_results.jsonl").read_text().splitlines()]
    values = {(row["model"].split(" ")[0], row["dataset"], row["metric"]): row["value"] for row in rows}
    assert values == {
        ("ImageNet-1K-SD", "IN-Val", "top1"): 42.9,
        ("ImageNet-1K-SD", "IN-Val", "top5"): 70.3,
        ("ImageNet-1K-SD", "average transfer", "top1"): 68.4,
        ("ImageNet-100-SD", "IN-Val", "top1"): 73.3,
        ("ImageNet-100-SD", "IN-Val", "top5"): 91.7,
        ("ImageNet-100-SD", "average transfer", "top1"): 63.2,
    }
    assert {row["source"] for row in rows} == {"published"}


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium; on Debian: apt install chromium")
@pytest.mark.parametrize("width,scheme", [(1000, "light"), (390, "light"), (1000, "dark")])
def test_a_browser_draws_the_page(two_models, tmp_path, width, scheme):
    page = two_models / "report.html"
    if scheme == "dark":  # headless Chromium has no switch for it: the rule is made to hold
        text = page.read_text()
        assert "prefers-color-scheme: dark" in text
        page = tmp_path / "dark.html"
        page.write_text(text.replace("(prefers-color-scheme: dark)", "all"))
    shot = tmp_path / "shot.png"
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path}/profile",
    ]
    command = ["chromium", *options, f"--window-size={width},1400", f"--screenshot={shot}", page.as_uri()]
    subprocess.run(command, capture_output=True, timeout=100, check=True)
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    paper = pixels[-1, 2].mean()
    assert paper < 60 if scheme == "dark" else paper > 240
    contrast = np.abs(pixels - pixels[-1, 2]).max(2) > 100
    assert 0.005 < contrast.mean() < 0.5  # text is there and can be told from the paper
    coloured = (pixels.max(2) - pixels.min(2) > 60).mean()
    assert coloured > 0.0005  # the dots of the models, and the radar plot
