"""kill -9 at random instants, and several processes on one folder: the same bytes as an undisturbed run.

One child process imports torch once and forks a generate.py for every run, so that kills fall into the drawing and not
into seconds of imports.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.generation.test_generate import files_of
from tests.tiny_sd import build_tiny_sd

ROOT = Path(__file__).resolve().parents[2]
FORKER = """
import json, os, signal, sys, time
import torch, diffusers, transformers
torch.set_num_threads(1)
import generate
from diffusers import StableDiffusionPipeline, PNDMScheduler
from utils.generation import diffusion
from utils.cli import run

def fork(argv):
    child = os.fork()
    if child:
        return child
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os._exit(run(generate.main, generate.get_args_parser(), argv))

for line in sys.stdin:
    order = json.loads(line)
    started = time.monotonic()
    children = [fork(argv) for argv in order["runs"]]
    if order["kill_after_s"] is not None:
        time.sleep(order["kill_after_s"])
        for child in children:
            os.kill(child, signal.SIGKILL)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(json.dumps({"codes": codes, "seconds": time.monotonic() - started}), flush=True)
"""


class Forker:
    def __init__(self, model: Path, pipelines: str = "StableDiffusionPipeline"):
        self.model, self.options = model, []
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        script = FORKER.replace("StableDiffusionPipeline", pipelines)
        self.process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, text=True, **pipes)

    def run(self, out: Path, *chunks: str, kill_after_s: float | None = None) -> dict:
        """One process for each of CHUNKS, at the same time; {"codes", "seconds"}."""
        argv = ["--classes", "fashion", "--model", str(self.model), "--out", str(out), "--images-per-class", "7"]
        argv += ["--steps", "3", "--batch-size", "3", *self.options]
        runs = [[*argv, "--chunk", chunk] for chunk in chunks or ("0/1",)]
        self.process.stdin.write(json.dumps({"runs": runs, "kill_after_s": kill_after_s}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def forker(tmp_path_factory):
    forker = Forker(build_tiny_sd(tmp_path_factory.mktemp("models") / "tiny"))
    yield forker
    forker.process.stdin.close()
    forker.process.wait(timeout=30)


@pytest.fixture(scope="module")
def reference(tmp_path_factory, forker):
    out = tmp_path_factory.mktemp("reference") / "out"
    done = forker.run(out)
    assert done["codes"] == [0]
    files = files_of(out)
    assert len(files) == 10 * 7 + 10
    return files, done["seconds"]


def test_twenty_kills_at_random_instants_change_no_byte(tmp_path, forker, reference):
    files, seconds = reference
    rng = random.Random(0)
    kills = within = round_ = 0
    while kills < 20:
        out = tmp_path / f"round{round_}"
        round_ += 1
        for _ in range(7):  # one folder is killed up to 7 times, then left to finish
            done = forker.run(out, kill_after_s=rng.uniform(0, 0.7 * seconds))
            if done["codes"] == [-9]:
                kills += 1
                within += 0 < len(list(out.glob("train/*/*.jpg"))) < 70
            if done["codes"] == [0] or kills == 20:
                break
        assert forker.run(out)["codes"] == [0]
        assert files_of(out) == files, f"after {kills} kills"
    assert within >= 3  # some fell while images were being written


def test_two_processes_on_one_folder_share_the_work(tmp_path, forker, reference):
    out = tmp_path / "out"
    assert forker.run(out, "0/1", "0/1")["codes"] == [0, 0]
    assert files_of(out) == reference[0]
    info = json.loads((out / "dataset.json").read_text())
    assert info["counts"]["images"] == 70
    drawn = [json.loads(line)["images"] for line in (out / "sessions.jsonl").read_text().splitlines()]
    assert sum(drawn) == 70  # nothing was drawn twice


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path, forker, reference):
    out = tmp_path / "out"
    codes = forker.run(out, "0/1", "0/1", kill_after_s=0.4 * reference[1])["codes"]
    assert set(codes) <= {-9, 0}  # 0: on a fast machine one was done already
    assert forker.run(out)["codes"] == [0]
    assert files_of(out) == reference[0]


def test_chunks_at_the_same_time_give_the_same_files(tmp_path, forker, reference):
    out = tmp_path / "out"
    assert forker.run(out, "0/3", "1/3", "2/3")["codes"] == [0, 0, 0]
    assert files_of(out) == reference[0]
