"""What the machine allows: operations over the fastest rate measured here, bytes over the bandwidth; and a profile."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch

SIDE, TRIES = 3072, 5  # of the square matrices whose product sets the rate
COPIED = 1 << 28  # bytes of the copy that sets the bandwidth: more than any cache
FORMATS = (torch.float32, torch.bfloat16)
SHOWN = 15  # rows of a profile
profiling = False  # set by bench.py --profile


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of the best of some large matrix products: what a network can come near, unlike the sheet."""
    a, b = (torch.randn(SIDE, SIDE, device=device).to(dtype) for _ in range(2))
    return 2 * SIDE**3 / fastest(lambda: (a @ b).sum().item())


def peak_bytes() -> float:
    """Bytes a second of the best of some large copies in the CPU's memory, read and written ones together."""
    source, target = torch.ones(2, COPIED // 4)
    return 2 * COPIED / fastest(lambda: target.copy_(source))


def fastest(work: Callable[[], object]) -> float:
    """Seconds of the best of TRIES runs after one to warm up."""
    seconds = []
    for _ in range(TRIES + 1):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def bound(flops: float, device: torch.device, a: str = "an image", formats=FORMATS) -> dict:
    """The row's fields for works a second, each of FLOPS, at the machine's best rate; every format's rate is said."""
    peaks = {str(dtype).removeprefix("torch."): peak_flops(device, dtype) for dtype in formats}
    rates = ", ".join(f"{peak / 1e9:,.0f} in {name}" for name, peak in peaks.items())
    how = f"{flops / 1e9:,.1f} GFLOP {a}, attention included, at the best rate of large matrix products"
    return {"bound": max(peaks.values()) / flops, "bound_is": f"{how} (GFLOP/s: {rates})"}


def profile_if_asked(work: Callable[[], object]) -> None:
    """With bench.py --profile: print where WORK's time goes, by the operators of torch, and leave."""
    if not profiling:
        return
    work()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=False) as found:
        started = time.perf_counter()
        work()
        seconds = time.perf_counter() - started
    averages = sorted(found.key_averages(), key=lambda one: -one.self_cpu_time_total)
    inside = sum(one.self_cpu_time_total for one in averages) / 1e6
    print(f"{seconds:.3f} s, of which {inside:.3f} s in operators of torch, the rest beside them")
    for one in averages[:SHOWN]:
        share = one.self_cpu_time_total / 1e6 / seconds
        print(f"{share:6.1%} {one.self_cpu_time_total / 1000:10.1f} ms {one.count:7} calls  {one.key}")
    sys.exit(0)
