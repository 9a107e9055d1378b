"""evaluate.py over two processes on the CPU: the same files as one process writes, and none waits for ever."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.evaluation.test_evaluate import CLASSES, make_images, make_run
from utils.storage import read_jsonl

ROOT = Path(__file__).resolve().parents[2]
# Blocks of four images: the toy has seven. What each process computes is noted.
CODE = """
import os, sys
import evaluate
from utils.cli import run
from utils.evaluation import feature_cache
feature_cache.BLOCK = 4
write = feature_cache.FeatureCache.write_block
def noted(self, start, block):
    with open(os.environ["NOTES"], "a") as file:
        file.write(f"{os.environ.get('RANK', 0)} {start}\\n")
    write(self, start, block)
feature_cache.FeatureCache.write_block = noted
sys.exit(run(evaluate.main, evaluate.get_args_parser()))
"""


def start(notes: Path, argv: list, rank: int = 0, size: int = 1, port: int = 0) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NOTES": str(notes)}
    if size > 1:
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
        environment |= {"LOCAL_WORLD_SIZE": str(size), "MASTER_PORT": str(port)}
    command = [sys.executable, "-c", CODE, *map(str, argv), "--device", "cpu", "--workers", "1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


def together(notes: Path, argv: list, size: int = 2) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [start(notes, argv, rank, size, port) for rank in range(size)]
    texts = [process.communicate(timeout=120) for process in ranks]
    said = [("".join(line for line in out.splitlines(True) if "[Gloo]" not in line), error) for out, error in texts]
    return [(process.returncode, *text) for process, text in zip(ranks, said, strict=True)]


@pytest.fixture
def toy(tmp_path) -> tuple[Path, Path]:
    return make_run(tmp_path / "runs/toy-seed0", CLASSES), make_images(tmp_path / "test", CLASSES)


def kept(out: Path) -> dict[str, bytes]:
    """The feature cache's files that hold numbers."""
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.glob("features/*/features.*"))}


def test_two_processes_write_what_one_writes(tmp_path, toy):
    folder, test = toy
    argv = ["--checkpoint", folder, "--test", f"toys={test}"]
    alone = start(tmp_path / "alone", [*argv, "--out", tmp_path / "one"])
    text, error = alone.communicate(timeout=120)
    assert alone.returncode == 0, error
    found = together(tmp_path / "shared", [*argv, "--out", tmp_path / "two"])
    assert [code for code, _, _ in found] == [0, 0], found
    assert kept(tmp_path / "one") == kept(tmp_path / "two") and len(kept(tmp_path / "one")) == 2
    rows = [[{**row, "time": ""} for row in read_jsonl(tmp_path / out / "results.jsonl")] for out in ("one", "two")]
    assert rows[0] == rows[1] and len(rows[0]) == 4  # rank 0 alone writes them
    assert found[1][1] == "" and found[0][1].replace("/two/", "/one/") == text
    done = sorted(line.split() for line in (tmp_path / "shared").read_text().splitlines())
    assert [start for rank, start in done if rank == "0"] == ["0", "16", "24", "8"]
    assert sorted(int(start) for _, start in done) == [0, 4, 8, 12, 16, 20, 24]
    again = together(tmp_path / "again", [*argv, "--out", tmp_path / "two"])
    assert [code for code, _, _ in again] == [0, 0] and "done already" in again[0][1]


def test_two_processes_continue_what_one_left(tmp_path, toy):
    """Blocks that are there are not computed again; a damaged one is, by whoever has its turn."""
    folder, test = toy
    argv = ["--checkpoint", folder, "--test", f"toys={test}"]
    assert start(tmp_path / "a", argv).wait(timeout=120) == 0
    (path,) = folder.glob("features/*/features.npy")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    (folder / "results.jsonl").unlink()
    found = together(tmp_path / "b", argv)
    assert [code for code, _, _ in found] == [0, 0] and "1 blocks of the feature cache fail" in found[0][1]
    assert (tmp_path / "b").read_text().split() == ["0", "24"] and path.read_bytes() == whole


def test_a_damaged_image_ends_all_processes(tmp_path, toy):
    folder, test = toy
    (test / "bee/1.png").write_bytes(b"no image")  # the sixth of 28: in the second block, of rank 1
    found = together(tmp_path / "notes", ["--checkpoint", folder, "--test", f"toys={test}"])
    assert [code for code, _, _ in found] == [2, 2]
    assert "damaged image" in found[1][2] and "bee/1.png" in found[1][2]
    assert "error: rank 1 has failed: damaged image" in found[0][2] and "Traceback" not in found[0][2]
    assert not (folder / "results.jsonl").exists()


@pytest.mark.parametrize("option", ["--list-datasets", "--dry-run"])
def test_one_process_speaks(tmp_path, toy, option):
    folder, test = toy
    argv = [option] if option == "--list-datasets" else ["--checkpoint", folder, "--test", f"toys={test}", option]
    first, second = together(tmp_path / "notes", argv)
    assert first[0] == second[0] == 0 and first[1] and second[1] == ""
    assert json.dumps(second[2]) == '""'
