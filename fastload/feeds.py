"""Where a loader's batches come from: drawn on the host and made by threads or an engine. The other way, on the device, is
:mod:`fastload.device_feed`.

A feed begins batches some time before they are asked for, and ends them in that order; the loader knows no more of it. The trade-off
of drawing on the host: it is done on the consumer's own thread, some microseconds for each image.

>>> feed = HostFeed(drawer, maker, finisher); job = feed.begin(epoch=0, start=0, stop=64); batch = feed.end(job)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from fastload.dataset import Dataset
from fastload.draws import Plan
from fastload.engines.cpu import Sources
from fastload.finish import Finisher
from fastload.jobs import Job
from fastload.makers import Maker
from fastload.order import Order
from fastload.system import ram_bytes, read_ahead


class Begun(Protocol):
    """A batch that was begun: ``count`` samples, the last of them at position ``stop`` - 1 of the epoch."""

    @property
    def stop(self) -> int: ...

    @property
    def count(self) -> int: ...


class Feed(Protocol):
    """Batches of positions of an epoch. ``single``: it serves one iteration at a time."""

    single: bool

    def begin(self, epoch: int, start: int, stop: int) -> Any:
        """Start on the batch of the positions [start, stop), without waiting: a :class:`Begun`."""

    def end(self, job: Any) -> Any:
        """The batch, of what was begun first. Raises what making it raised."""

    def stop(self, jobs: Sequence[Any]) -> None:
        """The iteration is over, and nobody wants these any more."""


class Drawer:
    """Draws batches of a dataset on the host. ``repeats``: a sample may come twice in an epoch."""

    def __init__(self, dataset: Dataset, plan: Plan, order: Order, repeats: bool) -> None:
        self._dataset, self._plan, self._order, self._repeats = dataset, plan, order, repeats
        self._indices = dataset.indices if dataset.is_view else None
        # Too large to stay in the page cache from epoch to epoch.
        self._too_large = dataset.file_bytes > (ram_bytes() or dataset.file_bytes)
        self._read_ahead = True

    def draw(self, epoch: int, start: int, stop: int) -> Job:
        """The samples at positions [start, stop) of an epoch, and what is to be done to them."""
        chosen = self._order.take(epoch, start, stop)
        bases = np.array(chosen if self._indices is None else self._indices[chosen], np.int64)
        spans = self._dataset.spans(bases)
        if self._read_ahead:
            for file, places, where in spans:
                read_ahead(file, where.starts[places], where.sizes[places])
        keys = bases.astype(np.uint64)
        if self._repeats:  # each time must look different
            keys ^= in_front(self._order.places(start, stop))
        heights, widths = _shapes(spans, len(bases)).T
        table = self._plan.draw(self._order.seed, epoch, keys, heights, widths)
        size = self._plan.size or (int(heights[0]), int(widths[0]))
        return Job(epoch, stop, bases, spans, table, size)

    def was_read(self) -> None:
        """An epoch is over: what fits into memory is there by now."""
        self._read_ahead = self._too_large


class HostFeed:
    """Batches that ``drawer`` draws and ``maker`` makes."""

    def __init__(self, drawer: Drawer, maker: Maker, finisher: Finisher, single: bool) -> None:
        self._drawer, self._maker, self._finisher, self.single = drawer, maker, finisher, single

    def begin(self, epoch: int, start: int, stop: int) -> Job:
        job = self._drawer.draw(epoch, start, stop)
        self._maker.begin(job)
        return job

    def end(self, job: Job) -> Any:
        return self._finisher.batch(job, self._maker.end(job))

    def stop(self, jobs: Sequence[Job]) -> None:
        self._maker.stop(jobs)


def in_front(places: Any) -> Any:
    """24 bits of the place in the epoch, in front of a sample's number of 40 bits; (B,) uint64 or an int64 tensor."""
    return (places + 1) << 40


def _shapes(spans: Sources, count: int) -> np.ndarray:
    """Heights and widths (B, 2) int64 of the images of a batch."""
    if len(spans) == 1:
        return spans[0][2].shapes
    shapes = np.empty((count, 2), np.int64)
    for _, places, where in spans:
        shapes[places] = where.shapes[places]
    return shapes
