"""The learning rate as a pure function of the optimizer steps made and the scores of the epochs done.

No scheduler object, so nothing to save, to step in the wrong place or to get out of step when a run is resumed. All courses
begin with a linear warm-up, except that of one_cycle, which has a rise of its own.

>>> schedule = make_schedule(Config(epochs=10, warmup_epochs=1.0), steps_per_epoch=100); schedule(9, [])
0.1
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from fastload.train.config import Config

RISE = 0.3  # share of the steps in which one_cycle rises, unless warmup_epochs says otherwise
START, END = 1 / 25, 1 / 250_000  # shares of the peak where one_cycle begins and ends, as in torch


def make_schedule(cfg: Config, steps_per_epoch: int) -> Callable[[int, Sequence[float]], float]:
    """A function (``step``, ``scores``) -> share of the peak learning rate for that optimizer step (from 0).

    ``scores``: one number for each finished epoch, higher is better; only plateau looks at them. The first of the steps of
    the warm-up uses 1 / steps, the last one 1. Then, with ``min_lr`` as the share that no course goes below:

    - constant; step, multi_step and plateau: times ``gamma`` at each drop. Epochs are counted from the start of the
      training; plateau drops after ``plateau_epochs`` epochs in a row that were not better than the best before.
    - cosine and polynomial (1 - t) ** ``power``: from 1 to ``min_lr`` over the steps after the warm-up. The last step is
      still above it, steps beyond the last use it. cosine_restarts: ``cycles`` such falls of one length (Loshchilov & Hutter 2017).
    - one_cycle (Smith & Topin 2018): up from 1/25 along a cosine, then down to almost nothing. ``warmup_epochs``, where
      given, is the length of its rise, else 30% of the steps.
    """
    total = cfg.epochs * steps_per_epoch
    warmup = round(cfg.warmup * steps_per_epoch)
    if cfg.schedule == "one_cycle":
        rise = RISE * total if cfg.warmup_epochs is None else cfg.warmup_epochs * steps_per_epoch
        return lambda step, scores: _one_cycle(step, total, rise, max(END, cfg.min_lr))

    fall = max(1, total - warmup)

    def factor(step: int, scores: Sequence[float]) -> float:
        rise = (step + 1) / warmup if step < warmup else 1.0
        done = min(fall, max(0, step - warmup))
        if cfg.schedule == "cosine":
            share = _cosine(done / fall)
        elif cfg.schedule == "cosine_restarts":  # in whole numbers, so that each cycle begins where it should
            share = _cosine(done * cfg.cycles % fall / fall) if done < fall else 0.0
        elif cfg.schedule == "polynomial":
            share = (1 - done / fall) ** cfg.power
        else:
            return rise * max(cfg.min_lr, cfg.gamma ** _drops(cfg, step, steps_per_epoch, scores))
        return rise * (cfg.min_lr + (1 - cfg.min_lr) * share)

    return factor


def _cosine(done: float) -> float:
    """From 1 at 0 to 0 at 1."""
    return 0.5 * (1 + math.cos(math.pi * done))


def _drops(cfg: Config, step: int, steps_per_epoch: int, scores: Sequence[float]) -> int:
    """How often the rate has been lowered before ``step``."""
    if cfg.schedule == "step":
        return step // max(1, round(cfg.step_epochs * steps_per_epoch))
    if cfg.schedule == "multi_step":
        return sum(step >= round(milestone * steps_per_epoch) for milestone in cfg.milestones)
    if cfg.schedule == "plateau":
        return _plateaus(scores, cfg.plateau_epochs)
    return 0


def _plateaus(scores: Sequence[float], patience: int) -> int:
    """How often ``patience`` scores in a row were not above the best before them. NaN is never above."""
    best, waited, drops = -math.inf, 0, 0
    for score in scores:
        if score > best:
            best, waited = score, 0
        else:
            waited += 1
        if waited == patience:
            drops, waited = drops + 1, 0
    return drops


def _one_cycle(step: int, total: int, rise: float, end: float) -> float:
    """Up over ``rise`` steps, down over the rest; the last step uses ``end``."""
    top = max(0.0, rise - 1)
    if step < top:
        return 1 + (START - 1) * _cosine(step / top)
    return end + (1 - end) * _cosine(min(1.0, (step - top) / max(1e-9, total - 1 - top)))
