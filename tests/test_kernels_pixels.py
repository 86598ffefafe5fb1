"""Pixel kernels against the oracle, and colour against torchvision, which is nobody of ours."""

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from fastload import draws, transforms
from fastload.kernels import oracle, pixels


@pytest.fixture
def image():
    return np.random.default_rng(4).integers(0, 256, (37, 53, 3), dtype=np.uint8)


def test_recolour_equals_the_oracle(image):
    rng = np.random.default_rng(0)
    for _ in range(20):
        matrix = rng.normal(0, 0.6, (3, 7)).astype(np.float32)
        matrix[:, 6] *= 50
        ours = image.copy()
        pixels.recolour(ours, matrix)
        difference = np.abs(ours.astype(int) - oracle.recolour(image, matrix))
        assert difference.max() <= 1 and (difference > 0).mean() < 1e-3


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("brightness", 0.6),
        ("brightness", 1.2),
        ("contrast", 0.5),
        ("contrast", 1.4),
        ("saturation", 0.0),
        ("saturation", 1.7),
    ],
)
def test_colour_jitter_equals_torchvision(image, name, factor):
    # Middle tones, so that torchvision's cut to 0..255 after each operation cuts nothing.
    image = (image // 3 + 60).astype(np.uint8)
    plan = draws.Plan([transforms.ColorJitter(**{name: (factor, factor)})])
    table = plan.draw(0, 0, np.arange(1), np.array([37]), np.array([53]))
    pixels.recolour(image_ours := image.copy(), table.colour[0])
    adjust = getattr(tv, f"adjust_{name}")
    theirs = adjust(torch.from_numpy(image).permute(2, 0, 1), factor).permute(1, 2, 0).numpy()
    assert np.abs(image_ours.astype(int) - theirs).max() <= 1


def test_hue_keeps_grey_and_comes_round(image):
    plan = draws.Plan([transforms.ColorJitter(hue=(0.25, 0.25))])
    matrix = plan.draw(0, 0, np.arange(1), np.array([37]), np.array([53])).colour[0]
    grey = np.repeat(image[:, :, :1], 3, axis=2)
    turned = grey.copy()
    pixels.recolour(turned, matrix)
    assert np.abs(turned.astype(int) - grey).max() <= 1
    four = np.linalg.matrix_power(matrix[:, :3].astype(np.float64), 4)
    assert np.allclose(four, np.eye(3), atol=1e-4)


def test_grayscale_equals_torchvision(image):
    plan = draws.Plan([transforms.Grayscale(p=1.0)])
    pixels.recolour(
        ours := image.copy(), plan.draw(0, 0, np.arange(1), np.array([37]), np.array([53])).colour[0]
    )
    theirs = tv.rgb_to_grayscale(torch.from_numpy(image).permute(2, 0, 1), 3).permute(1, 2, 0).numpy()
    assert np.abs(ours.astype(int) - theirs).max() <= 1


def test_normalise_equals_torchvision(image):
    mean, std = transforms.IMAGENET_MEAN, transforms.IMAGENET_STD
    scale = (1 / (255 * np.array(std))).astype(np.float32)
    shift = (-np.array(mean) / np.array(std)).astype(np.float32)
    for sentinel in (np.nan, 7.0):
        out = np.full((2, *image.shape), sentinel, np.float32)
        pixels.normalise(np.stack([image, image[::-1]]), scale, shift, out)
        theirs = tv.normalize(torch.from_numpy(image).permute(2, 0, 1).float() / 255, mean, std)
        assert np.allclose(out[0], theirs.permute(1, 2, 0).numpy(), atol=1e-5)
        assert np.array_equal(out, oracle.normalise(np.stack([image, image[::-1]]), scale, shift))


def test_fill_and_erase_touch_their_boxes_only(image):
    ours = image.copy()
    pixels.fill_outside(ours, 3, 5, 20, 30, np.array([1, 2, 3], np.uint8))
    assert np.array_equal(ours[3:23, 5:35], image[3:23, 5:35])
    mask = np.ones(image.shape[:2], bool)
    mask[3:23, 5:35] = False
    assert (ours[mask] == (1, 2, 3)).all()
    ours = image.copy()
    boxes = np.array([[0, 0, 4, 6], [10, 10, 10, 20], [30, 40, 37, 53]])
    pixels.erase(ours, boxes, np.array([[9, 8, 7], [0, 0, 0], [255, 0, 1]], np.uint8))
    assert (ours[:4, :6] == (9, 8, 7)).all() and (ours[30:, 40:] == (255, 0, 1)).all()
    rest = np.ones(image.shape[:2], bool)
    rest[:4, :6] = rest[30:, 40:] = False
    assert np.array_equal(ours[rest], image[rest])


@pytest.mark.parametrize("count", [1, 2, 5, 6])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_mix_equals_the_oracle(count, dtype):
    rng = np.random.default_rng(count)
    images = rng.integers(0, 256, (count, 8, 9, 3)).astype(dtype)
    weights = rng.random(count).astype(np.float32)
    boxes = np.zeros((count, 4), np.int64)
    boxes[::2] = [1, 2, 6, 9]
    expected = oracle.mix(images, weights, boxes)
    ours = images.copy()
    pixels.mix(ours, weights, boxes, np.float32(0.5 if dtype == np.uint8 else 0))
    if dtype == np.uint8:
        assert np.abs(ours.astype(int) - expected).max() <= 1
    else:
        assert np.allclose(ours, expected, rtol=1e-6)
