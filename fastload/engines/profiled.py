"""The CPU engine with a clock: the same work by the same code, and after each step a mark of what it was.

Pixels are the same to the bit. The trade-off: it touches every page of the encoded bytes first, so that waiting for the
disk is not taken for decoding, where the plain engine touches only what the crop needs.

>>> clock = Clock(); ProfiledEngine(dataset, plan, clock, "fast").execute(base_index, table, row, out); clock.seconds
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from fastload import codecs
from fastload.beton import EncodedImage, Spans
from fastload.dataset import Dataset
from fastload.draws import Plan, Table
from fastload.engines.cpu import FAST, Engine
from fastload.kernels import batch
from fastload.stages import COLOUR, CROP, DECODE, NORMALISE, PER_IMAGE, READ, RESIZE, Clock

_PAGE = 4096
_STAGES = (CROP, DECODE, RESIZE, COLOUR, NORMALISE)  # of the kernel's clock, in its order


class ProfiledEngine(Engine):
    """An :class:`Engine` that tells ``clock`` when each step ends; for one thread."""

    def __init__(self, dataset: Dataset, plan: Plan, clock: Clock, decode: str = FAST) -> None:
        super().__init__(dataset, plan, decode)
        self.clock = clock

    def _read(self, file: np.ndarray, where: Spans, rows: np.ndarray, box: np.ndarray) -> None:
        super()._read(file, where, rows, box)
        size = 0
        for row in rows.tolist():
            start, stop = (
                max(int(where.starts[row]), 0),
                max(int(where.starts[row]), 0) + int(where.sizes[row]),
            )
            if where.raw[row]:
                start, stop = _under(box[row], int(where.shapes[row, 1]), start, stop)
            size += _touch(file[start:stop])
        if rows.size:
            self.clock.mark(READ, size)

    def _call_kernel(self, *arguments: Any) -> None:
        """The kernel with its own clock, which tells how the time of the call is to be shared out."""
        file, rows, sources, table, images, floats, thread, status = arguments
        clock = np.zeros((2, batch.STEPS), np.int64)
        self.clock.skip()
        begun = time.perf_counter()
        batch.fill(file, rows, sources, table, self._paint, images, floats, thread, status, clock)
        scale = (time.perf_counter() - begun) / max(int(clock[0].sum()), 1)
        for step, stage in enumerate(_STAGES):
            if clock[0, step]:
                self.clock.add(stage, scale * int(clock[0, step]), int(clock[1, step]))
        self.clock.skip()

    def _geometry(self, image: EncodedImage, table: Table, row: int, out: np.ndarray) -> None:
        data = codecs.as_bytes(image.data)
        if image.mode == "raw":
            start, stop = _under(table.box[row], image.width, 0, data.size)
            data = data[start:stop]
        self.clock.mark(READ, _touch(data))
        super()._geometry(image, table, row, out)

    def _cut(
        self, image: EncodedImage, window: tuple[int, int, int, int]
    ) -> tuple[np.ndarray, tuple[int, int, int, int]]:
        data, part = super()._cut(image, window)
        copied = data.nbytes < codecs.as_bytes(image.data).nbytes  # else it is the image's own bytes, uncut
        self.clock.mark(CROP, data.nbytes if copied else 0)
        return data, part

    def _decode(self, data: np.ndarray, part: tuple[int, int, int, int], factor: int) -> np.ndarray:
        decoded = super()._decode(data, part, factor)
        self.clock.mark(DECODE, decoded.nbytes)
        return decoded

    def normalise(self, image: np.ndarray, out: np.ndarray) -> None:
        super().normalise(image, out)
        self.clock.mark(NORMALISE, out.nbytes)

    def _decode_whole(self, image: EncodedImage) -> np.ndarray:
        self.clock.mark(READ, _touch(codecs.as_bytes(image.data)))
        decoded = super()._decode_whole(image)
        self.clock.mark(DECODE, decoded.nbytes)
        return decoded

    def _resize(
        self,
        source: np.ndarray,
        origin: tuple[int, int],
        factor: int,
        box: list[float],
        clip: list[int],
        out: np.ndarray,
        flips: int,
    ) -> None:
        super()._resize(source, origin, factor, box, clip, out, flips)
        area = (box[2] - box[0]) * (box[3] - box[1]) / factor**2
        self.clock.mark(RESIZE, max(int(area) * source.shape[2], out.size))

    def _recolour(self, table: Table, row: int, out: np.ndarray) -> None:
        super()._recolour(table, row, out)
        self.clock.mark(COLOUR, out.nbytes)

    def _call(self, spec: Any, image: np.ndarray, table: Table, row: int, out: np.ndarray) -> None:
        super()._call(spec, image, table, row, out)
        self.clock.mark(PER_IMAGE, max(image.nbytes, out.nbytes))


def _under(box: np.ndarray, width: int, start: int, stop: int) -> tuple[int, int]:
    """Of the bytes [start, stop) of stored pixels those of the rows under a crop: only they are looked at."""
    line = 3 * width
    return min(start + int(box[0]) * line, stop), min(start + (int(box[2]) + 1) * line, stop)


def _touch(data: np.ndarray) -> int:
    """Make the system bring every page of ``data`` (n,) uint8 into memory; returns its bytes."""
    if data.size > 2 * _PAGE:
        int(data[::_PAGE].max())
    if data.size:  # by item for a few pages: numpy's own work would be most of what is measured
        data.item(data.size // 2)
        data.item(data.size - 1)
    return data.nbytes
