"""fastload itself on the CPU, with its defaults and with ``decode="exact"``.

The trade-off of the default: chroma is resized from its own samples, and a box at least twice as large as the output is decoded at half
size; "exact" gives Pillow's pixels.

>>> make("cpu").load(work)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from fastload.benchmarks.peers.base import MEAN, STD, Conversion, Peer, Work


class Cpu(Peer):
    """The loader as it comes: all settings are defaults but threads, which all peers get alike."""

    name = "cpu"
    title = "fastload"
    requires = ("fastload",)
    modules = ("fastload",)
    crops: ClassVar[dict[str, str]] = {
        "train": "antialiased bilinear",
        "eval": "antialiased bilinear",
        "pad": "none",
    }
    stores = ("jpeg", "raw")
    settings = 'fastload.Loader with its defaults (engine="cpu", decode="fast", prefetch=2), one .beton file'
    converts = True
    decode = "fast"
    device: str | None = None

    def imports(self) -> None:
        import fastload.loader
        import fastload.transforms  # noqa: F401

    def load(self, work: Work) -> None:
        from fastload import Loader

        self.loader = Loader(
            work.beton,
            work.batch,
            transforms=self.pipeline(work),
            shuffle=work.crop != "eval",
            seed=work.seed,
            threads=work.threads,
            decode=self.decode,
            device=self.device,
        )

    @staticmethod
    def pipeline(work: Work) -> tuple[Any, ...]:
        """The transforms of a workload."""
        from fastload import transforms

        steps: list[Any]
        if work.crop == "train":
            steps = [transforms.RandomResizedCrop(work.size), transforms.HorizontalFlip(0.5)]
        elif work.crop == "eval":
            steps = [transforms.Resize(work.resize), transforms.CenterCrop(work.size)]
        else:
            steps = [transforms.RandomCrop(work.size, padding=4), transforms.HorizontalFlip(0.5)]
        if work.normalise:
            mean, std = ([value / 255 for value in levels] for levels in (MEAN, STD))
            steps.append(transforms.Normalize((mean[0], mean[1], mean[2]), (std[0], std[1], std[2])))
        return tuple(steps)

    def epoch(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for images, labels in self.loader:
            yield images.permute(0, 2, 3, 1).numpy(), labels.numpy()

    def convert(self, job: Conversion) -> int:
        import fastload

        fastload.convert(
            job.source,
            job.target,
            max_side=job.max_side,
            quality=job.quality,
            store="jpeg",
            reencode="always",
            workers=job.threads,
            overwrite=True,
            progress=False,
        )
        with fastload.open(job.target) as dataset:
            return len(dataset)


class CpuExact(Cpu):
    """The same with Pillow's pixels: smooth chroma upsampling, no decoding at reduced size."""

    name = "cpu-exact"
    title = 'fastload, decode="exact"'
    settings = 'fastload.Loader(decode="exact"), else its defaults, one .beton file'
    converts = False  # decoding has no part in it: it would be the same row again
    decode = "exact"
