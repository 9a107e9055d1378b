"""What the arithmetic allows: floating-point operations of a piece of work over the fastest rate measured here."""

from __future__ import annotations

import time

import torch

SIDE, TRIES = 3072, 5  # of the square matrices whose product sets the rate


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of the best of some large matrix products: what a network can come near, unlike the sheet."""
    a, b = (torch.randn(SIDE, SIDE, device=device).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(TRIES + 1):
        started = time.perf_counter()
        (a @ b).sum().item()
        best = max(best, 2 * SIDE**3 / (time.perf_counter() - started))
    return best


def bound(flops_an_image: float, device: torch.device, dtype: torch.dtype) -> dict:
    """The row's fields for images/s at the peak rate."""
    peak = peak_flops(device, dtype)
    how = f"{flops_an_image / 1e9:,.1f} GFLOP an image at {peak / 1e9:,.0f} GFLOP/s, the best of large matrix products"
    return {"bound": peak / flops_an_image, "bound_is": f"{how} in {str(dtype).removeprefix('torch.')} here"}
