"""Weights of many origins as one thing: a backbone and a classifier on top.

Understood: what train.py writes; the authors' released state dicts (fc without bias); state dicts of torchvision and
timm ResNets and of every torchvision classifier that ends in a linear layer, with the usual wrappers and prefixes;
safetensors. Pickled Python objects are never run.
"""

import errno
import pickle
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torchvision

from utils.cli import UserError
from utils.evaluation.checkpoints import NoClassifier, Source, name_outputs
from utils.images import IMAGENET_MEAN, IMAGENET_STD
from utils.metrics import CHUNK_ROWS
from utils.model import CosineLinear, build_model, head_name, verify_archive

# Where training scripts put the weights inside a checkpoint: the first of these is taken, the others are named. DINO
# itself judges the teacher, MoCo the query encoder.
PLACES = ("", "state_dict", "model", "model_state_dict", "net", "teacher")
# What wrappers and training methods put before a network's own names, the most wanted first.
PREFIXES = (
    *("encoder_q", "backbone", "online_encoder", "encoder", "net", "model", "module", "_orig_mod", "trunk"),
    *("network", "base_encoder", "teacher", "student", "momentum_encoder", "target_encoder", "encoder_k", "ema"),
)
COUNTERS = ("n_averaged",)  # of torch's AveragedModel
RESNETS = ("resnet50", "resnet18", "resnet34", "resnet101", "resnet152")  # tried before all others


@dataclass(frozen=True)
class Classifier:
    """A frozen model. features = backbone(images); logits = head(features)."""

    source: Source
    arch: str
    backbone: torch.nn.Module  # (B, 3, H, W) normalised -> (B, D)
    head: torch.nn.Module | NoClassifier  # (B, D) -> (B, K); or why there are features only
    class_ids: list[str]
    class_names: list[str]
    classes_from: str  # where the order of the classes comes from, for the log

    def require_head(self) -> torch.nn.Module:
        """The head on the CPU; raises NoClassifier, a UserError, where there is none or nobody can name its outputs."""
        if isinstance(self.head, NoClassifier):
            raise self.head
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

    Says which of several networks in the file was taken. UserError if the file cannot be read or fits no architecture.
    Where it can give features only, which is enough for transfer datasets, `head` is the error that tells why.
    """
    if source.timm:
        return load_timm(source, classes)
    found = read_weights(source.path)
    place = source.key or min(found, key=lambda one: PLACES.index(one) if one in PLACES else len(PLACES))
    if place not in found:
        known = f"the file has them at {_list(found)}"
        raise UserError(f"--checkpoint {source.path}:{place}: no weights at {place}; {known}")
    arch = source.torchvision.partition(":")[0] or source.recorded.arch
    try:
        weights, note = one_network(found[place])
        model, arch, name = _build(source, weights, arch)
    except UserError as error:
        fits = [other for other in found if other != place and _fits(source, found[other], arch)]
        raise UserError(f"{error}; --checkpoint {source.path}:{fits[0]} fits" if fits else str(error)) from None
    if others := [one for one in found if one != place and not source.key]:
        also = f"weights of {place or 'the file'}, which also has {_list(others)} (FILE:{others[0]} judges those)"
        note = f"{also}; {note}" if note else also
    if note:
        print(f"{source.label}: {note}", flush=True)
    model.float().eval().requires_grad_(False)
    if not name:
        lacks = NoClassifier(f"--checkpoint {source.path}: no classifier in it, so only transfer datasets can judge it")
        return _with_classes(source, arch, model, lacks, classes)
    linear = model.get_submodule(name)
    model.set_submodule(name, torch.nn.Identity())  # the model then returns features
    return _with_classes(source, arch, model, linear, classes)


def load_timm(source: Source, classes: str | None) -> Classifier:
    """A model of timm with the weights that were found for it: timm's own module below, a linear layer on top."""
    import timm

    published: Any = timm.get_pretrained_cfg(source.timm)
    model: Any = timm.create_model(source.timm, pretrained=False, num_classes=published.num_classes)
    try:
        model.load_state_dict(timm.models.load_state_dict(source.path))
    except (RuntimeError, safetensors.SafetensorError, EOFError, pickle.UnpicklingError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"--checkpoint timm:{source.timm}: {source.path} is damaged ({first}); delete it") from None
    linear = model.get_classifier()
    model.reset_classifier(0)  # the model then returns pooled features
    model.float().eval().requires_grad_(False)
    backbone = torch.nn.Sequential(Renormalised(published.mean, published.std), model)
    if not isinstance(linear, torch.nn.Linear):
        linear = NoClassifier(f"--checkpoint timm:{source.timm}: it does not end in a linear layer")
    return _with_classes(source, source.timm, backbone, linear, classes)


def _with_classes(source: Source, arch: str, backbone: torch.nn.Module, head: Any, classes: str | None) -> Classifier:
    """BACKBONE and HEAD, a linear layer or the reason that there is none, with the classes of its outputs."""
    try:
        if isinstance(head, NoClassifier):
            raise head
        ids, names, origin = name_outputs(source, head.out_features, classes)
    except NoClassifier as error:
        return Classifier(source, arch, backbone, error, [], [], "")
    if source.recorded.head == "cosine":  # the file has its rows: the same ranking, now with training's confidences
        linear, head = head, CosineLinear(head.in_features, head.out_features)
        head.load_state_dict(linear.state_dict())
    return Classifier(source, arch, backbone, head.float().eval().requires_grad_(False), ids, names, origin)


class Renormalised(torch.nn.Module):
    """From images normalised as ImageNet's, which is what every backbone here is given, to MEAN and STD of 0..1."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        theirs, ours = torch.tensor([mean, std]), torch.tensor([IMAGENET_MEAN, IMAGENET_STD])
        self.scale = torch.nn.Buffer((ours[1] / theirs[1]).view(3, 1, 1))
        self.shift = torch.nn.Buffer(((ours[0] - theirs[0]) / theirs[1]).view(3, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) both ways."""
        return images * self.scale + self.shift


# ===== reading files: plain tensors only =====


def read_weights(path: str | Path) -> dict[str, dict[str, torch.Tensor]]:
    """Every state dict in a file, by its place in it: {"": ...}, {"state_dict": ..., "state_dict_ema": ...}.

    Nothing in the file is executed: Python objects beside the weights become inert ones. UserError names the file.
    """
    objects: list[str] = []
    try:
        if Path(path).suffix == ".safetensors":
            content: Any = safetensors.torch.load_file(str(path))
        else:
            if zipfile.is_zipfile(path):  # as torch before 1.6 wrote it: without checksums, and with its own types only
                verify_archive(path)
                objects = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            with torch.serialization.safe_globals([(Inert, name) for name in objects]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise _holds_objects(path, objects) from None
    except Exception as error:  # torch and safetensors raise several types of their own on damaged files
        of_the_disk = isinstance(error, OSError) and error.errno != errno.EINVAL  # EINVAL: a place before the file
        if of_the_disk or isinstance(error, MemoryError):
            raise
        first = (str(error).splitlines() or [""])[0]
        raise UserError(f"--checkpoint {path}: damaged or not a checkpoint ({first}); copy it again") from None
    if found := state_dicts(content):
        return found
    if objects:
        raise _holds_objects(path, objects)
    kind = f"it has {_list(content)}" if isinstance(content, dict) else f"it is a {type(content).__name__}"
    raise UserError(f"--checkpoint {path}: no state dict in it ({kind}); save model.state_dict()")


class Inert:
    """Stands for any Python object beside the weights: takes what it is given and does nothing."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _holds_objects(path: str | Path, names: Sequence[str]) -> UserError:
    what = f" ({_list(names)})" if names else ""
    return UserError(
        f"--checkpoint {path}: holds Python objects{what}, which are not loaded because they can run code (or it is "
        "not a checkpoint at all); save its model.state_dict() instead"
    )


def state_dicts(content: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Place -> {name: tensor} of every dict in CONTENT that holds weights; each dict once, should they be shared."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    seen: set[int] = set()
    todo: list[tuple[str, Any]] = [("", content)]
    for place, value in todo:  # grows while it is walked
        if isinstance(value, dict) and id(value) not in seen and place.count(".") < 4:
            seen.add(id(value))
            tensors = {str(key): one for key, one in value.items() if isinstance(one, torch.Tensor)}
            if any(name.rpartition(".")[2] == "weight" for name in tensors):
                found[place] = tensors
            todo += [(f"{place}.{key}" if place else str(key), one) for key, one in value.items()]
    return found


def one_network(weights: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], str]:
    """(the network's tensors under its own names, what was left out in words or "").

    A network begins with a convolution of three channels: what wrappers and methods (DDP, compile, Lightning, MoCo,
    DINO ...) put before its name stands before all names of that network. Of several the most wanted is taken.
    """
    weights = {name: tensor for name, tensor in weights.items() if name not in COUNTERS}
    first = [name for name, tensor in weights.items() if tensor.ndim == 4 and tensor.shape[1] == 3]
    prefixes = [_prefix(name) for name in first] or [min(map(_prefix, weights), key=len, default="")]
    prefix = min(prefixes, key=lambda one: PREFIXES.index(one.split(".")[-2]) if one else -1)
    inside = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    outside = [name for name in weights if not name.startswith(prefix)]
    return inside, f"{prefix[:-1]} is taken, without {_list(outside)}" if outside else ""


def _prefix(name: str) -> str:
    """ "module.encoder_q.conv1.weight" -> "module.encoder_q."."""
    return "".join(f"{part}." for part in takewhile(PREFIXES.__contains__, name.split(".")))


def _list(names: Iterable[Any]) -> str:
    names = [str(name) or "its top" for name in names]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") or "nothing"


# ===== from tensors to modules =====


def _build(source: Source, weights: dict[str, torch.Tensor], arch: str | None) -> tuple[torch.nn.Module, str, str]:
    """(module with the weights, its architecture, its classifier's name or ""): every tensor has its place."""
    rest = [name for name in torchvision.models.list_models(module=torchvision.models) if name not in RESNETS]
    nearest, complaint = 0.5, f"its tensors ({_list(weights)}) are not those of a torchvision classifier"
    for name in [arch] if arch else [*RESNETS, *rest]:
        model, head, (problem, share) = _fit(name, weights, named=arch is not None)
        if model is not None:
            return model, name, head
        if share > nearest or arch:
            nearest, complaint = share, f"{name}: {problem}"
    wanted = "expected a run of train.py or a state dict of a torchvision classifier"
    raise UserError(f"--checkpoint {source.path}: fits no architecture known here ({complaint}); {wanted}")


def _fits(source: Source, weights: dict[str, torch.Tensor], arch: str | None) -> bool:
    try:
        return bool(_build(source, one_network(weights)[0], arch))
    except UserError:
        return False


Misfit = tuple[str, float]  # the first difference, and the share of an architecture's tensors that are there


def _fit(arch: str, weights: dict[str, torch.Tensor], named: bool) -> tuple[torch.nn.Module | None, str, Misfit]:
    """(module, classifier's name or "", _) if WEIGHTS are those of ARCH, else (None, "", why not)."""
    matrices = [tensor for key, tensor in weights.items() if tensor.ndim == 2 and key.endswith("weight")]
    outputs = len(matrices[-1]) if matrices else 1
    with torch.device("meta"):  # shapes only: initialising numbers that are about to be replaced takes seconds
        try:
            model = build_model(arch, outputs, "linear")
        except NotImplementedError:  # a few architectures compute with tensors while they are built
            if not named:
                return None, "", ("it must be named (arch in args.json)", 0.0)
            with torch.device("cpu"):
                model = build_model(arch, outputs, "linear")
    try:
        name = head_name(model)
    except UserError:
        return None, "", ("it does not end in a linear layer", 0.0)
    head = model.get_submodule(name)
    assert isinstance(head, torch.nn.Linear)
    if f"{name}.weight" not in weights:  # absent, or a projection of several layers (MoCo v2, SimCLR)
        model.set_submodule(name, torch.nn.Identity())
        weights = {key: tensor for key, tensor in weights.items() if not key.startswith(f"{name}.")}
    elif f"{name}.bias" not in weights:  # the authors' classifiers have none
        model.set_submodule(name, torch.nn.Linear(head.in_features, outputs, bias=False, device="meta"))
    wanted = {key: tensor.shape for key, tensor in model.state_dict().items()}
    # Checkpoints older than PyTorch 0.4.1 lack this counter, which evaluation does not use.
    weights = {k: torch.zeros((), dtype=torch.long) for k in wanted if k.endswith("num_batches_tracked")} | weights
    share = sum(key in weights and weights[key].shape == wanted[key] for key in wanted) / len(wanted)
    for key in wanted:
        if key not in weights:
            return None, "", (f"{key} is missing", share)
        if weights[key].shape != wanted[key]:
            return None, "", (f"{key} is {tuple(weights[key].shape)} and should be {tuple(wanted[key])}", share)
    if extra := sorted(set(weights) - set(wanted)):
        return None, "", (f"{extra[0]} is unknown", share)
    model.load_state_dict(weights, strict=True, assign=True)
    return model, name if f"{name}.weight" in weights else "", ("", 1.0)
