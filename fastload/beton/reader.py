"""Reading a `.beton` file, ours or FFCV's, without trusting a byte of it.

The file is mapped, and opening it touches only the header, the descriptors and (in our files) a small JSON block: a file
of ten million samples opens as fast as one of ten. Each address is checked against the file's size before it is used.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from fastload.beton import layout
from fastload.beton.layout import EncodedImage, Field
from fastload.errors import CorruptError, DataError, UsageError

MAX_FIELDS = 512


class Spans(NamedTuple):
    """Where encoded images lie in a file, all (B,): ``starts`` int64, -1 for a damaged entry, whose error
    :meth:`Reader.image` tells; ``sizes`` int64 bytes; ``raw`` bool: pixels and not JPEG; ``shapes`` (B, 2) int64 height and width.
    """

    starts: np.ndarray
    sizes: np.ndarray
    raw: np.ndarray
    shapes: np.ndarray


class Reader:
    """One `.beton` file, read-only.

    ``fields`` maps names to :class:`Field` in file order, ``metadata`` is the mapped table of rows (N,), ``info`` the JSON
    that its writer left (empty for files by FFCV). Raises UsageError for a path that is not a file, and DataError for a
    file that is not a `.beton`, is of another version, or is truncated.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        if not os.path.exists(self.path):
            raise UsageError(f"no such file: {self.path}; a .beton file is made by: fastload convert SRC DST")
        if not os.path.isfile(self.path):
            raise UsageError(
                f"{self.path} is not a file; turn a folder of images into one with: fastload convert SRC DST"
            )
        self.size = os.path.getsize(self.path)
        if self.size < layout.HEADER.itemsize:
            raise DataError(f"{self.path} is not a .beton file: it has only {self.size} bytes")
        # A plain ndarray over the map: slicing a np.memmap costs a microsecond more each time.
        self._bytes: np.ndarray = np.asarray(np.memmap(self.path, np.uint8, "r")).view(np.ndarray)
        header = self._bytes[: layout.HEADER.itemsize].view(layout.HEADER)[0]
        if int(header["version"]) != layout.BETON_VERSION:
            raise DataError(
                f"{self.path} is not a .beton file of version {layout.BETON_VERSION}: its first bytes say version "
                f"{int(header['version'])}; convert the images again"
            )
        self.num_samples = int(header["num_samples"])
        self.page_size = int(header["page_size"])
        self._table_at = int(header["alloc_table_ptr"])
        num_fields = int(header["num_fields"])
        rows_at = layout.HEADER.itemsize + num_fields * layout.DESCRIPTOR.itemsize
        if not 0 < num_fields <= MAX_FIELDS or rows_at > self.size:
            raise self._damaged(f"it claims {num_fields} fields in {self.size} bytes")
        descriptors = self._bytes[layout.HEADER.itemsize : rows_at].view(layout.DESCRIPTOR)
        decoded = [layout.decode_descriptor(record) for record in descriptors]
        self.fields: dict[str, Field] = {field.name: field for field in decoded}
        if len(self.fields) != num_fields:
            raise self._damaged("two fields have the same name")
        dtype = layout.metadata_dtype(decoded)
        rows_end = rows_at + self.num_samples * dtype.itemsize
        if not rows_end <= self._table_at <= self.size:
            raise self._damaged(
                f"its tables should end at byte {max(rows_end, self._table_at):,} and it has {self.size:,}"
            )
        if (self.size - self._table_at) % layout.ALLOCATION.itemsize:
            raise self._damaged("the allocation table at its end is cut short")
        self.metadata = self._bytes[rows_at:rows_end].view(dtype)
        self.allocations = self._bytes[self._table_at :].view(layout.ALLOCATION)
        self._columns = dict(zip(self.fields, dtype.names or ()))
        self._slot = {
            name: slot
            for slot, name in enumerate(n for n, f in self.fields.items() if f.kind in layout.ALLOCATING)
        }
        self._sorted: tuple[np.ndarray, np.ndarray] | None = None
        self.info: dict[str, Any] = {}
        self.format_version = 0  # 0: no index of ours
        self._sections: dict[str, np.ndarray] = {}
        self._section_crcs: dict[str, int] = {}
        self._read_index(descriptors[0])

    def _damaged(self, why: str) -> DataError:
        return DataError(
            f"{self.path} is truncated or damaged: {why}; convert again, or fetch the file again and compare its size"
        )

    def _read_index(self, descriptor: np.ndarray) -> None:
        tail = descriptor["arguments"][layout.ARGUMENT_BYTES - layout.ANCHOR_BYTES :]
        anchor = tail[: layout.ANCHOR.itemsize].view(layout.ANCHOR)[0]
        if bytes(anchor["magic"]) != layout.MAGIC:
            return
        version = int(anchor["format_version"])
        if version != layout.FORMAT_VERSION:
            raise DataError(
                f"{self.path} has a fastload index of version {version}, and this release reads version "
                f"{layout.FORMAT_VERSION}; update fastload or convert again"
            )
        start, size = int(anchor["index_ptr"]), int(anchor["index_size"])
        if size < 8 or start + size > self._table_at:
            raise self._damaged("its index lies outside of the file")
        region = self._bytes[start : start + size]
        length = int(region[:8].view("<u8")[0])
        if 8 + length > size:
            raise self._damaged("its index is cut short")
        blob = region[8 : 8 + length].tobytes()
        if zlib.crc32(blob) != int(anchor["index_crc"]):
            raise self._damaged("the checksum of its index does not match")
        try:
            index = json.loads(blob)
            self.info = dict(index["info"])
            sections = {str(k): tuple(int(n) for n in v) for k, v in index["sections"].items()}
            if any(len(v) != 3 for v in sections.values()):
                raise ValueError("a section needs place, size and checksum")
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
            raise self._damaged(f"its index cannot be read ({error})") from error
        for name, (at, length, crc) in sections.items():
            if at < 0 or length < 0 or at + length > size:
                raise self._damaged(f"section {name!r} of its index lies outside of it")
            self._sections[name] = region[at : at + length]
            self._section_crcs[name] = crc
        for what in ("id", "source"):
            ends = self._sections.get(f"{what}_ends")
            if ends is not None and (
                ends.size != 8 * self.num_samples or f"{what}_text" not in self._sections
            ):
                raise self._damaged(f"it has not one {what} for each sample")
        if "crc" in self._sections and self._sections["crc"].size != 4 * self.num_samples:
            raise self._damaged("it has not one checksum for each sample")
        self.format_version = version

    def __len__(self) -> int:
        return self.num_samples

    def __reduce__(self) -> Any:
        return Reader, (self.path,)  # a pickle opens the file again, it does not carry it

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the map; it disappears with the last array that still looks into it."""
        self._bytes = np.empty(0, np.uint8)
        self._sections = {}
        self._sorted = None
        self.metadata = self.metadata[:0].copy()
        self.allocations = self.allocations[:0].copy()
        self.num_samples = 0

    @property
    def data(self) -> np.ndarray:
        """The whole file, (size,) uint8, mapped."""
        return self._bytes

    def column(self, name: str) -> np.ndarray:
        """The metadata column of a field, shape (N,), mapped: numbers for int and float, else the row's pointers."""
        column: np.ndarray = self.metadata[self._columns[name]]
        return column

    def span(self, ptr: int, size: int) -> np.ndarray:
        """``size`` bytes at ``ptr`` as a (size,) uint8 view; CorruptError if they are not all inside of the file."""
        if ptr < layout.HEADER.itemsize or size < 0 or ptr + size > self._table_at:
            raise CorruptError(
                f"it should lie at bytes {ptr:,} to {ptr + size:,}, outside of the file's data"
            )
        return self._bytes[ptr : ptr + size]

    def allocated(self, index: int, name: str, ptr: int) -> int:
        """Size of the allocation of sample ``index`` at ``ptr``, from the allocation table."""
        # Our writer allocates field by field, sample by sample, so the entry's place is known ...
        at = index * len(self._slot) + self._slot[name]
        if at < self.allocations.size:
            entry = self.allocations[at]
            if int(entry["ptr"]) == ptr and int(entry["sample_id"]) == index:
                return int(entry["size"])
        # ... FFCV's workers allocate as they come.
        ptrs, order = self._by_address()
        place = int(np.searchsorted(ptrs, np.uint64(ptr)))
        if place == ptrs.size or int(ptrs[place]) != ptr:
            raise CorruptError(f"nothing is allocated at its address {ptr:,}")
        return int(self.allocations["size"][order[place]])

    def _by_address(self) -> tuple[np.ndarray, np.ndarray]:
        """Addresses of the allocations in rising order, and the place of each in the table."""
        if self._sorted is None:
            ptrs = np.ascontiguousarray(self.allocations["ptr"])
            order = np.argsort(ptrs, kind="stable")
            self._sorted = (ptrs[order], order)
        return self._sorted

    def image(self, index: int, name: str = "image") -> EncodedImage:
        """The encoded image of a sample; ``data`` is a uint8 view into the file."""
        row = self.column(name)[index]
        mode, height, width, ptr = int(row["mode"]), int(row["height"]), int(row["width"]), int(row["ptr"])
        if mode == layout.RAW:
            size = height * width * 3
        elif mode == layout.JPEG:
            size = self.allocated(index, name, ptr)
        else:
            raise CorruptError(f"its image mode is {mode}, neither jpeg (0) nor raw (1)")
        if not height or not width:
            raise CorruptError(f"its image has {height} x {width} pixels")
        return EncodedImage("raw" if mode == layout.RAW else "jpeg", height, width, self.span(ptr, size))

    def spans(self, indices: np.ndarray, name: str = "image") -> Spans:
        """Where the encoded images of ``indices`` (B,) lie in :attr:`data`, at once; damage is not raised but marked."""
        indices, column = np.asarray(indices, np.int64), self.column(name)
        # Field by field: numpy takes whole rows of a table twenty times as slowly.
        mode, ptrs = column["mode"][indices], column["ptr"][indices]
        heights, widths = (
            column["height"][indices].astype(np.int64),
            column["width"][indices].astype(np.int64),
        )
        raw = mode == layout.RAW
        sizes = heights * widths * 3
        if not raw.all():
            sizes = np.where(raw, sizes, self._allocated(indices, name, ptrs))
        starts = ptrs.astype(np.int64)
        inside = (ptrs >= np.uint64(layout.HEADER.itemsize)) & (ptrs <= np.uint64(self._table_at))
        inside &= (sizes >= 0) & (sizes <= self._table_at - np.where(inside, starts, 0))
        good = (raw | (mode == layout.JPEG)) & inside & (heights > 0) & (widths > 0)
        return Spans(
            np.where(good, starts, -1), np.where(good, sizes, 0), raw, np.stack([heights, widths], 1)
        )

    def _allocated(self, indices: np.ndarray, name: str, ptrs: np.ndarray) -> np.ndarray:
        """:meth:`allocated` for many samples, -1 where nothing is allocated at the address."""
        at = indices * len(self._slot) + self._slot[name]
        if not self.allocations.size:
            return np.full(len(indices), -1, np.int64)
        place = np.minimum(at, self.allocations.size - 1)
        found = self.allocations["ptr"][place] == ptrs
        found &= (at < self.allocations.size) & (self.allocations["sample_id"][place] == indices)
        sizes = np.where(found, self.allocations["size"][place].astype(np.int64), -1)
        if not found.all():
            known, order = self._by_address()
            place = np.minimum(np.searchsorted(known, ptrs[~found]), known.size - 1)
            there = known[place] == ptrs[~found]
            sizes[~found] = np.where(there, self.allocations["size"][order[place]].astype(np.int64), -1)
        return sizes

    def value(self, index: int, name: str) -> Any:
        """The value of any field but an image: int, float, bytes, JSON value or array (a copy)."""
        field = self.fields[name]
        row = self.column(name)[index]
        if field.kind == "int":
            return int(row)
        if field.kind == "float":
            return float(row)
        if field.kind == "ndarray":
            data = self.span(int(row), field.nbytes)
            return np.frombuffer(bytearray(data), field.dtype).reshape(
                field.shape
            )  # writable, the caller's own
        data = self.span(int(row["ptr"]), int(row["size"]))
        if field.kind == "bytes":
            return data.tobytes()
        try:
            return json.loads(data.tobytes().split(b"\0", 1)[0])
        except (ValueError, RecursionError) as error:
            raise CorruptError(f"its field {name!r} is not JSON ({error})") from error

    def checksum_matches(self, index: int) -> bool | None:
        """Whether the bytes of a sample are those that were written; None where the file has no checksums."""
        crcs = self._sections.get("crc")
        if crcs is None:
            return None
        crc = zlib.crc32(self.metadata[index : index + 1].tobytes())
        for name, field in self.fields.items():
            row = self.column(name)[index]
            if field.kind == "image":
                crc = zlib.crc32(memoryview(self.image(index, name).data), crc)
            elif field.kind == "ndarray":
                crc = zlib.crc32(self.span(int(row), field.nbytes).data, crc)
            elif field.kind in ("bytes", "json"):
                crc = zlib.crc32(self.span(int(row["ptr"]), int(row["size"])).data, crc)
        return crc == int(crcs[4 * index : 4 * index + 4].view("<u4")[0])

    def damaged_sections(self) -> list[str]:
        """Names of the index's sections (checksums, ids, sources) whose own checksum does not match; reads them all."""
        return [
            name for name, data in self._sections.items() if zlib.crc32(data.data) != self._section_crcs[name]
        ]

    def name(self, index: int, what: str = "id") -> str:
        """The id or source of a sample for messages: '?' where the index is damaged."""
        try:
            return str(self.strings(what)[index])
        except DataError:
            return "?"

    def strings(self, what: str) -> Sequence[str]:
        """The ids or sources (``what``) of the samples, read when asked for; numbers as text where there are none."""
        if f"{what}_ends" not in self._sections:
            return _Numbers(self.num_samples) if what == "id" else self.strings("id")
        return _Strings(
            self._sections[f"{what}_ends"].view("<u8"), self._sections[f"{what}_text"], self.num_samples
        )


class _Numbers(Sequence[str]):
    """'0', '1', ... without storing them."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [str(i) for i in range(self._length)[index]]
        return str(range(self._length)[index])

    def __iter__(self) -> Iterator[str]:
        return map(str, range(self._length))


class _Strings(Sequence[str]):
    """Texts laid end to end in a mapped region; ``ends`` (N,) uint64 says where each of them stops."""

    def __init__(self, ends: np.ndarray, text: np.ndarray, length: int) -> None:
        if ends.size != length:
            raise DataError(f"the index holds {ends.size} names for {length} samples; the file is damaged")
        self._ends, self._text = ends, text

    def __len__(self) -> int:
        return int(self._ends.size)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]
        start = int(self._ends[index - 1]) if index else 0
        end = int(self._ends[index])
        if not start <= end <= self._text.size:
            raise CorruptError(f"the name of sample {index} lies outside of the file's index")
        return self._text[start:end].tobytes().decode("utf-8", errors="replace")
