"""The CUDA engine: CPU threads cut crops, the GPU decodes them, and one kernel does all the rest, behind the consumer's back.

Of a JPEG the threads cut the restart segments under the crop, of stored pixels its window, into pinned memory
(:mod:`fastload.engines.staging`). One more thread hands batch after batch to the GPU: nvJPEG decodes (:mod:`fastload.engines.gpu_decode`),
and :func:`fastload.kernels.gpu.crop` resizes, recolours, erases and normalises into the batch. With ``decode="cpu"`` the threads
decode, too: better where a GPU has no JPEG engine, or many cores stand idle. With ``cache`` the data stay in memory
(:mod:`fastload.engines.resident`); where all of them lie on the device as pixels, the loader makes batches without this engine's
threads (:mod:`fastload.device_feed`).

The host waits for the GPU in that one thread only; the consumer's stream waits for an event. Trade-off: what waits there holds up the
batches behind it. Nothing here needs a GPU but CUDA's streams: with device "cpu" all of it runs with libjpeg-turbo and the kernels'
reference in torch, slowly, which is how it is tested.

Pixels against the CPU engine with ``decode="exact"``: on the CPU within 1 level (before colour, which multiplies that), and stored pixels
to the same. nvJPEG decodes 4:2:0 with plain chroma, so on a GPU a JPEG's colours differ at edges. ``decode="cpu"`` is our own decoder,
half a level off on average; ``decode="segments"`` is libjpeg-turbo's pixels to the bit. Equal batches come out of a cache and without it
where the same decodes: ``chosen`` says who, since images that are kept encoded on the device are decoded by "segments".
Decoders for GPUs show damaged data as if they were whole: the checksum of each JPEG is looked at once, where the file has them; in
a file without (FFCV's) ``decode="cpu"``, ``fastload verify`` and, of what a JPEG itself betrays, "segments" find damage inside of an image.

>>> engine.submit(bases, dataset.spans(bases), table); images = engine.collect()  # (B, H, W, 3)
"""

from __future__ import annotations

import contextlib
import gc
import time
import warnings
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from fastload.dataset import Dataset
from fastload.draws import Plan, Table
from fastload.engines import resident
from fastload.engines.cpu import Sources
from fastload.engines.encoded import Encoded
from fastload.engines.gathering import gather, rows_of
from fastload.engines.gpu_decode import Decoder, find_decoder
from fastload.engines.resident import Resident
from fastload.engines.staging import READY, Repair, Ring, Staged, Stager
from fastload.errors import UsageError, unknown
from fastload.kernels import batch as kb
from fastload.kernels import gpu

GPU, SEGMENTS, CPU, AUTO = "gpu", "segments", "cpu", "auto"
WAYS = {GPU: ("torchvision", "torchcodec"), SEGMENTS: ("segments",)}  # decoders that are tried
_SLICES_PER_THREAD = 3  # of all batches that are made at once, so that one large image holds one thread only
_MEASURE_SECONDS = 0.5  # for each way to decode
_AHEAD = (
    4  # batches by which the host may be ahead of the consumer's stream, besides those that are submitted
)


class CudaEngine:
    """Makes batches of a dataset on a device, in the order in which they are submitted. For one thread.

    Args:
        dataset, plan: as for the CPU engine. UsageError for a plan with PerImage.
        batch_size: rows of the largest batch.
        threads: CPU threads that cut or decode.
        device: "cuda", or "cpu" to run the same without a GPU, slowly.
        prefetch: batches that are submitted ahead.
        dtype: of the batches: torch.uint8, or a float type for normalised pixels (pixel / 255 without Normalize).
        decode: who decodes JPEG: "gpu", that is a library on the device; "segments", our kernels there, a restart segment in each lane;
            "cpu", the threads; "auto" measures them for a second and keeps the fastest.
        cache: "device" or "host" keeps the dataset there; None reads the file. Where its pixels do not fit on the device, it is kept
            encoded there, and "segments" decodes.
        vram, ram: bytes that such a cache may take; None is 80% of what is free on the device, or on the host.

    ``chosen`` says in words who decodes, what is kept in memory, and why; ``rates`` are the images/s that "auto" measured, by way.
    """

    def __init__(
        self,
        dataset: Dataset,
        plan: Plan,
        *,
        batch_size: int,
        threads: int,
        device: torch.device | str = "cuda",
        prefetch: int = 2,
        dtype: torch.dtype = torch.uint8,
        decode: str = GPU,
        cache: str | None = None,
        vram: int | None = None,
        ram: int | None = None,
    ) -> None:
        self.device = _usable(torch.device(device))
        if plan.per_image:
            raise UsageError(
                f"a GPU cannot run a Python function for each image ({plan.per_image[0]!r}); use engine='cpu'"
            )
        if dtype == torch.uint8 and plan.normalize is not None:
            raise UsageError(
                "uint8 cannot hold normalised pixels: leave Normalize out, or ask for a float dtype"
            )
        if decode not in (GPU, SEGMENTS, CPU, AUTO):
            raise unknown("way to decode", decode, [GPU, SEGMENTS, CPU, AUTO])
        if cache not in (None, resident.DEVICE, resident.HOST):
            raise unknown("cache", cache, [resident.DEVICE, resident.HOST])
        for name, budget in (("vram", vram), ("ram", ram)):
            if budget is not None and budget < 0:
                raise UsageError(f"{name} is a number of bytes, 0 or more, got {budget}")
        self._dataset, self._plan, self.dtype = dataset, plan, dtype
        self._batch_size, self._threads, self._prefetch = batch_size, threads, prefetch
        self.paint = kb.Paint(np.array(plan.fill, np.uint8), plan.erase_fill, *plan.affine)
        self._decoder: Decoder | None = None
        self._decoders: dict[str, Decoder] = {}
        self._missing: dict[str, str] = {}
        self.resident: Resident | None = None
        self._pending: deque[Staged] = deque()
        self._cuda = self.device.type == "cuda"
        self._ring = Ring(self._cuda, prefetch + 3)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fastload-cut")
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="fastload-cuda")
        self.stream = torch.cuda.Stream(self.device) if self._cuda else None
        # Where the consumer's stream was at the last calls of collect().
        self._marks: deque[Any] = deque(maxlen=_AHEAD)
        self._closed = False
        self.rates: dict[str, float] = {}
        try:
            self.chosen = self._choose_decoder(decode)
            if cache is not None:
                kept = self._fill_cache(cache, vram if cache == resident.DEVICE else ram)
                self.chosen += f"; {kept}"
        except BaseException:
            self.close()
            raise

    @property
    def holds_all(self) -> bool:
        """Whether all images lie on the device as pixels, so that batches can be made without the host."""
        cache, bases = self.resident, self._dataset.indices
        return cache is not None and cache.on_device and bool((cache.holds(bases) & cache.raw[bases]).all())

    # -- in --------------------------------------------------------------------------------------------------------

    def submit(self, bases: np.ndarray, spans: Sources, table: Table, repair: Repair | None = None) -> None:
        """Begin a batch of the samples ``bases`` (B,), B up to ``batch_size``, where ``spans`` says, as ``table`` says. Does not wait.

        ``repair(row, out)`` fills ``out`` (H, W, 3) uint8 for a row whose bytes are bad, colour and erasing included, on any thread.
        By default that is :meth:`fastload.engines.cpu.Engine.execute`, and a CorruptError that names the sample.
        """
        if self._closed:
            raise UsageError("this engine was closed; make a new one")
        if not 0 < len(bases) <= self._batch_size:
            raise UsageError(f"a batch has 1 to {self._batch_size} samples, got {len(bases)}")
        bases = np.array(bases, np.int64)  # ours: the caller may put another sample's number there
        size = self._plan.size
        if size is None:
            y, x = spans[0][2].shapes[spans[0][1][0]].tolist()
            size = (y, x)
        windows, empty = table.windows()
        ready = empty
        if self.resident is not None:
            spans = self.resident.spans(bases, spans)
            if self.resident.on_device:
                ready = empty | self.resident.holds(bases)
        repair = repair or self._executor(bases, table)
        self._pending.append(
            self._start(self._stager.begin(bases, spans, windows, size, repair, table, ready))
        )

    def _start(self, batch: Staged) -> Staged:
        count = len(batch.bases)
        share = max(1, -(-_SLICES_PER_THREAD * self._threads // (self._prefetch + 1)))
        step = -(-count // min(count, share))
        if (batch.kinds != READY).any():
            batch.slices = [
                self._pool.submit(self._stager.prepare, batch, at, min(at + step, count))
                for at in range(0, count, step)
            ]
        if len(self._marks) == _AHEAD:
            batch.after = self._marks[0]
        batch.made = self._worker.submit(self._make, batch)
        return batch

    def _executor(self, bases: np.ndarray, table: Table) -> Repair:
        return lambda row, out: self._stager.execute(int(bases[row]), table, row, out)

    # -- out -------------------------------------------------------------------------------------------------------

    def collect(self) -> torch.Tensor:
        """The oldest batch that was submitted, (B, H, W, 3) without gaps on the device, the caller's own.

        Its ``permute(0, 3, 1, 2)`` is (B, 3, H, W) in channels_last memory. On a GPU it may still be in the making: the current
        stream waits for it, the host does not. Raises what ``repair`` raises, such as CorruptError; the batches behind it can be
        collected all the same.
        """
        if not self._pending:
            raise UsageError("collect() gives a batch for each submit(), and none is left")
        batch = self._pending.popleft()
        assert batch.made is not None
        images: torch.Tensor
        images, event = batch.made.result()
        if event is not None:
            consumer = torch.cuda.current_stream(self.device)
            mark = torch.cuda.Event(blocking=True)  # its waiter sleeps
            mark.record(consumer)
            self._marks.append(mark)
            consumer.wait_event(event)
            # Else the memory could be given away while the consumer reads it.
            images.record_stream(consumer)
        return images

    def drop(self) -> None:
        """Forget what was submitted, and keep threads and caches for what comes next."""
        for batch in self._pending:
            batch.cancelled = True
            for part in batch.slices:
                part.cancel()
        self._pending.clear()

    def close(self) -> None:
        """Stop threads, forget what was submitted, free caches. Batches that were collected stay as they are."""
        self._closed = True
        self.drop()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._worker.shutdown(wait=True, cancel_futures=True)
        if self.stream is not None:
            self.stream.synchronize()
        self._ring.clear()
        self.resident = self._decoder = None
        self._decoders.clear()

    # -- on the thread of the device -------------------------------------------------------------------------------

    def _make(self, batch: Staged) -> tuple[torch.Tensor, Any]:
        """The pixels of a batch (B, H, W, 3), and the event behind them on a GPU."""
        with self._loaded(batch) as (sources, origins):
            assert batch.table is not None
            rows = rows_of(batch, origins)
            images = torch.empty((len(batch.bases), *batch.size, 3), dtype=self.dtype, device=self.device)
            planes = images.permute(0, 3, 1, 2)
            gpu.crop(sources, rows, planes, self.paint)
            if batch.table.mix is not None and batch.table.mix_box is not None:
                gpu.mix(planes, batch.table.mix, batch.table.mix_box)
        return images, (batch.events[0] if self._cuda else None)

    @contextlib.contextmanager
    def _loaded(self, batch: Staged) -> Any:
        """The sources of a batch on the device, and the y, x (B, 2) of the image at which each begins; at last its memory is given back.

        On a GPU what is done meanwhile is done on our stream.
        """
        try:
            _settle(batch.slices)
            if batch.cancelled:
                raise UsageError("this batch was dropped")  # nobody hears it
            if batch.after is not None:
                # Else a host that is far ahead of its GPU would fill the memory with batches that are still to be used.
                batch.after.synchronize()
            with self.on_stream():
                yield gather(batch, self.device, self._stager, self._decoder, self.resident)
        finally:
            if self._cuda:
                event = torch.cuda.Event()
                event.record(self.stream)
                batch.events.append(event)
            self._stager.release(batch)

    def on_stream(self) -> Any:
        """A context in which the engine's own stream is the current one."""
        return contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    # -- who decodes -----------------------------------------------------------------------------------------------

    def _choose_decoder(self, decode: str) -> str:
        """Set ``_stager``, and ``_decoder`` if the device decodes; returns why."""
        bases = resident.first_uses(self._dataset.indices)
        _, _, raw, _ = resident.measure(self._dataset.spans, bases[:4096])
        if decode == CPU:
            return self._use(CPU, "the CPU decodes, as asked for")
        if decode == AUTO and raw.all():
            return self._use(CPU, "there is nothing to decode in the images that were looked at")
        if decode in (GPU, SEGMENTS):
            self._decoders[decode] = find_decoder(self.device, WAYS[decode])
            return self._use(decode, f"{self._names[decode]} decodes, as asked for")
        ways, said = [], ""
        for way in (GPU, SEGMENTS) if self._cuda else (GPU,):
            if self._find(way):
                ways.append(way)
            else:
                said = f"the CPU decodes, because {self._missing[way]}"
        if not ways:
            return self._use(CPU, said)
        for way in (*ways, CPU):
            self._use(way, "")
            self.rates[way] = self._measure(bases)
        names = {**self._names, CPU: f"{self._threads} CPU threads"}
        figures = ", ".join(f"{names[way]}: {rate:,.0f}" for way, rate in self.rates.items())
        faster = max(self.rates, key=lambda way: self.rates[way])
        name = "the CPU" if faster == CPU else names[faster]
        return self._use(faster, f"{name} decodes, which is fastest here (images/s: {figures})")

    def _find(self, way: str) -> bool:
        """Whether the device can decode in this way."""
        if way not in self._decoders:
            try:
                self._decoders[way] = find_decoder(self.device, WAYS[way])
            except UsageError as error:
                self._missing[way] = str(error)
        return way in self._decoders

    @property
    def _names(self) -> dict[str, str]:
        return {way: f"{decoder.name} on {self.device}" for way, decoder in self._decoders.items()}

    def _use(self, way: str, why: str) -> str:
        self._decoder = self._decoders.get(way)
        turns = self._decoder is not None and self._decoder.turns
        self._stager = Stager(self._dataset, self._plan, self._ring, self._decoder is not None, turns)
        return why

    def _measure(self, bases: np.ndarray) -> float:
        """Images/s of whole batches of this dataset, a bad sample or two among them or not."""

        def submit(number: int) -> None:
            chosen = bases[(np.arange(self._batch_size) + number * self._batch_size) % len(bases)]
            spans = self._dataset.spans(chosen)
            shapes = np.ones((len(chosen), 2), np.int64)
            for _, places, where in spans:
                shapes[places] = np.maximum(where.shapes[places], 1)
            table = self._plan.draw(0, 0, chosen.astype(np.uint64), shapes[:, 0], shapes[:, 1])
            self.submit(chosen, spans, table, lambda row, out: out.fill(0))

        for number in range(self._prefetch + 1):
            submit(number)
        self.collect()  # compiles kernels, and starts the decoder
        self._synchronise()
        begun, done = time.perf_counter(), 0
        while time.perf_counter() - begun < _MEASURE_SECONDS:
            submit(done + self._prefetch + 1)
            self.collect()
            done += 1
        self._synchronise()
        spent = time.perf_counter() - begun
        self.drop()
        return done * self._batch_size / spent

    def _synchronise(self) -> None:
        if self._cuda:
            torch.cuda.synchronize(self.device)

    # -- the cache -------------------------------------------------------------------------------------------------

    def _fill_cache(self, where: str, budget: int | None) -> str:
        """Set ``_resident``; returns what it keeps and why."""
        bases = resident.first_uses(self._dataset.indices)
        pixels, encoded, raw, shapes = resident.measure(self._dataset.spans, bases)
        if budget is None:
            gc.collect()  # loaders that nobody holds any more, and their caches
            budget = resident.free_bytes(where, self.device)
        count, jpegs, usable = int(bases.max(initial=-1)) + 1, None, None
        if (
            where == resident.DEVICE
            and pixels.sum() > budget
            and self._stager.by_device
            and self._find(SEGMENTS)
        ):
            jpegs = Encoded(self._dataset.spans, bases, count)
            if jpegs.ok.any():
                usable = raw | jpegs.ok[bases]
                budget = max(0, budget - jpegs.bytes)
        choice = resident.choose(where, pixels, encoded, budget, usable)
        if not choice.whole:
            warnings.warn(choice.text, stacklevel=5)  # who made the Loader
        as_pixels = choice.what != resident.ENCODED
        lengths = pixels if as_pixels else encoded if usable is None else np.where(usable, encoded, 0)
        mine = np.flatnonzero(lengths[: choice.count])  # a damaged sample has no length
        with self.on_stream():  # its memory must not be some that another stream still reads
            cache = Resident(
                where, self.device, count, bases[mine], lengths[mine], raw[mine] | as_pixels, shapes[mine]
            )
            if not as_pixels:
                cache.jpegs = jpegs
                cache.store(self._dataset, bases[mine], self._pool, self._threads)
        if as_pixels:
            self._decode_into(cache, bases[mine], pixels[mine])
        elif jpegs is not None:
            # All by one decoder: whether an image is kept must not show in its pixels.
            self.chosen = self._use(SEGMENTS, f"{self._names[SEGMENTS]} decodes, from what is kept there")
        self._synchronise()
        self._ring.clear()  # what decoding a whole dataset took
        self.resident = cache
        return choice.text

    def _decode_into(self, cache: Resident, bases: np.ndarray, sizes: np.ndarray) -> None:
        """Decode samples whole, some at a time, into a cache; a damaged one stays out of it."""
        waiting: deque[tuple[Staged, Any]] = deque()
        for start, stop in resident.chunks(sizes):
            some = bases[start:stop]
            spans = self._dataset.spans(some)
            windows = np.concatenate([np.zeros((len(some), 2), np.int64), cache.shapes[some]], axis=1)
            batch = self._stager.begin(some, spans, windows, (1, 1), None)
            step = -(-len(some) // self._threads)
            batch.slices = [
                self._pool.submit(self._stager.prepare, batch, i, min(i + step, len(some)))
                for i in range(0, len(some), step)
            ]
            waiting.append((batch, self._worker.submit(self._keep, batch, cache)))
            if len(waiting) > self._prefetch:
                waiting.popleft()[1].result()
        for _, kept in waiting:
            kept.result()
        self._synchronise()

    def _keep(self, batch: Staged, cache: Resident) -> None:
        with self._loaded(batch) as (sources, _):
            for row, base in enumerate(batch.bases.tolist()):
                if row in batch.failed:
                    cache.forget(base)
                else:
                    cache.keep(base, sources.image(row))


def _settle(parts: Sequence[Future[None]]) -> None:
    """Wait for all of them, since they write to the same memory, and then raise the first error."""
    error: BaseException | None = None
    for part in parts:
        try:
            # Not futures.wait(): one that was cancelled and never taken up is not done for it.
            part.result()
        except BaseException as raised:
            error = error or raised
    if error is not None:
        raise error


def _usable(device: torch.device) -> torch.device:
    """The device, with its number. UsageError if it is not there."""
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise UsageError(
            f"the CUDA engine runs on device 'cuda' or 'cpu', got {str(device)!r}; use engine='cpu'"
        )
    if not torch.cuda.is_available():
        raise UsageError(
            f"device {str(device)!r} is not available here (torch finds no CUDA GPU); use engine='cpu', or see: fastload doctor"
        )
    number = torch.cuda.current_device() if device.index is None else device.index
    if number >= torch.cuda.device_count():
        raise UsageError(f"there are {torch.cuda.device_count()} GPUs here, and {str(device)!r} is asked for")
    return torch.device("cuda", number)
