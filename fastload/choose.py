"""``Loader(engine="auto")``: which engine makes this file's batches fastest on this machine, found by letting each make some.

The trade-off: about a second for each engine that could do it, once for each loader; on a machine that is busy with something
else the answer is of that moment.

>>> choice, loader = choose({"cpu": make_cpu_loader, "dali": make_dali_loader}); choice.name
'cpu'
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fastload.errors import DataError, UsageError

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

    ``loaders`` make iterables of batches by engine name. One that fails, a driver's error or too little memory included, is left
    out, with its reason; what is wrong with the data is raised.
    """
    made: dict[str, Any] = {}
    rates: dict[str, float] = {}
    left_out: dict[str, str] = {}
    fastest = None

    @contextmanager
    def leaving_out(name: str) -> Iterator[None]:
        try:
            yield
        except DataError:
            raise
        except UsageError as error:
            left_out[name] = str(error)
        except Exception as error:  # of a library that the engine needs, in whatever form
            left_out[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"

    try:
        for name, make in loaders.items():
            with leaving_out(name):
                made[name] = make()
                rates[name] = 0.0
        for _ in range(ROUNDS if len(made) > 1 else 0):
            for name in [name for name in made if name not in left_out]:
                with leaving_out(name):
                    rates[name] = max(rates[name], rate(made[name], SECONDS / ROUNDS))
        rates = {name: found for name, found in rates.items() if name not in left_out}
        if not rates:
            raise UsageError(f"no engine can make these batches: {'; '.join(left_out.values())}")
        fastest = max(rates, key=lambda name: rates[name])
        return Choice(fastest, rates, left_out), made[fastest]
    finally:
        for name, loader in made.items():
            if name != fastest:
                loader.close()


def rate(loader: Any, seconds: float) -> float:
    """Images per second from the second batch on, since the first one has the start in it; epoch after epoch where they are short."""
    images, begun, now = -1, 0.0, 0.0
    device = getattr(loader, "device", None)

    def clock() -> float:
        # A GPU may have been given more than it has done.
        if device is not None and device.type == "cuda":
            import torch

            torch.cuda.synchronize(device)
        return time.perf_counter()

    while now - begun <= seconds:
        seen = images
        for batch in loader:
            if images < 0:
                images, begun = 0, clock()
                now = begun
                continue
            now = time.perf_counter()
            images += len(batch.index)
            if now - begun > seconds:
                now = clock()  # before the iteration is left, which may wait for what was begun
                break
        if images == seen:  # no batch in an epoch
            return 0.0
    return images / (now - begun)
