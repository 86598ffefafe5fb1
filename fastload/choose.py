"""``Loader(engine="auto")``: which engine makes this file's batches fastest on this machine, found by letting each make some.

The trade-off: about a second for each engine that could do it, once for each loader; on a machine that is busy with something
else the answer is of that moment.

>>> choice, loader = choose({"cpu": make_cpu_loader, "dali": make_dali_loader}); choice.name
'cpu'
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastload.errors import UsageError

SECONDS = 0.7  # of measuring, for each engine
ROUNDS = 3  # turns that they take


@dataclass(frozen=True)
class Choice:
    """The fastest engine, images/s of each that was measured (the best of its turns; 0 for an only one), and why the others were not."""

    name: str
    rates: dict[str, float]
    left_out: dict[str, str]

    def __str__(self) -> str:
        out = "".join(f"; {name} not measured: {why}" for name, why in self.left_out.items())
        if len(self.rates) == 1:  # and no speed is known of it
            return f"engine {self.name!r} is the only one here{out}"
        said = ", ".join(f"{name} {rate:,.0f} images/s" for name, rate in self.rates.items())
        return f"engine {self.name!r} is the fastest here ({said}{out})"


def choose(loaders: Mapping[str, Callable[[], Any]]) -> tuple[Choice, Any]:
    """Measure each engine's loader, taking turns, and close all but the fastest, which is returned. UsageError if none can be made.

    ``loaders`` make iterables of batches by engine name; one that raises UsageError is left out, with its reason.
    """
    made, left_out = {}, {}
    for name, make in loaders.items():
        try:
            made[name] = make()
        except UsageError as error:
            left_out[name] = str(error)
    if not made:
        raise UsageError(f"no engine can make these batches: {'; '.join(left_out.values())}")
    rates = dict.fromkeys(made, 0.0)
    try:
        if len(made) > 1:
            for _ in range(ROUNDS):
                for name, loader in made.items():
                    rates[name] = max(rates[name], rate(loader, SECONDS / ROUNDS))
    except BaseException:
        for loader in made.values():
            loader.close()
        raise
    fastest = max(rates, key=lambda name: rates[name])
    for name, loader in made.items():
        if name != fastest:
            loader.close()
    return Choice(fastest, rates, left_out), made[fastest]


def rate(loader: Any, seconds: float) -> float:
    """Images per second from the second batch on, since the first one has the start in it; epoch after epoch where they are short."""
    images, begun, now = -1, 0.0, 0.0
    while now - begun <= seconds:
        seen = images
        for batch in loader:
            now = time.perf_counter()
            if images < 0:
                images, begun = 0, now
                continue
            images += len(batch.index)
            if now - begun > seconds:
                break
        if images == seen:  # no batch in an epoch
            return 0.0
    return images / (now - begun)
