"""Image work for peers whose library brings none: simplejpeg decodes, OpenCV resizes, numpy pads, flips and normalises.

These are the fastest well-known ones on a CPU: both release the GIL, both flags of simplejpeg are its fast ones, and the window is cut
before it is resized. The trade-off is in the name of the rows: OpenCV's bilinear filter does not antialias.

>>> Cropper(work)(decode(data), random.random)  # (224, 224, 3) uint8
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastload.benchmarks.peers.base import MEAN, STD, Work

if TYPE_CHECKING:
    import torch

FILTER = "bilinear, not antialiased"
CROPS = {"train": FILTER, "eval": FILTER, "pad": "none"}
WITHOUT_PAD = {"train": FILTER, "eval": FILTER}
REQUIRES = ("simplejpeg>=1.8", "opencv-python-headless>=4.10")
MODULES = ("simplejpeg", "cv2")
PAD = 4


def single_threaded() -> None:
    """OpenCV's own pool off: the library under test makes the threads."""
    import cv2

    cv2.setNumThreads(0)


def read(path: str) -> bytes:
    """The bytes of a file."""
    with open(path, "rb") as file:
        return file.read()


def decode(data: bytes | np.ndarray) -> np.ndarray:
    """A JPEG as (h, w, 3) uint8; what simplejpeg cannot decode (CMYK, another format) goes through Pillow."""
    import simplejpeg

    try:
        image: np.ndarray = simplejpeg.decode_jpeg(data, fastdct=True, fastupsample=True)
    except ValueError:
        import io

        from PIL import Image

        image = np.array(Image.open(io.BytesIO(bytes(data))).convert("RGB"))
    return image


def train_window(height: int, width: int, uniform: Callable[[], float]) -> tuple[int, int, int, int]:
    """The (top, left, height, width) of RandomResizedCrop: scale 0.08-1, ratio 3/4-4/3, ten tries, then the whole image's middle."""
    span = math.log(4 / 3)
    for _ in range(10):
        target = height * width * (0.08 + 0.92 * uniform())
        ratio = math.exp(span * (2 * uniform() - 1))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(uniform() * (height - h + 1)), int(uniform() * (width - w + 1)), h, w
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def eval_window(height: int, width: int, size: int, resize: int) -> tuple[int, int, int, int]:
    """The window of the source that becomes the centre ``size`` square once the shorter side is ``resize``, to the nearest pixel."""
    side = min(height, width, max(1, round(min(height, width) * size / resize)))
    return round((height - side) / 2), round((width - side) / 2), side, side


class Cropper:
    """The crop and flip of a workload for one decoded image; crosses to worker processes by pickling."""

    def __init__(self, work: Work) -> None:
        self.crop, self.size, self.resize = work.crop, work.size, work.resize

    def __call__(self, image: np.ndarray, uniform: Callable[[], float]) -> np.ndarray:
        """(h, w, 3) uint8 to (size, size, 3) uint8, contiguous; ``uniform()`` gives numbers in [0, 1)."""
        import cv2

        if self.crop == "pad":
            return self._pad(image, uniform)
        height, width = image.shape[:2]
        if self.crop == "train":
            top, left, h, w = train_window(height, width, uniform)
        else:
            top, left, h, w = eval_window(height, width, self.size, self.resize)
        window = image[top : top + h, left : left + w]
        out: np.ndarray = cv2.resize(window, (self.size, self.size), interpolation=cv2.INTER_LINEAR)
        if self.crop == "train" and uniform() < 0.5:
            out = cv2.flip(out, 1)
        return out

    def _pad(self, image: np.ndarray, uniform: Callable[[], float]) -> np.ndarray:
        height, width = image.shape[:2]
        padded = np.zeros((height + 2 * PAD, width + 2 * PAD, 3), np.uint8)
        padded[PAD : PAD + height, PAD : PAD + width] = image
        top = int(uniform() * (height + 2 * PAD - self.size + 1))
        left = int(uniform() * (width + 2 * PAD - self.size + 1))
        out = padded[top : top + self.size, left : left + self.size]
        return np.ascontiguousarray(out[:, ::-1] if uniform() < 0.5 else out)


def pad_batch(images: np.ndarray, work: Work, rng: np.random.Generator) -> np.ndarray:
    """The "pad" crop of a whole batch at once: (B, h, w, 3) uint8 to (B, size, size, 3), normalised where the workload asks it."""
    count, height, width, _ = images.shape
    size = work.size
    padded = np.zeros((count, height + 2 * PAD, width + 2 * PAD, 3), np.uint8)
    padded[:, PAD : PAD + height, PAD : PAD + width] = images
    top, left = (
        rng.integers(height + 2 * PAD - size + 1, size=count),
        rng.integers(width + 2 * PAD - size + 1, size=count),
    )
    out = np.empty((count, size, size, 3), np.uint8)
    # A loop of slices: faster than one gather, whose index arrays are larger than the images.
    flips = np.less(rng.random(count), 0.5)
    for i, (y, x, flip) in enumerate(zip(top.tolist(), left.tolist(), flips.tolist())):
        window = padded[i, y : y + size, x : x + size]
        out[i] = window[:, ::-1] if flip else window
    return normalise(out) if work.normalise else out


def normalise(batch: np.ndarray) -> np.ndarray:
    """(B, h, w, 3) uint8 to float32, ``(level - MEAN) / STD``."""
    # Rows of (width * 3): numpy's inner loop would be three long over the channels.
    width = batch.shape[2]
    std = np.tile(np.array(STD, np.float32), width)
    out = np.multiply(batch.reshape(*batch.shape[:2], width * 3), 1 / std, dtype=np.float32)
    out -= np.tile(np.array(MEAN, np.float32), width) / std
    return out.reshape(batch.shape)


def stack(images: Sequence[np.ndarray], work: Work) -> np.ndarray:
    """The batch of a workload from its images: uint8, or float32 where ``work.normalise``."""
    batch = np.stack(images)
    return normalise(batch) if work.normalise else batch


class Collate:
    """``(image, label)`` pairs to two tensors, written straight into the shared memory that a DataLoader's worker sends."""

    def __init__(self, work: Work) -> None:
        self.normalise = work.normalise

    def __call__(self, samples: Iterable[tuple[np.ndarray, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        import torch
        from torch.utils.data import default_collate

        images, labels = zip(*samples)
        if self.normalise:
            batch = torch.from_numpy(normalise(np.stack(images)))
        else:
            batch = default_collate([torch.from_numpy(image) for image in images])
        return batch, torch.tensor(labels, dtype=torch.int64)


def worker_options(work: Work) -> dict[str, Any]:
    """What a torch DataLoader is best told on one machine: workers that stay alive, and no OpenCV threads in them."""
    return {"num_workers": work.threads, "persistent_workers": True, "worker_init_fn": _quiet_worker}


def _quiet_worker(_: int) -> None:
    single_threaded()
