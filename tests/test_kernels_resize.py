"""The resize kernel against Pillow and against the oracle, over poisoned outputs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastload.kernels import oracle, resize


def picture(height, width, channels=3, seed=0):
    """Smooth shapes plus noise: a resize error shows in both."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    base = 127 + 60 * np.sin(y / 7)[..., None] + 60 * np.cos(x[..., None] / (5 + np.arange(channels)))
    return np.clip(base + rng.normal(0, 25, (height, width, channels)), 0, 255).astype(np.uint8)


def run(source, box, clip, size, flips=0):
    """The kernel's result, proved to write each pixel: two runs over different sentinels must agree."""
    results = []
    for sentinel in (0x55, 0xAA):
        memory = np.full((size[0] + 2, size[1] + 2, 3), sentinel, np.uint8)
        resize.resize(source, box, clip, memory[1:-1, 1:-1], flips)
        edge = memory.copy()
        edge[1:-1, 1:-1] = sentinel
        assert (edge == sentinel).all(), "wrote outside of the output"
        results.append(memory[1:-1, 1:-1].copy())
    assert np.array_equal(*results), "left pixels unwritten"
    return results[0]


@given(st.data())
@settings(max_examples=120, deadline=None)
def test_any_window_equals_pillow_within_one_level(data):
    height, width = data.draw(st.integers(1, 90)), data.draw(st.integers(1, 90))
    channels = data.draw(st.sampled_from([3, 4]))
    source = picture(height, width, channels, data.draw(st.integers(0, 5)))
    y0 = data.draw(st.floats(0, height - 0.5))
    x0 = data.draw(st.floats(0, width - 0.5))
    y1, x1 = data.draw(st.floats(y0 + 0.25, height)), data.draw(st.floats(x0 + 0.25, width))
    size = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 60))
    ours = run(source, (y0, x0, y1, x1), (0, 0, height, width), size)
    image = Image.fromarray(np.ascontiguousarray(source[..., :3]))
    theirs = np.asarray(image.resize((size[1], size[0]), Image.Resampling.BILINEAR, box=(x0, y0, x1, y1)))
    assert np.abs(ours.astype(int) - theirs).max() <= 1


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("flips", [0, 1, 2, 3])
@pytest.mark.parametrize("box", [(0, 0, 333, 500), (10, 20, 50, 60), (100.5, 3.25, 320.75, 499.0)])
def test_photo_sizes_equal_the_oracle(channels, flips, box):
    source = picture(333, 500, channels)
    ours = run(source, box, (0, 0, 333, 500), (224, 224), flips)
    exact = oracle.resize(source, box, (0, 0, 333, 500), (224, 224), flips)
    difference = np.abs(ours.astype(int) - exact)
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3  # only ties of rounding


def test_a_clip_to_the_box_is_crop_then_resize():
    source = picture(120, 150)
    y0, x0, y1, x1 = 17, 31, 101, 140
    ours = run(source, (y0, x0, y1, x1), (y0, x0, y1, x1), (32, 40))
    theirs = Image.fromarray(source[y0:y1, x0:x1]).resize((40, 32), Image.Resampling.BILINEAR)
    assert np.abs(ours.astype(int) - np.asarray(theirs)).max() <= 1
    unclipped = run(source, (y0, x0, y1, x1), (0, 0, 120, 150), (32, 40))
    assert not np.array_equal(ours, unclipped)


@pytest.mark.parametrize("flips", [0, 1, 2, 3])
def test_copy_window(flips):
    source = picture(40, 50)
    out = np.full((20, 30, 3), 7, np.uint8)
    resize.copy_window(source, 5, 9, out, flips)
    expected = source[5:25, 9:39]
    expected = expected[:, ::-1] if flips & 1 else expected
    assert np.array_equal(out, expected[::-1] if flips & 2 else expected)


@pytest.mark.parametrize(
    ("box", "clip"),
    [
        ((0, 0, 10, 10), (0, 0, 11, 10)),
        ((0, 0, 10, 10), (-1, 0, 10, 10)),
        ((0, 0, 10, 10), (5, 5, 5, 10)),
        ((3, 0, 3, 10), (0, 0, 10, 10)),
        ((float("nan"), 0, 10, 10), (0, 0, 10, 10)),
    ],
)
def test_bounds_are_checked_before_memory_is_touched(box, clip):
    with pytest.raises(ValueError):
        resize.resize(picture(10, 10), box, clip, np.empty((5, 5, 3), np.uint8))


@pytest.mark.parametrize("box", [(-500.0, -500.0, -400.0, -400.0), (1e6, 0, 2e6, 10), (-1e3, -1e3, 1e3, 1e3)])
def test_a_box_outside_of_the_clip_takes_its_edge(box):
    out = run(picture(10, 10), box, (0, 0, 10, 10), (6, 6))
    assert out.shape == (6, 6, 3)
