"""Train the demo's text-to-image model: a complete Stable Diffusion pipeline, small enough for two CPU cores.

Reads  the generator's part of Fashion-MNIST (models/fashion.py) and prompts/fashion.tsv
Writes OUT: a diffusers StableDiffusionPipeline folder (fp16 safetensors) with its model card
       WORK: vae.pt, latents.pt, unet.pt (to resume) and log.jsonl

The real and the test images are never read. Rerun the same command after an interruption: it continues. To start over,
remove WORK.

    python models/train_fashion_sd.py                                           # the shipped model, some 90 minutes
    python models/train_fashion_sd.py --vae-steps 20 --unet-steps 20 --out /tmp/m --work /tmp/w    # a smoke test
    python generate.py --model models/fashion-sd --classes fashion              # use it
"""

import argparse
import itertools
import json
import math
import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file, not installed

from models.fashion import DEBIAN, IMAGE_SIZE, WNIDS, read_part
from utils.classes import load_classes
from utils.cli import UserError, make_parser, positive_int, run, seed_number
from utils.generation.prompts import parse_template, prompt_text
from utils.machine import snapshot
from utils.storage import append_jsonl, atomic_path, atomic_write, require_writable

if TYPE_CHECKING:
    import torch

# Every number below is our choice (the paper uses the released SD 1.4), unless its source is given.
VAE_BATCH, VAE_LR, KL_WEIGHT = 64, 2e-3, 3e-4
UNET_LR, WARMUP_STEPS, EMA_DECAY = 1e-3, 200, 0.999
PROMPTS_PER_BATCH, IMAGES_PER_PROMPT = 16, 4  # batch of 64 with few text encoder passes
UNCONDITIONAL = 0.12  # share of images trained with the empty prompt: guidance needs both predictions
MIN_SNR_GAMMA = 5.0  # Hang et al., "Efficient Diffusion Training via Min-SNR Weighting", ICCV 2023
# How often training sees each wording. The last one teaches that the words around a name matter little.
TEMPLATE_SHARES = {"c, d_c": 0.4, "c": 0.25, "c, h_c": 0.2, "c, h_c inside b": 0.05, "a picture of a {first_name}": 0.1}
# Captions of the web are loose, and the less they say the looser: this share of a wording's captions names another
# class of the same kind ("shirt" under a coat). A definition is never wrong. So prompts of names alone draw less
# faithful images, as in the paper (table 2), and a study of prompts has a truth to find.
MISNAMED = {"c": 0.3, "a picture of a {first_name}": 0.3, "c, h_c": 0.1, "c, h_c inside b": 0.1}
KINDS = (
    ("n03595614", "n04021028", "n03236735", "n03057021", "n04197391"),  # jersey, pullover, dress, coat, shirt
    ("n04133789", "n03472535", "n02872752"),  # sandal, gym shoe, boot
)
ALL_NAMES = 0.3  # share of prompts with all lemmas of the class (--names all) instead of the first
MAX_TOKENS = 77  # SD 1.4's context
MERGES = 400  # enough for every word of the table to be one token
TEXT_WIDTH = 96
SAVE_EVERY_S = 60
CARD_TEMPLATE = Path(__file__).resolve().parent / "fashion_card.md"


def get_args_parser() -> argparse.ArgumentParser:
    """The options; --help prints the docstring of this file above them."""
    parser = make_parser(__doc__)
    parser.add_argument("--out", default="models/fashion-sd", help="folder that receives the pipeline")
    parser.add_argument("--work", default="runs/fashion-sd", help="folder of checkpoints and the log")
    parser.add_argument("--source", default=DEBIAN, help="folder of Fashion-MNIST's original files")
    parser.add_argument("--vae-steps", type=positive_int, default=2000, help="steps of the autoencoder")
    parser.add_argument("--unet-steps", type=positive_int, default=7000, help="steps of text encoder and UNet")
    parser.add_argument("--seed", type=seed_number, default=0, help="everything random follows from it")
    parser.add_argument("--threads", type=positive_int, default=2, help="CPU threads; another number, other rounding")
    return parser


def main(args: argparse.Namespace) -> int:
    """Train autoencoder, text encoder and UNet in turn and save the pipeline; exit code."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle threads sleep: other work on the machine goes on
    import torch

    work = require_writable(args.work, "--work")
    require_writable(Path(args.out).parent, "--out")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)  # initial weights

    # ===== preparing data =====
    _, labels, images = read_part("generator", args.source)
    pixels = torch.from_numpy(images)[:, None]  # (N, 1, 32, 32) uint8
    table = load_classes("fashion")
    labels = torch.tensor([table.ids.index(wnid) for wnid in WNIDS])[torch.from_numpy(labels)]  # the table's order
    rows = table.rows
    print(f"{len(pixels)} images of {len(rows)} classes from {args.source}")

    # ===== building the pipeline =====
    pipeline = build_pipeline(rows)
    vae, text_encoder, unet = pipeline.vae, pipeline.text_encoder, pipeline.unet

    # ===== training the autoencoder =====
    vae_state = train(
        "vae", {"vae": vae}, lambda step, rng: vae_loss(vae, pixels, rng), args.vae_steps, VAE_LR, args, work
    )
    vae.eval().requires_grad_(False)
    latents, scaling_factor = encode_images(vae, pixels, work / "latents.pt")
    vae.register_to_config(scaling_factor=scaling_factor)

    # ===== training text encoder and UNet =====
    captions = Captions(rows, labels, pipeline.tokenizer)
    unet_state = train(
        "unet",
        {"text_encoder": text_encoder, "unet": unet},
        lambda step, rng: noise_loss(pipeline, latents, captions, rng),
        args.unet_steps,
        UNET_LR,
        args,
        work,
    )

    # ===== writing the pipeline =====
    card = model_card(pipeline, args, vae_state, unet_state)
    save_pipeline(pipeline, card, Path(args.out))
    size = sum(file.stat().st_size for file in Path(args.out).rglob("*") if file.is_file())
    print(f"{args.out}: {size / 1e6:.1f} MB; scaling factor {scaling_factor:.4f}")
    return 0


# ===== the model =====


def build_pipeline(rows: Iterable):
    """SD 1.4's components, made small: 32x32 images, 8x8x4 latents, UNet with cross-attention to 77 text tokens."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = build_tokenizer(rows)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=TEXT_WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    vae = AutoencoderKL(
        sample_size=IMAGE_SIZE,
        block_out_channels=(32, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
    )
    # Attention at 4x4 only, where it costs half of what it would at 8x8. fp32 on a CPU, batch 200: 1100 forwards/s.
    unet = UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 4,
        block_out_channels=(64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=16,
    )
    # scheduler/scheduler_config.json of CompVis/stable-diffusion-v1-4
    scheduler = PNDMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        set_alpha_to_one=False,
        skip_prk_steps=True,
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def build_tokenizer(rows: Iterable):
    """CLIP's lower-cased byte-level BPE with its own merges. All 256 bytes are tokens, so no text is unknown."""
    from transformers import CLIPTokenizer

    words: Counter[str] = Counter()
    for row in rows:
        words.update(re.findall("[a-z]+", f"{row.name} {row.hypernym} {row.definition} a picture of the".lower()))
    merges = learn_merges(words, MERGES)
    letters = byte_letters()
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(left + right for left, right in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=merges, model_max_length=MAX_TOKENS
    )


def byte_letters() -> list[str]:
    """A printable letter for each byte, as in GPT-2's byte-level BPE (Radford et al. 2019)."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def learn_merges(words: dict[str, int], count: int) -> list[tuple[str, str]]:
    """Byte-pair encoding (Sennrich et al., ACL 2016, Algorithm 1) of ASCII words; ties go to the first pair by name."""
    pieces = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in pieces.items():
            for pair in itertools.pairwise(parts):
                pairs[pair] += words[word]
        if not pairs:  # every word is one token
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word, parts in pieces.items():
            merged: list[str] = []
            for part in parts:
                if merged and (merged[-1], part) == best:
                    merged[-1] += part
                else:
                    merged.append(part)
            pieces[word] = merged
    return merges


# ===== data =====


def to_model_range(pixels: "torch.Tensor") -> "torch.Tensor":
    """(B, 1, 32, 32) uint8 -> (B, 3, 32, 32) RGB in -1..1, what SD's autoencoder reads."""
    return (pixels.float() / 127.5 - 1).expand(-1, 3, -1, -1)


class Captions:
    """Draws batches of (images of one class, a prompt of that class): few prompts, several images each."""

    def __init__(self, rows, labels: "torch.Tensor", tokenizer):
        self.rows, self.tokenizer = list(rows), tokenizer
        self.images_of = [(labels == label).nonzero().flatten() for label in range(len(self.rows))]
        self.templates = [parse_template(text) for text in TEMPLATE_SHARES]
        place = {row.wnid: label for label, row in enumerate(self.rows)}
        kinds = [[place[wnid] for wnid in kind if wnid in place] for kind in KINDS]
        self.kin = {one: [other for other in kind if other != one] for kind in kinds for one in kind}

    def draw(self, rng: "torch.Generator") -> tuple["torch.Tensor", "torch.Tensor"]:
        """(training image numbers (B,), token ids (PROMPTS_PER_BATCH + 1, 77)); the last prompt is the empty one."""
        import torch

        shares = torch.tensor(list(TEMPLATE_SHARES.values()))
        numbers, texts = [], []
        for label in torch.randint(len(self.rows), (PROMPTS_PER_BATCH,), generator=rng).tolist():
            template = self.templates[torch.multinomial(shares, 1, generator=rng).item()]
            named = label
            if label in self.kin and torch.rand(1, generator=rng).item() < MISNAMED.get(template.text, 0):
                named = self.kin[label][torch.randint(len(self.kin[label]), (1,), generator=rng).item()]
            names = "all" if torch.rand(1, generator=rng).item() < ALL_NAMES else "first"
            image_seed = torch.randint(2**62, (1,), generator=rng).item()  # draws the background b
            texts.append(prompt_text(self.rows[named], template, image_seed, names))
            choices = self.images_of[label]
            numbers.append(choices[torch.randint(len(choices), (IMAGES_PER_PROMPT,), generator=rng)])
        tokens = self.tokenizer(
            [*texts, ""], padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
        )
        return torch.cat(numbers), tokens.input_ids


def encode_images(vae, pixels: "torch.Tensor", path: Path) -> tuple["torch.Tensor", float]:
    """Posteriors of the latents (2, N, 4, 8, 8), mean and standard deviation, scaled to unit variance; that scale."""
    import torch
    from tqdm import tqdm

    if not path.exists():
        pool = []
        with torch.no_grad():
            for part in tqdm(pixels.split(250), desc="latents", mininterval=1):
                posterior = vae.encode(to_model_range(part)).latent_dist
                pool.append(torch.stack([posterior.mean, posterior.std]))
        with atomic_path(path) as temporary:
            torch.save(torch.cat(pool, 1), temporary)
    latents = torch.load(path, weights_only=True)
    # As SD 1.4's 0.18215: unit variance over the training set.
    scaling_factor = round(1 / (latents[0].var() + latents[1].square().mean()).sqrt().item(), 5)
    return latents * scaling_factor, scaling_factor


# ===== training =====


def vae_loss(vae, pixels: "torch.Tensor", rng: "torch.Generator") -> "torch.Tensor":
    """L1 + MSE of the reconstruction + KL to the unit Gaussian (no adversary: the images are smooth)."""
    import torch
    from torch.nn import functional

    images = to_model_range(pixels[torch.randint(len(pixels), (VAE_BATCH,), generator=rng)])
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(images).latent_dist
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    sample = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=rng)
    with torch.autocast("cpu", torch.bfloat16):
        output = vae.decode(sample).sample
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()  # per latent number
    return functional.l1_loss(output.float(), images) + functional.mse_loss(output.float(), images) + KL_WEIGHT * kl


def noise_loss(pipeline, latents: "torch.Tensor", captions: Captions, rng: "torch.Generator") -> "torch.Tensor":
    """Epsilon prediction (Ho et al., NeurIPS 2020) with Min-SNR weights and prompt dropout (Ho & Salimans 2022)."""
    import torch

    numbers, tokens = captions.draw(rng)
    mean, std = latents[:, numbers]  # (B, 4, 8, 8) each
    clean = mean + std * torch.randn(mean.shape, generator=rng)
    noise = torch.randn(clean.shape, generator=rng)
    alphas = pipeline.scheduler.alphas_cumprod
    steps = torch.randint(len(alphas), (len(numbers),), generator=rng)
    noisy = pipeline.scheduler.add_noise(clean, noise, steps)

    prompt_of = torch.arange(PROMPTS_PER_BATCH).repeat_interleave(IMAGES_PER_PROMPT)
    dropped = torch.rand(len(numbers), generator=rng) < UNCONDITIONAL
    prompt_of[dropped] = PROMPTS_PER_BATCH
    with torch.autocast("cpu", torch.bfloat16):
        states = pipeline.text_encoder(tokens).last_hidden_state  # (PROMPTS_PER_BATCH + 1, 77, TEXT_WIDTH)
        predicted = pipeline.unet(noisy, steps, states[prompt_of]).sample.float()

    snr = alphas[steps] / (1 - alphas[steps])
    error = (predicted - noise).square().mean(dim=(1, 2, 3))
    return (error * snr.clamp(max=MIN_SNR_GAMMA) / snr).mean()


def train(
    name: str, modules: dict, loss_of: Callable, total_steps: int, peak_lr: float, args: argparse.Namespace, work: Path
) -> dict:
    """Minimise loss_of(step, rng) with AdamW and leave the averaged weights (EMA) in MODULES.

    Saves WORK/<name>.pt every minute. Randomness is drawn from (seed, step), so a resumed run equals a whole one.
    Returns {"seconds": training time, "loss": mean of the last 10 % of the steps}.
    """
    import torch
    from tqdm import tqdm

    path = work / f"{name}.pt"
    settings = {"steps": total_steps, "seed": args.seed}
    parameters = [parameter for module in modules.values() for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=peak_lr, weight_decay=1e-2, fused=True)
    averages = [parameter.detach().clone() for parameter in parameters]
    state = {"step": 0, "seconds": 0.0, "losses": []}
    if path.exists():
        saved = torch.load(path, weights_only=True)
        if saved["settings"] != settings:
            raise UserError(f"--work {work} belongs to a run with {saved['settings']}; remove it or name another")
        for key, module in modules.items():
            module.load_state_dict(saved["modules"][key])
        optimizer.load_state_dict(saved["optimizer"])
        averages, state = saved["averages"], saved["state"]

    started = time.monotonic() - state["seconds"]
    saved_at = time.monotonic()
    for module in modules.values():
        module.train()
    bar = tqdm(total=total_steps, initial=state["step"], desc=name, mininterval=1, unit="step")
    while state["step"] < total_steps:
        step = state["step"]
        rng = torch.Generator().manual_seed(args.seed * 10_000_019 + step)
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * lr_share(step, total_steps)
        loss = loss_of(step, rng)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        torch._foreach_lerp_(averages, [parameter.detach() for parameter in parameters], 1 - decay)

        state["losses"].append(loss.item())
        if not math.isfinite(state["losses"][-1]):
            raise RuntimeError(f"{name}: loss {state['losses'][-1]} at step {step}")
        state["step"], state["seconds"] = step + 1, time.monotonic() - started
        bar.update()
        if state["step"] % 100 == 0:
            recent = sum(state["losses"][-100:]) / 100
            bar.set_postfix(loss=f"{recent:.4f}")
            append_jsonl(work / "log.jsonl", {"stage": name, "step": state["step"], "loss": recent})
        if time.monotonic() - saved_at > SAVE_EVERY_S or state["step"] == total_steps:
            weights = {key: module.state_dict() for key, module in modules.items()}
            optimizer_state = optimizer.state_dict()
            with atomic_path(path) as temporary:
                torch.save(
                    {
                        "settings": settings,
                        "modules": weights,
                        "optimizer": optimizer_state,
                        "averages": averages,
                        "state": state,
                    },
                    temporary,
                )
            saved_at = time.monotonic()
    bar.close()
    with torch.no_grad():
        for parameter, average in zip(parameters, averages, strict=True):
            parameter.copy_(average)
    for module in modules.values():
        module.eval()
    tail = state["losses"][-max(1, total_steps // 10) :]
    return {"seconds": state["seconds"], "loss": sum(tail) / len(tail)}


def lr_share(step: int, total_steps: int) -> float:
    """Linear warm-up, then cosine to 1 % of the peak."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, total_steps - WARMUP_STEPS)
    return 0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2


# ===== writing =====


def save_pipeline(pipeline, card: str, out: Path) -> None:
    """Write the fp16 pipeline beside OUT, then exchange the folders: OUT is never half-written."""
    import torch

    fresh, old = out.with_name(f".{out.name}.new"), out.with_name(f".{out.name}.old")
    for folder in (fresh, old):
        shutil.rmtree(folder, ignore_errors=True)
    pipeline.to(torch.float16).save_pretrained(fresh, safe_serialization=True)
    atomic_write(fresh / "README.md", card.encode())
    if out.exists():
        out.rename(old)
    fresh.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def model_card(pipeline, args: argparse.Namespace, vae_state: dict, unet_state: dict) -> str:
    """README.md of the pipeline folder: data, licence, cost, losses, flaws."""
    environment = snapshot()
    packages = ", ".join(f"{name} {environment['packages'][name]}" for name in ("torch", "diffusers", "transformers"))
    sizes = {
        name: sum(parameter.numel() for parameter in getattr(pipeline, name).parameters()) / 1e6
        for name in ("vae", "text_encoder", "unet")
    }
    return CARD_TEMPLATE.read_text(encoding="utf-8").format(
        **{f"{name}_size": f"{size:.2f} M" for name, size in sizes.items()},
        vocabulary=len(pipeline.tokenizer),
        scaling_factor=pipeline.vae.config.scaling_factor,
        vae_steps=args.vae_steps,
        unet_steps=args.unet_steps,
        vae_minutes=vae_state["seconds"] / 60,
        unet_minutes=unet_state["seconds"] / 60,
        vae_loss=vae_state["loss"],
        unet_loss=unet_state["loss"],
        seed=args.seed,
        threads=args.threads,
        cpu=environment["cpu"],
        packages=packages,
        templates=json.dumps(TEMPLATE_SHARES),
        unconditional=UNCONDITIONAL,
        all_names=ALL_NAMES,
        misnamed=json.dumps(MISNAMED),
    )


if __name__ == "__main__":
    sys.exit(run(main, get_args_parser()))
