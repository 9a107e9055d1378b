"""Pickles from outside: what CoG's split files hold is read, anything that could run is refused and has not run."""

import os
import pickle
import resource
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy._core.multiarray import _reconstruct, scalar
from numpy._core.numeric import _frombuffer

from utils.cli import UserError
from utils.evaluation.pickles import read_pickle

ROOT = Path(__file__).resolve().parents[2]


class Runs:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


def test_malicious_pickles_are_refused_and_have_not_run(tmp_path):
    proof = tmp_path / "proof"
    evil = [
        Runs(os.system, f"touch {proof}"),
        {"train": [Runs(os.mkdir, str(proof))]},
        Runs(eval, f"__import__('os').mkdir({str(proof)!r})"),
        Runs(getattr, "text", "upper"),
        np.array([Runs(os.mkdir, str(proof))], dtype=object),
        OrderedDict(a=1),
    ]
    for number, content in enumerate(evil):
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
            path = tmp_path / f"{number}.{protocol}.pkl"
            path.write_bytes(pickle.dumps(content, protocol))
            with pytest.raises(UserError, match=rf"{path.name} asks for"):
                read_pickle(path)
    assert not proof.exists()


@pytest.mark.parametrize(
    "content,refused",
    [
        (b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\ndtype\n(I0\ntVb\ntR.", "an array of type"),
        (b"c_codecs\nencode\n(Vabc\nVzip\ntR.", "codec zip"),
        (b"Pname\n.", "outside the file"),
    ],
)
def test_the_helpers_of_numpy_serve_arrays_alone(tmp_path, content, refused):
    path = tmp_path / "a.pkl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=refused):
        read_pickle(path)


class Forged:
    """An allowed call with arguments and a state that numpy itself never writes."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


EIGHT = b"A" * 8  # taken for a pointer, it ends the process
RECORD = (3, "|", None, ("f",), {"f": (np.dtype("O"), 0)}, 8, 1, 0)  # holds an object; its flags, last, deny it
EMPTY = (_reconstruct, (np.ndarray, (0,), b"b"))


@pytest.mark.parametrize(
    "content",
    [
        Forged(np.ndarray, ((1,), "O", EIGHT)),
        Forged(_frombuffer, (EIGHT, Forged(np.dtype, ("V8", False, True), RECORD), (1,), "C")),
        Forged(_frombuffer, (EIGHT, Forged(np.dtype, ("u8", False, True), RECORD), (1,), "C")),
        Forged(_frombuffer, (EIGHT, np.dtype("O"), (1,), "C")),
        Forged(*EMPTY, (1, (1,), np.dtype("O"), False, EIGHT)),
        Forged(*EMPTY, (1, (-2, -2), np.dtype("i8"), False, EIGHT * 4)),
        Forged(scalar, (np.dtype("O"), EIGHT)),
    ],
    ids=["ndarray", "record", "record over a number", "buffer", "array", "negative shape", "scalar"],
)
def test_bytes_of_the_file_never_become_pointers(tmp_path, content):
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(content, 4))
    with pytest.raises(UserError, match=r"a\.pkl asks for"):
        read_pickle(path)


def test_a_pickle_cannot_change_its_reader(tmp_path):
    path = tmp_path / "a.pkl"
    path.write_bytes(b"\x80\x04c_codecs\nencode\nN}X\x0c\x00\x00\x00__defaults__)s\x86b.")
    with pytest.raises(UserError, match="a change of the reader"):
        read_pickle(path)


@pytest.mark.parametrize("protocol", range(6))
def test_split_files_load_as_they_were_written(tmp_path, protocol):
    content = {
        "n00001": {"train": ["a.JPEG", "b.JPEG"], "test": np.array(["c.JPEG", "d.JPEG"])},
        "counts": np.arange(6).reshape(2, 3),
        "columns": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "big endian": np.arange(3, dtype=">i4"),
        "none": np.array([], dtype="U5"),
        "one": np.int64(3),
        "word": np.str_("x"),
        "objects": np.array(["e", "f"], dtype=object),
        "bytes": b"\xff\x00",
    }
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(content, protocol))
    loaded = read_pickle(path)
    assert loaded["n00001"]["train"] == ["a.JPEG", "b.JPEG"]
    assert loaded["n00001"]["test"].tolist() == ["c.JPEG", "d.JPEG"]
    assert loaded["counts"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert loaded["columns"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert loaded["big endian"].tolist() == [0, 1, 2] and loaded["none"].tolist() == []
    assert (loaded["one"], loaded["word"], loaded["bytes"]) == (3, "x", b"\xff\x00")
    assert loaded["objects"].tolist() == ["e", "f"]


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    max_leaves=20,
)


@given(plain, st.integers(0, 5))
def test_plain_objects_survive(tmp_path_factory, content, protocol):
    path = tmp_path_factory.getbasetemp() / "plain.pkl"
    path.write_bytes(pickle.dumps(content, protocol))
    assert read_pickle(path) == content


@given(st.binary(max_size=40))
def test_noise_is_refused_in_one_line_or_is_plain(tmp_path_factory, noise):
    path = tmp_path_factory.getbasetemp() / "noise.pkl"
    path.write_bytes(noise)
    try:
        read_pickle(path)
    except UserError as error:
        assert "\n" not in str(error) and "noise.pkl" in str(error)


def test_a_missing_and_a_torn_file_are_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*gone\.pkl"):
        read_pickle(tmp_path / "gone.pkl")
    (tmp_path / "torn.pkl").write_bytes(pickle.dumps({"a": ["b"] * 100})[:-20])
    with pytest.raises(UserError, match=r"torn\.pkl is no whole pickle"):
        read_pickle(tmp_path / "torn.pkl")


@pytest.mark.parametrize(
    "asks",
    [b"Nr\xff\xff\xff\x0f", b"Nr\xff\xff\xff\x7f", b"B\x00\x00\x00\x80", b"\x8e\x00\x00\x00\x00\x00\x01\x00\x00"],
    ids=["memo of 2 GB", "memo of 16 GB", "2 GB of bytes", "a terabyte"],
)
def test_a_few_bytes_cannot_ask_for_gigabytes(tmp_path, asks):
    path = tmp_path / "small.pkl"
    path.write_bytes(b"\x80\x04" + asks + b".")
    code = f"""
from pathlib import Path
from utils.cli import UserError
from utils.evaluation.pickles import read_pickle
try:
    read_pickle({str(path)!r})
except UserError as error:
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(error, int(peak.split()[1]) // 1024)
"""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    message, _, megabytes = done.stdout.strip().rpartition(" ")
    assert "small.pkl is no whole pickle" in message and int(megabytes) < 300
    with pytest.raises(UserError):
        read_pickle(path)
    assert resource.getrlimit(resource.RLIMIT_AS) == limits  # as it was
