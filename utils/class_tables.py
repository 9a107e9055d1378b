"""Class tables: what each class is called, in the one order that every stage uses.

A table is a TSV file (UTF-8, one header line, one class a row). `name` is required and may list several names,
separated by commas; `wnid` (or `id`), `hypernym` and `definition` are optional. Ids become folder names. Rows are
sorted by id on reading, so that a class's position is its label: ImageFolder's order, and ImageNet's own.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from utils.cli import UserError
from utils.storage import sha256_bytes

PROMPTS_DIR = Path(__file__).resolve().parent.parent / "prompts"
SHIPPED = {
    "imagenet_1k": "imagenet_1k",
    "1000": "imagenet_1k",
    "1k": "imagenet_1k",
    "imagenet_100": "imagenet_100",
    "100": "imagenet_100",
    "digits": "digits",
}  # what --classes understands without a file -> the table's name

COLUMNS = ("wnid", "name", "hypernym", "definition")
SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # a folder name on any file system
# Characters that would break a line, a path or a terminal somewhere later; the tab separates cells and is not here.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f\x85\u2028\u2029\ufeff]")


@dataclass(frozen=True)
class ClassRow:
    """One class. Empty strings stand for what the table does not say."""

    wnid: str  # WordNet 3.0 id ("n" + offset), or any safe id
    name: str  # all names, comma-separated
    hypernym: str = ""  # names of the direct hypernym, comma-separated
    definition: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        return split_names(self.name)

    @property
    def first_name(self) -> str:
        return self.names[0]


@dataclass(frozen=True)
class ClassTable:
    """Classes sorted by id: the position of a row is its label."""

    name: str
    rows: tuple[ClassRow, ...]

    @property
    def ids(self) -> list[str]:
        return [row.wnid for row in self.rows]

    @cached_property
    def sha256(self) -> str:
        """Hash of the canonical TSV: for a shipped table, the `sha256sum` of its file."""
        return sha256_bytes(format_tsv(self.rows).encode())


def split_names(cell: str) -> tuple[str, ...]:
    """ "tench, Tinca tinca" -> ("tench", "Tinca tinca")."""
    return tuple(part.strip() for part in cell.split(","))


def format_tsv(rows: Iterable[ClassRow]) -> str:
    """The canonical text of a table; the shipped files are exactly this."""
    lines = ["\t".join(COLUMNS)]
    lines += [f"{row.wnid}\t{row.name}\t{row.hypernym}\t{row.definition}" for row in rows]
    return "\n".join(lines) + "\n"


def load_classes(spec: str | Path) -> ClassTable:
    """The classes named by SPEC.

    SPEC is a shipped table ("100"/"imagenet_100", "1000"/"1k"/"imagenet_1k", "digits"), a .tsv file, a .txt file
    with one id or name a line, or a comma-separated list of ids or names; the last two select from ImageNet-1K and
    the digits. UserError for anything unknown, ambiguous or malformed.
    """
    spec = str(spec).strip()
    if spec in SHIPPED:
        return _shipped(SHIPPED[spec])
    path = Path(spec).expanduser()
    if path.suffix.lower() == ".tsv":
        return ClassTable(path.stem, read_tsv(path))
    if path.suffix.lower() == ".txt":
        entries = [(f"{path}, line {line}, column 1", entry) for line, entry in read_list(path)]
        return ClassTable(path.stem, _select(entries))
    rows = _select([("--classes", entry.strip()) for entry in spec.split(",")])
    return ClassTable(f"classes_{sha256_bytes(format_tsv(rows).encode())[:8]}", rows)


def images_per_class(table: ClassTable, images: str | int) -> dict[str, int]:
    """Images to draw for each class id: IMAGES for all, or "imagenet": as many as ILSVRC2012's training set has."""
    if images != "imagenet":
        if isinstance(images, bool) or not isinstance(images, int) or images < 1:
            raise UserError(f"images per class: {images!r} is neither 'imagenet' nor a whole number above 0")
        return dict.fromkeys(table.ids, images)
    counts = imagenet_counts()
    unknown = [wnid for wnid in table.ids if wnid not in counts]
    if unknown:
        raise UserError(
            f"images per class: 'imagenet' knows the 1000 classes of ImageNet-1K, not {_listed(unknown)} "
            f"of {table.name}; give a number instead"
        )
    return {wnid: counts[wnid] for wnid in table.ids}


@lru_cache(maxsize=1)
def imagenet_counts() -> Mapping[str, int]:
    """wnid -> images in ILSVRC2012's training set; in all 1,281,167."""
    path = PROMPTS_DIR / "imagenet_counts.tsv"
    if not path.is_file():
        raise UserError(f"{path} is missing, so the images per class of ImageNet are unknown; give a number instead")
    lines = read_lines(path)[1:]
    return {wnid: int(images) for wnid, images in (line.split("\t") for line in lines)}


# ===== reading files: every error names file, line and column =====


def read_lines(path: Path) -> list[str]:
    """Lines of a UTF-8 text file without their ends. A BOM and CRLF line ends, as spreadsheets write, are accepted."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from None
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise _bad(path, 1, 1, "UTF-16 text; save the file as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # error.object lacks the BOM already removed; count within it.
        before = error.object[: error.start].decode("utf-8", "replace")
        line, column = before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1
        byte = error.object[error.start]
        raise _bad(path, line, column, f"byte 0x{byte:02x} is not UTF-8; save the file as UTF-8") from None
    if not text.strip():
        raise _bad(path, 1, 1, "the file is empty")
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    if CONTROL.search(text.replace("\r\n", "\n")):
        for number, line_text in enumerate(lines, 1):
            if found := CONTROL.search(line_text):
                raise _bad(path, number, found.start() + 1, f"control character U+{ord(found[0]):04X}; remove it")
    return lines


def read_list(path: Path) -> list[tuple[int, str]]:
    """(line number, entry) of a text file with one entry a line; blank lines and lines starting with # are skipped."""
    lines = enumerate(read_lines(path), 1)
    entries = [(number, line.strip()) for number, line in lines if line.strip() and not line.startswith("#")]
    if not entries:
        raise _bad(path, 1, 1, "no entry; write one id or name a line")
    return entries


def read_tsv(path: Path) -> tuple[ClassRow, ...]:
    """The rows of a class table, sorted by id. Blank lines are skipped; other columns than the known are ignored."""
    lines = read_lines(path)
    start = next(index for index, line in enumerate(lines) if line.strip())
    header = _read_header(path, start + 1, lines[start])
    rows: list[ClassRow] = []
    seen: dict[str, int] = {}  # id without case -> line: some file systems hold "Cat" and "cat" to be one folder
    for number, line in enumerate(lines[start + 1 :], start + 2):
        if not line.strip():
            continue
        cells = _read_cells(path, number, line, header)
        row = _read_row(path, number, cells)
        if (other := seen.setdefault(row.wnid.casefold(), number)) != number:
            column = "id" if "wnid" in cells else "name"
            remedy = "ids must differ by more than case" if "wnid" in cells else "add an `id` column to tell them apart"
            raise _bad(path, number, column, f"id {row.wnid!r} is already used in line {other}; {remedy}")
        rows.append(row)
    if not rows:
        raise _bad(path, start + 2, "name", "the table has a header but no class")
    return tuple(sorted(rows, key=lambda row: row.wnid))


def _read_header(path: Path, number: int, line: str) -> list[str]:
    header = [_unquote(path, number, index, cell).lower() for index, cell in enumerate(line.split("\t"), 1)]
    header = ["wnid" if column == "id" else column for column in header]
    for index, column in enumerate(header, 1):
        if column in COLUMNS and column in header[: index - 1]:
            raise _bad(path, number, index, f"column {column!r} appears twice")
        near = difflib.get_close_matches(column, COLUMNS, 1, cutoff=0.75)
        if column not in COLUMNS and near and near[0] not in header:
            raise _bad(path, number, index, f"unknown column {column!r}; did you mean {near[0]!r}?")
    if "name" not in header:
        hint = "; columns are separated by tabs, not commas" if len(header) == 1 and "," in line else ""
        found = ", ".join(header)
        raise _bad(
            path, number, "name", f"missing; the header has: {found} (known: id, name, hypernym, definition){hint}"
        )
    return header


def _read_cells(path: Path, number: int, line: str, header: Sequence[str]) -> dict[str, str]:
    cells = line.split("\t")
    if len(cells) > len(header):
        message = f"{len(cells)} cells where the header has {len(header)}; remove the tab inside a cell"
        raise _bad(path, number, len(header) + 1, message)
    if len(cells) < len(header):
        message = f"{len(cells)} cells where the header has {len(header)}; write a tab for each empty cell"
        raise _bad(path, number, header[len(cells)], message)
    return {column: _unquote(path, number, column, cell) for column, cell in zip(header, cells, strict=True)}


def _read_row(path: Path, number: int, cells: Mapping[str, str]) -> ClassRow:
    name = cells["name"]
    if not name:
        raise _bad(path, number, "name", "empty; every class needs a name")
    for column in ("name", "hypernym"):
        if cells.get(column) and not all(split_names(cells[column])):
            raise _bad(path, number, column, f"{cells[column]!r} has an empty name between its commas")
    wnid = cells["wnid"] if "wnid" in cells else id_from_name(split_names(name)[0])
    if not SAFE_ID.fullmatch(wnid):
        message = f"{wnid!r} cannot be a folder name; use 1-64 of A-Z a-z 0-9 . _ - and start with a letter or digit"
        raise _bad(path, number, "id", message)
    return ClassRow(wnid, name, cells.get("hypernym", ""), cells.get("definition", ""))


def _unquote(path: Path, number: int, column: str | int, cell: str) -> str:
    """Undo the quotes that spreadsheets put around a cell with a comma or a quote in it."""
    cell = cell.strip()
    if not cell.startswith('"'):
        return cell
    if len(cell) < 2 or not cell.endswith('"') or '"' in cell[1:-1].replace('""', ""):
        raise _bad(path, number, column, "unbalanced quotes; a cell cannot hold a tab or a line break")
    return cell[1:-1].replace('""', '"').strip()


def id_from_name(name: str) -> str:
    """A safe id for a class without one: "Blue Jay" -> "blue_jay".

    Where letters are lost (CJK, emoji, very long names) a hash of the name keeps different names apart.
    """
    decomposed = [char for char in unicodedata.normalize("NFKD", name) if not unicodedata.combining(char)]
    slug = re.sub(r"[^a-z0-9]+", "_", "".join(char for char in decomposed if char.isascii()).lower()).strip("_")
    if slug and len(slug) <= 64 and all(char.isascii() for char in decomposed):
        return slug
    return f"{slug[:40].strip('_') or 'class'}_{sha256_bytes(name.encode())[:12]}"


def _bad(path: Path, line: int, column: str | int, message: str) -> UserError:
    return UserError(f"{path}, line {line}, column {column}: {message}")


# ===== shipped tables and selections from them =====


@lru_cache(maxsize=3)
def _shipped(name: str) -> ClassTable:
    if name != "imagenet_100":
        return ClassTable(name, read_tsv(PROMPTS_DIR / f"{name}.tsv"))
    wanted = {entry for _, entry in read_list(PROMPTS_DIR / "imagenet_100.txt")}
    return ClassTable(name, tuple(row for row in _shipped("imagenet_1k").rows if row.wnid in wanted))


def _select(entries: Sequence[tuple[str, str]]) -> tuple[ClassRow, ...]:
    """Rows of ImageNet-1K and the digits named by (place, id or name) pairs; the place opens each error."""
    by_id, exact, folded = _known_classes()
    chosen: dict[str, tuple[ClassRow, str]] = {}
    for place, entry in entries:
        matches = [by_id[entry]] if entry in by_id else exact.get(entry) or folded.get(entry.casefold(), [])
        if not matches:
            near = difflib.get_close_matches(entry, [*by_id, *exact], 3, cutoff=0.6)
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "give an id or a name of ImageNet-1K"
            raise UserError(
                f"{place}: unknown class {entry!r}; {hint} (or imagenet_1k, imagenet_100, digits, a .tsv or .txt file)"
            )
        if len(matches) > 1:
            options = "; ".join(f"{row.wnid} ({row.definition})" for row in matches)
            raise UserError(f"{place}: {entry!r} names {len(matches)} classes, use an id: {options}")
        row = matches[0]
        if row.wnid in chosen:
            raise UserError(f"{place}: {entry!r} is class {row.wnid}, already chosen by {chosen[row.wnid][1]!r}")
        chosen[row.wnid] = (row, entry)
    return tuple(chosen[wnid][0] for wnid in sorted(chosen))


@lru_cache(maxsize=1)
def _known_classes() -> tuple[dict[str, ClassRow], dict[str, list[ClassRow]], dict[str, list[ClassRow]]]:
    """Rows by id; by name; and by name without case, for those who type "samoyed"."""
    rows = [*_shipped("imagenet_1k").rows, *_shipped("digits").rows]
    exact: dict[str, list[ClassRow]] = {}
    folded: dict[str, list[ClassRow]] = {}
    for row in rows:
        names = {row.name, *row.names}
        for name in names:
            exact.setdefault(name, []).append(row)
        for name in {name.casefold() for name in names}:
            folded.setdefault(name, []).append(row)
    return {row.wnid: row for row in rows}, exact, folded


def _listed(items: Sequence[str], limit: int = 3) -> str:
    return ", ".join(items[:limit]) + (f" and {len(items) - limit} more" if len(items) > limit else "")
