"""Which changes are worth running, in which order, and why the others are not: a pure function of what was measured so far.

A change is run only where it can help: no loader setting speeds up a step that waits for the model. The trade-off is that a rule
decides what is left out, so everything left out is named with the reason. What a change brings is never said here; it is
measured (:mod:`fastload.benchmarks.changes`).

>>> run, left = candidates(Situation(loader=400, model=4000, both=390, stall=0.9, stage="decode", stored_side=2000))
>>> run[0].what
'a smaller stored size'
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastload.benchmarks.pipelines import Need, without_normalize, without_per_image
from fastload.benchmarks.verdict import GAIN, times

# A side that is this much faster than the other has no part in the time of both together where they overlap.
APART = 1.5
# Stored images this much larger than the pipeline needs are worth storing anew.
TOO_LARGE = 1.15
SMALL_SHARE = 0.05  # of the time: less waiting than this cannot be gained back


@dataclass(frozen=True)
class Candidate:
    """A change to run: ``change`` are fields of Setting, ``variant`` fields of its Variant, ``convert`` options of a conversion.

    ``setting`` is what a user pastes; ``cost`` is what is known of its price beforehand, empty for none.
    """

    what: str
    setting: str
    side: str
    cost: str = ""
    change: Mapping[str, Any] = field(default_factory=dict)
    variant: Mapping[str, Any] = field(default_factory=dict)
    convert: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class NotRun:
    """A change that was not run, and why."""

    what: str
    why: str

    def to_json(self) -> dict[str, str]:
        return {"what": self.what, "why": self.why}


@dataclass(frozen=True)
class Situation:
    """What is known when changes are chosen. Rates in images/s; ``model``, ``both``, ``stall`` None where there is no model.

    ``stage``: the loader's limiting stage. ``need``: the stored size that the pipeline can use, None where it must stay as it is.
    ``raw_bytes``: all images stored raw at that size; ``room_bytes``: free disk, ``memory_bytes``: of the machine. ``floats``: the
    loader hands out floats that a GPU (or the step) could make of bytes. ``cut_batch``: the batch was made smaller to fit the time.
    ``refused``: engines that do not work here, with the reason.
    """

    loader: float
    model: float | None
    both: float | None
    stall: float | None
    stage: str | None = None
    shared_cores: bool = False
    device: str = "cpu"
    threads: int = 1
    cores: int = 1
    prefetch: int = 2
    batch_size: int = 64
    images: int = 1_000_000
    size: int = 224
    decode: str = "fast"
    engine: str = "cpu"
    engines: tuple[str, ...] = ("cpu",)
    refused: Mapping[str, str] = field(default_factory=dict)
    store: str = "jpeg"
    stored_side: int | None = None
    need: Need | None = None
    raw_bytes: float = 0.0
    room_bytes: float = math.inf
    memory_bytes: float = math.inf
    pipeline: tuple[Any, ...] = ()
    floats: bool = True
    cut_batch: bool = False
    amp: str = "off"
    channels_last: bool = True
    compiled: bool = False
    compile: bool = False
    data: str = "DATA.beton"


Maker = Callable[[Situation], Iterable[Candidate | NotRun]]


def candidates(s: Situation) -> tuple[list[Candidate], list[NotRun]]:
    """Changes to run, those of most expected use first, and those that are not, with the reason."""
    loader, model = _can_help(s)
    sides = [
        ("the loader's side", loader, _ORDER.get(s.stage or "", _DECODING)),
        ("the model's side", model, _LEARNING),
    ]
    if s.model is not None and s.model < s.loader:
        sides.reverse()
    found: list[Candidate | NotRun] = []
    asked: set[Maker] = set()  # a batch size acts on both sides
    for name, hopeless, makers in sides:
        if hopeless is not None:
            found.append(NotRun(name, hopeless))
            continue
        for make in makers:
            if make not in asked:
                asked.add(make)
                found += make(s)
    run = [entry for entry in found if isinstance(entry, Candidate)]
    return run, [entry for entry in found if isinstance(entry, NotRun)]


def _can_help(s: Situation) -> tuple[str | None, str | None]:
    """Why no change to the loader, and to the model, can help; None where one can."""
    if s.model is None or s.both is None or s.stall is None:
        return None, "there is no model, only the loader was measured"
    apart = times(max(s.loader / s.model, s.model / s.loader))
    loader = f"the loader is {apart} faster than the model: no change to it can help"
    model = f"the model is {apart} faster than the loader: no change to it can help"
    if s.shared_cores:  # each takes time from the other, in proportion to its own
        return (
            loader if 1 + s.model / s.loader < GAIN else None,
            model if 1 + s.loader / s.model < GAIN else None,
        )
    return (
        loader if s.loader > APART * s.model and s.stall < SMALL_SHARE else None,
        model if s.model > APART * s.loader else None,
    )


def _per_image(s: Situation) -> Iterable[Candidate | NotRun]:
    bare = without_per_image(s.pipeline, s.size)
    if bare is not None:
        yield Candidate(
            "no PerImage step",
            "fastload.transforms in place of PerImage",
            "loader",
            "the model no longer sees what PerImage did",
            {"pipeline": bare},
        )


def _stored_size(s: Situation) -> Iterable[Candidate | NotRun]:
    what = "a smaller stored size"
    if s.need is None:
        yield NotRun(
            what, "this pipeline takes its pixels from the images as they are, and would give others"
        )
    elif s.stored_side is None or s.stored_side <= TOO_LARGE * s.need.longer:
        yield NotRun(what, f"{s.size} px need about {s.need.side} px, and {s.stored_side} px are stored")
    else:
        store = {"store": s.store}
        yield Candidate(
            what,
            f"fastload convert {s.data} SMALLER.beton {s.need.option} {s.need.side}",
            "loader",
            f"small crops come from fewer pixels than the {s.stored_side} px of now",
            convert={_key(s.need): s.need.side, **store},
        )


def _raw(s: Situation) -> Iterable[Candidate | NotRun]:
    what = "raw store"
    smaller = s.need if s.need is not None and (s.stored_side or 0) > TOO_LARGE * s.need.longer else None
    if s.store == "raw":
        yield NotRun(what, "the images are stored raw already")
    elif s.stage == "read":
        yield NotRun(what, "raw images are larger, and reading is what limits")
    elif s.raw_bytes > 0.9 * s.room_bytes:
        yield NotRun(
            what, f"it takes {size_text(s.raw_bytes)}, and {size_text(s.room_bytes)} of the disk are free"
        )
    elif s.raw_bytes > 0.8 * s.memory_bytes:
        yield NotRun(
            what,
            f"it takes {size_text(s.raw_bytes)} and the machine has {size_text(s.memory_bytes)} of memory to keep it in",
        )
    else:
        yield Candidate(
            f"raw store at {smaller.side} px" if smaller else what,
            f"fastload convert {s.data} RAW.beton --store raw"
            + (f" {smaller.option} {smaller.side}" if smaller else ""),
            "loader",
            "small crops come from fewer pixels" if smaller else "",
            convert={"store": "raw", **({_key(smaller): smaller.side} if smaller else {})},
        )


def _fast(s: Situation) -> Iterable[Candidate | NotRun]:
    if s.store == "raw":
        return
    if s.decode == "fast":
        yield NotRun("fast decode", "the decode is the fast one already")
        return
    yield Candidate(
        "fast decode",
        'Loader(decode="fast")',
        "loader",
        "pixels half a level of 255 off on average",
        {"decode": "fast"},
    )


def _engines(s: Situation) -> Iterable[Candidate | NotRun]:
    for name in s.engines:
        if name != s.engine:
            yield Candidate(f"engine {name}", f'Loader(engine="{name}")', "loader", "", {"engine": name})
    for name, why in s.refused.items():
        yield NotRun(f"engine {name}", why)


def _more_threads(s: Situation) -> Iterable[Candidate | NotRun]:
    what, count = "more loader threads", min(2 * s.threads, max(2 * s.cores, 4))
    if s.threads < s.cores:
        count = min(count, s.cores)
    elif s.stage != "read" or count <= s.threads:
        yield NotRun(
            what, f"{s.threads} threads keep all {s.cores} cores busy, and it is not reading that limits"
        )
        return
    yield Candidate(what, _threads(count), "loader", f"{count - s.threads} more threads", {"threads": count})


def _fewer_threads(s: Situation) -> Iterable[Candidate | NotRun]:
    what = "fewer loader threads"
    if s.threads == 1 or s.stage == "read":
        yield NotRun(what, "it is one already" if s.threads == 1 else "reading waits, so each thread helps")
    elif not s.shared_cores and s.threads <= s.cores:
        yield NotRun(what, "the model does not need the cores that the threads take")
    else:
        count = max(1, min(s.threads, 2 * s.cores) // 2)
        yield Candidate(what, _threads(count), "loader", "", {"threads": count})


def _prefetch(s: Situation) -> Iterable[Candidate | NotRun]:
    what = "more prefetch"
    if s.model is not None and max(s.loader / s.model, s.model / s.loader) > 3 and s.stage != "read":
        yield NotRun(
            what,
            "a longer queue evens out batches; one side is so much slower that there is nothing to even out",
        )
        return
    count = 2 * s.prefetch
    more = s.prefetch * s.batch_size * s.size * s.size * 3 * (5 if s.floats else 1)
    yield Candidate(
        what, f"Loader(prefetch={count})", "loader", f"{size_text(more)} of memory more", {"prefetch": count}
    )


def _normalise(s: Situation) -> Iterable[Candidate | NotRun]:
    what = "uint8 batches, normalised on the device"
    if not s.floats:
        yield NotRun(what, "the loader hands out bytes until the device has them already")
    elif s.model is None:
        yield NotRun(what, "it moves work to the model's side, and there is no model")
    else:
        yield Candidate(
            what,
            "leave Normalize out of Loader(transforms=...) and normalise in the step",
            "both",
            "a line in the step; the numbers stay the same",
            {"pipeline": without_normalize(s.pipeline)},
            {"normalise": True},
        )


def _larger_batch(s: Situation) -> Iterable[Candidate | NotRun]:
    what = "a larger batch"
    if s.cut_batch:
        yield NotRun(what, "batches were cut to fit the time; more --seconds measure larger ones")
    elif 2 * s.batch_size > s.images:
        yield NotRun(what, f"the data hold {s.images:,} images")
    else:
        yield _batch(s, what, 2 * s.batch_size)


def _smaller_batch(s: Situation) -> Iterable[Candidate | NotRun]:
    what = "a smaller batch"
    if s.batch_size < 8:
        yield NotRun(what, f"it has only {s.batch_size} images")
    else:
        yield _batch(s, what, s.batch_size // 2)


def _batch(s: Situation, what: str, count: int) -> Candidate:
    memory = abs(count - s.batch_size) * (s.prefetch + 1) * s.size * s.size * 3 * (5 if s.floats else 1)
    return Candidate(
        what,
        f"--batch-size {count}, Loader(batch_size={count})",
        "both",
        f"another training: set the learning rate anew; {size_text(memory)} of loader memory "
        f"{'more' if count > s.batch_size else 'less'}",
        {"batch_size": count},
    )


def _amp(s: Situation) -> Iterable[Candidate | NotRun]:
    if s.amp != "off":
        yield NotRun("mixed precision", f"it is on already ({s.amp})")
        return
    yield Candidate(
        "mixed precision", "--amp bf16", "model", "sums of bfloat16's precision", {}, {"amp": "bf16"}
    )


def _channels_last(s: Situation) -> Iterable[Candidate | NotRun]:
    if s.channels_last:
        yield Candidate("NCHW memory", "--no-channels-last", "model", "", {}, {"channels_last": False})
    else:
        yield Candidate(
            "channels_last memory", "no --no-channels-last", "model", "", {}, {"channels_last": True}
        )


def _compile(s: Situation) -> Iterable[Candidate | NotRun]:
    if s.compiled:
        yield NotRun("torch.compile", "it is on already")
    elif not s.compile:
        yield NotRun("torch.compile", "compiling takes minutes: --compile runs it")
    else:
        yield Candidate("torch.compile", "--compile", "model", "", {}, {"compile": True})


def _smaller_size(s: Situation) -> Iterable[Candidate | NotRun]:
    side = max(32, round(s.size * 0.75 / 32) * 32)
    if side < s.size:
        yield NotRun("smaller images", f"they change what is learned: --size {side} measures them")


# Which way helps first depends on the stage that limits.
_DECODING: Sequence[Maker] = (
    _per_image, _stored_size, _raw, _fast, _more_threads, _engines, _normalise, _fewer_threads, _prefetch,
    _larger_batch, _smaller_batch,
)  # fmt: skip
_READING: Sequence[Maker] = (
    _more_threads, _stored_size, _per_image, _prefetch, _engines, _normalise, _larger_batch, _smaller_batch,
    _fewer_threads, _fast, _raw,
)  # fmt: skip
_PIXELS: Sequence[Maker] = (
    _per_image, _normalise, _more_threads, _engines, _stored_size, _fewer_threads, _prefetch, _larger_batch,
    _smaller_batch, _fast, _raw,
)  # fmt: skip
_COPYING: Sequence[Maker] = (
    _normalise, _smaller_batch, _larger_batch, _prefetch, _more_threads, _per_image, _stored_size, _engines,
    _fewer_threads, _fast, _raw,
)  # fmt: skip
_ORDER: Mapping[str, Sequence[Maker]] = {
    "read": _READING, "crop": _DECODING, "decode": _DECODING, "resize": _DECODING,
    "colour": _PIXELS, "per_image": _PIXELS, "normalise": _PIXELS, "mix": _PIXELS, "draw": _PIXELS, "copy": _COPYING,
}  # fmt: skip
_LEARNING: Sequence[Maker] = (_amp, _larger_batch, _channels_last, _compile, _smaller_size)


def _key(need: Need) -> str:
    return need.option.removeprefix("--").replace("-", "_")


def _threads(count: int) -> str:
    return f"--threads {count}, Loader(threads={count})"


def size_text(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"
