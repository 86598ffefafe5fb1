"""Scores from labels and probabilities: pure functions on numpy arrays, by name or any callable.

Every metric is one function of how often each image counts, so that the bootstrap needs no copy of the data: metrics of decisions
work on counts per class, AUROC and average precision on histograms of ranks. That, and an epoch that need not wait for
scikit-learn to be imported, is why these few formulas are written here; the tests hold them to scikit-learn. The trade-off: a
probability that is NaN makes every metric of it NaN, rather than one image wrong, and a NaN is never better.

In all functions ``labels`` are (N,) int in [0, C), or (N, C) 0/1 where an image may have several; ``probs`` (N, C) float in [0, 1];
``decided`` (N,) int or (N, C) bool, where something other than the largest probability (than 0.5 for several labels) decides.

>>> score("macro_f1", labels, probs), bootstrap("macro_f1", labels, probs, groups=people)
(0.88, (0.84, 0.91))
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastload.errors import DataError, UsageError, unknown

Metric = str | Callable[[np.ndarray, np.ndarray], float]
Weigh = Callable[[np.ndarray], float]  # (N,) float64, how often each image counts -> the metric
ALIASES = {"loss": "log_loss"}
TINY = float(np.finfo(np.float32).tiny)


# -- decisions: functions of counts ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counts:
    """Each (C,) float64: images with the class that were given it, given it, that have it; ``total`` of all images."""

    hits: np.ndarray
    given: np.ndarray
    true: np.ndarray
    total: float
    several: bool

    @property
    def table(self) -> np.ndarray:
        """(2, 2, C): the class is absent or present, was not or was given."""
        missed, false = self.true - self.hits, self.given - self.hits
        return np.array([[self.total - self.true - false, false], [missed, self.hits]])


def _mean(values: np.ndarray, weights: np.ndarray | None = None) -> float:
    """NaN, silently, of nothing."""
    weights = np.ones(len(values)) if weights is None else weights
    total = float(weights.sum())
    return float(values @ weights) / total if total else math.nan


def _accuracy(c: Counts) -> float:
    if c.several:  # of labels, not of images
        return _mean((c.table[0, 0] + c.table[1, 1]) / c.total) if c.total else math.nan
    return float(c.hits.sum()) / c.total if c.total else math.nan


def _balanced_accuracy(c: Counts) -> float:
    if not c.several:
        seen = c.true > 0
        return _mean(c.hits[seen] / c.true[seen])
    both = c.table[:, :, (c.true > 0) & (c.true < c.total)]
    return _mean((both[0, 0] / both[0].sum(axis=0) + both[1, 1] / both[1].sum(axis=0)) / 2)


def _f1(c: Counts) -> tuple[np.ndarray, np.ndarray]:
    """F1 of the classes that occur as a label or as a decision, and a (C,) mask of them; the others have none."""
    seen = c.true + c.given > 0
    return 2 * c.hits[seen] / (c.true + c.given)[seen], seen


def _macro_f1(c: Counts) -> float:
    return _mean(_f1(c)[0])


def _micro_f1(c: Counts) -> float:
    both = float((c.true + c.given).sum())
    return 2 * float(c.hits.sum()) / both if both else math.nan


def _weighted_f1(c: Counts) -> float:
    values, seen = _f1(c)
    return _mean(values, c.true[seen])


def _kappa(c: Counts) -> float:
    """Cohen's kappa; with several labels the mean of the kappas of the classes that have one."""
    if not c.total:
        return math.nan
    if not c.several:
        agree, chance = float(c.hits.sum()) / c.total, float(c.true @ c.given) / c.total**2
        return (agree - chance) / (1 - chance) if chance < 1 else math.nan
    true, given = c.true / c.total, c.given / c.total
    chances = true * given + (1 - true) * (1 - given)
    agrees = (c.table[0, 0] + c.table[1, 1]) / c.total
    known = chances < 1
    return _mean((agrees[known] - chances[known]) / (1 - chances[known]))


DECISIONS: dict[str, Callable[[Counts], float]] = {
    "accuracy": _accuracy,
    "balanced_accuracy": _balanced_accuracy,
    "macro_f1": _macro_f1,
    "micro_f1": _micro_f1,
    "weighted_f1": _weighted_f1,
    "kappa": _kappa,
}


def _counter(labels: np.ndarray, given: np.ndarray, classes: int) -> Callable[[np.ndarray], Counts]:
    """A function from weights to counts."""
    if labels.ndim == 2:
        true, called = labels > 0.5, given > 0.5
        a, b, c = (part.astype(np.float64) for part in (true & called, called, true))
        return lambda w: Counts(w @ a, w @ b, w @ c, float(w.sum()), True)
    right = labels == given

    def count(w: np.ndarray) -> Counts:
        parts = (
            np.bincount(labels, w * right, classes),
            np.bincount(given, w, classes),
            np.bincount(labels, w, classes),
        )
        return Counts(*parts, float(w.sum()), False)

    return count


def _quadratic_kappa(labels: np.ndarray, given: np.ndarray, classes: int) -> Weigh:
    """Cohen's kappa in which a mistake costs the square of the distance of the class numbers (classes in an order)."""
    cost = np.subtract.outer(np.arange(classes), np.arange(classes)).astype(np.float64) ** 2
    pairs = labels * classes + given

    def weigh(w: np.ndarray) -> float:
        table = np.bincount(pairs, w, classes * classes).reshape(classes, classes)
        chance = table.sum(axis=1) @ cost @ table.sum(axis=0)
        return 1 - float((cost * table).sum() * table.sum() / chance) if chance else math.nan

    return weigh


# -- probabilities: means over images, and ranks ---------------------------------------------------------------------


def _losses(labels: np.ndarray, probs: np.ndarray) -> np.ndarray:
    """(N,) minus log-probability of the true class, of each label's truth for several; held off 0 by the smallest float32."""
    if labels.ndim == 2:
        true = np.where(labels > 0.5, probs, 1 - probs.astype(np.float64))
        return -np.log(np.maximum(true, TINY)).mean(axis=1)
    true = probs[np.arange(len(labels)), labels].astype(np.float64)
    return -np.log(np.maximum(true, TINY))


def _in_top(labels: np.ndarray, probs: np.ndarray, k: int) -> np.ndarray:
    """(N,) bool. Of equal probabilities the lower class number comes first, as in ``argmax``."""
    own = np.take_along_axis(probs, labels[:, None], axis=1)
    before = (probs > own) | ((probs == own) & (np.arange(probs.shape[1]) < labels[:, None]))
    return before.sum(axis=1) < k


def _auroc(has: np.ndarray, lacks: np.ndarray) -> float:
    """From weights of images that have and that lack the class, at each distinct probability, rising. Ties count half."""
    below = np.cumsum(lacks) - lacks / 2
    return float(has @ below) / float(has.sum() * lacks.sum())


def _average_precision(has: np.ndarray, lacks: np.ndarray) -> float:
    """Sum over thresholds of precision times the recall gained there (no interpolation)."""
    hits = np.cumsum(has[::-1])[::-1]
    above = np.cumsum((has + lacks)[::-1])[::-1]
    return float(has @ (hits / np.where(above > 0, above, 1))) / float(has.sum())


Rank = Callable[[np.ndarray, np.ndarray], float]


def _ranker(labels: np.ndarray, probs: np.ndarray, of_class: Rank) -> Callable[[np.ndarray], np.ndarray]:
    """A function from weights to (C,) values, each class against the rest; NaN for classes that all or no images have."""
    columns = []
    for k in range(probs.shape[1]):
        values, place = np.unique(probs[:, k], return_inverse=True)
        has = labels[:, k] > 0.5 if labels.ndim == 2 else labels == k
        columns.append((has, place.reshape(-1), len(values)))  # numpy 2.0 gives the inverse another shape

    def value(w: np.ndarray, has: np.ndarray, place: np.ndarray, size: int) -> float:
        with_it = np.bincount(place, w * has, size)
        without = np.bincount(place, w * ~has, size)
        return of_class(with_it, without) if with_it.any() and without.any() else math.nan

    return lambda w: np.array([value(w, *column) for column in columns])


RANKS: dict[str, Rank] = {"auroc": _auroc, "average_precision": _average_precision}
NAMES = (*DECISIONS, "quadratic_kappa", "top5", "log_loss", *RANKS)
_USER: dict[str, tuple[Callable[[np.ndarray, np.ndarray], float], bool]] = {}


# -- what others call ------------------------------------------------------------------------------------------------


def check_metric(name: str) -> None:
    """UsageError for a name that is no metric."""
    if name not in NAMES and name not in ALIASES and name not in _USER:
        raise unknown("metric", name, {*NAMES, *ALIASES, *_USER})


def register(name: str, fn: Callable[[np.ndarray, np.ndarray], float], higher_is_better: bool = True) -> None:
    """Make ``fn(labels, probs)`` known as a metric, also for ``Config.metric``. A second call replaces the first."""
    if name in NAMES or name in ALIASES:
        raise UsageError(f"a metric of fastload cannot be replaced; choose another name, got {name!r}")
    _USER[name] = (fn, higher_is_better)


def higher_is_better(name: Metric) -> bool:
    """False for losses. A callable is taken for a score; :func:`register` it where it is not."""
    if not isinstance(name, str):
        return True
    check_metric(name)
    return _USER[name][1] if name in _USER else ALIASES.get(name, name) != "log_loss"


def better(metric: Metric, new: float, old: float | None) -> bool:
    """Whether ``new`` beats ``old`` (None: nothing yet). NaN never does, and anything beats NaN."""
    if math.isnan(new):
        return False
    if old is None or math.isnan(old):
        return True
    return new > old if higher_is_better(metric) else new < old


def score(metric: Metric, labels: np.ndarray, probs: np.ndarray, decided: np.ndarray | None = None) -> float:
    """One number. Metrics that need probabilities, and callables (``metric(labels, probs)``), ignore ``decided``."""
    return _weigher(metric, labels, probs, decided)(np.ones(len(probs)))


def summary(labels: np.ndarray, probs: np.ndarray, decided: np.ndarray | None = None) -> dict[str, float]:
    """All scalar metrics by name; ``top5`` only with one label an image and more than 5 classes."""
    names = [*DECISIONS, "log_loss", *RANKS]
    if labels.ndim == 1 and probs.shape[1] > 5:
        names.append("top5")
    return {name: score(name, labels, probs, decided) for name in names}


def brief(labels: np.ndarray, probs: np.ndarray, metric: Metric = "macro_f1") -> dict[str, float]:
    """``valid_loss``, ``accuracy``, ``macro_f1`` and ``metric`` under its name, for the line of an epoch: cheap."""
    name = metric if isinstance(metric, str) else metric.__name__
    line = {"valid_loss": score("log_loss", labels, probs)}
    line.update((known, score(known, labels, probs)) for known in ("accuracy", "macro_f1"))
    return line if name in line else {**line, name: score(metric, labels, probs)}


def confusion(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """(C, C) int64 counts: row true class, column predicted class. ``labels`` and ``predicted``: (N,) int in [0, C)."""
    pairs = labels.astype(np.int64) * classes + predicted.astype(np.int64)
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def per_class(
    labels: np.ndarray, probs: np.ndarray, classes: list[str], decided: np.ndarray | None = None
) -> list[dict[str, Any]]:
    """For each class ``name``, ``precision``, ``recall``, ``f1``, ``support`` and ``auroc``. What is 0/0 is NaN."""
    labels, given = _checked(labels, probs, decided)
    ones = np.ones(len(probs))
    counts = _counter(labels, given, len(classes))(ones)
    auroc = _ranker(labels, probs, _auroc)(ones)
    rows = []
    for k, name in enumerate(classes):
        hits, called, true = float(counts.hits[k]), float(counts.given[k]), float(counts.true[k])
        rows.append({
            "name": name, "precision": _ratio(hits, called), "recall": _ratio(hits, true),
            "f1": _ratio(2 * hits, called + true), "support": int(true), "auroc": float(auroc[k]),
        })  # fmt: skip
    return rows


def resample(groups: np.ndarray | None, images: int, rng: np.random.Generator) -> np.ndarray:
    """(N,) int64: how often each image comes in one bootstrap sample of whole ``groups`` ((N,) numbers from 0; None: images)."""
    if groups is None:
        return np.bincount(rng.integers(0, images, images), minlength=images)
    count = int(groups.max()) + 1
    return np.bincount(rng.integers(0, count, count), minlength=count)[groups]


def bootstrap(
    metric: Metric,
    labels: np.ndarray,
    probs: np.ndarray,
    groups: np.ndarray | None = None,
    decided: np.ndarray | None = None,
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of ``metric`` (Efron 1979). ``groups``: (N,) anything; what is in one group is drawn together.

    Images of one person are no independent evidence, so an interval from images alone would be too narrow. (NaN, NaN) where there
    are fewer than two groups, or no draw has a value; draws without one (no image of any class) are left out.
    """
    if not 0 < level < 1 or draws < 1:
        raise UsageError(
            f"bootstrap needs draws of at least 1 and a level between 0 and 1, got {draws!r} and {level!r}"
        )
    weigh = _weigher(metric, labels, probs, decided)
    numbers = None
    if groups is not None:
        numbers = np.unique(np.asarray(groups), return_inverse=True)[1].reshape(-1)
    if len(probs) < 2 or (numbers is not None and numbers.max() < 1):
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    values = np.array([weigh(resample(numbers, len(probs), rng).astype(np.float64)) for _ in range(draws)])
    values = values[~np.isnan(values)]
    if not len(values):
        return math.nan, math.nan
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


# -- inside ----------------------------------------------------------------------------------------------------------


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _checked(
    labels: np.ndarray, probs: np.ndarray, decided: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """The labels and what was decided, of kinds that can be counted."""
    labels, probs = np.asarray(labels), np.asarray(probs)
    several = labels.ndim == 2
    if labels.shape != (probs.shape if several else probs.shape[:1]):
        raise UsageError(
            f"labels and probabilities must be of the same images, got shapes {labels.shape} and {probs.shape}"
        )
    if decided is None:
        given = probs > 0.5 if several else probs.argmax(axis=1) if len(probs) else np.zeros(0, np.int64)
    else:
        given = np.asarray(decided)
    if given.shape != labels.shape:
        raise UsageError(
            f"what was decided must have the shape of the labels, {labels.shape}, got {given.shape}"
        )
    if several:
        return labels, given
    labels, given = labels.astype(np.int64), given.astype(np.int64)
    for what, values in (("labels", labels), ("decisions", given)):
        if len(values) and (values.min() < 0 or values.max() >= probs.shape[1]):
            odd = int(values.min()) if values.min() < 0 else int(values.max())
            raise DataError(f"{what} must be numbers of the {probs.shape[1]} classes, from 0, got {odd}")
    return labels, given


def _weigher(metric: Metric, labels: np.ndarray, probs: np.ndarray, decided: np.ndarray | None) -> Weigh:
    """``metric`` on these predictions, as a function of how often each image counts."""
    if isinstance(metric, str):
        check_metric(metric)
    fn = metric if not isinstance(metric, str) else _USER[metric][0] if metric in _USER else None
    if fn is not None:
        call = fn
        return lambda w: _call(call, labels, probs, w)
    name = ALIASES.get(str(metric), str(metric))
    counted = name in DECISIONS or name == "quadratic_kappa"
    labels, given = _checked(labels, probs, decided)
    if labels.ndim == 2 and name in ("quadratic_kappa", "top5"):
        raise UsageError(
            f"{name} has no meaning where an image has several labels; choose another metric, got {name!r}"
        )
    if not len(probs) or (not (counted and decided is not None) and np.isnan(probs).any()):
        return lambda w: math.nan
    if name in DECISIONS:
        formula, count = DECISIONS[name], _counter(labels, given, probs.shape[1])
        return lambda w: formula(count(w))
    if name == "quadratic_kappa":
        return _quadratic_kappa(labels, given, probs.shape[1])
    if name in RANKS:
        rank = _ranker(labels, probs, RANKS[name])
        return lambda w: _mean_known(rank(w))
    values = _losses(labels, probs) if name == "log_loss" else _in_top(labels, probs, 5).astype(np.float64)
    return lambda w: _mean(values, w)


def _mean_known(values: np.ndarray) -> float:
    return _mean(values[~np.isnan(values)])


def _call(
    fn: Callable[[np.ndarray, np.ndarray], float], labels: np.ndarray, probs: np.ndarray, w: np.ndarray
) -> float:
    rows = np.repeat(np.arange(len(probs)), w.astype(np.int64))
    return float(fn(labels[rows], probs[rows]))
