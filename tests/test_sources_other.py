"""Tar shards and Python objects as sources."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastload.errors import DataError, UsageError
from fastload.sources import Source, SourceOptions, open_source
from fastload.sources_tar import expand


def jpeg(value: int = 0, form: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 12), (value, 20, 30)).save(buffer, form)
    return buffer.getvalue()


def shard(path: Path, *members: tuple[str, bytes], form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def opened(source: Any, **options: Any) -> Source:
    return open_source(source, SourceOptions(**options))


def ids(source: Source) -> list[str]:
    return [source.sample(i).id for i in range(len(source))]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_shards_with_all_parts(tmp_path: Path, form: int) -> None:
    long = "d/" + "k" * (90 if form == tarfile.USTAR_FORMAT else 200)
    first = [
        ("d/a.cls", b"3"),
        ("d/a.JPG", jpeg(1)),
        ("d/a.json", b'{"x": [1, 2]}'),
        ("d/a.txt", b"hello"),
        ("d/a.seg.png", b"-"),
    ]
    shard(
        tmp_path / "s-00.tar", *first, (f"{long}.webp", jpeg(2, "WEBP")), (f"{long}.cls", b"1\n"), form=form
    )
    shard(
        tmp_path / "s-01.tar",
        ("c.png", jpeg(3, "PNG")),
        ("c.cls", b"0"),
        ("readme", b"?"),
        ("x.cls", b"9"),
        form=form,
    )
    source = opened(str(tmp_path / "s-{00..01}.tar"))
    assert ids(source) == ["d/a", long, "c"]
    assert [source.sample(i).values["label"] for i in range(3)] == [3, 1, 0]
    assert [source.sample(i).values["json"] for i in range(3)] == [{"x": [1, 2]}, None, None]
    assert [source.sample(i).values["txt"] for i in range(3)] == [b"hello", b"", b""]
    assert [source.sample(i).load() for i in range(3)] == [jpeg(1), jpeg(2, "WEBP"), jpeg(3, "PNG")]
    assert [source.sample(i).source for i in range(3)] == [
        "s-00.tar/d/a.JPG",
        f"s-00.tar/{long}.webp",
        "s-01.tar/c.png",
    ]
    assert dict(source.ignored) == {".seg.png": 1, "no sample": 1, "sample without image": 1}
    source.close()


def test_a_folder_of_shards_a_glob_and_a_single_shard_are_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    folder.mkdir()
    shard(folder / "b.tar", ("2.jpg", jpeg()))
    assert ids(opened(folder / "b.tar")) == ["2"]
    shard(folder / "a.tar", ("1.jpg", jpeg()))
    assert (
        ids(opened(folder))
        == ids(opened(str(folder / "*.tar")))
        == ids(opened(str(folder / "{a,b}.tar")))
        == ["1", "2"]
    )


def test_braces() -> None:
    assert expand("x{08..11}.tar") == ["x08.tar", "x09.tar", "x10.tar", "x11.tar"]
    assert expand("x{8..11}.tar") == ["x8.tar", "x9.tar", "x10.tar", "x11.tar"]
    assert expand("{a,b}{0..1}") == ["a0", "a1", "b0", "b1"]
    with pytest.raises(UsageError, match="range"):
        expand("x{3..1}.tar")
    with pytest.raises(UsageError, match="no file matches"):
        expand("/nowhere/x*.tar")


def test_text_classes_and_json_labels(tmp_path: Path) -> None:
    members = [("1.jpg", jpeg()), ("1.cls", b"dog"), ("1.json", b'{"kind": "b", "tags": ["u", "v"]}')]
    members += [("2.jpg", jpeg()), ("2.cls", b"cat"), ("2.json", b'{"kind": "a", "tags": []}')]
    path = shard(tmp_path / "s.tar", *members)
    assert opened(path).classes == {"label": ["cat", "dog"]}
    source = opened(path, labels=("kind",))
    assert source.classes == {"label": ["a", "b"]} and source.sample(0).values["label"] == 1
    assert opened(path, labels=("tags",), label_sep="|").sample(0).values["label"].tolist() == [1, 1]
    assert opened(path, label_from=r"regex:(?P<label>\d)").classes == {"label": ["1", "2"]}
    assert "label" not in opened(path, label_from="none").sample(0).values
    with pytest.raises(UsageError, match="'kidn'; the keys are: kind, tags"):
        opened(path, labels=("kidn",))


def test_one_sample_without_label_is_its_own_error(tmp_path: Path) -> None:
    source = opened(shard(tmp_path / "s.tar", ("1.jpg", jpeg()), ("1.cls", b"4"), ("2.jpg", jpeg())))
    assert source.sample(0).error is None and "no label" in source.sample(1).error  # type: ignore[operator]


def test_duplicate_keys_name_both_and_shard_ids_cure_them(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", ("0.jpg", jpeg()))
    shard(tmp_path / "b.tar", ("0.png", jpeg(0, "PNG")))
    pattern = str(tmp_path / "{a,b}.tar")
    with pytest.raises(DataError, match=r"duplicate id '0': 0\.jpg in a\.tar and 0\.png in b\.tar"):
        opened(pattern)
    assert ids(opened(pattern, shard_ids=True)) == ["a/0", "b/0"]


def test_damaged_shards(tmp_path: Path) -> None:
    whole = shard(tmp_path / "w.tar", ("1.jpg", jpeg()), ("2.jpg", b"x" * 5000)).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: whole.index(b"xxxx") + 2000])
    with pytest.raises(DataError, match="damaged or cut off"):
        opened(tmp_path / "cut.tar")
    broken = bytearray(whole)
    broken[whole.index(b"2.jpg") + 5] ^= 1  # in the second header: tarfile alone would take it for the end
    (tmp_path / "header.tar").write_bytes(broken)
    with pytest.raises(DataError, match="damaged header"):
        opened(tmp_path / "header.tar")
    (tmp_path / "bare.tar").write_bytes(whole.rstrip(b"\0") + bytes(512))
    assert len(opened(tmp_path / "bare.tar")) == 2
    (tmp_path / "empty.tar").write_bytes(b"")
    with pytest.raises(DataError, match="plain tar"):
        opened(tmp_path / "empty.tar")
    with tarfile.open(tmp_path / "gz.tar", "w:gz") as tar:
        tar.add(tmp_path / "w.tar")
    with pytest.raises(DataError, match="gunzip"):
        opened(tmp_path / "gz.tar")
    with pytest.raises(UsageError, match=r"w2\.tar does not exist"):
        opened(str(tmp_path / "w{1..2}.tar").replace("w{1", "w{2"))
    with pytest.raises(DataError, match="holds no images"):
        opened(shard(tmp_path / "none.tar", ("a.cls", b"1")))


def test_python_items_of_every_kind(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    (tmp_path / "x.jpg").write_bytes(jpeg())
    images: list[Any] = [
        pixels,
        torch.from_numpy(pixels.transpose(2, 0, 1).copy()),
        Image.fromarray(pixels),
        jpeg(),
        str(tmp_path / "x.jpg"),
        pixels[:, :, 0],
        pixels.astype(np.float32),
        "nowhere.jpg",
    ]
    source = opened([(image, n % 2) for n, image in enumerate(images)])
    for i in range(3):
        np.testing.assert_array_equal(source.sample(i).load(), pixels)
    assert source.sample(3).load() == source.sample(4).load() == jpeg()
    assert source.sample(4).source == "x.jpg"
    np.testing.assert_array_equal(source.sample(5).load(), np.repeat(pixels[:, :, :1], 3, axis=2))
    with pytest.raises(DataError, match="uint8"):
        source.sample(6).load()
    with pytest.raises(DataError, match="cannot be read"):
        source.sample(7).load()
    assert [source.sample(i).values["label"] for i in range(2)] == [0, 1] and ids(source)[:2] == ["0", "1"]


def test_pil_modes_are_flattened_like_files() -> None:
    rgba = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    source = opened([rgba, Image.new("L", (2, 2), 7)])
    payload = source.sample(0).load()
    assert isinstance(payload, bytes) and payload.startswith(b"\x89PNG")
    assert (np.asarray(source.sample(1).load()) == 7).all()


def test_python_dicts_extras_and_class_names() -> None:
    class Data:
        classes = ("cat", "dog")

        def __len__(self) -> int:
            return 3

        def __getitem__(self, i: int) -> dict[str, Any]:
            if i == 2:
                raise RuntimeError("disk on fire")
            return {
                "image": jpeg(),
                "label": ["dog", 0][i],
                "box": np.ones(4, np.float32),
                "meta": {"i": i},
                "name": "é",
                "w": 0.5,
            }

    source = opened(Data())
    assert {f.name: f.kind for f in source.fields} == {
        "label": "int",
        "box": "ndarray",
        "meta": "json",
        "name": "bytes",
        "w": "float",
    }
    values = source.sample(0).values
    assert (
        values["label"] == 1
        and values["meta"] == {"i": 0}
        and values["name"] == "é".encode()
        and values["w"] == 0.5
    )
    assert source.classes == {"label": ["cat", "dog"]}
    assert "RuntimeError: disk on fire" in source.sample(2).error  # type: ignore[operator]


def test_python_labels_are_checked() -> None:
    with pytest.raises(UsageError, match="labels are text"):
        opened([(jpeg(), "cat")])
    source = opened([(jpeg(), "cat"), (jpeg(), "cow"), (jpeg(), 5)], classes=("cat",))
    assert source.sample(0).values["label"] == 0
    assert "unknown label 'cow'" in source.sample(1).error  # type: ignore[operator]
    assert "unknown label '5'" in source.sample(2).error  # type: ignore[operator]
    vector = opened([(jpeg(), [0, 1, 1])]).sample(0).values["label"]
    assert vector.dtype == np.float32 and vector.tolist() == [0, 1, 1]
    with pytest.raises(DataError, match="length 0"):
        opened([])


def test_image_folder_without_transforms_is_read_by_its_paths(tmp_path: Path) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    for name in ("b/1.jpg", "a/1.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(jpeg())
    plain = opened(datasets.ImageFolder(tmp_path))
    assert plain.classes == {"label": ["a", "b"]}
    assert (
        plain.sample(1).source == "b/1.jpg"
        and plain.sample(1).load() == jpeg()
        and plain.sample(1).values == {"label": 1}
    )
    changed = opened(datasets.ImageFolder(tmp_path, transform=lambda image: image.rotate(90, expand=True)))
    assert np.asarray(changed.sample(0).load()).shape == (16, 12, 3)


def test_options_of_another_kind_are_refused() -> None:
    with pytest.raises(UsageError, match="--path-column does not apply"):
        opened([(jpeg(), 0)], path_column="x")
    with pytest.raises(UsageError, match="--classes needs labels"):
        opened([jpeg()], classes=("a",))


def test_json_that_is_broken_is_an_error_of_its_sample(tmp_path: Path) -> None:
    good = json.dumps({"a": 1}).encode()
    source = opened(
        shard(tmp_path / "s.tar", ("1.jpg", jpeg()), ("1.json", good), ("2.jpg", jpeg()), ("2.json", b"{"))
    )
    assert source.sample(0).error is None and "cannot be read" in source.sample(1).error  # type: ignore[operator]
