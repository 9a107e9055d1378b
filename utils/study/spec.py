"""A study file: TOML against types. Every mistake in it is one line that names the file, the table and the key."""

import argparse
import contextlib
import difflib
import io
import re
import runpy
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import msgspec

from utils.cli import UserError, safe_name
from utils.evaluation.catalog import SETS
from utils.machine import ROOT
from utils.storage import read_toml, what_and_where

Count = Annotated[int, msgspec.Meta(ge=1, le=10**7)]
Seed = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Share = Annotated[float, msgspec.Meta(gt=0, lt=1)]
Sizes = Annotated[list[Count], msgspec.Meta(min_length=1)]
Seeds = Annotated[list[Seed], msgspec.Meta(min_length=1)]
# Options that the study gives itself; the others stand in [generate], [train] and [evaluate].
OWN = {
    "generate": {"out", "images_per_class", "chunk", "dry_run", "status", "verify", "repair", "preview", "pack",
                 "reproduce", "sample", "debug", "help"},
    "train": {"data", "out", "name", "seed", "images_per_class", "dry_run", "debug", "help"},
    "evaluate": {"checkpoint", "datasets", "test", "out", "report", "title", "show_data", "dataset_report", "real",
                 "list_datasets", "dry_run", "debug", "help"},
}  # fmt: skip


class Row(msgspec.Struct, forbid_unknown_fields=True):
    """Images to train on: a folder, or a dataset to draw with these options of generate.py beside the study's own."""

    label: str = ""
    folder: str = ""
    generate: dict[str, Any] | None = None
    sizes: Sizes | None = None
    seeds: Seeds | None = None
    published: dict[str, float] = {}  # size -> top-1 on the first test, as a paper has it


class Mix(msgspec.Struct, forbid_unknown_fields=True):
    """Two rows together: `shares` of the second in every epoch, or all of it added to `first` images of the first."""

    rows: tuple[str, str]
    label: str = ""
    shares: Annotated[list[Share], msgspec.Meta(min_length=1)] | None = None
    first: Count | None = None
    sizes: Sizes | None = None
    seeds: Seeds | None = None


class Study(msgspec.Struct, forbid_unknown_fields=True):
    """A file's content. The tables of rows and mixes are read one by one, so that a mistake in them has a name."""

    sizes: Sizes  # images a class
    rows: dict[str, Any]
    title: str = "Can synthetic images replace real ones?"
    seeds: Seeds = msgspec.field(default_factory=lambda: [0, 1, 2])
    steps: Count | None = None  # optimizer steps of every run; None: the recipe's epochs
    reference: str = ""  # the row to match; the first one if not named
    images_per_s: Annotated[float, msgspec.Meta(gt=0)] | None = None  # that a device trains on, for the cost
    quality: bool = True  # measure coverage and density of each dataset
    data: str = ""  # where drawn datasets go; data/<file's name>
    out: str = ""  # runs and pages; runs/<file's name>
    tests: dict[str, str] = {}
    datasets: list[str] = []  # names that evaluate.py knows
    generate: dict[str, Any] = {}
    train: dict[str, Any] = {}
    evaluate: dict[str, Any] = {}
    mixes: dict[str, Any] = {}
    path: str = ""  # of the file; not in it

    @property
    def judged(self) -> list[str]:
        """The names of the tests, the one that counts first."""
        return [*self.tests, *self.datasets]

    def wrong(self, place: str, why: str) -> UserError:
        """A mistake at PLACE, such as "[rows.g2] sizes"."""
        return UserError(f"{self.path}: {place}: {' '.join(why.split())}")


def read_study(path: Path) -> Study:
    """The study in a TOML file, with the defaults that its name gives. UserError for whatever is wrong with it."""
    values = read_toml(path, str(path), "studies/ has some")
    if "path" in values:
        raise UserError(f"{path}: path: unknown key; leave it out")
    study: Study = _convert(values, Study, path, "")
    study.path = str(path)
    name = safe_name(path.stem, str(path))
    study.data, study.out = study.data or f"data/{name}", study.out or f"runs/{name}"
    for table, kind in (("rows", Row), ("mixes", Mix)):
        entries = getattr(study, table)
        for key, value in entries.items():
            safe_name(key, f"{path}: [{table}] {shlex.quote(key)}")
            entries[key] = _convert(value, kind, path, f"[{table}.{key}] ")
    _check(study)
    return study


def _convert(value: Any, kind: Any, path: Path, table: str) -> Any:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        what, at = what_and_where(error)
        if unknown := re.search("unknown field (.+)", what):
            raise _unknown(f"{path}: {table}", unknown[1], kind.__struct_fields__) from None
        if missing := re.search("missing required field (.+)", what):
            raise UserError(f"{path}: {table}{missing[1]} is missing; docs/studies.md shows a whole file") from None
        raise UserError(f"{path}: {table}{at.removeprefix('$.') or 'it'}: {what}") from None


def _unknown(where: str, key: str, known: Collection[str]) -> UserError:
    close = difflib.get_close_matches(key, known, n=1)
    return UserError(f"{where}{key}: unknown; {f'did you mean {close[0]}?' if close else 'use ' + ', '.join(known)}")


def _check(study: Study) -> None:
    """What types alone do not say."""
    if not study.rows:
        raise study.wrong("rows", "there is none; give at least one, such as [rows.real]")
    if not study.judged:
        raise study.wrong("[tests]", 'there is none; give one, such as fashion = "data/fashion/test"')
    for name in study.datasets:
        if name not in SETS:
            raise _unknown(f"{study.path}: datasets: ", name, SETS)
    study.reference = study.reference or next(iter(study.rows))
    if study.reference not in study.rows:
        raise _unknown(f"{study.path}: reference: ", study.reference, study.rows)
    for name, row in study.rows.items():
        if bool(row.folder) == (row.generate is not None):
            raise study.wrong(f"[rows.{name}]", "give either folder = ... or generate = {...}")
        if strangers := [key for key in row.published if not key.isdecimal() or int(key) not in sizes_of(study, row)]:
            raise study.wrong(f"[rows.{name}] published", f"{strangers[0]} is not one of its sizes")
    for name, mix in study.mixes.items():
        if name in study.rows:
            raise study.wrong(f"[mixes.{name}]", "a row has this name; choose another")
        for row in mix.rows:
            if row not in study.rows:
                raise _unknown(f"{study.path}: [mixes.{name}] rows: ", row, study.rows)
        if mix.rows[0] == mix.rows[1]:
            raise study.wrong(f"[mixes.{name}] rows", "the two are the same")
        if (mix.shares is None) == (mix.first is None):
            raise study.wrong(f"[mixes.{name}]", "give either shares = [...] or first = N")
    if study.steps and "epochs" in study.train:
        raise study.wrong("[train] epochs", "steps says how long every run trains; give one of them")


def sizes_of(study: Study, part: Row | Mix) -> list[int]:
    """The sizes of a row or mix, smallest first."""
    return sorted({*(part.sizes or study.sizes)})


# ===== options as a script's words =====


@cache
def script(name: str) -> Mapping[str, Any]:
    """What NAME.py defines: its parser and checks are asked before anything starts; importing it does no work."""
    return runpy.run_path(str(ROOT / f"{name}.py"), run_name=name)


@cache
def parser_of(name: str) -> argparse.ArgumentParser:
    """The parser of NAME.py."""
    parser: argparse.ArgumentParser = script(name)["get_args_parser"]()
    parser.prog = f"{name}.py"
    return parser


def words_of(study: Study, name: str, options: Mapping[str, Any], table: str) -> list[str]:
    """OPTIONS, keys with underscores, as the words of a command of NAME.py; UserError naming TABLE and the key."""
    words: list[str] = []
    actions = {a.dest: a for a in parser_of(name)._actions if a.option_strings and a.dest not in OWN[name]}
    for key, value in options.items():
        if key in OWN[name]:
            raise study.wrong(f"{table} {key}", "the study gives this option itself; leave it out")
        if key not in actions:
            raise _unknown(f"{study.path}: {table} ", key, actions)
        action, option = actions[key], actions[key].option_strings[0]
        if isinstance(value, bool):
            negative = [one for one in action.option_strings if one.startswith("--no-")][:1]
            if action.nargs != 0:
                raise study.wrong(f"{table} {key}", "takes a value, not true or false")
            words += [option] if value else negative
        elif isinstance(value, list):
            if not isinstance(action, argparse._AppendAction) and action.nargs not in ("+", "*"):
                raise study.wrong(f"{table} {key}", "takes one value, not a list")
            words += [f"{option}={one}" for one in value] if action.nargs is None else [option, *map(str, value)]
        elif isinstance(value, str | int | float):
            words.append(f"{option}={value}")
        else:
            raise study.wrong(f"{table} {key}", "takes a text, a number, true or a list")
    return words


def checked(study: Study, place: str, name: str, words: Sequence[str]) -> argparse.Namespace:
    """The namespace of NAME.py's WORDS; its parser's refusal becomes one line that names PLACE."""
    return asked(study, place, lambda: parser_of(name).parse_args(list(words)))


def asked(study: Study, place: str, question: Callable[[], Any]) -> Any:
    """The answer of a script's own function to QUESTION; its refusal, however it is made, names PLACE."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return question()
    except UserError as error:
        raise study.wrong(place, str(error)) from None
    except SystemExit:
        message = said.getvalue().strip().removesuffix(" (--help lists the options)")
        raise study.wrong(place, message.partition("error: ")[2] or message) from None
