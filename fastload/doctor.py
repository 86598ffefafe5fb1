"""What works on this machine and what does not, with the cure: ``fastload doctor``.

Everything that may be broken is tried in a child process, one task after another: an import that raises, hangs or kills the
interpreter becomes a line of the report, and the next task runs in a fresh child. The trade-off is a few seconds.

>>> print(render(diagnose()))
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from fastload import __version__, doctor_engines
from fastload.benchmarks import machine
from fastload.errors import UsageError

# (distribution, module, extra that installs it; "" is the core)
PACKAGES = (
    ("numpy", "numpy", ""),
    ("llvmlite", "llvmlite", ""),
    ("numba", "numba", ""),
    ("simplejpeg", "simplejpeg", ""),
    ("pillow", "PIL", ""),
    ("torch", "torch", ""),
    ("torchvision", "torchvision", ""),
    ("timm", "timm", ""),
    ("scikit-learn", "sklearn", ""),
    ("nvidia-dali-cuda130", "nvidia.dali", "dali"),
    ("ffcv", "ffcv", "ffcv"),
)
TASK_SECONDS = 120.0
SIMD = (
    "sse4.2",
    "avx",
    "avx2",
    "fma",
    "avx512f",
    "avx512bw",
    "avx512vbmi",
    "avx512bf16",
    "amx-bf16",
    "neon",
    "sve",
)
THREAD_VARIABLES = (
    "NUMBA_NUM_THREADS",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "TORCH_NUM_THREADS",
)
REINSTALL = "pip install --force-reinstall --no-cache-dir"


def diagnose(
    progress: Callable[[str, int, int], object] | None = None,
    *,
    seconds: float = TASK_SECONDS,
    measure: bool = True,
    file: str | None = None,
) -> dict[str, Any]:
    """The whole report as a JSON-able dict; it never raises because something else is broken.

    ``progress`` is called with (task, done, total); ``seconds`` is how long one task may hang. ``measure=False`` leaves out "auto",
    what engine="auto" measures on the ``.beton`` ``file`` or on made pictures. UsageError or DataError for a file that is none.
    """
    if file is not None and not measure:
        raise UsageError(
            f"{file} is given to be measured, so leave out the file, or --no-measure (measure=False)"
        )
    if file is not None:
        doctor_engines.check_file(run_tasks, file)
    core = [f"import:{module}" for _, module, extra in PACKAGES if not extra]
    extras = [f"import:{module}" for _, module, extra in PACKAGES if extra]
    # The extras come last: importing ffcv sets torch to one thread, and would spoil what is asked after it.
    tasks = [*core, "cpu", "kernels", "threads", "cuda", "engine:cpu", *extras]
    found = run_tasks(tasks, seconds=seconds, progress=progress)
    packages = {name: _package(name, module, extra, found) for name, module, extra in PACKAGES}
    gpu = _gpu(found["cuda"], packages["torch"])
    report: dict[str, Any] = {
        "fastload": __version__,
        "python": {"version": sys.version.split()[0], "executable": sys.executable},
        "packages": packages,
        "cpu": {
            "name": machine.cpu_name(),
            "cores_usable": machine.usable_cores(),
            "cores_affinity": machine.affinity_cores(),
            "cores_quota": machine.quota_cores(),
            "simd": found["cpu"].get("value"),
            "simd_error": found["cpu"].get("error"),
            "ram_bytes": machine.ram_bytes(),
        },
        "kernels": _kernels(found["kernels"]),
        "threads": found["threads"].get("value") or {"error": found["threads"].get("error")},
        "gpu": gpu,
        "engines": _engines(found, packages, gpu),
    }
    if measure:
        if progress is not None:
            progress("measure", len(tasks), len(tasks) + 1)
        report["auto"] = doctor_engines.measured(run_tasks, file, report["engines"]["cpu"])
    return report


def _package(name: str, module: str, extra: str, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    answer = found[f"import:{module}"]
    version = machine.version(name) or answer.get("value")
    entry: dict[str, Any] = {"version": version, "works": bool(answer["ok"]), "needed": not extra}
    if answer["ok"]:
        return entry
    if version is None:
        entry["why"] = "not installed"
        entry["cure"] = f"pip install 'fastload[{extra}]'" if extra else f"pip install {name}"
    else:
        entry["why"] = answer["error"]
        entry["cure"] = f"{REINSTALL} {name}"
    return entry


def _kernels(answer: dict[str, Any]) -> dict[str, Any]:
    if not answer["ok"]:
        return {
            "cache": None,
            "writable": False,
            "why": answer["error"],
            "cure": f"{REINSTALL} numba llvmlite",
        }
    report = dict(answer["value"])
    if not report["writable"]:
        report["cure"] = "set NUMBA_CACHE_DIR to a folder that you can write to"
    return report


def _gpu(answer: dict[str, Any], torch_package: dict[str, Any]) -> dict[str, Any]:
    """Devices as torch sees them beside what the driver says, because they disagree in the cases that need a cure."""
    driver = _nvidia_smi()
    if not answer["ok"]:
        why = torch_package.get("why") or answer["error"]
        return {
            "devices": [],
            "driver": driver,
            "why": f"torch does not work: {why}",
            "cure": torch_package.get("cure"),
        }
    value = answer["value"]
    report: dict[str, Any] = {"devices": value["devices"], "driver": driver, "torch_cuda": value["built_for"]}
    if value["devices"]:
        return report
    if driver is None:
        report["why"] = "no NVIDIA driver found (nvidia-smi is not there or does not answer)"
        report["cure"] = "on a machine with an NVIDIA GPU, install its driver; without one, the CPU is used"
    elif value["built_for"] is None:
        report["why"] = f"torch {torch_package['version']} is built for the CPU only"
        report["cure"] = f"{REINSTALL} torch torchvision"
    else:
        report["why"] = value["why"] or f"torch (CUDA {value['built_for']}) sees no device"
        report["cure"] = (
            f"driver {driver['version']} may be too old for CUDA {value['built_for']}: update it, "
            "and check CUDA_VISIBLE_DEVICES and the container's GPU access (--gpus all)"
        )
    return report


def _nvidia_smi() -> dict[str, Any] | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    try:
        answer = subprocess.run(
            [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    lines = [line.split(",") for line in answer.stdout.splitlines() if line.count(",") == 1]
    if answer.returncode != 0 or not lines:
        return None
    return {"version": lines[0][1].strip(), "names": [line[0].strip() for line in lines]}


def _engines(
    found: dict[str, dict[str, Any]], packages: dict[str, dict[str, Any]], gpu: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    cpu: dict[str, Any] = {"works": bool(found["engine:cpu"]["ok"])}
    if not cpu["works"]:
        broken = [name for name, entry in packages.items() if entry["needed"] and not entry["works"]]
        cpu["why"] = found["engine:cpu"]["error"]
        cpu["cure"] = packages[broken[0]]["cure"] if broken else f"{REINSTALL} fastload"
    cuda: dict[str, Any] = {"works": bool(gpu["devices"]) and cpu["works"]}
    if not cuda["works"]:
        cuda["why"] = "it needs the CPU engine" if gpu["devices"] else "torch sees no NVIDIA GPU here"
        cuda["cure"] = gpu["cure"] if not gpu["devices"] else cpu["cure"]
    installed = packages["nvidia-dali-cuda130"]["works"]
    dali: dict[str, Any] = {"works": bool(installed) and cpu["works"]}
    if not dali["works"]:
        dali["why"] = "it needs the CPU engine" if installed else "NVIDIA DALI is not installed"
        dali["cure"] = "pip install 'fastload[dali]' (Linux), or use engine='cpu'"
    return {"cpu": cpu, "cuda": cuda, "dali": dali}


def run_tasks(
    tasks: Sequence[str],
    *,
    seconds: float = TASK_SECONDS,
    progress: Callable[[str, int, int], object] | None = None,
) -> dict[str, dict[str, Any]]:
    """Answers of the child process by task: ``{"ok": bool, "value": ..., "error": ...}``.

    A child that dies or hangs costs only the task it was at; another child does the rest.
    """
    answers: dict[str, dict[str, Any]] = {}
    while left := [task for task in tasks if task not in answers]:
        current = left[0]
        before = len(answers)
        for event in _child(left, seconds):
            if event["event"] == "start":
                current = event["task"]
                if progress is not None:
                    progress(current, len(answers), len(tasks))
            elif event["event"] == "done":
                answers[event["task"]] = event
            else:
                answers[current] = {"ok": False, "error": event["error"]}
                break
        if len(answers) == before:  # a child that ends quietly must not be started for ever
            answers[current] = {"ok": False, "error": "the process that tried it ended without an answer"}
    return answers


def _child(tasks: Sequence[str], seconds: float) -> Any:
    """Events of one child: start and done for each task, and one "failed" event if it dies or hangs."""
    env = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "fastload.doctor", *tasks]
    try:
        child = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
            text=True,
            env=env,
        )
    except OSError as error:
        yield {"event": "failed", "error": f"cannot start {sys.executable}: {error}"}
        return
    lines: queue.Queue[str | None] = queue.Queue()

    def pump() -> None:
        stream = child.stdout
        if stream is not None:
            for line in stream:
                lines.put(line)
        lines.put(None)

    threading.Thread(target=pump, daemon=True).start()
    deadline = time.monotonic() + seconds
    try:
        while True:
            try:
                line = lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                yield {"event": "failed", "error": f"no answer within {seconds:.0f} s"}
                return
            if line is None:
                code = child.wait(timeout=10)
                if code != 0:
                    yield {"event": "failed", "error": _death(code)}
                return
            if line.startswith(MARK):
                deadline = time.monotonic() + seconds
                yield json.loads(line[len(MARK) :])
    finally:
        child.kill()
        child.wait()


def _death(code: int) -> str:
    if code < 0:
        import signal

        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = "unknown"
        return f"it kills the Python process (signal {-code}, {name})"
    return f"it ends the Python process (exit code {code})"


# ---- the child's side: python -m fastload.doctor TASK... ----

MARK = "\x1efastload-doctor "


def _say(**event: Any) -> None:
    sys.stdout.write(MARK + json.dumps(event) + "\n")
    sys.stdout.flush()


def _work(task: str) -> Any:
    import importlib

    kind, _, name = task.partition(":")
    if kind in doctor_engines.TASKS:
        return doctor_engines.TASKS[kind](name)
    if kind == "import":
        return getattr(importlib.import_module(name), "__version__", None)
    return {"cpu": _work_cpu, "kernels": _work_kernels, "threads": _work_threads, "cuda": _work_cuda}.get(
        kind, _work_engine
    )()


def _work_cpu() -> list[str]:
    from llvmlite import binding

    features = binding.get_host_cpu_features()
    return [name for name in SIMD if features.get(name)]


def _work_kernels() -> dict[str, Any]:
    import fastload.kernels

    path, writable, why = fastload.kernels.cache_folder()
    return {"cache": str(path), "writable": bool(writable), "why": str(why or "")}


def _work_threads() -> dict[str, Any]:
    report: dict[str, Any] = {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ}
    import numba

    report["numba"] = int(numba.get_num_threads())
    import torch

    report["torch"] = torch.get_num_threads()
    return report


def _work_cuda() -> dict[str, Any]:
    import warnings

    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    devices = []
    for index in range(torch.cuda.device_count() if available else 0):
        facts = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": facts.name,
                "memory_bytes": facts.total_memory,
                "capability": f"{facts.major}.{facts.minor}",
                # bfloat16 is native from compute capability 8.0 on; before, it is emulated and slow
                "amp": "bfloat16" if facts.major >= 8 else "float16",
            }
        )
    why = str(caught[0].message).splitlines()[0] if caught else ""
    return {"devices": devices, "built_for": torch.version.cuda, "why": why}


def _work_engine() -> str:
    """Encode and decode one small picture the way the cpu engine's callers do, then import the engine."""
    import importlib

    import numpy as np

    from fastload import codecs

    picture = np.full((40, 56, 3), 128, np.uint8)
    back = codecs.load_rgb(codecs.encode_jpeg(picture, 90))
    if back.shape != picture.shape or abs(int(back.mean()) - 128) > 2:
        raise RuntimeError("a picture that was encoded and decoded again is not the same picture")
    importlib.import_module("fastload.loader")
    importlib.import_module("fastload.engines.cpu")
    return "ok"


def _serve(tasks: Sequence[str]) -> None:
    for task in tasks:
        _say(event="start", task=task)
        try:
            _say(event="done", task=task, ok=True, value=_work(task))
        except (Exception, SystemExit) as error:  # whatever a broken package raises is the answer
            text = (str(error).strip().splitlines() or ["no message"])[0]
            _say(event="done", task=task, ok=False, error=f"{type(error).__name__}: {text}")


# ---- the report for people ----


def render(report: dict[str, Any]) -> str:
    """The report as text: facts first, then what does not work, each with its cure."""
    cpu, gpu, kernels = report["cpu"], report["gpu"], report["kernels"]
    lines = [
        f"fastload {report['fastload']}, Python {report['python']['version']} ({report['python']['executable']})",
        "",
    ]
    lines.append("Packages")
    for name, entry in report["packages"].items():
        if entry["works"]:
            lines.append(f"  {name:<20} {entry['version'] or 'unknown version'}")
        else:
            mark = "BROKEN" if entry["version"] else ("MISSING" if entry["needed"] else "not installed")
            why = f": {entry['why']}" if entry["version"] else ""
            lines.append(f"  {name:<20} {entry['version'] or '-'} {mark}{why}")
            lines.append(f"  {'':<20} cure: {entry['cure']}")
    quota = f", control group allows {cpu['cores_quota']:g}" if cpu["cores_quota"] else ""
    ram = f"{cpu['ram_bytes'] / 2**30:.1f} GiB" if cpu["ram_bytes"] else "unknown"
    simd = " ".join(cpu["simd"]) if cpu["simd"] is not None else f"unknown ({cpu['simd_error']})"
    lines += ["", "CPU", f"  model     {cpu['name']}"]
    lines.append(f"  cores     {cpu['cores_usable']} usable (affinity {cpu['cores_affinity']}{quota})")
    lines += [f"  SIMD      {simd}", f"  memory    {ram}"]
    lines.append("  threads   " + ", ".join(f"{name} {value}" for name, value in report["threads"].items()))
    state = "writable" if kernels["writable"] else f"NOT usable: {kernels['why']}"
    lines.append(f"  kernels   compiled code is kept in {kernels['cache'] or 'no folder'} ({state})")
    if kernels.get("cure"):
        lines.append(f"            cure: {kernels['cure']}")
    lines += ["", "GPU"]
    for device in gpu["devices"]:
        lines.append(
            f"  {device['name']}, {device['memory_bytes'] / 2**30:.0f} GiB, compute capability {device['capability']}, "
            f"AMP in {device['amp']}, driver {(gpu['driver'] or {}).get('version', 'unknown')}, CUDA {gpu['torch_cuda']}"
        )
    if not gpu["devices"]:
        lines += [f"  none: {gpu['why']}", f"  cure: {gpu['cure']}"]
    lines += ["", "Engines of Loader"]
    for name, entry in report["engines"].items():
        if entry["works"]:
            lines.append(f"  {name:<5} works")
        else:
            lines += [f"  {name:<5} does not work: {entry['why']}", f"        cure: {entry['cure']}"]
    if "auto" in report:
        lines += ["", 'Engine "auto"', *doctor_engines.lines(report["auto"])]
    return "\n".join(lines)


if __name__ == "__main__":
    _serve(sys.argv[1:])
