"""SPDL: a pipeline of threads in one process. Its trade-off: it is as parallel as the functions that it is given release the GIL.

>>> from fastload.benchmarks.peers import make; peer = make("spdl"); peer.load(work); next(iter(peer.epoch()))
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from fastload.benchmarks.peers import ops
from fastload.benchmarks.peers.base import Files, Peer, Pixels, Work


class Order:
    """Batches of places in the data; each iteration is another epoch, in another order."""

    def __init__(self, count: int, work: Work) -> None:
        self.count, self.work, self.epochs = count, work, 0

    def __iter__(self) -> Iterator[np.ndarray]:
        rng = np.random.default_rng((self.work.seed, self.epochs))
        self.epochs += 1
        order = np.arange(self.count) if self.work.crop == "eval" else rng.permutation(self.count)
        for at in range(0, self.count, self.work.batch):
            yield order[at : at + self.work.batch]


class Batch:
    """The task of the pipeline: places to images and labels. Apart from the peer, so that dropping that one stops the pipeline."""

    def __init__(self, work: Work) -> None:
        random.seed(work.seed)
        self.work, self.cropper = work, ops.Cropper(work)
        self.source: Files | Pixels = Files(work.folder) if work.store == "jpeg" else Pixels(work.pixels)

    def __call__(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self.work.crop == "pad" and isinstance(self.source, Pixels):
            images = ops.pad_batch(self.source.stacked()[index], self.work, np.random.default_rng())
        else:
            images = ops.stack([self._image(i) for i in index.tolist()], self.work)
        return images, self.source.labels[index]

    def _image(self, i: int) -> np.ndarray:
        if isinstance(self.source, Files):
            return self.cropper(ops.decode(ops.read(self.source.paths[i])), random.random)
        return self.cropper(self.source.image(i), random.random)


class Spdl(Peer):
    """SPDL with simplejpeg: its own decoder needs FFmpeg's shared libraries, which no wheel brings, and is slower where they are."""

    name: ClassVar[str] = "spdl"
    title: ClassVar[str] = "SPDL"
    requires: ClassVar[tuple[str, ...]] = ("spdl-core>=0.8", *ops.REQUIRES)
    modules: ClassVar[tuple[str, ...]] = ("spdl.pipeline", *ops.MODULES)
    crops: ClassVar[dict[str, str]] = ops.CROPS
    stores: ClassVar[tuple[str, ...]] = ("jpeg", "raw")
    settings: ClassVar[str] = (
        "one thread pool, a batch as one task (SPDL's ImageNet example loads by the batch; a task for each image has 0.6 of the speed), "
        "a continuous source over the epochs as its documentation advises, simplejpeg and OpenCV in the tasks"
    )

    def imports(self) -> None:
        import cv2  # noqa: F401
        import simplejpeg  # noqa: F401
        import spdl.pipeline  # noqa: F401

    def load(self, work: Work) -> None:
        ops.single_threaded()
        self.task = Batch(work)
        self._start()

    def _start(self) -> None:
        from spdl.pipeline import PipelineBuilder

        work = self.task.work
        builder = PipelineBuilder().add_source(Order(len(self.task.source), work), continuous=True)
        builder.pipe(self.task, concurrency=work.threads).add_sink(2)
        # A failed task is dropped with a line in the log, unless failures are limited.
        self.pipeline = builder.build(num_threads=work.threads, max_failures=0)
        self.pipeline.start()
        self.whole = True

    def epoch(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        if not self.whole:  # an epoch that was left goes on where it was left
            self.pipeline.stop()
            self._start()
        self.whole = False
        yield from self.pipeline.get_iterator()
        self.whole = True
