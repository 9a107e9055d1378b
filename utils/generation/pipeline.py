"""A Stable Diffusion pipeline on disk: found (local files first), checked and hashed before torch is imported."""

from __future__ import annotations

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from utils.cli import UserError
from utils.storage import sha256_file

COMPONENTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "safety_checker": "model",
}  # component -> stem of its safetensors file
SETTINGS = {
    "scheduler": ("scheduler_config.json",),
    "tokenizer": ("tokenizer.json", "vocab.json"),
    "feature_extractor": ("preprocessor_config.json",),
}  # component without weights -> files of which it needs one
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Enough of a hub repository to load it: settings and safetensors, none of the pickled or half-precision copies.
HUB_FILES = ["model_index.json", "*/*.json", "*/*.txt"]
HUB_FILES += [f"*/{stem}{rest}" for stem in ("model", "diffusion_pytorch_model") for rest in (".safetensors", "-0*")]
TRY_NOW = "to try the whole path now, without downloads: --model models/digits-sd --classes digits"


@dataclass(frozen=True)
class PipelineFolder:
    """A checked pipeline folder. `name` is the hub id or the folder as the user gave it."""

    name: str
    revision: str | None  # commit on the hub, None for a plain folder
    path: Path

    @property
    def has_safety_checker(self) -> bool:
        return (self._settings("model_index.json").get("safety_checker") or [None])[0] is not None

    @property
    def scheduler_config(self) -> dict:
        return self._settings("scheduler/scheduler_config.json")

    @property
    def pixels_per_latent(self) -> int:
        """Side of the square of pixels that one latent stands for: 8 for SD 1.x and 2.x."""
        return 2 ** (len(self._settings("vae/config.json")["block_out_channels"]) - 1)

    @property
    def native_size(self) -> int:
        """Side of the images the UNet was trained on, in pixels: 512 for SD 1.x."""
        size = self._settings("unet/config.json")["sample_size"]
        return (size[0] if isinstance(size, list) else size) * self.pixels_per_latent

    @property
    def is_sd1(self) -> bool:
        """Whether the UNet has the size of Stable Diffusion 1.x, so that rates published for it hold."""
        unet = self._settings("unet/config.json")
        sizes = (unet.get("sample_size"), unet.get("cross_attention_dim"), unet.get("block_out_channels"))
        return sizes == (64, 768, [320, 640, 1280, 1280])

    def hashes(self, with_safety_checker: bool) -> dict[str, str]:
        """{relative path: sha256} of every file that can change a pixel; weights hash at the speed of the disk."""
        folders = [*COMPONENTS, *(("safety_checker", "feature_extractor") if with_safety_checker else ())]
        files = [file for name in folders for file in component_files(self.path, name)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            digests = pool.map(sha256_file, files)
            return {file.relative_to(self.path).as_posix(): digest for file, digest in zip(files, digests, strict=True)}

    def _settings(self, name: str) -> dict:
        return _read_settings(self.path / name, self.name)


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
    snapshot = _cached(model, revision)
    if snapshot is None and not download:
        raise UserError(f"--model {model}: not on this machine yet")
    snapshot = snapshot or _download(model, revision)
    return check_pipeline(PipelineFolder(model, snapshot.name, snapshot))  # the cache names folders by commit


def _cached(model: str, revision: str | None) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=HUB_FILES, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    try:
        check_pipeline(PipelineFolder(model, folder.name, folder))
    except UserError:  # an interrupted download: complete it
        return None
    return folder


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
        f"or give a pipeline folder with --model; {TRY_NOW}"
    )


# ===== checks =====


def check_pipeline(folder: PipelineFolder) -> PipelineFolder:
    """Return FOLDER if every component of a Stable Diffusion 1.x/2.x pipeline is there and its files are whole."""
    index = _read_settings(folder.path / "model_index.json", folder.name)
    kind = index.get("_class_name")
    if kind != "StableDiffusionPipeline":
        raise UserError(f"--model {folder.name} is a {kind}; generate.py draws with Stable Diffusion 1.x and 2.x")
    optional = [name for name in ("safety_checker", "feature_extractor") if (index.get(name) or [None])[0]]
    for component in [*COMPONENTS, *optional]:
        if (index.get(component) or [None])[0] is None:
            raise UserError(f"--model {folder.name}: model_index.json names no {component}; save the whole pipeline")
        if not component_files(folder.path, component):
            needed = SETTINGS.get(component) or (f"{WEIGHTS[component]}.safetensors",)
            raise UserError(
                f"--model {folder.name}: component {component} is missing ({component}/{' or '.join(needed)}); "
                "copy or download the folder again"
            )
        for file in component_files(folder.path, component):
            if file.suffix == ".json":
                _read_settings(file, folder.name)
            elif file.suffix == ".safetensors" and (problem := safetensors_problem(file)):
                raise UserError(f"--model {folder.name}: {file} is damaged ({problem}); fetch it again")
    return folder


def component_files(root: Path, component: str) -> list[Path]:
    """The files that from_pretrained reads for COMPONENT, sorted; [] if one it cannot do without is missing."""
    folder = root / component
    if component in SETTINGS:
        if not any((folder / name).is_file() for name in SETTINGS[component]):
            return []
        return sorted(file for file in folder.iterdir() if file.suffix in (".json", ".txt"))
    stem = WEIGHTS[component]
    names = ("config.json", f"{stem}.safetensors", f"{stem}.safetensors.index.json")
    config, whole, index = (folder / name for name in names)
    if not config.is_file():
        return []
    if whole.is_file():
        return [config, whole]
    if not index.is_file():
        return []
    parts = sorted({folder / name for name in _read_settings(index, str(root)).get("weight_map", {}).values()})
    return [config, index, *parts] if parts and all(part.is_file() for part in parts) else []


def safetensors_problem(path: Path) -> str | None:
    """What is wrong with a safetensors file, judged by its header and its size; None if it is whole."""
    try:
        with safe_open(path, "numpy"):
            return None
    except (SafetensorError, OSError) as error:
        return str(error)


def _read_settings(path: Path, name: str) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--model {name}: {path} does not exist; give a whole pipeline folder") from None
    except (ValueError, OSError) as error:
        raise UserError(f"--model {name}: {path} cannot be read ({error}); fetch it again") from None
    if not isinstance(value, dict):
        raise UserError(f"--model {name}: {path} holds no settings; fetch it again")
    return value
