"""Sentences of the report against planted truths: what differs is said with its interval, and what does not, is not."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from PIL import Image

from utils import metrics
from utils.report import figures, page, records, tables, verdicts
from utils.report.records import Plan, Source, Training
from utils.report.tables import Cell, Model, difference
from utils.storage import append_jsonl, write_json

PAIRS = 200
MOST_FALSE = 14  # of 200 pairs without a difference, 7 %


def run_cell(correct: int, n: int) -> Cell:
    low, high = metrics.wilson_interval(correct, n)
    return Cell(100 * correct / n, low=low, high=high, n=n, num_classes=10)


def seeds_cell(values) -> Cell:
    return Cell(float(np.mean(values)), spread=float(np.std(values, ddof=1)), runs=len(values), n=900, num_classes=10)


def trained(name: str, cell: Cell, images: int = 900, steps: int = 168, data: Path | str = "real") -> Model:
    training = Training(plan=Plan(images, 14, steps // 14), sources=[Source(str(data), str(data) != "real")])
    model = Model(name, trainings=[training], cells={("digits", "top1"): cell})
    page.describe_training(model)
    return model


def generated(folder: Path, guidance: float, **recipe) -> Path:
    folder.mkdir(parents=True)
    write_json(folder / "dataset.json", {"classes": [], "recipe": {"guidance_scale": guidance, "prompt": "c"} | recipe})
    return folder


# ===== nothing is said where nothing is =====


@pytest.mark.parametrize("kind", ["one run each", "three seeds each", "pairs of images"])
def test_two_hundred_pairs_without_a_difference_give_few_verdicts(tmp_path, kind):
    rng = np.random.default_rng(20)
    low, high = generated(tmp_path / "g2", 2.0), generated(tmp_path / "g7", 7.5)
    false = {"headline": 0, "guidance": 0}
    for _ in range(PAIRS):
        if kind == "three seeds each":
            cells = [seeds_cell(rng.normal(97, 0.6, 3)) for _ in range(3)]
        else:
            hard = rng.normal(0, 1, 900) if kind == "pairs of images" else np.zeros(900)
            outcomes = [rng.normal(0, 0.7, 900) + hard < 1.2 for _ in range(3)]
            cells = [run_cell(int(one.sum()), 900) for one in outcomes]
            if kind == "pairs of images":
                for cell, one in zip(cells, outcomes, strict=True):
                    cell.outcomes, cell.judged = one, "the same"
        models = [trained("real", cells[0]), trained("g2", cells[1], data=low), trained("g7", cells[2], data=high)]
        said = verdicts.headline(models)
        assert len(said) == 2
        false["headline"] += "excludes zero" in said[0]
        false["guidance"] += "the paper" in said[1]
    assert false["headline"] <= MOST_FALSE and false["guidance"] <= MOST_FALSE, false


def test_a_planted_difference_is_found_and_has_its_sign(tmp_path):
    rng = np.random.default_rng(1)
    low, high = generated(tmp_path / "g2", 2.0), generated(tmp_path / "g7", 7.5)
    found = {"below": 0, "paper": 0}
    for _ in range(40):
        real, less, more = (seeds_cell(rng.normal(mean, 0.5, 3)) for mean in (99, 95, 91))
        said = verdicts.headline([trained("real", real), trained("g2", less, data=low), trained("g7", more, data=high)])
        found["below"] += bool(re.search(r"“g2”.*: -\d\.\d\d points .*; the interval excludes zero", said[0]))
        found["paper"] += "less guidance gave better training data, as the paper found" in said[1]
        assert "unlike" not in said[1]
    assert min(found.values()) >= 36, found


def test_a_difference_within_its_own_interval_is_no_finding(tmp_path):
    """+1.9 points over three seeds, which the spread over seeds does not carry."""
    less, more = [96.2, 97.1, 95.2], [94.9, 93.4, 94.5]
    models = [
        trained("g2", seeds_cell(less), data=generated(tmp_path / "g2", 2.0)),
        trained("g7", seeds_cell(more), data=generated(tmp_path / "g7", 7.5)),
    ]
    theirs = scipy.stats.ttest_ind(less, more, equal_var=False).confidence_interval()
    assert theirs.low < 0 < theirs.high
    (sentence,) = verdicts.headline(models)[1:]
    assert sentence == (
        f"Guidance 2 against 7.5: +1.90 points (95 % interval {theirs.low:+.2f} to {theirs.high:+.2f}, Welch over 3 "
        "and 3 seeds); the interval includes zero, so no difference is shown."
    )


def test_published_rows_neither_hide_a_finding_nor_are_subtracted_across_classes():
    """43.0 of 1,000 classes and 62.7 of 100 stand side by side; nobody recorded on how many images."""
    runs = [trained("real", run_cell(800, 900)), trained("other", run_cell(600, 900))]
    paper = [Model("1K", published=True), Model("100", published=True)]
    for model, value, classes in zip(paper, (43.0, 62.7), (1000, 100), strict=True):
        model.cells["IN-v2", "top1"] = Cell(value, num_classes=classes, group="imagenet")
    assert verdicts.headline([*runs, *paper]) == verdicts.headline(runs) != []
    made = tables.metric_table("t", [("IN-v2", "top1", "IN-v2")], paper)
    assert [row["differences"] for row in made["rows"]] == [[""], [""]]
    assert [row["sizes"] for row in made["rows"]] == [["1000 classes"], ["100 classes"]]
    paper[1].cells["IN-v2", "top1"] = Cell(62.7)  # not even the classes are known
    made = tables.metric_table("t", [("IN-v2", "top1", "IN-v2")], paper)
    assert made["note"] == "" and [row["sizes"] for row in made["rows"]] == [["1000 classes"], [""]]


def test_a_model_that_was_trained_on_test_images_is_named():
    real, other = trained("real", run_cell(800, 900)), trained("other", run_cell(820, 900))
    other.cells["digits", "top1"].leaked = 12
    assert verdicts.headline([real, other])[0].endswith("“other” was trained on 12 of these images.")


def test_a_finding_of_single_runs_says_that_seeds_were_not_varied(tmp_path):
    low, high = generated(tmp_path / "g2", 2.0), generated(tmp_path / "g7", 7.5)
    models = [trained("g2", run_cell(800, 900), data=low), trained("g7", run_cell(600, 900), data=high)]
    first, second = verdicts.headline(models)
    assert first.endswith("the interval excludes zero for these two runs; other seeds may differ.")
    assert second.endswith("less guidance gave better training data in these two runs, as the paper found.")


def test_seeds_that_all_agree_do_not_make_an_interval_of_nothing():
    assert difference(seeds_cell([99.0, 99.0]), seeds_cell([98.9, 98.9])) is None


def test_probe_seeds_of_one_run_are_no_runs_of_their_own():
    """Three runs probed with three seeds each are three; one run probed so has its own interval, not a deviation."""

    def rows(values: list[list[float]]) -> list[records.Row]:
        return [
            records.Row("m", "dtd", "top1", one, one - 2, one + 2, seed=seed, checkpoint_sha256=str(run))
            for run, its in enumerate(values)
            for seed, one in enumerate(its)
        ]

    first = tables.as_cell(rows([[80.0] * 3, [80.6] * 3, [81.2] * 3]))
    second = tables.as_cell(rows([[80.9] * 3, [81.5] * 3, [82.1] * 3]))
    theirs = scipy.stats.ttest_ind([80.9, 81.5, 82.1], [80.0, 80.6, 81.2], equal_var=False).confidence_interval()
    found = difference(second, first)
    assert (first.runs, first.spread) == (3, pytest.approx(0.6))
    assert (found.low, found.high) == (pytest.approx(theirs.low), pytest.approx(theirs.high)) and found.low < 0
    one = tables.as_cell(rows([[80.0, 80.3, 80.6]]))
    assert (one.runs, one.spread, one.low, one.high) == (1, None, pytest.approx(78.3), pytest.approx(82.3))
    assert one.value == pytest.approx(80.3)


# ===== several sets of one's own =====


def test_the_first_folder_is_the_headline_and_transfer_has_a_sentence_of_its_own(tmp_path):
    low = generated(tmp_path / "g2", 2.0)
    models = [trained("real", seeds_cell([84.0, 84.2, 84.1])), trained("g2", seeds_cell([81.0, 81.2, 80.9]), data=low)]
    probed = [[93.0, 93.4, 93.2], [93.1, 93.5, 92.9]]
    for model, values in zip(models, probed, strict=True):
        model.cells["noisy", "top1"] = seeds_cell([50.0, 51.0, 52.0])
        model.cells["other", "top1"] = replace(seeds_cell(values), group="transfer")
    gap, transfer = verdicts.headline(models)
    assert "“g2” (900 synthetic images, 168 steps) recognises 81.0 ± 0.2 % of 900 real images" in gap
    theirs = scipy.stats.ttest_ind(probed[1], probed[0], equal_var=False).confidence_interval()
    assert theirs.low < 0 < theirs.high
    assert transfer == (
        "Transfer to other, by linear probes of the frozen features: “g2” 93.2 ± 0.3 %, “real” 93.2 ± 0.2 %: "
        f"-0.03 points (95 % interval {theirs.low:+.2f} to {theirs.high:+.2f}, Welch over 3 and 3 seeds); the interval "
        f"includes zero: on a par, to within {-theirs.low:.1f} points."
    )
    models[1].cells["other", "top1"] = replace(seeds_cell([90.0, 90.1, 90.2]), group="transfer")
    said = verdicts.headline(models)[1]
    assert "-3.10 points" in said and said.endswith("; the interval excludes zero.") and "par" not in said
    del models[0].cells["other", "top1"]
    assert len(verdicts.headline(models)) == 1


# ===== intervals of pairs =====


def test_paired_intervals_cover_the_truth_and_are_narrower():
    rng = np.random.default_rng(3)
    truth = 100 * (scipy.stats.norm.cdf(1.2 / np.hypot(1, 0.7)) - scipy.stats.norm.cdf(1.0 / np.hypot(1, 0.7)))
    covered, widths = 0, []
    for _ in range(600):
        hard = rng.normal(0, 1, 400)
        a, b = (rng.normal(0, 0.7, 400) + hard < limit for limit in (1.2, 1.0))
        first, second = run_cell(int(a.sum()), 400), run_cell(int(b.sum()), 400)
        alone = difference(first, second)
        first.outcomes, second.outcomes, first.judged, second.judged = a, b, "x", "x"
        together = difference(first, second)
        covered += together.low <= truth <= together.high
        widths.append((together.high - together.low) / (alone.high - alone.low))
    assert 0.93 <= covered / 600 <= 0.985
    assert np.mean(widths) < 0.85 and max(widths) <= 1


def test_paired_intervals_are_those_of_the_literature():
    """Airway hyper-responsiveness before and after a transplantation, 1, 1, 7 and 12 of 21 (Bentur et al., 2009).

    Fagerland, Lydersen and Laake, Statistics in Medicine 33 (2014), 2850, give -0.507 to -0.026 for Newcombe's method.
    """
    before, after = np.repeat([1, 1, 0, 0], (1, 1, 7, 12)) > 0, np.repeat([1, 0, 1, 0], (1, 1, 7, 12)) > 0
    cells = [run_cell(int(one.sum()), 21) for one in (before, after)]
    for cell, one in zip(cells, (before, after), strict=True):
        cell.outcomes, cell.judged = one, "the same children"
    found = difference(*cells)
    assert (found.value, found.low, found.high) == pytest.approx((-28.57, -50.7, -2.6), abs=0.05)


def test_outcomes_of_other_images_are_not_paired():
    right = np.ones(9, bool)
    cells = [run_cell(9, 9), run_cell(9, 9)]
    for cell, judged in zip(cells, ("a", "b"), strict=True):
        cell.outcomes, cell.judged = right, judged
    assert difference(*cells).source == "Newcombe, one run each"


def test_outcomes_are_read_from_the_sidecars(tmp_path):
    right = np.arange(20) % 4 > 0
    for name in ("a", "b"):
        (tmp_path / name / "eval").mkdir(parents=True)
        row = {"model": name, "dataset": "d", "metric": "top1", "value": 75.0, "low": 53.1, "high": 88.8, "n": 20}
        append_jsonl(tmp_path / name / "results.jsonl", row | {"checkpoint_sha256": name})
        packed = base64.b64encode(np.packbits(right).tobytes()).decode()
        look = {"dataset": "d", "checkpoint_sha256": name, "class_ids": ["k"], "class_names": ["k"], "correct": packed}
        write_json(
            tmp_path / name / "eval/d.json", look | {"images": "x", "per_class": [{"id": "k", "n": 20, "top1": 75}]}
        )
    a, b = page.group_models(records.read_results([tmp_path / name / "results.jsonl" for name in "ab"]))
    np.testing.assert_array_equal(a.cells["d", "top1"].outcomes, right)
    found = difference(a.cells["d", "top1"], b.cells["d", "top1"])
    assert found.source == "Newcombe for pairs, one run each" and not found.shown
    assert found.high - found.low < 25  # the same answers throughout; of other images it would be 50


# ===== what is compared =====


def test_unequal_sizes_are_said_and_a_run_of_equal_budget_is_named(tmp_path):
    sd = generated(tmp_path / "sd", 2.0)
    real = trained("real", seeds_cell([99.1, 99.3, 99.2]), images=898, steps=168)
    many = trained("many", seeds_cell([98.9, 98.8, 98.7]), images=2000, steps=364, data=sd)
    (said,) = verdicts.headline([real, many])
    assert "“many” (2,000 synthetic images, 364 steps)" in said and "“real” (898 real images, 168 steps)" in said
    assert "no run here has an equal budget" in said and "twin" not in said
    few = trained("few", seeds_cell([97.2, 97.0, 97.1]), images=900, steps=168, data=sd)
    said = verdicts.headline([real, many, few])[0]
    assert "At an equal budget “few” has 97.1 ± 0.1 %: -2.10 points" in said
    made = tables.make_tables([real, many, few], [records.Row("real", "digits", "top1", 99.2)])[0]
    assert made["facts"] == ["trained on", "steps", "budget"]
    assert [row["facts"] for row in made["rows"]] == [
        ["898 real", "168 steps", ""],
        ["2,000 synthetic", "364 steps", ""],
        ["900 synthetic", "168 steps", "the budget of real"],
    ]


def test_the_grade_of_supervision_stands_beside_the_numbers(tmp_path):
    real, sd = (
        trained("real", seeds_cell([99.1, 99.3, 99.2])),
        trained("sd", seeds_cell([98.9, 98.8, 98.7]), data=generated(tmp_path / "sd", 2.0)),
    )
    real.supervision = "labelled images"
    rows = [records.Row("real", "digits", "top1", 99.2)]
    assert "supervision" not in tables.make_tables([real, sd], rows)[0]["facts"]  # the kind says as much
    sd.supervision = "captions of real images"
    made = tables.make_tables([real, sd], rows)[0]
    assert made["facts"][1] == "supervision"
    assert [row["facts"][1] for row in made["rows"]] == ["labelled images", "captions of real images"]


def test_guidance_is_not_credited_where_something_else_differs_too(tmp_path):
    cells = seeds_cell([97.0, 97.1, 97.2]), seeds_cell([91.0, 91.1, 91.2])
    folders = generated(tmp_path / "a", 2.0), generated(tmp_path / "b", 7.5, prompt="c, d_c")
    said = verdicts.headline([trained(f.name, cell, data=f) for f, cell in zip(folders, cells, strict=True)])[1]
    assert said.endswith("but the datasets differ in prompt too.")
    more = trained("b", cells[1], images=2000, data=generated(tmp_path / "c", 7.5))
    assert len(verdicts.headline([trained("a", cells[0], data=folders[0]), more])) == 1  # other sizes: not compared


def test_variety_is_claimed_only_where_it_was_measured(tmp_path):
    folders = generated(tmp_path / "g2", 2.0), generated(tmp_path / "g7", 7.5)
    cells = seeds_cell([97.0, 97.1, 97.2]), seeds_cell([91.0, 91.1, 91.2])

    def sentence() -> str:
        models = [trained(f.name, cell, data=f / "train") for f, cell in zip(folders, cells, strict=True)]
        return verdicts.headline(models)[1]

    assert "varied" not in sentence() and "variety" not in sentence()
    rng = np.random.default_rng(0)
    first = rng.normal(0.5, 0.1, 10)
    second = first - rng.normal(0.1, 0.02, 10)
    for folder, values in zip(folders, (first, second), strict=True):
        classes = [{"id": f"c{number}", "diversity": value} for number, value in enumerate(values)]
        write_json(folder / "dataset_report.json", {"descriptor": "features of net", "classes": classes})
    theirs = scipy.stats.ttest_rel(first, second).confidence_interval()
    interval = f"(95 % interval {theirs.low:+.3f} to {theirs.high:+.3f} over 10 classes)"
    assert f"{interval}, so less guidance drew more varied images." in sentence()
    write_json(folders[1] / "dataset_report.json", {"descriptor": "thumbnails", "classes": classes})
    assert "varied" not in sentence()  # measured in another way


# ===== colours and the radar plot =====


def rows_of(
    path: Path, model: str, synthetic: bool, num_classes: int = 100, sets=("IN-Val", "IN-Sketch", "IN-R")
) -> Path:
    path.mkdir()
    write_json(path / "args.json", {"sources": [{"path": "x", "synthetic": synthetic}]})
    for name in sets:
        row = {"model": model, "dataset": name, "group": "imagenet", "metric": "top5", "value": 60.0, "n": 50}
        append_jsonl(path / "results.jsonl", row | {"num_classes": num_classes})
    return path / "results.jsonl"


def test_colours_go_by_the_training_images_not_by_the_order(tmp_path):
    files = [
        rows_of(tmp_path / "s", "sd", True),
        rows_of(tmp_path / "r", "real", False),
        rows_of(tmp_path / "t", "t", True),
    ]
    models = page.group_models(records.read_results(files))
    assert [model.color for model in models] == ["#d6303a", "#2166ac", "#f4a582"]
    assert page.group_models(records.read_results(files[::-1]))[1].color == "#2166ac"


def test_an_earlier_run_is_coloured_by_what_lies_at_its_data_folder(tmp_path):
    file = rows_of(tmp_path / "run", "a", True)
    for data, kind in ((generated(tmp_path / "sd", 2.0), "synthetic"), (tmp_path, "real"), (tmp_path / "gone", "")):
        (tmp_path / "run/args.json").write_text(json.dumps({"options": {"data": [f"{data}:2"]}}))
        assert page.group_models(records.read_results([file]))[0].kind == kind


def test_the_radar_plot_marks_what_may_not_be_compared(tmp_path):
    files = [
        rows_of(tmp_path / "a", "$hundred$", True, 100),
        rows_of(tmp_path / "b", "thousand" + " with a very long name" * 4, False, 1000),
        rows_of(tmp_path / "c", "one", True, 1000, sets=("IN-Val",)),
    ]
    assert page.write_report(files, tmp_path / "out")
    picture = (tmp_path / "out/radar.svg").read_text()
    assert "$hundred$ (100 classes)" in picture and "long name (1,000 classes)" in picture
    assert "one (1,000 classes, 1 of 3 axes)" in picture and "stroke-dasharray" in picture
    assert "answer an easier question" in (tmp_path / "out/report.md").read_text()
    pixels = np.asarray(Image.open(tmp_path / "out/radar.png").convert("L"))
    border = np.concatenate([pixels[:8].ravel(), pixels[-8:].ravel(), pixels[:, :8].ravel(), pixels[:, -8:].ravel()])
    assert (border == 255).all()  # no label is cut


def test_a_report_says_why_it_has_no_radar_plot(tmp_path):
    written = page.write_report([rows_of(tmp_path / "a", "a", True, sets=("IN-Val", "IN-R"))], tmp_path / "out")
    assert [path.name for path in written] == ["report.html", "report.md"]
    for path in written:
        assert "No radar plot: it needs 3 of its 8 axes" in path.read_text()
        assert "known here: IN-Val top-5, IN-R top-5." in path.read_text()


def test_counts_over_seeds_are_told_apart_from_images(tmp_path):
    scores = [records.ClassScore("k", 89, 100.0)]
    look = records.Sidecar(
        dataset="d", checkpoint_sha256="x", class_ids=["k"], class_names=["k"], per_class=scores, confusion=[[89]]
    )
    (shown,) = figures.close_looks({"real": [look] * 3})
    assert shown["classes"][0]["n"] == 89 and shown["models"][0]["runs"] == 3
    assert shown["models"][0]["confusion"][0][0]["count"] == 267
