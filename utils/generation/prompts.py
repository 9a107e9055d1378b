"""Prompts: the text and the seed of every image, a pure function of (class table, template, names, base seed).

Look at prompts before paying for images. Prints one prompt a class, its CLIP tokens where the model's tokenizer is on
this machine (nothing is downloaded), and warnings:

    python -m utils.generation.prompts --classes imagenet_100 --prompt "c, d_c"
    python -m utils.generation.prompts --classes imagenet_1k --prompt "c" --limit 5     # two cranes: see the warnings
    python -m utils.generation.prompts --classes my_birds.tsv --prompt "a photo of {name}" --json

A warning never stops anything: exit code 0 says that the prompts could be built.
"""

from __future__ import annotations

import argparse
import bisect
import json
import re
import string
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from utils.classes import CONTROL, PROMPTS_DIR, ClassRow, ClassTable, load_classes, read_list
from utils.cli import UserError, make_parser, positive_int, run

if TYPE_CHECKING:
    from utils.generation.prompt_files import PromptFile

# The paper's prompts under the paper's names: c is the class name, h_c its hypernym, d_c its definition, b a scene.
# The authors' project page states "name and description" for the released models; the others are recalled from the
# paper's section on generation, not checked against its text. This is the one place to correct them.
TEMPLATES = {
    "c": "{name}",  # Sec. 3: the bare class name, the baseline
    "c, h_c": "{name}, {hypernym}",  # Sec. 3, semantics: the hypernym settles which sense of the name is meant
    "c, d_c": "{name}, {definition}",  # Sec. 3, semantics; project page: the two released models
    "c, h_c inside b": "{name}, {hypernym} inside {background}",  # Sec. 3, diversity: one of 365 scenes
}
PLACEHOLDERS = {
    "name": "c: the first name, or all of them with --names all",
    "first_name": "the first name",
    "hypernym": "h_c: the hypernym's first name, or all of them with --names all",
    "definition": "d_c: WordNet's definition",
    "background": "b: a Places365 scene, drawn per image",
}
NAMES = ("first", "all")  # which of the two c is in the paper is open; "first" is our default
# What a dataset owes to real images, from nothing to most; the field's tables mix these grades.
# Name of --supervision -> what dataset.json says.
SUPERVISION = {
    "names": "class names",
    "glosses": "glosses",
    "few-shot": "few real images",
    "captions": "captions of real images",
    "tuned": "a generator tuned on real images",
}
CLIP_MAX_TOKENS = 77  # positions of CLIP ViT-L/14's text encoder, start and end tokens included
SEED_BITS = 63  # fits a signed 64-bit integer, which every random generator takes


@dataclass(frozen=True, slots=True)
class Prompt:
    """One image to be drawn."""

    wnid: str
    index: int  # position in its class, from 0
    text: str
    seed: int  # of the initial latents, attempt 0; 0 <= seed < 2**63


@dataclass(frozen=True)
class Template:
    """A checked prompt template. `parts`: (literal text, placeholder or None) pairs, in order."""

    text: str  # the name in the paper, or the text as the user wrote it
    parts: tuple[tuple[str, str | None], ...]

    @cached_property
    def fields(self) -> set[str]:
        """The placeholders it has."""
        return {field for _, field in self.parts if field}

    def templates(self, wnid: str) -> list[Template]:
        """Those of a class; a file of prompts may have several, see utils/generation/prompt_files.py."""
        return [self]

    def pick(self, wnid: str, image_seed: int) -> Template:
        """That of one image."""
        return self


Templates: TypeAlias = "Template | PromptFile"  # one for all classes, or those of a file of prompts


def supervision_of(template: Templates) -> str | None:
    """The grade in SUPERVISION of what TEMPLATE says; None where its texts are somebody's own."""
    if not template.fields:
        return None
    return SUPERVISION["glosses" if template.fields & {"hypernym", "definition"} else "names"]


def parse_template(text: str, of_one_class: bool = False) -> Template:
    """A template from its name in the paper (see TEMPLATES) or free text with placeholders (see PLACEHOLDERS).

    It must name the class, unless it is OF_ONE_CLASS and written for that.
    """
    known = " ".join(f"{{{field}}}" for field in PLACEHOLDERS)
    choices = f"choose one of {', '.join(map(repr, TEMPLATES))}, or write a text with placeholders: {known}"
    if CONTROL.search(text) or "\t" in text or "\n" in text:
        raise UserError(f"--prompt {text!r} has a control character; write it on one line")
    name = text.strip() if text.strip() in TEMPLATES else None
    try:
        parsed = list(string.Formatter().parse(TEMPLATES[name] if name else text))
    except ValueError as error:
        raise UserError(f"--prompt {text!r}: {error}; write {{{{ or }}}} for a brace of the text itself") from None
    for _, field, spec, conversion in parsed:
        if field is not None and (field not in PLACEHOLDERS or spec or conversion):
            shown = field + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise UserError(f"--prompt {text!r}: unknown placeholder {{{shown}}}; known: {known}")
    template = Template(name or text, tuple((literal, field) for literal, field, _, _ in parsed))
    if not of_one_class and not template.fields - {"background"}:
        raise UserError(f"--prompt {text!r} says nothing of the class, so all classes would look alike; {choices}")
    return template


def image_seed(seed: int, wnid: str, index: int, attempt: int = 0) -> int:
    """The seed of one image: the first 63 bits of SHA-256 of "imagenet-sd:SEED:WNID:INDEX:ATTEMPT".

    The prompt, guidance and steps are not in it, so that image k of a class starts from the same latents under every
    recipe and recipes can be compared image by image. ATTEMPT counts the redraws of a rejected image.
    """
    digest = sha256(f"imagenet-sd:{seed}:{wnid}:{index}:{attempt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - SEED_BITS)


def prompt_text(row: ClassRow, template: Template, image_seed: int, names: str = "first") -> str:
    """The prompt of one image of class ROW. IMAGE_SEED, that of attempt 0, draws the background (seed mod 365)."""
    return _render(row, template, names, _scene(template, image_seed))


def class_prompts(
    row: ClassRow, template: Templates, indices: Iterable[int], seed: int = 0, names: str = "first"
) -> Iterator[Prompt]:
    """The prompts of the images INDICES of one class, as (text, seed of the initial latents at attempt 0)."""
    rendered, around = None, [""]
    for index in indices:
        own = image_seed(seed, row.wnid, index)
        chosen = template.pick(row.wnid, own)
        if chosen is not rendered:  # the text around the scene; tables hold no "\0"
            rendered, around = chosen, _render(row, chosen, names, "\0").split("\0")
        yield Prompt(row.wnid, index, _scene(chosen, own).join(around), own)


def _scene(template: Template, image_seed: int) -> str:
    return backgrounds()[image_seed % len(backgrounds())] if "background" in template.fields else ""


@cache
def backgrounds() -> tuple[str, ...]:
    """The 365 scene categories of Places365, as words."""
    return tuple(scene for _, scene in read_list(PROMPTS_DIR / "backgrounds.txt"))


def _render(row: ClassRow, template: Template, names: str, background: str) -> str:
    """The text of a prompt, with BACKGROUND in its place."""
    if names not in NAMES:
        raise UserError(f"--names {names!r}: choose one of {', '.join(NAMES)}")
    values = {"name": row.name, "hypernym": row.hypernym, "definition": row.definition, "background": background}
    values |= {"first_name": row.first_name}
    if names == "first":
        values |= {"name": row.first_name, "hypernym": row.hypernym.split(",")[0].strip()}
    text = ""
    for literal, field in template.parts:
        value = values[field] if field else ""
        if field and not value:
            literal = literal.removesuffix(", ")  # an empty column takes its comma with it
        text += literal + value
    return text


# ===== CLIP tokens =====


def token_counter(model: str) -> tuple[Callable[[str], int], int] | None:
    """(tokens of a text, start and end included; tokens that are read) of MODEL, a folder in diffusers' layout or a
    Hugging Face name; None if its tokenizer is not here. Nothing is downloaded.

    The files are looked for before transformers is asked: for an absent model it hands out an empty vocabulary.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        from huggingface_hub import errors, snapshot_download

        try:
            folder = Path(snapshot_download(model, local_files_only=True))
        except (errors.LocalEntryNotFoundError, errors.HFValidationError):  # not here, or no name the hub could know
            return None
    folder /= "tokenizer"
    wanted = (["tokenizer.json"], ["vocab.json", "merges.txt"])
    if not any(all((folder / name).is_file() for name in together) for together in wanted):
        return None
    from transformers import CLIPTokenizer  # a second to import, but it brings no torch

    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.backend_tokenizer.no_truncation()  # which some models save in it
    tokenizer.backend_tokenizer.no_padding()
    most = min(int(tokenizer.model_max_length), CLIP_MAX_TOKENS)
    return lambda text: len(tokenizer.backend_tokenizer.encode(text).ids), most


def kept_part(text: str, count: Callable[[str], int], max_tokens: int = CLIP_MAX_TOKENS) -> str:
    """The longest run of whole words from the start of TEXT that COUNT holds to fit into MAX_TOKENS."""
    ends = [0, *(match.end() for match in re.finditer(r"\S+", text))]
    fitting = bisect.bisect_right(ends, max_tokens, key=lambda end: count(text[:end]))
    return text[: ends[max(0, fitting - 1)]]


# ===== what may be wrong with prompts =====


def prompt_warnings(
    table: ClassTable,
    template: Templates,
    names: str = "first",
    count_tokens: Callable[[str], int] | None = None,
    max_tokens: int = CLIP_MAX_TOKENS,
) -> list[str]:
    """One line for each trouble: empty columns, classes that share a prompt, prompts that CLIP cuts off.

    COUNT_TOKENS counts the CLIP tokens of a text, start and end included (see token_counter); without it nothing is
    said of them. A template with {background} is judged with the scene of most tokens.
    """
    every = [(row, one) for row in table.rows for one in template.templates(row.wnid)]
    scenic = any("background" in one.fields for _, one in every)
    scene = max(backgrounds(), key=count_tokens or len) if scenic else ""
    texts = [(row.wnid, _render(row, one, names, scene)) for row, one in every]

    empty = []
    for column in ("hypernym", "definition"):
        lacking = [n for n, (row, one) in enumerate(every) if column in one.fields and not getattr(row, column)]
        if lacking:
            ids = list(dict.fromkeys(texts[n][0] for n in lacking))
            empty.append(f"no {column} for {_classes(ids)}: their prompts go without it, as {texts[lacking[0]][1]!r}")

    # CLIP's tokenizer lower-cases and joins white space: "Cardigan" the dog and "cardigan" the knitwear are one text.
    sharing: dict[str, list[str]] = {}
    for wnid, text in texts:
        sharing.setdefault(" ".join(text.lower().split()), []).append(wnid)
    shared = ((text, list(dict.fromkeys(ids))) for text, ids in sharing.items())
    same = [f"same prompt for {_classes(ids)}: {text!r}" for text, ids in shared if len(ids) > 1]

    cut = []
    for wnid, text in texts:
        if count_tokens and (tokens := count_tokens(text)) > max_tokens:
            lost = text[len(kept_part(text, count_tokens, max_tokens)) :].strip()
            cut.append(f"{wnid}: {tokens} tokens, CLIP reads {max_tokens}; cut off: {lost!r}")
    return empty + _first(same) + _first(cut)


def _classes(ids: list[str]) -> str:
    return f"{len(ids)} class{'es' * (len(ids) > 1)} ({', '.join(ids[:4])}{', ...' * (len(ids) > 4)})"


def _first(lines: list[str], limit: int = 20) -> list[str]:
    """A bad template is bad for every class: past LIMIT only their number is told."""
    return lines[:limit] + [f"... and {len(lines) - limit} more of this kind"] * (len(lines) > limit)


# ===== the inspector =====


def get_args_parser() -> argparse.ArgumentParser:
    """Of the inspector of prompts."""
    parser = make_parser(__doc__)
    templates = "".join(f"  {name:18} {pattern}\n" for name, pattern in TEMPLATES.items())
    placeholders = "".join(f"  {'{' + name + '}':18} {meaning}\n" for name, meaning in PLACEHOLDERS.items())
    parser.epilog = f"templates of the paper:\n{templates}placeholders:\n{placeholders}"
    parser.add_argument("--classes", default="imagenet_100", help="table, .tsv or .txt file, or list of ids and names")
    parser.add_argument("--prompt", default="c, d_c", help="a template of the paper, or a text with placeholders")
    parser.add_argument("--names", choices=NAMES, default="first", help="how c and h_c are written")
    parser.add_argument("--limit", type=positive_int, metavar="N", help="print N classes only; warnings cover all")
    parser.add_argument("--seed", type=int, default=0, help="base seed: it draws the backgrounds")
    parser.add_argument("--model", default="CompVis/stable-diffusion-v1-4", help="its tokenizer counts, if it is here")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    return parser


def main(args: argparse.Namespace) -> None:
    """Print one prompt a class, its tokens, and warnings; see the head of this file."""
    table, template = load_classes(args.classes), parse_template(args.prompt)
    count, max_tokens = token_counter(args.model) or (None, CLIP_MAX_TOKENS)
    warnings = prompt_warnings(table, template, args.names, count, max_tokens)
    first = [next(class_prompts(row, template, [0], args.seed, args.names)) for row in table.rows[: args.limit]]
    rows = [{"id": one.wnid, "prompt": one.text, "tokens": count(one.text) if count else None} for one in first]
    if args.json:
        report = {"classes": table.name, "sha256": table.sha256, "template": template.text, "names": args.names}
        report |= {"tokens": "exact" if count else "unknown", "prompts": rows, "warnings": warnings}
        print(json.dumps(report, indent=2, ensure_ascii=False))
        return
    for item in rows:
        print(f"{item['id']}\t{item['prompt']}" + (f"\t{item['tokens']}" if count else ""))
    if not count:
        print(f"note: no tokenizer of {args.model} on this machine: tokens are not counted", file=sys.stderr)
    for line in warnings:
        print(f"warning: {line}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run(main, get_args_parser()))
