"""The report: tables from files alone, seeds joined, the radar plot, one self-contained page that a browser draws."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from PIL import Image

import evaluate
from utils import metrics
from utils.cli import UserError, run
from utils.evaluation.catalog import SETS as TEST_SETS
from utils.report import figures, page, records, tables
from utils.storage import append_jsonl, write_json

ROOT = Path(__file__).resolve().parents[2]
V2 = {"IN-v2-matched": 53.1, "IN-v2-0.7": 61.2, "IN-v2-top": 66.0}  # their mean, 60.1, is the paper's axis
SETS = {"IN-Val": 73.3, **V2, "IN-Sketch": 20.2, "IN-R": 40.4, "IN-A": 5.5}
TRANSFER = {"small": {"DTD": 70.0, "Pets": 80.0}, "inat": {"iNat2018": 40.0}, "cog": {"CoG-L1": 60.0, "CoG-L2": 50.0}}


def write_run(folder: Path, model: str, shift: float = 0.0, seed: int = 0) -> Path:
    """results.jsonl of a run judged on everything."""
    results = folder / "results.jsonl"
    folder.mkdir()
    write_json(folder / "args.json", {"sources": [{"path": "data", "synthetic": "sd" in folder.name}]})
    for name, value in SETS.items():
        for metric, more in (("top1", 0), ("top5", 15)):
            row = {"model": model, "checkpoint": f"{folder}/a.pth", "dataset": name, "group": "imagenet", "seed": seed}
            score = value + more + shift
            row |= {"metric": metric, "value": score, "low": score - 1, "high": score + 1, "n": 5000}
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
    assert call("--report", first, second, ROOT / "tests/report/published.jsonl", "--out", tmp_path / "report") == 0
    return tmp_path / "report"


def test_the_tables_hold_the_numbers(two_models):
    text = (two_models / "report.md").read_text()
    assert "| real <1K> | real | 73.3 (72.3 to 74.3); 5,000 images, 100 classes | 60.1 (59.1 to 61.1) |" in text
    assert (
        "| synthetic | synthetic | 70.8 (69.8 to 71.8); -2.5 (-3.9 to -1.1); 5,000 images, 100 classes | 57.6" in text
    )
    assert (
        "| ImageNet-100-SD (paper) |  | 73.3; +0.0; 5,000 images, 100 classes |" in text
    )  # the same 5,000 images of 100 classes
    groups = re.findall(r"^## (Transfer.*)$", text, re.M)
    assert groups == [
        "Transfer, ImageNet-CoG: linear probe, top-1",
        "Transfer, iNaturalist: linear probe, top-1",
        "Transfer, 8 small sets: linear probe, top-1",
        "Transfer, all 15 sets",
    ]
    # average 75; log-odds average of 0.7 and 0.8
    wanted = (np.log(0.7 / 0.3) + np.log(0.8 / 0.2)) / 2
    assert f"| real <1K> | 70.0 | 80.0 | 75.0 | {wanted:.3f} |" in text
    assert "average of 2 of 8 sets" in text
    assert "| ImageNet-1K-SD (paper) | 68.4 |  |" in text  # measured models lack sets: no average over all


def test_images_the_model_was_trained_on_stand_beside_its_number(tmp_path):
    clean, leaky = write_run(tmp_path / "real", "clean"), write_run(tmp_path / "sd", "leaky", shift=2)
    found = {"train_overlap_exact": 3, "train_overlap_near": 4}
    lines = [json.loads(line) | found for line in leaky.read_text().splitlines()]
    leaky.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert call("--report", clean, leaky, "--out", tmp_path) == 0
    text = (tmp_path / "report.md").read_text()
    assert "75.3 (74.3 to 76.3); +2.0 (+0.6 to +3.4); 7 of them trained on |" in text
    assert "7 of them trained on" in (tmp_path / "report.html").read_text()
    assert "trained on" not in next(line for line in text.splitlines() if line.startswith("| clean | real | 73.3"))


@pytest.mark.parametrize("kind", ["md", "html"])
def test_the_report_is_the_golden_one(two_models, kind):
    """Set UPDATE_GOLDEN=1 to accept a change, and look at the difference before committing it."""
    page = (two_models / f"report.{kind}").read_text()
    page = re.sub(r"<svg.*?</svg>", "<svg/>", page, flags=re.S)  # drawn by matplotlib; tested for its axes below
    golden = ROOT / f"tests/report/golden/report.{kind}"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(page)
    assert page == golden.read_text()


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
    models = page.group_models(records.read_results([two_models.parent / "real/results.jsonl"]))
    axes, values = page.radar_values(models)
    assert len(axes) == 8 and values["real <1K>"]["IN-Val\ntop-5"] == pytest.approx(88.3)
    assert values["real <1K>"]["ImageNet-CoG (2 of 5)\ntop-1"] == pytest.approx(55.0)


def test_sets_of_ones_own_are_the_axes_where_no_set_of_the_papers_is_known():
    models = [tables.Model("a"), tables.Model("b")]
    for model, value in zip(models, (90.0, 80.0), strict=True):
        for name, group in (("mine", "folder"), ("mine_noise", "folder"), ("digits", "transfer")):
            model.cells[name, "top1"] = tables.Cell(value, n=100, group=group)
            model.cells[name, "ece"] = tables.Cell(3.0, n=100, group=group)
    del models[1].cells["mine_noise", "top1"]
    axes, values = page.radar_values(models)
    assert axes == ["mine\ntop-1", "mine_noise\ntop-1", "digits\nlinear probe, top-1"]
    assert values == {"a": dict.fromkeys(axes, 90.0), "b": {axes[0]: 80.0, axes[2]: 80.0}}
    assert page.radar_note(axes, models).startswith("Top-1 of the classifiers, and of linear probes")
    models[0].cells["IN-Val", "top5"] = tables.Cell(88.0, n=100, group="imagenet")
    axes, _ = page.radar_values(models)
    assert axes == ["IN-Val\ntop-5"] and page.radar_note(axes, models).startswith("No radar plot: it needs 3 of its 8")


def test_a_group_counts_by_the_same_sets_for_every_model():
    """One model judged on the easiest set alone must not look best on the group's axis, nor in its average."""
    many, one = tables.Model("many"), tables.Model("one")
    for name in tables.TRANSFER_SETS:
        many.cells[name, "top1"] = tables.Cell(60.0, n=100, group=TEST_SETS[name].group)
    one.cells["EuroSAT", "top1"] = tables.Cell(94.0, n=100, group="small")
    _, values = page.radar_values([many, one])
    assert values["many"]["8 small sets\ntop-1"] == pytest.approx(60) and not values["one"]
    small = [name for name, row in TEST_SETS.items() if row.group == "small"]
    made = tables.group_table("t", "small", small, [many, one])
    assert [str(cell) for cell in made["rows"][0]["cells"][-2:]] == ["60.0", "0.405"]
    assert made["rows"][1]["cells"][-2:] == [None, None]
    every = tables.all_transfer_table([many, one])["rows"]
    assert [row["model"].name for row in every] == ["many"] and str(every[0]["cells"][1]) == "0.405"


def test_log_odds_of_a_perfect_score_go_by_the_images():
    cells = [tables.Cell(100.0, n=3333), tables.Cell(70.0, n=1000)]
    wanted = (np.log((1 - 0.5 / 3333) / (0.5 / 3333)) + np.log(0.7 / 0.3)) / 2
    assert str(tables.averages(cells)[1]) == f"{wanted:.3f}"


def test_numbers_of_other_images_are_not_subtracted():
    in1k = tables.Model("in1k", cells={("IN-R", "top1"): tables.Cell(40, n=30_000, num_classes=200)})
    in100 = tables.Model("in100", cells={("IN-R", "top1"): tables.Cell(70, n=3_000, num_classes=19)})
    made = tables.metric_table("t", [("IN-R", "top1", "IN-R")], [in1k, in100])
    assert made["note"] == "" and made["rows"][1]["differences"] == [""]
    assert [row["sizes"] for row in made["rows"]] == [["30,000 images, 200 classes"], ["3,000 images, 19 classes"]]


def bounds(a: tables.Cell, b: tables.Cell) -> tuple[float, float]:
    found = tables.difference(a, b)
    return found.low, found.high


def test_intervals_of_differences():
    # Newcombe 1998, table II, example (a): 56/70 less 48/80 is 0.2, method 10: 0.0524 to 0.3339
    runs = [metrics.wilson_interval(56, 70), metrics.wilson_interval(48, 80)]
    a, b = (tables.Cell(value, low=low, high=high) for value, (low, high) in zip((80.0, 60.0), runs, strict=True))
    assert bounds(a, b) == pytest.approx((5.24, 33.39), abs=0.01)
    # Welch: scipy's own interval of the same samples
    first, second = [70.0, 71.0, 72.5], [68.0, 68.5, 70.0, 69.0]
    cells = [
        tables.Cell(np.mean(values), spread=np.std(values, ddof=1), runs=len(values)) for values in (first, second)
    ]
    theirs = scipy.stats.ttest_ind(first, second, equal_var=False).confidence_interval()
    assert bounds(*cells) == pytest.approx((theirs.low, theirs.high))
    assert cells[0].less(cells[1]) == f"+2.3 ({theirs.low:+.1f} to {theirs.high:+.1f})"
    assert tables.difference(a, cells[0]) is None


def test_seeds_become_mean_and_deviation(tmp_path):
    files = [write_run(tmp_path / f"a-seed{seed}", f"a-seed{seed}", shift=seed, seed=seed) for seed in range(3)]
    (model,) = page.group_models(records.read_results(files))
    cell = model.cells["IN-Val", "top1"]
    assert (model.name, cell.runs) == ("a", 3)
    assert (cell.value, cell.spread) == (pytest.approx(74.3), pytest.approx(1.0))
    assert str(cell) == "74.3 ± 1.0"


def test_a_metric_measured_again_replaces_the_earlier(tmp_path):
    results = write_run(tmp_path / "a", "a")
    append_jsonl(results, {"model": "a", "dataset": "DTD", "group": "small", "metric": "top1", "value": 1.5, "seed": 0})
    (model,) = page.group_models(records.read_results([results]))
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
    (model,) = page.group_models(records.read_results([results]))
    assert list(model.cells) == [("DTD", "top1")] and model.checkpoints == {"f1"}
    assert (model.cells["DTD", "top1"].value, model.cells["DTD", "top1"].runs) == (31, 1)  # two probes of one run


def test_one_measurement_given_twice_is_one(tmp_path):
    results = tmp_path / "results.jsonl"
    write_row(results, 30)
    copy = tmp_path / "copy.jsonl"
    shutil.copy(results, copy)
    write_row(copy, 35, protocol="fast, bicubic")  # the same checkpoint judged in another way
    (model,) = page.group_models(records.read_results([results, results, copy]))
    assert (model.cells["DTD", "top1"].value, model.cells["DTD", "top1"].runs) == (35, 1)


def test_rows_of_a_repaired_dataset_replace_those_of_the_broken_one(tmp_path):
    results = tmp_path / "results.jsonl"
    write_row(results, 50, key="broken")
    write_row(results, 52, key="broken", seed=1)
    write_row(results, 70, key="whole")
    (model,) = page.group_models(records.read_results([results]))
    assert (model.cells["DTD", "top1"].value, model.cells["DTD", "top1"].runs) == (70, 1)


def test_two_models_of_one_name_are_refused(tmp_path):
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        write_row(tmp_path / f"{number}/results.jsonl", 10, checkpoint_sha256=f"f{number}")
    with pytest.raises(UserError, match=r"0/results.jsonl and .*1/results.jsonl hold two different models called a;"):
        records.read_results([tmp_path / f"{number}/results.jsonl" for number in range(2)])


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


def test_models_of_other_classes_in_a_close_look(tmp_path):
    """A class the other model does not know has no accuracy there, and matrices of other classes do not mix."""
    for name, ids in (("few", ["b", "d"]), ("many", ["a", "b", "c", "d"])):
        folder = tmp_path / name
        (folder / "eval").mkdir(parents=True)
        write_row(folder / "results.jsonl", 50, model=name, dataset="fruit", group="folder", checkpoint_sha256=name)
        per_class = [{"id": one, "n": 4, "top1": 50.0} for one in ids]
        look = {"dataset": "fruit", "checkpoint_sha256": name, "class_ids": ids, "class_names": ids}
        matrix = [[2] * len(ids) for _ in ids]
        write_json(folder / "eval/fruit.json", look | {"per_class": per_class, "confusion": matrix})
    looks = {name: records.read_sidecars(tmp_path / name) for name in ("many", "few")}
    (look,) = figures.close_looks(looks)
    assert [row["top1"] for row in look["classes"]] == [[50.0, None], [50.0, 50.0], [50.0, None], [50.0, 50.0]]
    assert look["labels"] == ["a", "b", "c", "d"]
    assert [model["confusion"] is None for model in look["models"]] == [False, True]
    (look,) = figures.close_looks(dict(reversed(looks.items())))
    assert look["labels"] == ["b", "d"] and len(look["models"][0]["confusion"]) == 2


@pytest.mark.parametrize(
    "content,message",
    [
        (None, "no file"),
        ("", "holds no result"),
        (
            '{"model": "a"}\n',
            r"a line that is no result \(Object missing required field `dataset`\); is it a results.jsonl",
        ),
        ("3\n", r"no result \(Expected `object`, got `int`\)"),
        (
            '{"model": "a", "dataset": "d", "metric": "top1", "value": NaN}\n',
            r"Expected `float` >= 0.0 - at `\$.value`",
        ),
        (
            '{"model": "a", "dataset": "d", "metric": "top1", "value": null}\n',
            r"Expected `float`, got `null` - at `\$.value`",
        ),
        (
            '{"model": "a", "dataset": "d", "metric": "top1", "value": 1e200}\n',
            r"Expected `float` <= 100.0 - at `\$.value`",
        ),
    ],
)
def test_bad_results_are_named(tmp_path, content, message):
    path = tmp_path / "results.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        page.write_report([path], tmp_path / "out")
    assert not (tmp_path / "out/report.html").exists()


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


def test_a_runs_data_folders_are_read_as_train_py_reads_them(tmp_path, monkeypatch):
    """Weights in any spelling are cut off; a folder whose own name ends in a number is not."""
    (tmp_path / "v:1").mkdir()
    options = {"data": ["data/sd:5e-1", f"{tmp_path}/v:1", "data/real:2"]}
    (tmp_path / "args.json").write_text(json.dumps({"options": options}))
    for name in ("sd", "real"):
        (tmp_path / "data" / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    found = [source.path for source in records.read_record(tmp_path / "args.json", records.Training).data()]
    assert found == ["data/sd", f"{tmp_path}/v:1", "data/real"]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium; on Debian: apt install chromium")
def test_nothing_is_wider_than_a_phone_except_what_scrolls_in_its_own_frame(two_models, tmp_path):
    """The page as a whole does not scroll sideways; a table that does has a shade at its edge."""
    text = (two_models / "report.html").read_text().replace("Can synthetic", "Can_" * 60 + "synthetic")
    probe = """<script>
      const wide = [...document.querySelectorAll(".wide")].filter(one => one.scrollWidth > one.clientWidth + 1);
      const shaded = wide.every(one => getComputedStyle(one).backgroundImage.split("linear-gradient").length == 5);
      document.title = [document.documentElement.scrollWidth <= innerWidth, wide.length > 0, shaded].join();
    </script>"""
    page = tmp_path / "phone.html"
    page.write_text(text.replace("</body>", probe + "</body>"))
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}/profile",
        "--window-size=390,900",
    ]
    command = ["chromium", *options, "--disable-background-networking", "--dump-dom", page.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout
    assert "<title>true,true,true</title>" in shown
