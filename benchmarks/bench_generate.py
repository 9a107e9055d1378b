"""Speed of generate.py: against the script that users write, against the bare sum of its networks, and its growth.

The full-size rows need no download: Stable Diffusion 1.4's architecture is built here with random weights (4.3 GB, kept
in ~/.cache/imagenet-sd). Speed does not depend on what the weights are.
"""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as generate.py

import torch

from benchmarks.bounds import bound, profile_if_asked
from generate import draw
from tests.tiny_sd import build_tiny_sd, byte_tokenizer
from utils.classes import ClassRow, ClassTable, load_classes
from utils.dataset import folder as datasets
from utils.generation import loading
from utils.generation.drawing import Session
from utils.generation.pipeline import find_pipeline
from utils.generation.prompts import class_prompts, parse_template
from utils.generation.recipe import Recipe
from utils.machine import resolve_device, resolve_dtype
from utils.storage import read_jsonl

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "imagenet-sd" / "sd14-random"
FULL_STEPS = 2  # PNDM evaluates the UNet 3 times: enough, as every step costs the same
ROUNDS = 3  # of ours and the peer in turn; medians are compared
DEMO_IMAGES, DEMO_PEER_IMAGES = 2000, 20  # the peer's part is drawn in each of its ROUNDS
TEMPLATE = "c, d_c"
PAPER_FORWARDS = 2 * 51  # PNDM, 50 steps, with guidance


# ===== full size =====


def generate_vs_plain() -> dict:
    model = build_sd14(CACHE)
    device, dtype = choose_number_format()
    ours_one = Ours(model, "n02774152", FULL_STEPS, device, dtype)
    plain_one = Plain(model, FULL_STEPS, device, torch.float32)
    ours, plain = in_turns(lambda: ours_one.images_per_s(1), lambda: plain_one.images_per_s(1))
    forwards, decode = ours_one.sampler.forwards_per_image, ours_one.decode_seconds()
    unet = max(1 / ours - decode, 0) / forwards
    whole = PAPER_FORWARDS * unet + decode
    return {
        "row": "generate_vs_plain",
        "ours": ours,
        "peer": plain,
        "unit": "img/s",
        "ratio": ours / plain,
        "target": 4.2,
        **ours_one.bound(),
        "what": "Stable Diffusion 1.4's architecture, random weights, 512 px, PNDM with 2 steps (6 UNet forwards an "
        "image): generate.py's drawing against StableDiffusionPipeline in fp32, one prompt a call, saved as PNG. "
        "Loading excluded.",
        "notes": [
            f"ours ran in {name_of(dtype)} on {device}; the peer in float32",
            "the target presumes a device with 16-bit matrix units (a GPU, or a CPU with AMX), where these networks' "
            "arithmetic is 4 times as fast or more than in fp32; see the bound's two rates for what it is here",
            f"at the paper's 50 steps this machine would take about {whole / 60:.1f} minutes an image",
        ],
    }


def generate_vs_bound() -> dict:
    model = build_sd14(CACHE)
    device, dtype = choose_number_format()
    one = Ours(model, "n02774152", FULL_STEPS, device, dtype)
    ours, bare = in_turns(lambda: one.images_per_s(1), lambda: one.bare_images_per_s())
    return {
        "row": "generate_vs_bound",
        "ours": ours,
        "peer": bare,
        "unit": "img/s",
        "ratio": ours / bare,
        "target": 0.95,
        **one.bound(),
        "what": "The same drawing against nothing but its UNet forwards and VAE decodes, same format, same batch.",
        "notes": [f"{name_of(dtype)} on {device}, batch {one.sampler.denoising.size}"],
    }


# ===== the demo's model =====


def demo_vs_plain() -> dict:
    model = ROOT / "models" / "fashion-sd"
    device, dtype = choose_number_format()
    one = Ours(model, "fashion", 50, device, dtype)
    profile_if_asked(lambda: one.images_per_s(DEMO_PEER_IMAGES))
    plain_one = Plain(model, 50, device, dtype)
    plain = [plain_one.images_per_s(DEMO_PEER_IMAGES)]
    ours = one.images_per_s(DEMO_IMAGES // 10)
    plain += [plain_one.images_per_s(DEMO_PEER_IMAGES) for _ in range(ROUNDS - 1)]
    return {
        "row": "demo_vs_plain",
        "ours": ours,
        "peer": statistics.median(plain),
        "unit": "img/s",
        "ratio": ours / statistics.median(plain),
        "target": 5,
        **one.bound(),
        "what": f"models/fashion-sd, recipe paper ({PAPER_FORWARDS} UNet forwards an image): {DEMO_IMAGES} images by "
        "generate.py against one prompt a call, same format.",
        "notes": [
            f"{name_of(dtype)} on {device}, batch {one.sampler.denoising.size}; "
            f"the peer drew {DEMO_PEER_IMAGES} images before ours and {DEMO_PEER_IMAGES * (ROUNDS - 1)} after"
        ],
    }


# ===== growth =====


def generate_scaling() -> dict:
    """Peak memory and seconds an image at 10^2, 10^3 and 10^4 prompts, each a process of its own."""
    peaks, costs = {}, {}
    with tempfile.TemporaryDirectory() as work:
        tiny = build_tiny_sd(Path(work) / "tiny")
        for images in (100, 1000, 10_000):
            options = ["--classes", "fashion", "--model", str(tiny), "--images-per-class", str(images // 10)]
            options += ["--prompt", "c, h_c inside b", "--steps", "1", "--out", f"{work}/{images}"]
            seconds, peaks[images] = measure([*options, "--batch-size", "10"])
            session = read_jsonl(Path(work) / str(images) / "sessions.jsonl")[0]
            costs[images] = session["seconds"] / images
            print(f"{images} prompts: {peaks[images]:.0f} MB, {seconds:.1f} s with start-up", file=sys.stderr)
        looks = {option: measure([option])[0] for option in ("--help", "--dry-run")}
        fake_dataset(Path(work) / "fake", classes=100, images=1000)
        looks["--status on 100,000 images"] = measure(["--out", f"{work}/fake", "--status"])[0]
    return {
        "row": "generate_scaling",
        "ours": peaks[10_000],
        "peer": peaks[100],
        "unit": "MB",
        "ratio": peaks[10_000] / peaks[100],
        "target": 1.05,
        "lower_is_better": True,
        "bound": peaks[100],
        "bound_is": "memory that does not grow with the number of prompts",
        "what": "Peak memory of generate.py at 10,000 prompts with a scene each (ours) and at 100 (peer); a random "
        "pipeline of 0.6 MB.",
        "notes": [
            "milliseconds an image: " + ", ".join(f"{cost * 1000:.1f} at {n:,}" for n, cost in costs.items()),
            "start to end: " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in looks.items()),
        ],
    }


def measure(options: list[str]) -> tuple[float, float]:
    """(seconds, peak megabytes) of a generate.py process."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, ROOT / "generate.py", *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"generate.py {' '.join(options)} ended with {process.returncode}")
    return time.perf_counter() - started, usage.ru_maxrss / 1024


def fake_dataset(root: Path, classes: int, images: int) -> None:
    """A complete dataset of one-byte images."""
    table = ClassTable("fake", tuple(ClassRow(f"n{k:08d}", "c", "", "d") for k in range(classes)))
    for folder in new_dataset(root, table, Recipe(batch_size=images), images).folders:
        folder.prepare()
        entries = []
        for index in range(images):
            folder.path(index).write_bytes(b"x")
            entry = {"id": folder.id, "index": index, "prompt": "robin, large American thrush", "seed": 2**62 + index}
            entries.append(entry | {"attempt": 0, "rejected": [], "safety": None, "bytes": 1, "sha256": "0" * 64})
        folder.commit(entries)


def new_dataset(root: Path, table: ClassTable, recipe: Recipe, images: int) -> datasets.Dataset:
    """An empty one of IMAGES a class."""
    rows = [
        {"id": r.wnid, "name": r.name, "hypernym": r.hypernym, "definition": r.definition, "images": images}
        for r in table.rows
    ]
    recipe = replace(recipe, classes=table.sha256, images_per_class=images)
    model = {"id": "models/bench", "revision": None, "files": {}}
    info = {"name": "bench", "recipe": recipe.record(), "model": model, "classes": rows, "environment": {}}
    return datasets.create_dataset(root, info | {"command": "bench.py"})


# ===== ours and the peer =====


class Ours:
    """generate.py's engine, loaded once; every measurement draws a new dataset into a temporary folder."""

    def __init__(
        self, model: Path, classes: str, steps: int, device: torch.device, dtype: torch.dtype, **settings: Any
    ):
        folder = find_pipeline(str(model))
        recipe = Recipe(steps=steps, dtype=loading.DTYPE_NAMES[dtype], safety="off", **settings)
        recipe = recipe.with_model(folder).with_device(device)
        self.sampler = loading.load_sampler(folder, recipe, device)
        self.sampler.denoising.size = recipe.batch_size or loading.choose_batch_size(self.sampler)
        self.recipe = replace(recipe, batch_size=self.sampler.denoising.size)
        self.table, self.template = load_classes(classes), parse_template(TEMPLATE)

    def images_per_s(self, images_a_class: int) -> float:
        with tempfile.TemporaryDirectory() as work:
            dataset = new_dataset(Path(work) / "bench", self.table, self.recipe, images_a_class)
            session = Session(dataset, dataset.folders, self.recipe, self.sampler.device)
            batches = session.open_batches(self.table, self.template)
            for batch, entries in draw(batches, self.recipe, self.sampler, session.bar):
                session.commit(batch, entries)
            return session.summary(self.sampler, None)["images_per_s"]

    def warm_up(self) -> None:
        """One evaluation and one decode of a batch: what is allocated, chosen or compiled at first is so."""
        recipe, guided = self.sampler.recipe, self.sampler.guided
        self.sampler.recipe, self.sampler.guided = replace(recipe, steps=1), guided[:1]
        count = self.recipe.batch_size
        self.sampler.decode(self.sampler.denoise(range(count), ["a"] * count))
        self.sampler.recipe, self.sampler.guided = recipe, guided

    @torch.inference_mode()
    def bare_images_per_s(self) -> float:
        """The networks alone, fed with noise: no scheduler, text, files."""
        sampler, batch = self.sampler, self.sampler.denoising.size
        latents = sampler.initial_latents(range(batch)).to(sampler.device, sampler.dtype)
        latents = latents.to(memory_format=sampler.layout)
        text = sampler.embedding("").expand(2 * batch, -1, -1)
        started = time.perf_counter()
        for _ in sampler.guided:
            sampler.unet(torch.cat([latents, latents]), 500, encoder_hidden_states=text, return_dict=False)
        for part in latents.split(sampler.decoding.size):
            sampler.vae.decode(part, return_dict=False)
        synchronize(sampler.device)
        return batch / (time.perf_counter() - started)

    def bound(self) -> dict:
        """The arithmetic of the networks alone, see bounds.py."""
        return bound(loading.flops_per_image(self.sampler) or math.nan, self.sampler.device)

    def decode_seconds(self) -> float:
        latents = self.sampler.initial_latents([0]).to(self.sampler.device)
        started = time.perf_counter()
        self.sampler.decode(latents)
        return time.perf_counter() - started


class Plain:
    """The script that users write: from_pretrained, one prompt a call, image.save("x.png")."""

    def __init__(self, model: Path, steps: int, device: torch.device, dtype: torch.dtype):
        from diffusers import StableDiffusionPipeline

        self.pipeline = StableDiffusionPipeline.from_pretrained(model, dtype=dtype, safety_checker=None).to(device)
        self.pipeline.set_progress_bar_config(disable=True)
        self.steps = steps
        rows, template = load_classes("fashion").rows, parse_template(TEMPLATE)
        self.prompts = [prompt for row in rows for prompt in class_prompts(row, template, [0])]

    def images_per_s(self, images: int) -> float:
        with tempfile.TemporaryDirectory() as work:
            started = time.perf_counter()
            for number in range(images):
                prompt = self.prompts[number % len(self.prompts)]
                generator = torch.Generator().manual_seed(prompt.seed)
                image = self.pipeline(
                    prompt.text, num_inference_steps=self.steps, guidance_scale=2.0, generator=generator
                ).images[0]
                image.save(f"{work}/{number}.png")
            return images / (time.perf_counter() - started)


def in_turns(ours: Callable[[], float], peer: Callable[[], float]) -> tuple[float, float]:
    """Median images/s of both over ROUNDS, after one warm-up each."""
    profile_if_asked(ours)
    rates: dict[Callable, list[float]] = {ours: [], peer: []}
    for number in range(ROUNDS + 1):
        for function in (ours, peer):
            rate = function()
            if number:
                rates[function].append(rate)
    return statistics.median(rates[ours]), statistics.median(rates[peer])


def choose_number_format() -> tuple[torch.device, torch.dtype]:
    device = resolve_device("auto")
    return device, resolve_dtype("auto", device)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def build_sd14(folder: Path) -> Path:
    """Stable Diffusion 1.4's networks (settings as in its repository) with random weights; built once."""
    if (folder / "model_index.json").exists():
        return folder
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            max_position_embeddings=77,
            projection_dim=768,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    vae = AutoencoderKL(
        sample_size=512,
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
    )
    unet = UNet2DConditionModel(
        sample_size=64, cross_attention_dim=768, attention_head_dim=8, block_out_channels=(320, 640, 1280, 1280)
    )
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        set_alpha_to_one=False,
        skip_prk_steps=True,
        steps_offset=1,
    )
    parts = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer, "unet": unet, "scheduler": scheduler}
    pipeline = StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    fresh = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    pipeline.save_pretrained(fresh, safe_serialization=True)
    fresh.rename(folder)
    return folder


ROWS = {
    "generate_vs_plain": generate_vs_plain,
    "generate_vs_bound": generate_vs_bound,
    "demo_vs_plain": demo_vs_plain,
    "generate_scaling": generate_scaling,
}
