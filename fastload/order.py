"""Which sample comes when: a pure function of (seed, epoch, position), never a stored list.

Rank r of w takes the global positions r, r + w, r + 2w, ...; so the ranks partition an epoch, a resumed run jumps to its
position at once, and the same global order is served by any number of processes.

>>> Order(length=10, seed=1, shuffle=True).take(epoch=0, start=0, stop=4)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import array_api_compat
import numpy as np

from fastload.errors import UsageError
from fastload.kernels import rng

STREAM_WEIGHTED = 0xFF00  # the stream of weighted draws; augmentations use low numbers


@dataclass(frozen=True)
class Order:
    """The order of ``length`` samples on rank ``rank`` of ``world_size``.

    With ``weights`` (length,), samples are drawn with replacement in proportion to them, ``length`` draws an epoch.
    ``drop_uneven`` leaves out the last (fewer than ``world_size``) positions, so that all ranks have equally many.
    """

    length: int
    seed: int = 0
    shuffle: bool = False
    weights: np.ndarray | None = None
    rank: int = 0
    world_size: int = 1
    drop_uneven: bool = False
    _cumulative: Any = field(init=False, default=None, repr=False)  # (length,) float64
    _last: int = field(init=False, default=0, repr=False, compare=False)
    _on_devices: dict[Any, Any] = field(init=False, default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise UsageError(
                f"rank must be from 0 to world_size - 1, got rank {self.rank} of {self.world_size}"
            )
        if not 0 <= self.seed < 2**64:
            raise UsageError(f"seed must be from 0 to 2**64 - 1, got {self.seed}")
        if self.weights is not None:
            weights = np.asarray(self.weights, np.float64)
            if weights.shape != (self.length,):
                raise UsageError(
                    f"weights need one entry for each of {self.length} samples, got {weights.shape}"
                )
            if not np.isfinite(weights).all() or (weights < 0).any() or weights.sum() <= 0:
                raise UsageError("weights must be finite, none negative, and not all zero")
            object.__setattr__(self, "_cumulative", np.cumsum(weights))
            # The last sample that has a weight: rounding may lead beyond it.
            object.__setattr__(self, "_last", int(np.flatnonzero(np.diff(self._cumulative, prepend=0.0))[-1]))

    def __len__(self) -> int:
        """Positions of this rank in one epoch."""
        if self.drop_uneven:
            return self.length // self.world_size
        return max(0, -(-(self.length - self.rank) // self.world_size))

    def places(self, start: int, stop: int, device: Any = None) -> Any:
        """Global positions, over all ranks, of this rank's positions [start, stop): (stop - start,) uint64.

        On a ``device`` of torch's they are int64, since torch has no arithmetic of the other.
        """
        stop = max(min(stop, len(self)), start)
        if device is None:
            return np.arange(start, stop, dtype=np.uint64) * np.uint64(self.world_size) + np.uint64(self.rank)
        import torch

        return torch.arange(start, stop, device=device) * self.world_size + self.rank

    def take(self, epoch: int, start: int, stop: int, device: Any = None) -> Any:
        """Samples at positions [start, stop) of this rank, (stop - start,) int64 below ``length``.

        With a ``device`` of torch's they are made there, the same, and the host does not wait for them.
        """
        places = self.places(start, stop, device)
        words: Any = rng
        if device is not None:
            from fastload.kernels import gpu_rng as words
        xp = array_api_compat.array_namespace(places)
        if self._cumulative is not None:
            u = words.uniforms(self.seed, epoch, places, STREAM_WEIGHTED, 2)
            # Two words make 64 random bits: 32 would be coarse for millions of samples.
            draw = (u[:, 0] + u[:, 1] / 4294967296.0) * float(self._cumulative[-1])
            chosen = xp.searchsorted(self._sums(device), draw, side="right")
            return xp.astype(chosen, xp.int64).clip(max=self._last)
        if self.shuffle:
            return xp.astype(words.permute(places, self.length, self.seed, epoch), xp.int64)
        return xp.astype(places, xp.int64)

    def forget_devices(self) -> None:
        """Let go of what was kept on devices; it is brought there again when it is wanted."""
        self._on_devices.clear()

    def _sums(self, device: Any) -> Any:
        """The cumulative weights, kept on each device that asks for them."""
        if device is None:
            return self._cumulative
        if device not in self._on_devices:
            import torch

            self._on_devices[device] = torch.from_numpy(self._cumulative).to(device)
        return self._on_devices[device]


def balanced_weights(labels: np.ndarray) -> np.ndarray:
    """Weights that draw each class equally often: 1 / samples of its class, (N,) float64. ``labels`` (N,) integers."""
    _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return (1.0 / counts)[inverse.reshape(-1)]
