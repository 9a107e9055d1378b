"""Weights of many origins as one thing: a backbone and a classifier on top.

Understood: what train.py writes; the authors' released state dicts (fc without bias); state dicts of torchvision and
timm ResNets and of every torchvision classifier that ends in a linear layer, with the usual wrappers and prefixes;
safetensors. Pickled Python objects are never run.
"""

from __future__ import annotations

import errno
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torchvision

from utils.cli import UserError
from utils.evaluation.checkpoints import NoClassifier, Source, name_outputs
from utils.metrics import CHUNK_ROWS
from utils.model import CosineLinear, build_model, head_name

# Where training scripts put the weights inside a checkpoint, and what wrappers put before every key.
WRAPPERS = ("state_dict", "model", "model_state_dict", "net")
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "backbone.", "encoder.")
RESNETS = ("resnet50", "resnet18", "resnet34", "resnet101", "resnet152")  # tried before all others


@dataclass(frozen=True)
class Classifier:
    """A frozen model. features = backbone(images); logits = head(features)."""

    source: Source
    arch: str
    backbone: torch.nn.Module  # (B, 3, H, W) normalised -> (B, D)
    head: torch.nn.Module | None  # (B, D) -> (B, K); None: features only, and `lacks` says why
    class_ids: list[str]
    class_names: list[str]
    classes_from: str  # where the order of the classes comes from, for the log
    lacks: NoClassifier | None = None

    def require_head(self) -> torch.nn.Module:
        """The head on the CPU; raises NoClassifier, a UserError, where there is none or nobody can name its outputs."""
        if self.head is None:
            raise self.lacks or NoClassifier(f"--checkpoint {self.source.path}: no classifier in it")
        return self.head.cpu()

    def logits(self, features: np.ndarray) -> np.ndarray:
        """features (N, D), of any precision -> logits (N, K) float32, a block of rows at a time."""
        head, blocks = self.require_head(), []
        with torch.inference_mode():
            for start in range(0, len(features), CHUNK_ROWS):
                block = np.array(features[start : start + CHUNK_ROWS], dtype=np.float32)
                blocks.append(head(torch.from_numpy(block)).numpy())
        return np.concatenate(blocks)


def load_classifier(source: Source, classes: str | None = None) -> Classifier:
    """Load the weights strictly. CLASSES (--classes) names the outputs where the checkpoint does not.

    UserError if the file cannot be read or fits no architecture. Where it can give features only, which is enough for
    transfer datasets, head is None and `lacks` tells why.
    """
    weights = read_weights(source.path)
    arch = source.torchvision.partition(":")[0] or source.args.get("arch")
    model, arch, name = _build(source, weights, arch)
    model.float().eval().requires_grad_(False)
    if not name:
        lacks = NoClassifier(f"--checkpoint {source.path}: no classifier in it, so only transfer datasets can judge it")
        return Classifier(source, arch, model, None, [], [], "", lacks)
    linear = model.get_submodule(name)
    assert isinstance(linear, torch.nn.Linear)
    _replace(model, name, torch.nn.Identity())  # the model then returns features
    try:
        ids, names, origin = name_outputs(source, linear.out_features, classes)
    except NoClassifier as error:
        return Classifier(source, arch, model, None, [], [], "", error)
    head = _as_trained(linear) if source.args.get("head") == "cosine" else linear
    return Classifier(source, arch, model, head, ids, names, origin)


# ===== reading files: plain tensors only =====


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """The state dict in a file, without wrappers and prefixes. Nothing in the file is executed."""
    try:
        if Path(path).suffix == ".safetensors":
            content: Any = safetensors.torch.load_file(str(path))
        else:
            _verify_archive(path)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"--checkpoint {path}: holds Python objects, which are not loaded because they can run code (or it is not "
            "a checkpoint at all); save its model.state_dict() instead"
        ) from None
    except Exception as error:  # torch and safetensors raise several types of their own on damaged files
        of_the_disk = isinstance(error, OSError) and error.errno != errno.EINVAL  # EINVAL: a place before the file
        if of_the_disk or isinstance(error, MemoryError):
            raise
        first = (str(error).splitlines() or [""])[0]
        raise UserError(f"--checkpoint {path}: damaged or not a checkpoint ({first}); copy it again") from None
    return strip_prefixes(unwrap(content, path))


def _verify_archive(path: str | Path) -> None:
    """Read every byte that torch.save wrote and compare its checksums, which torch.load does not look at."""
    if not zipfile.is_zipfile(path):
        return  # as torch before 1.6 wrote it: without checksums
    with zipfile.ZipFile(path) as archive:
        # A record marked as a folder passes as whole, and torch.load takes what is in memory by chance for it.
        strange = next((record.filename for record in archive.infolist() if record.external_attr & 0x10), None)
        if damaged := archive.testzip() or strange:
            raise zipfile.BadZipFile(f"{damaged} fails its checksum")


def unwrap(content: Any, path: str | Path) -> dict[str, torch.Tensor]:
    """{"state_dict": {...}} and the like -> the innermost mapping from names to tensors."""
    while isinstance(content, dict) and not any(isinstance(value, torch.Tensor) for value in content.values()):
        inside = next((content[key] for key in WRAPPERS if isinstance(content.get(key), dict)), None)
        if inside is None:
            keys = ", ".join(map(str, list(content)[:6])) or "nothing"
            raise UserError(f"--checkpoint {path}: no state dict in it (it has {keys}); save model.state_dict()")
        content = inside
    if not isinstance(content, dict):
        raise UserError(f"--checkpoint {path}: holds a {type(content).__name__}, not a state dict")
    return {str(key): value for key, value in content.items() if isinstance(value, torch.Tensor)}


def strip_prefixes(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Remove what wrappers (DDP, compile, Lightning ...) put before every key."""
    while prefix := next((p for p in PREFIXES if all(key.startswith(p) for key in weights)), None):
        weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    return weights


# ===== from tensors to modules =====


def _build(source: Source, weights: dict[str, torch.Tensor], arch: str | None) -> tuple[torch.nn.Module, str, str]:
    """(module with the weights, its architecture, its classifier's name or ""): every tensor has its place."""
    rest = [name for name in torchvision.models.list_models(module=torchvision.models) if name not in RESNETS]
    complaint = ""
    for name in [arch] if arch else [*RESNETS, *rest]:
        model, head, problem = _fit(name, weights, named=arch is not None)
        if model is not None:
            return model, name, head
        complaint = complaint or f"{name}: {problem}"
    raise UserError(
        f"--checkpoint {source.path}: fits no architecture known here ({complaint}); expected a run of train.py or a "
        "state dict of a torchvision classifier"
    )


def _fit(arch: str, weights: dict[str, torch.Tensor], named: bool) -> tuple[torch.nn.Module | None, str, str]:
    """(module, classifier's name, "") if WEIGHTS are those of ARCH, else (None, "", the first difference).

    The classifier may be absent; its name is "" then.
    """
    matrices = [tensor for key, tensor in weights.items() if tensor.ndim == 2 and key.endswith("weight")]
    outputs = len(matrices[-1]) if matrices else 1
    with torch.device("meta"):  # shapes only: initialising numbers that are about to be replaced takes seconds
        try:
            model = build_model(arch, outputs, "linear")
        except NotImplementedError:  # a few architectures compute with tensors while they are built
            if not named:
                return None, "", "it must be named (arch in args.json)"
            with torch.device("cpu"):
                model = build_model(arch, outputs, "linear")
    try:
        name = head_name(model)
    except UserError:
        return None, "", "it does not end in a linear layer"
    head = model.get_submodule(name)
    assert isinstance(head, torch.nn.Linear)
    if f"{name}.weight" not in weights:
        _replace(model, name, torch.nn.Identity())
    elif f"{name}.bias" not in weights:  # the authors' classifiers have none
        _replace(model, name, torch.nn.Linear(head.in_features, outputs, bias=False, device="meta"))
    wanted = {key: tensor.shape for key, tensor in model.state_dict().items()}
    # Checkpoints older than PyTorch 0.4.1 lack this counter, which evaluation does not use.
    weights = {k: torch.zeros((), dtype=torch.long) for k in wanted if k.endswith("num_batches_tracked")} | weights
    for key in wanted:
        if key not in weights:
            return None, "", f"{key} is missing"
        if weights[key].shape != wanted[key]:
            return None, "", f"{key} is {tuple(weights[key].shape)} and should be {tuple(wanted[key])}"
    if extra := sorted(set(weights) - set(wanted)):
        return None, "", f"{extra[0]} is unknown"
    model.load_state_dict(weights, strict=True, assign=True)
    return model, name if f"{name}.weight" in weights else "", ""


def _replace(model: torch.nn.Module, name: str, module: torch.nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _as_trained(linear: torch.nn.Linear) -> torch.nn.Module:
    """The cosine classifier whose exported rows LINEAR holds: the same ranking, and the confidences of training."""
    head = CosineLinear(linear.in_features, linear.out_features)
    head.load_state_dict(linear.state_dict())
    return head.eval().requires_grad_(False)
