"""The body of a peer's process: one JSON request a line on stdin, one JSON answer a line on stdout, until stdin ends.

While it waits for a line it is blocked (and stopped by :mod:`fastload.benchmarks.process`), so it does not disturb the others.
The monotonic clock times only the work itself; import, making the loader and warm-up are requests of their own. What a library
prints goes to stderr. The trade-off of asking by lines: batches never leave the process, so all that is known of them is what
``check`` tells.

>>> python -m fastload.benchmarks.peers.serve ffcv
{"do": "import"}
{"seconds": 2.9, "versions": {"ffcv": "1.0.2"}, "python": "3.11.7"}

A peer may yield CUDA tensors: they are copied to the host for ``check`` only, and an epoch ends when the device has finished.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import multiprocessing
import os
import platform
import resource
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from fastload.benchmarks import proctree
from fastload.benchmarks.peers import make
from fastload.benchmarks.peers.base import MEAN, STD, Conversion, Peer, Work
from fastload.benchmarks.picture import grid_of, statistics

_MESSAGE = 600  # letters of an error: some libraries put a whole compiler's output there


def cpu_seconds() -> float:
    """User and system seconds of this process and its children, those that live included.

    What ended is known to the microsecond, what lives in steps of 10 ms a process.
    """
    total = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        usage = resource.getrusage(who)
        total += usage.ru_utime + usage.ru_stime
    living = (proctree.stat(pid) for pid in proctree.tree(os.getpid())[1:])
    return total + sum(entry.cpu_s for entry in living if entry is not None)


def _finish() -> None:
    """Wait for the GPU, where one is in use: an epoch whose last kernels still run is not over."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def run_epochs(peer: Peer, images: int) -> dict[str, Any]:
    """Whole epochs until at least ``images`` were made: their number, wall seconds, CPU seconds."""
    done, cpu, clock = 0, cpu_seconds(), time.perf_counter()
    while done < images:
        before = done
        for batch, _ in peer.epoch():
            done += len(batch)
        if done == before:
            raise RuntimeError("an epoch gave no batch")
    _finish()
    seconds = time.perf_counter() - clock
    return {"images": done, "seconds": seconds, "cpu_s": cpu_seconds() - cpu}


def count_epochs(peer: Peer, count: int, images: int | None) -> dict[str, Any]:
    """``count`` epochs, each left after at least ``images`` (None: whole), and the memory after each, children included."""
    done, seconds, cpu, held = 0, 0.0, cpu_seconds(), []
    for _ in range(count):
        clock, start = time.perf_counter(), done
        epoch = peer.epoch()
        for batch, _ in epoch:
            done += len(batch)
            if images is not None and done - start >= images:
                break
        del epoch
        _finish()
        seconds += time.perf_counter() - clock
        held.append(round(proctree.memory(os.getpid()).unique / 2**20, 1))
    return {"images": done, "seconds": seconds, "cpu_s": cpu_seconds() - cpu, "mib_by_epoch": held}


def _levels(batch: Any) -> np.ndarray:
    """A batch as (B, H, W, 3) float32 levels of 0 to 255, on the host."""
    array = batch if isinstance(batch, np.ndarray) else batch.cpu().numpy()
    if array.dtype == np.uint8:
        return array.astype(np.float32)
    return array.astype(np.float32) * np.array(STD, np.float32) + np.array(MEAN, np.float32)


def check_work(peer: Peer, images: int) -> dict[str, Any]:
    """What the batches are: shapes, dtypes, sorted labels of the first epoch, and the mean picture on a coarse grid.

    Normalised floats are mapped back to levels first. The grid is (7, 7, 3) for 224 pixels and (8, 8, 3) for 32: its cells average
    so many pixels of random crops that two right loaders agree within a few levels. ``contrast`` is the mean over images and
    channels of the pixels' standard deviation, in levels.
    """
    total: Any = 0.0
    spread, done = 0.0, 0
    shapes: set[tuple[int, ...]] = set()
    dtypes: set[str] = set()
    labels: list[int] = []
    while done < images:
        first, before = done == 0, done
        for batch, label in peer.epoch():
            shapes.add(tuple(batch.shape[1:]))
            dtypes.add(str(batch.dtype).removeprefix("torch."))
            if first:
                labels += [int(value) for value in label]
            done += len(batch)
            if batch.ndim != 4 or batch.shape[-1] != 3:
                continue  # told by its shape
            if min(batch.shape[1:3]) < grid_of(batch.shape[1]):
                continue
            for image in _levels(batch):
                cells, contrast = statistics(image)
                total, spread = total + cells, spread + contrast
        if done == before:
            raise RuntimeError("an epoch gave no batch")
    return {
        "shapes": sorted(map(list, shapes)),
        "dtypes": sorted(dtypes),
        "labels": sorted(labels),
        "mean_picture": np.round(total / done, 3).tolist(),
        "contrast": spread / done,
        "images": done,
    }


def first_batch(peer: Peer, work: Work) -> dict[str, Any]:
    """Seconds from making the loader to its first batch, in a process that has imported the library and nothing else."""
    clock = time.perf_counter()
    peer.load(work)
    batch, _ = next(iter(peer.epoch()))
    _finish()
    return {"seconds": time.perf_counter() - clock, "images": len(batch)}


def dump(peer: Peer, path: str) -> dict[str, Any]:
    """Write one epoch into an ``.npz``: ``images`` (n, H, W, 3) as they were yielded, ``labels`` (n,): to look at, and for tests."""
    images, labels = [], []
    for batch, label in peer.epoch():
        images.append(np.array(batch if isinstance(batch, np.ndarray) else batch.cpu().numpy()))
        labels.append([int(value) for value in label])
    np.savez(path, images=np.concatenate(images), labels=np.concatenate(labels))
    return {"images": sum(map(len, images))}


def convert(peer: Peer, job: Conversion) -> dict[str, Any]:
    """Seconds, CPU seconds, images and bytes of one conversion, its worker processes waited for."""
    earlier = {child.pid for child in multiprocessing.active_children()}
    cpu, clock = cpu_seconds(), time.perf_counter()
    images = peer.convert(job)
    seconds = time.perf_counter() - clock
    for child in multiprocessing.active_children():  # some leave workers behind, their CPU time uncounted
        if child.pid not in earlier:
            child.join(timeout=10)
    return {
        "images": images,
        "seconds": seconds,
        "cpu_s": cpu_seconds() - cpu,
        "bytes": _size(Path(job.target)),
    }


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size


def _import(peer: Peer) -> dict[str, Any]:
    clock = time.perf_counter()
    peer.imports()
    seconds = time.perf_counter() - clock
    return {"seconds": seconds, "versions": peer.versions(), "python": platform.python_version()}


def answer(peer: Peer, request: dict[str, Any]) -> dict[str, Any]:
    """The answer to one request; raises whatever the library raises."""
    do = request["do"]
    if do == "import":
        return _import(peer)
    if do in ("prepare", "load"):
        clock = time.perf_counter()
        getattr(peer, do)(Work(**request["work"]))
        return {"seconds": time.perf_counter() - clock}
    if do == "run":
        return run_epochs(peer, request["images"])
    if do == "check":
        return check_work(peer, request["images"])
    if do == "epochs":
        return count_epochs(peer, request["count"], request.get("images"))
    if do == "first_batch":
        return first_batch(peer, Work(**request["work"]))
    if do == "convert":
        return convert(peer, Conversion(**request["job"]))
    if do == "train":
        from fastload.benchmarks.accuracy_arm import Training, train

        return train(peer, Training(**request["job"]))
    if do == "dump":
        return dump(peer, request["path"])
    if do == "idle":
        return {"cpu_s": cpu_seconds()}
    raise ValueError(f"a peer knows no request {do!r}")


def _die_with_parent() -> None:
    """A stopped process does not see that its pipe was closed, so the kernel must end it if its parent is killed."""
    with contextlib.suppress(OSError, AttributeError):  # not Linux: a killed parent leaves it stopped
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


_fork = threading.local()


def _note_thread() -> None:
    _fork.by_main = threading.current_thread() is threading.main_thread()


def _child_dies_too() -> None:
    # The kernel acts when the *thread* that forked ends, so only what the main thread forked may be bound to it.
    if getattr(_fork, "by_main", False):
        _die_with_parent()


def serve(name: str) -> None:
    """Answer requests until stdin ends. An exception is an answer, so the other peers' figures stay."""
    _die_with_parent()
    os.register_at_fork(before=_note_thread, after_in_child=_child_dies_too)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    peer: Peer | None = None
    for line in sys.stdin:
        try:
            peer = peer or make(name)
            found = answer(peer, json.loads(line))
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            text = " ".join(str(error).split())
            found = {"error": f"{type(error).__name__}: {text[:_MESSAGE]}"}
        answers.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    serve(sys.argv[1])
