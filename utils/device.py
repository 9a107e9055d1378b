"""Where and in which number format tensors live: device and dtype are arguments, the code path is one."""

from __future__ import annotations

import torch

from utils.cli import UserError
from utils.environment import cpu_has_bf16

DTYPES = ("auto", "fp16", "bf16", "fp32")


def resolve_device(name: str) -> torch.device:
    """`auto` is the first CUDA device, else Apple's MPS, else the CPU. Under DDP the caller passes cuda:LOCAL_RANK."""
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        else:
            name = "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: unknown; use auto, cpu, cuda, cuda:N or mps") from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name}: unsupported; use auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UserError(f"--device {name}: {count} CUDA devices here; use --device cpu or check the driver")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: not available here; use --device cpu")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is fp16 on CUDA, bf16 on CPUs with AMX, else fp32."""
    if name == "auto":
        if device.type == "cuda":
            return torch.float16
        return torch.bfloat16 if device.type == "cpu" and cpu_has_bf16() else torch.float32
    if name == "fp16" and device.type == "cpu":
        raise UserError("--dtype fp16: half precision needs a GPU; use --dtype bf16 or fp32 on the CPU")
    return {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[name]


def memory_format(device: torch.device, dtype: torch.dtype) -> torch.memory_format:
    """channels_last where convolutions gain from it: on CUDA with 16-bit numbers and on CPUs with bf16."""
    sixteen_bit = dtype in (torch.float16, torch.bfloat16)
    return torch.channels_last if sixteen_bit and device.type in ("cpu", "cuda") else torch.contiguous_format
