"""A dataset's recipe: everything that decides what its images look like, as dataset.json records it. Imports no torch.

A recipe starts as the command line asks for it. What was left open (None) is filled in by the folder's own record
(`settle`), the model (`with_model`) and the device (`with_device`), in this order.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import msgspec

from utils.cli import UserError, differences
from utils.dataset.folder import Dataset
from utils.generation.families import FAMILIES, SD, Family
from utils.generation.lora import parse_lora
from utils.generation.pipeline import PipelineFolder

if TYPE_CHECKING:
    import torch

# name on the command line -> (diffusers class, settings beside the model's own scheduler settings)
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "pndm": ("PNDMScheduler", {}),  # Liu et al., ICLR 2022: the scheduler SD 1.4 is released with
    # Song et al., ICLR 2021, eta 0. Its clipping to -1..1 is for pixels: latents reach beyond. It is the default where
    # the model's own settings, of PNDM, do not mention it.
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),  # Lu et al. 2022
    "euler": ("EulerDiscreteScheduler", {}),  # Karras et al., NeurIPS 2022, Algorithm 2 without churn
    "unipc": ("UniPCMultistepScheduler", {}),  # Zhao et al., NeurIPS 2023
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),  # the same with noise added on the way: of each image's own
    "euler_trailing": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),  # as for SDXL-Lightning
    "lcm": ("LCMScheduler", {}),  # Luo et al. 2023 (arXiv 2310.04378), of models and LoRA distilled for it
}
# What an image costs and how it looks. Command-line options replace single values.
RECIPES: dict[str, dict[str, Any]] = {
    # The released models: Stable Diffusion 1.4, guidance 2 (project page); 50 steps, PNDM, 512 px: SD 1.4's defaults.
    "paper": {"scheduler": "pndm", "steps": 50, "guidance_scale": 2.0, "guidance_interval": None},
    # Not in the paper: a third of the forwards. DPM-Solver++ 2M (Lu et al. 2022) needs about 20 steps; guidance only at
    # the noise levels where it matters, (0.28, 5.42] as Kynkäänniemi et al. (NeurIPS 2024) found for latent diffusion.
    "fast": {"scheduler": "dpmpp_2m", "steps": 18, "guidance_scale": 2.0, "guidance_interval": (0.28, 5.42)},
}
QUALITY = 95  # of JPEG and WebP; not in paper: our choice
# Keys that records of earlier versions lack, left out where there is nothing to say
LATER = ("prompts", "supervision", "negative_prompt", "lora")
CHROMA = "420"  # colour at half resolution, as in most of ImageNet's own files: a quarter fewer bytes, faster to decode


def _key(kind: str, default: Any = None, auto: bool = False) -> Any:
    """A key of KIND prompt, sampler, machine or storage; with AUTO, None takes what the folder was made with."""
    return field(default=default, metadata={"kind": kind, "auto": auto})


@dataclass(frozen=True)
class Recipe:
    """The keys in the order in which dataset.json has them; None where the model or the device decides."""

    name: str = _key("sampler", "paper")  # in RECIPES, or a family's
    classes: str = _key("prompt", "")  # sha256 of the class table
    prompt: str = _key("prompt", "c, d_c")  # template
    names: str = _key("prompt", "first")
    prompts: str | None = _key("prompt")  # sha256 of OUT/prompts.jsonl, where --prompts took the template's place
    supervision: str | None = _key("prompt", auto=True)  # one of prompts.SUPERVISION; None where nobody said
    images_per_class: int | str = _key("prompt", "imagenet")  # a number, "imagenet" or a factor of it: "10x"
    seed: int = _key("prompt", 0)
    scheduler: str = _key("sampler", "pndm")  # in SCHEDULERS, or the model's "own"
    steps: int = _key("sampler", 50)
    guidance_scale: float = _key("sampler", 2.0)
    # Noise levels (low, high], None for infinity; None guides everywhere
    guidance_interval: tuple[float, float | None] | None = _key("sampler")
    height: int | None = _key("sampler", auto=True)  # pixels, as drawn
    width: int | None = _key("sampler", auto=True)
    dtype: str | None = _key("machine", auto=True)  # fp16, bf16 or fp32
    attention: str | None = _key("machine", auto=True)
    compile: bool = _key("machine", False)
    batch_size: int | None = _key("machine", auto=True)
    safety: str | None = _key("storage", auto=True)  # redraw, keep or off
    format: str = _key("storage", "jpg")
    quality: int | None = _key("storage", QUALITY)
    chroma: str | None = _key("storage", CHROMA)
    save_size: int | None = _key("storage")  # pixels of the shorter side as stored; None: as drawn
    negative_prompt: str | None = _key("prompt")  # what guidance leads away from, in place of the empty prompt
    lora: tuple[str, ...] | None = _key("sampler")  # FILE_OR_ID:WEIGHT of weights merged into the model's

    def __post_init__(self) -> None:
        """UserError if a value has no meaning; JSON's list becomes the interval's tuple."""
        if self.guidance_scale < 1:
            raise UserError(f"--guidance-scale {self.guidance_scale:g}: 1 means no guidance, less has no meaning here")
        if self.steps > 1000:
            raise UserError(f"--steps {self.steps}: the models are trained with 1000 noise levels; take at most 1000")
        for key, most in (("guidance_scale", 1000), ("height", 8192), ("width", 8192), ("batch_size", 10_000)):
            if (getattr(self, key) or 0) > most:
                raise UserError(f"--{key.replace('_', '-')} {getattr(self, key):g}: take at most {most}")
        if self.guidance_interval is not None:
            low, high = self.guidance_interval
            high = None if high == math.inf else high  # which JSON has no word for
            object.__setattr__(self, "guidance_interval", (low, high) if low or high else None)
        if self.lora is not None:
            named = (parse_lora(text) for text in self.lora)
            object.__setattr__(self, "lora", tuple(f"{name}:{weight!r}".removesuffix(".0") for name, weight in named))

    @classmethod
    def asked(cls, name: str | None, family: Family = SD, **options: Any) -> Recipe:
        """The recipe NAME, or the values of FAMILY, with OPTIONS in place of its values; None leaves them as they are.

        UserError if the options contradict the family.
        """
        if family is not SD and name:
            raise UserError(
                f"--recipe {name}: of Stable Diffusion 1.x and 2.x; {family.name} has values of its own, which "
                "--steps, --guidance-scale and --guidance-interval replace"
            )
        name = name or ("paper" if family is SD else family.name)
        published = {"scheduler": family.schedulers[0], "steps": family.steps, "guidance_scale": family.guidance_scale}
        values = RECIPES[name] if family is SD else published | {"guidance_interval": None}
        if unknown := values.keys() - {key.name for key in fields(cls) if key.metadata["kind"] == "sampler"}:
            raise UserError(f"--recipe {name}: unknown keys {', '.join(sorted(unknown))} in RECIPES")
        kind = options["format"]
        stored = {"quality": None if kind == "png" else QUALITY, "chroma": CHROMA if kind == "jpg" else None}
        given = {key: value for key, value in options.items() if value is not None or key not in values}
        recipe = cls(**{"name": name, **values, **stored, **given})
        family.check(recipe)
        return recipe

    @property
    def family(self) -> Family:
        """What it is drawn with, by its name."""
        return FAMILIES.get(self.name, SD)

    @classmethod
    def of(cls, dataset: Dataset) -> Recipe:
        """The recipe that DATASET was drawn by. UserError if a key has a value of another type."""
        try:
            return msgspec.convert(dataset.recipe, cls)
        except msgspec.ValidationError as error:
            raise UserError(f"{dataset.root / 'dataset.json'}: the recipe was changed: {error}") from None

    def record(self) -> dict[str, Any]:
        """As dataset.json has it."""
        record = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {key: value for key, value in record.items() if value is not None or key not in LATER}

    def settle(self, existing: Dataset | None, counts: Mapping[str, int]) -> Recipe:
        """With what was left open taken from the EXISTING dataset; UserError with a diff if it has another recipe.

        COUNTS: {class id: images wanted}. A set may grow, as image k stays image k, but never shrink. Other attention
        kernels are allowed, as not every card has those of the record, and told.
        """
        if existing is None:
            return self
        Recipe.of(existing)  # refuses values of another type
        recorded = {name: getattr(self, name) for name in ("chroma", "attention", "supervision")}  # which came later
        recorded |= existing.recipe
        if all(counts.get(folder.id, 0) >= folder.count for folder in existing.folders):
            recorded["images_per_class"] = self.images_per_class
        left_open = [key.name for key in fields(self) if key.metadata["auto"] and getattr(self, key.name) is None]
        taken: dict[str, Any] = {name: recorded.get(name) for name in left_open}
        settled = replace(self, **taken)
        if recorded["attention"] != settled.attention:
            print(f"note: {existing.root} was drawn with --attention {recorded['attention']}; with {settled.attention} "
                  "low bits of its other images may differ", file=sys.stderr)  # fmt: skip
            recorded["attention"] = settled.attention
        refuse_difference(existing, recorded, settled.record(), "recipe")
        return settled

    def with_model(self, folder: PipelineFolder) -> Recipe:
        """With size and safety policy settled by what the model is; UserError if they do not go together."""
        height, width = self.height or folder.native_size, self.width or folder.native_size
        for side, pixels in (("height", height), ("width", width)):
            multiple = folder.pixels_per_latent * folder.family.patch
            if pixels % multiple:
                raise UserError(f"--{side} {pixels}: this model draws multiples of {multiple} pixels")
        if self.save_size and self.save_size > min(height, width):
            raise UserError(f"--save-size {self.save_size} is larger than the images; it only makes them smaller")
        if self.safety in ("redraw", "keep") and not folder.has_safety_checker:
            raise UserError(f"--safety {self.safety}: {folder.name} has no safety checker; use --safety off")
        safety = self.safety or ("redraw" if folder.has_safety_checker else "off")
        return replace(self, height=height, width=width, safety=safety)

    def with_device(self, device: torch.device) -> Recipe:
        """With number format and attention kernels settled by what DEVICE can do; UserError if it cannot."""
        from utils.generation import loading  # imports torch

        own = self.family.dtype if device.type == "cuda" else None
        dtype = loading.resolve_dtype(self.dtype or own or "auto", device)
        attention = self.attention or ("auto" if self.family.has_own_loop else "sdpa")
        attention = loading.resolve_attention(attention, device, dtype)
        return replace(self, dtype=loading.DTYPE_NAMES[dtype], attention=attention)


def refuse_difference(existing: Dataset, recorded: dict, wanted: dict, what: str) -> None:
    """UserError listing every key in which what was RECORDED of a dataset differs from what is WANTED now."""
    if found := [*differences(recorded, wanted)]:
        shown = "; ".join(f"{key} is {_short(old)}, asked {_short(new)}" for key, old, new in found[:12])
        more = f"; and {len(found) - 12} more" if len(found) > 12 else ""
        only_fewer = [key for key, _, _ in found] == ["images_per_class"]
        grows = "; a set only grows: train.py --images-per-class takes part of it" * only_fewer
        raise UserError(
            f"--out {existing.root} was made with another {what}: {shown}{more}; give the same options or another "
            f"--out{grows}"
        )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text[:9] + '..."' if isinstance(value, str) and len(value) == 64 else text
