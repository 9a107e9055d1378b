"""A study on a real SLURM: arrays that wait for their datasets, and the numbers of the inline one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.slurm.cluster import Cluster
from tests.study.world import STUDY, call, make_world

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]
SMALL = STUDY.partition("[rows.g1]")[0].replace("sizes = [4, 8, 16]", "sizes = [4]").replace("[0, 1]", "[0]")


def on_cluster(cluster: Cluster, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "utils.study", "study.toml", "--launcher", "slurm", "--partition", "low"]
    command += ["--gpus-per-node", "0", *words]
    return subprocess.run(command, cwd=folder, env=cluster.env, capture_output=True, text=True, timeout=900)


def test_a_study_on_slurm_has_the_numbers_of_the_inline_one(cluster, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        make_world(folder, SMALL)
    done = on_cluster(cluster, there, "--chunks", "2", "--wait")
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = [line for line in done.stdout.splitlines() if line.startswith("launch: ") and ": job " in line]
    assert [line.split(": ")[1] for line in jobs] == ["draw-g2", "points", "points-g2", "looks"] and "after" in jobs[2]
    call(here)
    read = "runs/study/study.csv"
    assert (there / read).read_text() == (here / read).read_text()
    again = on_cluster(cluster, there)
    assert again.returncode == 0 and "2 of 2 points done, 0 datasets to draw" in again.stdout
    assert "job " not in again.stdout
