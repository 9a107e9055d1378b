"""Nothing half-written is ever seen under its final name; locks die with their owner."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from utils.cli import UserError
from utils.storage import (
    AlreadyOwned,
    append_jsonl,
    atomic_path,
    atomic_write,
    free_bytes,
    owner_lock,
    read_json,
    read_jsonl,
    require_writable,
    sha256_bytes,
    sha256_file,
    write_json,
    write_page,
)

ROOT = Path(__file__).resolve().parent.parent


def test_a_failing_writer_leaves_the_old_content_and_no_temporary(tmp_path):
    path = tmp_path / "a.json"
    atomic_write(path, b"old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_a_killed_writer_never_leaves_a_part(tmp_path):
    """Kill a process that rewrites one file for ever, ten times: every content seen is whole."""
    path = tmp_path / "big.bin"
    code = (
        "import sys; from utils.storage import atomic_write\n"
        "n = 0\n"
        "while True:\n"
        "    n = (n + 1) % 251; atomic_write(sys.argv[1], bytes([n]) * 3_000_000)\n"
    )
    for round_ in range(10):
        process = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT)
        deadline = time.monotonic() + 20
        before = path.stat().st_mtime_ns if path.exists() else 0
        while (not path.exists() or path.stat().st_mtime_ns == before) and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.003 * round_)
        process.send_signal(signal.SIGKILL)
        process.wait()
        content = path.read_bytes()
        assert len(content) == 3_000_000 and len(set(content)) == 1


def test_json_is_read_back_and_damage_is_named(tmp_path):
    path = tmp_path / "dataset.json"
    write_json(path, {"name": "鳥"})
    assert read_json(path) == {"name": "鳥"}
    path.write_text('{"name": ')
    with pytest.raises(UserError, match=r"dataset\.json is not valid JSON"):
        read_json(path)
    with pytest.raises(UserError, match="does not exist"):
        read_json(tmp_path / "none.json")


json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda v: st.lists(v, max_size=3))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(values=st.lists(json_values, max_size=6), cut=st.integers(0, 40), more=json_values)
def test_a_torn_line_spoils_itself_only(tmp_path, values, cut, more):
    path = tmp_path / "log.jsonl"
    path.unlink(missing_ok=True)
    for value in values:
        append_jsonl(path, value)
    assert read_jsonl(path) == values
    torn = json.dumps({"loss": "x" * 40}).encode()[: cut + 1]  # what a kill leaves: the start of a line
    with path.open("ab") as file:
        file.write(torn)
    append_jsonl(path, more)
    assert read_jsonl(path) == [*values, more]


def test_lines_of_concurrent_writers_do_not_mix(tmp_path):
    path = tmp_path / "results.jsonl"
    code = (
        "import sys; from utils.storage import append_jsonl\n"
        "for n in range(200): append_jsonl(sys.argv[1], {'who': sys.argv[2], 'n': n, 'pad': 'x' * 500})\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, str(path), who], cwd=ROOT) for who in "abc"]
    assert all(process.wait() == 0 for process in processes)
    lines = read_jsonl(path)
    assert len(lines) == 600
    for who in "abc":
        assert [line["n"] for line in lines if line["who"] == who] == list(range(200))


def test_a_lock_has_one_owner_and_a_dead_owner_frees_it(tmp_path):
    path = tmp_path / "chunk.lock"
    code = (
        "import sys, time; from utils.storage import owner_lock\n"
        "with owner_lock(sys.argv[1]): print('mine', flush=True); time.sleep(60)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert owner.stdout.readline() == "mine\n"
    with pytest.raises(AlreadyOwned), owner_lock(path):
        pass
    owner.kill()
    owner.wait()
    with owner_lock(path):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_refused_and_no_mark_is_left(tmp_path, monkeypatch, number):
    def no_flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_flock)
    with pytest.raises(UserError, match=r"chunk\.lock: .*Lustre: -o flock"), owner_lock(tmp_path / "chunk.lock"):
        pytest.fail("it was given a lock that nobody frees")


def test_hashes_agree_with_sha256sum(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_file(path) == sha256_bytes(b"abc") == known


def test_an_unwritable_folder_is_refused_with_the_options_name(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out: cannot write to"):
        require_writable(tmp_path / "file" / "below", "--out")
    assert require_writable(tmp_path / "new" / "deep", "--out").is_dir()
    assert list((tmp_path / "new" / "deep").iterdir()) == []


def test_free_space_of_a_folder_that_does_not_exist_yet(tmp_path):
    here = os.statvfs(tmp_path)
    assert free_bytes(tmp_path / "a" / "b") == pytest.approx(here.f_bavail * here.f_frsize, rel=0.05)


def test_a_page_escapes_names_and_is_never_half_empty(tmp_path):
    values = {"dataset": "<b>&", "totals": {}, "descriptor": "d", "real": None, "cut": 1, "missing_classes": []}
    values |= {"classes": [], "columns": [], "shown": [], "text": str}
    page = tmp_path / "page.html"
    with pytest.raises(Exception, match="'command' is undefined"):
        write_page(page, "report/dataset_quality.html.j2", **values)
    assert not list(tmp_path.iterdir())
    assert write_page(page, "report/dataset_quality.html.j2", **values, command="x") == page
    assert "A look at &lt;b&gt;&amp;" in page.read_text() and "<b>" not in page.read_text()
