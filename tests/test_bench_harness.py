"""The harness: statistics against numpy, interleaving, records."""

from __future__ import annotations

import json
import os
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastload import system
from fastload.benchmarks import machine
from fastload.benchmarks.harness import (
    Series,
    Stopwatch,
    interleave,
    noise_notes,
    ratio,
    read_jsonl,
    write_jsonl,
)
from fastload.errors import DataError, UsageError

rates = st.lists(st.floats(0.01, 1e6), min_size=1, max_size=15)


@given(rates)
def test_series_statistics_are_numpys(values: list[float]) -> None:
    series = Series("a", tuple(values))
    assert series.median == pytest.approx(np.median(values))
    assert (series.low, series.high, series.n) == (np.min(values), np.max(values), len(values))
    assert series.noise == pytest.approx(np.ptp(values) / 2 / np.median(values))
    record = series.to_json()
    assert len(record["rounds"]) == len(values)
    assert record["median"] == pytest.approx(np.median(values), abs=1e-4)


@given(st.lists(st.tuples(st.floats(0.1, 1e5), st.floats(0.1, 1e5)), min_size=5, max_size=9))
def test_ratio_is_taken_within_a_round(pairs: list[tuple[float, float]]) -> None:
    a, b = (np.array(side) for side in zip(*pairs))
    found = ratio(Series("a", tuple(a)), Series("b", tuple(b)))
    assert found.median == pytest.approx(np.median(a / b))
    assert found.n == len(pairs)


def test_a_drift_that_hits_both_sides_leaves_the_ratio_alone() -> None:
    drift = np.array([1.0, 0.5, 0.25, 0.8, 0.3])
    found = ratio(Series("a", tuple(200 * drift)), Series("b", tuple(100 * drift)))
    assert (found.low, found.high) == (pytest.approx(2), pytest.approx(2))


def test_ratio_needs_the_same_rounds() -> None:
    with pytest.raises(UsageError, match="got 2 and 1"):
        ratio(Series("a", (1, 2)), Series("b", (1,)))


def test_interleave_takes_turns_and_throws_warm_up_away() -> None:
    calls: list[str] = []
    figures = {name: iter(range(100)) for name in "abc"}

    def job(name: str):
        def run() -> float:
            calls.append(name)
            return float(next(figures[name]))

        return run

    series = interleave({name: job(name) for name in "abc"}, rounds=5, warmup=2)
    assert [series[name].rounds for name in "abc"] == [(2, 3, 4, 5, 6)] * 3  # 0 and 1 were warm-up
    rounds = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert rounds == ["abc", "bca", "cab", "abc", "bca", "cab", "abc"]  # nobody is always first


@pytest.mark.parametrize("rounds", [0, 1, 4])
def test_fewer_than_five_rounds_are_no_figure(rounds: int) -> None:
    with pytest.raises(UsageError, match=f"at least 5 rounds, got {rounds}"):
        interleave({"a": lambda: 1.0}, rounds=rounds)


@pytest.mark.parametrize("turn", [0, 1, 3])  # in the warm-up, in the first round, in the middle
def test_a_job_that_fails_is_dropped_with_its_rounds_and_the_others_go_on(turn: int) -> None:
    calls: list[str] = []
    told: list[tuple[str, str]] = []

    def job(name: str):
        def run() -> float:
            calls.append(name)
            if name == "b" and calls.count("b") > turn:
                raise DataError("b broke")
            return float(calls.count(name))

        return run

    jobs = {name: job(name) for name in "abc"}
    series = interleave(jobs, rounds=5, on_error=lambda name, error: told.append((name, str(error))))
    assert told == [("b", "b broke")]
    assert {name: s.rounds for name, s in series.items()} == dict.fromkeys("ac", (2, 3, 4, 5, 6))
    assert calls.count("b") == turn + 1
    with pytest.raises(DataError, match="b broke"):
        interleave(jobs, rounds=5)


def test_noise_is_said_from_15_percent_on() -> None:
    silent = Series("quiet", (100, 110, 90, 100, 100))
    loud = Series("loud", (100, 140, 70, 100, 100))
    assert not silent.noisy
    assert "noisy" not in str(silent)
    assert loud.noisy
    assert "±35%" in str(loud)
    (note,) = noise_notes([silent, loud])
    assert note.startswith("loud: rounds differ by ±35%")


def test_stopwatch_measures_time() -> None:
    with Stopwatch() as watch:
        time.sleep(0.05)
    assert 0.045 < watch.seconds < 2


def test_records_are_appended_as_json_lines(tmp_path) -> None:
    path = tmp_path / "deep" / "results.jsonl"
    write_jsonl(path, [{"a": 1}])
    write_jsonl(path, [{"b": [1.5]}, {"c": None}])
    assert read_jsonl(path) == [{"a": 1}, {"b": [1.5]}, {"c": None}]
    assert len(path.read_text().splitlines()) == 3


def test_a_result_file_that_cannot_be_written_is_a_usage_error(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="choose another --out"):
        write_jsonl(tmp_path / "file" / "x.jsonl", [{}])


def test_environment_says_machine_versions_and_page_cache(tmp_path) -> None:
    path = tmp_path / "data"
    path.write_bytes(os.urandom(1 << 20))
    machine.warm_cache(path)
    record = machine.environment(path)
    assert json.loads(json.dumps(record)) == record
    assert record["versions"]["numpy"] == np.__version__
    assert record["file_bytes"] == 1 << 20
    assert 1 <= record["cores"] <= (os.cpu_count() or 1)
    if sys.platform == "linux":
        assert record["page_cache"] == "100% of the file"


def test_quota_is_read_from_both_versions_of_control_groups(monkeypatch) -> None:
    files = {"/proc/self/cgroup": "0::/job\n", "/sys/fs/cgroup/job/cpu.max": "150000 100000\n"}
    monkeypatch.setattr(system, "_read", lambda path: files.get(path, ""))
    assert system.quota_cores() == 1.5
    files["/sys/fs/cgroup/job/cpu.max"] = "max 100000\n"
    assert system.quota_cores() is None
    files["/sys/fs/cgroup/cpu/cpu.cfs_quota_us"] = "300000"
    files["/sys/fs/cgroup/cpu/cpu.cfs_period_us"] = "100000"
    assert system.quota_cores() == 3
