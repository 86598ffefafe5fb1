"""Writing a `.beton` file: sample after sample, in flat memory, resumable after a kill, visible only when whole.

The data go to ``PATH.partial`` and what is known of each sample to ``PATH.journal``; ``finish`` adds the index and renames.
A process that was killed leaves both, and a writer with ``resume=True`` goes on after the last sample in the journal. Only
``finish`` waits for the disk: after a power failure a journal may promise data that never arrived, so start again then.

>>> writer = Writer("a.beton", [Field("image", "image"), Field("label", "int")], capacity=2)
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from fastload.beton import layout
from fastload.beton.layout import EncodedImage, Field
from fastload.errors import DataError, UsageError

_JOURNAL_VERSION = 1
_RECORD = struct.Struct("<II")  # length and CRC-32 of what follows
_FLUSH_EVERY = 64  # samples; what a kill can cost


class Writer:
    """Appends samples to a new `.beton` file.

    ``capacity`` is the largest number of samples that may come (room for their rows is reserved at the front of the
    file). ``fingerprint`` names the work: a journal with another one is not resumed. Samples must come in the same order
    in a resumed run; ``consumed`` says how many source items (added and skipped) are done.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        fields: Sequence[Field],
        capacity: int,
        *,
        fingerprint: str = "",
        resume: bool = False,
    ) -> None:
        self.path = os.fspath(path)
        self.fields = list(fields)
        if not self.fields or len({f.name for f in self.fields}) != len(self.fields):
            raise UsageError(
                f"a file needs one or more fields, each with its own name, got {[f.name for f in fields]}"
            )
        if len(self.fields) > 512 or capacity < 0:
            raise UsageError(
                f"at most 512 fields and a capacity of 0 or more, got {len(self.fields)}, {capacity}"
            )
        self.capacity = capacity
        self.count = 0
        self.skipped: list[dict[str, Any]] = []
        self._dtype = layout.metadata_dtype(self.fields)
        self._page = layout.MIN_PAGE
        self._rows = bytearray()
        self._allocations = bytearray()
        self._crcs = bytearray()
        self._names = {"id": (bytearray(), bytearray()), "source": (bytearray(), bytearray())}  # ends, text
        self._same_names = True
        self._rows_at = layout.HEADER.itemsize + len(self.fields) * layout.DESCRIPTOR.itemsize
        # Data may start anywhere: a page is an address range of the file, not a place that must begin with data.
        self._offset = _align(self._rows_at + capacity * self._dtype.itemsize, 64)
        self._partial, self._journal_path = self.path + ".partial", self.path + ".journal"
        self._head = json.dumps(
            {
                "journal": _JOURNAL_VERSION,
                "fingerprint": fingerprint,
                "capacity": capacity,
                "fields": [[f.name, f.kind, f.dtype, list(f.shape)] for f in self.fields],
            }
        ).encode()
        self._file, self._journal = self._open(resume)
        self._unflushed = 0

    @property
    def consumed(self) -> int:
        """Source items already handled, added and skipped."""
        return self.count + len(self.skipped)

    def add(self, values: Mapping[str, Any], *, id: str, source: str) -> None:
        """Append one sample; ``values`` has one entry a field (see :class:`Field`)."""
        if self.count >= self.capacity:
            raise UsageError(f"the file was made for {self.capacity} samples, and this is one more")
        # All that can fail comes first: a sample is written whole or not at all.
        blobs = [_to_bytes(field, values) for field in self.fields]
        try:
            id_bytes, source_bytes = id.encode(), source.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"the id {id!r} or source {source!r} is not Unicode text ({error})") from error
        start = self._place(sum(max(memoryview(b).nbytes, 1) for b in blobs if b is not None))
        row, entries = self._layout(values, blobs, start)
        row_bytes = row.tobytes()
        crc = zlib.crc32(row_bytes)
        self._file.write(bytes(start - self._offset))
        at = start
        for blob in blobs:
            if blob is not None:
                crc = zlib.crc32(blob, crc)
                size = memoryview(blob).nbytes
                # Empty values take one byte too, so that no two allocations share an address.
                self._file.write(blob if size else b"\0")
                at += max(size, 1)
        self._offset = at
        self._keep(row_bytes, entries.tobytes(), crc, id_bytes, source_bytes)
        self._log(
            b"S"
            + struct.pack("<IIQQ", crc, len(id_bytes), at, self._page)
            + row_bytes
            + entries.tobytes()
            + id_bytes
            + source_bytes
        )

    def _layout(
        self, values: Mapping[str, Any], blobs: Sequence[Any], start: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The row (1,) and allocation entries (K,) of a sample whose values are laid end to end from ``start``."""
        row = np.zeros(1, self._dtype)
        entries = np.zeros(sum(b is not None for b in blobs), layout.ALLOCATION)
        at, slot = start, 0
        for name, field, blob in zip(self._dtype.names or (), self.fields, blobs):
            if blob is None:
                row[name] = values[field.name]
                continue
            size = memoryview(blob).nbytes
            if field.kind == "image":
                image: EncodedImage = values[field.name]
                row[name] = (
                    layout.RAW if image.mode == "raw" else layout.JPEG,
                    image.width,
                    image.height,
                    at,
                )
            elif field.kind == "ndarray":
                row[name] = at
            else:
                row[name] = (at, size)
            entries[slot] = (self.count, at, size)
            slot += 1
            at += max(size, 1)
        return row, entries

    def skip(self, record: dict[str, Any]) -> None:
        """Note a source item that becomes no sample: JSON-able, with ``id``, ``source`` and ``reason``."""
        self.skipped.append(record)
        self._log(b"K" + json.dumps(record).encode())

    def finish(self, info: Mapping[str, Any]) -> None:
        """Write the index and the tables, and let the file appear under its name."""
        self._file.flush()
        sections: dict[str, bytes | bytearray] = {"crc": self._crcs}
        for what in ("id",) if self._same_names else ("id", "source"):
            sections[f"{what}_ends"], sections[f"{what}_text"] = self._names[what]
        region, crc = _index_region(dict(info), sections)
        start = _align(self._offset, 8)
        self._file.write(bytes(start - self._offset) + region)
        # FFCV expects no allocation to cross a page, so a long region becomes several entries.
        chunks, at, end = [], start, start + len(region)
        while at < end:
            stop = min(end, (at // self._page + 1) * self._page)
            chunks.append((layout.NO_SAMPLE, at, stop - at))
            at = stop
        table_at = _align(end, 8)
        self._file.write(bytes(table_at - end))
        self._file.write(self._allocations)
        self._file.write(np.array(chunks, layout.ALLOCATION).tobytes())
        header = np.zeros(1, layout.HEADER)
        header[0] = (layout.BETON_VERSION, len(self.fields), self._page, self.count, table_at)
        descriptors = np.concatenate([layout.encode_descriptor(field) for field in self.fields])
        anchor = np.zeros(1, layout.ANCHOR)
        anchor[0] = (layout.MAGIC, layout.FORMAT_VERSION, 0, crc, start, len(region))
        tail = layout.ARGUMENT_BYTES - layout.ANCHOR_BYTES
        descriptors["arguments"][0, tail : tail + layout.ANCHOR.itemsize] = anchor.view(np.uint8)
        self._file.seek(0)
        self._file.write(header.tobytes() + descriptors.tobytes() + self._rows)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._partial, self.path)
        self._journal.close()
        os.unlink(self._journal_path)

    def abort(self, keep: bool) -> None:
        """Stop; ``keep`` leaves what a resumed run needs, else nothing is left behind."""
        for file in (self._file, self._journal):
            try:
                file.close()  # flushes, which on a full disk fails again
            except OSError:
                if keep:
                    raise
        if not keep:
            for path in (self._partial, self._journal_path):
                if os.path.exists(path):
                    os.unlink(path)

    def _place(self, size: int) -> int:
        """Where ``size`` bytes go, so that they cross no page; pages grow when a sample is larger than one."""
        while size > self._page:
            self._page *= 2
            if self._page > layout.MAX_PAGE:
                raise DataError(
                    f"a sample of {size:,} bytes is larger than the format's largest page (2 GiB)"
                )
        # What fits into a small page fits into the larger one around it, so growing keeps all earlier places right.
        if self._offset // self._page != (self._offset + size - 1) // self._page:
            return _align(self._offset, self._page)
        return self._offset

    def _keep(self, row: bytes, entries: bytes, crc: int, id: bytes, source: bytes) -> None:
        self._rows += row
        self._allocations += entries
        self._crcs += struct.pack("<I", crc)
        for what, text in (("id", id), ("source", source)):
            ends, joined = self._names[what]
            joined += text
            ends += struct.pack("<Q", len(joined))
        self._same_names &= id == source
        self.count += 1

    def _log(self, payload: bytes) -> None:
        self._journal.write(_RECORD.pack(len(payload), zlib.crc32(payload)) + payload)
        self._unflushed += 1
        if self._unflushed >= _FLUSH_EVERY:
            self._file.flush()  # data first: the journal must never promise bytes that are not there
            self._journal.flush()
            self._unflushed = 0

    def _open(self, resume: bool) -> tuple[BinaryIO, BinaryIO]:
        folder = os.path.dirname(os.path.abspath(self.path))
        if not os.path.isdir(folder):
            raise UsageError(f"cannot write {self.path}: there is no folder {folder}; make it first")
        if os.path.isdir(self.path):
            raise UsageError(f"cannot write {self.path}: it is a folder; name a file in it")
        try:
            if resume and os.path.exists(self._journal_path) and os.path.exists(self._partial):
                return self._reopen()
            file = open(self._partial, "wb", buffering=1 << 20)
            journal = open(self._journal_path, "wb", buffering=1 << 16)
        except PermissionError as error:
            raise UsageError(
                f"cannot write {self.path}: {error.strerror}; choose a folder that is yours"
            ) from error
        file.truncate(self._offset)
        file.seek(self._offset)
        journal.write(_RECORD.pack(len(self._head), zlib.crc32(self._head)) + self._head)
        return file, journal

    def _reopen(self) -> tuple[BinaryIO, BinaryIO]:
        with open(self._journal_path, "rb") as log:
            data = log.read()
        size = os.path.getsize(self._partial)
        records = _records(data)
        at, head = next(records, (0, b""))
        if head != self._head:
            raise UsageError(
                f"cannot resume {self.path}: {self._journal_path} belongs to other images or options; "
                "give the same ones, or run without --resume to start again"
            )
        row_size, entry_size = self._dtype.itemsize, layout.ALLOCATION.itemsize
        slots = sum(field.kind in layout.ALLOCATING for field in self.fields)
        good = at
        for at, payload in records:
            if payload[:1] == b"K":
                self.skipped.append(json.loads(payload[1:]))
            else:
                crc, id_size, end, page = struct.unpack_from("<IIQQ", payload, 1)
                if end > size:
                    break  # the data of this sample never reached the disk
                cut = [25, 25 + row_size, 25 + row_size + slots * entry_size]
                row, entries, names = payload[cut[0] : cut[1]], payload[cut[1] : cut[2]], payload[cut[2] :]
                self._keep(row, entries, crc, names[:id_size], names[id_size:])
                self._offset, self._page = end, page
            good = at
        file = open(self._partial, "r+b", buffering=1 << 20)
        file.truncate(self._offset)
        file.seek(self._offset)
        journal = open(self._journal_path, "r+b", buffering=1 << 16)
        journal.truncate(good)
        journal.seek(good)
        return file, journal


def _records(data: bytes) -> Any:
    """(end offset, payload) of each whole record of a journal; stops at the first that a kill cut short."""
    at = 0
    while at + _RECORD.size <= len(data):
        length, crc = _RECORD.unpack_from(data, at)
        payload = data[at + _RECORD.size : at + _RECORD.size + length]
        if len(payload) != length or zlib.crc32(payload) != crc:
            return
        at += _RECORD.size + length
        yield at, payload


def _to_bytes(field: Field, values: Mapping[str, Any]) -> Any:
    """What a field allocates for a value, or None for numbers, which live in the row."""
    if field.name not in values:
        raise DataError(f"the sample has no value for field {field.name!r}; it has {sorted(values)}")
    value = values[field.name]
    if field.kind == "image":
        if not isinstance(value, EncodedImage):
            raise UsageError(f"field {field.name!r} takes an EncodedImage, got {type(value).__name__}")
        return memoryview(value.data).cast("B")
    if field.kind == "bytes":
        return memoryview(value).cast("B") if memoryview(value).nbytes else b""
    if field.kind == "json":
        return json.dumps(value, ensure_ascii=False).encode() + b"\0"  # the zero byte is FFCV's end mark
    if field.kind == "ndarray":
        array = np.ascontiguousarray(value, dtype=field.dtype)
        if array.shape != field.shape:
            raise DataError(f"field {field.name!r} has shape {field.shape}, and the value {array.shape}")
        return array.tobytes()
    number = (int, np.integer) if field.kind == "int" else (int, float, np.integer, np.floating)
    if not isinstance(value, number):
        raise DataError(f"field {field.name!r} takes a {field.kind}, got {value!r}")
    if field.kind == "int" and not -(2**63) <= int(value) < 2**63:
        raise DataError(f"field {field.name!r} takes integers of 64 bits, got {value!r}")
    return None


def _index_region(info: dict[str, Any], sections: Mapping[str, bytes | bytearray]) -> tuple[bytes, int]:
    """The index region and the CRC-32 of its JSON: length (8 bytes), JSON, then the sections, each 8-aligned."""
    names = list(sections)
    sizes = [len(sections[name]) for name in names]
    # Offsets are part of the JSON whose length moves them: pad the JSON to a bound that does not depend on them.
    bound = _align(
        len(json.dumps({"info": info, "sections": {n: [2**53, 2**53, 2**32] for n in names}})) + 64, 8
    )
    offsets, at = [], 8 + bound
    for size in sizes:
        offsets.append(at)
        at = _align(at + size, 8)
    table = {
        name: [offset, size, zlib.crc32(sections[name])] for name, offset, size in zip(names, offsets, sizes)
    }
    blob = json.dumps({"info": info, "sections": table}).encode().ljust(bound)
    region = bytearray(at)
    region[:8] = struct.pack("<Q", len(blob))
    region[8 : 8 + bound] = blob
    for name, offset, size in zip(names, offsets, sizes):
        region[offset : offset + size] = sections[name]
    return bytes(region), zlib.crc32(blob)


def _align(value: int, to: int) -> int:
    return -(-value // to) * to
