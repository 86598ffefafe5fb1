"""Is the loader or the model the bottleneck? Measure both apart, then together, and say it in one sentence.

Three jobs take turns: the loader alone; the model alone, on one synthetic batch that already lies on the device, doing exactly
what the trainer does for a batch (:func:`fastload.train.make_step`); and both together, where the time that the step loop
waits for images is the stall. The trade-off is a minute of time against certainty: the number of steps adapts to the budget, the
number of rounds does not.

>>> print(fastload.bench("photos.beton", "resnet18", size=224).verdict.sentence)
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fastload.benchmarks import machine
from fastload.benchmarks.harness import MIN_ROUNDS, Series, interleave, noise_notes
from fastload.benchmarks.options import BenchOptions
from fastload.benchmarks.side import ModelSide, make_side
from fastload.benchmarks.verdict import Figures, Verdict, verdict
from fastload.errors import DataError, UsageError

if TYPE_CHECKING:
    from fastload.dataset import Dataset
    from fastload.loader import Loader

# A loader fills its queue while another job is measured; these batches are taken off before the clock starts.
PREFETCH = 2
SHORT_EPOCH = 20
PerRound = dict[str, int]


@dataclass(frozen=True)
class BenchResult:
    """Every figure with its rounds. Rates in images/s; ``stall`` in shares of wall time (0 to 1).

    ``first_batch_s`` is the time from making the Loader to its first batch, in seconds, kernels cached or not as they were.
    """

    loader: Series
    model: Series
    both: Series
    stall: Series
    loader_plain: Series | None
    first_batch_s: float
    verdict: Verdict
    settings: dict[str, Any]
    environment: dict[str, Any]
    seconds: float
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """One JSON-able record with settings, machine, every round and the verdict."""
        plain = self.loader_plain
        return {
            "kind": "bench",
            "loader": self.loader.to_json(),
            "loader_without_per_image": plain.to_json() if plain else None,
            "model": self.model.to_json(),
            "both": self.both.to_json(),
            "stall": self.stall.to_json(),
            "first_batch_s": round(self.first_batch_s, 3),
            "bottleneck": self.verdict.bottleneck,
            "ratio": round(self.verdict.ratio, 3),
            "change_first": self.verdict.change,
            "verdict": self.verdict.sentence,
            "notes": self.notes,
            "seconds": round(self.seconds, 1),
            "settings": self.settings,
            "environment": self.environment,
        }

    def table(self) -> str:
        """The figures for people, one line each, without the verdict."""
        rows = [("loader alone", str(self.loader))]
        if self.loader_plain is not None:
            rows.append(("loader without PerImage", str(self.loader_plain)))
        batch = self.settings["batch_size"]
        rows += [
            ("model alone", f"{self.model}  ({1000 * batch / self.model.median:,.0f} ms a step of {batch})"),
            ("both together", str(self.both)),
            ("waiting for images", f"{self.stall.median:.1%} of the time"),
            ("loader start to first batch", f"{self.first_batch_s:.2f} s"),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def bench(
    data: str | os.PathLike[str] | Dataset,
    model: str = "resnet18",
    *,
    size: int = 224,
    batch_size: int = 64,
    device: str | None = None,
    threads: int | None = None,
    seconds: float = 40.0,
    rounds: int = MIN_ROUNDS,
    transforms: Sequence[Any] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> BenchResult:
    """Measure loader, model and both on this machine; see :class:`BenchResult`.

    ``data`` is a ``.beton`` path or an open Dataset; ``transforms`` a pipeline (default ``transforms.train(size)``). Raises
    ``UsageError`` for an unknown model, device or option, ``DataError`` for a damaged file.
    """
    started = time.perf_counter()
    options = BenchOptions(model, size, batch_size, device, threads, seconds, rounds, seed)
    import fastload
    from fastload import transforms as specs
    from fastload.train import pick_device

    target = pick_device(options.device)
    dataset = fastload.open(data) if isinstance(data, (str, os.PathLike)) else data
    owned = dataset is not data
    try:
        if len(dataset) == 0:
            raise DataError(f"there is nothing to measure: {dataset.path!r} holds no images")
        notes: list[str] = []
        if len(dataset) < options.batch_size:
            notes.append(
                f"the data hold {len(dataset)} images, so batches have {len(dataset)}, not {options.batch_size}"
            )
            options = replace(options, batch_size=len(dataset))
        pipeline = tuple(specs.train(options.size) if transforms is None else transforms)
        side, fitting = make_side(options, dataset, target)
        if fitting < options.batch_size:
            notes.append(
                f"a step of {options.batch_size} is too slow here for {options.seconds:g} s, so everything was measured "
                f"with batches of {fitting}; --seconds {options.seconds * options.batch_size / fitting:.0f} measures full ones"
            )
            options = replace(options, batch_size=fitting)
        return _Bench(options, dataset, pipeline, side, notes, progress).run(started)
    finally:
        if owned:
            dataset.close()


class _Bench:
    def __init__(
        self,
        options: BenchOptions,
        dataset: Dataset,
        pipeline: tuple[Any, ...],
        side: ModelSide,
        notes: list[str],
        progress: bool,
    ) -> None:
        self.o = options
        self.dataset = dataset
        self.pipeline = pipeline
        self.side = side
        self.notes = notes
        self.progress = progress
        self.stalls: list[float] = []
        self.batch_s = self.step_s = 0.0
        self.steps: PerRound = {}

    def make_loader(self, pipeline: tuple[Any, ...]) -> Loader:
        from fastload.loader import Loader

        return Loader(
            self.dataset,
            self.o.batch_size,
            transforms=pipeline,
            shuffle=True,
            seed=self.o.seed,
            threads=self.o.threads,
            drop_last=True,
            fields=["image", "label"] if self.side.has_labels else ["image"],
            device=str(self.side.device) if self.side.device.type == "cuda" else None,
            prefetch=PREFETCH,
        )

    def run(self, started: float) -> BenchResult:
        from tqdm.auto import tqdm

        with contextlib.ExitStack() as stack:
            clock = time.perf_counter()
            loader = self.make_loader(self.pipeline)
            stack.callback(loader.close)
            with _Stream(loader) as stream:
                first = next(stream)
                first_batch_s = time.perf_counter() - clock
                self._check(first)
                self.batch_s = self._time_batches(stream)
            self.step_s = self._time_steps()
            plain = without_per_image(self.pipeline, self.o.size)
            jobs: dict[str, Callable[[], float]] = {
                "loader alone": lambda: self._loader_round(loader),
                "model alone": self._model_round,
                "both together": lambda: self._both_round(loader),
            }
            if plain is not None:
                bare = self.make_loader(plain)
                stack.callback(bare.close)
                jobs["loader without PerImage"] = lambda: self._loader_round(bare)
            self._plan(len(jobs), time.perf_counter() - started)
            bar = stack.enter_context(
                tqdm(
                    total=len(jobs) * (self.o.rounds + 1), desc="bench", unit="job", disable=not self.progress
                )
            )

            def tick(name: str) -> None:
                bar.set_postfix_str(name)
                bar.update(1)

            series = interleave(jobs, rounds=self.o.rounds, progress=tick)
            threads = int(loader.threads)
        return self._result(series, first_batch_s, threads, time.perf_counter() - started)

    def _check(self, batch: Any) -> None:
        """No speed for wrong work: the loader must give what the model was measured with."""
        expected, got = tuple(self.side.images.shape), tuple(batch.image.shape)
        if got != expected:
            raise UsageError(
                f"the pipeline gives batches of {got} but size={self.o.size} means {expected}; "
                "pass the size that the pipeline ends with"
            )
        if not batch.image.dtype.is_floating_point:
            raise UsageError(
                f"the model needs float images and the pipeline gives {batch.image.dtype}; end it with Normalize"
            )

    def _time_batches(self, stream: _Stream) -> float:
        """Seconds a batch of the loader alone, from a short burst after the queue was emptied."""
        for _ in range(PREFETCH):
            next(stream)
        count, clock = 0, time.perf_counter()
        while count < 1 or (count < 20 and time.perf_counter() - clock < 0.5):
            next(stream)
            count += 1
        return (time.perf_counter() - clock) / count

    def _time_steps(self) -> float:
        """Seconds a step of the model alone; the first ones choose algorithms and allocate, and do not count."""
        seconds = 0.0
        for _ in range(3):
            clock = time.perf_counter()
            self.side.train(self.side.images, self.side.labels)
            seconds = time.perf_counter() - clock
            if seconds > self.o.seconds / 12:  # a slow model: more warm-up would eat the budget
                break
        return seconds

    def _plan(self, jobs: int, spent: float) -> None:
        """Steps a round for each job, so that all rounds fit into what is left of the budget."""
        left = max(self.o.seconds - spent, self.o.seconds / 4)
        share = left / (self.o.rounds + 1) / (jobs + 1)  # 'both' gets two shares: its steps are the slowest
        together = (
            self.batch_s + self.step_s if self.side.device.type == "cpu" else max(self.batch_s, self.step_s)
        )
        drained = (PREFETCH + 1) * self.batch_s
        self.steps = {
            "loader": _clamp((share - drained) / self.batch_s, 2, 2000),
            "model": _clamp(share / self.step_s, 1, 2000),
            "both": _clamp((2 * share - drained) / together, 1, 2000),
        }

    def _drain(self, stream: _Stream) -> None:
        """Take off what was made while nobody measured."""
        for _ in range(PREFETCH + 1):
            next(stream)

    def _loader_round(self, loader: Loader) -> float:
        with _Stream(loader) as stream:
            self._drain(stream)
            count, clock = self.steps["loader"], time.perf_counter()
            for _ in range(count):
                next(stream)
            self.side.sync()
            return count * self.o.batch_size / (time.perf_counter() - clock)

    def _model_round(self) -> float:
        self.side.sync()
        count, clock = self.steps["model"], time.perf_counter()
        for _ in range(count):
            self.side.train(self.side.images, self.side.labels)
        return count * self.o.batch_size / (time.perf_counter() - clock)

    def _both_round(self, loader: Loader) -> float:
        with _Stream(loader) as stream:
            self._drain(stream)
            # In a long run the queue refills during a step; give it that time once, or the first step would always wait.
            time.sleep(min(self.step_s, (PREFETCH + 1) * self.batch_s))
            count, waited, start = self.steps["both"], 0.0, time.perf_counter()
            for _ in range(count):
                clock = time.perf_counter()
                batch = next(stream)
                waited += time.perf_counter() - clock
                labels = batch.label if self.side.has_labels else self.side.labels
                self.side.train(batch.image, labels)
            wall = time.perf_counter() - start
        self.stalls.append(min(1.0, waited / wall))
        return count * self.o.batch_size / wall

    def _result(
        self, series: dict[str, Series], first_batch_s: float, threads: int, seconds: float
    ) -> BenchResult:
        loader, model, both = (series[name] for name in ("loader alone", "model alone", "both together"))
        plain = series.get("loader without PerImage")
        stall = Series("waiting for images", tuple(self.stalls[-self.o.rounds :]), "share")
        cores = machine.usable_cores()
        stored = np.maximum(np.asarray(self.dataset.heights), np.asarray(self.dataset.widths))
        store = self.dataset.encoded(0).mode
        figures = Figures(
            loader=loader.median,
            model=model.median,
            both=both.median,
            stall=stall.median,
            noise=max(loader.noise, model.noise),
            loader_plain=plain.median if plain else None,
            shared_cores=self.side.device.type == "cpu",
            device=self.side.device.type,
            threads=threads,
            cores=cores,
            batch_size=self.o.batch_size,
            size=self.o.size,
            stored_side=int(np.median(stored)) if len(stored) else None,
            store=store,
        )
        epoch = len(self.dataset) // self.o.batch_size
        if epoch < SHORT_EPOCH:
            self.notes.append(
                f"an epoch has only {epoch} batch{'es' if epoch != 1 else ''}, so the loader's figures include its restart at every epoch"
            )
        if seconds > 1.5 * self.o.seconds:
            self.notes.append(
                f"{self.o.rounds} rounds took {seconds:.0f} s: a step is too slow for the budget"
            )
        self.notes += noise_notes([s for s in (loader, plain, model, both) if s is not None])
        path = self.dataset.paths[0] if self.dataset.paths else None
        settings = {
            "data": [os.path.basename(p) for p in self.dataset.paths],
            "images": len(self.dataset),
            "model": self.o.model,
            "size": self.o.size,
            "batch_size": self.o.batch_size,
            "device": str(self.side.device),
            "amp": self.side.amp,
            "threads": threads,
            "prefetch": PREFETCH,
            "transforms": [repr(spec) for spec in self.pipeline],
            "store": store,
            "stored_side": figures.stored_side,
            "steps_per_round": self.steps,
            "rounds": self.o.rounds,
            "shared_cores": figures.shared_cores,
        }
        return BenchResult(
            loader=loader,
            model=model,
            both=both,
            stall=stall,
            loader_plain=plain,
            first_batch_s=first_batch_s,
            verdict=verdict(figures),
            settings=settings,
            environment=machine.environment(path),
            seconds=seconds,
            notes=self.notes,
        )


class _Stream:
    """Batches of one loader without end, epoch after epoch; leaving the block stops the loader's work."""

    def __init__(self, loader: Loader) -> None:
        self.batches = _endless(loader)

    def __enter__(self) -> _Stream:
        return self

    def __next__(self) -> Any:
        return next(self.batches)

    def __exit__(self, *exc: object) -> None:
        self.batches.close()  # type: ignore[attr-defined]


def _endless(loader: Loader) -> Iterator[Any]:
    while True:
        yield from loader


def _clamp(value: float, low: int, high: int) -> int:
    return int(max(low, min(high, value)))


def without_per_image(pipeline: Sequence[Any], size: int) -> tuple[Any, ...] | None:
    """The pipeline with its PerImage steps taken out, or None if it has none.

    Where a PerImage step gives the images their size, a plain ``Resize`` takes its place, or a batch could not be made.
    """
    from fastload import transforms as specs

    if not any(isinstance(spec, specs.PerImage) for spec in pipeline):
        return None
    kept: list[Any] = []
    for spec in pipeline:
        if not isinstance(spec, specs.PerImage):
            kept.append(spec)
        elif spec.size is not None:
            kept.append(specs.Resize(spec.size))
    return tuple(kept)
