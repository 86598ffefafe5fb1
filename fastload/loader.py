"""The loader: batches of a dataset, prefetched by threads, the same to the bit for any number of them.

It knows order, buffers and lifecycle. What a batch looks like is drawn by :mod:`fastload.draws` and executed by an engine.
Leaving the loop early stops the threads; a buffer is used again only when nobody holds its tensor any more.

>>> for images, labels in fastload.Loader("photos.beton", 64, transforms=transforms.train(224), shuffle=True): ...
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastload.batch import Batch, Buffers
from fastload.choose import Choice, choose
from fastload.dataset import Dataset
from fastload.dataset import open as open_dataset
from fastload.draws import Plan
from fastload.engines.cpu import EXACT, Engine, check_uniform
from fastload.engines.profiled import ProfiledEngine
from fastload.errors import DataError, UsageError, unknown
from fastload.feeds import Begun, Drawer, Feed, HostFeed
from fastload.finish import Finisher
from fastload.jobs import Filler, Replaced
from fastload.makers import CpuMaker, EngineMaker, Maker
from fastload.order import Order, balanced_weights
from fastload.stages import COPY, DRAW, MIX, NORMALISE, Clock, Stage, summarise
from fastload.system import pinner, usable_cores
from fastload.transforms import Spec

if TYPE_CHECKING:
    from fastload.device_feed import DeviceFeed

__all__ = ["Batch", "Loader", "Replaced"]

_MOST_CLASSES = 1_000_000
_PASSES = 5  # of a profile
ENGINES = ("cpu", "dali", "cuda", "auto")
_DTYPES = {
    "uint8": torch.uint8,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


class Loader:
    """Iterates over batches of a dataset.

    Args:
        data: a Dataset or the path of a `.beton` file.
        batch_size: samples in a batch; the last one may be smaller unless ``drop_last``.
        transforms: a pipeline (see :mod:`fastload.transforms`); None takes images as they are, which must be of one size.
        shuffle, seed: a new permutation each epoch, a function of (seed, epoch). The seed also keys all augmentation.
        threads: decoding threads; None is one for each usable core.
        indices: use only these samples of ``data``.
        weights: draw with replacement in proportion to them: one number a sample, or "balanced" for equal classes.
        fields: what a batch holds, in order; default ("image", "label"). Also "index", "id", "source".
        device: where tensors go; None leaves them in host memory.
        dtype: "uint8", "float32", "float16" or "bfloat16"; None is float32 with Normalize in the pipeline, else uint8.
        rank, world_size: this process's share of each epoch. With ``drop_last`` all ranks get equally many samples.
        on_error: "raise" stops at a corrupt sample; "replace" puts another in its place, the same in every run, and
            lists it in ``errors``.
        prefetch: batches prepared ahead.
        engine: "cpu"; "dali" (needs ``fastload[dali]``; its pixels are within the tolerance that
            :mod:`fastload.engines.dali` states); "cuda" decodes and augments on the GPU (:mod:`fastload.engines.cuda`; not yet
            run on one); "auto" measures each for a second and takes the fastest (``chosen`` says why).
        decode: "fast" or "exact" (see :mod:`fastload.engines.cpu`).
        pin_threads: keep each thread on a core of its own, which can help where cores have memory of their own (NUMA).
        gpu_decode, cache, vram, ram: of engine "cuda". Who decodes JPEG: "gpu" (nvJPEG), "segments" (our kernels on the GPU),
            "cpu" or "auto", which measures; where the data stay: "device", "host" or None; bytes that this may take (None: 80%
            of what is free). Pixels that all fit on the device are drawn from there without the CPU.

    A batch is a named tuple; images are (B, 3, H, W) in channels_last memory, labels (B,) int64, or (B, C) float32 with
    Mixup, CutMix or a multi-label file; ``batch.index`` (B,) int64 are the base indices of its samples. Raises UsageError
    for wrong arguments; iteration raises CorruptError, naming the sample, for bytes that cannot be decoded.
    """

    def __init__(
        self,
        data: Dataset | str | os.PathLike[str],
        batch_size: int = 64,
        *,
        transforms: Sequence[Spec] | None = None,
        shuffle: bool = False,
        seed: int = 0,
        threads: int | None = None,
        drop_last: bool = False,
        indices: Any = None,
        weights: Any = None,
        fields: Sequence[str] | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        rank: int = 0,
        world_size: int = 1,
        on_error: str = "raise",
        prefetch: int = 2,
        engine: str = "cpu",
        decode: str = "fast",
        pin_threads: bool = False,
        gpu_decode: str = "gpu",
        cache: str | None = None,
        vram: int | None = None,
        ram: int | None = None,
    ) -> None:
        self._owned = not isinstance(data, Dataset)
        dataset = data if isinstance(data, Dataset) else open_dataset(data)
        self.dataset = dataset if indices is None else dataset.subset(indices)
        self.batch_size = _positive("batch_size", batch_size)
        self.threads = usable_cores() if threads is None else _positive("threads", threads)
        self.prefetch = _positive("prefetch", prefetch)
        self.drop_last = bool(drop_last)
        if on_error not in ("raise", "replace"):
            raise UsageError(f"on_error must be 'raise' or 'replace', got {on_error!r}")
        if engine not in ENGINES:
            raise unknown("engine", engine, ENGINES)
        if engine == "cuda" and device is None:
            device = "cuda"
        if cache is not None and engine not in ("cuda", "auto"):
            raise UsageError(
                f"a cache is kept by engine='cuda' only; the page cache serves the others, got {cache!r}"
            )
        if not len(self.dataset):
            raise DataError(
                f"{self.dataset.path} has no samples to load (after indices); nothing to iterate over"
            )
        if transforms is not None and not isinstance(transforms, Sequence):
            raise UsageError(f"transforms must be a list or tuple of transforms, got {transforms!r}")
        self.plan = Plan(transforms)
        if self.plan.size is None:
            check_uniform(self.dataset.heights, self.dataset.widths)
        if isinstance(weights, str):
            if weights != "balanced":
                raise UsageError(f"weights must be numbers or 'balanced', got {weights!r}")
            weights = balanced_weights(self._class_labels())
        elif weights is not None:
            weights = _numbers("weights", weights)
        seed, rank, world_size = (
            _integer("seed", seed),
            _integer("rank", rank),
            _positive("world_size", world_size),
        )
        self._order = Order(len(self.dataset), seed, bool(shuffle), weights, rank, world_size, self.drop_last)
        indices = self.dataset.indices
        repeats = self.dataset.is_view and len(np.unique(indices)) < len(indices)
        # Whether a sample may come twice in an epoch.
        self._repeats = weights is not None or repeats
        self._fields = self._check_fields(fields)
        self.choice: Choice | None = None
        made: Any = None  # an engine that was built in order to be measured
        if engine == "auto":
            kept: dict[str, Any] = {"gpu_decode": gpu_decode, "cache": cache, "vram": vram, "ram": ram}
            on_gpu = device is not None and str(device).startswith("cuda")
            names = ["cpu", "dali", *(["cuda"] if on_gpu else [])]
            options: dict[str, Any] = {
                "batch_size": batch_size, "transforms": transforms, "shuffle": shuffle, "seed": seed, "threads": threads,
                "weights": weights, "fields": ("index", self.dataset.image_field), "device": device, "dtype": dtype,
                "on_error": on_error, "prefetch": prefetch, "decode": decode, "pin_threads": pin_threads,
            }  # fmt: skip
            if self.plan.mixers:  # they change labels, which must then be there
                options["fields"] = ("index", self.dataset.image_field, "label")
            self.choice, fastest = choose({
                name: partial(Loader, self.dataset, engine=name, **options, **(kept if name == "cuda" else {}))
                for name in names
            })  # fmt: skip
            engine, made = self.choice.name, fastest._hand_over()
        # The other engines decode as "exact" does, and so must whatever they leave to the CPU.
        engine_of_threads = Engine(self.dataset, self.plan, decode if engine == "cpu" else EXACT)
        self._decode, self._replace = decode, on_error == "replace"
        if pin_threads and not hasattr(os, "sched_setaffinity"):
            raise UsageError(
                "pin_threads needs Linux: this system cannot keep a thread on one core, got True"
            )
        self._pin = pinner() if pin_threads else None
        self._drawer = Drawer(self.dataset, self.plan, self._order, self._repeats)
        self._filler = Filler(self.dataset, self.plan, seed, engine_of_threads, self._replace)
        self.engine = engine
        try:
            self.device = None if device is None else torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise UsageError(
                f"device must be 'cpu', 'cuda', 'cuda:1', 'mps' or so, got {device!r}"
            ) from error
        self.dtype = self._check_dtype(dtype)
        classes = self._count_classes() if self.plan.mixers else 0
        cuda = self.device is not None and self.device.type == "cuda"
        if cuda and not torch.cuda.is_available():
            raise UsageError("device 'cuda' is not available here; see: fastload doctor")
        if cuda and self.device is not None and self.device.index is None:
            # Its number, since each thread has a current device of its own.
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._buffers = Buffers(pinned=cuda)
        self._finisher = Finisher(
            self.dataset, self.plan, self._fields, self.dtype, self.device, self._buffers, classes
        )
        self._engine: EngineMaker | None = None
        self._device_feed: DeviceFeed | None = None
        self._own_choice = ""
        if engine != "cpu":
            # What it lacks is said here, not in the middle of a training.
            made = made or self._build_engine(decode=gpu_decode, cache=cache, vram=vram, ram=ram)
            try:
                self._device_feed = self._on_device(made)
            except BaseException:
                made.close()
                raise
            self._engine = EngineMaker(made, self._filler)
            self._own_choice = getattr(made, "chosen", "")
            if self._device_feed is not None:
                self._own_choice += "; batches are drawn and made there, without the CPU"
        self.epoch = 0
        self._position = 0  # samples of this rank that were handed out in `epoch`
        self._started = False
        self._resumed = False
        self._closed = False
        self._turn = 0  # which iterator is the current one
        self._stats = {"wait_s": 0.0, "batches": 0, "samples": 0}

    # -- what it is ------------------------------------------------------------------------------------------------

    @property
    def num_samples(self) -> int:
        """Samples of this rank in one epoch."""
        count = len(self._order)
        return count // self.batch_size * self.batch_size if self.drop_last else count

    def __len__(self) -> int:
        """Batches of this rank in one epoch."""
        return -(-self.num_samples // self.batch_size)

    def __repr__(self) -> str:
        return (
            f"Loader({self.dataset.path}, {self.num_samples:,} samples in {len(self):,} batches of {self.batch_size}, "
            f"{self.threads} threads, epoch {self.epoch})"
        )

    @property
    def seed(self) -> int:
        """The seed of order and augmentation."""
        return self._order.seed

    @property
    def chosen(self) -> str:
        """What was chosen by measuring, by budget or by default, and why."""
        measured = "" if self.choice is None else str(self.choice)
        return (
            "; ".join(part for part in (measured, self._own_choice) if part)
            or f"engine {self.engine!r}, as asked for"
        )

    @property
    def errors(self) -> list[Replaced]:
        """Corrupt samples that were replaced so far."""
        return self._filler.errors

    def stats(self) -> dict[str, float]:
        """Of the current or last epoch: seconds the consumer waited for batches (``wait_s``), batches, samples."""
        return dict(self._stats)

    # -- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, int]:
        """Where the consumer is: seed, epoch, and samples of this rank already handed out in it."""
        if self._position >= self.num_samples:
            return {"seed": self.seed, "epoch": self.epoch + 1, "position": 0}
        return {"seed": self.seed, "epoch": self.epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from :meth:`state_dict`; the next iteration starts there. Threads and prefetch may differ."""
        try:
            seed, epoch, position = (int(state[key]) for key in ("seed", "epoch", "position"))
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"a loader's state has seed, epoch and position, got {state!r}") from error
        if seed != self.seed:
            raise UsageError(f"the state belongs to seed {seed}, and this loader has seed {self.seed}")
        if epoch < 0 or not 0 <= position <= self.num_samples:
            raise UsageError(f"position {position} of epoch {epoch} is outside of {self.num_samples} samples")
        if position % self.batch_size and position != self.num_samples:
            raise UsageError(
                f"position {position} is not at the end of a batch of {self.batch_size}; use the batch size it was saved with"
            )
        self.epoch, self._position, self._started, self._resumed = epoch, position, False, True
        self._turn += 1

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is this epoch, from its beginning."""
        if epoch < 0:
            raise UsageError(f"an epoch is 0 or more, got {epoch}")
        self.epoch, self._position, self._started, self._resumed = int(epoch), 0, False, False
        self._turn += 1

    # -- iteration -------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Any]:
        if self._closed:
            raise UsageError("this loader was closed; make a new one")
        if self._started:
            self.epoch, self._position = self.epoch + 1, 0
        elif not self._resumed:
            self._position = 0
        if self._position >= self.num_samples > 0:
            self.epoch, self._position = self.epoch + 1, 0
        self._started, self._resumed = True, False
        self._stats = {"wait_s": 0.0, "batches": 0, "samples": 0}
        self._turn += 1
        return self._run(self.epoch, self._position, self._turn)

    def _run(self, epoch: int, start: int, turn: int) -> Iterator[Any]:
        starts = iter(range(start, self.num_samples, self.batch_size))
        jobs: deque[Begun] = deque()
        feed = self._feed()

        def begin(at: int) -> Begun:
            begun: Begun = feed.begin(epoch, at, min(at + self.batch_size, self.num_samples))
            return begun

        try:
            for at in starts:
                jobs.append(begin(at))
                if len(jobs) > self.prefetch:
                    break
            while jobs and not self._closed:
                if feed.single and self._turn != turn:
                    raise UsageError(
                        f"another iteration of this loader has begun, and engine {self.engine!r} makes one at a time; "
                        "use a loader for each, or engine='cpu'"
                    )
                clock = time.perf_counter()
                job = jobs.popleft()
                batch = feed.end(job)
                following = next(starts, None)
                if following is not None:
                    jobs.append(begin(following))
                if self._turn == turn:  # an older iterator no longer says where the loader is
                    self._position = job.stop
                self._stats["wait_s"] += time.perf_counter() - clock
                self._stats["batches"] += 1
                self._stats["samples"] += job.count
                del job
                yield batch
                del batch  # the consumer may let go of it while the next one is being made
            self._drawer.was_read()
        finally:
            if not feed.single or self._turn == turn:  # else what it holds is the later iteration's
                feed.stop(jobs)

    def close(self) -> None:
        """Free the buffers, and the file if this loader opened it; a running iterator ends at its next step."""
        self._closed = True
        if self._device_feed is not None:
            self._device_feed.close()
        if self._engine is not None:
            self._engine.close()
        self._buffers.clear()
        if self._owned:
            self.dataset.close()

    def _feed(self) -> Feed:
        """Where the batches of an iteration come from."""
        if self._device_feed is not None:
            return self._device_feed
        maker: Maker
        if self._engine is None:
            maker = CpuMaker(
                self._filler, self._finisher, self._buffers, self.threads, self.prefetch, self._pin
            )
        else:
            maker = self._engine
            maker.stop(())  # what an iteration that was left has begun
        return HostFeed(self._drawer, maker, self._finisher, single=self._engine is not None)

    def _hand_over(self) -> Any:
        """The engine, None for the CPU's, for another loader of the same options; this one is closed."""
        engine = None if self._engine is None else self._engine.engine
        self._engine = None
        self.close()
        return engine

    def _on_device(self, engine: Any) -> DeviceFeed | None:
        """The feed of an engine that needs no host, None for others."""
        if not getattr(engine, "holds_all", False):
            return None
        from fastload.device_feed import DeviceFeed

        return DeviceFeed(
            engine, self.plan, self._order, self.dataset, self._finisher, batch_size=self.batch_size,
            count=self.num_samples, repeats=self._repeats,
        )  # fmt: skip

    def _build_engine(self, **of_cuda: Any) -> Any:
        """The engine by its name, with the options of this loader."""
        if self.engine == "cuda":
            from fastload.engines.cuda import CudaEngine

            return CudaEngine(
                self.dataset, self.plan, batch_size=self.batch_size, threads=self.threads, device=self.device or "cuda",
                prefetch=self.prefetch, dtype=self.dtype, **of_cuda,
            )  # fmt: skip
        from fastload.engines.dali import DaliEngine

        cuda = self.device is not None and self.device.type == "cuda"
        return DaliEngine(
            self.dataset, self.plan, batch_size=self.batch_size, threads=self.threads,
            device_id=(self.device.index or 0) if self.device is not None and cuda else None, prefetch=self.prefetch,
            dtype=self.dtype, allocate=self._buffers.take if not cuda else np.empty,
        )  # fmt: skip

    def profile(self, images: int = 256) -> list[Stage]:
        """Seconds and bytes an image of each step of the work, on the calling thread alone.

        After a warm-up, five passes over successive stretches of the current epoch, of ``images`` images together or a
        batch each where that is more; the median of each stage. The iteration is left where it is. The stages add up to the
        time that one thread needs for an image; with more threads all but draw, mix and copy are shared out.
        """
        rows = min(self.batch_size, _positive("images", images), self.num_samples)
        if self._closed or not rows:
            raise UsageError(
                "there is nothing to profile: this loader is closed, or has fewer samples than a batch"
            )
        engine = ProfiledEngine(self.dataset, self.plan, Clock(), self._decode)
        filler = Filler(self.dataset, self.plan, self.seed, engine, self._replace)
        per_pass = max(1, images // _PASSES // rows)
        starts = self._stretches(rows)
        passes = []
        for _ in range(1 + _PASSES):
            engine.clock = Clock()
            for _ in range(per_pass):
                self._timed_batch(next(starts), rows, filler, engine.clock)
            passes.append(engine.clock)
        return summarise(passes[1:], per_pass * rows)

    def _stretches(self, rows: int) -> Iterator[int]:
        """Where batches of ``rows`` samples begin, epoch after epoch."""
        while True:
            yield from range(0, self.num_samples - rows + 1, rows)

    def _timed_batch(self, start: int, rows: int, filler: Filler, clock: Clock) -> Any:
        """The batch that the threads would make, made here; what the engine does not mark is marked here."""
        job = self._drawer.draw(self.epoch, start, start + rows)
        CpuMaker(self._filler, self._finisher, self._buffers, 1, 1, None).allocate(job)
        clock.mark(DRAW)
        filler.fill(job, 0, rows)
        clock.skip()
        array = self._finisher.mix(job)
        if self.plan.mixers:
            clock.mark(MIX, array.nbytes)
        copied = self._finisher.copy(array)
        if copied.device.type != "cpu":
            self._wait()
            clock.mark(COPY, array.nbytes)
        images = self._finisher.convert(copied)
        if images is not copied:
            self._wait()
            clock.mark(NORMALISE, images.nbytes)
        batch = self._finisher.batch(job, images)
        self._wait()
        clock.mark(DRAW)
        return batch

    def _wait(self) -> None:
        """Until the device has done what it was given: a clock must not stop before."""
        if self.device is not None and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device is not None and self.device.type == "mps":
            torch.mps.synchronize()

    # -- checks ----------------------------------------------------------------------------------------------------

    def _class_labels(self) -> np.ndarray:
        labels = self.dataset.labels
        if labels.ndim != 1:
            raise UsageError(
                "weights='balanced' needs one label a sample; give numbers for a multi-label file"
            )
        return labels

    def _count_classes(self) -> int:
        if "label" not in self._fields:
            raise UsageError("Mixup and CutMix change labels: fields must include 'label'")
        labels = self.dataset.labels
        count = labels.shape[1] if labels.ndim == 2 else max(len(self.dataset.classes), int(labels.max()) + 1)
        if count > _MOST_CLASSES:
            raise DataError(
                f"labels up to {count - 1} would make soft targets of that length; number the classes from 0"
            )
        return int(count)

    def _check_fields(self, fields: Sequence[str] | None) -> tuple[str, ...]:
        image = self.dataset.image_field
        if fields is None:
            return (image, "label") if "label" in self.dataset.fields else (image,)
        known = [*self.dataset.fields, "index", "id", "source"]
        for name in fields:
            if name not in known:
                raise unknown("field", name, known)
            if name in self.dataset.fields and self.dataset.fields[name].kind == "image" and name != image:
                raise UsageError(
                    f"a loader decodes one image field ({image!r}), and fields asks for {name!r} too"
                )
        if not fields or len(set(fields)) != len(fields):
            raise UsageError(f"fields must name each field once, got {list(fields)!r}")
        return tuple(fields)

    def _check_dtype(self, dtype: str | torch.dtype | None) -> torch.dtype:
        if dtype is None:
            return torch.uint8 if self.plan.normalize is None else torch.float32
        chosen = _DTYPES.get(str(dtype).removeprefix("torch."))
        if chosen is None:
            raise unknown("dtype", dtype, _DTYPES)
        if chosen == torch.uint8 and self.plan.normalize is not None:
            raise UsageError(
                "uint8 cannot hold normalised pixels: leave Normalize out, or ask for a float dtype"
            )
        return chosen


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise UsageError(f"{name} must be an integer, got {value!r}")
    return int(value)


def _positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise UsageError(f"{name} must be an integer of 1 or more, got {value!r}")
    return int(value)


def _numbers(name: str, values: Any) -> np.ndarray:
    try:
        return np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"{name} must be numbers, one a sample, or 'balanced', got {values!r:.80}"
        ) from error
