"""Colour, blur, flip and solarize on the device: a batch at a time, with every sample's own random numbers.

The reference is what DINO and t-ReX do per image with Pillow and torchvision, in this order: flip, colour jitter (its
four operations in random order), grayscale, Gaussian blur, solarize, normalise. Pillow rounds to whole grey levels
after each operation; here values stay real numbers, which is where the (tested) difference of a few levels comes from.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from utils.images import normalize
from utils.training.random_numbers import uniforms

LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R 601-2, as Pillow's mode L
SHORTEST_ROW = 64  # pixels; shorter rows would have more parameters than pixels
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


@dataclass(frozen=True)
class Rows:
    """Where batches of images lie when all their pixels are (rows, LENGTH, 3), one batch after the other."""

    shapes: list[tuple[int, int, int]]  # (n, H, W) of each batch
    length: int  # pixels, so many that each image takes whole rows

    @property
    def sizes(self) -> list[int]:
        """Rows of each batch."""
        return [n * height * width // self.length for n, height, width in self.shapes]

    def batches(self, values: torch.Tensor) -> list[torch.Tensor]:
        """(rows, LENGTH, 3) -> views (n, H, W, 3) of each batch."""
        return [part.view(*shape, 3) for part, shape in zip(values.split(self.sizes), self.shapes, strict=True)]

    def by_image(self, values: torch.Tensor) -> list[torch.Tensor]:
        """(rows, ...) -> views (n, values of an image) of each batch."""
        return [part.view(shape[0], -1) for part, shape in zip(values.split(self.sizes), self.shapes, strict=True)]


def augment(images: torch.Tensor, draws: Draws) -> torch.Tensor:
    """uint8 (N, 3, H, W) on any device -> float32 (N, 3, H, W), augmented and normalised by ImageNet's statistics.

    Every image goes through every operation, most of them with parameters that change nothing: some dozens of kernels
    for the whole batch instead of several hundred for its parts. In and out are best channels_last, as all is between.
    """
    return augment_views([images], [draws])[0]


def augment_views(views: Sequence[torch.Tensor], draws: Sequence[Draws]) -> list[torch.Tensor]:
    """`augment` of several batches, each of images of one size, by common kernels where their sizes allow it.

    All pixels then lie in rows of a length that divides every image, and a row has its image's parameters. The numbers
    are those of one batch after the other.
    """
    length = math.gcd(*(view[0, 0].numel() for view in views))  # 1024 for crops of 224 and 96
    same_work = all(draw.factors[:, HUE].any() for draw in draws)  # a batch is spared what none of its images needs
    if len(views) > 1 and (length < SHORTEST_ROW or not same_work):
        return [augment(view, draw) for view, draw in zip(views, draws, strict=True)]
    rows, device = Rows([(len(view), *view.shape[2:]) for view in views], length), views[0].device
    tables = [np.repeat(_table(draw), size // len(draw.flip), 0) for draw, size in zip(draws, rows.sizes, strict=True)]
    parameters = _sent(np.concatenate(tables).T, device)[..., None]  # (22, rows, 1)

    pixels = torch.empty(sum(rows.sizes), length, 3, dtype=torch.uint8, device=device)
    mirrored = rows.by_image(parameters[0])
    for view, draw, flip, slot in zip(views, draws, mirrored, rows.batches(pixels), strict=True):
        upright = view.permute(0, 2, 3, 1)
        if draw.flip.any():
            torch.where(flip[:, :1, None, None] > 0, upright.flip(2), upright, out=slot)
        else:
            slot.copy_(upright)
    values = _changed(pixels, rows, draws, parameters[1:])
    normalized = normalize(values[:, :, None].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return [part.permute(0, 3, 1, 2) for part in rows.batches(normalized)]


def _changed(pixels: torch.Tensor, rows: Rows, draws: Sequence[Draws], parameters: torch.Tensor) -> torch.Tensor:
    """Everything but the flip: uint8 (rows, length, 3) -> 0..255 in the same shape; PARAMETERS as in _table."""
    jitter = any((draw.factors != NEUTRAL).any() for draw in draws)
    gray, blur, solar = (any(getattr(draw, name).any() for draw in draws) for name in ("grayscale", "blur", "solarize"))
    if not (jitter or gray or blur or solar):
        return pixels
    values = pixels / 255  # 0..1
    luminance, _ = _constants(values.device)
    grayscale, threshold, shift, *blends = parameters  # (rows, 1) each
    if jitter:
        for slot in range(6):
            if slot == 3 and any(draw.factors[:, HUE].any() for draw in draws):
                values = shift_hue(values, shift)
            values = _blend(values, rows, luminance, blends[3 * slot : 3 * slot + 3])
    if gray:
        values = torch.where(grayscale[..., None] > 0, (values @ luminance)[..., None], values)
    if blur:
        _blur_some(rows.batches(values), [draw.blur for draw in draws])
    for its, level, draw in zip(rows.batches(values), rows.by_image(threshold), draws, strict=True):
        if draw.solarize.any():
            torch.where(its >= level[:, :1, None, None], 1 - its, its, out=its)
    return values.mul_(255)


def _sent(values: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(device, non_blocking=True)


def _table(draws: Draws) -> np.ndarray:
    """(N, 4 + 6 * 3) float32: flip, grayscale, the level from which on pixels are solarized, the turn of hue in sixths,
    and the three weights of _blend before and after hue.

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
    threshold = np.where(draws.solarize, (SOLARIZE_THRESHOLD - 0.5) / 255, np.inf)  # half way to the level below
    single = np.stack([draws.flip, draws.grayscale, threshold, 6 * draws.factors[:, HUE].astype(np.float32)], 1)
    return np.concatenate([single, blends.reshape(n, 18)], 1).astype(np.float32)


def _blend(values: torch.Tensor, rows: Rows, luminance: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Brightness, contrast and saturation are one formula: clamp(f x + (1 - f) target).

    The target is black, the image's mean grey, or each pixel's grey; WEIGHTS are f and those of the two greys.
    """
    factor, contrast, saturation = weights  # (rows, 1) each
    grey = values @ luminance  # (rows, length)
    level = torch.empty_like(contrast)
    for slot, weight, its in zip(*map(rows.by_image, (level, contrast, grey)), strict=True):
        torch.mul(weight, its.mean(1, keepdim=True), out=slot)
    target = torch.addcmul(level, saturation, grey)
    return torch.addcmul(target[..., None], factor[..., None], values).clamp_(0, 1)


def shift_hue(values: torch.Tensor, sixths: torch.Tensor) -> torch.Tensor:
    """Rotate the hue of RGB 0..1 (N, P, 3) by SIXTHS (N, 1) of a turn, -3..3: through HSV, as torchvision."""
    high, channel = values.max(-1)  # of equals the first
    chroma = high - values.amin(-1)
    around = torch.cat([values, values[..., :2]], -1)
    sides = around[..., 1:4] - around[..., 2:5]  # green - blue, blue - red, red - green
    sector = torch.gather(sides, -1, channel[..., None])[..., 0] / chroma.clamp_min(1e-30)  # of grey: 0
    sector = torch.add(sector, channel, alpha=2) + sixths
    # Channel n of HSV -> RGB: v - chroma * clamp(min(k, 4 - k), 0, 1) with k = (n + sector) mod 6, n = 5, 3, 1.
    _, n = _constants(values.device)
    k = torch.remainder(sector[..., None] + n, 6)
    return high[..., None] - chroma[..., None] * torch.minimum(k, 4 - k).clamp_(0, 1)


def _blur_some(batches: Sequence[torch.Tensor], deviations: Sequence[np.ndarray]) -> None:
    """Blur, in place, the images (n, H, W, 3) of BATCHES whose deviation (n,) is not 0."""
    chosen = [np.flatnonzero(deviation) for deviation in deviations]
    counts = [len(places) for places in chosen]
    taps = blur_taps(np.concatenate([of[places] for of, places in zip(deviations, chosen, strict=True)]))
    sent = (_sent(part, batches[0].device).split(counts) for part in (np.concatenate(chosen), taps.astype(np.float32)))
    for images, where, of in zip(batches, *sent, strict=True):
        if len(where):
            images.index_copy_(0, where, gaussian_blur(images.index_select(0, where), of))


def gaussian_blur(values: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    """Blur square images (N, S, S, 3), edges repeated, by the weights TAPS (N, 2 BLUR_REACH + 1) of `blur_taps`.

    Two batched matrix products with banded matrices: at these sizes cheaper than N different convolutions.
    """
    size = values.shape[1]
    matrices = (taps @ _shifts(size, values.device)).view(-1, size, size)
    for _ in range(2):  # rows, then columns, each as the first of two axes
        values = (matrices @ values.flatten(2)).view(values.shape).transpose(1, 2)
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
