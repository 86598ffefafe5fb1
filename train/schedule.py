"""The learning rate as a pure function of the number of optimizer steps made.

No scheduler object, so nothing to save, to step in the wrong place or to get out of step when a run is resumed.

>>> factor(0, total=100, warmup=10)
0.1
"""

from __future__ import annotations

import math


def factor(step: int, total: int, warmup: int) -> float:
    """Share of the peak learning rate for optimizer step ``step`` (from 0): linear warm-up, then a cosine to 0.

    The first of ``warmup`` steps uses 1 / warmup, the last one 1; the last of ``total`` steps is still above 0, and
    steps beyond ``total`` use 0.
    """
    if step < warmup:
        return (step + 1) / warmup
    if step >= total:
        return 0.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
