"""From stored JPEG bytes to a finished crop in one call without the GIL: decode what is needed, resize, mix colours.

The fast path of the CPU engine. Luma and chroma are decoded at the reduction that suits each, and resized from their own
planes; chroma is smooth, but not filtered as libjpeg's "fancy upsampling" does, so pixels differ a little from Pillow's (a mean
of about half a level for photographs).

>>> status = crop_to(data, height, width, box, clip, flips, out, new_work(), scratch, need, clock)  # inside of a kernel
"""

from __future__ import annotations

import numpy as np

from fastload.kernels import decode, jpeg, planes, raw
from fastload.kernels.decode import H, V
from fastload.kernels.huffman import PAD
from fastload.kernels.memory import address, load_u8, nanoseconds, part
from fastload.kernels.planes import LANES, MOST_TAPS
from fastload.kernels.raw import valid_box

OK, UNSUPPORTED, BAD_FRAME = decode.OK, decode.UNSUPPORTED, decode.BAD_FRAME
MORE_SCRATCH, BAD_BOX = raw.MORE_SCRATCH, raw.BAD_BOX  # the former: `need` says how much is needed
REASONS = {
    **decode.REASONS,
    MORE_SCRATCH: "the scratch memory is too small",
    BAD_BOX: "the crop lies outside of the picture",
}
_EDGE = 128  # bytes behind each piece of scratch memory, which vectors may touch


@part
def _reduction(scale):
    """Logarithm of the reduction that leaves a scale of at least 1."""
    reduction = np.int64(0)
    while reduction < 3 and scale >= 2 << reduction:
        reduction += 1
    return reduction


@part
def crop_to(data, height, width, box, clip, flips, out, work, scratch, need, clock):
    """Fill ``out`` (h, w, 3) uint8, pixels contiguous, with the window ``box`` of the JPEG ``data`` (n,) uint8.

    The picture must have ``height`` x ``width`` pixels. ``box`` (y0, x0, y1, x1) float64 and ``clip`` int64 are as
    :func:`fastload.kernels.resize.resize` has them, ``flips`` too. ``work`` and ``scratch`` (n,) uint8 belong to the thread.
    Returns OK; UNSUPPORTED if this must be decoded otherwise; MORE_SCRATCH with ``need[0]`` bytes; or what is wrong, see REASONS.
    ``out`` is written for OK only. ``clock`` (2, 3) int64, or (2, 0) where nobody asks: nanoseconds and bytes of cutting, decoding and
    resizing are added to it.
    """
    rows, columns, timed = out.shape[0], out.shape[1], clock.shape[1] > 0
    if rows < 1 or columns < 1:
        return OK
    if not valid_box(box, clip, height, width):
        return BAD_BOX
    status = decode.read_header(data, work.tables, work.header)
    if status != OK:
        return status
    info, component = work.header.info, work.header.component
    if info[jpeg.HEIGHT] != height or info[jpeg.WIDTH] != width:
        return BAD_FRAME
    count = info[jpeg.COMPONENTS]

    # How each plane is resized (chroma planes are alike), and which of its samples that needs.
    kinds = 1 if count == 1 else 2
    reduction = np.zeros(2, np.int64)
    taps, least, behind = np.zeros((2, 2), np.int64), np.zeros((2, 2), np.int64), np.zeros((2, 2), np.int64)
    step = np.zeros((2, 2), np.int64)  # pixels of the picture to a sample
    room = np.int64(0)
    for kind in range(kinds):
        step[kind, 0] = info[jpeg.MCU_H] // (8 * component[kind, V])
        step[kind, 1] = info[jpeg.MCU_W] // (8 * component[kind, H])
        scale_y, scale_x = (
            (box[2] - box[0]) / (rows * step[kind, 0]),
            (box[3] - box[1]) / (columns * step[kind, 1]),
        )
        reduction[kind] = _reduction(min(scale_y, scale_x))
        step[kind, 0] <<= reduction[kind]
        step[kind, 1] <<= reduction[kind]
        room = max(room, np.int64(2 * max(scale_y, scale_x, 1.0) / (1 << reduction[kind])) + 3)
    if room > MOST_TAPS:
        return UNSUPPORTED
    first_y, first_x = np.empty((2, rows), np.int64), np.empty((2, columns), np.int64)
    weights_y, weights_x = np.empty((2, room, rows), np.uint16), np.empty((2, room, columns), np.uint16)
    row0, row1, col0, col1 = np.int64(1 << 40), np.int64(0), np.int64(1 << 40), np.int64(0)
    for kind in range(kinds):
        for axis in range(2):
            size = columns if axis else rows
            first = first_x[kind] if axis else first_y[kind]
            unit = step[kind, axis]
            taps[kind, axis] = planes.triangle(
                box[axis] / unit,
                box[2 + axis] / unit,
                clip[axis] // unit,
                (clip[2 + axis] + unit - 1) // unit,
                size,
                (flips & 1 if axis else flips >> 1 & 1) != 0,
                first,
                weights_x[kind] if axis else weights_y[kind],
            )
            # `first` rises, or falls if the axis is flipped.
            least[kind, axis] = min(first[0], first[size - 1])
            behind[kind, axis] = max(first[0], first[size - 1]) + taps[kind, axis]
            mcu = (info[jpeg.MCU_W] if axis else info[jpeg.MCU_H]) // unit
            if axis:
                col0, col1 = min(col0, least[kind, 1] // mcu), max(col1, (behind[kind, 1] + mcu - 1) // mcu)
            else:
                row0, row1 = min(row0, least[kind, 0] // mcu), max(row1, (behind[kind, 0] + mcu - 1) // mcu)

    # Scratch memory: the bytes without stuffing, then per plane its samples and the result of the first pass.
    interval = info[jpeg.INTERVAL] if info[jpeg.INTERVAL] > 0 else info[jpeg.MCUS_X] * info[jpeg.MCUS_Y]
    table = np.zeros((3, 3), np.int64)
    wide = (columns + LANES - 1) // LANES * LANES
    stride, middle = np.zeros(2, np.int64), np.zeros(3, np.int64)
    start = (address(scratch) + 63) // 64 * 64
    at = start
    bytes_room = (data.size - info[jpeg.SCAN_AT] + 2 * _EDGE + PAD) // 64 * 64
    at += bytes_room
    strip = at
    for kind in range(kinds):
        deep = (behind[kind, 0] - least[kind, 0] + LANES - 1) // LANES * LANES
        at = max(at, strip + 32 * deep + _EDGE)
    lines = at
    at += 3 * 2 * wide + _EDGE
    for c in range(count):
        kind = min(c, 1)
        size_y, size_x = info[jpeg.MCU_H] // step[kind, 0], info[jpeg.MCU_W] // step[kind, 1]
        # An odd number of cache lines, so that neighbouring columns do not share their place in the cache.
        stride[kind] = ((row1 - row0) * size_y + 63) // 64 * 64 | 64
        table[c, 0], table[c, 1], table[c, 2] = at, stride[kind], reduction[kind]
        at += (col1 - col0) * size_x * stride[kind] + _EDGE
        middle[c] = at
        at += (
            (behind[kind, 0] - least[kind, 0] + LANES) // LANES * LANES * 2 * wide + 2 * LANES * wide + _EDGE
        )
    if at - start + 64 > scratch.size:
        need[0] = at - start + 64
        return MORE_SCRATCH

    mcus = (row1 - row0) * info[jpeg.MCUS_X]
    if jpeg.can_crop(info):
        mcus = (row1 - row0) * min(col1 - col0 + 2 * interval, info[jpeg.MCUS_X])
    if mcus // interval > data.size:  # so that the header alone cannot ask for much memory
        return decode.OVERRUN
    segments = np.empty((mcus // interval + 2, 3), np.int64)
    begun = nanoseconds() if timed else 0
    status, found, used = decode.find_segments(
        data, info, row0, col0, row1, col1, start, bytes_room, segments
    )
    if status != OK:
        return status
    cut = nanoseconds() if timed else 0
    status = decode.decode_segments(work, segments, found, row0, col0, row1, col1, table)
    if status != OK:
        return status
    decoded = nanoseconds() if timed else 0

    for c in range(count):
        kind = min(c, 1)
        origin_y = row0 * (info[jpeg.MCU_H] // step[kind, 0])
        origin_x = col0 * (info[jpeg.MCU_W] // step[kind, 1])
        planes.along_rows(
            table[c, 0] + least[kind, 0] - origin_y,
            stride[kind],
            behind[kind, 0] - least[kind, 0],
            first_x[kind],
            weights_x[kind],
            taps[kind, 1],
            origin_x,
            strip,
            middle[c],
            2 * wide,
        )
    groups, whole = wide // LANES, columns // 16
    pixels_left = columns - 16 * whole
    weights_at = address(weights_y)
    blue, red = lines + 2 * wide, lines + 4 * wide
    for y in range(rows):
        for c in range(count):
            kind = min(c, 1)
            planes.blend_words(
                middle[c] + (first_y[kind, y] - least[kind, 0]) * 2 * wide,
                2 * wide,
                taps[kind, 0],
                weights_at + 2 * (kind * room * rows + y),
                2 * rows,
                groups,
                lines + 2 * wide * c,
            )
        to = address(out[y])
        if count == 1:
            planes.colour_grey(lines, blue, red, whole, to)
        else:
            planes.colour_ycc(lines, blue, red, whole, to)
        if pixels_left:
            skip = 32 * whole
            if count == 1:
                planes.colour_grey(lines + skip, blue, red, 1, strip)
            else:
                planes.colour_ycc(lines + skip, blue + skip, red + skip, 1, strip)
            for i in range(pixels_left):
                for channel in range(3):
                    out[y, 16 * whole + i, channel] = np.uint8(load_u8(strip + 3 * i + channel))
    if timed:
        clock[0, 0] += cut - begun
        clock[0, 1] += decoded - cut
        clock[0, 2] += nanoseconds() - decoded
        clock[1, 0] += used
        for c in range(count):
            kind = min(c, 1)
            down, across = info[jpeg.MCU_H] // step[kind, 0], info[jpeg.MCU_W] // step[kind, 1]
            clock[1, 1] += (row1 - row0) * down * (col1 - col0) * across
        clock[1, 2] += out.size
    # numba frees an array after its last mention, and an address is none.
    return OK if weights_y.size + weights_x.size > 0 else BAD_BOX
