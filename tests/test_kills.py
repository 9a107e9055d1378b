"""kill -9 at random instants of the three scripts, alone and 2 to 4 at a time: what is left continues to the same end.

One child process imports torch once and forks a script for every run, so that kills fall into the work and not into
seconds of imports. tests/generation/test_generate_kill.py holds twenty more kills of one drawing process. `make fuzz`
kills more often.
"""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.evaluation.test_evaluate import CLASSES, make_run
from tests.evaluation.test_evaluate import make_images as make_test_images
from tests.generation.test_generate import files_of
from tests.tiny_sd import build_tiny_sd
from tests.training_runs import TINY, log_without_clock, make_images, same_bits, weights
from utils.classes import load_classes
from utils.storage import read_jsonl

ROOT = Path(__file__).resolve().parent.parent
TIMES = int(os.environ.get("KILLS", "1"))  # as many kills
DRAW = ["--classes", "fashion", "--images-per-class", "5", "--steps", "2", "--batch-size", "3"]
FORKER = """
import json, os, signal, sys, time
import torch, torchvision, diffusers, transformers
from diffusers import StableDiffusionPipeline, PNDMScheduler
from sklearn.linear_model import LogisticRegression
torch.set_num_threads(1)
import evaluate, generate, train
import utils.evaluation.probes, utils.generation.diffusion, utils.training.step
from utils.cli import run

def fork(script, argv, environment, said):
    child = os.fork()
    if child:
        return child
    os.setpgrp()  # its loader workers die with it, as on a cluster
    os.environ |= environment
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os._exit(run(script.main, script.get_args_parser(), argv))

for line in sys.stdin:
    order = json.loads(line)
    started = time.monotonic()
    children = [fork(globals()[name], argv, environment, order["said"]) for name, argv, environment in order["runs"]]
    if order["kill_after_s"] is not None:
        end = started + order["kill_after_s"]
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        while time.monotonic() < end and not all(os.waitid(os.P_PID, child, flags) for child in children):
            time.sleep(0.002)
        for child in children:
            try:
                os.killpg(child, signal.SIGKILL)
            except ProcessLookupError:  # it has just begun
                os.kill(child, signal.SIGKILL)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(json.dumps({"codes": codes, "seconds": time.monotonic() - started}), flush=True)
"""


class Forker:
    def __init__(self) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen([sys.executable, "-c", FORKER], cwd=ROOT, text=True, **pipes)

    def run(
        self, *runs: tuple, kill_after_s: float | None = None, said: str | Path = "/dev/null"
    ) -> tuple[list[int], float]:
        """(exit codes, seconds) of (script, arguments, environment) at the same time; stderr goes to SAID."""
        order = {"runs": runs, "kill_after_s": kill_after_s, "said": str(said)}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return answer["codes"], answer["seconds"]


@pytest.fixture(scope="module")
def forker():
    forker = Forker()
    yield forker
    forker.process.stdin.close()
    forker.process.wait(timeout=30)


def storm(forker: Forker, kills: int, seconds: float, rng: random.Random, runs, finished) -> None:
    """Start RUNS(n) of folder n and kill them, until KILLS processes died at work in all; FINISHED(n) ends each folder.

    A folder is killed at up to four instants, spread over the SECONDS of a run that nobody disturbs.
    """
    died, folder = 0, 0
    while died < kills * TIMES:
        for _ in range(4):
            codes, _ = forker.run(*runs(folder), kill_after_s=rng.uniform(0.02, 0.9 * seconds))
            assert set(codes) <= {-9, 0}, codes
            died += codes.count(-9)
            if -9 not in codes:
                break
        finished(folder)
        folder += 1
        assert folder < 4 * kills * TIMES, "hardly any kill falls into the work"


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_kills_of_several_drawing_processes(tmp_path, forker, tiny, undrawn, processes):
    files, seconds = undrawn
    rng = random.Random(processes)

    def runs(number: int) -> list[tuple]:
        return [("generate", [*DRAW, "--model", tiny, "--out", str(tmp_path / str(number))], {})] * processes

    def finished(number: int) -> None:
        assert forker.run(runs(number)[0])[0] == [0]
        assert files_of(tmp_path / str(number)) == files
        assert not list((tmp_path / str(number)).rglob(".*.tmp"))

    storm(forker, 12, seconds, rng, runs, finished)


def test_kills_of_drawing_from_a_file_of_prompts(tmp_path, forker, tiny):
    """Twice; more than twenty times with KILLS=3, as `make fuzz` has it."""
    texts, rng = tmp_path / "texts.jsonl", random.Random(0)
    lines = [{"id": wnid, "prompt": f"{{name}}, {kind}"} for wnid in load_classes("fashion").ids for kind in "abc"]
    texts.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def command(number: object) -> tuple:
        options = [
            "--prompts",
            str(texts),
            "--supervision",
            "names",
            "--model",
            tiny,
            "--out",
            str(tmp_path / f"{number}"),
        ]
        return "generate", [*DRAW, *options], {}

    codes, seconds = forker.run(command("calm"))
    assert codes == [0]
    calm = files_of(tmp_path / "calm")

    def finished(number: int) -> None:
        assert forker.run(command(number))[0] == [0]
        assert files_of(tmp_path / str(number)) == calm
        kept = tmp_path / str(number) / "prompts.jsonl"
        assert kept.read_bytes() == (tmp_path / "calm/prompts.jsonl").read_bytes()

    storm(forker, 7 if TIMES > 1 else 2, seconds, rng, lambda number: [command(number)], finished)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return str(build_tiny_sd(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def undrawn(tmp_path_factory, forker, tiny):
    """(files, seconds) of a drawing that nobody disturbs."""
    out = tmp_path_factory.mktemp("drawn") / "out"
    codes, seconds = forker.run(("generate", [*DRAW, "--model", tiny, "--out", str(out)], {}))
    assert codes == [0]
    return files_of(out), seconds


@pytest.mark.parametrize("ranks", [1, 2])
def test_kills_of_training(tmp_path, forker, ranks):
    """The last weights and the log are those of an undisturbed run of as many processes, bit for bit."""
    images = make_images(tmp_path / "shapes", {"n01": 20, "n02": 14})
    rng = random.Random(ranks)

    def runs(out: Path) -> list[tuple]:
        argv = ["--data", str(images), "--out", str(out), *TINY, "--checkpoint-minutes", "0.00001", "--workers", "1"]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
        shared |= {"MASTER_PORT": port}
        return [
            ("train", argv, {"RANK": str(rank), "LOCAL_RANK": str(rank), **shared} if ranks > 1 else {})
            for rank in range(ranks)
        ]

    calm = tmp_path / "calm"
    codes, seconds = forker.run(*runs(calm))
    assert codes == [0] * ranks

    def finished(number: int) -> None:
        out = tmp_path / str(number)
        assert forker.run(*runs(out))[0] == [0] * ranks
        assert same_bits(weights(out / "shapes.pth"), weights(calm / "shapes.pth"))
        assert log_without_clock(out) == log_without_clock(calm)
        assert not list(out.rglob(".*.tmp"))

    storm(forker, 8, seconds, rng, lambda number: runs(tmp_path / str(number)), finished)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_kills_of_evaluation(tmp_path, forker, processes):
    """Several commands on one checkpoint: in the end the rows of one undisturbed command, each once."""
    make_test_images(tmp_path / "test", CLASSES)
    rng = random.Random(processes)

    def command(number: object) -> tuple:
        run = tmp_path / f"run{number}/toy-seed0"
        if not run.exists():
            make_run(run, CLASSES)
        return "evaluate", ["--checkpoint", str(run), "--test", f"toys={tmp_path / 'test'}", "--device", "cpu"], {}

    def rows(number: object) -> list[dict]:
        found = read_jsonl(tmp_path / f"run{number}/toy-seed0/results.jsonl")
        return [{key: row[key] for key in ("dataset", "metric", "value", "n", "checkpoint_sha256")} for row in found]

    codes, seconds = forker.run(command("calm"))
    assert codes == [0] and len(rows("calm")) == 4

    def finished(number: int) -> None:
        assert forker.run(command(number))[0] == [0]
        unique = {json.dumps(row) for row in rows(number)}
        assert unique == {json.dumps(row) for row in rows("calm")}
        assert not list((tmp_path / f"run{number}").rglob(".*.tmp"))

    storm(forker, 8, seconds, rng, lambda number: [command(number)] * processes, finished)
