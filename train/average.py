"""One model out of several: the moving average of the steps, the mean of the last epochs, the soup of the best.

Averages cost memory (one copy of the weights each), not time. Statistics of batch norm do not average well: after :class:`Swa`
or :func:`greedy_soup` let :func:`update_batch_norm` measure them anew, with images as the model sees them in training.

>>> ema = Ema(model, decay=0.999); ema.update(model, updates=1)
>>> swa = Swa(); swa.add(model.state_dict()); model.load_state_dict(swa.weights); update_batch_norm(model, batches, device)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

Weights = dict[str, torch.Tensor]


def decay_at(updates: int, decay: float) -> float:
    """Decay after ``updates`` optimizer steps (from 1): grows as (1 + updates) / (10 + updates), up to ``decay``."""
    return min(decay, (1 + updates) / (10 + updates))


class Ema:
    """Moving average of the weights over the steps, in ``.model`` (eval mode, no gradients).

    Its decay is warmed up, so that the random start is forgotten at once in a short run. Buffers (running mean and variance
    of batch norm, counters) are copied: they are averages already, and averaging them again at the decay of the weights would
    leave them far behind.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, updates: int) -> None:
        """Take in ``model`` after its ``updates``-th optimizer step."""
        weight = 1 - decay_at(updates, self.decay)
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), weight)
        for mine, theirs in zip(self.model.buffers(), model.buffers()):
            mine.copy_(theirs)


class Swa:
    """Running mean of state dicts, each of the same weight (stochastic weight averaging: Izmailov et al. 2018).

    ``weights`` is the mean of the ``count`` states so far, in tensors of its own; empty before the first.
    """

    def __init__(self) -> None:
        self.count = 0
        self.weights: Weights = {}

    def add(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take in a model's ``state_dict()``."""
        self.count += 1
        self.weights = _mean(self.weights or state, state, self.count)

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` goes on from, as references."""
        return {"count": self.count, "weights": self.weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count, self.weights = int(state["count"]), dict(state["weights"])


def greedy_soup(
    candidates: Sequence[Weights], score: Callable[[Weights], float]
) -> tuple[Weights, list[int]]:
    """The mean of those ``candidates`` (state dicts, best first) that make it no worse, and their positions.

    Wortsman et al. 2022: start with the best one, add each of the others if the mean with it has at least the ``score`` (higher
    is better) of the mean without it. The soup is therefore never worse than the first candidate on what ``score`` looks at.
    """
    soup, chosen, best = dict(candidates[0]), [0], score(candidates[0])
    for i, candidate in enumerate(candidates[1:], start=1):
        mixed = _mean(soup, candidate, len(chosen) + 1)
        got = score(mixed)
        if got >= best:
            soup, best = mixed, got
            chosen.append(i)
    return soup, chosen


def update_batch_norm(model: nn.Module, batches: Iterable[torch.Tensor], device: torch.device) -> None:
    """Measure the running mean and variance of all batch norm layers anew, as plain means over ``batches``.

    ``batches``: (B, 3, H, W) float, augmented as in training and of one size B, since each batch weighs the same. Mode and
    momentum of the model are as before afterwards; a model without batch norm takes no batch.
    """
    torch.optim.swa_utils.update_bn(batches, model, device)


@torch.no_grad()
def _mean(old: Mapping[str, torch.Tensor], new: Mapping[str, torch.Tensor], count: int) -> Weights:
    """``old`` (a mean of ``count`` - 1 states) with ``new`` taken in; counters and other whole numbers are those of ``new``."""
    return {
        name: torch.lerp(old[name].to(value.device), value, 1 / count) if value.is_floating_point() else value.clone()
        for name, value in new.items()
    }  # fmt: skip
