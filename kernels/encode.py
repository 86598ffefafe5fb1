"""A baseline YCbCr JPEG encoded anew without going through RGB: decoded to planes, chroma halved, quantised, written with restart markers.

For pictures that keep their size. Chroma of 4:4:4 pictures is halved by its inverse DCT, which is a better filter than the mean of four
that encoders use. The trade-off: standard Huffman tables, some percent larger than the picture's own would be, and read by one pass.

>>> status = encode_anew(data, height, width, encoder, work, scratch, interval, lengths, out, result)
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fastload.kernels import decode, jpeg
from fastload.kernels.crops import MORE_SCRATCH
from fastload.kernels.decode import H, V
from fastload.kernels.fdct import factors, quantised
from fastload.kernels.huffman import PAD
from fastload.kernels.jit import kernel
from fastload.kernels.memory import (
    address,
    bit_length,
    copy_bytes,
    inlined,
    load_i16,
    load_i64,
    load_u8,
    lowest_set,
    part,
    store_be32,
    store_u8,
)
from fastload.kernels.restart import NO_ROOM, OK, TOO_LONG, UNSUPPORTED

_EDGE = 128
_MOST_BITS = 6 * 64 * 26  # of an MCU


class Encoder(NamedTuple):
    """Tables of an encoder; index 0 is luma, 1 chroma."""

    factors: np.ndarray  # (2, 64) float32, of fdct.factors
    dc: np.ndarray  # (2, 16) int64: code << 5 | length, by size
    ac: np.ndarray  # (2, 256) int64: the same by symbol


def new_encoder(quant: np.ndarray, codes: np.ndarray, sizes: np.ndarray) -> Encoder:
    """An encoder for quantisation tables (2, 8, 8), and Huffman codes and their sizes (4, 256): DC luma, DC chroma, AC luma, AC chroma."""
    packed = codes << 5 | sizes
    return Encoder(np.stack([factors(table) for table in quant]), packed[:2, :16].copy(), packed[2:].copy())


@part
def _extend(plane, stride, height, width, full_height, full_width):
    """Repeat the last row and column of a transposed plane, up to the encoder's whole MCUs."""
    for x in range(width):
        column = plane + x * stride
        last = load_u8(column + height - 1)
        for y in range(height, full_height):
            store_u8(column + y, last)
    for x in range(width, full_width):
        copy_bytes(plane + (width - 1) * stride, plane + x * stride, full_height)


@part
def _stuffed(to, word):
    """Four bytes at address ``to``, each 0xFF with a zero behind it; returns the address behind them."""
    for shift in range(24, -8, -8):
        byte = (word >> shift) & 255
        store_u8(to, byte)
        to += 1
        if byte == 255:
            store_u8(to, 0)
            to += 1
    return to


@inlined
def _put(to, acc, held, bits, count):
    """Append ``count`` (at most 32) bits at address ``to``; returns (to, acc, held) with fewer than 32 bits held."""
    acc = (acc << np.uint64(count)) | np.uint64(bits)
    held += count
    if held >= 32:
        held -= 32
        word = np.int64(acc >> np.uint64(held)) & 0xFFFFFFFF
        if (~word - 0x01010101) & word & 0x80808080:  # perhaps a byte of ones
            to = _stuffed(to, word)
        else:
            store_be32(to, word)
            to += 4
    return to, acc, held


@inlined
def _bits_of(value):
    """Size of a value, and the bits that stand for it."""
    size = bit_length(abs(value))
    return size, (value if value >= 0 else value - 1) & ((1 << size) - 1)


@kernel
def encode_anew(data, height, width, encoder, work, scratch, interval, lengths, out, result):
    """Entropy-coded data of ``data`` (n,) uint8 as 4:2:0 into ``out`` (m,) uint8, EOI at its end.

    A restart marker follows each ``interval`` MCUs, the divisor of a row; ``lengths`` (segments,) int64 gets each segment's bytes with
    its marker. Returns OK with ``result`` (1,) int64 bytes written; MORE_SCRATCH with the bytes needed there; UNSUPPORTED for another
    JPEG than baseline YCbCr of 4:2:0 or 4:4:4; NO_ROOM, TOO_LONG (a segment over 65,535 bytes), or what is wrong with the data.
    """
    status = decode.read_header(data, work.tables, work.header)
    if status != OK:
        return status
    info, component = work.header.info, work.header.component
    if info[jpeg.HEIGHT] != height or info[jpeg.WIDTH] != width or info[jpeg.COMPONENTS] != 3:
        return UNSUPPORTED
    whole = component[0, H] == 1 and component[0, V] == 1
    if not whole and not (component[0, H] == 2 and component[0, V] == 2):
        return UNSUPPORTED
    mcus_x, mcus_y = (width + 15) // 16, (height + 15) // 16
    segments = mcus_x // interval * mcus_y

    # Planes as large as the encoder's MCUs, which are not less than the decoder's.
    start = (address(scratch) + 63) // 64 * 64
    bytes_room = (data.size - info[jpeg.SCAN_AT] + 2 * _EDGE + PAD) // 64 * 64
    at = start + bytes_room
    table = np.zeros((3, 3), np.int64)
    for c in range(3):
        side = 8 if c else 16
        table[c, 0], table[c, 1], table[c, 2] = (
            at,
            (mcus_y * side + 63) // 64 * 64 | 64,
            1 if c and whole else 0,
        )
        at += mcus_x * side * table[c, 1] + _EDGE
    if at - start + 64 > scratch.size:
        result[0] = at - start + 64
        return MORE_SCRATCH
    total = info[jpeg.MCUS_X] * info[jpeg.MCUS_Y]
    read = info[jpeg.INTERVAL] if info[jpeg.INTERVAL] > 0 else total
    if total // read > data.size:  # so that the header alone cannot ask for much memory
        return decode.OVERRUN
    places = np.empty((total // read + 2, 3), np.int64)
    across, down = info[jpeg.MCUS_X], info[jpeg.MCUS_Y]
    status, found, _ = decode.find_segments(data, info, 0, 0, down, across, start, bytes_room, places)
    if status != OK:
        return status
    status = decode.decode_segments(work, places, found, 0, 0, down, across, table)
    if status != OK:
        return status
    for c in range(3):
        side, halves = (8, 2) if c else (16, 1)
        _extend(
            table[c, 0],
            table[c, 1],
            (height + halves - 1) // halves,
            (width + halves - 1) // halves,
            mcus_y * side,
            mcus_x * side,
        )

    blocks = np.empty((6, 64), np.int16)
    block_at, masks = address(blocks), np.zeros(6, np.uint64)
    luma, chroma = address(encoder.factors[0]), address(encoder.factors[1])
    dc_at, ac_at = address(encoder.dc), address(encoder.ac)
    predicted = np.zeros(3, np.int64)
    acc, held = np.uint64(0), np.int64(0)
    first = began = to = address(out)
    room = first + out.size - _MOST_BITS // 4 - 64
    for mcu in range(mcus_x * mcus_y):
        row, col = mcu // mcus_x, mcu % mcus_x
        if to > room:
            return NO_ROOM
        stride = table[0, 1]
        corner = table[0, 0] + 16 * col * stride + 16 * row
        for half in range(2):
            block = block_at + 256 * half
            masks[2 * half], masks[2 * half + 1] = quantised(
                corner + 8 * half,
                corner + 8 * half + 8 * stride,
                stride,
                stride,
                luma,
                luma,
                block,
                block + 128,
            )
        place = 8 * col * table[1, 1] + 8 * row
        masks[4], masks[5] = quantised(
            table[1, 0] + place,
            table[2, 0] + place,
            table[1, 1],
            table[2, 1],
            chroma,
            chroma,
            block_at + 512,
            block_at + 640,
        )
        for b in range(6):
            kind, c = (0, 0) if b < 4 else (1, b - 3)
            block = block_at + 128 * b
            value = load_i16(block)
            size, bits = _bits_of(value - predicted[c])
            predicted[c] = value
            code = load_i64(dc_at + 8 * (16 * kind + size))
            to, acc, held = _put(to, acc, held, (code >> 5 << size) | bits, (code & 31) + size)
            last, mask = np.int64(0), masks[b] & ~np.uint64(1)
            while mask:
                k = lowest_set(mask)
                mask &= mask - np.uint64(1)
                run = k - last - 1
                last = k
                while run > 15:
                    code = load_i64(ac_at + 8 * (256 * kind + 0xF0))
                    to, acc, held = _put(to, acc, held, code >> 5, code & 31)
                    run -= 16
                size, bits = _bits_of(load_i16(block + 2 * k))
                if size > 10:
                    return UNSUPPORTED
                code = load_i64(ac_at + 8 * (256 * kind + (run << 4 | size)))
                to, acc, held = _put(to, acc, held, (code >> 5 << size) | bits, (code & 31) + size)
            if last < 63:
                code = load_i64(ac_at + 8 * 256 * kind)
                to, acc, held = _put(to, acc, held, code >> 5, code & 31)
        if (mcu + 1) % interval == 0:
            # The last byte is filled up with ones.
            to, acc, held = _put(to, acc, held, (1 << -held % 8) - 1, -held % 8)
            while held > 0:
                held -= 8
                byte = np.int64(acc >> np.uint64(held)) & 255
                store_u8(to, byte)
                store_u8(to + 1, 0)
                to += 2 if byte == 255 else 1
            acc, held = np.uint64(0), np.int64(0)
            predicted[:] = 0
            segment = mcu // interval
            store_u8(to, 255)
            store_u8(to + 1, 0xD9 if segment == segments - 1 else 0xD0 + (segment & 7))
            to += 2
            lengths[segment] = to - began
            if to - began > 65535:
                return TOO_LONG
            began = to
    result[0] = to - first
    # numba frees an array after its last mention, and an address is none.
    return OK if blocks.size + places.size > 0 else NO_ROOM
