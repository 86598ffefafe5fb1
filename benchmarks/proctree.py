"""What a process and all its descendants cost: CPU seconds and memory, from ``/proc``.

A loader with worker processes is charged for all of them. The trade-off: Linux only, and a CPU time in steps of 10 ms for live
children (the kernel's clock tick); a child that ended and that nobody waited for is lost.

>>> proctree.cpu_seconds(os.getpid()), proctree.memory(os.getpid()).unique
(1.42, 51380224)
"""

from __future__ import annotations

import os
from typing import NamedTuple

_TICK = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
_SHARED_MEMORY = "/dev/shm"


class Stat(NamedTuple):
    """Of one process: ``cpu_s`` of its own and of the children it has waited for, user and system."""

    parent: int
    group: int
    state: str
    cpu_s: float


class Memory(NamedTuple):
    """Bytes of a process tree, each page counted once.

    ``unique``: memory that only this tree has: anonymous pages and shared memory, by proportional set size, so that what a forked
    worker shares with its parent counts once. ``mapped``: pages of mapped files, libraries among them, in proportion to all
    processes that map them. They are page cache, which the system may drop, and which a loader that calls ``read`` uses just
    as well without being charged: so they are kept apart.
    """

    unique: int
    mapped: int


def stat(pid: int) -> Stat | None:
    """One process as the kernel lists it; None if there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except OSError:
        return None
    fields = text[text.rindex(b")") + 2 :].split()  # the name before it may hold anything
    return Stat(
        int(fields[1]), int(fields[2]), fields[0].decode(), sum(int(value) for value in fields[11:15]) / _TICK
    )


def _everyone() -> dict[int, Stat]:
    try:
        names = os.listdir("/proc")
    except OSError:
        return {}
    found = {int(name): stat(int(name)) for name in names if name.isdigit()}
    return {pid: entry for pid, entry in found.items() if entry is not None}


def tree(pid: int) -> list[int]:
    """``pid`` and all its descendants, those that have ended and are not yet waited for included; parents first."""
    children: dict[int, list[int]] = {}
    everyone = _everyone()
    for other, entry in everyone.items():
        children.setdefault(entry.parent, []).append(other)
    found = [pid] if pid in everyone else []
    for member in found:  # grows while it is walked
        found += children.get(member, [])
    return found


def group(leader: int) -> list[int]:
    """Processes of a process group that still run, wherever their parents are."""
    return [pid for pid, entry in _everyone().items() if entry.group == leader and entry.state not in "ZX"]


def cpu_seconds(pid: int) -> float:
    """User and system seconds of a process, of its live descendants, and of all that they have waited for."""
    return sum(entry.cpu_s for member in tree(pid) if (entry := stat(member)) is not None)


def memory(pid: int) -> Memory:
    """Memory of a process and its descendants now. Costs some milliseconds a process, which stands still meanwhile."""
    unique = mapped = 0
    for member in tree(pid):
        found = _rollup(member)
        unique, mapped = unique + found.unique, mapped + found.mapped
    return Memory(unique, mapped)


def _rollup(pid: int) -> Memory:
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
            lines = [line.split() for line in file]
    except OSError:  # ended, or a kernel before 4.14
        return Memory(0, 0)
    size = {line[0]: int(line[1]) * 1024 for line in lines if len(line) == 3 and line[2] == b"kB"}
    if b"Pss_Anon:" in size:
        return Memory(size[b"Pss_Anon:"] + size[b"Pss_Shmem:"], size[b"Pss_File:"])
    return Memory(size.get(b"Pss:", 0), 0)  # a kernel before 5.4 does not tell them apart


def shared_memory_names() -> set[str]:
    """Names in the system's folder of shared memory."""
    try:
        return set(os.listdir(_SHARED_MEMORY))
    except OSError:
        return set()


def shared_memory_of(pids: list[int]) -> set[str]:
    """Names of the shared memory that these processes have mapped."""
    names = set()
    for pid in pids:
        try:
            with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as file:
                paths = [line.split(maxsplit=5)[5].rstrip("\n") for line in file if _SHARED_MEMORY in line]
        except OSError:
            continue
        names |= {os.path.basename(path) for path in paths if os.path.dirname(path) == _SHARED_MEMORY}
    return {name for name in names if os.path.exists(os.path.join(_SHARED_MEMORY, name))}


def remove_shared_memory(names: set[str]) -> None:
    """Unlink shared memory that its owners left behind."""
    for name in names:
        try:
            os.unlink(os.path.join(_SHARED_MEMORY, name))
        except OSError:  # already gone, or not ours
            continue
