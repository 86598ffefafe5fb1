"""Grain: order and randomness by index, read by threads. Its trade-off: each sample pays for a generator of its own, reproducibly.

>>> from fastload.benchmarks.peers import make; peer = make("grain"); peer.load(work); next(iter(peer.epoch()))
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np

from fastload.benchmarks.peers import ops
from fastload.benchmarks.peers.base import Files, Peer, Pixels, Work


class Grain(Peer):
    """A ``MapDataset`` of places, shuffled, mapped, batched and repeated, that threads read ahead."""

    name: ClassVar[str] = "grain"
    title: ClassVar[str] = "Grain"
    requires: ClassVar[tuple[str, ...]] = ("grain>=0.2.12", *ops.REQUIRES)
    modules: ClassVar[tuple[str, ...]] = ("grain", *ops.MODULES)
    crops: ClassVar[dict[str, str]] = ops.CROPS
    stores: ClassVar[tuple[str, ...]] = ("jpeg", "raw")
    settings: ClassVar[str] = (
        "MapDataset.shuffle().random_map().batch().repeat().to_iter_dataset(ReadOptions) as in its tutorials, as many read threads as "
        "asked (its default of 16 is slower), two batches ahead for each, simplejpeg and OpenCV in the map; pad: a batch in one map"
    )

    def imports(self) -> None:
        import cv2  # noqa: F401
        import grain  # noqa: F401
        import simplejpeg  # noqa: F401

    def load(self, work: Work) -> None:
        import grain

        ops.single_threaded()
        self.work, self.cropper = work, ops.Cropper(work)
        self.source: Files | Pixels = Files(work.folder) if work.store == "jpeg" else Pixels(work.pixels)
        samples = grain.MapDataset.range(len(self.source)).seed(work.seed)
        if work.crop != "eval":
            samples = samples.shuffle()
        if work.crop == "pad" and isinstance(self.source, Pixels):
            source = self.source  # of numpy arrays: one call for a batch, where a call for each 32 px image would be most of the time
            batches = samples.batch(work.batch).random_map(
                lambda index, rng: (ops.pad_batch(source.stacked()[index], work, rng), source.labels[index])
            )
        else:
            batches = samples.random_map(self._sample).batch(work.batch, batch_fn=self._collate)
        options = grain.ReadOptions(num_threads=work.threads, prefetch_buffer_size=2 * work.threads)
        self.epochs = batches.repeat().to_iter_dataset(options)
        self.count, self.batches = len(batches), iter(self.epochs)
        self.whole = True

    def epoch(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        if not self.whole:  # an epoch that was left would go on where it was left
            self.batches.close()
            self.batches = iter(self.epochs)
        self.whole = False
        yield from itertools.islice(self.batches, self.count)
        self.whole = True

    def _sample(self, i: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
        if isinstance(self.source, Files):
            image = ops.decode(ops.read(self.source.paths[i]))
        else:
            image = self.source.image(i)
        return self.cropper(image, rng.random), int(self.source.labels[i])

    def _collate(self, samples: Sequence[tuple[np.ndarray, int]]) -> tuple[np.ndarray, np.ndarray]:
        images, labels = zip(*samples)
        return ops.stack(images, self.work), np.array(labels, np.int64)
