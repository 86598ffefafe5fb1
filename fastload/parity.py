"""How far fastload's pixels are from Pillow's and torchvision's, measured on the user's own images.

The real loader makes the batches, with both ways to decode; each reference decodes the whole image and resizes the same window.
The two references are held against each other too: two libraries that everybody trusts differ by this much, which is the yardstick
for us. The trade-off: a reference decodes everything, so an image costs some ten milliseconds. With a model the same pixels are
compared by what the model makes of them (:mod:`fastload.parity_model`).

>>> report = measure("photos.beton", Options(images=100)); print(report.text()); report.exceeded
"""

from __future__ import annotations

import io
import json
import os
import platform
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

import fastload
from fastload import parity_model
from fastload import transforms as T
from fastload.beton import EncodedImage
from fastload.dataset import Dataset
from fastload.draws import FLIP_HORIZONTAL
from fastload.errors import DataError, UsageError
from fastload.loader import Loader
from fastload.summary import spread
from fastload.system import usable_cores

FAST, EXACT, PILLOW, TORCHVISION = "fast", "exact", "Pillow", "torchvision"
TRAIN, EVAL = "train crop", "eval crop"
PAIRS = ((FAST, PILLOW), (EXACT, PILLOW), (FAST, TORCHVISION), (EXACT, TORCHVISION), (TORCHVISION, PILLOW))
# What is promised against Pillow, in levels of 255: the mean absolute error over all images is below ``mean``, that of each single
# image is at most ``image`` (one wrong image must not hide among hundreds of right ones), and no channel is brighter or darker on
# average by more than ``shift``. Exact holds for any image, fast for photographs: it resizes chroma from fewer samples, which shows at
# sharp edges of colour. The README quotes this table.
TOLERANCES: dict[str, dict[str, float]] = {
    EXACT: {"mean": 1.0, "image": 1.0, "shift": 0.25},
    FAST: {"mean": 1.5, "image": 4.0, "shift": 0.5},
}
_LARGE = 2  # levels; the table says how many pixels are off by more
_BATCH = 32


@dataclass(frozen=True)
class Options:
    """What is compared. ``images``: how many, spread evenly over the file. ``size``: side of the crops in pixels; None is the size
    of the training run that is given, else 224. ``model``: name of a timm model whose logits are compared too; ``checkpoint``: its
    weights, or the folder (or .pt file) of a run of ``fastload train``, which knows its model; ``random_weights`` allows a model that
    has not learned anything. ``seed`` of the random crops; ``device`` of the model; ``threads`` of the loaders.
    """

    images: int = 500
    size: int | None = None
    seed: int = 0
    threads: int | None = None
    model: str | None = None
    checkpoint: str | None = None
    random_weights: bool = False
    device: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("images", self.images), ("size", self.size), ("threads", self.threads)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise UsageError(f"{name} must be an integer of 1 or more, got {value!r}")
        if self.random_weights and self.model is None:
            raise UsageError(f"random_weights goes with a model, got model {self.model!r}")
        if self.random_weights and self.checkpoint is not None:
            raise UsageError(
                f"give a checkpoint or random_weights, not both, got checkpoint {self.checkpoint!r}"
            )


class Differences:
    """Counts of ours - reference over uint8 images, from which all figures follow exactly.

    >>> d = Differences(); d.add(ours, reference, index=7); d.row("eval crop", "fast", "Pillow")
    """

    def __init__(self) -> None:
        self._counts = np.zeros((3, 511), np.int64)  # by channel and difference + 255
        self._large = self._pixels = self._images = 0
        self._worst, self._worst_index = -1.0, -1

    def add(self, ours: np.ndarray, reference: np.ndarray, index: int) -> None:
        """One image: both (H, W, 3) uint8; ``index`` names it as the worst one."""
        if ours.shape != reference.shape:
            raise DataError(f"image {index}: shapes differ, {ours.shape} and {reference.shape}")
        places = ours.astype(np.int64) - reference + 255
        counts = np.stack([np.bincount(places[..., c].ravel(), minlength=511) for c in range(3)])
        self._counts += counts
        self._large += int((np.abs(places - 255).max(axis=2) > _LARGE).sum())
        self._pixels += places.shape[0] * places.shape[1]
        self._images += 1
        mean = float((counts.sum(axis=0) * np.abs(np.arange(-255, 256))).sum() / places.size)
        if mean > self._worst:
            self._worst, self._worst_index = mean, index

    def row(self, pipeline: str, ours: str, reference: str) -> Row:
        """The figures of all images so far (at least one)."""
        levels = np.arange(-255, 256)
        total = self._counts.sum()
        by_size = np.bincount(np.abs(levels), weights=self._counts.sum(axis=0))
        shift = (self._counts * levels).sum(axis=1) / self._counts.sum(axis=1)
        return Row(
            pipeline=pipeline, ours=ours, reference=reference, images=self._images,
            mean=float((by_size * np.arange(256)).sum() / total),
            p99=int(np.searchsorted(np.cumsum(by_size), 0.99 * total)),
            largest=int(np.flatnonzero(by_size).max()),
            shift=(float(shift[0]), float(shift[1]), float(shift[2])),
            large=self._large / self._pixels,
            worst=self._worst, worst_index=self._worst_index,
        )  # fmt: skip


@dataclass(frozen=True)
class Row:
    """Differences of ``ours`` minus ``reference`` in levels of 255: ``mean`` absolute, ``p99`` (99 of 100 values are not further
    apart), ``largest``, ``shift`` (3,) the signed mean of each channel; ``large``: share of pixels with a channel that is off by more
    than 2, in [0, 1]; ``worst``: the mean absolute difference of the worst image, which is ``worst_index`` in the dataset.
    """

    pipeline: str
    ours: str
    reference: str
    images: int
    mean: float
    p99: int
    largest: int
    shift: tuple[float, float, float]
    large: float
    worst: float
    worst_index: int


@dataclass(frozen=True)
class Report:
    """The tables, what they were made with, and the sentences about exceeded tolerances (empty: all is as promised)."""

    data: str
    samples: int
    size: int
    settings: dict[str, Any]
    rows: list[Row]
    judged: parity_model.Judged | None
    exceeded: list[str]
    versions: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """As JSON-able values, with the tolerances that were applied."""
        return {"kind": "parity", **asdict(self), "tolerances": TOLERANCES}

    def text(self) -> str:
        """Tables for people."""
        count = self.rows[0].images
        lines = [
            f"{self.data}: {count:,} of {self.samples:,} images, crops of {self.size} px; differences in levels of 255",
            f"  {'':<24}{'mean':>7}{'p99':>5}{'most':>6}{'shift R':>9}{'G':>7}{'B':>7}{f'>{_LARGE}':>8}  worst image",
        ]
        for pipeline in (TRAIN, EVAL):
            lines.append(f"  {pipeline}")
            for r in (r for r in self.rows if r.pipeline == pipeline):
                shift = f"{r.shift[0]:>+9.2f}{r.shift[1]:>+7.2f}{r.shift[2]:>+7.2f}"
                lines.append(
                    f"    {f'{r.ours} - {r.reference}':<22}{r.mean:>7.3f}{r.p99:>5}{r.largest:>6}{shift}{r.large:>8.2%}"
                    f"  {r.worst:.2f} (sample {r.worst_index})"
                )
        limits = [
            f"{name}: " + ", ".join(f"{k} {v:g}" for k, v in t.items()) for name, t in TOLERANCES.items()
        ]
        lines.append(f"  tolerance against Pillow: {'; '.join(limits)}")
        if self.judged is not None:
            lines += ["", *self.judged.lines()]
        return "\n".join(lines)


def measure(
    data: Dataset | str | os.PathLike[str], options: Options = Options(), progress: bool = False
) -> Report:
    """Compare the pixels of ``data`` (a Dataset or the path of a `.beton` file).

    UsageError: wrong options, a model that cannot be had; DataError: no images; CorruptError, naming the sample, for bytes that
    cannot be decoded. An exceeded tolerance is no error here: it is said in ``exceeded``.
    """
    dataset = data if isinstance(data, Dataset) else fastload.open(data)
    try:
        return _measure(dataset, options, progress)
    finally:
        if dataset is not data:
            dataset.close()


def _measure(dataset: Dataset, options: Options, progress: bool) -> Report:
    from tqdm.auto import tqdm

    if not len(dataset):
        raise DataError(f"{dataset.path} has no images; convert a folder that has some")
    judge = None
    if options.model is not None or options.checkpoint is not None:
        judge = parity_model.load(
            options.model, options.checkpoint, options.random_weights, options.size, options.device
        )
    size = options.size or (judge.size if judge else 224)
    ratio = judge.crop_ratio if judge else 0.875
    crops = {
        TRAIN: (T.RandomResizedCrop(size), T.HorizontalFlip()),
        EVAL: tuple(s for s in T.eval(size, crop_ratio=ratio) if not isinstance(s, T.Normalize)),
    }
    places = spread(len(dataset), options.images)
    chosen = dataset.subset(places)
    view = dict(zip(chosen.indices.tolist(), places.tolist()))
    rows = []
    with tqdm(total=2 * len(chosen), desc="parity", unit="img", disable=not progress) as bar:
        for pipeline, specs in crops.items():
            sums = {pair: Differences() for pair in PAIRS}
            for bases, pictures in _batches(chosen, specs, options):
                for i, base in enumerate(bases):
                    for (ours, reference), total in sums.items():
                        total.add(pictures[ours][i], pictures[reference][i], view[base])
                if judge is not None and pipeline == EVAL:
                    judge.add([view[base] for base in bases], pictures)
                bar.update(len(bases))
            rows += [total.row(pipeline, *pair) for pair, total in sums.items()]
    judged = None if judge is None else judge.result(dataset, PILLOW)
    modes = {name: int((chosen.modes == code).sum()) for name, code in (("jpeg", 0), ("raw", 1))}
    settings = {**asdict(options), "size": size, "crop_ratio": ratio, "stored": modes}
    return Report(dataset.path, len(dataset), size, settings, rows, judged, exceeded(rows), _versions())


def _batches(
    chosen: Dataset, specs: tuple[Any, ...], options: Options
) -> Iterator[tuple[list[int], dict[str, np.ndarray]]]:
    """Base indices, and the same crops (B, H, W, 3) uint8 by each of the four ways."""
    loaders = {
        name: Loader(
            chosen, _BATCH, transforms=specs, seed=options.seed, threads=options.threads,
            fields=[chosen.image_field], decode=name,
        )
        for name in (FAST, EXACT)
    }  # fmt: skip
    positions = {int(base): at for at, base in enumerate(chosen.indices)}
    heights, widths = chosen.heights, chosen.widths
    try:
        with ThreadPoolExecutor(options.threads or usable_cores()) as pool:
            for fast, exact in zip(*loaders.values()):
                bases = fast.index.tolist()
                at = [positions[base] for base in bases]
                # The loader's own draw: the references are to cut the window that the loader cut.
                table = loaders[FAST].plan.draw(options.seed, 0, np.array(bases), heights[at], widths[at])
                pictures = {FAST: _pixels(fast[0]), EXACT: _pixels(exact[0])}
                for name, reference in REFERENCES.items():
                    calls = [
                        pool.submit(
                            reference, chosen.encoded(p), specs, table.box[row], int(table.flips[row])
                        )
                        for row, p in enumerate(at)
                    ]
                    pictures[name] = np.stack([call.result() for call in calls])
                yield bases, pictures
    finally:
        for loader in loaders.values():
            loader.close()


def _pixels(images: Any) -> np.ndarray:
    """A batch (B, 3, H, W) uint8 tensor as (B, H, W, 3)."""
    array: np.ndarray = images.permute(0, 2, 3, 1).numpy()
    return array


def pillow_crop(image: EncodedImage, specs: tuple[Any, ...], box: np.ndarray, flips: int) -> np.ndarray:
    """Pillow alone: decode the whole image, crop, resize. ``specs`` is one of the two pipelines; (size, size, 3) uint8."""
    from PIL import Image, ImageOps

    if image.mode == "raw":
        whole = Image.frombytes("RGB", (image.width, image.height), bytes(image.data))
    else:
        whole = Image.open(io.BytesIO(bytes(image.data))).convert("RGB")
    if isinstance(specs[0], T.RandomResizedCrop):
        y0, x0, y1, x1 = (int(edge) for edge in box)
        height, width = _pair(specs[0].size)
        result = whole.crop((x0, y0, x1, y1)).resize((width, height), Image.Resampling.BILINEAR)
        if flips & FLIP_HORIZONTAL:
            result = ImageOps.mirror(result)
        return np.asarray(result)
    (new_h, new_w), (top, left), (height, width) = _eval_geometry(image, specs)
    resized = whole.resize((new_w, new_h), Image.Resampling.BILINEAR)
    return np.asarray(resized.crop((left, top, left + width, top + height)))


def torchvision_crop(image: EncodedImage, specs: tuple[Any, ...], box: np.ndarray, flips: int) -> np.ndarray:
    """torchvision v2 on tensors: decode_jpeg, resized_crop or resize and center_crop, antialiased; (size, size, 3) uint8."""
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms.v2 import functional as F

    data = torch.from_numpy(np.frombuffer(bytes(image.data), np.uint8).copy())
    if image.mode == "raw":
        whole = data.reshape(image.height, image.width, 3).permute(2, 0, 1)
    else:
        whole = decode_jpeg(data, mode=ImageReadMode.RGB)
    if isinstance(specs[0], T.RandomResizedCrop):
        y0, x0, y1, x1 = (int(edge) for edge in box)
        result = F.resized_crop(whole, y0, x0, y1 - y0, x1 - x0, list(_pair(specs[0].size)), antialias=True)
        if flips & FLIP_HORIZONTAL:
            result = F.horizontal_flip(result)
    else:
        resized = F.resize(whole, [specs[0].size], antialias=True)
        result = F.center_crop(resized, list(_pair(specs[1].size)))
    array: np.ndarray = result.permute(1, 2, 0).numpy()
    return array


REFERENCES: dict[str, Callable[..., np.ndarray]] = {PILLOW: pillow_crop, TORCHVISION: torchvision_crop}


def _eval_geometry(
    image: EncodedImage, specs: tuple[Any, ...]
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Size after the resize, offset of the centre crop, and its size, each (y, x): torchvision's rule, written out."""
    side, (height, width) = specs[0].size, _pair(specs[1].size)
    if image.height <= image.width:
        new = (side, int(side * image.width / image.height))
    else:
        new = (int(side * image.height / image.width), side)
    return new, (round((new[0] - height) / 2.0), round((new[1] - width) / 2.0)), (height, width)


def _pair(size: Any) -> tuple[int, int]:
    height, width = size
    return int(height), int(width)


def exceeded(rows: list[Row]) -> list[str]:
    """A sentence for each figure against Pillow that is outside of :data:`TOLERANCES`."""
    found = []
    for row in rows:
        if row.reference != PILLOW or row.ours not in TOLERANCES:
            continue
        limit = TOLERANCES[row.ours]
        where = f"decode {row.ours!r}, {row.pipeline}"
        if not row.mean < limit["mean"]:
            found.append(
                f"{where}: the mean error is {row.mean:.3f} levels, and below {limit['mean']:g} is promised"
            )
        if not row.worst <= limit["image"]:
            found.append(
                f"{where}: the mean error of sample {row.worst_index} is {row.worst:.3f} levels, and at most "
                f"{limit['image']:g} is promised of any image"
            )
        shift = max(row.shift, key=abs)
        if not abs(shift) <= limit["shift"]:
            found.append(
                f"{where}: a channel is shifted by {shift:+.3f} levels, and at most {limit['shift']:g} is promised"
            )
    return found


def append_record(path: str | os.PathLike[str], report: Report) -> None:
    """Add the report to a JSON-lines file. UsageError where it cannot be written."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(report.to_json()) + "\n")
    except OSError as error:
        raise UsageError(
            f"cannot write the record to {os.fspath(path)!r} ({error.strerror}); choose another --out"
        ) from error


def _versions() -> dict[str, str]:
    import PIL
    import torch
    import torchvision

    return {
        "fastload": fastload.__version__, "Pillow": PIL.__version__, "torchvision": torchvision.__version__,
        "torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version(),
        "machine": platform.machine(),
    }  # fmt: skip
