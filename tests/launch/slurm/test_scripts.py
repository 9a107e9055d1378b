"""The real scripts on a real SLURM, interrupted: the images and the weights of a run that was left in peace."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import pytest

from tests.generation.test_generate import files_of
from tests.launch.slurm.cluster import Cluster
from tests.launch.slurm.test_slurm import finish, launch, submit, wait_for
from tests.tiny_sd import build_tiny_sd
from tests.training_runs import TINY, log_without_clock, make_images, same_bits, weights

ROOT = Path(__file__).resolve().parents[3]
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(280)]


def preempt(cluster: Cluster) -> None:
    """A job of the higher partition takes both nodes for a second; SLURM requeues what ran there."""
    options = ("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null")
    cluster.run("sbatch", *options, "--wrap", "sleep 1")


def inline(here: Path, *command: str) -> None:
    done = subprocess.run([sys.executable, *command], cwd=here, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr


INTERRUPTIONS = {
    "time-out": lambda cluster, job: cluster.run("scancel", "--signal=USR2", f"{job}_0"),
    "preemption": lambda cluster, job: preempt(cluster),
    "node": lambda cluster, job: cluster.kill_node(cluster.run("squeue", "-hj", f"{job}_0", "-o", "%N").strip()),
}


@pytest.fixture(scope="module")
def drawing(tmp_path_factory) -> tuple[str, ...]:
    """generate.py and its options: seconds of drawing in each of two chunks; --out comes last."""
    model = build_tiny_sd(tmp_path_factory.mktemp("models") / "tiny")
    options = ("--classes", "fashion", "--images-per-class", "48", "--steps", "12", "--batch-size", "4")
    return (str(ROOT / "generate.py"), "--model", str(model), *options, "--device", "cpu", "--out")


@pytest.fixture(scope="module")
def undisturbed(drawing, tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    inline(out.parent, *drawing, str(out))
    files = files_of(out)
    assert sum(name.endswith(".jpg") for name in map(str, files)) == 480
    return files


@pytest.mark.parametrize("how", INTERRUPTIONS)
def test_an_interrupted_array_of_generate_ends_with_the_bytes_of_an_inline_run(
    cluster, tmp_path, drawing, undisturbed, how
):
    job = submit(cluster, tmp_path, "--partition", "low", "--chunks", "2", *drawing, "out")
    out = tmp_path / "out"
    images = lambda: len(list(out.glob("train/*/*.jpg")))  # noqa: E731
    wait_for(lambda: images() >= 24)
    INTERRUPTIONS[how](cluster, job)
    assert images() < 480, "it was done before it was interrupted"
    finish(cluster, tmp_path)
    assert files_of(out) == undisturbed
    starts = Counter(
        path.read_text(errors="replace").count("Loading pickle") for path in (tmp_path / "logs").glob("*.out")
    )
    assert max(starts) >= 2, "nothing was started again"


def test_a_preempted_training_on_two_nodes_ends_with_the_weights_of_one_left_in_peace(cluster, tmp_path):
    images = make_images(tmp_path / "shapes", {"n01": 20, "n02": 14})
    options = [str(ROOT / "train.py"), *TINY, "--epochs", "40", "--data", str(images), "--out"]
    inline(ROOT, "-m", "utils.launch", "--launcher", "local", "--processes", "2", *options, str(tmp_path / "peace"))

    submit(cluster, tmp_path, "--partition", "low", "--nodes", "2", *options, "disturbed")
    log = tmp_path / "disturbed/log.jsonl"
    wait_for(lambda: log.exists() and len(log.read_text().splitlines()) > 15)
    preempt(cluster)
    wait_for(lambda: "PENDING" in cluster.jobs().values(), 20)
    assert not (tmp_path / "disturbed/shapes.pth").exists(), "it was done before it was interrupted"
    finish(cluster, tmp_path)

    assert same_bits(weights(tmp_path / "disturbed/shapes.pth"), weights(tmp_path / "peace/shapes.pth"))
    assert log_without_clock(tmp_path / "disturbed") == log_without_clock(tmp_path / "peace")
    logs = [path.read_text() for path in (tmp_path / "logs").glob("*_log.out")]
    assert any("cpu x 2" in text for text in logs)  # one rank on each of the two nodes


# train.py on a cluster where each node has its own copy of the images.
WITH_OWN_COPIES = """
import os, sys
from train import LAUNCH, get_args_parser, main
from utils.cli import run
if __name__ == "__main__":
    arguments = [argument.replace("NODE", os.environ["SLURMD_NODENAME"]) for argument in sys.argv[1:]]
    sys.exit(run(main, get_args_parser(), arguments))
"""


def test_one_rank_of_two_that_fails_ends_the_job_soon_and_the_log_names_it(cluster, tmp_path):
    make_images(tmp_path / "n1/shapes", {"n01": 20, "n02": 14})
    shutil.copytree(tmp_path / "n1", tmp_path / "n2")
    for path in sorted((tmp_path / "n2").rglob("*.jpg"))[::2]:
        path.write_bytes(b"no image")
    (tmp_path / "train_here.py").write_text(WITH_OWN_COPIES)
    options = (*TINY, "--epochs", "1000", "--max-bad-images", "0", "--data", "NODE/shapes", "--out", "run")
    submit(cluster, tmp_path, "--partition", "low", "--nodes", "2", "train_here.py", *options)

    def said() -> str:
        return "".join(path.read_text(errors="replace") for path in (tmp_path / "logs").glob("*_log.out"))

    cause = "train_here.py: error: --max-bad-images 0: "
    wait_for(lambda: cause in said(), 120)
    wait_for(lambda: not cluster.jobs(), 30)  # gloo and NCCL alone would wait for minutes
    ended = launch(cluster, tmp_path, "--watch", "logs")
    assert ended.returncode == 2 and ") failed with exit code 2" in ended.stderr
    assert "--max-bad-images 0: " in ended.stderr  # of the log of node 1, or of 0 if its rank was told in time
    assert said().count(cause) == 1 and "n2/shapes/" in said().split(cause)[1].splitlines()[0]
    assert "Traceback" not in said() and "CANCELLED" not in ended.stdout


def test_four_ranks_of_a_job_have_cores_of_their_own_and_do_not_wait_for_data(cluster, tmp_path):
    """Two nodes of two ranks; both nodes are this machine, so its cores serve two ranks each where it has but two."""
    images = make_images(tmp_path / "shapes", {"n01": 40, "n02": 40})
    options = ["--data", str(images), *TINY, "--arch", "resnet18", "--batch-size", "16", "--epochs", "2"]
    options += ["--set", "global_size=96", "--set", "local_size=48"]
    where = ("--partition", "low", "--nodes", "2", "--processes", "2", "--cpus-per-task", "1")
    bound = """
        import json, os, sys, pathlib
        sys.path.insert(0, {root!r})
        from train import LAUNCH, get_args_parser, main  # noqa: F401
        from utils.cli import run
        if __name__ == "__main__":
            code = run(main, get_args_parser())
            pathlib.Path(os.environ["RANK"]).write_text(json.dumps(sorted(os.sched_getaffinity(0))))
            sys.exit(code)
    """
    (tmp_path / "own.py").write_text(textwrap.dedent(bound.format(root=str(ROOT))))
    submit(cluster, tmp_path, *where, "own.py", *options, "--out", "run")
    wait_for(lambda: not cluster.jobs(), 240)
    cores = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(4)]
    assert all(len(own) == 1 for own in cores) and cores[0] != cores[1] and cores[2] != cores[3]
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    waits = [line["data_wait"] for line in lines if line["kind"] == "train"]
    assert len(waits) == 10 and statistics.median(waits) < 0.1, waits
