"""Codecs against Pillow and plain numpy: every odd image a folder may hold, and every way its bytes can be broken."""

import io
import struct
import time
import zlib

import numpy as np
import pytest
import simplejpeg
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from fastload import codecs
from fastload.errors import CorruptError, UsageError
from fastload.kernels import jpeg, oracle

HEIGHT, WIDTH = 37, 53  # odd and unequal: a swapped or rounded side shows


def save(image, kind, **options):
    """A Pillow image, or pixels, as the bytes of a file."""
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, kind, **options)
    return file.getvalue()


def png(values, colour, bits, **chunks):
    """A PNG written by hand, for what Pillow cannot write: (H, W, C) values, the colour type and bits of its header."""
    height, width = values.shape[:2]
    packed = values.astype(">u2" if bits == 16 else np.uint8).reshape(height, -1)
    lines = b"".join(b"\0" + row.tobytes() for row in packed)
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *((k.encode(), v) for k, v in chunks.items())]
    out = b"\x89PNG\r\n\x1a\n"
    for name, body in [*parts, (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]:
        out += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return out


def pillow(data):
    """The oracle: Pillow's own idea of the picture, turned upright."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def over_white(rgb, alpha):
    """(H, W, 3) laid over white with (H, W) alpha, in exact arithmetic."""
    weight = alpha[..., None].astype(float) / 255
    return rgb * weight + 255 * (1 - weight)


def difference(a, b):
    a, b = np.asarray(a, float), np.asarray(b, float)
    assert a.shape == b.shape
    return np.abs(a - b)


def psnr(a, b):
    return 10 * np.log10(255**2 / max((difference(a, b) ** 2).mean(), 1e-9))


@pytest.fixture(scope="module")
def rgb(picture):
    return picture(HEIGHT, WIDTH, 3)


def odd_images(rgb):
    """name: (bytes, the right pixels, the tolerance in levels)."""
    grey = rgb[..., 0]
    ramp = np.linspace(0, 255, grey.size).round().astype(np.uint8).reshape(grey.shape)
    rgba, la = np.dstack([rgb, ramp]), np.dstack([grey, ramp])
    wide = (grey.astype(np.uint16) << 8) + rgb[..., 1]
    wide_rgb = (rgb.astype(np.uint16) << 8) + ramp[..., None]
    threes = np.repeat(grey[..., None], 3, 2)
    palette = Image.fromarray(rgb).convert("P", palette=Image.Palette.ADAPTIVE, colors=32)
    coloured = np.asarray(palette.convert("RGB"))
    clear = np.asarray(palette) == 7
    clear_from = np.where(np.asarray(palette)[..., None] == 7, 255, coloured)
    bits = np.where(grey > 127, 255, 0).astype(np.uint8)
    cmyk = np.dstack([rgb, ramp // 2])
    multiplied = (255 - cmyk[..., :3]) * (1 - cmyk[..., 3:] / 255.0)
    ycck = simplejpeg.encode_jpeg(255 - cmyk, quality=100, colorspace="CMYK", colorsubsampling="444")
    assert b"Adobe\0d\0\0\0\0\2" in ycck and clear.any()
    return {
        "RGB png": (save(rgb, "PNG"), rgb, 0),
        "RGB webp": (save(rgb, "WEBP", lossless=True), rgb, 0),
        "RGB bmp": (save(rgb, "BMP"), rgb, 0),
        "RGB tiff": (save(rgb, "TIFF"), rgb, 0),
        "RGB tiff lzw": (save(rgb, "TIFF", compression="tiff_lzw"), rgb, 0),
        "RGB ppm": (save(rgb, "PPM"), rgb, 0),
        "L png": (save(grey, "PNG"), threes, 0),
        "L jpeg": (save(grey, "JPEG", quality=100), threes, 2),
        "LA png": (save(Image.fromarray(la), "PNG"), over_white(threes, ramp), 1.01),
        "RGBA png": (save(rgba, "PNG"), over_white(rgb, ramp), 1.01),
        "RGBA webp": (save(rgba, "WEBP", lossless=True, exact=True), over_white(rgb, ramp), 1.01),
        "RGBA tiff": (save(rgba, "TIFF"), over_white(rgb, ramp), 1.01),
        "P png": (save(palette, "PNG"), coloured, 0),
        "P gif": (save(palette, "GIF"), coloured, 0),
        "P png, one clear colour": (save(palette, "PNG", transparency=7), clear_from, 0),
        "P gif, one clear colour": (save(palette, "GIF", transparency=7), clear_from, 0),
        "P png, alpha for each colour": (
            save(palette, "PNG", transparency=bytes(range(0, 256, 8))),
            over_white(coloured, np.asarray(palette) * 8),
            1.01,
        ),
        "L png, one clear level": (
            save(grey, "PNG", transparency=int(grey[3, 3])),
            np.where(threes == grey[3, 3], 255, threes),
            0,
        ),
        "RGB png, one clear colour": (
            save(rgb, "PNG", transparency=tuple(rgb[5, 5].tolist())),
            np.where((rgb == rgb[5, 5]).all(2, keepdims=True), 255, rgb),
            0,
        ),
        "1 png": (save(Image.fromarray(bits).convert("1"), "PNG"), np.repeat(bits[..., None], 3, 2), 0),
        "1 tiff": (
            save(Image.fromarray(bits).convert("1"), "TIFF", compression="group4"),
            np.repeat(bits[..., None], 3, 2),
            0,
        ),
        "I;16 png": (save(wide, "PNG"), threes, 0),
        "I;16 tiff": (save(wide, "TIFF"), threes, 0),
        "I;16 png by hand": (png(wide[..., None], 0, 16), threes, 0),
        "RGB png of 16 bits": (png(wide_rgb, 2, 16), rgb, 0),
        "RGBA png of 16 bits": (
            png(np.dstack([wide_rgb, ramp.astype(np.uint16) * 257]), 6, 16),
            over_white(rgb, ramp),
            1.01,
        ),
        "F tiff": (save(grey.astype(np.float32), "TIFF"), threes, 0),
        "CMYK jpeg": (save(Image.fromarray(cmyk, "CMYK"), "JPEG", quality=100), multiplied, 8),
        "YCCK jpeg": (ycck, multiplied, 8),
        "CMYK tiff": (save(Image.fromarray(cmyk, "CMYK"), "TIFF"), multiplied, 1.01),
        "progressive jpeg": (save(rgb, "JPEG", quality=100, subsampling=0, progressive=True), rgb, 4),
        "4:4:4 jpeg": (save(rgb, "JPEG", quality=100, subsampling=0), rgb, 4),
        "RGB jpeg": (save(rgb, "JPEG", quality=100, keep_rgb=True), rgb, 4),
        "animated gif": (
            save(palette, "GIF", save_all=True, append_images=[Image.new("P", (WIDTH, HEIGHT))]),
            coloured,
            0,
        ),
    }


def test_every_odd_image_becomes_the_right_rgb(rgb):
    for name, (data, truth, tolerance) in odd_images(rgb).items():
        found = codecs.load_rgb(data)
        assert found.dtype == np.uint8 and found.flags.c_contiguous and found.flags.writeable, name
        assert difference(found, truth).max() <= tolerance, name
        probe = codecs.probe(data)
        assert (probe.height, probe.width, probe.orientation) == (HEIGHT, WIDTH, 1), name
        assert codecs.is_jpeg(data) == (probe.format == "JPEG") == ("jpeg" in name), name
        assert np.array_equal(codecs.load_rgb(memoryview(bytearray(data))), found), name


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "progressive", "CMYK", "PNG", "WEBP", "TIFF", "TIFF lzw"])
def test_exif_orientation_as_pillow_turns_it(rgb, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {
        "progressive": {"progressive": True},
        "WEBP": {"lossless": True},
        "TIFF lzw": {"compression": "tiff_lzw"},
    }.get(kind, {})
    image = Image.fromarray(rgb).convert("CMYK") if kind == "CMYK" else Image.fromarray(rgb)
    saved = {"progressive": "JPEG", "CMYK": "JPEG", "TIFF lzw": "TIFF"}.get(kind, kind)
    data = save(image, saved, exif=exif, **options)
    truth = pillow(data)
    assert truth.shape == ((WIDTH, HEIGHT, 3) if orientation >= 5 else (HEIGHT, WIDTH, 3))
    assert difference(codecs.load_rgb(data), truth).max() <= 1
    probe = codecs.probe(data)
    assert (probe.height, probe.width) == truth.shape[:2] and probe.orientation == orientation
    assert probe.keepable == (kind in ("JPEG", "progressive") and orientation == 1)


@pytest.mark.parametrize("tag", [b"II*\0", b"MM\0*"])
def test_orientation_in_either_byte_order_and_behind_other_tags(rgb, tag):
    order = "<" if tag[:1] == b"I" else ">"
    entries = [(0x010F, 2, 4, b"abc\0"), (0x0112, 3, 1, struct.pack(order + "HH", 6, 0))]
    body = struct.pack(order + "H", 2) + b"".join(struct.pack(order + "HHI", *e[:3]) + e[3] for e in entries)
    exif = b"Exif\0\0" + tag + struct.pack(order + "I", 8) + body + b"\0\0\0\0"
    for kind in ("JPEG", "PNG", "WEBP"):
        data = save(rgb, kind, exif=exif)
        assert difference(codecs.load_rgb(data), pillow(data)).max() <= 1
        assert codecs.probe(data).orientation == 6


def test_orientation_of_a_png_that_names_it_after_its_pixels(rgb):
    exif = Image.Exif()
    exif[0x0112] = 8
    data = save(rgb, "PNG", exif=exif)
    at = data.index(b"eXIf") - 4
    chunk = data[at : at + 12 + int.from_bytes(data[at : at + 4], "big")]
    end = len(data) - 12
    late = data[:at] + data[at + len(chunk) : end] + chunk + data[end:]
    assert late.index(b"IDAT") < late.index(b"eXIf")
    assert np.array_equal(codecs.load_rgb(late), pillow(late)) and codecs.load_rgb(late).shape[0] == WIDTH
    assert (codecs.probe(late).orientation, codecs.probe(late).height) == (8, WIDTH)


def test_damaged_exif_costs_the_orientation_only(rgb):
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = save(rgb, "JPEG", exif=exif)
    at = whole.index(b"Exif\0\0") + 6
    for change in (b"XX", b"II\x2a\0\xff\xff\xff\xff", b"II\x2a\0\x08\0\0\0\xff\xff"):
        data = whole[:at] + change + whole[at + len(change) :]
        assert codecs.load_rgb(data).shape in ((HEIGHT, WIDTH, 3), (WIDTH, HEIGHT, 3))
        assert codecs.probe(data).format == "JPEG"


def test_which_jpeg_can_be_kept(rgb):
    def keepable(data):
        return codecs.probe(data).keepable

    assert keepable(save(rgb, "JPEG")) and keepable(save(rgb[..., 0], "JPEG"))
    for subsampling in ("4:4:4", "4:2:2", "4:2:0"):
        assert keepable(save(rgb, "JPEG", subsampling=subsampling))
    assert keepable(codecs.encode_jpeg(rgb)) and keepable(save(rgb, "JPEG", restart_marker_blocks=3))
    assert keepable(save(rgb, "JPEG", progressive=True))
    assert not keepable(save(rgb, "JPEG", keep_rgb=True))
    assert not keepable(save(Image.fromarray(rgb).convert("CMYK"), "JPEG"))
    assert not keepable(save(Image.fromarray(rgb).convert("CMYK"), "JPEG", progressive=True))
    assert not keepable(save(rgb, "JPEG", keep_rgb=True, progressive=True))
    assert not keepable(save(rgb, "PNG"))


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("progressive", [False, True])
def test_scaled_decoding_is_never_smaller_than_asked(picture, orientation, progressive):
    exif = Image.Exif()
    exif[0x0112] = orientation
    source = np.asarray(Image.fromarray(picture(24, 36, 1)).resize((500, 333), Image.Resampling.BICUBIC))
    data = save(source, "JPEG", quality=95, exif=exif, progressive=progressive)
    full = codecs.load_rgb(data)
    height, width = full.shape[:2]
    eighths = set()
    for least in [(1, 1), (42, 30), (43, 30), (84, 126), (126, 84), (170, 170), (200, 9), (9, 300), (333, 9)]:
        small = codecs.load_rgb(data, min_size=least)
        sizes = [(-(-height * n // 8), -(-width * n // 8)) for n in range(1, 9)]
        enough = [n for n, size in enumerate(sizes, 1) if size[0] >= least[0] and size[1] >= least[1]]
        assert small.shape[:2] == sizes[enough[0] - 1], "not the smallest that is large enough"
        eighths.add(enough[0])
        averaged = Image.fromarray(full).resize(small.shape[1::-1], Image.Resampling.BILINEAR)
        assert difference(small, averaged).mean() < 4, "it shows something else"
    assert len(eighths) >= 5 and {1, 8} <= eighths
    assert np.array_equal(codecs.load_rgb(data, min_size=(9999, 1)), full)
    assert np.array_equal(codecs.load_rgb(save(source, "PNG"), min_size=(10, 10)), source)  # only JPEG scales


def broken(kind):
    """What each format's file is called by Pillow and how it is saved, for the tests of damage."""
    options = {
        "WEBP": {"lossless": True},
        "TIFF lzw": {"compression": "tiff_lzw"},
        "progressive": {"progressive": True},
    }
    return {"TIFF lzw": "TIFF", "progressive": "JPEG"}.get(kind, kind), options.get(kind, {})


KINDS = [
    "JPEG",
    "progressive",
    "PNG",
    "WEBP",
    "GIF",
    "BMP",
    "TIFF",
    "TIFF lzw",
    "JPEG2000",
    "AVIF",
    "DDS",
    "TGA",
    "PPM",
]


@pytest.mark.parametrize(
    "kind", ["JPEG", "progressive", "PNG", "WEBP", "BMP", "TIFF", "TIFF lzw", "PPM", "GIF"]
)
def test_truncated_files_are_refused_with_a_reason(rgb, kind):
    saved, options = broken(kind)
    data = save(rgb, saved, **options)
    for part in (0.95, 0.7, 0.5, 0.2, 0.05):
        with pytest.raises(CorruptError) as caught:
            codecs.load_rgb(data[: int(len(data) * part)])
        assert len(caught.value.reason) > 15 and caught.value.reason[0].islower()
        assert caught.value.index is None


def test_a_jpeg_without_its_last_bytes_is_truncated(rgb):
    data = codecs.encode_jpeg(rgb)
    assert data.endswith(b"\xff\xd9")
    for cut in (1, 2, 3, 50):
        with pytest.raises(CorruptError, match=r"JPEG cannot be decoded.*(Premature|marker)"):
            codecs.load_rgb(data[:-cut])
        codecs.probe(data[:-cut])  # the header is whole


@pytest.mark.parametrize(
    "data",
    [
        b"\0",
        b"GIF89a",
        b"hello " * 100,
        b"\xff\xd8\xff",
        b"\xff\xd8\xff\xe0" + b"\0" * 50,
        b"PK\3\4" + b"\0" * 99,
    ],
)
@pytest.mark.parametrize("function", [codecs.load_rgb, codecs.probe])
def test_what_is_no_image_says_so(data, function):
    with pytest.raises(CorruptError, match="not an image that can be read"):
        function(data)


@pytest.mark.parametrize("function", [codecs.load_rgb, codecs.probe])
def test_an_empty_file_says_so(function):
    with pytest.raises(CorruptError, match="it is empty"):
        function(b"")


def bombs(rgb):
    side = 65000
    sizes = struct.pack(">II", side, side)
    ihdr = b"IHDR" + sizes + b"\x08\x02\0\0\0"
    data = save(rgb, "PNG")
    yield "PNG", data[:12] + ihdr + struct.pack(">I", zlib.crc32(ihdr)) + data[33:]
    yield "BMP", (d := save(rgb, "BMP"))[:18] + struct.pack("<ii", side, side) + d[26:]
    yield "GIF", (d := save(rgb, "GIF"))[:6] + struct.pack("<HH", side, side) + d[10:]
    for name, options in (("baseline", {}), ("progressive", {"progressive": True})):
        data = save(rgb, "JPEG", **options)
        at = data.index(b"\xff\xc2" if options else b"\xff\xc0") + 5
        yield f"JPEG {name}", data[:at] + struct.pack(">HH", side, side) + data[at + 4 :]


def test_a_decompression_bomb_is_refused_before_it_is_decoded(rgb):
    for name, data in bombs(rgb):
        began = time.perf_counter()
        with pytest.raises(CorruptError, match=r"pixels|65000|exceeds"):
            codecs.load_rgb(data)
        assert time.perf_counter() - began < 1, name


@given(st.data())
@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
def test_changed_bytes_are_an_error_of_ours_or_an_image(data):
    """Never a crash and never a foreign exception, whatever the decoders of Pillow think of it."""
    kind = data.draw(st.sampled_from(KINDS))
    saved, options = broken(kind)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    content = bytearray(save(np.dstack([x * 4, y * 6, (x * y) % 256]).astype(np.uint8), saved, **options))
    near = st.integers(0, min(len(content), 120) - 1)  # half of the changes hit headers
    for at in data.draw(st.lists(near | st.integers(0, len(content) - 1), max_size=6)):
        content[at] = data.draw(st.integers(0, 255))
    content = bytes(content[: data.draw(st.sampled_from([len(content), len(content) // 2]))])
    found = []
    for function in (codecs.load_rgb, codecs.probe, codecs.keep_jpeg):
        try:
            found.append(function(content))
        except CorruptError as error:
            assert error.reason
            found.append(None)
    if found[0] is not None:
        assert found[0].dtype == np.uint8 and found[0].ndim == 3 and found[0].shape[2] == 3
        assert (found[1].height, found[1].width) == found[0].shape[:2]


def test_jpeg_equals_pillow_on_real_photographs(photos):
    for data in photos[:25]:
        assert difference(codecs.load_rgb(data), pillow(data)).max() <= 1
        probe = codecs.probe(data)
        assert (probe.height, probe.width) == pillow(data).shape[:2]


@given(
    st.tuples(st.integers(1, 70), st.integers(1, 70)),
    st.tuples(st.integers(1, 90), st.integers(1, 90)),
    st.integers(0, 2**16),
)
@settings(max_examples=80, deadline=None)
def test_resize_equals_pillow_within_one_level(source, size, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (*source, 3), np.uint8)
    theirs = Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR)
    assert difference(codecs.resize(pixels, size), theirs).max() <= 1
    turned = np.asfortranarray(pixels)  # memory in another order is the same picture
    assert np.array_equal(codecs.resize(turned, size), codecs.resize(pixels, size))


@pytest.mark.parametrize("quality", [-1, 0, 101, 1000])
def test_quality_out_of_bounds(rgb, quality):
    with pytest.raises(UsageError, match=f"1 to 100, got {quality}$"):
        codecs.encode_jpeg(rgb, quality)


@pytest.mark.parametrize("quality", [1, 30, 75, 90, 95, 100])
def test_encoding_is_as_good_as_other_encoders_at_that_quality(picture, quality):
    pixels = picture(200, 304, 2)
    ours = codecs.encode_jpeg(pixels, quality)
    turbo = simplejpeg.encode_jpeg(pixels, quality=quality, colorsubsampling="420", fastdct=False)
    pil = save(pixels, "JPEG", quality=quality, subsampling="4:2:0")
    for theirs in (turbo, pil):
        assert abs(psnr(pillow(ours), pixels) - psnr(pillow(theirs), pixels)) < 0.1
        assert len(ours) < len(theirs) * 1.15 + 1500
    assert np.array_equal(codecs.decode_jpeg(codecs.as_bytes(ours)), codecs.load_rgb(ours))
    with Image.open(io.BytesIO(ours)) as image:
        assert image.mode == "RGB" and image.size == (304, 200) and not image.info.get("progressive")
        assert [layer[1:3] for layer in image.layer] == [(2, 2), (1, 1), (1, 1)]  # 4:2:0
    assert (
        b"\xff\xc0" in ours and b"\xff\xdd" in ours and b"\xff\xd0" in ours
    )  # baseline, with restart markers


def test_quality_orders_size_and_fidelity(picture):
    pixels = picture(160, 160, 4)
    files = [codecs.encode_jpeg(pixels, q) for q in (10, 40, 70, 95)]
    assert sorted(map(len, files)) == [len(f) for f in files]
    values = [psnr(codecs.load_rgb(f), pixels) for f in files]
    assert values == sorted(values) and codecs.encode_jpeg(pixels) == codecs.encode_jpeg(pixels, 90)


@pytest.mark.parametrize("size", [(1, 1), (17, 40), (64, 200), (150, 131)])
def test_padded_pixels_give_the_same_bytes_and_the_index_is_true(size):
    """Noise at quality 100 has many stuffed bytes, and segments of every length."""
    rgb = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    padded = np.full((*size, 4), 77, np.uint8)
    padded[:, :, :3] = rgb
    data = codecs.encode_jpeg(rgb, 100)
    assert codecs.encode_jpeg(padded, 100) == data
    info, status = jpeg.parse(np.frombuffer(data, np.uint8))
    assert status == jpeg.OK
    lengths = np.frombuffer(data, "<u2", int(info[jpeg.INDEX_COUNT]), int(info[jpeg.INDEX_AT]))
    assert lengths.tolist() == [len(segment) + 2 for segment in oracle.restart_segments(data)]
    again = codecs.load_rgb(data, padded=True)
    assert again.shape == (*size, 4) and np.array_equal(again[:, :, :3], codecs.load_rgb(data))


@given(st.integers(1, 100), st.integers(1, 100), st.integers(0, 255))
@settings(max_examples=60, deadline=None)
def test_any_size_encodes_and_comes_back(height, width, level):
    y, x = np.mgrid[:height, :width]
    pixels = np.dstack([np.full_like(x, level), x * 2, y * 2]).astype(np.uint8)
    data = codecs.encode_jpeg(np.asfortranarray(pixels), 95)
    assert difference(codecs.load_rgb(data), pixels).mean() < 3
    assert np.array_equal(codecs.load_rgb(data), pillow(data))
    assert codecs.probe(data) == codecs.Probe("JPEG", width, height, 1, True)
    array = codecs.as_bytes(data)
    rgbx = codecs.decode_rgbx(array, (0, 0), True)
    assert np.array_equal(rgbx[..., :3], codecs.load_rgb(data))
    memory = np.full(height * width * 4 + 64, 0x55, np.uint8)
    view = codecs.decode_rgbx(array, (0, 0), True, memory)
    assert np.shares_memory(view, memory) and np.array_equal(view[..., :3], rgbx[..., :3])
