"""The GPU suite's parts besides loaders: the tests, decoding alone, the kernel against a measured copy, models.

Each is a generator of rows for :func:`fastload.benchmarks.gpu_suite.run_part`. The trade-off in the kernel's figure: launches wait behind a
sleeping GPU, so that the time of the GPU is measured and not that of Python; the rate with Python is in its row, too.

>>> list(kernel(rig, 10.0, notes))
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastload.benchmarks.gpu_loaders import Arm, Shape, first_batches, late, open_loader
from fastload.benchmarks.gpu_suite import NotRun, row
from fastload.benchmarks.harness import MIN_ROUNDS, Series, interleave

if TYPE_CHECKING:
    from fastload.benchmarks.gpu import Rig

TEST_FILES = (
    "test_kernels_gpu.py",
    "test_kernels_gpu_jpeg.py",
    "test_device_feed.py",
    "test_engine_cuda.py",
    "test_engine_segments.py",
    "test_engine_dali.py",
    "test_loader_engines.py",
)
ARMS_OF_SEGMENTS = ("segments", "encoded")
ARMS_OF_CUDA = ("cuda", "hybrid", "resident", *ARMS_OF_SEGMENTS)
NO_GPU = "no CUDA GPU here"
DECODE_BATCH = 64
DECODE_TOLERANCE = 2.5  # levels, mean difference to libjpeg-turbo's exact pixels
SLEEP_CYCLES = 40_000_000  # some 20 ms, in which Python queues what is timed


def engines_of(test: str) -> tuple[str, ...]:
    """The engines that a test, by its id, is about."""
    if "test_kernels_gpu_jpeg" in test or "test_engine_segments" in test:
        return ARMS_OF_SEGMENTS
    if "test_kernels_gpu" in test:
        return ("kernel", *ARMS_OF_CUDA)
    if "test_device_feed" in test:
        return ("resident",)
    if "test_engine_dali" in test:
        return ("dali",)
    if "test_engine_cuda" in test:
        return ARMS_OF_CUDA
    return ("dali",) if "dali" in test.lower() else ARMS_OF_CUDA


def tests(rig: Rig, seconds: float, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The tests of engines and kernels; a red one makes ``rig.red`` say why its engines show no speed."""
    if not rig.cuda:
        raise NotRun(NO_GPU)
    folder = Path(__file__).resolve().parents[1] / "tests"
    until = time.perf_counter() + seconds
    files = [folder / name for name in TEST_FILES if (folder / name).exists()]
    if not files:
        raise NotRun("the tests are not beside the package; run it from a checkout")
    for number, file in enumerate(files):
        yield run_tests(file, max(5.0, (until - time.perf_counter()) / (len(files) - number)), rig.red)


def run_tests(file: Path, seconds: float, red: dict[str, str]) -> dict[str, Any]:
    """A test file in a process of its own; ``red`` is told the engines of failed tests."""
    chosen = ["-k", "cuda or gpu"] if file.name == "test_loader_engines.py" else []
    command = [
        sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=line", "-p", "no:cacheprovider", *chosen, str(file)
    ]  # fmt: skip
    clock = time.perf_counter()
    try:
        done = subprocess.run(
            command, cwd=file.parent.parent, capture_output=True, text=True, timeout=seconds,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return row(
            file.name, reason=f"did not end in {seconds:.0f} s, so it says nothing", passed=0, failed=0
        )
    found = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)}
    broken = done.returncode not in (0, 5)
    for test in found or ([file.name] if broken else []):
        for engine in engines_of(test):
            red.setdefault(engine, f"the test {test.rpartition('/')[2]} failed")
    if broken and not counts:
        counts["error"] = 1
    text = ", ".join(f"{n} {word}" for word, n in counts.items()) or "nothing to run"
    return row(
        file.name, check="" if broken else text, wrong=f"{text}: {', '.join(found[:3])}" if broken else "", text=text,
        passed=counts.get("passed", 0), failed=counts.get("failed", 0) + counts.get("error", 0),
        skipped=counts.get("skipped", 0), tests_s=round(time.perf_counter() - clock, 1), red=found,
    )  # fmt: skip


def timed(once: Callable[[], int], seconds: float, sync: Callable[[], object]) -> Callable[[], float]:
    """A round: ``once``, which says how many images it did, as often as fills ``seconds``; images/s."""

    def measure() -> float:
        sync()
        clock, count = time.perf_counter(), 0
        while not count or time.perf_counter() - clock < seconds:
            count += once()
        sync()
        return count / (time.perf_counter() - clock)

    return measure


def decode(rig: Rig, seconds: float, notes: list[str]) -> Iterator[dict[str, Any]]:
    """JPEG decoders alone, on whole images and on crops of the mean area."""
    import simplejpeg
    import torch

    data = rig.files["500 px JPEG"]
    encoded = [bytes(data.encoded(i).data) for i in range(min(len(data), 2 * DECODE_BATCH))]
    exact = [simplejpeg.decode_jpeg(one, "RGB") for one in encoded]
    crops = [_mean_crop(image) for image in exact]
    crops_exact = [simplejpeg.decode_jpeg(one, "RGB") for one in crops]
    said: dict[str, tuple[str, str]] = {}
    jobs: dict[str, Callable[[], float]] = {}
    every = seconds / (MIN_ROUNDS + 2) / (5 if rig.cuda else 3)
    with contextlib.ExitStack() as stack:
        shape = Shape(rig.size, min(rig.batch, 64), rig.cores, "uint8")
        loader = stack.enter_context(
            contextlib.closing(open_loader(rig.repeated("500 px JPEG"), "cpu", shape, None))
        )
        name = f"fastload on the CPU, crops to {rig.size}, {rig.cores} threads"
        ours = Arm(loader, False, first_batches(loader, False), 0.0, lambda: None)
        ours.seconds = every
        jobs[name] = ours.round
        said[name] = ("its pixels are those that the others are held against", "")
        pool = stack.enter_context(ThreadPoolExecutor(rig.cores))

        def turbo() -> int:
            list(pool.map(lambda one: simplejpeg.decode_jpeg(one, "RGB", fastdct=True), encoded))
            return len(encoded)

        jobs["libjpeg-turbo on the CPU, whole"] = timed(turbo, every, lambda: None)
        said["libjpeg-turbo on the CPU, whole"] = ("fast DCT", "")
        try:
            from torchvision.io import ImageReadMode, decode_jpeg
        except (ImportError, RuntimeError) as error:
            notes.append(f"torchvision's decoder is not here: {' '.join(str(error).split())[:160]}")
        else:
            whole, cut = ([torch.from_numpy(np.frombuffer(one, np.uint8).copy()) for one in part] for part in (encoded, crops))  # fmt: skip
            ways: list[tuple[str, list[Any], list[Any], str]] = [
                ("torchvision on the CPU, whole", whole, exact, "cpu")
            ]
            if rig.cuda:
                ways += [
                    ("torchvision on the GPU, whole", whole, exact, "cuda"),
                    ("torchvision on the GPU, crops of the mean area", cut, crops_exact, "cuda"),
                ]
            for name, images, wanted, device in ways:
                parts = [images[i : i + DECODE_BATCH] for i in range(0, len(images), DECODE_BATCH)]

                def run(parts: list[Any] = parts, device: str = device, many: int = len(images)) -> int:
                    for part in parts:
                        if device == "cpu":
                            split = [part[i :: rig.cores] for i in range(rig.cores)]
                            list(pool.map(lambda some: [decode_jpeg(one, ImageReadMode.RGB) for one in some], split))  # fmt: skip
                        else:
                            decode_jpeg(part, ImageReadMode.RGB, device="cuda")
                    return many

                got = decode_jpeg(images[:DECODE_BATCH], ImageReadMode.RGB, device=device)
                said[name] = _same([one.permute(1, 2, 0).cpu().numpy() for one in got], wanted)
                jobs[name] = timed(run, every, rig.sync if device == "cuda" else lambda: None)
        name, check, wrong, run_segments = _segments(
            rig, data, min(len(data), 2 * DECODE_BATCH if rig.cuda else 4)
        )
        if rig.cuda:
            said[name], jobs[name] = (check, wrong), timed(run_segments, every, rig.sync)
        found = interleave(jobs)
    for title, figure in found.items():
        yield row(
            title,
            figure,
            engine="segments" if title == name else "",
            check=said[title][0],
            wrong=said[title][1],
        )
    if not rig.cuda:
        yield row("torchvision on the GPU", reason=NO_GPU)
        yield row(
            name, engine="segments", check=check, wrong=wrong, reason=f"{NO_GPU}; only its reference was run"
        )


def _segments(rig: Rig, data: Any, count: int) -> tuple[str, str, str, Callable[[], int]]:
    """Crops of the mean area by our kernels, from encoded images in GPU memory: title, check, what is wrong, and what does it once."""
    import simplejpeg
    import torch

    from fastload.engines.encoded import Encoded

    device = torch.device("cuda" if rig.cuda else "cpu")
    bases = np.unique(data.indices)[:count]
    size = int(bases.max()) + 1
    jpegs = Encoded(data.spans, bases, size)
    bases = bases[jpegs.ok[bases]]
    encoded = [bytes(data.encoded(int(base)).data) for base in bases]
    ends, starts = np.cumsum([len(one) for one in encoded]), np.full(size, -1, np.int64)
    starts[bases] = ends - [len(one) for one in encoded]
    memory = torch.frombuffer(bytearray(b"".join(encoded)), dtype=torch.uint8).to(device)
    jpegs.move(device, starts)
    shapes = np.stack([data.heights[bases], data.widths[bases]], axis=1).astype(np.int64)
    inner = np.maximum(16, np.rint(shapes * 0.54**0.5).astype(np.int64)).clip(max=shapes)
    windows = np.concatenate([(shapes - inner) // 2, (shapes - inner) // 2 + inner], axis=1)
    sources, errors = jpegs.decode(memory, bases, windows)
    got = [sources.image(i).permute(1, 2, 0).cpu().numpy() for i in range(min(8, len(bases)))]
    exact = [
        simplejpeg.decode_jpeg(one, "RGB")[y0:y1, x0:x1]
        for one, (y0, x0, y1, x1), _ in zip(encoded, windows.tolist(), got)
    ]
    check, wrong = _same(got, exact)
    wrong = wrong or ("it sees damage in whole files" if any(flags.any() for _, flags in errors) else "")

    def once() -> int:
        jpegs.decode(memory, bases, windows)
        return len(bases)

    return "fastload on the GPU, crops of the mean area, from GPU memory", check, wrong, once


def _mean_crop(image: np.ndarray) -> bytes:
    """The middle of an image with the mean area of a training crop (0.54), as a JPEG."""
    import simplejpeg

    h, w = (max(16, round(side * 0.54**0.5)) for side in image.shape[:2])
    h, w = min(h, image.shape[0]), min(w, image.shape[1])
    y, x = (image.shape[0] - h) // 2, (image.shape[1] - w) // 2
    cut = np.ascontiguousarray(image[y : y + h, x : x + w])
    return bytes(simplejpeg.encode_jpeg(cut, quality=90, colorsubsampling="420"))


def _same(got: list[np.ndarray], wanted: list[np.ndarray]) -> tuple[str, str]:
    """What the check says and what is wrong, for decoded images against exact ones."""
    if any(a.shape != b.shape for a, b in zip(got, wanted)):
        return "", "its images have another shape"
    most = max(float(np.abs(a.astype(np.float32) - b).mean()) for a, b in zip(got, wanted))
    wrong = (
        f"its pixels differ from libjpeg-turbo's by {most:.1f} levels on average"
        if most > DECODE_TOLERANCE
        else ""
    )
    return f"at most {most:.2f} levels off on average", wrong


def kernel(rig: Rig, seconds: float, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The crop and mix kernels on decoded images in GPU memory, in images/s and GB/s, against a copy in GPU memory."""
    import torch

    from fastload.draws import Plan
    from fastload.kernels import batch as kb
    from fastload.kernels import gpu

    device = torch.device("cuda" if rig.cuda else "cpu")
    plan = Plan(Shape(rig.size, 1, 1).pipeline)
    paint = kb.Paint(np.array(plan.fill, np.uint8), plan.erase_fill, *plan.affine)
    count = (256 if rig.small else 2048) if rig.cuda else 4
    timer = _Timer(seconds / 4 / (MIN_ROUNDS + 2))
    copied = None
    if rig.cuda:
        copied = timer.series("copy", *_copy(rig.small))
        yield row("copy in GPU memory", copied, engine="copy", gb_s=round(copied.median, 1))
    for name in ("500 px JPEG", "256 px JPEG"):
        data = rig.files[name]
        images = [np.asarray(data[i]["image"]) for i in range(min(len(data), 512 if rig.cuda else count))]
        shapes = np.array([image.shape[:2] for image in images], np.int64)
        starts = np.concatenate([[0], np.cumsum(3 * shapes.prod(1))[:-1]])
        buffer = torch.from_numpy(np.concatenate([image.reshape(-1) for image in images])).to(device)
        chosen = np.arange(count) % len(images)
        sources = gpu.sources_in(buffer, starts[chosen], shapes[chosen])
        table = plan.draw(0, 0, np.arange(count, dtype=np.uint64), *shapes[chosen].T)
        out = torch.empty((count, rig.size, rig.size, 3), dtype=torch.float16, device=device).permute(
            0, 3, 1, 2
        )
        check, wrong = _kernel_check(gpu, sources, table, out, paint)
        title = f"crop of {name.split()[0]} px sources to {rig.size} px fp16"
        if not rig.cuda:
            yield row(title, engine="kernel", check=check, wrong=wrong, reason=f"{NO_GPU}; only its reference in torch was run")  # fmt: skip
            continue
        read = float((table.box[:, 2:] - table.box[:, :2]).prod(1).mean()) * 3
        moved = (read + 3 * rig.size**2 * 2) / 1e9
        figure = timer.series(title, lambda: gpu.crop(sources, table, out, paint), count)  # noqa: B023

        def launch() -> int:
            gpu.crop(sources, table, out, paint)  # noqa: B023
            return count

        python = timed(launch, 0.2, rig.sync)()
        yield _bandwidth(title, figure, moved, copied, check, wrong, f"{python:,.0f} images/s with Python")
        if name.startswith("500"):
            weights, boxes = np.full(count, 0.3, np.float32), np.zeros((count, 4), np.int64)
            mixed = timer.series("mix", lambda: gpu.mix(out, weights, boxes), count)  # noqa: B023
            yield _bandwidth("mix, in place", mixed, 12 * rig.size**2 / 1e9, copied, "", "", "")


def _bandwidth(
    title: str, figure: Series, moved: float, copied: Series | None, check: str, wrong: str, said: str
) -> dict[str, Any]:
    gb_s = figure.median * moved
    share = gb_s / copied.median if copied is not None else None
    text = (
        f"{gb_s:,.0f} GB/s" + ("" if share is None else f", {share:.0%} of the copy") + (said and f"; {said}")
    )
    return row(
        title, figure, engine="kernel", check=check, wrong=wrong, text=text, gb_s=round(gb_s, 1),
        of_copy=None if share is None else round(share, 4), kib_per_image=round(moved * 1e9 / 1024, 1),
    )  # fmt: skip


def _kernel_check(gpu: Any, sources: Any, table: Any, out: Any, paint: Any) -> tuple[str, str]:
    """The first images of a launch against the reference in torch."""
    import torch

    gpu.crop(sources, table, out, paint)
    few = min(4, len(out))
    some = gpu.Sources(sources.pointers[:few], sources.shapes[:few], sources.strides[:few], sources.owners)
    names = ("place", "box", "clip", "flips", "colour", "coloured", "erase")
    fields = {name: getattr(table, name) for name in names}
    part = type(table)(
        **{**vars(table), **{k: v[:few] if v is not None and len(v) else v for k, v in fields.items()}}
    )
    want = torch.empty_like(out[:few])
    gpu.crop_reference(some, part, want, paint)
    step = float(np.abs(paint.scale).max())  # of one level
    most = float((out[:few].float() - want.float()).abs().max()) / step
    wrong = "" if most <= 1.5 else f"it differs from the reference in torch by {most:.1f} levels"
    return f"at most {most:.2f} levels off the reference", wrong


def _copy(small: bool) -> tuple[Callable[[], object], float]:
    """A copy from GPU memory to GPU memory, and the GB that it reads and writes."""
    import torch

    size = (256 << 20) if small else (2 << 30)
    source = torch.ones(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * size / 1e9


class _Timer:
    """Times work on the GPU by its own clock, behind a sleep in which it is queued."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def series(self, name: str, once: Callable[[], object], amount: float) -> Series:
        """``amount`` times the calls a second, one figure a round."""
        import torch

        once()
        torch.cuda.synchronize()
        rounds = []
        for _ in range(MIN_ROUNDS):
            figures: list[float] = []
            until = time.perf_counter() + self.seconds
            while len(figures) < 3 or (time.perf_counter() < until and len(figures) < 200):
                begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda._sleep(SLEEP_CYCLES)
                begun.record()
                once()
                ended.record()
                ended.synchronize()
                figures.append(amount / (begun.elapsed_time(ended) / 1e3))
            rounds.append(float(np.median(figures)))
        return Series(name, tuple(rounds), "GB/s" if name == "copy" else "images/s")


def models(rig: Rig, seconds: float, notes: list[str]) -> Iterator[dict[str, Any]]:
    """Training rates: the best way to run each model, of those whose losses agree with the plain one's."""
    from fastload.benchmarks.model import ModelOptions, measure

    until = time.perf_counter() + seconds
    left_out = []
    for number, model in enumerate(rig.models):
        share = (until - time.perf_counter()) / (len(rig.models) - number)
        if late(rig, share, seconds):
            yield row(model, engine="model", reason="no time was left")
            continue
        share = max(share, 1.0)
        compile = rig.cuda and share >= 90  # two variants, some 30 s each
        if not compile:
            left_out.append(model)
        try:
            options = ModelOptions(
                (model,), rig.model_size, rig.model_batch, "cuda" if rig.cuda else "cpu",
                seconds=0.6 * share, compile=compile,
            )  # fmt: skip
            record = measure(options)
        except Exception as error:  # an unknown model, no memory: the other models go on
            yield row(model, engine="model", reason=" ".join(str(error).split())[:300])
            continue
        finally:
            rig.free()
        (found,) = record["rows"]
        notes += record["notes"]
        best = next(v for v in found["variants"] if v["name"] == found["best"])
        figure = Series(model, tuple(best["figure"]["rounds"]), best["figure"]["unit"])
        yield row(
            model, figure, engine="model", check="its losses fall as plain's do", text=f"{found['best']}, batches of {found['batch_size']}",
            variants=found["variants"], failed=found["failed"], batch=found["batch_size"],
        )  # fmt: skip
    if left_out:
        notes.append(f"without torch.compile, which takes about 90 s a model: {', '.join(left_out)}")
