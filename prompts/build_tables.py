"""Rebuild the class tables from WordNet 3.0 and timm's list of ImageNet's synsets.

Reads WordNet's `data.noun` (Debian: apt-get install wordnet-base) and `imagenet_synsets.txt` of the installed timm
(requirements-dev.in); writes imagenet_1k.tsv and fashion.tsv. See prompts/README.md for the columns.

    python prompts/build_tables.py                    # write the tables beside this file
    python prompts/build_tables.py --check            # compare byte for byte, write nothing
    python prompts/build_tables.py --out /tmp/tables --wordnet ~/WordNet-3.0/dict/data.noun
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # run as a file from anywhere, without an installation

from utils.classes import ClassRow, format_tsv, read_list  # noqa: E402
from utils.cli import UserError, make_parser, run  # noqa: E402
from utils.storage import atomic_write  # noqa: E402

WORDNET = "/usr/share/wordnet/data.noun"  # where Debian's wordnet-base puts it
FASHION = (  # what Fashion-MNIST's ten labels mean, as WordNet 3.0 has it
    "n02774152",  # bag
    "n02872752",  # boot
    "n03057021",  # coat
    "n03236735",  # dress
    "n03472535",  # gym shoe
    "n03595614",  # jersey, T-shirt
    "n04021028",  # pullover
    "n04133789",  # sandal
    "n04197391",  # shirt
    "n04489008",  # trouser
)


def get_args_parser() -> argparse.ArgumentParser:
    """The options; --help prints the docstring of this file above them."""
    parser = make_parser(__doc__)
    parser.add_argument("--wordnet", default=WORDNET, type=Path, help="data.noun of WordNet 3.0")
    parser.add_argument("--synsets", type=Path, help="the 1000 wnids in label order, one a line (default: timm's)")
    parser.add_argument("--out", default=HERE, type=Path, help="folder of the tables")
    parser.add_argument("--check", action="store_true", help="compare with the tables in --out instead of writing them")
    return parser


def main(args: argparse.Namespace) -> int:
    """Build the tables from WordNet and write them, or compare them with those in --out; exit code."""
    # ===== reading the sources =====
    wnids = [wnid for _, wnid in read_list(args.synsets or timm_synsets())]
    if not args.wordnet.is_file():
        raise UserError(f"--wordnet {args.wordnet} does not exist; apt-get install wordnet-base, or give the path")

    # ===== building the tables =====
    with args.wordnet.open("rb") as wordnet:
        tables = {
            "imagenet_1k.tsv": format_tsv(class_rows(wordnet, wnids)),
            "fashion.tsv": format_tsv(class_rows(wordnet, FASHION)),
        }

    # ===== writing or comparing them =====
    for file, text in tables.items():
        path = args.out / file
        if args.check:
            compare(path, text)
        else:
            atomic_write(path, text.encode())
        print(f"{path}: {'as its sources say' if args.check else 'written'}, {text.count(chr(10)) - 1} classes")
    return 0


def timm_synsets() -> Path:
    """timm's list, found without importing timm (which imports torch)."""
    spec = importlib.util.find_spec("timm")
    if spec is None or spec.origin is None:
        raise UserError("timm is not installed; pip install -r requirements-dev.lock, or give --synsets")
    return Path(spec.origin).parent / "data" / "_info" / "imagenet_synsets.txt"


def class_rows(wordnet: BinaryIO, wnids: Sequence[str]) -> list[ClassRow]:
    """The table of WNIDS, in their order."""
    rows = []
    for wnid in wnids:
        lemmas, hypernyms, gloss = read_synset(wordnet, wnid)
        if not hypernyms:
            raise UserError(f"{wnid} has no hypernym in {wordnet.name}; is this WordNet 3.0?")
        # Several direct hypernyms (38 classes of ImageNet-1K): the first one listed in data.noun.
        hypernym_lemmas, _, _ = read_synset(wordnet, hypernyms[0])
        rows.append(ClassRow(wnid, ", ".join(lemmas), ", ".join(hypernym_lemmas), definition(gloss)))
    return rows


def read_synset(wordnet: BinaryIO, wnid: str) -> tuple[list[str], list[str], str]:
    """(lemmas, wnids of the direct hypernyms in WordNet's order, gloss) of a noun.

    A wnid is "n" and the byte offset of the synset's line in data.noun. The line (man 5 wndb) reads:
    offset, file number, type, number of words (hex), then word and sense id for each word, number of pointers, then
    symbol, offset, part of speech and source/target for each pointer, and after " | " the gloss.
    """
    if not re.fullmatch(r"n\d{8}", wnid):
        raise UserError(f"{wnid!r} is not a wnid: n and eight digits")
    wordnet.seek(int(wnid[1:]))
    head, _, gloss = wordnet.readline().decode("ascii").partition(" | ")
    fields = head.split()
    if fields[:1] != [wnid[1:]] or fields[2] != "n":
        raise UserError(f"{wnid} is not a noun in {wordnet.name}; is this WordNet 3.0?")
    words = int(fields[3], 16)
    lemmas = [word.replace("_", " ") for word in fields[4 : 4 + 2 * words : 2]]
    pointers = fields[5 + 2 * words :]
    hypernyms = [f"n{offset}" for symbol, offset in zip(pointers[::4], pointers[1::4], strict=True) if symbol == "@"]
    return lemmas, hypernyms, gloss.strip()


def definition(gloss: str) -> str:
    """The gloss without its example sentences: quoted, after the definition. Other semicolons belong to it."""
    return gloss.split('; "')[0]


def compare(path: Path, text: str) -> None:
    """UserError with the first line of PATH that is not as in TEXT, byte for byte."""
    found = path.read_bytes() if path.is_file() else b""
    if found == text.encode():
        return
    # Ends of lines are kept, so that a lost newline or a CRLF shows too.
    lines, wanted = found.splitlines(keepends=True), text.encode().splitlines(keepends=True)
    number = next(
        (i for i, (a, b) in enumerate(zip(lines, wanted, strict=False)) if a != b), min(len(lines), len(wanted))
    )
    here, there = (side[number] if number < len(side) else b"(end of file)" for side in (lines, wanted))
    raise UserError(f"{path}, line {number + 1}: {here!r}, but its sources say {there!r}; rebuild it without --check")


if __name__ == "__main__":
    sys.exit(run(main, get_args_parser()))
