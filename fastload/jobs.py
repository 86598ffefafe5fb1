"""A batch in the making, and the work that threads do for it: execute rows, replace corrupt samples, normalise.

>>> filler.fill(job, 0, 16)  # on any thread; the rows of a job may be shared out in any way
"""

from __future__ import annotations

import warnings
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from fastload.beton import Spans
from fastload.dataset import Dataset
from fastload.draws import Plan, Table
from fastload.engines.cpu import Engine
from fastload.errors import CorruptError, FastloadError
from fastload.kernels import rng

_STREAM_REPLACE = 0xFC00
_ATTEMPTS = 10


@dataclass(frozen=True)
class Replaced:
    """A corrupt sample whose place in an epoch another sample took; indices are base indices."""

    index: int
    id: str
    source: str
    reason: str
    replacement: int


@dataclass
class Job:
    """A batch in the making: ``bases`` (B,) int64, its table, and the ``size`` (H, W) of its images.

    ``spans`` (see :meth:`fastload.dataset.Dataset.spans`) is where their bytes lie; ``stop`` is the position in the epoch behind
    its last sample. Where the CPU engine makes it, ``images`` (B, H, W, 3) uint8 and, if normalised, ``floats`` are its memory.
    """

    epoch: int
    stop: int
    bases: np.ndarray
    spans: list[tuple[np.ndarray, np.ndarray, Spans]]
    table: Table
    size: tuple[int, int]
    images: np.ndarray = field(default_factory=lambda: np.empty((0, 0, 0, 3), np.uint8))
    floats: np.ndarray | None = None
    slices: list[Future[None]] = field(default_factory=list)
    cancelled: bool = False

    @property
    def count(self) -> int:
        """Samples of the batch."""
        return len(self.bases)


class Filler:
    """Fills jobs of one dataset and pipeline. ``errors`` lists the samples that were replaced.

    ``replace`` puts another sample in the place of a corrupt one; else the CorruptError, naming the sample, is raised.
    """

    def __init__(self, dataset: Dataset, plan: Plan, seed: int, engine: Engine, replace: bool) -> None:
        self._dataset, self._plan, self._seed, self._replace = dataset, plan, seed, replace
        self._engine = engine
        self.errors: list[Replaced] = []

    def fill(self, job: Job, start: int, stop: int) -> None:
        """Fill rows [start, stop) of a job: together what the engine does together, the rest one by one."""
        if job.cancelled:
            return
        made = self._engine.fill(job.spans, job.table, start, stop, job.images, job.floats)
        rows = range(start, stop) if self._plan.per_image else start + np.flatnonzero(~made)
        for row in map(int, rows):
            if job.cancelled:
                return
            self.execute(job, row, job.images[row], bool(made[row - start]))
            if job.floats is not None:
                self._engine.normalise(job.images[row], job.floats[row])

    def execute(self, job: Job, row: int, out: np.ndarray, made: bool = False) -> None:
        """Fill ``out`` (H, W, 3) uint8 with one row of a job, or with a substitute, whose number the job then bears.

        ``made``: its pixels are there, and functions of the user are left. Raises what the sample does, with its name.
        """
        base = int(job.bases[row])
        try:
            self._engine.execute(base, job.table, row, out, made)
        except CorruptError as error:
            reader, at = self._dataset.locate_base(base)
            error.at(base, reader.name(at), reader.name(at, "source"))
            if not self._replace:
                raise
            self._substitute(job, row, out, error)
        except FastloadError:
            raise
        except Exception as error:
            # A user's PerImage, or a bug: say at which sample, without hiding what it was.
            if hasattr(error, "add_note"):
                reader, at = self._dataset.locate_base(base)
                error.add_note(f"while loading sample {base}, id {reader.name(at)!r}")
            raise

    def _substitute(self, job: Job, row: int, out: np.ndarray, error: CorruptError) -> None:
        """Put another sample in the place of a corrupt one: which one depends on the seed and the sample only."""
        dataset, base = self._dataset, int(job.bases[row])
        u = rng.uniforms(self._seed, 0, np.array([base], np.uint64), _STREAM_REPLACE, _ATTEMPTS)[0]
        for attempt in range(_ATTEMPTS):
            place = min(int(u[attempt] * len(dataset)), len(dataset) - 1)
            other = dataset.base(place)
            if other == base:
                continue
            try:
                size = dataset.gather(dataset.image_field, np.array([other]))
                table = self._plan.draw(
                    self._seed, job.epoch, np.array([other]), size["height"], size["width"]
                )
                self._engine.execute(other, table, 0, out)
            except CorruptError:
                continue
            job.bases[row] = other
            if not self.errors:
                warnings.warn(
                    f"{error}; another sample takes its place (all are listed in loader.errors)", stacklevel=2
                )
            self.errors.append(Replaced(base, error.id or "", error.source or "", error.reason, other))
            return
        raise error
