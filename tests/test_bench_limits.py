"""The limits of this machine beside a bench: figures within reason, shares by hand, shown and never in the verdict."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import fastload
from fastload import beton
from fastload.benchmarks import limits, verdict
from fastload.benchmarks.bench import bench
from fastload.benchmarks.bench_table import table
from fastload.benchmarks.harness import noise_notes, write_jsonl
from fastload.benchmarks.options import BenchOptions
from fastload.benchmarks.report import load
from fastload.benchmarks.side import Labels, ModelSide
from fastload.errors import DataError

MODEL = "test_resnet"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """64 noisy pictures of 160 x 128 px, JPEG."""
    path = tmp_path_factory.mktemp("limits") / "made.beton"
    draw = np.random.default_rng(0)
    fields = [beton.Field("image", "image"), beton.Field("label", "int")]
    writer = beton.Writer(path, fields, 64)
    for i in range(64):
        buffer = io.BytesIO()
        Image.fromarray(draw.integers(0, 256, (128, 160, 3), dtype=np.uint8)).save(buffer, "JPEG", quality=90)
        image = beton.EncodedImage("jpeg", 128, 160, np.frombuffer(buffer.getvalue(), np.uint8))
        writer.add({"image": image, "label": i % 3}, id=str(i), source=f"{i}.jpg")
    writer.finish({"classes": {"label": ["a", "b", "c"]}, "created_by": "tests"})
    return str(path)


@pytest.fixture
def small_buffers(monkeypatch) -> None:
    """Buffers that a test can afford; what they give is the speed of a cache."""
    monkeypatch.setattr(limits, "cache_bytes", lambda: 1 << 20)
    monkeypatch.setattr(limits, "LEAST_BUFFER", 16 << 20)


@pytest.fixture(scope="module")
def side() -> ModelSide:
    return ModelSide(BenchOptions(MODEL, size=32, batch_size=4, device="cpu"), Labels(3), torch.device("cpu"))


def fastest(work, tries: int = 5) -> float:
    """Seconds of the fastest of some calls, on one thread: an oracle that shares nothing with the room."""
    seconds = []
    for _ in range(tries):
        clock = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - clock)
    return min(seconds)


def test_ceilings_are_what_plain_loops_find(data: str, side: ModelSide, small_buffers: None) -> None:
    with fastload.open(data) as dataset:
        found = limits.measure(dataset, side, threads=1, size=32, seconds=1.5)
        encoded = [bytes(dataset.encoded(i).data) for i in range(64)]
    for name in ("memory_gb_s", "decoder_images_s", "model_tflops"):
        rounds = found["rounds"][name]["rounds"]
        assert len(rounds) == 5 and found[name] == pytest.approx(float(np.median(rounds)), rel=0.01)
    # Oracles, with room for a busy machine: a copy by numpy, Pillow's decoder, a product by numpy.
    source = np.ones(16 << 20, np.uint8)
    copied = 2 * source.nbytes / fastest(lambda: source.copy()) / 1e9
    assert copied / 20 < found["memory_gb_s"] < 30 * copied
    pillow = 64 / fastest(lambda: [Image.open(io.BytesIO(one)).convert("RGB") for one in encoded])
    assert pillow / 20 < found["decoder_images_s"] < 10 * pillow
    a = np.ones((1024, 1024), np.float32)
    numpy = 2 * 1024**3 / fastest(lambda: a @ a) / 1e12
    assert numpy / 20 < found["model_tflops"] < 20 * numpy
    assert found["copy_gb_s"] is None  # nothing is copied to a CPU


def test_a_job_counts_what_it_does(monkeypatch) -> None:
    """Oracle: a call of 10 ms that does 5 of something does 500 a second, however often it is called in a round."""
    now = [0.0]
    monkeypatch.setattr(limits.time, "perf_counter", lambda: now[0])

    def once() -> None:
        now[0] += 0.01

    job = limits._Job(once, 5, lambda: None)
    job.seconds = 0.1
    assert job() == pytest.approx(500)
    assert now[0] == pytest.approx(0.01)  # one call: this round is the warm-up, and sizes the next one
    assert job() == pytest.approx(500)
    assert now[0] == pytest.approx(0.11)
    slow = limits._Job(once, 5, lambda: now.__setitem__(0, now[0] + 0.02))  # a device that works on for 20 ms
    assert slow() == pytest.approx(5 / 0.03)


def test_operations_of_an_image_are_counted_as_by_hand() -> None:
    """8 px: 3 to 4 channels, 3 x 3, stride 2; depthwise 3 x 3; then a linear layer of 4 x 4 x 4 to 10."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    products = 4 * 4 * 4 * 3 * 9 + 4 * 4 * 4 * 9 + 640
    before = [p.clone() for p in (*model.parameters(), *model.buffers())]
    assert limits.flop_per_image(model, 8) == 3 * 2 * products
    after = [*model.parameters(), *model.buffers()]
    assert all(torch.equal(a, b) for a, b in zip(before, after))  # counting trains nothing


def test_operations_that_cannot_be_counted_are_unknown() -> None:
    class Asks(nn.Module):
        def forward(self, images):
            return images * float(images.sum())  # needs a value, which tensors without memory have not

    assert limits.flop_per_image(Asks(), 8) is None


def test_raw_images_and_no_model_have_no_such_ceiling(beton_file, small_buffers: None) -> None:
    with fastload.open(beton_file("raw.beton", store="raw")) as dataset:
        found = limits.measure(dataset, None, threads=2, size=32, seconds=0.3)
    assert found["memory_gb_s"] > 0
    assert [found[name] for name in ("decoder_images_s", "model_tflops", "model_gflop")] == [None] * 3
    assert set(limits.shares(found, 100.0, None, [{"bytes": 1000}])) == {"memory"}


def test_a_damaged_image_is_left_out_of_the_decoder(tmp_path: Path, small_buffers: None) -> None:
    path = tmp_path / "bad.beton"
    writer = beton.Writer(path, [beton.Field("image", "image")], 2)
    good = io.BytesIO()
    Image.new("RGB", (32, 32)).save(good, "JPEG")
    for i, data in enumerate((good.getvalue(), b"no picture at all")):
        writer.add({"image": beton.EncodedImage("jpeg", 32, 32, data)}, id=str(i), source=str(i))
    writer.finish({"created_by": "tests"})
    with fastload.open(path) as dataset:
        assert [len(one[0]) for one in limits._jpegs(dataset, 1)] == [len(good.getvalue())]


def test_a_buffer_that_fits_the_caches_gives_no_figure(monkeypatch) -> None:
    import contextlib

    monkeypatch.setattr(limits.machine, "available_bytes", lambda: 8 << 20)
    with contextlib.ExitStack() as stack:
        assert limits._memory(stack) is None


def test_shares_are_arithmetic() -> None:
    """300 images/s of 200 + 300 kB read and written once each are 0.3 GB/s; 50 images/s of 4 GFLOP are 0.2 TFLOP/s."""
    ceilings = {"memory_gb_s": 3.0, "decoder_images_s": 150.0, "model_tflops": 0.8, "model_gflop": 4.0}
    found = limits.shares(ceilings, 300.0, 50.0, [{"bytes": 200_000}, {"bytes": 300_000}])
    assert found == {"memory": 0.1, "decoder": 2.0, "model": 0.25}


def test_a_noisy_ceiling_is_said_in_words() -> None:
    rounds = {"model_tflops": {"unit": "TFLOP/s", "rounds": [0.02, 0.03, 0.04, 0.03, 0.03]}}
    (note,) = noise_notes(limits.noisy({"rounds": rounds}))
    assert note.startswith("limit of matrix products: rounds differ by ±33% (20.0 to 40.0 GFLOP/s)")


def test_the_caches_of_this_machine_are_found() -> None:
    assert 1 << 18 <= limits.cache_bytes() <= 1 << 34


@pytest.fixture(scope="module")
def result(data: str):
    options = {"size": 32, "batch_size": 4, "device": "cpu", "threads": 1, "seconds": 3.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "cache_bytes", lambda: 1 << 20)
        patch.setattr(limits, "LEAST_BUFFER", 16 << 20)
        patch.setattr(limits, "LEAST_SECONDS", 1.0)
        return bench(data, MODEL, changes=False, progress=False, **options)


def test_a_bench_states_its_limits_and_the_verdict_does_not_rest_on_them(result) -> None:
    record = json.loads(json.dumps(result.to_json()))
    found = record["limits"]
    assert found["shares"] == limits.shares(
        found, record["loader"]["median"], record["model"]["median"], record["stages"]
    )
    assert 0 < found["shares"]["memory"] < 1 and 0 < found["shares"]["model"] < 1
    for words in ("Limits of this machine:", "GB/s", "decoder, whole images", "TFLOP/s", "is reached"):
        assert words in result.table()
    bare = {key: value for key, value in record.items() if key != "limits"}
    assert verdict.from_record(bare) == verdict.from_record(record) == result.verdict
    assert "Limits" not in table(bare)


def test_the_report_shows_them(result, tmp_path: Path) -> None:
    record = json.loads(json.dumps(result.to_json()))
    report = load([write_jsonl(tmp_path / "r.jsonl", [record])])
    page, text = report.html(), report.markdown()
    memory = record["limits"]["memory_gb_s"]
    shown = f"{memory:,.1f} GB/s" if memory >= 10 else f"{memory:,.2f} GB/s"
    assert f"| memory bandwidth | {shown} |" in text and shown in page
    for share in record["limits"]["shares"].values():
        assert f"{share:.0%}" in text


def test_the_report_says_a_noisy_ceiling_and_refuses_a_damaged_one(result, tmp_path: Path) -> None:
    record = json.loads(json.dumps(result.to_json()))
    rounds = record["limits"]["rounds"]["memory_gb_s"]
    rounds.update(rounds=[1.0, 2.0, 3.0, 2.0, 2.0], median=2.0)
    report = load([write_jsonl(tmp_path / "r.jsonl", [record])])
    assert "limit of memory: rounds differ by ±50% (1.0 to 3.0 GB/s)" in report.markdown()
    assert "limit of memory: rounds differ by ±50%" in report.html()
    rounds.update(median=9.0)
    with pytest.raises(DataError, match=r"'limits\.rounds\.memory_gb_s.median' is 9 but"):
        load([write_jsonl(tmp_path / "bad.jsonl", [record])])


def test_more_than_whole_images_can_give_is_shown_as_such(result, tmp_path: Path) -> None:
    record = json.loads(json.dumps(result.to_json()))
    record["limits"]["shares"]["decoder"] = 2.5
    assert "exceeded: the loader makes 2.5x as many" in table(record)
    report = load([write_jsonl(tmp_path / "r.jsonl", [record])])
    for text in (report.markdown(), report.html()):
        assert "the loader decodes only what a crop needs" in text
    record["limits"]["shares"]["decoder"] = 0.5
    assert "of which 50% is reached" in table(record)


def test_a_short_bench_says_that_it_left_them_out(data: str) -> None:
    result = bench(data, "none", size=32, batch_size=4, threads=1, seconds=1.0, changes=False, progress=False)
    assert "limits" not in result.to_json()
    assert any("--seconds 15 measures them" in note for note in result.notes)
