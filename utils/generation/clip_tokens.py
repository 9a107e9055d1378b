"""CLIP tokens of a prompt, without torch: CLIP's text encoder reads 77 and drops the rest."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

CLIP_MAX_TOKENS = 77  # positions of CLIP ViT-L/14's text encoder, start and end tokens included
ESTIMATE_ERROR = 10  # tokens that estimate_tokens may be off

# CLIP's tokenizer first cuts a text into contractions, runs of letters, single digits and runs of other signs.
_PIECES = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^\w\s]|_)+")


class TokenCounter:
    """Counts the tokens of a text, start and end included, with the tokenizer saved in FOLDER."""

    def __init__(self, folder: Path) -> None:
        from transformers import CLIPTokenizer  # a second to import, but it brings no torch

        self._tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        self.max_tokens = min(int(self._tokenizer.model_max_length), CLIP_MAX_TOKENS)

    def __call__(self, text: str) -> int:
        return len(self._tokenizer.backend_tokenizer.encode(text).ids)


def token_counter(model: str) -> TokenCounter | None:
    """The counter of MODEL, a folder in diffusers' layout or a Hugging Face name; None if its tokenizer is not here.

    Nothing is downloaded. The files are looked for before transformers is asked: for an absent model it hands out an
    empty vocabulary without an error.
    """
    for files in (("tokenizer.json",), ("vocab.json", "merges.txt")):
        paths = [_local_file(model, f"tokenizer/{file}") for file in files]
        if paths[0] and all(paths):
            return TokenCounter(paths[0].parent)
    return None


def _local_file(model: str, file: str) -> Path | None:
    """FILE of MODEL in its folder, or in the Hugging Face cache."""
    if (path := Path(model).expanduser() / file).is_file():
        return path
    from huggingface_hub import try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(model, file)
    except ValueError:  # MODEL is no name that the hub could know
        return None
    return Path(cached) if isinstance(cached, str) else None


def estimate_tokens(text: str) -> int:
    """Tokens of TEXT guessed without CLIP's vocabulary: one per 7 letters begun, one per digit and run of signs.

    Against the real vocabulary, over the 1010 classes shipped here, it is off by at most 7 tokens for "c, d_c" with the
    first name and 10 with all names. Words of other scripts count as their bytes, the upper bound.
    """
    return 2 + sum(
        1 + (len(piece) - 1) // 7 if piece.isascii() else len(piece.encode()) for piece in _PIECES.findall(text)
    )


def kept_part(text: str, count: Callable[[str], int], max_tokens: int = CLIP_MAX_TOKENS) -> str:
    """The longest run of whole words from the start of TEXT that COUNT holds to fit into MAX_TOKENS."""
    ends = [match.end() for match in re.finditer(r"\S+", text)]
    low, high = 0, len(ends)  # the first `low` words fit
    while low < high:
        middle = (low + high + 1) // 2
        if count(text[: ends[middle - 1]]) <= max_tokens:
            low = middle
        else:
            high = middle - 1
    return text[: ends[low - 1]] if low else ""
