"""Images in, one ``.beton`` file out: in parallel, in order, in flat memory, and able to go on after a kill.

Worker threads read, decode and encode (the codecs release the GIL); this thread lists samples and writes results in source order. So
the bytes of the file do not depend on the number of workers, and nothing in it tells when, where or on which machine it was made. At
most a few images per worker are in memory.

>>> print(convert("photos/", "photos.beton", max_side=500))
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from fastload import __version__
from fastload.beton import Field, Writer
from fastload.convert_image import ImageOptions, Stored, store_image
from fastload.errors import CorruptError, DataError, UsageError, unknown
from fastload.sources import Sample, Source, SourceOptions, open_source
from fastload.system import usable_cores

_TASK_BYTES = 1 << 18  # images of one task: many small ones, or a single large one
_TASK_IMAGES = 32
_TASKS_PER_WORKER = 4  # how far reading runs ahead of writing
_READY_BYTES = 1 << 28  # encoded images that may wait for their turn
_FULL = (errno.ENOSPC, errno.EDQUOT)
_SHOWN = 20  # skipped files in the summary; the JSON has them all


@dataclass(frozen=True)
class ConvertOptions:
    """All that ``convert`` takes besides source and target; see there."""

    source: SourceOptions = field(default_factory=SourceOptions)
    image: ImageOptions = field(default_factory=ImageOptions)
    on_error: str = "raise"
    workers: int | None = None
    resume: bool = False
    overwrite: bool = False
    limit: int | None = None
    indices: Sequence[int] | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        if self.on_error not in ("raise", "skip"):
            raise UsageError(f"on_error must be raise or skip, got {self.on_error!r}")
        if self.workers is not None and self.workers < 1:
            raise UsageError(f"workers must be at least 1, got {self.workers!r}")
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"limit must be at least 1, got {self.limit!r}")
        if self.limit is not None and self.indices is not None:
            raise UsageError(f"give limit or indices, not both, got limit {self.limit!r}")

    @property
    def threads(self) -> int:
        """Worker threads: as asked, or one for each core this process may use."""
        if self.workers is not None:
            return self.workers
        return usable_cores()


def make_options(**options: Any) -> ConvertOptions:
    """Flat keywords as ``ConvertOptions``; an unknown one is a UsageError with the nearest known names."""
    groups: dict[str, dict[str, Any]] = {"source": {}, "image": {}, "": {}}
    places = dict.fromkeys(SourceOptions.__dataclass_fields__, "source")
    places.update(dict.fromkeys(ImageOptions.__dataclass_fields__, "image"))
    places.update({name: "" for name in ConvertOptions.__dataclass_fields__ if name not in groups})
    for name, value in options.items():
        if name not in places:
            raise unknown("option", name, places)
        if name in ("labels", "classes", "crop_box") and value is not None:
            value = (value,) if isinstance(value, str) else tuple(str(v) for v in value)
        groups[places[name]][name] = os.fspath(value) if name == "root" and value is not None else value
    source, image = SourceOptions(**groups["source"]), ImageOptions(**groups["image"])
    if image.crop_margin and source.crop_box is None and options.get("crop_margin"):
        raise UsageError(f"crop_margin needs the columns of a crop_box, got {image.crop_margin!r} alone")
    if source.crop_box is not None and image.reencode == "never":
        raise UsageError(f"reencode never cannot crop; use auto, got crop_box {','.join(source.crop_box)!r}")
    return ConvertOptions(source=source, image=image, **groups[""])


@dataclass(frozen=True)
class ConvertReport:
    """What became of every image. ``bytes`` is the file's size; ``storage`` counts this run's images by how they were stored.

    ``skipped`` has one ``{"id", "source", "reason"}`` per image left out; ``ignored`` counts files that are no images by kind.
    ``resumed_at`` is the number of items that an earlier, interrupted run had done.
    """

    path: str
    written: int
    skipped: list[dict[str, Any]]
    bytes: int
    seconds: float
    images_per_s: float
    storage: dict[str, int] = field(default_factory=dict)
    ignored: dict[str, int] = field(default_factory=dict)
    classes: dict[str, list[str]] = field(default_factory=dict)
    resumed_at: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {self.written:,} images, {self.bytes / 1e6:,.1f} MB, "
            f"{self.seconds:.1f} s ({self.images_per_s:,.0f} images/s)"
        ]
        names = {
            "kept": "JPEG kept losslessly",
            "encoded": "encoded as JPEG",
            "raw": "stored raw",
            "copied": "copied",
        }
        stored = [f"{n:,} {names[how]}" for how, n in self.storage.items() if n]
        if stored:
            lines.append("  stored: " + ", ".join(stored))
        if self.resumed_at:
            lines.append(f"  went on after {self.resumed_at:,} items of an earlier run")
        if "label" in self.classes:
            lines.append(f"  classes: {len(self.classes['label'])}")
        if self.ignored:
            lines.append(
                "  left out, no images: " + ", ".join(f"{n:,} {kind}" for kind, n in self.ignored.items())
            )
        if self.skipped:
            lines.append(f"  skipped: {len(self.skipped):,}")
            lines.extend(f"    {r['source']}: {r['reason']}" for r in self.skipped[:_SHOWN])
            if len(self.skipped) > _SHOWN:
                lines.append(f"    ... and {len(self.skipped) - _SHOWN:,} more in {self.path}.report.json")
        return "\n".join(lines)


def convert(src: Any, dst: str | os.PathLike[str], **options: Any) -> ConvertReport:
    """Convert ``src`` to the file ``dst`` and say what happened; the report is also written to ``DST.report.json``.

    ``src`` is a folder of class folders, a flat folder, a CSV file, WebDataset tar shards (``"train-{000..012}.tar"``), a ``.beton``
    file, or an object with ``__len__`` and ``__getitem__``. Options, each with its default:

    - labels: ``label_from="auto"`` (class folders, a ``label`` column, ``.cls`` files), ``"parent"``, ``"none"``, ``"column:NAME"``,
      ``"regex:PATTERN"`` with named groups; ``labels=()``; ``label_sep=None`` (multi-label); ``classes=None`` (names in order)
    - CSV: ``path_column=None``, ``id_column=None``, ``root=None``, ``crop_box=None`` (four columns), ``crop_margin=0``,
      ``crop_format="xyxy"|"xywh"|"rel"``; tar: ``shard_ids=False``
    - pixels: ``max_side=None``, ``short_side=None``, ``quality=90``, ``store="auto"|"jpeg"|"raw"``,
      ``reencode="auto"|"always"|"never"`` (see :class:`ImageOptions`)
    - running: ``on_error="raise"|"skip"``, ``workers=None`` (all cores), ``resume=False``, ``overwrite=False``, ``limit=None``,
      ``indices=None`` (positions in the source), ``progress=True``

    Raises UsageError for a wrong call, DataError for wrong data; then no file appears under the name ``dst``.
    """
    started = time.perf_counter()
    opts = make_options(**options)
    path = os.fspath(dst)
    _check_target(path, src, opts)
    source = open_source(src, opts.source, progress=opts.progress)
    try:
        return convert_source(source, path, opts, started)
    finally:
        source.close()


def convert_source(source: Source, path: str, opts: ConvertOptions, started: float) -> ConvertReport:
    """Convert a source that is open already; ``started`` (``time.perf_counter()``) is when the work began."""
    chosen = _chosen(source, opts)
    if opts.on_error == "raise":
        for i in chosen if source.errors else ():
            if i in source.errors:
                sample = source.sample(i)
                raise _failure(sample, DataError(source.errors[i]))
    fields = [Field("image", "image"), *source.fields]
    writer = Writer(
        path, fields, len(chosen), fingerprint=_fingerprint(source, opts, chosen), resume=opts.resume
    )
    storage: Counter[str] = Counter()
    begun = writer.consumed
    try:
        bar = tqdm(
            total=len(chosen), initial=begun, unit="img", desc="convert", disable=not opts.progress, delay=1
        )
        # Closed here and not by the garbage collector: no thread may read on when the source is closed.
        with bar, contextlib.closing(_results(source, chosen[begun:], opts)) as results:
            for sample, result in results:
                if isinstance(result, Stored):
                    writer.add({**sample.values, "image": result.image}, id=sample.id, source=sample.source)
                    storage[result.how] += 1
                elif opts.on_error == "raise":
                    raise _failure(sample, result)
                else:
                    writer.skip({"id": sample.id, "source": sample.source, "reason": _reason(result)})
                bar.update()
        if not writer.count:
            first = writer.skipped[0]
            raise DataError(
                f"none of the {len(chosen):,} images could be read; the first, {first['source']}: {first['reason']}"
            )
        writer.finish(_info(source, opts))
    except BaseException as error:
        stopped = not isinstance(error, Exception)  # Ctrl-C: what is done is worth keeping
        full = isinstance(error, OSError) and error.errno in _FULL
        used = os.path.getsize(f"{path}.partial") if full and os.path.exists(f"{path}.partial") else 0
        _abort(writer, keep=opts.resume or stopped)
        if full:
            raise _disk_full(path, used, writer.consumed, len(chosen)) from error
        raise
    seconds = time.perf_counter() - started
    report = ConvertReport(
        path,
        writer.count,
        list(writer.skipped),
        os.path.getsize(path),
        seconds,
        (writer.consumed - begun) / max(seconds, 1e-9),
        {how: storage[how] for how in ("kept", "encoded", "raw", "copied")},
        dict(source.ignored),
        source.classes,
        begun,
    )
    _write_report(report)
    return report


def _results(
    source: Source, chosen: Sequence[int], opts: ConvertOptions
) -> Generator[tuple[Sample, Stored | Exception], None, None]:
    """(sample, stored image or what went wrong) in source order, worked out by threads that run a bounded distance ahead."""

    def work(samples: list[Sample]) -> list[Stored | Exception]:
        return [_attempt(sample, opts.image) for sample in samples]

    pool = ThreadPoolExecutor(opts.threads, thread_name_prefix="fastload-convert")
    window: deque[tuple[list[Sample], Future[list[Stored | Exception]]]] = deque()
    tasks = _tasks(source, chosen)
    ahead, largest = opts.threads, 0
    try:
        more = True
        while more or window:
            while more and len(window) < ahead:
                samples = next(tasks, None)
                if samples is None:
                    more = False
                else:
                    window.append((samples, pool.submit(work, samples)))
            if window:
                samples, future = window.popleft()
                results = future.result()
                # Every task ahead may be finished and wait for a slow first one: as many as fit into memory then.
                largest = max(
                    largest, 1, sum(memoryview(r.image.data).nbytes for r in results if isinstance(r, Stored))
                )
                ahead = min(max(opts.threads, _READY_BYTES // largest), opts.threads * _TASKS_PER_WORKER)
                yield from zip(samples, results)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _tasks(source: Source, chosen: Sequence[int]) -> Iterator[list[Sample]]:
    task: list[Sample] = []
    size = 0
    for i in chosen:
        try:
            sample = source.sample(i)
        except (DataError, OSError) as error:  # its fields are damaged; the image may be as well
            sample = Sample(f"item {i}", f"item {i}", {}, bytes, error=_reason(error))
        task.append(sample)
        size += sample.size or _TASK_BYTES // 4
        if size >= _TASK_BYTES or len(task) == _TASK_IMAGES:
            yield task
            task, size = [], 0
    if task:
        yield task


def _attempt(sample: Sample, options: ImageOptions) -> Stored | Exception:
    """Errors of the data are results; anything else is a bug of ours and is raised where the results are read."""
    if sample.error is not None:
        return DataError(sample.error)
    try:
        return store_image(sample.load(), options, sample.box)
    except (DataError, OSError) as error:
        return error


def _reason(error: Exception) -> str:
    return error.reason if isinstance(error, CorruptError) else str(error)


def _failure(sample: Sample, error: Exception) -> DataError:
    failure = DataError(
        f"{sample.source}: {_reason(error)}; mend or remove it, or leave such images out with --on-error skip"
    )
    failure.__cause__ = error
    return failure


def _chosen(source: Source, opts: ConvertOptions) -> Sequence[int]:
    count = len(source)
    if opts.indices is None:
        return range(count if opts.limit is None else min(count, opts.limit))
    chosen = [int(i) for i in opts.indices]
    wrong = [i for i in chosen if not 0 <= i < count]
    if wrong or not chosen:
        raise UsageError(
            f"indices must be positions from 0 to {count - 1}, got {wrong[0] if wrong else chosen!r}"
        )
    if len(set(chosen)) != len(chosen):
        twice = next(i for i, n in Counter(chosen).items() if n > 1)
        raise UsageError(f"indices must differ, because each gives one id; got {twice} twice")
    return chosen


def _fingerprint(source: Source, opts: ConvertOptions, chosen: Sequence[int]) -> str:
    """Names this very work: what would change the file, and not how many workers do it."""
    hasher = hashlib.blake2b(digest_size=16)
    where = list(chosen) if opts.indices is not None else len(chosen)
    plain = {**asdict(opts.source), "root": None}
    hasher.update(json.dumps([__version__, plain, asdict(opts.image), opts.on_error, where]).encode())
    hasher.update(source.fingerprint().encode())
    return hasher.hexdigest()


def _info(source: Source, opts: ConvertOptions) -> dict[str, Any]:
    info: dict[str, Any] = {
        "classes": source.classes,
        "encoding": asdict(opts.image),
        "created_by": f"fastload {__version__}",
        "source_kind": source.kind,
        "label_from": opts.source.label_from,
    }
    if source.titles:
        info["field_titles"] = source.titles
    return info


def _check_target(path: str, src: Any, opts: ConvertOptions) -> None:
    target = Path(path)
    folder = target.absolute().parent
    if target.is_dir():
        raise UsageError(f"{path} is a folder; name a file in it, such as {target / 'images.beton'}")
    if not folder.is_dir():
        raise UsageError(f"the folder {folder} does not exist; make it first: mkdir -p {folder}")
    if not os.access(folder, os.W_OK):
        raise UsageError(f"the folder {folder} is not writable; choose another place for {target.name}")
    if (
        isinstance(src, str | os.PathLike)
        and target.exists()
        and os.path.exists(src)
        and os.path.samefile(src, path)
    ):
        raise UsageError(f"source and target are one file; choose another name than {path}")
    if target.exists() and not opts.overwrite:
        raise UsageError(f"{path} exists already; choose another name, or replace it with --overwrite")


def _abort(writer: Writer, keep: bool) -> None:
    try:
        writer.abort(keep)
    except OSError:
        if keep:  # the last samples did not reach the disk; the journal tells how many did
            return
        raise


def _disk_full(path: str, used: int, done: int, total: int) -> DataError:
    """Says how much room the whole file would take, from what the images so far took."""
    folder = os.path.dirname(os.path.abspath(path))
    free = shutil.disk_usage(folder).free
    need = f"about {used / done * total / 1e6:,.1f} MB" if used and done else "more room"
    return DataError(
        f"the disk is full: {path} needs {need}, and {folder} has {free / 1e6:,.1f} MB left; make room or choose "
        "another place"
    )


def _write_report(report: ConvertReport) -> None:
    path = f"{report.path}.report.json"
    partial = f"{path}.partial"
    try:
        with open(partial, "w", encoding="utf-8") as file:
            json.dump(report.to_json(), file, indent=1, ensure_ascii=False)
            file.write("\n")
        os.replace(partial, path)
    except OSError as error:
        raise DataError(
            f"{report.path} is complete, but its report {path} cannot be written ({error.strerror})"
        ) from error


def estimate(report: ConvertReport, total: int) -> tuple[float, float]:
    """Bytes and seconds that ``total`` images would take, given a report of a sample of them."""
    factor = total / max(report.written, 1)
    return report.bytes * factor, report.seconds * factor
