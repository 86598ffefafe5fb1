"""The two peers of ``vs-ffcv``, each the body of a process of its own that is kept alive and told what to do by lines of JSON.

A peer reads one request a line from stdin and answers one line; while it waits for a line it is blocked, so it does not
disturb the other. ``CLOCK_MONOTONIC`` times only the work itself; imports, process start and warm-up are apart. The trade-off
against measuring in one process: a little plumbing, and honest memory and CPU figures for each side.

>>> python -m fastload.benchmarks.peers ffcv photos.beton 2 64 224
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

GRID = 7
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


class Peer(Protocol):
    """A loader that gives uint8 batches, and a converter, with the settings that its own documentation recommends."""

    def load(self, path: str, threads: int, batch: int, size: int) -> None: ...

    def epoch(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Batches of one epoch in random order: images (B, H, W, 3) uint8 and labels (B,), views where possible."""

    def convert(self, source: str, target: str, threads: int) -> int: ...


class Ours:
    """fastload with its cpu engine as it comes: antialiased bilinear resize, chroma upsampled without smoothing."""

    decode = "fast"

    def load(self, path: str, threads: int, batch: int, size: int) -> None:
        from fastload import Loader, transforms

        pipeline = (transforms.RandomResizedCrop(size), transforms.HorizontalFlip(0.5))
        self.loader = Loader(
            path, batch, transforms=pipeline, shuffle=True, seed=1, threads=threads, decode=self.decode
        )

    def epoch(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for images, labels in self.loader:
            yield images.permute(0, 2, 3, 1).numpy(), labels.numpy()

    def convert(self, source: str, target: str, threads: int) -> int:
        import fastload

        fastload.convert(
            source,
            target,
            max_side=500,
            quality=90,
            store="jpeg",
            reencode="always",
            workers=threads,
            overwrite=True,
            progress=False,
        )
        with fastload.open(target) as dataset:
            return len(dataset)


class OursExact(Ours):
    """The same with Pillow's pixels: smooth chroma upsampling, as FFCV decodes too."""

    decode = "exact"


class Ffcv:
    """FFCV 1.0.2 as in its documentation: RANDOM order, os_cache, decoder that crops, flip and ToTensor; INTER_AREA resize."""

    def load(self, path: str, threads: int, batch: int, size: int) -> None:
        from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
        from ffcv.loader import Loader, OrderOption
        from ffcv.reader import Reader
        from ffcv.transforms import RandomHorizontalFlip, Squeeze, ToTensor

        pipelines: dict[str, Any] = dict.fromkeys(Reader(path).handlers)  # None leaves a field out
        pipelines["image"] = [
            RandomResizedCropRGBImageDecoder((size, size)),
            RandomHorizontalFlip(),
            ToTensor(),
        ]
        pipelines["label"] = [IntDecoder(), ToTensor(), Squeeze()]
        self.loader = Loader(
            path,
            batch_size=batch,
            num_workers=threads,
            order=OrderOption.RANDOM,
            os_cache=True,
            drop_last=False,
            pipelines=pipelines,
            seed=1,
        )

    def epoch(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for images, labels in self.loader:
            yield images.numpy(), labels.numpy().reshape(-1)

    def convert(self, source: str, target: str, threads: int) -> int:
        from ffcv.fields import IntField, RGBImageField
        from ffcv.writer import DatasetWriter

        dataset = PilFolder(source)
        fields = {
            "image": RGBImageField(write_mode="jpg", max_resolution=500, jpeg_quality=90),
            "label": IntField(),
        }
        DatasetWriter(target, fields, num_workers=threads).from_indexed_dataset(dataset)
        return len(dataset)


class PilFolder:
    """A folder of class folders as FFCV's documentation has it: ``(PIL image, label)`` by index."""

    def __init__(self, root: str) -> None:
        folders = sorted(path for path in Path(root).iterdir() if path.is_dir())
        self.items = [
            (str(file), label)
            for label, folder in enumerate(folders)
            for file in sorted(folder.iterdir())
            if file.suffix.lower() in SUFFIXES
        ]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        path, label = self.items[index]
        return Image.open(path).convert("RGB"), label


PEERS: dict[str, type[Ours] | type[Ffcv]] = {"fastload": Ours, "fastload-exact": OursExact, "ffcv": Ffcv}


def cpu_seconds() -> float:
    """User and system seconds of this process and of its ended children."""
    total = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        usage = resource.getrusage(who)
        total += usage.ru_utime + usage.ru_stime
    return total


def peak_bytes() -> int:
    """Peak resident memory of this process since it started, file pages included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_epochs(peer: Ours | Ffcv, images: int) -> dict[str, float]:
    """Whole epochs until at least ``images`` were made: their number, wall seconds and CPU seconds."""
    done, cpu, clock = 0, cpu_seconds(), time.perf_counter()
    while done < images:
        for batch, _ in peer.epoch():
            done += len(batch)
    return {"images": done, "seconds": time.perf_counter() - clock, "cpu_s": cpu_seconds() - cpu}


def check_work(peer: Ours | Ffcv, images: int) -> dict[str, Any]:
    """What the batches are: shape, dtype, labels of the first epoch, and the mean picture on a coarse grid.

    The grid is (7, 7, 3): its cells average so many pixels of random crops that two right loaders agree within a few levels.
    """
    total, spread, done = np.zeros((GRID, GRID, 3)), 0.0, 0
    shapes: set[tuple[int, ...]] = set()
    dtypes: set[str] = set()
    labels: list[int] = []
    while done < images:
        first = done == 0
        for batch, label in peer.epoch():
            shapes.add(tuple(batch.shape[1:]))
            dtypes.add(str(batch.dtype))
            if first:
                labels += [int(value) for value in label]
            side = batch.shape[1] // GRID
            cut = batch[:, : side * GRID, : side * GRID].astype(np.float32)
            cells = cut.reshape(len(batch), GRID, side, GRID, side, 3).mean((2, 4))
            total += cells.sum(0)
            spread += float(cut.std((1, 2)).mean(-1).sum())
            done += len(batch)
    return {
        "shapes": sorted(map(list, shapes)),
        "dtypes": sorted(dtypes),
        "labels": sorted(labels),
        "mean_picture": (total / done).round(3).tolist(),
        "contrast": spread / done,
        "images": done,
    }


def first_batch(peer: Ours | Ffcv, arguments: list[Any]) -> dict[str, float]:
    """Seconds from making the loader to its first batch, in a process that has just imported the library."""
    clock = time.perf_counter()
    peer.load(*arguments)
    batch, _ = next(iter(peer.epoch()))
    return {"seconds": time.perf_counter() - clock, "images": len(batch)}


def _die_with_parent() -> None:
    """A stopped process does not see that its pipe was closed, so the kernel must end it if the parent is killed."""
    with contextlib.suppress(OSError, AttributeError):  # not Linux: a killed parent leaves it stopped
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def serve(name: str) -> None:
    """Answer requests until stdin ends. What a library prints goes to stderr, so that stdout holds answers only."""
    _die_with_parent()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    peer = PEERS[name]()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = _answer(peer, name, request)
        except Exception as error:  # the peer's failure is an answer, and the other peer's figures stay
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")


def _answer(peer: Ours | Ffcv, name: str, request: dict[str, Any]) -> dict[str, Any]:
    do = request["do"]
    if do == "import":
        clock = time.perf_counter()
        if name == "ffcv":
            import ffcv.loader
            import ffcv.transforms  # noqa: F401
        else:
            import fastload.loader
            import fastload.transforms  # noqa: F401
        return {"seconds": time.perf_counter() - clock}
    if do == "load":
        peer.load(*request["arguments"])
        return {}
    if do == "run":
        return {**run_epochs(peer, request["images"]), "peak_bytes": peak_bytes()}
    if do == "check":
        return check_work(peer, request["images"])
    if do == "first_batch":
        return first_batch(peer, request["arguments"])
    if do == "idle":
        return {"cpu_s": cpu_seconds()}
    cpu, clock = cpu_seconds(), time.perf_counter()
    images = peer.convert(request["source"], request["target"], request["threads"])
    seconds = time.perf_counter() - clock
    for (
        child
    ) in multiprocessing.active_children():  # FFCV leaves its workers unjoined, and their CPU time uncounted
        child.join()
    return {
        "images": images,
        "seconds": seconds,
        "cpu_s": cpu_seconds() - cpu,
        "bytes": os.path.getsize(request["target"]),
    }


if __name__ == "__main__":
    serve(sys.argv[1])
