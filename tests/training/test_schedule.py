"""The learning rate by step, against values worked out by hand, and the counters it shares its idea with."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import train
from utils.training.random_numbers import permutation, uniforms
from utils.training.step import learning_rate, make_schedule

PINNED_ORDER = [7, 1, 0, 6, 2, 3, 5, 4]
PINNED_DRAWS = [0.6042966444313892, 0.210764308201017]


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
