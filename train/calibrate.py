"""Probabilities that mean what they say, and decisions that serve a metric: temperature, reliability, thresholds per class.

All are fitted on probabilities of images that the model did not learn from (out-of-fold), are deterministic, and are plain numbers
afterwards. The trade-off: what is fitted here scores too well on the very rows it was fitted on, so :class:`Ensemble` fits and
scores on different rows. Thresholds move many decisions of rare classes on the evidence of few images; look at the nested score.

>>> t = fit_temperature(labels, probs); probs = temper(probs, t); factors = fit_thresholds(labels, probs, "macro_f1")
>>> decided = decide(probs, factors, multilabel=False)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from fastload.errors import DataError, UsageError
from fastload.train import metrics

COLDEST, HOTTEST = 0.05, 20.0
FACTORS = 2.0 ** np.array(
    sorted(np.arange(-16, 17) / 4, key=abs)
)  # 1/16 to 16; the first of equals is nearest to 1
CANDIDATES = 32


def fit_temperature(labels: np.ndarray, probs: np.ndarray) -> float:
    """The temperature that minimises the log loss of :func:`temper` (Guo et al. 2017), from 0.05 to 20; above 1: overconfident.

    ``labels``: (N,) int in [0, C), or (N, C) of 0 and 1 where an image may have several; ``probs``: (N, C) in [0, 1].
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import logsumexp

    _check(labels, probs)
    logits = _logits(probs, labels.ndim == 2)
    if labels.ndim == 2:
        signed = np.where(labels > 0.5, -logits, logits)

        def loss(log_t: float) -> float:
            return float(np.logaddexp(0, signed / np.exp(log_t)).mean())
    else:
        true = logits[np.arange(len(labels)), labels]

        def loss(log_t: float) -> float:
            t = np.exp(log_t)
            return float((logsumexp(logits / t, axis=1) - true / t).mean())

    # The loss is convex in 1/t, so there is one minimum.
    found = minimize_scalar(
        loss, bounds=(np.log(COLDEST), np.log(HOTTEST)), method="bounded", options={"xatol": 1e-5}
    )
    return float(np.exp(found.x))


def temper(probs: np.ndarray, t: float, multilabel: bool = False) -> np.ndarray:
    """(N, C) float32: softmax of the log-probabilities (sigmoid of the logits, for several labels) divided by ``t``."""
    from scipy.special import expit, softmax

    logits = _logits(probs, multilabel) / t
    return np.asarray(expit(logits) if multilabel else softmax(logits, axis=1), np.float32)


def reliability(labels: np.ndarray, probs: np.ndarray, bins: int = 15) -> dict[str, Any]:
    """How often a decision made with some confidence is right, and the expected calibration error ``ece`` (Naeini et al. 2015).

    ``edges``: (bins + 1,) from 0 to 1, a bin holds its upper edge; ``count``: (bins,) int64; ``confidence`` and ``accuracy``: (bins,)
    means, NaN where nothing is. With several labels every image and class counts: its probability, and how often it has the class.
    """
    _check(labels, probs)
    if labels.ndim == 2:
        confidence, right = probs.ravel().astype(np.float64), labels.ravel() > 0.5
    else:
        confidence, right = probs.max(axis=1).astype(np.float64), probs.argmax(axis=1) == labels
    edges = np.linspace(0, 1, bins + 1)
    place = np.searchsorted(edges[1:-1], confidence)
    count = np.bincount(place, minlength=bins)
    some = np.where(count > 0, count, np.nan)
    means = [np.bincount(place, values, bins) / some for values in (confidence, right)]
    gap = np.nan_to_num(np.abs(means[0] - means[1]))
    return {
        "ece": float((gap * count).sum() / count.sum()), "edges": edges, "count": count,
        "confidence": means[0], "accuracy": means[1],
    }  # fmt: skip


def fit_thresholds(labels: np.ndarray, probs: np.ndarray, metric: metrics.Metric = "macro_f1") -> np.ndarray:
    """(C,) float64 for :func:`decide` that maximise a metric of decisions, one class after the other until none gains.

    One label an image: factors from 1/16 to 16 that are multiplied into the probabilities. Several: the probability above which an
    image has the class. Of equally good values the one nearest to doing nothing (1, or 0.5) is taken.
    """
    _check(labels, probs)
    if isinstance(metric, str):
        metrics.check_metric(metric)
    name = metrics.ALIASES.get(str(metric), str(metric))
    if name not in metrics.DECISIONS and name != "quadratic_kappa":
        raise UsageError(
            f"thresholds change decisions, which this metric does not look at; choose for example 'macro_f1', got {metric!r}"
        )
    several = labels.ndim == 2
    found = np.full(probs.shape[1], 0.5 if several else 1.0)
    top = metrics.score(metric, labels, probs, decide(probs, found, several))
    for _ in range(10):  # it ends much earlier; a bound costs nothing
        before = top
        for k in range(len(found)):
            for value, decided in (_try_threshold if several else _try_factor)(
                labels, probs, found.copy(), k
            ):
                new = metrics.score(metric, labels, probs, decided)
                if new > top + 1e-12 or np.isnan(top):
                    top, found[k] = new, value
        if not top > before:
            break
    return found


def decide(probs: np.ndarray, thresholds: np.ndarray, multilabel: bool) -> np.ndarray:
    """(N,) int64 class numbers, or (N, C) bool, of ``probs`` (N, C) under ``thresholds`` (C,) of :func:`fit_thresholds`."""
    return probs > thresholds if multilabel else (probs * thresholds).argmax(axis=1)


def _try_factor(
    labels: np.ndarray, probs: np.ndarray, factors: np.ndarray, k: int
) -> Iterator[tuple[float, np.ndarray]]:
    """Each factor of class ``k`` and what it decides: ``k``, or the best of the others, which stays the same."""
    scaled = probs * factors
    scaled[:, k] = -1
    other = scaled.argmax(axis=1)
    bar = scaled[np.arange(len(probs)), other]
    for factor in FACTORS:
        own = probs[:, k] * factor
        yield float(factor), np.where((own > bar) | ((own == bar) & (k < other)), k, other)


def _try_threshold(
    labels: np.ndarray, probs: np.ndarray, thresholds: np.ndarray, k: int
) -> Iterator[tuple[float, np.ndarray]]:
    """F1 is best just below the probability of an image that has the class, so a spread of those is tried."""
    decided = decide(probs, thresholds, True)
    values = np.unique(probs[:, k].astype(np.float64))
    having = np.unique(probs[labels[:, k] > 0.5, k].astype(np.float64))
    if not len(having):
        return
    chosen = having[np.unique(np.linspace(0, len(having) - 1, CANDIDATES).round().astype(np.int64))]
    below = np.concatenate([[0.0], values])[np.searchsorted(values, chosen)]
    for value in sorted((chosen + below) / 2, key=lambda value: abs(value - 0.5)):
        decided[:, k] = probs[:, k] > value
        yield float(value), decided


def _logits(probs: np.ndarray, multilabel: bool) -> np.ndarray:
    """Log-probabilities, or log-odds, in float64 and finite."""
    p = np.clip(probs.astype(np.float64), metrics.TINY, None)
    return np.log(p) - np.log(np.clip(1 - p, 1e-12, None)) if multilabel else np.log(p)


def _check(labels: np.ndarray, probs: np.ndarray) -> None:
    if not len(probs):
        raise DataError("calibration needs images with labels, got none")
    if not np.isfinite(probs).all():
        raise DataError(
            f"calibration needs probabilities, got {int((~np.isfinite(probs)).any(axis=1).sum())} images with NaN"
        )
