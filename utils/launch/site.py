"""A cluster's options in a small TOML file, so that nobody types them twice.

Keys are the launcher's options with underscores; a table named after a script ([generate], [train], [evaluate]) holds
for that script only. The command line wins over the file.

    account = "vision"
    setup = ["module load cuda/12"]
    [train]
    nodes = 2
"""

from __future__ import annotations

import argparse
import tomllib
from pathlib import Path
from typing import Any

from utils.cli import UserError

NOT_A_SITES = {"command", "site", "watch", "wait", "dry_run", "help", "debug", "after"}
TABLES = ("generate", "train", "evaluate")


def site_options(path: Path, script: str, parser: argparse.ArgumentParser) -> list[str]:
    """The options in PATH for SCRIPT ("train") as arguments for PARSER; unknown keys are refused by name."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--site {path}: no such file; docs/cluster.md has one to start from") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--site {path}: not valid TOML ({error})") from None
    known = {action.dest: action for action in parser._actions if action.dest not in NOT_A_SITES}
    options: list[str] = []
    if flat := [table for table in TABLES if not isinstance(values.get(table, {}), dict)]:
        raise UserError(f"--site {path}: {flat[0]} is a script's name; write it as a table, [{flat[0]}]")
    everywhere = {key: value for key, value in values.items() if not isinstance(value, dict)}
    for table in ("", *TABLES):
        for key, value in (values.get(table, {}) if table else everywhere).items():
            if key not in known:
                where = f"[{table}] " if table else ""
                names = ", ".join(sorted(known))
                raise UserError(f"--site {path}: {where}{key} is not an option; the known ones are {names}")
            if table in ("", script):
                options += _arguments(path, key, value, known[key])
    if unknown := sorted(key for key, value in values.items() if isinstance(value, dict) and key not in TABLES):
        raise UserError(f"--site {path}: [{unknown[0]}] is no table of it; use {', '.join(f'[{t}]' for t in TABLES)}")
    return options


def _arguments(path: Path, key: str, value: Any, action: argparse.Action) -> list[str]:
    repeated = isinstance(action, argparse._AppendAction)
    if isinstance(value, list) != repeated:
        raise UserError(f"--site {path}: {key} takes {'a list, [...]' if repeated else 'one value, not a list'}")
    return [f"{action.option_strings[0]}={entry}" for entry in (value if repeated else [value])]
