"""Killed, signalled, damaged: a run that is started again ends with the same bits as one that was left in peace."""

from __future__ import annotations

import json
import signal
import time

import pytest

import train
from tests.training_runs import STEPS, TINY, finish, log_without_clock, make_images, same_bits, start, weights
from utils.model import build_model, forward_flops
from utils.training.loader import global_size

# Dropout and stochastic depth draw from torch's generator: the network of these tests has dropout.
OPTIONS = [*TINY, "--arch", "mobilenet_v3_small", "--checkpoint-minutes", "0.00001"]  # a checkpoint after every step
# Global crops of 24, 28 and 32 pixels in the three epochs.
OPTIONS += ["--set", "first_size=24", "--set", "growth=0.1,0.6", "--set", "label_smoothing=0.1"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("data") / "shapes", {"n01": 20, "n02": 14})


@pytest.fixture(scope="module")
def undisturbed(images, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    finish(start("--data", images, "--out", run, *OPTIONS))
    return run


def test_the_crops_of_these_runs_grow():
    args = train.get_args_parser().parse_args(["--data", "x", *OPTIONS])
    assert [global_size(train.make_recipe(args), epoch) for epoch in range(3)] == [24, 28, 32]


def assert_same_run(run, undisturbed) -> None:
    assert same_bits(weights(run / "shapes.pth"), weights(undisturbed / "shapes.pth"))
    assert log_without_clock(run) == log_without_clock(undisturbed)
    one, other = (weights(folder / "checkpoint.pth") for folder in (run, undisturbed))
    assert one["step"] == other["step"] == STEPS
    assert same_bits(
        {str(key): value["momentum_buffer"] for key, value in one["optimizer"]["state"].items()},
        {str(key): value["momentum_buffer"] for key, value in other["optimizer"]["state"].items()},
    )


# Kill oneself with SIGKILL while doing something: half of a checkpoint is on the disk, the old one is renamed and the
# new one is not, or a gradient is half accumulated.
KILLED_WHILE_WRITING = """
    import os, signal, torch
    save = torch.save
    def half(state, file):
        save(state, file)
        if state.get("step") == 3:
            file.truncate(file.tell() // 2)
            os.kill(os.getpid(), signal.SIGKILL)
    torch.save = half
"""
KILLED_BETWEEN_RENAMES = """
    import os, pathlib, signal, torch
    replace = pathlib.Path.replace
    def half(self, target):
        replace(self, target)
        if str(target).endswith("checkpoint_previous.pth"):
            if torch.load(target)["step"] == 5:
                os.kill(os.getpid(), signal.SIGKILL)
    pathlib.Path.replace = half
"""
SIGNALLED_IN_A_STEP = """
    import os, signal
    from utils.training.step import Training
    count = Training.count  # called after each backward pass
    def disturbed(self, *counted):
        count(self, *counted)
        last = len(self._counted) == self.schedule.micro_batches
        if self.step == {step} and {when}:
            os.kill(os.getpid(), signal.{name})
    Training.count = disturbed
"""


def test_kill_9_in_mid_epoch_in_mid_checkpoint_and_between_renames(images, undisturbed, tmp_path):
    """One run, killed three times: every resume continues from the newest whole checkpoint."""
    run = tmp_path / "run"
    command = ["--data", images, "--out", run, *OPTIONS]
    finish(start(*command, patch=KILLED_WHILE_WRITING), -signal.SIGKILL)
    assert weights(run / "checkpoint.pth")["step"] == 2 and list(run.glob(".*.tmp"))

    process = start(*command, patch=KILLED_BETWEEN_RENAMES)
    out, _ = finish(process, -signal.SIGKILL)
    assert f"at step 2 of {STEPS}" in out
    assert not (run / "checkpoint.pth").exists() and weights(run / "checkpoint_previous.pth")["step"] == 5

    process = start(*command)  # killed by an outsider at a moment of its choosing
    deadline = time.monotonic() + 120
    while len(log_without_clock(run)) < 9 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL

    out, _ = finish(start(*command))
    assert "resuming from" in out and not list(run.glob(".*.tmp"))
    assert_same_run(run, undisturbed)


@pytest.mark.parametrize(
    ("name", "code", "when"),
    [("SIGTERM", 143, "not last"), ("SIGUSR1", 138, "last"), ("SIGUSR2", 140, "not last"), ("SIGINT", 130, "last")],
)
def test_a_signal_in_mid_step_is_saved_and_the_step_undone(images, undisturbed, tmp_path, name, code, when):
    """The signal comes after the first or second of two micro-batches: batch norm has seen them, the weights not."""
    run = tmp_path / "run"
    command = ["--data", images, "--out", run, *OPTIONS, "--checkpoint-minutes", 1000]
    out, err = finish(start(*command, patch=SIGNALLED_IN_A_STEP.format(step=6, when=when, name=name)), code)
    assert "stopped by a signal; step 6 is saved" in out and "Traceback" not in err
    assert weights(run / "checkpoint.pth")["step"] == 6
    if name in ("SIGTERM", "SIGUSR1"):  # one after each micro-batch; the others would repeat it
        finish(start(*command))
        assert_same_run(run, undisturbed)


def test_a_signal_to_the_whole_group_while_validating(images, tmp_path):
    """Schedulers signal all processes of a job, workers included; the epoch's line is written after the resume."""
    run = tmp_path / "run"
    command = ["--data", images, "--val", images, "--out", run, *TINY, "--epochs", 2]
    patch = """
        import os, signal
        from utils.training.validation import Validation
        os.setpgrp()
        scores = Validation.scores
        def disturbed(*arguments):
            os.killpg(0, signal.SIGTERM)
            return scores(*arguments)
        Validation.scores = disturbed
    """
    finish(start(*command, patch=patch), 143)
    assert weights(run / "checkpoint.pth")["step"] == 4
    assert [line["kind"] for line in log_without_clock(run)] == ["train"] * 4
    finish(start(*command))
    lines = log_without_clock(run)
    assert [line["kind"] for line in lines] == (["train"] * 4 + ["epoch"]) * 2
    assert all(line["val_n"] == 34 for line in lines if line["kind"] == "epoch")


def test_kill_9_after_an_epochs_line_or_before_it(images, undisturbed, tmp_path):
    """An epoch's line is written once, wherever the kill came: before its checkpoint, before the line, or after it."""
    unsaved = """
        import os, signal, time
        from utils.training import checkpoint
        from utils.training.run_log import RunLog
        epoch = RunLog.epoch
        checkpoint.save_checkpoint = lambda *_: time.sleep(60)
        RunLog.epoch = lambda *values: (epoch(*values), os.kill(os.getpid(), signal.SIGKILL))
    """
    before = """
        import os, signal
        from utils.training.run_log import RunLog
        RunLog.epoch = lambda log, training, *_: (training.writer.wait(), os.kill(os.getpid(), signal.SIGKILL))
    """
    run = tmp_path / "run"
    command = ["--data", images, "--out", run, *OPTIONS, "--checkpoint-minutes", 1000]
    finish(start(*command, patch=unsaved), -signal.SIGKILL)
    assert [line["kind"] for line in log_without_clock(run)] == ["train"] * 4 + ["epoch"]
    assert not list(run.glob("checkpoint*"))
    finish(start(*command, patch=before), -signal.SIGKILL)
    assert [line["kind"] for line in log_without_clock(run)] == ["train"] * 4
    assert weights(run / "checkpoint.pth")["step"] == 4
    after = SIGNALLED_IN_A_STEP.format(step=5, when="not last", name="SIGKILL")
    out, _ = finish(start(*command, patch=after), -signal.SIGKILL)
    assert "at step 4" in out
    out, _ = finish(start(*command))
    assert "at step 4" in out
    assert_same_run(run, undisturbed)


SLOW_DISK = """
    import os, time
    from utils.training import checkpoint, step
    save, begin_step = checkpoint.save_checkpoint, step.Training.begin_step
    def slow(run, state):
        print(f"writing {state['step']}\\n", end="", flush=True)  # in one piece: another thread prints too
        time.sleep(3)
        save(run, state)
        print(f"written {state['step']}\\n", end="", flush=True)
    def begun(self):
        print(f"begins {self.step}\\n", end="", flush=True)
        begin_step(self)
    checkpoint.save_checkpoint, step.Training.begin_step = slow, begun
"""


def test_a_slow_disk_holds_up_no_step_and_is_waited_for_in_the_end(images, undisturbed, tmp_path):
    """The next steps run while a checkpoint is being written, and the next checkpoint waits for it."""
    run = tmp_path / "run"
    out, _ = finish(start("--data", images, "--out", run, *OPTIONS, "--checkpoint-minutes", 1000, patch=SLOW_DISK))
    events = [line for line in out.splitlines() if line.split()[0] in ("writing", "written", "begins")]
    for epoch, nxt in ((4, 8), (8, 12)):  # a step takes some tenths of a second, a checkpoint three
        assert events.index(f"begins {epoch + 1}") < events.index(f"written {epoch}") < events.index(f"writing {nxt}")
    assert out.splitlines().index("written 12") < out.splitlines().index(f"wrote {run}/shapes.pth")
    assert_same_run(run, undisturbed)


def test_a_signal_waits_for_the_checkpoint_that_is_being_written_and_for_its_own(images, tmp_path):
    run = tmp_path / "run"
    patch = SLOW_DISK + SIGNALLED_IN_A_STEP.format(step=5, when="last", name="SIGTERM")
    out, _ = finish(start("--data", images, "--out", run, *OPTIONS, "--checkpoint-minutes", 1000, patch=patch), 143)
    assert out.splitlines()[-3:-1] == ["writing 5", "written 5"] and "step 5 is saved" in out.splitlines()[-1]
    assert [weights(run / name)["step"] for name in ("checkpoint_previous.pth", "checkpoint.pth")] == [4, 5]


def test_a_disk_that_is_full_at_a_checkpoint_stops_the_next_step_with_its_line(images, tmp_path):
    full = """
        import errno, os, time
        from utils.training import checkpoint, step
        def save(run, state):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(run / "checkpoint.pth"))
        checkpoint.save_checkpoint = save
    """
    run = tmp_path / "run"
    command = ["--data", images, "--out", run, *OPTIONS, "--checkpoint-minutes", 1000]
    _, err = finish(start(*command, patch=full), 2)
    assert err.strip().endswith(
        f"the disk is full ({run}/checkpoint.pth); free some space and run the same command again"
    )
    assert err.count("\n") == 1 and len(log_without_clock(run)) in (5, 6)  # the epoch's lines, and those of a step


def test_a_worker_blocked_by_a_dead_disk_does_not_keep_the_process(images, tmp_path):
    """After SIGTERM the step is saved and the process is gone, though its worker waits for a file for ever."""
    run = tmp_path / "run"
    blocked = """
        import os, signal, time
        from utils.training import image_sets, step
        read = image_sets.FolderImages.read
        def hanging(self, index, count=[0]):
            count[0] += 1
            if count[0] > 20:
                os.mkfifo("{fifo}")
                open("{fifo}", "rb")  # as a read from a server that is gone
            return read(self, index)
        image_sets.FolderImages.read = hanging
        begin_step = step.Training.begin_step
        def begun(self):
            if self.step == 2:
                signal.setitimer(signal.ITIMER_REAL, 2)
                signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
            begin_step(self)
        step.Training.begin_step = begun
    """
    process = start("--data", images, "--out", run, *TINY, patch=blocked.format(fifo=tmp_path / "fifo"))
    started = time.monotonic()
    out, _ = finish(process, 143)
    assert "stopped by a signal; step 2 is saved" in out and time.monotonic() - started < 60


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "a loader process died (DataLoader worker"),
        ("os._exit(3)", "a loader process died (DataLoader worker"),
    ],
)
def test_a_worker_that_dies_ends_the_run_with_a_line(images, tmp_path, patch, message):
    dying = f"""
        import os, signal
        from utils.training import image_sets
        read = image_sets.FolderImages.read
        def killed(self, index, count=[0]):
            count[0] += 1
            if count[0] > 20:
                {patch}
            return read(self, index)
        image_sets.FolderImages.read = killed
    """
    _, err = finish(start("--data", images, "--out", tmp_path / "run", *TINY, "--workers", 2, patch=dying), 2)
    assert message in err and "--workers 2: " in err and err.count("\n") == 1


def test_a_worker_that_cannot_start_ends_the_run_with_a_line(images, tmp_path):
    """The first of two has started by then, and waits for work with SIGTERM ignored."""
    forbidden = """
        import errno, os
        fork = os.fork
        def second_fails(count=[0]):
            count[0] += 1
            if count[0] > 1:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            return fork()
        os.fork = second_fails
    """
    _, err = finish(start("--data", images, "--out", tmp_path / "run", *TINY, "--workers", 2, patch=forbidden), 2)
    assert "--workers 2: a loader process cannot be started (Resource temporarily unavailable); choose fewer" in err


# A clock that goes by one second and ten joules an optimizer step, on a machine without a GPU's counter.
TICKING = """
    import os, signal
    from utils.training import step
    clock = [0]
    class Ticks:
        def __init__(self, device):
            self.at = 0
        def read(self):
            passed, self.at = clock[0] - self.at, clock[0]
            return {{"seconds": float(passed), "cpu_joules": 10.0 * passed}}
    step.Meter = Ticks
    end_step = step.Training.end_step
    def ended(self):
        end_step(self)
        clock[0] += 1
        if self.step == {step}:
            os.kill(os.getpid(), signal.SIG{name})
    step.Training.end_step = ended
"""


@pytest.mark.parametrize(("name", "code", "minutes"), [("TERM", 143, 1000), ("KILL", -9, 1000)])
def test_the_cost_of_a_stopped_run_is_that_of_all_its_sessions(images, tmp_path, name, code, minutes):
    """Steps that kill -9 undid are counted once, as they were done again; what no session could read is no figure."""
    run = tmp_path / "run"
    command = ["--data", images, "--out", run, *TINY, "--checkpoint-minutes", minutes]
    finish(start(*command, patch=TICKING.format(step=6, name=name)), code)
    finish(start(*command, patch=TICKING.format(step=-1, name=name)))
    args = json.loads((run / "args.json").read_text())
    assert {key: args["cost"][key] for key in ("seconds", "cpu_joules")} == {"seconds": STEPS, "cpu_joules": 10 * STEPS}
    assert "gpu_joules" not in args["cost"] and "cost" not in args["identity"]
    sizes = [(32, 2), (16, 4)]  # of TINY: one global crop and two local ones of each of 8 images
    large, small = forward_flops(build_model("resnet10", 2), sizes).values()
    assert args["cost"]["flops"] == STEPS * 8 * 3 * (large + 2 * small)


def test_a_damaged_checkpoint_is_passed_over(images, undisturbed, tmp_path):
    run = tmp_path / "run"
    command = ["--data", images, "--out", run, *OPTIONS]
    finish(start(*command, patch=SIGNALLED_IN_A_STEP.format(step=7, when="last", name="SIGTERM")), 143)
    newest = run / "checkpoint.pth"
    newest.write_bytes(newest.read_bytes()[:-5000])
    out, _ = finish(start(*command))
    assert "damaged checkpoint passed over" in out and "checkpoint_previous.pth at step 7" in out
    assert_same_run(run, undisturbed)


def test_two_runs_do_not_share_a_folder(images, tmp_path):
    run = tmp_path / "run"
    hold = "import time; from utils.training.step import Training; Training.end_step = lambda self: time.sleep(60)"
    first = start("--data", images, "--out", run, *TINY, patch=hold)
    try:
        deadline = time.monotonic() + 60
        while not (run / "args.json").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        _, err = finish(start("--data", images, "--out", run, *TINY), 2)
        assert "another process is training there" in err
    finally:
        first.kill()
        first.wait()
