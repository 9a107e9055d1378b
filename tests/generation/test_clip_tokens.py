"""CLIP tokens: counted by a model's own tokenizer wherever it lies, estimated where there is none."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from utils.generation.clip_tokens import estimate_tokens, kept_part, token_counter

ROOT = Path(__file__).resolve().parents[2]


def save_tokenizer(folder: Path) -> Path:
    """A CLIP tokenizer of single bytes and the merge "ab", in the layout of Stable Diffusion 1.4's repository."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(byte) for byte in printable] + [chr(256 + number) for number in range(256 - len(printable))]
    vocabulary = [
        *symbols,
        *(symbol + "</w>" for symbol in symbols),
        "ab",
        "ab</w>",
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({symbol: number for number, symbol in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\na b</w>\n")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 20}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("text", "tokens"), [("", 2), ("x", 3), ("ab", 3), ("ABAB", 4), ("ab, abc 12!", 2 + 7)])
def test_counts_of_a_models_own_tokenizer(tmp_path, text, tokens):
    save_tokenizer(tmp_path / "model" / "tokenizer")
    counter = token_counter(str(tmp_path / "model"))
    assert counter(text) == tokens
    assert counter.max_tokens == 20


def test_a_tokenizer_saved_by_transformers_counts_alike(tmp_path):
    from transformers import CLIPTokenizer

    save_tokenizer(tmp_path / "old" / "tokenizer")
    old = token_counter(str(tmp_path / "old"))
    CLIPTokenizer.from_pretrained(tmp_path / "old" / "tokenizer").save_pretrained(tmp_path / "new" / "tokenizer")
    assert (tmp_path / "new" / "tokenizer" / "tokenizer.json").is_file()
    new = token_counter(str(tmp_path / "new"))
    text = "Abba, a bag of 365 cabs — 鶴 🐦"
    assert new(text) == old(text) > 20  # and no warning of a text longer than the model reads
    assert new.max_tokens == old.max_tokens


def test_half_a_tokenizer_is_none(tmp_path):
    folder = save_tokenizer(tmp_path / "model" / "tokenizer")
    (folder / "merges.txt").unlink()
    assert token_counter(str(tmp_path / "model")) is None


@pytest.mark.parametrize("model", ["", "no/where", "/no/such/folder", "CompVis/stable-diffusion-v1-4", "../x"])
def test_an_absent_tokenizer_is_none_and_not_an_empty_one(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert token_counter(model) is None


def test_the_hub_cache_is_looked_into_without_a_network(tmp_path):
    repository = tmp_path / "models--some--model"
    save_tokenizer(repository / "snapshots" / "0123abc" / "tokenizer")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    command = [
        sys.executable,
        "-m",
        "utils.prompts",
        "--classes",
        "tench",
        "--prompt",
        "c, d_c",
        "--model",
        "some/model",
    ]
    environment = {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": ""}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    letters = "freshwater dace-like game fish of Europe and western Asia noted for ability to survive outside water"
    tokens = 2 + len("tench,") + len(letters.replace(" ", "")) - letters.count("ab")
    assert result.stdout.rstrip().endswith(f"\t{tokens}")
    assert f"warning: n01440764: {tokens} tokens, CLIP reads 20; cut off: " in result.stderr
    assert "~" not in result.stderr


# Counts of the real vocabulary (49408 tokens), which is not shipped.
REAL = {
    "a photo of a cat": 7,
    "tench, Tinca tinca": 9,
    "zero, 0, nought, cipher, cypher": 14,
    "365": 5,
    "鶴": 5,
    "🐦": 3,
}


@pytest.mark.parametrize("text", REAL)
def test_estimates_are_near_the_real_counts(text):
    assert abs(estimate_tokens(text) - REAL[text]) <= 3


def test_kept_part_ends_at_a_word():
    count = len
    assert kept_part("one two three", count, 13) == "one two three"
    assert kept_part("one two three", count, 12) == "one two"
    assert kept_part("one two three", count, 2) == ""
    assert kept_part("", count, 2) == ""
