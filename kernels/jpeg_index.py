"""What a decoder of crops must know of many JPEGs, read once: sizes, tables ready for look-ups, where each restart segment begins.

Afterwards no header is looked at again, and a crop's segments are found by arithmetic, without their bytes: those may be on a GPU.
The trade-off is memory: 4 bytes for each restart segment, 75 for each image, and 1 to 1.5 KiB for each Huffman table that no other
image has. Files of one encoder share its standard tables; files with optimised tables take some 3 KiB each.

>>> index = index_of(data, starts, sizes); index.ok.mean(), index.shapes[0]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastload.kernels import jpeg
from fastload.kernels.huffman import ZIGZAG
from fastload.kernels.jit import kernel

if TYPE_CHECKING:
    import torch

# Columns of Index.tables, three places each: where a component's tables begin.
DC, AC, QUANT = 0, 3, 6
# A look-up takes the next 8 bits, and up to 8 more for a longer code. An entry is length << 8 | symbol, 0 for no code, or
# LONG | (bits - 1) << 12 | place, counted from the first entry of the table, of an own table for the next `bits` bits.
LONG = 0x8000
_FIRST = 8
_ROOM = 1 << 11  # entries of one table: 256, at most 510 for mixed and 512 for full long ones
_FACTS = (
    jpeg.HEIGHT, jpeg.WIDTH, jpeg.COMPONENTS, jpeg.MCU_H, jpeg.MCU_W, jpeg.MCUS_Y, jpeg.MCUS_X, jpeg.INTERVAL,
)  # fmt: skip
_MOST = 2**31  # what 32-bit places on the device reach: entries of all tables, bytes of one image's pixels


class Index(NamedTuple):
    """N JPEGs in one memory. What is not ``ok`` has zeros here, and is left to other decoders."""

    ok: np.ndarray  # (N,) bool: baseline with restart markers, grey or YCbCr in 4:4:4, 4:2:2, 4:4:0 or 4:2:0
    starts: np.ndarray  # (N,) int64: place of the first byte
    shapes: np.ndarray  # (N, 2) int32: height and width
    components: np.ndarray  # (N,) uint8: 1 or 3
    sampling: np.ndarray  # (N, 2) uint8: luma samples for each one of chroma, down and across; 1 or 2
    grid: np.ndarray  # (N, 2) int32: MCUs down and across
    interval: np.ndarray  # (N,) int32: MCUs between restart markers
    first: np.ndarray  # (N,) int64: row of ``segments`` for the image's first segment
    segments: np.ndarray  # (S,) uint32: bytes from the image's first to each segment's, then to the end; markers are its last two
    tables: np.ndarray  # (N, 9) int32: places in ``huffman`` of DC, AC, and in ``quant``, for each component
    huffman: Any  # (H,) int16, see LONG
    quant: Any  # (64Q,) int32, in stream order: quantisation step << 11 | place in the block * 32

    def to(self, device: torch.device | str) -> Index:
        """The same with ``huffman`` and ``quant`` as tensors on the device: the rest is the host's to look at."""
        import torch

        moved = [torch.as_tensor(part).to(device) for part in (self.huffman, self.quant)]
        return self._replace(huffman=moved[0], quant=moved[1])


def index_of(data: np.ndarray, starts: np.ndarray, sizes: np.ndarray) -> Index:
    """Index of the N JPEGs of ``sizes`` (N,) bytes that begin at ``starts`` (N,) of ``data`` (n,) uint8; no byte is trusted."""
    starts, sizes = np.asarray(starts, np.int64), np.asarray(sizes, np.int64)
    count = len(starts)
    ok, facts = np.zeros(count, bool), np.zeros((count, 8), np.int32)
    first, tables = np.zeros(count, np.int64), np.zeros((count, 9), np.int32)
    kept, total = [np.zeros(0, np.uint32)], 0
    shared = _Shared(_lookup), _Shared(_steps)
    info, places = np.empty(jpeg.INFO_SIZE, np.int64), np.empty((9, 2), np.int64)
    for i, (start, size) in enumerate(zip(starts.tolist(), sizes.tolist())):
        if start < 0 or size < 0 or start + size > len(data):
            continue
        piece = data[start : start + size]
        if not _read(piece, info, places):
            continue
        known = info.tolist()
        grid, interval = known[jpeg.MCUS_Y] * known[jpeg.MCUS_X], known[jpeg.INTERVAL]
        number = -(-grid // interval)
        # A segment has a byte and a marker at least, a block two bits: a header alone cannot ask for much memory.
        if 3 * number > size or grid * known[jpeg.BLOCKS] > 4 * size or size >= 2**32:
            continue
        if 3 * grid * known[jpeg.MCU_H] * known[jpeg.MCU_W] >= _MOST:
            continue
        begins = np.empty(number + 1, np.uint32)
        if not _find(piece, info, begins):
            continue
        # Of grey images, and where red has the tables of blue, one definition is looked up once.
        parts = [(a, b, kind) for (a, b), kind in zip(places.tolist(), b"\1\1\1\0\0\0\2\2\2")]
        found = {
            (a, b, kind): shared[kind == 2].place(piece[a:b].tobytes(), kind) for a, b, kind in set(parts)
        }
        if min(found.values()) < 0:
            continue
        ok[i], first[i], tables[i] = True, total, [found[part] for part in parts]
        facts[i] = [known[place] for place in _FACTS]
        kept.append(begins)
        total += number + 1
    return Index(
        ok, starts, facts[:, :2].copy(), facts[:, 2].astype(np.uint8), (facts[:, 3:5] // 8).astype(np.uint8),
        facts[:, 5:7].copy(), facts[:, 7].copy(), first, np.concatenate(kept), tables,
        shared[0].joined(np.int16), shared[1].joined(np.int32),
    )  # fmt: skip


class _Shared:
    """Tables by their definition, one behind the other: most images of a dataset have the same ones."""

    def __init__(self, build: Any) -> None:
        self.build = build
        self.known: dict[tuple[bytes, int], int] = {}
        self.parts: list[np.ndarray] = []
        self.size = 0

    def place(self, definition: bytes, kind: int) -> int:
        """Where the table begins, -1 if it is none."""
        at = self.known.get((definition, kind))
        if at is None:
            table = self.build(np.frombuffer(definition, np.uint8), kind)
            at = -1
            if len(table) and self.size + len(table) < _MOST:
                at = self.size
                self.parts.append(table)
                self.size += len(table)
            self.known[definition, kind] = at
        return at

    def joined(self, dtype: Any) -> np.ndarray:
        """(size,) of all tables."""
        return np.concatenate([np.zeros(0, dtype), *self.parts]).astype(dtype, copy=False)


def _steps(body: np.ndarray, kind: int) -> np.ndarray:
    """(64,) int32 of a quantisation table of 64 bytes or 64 words, most significant byte first."""
    values = (body if len(body) == 64 else body.view(">u2")).astype(np.int32)
    return (values << 11) | (ZIGZAG.astype(np.int32) << 5)


def _lookup(definition: np.ndarray, kind: int) -> np.ndarray:
    """(entries,) int16 of a Huffman table of 16 counts and its symbols; ``kind`` 1: for DC. Empty if it is no prefix code."""
    out = np.zeros(_ROOM, np.uint16)
    used = _build(definition, kind == 1, out)
    return out[: max(used, 0)].view(np.int16)


@kernel
def _build(definition, dc, out):
    """Fill ``out`` (_ROOM,) uint16, zeros, as LONG says; entries used, or -1."""
    used = np.int64(1 << _FIRST)
    # The bits that follow a prefix of 8 are those of its longest code, which is its last one.
    longest = np.zeros(1 << _FIRST, np.int64)
    for again in range(2):
        code, k = np.int64(0), 16
        for length in range(1, 17):
            for _ in range(definition[length - 1]):
                symbol = np.int64(definition[k])
                # No code may be ones only, and no DC difference has more than 11 bits.
                if code >= (1 << length) - 1 or (dc and symbol > 11):
                    return np.int64(-1)
                k += 1
                prefix = code << _FIRST >> length if length <= _FIRST else code >> (length - _FIRST)
                if length <= _FIRST:
                    at, wide = prefix, _FIRST - length
                elif again == 0:
                    longest[prefix] = length - _FIRST
                    code += 1
                    continue
                else:
                    bits = longest[prefix]
                    if out[prefix] == 0:
                        if used + (1 << bits) > out.size:
                            return np.int64(-1)
                        out[prefix] = LONG | (bits - 1) << 12 | used
                        used += 1 << bits
                    wide = bits - (length - _FIRST)
                    rest = code & ((1 << (length - _FIRST)) - 1)
                    at = (np.int64(out[prefix]) & 0xFFF) + (rest << wide)
                for i in range(at, at + (1 << wide)):
                    out[i] = (length << 8) | symbol
                code += 1
            code <<= 1
    return used


@kernel
def _read(data, info, places):
    """Fill ``info`` (INFO_SIZE,) and ``places`` (9, 2) int64: begin and end of each component's tables, as in Index.tables.

    False unless it is a plain baseline JPEG with restart markers, whose tables are all there.
    """
    if jpeg.parse_into(data, info) != jpeg.OK or not jpeg.is_simple(info) or info[jpeg.INTERVAL] == 0:
        return False
    count = info[jpeg.COMPONENTS]
    defined = np.zeros((12, 2), np.int64)  # DC 0-3, AC 4-7, quantisation 8-11; the last definition counts
    at = np.int64(2)
    while at < info[jpeg.SCAN_HEADER_AT]:  # the segments' lengths were checked by parse_into
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        end = at + 2 + ((np.int64(data[at + 2]) << 8) | np.int64(data[at + 3]))
        p = at + 4
        at = end
        while p < end and (marker == 0xC4 or marker == 0xDB):
            kind, number = np.int64(data[p] >> 4), np.int64(data[p] & 15)
            size = np.int64(64) << (kind & 1)
            if marker == 0xC4:
                if p + 17 > end:
                    return False
                size = np.int64(16)
                for i in range(1, 17):
                    size += np.int64(data[p + i])
            p += 1
            if kind > 1 or number > 3 or p + size > end or (marker == 0xC4 and size > 272):
                return False
            row = number + (4 * kind if marker == 0xC4 else 8)
            defined[row, 0], defined[row, 1] = p, p + size
            p += size
    scan = info[jpeg.SCAN_HEADER_AT] + 5
    for i in range(3):
        c = min(i, count - 1)
        dc, ac = np.int64(data[scan + 2 * c + 1] >> 4), np.int64(data[scan + 2 * c + 1] & 15)
        quant = np.int64(data[info[jpeg.FRAME_AT] + 7 + 3 * c])
        if data[scan + 2 * c] != info[jpeg.IDS + c] or dc > 3 or ac > 3 or quant > 3:
            return False
        places[DC + i], places[AC + i], places[QUANT + i] = defined[dc], defined[4 + ac], defined[8 + quant]
    return places[:, 1].min() > 0


@kernel
def _find(data, info, begins):
    """Fill ``begins`` (segments + 1,) uint32, see Index.segments; False if they do not end with the right markers."""
    number = begins.size - 1
    lengths = np.empty(number, np.int64)
    if info[jpeg.INDEX_COUNT] == number:
        at = info[jpeg.INDEX_AT]
        for k in range(number):
            lengths[k] = np.int64(data[at + 2 * k]) | (np.int64(data[at + 2 * k + 1]) << 8)
    elif not jpeg.measure_segments(data, info[jpeg.SCAN_AT], lengths):
        return False
    at = info[jpeg.SCAN_AT]
    begins[0] = at
    for k in range(number):
        at += lengths[k]
        if lengths[k] < 3 or at > data.size or data[at - 2] != 0xFF:
            return False
        if data[at - 1] != (0xD9 if k == number - 1 else 0xD0 + (k & 7)):
            return False
        begins[k + 1] = at
    return True
