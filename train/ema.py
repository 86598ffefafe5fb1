"""An average of the weights over the last steps, often better than the last weights and free of their noise.

Weights are averaged with a decay that is warmed up, so that the random start is forgotten at once in a short run.
Buffers (running mean and variance of batch norm, counters) are copied: they are averages already, and averaging them
again at the decay of the weights would leave them far behind.

>>> ema = Ema(model, decay=0.999); ema.update(model, updates=1)
"""

from __future__ import annotations

import copy

import torch
from torch import nn


def decay_at(updates: int, decay: float) -> float:
    """Decay after ``updates`` optimizer steps (from 1): grows as (1 + updates) / (10 + updates), up to ``decay``."""
    return min(decay, (1 + updates) / (10 + updates))


class Ema:
    """Holds the averaged copy in ``.model`` (eval mode, no gradients)."""

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
