"""What the tests of ``fastload check`` share: distinct real pictures that come with scikit-learn, altered copies, small files."""

from __future__ import annotations

import functools
import io

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from fastload import beton
from fastload import open as open_dataset

# What is done to a picture, how many of 60 photographs must be recognised after it (of two pictures that are each at most 256 px).
ALTERED = {
    "rotated 90": lambda i: i.transpose(Image.Transpose.ROTATE_90),
    "rotated 180": lambda i: i.transpose(Image.Transpose.ROTATE_180),
    "rotated 270": lambda i: i.transpose(Image.Transpose.ROTATE_270),
    "mirrored": ImageOps.mirror,
    "mirrored and rotated": lambda i: ImageOps.mirror(i).transpose(Image.Transpose.ROTATE_90),
    "quality 60": lambda i: i,
    "half the size": lambda i: i.resize((i.width // 2, i.height // 2)),
    "brighter 20%": lambda i: ImageEnhance.Brightness(i).enhance(1.2),
    "darker 20%": lambda i: ImageEnhance.Brightness(i).enhance(0.8),
    "cropped 5%": lambda i: i.crop(
        (round(i.width * 0.025), round(i.height * 0.025), round(i.width * 0.975), round(i.height * 0.975))
    ),
}


@functools.cache
def crops(count=40, size=80):
    """``count`` pictures of ``size`` pixels, (size, size, 3) uint8, cut without overlap from scikit-learn's two photographs."""
    from sklearn.datasets import load_sample_images

    found = []
    for photo in load_sample_images().images:
        for top in range(0, photo.shape[0] - size + 1, size):
            row = [
                photo[top : top + size, at : at + size] for at in range(0, photo.shape[1] - size + 1, size)
            ]
            found += [crop for crop in row if crop.mean(2).std() > 20]  # no plain sky
    assert len(found) >= count
    order = np.random.default_rng(0).permutation(len(found))[:count]
    return [np.ascontiguousarray(found[i]) for i in order]


def jpeg(pixels, quality=90):
    """A picture as (bytes of a JPEG, height, width)."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    stream = io.BytesIO()
    image.convert("RGB").save(stream, "JPEG", quality=quality)
    return stream.getvalue(), image.height, image.width


def write(path, rows, classes=("a", "b", "c"), labels=True):
    """A file of rows (picture, source, label): a picture is an array, stored raw, or what :func:`jpeg` gives. Returns it, opened."""
    fields = [beton.Field("image", "image"), *([beton.Field("label", "int")] if labels else [])]
    writer = beton.Writer(path, fields, len(rows))
    for number, (picture, source, label) in enumerate(rows):
        if isinstance(picture, tuple):
            image = beton.EncodedImage("jpeg", picture[1], picture[2], np.frombuffer(picture[0], np.uint8))
        else:
            image = beton.EncodedImage("raw", picture.shape[0], picture.shape[1], picture)
        values = {"image": image, **({"label": label} if labels else {})}
        writer.add(values, id=f"id{number}", source=source)
    writer.finish({"classes": {"label": list(classes)} if labels else {}, "created_by": "tests"})
    return open_dataset(path)
