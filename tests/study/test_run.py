"""The page of docs/studies.md as its reader follows it, failures, kills, and what a page says of planted results."""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.study.test_curves import planted
from tests.study.world import ROOT, STUDY, call, make_world
from utils.study import findings, page
from utils.study.curves import Curve
from utils.study.plan import make_plan
from utils.study.spec import read_study

GUIDE = (ROOT / "docs/studies.md").read_text(encoding="utf-8")


def numbers(folder: Path, name: str) -> str:
    """study.csv: every number of the page, of which none depends on the clock."""
    return (folder / "runs" / name / "study.csv").read_text()


def test_the_guide_in_five_minutes(tmp_path):
    """Its file on small images, its commands in their order; a run that fails leaves the others alone."""
    make_world(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "models").mkdir()
    for old, new in {"real": "data/my_real", "test": "data/my_test", "tiny": "models/my-sd"}.items():
        (tmp_path / old).rename(tmp_path / new)
    (tmp_path / "classes.tsv").rename(tmp_path / "my_classes.tsv")
    (text,) = re.findall(r"^```toml\n(.*?)^```$", GUIDE, re.M | re.S)
    smaller = {"[50, 100, 200]": "[4, 8, 16]", "[0, 1]": "[0]", "steps = 600": "steps = 12", "first = 50": "first = 4",
               "[150]": "[12]", "sizes = [200]": "sizes = [8]", "sizes = [100]": "sizes = [8]"}  # fmt: skip
    for old, new in smaller.items():
        assert old in text
        text = text.replace(old, new)
    own = 'batch_size = 8\nworkers = 0\nset = ["global_size=16", "val_crop=16", "val_resize=16"]'
    text = text.replace('recipe = "demo"', f'recipe = "demo"\n{own}').replace("[train]", "steps = 2\n[train]")
    (tmp_path / "my_study.toml").write_text(text)
    commands = re.findall(r"^    python -m utils.study my_study.toml (.+)$", GUIDE, re.M)
    assert commands == ["--dry-run", "--launcher local", "--status"]
    said = [call(tmp_path, *shlex.split(command), file="my_study.toml").stdout for command in commands]
    assert "9 runs on 9 training sets" in said[0] and "UNet forwards" in said[0]
    assert said[1].count("birds ") == 9 and "written: runs/my_study/study.html" in said[1]
    assert "9 of 9 points done" in said[2]
    html = (tmp_path / "runs/my_study/study.html").read_text()
    for part in ("Can synthetic birds replace real ones?", "<svg", "Exchange rate", "95 % interval", "guidance 7.5"):
        assert part in html
    assert not re.search(r'(?:src|href)="(?!data:)', html.replace('href="#', ""))  # nothing is loaded from elsewhere
    before = numbers(tmp_path, "my_study")
    assert before.count("\n") == 10

    # A run whose weights are gone is done again, alone; one that cannot be judged is named at the end with its log.
    (lost,) = (tmp_path / "runs/my_study/points").glob("real-n4-seed0-*")
    shutil.rmtree(lost)
    (harmed,) = (tmp_path / "runs/my_study/points").glob("g7-n8-seed0-*")
    shutil.rmtree(next(harmed.glob("judged-*")))
    (harmed / "g7.pth").write_bytes(b"damaged")
    (harmed / "checkpoint.pth").unlink(missing_ok=True)
    (harmed / "checkpoint_previous.pth").unlink(missing_ok=True)
    done = call(tmp_path, "--launcher", "local", file="my_study.toml", code=2)
    assert "7 of 9 points done" in done.stdout and "real-n4-seed0: birds" in done.stdout
    assert "1 of 2 failed, the others are done; logs:" in done.stderr and f"{harmed.name}/study.log" in done.stderr
    assert "1 of 9 runs are not done yet" in (tmp_path / "runs/my_study/study.md").read_text()
    shutil.rmtree(harmed)
    call(tmp_path, file="my_study.toml")
    assert numbers(tmp_path, "my_study") == before


# ===== planted results =====


@pytest.fixture
def world(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("real", "test"):
        for class_id in ("ant", "bee", "cow"):
            folder = tmp_path / name / class_id
            folder.mkdir(parents=True)
            for index in range(1000 if name == "real" else 1):
                (folder / f"{index:04d}.jpg").touch()
    return tmp_path


PLANTED = """
title = "Planted"
sizes = [60, 120, 250, 500, 1000]
reference = "real"
[tests]
toys = "test"
[train]
recipe = "demo"
[rows.real]
folder = "real"
[rows.drawn]
label = "twice as many"
folder = "real"
[rows.poor]
folder = "real"
[mixes.added]
rows = ["real", "drawn"]
first = 120
sizes = [250]
"""
TRUTH = {
    "real": Curve(0.05, 1.1, 0.5),
    "drawn": Curve(0.05, 1.1 * 2**0.5, 0.5),  # two for one
    "poor": Curve(0.35, 8.0, 1.0),  # ends above what 60 real images reach
}


def plant(plan, test: str = "toys") -> None:
    """The files that train.py and evaluate.py would leave for TRUTH; added images are worth half a real one each."""
    rng = np.random.default_rng(0)
    hard = np.random.default_rng(1).normal(size=2000)
    for point in plan.points:
        of_added = Curve(TRUTH["real"].error(120 + point.size / 2), 0.0, 1.0)
        truth = TRUTH.get(point.group, of_added)
        (made,) = planted(rng, truth, images=2000, seeds=1, spread=0.004, difficulty=hard, sizes=(point.size,))
        right, sha = np.asarray(made.hits) > 0.5, f"{abs(hash(point.name)):064x}"[:64]
        (point.judged / "eval").mkdir(parents=True, exist_ok=True)
        (point.folder / "args.json").write_text(json.dumps({"weights_sha256": sha, "plan": {"batch_size": 64}}))
        row = {"model": point.name, "dataset": test, "metric": "top1", "value": 100 * float(right.mean()), "n": 2000,
               "checkpoint_sha256": sha}  # fmt: skip
        (point.judged / "results.jsonl").write_text(json.dumps(row) + "\n")
        bits = base64.b64encode(np.packbits(right).tobytes()).decode()
        sidecar = {"dataset": test, "checkpoint_sha256": sha, "class_ids": ["ant"], "class_names": ["ant"],
                   "per_class": [{"id": "ant", "n": 2000}], "images": "the same", "correct": bits}  # fmt: skip
        (point.judged / "eval" / f"{test}.{sha[:12]}.json").write_text(json.dumps(sidecar))


def planned(text: str):
    Path("planted.toml").write_text(text)
    return make_plan(read_study(Path("planted.toml")))


def test_the_page_tells_the_planted_truth(world):
    plan = planned(PLANTED)
    plant(plan)
    found = findings.read_findings(plan)["toys"]
    for row, truth in TRUTH.items():
        low, high = (float(np.percentile(found.curves[row][1].e0, q)) for q in (1, 99))
        assert low - 0.01 <= truth.e0 <= high + 0.01
    match = found.matches["drawn"][250]
    assert match.rate_low < 2 < match.rate_high and match.high < 1000
    assert found.best == "drawn" and found.matches["poor"][1000].needed == np.inf
    worth = found.worth("added-n120+250")
    assert worth is not None and worth.rate_low < 2 < worth.rate_high
    page.write_study(plan)
    text = (world / "runs/planted/study.md").read_text()
    answer = text.split("\n\n")[1]
    needed = re.search(
        r"To match .* images a class of “real” you need ([\d,]+) \(95 % interval ([\d,]+) to ([\d,]+)", answer
    )
    assert needed and "twice as many" in answer
    low, high = (float(bound.replace(",", "")) for bound in needed.groups()[1:])
    assert low < 2000 < high or "no number" in answer  # two for each of the 1,000
    poor = next(line for line in text.split("## Exchange rate")[1].splitlines() if line.startswith("| poor |"))
    assert poor.count("none (in ") == 5 and int(re.findall(r"in (\d+) % of resamples", poor)[-1]) >= 95


def test_every_sentence_of_the_answer_has_an_interval(world):
    plan = planned(PLANTED)
    plant(plan)
    page.write_study(plan)
    text = (world / "runs/planted/study.md").read_text()
    for sentence in text.split("## Accuracy")[0].split("\n\n")[1:]:
        if any(char.isdigit() for char in sentence):
            assert re.search(r"\(.*[\d.]+ to [-+]?[\d.,]+|resamples\)", sentence), sentence


def test_500_points_are_reported_in_20_seconds(world):
    rows = "".join(f'\n[rows.r{i}]\nfolder = "real"\n' for i in range(17))
    text = PLANTED.partition("[mixes.added]")[0] + rows
    plan = planned(text.replace('reference = "real"', 'reference = "real"\nseeds = [0, 1, 2, 3, 4]'))
    assert len(plan.points) == 500
    for i in range(17):
        TRUTH[f"r{i}"] = Curve(0.1 + i / 100, 1.1, 0.5)
    plant(plan)
    started = time.process_time()
    page.write_study(plan)
    assert time.process_time() - started < 20


# ===== kills =====


def test_killed_at_random_moments_the_numbers_are_the_same(tmp_path):
    text = STUDY.partition("[rows.g1]")[0].replace("sizes = [4, 8, 16]", "sizes = [4]").replace("[0, 1]", "[0]")
    make_world(tmp_path, text)
    call(tmp_path, "--launcher", "local")
    wanted = numbers(tmp_path, "study")
    drawn = sorted((path.name, path.read_bytes()) for path in tmp_path.glob("data/study/*/train/*/*.jpg"))
    for name in ("data", "runs"):
        shutil.rmtree(tmp_path / name)
    rng, command = np.random.default_rng(), [sys.executable, "-m", "utils.study", "study.toml", "--launcher", "local"]
    for _ in range(int(os.environ.get("KILLS", 1)) + 1):
        running = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(1, 20))
        running.send_signal(signal.SIGKILL if rng.random() < 0.5 else signal.SIGTERM)
        running.wait()
    call(tmp_path, "--launcher", "local")
    assert numbers(tmp_path, "study") == wanted
    assert sorted((path.name, path.read_bytes()) for path in tmp_path.glob("data/study/*/train/*/*.jpg")) == drawn
