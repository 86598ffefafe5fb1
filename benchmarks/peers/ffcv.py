"""FFCV 1.0.2: one ``.beton`` file, a pipeline that it compiles at each start, threads.

The trade-off of FFCV: it decodes whole images, and its output buffers are used again for a later batch.

>>> make("ffcv").load(work)
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fastload.benchmarks.peers.base import MEAN, STD, Conversion, Files, Peer, Work


class Ffcv(Peer):
    """As in its "ImageNet" and "CIFAR" examples, with ToTensor as the last step: no GPU is asked for."""

    name = "ffcv"
    title = "FFCV"
    requires = ("ffcv==1.0.2",)
    modules = ("ffcv",)
    crops: ClassVar[dict[str, str]] = {"train": "area", "eval": "area", "pad": "none"}
    stores = ("jpeg", "raw")
    # Its performance guide: RANDOM order and os_cache=True where the data set fits into memory.
    settings = (
        "ffcv.loader.Loader as its performance guide says for data that fit in memory: os_cache=True, OrderOption.RANDOM, "
        "the decoder that crops (INTER_AREA), ToTensor last; the .beton file that fastload reads"
    )
    converts = True

    def imports(self) -> None:
        import ffcv.fields.decoders
        import ffcv.loader
        import ffcv.transforms  # noqa: F401

    def load(self, work: Work) -> None:
        from ffcv.fields.decoders import IntDecoder
        from ffcv.loader import Loader, OrderOption
        from ffcv.reader import Reader
        from ffcv.transforms import Squeeze, ToTensor

        pipelines: dict[str, Any] = dict.fromkeys(Reader(work.beton).handlers)  # None leaves a field out
        pipelines["image"] = [*self._images(work), ToTensor()]
        pipelines["label"] = [IntDecoder(), ToTensor(), Squeeze(1)]
        self.loader = Loader(
            work.beton,
            batch_size=work.batch,
            num_workers=work.threads,
            order=OrderOption.SEQUENTIAL if work.crop == "eval" else OrderOption.RANDOM,
            os_cache=True,
            drop_last=False,
            pipelines=pipelines,
            seed=work.seed,
        )

    @staticmethod
    def _images(work: Work) -> list[Any]:
        from ffcv.fields.decoders import (
            CenterCropRGBImageDecoder,
            RandomResizedCropRGBImageDecoder,
            SimpleRGBImageDecoder,
        )
        from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, RandomTranslate

        side = (work.size, work.size)
        steps: list[Any]
        if work.crop == "train":
            steps = [RandomResizedCropRGBImageDecoder(side), RandomHorizontalFlip()]
        elif work.crop == "eval":
            # It cuts first and resizes then: a square of size / resize of the shorter side.
            steps = [CenterCropRGBImageDecoder(side, ratio=work.size / work.resize)]
        else:
            steps = [SimpleRGBImageDecoder(), RandomHorizontalFlip(), RandomTranslate(padding=4)]
        if work.normalise:
            steps.append(NormalizeImage(np.array(MEAN), np.array(STD), np.float32))
        return steps

    def epoch(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for images, labels in self.loader:
            yield images.numpy(), labels.numpy().reshape(-1)

    def convert(self, job: Conversion) -> int:
        from ffcv.fields import IntField, RGBImageField
        from ffcv.writer import DatasetWriter

        dataset = PilFolder(job.source)
        fields = {
            "image": RGBImageField(write_mode="jpg", max_resolution=job.max_side, jpeg_quality=job.quality),
            "label": IntField(),
        }
        Path(job.target).unlink(missing_ok=True)
        DatasetWriter(job.target, fields, num_workers=job.threads).from_indexed_dataset(dataset)
        return len(dataset)


class PilFolder:
    """A folder of class folders as its documentation has it: ``(PIL image, label)`` by index."""

    def __init__(self, root: str) -> None:
        self.files = Files(root)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        return Image.open(self.files.paths[index]).convert("RGB"), int(self.files.labels[index])
