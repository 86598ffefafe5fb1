"""The ceilings of this machine beside a bench: memory, whole-image JPEG decoding, matrix products; and the share reached of each.

They say how much is left to gain where no change is known. Nothing in the verdict rests on them. The decoder's ceiling is that of
loaders which decode whole images; a loader that decodes only what its crops need can exceed it, and the table says so. The
trade-off: eight hundredths of the budget, so a ceiling is known to some percent and no better.

>>> limits = measure(dataset, side, threads=2, size=224, seconds=4.8); limits["memory_gb_s"]
21.4
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastload.benchmarks import machine
from fastload.benchmarks.harness import MIN_ROUNDS, Series, interleave
from fastload.benchmarks.pairing import clamp

if TYPE_CHECKING:
    from fastload.benchmarks.side import ModelSide
    from fastload.dataset import Dataset

SHARE = 0.08  # of a bench's seconds
# With a smaller budget than this there is no time for five rounds of them.
LEAST_SECONDS = 15.0
# A ceiling's key in a record, and its unit.
UNITS = {
    "memory_gb_s": "GB/s",
    "copy_gb_s": "GB/s",
    "decoder_images_s": "images/s",
    "model_tflops": "TFLOP/s",
}
# The same for sentences, which show one decimal: name, factor, unit.
WORDS = {
    "memory_gb_s": ("memory", 1, "GB/s"),
    "copy_gb_s": ("copies to the device", 1, "GB/s"),
    "decoder_images_s": ("the decoder", 1, "images/s"),
    "model_tflops": ("matrix products", 1000, "GFLOP/s"),
}
# Each of the two copied buffers: this many times the last caches, within these bytes.
CACHES, LEAST_BUFFER, MOST_BUFFER = 2, 128 << 20, 2 << 30
COPIED = 64 << 20  # bytes that are copied to a device at once
MOST_IMAGES, MOST_PIXELS = 2048, 10_000_000  # of the images that are decoded in one pass


def measure(
    dataset: Dataset,
    side: ModelSide | None,
    *,
    threads: int,
    size: int,
    seconds: float,
    rounds: int = MIN_ROUNDS,
    progress: Callable[[str], object] | None = None,
) -> dict[str, Any]:
    """Ceilings as a record has them: the median of each by its name of :data:`UNITS`, and all rounds under ``rounds``.

    ``threads``: of the loader, which the decoder gets too; memory is copied by all cores. ``size``: side of the model's images,
    in pixels. ``model_gflop``: floating point operations of one image's training step, in 1e9. What cannot be measured here is None:
    the decoder of a raw store, the model where there is none.
    """
    until = time.perf_counter() + seconds
    gflop = _gflop(side, size)
    with contextlib.ExitStack() as stack:
        jobs = {
            "memory_gb_s": _memory(stack),
            "copy_gb_s": _copy(side),
            "decoder_images_s": _decoder(dataset, threads, stack),
            "model_tflops": _products(side),
        }
        kept = {name: job for name, job in jobs.items() if job is not None}
        left = max(until - time.perf_counter(), seconds / 2)  # buffers and images were made ready meanwhile
        for job in kept.values():
            job.seconds = left / len(kept) / (rounds + 1)
        found = interleave(kept, rounds=rounds, progress=progress) if kept else {}
    series = {name: replace(one, unit=UNITS[name]) for name, one in found.items()}
    return {
        **{name: _rounded(series[name].median) if name in series else None for name in UNITS},
        "model_gflop": gflop,
        "threads": threads,
        "rounds": {name: one.to_json() for name, one in series.items()},
    }


def shares(
    limits: Mapping[str, Any], loader: float, model: float | None, stages: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """The share of each ceiling that was reached, by ``memory``, ``decoder`` and ``model``; those that are known.

    ``loader`` and ``model`` are images/s of each alone. Memory is an upper bound: it takes every stage to read and to write as
    many bytes as the larger of the two, and nothing to be found in a cache. ``decoder`` may be above 1.
    """
    found: dict[str, float] = {}
    moved = 2 * sum(
        float(stage["bytes"]) for stage in stages
    )  # read and written, as a copy's bytes are counted
    if limits.get("memory_gb_s") and moved:
        found["memory"] = loader * moved / 1e9 / limits["memory_gb_s"]
    if limits.get("decoder_images_s"):
        found["decoder"] = loader / limits["decoder_images_s"]
    if limits.get("model_tflops") and limits.get("model_gflop") and model is not None:
        found["model"] = model * limits["model_gflop"] / 1e3 / limits["model_tflops"]
    return {name: _rounded(share) for name, share in found.items()}


def noisy(limits: Mapping[str, Any]) -> list[Series]:
    """The ceilings with their rounds, for the sentence about noise."""
    found = []
    for name, one in limits["rounds"].items():
        what, scale, unit = WORDS.get(name, (name, 1, one.get("unit", "")))
        found.append(Series(f"limit of {what}", tuple(scale * value for value in one["rounds"]), unit))
    return found


class _Job:
    """Does ``once`` as often as fills ``seconds`` and returns ``amount`` times the calls a second."""

    def __init__(self, once: Callable[[], object], amount: float, sync: Callable[[], object]) -> None:
        self.once, self.amount, self.sync = once, amount, sync
        self.seconds, self.count = 0.0, 1

    def __call__(self) -> float:
        self.sync()
        clock = time.perf_counter()
        for _ in range(self.count):
            self.once()
        self.sync()
        spent = max(time.perf_counter() - clock, 1e-9)
        figure = self.count * self.amount / spent
        self.count = clamp(self.count * self.seconds / spent, 1, 100_000)
        return figure


def _nothing() -> None:
    """A CPU has done its work when the call returns."""


def _memory(stack: contextlib.ExitStack) -> _Job | None:
    """Copies between two buffers on all cores, GB/s read plus GB/s written; None without room for more than the caches."""
    caches, free = cache_bytes(), machine.available_bytes()
    size = min(max(LEAST_BUFFER, CACHES * caches), MOST_BUFFER, (free or 8 * MOST_BUFFER) // 8)
    if size < caches:
        return None
    cores = machine.usable_cores()
    source, target = np.full(size, 1, np.uint8), np.full(size, 2, np.uint8)
    parts = list(zip(np.array_split(target, cores), np.array_split(source, cores)))
    pool = stack.enter_context(ThreadPoolExecutor(cores, "fastload-limits"))
    return _Job(lambda: list(pool.map(lambda part: np.copyto(*part), parts)), 2 * size / 1e9, _nothing)


def cache_bytes() -> int:
    """Bytes of all last-level caches together; 32 MiB where the system does not say."""
    found: dict[tuple[str, str], int] = {}
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    for folder in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*"):
        try:
            level, shared, size = (
                (folder / name).read_text().strip() for name in ("level", "shared_cpu_list", "size")
            )
            found[level, shared] = int(size.rstrip("KMG")) * units.get(size[-1:], 1)
        except (OSError, ValueError):
            continue
    last = max((level for level, _ in found), default="")
    return sum(size for (level, _), size in found.items() if level == last) or 32 << 20


def _copy(side: ModelSide | None) -> _Job | None:
    """Copies from pinned memory to a CUDA device, GB/s; None where nothing is copied."""
    if side is None or side.device.type != "cuda":
        return None
    import torch

    source = torch.ones(COPIED, dtype=torch.uint8).pin_memory()
    target = torch.empty(COPIED, dtype=torch.uint8, device=side.device)
    return _Job(lambda: target.copy_(source, non_blocking=True), COPIED / 1e9, side.sync)


def _decoder(dataset: Dataset, threads: int, stack: contextlib.ExitStack) -> _Job | None:
    """Whole images of the data through libjpeg-turbo at its fastest, images/s; None where none is a JPEG that it can decode."""
    sample = _jpegs(dataset, threads)
    if not sample:
        return None
    import simplejpeg

    hands = min(threads, len(sample))
    largest = max(height * width * 3 for _, height, width in sample)
    buffers = [bytearray(largest) for _ in range(hands)]

    def decode(hand: int) -> None:
        for data, _, _ in sample[hand::hands]:
            simplejpeg.decode_jpeg(data, "RGB", fastdct=True, fastupsample=True, buffer=buffers[hand])

    pool = stack.enter_context(ThreadPoolExecutor(hands, "fastload-limits"))
    return _Job(lambda: list(pool.map(decode, range(hands))), len(sample), _nothing)


def _jpegs(dataset: Dataset, threads: int) -> list[tuple[bytes, int, int]]:
    """Stored JPEGs spread over the data, in memory, with height and width; equally many for each thread where there are enough."""
    import simplejpeg

    pixels = float(np.mean(np.asarray(dataset.heights, np.float64) * np.asarray(dataset.widths)))
    count = clamp(MOST_PIXELS / max(pixels, 1.0), 2 * threads, MOST_IMAGES)
    count = min(max(threads, count // threads * threads), len(dataset))
    found = []
    for index in np.unique(np.linspace(0, len(dataset) - 1, count).astype(np.int64)):
        image = dataset.encoded(int(index))
        if image.mode == "jpeg":
            data = bytes(image.data)
            with contextlib.suppress(ValueError):  # damaged, or of colours that it does not turn into RGB
                simplejpeg.decode_jpeg(data, "RGB")
                found.append((data, image.height, image.width))
    return found


def _products(side: ModelSide | None) -> _Job | None:
    """Products of square matrices on the model's device in the precision of its step, TFLOP/s; None without a model."""
    if side is None:
        return None
    import torch

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(side.amp, torch.float32)
    few = side.device.type == "cpu" and machine.usable_cores() <= 8
    n = 1024 if few else 2048 if side.device.type == "cpu" else 8192
    a, b, c = (torch.ones(n, n, dtype=dtype, device=side.device) for _ in range(3))
    return _Job(lambda: torch.mm(a, b, out=c), 2 * n**3 / 1e12, side.sync)


def _gflop(side: ModelSide | None, size: int) -> float | None:
    if side is None:
        return None
    count = flop_per_image(side.step.model, size)
    return _rounded(count / 1e9) if count else None


def flop_per_image(model: Any, size: int) -> float | None:
    """Floating point operations of a training step for one image of ``size`` px; None where they cannot be counted.

    Counted is the forward pass, on tensors without memory; the backward pass takes twice as many, since it makes two products
    of each. (torch's own count of the backward pass ignores the groups of a convolution.)
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    try:
        twin = copy.deepcopy(model).to("meta")
        # Two images: layers that normalise over a batch refuse one.
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            twin(torch.empty(2, 3, size, size, device="meta"))
    except Exception:  # a model may do anything in its forward pass, also what tensors without memory cannot
        return None
    return 3 * counter.get_total_flops() / 2


def _rounded(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")
