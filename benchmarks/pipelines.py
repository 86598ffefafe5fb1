"""Pipelines as a bench changes them: without a user's functions, without normalising, and how large an image they need.

>>> needed(transforms.train(224))
Need(option='--max-side', side=416)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastload import transforms as specs


@dataclass(frozen=True)
class Need:
    """How large the stored images must be for a pipeline: the option of ``fastload convert`` and its pixels."""

    option: str
    side: int

    @property
    def longer(self) -> float:
        """The longer side of a picture of 4:3 that is as large as this, in pixels."""
        return self.side * 4 / 3 if self.option == "--short-side" else self.side


def without_per_image(pipeline: Sequence[Any], size: int) -> tuple[Any, ...] | None:
    """The pipeline with its PerImage steps taken out, or None if it has none.

    Where a PerImage step gives the images their size, a plain ``Resize`` takes its place, or a batch could not be made.
    """
    if not any(isinstance(spec, specs.PerImage) for spec in pipeline):
        return None
    kept: list[Any] = []
    for spec in pipeline:
        if not isinstance(spec, specs.PerImage):
            kept.append(spec)
        elif spec.size is not None:
            kept.append(specs.Resize(spec.size))
    return tuple(kept)


def without_normalize(pipeline: Sequence[Any]) -> tuple[Any, ...]:
    """The pipeline that hands out bytes."""
    return tuple(spec for spec in pipeline if not isinstance(spec, specs.Normalize))


def needed(pipeline: Sequence[Any]) -> Need | None:
    """The stored size below which a pipeline would enlarge pixels; None where the stored size decides what it shows.

    For random crops it is counted for the mean area of a crop and pictures of 4:3, rounded up to 16: smaller crops are enlarged
    a little, which training bears.
    """
    first = pipeline[0] if pipeline else None
    if isinstance(first, specs.RandomResizedCrop):
        height, width = _pair(first.size)
        side = max(height, width) / math.sqrt(sum(first.scale) / 2) * 4 / 3
        return Need("--max-side", math.ceil(side / 16) * 16)
    if isinstance(first, specs.Resize):
        if isinstance(first.size, int):
            return Need("--short-side", first.size)
        return Need("--max-side", max(first.size))
    return None


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
