"""What :mod:`fastload.kernels.gpu_jpeg` does on a GPU, on tensors in host memory: one segment, block and image after the other.

Entropy decoding is a plain loop in numba over the same look-up tables; the rest is numpy on all blocks of an image. The
trade-off: it shares the tables and the plan with the kernels, but no code, and is some ten times slower than the decoder of
:mod:`fastload.kernels.crops`, which is the one to use for decoding on a CPU. On tensors of a GPU it works on copies.

>>> errors = decode(memory, index, gpu_jpeg.pack(index, images, windows, len(memory)), pixels)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fastload.kernels import gpu_jpeg as g
from fastload.kernels.jit import kernel
from fastload.kernels.jpeg_index import LONG

if TYPE_CHECKING:
    import torch


def decode(memory: torch.Tensor, index: g.Index, packed: g.Packed, pixels: torch.Tensor) -> torch.Tensor:
    """Fill ``pixels`` (n,) uint8 with the windows, as :func:`fastload.kernels.gpu_jpeg.decode` does; (B,) int32 of error flags."""
    import torch

    data = memory.cpu().numpy()
    huffman = index.huffman.cpu().numpy().view(np.uint16)
    quant = index.quant.cpu().numpy()
    errors, out = np.zeros(len(packed.words), np.int32), np.empty(packed.bytes, np.uint8)
    ends = packed.words[:, g.SEGMENTS_END]
    for i, words in enumerate(packed.words):
        blocks = np.zeros((words[g.MCUS] * words[g.MCUS_DOWN] * words[g.MCU_BLOCKS], 64), np.int16)
        for segment in packed.segments[ends[i - 1] if i else 0 : ends[i]]:
            errors[i] |= _segment(data, words, segment, huffman, quant, blocks)
        height, width = words[g.WINDOW + 2 : g.WINDOW + 4].tolist()
        window = _colour(words, _planes(words, transform(blocks)))
        out[words[g.OUT] : words[g.OUT] + 3 * height * width] = window.reshape(-1)
    pixels.copy_(torch.from_numpy(out))
    return torch.from_numpy(errors).to(memory.device)


@kernel
def _segment(data, words, segment, huffman, quant, blocks):
    """Decode a row of Packed.segments to ``blocks`` (n, 64) int16, zeros, MCU by MCU; bits of REASONS."""
    at, end = segment[0], segment[0] + (segment[1] & 0xFFFF)
    left, complete = (segment[1] >> 16) & 0xFFFF, (segment[1] >> 32) & 1
    mcu = (segment[1] >> 33) * words[g.INTERVAL]
    bits, have, spare = np.int64(0), np.int64(0), np.int64(0)
    levels = np.zeros(3, np.int64)
    while left > 0:
        x, y = mcu % words[g.MCUS_X] - words[g.COLUMN], mcu // words[g.MCUS_X] - words[g.ROW]
        inside = 0 <= x < words[g.MCUS] and 0 <= y < words[g.MCUS_DOWN]
        for b in range(words[g.MCU_BLOCKS]):
            component = max(b - words[g.LUMA] + 1, 0)
            k = 0
            while k < 64:
                while have < 32:
                    byte = np.int64(0)
                    if at < end:
                        byte = np.int64(data[at])
                        at += 1
                        if byte == 255 and at < end:
                            if data[at] != 0:
                                return g.BAD_MARKER
                            at += 1
                    else:
                        spare += 8
                    bits = ((bits << 8) | byte) & 0xFFFFFFFFFF
                    have += 8
                word = (bits >> (have - 32)) & 0xFFFFFFFF
                table = words[g.TABLES + component + (3 if k else 0)]
                entry = np.int64(huffman[table + (word >> 24)])
                if entry & LONG:
                    more = ((entry >> 12) & 7) + 1
                    entry = np.int64(
                        huffman[table + (entry & 0xFFF) + ((word >> (24 - more)) & ((1 << more) - 1))]
                    )
                length, run, size = entry >> 8, (entry >> 4) & 15, entry & 15
                if length == 0:
                    return g.BAD_CODE
                value = (word >> (32 - length - size)) & ((1 << size) - 1)
                if size > 0 and value >> (size - 1) == 0:
                    value -= (1 << size) - 1
                have -= length + size
                if have < spare:
                    return g.OVERRUN
                if k == 0:
                    levels[component] += value
                    value = levels[component]
                elif size == 0:
                    k = k + 16 if run == 15 else 64
                    continue
                k += run
                if k > 63:
                    return g.BAD_CODE
                if inside:
                    step = quant[words[g.TABLES + 6 + component] + k]
                    block = (y * words[g.MCUS] + x) * words[g.MCU_BLOCKS] + b
                    blocks[block, (step & 2047) >> 5] = np.int16(value * (step >> 11))
                k += 1
        mcu += 1
        left -= 1
    return g.TOO_MUCH if complete and 8 * (end - at) + have - spare >= 24 else 0


def transform(blocks: np.ndarray) -> np.ndarray:
    """(n, 64) int16 coefficients to (n, 8, 8) uint8 samples: columns, then rows, each by :func:`_idct`."""
    columns = _idct(np.moveaxis(blocks.reshape(-1, 8, 8).astype(np.int32), 1, 0), 11)
    rows = _idct(np.moveaxis(np.stack(columns, axis=1), 2, 0), 18)
    return np.clip(np.stack(rows, axis=2) + 128, 0, 255).astype(np.uint8)


def _idct(x: np.ndarray, shift: int) -> list[np.ndarray]:
    """8 inverse DCT values of 8 int32 ones: the even part, then the odd part, in libjpeg's 13 bits of fraction."""
    half = np.int32(1 << (shift - 1))
    z1 = (x[2] + x[6]) * 4433
    sums, differences = (x[0] + x[4]) * 8192 + half, (x[0] - x[4]) * 8192 + half
    outer, inner = z1 + x[2] * 6270, z1 - x[6] * 15137
    even = [sums + outer, differences + inner, differences - inner, sums - outer]
    z5 = (x[1] + x[3] + x[5] + x[7]) * 9633
    z3, z4 = z5 - (x[7] + x[3]) * 16069, z5 - (x[5] + x[1]) * 3196
    z1, z2 = (x[7] + x[1]) * -7373, (x[5] + x[3]) * -20995
    odd = [
        x[1] * 12299 + z1 + z4, x[3] * 25172 + z2 + z3, x[5] * 16819 + z2 + z4, x[7] * 2446 + z1 + z3,
    ]  # fmt: skip
    return [(e + o) >> shift for e, o in zip(even, odd)] + [
        (e - o) >> shift for e, o in zip(even[::-1], odd[::-1])
    ]


def _planes(words: np.ndarray, samples: np.ndarray) -> list[np.ndarray]:
    """The components' planes (h, w) uint8 of the blocks (n, 8, 8) of all MCUs."""
    down, across = words[g.MCUS_DOWN], words[g.MCUS]
    mcus = samples.reshape(down, across, words[g.MCU_BLOCKS], 8, 8)
    v, h = words[g.HALF_Y] + 1, words[g.HALF_X] + 1
    luma = mcus[:, :, : v * h].reshape(down, across, v, h, 8, 8).transpose(0, 2, 4, 1, 3, 5)
    chroma = [
        mcus[:, :, b].transpose(0, 2, 1, 3).reshape(down * 8, across * 8)
        for b in range(v * h, words[g.MCU_BLOCKS])
    ]
    return [luma.reshape(down * v * 8, across * h * 8), *chroma]


def _colour(words: np.ndarray, planes: list[np.ndarray]) -> np.ndarray:
    """The window (h, w, 3) uint8 of the planes."""
    top, left, height, width = words[g.WINDOW : g.WINDOW + 4].tolist()
    y, x = np.arange(top, top + height), np.arange(left, left + width)
    half_y, half_x, row, column = words[[g.HALF_Y, g.HALF_X, g.ROW, g.COLUMN]].tolist()
    luma = planes[0][np.ix_(y - (row * 8 << half_y), x - (column * 8 << half_x))].astype(np.int32)
    if words[g.GREY]:
        return np.repeat(luma[:, :, None], 3, axis=2).astype(np.uint8)
    fancy_y, fancy_x = words[[g.FANCY_Y, g.FANCY_X]].tolist()
    near_y, near_x = (y >> half_y), (x >> half_x)
    next_y = np.clip(near_y + (y % 2 * 2 - 1 if fancy_y else 0), 0, words[g.CHROMA] - 1)
    next_x = np.clip(near_x + (x % 2 * 2 - 1 if fancy_x else 0), 0, words[g.CHROMA + 1] - 1)
    upsampled = []
    for plane in planes[1:]:
        rows = plane.astype(np.int32)[:, :]
        rows = rows[near_y - row * 8] * 3 + rows[next_y - row * 8]
        full = rows[:, near_x - column * 8] * 3 + rows[:, next_x - column * 8]
        # libjpeg rounds x.5 up and down in turns.
        if fancy_x and fancy_y:
            full += 8 - x % 2
        elif fancy_x:
            full += 4 + 4 * (x % 2)
        else:
            full += 4 + 4 * (y % 2)[:, None]
        upsampled.append((full >> 4) - 128)
    cb, cr = upsampled
    red = luma + ((91881 * cr + 32768) >> 16)
    green = luma + ((-22554 * cb - 46802 * cr + 32768) >> 16)
    blue = luma + ((116130 * cb + 32768) >> 16)
    return np.clip(np.stack([red, green, blue], axis=2), 0, 255).astype(np.uint8)
