"""What the authors' transfer suite (t-ReX, ICLR 2023) computes, told again in plain loops from its description: its
split, its two searches, and how ImageNet-R and -A are judged by theirs. Ours must come to the same."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings

import numpy as np
import optuna
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torchvision import transforms
from torchvision.datasets import ImageFolder

import evaluate
from tests.evaluation.test_evaluate import make_images, make_run
from utils.cli import run
from utils.evaluation import catalog, probes
from utils.evaluation.imagenet_sets import imagenet_ids, read_index
from utils.model import build_model
from utils.storage import read_jsonl

# ===== the split =====


def held_out_by_the_suite(sizes: list[int]) -> list[int]:
    """Images of each class that the suite holds out, class after class: a fifth, rounded down.

    Where that would be none, it takes one image, and from then on the share that this one image is of its class.
    """
    fifth, counts = 0.2, []
    for size in sizes:
        count = math.floor(size * fifth)
        if count == 0:
            count, fifth = 1, 1 / size
        counts.append(count)
    return counts


def long_tail(seed: int, classes: int = 2000) -> list[int]:
    """Class sizes as iNaturalist 2018's: 2 to 1000 images, 54 on average, most classes small."""
    sizes = np.random.default_rng(seed).lognormal(3.0, 1.3, classes)
    return np.clip(sizes, 2, 1000).astype(int).tolist()


@pytest.mark.parametrize("sizes", [[10, 4, 10, 3, 12], [5, 5, 100], long_tail(0), long_tail(1)])
def test_the_papers_split_is_the_suites(sizes):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    part, held = probes.split_per_class(labels, seed=3, as_suite=True)
    assert np.bincount(labels[held], minlength=len(sizes)).tolist() == held_out_by_the_suite(sizes)
    assert sorted([*part, *held]) == list(range(len(labels)))


def test_the_suite_holds_out_more_than_a_fifth_of_a_long_tail_and_the_fast_protocol_does_not():
    sizes = long_tail(0)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    shares = [len(probes.split_per_class(labels, 0, as_suite)[1]) / len(labels) for as_suite in (False, True)]
    assert shares[0] == pytest.approx(0.19, abs=0.015) and 0.3 < shares[1] < 0.55
    even = np.repeat(np.arange(5), 20)  # no class is too small: one split
    assert all(
        np.array_equal(*pair) for pair in zip(*(probes.split_per_class(even, 0, s) for s in (False, True)), strict=True)
    )


def test_the_papers_protocol_takes_the_papers_split(monkeypatch):
    asked = []
    split = probes.split_per_class
    monkeypatch.setattr(probes, "split_per_class", lambda *a, as_suite: asked.append(as_suite) or split(*a, as_suite))
    monkeypatch.setattr(probes, "TRIALS", 1)
    x, y = np.eye(20, dtype=np.float32), np.arange(20) % 2
    for protocol in ("fast", "paper"):
        probes.run_probe({"trainval": (x, y), "test": (x, y)}, protocol=protocol, seed=0, kind="logreg")
    assert asked == [False, True]


# ===== the searches =====


@pytest.fixture(scope="module")
def features() -> dict:
    """Digits through a fixed random layer with ReLU: 240 to search on, 300 to judge on, 48 features, 10 classes."""
    data = load_digits()
    rng = np.random.default_rng(0)
    x = np.maximum(data.data / 16 @ rng.normal(size=(64, 48)) / 4, 0).astype(np.float32)
    return {"trainval": (x[:240], data.target[:240]), "test": (x[240:540], data.target[240:540])}


def search(suggest, accuracy, seed: int, **sampler) -> dict:
    """Thirty trials of Optuna's TPE for the highest held-out accuracy."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed, **sampler))
    study.optimize(lambda trial: accuracy(suggest(trial)), n_trials=30)
    return study.best_params


def test_the_search_over_c(features):
    """L-BFGS as scikit-learn has it, C log-uniform in [1e-5, 1e6]; the last fit on everything."""
    (x, y), (x_test, y_test) = features["trainval"], features["test"]
    part, held = probes.split_per_class(y, 0, as_suite=True)

    def fit(c, rows):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return LogisticRegression(C=c, solver="lbfgs", max_iter=2000, random_state=0).fit(x[rows], y[rows])

    best = search(
        lambda trial: trial.suggest_float("C", 1e-5, 1e6, log=True),
        lambda c: float(np.mean(fit(c, part).predict(x[held]) == y[held])) * 100,
        seed=0,
    )
    predicted = fit(best["C"], slice(None)).predict(x_test)
    ours = probes.run_probe(features, protocol="paper", seed=0, kind="logreg")
    assert ours["chosen"] == best
    assert ours["top1"] == pytest.approx(100 * np.mean(predicted == y_test), abs=1e-9)
    by_class = [100 * np.mean(predicted[y_test == label] == label) for label in range(10)]
    assert ours["mean_per_class"] == pytest.approx(np.mean(by_class), abs=1e-9)


def test_the_search_over_learning_rate_and_weight_decay(features, monkeypatch):
    """Features of unit length, torch.optim.SGD with momentum 0.9, cosine rate; both searched together.

    The start of the weights and the order of the images are our generator's: the suite's come from torch's own state.
    """
    epochs, batch = 20, 64  # the suite has 100 and 1024: a minute of trials
    monkeypatch.setattr(probes, "EPOCHS", epochs)
    monkeypatch.setattr(probes, "BATCH", batch)
    x, x_test = (torch.nn.functional.normalize(torch.from_numpy(features[s][0])) for s in ("trainval", "test"))
    y = torch.from_numpy(features["trainval"][1])
    y_test = features["test"][1]

    def train(lr, weight_decay, rows):
        generator = torch.Generator().manual_seed(5)
        start = (2 * torch.rand(49, 10, generator=generator) - 1) / 48**0.5
        layer = torch.nn.Linear(48, 10)
        layer.weight.data, layer.bias.data = start[:48].T.clone(), start[48].clone()
        optimizer = torch.optim.SGD(layer.parameters(), lr=lr, momentum=0.9, weight_decay=weight_decay)
        for epoch in range(epochs):
            for some in torch.randperm(len(rows), generator=generator).split(batch):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(layer(x[rows][some]), y[rows][some]).backward()
                optimizer.step()
            optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * epoch / epochs))  # after the epoch
        return layer

    part, held = (torch.from_numpy(rows) for rows in probes.split_per_class(y.numpy(), 5, as_suite=True))

    def accuracy(setting):
        return 100 * float((train(*setting, part)(x[held]).argmax(1) == y[held]).float().mean())

    best = search(
        lambda t: (t.suggest_float("lr", 0.1, 100, log=True), t.suggest_float("weight_decay", 1e-12, 1e-4, log=True)),
        accuracy,
        seed=5,
        multivariate=True,
        group=True,
    )
    ours = probes.run_probe(features, protocol="paper", seed=5, kind="sgd")
    assert ours["chosen"] == pytest.approx(best, rel=1e-6)
    predicted = train(*best.values(), torch.arange(240))(x_test).argmax(1).numpy()
    assert ours["top1"] == pytest.approx(100 * np.mean(predicted == y_test), abs=0.4)  # one image of 300


# ===== ImageNet-R and -A =====


@pytest.mark.parametrize(
    "name, folder, index", [("IN-R", "imagenet-r", "imagenet_r.txt"), ("IN-A", "imagenet-a", "imagenet_a.txt")]
)
def test_r_and_a_as_their_authors_judge(tmp_path, monkeypatch, name, folder, index):
    """Of 1000 logits the 200 of the set's classes are kept, in order; the folder's place is the answer."""
    ids = list(imagenet_ids())
    chosen = [wnid for (wnid,) in read_index(index)]
    make_images(tmp_path / "data" / folder, chosen, each=1, suffix="jpg")
    monkeypatch.setitem(catalog.SETS, name, dataclasses.replace(catalog.SETS[name], images=(200, 200)))
    checkpoint = make_run(tmp_path / "run", ids, seed=1, head="linear")

    steps = [transforms.Resize(32), transforms.CenterCrop(32), transforms.ToTensor()]
    steps.append(transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    images = ImageFolder(str(tmp_path / "data" / folder), transforms.Compose(steps))
    model = build_model("resnet10", 1000, "linear")
    model.load_state_dict(torch.load(checkpoint / "toy.pth", weights_only=True))
    with torch.no_grad():
        logits = model.eval()(torch.stack([image for image, _ in images]))[:, [ids.index(wnid) for wnid in chosen]]
    answers = torch.tensor(images.targets)
    top5 = logits.topk(5).indices
    wanted = {"top1": (top5[:, 0] == answers), "top5": (top5 == answers[:, None]).any(1)}

    assert wanted["top5"].any()  # the toy knows nothing, but 200 images bring some luck
    argv = ["--checkpoint", str(checkpoint), "--data-root", str(tmp_path / "data"), "--datasets", name]
    assert run(evaluate.main, evaluate.get_args_parser(), [*argv, "--device", "cpu"]) == 0
    found = {row["metric"]: row["value"] for row in read_jsonl(checkpoint / "results.jsonl")}
    for metric, right in wanted.items():
        assert found[metric] == pytest.approx(100 * right.float().mean().item(), abs=1e-3)
    sidecar = json.loads(next((checkpoint / "eval").glob("*.json")).read_text())
    predicted = [chosen[place] for place in top5[:, 0]]
    assert [sum(row) for row in zip(*sidecar["confusion"], strict=True)] == [predicted.count(wnid) for wnid in chosen]
