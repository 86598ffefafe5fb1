"""What this process may use of the machine.

>>> usable_cores()
2
"""

from __future__ import annotations

import math
import os


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


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
