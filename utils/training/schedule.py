"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math


def scaled_lr(base_lr: float, batch_size: int) -> float:
    """Linear scaling rule, lr = base_lr x batch / 256 (Goyal et al., 2017; t-ReX defaults)."""
    return base_lr * batch_size / 256


def learning_rate(step: int, total_steps: int, warmup_steps: int, peak: float, final: float) -> float:
    """Linear warm-up to PEAK over WARMUP_STEPS, then half a cosine down to FINAL at the last step.

    step counts optimizer steps from 0; total_steps may be at most warmup_steps, the run then ends in the warm-up.
    """
    if not 0 <= step < total_steps:
        raise ValueError(f"step {step} is outside 0..{total_steps - 1}")
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)  # 0..1
    return final + (peak - final) * (1 + math.cos(math.pi * progress)) / 2
