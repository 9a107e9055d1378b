"""Watching a log folder in which files are damaged, planted or missing: one line or a plain report, never a hang."""

import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from utils.cli import run
from utils.launch import command, watch

RECORD = {
    "cwd": "/somewhere",
    "stages": [
        {"name": "draw", "job": "7", "elements": [{"label": f"chunk {n} of 2", "commands": ["a"]} for n in range(2)]},
        {"name": "train", "job": "8", "elements": [{"label": "", "commands": ["python train.py"]}]},
    ],
}
JOBS = ("7_0", "7_1", "8")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A log folder of three jobs that ended well, on a cluster whose queue is empty and whose memory is short."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("squeue", "scontrol"):
        (programs / name).write_text("#!/bin/sh\nexit 0\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setattr(watch, "SETTLE_S", 0)
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / watch.RECORD).write_text(json.dumps(RECORD))
    for job in JOBS:
        (logs / f"{job}-node0.exit.json").write_text('{"code": 0, "failed": []}')
    return logs


def watched(folder: Path, capsys) -> tuple[int, str, str]:
    arguments = ["--watch", str(folder)]
    code = run(lambda args: command.main(args, arguments), command.get_args_parser(), arguments)
    said = capsys.readouterr()
    return code, said.out, said.err


def test_three_jobs_that_ended_well(folder, capsys):
    code, out, err = watched(folder, capsys)
    assert code == 0 and not err
    assert out == "launch: draw: 2 done; train: 1 done\nlaunch: all 3 jobs done\n"


@pytest.mark.parametrize(
    "content",
    ["", "[]", "null", "5", '{"stages": null}', '{"stages": [5]}', '{"stages": [{"name": "a", "job": "7"}]}',
     '{"stages": [{"name": "a", "job": "../../x", "elements": []}]}', '{"stages": [{"name": 1, "job": "*", "elements":',
     "[" * 100_000, "\xff\xfe"],
)  # fmt: skip
def test_a_damaged_record_is_one_line_with_the_remedy(folder, capsys, content):
    (folder / watch.RECORD).write_text(content, encoding="latin-1")
    code, out, err = watched(folder, capsys)
    assert code == 2 and not out and "unexpected" not in err
    assert err.count("\n") == 1 and str(folder / watch.RECORD) in err
    assert "follow the jobs with squeue; their logs lie beside it" in err


def test_a_record_that_is_no_file_is_one_line(folder, capsys):
    (folder / watch.RECORD).unlink()
    for make in (lambda path: os.mkfifo(path), lambda path: path.mkdir()):
        make(folder / watch.RECORD)
        code, _, err = watched(folder, capsys)
        assert code == 2 and err.count("\n") == 1 and str(folder / watch.RECORD) in err
        (folder / watch.RECORD).unlink() if (folder / watch.RECORD).is_fifo() else (folder / watch.RECORD).rmdir()
    assert watched(folder, capsys)[0] == 2


@pytest.mark.parametrize("content", ["", "[]", "null", "{}", '{"code": "0"}', '{"code": true}', '{"code": -1}', '{"co'])
def test_a_damaged_end_of_a_job_counts_as_none(folder, capsys, content):
    (folder / "7_1-node0.exit.json").write_text(content)
    (folder / "7_1_0_log.out").write_text("drawing\r50 %\r100 %\nall here\n")
    code, out, err = watched(folder, capsys)
    assert code == 1 and "draw: 1 done, 1 ended; train: 1 done" in out
    assert "launch: draw chunk 1 of 2 (job 7_1) did not finish (SLURM no longer knows it)" in err
    assert "  | 100 %\n  | all here\n" in err and "1 of 3 jobs failed" in err


def test_a_job_that_could_not_write_its_end_is_judged_by_slurm(folder, capsys):
    (folder / "8-node0.exit.json").unlink()
    for state, expected in (("COMPLETED", 0), ("FAILED", 1), ("CANCELLED", 1)):
        text = f"#!/bin/sh\necho JobId=8 JobState={state} Reason=None\n"
        (folder.parent / "bin/scontrol").write_text(text)
        code, _, err = watched(folder, capsys)
        assert code == expected and (f"did not finish ({state})" in err) is bool(expected)


def test_of_several_nodes_the_log_of_the_one_that_failed_is_shown(folder, capsys):
    (folder / "8-node0.exit.json").unlink()  # SLURM has ended it when the other one failed
    (folder / "8-node1.exit.json").write_text('{"code": 2, "failed": ["rank 1"]}')
    for node, text in enumerate(("stopped by SIGTERM", "image 7 is damaged")):
        (folder / f"8_{node}_log.out").write_text(text)
    code, _, err = watched(folder, capsys)
    assert code == 2 and "8_1_log.out:\n  | image 7 is damaged\n" in err and "SIGTERM" not in err


def test_names_planted_in_the_log_folder_are_never_opened(folder, capsys):
    (folder / "7_0-node0.exit.json").unlink()
    os.mkfifo(folder / "7_0-node0.exit.json")
    os.mkfifo(folder / "7_0_0_log.out")
    (folder / "8-node3\n.exit.json").symlink_to("/dev/zero")
    (folder / "8-node1.exit.json").mkdir()
    (folder / "7_1-node\udcff.exit.json").touch()
    started = time.monotonic()
    code, out, err = watched(folder, capsys)
    assert time.monotonic() - started < 5
    assert code == 1 and "no 7_0_0_log.out" in err and "1 of 3 jobs failed" in err and "train: 1 done" in out


def test_of_a_huge_log_only_the_end_is_read(folder, capsys):
    (folder / "8-node0.exit.json").write_text('{"code": 9}')
    with open(folder / "8_0_log.out", "wb") as log:
        log.seek(40 << 30)  # 40 GB, all holes
        log.write(b"\nthe end\n")
    code, _, err = watched(folder, capsys)
    assert code == 9 and "  | the end\n" in err and len(err) < 50_000


VALID = {watch.RECORD: json.dumps(RECORD).encode(), "8-node0.exit.json": b'{"code": 3, "failed": ["rank 1"]}'}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(sorted(VALID)), data=st.data())
def test_any_damage_is_refused_or_reported(folder, capsys, name, data):
    """Flip, cut, zero, swap or replace: code 2 and a line, or a report whose code is a failure's or 0."""
    content = bytearray(VALID[name])
    at = data.draw(st.integers(0, len(content) - 1))
    match data.draw(st.sampled_from(["flip", "cut", "zero", "swap", "replace"])):
        case "flip":
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        case "cut":
            del content[at:]
        case "zero":
            content[at:] = bytes(len(content) - at)
        case "swap":
            content = content[at:] + content[:at]
        case "replace":
            value = data.draw(st.none() | st.integers() | st.text() | st.lists(st.integers()))
            content = bytearray(json.dumps(value).encode())
    for valid, text in VALID.items():
        (folder / valid).write_bytes(text)
    (folder / name).write_bytes(content)
    code, _, err = watched(folder, capsys)
    assert "error: unexpected" not in err and 0 <= code <= 255
    if code == 2 and "error:" in err:
        assert err.count("\n") == 1 and str(folder / name) in err
    if name == watch.RECORD and code == 0:
        pytest.fail("job 8 has failed, and a damaged record must not hide it")
