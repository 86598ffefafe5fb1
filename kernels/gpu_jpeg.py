"""Crops of baseline JPEGs decoded on the GPU, from encoded bytes that stay in its memory: restart segments in parallel.

A JPEG's entropy coding is serial, but each restart segment can be decoded alone, and :mod:`fastload.kernels.jpeg_index` knows where
they are. :func:`decode` takes the segments under each window, one lane for each; transforms their blocks; and writes the
windows' pixels. These are libjpeg-turbo's to the bit (accurate DCT, "fancy" chroma upsampling), the same for a window as in the
whole image: chroma is decoded one sample beyond the window where the filter wants it. Files without restart markers are not for
this: their one segment would be decoded by one lane.

**Cost.** Counted in code compiled for the H100, and in 256 random crops (scale 0.08 to 1) of ImageNet photographs of 110 KB, most 4:4:4
at a high quality; no GPU has timed it yet.

- Entropy: a step of a lane is one Huffman symbol of 180 instructions, whatever it is. 330 steps for the 250 bytes of a segment; 74,000
  segments are 2,400 warps, whose lanes have work in 81% of the steps (65% if segments were not sorted by length). That is 18 warps for
  each processor of an H100, so that it is bound by latency: of two look-ups that wait for one another, and of the shifts between
  them. The longest segment is a lower bound of the time: rows of a prime number of MCUs are one segment. A symbol stores 2 bytes
  into a sector of 32 that nobody else writes at the time.
- Transform: 1,300 instructions for each warp of 32 blocks; reads 128 bytes of each block, writes 64.
- Colour: 150 instructions a pixel; reads the samples, most from caches; writes the 3 bytes of each pixel of the window.

Coefficients must be zeros before. The buffers live until the stream has used them: 192 bytes for each block of the MCUs under a
window, and 3 for each of its pixels: 7.5 bytes a pixel for 4:2:0, 12 for 4:4:4, and a rim of less than an MCU and a chroma sample.

torch and Triton are imported when something runs. On tensors in host memory the same is done by
:func:`fastload.kernels.gpu_jpeg_reference.decode`, or with TRITON_INTERPRET=1 by Triton's interpreter; see :mod:`fastload.kernels.gpu`.

>>> sources, errors = decode(memory, index_of(data, starts, sizes).to("cuda"), np.array([5, 2]), windows)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fastload.kernels import gpu
from fastload.kernels.jit import kernel
from fastload.kernels.jpeg_index import Index, index_of

if TYPE_CHECKING:
    import torch

__all__ = ["BAD_CODE", "BAD_MARKER", "OVERRUN", "REASONS", "TOO_MUCH", "Index", "decode", "index_of"]

LANES = 32  # segments of a program: one warp, as what a lane waits for holds up its warp only
BLOCKS = 128  # blocks of a program, one for each lane
PIXELS = 512  # pixels of a program: more would want more registers
_RANKS = 128  # lengths of segments that are told apart

# Bits of an image's error flag.
BAD_CODE, OVERRUN, TOO_MUCH, BAD_MARKER = 1, 2, 4, 8
REASONS = {
    BAD_CODE: "an impossible Huffman code, or more than 64 coefficients in a block",
    OVERRUN: "a restart segment ends too early",
    TOO_MUCH: "data go on where a restart segment should end",
    BAD_MARKER: "a marker within a restart segment",
}

# Columns of Packed.words.
(
    BLOCK, MCU_BLOCKS, LUMA, MCUS, MCUS_DOWN, MCUS_X, COLUMN, ROW, INTERVAL, SEGMENTS_END, TABLES, PLANE, HALF_X, HALF_Y,
    FANCY_X, FANCY_Y, WINDOW, OUT, CHROMA, GREY, COLUMNS,
) = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 19, 20, 21, 22, 23, 24, 28, 29, 31, 32)  # fmt: skip


class Packed(NamedTuple):
    """What is to be done, as the kernels read it. The arrays are int64."""

    words: np.ndarray  # (B, COLUMNS), see pack
    # (S, 2): place of the first byte; number in the image << 33 | whether these are all of its MCUs << 32 | MCUs to decode << 16
    # | bytes: both are 16 bits in a JPEG and in our index of it
    segments: np.ndarray
    lanes: np.ndarray  # (P,): image << 32 | first segment of each program
    blocks: np.ndarray  # (P,): the same with the first block
    pixels: np.ndarray  # (P,): and with the first pixel
    coefficients: int  # blocks, of 64 int16
    samples: int  # bytes
    bytes: int  # of pixels


def decode(
    memory: torch.Tensor, index: Index, images: np.ndarray, windows: np.ndarray
) -> tuple[gpu.Sources, torch.Tensor]:
    """Windows (B, 4) int64 (y0, x0, y1, x1) of ``images`` (B,) int64, rows of the ``index`` whose ``to`` put it on ``memory``'s device.

    ``memory`` (n,) uint8 has the bytes that were indexed. Returns the windows as RGB images, and a tensor (B,) int32 of error
    flags, 0 or bits of :data:`REASONS`; the pixels of a flagged image are of no use. Data are not trusted: nothing outside of
    a segment is read. All is done on the current stream, without waiting for it.
    """
    import torch

    packed = pack(index, images, windows, len(memory))
    if memory.dtype != torch.uint8 or memory.ndim != 1 or not memory.is_contiguous():
        raise ValueError(f"memory must be (n,) uint8 without gaps, got {memory.dtype} {tuple(memory.shape)}")
    if not isinstance(index.huffman, torch.Tensor) or index.huffman.device != memory.device:
        raise ValueError(f"the index must be on the memory's device: index.to({str(memory.device)!r})")
    pixels = memory.new_empty(packed.bytes)
    if gpu.runs_triton(memory):
        errors = _launch(memory, index, packed, pixels)
    else:
        from fastload.kernels import gpu_jpeg_reference

        errors = gpu_jpeg_reference.decode(memory, index, packed, pixels)
    shapes = packed.words[:, WINDOW + 2 : WINDOW + 4]
    return gpu.sources_in(pixels, packed.words[:, OUT], shapes), errors


def _launch(memory: torch.Tensor, index: Index, packed: Packed, pixels: torch.Tensor) -> torch.Tensor:
    import torch

    errors = memory.new_zeros(len(packed.words), dtype=torch.int32)
    if not len(packed.words):
        return errors
    kernels = gpu.triton_kernels("gpu_jpeg_triton")
    words, segments, lanes, blocks, tiles = gpu.upload(memory.device, packed[:5])
    coefficients = memory.new_zeros(packed.coefficients * 64, dtype=torch.int16)
    # Eight samples of a row are one number, which is stored at once.
    samples = memory.new_empty(packed.samples // 8, dtype=torch.int64)
    with gpu.on_device(memory):
        kernels.entropy_kernel[(len(packed.lanes),)](
            memory, words, segments, lanes, index.huffman, index.quant, coefficients, errors, LANES,
            num_warps=max(LANES // 32, 1),
        )  # fmt: skip
        kernels.transform_kernel[(len(packed.blocks),)](words, blocks, coefficients, samples, BLOCKS)
        kernels.colour_kernel[(len(packed.pixels),)](words, tiles, samples.view(torch.uint8), pixels, PIXELS)
    return errors


def pack(index: Index, images: np.ndarray, windows: np.ndarray, size: int) -> Packed:
    """Which segments, blocks and pixels the windows are, and where their results go; ``size`` bytes of memory are there."""
    images, windows = np.asarray(images, np.int64), np.asarray(windows, np.int64).reshape(-1, 4)
    _check(index, images, windows)
    count = len(images)
    words = np.zeros((count, COLUMNS), np.int64)
    grid, interval = index.grid[images].astype(np.int64), index.interval[images].astype(np.int64)
    shapes, halves = index.shapes[images].astype(np.int64), index.sampling[images].astype(np.int64) - 1
    grey = index.components[images] == 1
    # The first and last sample of chroma that the upsampling filter wants, in the pixels of the MCU grid. libjpeg does not
    # filter along rows of one or two samples.
    chroma = (shapes + halves) >> halves
    fancy = (halves > 0) & ((chroma[:, 1] > 2) | (halves[:, 1] == 0))[:, None]
    low = np.where(fancy, np.maximum(windows[:, :2] - 1, 0), windows[:, :2])
    high = np.where(fancy, np.minimum(windows[:, 2:] + 1, shapes), windows[:, 2:])
    least = low // (8 << halves)
    many = -(-high // (8 << halves)) - least  # MCUs down and across
    luma = (halves + 1).prod(1)
    words[:, MCU_BLOCKS], words[:, LUMA] = np.where(grey, 1, luma + 2), luma
    words[:, MCUS_DOWN], words[:, MCUS] = many.T
    words[:, ROW], words[:, COLUMN] = least.T
    words[:, MCUS_X], words[:, INTERVAL] = grid[:, 1], interval
    words[:, TABLES : TABLES + 9] = index.tables[images]
    words[:, HALF_Y], words[:, HALF_X] = halves.T
    words[:, FANCY_Y], words[:, FANCY_X] = fancy.T
    words[:, WINDOW : WINDOW + 2] = windows[:, :2]
    words[:, WINDOW + 2 : WINDOW + 4] = windows[:, 2:] - windows[:, :2]
    words[:, CHROMA : CHROMA + 2], words[:, GREY] = chroma, grey
    # An image's coefficients begin with a group of 32 blocks, and its pixels where vectors may.
    blocks = many.prod(1) * words[:, MCU_BLOCKS]
    pixels = words[:, WINDOW + 2] * words[:, WINDOW + 3]
    words[:, BLOCK], coefficients = _places(blocks, 32)
    words[:, PLANE], samples = _places(blocks * 64, 64)
    words[:, OUT], total = _places(pixels * 3, 16)

    # An upper bound of segments, whether or not they end with the rows.
    most = many[:, 0] * ((many[:, 1] - 1) // np.maximum(interval, 1) + 2)
    room, found = np.empty((int(most.max(initial=0)), 2), np.int64), np.empty(count, np.int64)
    segments = np.empty((int(most.sum()), 2), np.int64)
    used = _select(
        index.segments, index.first[images], index.starts[images], grid.prod(1), words, room, segments, found
    )
    segments = segments[:used]
    ends = np.cumsum(found)
    words[:, SEGMENTS_END] = ends
    if used and int((segments[:, 0] + (segments[:, 1] & 0xFFFF)).max()) > size:
        raise ValueError(f"the index is of more data than the {size} bytes of this memory")
    lanes = _programs(found, LANES)
    lanes += (ends - found)[lanes >> 32]
    # What takes longest begins first: the last program to end holds up all that follows.
    lanes = lanes[np.argsort(-(segments[lanes & 0xFFFFFFFF, 1] & 0xFFFF), kind="stable")]
    return Packed(
        words, segments, lanes, _programs(blocks, BLOCKS), _programs(pixels, PIXELS), coefficients, samples, total
    )  # fmt: skip


def _places(sizes: np.ndarray, unit: int) -> tuple[np.ndarray, int]:
    """Where things of ``sizes`` begin one behind the other, in whole units, and where all end."""
    ends = np.cumsum(-(-sizes // unit) * unit)
    return ends - -(-sizes // unit) * unit, int(ends[-1]) if len(ends) else 0


def _programs(sizes: np.ndarray, width: int) -> np.ndarray:
    """(P,) int64: image << 32 | first element of the programs that do ``sizes`` (B,) elements, ``width`` each."""
    programs = -(-sizes // width)
    first = np.arange(len(sizes)) << 32
    first -= (np.cumsum(programs) - programs) * width
    made = np.repeat(first, programs)
    made += np.arange(len(made)) * width
    return made


@kernel
def _select(begins, first, starts, totals, words, room, segments, found):
    """Fill ``segments`` (n, 2) with those under each image's MCUs, long ones first, and ``found`` (B,) with how many; returns all.

    ``room`` (m, 2) int64 is memory for an image's segments.
    """
    used = np.int64(0)
    rank = np.empty(_RANKS + 1, np.int64)
    for i in range(first.size):
        interval, across = words[i, INTERVAL], words[i, MCUS_X]
        left, top = words[i, COLUMN], words[i, ROW]
        right, bottom = left + words[i, MCUS], top + words[i, MCUS_DOWN]
        behind = np.int64(0)  # the segment behind the last one that is taken
        count, longest = np.int64(0), np.int64(1)
        for row in range(top, bottom):
            base = row * across
            start = max((base + left) // interval, behind)
            behind = (base + right - 1) // interval + 1
            for number in range(start, behind):
                at = first[i] + number
                mcu, end = number * interval, min((number + 1) * interval, totals[i])
                # The last of its MCUs that is wanted: none behind it is decoded.
                wanted = min(end, base + right)
                if end > base + across:  # it goes on in other rows
                    y, x = (end - 1) // across, (end - 1) % across
                    if y >= bottom:
                        y, x = bottom - 1, right - 1
                    elif x >= right:
                        x = right - 1
                    elif x < left:
                        y, x = y - 1, right - 1
                    wanted = y * across + x + 1
                size = np.int64(begins[at + 1]) - np.int64(begins[at]) - 2
                longest = max(longest, size)
                room[count, 0] = starts[i] + np.int64(begins[at])
                room[count, 1] = number << 33 | np.int64(wanted == end) << 32 | (wanted - mcu) << 16 | size
                count += 1
        # Lanes of a warp wait for one another: neighbours should have about as much to do.
        rank[:] = 0
        for k in range(count):
            rank[_RANKS - ((room[k, 1] & 0xFFFF) * (_RANKS - 1)) // longest] += 1
        for k in range(_RANKS):
            rank[k + 1] += rank[k]
        for k in range(count):
            bucket = _RANKS - ((room[k, 1] & 0xFFFF) * (_RANKS - 1)) // longest - 1
            to = used + rank[bucket]
            segments[to, 0], segments[to, 1] = room[k, 0], room[k, 1]
            rank[bucket] += 1
        used += count
        found[i] = count
    return used


def _check(index: Index, images: np.ndarray, windows: np.ndarray) -> None:
    """ValueError for images that the index does not have, and windows that are not in them."""
    if images.ndim != 1 or len(windows) != len(images):
        raise ValueError(f"each image needs a window, got {images.shape} and {windows.shape}")
    known = (images >= 0) & (images < len(index.ok))
    known[known] = index.ok[images[known]]
    if not known.all():
        i = int(np.argmin(known))
        raise ValueError(
            f"row {i}: image {images[i]} has no restart segments in the index; decode it otherwise, see Index.ok"
        )
    shapes = index.shapes[images]
    wrong = (windows[:, :2] < 0) | (windows[:, :2] >= windows[:, 2:]) | (windows[:, 2:] > shapes)
    if wrong.any():
        i = int(np.argmax(wrong.any(1)))
        raise ValueError(
            f"row {i}: window {windows[i].tolist()} is empty or outside of the image {shapes[i].tolist()}"
        )
