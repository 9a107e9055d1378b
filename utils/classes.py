"""Class tables: what each class is called, in the one order that every stage uses.

A table is a TSV file (UTF-8, one header line, one class a row). `name` is required and may list several names,
separated by commas; `wnid` (or `id`), `hypernym` and `definition` are optional. Ids become folder names. Rows are
sorted by id on reading, so that a class's position is its label: ImageFolder's order, and ImageNet's own. Every error
names file, line and column.
"""

import csv
import difflib
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from utils.cli import UserError, shortened
from utils.storage import read_regular, sha256_bytes

PROMPTS_DIR = Path(__file__).resolve().parent.parent / "prompts"
SHIPPED = {
    "imagenet_1k": "imagenet_1k",
    "1000": "imagenet_1k",
    "1k": "imagenet_1k",
    "imagenet_100": "imagenet_100",
    "100": "imagenet_100",
    "fashion": "fashion",
}  # what --classes understands without a file -> the table's name

COLUMNS = ("wnid", "name", "hypernym", "definition")
HEADER = {"id": "wnid"} | {column: column for column in COLUMNS}  # word in a file's header -> column
FACTOR = re.compile(r"[1-9][0-9]{0,3}x")  # of the real number of images, as in "10x"
MOST_IMAGES = 1300  # of a class of ImageNet-1K; 895 of the 1000 have as many
SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # a folder name on any file system
LONGEST_CELL = 4000  # characters of a cell; a prompt of several fits into a line of the manifest
MOST_TABLE = 64 << 20  # bytes of a table or list


@dataclass(frozen=True)
class ClassRow:
    """One class. Empty strings stand for what the table does not say."""

    wnid: str  # WordNet 3.0 id ("n" + offset), or any safe id
    name: str  # all names, comma-separated
    hypernym: str = ""  # names of the direct hypernym, comma-separated
    definition: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """All names: ("tench", "Tinca tinca")."""
        return split_names(self.name)

    @property
    def first_name(self) -> str:
        """The one that prompts use unless all are asked for."""
        return self.names[0]


@dataclass(frozen=True)
class ClassTable:
    """Classes sorted by id: the position of a row is its label."""

    name: str
    rows: tuple[ClassRow, ...]

    @property
    def ids(self) -> list[str]:
        """In label order."""
        return [row.wnid for row in self.rows]

    @cached_property
    def sha256(self) -> str:
        """Hash of the canonical TSV: for a shipped table, the `sha256sum` of its file."""
        return sha256_bytes(format_tsv(self.rows).encode())


def split_names(cell: str) -> tuple[str, ...]:
    """Cut "tench, Tinca tinca" into ("tench", "Tinca tinca")."""
    return tuple(part.strip() for part in cell.split(","))


def format_tsv(rows: Iterable[ClassRow]) -> str:
    """The canonical text of a table; the shipped files are exactly this."""
    lines = ["\t".join(COLUMNS)]
    lines += [f"{row.wnid}\t{row.name}\t{row.hypernym}\t{row.definition}" for row in rows]
    return "\n".join(lines) + "\n"


def load_classes(spec: str | Path) -> ClassTable:
    """The classes named by SPEC.

    SPEC is a shipped table ("100"/"imagenet_100", "1000"/"1k"/"imagenet_1k", "fashion"), a .tsv file, a .txt file
    with one id or name a line, or a comma-separated list of ids or names; the last two select from ImageNet-1K and
    the demo's clothes. UserError for anything unknown, ambiguous or malformed.
    """
    spec = str(spec).strip()
    if spec in SHIPPED:
        return _shipped(SHIPPED[spec])
    path = Path(spec).expanduser()
    if path.suffix.lower() == ".tsv":
        return ClassTable(path.stem, read_classes(path))
    if path.suffix.lower() == ".txt":
        entries = [(f"{path}, line {line}, column 1", entry) for line, entry in read_list(path)]
        return ClassTable(path.stem, _select(entries))
    if path.is_file():
        raise UserError(f"--classes {spec}: a class file ends in .tsv (a table) or .txt (ids or names)")
    rows = _select([("--classes", entry.strip()) for entry in spec.split(",")])
    return ClassTable(f"classes_{sha256_bytes(format_tsv(rows).encode())[:8]}", rows)


def images_per_class(table: ClassTable, images: str | int) -> dict[str, int]:
    """Images to draw for each class id: IMAGES for all; with "imagenet" as many as ILSVRC2012's training set has, with
    "10x" ten times as many. Classes outside ImageNet-1K count as having MOST_IMAGES.
    """
    if images == "imagenet":
        images = "1x"
    if isinstance(images, str) and FACTOR.fullmatch(images):
        factor, counts = int(images[:-1]), imagenet_counts()
        return {wnid: factor * counts.get(wnid, MOST_IMAGES) for wnid in table.ids}
    if isinstance(images, bool) or not isinstance(images, int) or images < 1:
        raise UserError(f"images per class: {images!r} is neither 'imagenet', '10x' nor a whole number above 0")
    return dict.fromkeys(table.ids, images)


@lru_cache(maxsize=1)
def imagenet_counts() -> Mapping[str, int]:
    """wnid -> images in ILSVRC2012's training set: 732 to 1300, in all 1,281,167."""
    path = PROMPTS_DIR / "imagenet_counts.tsv"
    if not path.is_file():
        raise UserError(f"{path} is missing, so the images per class of ImageNet are unknown; give a number instead")
    rows = read_table(path, {"wnid": "wnid", "images": "images"}, required=("wnid", "images"))
    return {cells["wnid"]: int(cells["images"]) for _, cells in rows}


# ===== reading a table =====


def read_classes(path: Path) -> tuple[ClassRow, ...]:
    """The classes of a TSV file, sorted by id."""
    rows: list[ClassRow] = []
    lines: dict[str, int] = {}  # id without case -> line: some file systems hold "Cat" and "cat" to be one folder
    for number, cells in read_table(path, HEADER, required=("name",)):
        row = _read_row(path, number, cells)
        if (other := lines.setdefault(row.wnid.casefold(), number)) != number:
            if "wnid" in cells:
                column, remedy = "id", "ids must differ, and by more than case"
            else:
                column, remedy = "name", "rename it, or add an `id` column to tell the two apart"
            raise bad_cell(path, number, column, f"id {row.wnid!r} is already used in line {other}; {remedy}")
        rows.append(row)
    if not rows:
        raise bad_cell(path, 2, "name", "a header but no class")
    return tuple(sorted(rows, key=lambda row: row.wnid))


def _read_row(path: Path, number: int, cells: Mapping[str, str]) -> ClassRow:
    name = cells["name"]
    if not name:
        raise bad_cell(path, number, "name", "empty; every class needs a name")
    for column in ("name", "hypernym"):
        if cells.get(column) and not all(split_names(cells[column])):
            raise bad_cell(path, number, column, f"{cells[column]!r} has an empty name between its commas")
    wnid = cells["wnid"] if "wnid" in cells else id_from_name(split_names(name)[0])
    safe_id(wnid, f"{path}, line {number}, column id")
    return ClassRow(wnid, name, cells.get("hypernym", ""), cells.get("definition", ""))


def safe_id(text: str, where: str) -> str:
    """TEXT if it can be the folder of a class, else a UserError that opens with WHERE: a table's line, a file's key."""
    if not (isinstance(text, str) and SAFE_ID.fullmatch(text)):
        rule = "use 1-64 of A-Z a-z 0-9 . _ - and start with a letter or digit"
        raise UserError(f"{where}: {shortened(text, 80)!r} cannot be a folder name; {rule}")
    return text


def id_from_name(name: str) -> str:
    """ "Blue Jay" -> "blue_jay", a safe id; where letters are lost (CJK, very long names) with a hash of the name."""
    decomposed = [char for char in unicodedata.normalize("NFKD", name) if not unicodedata.combining(char)]
    slug = re.sub(r"[^a-z0-9]+", "_", "".join(char for char in decomposed if char.isascii()).lower()).strip("_")
    if slug and len(slug) <= 64 and all(char.isascii() for char in decomposed):
        return slug
    return f"{slug[:40].strip('_') or 'class'}_{sha256_bytes(name.encode())[:12]}"


# ===== shipped tables and selections from them =====


@lru_cache(maxsize=3)
def _shipped(name: str) -> ClassTable:
    if name != "imagenet_100":
        return ClassTable(name, read_classes(PROMPTS_DIR / f"{name}.tsv"))
    wanted = {entry for _, entry in read_list(PROMPTS_DIR / "imagenet_100.txt")}
    return ClassTable(name, tuple(row for row in _shipped("imagenet_1k").rows if row.wnid in wanted))


def _select(entries: Sequence[tuple[str, str]]) -> tuple[ClassRow, ...]:
    """Rows of ImageNet-1K and the demo named by (place, id or name) pairs; the place opens each error."""
    by_id, exact, folded = _known_classes()
    chosen: dict[str, tuple[ClassRow, str]] = {}
    for place, entry in entries:
        matches = [by_id[entry]] if entry in by_id else exact.get(entry) or folded.get(entry.casefold(), [])
        if not matches:
            near = difflib.get_close_matches(entry, [*by_id, *exact], 3, cutoff=0.6)
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "give an id or a name of ImageNet-1K"
            raise UserError(
                f"{place}: unknown class {entry!r}; {hint} (or imagenet_1k, imagenet_100, fashion, a .tsv or .txt file)"
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
    by_id: dict[str, ClassRow] = {}
    exact: dict[str, list[ClassRow]] = {}
    folded: dict[str, list[ClassRow]] = {}
    for table in ("imagenet_1k", "fashion"):
        taken = set(folded)  # "purse" stays ImageNet's class of that name alone
        for row in _shipped(table).rows:
            if by_id.setdefault(row.wnid, row) is not row:
                continue  # sandals are in both
            names = {name for name in (row.name, *row.names) if name.casefold() not in taken}
            for name in names:
                exact.setdefault(name, []).append(row)
            for name in {name.casefold() for name in names}:
                folded.setdefault(name, []).append(row)
    return by_id, exact, folded


# ===== text files that people edit by hand =====

# Characters that would break a line, a path or a terminal somewhere later, and halves of a character, as undecodable
# bytes of a command line arrive; the tab separates cells and is not here.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ufeff\ud800-\udfff]")


def bad_cell(path: Path, line: int, column: str | int, message: str) -> UserError:
    """The error for a cell, located by the column's name, or by number where it has none."""
    return UserError(f"{path}, line {line}, column {column}: {message}")


def read_lines(path: Path) -> list[str]:
    """Lines of a UTF-8 text file without their ends. A BOM and CRLF line ends, as spreadsheets write, are accepted."""
    try:
        data = read_regular(path, MOST_TABLE)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from None
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise bad_cell(path, 1, 1, "UTF-16 text; save the file as UTF-8")
    try:
        text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError as error:
        before = error.object[: error.start].decode("utf-8")
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        message = f"byte 0x{error.object[error.start]:02x} is not UTF-8; save the file as UTF-8"
        raise bad_cell(path, line, column, message) from None
    text = text.replace("\r\n", "\n")
    if not text.strip():
        raise bad_cell(path, 1, 1, "the file is empty")
    if found := CONTROL.search(text):
        line, column = text.count("\n", 0, found.start()) + 1, found.start() - text.rfind("\n", 0, found.start())
        raise bad_cell(path, line, column, f"control character U+{ord(found[0]):04X}; remove it")
    return text.removesuffix("\n").split("\n")  # str.splitlines also cuts at form feeds and the like


def read_list(path: Path) -> list[tuple[int, str]]:
    """(line number, entry) of a file with one entry a line; blank lines and lines that start with # are skipped."""
    lines = [(number, line.strip()) for number, line in enumerate(read_lines(path), 1)]
    entries = [(number, line) for number, line in lines if line and not line.startswith("#")]
    if not entries:
        raise bad_cell(path, 1, 1, "only comments; write one entry a line")
    return entries


def read_table(path: Path, known: Mapping[str, str], required: Collection[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, {column: cell}) of each row of a TSV file; blank lines are skipped.

    KNOWN maps the words accepted in the header, in any case, to column names. A header without all of REQUIRED is an
    error, and so is a misspelt column; other columns may hold the user's notes and are left out.
    """
    lines = read_lines(path)
    start = next(index for index, line in enumerate(lines) if line.strip())
    header = _read_header(path, start + 1, lines[start], known, required)
    for number, line in enumerate(lines[start + 1 :], start + 2):
        if line.strip():
            cells = _read_cells(path, number, line, header)
            yield number, {column: cell for column, cell in cells.items() if column in known.values()}


def _read_header(path: Path, number: int, line: str, known: Mapping[str, str], required: Collection[str]) -> list[str]:
    words = [_unquote(path, number, index, cell).lower() for index, cell in enumerate(line.split("\t"), 1)]
    header = [known.get(word, word) for word in words]
    if len(words) == 1 and "," in line:
        raise bad_cell(path, number, 1, f"{words[0]!r} is one column; separate columns by tabs, not commas")
    for index, column in enumerate(header, 1):
        if column in known.values() and column in header[: index - 1]:
            raise bad_cell(path, number, index, f"a second {words[index - 1]!r} column")
        near = difflib.get_close_matches(column, known, 1, cutoff=0.75)
        if column not in known.values() and near and known[near[0]] not in header:
            raise bad_cell(path, number, index, f"unknown column {column!r}; did you mean {near[0]!r}?")
    for column in required:
        if column not in header:
            found = f"the header has {', '.join(map(repr, words))}, of {', '.join(known)}"
            raise bad_cell(path, number, column, f"missing; {found}")
    return header


def _read_cells(path: Path, number: int, line: str, header: Sequence[str]) -> dict[str, str]:
    cells = line.split("\t")
    if len(cells) > len(header):
        message = f"{len(cells)} cells where the header has {len(header)}; remove the tab inside a cell"
        raise bad_cell(path, number, len(header) + 1, message)
    if len(cells) < len(header):
        message = f"{len(cells)} cells where the header has {len(header)}; write a tab even for an empty cell"
        raise bad_cell(path, number, header[len(cells)], message)
    return {column: _unquote(path, number, column, cell) for column, cell in zip(header, cells, strict=True)}


def _unquote(path: Path, number: int, column: str | int, cell: str) -> str:
    """Undo the quotes that spreadsheets put around a cell with a comma or a quote in it: csv's `excel-tab`."""
    if len(cell) > LONGEST_CELL:
        raise bad_cell(path, number, column, f"{len(cell):,} characters; at most {LONGEST_CELL:,} are read")
    try:
        return "".join(next(csv.reader([cell.strip()], "excel-tab", strict=True), [])).strip()
    except csv.Error:
        message = "unbalanced quotes; write a quote that opens a cell twice, and no tab or line break inside"
        raise bad_cell(path, number, column, message) from None
