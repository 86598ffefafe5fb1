"""A slice of a batch: its crops of stored pixels against the oracle and Pillow, and each step against its own kernel."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastload import codecs
from fastload.kernels import batch, oracle, permute, pixels, raw
from fastload.kernels.jit import kernel
from fastload.kernels.memory import address

GUARD = 64
NO_CLOCK = np.zeros((2, 0), np.int64)


def picture(height, width, seed=0):
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    base = 127 + 60 * np.sin(y / (7 + seed))[..., None] + 55 * np.cos(x[..., None] / (5 + np.arange(3)))
    return np.clip(base + rng.normal(0, 8, (height, width, 3)), 0, 255).astype(np.uint8)


def rows_of(count, place, box, clip, flips=0, colour=None, erase=None):
    """A table whose rows are alike, or given by row."""

    def tiled(values, dtype):
        array = np.asarray(values, dtype)
        return array if array.ndim == 2 else np.tile(array, (count, 1))

    return batch.Rows(
        tiled(place, np.int64),
        tiled(box, np.float64),
        tiled(clip, np.int64),
        np.broadcast_to(np.asarray(flips, np.int64), count).copy(),
        np.zeros((0, 3, 7), np.float32) if colour is None else colour,
        np.ones(count, bool) if colour is not None else np.zeros(count, bool),
        np.zeros((count, 0, 4), np.int64) if erase is None else erase,
    )


def plain_paint(background=(0, 0, 0), fills=()):
    fills = np.array(fills, np.uint8).reshape(-1, 3)
    return batch.Paint(np.array(background, np.uint8), fills, np.ones(3, np.float32), np.zeros(3, np.float32))


def one(source, box, clip, size, flips, scratch=1 << 20):
    """(status, pixels) of a crop of raw pixels over two poisons: nothing else may be touched, nor show."""
    results = []
    for poison in (0x55, 0xAA):
        guard = np.full(GUARD, poison, np.uint8)
        file = np.concatenate([guard, source.reshape(-1), guard])
        file.setflags(write=False)  # as a mapped file is
        out = np.full((3, *size, 3), poison, np.uint8)  # of the three only the middle one is asked for
        memory = np.full(scratch + 2 * GUARD, poison, np.uint8)
        thread = batch.Thread(batch.new_work(), memory[GUARD:-GUARD], np.zeros(1, np.int64))
        where = batch.Sources(
            np.full(3, GUARD), np.full(3, source.size), np.full(3, True), np.tile(source.shape[:2], (3, 1))
        )
        status = np.full(3, -7, np.int64)
        table, floats = rows_of(3, (0, 0, *size), box, clip, flips), np.empty((0, *size, 3), np.float32)
        batch.fill(file, np.array([1]), where, table, plain_paint(), out, floats, thread, status, NO_CLOCK)
        results.append((int(status[1]), out[1].copy()))
        out[1] = poison
        assert (out == poison).all() and (status[[0, 2]] == -7).all(), "wrote outside of its row"
        assert (memory[:GUARD] == poison).all() and (memory[-GUARD:] == poison).all(), (
            "wrote outside of scratch"
        )
    assert results[0][0] == results[1][0]
    if results[0][0] == batch.OK:
        assert np.array_equal(results[0][1], results[1][1]), "shows memory that is not the picture's"
    return results[0]


@given(st.data())
@settings(max_examples=120, deadline=None)
def test_any_crop_of_pixels_is_the_oracles_within_a_level(data):
    height, width = data.draw(st.integers(1, 80)), data.draw(st.integers(1, 80))
    source = picture(height, width, data.draw(st.integers(0, 3)))
    y0, x0 = data.draw(st.floats(0, height - 0.5)), data.draw(st.floats(0, width - 0.5))
    box = (y0, x0, data.draw(st.floats(y0 + 0.25, height)), data.draw(st.floats(x0 + 0.25, width)))
    clip = (0, 0, height, width)
    if data.draw(st.booleans()):
        box = tuple(int(v) for v in box)
        box = clip = (*box[:2], max(box[2], box[0] + 1), max(box[3], box[1] + 1))
    size = tuple(data.draw(st.integers(max(1, int((box[2 + a] - box[a]) / 25) + 1), 70)) for a in (0, 1))
    flips = data.draw(st.integers(0, 3))
    status, ours = one(source, box, clip, size, flips)
    assert status == batch.OK
    exact = oracle.resize(source, box, clip, size, flips)
    # Two passes of 16-bit fixed point, and the oracle's own rounding.
    assert np.abs(ours.astype(int) - np.asarray(exact).astype(int)).max() <= 1


def kernel_of(instructions):
    crop = raw.crop_with(instructions)

    @kernel
    def crop_file(file, start, height, width, box, clip, flips, out, scratch, need):
        return crop(address(file) + start, height, width, box, clip, flips, out, scratch, need)

    return crop_file


def test_every_set_of_instructions_gives_the_same_numbers():
    """The processor's own, lesser ones, and none: also with boxes outside of the clip, one tap and many."""
    kernels = [kernel_of(instructions) for instructions in range(permute.NONE, permute.BEST + 1)]
    rng = np.random.default_rng(0)
    done = 0
    for i in range(600):
        height, width = rng.integers(1, 200, 2)
        y0, x0 = rng.uniform(0, height - 0.5), rng.uniform(0, width - 0.5)
        box = np.array([y0, x0, rng.uniform(y0 + 0.25, height), rng.uniform(x0 + 0.25, width)])
        if i % 3 == 0:
            box += rng.uniform(-40, 40, 4)
            box[2:] = np.maximum(box[2:], box[:2] + 0.3)
        clip = np.array([0, 0, height, width])
        if i % 2:
            clip[:2] = rng.integers(0, height), rng.integers(0, width)
            clip[2:] = rng.integers(clip[0] + 1, height + 1), rng.integers(clip[1] + 1, width + 1)
        size = rng.integers(1, 120, 2)
        if i % 5 == 0:
            size = ((box[2:] - box[:2]) / rng.uniform(0.3, 9, 2)).astype(int) + 1
        results = []
        for k, crop in enumerate(kernels):
            # What lies behind the pixels and in memory differs, and must not show; nothing else may be written.
            file = np.full(GUARD + height * width * 3 + raw.OVERREAD, 60 * k, np.uint8)
            file[GUARD : file.size - raw.OVERREAD] = np.random.default_rng(i).integers(
                0, 256, height * width * 3
            )
            out, need = np.full((3, *size, 3), 9, np.uint8), np.zeros(1, np.int64)
            arguments = (file, GUARD, height, width, box, clip, i % 4, out[1])
            status = crop(*arguments, np.empty(0, np.uint8), need)
            if status == batch.MORE_SCRATCH:
                memory = np.full(need[0] + 2 * GUARD, 77 + k, np.uint8)
                status = crop(*arguments, memory[GUARD:-GUARD], need)
                assert (memory[:GUARD] == 77 + k).all() and (memory[-GUARD:] == 77 + k).all()
            assert (out[[0, 2]] == 9).all()
            results.append((status, out[1]))
        assert all(status == results[0][0] and np.array_equal(p, results[0][1]) for status, p in results)
        done += results[0][0] == batch.OK
    assert done > 500


@pytest.mark.parametrize("flips", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [(5, 7), (32, 32), (20, 49), (1, 1), (33, 16)])
def test_a_window_of_the_outputs_size_is_copied_to_the_bit(size, flips):
    source = picture(40, 60)
    box = (3, 4, 3 + size[0], 4 + size[1])
    status, ours = one(source, box, (0, 0, 40, 60), size, flips, scratch=0)
    expected = source[box[0] : box[2], box[1] : box[3]]
    expected = expected[:: -1 if flips & 2 else 1, :: -1 if flips & 1 else 1]
    assert status == batch.OK and np.array_equal(ours, expected)


def test_photographs_stored_raw_are_pillows_within_a_level(photos):
    rng = np.random.default_rng(0)
    for content in photos[:12]:
        source = codecs.load_rgb(content)
        height, width = source.shape[:2]
        h, w = int(rng.integers(height // 3, height + 1)), int(rng.integers(width // 3, width + 1))
        y, x = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
        box = (y, x, y + h, x + w)
        status, ours = one(source, box, box, (224, 224), 0, scratch=8 << 20)
        part = Image.fromarray(source[y : y + h, x : x + w])
        theirs = np.asarray(part.resize((224, 224), Image.Resampling.BILINEAR)).astype(int)
        assert status == batch.OK
        # Pillow rounds to bytes between its two passes: that is most of the mean.
        assert np.abs(ours - theirs).max() <= 1 and np.abs(ours - theirs).mean() < 0.25


def test_too_many_taps_and_too_little_memory_are_said():
    source = picture(80, 80)
    whole = (0, 0, 80, 80)
    assert one(source, whole, whole, (2, 40), 0)[0] == batch.UNSUPPORTED
    assert one(source, whole, whole, (40, 40), 0, scratch=100)[0] == batch.MORE_SCRATCH
    assert one(source, (0, 0, 10, 10), (0, 0, 81, 10), (8, 8), 0)[0] == batch.BAD_BOX


def mixed_file():
    """JPEGs and pixels of several sizes behind one another, one of them broken; (file, sources)."""
    blobs, raw, shapes = [], [], []
    for i in range(8):
        pixels_ = picture(60 + 9 * i, 130 - 7 * i, i)
        raw.append(i % 2 == 1)
        blobs.append(pixels_.tobytes() if raw[-1] else codecs.encode_jpeg(pixels_))
        shapes.append(pixels_.shape[:2])
    blobs[6] = b"not a JPEG"
    sizes = np.array([len(blob) for blob in blobs])
    starts = 7 + np.concatenate([[0], np.cumsum(sizes)[:-1]])
    file = np.frombuffer(bytes(7) + b"".join(blobs) + bytes(40), np.uint8)
    return file, batch.Sources(starts, sizes, np.array(raw), np.array(shapes))


def run(file, sources, table, paint, size=(40, 48), rows=range(8), floats=False, thread=None, clock=NO_CLOCK):
    count = len(sources.starts)
    out, status = np.full((count, *size, 3), 9, np.uint8), np.full(count, -1, np.int64)
    wanted = np.full((count if floats else 0, *size, 3), np.nan, np.float32)
    batch.fill(
        file, np.array(rows), sources, table, paint, out, wanted, thread or batch.new_thread(), status, clock
    )
    return out, wanted, status


def test_a_slice_equals_its_rows_alone_and_touches_no_other():
    file, sources = mixed_file()
    place = np.array([[0, 0, 40, 48], [2, 3, 30, 20], [0, 0, 40, 48], [0, 0, 0, 0]] + [[0, 8, 40, 40]] * 4)
    clip = np.concatenate([np.zeros((8, 2), np.int64), sources.shapes], axis=1)
    flips = np.arange(8) % 4
    table, paint = rows_of(8, place, (1.5, 2, 50, 70.25), clip, flips), plain_paint((1, 2, 3))
    out, _, status = run(file, sources, table, paint, rows=range(1, 8))
    assert status.tolist() == [-1] + [batch.OK] * 5 + [batch.crops.decode.NOT_JPEG, batch.OK]
    assert (out[0] == 9).all()
    for i in (1, 2, 3, 4, 5, 7):
        y, x, h, w = place[i]
        alone = rows_of(8, (0, 0, h, w), (1.5, 2, 50, 70.25), clip, flips)
        expected = np.broadcast_to(np.array([1, 2, 3], np.uint8), (40, 48, 3)).copy()
        if h:
            expected[y : y + h, x : x + w] = run(file, sources, alone, paint, (h, w), [i])[0][i]
        assert np.array_equal(out[i], expected)


def test_colour_erasing_and_normalising_are_their_kernels():
    file, sources = mixed_file()
    rng = np.random.default_rng(1)
    clip = np.concatenate([np.zeros((8, 2), np.int64), sources.shapes], axis=1)
    colour = rng.normal(0.3, 0.2, (8, 3, 7)).astype(np.float32)
    erase = np.tile([[3, 4, 20, 30]], (8, 1, 1))
    geometry = (0, 0, 40, 48), (1.5, 2, 50, 70.25), clip
    scale, shift = np.array([0.1, 0.2, 0.3], np.float32), np.array([1, -2, 3], np.float32)
    paint = plain_paint(fills=[(7, 8, 9)])._replace(scale=scale, shift=shift)
    out, floats, status = run(file, sources, rows_of(8, *geometry, 1, colour, erase), paint, floats=True)
    plain, none, _ = run(file, sources, rows_of(8, *geometry, 1), plain_paint())
    assert none.size == 0
    for i in np.flatnonzero(status == batch.OK):
        pixels.recolour(plain[i], colour[i])
        plain[i, 3:20, 4:30] = (7, 8, 9)
        assert np.array_equal(out[i], plain[i])
        assert np.allclose(floats[i], plain[i] * scale + shift, rtol=1e-6, atol=1e-5)
    assert np.isnan(floats[6]).all()  # the broken one has none
    table = rows_of(8, *geometry, 1, colour, erase)._replace(coloured=np.arange(8) < 2)
    some = run(file, sources, table, paint)[0]
    assert np.array_equal(some[:2, :3], out[:2, :3]) and not np.array_equal(some[2, :3], out[2, :3])


@pytest.mark.parametrize(
    "change",
    [
        {"starts": -1},
        {"starts": 1 << 62},
        {"sizes": 1 << 62},
        {"sizes": -5},
        {"sizes": 100},  # fewer bytes than the pixels take
        {"shapes": (60_000, 60_000)},
        {"place": (7, 0, 40, 48)},
        {"place": (0, -1, 40, 48)},
        {"place": (0, 0, -1, 48)},
    ],
)
def test_hostile_rows_are_refused_and_the_others_done(change):
    file, sources = mixed_file()
    clip = np.concatenate([np.zeros((8, 2), np.int64), sources.shapes], axis=1)
    table = rows_of(8, (0, 0, 40, 48), (1.5, 2, 50, 70.25), clip)
    ((name, value),) = change.items()
    target = table if name == "place" else sources
    getattr(target, name)[3] = value
    out, _, status = run(file, sources, table, plain_paint())
    assert status[3] == batch.BAD_BOX and (out[3] == 9).all()
    assert (status[[0, 1, 2, 4, 5, 7]] == batch.OK).all()


def test_pixels_at_the_very_end_of_the_file_are_left_to_others():
    """The kernel reads a vector behind the last pixel, and behind a mapped file there may be nothing."""
    source = picture(30, 30)
    where = batch.Sources(np.array([0]), np.array([2700]), np.array([True]), np.array([[30, 30]]))
    table = rows_of(1, (0, 0, 20, 20), (0, 0, 30, 30), (0, 0, 30, 30))
    for room, expected in ((31, batch.UNSUPPORTED), (32, batch.OK)):
        file = np.concatenate([source.reshape(-1), np.zeros(room, np.uint8)])
        file.setflags(write=False)
        assert run(file, where, table, plain_paint(), (20, 20), [0])[2][0] == expected


def test_the_clock_knows_each_step():
    file, sources = mixed_file()
    clip = np.concatenate([np.zeros((8, 2), np.int64), sources.shapes], axis=1)
    table = rows_of(8, (0, 0, 40, 48), (1.5, 2, 50, 70.25), clip, erase=np.zeros((8, 1, 4), np.int64))
    clock = np.zeros((2, batch.STEPS), np.int64)
    run(file, sources, table, plain_paint(fills=[(0, 0, 0)]), rows=[0], floats=True, clock=clock)
    assert (clock > 0).all()
    assert clock[1, batch.NORMALISE] == 4 * 40 * 48 * 3 and clock[1, batch.COLOUR] == 40 * 48 * 3
    clock[:] = 0
    run(file, sources, table, plain_paint(fills=[(0, 0, 0)]), rows=[1], clock=clock)
    assert (
        clock[0, batch.CROP]
        == clock[0, batch.DECODE]
        == clock[0, batch.NORMALISE]
        == 0
        < clock[0, batch.RESIZE]
    )
