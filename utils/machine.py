"""The machine: devices and number formats to compute with, and the record of what a result was made with.

Device and dtype are arguments, not forks: the CPU tests run the code that a GPU runs. torch is imported where it is
needed, so that a record costs no start-up time.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from utils.cli import UserError
from utils.storage import sha256_file

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parent.parent
# That runs programs of any CUDA 12 (torch 2.8 of CUDA 12.8 on a driver of 12.4: pytorch #155141): ">= 525", table 1 of
# docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html; 525.60.13 came with toolkit 12.0.
OLDEST_DRIVER = [525, 60]
ENOUGH_GB = 6  # free: Stable Diffusion 1.4 at 512 px takes as much in fp16, training and features by their batch
FEW_CORES = 4  # of one GPU: its own process, and loaders that decode some hundred images a second each
OUT_OF_MEMORY = (
    "out of memory",  # torch's allocator, CUDA itself (AcceleratorError) and Triton
    "can't allocate memory",  # a CPU
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",  # no memory for its workspace
    "CUDNN_STATUS_ALLOC_FAILED",
    "unable to find an engine",  # cuDNN, whose engines all need more: pytorch #108645
)
COMPILERS = ("g++", "c++", "clang++")  # on a CPU torch.compile needs one of them
POWERCAP = Path("/sys/class/powercap")  # where Linux counts the energy of Intel's and AMD's processors (RAPL)
NO_COST = {"seconds": 0.0, "cpu_joules": 0.0, "gpu_joules": 0.0}
PACKAGES = ("torch", "torchvision", "xformers", "diffusers", "transformers", "numpy", "pillow", "simplejpeg")


def snapshot() -> dict:
    """The facts that a dataset, checkpoint or report records about where it was made. Plain JSON types."""
    lock = ROOT / "requirements.lock"
    return {
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "git_commit": git_commit(),
        "lock_sha256": sha256_file(lock) if lock.exists() else None,
        "image_digest": os.environ.get("IMAGE_DIGEST"),  # set by the launcher, or docker run -e
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        **gpus(),
    }


def package_version(name: str) -> str | None:
    """Of an installed package; None where it is not."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def git_commit() -> str | None:
    """The commit of this source tree, with `+changes` if files differ from it; the container passes $GIT_COMMIT."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
        changes = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=ROOT, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("GIT_COMMIT")
    return commit.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


@cache
def cpu_model() -> str:
    """The processor as the system names it."""
    for line in _cpuinfo().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@cache
def cpu_has_bf16() -> bool:
    """Whether this CPU is faster in bfloat16 than in fp32: Intel's with AMX and AMD's with AVX512-BF16 (Zen 4 on) are.

    Two images through SD 1.4's UNet at 512 px took two cores of Zen 4 6.2 s, 10.7 in fp32 (torch 2.10.0). On Intel
    AVX512-BF16 alone is no reason: a forward took a Xeon without AMX 10.7 core-seconds, 7.1 in fp32.
    """
    words = set(_cpuinfo().split())
    return "amx_bf16" in words or {"AuthenticAMD", "avx512_bf16"} <= words


@cache
def gpus() -> dict:
    """{"gpus": [names], "driver": version} by nvidia-smi; empty where there is none."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        rows = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return {"gpus": [], "driver": None}
    cells = [row.rsplit(",", 1) for row in rows if "," in row]
    return {"gpus": [name.strip() for name, _ in cells], "driver": cells[0][1].strip() if cells else None}


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


# ===== where tensors live, and in which number format =====


def resolve_device(name: str) -> torch.device:
    """`auto` is the first CUDA device, else Apple's MPS, else the CPU. Under DDP the caller passes cuda:LOCAL_RANK."""
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        else:
            name = "mps" if torch.backends.mps.is_available() else "cpu"
            if gpus()["driver"] and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
                print(f"warning: --device auto takes the CPU: {_why_hidden(0, 0)}", file=sys.stderr)
    if not re.fullmatch("cpu|mps|cuda(:[0-9]{1,2})?", name):
        raise UserError(f"--device {name}: unknown; use auto, cpu, cuda, cuda:N or mps")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UserError(f"--device {name}: {_why_hidden(device.index or 0, count)}")
        if device.index is not None:
            torch.cuda.set_device(device)  # libraries that ask for "cuda" get this one: no other GPU is touched
        _refuse_unfit(name, device)
        warn_of_few_cores()
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: not available here; use --device cpu")
    return device


def _why_hidden(index: int, count: int) -> str:
    """Why torch shows COUNT GPUs and not number INDEX, and the remedy."""
    import torch

    visible, driver = os.environ.get("CUDA_VISIBLE_DEVICES"), gpus()["driver"]
    if count and os.environ.get("LOCAL_RANK") == str(index):
        is_slice = "MIG" in torch.cuda.get_device_name(0)
        slices = " (of MIG slices CUDA shows a process the first alone)" if is_slice else ""
        return f"LOCAL_RANK={index}, but {count} visible{slices}; start one process a GPU, and let each see all of them"
    if visible is not None and not count:
        return f"CUDA_VISIBLE_DEVICES={visible!r} shows no GPU; unset it, or give what `nvidia-smi -L` lists"
    if driver and not count and [int(part) for part in driver.split(".")[:2]] < OLDEST_DRIVER:
        oldest = ".".join(map(str, OLDEST_DRIVER))
        return f"driver {driver} is too old for CUDA {torch.version.cuda}; update it to {oldest} or newer, or use cpu"
    if visible is not None:  # CUDA leaves out what follows a wrong entry
        return f"CUDA_VISIBLE_DEVICES={visible!r} shows {count}, numbered from 0; give what `nvidia-smi -L` lists"
    return f"{count} CUDA devices here; use --device cpu or check the driver"


def _refuse_unfit(name: str, device: torch.device) -> None:
    """UserError for a GPU that this torch has no kernels for."""
    import torch

    kernels = [int(arch[3:]) for arch in torch.cuda.get_arch_list() if arch.startswith("sm_") and arch[3:].isdigit()]
    major, minor = torch.cuda.get_device_capability(device)
    if kernels and 10 * major + minor < min(kernels):
        card = f"{torch.cuda.get_device_name(device)} is sm_{major}{minor}"
        oldest = f"this torch has kernels from sm_{min(kernels)} on"
        raise UserError(f"--device {name}: {card}, and {oldest}; use a newer GPU or cpu")


def require_memory(device: torch.device, needed_gb: float | None, smaller: str) -> None:
    """UserError if the GPU DEVICE has less than NEEDED_GB free; where the need is not known (None, as of training) a
    line on stderr below ENOUGH_GB, which may still suffice. SMALLER: the options by which less would do."""
    import torch

    free, total = (size / 2**30 for size in torch.cuda.mem_get_info(device)) if device.type == "cuda" else (1e9, 1e9)
    if free < (needed_gb or ENOUGH_GB):
        need = f"and this model needs about {needed_gb:.1f} at this size" if needed_gb else "which may be too little"
        remedy = f"`nvidia-smi` shows who uses it; take another GPU, a smaller {smaller}, or --device cpu"
        text = f"--device {device}: {free:.1f} of {total:.1f} GB free, {need}; {remedy}"
        if needed_gb:
            raise UserError(text)
        print(f"warning: {text}", file=sys.stderr)


@cache
def warn_of_few_cores() -> None:
    """Say on stderr, once for all ranks, when a GPU has too few cores to decode, augment and launch kernels."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores < FEW_CORES and os.environ.get("RANK", "0") == "0":
        few = f"{cores} CPU core{'s' * (cores > 1)} for a GPU; it will wait for them. Give {FEW_CORES} or more"
        print(f"warning: {few} (utils.launch --cpus-per-task, sbatch's and srun's --cpus-per-task)", file=sys.stderr)


def resolve_dtype(name: str, device: torch.device, trained_pixels: int = 512) -> torch.dtype:
    """`auto` is fp16 on CUDA, bf16 on CPUs it speeds up, else fp32, and no TF32, which cuDNN would take by default.

    TRAINED_PIXELS: the smallest image's side. On 16 a ResNet's last 3x3 convolution of stride 2 sees one pixel, and
    oneDNN (torch 2.10, AMD) makes up its gradients in bf16 from memory that nobody wrote."""
    import torch

    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    wrong = device.type == "cpu" and trained_pixels <= 16
    if name == "auto":
        name = {"cuda": "fp16", "cpu": "bf16" if cpu_has_bf16() and not wrong else "fp32"}.get(device.type, "fp32")
    if name == "fp16" and device.type == "cpu":
        raise UserError("--dtype fp16: half precision needs a GPU; use --dtype bf16 or fp32 on the CPU")
    if name == "bf16" and wrong:
        raise UserError("--dtype bf16: gradients of crops of 16 pixels may be wrong on a CPU; use --dtype fp32")
    return {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[name]


def memory_format(device: torch.device, dtype: torch.dtype) -> torch.memory_format:
    """channels_last where convolutions gain from it: on CUDA with 16-bit numbers and on CPUs with bf16."""
    import torch

    sixteen_bit = dtype in (torch.float16, torch.bfloat16)
    return torch.channels_last if sixteen_bit and device.type in ("cpu", "cuda") else torch.contiguous_format


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ERROR says in one of its many ways that a device's memory is full."""
    import torch

    told = isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
    return told or isinstance(error, torch.OutOfMemoryError)


@contextmanager
def full_memory_said(problem: str) -> Iterator[None]:
    """UserError of PROBLEM, which names the option and the remedy, where the memory of a device becomes full."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(problem) from None


def require_compiler(device: torch.device) -> None:
    """UserError if torch.compile lacks a tool on DEVICE, which it would miss only minutes later, at the first step."""
    if device.type == "cuda":  # Triton builds its launchers with a C compiler
        lacking = "" if any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))) else "C compiler (gcc)"
        if not lacking and not Path(sysconfig.get_path("include"), "Python.h").is_file():
            lacking = "Python.h (python3-dev)"
    else:  # inductor writes C++
        lacking = "" if any(map(shutil.which, (os.environ.get("CXX", "c++"), *COMPILERS))) else "C++ compiler (g++)"
    if lacking:
        remedy = "install Debian's package or leave it out"
        raise UserError(f"--compile: no {lacking} here, which torch.compile needs; {remedy}")


# ===== what work costs =====


class Meter:
    """Seconds and joules that pass from the moment it is made.

    cpu_joules are those of the machine's processors and their memory, whoever used them: of several processes of a
    launcher the first of a machine counts them. gpu_joules are those of the GPU this process computes on. What cannot
    be read (RAPL is root's on most systems) is left out, so that a sum never mixes measured and guessed.
    """

    def __init__(self, device: torch.device):
        self._first = os.environ.get("LOCAL_RANK", "0") == "0"
        self._zones = [zone for zone in sorted(POWERCAP.glob("intel-rapl:*")) if self._first and _is_zone(zone)]
        self._gpu = _nvml_device(device)
        self._at = self._counters()
        self._started = time.monotonic()

    def read(self) -> dict[str, float]:
        """{"seconds", and "cpu_joules", "gpu_joules" where they can be read} since the last call or the start.

        To be called more often than a counter of the processors runs over: every quarter of an hour at 300 watts.
        """
        now, counters = time.monotonic(), self._counters()
        spent = {"seconds": now - self._started} | ({} if self._first else {"cpu_joules": 0.0})
        for name, (value, wraps_at) in counters.items():
            before = self._at.get(name, (value, 0))[0]
            passed = value - before + (wraps_at if value < before else 0)
            kind = name.partition(" ")[0]
            spent[kind] = spent.get(kind, 0) + passed
        self._at, self._started = counters, now
        return spent

    def _counters(self) -> dict[str, tuple[float, float]]:
        """{"cpu_joules <zone>" or "gpu_joules": (joules so far, at how many it starts anew)}"""
        found = {}
        for zone in self._zones:
            now, most = (int((zone / name).read_text()) / 1e6 for name in ("energy_uj", "max_energy_range_uj"))
            found[f"cpu_joules {zone.name}"] = (now, most)
        millijoules = ctypes.c_ulonglong()
        if self._gpu and self._gpu[0].nvmlDeviceGetTotalEnergyConsumption(self._gpu[1], ctypes.byref(millijoules)) == 0:
            found["gpu_joules"] = (millijoules.value / 1000, 0.0)
        return found


def _is_zone(zone: Path) -> bool:
    """Whether ZONE is a processor or its memory (not a part of one, nor the whole board), and may be read."""
    try:
        return (zone / "energy_uj").read_text() != "" and (zone / "name").read_text().startswith(("package", "dram"))
    except OSError:
        return False


def _nvml_device(device: torch.device) -> tuple | None:
    """(NVIDIA's management library, its handle of DEVICE); None where there is none or it does not know the device."""
    import torch

    if device.type != "cuda":
        return None
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        uuid, handle = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode(), ctypes.c_void_p()
        known = nvml.nvmlInit_v2() == 0 and nvml.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(handle)) == 0
    except (OSError, AttributeError):
        return None
    return (nvml, handle) if known else None


def add_costs(*costs: Mapping[str, float | None]) -> dict[str, float]:
    """The sum, of what all of them know: a run of which one session could not read a counter has no such figure."""
    columns = {key: [cost.get(key) for cost in costs] for key in (costs[0] if costs else ())}
    known = {key: [value for value in column if value is not None] for key, column in columns.items()}
    return {key: sum(values) for key, values in known.items() if len(values) == len(costs)}


def rounded_cost(cost: Mapping[str, float]) -> dict[str, float]:
    """COST as a record shows it: tenths of seconds, whole joules; operations as a float, which a year of them fits."""
    rules = {"seconds": lambda value: round(value, 1), "flops": float}
    return {key: rules.get(key, round)(value) for key, value in cost.items()}
