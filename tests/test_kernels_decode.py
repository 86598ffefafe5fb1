"""The JPEG decoder: equal to libjpeg-turbo sample for sample, to the oracle coefficient for coefficient, safe for any bytes."""

import io

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastload import codecs
from fastload.kernels import decode, huffman, jpeg, oracle
from fastload.kernels.jit import kernel

WORK = decode.new_work()


# The decoder's parts are only compiled into kernels: these make them callable.
@kernel
def read_header(data, work):
    return decode.read_header(data, work.tables, work.header)


@kernel
def find_segments(data, work, window, memory, room, segments):
    row0, col0, row1, col1 = window
    return decode.find_segments(data, work.header.info, row0, col0, row1, col1, memory, room, segments)


@kernel
def decode_segments(work, segments, found, window, table):
    row0, col0, row1, col1 = window
    return decode.decode_segments(work, segments, found, row0, col0, row1, col1, table)


def picture(height, width, seed=0, noise=15.0):
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    base = 127 + 60 * np.sin(y / (7 + seed))[..., None] + 55 * np.cos(x[..., None] / (5 + np.arange(3)))
    return np.clip(base + rng.normal(0, noise, (height, width, 3)), 0, 255).astype(np.uint8)


def encode(pixels, mode="RGB", **options):
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, "JPEG", **options)
    return out.getvalue()


def planes(data, reductions=(0, 0, 0), window=None, work=None):
    """(status, planes, window) by the kernels, with guards around each plane and the copied bytes."""
    work = work or WORK
    array = np.frombuffer(data, np.uint8)
    status = int(read_header(array, work))
    if status != decode.OK:
        return status, None, None
    info, component = work.header.info, work.header.component
    row0, col0, row1, col1 = window or (0, 0, int(info[jpeg.MCUS_Y]), int(info[jpeg.MCUS_X]))
    memory = np.full(array.size + 1024, 0x55, np.uint8)
    interval = int(info[jpeg.INTERVAL]) or int(info[jpeg.MCUS_X] * info[jpeg.MCUS_Y])
    segments = np.zeros((int(info[jpeg.MCUS_X] * info[jpeg.MCUS_Y]) // interval + 2, 3), np.int64)
    room = memory.size - 256
    window = (row0, col0, row1, col1)
    status, found, _ = find_segments(array, work, window, memory.ctypes.data, room, segments)
    assert (memory[room:] == 0x55).all()
    if status != decode.OK:
        return status, None, None
    results, table = [], np.zeros((3, 3), np.int64)
    for c in range(int(info[jpeg.COMPONENTS])):
        edge = 8 >> reductions[c]
        across, down = (
            (col1 - col0) * component[c, decode.H] * edge,
            (row1 - row0) * component[c, decode.V] * edge,
        )
        plane = np.full((across + 2, down + 16), 0xAA, np.uint8)
        table[c] = plane[1, 8:].ctypes.data, plane.strides[0], reductions[c]
        results.append(plane)
    status = int(decode_segments(work, segments, found, window, table))
    for plane in results:
        edge = plane.copy()
        edge[1:-1, 8:-8] = 0xAA
        assert (edge == 0xAA).all(), "wrote outside of a plane"
    return status, [plane[1:-1, 8:-8].T for plane in results], (row0, col0, row1, col1)


OPTIONS = [
    {"quality": 90},
    {"quality": 100, "optimize": True},
    {"quality": 10, "optimize": True},
    {"quality": 75, "restart_marker_blocks": 3},
    {"quality": 95, "restart_marker_rows": 1},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("size", [(1, 1), (8, 9), (61, 203), (200, 317)])
@pytest.mark.parametrize("noise", [0.0, 15.0, 60.0])
def test_grey_equals_libjpeg_turbo_at_each_scale(options, size, noise):
    data = encode(picture(*size, noise=noise), "L", **options)
    for reduction in range(4):
        least = [-(-s // (1 << reduction)) for s in size]
        expected = simplejpeg.decode_jpeg(
            data, "GRAY", fastdct=False, min_height=least[0], min_width=least[1]
        )[..., 0]
        if reduction and expected.shape != tuple(least):
            continue  # libjpeg-turbo has no smaller size for a picture as tiny as this
        status, (ours,), _ = planes(data, (reduction,))
        assert status == decode.OK
        assert np.array_equal(ours[: least[0], : least[1]], expected)


@pytest.mark.parametrize("options", OPTIONS)
def test_colour_planes_equal_libjpeg_turbo(options):
    """4:4:4 has nothing upsampled, so Pillow shows libjpeg-turbo's planes as they are."""
    data = encode(picture(77, 130), subsampling="4:4:4", **options)
    with Image.open(io.BytesIO(data)) as image:
        image.draft("YCbCr", image.size)
        expected = np.asarray(image)
    status, ours, _ = planes(data)
    assert status == decode.OK
    assert np.array_equal(np.stack([p[:77, :130] for p in ours], axis=2), expected)


def sampled(pixels, factors, **options):
    """A JPEG with ``factors`` (h, v) for luma, also 4:4:0, which Pillow does not write: its 4:2:2 turned around."""
    names = {(1, 1): "4:4:4", (2, 1): "4:2:2", (2, 2): "4:2:0"}
    if factors in names:
        return encode(pixels, subsampling=names[factors], **options)
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), options.get("quality", 85), "RGB", "440")


@pytest.mark.parametrize("factors", [(1, 1), (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("quality", [20, 85, 100])
def test_every_plane_is_the_definition_of_the_inverse_dct(factors, quality):
    data = sampled(picture(50, 70), factors, quality=quality)
    status, ours, _ = planes(data)
    assert status == decode.OK
    for plane, exact in zip(ours, oracle.jpeg_planes(data)):
        assert plane.shape == exact.shape
        assert (
            np.abs(plane - exact).max() < 1.01
        )  # the accurate integer transform is within a level of the real one


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_window_is_that_part_of_the_whole(data):
    factors = data.draw(st.sampled_from([(1, 1), (2, 1), (2, 2), "grey"]))
    height, width = data.draw(st.integers(1, 120)), data.draw(st.integers(1, 260))
    interval = data.draw(st.sampled_from([0, 1, 2, 3, 7, 1000]))
    options = {"quality": data.draw(st.sampled_from([40, 90, 100])), "restart_marker_blocks": interval}
    pixels = picture(height, width, data.draw(st.integers(0, 3)))
    encoded = encode(pixels, "L", **options) if factors == "grey" else sampled(pixels, factors, **options)
    if data.draw(st.booleans()):
        encoded = codecs.keep_jpeg(encoded)  # with the index
    reductions = tuple(data.draw(st.integers(0, 3)) for _ in range(3))
    status, whole, (_, _, rows, columns) = planes(encoded, reductions)
    assert status == decode.OK
    row0, col0 = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    row1, col1 = data.draw(st.integers(row0 + 1, rows)), data.draw(st.integers(col0 + 1, columns))
    status, part, _ = planes(encoded, reductions, (row0, col0, row1, col1))
    assert status == decode.OK
    for small, large in zip(part, whole):
        y, x = large.shape[0] // rows, large.shape[1] // columns
        assert np.array_equal(small, large[row0 * y : row1 * y, col0 * x : col1 * x])


def test_photographs_equal_libjpeg_turbo(photos):
    seen = 0
    for content in photos[:25]:
        status, ours, _ = planes(content)
        if status == decode.UNSUPPORTED:
            continue
        assert status == decode.OK
        expected = simplejpeg.decode_jpeg(content, "GRAY", fastdct=False)[..., 0]
        assert np.array_equal(ours[0][: expected.shape[0], : expected.shape[1]], expected)
        seen += 1
    assert seen > 15


@pytest.mark.parametrize("bits", [1, 7, 8, 10])
def test_values_and_codes_of_each_length(bits):
    """Blocks that reach place 63, long codes and large values: sharp noise at quality 100 has them all."""
    rng = np.random.default_rng(bits)
    noise = rng.integers(0, 2, (64, 64)) * ((1 << min(bits, 8)) - 1)
    data = encode(noise.astype(np.uint8), "L", quality=100, optimize=bits % 2 == 0)
    status, (ours,), _ = planes(data)
    assert status == decode.OK
    assert np.array_equal(ours, simplejpeg.decode_jpeg(data, "GRAY", fastdct=False)[..., 0])


def test_tables_are_built_once_and_slots_are_reused():
    """More different tables than slots, in two orders: the pictures stay right."""
    work = decode.new_work()
    files = [
        encode(picture(40, 60, seed % 9, noise=seed), quality=30 + 2 * seed, optimize=True)
        for seed in range(2 * huffman.SLOTS + 3)
    ]
    expected = [simplejpeg.decode_jpeg(f, "GRAY", fastdct=False)[..., 0] for f in files]
    for order in (range(len(files)), reversed(range(len(files)))):
        for i in order:
            for _ in range(2):
                _, ours, _ = planes(files[i], work=work)
                assert np.array_equal(ours[0][:40, :60], expected[i])
    work = decode.new_work()
    for _ in range(5):
        planes(files[0], work=work)
    assert (work.tables.sizes >= 0).sum() == 4


@pytest.mark.parametrize(
    "make",
    [
        lambda p: encode(p, progressive=True),
        lambda p: encode(p, "CMYK"),
        lambda p: encode(p, keep_rgb=True),
        lambda p: simplejpeg.encode_jpeg(p, 85, "RGB", "411"),
    ],
)
def test_what_is_not_supported_says_so(make):
    assert planes(make(picture(40, 40)))[0] == decode.UNSUPPORTED


def test_missing_tables_are_left_to_others():
    plain = encode(picture(40, 40))
    while (at := plain.find(b"\xff\xc4")) >= 0:
        plain = plain[:at] + plain[at + 2 + int.from_bytes(plain[at + 2 : at + 4], "big") :]
    assert planes(plain)[0] == decode.UNSUPPORTED


def test_markers_must_be_where_the_picture_says():
    good = encode(picture(80, 80), restart_marker_blocks=2)
    assert planes(good)[0] == decode.OK
    second = good.index(b"\xff\xd1")
    assert planes(good[:second] + b"\xff\xd2" + good[second + 2 :])[0] == decode.BAD_MARKER
    assert planes(good[:second] + good[second + 2 :])[0] in (
        decode.BAD_MARKER,
        decode.BAD_CODE,
        decode.OVERRUN,
    )
    assert planes(good[:second] + b"\xff\xd1" + good[second:])[0] in (decode.BAD_MARKER, decode.OVERRUN)
    filled = good[:second] + b"\xff\xff" + good[second:]  # fill bytes in front of a marker are legal
    status, ours, _ = planes(filled)
    assert status == decode.OK and np.array_equal(ours[0], planes(good)[1][0])


@pytest.mark.parametrize("keep", [False, True])
def test_each_truncation_is_an_error(keep):
    data = encode(picture(40, 56), restart_marker_blocks=2)
    data = codecs.keep_jpeg(data) if keep else data
    statuses = {planes(data[:n])[0] for n in range(len(data) - 6)}
    assert decode.OK not in statuses and decode.UNSUPPORTED not in statuses
    assert {decode.NOT_JPEG, decode.TRUNCATED} <= statuses
