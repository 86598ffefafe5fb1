"""The compressed-domain kernels: crops and kept JPEGs show the pixels and coefficients of the original, or an error."""

import io

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastload import codecs
from fastload.errors import CorruptError
from fastload.kernels import jpeg, oracle


def picture(height, width, seed=0):
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    base = 127 + 70 * np.sin(y / 9)[..., None] + 50 * np.cos(x[..., None] / (4 + np.arange(3)))
    return np.clip(base + rng.normal(0, 12, (height, width, 3)), 0, 255).astype(np.uint8)


def encode(pixels, mode="RGB", **options):
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, "JPEG", **options)
    return out.getvalue()


def decode(data, exact=True):
    return simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=not exact)


def cut(data, height, width, window):
    array = np.frombuffer(data, np.uint8)
    found = np.full(5, -1, np.int64)
    results = []
    for sentinel in (0x55, 0xAA):
        out = np.full(array.size + 8, sentinel, np.uint8)
        status = int(jpeg.cut(array, height, width, *window, out[: array.size], found))
        assert (out[array.size :] == sentinel).all()
        results.append(out[: found[0]].tobytes() if status == jpeg.OK else b"")
    assert results[0] == results[1]
    return status, found, results[0]


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_crop_shows_the_pixels_of_the_whole(data):
    height, width = data.draw(st.integers(1, 200)), data.draw(st.integers(1, 300))
    subsampling = data.draw(st.sampled_from(["4:2:0", "4:2:2", "4:4:4", "grey"]))
    pixels = picture(height, width, data.draw(st.integers(0, 3)))
    quality = data.draw(st.sampled_from([30, 90, 100]))
    plain = (
        encode(pixels, "L", quality=quality)
        if subsampling == "grey"
        else encode(pixels, quality=quality, subsampling=subsampling)
    )
    kept = codecs.keep_jpeg(plain)
    y0, x0 = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    y1, x1 = data.draw(st.integers(y0 + 1, height)), data.draw(st.integers(x0 + 1, width))
    exact = data.draw(st.booleans())
    margin = 2 if exact else 0  # smooth chroma upsampling looks two pixels further
    window = (y0 - margin, x0 - margin, y1 + margin, x1 + margin)
    status, found, small = cut(kept, height, width, window)
    assert status == jpeg.OK
    size, y, x, h, w = found.tolist()
    assert y <= y0 and x <= x0 and y + h >= y1 and x + w >= x1 and size == len(small)
    part, whole = decode(small, exact), decode(plain, exact)
    assert part.shape == (h, w, 3)
    assert np.array_equal(part[y0 - y : y1 - y, x0 - x : x1 - x], whole[y0:y1, x0:x1])
    with Image.open(io.BytesIO(small)) as image:  # another reader agrees that it is a JPEG of this size
        image.load()
        assert image.size == (w, h)


@given(st.integers(1, 40), st.data())
@settings(max_examples=60, deadline=None)
def test_any_restart_interval_that_tiles_the_rows(mcus_x, data):
    """Not only the interval that we choose: each divisor of a row."""
    interval = data.draw(st.sampled_from([d for d in range(1, mcus_x + 1) if mcus_x % d == 0]))
    width, height = 16 * mcus_x - data.draw(st.integers(0, 15)), data.draw(st.integers(1, 90))
    encoded = encode(picture(height, width), subsampling="4:2:0", quality=85, restart_marker_blocks=interval)
    segments = oracle.restart_segments(encoded)
    lengths = np.array([len(s) + 2 for s in segments], "<u2").tobytes()
    length = (2 + len(jpeg.INDEX_NAME) + len(lengths)).to_bytes(2, "big")
    indexed = (
        encoded[:2] + bytes((0xFF, jpeg.INDEX_MARKER)) + length + jpeg.INDEX_NAME + lengths + encoded[2:]
    )
    y, x = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    status, found, small = cut(indexed, height, width, (y, x, y + 20, x + 20))
    assert status == jpeg.OK
    _, fy, fx, h, w = found.tolist()
    assert np.array_equal(decode(small, False), decode(encoded, False)[fy : fy + h, fx : fx + w])


@pytest.mark.parametrize(
    "options",
    [
        {"quality": 90, "subsampling": "4:2:0"},
        {"quality": 95, "subsampling": "4:4:4", "optimize": True},
        {"quality": 10, "subsampling": "4:2:2", "optimize": True},
        {"quality": 100, "subsampling": "4:2:0", "optimize": True},
        {"quality": 75, "restart_marker_blocks": 5},
        {"quality": 75, "restart_marker_rows": 1},
    ],
)
@pytest.mark.parametrize("size", [(1, 1), (8, 8), (17, 33), (123, 211), (64, 1000)])
def test_keeping_changes_no_coefficient(options, size):
    original = encode(picture(*size), **options)
    kept = codecs.keep_jpeg(original)
    for exact in (True, False):
        assert np.array_equal(decode(kept, exact), decode(original, exact))
    info, status = jpeg.parse(np.frombuffer(kept, np.uint8))
    assert status == jpeg.OK and jpeg.can_crop(info)
    assert [len(s) + 2 for s in oracle.restart_segments(kept)] == [
        int(v) for v in np.frombuffer(kept, "<u2", int(info[jpeg.INDEX_COUNT]), int(info[jpeg.INDEX_AT]))
    ]
    assert codecs.keep_jpeg(kept) == kept  # nothing left to do


def test_optimised_tables_that_lack_codes_are_replaced():
    """Uniform rows need no large DC differences: the optimised table has no code for what a restart needs."""
    pixels = np.full((64, 256, 3), 200, np.uint8)
    pixels[:, 128:] = 203
    original = encode(pixels, optimize=True, quality=95, subsampling="4:4:4")
    kept = codecs.keep_jpeg(original)
    assert kept.count(b"\xff\xc4") > original.count(b"\xff\xc4")
    assert np.array_equal(decode(kept), decode(original))


def test_metadata_goes_and_the_colour_space_stays():
    exif = Image.Exif()
    exif[0x010E] = "secret place"
    original = encode(picture(40, 40), exif=exif, comment=b"a comment", icc_profile=b"x" * 500)
    kept = codecs.keep_jpeg(original)
    assert (
        b"secret" not in kept and b"a comment" not in kept and b"ICC_PROFILE" not in kept and b"JFIF" in kept
    )


@pytest.mark.parametrize(
    ("mcus", "mcu"), [(1, 16), (7, 16), (13, 16), (31, 16), (32, 16), (24, 16), (63, 8), (4096, 16)]
)
def test_interval_divides_the_row_and_fits_the_index(mcus, mcu):
    for rows in (1, 40, 4096):
        interval = jpeg.choose_interval(mcus, rows, mcu)
        assert mcus % interval == 0
        assert mcus // interval * rows <= jpeg.MAX_SEGMENTS or interval == mcus
    assert jpeg.choose_interval(32, 24, 16) == 4 and jpeg.choose_interval(24, 32, 16) in (3, 4)


def test_damaged_bytes_never_crash_and_never_show_foreign_memory():
    """Each damaged file gives an error, or a JPEG that libjpeg-turbo may judge; window and length stay in bounds."""
    rng = np.random.default_rng(0)
    kept = np.frombuffer(codecs.encode_jpeg(picture(120, 160)), np.uint8)
    statuses = set()
    for trial in range(6000):
        bad = kept.copy()
        for _ in range(rng.integers(1, 6)):
            place = rng.integers(0, bad.size if trial % 2 else 700)
            bad[place] = rng.choice([0, 0xFF, 0xD9, 0xD0, int(rng.integers(0, 256))])
        if trial % 3 == 0:
            bad = bad[: rng.integers(0, bad.size)]
        out, found = np.zeros(bad.size, np.uint8), np.zeros(5, np.int64)
        status = int(jpeg.cut(bad, 120, 160, 30, 40, 90, 100, out, found))
        statuses.add(status)
        if status == jpeg.OK:
            size, y, x, h, w = found.tolist()
            assert 0 < size <= bad.size and 0 <= y < y + h <= 120 and 0 <= x < x + w <= 160
    assert {jpeg.OK, jpeg.TRUNCATED, jpeg.BAD_INDEX, jpeg.BAD_SEGMENT} <= statuses


def test_damaged_data_are_refused_or_kept_faithfully():
    rng = np.random.default_rng(1)
    original = np.frombuffer(encode(picture(90, 130), quality=80, restart_marker_blocks=3), np.uint8)
    refused = 0
    for _ in range(1500):
        bad = original.copy()
        bad[rng.integers(2, bad.size, 3)] = rng.integers(0, 256, 3)
        bad = bad[: rng.integers(bad.size // 2, bad.size + 1)]
        try:
            kept = codecs.keep_jpeg(bad)
        except CorruptError:
            refused += 1
            continue
        try:
            before = decode(bad.tobytes())
        except ValueError:
            continue  # libjpeg-turbo refuses it: so it will when the sample is loaded
        assert np.array_equal(decode(kept), before)
    assert refused > 300


@pytest.mark.parametrize("cut_at", [0, 1, 2, 3, 20, 200, 600, 650, 1000])
def test_truncated_headers_have_a_reason(cut_at):
    data = codecs.encode_jpeg(picture(60, 60))[:cut_at]
    with pytest.raises(CorruptError, match=r"\w"):
        codecs.keep_jpeg(data)
    with pytest.raises(CorruptError, match=r"\w"):
        codecs.load_rgb(data)


def test_a_scan_header_without_a_body_at_the_end_is_refused():
    data = codecs.encode_jpeg(picture(40, 40))
    at = data.index(b"\xff\xda")
    _, status = jpeg.parse(np.frombuffer(data[:at] + b"\xff\xda\x00\x02", np.uint8))
    assert status == jpeg.BAD_SEGMENT


def test_fill_bytes_in_front_of_markers_and_missing_tables_are_legal():
    plain = encode(picture(60, 90), quality=80, restart_marker_blocks=2)
    filled = plain.replace(b"\xff\xd0", b"\xff\xff\xd0").replace(b"\xff\xd3", b"\xff\xff\xff\xd3")
    kept = codecs.keep_jpeg(filled)
    assert len(filled) > len(plain) and np.array_equal(decode(kept), decode(plain))
    tables = plain.index(b"\xff\xc4")
    bare = plain
    while (at := bare.find(b"\xff\xc4")) >= 0 and tables:
        bare = bare[:at] + bare[at + 2 + int.from_bytes(bare[at + 2 : at + 4], "big") :]
    with Image.open(
        io.BytesIO(bare)
    ) as image:  # as in frames of motion JPEG: the standard tables are implied
        expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(codecs.load_rgb(codecs.keep_jpeg(bare)), expected)
