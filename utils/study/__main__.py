"""Run a study: a grid of datasets, sizes, mixes and seeds, trained and judged by the three scripts, and its page.

Reads  FILE.toml (docs/studies.md; studies/ has some to start from)
Writes data/<study>/<row>/ (datasets that it draws), runs/<study>/points/ (a folder a run) and, at the end,
       runs/<study>/study.html, study.md and study.csv

    python -m utils.study studies/fashion.toml --dry-run                      its commands, and what they cost
    python -m utils.study studies/fashion.toml --launcher local               on this machine, a run a GPU (or core)
    python -m utils.study studies/imagenet_100.toml --launcher slurm --partition gpu --chunks 64 --wait
    python -m utils.study studies/fashion.toml --status                       what is done, from the folders alone

The launcher's options follow the file (python -m utils.launch --help). The same command again continues, whatever
stopped it; a run that fails does not stop the others. A file that was changed runs only what the change concerns.
"""

import argparse
import sys
from collections.abc import Sequence

from utils.cli import UserError, any_path, make_parser, run
from utils.launch.command import add_options
from utils.study.cost import show
from utils.study.plan import make_plan
from utils.study.spec import read_study

OWN_WORDS = ("--dry-run", "--status", "--page", "--debug")


def get_args_parser() -> argparse.ArgumentParser:
    """The file, what to do with it, and the launcher's options."""
    parser = make_parser(__doc__)
    parser.prog = "python -m utils.study"
    parser.add_argument("file", type=any_path, metavar="FILE.toml", help="the study")
    parser.add_argument("--status", action="store_true", help="print what is done, stale or missing, and stop")
    parser.add_argument("--page", action="store_true", help="write the page of what is done so far, and stop")
    add_options(parser)
    return parser


def main(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Plan, then show, run or tell; ARGS are ARGV parsed. The exit code."""
    if argv[0].startswith("-"):
        raise UserError(f"{argv[0]}: FILE.toml comes first, options after it")
    plan = make_plan(read_study(args.file), on_paper=args.dry_run)
    if args.dry_run:
        show(plan)
        return 0
    from utils.study import execute

    if args.status:
        execute.show_status(plan)
        return 0
    code = 0
    if not args.page:
        code = execute.run_study(plan, args.launcher, [word for word in argv[1:] if word not in OWN_WORDS])
    from utils.study.page import write_study

    for path in write_study(plan):
        print(f"written: {path}")
    return code


if __name__ == "__main__":
    sys.exit(run(lambda args: main(args, sys.argv[1:]), get_args_parser()))
