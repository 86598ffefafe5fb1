"""One loader and one model side under one setting, and the rounds that measure them: the loader, the model, both together.

``fastload bench``, the changes that it runs and ``--tune`` all measure with these rounds, so their figures mean the same. Each round
starts the loader anew and throws away what it prepared while nobody measured. The trade-off is that a round is honest only over
several batches, which costs time.

>>> with Pair(dataset, Setting(64, threads=2, pipeline=transforms.train(224)), side) as pair: pair.together(20).images_s
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

from fastload.benchmarks.variants import Variant
from fastload.errors import UsageError

if TYPE_CHECKING:
    from fastload.benchmarks.side import ModelSide
    from fastload.dataset import Dataset

TIMELINE = 200  # steps whose times are kept
STARTING = 2  # batches of a fresh iteration that are thrown away: its threads start, its buffers are taken


@dataclass(frozen=True)
class Setting:
    """All that decides an end-to-end figure besides the data, the model and the machine."""

    batch_size: int = 64
    threads: int = 1
    prefetch: int = 2
    pipeline: tuple[Any, ...] = ()
    engine: str = "cpu"
    decode: str = "fast"
    variant: Variant = field(default_factory=Variant)


@dataclass(frozen=True)
class Round:
    """One round of both together. ``timeline`` has (start, wait, step) in seconds of its first steps."""

    images_s: float
    stall: float
    cpu_s_per_1000: float
    timeline: list[tuple[float, float, float]] = field(default_factory=list)


class Pair:
    """A loader for ``dataset`` under ``setting``, and ``side`` that learns from it; None measures the loader alone.

    ``device`` is where the loader puts its batches, None for host memory.
    """

    def __init__(
        self,
        dataset: Dataset,
        setting: Setting,
        side: ModelSide | None,
        *,
        seed: int = 0,
        device: str | None = None,
    ) -> None:
        from fastload.loader import Loader

        self.dataset, self.setting, self.side = dataset, setting, side
        labels = "label" in dataset.fields if side is None else side.has_labels
        self.loader = Loader(
            dataset,
            setting.batch_size,
            transforms=setting.pipeline,
            shuffle=True,
            seed=seed,
            threads=setting.threads,
            drop_last=True,
            fields=["image", "label"] if labels else ["image"],
            device=device,
            prefetch=setting.prefetch,
            engine=setting.engine,
            decode=setting.decode,
        )
        self.batch_s = self.step_s = 0.0  # of the loader alone and of the model alone, roughly; see warm_up
        self.first_batch_s = 0.0

    def __enter__(self) -> Pair:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the loader's buffers; the dataset stays open."""
        self.loader.close()

    @property
    def overlap(self) -> bool:
        """Whether a batch can be made while the device works without taking its cores."""
        return self.side is not None and self.side.device.type != "cpu"

    @property
    def together_s(self) -> float:
        """Seconds a step of both together is expected to take."""
        return max(self.batch_s, self.step_s) if self.overlap else self.batch_s + self.step_s

    @property
    def start_s(self) -> float:
        """Seconds before a round begins to count."""
        return STARTING * self.batch_s + min(self.step_s, (self.setting.prefetch + 1) * self.batch_s)

    def warm_up(self, limit: float = 0.5, *, size: int | None = None) -> None:
        """Make batches and steps until they are timed (about ``limit`` seconds for each side), and check the first batch.

        ``size`` is the side of the images that the model expects. UsageError where the batches are not what the model takes.
        """
        clock = time.perf_counter()
        with Stream(self.loader) as stream:
            first = next(stream)
            self.first_batch_s = time.perf_counter() - clock
            self._check(first, size)
            for _ in range(min(self.setting.prefetch, 2)):
                next(stream)
            count, clock = 0, time.perf_counter()
            while count < 1 or (count < 20 and time.perf_counter() - clock < limit):
                next(stream)
                count += 1
            self.batch_s = (time.perf_counter() - clock) / count
        if self.side is None:
            return
        steps = []
        for _ in range(3):  # the first steps choose algorithms and allocate: the fastest one counts
            clock = time.perf_counter()
            self._learn(first)
            steps.append(time.perf_counter() - clock)
            if steps[-1] > limit:
                break
        self.step_s = min(steps)

    def _check(self, batch: Any, size: int | None) -> None:
        """No speed for wrong work: the loader must give what the model was measured with."""
        got = tuple(batch.image.shape)
        if size is not None and got != (self.setting.batch_size, 3, size, size):
            raise UsageError(
                f"the pipeline gives batches of {got} but size={size} means {(self.setting.batch_size, 3, size, size)}; "
                "pass the size that the pipeline ends with"
            )
        if (
            self.side is not None
            and not self.setting.variant.normalise
            and not batch.image.dtype.is_floating_point
        ):
            raise UsageError(
                f"the model needs float images and the pipeline gives {batch.image.dtype}; end it with Normalize"
            )

    def _learn(self, batch: Any) -> None:
        side = self.side
        if side is not None:
            side.train(batch.image, batch.label if side.has_labels else side.labels[: len(batch.image)])

    def _start(self, stream: Stream) -> None:
        """Take off the batches that the threads start with."""
        for _ in range(STARTING):
            next(stream)

    def loading(self, steps: int) -> float:
        """Images/s of the loader alone over ``steps`` batches."""
        with Stream(self.loader) as stream:
            self._start(stream)
            clock = time.perf_counter()
            for _ in range(steps):
                next(stream)
            if self.side is not None:
                self.side.sync()
            return steps * self.setting.batch_size / (time.perf_counter() - clock)

    def learning(self, steps: int) -> float:
        """Images/s of the model alone, on one batch that already lies on the device. UsageError without a model."""
        side = self.side
        if side is None:
            raise UsageError("only the loader is measured, so there is no model's figure, got model 'none'")
        side.sync()
        clock = time.perf_counter()
        for _ in range(steps):
            side.train(side.images, side.labels)
        return steps * self.setting.batch_size / (time.perf_counter() - clock)

    def together(self, steps: int) -> Round:
        """Both, over ``steps`` batches; without a model the loop only takes the batches."""
        with Stream(self.loader) as stream:
            self._start(stream)
            # In a long run the queue refills during a step; give it that time once, or the first step would always wait.
            time.sleep(min(self.step_s, (self.setting.prefetch + 1) * self.batch_s))
            waited = 0.0
            times: list[tuple[float, float, float]] = []
            cpu, start = time.process_time(), time.perf_counter()
            before = start
            for _ in range(steps):
                batch = next(stream)
                ready = time.perf_counter()
                self._learn(batch)
                after = time.perf_counter()
                waited += ready - before
                if len(times) < TIMELINE:
                    times.append((before - start, ready - before, after - ready))
                before = after
            wall, cpu = before - start, time.process_time() - cpu
        images = steps * self.setting.batch_size
        return Round(images / wall, min(1.0, waited / wall), 1000 * cpu / images, times)


class Stream:
    """Batches of one loader without end, epoch after epoch; leaving the block stops the loader's work."""

    def __init__(self, loader: Any) -> None:
        self.batches = _endless(loader)

    def __enter__(self) -> Stream:
        return self

    def __next__(self) -> Any:
        return next(self.batches)

    def __exit__(self, *exc: object) -> None:
        self.batches.close()  # type: ignore[attr-defined]


def _endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def steps_for(seconds: float, pair: Pair, *, least: int = 1) -> int:
    """Steps of both together that fill ``seconds``, its start included; from ``least`` to 2,000."""
    return clamp((seconds - pair.start_s) / max(pair.together_s, 1e-6), least, 2000)


def clamp(value: float, low: int, high: int) -> int:
    """``value`` as a whole number from ``low`` to ``high``."""
    return int(max(low, min(high, value)))
