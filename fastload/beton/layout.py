"""Byte layout of a `.beton` file: FFCV's structures, and where our own index hangs.

All numbers are little-endian. FFCV leaves most of the 1,024 argument bytes of a field descriptor unused; the last 64 of
the first field hold our anchor, which points to an index region that FFCV never looks at.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fastload.errors import DataError, UsageError

Kind = Literal["image", "int", "float", "bytes", "json", "ndarray"]

BETON_VERSION = 2
FORMAT_VERSION = 1  # ours: the version of the index region
MAGIC = b"fastload"
MIN_PAGE, MAX_PAGE = 1 << 21, 1 << 31
NO_SAMPLE = 2**64 - 1  # sample id of allocations that belong to no sample
NAME_BYTES, ARGUMENT_BYTES, ANCHOR_BYTES = 16, 1024, 64

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ]
)
DESCRIPTOR = np.dtype([("type_id", "u1"), ("name", "u1", NAME_BYTES), ("arguments", "u1", ARGUMENT_BYTES)])
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
IMAGE_ROW = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("ptr", "<u8")])
BYTES_ROW = np.dtype([("ptr", "<u8"), ("size", "<u8")])
ANCHOR = np.dtype(
    [
        ("magic", "S8"),
        ("format_version", "<u2"),
        ("reserved", "<u2"),
        ("index_crc", "<u4"),
        ("index_ptr", "<u8"),
        ("index_size", "<u8"),
    ]
)
NDARRAY_ARGUMENTS = np.dtype([("shape", "<u8", 32), ("type_length", "<u8")])

TYPE_IDS: dict[str, int] = {"float": 0, "int": 1, "image": 2, "bytes": 3, "ndarray": 4, "json": 5}
_KINDS = {number: kind for kind, number in TYPE_IDS.items()} | {6: "ndarray"}  # 6: FFCV's torch tensor
_ROWS: dict[str, Any] = {
    "image": IMAGE_ROW,
    "int": "<i8",
    "float": "<f8",
    "bytes": BYTES_ROW,
    "json": BYTES_ROW,
    "ndarray": "<u8",
}
ALLOCATING = ("image", "bytes", "json", "ndarray")
JPEG, RAW = 0, 1


@dataclass(frozen=True)
class Field:
    """One column of the file: its name (at most 16 ASCII bytes) and kind; dtype and shape for ``ndarray`` only."""

    name: str
    kind: Kind
    dtype: str | None = None
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in TYPE_IDS:
            raise UsageError(f"field kind must be one of {', '.join(TYPE_IDS)}, got {self.kind!r}")
        if not self.name.isascii() or not 0 < len(self.name) <= NAME_BYTES or "\0" in self.name:
            raise UsageError(
                f"a field name is 1 to {NAME_BYTES} ASCII characters (the format's limit), got {self.name!r}"
            )
        if self.kind == "ndarray":
            if self.dtype is None or not 0 < len(self.shape) <= 32 or min(self.shape) < 1:
                raise UsageError(
                    f"an ndarray field needs a dtype and 1 to 32 positive dimensions, got {self.dtype!r}, {self.shape!r}"
                )
            if np.dtype(self.dtype).kind not in "biufc":
                raise UsageError(f"an ndarray field holds plain numbers, got dtype {self.dtype!r}")
            if self.nbytes > MAX_PAGE:
                raise UsageError(
                    f"an array of shape {self.shape} is larger than the format's largest page (2 GiB)"
                )

    @property
    def nbytes(self) -> int:
        """Bytes of one value of an ndarray field."""
        return np.dtype(self.dtype).itemsize * math.prod(self.shape)


@dataclass(frozen=True)
class EncodedImage:
    """An image as it lies in the file: JPEG bytes, or (height, width, 3) uint8 pixels when ``mode`` is raw."""

    mode: Literal["jpeg", "raw"]
    height: int
    width: int
    data: Any  # bytes-like

    def __post_init__(self) -> None:
        if self.mode not in ("jpeg", "raw"):
            raise UsageError(f"image mode must be 'jpeg' or 'raw', got {self.mode!r}")
        if not (0 < self.height < 65536 and 0 < self.width < 65536):
            raise DataError(f"an image must be 1 to 65,535 pixels a side, got {self.height} x {self.width}")
        size = memoryview(self.data).nbytes
        if self.mode == "raw" and size != self.height * self.width * 3:
            raise DataError(f"raw pixels of {self.height} x {self.width} x 3 do not fill {size} bytes")


def metadata_dtype(fields: Sequence[Field]) -> np.dtype[Any]:
    """The row of one sample: a C-aligned struct, as FFCV lays it out; members are called f0, f1, ..."""
    return np.dtype([("", _ROWS[field.kind]) for field in fields], align=True)


def encode_descriptor(field: Field) -> np.ndarray:
    """A field as one DESCRIPTOR record, shape (1,)."""
    record = np.zeros(1, DESCRIPTOR)
    record["type_id"] = TYPE_IDS[field.kind]
    record["name"][0, : len(field.name)] = np.frombuffer(field.name.encode("ascii"), np.uint8)
    if field.kind == "ndarray":
        description = json.dumps(np.dtype(field.dtype).descr).encode("ascii")
        arguments = np.zeros(1, NDARRAY_ARGUMENTS)
        arguments["shape"][0, : len(field.shape)] = field.shape
        arguments["type_length"] = len(description)
        blob = np.frombuffer(arguments.tobytes() + description, np.uint8)
        record["arguments"][0, : blob.size] = blob
    return record


def decode_descriptor(record: np.ndarray) -> Field:
    """The field that a DESCRIPTOR record (a scalar of that dtype) describes."""
    name = record["name"].tobytes().split(b"\0", 1)[0].decode("ascii", errors="replace")
    kind = _KINDS.get(int(record["type_id"]))
    if kind is None:
        raise DataError(
            f"field {name!r} is of FFCV's custom type {int(record['type_id'])}, whose layout only its writer knows; "
            "write the file again without it"
        )
    try:
        if kind != "ndarray":
            return Field(name, kind)  # type: ignore[arg-type]
        arguments = np.frombuffer(record["arguments"].tobytes(), NDARRAY_ARGUMENTS, 1)[0]
        start = NDARRAY_ARGUMENTS.itemsize
        length = int(arguments["type_length"])
        if length > ARGUMENT_BYTES - start:
            raise ValueError(f"type description of {length} bytes")
        description = json.loads(record["arguments"].tobytes()[start : start + length])
        dtype = np.dtype([tuple(entry) for entry in description])["f0"]
        shape = tuple(int(n) for n in arguments["shape"] if n)
        return Field(name, "ndarray", dtype.str, shape)
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"the description of field {name!r} is damaged ({error})") from error
