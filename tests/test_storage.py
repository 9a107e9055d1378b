"""Nothing half-written is ever seen under its final name; locks die with their owner."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from utils import storage
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
    assert read_jsonl(path, Any) == values
    torn = json.dumps({"loss": "x" * 40}).encode()[: cut + 1]  # what a kill leaves: the start of a line
    with path.open("ab") as file:
        file.write(torn)
    append_jsonl(path, more)
    assert read_jsonl(path, Any) == [*values, more]


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
    values |= {"classes": [], "columns": [], "shown": [], "text": str, "order": "o", "first": 1, "last": 1}
    page = tmp_path / "page.html"
    with pytest.raises(Exception, match="'command' is undefined"):
        write_page(page, "report/dataset_quality.html.j2", **values)
    assert not list(tmp_path.iterdir())
    assert write_page(page, "report/dataset_quality.html.j2", **values, command="x") == page
    assert "A look at &lt;b&gt;&amp;" in page.read_text() and "<b>" not in page.read_text()


def test_a_symlink_planted_under_a_temporary_name_is_never_followed(tmp_path, monkeypatch):
    """Every name that was ever used is known; what the next one will be is not, and an existing one is refused."""
    victim, seen = tmp_path / "victim", []
    victim.write_bytes(b"precious")
    for _ in range(3):
        with atomic_path(tmp_path / "a.json") as temporary:
            seen.append(temporary.name)
    assert len(set(seen)) == 3
    monkeypatch.setattr(storage.os, "urandom", lambda n: bytes(n))
    with atomic_path(tmp_path / "a.json") as temporary:
        planted = temporary
    planted.symlink_to(victim)
    with pytest.raises(FileExistsError):
        atomic_write(tmp_path / "a.json", b"new")
    (tmp_path / f".write-test.{os.getpid()}.tmp").symlink_to(victim)
    require_writable(tmp_path, "--out")
    assert victim.read_bytes() == b"precious"


def test_leftovers_of_dead_processes_go_and_those_of_living_ones_stay(tmp_path):
    code = "import os, sys; from utils.storage import atomic_path\nwith atomic_path(sys.argv[1]): os._exit(9)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.bin")], cwd=ROOT)
    (dead,) = tmp_path.iterdir()
    where = dead.name.split(".")[-3][:8]
    mine = tmp_path / dead.name.replace(dead.name.split(".")[-2], str(os.getpid()))
    parents = tmp_path / dead.name.replace(dead.name.split(".")[-2], str(os.getppid()))
    elsewhere, old = (tmp_path / f".{name}.{'0' * 16}.1.tmp" for name in "ab")
    foreign = tmp_path / ".notes.txt.999999999.tmp"
    for path in (mine, parents, elsewhere, old, foreign):
        path.write_bytes(b"x")
    os.utime(old, (1, 1))
    assert where != "0" * 8
    require_writable(tmp_path, "--out")
    assert {path.name for path in tmp_path.iterdir()} == {parents.name, elsewhere.name, foreign.name}


def test_a_name_as_long_as_the_disk_allows_can_be_written(tmp_path):
    atomic_write(tmp_path / ("鳥" * 85), b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["鳥" * 85]
    with pytest.raises(OSError) as caught:
        atomic_write(tmp_path / ("a" * 256), b"x")
    assert caught.value.errno == errno.ENAMETOOLONG and Path(caught.value.filename).name == "a" * 256


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "full"), OSError("4096 requested and 0 written"), RuntimeError("[enforce fail]")]
)
def test_a_full_disk_names_the_file_whatever_the_library_said(tmp_path, monkeypatch, error):
    """numpy's and torch's own errors hide the cause: the disk is then asked for a little more."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError) as caught, atomic_path(tmp_path / "f.npy") as temporary:
        monkeypatch.setattr(storage, "open", full, raising=False)
        raise error
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(tmp_path / "f.npy")
    assert not temporary.exists()
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="a bug"), atomic_path(tmp_path / "f.npy"):
        raise RuntimeError("a bug")


def test_an_append_that_the_disk_cuts_leaves_nothing(tmp_path):
    """RLIMIT_FSIZE cuts the write as a full disk does."""
    path = tmp_path / "log.jsonl"
    append_jsonl(path, {"n": 1})
    code = (
        "import resource, signal, sys; from utils.storage import append_jsonl\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))\n"
        "try: append_jsonl(sys.argv[1], {'pad': 'x' * 50})\n"
        "except OSError as error: print(error.errno, error.filename)\n"
    )
    out = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True).stdout
    assert out == f"{errno.ENOSPC} {path}\n"
    assert path.read_bytes() == b'{"n": 1}\n'


class Line(msgspec.Struct):
    id: str
    index: int


BAD_LINES = [b"null", b"5", b"{}", b"[]", b'"x"', b'{"id": 1, "index": 2}', b'{"id": "a", "index": "2"}', b"\xff", b"{"]


@pytest.mark.parametrize("bad", [*BAD_LINES, b"[" * 100_000])
def test_a_line_of_another_type_is_left_out(tmp_path, bad):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"id": "a", "index": 0}\n' + bad + b'\n{"id": "b", "index": 1, "more": [NaN]}\n')
    assert read_jsonl(path, Line) == [Line("a", 0), Line("b", 1)]
    path.write_bytes(b'{"id": "a", "index": 0}\n' + bad)  # a writer may be at the last line
    assert read_jsonl(path, Line) == [Line("a", 0)]


def test_json_of_another_type_is_refused_with_place_and_remedy(tmp_path):
    path = tmp_path / "dataset.json"
    for text, kind, wrong in [
        ("[]", dict[str, Any], "expected object, got array"),
        ("5", list, "expected array, got int"),
        ('{"a": [{"id": "x", "index": null}]}', dict[str, list[Line]], r"got null at \$\[\.\.\.\]\[0\]\.index"),
        ("[" * 100_000, list, "nested too deeply"),
        ('{"a": NaN, "b": ' + "[" * 100_000, dict[str, Any], "nested too deeply"),
    ]:
        path.write_text(text)
        with pytest.raises(UserError, match=rf"dataset\.json.*{wrong}.*; copy it back"):
            read_json(path, kind, "copy it back")
    path.write_text('{"a": NaN, "b": [-Infinity]}')
    found = read_json(path)
    assert math.isnan(found["a"]) and found["b"] == [-math.inf]


@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "loop", "large"])
def test_only_regular_files_of_bounded_size_are_read(tmp_path, monkeypatch, kind):
    """None of these may block, and none is read into memory."""
    path = tmp_path / "x.json"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path)
    else:
        with path.open("wb") as file:
            file.truncate(storage.MOST_JSON + 1)  # a hole: takes no room
    with pytest.raises(UserError, match=r"cannot read .*x\.json \(.+\); remedy"):
        read_json(path, remedy="remedy")
    if kind != "large":
        with pytest.raises(OSError):
            sha256_file(path)
    if kind in ("fifo", "device", "folder"):
        with pytest.raises(OSError) as caught:
            append_jsonl(path, {})
        assert caught.value.filename == str(path)
        with pytest.raises(UserError, match="cannot read"):
            read_jsonl(path)
