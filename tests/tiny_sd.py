"""A complete Stable Diffusion pipeline with random weights: 0.6 MB, built in a second, for tests of the code path.

from tests.tiny_sd import build_tiny_sd
build_tiny_sd(tmp_path / "tiny")                    # 16x16 images, 8x8x4 latents
"""

from __future__ import annotations

from pathlib import Path

IMAGE_SIZE, LATENT_SIZE, TEXT_WIDTH, MAX_TOKENS = 16, 8, 16, 77


def build_tiny_sd(folder: str | Path, with_safety_checker: bool = False) -> Path:
    """Save the pipeline (fp32 safetensors) to FOLDER and return it. The same bytes each time."""
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = byte_tokenizer()
        vae = AutoencoderKL(
            sample_size=IMAGE_SIZE,
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
        )
        unet = UNet2DConditionModel(
            sample_size=LATENT_SIZE,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            attention_head_dim=2,
            cross_attention_dim=TEXT_WIDTH,
            norm_num_groups=4,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=TEXT_WIDTH,
                intermediate_size=2 * TEXT_WIDTH,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=MAX_TOKENS,
                projection_dim=TEXT_WIDTH,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        safety_checker, feature_extractor = tiny_safety_checker() if with_safety_checker else (None, None)
    # scheduler/scheduler_config.json of CompVis/stable-diffusion-v1-4
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        set_alpha_to_one=False,
        skip_prk_steps=True,
        steps_offset=1,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=safety_checker,
        feature_extractor=feature_extractor,
        requires_safety_checker=with_safety_checker,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return Path(folder)


def byte_tokenizer():
    """CLIP's tokenizer with one token a byte and no merges: no text is unknown to it."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=MAX_TOKENS)


def tiny_safety_checker():
    """Its concepts are random directions with thresholds out of reach: it flags nothing until a test lowers them."""
    import torch
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = sizes | {"image_size": 16, "patch_size": 8, "projection_dim": 8}
    text = sizes | {"vocab_size": 8, "projection_dim": 8}
    checker = StableDiffusionSafetyChecker(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    torch.nn.init.normal_(checker.concept_embeds)
    torch.nn.init.normal_(checker.special_care_embeds)
    torch.nn.init.constant_(checker.concept_embeds_weights, 2.0)  # cosines end at 1
    torch.nn.init.constant_(checker.special_care_embeds_weights, 2.0)
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return checker, processor
