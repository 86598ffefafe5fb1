"""Add restart markers to a baseline JPEG without touching a coefficient.

Entropy-coded data is decoded symbol by symbol and written again; only DC differences change, where a segment begins and
the prediction starts from zero. AC symbols are copied as bits. About as fast as decoding the picture once.

>>> add_restarts(data, info, interval, out, lengths)
"""

from __future__ import annotations

import numpy as np

from fastload.kernels import jpeg
from fastload.kernels.jit import kernel

OK, BAD_TABLE, BAD_CODE, OVERRUN, BAD_RESTART, NO_ROOM, TOO_LONG, UNSUPPORTED = 0, 11, 12, 13, 14, 15, 16, 17
REASONS = {
    BAD_TABLE: "a Huffman table of the JPEG is damaged",
    BAD_CODE: "the JPEG's image data are damaged: an impossible Huffman code",
    OVERRUN: "the JPEG's image data end too early",
    BAD_RESTART: "a restart marker of the JPEG is missing or out of order",
    NO_ROOM: "the output buffer is too small",
    TOO_LONG: "a restart segment is longer than 65,535 bytes",
    UNSUPPORTED: "the JPEG is not a plain baseline JPEG",
}
_FAST = 11  # bits that the first table look-up covers: nearly all codes of photographs

# Standard luminance DC table (ITU-T T.81, K.3): counts of codes of each length, symbols 0 to 11 in order.
_STANDARD_DC = np.array([0, 1, 5, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0], np.uint8)


@kernel
def _build(counts, symbols, fast, most, first, offset, codes, sizes):
    """Decoding and encoding tables of one Huffman table; False if it is no prefix code."""
    fast[:] = 0
    sizes[:] = 0
    code = 0
    k = 0
    for length in range(1, 17):
        first[length] = code
        offset[length] = k
        for _ in range(counts[length - 1]):
            if code >= (1 << length):
                return False
            symbol = symbols[k]
            codes[symbol], sizes[symbol] = code, length
            if length <= _FAST:
                for i in range(1 << (_FAST - length)):
                    fast[(code << (_FAST - length)) | i] = (length << 8) | symbol
            code += 1
            k += 1
        if code >= (1 << length):  # too many codes, or one of all ones, which JPEG does not allow
            return False
        most[length] = code - 1 if counts[length - 1] else -1
        code <<= 1
    return True


@kernel
def _tables(data, info, fast, most, first, offset, codes, sizes, symbols, present):
    """Read all DHT segments up to the scan; tables 0-3 are DC, 4-7 AC."""
    at = 2
    while at < info[jpeg.SCAN_HEADER_AT]:
        if data[at + 1] == 0xFF:
            at += 1
            continue
        length = (np.int64(data[at + 2]) << 8) | np.int64(data[at + 3])
        if data[at + 1] == 0xC4:
            p, end = at + 4, at + 2 + length
            while p < end:
                if p + 17 > end:
                    return BAD_TABLE
                kind, number = data[p] >> 4, data[p] & 15
                if kind > 1 or number > 3:
                    return BAD_TABLE
                t = kind * 4 + number
                total = 0
                for i in range(16):
                    total += np.int64(data[p + 1 + i])
                if total > 256 or p + 17 + total > end:
                    return BAD_TABLE
                symbols[t, :total] = data[p + 17 : p + 17 + total]
                if not _build(
                    data[p + 1 : p + 17],
                    symbols[t],
                    fast[t],
                    most[t],
                    first[t],
                    offset[t],
                    codes[t],
                    sizes[t],
                ):
                    return BAD_TABLE
                present[t] = 1
                p += 17 + total
        at += 2 + length
    return OK


@kernel
def add_restarts(data, info, interval, out, lengths, result):
    """Write the JPEG ``data`` again with a restart marker every ``interval`` MCUs.

    ``out`` gets the entropy-coded data up to and with EOI; ``lengths`` (segments,) int64 the bytes of each segment with
    the marker that ends it; ``result`` (2,) int64 the bytes written, and a bit mask of the DC tables (by id) that must be
    replaced by the standard table in the header, because the original lacks codes for the new differences. Returns OK or
    what is wrong. ``interval`` must divide the MCUs of a row.
    """
    n = data.size
    count = info[jpeg.COMPONENTS]
    if info[jpeg.FRAME] > 0xC1 or info[jpeg.PRECISION] != 8 or info[jpeg.SCAN_COMPONENTS] != count:
        return UNSUPPORTED
    if info[jpeg.SUCCESSIVE] != 63 << 8:
        return UNSUPPORTED
    fast = np.zeros((8, 1 << _FAST), np.int16)  # length << 8 | symbol, 0: a longer code
    most, first, offset = (
        np.zeros((8, 17), np.int64),
        np.zeros((8, 17), np.int64),
        np.zeros((8, 17), np.int64),
    )
    codes, sizes = np.zeros((8, 256), np.int64), np.zeros((8, 256), np.int64)
    symbols, present = np.zeros((8, 256), np.uint8), np.zeros(8, np.uint8)
    status = _tables(data, info, fast, most, first, offset, codes, sizes, symbols, present)
    if status != OK:
        return status
    # Which component and tables each block of an MCU belongs to.
    blocks = info[jpeg.BLOCKS]
    component, dc_table, ac_table = (
        np.zeros(blocks, np.int64),
        np.zeros(blocks, np.int64),
        np.zeros(blocks, np.int64),
    )
    scan = info[jpeg.SCAN_HEADER_AT] + 5
    b = 0
    replace = np.int64(0)
    for i in range(count):
        if data[scan + 2 * i] != info[jpeg.IDS + i]:
            return UNSUPPORTED
        td, ta = np.int64(data[scan + 2 * i + 1] >> 4), np.int64(data[scan + 2 * i + 1] & 15)
        if td > 3 or ta > 3:
            return BAD_TABLE
        if not present[td] or not present[4 + ta]:
            return (
                UNSUPPORTED  # frames of motion JPEG leave the standard tables out, and decoders fill them in
            )
        for size in range(12):
            if sizes[td, size] == 0:
                replace |= np.int64(1) << td
        sampling = info[jpeg.SAMPLING + i]
        for _ in range(1 if count == 1 else (sampling >> 4) * (sampling & 15)):
            if b == blocks:
                return UNSUPPORTED
            component[b], dc_table[b], ac_table[b] = i, td, 4 + ta
            b += 1
    write_codes, write_sizes = codes[:4].copy(), sizes[:4].copy()
    for t in range(4):
        if replace >> t & 1:
            code, k = 0, 0
            for length in range(1, 17):
                for _ in range(_STANDARD_DC[length - 1]):
                    write_codes[t, k], write_sizes[t, k] = code, length
                    code += 1
                    k += 1
                code <<= 1

    lookup = fast.reshape(-1)
    total = info[jpeg.MCUS_X] * info[jpeg.MCUS_Y]
    old = info[jpeg.INTERVAL]
    at = info[jpeg.SCAN_AT]
    bits, have = np.uint64(0), np.int64(0)  # unread bits, left-aligned, and how many
    spare = np.int64(0)  # zero bits invented behind the end of the data
    acc, held = np.uint64(0), np.int64(0)  # bits to write, right-aligned, fewer than 32
    to, began, segment = np.int64(0), np.int64(0), np.int64(0)
    room = out.size - 1024  # a block is at most 64 codes of 26 bits, stuffed
    old_dc, new_dc = np.zeros(4, np.int64), np.zeros(4, np.int64)
    for mcu in range(total):
        if old > 0 and mcu > 0 and mcu % old == 0:
            # Drop the padding of the byte that is being read, and expect the marker.
            if spare > have:
                return OVERRUN
            if have - spare >= 8:
                return BAD_RESTART
            while at + 1 < n and data[at] == 0xFF and data[at + 1] == 0xFF:
                at += 1  # fill bytes, which a marker may have in front
            if at + 2 > n or data[at] != 0xFF or data[at + 1] != 0xD0 + ((mcu // old - 1) & 7):
                return BAD_RESTART
            at += 2
            bits, have, spare = np.uint64(0), np.int64(0), np.int64(0)
            old_dc[:] = 0
        if mcu > 0 and mcu % interval == 0:
            to = _finish(out, to, acc, held)
            acc, held = np.uint64(0), np.int64(0)
            out[to], out[to + 1] = 0xFF, 0xD0 + (segment & 7)
            to += 2
            if to - began > 65535:
                return TOO_LONG
            lengths[segment] = to - began
            began = to
            segment += 1
            new_dc[:] = 0
        for b in range(blocks):
            if to > room:
                return NO_ROOM
            k = np.int64(0)
            while k < 64:
                if have < 32:
                    at, bits, have, spare = _refill(data, at, bits, have, spare)
                t = dc_table[b] if k == 0 else ac_table[b]
                entry = np.int64(lookup[np.uint64(t << _FAST) | (bits >> np.uint64(64 - _FAST))])
                if entry:
                    length, symbol = entry >> 8, entry & 255
                else:
                    length, symbol = np.int64(_FAST + 1), np.int64(-1)
                    while length <= 16:
                        code = np.int64(bits >> np.uint64(64 - length))
                        if code <= most[t, length] and code >= first[t, length]:
                            symbol = np.int64(symbols[t, offset[t, length] + code - first[t, length]])
                            break
                        length += 1
                    if symbol < 0:
                        return BAD_CODE
                extra = symbol & 15
                width = length + extra
                if k == 0:
                    if symbol > 11:
                        return BAD_CODE
                    c = component[b]
                    value = np.int64((bits << np.uint64(length)) >> np.uint64(32)) >> (32 - extra)
                    bits <<= np.uint64(width)
                    have -= width
                    if extra and value < (1 << (extra - 1)):
                        value -= (1 << extra) - 1
                    old_dc[c] += value
                    difference = old_dc[c] - new_dc[c]
                    new_dc[c] = old_dc[c]
                    magnitude = abs(difference)
                    size = 0
                    while magnitude >> size:
                        size += 1
                    if size > 11:
                        return BAD_CODE
                    if difference < 0:
                        difference += (1 << size) - 1
                    word = (np.uint64(write_codes[t, size]) << np.uint64(size)) | np.uint64(difference)
                    width = write_sizes[t, size] + size
                    k = 1
                else:
                    word = bits >> np.uint64(64 - width)
                    bits <<= np.uint64(width)
                    have -= width
                    if extra == 0:
                        k = 64 if symbol != 0xF0 else k + 16
                    else:
                        k += (symbol >> 4) + 1
                        if k > 64:
                            return BAD_CODE
                acc = (acc << np.uint64(width)) | word
                held += width
                if held >= 32:
                    held -= 32
                    to = _emit(out, to, np.uint32(acc >> np.uint64(held)))
            if spare > have:
                return OVERRUN
    to = _finish(out, to, acc, held)
    out[to], out[to + 1] = 0xFF, 0xD9
    to += 2
    if to - began > 65535:
        return TOO_LONG
    lengths[segment] = to - began
    result[0], result[1] = to, replace
    return OK


@kernel
def _refill(data, at, bits, have, spare):
    """At least 32 unread bits; stuffing removed, zeros behind the end or in front of a marker."""
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
def _emit(out, to, word):
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
def _finish(out, to, acc, held):
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


def standard_dc_segment(mask: int) -> bytes:
    """A DHT segment that redefines the DC tables whose ids are set in ``mask`` as the standard table."""
    tables = b"".join(
        bytes([t]) + _STANDARD_DC.tobytes() + bytes(range(12)) for t in range(4) if mask >> t & 1
    )
    return b"\xff\xc4" + (2 + len(tables)).to_bytes(2, "big") + tables
