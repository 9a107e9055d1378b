"""The checks of `make gpu-check` that train and judge: a step, a run, several processes, features, the node.

A check is a function of the device. Those that know no other limit than "the CPU's own result" run on a CPU too.
"""

from __future__ import annotations

import fcntl
import math
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cosine_similarity, cross_entropy

import train
from benchmarks.bench_train import augment_share, write_images
from benchmarks.figures import ROOT, SPEED, Figure, at_least, at_most, equal, quiet, told
from utils.evaluation.checkpoints import Transform
from utils.evaluation.features import Extractor
from utils.machine import resolve_dtype
from utils.model import build_model, sync_batchnorm
from utils.storage import read_jsonl
from utils.training.augment import augment, random_draws
from utils.training.run_log import LOG

HALF_STEPS = {"cuda": 200, "cpu": 40}  # of training in 16 bits and in 32
LAST = 20  # of them are compared
STEPS = {"cuda": 60, "cpu": 12}  # of a whole run
RESUMED_IMAGES = {"cuda": 640, "cpu": 256}  # for 40 and 16 steps, of which a signal comes at the first
DISTINCT = 64  # JPEGs: the others are further names of theirs
SCALING = {2: 0.85, 8: 0.75}  # processes, and the share of their joined rate that is to be reached


# ===== a step =====


def augmentation(device: torch.device) -> list[Figure]:
    """Colour, blur and the rest of training's augmentation against the CPU, in parts of the 0..255 range."""
    images = torch.randint(0, 256, (32, 3, 96, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    recipe = train.PAPER | {"local_solarize": 0.2}
    draws = random_draws(recipe, 1, 0, np.zeros(32, np.int64), np.arange(32), 1)
    error = (augment(images.to(device), draws).cpu() - augment(images, draws)).abs().max().item()
    return [at_most("largest difference", error * 0.229, 1 / 255 + 1e-3)]  # 0.229: ImageNet's deviation of red


def augmentation_share(device: torch.device) -> list[Figure]:
    """What augmentation takes of ResNet50's training step."""
    return [at_most("percent of a step", augment_share()["ours"], 10)]


def training_step(device: torch.device) -> list[Figure]:
    """Loss and gradients of a small ResNet in fp32 against the CPU's."""
    results = []
    for where in (torch.device("cpu"), device):
        torch.manual_seed(0)
        model = build_model("resnet10", 10).to(where)
        pixels, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
        loss = cross_entropy(model(pixels.to(where)), labels.to(where))
        loss.backward()
        gradient = torch.cat([parameter.grad.flatten().cpu() for parameter in model.parameters()])
        results.append((loss.item(), gradient))
    (loss, wanted), (found, gradient) = results
    distance = ((gradient - wanted).norm() / wanted.norm()).item()
    return [at_most("loss", abs(found - loss), 1e-4), at_most("gradient, relative", distance, 1e-3)]


def half_precision(device: torch.device) -> list[Figure]:
    """Steps of train.py in 16 bits (fp16 with its gradient scaler; on a CPU bf16) end at the loss of fp32."""
    sixteen = "fp16" if device.type == "cuda" else "bf16"
    losses = {dtype: statistics.mean(losses_of(device, dtype)[-LAST:]) for dtype in ("fp32", sixteen)}
    return [
        told(f"loss after {HALF_STEPS[device.type]} steps, fp32", losses["fp32"]),
        at_most(f"{sixteen}, further from it", abs(losses[sixteen] - losses["fp32"]), 0.1),
    ]


def losses_of(device: torch.device, dtype: str) -> list[float]:
    """Of every step of the demo's recipe on patterns in noise, one a class."""
    steps, classes = HALF_STEPS[device.type], 10
    args = train.get_args_parser().parse_args(["--data", "", "--recipe", "demo", "--epochs", "1", "--dtype", dtype])
    recipe = train.make_recipe(args)
    size = recipe["batch_size"]
    training = train.make_training(args, recipe, device, classes, images=steps * size)
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(64, 192, (classes, 1, 32, 32, 3), generator=generator)
    losses = []
    for step in range(steps):
        labels = torch.randint(0, classes, (size,), generator=generator)
        noise = torch.randint(-64, 64, (size, 1, 32, 32, 3), generator=generator)
        batch = {"crops": [(patterns[labels] + noise).to(torch.uint8)], "labels": labels, "bad": []}
        batch |= {"samples": np.arange(size) + step * size, "passes": np.zeros(size, np.int64)}
        train.train_step(training, iter([batch]), nullcontext(), 0)
        losses.append(training.interval["loss"] / training.interval["seen"])
        training.interval.clear()
    return losses


# ===== a run =====


def run_command(data: Path, out: Path, device: torch.device, *options: str) -> list[str]:
    """train.py on DATA: the paper's recipe on a GPU, the demo's on a CPU."""
    recipe = "paper" if device.type == "cuda" else "demo"
    command = [sys.executable, "train.py", "--recipe", recipe, "--data", str(data), "--out", str(out), "--name", "x"]
    return [*command, "--device", device.type, *options]


def many_images(folder: Path, count: int, side: int) -> None:
    """COUNT JPEGs of SIDE pixels in 10 classes under names of their own, DISTINCT of them on the disk."""
    write_images(folder, min(count, DISTINCT), classes=10, side=side)
    for index in range(DISTINCT, count):
        first = index % DISTINCT
        source = folder / f"n{first % 10:08d}" / f"n{first % 10:08d}_{first:06d}.jpg"
        os.link(source, source.with_name(f"{source.parent.name}_{index:06d}.jpg"))


def resumed(device: torch.device) -> list[Figure]:
    """train.py stopped by SIGUSR2 saves, and goes on to the step and, on a CPU, the weights of a run left in peace."""
    with tempfile.TemporaryDirectory() as folder:
        many_images(Path(folder) / "images", RESUMED_IMAGES[device.type], side=32)
        ends, weights = {}, {}
        for name in ("peace", "stopped"):
            out = Path(folder) / name
            command = run_command(Path(folder) / "images", out, device, "--recipe", "demo", "--epochs", "4")
            command += ["--log-every", "1", "--set", "warmup_epochs=1"]
            process = quiet(command)
            log = out / LOG
            while name == "stopped" and process.poll() is None and not (log.exists() and log.stat().st_size):
                time.sleep(0.02)
            if name == "stopped":
                process.send_signal(signal.SIGUSR2)
                if process.wait() == 128 + signal.SIGUSR2:
                    process = quiet(command)
            if process.wait():
                return [Figure("", name, f"exit code {process.returncode}", "0", False)]
            lines = read_jsonl(log)
            ends[name] = f"step {max(line.get('step', 0) for line in lines)} of epoch {lines[-1].get('epoch')}"
            state = torch.load(out / "x.pth", map_location="cpu", weights_only=True)
            weights[name] = torch.cat([value.double().flatten() for value in state.values()])
    distance = ((weights["stopped"] - weights["peace"]).norm() / weights["peace"].norm()).item()
    figures = [equal("end", ends["stopped"], ends["peace"])]
    return figures + ([at_most("weights, relative", distance, 0)] if device.type == "cpu" else [])


def kept_busy(device: torch.device) -> list[Figure]:
    """A run of train.py waits little for its images, and the GPU is at work."""
    on_gpu, steps = device.type == "cuda", STEPS[device.type]
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder) / "images", Path(folder) / "run"
        many_images(data, steps * (256 if on_gpu else 64), side=512 if on_gpu else 32)
        command = run_command(data, out, device, "--epochs", "1", "--set", "warmup_epochs=0")
        process = quiet([*command, "--log-every", str(max(1, steps // 12))])
        used, lines = [], 0
        while process.poll() is None:
            lines = len((out / LOG).read_text().splitlines()) if (out / LOG).exists() else 0
            if 1 <= lines <= 11:  # after the start, before the end
                used.append(utilization())
            time.sleep(0.3)
        if process.returncode:
            return [Figure("", "train.py", f"exit code {process.returncode}", "0", False)]
        logged = [line for line in read_jsonl(out / LOG) if line["kind"] == "train"][1:]
    return busy_figures(logged, used)


def busy_figures(logged: Sequence[dict], used: Sequence[float]) -> list[Figure]:
    """Of the LOGGED intervals of a run, and of the GPU's utilisation meanwhile, in percent."""
    return [
        told(f"{SPEED}training, paper, loaders included", statistics.median(line["images_per_s"] for line in logged)),
        at_most("data wait, % of a step", 100 * statistics.median(line["data_wait"] for line in logged), 5),
        at_least("utilisation, %", statistics.median(used) if used else math.nan, 90),
    ]


def utilization() -> float:
    """Of the first GPU, in percent, as nvidia-smi tells it; not a number without it."""
    query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--id=0"]
    try:
        return float(subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return math.nan


# ===== several processes =====


def rank_environment(rank: int, world: int, port: int) -> dict[str, str]:
    """The variables by which process RANK of WORLD finds the others."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    return os.environ | {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_ranks(command: Sequence[str], world: int) -> list[subprocess.Popen]:
    """COMMAND as WORLD processes of one job, their output to be read."""
    port = free_port()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return [
        subprocess.Popen(command, cwd=ROOT, env=rank_environment(rank, world, port), **pipes) for rank in range(world)
    ]


def processes_of(device: torch.device) -> int:
    """How many the checks of several start: one a GPU; two on a CPU."""
    return torch.cuda.device_count() if device.type == "cuda" else 2


def joined_batch_norm(device: torch.device) -> list[Figure]:
    """Batch norm over processes against batch norm of the joined batch: outputs and gradients."""
    world = processes_of(device)
    if world < 2:
        return []
    program = f"from benchmarks import checks_training as c; c.compare_batch_norm({device.type!r})"
    outputs = [process.communicate()[0] for process in start_ranks([sys.executable, "-c", program], world)]
    errors = [re.findall(r"^batch norm (\S+) (\S+)$", output, re.M) for output in outputs]
    worst = [float(np.max([float(found[0][part]) if found else math.nan for found in errors])) for part in (0, 1)]
    return [at_most("outputs, relative", worst[0], 1e-4), at_most("gradients, relative", worst[1], 1e-4)]


def compare_batch_norm(kind: str) -> None:
    """One process of joined_batch_norm: prints how far its share is from the joined batch's."""
    from utils.training.distributed import device_name, process_group

    device = torch.device(device_name(kind))
    with process_group(device) as me:
        torch.manual_seed(0)
        joined, pull = torch.randn(2, 8 * me.world_size, 16, 7, 7).to(device)
        joined = joined * 3 + 5
        mine = slice(8 * me.rank, 8 * me.rank + 8)
        results = []
        for layer, part in ((torch.nn.BatchNorm2d(16), slice(None)), (sync_batchnorm(torch.nn.BatchNorm2d(16)), mine)):
            x = joined[part].clone().requires_grad_()
            y = layer.to(device).train()(x)
            (y * pull[part]).sum().backward()
            results.append((y.detach(), x.grad))
        (y, dx), (own_y, own_dx) = results
        errors = [((a - b[mine]).norm() / b[mine].norm()).item() for a, b in ((own_y, y), (own_dx, dx))]
    print("\nbatch norm", *errors, flush=True)


def scaling(device: torch.device) -> list[Figure]:
    """The rate of training with all GPUs against as many times that of one."""
    world = processes_of(device)
    if world < 2:
        return []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "images"
        many_images(data, 22 * 64 * world, side=512 if device.type == "cuda" else 32)
        rates = {}
        for count in (1, world):
            options = ["--batch-size", str(64 * count), "--batch-per-device", "64", "--dry-run"]
            outputs = [
                process.communicate()[0]
                for process in start_ranks(run_command(data, Path(folder) / "run", device, *options), count)
            ]
            rates[count] = float(re.findall(r"= (\S+) img/s", outputs[0])[0])
    return scaling_figures(rates)


def scaling_figures(rates: dict[int, float]) -> list[Figure]:
    """Of images/s by the number of processes: one, and all."""
    world = max(rates)
    limit = next((share for count, share in sorted(SCALING.items()) if count >= world), min(SCALING.values()))
    return [
        told(f"{SPEED}training, {world} processes", rates[world]),
        at_least(f"of {world} times one", rates[world] / (world * rates[1]), limit),
    ]


def stopped_together(device: torch.device) -> list[Figure]:
    """After SIGTERM all processes of a run leave, with the code that says so."""
    world = processes_of(device)
    if world < 2:
        return []
    with tempfile.TemporaryDirectory() as folder:
        many_images(Path(folder) / "images", 640, side=32)
        options = ["--recipe", "demo", "--epochs", "1000", "--log-every", "1", "--batch-size", str(16 * world)]
        processes = start_ranks(run_command(Path(folder) / "images", Path(folder) / "run", device, *options), world)
        log = Path(folder) / "run" / LOG
        while all(process.poll() is None for process in processes) and not (log.exists() and log.stat().st_size):
            time.sleep(0.05)
        started = time.monotonic()
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            process.communicate()
        seconds = time.monotonic() - started
        codes = {process.returncode for process in processes}
    return [at_most("seconds until all have left", seconds, 30), equal("exit codes", str(codes), str({143}))]


# ===== judging =====


def features(device: torch.device) -> list[Figure]:
    """ResNet50's features of evaluation in this device's number format against fp32 on the CPU; what they classify."""
    with tempfile.TemporaryDirectory() as folder:
        samples = judged_images(Path(folder))
        transform = Transform(64, 64, "bilinear")
        found = []
        dtype = resolve_dtype("auto", device)
        for where, format_ in ((torch.device("cpu"), torch.float32), (device, dtype)):
            torch.manual_seed(0)
            model = build_model("resnet50", 10).eval()
            model.fc = torch.nn.Identity()
            extractor = Extractor(model, "", where, format_, batch_size=50, workers=2)
            found.append(torch.from_numpy(extractor(samples, transform, None, "gpu-check")).float())
    wanted, ours = found
    labels = torch.tensor([label for _, label in samples])
    top1 = [nearest_mean_top1(values, labels) for values in found]
    return [
        at_least(f"cosine, {str(dtype)[6:]}", round(cosine_similarity(ours, wanted).min().item(), 6), 0.999),
        told("top-1 on the CPU, %", top1[0]),
        at_most("top-1, points apart", abs(top1[1] - top1[0]), 0.5),
    ]


def judged_images(folder: Path, count: int = 400) -> list[tuple[str, int]]:
    """COUNT JPEGs of 64 pixels in 10 classes, which differ in a faint pattern."""
    from PIL import Image

    rng = np.random.default_rng(0)
    patterns = rng.normal(size=(10, 8, 8, 3)).repeat(8, 1).repeat(8, 2)
    samples = []
    for index in range(count):
        pixels = 128 + 12 * patterns[index % 10] + rng.normal(scale=25, size=(8, 8, 3)).repeat(8, 0).repeat(8, 1)
        path = folder / f"{index:04d}.jpg"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=95)
        samples.append((str(path), index % 10))
    return samples


def nearest_mean_top1(values: torch.Tensor, labels: torch.Tensor) -> float:
    """Percent of the second half of VALUES that are nearest to their class's mean in the first half."""
    values = (values - values.mean(0)) / values.std(0).clamp_min(1e-6)
    half = len(values) // 2
    means = torch.stack([values[:half][labels[:half] == label].mean(0) for label in labels.unique()])
    return 100 * (torch.cdist(values[half:], means).argmin(1) == labels[half:]).float().mean().item()


# ===== the node =====


def node(device: torch.device) -> list[Figure]:
    """What a SLURM step is to have: the cores and GPUs it asked for, shared memory for loaders, locks that hold."""
    free = shutil.disk_usage("/dev/shm").free / 2**30
    figures = [at_least("free in /dev/shm, GB", round(free, 1), 0.05 if device.type == "cpu" else 4)]
    if asked := os.environ.get("SLURM_CPUS_PER_TASK"):
        figures.append(equal("cores", str(len(os.sched_getaffinity(0))), asked))
    if device.type == "cuda" and (asked := os.environ.get("SLURM_GPUS_ON_NODE")):
        figures.append(equal("GPUs", str(torch.cuda.device_count()), asked))
    runs = Path("runs")  # where results lie: the only folder that may be written in a container
    runs.mkdir(exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=runs) as file, open(file.name) as second:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = "no"
        except OSError:
            held = "yes"
    return [*figures, equal("a lock in runs/ holds", held, "yes")]


# Each with the seconds it may take on a GPU; those of several processes, on eight.
BUDGETS = {augmentation: 2, augmentation_share: 10, training_step: 4, half_precision: 20, resumed: 45, kept_busy: 50,
           joined_batch_norm: 15, scaling: 50, stopped_together: 25, features: 12, node: 1}  # fmt: skip
GPU_ONLY = (augmentation_share, kept_busy, scaling)
