"""The device side of :mod:`fastload.kernels.gpu_jpeg`: Triton code, imported by that module alone, when it first launches something.

Three launches: entropy decoding (a lane is a restart segment), inverse DCT (a lane is a block), upsampling and colour (a lane is a
pixel). The trade-off is memory for simplicity: coefficients go through memory once, since Triton has no shared memory to index, and
a lane of the first kernel is a lane of its own work only. Coefficients lie in groups of 32 blocks, place by place, so that the
lanes of the second kernel read whole lines; for the first one, whose lanes are far apart anyway, all places cost the same.

All of a program's work is of one image: what it needs of that image is in scalars.

>>> entropy_kernel[(programs,)](memory, words, segments, lanes, ...)  # by fastload.kernels.gpu_jpeg.decode
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastload.kernels import gpu_jpeg

# Columns of ``words`` (B, COLUMNS) int64, which fastload.kernels.gpu_jpeg.pack writes.
BLOCK, MCU_BLOCKS, LUMA, MCUS = (
    tl.constexpr(c) for c in (gpu_jpeg.BLOCK, gpu_jpeg.MCU_BLOCKS, gpu_jpeg.LUMA, gpu_jpeg.MCUS)
)
MCUS_DOWN, MCUS_X, COLUMN, ROW = (
    tl.constexpr(c) for c in (gpu_jpeg.MCUS_DOWN, gpu_jpeg.MCUS_X, gpu_jpeg.COLUMN, gpu_jpeg.ROW)
)
INTERVAL, SEGMENTS_END, TABLES, PLANE = (
    tl.constexpr(c) for c in (gpu_jpeg.INTERVAL, gpu_jpeg.SEGMENTS_END, gpu_jpeg.TABLES, gpu_jpeg.PLANE)
)
HALF_X, HALF_Y, FANCY_X, FANCY_Y = (
    tl.constexpr(c) for c in (gpu_jpeg.HALF_X, gpu_jpeg.HALF_Y, gpu_jpeg.FANCY_X, gpu_jpeg.FANCY_Y)
)
WINDOW, OUT, CHROMA, GREY, COLUMNS = (
    tl.constexpr(c) for c in (gpu_jpeg.WINDOW, gpu_jpeg.OUT, gpu_jpeg.CHROMA, gpu_jpeg.GREY, gpu_jpeg.COLUMNS)
)
BAD_CODE, OVERRUN, TOO_MUCH, BAD_MARKER = (
    tl.constexpr(c) for c in (gpu_jpeg.BAD_CODE, gpu_jpeg.OVERRUN, gpu_jpeg.TOO_MUCH, gpu_jpeg.BAD_MARKER)
)
STEPS = tl.constexpr(8)  # symbols between two looks whether any lane still has work


@triton.jit
def _word(words, column):
    return tl.load(words + column).to(tl.int32)


@triton.jit
def entropy_kernel(memory, words, segments, lanes, huffman, quant, coefficients, errors, LANES: tl.constexpr):
    """Decode a segment in each lane, and store what is not 0 of the blocks under the window, dequantised, to ``coefficients``.

    One step of the loop is one Huffman symbol, whatever it is and to whichever block it belongs, so that no lane waits for
    the others' blocks. It ends: a lane that has 32 bits takes one or more of them or stops, one that has not reads two bytes; behind
    its end it reads zeros, and stops when it has taken one.
    """
    program = tl.load(lanes + tl.program_id(0))
    image, start = program >> 32, program & 0xFFFFFFFF
    words += image * COLUMNS
    mcu_blocks, luma = _word(words, MCU_BLOCKS), _word(words, LUMA)
    mcus, mcus_down, mcus_x = _word(words, MCUS), _word(words, MCUS_DOWN), _word(words, MCUS_X)
    column = _word(words, COLUMN)
    dc_0, dc_1, dc_2 = _word(words, TABLES), _word(words, TABLES + 1), _word(words, TABLES + 2)
    ac_0, ac_1, ac_2 = _word(words, TABLES + 3), _word(words, TABLES + 4), _word(words, TABLES + 5)
    steps_0, steps_1, steps_2 = (
        _word(words, TABLES + 6),
        _word(words, TABLES + 7),
        _word(words, TABLES + 8),
    )
    coefficients += tl.load(words + BLOCK) * 64

    lane = start + tl.arange(0, LANES)
    active = lane < tl.load(words + SEGMENTS_END)
    row = segments + 2 * lane
    address = memory.to(tl.int64) + tl.load(row, mask=active, other=0)
    todo = tl.load(row + 1, mask=active, other=0)
    left, complete = (todo >> 16).to(tl.int32) & 0xFFFF, ((todo >> 32) & 1) != 0
    mcu = (todo >> 33).to(tl.int32) * _word(words, INTERVAL)
    x, y = mcu % mcus_x - column, mcu // mcus_x - _word(words, ROW)
    # Two bytes at a time, from an even address: at odd ones that is a byte of the marker or header in front of the segment, and at
    # its end there may be one of the marker behind it. Neither is used.
    zero = tl.zeros([LANES], tl.int32)
    odd = (address & 1).to(tl.int32)
    source = (address - odd).to(tl.pointer_type(tl.int16))
    size = (todo & 0xFFFF).to(tl.int32) + odd
    # All lines of the segments come to the cache at once, or a warp would wait for memory whenever one of its lanes meets a new one.
    touched = zero
    for ahead in range(0, tl.max(size, axis=0), 32):
        touched += tl.load(source + (ahead >> 1), mask=active & (ahead < size), other=0)
    active = active & (touched != -(2**31))  # never: it keeps the loads

    bits, have = zero.to(tl.int64), zero  # unread bits, the last `have` of a number, at most 64
    at = zero  # bytes taken
    pair = tl.load(source, mask=active & (size > 0), other=0)  # the next two
    # A byte that is not ours looks like stuffing.
    before, pair = tl.where(odd != 0, 255, 0), tl.where(odd != 0, pair & -256, pair)
    b, k, error = zero, zero, zero  # block of the MCU, coefficient of the block
    level_0, level_1, level_2 = zero, zero, zero  # DC of the component's last block
    while tl.max(active.to(tl.int32), axis=0) > 0:
        for _ in range(STEPS):
            # Of two bytes, 00 behind FF is stuffing. They are 0 behind the end, and where none are wanted.
            wanted = active & (have <= 48)
            byte_0 = tl.where(wanted, pair.to(tl.int32) & 255, 0)
            byte_1 = tl.where(wanted & (at + 1 < size), (pair.to(tl.int32) >> 8) & 255, 0)
            wrong = ((before == 255) & (byte_0 != 0)) | ((byte_0 == 255) & (byte_1 != 0))
            error |= tl.where(wrong, BAD_MARKER, 0)
            new_0, new_1 = tl.where(wanted & (before != 255), 8, 0), tl.where(wanted & (byte_0 != 255), 8, 0)
            bits = (bits << (new_0 + new_1)) | ((byte_0 << new_1) | byte_1)
            have += new_0 + new_1
            before = tl.where(wanted, byte_1, before)
            at += tl.where(wanted, 2, 0)
            # Nothing waits for the next two until the next step.
            kept = tl.where(wanted, 0, pair.to(tl.int32)).to(tl.int16)
            pair = tl.load(source + (at >> 1), mask=wanted & (at < size), other=kept)

            # A code is at most 16 bits, its value as many.
            ready = active & (have >= 32)
            word = (bits >> tl.maximum(have - 32, 0)).to(tl.int32)
            first = k == 0
            c = tl.maximum(b - luma + 1, 0)
            dc = tl.where(c == 0, dc_0, tl.where(c == 1, dc_1, dc_2))
            ac = tl.where(c == 0, ac_0, tl.where(c == 1, ac_1, ac_2))
            table = huffman + tl.where(first, dc, ac)
            entry = tl.load(table + ((word >> 24) & 255), mask=ready, other=0).to(tl.int32) & 0xFFFF
            more = ((entry >> 12) & 7) + 1
            place = (entry & 0xFFF) + ((word >> (24 - more)) & ((1 << more) - 1))
            longer = ready & (entry >= 0x8000)
            entry = tl.where(longer, tl.load(table + place, mask=longer, other=0).to(tl.int32), entry)
            length, run, width = entry >> 8, (entry >> 4) & 15, entry & 15
            word = word << length
            value = ((word >> 1) & 0x7FFFFFFF) >> (31 - width)
            value -= tl.where(word < 0, 0, (1 << width) - 1)

            coded = first | (width > 0)
            place = k + run
            wrong = (length == 0) | (coded & (place > 63))
            error |= tl.where(ready & wrong, BAD_CODE, 0)
            good = ready & (error == 0)
            value += tl.where(first, tl.where(c == 0, level_0, tl.where(c == 1, level_1, level_2)), 0)
            level = good & first
            level_0 = tl.where(level & (c == 0), value, level_0)
            level_1 = tl.where(level & (c == 1), value, level_1)
            level_2 = tl.where(level & (c == 2), value, level_2)

            stored = good & coded & (x >= 0) & (x < mcus) & (y >= 0) & (y < mcus_down)
            steps = tl.where(c == 0, steps_0, tl.where(c == 1, steps_1, steps_2))
            step = tl.load(quant + steps + place, mask=stored, other=0)
            block = (y * mcus + x) * mcu_blocks + b
            to = ((block >> 5) << 11) + (block & 31) + (step & 2047)
            tl.store(coefficients + to, (value * (step >> 11)).to(tl.int16), mask=stored)

            have -= tl.where(good, length + width, 0)
            # 16 zeros at a time make the code of an AC symbol without a value, all others end the block.
            k = tl.where(good, tl.where(coded, place + 1, tl.where(run == 15, k + 16, 64)), k)
            done = k >= 64
            k = tl.where(done, 0, k)
            b += done.to(tl.int32)
            done = b == mcu_blocks
            b = tl.where(done, 0, b)
            left -= done.to(tl.int32)
            x += done.to(tl.int32)
            done = x == mcus_x - column
            x = tl.where(done, -column, x)
            y += done.to(tl.int32)
            error |= tl.where(active & (have < 8 * (at - size)), OVERRUN, 0)
            active = active & (left > 0) & (error == 0)
    # What is left of a segment is less than a byte, and the stuffing that follows it.
    rest = 8 * (size - at) + have
    error |= tl.where(complete & (left == 0) & (error == 0) & (rest >= 24), TOO_MUCH, 0)
    tl.atomic_or(errors + image + zero, error, mask=error != 0)


@triton.jit
def _idct(x0, x1, x2, x3, x4, x5, x6, x7, SHIFT: tl.constexpr):
    """The inverse DCT of 8 values in 13 bits of fraction, as libjpeg's accurate one orders it; rounded and shifted down."""
    z1 = (x2 + x6) * 4433
    even_2, even_3 = z1 - x6 * 15137, z1 + x2 * 6270
    even_0, even_1 = (x0 + x4) << 13, (x0 - x4) << 13
    a0, a3 = even_0 + even_3 + (1 << (SHIFT - 1)), even_0 - even_3 + (1 << (SHIFT - 1))
    a1, a2 = even_1 + even_2 + (1 << (SHIFT - 1)), even_1 - even_2 + (1 << (SHIFT - 1))
    z5 = (x7 + x3 + x5 + x1) * 9633
    z1, z2 = (x7 + x1) * -7373, (x5 + x3) * -20995
    z3, z4 = z5 - (x7 + x3) * 16069, z5 - (x5 + x1) * 3196
    b0, b1 = x7 * 2446 + z1 + z3, x5 * 16819 + z2 + z4
    b2, b3 = x3 * 25172 + z2 + z3, x1 * 12299 + z1 + z4
    return (
        (a0 + b3) >> SHIFT,
        (a1 + b2) >> SHIFT,
        (a2 + b1) >> SHIFT,
        (a3 + b0) >> SHIFT,
        (a3 - b0) >> SHIFT,
        (a2 - b1) >> SHIFT,
        (a1 - b2) >> SHIFT,
        (a0 - b3) >> SHIFT,
    )


@triton.jit
def _column(block, used, COLUMN: tl.constexpr):
    """A column of coefficients, transformed; with two bits of fraction."""
    block += COLUMN * 32
    x0 = tl.load(block, mask=used, other=0).to(tl.int32)
    x1 = tl.load(block + 256, mask=used, other=0).to(tl.int32)
    x2 = tl.load(block + 512, mask=used, other=0).to(tl.int32)
    x3 = tl.load(block + 768, mask=used, other=0).to(tl.int32)
    x4 = tl.load(block + 1024, mask=used, other=0).to(tl.int32)
    x5 = tl.load(block + 1280, mask=used, other=0).to(tl.int32)
    x6 = tl.load(block + 1536, mask=used, other=0).to(tl.int32)
    x7 = tl.load(block + 1792, mask=used, other=0).to(tl.int32)
    return _idct(x0, x1, x2, x3, x4, x5, x6, x7, 11)


@triton.jit
def _level(value):
    return tl.minimum(tl.maximum(value + 128, 0), 255)


@triton.jit
def _row(to, used, x0, x1, x2, x3, x4, x5, x6, x7):
    """A row of values, transformed and stored as 8 samples."""
    x0, x1, x2, x3, x4, x5, x6, x7 = _idct(x0, x1, x2, x3, x4, x5, x6, x7, 18)
    low = _level(x0) | (_level(x1) << 8) | (_level(x2) << 16) | (_level(x3) << 24)
    high = _level(x4) | (_level(x5) << 8) | (_level(x6) << 16) | (_level(x7) << 24)
    tl.store(to, (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF), mask=used)


@triton.jit
def transform_kernel(words, blocks, coefficients, samples, BLOCKS: tl.constexpr):
    """The samples of a block in each lane, to their place in the planes of ``samples``, int64 of 8 samples."""
    program = tl.load(blocks + tl.program_id(0))
    image, start = program >> 32, program & 0xFFFFFFFF
    words += image * COLUMNS
    mcu_blocks, luma, mcus = _word(words, MCU_BLOCKS), _word(words, LUMA), _word(words, MCUS)
    mcus_down, half_x, half_y = _word(words, MCUS_DOWN), _word(words, HALF_X), _word(words, HALF_Y)
    block = start.to(tl.int32) + tl.arange(0, BLOCKS)
    used = block < mcus * mcus_down * mcu_blocks
    mcu, b = block // mcu_blocks, block % mcu_blocks
    y, x = mcu // mcus, mcu % mcus
    # Rows of all planes in units of 8 samples, chroma behind luma.
    is_luma = b < luma
    across = tl.where(is_luma, mcus << half_x, mcus)
    y = tl.where(is_luma, (y << half_y) + (b >> half_x), y)
    x = tl.where(is_luma, (x << half_x) + (b & half_x), x)
    behind = tl.where(is_luma, 0, b) * (mcus * mcus_down * 8)
    to = samples + tl.load(words + PLANE) // 8 + (behind + y * 8 * across + x)
    source = coefficients + tl.load(words + BLOCK) * 64 + (((block >> 5) << 11) + (block & 31))
    a0, b0, c0, d0, e0, f0, g0, h0 = _column(source, used, 0)
    a1, b1, c1, d1, e1, f1, g1, h1 = _column(source, used, 1)
    a2, b2, c2, d2, e2, f2, g2, h2 = _column(source, used, 2)
    a3, b3, c3, d3, e3, f3, g3, h3 = _column(source, used, 3)
    a4, b4, c4, d4, e4, f4, g4, h4 = _column(source, used, 4)
    a5, b5, c5, d5, e5, f5, g5, h5 = _column(source, used, 5)
    a6, b6, c6, d6, e6, f6, g6, h6 = _column(source, used, 6)
    a7, b7, c7, d7, e7, f7, g7, h7 = _column(source, used, 7)
    _row(to, used, a0, a1, a2, a3, a4, a5, a6, a7)
    _row(to + across, used, b0, b1, b2, b3, b4, b5, b6, b7)
    _row(to + 2 * across, used, c0, c1, c2, c3, c4, c5, c6, c7)
    _row(to + 3 * across, used, d0, d1, d2, d3, d4, d5, d6, d7)
    _row(to + 4 * across, used, e0, e1, e2, e3, e4, e5, e6, e7)
    _row(to + 5 * across, used, f0, f1, f2, f3, f4, f5, f6, f7)
    _row(to + 6 * across, used, g0, g1, g2, g3, g4, g5, g6, g7)
    _row(to + 7 * across, used, h0, h1, h2, h3, h4, h5, h6, h7)


@triton.jit
def _upsampled(plane, near, beside, below, across, used, weight_y, weight_x, bias):
    """A chroma sample between four, less 128: weights of the nearer row and column are 3 of 4, or 4 where there is no filter."""
    top = tl.load(plane + near, mask=used, other=0).to(tl.int32) * weight_y
    top += tl.load(plane + below, mask=used, other=0).to(tl.int32) * (4 - weight_y)
    other = tl.load(plane + near + beside, mask=used, other=0).to(tl.int32) * weight_y
    other += tl.load(plane + below + beside, mask=used, other=0).to(tl.int32) * (4 - weight_y)
    return ((top * weight_x + other * (4 - weight_x) + bias) >> 4) - 128


@triton.jit
def colour_kernel(words, pixels, samples, out, PIXELS: tl.constexpr):
    """A pixel of the window in each lane: chroma upsampled as libjpeg's "fancy" way does, YCbCr to RGB in 16 bits of fraction."""
    program = tl.load(pixels + tl.program_id(0))
    image, start = program >> 32, program & 0xFFFFFFFF
    words += image * COLUMNS
    mcus, mcus_down = _word(words, MCUS), _word(words, MCUS_DOWN)
    half_x, half_y = _word(words, HALF_X), _word(words, HALF_Y)
    width = _word(words, WINDOW + 3)
    pixel = start.to(tl.int32) + tl.arange(0, PIXELS)
    used = pixel < _word(words, WINDOW + 2) * width
    # In pixels of the whole image; planes begin with the first MCU under the window.
    y, x = pixel // width + _word(words, WINDOW), pixel % width + _word(words, WINDOW + 1)
    row, column = _word(words, ROW) * 8, _word(words, COLUMN) * 8
    samples += tl.load(words + PLANE)
    at = (y - (row << half_y)) * (mcus << half_x) * 8 + x - (column << half_x)
    luma = tl.load(samples + at, mask=used, other=0).to(tl.int32)
    red, green, blue = luma, luma, luma
    if tl.load(words + GREY) == 0:
        fancy_x, fancy_y = _word(words, FANCY_X), _word(words, FANCY_Y)
        across = mcus * 8
        chroma_y, chroma_x = y >> half_y, x >> half_x
        next_y = tl.where(fancy_y != 0, chroma_y + (y & 1) * 2 - 1, chroma_y)
        next_x = tl.where(fancy_x != 0, chroma_x + (x & 1) * 2 - 1, chroma_x)
        next_y = tl.minimum(tl.maximum(next_y, 0), _word(words, CHROMA) - 1)
        next_x = tl.minimum(tl.maximum(next_x, 0), _word(words, CHROMA + 1) - 1)
        near = (chroma_y - row) * across + chroma_x - column
        below = (next_y - row) * across + chroma_x - column
        beside = next_x - chroma_x
        # libjpeg rounds x.5 up and down in turns: in two dimensions by column, else by what is filtered.
        odd = tl.where(fancy_x != 0, x, y) & 1
        bias = tl.where((fancy_x != 0) & (fancy_y != 0), 8 - odd, 4 + 4 * odd)
        blue_plane = samples + (mcus * mcus_down * 64 << (half_x + half_y))
        red_plane = blue_plane + mcus * mcus_down * 64
        cb = _upsampled(blue_plane, near, beside, below, across, used, 4 - fancy_y, 4 - fancy_x, bias)
        cr = _upsampled(red_plane, near, beside, below, across, used, 4 - fancy_y, 4 - fancy_x, bias)
        red = luma + ((cr * 91881 + 32768) >> 16)
        green = luma + ((cb * -22554 - cr * 46802 + 32768) >> 16)
        blue = luma + ((cb * 116130 + 32768) >> 16)
    out += tl.load(words + OUT) + pixel * 3
    tl.store(out, tl.minimum(tl.maximum(red, 0), 255).to(tl.uint8), mask=used)
    tl.store(out + 1, tl.minimum(tl.maximum(green, 0), 255).to(tl.uint8), mask=used)
    tl.store(out + 2, tl.minimum(tl.maximum(blue, 0), 255).to(tl.uint8), mask=used)
