"""Progressive JPEG as baseline: the same coefficients, whatever the scans were, or an error; against a writer and a reader of our
tests' own, and against libjpeg-turbo's pixels."""

import importlib.util
import io
import itertools
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastload import codecs
from fastload.convert_image import ImageOptions, store_image
from fastload.errors import CorruptError
from fastload.kernels import baseline, jpeg, progressive, restart

_spec = importlib.util.spec_from_file_location(
    "progressive_writer", Path(__file__).with_name("progressive_writer.py")
)
pw = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(pw)

GREY, S444, S422, S420, S440 = (
    [(1, 1)],
    [(1, 1)] * 3,
    [(2, 1), (1, 1), (1, 1)],
    [(2, 2), (1, 1), (1, 1)],
    [(1, 2), (1, 1), (1, 1)],
)
SIMPLE = ((1, 5, 0, 2), (6, 63, 0, 2), (1, 63, 2, 1), (1, 63, 1, 0))  # of AC, as libjpeg's own script


def picture(height, width, seed=0):
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    base = 127 + 70 * np.sin(y / 9)[..., None] + 50 * np.cos(x[..., None] / (4 + np.arange(3)))
    return np.clip(base + rng.normal(0, 12, (height, width, 3)), 0, 255).astype(np.uint8)


def encode(pixels, mode="RGB", **options):
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, "JPEG", progressive=True, **options)
    return out.getvalue()


def decode(data, exact=False):
    return simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=not exact)


def script_of(sampling, dc=(0, 1), interleaved=True):
    """DC with ``dc`` refinements from the highest to bit 0, then libjpeg's AC scans for each component."""
    count = len(sampling)
    groups = [tuple(range(count))] if interleaved else [(c,) for c in range(count)]
    low = dc[1]
    script = [(g, 0, 0, 0, low) for g in groups]
    script += [((c,), *band) for band in SIMPLE for c in range(count)]
    return script + [(g, 0, 0, bit + 1, bit) for bit in range(low - 1, -1, -1) for g in groups]


@st.composite
def scripts(draw, count):
    """Any order of scans that the standard allows and that ends with every coefficient known."""
    components = list(range(count))
    script = []

    def grouped():
        left = components
        while left:
            size = draw(st.integers(1, len(left)))
            yield tuple(left[:size])
            left = left[size:]

    def bands():
        edges = sorted({1, 64, *draw(st.lists(st.integers(2, 63), max_size=3))})
        return [(a, b - 1) for a, b in itertools.pairwise(edges)]

    low = draw(st.integers(0, 3))
    script += [(group, 0, 0, 0, low) for group in grouped()]
    queues = [[(group, 0, 0, bit + 1, bit) for bit in range(low - 1, -1, -1) for group in grouped()]]
    for c in components:
        low = draw(st.integers(0, 3))
        queue = [((c,), *band, 0, low) for band in bands()]
        for bit in range(low - 1, -1, -1):
            queue += [((c,), *band, bit + 1, bit) for band in bands()]
        queues.append(queue)
    while queues := [q for q in queues if q]:
        script.append(draw(st.sampled_from(queues)).pop(0))
    return script


def read(data):
    """Status and coefficients by the kernel, with guards around what it writes."""
    array = np.frombuffer(data, np.uint8)
    info, status = jpeg.parse(array)
    assert status == jpeg.OK
    grid = np.zeros(progressive.GRID, np.int64)
    blocks = int(progressive.layout(info, grid))
    memory = np.full((blocks + 8, 64), 0x5A5A, np.int16)
    memory[4:-4] = 0
    status = int(progressive.read_coefficients(array, info, grid, memory[4:-4]))
    assert (memory[:4] == 0x5A5A).all() and (memory[-4:] == 0x5A5A).all()
    return status, memory[4:-4], grid


def as_components(coefficients, grid, count, shapes):
    starts = grid[:count, progressive.START].tolist()
    return [
        coefficients[start : start + down * across].reshape(down, across, 64)
        for start, (down, across) in zip(starts, shapes)
    ]


def check(height, width, sampling, script, intervals=(), fill=0, seed=0):
    """Write, read, keep, read again: everything that is shown is equal to the bit."""
    components = pw.random_components(np.random.default_rng(seed), height, width, sampling)
    data = pw.write(height, width, sampling, components, script, intervals, fill)
    shapes = pw.padded(height, width, sampling)
    status, coefficients, grid = read(data)
    assert status == restart.OK
    kept = codecs.keep_jpeg(data)
    assert codecs.is_baseline(kept)
    again = pw.read_baseline(kept)
    # Blocks that only pad an MCU come with interleaved scans alone.
    interleaved = all(len(which) == len(sampling) for which, first, *_ in script if first == 0)
    found = as_components(coefficients, grid, len(sampling), shapes)
    for c, truth in enumerate(components):
        down, across = int(grid[c, progressive.DOWN]), int(grid[c, progressive.ACROSS])
        assert np.array_equal(found[c][:down, :across], truth[:down, :across])
        assert np.array_equal(again[c], found[c])
        outside = np.ones(shapes[c], bool)
        outside[:down, :across] = False
        assert not found[c][outside][:, 1:].any()
        if len(script[0][0]) == 1 and len(sampling) > 1:  # they cost least with the value beside them
            nearest = found[c][:down, :across, 0]
            nearest = np.pad(nearest, [(0, n - m) for n, m in zip(shapes[c], nearest.shape)], mode="edge")
            assert np.array_equal(found[c][..., 0], nearest)
        if interleaved:
            assert np.array_equal(found[c][..., 0], truth[..., 0])
    for exact in (False, True):
        assert np.array_equal(decode(kept, exact), decode(data, exact))
    info, status = jpeg.parse(np.frombuffer(kept, np.uint8))
    assert status == jpeg.OK and jpeg.can_crop(info)
    assert codecs.keep_jpeg(kept) == kept
    return kept


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_script_of_scans_keeps_its_coefficients(data):
    sampling = data.draw(st.sampled_from([GREY, [(2, 2)], S444, S422, S420, S440]))
    height, width = data.draw(st.integers(1, 50)), data.draw(st.integers(1, 50))
    script = data.draw(scripts(len(sampling)))
    intervals = data.draw(st.lists(st.integers(0, 7), max_size=len(script)))
    check(
        height, width, sampling, script, intervals, data.draw(st.integers(0, 2)), data.draw(st.integers(0, 9))
    )


@pytest.mark.parametrize("sampling", [GREY, S444, S422, S420, S440])
@pytest.mark.parametrize("interleaved", [True, False])
def test_each_sampling_with_and_without_interleaved_dc(sampling, interleaved):
    check(41, 53, sampling, script_of(sampling, interleaved=interleaved), intervals=[3] * 20)


def test_long_runs_of_empty_bands_across_many_blocks():
    """A run of 32,767 blocks, the longest there is, and more."""
    height = width = 8 * 185  # 34,225 blocks
    components = [np.zeros((185, 185, 64), np.int64)]
    components[0][184, 180, 9] = 5
    components[0][0, 0, 63] = -3
    data = pw.write(height, width, GREY, components, script_of(GREY))
    kept = codecs.keep_jpeg(data)
    status, coefficients, _ = read(data)
    assert status == restart.OK and np.array_equal(coefficients.reshape(185, 185, 64), components[0])
    assert np.array_equal(decode(kept), decode(data))


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_files_of_libjpeg_show_the_same_pixels(data):
    height, width = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    subsampling = data.draw(st.sampled_from(["4:2:0", "4:2:2", "4:4:4", "4:4:0", "grey"]))
    quality = data.draw(st.integers(30, 100))
    options = data.draw(st.sampled_from([{}, {"restart_marker_blocks": 3}, {"restart_marker_rows": 1}]))
    pixels = picture(height, width, data.draw(st.integers(0, 3)))
    if subsampling == "grey":
        original = encode(pixels, "L", quality=quality, **options)
    elif subsampling == "4:4:0":
        original = pixels_440(pixels, quality)
    else:
        original = encode(pixels, quality=quality, subsampling=subsampling, **options)
    kept = codecs.keep_jpeg(original)
    assert codecs.is_baseline(kept) and codecs.probe(kept).keepable and codecs.probe(original).keepable
    for exact in (False, True):
        assert np.array_equal(decode(kept, exact), decode(original, exact))
    with Image.open(io.BytesIO(kept)) as image:
        assert not image.info.get("progressive") and image.size == (width, height)


def pixels_440(pixels, quality):
    """Pillow writes no 4:4:0: the coefficients of simplejpeg's baseline file, sent by scans."""
    plain = simplejpeg.encode_jpeg(pixels, quality=quality, colorsubsampling="440")
    kept = codecs.keep_jpeg(plain)  # has the restart interval that the reader expects
    return pw.write(*pixels.shape[:2], S440, pw.read_baseline(kept), script_of(S440))


def test_photographs_keep_their_pixels(shared_data):
    found = before = after = 0
    with tarfile.open(shared_data("face_masks.tar")) as archive:
        for member in archive:
            if found == 25 or not member.isfile():
                continue
            data = archive.extractfile(member).read()
            info, status = jpeg.parse(np.frombuffer(data, np.uint8))
            if status != jpeg.OK or info[jpeg.FRAME] != 0xC2 or not codecs.probe(data).keepable:
                continue
            found += 1
            stored = store_image(data, ImageOptions(store="jpeg", reencode="never"))
            assert stored.how == "kept" and np.array_equal(decode(stored.image.data), decode(data))
            before, after = before + len(data), after + len(stored.image.data)
    assert found == 25 and after < 1.2 * before


def test_metadata_goes_and_the_colour_space_stays():
    exif = Image.Exif()
    exif[0x010E] = "secret place"
    kept = codecs.keep_jpeg(encode(picture(40, 40), exif=exif, comment=b"a comment", icc_profile=b"x" * 500))
    assert (
        b"secret" not in kept and b"a comment" not in kept and b"ICC_PROFILE" not in kept and b"JFIF" in kept
    )
    assert kept.count(b"\xff\xc4") == 1 and kept.count(b"\xff\xdd") == 1


# -- what is not transcoded -----------------------------------------------------------------------------------------


def test_an_incomplete_picture_is_left_to_the_decoder():
    """Without its last scans a decoder smooths the picture: no other file shows it alike."""
    components = pw.random_components(np.random.default_rng(1), 40, 40, S420)
    for script in (script_of(S420)[:1], script_of(S420)[:-1], [s for s in script_of(S420) if s[0] != (2,)]):
        data = pw.write(40, 40, S420, components, script)
        assert read(data)[0] == restart.UNSUPPORTED
        kept = codecs.keep_jpeg(data)
        assert not codecs.is_baseline(kept) and np.array_equal(decode(kept), decode(data))
        stored = store_image(data, ImageOptions(store="jpeg"))
        assert stored.how == "encoded"
        assert store_image(data, ImageOptions(store="auto", reencode="never")).how == "raw"


@pytest.mark.parametrize(
    "script",
    [
        [((0,), 0, 0, 0, 1), ((0,), 0, 0, 0, 0)],  # begins again instead of refining
        [((0,), 0, 0, 0, 2), ((0,), 0, 0, 1, 0)],  # leaves a bit out
        [((0,), 1, 63, 0, 0), ((0,), 0, 0, 0, 0)],  # AC before DC
    ],
)
def test_scripts_that_are_none(script):
    components = pw.random_components(np.random.default_rng(1), 20, 20, GREY)
    assert read(pw.write(20, 20, GREY, components, script))[0] == restart.UNSUPPORTED


def test_values_that_baseline_cannot_hold():
    for place, value in ((0, 2500), (5, 1024)):
        components = [np.zeros((2, 2, 64), np.int64)]
        components[0][0, 0, place] = value
        data = pw.write(
            16,
            16,
            GREY,
            components,
            [((0,), 0, 0, 0, 1), ((0,), 1, 63, 0, 1), ((0,), 0, 0, 1, 0), ((0,), 1, 63, 1, 0)],
        )
        status, coefficients, _ = read(data)
        assert status == restart.OK and coefficients[0, place] == value
        kept = codecs.keep_jpeg(data)
        assert not codecs.is_baseline(kept) and np.array_equal(decode(kept), decode(data))


def test_other_kinds_come_back_as_they_were():
    pixels = picture(30, 40)
    cmyk = io.BytesIO()
    Image.fromarray(pixels).convert("CMYK").save(cmyk, "JPEG", progressive=True)
    assert not codecs.probe(cmyk.getvalue()).keepable
    plain = encode(pixels)
    at = plain.index(b"\xff\xc2")
    for change in (b"\xff\xca", b"\xff\xc2\x00\x11\x0c"):  # arithmetic coding; 12 bits
        odd = plain[:at] + change + plain[at + len(change) :]
        assert not codecs.probe(odd).keepable
        assert codecs.keep_jpeg(odd)[-200:] == odd[-200:]


# -- hostile bytes --------------------------------------------------------------------------------------------------


def test_a_picture_that_claims_more_blocks_than_it_has_bits_takes_no_memory():
    data = encode(picture(16, 16))
    at = data.index(b"\xff\xc2") + 5
    for height, width in ((65535, 65535), (16000, 16000), (4000, 4000)):
        bomb = data[:at] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + data[at + 4 :]
        began = time.perf_counter()
        with pytest.raises(CorruptError, match=r"too early|pixels"):
            codecs.keep_jpeg(bomb)
        assert time.perf_counter() - began < 0.5


def test_the_work_for_many_scans_is_bounded():
    """Scans of empty bands cost a few bytes each and a visit of every block."""
    zeros = [np.zeros((40, 40, 64), np.int64)]
    head = [((0,), 0, 0, 0, 0)]
    whole = pw.write(320, 320, GREY, zeros, head + [((0,), k, k, 0, 0) for k in range(1, 64)])
    assert read(whole)[0] == restart.OK  # as many as there are coefficients is allowed
    more = [((0,), k, k, 0, 13) for k in range(1, 64)]
    more += [((0,), k, k, bit + 1, bit) for bit in range(12, -1, -1) for k in range(1, 64)]
    began = time.perf_counter()
    assert read(pw.write(64, 64, GREY, [zeros[0][:8, :8]], head + more))[0] == restart.UNSUPPORTED
    assert time.perf_counter() - began < 5


def mutants(data, rng, count):
    for trial in range(count):
        bad = np.frombuffer(data, np.uint8).copy()
        for _ in range(rng.integers(1, 4)):
            bad[rng.integers(2, bad.size)] = rng.choice(
                [0, 0xFF, 0xC4, 0xDA, 0xD0, int(rng.integers(0, 256))]
            )
        if trial % 4 == 0:
            bad = bad[: rng.integers(2, bad.size)]
        yield bad.tobytes()


@pytest.mark.parametrize("kind", ["libjpeg", "restarts", "script"])
def test_damaged_files_give_an_error_or_the_same_picture(kind):
    rng = np.random.default_rng(len(kind))
    if kind == "script":
        components = pw.random_components(rng, 40, 50, S420)
        data = pw.write(40, 50, S420, components, script_of(S420, interleaved=False), [2] * 20)
    else:
        options = {"restart_marker_blocks": 2} if kind == "restarts" else {}
        data = encode(picture(60, 50), quality=85, **options)
    refused = same = 0
    for bad in mutants(data, rng, 1500):
        info, status = jpeg.parse(np.frombuffer(bad, np.uint8))
        if status == jpeg.OK and info[jpeg.WIDTH] * info[jpeg.HEIGHT] < 1 << 16:
            read(bad)  # looks at the guards
        try:
            kept = codecs.keep_jpeg(bad)
        except CorruptError as error:
            assert len(error.reason) > 10
            refused += 1
            continue
        try:
            before = decode(bad)
        except ValueError:
            continue  # libjpeg-turbo refuses it: so it will when the sample is loaded
        assert np.array_equal(decode(kept), before)
        same += 1
    assert refused > 300 and same > 30


def test_truncated_data_are_refused():
    data = encode(picture(60, 80))
    first = data.index(b"\xff\xda")
    for cut in (1, 2, 3, 40, (len(data) - first) // 2, len(data) - first - 60):
        with pytest.raises(CorruptError, match=r"end too early|damaged|stray"):
            codecs.keep_jpeg(data[:-cut])


def test_a_scan_that_ends_too_early_is_refused():
    components = pw.random_components(np.random.default_rng(4), 60, 60, GREY)
    data = pw.write(60, 60, GREY, components, script_of(GREY))
    for n in range(1, 5):
        end = -1
        for _ in range(n):
            end = data.index(b"\xff\xda", end + 1)
        end = data.index(b"\xff\xc4", end)  # the tables of the next scan
        bad = data[: end - 12] + data[end:]
        with pytest.raises(ValueError):
            decode(bad)
        with pytest.raises(CorruptError, match="end too early"):
            codecs.keep_jpeg(bad)


def test_a_run_of_empty_bands_ends_at_a_restart_marker(monkeypatch):
    """Whatever it claims: so libjpeg-turbo reads it."""

    class Boastful(pw.Scan):
        def restart(self, number):
            self.run += 3 * (self.run > 0 and not self.pending)
            super().restart(number)

    monkeypatch.setattr(pw, "Scan", Boastful)
    components = pw.random_components(np.random.default_rng(5), 40, 64, GREY)
    data = pw.write(40, 64, GREY, components, script_of(GREY), [2] * 9)
    status, coefficients, _ = read(data)
    assert status == restart.OK and np.array_equal(coefficients.reshape(5, 8, 64), components[0])
    assert np.array_equal(decode(codecs.keep_jpeg(data)), decode(data))


def test_stray_bytes_between_scans_are_refused():
    data = encode(picture(60, 80))
    second = data.index(b"\xff\xda", data.index(b"\xff\xda") + 2)
    second = data.rindex(b"\xff\xc4", 0, second)
    assert np.array_equal(decode(codecs.keep_jpeg(data)), decode(data))
    with pytest.raises(CorruptError, match="stray bytes"):
        codecs.keep_jpeg(data[:second] + b"\x12\x34\x56" + data[second:])


def test_tables_that_decoders_refuse_are_refused():
    components = pw.random_components(np.random.default_rng(2), 20, 20, S420)
    data = pw.write(20, 20, S420, components, script_of(S420))
    quantiser, dc = data.index(b"\xff\xdb") + 4, data.index(b"\xff\xc4") + 4
    ac = data.index(b"\xff\xc4", dc) + 4
    frame = data.index(b"\xff\xc2") + 4
    for at, value, said in (
        (quantiser, 1, "quantisation"),  # another number, so that number 0 is missing
        (quantiser, 4, "quantisation"),
        (quantiser, 0x10, "quantisation"),  # 16 bits, for which the segment is too short
        (frame + 8, 3, "quantisation"),
        (frame + 8, 64, "quantisation"),
        (dc + 17, 16, "Huffman table"),  # a size that no DC difference has
        (dc, 0x20, "Huffman table"),
        (ac + 1, 3, "Huffman table"),  # three codes of one bit
        (ac + 9, 2, "Huffman table"),  # more than 256 codes
    ):
        bad = bytearray(data)
        bad[at] = value
        with pytest.raises(ValueError):
            decode(bytes(bad))
        with pytest.raises(CorruptError, match=said):
            codecs.keep_jpeg(bytes(bad))


def test_a_code_of_ones_is_none():
    """Two codes of one bit: T.81 keeps the code of ones free."""
    segment = b"\xff\xc4" + (2 + 19).to_bytes(2, "big") + b"\x03" + bytes([2] + [0] * 15) + b"\x00\x01"
    for data in (encode(picture(20, 20)), codecs.encode_jpeg(picture(20, 20))):
        at = data.index(b"\xff\xc4")
        with pytest.raises(CorruptError, match="Huffman table"):
            codecs.keep_jpeg(data[:at] + segment + data[at:])


def test_quantisation_tables_of_16_bits_make_no_strict_baseline():
    components = pw.random_components(np.random.default_rng(2), 20, 30, GREY)
    data = pw.write(20, 30, GREY, components, script_of(GREY))
    at = data.index(b"\xff\xdb")
    wide = b"\xff\xdb\x00\x83\x10" + b"".join(k.to_bytes(2, "big") for k in range(1, 65))
    data = data[:at] + wide + data[at + 69 :]
    kept = codecs.keep_jpeg(data)
    assert b"\xff\xc1\x00\x0b" in kept and b"\xff\xc0\x00\x0b" not in kept
    assert np.array_equal(decode(kept), decode(data))
    assert b"\xff\xc0\x00\x0b" in codecs.keep_jpeg(encode(picture(20, 30), "L"))


# -- Huffman tables -------------------------------------------------------------------------------------------------


def huffman_cost(frequencies):
    """Bits of the optimal code without a limit, by the textbook: with a symbol of weight 1 for the code of ones."""
    import heapq

    heap = [int(f) for f in frequencies if f] + [1]
    heapq.heapify(heap)
    cost = 0
    while len(heap) > 1:
        a, b = heapq.heappop(heap), heapq.heappop(heap)
        cost += a + b
        heapq.heappush(heap, a + b)
    return cost


def choose(frequencies):
    counts, symbols = np.zeros(16, np.uint8), np.zeros(256, np.uint8)
    codes, sizes = np.full(256, -1, np.int64), np.zeros(256, np.int64)
    number = int(baseline.choose_codes(np.asarray(frequencies, np.int64), counts, symbols, codes, sizes))
    return number, counts, symbols, codes, sizes


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=256), st.integers(0, 30))
@settings(max_examples=100, deadline=None)
def test_codes_are_a_prefix_code_and_optimal(few, steep):
    frequencies = np.zeros(256, np.int64)
    frequencies[: len(few)] = few
    frequencies[:steep] = np.maximum(1, 1.7 ** np.arange(steep))  # deep trees, which must be cut to 16 bits
    frequencies[0] += 1
    number, counts, symbols, codes, sizes = choose(frequencies)
    used = np.flatnonzero(frequencies)
    assert number == len(used) == counts.sum() and set(symbols[:number].tolist()) == set(used.tolist())
    assert (sizes[used] >= 1).all() and (sizes[used] <= 16).all()
    text = [format(codes[s], f"0{sizes[s]}b") for s in used]
    assert not any(a != b and b.startswith(a) for a in text for b in text) and len(set(text)) == len(text)
    assert all("0" in code for code in text)
    cost, best = int((frequencies * sizes).sum()), huffman_cost(frequencies)
    assert (
        cost <= best if sizes.max() < 16 else cost < 1.02 * best + 64
    )  # the best pays for the code of ones too
    read_back = pw.codes_of(b"\xff\xc4\0\0\0" + counts.tobytes() + symbols[:number].tobytes())
    assert {s: (int(codes[s]), int(sizes[s])) for s in used.tolist()} == read_back
