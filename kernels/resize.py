"""Resize a crop window: separable, antialiased bilinear, flips folded in; equal to Pillow's BILINEAR within one level.

Rows are blended first, then columns, four rows at a time; both loops are explicit vector code
(:mod:`fastload.kernels.simd`). Sources of three and of four channels cost the same.

>>> resize(source, (0.0, 0.0, 480.0, 640.0), (0, 0, 480, 640), out, 0)
"""

from __future__ import annotations

import numpy as np

from fastload.kernels.jit import kernel
from fastload.kernels.simd import blend_columns, blend_rgb, blend_rgbx

FLIP_HORIZONTAL, FLIP_VERTICAL = 1, 2


@kernel
def triangle_taps(start, stop, low, high, size, flip, first, weights):
    """Taps of one axis: output ``i`` of ``size`` is the sum of ``weights[i, k] * source[first[i] + k]``.

    The box is [start, stop) in source coordinates, taps stay in [low, high). ``first`` (size,) int64 and ``weights``
    (size, K) float32 are filled, unused taps with 0; returns the taps used, at most K.
    """
    scale = (stop - start) / size
    reach = max(scale, 1.0)
    most = weights.shape[1]
    used = 1
    for i in range(size):
        centre = start + (i + 0.5) * scale
        a = min(max(int(np.floor(centre - reach + 0.5)), low), high - 1)
        b = max(min(int(np.floor(centre + reach + 0.5)), high), a + 1)
        b = min(b, a + most)
        at = size - 1 - i if flip else i
        total = 0.0
        for k in range(b - a):
            total += max(1.0 - abs((a + k - centre + 0.5) / reach), 0.0)
        for k in range(most):
            weights[at, k] = 0.0
        if total > 0.0:
            for k in range(b - a):
                weights[at, k] = max(1.0 - abs((a + k - centre + 0.5) / reach), 0.0) / total
        else:  # the centre lies outside of [low, high): take the nearest pixel
            weights[at, 0] = 1.0
        first[at] = a
        used = max(used, b - a)
    return used


@kernel
def _blend_row(source, row, taps, weights, low, count, channels, lines, lane):
    """lines[:count, lane] = sum over k of weights[k] * source[row + k, low : low + count], pixels of four floats."""
    # Groups of four pixels as vectors; a three-channel group reads four bytes too many, so the last ones go singly.
    groups = max(count * channels - (4 if channels == 3 else 0), 0) // (4 * channels)
    start = source[row, low * channels :].ctypes.data
    if channels == 4:
        blend_rgbx(start, source.strides[0], taps, weights.ctypes.data, groups, lines[0, lane].ctypes.data)
    else:
        blend_rgb(start, source.strides[0], taps, weights.ctypes.data, groups, lines[0, lane].ctypes.data)
    for x in range(groups * 4, count):
        for c in range(3):
            total = np.float32(0.0)
            for k in range(taps):
                total += weights[k] * np.float32(source[row + k, (low + x) * channels + c])
            lines[x, lane, c] = total


@kernel
def _resize(source, channels, box, clip, out, flips):
    height, width = out.shape[0], out.shape[1]
    reach_y = max((box[2] - box[0]) / height, 1.0)
    reach_x = max((box[3] - box[1]) / width, 1.0)
    most_y = min(int(2 * reach_y) + 3, clip[2] - clip[0])
    most_x = min(int(2 * reach_x) + 3, clip[3] - clip[1])
    first_y, weights_y = np.empty(height, np.int64), np.empty((height, most_y), np.float32)
    first_x, weights_x = np.empty(width, np.int64), np.empty((width, most_x), np.float32)
    taps_y = triangle_taps(
        box[0], box[2], clip[0], clip[2], height, flips & FLIP_VERTICAL, first_y, weights_y
    )
    taps_x = triangle_taps(
        box[1], box[3], clip[1], clip[3], width, flips & FLIP_HORIZONTAL, first_x, weights_x
    )
    low, high = first_x[0], first_x[0]
    for x in range(width):
        low, high = min(low, first_x[x]), max(high, first_x[x])
    # Taps behind the clip have weight 0; the lines have room for them, rows are moved up so that they exist.
    count = min(high + taps_x, clip[3]) - low
    lines = np.zeros((high - low + taps_x, 4, 4), np.float32)
    line_at, weights_at = lines.ctypes.data, weights_x.ctypes.data
    four = np.zeros((4, 4), np.uint8)
    four_at = four.ctypes.data
    for y in range(0, height, 4):
        rows = min(4, height - y)
        for lane in range(rows):
            row = first_y[y + lane]
            _blend_row(
                source,
                row,
                min(taps_y, clip[2] - row),
                weights_y[y + lane],
                low,
                count,
                channels,
                lines,
                lane,
            )
        # A pixel is stored as four bytes, the fourth into its neighbour, which comes next: not so the last of a row.
        direct = width - 1 if rows == 4 else 0
        out_at = out[y].ctypes.data
        for x in range(direct):
            at = line_at + (first_x[x] - low) * 64
            blend_columns(at, taps_x, weights_at + x * most_x * 4, out_at + 3 * x, out.strides[0])
        for x in range(direct, width):
            at = line_at + (first_x[x] - low) * 64
            blend_columns(at, taps_x, weights_at + x * most_x * 4, four_at, 4)
            for lane in range(rows):
                for c in range(3):
                    out[y + lane, x, c] = four[lane, c]
    # numba frees an array after its last mention, and an address is none: mention those whose addresses were used.
    return lines.size + weights_x.size + four.size


def resize(
    source: np.ndarray,
    box: tuple[float, float, float, float],
    clip: tuple[int, int, int, int],
    out: np.ndarray,
    flips: int = 0,
) -> None:
    """Fill ``out`` (h, w, 3) uint8 with the window ``box`` of ``source`` (H, W, C) uint8, C 3 or 4 (the fourth ignored).

    ``box`` is (y0, x0, y1, x1) in source pixels, fractions allowed. Pixels are taken from ``clip`` (y0, x0, y1, x1) only:
    the whole image gives Pillow's ``resize(box=...)``, the box itself gives crop-then-resize. ``flips`` is a sum of
    FLIP_HORIZONTAL and FLIP_VERTICAL. Raises ValueError for a clip that is empty or outside of the source.
    """
    height, width, channels = source.shape
    if not (0 <= clip[0] < clip[2] <= height and 0 <= clip[1] < clip[3] <= width):
        raise ValueError(f"clip {clip} is empty or outside of a source of {height} x {width}")
    if not (box[2] > box[0] and box[3] > box[1]) or channels not in (3, 4) or out.shape[2] != 3:
        raise ValueError(f"cannot resize box {box} of {source.shape} to {out.shape}")
    if (
        out.strides[1:] != (3, 1)
        or not source.flags.c_contiguous
        or {out.dtype, source.dtype} != {np.dtype(np.uint8)}
    ):
        raise ValueError("resize needs a contiguous uint8 source and an output whose rows are contiguous")
    _resize(
        source.reshape(height, width * channels),
        channels,
        (float(box[0]), float(box[1]), float(box[2]), float(box[3])),
        (int(clip[0]), int(clip[1]), int(clip[2]), int(clip[3])),
        out,
        flips,
    )


@kernel
def copy_window(source, y, x, out, flips):
    """Fill ``out`` (h, w, 3) with ``source[y : y + h, x : x + w, :3]``, flipped as asked; the window must be inside."""
    height, width = out.shape[0], out.shape[1]
    for i in range(height):
        row = source[y + i]
        to = out[height - 1 - i] if flips & FLIP_VERTICAL else out[i]
        if flips & FLIP_HORIZONTAL:
            for j in range(width):
                for c in range(3):
                    to[width - 1 - j, c] = row[x + j, c]
        else:
            for j in range(width):
                for c in range(3):
                    to[j, c] = row[x + j, c]
