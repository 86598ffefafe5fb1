"""How several models' probabilities become one: eight ways, fitted on some rows and applied to any.

A :class:`Blend` is plain numbers, so that it can be saved; :func:`fit` makes one from ``stack`` (M, N, C) float32, one layer a
member. Which way is best, and how good it is, is the business of :mod:`fastload.train.ensemble`, which fits on other rows than it
scores. The trade-off: everything is fitted for one metric, by searches that are good and not exhaustive.

>>> fit("weighted", stack, labels, "macro_f1").mix(stack, several=False)
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np

from fastload.train import metrics
from fastload.train.calibrate import decide, temper
from fastload.train.predictions import Metric

# From simple to complex: of equal scores the first is taken.
METHODS = ("best", "soft", "hard", "geometric", "rank", "weighted", "bagged", "stacking")
UNFITTED = ("soft", "hard", "geometric", "rank")
BAGS, PICKS, PATIENCE = 10, 20, 3  # of "bagged": bootstrap samples, most picks in each, picks without a gain
STEPS = (0.5, 0.25, 0.1, 0.05, 0.02)  # of "weighted": how far the weights move towards one member
FLOOR = 1e-6  # probabilities below are equally impossible to geometric means and stacking


@dataclass(frozen=True)
class Blend:
    """A fitted way to put members together, all plain numbers.

    ``weights``: of the members (None for stacking); ``coef`` and ``intercept``: of stacking, (C, M * C) and (C,), with several
    labels (C, M) and (C,); ``temperature`` and ``thresholds``: see :mod:`fastload.train.calibrate`.
    """

    method: str
    weights: list[float] | None = None
    coef: list[list[float]] | None = None
    intercept: list[float] | None = None
    temperature: float | None = None
    thresholds: list[float] | None = None

    def mix(self, stack: np.ndarray, several: bool) -> np.ndarray:
        """(N, C) float32 probabilities from ``stack`` (M, N, C) float32, one layer a member."""
        if self.method == "stacking":
            return _apply_stacking(np.array(self.coef), np.array(self.intercept), stack, several)
        weights = np.array(self.weights, np.float32)
        if self.method == "best":
            return np.asarray(stack[int(weights.argmax())])
        if self.method == "hard":
            # Equal votes are decided by the mean probability, which is too small to decide anything else.
            votes = stack > 0.5 if several else np.eye(stack.shape[2], dtype=bool)[stack.argmax(axis=2)]
            return np.tensordot(weights, votes + 1e-3 * stack, 1).astype(np.float32) / np.float32(1.001)
        if self.method == "geometric":
            logs = np.log(np.maximum(stack, FLOOR))
            if several:
                from scipy.special import expit

                odds = logs - np.log(np.maximum(1 - stack, FLOOR))
                return np.asarray(expit(np.tensordot(weights, odds, 1)), np.float32)
            mean = np.exp(np.tensordot(weights, logs, 1))
            return mean / mean.sum(axis=1, keepdims=True)
        if self.method == "rank":
            from scipy.stats import rankdata

            mean = np.tensordot(weights, rankdata(stack, axis=1) / stack.shape[1], 1).astype(np.float32)
            return mean if several else mean / mean.sum(axis=1, keepdims=True)
        return np.tensordot(weights, stack, 1)

    def finish(self, probs: np.ndarray, several: bool) -> tuple[np.ndarray, np.ndarray | None]:
        """Mixed probabilities with the temperature, and what was decided where not the largest of them (or 0.5) decides."""
        if self.temperature is not None:
            probs = temper(probs, self.temperature, several)
        return probs, None if self.thresholds is None else decide(probs, np.array(self.thresholds), several)


def fit(
    method: str,
    stack: np.ndarray,
    labels: np.ndarray,
    metric: Metric,
    groups: np.ndarray | None = None,
    seed: int = 0,
) -> Blend:
    """The blend of ``stack`` (M, N, C) that suits ``labels`` best. ``groups``: (N,), drawn together by "bagged"."""
    count = len(stack)
    if method == "stacking":
        coef, intercept = _fit_stacking(stack, labels)
        return Blend(method, coef=coef.tolist(), intercept=intercept.tolist())
    if method == "best":
        weights = np.eye(count)[int(np.argmax([_gain(metric, labels, probs) for probs in stack]))]
    elif method == "weighted":
        weights = _search_weights(stack, labels, metric)
    elif method == "bagged":
        weights = _select(stack, labels, metric, groups, seed)
    else:
        weights = np.full(count, 1 / count)
    return Blend(method, weights.tolist())


def _gain(metric: Metric, labels: np.ndarray, probs: np.ndarray, decided: np.ndarray | None = None) -> float:
    """The score, turned so that more is better; NaN is worst."""
    value = metrics.score(metric, labels, probs, decided)
    return -math.inf if math.isnan(value) else value if metrics.higher_is_better(metric) else -value


def _search_weights(stack: np.ndarray, labels: np.ndarray, metric: Metric) -> np.ndarray:
    """(M,) weights on the simplex: the most likely mixture of the members, then steps towards one that raise ``metric``.

    The start is the global optimum of the log loss (EM for the proportions of a mixture), so a useless member begins at nearly 0;
    equal weights are the start where they score higher.
    """
    if labels.ndim == 2:
        likely = np.where(labels > 0.5, stack, 1 - stack).reshape(len(stack), -1)
    else:
        likely = stack[:, np.arange(len(labels)), labels]
    likely = np.maximum(likely, FLOOR).astype(np.float64)
    equal = np.full(len(stack), 1 / len(stack))
    weights = equal
    for _ in range(100):
        weights = weights * (likely / (weights @ likely)).mean(axis=1)
    starts = [weights / weights.sum(), equal]
    mixed = [np.tensordot(w.astype(np.float32), stack, 1) for w in starts]
    gains = [_gain(metric, labels, mix) for mix in mixed]
    first = int(np.argmax(gains))
    weights, mix, top = starts[first], mixed[first], gains[first]
    for step in STEPS:
        moved = True
        while moved:
            moved = False
            for k in range(len(stack)):
                trial = (1 - step) * mix + step * stack[k]
                gain = _gain(metric, labels, trial)
                if gain > top + 1e-9:
                    top, mix, moved = gain, trial, True
                    weights = (1 - step) * weights + step * np.eye(len(stack))[k]
    return weights


def _select(
    stack: np.ndarray, labels: np.ndarray, metric: Metric, groups: np.ndarray | None, seed: int
) -> np.ndarray:
    """(M,) weights: greedy forward selection with replacement (Caruana et al. 2004), mean over bootstrap samples of the rows."""
    rng = np.random.default_rng(seed)
    counts = np.zeros(len(stack))
    numbers = None if groups is None else np.unique(groups, return_inverse=True)[1].reshape(-1)
    for _ in range(BAGS):
        rows = np.repeat(np.arange(len(labels)), metrics.resample(numbers, len(labels), rng))
        part, true = stack[:, rows], labels[rows]
        total = np.zeros_like(part[0])
        picks: list[int] = []
        best, length = -math.inf, 1
        while len(picks) < PICKS and len(picks) - length < PATIENCE:
            gains = [_gain(metric, true, (total + probs) / (len(picks) + 1)) for probs in part]
            picks.append(int(np.argmax(gains)))
            total += part[picks[-1]]
            if gains[picks[-1]] > best + 1e-9:
                best, length = gains[picks[-1]], len(picks)
        counts += np.bincount(picks[:length], minlength=len(stack)) / length
    return counts / BAGS


def _features(stack: np.ndarray, several: bool) -> np.ndarray:
    """Log-probabilities (N, M * C), of each member centred; with several labels the log-odds (C, N, M), for each class its own."""
    logs = np.log(np.maximum(stack, FLOOR))
    if several:
        return np.moveaxis(logs - np.log(np.maximum(1 - stack, FLOOR)), 0, -1).swapaxes(0, 1)
    logs -= logs.mean(axis=2, keepdims=True)
    return np.moveaxis(logs, 0, 1).reshape(stack.shape[1], -1)


def _fit_stacking(stack: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``coef`` and ``intercept`` of a :class:`Blend` (Wolpert 1992), logistic regression; a class without images gets 0."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    def regress(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # near enough: the nested score judges it
            model = LogisticRegression(C=0.1, max_iter=200, tol=1e-3).fit(x, y)
        return model.coef_, model.intercept_

    features = _features(stack, labels.ndim == 2)
    count = stack.shape[2]
    intercept = np.full(count, -1e4)
    if labels.ndim == 2:
        coef = np.zeros((count, len(stack)))
        for k in range(count):
            has = labels[:, k] > 0.5
            if has.all() or not has.any():
                intercept[k] = 10.0 if has.all() else -10.0
            else:
                (coef[k],), (intercept[k],) = regress(features[k], has)
        return coef, intercept
    coef, seen = np.zeros((count, features.shape[1])), np.unique(labels)
    intercept[seen] = 0
    if len(seen) == 2:  # scikit-learn has one row for two classes
        (coef[seen[1]],), (intercept[seen[1]],) = regress(features, labels)
    elif len(seen) > 2:
        coef[seen], intercept[seen] = regress(features, labels)
    return coef, intercept


def _apply_stacking(coef: np.ndarray, intercept: np.ndarray, stack: np.ndarray, several: bool) -> np.ndarray:
    from scipy.special import expit, softmax

    features = _features(stack, several)
    if several:
        return np.asarray(expit(np.einsum("cnm,cm->nc", features, coef) + intercept), np.float32)
    return np.asarray(softmax(features @ coef.T + intercept, axis=1), np.float32)
