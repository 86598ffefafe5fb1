"""What the tests of several engines share: pipelines of all kinds by number, and the table that is drawn for them."""

from __future__ import annotations

import numpy as np

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
