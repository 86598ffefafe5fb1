"""Which side is the bottleneck, by how much, and what to change first: a pure function of measured figures.

Nothing is measured here, and no figure appears in the sentence that was not measured: a change that was not run is named
without a promise. The trade-off is a careful tongue: where the rounds scatter more than the sides differ, the verdict is
"balanced".

>>> verdict(Figures(loader=1000, model=200, both=195, stall=0.01)).bottleneck
'model'
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fastload.errors import UsageError

Side = Literal["loader", "model", "balanced"]

# Two sides nearer than this are called balanced even on a silent machine: changing one of them soon hits the other.
BALANCE = 0.15
# A PerImage step is named first when the loader without it is at least this much faster.
PER_IMAGE_GAIN = 1.15
# Waiting that is worth a word when the sides alone did not predict it.
STALL_WORTH_SAYING = 0.10


@dataclass(frozen=True)
class Figures:
    """What was measured. Rates in images per second, medians over the rounds; ``stall`` is a share of wall time, 0 to 1.

    ``noise`` is the larger half range of the rounds of loader and model, as a share. ``loader_plain`` is the loader's rate
    without the pipeline's PerImage steps, ``None`` where it has none. ``shared_cores`` says that loader and model run on
    the same cores. ``stored_side`` is the median longer side of the stored images in pixels, ``None`` if unknown.
    """

    loader: float
    model: float
    both: float
    stall: float
    noise: float = 0.0
    loader_plain: float | None = None
    shared_cores: bool = False
    device: str = "cpu"
    threads: int = 1
    cores: int = 1
    batch_size: int = 64
    size: int = 224
    stored_side: int | None = None
    store: str = "jpeg"

    def __post_init__(self) -> None:
        for name in ("loader", "model", "both"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise UsageError(f"a verdict needs positive images per second for {name!r}, got {value}")
        if not 0 <= self.stall <= 1:
            raise UsageError(f"the stall is a share of time between 0 and 1, got {self.stall}")


@dataclass(frozen=True)
class Verdict:
    """``ratio`` is the faster side over the slower one (at least 1); ``change`` is the first thing to change."""

    bottleneck: Side
    ratio: float
    change: str
    sentence: str


def rate(value: float) -> str:
    """Images per second for people: three significant digits, never '0'."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _times(ratio: float) -> str:
    return f"{ratio:,.0f}x" if ratio >= 10 else f"{ratio:.1f}x" if ratio >= 1.95 else f"{ratio:.2f}x"


def bottleneck(figures: Figures) -> Side:
    """The slower side, or 'balanced' where the difference is within the noise or 15%."""
    margin = 1 + max(BALANCE, figures.noise)
    if figures.loader > figures.model * margin:
        return "model"
    if figures.model > figures.loader * margin:
        return "loader"
    return "balanced"


def first_change(figures: Figures) -> str:
    """The first change to try on the slower side. Only PerImage's gain is a figure, because only that was run."""
    side = bottleneck(figures)
    if side == "model":
        return _model_change(figures)
    if side == "loader":
        return _loader_change(figures)
    if figures.shared_cores:
        return "a GPU for the model, because both sides compete for the same cores"
    return "nothing on one side alone: the other would soon hold it back"


def _model_change(figures: Figures) -> str:
    if figures.device == "cpu":
        return "the model's side: a GPU, a smaller model or a smaller --size"
    return "the model's side: a larger --batch-size if memory allows, then a smaller model or --size"


def _loader_change(figures: Figures) -> str:
    plain = figures.loader_plain
    if plain is not None and plain > figures.loader * PER_IMAGE_GAIN:
        return (
            f"the PerImage step: without it the loader makes {rate(plain)} images/s, "
            "so use fastload's own transforms for what it does"
        )
    if figures.threads < figures.cores:
        return f"--threads: {figures.threads} of {figures.cores} cores load images"
    if figures.stored_side is not None and figures.stored_side > 2.5 * figures.size:
        return (
            f"the stored size: images of {figures.stored_side} px are read for {figures.size} px, "
            "so convert again with a smaller --max-side"
        )
    if figures.store == "jpeg":
        return "the store: convert again with --store raw or a smaller --max-side if the disk allows"
    return "the number of cores: the loader already uses all of them"


def verdict(figures: Figures) -> Verdict:
    """One sentence for a person, and its parts for a program."""
    f = figures
    side = bottleneck(f)
    ratio = max(f.loader / f.model, f.model / f.loader)
    change = first_change(f)
    alone = f"the loader alone makes {rate(f.loader)} images/s and the model alone takes {rate(f.model)}"
    together = f"together {rate(f.both)} with {f.stall:.0%} of the time spent waiting for images"
    if side == "balanced":
        why = "which is within the noise of the rounds" if f.noise > BALANCE else "too near to blame one side"
        head = f"Neither side is clearly the bottleneck: {alone} ({_times(ratio)} apart, {why}), {together}"
    else:
        head = (
            f"The {side} is the bottleneck, {_times(ratio)} slower than the other side: {alone}, {together}"
        )
    tail = f"change first {change}"
    if f.shared_cores:
        tail += (
            f"; loader and model share these {f.cores} cores, so each slows the other "
            "and neither figure foretells a machine with a GPU"
        )
    elif side != "loader" and f.stall > STALL_WORTH_SAYING:
        tail += (
            "; the wait is more than the two figures alone explain, so look for uneven images or a busy disk"
        )
    return Verdict(side, ratio, change, f"{head}; {tail}.")
