"""The classifier: any torchvision architecture, with the paper's cosine head or a plain linear one.

Both heads keep their weights where torchvision keeps them (`fc.weight` for a ResNet), so that an exported file loads
into an unmodified torchvision model.
"""

import copy
import difflib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile

import torch
from torch import distributed, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from utils.cli import UserError

HEADS = ("cosine", "linear")
TEMPERATURE = 0.1  # of the cosine softmax: t-ReX defaults
SMALL = "resnet10"  # the demo's network


class CosineLinear(nn.Linear):
    """Cosine softmax: logits = cos(feature, class weight) / temperature (t-ReX, ICLR 2023, Sec. 3). No bias.

    Weights start as nn.Linear's, uniform within +-1 / sqrt(D), as in t-ReX. How far a row turns in a step goes with
    1 / (its length squared): from N(0, 1), 80 times as long at D = 2048, rows would hardly move.

    x: (B, D) features -> (B, K) logits in [-1/T, 1/T], computed in float32 also under autocast: the logits span
    20 units, and bfloat16 keeps 8 bits of them.
    """

    def __init__(self, in_features: int, out_features: int, temperature: float = TEMPERATURE):
        super().__init__(in_features, out_features, bias=False)
        self.temperature = temperature

    # Inductor (torch 2.10, CPU, channels_last) computes wrong gradients through this normalisation: --compile leaves
    # the head, a thousandth of the work, as it is.
    @torch.compiler.disable
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            features = functional.normalize(x.float(), dim=1)
            weights = functional.normalize(self.weight.float(), dim=1)
            return functional.linear(features, weights) / self.temperature


def build_model(arch: str, num_classes: int, head: str = "cosine") -> nn.Module:
    """A randomly initialised torchvision classifier `arch`, or the demo's small ResNet, with NUM_CLASSES outputs.

    head "cosine" replaces the last linear layer by CosineLinear; "linear" leaves it. UserError for an unknown arch.
    """
    import torchvision

    if head not in HEADS:
        raise UserError(f"--head {head}: unknown; use one of {', '.join(HEADS)}")
    if arch == SMALL:
        model: nn.Module = small_resnet(num_classes)
    else:
        known = torchvision.models.list_models(torchvision.models)
        if arch not in known:
            near = difflib.get_close_matches(arch, [*known, SMALL], 3)
            raise UserError(f"--arch {arch}: unknown; did you mean {' or '.join(near or [SMALL, 'resnet50'])}?")
        # The auxiliary outputs of these two would need a loss of their own.
        extra = {"aux_logits": False, "init_weights": True} if arch in ("inception_v3", "googlenet") else {}
        model = torchvision.models.get_model(arch, weights=None, num_classes=num_classes, **extra)
    if head == "cosine":
        name = head_name(model)
        linear: Any = model.get_submodule(name)
        model.set_submodule(name, CosineLinear(linear.in_features, num_classes))
    return model


def small_resnet(num_classes: int) -> nn.Module:
    """A ResNet of one basic block a stage and half the usual width, 1.2 M parameters: for 32-pixel images on a CPU."""
    from torchvision.models.resnet import BasicBlock, ResNet

    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes)
    model.inplanes = 32
    model.conv1 = nn.Conv2d(3, 32, kernel_size=7, stride=2, padding=3, bias=False)
    model.bn1 = nn.BatchNorm2d(32)
    for stage, (width, stride) in enumerate([(32, 1), (64, 2), (128, 2), (256, 2)], 1):
        setattr(model, f"layer{stage}", model._make_layer(BasicBlock, width, 1, stride))
    model.fc = nn.Linear(256, num_classes)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):  # as ResNet.__init__ does for the layers replaced here
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def head_name(model: nn.Module) -> str:
    """Name of the layer that turns features into logits: `fc` of a ResNet, `heads.head` of a ViT."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise UserError(f"--arch: {type(model).__name__} ends in a convolution; use --head linear for it")
    return linear[-1]


def count_flops(work: Callable[[], object]) -> int:
    """Operations of the convolutions, matrix products and attentions in WORK, run once; the rest counts as free.

    A multiplication and an addition are two. Attention runs as plain matrix products meanwhile: torch's counter does
    not know the fused kernel of a CPU.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def forward_flops(model: nn.Module, crops: Sequence[tuple[int, int]]) -> dict[int, int]:
    """{SIZE: operations of one image's forward pass}, for each (SIZE, N) of CROPS: pixels, and images at a time.

    UserError if the model cannot be trained on them: some transformers take one size only, and batch norm nothing of
    which it has a single number a channel.
    """
    trial = copy.deepcopy(model)  # a forward pass in training moves batch norm's statistics
    found = {}
    for size, count in crops:
        images = torch.zeros(min(count, 2), 3, size, size)
        try:
            with torch.no_grad():
                found[size] = count_flops(partial(trial, images)) // len(images)
        except (AssertionError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            remedy = "try --recipe basic, which has one crop size"
            if "more than 1 value per channel" in reason:
                remedy = "give --batch-per-device and --batch-size at least 2 images for each process"
            what = f"{type(model).__name__} cannot take {size} px crops ({reason})"
            raise UserError(f"--arch: {what}; {remedy}") from None
    return found


class MultiCrop(nn.Module):
    """Runs the model once per crop size and concatenates: [(B*n1, 3, s1, s1), (B*n2, 3, s2, s2)] -> (B*n1 + B*n2, K).

    One forward for DDP, whatever the number of sizes. Batch norm sees each size on its own, as in DINO and t-ReX.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, crops: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat([self.model(crop).float() for crop in crops])


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay on matrices and kernels only: not on biases, nor on the scales and shifts of norms."""
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def export_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights for an unmodified torchvision model: float32, on the CPU, contiguous.

    A cosine head's rows are stored with length 1. A plain `Linear(D, K, bias=False)` then ranks the classes exactly
    as the cosine head does: the feature's own length scales all its logits alike.
    """
    state = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, CosineLinear):
            state[f"{name}.weight"] = functional.normalize(state[f"{name}.weight"].float(), dim=1)
    return state


# ===== batch norm over all processes =====


def sync_batchnorm(model: nn.Module) -> nn.Module:
    """MODEL with batch norm over the joined batch of all processes; names and parameters stay."""
    for module in model.modules():
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d):
            module.__class__ = SyncBatchNorm
    return model


class SyncBatchNorm(nn.BatchNorm2d):
    """What nn.SyncBatchNorm computes, on any device, without waiting for it: one all-reduce forward, one backward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, ...) -> the same shape and type; statistics and their sums are of single and double precision."""
        if not self.training:
            return super().forward(x)
        assert self.momentum is not None and self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None
        y, mean, variance, count = _JoinedBatchNorm.apply(x, self.weight, self.bias, self.eps)
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        return y


class _JoinedBatchNorm(torch.autograd.Function):
    """Ioffe and Szegedy, 2015, with sums over the processes: (B, C, ...) -> (normalised, mean, variance, count)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> Any:
        axes = [0, *range(2, x.ndim)]
        local_variance, local_mean = torch.var_mean(x.float(), axes, correction=0)
        local_mean, local_variance = local_mean.double(), local_variance.double()  # E[x^2] - E[x]^2 cancels in single
        count = x.numel() // x.shape[1]
        sums = torch.cat([local_mean, local_variance + local_mean.square(), local_mean.new_ones(1)]) * count
        distributed.all_reduce(sums)
        total = sums[-1]
        mean, square = (sums[:-1] / total).chunk(2)
        variance = (square - mean.square()).float()
        mean, inverse = mean.float(), (variance + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, inverse, total)
        shape = [1, -1] + [1] * (x.ndim - 2)
        scale = weight * inverse
        y = ((x.float() - mean.view(shape)) * scale.view(shape) + bias.view(shape)).to(x.dtype)
        images = total.float()
        ctx.mark_non_differentiable(mean, variance, images)
        return y, mean, variance, images

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        x, weight, mean, inverse, total = ctx.saved_tensors
        axes, shape = [0, *range(2, x.ndim)], [1, -1] + [1] * (x.ndim - 2)
        dy = gradients[0].float()
        standard = (x.float() - mean.view(shape)) * inverse.view(shape)
        d_bias, d_weight = dy.sum(axes), (dy * standard).sum(axes)  # of this process: DDP adds the others'
        sums = torch.cat([d_bias, d_weight]).double()
        distributed.all_reduce(sums)
        mean_dy, mean_dy_standard = (sums / total).float().chunk(2)
        dx = dy - mean_dy.view(shape) - standard * mean_dy_standard.view(shape)
        return (dx * (weight * inverse).view(shape)).to(x.dtype), d_weight, d_bias, None


def verify_archive(path: str | Path) -> None:
    """Read every byte that torch.save wrote to PATH and compare its checksums, which torch.load does not look at.

    ValueError naming the record that fails, or that is compressed, as torch never writes it: three megabytes can hold
    gigabytes.
    """
    with ZipFile(path) as archive:
        for record in archive.infolist():
            if record.compress_type != ZIP_STORED:
                raise ValueError(f"{record.filename}: it is compressed, which torch.save never does")
            if record.external_attr & 0x10:  # passes as whole, and torch.load takes what is in memory by chance for it
                raise ValueError(f"{record.filename} is marked as a folder")
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} fails its checksum")
