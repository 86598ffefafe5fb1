"""``fastload bench model``: known ratios come out, wrong work shows no speed, a failure leaves the others intact."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastload.benchmarks import machine
from fastload.benchmarks import model as room
from fastload.benchmarks.graphs import record_graph
from fastload.benchmarks.harness import write_jsonl
from fastload.benchmarks.model import ModelOptions, disagreement, measure, not_run, variants
from fastload.benchmarks.model_table import best, needs, sentence, table
from fastload.benchmarks.options import BenchOptions
from fastload.benchmarks.report import load
from fastload.benchmarks.side import Labels, ModelSide
from fastload.benchmarks.variants import Variant
from fastload.errors import UsageError
from fastload.train import Config, make_step

MODEL = "test_resnet"
SMALL = {"size": 32, "batch_size": 4, "device": "cpu", "classes": 5, "seconds": 1.0}
CPU = torch.device("cpu")


class Clock:
    """Time that passes only when a step says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def made_up(patch) -> SimpleNamespace:
    """Real steps whose time is made up: plain takes 40 ms, channels_last half of it, bf16 three quarters.

    What a test may change: ``wrong`` maps a variant's name to a function of its loss, ``seconds`` a name to seconds, ``fails`` a
    name to a number of calls and the error that it raises after them.
    """
    clock = Clock()
    patch.setattr(room.time, "perf_counter", clock)
    given = SimpleNamespace(
        clock=clock,
        wrong={},
        fails={},
        calls={},
        seconds={"plain": 0.04, "channels_last": 0.02, "bf16": 0.03, "channels_last + bf16": 0.015},
    )
    original = ModelSide.launch

    def launch(self, images, labels):
        name = self.variant.name
        given.calls[name] = given.calls.get(name, 0) + 1
        after, error = given.fails.get(name, (0, None))
        if error is not None and given.calls[name] > after:
            raise error
        loss = original(self, images, labels)
        clock.now += given.seconds[name]
        return given.wrong.get(name, lambda loss: loss)(loss)

    patch.setattr(ModelSide, "launch", launch)
    return given


@pytest.fixture
def steps(monkeypatch):
    return made_up(monkeypatch)


@pytest.fixture(scope="module")
def stored():
    """A record of an unknown model and one with the made-up times, as a file holds it; tests copy what they change."""
    with pytest.MonkeyPatch.context() as patch:
        made_up(patch)
        return json.dumps(measure(ModelOptions(("resnet81", MODEL), **SMALL)))


@pytest.fixture
def record(stored):
    return json.loads(stored)


def only(record):
    assert len(record["rows"]) == 1
    return record["rows"][0]


def by_name(row):
    return {variant["name"]: variant for variant in row["variants"]}


def reasons(row):
    return {failed["name"]: failed["reason"] for failed in row["failed"]}


def test_known_times_give_known_speeds_ratios_and_the_sentence(record) -> None:
    row = record["rows"][1]
    found = by_name(row)
    assert list(found) == ["plain", "channels_last", "bf16", "channels_last + bf16"]
    for name, seconds in zip(found, (0.04, 0.02, 0.03, 0.015)):  # oracle: 4 images in so many seconds
        assert found[name]["figure"]["rounds"] == pytest.approx([4 / seconds] * 5, rel=1e-4)
        assert found[name]["ratio"]["rounds"] == pytest.approx([0.04 / seconds] * 5, rel=1e-3)
        assert len(found[name]["losses"]) == 4
    assert row["best"] == "channels_last + bf16"
    assert row["loader_needs_images_s"] == pytest.approx(4 / 0.015, rel=1e-4)
    assert row["sentence"] == (
        "test_resnet: channels_last pays (2.0x), bf16 pays (1.33x); best is channels_last + bf16 with 267 images/s, 2.7x plain, "
        "so a loader must make 267 images/s for it never to wait."
    )
    assert found["plain"]["cost"] == "none" and found["bf16"]["cost"] == "precision of bf16"
    assert set(reasons(row)) == {v.name for v in variants("bf16") if v.compile or v.cuda_graph}
    assert "--compile runs it" in reasons(row)["compile"]
    assert "need a CUDA device" in reasons(row)["CUDA graph"]
    assert record["notes"] == []


def test_another_loss_shows_no_speed(steps) -> None:
    steps.wrong["channels_last"] = lambda loss: loss * 1.05
    row = only(measure(ModelOptions((MODEL,), **SMALL)))
    assert set(by_name(row)) == {"plain", "bf16", "channels_last + bf16"}
    assert (
        "no speed is shown, because its loss on the same weights and images is"
        in reasons(row)["channels_last"]
    )
    assert "channels_last pays" not in row["sentence"]


def test_a_step_that_learns_nothing_shows_no_speed(steps, monkeypatch) -> None:
    """It is twice as fast, and its first loss is right: only what comes after shows that no backward pass was made."""
    learn = ModelSide.launch

    def lazy(self, images, labels):
        if self.variant.name != "channels_last":
            return learn(self, images, labels)
        with torch.no_grad():
            loss = torch.nn.functional.cross_entropy(self.step.model(images), labels, label_smoothing=0.1)
        self.step.updates += 1
        return loss

    monkeypatch.setattr(ModelSide, "launch", lazy)
    row = only(measure(ModelOptions((MODEL,), **SMALL)))
    assert "channels_last" not in by_name(row)
    assert "over the same steps, and plain's" in reasons(row)["channels_last"]


def test_variants_learn_what_plain_learns() -> None:
    """Nothing made up here: the real losses of the four variants that a CPU runs agree, and the caller's numbers stay."""
    torch.manual_seed(7)
    expected = [torch.rand(3) for _ in range(4)]
    torch.manual_seed(7)
    drawn = []
    options = ModelOptions((MODEL,), **SMALL).for_side(MODEL, 4)
    losses = {}
    for variant in variants("bf16"):
        if not (variant.compile or variant.cuda_graph):
            drawn.append(torch.rand(3))
            side = ModelSide(options, Labels(5), CPU, variant=variant)
            losses[variant.name], seconds = room._learn(side)
            assert len(losses[variant.name]) == 4 and len(seconds) == 4
    assert torch.equal(torch.stack(drawn), torch.stack(expected))
    plain = losses["plain"]
    assert plain[0] > plain[-1]
    assert losses["channels_last"] == pytest.approx(plain, rel=1e-3)
    for name, amp in (("bf16", "bf16"), ("channels_last + bf16", "bf16"), ("channels_last", "off")):
        assert disagreement(plain, losses[name], amp) is None


@pytest.mark.parametrize(
    "other, words",
    [
        ([2.0, 1.5, 1.2, 1.0], None),
        ([2.003, 1.5, 1.2, 1.1], None),
        ([2.01, 1.5, 1.2, 1.0], "further apart than 0.2%"),
        ([2.0, 1.9, 1.9, 1.9], "its loss went 2.000 1.900 1.900 1.900"),
        ([2.0, 1.0, 0.5, 0.2], "its loss went"),
        ([2.0, 1.5, float("nan"), 1.0], "not finite"),
        ([2.0, 1.5], "it made 1 optimizer steps in 24 batches, and plain made 3"),
    ],
)
def test_disagreement(other, words) -> None:
    found = disagreement([2.0, 1.5, 1.2, 1.0], other, "off")
    assert found is None if words is None else words in found


@pytest.mark.parametrize("calls", [0, 2, 8], ids=["made", "checked", "measured"])
def test_a_variant_that_fails_leaves_the_others_intact(steps, calls) -> None:
    steps.fails["channels_last"] = (calls, RuntimeError("out of memory\nand much more"))
    row = only(measure(ModelOptions((MODEL,), **SMALL)))
    assert set(by_name(row)) == {"plain", "bf16", "channels_last + bf16"}
    assert all(len(v["figure"]["rounds"]) == 5 for v in row["variants"])
    assert reasons(row)["channels_last"].endswith(": out of memory")
    assert "\n" not in reasons(row)["channels_last"]


def test_a_variant_much_too_slow_is_not_measured_and_does_not_pay(steps) -> None:
    steps.seconds["bf16"] = 0.4
    row = only(measure(ModelOptions((MODEL,), **SMALL)))
    assert reasons(row)["bf16"] == "its steps took 10.0 times as long as the plain ones"
    assert steps.calls["bf16"] == 4
    assert "bf16 does not pay (10.0 times as slow)" in row["sentence"]


def test_an_unknown_model_leaves_the_others_intact(record) -> None:
    first, second = record["rows"]
    assert first["variants"] == [] and first["best"] == "" and first["loader_needs_images_s"] is None
    assert "did you mean" in first["failed"][0]["reason"] and len(first["failed"]) == 1
    assert first["sentence"] == "resnet81: no variant gave a figure."
    assert len(second["variants"]) == 4


def test_a_step_too_slow_for_the_budget_gets_a_smaller_batch(monkeypatch) -> None:
    """36 ms an image: 4 variants of 10 steps each leave 288 ms for one in 11.6 s, so 8 images fit and 16 do not."""
    clock = Clock()
    monkeypatch.setattr(room.time, "perf_counter", clock)
    original = ModelSide.launch

    def slow(self, images, labels):
        clock.now += 0.036 * len(images)
        return original(self, images, labels)

    monkeypatch.setattr(ModelSide, "launch", slow)
    record = measure(ModelOptions((MODEL,), **{**SMALL, "batch_size": 32, "seconds": 11.6}))
    row = only(record)
    assert row["batch_size"] == 8
    assert [v["figure"]["median"] for v in row["variants"]] == pytest.approx([1 / 0.036] * 4, rel=1e-3)
    assert any("it was measured with batches of 8; --seconds 46" in note for note in record["notes"])
    assert row["best"] == "plain" and "best is plain with 27.8 images/s, so" in row["sentence"]


def test_noise_is_said(steps) -> None:
    slower = itertools.count()

    def drift(loss):
        steps.clock.now += 0.01 * next(slower)
        return loss

    steps.wrong["plain"] = drift
    record = measure(ModelOptions((MODEL,), **SMALL))
    assert [note.split(" rounds differ by")[0] for note in record["notes"]] == ["test_resnet, plain:"]


def test_records_go_through_the_report(record, tmp_path: Path) -> None:
    assert record["environment"]["versions"]["torch"] and record["environment"]["date"]
    report = load([write_jsonl(tmp_path / "r.jsonl", [record])])
    row = report.records[0].body.rows[1]
    assert (row.model, row.size, row.batch_size) == (MODEL, 32, 4)
    assert (row.best, row.loader_needs) == ("channels_last + bf16", pytest.approx(266.667, rel=1e-4))
    assert row.doubt == "" and row.sentence == record["rows"][1]["sentence"]
    text, page = report.markdown(), report.html()
    for shown in (text, page):
        assert row.sentence in shown and "267" in shown and "2.67" in shown
        assert "need a CUDA device" in shown and "did you mean" in shown
    assert "| test\\_resnet |" in text or "| test_resnet |" in text


def test_a_sentence_that_the_figures_do_not_give_is_replaced(record, tmp_path: Path) -> None:
    record["rows"][1]["sentence"] = "test_resnet: everything pays."
    report = load([write_jsonl(tmp_path / "r.jsonl", [record])])
    row = report.records[0].body.rows[1]
    assert row.sentence.startswith("test_resnet: channels_last pays (2.0x)")
    assert "everything pays" in row.doubt and "everything pays" in report.html()


def test_other_models_are_another_question(record, tmp_path: Path) -> None:
    first = record
    second = {**first, "settings": {**first["settings"], "models": ["another"]}}
    assert len(load([write_jsonl(tmp_path / "r.jsonl", [first, second])]).newest()) == 2
    assert len(load([write_jsonl(tmp_path / "s.jsonl", [first, first])]).newest()) == 1


def made(name, ratios, **switches):
    rounds = [100 * r for r in ratios]
    figure = {"unit": "images/s", "median": float(np.median(rounds)), "rounds": rounds}
    by = {
        "unit": "x",
        "median": float(np.median(ratios)),
        "rounds": ratios,
        "min": min(ratios),
        "max": max(ratios),
    }
    off = {"channels_last": False, "amp": "off", "compile": False, "cuda_graph": False}
    return {"name": name, "figure": figure, "ratio": by, "cost": "none", **off, **switches}


def test_the_best_needs_a_gain_and_a_switch_more_needs_another_one() -> None:
    plain = made("plain", [1.0] * 5)
    last = made("channels_last", [1.5] * 5, channels_last=True)
    luck = made("compile", [1.6, 1.6, 1.6, 0.9, 0.9], compile=True)
    both = made("channels_last + bf16", [1.52] * 5, channels_last=True, amp="bf16")
    more = made("channels_last + bf16", [1.6] * 5, channels_last=True, amp="bf16")
    assert best([plain, last, both]) == "channels_last"  # 1.3% more for another switch is too little
    assert best([plain, last, more]) == "channels_last + bf16"
    assert best([plain, luck]) == "plain" and needs([plain, luck]) == 100
    assert best([plain]) == "plain" and best([]) == "" and needs([]) is None
    row = {"model": "m", "variants": [plain, luck, last], "failed": []}
    assert "compile is within the noise (1.60x)" in sentence(row)
    assert "channels_last pays (1.50x)" in sentence(row)


def test_the_table_shows_every_figure(record) -> None:
    lines = table(record).partition("\n\n")[2].splitlines()
    assert lines[0] == "test_resnet at 32 px, batches of 4"
    assert any(
        "channels_last " in line and "2.0x [2.00-2.00]" in line and "200 images/s" in line for line in lines
    )
    assert any(line.strip().startswith("compile: ") for line in lines)


@pytest.mark.parametrize(
    "variant, device, compile, words",
    [
        (Variant(compile=True), "cuda", None, None),
        (Variant(compile=True), "cuda", False, "--no-compile"),
        (Variant(compile=True), "cpu", None, "--compile"),
        (Variant(compile=True), "cpu", True, None),
        (Variant(cuda_graph=True), "cuda", None, None),
        (Variant(cuda_graph=True), "mps", None, "'mps'"),
        (Variant(), "cpu", None, None),
    ],
)
def test_what_is_not_run(variant, device, compile, words) -> None:
    found = not_run(variant, device, compile)
    assert found is None if words is None else words in found


def test_a_missing_compiler_is_one_sentence(tmp_path: Path) -> None:
    """The real torch.compile, in a process that finds no compiler and no kernel of an earlier run."""
    code = (
        "import json, torch; from fastload.benchmarks import model as m\n"
        "m.variants = lambda amp: [m.Variant(channels_last=False, amp='off'), "
        "m.Variant(channels_last=False, amp='off', compile=True)]\n"
        f"options = m.ModelOptions(('{MODEL}',), size=32, batch_size=4, device='cpu', classes=5, seconds=1, compile=True)\n"
        "print(json.dumps(m.measure(options)['rows'][0]))"
    )
    env = {**os.environ, "PATH": str(tmp_path), "CXX": str(tmp_path / "g++"), "PYTHONSAFEPATH": "1"}
    env |= {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])
    assert [v["name"] for v in row["variants"]] == ["plain"]
    assert "compiler" in reasons(row)["compile"] and "\n" not in reasons(row)["compile"]


# ---- CUDA graphs, as far as a CPU can say


def test_a_graph_is_refused_without_cuda() -> None:
    options = BenchOptions(MODEL, size=32, batch_size=4, device="cpu")
    with pytest.raises(UsageError, match=r"CUDA graphs need a CUDA device.*got 'cpu'"):
        ModelSide(options, Labels(5), CPU, variant=Variant(cuda_graph=True, amp="off"))


def test_a_graph_is_refused_where_gradients_are_summed() -> None:
    step = SimpleNamespace(device=SimpleNamespace(type="cuda"), accumulate=2)
    with pytest.raises(UsageError, match="use accumulate=1, got 2"):
        record_graph(step, torch.zeros(1))


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_what_is_recorded(monkeypatch, amp) -> None:
    """The model itself, on memory of its own with the batches' shape and layout, under the step's precision without its cache."""
    step = make_step(Config(model=MODEL, size=32, batch_size=2, amp="off"), 5, "cpu")
    seen = {}

    @contextlib.contextmanager
    def autocast(device, *, dtype, enabled, cache_enabled):
        seen["autocast"] = (device, dtype, enabled, cache_enabled)
        yield
        seen["left"] = True

    def record(model, sample):
        assert "left" not in seen
        seen["model"], seen["sample"] = model, sample
        return lambda images: model(images) * 2

    monkeypatch.setattr(torch, "autocast", autocast)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    step.device, step.amp = SimpleNamespace(type="cuda"), amp
    images = torch.rand(2, 3, 32, 32)
    if amp == "off":  # the layout is right already, so nothing but the recording itself makes a copy
        images = images.to(memory_format=torch.channels_last)
    record_graph(step, images)
    (sample,) = seen["sample"]
    dtype = torch.bfloat16 if amp == "bf16" else torch.float16
    assert seen["autocast"] == ("cuda", dtype, amp != "off", False) and seen["left"]
    assert seen["model"] is step.model
    assert torch.equal(sample, images) and sample.data_ptr() != images.data_ptr()
    assert sample.is_contiguous(memory_format=torch.channels_last)  # the trainer's layout
    step.model.eval()
    assert torch.equal(
        step.forward(images), step.model(images) * 2
    )  # what was recorded is what the step calls


# ---- the GPUs of a record


def test_a_record_names_the_gpus_that_torch_may_use(monkeypatch, record, tmp_path: Path) -> None:
    names = ["NVIDIA H100", "NVIDIA T4"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", names.__getitem__)
    assert machine.environment()["gpu"] == "NVIDIA H100, NVIDIA T4"
    record["environment"]["gpu"] = "NVIDIA H100, NVIDIA T4"
    assert "NVIDIA H100, NVIDIA T4" in load([write_jsonl(tmp_path / "r.jsonl", [record])]).html()

    def broken() -> bool:
        raise RuntimeError("the driver is too old")

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    assert "gpu" not in machine.environment()


# ---- the command


def shell(*arguments):
    command = [sys.executable, "-m", "fastload", "bench", "model", *map(str, arguments)]
    env = {**os.environ, "PYTHONSAFEPATH": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)


def test_the_command_prints_writes_and_reports(tmp_path: Path) -> None:
    out = tmp_path / "new" / "record.jsonl"
    options = [
        "--size",
        32,
        "--batch-size",
        2,
        "--classes",
        5,
        "--seconds",
        1,
        "--device",
        "cpu",
        "--json",
        "--out",
    ]
    done = shell("--models", f"{MODEL}, resnet81", *options, out)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert record == json.loads(out.read_text()) and record["kind"] == "model"
    assert [row["model"] for row in record["rows"]] == [MODEL, "resnet81"]
    assert "best is" in " ".join(done.stdout.split()) and "did you mean" in done.stdout
    command = [
        sys.executable,
        "-m",
        "fastload",
        "bench",
        "report",
        str(out),
        "--html",
        str(tmp_path / "p.html"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert record["rows"][0]["sentence"] in (tmp_path / "p.html").read_text("utf-8")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--models", "resnet81"], "unknown model 'resnet81'; did you mean"),
        (["--models", MODEL, "--rounds", "4"], "rounds must be at least 5, got 4"),
        (["--models", f"{MODEL},{MODEL}"], "several different ones, got 'test_resnet,test_resnet'"),
        (["--models", ","], "got ''"),
        (["--models", MODEL, "--device", "gpu"], "unknown device 'gpu'"),
    ],
)
def test_a_wrong_call_is_one_sentence(arguments, words) -> None:
    done = shell(*arguments)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1


@pytest.mark.parametrize(
    "change", [{"batch_size": 0}, {"size": 0}, {"classes": 1}, {"rounds": 4}, {"seconds": 0.0}]
)
def test_options_are_checked(change) -> None:
    with pytest.raises(UsageError, match=f"got {next(iter(change.values()))}"):
        ModelOptions((MODEL,), **change)


def test_the_help_names_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastload", "bench", "--help"], capture_output=True, text=True, timeout=120
    )
    assert "model " in done.stdout and "reached as ./model" in " ".join(done.stdout.split())
