"""Checkpoints of many origins: where their weights lie, the class behind every output, how images are prepared.

A checkpoint is a run folder of train.py or a file in it, a file of weights from elsewhere, or a name of torchvision's
or timm's pretrained models. What is in the file is read by weights.py. Nothing here imports torch unless one of these
two is asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from utils.classes import load_classes, read_list
from utils.cli import UserError
from utils.images import load_eval_image
from utils.storage import read_json, sha256_bytes, sha256_file

if TYPE_CHECKING:
    import torch

WEIGHT_SUFFIXES = (".pth", ".pt", ".bin", ".tar", ".ckpt", ".safetensors")
RESIZE, CROP = 256, 224  # short side and centre crop, pixels (t-ReX defaults, and torchvision's references)
INTERPOLATION = "bilinear"  # not in paper: as train.py's validation and torchvision's references


class NoClassifier(UserError):
    """The weights have no classifier, or nobody knows which class its outputs stand for: only features are of use."""


@dataclass(frozen=True)
class Transform:
    """How an image is prepared: short side to `resize`, then the centre `crop`; both in pixels."""

    resize: int
    crop: int
    interpolation: str  # bilinear or bicubic
    border: int = 0  # cut off every side first (ObjectNet)
    truncated: bool = False  # read JPEGs that end early as far as they go

    def read(self, path: str) -> torch.Tensor:
        """Image file -> (crop, crop, 3) uint8 RGB. Raises BadImage."""
        pixels = load_eval_image(
            path, self.resize, self.crop, self.interpolation, border=self.border, truncated=self.truncated
        )
        return pixels.permute(1, 2, 0)  # back to the decoder's own order, which is channels_last


class Recorded(msgspec.Struct):
    """What judging needs of a run's args.json; nothing of it for foreign weights."""

    arch: str | None = None
    head: str | None = None
    class_ids: list[str] | None = None
    class_names: list[str] | None = None
    dataset: str = ""
    image_size: Annotated[int, msgspec.Meta(ge=1, le=8192)] = CROP
    resize: Annotated[int, msgspec.Meta(ge=1, le=8192)] = RESIZE
    seed: int | None = None


@dataclass(frozen=True)
class Source:
    """A checkpoint that was found but not loaded yet: enough for a dry run and for the key of cached results."""

    label: str
    path: str  # of the weights; the name for torchvision's
    sha256: str
    args: dict[str, Any]  # args.json of the run, {} for foreign weights
    torchvision: str = ""  # "resnet50:IMAGENET1K_V2" for weights that torchvision publishes
    timm: str = ""  # "resnet50.a1_in1k" for weights that timm publishes
    key: str = ""  # which of the file's state dicts; "": the usual one

    @property
    def recorded(self) -> Recorded:
        """What the run recorded."""
        return msgspec.convert(self.args, Recorded)

    @property
    def unfinished(self) -> bool:
        """Whether these are the weights of a run of train.py that has not come to its end."""
        return Path(self.path).name == "checkpoint.pth" and bool(self.args)

    @property
    def folder(self) -> Path:
        """Where its results go if the user does not say: the checkpoint's own folder, or runs/LABEL."""
        return Path("runs") / self.label if self.torchvision or self.timm else Path(self.path).parent


def locate(spec: str, download: bool = True) -> Source:
    """Find a checkpoint: `[LABEL=]` then a run folder, a weights file[:place in it], a torchvision name[:weights] or
    `timm:` and a name of timm's.

    UserError if there is no such thing. Reads the file once for its hash. Without `download`, torchvision weights that
    are not in its cache yet have sha256 "".
    """
    label, _, rest = spec.partition("=")
    if not rest or Path(spec).exists():
        label, rest = "", spec
    if rest.startswith("timm:") and not Path(rest).exists():
        return _locate_timm(rest.removeprefix("timm:"), label, download)
    path, key = Path(rest).expanduser(), ""
    if not path.exists() and ":" in rest and Path(rest.rpartition(":")[0]).expanduser().is_file():
        path, key = Path(rest.rpartition(":")[0]).expanduser(), rest.rpartition(":")[2]
    if path.is_dir():
        path = _weights_of_run(path)
    if path.is_file():
        args, sha256 = _read_args(path.parent), sha256_file(path)
        own = path.resolve().parent.name if args else path.stem  # the run folder's name for our own runs
        label = label or own + (f".{key}" if key else "")
        if key:  # another model in the same file
            sha256 = sha256_bytes(f"{sha256}:{key}".encode())
        return Source(label, str(path), sha256, args, key=key)
    if path.exists():
        raise UserError(f"--checkpoint {rest}: neither a folder nor a regular file")
    if path.suffix in WEIGHT_SUFFIXES or len(path.parts) > 1:
        raise UserError(f"--checkpoint {rest}: no such file; give a run folder of train.py or a weights file")
    return _locate_torchvision(rest, label, download)


def relabelled(source: Source, rename: Callable[[list[str]], list[str]]) -> Source:
    """SOURCE with the classes that its run recorded under the names that RENAME gives them, see --label-map."""
    recorded = source.recorded.class_ids
    return replace(source, args=source.args | {"class_ids": rename(recorded)}) if recorded else source


def refuse_twins(sources: Sequence[Source]) -> None:
    """UserError if two models have one name: they could not be told apart in a table."""
    seen: dict[str, str] = {}
    for source in sources:
        if (other := seen.setdefault(source.label, source.path)) is not source.path:
            raise UserError(
                f"--checkpoint: {other} and {source.path} are both called {source.label}; name them: A={other} "
                f"B={source.path}"
            )


def _read_args(folder: Path) -> dict[str, Any]:
    """The args.json of a run, {} where there is none. UserError if it is not what train.py writes."""
    path = folder / "args.json"
    if not path.exists():
        return {}
    read_json(path, Recorded)
    return read_json(path)


def _weights_of_run(folder: Path) -> Path:
    """The exported weights of a run folder, or its last checkpoint while it is still training."""
    dataset = Path(msgspec.convert(_read_args(folder), Recorded).dataset).name
    for name in (f"{dataset}.pth", f"{folder.name}.pth", "checkpoint.pth"):
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"--checkpoint {folder}: no weights in this folder ({dataset or folder.name}.pth, checkpoint.pth)")


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
    if sha256 and not sha256.startswith(path.stem.rsplit("-", 1)[-1]):  # torchvision puts the hash into the name
        raise UserError(f"--checkpoint {spec}: {path} fails its checksum; delete it, it is then downloaded again")
    return Source(label or f"{name}.{weights.name}", str(path), sha256, {}, torchvision=f"{name}:{weights.name}")


def _locate_timm(name: str, label: str, download: bool) -> Source:
    """`resnet50.a1_in1k`, or `resnet50` for timm's default weights: from the hub's cache, else from the hub."""
    spec = f"--checkpoint timm:{name}"
    try:
        from timm import get_pretrained_cfg
    except ImportError:
        raise UserError(f"{spec}: timm is not installed here; pip install timm") from None
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    try:
        published = get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:
        remedy = "timm.list_pretrained() has the names, such as resnet50.a1_in1k"
        raise UserError(f"{spec}: {str(error).rstrip('.')}; {remedy}") from None
    if not published or not published.hf_hub_id:
        raise UserError(f"{spec}: timm has no weights of it on the hub; give a file of weights")
    place = published.hf_hub_id, published.hf_hub_filename or "model.safetensors"
    path = try_to_load_from_cache(*place)
    if not isinstance(path, str) and download:
        try:
            path = hf_hub_download(*place)
        except Exception as error:  # requests, httpx, offline mode, ...: the ways to have no network are many
            fetch = f"fetch it where there is a network: hf download {' '.join(place)}"
            raise UserError(
                f"{spec}: not here, and the hub cannot be reached ({type(error).__name__}); {fetch}"
            ) from None
    file = path if isinstance(path, str) else ""
    return Source(label or name, file or name, sha256_file(file) if file else "", {}, timm=name)


# ===== what the outputs mean =====


def name_outputs(source: Source, count: int, classes: str | None) -> tuple[list[str], list[str], str]:
    """(class ids, class names, where they come from) of COUNT outputs, in the outputs' order.

    The checkpoint's own record wins; --classes is for foreign weights and must not contradict it. Without either,
    1000 and 100 outputs are taken as ImageNet-1K and ImageNet-100 in sorted wnid order, as ImageFolder trains them.
    """
    recorded = source.recorded.class_ids or []
    if classes is not None:
        ids, names = ordered_classes(classes)
        origin = f"--classes {classes}"
        if recorded and recorded != ids:
            remedy = "leave it out; --label-map FILE renames them (a .tsv with name and id)"
            raise UserError(f"--classes {classes}: {source.path} records other classes in its args.json; {remedy}")
    elif recorded:
        ids, names, origin = recorded, source.recorded.class_names or recorded, "args.json of the run"
    elif count in (1000, 100):
        table = load_classes("imagenet_1k" if count == 1000 else "imagenet_100")
        ids, names = table.ids, [row.first_name for row in table.rows]
        origin = f"assumed: the {count} sorted wnids of {table.name}"
    else:
        raise NoClassifier(f"--checkpoint {source.path}: {count} outputs of unknown classes; name them with --classes")
    if len(ids) != count:
        where = f"--classes {classes}" if classes is not None else f"args.json beside {source.path}"
        raise UserError(f"{where}: names {len(ids)} classes but the checkpoint has {count} outputs")
    if len(names) != count:
        raise UserError(f"args.json beside {source.path}: has {len(names)} class_names for {count} class_ids; mend it")
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


def transform_of(source: Source) -> Transform:
    """As torchvision published the weights, as the run recorded, or t-ReX's defaults."""
    if source.torchvision:
        from torchvision.models import get_model_weights

        name, _, version = source.torchvision.partition(":")
        published = get_model_weights(name)[version].transforms()
        return Transform(published.resize_size[0], published.crop_size[0], published.interpolation.value)
    if source.timm:
        from timm import get_pretrained_cfg

        asked: Any = get_pretrained_cfg(source.timm)
        crop = asked.input_size[-1]  # timm's own rule: the short side is floor(crop / crop_pct)
        return Transform(math.floor(crop / asked.crop_pct), crop, asked.interpolation)
    return Transform(source.recorded.resize, source.recorded.image_size, INTERPOLATION)
