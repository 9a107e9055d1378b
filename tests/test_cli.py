"""Exit codes and one-line errors of every script."""

from __future__ import annotations

import argparse
import errno
import subprocess
import sys
from pathlib import Path

import pytest

from utils import cli, storage
from utils.cli import (
    UserError,
    command_line,
    data_and_weight,
    make_parser,
    non_negative_int,
    positive_float,
    positive_int,
    run,
)

ROOT = Path(__file__).resolve().parent.parent


def raiser(error: BaseException):
    def main(args):
        raise error

    return main


def parser():
    made = make_parser("A script.\n\n    python script.py --count 3")
    made.prog = "script.py"
    made.add_argument("--count", type=positive_int, default=1, help="how many")
    made.add_argument("--name", help="a name")
    return made


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("--name x: no such name; use y"), 2, "script.py: error: --name x: no such name; use y"),
        (KeyboardInterrupt(), 130, "script.py: interrupted; the same command continues where this one stopped"),
        (OSError(errno.ENOSPC, "No space left on device", "/out/a.jpg"), 2, "the disk is full (/out/a.jpg)"),
        (PermissionError(errno.EACCES, "Permission denied", "/out"), 2, "no permission: /out"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 2, "the disk is full; free some space and run the same"),
        (OSError(errno.EIO, "Input/output error"), 2, "Input/output error; check that path and its disk"),
        (OSError(errno.ESTALE, "Stale file handle", "/nfs/x"), 2, "/nfs/x: Stale file handle; check that path"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/a/b"), 2, "/a/b: Not a directory; check that path"),
        (OSError(errno.EMFILE, "Too many open files", "/x"), 2, "too many open files; raise the limit (ulimit -n"),
        (MemoryError(), 2, "no memory is left; use fewer --workers"),
        (UserError("a\nb\x1b[31m\udcff: no"), 2, r"a\nb\x1b[31m\udcff: no"),
        (OSError("4096 requested and 12 written"), 1, "unexpected OSError: 4096 requested"),
        (ZeroDivisionError("division by zero\nand more"), 1, "unexpected ZeroDivisionError: division by zero (--debug"),
    ],
)
def test_an_exception_becomes_one_line_and_an_exit_code(error, code, message, capsys):
    assert run(raiser(error), parser(), []) == code
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1 and "Traceback" not in shown


def test_debug_shows_the_traceback(capsys):
    assert run(raiser(UserError("no")), parser(), ["--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_the_return_value_of_main_is_the_exit_code():
    assert run(lambda args: None, parser(), []) == 0
    assert run(lambda args: 3, parser(), []) == 3


@pytest.mark.parametrize("argv", [["--coun", "3"], ["--count", "0"], ["--count", "x"], ["--unknown"]])
def test_bad_options_exit_with_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        run(lambda args: None, parser(), argv)
    assert stop.value.code == 2
    assert argv[0] in capsys.readouterr().err


def test_help_shows_the_docstring_as_written_and_only_telling_defaults():
    shown = parser().format_help()
    assert "    python script.py --count 3" in shown
    assert "how many (default: 1)" in shown and "None" not in shown and "False" not in shown


@pytest.mark.parametrize(
    ("convert", "good", "bad"),
    [
        (positive_int, ["1", "7"], ["0", "-1", "1.5", ""]),
        (non_negative_int, ["0", "7"], ["-1", "x"]),
        (positive_float, ["0.5", "1e-6"], ["0", "-1", "nan", "inf"]),
        (cli.seed_number, ["0", "7"], ["-1", "1.5"]),
        (cli.epoch_count, ["1", "100000"], ["0", "1e3"]),
    ],
)
def test_numbers_are_checked_at_the_door(convert, good, bad):
    for text in good:
        assert convert(text) == float(text)
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match="is not"):
            convert(text)


def test_the_recorded_command_is_one_that_a_person_can_type(monkeypatch):
    argv = ["/somewhere/generate.py", "--prompt", "c, d_c", "--chunk", "0/8", "--out", "data/x"]
    monkeypatch.setattr("sys.argv", argv)
    assert command_line() == "python generate.py --prompt 'c, d_c' --out data/x"


@pytest.mark.parametrize(
    "argv,said",
    [
        (["--debgu"], "unrecognized arguments: --debgu; did you mean --debug? (--help lists the options)"),
        (["--count", "-1"], "argument --count: '-1' is not a whole number above 0 (--help lists the options)"),
    ],
)
def test_a_wrong_option_gets_one_line(capsys, argv, said):
    parser = cli.make_parser("doc")
    parser.add_argument("--count", type=cli.positive_int)
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(argv)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.count("\n") == 1 and error.endswith(f"error: {said}\n")


def test_the_data_option_is_a_path_and_a_weight(tmp_path):
    (tmp_path / "v:1").mkdir()
    for text, wanted in (
        ("data/a:0.25", ("data/a", 0.25)),
        ("data/sd:5e-1", ("data/sd", 0.5)),
        ("data/sd:.5", ("data/sd", 0.5)),
        ("data/a", ("data/a", 1.0)),
        ("C:/data", ("C:/data", 1.0)),
        ("a:b:2", ("a:b", 2.0)),
        (":2", (":2", 1.0)),
        (f"{tmp_path}/v:1", (f"{tmp_path}/v:1", 1.0)),  # a folder that is there is never cut
        (f"{tmp_path}/v:1:3", (f"{tmp_path}/v:1", 3.0)),
        (f"{tmp_path}/w:1", (f"{tmp_path}/w", 1.0)),
        ("~/sd:2", (str(Path("~/sd").expanduser()), 2.0)),
    ):
        path, weight = data_and_weight(text)
        assert (str(path), weight) == wanted, text
    for weight in ("0", "-1", "inf", "nan"):
        with pytest.raises(UserError, match=f"--data data/a:{weight}: the weight must be above 0"):
            data_and_weight(f"data/a:{weight}")


@pytest.mark.parametrize("text", [str(2**70), str(10**30), "9" * 5000])
@pytest.mark.parametrize("convert", [positive_int, non_negative_int, cli.seed_number, cli.epoch_count])
def test_a_number_too_large_for_its_use_is_refused_briefly(convert, text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"is more than the|is not a whole number") as caught:
        convert(text)
    assert len(str(caught.value)) < 150
    assert cli.seed_number(str(2**63 - 1)) == 2**63 - 1


GOOD_NAMES = ["a", "imagenet_100_sd+digits", "a.b", "Größe 3", "鳥" * 60, "x" * 100, "$5", "-x"]
BAD_NAMES = [
    "", " ", ".", "..", ".hidden", "../esc", "a/b", "/etc", "a\\b", "a\nb", "a\0", "a\x1b[2J", "x" * 101, "鳥" * 90,
    " a", "\udcff", "a\u2028b", None, 5, ["a"], {},
]  # fmt: skip


@pytest.mark.parametrize("text", GOOD_NAMES)
def test_a_good_name_names_one_file(text, tmp_path):
    assert cli.safe_name(text, "--name") == cli.one_name(text) == text
    storage.atomic_write(tmp_path / f"{text}.json", b"x")
    assert [path.name for path in tmp_path.iterdir()] == [f"{text}.json"]


@pytest.mark.parametrize("text", BAD_NAMES)
def test_a_bad_name_is_refused_in_one_short_line(text):
    with pytest.raises(UserError, match=r"^dataset\.json, classes\[0\]\.id: ") as caught:
        cli.safe_name(text, "dataset.json, classes[0].id")
    with pytest.raises(argparse.ArgumentTypeError):
        cli.one_name(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


def test_a_label_is_one_printable_line():
    for text in ("50 % / 1.5x", "$x$", "../a", "a" * 200):
        assert cli.safe_label(text, "--label") == text
    for text in ("", "a\nb", "a" * 201, "\x07", 3):
        with pytest.raises(UserError, match=r"^--label: "):
            cli.safe_label(text, "--label")


def test_a_path_knows_the_home_folder_and_has_an_end(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    assert cli.any_path("~/x") == Path("/home/ada/x") and cli.any_path("../a b") == Path("../a b")
    for text in ("", "a\nb", "x" * 300, "a/" * 1600, "~nobody-of-this-name/x"):
        with pytest.raises(argparse.ArgumentTypeError):
            cli.any_path(text)


def test_a_file_name_that_is_not_utf8_can_be_printed():
    code = "from utils.cli import make_parser, run; run(lambda args: print('a\\udcff.jpg'), make_parser('doc'), [])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, env={"PYTHONUTF8": "1"})
    assert done.stdout == b"a\\udcff.jpg\n" and done.returncode == 0
