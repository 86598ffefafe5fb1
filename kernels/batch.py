"""A slice of a batch in one call without the GIL: crops of JPEGs and of stored pixels, recoloured, erased, normalised.

Each image is finished before the next one begins, so that it is worked on while it is in the cache. The trade-off: a row that
these kernels do not do (an unusual JPEG, damaged bytes) only gets a status, and is the caller's to do otherwise.

>>> fill(file, rows, sources, table, paint, out, floats, thread, status, clock)
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fastload.kernels import crops, pixels, raw
from fastload.kernels.crops import BAD_BOX, MORE_SCRATCH, OK, REASONS, UNSUPPORTED
from fastload.kernels.decode import Work, new_work
from fastload.kernels.jit import slow_kernel
from fastload.kernels.memory import address, nanoseconds

__all__ = [
    "BAD_BOX",
    "MORE_SCRATCH",
    "OK",
    "REASONS",
    "UNSUPPORTED",
    "Paint",
    "Rows",
    "Sources",
    "Thread",
    "fill",
    "new_thread",
]

# Columns of a clock: nanoseconds (its first row) and bytes (its second) of each step.
CROP, DECODE, RESIZE, COLOUR, NORMALISE = range(5)
STEPS = 5


class Sources(NamedTuple):
    """Where the images of a batch lie in a file, and how large they are."""

    starts: np.ndarray  # (B,) int64, negative: this row cannot be done
    sizes: np.ndarray  # (B,) int64
    raw: np.ndarray  # (B,) bool: pixels, not JPEG
    shapes: np.ndarray  # (B, 2) int64 height and width


class Rows(NamedTuple):
    """What is to be done to each row; see :class:`fastload.draws.Table`."""

    place: np.ndarray  # (B, 4) int64
    box: np.ndarray  # (B, 4) float64
    clip: np.ndarray  # (B, 4) int64
    flips: np.ndarray  # (B,) int64
    colour: np.ndarray  # (B, 3, 7) float32, or (0, 3, 7)
    coloured: np.ndarray  # (B,) bool
    erase: np.ndarray  # (B, K, 4) int64


class Paint(NamedTuple):
    """What is the same for all rows."""

    background: np.ndarray  # (3,) uint8
    erase_fill: np.ndarray  # (K, 3) uint8
    scale: np.ndarray  # (3,) float32
    shift: np.ndarray  # (3,) float32


class Thread(NamedTuple):
    """Memory of one thread."""

    work: Work
    scratch: np.ndarray  # (n,) uint8
    need: np.ndarray  # (1,) int64: the most scratch memory that a row asked for


def new_thread(size: int = 1 << 21) -> Thread:
    """Memory for a thread, with ``size`` bytes of scratch."""
    return Thread(new_work(), np.empty(size, np.uint8), np.zeros(1, np.int64))


@slow_kernel("the loader's kernel")
def fill(file, rows, sources, table, paint, out, floats, thread, status, clock):
    """Fill the rows ``rows`` (n,) int64 of ``out`` (B, H, W, 3) uint8 from a mapped ``file`` (size,) uint8.

    ``sources`` Sources, ``table`` Rows, ``paint`` Paint, ``thread`` Thread. ``floats`` (B, H, W, 3) float32 gets the normalised pixels,
    (0, H, W, 3): none are wanted. ``status`` (B,) int64 is written; a row whose status is not OK has pixels without meaning, and
    must be done again otherwise. ``clock`` (2, STEPS) int64, or (2, 0): the time and bytes of each step are added to it.
    """
    need = thread.need
    need[0] = 0
    asked = np.zeros(1, np.int64)
    wanted = floats.shape[0] > 0
    timed = clock.shape[1] > 0
    scales, shifts = pixels.tiled(paint.scale), pixels.tiled(paint.shift)
    for i in rows:
        y, x, height, width = table.place[i, 0], table.place[i, 1], table.place[i, 2], table.place[i, 3]
        start, size = sources.starts[i], sources.sizes[i]
        if (
            y < 0
            or x < 0
            or height < 0
            or width < 0
            or y + height > out.shape[1]
            or x + width > out.shape[2]
            or start < 0
            or size < 0
            or start > file.size
            or size > file.size - start
        ):
            status[i] = BAD_BOX
            continue
        begun = nanoseconds() if timed else 0
        image = out[i]
        if height < out.shape[1] or width < out.shape[2]:
            pixels.fill_outside(image, y, x, height, width, paint.background)
        window = image[y : y + height, x : x + width]
        full_height, full_width = sources.shapes[i, 0], sources.shapes[i, 1]
        if not sources.raw[i]:
            status[i] = crops.crop_to(
                file[start : start + size],
                full_height,
                full_width,
                table.box[i],
                table.clip[i],
                table.flips[i],
                window,
                thread.work,
                thread.scratch,
                asked,
                clock,
            )
        elif full_height * full_width * 3 > size:
            status[i] = BAD_BOX
        elif size + raw.OVERREAD > file.size - start:
            status[i] = UNSUPPORTED
        else:
            status[i] = raw.crop_pixels(
                address(file) + start,
                full_height,
                full_width,
                table.box[i],
                table.clip[i],
                table.flips[i],
                window,
                thread.scratch,
                asked,
            )
            if timed:
                clock[0, RESIZE] += nanoseconds() - begun
                box = table.box[i]
                clock[1, RESIZE] += max(np.int64((box[2] - box[0]) * (box[3] - box[1])) * 3, out[i].size)
        if status[i] == MORE_SCRATCH:
            need[0] = max(need[0], asked[0])
        if status[i] != OK:
            continue
        begun = nanoseconds() if timed else 0
        if table.colour.shape[0] and table.coloured[i]:
            pixels.recolour(image, table.colour[i])
        if table.erase.shape[1]:
            pixels.erase(image, table.erase[i], paint.erase_fill)
        coloured = nanoseconds() if timed else 0
        if wanted:
            pixels.normalise_image(image, scales, shifts, floats[i])
        if timed:
            if table.colour.shape[0] or table.erase.shape[1]:
                clock[0, COLOUR] += coloured - begun
                clock[1, COLOUR] += image.size
            if wanted:
                clock[0, NORMALISE] += nanoseconds() - coloured
                clock[1, NORMALISE] += 4 * image.size
