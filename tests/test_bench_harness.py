"""The harness: statistics against numpy, interleaving, records; and the comparison's check of the work."""

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
from fastload.benchmarks.process import PeerProcess
from fastload.benchmarks.vs_ffcv import VsOptions, claims, compare_work, photo_files, unpack
from fastload.errors import DataError, MissingExtraError, UsageError

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


# ---- the comparison ----


def work(shift: float = 0.0, **changes):
    picture = np.full((7, 7, 3), 120.0) + shift
    base = {
        "shapes": [[224, 224, 3]],
        "dtypes": ["uint8"],
        "labels": [0, 1],
        "contrast": 50.0,
        "images": 2000,
    }
    return {**base, "mean_picture": picture.tolist(), **changes}


def test_equal_work_passes() -> None:
    assert compare_work(work(), work(1.0), 224)["worst_cell_levels"] == 1.0


@pytest.mark.parametrize(
    "theirs",
    [
        work(3.5),
        work(contrast=60.0),
        work(labels=[0, 0]),
        work(shapes=[[112, 112, 3]]),
        work(dtypes=["float32"]),
    ],
)
def test_no_speed_where_the_work_differs(theirs) -> None:
    with pytest.raises(DataError):
        compare_work(work(), theirs, 224)


def test_swapped_channels_are_seen() -> None:
    picture = np.zeros((7, 7, 3)) + [100, 120, 140]
    ours, theirs = work(mean_picture=picture.tolist()), work(mean_picture=picture[..., ::-1].tolist())
    with pytest.raises(DataError, match="mean pictures differ"):
        compare_work(ours, theirs, 224)


def test_claims_compare_ratios_and_seconds() -> None:
    record = {
        "train": {"ratio": {"median": 2.1}},
        "convert": {"ratio": {"median": 1.4}},
        "first_batch": {"fastload": {"median": 1.9}},
    }
    assert {name: claim["holds"] for name, claim in claims(record).items()} == {
        "train": True,
        "convert": False,
        "first_batch_s": True,
    }


def test_options_of_the_comparison_are_checked(tmp_path) -> None:
    with pytest.raises(UsageError, match="no folder or tar file"):
        VsOptions(str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="at least 5 rounds, got 3"):
        VsOptions(str(tmp_path), rounds=3)
    with pytest.raises(DataError, match="no images"):
        unpack(str(tmp_path), tmp_path)
    broken = tmp_path / "broken.tar"
    broken.write_bytes(b"not a tar file" * 100)
    with pytest.raises(DataError, match="cannot unpack"):
        unpack(str(broken), tmp_path)


def test_a_folder_inside_the_tar_is_found(tmp_path) -> None:
    from PIL import Image

    target = tmp_path / "wrapped" / "photos" / "cat"
    target.mkdir(parents=True)
    (tmp_path / "wrapped" / "photos" / "dog").mkdir()
    Image.new("RGB", (8, 8)).save(target / "a.jpg")
    found = unpack(str(tmp_path / "wrapped"), tmp_path)
    assert found == tmp_path / "wrapped" / "photos"
    assert [path.name for path in photo_files(found)] == ["a.jpg"]


def test_ffcv_missing_is_one_sentence_with_the_command(monkeypatch, tmp_path) -> None:
    from fastload.benchmarks.vs_ffcv import compare

    monkeypatch.setitem(sys.modules, "ffcv", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'fastload\[ffcv\]'"):
        compare(VsOptions(str(tmp_path)))


@pytest.mark.skipif(
    sys.platform != "linux", reason="stopping a process and reading its state is done on Linux"
)
def test_a_peer_is_stopped_between_its_turns_and_its_failure_is_one_sentence() -> None:
    with PeerProcess("fastload") as peer:
        assert peer.ask(do="idle")["cpu_s"] > 0
        time.sleep(0.1)
        with open(f"/proc/{peer.process.pid}/stat", encoding="ascii") as file:
            assert file.read().rpartition(")")[2].split()[0] == "T"
        with pytest.raises(DataError, match="peer 'fastload' failed at 'load'"):
            peer.ask(do="load", arguments=["/nowhere.beton", 1, 8, 32])
        assert peer.ask(do="idle")["cpu_s"] > 0  # it lives on
        pid = peer.process.pid
    assert peer.process.returncode is not None
    assert not os.path.exists(f"/proc/{pid}")
