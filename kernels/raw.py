"""Crop stored pixels: resize a window straight from the mapped file, with the arithmetic of :mod:`fastload.kernels.planes`.

Rows are blended first, since that reads interleaved pixels as they lie; the result is transposed in blocks of 32 rows, so that
blending along the rows is vector code too. Both passes are 16-bit fixed point. The trade-off: up to 31 bytes behind the last
pixel are read (and thrown away), which the caller must have.

>>> status = crop_pixels(address(file) + start, height, width, box, clip, flips, out, scratch, need)  # inside of a kernel
"""

from __future__ import annotations

import numpy as np

from fastload.kernels import restart
from fastload.kernels.memory import address, copy_bytes, load_u8, load_u16, part, reverse16, store_u8
from fastload.kernels.planes import (
    LANES,
    MOST_TAPS,
    blend_bytes,
    blend_words,
    round_words,
    transpose16,
    triangle,
)

OK, UNSUPPORTED = restart.OK, restart.UNSUPPORTED
MORE_SCRATCH, BAD_BOX = 32, 33
OVERREAD = LANES  # bytes behind the pixels that may be read
_EDGE = 128


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
    first_y, first_x = np.empty(rows, np.int64), np.empty(columns, np.int64)
    weights_y, weights_x = np.empty((room, rows), np.uint16), np.empty((room, columns), np.uint16)
    taps_y = triangle(box[0], box[2], clip[0], clip[2], rows, flips & 2 != 0, first_y, weights_y)
    taps_x = triangle(box[1], box[3], clip[1], clip[3], columns, flips & 1 != 0, first_x, weights_x)
    # `first` rises, or falls if the axis is flipped.
    low = min(first_x[0], first_x[columns - 1])
    behind = max(first_x[0], first_x[columns - 1]) + taps_x

    groups = (3 * (behind - low) + LANES - 1) // LANES
    line, back_line = 2 * LANES * groups, 2 * ((3 * columns + 15) // 16 * 16)
    lines = (address(scratch) + 63) // 64 * 64
    turned = lines + LANES * line + _EDGE
    result = turned + LANES * line + _EDGE
    back = result + LANES * back_line + _EDGE
    end = back + LANES * back_line + _EDGE
    if end - lines + 64 > scratch.size:
        need[0] = end - lines + 64
        return MORE_SCRATCH
    at_y, at_x = address(weights_y), address(weights_x)
    whole = 3 * columns // 16
    for y in range(0, rows, LANES):
        count = min(LANES, rows - y)
        for j in range(count):
            blend_bytes(
                source + first_y[y + j] * stride + 3 * low,
                stride,
                taps_y,
                at_y + 2 * (y + j),
                2 * rows,
                groups,
                lines + j * line,
            )
        for half in range(0, count, 16):
            for x in range(0, LANES * groups, 16):
                transpose16(lines + half * line + 2 * x, line, turned + 2 * LANES * x + 2 * half, 2 * LANES)
        for x in range(columns):
            # A pixel's three channels of 32 rows lie behind one another.
            blend_words(
                turned + (first_x[x] - low) * 6 * LANES,
                6 * LANES,
                taps_x,
                at_x + 2 * x,
                2 * columns,
                3,
                result + 6 * LANES * x,
            )
        for half in range(0, count, 16):
            for x in range(0, 3 * columns, 16):
                transpose16(
                    result + 2 * LANES * x + 2 * half, 2 * LANES, back + half * back_line + 2 * x, back_line
                )
        for j in range(count):
            to = address(out[y + j])
            round_words(back + j * back_line, whole, to)
            for i in range(16 * whole, 3 * columns):
                store_u8(to + i, min(load_u16(back + j * back_line + 2 * i) + 128 >> 8, 255))
    # numba frees an array after its last mention, and an address is none.
    return OK if weights_y.size + weights_x.size > 0 else BAD_BOX
