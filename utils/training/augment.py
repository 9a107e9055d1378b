"""Colour, blur, flip and solarize on the device: a batch at a time, with every sample's own random numbers.

The reference is what DINO and t-ReX do per image with Pillow and torchvision, in this order: flip, colour jitter (its
four operations in random order), grayscale, Gaussian blur, solarize, normalise. Pillow rounds to whole grey levels
after each operation; here values stay real numbers, which is where the (tested) difference of a few levels comes from.
"""

import itertools
from collections.abc import Mapping, Sequence
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
BLURS, SOLARIZES = ("global_blur", "local_blur"), ("global_solarize", "local_solarize")  # probabilities by view
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
NEUTRAL = np.array([1.0, 1.0, 1.0, 0.0])  # factors of jitter that change nothing


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
    recipe: Mapping[str, Any], view: int, seed: int, epochs: np.ndarray, samples: np.ndarray, crops: int
) -> Draws:
    """Random parameters by RECIPE for `crops` crops of each sample, a sample's side by side: N = len(samples) * crops.

    VIEW 0 are the global crops, 1 the local ones, which differ in blur and solarize. Colour jitter as in torchvision.
    """
    u = uniforms(12 * crops, f"view{view}", seed, epochs, samples).reshape(-1, 12)  # (N, 12)
    jittered = u[:, 1] < recipe["jitter"]
    strengths = np.array([recipe["brightness"], recipe["contrast"], recipe["saturation"], recipe["hue"]])
    low = np.maximum(0.0, 1 - strengths)
    high = 1 + strengths
    low[HUE], high[HUE] = -recipe["hue"], recipe["hue"]
    factors = np.where(jittered[:, None], low + (high - low) * u[:, 2:6], NEUTRAL)
    radius = BLUR_RADIUS[0] + (BLUR_RADIUS[1] - BLUR_RADIUS[0]) * u[:, 9]
    return Draws(
        flip=u[:, 0] < recipe["flip"],
        order=ORDERS[(u[:, 6] * len(ORDERS)).astype(int)],
        factors=factors,
        grayscale=u[:, 7] < recipe["grayscale"],
        blur=np.where(u[:, 8] < recipe[BLURS[view]], radius, 0.0),
        solarize=u[:, 10] < recipe[SOLARIZES[view]],
    )


def augment(images: torch.Tensor, draws: Draws) -> torch.Tensor:
    """uint8 (N, 3, H, W) on any device -> float32 (N, 3, H, W), augmented and normalised by ImageNet's statistics.

    Every image goes through every operation, most of them with parameters that change nothing: a hundred kernels for
    the whole batch instead of several hundred for its parts. In and out are best channels_last, as all is between.
    """
    neutral = (draws.factors == NEUTRAL).all() and not (draws.grayscale.any() or draws.blur.any())
    parameters = torch.from_numpy(_table(draws)).to(images.device, non_blocking=True)
    flip, grayscale, solarize, shift, *blends = parameters.view(*parameters.shape, 1, 1, 1).unbind(1)  # (N, 1, 1, 1)
    pixels = images.permute(0, 2, 3, 1)  # (N, H, W, 3)
    if draws.flip.any():
        pixels = torch.where(flip > 0, pixels.flip(2), pixels)
    if neutral and not draws.solarize.any():
        return normalize(pixels.permute(0, 3, 1, 2))
    values = pixels.contiguous().float() / 255  # 0..1
    if not neutral:
        luminance, _ = _constants(images.device)
        for slot in range(6):
            if slot == 3 and draws.factors[:, HUE].any():
                values = shift_hue(values, shift[..., 0])
            values = _blend(values, luminance, blends[3 * slot : 3 * slot + 3])
        if draws.grayscale.any():
            values = torch.where(grayscale > 0, (values @ luminance)[..., None], values)
        if (rows := np.flatnonzero(draws.blur)).size:
            chosen = torch.from_numpy(rows).to(images.device, non_blocking=True)
            values.index_copy_(0, chosen, gaussian_blur(values.index_select(0, chosen), draws.blur[rows]))
    if draws.solarize.any():
        threshold = (SOLARIZE_THRESHOLD - 0.5) / 255  # half way to the level below: values are not rounded
        values = torch.where((solarize > 0) & (values >= threshold), 1 - values, values)
    return normalize(values.mul_(255).permute(0, 3, 1, 2))


def _table(draws: Draws) -> np.ndarray:
    """(N, 4 + 6 * 3) float32: flip, grayscale, solarize, hue, and the three weights of _blend before and after hue.

    Each image has three of the six blends in its own order, those before hue among the first three; the other three are
    (1, 0, 0), which changes nothing.
    """
    n = len(draws.flip)
    blends = np.tile(np.array([1.0, 0.0, 0.0]), (n, 6, 1))
    place_of_hue = (draws.order == HUE).argmax(1)
    others = draws.order[draws.order != HUE].reshape(n, 3)
    for place in range(3):
        operation = others[:, place]
        factor = draws.factors[np.arange(n), operation]
        weights = [factor, (1 - factor) * (operation == CONTRAST), (1 - factor) * (operation == SATURATION)]
        blends[np.arange(n), place + 3 * (place >= place_of_hue)] = np.stack(weights, 1)
    single = np.stack([draws.flip, draws.grayscale, draws.solarize, draws.factors[:, HUE]], 1)
    return np.concatenate([single, blends.reshape(n, 18)], 1).astype(np.float32)


def _blend(values: torch.Tensor, luminance: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Brightness, contrast and saturation are one formula: clamp(f x + (1 - f) target).

    The target is black, the image's mean grey, or each pixel's grey; WEIGHTS are f and those of the two greys.
    """
    factor, contrast, saturation = weights
    grey = values @ luminance  # (N, H, W)
    target = torch.addcmul(contrast[..., 0] * grey.mean((1, 2), keepdim=True), saturation[..., 0], grey)
    return torch.addcmul(target[..., None], factor, values).clamp_(0, 1)


def shift_hue(values: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Rotate the hue of RGB 0..1 (N, H, W, 3) by SHIFT (N, 1, 1) turns, -0.5..0.5: through HSV, as torchvision."""
    red, green, blue = values.unbind(-1)
    high = values.amax(-1)
    chroma = high - values.amin(-1)
    safe = torch.where(chroma == 0, 1.0, chroma)
    of_green, of_blue = 2 + (blue - red) / safe, 4 + (red - green) / safe  # in sixths of a turn
    sector = torch.where(high == red, (green - blue) / safe, torch.where(high == green, of_green, of_blue))
    # Channel n of HSV -> RGB: v - chroma * clamp(min(k, 4 - k), 0, 1) with k = (n + sector) mod 6, n = 5, 3, 1.
    _, n = _constants(values.device)
    k = torch.remainder((sector + 6 * shift)[..., None] + n, 6)
    return high[..., None] - chroma[..., None] * torch.minimum(k, 4 - k).clamp_(0, 1)


def gaussian_blur(values: torch.Tensor, deviation: np.ndarray) -> torch.Tensor:
    """Blur (N, H, W, 3) by a Gaussian of deviation (N,) pixels, edges repeated: by three boxes, as Pillow.

    Two batched matrix products with banded matrices: at these sizes cheaper than N different convolutions.
    """
    taps = torch.from_numpy(blur_taps(deviation).astype(np.float32)).to(values.device, non_blocking=True)
    for _ in range(2):  # rows, then columns, each as the first of two axes
        size = values.shape[1]
        values = ((taps @ _shifts(size, values.device)).view(-1, size, size) @ values.flatten(2)).view(values.shape)
        values = values.transpose(1, 2).contiguous()
    return values


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
def _constants(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(LUMINANCE, the three numbers of shift_hue), made once a device."""
    with torch.inference_mode(False):
        luminance, n = (torch.from_numpy(np.array(values, np.float32)) for values in (LUMINANCE, (5, 3, 1)))
        return luminance.to(device), n.to(device)


@lru_cache
def _shifts(size: int, device: torch.device) -> torch.Tensor:
    """(2 BLUR_REACH + 1, size * size): for each tap the matrix that shifts a line, whose ends are repeated."""
    taps, place = np.ogrid[: 2 * BLUR_REACH + 1, :size]
    matrices = np.zeros((2 * BLUR_REACH + 1, size, size), np.float32)
    np.put_along_axis(matrices, np.clip(place + taps - BLUR_REACH, 0, size - 1)[:, :, None], 1, axis=2)
    with torch.inference_mode(False):
        return torch.from_numpy(matrices).flatten(1).to(device)
