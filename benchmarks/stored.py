"""A sample of the images stored in another way, in a temporary file: what it costs to make, scaled to all of them.

The sample is spread over the whole data and repeated, so that its epochs are long enough to measure. The trade-off: a file just
written lies in the page cache, so what a slower disk would add is not in its figure (see the notes of a bench).

>>> with Sample(dataset, 64) as sample: stored = sample.convert({"store": "raw"})
>>> stored.bytes, stored.seconds  # for all images, not for the sample
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from fastload.dataset import Dataset

MOST_IMAGES, LEAST_IMAGES = 256, 32
MOST_PIXELS = 60_000_000  # of the sample: large originals take a tenth of a second each to convert
BATCHES = 64  # of an epoch of the repeated sample


@dataclass(frozen=True)
class Stored:
    """``data``: the sample in its new form, repeated. ``bytes`` and ``seconds`` are for all images of the data."""

    data: Dataset
    bytes: float
    seconds: float


class Sample:
    """Some images of ``dataset``, as they are (``as_is``) and converted; closing it removes what was written."""

    def __init__(self, dataset: Dataset, batch_size: int) -> None:
        self._whole, self._batch_size = dataset, batch_size
        pixels = max(float(np.median(np.asarray(dataset.heights) * np.asarray(dataset.widths))), 1.0)
        count = int(min(len(dataset), max(LEAST_IMAGES, min(MOST_IMAGES, MOST_PIXELS / pixels))))
        self._chosen = np.linspace(0, len(dataset) - 1, count).astype(np.int64)
        self.as_is = self._repeat(dataset.subset(self._chosen))
        self._folder: str | None = None
        self._open: list[Dataset] = []

    def __len__(self) -> int:
        return len(self._chosen)

    def __enter__(self) -> Sample:
        return self

    def __exit__(self, *exc: object) -> None:
        for dataset in self._open:
            dataset.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def convert(self, options: Mapping[str, Any]) -> Stored:
        """The sample through ``fastload.convert``; DataError where an image or the disk fails."""
        import fastload

        if self._folder is None:
            self._folder = tempfile.mkdtemp(prefix="fastload-bench-")
        path = os.path.join(self._folder, f"{len(self._open)}.beton")
        report = fastload.convert(self._whole.subset(self._chosen), path, progress=False, **options)
        made = fastload.open(path)
        self._open.append(made)
        scale = len(self._whole) / max(report.written, 1)
        return Stored(self._repeat(made), report.bytes * scale, report.seconds * scale)

    def _repeat(self, dataset: Dataset) -> Dataset:
        copies = -(-BATCHES * self._batch_size // len(dataset))
        return dataset.subset(np.tile(np.arange(len(dataset)), copies))
