"""Crop stored pixels: resize a window straight from the mapped file, with the arithmetic of :mod:`fastload.kernels.planes`.

Rows are blended along their length first. Where the processor permutes bytes (:mod:`fastload.kernels.permute`), into a ring of lines
that stays in the first-level cache; elsewhere, and for steps that are too wide, blocks of 32 rows are transposed for it. Both are the same 16-bit fixed
point. The trade-off: up to 31 bytes behind the last pixel are read (and thrown away), which the caller must have.

>>> status = crop_pixels(address(file) + start, height, width, box, clip, flips, out, scratch, need)  # inside of a kernel
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastload.kernels import permute, restart
from fastload.kernels.memory import (
    address,
    copy_bytes,
    load_u8,
    load_u16,
    part,
    prefetch,
    reverse16,
    store_u8,
    store_u16,
)
from fastload.kernels.planes import (
    LANES,
    MOST_TAPS,
    blend_words,
    round_words,
    transpose16,
    transpose_bytes,
    triangle,
)

OK, UNSUPPORTED = restart.OK, restart.UNSUPPORTED
MORE_SCRATCH, BAD_BOX = 32, 33
OVERREAD = LANES  # bytes behind the pixels that may be read
_NOT_DONE = -1
# Rows that are asked for before their turn: a mapped file is rarely in the cache, and each row of a picture in another page.
_AHEAD = 4


@part
def valid_box(box, clip, height, width):
    """Whether the box is a window with finite sides, and the clip lies inside of the picture."""
    return (
        0 <= clip[0] < clip[2] <= height
        and 0 <= clip[1] < clip[3] <= width
        and box[0] < box[2]
        and box[1] < box[3]
        and abs(box[0]) + abs(box[1]) + abs(box[2]) + abs(box[3]) < 1e9
    )


@part
def _copy(source, stride, out, flips):
    """Copy a window of the output's size: ``source`` is the address of its first pixel."""
    rows, columns = out.shape[0], out.shape[1]
    for i in range(rows):
        row = source + stride * i
        to = address(out[rows - 1 - i] if flips & 2 else out[i])
        if not flips & 1:
            copy_bytes(row, to, 3 * columns)
            continue
        j = 0
        while j + 16 <= columns:
            reverse16(row + 3 * j, to + 3 * (columns - j - 16))
            j += 16
        while j < columns:
            for c in range(3):
                store_u8(to + 3 * (columns - 1 - j) + c, load_u8(row + 3 * j + c))
            j += 1


@part
def _turned(source, stride, count, samples, first, low, at, taps, spare, turned, result, lines, line):
    """Blend ``count`` <= LANES rows of ``samples`` bytes, which begin at pixel ``low``, into ``lines`` of ``line`` bytes.

    ``at`` is the address of the weights; ``spare``, ``turned`` and ``result`` are memory.
    """
    columns = first.size
    for half in range(0, count, 16):
        rows, step = source + half * stride, stride
        if count - half < 16:  # behind the last row there may be nothing
            rows, step = spare, samples + 16
            for j in range(count - half):
                copy_bytes(source + (half + j) * stride, spare + j * step, samples)
        for x in range(0, samples, 16):
            transpose_bytes(rows + x, step, turned + 2 * LANES * x + 2 * half, 2 * LANES)
    for x in range(columns):
        # A pixel's three channels of 32 rows lie behind one another.
        from_ = turned + (first[x] - low) * 6 * LANES
        blend_words(from_, 6 * LANES, taps, at + 2 * x, 2 * columns, 3, result + 6 * LANES * x)
    for half in range(0, count, 16):
        for x in range(0, 3 * columns, 16):
            transpose16(result + 2 * LANES * x + 2 * half, 2 * LANES, lines + half * line + 2 * x, line)


@part
def _in_blocks(source, width, first_y, at_y, taps_y, first_x, at_x, taps_x, flips, out, scratch, need):
    """Blocks of rows are transposed to blend along them: any number of taps, on any processor.

    ``at_y`` and ``at_x`` are the addresses of weights.
    """
    rows, columns = out.shape[0], out.shape[1]
    stride = 3 * width
    # `first` rises, or falls if the axis is flipped.
    low = min(first_x[0], first_x[columns - 1])
    samples = 3 * (max(first_x[0], first_x[columns - 1]) + taps_x - low)
    behind = max(first_y[0], first_y[rows - 1]) + taps_y
    whole, groups = 3 * columns // 16, (3 * columns + LANES - 1) // LANES
    line = 2 * LANES * groups
    lines = (address(scratch) + 63) // 64 * 64
    mixed = lines + (taps_y + LANES) * line
    spare = mixed + line
    turned = (spare + 16 * (samples + 16) + 63) // 64 * 64
    result = turned + 2 * LANES * (samples + 16)
    end = result + 2 * LANES * (3 * columns + 16)
    if end - lines + 64 > scratch.size:
        need[0] = end - lines + 64
        return MORE_SCRATCH
    begin, done = np.int64(0), np.int64(0)  # of the rows in `lines`
    for i in range(rows):
        y = rows - 1 - i if flips & 2 else i
        first = first_y[y]
        if first + taps_y > done:
            for j in range(first, done):
                copy_bytes(lines + (j - begin) * line, lines + (j - first) * line, line)
            begin, done = first, max(first, done)
        while first + taps_y > done:
            count = min(LANES, behind - done)
            _turned(
                source + done * stride + 3 * low,
                stride,
                count,
                samples,
                first_x,
                low,
                at_x,
                taps_x,
                spare,
                turned,
                result,
                lines + (done - begin) * line,
                line,
            )
            done += count
        blend_words(lines + (first - begin) * line, line, taps_y, at_y + 2 * y, 2 * rows, groups, mixed)
        to = address(out[y])
        round_words(mixed, whole, to)
        for j in range(16 * whole, 3 * columns):
            store_u8(to + j, min(load_u16(mixed + 2 * j) + 128 >> 8, 255))
    return OK


@part
def _place_windows(pieces, window, first, end, starts):
    """Where each piece of a row's output samples finds its own, in bytes; False if a window does not reach all of them.

    ``window`` is the bytes that are read for the first tap; none is read before the row, or at or behind ``end``.
    """
    columns = first.size
    lanes = LANES // pieces
    for i in range(starts.size):
        starts[i] = 0
        begin, behind = i * lanes // 3, min((i * lanes + lanes - 1) // 3 + 1, columns)
        if begin >= behind:
            continue
        # Bytes of whole pixels, though a piece may begin or end within one.
        least = 3 * min(first[begin], first[behind - 1])
        most = 3 * max(first[begin], first[behind - 1]) + 2
        starts[i] = min(least, end - window)
        if starts[i] < 0 or most - starts[i] >= window:
            return False
    return True


@part
def _fill_table(pieces, first, weights, taps, starts, table):
    """The indexes and weights of :func:`fastload.kernels.permute.along`, at the address ``table``."""
    columns = first.size
    samples = LANES * (starts.size // pieces)
    size, lanes = permute.INDEX + 2 * LANES * taps, LANES // pieces
    for i in range(samples):
        at = table + i // LANES * size + 2 * (i % LANES)
        x = min(i // 3, columns - 1)
        place = 3 * first[x] + i % 3 - starts[i // lanes]
        store_u16(at, (place << 8 | 255) if i < 3 * columns else 255)
        for k in range(taps):
            store_u16(at + permute.INDEX + 2 * LANES * k, weights[k, x])


def _lines_with(instructions):
    pieces, window = permute.PIECES[instructions], permute.WINDOW[instructions]
    once, twice = permute.along_once[instructions], permute.along_twice[instructions]

    blend_lines = permute.blend_lines[instructions]
    once_most, twice_least = permute.ONCE[-1], permute.TWICE[0]

    @part
    def in_lines(
        source, height, width, first_y, at_y, taps_y, first_x, weights_x, taps_x, flips, out, scratch, need
    ):
        """Along the rows first, by permutations of bytes, into a ring of lines, which are blended while they are in the cache."""
        rows, columns = out.shape[0], out.shape[1]
        stride = 3 * width
        groups = (3 * columns + LANES - 1) // LANES
        starts = np.empty(groups * pieces, np.int64)
        end = stride + OVERREAD - 3 * (taps_x - 1)
        double = taps_x > once_most or not _place_windows(pieces, window, first_x, end, starts)
        if double and (taps_x < twice_least or not _place_windows(pieces, 2 * window, first_x, end, starts)):
            return _NOT_DONE
        size, line = groups * (permute.INDEX + 2 * LANES * taps_x), 2 * LANES * groups
        table = (address(scratch) + 63) // 64 * 64
        ring = table + size
        last = ring + permute.MOST * line
        if last + LANES * groups + 64 - table > scratch.size:
            need[0] = last + LANES * groups + 64 - table
            return MORE_SCRATCH
        _fill_table(pieces, first_x, weights_x, taps_x, starts, table)
        at_starts = address(starts)
        low = 3 * min(first_x[0], first_x[columns - 1])
        behind = 3 * (max(first_x[0], first_x[columns - 1]) + taps_x)
        done = np.int64(0)
        for i in range(rows):
            y = rows - 1 - i if flips & 2 else i
            for j in range(max(done, first_y[y]), first_y[y] + taps_y):
                to = ring + j % permute.MOST * line
                prefetch(source + (j + _AHEAD) * stride + low, behind - low)
                if double:
                    twice(source + j * stride, at_starts, table, taps_x, groups, to)
                else:
                    once(source + j * stride, at_starts, table, taps_x, groups, to)
            done = first_y[y] + taps_y
            # Bytes behind the row belong to others.
            to = address(out[y]) if 3 * columns == LANES * groups else last
            blend_lines(ring, line, first_y[y], taps_y, at_y + 2 * y, 2 * rows, groups, to)
            if 3 * columns < LANES * groups:
                copy_bytes(last, address(out[y]), 3 * columns)
        # numba frees an array after its last mention, and an address is none.
        return OK if starts.size > 0 else BAD_BOX

    return in_lines


def crop_with(instructions: int) -> Any:
    """The kernel :func:`crop_pixels` for one of permute's sets of instructions; all give the same numbers."""
    in_lines = _lines_with(instructions)

    @part
    def crop_pixels(source, height, width, box, clip, flips, out, scratch, need):
        """Fill ``out`` (h, w, 3) uint8, pixels contiguous, with the window ``box`` of ``height`` x ``width`` RGB pixels.

        ``source`` is the address of the pixels, behind which OVERREAD bytes can be read. ``box``, ``clip``, ``flips``, ``scratch``,
        ``need`` and the result are as :func:`fastload.kernels.crops.crop_to` has them.
        """
        rows, columns = out.shape[0], out.shape[1]
        if rows < 1 or columns < 1:
            return OK
        if not valid_box(box, clip, height, width):
            return BAD_BOX
        stride = 3 * width
        y0, x0 = np.int64(np.floor(box[0])), np.int64(np.floor(box[1]))
        if (
            box[0] == y0
            and box[1] == x0
            and box[2] == y0 + rows
            and box[3] == x0 + columns
            and clip[0] <= y0
            and clip[1] <= x0
            and y0 + rows <= clip[2]
            and x0 + columns <= clip[3]
        ):
            _copy(source + y0 * stride + 3 * x0, stride, out, flips)
            return OK
        room = np.int64(2 * max((box[2] - box[0]) / rows, (box[3] - box[1]) / columns, 1.0)) + 3
        if room > MOST_TAPS:
            return UNSUPPORTED
        # The first rows, while the taps are computed.
        top, left = np.int64(max(box[0], clip[0])), np.int64(max(box[1], clip[1]))
        right = np.int64(min(box[3], clip[3]))
        if instructions != permute.NONE:
            for j in range(top, min(top + _AHEAD, height)):
                prefetch(source + j * stride + 3 * left, 3 * (right - left))
        first_y, first_x = np.empty(rows, np.int64), np.empty(columns, np.int64)
        weights_y, weights_x = np.empty((room, rows), np.uint16), np.empty((room, columns), np.uint16)
        taps_y = triangle(box[0], box[2], clip[0], clip[2], rows, flips & 2 != 0, first_y, weights_y)
        taps_x = triangle(box[1], box[3], clip[1], clip[3], columns, flips & 1 != 0, first_x, weights_x)
        status = _NOT_DONE
        if (
            instructions != permute.NONE
            and min(taps_y, taps_x) >= permute.LEAST
            and max(taps_y, taps_x) <= permute.MOST
        ):
            status = in_lines(
                source,
                height,
                width,
                first_y,
                address(weights_y),
                taps_y,
                first_x,
                weights_x,
                taps_x,
                flips,
                out,
                scratch,
                need,
            )
        if status == _NOT_DONE:
            status = _in_blocks(
                source,
                width,
                first_y,
                address(weights_y),
                taps_y,
                first_x,
                address(weights_x),
                taps_x,
                flips,
                out,
                scratch,
                need,
            )
        # numba frees an array after its last mention, and an address is none.
        return status if weights_y.size + weights_x.size > 0 else BAD_BOX

    return crop_pixels


crop_pixels = crop_with(permute.BEST)
