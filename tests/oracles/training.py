"""What the authors' public trainer (t-ReX, ICLR 2023) computes, written down plainly from the paper and its options.

NumPy in float64, one obvious statement after the other, nothing shared with the project. None of it is their code.
"""

from __future__ import annotations

import numpy as np


def classifier_start(classes: int, features: int, rng: np.random.Generator) -> np.ndarray:
    """(K, D) class weights: a linear layer's usual start, uniform within +-1 / sqrt(D)."""
    return rng.uniform(-1, 1, (classes, features)) / np.sqrt(features)


def cosine_softmax_gradient(x: np.ndarray, w: np.ndarray, labels: np.ndarray, temperature: float) -> np.ndarray:
    """(K, D) gradient of the mean cross-entropy of softmax(cos(x, w_k) / temperature) by the rows w_k."""
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    lengths = np.linalg.norm(w, axis=1, keepdims=True)
    unit = w / lengths
    logits = x @ unit.T / temperature
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    probabilities[np.arange(len(labels)), labels] -= 1
    towards = probabilities.T @ x / (len(labels) * temperature)  # gradient with respect to the unit rows
    return (towards - (towards * unit).sum(1, keepdims=True) * unit) / lengths  # a row's length does not matter


def train_classifier(
    w: np.ndarray, batches: list[tuple[np.ndarray, np.ndarray]], rates: np.ndarray, temperature: float
) -> np.ndarray:
    """Rows after SGD with momentum 0.9 and weight decay 1e-4, one step a batch of (features, labels)."""
    velocity = np.zeros_like(w)
    for (x, labels), rate in zip(batches, rates, strict=True):
        velocity = 0.9 * velocity + cosine_softmax_gradient(x, w, labels, temperature) + 1e-4 * w
        w = w - rate * velocity
    return w


def degrees_turned(before: np.ndarray, after: np.ndarray) -> float:
    """Mean angle between the rows of two (K, D) arrays."""
    cosine = (before * after).sum(1) / np.linalg.norm(before, axis=1) / np.linalg.norm(after, axis=1)
    return float(np.degrees(np.arccos(np.clip(cosine, -1, 1))).mean())


def learning_rates(peak: float, final: float, epochs: int, steps_per_epoch: int, warmup_epochs: int) -> np.ndarray:
    """A rate for every step: a straight line from 0 to the peak over the warm-up, then half a cosine towards final."""
    warmup = np.linspace(0, peak, warmup_epochs * steps_per_epoch)
    left = (epochs - warmup_epochs) * steps_per_epoch
    cosine = [final + (peak - final) * (1 + np.cos(np.pi * step / left)) / 2 for step in range(left)]
    return np.concatenate([warmup, cosine])
