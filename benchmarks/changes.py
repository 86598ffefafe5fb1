"""Changes, each run: end to end, in rounds that alternate with the unchanged.

All changes of a bench take turns with the unchanged in the same rounds. The one that comes out first is then measured against the
unchanged once more, because the best of many is in part the luckiest; its rounds are those of both times. The trade-off is the time
budget: what does not fit is named and not run.

>>> changes, left = Runner(base, make_side, until=time.perf_counter() + 30).run(candidates)
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastload.benchmarks.advice import Candidate, NotRun, size_text
from fastload.benchmarks.harness import MIN_ROUNDS, Series, interleave, ratio
from fastload.benchmarks.pairing import Pair, Setting, steps_for
from fastload.benchmarks.side import ModelSide, reason
from fastload.benchmarks.stored import Sample
from fastload.benchmarks.verdict import gained
from fastload.errors import FastloadError

LEAST_ROUND, MOST_ROUND = 0.15, 1.5  # seconds of one job in one round
TOO_SLOW = 2.5  # a change whose first steps take this many times longer is not worth five rounds
CONFIRM = (
    0.75  # of the time, the first rounds may take this share; the rest is for measuring the best one again
)
UNCHANGED, SAMPLE = "unchanged", "the sample unchanged"


@dataclass(frozen=True)
class Measured:
    """A change that was run: ``figure`` in images/s end to end, ``ratio`` to the unchanged in the same rounds."""

    what: str
    setting: str
    side: str
    figure: Series
    ratio: Series
    cost: str

    @property
    def gain(self) -> bool:
        return gained(self.ratio.rounds)

    def to_json(self) -> dict[str, Any]:
        return {
            "what": self.what,
            "setting": self.setting,
            "side": self.side,
            "figure": self.figure.to_json(),
            "ratio": self.ratio.to_json(),
            "cost": self.cost,
            "gain": self.gain,
        }


@dataclass
class _Arm:
    candidate: Candidate
    pair: Pair
    against: str
    cost: str


class Runner:
    """Runs candidates against ``base``. ``make_side`` makes the model's side for a setting, None where there is no model.

    ``until``: when the time is up (``time.perf_counter()``). ``size``: side of the images that the model takes. ``seconds``: the whole
    budget, for the advice to give more.
    """

    def __init__(
        self,
        base: Pair,
        make_side: Callable[[Setting], ModelSide | None],
        *,
        until: float,
        size: int | None = None,
        device: str | None = None,
        seed: int = 0,
        rounds: int = MIN_ROUNDS,
        seconds: float = 60.0,
        progress: Callable[[str], object] | None = None,
    ) -> None:
        self.base, self.make_side, self.until, self.size = base, make_side, until, size
        self.device, self.seed, self.rounds, self.seconds = device, seed, rounds, seconds
        self.say = progress or (lambda name: None)
        self.pairs: dict[str, Pair] = {UNCHANGED: base}
        self.stack = contextlib.ExitStack()
        self.sample: Sample | None = None

    def run(self, candidates: Sequence[Candidate]) -> tuple[list[Measured], list[NotRun]]:
        """Those that were run, best first, and those that were not."""
        with self.stack:
            arms, left = self._prepare(candidates)
            if not arms:
                return [], left
            by_name = {arm.candidate.what: arm for arm in arms}
            measured = self._rank(self._measure(by_name, CONFIRM * self._time_left()))
            confirmed: set[str] = set()
            while (best := measured[0]).gain and best.what not in confirmed:
                arm = by_name[best.what]
                if self._time_left() < (self.rounds + 1) * 2 * self._least(arm.pair):
                    break
                confirmed.add(best.what)
                again = self._measure({best.what: arm}, self._time_left())[0]
                measured = self._rank([_joined(best, again), *measured[1:]])
            return measured, left

    def _time_left(self) -> float:
        return self.until - time.perf_counter()

    def _least(self, pair: Pair) -> float:
        """Seconds that a round of a pair takes at least."""
        return max(
            LEAST_ROUND, pair.start_s + 2 * min(pair.together_s, 0.25) + max(0.0, pair.together_s - 0.25)
        )

    def _prepare(self, candidates: Sequence[Candidate]) -> tuple[list[_Arm], list[NotRun]]:
        arms: list[_Arm] = []
        left: list[NotRun] = []
        jobs = self._least(self.base)
        for candidate in candidates:
            extra = self._least(self.base) * (2 if candidate.convert and SAMPLE not in self.pairs else 1)
            needed = (self.rounds + 1) * (jobs + extra)
            # The first one, of which the most is expected, may take twice what is left: no advice would be worth less.
            if self._time_left() * (CONFIRM if arms else 2) < needed:
                left.append(NotRun(candidate.what, f"no time left: --seconds {2 * self.seconds:g} runs it"))
                continue
            self.say(f"preparing {candidate.what}")
            try:
                arm = self._arm(candidate)
            except FastloadError as error:
                left.append(NotRun(candidate.what, str(error)))
                continue
            except RuntimeError as error:  # torch's own: no memory for it, or no kernel
                left.append(NotRun(candidate.what, f"it failed here: {reason(error)}"))
                continue
            slower = _per_image_s(arm.pair) / _per_image_s(self.pairs[arm.against])
            if slower > TOO_SLOW:
                left.append(NotRun(candidate.what, f"its first steps took {slower:.1f} times as long"))
                continue
            arms.append(arm)
            jobs += extra
        return arms, left

    def _arm(self, candidate: Candidate) -> _Arm:
        setting = replace(self.base.setting, **candidate.change)
        side, costs = self.base.side, [candidate.cost]
        if candidate.variant:
            setting = replace(setting, variant=replace(setting.variant, **candidate.variant))
        if side is not None and (candidate.variant or setting.batch_size != self.base.setting.batch_size):
            clock = time.perf_counter()
            side = self.make_side(setting)
            if side is not None:
                side.try_once(setting.batch_size)
            if setting.variant.compile and not self.base.setting.variant.compile:
                costs.append(f"{time.perf_counter() - clock:.0f} s to compile")
        data, against = self.base.dataset, UNCHANGED
        if candidate.convert is not None:
            sample = self._sampled()
            stored = sample.convert(candidate.convert)
            data, against = stored.data, SAMPLE
            now = sum(_bytes(path) for path in self.base.dataset.paths)
            costs.append(
                f"{size_text(stored.bytes)} of disk beside the {size_text(now)} of now, {duration(stored.seconds)} to convert "
                f"(both from {len(sample):,} images)"
            )
        pair = self._pair(data, setting, side)
        return _Arm(candidate, pair, against, ", ".join(cost for cost in costs if cost) or "none")

    def _pair(self, data: Any, setting: Setting, side: ModelSide | None) -> Pair:
        pair = Pair(data, setting, side, seed=self.seed, device=self.device)
        self.stack.callback(pair.close)
        pair.warm_up(0.2, size=self.size)
        return pair

    def _sampled(self) -> Sample:
        """The sample, and the unchanged loader over it, which its conversions are compared with."""
        if self.sample is None:
            self.sample = self.stack.enter_context(Sample(self.base.dataset, self.base.setting.batch_size))
            self.pairs[SAMPLE] = self._pair(self.sample.as_is, self.base.setting, self.base.side)
        return self.sample

    def _measure(self, arms: dict[str, _Arm], seconds: float) -> list[Measured]:
        pairs = {name: self.pairs[name] for name in dict.fromkeys(arm.against for arm in arms.values())}
        pairs.update({what: arm.pair for what, arm in arms.items()})
        share = min(max(seconds / (self.rounds + 1) / len(pairs), LEAST_ROUND), MOST_ROUND)

        def job(pair: Pair) -> Callable[[], float]:
            steps = steps_for(share, pair)
            return lambda: pair.together(steps).images_s

        series = interleave(
            {name: job(pair) for name, pair in pairs.items()}, rounds=self.rounds, progress=self.say
        )
        found = []
        for what, arm in arms.items():
            c = arm.candidate
            by = ratio(series[what], series[arm.against])
            found.append(Measured(what, c.setting, c.side, series[what], by, arm.cost))
        return found

    def _rank(self, measured: Sequence[Measured]) -> list[Measured]:
        return sorted(measured, key=lambda m: (m.gain, m.ratio.median), reverse=True)


def _joined(first: Measured, second: Measured) -> Measured:
    figure = Series(first.figure.name, first.figure.rounds + second.figure.rounds, first.figure.unit)
    by = Series(first.ratio.name, first.ratio.rounds + second.ratio.rounds, first.ratio.unit)
    return replace(first, figure=figure, ratio=by)


def _per_image_s(pair: Pair) -> float:
    return max(pair.together_s, 1e-9) / pair.setting.batch_size


def _bytes(path: str) -> int:
    import os

    try:
        return os.path.getsize(path)
    except OSError:
        return 0


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
