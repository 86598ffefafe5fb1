"""Who makes the pixels of a loader's batches: threads that share the CPU engine, or an engine that takes whole batches.

Both begin a job early and give its images when they are asked for, in order; the loader knows no more of them. The trade-off: the
threads live as long as an iteration, an engine as long as the loader, since it is slow to build.

>>> maker.begin(job); images = maker.end(job)  # (B, 3, H, W) on the loader's device, in its dtype, mixed
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch

from fastload.batch import Buffers
from fastload.finish import Finisher
from fastload.jobs import Filler, Job

_SLICES_PER_THREAD = 3  # of all batches that are made at once, so that one large image holds one thread only


class Maker(Protocol):
    """Makes the images of jobs, in the order in which they were begun."""

    def begin(self, job: Job) -> None:
        """Start on a job, without waiting."""

    def end(self, job: Job) -> torch.Tensor:
        """Its images, (B, 3, H, W). Raises what making them raised, such as a CorruptError that names the sample."""

    def stop(self, jobs: Sequence[Job]) -> None:
        """The iteration is over: forget what was begun."""

    def close(self) -> None:
        """Let go of threads and memory."""


class CpuMaker:
    """The CPU engine on a pool of threads, a slice of a batch at a time."""

    def __init__(
        self,
        filler: Filler,
        finisher: Finisher,
        buffers: Buffers,
        threads: int,
        prefetch: int,
        pin: Callable[[], None] | None,
    ) -> None:
        self._filler, self._finisher, self._buffers = filler, finisher, buffers
        self._threads, self._pin = threads, pin
        self._slices = max(1, -(-_SLICES_PER_THREAD * threads // (prefetch + 1)))
        self._pool: ThreadPoolExecutor | None = None

    def allocate(self, job: Job) -> None:
        """Give a job memory for its pixels."""
        job.images = self._buffers.take((len(job.bases), *job.size, 3), np.uint8)
        if self._finisher.wants_floats:
            job.floats = self._buffers.take(job.images.shape, np.float32)

    def begin(self, job: Job) -> None:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(
                self._threads, thread_name_prefix="fastload", initializer=self._pin
            )
        self.allocate(job)
        count = len(job.bases)
        step = -(-count // min(count, self._slices))
        job.slices = [
            self._pool.submit(self._filler.fill, job, at, min(at + step, count))
            for at in range(0, count, step)
        ]

    def end(self, job: Job) -> torch.Tensor:
        for part in job.slices:
            part.result()
        job.slices = []
        return self._finisher.convert(self._finisher.copy(self._finisher.mix(job)))

    def stop(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            job.cancelled = True
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def close(self) -> None:
        """Nothing: its threads end with the iteration."""


class EngineMaker:
    """An engine with ``submit``, ``collect``, ``drop`` and ``close``."""

    def __init__(self, engine: Any, filler: Filler) -> None:
        self.engine, self._filler = engine, filler

    def begin(self, job: Job) -> None:
        self.engine.submit(job.bases, job.spans, job.table, partial(self._filler.execute, job))

    def end(self, job: Job) -> torch.Tensor:
        images: torch.Tensor = self.engine.collect()
        return images.permute(0, 3, 1, 2)

    def stop(self, jobs: Sequence[Job]) -> None:
        self.engine.drop()

    def close(self) -> None:
        self.engine.close()
