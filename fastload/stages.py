"""Where the time of a loader goes: the steps of its work, and the clock that they are measured with.

The clock gives all time since its last mark to the stage that ends now, so nothing is left over: the stages of a pass add up
to its wall time. The trade-off: what lies between two steps counts for the later one, and what a kernel's own clock leaves over is
shared out over the steps that it measured. An engine without a clock marks nothing; a measured one is a subclass
(:class:`fastload.engines.profiled.ProfiledEngine`), so that the usual path pays nothing.

>>> for stage in loader.profile(): print(stage.name, stage.seconds, stage.bytes)
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

DRAW, READ, CROP, DECODE, RESIZE = "draw", "read", "crop", "decode", "resize"
COLOUR, PER_IMAGE, NORMALISE, MIX, COPY = "colour", "per_image", "normalise", "mix", "copy"

# In the order of the work. An engine that does two of them in one pass marks it as the first of the two.
STAGES = {
    DRAW: "order, the numbers of the augmentation, labels: once a batch",
    READ: "the encoded bytes, out of the page cache or from the disk",
    CROP: "the restart segments under the crop, copied into a small JPEG",
    DECODE: "JPEG to pixels",
    RESIZE: "the crop to its size, flipped and filled",
    COLOUR: "colour matrix and erased boxes",
    PER_IMAGE: "functions of the user",
    NORMALISE: "bytes to normalised floats, or to the dtype asked for",
    MIX: "Mixup and CutMix",
    COPY: "the batch to the device",
}


@dataclass(frozen=True)
class Stage:
    """One step of a loader's work. ``name`` is one of :data:`STAGES`.

    ``seconds`` and ``bytes`` are for one image on one thread; bytes are those that the step reads or those that it writes,
    whichever are more.
    """

    name: str
    seconds: float
    bytes: float


class Clock:
    """Sums of seconds and bytes by stage; ``mark`` ends a step, and the next one begins there. For one thread."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.bytes: dict[str, int] = {}
        self._last = time.perf_counter()

    def mark(self, stage: str, size: int = 0) -> None:
        """Give the time since the last mark to ``stage``, which has read or written ``size`` bytes."""
        self.add(stage, time.perf_counter() - self._last, size)
        self._last = time.perf_counter()  # its own work counts for nobody

    def add(self, stage: str, seconds: float, size: int) -> None:
        """Give ``seconds`` that were measured otherwise, and ``size`` bytes, to ``stage``."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
        self.bytes[stage] = self.bytes.get(stage, 0) + size

    def skip(self) -> None:
        """The time since the last mark belongs to no stage, or was given to some already."""
        self._last = time.perf_counter()


def summarise(passes: Sequence[Clock], images: int) -> list[Stage]:
    """The median of each stage over ``passes`` of ``images`` images each, for one image, in the order of the work."""
    stages = []
    for name in STAGES:
        if any(name in clock.seconds for clock in passes):
            seconds = statistics.median(clock.seconds.get(name, 0.0) for clock in passes)
            size = statistics.median(clock.bytes.get(name, 0) for clock in passes)
            stages.append(Stage(name, seconds / images, size / images))
    return stages
