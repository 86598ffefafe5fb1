"""Batches drawn and made on the device that holds the images (``cache="device"``): an epoch does not touch the CPU.

The order, the draws and the kernels' tables of some thousand samples are worked out at once, by a few hundred launches, and the batches
cut out of them. Where images are small, many batches are made by one launch, too, and a batch is a view of them: an epoch of
CIFAR-10 is five launches. Order, draws and pixels are those of the host, see :meth:`fastload.draws.Plan.draw`.

All is begun from the consumer's thread on the engine's own stream; the consumer's stream waits for events, the host for nothing but a GPU
that is several batches behind. The trade-off: a batch that is kept keeps the memory of those made with it, 64 MiB at most.
Labels and other numbers of up to 1 KiB a sample are kept on the device, too; texts and larger arrays are looked up on the host.

>>> feed = DeviceFeed(engine, plan, order, dataset, finisher, batch_size=512, count=50_000, repeats=False)
>>> images, labels = feed.end(feed.begin(epoch=0, start=0, stop=512))
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fastload.dataset import Dataset
from fastload.draws import Plan, Table
from fastload.engines.cuda import CudaEngine
from fastload.feeds import in_front
from fastload.finish import Finisher
from fastload.kernels import batch as kb
from fastload.kernels import gpu
from fastload.order import Order

_ROWS = 16384  # samples that are drawn at once: some 50 MB of numbers in between
_BYTES = 64 << 20  # of the batches that one launch makes, unless one alone is larger
_AHEAD = 4  # launches by which the host may be ahead of the consumer's stream


@dataclass
class _Drawn:
    """Positions [start, stop) of an epoch, all on the device. ``columns`` are their labels and numbers by field."""

    epoch: int
    start: int
    stop: int
    bases: torch.Tensor
    table: Table
    sources: gpu.Sources
    packed: gpu.Packed | None  # for the kernels; without them the reference takes table and sources
    columns: dict[str, torch.Tensor]


@dataclass
class _Made:
    """Images (n, H, W, 3) of the positions from ``start`` on, and the event behind them on a GPU."""

    drawn: _Drawn
    start: int
    images: torch.Tensor
    soft: torch.Tensor | None  # (n, C) labels of mixed images
    event: Any

    @property
    def stop(self) -> int:
        return self.start + len(self.images)


@dataclass
class DeviceJob:
    """A batch that was begun: positions [start, stop)."""

    start: int
    stop: int
    made: _Made

    @property
    def count(self) -> int:
        return self.stop - self.start


class DeviceFeed:
    """Batches of ``batch_size`` of the first ``count`` positions of an epoch. ``engine`` holds all samples of the dataset on its device.

    ``repeats``: a sample may come twice in an epoch. Iterations may overlap.
    """

    single = False

    def __init__(
        self,
        engine: CudaEngine,
        plan: Plan,
        order: Order,
        dataset: Dataset,
        finisher: Finisher,
        *,
        batch_size: int,
        count: int,
        repeats: bool,
    ) -> None:
        assert engine.resident is not None
        self._engine, self._plan, self._order, self._finisher = engine, plan, order, finisher
        self._batch_size, self._count, self._repeats = batch_size, count, repeats
        if plan.mixers:
            finisher.check_labels(dataset.labels)
        self._device, self._memory = engine.device, engine.resident.memory
        self._indices = indices = np.asarray(dataset.indices, np.int64)
        with engine.on_stream():
            self._bases = self._put(indices)
            self._pointers = self._put(engine.resident.starts[indices]) + self._memory.data_ptr()
            self._shapes = self._put(engine.resident.shapes[indices])
            self._columns = {
                name: torch.as_tensor(finisher.column(name, indices), device=self._device)
                for name in finisher.small_fields
            }
            self._paint = gpu.paint_on(self._device, engine.paint)
        shape = tuple(engine.resident.shapes[indices[0]].tolist())
        self._size: tuple[int, int] = plan.size or shape
        self._made: _Made | None = None
        self._marks: deque[Any] = deque(maxlen=_AHEAD)

    def begin(self, epoch: int, start: int, stop: int) -> DeviceJob:
        made = self._made
        if made is None or made.drawn.epoch != epoch or not (made.start <= start and stop <= made.stop):
            self._wait_for_consumer()
            with self._engine.on_stream():
                made = self._made = self._make(epoch, start)
        return DeviceJob(start, stop, made)

    def end(self, job: DeviceJob) -> Any:
        made, drawn = job.made, job.made.drawn
        rows = slice(job.start - drawn.start, job.stop - drawn.start)
        of_made = slice(job.start - made.start, job.stop - made.start)
        values = {name: column[rows] for name, column in drawn.columns.items()}
        values[self._finisher.image_field] = made.images[of_made].permute(0, 3, 1, 2)
        if made.soft is not None:
            values["label"] = made.soft[of_made]
        index = drawn.bases[rows]
        if made.event is not None:
            consumer = torch.cuda.current_stream(self._device)
            consumer.wait_event(made.event)
            for tensor in (*values.values(), index):
                # Else its memory could be given away while the consumer reads it.
                tensor.record_stream(consumer)
        # To autograd each batch is a tensor of its own: one may be changed while the graph of its neighbour is alive.
        values = {name: tensor.data for name, tensor in values.items()}
        return self._finisher.wrap(
            values, index.data, lambda: self._host_bases(drawn.epoch, job.start, job.stop)
        )

    def stop(self, jobs: Sequence[DeviceJob]) -> None:
        self._made = None

    def close(self) -> None:
        """Let go of what lies on the device."""
        self._made = None
        self._columns = {}
        self._bases = self._pointers = self._shapes = self._memory = torch.empty(0)
        self._marks.clear()
        self._order.forget_devices()

    # ------------------------------------------------------------------------------------------------------------------

    def _put(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, np.int64)).to(self._device)

    def _host_bases(self, epoch: int, start: int, stop: int) -> np.ndarray:
        bases: np.ndarray = self._indices[self._order.take(epoch, start, stop)]
        return bases

    def _wait_for_consumer(self) -> None:
        """Else a host that is far ahead of its GPU would fill the memory with batches that are still to be used."""
        if self._engine.stream is None:
            return
        if len(self._marks) == _AHEAD:
            self._marks[0].synchronize()
        mark = torch.cuda.Event(blocking=True)  # its waiter sleeps
        mark.record(torch.cuda.current_stream(self._device))
        self._marks.append(mark)

    def _make(self, epoch: int, start: int) -> _Made:
        """As many batches as one launch should make, from position ``start`` on."""
        drawn = self._made.drawn if self._made is not None else None
        if drawn is None or drawn.epoch != epoch or not drawn.start <= start < drawn.stop:
            drawn = self._draw(epoch, start)
        height, width = self._size
        sample_bytes = 3 * height * width * self._engine.dtype.itemsize + 4 * self._finisher.classes
        batches = max(1, _BYTES // sample_bytes // self._batch_size)
        stop = min(start + batches * self._batch_size, drawn.stop)
        images = torch.empty((stop - start, height, width, 3), dtype=self._engine.dtype, device=self._device)
        planes, first = images.permute(0, 3, 1, 2), start - drawn.start
        if drawn.packed is not None:
            gpu.render(drawn.packed.rows(first, first + len(images)), planes)
        else:
            gpu.crop(*_on_host(drawn, first, first + len(images)), planes, self._engine.paint)
        soft = self._mix(drawn, planes, first) if self._plan.mixers else None
        event = None
        if self._engine.stream is not None:
            event = torch.cuda.Event()
            event.record(self._engine.stream)
        return _Made(drawn, start, images, soft, event)

    def _mix(self, drawn: _Drawn, planes: torch.Tensor, first: int) -> torch.Tensor:
        """Mix batch after batch of ``planes`` (n, 3, H, W), which are the rows from ``first`` on; their labels (n, C)."""
        soft = []
        for at in range(0, len(planes), self._batch_size):
            some = planes[at : at + self._batch_size]
            rows = slice(first + at, first + at + len(some))
            gpu.mix(some, drawn.table.mix[rows], drawn.table.mix_box[rows])
            soft.append(self._finisher.soften(drawn.columns["label"][rows], drawn.table.mix[rows]))
        return torch.cat(soft)

    def _draw(self, epoch: int, start: int) -> _Drawn:
        """Some thousand samples from position ``start`` on, in whole batches."""
        rows = max(1, _ROWS // self._batch_size) * self._batch_size
        stop = min(start + rows, self._count)
        chosen = self._order.take(epoch, start, stop, self._device)
        bases, shapes = self._bases[chosen], self._shapes[chosen]
        keys = bases
        if self._repeats:
            keys = bases ^ in_front(self._order.places(start, stop, self._device))
        table = self._plan.draw(
            self._order.seed, epoch, keys, shapes[:, 0], shapes[:, 1], self._batch_size, self._size
        )
        # No kernel needs that, but sums over other pixels, which have no weight, may be rounded otherwise than the host's.
        table = replace(table, clip=table.windows()[0])
        one = torch.ones_like(bases)
        strides = torch.stack([3 * shapes[:, 1], 3 * one, one], dim=1)
        sources = gpu.Sources(self._pointers[chosen], shapes, strides, (self._memory,))
        packed = gpu.pack(sources, table, self._paint) if gpu.runs_triton(bases) else None
        columns = {name: column[chosen] for name, column in self._columns.items()}
        return _Drawn(epoch, start, stop, bases, table, sources, packed, columns)


def _on_host(drawn: _Drawn, start: int, stop: int) -> tuple[gpu.Sources, kb.Rows]:
    """Sources and table of some rows as arrays, from tensors in host memory."""
    pointers, shapes, strides, owners = drawn.sources
    some = gpu.Sources(*[v[start:stop].numpy() for v in (pointers, shapes, strides)], owners)  # type: ignore[call-arg]
    table, no_colour = drawn.table, torch.empty((0, 3, 7))
    colour = no_colour if table.colour is None else table.colour
    columns = (table.place, table.box, table.clip, table.flips, colour, table.coloured, table.erase)
    return some, kb.Rows(*(column[start:stop].numpy() for column in columns))
