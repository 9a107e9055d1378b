"""The sampler against diffusers' own pipeline call, and everything that must not change what is drawn."""

from __future__ import annotations

import json
import shutil
import sys
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch

from tests.test_machine import MEMORY_ERRORS
from tests.tiny_sd import build_tiny_sd
from utils.classes import load_classes
from utils.cli import UserError
from utils.generation import diffusion, loading
from utils.generation.pipeline import find_pipeline, safetensors_problem
from utils.generation.prompts import class_prompts, parse_template
from utils.generation.recipe import RECIPES, SCHEDULERS, Recipe

CPU = torch.device("cpu")
TEXTS = ["crane, large long-necked wading bird", "crane, lifts and moves heavy objects", "a cat"]
SEEDS = [1, 2, 2**63 - 1]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return build_tiny_sd(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def tiny_safe(tmp_path_factory):
    return build_tiny_sd(tmp_path_factory.mktemp("models") / "safe", with_safety_checker=True)


def sampler_for(
    folder, scheduler="pndm", steps=4, guidance=2.0, interval=None, size=(16, 16), safety=False, compiled=False, **more
):
    recipe = Recipe(scheduler=scheduler, steps=steps, guidance_scale=guidance, guidance_interval=interval,
                    height=size[0], width=size[1], dtype="fp32", compile=compiled,
                    safety="keep" if safety else "off", **{"attention": "sdpa"} | more)  # fmt: skip
    sampler = loading.load_sampler(find_pipeline(str(folder)), recipe, CPU)
    sampler.denoising.size = 64
    return sampler


def denoise(sampler, seeds, texts) -> torch.Tensor:
    return sampler.denoise(seeds, texts)


def draw(sampler, seeds=SEEDS, texts=TEXTS) -> np.ndarray:
    pixels, faults = sampler.decode(denoise(sampler, seeds, texts))
    assert faults == [""] * len(seeds)
    return pixels.numpy().astype(int)


def test_a_cpu_draws_small_images_in_the_contiguous_layout(tiny):
    pipeline = sampler_for(tiny).pipeline
    for side, dtype, layout in (
        (32, torch.bfloat16, torch.contiguous_format),
        (512, torch.bfloat16, torch.channels_last),
        (512, torch.float32, torch.contiguous_format),
    ):
        assert diffusion.Sampler(pipeline, Recipe(height=side, width=side), CPU, dtype).layout == layout


def test_the_arithmetic_of_stable_diffusion_is_what_is_known_of_it():
    """0.803 TFLOP a forward at 512 px, 102 forwards and 2.5 TFLOP for the VAE: 84.5 an image; on shapes alone."""
    narrow, wide = [320, 640, 1280, 1280], [128, 256, 512, 512]
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(block_out_channels=narrow, cross_attention_dim=768, attention_head_dim=8)
        blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
        vae = diffusers.AutoencoderKL(block_out_channels=wide, layers_per_block=2, **blocks)
    known = {"unet": unet, "vae": vae, "factor": 8, "height": 512, "width": 512, "forwards_per_image": 102}
    sampler = SimpleNamespace(**known, embedding=lambda text: torch.empty(1, 77, 768), recipe=Recipe())
    assert loading.flops_per_image(sampler) == pytest.approx(84.5e12, rel=0.001)
    sampler.recipe = Recipe(name="sdxl")  # drawn by diffusers
    assert loading.flops_per_image(sampler) is None


@pytest.mark.parametrize("scheduler", list(SCHEDULERS))
@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_same_pixels_as_the_plain_pipeline_call(tiny, scheduler, guidance):
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tiny, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = diffusion.build_scheduler(scheduler, pipeline.scheduler.config)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    images = pipeline(TEXTS, num_inference_steps=6, guidance_scale=guidance, generator=generators).images
    plain = np.stack([np.asarray(image) for image in images]).astype(int)

    ours = draw(sampler_for(tiny, scheduler, 6, guidance))
    assert plain.std() > 20  # pictures, not a constant
    assert np.abs(ours - plain).max() <= 1


def test_no_scheduler_clips_latents(tiny):
    config = find_pipeline(str(tiny)).settings("scheduler/scheduler_config.json")
    assert "clip_sample" not in config  # as released: a PNDM scheduler
    for name in SCHEDULERS:
        settings = diffusion.build_scheduler(name, config).config
        assert not settings.get("clip_sample") and not settings.get("thresholding"), name


def test_sizes_other_than_the_native_one(tiny):
    assert draw(sampler_for(tiny, size=(32, 24))).shape == (3, 32, 24, 3)


def test_initial_latents_of_an_image_are_its_own(tiny):
    sampler = sampler_for(tiny)
    together = sampler.initial_latents(SEEDS)
    assert together.dtype == torch.float32 and together.shape == (3, 4, 8, 8)
    for row, seed in zip(together, SEEDS, strict=True):
        assert torch.equal(row, sampler.initial_latents([seed])[0])
        assert torch.equal(row, torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed)))


def test_the_next_batch_is_not_touched_by_the_one_before(tiny):
    for scheduler in SCHEDULERS:
        sampler = sampler_for(tiny, scheduler)
        first = draw(sampler)
        draw(sampler, [9], ["something else"])
        assert np.array_equal(first, draw(sampler)), scheduler


def test_every_distinct_prompt_is_encoded_once_and_alone(tiny, monkeypatch):
    sampler = sampler_for(tiny)
    encoded = []
    plain = sampler.pipeline.encode_prompt
    monkeypatch.setattr(
        sampler.pipeline, "encode_prompt", lambda text, *rest: encoded.append(text) or plain(text, *rest)
    )
    draw(sampler, list(range(6)), TEXTS * 2)
    draw(sampler, list(range(6)), TEXTS * 2)
    assert sorted(encoded) == sorted([*TEXTS, ""])


@pytest.mark.parametrize(("template", "prompts"), [("c", 1), ("c, d_c", 1), ("c, h_c inside b", 354)])
def test_a_class_passes_the_text_encoder_once_a_distinct_prompt(tiny, monkeypatch, template, prompts):
    """Which is why none is encoded ahead of its batch: docs/gpu.md has the numbers."""
    sampler, encoded = sampler_for(tiny), []
    monkeypatch.setattr(
        sampler.pipeline, "encode_prompt", lambda text, *rest: encoded.append(text) or [torch.zeros(1, 77, 8)]
    )
    (tench,) = load_classes("n01440764").rows
    texts = [prompt.text for prompt in class_prompts(tench, parse_template(template), range(1300))]
    for text in texts:
        sampler.embedding(text)
    assert sorted(encoded) == sorted(set(texts)) and len(encoded) == prompts


def test_prompt_cache_is_bounded(tiny, monkeypatch):
    monkeypatch.setattr(diffusion, "CACHED_PROMPTS", 3)
    sampler = sampler_for(tiny)
    for number in range(10):
        sampler.embedding(str(number))
    assert sampler.embedding.cache_info().currsize == 3


@pytest.mark.parametrize(
    ("scheduler", "steps", "guidance", "interval", "forwards"),
    [("pndm", 50, 2, None, 102), ("pndm", 50, 1, None, 51), ("ddim", 50, 2, None, 100), ("dpmpp_2m", 20, 2, None, 40)],
)
def test_forwards_are_what_the_unet_really_runs(tiny, scheduler, steps, guidance, interval, forwards):
    assert count_forwards(sampler_for(tiny, scheduler, steps, guidance, interval)) == forwards


def test_fast_recipe_runs_at_most_35_percent_of_the_papers_forwards(tiny):
    def run(name):
        recipe = RECIPES[name]
        keys = ("scheduler", "steps", "guidance_scale", "guidance_interval")
        return count_forwards(sampler_for(tiny, *[recipe[key] for key in keys]))

    assert run("paper") == 2 * 51
    assert 18 < run("fast") <= 0.35 * 2 * 51


def count_forwards(sampler) -> int:
    seen = []
    hook = sampler.unet.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    denoise(sampler, [0], ["a cat"])
    hook.remove()
    assert sum(seen) == sampler.forwards_per_image
    return sum(seen)


def test_interval_guides_inside_and_only_inside(tiny):
    everywhere = sampler_for(tiny, "dpmpp_2m", 8, 7.5)
    wide = sampler_for(tiny, "dpmpp_2m", 8, 7.5, (0.0, 1000.0))
    empty = sampler_for(tiny, "dpmpp_2m", 8, 7.5, (900.0, 1000.0))
    unguided = sampler_for(tiny, "dpmpp_2m", 8, 1.0)
    assert np.array_equal(draw(wide), draw(everywhere))
    assert np.array_equal(draw(empty), draw(unguided))
    middle = sampler_for(tiny, "dpmpp_2m", 8, 7.5, (0.28, 5.42))
    assert middle.guided[0] is False and True in middle.guided


def test_out_of_memory_halves_the_batch_and_keeps_latents_and_prompts(tiny, monkeypatch):
    whole = draw(sampler_for(tiny), list(range(7)), ["a cat"] * 7)
    sampler = sampler_for(tiny)
    plain, sizes = sampler.unet.forward, []

    def small_memory(sample, *rest, **named):
        sizes.append(len(sample))
        if len(sample) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(sample, *rest, **named)

    monkeypatch.setattr(sampler.unet, "forward", small_memory)
    halved = draw(sampler, list(range(7)), ["a cat"] * 7)
    assert sampler.denoising.size <= 2 and max(sizes) > 4
    assert np.abs(whole - halved).max() <= 1  # other batch size, other rounding: low bits only


def test_out_of_memory_with_one_image_names_the_remedy(tiny, monkeypatch):
    sampler = sampler_for(tiny)

    def no_memory(*inputs, **named):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(sampler.unet, "forward", no_memory)
    with pytest.raises(UserError, match="--height"):
        denoise(sampler, SEEDS, TEXTS)


@pytest.mark.parametrize(("kind", "message"), MEMORY_ERRORS)
@pytest.mark.parametrize("place", ["unet", "vae", "safety_checker"])
def test_every_face_of_full_memory_is_recovered_at_each_place(tiny_safe, monkeypatch, place, kind, message):
    sampler = sampler_for(tiny_safe, safety=True)
    before = draw(sampler)
    method = {"unet": "forward", "vae": "decode", "safety_checker": "forward"}[place]
    part = getattr(sampler.pipeline, place)
    plain, failed = getattr(part, method), []

    def small_memory(*inputs, **named):
        images = len(inputs[0]) if inputs else len(named["clip_input"])
        if images > (2 if place == "unet" else 1):  # the UNet has two rows an image
            failed.append(images)
            raise kind(message)
        return plain(*inputs, **named)

    monkeypatch.setattr(part, method, small_memory)
    assert np.abs(draw(sampler) - before).max() <= 1
    assert sampler.flagged(torch.zeros(3, 16, 16, 3, dtype=torch.uint8)) == [False] * 3
    assert failed, "memory never ran out: the test shows nothing"
    portions = {"unet": sampler.denoising, "vae": sampler.decoding, "safety_checker": sampler.checking}[place]
    assert portions.size == 1


def test_other_errors_are_not_taken_for_memory(tiny, monkeypatch):
    sampler = sampler_for(tiny)

    def broken(*inputs, **named):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(sampler.unet, "forward", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        denoise(sampler, SEEDS, TEXTS)


def test_black_and_non_finite_images_are_told_apart_from_dark_ones(tiny, monkeypatch):
    sampler = sampler_for(tiny)
    images = torch.full((4, 3, 16, 16), -1.0)
    images[1, 0, 0, 0] = float("nan")
    images[2] = 0.5
    images[2, 0, 0, 0] = float("inf")
    images[3, 0, 5, 5] = -0.9  # one visible pixel
    monkeypatch.setattr(sampler.vae, "decode", lambda latents, **named: (images,))
    assert sampler.decode(torch.zeros(4, 4, 8, 8))[1] == ["black", "non-finite", "non-finite", ""]


def test_safety_checker_flags_but_never_blackens(tiny_safe):
    sampler = sampler_for(tiny_safe, safety=True)
    pixels, _ = sampler.decode(denoise(sampler, SEEDS, TEXTS))
    before = pixels.clone()
    assert sampler.flagged(pixels) == [False] * 3
    torch.nn.init.constant_(sampler.pipeline.safety_checker.concept_embeds_weights, -2.0)
    assert sampler.flagged(pixels) == [True] * 3
    assert torch.equal(pixels, before)


def test_the_safety_checker_has_its_own_batch_and_halves_it_when_memory_runs_out(tiny_safe, monkeypatch):
    sampler = sampler_for(tiny_safe, safety=True)
    checker, sizes = sampler.pipeline.safety_checker, []
    torch.nn.init.constant_(checker.concept_embeds_weights, 0.72)
    pixels, _ = sampler.decode(denoise(sampler, list(range(40)), ["a cat"] * 40))
    whole = sampler.flagged(pixels)
    plain = checker.forward

    def small_memory(clip_input, images):
        sizes.append(len(clip_input))
        if len(clip_input) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(clip_input, images)

    monkeypatch.setattr(checker, "forward", small_memory)
    assert sampler.flagged(pixels) == whole and set(whole) == {False, True}
    assert max(sizes) <= diffusion.CHECKED_IMAGES and sampler.checking.size == 4
    monkeypatch.setattr(diffusion, "is_out_of_memory", lambda error: True)
    monkeypatch.setattr(checker, "forward", lambda **named: small_memory(torch.zeros(9), None))
    with pytest.raises(UserError, match="--safety off"):
        sampler.flagged(pixels)


def test_flags_are_those_of_the_plain_pipeline(tiny_safe):
    sampler = sampler_for(tiny_safe, safety=True)
    torch.nn.init.constant_(sampler.pipeline.safety_checker.concept_embeds_weights, 0.55)
    pixels, _ = sampler.decode(denoise(sampler, list(range(40)), ["a cat"] * 40))
    _, plain = sampler.pipeline.run_safety_checker(pixels.permute(0, 3, 1, 2).float() / 255 * 2 - 1, CPU, torch.float32)
    ours = sampler.flagged(pixels)
    assert ours == list(plain)


@pytest.fixture
def compiled_sizes(monkeypatch) -> list[int]:
    """The batch sizes that a UNet sees after its compile(), which here compiles nothing.

    Compiling for real takes minutes on a CPU; there it was checked by hand that the pixels stay within 2 of 255.
    """
    sizes: list[int] = []

    def pretend(module, **options):
        assert isinstance(module, diffusers.UNet2DConditionModel) and options == {"dynamic": False}
        eager = module._call_impl
        module._compiled_call_impl = lambda sample, *rest, **named: (
            sizes.append(len(sample)) or eager(sample, *rest, **named)
        )

    monkeypatch.setattr(torch.nn.Module, "compile", pretend)
    return sizes


def test_a_compiled_unet_sees_one_batch_size_and_images_do_not_depend_on_what_fills_it(tiny, compiled_sizes):
    sampler = sampler_for(tiny, compiled=True)
    sampler.denoising.size = 4
    seeds, texts = list(range(7)), [f"a cat in {number}" for number in range(7)]
    together = denoise(sampler, seeds, texts)
    assert together.shape[0] == 7
    assert torch.equal(denoise(sampler, seeds[4:5], texts[4:5])[0], together[4])  # a redraw: one image, filled up
    assert set(compiled_sizes) == {8}  # guided: two rows an image
    plain = sampler_for(tiny)
    assert np.abs(draw(plain, seeds, texts) - draw(sampler, seeds, texts)).max() <= 1


def test_timing_for_the_planner_compiles_nothing(tiny, compiled_sizes):
    recipe = Recipe(steps=2, height=16, width=16, dtype="fp32", batch_size=3, compile=True)
    rate, unit, how = loading.measured_rate(find_pipeline(str(tiny)), recipe, "cpu")
    assert rate > 0 and unit == "CPU" and "fp32 in batches of 3" in how
    assert compiled_sizes == []


def test_out_of_memory_halves_a_compiled_batch_too(tiny, compiled_sizes, monkeypatch):
    sampler = sampler_for(tiny, compiled=True)
    sampler.denoising.size = 8
    plain = sampler._denoise

    def small_memory(latents, *rest):
        if len(latents) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(latents, *rest)

    monkeypatch.setattr(sampler, "_denoise", small_memory)
    assert len(denoise(sampler, [1, 2, 3], ["a cat"] * 3)) == 3
    assert sampler.denoising.size == 4 and set(compiled_sizes) == {8}


def test_attention_by_device():
    assert loading.resolve_attention("auto", CPU) == "sdpa"
    assert loading.resolve_attention("sdpa", CPU) == "sdpa"
    with pytest.raises(UserError, match=r"--attention xformers.*cpu.*sdpa"):
        loading.resolve_attention("xformers", CPU)


@pytest.mark.parametrize(
    "lacks",
    [
        lambda query: False,
        lambda query: query.dtype == torch.float16 and query.shape[-1] == 512,
        lambda query: query.shape[-1] == 40,
    ],
)
def test_auto_takes_xformers_only_where_all_its_operators_run(monkeypatch, lacks):
    def attention(query, key, value):
        if lacks(query):
            raise NotImplementedError("No operator found for this attention\nsm_120")
        return query

    plain, cuda = torch.zeros, torch.device("cuda")
    monkeypatch.setattr(torch, "zeros", lambda *size, device, **rest: plain(*size, **rest))  # no GPU here
    monkeypatch.setitem(sys.modules, "xformers.ops", SimpleNamespace(memory_efficient_attention=attention))
    monkeypatch.setattr(loading, "seconds_of", lambda work, *rest: 2.0 if "scaled" in str(work.func) else 1.0)
    monkeypatch.setattr(torch, "randn", lambda *size, device: plain(*size))
    loading.attention_ms.cache_clear()
    usable = not any(lacks(plain(1, 8, 1, size, dtype=torch.float16)) for size in loading.HEADS)
    assert loading.resolve_attention("auto", cuda, torch.float16) == ("xformers" if usable else "sdpa")
    if usable:
        assert loading.resolve_attention("xformers", cuda, torch.float16) == "xformers"
    else:
        with pytest.raises(UserError, match=r"--attention xformers: .*cuda \(No operator found.*\); use"):
            loading.resolve_attention("xformers", cuda, torch.float16)


@pytest.mark.parametrize(
    ("sdpa", "xformers", "taken"), [(4.0, 4.27, "sdpa"), (4.27, 4.0, "xformers"), (1, 0.99, "sdpa")]
)
def test_auto_takes_the_fastest_kernel_and_never_by_noise(monkeypatch, sdpa, xformers, taken):
    """A100: 4.27 iterations/s with sdpa, 4.00 with xformers (diffusers #8873); a lead of 1 % is none."""
    monkeypatch.setattr(loading, "xformers_fault", lambda *rest: "")
    monkeypatch.setattr(loading, "attention_ms", lambda *rest: {"sdpa": {40: sdpa}, "xformers": {40: xformers}})
    assert loading.resolve_attention("auto", torch.device("cuda"), torch.float16) == taken
    assert loading.resolve_attention("xformers", torch.device("cuda"), torch.float16) == "xformers"


def test_attention_is_measured_for_each_head_size(monkeypatch):
    monkeypatch.setattr("xformers.ops.memory_efficient_attention", xformers_on_a_cpu)
    monkeypatch.setattr(loading, "HEADS", {40: 64, 512: 16})
    assert loading.attention_ms(CPU, torch.float32).keys() == {"sdpa"}  # without a GPU xformers cannot run
    monkeypatch.setattr(loading, "xformers_fault", lambda *rest: "")
    loading.attention_ms.cache_clear()
    found = loading.attention_ms(CPU, torch.float32)
    assert found.keys() == {"sdpa", "xformers"} and all(ms > 0 for times in found.values() for ms in times.values())
    assert found["sdpa"].keys() == found["xformers"].keys() == {40, 512}


def xformers_on_a_cpu(query, key, value, attn_bias=None, op=None, scale=None, p=0.0):
    """softmax(Q K^T / sqrt(d)) V of (images x heads, tokens, size) or (images, tokens, heads, size), written out."""
    heads_first = query.dim() == 3
    q, k, v = (x if heads_first else x.transpose(1, 2) for x in (query, key, value))
    weights = (q @ k.transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)).softmax(-1) @ v
    return weights if heads_first else weights.transpose(1, 2)


def test_xformers_is_used_in_the_unet_and_the_vae_and_draws_the_same_pictures(tiny, monkeypatch):
    calls = []

    def counted(*inputs, **named):
        calls.append(inputs[0].shape)
        return xformers_on_a_cpu(*inputs, **named)

    monkeypatch.setattr("xformers.ops.memory_efficient_attention", counted)
    plain = draw(sampler_for(tiny))
    assert not calls
    ours = sampler_for(tiny, attention="xformers")
    latents = denoise(ours, SEEDS, TEXTS)
    in_the_unet = len(calls)
    assert in_the_unet >= ours.forwards_per_image / 2
    ours.decode(latents)
    assert len(calls) > in_the_unet  # the VAE's attention too
    assert np.abs(draw(ours) - plain).max() <= 1


# Iterations/s of Stable Diffusion 1.x on an A100 by images in a batch, times the images (diffusers, torch2.0.md).
A100 = {1: 23.1, 2: 38.0, 4: 52.5, 8: 55.6, 16: 57.6, 32: 58.6, 64: 59.3}


@pytest.mark.parametrize(
    ("memory_gb", "dtype", "side", "images"),
    [
        (80, torch.float16, 64, 16),
        (42.4, torch.float16, 64, 16),
        (42.4, torch.float32, 64, 8),
        (25.4, torch.bfloat16, 64, 16),
        (16.9, torch.float16, 64, 8),
        (8.5, torch.float16, 64, 2),
        (6.4, torch.float16, 96, 1),
        (80, torch.float16, 96, 7),
        (80, torch.float16, 8, 64),
    ],
)
def test_automatic_batch_on_a_gpu_is_a_table(monkeypatch, memory_gb, dtype, side, images):
    """The same on every card of a kind and in every element of an array: nothing is timed."""
    properties = SimpleNamespace(total_memory=memory_gb * 1e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    sampler = SimpleNamespace(device=torch.device("cuda"), dtype=dtype, height=8 * side, width=8 * side, factor=8)
    assert {loading.choose_batch_size(sampler) for _ in range(3)} == {images}
    if memory_gb == 80 and side == 64:
        assert A100[images] >= 0.97 * max(A100.values())


def test_automatic_batch_on_a_cpu_depends_on_the_size_alone(tiny):
    assert loading.choose_batch_size(sampler_for(tiny)) == 100
    assert loading.choose_batch_size(sampler_for(tiny, size=(64, 64))) == 6  # 32x32 latents


# ===== folders that cannot be used =====


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder", "tokenizer", "scheduler", "safety_checker"])
def test_missing_component_is_named(tiny_safe, tmp_path, component):
    broken = shutil.copytree(tiny_safe, tmp_path / "broken")
    shutil.rmtree(broken / component)
    with pytest.raises(UserError, match=f"--model .*component {component} is missing"):
        find_pipeline(str(broken))


@pytest.mark.parametrize("damage", ["cut", "empty", "garbled"])
def test_damaged_safetensors_are_named_before_loading(tiny, tmp_path, damage):
    broken = shutil.copytree(tiny, tmp_path / "broken")
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes({"cut": data[:-1], "empty": b"", "garbled": b"\xff" * len(data)}[damage])
    assert safetensors_problem(weights)
    with pytest.raises(UserError, match=r"diffusion_pytorch_model\.safetensors is damaged"):
        find_pipeline(str(broken))


def test_weights_of_another_shape_are_one_clear_error(tiny, tmp_path):
    broken = shutil.copytree(tiny, tmp_path / "broken")
    config = broken / "unet" / "config.json"
    config.write_text(config.read_text().replace('"cross_attention_dim": 16', '"cross_attention_dim": 24'))
    with pytest.raises(UserError, match=r"--model .* cannot be loaded"):
        sampler_for(broken)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist"),
        ("{", "not valid JSON .*; fetch the model again"),
        ('{"_class_name": "StableDiffusionXLPipeline"}', "names no unet"),
        ('{"_class_name": "StableDiffusionInpaintPipeline"}', "is a StableDiffusionInpaintPipeline; generate.py draws"),
    ],
)
def test_no_pipeline_folder(tmp_path, text, message):
    if text:
        (tmp_path / "model_index.json").write_text(text)
    with pytest.raises(UserError, match=message):
        find_pipeline(str(tmp_path))


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("model_index.json", '{"_class_name": "StableDiffusionPipeline", "unet": 5}', "names no unet"),
        ("model_index.json", "[]", "expected object"),
        ("unet/config.json", '{"sample_size": null}', "at .*sample_size"),
        ("unet/config.json", "{}", "sample_size"),
        ("vae/config.json", '{"block_out_channels": 5}', "at .*block_out_channels"),
    ],
)
def test_settings_of_a_wrong_type_are_one_line_with_the_file(tiny, tmp_path, file, text, message):
    broken = shutil.copytree(tiny, tmp_path / "broken")
    (broken / file).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        Recipe().with_model(find_pipeline(str(broken)))
    assert "\n" not in str(error.value)


def test_parts_of_weights_are_looked_for_in_their_folder_only(tiny, tmp_path):
    broken = shutil.copytree(tiny, tmp_path / "broken")
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.move(weights, tmp_path / "elsewhere.safetensors")
    index = {"weight_map": {"conv_in.weight": "../../elsewhere.safetensors"}}
    weights.with_name(f"{weights.name}.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="component unet is missing"):
        find_pipeline(str(broken))


def test_neither_folder_nor_hub_id():
    with pytest.raises(UserError, match="no such folder, and not a hub id"):
        find_pipeline("no such model")
    with pytest.raises(UserError, match="--revision"):
        find_pipeline(".", revision="main")


def test_hub_id_without_network_says_how_to_get_it_and_what_to_try(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError) as error:
        find_pipeline("CompVis/no-such-weights-here")
    for part in ("weights are not on this machine", "hf download CompVis/no-such-weights-here", "models/fashion-sd"):
        assert part in str(error.value)


def test_hashes_cover_what_makes_pixels(tiny_safe):
    folder = find_pipeline(str(tiny_safe))
    assert {name.split("/")[0] for name in folder.hashes(False)} == {
        "unet",
        "vae",
        "text_encoder",
        "tokenizer",
        "scheduler",
    }
    assert "safety_checker/model.safetensors" in folder.hashes(True)
    assert folder.native_size == 16 and folder.pixels_per_latent == 2 and folder.has_safety_checker


def test_portions_cover_all_images_while_another_thread_halves_them():
    """Decoding goes on in a thread of its own while images are drawn again, and shares the size."""
    portions, covered = diffusion.Portions(8, torch.device("cpu"), "--height"), []

    def work(start: int, end: int) -> None:
        covered.extend(range(start, end))
        portions.size = 3  # as the other thread finds its memory full

    portions.map(work, 20)
    assert covered == list(range(20)) and portions.size == 3
