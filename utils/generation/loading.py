"""Making a Sampler: loading a checked pipeline, and choosing attention kernels and batch size by device."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle CPU threads sleep: a shared machine stays usable
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the same sums on every run, also with two streams

import diffusers
import torch
import transformers

from utils.cli import UserError
from utils.generation.diffusion import Sampler, spans
from utils.generation.pipeline import PipelineFolder
from utils.generation.recipe import Recipe
from utils.machine import is_out_of_memory, memory_format, resolve_device, resolve_dtype

DTYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
CPU_LATENTS = 6400  # batch x latent area on a CPU: 100 images of 8x8 latents, 1 of 64x64; larger gained nothing
MOST_IMAGES_A_BATCH = 64  # CUDA: more images gain nothing and lose more to a kill
FILLED = 0.8  # CUDA: share of its memory that a batch may take; decoding beside the next batch needs some
HEAD_SIZES = (40, 64, 80, 160, 512)  # of attention: the UNets of SD 1.x (40, 80, 160) and 2.x (64), and their VAE (512)
WORTHWHILE = 1.03  # CUDA: a doubled batch must draw this many times faster to be taken


def load_sampler(folder: PipelineFolder, recipe: Recipe, device: torch.device) -> Sampler:
    """Load FOLDER for drawing by RECIPE, settled with the model and DEVICE.

    UserError if its weights do not fit its settings or the recipe's attention cannot run here.
    """
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    dtype = resolve_dtype(recipe.dtype or "auto", device)
    without_checker = {} if recipe.safety != "off" else {"safety_checker": None, "feature_extractor": None}
    try:
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
            folder.path, dtype=dtype, local_files_only=True, requires_safety_checker=False, **without_checker
        )
    except Exception as error:  # each library raises its own kinds for the same trouble
        raise UserError(
            f"--model {folder.name} cannot be loaded: {str(error).splitlines()[0]}; copy or download it again"
        ) from error
    pipeline.to(device)
    for part in (pipeline.unet, pipeline.vae):
        part.to(memory_format=memory_format(device, dtype))
    if recipe.attention == "xformers":
        use_xformers(pipeline, device)
    if recipe.compile:
        pipeline.unet.compile(dynamic=False)  # Sampler gives it one batch size
    return Sampler(pipeline, recipe, device, dtype, recipe.batch_size or 1, compiled=recipe.compile)


# ===== choices by device =====


def resolve_attention(name: str, device: torch.device, dtype: torch.dtype = torch.float16) -> str:
    """`auto` is xformers on CUDA where its operators run, else torch's scaled_dot_product_attention."""
    if name == "sdpa":
        return name
    fault = xformers_fault(device, dtype)
    if name == "xformers" and fault:
        raise UserError(f"--attention xformers: {fault}; use --attention sdpa or auto")
    return "sdpa" if fault else "xformers"


def xformers_fault(device: torch.device, dtype: torch.dtype) -> str:
    """Why xformers cannot be used on DEVICE, "" if it can: its import tells nothing of the GPUs it was built for."""
    if device.type != "cuda":
        return f"xformers has no {device.type} code"
    try:
        from xformers.ops import memory_efficient_attention

        # diffusers asks for float32 before it takes xformers, whatever the models' own number format is.
        for kind, size in [(torch.float32, HEAD_SIZES[0]), *((dtype, size) for size in HEAD_SIZES)]:
            query = torch.zeros(1, 8, 1, size, dtype=kind, device=device)  # (images, tokens, heads, head size)
            memory_efficient_attention(query, query, query).cpu()  # waits: a kernel may fail late
    except Exception as error:  # built for another torch, CUDA or GPU: it fails in many ways
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"xformers cannot be used on {device} ({reason})"
    return ""


def use_xformers(pipeline, device: torch.device) -> None:
    try:
        pipeline.enable_xformers_memory_efficient_attention()
    except Exception as error:
        raise UserError(
            f"--attention xformers fails on {device} ({str(error).splitlines()[0]}); use --attention sdpa"
        ) from error


def choose_batch_size(sampler: Sampler) -> int:
    """Images a batch when the user leaves it to us: by size on a CPU, by trial on a GPU. Recorded, then kept.

    On a GPU the batch doubles as long as it fits and draws at least WORTHWHILE times faster.
    """
    area = (sampler.height // sampler.factor) * (sampler.width // sampler.factor)
    if sampler.device.type != "cuda":
        return max(1, min(CPU_LATENTS // area, 100))
    best, best_rate, size = 1, 0.0, 1
    total = torch.cuda.get_device_properties(sampler.device).total_memory
    while size <= MOST_IMAGES_A_BATCH:
        try:
            rate = size / seconds_of_a_step(sampler, size)[0]
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            torch.cuda.empty_cache()
            break
        if rate < WORTHWHILE * best_rate or torch.cuda.max_memory_reserved(sampler.device) > FILLED * total:
            break
        best, best_rate, size = size, rate, size * 2
    return best


def measured_rate(folder: PipelineFolder, recipe: Recipe, device_name: str) -> tuple[float, str, str]:
    """(images/s, "GPU" or "CPU", how) of FOLDER on a device here: one step and one decode are timed, then reckoned.

    torch.compile is left out: it would take minutes.
    """
    device = resolve_device(device_name)
    recipe = replace(recipe.with_device(device), safety="off", compile=False)
    sampler = load_sampler(folder, recipe, device)
    size = recipe.batch_size or choose_batch_size(sampler)
    guided, decode = seconds_of_a_step(sampler, size)
    seconds = guided * sampler.forwards_per_image / 2 + decode
    how = f"measured here, {recipe.dtype} in batches of {size}, from one step and one decode"
    return size / seconds, "CPU" if device.type == "cpu" else "GPU", how


@torch.inference_mode()
def seconds_of_a_step(sampler: Sampler, size: int) -> tuple[float, float]:
    """Seconds of one guided UNet forward and of one decode of SIZE images, each after one that warms up."""
    latents = sampler.initial_latents(range(size)).to(sampler.device)
    scaled = torch.cat([latents, latents]).to(sampler.dtype, memory_format=sampler.layout)
    text = sampler.embedding("").expand(2 * size, -1, -1)
    step = sampler.scheduler.timesteps[0].to(sampler.device)

    def forward() -> None:
        # forward(): never the compiled UNet, which would be compiled for every size that is tried.
        sampler.unet.forward(scaled, step, encoder_hidden_states=text, return_dict=False)

    def decode() -> None:
        for start, end in spans(size, sampler.decoding.size):
            sampler._decode(latents[start:end])

    return _seconds(forward, sampler.device), _seconds(decode, sampler.device)


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    """Of WORK, the second time."""
    for _ in range(2):
        _wait(device)
        started = time.perf_counter()
        work()
        _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
