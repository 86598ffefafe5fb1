"""How large, how long, how fast: a sample of the images converted in several ways, measured, and scaled to all of them.

The loader's figure is for the usual training crop (random resized crop to 224 pixels and flip, uint8), with the file in the page cache,
so it is the most that a disk can give. It costs a minute, where a wrong guess costs a day of conversion.

>>> print(plan("photos/", sample=200))
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from tqdm.auto import tqdm

from fastload.converter import ConvertOptions, ConvertReport, convert_source, estimate, make_options
from fastload.errors import UsageError
from fastload.sources import open_source

_SIZES = (None, 500, 256)
_LOADER_SECONDS = 2.0  # how long each way is loaded for its figure
_CROP = 224


@dataclass(frozen=True)
class PlanRow:
    """One way to store the images. ``bytes`` and ``seconds`` are for the whole set, scaled up from the sample."""

    store: str
    max_side: int | None
    bytes: float
    seconds: float
    loader_images_per_s: float


@dataclass(frozen=True)
class Plan:
    """The measured table. ``images`` is the whole set's number, ``sample`` the number that was converted for each row."""

    images: int
    sample: int
    threads: int
    memory_bytes: int
    rows: list[PlanRow]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        head = f"{'store':<6} {'max side':>8} {'size':>10} {'in memory':>10} {'convert':>9} {'loader images/s':>16}"
        lines = [
            f"{self.images:,} images, from a sample of {self.sample:,}; {self.threads} threads; loader: random crop to {_CROP} and flip",
            head,
            "-" * len(head),
        ]
        for row in self.rows:
            side = "as is" if row.max_side is None else str(row.max_side)
            fits = "fits" if row.bytes < 0.8 * self.memory_bytes else "no"
            lines.append(
                f"{row.store:<6} {side:>8} {_size(row.bytes):>10} {fits:>10} {_duration(row.seconds):>9} "
                f"{row.loader_images_per_s:>16,.0f}"
            )
        return "\n".join(lines)


def plan(src: Any, *, sample: int = 200, sizes: Sequence[int | None] = _SIZES, **options: Any) -> Plan:
    """Convert a sample of ``src`` in every store and size and measure each; takes the options of :func:`convert`.

    ``sizes`` are longest sides in pixels, None for as is; ``max_side`` in the options is one more. ``store`` in the options is not
    used. Images that cannot be read are left out of the sample. Writes to a temporary folder only.
    """
    if sample < 1:
        raise UsageError(f"sample must be at least 1 image, got {sample!r}")
    opts = make_options(**options)
    if opts.image.short_side is not None:
        raise UsageError(f"a plan compares longest sides; leave short_side out, got {opts.image.short_side}")
    if opts.image.reencode == "never":
        raise UsageError("a plan compares sizes, which reencode never rules out; leave it out, got 'never'")
    if opts.image.max_side is not None and opts.image.max_side not in sizes:
        sizes = [*sizes, opts.image.max_side]
    folder = tempfile.mkdtemp(prefix="fastload-plan-")
    source = open_source(src, opts.source, progress=opts.progress)
    try:
        total = len(source) if opts.limit is None else min(opts.limit, len(source))
        indices = list(range(0, total, max(1, total // sample)))[:sample]
        base = replace(opts, indices=indices, limit=None, on_error="skip", progress=False, resume=False)

        def make(store: str, side: int | None) -> tuple[str, ConvertReport]:
            path = os.path.join(folder, f"{store}-{side}.beton")
            way = replace(base, image=replace(opts.image, store=store, max_side=side))
            # Listed once for all: it takes the time of the whole set, which must not be scaled up with the sample's.
            return path, convert_source(source, path, way, time.perf_counter())

        make(
            "jpeg", 64
        )  # compiles or loads the kernels and reads the files, so that the first row is like the others
        rows, written = [], 0
        ways = [(store, side) for store in ("jpeg", "raw") for side in sizes]
        for store, side in tqdm(ways, desc="plan", unit="way", disable=not opts.progress, delay=1):
            path, report = make(store, side)
            written = report.written
            size, seconds = estimate(report, total)
            rows.append(PlanRow(store, side, size, seconds, _measure(path, opts)))
            os.unlink(path)
        return Plan(total, written, opts.threads, _memory(), rows)
    finally:
        source.close()
        shutil.rmtree(folder, ignore_errors=True)


def _measure(path: str, opts: ConvertOptions) -> float:
    """Images per second of whole epochs, after one epoch that warms the kernels."""
    from fastload import transforms
    from fastload.loader import Loader

    pipeline = (transforms.RandomResizedCrop(_CROP), transforms.HorizontalFlip())
    loader = Loader(path, batch_size=32, transforms=pipeline, shuffle=True, threads=opts.threads)
    try:
        for _ in loader:
            pass
        seen, started = 0, time.perf_counter()
        while (spent := time.perf_counter() - started) < _LOADER_SECONDS or not seen:
            for batch in loader:
                seen += len(batch.index)
        return seen / max(spent, 1e-9) if spent else 0.0
    finally:
        loader.close()


def _memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
