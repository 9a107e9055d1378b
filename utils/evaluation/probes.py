"""Linear probes: how well a linear classifier on frozen features does, as the authors' transfer suite asks.

Two kinds, by the size of the dataset, and two protocols of searching the hyper-parameters:

    logreg  the 8 small sets: multinomial logistic regression with an L2 penalty on features as they are
            paper: scikit-learn's L-BFGS, C by 30 trials of Optuna's TPE sampler
            fast:  the same objective, solved exactly along a path of C, each solution the start of the next
    sgd     iNaturalist and ImageNet-CoG: SGD on L2-normalised features
            paper: learning rate and weight decay by 30 trials of 100 epochs
            fast:  a grid trained side by side in one pass over the data; few epochs first, the best few for longer

Either way the choice is made on 20 % of each class of trainval (see split_per_class), and the final fit uses all of it
(t-ReX's suite).
"""

import math
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch.nn.functional import log_softmax
from tqdm import tqdm

from utils import metrics
from utils.evaluation.logistic import CHUNK_ROWS, LinearClassifier, LogisticSolution, LogisticSolver
from utils.storage import append_jsonl, read_jsonl, sha256_json

TRIALS = 30  # t-ReX's suite, as all constants below unless said otherwise
HELD_OUT = 0.2  # of each class of trainval, for the choice
C_RANGE = (1e-5, 1e6)  # inverse strength of the L2 penalty
MAX_ITER = 2000
SGD_RANGES = {"lr": (1e-1, 1e2), "weight_decay": (1e-12, 1e-4)}
EPOCHS, BATCH, MOMENTUM = 100, 1024, 0.9

# Not in paper, our choices for `fast`:
PATH_POINTS = 12  # one a decade of C_RANGE
PATIENCE = 3  # decades without a better held-out accuracy end the path, once the held-out loss rises as well
MIN_GAIN = 0.1  # points: less does not count as better
STAGES = ((12, 10), (3, 30))  # (settings trained side by side, epochs)
FAST_GRID = [(lr, decay) for lr in (0.3, 1.0, 3.0, 10.0, 30.0, 100.0) for decay in (1e-10, 1e-6)]

Split = tuple[np.ndarray, np.ndarray]  # features (N, D), labels (N,) of 0..K-1
Setting = dict[str, float]
Ranges = dict[str, tuple[float, float]]  # of each hyper-parameter, log-uniform
Predictor = Callable[[np.ndarray], np.ndarray]  # features (N, D) -> labels (N,)
Fit = Callable[[Split, Setting, int, Any], Predictor]  # (images to train on, setting, seed, device)


def run_probe(
    features: dict[str, Split], *, protocol: str, seed: int, kind: str, device: Any = "cpu", memo: Path | None = None
) -> dict[str, Any]:
    """Search on features["trainval"], fit, judge on features["test"].

    Returns {"top1", "mean_per_class" in percent, "chosen": the hyper-parameters, "held_out": their accuracy}.
    Trials are remembered in MEMO (JSON lines), so that a killed search continues where it was with the same result.
    Raises UserError if the features hold a NaN.
    """
    for split, (values, _) in features.items():
        metrics.refuse_nan(np.asarray(values), f"the {split} features")
    train, test = features["trainval"], features["test"]
    ways: dict[tuple[str, str], tuple[Callable[..., tuple[Setting, float]], Fit]] = {
        ("logreg", "paper"): (partial(search_suite, {"C": C_RANGE}, fit_sklearn), fit_sklearn),
        ("logreg", "fast"): (search_path, fit_logreg),
        ("sgd", "paper"): (partial(search_suite, SGD_RANGES, fit_sgd), fit_sgd),
        ("sgd", "fast"): (search_stages, fit_sgd),
    }
    search, fit = ways[kind, protocol]
    part, held = split_per_class(train[1], seed, as_suite=protocol == "paper")
    trials = Trials(memo, {"protocol": protocol, "kind": kind, "seed": seed})
    chosen, accuracy = search(_take(train, part, kind), _take(train, held, kind), trials, seed, device)
    predict = fit(_take(train, slice(None), kind), chosen, seed, device)
    x, y = _take(test, slice(None), kind)
    correct = predict(x) == y
    mean, *_ = metrics.mean_per_class(correct, y, int(max(train[1].max(), y.max())) + 1)
    top1 = 100 * float(correct.mean())
    return {"top1": top1, "mean_per_class": mean, "chosen": chosen, "held_out": round(accuracy, 4)}


def split_per_class(labels: np.ndarray, seed: int, as_suite: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(training, held-out) row numbers: 20 % of every class, at least one; a class of a single image is not split.

    AS_SUITE: after a class of fewer than five images the suite keeps that class's share, one of its images, for all
    classes that follow. On iNaturalist 2018 it so holds out half of the images; elsewhere the two splits are one.
    """
    rng = np.random.default_rng(seed)
    held, share = [], HELD_OUT
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        if len(rows) > 1:
            count = int(len(rows) * share)
            if count == 0:
                count, share = 1, 1 / len(rows) if as_suite else share
            held.append(rng.permutation(rows)[:count])
    held_rows = np.sort(np.concatenate(held)) if held else np.arange(len(labels))
    kept = np.setdiff1d(np.arange(len(labels)), held_rows) if held else held_rows
    return kept, held_rows


class Trial(msgspec.Struct):
    """What is read again of a remembered trial."""

    key: str
    result: float | list[float]  # accuracy, or (accuracy, loss)


class Trials:
    """Results of settings tried before, so that a search that was killed replays them instead of computing them."""

    def __init__(self, path: Path | None, facts: dict[str, Any]) -> None:
        self.path, self.facts = path, facts
        self.known = {trial.key: trial.result for trial in read_jsonl(path, Trial)} if path else {}

    def __call__(self, setting: Setting, compute: Callable[[], Any]) -> Any:
        key = sha256_json([self.facts, setting])[:16]
        if key not in self.known:
            self.known[key] = compute()
            if self.path:
                append_jsonl(self.path, {"key": key, "setting": setting, "result": self.known[key], **self.facts})
        return self.known[key]


def _take(split: Split, rows, kind: str) -> Split:
    """A copy of those rows as float32 (features may be a read-only map of a file); of unit length for SGD."""
    x = np.array(split[0][rows], dtype=np.float32)
    if kind == "sgd":
        for start in range(0, len(x), CHUNK_ROWS):  # a million features need no temporary of their own size
            part = x[start : start + CHUNK_ROWS]
            part /= np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-12)
    return x, np.asarray(split[1][rows])


def top1_of(predict: Predictor, split: Split) -> float:
    """In percent."""
    return 100 * float((predict(split[0]) == split[1]).mean())


# ===== logistic regression =====


def search_suite(
    ranges: Ranges, fit: Fit, train: Split, held: Split, trials: Trials, seed: int, device: Any
) -> tuple[Setting, float]:
    """The suite's search: the best of TRIALS settings that Optuna's TPE proposes, each judged by a whole FIT.

    Log-uniform over RANGES; jointly where there are several. Returns the setting and its held-out accuracy in percent.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    several = len(ranges) > 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(multivariate=several, group=several, seed=seed)
    study = optuna.create_study(direction="maximize", sampler=sampler)

    def objective(trial: optuna.Trial) -> float:
        setting = {name: trial.suggest_float(name, *bounds, log=True) for name, bounds in ranges.items()}
        return trials(setting, lambda: top1_of(fit(train, setting, seed, device), held))

    for _ in tqdm(range(TRIALS), desc="linear probe", unit="trial", leave=False, disable=None):
        study.tell(trial := study.ask(), objective(trial))
    return dict(study.best_params), float(study.best_value)


def fit_sklearn(train: Split, setting: Setting, seed: int, device: Any) -> Predictor:
    """scikit-learn's logistic regression, as the suite fits it (on the CPU whatever the DEVICE)."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=setting["C"], max_iter=MAX_ITER, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # at the largest C 2000 iterations do not converge
        model.fit(*train)
    return model.predict


def search_path(train: Split, held: Split, trials: Trials, seed: int, device: Any) -> tuple[Setting, float]:
    """Decades of C upwards, each from the last solution, until accuracy and loss call C too large; then half decades.

    The loss moves where accuracy does not: small features leave one class winning everywhere for decades of C. Of
    accuracies within MIN_GAIN the smallest C: the stronger penalty.
    """
    low, high = (math.log10(bound) for bound in C_RANGE)
    path = tuple(np.linspace(low, high, PATH_POINTS).tolist())
    solver = cache(lambda: LogisticSolver(*train, device))  # built at the first value that is not remembered

    @cache
    def solution(exponents: tuple[float, ...]) -> LogisticSolution:
        """At the last of EXPONENTS, reached through those before it: the same after an interruption."""
        start = solution(exponents[:-1]) if len(exponents) > 1 else None
        return solver().fit(10.0 ** exponents[-1], start)

    def judge(exponents: tuple[float, ...]) -> tuple[float, float]:
        """(accuracy, loss) on HELD."""
        return trials(
            {"C": 10.0 ** exponents[-1]},
            lambda: [top1_of(found := solution(exponents).classifier, held), found.loss(*held)],
        )

    best, chosen, before = -1.0, path[:1], math.inf
    for count in tqdm(range(1, PATH_POINTS + 1), desc="linear probe", unit="value of C", leave=False, disable=None):
        accuracy, loss = judge(path[:count])
        if accuracy > best + MIN_GAIN:
            best, chosen = accuracy, path[:count]
        if count - len(chosen) >= PATIENCE and loss > before:
            break
        before = loss
    centre = chosen
    for exponent in (centre[-1] - 0.5, centre[-1] + 0.5):
        if low <= exponent <= high and (accuracy := judge((*centre, exponent))[0]) > best + MIN_GAIN:
            best, chosen = accuracy, (*centre, exponent)
    return {"C": 10.0 ** chosen[-1]}, best


def fit_logreg(train: Split, setting: Setting, seed: int, device: Any) -> LinearClassifier:
    """Our exact solution of the same problem; it has no SEED, since it has one minimum."""
    return LogisticSolver(*train, device).solve(setting["C"]).classifier


# ===== SGD =====


def search_stages(train: Split, held: Split, trials: Trials, seed: int, device: Any) -> tuple[Setting, float]:
    """Successive halving: all settings for a few epochs, the best of them for more (a cosine to 0 each time)."""
    settings = [{"lr": lr, "weight_decay": decay} for lr, decay in FAST_GRID]
    best = 0.0
    for count, epochs in STAGES:
        settings = settings[:count]
        trained = cache(partial(train_together, train, settings, seed, device, epochs))  # when one is not remembered

        def judge(index: int, trained=trained) -> float:
            return top1_of(trained()[index], held)

        accuracies = [
            trials(setting | {"epochs": epochs}, partial(judge, index)) for index, setting in enumerate(settings)
        ]
        order = sorted(range(len(settings)), key=lambda index: -accuracies[index])
        settings, best = [settings[index] for index in order], max(accuracies)
    return settings[0], best


def fit_sgd(train: Split, setting: Setting, seed: int, device: Any) -> LinearClassifier:
    """One linear classifier by the suite's 100 epochs."""
    return train_together(train, [setting], seed, device, EPOCHS)[0]


def train_together(
    train: Split, settings: Sequence[Setting], seed: int, device: Any, epochs: int
) -> list[LinearClassifier]:
    """Linear classifiers with bias, one a setting, by SGD over the same batches: one pass over the data serves all.

    Features (N, D), weights (S, D, K). Weights start as torch.nn.Linear's, the learning rate follows a cosine epoch by
    epoch, both as in t-ReX's suite. A setting that diverges to NaN predicts class 0: it loses by itself.
    """
    x, y = torch.from_numpy(train[0]), torch.from_numpy(np.asarray(train[1], dtype=np.int64)).to(device)
    if torch.device(device).type == "cuda" and x.numel() * 4 < 0.6 * torch.cuda.mem_get_info(device)[0]:
        x = x.to(device)
    n, k = len(x), int(y.max()) + 1
    generator = torch.Generator().manual_seed(seed)
    start = 2 * torch.rand(x.shape[1] + 1, k, generator=generator) - 1
    start = (start / math.sqrt(x.shape[1])).to(device).repeat(len(settings), 1, 1)
    weights, bias = start[:, :-1].clone(), start[:, -1:].clone()  # (S, D, K), (S, 1, K)
    moving = [torch.zeros_like(weights), torch.zeros_like(bias)]
    lr = torch.tensor([setting["lr"] for setting in settings], device=device)[:, None, None]
    decay = torch.tensor([setting["weight_decay"] for setting in settings], device=device)[:, None, None]
    title = f"linear probe, {len(settings)} settings"
    for epoch in tqdm(range(epochs), desc=title, unit="epoch", leave=False, disable=None):
        # The suite steps its schedule after an epoch, by that epoch's number: the first two epochs are alike.
        rate = lr * (0.5 * (1 + math.cos(math.pi * max(0, epoch - 1) / epochs)))
        for rows in torch.randperm(n, generator=generator).split(BATCH):
            batch = x[rows.to(x.device)].to(device)  # (B, D)
            error = log_softmax(batch @ weights + bias, 2).exp_()  # (S, B, K)
            error[:, torch.arange(len(rows)), y[rows.to(y.device)]] -= 1
            error /= len(rows)
            # SGD as torch.optim.SGD has it: decay joins the gradient, momentum without dampening
            gradients = [batch.T @ error + decay * weights, error.sum(1, keepdim=True) + decay * bias]
            for parameter, velocity, gradient in zip((weights, bias), moving, gradients, strict=True):
                velocity.mul_(MOMENTUM).add_(gradient)
                parameter.sub_(rate * velocity)
    return [LinearClassifier(*pair, np.arange(k)) for pair in zip(weights, bias[:, 0], strict=True)]
