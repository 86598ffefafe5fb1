"""``python -m fastload.benchmarks gpu``: the small run here, and what it does when time, a part, a test or a check fails."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_beton

import fastload
from fastload.benchmarks import gpu as suite
from fastload.benchmarks import gpu_loaders, gpu_parts
from fastload.benchmarks.gpu_loaders import Arm, Shape, compare, first_batches, open_loader
from fastload.benchmarks.gpu_suite import Budget, NotRun, hide, part_table, row, run_part
from fastload.benchmarks.harness import Series, read_jsonl
from fastload.errors import UsageError

SPEED = Series("speed", (10.0, 11.0, 12.0, 13.0, 14.0))


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_command_runs_here(tmp_path):
    """End to end: tables, one JSON line last, the same record in the file."""
    out = tmp_path / "results" / "gpu.jsonl"
    done = subprocess.run(
        [sys.executable, "-m", "fastload.benchmarks", "gpu", "--small", "--seconds", "12", "--out", str(out),
         "--skip", "tests,scaling"],
        capture_output=True, text=True, timeout=240, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads(done.stdout.splitlines()[-1])
    assert read_jsonl(out) == [record]
    assert record["kind"] == "gpu" and {"cpu", "cores", "versions", "commit"} <= set(record["environment"])
    parts = {part["name"]: part for part in record["parts"]}
    assert list(parts) == list(suite.PARTS)
    for name, part in parts.items():
        expected = "not run" if name in ("tests", "scaling") else "done"
        assert part["status"] == expected, part
        assert part["title"] in done.stdout or name in ("tests", "scaling")
        for one in part["rows"]:
            # A figure that was checked, or a reason why there is none.
            if one["figure"] is None:
                assert one["reason"], one
            else:
                figure = one["figure"]
                assert figure["n"] == len(figure["rounds"]) == 5 and figure["min"] <= figure["median"] <= figure["max"]  # fmt: skip
                assert one["check"]["passed"] is True, one
    assert parts["tests"]["reason"] == "left out by --skip"
    measured = {(one["file"], one["arm"]) for one in parts["loaders"]["rows"] if one["figure"] is not None}
    files = ["500 px JPEG", "256 px JPEG", "256 px raw", "32 px raw"]
    assert {(file, "cpu") for file in files} <= measured
    arms = {(one["file"], one["arm"]) for one in parts["loaders"]["rows"]}
    assert {(file, arm) for file in files for arm in gpu_loaders.ARMS} <= arms
    # No GPU: no speed of what needs one.
    assert not [m for m in measured if m[1] in gpu_parts.ARMS_OF_CUDA]
    assert all(one["figure"] is None for one in parts["kernel"]["rows"]) and len(parts["kernel"]["rows"]) == 2
    assert any(one["reason"] == gpu_parts.NO_GPU for one in parts["decode"]["rows"] if one["figure"] is None)
    (stall,) = parts["stall"]["rows"]
    assert stall["figure"]["unit"] == "% of the time" and 0 <= stall["figure"]["median"] <= 100
    assert stall["of_synthetic"] == pytest.approx(
        stall["loader"]["median"] / stall["synthetic"]["median"], abs=1e-3
    )
    assert record["seconds"] < 200 and record["settings"]["cuda"] is False


def test_the_tests_need_a_gpu(monkeypatch):
    part = run_part(
        "tests", "Tests", lambda s, n: gpu_parts.tests(SimpleNamespace(cuda=False), s, n), 5.0, {}
    )
    assert (part["status"], part["reason"], part["rows"]) == ("not run", "no CUDA GPU here", [])
    assert "not run: no CUDA GPU here" in part_table(part)


def test_time_is_shared_by_weight_and_handed_on():
    clock = Clock()
    budget = Budget(100, {"a": 1, "b": 1, "c": 2}, clock)
    assert budget.share("a") == 25
    clock.now += 5  # a took less: b and c have more
    assert budget.share("b") == pytest.approx(95 / 3)
    clock.now += 80  # b took too much: c has what is left
    assert budget.share("c") == 15
    clock.now += 50
    assert budget.left == 0
    with pytest.raises(UsageError, match="above 0"):
        Budget(0, {"a": 1})


def test_a_part_without_time_says_so():
    part = run_part("x", "X", lambda s, n: iter([row("r", SPEED)]), 1.0, {}, least=3.0)
    assert part["status"] == "not run" and "--seconds" in part["reason"] and part["rows"] == []


def stop(rig, seconds, notes):
    raise NotRun("nothing to do")
    yield


def test_a_part_that_raises_is_recorded_and_the_others_go_on(monkeypatch, tmp_path):
    def half(rig, seconds, notes):
        yield row("before", SPEED, check="looked at")
        raise ZeroDivisionError("a driver's mistake")

    def whole(rig, seconds, notes):
        notes.append("a note")
        yield row("after", SPEED, check="looked at")

    monkeypatch.setattr(suite, "PARTS", {"a": ("A", 1, half), "b": ("B", 1, stop), "c": ("C", 1, whole)})
    monkeypatch.setattr(suite.Rig, "make_files", lambda self, data, scratch, notes: None)
    monkeypatch.setattr(suite.Rig, "warm_up", lambda self: None)
    said = []
    record = suite.run(None, suite.GpuOptions(5, small=True), out=str(tmp_path / "r.jsonl"), say=said.append)
    a, b, c = record["parts"]
    assert a["status"] == "failed" and "ZeroDivisionError: a driver's mistake" in a["reason"]
    assert [one["name"] for one in a["rows"]] == ["before"]
    assert (b["status"], b["reason"]) == ("not run", "nothing to do")
    assert c["status"] == "done" and c["rows"][0]["figure"]["median"] == 12 and "a note" in c["notes"]
    assert "failed: ZeroDivisionError" in said[1] and "12.0 images/s" in said[3]
    assert read_jsonl(tmp_path / "r.jsonl")[0]["parts"] == json.loads(json.dumps(record["parts"]))


def test_a_red_check_hides_the_speed():
    one = row("x", SPEED, check="difference 90.0", wrong="its pixels differ")
    assert one["figure"] is None and one["check"]["passed"] is False
    text = part_table({"title": "T", "seconds": 1, "rows": [one], "notes": [], "status": "done"})
    assert "no speed is shown, because its pixels differ" in text and "images/s" not in text
    rows = [row("a", SPEED, engine="cuda", text="12 GB/s", gb_s=12), row("b", SPEED, engine="cpu")]
    hidden, shown = hide(rows, {"cuda": "the test x failed"})
    assert hidden["figure"] is None and "the test x failed" in hidden["reason"] and shown == rows[1]
    assert "12" not in json.dumps(hidden)


@pytest.mark.parametrize(
    ("name", "body", "red"),
    [
        ("test_engine_cuda.py", "def test_a(): assert 0\ndef test_b(): pass", {*gpu_parts.ARMS_OF_CUDA}),
        (
            "test_kernels_gpu.py",
            "def broken(: pass",
            {"kernel", *gpu_parts.ARMS_OF_CUDA},
        ),  # not even collected
        ("test_engine_segments.py", "def test_a(): assert 0", {"segments", "encoded"}),
        ("test_device_feed.py", "def test_a(): assert 0", {"resident"}),
        ("test_loader_engines.py", "def test_dali_on_gpu(): assert 0\ndef test_other(): assert 0", {"dali"}),
        (
            "test_engine_dali.py",
            "import pytest\ndef test_a(): pass\n@pytest.mark.skip\ndef test_b(): pass",
            set(),
        ),
    ],
)
def test_a_red_test_marks_its_engine(tmp_path, name, body, red):
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / name).write_text(body)
    told: dict[str, str] = {}
    one = gpu_parts.run_tests(folder / name, 60, told)
    assert set(told) == red
    assert one["check"]["passed"] is (not red) and (one["failed"] > 0) is bool(red)
    if not red:
        assert (one["passed"], one["skipped"]) == (1, 1)


def test_tests_that_do_not_end_say_nothing(tmp_path):
    (tmp_path / "test_engine_cuda.py").write_text("import time\ntime.sleep(60)")
    told: dict[str, str] = {}
    one = gpu_parts.run_tests(tmp_path / "test_engine_cuda.py", 1.5, told)
    assert told == {} and "did not end" in one["reason"] and one["figure"] is None


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    with fastload.open(make_beton(tmp_path_factory.mktemp("gpu") / "a.beton", count=32)) as dataset:
        yield dataset


def opened(*args, **options):
    return contextlib.closing(open_loader(*args, **options))


class Meddled:
    """A loader whose batches are changed, from the ``after``-th iteration on."""

    def __init__(self, loader, change, after=0):
        self.loader, self.change, self.after, self.turn = loader, change, after, 0
        self.batch_size, self.set_epoch = loader.batch_size, loader.set_epoch

    def __iter__(self):
        self.turn += 1
        for batch in self.loader:
            yield self.change(batch) if self.turn > self.after else batch


SHAPE = Shape(48, 8, 1, "float16")
MEDDLING = {
    "": lambda batch: batch,
    "other samples": lambda batch: batch._replace(index=batch.index.flip(0)),
    "differ": lambda batch: batch._replace(image=batch.image + 0.2),
    "one image": lambda batch: batch._replace(
        image=torch.cat([batch.image[:-1], batch.image[-1:].flip(3) + 0.5])
    ),
    "not finite": lambda batch: batch._replace(image=batch.image * float("nan")),
}


@pytest.mark.parametrize("wrong", MEDDLING)
def test_an_arm_is_held_against_the_cpu_engine(data, wrong):
    with opened(data, "cpu", SHAPE, None, decode="exact") as exact:
        want = first_batches(exact, True)
    assert len(want) == 3 and want[0][1].shape == (8, 3, 48, 48)
    with opened(data, "cpu", SHAPE, None) as loader:
        arm = Arm(Meddled(loader, MEDDLING[wrong]), True, want, 2.5, lambda: None)
    assert (wrong in arm.wrong) if wrong else arm.wrong == ""
    assert wrong or 0 < arm.difference < 2.5


def test_pixels_that_go_wrong_under_load_are_found_afterwards(data):
    with opened(data, "cpu", SHAPE, None) as loader:
        want = first_batches(loader, True)
        arm = Arm(Meddled(loader, MEDDLING["differ"], after=1), True, want, 2.5, lambda: None)
        arm.seconds = 0.01
        assert arm.wrong == "" and arm.round() > 0
        arm.check()
    assert "differ" in arm.wrong


def test_levels_are_those_of_the_stored_pixels(data):
    """fp16 batches back in levels equal the uint8 batches of the same draws."""
    with (
        opened(data, "cpu", SHAPE, None) as floats,
        opened(data, "cpu", Shape(48, 8, 1, "uint8"), None) as plain,
    ):
        most, wrong = compare(first_batches(floats, True), first_batches(plain, False), 0.2)
    assert wrong == "" and 0 <= most < 0.1


def test_an_arm_that_is_not_here_is_one_sentence(data):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(UsageError):
        open_loader(data, "cuda", SHAPE, "cuda")


def test_the_best_loader_has_a_figure_and_reads_the_file():
    def one(arm, speed, file="500 px JPEG"):
        return row(arm, Series(arm, (speed,) * 5) if speed else None, arm=arm, file=file, engine=arm)

    rows = [
        one("cpu", 5.0),
        one("cuda", None),
        one("dali", 7.0),
        one("resident", 90.0),
        one("dali own", 50.0),
    ]
    assert suite.best_loaders({"rows": rows}) == {"500 px JPEG": "dali"}
    found = {
        a["name"]: a for a in suite.aims([{"name": "loaders", "rows": rows}, {"name": "kernel", "rows": []}])
    }
    assert found["jpeg_of_dali"]["measured"] == pytest.approx(7 / 50) and found["jpeg_of_dali"]["reached"] is False  # fmt: skip
    assert found["resident_images_s"]["measured"] == 90
    assert found["stall_percent"] == {
        "name": "stall_percent",
        "aim": 1.0,
        "measured": None,
        "reached": None,
    }


def test_the_kernel_is_held_against_its_reference(data, monkeypatch):
    rig = SimpleNamespace(
        cuda=False, small=True, size=32, files={"500 px JPEG": data, "256 px JPEG": data}, sync=lambda: None
    )
    good = list(gpu_parts.kernel(rig, 1.0, []))
    assert [one["check"]["passed"] for one in good] == [True, True]
    from fastload.kernels import gpu

    original = gpu.crop

    def shifted(sources, table, out, paint):
        original(sources, table, out, paint)
        out[0, 0, 3, 3] += 3 * float(np.abs(paint.scale).max())

    monkeypatch.setattr(gpu, "crop", shifted)
    for one in gpu_parts.kernel(rig, 1.0, []):
        assert one["check"]["passed"] is False and "differs from the reference" in one["reason"]


def test_wrong_options_are_one_sentence():
    with pytest.raises(UsageError, match="loaders"):
        suite.GpuOptions(skip=("loader",))
    with pytest.raises(UsageError, match="above 0"):
        suite.GpuOptions(seconds=-1)
    assert suite.GpuOptions(small=True).budget == suite.SMALL_SECONDS
