"""The launcher's refusals without a cluster: stand-ins for SLURM's programs on PATH; tests/slurm has the real ones."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from utils import launch, slurm, slurm_checks
from utils.cli import UserError, run
from utils.site import site_options

ROOT = Path(__file__).resolve().parent.parent
DIGITS = ("generate.py", "--classes", "digits", "--model", str(ROOT / "models/digits-sd"), "--out")


def call(*arguments: object) -> int:
    argv = list(map(str, arguments))
    return run(lambda args: launch.main(args, argv), launch.get_args_parser(), argv)


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A function that puts a stand-in NAME on PATH, which holds nothing else, that prints TEXT."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.chdir(ROOT)

    def add(name: str, text: str = "", code: int = 0) -> None:
        quoted = text.replace("'", "'\\''")
        (folder / name).write_text(f"#!/bin/sh\n[ {code} = 0 ] || exec >&2\nprintf '%s\\n' '{quoted}'\nexit {code}\n")
        (folder / name).chmod(0o755)

    return add


@pytest.fixture
def cluster(programs, monkeypatch):
    """Two nodes, neither of them this machine; one partition of an hour."""
    nodes = "NodeName=n{0} NodeAddr=n{0} NodeHostName=n{0} Partitions=gpu State=IDLE"
    programs("sinfo", "gpu gpu* 1:00:00")
    programs("scontrol", "\n".join(nodes.format(number) for number in (1, 2)))
    for name in ("sbatch", "srun", "squeue"):
        programs(name)
    monkeypatch.setattr(slurm_checks, "LOCAL_FOLDERS", ("/dev/shm",))  # pytest's own folders lie in /tmp


def refusal(capsys, *arguments: object) -> str:
    assert call("--launcher", "slurm", *arguments) == 2
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1
    return said


def test_without_sbatch_the_remedy_is_named_and_nothing_is_written(programs, tmp_path, capsys):
    said = refusal(capsys, "--log-dir", tmp_path / "logs", *DIGITS, tmp_path / "out")
    assert "no `sbatch` on PATH; run on a login node, or use --launcher local" in said
    assert not (tmp_path / "logs").exists() and not (tmp_path / "out").exists()


def test_a_cluster_that_does_not_answer_is_named(cluster, programs, tmp_path, capsys):
    programs("sinfo", "slurm_load_partitions: Unable to contact slurm controller", code=1)
    said = refusal(capsys, *DIGITS, tmp_path / "out")
    assert "Unable to contact slurm controller; is the cluster up, seen from here?" in said


@pytest.mark.parametrize("option", ["--log-dir", "--out"])
def test_a_folder_that_each_node_has_for_itself_is_refused(cluster, tmp_path, capsys, option):
    folders = {"--log-dir": tmp_path / "logs", "--out": tmp_path / "out"} | {option: Path("/dev/shm/x")}
    said = refusal(capsys, "--partition", "gpu", "--timeout-min", "60", "--log-dir", folders["--log-dir"],
                   *DIGITS, folders["--out"])  # fmt: skip
    assert f"{option} /dev/shm/x: each node has its own /dev; choose a folder that all share" in said
    assert not Path("/dev/shm/x").exists()


def test_a_master_address_that_does_not_resolve_is_named_before_anything_is_queued(
    cluster, tmp_path, capsys, monkeypatch
):
    def unknown(name, port):
        raise socket.gaierror(name)

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    said = refusal(capsys, "--nodes", "2", "--timeout-min", "60", "--log-dir", tmp_path / "logs",
                   "train.py", "--data", ROOT / "models", "--out", tmp_path / "run")  # fmt: skip
    assert "--nodes 2: node n1 (address n1) does not resolve here" in said and "--exclude n1" in said


def test_an_unknown_partition_lists_those_there_are(cluster, programs, tmp_path, capsys):
    programs("sinfo", "gpu\nlong")
    assert "--partition gpuu: unknown; this cluster has gpu, long" in refusal(
        capsys, "--partition", "gpuu", *DIGITS, tmp_path / "out"
    )


@pytest.mark.parametrize(
    ("limit", "minutes"),
    [("30:30", 30.5), ("1:00:00", 60), ("2-00:00:00", 2880), ("1-12:30:00", 2190), ("infinite", None)],
)
def test_slurms_time_limits_are_read(limit, minutes):
    assert slurm_checks.minutes(limit) == (float("inf") if minutes is None else minutes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partiton = 'gpu'", "partiton is not an option; the known ones are"),
        ("[train]\nnode = 2", "[train] node is not an option"),
        ("[deploy]\nnodes = 2", "[deploy] is no table of it; use [generate], [train], [evaluate]"),
        ("train = 3", "train is a script's name; write it as a table"),
        ("partition = ", "not valid TOML"),
        ("setup = 'module load cuda'", "setup takes a list"),
        ("partition = ['a', 'b']", "partition takes one value, not a list"),
        ("watch = 'runs'", "watch is not an option"),
    ],
)
def test_a_wrong_site_file_names_its_fault(tmp_path, text, message):
    site = tmp_path / "site.toml"
    site.write_text(text)
    with pytest.raises(UserError) as refused:
        site_options(site, "train", launch.get_args_parser())
    assert message in str(refused.value) and str(site) in str(refused.value)


def test_a_site_file_serves_each_script_its_own_and_the_command_line_wins(tmp_path):
    site = tmp_path / "site.toml"
    site.write_text("partition = 'gpu'\nsetup = ['a', 'b']\n[train]\nnodes = 2\n[generate]\nchunks = 9\n")
    parser = launch.get_args_parser()
    assert site_options(site, "train", parser) == ["--partition=gpu", "--setup=a", "--setup=b", "--nodes=2"]
    assert site_options(site, "generate", parser)[-1] == "--chunks=9"
    with pytest.raises(UserError, match="no such file"):
        site_options(tmp_path / "none.toml", "train", parser)


@pytest.mark.parametrize(
    ("said", "in_grace"),
    [
        ("JobId=7 JobState=RUNNING Reason=None PreemptTime=2026-01-01T00:00:00", True),
        ("JobId=7 JobState=RUNNING Reason=None PreemptTime=None", False),  # a SIGTERM by hand
        ("JobId=7 JobState=CANCELLED Reason=None PreemptTime=None", False),
        ("JobId=7 JobState=COMPLETING Reason=None PreemptTime=2026-01-01T00:00:00", False),  # ended without a GraceTime
        (None, True),  # a container without SLURM's programs
    ],
)
def test_a_stopped_job_stays_only_during_a_preemptions_grace(programs, monkeypatch, said, in_grace):
    assert not slurm.in_preemption_grace()  # no job at all
    for name, value in {"SLURM_JOB_ID": "7", "SUBMITIT_EXECUTOR": "slurm"}.items():
        monkeypatch.setenv(name, value)
    if said:
        programs("scontrol", said)
    assert slurm.in_preemption_grace() is in_grace
