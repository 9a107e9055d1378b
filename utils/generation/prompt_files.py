"""Prompts written by somebody: one file of (class, text, weight) in place of one template for all classes.

    captions.tsv      header `id`, `prompt` and, if wanted, `weight` (above 0; 1 where the column is missing)
    captions.jsonl    {"id": "n01440764", "prompt": "a tench in a net", "weight": 2} a line

A text may have the placeholders of --prompt; a brace of the text itself is written twice. Image k of a class takes one
of its class's prompts by its own seed, each in proportion to its weight: see PromptFile.pick.

Public prompt files, as far as the code that writes and reads them tells their format:

    captions.txt      one caption a line: SynCLR (google-research/syn-rep-learn, commit 45f451b: written by
                      SynCLR/synthesis/syn_text/synthesize_text.py). The captions themselves (SynCaps-150M) were not
                      released when its README was read.
    captions.json     a list of captions, or of [caption, [numbers of concepts]]: SynthCLIP (hammoudhasan/SynthCLIP,
                      commit 3cecb4a: TextGen/captions_generator.py, TextGen/balancing.py). What its data set on the
                      hub holds (hammh0a/SynthCLIP) was not read: it is not described in the repository.
    captions/<id>     a folder with a file a class, one caption a line: "Image Captions are Natural Prompts"
                      (LeavesLei/Caption_in_Prompt, commit 72947bc: image_caption_generate.py writes it with ImageNet's
                      folder names, image_dataset_generate.py reads it and draws "a photo of <class>, <caption>").

Captions of the first two belong to no class. They go to the class that one of their words or phrases names (in any
case, the longest match counts: a "tiger shark" is no tiger); captions that name no class, or several, are left out.
"""

import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Annotated

import msgspec

from utils.classes import CONTROL, ClassTable, read_table
from utils.cli import UserError
from utils.dataset.folder import PROMPTS, Dataset
from utils.generation.prompts import SEED_BITS, Template, parse_template
from utils.storage import MOST_JSONL, read_json, read_regular, sha256_bytes

COLUMNS = {"id": "id", "wnid": "id", "class": "id", "prompt": "prompt", "text": "prompt", "weight": "weight"}
LONGEST = 4000  # characters of a prompt, as of a cell of a class table


class Line(msgspec.Struct, forbid_unknown_fields=True):
    """A line of a JSON Lines file of prompts."""

    id: str
    prompt: str
    weight: Annotated[float, msgspec.Meta(gt=0, le=1e12)] = 1.0


@dataclass(frozen=True)
class PromptFile:
    """The prompts of every class, checked."""

    lines: tuple[Line, ...]  # sorted by class, in the file's order within one
    text: str = PROMPTS  # what the recipe says in place of a template

    @cached_property
    def content(self) -> bytes:
        """The file as it is kept beside dataset.json, whatever the format it was read from."""
        return b"".join(msgspec.json.encode(line) + b"\n" for line in self.lines)

    @cached_property
    def sha256(self) -> str:
        """Of `content`: what `sha256sum OUT/prompts.jsonl` prints."""
        return sha256_bytes(self.content)

    @cached_property
    def of_class(self) -> dict[str, tuple[list[Template], list[float]]]:
        """{class id: (its templates, their weights added up)}."""
        found: dict[str, list[Line]] = {}
        for line in self.lines:
            found.setdefault(line.id, []).append(line)
        return {
            wnid: ([_as_template(line.prompt) for line in lines], list(accumulate(line.weight for line in lines)))
            for wnid, lines in found.items()
        }

    @property
    def fields(self) -> set[str]:
        """The placeholders of all texts; none if a text has none, being written for its class."""
        every = [template.fields for some, _ in self.of_class.values() for template in some]
        return set().union(*every) if all(every) else set()

    def templates(self, wnid: str) -> list[Template]:
        """The texts of a class."""
        return self.of_class[wnid][0]

    def pick(self, wnid: str, image_seed: int) -> Template:
        """The text of one image: its seed, as a number from 0 to 1, falls into the share of one of them."""
        templates, sums = self.of_class[wnid]
        return templates[min(bisect_right(sums, image_seed / 2**SEED_BITS * sums[-1]), len(templates) - 1)]


def read_prompts(path: Path, table: ClassTable) -> PromptFile:
    """The prompts of PATH, a file or folder as in the head of this file, for the classes of TABLE.

    UserError, which names file and line, for an unknown class, a class without a prompt, a weight that is no number
    above 0 or a text that cannot be a prompt.
    """
    if path.is_dir():
        found = _read_class_files(path, table)
    elif not path.is_file():
        raise UserError(f"--prompts {path}: no such file; give a .tsv or .jsonl of class ids and texts")
    elif path.suffix.lower() in READERS:
        found = READERS[path.suffix.lower()](path, table)
    else:
        raise UserError(f"--prompts {path}: its name must end in {', '.join(READERS)}, or be a folder of class files")
    position, lines = {wnid: label for label, wnid in enumerate(table.ids)}, []
    for place, line in found:
        if line.id not in position:
            raise UserError(f"--prompts {place}: class {line.id!r} is none of --classes {table.name}; remove it")
        if not line.prompt.strip() or len(line.prompt) > LONGEST or CONTROL.search(line.prompt) or "\n" in line.prompt:
            raise UserError(f"--prompts {place}: a prompt is one line of 1 to {LONGEST} characters, none of control")
        try:
            _as_template(line.prompt)
        except UserError as error:
            raise UserError(f"--prompts {place}: {str(error).removeprefix('--prompt ')}") from None
        lines.append(line)
    without = sorted(position.keys() - {line.id for line in lines})
    if without:
        shown = f"{', '.join(without[:3])}{', ...' * (len(without) > 3)}"
        raise UserError(f"--prompts {path}: {len(without)} of {len(position)} classes have no prompt ({shown}); add "
                        "them, or leave them out of --classes")  # fmt: skip
    return PromptFile(tuple(sorted(lines, key=lambda line: position[line.id])))


def recorded_template(dataset: Dataset) -> Template | PromptFile:
    """What DATASET was drawn with: its recipe's template, or the prompts beside its dataset.json."""
    wanted = dataset.recipe.get("prompts")
    if not wanted:
        return parse_template(dataset.recipe["prompt"])
    found = read_prompts(dataset.root / PROMPTS, dataset.table)
    if found.sha256 != wanted:
        raise UserError(f"{dataset.root / PROMPTS} is not what dataset.json records; restore it, or give the file that "
                        "--prompts named with the command of dataset.json")  # fmt: skip
    return found


def _as_template(text: str) -> Template:
    if "{" not in text and "}" not in text:
        return Template(text, ((text, None),))
    return parse_template(text, of_one_class=True)


# ===== formats =====

Found = Iterator[tuple[str, Line]]  # (place for errors, line) ...


def _read_tsv(path: Path, table: ClassTable) -> Found:
    for number, cells in read_table(path, COLUMNS, required=("id", "prompt")):
        place = f"{path}, line {number}"
        yield place, _line(place, cells, strict=False)  # a weight is text in a table


def _read_jsonl(path: Path, table: ClassTable) -> Found:
    for number, text in _lines(path):
        place = f"{path}, line {number}"
        try:
            yield place, _line(place, json.loads(text))
        except (ValueError, RecursionError) as error:
            raise UserError(f"--prompts {place} is not valid JSON ({error})") from None


def _line(place: str, value: object, strict: bool = True) -> Line:
    try:
        return msgspec.convert(value, Line, strict=strict)
    except msgspec.ValidationError as error:
        what = str(error).replace("`", "")
        raise UserError(f"--prompts {place}: {what[:1].lower()}{what[1:]}") from None


def _read_captions(path: Path, table: ClassTable) -> Found:
    """SynCLR's: a caption a line, of no class."""
    return _with_classes(((f"{path}, line {number}", text) for number, text in _lines(path)), path, table)


def _read_json(path: Path, table: ClassTable) -> Found:
    """SynthCLIP's: captions, alone or each with the numbers of its concepts."""
    remedy = "give a list of captions, or a .jsonl with a class id in each line"
    captions = read_json(path, list[str | tuple[str, list[int]]], remedy)
    texts = (one if isinstance(one, str) else one[0] for one in captions)
    return _with_classes(((f"{path}, caption {number}", text) for number, text in enumerate(texts)), path, table)


def _read_class_files(folder: Path, table: ClassTable) -> Found:
    """Of "Image Captions are Natural Prompts": a file a class."""
    for path in sorted(folder.iterdir()):
        for number, text in _lines(path) if path.is_file() and not path.name.startswith(".") else ():
            yield f"{path}, line {number}", Line(path.stem, "a photo of {first_name}, " + _literal(text))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, text) of the lines of a UTF-8 file that are not blank."""
    try:
        lines = read_regular(path, MOST_JSONL).decode("utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"--prompts: cannot read {path} ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"--prompts {path} is not UTF-8; save it as UTF-8") from None
    return ((number, line.strip()) for number, line in enumerate(lines, 1) if line.strip())


def _literal(text: str) -> str:
    """A caption as a template that says the same; SynthCLIP's own reader replaces tabs and line breaks too."""
    return " ".join(text.split()).replace("{", "{{").replace("}", "}}")


def _with_classes(captions: Iterable[tuple[str, str]], path: Path, table: ClassTable) -> Found:
    """The (place, caption) pairs that name one class of TABLE, with its id."""
    wnids: dict[tuple[str, ...], set[str]] = {}
    for row in table.rows:
        for name in row.names:
            wnids.setdefault(_words(name), set()).add(row.wnid)
    longest, used, count = max(map(len, wnids)), 0, 0
    for place, caption in captions:
        count += 1
        named: set[str] = set()
        words, start = _words(caption), 0
        while start < len(words):
            ends = range(min(len(words), start + longest), start, -1)
            end = next((end for end in ends if words[start:end] in wnids), start + 1)
            named |= wnids.get(words[start:end], set())
            start = end
        if len(named) == 1:
            used += 1
            yield place, Line(named.pop(), _literal(caption))
    print(f"--prompts {path}: {used:,} of {count:,} captions name one class of {table.name}; the others are left out")


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text.lower()))


READERS = {".tsv": _read_tsv, ".jsonl": _read_jsonl, ".txt": _read_captions, ".json": _read_json}
