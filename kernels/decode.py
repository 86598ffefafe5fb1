"""Decode what a crop needs of a baseline JPEG, straight from the stored bytes, into planes.

Only the restart segments under a window of MCUs are read, wherever the restart index says they are (without an index:
all that come before the window's end). Each plane is decoded at full size, 1/2, 1/4 or 1/8 of it. Supported is what
``convert`` writes and more: baseline Huffman, 8 bits, grey or YCbCr with 4:4:4, 4:2:2, 4:4:0 or 4:2:0 chroma, any restart
interval; the rest is UNSUPPORTED, for the caller to decode otherwise. No byte of the data is trusted.

>>> work = new_work(); status = read_header(data, work.tables, work.header)
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fastload.kernels import huffman, idct, jpeg, restart
from fastload.kernels.huffman import PAD, Tables, decode_block, find_slot, new_tables, unstuff
from fastload.kernels.memory import address, part, store_u8, store_u16, zero_block

OK, NOT_JPEG, TRUNCATED, BAD_FRAME = jpeg.OK, jpeg.NOT_JPEG, jpeg.TRUNCATED, jpeg.BAD_FRAME
BAD_INDEX, BAD_MARKER = jpeg.BAD_INDEX, jpeg.BAD_MARKER
BAD_TABLE, BAD_CODE, OVERRUN, NO_ROOM = restart.BAD_TABLE, restart.BAD_CODE, restart.OVERRUN, restart.NO_ROOM
UNSUPPORTED = restart.UNSUPPORTED
TOO_MUCH = 20
REASONS = {
    **restart.REASONS,
    **jpeg.REASONS,
    TOO_MUCH: "the JPEG's image data are damaged: they go on where a restart segment should end",
}

# Places in a row of Header.component.
H, V, QUANT, DC, AC, WIDTH, HEIGHT = range(7)
_CHUNK = 8  # MCUs whose coefficients are decoded before they are transformed
_MOST_BLOCKS = 6  # blocks in an MCU of 4:2:0


class Header(NamedTuple):
    """What decoding needs of a header."""

    info: np.ndarray  # (jpeg.INFO_SIZE,) int64
    component: np.ndarray  # (3, 7) int64: sampling, quantisation table, slots of Huffman tables, samples
    quant: np.ndarray  # (4, 64) int16, in the order of the block
    present: np.ndarray  # (12,) int64: slots by table id, DC 0-3, AC 4-7; 1 for each quantisation table 8-11


class Work(NamedTuple):
    """Memory of one thread."""

    tables: Tables
    header: Header
    coefficients: np.ndarray  # (_CHUNK * 6 + 1, 64) int16
    jobs: (
        np.ndarray
    )  # (4, _CHUNK * 6 + 1, 4) int64: block, quantisation table, first column, bytes between columns


def new_work() -> Work:
    """Memory for a thread's decoding; tables that were built stay in it."""
    blocks = _CHUNK * _MOST_BLOCKS + 1
    return Work(
        new_tables(),
        Header(
            np.zeros(jpeg.INFO_SIZE, np.int64),
            np.zeros((3, 7), np.int64),
            np.zeros((4, 64), np.int16),
            np.zeros(12, np.int64),
        ),
        np.zeros((blocks, 64), np.int16),
        np.zeros((4, blocks, 4), np.int64),
    )


@part
def _read_tables(data, tables, header):
    present = header.present
    for i in range(12):
        present[i] = -1
    at = np.int64(2)
    stop = header.info[jpeg.SCAN_HEADER_AT]
    while at < stop:  # the segments' lengths were checked by parse_into
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        end = at + 2 + ((np.int64(data[at + 2]) << 8) | np.int64(data[at + 3]))
        p = at + 4
        at = end
        if marker == 0xC4:
            while p < end:
                if p + 17 > end:
                    return BAD_TABLE
                kind, number = np.int64(data[p] >> 4), np.int64(data[p] & 15)
                if kind > 1 or number > 3:
                    return BAD_TABLE
                size = np.int64(0)
                for i in range(1, 17):
                    size += np.int64(data[p + i])
                if size > 256 or p + 17 + size > end:
                    return BAD_TABLE
                taken = np.int64(0)
                for i in range(4):
                    if i != number and present[4 * kind + i] >= 0:
                        taken |= np.int64(1) << present[4 * kind + i]
                slot = find_slot(tables, kind, data, p + 1, size, taken)
                if slot < 0:
                    return BAD_TABLE
                present[4 * kind + number] = slot
                p += 17 + size
        elif marker == 0xDB:
            while p < end:
                wide, number = np.int64(data[p] >> 4), np.int64(data[p] & 15)
                if wide > 1 or number > 3 or p + 1 + (64 << wide) > end:
                    return BAD_TABLE
                p += 1
                for k in range(64):
                    if wide:
                        value = (np.int64(data[p]) << 8) | np.int64(data[p + 1])
                        p += 2
                    else:
                        value = np.int64(data[p])
                        p += 1
                    header.quant[number, np.int64(tables.zigzag[k])] = np.int16(value)
                present[8 + number] = 1
    return OK


@part
def read_header(data, tables, header):
    """Fill ``header`` from ``data`` (n,) uint8. OK, UNSUPPORTED, or what is wrong."""
    info, component, present = header.info, header.component, header.present
    status = jpeg.parse_into(data, info)
    if status != OK:
        return status
    count = info[jpeg.COMPONENTS]
    if not jpeg.is_simple(info):
        return UNSUPPORTED
    status = _read_tables(data, tables, header)
    if status != OK:
        return status
    scan = info[jpeg.SCAN_HEADER_AT] + 5
    for i in range(count):
        if data[scan + 2 * i] != info[jpeg.IDS + i]:
            return UNSUPPORTED
        selectors = np.int64(data[scan + 2 * i + 1])
        dc, ac = selectors >> 4, selectors & 15
        quant = np.int64(data[info[jpeg.FRAME_AT] + 7 + 3 * i])
        if dc > 3 or ac > 3 or quant > 3:
            return BAD_TABLE
        if present[dc] < 0 or present[4 + ac] < 0:
            return UNSUPPORTED  # frames of motion JPEG leave the standard tables out
        if present[8 + quant] < 0:
            return BAD_TABLE
        h, v = np.int64(1), np.int64(1)
        if count == 3 and i == 0:
            h, v = info[jpeg.SAMPLING] >> 4, info[jpeg.SAMPLING] & 15
        component[i, H], component[i, V], component[i, QUANT] = h, v, quant
        component[i, DC], component[i, AC] = present[dc], present[4 + ac]
        # Samples of the plane: the whole picture's, less by the sampling of the others.
        across, down = info[jpeg.MCU_W] // (8 * h), info[jpeg.MCU_H] // (8 * v)
        component[i, WIDTH] = (info[jpeg.WIDTH] + across - 1) // across
        component[i, HEIGHT] = (info[jpeg.HEIGHT] + down - 1) // down
    return OK


@part
def find_segments(data, info, row0, col0, row1, col1, memory, room, segments):
    """Copy the restart segments that the MCUs [row0, row1) x [col0, col1) need to address ``memory``, without stuffing.

    ``room`` bytes are there; ``segments`` (n, 3) int64 gets the first MCU, and the addresses of the first byte and of the end,
    of each; it has a row for each segment between the first and the last. Returns (status, segments, bytes used).
    """
    base, size = address(data), data.size
    total = info[jpeg.MCUS_X] * info[jpeg.MCUS_Y]
    room -= PAD + 32
    used, found = np.int64(0), np.int64(0)
    if jpeg.can_crop(info):
        interval = info[jpeg.INTERVAL]
        across = info[jpeg.MCUS_X] // interval
        left, right = col0 // interval, (col1 + interval - 1) // interval
        index = info[jpeg.INDEX_AT]
        source = info[jpeg.SCAN_AT]
        for k in range(row0 * across):
            source += np.int64(data[index + 2 * k]) | (np.int64(data[index + 2 * k + 1]) << 8)
        for row in range(row0, row1):
            for col in range(across):
                k = row * across + col
                length = np.int64(data[index + 2 * k]) | (np.int64(data[index + 2 * k + 1]) << 8)
                end = source + length
                if length < 3 or end > size:
                    return np.int64(BAD_INDEX), found, used
                if col == left and not jpeg.follows(data, source, k):
                    return np.int64(BAD_INDEX), found, used
                if left <= col < right:
                    last = (k + 1) * interval == total
                    if data[end - 2] != 0xFF or data[end - 1] != (0xD9 if last else 0xD0 + (k & 7)):
                        return np.int64(BAD_MARKER), found, used
                    count, _, marker = unstuff(base + source, base + end - 2, memory + used, room - used)
                    if count < 0:
                        return np.int64(NO_ROOM), found, used
                    if marker != huffman.NO_MARKER:
                        return np.int64(BAD_MARKER), found, used
                    # One column of segments after the other, so that planes are filled along their columns.
                    place = (col - left) * (row1 - row0) + row - row0
                    segments[place, 0] = k * interval
                    segments[place, 1], segments[place, 2] = memory + used, memory + used + count
                    used += count
                    found += 1
                source = end
    else:
        interval = info[jpeg.INTERVAL] if info[jpeg.INTERVAL] > 0 else total
        first, last = row0 * info[jpeg.MCUS_X] + col0, (row1 - 1) * info[jpeg.MCUS_X] + col1 - 1
        source = base + info[jpeg.SCAN_AT]
        for k in range(last // interval + 1):
            count, at, marker = unstuff(source, base + size, memory + used, room - used)
            if count < 0:
                return np.int64(NO_ROOM), found, used
            if (k + 1) * interval < total:
                if marker != 0xD0 + (k & 7):
                    return np.int64(BAD_MARKER if marker >= 0 else OVERRUN), found, used
                source = at + 2
            elif marker != 0xD9:
                return np.int64(BAD_MARKER if marker >= 0 else jpeg.TRUNCATED), found, used
            if (k + 1) * interval > first:
                segments[found, 0] = k * interval
                segments[found, 1], segments[found, 2] = memory + used, memory + used + count
                used += count
                found += 1
    for i in range(PAD):
        store_u8(memory + used + i, 0)
    return np.int64(OK), found, used


@part
def _transform_jobs(jobs, counts):
    """Inverse DCT of the jobs that were collected, two at a time."""
    for kind in range(4):
        count = counts[kind]
        for a in range(0, count, 2):
            b = min(a + 1, count - 1)
            block_a, block_b = jobs[kind, a, 0], jobs[kind, b, 0]
            quant_a, quant_b = jobs[kind, a, 1], jobs[kind, b, 1]
            out_a, out_b = jobs[kind, a, 2], jobs[kind, b, 2]
            step_a, step_b = jobs[kind, a, 3], jobs[kind, b, 3]
            if kind == 0:
                idct.full(block_a, block_b, quant_a, quant_b, out_a, out_b, step_a, step_b)
            elif kind == 1:
                idct.sparse(block_a, block_b, quant_a, quant_b, out_a, out_b, step_a, step_b)
            elif kind == 2:
                idct.half(block_a, block_b, quant_a, quant_b, out_a, out_b, step_a, step_b)
            else:
                idct.quarter(block_a, block_b, quant_a, quant_b, out_a, out_b, step_a, step_b)
        counts[kind] = 0


@part
def decode_segments(work, segments, found, row0, col0, row1, col1, planes):
    """Decode the MCUs [row0, row1) x [col0, col1) into planes whose samples lie transposed: column after column.

    ``planes`` (components, 3) int64: the address of the plane, the bytes from column to column, and the logarithm of its
    reduction (0 to 3). A plane has all samples of the MCUs. Returns OK, BAD_CODE, OVERRUN or TOO_MUCH.
    """
    tables, header, jobs = work.tables, work.header, work.jobs
    info, component = header.info, header.component
    interval = info[jpeg.INTERVAL] if info[jpeg.INTERVAL] > 0 else info[jpeg.MCUS_X] * info[jpeg.MCUS_Y]
    mcus_x, blocks = info[jpeg.MCUS_X], info[jpeg.BLOCKS]
    zigzag, memory = address(tables.zigzag), address(work.coefficients)
    last_mcu = (row1 - 1) * mcus_x + col1 - 1
    owner = np.zeros(_MOST_BLOCKS, np.int64)
    # For each block of an MCU the addresses of its tables, of its first sample in the MCU at (row0, col0), and so on.
    setup = np.zeros((_MOST_BLOCKS, 12), np.int64)
    predicted = np.zeros(3, np.int64)
    counts = np.zeros(4, np.int64)
    b = 0
    for c in range(info[jpeg.COMPONENTS]):
        edge = 8 >> planes[c, 2]
        dc, ac = component[c, DC], component[c, AC]
        for y in range(component[c, V]):
            for x in range(component[c, H]):
                owner[b] = c
                setup[b, 0] = address(tables.dc[dc])
                setup[b, 1] = address(tables.long[0, dc])
                setup[b, 2] = address(tables.keys[0, dc, 16:])
                setup[b, 3] = address(tables.ac[ac])
                setup[b, 4] = address(tables.long[1, ac])
                setup[b, 5] = address(tables.keys[1, ac, 16:])
                setup[b, 6] = address(header.quant[component[c, QUANT]])
                setup[b, 7] = planes[c, 0] + x * edge * planes[c, 1] + y * edge
                setup[b, 8] = planes[c, 1]
                setup[b, 9] = component[c, H] * edge * planes[c, 1]  # from MCU to MCU along a row
                setup[b, 10] = component[c, V] * edge  # along a column
                setup[b, 11] = planes[c, 2]
                b += 1
    for s in range(found):
        at, stop = segments[s, 1], segments[s, 2] * 8
        bits, have = np.uint64(0), np.int64(0)
        predicted[:] = 0
        mcu = segments[s, 0]
        complete = min(mcu + interval, info[jpeg.MCUS_X] * info[jpeg.MCUS_Y])
        behind = min(complete, last_mcu + 1)
        row, col = mcu // mcus_x, mcu % mcus_x
        while mcu < behind:
            block = memory
            for _ in range(min(behind - mcu, _CHUNK)):
                inside = row0 <= row and col0 <= col < col1
                for b in range(blocks):
                    zero_block(block)
                    at, bits, have, difference, last = decode_block(
                        at,
                        bits,
                        have,
                        setup[b, 0],
                        setup[b, 1],
                        setup[b, 2],
                        setup[b, 3],
                        setup[b, 4],
                        setup[b, 5],
                        block,
                        zigzag,
                    )
                    if last < 0:
                        return BAD_CODE
                    if at * 8 - have > stop:
                        return OVERRUN
                    c = owner[b]
                    dc = predicted[c] + difference
                    predicted[c] = dc
                    if inside:
                        store_u16(block, dc)
                        out = setup[b, 7] + (col - col0) * setup[b, 9] + (row - row0) * setup[b, 10]
                        kind = setup[b, 11]
                        if kind == 3 or (kind == 0 and last == 0):
                            value = np.int64(np.int16(dc * header.quant[component[c, QUANT], 0]))
                            level = min(max((value + 4 >> 3) + 128, 0), 255)
                            if kind == 3:
                                store_u8(out, level)
                            else:
                                idct.fill8(out, setup[b, 8], level)
                        else:
                            if kind > 0:
                                kind += 1
                            elif last < 10:
                                kind = 1
                            n = counts[kind]
                            jobs[kind, n, 0], jobs[kind, n, 1] = block, setup[b, 6]
                            jobs[kind, n, 2], jobs[kind, n, 3] = out, setup[b, 8]
                            counts[kind] = n + 1
                            block += 128
                mcu += 1
                col += 1
                if col == mcus_x:
                    row, col = row + 1, 0
            _transform_jobs(jobs, counts)
        if mcu == complete and stop - (at * 8 - have) > 7:  # more than the padding of the last byte
            return TOO_MUCH
    return OK
