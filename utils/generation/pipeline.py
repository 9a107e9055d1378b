"""A Stable Diffusion pipeline on disk: found (local files first), checked and hashed before torch is imported."""

import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct
from safetensors import SafetensorError, safe_open

from utils.cli import UserError
from utils.storage import read_json, sha256_file

# Component -> its files, of which it needs one. Weights may be cut in parts, which the .index.json names.
UNET_OR_VAE = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json")
TRANSFORMER = ("model.safetensors", "model.safetensors.index.json")
COMPONENTS = {
    "unet": UNET_OR_VAE,
    "vae": UNET_OR_VAE,
    "text_encoder": TRANSFORMER,
    "tokenizer": ("tokenizer.json", "vocab.json"),
    "scheduler": ("scheduler_config.json",),
}
CHECKER = {"safety_checker": TRANSFORMER, "feature_extractor": ("preprocessor_config.json",)}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Enough of a hub repository to load it: settings and safetensors, none of the pickled or half-precision copies.
HUB_FILES = ["model_index.json", "*/*.json", "*/*.txt"]
HUB_FILES += [f"*/{stem}{rest}" for stem in ("model", "diffusion_pytorch_model") for rest in (".safetensors", "-0*")]


class UNetSettings(Struct):
    """Of unet/config.json what is read here."""

    sample_size: Annotated[int, Meta(ge=1)] | Annotated[list[int], Meta(min_length=1)]  # latents a side


class VAESettings(Struct):
    """Of vae/config.json."""

    block_out_channels: Annotated[list[int], Meta(min_length=1)]


class NoiseSchedule(Struct):
    """Of scheduler/scheduler_config.json; what it lacks is as in Stable Diffusion 1.4."""

    beta_start: Annotated[float, Meta(gt=0, lt=1)] = 0.00085
    beta_end: Annotated[float, Meta(gt=0, lt=1)] = 0.012


class WeightParts(Struct):
    """Of the index of weights that are cut in parts."""

    weight_map: dict[str, str]  # {tensor: file}


@dataclass(frozen=True)
class PipelineFolder:
    """A checked pipeline folder. `name` is the hub id or the folder as the user gave it."""

    name: str
    revision: str | None  # commit on the hub, None for a plain folder
    path: Path

    @property
    def has_safety_checker(self) -> bool:
        return bool(_class_of(self.settings("model_index.json"), "safety_checker"))

    @property
    def pixels_per_latent(self) -> int:
        """Side of the square of pixels that one latent stands for: 8 for SD 1.x and 2.x."""
        return 2 ** (len(self.settings("vae/config.json", VAESettings).block_out_channels) - 1)

    @property
    def native_size(self) -> int:
        """Side of the images the UNet was trained on, in pixels: 512 for SD 1.x."""
        size = self.settings("unet/config.json", UNetSettings).sample_size
        return (size[0] if isinstance(size, list) else size) * self.pixels_per_latent

    def hashes(self, with_safety_checker: bool) -> dict[str, str]:
        """{relative path: sha256} of every file that can change a pixel; weights hash at the speed of the disk."""
        parts = [*COMPONENTS, *(CHECKER if with_safety_checker else ())]
        files = [file for name in parts for file in self.files(name)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            names = (file.relative_to(self.path).as_posix() for file in files)
            return dict(zip(names, pool.map(sha256_file, files), strict=True))

    def settings(self, name: str, kind: Any = dict[str, Any]) -> Any:
        """The value of KIND in the JSON file NAME; UserError if there is none."""
        if not (self.path / name).is_file():
            raise UserError(f"--model {self.name}: {self.path / name} does not exist; give a whole pipeline folder")
        return read_json(self.path / name, kind, "fetch the model again")

    def files(self, component: str) -> list[Path]:
        """What from_pretrained reads of COMPONENT, sorted; [] if something it cannot do without is missing."""
        folder = self.path / component
        found = [folder / name for name in (COMPONENTS | CHECKER)[component] if (folder / name).is_file()][:1]
        if not found or "safetensors" not in found[0].name:
            return sorted(file for file in folder.iterdir() if file.suffix in (".json", ".txt")) if found else []
        if found[0].suffix == ".json":
            files = self.settings(f"{component}/{found[0].name}", WeightParts).weight_map.values()
            found += sorted({folder / Path(name).name for name in files}) or [folder / "no weights"]
        found.insert(0, folder / "config.json")
        return found if all(file.is_file() for file in found) else []


def find_pipeline(model: str, revision: str | None = None, download: bool = True) -> PipelineFolder:
    """The checked folder of MODEL, a path or a hub id. A hub id is taken from the local cache, else downloaded.

    UserError if it is neither, lacks a component, has a damaged file, or if the hub cannot be reached.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if revision:
            raise UserError(f"--revision {revision}: only a hub id has revisions; {model} is a folder")
        return check_pipeline(PipelineFolder(model, None, path))
    if not HUB_ID.fullmatch(model) or path.exists() or model.startswith(("data/", "models/", "runs/")):
        raise UserError(f"--model {model}: no such folder, and not a hub id such as CompVis/stable-diffusion-v1-4")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        cached = Path(snapshot_download(model, revision=revision, allow_patterns=HUB_FILES, local_files_only=True))
        return check_pipeline(PipelineFolder(model, cached.name, cached))  # the cache names folders by commit
    except (LocalEntryNotFoundError, UserError):  # not here, or an interrupted download: complete it
        if not download:
            raise UserError(f"--model {model}: not on this machine yet") from None
    fetched = _download(model, revision)
    return check_pipeline(PipelineFolder(model, fetched.name, fetched))


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    fetch = f"hf download {model}" + (f" --revision {revision}" if revision else "")
    try:
        HfApi().model_info(model, revision=revision, timeout=5)  # fails in seconds where there is no network
        print(f"fetching {model} (about 5 GB for Stable Diffusion 1.4); an interrupted download continues", flush=True)
        return Path(snapshot_download(model, revision=revision, allow_patterns=HUB_FILES))
    except (GatedRepoError, RepositoryNotFoundError):
        problem = "the hub does not know it, or wants you to log in (hf auth login) and accept its licence"
    except RevisionNotFoundError:
        problem = f"the hub has no revision {revision} of it"
    except Exception as error:  # requests, httpx, offline mode, ...: the ways to have no network are many
        problem = f"its weights are not on this machine and the hub cannot be reached ({type(error).__name__})"
    raise UserError(
        f"--model {model}: {problem}; fetch them where there is a network with `{fetch}`, "
        "or give a pipeline folder with --model; to try the whole path now, without downloads: "
        "--model models/fashion-sd --classes fashion"
    )


def check_pipeline(folder: PipelineFolder) -> PipelineFolder:
    """Return FOLDER if every component of a Stable Diffusion 1.x/2.x pipeline is there and its files are whole."""
    index = folder.settings("model_index.json")
    if (kind := index.get("_class_name")) != "StableDiffusionPipeline":
        raise UserError(f"--model {folder.name} is a {kind}; generate.py draws with Stable Diffusion 1.x and 2.x")
    for component, names in (COMPONENTS | {name: CHECKER[name] for name in CHECKER if _class_of(index, name)}).items():
        if not _class_of(index, component):
            raise UserError(f"--model {folder.name}: model_index.json names no {component}; save the whole pipeline")
        files = folder.files(component)
        if not files:
            needed = " or ".join(name for name in names if not name.endswith(".index.json"))
            raise UserError(f"--model {folder.name}: component {component} is missing ({component}/{needed}); "
                            "copy or download the folder again")  # fmt: skip
        for file in files:
            if file.suffix == ".json":
                folder.settings(f"{component}/{file.name}")
            elif file.suffix == ".safetensors" and (problem := safetensors_problem(file)):
                raise UserError(f"--model {folder.name}: {file} is damaged ({problem}); fetch it again")
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
