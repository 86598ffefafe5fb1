"""fastload: images to the GPU faster than the model can eat them.

Four things, each useful alone: :func:`convert` images into one ``.beton`` file, load batches from it with
:class:`Loader`, ask :func:`bench` which side is the bottleneck, and train with :mod:`fastload.train`.

Importing this package imports nothing heavy: each public name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_LAZY = {
    "Batch": "fastload.loader",
    "Dataset": "fastload.dataset",
    "FastloadError": "fastload.errors",
    "Loader": "fastload.loader",
    "bench": "fastload.benchmarks.bench",
    "concat": "fastload.dataset",
    "convert": "fastload.converter",
    "open": "fastload.dataset",
    "verify": "fastload.dataset",
}
_MODULES = ("train", "transforms")

__all__ = [*_LAZY, *_MODULES, "__version__"]  # pyright: ignore

if TYPE_CHECKING:
    from fastload import train as train
    from fastload import transforms as transforms
    from fastload.benchmarks.bench import bench as bench
    from fastload.converter import convert as convert
    from fastload.dataset import Dataset as Dataset
    from fastload.dataset import concat as concat
    from fastload.dataset import open as open
    from fastload.dataset import verify as verify
    from fastload.errors import FastloadError as FastloadError
    from fastload.loader import Batch as Batch
    from fastload.loader import Loader as Loader


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"fastload.{name}")
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'fastload' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
