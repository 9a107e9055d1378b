"""Drawing with the other families: diffusers' own pipeline object is called as a whole, with all it draws from given.

Latents come from each image's own generator in float32, prompts are encoded one by one, the noise that a sampler adds
on the way is drawn by the images' generators (diffusers takes a list of them), and decoding is Sampler's. What is left
to diffusers is its loop.
"""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from utils.generation.diffusion import Sampler, own_generators
from utils.generation.recipe import Recipe


class WholePipeline(Sampler):
    """A loaded pipeline of a family other than Stable Diffusion 1.x/2.x."""

    def __init__(self, pipeline, recipe: Recipe, device: torch.device, dtype: torch.dtype):
        super().__init__(pipeline, recipe, device, dtype)
        pipeline.scheduler = self.scheduler
        pipeline.set_progress_bar_config(disable=True)
        self.step, self.on_step = 0, (lambda step, steps: None)  # of the call at work
        self.evaluate = self.unet.forward
        self.unet.forward = self._forward

    @torch.inference_mode()
    def _embed(self, text: str) -> Any:
        """{argument of the pipeline's call: (1, ...) on the CPU} of one prompt: T5's states would fill a GPU."""
        family = self.recipe.family
        more = {"do_classifier_free_guidance": any(self.guided), "negative_prompt": self.recipe.negative_prompt}
        taken = inspect.signature(self.pipeline.encode_prompt).parameters  # Flux knows neither
        more = {name: value for name, value in more.items() if name in taken and value is not None} | family.encode
        values = self.pipeline.encode_prompt(prompt=text, device=self.device, num_images_per_prompt=1, **more)
        return {name: value.cpu() for name, value in zip(family.embeddings, values, strict=False) if value is not None}

    @torch.inference_mode()
    def _denoise(self, seeds: Sequence[int], texts: Sequence[str], on_step) -> torch.Tensor:
        """The pipeline's call, from its latents to its latents."""
        family = self.recipe.family
        generators = own_generators(seeds)  # a single one is a list too: so it stays where there are more
        noise = self.initial_latents(seeds, generators).to(self.device, self.dtype)
        embedded = [self.embedding(text) for text in texts]
        prompts = {name: torch.cat([one[name] for one in embedded]).to(self.device) for name in embedded[0]}
        # An interval may leave no step to guide: then the prompts were encoded without their opposite.
        guidance = self.recipe.guidance_scale if any(self.guided) or family.guidance == "input" else 1.0
        self.step, self.on_step = 0, on_step or (lambda step, steps: None)
        latents = self.pipeline(
            latents=family.pack(self.pipeline, noise),
            generator=generators,
            **{"height": self.height, "width": self.width, "output_type": "latent", "return_dict": False},
            **{"num_inference_steps": self.recipe.steps, "guidance_scale": guidance},
            **prompts,
            **family.call,
        )[0]
        return family.unpack(self.pipeline, latents, self.height, self.width)

    def one_step(self, size: int) -> int:
        """As Sampler's: one step of the pipeline's call, with its overhead."""
        recipe, guided = self.recipe, self.guided
        self.recipe, self.guided = replace(recipe, steps=1), [any(guided)]
        self.denoise(range(size), [""] * size)
        self.recipe, self.guided = recipe, guided
        return 2 if any(guided) else 1

    def _forward(self, *args, **kwargs):
        """In the place of the network's forward: counts the steps, and leaves the unconditional half out where
        guidance is off. Guided pipelines put it before the other half of every batch, and cond + scale x 0 is cond."""
        guided = self.guided[min(self.step, len(self.guided) - 1)]
        halved = any(self.guided) and not guided
        if halved:
            both = len(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])
            args, kwargs = tree_map_only(torch.Tensor, partial(cond_half, both=both), (args, kwargs))
        outputs = self.evaluate(*args, **kwargs)
        self.step += 1
        self.on_step(self.step, len(self.guided))
        return (torch.cat([outputs[0], outputs[0]]), *outputs[1:]) if halved else outputs


def cond_half(tensor: torch.Tensor, both: int) -> torch.Tensor:
    """The second half of a tensor of BOTH rows; any other as it is."""
    return tensor[both // 2 :] if tensor.ndim and len(tensor) == both else tensor
