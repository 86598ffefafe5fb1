"""Classes of unequal size: weights for the loss, or weights with which images are drawn. No row is ever copied.

Weights in the loss keep every image at one view an epoch; drawing shows rare images more often and common ones less. Both at
once would count the rarity twice. Count in the images that are trained on, not in those held out.

>>> class_weights(labels, classes=3, kind="balanced", beta=0.0); sample_weights(labels, kind="sqrt")
"""

from __future__ import annotations

import numpy as np


def class_weights(labels: np.ndarray, classes: int, kind: str, beta: float) -> np.ndarray | None:
    """(C,) float32 weights of the classes in the loss, or None for ``kind`` "none".

    ``labels``: (N,) int64 class numbers, or (N, C) float32 multi-hot. "balanced": 1 / n for n images of the class; "effective":
    (1 - beta) / (1 - beta ** n), between equal weights (beta 0) and balanced ones (beta near 1; Cui et al. 2019). Scaled so
    that the mean over all labels given is 1, which keeps the learning rate meaningful; a class without images has weight 1.
    """
    if kind == "none":
        return None
    counts = labels.sum(axis=0) if labels.ndim == 2 else np.bincount(labels, minlength=classes)
    counts = counts.astype(np.float64)
    found = counts > 0
    n = counts[found]
    raw = 1 / n if kind == "balanced" else (1 - beta) / (1 - beta**n)
    weights = np.ones(classes)
    weights[found] = raw * n.sum() / (raw * n).sum()
    return weights.astype(np.float32)


def sample_weights(labels: np.ndarray, kind: str) -> np.ndarray | None:
    """(N,) float64 weights to draw images with, or None for ``kind`` "none" and "bootstrap", which prefer no image.

    ``labels`` as for :func:`class_weights`. "balanced": 1 / n, so that classes are drawn equally often; "sqrt": 1 / sqrt(n).
    Of several labels the rarest one decides: a mean would let common labels beside it hide a rare one. Images
    without any label are a class of their own.
    """
    if kind in ("none", "bootstrap"):
        return None
    if labels.ndim == 2:
        labels = np.column_stack([labels, labels.sum(axis=1) == 0]) > 0
        rarity = np.where(labels, labels.sum(axis=0), np.inf).min(axis=1)
    else:
        rarity = np.bincount(labels)[labels].astype(np.float64)
    return 1 / (rarity if kind == "balanced" else np.sqrt(rarity))
