"""Threads, prefetch and batch size with the highest end-to-end figure on this machine: ``fastload bench DATA --tune``.

One coordinate after the other: every value of it takes short turns with the best settings so far, the worse half is dropped, and
what is left takes more turns, until no coordinate moves. Short turns choose, but they do not prove: in the end the best settings and the
defaults alternate for at least five full rounds, and the defaults win what is not clearly a gain. The trade-off is that a search by
coordinates can miss a pair of values that help only together.

>>> result = tune("photos.beton", "resnet18"); print(result["sentence"]); print(result["paste"])
"""

from __future__ import annotations

import contextlib
import os
import shlex
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fastload.benchmarks import machine
from fastload.benchmarks.harness import MIN_ROUNDS, Series, interleave, noise_notes, ratio
from fastload.benchmarks.options import NO_MODEL, BenchOptions
from fastload.benchmarks.pairing import Pair, Setting, steps_for
from fastload.benchmarks.subject import Subject
from fastload.benchmarks.verdict import gained, rate, times
from fastload.errors import FastloadError, UsageError

if TYPE_CHECKING:
    from fastload.dataset import Dataset

AXES = ("threads", "batch_size", "prefetch")
BETTER = 1.02  # a value must beat the best so far by this to take its place
LEAST_TURN, MOST_TURN = 0.1, 1.0  # seconds
PROOF = 0.4  # of the budget, for the final rounds
TURNS = 3  # of every value; twice as many for those in the better half
MEMORY_SHARE = 0.25  # of the machine's memory that prefetched batches may take


@dataclass(frozen=True)
class Point:
    """Where the search can be: what ``Loader`` and ``fastload train`` take."""

    threads: int
    prefetch: int
    batch_size: int

    def to_json(self) -> dict[str, int]:
        return {"threads": self.threads, "prefetch": self.prefetch, "batch_size": self.batch_size}


def values(axis: str, now: Point, cores: int, images: int, largest: int) -> list[int]:
    """Values of ``axis`` to try beside the present one, in rising order.

    ``largest``: the largest batch allowed, at least the present one; ``images``: of the data, which a batch cannot exceed.
    """
    if axis == "threads":
        found = {1, max(1, cores // 2), max(1, cores - 1), cores, cores + max(1, cores // 2), 2 * cores}
    elif axis == "prefetch":
        found = {1, 2, 4, 8}
    elif axis == "batch_size":
        size = now.batch_size
        found = {value for value in (size // 2, 2 * size, 4 * size) if 1 <= value <= min(images, largest)}
    else:
        raise UsageError(f"an axis is one of {', '.join(AXES)}, got {axis!r}")
    return sorted(found - {getattr(now, axis)})


def search(
    start: Point,
    axes: Sequence[str],
    choices: Callable[[str, Point], Sequence[int]],
    turn: Callable[[Point], float],
    enough: Callable[[], bool],
) -> tuple[Point, dict[Point, list[float]]]:
    """The best point by short turns, and every figure of every point. Pure but for ``turn``, which measures (higher is better).

    Values are compared by the median of their ratio to the best point so far within the same turn. ``enough`` ends the search
    after the turn that is running.
    """
    best = start
    figures: dict[Point, list[float]] = {}
    still = 0  # axes in a row that did not move
    at = 0
    while still < len(axes) and not enough():
        axis = axes[at % len(axes)]
        at += 1
        rivals = [replace(best, **{axis: value}) for value in choices(axis, best)]
        ratios: dict[Point, list[float]] = {rival: [] for rival in rivals}
        for phase in range(2):
            for _ in range(TURNS):
                if enough() or not ratios:
                    break
                base = turn(best)
                figures.setdefault(best, []).append(base)
                for rival in ratios:
                    figure = turn(rival)
                    figures.setdefault(rival, []).append(figure)
                    ratios[rival].append(figure / base if base else 0.0)
            if phase == 0:
                order = sorted(
                    (rival for rival in ratios if len(ratios[rival]) == TURNS),
                    key=lambda rival: statistics.median(ratios[rival]),
                    reverse=True,
                )
                ratios = {rival: ratios[rival] for rival in order[: max(1, len(order) // 2)]}
        seen = {rival: statistics.median(found) for rival, found in ratios.items()}
        winner = max(seen, key=lambda rival: seen[rival], default=None)
        if winner is not None and seen[winner] > BETTER:
            best, still = winner, 0
        else:
            still += 1
    return best, figures


def tune(
    data: str | os.PathLike[str] | Dataset,
    model: str = "resnet18",
    *,
    size: int = 224,
    batch_size: int = 64,
    keep_batch_size: bool = False,
    device: str | None = None,
    seconds: float = 60.0,
    rounds: int = MIN_ROUNDS,
    transforms: Sequence[Any] | None = None,
    seed: int = 0,
    engine: str = "cpu",
    decode: str = "fast",
    progress: bool = True,
) -> dict[str, Any]:
    """Search from the defaults (threads: all cores, prefetch 2, ``batch_size``) and return a record of kind "tune".

    ``model`` "none" tunes the loader alone. ``keep_batch_size`` leaves the batch, and so the training, as it is. Errors as for
    :func:`fastload.bench`.
    """
    started = time.perf_counter()
    options = BenchOptions(
        model, size, batch_size, device, None, seconds, rounds, seed, engine=engine, decode=decode
    )
    with Subject.open(data, options, transforms, share=0.3) as subject:
        keep = keep_batch_size or subject.cut
        return _Tuner(subject, keep, batch_size, progress).run(started)


class _Tuner:
    def __init__(self, subject: Subject, keep_batch_size: bool, asked: int, progress: bool) -> None:
        self.s, self.o, self.progress = subject, subject.options, progress
        self.keep, self.asked = keep_batch_size, asked
        self.notes = list(subject.notes)
        self.cores = machine.usable_cores()
        self.pairs: dict[Point, Pair] = {}
        self.sides: dict[int, Any] = {self.o.batch_size: subject.side}
        self.broken: dict[int, str] = {}
        self.stack = contextlib.ExitStack()
        self.share = LEAST_TURN

    def run(self, started: float) -> dict[str, Any]:
        from tqdm.auto import tqdm

        with self.stack:
            bar = self.stack.enter_context(
                tqdm(desc="tune", unit="turn", disable=not self.progress, leave=False)
            )
            setting = self.s.setting()
            start = Point(setting.threads, setting.prefetch, setting.batch_size)
            base = self._pair(start)
            # However long it took to open the data and to warm up, a part of the time is for the search.
            until = max(started + (1 - PROOF) * self.o.seconds, time.perf_counter() + 0.3 * self.o.seconds)
            axes = [axis for axis in AXES if not (axis == "batch_size" and self.keep)]
            # About eight values an axis, each in some turns with the best so far, and two passes over the axes.
            turns = 2 * len(axes) * 8 * TURNS
            self.share = min(max((until - time.perf_counter()) / turns, LEAST_TURN), MOST_TURN)
            self.share = max(self.share, base.start_s + base.together_s)

            def turn(point: Point) -> float:
                bar.set_postfix_str(
                    f"{point.threads} threads, prefetch {point.prefetch}, batches of {point.batch_size}"
                )
                bar.update(1)
                return self._turn(point)

            best, figures = search(
                start, axes, self._choices, turn, lambda: time.perf_counter() + self.share > until
            )
            record = self._record(start, best, figures)
            self._say_what_was_not_reached(start, axes, figures)
            if best != start:
                record |= self._prove(start, best, max(started + self.o.seconds, until), bar)
        return self._finish(record, start, best, time.perf_counter() - started)

    def _choices(self, axis: str, now: Point) -> list[int]:
        side = self.o.size
        room = MEMORY_SHARE * (machine.ram_bytes() or 2**33)
        largest = max(now.batch_size, int(room / (15 * side * side * (now.prefetch + 1))))
        found = values(axis, now, self.cores, len(self.s.dataset), largest)
        if axis != "batch_size":
            return found
        return [value for value in found if self._side(value)]

    def _side(self, batch_size: int) -> bool:
        """Whether the model can learn from such batches here; makes its side if it can."""
        if batch_size not in self.sides and batch_size not in self.broken:
            try:
                side = self.s.make_side(replace(self.s.setting(), batch_size=batch_size))
                if side is not None:
                    side.try_once(batch_size)
                self.sides[batch_size] = side
            except FastloadError as error:
                self.broken[batch_size] = str(error)
        return batch_size in self.sides

    def _setting(self, point: Point) -> Setting:
        return replace(
            self.s.setting(), threads=point.threads, prefetch=point.prefetch, batch_size=point.batch_size
        )

    def _pair(self, point: Point) -> Pair:
        if point not in self.pairs:
            pair = self.s.pair(self._setting(point), self.sides[point.batch_size])
            self.stack.callback(pair.close)
            pair.warm_up(0.1, size=self.o.size)
            self.pairs[point] = pair
        return self.pairs[point]

    def _turn(self, point: Point) -> float:
        pair = self._pair(point)
        # What a round takes before it counts comes on top, or a long queue would leave no time to measure.
        return pair.together(steps_for(self.share + pair.start_s, pair, least=3)).images_s

    def _prove(self, start: Point, best: Point, until: float, bar: Any) -> dict[str, Any]:
        """The best and the defaults in alternating rounds."""
        pairs = {"the best": self._pair(best), "the defaults": self._pair(start)}
        share = min(max((until - time.perf_counter()) / (self.o.rounds + 1) / 2, LEAST_TURN), 3 * MOST_TURN)

        def job(pair: Pair) -> Callable[[], float]:
            steps = steps_for(share, pair)
            return lambda: pair.together(steps).images_s

        series = interleave(
            {name: job(pair) for name, pair in pairs.items()},
            rounds=self.o.rounds,
            progress=lambda name: bar.set_postfix_str(f"{name}, final rounds"),
        )
        self.notes += noise_notes(series.values())
        by = ratio(series["the best"], series["the defaults"])
        return {
            "figure": series["the best"].to_json(),
            "default_figure": series["the defaults"].to_json(),
            "ratio": by.to_json(),
        }

    def _record(self, start: Point, best: Point, figures: Mapping[Point, Sequence[float]]) -> dict[str, Any]:
        tried = [
            {**point.to_json(), "images_s": round(statistics.median(found), 2)}
            for point, found in figures.items()
        ]
        if not figures:
            self.notes.append("the time was too short for a search; give more --seconds")
        return {
            "kind": "tune",
            "tried": sorted(tried, key=lambda entry: -entry["images_s"]),
            "default": self._point(start, figures),
            "best": self._point(best, figures),
            "figure": None,
            "default_figure": None,
            "ratio": None,
        }

    def _say_what_was_not_reached(
        self, start: Point, axes: Sequence[str], figures: Mapping[Point, Sequence[float]]
    ) -> None:
        """The defaults can only be best among what was tried."""
        missed = [
            axis.replace("_", " ")
            for axis in axes
            if all(getattr(point, axis) == getattr(start, axis) for point in figures)
        ]
        if missed and figures:
            self.notes.append(
                f"the time was up before another {' or '.join(missed)} was tried; --seconds {3 * self.o.seconds:g} reaches it"
            )

    @staticmethod
    def _point(point: Point, figures: Mapping[Point, Sequence[float]]) -> dict[str, Any]:
        found = figures.get(point)
        return {**point.to_json(), "images_s": round(statistics.median(found), 2) if found else None}

    def _finish(self, record: dict[str, Any], start: Point, best: Point, seconds: float) -> dict[str, Any]:
        dataset = self.s.dataset
        for batch, why in self.broken.items():
            self.notes.append(f"batches of {batch} were left out: {why}")
        chosen = best if proved(record) else start
        if chosen.batch_size != start.batch_size:
            self.notes.append(
                f"another batch size is another training: set the learning rate anew for {chosen.batch_size}, or keep "
                f"{start.batch_size} with --keep-batch-size"
            )
        # A batch made smaller only to measure in time is not what is to be trained with.
        pasted = replace(chosen, batch_size=self.asked) if chosen.batch_size == self.o.batch_size else chosen
        settings = {
            "data": [os.path.basename(path) for path in dataset.paths],
            "images": len(dataset),
            "model": self.o.model,
            "size": self.o.size,
            "device": str(self.s.target),
            "amp": self.s.side.amp if self.s.side is not None else None,
            "engine": self.o.engine,
            "decode": self.o.decode,
            "transforms": [repr(spec) for spec in self.s.pipeline],
            "keep_batch_size": self.keep,
            "rounds": self.o.rounds,
            "seconds": self.o.seconds,
        }
        return {
            **record,
            "sentence": sentence(record),
            "paste": paste(
                pasted, None if self.o.model == NO_MODEL else self.o.model, dataset.paths[0], self.s.pipeline
            ),
            "notes": self.notes,
            "seconds": round(seconds, 1),
            "settings": settings,
            "environment": machine.environment(dataset.paths[0] if dataset.paths else None),
        }


def proved(record: Mapping[str, Any]) -> bool:
    """Whether the best settings of a record of kind "tune" have beaten the defaults in its alternating rounds."""
    return bool(record.get("ratio")) and gained(record["ratio"]["rounds"])


def sentence(record: Mapping[str, Any]) -> str:
    """What a record of kind "tune" says, from its figures alone."""
    best, default, by = record["best"], record["default"], record.get("ratio")
    if not by:
        tried = len(record["tried"])
        return (
            f"The defaults ({_text(default)}) are best: none of the {max(tried - 1, 0)} other settings that were tried "
            "beat them in short turns."
        )
    shown = Series("ratio", tuple(by["rounds"]), "x")
    if not proved(record):
        return (
            f"The defaults ({_text(default)}) are best: the best found by short turns, {_text(best)}, made "
            f"{shown.median:.2f}x of them [{shown.low:.2f}-{shown.high:.2f}] in {shown.n} alternating rounds."
        )
    return (
        f"{_text(best)[0].upper()}{_text(best)[1:]} is {times(shown.median)} the defaults ({_text(default)}): "
        f"{rate(record['figure']['median'])} against {rate(record['default_figure']['median'])} images/s in {shown.n} "
        f"alternating rounds [{shown.low:.2f}-{shown.high:.2f}]."
    )


def _text(point: Mapping[str, Any]) -> str:
    threads = point["threads"]
    return f"{threads} thread{'s' if threads != 1 else ''}, prefetch {point['prefetch']}, batches of {point['batch_size']}"


def paste(point: Point, model: str | None, path: str, pipeline: Sequence[Any]) -> str:
    """Arguments of ``Loader``, and the command line of a training, for these settings. ``train`` has no prefetch to set."""
    name = os.path.basename(path)
    lines = [
        f"fastload.Loader({name!r}, {point.batch_size}, transforms={_spelled(tuple(pipeline))}, shuffle=True, "
        f"threads={point.threads}, prefetch={point.prefetch})"
    ]
    if model is not None:
        lines.append(
            f"fastload train {shlex.quote(name)} --model {model} --batch-size {point.batch_size} --threads {point.threads}"
        )
    return "\n".join(lines)


def _spelled(pipeline: tuple[Any, ...]) -> str:
    """A pipeline as code: the preset that it is, else the steps by their names."""
    from fastload import transforms

    size = next((spec.size for spec in reversed(pipeline) if getattr(spec, "size", None) is not None), None)
    if isinstance(size, tuple) and size[0] == size[1]:
        for preset in ("train", "eval"):
            if pipeline == getattr(transforms, preset)(size[0]):
                return f"fastload.transforms.{preset}({size[0]})"
    return "[" + ", ".join(repr(spec) for spec in pipeline) + "]"


def tune_table(record: Mapping[str, Any]) -> str:
    """What was tried, best first, for people."""
    lines = [f"{'threads':>8} {'prefetch':>9} {'batch':>6} {'images/s, short turns':>22}"]
    keys = ("threads", "prefetch", "batch_size")
    for entry in record["tried"]:
        same = [entry[key] for key in keys] == [record["default"][key] for key in keys]
        lines.append(
            f"{entry['threads']:>8} {entry['prefetch']:>9} {entry['batch_size']:>6} {rate(entry['images_s']):>22}"
            + ("  default" if same else "")
        )
    return "\n".join(lines)
