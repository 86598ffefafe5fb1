"""The CPU's part of the CUDA engine: crops of a batch, cut or decoded by threads, side by side in one buffer that a GPU fetches.

What goes into the buffer is the least that the GPU needs: of stored pixels the window under the crop, of a JPEG the restart segments
under it, or, where the CPU decodes, the window's pixels. Rows that cannot go that way (progressive, CMYK or damaged JPEG) are
decoded one by one, or left to ``repair``. The trade-off: pinned memory for a few batches is kept until the engine is closed.

>>> batch = stager.begin(bases, spans, windows, size, repair); stager.prepare(batch, 0, 16)
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fastload import codecs
from fastload.beton import Spans
from fastload.dataset import Dataset
from fastload.draws import Plan, Table
from fastload.engines.cpu import EXACT, Engine, Sources
from fastload.errors import CorruptError, FastloadError
from fastload.kernels import batch as kb
from fastload.kernels import jpeg, stage

Repair = Callable[[int, np.ndarray], None]

# A row's way: its window's pixels, its JPEG, nothing because it is on the device or all fill, nothing because its bytes are bad.
PIXELS, JPEG, READY, BAD = 0, 1, 2, 3
_UNKNOWN, _PLAIN, _ODD = 0, 1, 2  # a sample's JPEG
_SMOOTH = 2  # pixels of margin that keep smooth chroma upsampling independent of the cut
_MOST = 1 << 30  # scratch memory that a row may ask for
_ROUND = 1 << 20  # sizes of buffers, so that one serves many batches


@dataclass
class Staged:
    """A batch on its way to the device: B rows, of which the threads make each once.

    ``kinds`` (B,) uint8: PIXELS, JPEG, READY or BAD; ``places`` (B,) int64: where a row lies in ``buffer``, pixels first, ``pixel_bytes`` of
    them. ``windows`` (B, 4) int64: y0, x0, y1, x1 of the image that the crop reads. ``found`` (B, 5) int64: length and y, x, height,
    width of a row's JPEG. ``apart``: windows (h, w, 3) uint8 that were decoded otherwise; ``finished``: rows that ``repair`` made.
    """

    bases: np.ndarray
    spans: Sources
    table: Table | None
    windows: np.ndarray
    size: tuple[int, int]
    repair: Repair | None
    kinds: np.ndarray
    places: np.ndarray
    pixel_bytes: int
    buffer: torch.Tensor
    found: np.ndarray
    apart: dict[int, np.ndarray] = field(default_factory=dict)
    finished: dict[int, np.ndarray] = field(default_factory=dict)
    failed: dict[int, CorruptError] = field(default_factory=dict)  # where there is no ``repair``
    slices: list[Future[None]] = field(default_factory=list)
    events: list[Any] = field(default_factory=list)  # behind the last reader of the buffer
    after: Any = None  # an event that must have come before the batch is made
    made: Future[Any] | None = None
    cancelled: bool = False


class Ring:
    """Pinned (on a GPU) buffers that are used again when the copies out of them are done; takes and gives from any thread."""

    def __init__(self, pinned: bool, depth: int) -> None:
        self._pinned, self._depth = pinned, depth
        self._free: list[tuple[torch.Tensor, list[Any]]] = []
        self._lock = threading.Lock()

    def take(self, size: int) -> torch.Tensor:
        """At least ``size`` bytes, (n,) uint8, that nothing reads any more. Never waits: rather there is one buffer more."""
        with self._lock:
            for place, (buffer, events) in enumerate(self._free):
                if buffer.numel() >= size and all(event.query() for event in events):
                    del self._free[place]
                    return buffer
        room = -(-(size + size // 4) // _ROUND) * _ROUND
        return torch.empty(max(room, _ROUND), dtype=torch.uint8, pin_memory=self._pinned, device="cpu")

    def give(self, buffer: torch.Tensor, events: list[Any]) -> None:
        """Have it back; it is free when the ``events`` have come. The smallest goes where there are too many."""
        with self._lock:
            self._free.append((buffer, events))
            if len(self._free) > self._depth:
                smallest = min(range(len(self._free)), key=lambda i: self._free[i][0].numel())
                # torch keeps pinned memory until the copies that it was asked for are made.
                del self._free[smallest]

    def clear(self) -> None:
        """Wait for what still reads, and let go of all memory."""
        with self._lock:
            for _, events in self._free:
                for event in events:
                    event.synchronize()
            self._free.clear()


class Stager(Engine):
    """Fills :class:`Staged` batches; safe to call from many threads at once.

    ``by_device`` says whether the device decodes JPEG; ``turns`` whether its decoder applies EXIF orientation.
    """

    def __init__(self, dataset: Dataset, plan: Plan, ring: Ring, by_device: bool, turns: bool) -> None:
        super().__init__(dataset, plan, EXACT)  # for the odd rows: as the device decodes
        self.by_device, self._turns, self._ring = by_device, turns, ring
        # What a sample's JPEG is, found out at its first turn, (largest base index + 1,) uint8.
        self._route = np.zeros(int(dataset.indices.max(initial=-1)) + 1, np.uint8)

    def begin(
        self,
        bases: np.ndarray,
        spans: Sources,
        windows: np.ndarray,
        size: tuple[int, int],
        repair: Repair | None,
        table: Table | None = None,
        ready: np.ndarray | None = None,
    ) -> Staged:
        """Memory for a batch, and where in it each row goes. ``ready`` (B,) bool: rows of which nothing is wanted."""
        count = len(bases)
        kinds = np.zeros(count, np.uint8)
        sizes = 3 * (windows[:, 2] - windows[:, 0]) * (windows[:, 3] - windows[:, 1])
        if self.by_device:
            for _, places, where in spans:
                encoded = places[~where.raw[places]]
                kinds[encoded], sizes[encoded] = JPEG, where.sizes[encoded]
        if ready is not None:
            kinds[ready], sizes[ready] = READY, 0
        for _, places, where in spans:
            bad = places[where.starts[places] < 0]
            kinds[bad], sizes[bad] = BAD, 0
        bad = (kinds == PIXELS) & ((sizes <= 0) | (sizes > 3 * codecs.MAX_PIXELS))
        kinds[bad], sizes[bad] = BAD, 0
        order = np.argsort(kinds, kind="stable")  # PIXELS is the first
        places = np.empty(count, np.int64)
        ends = np.cumsum(sizes[order])
        places[order] = ends - sizes[order]
        pixel_bytes = int(sizes[kinds == PIXELS].sum())
        total = int(ends[-1]) if count else 0
        buffer = self._ring.take(total) if total else torch.empty(0, dtype=torch.uint8)
        found = np.zeros((count, 5), np.int64)
        return Staged(bases, spans, table, windows, size, repair, kinds, places, pixel_bytes, buffer, found)

    def release(self, batch: Staged) -> None:
        """Give the memory of a batch back."""
        if batch.buffer.numel():
            self._ring.give(batch.buffer, batch.events)

    def prepare(self, batch: Staged, start: int, stop: int) -> None:
        """Make the rows [start, stop) of a batch. Raises what ``repair`` raises; without one, ``failed`` lists the bad rows."""
        out, kinds = batch.buffer.numpy(), batch.kinds
        for file, places, where in batch.spans:
            if batch.cancelled:
                return
            mine = places[np.searchsorted(places, start) : np.searchsorted(places, stop)]
            mine = mine[kinds[mine] != READY]
            status = np.full(len(kinds), stage.BAD_BOX, np.int64)
            sources = kb.Sources(*where)
            good = mine[kinds[mine] != BAD]
            stored, encoded = good[where.raw[good]], good[~where.raw[good]]
            if stored.size:
                stage.copy_rows(file, stored, sources, batch.windows, out, batch.places, status)
            if encoded.size and self.by_device:
                rows = encoded[self._are_plain(batch.bases, file, where, encoded)]
                margin = batch.windows + (-_SMOOTH, -_SMOOTH, _SMOOTH, _SMOOTH)
                stage.cut_rows(file, rows, sources, margin, out, batch.places, batch.found, status)
            elif encoded.size:
                self._decode_rows(file, encoded, sources, batch, out, status)
            for row in mine[status[mine] != stage.OK].tolist():
                if batch.cancelled:
                    return
                self.mend(batch, row)

    def _decode_rows(
        self,
        file: np.ndarray,
        rows: np.ndarray,
        sources: kb.Sources,
        batch: Staged,
        out: np.ndarray,
        status: np.ndarray,
    ) -> None:
        thread = self._thread(0)
        while rows.size:
            stage.decode_rows(file, rows, sources, batch.windows, out, batch.places, thread, status)
            rows = rows[status[rows] == stage.MORE_SCRATCH]
            if rows.size and not thread.scratch.size < thread.need[0] <= _MOST:
                return
            thread = self._thread(int(thread.need[0]))

    def mend(self, batch: Staged, row: int) -> None:
        """Make a row by other means: its window, decoded here, or else what ``repair`` puts in its place."""
        base = int(batch.bases[row])
        try:
            batch.apart[row] = self._window_of(base, batch.windows[row])
            return
        except CorruptError as error:
            if batch.repair is None:
                batch.failed[row] = error
                return
        out = np.empty((*batch.size, 3), np.uint8)
        try:
            batch.repair(row, out)
        except CorruptError as error:
            if error.index is None:
                reader, at = self._dataset.locate_base(base)
                error.at(base, reader.name(at), reader.name(at, "source"))
            raise
        except FastloadError:
            raise
        except Exception as error:  # a bug: say at which sample, without hiding what it was
            if hasattr(error, "add_note"):
                reader, at = self._dataset.locate_base(base)
                error.add_note(f"while loading sample {base}, id {reader.name(at)!r}")
            raise
        batch.finished[row] = out

    def distrust(self, base: int) -> None:
        """From now on this sample is decoded here: the device's decoder cannot."""
        self._route[base] = _ODD

    def _window_of(self, base: int, window: np.ndarray) -> np.ndarray:
        """The pixels of a window of a sample, (h, w, 3) uint8. CorruptError for bad bytes."""
        reader, at = self._dataset.locate_base(base)
        image = reader.image(at, self._field)
        y0, x0, y1, x1 = window.tolist()
        if image.mode == "raw":
            return self._decode_whole(image)[y0:y1, x0:x1].copy()
        data, part = self._cut(image, (y0 - _SMOOTH, x0 - _SMOOTH, y1 + _SMOOTH, x1 + _SMOOTH))
        y, x = part[:2]
        # A copy, because the thread's memory is used for the next one.
        return self._decode(data, part, 1)[y0 - y : y1 - y, x0 - x : x1 - x, :3].copy()

    def _are_plain(self, bases: np.ndarray, file: np.ndarray, where: Spans, rows: np.ndarray) -> np.ndarray:
        """(n,) bool: which of the rows the device's decoder shows as we do; each sample is looked at once."""
        for row in rows[self._route[bases[rows]] == _UNKNOWN].tolist():
            start, size = int(where.starts[row]), int(where.sizes[row])
            data = file[start : start + size] if start >= 0 else file[:0]
            self._route[bases[row]] = _PLAIN if self._look(int(bases[row]), data) else _ODD
        plain: np.ndarray = self._route[bases[rows]] == _PLAIN
        return plain

    def _look(self, base: int, data: np.ndarray) -> bool:
        info, status = jpeg.parse(data)
        if status != jpeg.OK or not codecs.is_plain(info):
            return False
        if self._turns and codecs.probe(data).orientation != 1:
            return False
        reader, at = self._dataset.locate_base(base)
        try:
            # A decoder for GPUs shows damaged data as if they were whole.
            return reader.checksum_matches(at) is not False
        except CorruptError:
            return False
