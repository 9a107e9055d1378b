"""Devices and number formats are refused or resolved before work starts; a result records where it was made."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from utils import machine
from utils.cli import UserError
from utils.machine import memory_format, resolve_device, resolve_dtype


def test_auto_is_the_cpu_where_there_is_nothing_else(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")


def test_auto_prefers_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert resolve_device("auto") == torch.device("cuda")
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match="cuda:2: 2 CUDA devices here"):
        resolve_device("cuda:2")


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "meta"])
def test_an_unknown_device_is_refused_with_the_known_ones(name):
    with pytest.raises(UserError, match="use auto, cpu, cuda, cuda:N or mps"):
        resolve_device(name)


def test_auto_dtype_follows_the_hardware(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert resolve_dtype("auto", cuda) == torch.float16
    monkeypatch.setattr(machine, "cpu_has_bf16", lambda: True)
    assert resolve_dtype("auto", cpu) == torch.bfloat16
    monkeypatch.setattr(machine, "cpu_has_bf16", lambda: False)
    assert resolve_dtype("auto", cpu) == torch.float32
    assert resolve_dtype("fp32", cuda) == torch.float32
    with pytest.raises(UserError, match="use --dtype bf16 or fp32 on the CPU"):
        resolve_dtype("fp16", cpu)


def test_channels_last_goes_with_16_bit_numbers():
    assert memory_format(torch.device("cpu"), torch.bfloat16) == torch.channels_last
    assert memory_format(torch.device("cpu"), torch.float32) == torch.contiguous_format


def test_a_snapshot_is_plain_json_and_names_the_lock_and_versions():
    taken = machine.snapshot()
    assert json.loads(json.dumps(taken)) == taken
    assert len(taken["lock_sha256"]) == 64
    assert taken["packages"]["torch"].startswith("2.10.0")
    assert taken["cores"] >= 1 and taken["cpu"]


def test_a_snapshot_imports_no_torch():
    code = "import sys; from utils.machine import snapshot; snapshot(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=machine.ROOT).returncode == 0


def test_bf16_is_asked_of_the_cpu_flags(monkeypatch):
    for flags, expected in [("fpu avx512_bf16", False), ("fpu amx_bf16", True), ("fpu avx2", False), ("", False)]:
        monkeypatch.setattr(machine, "_cpuinfo", lambda flags=flags: f"model name : x\nflags : {flags}\n")
        machine.cpu_has_bf16.cache_clear()
        assert machine.cpu_has_bf16() is expected
    machine.cpu_has_bf16.cache_clear()


@pytest.mark.parametrize(("cores", "rank", "said"), [(3, "0", True), (4, "0", False), (1, "1", False)])
def test_few_cores_for_a_gpu_are_said_once(monkeypatch, capsys, cores, rank, said):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("RANK", rank)
    machine.resolve_device("cuda")
    assert ("warning: 3 CPU cores for a GPU; it will wait for them" in capsys.readouterr().err) is said
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


def test_a_numbered_gpu_is_the_one_that_libraries_get(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
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
