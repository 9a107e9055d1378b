"""The local launcher and its processes killed at random instants: nothing is lost, nothing lives on, or runs twice."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.slurm.test_slurm import DRAW, complete

ROOT = Path(__file__).resolve().parents[2]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


def start(here: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "utils.launch", "--launcher", "local", "--processes", "2", "--chunks", "5"]
    return subprocess.Popen(
        [*command, "draw.py", "--out", "out", "--count", "200", "--seconds", "0.01"],
        cwd=here, env=os.environ | {"PYTHONPATH": str(ROOT)},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("seed", range(3))
def test_twelve_kills_and_the_same_command_ends_with_all_images(tmp_path, seed):
    chance = random.Random(seed)
    (tmp_path / "draw.py").write_text(DRAW)
    for _ in range(12):
        launcher = start(tmp_path)
        time.sleep(chance.uniform(0.05, 1.0))
        processes = children(launcher.pid) if launcher.poll() is None else []
        number = chance.choice(SIGNALS)
        target = chance.choice([launcher.pid, *processes])
        if launcher.poll() is None:
            os.kill(target, number)
        said, _ = launcher.communicate(timeout=20)
        assert "unexpected" not in said and "BlockingIOError" not in said, said  # the lock of a process that lives on
        if launcher.returncode == 0:
            break
        deadline = time.monotonic() + 5
        while any(Path(f"/proc/{pid}").exists() for pid in processes):
            assert time.monotonic() < deadline, "a process lives on without its launcher"
            time.sleep(0.01)
    launcher = start(tmp_path)
    said, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 0, said
    assert complete(tmp_path / "out", 200)
