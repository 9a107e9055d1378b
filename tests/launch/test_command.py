"""The launcher's refusals without a cluster: stand-ins for SLURM's programs; tests/launch/slurm has the real ones."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from utils.cli import UserError, run
from utils.launch import checks, command, processes, slurm
from utils.launch.command import site_options

ROOT = Path(__file__).resolve().parents[2]
DRAWING = ("generate.py", "--classes", "fashion", "--model", str(ROOT / "models/fashion-sd"), "--out")


def call(*arguments: object) -> int:
    argv = list(map(str, arguments))
    return run(lambda args: command.main(args, argv), command.get_args_parser(), argv)


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
    monkeypatch.setattr(checks, "LOCAL_FOLDERS", ("/dev/shm",))  # pytest's own folders lie in /tmp


def refusal(capsys, *arguments: object) -> str:
    assert call("--launcher", "slurm", *arguments) == 2
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1
    return said


def test_without_sbatch_the_remedy_is_named_and_nothing_is_written(programs, tmp_path, capsys):
    said = refusal(capsys, "--log-dir", tmp_path / "logs", *DRAWING, tmp_path / "out")
    assert "no `sbatch` on PATH; run on a login node, or use --launcher local" in said
    assert not (tmp_path / "logs").exists() and not (tmp_path / "out").exists()


def test_a_cluster_that_does_not_answer_is_named(cluster, programs, tmp_path, capsys):
    programs("sinfo", "slurm_load_partitions: Unable to contact slurm controller", code=1)
    said = refusal(capsys, *DRAWING, tmp_path / "out")
    assert "Unable to contact slurm controller; is the cluster up, seen from here?" in said


@pytest.mark.parametrize("option", ["--log-dir", "--out"])
def test_a_folder_that_each_node_has_for_itself_is_refused(cluster, tmp_path, capsys, option):
    folders = {"--log-dir": tmp_path / "logs", "--out": tmp_path / "out"} | {option: Path("/dev/shm/x")}
    said = refusal(capsys, "--partition", "gpu", "--timeout-min", "60", "--log-dir", folders["--log-dir"],
                   *DRAWING, folders["--out"])  # fmt: skip
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
    programs("sinfo", "gpu gpu* 1:00:00\nlong long 7-00:00:00")
    assert "--partition gpuu: unknown; this cluster has gpu, long" in refusal(
        capsys, "--partition", "gpuu", *DRAWING, tmp_path / "out"
    )


@pytest.mark.parametrize(
    ("limit", "minutes"),
    [("30:30", 30.5), ("1:00:00", 60), ("2-00:00:00", 2880), ("1-12:30:00", 2190), ("infinite", None)],
)
def test_slurms_time_limits_are_read(limit, minutes):
    assert checks.minutes(limit) == (float("inf") if minutes is None else minutes)


# ===== what a job gets where nothing is asked for =====

NODE = "NodeName=d1 CPUTot=256 CPUEfctv=252 RealMemory=2064000 MemSpecLimit=16000 "
DGX = NODE + "Gres=gpu:a100:8(S:0-1),shard:16 Partitions=big"
SMALL = "NodeName=s1 CPUTot=48 RealMemory=191000 Gres=gpu:v100:2,gpu:a40:2 Partitions=small"
CPUS = "NodeName=c1 CPUTot=64 RealMemory=500000 Gres=(null) Partitions=big,small"


def filled_in(nodes: list[str], limits: dict[str, float], *options: str) -> argparse.Namespace:
    stage = stage_of("slurm", *options, "train.py", "--data", "models")
    checks.fill_in(stage.args, limits, [checks.fields(line) for line in nodes])
    return stage.args


@pytest.mark.parametrize(
    ("nodes", "gpus", "options", "cores", "memory"),
    [
        ([DGX, CPUS], 1, [], 252 // 8, (2064000 - 16000) // 8 // 1024),
        ([DGX, CPUS], 8, [], 252 // 8, (2064000 - 16000) // 1024),
        ([DGX, SMALL], 4, [], 48 // 4, 191000 // 1024),  # whole small node: less than half of the large one
        ([DGX, SMALL], 8, [], 252 // 8, (2064000 - 16000) // 1024),  # the small node has not as many
        ([SMALL], 2, ["--processes", "4"], 24 // 4, 191000 // 2 // 1024),
        ([SMALL], 2, ["--cpus-per-task", "3", "--mem-gb", "5"], 3, 5),
        ([SMALL], 2, ["--sbatch", "mem_per_gpu=9G"], 12, None),
        ([SMALL.replace("191000", "1")], 2, [], 12, None),  # RealMemory was never configured
        ([CPUS], 0, ["--processes", "4"], 1, None),
    ],
)
def test_a_gpus_share_of_the_smallest_node(monkeypatch, nodes, gpus, options, cores, memory):
    monkeypatch.chdir(ROOT)
    args = filled_in(nodes, {"big": 60.0}, "--gpus-per-node", str(gpus), *options)
    assert (args.cpus_per_task, args.mem_gb) == (cores, memory)


@pytest.mark.parametrize(
    ("limits", "options", "expected"),
    [
        ({"a": 60.0, "b": 30.5}, [], 30),  # of several partitions the shortest: SLURM may choose any
        ({"a": float("inf")}, [], 240),
        ({}, [], 240),
        ({"a": 2880.0}, ["--timeout-min", "5"], 5),
    ],
)
def test_the_partitions_limit_is_the_time_limit_unless_one_is_given(monkeypatch, limits, options, expected):
    monkeypatch.chdir(ROOT)
    assert filled_in([CPUS], limits, *options).timeout_min == expected


@pytest.mark.parametrize(
    ("chunks", "processes", "array_size", "elements", "longest"),
    [(1500, 1, 1001, 750, 2), (1500, 4, 1001, 375, 4), (1001, 1, 1001, 1001, 1), (7, 2, 2, 2, 4), (7, 2, 3, 2, 4)],
)
def test_chunks_fit_into_the_largest_array_each_once(monkeypatch, chunks, processes, array_size, elements, longest):
    monkeypatch.chdir(ROOT)
    stage = stage_of("slurm", "--chunks", str(chunks), "--processes", str(processes), *DRAWING, "out")
    tasks = slurm.tasks_of(stage, array_size)
    assert len(tasks) == elements <= array_size and max(len(task.chunks) for task in tasks) == longest
    assert [chunk for task in tasks for chunk in task.chunks] == list(range(chunks))
    assert {task.processes for task in tasks} == {processes}


def test_a_limit_of_submitted_jobs_is_named_with_its_remedy(cluster, programs, tmp_path, capsys):
    programs("sbatch", "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)", code=1)
    said = refusal(capsys, "--partition", "gpu", "--log-dir", tmp_path / "logs", *DRAWING, tmp_path / "out")
    assert "time limits); give fewer --chunks, or more --processes a node" in said and not (tmp_path / "logs").exists()


@pytest.mark.parametrize("folder", ["logs%j", "back\\slash"])
def test_a_log_folder_that_slurm_would_read_as_a_pattern_is_refused(cluster, tmp_path, capsys, folder):
    assert "--log-dir" in refusal(capsys, "--log-dir", tmp_path / folder, *DRAWING, tmp_path / "out")
    assert not (tmp_path / folder).exists()


@pytest.mark.parametrize("word", ["0x1", "7,8", "7:8", "", "-1", "7_", "afterok:7"])
def test_what_is_no_jobs_id_is_refused(cluster, tmp_path, capsys, word):
    assert f"--after {word}: SLURM knows no such job" in refusal(
        *(capsys, "--partition", "gpu", f"--after={word}", "--log-dir", tmp_path / "logs", *DRAWING, tmp_path / "out")
    )


TEXT_OPTIONS = ("partition", "account", "qos", "constraint", "exclude", "container_image", "apptainer")
LIST_OPTIONS = ("container_mounts", "setup", "sbatch")


@pytest.mark.parametrize("key", TEXT_OPTIONS + LIST_OPTIONS)
@pytest.mark.parametrize("break_", ["\n", "\r", "\x0b", "\x00", "\x1b[2J", "\u2028", "\x85"])
def test_no_option_can_add_a_line_to_the_batch_script(monkeypatch, tmp_path, key, break_):
    monkeypatch.chdir(ROOT)
    value = f"k=v{break_}touch stolen"
    option = f"--{key.replace('_', '-')}"
    site = tmp_path / "site.toml"
    site.write_text(f"{key} = {json.dumps([value] if key in LIST_OPTIONS else value)}")
    for options in ([f"{option}={value}"], ["--site", str(site)]):
        with pytest.raises(UserError, match=f"^{option} .*: holds a line break or control character") as refused:
            stage_of("slurm", *options, *DRAWING, "out")
        assert len(str(refused.value).splitlines()) == 1


def test_a_log_folder_is_one_line_too_and_knows_the_home_folder(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert stage_of("slurm", "--log-dir=~/logs", *DRAWING, "out").args.log_dir == tmp_path / "logs"
    site = tmp_path / "site.toml"
    site.write_text(json.dumps("logs\ntouch stolen").join(["log_dir = ", ""]))
    for options in (["--log-dir=logs\ntouch stolen"], ["--site", str(site)]):
        with pytest.raises(SystemExit) as end:
            stage_of("slurm", *options, *DRAWING, "out")
        said = capsys.readouterr().err
        assert end.value.code == 2 and "has control characters" in said and said.count("\n") == 1


# ===== a site file =====


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partiton = 'gpu'", "partiton is not an option; the known ones are"),
        ("[train]\nnode = 2", "[train] node is not an option"),
        ("[deploy]\nnodes = 2", "[deploy] is no table of it; use [evaluate], [generate], [train]"),
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
        site_options(site, ["train"], command.get_args_parser())
    assert message in str(refused.value) and str(site) in str(refused.value)


def test_a_site_file_that_is_no_file_or_nests_too_deeply_is_one_line(tmp_path):
    for make in (os.mkfifo, Path.mkdir, lambda path: path.write_text("a = " + "[" * 5000)):
        site = tmp_path / str(len(list(tmp_path.iterdir())))
        make(site)
        with pytest.raises(UserError, match=f"^--site {site}: (cannot be read|not valid TOML)"):
            site_options(site, ["train"], command.get_args_parser())


def test_a_site_file_serves_each_script_its_own_and_the_command_line_wins(tmp_path):
    site = tmp_path / "site.toml"
    site.write_text("partition = 'gpu'\nsetup = ['a', 'b']\n[train]\nnodes = 2\n[generate]\nchunks = 9\n")
    parser = command.get_args_parser()
    assert site_options(site, ["train"], parser) == ["--partition=gpu", "--setup=a", "--setup=b", "--nodes=2"]
    assert site_options(site, ["generate"], parser)[-1] == "--chunks=9"
    with pytest.raises(UserError, match="no such file"):
        site_options(tmp_path / "none.toml", ["train"], parser)


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


# ===== options that fit the launcher =====


@pytest.mark.parametrize(
    ("launcher", "options", "message"),
    [
        ("inline", ["--partition", "gpu"], "--partition: --launcher inline does not use it; give --launcher slurm,"),
        ("inline", ["--chunks=100"], "--chunks: --launcher inline does not use it; give --launcher local or slurm,"),
        ("inline", ["--tasks-per-node", "2"], "--tasks-per-node: --launcher inline"),
        ("inline", ["--site", "SITE"], "--site: --launcher inline"),
        ("inline", ["--wait"], "--wait: --launcher inline"),
        ("local", ["--gpus-per-node", "1"], "--gpus-per-node: --launcher local does not use it; give --launcher slurm"),
        ("local", ["--sbatch", "mail_type=FAIL"], "--sbatch: --launcher local"),
        ("local", ["--dry-run"], "--dry-run: --launcher local"),
    ],
)
def test_an_option_that_the_launcher_would_ignore_is_refused(tmp_path, monkeypatch, capsys, launcher, options, message):
    monkeypatch.chdir(ROOT)
    site = tmp_path / "site.toml"
    site.write_text("partition = 'gpu'")
    options = [str(site) if option == "SITE" else option for option in options]
    assert call("--launcher", launcher, *options, *DRAWING, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not (tmp_path / "out").exists()


def test_training_on_two_nodes_without_slurm_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert call("--launcher", "local", "--nodes", "2", "train.py", "--data", "models", "--out", tmp_path / "run") == 2
    assert "--nodes: --launcher local does not use it" in capsys.readouterr().err


def test_what_changes_nothing_is_accepted_by_every_launcher(tmp_path, monkeypatch):
    """`make pipeline` gives --chunks 1 to its verify step, wherever it runs; a site file may serve `local` too."""
    monkeypatch.chdir(ROOT)
    site = tmp_path / "site.toml"
    site.write_text("partition = 'gpu'\nprocesses = 2")
    for options in (["--launcher", "inline", "--chunks", "1"], ["--launcher", "local", "--site", str(site)]):
        (stage,) = command.read_stages(options, [*DRAWING, "out"])
        assert stage.mode == "chunks"


def stage_of(launcher: str, *words: str) -> command.Stage:
    (stage,) = command.read_stages(["--launcher", launcher], words)
    return stage


def test_a_job_without_chunks_has_a_process_a_gpu(monkeypatch):
    monkeypatch.chdir(ROOT)
    tasks = slurm.tasks_of(stage_of("slurm", "--gpus-per-node", "4", *DRAWING, "out"))
    assert [(task.processes, task.chunks, task.of) for task in tasks] == [(4, (0, 1, 2, 3), 4)]
    for alone in (["--chunk", "1/8"], ["--chunk=1/8"], ["--preview"], ["--reproduce", "x/dataset.json"]):
        (task,) = slurm.tasks_of(stage_of("slurm", "--gpus-per-node", "4", *DRAWING, "out", *alone))
        assert task.chunks is None, alone
    (task,) = slurm.tasks_of(stage_of("slurm", "--gpus-per-node", "4", "--chunks", "1", *DRAWING, "out", "--verify"))
    assert task.chunks is None


@pytest.mark.parametrize(("own", "message"), [("--chunk=1/8", "--chunk is given"), ("--pack", "--pack takes all")])
def test_chunks_of_what_cannot_be_cut_are_refused(monkeypatch, own, message):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=message):
        stage_of("local", "--chunks", "4", *DRAWING, "out", own)


# ===== several processes as one =====


def run_team(capsys, *scripts: str) -> list[str]:
    """The lines that processes running SCRIPTS print through the launcher."""
    team = [processes.Process(f"p{number}", (sys.executable, "-c", text)) for number, text in enumerate(scripts)]
    processes.Team(team, len(team)).run()
    assert [process.code for process in team] == [0] * len(team)
    return capsys.readouterr().out.splitlines()


BAR = """
import sys, time
for step in range(8):
    sys.stderr.write(f"\\rdrawn {step} of 7"); sys.stderr.flush(); time.sleep(0.1)
"""


@pytest.mark.parametrize("end", ["print(file=sys.stderr)", "", "print('all here')", "sys.stderr.write('\\rdone\\n')"])
def test_a_progress_bar_is_shown_now_and_then_and_its_last_state_always(capsys, monkeypatch, end):
    monkeypatch.setattr(processes, "PROGRESS_S", 0.35)
    lines = run_team(capsys, BAR + end, "print('other')")
    lines.remove("[p1] other")
    assert lines[0] == "[p0] drawn 0 of 7" and 2 < len(lines) < 7
    assert lines == list(dict.fromkeys(lines))  # none twice
    assert lines[-1] == ("[p0] done" if "done" in end else "[p0] drawn 7 of 7" + ("all here" if "here" in end else ""))


def test_ordinary_lines_are_all_shown_also_equal_ones(capsys):
    lines = run_team(capsys, "print('a\\na\\n\\nb'); print('c', end='')", "pass")
    assert lines == ["[p0] a", "[p0] a", "[p0] ", "[p0] b", "[p0] c"]


def test_every_gpu_is_used_once_before_any_is_used_twice(monkeypatch):
    for gpus, shared in ((["0", "1"], ["0", "1", "0", "1"]), ([], [])):
        assert processes.make_team(("x.py",), 4, range(8), 8, gpus, None).devices == shared
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    team = slurm.Task(("generate.py",), processes=4, chunks=(0, 1, 2, 3), of=8)._team(0, 1)
    assert team.devices == ["2", "3", "2", "3"] and team.parallel == 4
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert slurm.Task(("generate.py",), processes=4, chunks=(0, 1, 2, 3), of=8)._team(0, 1).devices == []


# ===== scripts are known by what they declare =====


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("generate", [], ("chunks", 4, (0, 1, 2, 3), 4, False)),
        ("generate", ["--preview"], ("chunks", 4, None, 1, False)),
        ("train", ["--data", "models"], ("ranks", 4, None, 1, True)),
        ("evaluate", ["--checkpoint", "runs/x"], ("ranks", 4, None, 1, True)),
    ],
)
def test_a_copy_of_a_script_under_another_name_behaves_like_the_original(
    tmp_path, monkeypatch, name, options, expected
):
    monkeypatch.chdir(ROOT)
    copy = tmp_path / "my_own.py"
    copy.write_bytes((ROOT / f"{name}.py").read_bytes())
    site = tmp_path / "site.toml"
    site.write_text(f"qos = 'all'\n[{name}]\nqos = 'long'\n")
    for script in (ROOT / f"{name}.py", copy):
        stage = stage_of("slurm", "--gpus-per-node", "4", "--site", str(site), str(script), *options)
        (task,) = slurm.tasks_of(stage)
        assert (stage.mode, task.processes, task.chunks, task.of, task.ranks) == expected
        assert stage.args.qos == "long"
    site.write_text(f"[{name}]\nqos = 'long'\n[my_own]\nqos = 'mine'\n")  # a copy may have a table of its own too
    assert stage_of("slurm", "--site", str(site), str(copy), *options).args.qos == "mine"


@pytest.mark.parametrize("launcher", ["inline", "local"])
def test_a_copy_of_evaluate_runs_once(tmp_path, launcher):
    copy = tmp_path / "judge.py"
    copy.write_bytes((ROOT / "evaluate.py").read_bytes())
    command = [sys.executable, "-m", "utils.launch", "--launcher", launcher]
    command += ["--processes", "2"] * (launcher == "local") + [str(copy), "--list-datasets"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("CoG-L3") == 1, done.stdout + done.stderr


def test_a_script_that_does_not_say_how_it_runs_is_refused(tmp_path):
    script = tmp_path / "plain.py"
    script.write_text("def get_args_parser(): pass")
    with pytest.raises(UserError, match=r'does not say how it runs; add LAUNCH = Launch\("plain", "ranks"\)'):
        stage_of("local", str(script))


# ===== jobs that are queued while the project is updated =====


@pytest.mark.parametrize("module", ["utils.slurm", "utils.launch.slurm"])
def test_a_job_queued_under_the_old_module_path_still_runs(tmp_path, module):
    """A Task as protocol 0 wrote it when its class was utils.slurm.Task: state by name, nothing of today's code."""
    out = tmp_path / "out.txt"
    state = {
        "command": ("-c", f"import sys; open({str(out)!r}, 'a').write(' '.join(sys.argv[1:]) + chr(10))"),
        "processes": 1, "chunks": (3, 4), "of": 9, "ranks": False,
    }  # fmt: skip
    old = f"ccopyreg\n_reconstructor\n(c{module}\nTask\nc__builtin__\nobject\nNtR".encode()
    old += pickle.dumps(state, protocol=0)[:-1] + b"b."
    (tmp_path / "task.pkl").write_bytes(old)
    program = "import pickle, sys; pickle.load(open(sys.argv[1], 'rb'))()"
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    env |= {"SUBMITIT_FOLDER": str(tmp_path), "SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_JOB_ID": "77"}
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "task.pkl")], cwd=ROOT, env=env, text=True,
                          capture_output=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert out.read_text() == "--chunk 3/9\n--chunk 4/9\n"
    assert json.loads((tmp_path / "77-node0.exit.json").read_text())["code"] == 0
