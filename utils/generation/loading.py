"""Making a Sampler: a checked pipeline is loaded; attention kernels and batch size are chosen by device."""

import importlib
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle CPU threads sleep: a shared machine stays usable
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the same sums on every run, also with two streams

import diffusers
import torch
import transformers
from diffusers.models.attention_processor import XFormersAttnProcessor

from utils.cli import UserError
from utils.generation.diffusion import Sampler
from utils.generation.lora import merge
from utils.generation.pipeline import CHECKER, PipelineFolder
from utils.generation.recipe import Recipe
from utils.generation.whole_pipeline import WholePipeline
from utils.machine import require_compiler, resolve_device, resolve_dtype
from utils.model import count_flops

DTYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
CPU_LATENTS = 6400  # batch x latent area on a CPU: 100 images of 8x8 latents, 1 of 64x64; larger gained nothing
# CUDA: memory in GB -> images of 512 px in 16-bit numbers; on an A100 16 draw at 97 % of the rate of 64 (diffusers'
# figures), and more would lose more to a kill. A table, for a trial's answer would change with its noise.
IMAGES_BY_MEMORY = ((22, 16), (15, 8), (10, 4), (7, 2), (0, 1))
MOST_IMAGES = 64  # in a batch, of whatever size
# Size of an attention head -> its tokens at 512 px: the UNets of SD 1.x (40, 80, 160) and 2.x (64), and the VAE (512)
HEADS = {40: 4096, 64: 4096, 80: 1024, 160: 256, 512: 4096}
IN_MEMORY = 0.8  # weights may take this part of a GPU's free memory; the rest is for an image's own numbers
WORTHWHILE = 1.05  # xformers must be this many times faster: a measurement is off by less


def load_sampler(folder: PipelineFolder, recipe: Recipe, device: torch.device) -> Sampler:
    """Load FOLDER for drawing by RECIPE, settled with the model and DEVICE; UserError if its weights do not fit."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    if recipe.compile:
        require_compiler(device)
    dtype = resolve_dtype(recipe.dtype or "auto", device)
    family = recipe.family
    options: dict = {} if recipe.safety != "off" else {name: None for name in CHECKER if name in folder.components}
    if family.has_own_loop or folder.has_safety_checker:
        options["requires_safety_checker"] = False
    kind = getattr(diffusers, family.pipeline)
    if folder.loras and not hasattr(kind, "load_lora_weights"):
        raise UserError(f"--lora: diffusers loads none for {family.name}")
    try:
        pipeline = kind.from_pretrained(folder.path, dtype=dtype, local_files_only=True, **options)
    except Exception as error:  # each library raises its own kinds for the same trouble
        reason = str(error).splitlines()[0]
        raise UserError(f"--model {folder.name} cannot be loaded: {reason}; copy or download it again") from error
    if folder.loras:
        merge(pipeline, folder.loras)
    if not family.has_own_loop:
        return load_whole(pipeline, recipe, device, dtype)
    sampler = Sampler(pipeline.to(device), recipe, device, dtype)
    for part in (sampler.unet, sampler.vae):
        part.to(memory_format=sampler.layout)
        if recipe.attention == "xformers":  # not diffusers' own switch, which first tries it on the GPU numbered 0
            part.set_attn_processor(XFormersAttnProcessor())
    if recipe.compile:
        sampler.unet.compile(dynamic=False)  # Sampler gives it one batch size
    return sampler


def load_whole(pipeline, recipe: Recipe, device: torch.device, dtype: torch.dtype) -> Sampler:
    """A sampler that calls PIPELINE as a whole. Its text encoders, network and VAE take turns on a GPU that cannot hold
    them together: that takes time and changes no image."""
    if hasattr(pipeline, "upcast_vae") and pipeline.vae.config.force_upcast and dtype == torch.float16:
        pipeline.vae.to(torch.float32)  # SDXL's overflows in half precision; the pipeline would do so at each decode
    denoiser = getattr(pipeline, recipe.family.denoiser)
    if recipe.compile:
        denoiser.forward = torch.compile(denoiser.forward, dynamic=False)
    sampler = WholePipeline(pipeline, recipe, device, dtype)
    modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    weight_bytes = sum(weight.nbytes for part in modules for weight in part.parameters())
    if device.type == "cuda" and weight_bytes > IN_MEMORY * torch.cuda.mem_get_info(device)[0]:
        pipeline.enable_model_cpu_offload(device=device)
        sampler.side_stream = None  # the VAE would push the network out
    else:
        pipeline.to(device)
    return sampler


# ===== choices by device =====


def resolve_attention(name: str, device: torch.device, dtype: torch.dtype = torch.float16) -> str:
    """`auto` is torch's scaled_dot_product_attention ("sdpa") unless xformers is faster on this card."""
    if name == "sdpa" or (name == "auto" and device.type != "cuda"):
        return "sdpa"
    if name == "xformers":
        if fault := xformers_fault(device, dtype):
            raise UserError(f"--attention xformers: {fault}; use --attention sdpa")
        return name
    total_ms = {kernel: sum(times.values()) for kernel, times in attention_ms(device, dtype).items()}
    return "xformers" if WORTHWHILE * total_ms.get("xformers", math.inf) < total_ms["sdpa"] else "sdpa"


def xformers_fault(device: torch.device, dtype: torch.dtype) -> str:
    """Why xformers cannot be used on DEVICE, "" if it can: its import tells nothing of the GPUs it was built for."""
    if device.type != "cuda":
        return f"xformers has no {device.type} code"
    try:
        from xformers.ops import memory_efficient_attention

        for size in HEADS:
            query = torch.zeros(1, 8, 1, size, dtype=dtype, device=device)  # (images, tokens, heads, head size)
            memory_efficient_attention(query, query, query).cpu()  # waits: a kernel may fail late
    except Exception as error:  # built for another torch, CUDA or GPU: it fails in many ways
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"xformers cannot be used on {device} ({reason})"
    return ""


@cache
def attention_ms(device: torch.device, dtype: torch.dtype) -> dict[str, dict[int, float]]:
    """{"sdpa", and "xformers" where it runs: {head size: milliseconds}} of attention in two images."""
    kernels: dict[str, Callable] = {"sdpa": torch.nn.functional.scaled_dot_product_attention}
    if not xformers_fault(device, dtype):
        kernels["xformers"] = importlib.import_module("xformers.ops").memory_efficient_attention
    found: dict[str, dict[int, float]] = {name: {} for name in kernels}
    for size, tokens in HEADS.items():
        query = torch.randn(2, tokens, 1 if size == 512 else 8, size, device=device).to(dtype)
        for name, kernel in kernels.items():
            q = query.transpose(1, 2) if name == "sdpa" else query  # sdpa takes heads first: a view, as in diffusers
            found[name][size] = round(1000 * seconds_of(partial(kernel, q, q, q), device, 9), 4)
    return found


def choose_batch_size(sampler: Sampler) -> int:
    """Images a batch when the user leaves it to us: by image size and memory. Recorded, then kept."""
    area = (sampler.height // sampler.factor) * (sampler.width // sampler.factor)
    if sampler.device.type != "cuda":
        return max(1, min(CPU_LATENTS // area, 100))
    memory_gb = torch.cuda.get_device_properties(sampler.device).total_memory / 1e9
    images = next(images for least_gb, images in IMAGES_BY_MEMORY if memory_gb >= least_gb)
    return max(1, min(images * 64 * 64 * 2 // (area * sampler.dtype.itemsize), MOST_IMAGES))


@torch.inference_mode()
def measured_rate(folder: PipelineFolder, recipe: Recipe, device_name: str) -> tuple[float, str, str]:
    """(images/s, "GPU" or "CPU", how) of FOLDER on a device here: one step and one decode are timed, then reckoned.

    torch.compile is left out: it would take minutes.
    """
    device = resolve_device(device_name)
    recipe = replace(recipe.with_device(device), safety="off", compile=False)
    sampler = load_sampler(folder, recipe, device)
    size = recipe.batch_size or choose_batch_size(sampler)
    sampler.denoising.size = size
    latents = sampler.initial_latents(range(size)).to(device)
    forward = seconds_of(lambda: sampler.one_step(size), device) / sampler.one_step(size)
    seconds = forward * sampler.forwards_per_image + seconds_of(lambda: sampler.decode(latents), device)
    how = f"measured here, {recipe.dtype} in batches of {size}, from one step and one decode"
    return size / seconds, "CPU" if device.type == "cpu" else "GPU", how


@torch.inference_mode()
def flops_per_image(sampler: Sampler) -> int | None:
    """Operations of the forwards and the decoding of an image; None for a network that is called in another way.

    Counted on shapes alone: the number is the same whatever device, attention kernel or compiler computes.
    """
    unet: Any = getattr(sampler.unet, "_orig_mod", sampler.unet)  # compiled or not
    if not sampler.recipe.family.has_own_loop:
        return None
    shape = sampler.embedding("").shape  # computed here where nothing was guided
    with torch.device("meta"):
        text = torch.empty(shape)
        sides = sampler.height // sampler.factor, sampler.width // sampler.factor
        latents = torch.empty(1, unet.config.in_channels, *sides)
        shapes, decoder = (type(network).from_config(network.config) for network in (unet, sampler.vae))
        forward = count_flops(lambda: shapes(latents, torch.empty(()), encoder_hidden_states=text))
        return sampler.forwards_per_image * forward + count_flops(lambda: decoder.decode(latents))


def seconds_of(work: Callable[[], object], device: torch.device, times: int = 1) -> float:
    """The median of WORK, run TIMES times after once to warm up."""
    seconds = []
    for _ in range(times + 1):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])
