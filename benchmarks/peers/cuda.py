"""fastload with batches that arrive on the GPU, normalised there where the workload asks for floats.

The trade-off against the row on the CPU: the copy to the device is part of the work, so the two are not the same figure.

>>> make("cuda").load(work)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastload.benchmarks.peers.cpu import Cpu


class Cuda(Cpu):
    """``Loader(device="cuda")``: decoded on the CPU, copied as bytes on a stream of its own."""

    name = "cuda"
    title = "fastload, to the GPU"
    settings = 'fastload.Loader(device="cuda") with its defaults, one .beton file; batches stay on the GPU'
    needs_cuda = True
    converts = False
    device = "cuda"

    def epoch(self) -> Iterator[tuple[Any, Any]]:
        for images, labels in self.loader:
            yield images.permute(0, 2, 3, 1), labels
