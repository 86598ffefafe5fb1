"""Four made situations with a known bottleneck: the verdict names it, and its first suggestion, applied here by hand, helps.

Loader and model side are the real ones; one part of them is slowed down by sleeping, so that the truth is known and does not
depend on the machine. Whether a suggestion helps is measured by a plain loop of this file, which shares nothing with the bench.
"""

from __future__ import annotations

import io
import re
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastload
from fastload import beton, transforms
from fastload.benchmarks import verdict
from fastload.benchmarks.bench import BenchResult, bench
from fastload.benchmarks.side import ModelSide
from fastload.engines.cpu import Engine
from fastload.finish import Finisher

MODEL, SIZE = "test_resnet", 64


def write(path: Path, count: int, height: int, width: int) -> str:
    """A file of ``count`` JPEGs as a camera's software writes them: without restart markers."""
    draw = np.random.default_rng(0)
    fields = [beton.Field("image", "image"), beton.Field("label", "int")]
    writer = beton.Writer(path, fields, count)
    for index in range(count):
        coarse = Image.fromarray(draw.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=92)
        data = np.frombuffer(buffer.getvalue(), np.uint8)
        values = {"image": beton.EncodedImage("jpeg", height, width, data), "label": index % 3}
        writer.add(values, id=str(index), source=f"{index}.jpg")
    writer.finish({"classes": {"label": ["a", "b", "c"]}, "created_by": "tests"})
    return str(path)


def measure(data: str, batch_size: int, threads: int, **options: Any) -> BenchResult:
    return bench(
        data,
        MODEL,
        size=SIZE,
        batch_size=batch_size,
        threads=threads,
        device="cpu",
        progress=False,
        **options,
    )


def step_of(seconds: float, per_image: float = 0.0) -> Any:
    """A step that takes this long and learns nothing."""
    return lambda self, images, labels: time.sleep(seconds + per_image * len(images))


def loop(data: str, options: dict[str, Any], step: Any, seconds: float = 0.6) -> float:
    """Images/s of a plain training loop: take a batch, make a step."""
    loader = fastload.Loader(data, shuffle=True, drop_last=True, **options)
    try:
        images, start = 0, 0.0
        for epoch in range(1000):
            for number, batch in enumerate(loader):
                if start and time.perf_counter() - start > seconds:
                    return images / (time.perf_counter() - start)
                if not start and epoch + number >= 1:  # the first batch starts the threads
                    start = time.perf_counter()
                    continue
                step(None, batch.image, batch.label)
                images += len(batch.image) if start else 0
    finally:
        loader.close()
    raise AssertionError("the loop had no time")


def applied(
    result: BenchResult, data: str, options: dict[str, Any], folder: Path
) -> tuple[str, dict[str, Any]]:
    """Data and loader options after the first suggestion, read from the text that a user would follow."""
    change = result.to_json()["changes"][0]
    assert change["gain"], change
    assert change["what"] in result.verdict.change
    assert change["setting"] in result.verdict.sentence
    text, changed = change["setting"], dict(options)
    if text.startswith("fastload convert"):
        flags = dict(re.findall(r"--([a-z-]+) (\S+)", text))
        chosen = {name.replace("-", "_"): int(v) if v.isdigit() else v for name, v in flags.items()}
        data = fastload.convert(data, folder / "applied.beton", progress=False, **chosen).path
    elif "normalise in the step" in text:
        changed["transforms"] = [s for s in options["transforms"] if not isinstance(s, transforms.Normalize)]
    else:
        found = re.search(r"Loader\((\w+)=(\d+)\)", text)
        assert found is not None, text
        changed[found[1]] = int(found[2])
    return data, changed


def check_that_it_helps(
    result: BenchResult, data: str, options: dict[str, Any], step: Any, folder: Path
) -> str:
    """Apply the first suggestion and measure before and after in turns; returns what it was."""
    after_data, after = applied(result, data, options, folder)
    ratios = [loop(after_data, after, step) / loop(data, options, step) for _ in range(3)]
    assert statistics.median(ratios) > 1.1, (ratios, result.verdict.sentence)
    return str(result.to_json()["changes"][0]["what"])


@pytest.fixture(autouse=True)
def same_verdict_from_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every verdict of this file is one that the record alone gives."""
    whole = BenchResult.__init__

    def checked(self: BenchResult, **fields: Any) -> None:
        whole(self, **fields)
        assert verdict.from_record(self.record) == self.verdict

    monkeypatch.setattr(BenchResult, "__init__", checked)


def test_a_slow_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One disk for all threads, at 10 MB/s: more threads wait for the same disk, fewer bytes help."""
    data = write(tmp_path / "photos.beton", 64, 300, 400)
    read, disk = Engine._read, threading.Lock()

    def throttled(self: Any, file: Any, where: Any, rows: Any, box: Any) -> Any:
        with disk:
            time.sleep(int(where.sizes[rows].sum()) / 10e6)
        return read(self, file, where, rows, box)

    monkeypatch.setattr(Engine, "_read", throttled)
    step = step_of(0.002)
    monkeypatch.setattr(ModelSide, "train", step)
    result = measure(data, 8, 2, seconds=14)
    assert result.verdict.bottleneck == "loader"
    assert result.verdict.stage == "read"
    assert "'read' limits it" in result.verdict.sentence
    options = {"batch_size": 8, "threads": 2, "transforms": transforms.train(SIZE)}
    assert check_that_it_helps(result, data, options, step, tmp_path) == "a smaller stored size"
    threads = next(c for c in result.changes if c.what == "more loader threads")  # was run, and won nothing
    assert threads.ratio.median < 1.2


def test_slow_decoding_of_big_originals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write(tmp_path / "photos.beton", 24, 1536, 2048)
    step = step_of(0.002)
    monkeypatch.setattr(ModelSide, "train", step)
    result = measure(data, 8, 1, seconds=14)
    assert result.verdict.bottleneck == "loader"
    assert result.verdict.stage == "decode"
    options = {"batch_size": 8, "threads": 1, "transforms": transforms.train(SIZE)}
    what = check_that_it_helps(result, data, options, step, tmp_path)
    assert what in ("a smaller stored size", "raw store at 128 px")
    first = result.changes[0]
    # Its cost was measured: 24 raw pictures of 96 x 128 are 0.9 MB, as JPEG less.
    assert re.search(r"\d kB of disk|0\.\d+ MB of disk|1\.\d+ MB of disk", first.cost)
    assert "to convert" in first.cost


def test_a_slow_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step costs 30 ms however few images it gets, as launching a small model's kernels does."""
    data = write(tmp_path / "photos.beton", 64, 96, 128)
    step = step_of(0.03, 0.0002)
    monkeypatch.setattr(ModelSide, "train", step)
    result = measure(data, 8, 1, seconds=10)
    assert result.verdict.bottleneck == "model"
    options = {"batch_size": 8, "threads": 1, "transforms": transforms.train(SIZE)}
    assert check_that_it_helps(result, data, options, step, tmp_path) == "a larger batch"
    assert "learning rate" in result.changes[0].cost


class OnDevice(torch.Tensor):
    """A batch behind the made link: what the loader takes for memory of a GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda")


def test_a_slow_copy_by_a_huge_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link of 200 MB/s, and a pool of 2 MB, beyond which each byte costs three times as much."""
    data = write(tmp_path / "photos.beton", 256, 96, 128)
    copy = Finisher.copy

    def linked(self: Finisher, array: np.ndarray) -> torch.Tensor:
        time.sleep((array.nbytes + 2 * max(0, array.nbytes - 2_000_000)) / 200e6)
        return copy(self, array).as_subclass(OnDevice)  # type: ignore[no-any-return]

    monkeypatch.setattr(Finisher, "copy", linked)
    step = step_of(0.002)
    monkeypatch.setattr(ModelSide, "train", step)
    result = measure(data, 64, 2, seconds=14)
    assert result.verdict.bottleneck == "loader"
    assert result.verdict.stage == "copy"
    options = {"batch_size": 64, "threads": 2, "transforms": transforms.train(SIZE)}
    what = check_that_it_helps(result, data, options, step, tmp_path)
    assert what in ("uint8 batches, normalised on the device", "a smaller batch")
