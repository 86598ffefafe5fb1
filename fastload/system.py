"""What this process may use of the machine, and what it asks of it.

>>> usable_cores()
2
"""

from __future__ import annotations

import ctypes
import itertools
import math
import mmap
import os
import threading
from collections.abc import Callable

import numpy as np

_WILL_NEED = getattr(mmap, "MADV_WILLNEED", None)
_ONE_READ = 4 * mmap.PAGESIZE  # smaller pieces than that come with their neighbours


def usable_cores() -> int:
    """CPU cores this process may use: its affinity, cut by a container's CPU quota; at least 1."""
    quota = quota_cores()
    return max(1, min(affinity_cores(), math.ceil(quota))) if quota else affinity_cores()


def affinity_cores() -> int:
    """Cores that this process may be scheduled on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def quota_cores() -> float | None:
    """CPU quota of the control group in cores (1.5 = one and a half), or None where there is none."""
    for line in _read("/proc/self/cgroup").splitlines():
        relative = line.rpartition(":")[2]
        for folder in (f"/sys/fs/cgroup{relative}", "/sys/fs/cgroup"):
            limit = _read(f"{folder.rstrip('/')}/cpu.max").split()
            if len(limit) == 2 and limit[0].isdigit() and limit[1].isdigit() and int(limit[1]):
                return int(limit[0]) / int(limit[1])
    quota, period = (_read(f"/sys/fs/cgroup/cpu/cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    if quota.isdigit() and period.isdigit() and int(period):  # version 1 of control groups; -1 is no limit
        return int(quota) / int(period)
    return None


def ram_bytes() -> int | None:
    """Physical memory, or the control group's limit where that is smaller; None where the system does not say."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        limit = _read(path).strip()
        if limit.isdigit():
            total = min(total, int(limit))
    return total


def read_ahead(memory: np.ndarray, starts: np.ndarray, sizes: np.ndarray) -> None:
    """Ask the system to bring pieces of a mapped file (n,) uint8 into memory, at ``starts`` (B,), ``sizes`` (B,) bytes each.

    Returns at once, and does nothing where the system cannot be asked. Pieces outside of ``memory`` are left out.
    """
    if _WILL_NEED is None or not memory.size:
        return
    base, page = memory.ctypes.data, mmap.PAGESIZE
    wanted = (starts >= 0) & (sizes >= _ONE_READ) & (starts + sizes <= memory.size)
    first = (base + starts[wanted]) // page * page
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for at, end in zip(first.tolist(), (base + starts[wanted] + sizes[wanted]).tolist()):
        advise(at, end - at, _WILL_NEED)


def pinner() -> Callable[[], None]:
    """A function that pins the thread that calls it to one usable core, the next one at each call."""
    cores = itertools.cycle(sorted(os.sched_getaffinity(0)))

    def pin() -> None:
        os.sched_setaffinity(threading.get_native_id(), {next(cores)})

    return pin


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
