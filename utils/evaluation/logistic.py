"""Multinomial logistic regression, exact and fast, and the linear classifier that comes out of a probe."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy, log_softmax, one_hot

from utils.metrics import CHUNK_ROWS  # with iNaturalist's 8142 classes the logits of so many rows are 270 MB

TOLERANCE, ROUND = 1e-4, 25  # of L-BFGS: a smaller gain in so many iterations is the end
MAX_ROUNDS = 80  # 2000 iterations, as scikit-learn gets in t-ReX's suite


@dataclass(frozen=True, eq=False)
class LinearClassifier:
    """weights (D, K), offset (K,), on their device; classes (K,). Called with features (N, D) it gives labels (N,)."""

    weights: torch.Tensor
    offset: torch.Tensor
    classes: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        best = [logits.nan_to_num(nan=-math.inf).argmax(1) for logits in self._logits(x)]
        return self.classes[np.concatenate([part.cpu().numpy() for part in best])]

    def loss(self, x: np.ndarray, y: np.ndarray) -> float:
        """Mean cross-entropy of features whose labels Y are all among the classes."""
        labels = torch.from_numpy(np.searchsorted(self.classes, y)).to(self.offset.device).split(CHUNK_ROWS)
        pairs = zip(self._logits(x), labels, strict=True)
        return sum(float(cross_entropy(*pair, reduction="sum")) for pair in pairs) / len(y)

    def _logits(self, x: np.ndarray) -> Iterator[torch.Tensor]:
        for start in range(0, len(x), CHUNK_ROWS):
            part = torch.from_numpy(x[start : start + CHUNK_ROWS]).to(self.offset.device)
            yield torch.addmm(self.offset, part, self.weights)


@dataclass(frozen=True, eq=False)
class LogisticSolution:
    """weights (R, K) and bias (K,) in the solver's coordinates, where the next fit starts, and what they amount to."""

    weights: torch.Tensor
    bias: torch.Tensor
    classifier: LinearClassifier  # of the features as they came


class LogisticSolver:
    """Multinomial logistic regression on one set of features, for one C after the other.

    Minimises scikit-learn's objective, C sum_i loss_i(W, b) + |W|^2 / 2, by L-BFGS. Two changes of variables leave the
    minimum where it is and cut the iterations to a fraction: the features are centred (the bias takes the shift), since
    the mean of ReLU features is their largest direction by far; and they are turned onto the principal axes, where the
    Hessian is nearly diagonal, about p(1-p) times the variance plus the penalty, and can be scaled away.
    """

    def __init__(self, x: np.ndarray, y: np.ndarray, device: Any = "cpu") -> None:
        device = "cpu" if torch.device(device).type == "mps" else device  # MPS has no float64
        self.classes, labels = np.unique(y, return_inverse=True)
        values = torch.from_numpy(np.asarray(x, dtype=np.float64)).to(device)
        self.mean = values.mean(0)
        values = values - self.mean
        variances, axes = torch.linalg.eigh(values.T @ values / len(x))
        # The first vary by no more than the rounding of the products: their weights would be 0.
        flat = int((variances < torch.finfo(variances.dtype).eps * len(variances) * variances[-1]).sum())
        self.variances, self.axes = variances[flat:].clamp(min=0), axes[:, flat:]  # (R,), (D, R): R < N
        self.x = values @ self.axes  # (N, R)
        self.one_hot = one_hot(torch.from_numpy(labels).to(device), len(self.classes)).double()  # (N, K)
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
        x, labels = (self.x, self.one_hot) if exact else self.single  # (N, R), (N, K)
        n, k = labels.shape
        penalty = 1.0 / (c * n)  # the objective is divided by C n
        weights = start.weights.to(x.dtype) if start else x.new_zeros(x.shape[1], k)
        bias = start.bias.to(x.dtype) if start else x.new_zeros(k)
        if k == 1:
            return self._solution(weights, bias)
        p = log_softmax(torch.addmm(bias, x, weights), 1).exp_()
        curvature = float((p * (1 - p)).mean()) + 1e-9
        scale = (curvature * self.variances + penalty).rsqrt().to(x.dtype)[:, None]  # (R, 1)
        bias_scale = curvature**-0.5
        scaled, scaled_bias = (weights / scale).requires_grad_(), (bias / bias_scale).requires_grad_()

        @torch.no_grad()
        def closure() -> torch.Tensor:
            # The gradient by hand: two products instead of autograd's three and its copies. The clamp avoids float32
            # denormals, which are slow on CPUs.
            w = scaled * scale
            log_p = log_softmax(torch.addmm(scaled_bias * bias_scale, x, w), 1).clamp_(min=-60)  # (N, K)
            loss = -(log_p * labels).sum(dtype=torch.float64) / n
            loss += 0.5 * penalty * w.square().sum(dtype=torch.float64)
            error = log_p.exp_().sub_(labels).div_(n)
            scaled.grad = torch.addmm(w, x.T, error, beta=penalty).mul_(scale)
            scaled_bias.grad = error.sum(0).mul_(bias_scale)
            return loss

        limits = {"max_iter": ROUND, "history_size": 20, "tolerance_grad": 0, "tolerance_change": 0}
        optimizer = torch.optim.LBFGS([scaled, scaled_bias], line_search_fn="strong_wolfe", **limits)
        before = math.inf
        for _ in range(MAX_ROUNDS):
            now = float(optimizer.step(closure))  # the objective before this round
            if before - now < TOLERANCE * now:
                break
            before = now
        return self._solution(scaled.detach() * scale, scaled_bias.detach() * bias_scale)

    def _solution(self, weights: torch.Tensor, bias: torch.Tensor) -> LogisticSolution:
        coefficients = self.axes @ weights.double()
        offset = bias.double() - self.mean @ coefficients
        return LogisticSolution(weights, bias, LinearClassifier(coefficients.float(), offset.float(), self.classes))
