"""Which side is the bottleneck, by how much, and what to change first: a pure function of measured figures.

Nothing is measured here, and no figure appears in the sentence that was not measured: a change that was run comes with its
figure, one that was not comes without a promise. The trade-off is a careful tongue: where the rounds scatter more than the sides
differ, the verdict is "balanced", and a change that won by luck in a round or two has gained nothing.

>>> verdict(Figures(loader=1000, model=200, both=195, stall=0.01)).bottleneck
'model'
>>> from_record(harness.read_jsonl("bench.jsonl")[-1]).sentence
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fastload.errors import DataError, UsageError

Side = Literal["loader", "model", "balanced"]

# Two sides nearer than this are called balanced even on a silent machine: changing one of them soon hits the other.
BALANCE = 0.15
# A PerImage step is named first when the loader without it is at least this much faster.
PER_IMAGE_GAIN = 1.15
# Waiting that is worth a word when the sides alone did not predict it.
STALL_WORTH_SAYING = 0.10
# A change has gained when the median of its ratios is above GAIN and this share of the rounds is above 1.
GAIN, WON = 1.03, 0.8
# Stages that run in the thread that takes the batches; all others are shared out over the loader's threads.
SERIAL = ("draw", "mix", "copy")


@dataclass(frozen=True)
class Stage:
    """A step of the loader: ``us`` microseconds an image on one thread, ``share`` of the sum over the stages (0 to 1)."""

    name: str
    us: float
    share: float


@dataclass(frozen=True)
class Change:
    """A change that was run: images/s end to end, and its ratio to the unchanged in each round."""

    what: str
    setting: str
    side: str
    figure: float
    ratios: tuple[float, ...]
    cost: str = "none"

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def gain(self) -> bool:
        return gained(self.ratios)


@dataclass(frozen=True)
class Figures:
    """What was measured. Rates in images per second, medians over the rounds; ``stall`` is a share of wall time, 0 to 1.

    ``noise`` is the larger half range of the rounds of loader and model, as a share. ``loader_plain`` is the loader's rate
    without the pipeline's PerImage steps, ``None`` where it has none. ``shared_cores`` says that loader and model run on
    the same cores. ``stored_side`` is the median longer side of the stored images in pixels, ``None`` if unknown. ``model``,
    ``both`` and ``stall`` are None together where only the loader was measured. ``changes`` are those that were run, None where none
    was meant to be.
    """

    loader: float
    model: float | None
    both: float | None
    stall: float | None
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
    stages: tuple[Stage, ...] = ()
    changes: tuple[Change, ...] | None = None

    def __post_init__(self) -> None:
        if len({self.model is None, self.both is None, self.stall is None}) > 1:
            raise UsageError(
                "model, both and stall are measured together or not at all, got "
                f"{self.model}, {self.both} and {self.stall}"
            )
        for name in ("loader", "model", "both"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise UsageError(f"a verdict needs positive images per second for {name!r}, got {value}")
        if self.stall is not None and not 0 <= self.stall <= 1:
            raise UsageError(f"the stall is a share of time between 0 and 1, got {self.stall}")


@dataclass(frozen=True)
class Verdict:
    """``ratio`` is the faster side over the slower one (at least 1); ``change`` is the first thing to change.

    ``stage`` is the loader's stage that limits it, None where no stages were measured.
    """

    bottleneck: Side
    ratio: float
    change: str
    sentence: str
    stage: str | None = None


def gained(ratios: Sequence[float]) -> bool:
    """Whether a change helped: the median above 1.03, and at least 80% of the rounds above 1."""
    won = sum(value > 1 for value in ratios)
    return bool(ratios) and statistics.median(ratios) > GAIN and won >= WON * len(ratios)


def ranked(changes: Sequence[Change]) -> list[Change]:
    """Those that gained first, each part by the median of its ratios."""
    return sorted(changes, key=lambda change: (change.gain, change.ratio), reverse=True)


def limiting_stage(stages: Sequence[Stage], threads: int) -> Stage | None:
    """The stage that holds the loader back: the dearest one of those that cost the most time per image.

    Threads share out their stages, so those count a ``threads``-th part; drawing, mixing and copying are done by one.
    """
    serial = [stage for stage in stages if stage.name in SERIAL]
    parallel = [stage for stage in stages if stage.name not in SERIAL]
    if sum(s.us for s in serial) > sum(s.us for s in parallel) / max(threads, 1):
        return max(serial, key=lambda stage: stage.us)
    return max(parallel, key=lambda stage: stage.us, default=None)


def rate(value: float) -> str:
    """Images per second for people: three significant digits, never '0'."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def times(ratio: float) -> str:
    """A ratio for people: 366x, 2.4x, 1.05x."""
    return f"{ratio:,.0f}x" if ratio >= 10 else f"{ratio:.1f}x" if ratio >= 1.95 else f"{ratio:.2f}x"


def bottleneck(figures: Figures) -> Side:
    """The slower side, or 'balanced' where the difference is within the noise or 15%; 'loader' where there is no model."""
    if figures.model is None:
        return "loader"
    margin = 1 + max(BALANCE, figures.noise)
    if figures.loader > figures.model * margin:
        return "model"
    if figures.model > figures.loader * margin:
        return "loader"
    return "balanced"


def first_change(figures: Figures) -> str:
    """The first change to try: the best of those that were run and gained, with its figure, else what is left to do."""
    if figures.changes is None:
        return _guess(figures)
    best = next((change for change in ranked(figures.changes) if change.gain), None)
    if best is not None:
        together = "together" if figures.model is not None else "alone"
        return (
            f"{best.what} ({best.setting}): it was run and made {rate(best.figure)} images/s {together}, "
            f"{times(best.ratio)} the unchanged, at this cost: {best.cost}"
        )
    count = len(figures.changes)
    if not count:
        return _guess(figures)
    ran = "the one change that was run" if count == 1 else f"none of the {count} changes that were run"
    return f"nothing: {ran} {'did not gain' if count == 1 else 'gained'}, which leaves {_left(figures)}"


def _left(figures: Figures) -> str:
    """What no bench can run."""
    side = bottleneck(figures)
    if side == "loader":
        return "more or faster cores" if figures.device == "cpu" else "more cores or a faster disk"
    if figures.device == "cpu":
        return "a GPU, a smaller model or a smaller --size"
    return "a faster GPU, a smaller model or a smaller --size"


def _guess(figures: Figures) -> str:
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
    change = first_change(f)
    stage = limiting_stage(f.stages, min(f.threads, f.cores))
    name = stage.name if stage is not None else None
    tail = f"change first {change}" if not change.startswith("nothing") else f"change {change}"
    if f.model is None or f.both is None or f.stall is None:
        slow = f", and {_limits(stage)}" if stage is not None else ""
        return Verdict(
            side, 1.0, change, f"The loader alone makes {rate(f.loader)} images/s{slow}; {tail}.", name
        )
    ratio = max(f.loader / f.model, f.model / f.loader)
    alone = f"the loader alone makes {rate(f.loader)} images/s and the model alone takes {rate(f.model)}"
    together = f"together {rate(f.both)} with {f.stall:.0%} of the time spent waiting for images"
    if side == "balanced":
        why = "which is within the noise of the rounds" if f.noise > BALANCE else "too near to blame one side"
        head = f"Neither side is clearly the bottleneck: {alone} ({times(ratio)} apart, {why}), {together}"
    else:
        limit = f", and {_limits(stage)}" if side == "loader" and stage is not None else ""
        head = f"The {side} is the bottleneck, {times(ratio)} slower than the other side{limit}: {alone}, {together}"
    if f.shared_cores:
        tail += (
            f"; loader and model share these {f.cores} cores, so each slows the other "
            "and neither figure foretells a machine with a GPU"
        )
    elif side != "loader" and f.stall > STALL_WORTH_SAYING:
        tail += (
            "; the wait is more than the two figures alone explain, so look for uneven images or a busy disk"
        )
    return Verdict(side, ratio, change, f"{head}; {tail}.", name)


def _limits(stage: Stage) -> str:
    return f"its stage {stage.name!r} limits it ({stage.share:.0%} of its time per image)"


def from_record(record: Mapping[str, Any]) -> Verdict:
    """The verdict of a record of kind "bench", from its figures alone; DataError where the record has not got them."""
    try:
        settings = record["settings"]
        plain, model = record.get("loader_without_per_image"), record.get("model")
        stages = tuple(Stage(s["stage"], float(s["us"]), float(s["share"])) for s in record.get("stages", ()))
        changes = record.get("changes")
        figures = Figures(
            loader=record["loader"]["median"],
            model=model["median"] if model else None,
            both=record["both"]["median"] if model else None,
            stall=record["stall"]["median"] if model else None,
            noise=max(side["noise"] for side in (record["loader"], model) if side),
            loader_plain=plain["median"] if plain else None,
            shared_cores=bool(settings["shared_cores"]),
            device=str(settings["device"]).partition(":")[0],
            threads=settings["threads"],
            cores=record["environment"]["cores"],
            batch_size=settings["batch_size"],
            size=settings["size"],
            stored_side=settings["stored_side"],
            store=settings["store"],
            stages=stages,
            changes=None if changes is None else tuple(_change(entry) for entry in changes),
        )
    except (KeyError, TypeError) as error:
        raise DataError(
            f"this is no record of fastload bench: {type(error).__name__} {error}; make one with "
            f"fastload bench DATA --out FILE, got kind {record.get('kind')!r}"
        ) from error
    return verdict(figures)


def _change(entry: Mapping[str, Any]) -> Change:
    return Change(
        entry["what"],
        entry["setting"],
        entry["side"],
        entry["figure"]["median"],
        tuple(entry["ratio"]["rounds"]),
        entry["cost"],
    )
