"""Drawing images with a Stable Diffusion 1.x/2.x pipeline, in batches whose pixels depend on the batch alone.

Sampler is also the interface of the other families (whole_pipeline.py): embedding, initial_latents, denoise, decode
and forwards_per_image.

What an image is made of, and from where:
- its initial latents: float32, on the CPU, from its own generator; the same on every device;
- its prompt's embedding: every distinct prompt passes the text encoder alone, so no neighbour changes its rounding;
- the batch it is denoised in: matrix kernels round differently for different batch sizes, by about 1e-6 in float32,
  which is why the caller draws a batch whole or not at all;
- after an out-of-memory error the batch is split in halves: latents and prompts stay, rounding may not (see
  docs/reproducibility.md for what was measured).
- noise that a sampler adds on the way: from the image's own generator, which goes on after the initial latents.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar

import diffusers
import torch

from utils.cli import UserError
from utils.generation.families import OWN
from utils.generation.recipe import SCHEDULERS, Recipe
from utils.machine import is_out_of_memory, memory_format

CACHED_PROMPTS = 512  # embeddings kept: more than the 365 backgrounds of one class; 59 MB for SD 1.4 in fp16
DECODE_PIXELS = 4 * 512 * 512  # pixels the VAE decodes at once: a fixed number, which only a memory that is full halves
CHECKED_IMAGES = 16  # of 224 x 224 that the safety checker sees at once: it runs beside a UNet that fills the memory
BLACK = 3  # an image without a pixel above 3 of 255 is no picture
Result = TypeVar("Result")


class Portions:
    """Work on images in portions of at most `size`, which is halved whenever memory runs out and stays so."""

    def __init__(self, size: int, device: torch.device, remedy: str, fixed: bool = False):
        self.size, self.device, self.remedy = size, device, remedy
        self.fixed = fixed  # every portion is filled up to `size`

    def map(self, work: Callable[[int, int], Result], count: int) -> list[Result]:
        """[work(start, end)] for portions that cover COUNT images; UserError if memory lacks for a single one."""
        while True:
            size = self.size  # as it is now: redrawing and decoding halve it in threads of their own
            try:
                return [work(start, min(start + size, count)) for start in range(0, count, size)]
            except RuntimeError as error:  # torch.OutOfMemoryError is one
                if not is_out_of_memory(error):
                    raise
                used = size if self.fixed else min(size, count)
            if used == 1:
                raise UserError(f"--device {self.device}: out of memory with a single image; lower {self.remedy}")
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.size = min(self.size, used // 2)


class Sampler:
    """A loaded pipeline, on its device and in its number format."""

    def __init__(self, pipeline, recipe: Recipe, device: torch.device, dtype: torch.dtype):
        self.pipeline, self.recipe, self.device, self.dtype = pipeline, recipe, device, dtype
        self.unet, self.vae = getattr(pipeline, recipe.family.denoiser), pipeline.vae
        self.factor = pipeline.vae_scale_factor
        self.height, self.width = recipe.height or 512, recipe.width or 512
        small = device.type == "cpu" and min(self.height, self.width) <= 64  # group norms are slow in channels_last
        self.layout = torch.contiguous_format if small else memory_format(device, dtype)
        # A compiled UNet is a program for one number of images.
        self.denoising = Portions(recipe.batch_size or 1, device, "--height and --width", fixed=recipe.compile)
        self.decoding = Portions(max(1, DECODE_PIXELS // (self.height * self.width)), device, "--height and --width")
        self.checking = Portions(CHECKED_IMAGES, device, "--batch-size, or use --safety off")
        own = recipe.scheduler == OWN
        self.scheduler = pipeline.scheduler if own else build_scheduler(recipe.scheduler, pipeline.scheduler.config)
        if not self.scheduler.config.get("use_dynamic_shifting"):  # which no family has that guides in an interval
            self.scheduler.set_timesteps(recipe.steps)
        self.guided = guided_steps(self.scheduler, recipe)
        self.embedding = lru_cache(CACHED_PROMPTS)(self._embed)
        # VAE decoding runs beside the next batch's denoising on a GPU; a CPU has no idle half to give it.
        self.side_stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def forwards_per_image(self) -> int:
        """Forward passes of the network an image costs: two where guidance is on, one where it is off."""
        return sum(2 if guided else 1 for guided in self.guided)

    @torch.inference_mode()
    def _embed(self, text: str) -> torch.Tensor:
        """`embedding` is this, cached: (1, 77, width) hidden states of one prompt."""
        return self.pipeline.encode_prompt(text, self.device, 1, False)[0]

    # ----- latents -----

    def initial_latents(
        self, seeds: Sequence[int], generators: Sequence[torch.Generator] | None = None
    ) -> torch.Tensor:
        """(B, 4, H/8, W/8) float32 on the CPU, unit variance; row k is what seed k (or its fresh generator) gives."""
        shape = (self.vae.config.latent_channels, self.height // self.factor, self.width // self.factor)
        return torch.stack([torch.randn(shape, generator=own) for own in generators or own_generators(seeds)])

    def denoise(
        self, seeds: Sequence[int], texts: Sequence[str], on_step: Callable[[int, int], None] | None = None
    ) -> torch.Tensor:
        """(B, 4, H/8, W/8) float32 clean latents on the device, from the initial latents of B SEEDS and their prompts.

        ON_STEP is called with (step, steps) after each.
        """

        def portion(start: int, end: int) -> torch.Tensor:
            """A compiled UNet gets always as many: it would be compiled anew, for minutes, for the last batch of a
            class and for every number of redraws, and dynamo gives up after eight sizes."""
            surplus = self.denoising.size - (end - start) if self.denoising.fixed else 0
            padded = [*range(start, end), *[end - 1] * surplus]
            return self._denoise([seeds[i] for i in padded], [texts[i] for i in padded], on_step)[: end - start]

        return torch.cat(self.denoising.map(portion, len(seeds)))

    @torch.inference_mode()
    def _denoise(self, seeds: Sequence[int], texts: Sequence[str], on_step) -> torch.Tensor:
        """The loop of diffusers' StableDiffusionPipeline, less its repeated encoding and its unneeded forwards."""
        generators = own_generators(seeds)
        latents = self.initial_latents(seeds, generators)
        adds_noise = "generator" in inspect.signature(self.scheduler.step).parameters  # at least with some settings
        noise_of = {"generator": generators} if adds_noise else {}
        self.scheduler.set_timesteps(self.recipe.steps)  # forgets the previous batch
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(0)  # spares a look-up that waits for the device
        cond = torch.cat([self.embedding(text) for text in texts])  # (B, 77, width)
        uncond = self.embedding(self.recipe.negative_prompt or "") if any(self.guided) else cond
        both = torch.cat([uncond.expand_as(cond), cond]) if any(self.guided) else cond
        timesteps = self.scheduler.timesteps.to(self.device)
        latents = latents.to(self.device) * self.scheduler.init_noise_sigma
        # Latents, guidance and the scheduler stay in float32: they cost nothing, and bf16 has 8 bits of mantissa.
        for number, guided in enumerate(self.guided):
            step = self.scheduler.timesteps[number]
            scaled = self.scheduler.scale_model_input(latents, step).to(self.dtype, memory_format=self.layout)
            rows, text = (torch.cat([scaled, scaled]), both) if guided else (scaled, cond)
            noise = self.unet(rows, timesteps[number], encoder_hidden_states=text, return_dict=False)[0].float()
            if guided:  # classifier-free guidance, Ho & Salimans 2021
                uncond_noise, cond_noise = noise.chunk(2)
                noise = uncond_noise + self.recipe.guidance_scale * (cond_noise - uncond_noise)
            latents = self.scheduler.step(noise, step, latents, return_dict=False, **noise_of)[0]
            if on_step:
                on_step(number + 1, len(self.guided))
        return latents

    def one_step(self, size: int) -> int:
        """One guided evaluation for SIZE images, to be timed; the forwards of an image in it."""
        latents = self.initial_latents(range(size)).to(self.device)
        rows = torch.cat([latents, latents]).to(self.dtype, memory_format=self.layout)
        text, at = self.embedding("").expand(2 * size, -1, -1), self.scheduler.timesteps[0].to(self.device)
        self.unet(rows, at, encoder_hidden_states=text)
        return 2

    # ----- pixels -----

    @contextmanager
    def beside(self, latents: torch.Tensor, ready: torch.cuda.Event) -> Iterator[None]:
        """Work of this block on LATENTS starts after READY, next to whatever the GPU is given meanwhile."""
        self.side_stream.wait_event(ready)
        with torch.cuda.stream(self.side_stream):
            latents.record_stream(self.side_stream)
            yield

    def ready(self) -> torch.cuda.Event:
        """A mark behind the work given to the GPU so far, for `beside`."""
        return torch.cuda.current_stream(self.device).record_event()

    def decode(self, latents: torch.Tensor) -> tuple[torch.Tensor, list[str]]:
        """uint8 (B, H, W, 3) on the CPU, and for each image its fault: "non-finite", "black" or ""."""
        parts = self.decoding.map(lambda start, end: self._decode(latents[start:end]), len(latents))
        return torch.cat([pixels for pixels, _ in parts]), [fault for _, faults in parts for fault in faults]

    @torch.inference_mode()
    def _decode(self, latents: torch.Tensor) -> tuple[torch.Tensor, list[str]]:
        scaled = latents.float() / self.vae.config.scaling_factor + (self.vae.config.get("shift_factor") or 0)
        scaled = scaled.to(self.vae.dtype, memory_format=self.layout)
        image = self.vae.decode(scaled, return_dict=False)[0].float()  # (b, 3, H, W), -1..1
        finite = image.isfinite().flatten(1).all(1)
        image = (image / 2 + 0.5).nan_to_num(0).clamp(0, 1).mul(255).round().to(torch.uint8)
        black = image.flatten(1).amax(1) <= BLACK
        found = zip(finite.tolist(), black.tolist(), strict=True)
        faults = ["non-finite" if not is_finite else "black" if is_black else "" for is_finite, is_black in found]
        return image.permute(0, 2, 3, 1).cpu(), faults

    @torch.inference_mode()
    def flagged(self, pixels: torch.Tensor) -> list[bool]:
        """What the pipeline's safety checker says of uint8 (B, H, W, 3) images. They stay as they are."""
        checker, extractor = self.pipeline.safety_checker, self.pipeline.feature_extractor

        def portion(start: int, end: int) -> list[bool]:
            inputs = extractor(list(pixels[start:end].numpy()), return_tensors="pt").pixel_values
            blackened = torch.zeros(end - start, 1)  # the checker blackens the images it is given: not ours
            return [bool(flag) for flag in checker(clip_input=inputs.to(self.device, self.dtype), images=blackened)[1]]

        return [flag for part in self.checking.map(portion, len(pixels)) for flag in part]


def own_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One on the CPU for each image, so that a device's kind does not show."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def build_scheduler(name: str, model_config):
    """The scheduler NAME with the noise schedule and prediction type of the model."""
    kind, settings = SCHEDULERS[name]
    return getattr(diffusers, kind).from_config(model_config, **settings)


def guided_steps(scheduler, recipe: Recipe) -> list[bool]:
    """For each evaluation of the network whether guidance applies.

    Guidance in a limited interval of noise levels, Kynkäänniemi et al., NeurIPS 2024, eq. 4: at high noise it takes
    diversity away, at low noise it changes little; outside the interval the unconditional forward is not run. A level
    is the noise's deviation over the image's share: sqrt((1 - a) / a), of a flow s / (1 - s).
    """
    steps = recipe.steps if scheduler.config.get("use_dynamic_shifting") else len(scheduler.timesteps)
    if recipe.guidance_scale <= 1 or recipe.family.guidance != "cfg":
        return [False] * steps
    if recipe.guidance_interval is None:
        return [True] * steps
    low, high = recipe.guidance_interval
    if not hasattr(scheduler, "alphas_cumprod") or scheduler.config.get("use_flow_sigmas"):
        share = scheduler.sigmas[: len(scheduler.timesteps)].cpu()
        levels = share / (1 - share)
    else:
        alphas = scheduler.alphas_cumprod[scheduler.timesteps.round().long().cpu()]
        levels = ((1 - alphas) / alphas).sqrt()
    return [low < level and (high is None or level <= high) for level in levels.tolist()]
