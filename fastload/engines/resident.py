"""A dataset kept in memory for the CUDA engine: decoded on the device, decoded in the host's memory, or encoded there.

What is kept is the most useful that fits into a budget: all images as pixels; or, on the host, as the bytes of the file; or the first
ones as pixels, with one warning. Encoded bytes are not kept on the device: decoders read them from host memory. Memory is taken once,
when the engine is made, so that no epoch runs out of it. The trade-off: the engine decodes everything before the first batch.

>>> choose("device", pixels, encoded, budget).text
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from fastload.beton import Spans
from fastload.engines.cpu import Sources
from fastload.errors import UsageError
from fastload.kernels.gpu import Sources as DeviceSources
from fastload.system import ram_bytes

DEVICE, HOST = "device", "host"
PIXELS, ENCODED, NOTHING = "pixels", "encoded", "nothing"
_MANY, _MANY_BYTES = 64, 256 << 20
SHARE = 0.8  # of the free memory; the rest is for batches, and on a GPU for the model


@dataclass(frozen=True)
class Choice:
    """``what`` of the first ``count`` samples is kept, ``bytes`` in all; ``whole``: that is all of them; ``text`` says why."""

    what: str
    count: int
    bytes: int
    whole: bool
    text: str


def choose(where: str, pixels: np.ndarray, encoded: np.ndarray, budget: int) -> Choice:
    """What to keep in ``budget`` bytes ``where`` ("device", "host"): ``pixels``, ``encoded`` (N,) int64 are the bytes of each sample."""
    option, total, count = ("vram" if where == DEVICE else "ram"), int(pixels.sum()), len(pixels)
    limit = f"the budget of {_size(budget)} ({option}=)"
    if total <= budget:
        text = f"cache={where!r} keeps all {count:,} images as pixels: {_size(total)}, in {limit}"
        return Choice(PIXELS, count, total, True, text)
    in_bytes = int(encoded.sum())
    if where == HOST and in_bytes <= budget:
        text = (
            f"cache='host' keeps all {count:,} images as they are stored, {_size(in_bytes)}: "
            f"their pixels would take {_size(total)}, and {limit} is less"
        )
        return Choice(ENCODED, count, in_bytes, True, text)
    fits = int(np.searchsorted(np.cumsum(pixels), budget, side="right"))
    kept = int(pixels[:fits].sum())
    text = (
        f"cache={where!r} keeps the first {fits:,} of {count:,} images ({_size(kept)}), and the others are decoded in each epoch: "
        f"all pixels take {_size(total)}, and {limit} is less"
    )
    return Choice(PIXELS if fits else NOTHING, fits, kept, False, text)


def free_bytes(where: str, device: torch.device) -> int:
    """The usual budget: a share of the memory that is free on the device, or on the host."""
    if where == DEVICE and device.type == "cuda":
        # What torch holds and nobody uses is free, too.
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(SHARE * (torch.cuda.mem_get_info(device)[0] + held))
    available = ram_bytes() or 0
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            found = [int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable")]
        available = min([available or found[0], *found]) if found else available
    except OSError:
        available //= 2  # nothing says how much of it is in use
    return int(SHARE * available)


class Resident:
    """Samples ``bases`` (n,) int64 in one piece of memory, with the ``raw`` (n,) bool and ``shapes`` (n, 2) of what is kept there.

    ``size`` is the largest base index + 1; ``lengths`` (n,) int64 their bytes. Those that :meth:`forget` takes out are read from the
    file, as all others are.
    """

    def __init__(
        self,
        where: str,
        device: torch.device,
        size: int,
        bases: np.ndarray,
        lengths: np.ndarray,
        raw: np.ndarray,
        shapes: np.ndarray,
    ) -> None:
        self.on_device = where == DEVICE
        self.starts, self.lengths = np.full(size, -1, np.int64), np.zeros(size, np.int64)
        self.raw, self.shapes = np.ones(size, bool), np.ones((size, 2), np.int64)
        ends = np.cumsum(lengths)
        self.starts[bases], self.lengths[bases] = ends - lengths, lengths
        self.raw[bases], self.shapes[bases] = raw, shapes
        total = int(ends[-1]) if len(bases) else 0
        place = device if self.on_device else torch.device("cpu")
        try:
            # One piece: an address has 64 bits, and only single images are limited to 2 GiB.
            self.memory = torch.empty(total, dtype=torch.uint8, device=place)
        except RuntimeError as error:
            option = "vram" if self.on_device else "ram"
            raise UsageError(
                f"the cache of {_size(total)} cannot be had on {place} ({' '.join(str(error).split())[:120]}); "
                f"give it a smaller budget: {option}={total // 2}"
            ) from error

    def holds(self, bases: np.ndarray) -> np.ndarray:
        """(B,) bool: which samples are kept."""
        kept: np.ndarray = self.starts[bases] >= 0
        return kept

    def forget(self, base: int) -> None:
        """This sample is not kept after all."""
        self.starts[base] = -1

    def keep(self, base: int, data: torch.Tensor) -> None:
        """Put a sample in its place: (3, H, W) pixels or (n,) bytes. On a GPU on the current stream, without waiting."""
        start, length = int(self.starts[base]), int(self.lengths[base])
        data = data.permute(1, 2, 0) if data.ndim == 3 else data
        self.memory[start : start + length].view(data.shape).copy_(data)

    def spans(self, bases: np.ndarray, spans: Sources) -> Sources:
        """``spans`` of a batch, with what is kept on the host read from there, as if it were one more file."""
        kept = self.holds(bases)
        if self.on_device or not kept.any():
            return spans
        found = Spans(self.starts[bases], self.lengths[bases], self.raw[bases], self.shapes[bases])
        others = [(file, places[~kept[places]], where) for file, places, where in spans]
        mine = (self.memory.numpy(), np.flatnonzero(kept), found)
        return [mine, *((file, places, where) for file, places, where in others if places.size)]

    def sources(self, bases: np.ndarray) -> DeviceSources:
        """Where samples that are kept on the device lie there: pointers, shapes and strides for the kernels."""
        shapes = self.shapes[bases]
        threes = np.full(len(bases), 3, np.int64)
        strides = np.stack([3 * shapes[:, 1], threes, np.ones(len(bases), np.int64)], axis=1)
        return DeviceSources(self.starts[bases] + self.memory.data_ptr(), shapes, strides, (self.memory,))


def chunks(sizes: np.ndarray) -> list[tuple[int, int]]:
    """Stretches [start, stop) of samples of ``sizes`` (N,) bytes each, few enough to be decoded at once beside the cache."""
    found, at = [], 0
    while at < len(sizes):
        many = int(np.searchsorted(np.cumsum(sizes[at : at + _MANY]), _MANY_BYTES, side="right"))
        found.append((at, at := at + max(many, 1)))
    return found


def first_uses(bases: np.ndarray) -> np.ndarray:
    """Each base index once, in the order of its first use."""
    _, first = np.unique(bases, return_index=True)
    unique: np.ndarray = bases[np.sort(first)]
    return unique


def measure(
    spans: Callable[[np.ndarray], Sources], bases: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(pixels, encoded, raw, shapes) of samples: bytes (N,) of both kinds, 0 for damaged ones; raw (N,) bool; shapes (N, 2)."""
    count = len(bases)
    pixels, encoded = np.zeros(count, np.int64), np.zeros(count, np.int64)
    raw, shapes = np.zeros(count, bool), np.ones((count, 2), np.int64)
    for _, places, where in spans(bases):
        good = places[where.starts[places] >= 0]
        shapes[good], raw[good] = where.shapes[good], where.raw[good]
        pixels[good], encoded[good] = 3 * shapes[good].prod(axis=1), where.sizes[good]
    return pixels, encoded, raw, shapes


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"
