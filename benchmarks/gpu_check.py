"""`make gpu-check`: does this GPU give the results that the CPU gives? One command, one page, some minutes.

Everything else of this project is tested on CPUs. Each check is a function of the device that returns figures, each
with its limit; those that know no other limit than "the CPU's own result" run on a CPU too, which is how the checks
themselves are tested. Writes OUT/gpu-check.json and OUT/gpu-check.md: card, driver, commit, every figure.

    make gpu-check                                          # exit code 0: all that apply pass; 1: some do not
    python benchmarks/gpu_check.py --only latents attention
    python benchmarks/gpu_check.py --device cpu             # the checks that a CPU can run; without a GPU else code 2
"""

import argparse
import fcntl
import hashlib
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models.export_fashion import digits, write_set  # noqa: E402
from utils.cli import UserError, make_parser, run  # noqa: E402
from utils.generation.recipe import SCHEDULERS, Recipe  # noqa: E402
from utils.machine import OUT_OF_MEMORY, resolve_device, snapshot  # noqa: E402
from utils.storage import atomic_write, read_jsonl, write_json  # noqa: E402

MODEL = ROOT / "models" / "fashion-sd"
TEXTS = ("boot", "coat, overgarment", "sandal", "dress")
# sha256 of the float32 latents of seeds 0 to 7, (8, 4, 8, 8): they are drawn on the CPU, the same everywhere.
LATENTS = "6fde3692fd6a6e4d0b66709a7a36d8575d608e40eff9b4ca3a679a6dba56d10c"


@dataclass(frozen=True)
class Figure:
    """One measured value of a CHECK, what it is held against, and whether it passes."""

    check: str
    name: str
    value: float | str
    limit: str
    passed: bool


def at_most(name: str, value: float, limit: float) -> Figure:
    """A figure that is to be at most LIMIT; one that is no number fails."""
    return Figure("", name, value, f"<= {limit:g}", value <= limit)


def at_least(name: str, value: float, limit: float) -> Figure:
    """A figure that is to be at least LIMIT."""
    return Figure("", name, value, f">= {limit:g}", value >= limit)


def equal(name: str, value: str, wanted: str) -> Figure:
    """A figure that is to be WANTED; of hashes the first digits are shown."""
    return Figure("", name, value[:16], f"= {wanted[:16]}", value == wanted)


def psnr(one, other) -> float:
    """Peak signal-to-noise ratio of two uint8 images or batches, dB; 99 for equal ones."""
    error = np.square(np.asarray(one, np.float64) - np.asarray(other, np.float64)).mean()
    return 10 * math.log10(255**2 / error) if error else 99.0


def sha256(values) -> str:
    """Of the bytes of a tensor or array."""
    return hashlib.sha256(np.ascontiguousarray(values.cpu()).tobytes()).hexdigest()


def sampler_on(device, dtype: str = "fp32", scheduler: str = "pndm", batch_size: int = 4):
    """The embedded model, ready to draw TEXTS in ten steps."""
    from utils.generation.loading import load_sampler
    from utils.generation.pipeline import find_pipeline

    folder = find_pipeline(str(MODEL), None)
    recipe = Recipe(scheduler=scheduler, steps=10, dtype=dtype, batch_size=batch_size, safety="off").with_model(folder)
    return load_sampler(folder, recipe.with_device(device), device)


def images_of(sampler):
    """(4, H, W, 3) uint8: one of each of TEXTS."""
    latents = sampler.initial_latents(range(len(TEXTS)))
    return sampler.decode(sampler.denoise(latents, TEXTS))[0]


# ===== the checks =====


def card(device) -> list[Figure]:
    """The card fits this torch, and has room for the paper's settings."""
    import torch

    if device.type != "cuda":
        return [Figure("", "device", str(device), "", True)]
    free, _ = torch.cuda.mem_get_info(device)  # resolve_device has refused what this torch has no kernels for
    return [at_least("free memory, GB", round(free / 2**30, 1), 6)]


def attention(device) -> list[Figure]:
    """torch's attention against softmax(Q K / sqrt d) V in float64, for each head size; `auto` takes the faster one."""
    import torch

    from utils.generation.loading import HEADS, attention_ms, resolve_attention, xformers_fault

    dtype = torch.float16 if device.type == "cuda" else torch.float32
    figures = []
    for size in HEADS:
        q, k, v = torch.randn(3, 1, 2, 256, size, generator=torch.Generator().manual_seed(size))
        weights = (q.double() @ k.double().mT / math.sqrt(size)).softmax(-1)
        ours = torch.nn.functional.scaled_dot_product_attention(*(x.to(device, dtype) for x in (q, k, v)))
        error = (ours.cpu().double() - weights @ v.double()).abs().max().item()
        figures.append(at_most(f"head size {size}, largest error", error, 2e-3))
    if device.type == "cuda" and not xformers_fault(device, dtype):
        ms = {name: sum(times.values()) for name, times in attention_ms(device, dtype).items()}
        chosen = resolve_attention("auto", device, dtype)
        figures.append(at_most(f"{chosen}, ms against the fastest", ms[chosen] / min(ms.values()), 1.05))
    return figures


def latents(device) -> list[Figure]:
    """The noise that images start from is the same on every machine."""
    return [equal("sha256 of eight seeds", sha256(sampler_on(device).initial_latents(range(8))), LATENTS)]


def pictures(device) -> list[Figure]:
    """The embedded model's images against the CPU's in fp32, by every scheduler."""
    import torch

    figures = []
    for scheduler in SCHEDULERS:
        wanted = images_of(sampler_on(torch.device("cpu"), scheduler=scheduler))
        for dtype, limit in {"fp32": 50, "fp16": 40}.items():
            if dtype == "fp32" or device.type == "cuda":
                found = psnr(images_of(sampler_on(device, dtype, scheduler)), wanted)
                figures.append(at_least(f"{scheduler}, {dtype}, dB to the CPU", found, limit))
    return figures


def repeated(device) -> list[Figure]:
    """Drawn twice, beside the next batch's denoising or after it: the same bytes."""
    sampler = sampler_on(device, "fp16" if device.type == "cuda" else "fp32")
    first = sha256(images_of(sampler))
    again = sha256(images_of(sampler))
    sampler.side_stream = None
    return [equal("again", again, first), equal("without a side stream", sha256(images_of(sampler)), first)]


def killed(device) -> list[Figure]:
    """generate.py killed in mid-work and started again: the bytes of a run that was left in peace."""
    with tempfile.TemporaryDirectory() as folder:
        hashes = {}
        for name in ("peace", "killed"):
            out = Path(folder) / name
            command = [sys.executable, "generate.py", "--classes", "fashion", "--model", str(MODEL), "--out", str(out)]
            command += ["--images-per-class", "4", "--steps", "4", "--batch-size", "2", "--device", str(device)]
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


def out_of_memory(device) -> list[Figure]:
    """Every way in which a device says that its memory is full halves the batch, and the images are drawn."""
    wanted = images_of(sampler_on(device))
    figures = []
    for message in OUT_OF_MEMORY:
        sampler = sampler_on(device)
        forward = sampler.unet.forward

        def full(x, *rest, message=message, forward=forward, **more):
            if len(x) > 4:  # two images, with and without their prompt
                raise RuntimeError(message)
            return forward(x, *rest, **more)

        sampler.unet.forward = full
        figures.append(at_least(f"{message}: dB", psnr(images_of(sampler), wanted), 45))
    return figures


def other_gpu(device) -> list[Figure]:
    """Work on the last GPU leaves the first alone."""
    import torch

    if torch.cuda.device_count() < 2:
        return []
    program = "import torch; from benchmarks import gpu_check as g; from utils.machine import resolve_device; "
    program += "g.images_of(g.sampler_on(resolve_device(f'cuda:{torch.cuda.device_count() - 1}'))); "
    program += "print(torch.cuda.memory_reserved(0))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return [at_most("bytes on GPU 0", float(done.stdout.split()[-1]), 0)]


def augmentation(device) -> list[Figure]:
    """Colour, blur and the rest of training's augmentation against the CPU, in parts of the 0..255 range."""
    import torch

    from train import PAPER
    from utils.training.augment import augment, random_draws

    images = torch.randint(0, 256, (32, 3, 96, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    draws = random_draws(PAPER | {"local_solarize": 0.2}, 1, 0, np.zeros(32, np.int64), np.arange(32), 1)
    error = (augment(images.to(device), draws).cpu() - augment(images, draws)).abs().max().item()
    return [at_most("largest difference", error * 0.229, 1 / 255 + 1e-3)]  # 0.229: ImageNet's deviation of red


def training_step(device) -> list[Figure]:
    """Loss and gradients of a small ResNet in fp32 against the CPU's."""
    import torch

    from utils.model import build_model

    results = []
    for where in (torch.device("cpu"), device):
        torch.manual_seed(0)
        model = build_model("resnet10", 10).to(where)
        pixels, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
        loss = torch.nn.functional.cross_entropy(model(pixels.to(where)), labels.to(where))
        loss.backward()
        gradient = torch.cat([parameter.grad.flatten().cpu() for parameter in model.parameters()])
        results.append((loss.item(), gradient))
    (loss, wanted), (found, gradient) = results
    distance = ((gradient - wanted).norm() / wanted.norm()).item()
    return [at_most("loss", abs(found - loss), 1e-4), at_most("gradient, relative", distance, 1e-3)]


def resumed(device) -> list[Figure]:
    """train.py stopped by SIGUSR2 saves, and goes on to the step and, on a CPU, the weights of a run left in peace."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        write_set(Path(folder) / "digits", digits("train"))
        ends, weights = {}, {}
        for name in ("peace", "stopped"):
            out = Path(folder) / name
            command = [sys.executable, "train.py", "--recipe", "demo", "--epochs", "3", "--data", f"{folder}/digits"]
            command += ["--out", str(out), "--name", "x", "--device", str(device), "--log-every", "1"]
            process = quiet(command)
            log = out / "log.jsonl"
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


def quiet(command: Sequence[str]) -> subprocess.Popen:
    """Start COMMAND without its output."""
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def features(device) -> list[Figure]:
    """ResNet50 features of evaluation in this device's number format against fp32 on the CPU."""
    import torch

    from utils.images import normalize
    from utils.machine import resolve_dtype
    from utils.model import build_model

    torch.manual_seed(0)
    model = build_model("resnet50", 10).eval()
    model.fc = torch.nn.Identity()
    pixels = torch.randint(0, 256, (8, 3, 128, 128), dtype=torch.uint8)
    with torch.inference_mode():
        wanted = model(normalize(pixels))
        dtype = resolve_dtype("auto", device)
        found = model.to(device, dtype)(normalize(pixels.to(device), dtype)).float().cpu()
    cosine = torch.nn.functional.cosine_similarity(found, wanted).min().item()
    return [at_least(f"cosine, {str(dtype)[6:]}", round(cosine, 6), 0.999)]


def node(device) -> list[Figure]:
    """What a SLURM step is to have: all the cores it asked for, shared memory for loaders, locks that hold."""
    free = shutil.disk_usage("/dev/shm").free / 2**30
    figures = [at_least("free in /dev/shm, GB", round(free, 1), 0.05 if device.type == "cpu" else 4)]
    if asked := os.environ.get("SLURM_CPUS_PER_TASK"):
        figures.append(equal("cores", str(len(os.sched_getaffinity(0))), asked))
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


CHECKS: dict[str, Callable[..., list[Figure]]] = {
    check.__name__: check
    for check in (card, attention, latents, pictures, repeated, killed, out_of_memory, other_gpu, augmentation,
                  training_step, resumed, features, node)
}  # fmt: skip


def get_args_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = make_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=list(CHECKS), metavar="CHECK", help=f"of {', '.join(CHECKS)}")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check"), help="folder of the page and the JSON")
    return parser


def main(args: argparse.Namespace) -> int:
    """Run the checks and write what they found; 0 if all pass, else 1."""
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "no GPU here that torch can use; run this where there is one (its checks of a CPU: --device cpu)"
        )
    device = resolve_device(args.device)
    figures: list[Figure] = []
    for name in args.only or CHECKS:
        started = time.monotonic()
        try:
            found = CHECKS[name](device)
        except Exception as error:  # a check that breaks has failed, and the others still tell
            reason = (str(error).strip().splitlines() or [""])[0]
            found = [Figure("", "ended with", f"{type(error).__name__}: {reason}", "no error", False)]
        figures += [replace(figure, check=name) for figure in found]
        faults = sum(not figure.passed for figure in found)
        state = f"{faults} FAILED" if faults else "passed" if found else "does not apply"
        print(f"{name:15} {state} ({time.monotonic() - started:.0f} s)", flush=True)
    passed = all(figure.passed for figure in figures)
    args.out.mkdir(parents=True, exist_ok=True)
    facts = {"device": str(device), "passed": passed, **snapshot(), "clocks": clocks()}
    write_json(args.out / "gpu-check.json", {**facts, "figures": [asdict(figure) for figure in figures]})
    atomic_write(args.out / "gpu-check.md", page(facts, figures).encode())
    print(f"gpu-check: {'all pass' if passed else 'some FAILED'}; {args.out / 'gpu-check.md'}")
    return 0 if passed else 1


def clocks() -> str | None:
    """The GPU's clocks and power as nvidia-smi tells them; None without it."""
    query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def page(facts: dict, figures: Sequence[Figure]) -> str:
    """The Markdown page."""
    machine = [f"- {name}: {facts[name]}" for name in ("device", "gpus", "driver", "clocks", "git_commit", "packages")]
    shown = [(f.check, f.name, f"{f.value:.4g}" if isinstance(f.value, float) else f.value, f.limit,
              "pass" if f.passed else "**FAIL**") for f in figures]  # fmt: skip
    rows = ["| " + " | ".join(str(cell).replace("|", "/") for cell in row) + " |" for row in shown]
    head = ["| check | figure | value | limit | |", "|---|---|---|---|---|"]
    return "\n".join(["# gpu-check", "", *machine, "", *head, *rows, ""])


if __name__ == "__main__":
    sys.exit(run(main, get_args_parser()))
