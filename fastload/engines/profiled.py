"""The CPU engine with a clock: the same work by the same code, and after each step a mark of what it was.

Pixels are the same to the bit. The trade-off: it touches every page of the encoded bytes first, so that waiting for the
disk is not taken for decoding, where the plain engine touches only what the crop needs.

>>> clock = Clock(); ProfiledEngine(dataset, plan, clock, "fast").execute(base_index, table, row, out); clock.seconds
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastload import codecs
from fastload.beton import EncodedImage
from fastload.dataset import Dataset
from fastload.draws import Plan, Table
from fastload.engines.cpu import FAST, Engine
from fastload.stages import COLOUR, CROP, DECODE, PER_IMAGE, READ, RESIZE, Clock

_PAGE = 4096


class ProfiledEngine(Engine):
    """An :class:`Engine` that tells ``clock`` when each step ends; for one thread."""

    def __init__(self, dataset: Dataset, plan: Plan, clock: Clock, decode: str = FAST) -> None:
        super().__init__(dataset, plan, decode)
        self.clock = clock

    def _geometry(self, image: EncodedImage, table: Table, row: int, out: np.ndarray) -> None:
        data = codecs.as_bytes(image.data)
        if image.mode == "raw":  # of rows of pixels only those under the crop are looked at
            line = image.width * 3
            y0, _, y1, _ = table.box[row].tolist()
            data = data[int(y0) * line : (int(y1) + 1) * line]
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


def _touch(data: np.ndarray) -> int:
    """Make the system bring every page of ``data`` (n,) uint8 into memory; returns its bytes."""
    if data.size > 2 * _PAGE:
        int(data[::_PAGE].max())
    if data.size:  # by item for a few pages: numpy's own work would be most of what is measured
        data.item(data.size // 2)
        data.item(data.size - 1)
    return data.nbytes
