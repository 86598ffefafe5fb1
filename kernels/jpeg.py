"""JPEG without decoding it: parse the header, find the restart segments, cut a crop in the compressed domain.

A restart segment can be decoded alone. ``convert`` writes one every few MCUs, with an index of their lengths in an APP10
segment right behind SOI; :func:`crop` copies the segments that a window touches into a new, smaller JPEG, so that the
entropy decoder never sees the rest. Nothing here trusts the bytes: each length is checked before it is used.

>>> info, status = parse(np.frombuffer(jpeg, np.uint8)); info[WIDTH]
"""

from __future__ import annotations

import numpy as np

from fastload.kernels.jit import kernel
from fastload.kernels.memory import address, load_be64

# Places in the info array that parse fills, (INFO_SIZE,) int64.
WIDTH, HEIGHT, COMPONENTS, FRAME, PRECISION = 0, 1, 2, 3, 4
FRAME_AT = 5  # offset of the two height bytes, followed by the two width bytes
MCU_W, MCU_H, MCUS_X, MCUS_Y = 6, 7, 8, 9
INTERVAL = 10  # MCUs between restart markers, 0: none
SCAN_AT = 11  # first byte of entropy-coded data
SCAN_HEADER_AT = 12  # the FF of SOS
SCAN_COMPONENTS = 13
ADOBE = 14  # transform flag of an APP14 segment, -1: none
JFIF = 15  # 1 if there is an APP0 JFIF segment
INDEX_AT, INDEX_COUNT = 16, 17  # our restart index: first length, number of lengths; 0: none
TABLES_AT = 18  # first byte behind our index (or behind SOI): what a crop copies from
BLOCKS = 19  # blocks in an MCU
SAMPLING = 20  # four places: h * 16 + v of each component
IDS = 24  # four places: component ids
SUCCESSIVE = 28  # Ss, Se, Ah/Al of the scan: 0, 63, 0 unless progressive
INFO_SIZE = 29

OK, NOT_JPEG, TRUNCATED, BAD_SEGMENT, BAD_FRAME, NO_SCAN, BAD_INDEX, BAD_MARKER, NO_ROOM = range(9)
REASONS = {
    NOT_JPEG: "it does not begin like a JPEG",
    TRUNCATED: "the JPEG is truncated",
    BAD_SEGMENT: "a segment of the JPEG header is damaged",
    BAD_FRAME: "the JPEG frame header makes no sense",
    NO_SCAN: "the JPEG has no image data",
    BAD_INDEX: "its restart index does not fit its data",
    BAD_MARKER: "a restart marker of the JPEG is missing or out of order",
    NO_ROOM: "the output buffer is too small",
}

INDEX_MARKER = 0xEA
INDEX_NAME = b"fastload\x01"  # the last byte is the version of the index
INDEX_HEADER = 4 + len(INDEX_NAME)  # marker, length, name; the lengths follow, uint16 little-endian
MAX_SEGMENTS = (65535 - 2 - len(INDEX_NAME)) // 2
_NAME = np.frombuffer(INDEX_NAME, np.uint8)
_ADOBE = np.frombuffer(b"Adobe", np.uint8)


@kernel
def _word(data, at):
    return (np.int64(data[at]) << 8) | np.int64(data[at + 1])


@kernel
def _begins(data, at, name):
    same = True
    for i in range(name.size):
        same &= data[at + i] == name[i]
    return same


@kernel
def parse_into(data, info):
    """Fill ``info`` (INFO_SIZE,) int64 from the header of ``data`` (n,) uint8; returns OK or what is wrong."""
    n = data.size
    info[:] = 0
    info[ADOBE] = -1
    if n < 4 or data[0] != 0xFF or data[1] != 0xD8:
        return NOT_JPEG
    info[TABLES_AT] = 2
    at = 2
    while True:
        if at + 4 > n:
            return TRUNCATED
        if data[at] != 0xFF:
            return BAD_SEGMENT
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker == 0xD9:
            return NO_SCAN
        # What libjpeg takes in a header: frames and tables, DQT, DRI, DNL, SOS, APP0 to APP15 and comments.
        if marker != 0xFE and not (
            0xC0 <= marker <= 0xCF or 0xDA <= marker <= 0xDD or 0xE0 <= marker <= 0xEF
        ):
            return BAD_SEGMENT
        if marker == 0xC8:
            return BAD_SEGMENT
        length = _word(data, at + 2)
        if length < 2:
            return BAD_SEGMENT
        if at + 2 + length > n:
            return TRUNCATED
        body = at + 4
        if marker == 0xE0 and length >= 7 and data[body] == 74 and data[body + 1] == 70:
            info[JFIF] = 1
        elif marker == 0xEE and length >= 14 and _begins(data, body, _ADOBE):
            info[ADOBE] = data[body + 11]
        elif (
            marker == INDEX_MARKER
            and at == 2
            and length >= 2 + _NAME.size
            and (length - 2 - _NAME.size) % 2 == 0
        ):
            if _begins(data, body, _NAME):
                info[INDEX_AT] = body + _NAME.size
                info[INDEX_COUNT] = (length - 2 - _NAME.size) // 2
                info[TABLES_AT] = at + 2 + length
        elif marker == 0xDD:
            if length != 4:
                return BAD_SEGMENT
            info[INTERVAL] = _word(data, body)
        elif 0xC0 <= marker <= 0xCF and marker != 0xC4 and marker != 0xCC:
            status = _frame(data, body, length, marker, info)
            if status != OK:
                return status
        elif marker == 0xDA:
            if length < 8:
                return BAD_SEGMENT
            count = data[body]
            if info[COMPONENTS] == 0 or count < 1 or count > 4 or length != 6 + 2 * count:
                return BAD_SEGMENT
            info[SCAN_COMPONENTS] = count
            info[SCAN_HEADER_AT] = at
            info[SCAN_AT] = at + 2 + length
            info[SUCCESSIVE] = (
                (np.int64(data[body + 1 + 2 * count]) << 16)
                | (np.int64(data[body + 2 + 2 * count]) << 8)
                | np.int64(data[body + 3 + 2 * count])
            )
            return OK
        at += 2 + length


@kernel
def _frame(data, body, length, marker, info):
    if length < 8 or info[COMPONENTS] != 0:
        return BAD_FRAME
    count = np.int64(data[body + 5])
    if count < 1 or count > 4 or length != 8 + 3 * count:
        return BAD_FRAME
    info[FRAME], info[PRECISION], info[COMPONENTS] = marker, data[body], count
    info[FRAME_AT] = body + 1
    info[HEIGHT], info[WIDTH] = _word(data, body + 1), _word(data, body + 3)
    if info[HEIGHT] == 0 or info[WIDTH] == 0:
        return BAD_FRAME
    h_most = v_most = blocks = 1
    total = 0
    for i in range(count):
        sampling = data[body + 7 + 3 * i]
        h, v = np.int64(sampling >> 4), np.int64(sampling & 15)
        if h < 1 or h > 4 or v < 1 or v > 4:
            return BAD_FRAME
        info[IDS + i] = data[body + 6 + 3 * i]
        info[SAMPLING + i] = sampling
        h_most, v_most = max(h_most, h), max(v_most, v)
        total += h * v
    if count == 1:  # a lone component is never interleaved: its MCU is one block
        h_most = v_most = 1
        blocks = 1
    else:
        blocks = total
    info[BLOCKS] = blocks
    info[MCU_W], info[MCU_H] = 8 * h_most, 8 * v_most
    info[MCUS_X] = (info[WIDTH] + info[MCU_W] - 1) // info[MCU_W]
    info[MCUS_Y] = (info[HEIGHT] + info[MCU_H] - 1) // info[MCU_H]
    return OK


def parse(data: np.ndarray) -> tuple[np.ndarray, int]:
    """The header of a JPEG ``data`` (n,) uint8 as (info (INFO_SIZE,) int64, status)."""
    info = np.empty(INFO_SIZE, np.int64)
    return info, int(parse_into(data, info))


@kernel
def can_crop(info):
    """Whether restart segments tile the picture's rows and an index of them is there."""
    interval = info[INTERVAL]
    return (
        info[INDEX_COUNT] > 0
        and interval > 0
        and info[MCUS_X] % interval == 0
        and info[INDEX_COUNT] == info[MCUS_X] // interval * info[MCUS_Y]
        and info[FRAME] <= 0xC1
        and info[SCAN_COMPONENTS] == info[COMPONENTS]
    )


@kernel
def is_simple(info):
    """Baseline, 8 bit, one scan, grey or YCbCr in 4:4:4, 4:2:2, 4:4:0 or 4:2:0: what our own decoders take."""
    count = info[COMPONENTS]
    if (
        info[FRAME] > 0xC1
        or info[PRECISION] != 8
        or info[SUCCESSIVE] != 63 << 8
        or info[SCAN_COMPONENTS] != count
        or (count != 1 and count != 3)
    ):
        return False
    if count == 1:
        return True
    luma = info[SAMPLING]
    ids = info[IDS], info[IDS + 1], info[IDS + 2]
    if info[SAMPLING + 1] != 0x11 or info[SAMPLING + 2] != 0x11:
        return False
    if luma != 0x11 and luma != 0x21 and luma != 0x12 and luma != 0x22:
        return False
    if ids[0] == ids[1] or ids[1] == ids[2] or ids[0] == ids[2]:
        return False
    return info[ADOBE] == 1 or (info[ADOBE] < 0 and ids != (82, 71, 66))  # not RGB


@kernel
def follows(data, at, number):
    """Whether restart segment ``number`` can begin at byte ``at``: behind the marker of the one before it, which none may have read."""
    return number == 0 or (data[at - 2] == 0xFF and data[at - 1] == 0xD0 + ((number - 1) & 7))


@kernel
def crop(data, info, y0, x0, y1, x1, out, window):
    """Cut the window [y0, y1) x [x0, x1) pixels of a JPEG for which :func:`can_crop` holds.

    Writes a JPEG to ``out`` (at least ``data.size`` bytes) and to ``window`` (5,) int64 its length and the rectangle it
    really covers, (y, x, height, width) in pixels of the whole picture: whole segments, so never less than was asked
    for. Returns OK or what is wrong. Coefficients are copied, so the pixels are those of the whole picture.
    """
    interval = info[INTERVAL]
    across = info[MCUS_X] // interval
    step_x, step_y = interval * info[MCU_W], info[MCU_H]
    y1, x1 = min(y1, info[HEIGHT]), min(x1, info[WIDTH])
    y0, x0 = min(max(y0, 0), y1 - 1), min(max(x0, 0), x1 - 1)
    if y1 < 1 or x1 < 1:
        return BAD_FRAME
    row0, row1 = y0 // step_y, (y1 + step_y - 1) // step_y
    col0, col1 = x0 // step_x, (x1 + step_x - 1) // step_x
    if out.size < data.size:
        return NO_ROOM
    # Header: SOI, then everything behind our index up to the scan, with the picture's size patched.
    out[0], out[1] = 0xFF, 0xD8
    start, scan = info[TABLES_AT], info[SCAN_AT]
    size = scan - start
    out[2 : 2 + size] = data[start:scan]
    height = min(row1 * step_y, info[HEIGHT]) - row0 * step_y
    width = min(col1 * step_x, info[WIDTH]) - col0 * step_x
    at = info[FRAME_AT] - start + 2
    out[at], out[at + 1] = height >> 8, height & 255
    out[at + 2], out[at + 3] = width >> 8, width & 255
    at = 2 + size
    # Segments: walk the lengths up to the first row of the window, then copy run by run.
    index = info[INDEX_AT]
    source = scan
    for k in range(row0 * across):
        source += np.int64(data[index + 2 * k]) | (np.int64(data[index + 2 * k + 1]) << 8)
    number = 0
    for row in range(row0, row1):
        base = index + 2 * row * across
        for col in range(across):
            length = np.int64(data[base + 2 * col]) | (np.int64(data[base + 2 * col + 1]) << 8)
            end = source + length
            if length < 3 or end > data.size:
                return BAD_INDEX
            if col == col0 and not follows(data, source, row * across + col):
                return BAD_INDEX
            if col0 <= col < col1:
                last = row == info[MCUS_Y] - 1 and col == across - 1
                marker = data[end - 1]
                expected = 0xD9 if last else 0xD0 + ((row * across + col) & 7)
                if data[end - 2] != 0xFF or marker != expected:
                    return BAD_MARKER
                if at + length > out.size:
                    return NO_ROOM
                out[at : at + length] = data[source:end]
                at += length
                out[at - 1] = 0xD0 + (number & 7)
                number += 1
            source = end
    out[at - 1] = 0xD9
    window[0] = at
    window[1], window[2], window[3], window[4] = row0 * step_y, col0 * step_x, height, width
    return OK


@kernel
def measure_segments(data, scan, lengths):
    """Fill ``lengths`` (segments,) int64 with the bytes of each restart segment, its marker included, from byte ``scan``.

    Returns False if there are not exactly that many, or one is longer than an index can say.
    """
    began = scan
    found = 0
    at = scan
    base = address(data)
    while at + 1 < data.size:
        if at + 8 <= data.size:
            # No byte is 0xFF: no byte of the complement is zero.
            word = load_be64(base + at)
            if (~word - np.uint64(0x0101010101010101)) & word & np.uint64(0x8080808080808080) == 0:
                at += 8
                continue
        if data[at] != 0xFF:
            at += 1
            continue
        marker = data[at + 1]
        at += 2
        if 0xD0 <= marker <= 0xD7 or marker == 0xD9:
            if found == lengths.size or at - began > 65535:
                return False
            lengths[found] = at - began
            began = at
            found += 1
            if marker == 0xD9:
                break
    return found == lengths.size


WHOLE = -1  # cut: the picture must be decoded as a whole


@kernel
def cut(data, height, width, y0, x0, y1, x1, out, window):
    """:func:`parse_into` and :func:`crop` in one call, for a picture that should have ``height`` x ``width`` pixels.

    Returns OK, WHOLE if nothing can or need be cut off, or what is wrong.
    """
    info = np.empty(INFO_SIZE, np.int64)
    status = parse_into(data, info)
    if status != OK:
        return status
    if info[HEIGHT] != height or info[WIDTH] != width:
        return BAD_FRAME
    if not can_crop(info):
        return WHOLE
    return crop(data, info, y0, x0, y1, x1, out, window)


def choose_interval(mcus_x: int, mcus_y: int, mcu_w: int) -> int:
    """MCUs between restart markers: the divisor of a row's MCUs nearest (in ratio) to 56 pixels.

    About 56 pixels costs 1 to 2% of size and lets a random crop skip about half of the picture. Segments must tile the
    rows, and their lengths must fit into one index, so huge pictures get longer ones.
    """
    divisors = [d for d in range(1, mcus_x + 1) if mcus_x % d == 0 and mcus_x // d * mcus_y <= MAX_SEGMENTS]
    target = 56 / mcu_w
    return min(divisors or [0], key=lambda d: max(d / target, target / d) if d else 0.0)
