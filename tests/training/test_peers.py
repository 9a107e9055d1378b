"""One rank of two fails or is killed: the other ends within seconds, with one line that names it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.training.test_distributed import free_port, start
from tests.training_runs import ROOT, TINY, make_images

PROGRAM = """
import os, signal, sys, time, torch
from utils.cli import UserError, make_parser, run
from utils.training import distributed as d
def main(args):
    with d.process_group(torch.device("cpu")) as me:
        d.barrier()
        if me.rank == {failing}:
            if os.fork() == 0:  # as a loader's worker, which holds what its parent had open
                time.sleep(30)
                os._exit(0)
            {fault}
        {wait}
    return 0
sys.argv[0] = "job.py"
sys.exit(run(main, make_parser("x"), []))
"""
FAULTS = {
    "error": ('raise UserError("image 7 is damaged;\\x1b[31m restore it")', 2, "has failed: image 7 is damaged;"),
    "bug": ("{}['x']", 1, "has failed: 'x'"),
    "killed": ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, "is gone: killed"),
}
# gloo's collective breaks when a peer is gone, NCCL's does not: the sleep stands for it.
WAITS = {"gloo": "d.barrier()", "nccl": "time.sleep(60)"}


def said_by_us(error: str) -> list[str]:
    """The lines of ERROR but torch's own warnings, such as that a machine without a name server has no host name."""
    return [line for line in error.strip().splitlines() if not re.match(r"\[[WI]\d{4} [\d:.]+ \w+\.cpp:\d+\] ", line)]


@pytest.mark.parametrize(
    ("failing", "wait", "fault"),
    [
        (0, "gloo", "error"),
        (1, "gloo", "error"),
        (1, "gloo", "bug"),
        (1, "gloo", "killed"),
        (1, "nccl", "error"),
        (0, "nccl", "killed"),
        (1, "nccl", "killed"),
    ],
)
def test_the_other_rank_ends_soon_and_names_the_one_that_failed(failing, wait, fault):
    does, code, said = FAULTS[fault]
    port = free_port()
    program = PROGRAM.format(failing=failing, fault=does, wait=WAITS[wait])
    ranks = [start(rank, port, program) for rank in range(2)]
    failed, other = ranks[failing], ranks[1 - failing]
    assert failed.wait(timeout=120) == code
    ended = time.monotonic()
    error = said_by_us(other.stderr.read())  # at its end
    assert other.wait(timeout=10) == 2 and time.monotonic() - ended < 15
    assert len(error) == 1 and error[0].startswith(f"job.py: error: rank {failing} {said}"), error
    assert error[0].isprintable()


def test_a_rank_that_leaves_in_order_is_no_news():
    program = PROGRAM.format(failing=5, fault="", wait="time.sleep(3 * me.rank)")
    port = free_port()
    ranks = [start(rank, port, program) for rank in range(2)]
    texts = [process.communicate(timeout=120) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0] and not any(said_by_us(error) for _, error in texts)


def test_the_launcher_tells_of_the_rank_that_failed_alone(tmp_path):
    """Training on two ranks, one of which cannot read its images: its own line, and the launcher's about it."""
    images = make_images(tmp_path / "shapes", {"n01": 20, "n02": 14})
    for path in sorted(images.rglob("*.jpg"))[::2]:
        path.write_bytes(b"no image")
    options = [*TINY, "--data", images, "--out", tmp_path / "run", "--max-bad-images", 0]
    command = [sys.executable, "-m", "utils.launch", "--launcher", "local", "--processes", "2", "train.py", *options]
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 2 and "Traceback" not in done.stdout + done.stderr
    ends = [line for line in done.stdout.splitlines() if "train.py: error: " in line]
    causes = [line for line in ends if "] train.py: error: --max-bad-images 0: " in line]
    assert causes and len(ends) == 2, done.stdout
    assert len(causes) == 2 or "has failed: --max-bad-images 0" in next(line for line in ends if line not in causes)
    assert done.stderr.count("ended with exit code") == 1
