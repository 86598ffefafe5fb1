"""The device side of :mod:`fastload.kernels.gpu`: Triton code, imported by that module alone, when it first launches something.

A lane makes the three channels of a pixel, so that weights and addresses of taps are worked out once for all three, and the
colour matrix needs no neighbour. The trade-off: in channels_last memory a store is one element in three, and three of them make
whole lines in the L2 cache only. Lanes of one element each (x * 3 + c) store whole lines, and spend 17 instructions instead of 11
on a tap of an element (counted in code for the H100), where instructions are what limits the kernel.

>>> crop_kernel[(tiles, images)](words, reals, paint, sums, out, ...)  # by fastload.kernels.gpu.crop
"""

from __future__ import annotations

import triton
import triton.language as tl

# Columns of ``words`` (B, WORDS + 4K) int64, which fastload.kernels.gpu.pack writes; an axis is low, high, taps. COLOURED is 1 where the
# colours change, 3 where they ask for the image's means, too.
POINTER, ROW, PIXEL, CHANNEL, PLACE, FLIPS, COLOURED, AXIS_Y, AXIS_X, WORDS = (
    tl.constexpr(column) for column in (0, 1, 2, 3, 4, 8, 9, 10, 13, 16)
)
# Columns of ``reals`` (B, REALS) float32: start, scale, reach and slope of y, of x, then the colour matrix.
REAL_Y, REAL_X, COLOUR, REALS = (tl.constexpr(column) for column in (0, 4, 8, 29))
# Places in ``paint`` (PAINT + 3K,) float32: background, scale, shift, the colour of each eraser.
SCALE, SHIFT, PAINT = (tl.constexpr(place) for place in (3, 6, 9))


@triton.jit
def _word(words, column):
    return tl.load(words + column).to(tl.int32)


@triton.jit
def _axis(at, words, reals):
    """The taps of one axis for the output positions ``at``: the first, its distance from the centre, how many pixels are left, the slope.

    Where no tap has weight, the centre is moved so that the nearest pixel has all.
    """
    low, high = _word(words, 0), _word(words, 1)
    reach = tl.load(reals + 2)
    centre = tl.load(reals) + (at.to(tl.float32) + 0.5) * tl.load(reals + 1)
    centre = tl.minimum(tl.maximum(centre, low + 1.0 - reach), high - 1.0 + reach)
    first = tl.maximum(tl.floor(centre - reach + 0.5).to(tl.int32), low)
    return first, first.to(tl.float32) + 0.5 - centre, high - first, tl.load(reals + 3)


@triton.jit
def _levels(words, reals, paint, y, x):
    """The resized crop, rounded, or the background around it, at the output's pixels ``y``, ``x``: 0 to 255 as float32.

    ``y`` outside of the output is outside of the crop, too.
    """
    y -= _word(words, PLACE)
    x -= _word(words, PLACE + 1)
    height, width, flips = _word(words, PLACE + 2), _word(words, PLACE + 3), _word(words, FLIPS)
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    x = tl.where((flips & 1) != 0, width - 1 - x, x)
    y = tl.where((flips & 2) != 0, height - 1 - y, y)
    first_y, distance_y, room_y, slope_y = _axis(y, words + AXIS_Y, reals + REAL_Y)
    first_x, distance_x, room_x, slope_x = _axis(x, words + AXIS_X, reals + REAL_X)
    taps_y, taps_x = _word(words, AXIS_Y + 2), _word(words, AXIS_X + 2)

    # An image is smaller than 2 GiB: only its address needs 64 bits.
    row_stride, pixel_stride, channel_stride = _word(words, ROW), _word(words, PIXEL), _word(words, CHANNEL)
    source = tl.load(words + POINTER).to(tl.pointer_type(tl.uint8))
    green_source, blue_source = source + channel_stride, source + 2 * channel_stride
    at = first_y * row_stride + first_x * pixel_stride
    red, green, blue = tl.zeros_like(distance_y), tl.zeros_like(distance_y), tl.zeros_like(distance_y)
    total = tl.zeros_like(distance_y)
    for j in range(taps_y):
        # The triangle at tap j of this axis; a function of its own would cost Triton's interpreter a millisecond a call.
        weight_y = tl.maximum(1.0 - tl.abs(distance_y + j) * slope_y, 0.0)
        weight_y = tl.where(inside & (j < room_y), weight_y, 0.0)
        row = at + j * row_stride
        for k in range(taps_x):
            weight = weight_y * tl.maximum(1.0 - tl.abs(distance_x + k) * slope_x, 0.0)
            weight = tl.where(k < room_x, weight, 0.0)
            total += weight
            tap, seen = row + k * pixel_stride, weight > 0.0  # nothing else is read: it may not be ours
            red += weight * tl.load(source + tap, mask=seen).to(tl.float32)
            green += weight * tl.load(green_source + tap, mask=seen).to(tl.float32)
            blue += weight * tl.load(blue_source + tap, mask=seen).to(tl.float32)
    share = 1.0 / total
    red = tl.where(inside, tl.floor(red * share + 0.5), tl.load(paint))
    green = tl.where(inside, tl.floor(green * share + 0.5), tl.load(paint + 1))
    blue = tl.where(inside, tl.floor(blue * share + 0.5), tl.load(paint + 2))
    return red, green, blue


@triton.jit
def _add(sums, levels, used):
    tl.atomic_add(sums, tl.sum(tl.where(used, levels, 0.0).to(tl.int32), axis=0).to(tl.int64))


@triton.jit
def sums_kernel(
    words, reals, paint, sums, COLUMNS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Add to ``sums`` (B, 3) int64 the levels of each channel of the images that ask for it. Whole numbers: no order changes them."""
    image = tl.program_id(1).to(tl.int64)
    words += image * COLUMNS
    if tl.load(words + COLOURED) > 1:
        pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        used = pixel < HEIGHT * WIDTH
        red, green, blue = _levels(words, reals + image * REALS, paint, pixel // WIDTH, pixel % WIDTH)
        _add(sums + image * 3, red, used)
        _add(sums + image * 3 + 1, green, used)
        _add(sums + image * 3 + 2, blue, used)


@triton.jit
def _recolour(matrix, sums, count: tl.constexpr, red, green, blue):
    """One channel by its row of the matrix: pixel, means, constant."""
    base = tl.load(matrix + 6)
    for k in tl.static_range(3):
        base += tl.load(matrix + 3 + k) * (tl.load(sums + k).to(tl.float32) / count)
    level = tl.load(matrix) * red + tl.load(matrix + 1) * green + tl.load(matrix + 2) * blue + base
    return tl.floor(tl.minimum(tl.maximum(level + 0.5, 0.0), 255.0))


@triton.jit
def crop_kernel(
    words, reals, paint, sums, out,
    COLUMNS: tl.constexpr, ERASERS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    LAST: tl.constexpr, NORMALISE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of ``out``: resized, recoloured, erased and normalised in registers, and stored once."""
    image = tl.program_id(1).to(tl.int64)
    words += image * COLUMNS
    reals += image * REALS
    # A lane has pixels apart, neighbours are in neighbouring lanes: without the hint, contiguous stores would want another
    # layout than the loads have, and the two would be exchanged through shared memory at every tap.
    pixel = tl.max_contiguous(tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), 1)
    y, x = pixel // WIDTH, pixel % WIDTH
    red, green, blue = _levels(words, reals, paint, y, x)
    if tl.load(words + COLOURED) != 0:
        matrix = reals + COLOUR
        mean = sums + image * 3
        new_red = _recolour(matrix, mean, HEIGHT * WIDTH, red, green, blue)
        new_green = _recolour(matrix + 7, mean, HEIGHT * WIDTH, red, green, blue)
        blue = _recolour(matrix + 14, mean, HEIGHT * WIDTH, red, green, blue)
        red, green = new_red, new_green
    for k in tl.static_range(ERASERS):
        box, fill = words + WORDS + 4 * k, paint + PAINT + 3 * k
        erased = (y >= _word(box, 0)) & (x >= _word(box, 1)) & (y < _word(box, 2)) & (x < _word(box, 3))
        red = tl.where(erased, tl.load(fill), red)
        green = tl.where(erased, tl.load(fill + 1), green)
        blue = tl.where(erased, tl.load(fill + 2), blue)
    if NORMALISE:
        red = red * tl.load(paint + SCALE) + tl.load(paint + SHIFT)
        green = green * tl.load(paint + SCALE + 1) + tl.load(paint + SHIFT + 1)
        blue = blue * tl.load(paint + SCALE + 2) + tl.load(paint + SHIFT + 2)
    used = pixel < HEIGHT * WIDTH
    plane: tl.constexpr = 1 if LAST else HEIGHT * WIDTH
    out += image * (3 * HEIGHT * WIDTH) + (pixel * 3 if LAST else pixel)
    tl.store(out, red.to(out.dtype.element_ty), mask=used)
    tl.store(out + plane, green.to(out.dtype.element_ty), mask=used)
    tl.store(out + 2 * plane, blue.to(out.dtype.element_ty), mask=used)


@triton.jit
def _cut(boxes, image, y, x):
    """Whether the image's box holds anything, and which pixels lie in it."""
    y0, x0 = tl.load(boxes + 4 * image), tl.load(boxes + 4 * image + 1)
    y1, x1 = tl.load(boxes + 4 * image + 2), tl.load(boxes + 4 * image + 3)
    return (y1 > y0) & (x1 > x0), (y >= y0) & (y < y1) & (x >= x0) & (x < x1)


@triton.jit
def _blend(own, other, weight, cut, within, ROUNDING: tl.constexpr):
    mixed = own * weight + other * (1.0 - weight)
    if ROUNDING:
        mixed = tl.floor(mixed + 0.5)
    return tl.where(cut, tl.where(within, other, own), mixed)


@triton.jit
def mix_kernel(
    images, weights, boxes, count,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, LAST: tl.constexpr, ROUNDING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of image i and of its partner ``count`` - 1 - i: both are read before either is written."""
    size: tl.constexpr = 3 * HEIGHT * WIDTH
    i = tl.program_id(1).to(tl.int64)
    j = count - 1 - i
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    used = place < size
    pixel = place // 3 if LAST else place % (HEIGHT * WIDTH)
    y, x = pixel // WIDTH, pixel % WIDTH
    a = tl.load(images + i * size + place, mask=used, other=0).to(tl.float32)
    b = tl.load(images + j * size + place, mask=used, other=0).to(tl.float32)
    cut_i, within_i = _cut(boxes, i, y, x)
    cut_j, within_j = _cut(boxes, j, y, x)
    new_a = _blend(a, b, tl.load(weights + i), cut_i, within_i, ROUNDING)
    new_b = _blend(b, a, tl.load(weights + j), cut_j, within_j, ROUNDING)
    tl.store(images + i * size + place, new_a.to(images.dtype.element_ty), mask=used)
    tl.store(images + j * size + place, new_b.to(images.dtype.element_ty), mask=used)
