"""What this machine is: the facts that every figure needs beside it.

Nothing heavy is imported, and every function answers with ``None`` or a short text instead of raising: a report about a broken
machine must not be broken by it. The trade-off is Linux first; elsewhere some facts are unknown and said to be so.

>>> machine.usable_cores()
2
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import importlib.metadata
import mmap
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from fastload.system import affinity_cores, quota_cores, ram_bytes, usable_cores

__all__ = [
    "affinity_cores",
    "available_bytes",
    "cached_share",
    "commit",
    "cpu_name",
    "environment",
    "gpu_names",
    "quota_cores",
    "ram_bytes",
    "usable_cores",
    "version",
    "warm_cache",
]

PACKAGES = ("torch", "torchvision", "timm", "numpy", "numba", "llvmlite", "simplejpeg", "pillow")


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def cpu_name() -> str:
    """Model name of the CPU, as the kernel gives it."""
    for line in _read("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model"):
            return value.strip()
    return platform.processor() or platform.machine() or "unknown"


def gpu_names() -> list[str]:
    """Names of the NVIDIA GPUs: those that torch may use if it is imported already, else all that the driver lists."""
    torch = sys.modules.get("torch")
    try:
        if torch is not None and torch.cuda.is_available():
            return [str(torch.cuda.get_device_name(i)) for i in range(torch.cuda.device_count())]
    except (
        AttributeError,
        AssertionError,
        RuntimeError,
    ):  # half imported, or a driver that fails when it is asked
        return []
    found = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        fields = dict(line.split(":", 1) for line in _read(str(path)).splitlines() if ":" in line)
        found.append(fields.get("Model", "unknown NVIDIA GPU").strip())
    return found


def available_bytes() -> int | None:
    """Memory that new processes could take now without swapping, or what the control group leaves where that is less."""
    fields = dict(line.split(":", 1) for line in _read("/proc/meminfo").splitlines() if ":" in line)
    words = fields.get("MemAvailable", "").split()
    if not words:
        return None
    free = int(words[0]) * 1024
    limit, used = (_read(f"/sys/fs/cgroup/memory.{name}").strip() for name in ("max", "current"))
    if limit.isdigit() and used.isdigit():
        stat = dict(
            line.split(None, 1) for line in _read("/sys/fs/cgroup/memory.stat").splitlines() if " " in line
        )
        cache = int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))  # given back when needed
        free = min(free, int(limit) - int(used) + cache)
    return free


def version(package: str) -> str | None:
    """Installed version of a distribution, read without importing it."""
    try:
        return importlib.metadata.version(package)
    except (importlib.metadata.PackageNotFoundError, OSError, ValueError):
        return None


def commit(folder: str | Path | None = None) -> str | None:
    """Short commit of the git checkout that holds this source, with ``+changes`` where files differ from it."""
    where = str(folder or Path(__file__).resolve().parent)
    try:
        head = subprocess.run(
            ["git", "-C", where, "rev-parse", "--short=12", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
        )
        if head.returncode != 0:
            return None
        changed = subprocess.run(
            ["git", "-C", where, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+changes" if changed.stdout.strip() else "")


def warm_cache(path: str | Path) -> None:
    """Read a file once from end to end, so that the page cache holds it where memory allows."""
    with open(path, "rb", buffering=0) as file:
        buffer = bytearray(1 << 22)
        while file.readinto(buffer):
            pass


def cached_share(path: str | Path) -> float | None:
    """Share of a file (0 to 1) that is in the page cache, from ``mincore``; None where the system cannot say."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                return None
            pages = -(-size // mmap.PAGESIZE)
            libc = ctypes.CDLL(None, use_errno=True)
            libc.mmap.restype = ctypes.c_void_p
            libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
            address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
            if address in (None, ctypes.c_void_p(-1).value):
                return None
            resident = (ctypes.c_ubyte * pages)()
            failed = libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), resident)
            libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))
            return None if failed else sum(flag & 1 for flag in resident) / pages
    except (OSError, AttributeError, ValueError):
        return None


def environment(path: str | Path | None = None) -> dict[str, Any]:
    """Record that stands beside every figure: when, which commit, which machine, which versions.

    ``path`` adds the size of that file and the share of it in the page cache at this moment.
    """
    record: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "ram_gib": round((ram_bytes() or 0) / 2**30, 1) or None,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "hardware": "cloud or shared machine" if _virtual() else "own machine",
        "python": platform.python_version(),
        "versions": {name: found for name in ("fastload", *PACKAGES) if (found := version(name))},
    }
    gpus = gpu_names()
    if gpus:
        record["gpu"] = ", ".join(gpus)
    with contextlib.suppress(OSError):
        record["load_average"] = round(os.getloadavg()[0], 2)
    if path is not None:
        share = cached_share(path)
        record["file_bytes"] = os.path.getsize(path)
        record["page_cache"] = "unknown" if share is None else f"{share:.0%} of the file"
    return record


def _virtual() -> bool:
    return any(
        " hypervisor" in line for line in _read("/proc/cpuinfo").splitlines() if line.startswith("flags")
    )
