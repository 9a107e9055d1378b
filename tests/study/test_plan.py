"""What a study file becomes: commands that the scripts take, one-line refusals, folders that know what still holds."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path

import pytest

import evaluate
import generate
import train
from tests.study.world import ROOT, STUDY, make_world
from utils.cli import UserError
from utils.study.cost import costs
from utils.study.plan import make_plan
from utils.study.spec import read_study


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder


@pytest.fixture
def world(shared, monkeypatch) -> Path:
    monkeypatch.chdir(shared)
    for name in ("data", "runs"):
        shutil.rmtree(shared / name, ignore_errors=True)
    return shared


def plan_of(text: str = STUDY):
    Path("study.toml").write_text(text)
    return make_plan(read_study(Path("study.toml")))


def test_a_study_becomes_commands_that_the_scripts_take(world):
    plan = plan_of()
    assert len(plan.points) == 6 + 6 + 2 + 2 + 2 and len({point.folder for point in plan.points}) == 18
    for point in plan.points:
        words = list(point.command)
        assert words[:5] == ["-m", "utils.launch", "--launcher", "local", "train.py"]
        middle = words.index("--then")
        args = train.get_args_parser().parse_args(words[5:middle])
        assert words[middle + 1] == "evaluate.py" and evaluate.get_args_parser().parse_args(words[middle + 2 :])
        recipe = train.make_recipe(args)
        assert recipe["epochs"] * (point.images // 8) == 12  # optimizer steps: as many for every point
        assert recipe["warmup_epochs"] == pytest.approx(recipe["epochs"] / 6)  # the recipe's share
    by_title = {point.title: train.get_args_parser().parse_args(point.train) for point in plan.points}
    assert by_title["half-n8-share0.5"].data == ["real:0.5", "data/study/g2:0.5"]
    assert by_title["more-n4+12"].images_per_class == [4, 12] and by_title["more-n4+12"].data[1].endswith("g2:12")
    assert by_title["real-n4"].images_per_class == 4


def test_each_dataset_is_drawn_once_at_its_largest_size(world):
    plan = plan_of()
    words = {name: dataset.words for name, dataset in plan.datasets.items()}
    assert words["real"] == () and "--images-per-class=16" in words["g2"] and "--images-per-class=8" in words["g1"]
    assert (
        "drawing: 72 images, 360 UNet forwards"
        in costs(plan_of(STUDY.replace("steps = 2\n", "steps = 2\nrate = 9\n")))[1]
    )


def test_equal_epochs_are_the_recipes(world):
    plan = plan_of(STUDY.replace("steps = 12\n", ""))
    assert {train.make_recipe(train.get_args_parser().parse_args(p.train))["epochs"] for p in plan.points} == {12}


REFUSED = {
    "unknown key": ("reference =", "referenc =", "study.toml: referenc: unknown; did you mean reference?"),
    "unknown row": ('rows = ["real", "g2"]\nshares', 'rows = ["real", "g3"]\nshares', "[mixes.half] rows: g3: unknown"),
    "unknown test": (
        'toys = "test"', 'toys = "tset"', "[tests] toys: no folder tset; expected tset/<class id>/<images>",
    ),
    "unknown set": ("[tests]", 'datasets = ["IN-Vall"]\n[tests]', "datasets: IN-Vall: unknown"),
    "unknown option": ("guidance_scale = 2.0", "guidance = 2.0", "[rows.g2] generate guidance: unknown; did you mean"),
    "bad option": (
        "guidance_scale = 2.0", "guidance_scale = -1", "[rows.g2] generate: argument --guidance-scale: '-1'",
    ),
    "bad prompt": ('prompt = "c" }', 'prompt = "c, x_c" }', "[rows.g2] generate"),
    "own option": ("[train]", "[train]\nseed = 3", "[train] seed: the study gives this option itself; leave it out"),
    "bad recipe": ("batch_size = 8", "batch_sise = 8", "[train] batch_sise: unknown; did you mean batch_size?"),
    "bad set": ('"global_size=16"', '"global_sise=16"', "[train]: --set global_sise=16: unknown key"),
    "real too small": (
        "sizes = [4, 8, 16]", "sizes = [4, 8, 17]", "[rows.real] sizes: 17 a class, but real holds at most 16",
    ),
    "no folder": ('folder = "real"', 'folder = "reel"', "[rows.real] folder: no folder reel"),
    "size of nothing": (
        "sizes = [8]\n\n[mixes.half]", "sizes = [0]\n\n[mixes.half]", "[rows.g1] sizes[0]: expected int",
    ),
    "share": ("shares = [0.5]", "shares = [1.5]", "[mixes.half] shares[0]: expected float < 1"),
    "both kinds": (
        "shares = [0.5]", "shares = [0.5]\nfirst = 4", "[mixes.half]: give either shares = [...] or first = N",
    ),
    "steps": ("steps = 12", "steps = 8", "steps: 8 are no whole number of epochs of real-n8, which has 3 steps in one"),
    "batch": ("batch_size = 8", "batch_size = 64", "sizes: real-n4 has 12 images, fewer than a batch of 64"),
    "reference": ('reference = "real"', 'reference = "reel"', "reference: reel: unknown; did you mean real?"),
    "twice": ('title = "Can', 'sizes = [3]\ntitle = "Can', "not valid TOML"),
}  # fmt: skip


@pytest.mark.parametrize("fault", REFUSED)
def test_a_mistake_is_one_line_that_names_file_table_and_key(world, fault):
    right, wrong, message = REFUSED[fault]
    assert right in STUDY
    with pytest.raises(UserError) as caught:
        plan_of(STUDY.replace(right, wrong, 1))
    said = str(caught.value)
    assert said.startswith("study.toml: ") and message in said and "\n" not in said


def test_a_dataset_that_was_drawn_with_other_options_is_refused(world):
    plan = plan_of()
    words = [word.replace("=2.0", "=7.5") for word in plan.datasets["g2"].words]
    assert generate.main(generate.get_args_parser().parse_args(words)) == 0
    with pytest.raises(UserError) as caught:
        plan_of()
    said = str(caught.value)
    assert said.startswith("study.toml: [rows.g2] generate (data/study/g2): ") and "guidance_scale" in said
    assert "7.5" in said and "\n" not in said
    asked = STUDY.replace("guidance_scale = 2.0", "guidance_scale = 7.5")
    assert plan_of(asked).datasets["g2"].drawn  # as it was drawn
    fewer = plan_of(asked.replace("sizes = [4, 8, 16]", "sizes = [4, 8]").replace("[4, 12]", "[4]"))
    assert "--images-per-class=16" in fewer.datasets["g2"].words  # a set never shrinks: its first images are taken


def test_a_changed_study_names_what_is_stale_and_keeps_the_rest(world):
    before = plan_of()
    for point in before.points:
        point.judged.mkdir(parents=True)
    assert before.stale() == []
    shutil.copytree(world / "test", world / "test2", dirs_exist_ok=True)
    changes = {
        "another option of one row": ("guidance_scale = 1.0", "guidance_scale = 3.0", {"g1"}),
        "another share": ("shares = [0.5]", "shares = [0.25]", {"half"}),
        "a size more": ("sizes = [8]\n\n[mixes.half]", "sizes = [8, 16]\n\n[mixes.half]", set()),
        "where it runs": ("workers = 0", "workers = 1", set()),
        "the recipe": ("batch_size = 8", "batch_size = 12", {"real", "g2", "g1", "half", "more"}),
    }
    for change, (old, new, groups) in changes.items():
        plan = plan_of(STUDY.replace(old, new))
        kept = {point.folder for point in plan.points} & {point.folder for point in before.points}
        assert {path.name.split("-n")[0] for path in plan.stale() if not path.name.startswith("judged")} == groups, (
            change
        )
        assert len(kept) == sum(point.group not in groups for point in before.points), change
    judged = plan_of(STUDY.replace('toys = "test"', 'toys = "test2"'))  # the weights hold, what they were judged on not
    assert {path.name[:7] for path in judged.stale()} == {"judged-"} and len(judged.stale()) == len(before.points)


def test_500_points_are_planned_in_two_seconds(world):
    rows = "".join(f"\n[rows.r{i}]\ngenerate = {{ guidance_scale = {1 + i}.0 }}\n" for i in range(19))
    text = STUDY.partition("[rows.g2]")[0] + rows
    text = text.replace("sizes = [4, 8, 16]", "sizes = [4, 6, 8, 12, 16]").replace(
        "seeds = [0, 1]", "seeds = [0, 1, 2, 3, 4]"
    )
    text = text.replace("steps = 12\n", "")
    plan_of(text)
    started = time.process_time()
    assert len(plan_of(text).points) == 500
    assert time.process_time() - started < 2


SHIPPED = sorted((ROOT / "studies").glob("*.toml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_study_is_reckoned_on_any_machine(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", "")  # no nvidia-smi: as on a laptop
    study = read_study(path)
    plan = make_plan(study, on_paper=True)
    assert study.reference == "real" and len(plan.points) > 10
    for row in study.rows.values():
        for size, value in row.published.items():
            assert re.search(rf"\b{value}\b", (ROOT / "docs/reproduce-the-paper.md").read_text()), (path.stem, size)


def test_the_study_of_imagenet_100_has_every_row_of_the_paper():
    """docs/reproduce-the-paper.md lists them: prompt and guidance of each drawn row, and 1x, 10x, 20x, 50x."""
    text = (ROOT / "docs/reproduce-the-paper.md").read_text().split("## Commands")[1].split("## Cost")[0]
    wanted = {
        (prompt, float(scale)) for prompt, scale in re.findall(r'CLASSES=100 PROMPT="(.+?)" GUIDANCE=(\S+)', text)
    }
    study = read_study(ROOT / "studies/imagenet_100.toml")
    drawn = {(r.generate["prompt"], r.generate["guidance_scale"]) for r in study.rows.values() if r.generate}
    assert wanted and drawn == wanted | {("c, d_c", 2.0)}
    assert {1300, 13000, 26000, 65000} <= {*study.rows["cd-g2"].sizes}
