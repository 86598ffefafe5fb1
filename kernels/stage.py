"""Bring the crops of a slice of a batch together in one buffer, for a GPU to fetch: cut JPEGs, rows of stored pixels, decoded windows.

Each function does many rows in one call without the GIL. The trade-off: a row that cannot be done only gets a status, and is the
caller's to do otherwise. Addresses come from a file and are checked; windows and places are the caller's, and must fit.

>>> cut_rows(file, rows, sources, windows, out, places, found, status)
"""

from __future__ import annotations

import numpy as np

from fastload.kernels import crops, jpeg
from fastload.kernels.crops import BAD_BOX, MORE_SCRATCH, OK
from fastload.kernels.jit import kernel, slow_kernel
from fastload.kernels.memory import part

__all__ = ["BAD_BOX", "MORE_SCRATCH", "OK", "copy_rows", "cut_rows", "decode_rows"]


@part
def _inside(file, start, size):
    return 0 <= start <= file.size and 0 <= size <= file.size - start


@part
def _holds(window, shape):
    """Whether a window (4,) of y0, x0, y1, x1 is a part of the image."""
    return 0 <= window[0] < window[2] <= shape[0] and 0 <= window[1] < window[3] <= shape[1]


@kernel
def cut_rows(file, rows, sources, windows, out, places, found, status):
    """Write a JPEG of at least the window of each of ``rows`` (n,) int64 to ``out`` (m,) uint8 at ``places`` (B,) int64.

    ``file`` (size,) uint8 and ``sources`` (:class:`fastload.kernels.batch.Sources`) say where they are; each place has room for the
    whole JPEG. ``windows`` (B, 4) int64 are y0, x0, y1, x1, and may reach out of the image. ``found`` (B, 5) int64 gets the length and
    the y, x, height, width that are really there, ``status`` (B,) int64 OK or what is wrong.
    """
    for i in rows:
        start, size = sources.starts[i], sources.sizes[i]
        if not _inside(file, start, size):
            status[i] = BAD_BOX
            continue
        data, to = file[start : start + size], out[places[i] : places[i] + size]
        height, width = sources.shapes[i, 0], sources.shapes[i, 1]
        y0, x0, y1, x1 = windows[i, 0], windows[i, 1], windows[i, 2], windows[i, 3]
        status[i] = jpeg.cut(data, height, width, y0, x0, y1, x1, to, found[i])
        if status[i] == jpeg.WHOLE:
            to[:] = data
            found[i, 0], found[i, 1], found[i, 2], found[i, 3], found[i, 4] = size, 0, 0, height, width
            status[i] = OK


@kernel
def copy_rows(file, rows, sources, windows, out, places, status):
    """Write the window of each of ``rows`` of stored pixels to ``out`` at ``places``, (h, w, 3) without gaps; see :func:`cut_rows`."""
    for i in rows:
        start, size = sources.starts[i], sources.sizes[i]
        height, width = sources.shapes[i, 0], sources.shapes[i, 1]
        if (
            not _inside(file, start, size)
            or 3 * height * width > size
            or not _holds(windows[i], sources.shapes[i])
        ):
            status[i] = BAD_BOX
            continue
        at, length = places[i], 3 * (windows[i, 3] - windows[i, 1])
        for y in range(windows[i, 0], windows[i, 2]):
            source = start + 3 * (y * width + windows[i, 1])
            out[at : at + length] = file[source : source + length]
            at += length
        status[i] = OK


@slow_kernel("the decoder of windows")
def decode_rows(file, rows, sources, windows, out, places, thread, status):
    """Decode the window of each of ``rows`` to ``out`` at ``places``, (h, w, 3) without gaps; see :func:`cut_rows`.

    ``thread`` is a :class:`fastload.kernels.batch.Thread`, whose ``need`` gets the most scratch memory that a row asked for. Pixels do
    not depend on the window.
    """
    thread.need[0] = 0
    asked, no_clock = np.zeros(1, np.int64), np.zeros((2, 0), np.int64)
    box, clip = np.empty(4, np.float64), np.zeros(4, np.int64)
    for i in rows:
        start, size = sources.starts[i], sources.sizes[i]
        if not _inside(file, start, size) or not _holds(windows[i], sources.shapes[i]):
            status[i] = BAD_BOX
            continue
        height, width = windows[i, 2] - windows[i, 0], windows[i, 3] - windows[i, 1]
        image = out[places[i] : places[i] + 3 * height * width].reshape(height, width, 3)
        box[:] = windows[i]
        clip[2], clip[3] = sources.shapes[i, 0], sources.shapes[i, 1]
        status[i] = crops.crop_to(
            file[start : start + size],
            clip[2],
            clip[3],
            box,
            clip,
            0,
            image,
            thread.work,
            thread.scratch,
            asked,
            no_clock,
        )
        if status[i] == MORE_SCRATCH:
            thread.need[0] = max(thread.need[0], asked[0])
