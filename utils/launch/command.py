"""Run a script here, as several local processes, or on a SLURM cluster: a prefix, like torchrun.

    python -m utils.launch --launcher local generate.py --classes 100 --out data/x          one process a GPU
    python -m utils.launch --launcher slurm --partition gpu --chunks 64 generate.py --classes 100 --out data/x
    python -m utils.launch --launcher slurm --partition gpu --nodes 2 --gpus-per-node 4 train.py --data data/x

generate.py becomes independent chunks of classes (an array on SLURM), train.py and evaluate.py the ranks of one job
that share its work. A script's own options are checked before anything starts or is queued. Several commands joined by
`--then` run one after the other, each only if the one before succeeded (on SLURM by dependencies, queued at once);
launcher options before the first script hold for all of them, options after a `--then` for that command only.

A submitted job returns the prompt and prints how to watch it; --wait stays until the end. Running the same command
again continues, whatever ended it. docs/cluster.md tells the rest.
"""

import argparse
import os
import runpy
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.cli import Launch, UserError, any_path, make_parser, non_negative_int, positive_float, positive_int
from utils.launch.processes import free_port, make_team, visible_gpus
from utils.launch.watch import watch
from utils.machine import ROOT
from utils.storage import read_toml

THEN, PROCESSES = "--then", ("--processes", "--tasks-per-node")
NOT_A_SITES = {"command", "site", "watch", "wait", "dry_run", "help", "debug", "after"}  # options of one call
OWN_SBATCH_KEYS = {"array", "output", "error", "signal", "requeue", "open-mode", "dependency", "wrap", "job-name"}


@dataclass(frozen=True)
class Stage:
    """One checked command: ARGS are the launcher's options for it, MODE how its script runs (cli.Launch.runs_as).

    On SLURM it waits for the stages with the numbers AFTER, else for the one before; EACH are commands of its own kind
    that know nothing of each other, the elements of an array in COMMAND's place.
    """

    name: str
    args: argparse.Namespace
    command: tuple[str, ...]
    mode: str
    out: str | Path | None  # the folder that it writes
    after: tuple[int, ...] | None = None
    each: tuple[tuple[str, ...], ...] = ()


def get_args_parser() -> argparse.ArgumentParser:
    """The launcher's options; the script and its own options end up in `command`, unread."""
    parser = make_parser(__doc__)
    parser.prog = "python -m utils.launch"
    add_options(parser)
    parser.add_argument("command", nargs=argparse.REMAINDER, help="script.py and its options [--then ...]")
    return parser


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add those that say where and how; a study takes them too."""
    add = parser.add_argument
    add("--launcher", choices=("inline", "local", "slurm"), default="inline", help="where to run")
    add("--site", type=any_path, metavar="FILE.toml", help="a cluster's options (docs/cluster.md)")
    add("--watch", type=any_path, metavar="FOLDER", help="wait for jobs queued earlier (their log folder)")
    add("--chunks", type=positive_int, help="generate.py: chunks of classes (slurm: an array)")
    add(*PROCESSES, type=positive_int, help="processes at once on a node (one a GPU, or 1)")
    add("--nodes", type=positive_int, default=1, help="train.py: nodes of the DDP job")

    add = parser.add_argument_group("slurm").add_argument
    several: dict[str, Any] = {"action": "append", "default": []}
    add("--wait", action="store_true", help="stay until the jobs end, exit as they do")
    add("--dry-run", action="store_true", help="check all, print the jobs, queue nothing")
    add("--partition", help="partition, or several with commas")
    add("--account", help="account that is charged")
    add("--qos", help="quality of service")
    add("--constraint", help="node features, e.g. a100")
    add("--exclude", help="nodes to keep off, e.g. n[3-5]")
    add("--gpus-per-node", type=non_negative_int, default=1, help="GPUs of a job on each node; 0: CPU")
    share = "its GPUs' share of the smallest node"
    add("--cpus-per-task", type=positive_int, help=f"CPU cores for each process ({share}; without GPUs 1)")
    add("--mem-gb", type=positive_float, help=f"memory of a node's processes together ({share}; without GPUs SLURM's)")
    add("--timeout-min", type=positive_int, help="minutes until a job is requeued (the partition's limit, else 240)")
    add("--array-parallelism", type=positive_int, default=64, help="array elements at once, at most")
    add("--after", **several, metavar="JOBID", help="start when that job succeeded")
    add("--max-requeues", type=non_negative_int, default=20, help="time-outs until a job is given up")
    add("--signal-delay-s", type=positive_int, default=90, help="seconds before its limit at which a job saves")
    add("--log-dir", type=any_path, help="logs, on a shared disk (runs/launch/TIME-SCRIPT)")
    add("--container-image", help="run in this image through pyxis/enroot")
    add("--container-mounts", **several, metavar="HOST:INSIDE", help="further mounts")
    add("--apptainer", metavar="IMAGE.sif", help="run in this image through Apptainer")
    add("--setup", **several, metavar="LINE", help="shell line that the job begins with")
    add("--sbatch", **several, type=key_value, metavar="KEY=VALUE", help="any further option of sbatch")


def key_value(text: str) -> tuple[str, str]:
    """An option of sbatch as (key, value), the key with dashes as sbatch spells it; the launcher's own are refused."""
    key, equals, value = text.lstrip("-").partition("=")
    key = key.replace("_", "-")
    if not equals or not key:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE, e.g. reservation=course")
    if key in OWN_SBATCH_KEYS:
        raise argparse.ArgumentTypeError(f"{key} is set by the launcher itself")
    return key, value


def main(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Run what ARGV asks for (ARGS is the same, parsed); the exit code."""
    if args.watch:
        return watch(args.watch)
    # Every command is checked before the first one starts.
    stages = read_stages(argv[: len(argv) - len(args.command)], args.command)
    launcher = stages[0].args.launcher
    if launcher == "slurm":
        from utils.launch.slurm import run_on_slurm  # submitit costs start-up time

        return run_on_slurm(stages)
    if launcher == "inline" and len(stages) == 1:
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *stages[0].command])  # signals and exit code are the script's own
    for stage in stages:
        if len(stages) > 1:
            print(f"launch: {shlex.join(('python', *stage.command))}", flush=True)
        if code := run_here(stage, launcher):
            return code
    return 0


# ===== reading the command line =====


def read_stages(options: Sequence[str], command: Sequence[str]) -> list[Stage]:
    """Split COMMAND at `--then`; OPTIONS hold for each part. Scripts parse their own arguments: mistakes end here."""
    pieces: list[list[str]] = [[]]
    for word in command:
        if word == THEN:
            pieces.append([])
        else:
            pieces[-1].append(word)
    stages = [read_stage(options, piece, first=index == 0) for index, piece in enumerate(pieces)]
    if len({stage.args.launcher for stage in stages}) > 1:
        raise UserError("--launcher belongs before the first script: all commands of a pipeline run in the same place")
    return stages


def read_stage(options: Sequence[str], piece: Sequence[str], first: bool) -> Stage:
    """One command of a pipeline: PIECE is [launcher options ...] script.py [its options ...]."""
    parser = get_args_parser()
    args = parser.parse_args([*options, *piece])
    if not args.command:
        example = "e.g. python -m utils.launch --launcher local generate.py --classes 100 --out x"
        raise UserError(f"no script given; {example}" if first else f"no script after {THEN}")
    own_options = piece[: len(piece) - len(args.command)]
    script = args.command[0]
    how, script_parser = load_script(script)
    if args.site:
        args = parser.parse_args([*site_options(args.site, (how.table, Path(script).stem), parser), *options, *piece])
    refuse_unused(parser, args, [*options, *own_options])
    refuse_control_characters(args)
    script_args = script_parser.parse_args(args.command[1:])

    mode, several = how.runs_as, (args.chunks or 1) > 1
    if mode != "ranks" and args.nodes > 1:
        raise UserError(f"--nodes {args.nodes}: {script} is no DDP job; give --chunks and --array-parallelism instead")
    if mode != "chunks":
        if args.chunks and "--chunks" in names_of([*options, *own_options] if first else own_options):
            raise UserError(f"--chunks {args.chunks}: {script} has no --chunk; give --nodes and --processes instead")
        args.chunks = None
    elif whole := [name for name in how.whole if getattr(script_args, name)]:
        if several:
            raise UserError(f"--chunks {args.chunks}: --{whole[0]} takes all classes together; leave --chunks out")
        args.chunks = 1
    elif "--chunk" in names_of(args.command):
        if several:
            raise UserError("--chunk is given by the launcher; leave it out, or leave --chunks out")
        args.chunks = 1
    if args.container_image and args.apptainer:
        raise UserError("--container-image and --apptainer: give one of them")
    if args.launcher == "slurm":
        args.processes = 1 if mode == "single" else args.processes or max(1, args.gpus_per_node)
    return Stage(Path(script).stem, args, tuple(args.command), mode, getattr(script_args, "out", None))


def site_options(path: Path, tables: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """The options of a site file, a cluster's own in TOML, as arguments for PARSER.

    Keys are the launcher's options with underscores; a table holds for the script of that name, whose TABLES are its
    own and its file's name. Unknown keys and tables are refused by name, also in the tables of other scripts.
    """
    values = read_toml(path, f"--site {path}", "docs/cluster.md has one")
    known_tables = sorted({*tables, *(script.stem for script in ROOT.glob("*.py"))})
    own = {key: value for key, value in values.items() if isinstance(value, dict)}
    contents = {"": {key: value for key, value in values.items() if key not in own}, **own}  # "": for every script
    for key in own.keys() - known_tables:
        raise UserError(f"--site {path}: [{key}] is no table of it; use [{'], ['.join(known_tables)}]")
    for key in contents[""].keys() & known_tables:
        raise UserError(f"--site {path}: {key} is a script's name; write it as a table, [{key}]")
    options: list[str] = []
    known = {action.dest: action for action in parser._actions if action.dest not in NOT_A_SITES}
    for table, content in contents.items():
        for key, value in content.items():
            if key not in known:
                where, names = f"[{table}] " if table else "", ", ".join(sorted(known))
                raise UserError(f"--site {path}: {where}{key} is not an option; the known ones are {names}")
            repeated = isinstance(known[key], argparse._AppendAction)
            if isinstance(value, list) != repeated:
                wanted = "a list, [...]" if repeated else "one value, not a list"
                raise UserError(f"--site {path}: {key} takes {wanted}")
            if table in ("", *tables):
                options += [f"{known[key].option_strings[0]}={entry}" for entry in (value if repeated else [value])]
    return options


def names_of(words: Iterable[str]) -> list[str]:
    """The options among WORDS, "--chunks=4" as "--chunks"."""
    return [word.partition("=")[0] for word in words if word.startswith("--")]


def refuse_unused(parser: argparse.ArgumentParser, args: argparse.Namespace, words: Sequence[str]) -> None:
    """UserError if WORDS hold an option that the launcher in use ignores: work meant for a cluster would run here."""
    (slurm,) = (group for group in parser._action_groups if group.title == "slurm")
    # A site file may describe a cluster and yet serve `local`; --chunks 1 and the like change nothing anywhere.
    users = {option: "slurm" for action in slurm._group_actions for option in action.option_strings}
    users |= {"--nodes": "slurm"} if args.nodes > 1 else {}
    if args.launcher == "inline":
        several = (args.processes or 1) > 1
        given = {"--site": args.site, "--chunks": (args.chunks or 1) > 1, **dict.fromkeys(PROCESSES, several)}
        users |= {option: "local or slurm" for option, used in given.items() if used}
    for option in names_of(words):
        if option in users and args.launcher != "slurm":
            instead = f"give --launcher {users[option]}, or leave it out"
            raise UserError(f"{option}: --launcher {args.launcher} does not use it; {instead}")


def refuse_control_characters(args: argparse.Namespace) -> None:
    """UserError for an option with a line break or the like, from the command line or a site file."""
    # It would end a line of the batch script and begin one that SLURM or the shell reads as its own.
    for name, value in {**vars(args), "command": args.command[0]}.items():
        for part in value if isinstance(value, list) else [value]:
            text = "=".join(part) if isinstance(part, tuple) else str(part)
            if not text.isprintable():
                option = "script" if name == "command" else f"--{name.replace('_', '-')}"
                raise UserError(f"{option} {text!r}: holds a line break or control character; give plain text")


def load_script(script: str) -> tuple[Launch, argparse.ArgumentParser]:
    """How the script wants to be run, and its own parser: importing it does no work, by this project's rule."""
    path = Path(script)
    if path.suffix != ".py" or not path.is_file():
        raise UserError(f"{script}: no such script; launcher options go before it, its own options after it")
    sys.path.insert(0, str(path.resolve().parent))
    module = runpy.run_path(script, run_name=path.stem)
    if "get_args_parser" not in module:
        raise UserError(f"{script} has no get_args_parser(), so its options cannot be checked beforehand")
    how = module.get("LAUNCH")
    if not isinstance(how, Launch):
        raise UserError(f'{script} does not say how it runs; add LAUNCH = Launch("{path.stem}", "ranks") of utils.cli')
    parser = module["get_args_parser"]()
    parser.prog = path.name
    return how, parser


# ===== on this machine =====


def run_here(stage: Stage, launcher: str) -> int:
    """Run one command in processes of this machine; its exit code, 128 + n if signal n stopped it."""
    alone = launcher == "inline" or stage.mode == "single"
    gpus = [] if alone else visible_gpus()
    count = 1 if alone else stage.args.processes or max(1, len(gpus))
    chunks = 1 if alone or stage.mode != "chunks" else stage.args.chunks or count
    count = min(count, chunks) if stage.mode == "chunks" else count
    ranks = (0, 1, "127.0.0.1", free_port()) if stage.mode == "ranks" else None
    team = make_team((sys.executable, *stage.command), count, range(chunks), chunks, gpus, ranks)
    if count > 1:
        # Each process would else start a thread for every core.
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
    team.run()
    if team.stopped_by is not None and team.failed():
        print("launch: stopped; the same command continues", file=sys.stderr)
        return 128 + team.stopped_by
    return team.report()
