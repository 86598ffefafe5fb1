"""Albumentations behind PyTorch's DataLoader, with OpenCV as decoder.

The trade-off of Albumentations: OpenCV's bilinear resize is fast and does not antialias, so a shrunk image has aliases.

>>> make("albumentations").load(work)
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from fastload.benchmarks.peers.base import MEAN, STD, Files, Peer, Pixels, Work


class Albumentations(Peer):
    """As its "Image classification" page: cv2 reads, A.Compose on arrays; OpenCV's own threads are off."""

    name = "albumentations"
    title = "torch DataLoader, Albumentations"
    requires = ("albumentations>=2",)
    modules = ("albumentations", "cv2", "torch")
    crops: ClassVar[dict[str, str]] = {
        "train": "bilinear, not antialiased",
        "eval": "bilinear, not antialiased",
    }
    stores = ("jpeg", "raw")
    # Its performance page: cv2.setNumThreads(0) in workers, and cv2.imread instead of Pillow.
    settings = (
        "torch DataLoader(persistent_workers=True), one worker a thread, cv2.imread and A.Compose with OpenCV's bilinear "
        "resize, cv2.setNumThreads(0) as its performance page advises"
    )

    def imports(self) -> None:
        os.environ.setdefault(
            "NO_ALBUMENTATIONS_UPDATE", "1"
        )  # else it asks the network for its newest version
        import albumentations  # noqa: F401
        import cv2  # noqa: F401
        import torch.utils.data  # noqa: F401

    def load(self, work: Work) -> None:
        self.imports()
        import cv2
        import torch
        from torch.utils.data import DataLoader

        cv2.setNumThreads(0)
        self.loader: Any = DataLoader(
            Arrays(work),  # type: ignore[arg-type]
            batch_size=work.batch,
            shuffle=work.crop != "eval",
            generator=torch.Generator().manual_seed(work.seed),
            num_workers=work.threads,
            persistent_workers=True,
            worker_init_fn=_without_threads,
        )

    def epoch(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for images, labels in self.loader:
            yield images.numpy(), labels.numpy()


def _without_threads(worker: int) -> None:
    import cv2

    cv2.setNumThreads(0)


def compose(work: Work) -> Any:
    """The pipeline of a workload, for (H, W, 3) uint8 arrays."""
    import albumentations as A
    import cv2

    side, steps = (work.size, work.size), []
    if work.crop == "train":
        steps = [
            A.RandomResizedCrop(
                side, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), interpolation=cv2.INTER_LINEAR
            ),
            A.HorizontalFlip(p=0.5),
        ]
    else:
        steps = [A.SmallestMaxSize(work.resize, interpolation=cv2.INTER_LINEAR), A.CenterCrop(*side)]
    if work.normalise:
        mean, std = (tuple(value / 255 for value in levels) for levels in (MEAN, STD))
        steps.append(A.Normalize(mean, std))
    return A.Compose(steps)


class Arrays:
    """One transformed image and its label by index, from a file or from mapped pixels."""

    def __init__(self, work: Work) -> None:
        self.source = Files(work.folder) if work.store == "jpeg" else Pixels(work.pixels)
        self.pipeline = compose(work)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        import cv2

        if isinstance(self.source, Files):
            flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
            image = cv2.imread(self.source.paths[index], flags)
            if image is None:
                raise ValueError(f"OpenCV cannot read {self.source.paths[index]!r}")
        else:
            image = self.source.image(index)
        return self.pipeline(image=image)["image"], int(self.source.labels[index])
