"""``--tune``: the search finds a hidden best, the proof is honest, and the text can be pasted."""

from __future__ import annotations

import itertools
import json
import shlex
from typing import Any

import click
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import fastload
from fastload import transforms
from fastload.benchmarks import tune as room
from fastload.benchmarks.harness import Series
from fastload.benchmarks.pairing import Pair, Round
from fastload.benchmarks.tune import AXES, Point, paste, search, sentence, tune, values
from fastload.cli import cli
from fastload.cli.train import command as train_command
from fastload.errors import UsageError

START = Point(threads=2, prefetch=2, batch_size=64)


def choices(axis: str, now: Point) -> list[int]:
    return values(axis, now, cores=4, images=10_000, largest=10_000)


@given(
    st.sampled_from([1, 2, 3, 4, 6, 8]),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([16, 32, 64, 128, 256]),
)
@settings(max_examples=40)
def test_the_search_finds_the_peak_of_a_landscape_without_ridges(
    threads: int, prefetch: int, batch: int
) -> None:
    """Oracle: each axis is best at its own hidden value, so the coordinates lead there."""
    peak = Point(threads, prefetch, batch)

    def turn(point: Point) -> float:
        figure = 1000.0
        for axis in AXES:
            a, b = getattr(point, axis), getattr(peak, axis)
            figure *= min(a, b) / max(a, b)
        return figure

    best, figures = search(START, AXES, choices, turn, lambda: False)
    assert best == peak
    assert max(figures, key=lambda point: figures[point][0]) == peak


def test_flat_land_and_noise_below_the_threshold_leave_the_defaults() -> None:
    wobble = itertools.cycle([1.0, 1.01, 0.995, 1.005])
    best, figures = search(START, AXES, choices, lambda point: 100 * next(wobble), lambda: False)
    assert best == START
    assert len(figures) > 10


def test_the_search_stops_when_the_time_is_up_and_trusts_no_half_measured_value() -> None:
    calls: list[Point] = []

    def turn(point: Point) -> float:
        calls.append(point)
        return float(point.threads)

    best, _ = search(START, AXES, choices, turn, lambda: len(calls) >= 6)
    assert best == START
    assert len(calls) <= 7


def test_values_stay_inside_what_is_possible() -> None:
    assert values("threads", START, cores=1, images=10, largest=64) == [1]
    assert values("batch_size", START, cores=4, images=100, largest=10_000) == [32]
    assert values("batch_size", START, cores=4, images=10_000, largest=128) == [32, 128]
    assert 2 not in values("prefetch", START, cores=4, images=10_000, largest=128)
    with pytest.raises(UsageError, match="got 'engine'"):
        values("engine", START, cores=4, images=1, largest=1)


def paced(speed: Any) -> Any:
    return lambda self, steps: Round(float(speed(self.setting)), 0.0, 0.0)


def run(data: str, **options: Any) -> dict[str, Any]:
    return tune(data, "none", size=16, batch_size=4, seconds=4.0, device="cpu", progress=False, **options)


def test_what_beats_the_defaults_is_proved_in_alternating_rounds(
    small: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room.machine, "usable_cores", lambda: 2)
    monkeypatch.setattr(
        Pair, "together", paced(lambda s: 100 + 20 * (s.threads == 4) + 10 * (s.batch_size == 8))
    )
    record = json.loads(json.dumps(run(small)))
    assert record["kind"] == "tune"
    assert record["default"] == {"threads": 2, "prefetch": 2, "batch_size": 4, "images_s": 100}
    assert record["best"] == {"threads": 4, "prefetch": 2, "batch_size": 8, "images_s": 130}
    assert record["ratio"]["rounds"] == [1.3] * 5
    assert record["sentence"].startswith("4 threads, prefetch 2, batches of 8 is 1.30x the defaults")
    assert record["sentence"] == sentence(record)
    assert "threads=4, prefetch=2" in record["paste"]
    assert any("another training" in note for note in record["notes"])
    assert not any("the time was up" in note for note in record["notes"])
    monkeypatch.setattr(room, "search", lambda start, *rest: (start, {start: [1.0], Point(4, 2, 4): [1.0]}))
    short = run(small)
    assert (
        "the time was up before another batch size or prefetch was tried; --seconds 12 reaches it"
        in short["notes"]
    )
    monkeypatch.setattr(room, "search", search)
    kept = run(small, keep_batch_size=True)
    assert {entry["batch_size"] for entry in kept["tried"]} == {4}
    assert not any("another training" in note for note in kept["notes"])


def test_a_lucky_search_does_not_beat_the_defaults(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that are fast in short turns and slow in the final rounds."""
    final: list[bool] = []
    proof = room._Tuner._prove

    def prove(self: Any, *arguments: Any) -> Any:
        final.append(True)
        return proof(self, *arguments)

    monkeypatch.setattr(room._Tuner, "_prove", prove)
    monkeypatch.setattr(room.machine, "usable_cores", lambda: 2)
    monkeypatch.setattr(Pair, "together", paced(lambda s: 100 + (-20 if final else 20) * (s.threads == 4)))
    record = run(small, keep_batch_size=True)
    assert record["best"]["threads"] == 4
    assert record["sentence"].startswith("The defaults (2 threads, prefetch 2, batches of 4) are best")
    assert "0.80x" in record["sentence"]
    assert "threads=2" in record["paste"]


def test_defaults_that_nothing_beats_are_called_best(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pair, "together", paced(lambda s: 100))
    record = run(small)
    assert record["ratio"] is None
    assert record["best"] == record["default"]
    assert "are best: none of the" in record["sentence"]


def test_what_is_printed_can_be_pasted(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = paste(Point(3, 4, 32), "resnet18", small, transforms.train(16))
    loader_line, train_line = text.splitlines()
    monkeypatch.chdir(small.rpartition("/")[0])
    loader = eval(loader_line, {"fastload": fastload})
    assert (loader.threads, loader.prefetch, loader.batch_size) == (3, 4, 32)
    assert next(iter(loader)).image.shape[2:] == (16, 16)
    loader.close()
    assert "transforms.eval(16)" in paste(Point(3, 4, 32), None, small, transforms.eval(16))
    words = shlex.split(train_line)
    assert words[:2] == ["fastload", "train"]
    given = train_command.make_context(
        "train", words[2:], parent=click.Context(cli, **cli.context_settings)
    ).params
    assert (given["threads"], given["batch_size"], given["model"]) == (3, 32, "resnet18")


def test_a_real_search_measures_real_batches(small: str) -> None:
    record = run(small)
    assert all(entry["images_s"] > 0 for entry in record["tried"])
    assert record["sentence"].endswith(".")
    if record["ratio"]:
        assert Series("ratio", tuple(record["ratio"]["rounds"])).n == 5
    assert record["settings"]["model"] == "none"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (
            ["--tune", "--threads", "3"],
            "--threads goes with a plain bench or --compare only, not with --tune; got 3",
        ),
        (["--keep-batch-size"], "--keep-batch-size goes with --tune only, not with a plain bench; got True"),
        (["--tune", "--compare", "cpu"], "give one of them"),
        (["--compare", "cpu", "--model", "resnet18"], "--model goes with a plain bench or --tune only"),
    ],
)
def test_options_of_another_mode_are_refused(arguments: list[str], words: str) -> None:
    done = CliRunner().invoke(cli, ["bench", "x.beton", *arguments])
    assert isinstance(done.exception, UsageError)
    assert words in str(done.exception)


def test_the_first_word_may_be_a_subcommand(small: str) -> None:
    done = CliRunner().invoke(cli, ["bench", "--help"])
    assert "report" in done.output and "model" in done.output
    assert "FILES" in CliRunner().invoke(cli, ["bench", "report", "--help"]).output
    options = ["--model", "none", "--size", "16", "--batch-size", "4", "--seconds", "2", "--tune", "--json"]
    done = CliRunner().invoke(cli, ["bench", small, *options])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["kind"] == "tune"
    assert "Paste:\n  fastload.Loader(" in done.stdout
