"""JPEGs that are kept encoded on a device, and decoded there from their restart segments (:mod:`fastload.kernels.gpu_jpeg`).

What the host must know of them, where segments begin and which tables they need, is read once, when they are indexed; their bytes are then
needed on the device only. The trade-off: some 80 bytes an image, 4 a segment and, where Huffman tables are an image's own, 3 KiB for these.

>>> jpegs = Encoded(dataset.spans, bases, size); jpegs.move(device, starts); jpegs.decode(memory, bases, windows)
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from fastload.engines.cpu import Sources
from fastload.kernels import gpu, gpu_jpeg

_TOGETHER = 64  # images that are looked at together for damage


class Encoded:
    """The JPEGs among the samples ``bases`` (n,) int64, of which ``size`` is more than the largest; ``spans`` says where they are.

    ``ok`` (size,) bool, by base index: those that can be decoded here. ``bytes``: what their tables take on the device.
    """

    def __init__(self, spans: Callable[[np.ndarray], Sources], bases: np.ndarray, size: int) -> None:
        self._indexes: list[gpu_jpeg.Index] = []  # one for each file
        self._bases: list[np.ndarray] = []
        self._which, self._row = np.full(size, -1, np.int64), np.zeros(size, np.int64)
        for file, places, where in spans(bases):
            rows = places[~where.raw[places] & (where.starts[places] >= 0)]
            index = gpu_jpeg.index_of(file, where.starts[rows], where.sizes[rows])
            ok = index.ok & (index.shapes == where.shapes[rows]).all(axis=1)
            self._which[bases[rows]] = np.where(ok, len(self._indexes), -1)
            self._row[bases[rows]] = np.arange(len(rows))
            self._indexes.append(index)
            self._bases.append(bases[rows])
        self.ok = self._which >= 0
        self.bytes = sum(int(index.huffman.nbytes + index.quant.nbytes) for index in self._indexes)

    def move(self, device: torch.device, starts: np.ndarray) -> None:
        """From now on they lie on the device, where ``starts`` (size,) int64 says; -1 for those that do not."""
        self._indexes = [
            index._replace(starts=starts[bases]).to(device)
            for index, bases in zip(self._indexes, self._bases)
        ]

    def decode(
        self, memory: torch.Tensor, bases: np.ndarray, windows: np.ndarray
    ) -> tuple[gpu.Sources, list[tuple[np.ndarray, torch.Tensor]]]:
        """Windows (B, 4) int64 of samples that lie in ``memory``, as sources of their own, and their error flags.

        These are pairs of rows (n,) int64 and flags (n,) int32 on the device. On the current stream, without waiting.
        """
        count = len(bases)
        pointers, shapes, strides = (np.zeros((count, *more), np.int64) for more in ((), (2,), (3,)))
        owners: list[torch.Tensor] = [memory] * count
        errors = []
        for number, index in enumerate(self._indexes):
            mine = np.flatnonzero(self._which[bases] == number)
            if not mine.size:
                continue
            found, flags = gpu_jpeg.decode(memory, index, self._row[bases[mine]], windows[mine])
            pointers[mine], shapes[mine], strides[mine] = found.pointers, found.shapes, found.strides
            for row in mine.tolist():
                owners[row] = found.owners[0]
            errors.append((mine, flags))
        return gpu.Sources(pointers, shapes, strides, tuple(owners)), errors

    def damaged(self, memory: torch.Tensor, bases: np.ndarray, shapes: np.ndarray) -> np.ndarray:
        """Those of ``bases`` whose data are no whole image of ``shapes`` (n, 2). Decodes them all, and waits for the device."""
        found = [np.zeros(0, np.int64)]
        for at in range(0, len(bases), _TOGETHER):
            some, size = bases[at : at + _TOGETHER], shapes[at : at + _TOGETHER]
            _, errors = self.decode(memory, some, np.concatenate([np.zeros_like(size), size], axis=1))
            found += [some[rows[flags.cpu().numpy() != 0]] for rows, flags in errors]
        return np.concatenate(found)
