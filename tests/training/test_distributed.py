"""Ranks from the environment, and the collectives in two real processes (gloo)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from utils.cli import UserError
from utils.training import distributed

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def set_ranks(monkeypatch, **values):
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))


def test_without_variables_there_is_one_process(capsys):
    assert distributed.ranks() == distributed.Ranks(0, 1, 0, 1) and distributed.ranks().is_main
    distributed.print0("hello")
    assert capsys.readouterr().out == "hello\n"
    assert distributed.device_name("auto") == "auto"


def test_torchruns_variables_are_read_and_only_rank_0_prints(monkeypatch, capsys):
    set_ranks(monkeypatch, RANK=3, WORLD_SIZE=8, LOCAL_RANK=1, LOCAL_WORLD_SIZE=2, MASTER_ADDR="a", MASTER_PORT=1)
    assert distributed.ranks() == distributed.Ranks(3, 8, 1, 2) and not distributed.ranks().is_main
    distributed.print0("hello")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"RANK": 0}, "WORLD_SIZE is not set"),
        ({"RANK": "x", "WORLD_SIZE": 2}, "RANK is 'x'"),
        ({"RANK": 0, "WORLD_SIZE": 2}, "LOCAL_RANK is not set"),
        ({"RANK": 2, "WORLD_SIZE": 2, "LOCAL_RANK": 0}, "RANK=2 LOCAL_RANK=0 do not fit WORLD_SIZE=2"),
        ({"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0}, "MASTER_ADDR is not set"),
        ({"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "a"}, "MASTER_PORT is not set"),
    ],
)
def test_half_a_set_of_variables_is_refused_by_name(monkeypatch, values, named):
    set_ranks(monkeypatch, **values)
    with pytest.raises(UserError, match=named):
        distributed.ranks()


def test_each_process_has_its_own_gpu(monkeypatch):
    import torch

    set_ranks(monkeypatch, RANK=5, WORLD_SIZE=8, LOCAL_RANK=1, LOCAL_WORLD_SIZE=4, MASTER_ADDR="a", MASTER_PORT=1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert distributed.device_name("auto") == distributed.device_name("cuda") == "cuda:1"
    assert distributed.device_name("cpu") == "cpu" and distributed.device_name("cuda:3") == "cuda:3"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.device_name("auto") == "cpu"


def test_reading_ranks_does_not_import_torch():
    code = "import sys, utils.training.distributed as d; d.print0(d.ranks()); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 0


PAIR = """
import json, sys, torch
from utils.training import distributed as d
device = torch.device("cpu")
with d.process_group(device) as me:
    d.barrier()
    result = {
        "rank": me.rank,
        "counts": d.sum_counts({"b": 2**53 - 1 if me.rank else 0, "a": me.rank + 0.5, "c": 10}, device),
        "any": [d.any_rank(me.rank == 1, device), d.any_rank(False, device)],
    }
print(json.dumps(result))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(rank: int, port: int, code: str, address: str = "127.0.0.1") -> subprocess.Popen[str]:
    values = zip(NAMES, (rank, 2, rank, 2, address, port), strict=True)
    environment = {**os.environ, **{name: str(value) for name, value in values}}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, **pipes)


def test_two_processes_sum_count_and_agree():
    port = free_port()
    processes = [start(rank, port, PAIR) for rank in range(2)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    results = [json.loads(out.splitlines()[-1]) for out, _ in outputs]
    assert [result["rank"] for result in results] == [0, 1]
    for result in results:
        assert result["counts"] == {"a": 2.0, "b": 2**53 - 1, "c": 20}
        assert result["any"] == [True, False]


def test_without_a_group_every_collective_is_the_identity():
    import torch

    device = torch.device("cpu")
    with distributed.process_group(device) as me:
        assert me.world_size == 1
        distributed.barrier()
        assert distributed.sum_counts({"n": 3}, device) == {"n": 3}
        assert distributed.any_rank(True, device) and not distributed.any_rank(False, device)


def test_an_unreachable_master_is_one_line_that_names_it():
    code = (
        "import sys, torch\nfrom utils.cli import make_parser, run\nfrom utils.training import distributed as d\n"
        "def main(args):\n    with d.process_group(torch.device('cpu')):\n        pass\n"
        "sys.exit(run(main, make_parser('x'), []))"
    )
    process = start(1, 29999, code, address="no-such-host.invalid")
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2
    last = error.strip().splitlines()[-1]
    assert "MASTER_ADDR:MASTER_PORT no-such-host.invalid:29999 cannot be resolved" in last, error


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
@pytest.mark.parametrize("count", [1, 2])
def test_each_rank_of_a_node_has_its_own_cores_before_torch_counts_them(count):
    program = (
        "from utils.training import distributed as d; import os; d.take_own_cores(); import torch;"
        "print(sorted(os.sched_getaffinity(0)), torch.get_num_threads())"
    )
    seen = []
    for local in range(count):
        env = {name: value for name, value in os.environ.items() if name not in NAMES and name != "OMP_NUM_THREADS"}
        ranks = {"RANK": local, "WORLD_SIZE": count, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": count}
        env |= {name: str(value) for name, value in ranks.items()} | {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        cores, threads = done.stdout.rsplit(maxsplit=1)
        seen.append(set(json.loads(cores)))
        assert int(threads) == len(seen[-1]) == len(os.sched_getaffinity(0)) // count
    assert set.union(*seen) <= os.sched_getaffinity(0) and sum(map(len, seen)) == len(set.union(*seen))


def test_ranks_that_outnumber_the_cores_stay_as_they_are(monkeypatch):
    bound = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: bound.append(cores))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(distributed, "_place", lambda cpu: (0, cpu % 4, cpu))  # 0 and 4 are threads of one core ...
    values = {"RANK": "1", "WORLD_SIZE": "9", "LOCAL_RANK": "1", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    for count, expected in ((9, []), (2, [[2, 6, 3, 7]])):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(count))
        distributed.take_own_cores()
        assert bound == expected
