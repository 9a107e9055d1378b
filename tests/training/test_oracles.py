"""Training beside plain re-implementations of what the authors' trainer computes, and torchvision's own crops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from torch import nn
from torch.nn import functional
from torchvision.transforms import RandomResizedCrop

import train
from tests.oracles import training as oracle
from utils.model import TEMPERATURE, CosineLinear, parameter_groups
from utils.training.loader import CROP_ATTEMPTS, crop_box, crop_specs
from utils.training.random_numbers import uniforms
from utils.training.step import make_schedule

CLASSES, FEATURES, BATCH = 100, 2048, 64  # ImageNet-100's head on ResNet50, one device's batch


def features(steps: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Batches of (features, labels): each class scatters about its own direction, all positive as after a ReLU."""
    rng = np.random.default_rng(0)
    centres = np.abs(rng.normal(size=(CLASSES, FEATURES)))
    batches = []
    for _ in range(steps):
        labels = rng.integers(0, CLASSES, BATCH)
        batches.append((np.abs(centres[labels] + rng.normal(size=(BATCH, FEATURES))), labels))
    return batches


def train_ours(head: CosineLinear, batches: list, rates: np.ndarray) -> np.ndarray:
    optimizer = torch.optim.SGD(parameter_groups(head, 1e-4), lr=0.1, momentum=train.PAPER["momentum"])
    for (x, labels), rate in zip(batches, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        functional.cross_entropy(head(torch.tensor(x, dtype=torch.float32)), torch.tensor(labels)).backward()
        optimizer.step()
    return head.weight.detach().double().numpy()


@pytest.mark.parametrize("steps", [1, 60])
def test_class_weights_turn_as_far_as_the_reference_turns_them(steps):
    """From each one's own start: what counts is how far a row turns, and that goes with 1 / (its length squared)."""
    batches, rates = features(steps), np.full(steps, 0.1)
    torch.manual_seed(0)
    head = CosineLinear(FEATURES, CLASSES)
    start = head.weight.detach().double().numpy().copy()
    wanted_start = oracle.classifier_start(CLASSES, FEATURES, np.random.default_rng(1))
    assert np.linalg.norm(start, axis=1).mean() == pytest.approx(np.linalg.norm(wanted_start, axis=1).mean(), rel=0.01)
    wanted = oracle.degrees_turned(wanted_start, oracle.train_classifier(wanted_start, batches, rates, TEMPERATURE))
    found = oracle.degrees_turned(start, train_ours(head, batches, rates))
    assert found == pytest.approx(wanted, rel=0.05)
    assert found > (0.5 if steps == 1 else 20)  # degrees: rows move, which a start of long rows forbids
    long = np.random.default_rng(2).normal(size=(CLASSES, FEATURES))
    stuck = oracle.degrees_turned(long, oracle.train_classifier(long, batches, rates, TEMPERATURE))
    assert stuck < found / 500


def test_from_the_same_start_the_weights_are_the_same():
    batches, rates = features(20), np.linspace(0.01, 0.1, 20)
    head = CosineLinear(FEATURES, CLASSES)
    start = head.weight.detach().double().numpy().copy()
    wanted = oracle.train_classifier(start, batches, rates, TEMPERATURE)
    np.testing.assert_allclose(train_ours(head, batches, rates), wanted, atol=1e-5)


@pytest.mark.parametrize("images", [126_689, 1_281_167])
def test_the_papers_schedule_is_the_references_within_one_step(images):
    """Ours begins one step up the line, not at a rate of 0, and ends on the final rate, not one step before it."""
    schedule = make_schedule(train.PAPER, images, 1)
    ours = [schedule.lr(step) for step in range(schedule.total_steps)]
    wanted = oracle.learning_rates(schedule.peak_lr, 1e-6, 100, schedule.steps_per_epoch, 10)
    assert len(ours) == len(wanted) == schedule.total_steps
    one_step = schedule.peak_lr / schedule.warmup_steps
    assert np.abs(np.array(ours) - wanted).max() < 1.01 * one_step


def test_crops_are_distributed_as_torchvisions():
    """Area, aspect ratio and place of both kinds of crops, on a wide and a square image."""
    for width, height in ((500, 375), (512, 512)):
        for spec in crop_specs(train.PAPER, 0):
            torch.manual_seed(0)
            blank = torch.zeros(3, height, width)
            wanted = [RandomResizedCrop.get_params(blank, list(spec.scale), [3 / 4, 4 / 3]) for _ in range(3000)]
            draws = uniforms(4 * CROP_ATTEMPTS, "crops", 0, np.zeros(3000, int), np.arange(3000))
            found = [crop_box(width, height, spec.scale, row.reshape(-1, 4).tolist()) for row in draws]
            for name, value in (
                ("area", lambda top, left, high, wide: high * wide),
                ("aspect", lambda top, left, high, wide: wide / high),
                ("top", lambda top, left, high, wide: top),
                ("left", lambda top, left, high, wide: left),
            ):
                ours, theirs = ([value(*box) for box in boxes] for boxes in (found, wanted))
                assert ks_2samp(ours, theirs).pvalue > 1e-3, (name, spec)


def test_a_picture_too_narrow_for_any_crop_gives_torchvisions_central_one():
    for width, height in ((1000, 60), (60, 1000), (900, 90)):
        wanted = RandomResizedCrop.get_params(torch.zeros(3, height, width), [0.9, 1.0], [3 / 4, 4 / 3])
        assert crop_box(width, height, (0.9, 1.0), np.full((CROP_ATTEMPTS, 4), 0.5).tolist()) == wanted


def test_the_papers_crops_are_one_large_and_eight_small_ones():
    large, small = crop_specs(train.PAPER, 0)
    assert (large.size, large.count, large.scale, large.interpolation) == (224, 1, (0.25, 1.0), "bicubic")
    assert (small.size, small.count, small.scale, small.interpolation) == (96, 8, (0.05, 0.25), "bicubic")


def test_a_linear_layers_start_is_the_one_described():
    torch.manual_seed(0)
    weight = nn.Linear(FEATURES, CLASSES, bias=False).weight.detach().numpy()
    wanted = oracle.classifier_start(CLASSES, FEATURES, np.random.default_rng(0))
    assert np.abs(weight).max() <= 1 / math.sqrt(FEATURES) and ks_2samp(weight.ravel(), wanted.ravel()).pvalue > 1e-3
