"""Complete pipelines of every family with random weights, a megabyte or less each, for tests of the code path.

from tests.tiny_families import BUILDERS, build_tiny
build_tiny("sdxl", tmp_path / "tiny")                # 16x16 images of 8x8 latents; Flux has 4x4 tokens of 16 numbers
"""

from __future__ import annotations

from pathlib import Path

from tests.tiny_sd import IMAGE_SIZE, LATENT_SIZE, MAX_TOKENS, TEXT_WIDTH, build_tiny_sd, byte_tokenizer

HEADS, HEAD_SIZE = 2, 8
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def build_tiny(family: str, folder: str | Path) -> Path:
    """Save the random pipeline of FAMILY to FOLDER and return it. The same bytes each time."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BUILDERS[family](Path(folder))
    return Path(folder)


def sd_turbo(folder: Path) -> None:
    from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(build_tiny_sd(folder), safety_checker=None)
    pipeline.scheduler = EulerDiscreteScheduler(**NOISE, timestep_spacing="trailing")
    pipeline.save_pretrained(folder)


def lcm(folder: Path) -> None:
    from diffusers import LatentConsistencyModelPipeline, LCMScheduler

    parts = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    scheduler = LCMScheduler(**NOISE, clip_sample=False)
    LatentConsistencyModelPipeline(
        vae=vae(4), text_encoder=clip(), tokenizer=byte_tokenizer(), unet=unet(time_cond_proj_dim=16),
        scheduler=scheduler, **parts,
    ).save_pretrained(folder)  # fmt: skip


def sdxl(folder: Path, scheduler=None) -> None:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    StableDiffusionXLPipeline(
        vae=vae(4), text_encoder=clip(), text_encoder_2=clip(projected=True), tokenizer=byte_tokenizer(),
        tokenizer_2=byte_tokenizer(), scheduler=scheduler or EulerDiscreteScheduler(**NOISE),
        unet=unet(
            cross_attention_dim=2 * TEXT_WIDTH, addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + TEXT_WIDTH, use_linear_projection=True,
        ),
    ).save_pretrained(folder)  # fmt: skip


def sdxl_turbo(folder: Path) -> None:
    from diffusers import EulerAncestralDiscreteScheduler

    sdxl(folder, EulerAncestralDiscreteScheduler(**NOISE, timestep_spacing="trailing"))


def sd3(folder: Path, shift: float = 3.0) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=LATENT_SIZE, patch_size=2, in_channels=16, out_channels=16, num_layers=1,
        attention_head_dim=HEAD_SIZE, num_attention_heads=HEADS, joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=HEADS * HEAD_SIZE, pooled_projection_dim=2 * TEXT_WIDTH, pos_embed_max_size=32,
    )  # fmt: skip
    StableDiffusion3Pipeline(
        vae=vae(16, shift_factor=0.06), transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        text_encoder=clip(projected=True), text_encoder_2=clip(projected=True), text_encoder_3=t5(2 * TEXT_WIDTH),
        tokenizer=byte_tokenizer(), tokenizer_2=byte_tokenizer(), tokenizer_3=t5_tokenizer(),
    ).save_pretrained(folder)  # fmt: skip


def flux(folder: Path, guided: bool = True) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=HEADS, joint_attention_dim=TEXT_WIDTH, pooled_projection_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 6, 6), guidance_embeds=guided,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0 if guided else 1.0, use_dynamic_shifting=guided)
    FluxPipeline(
        vae=vae(4, shift_factor=0.1), transformer=transformer, scheduler=scheduler, text_encoder=clip(),
        text_encoder_2=t5(TEXT_WIDTH), tokenizer=byte_tokenizer(), tokenizer_2=t5_tokenizer(),
    ).save_pretrained(folder)  # fmt: skip


def flux_schnell(folder: Path) -> None:
    flux(folder, guided=False)


def pixart_sigma(folder: Path) -> None:
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    transformer = PixArtTransformer2DModel(
        sample_size=LATENT_SIZE, patch_size=2, in_channels=4, out_channels=8, num_layers=1, num_attention_heads=HEADS,
        attention_head_dim=HEAD_SIZE, cross_attention_dim=HEADS * HEAD_SIZE, caption_channels=TEXT_WIDTH,
        use_additional_conditions=False,
    )  # fmt: skip
    PixArtSigmaPipeline(
        tokenizer=t5_tokenizer(), text_encoder=t5(TEXT_WIDTH), vae=vae(4), transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(**NOISE),
    ).save_pretrained(folder)  # fmt: skip


# A folder of this name is of this family.
BUILDERS = {
    "sd-turbo": sd_turbo,
    "lcm_tiny": lcm,
    "sdxl-base": sdxl,
    "sdxl-turbo": sdxl_turbo,
    "stable-diffusion-3-medium": sd3,
    "stable-diffusion-3.5-medium": sd3,
    "flux.1-dev": flux,
    "flux.1-schnell": flux_schnell,
    "pixart-sigma": pixart_sigma,
}


# ===== components =====


def vae(channels: int, **more):
    """Of two pixels a latent, as tests/tiny_sd.py has it."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        sample_size=IMAGE_SIZE, block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=channels, norm_num_groups=4,
        **more,
    )  # fmt: skip


def unet(**more):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=LATENT_SIZE, block_out_channels=(8, 16), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), layers_per_block=1, attention_head_dim=2, norm_num_groups=4,
        **{"cross_attention_dim": TEXT_WIDTH} | more,
    )  # fmt: skip


def clip(projected: bool = False):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = byte_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=TEXT_WIDTH, intermediate_size=2 * TEXT_WIDTH, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=MAX_TOKENS, projection_dim=TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def t5(width: int):
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_model": width, "d_kv": 8, "d_ff": 2 * width, "num_layers": 1, "num_heads": 2}
    return T5EncoderModel(T5Config(vocab_size=len(t5_tokenizer()), **sizes))


def t5_tokenizer():
    """T5's with one token a letter: texts of these letters alone are known to it."""
    from transformers import T5Tokenizer

    letters = "▁abcdefghijklmnopqrstuvwxyz,.-_0123456789"
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -2.0) for letter in letters)]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=MAX_TOKENS)


def build_tiny_lora(model: Path, file: Path, seed: int = 1) -> Path:
    """Save random LoRA weights for the attention of the pipeline in MODEL as FILE, in diffusers' format."""
    import diffusers
    import torch
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline = diffusers.DiffusionPipeline.from_pretrained(model, safety_checker=None)
    name = "unet" if hasattr(pipeline, "unet") else "transformer"
    network = getattr(pipeline, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    layers = {f"{name}_lora_layers": get_peft_model_state_dict(network)}
    pipeline.save_lora_weights(file.parent, weight_name=file.name, **layers)
    return file
