"""Resize on planes and whole crops: against the oracle and Pillow, over poisoned memory, and with hostile bytes."""

import io
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastload import codecs
from fastload.kernels import crops, decode, jpeg, oracle, planes
from fastload.kernels.jit import kernel

WORK = decode.new_work()
GUARD = 256


# Parts of kernels are only compiled into kernels: these make them callable.
@kernel
def crop_to(data, height, width, box, clip, flips, out, work, scratch, need):
    return crops.crop_to(
        data, height, width, box, clip, flips, out, work, scratch, need, np.zeros((2, 0), np.int64)
    )


@kernel
def triangle(start, stop, low, high, size, flip, first, weights):
    return planes.triangle(start, stop, low, high, size, flip, first, weights)


def picture(height, width, seed=0, noise=8.0):
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    base = 127 + 60 * np.sin(y / (7 + seed))[..., None] + 55 * np.cos(x[..., None] / (5 + np.arange(3)))
    return np.clip(base + rng.normal(0, noise, (height, width, 3)), 0, 255).astype(np.uint8)


def encode(pixels, mode="RGB", **options):
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, "JPEG", **options)
    return out.getvalue()


def once(data, shape, box, clip, size, flips, sentinel, memory):
    """(status, out, need): everything that the kernel may not touch is checked to be untouched."""
    array = np.frombuffer(data, np.uint8)
    out = np.full((size[0] + 2, size[1] + 2, 3), sentinel, np.uint8)
    scratch = np.full(memory + 2 * GUARD, sentinel, np.uint8)
    need = np.zeros(1, np.int64)
    status = int(
        crop_to(
            array,
            *shape,
            np.array(box, np.float64),
            np.array(clip, np.int64),
            flips,
            out[1:-1, 1:-1],
            WORK,
            scratch[GUARD:-GUARD],
            need,
        )
    )
    inner = out[1:-1, 1:-1].copy()
    out[1:-1, 1:-1] = sentinel
    assert (out == sentinel).all(), "wrote outside of the output"
    assert (scratch[:GUARD] == sentinel).all() and (scratch[-GUARD:] == sentinel).all(), (
        "wrote outside of scratch"
    )
    return status, inner, int(need[0])


def crop(data, shape, box, clip, size, flips=0, memory=0):
    """The kernel's status and pixels, proved to depend on nothing that scratch or output held before."""
    memory = memory or once(data, shape, box, clip, size, flips, 0, 0)[2]
    results = [once(data, shape, box, clip, size, flips, sentinel, memory) for sentinel in (0x55, 0xAA)]
    assert results[0][0] == results[1][0]
    if results[0][0] == crops.OK:
        assert np.array_equal(results[0][1], results[1][1]), "shows memory that is not the picture's"
    else:
        assert (results[0][1] == 0x55).all()
    return results[0][0], results[0][1]


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_taps_are_the_oracles_and_stay_inside(data):
    length = data.draw(st.integers(1, 300))
    low = data.draw(st.integers(0, length - 1))
    high = data.draw(st.integers(low + 1, length))
    start = data.draw(st.floats(-20, length))
    stop = start + data.draw(st.floats(0.25, 300))
    size, flip = data.draw(st.integers(1, 70)), data.draw(st.booleans())
    first = np.full(size, -1, np.int64)
    weights = np.zeros((int(2 * max((stop - start) / size, 1)) + 3, size), np.uint16)
    used = triangle(start, stop, low, high, size, flip, first, weights)
    assert (first >= low).all() and (first + used <= high).all()
    matrix = np.zeros((size, length))
    for k in range(used):
        matrix[np.arange(size), first + k] += weights[k] / 65535
    expected = oracle.axis_matrix(start, stop, low, high, length, size)
    assert np.abs(matrix - (expected[::-1] if flip else expected)).max() < 1.6e-5
    steps = np.diff(first)
    assert (steps <= 0).all() if flip else (steps >= 0).all()


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_any_crop_is_the_oracles_within_a_level(data):
    mode = data.draw(st.sampled_from(["4:4:4", "4:2:2", "4:2:0", "grey"]))
    height, width = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    pixels = picture(height, width, data.draw(st.integers(0, 3)))
    options = {"quality": 95, "restart_marker_blocks": data.draw(st.sampled_from([0, 1, 2]))}
    encoded = (
        encode(pixels, "L", **options) if mode == "grey" else encode(pixels, subsampling=mode, **options)
    )
    if data.draw(st.booleans()):
        encoded = codecs.keep_jpeg(encoded)
    y0, x0 = data.draw(st.floats(0, height - 0.5)), data.draw(st.floats(0, width - 0.5))
    box = (y0, x0, data.draw(st.floats(y0 + 0.25, height)), data.draw(st.floats(x0 + 0.25, width)))
    clip = (0, 0, height, width)
    if data.draw(st.booleans()):
        box = tuple(int(v) for v in box)
        box = clip = (*box[:2], max(box[2], box[0] + 1), max(box[3], box[1] + 1))
    # Sizes that ask for no reduction of either plane.
    size = tuple(data.draw(st.integers(max(1, int((box[2 + a] - box[a]) / 1.99) + 1), 60)) for a in (0, 1))
    flips = data.draw(st.integers(0, 3))
    status, ours = crop(encoded, (height, width), box, clip, size, flips)
    assert status == crops.OK
    sampling = {"4:4:4": (1, 1), "4:2:2": (1, 2), "4:2:0": (2, 2), "grey": (1, 1)}[mode]
    samples = [np.floor(p + 0.5) for p in oracle.jpeg_planes(encoded)]
    exact = oracle.crop_planes(samples, sampling, box, clip, size, flips)
    # The integer inverse DCT is within a level of the real one, and chroma counts up to 1.8 times.
    assert np.abs(ours.astype(int) - exact).max() <= 3


@pytest.mark.parametrize("flips", [0, 1, 2, 3])
def test_resizing_adds_no_error_to_exact_planes(flips):
    """Blocks of one value have exact planes: what is left is the fixed point of the two passes and the colours."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (6, 8, 3)).astype(np.uint8)
    encoded = encode(blocks.repeat(16, axis=0).repeat(16, axis=1), quality=100, subsampling="4:4:4")
    exact_planes = [np.floor(p + 0.5) for p in oracle.jpeg_planes(encoded)]
    for size in ((50, 61), (96, 128), (200, 177)):
        status, ours = crop(encoded, (96, 128), (3.5, 2, 90, 121.25), (0, 0, 96, 128), size, flips)
        exact = oracle.crop_planes(exact_planes, (1, 1), (3.5, 2, 90, 121.25), (0, 0, 96, 128), size, flips)
        difference = np.abs(ours.astype(int) - exact)
        assert status == crops.OK and difference.max() <= 1 and (difference > 0).mean() < 0.05


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_reduced_planes_show_the_same_picture(factor):
    small = Image.fromarray(picture(64, 80, noise=0))
    pixels = np.asarray(small.resize((factor * 80, factor * 64), Image.Resampling.BICUBIC))
    encoded = codecs.encode_jpeg(pixels, 95)
    status, ours = crop(
        encoded, pixels.shape[:2], (0, 0, *pixels.shape[:2]), (0, 0, *pixels.shape[:2]), (60, 70)
    )
    whole = Image.fromarray(codecs.decode_jpeg(np.frombuffer(encoded, np.uint8)))
    expected = np.asarray(whole.resize((70, 60), Image.Resampling.BILINEAR)).astype(int)
    assert status == crops.OK and np.abs(ours - expected).mean() < 2


def test_photographs_are_pillows_within_a_level_on_average(photos):
    rng = np.random.default_rng(0)
    errors = []
    for content in photos[:30]:
        stored = codecs.encode_jpeg(codecs.load_rgb(content))
        with Image.open(io.BytesIO(stored)) as image:
            width, height = image.size
            for _ in range(2):
                h, w = rng.integers(height // 3, height + 1), rng.integers(width // 3, width + 1)
                y, x = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
                box = (int(y), int(x), int(y + h), int(x + w))
                status, ours = crop(stored, (height, width), box, box, (224, 224))
                part = image.convert("RGB").crop((box[1], box[0], box[3], box[2]))
                theirs = np.asarray(part.resize((224, 224), Image.Resampling.BILINEAR)).astype(int)
                assert status == crops.OK
                errors.append(np.abs(ours - theirs).mean())
    assert np.mean(errors) < 1


def test_too_little_scratch_says_how_much():
    data = codecs.encode_jpeg(picture(90, 120))
    arguments = (data, (90, 120), (0, 0, 90, 120), (0, 0, 90, 120), (64, 64), 0)
    status, _, need = once(*arguments, 0, 10)
    assert status == crops.MORE_SCRATCH
    assert once(*arguments, 0, need - 1)[0] == crops.MORE_SCRATCH
    assert once(*arguments, 0, need)[0] == crops.OK


@pytest.mark.parametrize(
    ("box", "clip"),
    [
        ((0, 0, 10, 10), (0, 0, 91, 10)),
        ((0, 0, 10, 10), (-1, 0, 10, 10)),
        ((0, 0, 10, 10), (5, 5, 5, 10)),
        ((3, 0, 3, 10), (0, 0, 10, 10)),
        ((float("nan"), 0, 10, 10), (0, 0, 10, 10)),
        ((0, 0, float("inf"), 10), (0, 0, 10, 10)),
    ],
)
def test_impossible_boxes_are_refused(box, clip):
    data = codecs.encode_jpeg(picture(90, 120))
    assert once(data, (90, 120), box, clip, (8, 8), 0, 0x55, 1 << 20)[0] == crops.BAD_BOX


@pytest.mark.parametrize(
    "box", [(-500.0, -500.0, -400.0, -400.0), (1e6, 0, 2e6, 10), (-30.0, -30.0, 150.0, 150.0)]
)
def test_a_box_outside_of_the_clip_takes_its_edge(box):
    data = codecs.encode_jpeg(np.full((90, 120, 3), 77, np.uint8), 100)
    status, out = crop(data, (90, 120), box, (3, 5, 80, 110), (9, 20))
    assert (status == crops.OK and (abs(out.astype(int) - 77) <= 1).all()) or status == crops.UNSUPPORTED


def test_the_picture_must_be_as_large_as_the_file_says():
    data = codecs.encode_jpeg(picture(90, 120))
    assert once(data, (90, 121), (0, 0, 9, 9), (0, 0, 90, 121), (8, 8), 0, 0, 1 << 20)[0] == crops.BAD_FRAME


def segments_of(data):
    """(marker, begin, end) of each header segment."""
    at, found = 2, []
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xD9:
        length = 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        found.append((data[at + 1], at, at + length))
        at += length
        if found[-1][0] == 0xDA:
            break
    return found


def mutate(good, rng):
    """A damaged JPEG: single bytes, lengths, markers, sizes, tables, swapped, doubled or lost segments, truncation."""
    bad = bytearray(good)
    for _ in range(int(rng.integers(1, 4))):
        kind = int(rng.integers(0, 9))
        found = segments_of(bad)
        scan = found[-1][2] if found else 2
        if not bad or len(bad) < 8:
            return bytes(bad)
        if kind == 0:  # bytes anywhere
            for _ in range(int(rng.integers(1, 6))):
                bad[int(rng.integers(0, len(bad)))] = int(
                    rng.choice([0, 0xFF, 0xD9, 0xD0, 1, int(rng.integers(0, 256))])
                )
        elif kind == 1:  # bytes of one header segment, its length among them
            _, begin, end = found[int(rng.integers(0, len(found)))] if found else (0, 0, 8)
            for _ in range(int(rng.integers(1, 4))):
                bad[min(int(rng.integers(begin, max(end, begin + 1))), len(bad) - 1)] = int(
                    rng.integers(0, 256)
                )
        elif kind == 2:  # the picture's size or sampling
            frames = [b for m, b, _ in found if m in (0xC0, 0xC1)]
            if frames and frames[0] + 19 < len(bad):
                place = frames[0] + int(rng.choice([5, 7]))
                bad[place : place + 2] = struct.pack(
                    ">H", int(rng.choice([0, 1, 8, 17, 4096, 65535, int(rng.integers(1, 400))]))
                )
                if rng.integers(0, 2):
                    bad[frames[0] + 9] = int(rng.integers(0, 5))
                    bad[frames[0] + 11] = int(rng.choice([0x11, 0x21, 0x12, 0x22, 0x44, 0]))
        elif kind == 3:  # bits of the image data
            for _ in range(int(rng.integers(1, 8))):
                place = int(rng.integers(min(scan, len(bad) - 1), len(bad)))
                bad[place] ^= 1 << int(rng.integers(0, 8))
        elif kind == 4:  # a Huffman table
            tables = [(b, e) for m, b, e in found if m == 0xC4]
            if tables:
                begin, end = tables[int(rng.integers(0, len(tables)))]
                place = min(begin + 5 + int(rng.integers(0, 30)), len(bad) - 1)
                bad[place] = int(rng.integers(0, 256))
        elif kind == 5:  # a restart marker less, or more, or another
            markers = [i for i in range(scan, len(bad) - 1) if bad[i] == 0xFF and 0xD0 <= bad[i + 1] <= 0xD9]
            if markers:
                place = markers[int(rng.integers(0, len(markers)))]
                what = int(rng.integers(0, 3))
                bad[place : place + 2] = (b"", bytes(bad[place : place + 2]) * 2, b"\xff\xd3")[what]
        elif kind == 6 and found:  # a header segment lost, doubled or moved
            _, begin, end = found[int(rng.integers(0, len(found)))]
            part = bytes(bad[begin:end])
            del bad[begin:end]
            if rng.integers(0, 2):
                place = int(rng.choice([2, begin]))
                bad[place:place] = part * int(rng.integers(1, 3))
        elif kind == 7:  # the restart interval
            begin = bytes(bad).find(b"\xff\xdd\0\4")
            if begin >= 0:
                bad[begin + 4 : begin + 6] = struct.pack(">H", int(rng.choice([0, 1, 2, 3, 65535])))
        else:
            del bad[int(rng.integers(0, len(bad))) :]
    return bytes(bad)


def seeds():
    """Small files of each kind, with and without restart markers and index."""
    made = []
    for i, (mode, subsampling) in enumerate(
        [("RGB", "4:2:0"), ("RGB", "4:2:2"), ("RGB", "4:4:4"), ("L", "4:2:0"), ("RGB", "4:2:0")]
    ):
        pixels = picture(48 + 8 * i, 70 - 5 * i, i)
        options = {
            "quality": 60 + 10 * i,
            "optimize": i % 2 == 1,
            "restart_marker_blocks": (0, 2, 3, 1, 5)[i],
        }
        if mode == "RGB":
            options["subsampling"] = subsampling
        plain = encode(pixels, mode, **options)
        made += [(plain, pixels.shape[:2]), (codecs.keep_jpeg(plain), pixels.shape[:2])]
    made.append((codecs.encode_jpeg(picture(60, 90)), (60, 90)))
    return made


def attack(good, shape, rng):
    """One mutation, decoded twice over different poison; the status."""
    bad = mutate(good, rng)
    info, status = jpeg.parse(np.frombuffer(bad, np.uint8))
    if status == jpeg.OK and rng.integers(0, 2):  # as if the dataset's header agreed
        shape = (int(info[jpeg.HEIGHT]), int(info[jpeg.WIDTH]))
    y0, x0 = rng.uniform(0, shape[0] - 0.5), rng.uniform(0, shape[1] - 0.5)
    box = (y0, x0, rng.uniform(y0 + 0.25, shape[0]), rng.uniform(x0 + 0.25, shape[1]))
    if rng.integers(0, 4) == 0:
        box = (0.0, 0.0, float(shape[0]), float(shape[1]))
    size = (int(rng.integers(1, 40)), int(rng.integers(1, 40)))
    status, _, need = once(bad, shape, box, (0, 0, *shape), size, int(rng.integers(0, 4)), 0, 0)
    if status == crops.MORE_SCRATCH and need < 1 << 22:
        status, _ = crop(bad, shape, box, (0, 0, *shape), size, 0, need)
    return status


def test_hostile_bytes_give_a_status_or_a_picture():
    rng = np.random.default_rng(0)
    files = seeds()
    statuses = {attack(*files[i % len(files)], rng) for i in range(4000)}
    assert statuses <= {*crops.REASONS, crops.OK, crops.UNSUPPORTED}
    assert {
        crops.OK,
        crops.UNSUPPORTED,
        decode.TRUNCATED,
        decode.BAD_FRAME,
        decode.BAD_TABLE,
        decode.BAD_CODE,
        decode.OVERRUN,
        decode.BAD_MARKER,
        decode.TOO_MUCH,
    } <= statuses
    again = crops.REASONS.keys() - {crops.OK}
    assert all(crops.REASONS[s] for s in again)


def test_what_survives_is_what_libjpeg_turbo_shows():
    """Damaged image data that decode all the same: the same samples as the reference's, never others."""
    import simplejpeg

    rng = np.random.default_rng(5)
    plain = encode(picture(64, 96), "L", quality=80, restart_marker_blocks=4)
    start = plain.index(b"\xff\xda") + 10
    compared = 0
    for _ in range(1500):
        bad = bytearray(plain)
        place = int(rng.integers(start, len(bad) - 2))
        bad[place] ^= 1 << int(rng.integers(0, 8))
        box = (0, 0, 64, 96)
        status, ours = crop(bytes(bad), (64, 96), box, box, (64, 96), memory=1 << 17)
        if status != crops.OK:
            continue
        try:
            theirs = simplejpeg.decode_jpeg(bytes(bad), "GRAY", fastdct=False)[..., 0]
        except ValueError:
            continue
        compared += 1
        if not np.array_equal(ours[..., 0], theirs):
            # Only where 16 bits overflow in libjpeg-turbo's vector code: coefficients that no 8-bit picture has.
            coefficients = oracle.jpeg_coefficients(bytes(bad))[0]
            wild = np.abs(coefficients).max(axis=(2, 3)) > 4096
            differs = (ours[..., 0] != theirs).reshape(8, 8, 12, 8).any(axis=(1, 3))
            assert not (differs & ~wild).any()
    assert compared > 300
