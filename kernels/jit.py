"""How kernels are compiled: without the GIL, with IEEE arithmetic, cached on disk where a folder can be written.

Strict IEEE arithmetic (no fused or reordered operations) costs little here, since the loops vectorise over independent
pixels, and it makes pixels equal on every CPU. The cache is beside the source, or where ``NUMBA_CACHE_DIR`` says, or in
the user's cache folder. If none of them can be written, or the disk fills up, kernels work all the same and are compiled
again by each process (about half a minute), and a warning says so once.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numba


class CacheFolder(NamedTuple):
    """Where compiled kernels are kept; ``why`` explains when ``writable`` is False."""

    path: str
    writable: bool
    why: str


def _probe() -> int:
    return 0


def _find() -> CacheFolder:
    try:
        dispatcher = numba.njit(cache=True)(_probe)
        path = str(dispatcher.stats.cache_path)
    except RuntimeError as error:  # numba found no folder that it may write
        return CacheFolder("", False, f"{error}; set NUMBA_CACHE_DIR to a folder that is yours")
    try:
        os.makedirs(path, exist_ok=True)
        name = os.path.join(path, f".probe-{os.getpid()}")
        with open(name, "wb"):
            pass
        os.unlink(name)
    except OSError as error:
        return CacheFolder(path, False, f"{error}; set NUMBA_CACHE_DIR to a folder that is yours")
    return CacheFolder(path, True, "")


_FOLDER: CacheFolder | None = None
_UNUSABLE = (OSError, EOFError, pickle.UnpicklingError)  # a full disk, or files that a crash has cut short
_warned = False


def cache_folder() -> CacheFolder:
    """Where compiled kernels are cached, and whether they can be."""
    global _FOLDER
    if _FOLDER is None:
        _FOLDER = _find()
        if not _FOLDER.writable:
            warnings.warn(
                f"compiled kernels cannot be cached, so each process compiles them again: {_FOLDER.why}",
                RuntimeWarning,
                stacklevel=3,
            )
    return _FOLDER


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile ``function`` when it is first called; it runs without the GIL."""
    cached = cache_folder().writable
    compiled: Callable[..., Any] = numba.njit(nogil=True, cache=cached, error_model="numpy")(function)
    cache = getattr(compiled, "_cache", None)
    if cached and hasattr(cache, "load_overload") and hasattr(cache, "save_overload"):
        _forgive(cache)
    index = getattr(cache, "_cache_file", None)
    if hasattr(index, "_source_stamp"):
        index._source_stamp = (index._source_stamp, _sources())  # type: ignore[union-attr]
    return compiled


@functools.cache
def _sources() -> str:
    """A digest of all kernels: numba looks at a kernel's own file only, and would go on using one whose parts have changed."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _forgive(cache: Any) -> None:
    """Make a cache that breaks later cost time only: numba would let its error out of the kernel's call."""
    load, save = cache.load_overload, cache.save_overload

    def load_or_compile(*arguments: Any) -> Any:
        try:
            return load(*arguments)
        except _UNUSABLE:
            return None

    def save_or_warn(*arguments: Any) -> None:
        global _warned
        try:
            save(*arguments)
        except _UNUSABLE as error:
            if not _warned:
                _warned = True
                warnings.warn(
                    f"compiled kernels cannot be cached in {cache.cache_path}, so each process compiles them again: "
                    f"{type(error).__name__}: {error}; make room there, empty that folder, or set NUMBA_CACHE_DIR to another",
                    RuntimeWarning,
                    stacklevel=2,
                )

    cache.load_overload, cache.save_overload = load_or_compile, save_or_warn
