"""The learning rate by step, against values worked out by hand, and the counters it shares its idea with."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import train
from utils.model import build_model, forward_flops
from utils.training.loader import crop_specs, global_size
from utils.training.random_numbers import permutation, uniforms
from utils.training.step import Schedule, Training, make_schedule

PINNED_ORDER = [7, 1, 0, 6, 2, 3, 5, 4]
PINNED_DRAWS = [0.6042966444313892, 0.210764308201017]


def learning_rate(step: int, total_steps: int, warmup_steps: int, peak: float, final: float) -> float:
    one_epoch = {"images": total_steps, "batch_size": 1, "micro_batches": 1, "world": 1, "epochs": 1}
    rates = {"warmup_steps": warmup_steps, "peak_lr": peak, "final_lr": final}
    return Schedule(**one_epoch, steps_per_epoch=total_steps, **rates).lr(step)


def test_the_papers_schedule_at_its_corners():
    steps, warmup = 100 * 495, 10 * 495  # ImageNet-100: 126,689 images, batch 256
    at = [learning_rate(step, steps, warmup, 0.1, 1e-6) for step in range(steps)]
    assert len(at) == steps
    assert at[0] == pytest.approx(0.1 / warmup)
    assert at[warmup - 1] == pytest.approx(0.1) and at[warmup] == pytest.approx(0.1)
    assert at[-1] == pytest.approx(1e-6)
    middle = warmup + (steps - 1 - warmup) // 2
    assert at[middle] == pytest.approx((0.1 + 1e-6) / 2, rel=1e-3)
    assert max(at) == pytest.approx(0.1) and min(at) == pytest.approx(1e-6)


def test_the_scaling_rule():
    for batch, peak in ((256, 0.1), (4096, 1.6)):
        assert make_schedule(train.PAPER | {"batch_size": batch}, 10_000, 1).peak_lr == pytest.approx(peak)


@given(total=st.integers(1, 300), warmup=st.integers(0, 400))
def test_any_length_rises_then_falls_and_stays_between_its_ends(total, warmup):
    at = [learning_rate(step, total, warmup, 1.0, 0.01) for step in range(total)]
    assert all(0 < value <= 1.0 for value in at)
    turn = min(warmup, total)
    assert at[:turn] == sorted(at[:turn]) and at[turn:] == sorted(at[turn:], reverse=True)


def test_the_crops_of_the_quick_recipe_grow_by_epochs():
    """First 128, from 0.4 of the run half way, at 0.8 the whole: worked out by hand for 16 epochs, and in few sizes."""
    sizes = [global_size(train.QUICK, epoch) for epoch in range(16)]
    assert sizes == [128] * 9 + [160] * 3 + [192] * 4  # (9 / 16 - 0.4) / 0.4 = 0.41, rounded to halves 0.5
    assert {global_size(train.PAPER, epoch) for epoch in range(100)} == {224}
    at_once = train.QUICK | {"growth": (0.5, 0.5)}
    assert [global_size(at_once, epoch) for epoch in (0, 7, 8, 9, 15)] == [128, 128, 128, 192, 192]


def test_the_quick_recipe_takes_at_most_an_eighth_of_the_papers_arithmetic():
    """A convolution's work goes with the pixels: crops x size^2 x epochs, for one image of the training set."""
    paper = 100 * (1 * 224**2 + 8 * 96**2)
    quick = 9 * 128**2 + 3 * 160**2 + 4 * 192**2
    assert quick / paper == pytest.approx(1 / 33, rel=0.02)
    for name, wanted in (("paper", paper), ("quick", quick)):
        recipe = train.RECIPES[name]
        crops = [spec for epoch in range(recipe["epochs"]) for spec in crop_specs(recipe, epoch)]
        assert sum(spec.count * spec.size**2 for spec in crops) == wanted
    assert flops_of_a_run("quick") < flops_of_a_run("paper") / 8
    assert flops_of_a_run("demo-quick") < flops_of_a_run("demo") / 3


def flops_of_a_run(name: str) -> int:
    """As train.py counts them for its record, of a run on as many images as fill three batches."""
    recipe = train.RECIPES[name] | {"arch": "resnet10"}
    schedule = make_schedule(recipe, 3 * recipe["batch_size"], 1)
    sizes = {spec.size for epoch in range(recipe["epochs"]) for spec in crop_specs(recipe, epoch)}
    counted = forward_flops(build_model("resnet10", 10), [(size, 2) for size in sizes])
    run = SimpleNamespace(recipe=recipe, schedule=schedule, forward_flops=counted)
    parts = [Training.flops(run, start, start + 1) for start in range(schedule.total_steps)]
    assert Training.flops(run, 0, schedule.total_steps) == sum(parts)
    first = sum(spec.count * counted[spec.size] for spec in crop_specs(recipe, 0))
    assert parts[0] == 3 * recipe["batch_size"] * first  # forward once, backward twice
    return sum(parts)


def test_a_step_outside_the_run_is_a_mistake():
    with pytest.raises(ValueError, match="outside"):
        learning_rate(10, 10, 0, 1.0, 0.0)


def test_uniforms_are_uniform_and_do_not_repeat():
    samples = np.arange(20000)
    u = uniforms(4, "crops", 0, np.zeros_like(samples), samples)
    assert u.shape == (20000, 4) and u.min() >= 0 and u.max() < 1
    assert np.abs(u.mean(0) - 0.5).max() < 0.01
    counts, _ = np.histogram(u, bins=20)
    assert np.abs(counts / u.size - 0.05).max() < 0.003
    assert len(np.unique(u)) == u.size
    assert np.abs(np.corrcoef(u.T) - np.eye(4)).max() < 0.03
    assert abs(np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]) < 0.03  # neighbouring samples


def test_uniforms_depend_on_every_part_of_the_key():
    def one(purpose="crops", seed=0, epoch=0, sample=0):
        return uniforms(3, purpose, seed, np.array([epoch]), np.array([sample])).tolist()

    keys = [one(), one(purpose="view0"), one(seed=1), one(epoch=1), one(sample=1), one(seed=2**63 - 1)]
    assert len({str(value) for value in keys}) == len(keys)
    assert one(epoch=5, sample=9) == one(epoch=5, sample=9)
    assert one(epoch=1, sample=0) != one(epoch=0, sample=1)


def test_permutations_are_pinned():
    """A change here would make old checkpoints continue with another data order."""
    assert permutation(8, seed=0, epoch=0).tolist() == permutation(8, 0, 0).tolist()
    assert sorted(permutation(100, 1, 2).tolist()) == list(range(100))
    assert permutation(100, 1, 2).tolist() != permutation(100, 1, 3).tolist()
    assert permutation(8, seed=3, epoch=1).tolist() == PINNED_ORDER
    assert uniforms(2, "crops", 3, np.array([1]), np.array([5]))[0].tolist() == pytest.approx(PINNED_DRAWS, abs=1e-15)
