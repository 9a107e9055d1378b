"""Drawing images with a Stable Diffusion 1.x/2.x pipeline, in batches whose pixels depend on the batch alone.

What an image is made of, and from where:
- its initial latents: float32, on the CPU, from its own generator; the same on every device;
- its prompt's embedding: every distinct prompt passes the text encoder alone, so no neighbour changes its rounding;
- the batch it is denoised in: matrix kernels round differently for different batch sizes, by about 1e-6 in float32,
  which is why the caller draws a batch whole or not at all;
- after an out-of-memory error the batch is split in halves: latents and prompts stay, rounding may not (see
  docs/reproducibility.md for what was measured).
No scheduler here draws noise of its own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from utils.cli import UserError
from utils.machine import memory_format

# name on the command line -> (diffusers class, settings beside the model's own scheduler settings)
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "pndm": ("PNDMScheduler", {}),  # Liu et al., ICLR 2022: the scheduler SD 1.4 is released with
    # Song et al., ICLR 2021, eta 0. Its clipping to -1..1 is for pixels: latents reach beyond. It is the default where
    # the model's own settings, of PNDM, do not mention it.
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),  # Lu et al. 2022
    "euler": ("EulerDiscreteScheduler", {}),  # Karras et al., NeurIPS 2022, Algorithm 2 without churn
    "unipc": ("UniPCMultistepScheduler", {}),  # Zhao et al., NeurIPS 2023
}
CACHED_PROMPTS = 512  # embeddings kept: more than the 365 backgrounds of one class; 59 MB for SD 1.4 in fp16
DECODE_PIXELS = 4 * 512 * 512  # pixels the VAE decodes at once: fixed, so that it never depends on free memory
CHECKED_IMAGES = 16  # of 224 x 224 that the safety checker sees at once: it runs beside a UNet that fills the memory
BLACK = 3  # an image without a pixel above 3 of 255 is no picture


@dataclass(frozen=True)
class Sampling:
    """How latents become images; every field changes pixels."""

    scheduler: str
    steps: int
    guidance_scale: float
    guidance_interval: tuple[float, float] | None  # noise levels (low, high]; None guides everywhere
    height: int  # pixels
    width: int


class Sampler:
    """A loaded pipeline, on its device and in its number format."""

    def __init__(
        self,
        pipeline,
        sampling: Sampling,
        device: torch.device,
        dtype: torch.dtype,
        micro_batch: int = 1,
        compiled: bool = False,
    ):
        self.pipeline, self.sampling, self.device, self.dtype = pipeline, sampling, device, dtype
        self.micro_batch = micro_batch  # images denoised at once; halved when memory runs out
        self.compiled = compiled  # the UNet is a program for one number of images
        self.unet, self.vae = pipeline.unet, pipeline.vae
        self.layout = memory_format(device, dtype)
        self.factor = pipeline.vae_scale_factor
        self.decode_batch = max(1, DECODE_PIXELS // (sampling.height * sampling.width))
        self.check_batch = CHECKED_IMAGES
        self.scheduler = build_scheduler(sampling.scheduler, pipeline.scheduler.config)
        self.scheduler.set_timesteps(sampling.steps)
        self.guided = guided_steps(self.scheduler, sampling)
        self._embeddings: OrderedDict[str, torch.Tensor] = OrderedDict()
        # VAE decoding runs beside the next batch's denoising on a GPU; a CPU has no idle half to give it.
        self.side_stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def forwards_per_image(self) -> int:
        """UNet forward passes an image costs: two where guidance is on, one where it is off."""
        return sum(2 if guided else 1 for guided in self.guided)

    # ----- text -----

    @torch.inference_mode()
    def embedding(self, text: str) -> torch.Tensor:
        """(1, 77, width) hidden states of one prompt."""
        if text not in self._embeddings:
            while len(self._embeddings) >= CACHED_PROMPTS:
                self._embeddings.popitem(last=False)
            self._embeddings[text] = self.pipeline.encode_prompt(text, self.device, 1, False)[0]
        self._embeddings.move_to_end(text)
        return self._embeddings[text]

    # ----- latents -----

    def initial_latents(self, seeds: Sequence[int]) -> torch.Tensor:
        """(B, 4, H/8, W/8) float32 on the CPU, unit variance; row k is what seed k alone gives."""
        height, width = self.sampling.height // self.factor, self.sampling.width // self.factor
        shape = (self.unet.config.in_channels, height, width)
        return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

    def denoise(
        self, seeds: Sequence[int], texts: Sequence[str], on_step: Callable[[int], None] | None = None
    ) -> torch.Tensor:
        """(B, 4, H/8, W/8) float32 clean latents on the device for B seeds and their prompts."""
        while True:
            try:
                parts = [
                    self._denoise_span(seeds[start:end], texts[start:end], on_step)
                    for start, end in spans(len(seeds), self.micro_batch)
                ]
                return torch.cat(parts)
            except RuntimeError as error:  # torch.OutOfMemoryError is one
                size = self.micro_batch if self.compiled else min(self.micro_batch, len(seeds))
                self.micro_batch = self._halved(error, size, "--height and --width")

    def _denoise_span(self, seeds: Sequence[int], texts: Sequence[str], on_step) -> torch.Tensor:
        """At most micro_batch images. A compiled UNet gets always as many: it would be compiled anew, for minutes, for
        the last batch of a class and for every number of redraws, and dynamo gives up after eight sizes."""
        surplus = self.micro_batch - len(seeds) if self.compiled else 0
        latents = self.initial_latents([*seeds, *[seeds[-1]] * surplus])
        return self._denoise(latents, [*texts, *[texts[-1]] * surplus], on_step)[: len(seeds)]

    @torch.inference_mode()
    def _denoise(self, latents: torch.Tensor, texts: Sequence[str], on_step) -> torch.Tensor:
        """The loop of diffusers' StableDiffusionPipeline, less its repeated encoding and its unneeded forwards."""
        self.scheduler.set_timesteps(self.sampling.steps)  # forgets the previous batch
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(0)  # spares a look-up that waits for the device
        conditional = torch.cat([self.embedding(text) for text in texts])  # (B, 77, width)
        both = torch.cat([self.embedding("").expand_as(conditional), conditional]) if any(self.guided) else conditional
        timesteps = self.scheduler.timesteps.to(self.device)
        latents = latents.to(self.device) * self.scheduler.init_noise_sigma
        # Latents, guidance and the scheduler stay in float32: they cost nothing, and bf16 has 8 bits of mantissa.
        for number, guided in enumerate(self.guided):
            step = self.scheduler.timesteps[number]
            scaled = self.scheduler.scale_model_input(latents, step).to(self.dtype, memory_format=self.layout)
            if guided:
                noise = self.unet(
                    torch.cat([scaled, scaled]), timesteps[number], encoder_hidden_states=both, return_dict=False
                )[0].float()
                plain, prompted = noise.chunk(2)
                noise = plain + self.sampling.guidance_scale * (prompted - plain)
            else:
                noise = self.unet(scaled, timesteps[number], encoder_hidden_states=conditional, return_dict=False)[0]
            latents = self.scheduler.step(noise.float(), step, latents, return_dict=False)[0]
            if on_step:
                on_step(number + 1)
        return latents

    # ----- pixels -----

    def ready(self) -> torch.cuda.Event | None:
        """A mark behind the work given to the GPU so far, for `beside`; None on other devices."""
        return torch.cuda.current_stream(self.device).record_event() if self.side_stream else None

    @contextmanager
    def beside(self, latents: torch.Tensor, ready: torch.cuda.Event | None) -> Iterator[None]:
        """Work of this block on LATENTS starts after READY, next to whatever the GPU is given meanwhile."""
        if ready is None or self.side_stream is None:
            yield
            return
        self.side_stream.wait_event(ready)
        with torch.cuda.stream(self.side_stream):
            latents.record_stream(self.side_stream)
            yield

    def decode(self, latents: torch.Tensor) -> tuple[torch.Tensor, list[str]]:
        """uint8 (B, H, W, 3) on the CPU, and for each image its fault: "non-finite", "black" or ""."""
        while True:
            try:
                return self._decode(latents)
            except RuntimeError as error:
                limit = min(self.decode_batch, len(latents))
                self.decode_batch = self._halved(error, limit, "--height and --width")

    @torch.inference_mode()
    def _decode(self, latents: torch.Tensor) -> tuple[torch.Tensor, list[str]]:
        pixels, faults = [], []
        for start, end in spans(len(latents), self.decode_batch):
            part = (latents[start:end] / self.vae.config.scaling_factor).to(self.dtype, memory_format=self.layout)
            image = self.vae.decode(part, return_dict=False)[0].float()  # (b, 3, H, W), -1..1
            finite = image.isfinite().flatten(1).all(1)
            image = (image / 2 + 0.5).nan_to_num(0).clamp(0, 1).mul(255).round().to(torch.uint8)
            black = image.flatten(1).amax(1) <= BLACK
            pixels.append(image.permute(0, 2, 3, 1).cpu())
            for is_finite, is_black in zip(finite.tolist(), black.tolist(), strict=True):
                faults.append("" if is_finite and not is_black else "black" if is_finite else "non-finite")
        return torch.cat(pixels), faults

    def flagged(self, pixels: torch.Tensor) -> list[bool]:
        """What the pipeline's safety checker says of uint8 (B, H, W, 3) images. They stay as they are."""
        while True:
            try:
                parts = [self._flagged(pixels[start:end]) for start, end in spans(len(pixels), self.check_batch)]
                return [flag for part in parts for flag in part]
            except RuntimeError as error:
                limit = min(self.check_batch, len(pixels))
                self.check_batch = self._halved(error, limit, "--batch-size, or use --safety off")

    @torch.inference_mode()
    def _flagged(self, pixels: torch.Tensor) -> list[bool]:
        checker = self.pipeline.safety_checker
        inputs = self.pipeline.feature_extractor(list(pixels.numpy()), return_tensors="pt").pixel_values
        blackened = torch.zeros(len(pixels), 1)  # the checker blackens the images it is given: not ours
        return [bool(flag) for flag in checker(clip_input=inputs.to(self.device, self.dtype), images=blackened)[1]]

    def _halved(self, error: RuntimeError, size: int, remedy: str) -> int:
        """Half of SIZE after an out-of-memory error; any other error, or one at size 1, is raised."""
        if not is_out_of_memory(error):
            raise error
        if size == 1:
            raise UserError(f"--device {self.device}: out of memory with a single image; lower {remedy}") from None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return size // 2


def spans(count: int, size: int) -> list[tuple[int, int]]:
    """[(0, size), (size, 2 size), ...] that cover COUNT."""
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def build_scheduler(name: str, model_config):
    """The scheduler NAME with the noise schedule and prediction type of the model."""
    import diffusers

    kind, settings = SCHEDULERS[name]
    return getattr(diffusers, kind).from_config(model_config, **settings)


def guided_steps(scheduler, sampling: Sampling) -> list[bool]:
    """For each UNet evaluation whether guidance applies.

    Guidance in a limited interval of noise levels, Kynkäänniemi et al., NeurIPS 2024, eq. 4: at high noise it takes
    diversity away, at low noise it changes little; outside the interval the unconditional forward is not run.
    """
    if sampling.guidance_scale <= 1:
        return [False] * len(scheduler.timesteps)
    if sampling.guidance_interval is None:
        return [True] * len(scheduler.timesteps)
    low, high = sampling.guidance_interval
    alphas = scheduler.alphas_cumprod[scheduler.timesteps.round().long().cpu()]
    levels = ((1 - alphas) / alphas).sqrt()
    return [low < level <= high for level in levels.tolist()]
