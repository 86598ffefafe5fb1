"""``fastload bench`` with a tiny model: what it measures, what it blames, what it refuses."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fastload
from fastload import transforms
from fastload.benchmarks import side as room
from fastload.benchmarks import verdict
from fastload.benchmarks.bench import bench
from fastload.benchmarks.options import BenchOptions
from fastload.benchmarks.pipelines import without_per_image
from fastload.benchmarks.resources import PeakMemory
from fastload.errors import UsageError

MODEL = "test_resnet"
SMALL = {
    "size": 32,
    "batch_size": 4,
    "threads": 1,
    "seconds": 3.0,
    "device": "cpu",
    "progress": False,
    "changes": False,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """96 pictures of 80 x 60 px in three classes."""
    root = tmp_path_factory.mktemp("bench")
    draw = np.random.default_rng(0)
    for index in range(96):
        folder = root / "images" / "abc"[index % 3]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((80, 60), Image.Resampling.BILINEAR).save(folder / f"{index}.jpg")
    target = root / "data.beton"
    fastload.convert(root / "images", target, progress=False)
    return str(target)


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fastload", "bench", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
    )


def slow(image: np.ndarray) -> np.ndarray:
    time.sleep(0.01)
    return image


def with_per_image() -> tuple:
    *steps, normalize = transforms.train(32)
    return (*steps, transforms.PerImage(slow), normalize)


def test_figures_are_consistent_and_complete(data: str) -> None:
    before = set(threading.enumerate())
    result = bench(data, MODEL, **SMALL)
    assert [s.n for s in (result.loader, result.model, result.both, result.stall)] == [5] * 4
    assert 0 <= result.stall.low <= result.stall.high <= 1
    # Together they can't be faster than either alone, but for the noise of a shared machine.
    assert result.both.median < 1.5 * min(result.loader.high, result.model.high)
    record = json.loads(json.dumps(result.to_json()))
    assert record["verdict"] == result.verdict.sentence
    assert record["settings"]["threads"] == 1
    assert record["settings"]["images"] == 96
    assert record["loader_without_per_image"] is None
    assert record["environment"]["versions"]["torch"]
    assert len(record["loader"]["rounds"]) == 5
    deadline = time.monotonic() + 5
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert set(threading.enumerate()) - before == set()


def test_a_slow_loader_is_blamed_and_per_image_named_with_its_measured_cost(data: str, monkeypatch) -> None:
    monkeypatch.setattr(room.ModelSide, "train", lambda self, images, labels: time.sleep(0.004))
    result = bench(data, MODEL, transforms=with_per_image(), **SMALL)
    assert result.verdict.bottleneck == "loader"
    assert result.loader.median < 100  # 10 ms of sleep an image on one thread
    assert result.loader_plain is not None
    assert result.loader_plain.median > 2 * result.loader.median
    assert "PerImage" in result.verdict.change
    assert result.stall.median > 0.5
    # Oracle: 40 ms of sleep make a batch of 4 and 4 ms are the model's, so at least 36 of 40 ms are waiting.
    assert 0.85 < result.stall.median <= 0.97
    assert result.both.median < 100


def test_a_slow_model_is_blamed_and_nothing_waits(data: str, monkeypatch) -> None:
    monkeypatch.setattr(room.ModelSide, "train", lambda self, images, labels: time.sleep(0.15))
    result = bench(data, MODEL, **SMALL)
    assert result.verdict.bottleneck == "model"
    assert result.model.median == pytest.approx(4 / 0.15, rel=0.2)
    assert result.stall.median < 0.15
    assert result.both.median == pytest.approx(result.model.median, rel=0.35)


def test_the_record_holds_what_its_verdict_needs_and_what_the_run_cost(data: str, monkeypatch) -> None:
    def busy(self, images, labels) -> None:
        until = time.thread_time() + 0.002 * len(images)
        while time.thread_time() < until:
            pass

    monkeypatch.setattr(room.ModelSide, "train", busy)
    record = json.loads(json.dumps(bench(data, MODEL, **SMALL).to_json()))
    found = verdict.from_record(record)
    assert (found.sentence, found.bottleneck, found.change) == (
        record["verdict"],
        record["bottleneck"],
        record["change_first"],
    )
    assert "changes" not in record  # none was meant to be run
    assert record["stage"] == found.stage
    assert sum(stage["share"] for stage in record["stages"]) == pytest.approx(1, abs=0.01)
    assert {"read", "decode", "resize", "normalise"} <= {stage["stage"] for stage in record["stages"]}
    # Oracle: the step alone burns 2 s of CPU for 1,000 images, and the loader's part is small.
    assert 2 <= record["resources"]["cpu_s_per_1000_images"] < 4
    assert record["resources"]["peak_mib"] > 50
    assert record["resources"]["gpu_peak_mib"] is None
    steps = record["timeline"]
    assert 1 <= len(steps) <= 200
    for before, after in itertools.pairwise(steps):
        assert before["t"] + before["wait_s"] + before["step_s"] == pytest.approx(after["t"], abs=1e-4)
    assert all(step["step_s"] >= 0.008 for step in steps)
    # Oracle: the stall of the last round is what the timeline says.
    spent = steps[-1]["t"] + steps[-1]["wait_s"] + steps[-1]["step_s"]
    if len(steps) < 200:
        assert sum(step["wait_s"] for step in steps) / spent == pytest.approx(
            record["stall"]["rounds"][-1], abs=0.01
        )


def test_changes_are_run_ranked_and_shown(data: str, monkeypatch) -> None:
    """A step of 8 ms whatever the batch: a larger batch doubles the figure, and nothing on the loader's side matters."""
    monkeypatch.setattr(room.ModelSide, "train", lambda self, images, labels: time.sleep(0.008))
    for seconds in (8.0, 16.0, 32.0):  # a machine with other work may need more time until all is prepared
        result = bench(data, MODEL, **{**SMALL, "seconds": seconds, "changes": True})
        changes = result.to_json()["changes"]
        if changes and changes[0]["what"] == "a larger batch" and changes[0]["gain"]:
            break
    assert changes[0]["what"] == "a larger batch"
    assert changes[0]["gain"] is True
    assert 1.5 < changes[0]["ratio"]["median"] < 2.3
    assert len(changes[0]["ratio"]["rounds"]) >= 5
    order = [(change["gain"], change["ratio"]["median"]) for change in changes]
    assert order == sorted(order, reverse=True)
    assert "change first a larger batch (--batch-size 8, Loader(batch_size=8))" in result.verdict.sentence
    assert "a larger batch: --batch-size 8" in result.table()
    whats = {change["what"] for change in changes} | {entry["what"] for entry in result.to_json()["not_run"]}
    assert {"mixed precision", "NCHW memory", "torch.compile"} <= whats
    assert result.seconds < 2 * seconds


def test_without_a_model_the_loader_alone_is_measured(data: str, monkeypatch) -> None:
    def refuse(*arguments) -> None:
        raise AssertionError("no model was asked for")

    monkeypatch.setattr(room.ModelSide, "__init__", refuse)
    result = bench(data, "none", **{**SMALL, "changes": True})
    assert (result.model, result.both, result.stall) == (None, None, None)
    assert result.verdict.sentence.startswith("The loader alone makes")
    assert "model alone" not in result.table()
    record = json.loads(json.dumps(result.to_json()))
    assert verdict.from_record(record) == result.verdict
    assert any(entry["what"] == "the model's side" for entry in record["not_run"])


def test_the_largest_memory_is_seen_though_it_is_free_again() -> None:
    with PeakMemory() as before:
        pass
    with PeakMemory() as memory:
        block = np.ones(200 << 20, np.uint8)
        time.sleep(0.2)
        del block
        time.sleep(0.1)
    assert memory.peak_mib is not None and before.peak_mib is not None
    assert memory.peak_mib > before.peak_mib + 150


def test_few_images_make_smaller_batches(data: str) -> None:
    dataset = fastload.open(data).subset(range(3))
    result = bench(dataset, MODEL, **{**SMALL, "seconds": 1.0})
    assert result.settings["batch_size"] == 3
    assert any("batches have 3, not 4" in note for note in result.notes)
    assert any("an epoch has only 1 batch," in note for note in result.notes)


def test_a_model_too_slow_for_the_budget_is_measured_with_fewer_images(data: str, monkeypatch) -> None:
    seen: list[int] = []

    def heavy(self, images, labels) -> None:
        seen.append(len(images))
        time.sleep(0.009 * len(images))

    monkeypatch.setattr(room.ModelSide, "train", heavy)
    result = bench(data, MODEL, **{**SMALL, "batch_size": 64, "seconds": 4.0})
    assert result.settings["batch_size"] == 16  # 4 s / 24 = 167 ms a step: 144 ms fit, 288 do not
    assert max(seen) == 16
    assert result.model.median == pytest.approx(111, rel=0.2)
    assert any("everything was measured with batches of 16" in note for note in result.notes)
    seen.clear()
    result = bench(data, MODEL, **{**SMALL, "batch_size": 64, "seconds": 4.0, "changes": True})
    assert result.settings["batch_size"] == 4  # 40% of the time is for these rounds: 67 ms a step
    assert any(entry["why"].startswith("batches were cut") for entry in result.to_json()["not_run"])


def test_per_image_steps_are_taken_out(data: str) -> None:
    train = transforms.train(32)
    assert without_per_image(train, 32) is None
    assert without_per_image(with_per_image(), 32) == tuple(train)
    whole = (transforms.PerImage(slow, size=32), transforms.Normalize())
    assert without_per_image(whole, 32) == (transforms.Resize((32, 32)), transforms.Normalize())


def test_a_pipeline_that_does_not_fit_the_model_is_refused(data: str) -> None:
    with pytest.raises(UsageError, match="size=32"):
        bench(data, MODEL, transforms=transforms.train(48), **SMALL)
    with pytest.raises(UsageError, match="end it with Normalize"):
        bench(data, MODEL, transforms=(transforms.RandomResizedCrop(32),), **SMALL)


@pytest.mark.parametrize(
    "change",
    [
        {"rounds": 4},
        {"batch_size": 0},
        {"size": 0},
        {"threads": 0},
        {"seconds": 0.0},
        {"seconds": float("nan")},
        {"prefetch": 0},
    ],
)
def test_options_are_checked(change) -> None:
    with pytest.raises(UsageError, match=f"got {next(iter(change.values()))}"):
        BenchOptions(**change)


def test_the_command_prints_table_verdict_and_json(data: str, tmp_path: Path) -> None:
    out = tmp_path / "record.jsonl"
    options = ["--model", MODEL, "--size", "32", "--batch-size", "4", "--seconds", "2", "--device", "cpu"]
    done = run_cli(data, *options, "--out", str(out), "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    for words in ("loader alone", "model alone", "both together", "waiting for images", "Verdict: "):
        assert words in done.stdout
    assert record["bottleneck"] in ("loader", "model", "balanced")
    assert record["verdict"].split()[0] in done.stdout
    assert json.loads(out.read_text()) == record


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--model", "resnet81"], "unknown model 'resnet81'; did you mean"),
        (["--model", MODEL, "--device", "gpu"], "unknown device 'gpu'"),
        (["--model", MODEL, "--batch-size", "0"], "batch_size must be at least 1, got 0"),
    ],
)
def test_a_wrong_call_is_one_sentence(data: str, arguments: list[str], words: str) -> None:
    done = run_cli(data, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    done = run_cli(str(tmp_path / "nowhere.beton"), "--model", MODEL)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "nowhere.beton" in done.stderr
    assert "Traceback" not in done.stderr
