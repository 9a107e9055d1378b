"""Devices and number formats are refused or resolved before work starts; a result records where it was made."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from itertools import product
from types import SimpleNamespace

import pytest
import torch

import evaluate
import generate
import train
from tests.training_runs import TINY, make_images
from utils import machine
from utils.cli import UserError, run
from utils.machine import memory_format, resolve_device, resolve_dtype


def test_auto_is_the_cpu_where_there_is_nothing_else(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")


@pytest.fixture
def card(monkeypatch):
    """Two faked GPUs that fit, where no variable hides one; returns a function that changes what torch tells."""
    for name in ("CUDA_VISIBLE_DEVICES", "LOCAL_RANK", "RANK"):
        monkeypatch.delenv(name, raising=False)
    facts = {"is_available": True, "device_count": 2, "get_device_capability": (8, 0), "get_device_name": "A100",
             "mem_get_info": (79 << 30, 80 << 30), "get_arch_list": ["sm_70", "sm_90", "compute_120"],
             "set_device": None}  # fmt: skip
    for name in facts:
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: facts[name])
    driver = {"gpus": ["A100"], "driver": "570.86.15"}
    monkeypatch.setattr(machine, "gpus", lambda: driver)

    def change(driver_version: str | None = driver["driver"], **changes: object) -> None:
        driver.update(driver=driver_version)
        facts.update(changes)

    return change


def test_auto_prefers_cuda(card):
    assert resolve_device("auto") == torch.device("cuda")
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match="cuda:2: 2 CUDA devices here"):
        resolve_device("cuda:2")


NO_GPU = {"is_available": False, "device_count": 0}


@pytest.mark.parametrize(
    ("facts", "environment", "message"),
    [
        ({"get_device_capability": (6, 1), "get_device_name": "GTX 1080"}, {},
         "cuda:1: GTX 1080 is sm_61, and this torch has kernels from sm_70 on; use a newer GPU or cpu"),
        (NO_GPU | {"driver_version": "470.223.02"}, {}, "driver 470.223.02 is too old for CUDA 12.8; update it to"),
        (NO_GPU | {"driver_version": "525.60.13"}, {}, "0 CUDA devices here; use --device cpu or check the driver"),
        (NO_GPU | {"driver_version": None}, {}, "0 CUDA devices here; use --device cpu or check the driver"),
        (NO_GPU, {"CUDA_VISIBLE_DEVICES": ""}, "CUDA_VISIBLE_DEVICES='' shows no GPU; unset it, or give what"),
        (NO_GPU, {"CUDA_VISIBLE_DEVICES": "9"}, "CUDA_VISIBLE_DEVICES='9' shows no GPU"),
        ({"device_count": 1}, {"CUDA_VISIBLE_DEVICES": "0,9"},
         "CUDA_VISIBLE_DEVICES='0,9' shows 1, numbered from 0; give what `nvidia-smi -L` lists"),
        ({"device_count": 1}, {"LOCAL_RANK": "1"}, "LOCAL_RANK=1, but 1 visible; start one process a GPU"),
        ({"device_count": 1, "get_device_name": "A100 MIG 3g.20gb"}, {"LOCAL_RANK": "1"},
         "LOCAL_RANK=1, but 1 visible (of MIG slices CUDA shows a process the first alone)"),
    ],
)  # fmt: skip
def test_a_gpu_that_cannot_be_used_is_one_line_with_its_remedy(card, monkeypatch, facts, environment, message):
    card(**facts)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as refused:
        resolve_device("cuda:1")
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_auto_says_why_a_gpu_is_left_unused(card, monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    card(**NO_GPU, driver_version="470.10")
    for hidden, said in (("", False), ("-1", False), (None, True)):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if hidden is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)  # which is how a CPU is asked for
        assert resolve_device("auto") == torch.device("cpu")
        assert ("auto takes the CPU: driver 470.10 is too old" in capsys.readouterr().err) is said


def test_a_gpu_that_is_nearly_full_is_one_line_with_the_remedies(card, capsys, monkeypatch):
    monkeypatch.setattr(machine, "FEW_CORES", 0)
    for free, said in ((5 << 30, 1), (6 << 30, 0)):
        card(mem_get_info=(free, 24 << 30))
        machine.require_memory(resolve_device("cuda:0"), None, "--batch-size")
        error = capsys.readouterr().err
        assert error.count("\n") == said and ("--device cuda:0: 5.0 of 24.0 GB free, which may be" in error) == said
        assert ("`nvidia-smi` shows who uses it; take another GPU, a smaller --batch-size, or" in error) == said


def test_each_script_says_it_before_any_work(card, monkeypatch, tmp_path, capsys):
    """generate.py knows what its model needs and refuses; of training and features a small batch may fit."""

    def work(*_):
        raise UserError("work begins")

    card(mem_get_info=(2 << 30, 24 << 30))
    monkeypatch.setattr(machine, "FEW_CORES", 0)
    for started in ("training.distributed.process_group", "generation.loading.load_sampler"):
        monkeypatch.setattr(f"utils.{started}", work)
    data = make_images(tmp_path / "images", {"n01": 8, "n02": 8})
    model = ("--model", "models/fashion-sd", "--classes", "fashion", "--height", "512", "--width", "512")
    arguments = [*TINY, "--data", str(data), "--device", "cuda", "--dtype", "fp16", "--out", str(tmp_path / "run")]
    assert run(train.main, train.get_args_parser(), arguments) == 2
    few = "--device cuda: 2.0 of 24.0 GB free, "
    rest = "; `nvidia-smi` shows who uses it; take another GPU, a smaller {}, or --device cpu"
    may = "warning: " + few + "which may be too little" + rest
    assert capsys.readouterr().err.splitlines()[0] == may.format("--batch-per-device")
    with pytest.raises(UserError, match="work begins"):
        evaluate.judge_all([], evaluate.get_args_parser().parse_args(["--device", "cuda"]))
    assert capsys.readouterr().err.splitlines() == [may.format("--batch-size")]
    arguments = [*model, "--device", "cuda", "--out", str(tmp_path / "d")]
    assert run(generate.main, generate.get_args_parser(), arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    needs = few + "and this model needs about 3.3 at this size" + rest.format("--height and --width")
    assert line.endswith(f"error: {needs}") and not (tmp_path / "d/dataset.json").exists()


def test_a_gpu_without_room_for_the_model_is_refused_with_the_remedies(card):
    card(mem_get_info=(int(5.7 * 2**30), 24 << 30))
    machine.require_memory(torch.device("cuda:0"), 5.6, "--height")
    machine.require_memory(torch.device("cpu"), 999, "--height")
    with pytest.raises(UserError) as refused:
        machine.require_memory(torch.device("cuda:0"), 5.9, "--height")
    assert str(refused.value).startswith(
        "--device cuda:0: 5.7 of 24.0 GB free, and this model needs about 5.9 at this size; "
    )
    for remedy in ("nvidia-smi", "another GPU", "--height", "--device cpu"):
        assert remedy in str(refused.value)


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "meta"])
def test_an_unknown_device_is_refused_with_the_known_ones(name):
    with pytest.raises(UserError, match="use auto, cpu, cuda, cuda:N or mps"):
        resolve_device(name)


def test_auto_dtype_follows_the_hardware(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert resolve_dtype("auto", cuda) == torch.float16
    monkeypatch.setattr(machine, "cpu_has_bf16", lambda: True)
    assert resolve_dtype("auto", cpu) == resolve_dtype("auto", cpu, 17) == torch.bfloat16
    assert resolve_dtype("auto", cpu, 16) == torch.float32
    monkeypatch.setattr(machine, "cpu_has_bf16", lambda: False)
    assert resolve_dtype("auto", cpu) == torch.float32
    assert resolve_dtype("fp32", cuda) == torch.float32
    with pytest.raises(UserError, match="use --dtype bf16 or fp32 on the CPU"):
        resolve_dtype("fp16", cpu)


@pytest.mark.parametrize("stride", [1, 2])
def test_bf16_gradients_of_what_is_trained_are_those_of_fp32_whatever_lies_in_unwritten_memory(stride):
    for side, channels in product((2, 3, 4, 7), (64, 256)):  # a ResNet's last layers on 17 to 224 pixels
        torch.manual_seed(0)
        pairs = []
        for shape in ((4, channels, side, side), (channels, channels, 3, 3)):
            low = torch.randn(shape).bfloat16().to(memory_format=torch.channels_last)
            pairs.append((low.requires_grad_(), low.detach().float().requires_grad_()))
        (x, x32), (w, w32) = pairs
        wanted = torch.nn.functional.conv2d(x32, w32, stride=stride, padding=1)
        wanted.backward(torch.ones_like(wanted))
        for _ in range(3):
            x.grad = w.grad = None
            poison = [torch.full((size,), math.nan) for size in (64, 1024, 16_384, 262_144) for _ in range(4)]
            del poison  # what is allocated next lies there
            torch.nn.functional.conv2d(x, w, stride=stride, padding=1).sum().backward()
            for low, high in pairs:
                assert torch.linalg.norm(low.grad.float() - high.grad) < 0.02 * torch.linalg.norm(high.grad)


def test_channels_last_goes_with_16_bit_numbers():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert memory_format(cpu, torch.bfloat16) == memory_format(cuda, torch.float16) == torch.channels_last
    assert memory_format(cpu, torch.float32) == memory_format(cuda, torch.float32) == torch.contiguous_format


def test_a_snapshot_is_plain_json_and_names_the_lock_and_versions():
    taken = machine.snapshot()
    assert json.loads(json.dumps(taken)) == taken
    assert len(taken["lock_sha256"]) == 64
    assert taken["packages"]["torch"].startswith("2.10.0")
    assert taken["cores"] >= 1 and taken["cpu"]


def test_a_snapshot_imports_no_torch():
    code = "import sys; from utils.machine import snapshot; snapshot(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=machine.ROOT).returncode == 0


def test_bf16_is_chosen_by_maker_and_flags_of_the_cpu(monkeypatch):
    intel, amd = "GenuineIntel", "AuthenticAMD"
    cases = [(intel, "avx512_bf16", False), (intel, "amx_bf16", True), (intel, "avx2", False), ("", "", False)]
    for vendor, flags, expected in [*cases, (amd, "avx512_bf16", True), (amd, "avx512f", False)]:
        said = f"vendor_id : {vendor}\nmodel name : x\nflags : fpu {flags}\n"
        monkeypatch.setattr(machine, "_cpuinfo", lambda said=said: said)
        machine.cpu_has_bf16.cache_clear()
        assert machine.cpu_has_bf16() is expected
    machine.cpu_has_bf16.cache_clear()


@pytest.mark.parametrize(("cores", "rank", "said"), [(3, "0", True), (4, "0", False), (1, "1", False)])
def test_few_cores_for_a_gpu_are_said_once(card, monkeypatch, capsys, cores, rank, said):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setenv("RANK", rank)
    machine.warn_of_few_cores.cache_clear()
    machine.resolve_device("cuda")
    assert ("warning: 3 CPU cores for a GPU; it will wait for them" in capsys.readouterr().err) is said
    machine.resolve_device("cuda")
    machine.resolve_device("cpu")
    assert not capsys.readouterr().err


# ===== the faces of full memory =====

MEMORY_ERRORS = [
    (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB"),
    (torch.AcceleratorError, "CUDA error: out of memory"),
    (RuntimeError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    (RuntimeError, "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    (RuntimeError, "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    (RuntimeError, "Triton Error [CUDA]: out of memory"),
    (RuntimeError, "GET was unable to find an engine to execute this computation"),
    (RuntimeError, "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to"),
]


@pytest.mark.parametrize(("kind", "message"), MEMORY_ERRORS)
def test_every_face_of_full_memory_is_known(kind, message):
    assert machine.is_out_of_memory(kind(message))


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), ValueError("out of memory"), KeyError("x")])
def test_other_errors_are_not_taken_for_full_memory(error):
    assert not machine.is_out_of_memory(error)


def test_a_numbered_gpu_is_the_one_that_libraries_get(card, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert machine.resolve_device("cuda:1") == torch.device("cuda:1") and chosen == [torch.device("cuda:1")]
    assert machine.resolve_device("cuda") == torch.device("cuda") and len(chosen) == 1


def test_fp32_is_no_tf32():
    torch.backends.cudnn.allow_tf32 = True  # torch's default
    machine.resolve_dtype("fp32", torch.device("cpu"))
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize(
    ("device", "here", "lacks"),
    [
        ("cpu", ("gcc",), r"no C\+\+ compiler \(g\+\+\)"),
        ("cuda", ("g++",), r"no C compiler \(gcc\)"),
        ("cuda", ("gcc",), r"no Python\.h \(python3-dev\)"),
    ],
)
def test_the_tools_of_compile_are_asked_for_at_the_door(monkeypatch, tmp_path, device, here, lacks):
    monkeypatch.setattr(machine.shutil, "which", lambda name: name if name in here else None)
    monkeypatch.setattr(machine.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match=f"--compile: {lacks} here"):
        machine.require_compiler(torch.device(device))
    monkeypatch.setattr(machine.shutil, "which", lambda name: name)
    (tmp_path / "Python.h").touch()
    machine.require_compiler(torch.device(device))


# ===== energy =====


def write_zone(folder, name: str, joules: float) -> None:
    folder.mkdir(exist_ok=True)
    for file, value in (("name", name), ("energy_uj", round(joules * 1e6)), ("max_energy_range_uj", 1000 * 10**6)):
        (folder / file).write_text(f"{value}\n")


def test_the_processors_energy_is_that_of_packages_and_memory_through_an_overflow(tmp_path, monkeypatch):
    """As Linux lays it out: a package, its cores (part of it) and memory (not part of it), a second package, the board.

    The counter of the second starts anew after 1,000 joules.
    """
    monkeypatch.setattr(machine, "POWERCAP", tmp_path)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    zones = {"intel-rapl:0": ("package-0", 10), "intel-rapl:0:0": ("core", 5), "intel-rapl:0:1": ("dram", 1)}
    zones |= {"intel-rapl:1": ("package-1", 990), "intel-rapl:2": ("psys", 0), "intel-rapl-mmio:0": ("package-0", 10)}
    for folder, (name, joules) in zones.items():
        write_zone(tmp_path / folder, name, joules)
    meter = machine.Meter(torch.device("cpu"))
    for folder, (name, joules) in zones.items():
        write_zone(tmp_path / folder, name, (joules + 30) % 1000)
    spent = meter.read()
    assert spent["cpu_joules"] == pytest.approx(90) and spent["seconds"] > 0 and "gpu_joules" not in spent
    assert meter.read()["cpu_joules"] == 0
    monkeypatch.setenv("LOCAL_RANK", "1")  # its neighbour counts them
    assert machine.Meter(torch.device("cpu")).read()["cpu_joules"] == 0


def test_energy_that_cannot_be_read_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "POWERCAP", tmp_path / "none")
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(name)))
    for device in ("cpu", "cuda"):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="12"))
        assert machine.Meter(torch.device(device)).read().keys() == {"seconds"}


def test_a_gpus_energy_is_that_of_the_card_with_its_uuid(tmp_path, monkeypatch):
    """NVML counts millijoules since the driver was loaded; the library is a stand-in with NVML's calls."""
    monkeypatch.setattr(machine, "POWERCAP", tmp_path)
    card = {"millijoules": 5_000_000}

    def by_uuid(uuid, handle):
        handle._obj.value = 7
        return 0 if uuid == b"GPU-12" else 6  # NVML_ERROR_NOT_FOUND

    def energy(handle, millijoules):
        millijoules._obj.value = card["millijoules"] if handle.value == 7 else 0
        return 0

    calls = {"nvmlInit_v2": lambda: 0, "nvmlDeviceGetHandleByUUID": by_uuid}
    nvml = SimpleNamespace(**calls, nvmlDeviceGetTotalEnergyConsumption=energy)
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: nvml)
    for uuid, wanted in (("12", {"seconds", "gpu_joules"}), ("34", {"seconds"})):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, uuid=uuid: SimpleNamespace(uuid=uuid))
        meter = machine.Meter(torch.device("cuda"))
        card["millijoules"] += 2_500
        spent = meter.read()
        assert spent.keys() == wanted and spent.get("gpu_joules", 2.5) == pytest.approx(2.5)


def test_a_sum_of_costs_knows_what_all_of_its_parts_know():
    first = {"seconds": 1.0, "cpu_joules": 2.0, "gpu_joules": 3.0}
    assert machine.add_costs(machine.NO_COST, first, first) == {"seconds": 2.0, "cpu_joules": 4.0, "gpu_joules": 6.0}
    assert machine.add_costs(first, {"seconds": 4.0, "gpu_joules": 1.0}) == {"seconds": 5.0, "gpu_joules": 4.0}
