"""The kernels that bring crops together for a GPU: what they write, and that they write nothing else and trust no address."""

import numpy as np
import pytest

from fastload import codecs
from fastload.kernels import batch as kb
from fastload.kernels import stage

HEIGHT, WIDTH, GAP = 70, 110, 64


@pytest.fixture(scope="module")
def file(picture):
    """Three images as stored pixels, then as JPEG, in one (n,) uint8 array, with their places."""
    images = [picture(HEIGHT, WIDTH, i) for i in range(3)]
    parts = [i.ravel() for i in images] + [codecs.as_bytes(codecs.encode_jpeg(i)) for i in images]
    sizes = np.array([len(p) for p in parts])
    ends = np.cumsum(sizes + GAP)
    data = np.concatenate([np.concatenate([p, np.full(GAP, 77, np.uint8)]) for p in parts])
    shapes = np.full((6, 2), (HEIGHT, WIDTH))
    return data, kb.Sources(ends - sizes - GAP, sizes, np.arange(6) < 3, shapes), images


def windows(count=6):
    rng = np.random.default_rng(0)
    low = rng.integers(0, (HEIGHT // 2, WIDTH // 2), (count, 2))
    return np.concatenate([low, low + rng.integers(1, (HEIGHT // 2, WIDTH // 2), (count, 2))], axis=1)


def run(function, data, sources, rows, boxes, room, *extra):
    """Twice, over two different sentinels: (out, places, status), and what was not written."""
    places = np.cumsum(room + GAP) - room
    results = []
    for sentinel in (17, 200):
        out, status = np.full(places[-1] + room[-1] + GAP, sentinel, np.uint8), np.full(6, -5, np.int64)
        function(data, np.array(rows), sources, boxes, out, places, *extra, status)
        results.append(out)
    kept = (results[0] == 17) & (results[1] == 200)
    return results[0], places, status, kept


@pytest.mark.parametrize("name", ["copy", "decode"])
def test_windows_of_pixels(file, name):
    data, sources, images = file
    boxes, rows = windows(), [0, 2] if name == "copy" else [5, 3]
    room = 3 * (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    if name == "copy":
        out, places, status, kept = run(stage.copy_rows, data, sources, rows, boxes, room)
    else:
        out, places, status, kept = run(stage.decode_rows, data, sources, rows, boxes, room, kb.new_thread())
    assert (status == [stage.OK if i in rows else -5 for i in range(6)]).all()
    written = np.zeros(len(out), bool)
    for row in rows:
        y0, x0, y1, x1 = boxes[row]
        written[places[row] : places[row] + room[row]] = True
        made = out[places[row] :][: room[row]].reshape(y1 - y0, x1 - x0, 3).astype(int)
        if name == "copy":
            assert (made == images[row][y0:y1, x0:x1]).all()
        else:
            start, size = sources.starts[row], sources.sizes[row]
            whole = codecs.decode_jpeg(data[start : start + size])
            assert np.abs(made - whole[y0:y1, x0:x1]).mean() < 4
    assert (kept == ~written).all()


def test_cut_jpegs(file):
    data, sources, images = file
    boxes, room, found = windows(), sources.sizes.copy(), np.zeros((6, 5), np.int64)
    boxes[4] = -3, -3, HEIGHT + 9, WIDTH + 9
    out, places, status, kept = run(stage.cut_rows, data, sources, [3, 4, 5], boxes, room, found)
    assert (status[3:] == stage.OK).all()
    for row in (3, 4, 5):
        length, y, x, height, width = found[row].tolist()
        whole = codecs.decode_jpeg(data[sources.starts[row] :][: sources.sizes[row]], exact=False)
        part = codecs.decode_jpeg(out[places[row] :][:length], exact=False)
        assert (part == whole[y : y + height, x : x + width]).all()
        y0, x0, y1, x1 = np.clip(boxes[row], 0, (HEIGHT, WIDTH, HEIGHT, WIDTH))
        assert y <= y0 and x <= x0 and y + height >= y1 and x + width >= x1
        assert kept[places[row] + length + 2 : places[row] + room[row]].all()
    assert found[4].tolist()[1:] == [0, 0, HEIGHT, WIDTH]
    assert len(images) == 3


@pytest.mark.parametrize("name", ["copy_rows", "cut_rows", "decode_rows"])
def test_wrong_addresses_write_nothing(file, name):
    data, sources, _ = file
    rows = [0, 1, 2] if name == "copy_rows" else [3, 4, 5]
    starts, sizes, boxes = sources.starts.copy(), sources.sizes.copy(), windows()
    starts[rows] = -1, data.size + 1, data.size - 10
    room = np.maximum(sizes, 3 * HEIGHT * WIDTH)
    extra = {"cut_rows": (np.zeros((6, 5), np.int64),), "decode_rows": (kb.new_thread(),)}.get(name, ())
    wrong = sources._replace(starts=starts, sizes=sizes)
    *_, status, kept = run(getattr(stage, name), data, wrong, rows, boxes, room, *extra)
    assert (status[rows] == stage.BAD_BOX).all() and kept.all()
    if name == "cut_rows":
        return
    for box in ((0, 0, HEIGHT + 1, 5), (-1, 0, 5, 5), (5, 5, 5, 9)):
        boxes[rows] = box
        *_, status, kept = run(getattr(stage, name), data, sources, rows, boxes, room, *extra)
        assert (status[rows] == stage.BAD_BOX).all() and kept.all()
