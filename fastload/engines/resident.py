"""A dataset kept in memory for the CUDA engine, on the device or on the host, as pixels or as the bytes of the file.

What is kept is the most useful that fits into a budget: all images as pixels; or all as they are stored; or the first ones, with one
warning. On a device stored JPEGs are of use where it can decode them from its own memory (:mod:`fastload.engines.encoded`). Memory is
taken once, when the engine is made, so that no epoch runs out of it. The trade-off: the engine decodes everything before the first batch.

>>> choose("device", pixels, encoded, budget).text
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from fastload.beton import Spans
from fastload.dataset import Dataset
from fastload.engines.cpu import Sources
from fastload.engines.encoded import Encoded
from fastload.errors import UsageError
from fastload.kernels.gpu import Sources as DeviceSources
from fastload.system import ram_bytes

DEVICE, HOST = "device", "host"
PIXELS, ENCODED, NOTHING = "pixels", "encoded", "nothing"
_MANY, _MANY_BYTES = 64, 256 << 20
_RIGHT, _UNSURE, _WRONG = 0, 1, 2  # the bytes of a sample
SHARE = 0.8  # of the free memory; the rest is for batches, and on a GPU for the model


@dataclass(frozen=True)
class Choice:
    """``what`` of the first ``count`` samples is kept, ``bytes`` in all; ``whole``: that is all of them; ``text`` says why."""

    what: str
    count: int
    bytes: int
    whole: bool
    text: str


def choose(
    where: str, pixels: np.ndarray, encoded: np.ndarray, budget: int, usable: np.ndarray | None = None
) -> Choice:
    """What to keep in ``budget`` bytes ``where`` ("device", "host"): ``pixels``, ``encoded`` (N,) int64 are the bytes of each sample.

    ``usable`` (N,) bool: those that are of use there as they are stored; None is none on a device, all on the host.
    """
    option, total, count = ("vram" if where == DEVICE else "ram"), int(pixels.sum()), len(pixels)
    limit = f"the budget of {_size(budget)} ({option}=)"
    if total <= budget:
        text = f"cache={where!r} keeps all {count:,} images as pixels: {_size(total)}, in {limit}"
        return Choice(PIXELS, count, total, True, text)
    if usable is None:
        usable = np.full(count, where == HOST)
    stored = np.where(usable, encoded, 0)
    fits = int(np.searchsorted(np.cumsum(stored), budget, side="right"))
    # On the host a part of them would be of little use: the page cache has it.
    if usable[:fits].any() and (fits == count or where == DEVICE):
        many, kept = int(usable[:fits].sum()), int(stored[:fits].sum())
        text = (
            f"cache={where!r} keeps {'all' if many == count else f'{many:,} of'} {count:,} images as they are stored, {_size(kept)}: "
            f"their pixels would take {_size(total)}, and {limit} is less"
        )
        if many < count:
            text += "; the others are read from the file in each epoch"
            text += (
                "" if fits < count else ", since they have no restart markers (fastload convert adds them)"
            )
        return Choice(ENCODED, fits, kept, many == count, text)
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
    file, as all others are. ``jpegs``: what decodes those on the device that are not raw.
    """

    jpegs: Encoded | None = None

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

    def store(self, dataset: Dataset, bases: np.ndarray, pool: ThreadPoolExecutor, ahead: int) -> None:
        """Put samples there as they are stored, in this order, which must be that of their places; ``ahead`` batches of them at once.

        On a device a JPEG whose checksum is wrong, or that has none and cannot be decoded, is not kept.
        """
        waiting: deque[tuple[np.ndarray, int, Future[tuple[torch.Tensor, np.ndarray]]]] = deque()
        unsure = [np.zeros(0, np.int64)]

        def settle() -> None:
            some, start, future = waiting.popleft()
            data, trusted = future.result()
            if self.on_device:
                self.memory[start : start + len(data)].copy_(data, non_blocking=True)
            for base in some[trusted == _WRONG].tolist():
                self.forget(base)
            unsure.append(some[trusted == _UNSURE])

        for begin, end in chunks(self.lengths[bases]):
            some = bases[begin:end]
            waiting.append((some, int(self.starts[some[0]]), pool.submit(self._read, dataset, some)))
            if len(waiting) > ahead:
                settle()
        while waiting:
            settle()
        if self.jpegs is not None:
            self.jpegs.move(self.memory.device, self.starts)
            open_question = np.concatenate(unsure)
            for base in self.jpegs.damaged(self.memory, open_question, self.shapes[open_question]).tolist():
                self.forget(base)

    def _read(self, dataset: Dataset, bases: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
        """The stored bytes of samples whose places follow one another, and (n,) whether each is to be trusted."""
        first, total = int(self.starts[bases[0]]), int(self.lengths[bases].sum())
        pinned = self.memory.device.type == "cuda"
        if self.on_device:
            data = torch.empty(total, dtype=torch.uint8, pin_memory=pinned, device="cpu")
        else:
            data = self.memory[first : first + total]
        out, trusted = data.numpy(), np.zeros(len(bases), np.int64)
        for file, places, where in dataset.spans(bases):
            for row in places.tolist():
                start, size = int(where.starts[row]), int(where.sizes[row])
                at = int(self.starts[bases[row]]) - first
                out[at : at + size] = file[start : start + size]
                if self.on_device and not where.raw[row]:
                    reader, place = dataset.locate_base(int(bases[row]))
                    right = reader.checksum_matches(place)
                    trusted[row] = _UNSURE if right is None else _RIGHT if right else _WRONG
        return data, trusted

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
        """Where samples whose pixels are kept on the device lie there: pointers, shapes and strides for the kernels."""
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
