"""Is the loader or the model the bottleneck, and what is to be changed? Measure both apart, then together, then each change.

Jobs take turns: the loader alone; the model alone, on one synthetic batch that already lies on the device, doing exactly what
the trainer does for a batch (:func:`fastload.train.make_step`); and both together, where the time that the step loop waits for
images is the stall. Then the changes that can help are run beside the unchanged. The trade-off is a minute of time against
certainty: steps and the number of changes adapt to the budget, the number of rounds does not.

>>> print(fastload.bench("photos.beton", "resnet18", size=224).verdict.sentence)
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from fastload.benchmarks import limits, machine, verdict
from fastload.benchmarks.advice import NotRun, Situation, candidates
from fastload.benchmarks.bench_table import table
from fastload.benchmarks.changes import Measured, Runner
from fastload.benchmarks.harness import MIN_ROUNDS, Series, interleave, noise_notes
from fastload.benchmarks.options import BenchOptions
from fastload.benchmarks.pairing import Pair, Round, Setting, clamp
from fastload.benchmarks.pipelines import needed, without_per_image
from fastload.benchmarks.resources import PeakMemory
from fastload.benchmarks.subject import Subject
from fastload.benchmarks.verdict import Verdict

if TYPE_CHECKING:
    from fastload.dataset import Dataset

SHORT_EPOCH = 20
PROFILED = 256  # images whose stages are timed
# Of the budget: until when loader, model and both are measured, if changes are to be run as well.
BASE = 0.4
CACHED = 0.95  # of the file in the page cache: with less, the disk is part of the figures


@dataclass(frozen=True)
class BenchResult:
    """Every figure with its rounds. Rates in images/s; ``stall`` in shares of wall time (0 to 1).

    ``first_batch_s`` is the time from making the Loader to its first batch, in seconds, kernels cached or not as they were. ``model``,
    ``both`` and ``stall`` are None where only the loader was measured. ``record`` is all of it as JSON-able values.
    """

    loader: Series
    model: Series | None
    both: Series | None
    stall: Series | None
    loader_plain: Series | None
    first_batch_s: float
    changes: list[Measured]
    not_run: list[NotRun]
    verdict: Verdict
    settings: dict[str, Any]
    environment: dict[str, Any]
    seconds: float
    record: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """One JSON-able record with settings, machine, every round and the verdict."""
        return self.record

    def table(self) -> str:
        """The figures for people, one line each, without the verdict."""
        return table(self.record)


def bench(
    data: str | os.PathLike[str] | Dataset,
    model: str = "resnet18",
    *,
    size: int = 224,
    batch_size: int = 64,
    device: str | None = None,
    threads: int | None = None,
    seconds: float = 60.0,
    rounds: int = MIN_ROUNDS,
    transforms: Sequence[Any] | None = None,
    seed: int = 0,
    prefetch: int = 2,
    engine: str = "cpu",
    decode: str = "fast",
    compile: bool = False,
    changes: bool = True,
    progress: bool = True,
) -> BenchResult:
    """Measure loader, model, both and the changes that can help on this machine; see :class:`BenchResult`.

    ``data`` is a ``.beton`` path or an open Dataset; ``model`` a timm model, or "none" for the loader alone; ``transforms`` a pipeline
    (default ``transforms.train(size)``). ``changes=False`` runs none; ``compile`` runs ``torch.compile`` as one. Raises ``UsageError``
    for an unknown model, device or option, ``DataError`` for a damaged file.
    """
    started = time.perf_counter()
    options = BenchOptions(
        model,
        size,
        batch_size,
        device,
        threads,
        seconds,
        rounds,
        seed,
        prefetch,
        engine,
        decode,
        compile,
        changes,
    )
    with Subject.open(data, options, transforms, share=BASE if changes else 1.0) as subject:
        return _Bench(subject, progress).run(started)


class _Bench:
    def __init__(self, subject: Subject, progress: bool) -> None:
        self.s, self.o, self.progress = subject, subject.options, progress
        self.notes = list(subject.notes)
        self.rounds: list[Round] = []
        self.steps: dict[str, int] = {}

    def run(self, started: float) -> BenchResult:
        from tqdm.auto import tqdm

        with contextlib.ExitStack() as stack:
            bar = stack.enter_context(tqdm(desc="bench", unit="job", disable=not self.progress, leave=False))

            def tick(name: str) -> None:
                bar.set_postfix_str(name)
                bar.update(1)

            tick("warm-up")
            setting = self.s.setting()
            base = stack.enter_context(self.s.pair(setting, self.s.side))
            base.warm_up(self.o.seconds / 60 if self.o.seconds < 30 else 0.5, size=self.o.size)
            share = BASE if self.o.changes else 1.0 - (limits.SHARE if self._limited else 0.0)
            stages = _stages(base.loader, self.o.seconds)
            series, peak = self._measure(base, stack, started + share * self.o.seconds, tick)
            record = self._record(setting, base, series, stages, peak)
            if self._limited:
                tick("limits of this machine")
                record["limits"] = self._limits(setting, series, stages)
            else:
                self.notes.append(
                    f"the limits of this machine were left out; --seconds {limits.LEAST_SECONDS:g} measures them"
                )
            changes: list[Measured] = []
            left: list[NotRun] = []
            if self.o.changes:
                run, left = candidates(self._situation(record, series))
                runner = Runner(
                    base,
                    self.s.make_side,
                    until=started + self.o.seconds,
                    size=self.o.size,
                    device=self.s.device,
                    seed=self.o.seed,
                    rounds=self.o.rounds,
                    seconds=self.o.seconds,
                    progress=tick,
                )
                changes, skipped = runner.run(run)
                left += skipped
                record["changes"] = [change.to_json() for change in changes]
                record["not_run"] = [entry.to_json() for entry in left]
        return self._result(record, series, changes, left, time.perf_counter() - started)

    def _measure(
        self, base: Pair, stack: contextlib.ExitStack, until: float, tick: Callable[[str], object]
    ) -> tuple[dict[str, Series], PeakMemory]:
        """Loader, model and both in turns, and the memory that they took."""

        def both() -> float:
            self.rounds.append(base.together(self.steps["both"]))
            return self.rounds[-1].images_s

        jobs: dict[str, Callable[[], float]] = {"loader alone": both}
        if base.side is not None:
            jobs = {
                "loader alone": lambda: base.loading(self.steps["loader"]),
                "model alone": lambda: base.learning(self.steps["model"]),
                "both together": both,
            }
        plain = without_per_image(base.setting.pipeline, self.o.size)
        if plain is not None:
            bare = stack.enter_context(self.s.pair(base.setting, base.side, plain))
            jobs["loader without PerImage"] = lambda: bare.loading(self.steps["loader"])
        self._plan(base, len(jobs), until)
        with PeakMemory(self.s.target) as peak:
            series = interleave(jobs, rounds=self.o.rounds, progress=tick)
        self.rounds = self.rounds[-self.o.rounds :]
        # Better known now than after the warm-up; the plan of the changes rests on them.
        base.batch_s = self.o.batch_size / series["loader alone"].median
        if base.side is not None:
            base.step_s = self.o.batch_size / series["model alone"].median
        return series, peak

    def _plan(self, base: Pair, jobs: int, until: float) -> None:
        """Steps a round for each job, so that all rounds fit into what is left of the budget."""
        left = max(until - time.perf_counter(), self.o.seconds / 4)
        share = left / (self.o.rounds + 1) / (jobs + 1)  # 'both' gets two shares: its steps are the slowest
        start = base.start_s
        self.steps = {"loader": clamp((share - start) / base.batch_s, 2, 2000)}
        if base.side is not None:
            self.steps["model"] = clamp(share / base.step_s, 1, 2000)
        self.steps["both"] = clamp((2 * share - start) / base.together_s, 1, 2000)

    def _record(
        self,
        setting: Setting,
        base: Pair,
        series: Mapping[str, Series],
        stages: list[dict[str, Any]],
        peak: PeakMemory,
    ) -> dict[str, Any]:
        s, dataset, model = self.s, self.s.dataset, series.get("model alone")
        plain = series.get("loader without PerImage")
        stored = np.maximum(np.asarray(dataset.heights), np.asarray(dataset.widths))
        stall = Series("waiting for images", tuple(r.stall for r in self.rounds), "share")
        cpu = float(np.median([r.cpu_s_per_1000 for r in self.rounds]))
        path = dataset.paths[0] if dataset.paths else None
        return {
            "kind": "bench",
            "loader": series["loader alone"].to_json(),
            "loader_without_per_image": plain.to_json() if plain else None,
            "model": model.to_json() if model else None,
            "both": series["both together"].to_json() if model else None,
            "stall": stall.to_json() if model else None,
            "first_batch_s": round(base.first_batch_s, 3),
            "stages": stages,
            "resources": {
                "peak_mib": round(peak.peak_mib, 1) if peak.peak_mib is not None else None,
                "cpu_s_per_1000_images": round(cpu, 3),
                "gpu_peak_mib": round(peak.gpu_peak_mib, 1) if peak.gpu_peak_mib is not None else None,
            },
            "timeline": [
                {"t": round(t, 6), "wait_s": round(wait, 6), "step_s": round(step, 6)}
                for t, wait, step in self.rounds[-1].timeline
            ],
            "settings": {
                "data": [os.path.basename(p) for p in dataset.paths],
                "images": len(dataset),
                "model": self.o.model,
                "size": self.o.size,
                "batch_size": self.o.batch_size,
                "device": str(s.target),
                "amp": s.side.amp if s.side is not None else None,
                "threads": setting.threads,
                "prefetch": setting.prefetch,
                "engine": setting.engine,
                "decode": setting.decode,
                "transforms": [repr(spec) for spec in setting.pipeline],
                "store": dataset.encoded(0).mode,
                "stored_side": int(np.median(stored)) if len(stored) else None,
                "steps_per_round": self.steps,
                "rounds": self.o.rounds,
                "seconds": self.o.seconds,
                "shared_cores": s.side is not None and s.side.device.type == "cpu",
            },
            "environment": machine.environment(path),
        }

    @property
    def _limited(self) -> bool:
        """Whether there is time for the ceilings of this machine."""
        return self.o.seconds >= limits.LEAST_SECONDS

    def _limits(
        self, setting: Setting, series: Mapping[str, Series], stages: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        """The ceilings of this machine and the share of each that loader and model reached alone."""
        found = limits.measure(
            self.s.dataset,
            self.s.side,
            threads=setting.threads,
            size=self.o.size,
            seconds=limits.SHARE * self.o.seconds,
            rounds=self.o.rounds,
        )
        self.notes += noise_notes(limits.noisy(found))
        loader, model = series["loader alone"].median, series.get("model alone")
        return {**found, "shares": limits.shares(found, loader, model.median if model else None, stages)}

    def _situation(self, record: Mapping[str, Any], series: Mapping[str, Series]) -> Situation:
        dataset, o = self.s.dataset, self.o
        settings, model = record["settings"], series.get("model alone")
        need = needed(self.s.pipeline)
        height, width = np.asarray(dataset.heights, np.float64), np.asarray(dataset.widths, np.float64)
        shrink = np.ones(len(height))
        if need is not None:
            side = np.minimum(height, width) if need.option == "--short-side" else np.maximum(height, width)
            shrink = np.minimum(1.0, need.side / side)
        engines, refused = self.s.engines()
        folder = os.path.dirname(os.path.abspath(dataset.path))
        return Situation(
            loader=series["loader alone"].median,
            model=model.median if model else None,
            both=series["both together"].median if model else None,
            stall=record["stall"]["median"] if model else None,
            stage=verdict.from_record(record).stage,
            shared_cores=settings["shared_cores"],
            device=self.s.target.type,
            threads=settings["threads"],
            cores=machine.usable_cores(),
            prefetch=o.prefetch,
            batch_size=o.batch_size,
            images=len(dataset),
            size=o.size,
            decode=o.decode,
            engine=o.engine,
            engines=engines,
            refused=refused,
            store=settings["store"],
            stored_side=settings["stored_side"],
            need=need,
            raw_bytes=float((height * width * 3 * shrink**2).sum()),
            room_bytes=float(shutil.disk_usage(folder).free),
            memory_bytes=float(machine.ram_bytes() or np.inf),
            pipeline=self.s.pipeline,
            floats=self.s.floats,
            cut_batch=self.s.cut,
            amp=str(settings["amp"]),
            compile=o.compile or (self.s.target.type == "cuda" and o.seconds >= 120),
            data=os.path.basename(dataset.path),
        )

    def _result(
        self,
        record: dict[str, Any],
        series: Mapping[str, Series],
        changes: list[Measured],
        left: list[NotRun],
        seconds: float,
    ) -> BenchResult:
        found = verdict.from_record(record)
        model = series.get("model alone")
        self._notes(record, series, seconds)
        record |= {
            "bottleneck": found.bottleneck,
            "ratio": round(found.ratio, 3),
            "stage": found.stage,
            "change_first": found.change,
            "verdict": found.sentence,
            "notes": self.notes,
            "seconds": round(seconds, 1),
        }
        stall = Series("waiting for images", tuple(r.stall for r in self.rounds), "share")
        return BenchResult(
            loader=series["loader alone"],
            model=model,
            both=series["both together"] if model else None,
            stall=stall if model else None,
            loader_plain=series.get("loader without PerImage"),
            first_batch_s=record["first_batch_s"],
            changes=changes,
            not_run=left,
            verdict=found,
            settings=record["settings"],
            environment=record["environment"],
            seconds=seconds,
            record=record,
            notes=self.notes,
        )

    def _notes(self, record: Mapping[str, Any], series: Mapping[str, Series], seconds: float) -> None:
        epoch = len(self.s.dataset) // self.o.batch_size
        if epoch < SHORT_EPOCH:
            self.notes.append(
                f"an epoch has only {epoch} batch{'es' if epoch != 1 else ''}, so the loader's figures include its restart at every epoch"
            )
        if seconds > 1.5 * self.o.seconds:
            self.notes.append(f"it took {seconds:.0f} s: a step is too slow for the budget")
        shares = [machine.cached_share(path) for path in self.s.dataset.paths]
        cached = min((share for share in shares if share is not None), default=1.0)
        if cached < CACHED:
            self.notes.append(
                f"only {cached:.0%} of the file is in the page cache, so the disk's speed is part of the loader's figures, "
                "and not of those of a smaller stored size, whose sample was just written"
            )
        self.notes += noise_notes(series.values())


def _stages(loader: Any, seconds: float) -> list[dict[str, Any]]:
    """The loader's stages as a record has them: microseconds and bytes an image, and the share of the sum."""
    images = PROFILED if seconds >= 30 else max(16, int(PROFILED * seconds / 30))
    found = loader.profile(images=images)
    total = sum(stage.seconds for stage in found) or 1.0
    return [
        {
            "stage": stage.name,
            "us": round(1e6 * stage.seconds, 2),
            "bytes": round(stage.bytes),
            "share": round(stage.seconds / total, 4),
        }
        for stage in found
    ]
