"""How kernels are compiled: without the GIL, with IEEE arithmetic, cached on disk where a folder can be written.

Strict IEEE arithmetic (no fused or reordered operations) costs little here, since the loops vectorise over independent
pixels, and it makes pixels equal on every CPU. The cache is beside the source, or where ``NUMBA_CACHE_DIR`` says, or in
the user's cache folder. If none of them can be written, or the disk fills up, kernels work all the same and are compiled
again by each process (about half a minute), and a warning says so once.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import pickle
import sys
import threading
import time
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
_LONGEST = 300  # seconds after which a line about a compilation ends by itself: it must have failed
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
    return _compiled(function, None)


def slow_kernel(what: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The same for a kernel that takes long to compile: on a terminal or in a notebook a line says that ``what`` is being compiled."""
    return lambda function: _compiled(function, what)


def _compiled(function: Callable[..., Any], what: str | None) -> Callable[..., Any]:
    cached = cache_folder().writable
    compiled: Callable[..., Any] = numba.njit(nogil=True, cache=cached, error_model="numpy")(function)
    cache = getattr(compiled, "_cache", None)
    if cached and hasattr(cache, "load_overload") and hasattr(cache, "save_overload"):
        _forgive(cache, Waiting(what) if what else None)
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


class Waiting:
    """A line on stderr that counts the seconds of a compilation, where somebody looks: on a terminal or in a notebook."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._done = threading.Event()

    def start(self) -> None:
        """Begin to count; on a pipe or in a file nothing is written."""
        self._done = threading.Event()
        if sys.stderr is not None and (sys.stderr.isatty() or "ipykernel" in sys.modules):
            threading.Thread(target=self._run, args=(self._done,), daemon=True).start()

    def stop(self) -> None:
        """The kernel is there, or will not be."""
        self._done.set()

    def _run(self, done: threading.Event) -> None:
        began = time.monotonic()
        while True:
            seconds = time.monotonic() - began
            sys.stderr.write(f"\rfastload: compiling {self.what} for this machine, once: {seconds:.0f} s ")
            sys.stderr.flush()
            if done.wait(1.0) or seconds > _LONGEST:
                break
        sys.stderr.write("\n")


def _forgive(cache: Any, waiting: Waiting | None) -> None:
    """Make a cache that breaks later cost time only: numba would let its error out of the kernel's call."""
    load, save = cache.load_overload, cache.save_overload

    def load_or_compile(*arguments: Any) -> Any:
        found = None
        with contextlib.suppress(*_UNUSABLE):
            found = load(*arguments)
        if found is None and waiting is not None:
            waiting.start()
        return found

    def save_or_warn(*arguments: Any) -> None:
        global _warned
        if waiting is not None:
            waiting.stop()
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
