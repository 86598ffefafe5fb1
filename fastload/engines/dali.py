"""The DALI engine: the same table of draws, executed by NVIDIA DALI, on the CPU or on a GPU.

A crop is cut out of the JPEG in the compressed domain as for the CPU engine (stored pixels: only the rows of the crop are
handed over, as views of the mapped file); a DALI pipeline decodes it, resizes, flips and pads. DALI has no operator for a 3x7 colour
matrix, and what comes behind it (erasing, normalising, mixing) must wait for it: these are the CPU engine's kernels, to the bit, or
on a GPU :mod:`fastload.engines.on_device`. A graph of DALI's arithmetic operators would need one operator for each term.

The trade-off: decoding and resizing are DALI's, so on a GPU they leave the CPU alone. On the CPU :mod:`fastload.engines.cpu` needs a
fifth of the time from JPEG, a tenth from stored pixels. What DALI does not take or would show otherwise (CMYK, progressive or
damaged JPEG), the CPU engine makes, row by row. DALI shows a damaged JPEG as if it were whole, so the checksum of each image is
looked at once, where the file has them.

Pixels against the CPU engine with ``decode="exact"``, on the CPU: all within 1 level, but for the outermost pixels of an output that
is made smaller from a region that ends there, where DALI repeats the last source pixel and we leave it out: up to 22 levels on
500 photographs. That is 0.003 levels a pixel on average for random crops at 224 pixels, 0.06 at 64 pixels, up to 8 for outputs one
pixel high. Pixels that are not resized are equal to the bit. A colour matrix multiplies the difference. ``decode="fast"`` is as far
away as it is from "exact": 0.4 levels on average at 224 pixels, 1.3 at 64. On a GPU the decoder is another one: not measured.

>>> engine.submit(bases, dataset.spans(bases), table); images = engine.collect()  # (B, H, W, 3)
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

from fastload import codecs
from fastload import transforms as T
from fastload.dataset import Dataset
from fastload.draws import Plan, Table
from fastload.engines import on_device
from fastload.engines.cpu import EXACT, Engine, Sources
from fastload.errors import CorruptError, DataError, UsageError, require
from fastload.kernels import jpeg, pixels

Repair = Callable[[int, np.ndarray], None]

_SMOOTH = 2  # pixels of margin that keep smooth chroma upsampling independent of the cut
_UNKNOWN, _DALI, _CPU = 0, 1, 2  # who makes a sample
_PATIENCE = 3  # batches at which DALI may fail without a reason that we find
_PROBE_SECONDS = 120
_PARAMETERS = 12  # of a row: window y, x, h, w; roi y0, x0, y1, x1; size h, w; place y, x


@dataclass
class _Part:
    """The rows (k,) of a batch that one pipeline makes, and what it reads: kept alive until it has been made."""

    rows: np.ndarray
    images: list[np.ndarray]
    numbers: np.ndarray


@dataclass
class _Pending:
    """A batch that was submitted. ``own`` are the rows that the CPU engine makes, by the futures beside them (None: made)."""

    bases: np.ndarray
    table: Table
    size: tuple[int, int]
    repair: Repair
    parts: dict[str, _Part] = field(default_factory=dict)
    own: list[tuple[int, np.ndarray, Future[None] | None]] = field(default_factory=list)


class DaliEngine:
    """Makes batches of a dataset through DALI, in the order in which they are submitted. For one thread.

    Args:
        dataset, plan: as for the CPU engine. UsageError for a plan with PerImage.
        batch_size: rows of the largest batch.
        threads: DALI's threads; the rows that the CPU engine makes get as many.
        device_id: a GPU, or None for the CPU.
        prefetch: batches that are submitted ahead.
        dtype: of the batches: torch.uint8, or a float type for normalised pixels (pixel / 255 without Normalize).
        allocate: (shape, dtype) to host memory for a batch that nobody else looks into; ``Buffers.take`` for memory that is used again.
    """

    def __init__(
        self,
        dataset: Dataset,
        plan: Plan,
        *,
        batch_size: int,
        threads: int,
        device_id: int | None,
        prefetch: int = 2,
        dtype: torch.dtype = torch.uint8,
        allocate: Callable[[tuple[int, ...], Any], np.ndarray] = np.empty,
    ) -> None:
        require("nvidia.dali", "dali")
        if plan.per_image:
            raise UsageError(
                f"DALI cannot run a Python function for each image ({plan.per_image[0]!r}); use engine='cpu'"
            )
        if dtype == torch.uint8 and plan.normalize is not None:
            raise UsageError(
                "uint8 cannot hold normalised pixels: leave Normalize out, or ask for a float dtype"
            )
        self._dataset, self._plan, self._dtype = dataset, plan, dtype
        self._batch_size, self._threads, self._depth = batch_size, threads, prefetch + 1
        self._device = torch.device("cpu") if device_id is None else torch.device("cuda", device_id)
        if device_id is not None and not 0 <= device_id < torch.cuda.device_count():
            raise UsageError(
                f"there are {torch.cuda.device_count()} GPUs here, and DALI is asked for number {device_id}; "
                "use device_id=None, or see: fastload doctor"
            )
        self._engine = Engine(dataset, plan, EXACT)  # "exact", because that is how DALI decodes
        # Who makes which sample, found out at its first turn, (largest base index + 1,) uint8.
        self._route = np.zeros(int(dataset.indices.max(initial=-1)) + 1, np.uint8)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fastload-dali")
        # A pipeline for each kind of image that was met; None: it has stopped, and what was submitted is still to be run.
        self._pipes: dict[str, Any] = {}
        self._pending: deque[_Pending] = deque()
        # What DALI reads and writes for a batch on the GPU, and the event behind its copy.
        self._copied: deque[tuple[Any, Any]] = deque()
        self._allocate = allocate
        self._failures = 0

    # -- in --------------------------------------------------------------------------------------------------------

    def submit(self, bases: np.ndarray, spans: Sources, table: Table, repair: Repair | None = None) -> None:
        """Begin a batch of the samples ``bases`` (B,), B up to ``batch_size``, where ``spans`` says, as ``table`` says.

        ``repair(row, out)`` fills ``out`` (H, W, 3) uint8 for a row that DALI does not take, colour and erasing included, on any
        thread. By default that is :meth:`fastload.engines.cpu.Engine.execute`, and a CorruptError that names the sample.
        """
        if not 0 < len(bases) <= self._batch_size:
            raise UsageError(f"a batch has 1 to {self._batch_size} samples, got {len(bases)}")
        size = self._plan.size
        if size is None:
            y, x = spans[0][2].shapes[spans[0][1][0]].tolist()
            size = (y, x)
        bases = np.array(bases, np.int64)  # ours: the caller may put another sample's number there
        pending = _Pending(bases, table, size, repair or self._executor(bases, table))
        by_dali = self._choose(bases, spans, table)
        pending.parts = self._cut(spans, table, by_dali)
        for row in np.flatnonzero(~by_dali).tolist():
            self._make(pending, row)
        for kind in pending.parts:
            stopped = kind in self._pipes and self._pipes[kind] is None
            if kind not in self._pipes or (stopped and not self._pending):
                self._pipes[kind] = self._build(kind)
        self._pending.append(pending)  # before it is fed: no pipeline makes what collect() does not know of
        for kind, part in pending.parts.items():
            self._feed(kind, part)

    def _executor(self, bases: np.ndarray, table: Table) -> Repair:
        def execute(row: int, out: np.ndarray) -> None:
            try:
                self._engine.execute(int(bases[row]), table, row, out)
            except CorruptError as error:
                reader, at = self._dataset.locate_base(int(bases[row]))
                raise error.at(int(bases[row]), reader.name(at), reader.name(at, "source")) from None

        return execute

    def _make(self, pending: _Pending, row: int) -> None:
        out = np.empty((*pending.size, 3), np.uint8)
        pending.own.append((row, out, self._pool.submit(pending.repair, row, out)))

    def _choose(self, bases: np.ndarray, spans: Sources, table: Table) -> np.ndarray:
        """(B,) bool: the rows for DALI."""
        new = []
        for file, places, where in spans:
            fresh = places[(self._route[bases[places]] == _UNKNOWN) & ~where.raw[places]]
            new += [(int(bases[i]), file, int(where.starts[i]), int(where.sizes[i])) for i in fresh]
            self._route[bases[places[where.raw[places] & (where.starts[places] >= 0)]]] = _DALI
            self._route[bases[places[where.starts[places] < 0]]] = _CPU
        for base, taken in self._pool.map(self._look, new):
            self._route[base] = _DALI if taken else _CPU
        # Where nothing of the image is placed all is fill, and DALI resizes nothing to no pixels.
        placed = (table.place[:, 2] > 0) & (table.place[:, 3] > 0)
        chosen: np.ndarray = placed & (self._route[bases] == _DALI)
        return chosen

    def _look(self, sample: tuple[int, np.ndarray, int, int]) -> tuple[int, bool]:
        """A base index, and whether DALI shows this JPEG as we do."""
        base, file, start, size = sample
        if start < 0:
            return base, False
        info, status = jpeg.parse(file[start : start + size])
        if status != jpeg.OK or not codecs.is_plain(info):
            return base, False
        reader, at = self._dataset.locate_base(base)
        try:
            return base, reader.checksum_matches(at) is not False
        except CorruptError:
            return base, False

    def _cut(self, spans: Sources, table: Table, chosen: np.ndarray) -> dict[str, _Part]:
        """What each pipeline is fed with for the ``chosen`` rows: crops of JPEG files, rows of stored pixels.

        A JPEG that is not what the file says of it is no longer chosen.
        """
        reach = np.maximum((table.box[:, 2:] - table.box[:, :2]) / np.maximum(table.place[:, 2:], 1), 1.0)
        low = np.maximum(table.clip[:, :2], np.floor(table.box[:, :2] - reach).astype(np.int64))
        high = np.minimum(table.clip[:, 2:], np.ceil(table.box[:, 2:] + reach).astype(np.int64))
        numbers = np.empty((len(chosen), _PARAMETERS), np.float32)
        numbers[:, 2:4] = high - low
        numbers[:, 4:8] = table.box - np.concatenate([low, low], axis=1)
        for bit, (start, stop) in ((1, (5, 7)), (2, (4, 6))):
            flipped = np.flatnonzero(table.flips & bit)  # DALI mirrors a region that ends before it begins
            numbers[flipped, start], numbers[flipped, stop] = numbers[flipped, stop], numbers[flipped, start]
        numbers[:, 8:10] = table.place[:, 2:]
        numbers[:, 10:12] = -table.place[:, :2]
        images: list[Any] = [None] * len(chosen)
        is_raw = np.zeros(len(chosen), bool)
        found = np.empty(5, np.int64)
        for file, places, where in spans:
            is_raw[places] = where.raw[places]
            for row in places[chosen[places]].tolist():
                (y0, x0), (y1, x1) = low[row].tolist(), high[row].tolist()
                start, (height, width) = int(where.starts[row]), where.shapes[row].tolist()
                if where.raw[row]:
                    at = start + 3 * width * y0
                    images[row] = file[at : at + 3 * width * (y1 - y0)].reshape(y1 - y0, width, 3)
                    numbers[row, :2] = 0, x0
                    continue
                data = file[start : start + int(where.sizes[row])]
                out = np.empty(data.size, np.uint8)
                margin = (y0 - _SMOOTH, x0 - _SMOOTH, y1 + _SMOOTH, x1 + _SMOOTH)
                top = left = 0
                status = jpeg.cut(data, height, width, *margin, out, found)
                if status == jpeg.OK:
                    data, (top, left) = out[: found[0]], found[1:3].tolist()
                elif status != jpeg.WHOLE:  # else it has no restart markers, or no index of them
                    chosen[row] = False
                images[row] = data
                numbers[row, :2] = y0 - top, x0 - left
        parts = {}
        for kind, which in (("jpeg", chosen & ~is_raw), ("raw", chosen & is_raw)):
            rows = np.flatnonzero(which)
            if rows.size:
                parts[kind] = _Part(rows, [images[row] for row in rows], np.ascontiguousarray(numbers[rows]))
        return parts

    def _feed(self, kind: str, part: _Part) -> None:
        """Have a pipeline make a part, if it has not stopped. It stops at a failure, which may show here or at the output."""
        pipe = self._pipes[kind]
        if pipe is None:
            return
        try:
            pipe.feed_input("images", part.images)
            pipe.feed_input("numbers", part.numbers)
            pipe.schedule_run()
        except Exception:  # DALI raises errors of all types
            self._pipes[kind] = None
        except BaseException:  # Ctrl-C, perhaps between images and numbers
            self._pipes[kind] = None
            raise

    # -- the pipeline ----------------------------------------------------------------------------------------------

    def _build(self, kind: str) -> Any:
        """A pipeline of "jpeg" or "raw" images that has run already, so that all it may lack shows here."""
        try:
            return self._start(kind)
        except Exception as error:  # DALI raises errors of all types
            text = " ".join(str(error).split())[-400:]
            raise UsageError(
                f"DALI cannot start a pipeline on {self._device} ({text}); use engine='cpu', or see: fastload doctor"
            ) from error

    def _start(self, kind: str) -> Any:
        from nvidia.dali.pipeline import Pipeline

        gpu = self._device.type == "cuda"
        pipe = Pipeline(
            batch_size=self._batch_size,
            num_threads=self._threads,
            device_id=self._device.index if gpu else None,
            prefetch_queue_depth=self._depth,
            exec_dynamic=True,  # its outputs are not used again while somebody holds them
        )
        with pipe:
            pipe.set_outputs(self._graph(kind, gpu))
        pipe.build()
        if kind == "jpeg":
            image = codecs.as_bytes(codecs.encode_jpeg(np.zeros((16, 16, 3), np.uint8)))
        else:
            image = np.zeros((16, 16, 3), np.uint8)
        numbers = np.array([[0, 0, 16, 16, 0, 0, 16, 16, *(self._plan.size or (16, 16)), 0, 0]], np.float32)
        # The first schedule_run() runs as many batches as the queue holds: give it these, and later calls run one each.
        for _ in range(self._depth):
            pipe.feed_input("images", [image])
            pipe.feed_input("numbers", numbers)
        pipe.schedule_run()
        for _ in range(self._depth):
            pipe.outputs()
        return pipe

    def _decodes_regions(self) -> bool:
        return self._device.type == "cpu" or roi_decode_works(self._device.index)

    def _graph(self, kind: str, gpu: bool) -> Any:
        """Images and numbers to (H, W, 3) uint8: window, resize with flips, pad."""
        fn, types = _operators()

        images = fn.external_source(
            name="images", batch=True, no_copy=True, dtype=types.UINT8, **_FORMS[kind]
        )
        numbers = fn.external_source(name="numbers", batch=True, no_copy=True, dtype=types.FLOAT, ndim=1)
        whole = fn.cast(numbers, dtype=types.INT32)
        window = {"start": whole[0:2], "shape": whole[2:4], "axes": [0, 1]}
        if kind == "jpeg":
            options: dict[str, Any] = {"device": "cpu", "adjust_orientation": False, "output_type": types.RGB}
            if gpu:
                options.update(device="mixed", jpeg_fancy_upsampling=True)
            if self._decodes_regions():
                images = fn.decoders.image_slice(images, **options, **window)
            else:
                images = fn.slice(fn.decoders.image(images, **options), **window)
        else:
            images = fn.slice(images, **window)
            images = images.gpu() if gpu else images
        images = fn.resize(
            images,
            size=numbers[8:10],
            roi_start=numbers[4:6],
            roi_end=numbers[6:8],
            interp_type=types.INTERP_LINEAR,
            antialias=True,
        )
        if self._plan.geometry and isinstance(self._plan.geometry[-1], (T.CenterCrop, T.RandomCrop)):
            images = fn.slice(
                images,
                start=whole[10:12],
                shape=list(self._plan.size or ()),
                axes=[0, 1],
                out_of_bounds_policy="pad",
                fill_values=[float(level) for level in self._plan.fill],
            )
        return images

    # -- out -------------------------------------------------------------------------------------------------------

    def collect(self) -> torch.Tensor:
        """The oldest batch that was submitted, (B, H, W, 3) on the engine's device, the caller's own.

        Waits for it. Raises what ``repair`` raises, such as CorruptError; the batches behind it can be collected all the same.
        """
        if not self._pending:
            raise UsageError("collect() gives a batch for each submit(), and none is left")
        pending = self._pending.popleft()
        try:
            made = [(part, self._receive(kind, pending, part)) for kind, part in pending.parts.items()]
        except BaseException:  # what a pipeline will give next is then not known, after Ctrl-C neither
            self._pipes = dict.fromkeys(self._pipes)
            raise
        for _, _, future in pending.own:
            if future is not None:
                future.result()
        images = self._assemble(pending, [(part, images) for part, images in made if images is not None])
        return (self._finish if images.device.type == "cpu" else self._finish_there)(images, pending)

    def _receive(self, kind: str, pending: _Pending, part: _Part) -> torch.Tensor | None:
        """What a pipeline makes of its part of the oldest batch; None if it cannot, and the CPU engine did it."""
        made, _ = self._output(kind, part)
        if made is not None:
            return made
        # A pipeline that has stopped says nothing of the batches before or behind the one at which it did: this one alone.
        self._pipes[kind] = None  # threads and memory of the old one go before those of a new one come
        self._pipes[kind] = self._build(kind)
        self._feed(kind, part)
        made, reason = self._output(kind, part)
        if made is None:
            self._pipes[kind] = None
            self._by_cpu(pending, part, reason)
            self._pipes[kind] = self._build(kind)
        for later in self._pending:
            if kind in later.parts:
                self._feed(kind, later.parts[kind])
        return made

    def _output(self, kind: str, part: _Part) -> tuple[torch.Tensor | None, str]:
        """The next output of a pipeline, (k, H, W, 3) uint8, or None and what DALI says."""
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        if self._pipes[kind] is None:
            return None, ""
        try:
            # With a stream DALI makes the stream wait, and not us.
            output = self._pipes[kind].outputs(cuda_stream=stream)[0]
            made: torch.Tensor = from_dlpack(output.as_tensor())
        except Exception as error:  # DALI raises errors of all types
            return None, " ".join(str(error).split())[-400:]
        return (self._own(made, (output, part), stream) if stream else made), ""

    def _own(self, made: torch.Tensor, in_use: Any, stream: Any) -> torch.Tensor:
        """A copy in torch's memory: DALI gives its own to the next batch without asking the consumer's stream."""
        while self._copied and self._copied[0][1].query():
            self._copied.popleft()
        copy = made.clone()
        event = torch.cuda.Event()
        event.record(stream)
        self._copied.append((in_use, event))
        return copy

    def _by_cpu(self, pending: _Pending, part: _Part, reason: str) -> None:
        """The CPU engine makes a part at which DALI failed, and every further time the samples that were the cause."""

        def attempt(row: int) -> tuple[int, np.ndarray | None]:
            out = np.empty((*pending.size, 3), np.uint8)
            try:
                self._engine.execute(int(pending.bases[row]), pending.table, row, out)
            except CorruptError:
                return row, None
            return row, out

        corrupt = []
        for row, out in self._pool.map(attempt, part.rows.tolist()):
            if out is None:
                corrupt.append(row)
                self._make(pending, row)
            else:
                pending.own.append((row, out, None))
        self._route[pending.bases[corrupt or part.rows]] = _CPU
        if corrupt:
            return
        self._failures += 1
        if self._failures >= _PATIENCE:
            raise DataError(
                f"DALI failed at {self._failures} batches in which the CPU engine finds nothing wrong; use engine='cpu'; "
                f"DALI says: {reason}"
            )
        warnings.warn(
            f"DALI failed at a batch, which the CPU engine made instead; DALI says: {reason}", stacklevel=4
        )

    def drop(self) -> None:
        """Forget what was submitted, and keep the pipelines for what comes next."""
        while self._pending:
            pending = self._pending.popleft()
            for _, _, future in pending.own:
                if future is not None:
                    future.cancel()
            for kind, part in pending.parts.items():
                if self._output(kind, part)[0] is None:
                    self._pipes.pop(kind)  # it is built anew when it is needed
                    for later in self._pending:
                        later.parts.pop(kind, None)

    def close(self) -> None:
        """Stop threads and pipelines, and forget what was submitted. Batches that were collected stay as they are."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        for _, event in self._copied:
            event.synchronize()
        self._copied.clear()
        self._pipes.clear()  # before the arrays that they read
        self._pending.clear()

    # -- on the finished pixels ------------------------------------------------------------------------------------

    def _assemble(self, pending: _Pending, made: list[tuple[_Part, Any]]) -> torch.Tensor:
        """The uint8 images of a batch in their order; one part alone is the batch."""
        if len(made) == 1 and not pending.own:
            whole: torch.Tensor = made[0][1]
            return whole
        shape = (len(pending.bases), *pending.size, 3)
        if self._device.type == "cpu":
            batch = torch.from_numpy(self._allocate(shape, np.uint8))
        else:
            batch = torch.empty(shape, dtype=torch.uint8, device=self._device)
        for part, images in made:
            batch[torch.from_numpy(part.rows).to(self._device)] = images
        for row, array, _ in pending.own:
            batch[row].copy_(torch.from_numpy(array))
        return batch

    def _finish(self, images: torch.Tensor, pending: _Pending) -> torch.Tensor:
        """The batch from its uint8 images on the CPU, by the kernels of the CPU engine, in slices."""
        table, array, plan = pending.table, images.numpy(), self._plan
        floats = None if self._dtype == torch.uint8 else self._allocate(array.shape, np.float32)
        painted = {row for row, _, _ in pending.own}  # colour and erasing included

        def work(start: int) -> None:
            stop = min(start + step, len(array))
            for row in sorted(set(range(start, stop)) - painted):
                if table.colour is not None and table.coloured[row]:
                    pixels.recolour(array[row], table.colour[row])
                if table.erase.shape[1]:
                    pixels.erase(array[row], table.erase[row], plan.erase_fill)
            if floats is not None:
                pixels.normalise(array[start:stop], *plan.affine, floats[start:stop])

        if table.colour is not None or table.erase.shape[1] or floats is not None:
            step = -(-len(array) // self._threads)
            list(self._pool.map(work, range(0, len(array), step)))
        result = array if floats is None else floats
        if table.mix is not None and table.mix_box is not None:
            pixels.mix(result, table.mix, table.mix_box, np.float32(0.5 if floats is None else 0.0))
        return torch.from_numpy(result).to(self._dtype)

    def _finish_there(self, images: torch.Tensor, pending: _Pending) -> torch.Tensor:
        """The same on any device."""
        table, mine = pending.table, np.ones(len(images), bool)
        mine[[row for row, _, _ in pending.own]] = False
        if table.colour is not None:
            rows = np.flatnonzero(table.coloured & mine)
            on_device.recolour(images, rows, table.colour[rows])
        if table.erase.shape[1]:
            on_device.erase(images, table.erase * mine[:, None, None], self._plan.erase_fill)
        if self._dtype != torch.uint8:
            images = on_device.normalise(images, *self._plan.affine)
        if table.mix is not None and table.mix_box is not None:
            images = on_device.mix(images, table.mix, table.mix_box)
        return images.to(self._dtype)


_FORMS: dict[str, dict[str, Any]] = {"jpeg": {"ndim": 1}, "raw": {"ndim": 3, "layout": "HWC"}}


def _operators() -> tuple[Any, Any]:
    """DALI's modules ``fn`` and ``types``, which fill themselves at import."""
    from nvidia.dali import fn, types

    return fn, types


# -- does decoding of regions work on this GPU -----------------------------------------------------------------------


@cache
def roi_decode_works(device_id: int) -> bool:
    """Whether DALI decodes a region of a JPEG on this GPU; tried once, in a process of its own.

    nvImageCodec 0.9.0.1859 crashes at that. Without it whole images are decoded: the same pixels, and more work.
    """
    return _survives(f"from fastload.engines.dali import _try_roi_decode; _try_roi_decode({int(device_id)})")


def _survives(code: str, seconds: float = _PROBE_SECONDS) -> bool:
    """Whether Python runs ``code`` to its end, in a process of its own."""
    try:
        finished = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, timeout=seconds, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return finished.returncode == 0


def _try_roi_decode(device_id: int | None) -> None:
    """Decode a region and cut it out of the whole image; SystemExit if they differ. May crash."""
    from nvidia.dali.pipeline import Pipeline

    fn, types = _operators()

    y, x = np.mgrid[:256, :320]
    picture = np.stack([y % 256, x % 256, (y + x) % 256], axis=2).astype(np.uint8)
    encoded = codecs.as_bytes(codecs.encode_jpeg(picture))
    window: dict[str, Any] = {"start": [64, 96], "shape": [128, 160], "axes": [0, 1]}
    pipe = Pipeline(
        batch_size=8, num_threads=2, device_id=device_id, prefetch_queue_depth=1, exec_dynamic=True
    )
    with pipe:
        images = fn.external_source(name="images", batch=True, dtype=types.UINT8, ndim=1)
        options = {"device": "cpu" if device_id is None else "mixed"}
        part = fn.decoders.image_slice(images, **options, **window)
        pipe.set_outputs(part, fn.slice(fn.decoders.image(images, **options), **window))
    pipe.build()
    pipe.feed_input("images", [encoded] * 8)
    pipe.schedule_run()
    parts, wholes = (np.asarray(output.as_cpu().as_tensor()).astype(int) for output in pipe.outputs())
    if np.abs(parts - wholes).max() > 8:  # a chroma pixel at the edge may be smoothed otherwise
        raise SystemExit(1)
