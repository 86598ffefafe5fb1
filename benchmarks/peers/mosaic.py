"""Mosaic Streaming: MDS shards with a shared, resumable order. Its trade-off: bookkeeping in shared memory that outlives a killed process.

>>> from fastload.benchmarks.peers import make; peer = make("mosaic"); peer.prepare(work); peer.load(work); next(iter(peer.epoch()))
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fastload.benchmarks.peers import ops
from fastload.benchmarks.peers.base import Files, Peer, Pixels, Work


class Mosaic(Peer):
    """``MDSWriter`` without compression, a local ``StreamingDataset`` that knows the batch size, torch's ``DataLoader``."""

    name: ClassVar[str] = "mosaic"
    title: ClassVar[str] = "Mosaic Streaming"
    requires: ClassVar[tuple[str, ...]] = ("mosaicml-streaming>=0.11", *ops.REQUIRES)
    modules: ClassVar[tuple[str, ...]] = ("streaming", *ops.MODULES)
    crops: ClassVar[dict[str, str]] = ops.CROPS
    stores: ClassVar[tuple[str, ...]] = ("jpeg", "raw")
    settings: ClassVar[str] = (
        "MDS shards of its default 64 MB without compression, StreamingDataset(local=, shuffle=True, batch_size=) as its documentation "
        "asks for speed, workers that stay alive, simplejpeg and OpenCV in __getitem__, batches built in shared memory"
    )

    def imports(self) -> None:
        import cv2  # noqa: F401
        import simplejpeg  # noqa: F401
        import streaming  # noqa: F401

    def prepare(self, work: Work) -> None:
        import streaming

        target = Path(work.scratch) / "shards"
        if (target / "index.json").exists():  # written last
            return
        source: Files | Pixels = Files(work.folder) if work.store == "jpeg" else Pixels(work.pixels)
        columns = {"image": "bytes" if work.store == "jpeg" else "ndarray:uint8", "label": "int"}
        with streaming.MDSWriter(out=str(target), columns=columns) as out:
            for i in range(len(source)):
                image = ops.read(source.paths[i]) if isinstance(source, Files) else source.image(i)
                out.write({"image": image, "label": int(source.labels[i])})

    def load(self, work: Work) -> None:
        import streaming
        from torch.utils.data import DataLoader

        ops.single_threaded()
        cropper = ops.Cropper(work)

        class Cropped(streaming.StreamingDataset):  # type: ignore[misc, name-defined, unused-ignore]
            def __getitem__(self, at: Any) -> tuple[np.ndarray, int]:
                record = super().__getitem__(at)
                image = record["image"]
                if isinstance(image, bytes):
                    image = ops.decode(image)
                return cropper(image, random.random), record["label"]

        dataset = Cropped(
            local=str(Path(work.scratch) / "shards"),
            shuffle=work.crop != "eval",
            shuffle_seed=work.seed,
            batch_size=work.batch,
        )
        self.loader: Any = DataLoader(
            dataset, batch_size=work.batch, collate_fn=ops.Collate(work), **ops.worker_options(work)
        )

    def epoch(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for images, labels in self.loader:
            yield images.numpy(), labels.numpy()
