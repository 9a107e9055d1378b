"""Checkpoints of many origins as one thing: a backbone, a classifier on top, and the class behind every output.

Understood: a run folder of train.py or a file in it; the authors' released state dicts (fc without bias); state dicts
of torchvision and timm ResNets and of every torchvision classifier that ends in a linear layer, with the usual
wrappers and prefixes; safetensors; names of torchvision's pretrained models. Pickled Python objects are never run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.classes import load_classes, read_list
from utils.cli import UserError
from utils.storage import read_json, sha256_file

if TYPE_CHECKING:
    import torch

WEIGHT_SUFFIXES = (".pth", ".pt", ".bin", ".tar", ".ckpt", ".safetensors")
# Where training scripts put the weights inside a checkpoint, and what wrappers put before every key.
WRAPPERS = ("state_dict", "model", "model_state_dict", "net")
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "backbone.", "encoder.")
RESIZE, CROP = 256, 224  # short side and centre crop, pixels (t-ReX defaults, and torchvision's references)
INTERPOLATION = "bilinear"  # not in paper: as train.py's validation and torchvision's references


class NoClassifier(UserError):
    """The weights have no classifier, or nobody knows which class its outputs stand for: only features are of use."""


@dataclass(frozen=True)
class Source:
    """A checkpoint that was found but not loaded yet: enough for a dry run and for the key of cached results."""

    label: str
    path: str  # of the weights; the name for torchvision's
    sha256: str
    args: dict[str, Any]  # args.json of the run, {} for foreign weights
    torchvision: str = ""  # "resnet50:IMAGENET1K_V2" for weights that torchvision publishes


@dataclass(frozen=True)
class Classifier:
    """A frozen model. features = backbone(images); logits = head(features)."""

    source: Source
    arch: str
    backbone: torch.nn.Module  # (B, 3, H, W) normalised -> (B, D)
    head: torch.nn.Module | None  # (B, D) -> (B, K); None: the weights hold no classifier
    class_ids: list[str]
    class_names: list[str]
    classes_from: str  # where the order of the classes comes from, for the log


def locate(spec: str, download: bool = True) -> Source:
    """Find a checkpoint: `[LABEL=]` then a run folder, a weights file or a torchvision name[:weights].

    UserError if there is no such thing. Reads the file once for its hash. Without `download`, torchvision weights that
    are not in its cache yet have sha256 "".
    """
    label, _, rest = spec.partition("=")
    if not rest or Path(spec).exists():
        label, rest = "", spec
    path = Path(rest).expanduser()
    if path.is_dir():
        path = _weights_of_run(path)
    if path.is_file():
        args = read_json(path.parent / "args.json") if (path.parent / "args.json").is_file() else {}
        return Source(label or _label(path, args), str(path), sha256_file(path), args)
    if path.suffix in WEIGHT_SUFFIXES or len(path.parts) > 1:
        raise UserError(f"--checkpoint {rest}: no such file; give a run folder of train.py or a weights file")
    return _locate_torchvision(rest, label, download)


def _weights_of_run(folder: Path) -> Path:
    """The exported weights of a run folder, or its last checkpoint while it is still training."""
    args = read_json(folder / "args.json") if (folder / "args.json").is_file() else {}
    dataset = Path(str(args.get("dataset", ""))).name
    for name in (f"{dataset}.pth", f"{folder.name}.pth", "checkpoint.pth"):
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"--checkpoint {folder}: no weights in this folder ({dataset or folder.name}.pth, checkpoint.pth)")


def _label(path: Path, args: dict[str, Any]) -> str:
    """The run folder's name for our own runs, else the file's."""
    return path.resolve().parent.name if args else path.name.removesuffix("".join(path.suffixes[-1:]))


def _locate_torchvision(spec: str, label: str, download: bool) -> Source:
    """`resnet50` (torchvision's default weights) or `resnet50:IMAGENET1K_V1`."""
    import torch
    from torchvision.models import get_model_weights, list_models

    name, _, version = spec.partition(":")
    if name not in list_models():
        raise UserError(f"--checkpoint {spec}: neither a file nor a model of torchvision (such as resnet50)")
    table = get_model_weights(name)
    if version and version not in table.__members__:
        raise UserError(f"--checkpoint {spec}: torchvision has {', '.join(member.name for member in table)} for {name}")
    weights = table[version] if version else table.DEFAULT
    path = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[1]
    if not path.is_file() and download:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(weights.url, str(path), hash_prefix=path.stem.rsplit("-", 1)[-1])
        except OSError as error:
            raise UserError(f"--checkpoint {spec}: cannot download {weights.url} ({error}); put it at {path}") from None
    sha256 = sha256_file(path) if path.is_file() else ""
    return Source(label or f"{name}.{weights.name}", str(path), sha256, {}, torchvision=f"{name}:{weights.name}")


def load(source: Source, classes: str | None = None, need_head: bool = True) -> Classifier:
    """Load the weights strictly. CLASSES (--classes) names the outputs where the checkpoint does not.

    UserError if the file cannot be read or fits no architecture; NoClassifier if it can give features only, which is
    accepted with need_head=False.
    """
    weights = read_weights(source.path)
    arch = source.torchvision.partition(":")[0] or source.args.get("arch")
    model, arch, head_name = _build(source, weights, arch)
    model.float().eval().requires_grad_(False)
    linear = _detach(model, head_name) if head_name else None
    if not need_head:
        return Classifier(source, arch, model, None, [], [], "")
    if linear is None:
        raise NoClassifier(f"--checkpoint {source.path}: no classifier in it, so only transfer datasets can judge it")
    ids, names, origin = name_outputs(source, linear.out_features, classes)
    head: torch.nn.Module = linear
    if source.args.get("head") == "cosine":
        head = _as_trained(linear)
    return Classifier(source, arch, model, head, ids, names, origin)


# ===== reading files: plain tensors only =====


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """The state dict in a file, without wrappers and prefixes. Nothing in the file is executed."""
    import pickle

    import torch

    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(str(path))
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"--checkpoint {path}: holds Python objects, which are not loaded because they can run code (or it is not "
            "a checkpoint at all); save its model.state_dict() instead"
        ) from None
    except Exception as error:  # torch and safetensors raise several types of their own on damaged files
        if isinstance(error, (OSError, MemoryError)) and not isinstance(error, EOFError):
            raise
        first = (str(error).splitlines() or [""])[0]
        raise UserError(f"--checkpoint {path}: damaged or not a checkpoint ({first}); copy it again") from None
    return strip_prefixes(unwrap(content, path))


def unwrap(content: Any, path: str | Path) -> dict[str, torch.Tensor]:
    """{"state_dict": {...}} and the like -> the innermost mapping from names to tensors."""
    import torch

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
    from torchvision.models import list_models

    families = ("resnet50", "resnet18", "resnet34", "resnet101", "resnet152")
    import torchvision

    rest = [name for name in list_models(module=torchvision.models) if name not in families]
    complaint = ""
    for name in [arch] if arch else [*families, *rest]:
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
    import torch

    from utils.model import build_model, head_name

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


def _detach(model: torch.nn.Module, name: str) -> torch.nn.Linear:
    """Take the classifier off: the model then returns features."""
    import torch

    head = model.get_submodule(name)
    assert isinstance(head, torch.nn.Linear)
    _replace(model, name, torch.nn.Identity())
    return head


def _as_trained(linear: torch.nn.Linear) -> torch.nn.Module:
    """The cosine classifier whose exported rows LINEAR holds: the same ranking, and the confidences of training."""
    from utils.model import CosineLinear

    head = CosineLinear(linear.in_features, linear.out_features)
    head.load_state_dict(linear.state_dict())
    return head.eval().requires_grad_(False)


# ===== what the outputs mean =====


def name_outputs(source: Source, count: int, classes: str | None) -> tuple[list[str], list[str], str]:
    """(class ids, class names, where they come from) of COUNT outputs, in the outputs' order.

    The checkpoint's own record wins; --classes is for foreign weights and must not contradict it. Without either,
    1000 and 100 outputs are taken as ImageNet-1K and ImageNet-100 in sorted wnid order, as ImageFolder trains them.
    """
    recorded = list(source.args.get("class_ids") or [])
    if classes is not None:
        ids, names = ordered_classes(classes)
        origin = f"--classes {classes}"
        if recorded and recorded != ids:
            raise UserError(f"--classes {classes}: {source.path} records other classes in its args.json; leave it out")
    elif recorded:
        ids, names, origin = recorded, list(source.args.get("class_names") or recorded), "args.json of the run"
    elif count in (1000, 100):
        table = load_classes("imagenet_1k" if count == 1000 else "imagenet_100")
        ids, names = table.ids, [row.first_name for row in table.rows]
        origin = f"assumed: the {count} sorted wnids of {table.name}"
    else:
        raise NoClassifier(f"--checkpoint {source.path}: {count} outputs of unknown classes; name them with --classes")
    if len(ids) != count:
        where = f"--classes {classes}" if classes is not None else f"args.json beside {source.path}"
        raise UserError(f"{where}: names {len(ids)} classes but the checkpoint has {count} outputs")
    return ids, names, origin


def ordered_classes(spec: str) -> tuple[list[str], list[str]]:
    """Ids and first names of `--classes`. A .txt file of ids keeps its own order: it is the order of the outputs."""
    table = load_classes(spec)
    names = {row.wnid: row.first_name for row in table.rows}
    if Path(spec).suffix.lower() == ".txt":
        written = [entry for _, entry in read_list(Path(spec).expanduser())]
        if set(written) == set(names) and len(written) == len(names):
            return written, [names[class_id] for class_id in written]
    return table.ids, [row.first_name for row in table.rows]


def transform_of(source: Source) -> tuple[int, int, str]:
    """(short side, centre crop, interpolation): as torchvision published the weights, as the run recorded, or ours."""
    if source.torchvision:
        from torchvision.models import get_model_weights

        name, _, version = source.torchvision.partition(":")
        published = get_model_weights(name)[version].transforms()
        return published.resize_size[0], published.crop_size[0], published.interpolation.value
    return int(source.args.get("resize", RESIZE)), int(source.args.get("image_size", CROP)), INTERPOLATION
