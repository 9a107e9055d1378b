"""Two gloo processes against one: the same global batch gives the same weights, and validation counts images once."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
import torch

from tests.training_runs import ROOT, TINY, finish, log_without_clock, make_images, start, weights

# Two processes add the same numbers in another order; after STEPS steps of SGD the weights of this network, up to 1 in
# size, differ by rounding only. float32: 12 steps stay below this.
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("data") / "shapes", {"n01": 20, "n02": 13})  # 33: an odd number


@pytest.fixture(scope="module")
def alone(images, tmp_path_factory):
    """The run that all others must equal."""
    run = tmp_path_factory.mktemp("runs") / "one"
    finish(start("--data", images, "--val", images, "--out", run, *TINY, "--batch-per-device", 8))
    return run


def assert_close(run, alone) -> None:
    one, other = weights(alone / "shapes.pth"), weights(run / "shapes.pth")
    assert one.keys() == other.keys()  # synchronised batch norm has the same names: the export is the same file
    assert one["conv1.weight"].abs().mean() > 10 * TOLERANCE  # so that the comparison means something
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, atol=TOLERANCE, rtol=TOLERANCE, msg=name)


def start_two(*options: object, patch: str = "") -> list:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [start(*options, patch=patch, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(2)]


def test_two_processes_equal_one_with_the_same_global_batch(images, alone, tmp_path):
    run = tmp_path / "two"
    options = ["--data", images, "--val", images, "--out", run, *TINY, "--batch-per-device", 8]
    (first, _), (second, _) = [finish(process) for process in start_two(*options)]
    assert "batch   8 images = 2 processes x 1 micro-batch x 4" in first
    assert [line for line in second.splitlines() if not line.startswith("[Gloo]")] == []  # rank 0 speaks for all
    assert_close(run, alone)
    for mine, theirs in zip(log_without_clock(alone), log_without_clock(run), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3) and mine["step"] == theirs["step"]
        assert mine.get("val_n", 33) == theirs.get("val_n", 33) == 33


def test_a_run_of_one_process_continues_on_two(images, alone, tmp_path):
    """Half of a run on one process and half on two: the effective batch stays, so do the weights within rounding."""
    options = ["--data", images, "--out", tmp_path / "run", *TINY, "--batch-per-device", 8]
    stop = """
        import os, signal
        from utils.training.step import Training
        end_step = Training.end_step
        def disturbed(self):
            end_step(self)
            if self.step == 6:
                os.kill(os.getpid(), signal.SIGTERM)
        Training.end_step = disturbed
    """
    finish(start(*options, patch=stop), 143)
    outputs = [finish(process) for process in start_two(*options)]
    assert "at step 6 of 12" in outputs[0][0]
    assert_close(tmp_path / "run", alone)


SIGNALLED_ON_RANK_1 = """
    import os, signal
    from utils.training.step import Training
    from utils.training.validation import Validation
    begin_step, inner = Training.begin_step, {inner}
    seen = []
    def began(self):
        seen[:] = [self.step]
        begin_step(self)
    def disturbed(self, *arguments):
        if os.environ["RANK"] == "1" and seen == [{step}]:
            os.kill(os.getpid(), signal.SIGUSR1)
        return inner(self, *arguments)
    Training.begin_step, {inner} = began, disturbed
"""


@pytest.mark.parametrize(("inner", "step", "saved"), [("Training.count", 5, 6), ("Validation.scores", 3, 4)])
def test_a_signal_to_one_process_stops_all_at_the_same_step(images, alone, tmp_path, inner, step, saved):
    """In mid-step the others wait in a collective: nobody may leave alone."""
    options = ["--data", images, "--val", images, "--out", tmp_path / "run", *TINY, "--batch-per-device", 8]
    patch = SIGNALLED_ON_RANK_1.format(inner=inner, step=step)
    first, second = start_two(*options, patch=patch)
    out, _ = finish(first, 143)
    finish(second, 138)
    assert f"stopped by a signal; step {saved} is saved" in out
    assert weights(tmp_path / "run" / "checkpoint.pth")["step"] == saved
    if inner == "Validation.scores":  # the validation is done again
        for process in start_two(*options):
            finish(process)
        assert_close(tmp_path / "run", alone)
        assert [line["kind"] for line in log_without_clock(tmp_path / "run")].count("epoch") == 3


def test_processes_that_resume_different_steps_are_refused(images, tmp_path):
    """As on nodes that do not share the disk of --out."""
    options = ["--data", images, "--out", tmp_path / "run", *TINY, "--batch-per-device", 8, "--epochs", 1]
    finish(start(*options))
    (tmp_path / "run" / "shapes.pth").unlink()
    blind = """
        import os
        from utils.training import checkpoint
        if os.environ["RANK"] == "1":
            checkpoint.load_checkpoint = lambda run: None
    """
    for process in start_two(*options, patch=blind):
        _, err = finish(process, 2)
        assert "rank 0 continues from step 4 but rank 1 from step 0; put --out on a disk" in err


JOINED = """
import sys, torch
from torch import nn
from utils.model import SyncBatchNorm
from utils.training import distributed as d
torch.manual_seed(0)
whole = torch.randn(12, 5, 4, 3) * 3 + torch.tensor([100.0, 0, -7, 0.01, 1000])[:, None, None]
weight, parts = torch.randn(12, 5, 4, 3), {"1": [12], "2": [7, 5], "3": [2, 9, 1]}[sys.argv[1]]
layers = []
for kind in (SyncBatchNorm, nn.BatchNorm2d):
    layer = kind(5)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.5, 2, 5)), layer.bias.copy_(torch.linspace(-1, 1, 5))
    layers.append(layer)
ours, reference = layers
with d.process_group(torch.device("cpu")) as me:
    if sys.argv[1] == "1":
        torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}/store", rank=0, world_size=1)
    mine = slice(sum(parts[: me.rank]), sum(parts[: me.rank + 1]))
    x, y = whole[mine].clone().requires_grad_(), whole.clone().requires_grad_()
    calls = []
    reduce = torch.distributed.all_reduce
    torch.distributed.all_reduce = lambda *a, **k: (calls.append(0), reduce(*a, **k))
    out, wanted = ours(x), reference(y)
    (out * weight[mine]).sum().backward()
    (wanted * weight).sum().backward()
    assert len(calls) == 2, calls  # one forward, one backward
    def close(one, other, name):
        scale = max(1.0, other.abs().max().item())
        assert (one - other).abs().max() / scale < 1e-5, (name, one, other)
    close(out, wanted[mine], "output")
    close(x.grad, y.grad[mine], "gradient of the input")
    for name in ("weight", "bias"):
        gradient = getattr(ours, name).grad
        reduce(gradient)
        close(gradient, getattr(reference, name).grad, name)
    for name, value in reference.state_dict().items():
        close(ours.state_dict()[name].double(), value.double(), name)
    close(ours.eval()(x), reference.eval()(y)[mine], "evaluation")
    with torch.autocast("cpu", torch.bfloat16):
        assert ours.train()(x.bfloat16()).dtype == torch.bfloat16
    if sys.argv[1] == "1":
        torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("world", [1, 2, 3])
def test_synchronised_batch_norm_equals_that_of_the_joined_batch(tmp_path, world):
    """torch's own on the whole batch, to 1e-5: output, gradients and statistics, of parts of different sizes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", JOINED, str(world), str(tmp_path)],
            cwd=ROOT,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * world, errors


COMPILED = """
import sys, torch, torch._dynamo
from utils.model import MultiCrop, build_model, sync_batchnorm
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store", rank=0, world_size=1)
forward = MultiCrop(sync_batchnorm(build_model("resnet10", 10)).train())
graphs = []
def backend(graph, inputs):
    graphs.append(any(isinstance(value, (torch.SymInt, int)) for value in inputs))
    return graph.forward
compiled = torch.compile(forward, backend=backend, dynamic=False)
crops = [torch.randn(2, 3, 64, 64), torch.randn(6, 3, 32, 32)]
for function in (compiled, compiled, forward):
    forward.zero_grad()
    function(crops).square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in forward.parameters()]
    assert function is compiled or all(map(torch.allclose, gradients, kept))
    kept = gradients
# One for each crop size and one for what joins them: the head is left as it is, batch norms break nothing.
assert len(graphs) == 3 and not any(graphs), graphs
torch.distributed.destroy_process_group()
"""


def test_a_compiled_model_is_not_cut_at_its_batch_norms(tmp_path):
    command = [sys.executable, "-c", COMPILED, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
