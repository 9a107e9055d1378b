"""The recipe: what settles it, what it refuses, and that datasets of earlier versions are continued."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from tests.generation.test_generate import call, entries, files_of, tiny  # noqa: F401
from utils.cli import UserError
from utils.dataset.folder import Dataset, open_dataset
from utils.generation.pipeline import find_pipeline
from utils.generation.recipe import RECIPES, Recipe

# A dataset that the version before this class drew: 3 classes of 3 images, a random pipeline (tests/tiny_sd.py).
RECORDED = Path(__file__).parent / "recorded"
ZERO = "n13742358"
OPTIONS = ("--recipe", "fast", "--classes", str(RECORDED / "digits.tsv"))


def existing(recipe: Recipe) -> Dataset:
    recorded = json.loads(json.dumps(recipe.record()))
    return Dataset(Path("out"), {"recipe": recorded | {"batch_size": 4}, "classes": [{"id": "cat", "images": 7}]})


def test_every_key_has_a_kind_and_the_sampler_keys_are_those_of_the_recipes():
    kinds = {key.name: key.metadata["kind"] for key in fields(Recipe)}
    assert set(kinds.values()) == {"prompt", "sampler", "machine", "storage"}
    for values in RECIPES.values():
        assert {kinds[key] for key in values} == {"sampler"}
    assert Recipe() == replace(Recipe.asked("paper", format="jpg"))  # the defaults are the paper's


COUNTS = {"cat": 7}


def test_what_is_left_open_is_taken_from_the_folder_and_nothing_else_is():
    made = Recipe(height=16, width=16, dtype="fp32", attention="sdpa", batch_size=4, safety="off")
    assert Recipe().settle(existing(made), COUNTS) == made
    assert Recipe().settle(None, COUNTS) == Recipe()
    fast = replace(made, **RECIPES["fast"])
    assert replace(fast, batch_size=None).settle(existing(fast), COUNTS) == fast  # JSON turned the interval into a list


def test_another_recipe_is_refused_with_a_diff():
    made = existing(Recipe(dtype="fp32", batch_size=4))
    with pytest.raises(UserError, match='steps is 50, asked 20; dtype is "fp32", asked "fp16"'):
        Recipe(steps=20, dtype="fp16").settle(made, COUNTS)


def test_a_set_may_grow_and_never_shrink():
    made = existing(Recipe(images_per_class="10x"))
    for images, asked in (("50x", 35), ("10x", 7), (8, 8)):
        assert Recipe(images_per_class=images).settle(made, {"cat": asked}).images_per_class == images
    with pytest.raises(UserError, match='images_per_class is "10x", asked 6'):
        Recipe(images_per_class=6).settle(made, {"cat": 6})


def test_other_attention_kernels_continue_a_set_and_what_may_change_is_told(capsys):
    made = existing(Recipe(attention="xformers"))
    assert Recipe().settle(made, COUNTS).attention == "xformers" and not capsys.readouterr().err
    assert Recipe(attention="sdpa").settle(made, COUNTS).attention == "sdpa"
    said = capsys.readouterr().err
    assert "drawn with --attention xformers; with sdpa low bits" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe(height=17), "--height 17: this model draws multiples of 2 pixels"),
        (Recipe(save_size=17), "--save-size 17 is larger than the images"),
        (Recipe(safety="keep"), "--safety keep: .* has no safety checker"),
    ],
)
def test_what_the_model_cannot_do_is_refused(tiny, recipe, message):  # noqa: F811
    with pytest.raises(UserError, match=message):
        recipe.with_model(find_pipeline(str(tiny)))


def test_the_model_and_the_device_fill_in_what_is_left(tiny):  # noqa: F811
    recipe = Recipe().with_model(find_pipeline(str(tiny)))
    assert (recipe.height, recipe.width, recipe.safety) == (16, 16, "off")
    assert replace(recipe, dtype="fp32").with_device(torch.device("cpu")).attention == "sdpa"
    with pytest.raises(UserError, match="--dtype fp16: half precision needs a GPU"):
        replace(recipe, dtype="fp16").with_device(torch.device("cpu"))


# ===== a dataset.json of the version before =====


@pytest.fixture
def recorded(tmp_path, tiny):  # noqa: F811
    """A copy of the recorded dataset. Its model's files are those of this machine: libraries change how they save."""
    out = shutil.copytree(RECORDED, tmp_path / "recorded")
    info = json.loads((out / "dataset.json").read_text())
    info["model"]["files"] = find_pipeline(str(tiny)).hashes(False)
    (out / "dataset.json").write_text(json.dumps(info, indent=2))
    return out


def test_a_recorded_recipe_is_read_and_written_as_it_was():
    dataset = open_dataset(RECORDED)
    assert Recipe.of(dataset).record() == dataset.recipe
    assert list(Recipe.of(dataset).record()) == list(dataset.recipe)  # in the same order
    assert Recipe.of(dataset).guidance_interval == (0.28, 5.42)


def test_a_dataset_of_the_version_before_is_continued(recorded, tiny, capsys):  # noqa: F811
    before = files_of(recorded)
    assert call(recorded, tiny, *OPTIONS, images=3, batch=None) == 0
    assert "nothing to do, all 9 images are here" in capsys.readouterr().out
    (recorded / "train" / ZERO / f"{ZERO}_000001.jpg").unlink()
    assert call(recorded, tiny, *OPTIONS, images=3, batch=None) == 0, capsys.readouterr().err
    assert "this run drew 2" in capsys.readouterr().out  # a batch is drawn whole
    assert files_of(recorded).keys() == before.keys()
    plain = [json.loads(line) for line in before[f"manifest/{ZERO}.jsonl"].splitlines()]
    kept = ("id", "index", "prompt", "seed", "attempt", "rejected", "safety")
    assert [[e[k] for k in kept] for e in entries(recorded, ZERO)] == [[e[k] for k in kept] for e in plain]
    assert call(recorded, tiny, *OPTIONS, images=3, batch=3) == 2
    assert "batch_size is 2, asked 3" in capsys.readouterr().err


def test_a_dataset_of_the_version_before_is_reproduced(recorded, tiny, capsys):  # noqa: F811
    assert call("unused", tiny, "--reproduce", recorded, "--sample", "9", batch=None) == 0
    said = capsys.readouterr().out
    assert "drawing 9 of its 9 images again" in said and "different: 0" in said
