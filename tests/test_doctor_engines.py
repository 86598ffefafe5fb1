"""What ``fastload doctor`` says of ``engine="auto"``: the fastest one, of the file that was given, whatever dies on the way."""

from __future__ import annotations

import io
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastload import beton, choose, cli, doctor, doctor_engines
from fastload.doctor import run_tasks
from fastload.errors import DataError, UsageError

WORKS = {"works": True}


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder in which temporary folders are made."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def rates(monkeypatch):
    """Speeds by engine, in place of measuring."""
    known = {"cpu": 40.0, "dali": 900.0}
    monkeypatch.setattr(choose, "rate", lambda loader, seconds: known[loader.engine])
    return known


def answering(value, asked=None):
    """A ``run_tasks`` whose child answers ``value`` to everything."""

    def run(tasks, *, seconds=0.0, progress=None):
        if asked is not None:
            asked.extend(tasks)
        return {task: {"ok": True, "value": value} for task in tasks}

    return run


# ---- which, and of what ---------------------------------------------------------------------------------------------


def test_the_file_that_is_given_is_measured_in_a_child(beton_file):
    path = beton_file("mine.beton", count=23, size=(300, 260))
    entry = doctor_engines.measured(run_tasks, path, WORKS)
    assert (entry["file"], entry["images"]) == (path, 23)
    assert path in entry["data"] and "crops of 224, batches of 64" in entry["data"]
    speeds = entry["images_per_s"]
    # An epoch of 23 images would be one batch, of which there is no speed; nothing is slower or faster than these bounds.
    assert all(10 < rate < 1e6 for rate in speeds.values()) and "cpu" in speeds
    assert entry["engine"] == max(speeds, key=speeds.get)
    assert set(speeds) | set(entry["left_out"]) == {"cpu", "dali", "cuda"}
    assert entry["engine"] in entry["chosen"]
    assert json.loads(json.dumps(entry)) == entry


def test_the_fastest_is_named_and_not_always_the_first(rates, small):
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed: pip install 'fastload[dali]'")
    value = doctor_engines.measure(small)
    assert (value["engine"], value["images_per_s"]) == ("dali", rates)
    rates["cpu"] = 901.0
    assert doctor_engines.measure(small)["engine"] == "cpu"


def test_an_only_engine_has_a_speed_and_the_others_a_reason(rates, small, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    value = doctor_engines.measure(small)
    assert (value["engine"], value["images_per_s"]) == ("cpu", {"cpu": 40.0})
    assert "pip install 'fastload[dali]'" in value["left_out"]["dali"]
    assert value["left_out"]["cuda"] == "torch sees no NVIDIA GPU here"
    assert "only one" in value["chosen"] and "0 images/s" not in value["chosen"]


def test_lines_for_people():
    entry = {
        "engine": "cpu",
        "images_per_s": {"dali": 1203.9, "cpu": 2913.2},
        "left_out": {"cuda": "no GPU"},
        "chosen": "who decodes",
        "data": "64 generated photographs",
        "device": "cpu",
    }
    text = "\n".join(doctor_engines.lines(entry))
    assert (
        "takes 'cpu' here: cpu 2,913 images/s, dali 1,204 images/s; cuda not measured: no GPU\n" in text
        and "64 generated photographs, on cpu" in text
        and "who decodes" not in text
    )
    assert "who decodes" in "\n".join(doctor_engines.lines({**entry, "engine": "cuda"}))


# ---- the sample -----------------------------------------------------------------------------------------------------


def test_the_sample_costs_a_decoder_what_photographs_cost(tmp_path):
    with beton.Reader(doctor_engines.make_sample(str(tmp_path))) as file:
        assert len(file) == doctor_engines.PHOTOS
        data = [bytes(file.image(index).data) for index in range(len(file))]
    assert len(set(data)) == len(data)
    pictures = [Image.open(io.BytesIO(one)).convert("RGB") for one in data]
    assert {max(picture.size) for picture in pictures} == {500}
    bits = 8 * sum(map(len, data)) / sum(picture.width * picture.height for picture in pictures)
    assert 2.3 < bits < 3.1  # 500 photographs of ImageNet at 500 px: 2.73 (converted with reencode="always")
    assert all(30 < np.asarray(picture).std() < 90 for picture in pictures)


def test_the_sample_is_there_while_it_is_measured_and_gone_after(temporary):
    seen = []

    def run(tasks, *, seconds):
        folder = Path(tasks[0].removeprefix("sample:"))
        assert folder.parent == temporary and folder.is_dir()
        (folder / "sample.beton").write_bytes(b"x")
        seen.append(folder)
        return {tasks[0]: {"ok": False, "error": "boom"}}

    assert doctor_engines.measured(run, None, WORKS)["why"] == "boom"
    assert seen and list(temporary.iterdir()) == []


def test_a_child_that_hangs_costs_its_entry_and_leaves_no_sample(temporary, monkeypatch):
    monkeypatch.setattr(doctor_engines, "SECONDS", 0.5)
    entry = doctor_engines.measured(run_tasks, None, WORKS)
    assert (
        entry["engine"] is None and entry["why"] == "no answer within 0 s" and "--no-measure" in entry["cure"]
    )
    assert list(temporary.iterdir()) == []


def test_nowhere_to_write_a_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    entry = doctor_engines.measured(run_tasks, None, WORKS)
    assert entry["engine"] is None and "No such file" in entry["why"] and "TMPDIR" in entry["cure"]


# ---- what is broken -------------------------------------------------------------------------------------------------


def test_a_child_that_dies_costs_its_entry_only(small, tmp_path, monkeypatch):
    """Of the whole report; what else is in it is answered at once here."""
    fake = tmp_path / "site" / "nvidia" / "dali"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text("import os; os.abort()")
    (fake.parent / "__init__.py").write_text(
        "__path__ = __import__('pkgutil').extend_path(__path__, __name__)"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))

    def run(tasks, **options):
        if tasks[0].startswith("measure:"):
            return run_tasks(tasks, **options)
        return {
            t: {"ok": not t.startswith("import:nvidia"), "error": "it dies", "value": None} for t in tasks
        } | {
            "cuda": {"ok": True, "value": {"devices": [], "built_for": None, "why": ""}},
            "kernels": {"ok": True, "value": {"cache": "k", "writable": True, "why": ""}},
            "threads": {"ok": True, "value": {"numba": 2}},
        }

    monkeypatch.setattr(doctor, "run_tasks", run)
    report = doctor.diagnose(file=small)
    assert report["auto"]["engine"] is None and "SIGABRT" in report["auto"]["why"]
    assert report["engines"]["cpu"] == WORKS
    text = doctor.render(report)
    assert "not measured: it kills the Python process" in text and "--no-measure" in text
    assert "Traceback" not in text


def test_without_the_cpu_engine_nothing_is_started():
    cpu = {"works": False, "why": "boom", "cure": "pip install it"}
    asked = []
    entry = doctor_engines.measured(answering({}, asked), None, cpu)
    assert entry["engine"] is None and "boom" in entry["why"] and entry["cure"] == "pip install it"
    assert asked == []


def test_a_file_of_which_nothing_can_be_said_is_no_error():
    """A broken numpy, say: the report has to come."""
    doctor_engines.check_file(lambda tasks, seconds: {tasks[0]: {"ok": False, "error": "boom"}}, "x.beton")


def test_a_file_that_is_none_is_an_error_before_anything_else(tmp_path, small, monkeypatch):
    asked = []

    def run(tasks, **options):
        asked.extend(tasks)
        return {
            task: {"ok": True, "value": doctor_engines.open_file(task.partition(":")[2])} for task in tasks
        }

    monkeypatch.setattr(doctor, "run_tasks", run)
    gone, cut = tmp_path / "gone.beton", tmp_path / "cut.beton"
    cut.write_bytes(Path(small).read_bytes()[:-7])
    with pytest.raises(UsageError, match=r"no such file: .*gone\.beton"):
        doctor.diagnose(file=str(gone))
    with pytest.raises(DataError, match=r"cut\.beton is truncated"):
        doctor.diagnose(file=str(cut))
    with pytest.raises(UsageError, match=r"small\.beton is given to be measured.*--no-measure"):
        doctor.diagnose(file=small, measure=False)
    assert asked == [f"open:{gone}", f"open:{cut}"]


def test_a_damaged_sample_is_named_after_the_report(small, tmp_path, monkeypatch, capsys):
    with beton.Reader(small) as file:
        at = int(file.metadata["f0"]["ptr"][3])
    data = Path(small).read_bytes()
    path = str(tmp_path / "altered.beton")
    Path(path).write_bytes(data[:at] + b"\0" * 300 + data[at + 300 :])
    value = doctor_engines.measure(path)
    assert "id-3" in value["bad_file"]
    entry = doctor_engines.measured(answering(value), path, WORKS)
    assert entry["engine"] is None and "altered.beton" in entry["why"] and "fastload verify" in entry["cure"]
    monkeypatch.setattr(doctor, "diagnose", lambda *a, **k: {"auto": entry})
    monkeypatch.setattr(doctor, "render", lambda report: "THE REPORT")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["doctor", path])
    out, err = capsys.readouterr()
    assert stopped.value.code == 1 and out == "THE REPORT\n"
    assert err.startswith("error: ") and err.count("\n") == 1 and "altered.beton" in err and "id-3" in err


# ---- the flag -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [["--no-measure"], []])
def test_the_flag_leaves_it_out(flags, monkeypatch, capsys):
    asked = []

    def run(tasks, *, seconds=0.0, progress=None):
        asked.extend(tasks)
        return {task: {"ok": False, "error": "boom"} for task in tasks}

    def measured(run, file, cpu):
        asked.append("measured")
        return {"engine": None, "why": "boom", "cure": "none"}

    monkeypatch.setattr(doctor, "run_tasks", run)
    monkeypatch.setattr(doctor_engines, "measured", measured)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["doctor", "--json", *flags])
    out = capsys.readouterr().out
    report = json.loads(out.splitlines()[-1])
    assert stopped.value.code == 0
    assert ("auto" in report) == ('Engine "auto"' in out) == ("measured" in asked) == (not flags)
    assert set(report) - {"auto"} == {
        "fastload",
        "python",
        "packages",
        "cpu",
        "kernels",
        "threads",
        "gpu",
        "engines",
    }
