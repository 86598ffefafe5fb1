"""Resize a crop window: separable, antialiased bilinear, flips folded in; equal to Pillow's BILINEAR within one level.

Rows are blended first (a loop over contiguous bytes that vectorises), then columns, four channels at a time where the
source has four: decoding to RGBX instead of RGB pays for itself here.

>>> resize(source, (0.0, 0.0, 480.0, 640.0), (0, 0, 480, 640), out, 0)
"""

from __future__ import annotations

import numpy as np

from fastload.kernels.jit import kernel

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
def _level(value):
    return np.uint8(min(max(value + np.float32(0.5), np.float32(0.0)), np.float32(255.0)))


@kernel
def _blend_rows(source, row, taps, weights, low, count, line):
    """line[:count] = sum over k of weights[k] * source[row + k, low : low + count], float32."""
    last = source.shape[0] - 1
    for base in range(0, taps, 4):
        # Four rows at a time; weights past the last tap are 0, and their rows only must exist.
        w0, w1 = weights[base], weights[base + 1]
        w2, w3 = weights[base + 2], weights[base + 3]
        r0 = source[min(row + base, last), low : low + count]
        r1 = source[min(row + base + 1, last), low : low + count]
        r2 = source[min(row + base + 2, last), low : low + count]
        r3 = source[min(row + base + 3, last), low : low + count]
        if base == 0:
            for i in range(count):
                line[i] = (w0 * np.float32(r0[i]) + w1 * np.float32(r1[i])) + (
                    w2 * np.float32(r2[i]) + w3 * np.float32(r3[i])
                )
        else:
            for i in range(count):
                line[i] += (w0 * np.float32(r0[i]) + w1 * np.float32(r1[i])) + (
                    w2 * np.float32(r2[i]) + w3 * np.float32(r3[i])
                )


@kernel
def _resize(source, channels, box, clip, out, flips):
    height, width = out.shape[0], out.shape[1]
    reach_y = max((box[2] - box[0]) / height, 1.0)
    reach_x = max((box[3] - box[1]) / width, 1.0)
    # Rounded up to groups of four: see _blend_rows.
    most_y = min((int(2 * reach_y) + 2 + 3) // 4 * 4, max((clip[2] - clip[0] + 3) // 4 * 4, 4))
    most_x = min(int(2 * reach_x) + 2, max(clip[3] - clip[1], 1))
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
    count = (min(high + taps_x, clip[3]) - low) * channels
    line = np.zeros((count + taps_x * channels), np.float32)
    for y in range(height):
        _blend_rows(source, first_y[y], taps_y, weights_y[y], low * channels, count, line)
        row = out[y]
        if channels == 4:
            for x in range(width):
                at = (first_x[x] - low) * 4
                s0 = s1 = s2 = s3 = np.float32(0.0)
                for k in range(taps_x):
                    w = weights_x[x, k]
                    s0 += w * line[at]
                    s1 += w * line[at + 1]
                    s2 += w * line[at + 2]
                    s3 += w * line[at + 3]
                    at += 4
                row[x, 0], row[x, 1], row[x, 2] = _level(s0), _level(s1), _level(s2)
        else:
            for x in range(width):
                at = (first_x[x] - low) * 3
                s0 = s1 = s2 = np.float32(0.0)
                for k in range(taps_x):
                    w = weights_x[x, k]
                    s0 += w * line[at]
                    s1 += w * line[at + 1]
                    s2 += w * line[at + 2]
                    at += 3
                row[x, 0], row[x, 1], row[x, 2] = _level(s0), _level(s1), _level(s2)


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
