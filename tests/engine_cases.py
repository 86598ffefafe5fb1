"""What the tests of several engines share: pipelines of all kinds by number, the table that is drawn for them, images of all kinds."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from fastload import beton, codecs, dataset
from fastload import transforms as T


def draw(ds, plan, bases, seed=0, epoch=0):
    """The table of the samples ``bases``."""
    rows = ds.gather(ds.image_field, bases)
    return plan.draw(seed, epoch, bases, rows["height"], rows["width"])


def random_pipeline(seed, rng=None):
    """Geometry number ``seed`` of seven, then flips, colours and erasing by chance; ``rng`` goes on after it."""
    rng = np.random.default_rng(seed) if rng is None else rng

    def side():
        return int(rng.choice([1, 7, 16, 33, 64, 100]))

    size, fill = (side(), side()), tuple(int(v) for v in rng.integers(0, 256, 3))
    whole = int(rng.integers(8, 90))
    steps = [
        [T.RandomResizedCrop(size)],
        [T.RandomResizedCrop(size, scale=(0.01, 0.2), ratio=(0.2, 5))],
        [T.Resize(size)],
        [T.CenterCrop(size)],
        [T.RandomCrop(size, padding=int(rng.integers(0, 40)), fill=fill)],
        [T.Resize(whole), T.CenterCrop(size)],
        [T.Resize((whole, side())), T.RandomCrop(size, padding=3, fill=fill)],
    ][seed % 7]
    steps += [T.HorizontalFlip()] if rng.random() < 0.6 else []
    steps += [T.VerticalFlip(0.4)] if rng.random() < 0.5 else []
    steps += [T.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8)] if rng.random() < 0.4 else []
    steps += [T.Grayscale(0.3)] if rng.random() < 0.3 else []
    steps += [T.RandomErasing(0.7, value=fill)] if rng.random() < 0.4 else []
    steps += [T.Cutout(5, p=0.5)] if rng.random() < 0.3 else []
    return tuple(steps)


def jpeg_of(image, mode="RGB", **options):
    file = io.BytesIO()
    Image.fromarray(image).convert(mode).save(file, "JPEG", quality=90, **options)
    return file.getvalue()


PLAIN = {
    "ours": codecs.encode_jpeg,
    "raw": lambda p: p,
    "unindexed": jpeg_of,
    "grey": lambda p: codecs.keep_jpeg(jpeg_of(p, "L")),
    "4:4:4": lambda p: codecs.keep_jpeg(jpeg_of(p, subsampling=0)),
    "4:2:2": lambda p: codecs.keep_jpeg(jpeg_of(p, subsampling=1)),
}
KINDS = {
    **PLAIN,
    "progressive": lambda p: jpeg_of(p, progressive=True),
    "cmyk": lambda p: jpeg_of(p, "CMYK"),
}


def write(path, images):
    """A dataset of (height, width, raw pixels or JPEG bytes)."""
    writer = beton.Writer(path, [beton.Field("image", "image"), beton.Field("label", "int")], len(images))
    for i, (height, width, data) in enumerate(images):
        mode = "raw" if isinstance(data, np.ndarray) else "jpeg"
        image = beton.EncodedImage(mode, height, width, data)
        writer.add({"image": image, "label": i % 4}, id=f"id-{i}", source=f"{i}.jpg")
    writer.finish({})
    return dataset.open(path)


def sizes(count, low=20, high=150, seed=1):
    return np.random.default_rng(seed).integers(low, high, (count, 2)).tolist()


def batches(engine, ds, plan, size, seed=0, epoch=0, ahead=2, **options):
    """(bases, table, images) of all samples, submitted some batches ahead."""
    waiting = []
    for start in range(0, len(ds), size):
        bases = ds.indices[start : start + size]
        table = draw(ds, plan, bases, seed, epoch)
        engine.submit(bases, ds.spans(bases), table, **options)
        waiting.append((bases, table))
        if len(waiting) > ahead:
            yield (*waiting.pop(0), engine.collect())
    while waiting:
        yield (*waiting.pop(0), engine.collect())
