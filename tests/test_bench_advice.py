"""Which changes are run, in which order, and what is said of the others."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastload
from fastload import transforms
from fastload.benchmarks.advice import Candidate, Situation, candidates
from fastload.benchmarks.changes import Runner
from fastload.benchmarks.pairing import Pair, Round, Setting
from fastload.benchmarks.pipelines import Need, needed, without_normalize
from fastload.benchmarks.stored import Sample
from fastload.errors import UsageError

SLOW_LOADER = Situation(
    loader=400.0,
    model=4000.0,
    both=390.0,
    stall=0.9,
    stage="decode",
    device="cuda",
    threads=8,
    cores=8,
    stored_side=2000,
    need=Need("--max-side", 416),
    raw_bytes=1e9,
    floats=False,
    amp="bf16",
    pipeline=transforms.train(224),
)
SLOW_MODEL = dataclasses.replace(SLOW_LOADER, loader=4000.0, model=400.0, both=395.0, stall=0.001, amp="off")


def names(situation: Situation) -> list[str]:
    return [candidate.what for candidate in candidates(situation)[0]]


def why(situation: Situation, what: str) -> str:
    return next(entry.why for entry in candidates(situation)[1] if entry.what == what)


def test_no_loader_change_is_run_beside_a_slow_gpu_model() -> None:
    assert names(SLOW_MODEL) == ["mixed precision", "a larger batch", "NCHW memory"]
    assert why(SLOW_MODEL, "the loader's side") == (
        "the loader is 10x faster than the model: no change to it can help"
    )
    assert "--compile" in why(SLOW_MODEL, "torch.compile")
    assert "torch.compile" in names(dataclasses.replace(SLOW_MODEL, compile=True))


def test_no_model_change_is_run_beside_a_slow_loader() -> None:
    assert names(SLOW_LOADER)[:2] == ["a smaller stored size", "raw store at 416 px"]
    assert not {"mixed precision", "NCHW memory"} & set(names(SLOW_LOADER))
    assert "the model is 10x faster" in why(SLOW_LOADER, "the model's side")


def test_on_shared_cores_the_faster_side_still_takes_time_from_the_other() -> None:
    shared = dataclasses.replace(SLOW_MODEL, shared_cores=True, device="cpu", floats=True, threads=2, cores=2)
    assert names(shared)[0] == "mixed precision"
    assert "fewer loader threads" in names(shared)
    far = dataclasses.replace(shared, loader=400.0 * 360)
    assert (
        why(far, "the loader's side") == "the loader is 360x faster than the model: no change to it can help"
    )
    assert "fewer loader threads" not in names(far)


@pytest.mark.parametrize(
    "stage, first",
    [
        ("read", "a smaller stored size"),
        ("decode", "a smaller stored size"),
        ("copy", "uint8 batches"),
        ("per_image", "no PerImage"),
    ],
)
def test_the_limiting_stage_decides_what_is_run_first(stage: str, first: str) -> None:
    pipeline = (*transforms.train(224)[:-1], transforms.PerImage(lambda image: image), transforms.Normalize())
    s = dataclasses.replace(SLOW_LOADER, stage=stage, threads=64, floats=True, pipeline=pipeline)
    run = names(s)
    if stage in ("read", "decode"):
        run.remove("no PerImage step")
    assert run[0].startswith(first), run


def test_what_cannot_help_is_not_run_and_says_why() -> None:
    s = dataclasses.replace(SLOW_LOADER, stored_side=430)
    assert "416 px, and 430 px are stored" in why(s, "a smaller stored size")
    assert "raw already" in why(dataclasses.replace(s, store="raw"), "raw store")
    assert "reading is what limits" in why(dataclasses.replace(s, stage="read"), "raw store")
    assert "of the disk are free" in why(dataclasses.replace(s, room_bytes=1e8), "raw store")
    assert "memory to keep it in" in why(dataclasses.replace(s, memory_bytes=1e9), "raw store")
    assert "keep all 8 cores busy" in why(s, "more loader threads")
    assert "until the device has them" in why(s, "uint8 batches, normalised on the device")
    assert "cut to fit" in why(dataclasses.replace(s, cut_batch=True), "a larger batch")
    assert "100 images" in why(dataclasses.replace(s, images=100), "a larger batch")
    assert "fast one already" in why(s, "fast decode")
    assert "fast decode" in names(dataclasses.replace(s, decode="exact"))
    assert "pixels from the images as they are" in why(
        dataclasses.replace(s, need=None), "a smaller stored size"
    )
    refused = dataclasses.replace(s, engines=("cpu", "turbo"), refused={"warp": "it needs antimatter"})
    assert "engine turbo" in names(refused)
    assert why(refused, "engine warp") == "it needs antimatter"


situations = st.builds(
    Situation,
    loader=st.floats(1, 1e5),
    model=st.floats(1, 1e5),
    both=st.floats(1, 1e5),
    stall=st.floats(0, 1),
    stage=st.sampled_from(
        [None, "read", "crop", "decode", "resize", "colour", "per_image", "copy", "draw", "new"]
    ),
    shared_cores=st.booleans(),
    threads=st.integers(1, 64),
    cores=st.integers(1, 64),
    prefetch=st.integers(1, 8),
    batch_size=st.integers(1, 512),
    images=st.integers(1, 10**6),
    decode=st.sampled_from(["fast", "exact"]),
    store=st.sampled_from(["jpeg", "raw"]),
    stored_side=st.integers(16, 4000),
    need=st.none() | st.builds(Need, st.sampled_from(["--max-side", "--short-side"]), st.integers(16, 600)),
    raw_bytes=st.floats(1, 1e12),
    floats=st.booleans(),
    cut_batch=st.booleans(),
    amp=st.sampled_from(["off", "bf16"]),
    compile=st.booleans(),
    pipeline=st.just(transforms.train(224)),
)


@given(situations)
def test_every_change_is_run_or_named_once_and_really_changes_something(s: Situation) -> None:
    run, left = candidates(s)
    whats = [entry.what for entry in (*run, *left)]
    assert len(set(whats)) == len(whats)
    base = Setting(s.batch_size, s.threads, s.prefetch, s.pipeline, s.engine, s.decode)
    for candidate in run:
        changed = dataclasses.replace(base, **candidate.change)
        assert changed != base or candidate.variant or candidate.convert, candidate
        assert changed.threads >= 1 and changed.batch_size >= 1
        assert changed.batch_size <= s.images or changed.batch_size == s.batch_size or s.images < s.batch_size


@pytest.mark.parametrize(
    "pipeline, need",
    [
        (transforms.train(224), Need("--max-side", 416)),  # 224 / sqrt(0.54) * 4 / 3 = 406.4, up to 16
        (transforms.train(224, scale=(1.0, 1.0)), Need("--max-side", 304)),
        (transforms.eval(224), Need("--short-side", 256)),
        ((transforms.Resize((48, 64)),), Need("--max-side", 64)),
        ((transforms.RandomCrop(32, padding=4),), None),
        ((transforms.PerImage(lambda image: image, size=8),), None),
        ((), None),
    ],
)
def test_the_stored_size_that_a_pipeline_needs(pipeline: Any, need: Need | None) -> None:
    assert needed(pipeline) == need


def test_a_sample_is_spread_repeated_converted_and_removed(beton_file: Any) -> None:
    path = beton_file(count=40, size=(64, 96))
    with fastload.open(path) as dataset, Sample(dataset, 8) as sample:
        assert len(sample) == 40
        assert len(sample.as_is) >= 8 * 64
        stored = sample.convert({"store": "raw", "max_side": 48})
        folder = Path(stored.data.path).parent
        assert stored.data.encoded(0).mode == "raw"
        assert {stored.data.encoded(i).data.nbytes for i in range(40)} == {32 * 48 * 3}
        # All 40 were converted, so nothing is scaled: the file's own size.
        assert stored.bytes == os.path.getsize(stored.data.path)
        assert np.array_equal(stored.data.labels[:40], dataset.labels)
    assert not folder.exists()


def test_the_figures_of_a_sample_are_scaled_to_all(beton_file: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastload.benchmarks.stored.MOST_IMAGES", 10)
    monkeypatch.setattr("fastload.benchmarks.stored.LEAST_IMAGES", 10)
    with fastload.open(beton_file(count=40, size=(64, 96))) as dataset, Sample(dataset, 8) as sample:
        assert len(sample) == 10
        stored = sample.convert({"store": "raw"})
        assert stored.bytes == pytest.approx(4 * os.path.getsize(stored.data.path))


def paced(speeds: dict[int, float], calls: list[int]) -> Any:
    """Rounds whose speed depends on the number of threads only, and that take no time."""

    def together(self: Pair, steps: int) -> Round:
        calls.append(self.setting.threads)
        return Round(speeds[self.setting.threads], 0.0, 0.0)

    return together


def runner(pair: Pair, seconds: float = 30.0, **options: Any) -> Runner:
    return Runner(pair, lambda setting: None, until=time.perf_counter() + seconds, seconds=seconds, **options)


def threads(count: int, speed: str = "") -> Candidate:
    return Candidate(f"{count} threads{speed}", f"Loader(threads={count})", "loader", "", {"threads": count})


def test_changes_alternate_with_the_unchanged_and_the_best_is_measured_again(
    small: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(Pair, "together", paced({1: 100.0, 2: 90.0, 3: 130.0}, calls))
    monkeypatch.setattr("fastload.benchmarks.changes.TOO_SLOW", np.inf)  # a busy machine drops none
    with (
        fastload.open(small) as dataset,
        Pair(dataset, Setting(4, pipeline=transforms.train(16)), None) as base,
    ):
        base.warm_up(0.01)
        measured, left = runner(base).run([threads(2), threads(3)])
    assert not left
    assert [(m.what, m.gain, round(m.ratio.median, 3)) for m in measured] == [
        ("3 threads", True, 1.3),
        ("2 threads", False, 0.9),
    ]
    assert [m.ratio.n for m in measured] == [10, 5]  # the first one was measured twice
    assert calls[:18].count(1) == calls[:18].count(2) == calls[:18].count(3) == 6  # five rounds and a warm-up
    assert calls[18:] == [1, 3, 3, 1, 1, 3, 3, 1, 1, 3, 3, 1]
    assert measured[0].cost == "none"


def test_a_winner_that_loses_its_second_measurement_is_no_gain(
    small: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lucky: dict[int, list[float]] = {1: [], 2: [], 3: []}

    def together(self: Pair, steps: int) -> Round:
        seen = lucky[self.setting.threads]
        seen.append(0.0)
        speed = {1: 100.0, 2: 130.0 if len(seen) <= 6 else 80.0, 3: 110.0}[self.setting.threads]
        return Round(speed, 0.0, 0.0)

    monkeypatch.setattr(Pair, "together", together)
    monkeypatch.setattr("fastload.benchmarks.changes.TOO_SLOW", np.inf)  # a busy machine drops none
    with (
        fastload.open(small) as dataset,
        Pair(dataset, Setting(4, pipeline=transforms.train(16)), None) as base,
    ):
        base.warm_up(0.01)
        measured, _ = runner(base).run([threads(2), threads(3)])
    assert [(m.what, m.gain) for m in measured] == [("3 threads", True), ("2 threads", False)]
    assert [m.ratio.n for m in measured] == [10, 10]


def test_what_has_no_time_or_fails_is_named_and_the_others_are_run(small: str) -> None:
    broken = Candidate("a broken one", "x", "loader", "", {"engine": "warp"})
    with (
        fastload.open(small) as dataset,
        Pair(dataset, Setting(4, pipeline=transforms.train(16)), None) as base,
    ):
        base.warm_up(0.01)
        candidates = [broken, threads(2), *(threads(n, "!") for n in range(3, 40))]
        measured, left = runner(base, 6.0).run(candidates)
    # Which ones fit depends on how busy the machine is; each is named once, on one side or the other.
    assert measured
    assert sorted(x.what for x in [*measured, *left]) == sorted(c.what for c in candidates)
    reasons = {entry.what: entry.why for entry in left}
    assert "unknown engine 'warp'" in reasons["a broken one"]
    assert reasons["39 threads!"] == "no time left: --seconds 12 runs it"


def test_bytes_reach_a_step_that_normalises_only(small: str) -> None:
    pipeline = without_normalize(transforms.train(16))
    assert not any(isinstance(spec, transforms.Normalize) for spec in pipeline)
    with fastload.open(small) as dataset, Pair(dataset, Setting(4, pipeline=pipeline), None) as pair:
        pair.warm_up(0.01, size=16)
        with pytest.raises(UsageError, match="size=17"):
            pair.warm_up(0.01, size=17)
        with pytest.raises(UsageError, match="no model's figure"):
            pair.learning(1)
