"""Pictures of a search: scores in their order, each option's values against the score, and which options mattered.

>>> history(search).savefig("history.png")
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fastload.train import metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from optuna.trial import FrozenTrial

    from fastload.train.tuning import Search


def score_of(trial: FrozenTrial) -> float:
    assert trial.value is not None  # of a complete trial
    return trial.value


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")  # not pyplot's: no state that others see


def history(search: Search) -> Figure:
    """Scores in the order of the trials, and the best so far."""
    done = sorted(search.ranked, key=lambda trial: trial.number)
    numbers, scores = [trial.number for trial in done], np.array([score_of(trial) for trial in done])
    higher = metrics.higher_is_better(search.config.metric)
    best = np.maximum.accumulate(scores) if higher else np.minimum.accumulate(scores)
    figure = _figure(7, 4)
    axes = figure.subplots()
    axes.step(numbers, best, where="post", color="tab:red", label="best so far")
    axes.plot(numbers, scores, "o", color="tab:blue", label="trial")
    axes.set(xlabel="trial", ylabel=search.config.metric)
    axes.legend(frameon=False)
    return figure


def slices(search: Search) -> Figure | None:
    """The score over each option, one panel each."""
    done = search.ranked
    names = list(dict.fromkeys(name for trial in done for name in trial.params))
    if not names:
        return None
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = _figure(3.4 * columns, 3 * rows)
    panels: list[Axes] = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel().tolist()
    for axes, name in zip(panels, names):
        shown = [trial for trial in done if name in trial.params]
        number = hasattr(shown[0].distributions[name], "log")
        values = [trial.params[name] if number else str(trial.params[name]) for trial in shown]
        axes.plot(values, [score_of(trial) for trial in shown], "o", alpha=0.6, color="tab:blue")
        axes.set_xlabel(name)
        if getattr(shown[0].distributions[name], "log", False):
            axes.set_xscale("log")
    for axes in panels[len(names) :]:
        axes.remove()
    figure.supylabel(search.config.metric)
    return figure


def importances(search: Search) -> Figure | None:
    """How much each option matters for the score; None where too few trials tell."""
    from optuna.importance import get_param_importances

    if len({score_of(trial) for trial in search.ranked}) < 2:
        return None
    shares = get_param_importances(search.study)
    if not shares:
        return None
    figure = _figure(7, 0.8 + 0.4 * len(shares))
    axes = figure.subplots()
    names = list(reversed(shares))
    axes.barh(names, [shares[name] for name in names], color="tab:blue")
    axes.set(xlabel=f"share of what makes {search.config.metric} differ")
    return figure
