"""The launcher on a real SLURM: arrays, dependencies, every way a job can be interrupted, and what people then see.

A stand-in for generate.py (numbered files, one every few hundredths of a second, each recorded when it is drawn) makes
interruptions cheap and countable; test_scripts.py runs the real scripts.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests.launch.slurm.cluster import CORES, GPUS, Cluster

ROOT = Path(__file__).resolve().parents[3]
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(150)]

DRAW = """
import argparse, fcntl, os, sys, time
from pathlib import Path
from utils.cli import Launch

LAUNCH = Launch("draw", "chunks")

def get_args_parser():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--chunk", default="0/1")
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=0.02)
    parser.add_argument("--fail-at", type=int, default=-1)
    return parser

if __name__ == "__main__":
    args = get_args_parser().parse_args()
    chunk, of = map(int, args.chunk.split("/"))
    args.out.mkdir(parents=True, exist_ok=True)
    lock = open(args.out / f".lock-{chunk}-{of}", "w")
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # an orphan of an earlier start would still hold it
    with open(args.out / "starts", "a") as starts:
        starts.write(f"{chunk} {os.environ.get('SLURMD_NODENAME')}\\n")
    for index in range(chunk, args.count, of):
        image = args.out / f"{index:03d}.txt"
        if image.exists():
            continue
        if index == args.fail_at:
            print("the disk of image", index, "is on fire", flush=True)
            sys.exit(7)
        time.sleep(args.seconds)
        with open(args.out / "drawn", "a") as drawn:
            drawn.write(f"{index}\\n")
        temporary = args.out / f".{index}.{os.getpid()}.tmp"
        temporary.write_text(str(index ** 3))
        temporary.replace(image)
"""

RANKS = """
import argparse, json, os
from pathlib import Path
from utils.cli import Launch

LAUNCH = Launch("ranks", "ranks")

def get_args_parser():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    return parser

if __name__ == "__main__":
    args = get_args_parser().parse_args()
    from utils.training import distributed
    distributed.take_own_cores()
    import torch
    with distributed.process_group(torch.device("cpu")) as me:
        total = distributed.sum_counts({"total": me.rank + 1}, torch.device("cpu"))["total"]
    args.out.mkdir(parents=True, exist_ok=True)
    found = {"total": total, "node": os.environ["SLURMD_NODENAME"], **vars(me)}
    found["cores"] = sorted(os.sched_getaffinity(0))
    (args.out / f"{me.rank}.json").write_text(json.dumps(found))
"""

# Says what the process sees: its cores, the step's GPUs, the umask that its files get.
SEES = """
import argparse, json, os
from pathlib import Path
from utils.cli import Launch

LAUNCH = Launch("sees", "single")

def get_args_parser():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    return parser

if __name__ == "__main__":
    args = get_args_parser().parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    names = ("SLURM_GPUS_ON_NODE", "SLURM_CPUS_PER_TASK", "TOKEN")
    found = {name: os.environ.get(name) for name in names} | {"cores": sorted(os.sched_getaffinity(0))}
    (args.out / "seen.json").write_text(json.dumps(found))
"""


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "draw.py").write_text(textwrap.dedent(DRAW))
    (tmp_path / "ranks.py").write_text(textwrap.dedent(RANKS))
    (tmp_path / "sees.py").write_text(textwrap.dedent(SEES))
    return tmp_path


def launch(cluster: Cluster, here: Path, *arguments: str, env: dict | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "utils.launch", "--launcher", "slurm", *arguments],
        cwd=here,
        env={**cluster.env, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(env or {})},
        capture_output=True,
        text=True,
        timeout=140,
    )


CPU = ("--gpus-per-node", "0", "--timeout-min", "20", "--log-dir", "logs")


def complete(out: Path, count: int) -> bool:
    return [path.name for path in sorted(out.glob("[0-9]*.txt"))] == [f"{index:03d}.txt" for index in range(count)]


def drawn(out: Path) -> list[int]:
    return sorted(map(int, (out / "drawn").read_text().split()))


def wait_for(condition, seconds: float = 60, meanwhile=lambda: None) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        meanwhile()
        time.sleep(0.1)


def submit(cluster: Cluster, here: Path, *arguments: str) -> str:
    result = launch(cluster, here, *CPU, *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout.split("job ")[1].split()[0].strip(",")


def finish(cluster: Cluster, here: Path) -> None:
    wait_for(lambda: not cluster.jobs(), 90, cluster.start_requeued_now)
    result = launch(cluster, here, "--watch", "logs")
    assert result.returncode == 0, result.stdout + result.stderr


def test_an_array_draws_every_chunk_once_and_no_more_at_once_than_allowed(cluster, here):
    job = submit(cluster, here, "--partition", "low", "--chunks", "6", "--array-parallelism", "2", "draw.py",
                 *("--out", "out", "--seconds", "0.1"))  # fmt: skip
    most = 0

    def count_running():
        nonlocal most
        most = max(most, list(cluster.jobs().values()).count("RUNNING"))

    wait_for(lambda: not cluster.jobs(), 60, count_running)
    assert 1 <= most <= 2
    assert complete(here / "out", 24) and drawn(here / "out") == list(range(24))
    watched = launch(cluster, here, "--watch", "logs")
    assert watched.returncode == 0 and "all 6 jobs done" in watched.stdout
    assert "ArrayTaskThrottle=2" in cluster.scontrol("show", "job", job)


def test_processes_of_a_node_share_an_array_element(cluster, here):
    submit(cluster, here, "--chunks", "5", "--processes", "2", "--cpus-per-task", "1", "draw.py", "--out", "out")
    finish(cluster, here)
    assert complete(here / "out", 24) and drawn(here / "out") == list(range(24))
    assert len(list((here / "logs").glob("*_log.out"))) == 3


PACE = ("--seconds", "0.08")


def preempt(cluster, job):
    options = ("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null")
    cluster.run("sbatch", *options, "--wrap", "sleep 1")


INTERRUPTIONS = {
    "time-out": lambda cluster, job: cluster.run("scancel", "--signal=USR2", job),  # as SLURM sends it before the limit
    "requeue": lambda cluster, job: cluster.scontrol("requeue", job),
    "preemption": preempt,
    "preemption with grace": preempt,
    "node": lambda cluster, job: cluster.kill_node(cluster.run("squeue", "-hj", job, "-o", "%N").strip()),
}


@pytest.mark.parametrize("how", INTERRUPTIONS)
def test_an_interrupted_job_comes_back_by_itself_and_draws_nothing_twice_but_the_open_image(cluster, here, how):
    partition = "grace" if how == "preemption with grace" else "low"
    job = submit(cluster, here, "--partition", partition, "draw.py", *("--out", "out", "--count", "40"), *PACE)
    out = here / "out"
    wait_for(lambda: len(list(out.glob("[0-9]*.txt"))) >= 8)
    INTERRUPTIONS[how](cluster, job)
    finish(cluster, here)
    assert complete(out, 40)
    twice = [index for index in set(drawn(out)) if drawn(out).count(index) > 1]
    assert len(twice) <= 1, twice
    assert len((out / "starts").read_text().splitlines()) == 2
    assert {path.read_text() for path in out.glob("010.txt")} == {"1000"}


def test_a_cancelled_job_stays_cancelled_and_the_same_command_finishes_the_work(cluster, here):
    arguments = ("draw.py", "--out", "out", "--count", "30", "--seconds", "0.08")
    job = submit(cluster, here, *arguments)
    wait_for(lambda: len(list((here / "out").glob("[0-9]*.txt"))) >= 5)
    cluster.run("scancel", job)
    wait_for(lambda: not cluster.jobs())
    watched = launch(cluster, here, "--watch", "logs")
    assert watched.returncode == 1 and "did not finish (CANCELLED" in watched.stderr
    again = launch(cluster, here, *CPU[:-1], "logs2", "--wait", *arguments)
    assert again.returncode == 0, again.stderr
    assert complete(here / "out", 30) and len(drawn(here / "out")) <= 31


def test_ranks_on_two_nodes_meet_by_torchruns_variables(cluster, here):
    result = launch(cluster, here, *CPU, "--wait", "--nodes", "2", "--processes", "2", "ranks.py", "--out", "out")
    assert result.returncode == 0, result.stdout + result.stderr
    found = [json.loads((here / "out" / f"{rank}.json").read_text()) for rank in range(4)]
    assert [entry["total"] for entry in found] == [10.0] * 4
    assert [entry["local_rank"] for entry in found] == [0, 1, 0, 1]
    assert found[0]["node"] == found[1]["node"] != found[2]["node"] == found[3]["node"]
    for first, second in (
        found[:2],
        found[2:],
    ):  # both "nodes" are this machine, so ranks of two nodes share cores here
        assert len(first["cores"]) == len(second["cores"]) == 1 and first["cores"] != second["cores"]


def test_a_failure_is_shown_with_its_log_and_the_command_to_repeat_it_and_stops_the_chain(cluster, here):
    result = launch(
        *(cluster, here, *CPU, "--wait", "--chunks", "3", "draw.py", "--out", "out", "--fail-at", "4"),
        *("--then", "--chunks", "1", "draw.py", "--out", "second"),
    )
    assert result.returncode == 7
    assert "draw chunk 1 of 3" in result.stderr and "failed with exit code 7" in result.stderr
    assert "the disk of image 4 is on fire" in result.stderr
    assert "run it again alone: python draw.py --out out --fail-at 4 --chunk 1/3" in result.stderr
    assert "DependencyNeverSatisfied" in result.stderr or "did not finish" in result.stderr
    assert not (here / "second").exists()


def test_a_chain_runs_in_order_and_waiting_elsewhere_gives_the_same_answer(cluster, here):
    result = launch(
        *(cluster, here, *CPU, "--wait", "--chunks", "2", "draw.py", "--out", "a", "--count", "6"),
        *("--then", "--chunks", "1", "draw.py", "--out", "b", "--count", "3"),
    )
    assert result.returncode == 0, result.stderr
    assert complete(here / "a", 6) and complete(here / "b", 3)
    newest_of_first = max(path.stat().st_mtime for path in (here / "a").glob("*.txt"))
    assert newest_of_first <= (here / "b" / "000.txt").stat().st_mtime
    for word in ("squeue --jobs", "tail -F", "--watch", "scancel", ", after "):
        assert word in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--partition", "gpu"), "--partition gpu: unknown; this cluster has grace, high, low"),
        (("--timeout-min", "90"), "--timeout-min 90: partition low allows 60 at most"),
        (("--sbatch", "nodelist=n9"), "sbatch refuses these options: allocation failure: Invalid node name"),
        (("--after", "99999"), "--after 99999: SLURM knows no such job, and forgets those that ended minutes ago"),
        (("--timeout-min", "1"), "--signal-delay-s 90: a job lasts 1 min"),
        (("--account", "a\ntouch stolen"), "--account 'a\\ntouch stolen': holds a line break"),
        (("--sbatch", "comment=a\ntouch stolen"), "--sbatch 'comment=a\\ntouch stolen': holds a line break"),
        (("--setup", "true\rtouch stolen"), "--setup 'true\\rtouch stolen': holds a line break"),
        (("--apptainer", "no.sif"), "--apptainer no.sif: no such file"),
        (("--container-image", "/images/no.sqsh"), "--container-image /images/no.sqsh: no such file"),
    ],
)
def test_what_the_cluster_cannot_do_is_refused_before_anything_is_queued(cluster, here, arguments, message):
    before = cluster.run("squeue", "--noheader")
    result = launch(cluster, here, *CPU, *arguments, "draw.py", "--out", "out")
    assert result.returncode == 2 and message in result.stderr, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert cluster.run("squeue", "--noheader") == before and not (here / "logs").exists()


def test_any_process_of_a_job_killed_at_any_instant_costs_no_image(cluster, here):
    """srun, the Task or the script: the job ends or comes back, and the same command finishes the work."""
    chance = random.Random(0)
    arguments = ("--chunks", "2", "--processes", "2", "draw.py", "--out", "out", "--count", "120", "--seconds", "0.05")
    for kill in range(4):
        submit(cluster, here, "--log-dir", f"logs{kill}", *arguments)
        wait_for(lambda: "RUNNING" in cluster.jobs().values())
        time.sleep(chance.uniform(0, 3))
        if processes := cluster._pids_here("SUBMITIT_EXECUTOR=slurm"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(chance.choice(processes), signal.SIGKILL)
        wait_for(lambda: not cluster.jobs(), 90, cluster.start_requeued_now)
        watched = launch(cluster, here, "--watch", f"logs{kill}")
        assert "error: unexpected" not in watched.stderr and watched.returncode in range(256)
    again = launch(cluster, here, *CPU[:-1], "last", "--wait", *arguments)
    assert again.returncode == 0, again.stdout + again.stderr
    assert complete(here / "out", 120)
    assert len(drawn(here / "out")) <= 120 + 4 * 2  # of each killed process the image that it was at


# ===== what a job gets =====


def seen(here: Path) -> dict:
    return json.loads((here / "out/seen.json").read_text())


@pytest.mark.parametrize(("options", "cores"), [(("--cpus-per-task", "2"), 2), ((), 1)])
def test_a_step_has_the_cores_that_were_asked_for(cluster, here, options, cores):
    """On a real SLURM with task/affinity, whose srun binds to one core unless it is told the number itself."""
    result = launch(cluster, here, *CPU, *options, "--wait", "sees.py", "--out", "out")
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(seen(here)["cores"]) == cores and seen(here)["SLURM_CPUS_PER_TASK"] == str(cores)


def test_a_gpu_comes_with_its_share_of_the_node_and_the_partitions_time(cluster, here):
    result = launch(cluster, here, "--log-dir", "logs", "--wait", "sees.py", "--out", "out")
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(seen(here)["cores"]) == CORES // GPUS and seen(here)["SLURM_GPUS_ON_NODE"] == "1"
    (script,) = (here / "logs").glob("*_submission.sh")
    lines = script.read_text().splitlines()
    for line in (f"--cpus-per-task={CORES // GPUS}", "--mem=3072M", "--time=60", "--gpus-per-node=1"):
        assert f"#SBATCH {line}" in lines  # half of 8000 MB, in whole GB
    assert f"--time=60 --gpus-per-node=1 --cpus-per-task={CORES // GPUS} --mem=3072M)" in result.stdout


def test_two_gpus_come_with_the_whole_node_and_a_site_file_says_otherwise(cluster, here):
    (here / "site.toml").write_text("mem_gb = 1\ncpus_per_task = 1\ntimeout_min = 9\n")
    plan = ("--log-dir", "logs", "--gpus-per-node", "2", "--dry-run")
    whole = launch(cluster, here, *plan, "ranks.py", "--out", "out").stdout
    assert f"--time=60 --gpus-per-node=2 --cpus-per-task={CORES // 2 * 2} --mem=7168M" in whole
    own = launch(cluster, here, *plan, "--site", "site.toml", "ranks.py", "--out", "out").stdout
    assert "--time=9 --gpus-per-node=2 --cpus-per-task=2 --mem=1024M" in own


def test_more_chunks_than_an_array_may_have_elements_share_them(cluster, here):
    assert "MaxArraySize            = 1001" in cluster.scontrol("show", "config")
    plan = launch(cluster, here, *CPU, "--dry-run", "--chunks", "1500", "draw.py", "--out", "out")
    assert plan.returncode == 0, plan.stderr
    assert "draw: 750 jobs" in plan.stdout and "--chunk 1/1500\n" in plan.stdout
    submit(cluster, here, "--chunks", "1002", "--array-parallelism", "1", "--sbatch", "begin=now+1hour", "draw.py",
           *("--out", "out"))  # fmt: skip
    record = json.loads((here / "logs/launch.json").read_text())
    commands = [command for element in record["stages"][0]["elements"] for command in element["commands"]]
    assert len(record["stages"][0]["elements"]) == 501
    assert commands == [f"python draw.py --out out --chunk {chunk}/1002" for chunk in range(1002)]
    assert len(cluster.jobs()) == 501


def test_a_token_in_a_setup_line_lies_in_a_file_that_the_user_alone_can_read(cluster, here):
    setup = ("--setup", "export TOKEN=hunter2", "--setup", "export TOKEN=$TOKEN'; echo $(true)'")
    result = launch(cluster, here, *CPU, *setup, "--wait", "sees.py", "--out", "out")
    assert result.returncode == 0, result.stdout + result.stderr
    assert seen(here)["TOKEN"] == "hunter2; echo $(true)"
    holding = [path for path in here.rglob("*") if path.is_file() and b"hunter2" in path.read_bytes()]
    assert [path.stat().st_mode & 0o777 for path in holding if path.parent.name == "logs"] == [0o600]
    assert "hunter2" not in result.stdout + result.stderr


# ===== a full disk below the logs =====


@pytest.fixture
def small_disk(here):
    """A disk of 64 kB at logs/, and a function that fills what is left of it."""
    (here / "logs").mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", here / "logs"], capture_output=True, text=True
    )
    if mount.returncode:
        pytest.skip(f"mounting a small tmpfs is not permitted here: {mount.stderr.strip()}")

    def fill() -> None:
        with contextlib.suppress(OSError), open(here / "logs/filler", "ab", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))

    yield fill
    subprocess.run(["umount", "--lazy", here / "logs"], check=True)


def test_a_full_disk_for_the_logs_queues_nothing(cluster, here, small_disk):
    small_disk()
    result = launch(cluster, here, *CPU, "--chunks", "3", "draw.py", "--out", "out", "--then", "draw.py", "--out", "b")
    assert result.returncode == 2 and "disk is full" in result.stderr, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1 and "logs" in result.stderr
    wait_for(lambda: not cluster.jobs())
    assert not (here / "out").exists() and not (here / "b").exists()


def test_work_is_done_though_the_logs_disk_fills_meanwhile(cluster, here, small_disk):
    submit(cluster, here, "draw.py", "--out", "out", *PACE)
    wait_for(lambda: len(list((here / "out").glob("[0-9]*.txt"))) >= 2)
    small_disk()
    finish(cluster, here)
    assert complete(here / "out", 24) and not list((here / "logs").glob("*.exit.json"))


def test_the_clusters_own_processes_end_with_it():
    if not os.environ.get("REQUIRE_SLURM"):
        pytest.importorskip("tests.launch.slurm.cluster")
    from tests.launch.slurm.cluster import missing_programs

    if missing_programs():
        pytest.skip("no SLURM here")
    own = Cluster()
    own.start()
    own.run("sbatch", "--output=/dev/null", "--wrap", "sleep 60")
    wait_for(lambda: "RUNNING" in own.jobs().values())
    own.stop()
    assert own._pids_here() == [] and not own.folder.exists()


def test_make_pipeline_chains_generation_training_and_evaluation(cluster, tmp_path):
    """One command queues all four steps; training runs on two nodes; the images are those of a plain run."""
    for entry in ROOT.iterdir():
        if entry.name not in ("data", "runs", ".git"):
            (tmp_path / entry.name).symlink_to(entry)
    drawing = ("CLASSES=fashion", "MODEL=models/fashion-sd", "IMAGES_PER_CLASS=8", "DEVICE=cpu", "ARGS=--steps 4")

    def make(*arguments: str) -> subprocess.CompletedProcess[str]:
        env = {**cluster.env, "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            ["make", *arguments, *drawing, f"VENV={Path(sys.prefix)}"],
            cwd=tmp_path, env=env, capture_output=True, text=True, timeout=280,
        )  # fmt: skip

    done = make(
        "pipeline", "LAUNCHER=slurm", "PARTITION=low", "CHUNKS=2", "NODES=2", "GPUS=0", "WAIT=1", "DATASET=tiny",
        "TIMEOUT_MIN=20", "TRAIN_ARGS=--recipe demo --epochs 1",
        "EVALUATE_ARGS=--test tiny=data/tiny/train --no-leak-check",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    results = [json.loads(line) for line in (tmp_path / "runs/tiny/results.jsonl").read_text().splitlines()]
    assert {(row["dataset"], row["n"]) for row in results} == {("tiny", 80)}
    assert any("cpu x 2" in log.read_text() for log in (tmp_path / "runs/launch").rglob("*_log.out"))  # two ranks

    plain = make("generate", "OUT=data/plain")
    assert plain.returncode == 0, plain.stderr
    files = {path.relative_to(tmp_path / "data/plain"): path for path in (tmp_path / "data/plain/train").rglob("*.jpg")}
    assert len(files) == 80
    for place, path in files.items():
        assert (tmp_path / "data/tiny" / place).read_bytes() == path.read_bytes()
