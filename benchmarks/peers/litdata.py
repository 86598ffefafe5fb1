"""LitData: binary chunks written once by ``optimize``, streamed by worker processes. Its trade-off: a second copy of the data on the disk.

>>> from fastload.benchmarks.peers import make; peer = make("litdata"); peer.prepare(work); peer.load(work); next(iter(peer.epoch()))
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fastload.benchmarks.peers import ops
from fastload.benchmarks.peers.base import Files, Peer, Pixels, Work


class LitData(Peer):
    """``optimize`` to chunks of 64 MB with the JPEG bytes as they are, ``StreamingDataset`` with a transform, ``StreamingDataLoader``."""

    name: ClassVar[str] = "litdata"
    title: ClassVar[str] = "LitData"
    requires: ClassVar[tuple[str, ...]] = ("litdata>=0.2.50", *ops.REQUIRES)
    modules: ClassVar[tuple[str, ...]] = ("litdata", *ops.MODULES)
    crops: ClassVar[dict[str, str]] = ops.CROPS
    stores: ClassVar[tuple[str, ...]] = ("jpeg", "raw")
    settings: ClassVar[str] = (
        "optimize(chunk_bytes='64MB') and StreamingDataset(shuffle=True) on the local folder as in its README, workers that stay alive, "
        "simplejpeg and OpenCV in the transform, batches built in shared memory"
    )

    def imports(self) -> None:
        import cv2  # noqa: F401
        import litdata  # noqa: F401
        import simplejpeg  # noqa: F401

    def prepare(self, work: Work) -> None:
        import litdata

        target = Path(work.scratch) / "chunks"
        if (target / "index.json").exists():
            return
        reader = Reader(work)
        # Places, not paths: optimize takes paths among its inputs for files to be moved, and deletes what it moved.
        litdata.optimize(
            fn=reader,
            inputs=list(range(len(reader.source))),
            output_dir=str(target),
            chunk_bytes="64MB",
            num_workers=work.threads,
            verbose=False,
        )

    def load(self, work: Work) -> None:
        import litdata

        ops.single_threaded()
        dataset = litdata.StreamingDataset(
            str(Path(work.scratch) / "chunks"),
            shuffle=work.crop != "eval",
            drop_last=False,
            seed=work.seed,
            transform=Sample(work),
        )
        self.loader = litdata.StreamingDataLoader(
            dataset,
            batch_size=work.batch,
            drop_last=False,
            collate_fn=ops.Collate(work),
            **ops.worker_options(work),
        )

    def epoch(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for images, labels in self.loader:
            yield images.numpy(), labels.numpy()


class Reader:
    """The function that ``optimize`` calls for each place: a record of bytes or pixels, and the label."""

    def __init__(self, work: Work) -> None:
        self.source: Files | Pixels = Files(work.folder) if work.store == "jpeg" else Pixels(work.pixels)

    def __call__(self, i: int) -> dict[str, Any]:
        image = (
            ops.read(self.source.paths[i]) if isinstance(self.source, Files) else self.source.image(i).copy()
        )
        return {"image": image, "label": int(self.source.labels[i])}


class Sample:
    """A record to its image and label; in the worker."""

    def __init__(self, work: Work) -> None:
        self.cropper = ops.Cropper(work)

    def __call__(self, record: dict[str, Any]) -> tuple[np.ndarray, int]:
        image = record["image"]
        if not isinstance(image, np.ndarray):  # bytes, or a view of the chunk
            image = ops.decode(image)
        return self.cropper(image, random.random), record["label"]
