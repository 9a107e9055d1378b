"""A pipeline of diffusers on disk: found (local files first), checked and hashed before torch is imported."""

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct
from safetensors import SafetensorError, safe_open

from utils.cli import UserError
from utils.generation.families import FAMILIES, Family, find_family
from utils.generation.lora import Lora, check_lora, find_lora
from utils.storage import read_json, sha256_file

# Files of a component, of which it needs one. Weights may be cut in parts, which the .index.json names.
DENOISER_OR_VAE = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json")
TEXT_ENCODER = ("model.safetensors", "model.safetensors.index.json")
FILES: dict[str, tuple[str, ...]] = dict.fromkeys(("unet", "transformer", "vae"), DENOISER_OR_VAE)
FILES |= {"scheduler": ("scheduler_config.json",), "feature_extractor": ("preprocessor_config.json",)}
TOKENIZER = ("tokenizer.json", "vocab.json", "spiece.model")
CHECKER = ("safety_checker", "feature_extractor")
SETTINGS = (".json", ".txt", ".model")  # of a tokenizer, a scheduler or a preprocessor
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Enough of a hub repository to load it: settings and safetensors, none of the pickled or half-precision copies.
HUB_FILES = ["model_index.json", "*/*.json", "*/*.txt", "*/*.model"]
HUB_FILES += [f"*/{stem}{rest}" for stem in ("model", "diffusion_pytorch_model") for rest in (".safetensors", "-0*")]


class UNetSettings(Struct):
    """Of the denoiser's config.json what is read here."""

    sample_size: Annotated[int, Meta(ge=1)] | Annotated[list[int], Meta(min_length=1)]  # latents a side


class VAESettings(Struct):
    """Of vae/config.json."""

    block_out_channels: Annotated[list[int], Meta(min_length=1)]


class NoiseSchedule(Struct):
    """Of scheduler/scheduler_config.json; what it lacks is as in Stable Diffusion 1.4."""

    beta_start: Annotated[float, Meta(gt=0, lt=1)] = 0.00085
    beta_end: Annotated[float, Meta(gt=0, lt=1)] = 0.012
    shift: Annotated[float, Meta(gt=0)] | None = None  # of a flow-matching model's noise, towards more of it


class WeightParts(Struct):
    """Of the index of weights that are cut in parts."""

    weight_map: dict[str, str]  # {tensor: file}


@dataclass(frozen=True)
class PipelineFolder:
    """A checked pipeline folder. `name` is the hub id or the folder as the user gave it."""

    name: str
    revision: str | None  # commit on the hub, None for a plain folder
    path: Path
    loras: tuple[Lora, ...] = ()  # to be merged into its weights

    @cached_property
    def family(self) -> Family:
        """How it is drawn with; UserError if it is no pipeline from text to images that this project knows."""
        kind = self.settings("model_index.json").get("_class_name")
        if family := find_family(kind, [self.name, *(lora.name for lora in self.loras)]):
            return family
        known = ", ".join(dict.fromkeys(row.pipeline for row in FAMILIES.values()))
        raise UserError(f"--model {self.name} is a {kind}; generate.py draws images from text with {known}")

    @cached_property
    def components(self) -> list[str]:
        """Those it cannot do without, then the others that model_index.json names a class for."""
        index = self.settings("model_index.json")
        needed = [self.family.denoiser, "vae", "text_encoder", "tokenizer", "scheduler"]
        return [*needed, *(name for name in index if _class_of(index, name) and name not in needed)]

    @property
    def has_safety_checker(self) -> bool:
        return "safety_checker" in self.components

    @property
    def pixels_per_latent(self) -> int:
        """Side of the square of pixels that one latent stands for: 8 for SD 1.x and 2.x."""
        return 2 ** (len(self.settings("vae/config.json", VAESettings).block_out_channels) - 1)

    @property
    def native_size(self) -> int:
        """Side of the images it was trained on, in pixels: 512 for SD 1.x."""
        config = f"{self.family.denoiser}/config.json"
        if self.family.denoiser != "unet" and "sample_size" not in self.settings(config):  # of Flux
            return self.family.size
        size = self.settings(config, UNetSettings).sample_size
        return (size[0] if isinstance(size, list) else size) * self.pixels_per_latent

    def parts(self, with_safety_checker: bool) -> list[str]:
        """The components that are loaded."""
        return [name for name in self.components if with_safety_checker or name not in CHECKER]

    def weights(self, component: str) -> list[Path]:
        """Its safetensors files."""
        return [file for file in self.files(component) if file.suffix == ".safetensors"]

    def hashes(self, with_safety_checker: bool) -> dict[str, str]:
        """{relative path: sha256} of every file that can change a pixel; weights hash at the speed of the disk."""
        files = [file for name in self.parts(with_safety_checker) for file in self.files(name)]
        names = [file.relative_to(self.path).as_posix() for file in files]
        names += [f"lora {number}" for number in range(len(self.loras))]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            hashes = pool.map(sha256_file, [*files, *(lora.path for lora in self.loras)])
            return dict(zip(names, hashes, strict=True))

    def settings(self, name: str, kind: Any = dict[str, Any]) -> Any:
        """The value of KIND in the JSON file NAME; UserError if there is none."""
        if not (self.path / name).is_file():
            raise UserError(f"--model {self.name}: {self.path / name} does not exist; give a whole pipeline folder")
        return read_json(self.path / name, kind, "fetch the model again")

    def files(self, component: str) -> list[Path]:
        """What from_pretrained reads of COMPONENT, sorted; [] if something it cannot do without is missing."""
        folder = self.path / component
        found = [folder / name for name in files_of(component) if (folder / name).is_file()][:1]
        if not found or "safetensors" not in found[0].name:
            return sorted(file for file in folder.iterdir() if file.suffix in SETTINGS) if found else []
        if found[0].suffix == ".json":
            files = self.settings(f"{component}/{found[0].name}", WeightParts).weight_map.values()
            found += sorted({folder / Path(name).name for name in files}) or [folder / "no weights"]
        found.insert(0, folder / "config.json")
        return found if all(file.is_file() for file in found) else []


def find_pipeline(model: str, revision: str | None = None, loras: Sequence[str] = (), download=True) -> PipelineFolder:
    """The checked folder of MODEL, a path or a hub id. A hub id is taken from the local cache, else downloaded.

    LORAS: FILE_OR_ID:WEIGHT of weights to be merged into its own. UserError if it is neither, lacks a component, has a
    damaged file, if the hub cannot be reached, or if a LoRA is for another base.
    """
    adapters = tuple(find_lora(text, download) for text in loras)
    path = Path(model).expanduser()
    if path.is_dir():
        if revision:
            raise UserError(f"--revision {revision}: only a hub id has revisions; {model} is a folder")
        return check_pipeline(PipelineFolder(model, None, path, adapters))
    if not HUB_ID.fullmatch(model) or path.exists() or model.startswith(("data/", "models/", "runs/")):
        raise UserError(f"--model {model}: no such folder, and not a hub id such as CompVis/stable-diffusion-v1-4")
    from huggingface_hub import errors, snapshot_download

    try:
        cached = Path(snapshot_download(model, revision=revision, allow_patterns=HUB_FILES, local_files_only=True))
        return check_pipeline(PipelineFolder(model, cached.name, cached, adapters))  # the cache names folders by commit
    except (errors.LocalEntryNotFoundError, UserError):  # not here, or an interrupted download: complete it
        if not download:
            raise UserError(f"--model {model}: not on this machine yet") from None
    fetched = _download(model, revision)
    return check_pipeline(PipelineFolder(model, fetched.name, fetched, adapters))


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, errors, hf_hub_download, snapshot_download
    from huggingface_hub.utils import filter_repo_objects

    fetch = f"hf download {model}" + (f" --revision {revision}" if revision else "")
    try:
        # fails in seconds where there is no network
        found = HfApi().model_info(model, revision=revision, timeout=5, files_metadata=True)
        index = Path(hf_hub_download(model, "model_index.json", revision=revision))
        _ = PipelineFolder(model, None, index.parent).family  # told before the weights are fetched
        wanted = filter_repo_objects(found.siblings or [], allow_patterns=HUB_FILES, key=lambda file: file.rfilename)
        size = sum(file.size or 0 for file in wanted) / 1e9
        print(f"fetching {model} ({size:.1f} GB); an interrupted download continues", flush=True)
        return Path(snapshot_download(model, revision=revision, allow_patterns=HUB_FILES))
    except UserError:
        raise
    except (errors.GatedRepoError, errors.RepositoryNotFoundError):
        problem = "the hub does not know it, or wants you to log in (hf auth login) and accept its licence"
    except errors.RevisionNotFoundError:
        problem = f"the hub has no revision {revision} of it"
    except errors.EntryNotFoundError:
        problem = "it has no model_index.json, so that it is no pipeline of diffusers (a LoRA is given with --lora)"
    except Exception as error:  # requests, httpx, offline mode, ...: the ways to have no network are many
        problem = f"its weights are not on this machine and the hub cannot be reached ({type(error).__name__})"
    raise UserError(
        f"--model {model}: {problem}; fetch them where there is a network with `{fetch}`, "
        "or give a pipeline folder with --model; to try the whole path now, without downloads: "
        "--model models/fashion-sd --classes fashion"
    )


def files_of(component: str) -> tuple[str, ...]:
    """The files of which COMPONENT, by its name in model_index.json, needs one."""
    return FILES.get(component) or (TOKENIZER if component.startswith("tokenizer") else TEXT_ENCODER)


def check_pipeline(folder: PipelineFolder) -> PipelineFolder:
    """Return FOLDER if every component of its family's pipeline is there and its files are whole."""
    index = folder.settings("model_index.json")
    for component in folder.components:
        if not _class_of(index, component):
            raise UserError(f"--model {folder.name}: model_index.json names no {component}; save the whole pipeline")
        files = folder.files(component)
        if not files:
            needed = " or ".join(name for name in files_of(component) if not name.endswith(".index.json"))
            raise UserError(f"--model {folder.name}: component {component} is missing ({component}/{needed}); "
                            "copy or download the folder again")  # fmt: skip
        saved = {file.name for file in files}
        if "spiece.model" in saved and "tokenizer.json" not in saved and not find_spec("sentencepiece"):
            raise UserError(f"--model {folder.name}: {component} needs a package: pip install sentencepiece")
        for file in files:
            if file.suffix == ".json":
                folder.settings(f"{component}/{file.name}")
            elif file.suffix == ".safetensors" and (problem := safetensors_problem(file)):
                raise UserError(f"--model {folder.name}: {file} is damaged ({problem}); fetch it again")
    for lora in folder.loras:
        check_lora(lora, folder.weights(folder.family.denoiser), folder.name)
    return folder


def _class_of(index: dict, component: str) -> str | None:
    """The class that model_index.json names for COMPONENT: ["diffusers", "AutoencoderKL"], or [null, null]."""
    named = index.get(component)
    return named[0] if isinstance(named, list) and named else None


def safetensors_problem(path: Path) -> str | None:
    """What is wrong with a safetensors file, judged by its header and its size; None if it is whole."""
    try:
        with safe_open(path, "numpy"):
            return None
    except (SafetensorError, OSError) as error:
        return str(error)
