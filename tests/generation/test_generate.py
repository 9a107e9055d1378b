"""generate.py end to end with a random pipeline: resume, refusals, repairs, redraws, formats."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import generate
from tests.tiny_sd import build_tiny_sd
from utils.cli import run
from utils.generation import diffusion, drawing, loading, plan
from utils.generation.pipeline import NoiseSchedule, find_pipeline
from utils.generation.prompts import image_seed, parse_template
from utils.generation.recipe import Recipe

CLASSES = "n02774152, n02872752, n03057021"  # bag, boot, coat of the embedded world
BAG, BOOT, COAT = "n02774152", "n02872752", "n03057021"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return build_tiny_sd(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_safe(tmp_path_factory):
    return build_tiny_sd(tmp_path_factory.mktemp("models") / "safe", with_safety_checker=True)


def call(out, model, *options, images=7, batch=3) -> int:
    argv = ["--classes", CLASSES, "--model", str(model), "--out", str(out), "--images-per-class", str(images)]
    argv += ["--steps", "2", *(["--batch-size", str(batch)] if batch else []), *map(str, options)]
    return run(generate.main, generate.get_args_parser(), argv)


def files_of(out: Path) -> dict[str, bytes]:
    """Everything that must be the same bytes after an interruption: images and manifests."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for part in ("train", "manifest")
        for path in sorted((out / part).rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="session")
def reference(tmp_path_factory, tiny):
    out = tmp_path_factory.mktemp("reference") / "out"
    assert call(out, tiny) == 0
    return files_of(out)


def entries(out: Path, class_id: str) -> list[dict]:
    return [json.loads(line) for line in (out / "manifest" / f"{class_id}.jsonl").read_text().splitlines()]


# ===== what comes out =====


def test_output_is_an_image_folder_with_its_manifests(tmp_path, tiny, capsys):
    from torchvision.datasets import ImageFolder

    out = tmp_path / "out"
    assert call(out, tiny) == 0
    assert "21 of 21 images; this run drew 21" in capsys.readouterr().out
    folder = ImageFolder(out / "train")
    assert folder.classes == [BAG, BOOT, COAT] and Counter(folder.targets) == {0: 7, 1: 7, 2: 7}
    assert folder[0][0].size == (16, 16)
    info = json.loads((out / "dataset.json").read_text())
    assert info["recipe"]["scheduler"] == "pndm" and info["unet_forwards_per_image"] == 6
    assert info["counts"] == {"wanted": 21, "images": 21, "redrawn": {}, "safety_flagged": 0}
    assert {"packages", "git_commit", "cpu"} <= info["environment"].keys()
    assert all(len(digest) == 64 for digest in info["model"]["files"].values())
    for index, entry in enumerate(entries(out, BOOT)):
        assert entry["index"] == index and entry["seed"] == image_seed(0, BOOT, index)
        assert entry["prompt"].startswith("boot, footwear that covers the whole foot")


def test_pixels_are_those_of_the_seed_alone(tmp_path, tiny):
    """The image on disk is what the sampler draws from (seed, class, index), in whatever batch."""
    out = tmp_path / "out"
    assert call(out, tiny, "--format", "png", "--dtype", "fp32") == 0
    recipe = Recipe(steps=2, height=16, width=16, dtype="fp32", safety="off")
    sampler = loading.load_sampler(find_pipeline(str(tiny)), recipe, torch.device("cpu"))
    entry = entries(out, COAT)[5]
    seeds = [entry["seed"]]
    (pixels,), _ = sampler.decode(sampler.denoise(seeds, [entry["prompt"]]))
    stored = np.asarray(Image.open(out / "train" / COAT / f"{COAT}_000005.png")).astype(int)
    assert np.abs(stored - pixels.numpy()).max() <= 1


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
def test_formats_and_smaller_sizes(tmp_path, tiny, kind):
    out = tmp_path / "out"
    assert call(out, tiny, "--format", kind, "--save-size", 8, "--height", 32, images=2) == 0
    with Image.open(out / "train" / BAG / f"{BAG}_000001.{kind}") as image:
        assert image.size == (8, 16) and image.mode == "RGB"
        assert image.format == {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[kind]


def test_encoded_images_are_close_to_the_pixels():
    ramp = np.stack([np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))] * 3, axis=2)
    for kind, tolerance in (("png", 0), ("jpg", 6), ("webp", 8)):
        from io import BytesIO

        decoded = np.asarray(Image.open(BytesIO(drawing.encode_image(ramp, kind, None))).convert("RGB")).astype(int)
        assert np.abs(decoded - ramp).max() <= tolerance, kind
    small = Image.open(BytesIO(drawing.encode_image(ramp, "png", 16)))
    assert small.size == (16, 16)


# ===== the same command again =====


def test_chunks_in_any_order_give_the_same_files(tmp_path, tiny, reference):
    for part in (2, 0, 1):
        assert call(tmp_path / "out", tiny, "--chunk", f"{part}/3") == 0
    assert files_of(tmp_path / "out") == reference
    assert call(tmp_path / "more", tiny, "--chunk", "4/5") == 0  # a chunk without a class is no error
    assert not (tmp_path / "more" / "train").exists()


def test_nothing_to_do_is_said_at_once_and_loads_no_pipeline(tmp_path, tiny, monkeypatch, capsys):
    assert call(tmp_path / "out", tiny) == 0
    before = files_of(tmp_path / "out")
    monkeypatch.setattr(loading, "load_sampler", None)
    assert call(tmp_path / "out", tiny, batch=None) == 0
    assert "nothing to do, all 21 images" in capsys.readouterr().out
    assert files_of(tmp_path / "out") == before


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "no manifest", "half a manifest", "no class"])
def test_what_is_lost_is_drawn_again_to_the_byte(tmp_path, tiny, reference, damage):
    out = tmp_path / "out"
    assert call(out, tiny) == 0
    image, manifest = out / "train" / BOOT / f"{BOOT}_000004.jpg", out / "manifest" / f"{BOOT}.jsonl"
    if damage == "missing":
        image.unlink()
    elif damage in ("empty", "cut"):
        image.write_bytes(image.read_bytes()[: 0 if damage == "empty" else -1])
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "half a manifest":
        manifest.write_bytes(manifest.read_bytes()[:700])
    else:
        for path in (out / "train" / BOOT).iterdir():
            path.unlink()
        (out / "train" / BOOT).rmdir()
    assert call(out, tiny, batch=None) == 0
    assert files_of(out) == reference


def test_verify_finds_a_flipped_byte_and_repair_mends_it(tmp_path, tiny, reference, capsys):
    out = tmp_path / "out"
    assert call(out, tiny) == 0
    image = out / "train" / COAT / f"{COAT}_000006.jpg"
    data = bytearray(image.read_bytes())
    data[len(data) // 2] ^= 1
    image.write_bytes(data)
    assert call(out, tiny) == 0 and files_of(out) != reference  # same size: not seen without reading
    assert call(out, tiny, "--verify") == 2
    output = capsys.readouterr()
    assert f"{COAT}: 1 damaged: 6" in output.out and "--repair" in output.err
    assert run(generate.main, generate.get_args_parser(), ["--out", str(out), "--repair"]) == 0  # by its own record
    assert files_of(out) == reference
    assert call(out, tiny, "--verify") == 0


def test_foreign_files_are_kept_and_named(tmp_path, tiny, capsys):
    out = tmp_path / "out"
    assert call(out, tiny) == 0
    (out / "train" / BOOT / "holiday.jpg").write_bytes(b"mine")
    (out / "train" / "stranger").mkdir()
    assert call(out, tiny, "--status") == 0
    err = capsys.readouterr().err
    assert "holiday.jpg" in err and "stranger" in err
    assert call(out, tiny) == 0 and (out / "train" / BOOT / "holiday.jpg").read_bytes() == b"mine"


def test_status_counts_and_estimates(tmp_path, tiny, capsys):
    out = tmp_path / "out"
    assert call(out, tiny) == 0
    for index in (0, 1):
        (out / "train" / BOOT / f"{BOOT}_{index:06d}.jpg").unlink()
    (out / "train" / COAT / f"{COAT}_000000.jpg").write_bytes(b"")
    capsys.readouterr()
    assert call(out, tiny, "--status") == 0
    text = capsys.readouterr().out
    assert f"{BOOT}: 5 of 7 done, 2 missing, 0 damaged" in text and f"{COAT}: 6 of 7 done, 0 missing, 1 damaged" in text
    assert (
        "18 of 21 images done, 2 missing, 1 damaged" in text
        and "1 of 3 complete" in text
        and "the rest takes 0:00:" in text
    )


# ===== a larger set =====


def test_a_larger_set_continues_a_smaller_one_with_the_bytes_of_an_uninterrupted_one(tmp_path, tiny_safe, monkeypatch):
    monkeypatch.setattr(diffusion.Sampler, "flagged", flag_dark)  # redraws too
    out, whole = tmp_path / "out", tmp_path / "whole"
    for images in (1, 7, 8, 11):  # batches of 3: each cut falls into a batch
        assert call(out, tiny_safe, images=images, batch=3 if images == 1 else None) == 0
        info = json.loads((out / "dataset.json").read_text())
        assert info["recipe"]["images_per_class"] == images and info["counts"]["images"] == 3 * images
        assert [row["images"] for row in info["classes"]] == [images] * 3 and "completed" in info
    assert call(whole, tiny_safe, images=11, batch=3) == 0
    assert files_of(out) == files_of(whole)
    cut = [entry for wnid in (BAG, BOOT, COAT) for entry in entries(out, wnid)[6:9]]
    assert any(entry["attempt"] for entry in cut), "no redraw at a cut: the test shows less"
    assert call(out, tiny_safe, "--verify") == 0


def test_a_larger_set_does_not_shrink_and_what_grows_may_be_drawn_in_chunks(tmp_path, tiny, reference, capsys):
    out = tmp_path / "out"
    assert call(out, tiny, images=4) == 0
    for part in (1, 0):
        assert call(out, tiny, "--chunk", f"{part}/2") == 0
    assert files_of(out) == reference
    assert call(out, tiny, images=4) == 2
    said = capsys.readouterr().err
    assert "images_per_class is 7, asked 4" in said and "a set only grows: train.py --images-per-class" in said
    assert files_of(out) == reference


def test_a_process_that_draws_less_than_another_stops_before_it_cuts_lines_off(tmp_path, tiny, monkeypatch, capsys):
    out, smaller = tmp_path / "out", drawing.Session.open_batches

    def grow_meanwhile(session, *rest):
        monkeypatch.setattr(drawing.Session, "open_batches", smaller)
        assert call(out, tiny, images=7) == 0
        yield from smaller(session, *rest)

    monkeypatch.setattr(drawing.Session, "open_batches", grow_meanwhile)
    assert call(out, tiny, images=4) == 2
    assert "--images-per-class: another process lets" in capsys.readouterr().err
    assert call(out, tiny, "--verify", images=7) == 0


def test_a_factor_of_the_real_number_is_planned(tmp_path, tiny, capsys):
    assert call(tmp_path / "out", tiny, "--dry-run", images="10x") == 0
    assert "images: 39,000 of 16 x 16 pixels" in capsys.readouterr().out
    assert generate.image_count("1x") == generate.image_count("imagenet") == "imagenet"


# ===== refusals: one line, exit 2, nothing written =====


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", 3], "steps is 2, asked 3"),
        (["--guidance-scale", 7.5], "guidance_scale is 2.0, asked 7.5"),
        (["--prompt", "c"], "prompt is"),
        (["--seed", 1], "seed is 0, asked 1"),
        (["--images-per-class", 6], "images_per_class is 7, asked 6"),
        (["--batch-size", 4], "batch_size is 3, asked 4"),
        (["--classes", "n02774152, n02872752"], "classes is"),
        (["--recipe", "fast"], "name is"),
        (["--format", "png"], "format is"),
        (["--dtype", "bf16"], "dtype is"),
    ],
)
def test_another_recipe_into_the_same_folder_is_refused(tmp_path, tiny, capsys, options, message, finished):
    before = files_of(finished)
    assert call(finished, tiny, *options) == 2
    error = capsys.readouterr().err
    assert message in error and "another recipe" in error and error.count("\n") == 1
    assert files_of(finished) == before


def test_a_dataset_whose_recipe_does_not_tell_the_chroma_is_continued(tmp_path, tiny, capsys):
    out = tmp_path / "out"
    assert call(out, tiny) == 0
    info = json.loads((out / "dataset.json").read_text())
    assert info["recipe"].pop("chroma") == "420"
    (out / "dataset.json").write_text(json.dumps(info))
    (out / "train" / BOOT / f"{BOOT}_000000.jpg").unlink()
    assert call(out, tiny) == 0, capsys.readouterr().err


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny):
    out = tmp_path_factory.mktemp("finished") / "out"
    assert call(out, tiny, "--dtype", "fp32") == 0
    return out


def test_another_model_into_the_same_folder_is_refused(tmp_path, tiny, capsys, finished):
    other = shutil.copytree(tiny, tmp_path / "moved")
    assert call(finished, other) == 0  # the same files elsewhere are the same model
    schedule = other / "scheduler" / "scheduler_config.json"
    schedule.write_text(schedule.read_text().replace("0.012", "0.02"))
    assert call(finished, other) == 2
    error = capsys.readouterr().err
    assert "another model: scheduler/scheduler_config.json is" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--guidance-scale", 0.5], "--guidance-scale 0.5"),
        (["--steps", 1001], "--steps 1001"),
        (["--guidance-scale", "1e300"], "--guidance-scale 1e+300: take at most 1000"),
        (["--height", 10**9], "--height 1e+09: take at most 8192"),
        (["--batch-size", 10**12], "--batch-size 1e+12: take at most 10000"),
        (["--height", 17], "--height 17: this model draws multiples of 2"),
        (["--save-size", 64], "--save-size 64 is larger"),
        (["--safety", "redraw"], "has no safety checker"),
        (["--dtype", "fp16", "--device", "cpu"], "--dtype fp16"),
        (["--device", "cuda:7"], "--device cuda:7"),
        (["--attention", "xformers", "--device", "cpu"], "--attention xformers"),
        (["--prompt", "{nme}"], "--prompt"),
        (["--preview", "--chunk", "0/2"], "--chunk: --preview takes all classes together"),
        (["--pack", "--chunk", "0/2"], "--chunk: --pack takes all classes together"),
        (["--reproduce", "x", "--chunk", "0/2"], "--chunk: --reproduce takes all classes together"),
        (["--classes", "no such thing"], "--classes"),
        (["--model", "CompVis/no-such-weights"], "hf download"),
        (["--revision", "main"], "--revision main"),
    ],
)
def test_bad_requests_are_one_line_and_leave_nothing(tmp_path, tiny, capsys, options, message):
    out = tmp_path / "out"
    assert call(out, tiny, *options) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "Traceback" not in error
    assert not out.exists() or not list(out.iterdir())


@pytest.mark.parametrize(
    "options",
    [
        ["--images-per-class", "-3"],
        ["--images-per-class", "0"],
        ["--images-per-class", "0x"],
        ["--images-per-class", "1.5x"],
        ["--images-per-class", "x"],
        ["--seed", str(2**70)],
        ["--out", "x" * 300],
        ["--reproduce", "x" * 300],
        ["--steps", "x"],
        ["--chunk", "3/3"],
        ["--chunk", "1"],
        ["--status", "--verify"],
        ["--recipe", "slow"],
        ["--batch-size", "0"],
    ],
)
def test_bad_values_are_refused_by_the_parser(tiny, tmp_path, options):
    with pytest.raises(SystemExit) as exit_:
        call(tmp_path / "out", tiny, *options)
    assert exit_.value.code == 2


def test_unknown_keys_of_a_recipe_are_refused(tmp_path, tiny, monkeypatch, capsys):
    monkeypatch.setitem(generate.RECIPES, "paper", generate.RECIPES["paper"] | {"guidence": 3})
    assert call(tmp_path / "out", tiny) == 2 and "guidence" in capsys.readouterr().err


def test_looking_at_no_dataset_says_so(tmp_path, tiny, capsys):
    for option in ("--status", "--verify", "--preview", "--pack", "--repair"):
        assert call(tmp_path / "none", tiny, option) == 2
        assert "no dataset here" in capsys.readouterr().err


def test_dry_run_tells_the_plan_and_writes_nothing(tmp_path, tiny, capsys):
    assert call(tmp_path / "out", tiny, "--dry-run", "--rate", "2", "--recipe", "paper") == 0
    text = capsys.readouterr().out
    assert "images: 21 of 16 x 16" in text and "6 an image, 126 in all" in text and "at 2.00 images/s" in text
    assert not (tmp_path / "out").exists()


def planned(capsys, *options) -> tuple[float, float, str]:
    """(hours, images/s, the line) of --dry-run for ImageNet-100 with the default model, which is not here."""
    assert run(generate.main, generate.get_args_parser(), ["--dry-run", *options]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if " hours: " in line)
    found = re.match(r"GPU hours: ([\d,.]+) at ([\d.]+) images/s", line)
    return (float(found[1].replace(",", "")), float(found[2]), line) if found else (0, 0, line)


def test_hours_are_those_of_published_rates(monkeypatch, capsys):
    """3.6 and 4.68 iterations/s of 16 images: diffusers, docs/source/en/optimization/torch2.0.md (A100)."""
    monkeypatch.setattr(plan, "gpus", lambda: {"gpus": []})
    for options, iterations_per_s in (([], 3.6), (["--compile"], 4.68)):
        hours, rate, line = planned(capsys, *options)
        assert 0.94 < rate / (16 * iterations_per_s / 51) < 1 and "published" in line and "A100" in line
        assert hours == pytest.approx(126_689 / rate / 3600, rel=0.01)
    eager = planned(capsys)[1]
    assert planned(capsys, "--recipe", "fast")[1] / eager == pytest.approx(102 / 32, rel=0.08)
    assert planned(capsys, "--rate", "2")[:2] == (pytest.approx(17.6), 2.0)


def test_no_figure_of_an_a100_for_other_cards_and_models(tmp_path, tiny, monkeypatch, capsys):
    monkeypatch.setattr(plan, "gpus", lambda: {"gpus": ["NVIDIA T4"]})
    assert planned(capsys)[2] == (
        "GPU hours: not known for CompVis/stable-diffusion-v1-4 on NVIDIA T4; give its images/s with --rate"
    )
    monkeypatch.setattr(plan, "gpus", lambda: {"gpus": []})
    assert (
        "not known for stabilityai/stable-diffusion-2-1"
        in planned(capsys, "--model", "stabilityai/stable-diffusion-2-1")[2]
    )
    assert "not known" in planned(capsys, "--device", "cpu")[2]
    seconds = iter([2.0, 1.0])  # a step, a decode
    monkeypatch.setattr(loading, "seconds_of", lambda *rest: next(seconds))
    assert call(tmp_path / "out", tiny, "--dry-run") == 0  # a random pipeline on this machine: a step is timed
    said = capsys.readouterr().out
    assert (
        f"CPU hours: {21 * 7 / 3 / 3600:.1f} at {3 / 7:.2f} images/s a CPU (measured here" in said
        and "A100" not in said
    )


@pytest.mark.parametrize("recipe", ["paper", "fast"])
def test_dry_run_reckons_the_forwards_that_are_run(tmp_path, tiny, recipe):
    args = generate.get_args_parser().parse_args(["--recipe", recipe, "--model", str(tiny), "--classes", "fashion"])
    folder = find_pipeline(str(tiny))
    wanted = generate.asked_recipe(args, "", parse_template("c")).with_model(folder)
    sampler = loading.load_sampler(folder, wanted, torch.device("cpu"))
    schedule = folder.settings("scheduler/scheduler_config.json", NoiseSchedule)
    assert abs(plan.expected_forwards(wanted, schedule) - sampler.forwards_per_image) <= 1


# ===== images that must not stay =====


def test_black_and_broken_images_are_drawn_again_and_counted(tmp_path, tiny, monkeypatch, reference):
    """Faults strike image 1 of each class at attempt 0; the redraw has its own seed."""
    plain = diffusion.Sampler._decode
    struck = []

    def striking(self, latents):
        pixels, faults = plain(self, latents)
        if len(latents) == 3 and len(struck) % 3 == 0:  # the first full batch of each class of two
            faults[1] = "black" if not struck else "non-finite"
        if len(latents) == 3:
            struck.append(len(latents))
        return pixels, faults

    monkeypatch.setattr(diffusion.Sampler, "_decode", striking)
    out = tmp_path / "out"
    assert call(out, tiny, images=9) == 0
    info = json.loads((out / "dataset.json").read_text())
    assert info["counts"]["redrawn"] == {"black": 1, "non-finite": 2}
    first = entries(out, BAG)[1]
    assert first["attempt"] == 1 and first["rejected"] == ["black"]
    assert first["seed"] == image_seed(0, BAG, 1, attempt=1)
    assert [entry["attempt"] for entry in entries(out, BAG)] == [0, 1, 0, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(("dtype", "remedy"), [("fp32", "the widest format"), ("bf16", "(try --dtype fp32)")])
def test_a_model_that_only_draws_black_is_an_error(tmp_path, tiny, monkeypatch, capsys, dtype, remedy):
    plain = diffusion.Sampler._decode

    def black(self, latents):
        pixels, _ = plain(self, latents)
        return pixels, ["black"] * len(latents)

    monkeypatch.setattr(diffusion.Sampler, "_decode", black)
    assert call(tmp_path / "out", tiny, "--dtype", dtype) == 2
    assert "is black with 3 seeds in a row" in (error := capsys.readouterr().err)
    assert remedy in error and f"--dtype {dtype}" not in error
    assert not list((tmp_path / "out" / "train").rglob("*.jpg"))


def flag_dark(self, pixels):
    """A checker that flags about half of the images, by what is on them."""
    return [bool(image.float().mean() < 118) for image in pixels]


def test_flagged_images_are_redrawn_and_resume_draws_the_same(tmp_path, tiny_safe, monkeypatch):
    monkeypatch.setattr(diffusion.Sampler, "flagged", flag_dark)
    out = tmp_path / "out"
    assert call(out, tiny_safe) == 0
    drawn = [entry for class_id in (BAG, BOOT, COAT) for entry in entries(out, class_id)]
    redrawn = [entry for entry in drawn if entry["attempt"]]
    assert 3 < len(redrawn) < 21, [entry["attempt"] for entry in drawn]
    for entry in redrawn:
        assert entry["rejected"] == ["safety"] * entry["attempt"] and entry["safety"] is False
        assert entry["seed"] == image_seed(0, entry["id"], entry["index"], entry["attempt"])
    counts = json.loads((out / "dataset.json").read_text())["counts"]
    assert counts["redrawn"] == {"safety": sum(entry["attempt"] for entry in drawn)} and counts["safety_flagged"] == 0

    before = files_of(out)
    for entry in redrawn:
        (out / "train" / entry["id"] / f"{entry['id']}_{entry['index']:06d}.jpg").unlink()
    assert call(out, tiny_safe) == 0
    assert files_of(out) == before


def test_attempts_are_bounded_and_the_last_image_is_kept_with_its_flag(tmp_path, tiny_safe, monkeypatch):
    monkeypatch.setattr(diffusion.Sampler, "flagged", lambda self, pixels: [True] * len(pixels))
    monkeypatch.setattr(drawing, "MAX_ATTEMPTS", 4)
    out = tmp_path / "out"
    assert call(out, tiny_safe, images=2) == 0
    for entry in entries(out, BOOT):
        assert entry["attempt"] == 3 and entry["safety"] is True and entry["rejected"] == ["safety"] * 3
    assert json.loads((out / "dataset.json").read_text())["counts"]["safety_flagged"] == 6
    assert np.asarray(Image.open(out / "train" / BOOT / f"{BOOT}_000000.jpg")).max() > 50  # not blackened


def test_keep_records_flags_and_off_asks_nobody(tmp_path, tiny_safe, monkeypatch):
    monkeypatch.setattr(diffusion.Sampler, "flagged", flag_dark)
    assert call(tmp_path / "keep", tiny_safe, "--safety", "keep") == 0
    flags = [entry["safety"] for entry in entries(tmp_path / "keep", BAG) + entries(tmp_path / "keep", BOOT)]
    assert set(flags) == {True, False}
    assert {entry["attempt"] for entry in entries(tmp_path / "keep", BAG)} == {0}
    monkeypatch.setattr(diffusion.Sampler, "flagged", None)
    assert call(tmp_path / "off", tiny_safe, "--safety", "off") == 0
    assert {entry["safety"] for entry in entries(tmp_path / "off", BAG)} == {None}


def test_out_of_memory_changes_no_seed_and_no_composition(tmp_path, tiny, monkeypatch, reference):
    plain = diffusion.Sampler._denoise

    def small_memory(self, latents, texts, on_step):
        if len(latents) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(self, latents, texts, on_step)

    monkeypatch.setattr(diffusion.Sampler, "_denoise", small_memory)
    out = tmp_path / "out"
    assert call(out, tiny) == 0
    ours = files_of(out)
    assert ours.keys() == reference.keys()
    for class_id in (BAG, BOOT, COAT):
        kept = ("index", "prompt", "seed", "attempt")
        theirs = [json.loads(line) for line in reference[f"manifest/{class_id}.jsonl"].splitlines()]
        assert [[e[k] for k in kept] for e in entries(out, class_id)] == [[e[k] for k in kept] for e in theirs]
    (session,) = (json.loads(line) for line in (out / "sessions.jsonl").read_text().splitlines())
    assert session["micro_batch"] == 1  # of a batch size of 3: low bits may be others
    assert session["flops"] > 0 and json.loads((out / "dataset.json").read_text())["cost"]["flops"] == session["flops"]


# ===== disks and permissions =====


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", disk], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"mounting a small tmpfs is not permitted here: {mount.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_stops_cleanly_and_the_same_command_goes_on(small_disk, tiny, reference, capsys):
    out = small_disk / "out"
    assert call(out, tiny) == 2
    error = capsys.readouterr().err
    assert "disk is full" in error and "same command" in error
    kept = files_of(out)
    assert kept and not [name for name in kept if name.endswith(".tmp")]
    for name, data in kept.items():
        if name.endswith(".jpg"):
            assert data == reference[name]
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    assert call(out, tiny) == 0
    assert files_of(out) == reference


def test_a_tilde_is_the_home_folder(tmp_path, tiny, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert call("~/out", tiny, images=1) == 0
    assert (tmp_path / "out" / "dataset.json").is_file() and not (tmp_path / "~").exists()


def test_folder_that_is_a_file_or_someone_elses_is_refused(tmp_path, tiny, capsys):
    (tmp_path / "file").write_text("x")
    assert call(tmp_path / "file", tiny) == 2 and "--out" in capsys.readouterr().err
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.docx").write_text("x")
    assert call(tmp_path / "theirs", tiny) == 2 and "thesis.docx" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["thesis.docx"]
