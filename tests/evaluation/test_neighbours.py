"""--knn beside the linear probe: DINO's votes, against scikit-learn; rows, resume, and what is said of the choice."""

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from tests.evaluation.test_evaluate import call, make_images, make_run
from utils.evaluation import neighbours
from utils.storage import read_jsonl


def splits(rng, train=300, test=3000, classes=7, spread=1.8):
    centres = rng.normal(size=(classes, 16))
    labels = {"trainval": rng.integers(0, classes, train), "test": rng.integers(0, classes, test)}
    return {
        name: ((centres[y] + spread * rng.normal(size=(len(y), 16))).astype(np.float16), y)
        for name, y in labels.items()
    }


@pytest.mark.parametrize("seed", range(3))
def test_the_votes_are_scikit_learns(seed):
    found = splits(np.random.default_rng(seed))
    vote = KNeighborsClassifier(20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    (x, y), (test, labels) = ((one.astype(np.float32), y) for one, y in found.values())
    expected = 100 * (vote.fit(x, y).predict(test) == labels).mean()
    assert 40 < expected < 95
    assert abs(neighbours.knn_top1(found) - expected) <= 100 * 2 / len(labels)  # two ties of the last bits at most


def test_fewer_images_than_neighbours_all_vote():
    found = splits(np.random.default_rng(0), train=6, test=10)
    assert 0 <= neighbours.knn_top1(found) <= 100


def test_rows_resume_and_what_is_said(tmp_path, capsys):
    run, other = make_run(tmp_path / "runs/toy", ["a", "b", "c"]), tmp_path / "other"
    for part in ("train", "test"):
        make_images(other / part, ["x", "y", "z"], each=6)
    command = ("--checkpoint", run, "--device", "cpu", "--transfer", f"o={other}")
    assert call(*command) == 0
    said = capsys.readouterr().out
    chosen = read_jsonl(run / "results.jsonl")[0]["chosen"]
    (name, value) = next(iter(chosen.items()))
    assert f"toy on o, seed 0: {name} {value:.3g}" in said and "% on held-out images" in said and "k-NN" not in said
    assert call(*command, "--knn") == 0
    said = capsys.readouterr().out
    knn = [row for row in read_jsonl(run / "results.jsonl") if row["metric"] == "knn"]
    # The very images that are judged are the neighbours' nearest: similarity 1 outvotes the rest.
    assert [(row["value"], row["n"], row["seed"]) for row in knn] == [(100.0, 18, 0)] and "k-NN 100.00" in said
    assert call(*command, "--knn") == 0 and "done already" in capsys.readouterr().out
    assert call("--report", run / "results.jsonl", "--out", tmp_path / "report") == 0
    for page in ("report.md", "report.html"):
        probed, voted = (tmp_path / "report" / page).read_text().split("votes of the nearest neighbours (--knn)", 1)
        assert "own sets: linear probe" in probed and "100.0" in voted
