"""Compiled kernels are cached on disk where that is possible; where it is not, they work and one warning says so."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastload.kernels

PACKAGE = Path(fastload.__file__).parent
KERNELS = Path(fastload.kernels.__file__).parent

# A small kernel with a published answer, timed, and what numba and fastload say about its cache.
PROGRAM = """
import json, resource, sys, time, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import numpy as np
    import fastload
    from fastload.kernels import cache_folder, pixels, resize, rng
    if len(sys.argv) > 1:  # from here on a file may have this many bytes: as good as a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
    began = time.perf_counter()
    words = rng.philox(*(np.uint64(v) for v in range(6)))
    values = rng.uniforms(1, 2, np.arange(3, dtype=np.uint64), 4, 5)
    seconds = time.perf_counter() - began
    folder = cache_folder()
print(json.dumps({
    "seconds": seconds,
    "hits": sum(sum(k.stats.cache_hits.values()) for k in (rng.philox, rng._fill)),
    "misses": sum(sum(k.stats.cache_misses.values()) for k in (rng.philox, rng._fill)),
    "folder": folder._asdict(),
    "warnings": [[w.category.__name__, str(w.message)] for w in caught if "cache" in str(w.message)],
    "answer": [*map(int, words), *values.ravel().tolist()],
    "file": fastload.__file__,
}))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A copy of the package whose kernels have no folder beside them for a cache: a file is in its place."""
    folder = tmp_path_factory.mktemp("site")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE, folder / "fastload", ignore=ignored)
    shutil.copytree(KERNELS, folder / "fastload" / "kernels", ignore=ignored, dirs_exist_ok=True)
    (folder / "fastload" / "kernels" / "__pycache__").write_text("not a folder")
    return folder


@pytest.fixture
def run(site, tmp_path):
    """Run the program with HOME and the caches of the user where ``environment`` says; a regular file by default.

    Not by permissions: whoever runs tests as root may write everywhere.
    """
    blocked = tmp_path / "blocked"
    blocked.write_text("not a folder")

    def run(*arguments, **environment):
        below = str(blocked / "below")
        places = {"HOME": below, "XDG_CACHE_HOME": below, "NUMBA_CACHE_DIR": below, "PYTHONPATH": str(site)}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=120,
            cwd=tmp_path,
            env={**os.environ, **places, **{key: str(value) for key, value in environment.items()}},
        )
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout.splitlines()[-1])
        assert Path(report["file"]).is_relative_to(site)
        return report

    return run


def here():
    """The same numbers by the kernels of this process."""
    import numpy as np

    from fastload.kernels import oracle, rng

    words = oracle.philox((0, 1, 2, 3), (4, 5))
    return [*map(int, words), *rng.uniforms(1, 2, np.arange(3, dtype=np.uint64), 4, 5).ravel().tolist()]


def test_with_no_folder_to_write_kernels_work_and_one_warning_says_so(run):
    report = run()
    assert report["answer"] == here()
    assert report["folder"]["writable"] is False and "NUMBA_CACHE_DIR" in report["folder"]["why"]
    ((category, message),) = report["warnings"]  # one, though a dozen kernels were made in three modules
    assert category == "RuntimeWarning"
    assert (
        "each process compiles them again" in message
        and "set NUMBA_CACHE_DIR to a folder that is yours" in message
    )


def test_a_second_process_does_not_compile_again(run, tmp_path):
    cache = tmp_path / "cache"
    first = run(NUMBA_CACHE_DIR=cache)
    indexes = sorted(path.name for path in cache.rglob("*.nbi"))
    assert any("philox" in name for name in indexes) and list(cache.rglob("*.nbc"))
    assert (first["hits"], first["misses"]) == (0, 2)
    second = run(NUMBA_CACHE_DIR=cache)
    assert (second["hits"], second["misses"]) == (2, 0)
    assert second["seconds"] < first["seconds"]
    assert sorted(path.name for path in cache.rglob("*.nbi")) == indexes
    for report in (first, second):
        assert report["answer"] == here() and report["warnings"] == []
        assert report["folder"]["writable"] and Path(report["folder"]["path"]).is_relative_to(cache)
        assert report["folder"]["why"] == ""
    assert not [
        path for path in cache.rglob("*") if "probe" in path.name and path.suffix not in (".nbi", ".nbc")
    ]


def test_the_cache_of_the_user_is_used_where_the_package_cannot_be_written(run, tmp_path):
    report = run(XDG_CACHE_HOME=tmp_path / "user", HOME=tmp_path, NUMBA_CACHE_DIR="")
    assert report["folder"]["writable"] and report["warnings"] == [] and report["answer"] == here()
    assert Path(report["folder"]["path"]).is_relative_to(tmp_path) and list(tmp_path.rglob("*.nbi"))


def test_a_disk_that_fills_up_costs_the_cache_only(run, tmp_path):
    cache = tmp_path / "cache"
    report = run(500, NUMBA_CACHE_DIR=cache)
    assert report["answer"] == here() and report["folder"]["writable"]
    ((category, message),) = report["warnings"]
    assert category == "RuntimeWarning" and "File too large" in message and "NUMBA_CACHE_DIR" in message
    later = run(NUMBA_CACHE_DIR=cache)  # nothing half-written is taken for a kernel
    assert later["answer"] == here() and later["warnings"] == [] and later["misses"] == 2


@pytest.mark.parametrize("keep", [0, 30])
def test_files_cut_short_by_a_crash_are_no_obstacle(run, tmp_path, keep):
    cache = tmp_path / "cache"
    run(NUMBA_CACHE_DIR=cache)
    for path in cache.rglob("*.nb?"):
        path.write_bytes(path.read_bytes()[:keep])
    report = run(NUMBA_CACHE_DIR=cache)
    assert report["answer"] == here()
    ((category, message),) = report["warnings"]
    assert category == "RuntimeWarning" and str(cache) in message and "empty that folder" in message


def test_this_process_knows_its_folder():
    folder = fastload.kernels.cache_folder()
    assert folder is fastload.kernels.cache_folder()
    assert folder.writable == (folder.why == "") and (not folder.writable or os.path.isdir(folder.path))


def test_a_kernel_is_compiled_again_when_a_part_of_it_has_changed(site, tmp_path):
    """numba compares the file of the kernel itself only; parts of most kernels lie in other files."""
    own = tmp_path / "own"
    shutil.copytree(site, own)
    (own / "fastload" / "kernels" / "__pycache__").unlink()
    (own / "fastload" / "kernels" / "one.py").write_text(
        "from fastload.kernels.memory import part\n\n@part\ndef answer():\n    return 41\n"
    )
    (own / "fastload" / "kernels" / "two.py").write_text(
        "from fastload.kernels.jit import kernel\nfrom fastload.kernels.one import answer\n\n"
        "@kernel\ndef ask():\n    return answer()\n"
    )
    program = "from fastload.kernels.two import ask; print(ask(), sum(ask.stats.cache_hits.values()))"

    def ask():
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(own)},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    assert [ask(), ask()] == [["41", "0"], ["41", "1"]]
    changed = own / "fastload" / "kernels" / "one.py"
    changed.write_text(changed.read_text().replace("41", "42"))
    assert [ask(), ask()] == [["42", "0"], ["42", "1"]]


def test_a_long_compilation_is_announced_where_somebody_looks(monkeypatch):
    """On a terminal; a pipe or a file gets nothing. It ends with the compilation."""
    import io
    import threading
    import time

    from fastload.kernels.jit import Waiting

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream, words in (
        (Terminal(), "compiling the kernel for this machine, once: 0 s"),
        (io.StringIO(), ""),
    ):
        monkeypatch.setattr(sys, "stderr", stream)
        before = threading.active_count()
        waiting = Waiting("the kernel")
        waiting.start()
        time.sleep(0.05)
        waiting.stop()
        deadline = time.monotonic() + 5
        while threading.active_count() > before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert threading.active_count() == before
        assert words in stream.getvalue() and bool(words) == bool(stream.getvalue())
        assert not words or stream.getvalue().endswith("\n")
