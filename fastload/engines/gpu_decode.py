"""Who decodes JPEG on the device for the CUDA engine: torchvision's ``decode_jpeg``, torchcodec's where torchvision has none any more, or
our own kernels, which decode restart segments in parallel on the GPU's cores (:mod:`fastload.kernels.gpu_jpeg`).

Both libraries give nvJPEG on a GPU, and its hardware engine where the GPU has one, and libjpeg-turbo on the CPU. That engine ignores CUDA
streams: it may write to memory that kernels of the current stream still read (vision#9606, torchcodec#1634). So call a decoder
with a stream current on which nothing waits, and whose memory no other stream was given: ``Decoder.images`` says how.

>>> images = find_decoder(torch.device("cuda"), ["torchvision"]).images([torch.frombuffer(jpeg, dtype=torch.uint8)])
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastload import codecs
from fastload.errors import UsageError

# Some or all of the images may be None: it cannot decode them.
DecodeList = Callable[[list[torch.Tensor]], Sequence[torch.Tensor | None]]


@dataclass
class Decoder:
    """A batched JPEG decoder of one device. ``turns``: it applies EXIF orientation, which we do not."""

    name: str
    device: torch.device
    decode: DecodeList
    turns: bool
    stream: Any = None  # torch.cuda.Stream, made at the first use

    def images(self, encoded: list[torch.Tensor]) -> Sequence[torch.Tensor | None]:
        """JPEGs (n,) uint8 in host memory to (3, H, W) uint8 on the device, usable on the current stream; RuntimeError or None for a bad one.

        On a GPU they are decoded on a stream of our own, with memory that only this stream is given, and that stream is drained
        before. The current stream waits for it, and the host does, too.
        """
        if not encoded:
            return []
        if self.device.type != "cuda":
            return self.decode(encoded)
        if self.stream is None:
            self.stream = torch.cuda.Stream(self.device)
        current = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self.stream):
            # Memory that another stream had borrowed (record_stream) comes back only when that stream has done with it.
            self.stream.synchronize()
            decoded = self.decode(encoded)
            event = torch.cuda.Event()
            event.record(self.stream)
        current.wait_event(event)
        for image in decoded:
            if image is not None:
                image.record_stream(current)
        return decoded


def find_decoder(device: torch.device, names: Sequence[str]) -> Decoder:
    """The first of :data:`DECODERS` that decodes a small JPEG on this device. UsageError, with what each of them said, if none does."""
    said = []
    for name in names:
        try:
            decoder = Decoder(name, device, DECODERS[name](device), turns=name == "torchcodec")
            (image,) = decoder.images([_sample()])
            shape = None if image is None else tuple(image.shape)
            if shape != (3, 16, 24):
                raise RuntimeError(f"it makes {shape} of an image of (3, 16, 24)")
            return decoder
        except (
            Exception
        ) as error:  # a missing library fails in many ways: at import, at its native part, at the call
            said.append(f"{name}: {' '.join(str(error).split())[:160]}")
    raise UsageError(
        f"no library decodes JPEG on {device} ({'; '.join(said)}); install one with: pip install torchcodec, or use decode='cpu'"
    )


def _torchvision(device: torch.device) -> DecodeList:
    from torchvision.io import ImageReadMode, decode_jpeg

    return lambda encoded: decode_jpeg(encoded, mode=ImageReadMode.RGB, device=device)


def _torchcodec(device: torch.device) -> DecodeList:
    decoders = importlib.import_module("torchcodec.decoders")  # 0.16 or later

    return lambda encoded: decoders.decode_jpeg(encoded, mode="RGB", device=device)


def _segments(device: torch.device) -> DecodeList:
    from fastload.kernels import gpu_jpeg

    def decode(encoded: list[torch.Tensor]) -> list[torch.Tensor | None]:
        sizes = np.array([len(one) for one in encoded], np.int64)
        data = torch.cat(encoded)
        index = gpu_jpeg.index_of(data.numpy(), np.cumsum(sizes) - sizes, sizes)
        good = np.flatnonzero(index.ok)
        if device.type == "cuda":
            data = data.pin_memory()
        windows = np.concatenate([np.zeros((len(good), 2), np.int64), index.shapes[good]], axis=1)
        sources, errors = gpu_jpeg.decode(data.to(device, non_blocking=True), index.to(device), good, windows)
        images: list[torch.Tensor | None] = [None] * len(encoded)
        for number, (row, wrong) in enumerate(zip(good.tolist(), errors.tolist())):
            images[row] = None if wrong else sources.image(number)
        return images

    return decode


DECODERS: dict[str, Callable[[torch.device], DecodeList]] = {
    "torchvision": _torchvision,
    "torchcodec": _torchcodec,
    "segments": _segments,  # our own
}


def _sample() -> torch.Tensor:
    return torch.from_numpy(codecs.as_bytes(codecs.encode_jpeg(np.zeros((16, 24, 3), np.uint8))).copy())
