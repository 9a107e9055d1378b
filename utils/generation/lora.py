"""LoRA weights (Hu et al., ICLR 2022) for a generator: found and held against the base before torch is imported."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from utils.cli import UserError

IN_HUB = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:/(.+\.safetensors))?")
LAYER = re.compile(r"(.+?)[._]lora(?:_linear_layer)?[._](down|up|A|B)(?:\.default)?\.weight")
# What the formats of diffusers, peft and kohya-ss put before the name of a layer; text encoders are left unchecked.
PREFIX = re.compile(r"(base_model_model_)?(lora_)?(unet|transformer)_")
TEXT_ENCODER = re.compile(r"(lora_te\d?_|text_encoder)")
# Layers by their names in Stability's and Black Forest Labs' own code, which diffusers translates: only widths tell.
TRANSLATED = re.compile(r"(input|output|double|single)_blocks|middle_block")


@dataclass(frozen=True)
class Lora:
    """A checked file. `name` is the file or hub id as the user gave it."""

    name: str
    weight: float
    path: Path


def parse_lora(text: str) -> tuple[str, float]:
    """FILE_OR_ID[:WEIGHT] -> (file or id, weight); 1 if it has none."""
    name, colon, weight = text.rpartition(":")
    try:
        return (name, float(weight)) if colon else (text, 1.0)
    except ValueError:
        return text, 1.0


def find_lora(text: str, download: bool = True) -> Lora:
    """The file of TEXT, FILE_OR_ID[:WEIGHT]; an id may end with the name of a file. UserError if it cannot be used."""
    name, weight = parse_lora(text)
    if not -100 <= weight <= 100 or (name == text and ":" in text and not Path(text).expanduser().is_file()):
        raise UserError(f"--lora {text}: give a weight such as 1 or 0.8")
    path = Path(name).expanduser()
    if not path.is_file():
        path = _in_hub(name, download)
    if path.suffix != ".safetensors":
        raise UserError(f"--lora {name}: only .safetensors are read, as other formats can run code")
    return Lora(name, weight, path)


def _in_hub(name: str, download: bool) -> Path:
    """The file of a hub id, from the local cache or fetched."""
    from huggingface_hub import snapshot_download

    match = IN_HUB.fullmatch(name)
    if not match or name.startswith(("data/", "models/", "runs/")):
        raise UserError(f"--lora {name}: no such file, and not a hub id such as latent-consistency/lcm-lora-sdv1-5")
    repository, file = match[1], match[2] or "pytorch_lora_weights.safetensors"  # diffusers' name for it
    for here in (True, False) if download else (True,):
        with suppress(Exception):  # not here; or no network, gated, unknown: the ways are many
            path = Path(snapshot_download(repository, allow_patterns=[file], local_files_only=here)) / file
            if path.is_file():
                return path
    raise UserError(f"--lora {name}: {file} is not here, and the hub cannot be reached, lacks it (OWNER/NAME/FILE is "
                    "another) or wants you to log in; fetch it where there is a network: "
                    f"hf download {repository} {file}")  # fmt: skip


def shapes(files: Iterable[Path]) -> dict[str, list[int]]:
    """{name: shape} of the tensors in FILES, from their headers."""
    found: dict[str, list[int]] = {}
    for path in files:
        with safe_open(path, "numpy") as tensors:
            found |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    return found


def check_lora(lora: Lora, base: Iterable[Path], base_name: str) -> None:
    """UserError if LORA is damaged, no LoRA, or does not fit the network whose weights are in the files BASE."""
    try:
        layers = {key: shape for key, shape in shapes([lora.path]).items() if not TEXT_ENCODER.match(key)}
    except (SafetensorError, OSError) as error:
        raise UserError(f"--lora {lora.name} is damaged ({error}); fetch it again") from None
    network = {name.removesuffix(".weight").replace(".", "_"): shape for name, shape in shapes(base).items()}
    widths = {shape[1] for shape in network.values() if len(shape) > 1}
    parts = [(match, shape) for key, shape in layers.items() if (match := LAYER.fullmatch(key))]
    if not parts:
        raise UserError(f"--lora {lora.name}: it holds no LoRA of the network (layers named ...lora_A and ...lora_B)")
    known = 0
    for match, shape in parts:
        full = match[1].replace(".processor.", ".").replace(".", "_")
        layer = next((name for name in (full, PREFIX.sub("", full, count=1)) if name in network), None)
        reads = match[2] in ("down", "A")
        known += layer is not None
        fits = layer is None or (shape[1] == network[layer][1] if reads else shape[0] == network[layer][0])
        if layer is None and reads:
            fits = bool(TRANSLATED.search(full)) and shape[1] in widths
        if not fits:
            raise UserError(f"--lora {lora.name} is for another base than {base_name}: its layer {match[1]} of shape "
                            f"{'x'.join(map(str, shape))} does not fit")  # fmt: skip


def merge(pipeline, loras: Iterable[Lora]) -> None:
    """Add the weights of LORAS to those of PIPELINE, on the CPU, so that every device draws with the same numbers."""
    weights = {}
    for number, lora in enumerate(loras):
        try:
            pipeline.load_lora_weights(lora.path.parent, weight_name=lora.path.name, adapter_name=f"lora{number}")
        except Exception as error:  # diffusers and peft raise their own kinds
            raise UserError(f"--lora {lora.name} cannot be loaded: {str(error).splitlines()[0]}") from error
        weights[f"lora{number}"] = lora.weight
    pipeline.set_adapters(list(weights), list(weights.values()))
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
