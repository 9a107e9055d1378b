"""`python -m utils.launch`; utils/launch/command.py has its help."""

import sys

from utils.cli import run
from utils.launch.command import get_args_parser, main

sys.exit(run(lambda args: main(args, sys.argv[1:]), get_args_parser()))
