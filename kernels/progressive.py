"""The coefficients of a progressive JPEG: all scans decoded, nothing dequantised, so that they can be stored another way.

A progressive file sends its coefficients in many scans, by frequency band and bit by bit, and can be decoded only as a whole.
:mod:`fastload.kernels.baseline` writes the same coefficients as a baseline JPEG whose crops decode alone. The trade-off: all
coefficients of a picture are in memory at once, two bytes each, as in any decoder of such files.

Only what is complete is read: every coefficient must be known to its last bit when the file ends. Decoders smooth an incomplete
picture, which no other file would show alike. No byte is trusted: what is written goes to blocks that the frame header counts, and
the work is bounded by :data:`MOST_VISITS`.

>>> blocks = layout(info, grid); read_coefficients(data, info, np.zeros((blocks, 64), np.int16))
"""

from __future__ import annotations

import numpy as np

from fastload.kernels import bitio, jpeg
from fastload.kernels.jit import kernel
from fastload.kernels.memory import part
from fastload.kernels.restart import BAD_CODE, BAD_RESTART, BAD_TABLE, NO_ROOM, OK, OVERRUN, UNSUPPORTED

STRAY, BAD_QUANTISER = 18, 19
REASONS = {
    STRAY: "there are stray bytes between the segments of the JPEG",
    BAD_QUANTISER: "a quantisation table of the JPEG is damaged or missing",
}
# Scans that visit each block more often than this are an attack on time: common encoders need about 6.
MOST_VISITS = 64

# Columns of a grid, one row a component: blocks across and down that are coded when the component stands alone; the first block and
# the blocks in a row of the coefficients, padded to whole MCUs; blocks of an MCU across and down.
ACROSS, DOWN, START, STRIDE, WIDE, HIGH = range(6)
GRID = (4, 6)


@kernel
def layout(info, grid):
    """Fill ``grid`` GRID int64 from a parsed header; returns the number of blocks of all components."""
    count = info[jpeg.COMPONENTS]
    start = np.int64(0)
    for c in range(count):
        wide, high = info[jpeg.SAMPLING + c] >> 4, info[jpeg.SAMPLING + c] & 15
        if count == 1:
            wide, high = np.int64(1), np.int64(1)
        # The component's size in samples, rounded up, then in blocks.
        width = (info[jpeg.WIDTH] * wide * 8 + info[jpeg.MCU_W] - 1) // info[jpeg.MCU_W]
        height = (info[jpeg.HEIGHT] * high * 8 + info[jpeg.MCU_H] - 1) // info[jpeg.MCU_H]
        grid[c, ACROSS], grid[c, DOWN] = (width + 7) // 8, (height + 7) // 8
        grid[c, START], grid[c, STRIDE] = start, info[jpeg.MCUS_X] * wide
        grid[c, WIDE], grid[c, HIGH] = wide, high
        start += info[jpeg.MCUS_X] * wide * info[jpeg.MCUS_Y] * high
    return start


@kernel
def read_coefficients(data, info, grid, coefficients):
    """Decode all scans of the JPEG ``data`` (n,) uint8, for which ``info`` and ``grid`` were filled.

    ``coefficients`` (blocks, 64) int16, all 0, gets the quantised values in stream order (zigzag), block by block in rows of each
    component's grid. Returns OK, UNSUPPORTED (no complete progressive JPEG of 8 bits) or what is wrong.
    """
    count = info[jpeg.COMPONENTS]
    if info[jpeg.FRAME] != 0xC2 or info[jpeg.PRECISION] != 8:
        return UNSUPPORTED
    blocks = np.int64(0)
    for c in range(count):
        blocks += grid[c, STRIDE] * info[jpeg.MCUS_Y] * grid[c, HIGH]
    if coefficients.shape[0] != blocks:
        return NO_ROOM
    fast = np.zeros((8, 1 << bitio.FAST), np.int16)
    most, first = np.zeros((8, 17), np.int64), np.zeros((8, 17), np.int64)
    offset = np.zeros((8, 17), np.int64)
    codes, sizes = np.zeros((8, 256), np.int64), np.zeros((8, 256), np.int64)
    symbols, present = np.zeros((8, 256), np.uint8), np.zeros(8, np.uint8)
    known = np.full((4, 64), -1, np.int64)  # the lowest bit that is known of each coefficient, -1: none
    alone = np.zeros(4, np.uint8)  # its DC values came without those of its padding
    scan = np.zeros(SCAN_SIZE, np.int64)
    interval, work, quantisers = np.int64(0), np.int64(0), np.int64(0)
    at, n = np.int64(2), data.size
    while True:
        if at + 2 > n:
            return OVERRUN
        if data[at] != 0xFF:
            return STRAY
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker == 0xD9:
            break
        if (
            marker < 0xC0
            or 0xD0 <= marker <= 0xD8
            or (marker >= 0xDE and marker != 0xFE and marker >> 4 != 0xE)
        ):
            return STRAY  # markers without a length, or reserved ones, which decoders refuse
        if at + 4 > n:
            return OVERRUN
        length = (np.int64(data[at + 2]) << 8) | np.int64(data[at + 3])
        if length < 2 or at + 2 + length > n:
            return OVERRUN
        behind = at > info[jpeg.SCAN_HEADER_AT]
        if marker == 0xC4:
            if not bitio.read_tables(
                data, at + 4, at + 2 + length, fast, most, first, offset, codes, sizes, symbols, present
            ):
                return BAD_TABLE
        elif marker == 0xDD:
            if length != 4:
                return UNSUPPORTED
            interval = (np.int64(data[at + 4]) << 8) | np.int64(data[at + 5])
        elif marker == 0xDC or (behind and (marker == 0xDB or 0xC0 <= marker <= 0xCF)):
            return UNSUPPORTED  # a height that comes later, other tables for later scans, a second frame
        elif marker == 0xDB:
            found = _quantisers(data, at + 4, at + 2 + length)
            if found < 0:
                return BAD_QUANTISER
            quantisers |= found
        at += 2 + length
        if marker == 0xDA:
            status = _read_header(data, at - length, length, info, scan, known, present)
            if status != OK:
                return status
            chosen = scan[COMPONENT]
            many = scan[COUNT] > 1
            visits = blocks if many else grid[chosen, ACROSS] * grid[chosen, DOWN]
            work += visits
            if work > MOST_VISITS * blocks:
                return UNSUPPORTED
            if scan[FIRST] == 0 and count > 1 and not many:
                alone[chosen] = 1
            at = _read_scan(
                data, at, info, interval, grid, scan, fast, most, first, offset, symbols, coefficients
            )
            if at < 0:
                return -at
    for c in range(count):
        number = np.int64(data[info[jpeg.FRAME_AT] + 7 + 3 * c])
        if number > 3 or not quantisers >> number & 1:
            return BAD_QUANTISER
        for k in range(64):
            if known[c, k] != 0:
                return UNSUPPORTED
        if alone[c]:
            _pad(coefficients, grid[c], info[jpeg.MCUS_Y] * grid[c, HIGH])
    return OK


@part
def _quantisers(data, at, end):
    """Bits of the numbers of the tables in the body ``data[at:end]`` of a DQT segment, -1 if it is damaged."""
    found = np.int64(0)
    while at < end:
        precision, number = np.int64(data[at] >> 4), np.int64(data[at] & 15)
        at += 65 + 64 * precision
        if precision > 1 or number > 3 or at > end:
            return np.int64(-1)
        found |= np.int64(1) << number
    return found


# Places in a scan: number of components, first and last coefficient, the bit known before and after it; then for each component its
# number, DC and AC table.
COUNT, FIRST, LAST, BEFORE, AFTER, COMPONENT, DC_TABLE, AC_TABLE = 0, 1, 2, 3, 4, 5, 9, 13
SCAN_SIZE = 17


@part
def _read_header(data, at, length, info, scan, known, present):
    """Fill ``scan`` from the scan header whose length bytes end at ``at + 2``; ``known`` is brought up to date."""
    body = at + 2
    count = np.int64(data[body]) if length > 2 else np.int64(0)
    if count < 1 or count > info[jpeg.COMPONENTS] or length != 6 + 2 * count:
        return UNSUPPORTED
    end = body + 1 + 2 * count
    first, last = np.int64(data[end]), np.int64(data[end + 1])
    before, after = np.int64(data[end + 2] >> 4), np.int64(data[end + 2] & 15)
    if first > last or last > 63 or (first == 0 and last > 0) or (first > 0 and count > 1):
        return UNSUPPORTED
    if after > 13 or (before > 0 and before != after + 1):
        return UNSUPPORTED
    scan[COUNT], scan[FIRST], scan[LAST], scan[BEFORE], scan[AFTER] = count, first, last, before, after
    c = np.int64(0)
    for i in range(count):
        while c < info[jpeg.COMPONENTS] and info[jpeg.IDS + c] != data[body + 1 + 2 * i]:
            c += 1
        if c == info[jpeg.COMPONENTS]:  # not there, there twice, or in another order than in the frame
            return UNSUPPORTED
        tables = data[body + 2 + 2 * i]
        dc, ac = np.int64(tables >> 4), np.int64(tables & 15)
        if dc > 3 or ac > 3:
            return BAD_TABLE
        if (first == 0 and before == 0 and not present[dc]) or (first > 0 and not present[4 + ac]):
            return UNSUPPORTED
        scan[COMPONENT + i], scan[DC_TABLE + i], scan[AC_TABLE + i] = c, dc, 4 + ac
        if first > 0 and known[c, 0] < 0:
            return UNSUPPORTED
        for k in range(first, last + 1):
            if known[c, k] != (before if before > 0 else -1):
                return UNSUPPORTED
            known[c, k] = after
        c += 1
    return OK


@part
def _read_scan(data, at, info, interval, grid, scan, fast, most, first, offset, symbols, coefficients):
    """Decode one scan whose data begin at ``at``; returns the place behind them, or minus what is wrong."""
    n = data.size
    start, last, refine, low = scan[FIRST], scan[LAST], scan[BEFORE] > 0, scan[AFTER]
    one, many = np.int64(1) << low, scan[COUNT] > 1
    c = scan[COMPONENT]
    across, down = info[jpeg.MCUS_X], info[jpeg.MCUS_Y]
    if not many:
        across, down = grid[c, ACROSS], grid[c, DOWN]
    bits, have, spare = np.uint64(0), np.int64(0), np.int64(0)
    run = np.int64(0)  # blocks whose band has ended, this one included
    dc = np.zeros(4, np.int64)
    # AC scans have one component and so one table. Views of it are made once: each costs as much as a symbol.
    t = scan[AC_TABLE]
    ac_fast, ac_most, ac_first, ac_offset, ac_symbols = fast[t], most[t], first[t], offset[t], symbols[t]
    for mcu in range(across * down):
        if interval > 0 and mcu > 0 and mcu % interval == 0:
            if have - spare >= 8:
                return -BAD_RESTART
            while at + 1 < n and data[at] == 0xFF and data[at + 1] == 0xFF:
                at += 1  # fill bytes, which a marker may have in front
            if at + 2 > n or data[at] != 0xFF or data[at + 1] != 0xD0 + ((mcu // interval - 1) & 7):
                return -BAD_RESTART
            at += 2
            bits, have, spare, run = np.uint64(0), np.int64(0), np.int64(0), np.int64(0)
            dc[:] = 0
        row, column = mcu // across, mcu % across
        for i in range(scan[COUNT]):
            c = scan[COMPONENT + i]
            wide, high = (grid[c, WIDE], grid[c, HIGH]) if many else (np.int64(1), np.int64(1))
            for j in range(wide * high):
                b = grid[c, START] + (row * high + j // wide) * grid[c, STRIDE] + column * wide + j % wide
                if have < 32:
                    at, bits, have, spare = bitio.refill(data, at, bits, have, spare)
                if start == 0 and refine:
                    if bits >> np.uint64(63):
                        coefficients[b, 0] |= one
                    bits <<= np.uint64(1)
                    have -= 1
                elif start == 0:
                    t = scan[DC_TABLE + i]
                    entry = bitio.next_symbol(bits, fast[t], most[t], first[t], offset[t], symbols[t])
                    length, size = entry >> 8, entry & 255
                    if entry == 0:
                        return -BAD_CODE
                    if size > 11:
                        return -UNSUPPORTED
                    bits <<= np.uint64(length)
                    dc[c] += bitio.extend(bitio.peek(bits, size), size)
                    bits <<= np.uint64(size)
                    have -= length + size
                    if abs(dc[c]) > 32767 >> low:
                        return -UNSUPPORTED
                    coefficients[b, 0] = dc[c] * one
                elif not refine:
                    if run > 0:
                        run -= 1
                        continue
                    at, bits, have, spare, run = _band(
                        data, at, bits, have, spare, start, last, low,
                        ac_fast, ac_most, ac_first, ac_offset, ac_symbols, coefficients, b,
                    )  # fmt: skip
                else:
                    at, bits, have, spare, run = _refine_band(
                        data, at, bits, have, spare, run, start, last, one,
                        ac_fast, ac_most, ac_first, ac_offset, ac_symbols, coefficients, b,
                    )  # fmt: skip
                if run < 0:
                    return run
                if spare > have:
                    return -OVERRUN
    return at if have - spare < 8 else np.int64(-STRAY)


@part
def _band(data, at, bits, have, spare, k, last, low, fast, most, first, offset, symbols, coefficients, b):
    """First bits of coefficients ``k`` to ``last`` of one block; the last value returned is how many blocks after this one have an
    empty band, or minus what is wrong."""
    while k <= last:
        if have < 32:
            at, bits, have, spare = bitio.refill(data, at, bits, have, spare)
        entry = bitio.next_symbol(bits, fast, most, first, offset, symbols)
        if entry == 0:
            return at, bits, have, spare, np.int64(-BAD_CODE)
        length, zeros, size = entry >> 8, (entry >> 4) & 15, entry & 15
        bits <<= np.uint64(length)
        if size == 0 and zeros < 15:
            run = (np.int64(1) << zeros) - 1 + bitio.peek(bits, zeros)
            bits <<= np.uint64(zeros)
            return at, bits, have - length - zeros, spare, run
        value = bitio.extend(bitio.peek(bits, size), size)
        bits <<= np.uint64(size)
        have -= length + size
        k += zeros
        if size > 0:
            if k > last:
                return at, bits, have, spare, np.int64(-BAD_CODE)
            if abs(value) > 32767 >> low:
                return at, bits, have, spare, np.int64(-UNSUPPORTED)
            coefficients[b, k] = value * (1 << low)
        k += 1
    return at, bits, have, spare, np.int64(0)


@part
def _refine_band(
    data, at, bits, have, spare, run, k, last, one, fast, most, first, offset, symbols, coefficients, b
):
    """One more bit, of value ``one``, for coefficients ``k`` to ``last`` of one block, of which ``run`` says whether it holds new
    ones; the last value returned is the run for the next block, or minus what is wrong."""
    while k <= last:
        value, zeros = np.int64(0), np.int64(64)  # at the end of a band only what is there gets its bit
        if run == 0:
            if have < 32:
                at, bits, have, spare = bitio.refill(data, at, bits, have, spare)
            entry = bitio.next_symbol(bits, fast, most, first, offset, symbols)
            if entry == 0:
                return at, bits, have, spare, np.int64(-BAD_CODE)
            length, zeros, size = entry >> 8, (entry >> 4) & 15, entry & 15
            bits <<= np.uint64(length)
            have -= length
            if size > 1:
                return at, bits, have, spare, np.int64(-BAD_CODE)
            if size == 1:
                value = one if bits >> np.uint64(63) else -one
                bits <<= np.uint64(1)
                have -= 1
            elif zeros < 15:
                run = (np.int64(1) << zeros) + bitio.peek(bits, zeros)
                bits <<= np.uint64(zeros)
                have -= zeros
                zeros = np.int64(64)
        # Up to the place of the new value: a bit for each coefficient that is not 0, and as many zeros as the symbol says.
        while k <= last:
            old = np.int64(coefficients[b, k])
            if old == 0:
                if zeros == 0:
                    break
                zeros -= 1
            else:
                if have < 1:
                    at, bits, have, spare = bitio.refill(data, at, bits, have, spare)
                if bits >> np.uint64(63) and old & one == 0:
                    coefficients[b, k] = old + (one if old > 0 else -one)
                bits <<= np.uint64(1)
                have -= 1
            k += 1
        if value != 0:
            if k > last:
                return at, bits, have, spare, np.int64(-BAD_CODE)
            coefficients[b, k] = value
        k += 1
    return at, bits, have, spare, run - 1 if run > 0 else run


@part
def _pad(coefficients, row, down):
    """Give blocks that only fill up MCUs the DC value beside them (above them): it costs least, and is never seen."""
    for y in range(down):
        for x in range(row[STRIDE]):
            if x >= row[ACROSS] or y >= row[DOWN]:
                b = row[START] + y * row[STRIDE] + x
                coefficients[b, 0] = coefficients[b - 1 if x >= row[ACROSS] else b - row[STRIDE], 0]
