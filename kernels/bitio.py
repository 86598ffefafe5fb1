"""Reading and writing the bits of entropy-coded JPEG data, and Huffman tables for both: what the transcoders share.

A reader holds up to 64 unread bits, left-aligned, beside the place of the next byte; behind the end of the data it invents zero bits
and counts them, so that the caller can tell afterwards that too much was read. A writer holds fewer than 32 bits, right-aligned.

>>> at, bits, have, spare = refill(data, at, bits, have, spare)
"""

from __future__ import annotations

import numpy as np

from fastload.kernels.jit import kernel
from fastload.kernels.memory import inlined

FAST = 11  # bits that the first table look-up covers: nearly all codes of photographs


@kernel
def build_table(counts, symbols, fast, most, first, offset, codes, sizes):
    """Decoding and encoding tables of one Huffman table; False if it is no prefix code.

    ``counts`` (16,) codes of each length, ``symbols`` (256,) uint8 in the order of their codes. Fills ``fast`` (2 ** FAST,) int16 (length
    << 8 | symbol, 0: a longer code), ``most``, ``first``, ``offset`` (17,) int64 by length, ``codes`` and ``sizes`` (256,) int64 by symbol.
    """
    fast[:] = 0
    sizes[:] = 0
    code = 0
    k = 0
    for length in range(1, 17):
        first[length] = code
        offset[length] = k
        for _ in range(counts[length - 1]):
            if code >= (1 << length) - 1:  # no code may be ones only: they fill up bytes
                return False
            symbol = symbols[k]
            codes[symbol], sizes[symbol] = code, length
            if length <= FAST:
                for i in range(1 << (FAST - length)):
                    fast[(code << (FAST - length)) | i] = (length << 8) | symbol
            code += 1
            k += 1
        most[length] = code - 1 if counts[length - 1] else -1
        code <<= 1
    return True


@kernel
def read_tables(data, at, end, fast, most, first, offset, codes, sizes, symbols, present):
    """Read the body ``data[at:end]`` of a DHT segment into tables 0-3 (DC) and 4-7 (AC); False if it is damaged.

    The arrays are those of :func:`build_table` with an axis of 8 in front; ``present`` (8,) uint8 becomes 1 where a table is defined.
    """
    while at < end:
        if at + 17 > end:
            return False
        kind, number = data[at] >> 4, data[at] & 15
        if kind > 1 or number > 3:
            return False
        t = kind * 4 + number
        total = 0
        for i in range(16):
            total += np.int64(data[at + 1 + i])
        if total > 256 or at + 17 + total > end:
            return False
        if kind == 0:
            for i in range(total):
                if data[at + 17 + i] > 15:  # a size of so many bits there is not
                    return False
        symbols[t, :total] = data[at + 17 : at + 17 + total]
        if not build_table(
            data[at + 1 : at + 17], symbols[t], fast[t], most[t], first[t], offset[t], codes[t], sizes[t]
        ):
            return False
        present[t] = 1
        at += 17 + total
    return True


@kernel
def refill(data, at, bits, have, spare):
    """At least 32 unread bits; stuffing removed, zeros behind the end or in front of a marker.

    Call it with fewer than 32 bits. Returns (at, bits, have, spare); ``spare`` counts the invented bits. If it exceeds ``have``,
    some of them were used.
    """
    if at + 4 <= data.size:
        word = (
            (np.uint32(data[at]) << np.uint32(24))
            | (np.uint32(data[at + 1]) << np.uint32(16))
            | (np.uint32(data[at + 2]) << np.uint32(8))
            | np.uint32(data[at + 3])
        )
        # No byte is 0xFF: no byte of the complement is zero.
        flipped = ~np.uint32(word)
        if (np.uint32(flipped - np.uint32(0x01010101)) & np.uint32(word) & np.uint32(0x80808080)) == 0:
            return at + 4, bits | (np.uint64(word) << np.uint64(32 - have)), have + 32, spare
    while have < 32:
        if at < data.size and (data[at] != 0xFF or (at + 1 < data.size and data[at + 1] == 0)):
            bits |= np.uint64(data[at]) << np.uint64(56 - have)
            at += 2 if data[at] == 0xFF else 1
        else:
            spare += 8
        have += 8
    return at, bits, have, spare


@kernel
def emit(out, to, word):
    """Write four bytes, with a zero behind each 0xFF."""
    flipped = ~np.uint32(word)
    if (np.uint32(flipped - np.uint32(0x01010101)) & np.uint32(word) & np.uint32(0x80808080)) == 0:
        out[to] = np.uint8(word >> np.uint32(24))
        out[to + 1] = np.uint8(word >> np.uint32(16))
        out[to + 2] = np.uint8(word >> np.uint32(8))
        out[to + 3] = np.uint8(word)
        return to + 4
    for shift in (24, 16, 8, 0):
        byte = np.uint8(word >> np.uint32(shift))
        out[to] = byte
        to += 1
        if byte == 0xFF:
            out[to] = 0
            to += 1
    return to


@kernel
def finish(out, to, acc, held):
    """Write what is held, the last byte padded with ones."""
    pad = np.int64((8 - held % 8) % 8)
    acc = (acc << np.uint64(pad)) | ((np.uint64(1) << np.uint64(pad)) - np.uint64(1))
    held += pad
    while held > 0:
        held -= 8
        byte = np.uint8((acc >> np.uint64(held)) & np.uint64(255))
        out[to] = byte
        to += 1
        if byte == 0xFF:
            out[to] = 0
            to += 1
    return to


@inlined
def next_symbol(bits, fast, most, first, offset, symbols):
    """Length << 8 | symbol of the code at the top of ``bits``, 0 if there is none; the arrays are those of one table."""
    entry = np.int64(fast[np.int64(bits >> np.uint64(64 - FAST))])
    if entry:
        return entry
    for length in range(FAST + 1, 17):
        code = np.int64(bits >> np.uint64(64 - length))
        if first[length] <= code <= most[length]:
            return (np.int64(length) << 8) | np.int64(symbols[offset[length] + code - first[length]])
    return np.int64(0)


@inlined
def peek(bits, size):
    """The next ``size`` (0 to 63) bits as a number."""
    return np.int64((bits >> np.uint64(1)) >> np.uint64(63 - size))


@inlined
def extend(value, size):
    """The signed number that ``size`` bits of a JPEG stand for."""
    return value if size == 0 or value >> (size - 1) else value - (1 << size) + 1
