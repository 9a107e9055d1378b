"""Linear probes: how well a linear classifier on frozen features does, as the authors' transfer suite asks.

Two kinds, by the size of the dataset, and two protocols of searching the hyper-parameters:

    logreg  the 8 small sets: multinomial logistic regression with an L2 penalty on features as they are
            paper: scikit-learn's L-BFGS, C by 30 trials of Optuna's TPE sampler
            fast:  the same objective, solved exactly along a path of C, each solution the start of the next
    sgd     iNaturalist and ImageNet-CoG: SGD on L2-normalised features
            paper: learning rate and weight decay by 30 trials of 100 epochs
            fast:  a grid trained side by side in one pass over the data; few epochs first, the best few for longer

Either way the choice is made on 20 % of each class of trainval, and the final fit uses all of it (t-ReX's suite).
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils import metrics
from utils.storage import append_jsonl, read_jsonl

if TYPE_CHECKING:
    import torch

TRIALS = 30  # t-ReX's suite, as all constants below unless said otherwise
HELD_OUT = 0.2  # of each class of trainval, for the choice
C_RANGE = (1e-5, 1e6)  # inverse strength of the L2 penalty
MAX_ITER = 2000
LR_RANGE, WEIGHT_DECAY_RANGE = (1e-1, 1e2), (1e-12, 1e-4)
EPOCHS, BATCH, MOMENTUM = 100, 1024, 0.9
INITIAL_STD = 0.01  # of the SGD probe's weights; not in paper: as MoCo's and DINO's probes

# Not in paper, our choices for `fast`:
PATH_POINTS = 12  # one a decade of C_RANGE
PATIENCE = 3  # decades without a better held-out accuracy end the path
NOTICED = 0.1  # points: less does not count as better
TOLERANCE, ROUND = 1e-4, 25  # of L-BFGS: a smaller gain in so many iterations is the end
STAGES = ((12, 10), (3, 30))  # (settings trained side by side, epochs)
FAST_GRID = [(lr, decay) for lr in (0.3, 1.0, 3.0, 10.0, 30.0, 100.0) for decay in (1e-10, 1e-6)]

Split = tuple[np.ndarray, np.ndarray]  # features (N, D), labels (N,) of 0..K-1
Setting = dict[str, float]


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
    search = {
        ("logreg", "paper"): search_suite_logreg,
        ("logreg", "fast"): search_path,
        ("sgd", "paper"): search_suite_sgd,
        ("sgd", "fast"): search_stages,
    }[kind, protocol]
    fit = {"paper": fit_sklearn, "fast": fit_logreg}[protocol] if kind == "logreg" else fit_sgd
    part, held = split_per_class(train[1], seed)
    trials = Trials(memo, {"protocol": protocol, "kind": kind, "seed": seed})
    chosen, accuracy = search(_take(train, part, kind), _take(train, held, kind), trials, seed, device)
    predict = fit(_take(train, slice(None), kind), chosen, seed, device)
    x, y = _take(test, slice(None), kind)
    correct = predict(x) == y
    mean, *_ = metrics.mean_per_class(correct, y, int(max(train[1].max(), y.max())) + 1)
    top1 = 100 * float(correct.mean())
    return {"top1": top1, "mean_per_class": mean, "chosen": chosen, "held_out": round(accuracy, 4)}


def split_per_class(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(training, held-out) row numbers: 20 % of every class, at least one; a class of a single image is not split."""
    rng = np.random.default_rng(seed)
    held = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        if len(rows) > 1:
            held.append(rng.permutation(rows)[: max(1, round(HELD_OUT * len(rows)))])
    held_rows = np.sort(np.concatenate(held)) if held else np.arange(len(labels))
    kept = np.setdiff1d(np.arange(len(labels)), held_rows) if held else held_rows
    return kept, held_rows


class Trials:
    """Accuracies of settings tried before, so that a search that was killed replays them instead of computing them."""

    def __init__(self, path: Path | None, facts: dict[str, Any]) -> None:
        self.path, self.facts = path, facts
        self.known = {row["key"]: row["accuracy"] for row in read_jsonl(path)} if path and path.exists() else {}

    def __call__(self, setting: Setting, compute: Callable[[], float]) -> float:
        key = hashlib.sha256(json.dumps([self.facts, setting], sort_keys=True).encode()).hexdigest()[:16]
        if key not in self.known:
            self.known[key] = compute()
            if self.path:
                append_jsonl(self.path, {"key": key, "setting": setting, "accuracy": self.known[key], **self.facts})
        return self.known[key]


def _take(split: Split, rows, kind: str) -> Split:
    """Those rows as float32; of unit length for SGD."""
    x = np.asarray(split[0][rows], dtype=np.float32)
    if kind == "sgd":
        x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    return x, np.asarray(split[1][rows])


def _accuracy(predict: Callable[[np.ndarray], np.ndarray], split: Split) -> float:
    return 100 * float((predict(split[0]) == split[1]).mean())


# ===== logistic regression =====


def search_suite_logreg(train: Split, held: Split, trials: Trials, seed: int, device: Any) -> tuple[Setting, float]:
    def judge(setting: Setting) -> float:
        return trials(setting, lambda: _accuracy(fit_sklearn(train, setting, seed, device), held))

    return search_suite_c(judge, seed)


def search_suite_c(judge: Callable[[Setting], float], seed: int) -> tuple[Setting, float]:
    """The suite's choice of C and its accuracy, where JUDGE tells the held-out accuracy at one."""
    return _tpe(lambda trial: {"C": trial.suggest_float("C", *C_RANGE, log=True)}, judge, seed)


def _tpe(suggest: Callable[[Any], Setting], judge: Callable[[Setting], float], seed: int) -> tuple[Setting, float]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    study.optimize(lambda trial: judge(suggest(trial)), n_trials=TRIALS)
    return dict(study.best_params), float(study.best_value)


def fit_sklearn(train: Split, setting: Setting, seed: int, device: Any) -> Callable[[np.ndarray], np.ndarray]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=setting["C"], max_iter=MAX_ITER, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # at the largest C 2000 iterations do not converge
        model.fit(*train)
    return model.predict


def search_path(train: Split, held: Split, trials: Trials, seed: int, device: Any) -> tuple[Setting, float]:
    """Decades of C upwards, each from the last solution, until the held-out accuracy stops rising; then half decades.

    Of accuracies within NOTICED the smallest C: the stronger penalty.
    """
    low, high = (math.log10(bound) for bound in C_RANGE)
    path = tuple(np.linspace(low, high, PATH_POINTS).tolist())
    solver = cache(lambda: LogisticSolver(*train, device))  # built at the first value that is not remembered

    @cache
    def solution(exponents: tuple[float, ...]) -> LogisticSolution:
        """At the last of EXPONENTS, reached through those before it: the same after an interruption."""
        start = solution(exponents[:-1]) if len(exponents) > 1 else None
        return solver().fit(10.0 ** exponents[-1], start)

    def judge(exponents: tuple[float, ...]) -> float:
        return trials({"C": 10.0 ** exponents[-1]}, lambda: _accuracy(solution(exponents), held))

    best, chosen = -1.0, path[:1]
    for count in range(1, PATH_POINTS + 1):
        accuracy = judge(path[:count])
        if accuracy > best + NOTICED:
            best, chosen = accuracy, path[:count]
        if count - len(chosen) == PATIENCE and best > 0:
            break
    centre = chosen
    for exponent in (centre[-1] - 0.5, centre[-1] + 0.5):
        if low <= exponent <= high and (accuracy := judge((*centre, exponent))) > best + NOTICED:
            best, chosen = accuracy, (*centre, exponent)
    return {"C": 10.0 ** chosen[-1]}, best


def fit_logreg(train: Split, setting: Setting, seed: int, device: Any) -> Callable[[np.ndarray], np.ndarray]:
    return LogisticSolver(*train, device).solve(setting["C"])


@dataclass(frozen=True, eq=False)
class LogisticSolution:
    """weights (D, K) and bias (K,) in the solver's coordinates; called with features (N, D) it gives labels (N,)."""

    weights: torch.Tensor
    bias: torch.Tensor
    coefficients: np.ndarray  # (D, K), of the features as they came
    offset: np.ndarray  # (K,)
    classes: np.ndarray  # (K,)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return self.classes[_linear(self.coefficients, self.offset)(x)]


class LogisticSolver:
    """Multinomial logistic regression on one set of features, for one C after the other.

    Minimises scikit-learn's objective, C sum_i loss_i(W, b) + |W|^2 / 2, by L-BFGS. Two changes of variables leave the
    minimum where it is and cut the iterations to a fraction: the features are centred (the bias takes the shift), since
    the mean of ReLU features is their largest direction by far; and they are turned onto the principal axes, where the
    Hessian is nearly diagonal, about p(1-p) times the variance plus the penalty, and can be scaled away.
    """

    def __init__(self, x: np.ndarray, y: np.ndarray, device: Any = "cpu") -> None:
        import torch

        self.classes = np.unique(y)
        labels = torch.from_numpy(np.searchsorted(self.classes, y))
        values = torch.from_numpy(np.asarray(x, dtype=np.float64)).to(device)
        self.mean = values.mean(0)
        values = values - self.mean
        variances, self.axes = torch.linalg.eigh(values.T @ values / len(x))
        self.variances = variances.clamp(min=0)
        self.x = values @ self.axes  # (N, D)
        self.one_hot = torch.zeros_like(self.x[:, : len(self.classes)])  # (N, K)
        self.one_hot.scatter_(1, labels[:, None].to(device), 1.0)
        self.single = self.x.float(), self.one_hot.float()

    def solve(self, c: float) -> LogisticSolution:
        """The minimum at C, within 1e-4 of the objective's value: found in float32, then made exact."""
        return self.fit(c, self.fit(c), exact=True)

    def fit(self, c: float, start: LogisticSolution | None = None, exact: bool = False) -> LogisticSolution:
        """The minimum at C, sought from START, or from 0.

        Ends when ROUND iterations lower the objective by less than the share TOLERANCE. In float32 unless EXACT: enough
        to compare accuracies, at half the price; but a weak penalty leaves losses so small that it cannot tell them
        apart, and the objective ends up to 1 % above its minimum.
        """
        import torch
        from torch.nn.functional import log_softmax

        x, one_hot = (self.x, self.one_hot) if exact else self.single
        n, k = one_hot.shape
        penalty = 1.0 / (c * n)  # the objective is divided by C n
        weights = start.weights.to(x.dtype) if start else x.new_zeros(x.shape[1], k)
        bias = start.bias.to(x.dtype) if start else x.new_zeros(k)
        if k == 1:
            return self._solution(weights, bias)
        p = log_softmax(torch.addmm(bias, x, weights), 1).exp_()
        curvature = float((p * (1 - p)).mean()) + 1e-9
        scale = (curvature * self.variances + penalty).rsqrt().to(x.dtype)[:, None]  # (D, 1)
        bias_scale = curvature**-0.5
        scaled, scaled_bias = (weights / scale).requires_grad_(), (bias / bias_scale).requires_grad_()

        @torch.no_grad()
        def closure() -> torch.Tensor:
            # The gradient by hand: two products instead of autograd's three and its copies. The clamp keeps numbers
            # too small for float32's usual format, which processors multiply slowly, out of them.
            w = scaled * scale
            log_p = log_softmax(torch.addmm(scaled_bias * bias_scale, x, w), 1).clamp_(min=-60)  # (N, K)
            loss = -(log_p * one_hot).sum(dtype=torch.float64) / n
            loss += 0.5 * penalty * w.square().sum(dtype=torch.float64)
            error = log_p.exp_().sub_(one_hot).div_(n)
            scaled.grad = torch.addmm(w, x.T, error, beta=penalty).mul_(scale)
            scaled_bias.grad = error.sum(0).mul_(bias_scale)
            return loss

        optimizer = torch.optim.LBFGS(
            [scaled, scaled_bias],
            max_iter=ROUND,
            tolerance_grad=0,
            tolerance_change=0,
            history_size=20,
            line_search_fn="strong_wolfe",
        )
        before = math.inf
        for _ in range(MAX_ITER // ROUND):
            now = float(optimizer.step(closure))  # the objective before this round
            if before - now < TOLERANCE * now:
                break
            before = now
        return self._solution(scaled.detach() * scale, scaled_bias.detach() * bias_scale)

    def _solution(self, weights: torch.Tensor, bias: torch.Tensor) -> LogisticSolution:
        coefficients = self.axes @ weights.double()
        offset = bias.double() - self.mean @ coefficients
        arrays = coefficients.float().cpu().numpy(), offset.float().cpu().numpy()
        return LogisticSolution(weights, bias, arrays[0], arrays[1], self.classes)


# ===== SGD =====


def search_suite_sgd(train: Split, held: Split, trials: Trials, seed: int, device: Any) -> tuple[Setting, float]:
    return _tpe(
        lambda trial: {
            "lr": trial.suggest_float("lr", *LR_RANGE, log=True),
            "weight_decay": trial.suggest_float("weight_decay", *WEIGHT_DECAY_RANGE, log=True),
        },
        lambda setting: trials(setting, lambda: _accuracy(fit_sgd(train, setting, seed, device), held)),
        seed,
    )


def search_stages(train: Split, held: Split, trials: Trials, seed: int, device: Any) -> tuple[Setting, float]:
    """Successive halving: all settings for a few epochs, the best of them for more (a cosine to 0 each time)."""
    settings = [{"lr": lr, "weight_decay": decay} for lr, decay in FAST_GRID]
    best = 0.0
    for count, epochs in STAGES:
        settings = settings[:count]
        predictors: list[Callable[[np.ndarray], np.ndarray]] = []  # trained together, when one is not remembered

        def judge(index: int, settings=settings, epochs=epochs, predictors=predictors) -> float:
            predictors[:] = predictors or train_together(train, settings, seed, device, epochs)
            return _accuracy(predictors[index], held)

        accuracies = [
            trials(setting | {"epochs": epochs}, partial(judge, index)) for index, setting in enumerate(settings)
        ]
        order = sorted(range(len(settings)), key=lambda index: -accuracies[index])
        settings, best = [settings[index] for index in order], max(accuracies)
    return settings[0], best


def fit_sgd(train: Split, setting: Setting, seed: int, device: Any) -> Callable[[np.ndarray], np.ndarray]:
    return train_together(train, [setting], seed, device, EPOCHS)[0]


def train_together(
    train: Split, settings: Sequence[Setting], seed: int, device: Any, epochs: int
) -> list[Callable[[np.ndarray], np.ndarray]]:
    """Linear classifiers with bias, one a setting, by SGD over the same batches: one pass over the data serves all.

    Features (N, D), weights (S, D, K). A setting that diverges to NaN predicts class 0: it loses by itself.
    """
    import torch
    from torch.nn.functional import log_softmax
    from tqdm import tqdm

    x, y = torch.from_numpy(train[0]), torch.from_numpy(np.asarray(train[1], dtype=np.int64)).to(device)
    if torch.device(device).type == "cuda" and x.numel() * 4 < 0.6 * torch.cuda.mem_get_info(device)[0]:
        x = x.to(device)
    n, k = len(x), int(y.max()) + 1
    generator = torch.Generator().manual_seed(seed)
    start = INITIAL_STD * torch.randn(x.shape[1], k, generator=generator)
    weights = start.to(device).repeat(len(settings), 1, 1)  # (S, D, K)
    bias = torch.zeros(len(settings), 1, k, device=device)
    moving = [torch.zeros_like(weights), torch.zeros_like(bias)]
    lr = torch.tensor([setting["lr"] for setting in settings], device=device)[:, None, None]
    decay = torch.tensor([setting["weight_decay"] for setting in settings], device=device)[:, None, None]
    steps = epochs * math.ceil(n / BATCH)
    step = 0
    title = f"linear probe, {len(settings)} settings"
    for _ in tqdm(range(epochs), desc=title, unit="epoch", leave=False, disable=None):
        for rows in torch.randperm(n, generator=generator).split(BATCH):
            batch = x[rows.to(x.device)].to(device)  # (B, D)
            error = log_softmax(batch @ weights + bias, 2).exp_()  # (S, B, K)
            error[:, torch.arange(len(rows)), y[rows.to(y.device)]] -= 1
            error /= len(rows)
            # SGD as torch.optim.SGD has it: decay joins the gradient, momentum without dampening
            gradients = [batch.T @ error + decay * weights, error.sum(1, keepdim=True) + decay * bias]
            rate = lr * (0.5 * (1 + math.cos(math.pi * step / steps)))
            for parameter, velocity, gradient in zip((weights, bias), moving, gradients, strict=True):
                velocity.mul_(MOMENTUM).add_(gradient)
                parameter.sub_(rate * velocity)
            step += 1

    return [_linear(weights[index].cpu().numpy(), bias[index].cpu().numpy()) for index in range(len(settings))]


def _linear(weights: np.ndarray, offset: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    def predict(x: np.ndarray) -> np.ndarray:
        return np.nan_to_num(x @ weights + offset, nan=-np.inf).argmax(1)

    return predict
