"""Shared by all command lines: help that teaches, one-line errors, exit codes that scripts can trust.

Exit codes: 0 done; 2 something the user can mend (option, file, disk); 1 unexpected; 130 interrupted.
"""

import argparse
import contextlib
import difflib
import errno
import math
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

MOST = 10**12  # of anything that is counted
LONGEST_NAME = 100  # characters; with suffixes and a temporary name it stays below a disk's 255 bytes
FULL = (errno.ENOSPC, errno.EDQUOT)  # of a disk, and of a quota
DISK_ERRORS = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENXIO, errno.ENODEV)


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
        """End with code 2."""
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
    main: Callable[[argparse.Namespace], int | None], parser: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> int:
    """Parse ARGV, call MAIN and turn its exceptions into one line on stderr and an exit code."""
    with contextlib.suppress(AttributeError):  # a stream that somebody put in its place
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # file names need not be UTF-8
    args = parser.parse_args(argv)
    try:
        return main(args) or 0
    except BrokenPipeError:
        # The reader (`| head`) has left. Keep the interpreter from complaining again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt) as error:
        if args.debug:
            traceback.print_exc()
        message, code = _explain(error)
        message = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in message)  # of hostile names
        print(f"{parser.prog}: {'error: ' if code != 130 else ''}{message}", file=sys.stderr, flush=True)
        return code


def _explain(error: BaseException) -> tuple[str, int]:
    """(one line, exit code) for an error: what the user, a disk, a network or another person did, or a bug of ours."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; the same command continues where this one stopped", 130
    if isinstance(error, UserError):
        return str(error), 2
    if isinstance(error, MemoryError):
        return "no memory is left; use fewer --workers, a smaller batch or a machine with more", 2
    if isinstance(error, OSError):
        path, number = error.filename, error.errno
        if number in FULL:
            where = f" ({path})" if path else ""
            return f"the disk is full{where}; free some space and run the same command again", 2
        if number in (errno.EACCES, errno.EPERM, errno.EROFS) and path:
            return f"no permission: {path} ({error.strerror})", 2
        if number in (errno.EMFILE, errno.ENFILE):
            return "too many open files; raise the limit (ulimit -n 65536) or use fewer --workers", 2
        if number and (path or number in DISK_ERRORS):
            where = f"{path}: " if path else ""
            return f"{where}{error.strerror}; check that path and its disk, then run the same command again", 2
    first_line = (str(error).strip().splitlines() or [""])[0]
    return f"unexpected {type(error).__name__}: {first_line} (--debug shows the traceback)", 1


def command_line() -> str:
    """This process's command as a person would type it, for the records: the launcher's `--chunk I/N` is left out."""
    words = ["python", Path(sys.argv[0]).name, *sys.argv[1:]]
    if "--chunk" in words:
        at = words.index("--chunk")
        del words[at : at + 2]
    return shlex.join(words)


# ===== argument types: refused at the door, with the value in the message =====


def _number(convert: Callable[[str], Any], least: float, most: float, wanted: str) -> Callable[[str], Any]:
    """The type of an option that takes a number from LEAST to MOST, in words WANTED."""

    def read(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            value = None
        if value is not None and most < value < math.inf:
            raise argparse.ArgumentTypeError(f"{shortened(text)!r} is more than the {most:,} that are possible")
        if value is None or not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{shortened(text)!r} is not {wanted}")
        return value

    return read


positive_int = _number(int, 1, MOST, "a whole number above 0")
non_negative_int = _number(int, 0, MOST, "a whole number, 0 or more")
seed_number = _number(int, 0, 2**63 - 1, "a whole number, 0 or more")  # as every generator of random numbers takes it
epoch_count = _number(int, 1, 100_000, "a whole number above 0")
positive_float = _number(float, 5e-324, sys.float_info.max, "a number above 0")


def one_or_more(text: str) -> int | list[int]:
    """A count, or several of them with commas between."""
    counts = [positive_int(part) for part in text.split(",")]
    return counts if len(counts) > 1 else counts[0]


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


def any_path(text: str) -> Path:
    """A path that a disk can hold, with `~` for the home folder."""
    try:
        found = Path(text).expanduser()
    except RuntimeError as error:  # `~nobody`
        raise argparse.ArgumentTypeError(f"{shortened(text)!r} is not a path: {error}") from None
    if not text or not text.isprintable():
        raise argparse.ArgumentTypeError(f"{shortened(text)!r} is not a path: it is empty or has control characters")
    if any(len(os.fsencode(part)) > 255 for part in found.parts) or len(os.fsencode(found)) > 3000:
        raise argparse.ArgumentTypeError(f"{shortened(text)!r} is too long for a path (255 bytes a folder)")
    return found


def one_name(text: str) -> str:
    """As `safe_name`, as the type of an option."""
    if why := _unsafe(text, LONGEST_NAME, paths=False):
        raise argparse.ArgumentTypeError(why)
    return text


def safe_name(text: Any, option: str) -> str:
    """TEXT if it is one component of a path that any disk takes, else a UserError that opens with OPTION.

    That is 1 to LONGEST_NAME characters without slashes, control characters or a dot or space at their start.
    """
    if why := _unsafe(text, LONGEST_NAME, paths=False):
        raise UserError(f"{option}: {why}")
    return text


def safe_label(text: Any, option: str, longest: int = 200) -> str:
    """TEXT if it is one printable line of at most LONGEST characters, for people to read; else a UserError."""
    if why := _unsafe(text, longest, paths=True):
        raise UserError(f"{option}: {why}")
    return text


def _unsafe(text: Any, longest: int, paths: bool) -> str:
    if not isinstance(text, str) or not text.strip():
        return f"{shortened(text)!r} is not a name; write letters, digits, . _ -"
    if len(text) > longest or (not paths and len(text.encode(errors="replace")) > 2 * longest):
        return f"{shortened(text)!r} is too long ({len(text)} characters); use at most {longest}"
    if not text.isprintable():
        return f"{shortened(text)!r} has control characters; write letters, digits, . _ -"
    if not paths and (text[0] in ". " or set(text) & set("/\\")):
        return f"{shortened(text)!r} cannot name a file; write letters, digits, . _ - without slashes or a first dot"
    return ""


def few(names: Iterable[Any], most: int = 3) -> str:
    """The first MOST of NAMES, for a message."""
    names = [*map(str, names)]
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def differences(recorded: Any, here: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, recorded, here) of every fact in which two records differ."""
    if isinstance(recorded, dict) and isinstance(here, dict):
        for key in recorded | here:
            yield from differences(recorded.get(key), here.get(key), f"{name}.{key}" if name else key)
    elif recorded != here:
        yield name, recorded, here


def shortened(value: Any, longest: int = 60) -> Any:
    """VALUE, a long text cut, for messages."""
    return value[:longest] + "..." if isinstance(value, str) and len(value) > longest else value
