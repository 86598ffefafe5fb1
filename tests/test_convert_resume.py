"""A killed conversion goes on where it stopped; memory stays flat; a plan measures and leaves nothing behind."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastload import converter
from fastload.converter import convert
from fastload.errors import DataError, UsageError
from fastload.plan import plan

SLOW = """
import sys, time
from fastload import converter
store = converter.store_image
def slow(*args, **kwargs):
    time.sleep(0.02)
    return store(*args, **kwargs)
converter.store_image = slow
converter.convert(sys.argv[1], sys.argv[2], on_error="skip", max_side=40, store="jpeg", workers=2, progress=False)
"""


def photos(root: Path, count: int) -> Path:
    rng = np.random.default_rng(0)
    for i in range(count):
        path = root / f"c{i % 3}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((64, 48)).save(buffer, "JPEG")
        path.write_bytes(buffer.getvalue())
    for i in range(0, count, 10):
        (root / "c1" / f"bad{i}.jpg").write_bytes(b"bad")
    return root


def test_killed_and_resumed_is_byte_for_byte_the_same(tmp_path: Path) -> None:
    source = photos(tmp_path / "photos", 400)
    options: dict[str, Any] = {"on_error": "skip", "max_side": 40, "store": "jpeg", "progress": False}
    whole = convert(source, tmp_path / "whole.beton", **options)
    target = tmp_path / "killed.beton"
    with subprocess.Popen([sys.executable, "-c", SLOW, str(source), str(target)]) as process:
        partial, deadline = Path(f"{target}.journal"), time.monotonic() + 60
        while time.monotonic() < deadline and not (partial.exists() and partial.stat().st_size > 12_000):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert not target.exists() and process.returncode == -signal.SIGKILL
    report = convert(source, target, resume=True, workers=1, **options)
    assert 0 < report.resumed_at < 440, "the kill came too early or too late to prove anything"
    assert target.read_bytes() == (tmp_path / "whole.beton").read_bytes()
    assert report.written == whole.written == 400 and report.skipped == whole.skipped
    assert not partial.exists() and not Path(f"{target}.partial").exists()


def stop_after(monkeypatch: pytest.MonkeyPatch, count: int, error: BaseException) -> None:
    add, added = converter.Writer.add, [0]

    def limited(self: Any, *args: Any, **kwargs: Any) -> None:
        added[0] += 1
        if added[0] > count:
            raise error
        add(self, *args, **kwargs)

    monkeypatch.setattr(converter.Writer, "add", limited)


def test_interrupted_keeps_what_is_done_and_other_work_is_not_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = photos(tmp_path / "photos", 60)
    with monkeypatch.context() as patched:
        stop_after(patched, 20, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "o.beton", on_error="skip", progress=False)
    assert Path(f"{tmp_path / 'o.beton'}.journal").exists()
    for other in ({"quality": 80}, {"limit": 50}, {"label_from": "none"}):
        with pytest.raises(UsageError, match="cannot resume"):
            convert(source, tmp_path / "o.beton", on_error="skip", resume=True, progress=False, **other)
    report = convert(source, tmp_path / "o.beton", on_error="skip", resume=True, progress=False)
    assert report.written == 60 and report.resumed_at >= 20
    convert(source, tmp_path / "p.beton", on_error="skip", progress=False)
    assert (tmp_path / "o.beton").read_bytes() == (tmp_path / "p.beton").read_bytes()


def test_a_failure_keeps_the_work_only_when_resuming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = photos(tmp_path / "photos", 30)
    for resume in (False, True):
        with monkeypatch.context() as patched:
            stop_after(patched, 5, DataError("x"))
            with pytest.raises(DataError):
                convert(source, tmp_path / "o.beton", on_error="skip", resume=resume, progress=False)
        assert Path(f"{tmp_path / 'o.beton'}.partial").exists() is resume


def test_no_thread_outlives_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    source = photos(tmp_path / "photos", 60)
    stop_after(monkeypatch, 3, DataError("x"))
    with pytest.raises(DataError):
        convert(source, tmp_path / "o.beton", on_error="skip", workers=4, progress=False)
    assert not [t for t in threading.enumerate() if t.name.startswith("fastload-convert")]


MEMORY = """
import json, resource, sys
from fastload.converter import convert
convert(sys.argv[2], sys.argv[1] + "/warm.beton", limit=64, progress=False, workers=2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
report = convert(sys.argv[2], sys.argv[1] + "/o.beton", progress=False, workers=2)
print(json.dumps([report.written, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024]))
"""


def test_memory_does_not_grow_with_the_images(tmp_path: Path) -> None:
    """20,000 images of 40 kB as pixels (800 MB in all): what remains per image must allow a million in 1 GiB."""
    count = 20_000
    buffer = io.BytesIO()
    Image.new("RGB", (128, 104), (9, 8, 7)).save(buffer, "PNG")
    (tmp_path / "one.png").write_bytes(buffer.getvalue())
    for folder in ("a", "b"):
        (tmp_path / "in" / folder).mkdir(parents=True)
        for i in range(count // 2):
            os.link(tmp_path / "one.png", tmp_path / "in" / folder / f"a-name-of-usual-length-{i:07d}.png")
    script = MEMORY.replace("progress=False", "progress=False, store='jpeg'")
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), str(tmp_path / "in")],
        capture_output=True,
        text=True,
        check=True,
    )
    written, grown = json.loads(done.stdout)
    assert written == count
    assert grown / count < 900, (
        f"{grown / count:.0f} bytes an image"
    )  # 900 MB for a million, imports come on top


def test_raw_results_wait_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While finished images wait for a slow first one, no more are begun than the budget allows."""
    monkeypatch.setattr(converter, "_READY_BYTES", 100_000)
    monkeypatch.setattr(converter, "_TASK_IMAGES", 1)
    store, state = converter.store_image, {"started": 0, "most": 0}

    def slow_first(*args: Any, **kwargs: Any) -> Any:
        state["started"] += 1
        if state["started"] == 1:
            time.sleep(0.5)
            state["most"] = state["started"]
        return store(*args, **kwargs)

    monkeypatch.setattr(converter, "store_image", slow_first)
    pixels = np.zeros((100, 200, 3), np.uint8)  # 60,000 bytes
    convert([pixels] * 300, tmp_path / "o.beton", store="raw", workers=8, progress=False)
    assert 2 <= state["most"] <= 8  # one for each worker, and 32 without a limit


def test_plan_measures_every_way_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import tempfile

    from fastload.cli import main

    source = photos(tmp_path / "photos", 30)
    (tmp_path / "temp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temp"))
    monkeypatch.setattr("fastload.plan._LOADER_SECONDS", 0.05)
    table = plan(source, sample=10, sizes=(None, 32), max_side=16, progress=False)
    assert [(row.store, row.max_side) for row in table.rows] == [
        (s, m) for s in ("jpeg", "raw") for m in (None, 32, 16)
    ]
    assert table.images == 33 and table.sample >= 9 and list((tmp_path / "temp").iterdir()) == []
    raw = {row.max_side: row.bytes for row in table.rows if row.store == "raw"}
    assert raw[None] > raw[32] > raw[16] and all(
        row.loader_images_per_s > 0 and row.seconds > 0 for row in table.rows
    )
    assert raw[None] > 30 * 64 * 48 * 3
    with pytest.raises(SystemExit) as stopped:
        main(["convert", str(source), "--plan", "--plan-sample", "6", "--json"])
    out = capsys.readouterr().out.splitlines()
    assert (
        stopped.value.code == 0
        and json.loads(out[-1])["images"] == 33
        and "loader images/s" in "\n".join(out)
    )
