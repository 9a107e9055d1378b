"""The Makefile as its users type it: help, variables, and the commands they turn into (`make -n` runs nothing)."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

import generate
from utils.classes import load_classes
from utils.generation.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z-]+):.*##", MAKEFILE, re.M))
VARIABLES = set(re.findall(r"^([A-Z_]+) \?=", MAKEFILE, re.M))


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    # `make test` has exported its own variables to this process.
    makes = {*VARIABLES, "MAKEFLAGS", "MAKELEVEL", "MFLAGS"} - {"VENV", "PYTHON"}  # which say where the packages are
    environment = {name: value for name, value in os.environ.items() if name not in makes}
    return subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True, env=environment)


def test_make_alone_prints_help_with_every_target_and_variable():
    result = make()
    assert result.returncode == 0
    shown = set(re.findall(r"^  ([a-z-]+) ", result.stdout, re.M))
    assert shown == TARGETS and {"demo", "generate", "train", "evaluate", "test"} <= TARGETS
    described = result.stdout.partition("variables (default):")[2]
    for variable in VARIABLES - {"PYTHON", "VENV", "SEEDS", "ONLY"}:  # of development, and of the demo
        assert re.search(rf"\b{variable}\b", described), variable


def test_defaults_are_the_scripts_own():
    _, *command = make("-n", "generate").stdout.split("; ")[-1].split()  # the first word is the environment's python
    assert command == ["generate.py", "--classes", '"$CLASSES"']
    asked = make("-n", "generate", "GUIDANCE=7.5", "PROMPT=c, h_c", "IMAGES_PER_CLASS=9", "DEVICE=cpu").stdout
    for option, variable in {"guidance-scale": "GUIDANCE", "prompt": "PROMPT", "device": "DEVICE"}.items():
        assert f'--{option} "${variable}"' in asked


def test_the_help_tells_the_scripts_defaults():
    shown = make().stdout
    defaults = vars(generate.get_args_parser().parse_args([]))
    assert f"({Recipe().prompt})" in shown
    assert f"({defaults['images_per_class']})" in shown
    assert f"fidelity ({generate.RECIPES['paper']['guidance_scale']:g})" in shown
    assert f"({generate.DEFAULT_MODEL})" in shown


@pytest.mark.parametrize(
    "classes,dataset", [("100", "imagenet_100_sd"), ("1000", "imagenet_1k_sd"), ("a/birds.tsv", "birds_sd")]
)
def test_a_dataset_is_named_as_generate_names_it(classes, dataset):
    assert f"(that of CLASSES: {dataset})" in make(f"CLASSES={classes}").stdout
    if not classes.endswith(".tsv"):
        assert f"{load_classes(classes).name}_sd" == dataset


@pytest.mark.parametrize("argument", ["CLASES=100", "guidance=2"])
def test_a_misspelt_variable_is_refused_with_the_known_ones(argument):
    result = make("generate", argument)
    assert result.returncode == 2
    assert f"unknown variable {argument.split('=')[0]}" in result.stderr and "GUIDANCE" in result.stderr


def test_an_unknown_launcher_is_refused_with_the_known_ones():
    result = make("-n", "generate", "LAUNCHER=pbs")
    assert result.returncode == 2
    assert "LAUNCHER=pbs is unknown; use one of inline local slurm" in result.stderr


def test_launchers_other_than_inline_go_through_the_launcher_prefix():
    assert (
        "-m utils.launch --launcher slurm --chunks 4 generate.py"
        in make("-n", "generate", "LAUNCHER=slurm", "LAUNCH_ARGS=--chunks 4").stdout
    )


def test_values_reach_the_script_without_the_shell_reading_them():
    # A prompt with quotes, a dollar sign and a semicolon must not be run as shell.
    result = make("-n", "generate", 'PROMPT=a "{name}"; $$(echo broken in)')
    assert "generate.py" in result.stdout and "broken in" not in result.stdout


def test_the_launchers_options_have_variables():
    command = make(
        "-n", "train", "LAUNCHER=slurm", "NODES=2", "GPUS=4", "PARTITION=gpu", "TIMEOUT_MIN=60", "WAIT=1"
    ).stdout  # fmt: skip
    options = '--launcher slurm --partition "gpu" --gpus-per-node 4 --timeout-min 60 --wait --nodes 2 train.py'
    assert options in command
    assert "utils.launch" not in make("-n", "train").stdout  # inline runs the script itself


@pytest.mark.parametrize("target", ["generate", "train", "evaluate"])
def test_the_launchers_variables_are_refused_without_a_launcher(target):
    for variable in ("SITE", "PARTITION", "NODES", "GPUS", "PROCESSES", "CHUNKS", "TIMEOUT_MIN", "WAIT", "LAUNCH_ARGS"):
        done = make("-n", target, f"{variable}=2")
        assert done.returncode == 2 and f"{variable} has no use with LAUNCHER=inline" in done.stderr, variable
    assert make("-n", target, "PARTITION=gpu", "LAUNCHER=slurm").returncode == 0
    assert make("-n", "pipeline", "TIMEOUT_MIN=9").returncode == 0  # goes through the launcher, which refuses by itself


def test_pipeline_chains_four_steps():
    command = make("-n", "pipeline", "CHUNKS=8", "TRAIN_ARGS=--recipe demo").stdout
    order = ["--chunks 8 generate.py", "--then --chunks 1 generate.py", "--verify", "train.py", "demo", "evaluate.py"]
    places = [command.index(part) for part in order]
    assert places == sorted(places)


def test_pipeline_refuses_one_folder_for_two_things():
    done = make("-n", "pipeline", "OUT=x")
    assert done.returncode == 2 and "give DATASET" in done.stderr


def test_docker_refuses_an_unknown_runtime():
    done = make("docker", "RUNTIME=lxc")
    assert done.returncode == 2 and "docker podman buildah" in done.stderr
