"""DALI as its own documentation sets it up, for the GPU suite: its reader, its decoder, its draws, and batches in fp16.

As in its ResNet-50 example: readers.file, image_random_crop, INTERP_TRIANGULAR, crop_mirror_normalize. With ``decode="mixed"`` nvJPEG
decodes, with "cpu" libjpeg-turbo does and the GPU the rest, if there is one. The trade-off: its crops are its own, so its batches can
be checked by their mean and spread only.

>>> OwnPipeline("photos", Shape(224, 256, 16), "mixed", True, torch.cuda.synchronize).round()
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from fastload.benchmarks.peers.base import MEAN, STD, Files
from fastload.errors import UsageError, require

if TYPE_CHECKING:
    from fastload.benchmarks.gpu_loaders import Shape

QUEUE = 3  # batches that it prepares ahead
# Normalised photographs: their mean is near 0 and their spread near 1; a batch of noise, zeros or bytes is not.
MOST_MEAN, SPREAD = 2.0, (0.2, 3.0)


class OwnPipeline:
    """The pipeline, running over the class folders in ``folder`` without end."""

    def __init__(self, folder: str, shape: Shape, decode: str, gpu: bool, sync: Callable[[], object]) -> None:
        require("nvidia.dali", "dali")
        from nvidia.dali import fn as operators
        from nvidia.dali import types as kinds
        from nvidia.dali.pipeline import Pipeline

        from fastload.engines.dali import roi_decode_works

        fn: Any = operators
        types: Any = kinds  # fills itself at import
        files, size = Files(folder), shape.size
        # Some versions crash when they decode a region on a GPU, and would take this process with them.
        regions = decode != "mixed" or roi_decode_works(0)
        self.batch, self.sync, self.seconds, self.gpu = shape.batch, sync, 0.1, gpu
        self.pipe: Any = Pipeline(
            batch_size=shape.batch, num_threads=shape.threads, device_id=0 if gpu else None, seed=1,
            prefetch_queue_depth=QUEUE,
        )  # fmt: skip
        with self.pipe:
            encoded, labels = fn.readers.file(
                files=files.paths, labels=files.labels.tolist(), random_shuffle=True, pad_last_batch=False, name="files"
            )  # fmt: skip
            if regions:
                images = fn.decoders.image_random_crop(encoded, device=decode, output_type=types.RGB)
            else:
                images = fn.decoders.image(encoded, device=decode, output_type=types.RGB)
            images = images.gpu() if gpu and decode == "cpu" else images
            if regions:
                images = fn.resize(images, resize_x=size, resize_y=size, interp_type=types.INTERP_TRIANGULAR)
            else:
                images = fn.random_resized_crop(
                    images, size=(size, size), interp_type=types.INTERP_TRIANGULAR
                )
            images = fn.crop_mirror_normalize(
                images, mirror=fn.random.coin_flip(probability=0.5), mean=list(MEAN), std=list(STD),
                dtype=types.FLOAT16 if gpu else types.FLOAT, output_layout="HWC",
            )  # fmt: skip
            self.pipe.set_outputs(images, labels)
        self.pipe.build()
        self.said, self.wrong = self._check(size, regions)

    def _check(self, size: int, regions: bool) -> tuple[str, str]:
        images = self.pipe.run()[0]
        pixels = np.asarray((images.as_cpu() if self.gpu else images).as_tensor()).astype(np.float32)
        mean, spread = float(pixels.mean()), float(pixels.std())
        said = f"{'' if regions else 'whole images decoded, as regions crash this version; '}crops of its own: mean {mean:.2f}, spread {spread:.2f}"
        if pixels.shape != (self.batch, size, size, 3):
            return said, f"its batches are {pixels.shape}"
        if not (np.isfinite(pixels).all() and abs(mean) < MOST_MEAN and SPREAD[0] < spread < SPREAD[1]):
            return (
                said,
                f"its pixels do not look like normalised photographs (mean {mean:.2f}, spread {spread:.2f})",
            )
        return said, ""

    def round(self) -> float:
        """Images/s over ``seconds``, the device waited for."""
        try:
            for _ in range(QUEUE + 1):  # what was made ready while others were measured
                self.pipe.run()
            self.sync()
            clock, count = time.perf_counter(), 0
            while not count or time.perf_counter() - clock < self.seconds:
                self.pipe.run()
                count += self.batch
            self.sync()
            return count / (time.perf_counter() - clock)
        except RuntimeError as error:
            raise UsageError(f"it failed in a round: {' '.join(str(error).split())[:200]}") from error

    def close(self) -> None:
        """Let its threads and its memory go."""
        self.pipe = None
