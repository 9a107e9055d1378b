"""The checks of `make gpu-check` that draw: the card, attention, the embedded model, Stable Diffusion 1.4's shape.

A check is a function of the device. Those that know no other limit than "the CPU's own result" run on a CPU too.
"""

from __future__ import annotations

import hashlib
import math
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks import bench_generate
from benchmarks.figures import ROOT, SPEED, Figure, at_least, at_most, equal, psnr, quiet, sha256, told
from tests.tiny_sd import build_tiny_sd
from utils.generation import loading
from utils.generation.diffusion import Sampler
from utils.generation.pipeline import find_pipeline
from utils.generation.recipe import SCHEDULERS, Recipe
from utils.machine import OLDEST_DRIVER, OUT_OF_MEMORY, gpus, resolve_dtype

MODEL = ROOT / "models" / "fashion-sd"
TEXTS = ("boot", "coat, overgarment", "sandal", "dress")
CLASSES = "n01440764,n01558993,n01692333,n01729977,n01735189"
# sha256 of the float32 latents of seeds 0 to 7, (8, 4, 8, 8): they are drawn on the CPU, the same everywhere.
LATENTS = "6fde3692fd6a6e4d0b66709a7a36d8575d608e40eff9b4ca3a679a6dba56d10c"
STEPS = 2  # of drawing at full size: PNDM evaluates the UNet three times, and every step costs the same
CAPPED_IMAGES = 256  # drawn together under a memory cap: enough for the cap to be felt


def sampler_on(device: torch.device, dtype: str = "fp32", scheduler: str = "pndm", batch_size: int = 4) -> Sampler:
    """The embedded model, ready to draw in ten steps."""
    folder = find_pipeline(str(MODEL), None)
    recipe = Recipe(scheduler=scheduler, steps=10, dtype=dtype, batch_size=batch_size, safety="off").with_model(folder)
    return loading.load_sampler(folder, recipe.with_device(device), device)


def images_of(sampler: Sampler, count: int = len(TEXTS)):
    """(COUNT, H, W, 3) uint8: of TEXTS in turn."""
    texts = [TEXTS[number % len(TEXTS)] for number in range(count)]
    return sampler.decode(sampler.denoise(range(count), texts))[0]


def format_of(device: torch.device) -> str:
    """The number format to draw with."""
    return loading.DTYPE_NAMES[resolve_dtype("auto", device)]


# ===== the card =====


def card(device: torch.device) -> list[Figure]:
    """The card has kernels in this torch and room for the paper's settings; the driver is new enough."""
    if device.type != "cuda":
        return [told("device", str(device))]
    major, minor = torch.cuda.get_device_capability(device)
    built = [int(name[3:]) for name in torch.cuda.get_arch_list() if name.startswith("sm_") and name[3:].isdigit()]
    free, _ = torch.cuda.mem_get_info(device)
    driver = [int(part) for part in (gpus()["driver"] or "0.0").split(".")[:2]]
    return [
        told("card", torch.cuda.get_device_name(device)),
        at_least("compute capability", 10 * major + minor, min(built, default=0)),
        at_least("driver", driver[0] + driver[1] / 1000, OLDEST_DRIVER[0] + OLDEST_DRIVER[1] / 1000),
        at_least("free memory, GB", round(free / 2**30, 1), 6),
    ]


def attention(device: torch.device) -> list[Figure]:
    """torch's attention against softmax(Q K / sqrt d) V in float64, for each head size."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    figures = []
    for size in loading.HEADS:
        q, k, v = torch.randn(3, 1, 2, 256, size, generator=torch.Generator().manual_seed(size))
        weights = (q.double() @ k.double().mT / math.sqrt(size)).softmax(-1)
        ours = torch.nn.functional.scaled_dot_product_attention(*(x.to(device, dtype) for x in (q, k, v)))
        error = (ours.cpu().double() - weights @ v.double()).abs().max().item()
        figures.append(at_most(f"head size {size}, largest error", error, 2e-3))
    return figures


def attention_speed(device: torch.device) -> list[Figure]:
    """Milliseconds of each kernel and head size; what --attention auto takes is the fastest, but for noise."""
    table = loading.attention_ms(device, torch.float16)
    figures = [told(f"{kernel}, head size {size}, ms", ms) for kernel, row in table.items() for size, ms in row.items()]
    totals = {kernel: sum(row.values()) for kernel, row in table.items()}
    chosen = loading.resolve_attention("auto", device, torch.float16)
    return [*figures, at_most(f"{chosen}, ms against the fastest", totals[chosen] / min(totals.values()), 1.06)]


# ===== the embedded model =====


def latents(device: torch.device) -> list[Figure]:
    """The noise that images start from is the same on every machine."""
    return [equal("sha256 of eight seeds", sha256(sampler_on(device).initial_latents(range(8))), LATENTS)]


def pictures(device: torch.device) -> list[Figure]:
    """The embedded model's images against the CPU's in fp32, by every scheduler."""
    figures = []
    for scheduler in SCHEDULERS:
        wanted = images_of(sampler_on(torch.device("cpu"), scheduler=scheduler))
        for dtype, limit in {"fp32": 50, "fp16": 40}.items():
            if dtype == "fp32" or device.type == "cuda":
                found = psnr(images_of(sampler_on(device, dtype, scheduler)), wanted)
                figures.append(at_least(f"{scheduler}, {dtype}, dB to the CPU", found, limit))
    return figures


def repeated(device: torch.device) -> list[Figure]:
    """Drawn twice, beside the next batch's denoising or after it: the same bytes."""
    sampler = sampler_on(device, format_of(device))
    first = sha256(images_of(sampler))
    again = sha256(images_of(sampler))
    figures = [equal("again", again, first)]
    if sampler.side_stream is not None:
        clean = sampler.denoise(range(len(TEXTS)), TEXTS)
        ready = sampler.ready()
        sampler.denoise(range(len(TEXTS)), TEXTS)  # not waited for
        with sampler.beside(clean, ready):
            figures.append(equal("beside the next batch", sha256(sampler.decode(clean)[0]), first))
    return figures


def killed(device: torch.device) -> list[Figure]:
    """generate.py killed in mid-work and started again: the bytes of a run that was left in peace."""
    with tempfile.TemporaryDirectory() as folder:
        hashes = {}
        for name in ("peace", "killed"):
            out = Path(folder) / name
            command = [sys.executable, "generate.py", "--classes", CLASSES, "--model", str(MODEL), "--out", str(out)]
            command += ["--images-per-class", "8", "--steps", "4", "--batch-size", "2", "--device", str(device)]
            process = quiet(command)
            while name == "killed" and process.poll() is None and len(list(out.glob("train/*/*.jpg"))) < 8:
                time.sleep(0.02)
            if name == "killed":
                process.send_signal(signal.SIGKILL)
                process.wait()
                process = quiet(command)
            if process.wait():
                return [Figure("", name, f"exit code {process.returncode}", "0", False)]
            files = sorted(out.glob("train/*/*.jpg"))
            digest = hashlib.sha256(b"".join(file.read_bytes() for file in files))
            hashes[name] = f"{len(files)} images {digest.hexdigest()}"
        return [equal("40 images", hashes["killed"], hashes["peace"])]


def out_of_memory(device: torch.device) -> list[Figure]:
    """Every way in which a device says that its memory is full halves the batch, and the images are drawn."""
    sampler, figures = sampler_on(device), []
    wanted, forward, batch = images_of(sampler), sampler.unet.forward, sampler.denoising.size
    for message in OUT_OF_MEMORY:

        def full(x, *rest, message=message, **more):
            if len(x) > 4:  # two images, with and without their prompt
                raise RuntimeError(message)
            return forward(x, *rest, **more)

        sampler.unet.forward, sampler.denoising.size = full, batch
        figures.append(at_least(f"{message}: dB", psnr(images_of(sampler), wanted), 45))
        figures.append(at_most("images at a time", sampler.denoising.size, 2))
    return figures


def memory_cap(device: torch.device) -> list[Figure]:
    """With less memory than a batch needs, portions are halved and the images are drawn."""
    sampler = sampler_on(device, batch_size=CAPPED_IMAGES)
    sizes = sampler.denoising.size, sampler.decoding.size
    with capped(device, sampler, CAPPED_IMAGES) as wanted:
        found = images_of(sampler, CAPPED_IMAGES)
    halved = min(
        now / before for now, before in zip((sampler.denoising.size, sampler.decoding.size), sizes, strict=True)
    )
    return [at_most("portion of before", halved, 0.5), at_least("dB", psnr(found, wanted), 45)]


@contextmanager
def capped(device: torch.device, sampler: Sampler, count: int) -> Iterator:
    """Draw COUNT images freely and yield them; the block then has 60 % of what they took beside the weights."""
    torch.cuda.empty_cache()
    weights = torch.cuda.memory_reserved(device)
    wanted = images_of(sampler, count)
    most = torch.cuda.memory_reserved(device)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction((weights + 0.6 * (most - weights)) / total, device)
        yield wanted
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def other_gpu(device: torch.device) -> list[Figure]:
    """Work on the last GPU leaves the first alone."""
    if torch.cuda.device_count() < 2:
        return []
    program = "import torch; from benchmarks import checks_drawing as c; from utils.machine import resolve_device; "
    program += "c.images_of(c.sampler_on(resolve_device(f'cuda:{torch.cuda.device_count() - 1}'))); "
    program += "print(torch.cuda.memory_reserved(0))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return [at_most("bytes on GPU 0", float(done.stdout.split()[-1]), 0)]


def safety(device: torch.device) -> list[Figure]:
    """The safety checker flags the images that it flags on the CPU in fp32: about half of 64, a small random one."""
    pixels = torch.randint(0, 256, (64, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels = (pixels * torch.linspace(0.1, 1, 64).view(-1, 1, 1, 1)).to(torch.uint8)  # from dark to bright
    with tempfile.TemporaryDirectory() as folder:
        found = find_pipeline(str(build_tiny_sd(folder, with_safety_checker=True)))
        flags, border = [], None
        for where, dtype in ((torch.device("cpu"), "fp32"), (device, format_of(device))):
            recipe = Recipe(steps=1, dtype=dtype, batch_size=1, safety="keep").with_model(found).with_device(where)
            sampler = loading.load_sampler(found, recipe, where)
            border = concept_border(sampler, pixels) if border is None else border
            sampler.pipeline.safety_checker.concept_embeds_weights.data[0] = border
            flags.append("".join("01"[flag] for flag in sampler.flagged(pixels)))
    return [equal("flags", hex(int(flags[1], 2)), hex(int(flags[0], 2))), at_least("flagged", flags[0].count("1"), 1)]


@torch.inference_mode()
def concept_border(sampler: Sampler, pixels: torch.Tensor) -> float:
    """Where the cosines of PIXELS to the checker's first concept have their widest gap near the middle."""
    checker = sampler.pipeline.safety_checker
    inputs = sampler.pipeline.feature_extractor(list(pixels.numpy()), return_tensors="pt").pixel_values
    embedded = checker.visual_projection(checker.vision_model(inputs)[1])
    cosines = torch.nn.functional.cosine_similarity(embedded, checker.concept_embeds[:1]).sort().values
    middle = cosines[len(cosines) // 4 : -len(cosines) // 4]
    widest = middle.diff().argmax()
    return (middle[widest] + middle[widest + 1]).item() / 2


# ===== Stable Diffusion 1.4's shape =====


def engine_on(device: torch.device, **settings) -> bench_generate.Ours:
    """generate.py's engine on random weights of Stable Diffusion 1.4's shape; on a CPU a pipeline of 0.6 MB."""
    with tempfile.TemporaryDirectory() as folder:
        model = bench_generate.build_sd14(bench_generate.CACHE) if device.type == "cuda" else build_tiny_sd(folder)
        dtype = resolve_dtype("auto", device)
        return bench_generate.Ours(model, CLASSES.split(",")[0], STEPS, device, dtype, **settings)


def full_size(device: torch.device) -> list[Figure]:
    """Drawing to files reaches the rate of its bare networks, and its loop never waits for the device."""
    one = engine_on(device)
    batch = one.sampler.denoising.size
    ours, bare = bench_generate.in_turns(lambda: one.images_per_s(4 * batch), one.bare_images_per_s)
    kind = f"{format_of(device)}, {one.recipe.attention}, eager, batch {batch}"
    return [
        at_least("images/s of the bare UNet and VAE", ours / bare, 0.9),
        told(f"{SPEED}generation, {STEPS} steps, {kind}", ours),
        at_most("waits in the denoising loop", waits_in_loop(one.sampler), 0),
    ]


def waits_in_loop(sampler: Sampler) -> int:
    """How often denoising waits for the device after its first step, by torch's own warnings."""
    first: list[int] = []
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            sampler.denoise([0], ["a"], lambda *_: first.append(len(seen)))
            last = len(seen)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing" in str(warning.message) for warning in seen[first[0] : last])


def compiled(device: torch.device) -> list[Figure]:
    """--compile: one graph, the noise that eager code predicts, and at least 1.15 times its rate."""
    from torch._dynamo.utils import counters

    counters.clear()
    eager, fast = engine_on(device), engine_on(device, compile=True)
    batch = eager.sampler.denoising.size
    wanted, found = noise_of(eager.sampler, batch), noise_of(fast.sampler, batch)
    rates = bench_generate.in_turns(lambda: fast.images_per_s(2 * batch), lambda: eager.images_per_s(2 * batch))
    kind = f"{format_of(device)}, {fast.recipe.attention}, compiled, batch {batch}"
    return [
        at_least("rate against eager", rates[0] / rates[1], 1.15),
        told(f"{SPEED}generation, {STEPS} steps, {kind}", rates[0]),
        equal("graphs", str(counters["stats"]["unique_graphs"]), "1"),
        at_most("graph breaks", sum(counters["graph_break"].values()), 0),
        at_least("noise to eager's, dB", psnr(found, wanted, wanted.square().mean().sqrt().item()), 40),
    ]


@torch.inference_mode()
def noise_of(sampler: Sampler, images: int) -> torch.Tensor:
    """What the UNet says of IMAGES at the first step, float32 on the CPU: random weights hardly change the images."""
    latents = sampler.initial_latents(range(images)).to(sampler.device)
    rows = torch.cat([latents, latents]).to(sampler.dtype, memory_format=sampler.layout)
    text, at = sampler.embedding("a").expand(2 * images, -1, -1), sampler.scheduler.timesteps[0].to(sampler.device)
    return sampler.unet(rows, at, encoder_hidden_states=text, return_dict=False)[0].float().cpu()


def batch_size(device: torch.device) -> list[Figure]:
    """The batch size chosen three times is one, fits at once, and leaves a tenth of the memory."""
    one = engine_on(device)
    sizes = [loading.choose_batch_size(one.sampler) for _ in range(3)]
    one.images_per_s(2 * sizes[0])
    return [
        equal("three choices", str(sizes), str([sizes[0]] * 3)),
        equal("drawn at a time", str(one.sampler.denoising.size), str(sizes[0])),
        at_most("memory in use", memory_share(device), 0.9),
    ]


def memory_share(device: torch.device) -> float:
    """Of the device's memory what is taken, at its peak: torch keeps what it once reserved."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return 1 - free / total
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / total


# Each with the seconds it may take on a GPU.
BUDGETS = {card: 1, attention: 5, attention_speed: 8, latents: 3, pictures: 30, repeated: 8, killed: 40,
           out_of_memory: 15, memory_cap: 10, other_gpu: 15, safety: 5, full_size: 80, compiled: 110,
           batch_size: 20}  # fmt: skip
GPU_ONLY = (attention_speed, memory_cap, full_size, compiled)
