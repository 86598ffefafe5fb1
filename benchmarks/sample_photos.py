"""Photographs for whoever has none: crops of the two that come with scikit-learn, as many as are wanted.

The trade-off: they are alike, so they say something of speed and nothing of learning.

>>> write_photos(Path("photos"), 600, seed=0)
600
"""

from __future__ import annotations

from pathlib import Path

import numpy as np


def write_photos(folder: Path, count: int, seed: int) -> int:
    """``count`` different crops of scikit-learn's two photographs as JPEG files with a longer side of 500 px."""
    from PIL import Image
    from sklearn.datasets import load_sample_images
    from tqdm.auto import tqdm

    pictures = [
        Image.fromarray(picture) for picture in load_sample_images().images
    ]  # (427, 640, 3) uint8 each
    draw = np.random.default_rng(seed)
    for index in tqdm(range(count), desc="photographs", unit="file", leave=False):
        which = index % len(pictures)
        picture = pictures[which]
        width, height = (round(full * draw.uniform(0.6, 1.0)) for full in picture.size)
        left = int(draw.integers(0, picture.width - width + 1))
        top = int(draw.integers(0, picture.height - height + 1))
        crop = picture.crop((left, top, left + width, top + height))
        if draw.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        scale = 500 / max(crop.size)
        crop = crop.resize((round(crop.width * scale), round(crop.height * scale)), Image.Resampling.BICUBIC)
        target = folder / ("china", "flower")[which]
        target.mkdir(parents=True, exist_ok=True)
        crop.save(target / f"{index:04d}.jpg", quality=90)
    return count
