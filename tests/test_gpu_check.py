"""The GPU's checks, run on the CPU: they pass there, and each fails when what it looks at is broken."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import bench_generate, checks_drawing, checks_training, figures, gpu_check
from utils.cli import run
from utils.generation import loading
from utils.generation.diffusion import Sampler
from utils.storage import append_jsonl

ROOT = Path(__file__).resolve().parent.parent
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BUDGETS = checks_drawing.BUDGETS | checks_training.BUDGETS
GPU_ONLY = {check.__name__ for check in (*checks_drawing.GPU_ONLY, *checks_training.GPU_ONLY)}


def check(tmp_path: Path, *names: str) -> int:
    arguments = ["--device", "cpu", "--out", str(tmp_path / "out"), "--only", *names]
    return run(gpu_check.main, gpu_check.get_args_parser(), arguments)


def failing(found: list[figures.Figure]) -> list[str]:
    return [figure.name for figure in found if not figure.passed]


# ===== the driver =====


@pytest.mark.timeout(900)
def test_all_that_a_cpu_can_check_passes_and_is_written_down(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert check(tmp_path, *gpu_check.NAMES) == 0, capsys.readouterr().out
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "out/gpu-check.json").read_text())
    assert found["passed"] and {figure["check"] for figure in found["figures"]} | GPU_ONLY | {"other_gpu"} == set(
        gpu_check.NAMES
    )
    for name in (*GPU_ONLY, "other_gpu"):
        assert f"{name:18} does not apply" in said
    assert found["packages"]["torch"] and "git_commit" in found and set(found["seconds"]) == set(gpu_check.NAMES)
    page = (tmp_path / "out/gpu-check.md").read_text()
    assert page.count("| pass |") == len(found["figures"]) and "**FAIL**" not in page


def test_one_that_fails_or_breaks_is_said_and_the_others_still_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Sampler, "initial_latents", lambda self, seeds: torch.randn(8, 4, 8, 8))
    monkeypatch.setattr(checks_training, "random_draws", lambda *rest: 1 / 0)
    assert check(tmp_path, "latents", "augmentation", "node") == 1
    said = capsys.readouterr().out
    assert f"{'latents':18} 1 FAILED" in said and f"{'augmentation':18} 1 FAILED" in said
    assert f"{'node':18} passed" in said and "gpu-check: some FAILED" in said
    page = (tmp_path / "out/gpu-check.md").read_text()
    assert page.count("**FAIL**") == 2 and "ZeroDivisionError: division by zero" in page


def test_without_a_gpu_one_line_says_what_it_needs():
    command = [sys.executable, "benchmarks/gpu_check.py"]
    done = subprocess.run(command, cwd=ROOT, env={"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "no GPU here that torch can use; run this where there is one" in done.stderr


def test_a_figure_that_is_no_number_fails():
    for make in (figures.at_most, figures.at_least):
        assert not make("x", float("nan"), 1).passed


def test_the_page_has_rows_for_the_benchmarks():
    facts = dict.fromkeys(("device", "driver", "clocks", "packages"), "x") | {"card": "H100", "git_commit": "ab" * 20}
    found = [figures.told("images/s: training, paper", 1000.0), figures.told("dB", 50.0)]
    page = gpu_check.page(facts | {"time": "2026-01-02T03:04:05"}, found)
    assert page.endswith("| H100 | training, paper | 1000 | 2026-01-02 | ababababab |\n")


def test_ten_minutes_suffice_and_the_documentation_names_each_check_with_its_budget():
    assert [check.__name__ for check in BUDGETS] == list(gpu_check.NAMES)
    assert sum(BUDGETS.values()) < 600
    told = re.findall(r"^\| (\w+) \| [^|]+ \| (\d+) \|", (ROOT / "docs/gpu.md").read_text(), re.M)
    assert told == [(check.__name__, str(seconds)) for check, seconds in BUDGETS.items()]


# ===== drawing =====


@pytest.mark.parametrize(
    ("facts", "faults"),
    [
        ({}, []),
        ({"get_device_capability": (6, 1)}, ["compute capability"]),
        ({"mem_get_info": (5 << 30, 80 << 30)}, ["free memory, GB"]),
        ({"driver": "470.223.02"}, ["driver"]),
        ({"driver": None}, ["driver"]),
    ],
)
def test_a_card_that_does_not_fit(monkeypatch, facts, faults):
    known = {"get_device_capability": (8, 0), "get_arch_list": ["sm_70", "sm_90", "compute_120"], "driver": "570.86.1"}
    known |= {"mem_get_info": (79 << 30, 80 << 30), "get_device_name": "A100"} | facts
    monkeypatch.setattr(checks_drawing, "gpus", lambda: {"driver": known["driver"]})
    for name in known.keys() - {"driver"}:
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: known[name])
    assert failing(checks_drawing.card(CUDA)) == faults


def test_wrong_attention(monkeypatch):
    attention = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: attention(*a, **k) * 1.05)
    assert len(failing(checks_drawing.attention(CPU))) == len(loading.HEADS)


@pytest.mark.parametrize(("chosen", "faults"), [("xformers", 0), ("sdpa", 1)])
def test_a_slower_kernel(monkeypatch, chosen, faults):
    monkeypatch.setattr(
        loading, "attention_ms", lambda *_: {"sdpa": {40: 2.0, 80: 1.0}, "xformers": {40: 1.0, 80: 1.0}}
    )
    monkeypatch.setattr(loading, "resolve_attention", lambda *_: chosen)
    found = checks_drawing.attention_speed(CUDA)
    assert len(failing(found)) == faults and "sdpa, head size 40, ms" in [figure.name for figure in found]


def test_images_that_differ_each_time(monkeypatch):
    decode = Sampler.decode
    monkeypatch.setattr(Sampler, "decode", lambda self, latents: decode(self, latents + torch.randn(1) / 5))
    assert failing(checks_drawing.repeated(CPU)) == ["again"]
    monkeypatch.setattr(checks_drawing, "SCHEDULERS", {"ddim": None})
    assert failing(checks_drawing.pictures(CPU)) == ["ddim, fp32, dB to the CPU"]


@pytest.mark.parametrize("early", [False, True])
def test_a_side_stream_that_does_not_wait(monkeypatch, early):
    plain = checks_drawing.sampler_on(CPU)

    @contextlib.contextmanager
    def beside(self, latents, ready):
        latents.mul_(0.5 if early else 1.0)  # what has not been computed yet is something else
        yield

    plain.side_stream = "a stream"
    monkeypatch.setattr(checks_drawing, "sampler_on", lambda *_: plain)
    monkeypatch.setattr(Sampler, "beside", beside)
    monkeypatch.setattr(Sampler, "ready", lambda self: None)
    assert failing(checks_drawing.repeated(CPU)) == ["beside the next batch"] * early


class Stub:
    """A process that has ended before it began, with what it would have written."""

    def __init__(self, write=lambda: None, code: int = 0, output: str = ""):
        write()
        self.returncode, self.output = code, output

    def poll(self) -> int:
        return self.returncode

    wait = poll

    def send_signal(self, number: int) -> None:
        pass

    def communicate(self) -> tuple[str, None]:
        return self.output, None


@pytest.mark.parametrize(("code", "third", "faults"), [(0, b"a", []), (0, b"b", ["40 images"]), (1, b"a", ["peace"])])
def test_a_killed_run_that_ends_with_other_bytes(monkeypatch, code, third, faults):
    contents = iter([b"a", b"a", third])

    def quiet(command):
        folder = Path(command[command.index("--out") + 1]) / "train" / "n0"
        folder.mkdir(parents=True, exist_ok=True)
        return Stub(lambda: (folder / "0.jpg").write_bytes(next(contents)), code)

    monkeypatch.setattr(checks_drawing, "quiet", quiet)
    assert failing(checks_drawing.killed(CPU)) == faults


def test_a_face_of_full_memory_that_is_not_known(monkeypatch):
    monkeypatch.setattr(checks_drawing, "OUT_OF_MEMORY", ("GPU is tired",))
    with pytest.raises(RuntimeError, match="GPU is tired"):  # which the driver counts as a failure
        checks_drawing.out_of_memory(CPU)


@pytest.mark.parametrize("rows", [4, 100])
def test_a_memory_cap_that_is_not_felt(monkeypatch, rows):
    @contextlib.contextmanager
    def capped(device, sampler, count):
        wanted, forward = checks_drawing.images_of(sampler, count), sampler.unet.forward

        def small(x, *rest, **more):
            if len(x) > rows:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return forward(x, *rest, **more)

        monkeypatch.setattr(sampler.unet, "forward", small)
        yield wanted

    monkeypatch.setattr(checks_drawing, "CAPPED_IMAGES", 4)
    monkeypatch.setattr(checks_drawing, "capped", capped)
    assert failing(checks_drawing.memory_cap(CPU)) == ["portion of before"] * (rows > 8)


@pytest.mark.parametrize(("count", "taken", "faults"), [(1, "0", 0), (2, "0", 0), (2, "512", 1)])
def test_memory_taken_on_another_gpu(monkeypatch, count, taken, faults):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=f"a warning\n{taken}\n"))
    found = checks_drawing.other_gpu(CUDA)
    assert len(failing(found)) == faults and len(found) == (count > 1)


def test_other_flags(monkeypatch):
    plain, calls = Sampler.flagged, itertools.count()

    def flagged(self, pixels):
        flags = plain(self, pixels)
        return [not flags[0], *flags[1:]] if next(calls) else flags

    monkeypatch.setattr(Sampler, "flagged", flagged)
    assert failing(checks_drawing.safety(CPU)) == ["flags"]
    assert next(calls) == 2


def waiting_in(monkeypatch, part: str) -> None:
    """Torch's warning of a wait, at each call of the UNet or of the text encoder's before the loop."""
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    plain = getattr(Sampler, part)

    def waits(self, *rest):
        if part == "_embed":
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
            return plain(self, *rest)
        step = self.scheduler.step

        def asking(*inputs, **named):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
            return step(*inputs, **named)

        self.scheduler.step = asking
        return plain(self, *rest)

    monkeypatch.setattr(Sampler, part, waits)


@pytest.mark.parametrize(
    ("rate", "waiting", "faults"),
    [(0.95, "_embed", []), (0.85, "_embed", ["images/s of the bare UNet and VAE"]),
     (0.95, "_denoise", ["waits in the denoising loop"])],
)  # fmt: skip
def test_drawing_that_is_slower_than_its_networks_or_waits(monkeypatch, rate, waiting, faults):
    waiting_in(monkeypatch, waiting)
    monkeypatch.setattr(bench_generate.Ours, "images_per_s", lambda self, images: rate)
    monkeypatch.setattr(bench_generate.Ours, "bare_images_per_s", lambda self: 1.0)
    found = checks_drawing.full_size(CPU)
    assert failing(found) == faults
    assert any(figure.name.startswith("images/s: generation, 2 steps, ") for figure in found)


@pytest.mark.parametrize(
    ("speed", "broken", "faults"),
    [(1.2, "", []), (1.1, "graph", ["rate against eager", "graph breaks"]), (1.2, "values", ["noise to eager's, dB"])],
)  # fmt: skip
def test_compiled_code_that_breaks_is_slow_or_wrong(monkeypatch, speed, broken, faults):
    """With dynamo, which finds the graphs, but not inductor: no compiler is waited for."""
    compile_plainly = torch.nn.Module.compile

    def compile_(self, **options):
        forward = self.forward

        def other(x, *rest, **more):
            if broken == "graph":
                torch._dynamo.graph_break()
            (result,) = forward(x, *rest, **more)
            return (result * (1.1 if broken == "values" else 1.0),)

        if broken:
            self.forward = other
        compile_plainly(self, backend="eager", **options)

    torch._dynamo.reset()
    monkeypatch.setattr(torch.nn.Module, "compile", compile_)
    monkeypatch.setattr(checks_drawing.loading, "choose_batch_size", lambda sampler: 2)
    monkeypatch.setattr(loading, "require_compiler", lambda device: None)
    rates = {True: speed, False: 1.0}
    monkeypatch.setattr(bench_generate.Ours, "images_per_s", lambda self, images: rates[self.recipe.compile])
    assert failing(checks_drawing.compiled(CPU)) == faults


@pytest.mark.parametrize(
    ("sizes", "share", "faults"),
    [([2, 2, 2], 0.8, []), ([2, 4, 2], 0.8, ["three choices"]), ([2, 2, 2], 0.95, ["memory in use"])],
)
def test_a_batch_size_that_changes_or_fills_the_memory(monkeypatch, sizes, share, faults):
    chosen = itertools.chain([2], sizes)
    monkeypatch.setattr(loading, "choose_batch_size", lambda sampler: next(chosen))
    monkeypatch.setattr(bench_generate.Ours, "images_per_s", lambda self, images: 1.0)
    assert 0 < checks_drawing.memory_share(CPU) < 1
    monkeypatch.setattr(checks_drawing, "memory_share", lambda device: share)
    assert failing(checks_drawing.batch_size(CPU)) == faults


# ===== training and judging =====


def test_other_augmentation(monkeypatch):
    plain, calls = checks_training.augment, itertools.count()
    monkeypatch.setattr(checks_training, "augment", lambda *rest: plain(*rest) + 0.05 * next(calls))
    assert failing(checks_training.augmentation(CPU)) == ["largest difference"]
    for share, faults in ((9.0, 0), (11.0, 1)):
        monkeypatch.setattr(checks_training, "augment_share", lambda share=share: {"ours": share})
        assert len(failing(checks_training.augmentation_share(CPU))) == faults


def test_another_loss(monkeypatch):
    plain, calls = checks_training.cross_entropy, itertools.count(1)
    monkeypatch.setattr(checks_training, "cross_entropy", lambda *rest: plain(*rest) * next(calls))
    assert failing(checks_training.training_step(CPU)) == ["loss", "gradient, relative"]


@pytest.mark.parametrize(("loss", "faults"), [(0.05, 0), (0.2, 1), (float("nan"), 1)])
def test_half_precision_that_learns_less(monkeypatch, loss, faults):
    losses = {"fp32": [2.0, *[0.01] * 20], "bf16": [2.0, *[loss] * 20], "fp16": [2.0, *[loss] * 20]}
    monkeypatch.setattr(checks_training, "losses_of", lambda device, dtype: losses[dtype])
    for device in (CPU, CUDA):
        assert len(failing(checks_training.half_precision(device))) == faults


@pytest.mark.parametrize(
    ("step", "weight", "faults"), [(40, 1.0, []), (39, 1.0, ["end"]), (40, 1.1, ["weights, relative"])]
)
def test_a_resumed_run_that_ends_elsewhere(monkeypatch, step, weight, faults):
    ends = iter([(40, 1.0), (step, weight)])

    def quiet(command):
        out = Path(command[command.index("--out") + 1])
        out.mkdir()
        step, weight = next(ends)
        append_jsonl(out / "log.jsonl", {"kind": "train", "step": step, "epoch": 4})
        torch.save({"w": torch.tensor([weight])}, out / "x.pth")
        return Stub()

    monkeypatch.setattr(checks_training, "quiet", quiet)
    assert failing(checks_training.resumed(CPU)) == faults


def test_a_run_that_waits_for_images_or_leaves_the_gpu_idle(monkeypatch):
    def lines(wait):
        return [{"images_per_s": 1000.0, "data_wait": wait}] * 3

    assert not failing(checks_training.busy_figures(lines(0.04), [95, 93, 20]))
    assert failing(checks_training.busy_figures(lines(0.06), [95])) == ["data wait, % of a step"]
    for used in ([80.0, 95, 70], [], [float("nan")]):
        assert failing(checks_training.busy_figures(lines(0.01), used)) == ["utilisation, %"]
    monkeypatch.setattr(checks_training, "quiet", lambda command: Stub(code=1))
    assert failing(checks_training.kept_busy(CPU)) == ["train.py"]


@pytest.mark.timeout(600)
def test_the_intervals_of_a_real_run_are_read(monkeypatch):
    monkeypatch.setattr(checks_training, "utilization", lambda: 95.0)
    found = {figure.name: figure for figure in checks_training.kept_busy(CPU)}
    assert found["images/s: training, paper, loaders included"].value > 0 and found["utilisation, %"].passed
    assert 0 <= found["data wait, % of a step"].value < 100


@pytest.mark.parametrize(
    ("output", "faults"),
    [("batch norm 1e-6 2e-6", []), ("batch norm 1e-6 2e-2", ["gradients, relative"]),
     ("Traceback", ["outputs, relative", "gradients, relative"])],
)  # fmt: skip
def test_batch_norm_that_is_not_joined(monkeypatch, output, faults):
    outputs = ["batch norm 0.0 0.0", f"a warning\n{output}\n"]
    monkeypatch.setattr(checks_training, "start_ranks", lambda *_: [Stub(output=text) for text in outputs])
    assert failing(checks_training.joined_batch_norm(CPU)) == faults


def test_batch_norm_of_each_process_alone_is_far_from_the_joined_one(monkeypatch, capsys):
    """The comparison itself: as the second of two, whose share of the batch is another."""
    monkeypatch.setattr("utils.training.distributed.process_group", lambda device: contextlib.nullcontext(
        SimpleNamespace(rank=1, world_size=2)))  # fmt: skip
    monkeypatch.setattr(checks_training, "sync_batchnorm", lambda layer: layer)
    checks_training.compare_batch_norm("cpu")
    errors = [float(text) for text in capsys.readouterr().out.split()[2:]]
    assert len(errors) == 2 and min(errors) > 1e-3


@pytest.mark.parametrize(
    ("rates", "faults"), [({1: 100, 2: 171}, 0), ({1: 100, 2: 169}, 1), ({1: 100, 8: 601}, 0), ({1: 100, 8: 599}, 1),
                          ({1: 100, 4: 305}, 0), ({1: 100, 16: 1190}, 1)],
)  # fmt: skip
def test_more_gpus_that_bring_too_little(monkeypatch, rates, faults):
    world = max(rates)
    monkeypatch.setattr(checks_training, "many_images", lambda *_, **__: None)
    monkeypatch.setattr(checks_training, "processes_of", lambda device: world)
    monkeypatch.setattr(
        checks_training, "start_ranks", lambda command, n: [Stub(output=f"probe 20 steps = {rates[n]} img/s; x")] * n
    )
    assert len(failing(checks_training.scaling(CPU))) == faults


@pytest.mark.parametrize(
    ("code", "seconds", "faults"), [(143, 5, []), (143, 31, ["seconds until all have left"]), (-15, 5, ["exit codes"])]
)
def test_processes_that_stay_or_die_of_the_signal(monkeypatch, code, seconds, faults):
    clock = iter([0.0, seconds])
    monkeypatch.setattr(checks_training, "start_ranks", lambda *_: [Stub(code=code), Stub(code=143)])
    monkeypatch.setattr(checks_training.time, "monotonic", lambda: next(clock))
    assert failing(checks_training.stopped_together(CPU)) == faults


def test_one_gpu_needs_no_company(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for one in (checks_training.joined_batch_norm, checks_training.scaling, checks_training.stopped_together):
        assert one(CUDA) == []


@pytest.mark.parametrize(("noise", "faults"), [(0.0, []), (3.0, ["cosine, float32", "top-1, points apart"])])
def test_features_that_differ(monkeypatch, noise, faults):
    calls = itertools.count()

    def extract(self, samples, *rest):
        classes = torch.tensor([label for _, label in samples])
        values = torch.nn.functional.one_hot(classes, 10) + 0.1 * torch.rand(
            len(classes), 10, generator=torch.Generator().manual_seed(0)
        )
        return (values + noise * next(calls) * torch.rand(values.shape)).numpy()

    monkeypatch.setattr(checks_training.Extractor, "__call__", extract)
    monkeypatch.setattr(checks_training, "resolve_dtype", lambda *_: torch.float32)
    assert failing(checks_training.features(CPU)) == faults


def test_a_step_of_slurm_that_lacks_cores_or_gpus(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(checks_training.shutil, "disk_usage", lambda path: SimpleNamespace(free=8 << 30))
    cores = len(checks_training.os.sched_getaffinity(0))
    for asked, gpus, faults in ((cores, 4, []), (cores + 1, 4, ["cores"]), (cores, 8, ["GPUs"])):
        monkeypatch.setenv("SLURM_CPUS_PER_TASK", str(asked))
        monkeypatch.setenv("SLURM_GPUS_ON_NODE", str(gpus))
        assert failing(checks_training.node(CUDA)) == faults
    monkeypatch.setattr(checks_training.shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 30))
    assert "free in /dev/shm, GB" in failing(checks_training.node(CUDA))
    monkeypatch.setattr(checks_training.fcntl, "flock", lambda *_: None)  # a file system without locks
    assert "a lock in runs/ holds" in failing(checks_training.node(CUDA))
