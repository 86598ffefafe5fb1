"""What peers are compared on: ten workloads, each a few words, the pictures it reads and the crop it makes.

Names are those of the command line. The trade-off of fixed workloads: they are the common cases of image classification (crops of
224 pixels in batches of 64 as uint8, CIFAR-sized images in batches of 512), not yours.

>>> make_work(WORKLOADS["eval"], photos.get("500"), Path(scratch), threads=2, batch=64).crop
'eval'
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastload.benchmarks.peers.base import Work
from fastload.benchmarks.photos import ImageSet


@dataclass(frozen=True)
class Workload:
    """``kind``: how it is measured ("rate", "start", "convert", "threads", "memory"); ``pictures``: the set it reads;
    ``batch`` None: the batch that the user asked for; ``better``: whether a higher or a lower figure wins; ``share``: of the images
    a round that the user asked for.
    """

    name: str
    what: str
    kind: str = "rate"
    pictures: str = "500"
    crop: str = "train"
    store: str = "jpeg"
    size: int = 224
    batch: int | None = None
    normalise: bool = False
    unit: str = "images/s"
    better: str = "higher"
    share: float = 1.0


_ALL = (
    Workload("train500", "random crop to 224 and flip to uint8, from JPEG of at most 500 px, quality 90"),
    Workload(
        "original",
        "random crop to 224 and flip to uint8, from the original JPEG files at their own size",
        pictures="original",
    ),
    Workload(
        "large",
        "random crop to 224 and flip to uint8, from JPEG of 2,000 px, quality 90, each a mosaic of 16 photographs",
        pictures="large",
        share=0.25,
    ),
    Workload(
        "eval",
        "shorter side 256, centre 224 to uint8, from JPEG of at most 500 px, quality 90",
        crop="eval",
    ),
    Workload(
        "raw",
        "random crop to 224 and flip to uint8, from decoded pixels of at most 500 px",
        pictures="raw",
        store="raw",
    ),
    Workload(
        "small",
        "32 px from decoded pixels: pad 4, random crop, flip, normalise to float32, batches of 512",
        pictures="small",
        crop="pad",
        store="raw",
        size=32,
        batch=512,
        normalise=True,
        share=100.0,  # a thousand of them are gone in some milliseconds
    ),
    Workload(
        "start",
        "from the start of the process to the first batch of train500, a fresh process each round, caches warm",
        kind="start",
        unit="s",
        better="lower",
    ),
    Workload(
        "convert",
        "class folders of photographs into the library's own file: longer side at most 500, JPEG quality 90",
        kind="convert",
        pictures="convert",
    ),
    Workload(
        "threads", "train500 with 1, 2, 4, ... threads or workers up to all usable cores", kind="threads"
    ),
    Workload(
        "memory",
        "resident memory after each epoch of a subset of train500, worker processes included",
        kind="memory",
        pictures="subset",
        unit="MiB",
        better="lower",
    ),
)
WORKLOADS = {workload.name: workload for workload in _ALL}


def make_work(
    workload: Workload, pictures: ImageSet, scratch: Path, *, threads: int, batch: int, seed: int = 1
) -> Work:
    """The workload as it is sent to a peer; ``scratch`` is the peer's own folder for this set, made here."""
    scratch.mkdir(parents=True, exist_ok=True)
    return Work(
        name=workload.name,
        crop=workload.crop,
        store=workload.store,
        folder=pictures.folder,
        beton=pictures.beton,
        pixels=pictures.pixels,
        scratch=str(scratch),
        size=workload.size,
        batch=workload.batch or batch,
        threads=threads,
        normalise=workload.normalise,
        seed=seed,
    )


def thread_counts(cores: int) -> list[int]:
    """1, 2, 4, ... and the number of cores itself."""
    powers = [1 << k for k in range(cores.bit_length()) if 1 << k < cores]
    return [*powers, cores]
