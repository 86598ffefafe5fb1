"""What goes wrong in a conversion: one clear sentence, the right exit code, and nothing half-written."""

from __future__ import annotations

import errno
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastload import beton
from fastload.cli import main
from fastload.converter import convert
from fastload.errors import DataError, UsageError


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((90, 60)).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in ("ant/1.jpg", "ant/2.jpg", "bee/1.jpg"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg())
    return tmp_path / "photos"


def left(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name != "photos")


def command(*args: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["convert", *map(str, args)])
    return int(stopped.value.code or 0)


@pytest.mark.parametrize(
    ("data", "words"),
    [(b"", "empty"), (b"hello", "not an image"), (jpeg()[:700], ""), (b"\x89PNG\r\n\x1a\n" + bytes(40), "")],
)
def test_a_bad_image_stops_or_is_skipped(photos: Path, tmp_path: Path, data: bytes, words: str) -> None:
    (photos / "ant" / "10.jpg").write_bytes(data)
    with pytest.raises(DataError, match=rf"^ant/10\.jpg: .*{words}.*--on-error skip"):
        convert(photos, tmp_path / "o.beton", progress=False)
    assert left(tmp_path) == []
    report = convert(photos, tmp_path / "o.beton", on_error="skip", progress=False)
    assert report.written == 3
    (record,) = report.skipped
    assert record["id"] == record["source"] == "ant/10.jpg" and words in record["reason"]


def test_nothing_but_bad_images_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"no")
    with pytest.raises(DataError, match=r"none of the 1 images could be read; the first, a\.jpg"):
        convert(tmp_path / "photos", tmp_path / "o.beton", on_error="skip", progress=False)
    assert left(tmp_path) == []


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_an_unknown_label_names_label_and_sample(photos: Path, tmp_path: Path, on_error: str) -> None:
    if on_error == "raise":
        with pytest.raises(DataError, match=r"^bee/1\.jpg: unknown label 'bee'"):
            convert(photos, tmp_path / "o.beton", classes=["ant"], progress=False)
        assert left(tmp_path) == []
    else:
        report = convert(photos, tmp_path / "o.beton", classes=["ant"], on_error="skip", progress=False)
        assert report.written == 2 and "unknown label 'bee'" in report.skipped[0]["reason"]


def test_targets_that_cannot_be(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder; name a file in it"):
        convert(photos, tmp_path, progress=False)
    with pytest.raises(UsageError, match="does not exist; make it first"):
        convert(photos, tmp_path / "no" / "o.beton", progress=False)
    (tmp_path / "o.beton").write_bytes(b"precious")
    with pytest.raises(UsageError, match=r"exists already.*--overwrite"):
        convert(photos, tmp_path / "o.beton", progress=False)
    assert (tmp_path / "o.beton").read_bytes() == b"precious"
    assert convert(photos, tmp_path / "o.beton", overwrite=True, progress=False).written == 3
    with pytest.raises(UsageError, match="one file"):
        convert(tmp_path / "o.beton", tmp_path / "o.beton", overwrite=True, progress=False)


def test_a_failed_overwrite_leaves_the_old_file(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "o.beton").write_bytes(b"precious")
    (photos / "ant" / "3.jpg").write_bytes(b"no")
    with pytest.raises(DataError):
        convert(photos, tmp_path / "o.beton", overwrite=True, progress=False)
    assert (tmp_path / "o.beton").read_bytes() == b"precious" and left(tmp_path) == ["o.beton"]


def test_a_target_that_is_not_writable(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        os, "access", lambda path, mode: mode != os.W_OK
    )  # tests may run as root, who may write anywhere
    with pytest.raises(UsageError, match="is not writable; choose another place"):
        convert(photos, tmp_path / "o.beton", progress=False)


def test_a_full_disk_says_how_much_is_needed_and_leaves_nothing(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = beton.Writer.add

    def fill(self: beton.Writer, *args: Any, **kwargs: Any) -> None:
        if self.count == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        add(self, *args, **kwargs)

    monkeypatch.setattr(beton.Writer, "add", fill)
    with pytest.raises(
        DataError, match=r"the disk is full: .*o\.beton needs about [\d.]+ MB, and .* has [\d,.]+ MB left"
    ):
        convert(photos, tmp_path / "o.beton", progress=False)
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    "options",
    [
        {"max_side": 0},
        {"max_side": 10, "short_side": 10},
        {"quality": 101},
        {"store": "png"},
        {"reencode": "sometimes"},
        {"reencode": "never", "max_side": 100},
        {"on_error": "ignore"},
        {"workers": 0},
        {"limit": 0},
        {"crop_margin": -1},
        {"crop_margin": 0.1},
        {"crop_format": "yxyx"},
        {"crop_box": ("a", "b")},
        {"classes": ("a", "a")},
        {"label_sep": ""},
        {"labels": ("a",), "label_from": "none"},
        {"path_column": "x"},
        {"max_sid": "max_side"},
    ],
)
def test_wrong_options_are_usage_errors(photos: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        convert(photos, tmp_path / "o.beton", progress=False, **options)
    shown = next(iter(options.values()))
    name = next(iter(options))
    assert any(
        text in str(caught.value)
        for text in (repr(shown), str(shown), ",".join(shown) if name == "crop_box" else "'a'")
    )
    assert left(tmp_path) == []


def test_command_writes_file_report_and_json(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = command(
        photos, tmp_path / "o.beton", "--max-side", 50, "--store", "jpeg", "--classes", "bee,ant", "--json"
    )
    out = capsys.readouterr().out.splitlines()
    report = json.loads(out[-1])
    assert code == 0 and report["written"] == 3 and report["classes"] == {"label": ["bee", "ant"]}
    assert "3 images" in out[0] and left(tmp_path) == ["o.beton", "o.beton.report.json"]


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["{photos}s", "{out}"], 2, "did you mean"),
        (["{photos}"], 2, "name the file to write"),
        (["{photos}", "{out}", "--max-side", "x"], 2, "not a valid integer"),
        (["{photos}", "{out}", "--store", "png"], 2, "store must be one of"),
        (["{photos}", "{out}", "--label-from", "regex:("], 2, "no valid regular expression"),
        (["{photos}", "{out}", "--classes", "@nowhere"], 2, "cannot read 'nowhere'"),
        (["{photos}", "{out}", "--classes", "ant"], 1, "unknown label 'bee'"),
        (["{photos}/../empty", "{out}"], 1, "holds no image"),
        (["{photos}", "{out}/o.beton"], 2, "does not exist; make it first"),
    ],
)
def test_exit_codes_without_traceback(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], code: int, words: str
) -> None:
    (tmp_path / "empty").mkdir()
    got = command(*(a.format(photos=photos, out=tmp_path / "o.beton") for a in args))
    error = capsys.readouterr().err
    assert got == code and words in error and "Traceback" not in error
    assert left(tmp_path) == ["empty"]


def test_classes_from_a_file(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("bee\n\nant\nwasp\n")
    assert command(photos, tmp_path / "o.beton", "--classes", f"@{tmp_path / 'names.txt'}") == 0
    from fastload import open as open_dataset

    with open_dataset(tmp_path / "o.beton") as data:
        assert data.classes == ["bee", "ant", "wasp"] and data.labels.tolist() == [1, 1, 0]
