"""generate.py --reproduce: a dataset drawn again by its own record, and what is said of the differences."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import generate
from tests.generation.test_generate import BAG, call, entries, files_of, tiny, tiny_safe  # noqa: F401
from utils.cli import run
from utils.generation import diffusion, reproduction
from utils.generation.drawing import encode_image
from utils.machine import cpu_has_bf16
from utils.storage import sha256_bytes


@pytest.fixture
def drawn(tmp_path, tiny):  # noqa: F811
    out = tmp_path / "out"
    assert call(out, tiny) == 0
    return out


def reproduce(out, *options) -> int:
    return call("unused", reproduction_model(out), "--reproduce", out / "dataset.json", *options, batch=None)


def reproduction_model(out):
    return json.loads((out / "dataset.json").read_text())["model"]["id"]


def replace_image(out, index: int, change) -> None:
    """Put change(pixels) in the place of an image of the first class, as if it had been drawn so."""
    path = out / f"train/{BAG}/{BAG}_{index:06d}.jpg"
    data = encode_image(change(np.asarray(Image.open(path))), "jpg", None)
    path.write_bytes(data)
    lines = entries(out, BAG)
    lines[index] |= {"bytes": len(data), "sha256": sha256_bytes(data)}
    (out / f"manifest/{BAG}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_same_machine_draws_the_same_bytes_and_touches_nothing(drawn, capsys):
    before = files_of(drawn)
    assert reproduce(drawn, "--sample", "4") == 0
    said = capsys.readouterr().out
    assert "drawing 4 of its 21 images again: 2 whole batches" in said or "drawing 6 of" in said
    assert "different: 0" in said and "near-equal: 0" in said and "this machine: as recorded" in said
    assert files_of(drawn) == before


def test_a_sample_larger_than_the_dataset_is_the_whole_dataset(drawn, capsys):
    assert reproduce(drawn, "--sample", "1000") == 0
    assert "byte-equal: 21\n" in capsys.readouterr().out


def test_redrawn_images_are_redrawn_again(tmp_path, tiny_safe, monkeypatch, capsys):  # noqa: F811
    from utils.generation import diffusion

    def flag_some(self, pixels):
        return [int(image.sum()) % 3 == 0 for image in pixels]

    monkeypatch.setattr(diffusion.Sampler, "flagged", flag_some)
    out = tmp_path / "out"
    assert call(out, tiny_safe) == 0
    assert any(line["attempt"] for line in entries(out, BAG)), "no image was redrawn: the test shows nothing"
    assert reproduce(out, "--sample", "21") == 0
    assert "byte-equal: 21\n" in capsys.readouterr().out


def test_near_equal_different_and_damaged_images_are_told_apart(drawn, capsys):
    replace_image(drawn, 1, lambda pixels: np.clip(pixels.astype(int) + 1, 0, 255).astype(np.uint8))
    replace_image(drawn, 4, lambda pixels: 255 - pixels)
    (drawn / f"train/{BAG}/{BAG}_000005.jpg").write_bytes(b"half a fi")
    assert reproduce(drawn, "--sample", "21") == 1
    said = capsys.readouterr().out
    assert "byte-equal: 18\n" in said
    assert f"({BAG}_000001)" in said.split("near-equal: 1")[1].splitlines()[0]
    assert f"({BAG}_000004)" in said.split("different: 1")[1].splitlines()[0]
    assert f"damaged or missing in the dataset: 1 ({BAG}_000005)" in said


def test_what_differs_from_the_record_is_listed(drawn, capsys):
    info = json.loads((drawn / "dataset.json").read_text())
    info["environment"] |= {"cpu": "Abacus 9", "gpus": ["NVIDIA A100"]}
    info["environment"]["packages"]["torch"] = "1.12.0"
    info["recipe"]["dtype"], info["recipe"]["attention"] = "fp16", "xformers"  # which this machine cannot do
    (drawn / "dataset.json").write_text(json.dumps(info))
    reproduce(drawn, "--batch-size", "1")
    said = capsys.readouterr().out
    assert 'cpu: recorded "Abacus 9", here ' in said and 'packages.torch: recorded "1.12.0", here "2.10.0' in said
    assert 'gpus: recorded ["NVIDIA A100"], here []' in said
    assert f'recipe.dtype: recorded "fp16", here "{"bf16" if cpu_has_bf16() else "fp32"}"' in said
    assert 'recipe.attention: recorded "xformers", here "sdpa"' in said
    assert "recipe.batch_size: recorded 3, here 1" in said


def test_the_recorded_model_is_taken_unless_another_is_named(drawn, capsys):
    def reproduce_with(*model: str) -> int:
        return run(generate.main, generate.get_args_parser(), ["--reproduce", str(drawn), "--sample", "1", *model])

    assert reproduce_with() == 0
    assert reproduce_with("--model", generate.DEFAULT_MODEL) == 2  # also if that is what other commands take by default
    assert f"--model {generate.DEFAULT_MODEL}" in capsys.readouterr().err


def test_batches_split_for_want_of_memory_are_mentioned(drawn, monkeypatch, capsys):
    assert reproduce(drawn, "--sample", "1") == 0
    assert "memory ran out" not in capsys.readouterr().out
    lines = (drawn / "sessions.jsonl").read_text()
    assert '"micro_batch": 3' in lines
    (drawn / "sessions.jsonl").write_text(lines + lines.replace('"micro_batch": 3', '"micro_batch": 1'))
    plain = diffusion.Sampler._denoise

    def small_memory(self, latents, texts, on_step):
        if len(latents) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(self, latents, texts, on_step)

    monkeypatch.setattr(diffusion.Sampler, "_denoise", small_memory)
    assert reproduce(drawn, "--sample", "21") == 0
    said = capsys.readouterr().out
    assert "memory ran out in 1 sessions" in said and "here, so at most 1 images were denoised at once" in said


def test_what_cannot_be_reproduced_is_refused_before_the_model_is_loaded(drawn, tmp_path, tiny, capsys):  # noqa: F811
    (tmp_path / "empty").mkdir()
    assert call("unused", tiny, "--reproduce", tmp_path / "empty") == 2
    assert "no dataset here" in capsys.readouterr().err
    assert call("unused", tiny, "--reproduce", tmp_path / "nowhere.json") == 2
    assert "nowhere.json does not exist" in capsys.readouterr().err

    other = shutil.copytree(tiny, tmp_path / "other")
    settings = json.loads((other / "unet/config.json").read_text())
    (other / "unet/config.json").write_text(json.dumps(settings | {"note": "another model"}))
    assert call("unused", other, "--reproduce", drawn) == 2
    assert "is not the model" in (said := capsys.readouterr().err) and "unet/config.json differs" in said

    info = json.loads((drawn / "dataset.json").read_text())
    info["classes"][0]["name"] = "null"
    (drawn / "dataset.json").write_text(json.dumps(info))
    assert call("unused", tiny, "--reproduce", drawn) == 2
    assert "its classes are not those of its recipe" in capsys.readouterr().err


def test_psnr():
    black, white = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 255, np.uint8)
    assert reproduction.psnr_db(black, white) == 0
    assert reproduction.psnr_db(black, black) == math.inf
    assert reproduction.psnr_db(black, black + 1) == pytest.approx(48.13, abs=0.01)
    assert math.isnan(reproduction.psnr_db(black, white[:1]))
