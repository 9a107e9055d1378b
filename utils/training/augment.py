"""Colour, blur, flip and solarize on the device: a batch at a time, with every sample's own random numbers.

The reference is what DINO and t-ReX do per image with Pillow and torchvision, in this order: flip, colour jitter (its
four operations in random order), grayscale, Gaussian blur, solarize, normalise. Pillow rounds to whole grey levels
after each operation; here values stay real numbers, which is where the (tested) difference of a few levels comes from.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from utils.images import normalize
from utils.training.random_numbers import uniforms

LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R 601-2, as Pillow's mode L
SOLARIZE_THRESHOLD = 128  # Pillow's default
BLUR_RADIUS = (0.1, 2.0)  # standard deviation in pixels: DINO and t-ReX
BLUR_PASSES = 3  # boxes that make a Gaussian: Pillow's
BLUR_REACH = 6  # pixels, of three boxes of deviation 2
ORDERS = np.array(list(itertools.permutations(range(4))))  # of brightness, contrast, saturation, hue
JITTER = ("brightness", "contrast", "saturation", "hue")
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


@dataclass(frozen=True)
class AugmentSpec:
    """Probabilities (0..1) of each operation, and the strengths of colour jitter as torchvision defines them."""

    flip: float = 0.0
    jitter: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    grayscale: float = 0.0
    blur: float = 0.0
    solarize: float = 0.0


def augmentations(recipe: Mapping[str, Any]) -> list[AugmentSpec]:
    """The recipe's, one entry a crop size: global ones first, then local ones if it has any."""
    shared = {key: recipe[key] for key in ("flip", "jitter", *JITTER, "grayscale")}
    views = [AugmentSpec(**shared, blur=recipe["global_blur"], solarize=recipe["global_solarize"])]
    if recipe["local_count"]:
        views.append(AugmentSpec(**shared, blur=recipe["local_blur"], solarize=recipe["local_solarize"]))
    return views


@dataclass(frozen=True)
class Draws:
    """What happens to each of N images; numpy, drawn on the host so that no kernel waits for the device."""

    flip: np.ndarray  # (N,) bool
    order: np.ndarray  # (N, 4) operation done first, second, ...
    factors: np.ndarray  # (N, 4) by operation: 1 (hue: 0) leaves the image alone
    grayscale: np.ndarray  # (N,) bool
    blur: np.ndarray  # (N,) standard deviation in pixels, 0 = none
    solarize: np.ndarray  # (N,) bool


def random_draws(
    spec: AugmentSpec, purpose: str, seed: int, epochs: np.ndarray, samples: np.ndarray, crops: int
) -> Draws:
    """Random parameters for `crops` crops of each sample: N = len(samples) * crops, a sample's crops side by side."""
    u = uniforms(12 * crops, purpose, seed, epochs, samples).reshape(-1, 12)  # (N, 12)
    jittered = u[:, 1] < spec.jitter
    strengths = np.array([spec.brightness, spec.contrast, spec.saturation, spec.hue])
    low = np.maximum(0.0, 1 - strengths)
    high = 1 + strengths
    low[HUE], high[HUE] = -spec.hue, spec.hue
    neutral = np.array([1.0, 1.0, 1.0, 0.0])
    factors = np.where(jittered[:, None], low + (high - low) * u[:, 2:6], neutral)
    radius = BLUR_RADIUS[0] + (BLUR_RADIUS[1] - BLUR_RADIUS[0]) * u[:, 9]
    return Draws(
        flip=u[:, 0] < spec.flip,
        order=ORDERS[(u[:, 6] * len(ORDERS)).astype(int)],
        factors=factors,
        grayscale=u[:, 7] < spec.grayscale,
        blur=np.where(u[:, 8] < spec.blur, radius, 0.0),
        solarize=u[:, 10] < spec.solarize,
    )


def augment(images: torch.Tensor, draws: Draws) -> torch.Tensor:
    """uint8 (N, 3, H, W) on any device -> float32 (N, 3, H, W), augmented and normalised by ImageNet's statistics."""
    images = _where(draws.flip, images, lambda rows: rows.flip(-1))
    touched = (draws.factors != [1.0, 1.0, 1.0, 0.0]).any() or draws.grayscale.any() or draws.blur.any()
    if not touched and not draws.solarize.any():
        return normalize(images)
    values = images.float() / 255  # 0..1
    values = _jitter(values, draws)
    values = _where(draws.grayscale, values, lambda chosen: _luminance(chosen).expand_as(chosen))
    blurred = draws.blur > 0
    if blurred.any():
        values = _where(blurred, values, lambda chosen: gaussian_blur(chosen, draws.blur[blurred]))
    threshold = (SOLARIZE_THRESHOLD - 0.5) / 255  # half way to the level below: values are not rounded
    values = _where(draws.solarize, values, lambda chosen: torch.where(chosen >= threshold, 1 - chosen, chosen))
    return normalize(values * 255)


def _where(chosen: np.ndarray, values: torch.Tensor, operation) -> torch.Tensor:
    """Apply OPERATION to the rows of VALUES that CHOSEN (N,) marks."""
    if not chosen.any():
        return values
    rows = torch.from_numpy(np.flatnonzero(chosen)).to(values.device, non_blocking=True)
    return values.index_copy(0, rows, operation(values.index_select(0, rows)).contiguous())


def _luminance(values: torch.Tensor) -> torch.Tensor:
    """(N, 3, H, W) -> (N, 1, H, W)"""
    red, green, blue = values.unbind(1)
    return (LUMINANCE[0] * red + LUMINANCE[1] * green + LUMINANCE[2] * blue).unsqueeze(1)


def _jitter(values: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Colour jitter on 0..1 values.

    Brightness, contrast and saturation are one formula, clamp(f x + (1 - f) target), with target black, the image's
    mean grey, or each pixel's grey: one pass a place in the order, whatever operation each sample has there.
    """
    for place in range(4):
        operation = draws.order[:, place]
        factor = np.take_along_axis(draws.factors, operation[:, None], 1)[:, 0]
        hue = (operation == HUE) & (factor != 0)
        blend = (operation != HUE) & (factor != 1)
        if blend.any():
            values = _where(blend, values, lambda rows, o=operation[blend], f=factor[blend]: _blend(rows, o, f))
        if hue.any():
            values = _where(hue, values, lambda rows, shift=factor[hue]: shift_hue(rows, shift))
    return values


def _blend(values: torch.Tensor, operation: np.ndarray, factor: np.ndarray) -> torch.Tensor:
    grey = _luminance(values)
    # Weights of the two targets; brightness has neither, its target is black.
    column = np.stack([factor, (1 - factor) * (operation == CONTRAST), (1 - factor) * (operation == SATURATION)])
    weights = torch.from_numpy(column.astype(np.float32)).to(values.device, non_blocking=True)
    f, contrast, saturation = weights[:, :, None, None, None]
    target = contrast * grey.mean((2, 3), keepdim=True) + saturation * grey
    return (f * values + target).clamp_(0, 1)


def shift_hue(values: torch.Tensor, shift: np.ndarray) -> torch.Tensor:
    """Rotate the hue of RGB 0..1 values by shift (N,) turns, -0.5..0.5: through HSV, as Pillow and torchvision."""
    red, green, blue = values.unbind(1)
    high, _ = values.max(1)
    low, _ = values.min(1)
    chroma = high - low
    safe = torch.where(chroma == 0, 1.0, chroma)
    sector = torch.where(
        high == red,
        (green - blue) / safe,
        torch.where(high == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )  # in sixths of a turn
    turn = torch.from_numpy(shift.astype(np.float32)).to(values.device, non_blocking=True).view(-1, 1, 1) * 6
    # Channel n of HSV -> RGB: v - chroma * clamp(min(k, 4 - k), 0, 1) with k = (n + sector) mod 6, n = 5, 3, 1.
    channels = []
    for n in (5, 3, 1):
        k = torch.remainder(n + sector + turn, 6)
        channels.append(high - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, 1)


def gaussian_blur(values: torch.Tensor, deviation: np.ndarray) -> torch.Tensor:
    """Blur (N, 3, H, W) by a Gaussian of deviation (N,) pixels, edges repeated: by three boxes, as Pillow.

    Two batched matrix products with banded matrices: at these sizes cheaper than N different convolutions.
    """
    taps = torch.from_numpy(blur_taps(deviation).astype(np.float32)).to(values.device, non_blocking=True)
    rows, columns = ((taps @ _shifts(size, values.device)).view(-1, size, size) for size in values.shape[2:])
    return rows[:, None] @ values @ columns[:, None].transpose(2, 3)


def blur_taps(deviation: np.ndarray) -> np.ndarray:
    """(N, 2 BLUR_REACH + 1) weights of a Gaussian blur of deviation (N,) pixels, made of BLUR_PASSES extended boxes.

    An extended box is 1 within its whole radius and a fraction at the pixel beyond, chosen so that the deviation is
    exact however small (Gwosdek et al., Theoretical Foundations of Gaussian Convolution by Extended Box Filtering,
    SSVM 2011): a Gaussian sampled at whole pixels would blur less than asked below 0.4.
    """
    variance = np.asarray(deviation, np.float64) ** 2 / BLUR_PASSES
    whole = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    distance = np.abs(np.arange(-BLUR_REACH, BLUR_REACH + 1))[None, :]
    inside, beyond = distance <= whole[:, None], distance == whole[:, None] + 1
    box = (inside + beyond * part[:, None]) / (2 * (whole + part) + 1)[:, None]
    spectrum = np.fft.rfft(np.fft.ifftshift(box, axes=1)) ** BLUR_PASSES
    return np.fft.fftshift(np.fft.irfft(spectrum, box.shape[1]), axes=1)


@lru_cache
def _shifts(size: int, device: torch.device) -> torch.Tensor:
    """(2 BLUR_REACH + 1, size * size): for each tap the matrix that shifts a line, whose ends are repeated."""
    taps, place = np.ogrid[: 2 * BLUR_REACH + 1, :size]
    matrices = np.zeros((2 * BLUR_REACH + 1, size, size), np.float32)
    np.put_along_axis(matrices, np.clip(place + taps - BLUR_REACH, 0, size - 1)[:, :, None], 1, axis=2)
    with torch.inference_mode(False):
        return torch.from_numpy(matrices).flatten(1).to(device)
