"""Huffman decoding of baseline JPEG blocks: up to two coefficients for each look-up, from bytes without stuffing.

An AC table has one entry for each value of the next eleven bits. It holds what these bits decode to: one or two symbols
with their run lengths and values, end of block included. Only longer codes take a second look. Tables are kept in slots by
their definition, since most files of a dataset share theirs, so that building them costs nothing for each image.

The stream is read eight bytes at a time without a test for its end: segments are copied into scratch first, stuffing
removed, with :data:`PAD` bytes behind them, and the caller compares the place after each block.

>>> state = new_tables()
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fastload.kernels.memory import (
    copy32,
    inlined,
    load_be64,
    load_i64,
    load_u8,
    load_u16,
    load_u32,
    lowest_bit,
    part,
    store_u8,
    store_u16,
)

SLOTS = 12  # tables that are kept of either kind
AC_BITS, DC_BITS = 11, 9
PAD = 256  # a block has at most 64 codes of 26 bits, 208 bytes
END = 96  # step of an end of block: more than any run reaches, so that the end is told from an overflow
_KEY = 16 + 256

# Order of coefficients in the stream, as places in the block.
ZIGZAG = np.array(
    sorted(range(64), key=lambda p: (s := p // 8 + p % 8, p // 8 if s % 2 else p % 8)), np.uint8
)


class Tables(NamedTuple):
    """Huffman tables by slot, for one thread. The first axis is the kind: 0 DC, 1 AC."""

    zigzag: np.ndarray  # (256,) uint8: ZIGZAG; what lies behind a block goes to place 64
    keys: np.ndarray  # (2, SLOTS, 272) uint8: 16 counts, then the symbols
    sizes: np.ndarray  # (2, SLOTS) int64: symbols in the key, -1: the slot is free
    turn: np.ndarray  # (2,) int64: the slot that is overwritten next
    long: (
        np.ndarray
    )  # (2, SLOTS, 17, 2) int64: for each length, the first code behind those of the length, aligned to
    # 16 bits, and the place of the length's first symbol less its code
    dc: np.ndarray  # (SLOTS, 512) uint16: length << 8 | bits of the difference, 0: a longer code
    ac: np.ndarray  # (SLOTS, 2048) uint32, see _entry
    single: np.ndarray  # (2048,) int32: memory for building


def new_tables() -> Tables:
    """Empty slots. A thread needs its own."""
    return Tables(
        np.concatenate([ZIGZAG, np.full(192, 64, np.uint8)]),
        np.zeros((2, SLOTS, _KEY), np.uint8),
        np.full((2, SLOTS), -1, np.int64),
        np.zeros(2, np.int64),
        np.zeros((2, SLOTS, 17, 2), np.int64),
        np.zeros((SLOTS, 1 << DC_BITS), np.uint16),
        np.zeros((SLOTS, 1 << AC_BITS), np.uint32),
        np.zeros(1 << AC_BITS, np.int32),
    )


@inlined
def _extend(code, size):
    """The number that ``size`` bits of a JPEG stand for."""
    return code if size == 0 or code >> (size - 1) else code - (1 << size) + 1


@part
def _entry(single, i):
    """What the AC_BITS bits ``i`` decode to, as an entry.

    Complete: bits 0-3 the bits used (1 to 11); 4-7 the run before the first value, which is in bits 24-31; 8-14 the step
    from its place to the second value, which is in bits 16-23. Without a second symbol the step is 0 and both values
    are equal. An end of block is a step of END with value 0. Incomplete (bits 0-3 are 0): bits 4-7 the length
    of the code, 8-11 run, 16-19 size; all 0: the code is longer.
    """
    symbol = np.int64(single[i])
    if symbol == 0:
        return np.int64(0)
    used, run, size = symbol >> 8, (symbol >> 4) & 15, symbol & 15
    step, second = np.int64(0), np.int64(0)
    if size == 0:
        first = np.int64(0)
        if run < 15:  # end of block
            return used | (END << 8)
    else:
        if used + size > AC_BITS or size > 7:
            return (used << 4) | (run << 8) | (size << 16)
        first = _extend((i >> (AC_BITS - used - size)) & ((1 << size) - 1), size)
        used += size
    second = first
    rest = (i << used) & ((1 << AC_BITS) - 1)
    left = AC_BITS - used
    symbol = np.int64(single[rest])
    length, zeros, size = symbol >> 8, (symbol >> 4) & 15, symbol & 15
    if symbol and length + size <= left and size <= 7:
        used += length + size
        second = _extend((rest >> (AC_BITS - length - size)) & ((1 << size) - 1), size)
        step = zeros + 1
        if size == 0 and zeros < 15:
            step = np.int64(END)
    return used | (run << 4) | (step << 8) | ((second & 255) << 16) | ((first & 255) << 24)


@part
def _build(tables, kind, slot):
    """Fill a slot from its key; False if it is no prefix code."""
    key = tables.keys[kind, slot]
    bits = AC_BITS if kind else DC_BITS
    single = tables.single
    single[:] = 0
    code, k = 0, 0
    for length in range(1, 17):
        tables.long[kind, slot, length, 1] = k - code
        for _ in range(key[length - 1]):
            if code >= (1 << length):
                return False
            symbol = np.int64(key[16 + k])
            if kind == 0 and symbol > 11:
                return False
            if length <= bits:
                low = code << (bits - length)
                for i in range(low, low + (1 << (bits - length))):
                    single[i] = (length << 8) | symbol
            code += 1
            k += 1
        if code >= (1 << length):  # too many codes, or one of all ones, which JPEG does not allow
            return False
        tables.long[kind, slot, length, 0] = code << (16 - length)
        code <<= 1
    if kind:
        for i in range(1 << AC_BITS):
            tables.ac[slot, i] = np.uint32(_entry(single, i))
    else:
        for i in range(1 << DC_BITS):
            tables.dc[slot, i] = np.uint16(single[i])
    return True


@part
def find_slot(tables, kind, data, at, size, taken):
    """The slot of the table defined at ``data[at : at + 16 + size]``, built if it is new; -1: it is no prefix code.

    Slots whose bits are set in ``taken`` are not overwritten.
    """
    for slot in range(SLOTS):
        if tables.sizes[kind, slot] == size:
            same = True
            for i in range(16 + size):
                if tables.keys[kind, slot, i] != data[at + i]:
                    same = False
                    break
            if same:
                return slot
    slot = tables.turn[kind]
    while taken >> slot & 1:
        slot = (slot + 1) % SLOTS
    tables.turn[kind] = (slot + 1) % SLOTS
    tables.sizes[kind, slot] = -1
    for i in range(16 + size):
        tables.keys[kind, slot, i] = data[at + i]
    if not _build(tables, kind, slot):
        return -1
    tables.sizes[kind, slot] = size
    return slot


@part
def long_code(long, symbols, bits, shortest):
    """Length << 8 | symbol of the code of at least ``shortest`` bits at the top of ``bits``, 0 if there is none."""
    code = np.int64(bits >> np.uint64(48))
    for length in range(shortest, 17):
        if code < load_i64(long + 16 * length):
            place = load_i64(long + 16 * length + 8) + (code >> (16 - length))
            return (length << 8) | load_u8(symbols + (place & 255))
    return np.int64(0)


@inlined
def refill(at, bits, have):
    """At least 56 unread bits, left-aligned; what is below them is the stream's as well, and is read again later."""
    bits |= load_be64(at) >> np.uint64(have)
    return at + ((63 - have) >> 3), bits, have | 56


@inlined
def decode_block(at, bits, have, dc, dc_long, dc_symbols, ac, ac_long, ac_symbols, block, zigzag):
    """Decode the next block into ``block``, the address of 64 int16 that are zero; its DC place is left alone.

    The tables are addresses too. Returns (at, bits, have, difference of DC, a bound of the last place in stream order
    that is not 0); the bound is -1 for an impossible code.
    """
    at, bits, have = refill(at, bits, have)
    entry = load_u16(dc + np.int64(bits >> np.uint64(64 - DC_BITS)) * 2)
    length, size = entry >> 8, entry & 255
    if entry == 0:
        entry = long_code(dc_long, dc_symbols, bits, DC_BITS + 1)
        length, size = entry >> 8, entry & 255
        if entry == 0:
            return at, bits, have, np.int64(0), np.int64(-1)
    bits <<= np.uint64(length)
    negative = np.int64(~bits >> np.uint64(63))
    difference = np.int64((bits >> np.uint64(1)) >> np.uint64(63 - size)) - negative * ((1 << size) - 1)
    bits <<= np.uint64(size)
    have -= length + size
    k = np.int64(1)
    while True:
        at, bits, have = refill(at, bits, have)
        entry, place, before, held = np.int64(0), np.int64(0), bits, have
        for _ in range(4):
            entry = load_u32(ac + np.int64(bits >> np.uint64(64 - AC_BITS)) * 4)
            used = entry & 15
            if used == 0:
                break
            before, held = bits, have
            bits <<= np.uint64(used)
            have -= used
            place = k + ((entry >> 4) & 15)
            store_u16(block + 2 * load_u8(zigzag + place), np.int64(np.int32(np.uint32(entry))) >> 24)
            k = place + ((entry >> 8) & 127)
            store_u16(block + 2 * load_u8(zigzag + k), np.int64(np.int8((entry >> 16) & 255)))
            k += 1
            if k >= 64:
                break
        if k >= 64:
            if k == 64:
                return at, bits, have, difference, np.int64(63)
            if place < 63 and k > END:
                return at, bits, have, difference, place - (1 if entry >> 24 == 0 else 0)
            if place != 63:
                return at, bits, have, difference, np.int64(-1)
            # The block is full with the first symbol: the second one belongs to the next block.
            bits, have, k = before, held, np.int64(63)
            at, bits, have = refill(at, bits, have)
            entry = load_u32(ac + np.int64(bits >> np.uint64(64 - AC_BITS)) * 4)
            k -= (entry >> 4) & 15
        elif entry & 15:
            continue
        else:
            at, bits, have = refill(at, bits, have)
        # One symbol with care: its code and its value may be long.
        length, run, size = (entry >> 4) & 15, (entry >> 8) & 15, (entry >> 16) & 15
        if entry == 0 or entry & 15:
            entry = long_code(ac_long, ac_symbols, bits, 1)
            if entry == 0:
                return at, bits, have, difference, np.int64(-1)
            length, run, size = entry >> 8, (entry >> 4) & 15, entry & 15
        bits <<= np.uint64(length)
        negative = np.int64(~bits >> np.uint64(63))
        value = np.int64((bits >> np.uint64(1)) >> np.uint64(63 - size)) - negative * ((1 << size) - 1)
        bits <<= np.uint64(size)
        have -= length + size
        if size == 0 and run < 15:
            return at, bits, have, difference, k - 1
        k += run
        if k > 63:
            return at, bits, have, difference, np.int64(-1)
        store_u16(block + 2 * load_u8(zigzag + k), value)
        k += 1
        if k == 64:
            return at, bits, have, difference, np.int64(63)


NO_MARKER = -1


@part
def unstuff(source, end, to, room):
    """Copy entropy-coded bytes from address ``source`` to ``to`` up to a marker or ``end``, without their stuffing.

    Returns (bytes written, address of the marker's 0xFF, marker), the latter NO_MARKER at ``end``; at most ``room`` bytes are
    kept, and up to 32 bytes more are overwritten. -1 bytes: there was not enough room.
    """
    start, limit = to, to + room
    while True:
        if to > limit:
            return np.int64(-1), source, np.int64(NO_MARKER)
        if source + 32 <= end:
            mask = copy32(source, to)
            if mask == 0:
                source += 32
                to += 32
                continue
            skip = lowest_bit(mask)
            source += skip
            to += skip
        elif source >= end:
            return to - start, source, np.int64(NO_MARKER)
        else:
            byte = load_u8(source)
            if byte != 255:
                store_u8(to, byte)
                source += 1
                to += 1
                continue
        # At an 0xFF.
        if source + 1 >= end:
            return to - start, source, np.int64(NO_MARKER)
        marker = load_u8(source + 1)
        if marker == 0:
            store_u8(to, 255)
            to += 1
            source += 2
        elif marker == 255:  # a fill byte
            source += 1
        else:
            return to - start, source, marker
