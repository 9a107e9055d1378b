"""The GPU's checks, run on the CPU: they pass there, and each fails when what it looks at is broken."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check
from utils.cli import run
from utils.generation.diffusion import Sampler

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


def check(tmp_path: Path, *names: str) -> int:
    arguments = ["--device", "cpu", "--out", str(tmp_path / "out"), "--only", *names]
    return run(gpu_check.main, gpu_check.get_args_parser(), arguments)


@pytest.mark.timeout(500)
def test_all_that_a_cpu_can_check_passes_and_is_written_down(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert check(tmp_path, *gpu_check.CHECKS) == 0, capsys.readouterr().out
    assert "other_gpu       does not apply" in capsys.readouterr().out
    found = json.loads((tmp_path / "out/gpu-check.json").read_text())
    assert found["passed"] and {figure["check"] for figure in found["figures"]} == set(gpu_check.CHECKS) - {"other_gpu"}
    assert found["packages"]["torch"] and "git_commit" in found
    page = (tmp_path / "out/gpu-check.md").read_text()
    assert page.count("| pass |") == len(found["figures"]) and "**FAIL**" not in page


def broken_by(monkeypatch, what: str) -> None:
    """Make the CPU give WHAT a card could give."""
    if what == "other noise":
        monkeypatch.setattr(Sampler, "initial_latents", lambda self, seeds: torch.randn(8, 4, 8, 8))
    if what == "images that differ each time":
        decode = Sampler.decode
        monkeypatch.setattr(Sampler, "decode", lambda self, latents: decode(self, latents + torch.randn(1) / 5))
    if what == "wrong attention":
        attention = torch.nn.functional.scaled_dot_product_attention
        monkeypatch.setattr(
            torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: attention(*a, **k) * 1.05
        )
    if what == "an error":
        monkeypatch.setattr(gpu_check, "sampler_on", lambda *a, **k: 1 / 0)


@pytest.mark.parametrize(
    ("what", "failing"),
    [("other noise", "latents"), ("images that differ each time", "repeated"),
     ("images that differ each time", "pictures"), ("wrong attention", "attention"), ("an error", "out_of_memory")],
)  # fmt: skip
def test_a_check_fails_when_the_device_is_wrong(tmp_path, monkeypatch, capsys, what, failing):
    broken_by(monkeypatch, what)
    assert check(tmp_path, failing) == 1
    assert f"{failing:15} " in capsys.readouterr().out and "**FAIL**" in (tmp_path / "out/gpu-check.md").read_text()


def test_a_figure_that_is_no_number_fails():
    for make in (gpu_check.at_most, gpu_check.at_least):
        assert not make("x", float("nan"), 1).passed


def test_without_a_gpu_one_line_says_what_it_needs():
    command = [sys.executable, "benchmarks/gpu_check.py"]
    done = subprocess.run(command, cwd=ROOT, env={"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "no GPU here that torch can use; run this where there is one" in done.stderr
