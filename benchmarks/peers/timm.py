"""timm's own loader, as its training script makes it: Pillow in worker processes.

The trade-off of timm: any image that Pillow opens, at Pillow's speed.

>>> make("timm").load(work)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from fastload.benchmarks.peers.base import MEAN, STD, Files, Peer, Work


class Timm(Peer):
    """``create_dataset`` and ``create_loader``, with what its script adds on a CPU, and no other augmentation."""

    name = "timm"
    title = "timm create_loader"
    requires = ("timm",)
    modules = ("timm",)
    crops: ClassVar[dict[str, str]] = {"train": "antialiased bilinear", "eval": "antialiased bilinear"}
    settings = (
        "timm.data.create_dataset and create_loader(use_prefetcher=False, persistent_workers=True) as in its train script "
        "on a CPU, one worker a thread, interpolation=bilinear; uint8 batches by create_transform(normalize=False)"
    )

    def imports(self) -> None:
        import timm.data  # noqa: F401

    def load(self, work: Work) -> None:
        import timm.data
        import torch

        make: Any = timm.data
        torch.manual_seed(work.seed)  # its loader takes order and workers' seeds from torch's own generator
        training = work.crop == "train"
        mean, std = (tuple(value / 255 for value in levels) for levels in (MEAN, STD))
        how: dict[str, Any] = {
            "is_training": training,
            "interpolation": "bilinear",
            "scale": (0.08, 1.0),
            "ratio": (3 / 4, 4 / 3),
            "hflip": 0.5,
            "color_jitter": None,
            "mean": mean,
            "std": std,
            "crop_pct": work.size / work.resize,
            "use_prefetcher": False,
        }
        # It would number classes in natural order ("2" before "10").
        numbers = {name: number for number, name in enumerate(Files(work.folder).classes)}
        dataset = make.create_dataset(
            "", root=work.folder, search_split=False, class_map=numbers, is_training=training
        )
        size = (3, work.size, work.size)
        self.loader = make.create_loader(
            dataset, size, work.batch, num_workers=work.threads, persistent_workers=True, **how
        )
        if not work.normalise:
            dataset.transform = make.create_transform(size, normalize=False, **how)
        self.loader.batch_sampler.drop_last = (
            False  # in training it drops the last batch: here an epoch is every sample
        )

    def epoch(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for images, labels in self.loader:
            yield images.permute(0, 2, 3, 1).numpy(), labels.numpy()
