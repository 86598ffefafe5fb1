"""NVIDIA DALI on the CPU: pipelines without a device.

The trade-off of DALI: a fixed graph of operators, which is fast for what it has. Encoded images are read by its own reader, decoded
ones come through an external source that hands over views.

>>> make("dali").load(work)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from fastload.benchmarks.peers.base import MEAN, STD, Files, Peer, Pixels, Work

_KEPT = 16  # batches of an external source that stay alive: more than any of its queues holds


def _operators() -> tuple[Any, Any]:
    """DALI's modules ``fn`` and ``types``, which fill themselves at import."""
    from nvidia.dali import fn, types

    return fn, types


class Dali(Peer):
    """As in its ResNet-50 example: the decoder that crops, and INTERP_TRIANGULAR, which antialiases."""

    name = "dali"
    title = "DALI on the CPU"
    requires = ("nvidia-dali-cuda130>=2.4",)
    modules = ("nvidia.dali",)
    crops: ClassVar[dict[str, str]] = {
        "train": "antialiased bilinear",
        "eval": "antialiased bilinear",
        "pad": "none",
    }
    stores = ("jpeg", "raw")
    settings = (
        "pipeline with device_id=None, readers.file, decoders.image_random_crop and resize with INTERP_TRIANGULAR as in its "
        "ResNet-50 example, prefetch_queue_depth=2; decoded images by external_source(no_copy=True)"
    )

    def imports(self) -> None:
        import nvidia.dali.fn
        import nvidia.dali.types  # noqa: F401

    def load(self, work: Work) -> None:
        from nvidia.dali.pipeline import Pipeline

        self.work = work
        self.pipe: Any = None  # the old one's threads end before new ones start
        self.source: Files | Pixels = Files(work.folder) if work.store == "jpeg" else Pixels(work.pixels)
        self.pipe = Pipeline(
            batch_size=work.batch,
            num_threads=work.threads,
            device_id=None,
            seed=work.seed,
            prefetch_queue_depth=2,
        )
        with self.pipe:
            self.pipe.set_outputs(*(self._files() if isinstance(self.source, Files) else self._pixels()))
        self.pipe.build()
        self.left = 0  # samples of a begun epoch that are still to come

    def _files(self) -> tuple[Any, Any]:
        fn, types = _operators()

        assert isinstance(self.source, Files)
        encoded, labels = fn.readers.file(
            files=self.source.paths,
            labels=self.source.labels.tolist(),
            shuffle_after_epoch=self.work.crop != "eval",
            pad_last_batch=True,  # so that an epoch begins with a batch; what was added is cut off in epoch()
        )
        if self.work.crop == "train":
            # torchvision's parameters are its defaults: area 0.08 to 1, aspect ratio 3/4 to 4/3.
            images = fn.decoders.image_random_crop(encoded, device="cpu", output_type=types.RGB)
            images = self._to_size(images)
        else:
            images = self._centre(fn.decoders.image(encoded, device="cpu", output_type=types.RGB))
        return self._finish(images), labels

    def _pixels(self) -> tuple[Any, Any]:
        fn, types = _operators()

        images, labels = fn.external_source(
            source=self._batches(),
            num_outputs=2,
            batch=True,
            no_copy=True,
            dtype=[types.UINT8, types.INT64],
            ndim=[3, 0],
            layout=["HWC", ""],
        )
        size = self.work.size
        if self.work.crop == "train":
            images = fn.random_resized_crop(images, size=(size, size), interp_type=types.INTERP_TRIANGULAR)
        elif self.work.crop == "eval":
            images = self._centre(images)
        else:
            shift = fn.random.uniform(values=[float(by) for by in range(-4, 5)], shape=2)
            images = fn.slice(
                images,
                shift,
                [float(size), float(size)],
                axes=[0, 1],
                normalized_anchor=False,
                normalized_shape=False,
                out_of_bounds_policy="pad",
                fill_values=0,
            )
        return self._finish(images), labels

    def _to_size(self, images: Any) -> Any:
        fn, types = _operators()

        return fn.resize(
            images, resize_x=self.work.size, resize_y=self.work.size, interp_type=types.INTERP_TRIANGULAR
        )

    def _centre(self, images: Any) -> Any:
        fn, types = _operators()

        images = fn.resize(images, resize_shorter=self.work.resize, interp_type=types.INTERP_TRIANGULAR)
        return fn.crop(images, crop=(self.work.size, self.work.size))

    def _finish(self, images: Any) -> Any:
        fn, types = _operators()

        mirror = fn.random.coin_flip(probability=0.5) if self.work.crop != "eval" else 0
        if self.work.normalise:
            return fn.crop_mirror_normalize(
                images, mirror=mirror, mean=list(MEAN), std=list(STD), dtype=types.FLOAT, output_layout="HWC"
            )
        return images if self.work.crop == "eval" else fn.flip(images, horizontal=mirror)

    def _batches(self) -> Iterator[tuple[Any, np.ndarray]]:
        """Views of mapped images, epoch after epoch, for ever; small ones of one size are gathered into an array."""
        assert isinstance(self.source, Pixels)
        source, rng, kept = self.source, np.random.default_rng(self.work.seed), deque[Any](maxlen=_KEPT)
        stacked = source.stacked() if self.work.crop == "pad" else None
        while True:
            order = np.arange(len(source)) if self.work.crop == "eval" else rng.permutation(len(source))
            for start in range(0, len(order), self.work.batch):
                chosen = order[start : start + self.work.batch]
                images = [source.image(i) for i in chosen] if stacked is None else stacked[chosen]
                kept.append((images, source.labels[chosen]))
                yield kept[-1]

    def epoch(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        while self.left:  # of an epoch that was left early
            self._next()
        self.left = len(self.source)
        while self.left:
            yield self._next()

    def _next(self) -> tuple[np.ndarray, np.ndarray]:
        images, labels = (np.asarray(output.as_tensor()) for output in self.pipe.run())
        count = min(len(images), self.left)
        self.left -= count
        return images[:count], labels[:count].reshape(-1)
