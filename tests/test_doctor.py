"""``fastload doctor``: true about what works, alive whatever is broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastload import doctor

BREAKAGES = {
    "raises": ("raise ImportError('libfoo.so.9: cannot open shared object file')", "libfoo.so.9"),
    "raises something odd": ("raise SystemExit('no licence')", "no licence"),
    "kills the process": ("import os; os.abort()", "kills the Python process"),
    "leaves the process": ("import os; os._exit(3)", "exit code 3"),
}


def run_cli(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fastload", "doctor", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        timeout=300,
    )


def package(folder: Path, name: str, source: str) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(source)


@pytest.fixture(scope="module")
def report() -> dict:
    done = run_cli("--json")
    assert done.returncode == 0, done.stderr
    return {"text": done.stdout, **json.loads(done.stdout.splitlines()[-1])}


def test_this_machine(report) -> None:
    import numba
    import torch

    assert report["packages"]["torch"]["works"]
    assert report["packages"]["torch"]["version"] == torch.__version__.partition("+")[0]
    assert report["packages"]["numba"]["version"] == numba.__version__
    assert report["cpu"]["cores_usable"] >= 1
    assert report["cpu"]["ram_bytes"] > 2**28
    assert isinstance(report["cpu"]["simd"], list)
    assert report["engines"]["cpu"] == {"works": True}
    assert len(report["gpu"]["devices"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)


def test_the_cuda_engine_is_there_if_a_gpu_is(report) -> None:
    entry = report["engines"]["cuda"]
    assert entry["works"] == bool(report["gpu"]["devices"])
    assert entry["works"] or (entry["why"] and entry["cure"])


def test_the_dali_engine_is_there_if_dali_is(report) -> None:
    entry = report["engines"]["dali"]
    assert entry["works"] == report["packages"]["nvidia-dali-cuda130"]["works"]
    assert entry["works"] or "fastload[dali]" in entry["cure"]


def test_all_that_does_not_work_has_a_cure(report) -> None:
    for entry in [*report["packages"].values(), *report["engines"].values()]:
        assert entry["works"] or (entry["why"] and entry["cure"])


def test_engine_auto_is_measured_on_a_sample(report) -> None:
    auto = report["auto"]
    assert auto["engine"] == max(auto["images_per_s"], key=auto["images_per_s"].get)
    works = {name for name, entry in report["engines"].items() if entry["works"]}
    assert set(auto["images_per_s"]) == works
    assert auto["file"] is None
    assert f"  takes {auto['engine']!r} here: {auto['engine']} " in report["text"]
    assert "generated photographs" in report["text"]


def test_the_kernel_cache_is_reported(report) -> None:
    assert os.path.isdir(report["kernels"]["cache"])
    assert report["kernels"]["writable"]


@pytest.mark.parametrize("how", list(BREAKAGES))
def test_a_broken_package_is_a_line_of_the_report(how: str, tmp_path: Path, monkeypatch) -> None:
    source, words = BREAKAGES[how]
    package(tmp_path, "brokenpkg", source)
    package(tmp_path, "finepkg", "__version__ = '7.1'")
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    )
    answers = doctor.run_tasks(["import:json", "import:brokenpkg", "import:finepkg", "import:neverheardof"])
    assert answers["import:json"]["ok"]
    assert not answers["import:brokenpkg"]["ok"]
    assert words in answers["import:brokenpkg"]["error"]
    assert answers["import:finepkg"] == {**answers["import:finepkg"], "ok": True, "value": "7.1"}
    assert "neverheardof" in answers["import:neverheardof"]["error"]


def test_a_package_that_hangs_costs_only_its_line(tmp_path: Path, monkeypatch) -> None:
    package(tmp_path, "hangingpkg", "import time; time.sleep(60)")
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    )
    answers = doctor.run_tasks(["import:hangingpkg", "import:json"], seconds=4)
    assert answers["import:hangingpkg"]["error"] == "no answer within 4 s"
    assert answers["import:json"]["ok"]


def test_the_command_survives_broken_dependencies(tmp_path: Path) -> None:
    package(tmp_path, "simplejpeg", "raise ImportError('libturbojpeg is broken')")
    package(tmp_path, "torchvision", "import os; os.abort()")
    done = run_cli("--json", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert "libturbojpeg is broken" in report["packages"]["simplejpeg"]["why"]
    assert report["packages"]["simplejpeg"]["cure"].endswith("simplejpeg")
    assert not report["engines"]["cpu"]["works"]
    assert report["engines"]["cpu"]["cure"].endswith("simplejpeg")
    assert report["auto"]["engine"] is None
    assert "libturbojpeg is broken" in report["auto"]["why"]
    assert "SIGABRT" in report["packages"]["torchvision"]["why"]
    assert report["packages"]["numpy"]["works"]
    assert "BROKEN" in done.stdout


def fake(gpu: dict, smi: dict | None, monkeypatch) -> dict:
    monkeypatch.setattr(doctor, "_nvidia_smi", lambda: smi)
    return doctor._gpu(gpu, {"version": "2.15.0", "works": True})


def test_gpu_cures_are_about_the_real_cause(monkeypatch) -> None:
    driver = {"version": "470.1", "names": ["Old GPU"]}
    nothing = {"ok": True, "value": {"devices": [], "built_for": "13.2", "why": ""}}
    cpu_build = {"ok": True, "value": {"devices": [], "built_for": None, "why": ""}}
    assert "no NVIDIA driver" in fake(nothing, None, monkeypatch)["why"]
    assert "built for the CPU only" in fake(cpu_build, driver, monkeypatch)["why"]
    old = fake(nothing, driver, monkeypatch)
    assert "470.1" in old["cure"]
    assert "13.2" in old["cure"]
    device = {"name": "H200", "memory_bytes": 2**37, "capability": "9.0", "amp": "bfloat16"}
    there = {"ok": True, "value": {"devices": [device], "built_for": "13.2", "why": ""}}
    assert "why" not in fake(there, driver, monkeypatch)
    broken = doctor._gpu(
        {"ok": False, "error": "boom"}, {"version": "1", "works": False, "why": "boom", "cure": "x"}
    )
    assert broken["cure"] == "x"


def test_a_gpu_is_shown_with_its_amp_type(report, monkeypatch) -> None:
    device = {"name": "H200", "memory_bytes": 141 * 2**30, "capability": "9.0", "amp": "bfloat16"}
    gpu = {"devices": [device], "driver": {"version": "580.1", "names": ["H200"]}, "torch_cuda": "13.2"}
    packages = report["packages"]
    found = {"engine:cpu": {"ok": True}}
    text = doctor.render({**report, "gpu": gpu, "engines": doctor._engines(found, packages, gpu)})
    assert "H200, 141 GiB, compute capability 9.0, AMP in bfloat16, driver 580.1, CUDA 13.2" in text
    assert any(line.split() == ["cuda", "works"] for line in text.splitlines())
