"""WebDataset: tar shards read in sequence by worker processes. Its trade-off: the order is random within a buffer only.

>>> from fastload.benchmarks.peers import make; peer = make("webdataset"); peer.prepare(work); peer.load(work); next(iter(peer.epoch()))
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fastload.benchmarks.peers import ops
from fastload.benchmarks.peers.base import Files, Peer, Work

# Shared evenly by 1, 2, 4, 8 or 16 workers, each of which needs a shard at least.
SHARDS = 16


class WebDataset(Peer):
    """``WebDataset(shards).shuffle().map().batched()`` in the workers of a ``WebLoader``: batches cross the processes, not samples."""

    name: ClassVar[str] = "webdataset"
    title: ClassVar[str] = "WebDataset"
    requires: ClassVar[tuple[str, ...]] = ("webdataset>=0.2.100", *ops.REQUIRES)
    modules: ClassVar[tuple[str, ...]] = ("webdataset", *ops.MODULES)
    crops: ClassVar[dict[str, str]] = ops.WITHOUT_PAD
    settings: ClassVar[str] = (
        "shards split over workers that stay alive, shards and then samples shuffled in a buffer of 1,000, batched in the workers into "
        "shared memory as its documentation advises, simplejpeg and OpenCV in the map"
    )

    def imports(self) -> None:
        import cv2  # noqa: F401
        import simplejpeg  # noqa: F401
        import webdataset  # noqa: F401

    def prepare(self, work: Work) -> None:
        import webdataset

        done = Path(work.scratch) / "done"
        if done.exists():
            return
        files = Files(work.folder)
        for shard in range(SHARDS):
            with webdataset.TarWriter(str(Path(work.scratch) / f"{shard:05d}.tar")) as out:
                for i in range(shard, len(files), SHARDS):
                    out.write(
                        {"__key__": f"{i:08d}", "jpg": ops.read(files.paths[i]), "cls": int(files.labels[i])}
                    )
        done.touch()

    def load(self, work: Work) -> None:
        import webdataset

        ops.single_threaded()
        shards = sorted(map(str, Path(work.scratch).glob("*.tar")))
        shuffled = work.crop != "eval"
        samples = webdataset.WebDataset(
            shards, shardshuffle=len(shards) if shuffled else False, seed=work.seed
        )
        if shuffled:
            samples = samples.shuffle(1000)
        batches = samples.map(Sample(work)).batched(work.batch, collation_fn=ops.Collate(work))
        self.loader = webdataset.WebLoader(batches, batch_size=None, **ops.worker_options(work))

    def epoch(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for images, labels in self.loader:
            yield images.numpy(), labels.numpy()


class Sample:
    """A sample of a shard to its image and label; in the worker."""

    def __init__(self, work: Work) -> None:
        self.cropper = ops.Cropper(work)

    def __call__(self, sample: dict[str, Any]) -> tuple[np.ndarray, int]:
        return self.cropper(ops.decode(sample["jpg"]), random.random), int(sample["cls"])
