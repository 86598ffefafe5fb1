"""Accuracy, macro-F1 and log loss from labels and probabilities: small pure functions on numpy arrays.

>>> summary(labels, probs)
{'loss': 0.31, 'accuracy': 0.91, 'macro_f1': 0.88}
"""

from __future__ import annotations

import numpy as np


def confusion(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """(C, C) int64 counts: row true class, column predicted class. ``labels`` and ``predicted``: (N,) int in [0, C)."""
    pairs = labels.astype(np.int64) * classes + predicted.astype(np.int64)
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def accuracy(table: np.ndarray) -> float:
    """Share of the diagonal of a confusion table, in [0, 1]."""
    return float(np.trace(table) / max(1, table.sum()))


def macro_f1(table: np.ndarray) -> float:
    """Unweighted mean of the F1 of every class that occurs as a label or as a prediction, in [0, 1].

    A class that occurs nowhere has no F1 and is left out, as scikit-learn's ``f1_score(average="macro")`` does.
    """
    hits = np.diag(table).astype(np.float64)
    both = table.sum(axis=0) + table.sum(axis=1)
    present = both > 0
    return float((2 * hits[present] / both[present]).mean()) if present.any() else 0.0


def log_loss(labels: np.ndarray, probs: np.ndarray) -> float:
    """Mean negative log-probability of the true class; probabilities are held off 0 by the smallest float32."""
    true = probs[np.arange(len(labels)), labels].astype(np.float64)
    return float(-np.log(np.maximum(true, np.finfo(np.float32).tiny)).mean())


def summary(labels: np.ndarray, probs: np.ndarray) -> dict[str, float]:
    """``loss``, ``accuracy`` and ``macro_f1`` of (N, C) probabilities against (N,) labels. NaN stays NaN in ``loss``."""
    table = confusion(labels, probs.argmax(axis=1), probs.shape[1])
    return {"loss": log_loss(labels, probs), "accuracy": accuracy(table), "macro_f1": macro_f1(table)}
