"""Measure fairly: monotonic clock, warm-up apart, rounds that interleave, medians with their spread.

Rounds take turns (a, b, c, then b, c, a, ...) so that a machine that slows down slows all alike, and two things are compared by
their ratio *within* a round. The trade-off is time: at least five rounds of everything, or the figure is not one.

>>> series = interleave({"ours": ours, "theirs": theirs}, rounds=5)
>>> series["ours"].median, ratio(series["ours"], series["theirs"]).median
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastload.errors import FastloadError, UsageError

MIN_ROUNDS = 5
NOISY = 0.15


@dataclass(frozen=True)
class Series:
    """Figures of one thing, one a round, in the order of the rounds. ``unit`` is for people."""

    name: str
    rounds: tuple[float, ...]
    unit: str = "images/s"

    def __post_init__(self) -> None:
        if not self.rounds:
            raise UsageError(f"a series needs at least one round, got none for {self.name!r}")

    @property
    def n(self) -> int:
        return len(self.rounds)

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def low(self) -> float:
        return min(self.rounds)

    @property
    def high(self) -> float:
        return max(self.rounds)

    @property
    def noise(self) -> float:
        """Half the range, as a share of the median: 0.15 says that rounds lie about 15% around it."""
        return (self.high - self.low) / 2 / self.median if self.median else 0.0

    @property
    def noisy(self) -> bool:
        return self.noise > NOISY

    def to_json(self) -> dict[str, Any]:
        return {
            "unit": self.unit,
            "n": self.n,
            "median": round(self.median, 4),
            "min": round(self.low, 4),
            "max": round(self.high, 4),
            "noise": round(self.noise, 4),
            "rounds": [round(value, 4) for value in self.rounds],
        }

    def __str__(self) -> str:
        digits = 0 if self.median >= 100 else 1 if self.median >= 10 else 2
        text = f"{self.median:,.{digits}f} {self.unit} [{self.low:,.{digits}f}-{self.high:,.{digits}f}]"
        return f"{text}, noisy: ±{self.noise:.0%}" if self.noisy else text


def ratio(a: Series, b: Series) -> Series:
    """a / b round by round: what drifts for both cancels. Both need the same number of rounds."""
    if a.n != b.n:
        raise UsageError(f"a ratio needs the same number of rounds on both sides, got {a.n} and {b.n}")
    return Series(f"{a.name} / {b.name}", tuple(x / y for x, y in zip(a.rounds, b.rounds)), "x")


def interleave(
    jobs: Mapping[str, Callable[[], float]],
    *,
    rounds: int = MIN_ROUNDS,
    warmup: int = 1,
    unit: str = "images/s",
    progress: Callable[[str], object] | None = None,
    on_error: Callable[[str, FastloadError], object] | None = None,
) -> dict[str, Series]:
    """Run every job once a round, in an order that rotates, and keep the figure that each returns.

    ``warmup`` rounds come first and are thrown away. ``progress`` is called with a name before each job. A job that raises a
    FastloadError ends the measurement; with ``on_error`` it is told there and dropped with all its rounds, and the others go on.
    """
    if rounds < MIN_ROUNDS:
        raise UsageError(f"a figure needs at least {MIN_ROUNDS} rounds, got {rounds}")
    if not jobs:
        raise UsageError("nothing to measure: got no jobs")
    names = list(jobs)
    kept: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warmup + rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            if name not in kept:
                continue
            if progress is not None:
                progress(name)
            try:
                figure = jobs[name]()
            except FastloadError as error:
                if on_error is None:
                    raise
                on_error(name, error)
                del kept[name]
                continue
            if turn >= warmup:
                kept[name].append(figure)
    return {name: Series(name, tuple(values), unit) for name, values in kept.items()}


class Stopwatch:
    """Seconds on the monotonic clock: ``with Stopwatch() as watch: ...; watch.seconds``."""

    def __enter__(self) -> Stopwatch:
        self.start = time.perf_counter()
        self.seconds = 0.0
        return self

    def __exit__(self, *exc: object) -> None:
        self.seconds = time.perf_counter() - self.start


def noise_notes(series: Iterable[Series]) -> list[str]:
    """One sentence for each series whose rounds lie further apart than 15%."""
    return [
        f"{s.name}: rounds differ by ±{s.noise:.0%} ({s.low:,.1f} to {s.high:,.1f} {s.unit}), "
        "so the machine was busy or throttled; measure again before relying on it"
        for s in series
        if s.noisy
    ]


def write_jsonl(path: str | Path, records: Iterable[Mapping[str, Any]]) -> Path:
    """Append records to a JSON-lines file, one object a line; the folder is made."""
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, sort_keys=False) + "\n" for record in records)
    except OSError as error:
        raise UsageError(
            f"cannot write results to {str(target)!r} ({error.strerror}); choose another --out"
        ) from error
    return target


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]
