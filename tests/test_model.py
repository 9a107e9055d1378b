"""The cosine head against float64, any torchvision architecture, and the export as the authors' users load it."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from utils.cli import UserError
from utils.machine import COMPILERS
from utils.model import (
    TEMPERATURE,
    CosineLinear,
    MultiCrop,
    build_model,
    count_flops,
    export_state_dict,
    forward_flops,
    head_name,
    parameter_groups,
)


def test_cosine_head_loss_and_gradients_equal_a_float64_reference():
    """The reference: softmax over cos(x, w_k) / T written out in NumPy, gradients by central differences."""
    rng = np.random.default_rng(0)
    x, w, labels = rng.normal(size=(4, 5)), rng.normal(size=(3, 5)), np.array([0, 2, 1, 2])

    def loss(x: np.ndarray, w: np.ndarray) -> float:
        cosine = (x / np.linalg.norm(x, axis=1, keepdims=True)) @ (w / np.linalg.norm(w, axis=1, keepdims=True)).T
        logits = cosine / TEMPERATURE
        log_sum = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
        return float((log_sum - logits[np.arange(4), labels]).mean())

    def numeric(which: int) -> np.ndarray:
        gradient = np.zeros_like((x, w)[which])
        for place in np.ndindex(gradient.shape):
            moved = [[x.copy(), w.copy()] for _ in range(2)]
            moved[0][which][place] += 1e-6
            moved[1][which][place] -= 1e-6
            gradient[place] = (loss(*moved[0]) - loss(*moved[1])) / 2e-6
        return gradient

    head = CosineLinear(5, 3)
    head.weight.data = torch.tensor(w, dtype=torch.float32)
    features = torch.tensor(x, dtype=torch.float32, requires_grad=True)
    found = nn.functional.cross_entropy(head(features), torch.tensor(labels))
    found.backward()
    assert found.item() == pytest.approx(loss(x, w), rel=1e-5)
    torch.testing.assert_close(features.grad.double(), torch.tensor(numeric(0)), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(head.weight.grad.double(), torch.tensor(numeric(1)), atol=2e-5, rtol=1e-4)


def test_cosine_logits_keep_single_precision_under_autocast():
    head, x = CosineLinear(64, 10), torch.randn(8, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(x), CosineLinear.forward(head, x)) and head(x).dtype == torch.float32
    assert head(x).abs().max() <= 1 / TEMPERATURE


def test_export_loads_as_the_released_models_do():
    """The authors' snippet: torchvision's resnet50, fc replaced by Linear(2048, K, bias=False), strict loading."""
    from torchvision.models import resnet50

    torch.manual_seed(0)
    ours = build_model("resnet50", 100, "cosine")
    with torch.no_grad():  # rows of very different length, which the cosine head does not see
        ours.fc.weight *= torch.linspace(0.1, 5, 100)[:, None]
    ckpt = export_state_dict(ours)

    net = resnet50()
    net.fc = nn.Linear(2048, 100, bias=False)
    net.load_state_dict(ckpt, strict=True)

    images = torch.randn(3, 3, 64, 64)
    with torch.inference_mode():
        theirs, mine = net.eval()(images), ours.eval()(images)
    assert torch.equal(theirs.argsort(1), mine.argsort(1))  # every rank, hence top-1 and top-5
    torch.testing.assert_close(ckpt["fc.weight"].norm(dim=1), torch.ones(100))
    again = build_model("resnet50", 100, "cosine")
    again.load_state_dict(ckpt, strict=True)
    with torch.inference_mode():
        torch.testing.assert_close(again.eval()(images), mine, atol=1e-4, rtol=1e-4)


def test_export_is_plain_float32_on_the_cpu(tmp_path):
    model = build_model("resnet10", 10, "linear").to(memory_format=torch.channels_last)
    torch.save(export_state_dict(model), tmp_path / "w.pth")
    state = torch.load(tmp_path / "w.pth", weights_only=True)
    assert all(value.is_contiguous() for value in state.values())
    assert {value.dtype for value in state.values()} == {torch.float32, torch.int64}
    assert "fc.bias" in state and state["fc.weight"].shape == (10, 256)


@pytest.mark.parametrize(
    "arch", ["resnet10", "resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "efficientnet_b0"]
)
@pytest.mark.parametrize("head", ["cosine", "linear"])
def test_architectures_of_torchvision_give_k_outputs(arch, head):
    model = build_model(arch, 7, head).eval()
    last = model.get_submodule(head_name(model))
    assert isinstance(last, CosineLinear) == (head == "cosine") and last.out_features == 7
    assert (last.bias is None) == (head == "cosine")
    with torch.inference_mode():
        assert model(torch.randn(2, 3, 64, 64)).shape == (2, 7)


def test_transformers_keep_their_heads_name_and_refuse_small_crops():
    model = build_model("vit_b_32", 5, "cosine")
    assert head_name(model) == "heads.head"
    with pytest.raises(UserError, match=r"cannot take 96 px crops.*--recipe basic"):
        forward_flops(model, [(224, 64), (96, 512)])


def test_one_image_at_a_time_is_refused_where_batch_norm_would_see_one_number():
    model = build_model("resnet10", 5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=r"cannot take 16 px crops .*--batch-per-device and --batch-size at least 2"):
        forward_flops(model, [(64, 1), (16, 1)])
    forward_flops(model, [(64, 1), (16, 2)])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_unknown_names_are_refused_with_a_hint():
    with pytest.raises(UserError, match="--arch resnet51: unknown; did you mean resnet"):
        build_model("resnet51", 10)
    with pytest.raises(UserError, match="--head linear"):
        build_model("squeezenet1_1", 10, "cosine")
    with pytest.raises(UserError, match="--head"):
        build_model("resnet18", 10, "sine")


def test_the_arithmetic_of_a_matrix_product_is_counted():
    assert count_flops(lambda: torch.ones(2, 3) @ torch.ones(3, 5)) == 2 * 2 * 3 * 5


def test_attention_is_counted():
    """Two matrix products a head: scores of (tokens, tokens) and their sum of the values."""
    heads, tokens, width = 3, 64, 16
    query = torch.ones(1, heads, tokens, width)
    counted = count_flops(lambda: torch.nn.functional.scaled_dot_product_attention(query, query, query))
    assert counted == 2 * (2 * heads * tokens * tokens * width)


@pytest.mark.parametrize("arch", ["resnet50", "vit_b_16"])
def test_the_arithmetic_of_a_network_is_that_torchvision_publishes(arch):
    """In its tables, rounded: multiplications with their additions as one, attention included."""
    published = torchvision.models.get_model_weights(arch).DEFAULT.meta["_ops"]
    counted = forward_flops(build_model(arch, 1000, "linear"), [(224, 2)])
    assert counted[224] / 2e9 == pytest.approx(published, rel=0.005)


def test_weight_decay_spares_biases_and_norms():
    model = build_model("resnet18", 10, "linear")
    decayed, others = parameter_groups(model, 1e-4)
    assert (decayed["weight_decay"], others["weight_decay"]) == (1e-4, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    spared = {names[id(parameter)] for parameter in others["params"]}
    assert spared == {name for name in names.values() if "bn" in name or "downsample.1" in name or name == "fc.bias"}
    assert len(decayed["params"]) + len(others["params"]) == len(names)


def test_multi_crop_concatenates_crop_sizes_in_order():
    model = build_model("resnet10", 4).eval()
    large, small = torch.randn(2, 3, 48, 48), torch.randn(6, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(MultiCrop(model)([large, small]), torch.cat([model(large), model(small)]))


@pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # torch.compile's own
def test_compiled_gradients_are_those_of_eager_mode():
    """Inductor (torch 2.10, CPU, channels_last) computes wrong gradients through the head's normalisation."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), CosineLinear(16, 5)
    ).to(memory_format=torch.channels_last)
    images = torch.randn(8, 3, 12, 12).to(memory_format=torch.channels_last)
    gradients = []
    for forward in (model, torch.compile(model)):
        model.zero_grad()
        nn.functional.cross_entropy(forward(images), torch.arange(8) % 5).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name in (
        "0.weight",
        "1.weight",
        "1.bias",
        "5.weight",
    ):  # 0.bias has no gradient before batch norm: rounding only
        torch.testing.assert_close(gradients[1][name], gradients[0][name], atol=1e-5, rtol=1e-3, msg=name)
