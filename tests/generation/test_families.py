"""Every family of generators against diffusers' own call of its pipeline, and under the contract of Stable Diffusion's:
chunks, kills, repairs, full disks and reproductions give the same bytes."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
from pathlib import Path
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import generate
from tests.generation.test_generate import files_of, small_disk  # noqa: F401
from tests.generation.test_generate_kill import Forker
from tests.tiny_families import BUILDERS, build_tiny, build_tiny_lora
from tests.tiny_sd import build_tiny_sd
from utils.cli import UserError, run
from utils.dataset.card import LICENCES
from utils.generation import families, loading, pipeline, plan
from utils.generation.families import FAMILIES, SD, Family, find_family
from utils.generation.pipeline import find_pipeline
from utils.generation.recipe import Recipe

CPU = torch.device("cpu")
TEXTS = ["crane, large bird", "crane, lifts heavy objects", "a cat"]
SEEDS = [1, 2, 2**63 - 1]
SIZE = {"height": 16, "width": 16}
FIRST = "n01440764"  # of the classes drawn
ADD_NOISE = {"lcm_tiny", "sdxl-turbo"}  # in every step but the last
GUIDED = ["sdxl-base", "stable-diffusion-3-medium", "pixart-sigma"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{family: folder}; the folders bear the names by which the families are known."""
    room = tmp_path_factory.mktemp("models")
    return {name: build_tiny(name, room / name) for name in BUILDERS} | {"sd": build_tiny_sd(room / "tiny")}


@pytest.fixture(scope="module")
def loras(models, tmp_path_factory):
    """{family: random LoRA file for it}."""
    room = tmp_path_factory.mktemp("loras")
    chosen = ("sd", "sdxl-base", "stable-diffusion-3-medium", "flux.1-dev")
    return {name: build_tiny_lora(models[name], room / f"{name}.safetensors") for name in chosen}


def sampler_for(model: Path, *loras: str, recipe=None, **options):
    folder = find_pipeline(str(model), None, loras)
    family = folder.family
    steps = {"steps": min(4, family.most_steps)}
    options = steps | SIZE | {"dtype": "fp32", "attention": "sdpa", "safety": "off", "batch_size": 8} | options
    made = Recipe.asked(recipe, family, format="png", lora=loras or None, **options).with_model(folder)
    return loading.load_sampler(folder, made, CPU)


def draw(sampler, seeds=SEEDS, texts=TEXTS) -> np.ndarray:
    pixels, faults = sampler.decode(sampler.denoise(seeds, texts))
    assert faults == [""] * len(seeds)
    return pixels.numpy().astype(int)


def plain(model: Path, steps: int, guidance: float, prepare=lambda pipe: None, seeds=SEEDS, texts=TEXTS, **options):
    """(B, H, W, 3) of the pipeline's own call, which draws its latents and encodes its prompts itself."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    prepare(pipe)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    images = pipe(texts, num_inference_steps=steps, guidance_scale=guidance, generator=generators, output_type="np",
                  **SIZE, **options).images  # fmt: skip
    return (images * 255).round().astype(int)


OF_THE_CALL = {
    "flux.1-schnell": {"max_sequence_length": 256},
    "pixart-sigma": {"use_resolution_binning": False, "clean_caption": False},
}


@pytest.mark.parametrize("name", BUILDERS)
def test_same_pixels_as_the_plain_pipeline_call(models, name):
    sampler = sampler_for(models[name])
    expected = plain(models[name], sampler.recipe.steps, sampler.recipe.guidance_scale, **OF_THE_CALL.get(name, {}))
    assert expected.std() > 20  # pictures, not a constant
    assert np.abs(draw(sampler) - expected).max() <= 1


@pytest.mark.parametrize("name", BUILDERS)
def test_an_image_and_its_noise_on_the_way_are_its_own_whatever_the_batch(models, name):
    sampler = sampler_for(models[name])
    together = draw(sampler)
    for number in range(len(SEEDS)):
        alone = draw(sampler, SEEDS[number : number + 1], TEXTS[number : number + 1])
        assert np.abs(alone[0] - together[number]).max() <= 1  # kernels round by the size of a batch
    assert np.array_equal(draw(sampler), together)  # nothing is left over from the calls before
    sampler.denoising.size = 2  # as after an out-of-memory error
    assert np.abs(draw(sampler) - together).max() <= 1


@pytest.mark.parametrize("name", sorted(ADD_NOISE))
def test_noise_is_added_on_the_way_so_the_test_above_can_fail(models, name, monkeypatch):
    sampler = sampler_for(models[name])
    mine, kinds = draw(sampler), []
    module = f"diffusers.schedulers.{type(sampler.scheduler).__module__.rpartition('.')[2]}.randn_tensor"
    monkeypatch.setattr(module, lambda shape, **named: kinds.append(named["generator"]) or torch.zeros(shape))
    assert np.abs(draw(sampler) - mine).max() > 1
    assert kinds and all(isinstance(one, list) and len(one) == len(SEEDS) for one in kinds)


# ===== guidance, negative prompts =====


@pytest.mark.parametrize("name", ["sd", *sorted(GUIDED)])
def test_a_negative_prompt_is_that_of_the_plain_call(models, name):
    sampler = sampler_for(models[name], guidance_scale=5.0, negative_prompt="a dog", scheduler="ddim" if name == "sd"
                          else None)  # fmt: skip
    options = OF_THE_CALL.get(name, {}) | {"negative_prompt": ["a dog"] * 3}
    if name == "sd":

        def prepare(pipe):
            pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    else:

        def prepare(pipe):
            pass

    drawn = draw(sampler)
    assert np.abs(drawn - plain(models[name], 4, 5.0, prepare, **options)).max() <= 1
    assert np.abs(drawn - draw(sampler_for(models[name], guidance_scale=5.0))).max() > 1


@pytest.mark.parametrize("name", ["sd", *sorted(GUIDED)])
def test_an_interval_without_ends_gives_the_bytes_of_plain_guidance(models, name):
    everywhere = sampler_for(models[name], guidance_scale=5.0, guidance_interval=(0.0, float("inf")))
    without = sampler_for(models[name], guidance_scale=5.0)
    assert everywhere.recipe.record() == without.recipe.record()  # JSON has no word for infinity
    assert np.array_equal(draw(everywhere), draw(without))


@pytest.mark.parametrize("name", sorted(GUIDED))
@pytest.mark.parametrize("interval", [(0.5, 5.0), (0.0, 2.0), (1.0, float("inf")), (900.0, 1000.0)])
def test_outside_the_interval_the_conditional_forward_alone_counts(models, name, interval):
    """Against a plain call whose network runs whole and whose unconditional half is then overwritten."""
    sampler = sampler_for(models[name], steps=6, guidance_scale=5.0, guidance_interval=interval)
    rows, forward = [], sampler.evaluate
    sampler.evaluate = lambda *args, **kwargs: (
        rows.append(len(forward_out := forward(*args, **kwargs)[0])) or (forward_out,)
    )
    drawn = draw(sampler)
    assert sum(rows) == len(SEEDS) * sampler.forwards_per_image

    def overwrite(pipe):
        network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
        whole, count = network.forward, []

        def forward(*args, **kwargs):
            (noise,) = whole(*args, **kwargs)
            sigma = float(pipe.scheduler.sigmas[len(count)])
            flow = "FlowMatch" in type(pipe.scheduler).__name__
            solver = "DPMSolver" in type(pipe.scheduler).__name__
            if solver:  # whose sigmas are those of the step, too
                alpha = pipe.scheduler.alphas_cumprod[int(pipe.scheduler.timesteps[len(count)])]
                sigma = float(((1 - alpha) / alpha) ** 0.5)
            level = (sigma / (1 - sigma) if sigma < 1 else float("inf")) if flow else sigma
            count.append(level)
            if not interval[0] < level <= interval[1]:
                noise = torch.cat([noise[len(noise) // 2 :]] * 2)
            return (noise,)

        network.forward = forward

    assert np.abs(drawn - plain(models[name], 6, 5.0, overwrite, **OF_THE_CALL.get(name, {}))).max() <= 1


# ===== LoRA =====


@pytest.mark.parametrize("name", ["sd", "sdxl-base", "stable-diffusion-3-medium", "flux.1-dev"])
def test_lora_of_weight_zero_gives_the_bytes_of_the_base_and_others_those_of_the_plain_call(models, loras, name):
    base = draw(sampler_for(models[name]))
    assert np.array_equal(draw(sampler_for(models[name], f"{loras[name]}:0")), base)
    merged = sampler_for(models[name], f"{loras[name]}:8")

    def prepare(pipe):
        pipe.load_lora_weights(loras[name].parent, weight_name=loras[name].name, adapter_name="mine")
        pipe.set_adapters("mine", 8.0)
        pipe.scheduler = type(merged.scheduler).from_config(merged.scheduler.config)

    expected = plain(models[name], 4, merged.recipe.guidance_scale, prepare)
    assert np.abs(expected - base).max() > 1
    assert np.abs(draw(merged) - expected).max() <= 1


def test_two_loras_add_up(models, loras, tmp_path):
    other = build_tiny_lora(models["sd"], tmp_path / "other.safetensors", seed=2)
    both = draw(sampler_for(models["sd"], f"{loras['sd']}:4", f"{other}:4"))
    assert np.abs(both - draw(sampler_for(models["sd"], f"{loras['sd']}:4"))).max() > 1
    assert np.abs(both - draw(sampler_for(models["sd"], f"{other}:4", f"{loras['sd']}:4"))).max() <= 1


def test_the_names_of_kohya_are_understood(models, loras, tmp_path):
    weights = {}
    for key, value in load_file(loras["sd"]).items():
        layer, _, rest = key.removeprefix("unet.").partition(".lora_")
        part = "down" if rest.startswith("A") else "up"
        weights[f"lora_unet_{layer.replace('.', '_')}.lora_{part}.weight"] = value
        weights[f"lora_unet_{layer.replace('.', '_')}.alpha"] = np.array(
            2, np.float32
        )  # as much as its rank: a factor of 1
    save_file(weights, tmp_path / "kohya.safetensors")
    ours = draw(sampler_for(models["sd"], f"{tmp_path / 'kohya.safetensors'}:8"))
    assert np.array_equal(ours, draw(sampler_for(models["sd"], f"{loras['sd']}:8")))


def test_a_lora_makes_another_family_of_its_base(models, loras, tmp_path):
    """LCM-LoRA with LCM's scheduler on the tuned loop, SDXL-Lightning from the last timestep, in as many steps as its
    name says."""
    lcm = shutil.copy(loras["sd"], tmp_path / "lcm-lora-sdv1-5.safetensors")
    sampler = sampler_for(models["sd"], str(lcm))
    assert (sampler.recipe.name, sampler.recipe.scheduler, sampler.forwards_per_image) == ("lcm-lora", "lcm", 4)

    def prepare(pipe):
        pipe.load_lora_weights(lcm.parent, weight_name=lcm.name)
        pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)

    assert np.abs(draw(sampler) - plain(models["sd"], 4, 1.0, prepare)).max() <= 1

    lightning = shutil.copy(loras["sdxl-base"], tmp_path / "sdxl_lightning_2step_lora.safetensors")
    sampler = sampler_for(models["sdxl-base"], str(lightning), steps=None)
    assert (sampler.recipe.name, sampler.recipe.steps) == ("sdxl-lightning", 2)

    def trailing(pipe):
        pipe.load_lora_weights(lightning.parent, weight_name=lightning.name)
        config = pipe.scheduler.config
        pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(config, timestep_spacing="trailing")

    assert np.abs(draw(sampler) - plain(models["sdxl-base"], 2, 1.0, trailing)).max() <= 1
    with pytest.raises(UserError, match="--steps 4: sdxl-lightning is distilled for at most 2"):
        sampler_for(models["sdxl-base"], str(lightning), steps=4)


# ===== generate.py =====


def call(out, model, *options) -> int:
    argv = [
        "--classes",
        f"{FIRST}, n01558993, n01692333",
        "--model",
        str(model),
        "--out",
        str(out),
        "--images-per-class",
        "5",
    ]
    argv += ["--batch-size", "3", "--height", "16", "--width", "16", "--format", "png", *map(str, options)]
    return run(generate.main, generate.get_args_parser(), argv)


@pytest.mark.parametrize("name", BUILDERS)
def test_chunks_verify_repair_and_reproduce_give_the_same_bytes(models, tmp_path, capsys, name):
    family = find_pipeline(str(models[name])).family
    out, chunked = tmp_path / "out", tmp_path / "chunked"
    steps = ("--steps", min(3, family.most_steps))
    assert call(out, models[name], *steps) == 0, capsys.readouterr().err
    for part in (1, 0):
        assert call(chunked, models[name], *steps, "--chunk", f"{part}/2") == 0
    reference = files_of(out)
    assert len(reference) == 15 + 3 and files_of(chunked) == reference

    recorded = json.loads((out / "dataset.json").read_text())
    assert recorded["recipe"]["name"] == family.name
    assert recorded["recipe"]["guidance_scale"] == family.guidance_scale
    assert recorded["recipe"]["scheduler"] == family.schedulers[0]
    twice = 2 if family.guidance == "cfg" else 1
    assert recorded["unet_forwards_per_image"] == steps[1] * twice

    (out / f"train/{FIRST}/{FIRST}_000001.png").write_bytes(b"damaged")
    (chunked / f"train/{FIRST}/{FIRST}_000004.png").unlink()
    assert call(out, models[name], "--verify") == 2
    for damaged in (out, chunked):
        assert call(damaged, "unused", "--repair", "--model", models[name]) == 0
        assert files_of(damaged) == reference
    assert call(out, models[name], "--verify") == 0
    capsys.readouterr()
    assert call("unused", models[name], "--reproduce", out, "--sample", "15") == 0
    assert "byte-equal: 15\n" in capsys.readouterr().out


def test_a_dataset_with_a_lora_is_repaired_and_reproduced_by_its_record(models, loras, tmp_path, capsys):
    lora = shutil.copy(loras["sdxl-base"], tmp_path / "style.safetensors")
    out = tmp_path / "out"
    options = ("--lora", f"{lora}:0.5", "--negative-prompt", "a dog", "--guidance-interval", "0.3,5", "--steps", "3")
    assert call(out, models["sdxl-base"], *options) == 0, capsys.readouterr().err
    assert "say with --supervision what the LoRA was tuned on" in capsys.readouterr().err
    recipe = json.loads((out / "dataset.json").read_text())["recipe"]
    assert "supervision" not in recipe  # that of the prompts is not all that the images owe to real ones
    assert recipe["lora"] == [f"{lora}:0.5"] and recipe["negative_prompt"] == "a dog"
    assert recipe["guidance_interval"] == [0.3, 5.0]
    reference = files_of(out)
    (out / f"train/{FIRST}/{FIRST}_000001.png").unlink()
    assert call(out, models["sdxl-base"], "--repair") == 0 and files_of(out) == reference
    assert call("unused", models["sdxl-base"], "--reproduce", out, "--sample", "15") == 0
    assert "byte-equal: 15\n" in capsys.readouterr().out
    assert call(out, models["sdxl-base"], *options[2:]) == 2
    assert "lora is" in capsys.readouterr().err
    shutil.copy(build_tiny_lora(models["sdxl-base"], tmp_path / "new.safetensors", seed=3), lora)
    assert call(out, models["sdxl-base"], *options) == 2  # another file of the same name
    assert "another model: lora 0 is" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["sdxl-turbo", "flux.1-dev"])
def test_a_full_disk_stops_cleanly_and_the_same_command_goes_on(small_disk, models, tmp_path, capsys, name):  # noqa: F811
    assert call(tmp_path / "calm", models[name], "--steps", 2) == 0
    reference = files_of(tmp_path / "calm")
    subprocess.run(["mount", "-o", "remount,size=48k", small_disk], check=True)
    capsys.readouterr()
    assert call(small_disk / "out", models[name], "--steps", 2) == 2
    error = capsys.readouterr().err
    assert "disk is full" in error and "same command" in error
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    assert call(small_disk / "out", models[name], "--steps", 2) == 0
    assert files_of(small_disk / "out") == reference


@pytest.fixture(scope="module")
def forker(models):
    pipelines = "StableDiffusionXLPipeline, StableDiffusion3Pipeline, FluxPipeline, PixArtSigmaPipeline"
    forker = Forker(models["sd"], f"{pipelines}, LatentConsistencyModelPipeline")
    yield forker
    forker.process.stdin.close()
    forker.process.wait(timeout=30)


KILLS = 20 if "KILLS" in os.environ else 3  # a family: as `make fuzz` has it, or with nine of them more than twenty


@pytest.mark.parametrize("name", BUILDERS)
def test_kills_at_random_instants_change_no_byte(models, tmp_path, forker, name):
    forker.model, forker.options = models[name], ["--height", "16", "--width", "16"]
    calm = forker.run(tmp_path / "calm")
    assert calm["codes"] == [0]
    rng, kills, round_ = random.Random(0), 0, 0
    while kills < KILLS:
        out = tmp_path / f"round{round_}"
        round_ += 1
        while kills < KILLS:
            codes = forker.run(out, kill_after_s=rng.uniform(0.2, 0.7) * calm["seconds"])["codes"]
            kills += codes == [-9]
            if codes == [0]:
                break
        assert forker.run(out)["codes"] == [0]
        assert files_of(out) == files_of(tmp_path / "calm"), f"after {kills} kills"


# ===== memory =====

CUDA = torch.device("cuda:0")


@pytest.mark.parametrize("name", ["sdxl-base", "flux.1-dev"])
def test_parts_that_do_not_fit_together_take_turns_and_draw_the_same(models, name, monkeypatch):
    """No GPU is here: "cpu:0" takes its place, which is another name of the same memory. So the images are real, and
    whatever part computes must have been asked to come before."""
    reference = draw(sampler_for(models[name]))
    offload, to, asked, come = diffusers.DiffusionPipeline.enable_model_cpu_offload, torch.nn.Module.to, [], []

    def recorded(part, *where, **more):
        come.extend([part] if where and str(where[0]) == "cpu:0" and come[-1:] != [part] else [])
        return to(part, *where, **more)

    def in_its_place(pipe, device=None):
        asked.append(str(device))
        offload(pipe, device="cpu:0")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "enable_model_cpu_offload", in_its_place)
    monkeypatch.setattr(torch.nn.Module, "to", recorded)
    sampler = sampler_on_gpu(models[name], 1000, monkeypatch)
    assert asked == ["cuda:0"] and sampler.side_stream is None  # decoding waits for the network to go
    parts = sampler.pipeline.components
    encoders = [parts[part] for part in ("text_encoder", "text_encoder_2")]
    for texts in (TEXTS, ["a dog", *TEXTS[1:]]):
        come.clear()
        latents = sampler.denoise(SEEDS, texts)
        fetched = [id(part) for part in come]
        new = 3 if texts is TEXTS else 1  # prompts are encoded once
        assert fetched == [*map(id, new * encoders), id(sampler.unet)]
        pixels, _ = sampler.decode(latents)
        assert [id(part) for part in come[len(fetched) :]] == [id(sampler.vae)]
        assert np.array_equal(pixels.numpy()[1:], reference[1:])
        assert np.array_equal(pixels.numpy()[0], reference[0]) == (texts is TEXTS)


def sampler_on_gpu(model: Path, free_bytes: int, monkeypatch):
    """As load_sampler makes it for a GPU with so much memory free; then its tensors stay here."""
    found = {"Stream": mock.Mock(), "mem_get_info": lambda device: (free_bytes, 80 << 30)}
    for name, value in found.items():
        monkeypatch.setattr(f"torch.cuda.{name}", value)
    folder = find_pipeline(str(model))
    options = {"steps": 4, **SIZE, "dtype": "fp32", "attention": "sdpa", "safety": "off", "batch_size": 8}
    recipe = Recipe.asked(None, folder.family, format="png", **options).with_model(folder)
    sampler = loading.load_sampler(folder, recipe, CUDA)
    sampler.device = CPU
    return sampler


def test_parts_that_fit_stay_on_the_gpu(models, monkeypatch):
    placed = []
    monkeypatch.setattr(diffusers.DiffusionPipeline, "enable_model_cpu_offload", None)
    monkeypatch.setattr(diffusers.DiffusionPipeline, "to", lambda pipe, device: placed.append(device))
    assert sampler_on_gpu(models["sdxl-base"], 1 << 30, monkeypatch).side_stream and placed == [CUDA]


# ===== which family, and what it refuses =====


@pytest.mark.parametrize(
    ("model", "name", "steps", "guidance", "size"),
    [  # as their cards have it; the rows of families.py name the pages
        ("CompVis/stable-diffusion-v1-4", "sd", None, None, 512),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "sd", None, None, 512),
        ("stabilityai/stable-diffusion-2-1", "sd", None, None, 512),
        ("stabilityai/sd-turbo", "sd-turbo", 1, 1, 512),
        ("SimianLuo/LCM_Dreamshaper_v7", "lcm", 4, 8, 768),
        ("stabilityai/stable-diffusion-xl-base-1.0", "sdxl", 50, 5, 1024),
        ("stabilityai/sdxl-turbo", "sdxl-turbo", 1, 1, 512),
        ("ByteDance/SDXL-Lightning/sdxl_lightning_8step_lora.safetensors:1", "sdxl-lightning", 8, 1, 1024),
        ("latent-consistency/lcm-lora-sdxl", "lcm-lora-sdxl", 4, 1, 1024),
        ("latent-consistency/lcm-lora-sdv1-5:1", "lcm-lora", 4, 1, 512),
        ("latent-consistency/lcm-lora-sdv1-5/pytorch_lora_weights.safetensors:1", "lcm-lora", 4, 1, 512),
        ("stabilityai/stable-diffusion-3-medium-diffusers", "sd3", 28, 7, 1024),
        ("stabilityai/stable-diffusion-3.5-medium", "sd3.5-medium", 40, 4.5, 1024),
        ("stabilityai/stable-diffusion-3.5-large", "sd3.5-large", 28, 3.5, 1024),
        ("stabilityai/stable-diffusion-3.5-large-turbo", "sd3.5-turbo", 4, 1, 1024),
        ("black-forest-labs/FLUX.1-dev", "flux-dev", 50, 3.5, 1024),
        ("black-forest-labs/FLUX.1-schnell", "flux-schnell", 4, 1, 1024),
        ("PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", "pixart-sigma", 20, 4.5, 1024),
        ("somebody/some-model", None, None, None, None),
    ],
)
def test_a_model_is_known_by_its_name_before_it_is_here(model, name, steps, guidance, size):
    family = find_family(None, [model])
    assert (family and family.name) == name
    if family and steps:
        assert (family.steps, family.guidance_scale, family.size) == (steps, guidance, size)
        recipe = Recipe.asked(None, family, format="jpg")
        assert (recipe.name, recipe.steps, recipe.guidance_scale) == (name, steps, guidance)


def test_the_page_of_generators_has_each_row_with_a_source():
    page = (Path(__file__).resolve().parents[2] / "docs/generators.md").read_text()
    listed = [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\| .+ \|$", page, re.M)]
    shown = {}
    for name, model, steps, guidance, pixels, licence, source in listed[1:]:
        steps, _, most = steps.partition(", at most ")
        value = 1.0 if guidance == "none" else float(guidance.removesuffix(", an input"))
        shown[name] = (int(steps), int(most or 1000), value, int(pixels))
        assert "http" in source or "not read" in source
        if name != "sd":
            assert find_family(None, [model.removesuffix(", a LoRA")]).name == name
            found = next((known for part, known in LICENCES.items() if part in model), "not read")
            assert licence == found
    rows = FAMILIES.values()
    assert shown == {row.name: (row.steps, row.most_steps, row.guidance_scale, row.size) for row in rows}


def test_a_model_of_unknown_name_is_known_by_its_class_and_every_row_can_be_loaded(models):
    for row in FAMILIES.values():
        assert hasattr(diffusers, row.pipeline) and find_family(row.pipeline, ["my-own"]).pipeline == row.pipeline
        for name in row.schedulers:
            if name != families.OWN:
                assert name in generate.SCHEDULERS
    assert find_family("StableDiffusionInpaintPipeline", ["stabilityai/sd-turbo"]) is None


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sd-turbo", ("--guidance-scale", 7), "--guidance-scale 7: sd-turbo is distilled to draw without"),
        ("sd-turbo", ("--steps", 50), "--steps 50: sd-turbo is distilled for at most 4"),
        ("sd-turbo", ("--scheduler", "pndm"), "--scheduler pndm: sd-turbo is drawn with own"),
        ("sd-turbo", ("--recipe", "paper"), "--recipe paper: of Stable Diffusion 1.x and 2.x"),
        ("sd", ("--scheduler", "lcm"), "--scheduler lcm: sd is drawn with pndm or ddim"),
        ("sd", ("--guidance-scale", 1, "--negative-prompt", "x"), "--negative-prompt: it acts through guidance"),
        ("sdxl-turbo", ("--negative-prompt", "x"), "--negative-prompt: sdxl-turbo draws without guidance"),
        ("flux.1-dev", ("--guidance-interval", "0.3,5"), "--guidance-interval: flux-dev takes guidance as an input"),
        ("flux.1-dev", ("--negative-prompt", "x"), "--negative-prompt: flux-dev takes guidance as an input"),
        ("flux.1-dev", ("--height", 18), "--height 18: this model draws multiples of 4 pixels"),
        ("sdxl-base", ("--attention", "xformers"), "--attention xformers: only for Stable Diffusion 1.x and 2.x"),
        ("sdxl-base", ("--guidance-interval", "5,0.3"), "is not LO,HI with 0 <= LO < HI"),
        ("sd", ("--lora", "none.safetensors"), "--lora none.safetensors: no such file, and not a hub id"),
        ("sd", ("--lora", "{lora}:1000"), "give a weight such as 1 or 0.8"),
        ("sd", ("--lora", "{lora}:half"), ":half: give a weight such as 1 or 0.8"),
        ("sd", ("--lora", __file__), "only .safetensors are read"),
        ("sdxl-base", ("--lora", "{lora}"), "is for another base than"),
        ("flux.1-dev", ("--lora", "{lora}"), "is for another base than"),
        ("sd", ("--lora", "{model}/unet/diffusion_pytorch_model.safetensors"), "it holds no LoRA"),
        ("sd", ("--lora", "{damaged}"), "is damaged"),
    ],
)
def test_what_contradicts_a_family_is_one_line_before_anything_is_loaded(
    models, loras, tmp_path, monkeypatch, capsys, name, options, message
):
    monkeypatch.setattr(loading, "load_sampler", None)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"\xff" * 100)
    places = {"lora": loras["sd"], "model": models["sd"], "damaged": damaged}
    filled = [str(option).format(**places) if "{" in str(option) else option for option in options]
    try:
        code = call(tmp_path / "out", models[name], *filled)
    except SystemExit as stop:  # argparse's own
        code = stop.code
    said = capsys.readouterr().err
    assert code == 2 and message in said and said.count("\n") == 1 and not (tmp_path / "out").exists(), said


@pytest.mark.parametrize("kind", ["StableDiffusionImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"])
def test_another_kind_of_pipeline_in_the_hub_is_refused_before_its_weights_are_fetched(tmp_path, monkeypatch, kind):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: str(tmp_path / "model_index.json"))
    with pytest.raises(UserError, match=f"--model some/thing is a {kind}; generate.py draws images from text"):
        find_pipeline("some/thing")


def test_a_download_names_its_size_where_the_hub_tells_it(models, tmp_path, monkeypatch, capsys):
    read, left_out = "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors"
    sizes = {read: 5_100_000_000, "vae/config.json": 600, left_out: 2_500_000_000, "all_in_one.safetensors": 7 * 10**9}
    files = [mock.Mock(rfilename=name, size=size) for name, size in sizes.items()]
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: mock.Mock(siblings=files))
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda *_, **__: str(models["sdxl-base"] / "model_index.json")
    )
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(models["sdxl-base"]))
    assert pipeline._download("some/thing", None) == models["sdxl-base"]
    assert "fetching some/thing (5.1 GB)" in capsys.readouterr().out


def test_a_gated_model_and_a_lora_that_is_not_here_name_the_command_that_fetches_them(tmp_path, monkeypatch):
    from huggingface_hub.errors import GatedRepoError

    class Gated(GatedRepoError):
        def __init__(self) -> None:
            pass

    def gated(*_, **__):
        raise Gated

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", gated)
    with pytest.raises(
        UserError, match=r"accept its licence; fetch them .* `hf download black-forest-labs/FLUX.1-dev`"
    ):
        find_pipeline("black-forest-labs/FLUX.1-dev")
    monkeypatch.setattr("huggingface_hub.snapshot_download", gated)
    with pytest.raises(
        UserError, match=r"--lora a/b/c.safetensors: c.safetensors is not here.*: hf download a/b c.safetensors"
    ):
        pipeline.find_lora("a/b/c.safetensors:0.5")


def test_a_tokenizer_for_sentencepiece_asks_for_it(models, tmp_path, monkeypatch):
    broken = shutil.copytree(models["pixart-sigma"], tmp_path / "pixart-sigma")
    (broken / "tokenizer" / "tokenizer.json").rename(broken / "tokenizer" / "spiece.model")
    monkeypatch.setattr(pipeline, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="tokenizer needs a package: pip install sentencepiece"):
        find_pipeline(str(broken))


@pytest.mark.parametrize("name", sorted(GUIDED))
def test_a_plan_reckons_the_forwards_that_are_run(models, name):
    for interval in (None, (0.5, 3.0)):
        sampler = sampler_for(models[name], steps=20, guidance_scale=5.0, guidance_interval=interval)
        schedule = find_pipeline(str(models[name])).settings("scheduler/scheduler_config.json", pipeline.NoiseSchedule)
        assert abs(plan.expected_forwards(sampler.recipe, schedule) - sampler.forwards_per_image) <= 3


def test_the_rate_of_a_family_is_measured(models):
    folder = find_pipeline(str(models["sdxl-base"]))
    recipe = Recipe.asked(None, folder.family, format="jpg", dtype="fp32", batch_size=2).with_model(folder)
    rate, unit, how = loading.measured_rate(folder, recipe, "cpu")
    assert rate > 0 and unit == "CPU" and "from one step and one decode" in how


# ===== one more family =====


def test_the_family_that_the_docs_add_draws_as_its_pipeline_does(tmp_path):
    text = (Path(__file__).resolve().parents[2] / "docs" / "design.md").read_text()
    example = text.split("### A new family")[1].split("```python\n")[1].split("```")[0]
    assert len(example.splitlines()) <= 40
    before = dict(FAMILIES)
    try:
        exec(example, {"Family": Family, "FAMILIES": FAMILIES})
        (name,) = FAMILIES.keys() - before.keys()
        model = build_tiny_aura_flow(tmp_path / name)
        sampler = sampler_for(model)
        assert sampler.recipe.name == name and sampler.recipe.family is not SD
        expected = plain(model, 4, sampler.recipe.guidance_scale)
        assert expected.std() > 20 and np.abs(draw(sampler) - expected).max() <= 1
    finally:
        FAMILIES.clear()
        FAMILIES.update(before)


def build_tiny_aura_flow(folder: Path) -> Path:
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
    from transformers import T5Config, T5EncoderModel

    from tests.tiny_families import TEXT_WIDTH, t5_tokenizer, vae

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = AuraFlowTransformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
            attention_head_dim=8, num_attention_heads=2, joint_attention_dim=TEXT_WIDTH, caption_projection_dim=16,
            out_channels=4, pos_embed_max_size=64,
        )  # fmt: skip
        config = T5Config(vocab_size=len(t5_tokenizer()), d_model=TEXT_WIDTH, d_kv=8, d_ff=32, num_layers=1,
                          num_heads=2)  # fmt: skip
        AuraFlowPipeline(
            tokenizer=t5_tokenizer(), text_encoder=T5EncoderModel(config), vae=vae(4), transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
        ).save_pretrained(folder)  # fmt: skip
    return folder
