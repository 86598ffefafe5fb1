"""Conversion end to end, against Pillow for pixels and FFCV's reader for the file."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageOps

import fastload
from fastload.convert_image import ImageOptions, crop_window, store_image, target_size
from fastload.converter import ConvertReport, convert
from fastload.errors import DataError, UsageError

FACES = Path(__file__).resolve().parents[2] / "shared" / "data" / "face_masks.tar"


def picture(width: int = 90, height: int = 60, seed: int = 0) -> Image.Image:
    """Smooth colours with a few edges, so that JPEG and scaling behave as on photographs."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    planes = [127 + 120 * np.sin(3 * x + seed), 127 + 120 * np.cos(2 * y - seed), 255 * x * y]
    image = Image.fromarray(np.stack(planes, 2).clip(0, 255).astype(np.uint8))
    ImageDraw.Draw(image).ellipse(
        (width // 4, height // 4, width // 2, height // 2), fill=(200, seed % 255, 30)
    )
    return image


def encoded(image: Image.Image, form: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def folder(root: Path, count: int = 6) -> Path:
    for i in range(count):
        path = root / ("ant", "bee")[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(seed=i), quality=85))
    return root


def run(src: Any, dst: Path, **options: Any) -> ConvertReport:
    return convert(src, dst, progress=False, **options)


def images(path: Path) -> list[np.ndarray]:
    with fastload.open(path) as data:
        return [sample["image"] for sample in data]


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


ODD: dict[str, bytes] = {
    "rgb.png": encoded(picture(), "PNG"),
    "grey.png": encoded(picture().convert("L"), "PNG"),
    "palette.png": encoded(picture().quantize(64), "PNG"),
    "bits.png": encoded(picture().convert("1"), "PNG"),
    "photo.webp": encoded(picture(), "WEBP", lossless=True),
    "photo.gif": encoded(picture().quantize(32), "GIF"),
    "photo.bmp": encoded(picture(), "BMP"),
    "photo.tif": encoded(picture(), "TIFF"),
    "cmyk.tif": encoded(picture().convert("CMYK"), "TIFF"),
    **{f"turned{n}.png": encoded(picture(), "PNG", exif=exif(n)) for n in range(1, 9)},
}


@pytest.mark.parametrize("name", ODD)
def test_every_format_and_mode_becomes_the_rgb_that_pillow_shows(tmp_path: Path, name: str) -> None:
    # The name's extension is wrong on purpose.
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / f"{name}.JPG").write_bytes(ODD[name])
    run(tmp_path / "in", tmp_path / "o.beton", store="raw")
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(ODD[name]))).convert("RGB"))
    np.testing.assert_array_equal(images(tmp_path / "o.beton")[0], expected)


def test_alpha_lies_over_white_and_16_bits_keep_their_upper_byte(tmp_path: Path) -> None:
    rgba = picture().convert("RGBA")
    rgba.putalpha(Image.linear_gradient("L").resize(rgba.size))
    deep = np.linspace(0, 65535, 40 * 30).reshape(30, 40).astype(np.uint16)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(encoded(rgba, "PNG"))
    (tmp_path / "in" / "b.png").write_bytes(encoded(Image.fromarray(deep), "PNG"))
    run(tmp_path / "in", tmp_path / "o.beton", store="raw")
    first, second = images(tmp_path / "o.beton")
    white = Image.new("RGBA", rgba.size, "white")
    np.testing.assert_allclose(first, np.asarray(Image.alpha_composite(white, rgba).convert("RGB")), atol=1)
    np.testing.assert_array_equal(second[:, :, 0], deep >> 8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_jpegs_are_shown_upright(tmp_path: Path, orientation: int) -> None:
    data = encoded(picture(96, 64), quality=95, exif=exif(orientation))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(data)
    report = run(tmp_path / "in", tmp_path / "o.beton", store="jpeg", quality=95)
    assert report.storage["kept" if orientation == 1 else "encoded"] == 1
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))).astype(int)
    stored = images(tmp_path / "o.beton")[0]
    assert stored.shape == expected.shape and np.abs(stored - expected).mean() < 2


@pytest.mark.parametrize(
    "options", [{}, {"subsampling": 0}, {"restart_marker_blocks": 5}, {"optimize": True}]
)
def test_a_baseline_jpeg_is_kept_losslessly(tmp_path: Path, options: dict[str, Any]) -> None:
    data = encoded(picture(101, 67), quality=77, comment=b"private", **options)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(data)
    report = run(tmp_path / "in", tmp_path / "o.beton", store="jpeg")
    assert report.storage == {"kept": 1, "encoded": 0, "raw": 0, "copied": 0}
    with fastload.open(tmp_path / "o.beton") as dataset:
        kept = bytes(dataset.encoded(0).data)
    assert b"private" not in kept

    def planes(
        jpeg: bytes,
    ) -> np.ndarray:  # without colour conversion, so that equal pixels mean equal coefficients
        image = Image.open(io.BytesIO(jpeg))
        image.draft("YCbCr", image.size)
        return np.asarray(image)

    np.testing.assert_array_equal(planes(kept), planes(data))
    assert Image.open(io.BytesIO(kept)).quantization == Image.open(io.BytesIO(data)).quantization  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("reencode", "store", "sizes", "expected"),
    [
        ("auto", "jpeg", {}, "kept"),
        ("always", "jpeg", {}, "encoded"),
        ("never", "jpeg", {}, "kept"),
        ("auto", "raw", {}, "raw"),
        ("auto", "jpeg", {"max_side": 120}, "kept"),
        ("auto", "jpeg", {"max_side": 119}, "encoded"),
        ("auto", "jpeg", {"short_side": 80}, "kept"),
        ("auto", "jpeg", {"short_side": 79}, "encoded"),
        ("auto", "auto", {}, "kept"),
        ("auto", "auto", {"max_side": 30}, "raw"),
    ],
)
def test_how_an_image_is_stored(reencode: str, store: str, sizes: dict[str, int], expected: str) -> None:
    stored = store_image(encoded(picture(120, 80)), ImageOptions(reencode=reencode, store=store, **sizes))
    assert stored.how == expected
    assert stored.image.mode == ("raw" if expected == "raw" else "jpeg")


def test_never_reencode_keeps_what_is_no_jpeg_raw_or_refuses_it() -> None:
    png = encoded(picture(), "PNG")
    assert store_image(png, ImageOptions(reencode="never")).image.mode == "raw"
    with pytest.raises(DataError, match="a PNG image"):
        store_image(png, ImageOptions(reencode="never", store="jpeg"))
    cmyk = encoded(picture().convert("CMYK"))
    with pytest.raises(DataError, match="cannot be kept"):
        store_image(cmyk, ImageOptions(reencode="never", store="jpeg"))
    assert store_image(cmyk, ImageOptions(store="jpeg")).how == "encoded"
    for options in ({"reencode": "never"}, {}):
        assert (
            store_image(encoded(picture(), progressive=True), ImageOptions(store="jpeg", **options)).how
            == "kept"
        )


@pytest.mark.parametrize("size", [(640, 480), (481, 333), (37, 1000)])
@pytest.mark.parametrize("limit", [{"max_side": 100}, {"short_side": 30}, {"max_side": 300}])
def test_shrinking_matches_pillow(size: tuple[int, int], limit: dict[str, int]) -> None:
    image = picture(*size)
    options = ImageOptions(store="raw", **limit)
    height, width = target_size(size[1], size[0], options)
    assert max(height, width) <= max(limit.get("max_side", 10**9), 0) and min(height, width) <= limit.get(
        "short_side", 10**9
    )
    assert abs(height / width - size[1] / size[0]) < 0.06 * size[1] / size[0] or min(height, width) < 10
    expected = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)).astype(int)
    pixels = np.asarray(store_image(encoded(image, "PNG"), options).image.data).reshape(height, width, 3)
    assert np.abs(pixels - expected).max() <= 1
    jpeg = encoded(image, quality=95, subsampling=0)
    expected = np.asarray(
        Image.open(io.BytesIO(jpeg)).resize((width, height), Image.Resampling.BILINEAR)
    ).astype(int)
    pixels = np.asarray(store_image(jpeg, options).image.data).reshape(height, width, 3)
    assert np.abs(pixels - expected).mean() < 1.5  # it may have been decoded at half size


@given(
    st.integers(1, 5000),
    st.integers(1, 5000),
    st.integers(1, 6000),
    st.sampled_from(["max_side", "short_side"]),
)
def test_sizes_keep_the_limit_and_the_shape_and_never_grow(
    height: int, width: int, limit: int, which: str
) -> None:
    new = target_size(height, width, ImageOptions(**{which: limit}))  # type: ignore[arg-type]
    side = (max if which == "max_side" else min)(height, width)
    if side <= limit:
        assert new == (height, width)
    else:
        assert (max if which == "max_side" else min)(new) == limit
        for side, old in zip(new, (height, width)):
            exact = old * limit / (max if which == "max_side" else min)(height, width)
            assert abs(side - exact) <= 0.5 or (side == 1 and exact < 1)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("box", [None, (203, 101, 398, 397)])
def test_a_scaled_decode_shifts_nothing(orientation: int, box: Any) -> None:
    # 401 and 501 are no multiples of 2, 4 or 8: one edge has a pixel that stands for less than the others.
    x, y = np.meshgrid(np.arange(501), np.arange(401))
    waves = [127 + 120 * np.sin(x / 14), 127 + 120 * np.sin(y / 14), 127 + 120 * np.sin((x + y) / 19)]
    image = Image.fromarray(np.stack(waves, 2).astype(np.uint8))
    jpeg = encoded(image, quality=95, subsampling=0, exif=exif(orientation))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(jpeg)))
    upright = upright if box is None else upright.crop(box)
    options = ImageOptions(max_side=40, store="raw")
    height, width = target_size(upright.height, upright.width, options)
    expected = np.asarray(upright.resize((width, height), Image.Resampling.BILINEAR)).astype(int)
    pixels = np.asarray(store_image(jpeg, options, box).image.data).reshape(height, width, 3)
    assert np.abs(pixels - expected).mean() < 1


@pytest.mark.parametrize(
    ("form", "box", "margin", "window"),
    [
        ("xyxy", (10, 20, 30, 50), 0, (20, 10, 50, 30)),
        ("xyxy", (10.5, 20.5, 29.5, 49.5), 0, (20, 10, 50, 30)),
        ("xywh", (10, 20, 20, 30), 0, (20, 10, 50, 30)),
        ("rel", (0.1, 0.2, 0.3, 0.5), 0, (20, 10, 50, 30)),
        ("xyxy", (10, 20, 30, 50), 0.5, (5, 0, 65, 40)),
        ("xyxy", (-10, -10, 500, 500), 0, (0, 0, 100, 100)),
    ],
)
def test_crop_windows(form: str, box: Any, margin: float, window: tuple[int, ...]) -> None:
    assert crop_window(box, 100, 100, ImageOptions(crop_format=form, crop_margin=margin)) == window


def test_crop_boxes_that_hold_nothing_are_refused() -> None:
    with pytest.raises(DataError, match="is empty"):
        crop_window((10, 10, 10, 20), 100, 100, ImageOptions())
    with pytest.raises(DataError, match="outside"):
        crop_window((200, 10, 300, 20), 100, 100, ImageOptions())
    huge = ImageOptions(crop_format="xywh", crop_margin=5)  # its edges are infinite
    assert crop_window((-1e300, 10, 1e308, 20), 100, 100, huge) == (0, 0, 100, 100)


def test_cropping_by_columns_cuts_the_upright_image(tmp_path: Path) -> None:
    tall = encoded(picture(800, 600), quality=95, subsampling=0, exif=exif(6))  # shown 600 wide, 800 high
    (tmp_path / "a.jpg").write_bytes(tall)
    with open(tmp_path / "t.csv", "w", newline="") as file:
        csv.writer(file).writerows([["path", "l", "t", "r", "b"], ["a.jpg", 100, 200, 500, 700]])
    report = run(
        tmp_path / "t.csv", tmp_path / "o.beton", crop_box=("l", "t", "r", "b"), store="raw", max_side=50
    )
    assert report.written == 1
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(tall)))
    expected = np.asarray(
        upright.crop((100, 200, 500, 700)).resize((40, 50), Image.Resampling.BILINEAR)
    ).astype(int)
    assert np.abs(images(tmp_path / "o.beton")[0] - expected).mean() < 2


def test_the_result_does_not_depend_on_workers_time_or_place(tmp_path: Path) -> None:
    whole: set[bytes] = set()
    for n in (1, 2, 4):
        source = folder(tmp_path / f"place{n}" / "photos", 41)
        (source / "ant" / "broken.jpg").write_bytes(b"\xff\xd8\xff broken")
        report = run(source, tmp_path / f"{n}.beton", workers=n, on_error="skip", max_side=80)
        assert report.written == 41 and len(report.skipped) == 1
        whole.add((tmp_path / f"{n}.beton").read_bytes())
    assert len(whole) == 1 and str(tmp_path).encode() not in whole.pop()


def test_ffcv_reads_labels_and_images(tmp_path: Path) -> None:
    reader = pytest.importorskip("ffcv.reader", reason="ffcv is not installed")
    source = folder(tmp_path / "photos", 9)
    run(source, tmp_path / "o.beton", store="jpeg")
    theirs = reader.Reader(str(tmp_path / "o.beton"))
    assert list(theirs.handlers) == ["image", "label"] and theirs.num_samples == 9
    assert theirs.metadata["f1"].tolist() == [0] * 5 + [1] * 4
    blob = np.fromfile(tmp_path / "o.beton", np.uint8)
    sizes = dict(zip(theirs.alloc_table["ptr"].tolist(), theirs.alloc_table["size"].tolist()))
    for row, number in zip(theirs.metadata["f0"], [0, 2, 4, 6, 8, 1, 3, 5, 7]):
        start = int(row["data_ptr"])
        image = Image.open(io.BytesIO(blob[start : start + sizes[start]].tobytes()))
        assert image.size == (int(row["width"]), int(row["height"])) == (90, 60)
        original = Image.open(source / ("ant", "bee")[number % 2] / f"{number}.jpg")
        np.testing.assert_array_equal(np.asarray(image), np.asarray(original))


def test_report_and_file_tell_the_same(tmp_path: Path) -> None:
    source = folder(tmp_path / "photos", 6)
    (source / "bee" / "bad.jpg").write_text("no image")
    (source / "bee" / "notes.txt").write_text("no image")
    report = run(source, tmp_path / "o.beton", on_error="skip", store="jpeg")
    assert report.written == 6 and report.bytes == (tmp_path / "o.beton").stat().st_size
    assert [r["source"] for r in report.skipped] == ["bee/bad.jpg"] and report.ignored == {".txt": 1}
    assert "bee/bad.jpg: " in str(report) and "6 images" in str(report) and "6 JPEG kept" in str(report)
    written = json.loads((tmp_path / "o.beton.report.json").read_text())
    assert written == report.to_json()
    with fastload.open(tmp_path / "o.beton") as data:
        assert data.classes == ["ant", "bee"] and data.ids[0] == "ant/0.jpg"
        assert data.info["created_by"] == f"fastload {fastload.__version__}"
        assert data.info["encoding"]["quality"] == 90
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o.beton", "o.beton.report.json", "photos"]


def test_fields_of_a_csv_arrive(tmp_path: Path) -> None:
    folder(tmp_path / "photos", 2)
    with open(tmp_path / "t.csv", "w", newline="") as file:
        rows = [
            ["file", "label", "age", "weight in kilograms", "name"],
            ["ant/0.jpg", "x", 4, 1.5, "Ä"],
            ["bee/1.jpg", "y", 5, "", "b"],
        ]
        csv.writer(file).writerows(rows)
    run(tmp_path / "t.csv", tmp_path / "o.beton", root=tmp_path / "photos")
    with fastload.open(tmp_path / "o.beton") as data:
        assert data.classes == ["x", "y"] and data.column("age").tolist() == [4, 5]
        assert data.info["field_titles"] == {"weight_in_kilogr": "weight in kilograms"}
        assert data[0]["weight_in_kilogr"] == 1.5 and np.isnan(data[1]["weight_in_kilogr"])
        assert data[0]["name"] == "Ä".encode()


def test_a_beton_is_copied_with_all_it_knows_and_encoded_anew_when_asked(tmp_path: Path) -> None:
    items = [
        {
            "image": np.asarray(picture(90, 60, i)),
            "label": i % 2,
            "box": np.full(4, i, np.float32),
            "meta": {"i": i},
            "note": f"n{i}",
        }
        for i in range(5)
    ]
    run(items, tmp_path / "a.beton", classes=("u", "v"), store="jpeg")
    report = run(tmp_path / "a.beton", tmp_path / "b.beton", indices=[4, 0, 2], store="jpeg")
    assert report.written == 3 and report.storage["kept"] == 3
    with fastload.open(tmp_path / "a.beton") as a, fastload.open(tmp_path / "b.beton") as b:
        assert list(b.ids) == ["4", "0", "2"] and b.labels.tolist() == [0, 0, 0] and b.classes == ["u", "v"]
        for old, new in zip((4, 0, 2), range(3)):
            assert bytes(a.encoded(old).data) == bytes(b.encoded(new).data)
            assert (
                b[new]["meta"] == {"i": old}
                and b[new]["note"] == f"n{old}".encode()
                and (b[new]["box"] == old).all()
            )
        subset = run(a.subset([1, 3]), tmp_path / "c.beton", max_side=45, store="raw")
        assert subset.storage["raw"] == 2
    assert [image.shape for image in images(tmp_path / "c.beton")] == [(30, 45, 3)] * 2
    swapped = run(tmp_path / "a.beton", tmp_path / "d.beton", classes=("v", "u"))
    assert swapped.classes["label"] == ["v", "u"]
    with fastload.open(tmp_path / "d.beton") as d:
        assert d.labels.tolist() == [1, 0, 1, 0, 1]


def test_joined_files_get_ids_that_differ_and_a_repeated_sample_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        run([(np.asarray(picture(seed=ord(name))), 0)] * 2, tmp_path / f"{name}.beton")
    both = fastload.concat([fastload.open(tmp_path / "a.beton"), fastload.open(tmp_path / "b.beton")])
    run(both, tmp_path / "c.beton")
    with fastload.open(tmp_path / "c.beton") as data:
        assert list(data.ids) == ["a/0", "a/1", "b/0", "b/1"]
        np.testing.assert_array_equal(data[3]["image"], both[3]["image"])
    with pytest.raises(DataError, match="duplicate id '1': sample 0 and sample 1"):
        run(fastload.open(tmp_path / "a.beton").subset([1, 1]), tmp_path / "d.beton")


def test_raw_is_copied_from_a_beton_without_loss(tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (40, 50, 3), np.uint8)
    run([(pixels, 0)], tmp_path / "a.beton", store="raw")
    report = run(tmp_path / "a.beton", tmp_path / "b.beton", store="auto")
    assert report.storage["copied"] == 1
    np.testing.assert_array_equal(images(tmp_path / "b.beton")[0], pixels)
    assert run(tmp_path / "a.beton", tmp_path / "c.beton", store="raw", max_side=25).storage["raw"] == 1
    expected = np.asarray(Image.fromarray(pixels).resize((25, 20), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(images(tmp_path / "c.beton")[0] - expected).max() <= 1


def test_tar_shards_equal_the_folder_they_were_made_from(tmp_path: Path) -> None:
    source = folder(tmp_path / "photos", 12)
    names = sorted(p for p in source.rglob("*.jpg"))
    for n in range(3):
        with tarfile.open(tmp_path / f"s-{n}.tar", "w") as tar:
            for k, name in enumerate(names[4 * n : 4 * n + 4]):
                tar.add(name, f"{n}{k}.jpg")
                info = tarfile.TarInfo(f"{n}{k}.cls")
                info.size = 1
                tar.addfile(info, io.BytesIO(b"0" if "ant" in str(name) else b"1"))
    run(str(tmp_path / "s-{0..2}.tar"), tmp_path / "t.beton", store="jpeg", workers=3)
    run(source, tmp_path / "f.beton", store="jpeg")
    with fastload.open(tmp_path / "t.beton") as t, fastload.open(tmp_path / "f.beton") as f:
        assert t.labels.tolist() == f.labels.tolist()
        places = {s: i for i, s in enumerate(f.sources)}
        for i, name in enumerate(names):
            other = places[str(name.relative_to(source))]
            assert bytes(t.encoded(i).data) == bytes(f.encoded(other).data)


def test_limit_and_indices(tmp_path: Path) -> None:
    source = folder(tmp_path / "photos", 6)
    assert run(source, tmp_path / "a.beton", limit=4).written == 4
    run(source, tmp_path / "b.beton", indices=[5, 0])
    with fastload.open(tmp_path / "b.beton") as data:
        assert list(data.ids) == ["bee/5.jpg", "ant/0.jpg"]
    for wrong in ([6], [-1], [0, 0], []):
        with pytest.raises(UsageError, match="indices"):
            run(source, tmp_path / "c.beton", indices=wrong)


def test_messy_real_images(tmp_path: Path) -> None:
    if not FACES.is_file():
        pytest.skip(f"{FACES.name} is not here: it comes beside the project, see its README")
    with tarfile.open(FACES) as tar:
        chosen = [
            m
            for n, m in enumerate(tar.getmembers())
            if m.isfile() and (n % 12 == 0 or not m.name.endswith(".jpg"))
        ]
        tar.extractall(tmp_path / "in", chosen[:220], filter="data")
    root = (
        next(p for p in (tmp_path / "in").rglob("*") if p.is_dir() and (p / "with_mask").is_dir())
        if not (tmp_path / "in" / "with_mask").is_dir()
        else tmp_path / "in"
    )
    report = run(root, tmp_path / "o.beton", max_side=256, on_error="skip")
    count = sum(1 for p in root.rglob("*") if p.is_file())
    assert report.written + len(report.skipped) == count > 150 and not report.skipped
    assert report.classes["label"] == ["with_mask", "without_mask"]
    with fastload.open(tmp_path / "o.beton") as data:
        assert int(max(data.heights.max(), data.widths.max())) == 256
        for i in range(0, len(data), 9):
            original = ImageOps.exif_transpose(Image.open(root / data.sources[i]))
            if original.mode not in ("RGB", "L"):
                continue
            height, width = data[i]["image"].shape[:2]
            # The file's pixels went through one more JPEG at quality 90.
            expected = np.asarray(
                original.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
            ).astype(int)
            assert np.abs(data[i]["image"] - expected).mean() < 6, data.sources[i]
