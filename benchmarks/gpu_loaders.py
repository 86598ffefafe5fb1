"""The GPU suite's loaders: opened in one place, their pixels held against the CPU engine's, then measured in turns; alone and with a model.

A loader is checked before and after it was measured, since decoders on a GPU have been seen to give wrong pixels only under load. The
trade-off of that check is a tolerance: other decoders differ in colour at edges by a level or two, and a wrong crop by tens.

>>> open_loader(dataset, "hybrid", Shape(224, 256, 16), "cuda")
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fastload.benchmarks.gpu_suite import NotRun, row
from fastload.benchmarks.harness import MIN_ROUNDS, Series, interleave
from fastload.benchmarks.pairing import Pair, Setting, Stream, steps_for
from fastload.benchmarks.workloads import thread_counts
from fastload.errors import FastloadError, UsageError

if TYPE_CHECKING:
    from fastload.benchmarks.gpu import Rig
    from fastload.dataset import Dataset

# What is given to the Loader for each arm.
ARMS: dict[str, dict[str, Any]] = {
    "cpu": {"engine": "cpu"},
    "cuda": {"engine": "cuda", "gpu_decode": "gpu", "cache": None},
    "segments": {"engine": "cuda", "gpu_decode": "segments", "cache": None},
    "hybrid": {"engine": "cuda", "gpu_decode": "cpu", "cache": None},
    "dali": {"engine": "dali"},
    "encoded": {"engine": "cuda", "gpu_decode": "segments", "cache": "device"},
    "resident": {"engine": "cuda", "gpu_decode": "cpu", "cache": "device"},
}
CACHED = ("encoded", "resident")  # these do not read the file in each epoch
TITLES = {
    "cpu": "CPU engine",
    "cuda": "cuda, nvJPEG decodes",
    "segments": "cuda, our kernels decode",
    "hybrid": "cuda, the CPU decodes",
    "dali": "dali",
    "encoded": "encoded in GPU memory",
    "resident": "resident in GPU memory",
}
# Mean difference to the CPU engine's exact pixels, in levels of 255, for JPEG and for stored pixels.
TOLERANCE = {"jpeg": 2.5, "raw": 0.6}
LEAST_BATCHES = 8  # of a round
CHECKED = 3  # batches of an epoch that are compared


@dataclass(frozen=True)
class Shape:
    """What a loader makes, and with how many threads. ``dtype`` "uint8" leaves Normalize out."""

    size: int
    batch: int
    threads: int
    dtype: str = "float16"

    @property
    def pipeline(self) -> tuple[Any, ...]:
        from fastload import transforms
        from fastload.benchmarks.pipelines import without_normalize

        steps = transforms.train(self.size)
        return without_normalize(steps) if self.dtype == "uint8" else steps


def open_loader(data: Dataset, arm: str, shape: Shape, device: str | None, **options: Any) -> Any:
    """The Loader of an arm. UsageError where this machine, or this release, has none such."""
    from fastload.loader import Loader

    chosen = {"shuffle": True, "seed": 0, "drop_last": True, "fields": ["index", "image", "label"], **options}
    if arm == "encoded":  # a budget that is too small for pixels
        unique = np.unique(data.indices, return_index=True)[1]
        chosen["vram"] = int(3 * (data.heights * data.widths)[unique].sum()) - 1
    try:
        with warnings.catch_warnings():
            # A cache that is too small for pixels is what "encoded" asks for.
            warnings.simplefilter("ignore", UserWarning)
            return Loader(
                data,
                shape.batch,
                transforms=shape.pipeline,
                threads=shape.threads,
                dtype=shape.dtype,
                device=device,
                **ARMS[arm],
                **chosen,
            )
    except TypeError as error:  # an option that this release does not know
        raise UsageError(f"{arm!r} is not part of this release ({error})") from error


def levels(images: Any, floats: bool) -> np.ndarray:
    """A batch as levels of 255, float32 (B, 3, H, W) in host memory."""
    from fastload.transforms import IMAGENET_MEAN, IMAGENET_STD

    pixels = images.detach().float().cpu().numpy()
    if not floats:
        return np.asarray(pixels)
    mean, std = (np.array(v, np.float32).reshape(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return np.asarray(255 * (pixels * std + mean))


def first_batches(loader: Any, floats: bool) -> list[tuple[np.ndarray, np.ndarray]]:
    """(index, levels) of the first batches of epoch 0."""
    loader.set_epoch(0)
    found = []
    with contextlib.closing(iter(loader)) as batches:
        for batch in batches:
            found.append((np.asarray(batch.index.cpu()), levels(batch.image, floats)))
            if len(found) == CHECKED:
                break
    return found


def compare(
    got: list[tuple[np.ndarray, np.ndarray]], want: list[tuple[np.ndarray, np.ndarray]], allowed: float
) -> tuple[float, str]:
    """The mean difference in levels of the batch that differs most, and what is wrong with it: "" where nothing is."""
    if len(got) != len(want):
        return 255.0, f"it gave {len(got)} batches and the CPU engine {len(want)}"
    most = 0.0
    for (index, pixels), (wanted, exact) in zip(got, want):
        if pixels.shape != exact.shape or not np.array_equal(index, wanted):
            return 255.0, "its batches hold other samples than the CPU engine's"
        # The worst image: one that is wrong among many right ones must show.
        each = np.abs(pixels - exact).mean((1, 2, 3))
        if not np.isfinite(each).all():
            return 255.0, "its pixels are not finite"
        if each.max() > 4 * allowed:
            return (
                float(each.mean()),
                f"one image differs from the CPU engine's by {each.max():.1f} levels on average",
            )
        most = max(most, float(each.mean()))
    if most > allowed:
        return most, f"its pixels differ from the CPU engine's by {most:.1f} levels on average"
    return most, ""


class Arm:
    """A loader that is checked, measured in rounds, and checked again."""

    def __init__(
        self, loader: Any, floats: bool, want: list[Any], allowed: float, sync: Callable[[], object]
    ) -> None:
        self.loader, self.floats, self.want, self.allowed, self.sync = loader, floats, want, allowed, sync
        self.seconds, self.difference, self.wrong = 0.1, 0.0, ""
        self.check()

    def check(self) -> None:
        if not self.wrong:
            self.difference, self.wrong = compare(
                first_batches(self.loader, self.floats), self.want, self.allowed
            )

    def round(self) -> float:
        """Images/s over ``seconds``, the device waited for."""
        try:
            with Stream(self.loader) as stream:
                for _ in range(2):  # its threads start, its buffers are taken
                    next(stream)
                self.sync()
                clock, count, least = time.perf_counter(), 0, LEAST_BATCHES * self.loader.batch_size
                # Some batches at least: the first ones were begun before.
                while count < least or time.perf_counter() - clock < self.seconds:
                    count += len(next(stream).image)
                self.sync()
                return count / (time.perf_counter() - clock)
        except (RuntimeError, OSError) as error:  # a driver's: the other arms go on
            raise UsageError(f"it failed in a round: {' '.join(str(error).split())[:200]}") from error


def late(rig: Rig, share: float, seconds: float) -> bool:
    """Whether too little of a part's time is left for its next thing; a small run does everything, however shortly."""
    return not rig.small and share < 0.02 * seconds


def scaling(rig: Rig, seconds: float, notes: list[str]) -> Iterator[dict[str, Any]]:
    """Crops/s of the CPU engine for 1, 2, 4, ... threads."""
    counts = thread_counts(rig.cores)
    data = rig.repeated("500 px JPEG")
    with contextlib.ExitStack() as stack:
        arms: dict[str, Arm] = {}
        want: list[Any] | None = None
        for count in counts:
            shape = Shape(rig.size, min(rig.batch, 64), count, "uint8")
            loader = stack.enter_context(contextlib.closing(open_loader(data, "cpu", shape, None)))
            want = first_batches(loader, False) if want is None else want
            name = f"{count} thread{'s' * (count > 1)}"
            # Any number of threads gives the same pixels to the bit.
            arms[name] = Arm(loader, False, want, 0.0, lambda: None)
            arms[name].seconds = seconds / (MIN_ROUNDS + 2) / len(counts)
        found = interleave({name: arm.round for name, arm in arms.items()})
    base = found[next(iter(arms))].median
    for (name, arm), count in zip(arms.items(), counts):
        figure = found[name]
        share = figure.median / base / count
        yield row(
            name, figure, engine="cpu", wrong=arm.wrong, check="the same to the bit for any number", threads=count,
            efficiency=round(share, 3), text=f"{share:.0%} of linear",
        )  # fmt: skip


def loaders(rig: Rig, seconds: float, notes: list[str]) -> Iterator[dict[str, Any]]:
    """All loaders on all files, in turns for each file."""
    files = list(rig.files)
    until = time.perf_counter() + seconds
    for number, name in enumerate(files):
        share = (until - time.perf_counter()) / (len(files) - number)
        if late(rig, share, seconds):
            yield from (row(f"{name}, {TITLES[arm]}", engine=arm, arm=arm, file=name, reason="no time was left") for arm in ARMS)  # fmt: skip
            continue
        yield from _on_file(rig, name, rig.shape(name), max(share, 1.0))


def _on_file(rig: Rig, name: str, shape: Shape, seconds: float) -> Iterator[dict[str, Any]]:
    until, data = time.perf_counter() + seconds, rig.repeated(name)
    kind = "raw" if "raw" in name else "jpeg"
    with contextlib.closing(open_loader(data, "cpu", shape, None, decode="exact")) as exact:
        want = first_batches(exact, True)
    done: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        arms: dict[str, Arm] = {}
        for arm in ARMS:
            label = f"{name}, {TITLES[arm]}"
            engine = ARMS[arm]["engine"]
            gpu_only = engine == "cuda"
            # Without a GPU the cuda engine runs on the CPU, for its pixels and not for a speed.
            device = "cuda" if rig.cuda else "cpu" if gpu_only else None
            try:
                loader = stack.enter_context(contextlib.closing(open_loader(data, arm, shape, device)))
                made = Arm(loader, True, want, TOLERANCE[kind], rig.sync)
            except (FastloadError, ImportError, RuntimeError) as error:
                reason = " ".join(str(error).split())[:300]
                done.append(row(label, engine=arm, reason=reason, arm=arm, file=name))
                continue
            if arm == "encoded" and "as they are stored" not in loader.chosen:
                done.append(
                    row(
                        label,
                        engine=arm,
                        reason="there is nothing to decode in this file",
                        arm=arm,
                        file=name,
                    )
                )
                continue
            if made.wrong or (gpu_only and not rig.cuda):
                reason = "no CUDA GPU here; only its pixels were looked at, on the CPU"
                more: dict[str, Any] = {"check": _said(made), "wrong": made.wrong, "reason": reason}
                done.append(row(label, engine=arm, arm=arm, file=name, **more))
                continue
            arms[arm] = made
        own = _dali_own(rig, name, shape, stack, done)
        jobs = {**{arm: made.round for arm, made in arms.items()}, **{k: v.round for k, v in own.items()}}
        every = max(0.02, (until - time.perf_counter()) / (MIN_ROUNDS + 1.5) / len(jobs))
        for one in (*arms.values(), *own.values()):
            one.seconds = every
        failed: dict[str, str] = {}
        found = interleave(jobs, on_error=lambda job, error: failed.update({job: str(error)}))
        for arm, made in arms.items():
            if arm in found:
                made.check()
            checks: dict[str, Any] = {
                "check": _said(made),
                "wrong": made.wrong,
                "difference_levels": round(made.difference, 3),
            }
            one = row(
                f"{name}, {TITLES[arm]}", found.get(arm), engine=arm, arm=arm, file=name,
                reason=failed.get(arm, ""), **checks,
            )  # fmt: skip
            done.append(one)
        for label, pipeline in own.items():
            one = row(
                f"{name}, {label}", found.get(label), engine="dali own", check=pipeline.said, wrong=pipeline.wrong,
                arm="dali own", file=name, reason=failed.get(label, ""),
            )  # fmt: skip
            done.append(one)
    yield from done


def _said(arm: Arm) -> str:
    return f"mean difference {arm.difference:.2f} levels"


def _dali_own(
    rig: Rig, name: str, shape: Shape, stack: contextlib.ExitStack, done: list[dict[str, Any]]
) -> dict[str, Any]:
    """DALI's own pipelines on the files of a set, where it has files; what cannot run is added to ``done``."""
    from fastload.benchmarks.gpu_dali import OwnPipeline

    found: dict[str, Any] = {}
    folder = rig.folders.get(name)
    if folder is None:
        return found
    for decode in ("mixed", "cpu") if rig.cuda else ("cpu",):
        label = f"DALI's own pipeline, decoding on {'the GPU' if decode == 'mixed' else 'the CPU'}"
        try:
            found[label] = OwnPipeline(str(folder), shape, decode, rig.cuda, rig.sync)
            stack.callback(found[label].close)
        except (FastloadError, ImportError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            done.append(row(f"{name}, {label}", engine="dali own", reason=reason, arm="dali own", file=name))
    return found


class GpuPair(Pair):
    """A pair whose loader was opened by :func:`open_loader`."""

    def __init__(self, dataset: Dataset, setting: Setting, side: Any, loader: Any) -> None:
        self.dataset, self.setting, self.side, self.loader = dataset, setting, side, loader
        self.batch_s = self.step_s = self.first_batch_s = 0.0


def stall(rig: Rig, seconds: float, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The share of time that each model's step waits for the best loader, and its speed against a synthetic batch."""
    from fastload.benchmarks.options import BenchOptions
    from fastload.benchmarks.side import Labels, ModelSide, fit_batch
    from fastload.train import pick_device

    name = "500 px JPEG"
    if rig.best is None:
        arm = "cpu"
        notes.append(
            f"images come from the {name} file through the CPU engine: the loaders were not measured"
        )
    elif name in rig.best:
        arm = rig.best[name]
        notes.append(f"images come from the {name} file through the fastest checked loader: {TITLES[arm]}")
    else:
        raise NotRun("no loader has a figure for the 500 px JPEG file, so none is known to give right pixels")
    data, device = rig.repeated(name), "cuda" if rig.cuda else None
    until = time.perf_counter() + seconds
    for number, model in enumerate(rig.models):
        share = (until - time.perf_counter()) / (len(rig.models) - number)
        if late(rig, share, seconds):
            yield row(model, engine=arm, reason="no time was left", arm=arm)
            continue
        share = max(share, 1.0)
        try:
            options = BenchOptions(model, rig.model_size, rig.model_batch, device, seconds=share)
            side = ModelSide(options, Labels.of(data), pick_device(device))
            batch = fit_batch(side, options.batch_size, share / 40)
            if batch < options.batch_size:
                side = ModelSide(replace(options, batch_size=batch), Labels.of(data), pick_device(device))
            dtype = {"bf16": "bfloat16", "fp16": "float16"}.get(side.amp, "float32")
            shape = Shape(rig.model_size, batch, rig.cores, dtype)
            with contextlib.closing(open_loader(data, arm, shape, device)) as loader:
                pair = GpuPair(data, Setting(batch, rig.cores, 2, shape.pipeline), side, loader)
                pair.warm_up(share / 12, size=rig.model_size)
                yield _stalled(pair, model, arm, share)
        except NotRun:
            raise
        except Exception as error:  # out of memory, an unknown model: the other models go on
            yield row(model, engine=arm, reason=" ".join(str(error).split())[:300], arm=arm)
        finally:
            side = pair = None  # type: ignore[assignment]
            rig.free()


def _stalled(pair: GpuPair, model: str, arm: str, seconds: float) -> dict[str, Any]:
    steps = steps_for(0.35 * seconds / (MIN_ROUNDS + 1), pair, least=2)
    waits: list[float] = []

    def together() -> float:
        made = pair.together(steps)
        waits.append(made.stall)
        return made.images_s

    found = interleave({"synthetic": lambda: pair.learning(steps), "loader": together})
    waited = Series("stall", tuple(100 * wait for wait in waits[-MIN_ROUNDS:]), "% of the time")
    reached = found["loader"].median / found["synthetic"].median
    return row(
        model, waited, engine=arm, arm=arm, check="shape and type of the batches; pixels as in the part of the loaders",
        loader=found["loader"].to_json(), synthetic=found["synthetic"].to_json(), of_synthetic=round(reached, 4),
        text=f"{found['loader'].median:,.0f} images/s, {reached:.1%} of a synthetic batch's", batch=pair.setting.batch_size,
    )  # fmt: skip
