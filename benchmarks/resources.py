"""What a stretch of work takes besides time: the largest memory of this process, and of the GPU.

The resident memory is looked at every 20 ms by a thread, because the kernel's own peak counts from the start of the process. A peak
shorter than that may be missed.

>>> with PeakMemory(device) as memory: work()
>>> memory.peak_mib, memory.gpu_peak_mib
"""

from __future__ import annotations

import os
import threading
from typing import Any

INTERVAL = 0.02


class PeakMemory:
    """``peak_mib``: largest resident memory of this process within the block, MiB, file pages included; None where unknown.

    ``gpu_peak_mib``: largest memory of torch's tensors on a CUDA ``device`` within the block, None without one.
    """

    def __init__(self, device: Any = None) -> None:
        self._device = device if device is not None and device.type == "cuda" else None
        self.peak_mib: float | None = None
        self.gpu_peak_mib: float | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="fastload-memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        if self._device is not None:
            import torch

            torch.cuda.reset_peak_memory_stats(self._device)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()
        if self._device is not None:
            import torch

            self.gpu_peak_mib = torch.cuda.max_memory_allocated(self._device) / 2**20

    def _watch(self) -> None:
        while not self._stop.is_set():
            self._look()
            self._stop.wait(INTERVAL)

    def _look(self) -> None:
        resident = resident_mib()
        if resident is not None:
            self.peak_mib = max(self.peak_mib or 0.0, resident)


def resident_mib() -> float | None:
    """Resident memory of this process now, MiB; None where the system has no /proc."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except (OSError, ValueError, IndexError):
        return None
