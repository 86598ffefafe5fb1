"""The protocol between ``fastload bench --compare`` and a peer: what is asked, and what a peer must be able to answer.

A peer is one file in this folder with one class. It imports its library only inside of its methods, knows nothing of the other
peers, and holds the settings that the library's own documentation recommends. The trade-off of so small a protocol: what a
library can do beyond these workloads is not shown.

>>> from fastload.benchmarks.peers import make; peer = make("ffcv"); peer.load(work); next(iter(peer.epoch()))
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fastload.errors import UsageError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# Of ImageNet, in levels of 255: what the workloads that normalise use.
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class Work:
    """One workload, as it crosses the pipe to a peer's process. All paths are absolute and were made by the parent.

    Attributes:
        name: the workload ("train500", "eval", ...), for messages.
        crop: "train": RandomResizedCrop(size, scale 0.08-1, ratio 3/4-4/3) and a flip of half of the images; "eval": resize the
            shorter side to ``resize`` and cut the centre ``size`` x ``size``; "pad": pad 4 pixels of zero on each side, cut a
            random ``size`` x ``size``, flip half.
        store: "jpeg" or "raw": what is read.
        folder: class folders of the encoded images: ``folder/<class>/<name>.jpg``; the label is the place of the class in
            the sorted names. "" where store is "raw".
        beton: the same images in one ``.beton`` (the JPEG bytes differ by their restart markers only).
        pixels: where store is "raw", a folder with ``pixels.bin`` (all images (h, w, 3) uint8, one behind the other) and
            ``index.npy`` (n, 4) int64: offset, height, width, label. Else "".
        scratch: a folder of this peer's own, for its own format.
        normalise: False: batches are uint8; True: float32, ``(level - MEAN) / STD``.
    """

    name: str
    crop: str
    store: str
    folder: str
    beton: str
    pixels: str
    scratch: str
    size: int = 224
    resize: int = 256
    batch: int = 64
    threads: int = 2
    normalise: bool = False
    seed: int = 1

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Conversion:
    """What a converter is asked: all images of ``source`` (class folders) into ``target``, longer side 500, JPEG quality 90."""

    source: str
    target: str
    threads: int = 2
    max_side: int = 500
    quality: int = 90


class Peer(ABC):
    """A loader under test. Class attributes describe it without importing its library.

    ``crops`` maps each crop of :class:`Work` that it can make to the name of its resize filter, which stands in the row's name:
    "antialiased bilinear", "area", "bilinear, not antialiased", or "none" where nothing is resized. ``stores`` are the stores
    that it reads, ``settings`` the sentence that tells how it was set up and where that is recommended.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    requires: ClassVar[tuple[str, ...]] = ()
    """pip requirements, the library under test first."""
    modules: ClassVar[tuple[str, ...]] = ()
    """Modules that must be importable; they are what an environment is searched for."""
    crops: ClassVar[dict[str, str]] = {}
    stores: ClassVar[tuple[str, ...]] = ("jpeg",)
    settings: ClassVar[str] = ""
    needs_cuda: ClassVar[bool] = False
    converts: ClassVar[bool] = False

    @abstractmethod
    def imports(self) -> None:
        """Import the library: apart, so that a start can be timed with it and without."""

    def prepare(self, work: Work) -> None:  # noqa: B027 (most peers have no format of their own)
        """Write the library's own format into ``work.scratch`` where it has one; not timed. Called again, it does nothing."""

    @abstractmethod
    def load(self, work: Work) -> None:
        """Make the loader of this workload."""

    @abstractmethod
    def epoch(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """One epoch in random order (crop "eval": any order), every sample once: images (B, size, size, 3) and labels (B,).

        Views where possible: a copy made here would be charged to the library.
        """

    def convert(self, job: Conversion) -> int:
        """Write the library's own file; returns the number of images in it."""
        raise UsageError(f"{self.title} has no file of its own to convert to")

    def versions(self) -> dict[str, str]:
        """Versions of the required distributions, read without importing them."""
        import importlib.metadata
        import re

        found = {}
        for requirement in self.requires:
            name = re.split(r"[<>=!~\[; ]", requirement)[0]
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        return found


class Files:
    """The files of class folders: ``paths``, ``labels`` (n,) int64, ``classes``, in sorted order."""

    def __init__(self, folder: str) -> None:
        self.classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
        self.paths: list[str] = []
        labels: list[int] = []
        for label, name in enumerate(self.classes):
            inside = sorted(p for p in (Path(folder) / name).iterdir() if p.suffix.lower() in SUFFIXES)
            self.paths += map(str, inside)
            labels += [label] * len(inside)
        self.labels = np.array(labels, np.int64)

    def __len__(self) -> int:
        return len(self.paths)


class Pixels:
    """Decoded images, mapped: ``image(i)`` is a view (h, w, 3) uint8; ``labels`` (n,) int64."""

    def __init__(self, folder: str) -> None:
        self.index = np.load(os.path.join(folder, "index.npy"))
        self.bytes = np.memmap(os.path.join(folder, "pixels.bin"), np.uint8, "r")
        self.labels = np.ascontiguousarray(self.index[:, 3])

    def __len__(self) -> int:
        return len(self.index)

    def image(self, i: int) -> np.ndarray:
        at, height, width, _ = self.index[i].tolist()
        return self.bytes[at : at + height * width * 3].reshape(height, width, 3)

    def stacked(self) -> np.ndarray:
        """All images as one view (n, h, w, 3); they must be of one size."""
        _, height, width, _ = self.index[0].tolist()
        return self.bytes.reshape(len(self), height, width, 3)
