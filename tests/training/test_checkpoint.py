"""Checkpoints under kills and damage: the newest good one is found, or the run says clearly that there is none."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import zipfile
from pathlib import Path
from unittest import mock

import pytest
import torch

from utils import storage
from utils.cli import UserError
from utils.model import build_model
from utils.storage import remove_leftovers
from utils.training import checkpoint
from utils.training.checkpoint import NEWEST, PREVIOUS, Writer, load_checkpoint, save_checkpoint

ROOT = Path(__file__).resolve().parents[2]


def state(step: int, side: int = 64) -> dict:
    group = {"lr": 0.1, "momentum": 0.9, "nesterov": False, "foreach": None, "params": [0]}
    return {
        "identity": {"arch": "resnet10", "global_scale": [0.25, 1.0], "data": ["34 images ab"], "seed": 0},
        "step": step,
        "model": {"weight": torch.full((side, side), float(step))},
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(2)}}, "param_groups": [group]},
        "scaler": {},
        "interval": [0.0, 0, 0],
        "epoch": [1.5, 3, 8],
        "bad_images": [],
    }


def test_the_last_two_are_kept(tmp_path):
    assert load_checkpoint(tmp_path) is None
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, state(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([NEWEST, PREVIOUS])
    found, path, problems = load_checkpoint(tmp_path)
    assert (found.step, path.name, problems) == (3, NEWEST, [])
    assert torch.load(tmp_path / PREVIOUS, weights_only=True)["step"] == 2


def test_the_writer_leaves_the_bytes_of_a_plain_save(tmp_path):
    """Of a real model and optimizer, channels_last and halves of tensors too, though a step changes all meanwhile."""
    model = build_model("resnet10", 10).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    whole = state(1) | {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "stamps": [torch.arange(6)]}
    for folder in ("plain", "thread"):
        (tmp_path / folder).mkdir()
    save_checkpoint(tmp_path / "plain", whole)
    writer = Writer()
    held = threading.Event()
    with mock.patch.object(checkpoint, "save_checkpoint", lambda *args: (held.wait(), save_checkpoint(*args))):
        writer.start(tmp_path / "thread", whole)
        optimizer.step()
        whole["bad_images"].append("one")
        held.set()
        writer.wait()
    plain, thread = ((tmp_path / folder / NEWEST).read_bytes() for folder in ("plain", "thread"))
    assert plain == thread and "one" not in load_checkpoint(tmp_path / "thread")[0].bad_images
    save_checkpoint(tmp_path / "plain", whole)
    assert (tmp_path / "plain" / NEWEST).read_bytes() != thread  # the step has changed it since


def test_an_error_of_the_writer_is_raised_once_by_whoever_asks_first(tmp_path, monkeypatch):
    error = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / NEWEST))
    monkeypatch.setattr(checkpoint, "save_checkpoint", mock.Mock(side_effect=error))
    writer = Writer()
    for ask in (writer.check, writer.wait, lambda: writer.start(tmp_path, state(2))):
        writer.start(tmp_path, state(1))
        writer.close()
        with pytest.raises(OSError) as caught:
            ask()
        assert caught.value is error
        writer.wait()


@pytest.mark.parametrize("damage", ["flipped bit", "truncated", "empty", "text", "missing"])
def test_a_damaged_newest_falls_back_to_the_one_before(tmp_path, damage):
    for step in (1, 2):
        save_checkpoint(tmp_path, state(step))
    newest = tmp_path / NEWEST
    data = bytearray(newest.read_bytes())
    if damage == "flipped bit":
        data[data.index(b"\x00\x00\x00\x40" * 8)] ^= 1  # inside the tensor: only a checksum can notice
    newest.write_bytes({"truncated": data[:-200], "empty": b"", "text": b"not a checkpoint"}.get(damage, data))
    if damage == "missing":  # killed between the two renames
        newest.unlink()
    found, path, problems = load_checkpoint(tmp_path)
    assert (found.step, path.name) == (1, PREVIOUS)
    assert len(problems) == (damage != "missing") and all(NEWEST in problem for problem in problems)


def test_two_damaged_ones_are_an_error_and_not_a_fresh_start(tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path, state(step))
    for name in (NEWEST, PREVIOUS):
        (tmp_path / name).write_bytes(b"x" * 100)
    with pytest.raises(UserError, match=f"{NEWEST}.*{PREVIOUS}"):
        load_checkpoint(tmp_path)


def test_pickled_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, ("touch /tmp/never",)

    torch.save(state(1) | {"payload": Evil()}, tmp_path / NEWEST)
    with pytest.raises(UserError, match="no readable checkpoint"):
        load_checkpoint(tmp_path)


def nested() -> list:
    """Twelve levels of ten references to the same list: 120 lists in memory, 10^12 to whoever walks or prints them."""
    value: list = ["x"]
    for _ in range(12):
        value = [value] * 10
    return value


def in_itself() -> dict:
    value: dict = {}
    value["again"] = value
    return value


@pytest.mark.parametrize(
    "change",
    [
        lambda good: [good],
        lambda good: 5,
        lambda good: good | {"step": "7"},
        lambda good: good | {"step": None},
        lambda good: good | {"model": [1]},
        lambda good: good | {"model": {"weight": "text"}},
        lambda good: good | {"identity": in_itself()},
        lambda good: good | {"identity": {"arch": nested()}},
        lambda good: good | {"bad_images": nested()},
        lambda good: good | {"optimizer": in_itself()},
        lambda good: good | {"optimizer": {"state": {0: {"momentum_buffer": nested()}}, "param_groups": []}},
        lambda good: good | {"optimizer": {"state": {}, "param_groups": [{"lr": nested()}]}},
        lambda good: good | {"epoch": {"loss": 1}},
        lambda good: {key: value for key, value in good.items() if key != "identity"},
    ],
)
def test_a_checkpoint_of_another_form_is_one_line_at_once(tmp_path, change):
    torch.save(change(state(2)), tmp_path / NEWEST)
    with pytest.raises(UserError, match=f"no readable checkpoint .*{NEWEST}") as caught:
        load_checkpoint(tmp_path)
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)
    torch.save(state(1), tmp_path / PREVIOUS)
    assert load_checkpoint(tmp_path)[0].step == 1


def test_a_compressed_checkpoint_is_refused_before_it_takes_memory(tmp_path):
    save_checkpoint(tmp_path, state(1))
    entries = {}
    with zipfile.ZipFile(tmp_path / NEWEST) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(tmp_path / NEWEST, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    with pytest.raises(UserError, match="it is compressed, which torch"):
        load_checkpoint(tmp_path)


def test_a_fifo_in_its_place_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / NEWEST)
    assert load_checkpoint(tmp_path) is None


def test_kill_9_while_writing_leaves_a_loadable_one(tmp_path):
    """A process saves without pause and is killed at ten different moments; what is left always loads."""
    script = f"""
        import sys; sys.path.insert(0, {str(ROOT)!r})
        from pathlib import Path
        import torch
        from tests.training.test_checkpoint import state
        from utils.training.checkpoint import Writer, load_checkpoint
        run = Path({str(tmp_path)!r})
        found = load_checkpoint(run)
        step = found[0].step if found else 0
        writer = Writer()
        print("ready", flush=True)
        while True:
            step += 1
            writer.start(run, state(step, side=256))
    """
    last = 0
    for attempt in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script)],
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.15 + 0.013 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        found, _, problems = load_checkpoint(tmp_path)
        assert problems == [] and found.step > last
        assert (found.model["weight"] == found.step).all()
        last = found.step
    leftovers = list(tmp_path.glob(".*.tmp"))
    remove_leftovers(tmp_path)
    assert not list(tmp_path.glob(".*.tmp")), leftovers
    assert load_checkpoint(tmp_path)[0].step == last


@pytest.mark.parametrize("room", [0, 5000])
def test_a_full_disk_is_an_oserror_as_the_command_line_expects(tmp_path, monkeypatch, room):
    """A disk with ROOM bytes left."""

    class Full(io.FileIO):
        def write(self, data) -> int:
            if self.tell() + len(data) > room:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    for module in (checkpoint, storage):
        monkeypatch.setattr(module, "open", lambda path, mode: Full(path, mode.replace("b", "")), raising=False)
    with pytest.raises(OSError) as caught:
        save_checkpoint(tmp_path, state(1))
    assert caught.value.errno == errno.ENOSPC and list(tmp_path.iterdir()) == []
