"""JPEG encoded anew without pixels: against scipy's DCT, against the way through pixels, over poison, and with damaged files."""

import io

import numpy as np
import pytest
import scipy.fft
from hypothesis import given, settings
from hypothesis import strategies as st
from jpeg_damage import mutate, pick, seeds
from PIL import Image

from fastload import codecs
from fastload.kernels import crops, decode, encode, fdct, huffman, jpeg, oracle
from fastload.kernels.jit import kernel

GUARD = 128


@kernel
def quantised(a, b, stride_a, stride_b, factors_a, factors_b, out_a, out_b):
    return fdct.quantised(a, b, stride_a, stride_b, factors_a, factors_b, out_a, out_b)


def picture(height, width, seed=0, noise=12.0):
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    base = 127 + 60 * np.sin(y / (7 + seed))[..., None] + 55 * np.cos(x[..., None] / (5 + np.arange(3)))
    return np.clip(base + rng.normal(0, noise, (height, width, 3)), 0, 255).astype(np.uint8)


def encoded(pixels, mode="RGB", **options):
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, "JPEG", **options)
    return out.getvalue()


def shown(data):
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB")).astype(float)


def test_coefficients_are_scipys_rounded():
    rng = np.random.default_rng(0)
    order = huffman.ZIGZAG
    for trial in range(200):
        blocks = rng.integers(0, 256, (2, 8, 8)).astype(np.uint8)  # [x, y]: column after column
        if trial % 4 == 0:
            blocks[0] = rng.choice([0, 255], (8, 8))
        tables = rng.integers(1, 60, (2, 8, 8))
        factors = [fdct.factors(table) for table in tables]
        out = np.full((4, 64), 77, np.int16)
        addresses = [array.ctypes.data for array in (*blocks, *factors, out[1], out[2])]
        masks = quantised(*addresses[:2], 8, 8, *addresses[2:])
        assert (out[[0, 3]] == 77).all()
        for i in range(2):
            exact = scipy.fft.dctn(blocks[i].T.astype(float) - 128, norm="ortho") / tables[i]
            exact = exact.reshape(64)[order]
            assert np.abs(out[1 + i] - exact).max() < 0.501  # the nearest, but for what floats cannot tell
            assert [int(masks[i]) >> k & 1 for k in range(64)] == (out[1 + i] != 0).astype(int).tolist()


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_the_picture_is_as_near_to_the_source_as_by_pixels(data):
    height, width = data.draw(st.integers(1, 90)), data.draw(st.integers(1, 90))
    quality = data.draw(st.integers(30, 100))
    # Half and more of such a picture may be what its last MCU, of up to 16 pixels, is filled up with.
    few = min(height, width) < 24
    source = encoded(
        picture(height, width, data.draw(st.integers(0, 3))),
        quality=data.draw(st.integers(60, 100)),
        subsampling=data.draw(st.sampled_from(["4:4:4", "4:2:0"])),
        restart_marker_blocks=data.draw(st.sampled_from([0, 1, 3])),
        optimize=data.draw(st.booleans()),
    )
    made = codecs.encode_anew(source, quality)
    assert made is not None
    by_pixels = codecs.encode_jpeg(codecs.load_rgb(source), quality)
    truth, ours, theirs = shown(source), shown(made), shown(by_pixels)
    error, usual = ((ours - truth) ** 2).mean(), ((theirs - truth) ** 2).mean()
    assert error < (2 * usual + 20 if few else 1.1 * usual + 1.5), (error, usual)
    assert len(made) < (1.5 if few else 1.1) * len(by_pixels) + 60
    # The same tables, and an index that crops can rely on.
    info, status = jpeg.parse(np.frombuffer(made, np.uint8))
    theirs_info, _ = jpeg.parse(np.frombuffer(by_pixels, np.uint8))
    assert status == jpeg.OK and jpeg.can_crop(info) == jpeg.can_crop(theirs_info)
    for place in (jpeg.HEIGHT, jpeg.WIDTH, jpeg.INTERVAL, jpeg.MCUS_X, jpeg.MCUS_Y, jpeg.SAMPLING):
        assert info[place] == theirs_info[place]
    assert oracle.restart_segments(made) and len(oracle.restart_segments(made)) == len(
        oracle.restart_segments(by_pixels)
    )


def test_photographs_lose_no_more_than_by_pixels(photos):
    errors, sizes = [], []
    for content in photos[:30]:
        made = codecs.encode_anew(content, 90)
        if made is None:
            continue
        by_pixels = codecs.encode_jpeg(codecs.load_rgb(content), 90)
        truth = shown(content)
        errors.append([((shown(d) - truth) ** 2).mean() for d in (made, by_pixels)])
        sizes.append(len(made) / len(by_pixels))
    assert len(errors) > 20
    ours, theirs = np.mean(errors, axis=0)
    assert ours < 1.02 * theirs and 0.97 < np.mean(sizes) < 1.03


def test_grey_steps_stay_where_they_are():
    """Nothing is moved, mirrored or turned: corners of different brightness, sides that are no multiple of 16."""
    pixels = np.zeros((37, 51, 3), np.uint8)
    pixels[:18, :25], pixels[:18, 25:], pixels[18:, :25], pixels[18:, 25:] = 30, 90, 150, 220
    for subsampling in ("4:4:4", "4:2:0"):
        made = codecs.encode_anew(encoded(pixels, quality=98, subsampling=subsampling), 98)
        assert np.abs(shown(made) - pixels).mean() < 1.5


def run(data, memory, room, poison):
    """(status, bytes or None, what result says), with guards around output and scratch."""
    array = np.frombuffer(data, np.uint8)
    info, status = jpeg.parse(array)
    if status != jpeg.OK:
        return status, None, 0
    height, width = int(info[jpeg.HEIGHT]), int(info[jpeg.WIDTH])
    across, down = -(-width // 16), -(-height // 16)
    interval = jpeg.choose_interval(across, down, 16)
    out = np.full(room + 2 * GUARD, poison, np.uint8)
    scratch = np.full(memory + 2 * GUARD, poison, np.uint8)
    lengths, result = np.zeros(across // interval * down, np.int64), np.zeros(1, np.int64)
    status = int(
        encode.encode_anew(
            array,
            height,
            width,
            codecs._encoder(80)[0],
            decode.new_work(),
            scratch[GUARD:-GUARD],
            interval,
            lengths,
            out[GUARD:-GUARD],
            result,
        )
    )
    for array in (out, scratch):
        assert (array[:GUARD] == poison).all() and (array[-GUARD:] == poison).all(), "wrote outside"
    size = int(result[0])
    if status != encode.OK:
        return status, None, size
    assert lengths.sum() == size and (lengths > 2).all()
    return status, out[GUARD : GUARD + size].tobytes(), size


def test_nothing_of_the_memory_shows_and_too_little_is_said():
    for subsampling, size in (("4:4:4", (33, 70)), ("4:2:0", (48, 48)), ("4:4:4", (5, 3))):
        data = encoded(picture(*size), subsampling=subsampling, quality=95)
        status, _, need = run(data, 64, 1 << 16, 0x55)
        assert status == crops.MORE_SCRATCH and need > 64
        results = [run(data, need, 1 << 16, poison) for poison in (0x55, 0xAA)]
        assert results[0] == results[1] and results[0][0] == encode.OK
        assert run(data, need, 2000, 0x55)[0] == encode.NO_ROOM


def test_what_must_go_through_pixels_is_left():
    pixels = picture(40, 60)
    for data in (
        encoded(pixels, "L"),
        encoded(pixels, "CMYK"),
        encoded(pixels, subsampling="4:2:2"),
        encoded(pixels, progressive=True),
        encoded(pixels)[:-200],
        b"no JPEG",
    ):
        assert codecs.encode_anew(data, 90) is None


def test_damaged_files_give_nothing_or_a_sound_picture():
    rng, pool = np.random.default_rng(4), seeds()
    made = refused = 0
    for _ in range(1500):
        data = mutate(pick(rng, pool), rng, pool)
        info, status = jpeg.parse(np.frombuffer(data, np.uint8))
        if status != jpeg.OK or info[jpeg.HEIGHT] * info[jpeg.WIDTH] > 1 << 18:
            continue
        result = codecs.encode_anew(data, 80)
        if result is None:
            refused += 1
            continue
        made += 1
        assert codecs.load_rgb(result).shape == (info[jpeg.HEIGHT], info[jpeg.WIDTH], 3)
    assert made > 100 and refused > 200


@pytest.mark.parametrize("quality", [1, 50, 100])
def test_tables_are_pillows(quality):
    source = picture(20, 30)
    tables = []
    for data in (codecs.encode_anew(encoded(source), quality), encoded(source, quality=quality)):
        with Image.open(io.BytesIO(data)) as image:
            tables.append(image.quantization)
    assert tables[0] == tables[1]
