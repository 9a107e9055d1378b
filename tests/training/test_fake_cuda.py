"""A training step and validation as a GPU would see them: devices and types agree, layouts hold, and little waits."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

import train
from tests.fake_cuda import FakeCuda
from tests.test_machine import MEMORY_ERRORS
from utils import images
from utils.cli import UserError
from utils.model import MultiCrop, _JoinedBatchNorm, build_model, parameter_groups, sync_batchnorm
from utils.training import augment
from utils.training.step import Training, make_schedule
from utils.training.stop_signals import StopSignals
from utils.training.validation import Validation

IMAGES = 4
DEVICE = torch.device("cuda")


CACHES = (augment._constants, augment._shifts, images._statistics)


@pytest.fixture
def gpu():
    for cached in CACHES:
        cached.cache_clear()
    yield FakeCuda()
    for cached in CACHES:
        cached.cache_clear()


def training_on(gpu, dtype: torch.dtype) -> Training:
    recipe = train.PAPER | {"arch": "resnet10", "batch_size": IMAGES}
    model = gpu.move(build_model("resnet10", 10), torch.channels_last)
    schedule = make_schedule(recipe, 100, 1)
    optimizer = torch.optim.SGD(parameter_groups(model, 1e-4), lr=0.1, momentum=0.9)
    with gpu.present():
        scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
        return Training(model, MultiCrop(model), optimizer, scaler, DEVICE, dtype, recipe, schedule, 0, {})


def batch() -> dict:
    crops = [torch.zeros(IMAGES, count, size, size, 3, dtype=torch.uint8) for count, size in ((1, 224), (8, 96))]
    labels = torch.arange(IMAGES) % 10
    return {"crops": crops, "labels": labels, "samples": np.arange(IMAGES), "passes": np.zeros(IMAGES, int), "bad": []}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_training_step(gpu, monkeypatch, dtype):
    training = training_on(gpu, dtype)
    seen = []

    def backward(loss):  # autograd's threads want a real device
        seen.append((loss.device.type, loss.dtype))
        for parameter in training.model.parameters():
            parameter.grad = torch.empty_like(parameter)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    with gpu.present():
        train.train_step(training, iter([batch()]), nullcontext(), 0)
        gpu.waits.clear()  # the first one makes what is kept
        train.train_step(training, iter([batch()]), nullcontext(), 0)
    assert seen == [("cuda", torch.float32)] * 2 and training.step == 2
    assert gpu.waits == (["item"] if dtype == torch.float16 else ["tolist"])  # one, for the loss or by the scaler


def test_every_face_of_full_memory_names_the_remedy(gpu):
    training = training_on(gpu, torch.float32)
    training.augmented = lambda batch: [torch.zeros(IMAGES, 3, 8, 8)]  # type: ignore[method-assign]
    with gpu.present():
        for kind, message in MEMORY_ERRORS:
            training.forward = mock.Mock(side_effect=kind(message))
            with pytest.raises(UserError, match=r"^--batch-per-device 4: cuda is out of memory; try 2$"):
                train.train_step(training, iter([batch()]), nullcontext(), 0)
        training.forward = mock.Mock(side_effect=RuntimeError("shapes do not match"))
        with pytest.raises(RuntimeError, match="shapes do not match"):
            train.train_step(training, iter([batch()]), nullcontext(), 0)


def test_augmentation_launches_few_kernels_and_keeps_the_layout(gpu):
    training = training_on(gpu, torch.float16)
    training.recipe = {**training.recipe, "global_blur": 1.0}  # with so few images else none of them might be blurred
    with gpu.present():
        training.augmented(batch())
        gpu.kernels.clear(), gpu.waits.clear()
        large, small = training.augmented(batch())
    assert large.shape == (IMAGES, 3, 224, 224) and small.shape == (8 * IMAGES, 3, 96, 96)
    assert all(crops.device.type == "cuda" and crops.dtype == torch.float32 for crops in (large, small))
    assert all(crops.is_contiguous(memory_format=torch.channels_last) for crops in (large, small))
    assert gpu.waits == [] and sum(gpu.kernels.values()) <= 100, gpu.kernels


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_validation(gpu, monkeypatch, dtype):
    training = training_on(gpu, dtype)
    batches = [{"images": torch.zeros(IMAGES, 3, 224, 224, dtype=torch.uint8), "labels": torch.arange(IMAGES)}] * 2
    validation = Validation(2 * IMAGES, batches)  # type: ignore[arg-type]
    counts = {"top1": 1, "top5": 4, "n": 2 * IMAGES}
    monkeypatch.setattr("utils.training.validation.sum_counts", lambda found, device: counts)
    with gpu.present():
        scores = validation.scores(training.model, DEVICE, dtype, StopSignals(alone=True))
    assert scores == {"val_top1": 12.5, "val_top5": 50.0, "val_n": 8}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_batch_norm_over_processes_waits_for_nothing(gpu, monkeypatch, dtype):
    """nn.SyncBatchNorm waits for the device several times a layer."""
    reduced = []
    monkeypatch.setattr("torch.distributed.all_reduce", lambda sums: reduced.append((sums.device.type, len(sums))))
    layer = gpu.move(sync_batchnorm(torch.nn.BatchNorm2d(8)).train())
    x = gpu.tensor(torch.zeros(4, 8, 5, 5, dtype=dtype))
    context = SimpleNamespace(mark_non_differentiable=lambda *_: None)
    with gpu.present(), torch.no_grad():
        y = layer(x)
        context.save_for_backward = lambda *saved: setattr(context, "saved_tensors", saved)
        _JoinedBatchNorm.forward(context, x, layer.weight, layer.bias, 1e-5)
        dx, d_weight, d_bias, _ = _JoinedBatchNorm.backward(context, y)
    assert (y.device.type, y.dtype, dx.dtype, len(d_weight), len(d_bias)) == ("cuda", dtype, dtype, 8, 8)
    assert gpu.waits == [] and reduced == [("cuda", 17), ("cuda", 17), ("cuda", 16)]


def test_a_tensor_left_on_the_cpu_fails(gpu):
    """So that the tests above can fail."""
    weights = gpu.move(torch.nn.Linear(3, 2))
    with gpu.present(), pytest.raises(RuntimeError, match="device"):
        weights(torch.zeros(1, 3)) + torch.zeros(1, 2)
