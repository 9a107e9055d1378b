"""Shared by all command lines: help that teaches, one-line errors, exit codes that scripts can trust.

Exit codes: 0 done; 2 something the user can mend (option, file, disk); 1 unexpected; 130 interrupted.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import math
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn


class UserError(Exception):
    """A mistake the user can mend: the message is one line that names the option or file, and the remedy."""


@dataclass(frozen=True)
class Launch:
    """How `python -m utils.launch` runs a script; each script declares it beside its parser, as LAUNCH.

    table: its table in a site file. runs_as: "chunks" of classes that know nothing of each other (the script has
    `--chunk I/N`), the "ranks" of one DDP job, or a "single" process. whole: modes of a script in chunks that take all
    classes together (names of its options, as in its namespace).
    """

    table: str
    runs_as: Literal["chunks", "ranks", "single"]
    whole: tuple[str, ...] = ()


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the script's docstring as written and ends each option with its default."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        # "(default: None)" and "(default: False)" teach nothing.
        if action.default is None or action.default is False or action.default == []:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, without a page of usage before it, and which option may have been meant."""

    def error(self, message: str) -> NoReturn:
        hint = ""
        if message.startswith("unrecognized arguments: --"):
            wrong = message.split()[2].partition("=")[0]
            close = difflib.get_close_matches(wrong, self._option_string_actions, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
        self.exit(2, f"{self.prog}: error: {message}{hint} (--help lists the options)\n")


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose --help is the docstring. Abbreviated options are refused: they break when options grow."""
    parser = Parser(description=doc, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("--debug", action="store_true", help="show the Python traceback of an error")
    return parser


def run(
    main: Callable[[argparse.Namespace], int | None],
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
) -> int:
    """Parse ARGV, call MAIN and turn its exceptions into one line on stderr and an exit code."""
    args = parser.parse_args(argv)
    try:
        return main(args) or 0
    except KeyboardInterrupt:
        return _report(parser, args, "interrupted; the same command continues where this one stopped", 130)
    except BrokenPipeError:
        # The reader (`| head`) has left. Keep the interpreter from complaining again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except UserError as error:
        return _report(parser, args, str(error), 2)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" ({error.filename})" if error.filename else ""
            return _report(parser, args, f"the disk is full{where}; free some space and run the same command again", 2)
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and error.filename:
            return _report(parser, args, f"no permission: {error.filename} ({error.strerror})", 2)
        return _report(parser, args, _unexpected(error), 1)
    except Exception as error:  # the door of the program: everything else is a bug or a failing device
        return _report(parser, args, _unexpected(error), 1)


def _unexpected(error: BaseException) -> str:
    first_line = (str(error).strip().splitlines() or [""])[0]
    return f"unexpected {type(error).__name__}: {first_line} (--debug shows the traceback)"


def _report(parser: argparse.ArgumentParser, args: argparse.Namespace, message: str, code: int) -> int:
    if getattr(args, "debug", False):
        traceback.print_exc()
    print(f"{parser.prog}: {'error: ' if code != 130 else ''}{message}", file=sys.stderr, flush=True)
    return code


def command_line() -> str:
    """This process's command as a person would type it, for the records: the launcher's `--chunk I/N` is left out."""
    words = ["python", Path(sys.argv[0]).name, *sys.argv[1:]]
    if "--chunk" in words:
        at = words.index("--chunk")
        del words[at : at + 2]
    return shlex.join(words)


# ===== argument types: refused at the door, with the value in the message =====


def positive_int(text: str) -> int:
    return _number(text, int, lambda value: value > 0, "a whole number above 0")


def non_negative_int(text: str) -> int:
    return _number(text, int, lambda value: value >= 0, "a whole number, 0 or more")


def positive_float(text: str) -> float:
    return _number(text, float, lambda value: 0 < value < float("inf"), "a number above 0")


def data_and_weight(text: str) -> tuple[Path, float]:
    """PATH[:WEIGHT] of train.py's --data -> (path, weight above 0; 1 without one).

    A path that exists is never cut at its colon, and what no number follows is a path. UserError for a weight that
    no mix can have.
    """
    path, _, weight = text.rpartition(":")
    try:
        value = float(weight) if path and not Path(text).expanduser().exists() else None
    except ValueError:
        value = None
    if value is None:
        return Path(text).expanduser(), 1.0
    if not 0 < value < math.inf:
        raise UserError(f"--data {text}: the weight must be above 0")
    return Path(path).expanduser(), value


def _number(text, convert, accept, wanted):
    try:
        value = convert(text)
    except ValueError:
        value = None
    if value is None or not accept(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return value
