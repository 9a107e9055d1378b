"""Drawing on "cuda" without a GPU: a mismatch of devices or types fails here as it would there; waits are counted."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import cache
from unittest import mock

import diffusers
import pytest
import torch

import generate
from tests.fake_cuda import FakeCuda
from tests.tiny_sd import build_tiny_sd
from utils.dataset.folder import ClassFolder
from utils.generation import diffusion, drawing
from utils.generation.prompts import Prompt
from utils.generation.recipe import SCHEDULERS, Recipe
from utils.machine import memory_format

CUDA = torch.device("cuda")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
TEXTS = ["a cat", "a dog", "a cat"]


@pytest.fixture(scope="module")
def tiny_safe(tmp_path_factory):
    return build_tiny_sd(tmp_path_factory.mktemp("models") / "safe", with_safety_checker=True)


@cache
def pipeline_on_cuda(folder, dtype: torch.dtype):
    """(FakeCuda, pipeline) from FOLDER, loaded as load_sampler does and moved to the fake device once: it is slow."""
    cuda = FakeCuda()
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.safety_checker):
        cuda.move(part, memory_format(CUDA, dtype))
    return cuda, pipeline


@contextlib.contextmanager
def sampler_on_cuda(folder, recipe: Recipe):
    """(FakeCuda, a new Sampler) of the pipeline in FOLDER."""
    dtype = DTYPES[recipe.dtype]
    cuda, pipeline = pipeline_on_cuda(folder, dtype)
    cuda.waits.clear()
    cuda.kernels.clear()
    streams = {"Stream": mock.Mock(), "current_stream": mock.Mock(), "empty_cache": mock.Mock()}
    streams["stream"] = lambda stream: contextlib.nullcontext()
    with cuda.present(), contextlib.ExitStack() as patches:
        for name, value in streams.items():
            patches.enter_context(mock.patch(f"torch.cuda.{name}", value))
        patches.enter_context(mock.patch.object(torch.Tensor, "record_stream", lambda *_: None))
        yield cuda, diffusion.Sampler(pipeline, recipe, CUDA, dtype)


RECIPE = Recipe(steps=3, height=16, width=16, dtype="fp16", batch_size=3, safety="keep")


@pytest.mark.parametrize("interval", [None, (0.28, 5.42)], ids=["guided", "interval"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_prompts_latents_denoising_decoding_and_the_safety_check_agree_on_device_and_type(
    tiny_safe, scheduler, dtype, interval
):
    recipe = replace(RECIPE, scheduler=scheduler, dtype=dtype, guidance_interval=interval)
    with sampler_on_cuda(tiny_safe, recipe) as (cuda, sampler):
        assert sampler.layout == memory_format(CUDA, sampler.dtype)  # of small images too, unlike on a CPU
        noise = sampler.initial_latents([1, 2, 3])
        assert noise.device.type == "cpu"
        for text in ["", *TEXTS]:
            assert sampler.embedding(text).device.type == "cuda"
        cuda.waits.clear()
        cuda.kernels.clear()
        latents = sampler.denoise([1, 2, 3], TEXTS)
        assert (latents.device.type, latents.dtype, latents.shape) == ("cuda", torch.float32, (3, 4, 8, 8))
        # The noise and the time steps go to the device before the loop; in it nothing waits.
        assert len(cuda.waits) <= 2 and all(wait.startswith("copy cpu -> cuda") for wait in cuda.waits), cuda.waits
        assert cuda.kernels.total() > 20 * recipe.steps, "the UNet did not run on the device"

        cuda.waits.clear()
        pixels, faults = sampler.decode(latents)
        assert (pixels.device.type, pixels.dtype, pixels.shape) == ("cpu", torch.uint8, (3, 16, 16, 3))
        assert len(faults) == 3 and len(cuda.waits) <= 3  # the pixels, and what is wrong with them
        flags = sampler.flagged(torch.zeros(3, 16, 16, 3, dtype=torch.uint8))
        assert len(flags) == 3


def test_a_wait_in_the_loop_is_seen(tiny_safe):
    with sampler_on_cuda(tiny_safe, RECIPE) as (cuda, sampler):
        plain = sampler.scheduler.step

        def asking(noise, *rest, **named):
            noise.sum().item()
            return plain(noise, *rest, **named)

        sampler.scheduler.step = asking
        sampler.denoise([1], ["a cat"])
        assert cuda.waits.count("item") == len(sampler.guided)


def test_a_tensor_left_on_the_cpu_and_a_type_left_behind_fail(tiny_safe):
    with sampler_on_cuda(tiny_safe, RECIPE) as (_, sampler), torch.inference_mode():
        text, time_step, rows = sampler.embedding(""), torch.tensor(1).to(CUDA), torch.zeros(1, 4, 8, 8).half()
        sampler.unet(rows.to(CUDA), time_step, encoder_hidden_states=text)
        with pytest.raises(RuntimeError, match="device"):
            sampler.unet(rows, time_step, encoder_hidden_states=text)
        with pytest.raises(RuntimeError, match="type"):
            sampler.unet(rows.to(CUDA), time_step, encoder_hidden_states=text.float())


def test_the_loop_of_generate_decodes_beside_the_next_batch(tiny_safe, tmp_path):
    """The path that only a GPU takes: the side stream waits for the batch's own event, and every file is written."""
    folder = ClassFolder(tmp_path, "n01", 5, ".jpg", 2)
    folder.images.mkdir(parents=True)
    prompts = [Prompt("n01", index, "a cat", index) for index in range(5)]
    batches = [drawing.Batch(folder, prompts[start : start + 2]) for start in (0, 2, 4)]

    def bright(sampler, latents):
        return torch.full((len(latents), 16, 16, 3), 99, dtype=torch.uint8), [""] * len(latents)

    with sampler_on_cuda(tiny_safe, replace(RECIPE, safety="off")) as (_, sampler):
        bar = mock.Mock()
        with mock.patch.object(diffusion.Sampler, "decode", bright):
            done = list(generate.draw(batches, sampler.recipe, sampler, bar))
        assert [sorted(entries) for _, entries in done] == [[0, 1], [2, 3], [4]]
        assert sampler.side_stream.wait_event.call_count == 3
    assert len(list(folder.images.glob("*.jpg"))) == 5
