"""Work on finished uint8 images: colour matrix, filled and erased boxes, conversion to normalised floats, mixing.

Images are (H, W, 3) uint8 inside of a batch (B, H, W, 3), which a channels_last tensor sees as NCHW.

>>> recolour(image, matrix)  # in place
"""

from __future__ import annotations

import numpy as np

from fastload.kernels.jit import kernel
from fastload.kernels.memory import address, part
from fastload.kernels.simd import normalise48


@kernel
def recolour(image, matrix):
    """Apply ``matrix`` (3, 7) float32 in place: 3 columns for the pixel, 3 for the image's channel means, 1 constant.

    Results are rounded and cut to 0..255. The means are those of the image before, over all of its pixels.
    """
    height, width = image.shape[0], image.shape[1]
    total = np.zeros(3, np.int64)
    for y in range(height):
        row = image[y]
        for x in range(width):
            total[0] += row[x, 0]
            total[1] += row[x, 1]
            total[2] += row[x, 2]
    base = np.empty(3, np.float32)
    count = max(height * width, 1)
    for c in range(3):
        value = np.float64(matrix[c, 6])
        for k in range(3):
            value += np.float64(matrix[c, 3 + k]) * (total[k] / count)
        base[c] = np.float32(value)
    half, top, zero = np.float32(0.5), np.float32(255.0), np.float32(0.0)
    for y in range(height):
        row = image[y]
        for x in range(width):
            r, g, b = np.float32(row[x, 0]), np.float32(row[x, 1]), np.float32(row[x, 2])
            for c in range(3):
                v = matrix[c, 0] * r + matrix[c, 1] * g + matrix[c, 2] * b + base[c]
                row[x, c] = np.uint8(min(max(v + half, zero), top))


@kernel
def fill_outside(image, y, x, height, width, fill):
    """Paint everything outside of the rectangle with ``fill`` (3,) uint8."""
    for i in range(image.shape[0]):
        inside = y <= i < y + height
        for j in range(x if inside else image.shape[1]):
            for c in range(3):
                image[i, j, c] = fill[c]
        for j in range(x + width if inside else image.shape[1], image.shape[1]):
            for c in range(3):
                image[i, j, c] = fill[c]


@kernel
def erase(image, boxes, fills):
    """Paint each of ``boxes`` (K, 4) int64 (y0, x0, y1, x1, inside of the image) with its row of ``fills`` (K, 3) uint8."""
    for k in range(boxes.shape[0]):
        for i in range(boxes[k, 0], boxes[k, 2]):
            for j in range(boxes[k, 1], boxes[k, 3]):
                for c in range(3):
                    image[i, j, c] = fills[k, c]


@kernel
def normalise(images, scale, shift, out):
    """out = images * scale + shift in each channel: (B, H, W, 3) uint8 to float32, ``scale`` and ``shift`` (3,) float32."""
    scales, shifts = tiled(scale), tiled(shift)
    for b in range(images.shape[0]):
        normalise_image(images[b], scales, shifts, out[b])


@part
def tiled(values):
    """``values`` (3,) for each of 16 pixels, (48,) float32."""
    result = np.empty(48, np.float32)
    for j in range(48):
        result[j] = values[j % 3]
    return result


@part
def normalise_image(image, scales, shifts, out):
    """One image (H, W, 3), contiguous, for :func:`normalise`, with :func:`tiled` scale and shift."""
    source, target = image.reshape(image.size), out.reshape(image.size)
    groups = source.size // 48
    normalise48(address(source), address(scales), address(shifts), groups, address(target))
    for i in range(48 * groups, source.size):
        target[i] = np.float32(source[i]) * scales[i % 3] + shifts[i % 3]


@kernel
def _mixed(own, other, weight, rounding):
    return own * weight + other * (np.float32(1.0) - weight) + rounding


@kernel
def mix(images, weights, boxes, rounding):
    """Blend each image of the batch (B, H, W, 3), uint8 or float32, with its partner B - 1 - i, in place.

    ``weights`` (B,) float32 is an image's own share; a row of ``boxes`` (B, 4) that is not empty means CutMix: the
    partner's pixels inside of the box, the own outside. ``rounding`` is 0.5 for uint8, 0 for floats.
    """
    count = images.shape[0]
    width = images.shape[2]
    for i in range(count // 2):
        j = count - 1 - i
        cut_i = boxes[i, 2] > boxes[i, 0] and boxes[i, 3] > boxes[i, 1]
        cut_j = boxes[j, 2] > boxes[j, 0] and boxes[j, 3] > boxes[j, 1]
        # A CutMix row without an area left has weight 1 and is blended with weight 1: unchanged.
        for y in range(images.shape[1]):
            for x in range(width):
                in_i = cut_i and boxes[i, 0] <= y < boxes[i, 2] and boxes[i, 1] <= x < boxes[i, 3]
                in_j = cut_j and boxes[j, 0] <= y < boxes[j, 2] and boxes[j, 1] <= x < boxes[j, 3]
                for c in range(3):
                    a, b = images[i, y, x, c], images[j, y, x, c]
                    if cut_i:
                        if in_i:
                            images[i, y, x, c] = b
                    else:
                        images[i, y, x, c] = _mixed(np.float32(a), np.float32(b), weights[i], rounding)
                    if cut_j:
                        if in_j:
                            images[j, y, x, c] = a
                    else:
                        images[j, y, x, c] = _mixed(np.float32(b), np.float32(a), weights[j], rounding)
