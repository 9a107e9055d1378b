"""Text files that people edit by hand: lists and tab-separated tables. Every error names file, line and column."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from utils.cli import UserError

# Characters that would break a line, a path or a terminal somewhere later, and halves of a character, as undecodable
# bytes of a command line arrive; the tab separates cells and is not here.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ufeff\ud800-\udfff]")


def bad_cell(path: Path, line: int, column: str | int, message: str) -> UserError:
    """The error for a cell, located by the column's name, or by number where it has none."""
    return UserError(f"{path}, line {line}, column {column}: {message}")


def read_lines(path: Path) -> list[str]:
    """Lines of a UTF-8 text file without their ends. A BOM and CRLF line ends, as spreadsheets write, are accepted.

    Lines end at \\n only: str.splitlines also cuts at form feeds and the like, which here are errors.
    """
    try:
        data = path.read_bytes()
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
    return text.removesuffix("\n").split("\n")


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
    """Undo the quotes that spreadsheets put around a cell with a comma or a quote in it."""
    cell = cell.strip()
    if not cell.startswith('"'):
        return cell
    if len(cell) < 2 or not cell.endswith('"') or '"' in cell[1:-1].replace('""', ""):
        message = "unbalanced quotes; write a quote that opens a cell twice, and no tab or line break inside"
        raise bad_cell(path, number, column, message)
    return cell[1:-1].replace('""', '"').strip()
