"""What right batches look like, computed by Pillow and numpy alone, and the check of a peer's work against it.

A peer's figure is shown only if its batches have the expected shape, dtype and labels, and on average the expected picture. The
trade-off: random crops are compared by their mean picture on a coarse grid and by their contrast, because no two loaders draw the
same crops; the eval crop, where nothing is drawn, is compared with half the tolerance.

>>> check_work(expected(pictures, work, "area"), peer.ask(do="check", images=4000))["worst_cell_levels"]
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastload.benchmarks.peers.base import Work
from fastload.benchmarks.picture import statistics
from fastload.errors import DataError

# Crops that the reference and a peer's check each draw at least. Measured on 250 ImageNet photographs with 4,000 crops: two seeds
# differ by 1.7 levels in the worst cell and by 0.05% in contrast.
CROPS = 6_000
CHECK_IMAGES = 4_000
# Levels (0-255) by which a cell and the mean of a colour may differ. FFCV decodes with libjpeg-turbo's fast inverse DCT, which
# darkens red and blue by 1.1 to 1.3 levels on photographs where Pillow uses the accurate one: most of the mean's tolerance is for
# that.
CELL_TOLERANCE = 5.0
MEAN_TOLERANCE = 2.5
# Share by which the contrast within an image may differ. Measured as above: crops of 8-25% of the area lose 6.6% of it, of 8-50%
# 2.3%, of 25-100% gain 2.2%, of 50-100% 3.2%. A filter that does not antialias gains 0.8%, so such a row is compared with
# a reference whose filter does not antialias either.
CONTRAST_TOLERANCE = 0.02
# Share by which the bytes of an image may differ from Pillow's: filters and encoders differ a little, restart markers cost 1 to 3%.
BYTES_TOLERANCE = 0.25
# Nothing is drawn for an eval crop. What remains: the inverse DCT, the filter, and the centre, which is rounded by half a pixel.
# Measured: 0.1 levels and 0.1% for loaders with Pillow's filter, 1.4 and 0.5% for FFCV, 1.2% where antialiasing was left out.
EVAL_CELL_TOLERANCE = 2.5
EVAL_CONTRAST_TOLERANCE = 0.01


@dataclass(frozen=True)
class Expected:
    """What a peer's ``check`` must answer.

    ``mean_picture`` (cells, cells, 3) and ``contrast`` (mean standard deviation within an image) are in levels of 255; ``labels`` is
    the sorted list of one epoch.
    """

    mean_picture: np.ndarray
    contrast: float
    labels: list[int]
    size: int
    dtype: str
    cell_tolerance: float = CELL_TOLERANCE
    contrast_tolerance: float = CONTRAST_TOLERANCE


class Sources:
    """The distinct pictures of a set; each stands equally often in it. ``image(i)`` is a Pillow image in RGB."""

    def __init__(self, items: Sequence[str | os.PathLike[str]] | np.ndarray) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def image(self, i: int) -> Any:
        from PIL import Image

        item = self.items[i]
        if isinstance(item, np.ndarray):
            return Image.fromarray(item)
        with Image.open(item) as image:
            return image.convert("RGB")

    def mean_bytes(self) -> float:
        """Bytes of a file on average."""
        return float(np.mean([os.path.getsize(item) for item in self.items]))


def expected(
    sources: Sources, labels: list[int], work: Work, filter: str, crops: int = CROPS, threads: int = 2
) -> Expected:
    """The mean picture and contrast of ``crops`` crops of the pictures, drawn as ``work`` says with the filter of a row's name."""
    plain = "not antialiased" in filter
    each = 1 if work.crop == "eval" else max(1, math.ceil(crops / len(sources)))

    def one(i: int) -> tuple[np.ndarray, float]:
        image, rng = sources.image(i), np.random.default_rng([work.seed, i])
        found = [statistics(_crop(image, work, plain, rng)) for _ in range(each)]
        return np.mean([cells for cells, _ in found], axis=0), float(np.mean([spread for _, spread in found]))

    with ThreadPoolExecutor(threads) as pool:
        parts = list(pool.map(one, range(len(sources))))
    mean = np.mean([part[0] for part in parts], axis=0)
    contrast = float(np.mean([part[1] for part in parts]))
    if work.crop != "eval":  # half of the images are flipped: take each crop both ways
        mean = (mean + mean[:, ::-1]) / 2
    tolerances = (
        (EVAL_CELL_TOLERANCE, EVAL_CONTRAST_TOLERANCE)
        if work.crop == "eval"
        else (CELL_TOLERANCE, CONTRAST_TOLERANCE)
    )
    dtype = "float32" if work.normalise else "uint8"
    return Expected(mean, contrast, sorted(labels), work.size, dtype, *tolerances)


def _crop(image: Any, work: Work, plain: bool, rng: np.random.Generator) -> np.ndarray:
    """One crop of a Pillow image, (size, size, 3) uint8."""
    width, height = image.size
    if work.crop == "pad":
        x, y = (int(rng.integers(-4, side + 5 - work.size)) for side in (width, height))
        return np.asarray(image.crop((x, y, x + work.size, y + work.size)))  # what lies outside is zero
    box = _train_box(width, height, rng) if work.crop == "train" else _eval_box(width, height, work)
    return np.asarray(_resize(image, work.size, box, plain))


def _resize(image: Any, size: int, box: tuple[float, float, float, float], plain: bool) -> Any:
    from PIL import Image

    if plain:  # samples four neighbours however much it shrinks
        return image.transform((size, size), Image.Transform.EXTENT, box, Image.Resampling.BILINEAR)
    return image.resize((size, size), Image.Resampling.BILINEAR, box)


def _train_box(width: int, height: int, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """RandomResizedCrop: an area of 8 to 100%, an aspect from 3/4 to 4/3 (even in its logarithm), ten tries, else the centre."""
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1.0)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            x, y = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            return x, y, x + w, y + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    x, y = (width - w) // 2, (height - h) // 2
    return x, y, x + w, y + h


def _eval_box(width: int, height: int, work: Work) -> tuple[float, float, float, float]:
    """The part of the picture that is left when its shorter side becomes ``resize`` and the centre ``size`` is cut."""
    side = min(width, height) * work.size / work.resize
    x, y = (width - side) / 2, (height - side) / 2
    return x, y, x + side, y + side


def check_work(want: Expected, got: dict[str, Any]) -> dict[str, Any]:
    """What the check found, for the record; DataError with the first thing that is wrong."""
    shape = [want.size, want.size, 3]
    if got["shapes"] != [shape] or got["dtypes"] != [want.dtype]:
        raise DataError(
            f"its batches are {_shapes(got['shapes'])} {', '.join(got['dtypes'])} instead of {_shapes([shape])} {want.dtype}"
        )
    if got["labels"] != want.labels:
        raise DataError(
            f"the labels of its epoch are not those of the files ({len(got['labels']):,} labels of "
            f"{len(set(got['labels'])):,} classes, expected {len(want.labels):,} of {len(set(want.labels)):,})"
        )
    difference = np.array(got["mean_picture"], np.float64) - want.mean_picture
    if not np.isfinite(difference).all():
        raise DataError("its mean picture is not finite")
    worst, mean = float(np.abs(difference).max()), float(np.abs(difference.mean((0, 1))).max())
    contrast = abs(got["contrast"] / want.contrast - 1)
    allowed = (want.cell_tolerance, MEAN_TOLERANCE, want.contrast_tolerance)
    if not (worst <= allowed[0] and mean <= allowed[1] and contrast <= allowed[2]):
        raise DataError(
            f"its mean picture differs from Pillow's (worst cell {worst:.1f} levels, mean {mean:.1f}, contrast {contrast:.1%}; "
            f"allowed are {allowed[0]:g}, {allowed[1]:g} and {allowed[2]:.0%})"
        )
    return {
        "passed": True,
        "worst_cell_levels": round(worst, 2),
        "mean_levels": round(mean, 2),
        "contrast_difference": round(contrast, 4),
        "images": got["images"],
    }


def check_file(
    target: str | os.PathLike[str], right: Sources, labels: list[int], max_side: int
) -> dict[str, Any]:
    """Check a ``.beton`` against ``right``, the JPEG files that Pillow made of the same pictures: labels, sizes, bytes, pixels.

    Pixels are compared by the mean of each colour and the contrast over all images, so that the order in the file does not
    matter. DataError says what is wrong.
    """
    import fastload

    with fastload.open(target) as dataset:
        if sorted(np.asarray(dataset.labels).tolist()) != labels:
            raise DataError("the labels in its file are not those of the folders")
        largest = int(max(dataset.heights.max(), dataset.widths.max()))
        if largest > max_side:
            raise DataError(f"its file holds an image of {largest} px instead of at most {max_side} px")
        stored = sum(memoryview(dataset.encoded(i).data).nbytes for i in range(len(dataset))) / len(dataset)
        found = _colours(dataset[i]["image"] for i in range(len(dataset)))
    share = stored / right.mean_bytes()
    want = _colours(np.asarray(right.image(i)) for i in range(len(right)))
    mean, contrast = float(np.abs(found[:3] - want[:3]).max()), abs(float(found[3] / want[3]) - 1)
    if not 1 - BYTES_TOLERANCE <= share <= 1 + BYTES_TOLERANCE:
        raise DataError(
            f"its images take {share:.2f} times the bytes that Pillow takes for the same size and quality, "
            f"allowed is {1 - BYTES_TOLERANCE:g} to {1 + BYTES_TOLERANCE:g}"
        )
    if not (mean <= MEAN_TOLERANCE and contrast <= CONTRAST_TOLERANCE):
        raise DataError(
            f"its images differ from Pillow's (mean {mean:.1f} levels, contrast {contrast:.1%}; "
            f"allowed are {MEAN_TOLERANCE:g} and {CONTRAST_TOLERANCE:.0%})"
        )
    return {
        "passed": True,
        "mean_levels": round(mean, 2),
        "contrast_difference": round(contrast, 4),
        "bytes_to_pillow": round(share, 3),
        "images": len(labels),
    }


def _colours(images: Iterable[np.ndarray]) -> np.ndarray:
    """Mean of each colour and mean contrast over images of any size, (4,)."""
    rows = [[*image.mean((0, 1)), image.std((0, 1)).mean()] for image in images]
    return np.asarray(np.mean(rows, axis=0))


def _shapes(shapes: Sequence[Sequence[int]]) -> str:
    return " and ".join("x".join(map(str, shape)) for shape in shapes) or "empty"
