"""A cluster's options in a small TOML file, so that nobody types them twice.

Keys are the launcher's options with underscores; a table named after a script ([generate], [train], [evaluate]) holds
for that script only, and for copies of it. The command line wins over the file.

    account = "vision"
    setup = ["module load cuda/12"]
    [train]
    nodes = 2
"""

import argparse
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.cli import UserError
from utils.machine import ROOT

NOT_A_SITES = {"command", "site", "watch", "wait", "dry_run", "help", "debug", "after"}
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))


def site_options(path: Path, tables: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """The options in PATH for a script with TABLES (its own, its file's name) as arguments for PARSER.

    Unknown keys and tables are refused by name, also in the tables of other scripts.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--site {path}: no such file; docs/cluster.md has one to start from") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--site {path}: not valid TOML ({error})") from None
    known_tables = sorted({*SCRIPTS, *tables})
    contents: dict[str, dict[str, Any]] = {"": {}}  # "": what stands outside the tables, for every script
    for key, value in values.items():
        if isinstance(value, dict) and key not in known_tables:
            use = ", ".join(f"[{table}]" for table in known_tables)
            raise UserError(f"--site {path}: [{key}] is no table of it; use {use}")
        if key in known_tables and not isinstance(value, dict):
            raise UserError(f"--site {path}: {key} is a script's name; write it as a table, [{key}]")
        (contents if isinstance(value, dict) else contents[""])[key] = value
    options: list[str] = []
    known = {action.dest: action for action in parser._actions if action.dest not in NOT_A_SITES}
    for table, content in contents.items():
        for key, value in content.items():
            if key not in known:
                where, names = f"[{table}] " if table else "", ", ".join(sorted(known))
                raise UserError(f"--site {path}: {where}{key} is not an option; the known ones are {names}")
            repeated = isinstance(known[key], argparse._AppendAction)
            if isinstance(value, list) != repeated:
                raise UserError(
                    f"--site {path}: {key} takes {'a list, [...]' if repeated else 'one value, not a list'}"
                )
            if table in ("", *tables):
                options += [f"{known[key].option_strings[0]}={entry}" for entry in (value if repeated else [value])]
    return options
