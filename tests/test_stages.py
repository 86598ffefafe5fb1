"""Stages of the loader: the same pixels as without the clock, time given to the step that took it, bytes by hand."""

from __future__ import annotations

import statistics
import time

import numpy as np
import pytest
import torch

from fastload import Loader, beton, codecs, dataset
from fastload import transforms as T
from fastload.beton import Reader
from fastload.draws import Plan
from fastload.engines.cpu import Engine
from fastload.engines.profiled import ProfiledEngine
from fastload.errors import CorruptError, UsageError
from fastload.stages import STAGES, Clock, Stage, summarise


def invert(image):
    return 255 - image


def shrink(image):
    return np.ascontiguousarray(np.resize(image, (24, 24, 3)))


PIPELINES = {
    "train": T.train(48, jitter=0.3, erasing=0.5),
    "large": (T.RandomResizedCrop(96, scale=(0.05, 0.2)), T.VerticalFlip()),
    "reduced": (T.Resize((9, 11)),),
    "eval": T.eval(32),
    "pad": (T.Resize((30, 30)), T.RandomCrop(32, padding=6, fill=(9, 8, 7)), T.HorizontalFlip()),
    "after": (T.CenterCrop(32), T.PerImage(invert)),
    "front": (T.PerImage(shrink, size=24), T.PerImage(invert)),
}


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("store", ["jpeg", "raw"])
@pytest.mark.parametrize("decode", ["fast", "exact"])
def test_the_clock_changes_no_pixel(beton_file, store, pipeline, decode):
    ds, plan = dataset.open(beton_file(store=store)), Plan(PIPELINES[pipeline])
    table = plan.draw(7, 1, np.arange(20), ds.heights, ds.widths)
    plain, timed = Engine(ds, plan, decode), ProfiledEngine(ds, plan, Clock(), decode)
    for row in range(20):
        expected, got = np.full((2, *plan.size, 3), 17, np.uint8)
        got[:] = 201  # another sentinel: a pixel that one of them leaves out would show
        plain.execute(row, table, row, expected)
        timed.execute(row, table, row, got)
        assert np.array_equal(expected, got)
    expected, got = np.full((2, 20, *plan.size, 3), 17, np.uint8)
    got[:] = 201
    spans = ds.spans(np.arange(20))
    made = plain.fill(spans, table, 0, 20, expected)
    assert made.tolist() == timed.fill(spans, table, 0, 20, got).tolist()
    assert made.all() == (store == "raw" or decode == "fast") or plan.whole_image
    assert np.array_equal(expected[made], got[made])
    assert timed.clock.seconds.keys() == timed.clock.bytes.keys() and "read" in timed.clock.seconds


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_timed_batch_is_the_batch_that_threads_make(small, dtype):
    loader = Loader(
        small, 5, transforms=T.train(32, mixup=0.4, cutmix=1.0, jitter=0.2), shuffle=True, seed=4, dtype=dtype
    )
    made = []
    timed = loader._timed_batch

    def keep(*arguments):
        made.append(timed(*arguments))
        return made[-1]

    loader._timed_batch = keep
    loader.profile(25)
    # 6 passes of a batch: the fifth begins the epoch of four batches anew.
    expected = list(loader)
    assert len(made) == 6 and len(expected) == 4
    for ours, theirs in zip(made, expected + expected):
        assert torch.equal(ours.image, theirs.image) and torch.equal(ours.label, theirs.label)
        assert ours.index.tolist() == theirs.index.tolist() and ours.image.dtype == theirs.image.dtype


def test_profiling_leaves_the_loader_as_it_was(small):
    loader = Loader(small, 4, transforms=T.train(24), shuffle=True)
    batches = iter(loader)
    first, state, stats = next(batches), loader.state_dict(), loader.stats()
    kept = first.image.clone()
    loader.profile(8)
    assert loader.state_dict() == state and loader.stats() == stats and loader.errors == []
    assert torch.equal(first.image, kept)
    rest = [b.index.tolist() for b in batches]
    again = Loader(small, 4, transforms=T.train(24), shuffle=True)
    assert [first.index.tolist(), *rest] == [b.index.tolist() for b in again]


@pytest.mark.parametrize(
    "store, pipeline, dtype, expected",
    [
        ("jpeg", T.train(32), None, "draw read crop decode resize normalise"),
        ("raw", T.train(32), None, "draw read resize normalise"),
        ("raw", T.train(32)[:2], None, "draw read resize"),
        ("jpeg", T.train(32, jitter=0.2, mixup=0.2), None, "draw read crop decode resize colour normalise mix"),
        ("jpeg", (*T.train(32)[:2], T.PerImage(invert)), None, "draw read crop decode resize per_image"),
        ("jpeg", (T.PerImage(shrink, size=24),), None, "draw read decode per_image"),
        ("raw", T.train(32)[:2], "float16", "draw read resize normalise"),
    ],
)  # fmt: skip
def test_only_steps_that_are_done_are_stages(beton_file, store, pipeline, dtype, expected):
    loader = Loader(beton_file(store=store), 4, transforms=pipeline, dtype=dtype)
    stages = loader.profile(4)
    assert " ".join(stage.name for stage in stages) == expected
    assert all(stage.seconds > 0 and stage.bytes >= 0 and stage.name in STAGES for stage in stages)


def by_name(stages: list[Stage]) -> dict[str, Stage]:
    return {stage.name: stage for stage in stages}


def test_bytes_are_those_of_the_arrays(beton_file):
    """Whole square images of 64 px to 32: every figure can be said without running anything."""
    path = beton_file(size=(64, 64))
    raw = beton_file("raw.beton", size=(64, 64), store="raw")
    pipeline = (T.Resize((32, 32)), T.ColorJitter(0.2), T.PerImage(invert), T.Normalize())
    stages = by_name(Loader(path, 20, transforms=pipeline, decode="fast").profile(20))
    ds = dataset.open(path)
    encoded = statistics.mean(len(ds.encoded(i).data) for i in range(20))
    assert stages["read"].bytes == pytest.approx(encoded)
    assert 0.5 * encoded < stages["crop"].bytes < encoded  # all segments, without the index
    assert stages["decode"].bytes == 32 * 32 * 3  # luma at half of its size, chroma as it is
    assert stages["resize"].bytes == 32 * 32 * 3
    assert stages["colour"].bytes == stages["per_image"].bytes == 32 * 32 * 3
    assert stages["normalise"].bytes == 32 * 32 * 3 * 4
    stages = by_name(Loader(raw, 20, transforms=pipeline).profile(20))
    assert stages["read"].bytes == stages["resize"].bytes == 64 * 64 * 3


def slowed(function, seconds):
    """``function`` and a wait, as a method or a function."""

    def slow(*arguments, **options):
        time.sleep(seconds)
        return function(*arguments, **options)

    return slow


@pytest.mark.parametrize(
    "owner, name, stage",
    [
        (Engine, "_read", "read"),  # a slow disk
        (Reader, "image", "read"),
        (codecs, "decode_rgbx", "decode"),
        ("fastload.engines.cpu.jpeg", "cut", "crop"),
        ("fastload.engines.cpu.resize", "resize", "resize"),
        ("fastload.engines.cpu.pixels", "recolour", "colour"),
    ],
)
def test_what_is_slow_is_the_stage_that_grows(beton_file, monkeypatch, owner, name, stage):
    pipeline = (T.Resize((40, 40)), T.ColorJitter(0.3, p=1.0), T.Normalize())
    exact = owner is not Engine  # image by image, by functions that can be slowed
    loader = Loader(
        beton_file(), 10 if exact else 1, transforms=pipeline, decode="exact" if exact else "fast"
    )
    before = by_name(loader.profile(10))
    if isinstance(owner, str):
        monkeypatch.setattr(f"{owner}.{name}", slowed(_resolve(owner, name), 0.004))
    else:
        monkeypatch.setattr(owner, name, slowed(getattr(owner, name), 0.004))
    after = by_name(loader.profile(10))
    assert before.keys() == after.keys()
    grown = {key: after[key].seconds - before[key].seconds for key in after}
    assert 0.0039 < grown.pop(stage) < 0.008
    assert max(grown.values()) < 0.001


def test_the_kernels_own_clock_blames_the_step_that_works_more(beton_file, tmp_path):
    """Noise has ten times the symbols of a smooth picture, and is resized in the same time; twice the output is not."""
    shares = {}
    for name, noise, side in (("smooth", 0, 96), ("noise", 60, 96), ("large", 0, 224)):
        rng, path = np.random.default_rng(0), tmp_path / f"{name}.beton"
        writer = beton.Writer(path, [beton.Field("image", "image")], 16)
        for _ in range(16):
            pixels = np.clip(rng.normal(128, noise, (192, 192, 3)), 0, 255).astype(np.uint8)
            image = beton.EncodedImage("jpeg", 192, 192, codecs.encode_jpeg(pixels))
            writer.add({"image": image}, id="", source="")
        writer.finish({"created_by": "tests"})
        loader = Loader(path, 16, transforms=(T.Resize((side, side)),))
        shares[name] = by_name(loader.profile(80))
    assert shares["noise"]["decode"].seconds > 3 * shares["smooth"]["decode"].seconds
    assert shares["noise"]["resize"].seconds < 2 * shares["smooth"]["resize"].seconds
    assert shares["large"]["resize"].seconds > 2 * shares["smooth"]["resize"].seconds


def _resolve(owner, name):
    import importlib

    module, _, attribute = owner.rpartition(".")
    return getattr(getattr(importlib.import_module(module), attribute), name)


def test_a_slow_function_of_the_user_is_per_image(small):
    slow = slowed(invert, 0.005)
    loader = Loader(small, 5, transforms=(T.CenterCrop(24), T.PerImage(lambda image: slow(image))))
    stages = by_name(loader.profile(5))
    assert 0.005 < stages["per_image"].seconds < 0.009
    assert sum(s.seconds for name, s in stages.items() if name != "per_image") < 0.003


def test_stages_add_up_to_the_time_of_one_thread(photos, tmp_path):
    """Oracle: the clock on the wall of an ordinary epoch on one thread, in turns with the profile."""
    path = tmp_path / "photos.beton"
    writer = beton.Writer(path, [beton.Field("image", "image")], len(photos))
    for data in photos:
        pixels = codecs.load_rgb(data)
        image = beton.EncodedImage("jpeg", *pixels.shape[:2], codecs.encode_jpeg(pixels))
        writer.add({"image": image}, id="", source="")
    writer.finish({"created_by": "tests"})
    loader = Loader(path, len(photos), transforms=T.train(224), shuffle=True, threads=1)
    list(loader)
    totals, walls = [], []
    for _ in range(8):
        totals.append(sum(stage.seconds for stage in loader.profile(len(photos))))
        begun = time.perf_counter()
        for _ in loader:
            pass
        walls.append((time.perf_counter() - begun) / len(photos))
    # The least of each: what another process of this machine takes away is in neither.
    assert 0.65 < min(totals) / min(walls) < 1.35, (totals, walls)


def test_the_clock_gives_all_time_to_the_step_that_ends(monkeypatch):
    times = iter([10.0, 10.5, 10.5, 12.5, 13.0, 13.25, 99.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    clock = Clock()
    clock.mark("read", 100)  # 10 to 10.5
    clock.mark("decode", 7)  # 10.5 to 12.5; the clock's own work lasts until 13
    clock.mark("read", 50)  # 13 to 13.25
    assert clock.seconds == {"read": 0.75, "decode": 2.0} and clock.bytes == {"read": 150, "decode": 7}


def test_a_profile_is_the_median_of_its_passes_for_one_image():
    passes = []
    for seconds in (1.0, 5.0, 2.0):
        clock = Clock()
        clock.seconds, clock.bytes = {"decode": seconds, "read": 0.5}, {"decode": 30, "read": 10}
        passes.append(clock)
    passes[0].seconds["mix"] = 9.0  # in one pass of three: no stage of the median batch
    assert summarise(passes, 10) == [
        Stage("read", 0.05, 1.0),
        Stage("decode", 0.2, 3.0),
        Stage("mix", 0.0, 0.0),
    ]


def test_what_cannot_be_profiled_is_said(small):
    with pytest.raises(UsageError, match="images must be an integer of 1 or more, got 0"):
        Loader(small, 4, transforms=T.eval(24)).profile(0)
    loader = Loader(small, 64, transforms=T.eval(24), drop_last=True)
    with pytest.raises(UsageError, match="fewer samples than a batch"):
        loader.profile()
    loader = Loader(small, 4, transforms=T.eval(24))
    loader.close()
    with pytest.raises(UsageError, match="nothing to profile"):
        loader.profile()


def test_a_corrupt_sample_ends_a_profile_as_it_ends_an_iteration(small, monkeypatch):
    def corrupt(*arguments, **options):
        raise CorruptError("made for this test")

    loader = Loader(small, 4, transforms=T.eval(24), decode="exact")
    monkeypatch.setattr(codecs, "decode_rgbx", corrupt)
    with pytest.raises(CorruptError, match=r"id-0.*made for this test"):
        loader.profile(4)
