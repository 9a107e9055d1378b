"""The embedded model and its data: the halves, the exporter, and what the pipeline draws.

pytest tests/test_digits_model.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from sklearn.datasets import load_digits

from models import train_digits_sd
from models.digits import SPLIT_FILE, read_split, real_digits
from utils.classes import ClassRow, load_classes
from utils.generation.prompts import TEMPLATES, parse_template, prompt_text
from utils.storage import read_json, write_json

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "digits-sd"
ROWS = load_classes("digits").rows


# ===== the split =====


def test_the_halves_are_disjoint_complete_and_stratified():
    split, labels = read_split(), load_digits().target
    assert not set(split["train"]) & set(split["test"])
    assert sorted(split["train"] + split["test"]) == list(range(1797)) == list(range(len(labels)))
    train, test = (np.bincount(labels[split[part]], minlength=10) for part in ("train", "test"))
    assert (abs(train - test) <= 1).all() and abs(train.sum() - test.sum()) == 1


def test_the_split_follows_from_its_seed_by_its_own_rule():
    split, labels = read_json(SPLIT_FILE), load_digits().target
    rng = np.random.default_rng(split["seed"])
    train: list[int] = []
    for k in range(10):
        shuffled = rng.permutation(np.flatnonzero(labels == k))
        train += shuffled[: (len(shuffled) + k % 2) // 2].tolist()
    assert split["train"] == sorted(train)
    assert split["test"] == sorted(set(range(len(labels))) - set(train))


def test_no_image_is_in_both_halves_under_another_number():
    seen = {image.tobytes() for image in real_digits("train")[2]}
    assert len(seen) == 898
    assert not any(image.tobytes() in seen for image in real_digits("test")[2])


def test_overlapping_halves_and_other_data_are_refused(tmp_path):
    split = read_json(SPLIT_FILE)
    write_json(tmp_path / "overlap.json", split | {"test": split["test"] + split["train"][:1]})
    with pytest.raises(Exception, match=r"overlap\.json: an image is in both halves"):
        real_digits("train", tmp_path / "overlap.json")
    write_json(tmp_path / "other.json", split | {"data_sha256": "0" * 64})
    with pytest.raises(Exception, match="was made for other data"):
        real_digits("test", tmp_path / "other.json")


def test_real_digits_are_the_enlarged_originals():
    indices, labels, images = real_digits("test")
    digits = load_digits()
    assert images.shape == (899, 32, 32, 3) and images.dtype == np.uint8
    assert (labels == digits.target[indices]).all()
    blocks = images[..., 0].reshape(-1, 8, 4, 8, 4).mean(axis=(2, 4))  # back to 8x8
    assert np.corrcoef(blocks.ravel(), digits.images[indices].ravel())[0, 1] > 0.99
    assert images.min() == 0 and images.max() == 255  # 0..16 became 0..255


def test_the_training_script_reads_the_training_half_alone(monkeypatch, tmp_path):
    """The script's main, run up to its first loss: it trains on the training half, and read nothing else."""
    parts, seen = [], []

    class Stop(Exception):
        pass

    def reading(part):
        parts.append(part)
        return real_digits(part)

    def stop(vae, pixels, rng):
        seen.append(pixels)
        raise Stop

    monkeypatch.setattr(train_digits_sd, "real_digits", reading)
    monkeypatch.setattr(train_digits_sd, "vae_loss", stop)
    command = ["--out", str(tmp_path / "model"), "--work", str(tmp_path / "work"), "--threads", "1"]
    with pytest.raises(Stop):
        train_digits_sd.main(train_digits_sd.get_args_parser().parse_args(command))
    assert parts == ["train"]
    assert np.array_equal((seen[0][:, 0] * 255).round().numpy().astype(np.uint8), real_digits("train")[2][..., 0])
    assert not (tmp_path / "model").exists()


# ===== the exporter =====


def test_export_writes_exactly_the_split_and_mends_damage(tmp_path):
    command = [sys.executable, "models/export_digits.py", "--out", str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT)
    split, labels = read_split(), load_digits().target
    for part in ("train", "test"):
        expected = {f"{ROWS[labels[i]].wnid}/{ROWS[labels[i]].wnid}_{i:06d}.png" for i in split[part]}
        assert {str(path.relative_to(tmp_path / part)) for path in (tmp_path / part).rglob("*.*")} == expected

    files = sorted(tmp_path.rglob("*.png"))
    content, times = files[7].read_bytes(), [file.stat().st_mtime_ns for file in files]
    files[7].write_bytes(content[:50])  # torn
    subprocess.run(command, check=True, cwd=ROOT)
    assert files[7].read_bytes() == content
    changed = [file for file, time in zip(files, times, strict=True) if file.stat().st_mtime_ns != time]
    assert changed == [files[7]]


# ===== the tokenizer =====


def test_merges_make_each_known_word_one_token():
    merges = train_digits_sd.learn_merges({"one": 3, "none": 1, "on": 2}, 50)
    assert merges[0] == ("n", "e</w>")  # the most frequent pair: 4 of one, none; (o, n</w>) only 2
    assert {left + right for left, right in merges} >= {"one</w>", "none</w>", "on</w>"}
    assert merges == train_digits_sd.learn_merges({"one": 3, "none": 1, "on": 2}, 50)


@pytest.fixture(scope="module")
def pipeline():
    import torch
    from diffusers import StableDiffusionPipeline

    torch.set_num_threads(1)
    pipeline = StableDiffusionPipeline.from_pretrained(MODEL, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_tokenizer_knows_every_text(pipeline):
    tokenizer = pipeline.tokenizer
    end = tokenizer.eos_token_id  # CLIP's unknown token is its end token: an unknown would show as one too early
    texts = [
        prompt_text(row, parse_template(template), 7, names)
        for row in ROWS
        for template in TEMPLATES
        for names in ("first", "all")
    ]
    texts += ["A goldfish, café, 数字 nine! \N{PILE OF POO}", "\x7f ~ |", ""]
    for text in texts:
        ids = tokenizer(text).input_ids
        assert end not in ids[1:-1], text
        assert ids[0] == tokenizer.bos_token_id and ids[-1] == end
    assert all(len(tokenizer(text).input_ids) <= 77 for text in texts)
    assert len({tuple(tokenizer(row.first_name).input_ids) for row in ROWS}) == 10
    assert tokenizer.tokenize("seven, the cardinal number") == [
        "seven</w>",
        ",</w>",
        "the</w>",
        "cardinal</w>",
        "number</w>",
    ]


# ===== the folder =====


def test_the_folder_is_complete_small_and_safe():
    files = {str(path.relative_to(MODEL)) for path in MODEL.rglob("*") if path.is_file()}
    weights = {
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    }
    assert files == weights | {
        "README.md",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "unet/config.json",
        "vae/config.json",
    }
    assert sum((MODEL / file).stat().st_size for file in files) <= 15e6
    for file in weights:
        with safe_open(MODEL / file, "np") as tensors:
            dtypes = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118 - not a dict
        assert dtypes - {"I64"} == {"F16"}, file


def test_the_card_says_what_a_user_must_know():
    card = (MODEL / "README.md").read_text(encoding="utf-8")
    for word in ("CC BY 4.0", "minutes", "loss", "Known flaws", "training half", "train_digits_sd.py"):
        assert word in card
    assert "{" not in card.replace('{"c', "").split("## Training")[1]  # every placeholder was filled


def test_the_scheduler_is_stable_diffusions():
    config = read_json(MODEL / "scheduler" / "scheduler_config.json")
    assert config["_class_name"] == "PNDMScheduler"
    assert (config["beta_start"], config["beta_end"], config["beta_schedule"]) == (0.00085, 0.012, "scaled_linear")
    assert config["prediction_type"] == "epsilon" and config["skip_prk_steps"] and config["steps_offset"] == 1


# ===== what it draws =====


def draw(pipeline, texts: list[str], guidance: float, steps: int = 10) -> np.ndarray:
    """(N, 32, 32) in 0..1; image i of any call starts from the same latents."""
    import torch

    generators = [torch.Generator().manual_seed(index) for index in range(len(texts))]
    images = pipeline(
        texts, num_inference_steps=steps, guidance_scale=guidance, generator=generators, output_type="np"
    ).images
    return images.mean(axis=-1)


@pytest.fixture(scope="module")
def class_means() -> np.ndarray:
    """(10, 32, 32) mean training image of each class, in 0..1."""
    _, labels, images = real_digits("train")
    return np.stack([images[labels == k, :, :, 0].mean(axis=0) / 255 for k in range(10)])


def nearest_class(images: np.ndarray, means: np.ndarray) -> np.ndarray:
    return ((images[:, None] - means[None]) ** 2).mean(axis=(2, 3)).argmin(axis=1)


def test_nearest_mean_is_a_fair_judge(class_means):
    _, labels, images = real_digits("train")
    assert (nearest_class(images[..., 0] / 255, class_means) == labels).mean() > 0.85


@pytest.mark.parametrize(("template", "names"), [("c", "first"), ("c, h_c", "all"), ("c, d_c", "first")])
def test_prompts_draw_their_own_class(pipeline, class_means, template, names):
    texts = [prompt_text(row, parse_template(template), 0, names) for row in ROWS for _ in range(6)]
    images = draw(pipeline, texts, guidance=2.0)
    assert np.isfinite(images).all()
    labels = np.repeat(np.arange(10), 6)
    assert (nearest_class(images, class_means) == labels).mean() >= 0.75  # chance: 0.10


def test_guidance_trades_diversity_for_typicality(pipeline):
    texts = [prompt_text(row, parse_template("c, d_c"), 0) for row in ROWS for _ in range(6)]
    low, high = draw(pipeline, texts, 2.0, steps=20), draw(pipeline, texts, 7.5, steps=20)
    assert not np.allclose(low, high, atol=0.05)
    assert diversity(high) < diversity(low)


def diversity(images):
    """Mean distance of an image to its class's mean, each image at unit norm: bolder strokes alone do not count."""
    flat = images.reshape(10, -1, 32 * 32)
    flat = flat / np.linalg.norm(flat, axis=2, keepdims=True)
    return np.linalg.norm(flat - flat.mean(axis=1, keepdims=True), axis=2).mean()


def test_the_empty_prompt_draws_any_digit(pipeline, class_means):
    drawn = set(nearest_class(draw(pipeline, [""] * 40, guidance=1.0), class_means))
    assert len(drawn) >= 5


def test_a_seed_is_an_image(pipeline):
    texts = [prompt_text(ROWS[3], parse_template("c"), 0)] * 2
    first, second = draw(pipeline, texts, 2.0, steps=3), draw(pipeline, texts, 2.0, steps=3)
    assert np.array_equal(first, second) and not np.allclose(first[0], first[1])


# ===== the training script's parts =====


def test_augmentation_is_small_repeatable_and_keeps_the_range():
    import torch

    pixels = torch.from_numpy(real_digits("train")[2][:50, :, :, 0]).float().div(255)[:, None]
    first = train_digits_sd.augment(pixels, torch.Generator().manual_seed(1))
    again = train_digits_sd.augment(pixels, torch.Generator().manual_seed(1))
    other = train_digits_sd.augment(pixels, torch.Generator().manual_seed(2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == pixels.shape and first.min() >= 0 and first.max() <= 1
    correlation = np.corrcoef(first.numpy().ravel(), pixels.numpy().ravel())[0, 1]
    assert 0.8 < correlation < 0.99


def test_captions_name_the_class_of_their_images():
    import torch

    class Tokenizer:
        def __call__(self, texts, **_):
            self.texts = texts
            return type("Tokens", (), {"input_ids": torch.zeros(len(texts), 77, dtype=torch.long)})

    tokenizer = Tokenizer()
    rows = [ClassRow("a", "ant", "insect", "six legs"), ClassRow("b", "bat", "mammal", "it flies")]
    labels = torch.tensor([0, 1, 0, 1, 1])
    numbers, _ = train_digits_sd.Captions(rows, labels, tokenizer).draw(torch.Generator().manual_seed(0))
    assert len(numbers) == 64 and len(tokenizer.texts) == 17 and tokenizer.texts[-1] == ""
    for text, group in zip(tokenizer.texts, numbers.split(4), strict=False):
        assert ("ant" in text) == (labels[group] == 0).all() and ("bat" in text) == (labels[group] == 1).all()


def test_training_resumes_where_it_stopped(monkeypatch, tmp_path):
    """Stopped by an error after 6 of 10 steps and run again: the same weights as an undisturbed run."""
    import torch

    def run(work: Path, stop_at: int | None = None) -> torch.Tensor:
        work.mkdir(exist_ok=True)
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1)

        def loss_of(step, rng):
            if step == stop_at:
                raise KeyboardInterrupt
            return (model(torch.randn(4, 3, generator=rng)) - 1).square().mean()

        train_digits_sd.train("part", {"model": model}, loss_of, 10, 0.1, args, work)
        return model.weight.detach()

    monkeypatch.setattr(train_digits_sd, "SAVE_EVERY_S", -1)  # after every step
    args = train_digits_sd.get_args_parser().parse_args([])
    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stop_at=6)
    assert torch.equal(run(tmp_path / "cut"), whole)
    assert torch.equal(run(tmp_path / "cut"), whole)  # finished: loads, trains nothing
    args.seed = 1
    with pytest.raises(Exception, match=r"--work .* belongs to a run with"):
        run(tmp_path / "cut")


def test_learning_rate_warms_up_then_falls():
    shares = [train_digits_sd.lr_share(step, 1000) for step in range(1000)]
    peak = train_digits_sd.WARMUP_STEPS
    assert shares[peak] == 1.0 == max(shares) and 0 < shares[0] < 0.01 and shares[-1] < 0.011
    assert shares[:peak] == sorted(shares[:peak]) and shares[peak:] == sorted(shares[peak:], reverse=True)
