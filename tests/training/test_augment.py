"""Batched augmentations against the per-image references: Pillow's (what DINO and t-ReX run) and torchvision's.

Values here stay real numbers where Pillow rounds to 1/255 after each operation. So: equal to torchvision's float
operations to 1e-5, and to Pillow's chain within a few grey levels (stated at each test).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import functional as reference

import train
from utils.images import _statistics, normalize
from utils.training import augment as ours
from utils.training.augment import BRIGHTNESS, CONTRAST, HUE, SATURATION, Draws

N, SIZE = 6, 40
PAPER = train.PAPER | {"local_solarize": 0.2}  # view 1: every operation


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """(N, 3, SIZE, SIZE) uint8: smooth shapes with some noise, as photographs have, and full range."""
    rng = np.random.default_rng(0)
    batch = []
    for _ in range(N):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((SIZE, SIZE), 3)
        noise = rng.integers(-12, 13, (SIZE, SIZE, 3))
        batch.append((np.asarray(coarse).astype(int) + noise).clip(0, 255).astype(np.uint8))
    return torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2)


def nothing(n: int = N) -> dict:
    no = np.zeros(n, dtype=bool)
    order = np.tile([BRIGHTNESS, CONTRAST, SATURATION, HUE], (n, 1))
    factors = np.tile([1.0, 1.0, 1.0, 0.0], (n, 1))
    return {"flip": no, "order": order, "factors": factors, "grayscale": no, "blur": np.zeros(n), "solarize": no}


def levels(normalized: torch.Tensor) -> torch.Tensor:
    """Undo normalize: 0..255."""
    zero, one = (normalize(torch.full((1, 3, 1, 1), value, dtype=torch.uint8)) for value in (0, 255))
    return (normalized - zero) / (one - zero) * 255


def test_without_operations_the_batch_is_only_normalised(images):
    assert torch.equal(ours.augment(images, Draws(**nothing())), normalize(images))


def test_normalisation_under_inference_leaves_gradients_possible_later(images):
    """Its statistics are kept: those that validation made first must serve training."""
    _statistics.cache_clear()
    with torch.inference_mode():
        wanted = normalize(images)
    values = images.float().requires_grad_()
    normalize(values).sum().backward()
    assert torch.equal(normalize(images), wanted) and values.grad[0, 0, 0, 0] == pytest.approx(1 / (0.229 * 255))


@pytest.mark.parametrize(
    ("operation", "function", "low", "high"),
    [
        (BRIGHTNESS, reference.adjust_brightness, 0.6, 1.4),
        (CONTRAST, reference.adjust_contrast, 0.6, 1.4),
        (SATURATION, reference.adjust_saturation, 0.8, 1.2),
        (HUE, reference.adjust_hue, -0.1, 0.1),
    ],
)
def test_each_jitter_operation_equals_torchvision_on_floats(images, operation, function, low, high):
    draws = nothing()
    draws["factors"] = draws["factors"].copy()
    draws["factors"][:, operation] = np.linspace(low, high, N)
    found = levels(ours.augment(images, Draws(**draws))) / 255
    for image, factor, result in zip(images.float() / 255, draws["factors"][:, operation], found, strict=True):
        # torchvision's luminance weights are 0.2989, 0.587, 0.114 (sum 0.9999); ours are Pillow's 0.299.
        torch.testing.assert_close(result, function(image, factor), atol=1e-4, rtol=0)


def test_flip_grayscale_solarize_touch_the_marked_samples_only(images):
    marked = np.array([True, False] * (N // 2))
    for name, function in (
        ("flip", ImageOps.mirror),
        ("grayscale", lambda image: image.convert("L").convert("RGB")),
        ("solarize", ImageOps.solarize),
    ):
        found = levels(ours.augment(images, Draws(**nothing() | {name: marked})))
        for image, result, is_marked in zip(images, found, marked, strict=True):
            picture = Image.fromarray(image.permute(1, 2, 0).numpy())
            wanted = np.asarray(function(picture) if is_marked else picture).astype(float)
            # Pillow rounds grey values; flip and solarize are exact
            limit = 1.0 if name == "grayscale" else 0.01
            assert np.abs(result.permute(1, 2, 0).numpy() - wanted).max() < limit, name


def test_blur_equals_pillow(images):
    """Pillow rounds to whole levels after each of its six passes, and repeats the edge before each."""
    for radius in (np.linspace(0.1, 0.45, N), np.linspace(0.5, 2.0, N)):
        found = levels(ours.augment(images, Draws(**nothing() | {"blur": radius})))
        for image, sigma, result in zip(images, radius, found, strict=True):
            picture = Image.fromarray(image.permute(1, 2, 0).numpy()).filter(ImageFilter.GaussianBlur(float(sigma)))
            difference = np.abs(result.permute(1, 2, 0).numpy() - np.asarray(picture).astype(float))
            assert difference.mean() < 1.0 and difference.max() < 4.5, sigma  # grey levels


def test_a_blurs_weights_have_the_deviation_asked_for():
    deviation = np.linspace(0.1, 2.0, 200)
    taps = ours.blur_taps(deviation)
    offsets = np.arange(-ours.BLUR_REACH, ours.BLUR_REACH + 1)
    assert np.allclose(taps.sum(1), 1) and taps.min() > -1e-12 and np.allclose(taps, taps[:, ::-1])
    assert np.allclose((taps * offsets**2).sum(1), deviation**2, rtol=1e-9)


def test_blur_equals_three_float64_convolutions_by_boxes(images):
    """The same boxes drawn by hand: of deviation 1.2 / sqrt(3) and 2 / sqrt(3), whole radius 0 and 1."""
    boxes = {1.2: [0.24, 0.52, 0.24], 2.0: [0.1, 4 / 15, 4 / 15, 4 / 15, 0.1]}
    taps = torch.from_numpy(ours.blur_taps(np.array(list(boxes)))).float()
    found = ours.gaussian_blur(images[:2].permute(0, 2, 3, 1).float(), taps).permute(0, 3, 1, 2)
    for image, box, result in zip(images[:2].double().numpy(), boxes.values(), found, strict=True):
        wanted = np.pad(image, ((0, 0), (6, 6), (6, 6)), mode="edge")
        for axis in (1, 1, 1, 2, 2, 2):
            wanted = np.apply_along_axis(np.convolve, axis, wanted, box, "valid")
        margin = 3 if len(box) == 3 else 0  # three boxes of three reach three pixels, not six
        wanted = wanted[:, margin : margin + SIZE, margin : margin + SIZE]
        np.testing.assert_allclose(result.numpy(), wanted, atol=2e-4)  # of 0..255


def test_the_whole_chain_equals_pillow_per_image(images):
    """Random parameters from `random_draws`, then the reference's own steps one image after the other."""
    repeat = 8
    batch = images.repeat(repeat, 1, 1, 1)
    samples = np.arange(len(batch))
    draws = ours.random_draws(PAPER, 1, 3, np.zeros_like(samples), samples, 1)
    assert draws.flip.any() and draws.grayscale.any() and draws.solarize.any() and (draws.blur > 0).any()
    found = levels(ours.augment(batch, draws)).permute(0, 2, 3, 1).numpy()
    differences = []
    for i in range(len(batch)):
        picture = Image.fromarray(batch[i].permute(1, 2, 0).numpy())
        if draws.flip[i]:
            picture = ImageOps.mirror(picture)
        functions = (reference.adjust_brightness, reference.adjust_contrast, reference.adjust_saturation)
        for operation in draws.order[i]:
            function = reference.adjust_hue if operation == HUE else functions[operation]
            picture = function(picture, float(draws.factors[i, operation]))
        if draws.grayscale[i]:
            picture = ImageOps.grayscale(picture).convert("RGB")
        if draws.blur[i] > 0:
            picture = picture.filter(ImageFilter.GaussianBlur(float(draws.blur[i])))
        before = np.asarray(picture).astype(float)
        if draws.solarize[i]:
            picture = ImageOps.solarize(picture)
        difference = np.abs(found[i] - np.asarray(picture).astype(float))
        # A pixel a few levels from solarize's threshold may fall on its other side: compare the others.
        keep = np.abs(before - 127.5) > 8 if draws.solarize[i] else np.ones_like(difference, dtype=bool)
        differences.append(difference[keep])
    everything = np.concatenate([values.ravel() for values in differences])
    # Mean within 1.5 grey levels, 99 % of pixels within 6: Pillow rounds at each of up to seven operations, its hue
    # has 256 steps, and its blur repeats boxes.
    assert everything.mean() < 1.5 and np.quantile(everything, 0.99) < 6


def test_batches_stay_channels_last(images):
    """What the loader delivers, and what convolutions take: no copy in between."""
    batch = images.contiguous(memory_format=torch.channels_last)
    samples = np.arange(N)
    for draws in (Draws(**nothing()), ours.random_draws(PAPER, 1, 1, np.zeros_like(samples), samples, 1)):
        result = ours.augment(batch, draws)
        assert result.is_contiguous(memory_format=torch.channels_last) and result.shape == batch.shape
        torch.testing.assert_close(result, ours.augment(images, draws))


@pytest.mark.parametrize("sides", [(40, 24), (40, 40), (40, 20, 8), (40, 27)], ids=str)
def test_batches_of_several_sizes_together_have_the_bits_of_each_alone(images, sides):
    """In rows of 64, 1600 and 16 pixels, the last too short; 40 and 27 share a single one."""
    views, draws = [], []
    for number, side in enumerate(sides):
        views.append(images.repeat(number + 1, 1, 1, 1)[:, :, :side, :side])
        draws.append(ours.random_draws(PAPER, number % 2, 5, np.zeros(N, int), np.arange(N), number + 1))
        assert draws[-1].factors[:, HUE].any()
    for view, draw, found in zip(views, draws, ours.augment_views(views, draws), strict=True):
        assert found.shape == view.shape and found.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(found, ours.augment(view, draw))
    plain = ours.augment_views(views, [*draws[:-1], Draws(**nothing(len(views[-1])))])
    assert torch.equal(plain[-1], normalize(views[-1])) and torch.equal(plain[0], ours.augment(views[0], draws[0]))


def test_draws_have_the_stated_frequencies_and_ranges():
    samples = np.arange(4000)
    draws = ours.random_draws(PAPER, 1, 0, np.zeros_like(samples), samples, 1)
    jittered = (draws.factors != [1, 1, 1, 0]).any(1)
    for name, chosen, probability in (
        ("flip", draws.flip, 0.5),
        ("jitter", jittered, 0.8),
        ("grayscale", draws.grayscale, 0.2),
        ("blur", draws.blur > 0, 0.5),
        ("solarize", draws.solarize, 0.2),
    ):
        assert abs(chosen.mean() - probability) < 4 * np.sqrt(probability * (1 - probability) / 4000), name
    factors = draws.factors[jittered]
    assert np.allclose(factors.min(0), [0.6, 0.6, 0.8, -0.1], atol=0.01)
    assert np.allclose(factors.max(0), [1.4, 1.4, 1.2, 0.1], atol=0.01)
    blurred = draws.blur[draws.blur > 0]
    assert 0.1 <= blurred.min() < 0.12 and 1.98 < blurred.max() <= 2.0
    assert len(np.unique(draws.order @ [64, 16, 4, 1])) == 24  # all orders of colour jitter occur


def test_global_and_local_crops_differ_as_the_recipe_says():
    samples = np.arange(4000)
    large, small = (ours.random_draws(train.PAPER, view, 0, np.zeros_like(samples), samples, 1) for view in (0, 1))
    assert abs((large.blur > 0).mean() - 0.2) < 0.03 and abs((small.blur > 0).mean() - 0.5) < 0.03
    assert abs(large.solarize.mean() - 0.2) < 0.03 and not small.solarize.any()
    assert not np.array_equal(large.flip, small.flip)


def test_a_sample_gets_the_same_draws_in_any_batch_and_other_ones_in_another_epoch(images):
    together = ours.random_draws(PAPER, 1, 7, np.full(5, 2), np.arange(5), 3)
    alone = ours.random_draws(PAPER, 1, 7, np.array([2]), np.array([4]), 3)
    assert np.array_equal(together.factors[12:], alone.factors) and np.array_equal(together.flip[12:], alone.flip)
    later = ours.random_draws(PAPER, 1, 7, np.array([3]), np.array([4]), 3)
    assert not np.array_equal(later.factors, alone.factors)
    crops = ours.random_draws(PAPER, 1, 7, np.array([2]), np.array([4]), 8)
    assert len({tuple(row) for row in crops.factors}) > 4  # each crop of a sample has its own
