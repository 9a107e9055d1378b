"""Generators that can be driven, a row each: how diffusers' pipeline is called, and the values its authors publish.

Stable Diffusion 1.x and 2.x have their own loop (diffusion.py), tuned to give the same pixels faster; of every other
row diffusers' pipeline object is called as a whole (whole_pipeline.py). A new family is a new row. Where each value
was read is listed in docs/generators.md. Imports no torch.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any

from utils.cli import UserError

OWN = "own"  # the scheduler that is saved with the model


@dataclass(frozen=True)
class Family:
    """A row. `steps`, `guidance_scale` and the first of `schedulers` are taken where the user names none."""

    name: str  # as --recipe, in dataset.json
    pipeline: str  # class of diffusers, as model_index.json names it
    models: str  # pattern of the last part of a hub id or folder, or of a LoRA that turns another row into this one
    steps: int
    guidance_scale: float  # 1 is none
    size: int  # pixels a side where the model's settings do not say
    # "cfg": a second, unconditional forward (Ho & Salimans 2021); "input": a number that the network is given;
    # "none": distilled to draw without
    guidance: str = "cfg"
    most_steps: int = 1000
    schedulers: tuple[str, ...] = (OWN,)
    dtype: str | None = None  # on a GPU, where the authors' own choice is not half precision
    denoiser: str = "unet"  # the component that is called in every step
    patch: int = 1  # latents a side that make one token: sizes are multiples of it
    # What encode_prompt returns, in order, by the names under which the pipeline's call takes it
    embeddings: tuple[str, ...] = ()
    encode: dict[str, Any] = field(default_factory=dict)  # further arguments of encode_prompt
    call: dict[str, Any] = field(default_factory=dict)  # further arguments of the pipeline's call
    # (pipeline, (B, C, H/8, W/8) noise) -> latents as the pipeline takes them, and back with (pipeline, latents, H, W)
    pack: Callable[..., Any] = lambda pipeline, noise: noise
    unpack: Callable[..., Any] = lambda pipeline, latents, height, width: latents

    @property
    def has_own_loop(self) -> bool:
        """Whether diffusion.Sampler draws it itself, which alone lets attention kernels be chosen."""
        return self.pipeline == "StableDiffusionPipeline"

    def check(self, recipe: Any) -> None:
        """UserError if the values of RECIPE contradict what this family is."""
        name, guided = self.name, self.guidance == "cfg"
        alone = f"{name} {'takes guidance as an input' if self.guidance == 'input' else 'draws without guidance'}"
        alone += ", so that no unconditional forward is left to change"
        faults = {
            f"scheduler {recipe.scheduler}: {name} is drawn with {' or '.join(self.schedulers)}":
                recipe.scheduler not in self.schedulers,
            f"steps {recipe.steps}: {name} is distilled for at most {self.most_steps}": recipe.steps > self.most_steps,
            f"guidance-scale {recipe.guidance_scale:g}: {name} is distilled to draw without; leave it out":
                self.guidance == "none" and recipe.guidance_scale != 1,
            f"guidance-interval: {alone}": recipe.guidance_interval is not None and not guided,
            f"negative-prompt: {alone}": recipe.negative_prompt is not None and not guided,
            "negative-prompt: it acts through guidance; give --guidance-scale above 1":
                recipe.negative_prompt is not None and recipe.guidance_scale <= 1,
            f"attention xformers: only for Stable Diffusion 1.x and 2.x; {name} uses sdpa":
                recipe.attention == "xformers" and not self.has_own_loop,
        }  # fmt: skip
        if fault := next((fault for fault, found in faults.items() if found), None):
            raise UserError(f"--{fault}")


VARIANCE_PRESERVING = ("ddim", "dpmpp_2m", "euler", "euler_a", "unipc")  # schedulers of noise-predicting models
SD = Family(
    "sd",  # the recipes of recipe.py hold its values; Stable Diffusion 1.x and 2.x
    "StableDiffusionPipeline", r"stable-diffusion-(v?1|2)", steps=50, guidance_scale=2.0, size=512,
    schedulers=("pndm", *VARIANCE_PRESERVING),
)  # fmt: skip
SDXL = Family(
    "sdxl", "StableDiffusionXLPipeline", r"xl-base|sdxl", steps=50, guidance_scale=5.0, size=1024,
    schedulers=(OWN, *VARIANCE_PRESERVING),
    embeddings=("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
)  # fmt: skip
SD3 = Family(
    "sd3", "StableDiffusion3Pipeline", r"stable-diffusion-3-", steps=28, guidance_scale=7.0, size=1024,
    denoiser="transformer", patch=2, embeddings=SDXL.embeddings, encode={"prompt_2": None, "prompt_3": None},
)  # fmt: skip
FLUX = Family(
    "flux-dev", "FluxPipeline", r"flux\.1-dev", steps=50, guidance_scale=3.5, size=1024, guidance="input",
    dtype="bf16", denoiser="transformer", patch=2,
    embeddings=("prompt_embeds", "pooled_prompt_embeds"), encode={"max_sequence_length": 512},
    pack=lambda pipeline, noise: pipeline._pack_latents(noise, *noise.shape),
    unpack=lambda pipeline, latents, height, width: pipeline._unpack_latents(
        latents, height, width, pipeline.vae_scale_factor
    ),
)  # fmt: skip
DISTILLED: dict[str, Any] = {"guidance": "none", "guidance_scale": 1.0}
# The first row of a pipeline class stands for models of unknown name; of several rows that match the last is taken.
ROWS = (
    SD,
    replace(SD, name="sd-turbo", models=r"sd-turbo", steps=1, most_steps=4, schedulers=(OWN,), **DISTILLED),
    replace(SD, name="lcm-lora", models=r"lcm-lora-sdv1", steps=4, most_steps=8, schedulers=("lcm",), **DISTILLED),
    Family(
        "lcm", "LatentConsistencyModelPipeline", r"lcm_", steps=4, guidance_scale=8.0, size=768, guidance="input",
        most_steps=50, embeddings=("prompt_embeds",),
    ),
    SDXL,
    replace(SDXL, name="sdxl-turbo", models=r"xl-turbo", steps=1, most_steps=4, size=512, schedulers=(OWN,),
            **DISTILLED),
    # a LoRA for SDXL: as many steps as its name says, 4 if it does not
    replace(SDXL, name="sdxl-lightning", models=r"sdxl.?lightning(.*?(?P<steps>\d)-?step)?", steps=4, most_steps=8,
            schedulers=("euler_trailing",), **DISTILLED),
    replace(SDXL, name="lcm-lora-sdxl", models=r"lcm-lora-sdxl", steps=4, most_steps=8, schedulers=("lcm",),
            **DISTILLED),
    SD3,
    replace(SD3, name="sd3.5-medium", models=r"stable-diffusion-3\.5-medium", steps=40, guidance_scale=4.5,
            dtype="bf16"),
    replace(SD3, name="sd3.5-large", models=r"stable-diffusion-3\.5-large", steps=28, guidance_scale=3.5, dtype="bf16"),
    replace(SD3, name="sd3.5-turbo", models=r"3\.5-large-turbo", steps=4, most_steps=8, dtype="bf16", **DISTILLED),
    FLUX,
    replace(FLUX, name="flux-schnell", models=r"flux\.1-schnell", steps=4, most_steps=4,
            encode={"max_sequence_length": 256}, **DISTILLED),
    Family(
        # Its binning would draw another size than asked; its cleaning of captions is for crawled ones.
        "pixart-sigma", "PixArtSigmaPipeline", r"pixart-sigma", steps=20, guidance_scale=4.5, size=1024,
        schedulers=(OWN, "ddim", "dpmpp_2m", "unipc"), denoiser="transformer", patch=2,
        embeddings=("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds",
                    "negative_prompt_attention_mask"),
        call={"use_resolution_binning": False, "negative_prompt": None},
    ),
)  # fmt: skip
FAMILIES: dict[str, Family] = {row.name: row for row in ROWS}


def _own_name(name: str) -> str:
    """The last part of NAME; of a file of weights, which are often called alike, the last two."""
    return "/".join(PurePath(name).parts[-2 if ".safetensors" in name else -1 :])


def find_family(pipeline: str | None, names: Sequence[str]) -> Family | None:
    """The row for a PIPELINE class (None: not known yet) and the NAMES of the model and its LoRA files."""
    rows = [row for row in FAMILIES.values() if pipeline in (None, row.pipeline)]
    found = rows[0] if pipeline and rows else None
    for row in rows:
        for match in filter(None, (re.search(row.models, name, re.IGNORECASE) for name in map(_own_name, names))):
            steps = match.groupdict().get("steps")
            found = replace(row, steps=int(steps), most_steps=int(steps)) if steps else row
    return found
