"""A study of seconds: coloured images as the real world, a tiny random Stable Diffusion, resnet10 on 16 pixels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.tiny_sd import build_tiny_sd
from tests.training_runs import make_images

ROOT = Path(__file__).resolve().parents[2]
STUDY = """
title = "Can noise replace colours?"
sizes = [4, 8, 16]
seeds = [0, 1]
steps = 12
reference = "real"

[tests]
toys = "test"

[generate]
classes = "classes.tsv"
model = "tiny"
steps = 2
device = "cpu"

[train]
recipe = "demo"
batch_size = 8
device = "cpu"
workers = 0
set = ["global_size=16", "val_crop=16", "val_resize=16"]

[evaluate]
device = "cpu"

[rows.real]
folder = "real"

[rows.g2]
label = "guidance 2"
generate = { guidance_scale = 2.0, prompt = "c" }

[rows.g1]
generate = { guidance_scale = 1.0, prompt = "c, d_c" }
sizes = [8]

[mixes.half]
rows = ["real", "g2"]
shares = [0.5]
sizes = [8]

[mixes.more]
rows = ["real", "g2"]
first = 4
sizes = [4, 12]
seeds = [0]
"""


def make_world(folder: Path, text: str = STUDY) -> Path:
    """FOLDER with the images, the model and study.toml; returns the latter's path."""
    classes = ("ant", "bee", "cow")
    make_images(folder / "real", dict.fromkeys(classes, 16), side=16)
    make_images(folder / "test", dict.fromkeys(classes, 20), side=16)
    rows = "".join(f"{name}\t{name}\tanimal\ta small {name}\n" for name in classes)
    (folder / "classes.tsv").write_text(f"id\tname\thypernym\tdefinition\n{rows}")
    build_tiny_sd(folder / "tiny")
    (folder / "study.toml").write_text(text)
    for name in ("generate.py", "train.py", "evaluate.py", "utils", "prompts"):
        (folder / name).symlink_to(ROOT / name)
    return folder / "study.toml"


def call(folder: Path, *words: object, code: int = 0, file: str = "study.toml") -> subprocess.CompletedProcess[str]:
    """`python -m utils.study FILE WORDS` in FOLDER, which must end with CODE."""
    command = [sys.executable, "-m", "utils.study", file, *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == code, f"exit {done.returncode}, not {code}:\n{done.stdout}\n{done.stderr}"
    return done
