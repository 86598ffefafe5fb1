"""Datasets exported as tar shards and folders: read back by ``convert``, by DALI, and by the letter of the formats."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fastload
from fastload import beton, codecs, dataset, exporter
from fastload.cli import main
from fastload.errors import CorruptError, DataError, UsageError
from fastload.exported import read_manifest
from fastload.exporter import export_data

ODD = [
    "a/b c.jpg", "a/b c.png", "a/b c", "Katze/猫 ß.jpg", "v1.2/x.y.z.jpeg", "../../etc/passwd", "/abs.jpg", "a//b.jpg", "", ".jpg",
    "a/.hidden.png", "w" * 400 + ".jpg", "w" * 400 + ".png", "q,\"x\"\r\n'y'.jpg", "A/B C.jpg", "a~2", "100%.jpg", "tail/", " ",
]  # fmt: skip


def image(seed, raw=False, size=(20, 28), grey=False):
    rng = np.random.default_rng(seed)
    pixels = np.repeat(np.repeat(rng.integers(0, 256, (5, 7, 3), np.uint8), 4, 0), 4, 1)[: size[0], : size[1]]
    pixels = np.ascontiguousarray(pixels)
    if raw:
        return beton.EncodedImage("raw", *pixels.shape[:2], pixels)
    if grey:
        file = io.BytesIO()
        Image.fromarray(pixels).convert("L").save(file, "JPEG")
        return beton.EncodedImage("jpeg", *pixels.shape[:2], codecs.keep_jpeg(file.getvalue()))
    return beton.EncodedImage("jpeg", *pixels.shape[:2], codecs.encode_jpeg(pixels))


def made(path, fields, rows, classes=None, **info):
    """A file with these fields beside the image; rows are (id, values)."""
    writer = beton.Writer(path, [beton.Field("image", "image"), *fields], len(rows))
    for i, (name, values) in enumerate(rows):
        picture = values.get("image", None) or image(i, raw=i % 3 == 1, grey=i % 3 == 2)
        writer.add({**values, "image": picture}, id=name, source=f"src/{name}")
    writer.finish({"classes": classes or {}, **info})
    return str(path)


@pytest.fixture
def rich(tmp_path):
    """Every kind of field, names that collide with ours, values that text formats like to lose."""
    fields = [
        beton.Field("label", "int"),
        beton.Field("group", "int"),
        beton.Field("age", "float"),
        beton.Field("text", "bytes"),
        beton.Field("meta", "json"),
        beton.Field("box", "ndarray", "float32", (2, 2)),
        beton.Field("mask", "ndarray", "uint8", (70, 70)),
        beton.Field("id", "int"),
        beton.Field("path", "bytes"),
    ]
    rows = []
    texts = [b"", b"007", b"\xff\x00", b"base64:x", 'ä\r\n,"'.encode(), b"a\0b", b" 1 "]
    ages = [1.5, np.nan, np.inf, -np.inf, 0.1, 1e300, -0.0]
    for i, name in enumerate(ODD):
        values = {
            "label": [2, 0, -9, 9][i % 4],
            "group": i % 2,
            "age": ages[i % 7],
            "text": texts[i % 7],
            "meta": [{"ü": [1, None]}, None, "x", 3.5, []][i % 5],
            "box": np.full((2, 2), 0.1 * i if i % 5 else np.nan, np.float32),
            "mask": np.full((70, 70), i, np.uint8),
            "id": i,
            "path": b"p",
        }
        rows.append((name, values))
    classes = {"label": ["dog", "a/b", "Cat.x"], "group": ["s1", "s2"]}
    return made(tmp_path / "rich.v1.beton", fields, rows, classes, field_titles={"age": "Age of the person"})


def assert_same(first, second, *, images=True, ids=True):
    """Two datasets hold the same, but for how convert stores it."""
    assert len(first) == len(second)
    assert dict(first.fields) == dict(second.fields)
    for name in first.fields:
        assert first.class_names(name) == second.class_names(name)
    for i in range(len(first)):
        a, b = first[i], second[i]
        for name, spec in first.fields.items():
            if spec.kind in ("image", "ndarray"):
                assert a[name].dtype == b[name].dtype
                np.testing.assert_array_equal(a[name], b[name])
            elif spec.kind == "float":
                assert (
                    np.array(a[name]).tobytes() == np.array(b[name]).tobytes()
                    or a[name] != a[name] != b[name]
                )
            else:
                assert a[name] == b[name], (i, name)
        if images:
            assert first.encoded(i).mode == second.encoded(i).mode
            assert bytes(first.encoded(i).data) == bytes(second.encoded(i).data)
        if ids:
            assert first.ids[i] == second.ids[i] and first.sources[i] == second.sources[i]


def back(source, path, **options):
    fastload.convert(source, path, progress=False, reencode="never", **options)
    return dataset.open(path)


def test_every_field_and_odd_ids_come_back_from_both_kinds(rich, tmp_path):
    ds = dataset.open(rich)
    done = export_data(rich, tmp_path / "w", progress=False)
    assert (done.samples, done.stored, done.renamed) == (len(ODD), {"jpeg": 13, "png": 6}, 0)
    assert done.bytes == sum(f.stat().st_size for f in (tmp_path / "w").iterdir())
    small = {"images": False}  # convert itself stores the small JPEG as pixels; see the next test
    assert_same(ds, back(tmp_path / "w", tmp_path / "w.beton"), **small)
    assert dataset.open(tmp_path / "w.beton").info["field_titles"]["age"] == "Age of the person"

    export_data(ds, tmp_path / "f", "folder", progress=False)
    assert_same(ds, back(tmp_path / "f" / "labels.csv", tmp_path / "f.beton"), **small)
    for path in (tmp_path / "f").rglob("*"):
        name = path.name
        assert not name.startswith(".") and name == name.strip() and len(name.encode()) < 200
        assert not set(name) & set('<>:"\\|?*\r\n')
    assert sorted(p.name for p in (tmp_path / "f").iterdir() if p.is_dir()) == ["-9", "9", "Cat.x", "dog"]
    assert len({str(p).casefold() for p in (tmp_path / "f").rglob("*")}) == len(
        list((tmp_path / "f").rglob("*"))
    )
    assert list(tmp_path.glob("**/.partial")) == []


def test_jpeg_bytes_come_back_and_the_tar_is_plain(small, tmp_path):
    export_data(small, tmp_path / "w", progress=False)
    ds, again = dataset.open(small), back(f"{tmp_path}/w/small-000000.tar", tmp_path / "again.beton")
    kept = [i for i in range(20) if again.encoded(i).mode == "jpeg"]
    assert len(kept) > 10
    assert all(bytes(ds.encoded(i).data) == bytes(again.encoded(i).data) for i in kept)
    assert_same(ds, again, images=False)
    with tarfile.open(tmp_path / "w" / "small-000000.tar") as tar:
        members = tar.getmembers()
        assert [m.name for m in members[:4]] == ["id-0.jpg", "id-0.cls", "id-0.json", "id-1.jpg"]
        for i in range(20):
            picture, number, record = (tar.extractfile(m).read() for m in members[3 * i : 3 * i + 3])
            assert picture == bytes(ds.encoded(i).data)
            assert int(number) == ds[i]["label"]
            assert json.loads(record) == {
                "id": f"id-{i}",
                "source": f"class{i % 4}/{i}.jpg",
                "label": f"class{i % 4}",
            }
        assert {(m.mtime, m.uid, m.mode, m.uname) for m in members} == {(0, 0, 0o644, "")}
    assert (tmp_path / "w" / "classes.txt").read_text().split() == ds.classes
    # Without our description it is a shard like any other.
    (tmp_path / "w" / "dataset.json").unlink()
    plain = back(f"{tmp_path}/w/small-000000.tar", tmp_path / "plain.beton", classes=ds.classes)
    assert plain.labels.tolist() == ds.labels.tolist() and plain.ids[3] == "id-3" and "json" in plain.fields


@pytest.mark.parametrize("to", ["webdataset", "folder"])
@pytest.mark.parametrize("names", [["a", "b", "c"], ["a|b", "b;,c", "c/\t"], None])
def test_several_labels(tmp_path, to, names):
    fields = [beton.Field("label", "ndarray", "float32", (3,))]
    rows = [(f"{i}/x.jpg", {"label": np.array([i & 1, i & 2 and 1, 0], np.float32)}) for i in range(5)]
    rows.append(("soft", {"label": np.array([0.25, 0.5, 1], np.float32)}))
    path = made(tmp_path / "m.beton", fields, rows, {"label": names} if names else {})
    export_data(path, tmp_path / "out", to, progress=False)
    source = tmp_path / "out" / ("labels.csv" if to == "folder" else "")
    assert_same(dataset.open(path), back(source, tmp_path / "again.beton"), images=False)
    if to == "folder":
        assert not any(p.is_dir() for p in (tmp_path / "out").iterdir())
        if names == ["a", "b", "c"]:
            assert [line.split(",")[3] for line in source.read_text().splitlines()[1:6]] == [
                "",
                "a",
                "b",
                "a|b",
                "",
            ]
    else:
        with tarfile.open(tmp_path / "out" / "m-000000.tar") as tar:
            assert not any(name.endswith(".cls") for name in tar.getnames())


def test_the_folder_itself_reads_back_by_its_names(small, tmp_path):
    export_data(small, tmp_path / "f", "folder", progress=False)
    assert (tmp_path / "f/class1/id-1.jpg").is_file()
    again = back(tmp_path / "f", tmp_path / "again.beton")
    ds = dataset.open(small)
    assert again.classes == ds.classes and again.label_counts() == ds.label_counts()
    assert sorted(again.ids) == sorted(f"class{i % 4}/id-{i}.jpg" for i in range(20))


def test_views_and_joined_files_are_exported_as_they_are_seen(beton_file, tmp_path):
    first, second = dataset.open(beton_file("one.beton")), dataset.open(beton_file("two.beton", seed=5))
    view = dataset.concat([first, second]).subset([25, 3, 5, 24])
    done = export_data(view, tmp_path / "view", progress=False)
    assert (done.samples, done.renamed) == (4, 4)  # two samples are called id-5
    again = back(tmp_path / "view", tmp_path / "again.beton")
    assert list(again.ids) == ["two/id-5", "one/id-3", "one/id-5", "two/id-4"]
    assert_same(view, again, images=False, ids=False)
    twice = export_data(first.subset([3, 3, 4, 3]), tmp_path / "twice", progress=False)
    assert twice.renamed == 2
    assert list(back(tmp_path / "twice", tmp_path / "twice.beton").ids) == [
        "id-3",
        "id-3#2",
        "id-4",
        "id-3#3",
    ]
    assert first[0]["label"] == 0  # a dataset that was given stays open


def test_names_that_differ():
    def unique(names, **options):
        get, changed = exporter._unique(names.__getitem__, len(names), "~", **options)
        return [get(i) for i in range(len(names))], changed

    assert unique(["a", "a", "a~2", "b", "a"]) == (["a", "a~3", "a~2", "b", "a~4"], 2)
    assert unique(["A", "a", "b"], fold=True) == (["A", "a~2", "b"], 1)
    keys = [exporter._key(name) for name in ODD]
    assert all(0 < len(key) <= 80 and "." not in key and " " not in key and key.isascii() for key in keys)
    assert keys[0] == keys[1] == keys[2] == "a/b%20c"
    assert not any(key.startswith("/") or "//" in key or key.endswith("/") for key in keys)
    for name, size in (("a.jpg", 0), ("x" * 95 + ".json", 2**31), ("b/c.cls", 1)):
        info = tarfile.TarInfo(name)
        info.size = size
        assert exporter._header(name, size) == info.tobuf(tarfile.USTAR_FORMAT)


def test_shards_are_cut_by_size_and_do_not_depend_on_the_run(small, tmp_path):
    limit = 40_960
    for out in ("a", "b"):
        export_data(small, tmp_path / out, shard_mib=limit / 2**20, progress=False)
    shards = sorted((tmp_path / "a").glob("*.tar"))
    assert [s.name for s in shards] == [f"small-{n:06d}.tar" for n in range(len(shards))] and len(shards) > 2
    assert all(s.stat().st_size <= limit for s in shards)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    assert_same(dataset.open(small), back(tmp_path / "a", tmp_path / "a.beton"), images=False)
    assert_same(dataset.open(small), back(f"{tmp_path}/b/small-*.tar", tmp_path / "b.beton"), images=False)
    tiny = export_data(small, tmp_path / "tiny", shard_mib=1e-3, progress=False)  # a sample for each
    assert len(tiny.files) == 20
    # Shards of two exports are one dataset only if they name the same classes.
    one = made(
        tmp_path / "o.beton", [beton.Field("label", "int")], [("1", {"label": 0})], {"label": ["other"]}
    )
    export_data(one, tmp_path / "o", progress=False)
    with pytest.raises(DataError, match="other fields or classes"):
        back(f"{tmp_path}/{{a,o}}/*.tar", tmp_path / "no.beton")


def test_the_index_is_the_one_of_dalis_own_tool(rich, tmp_path):
    pytest.importorskip("wds2idx")
    done = export_data(rich, tmp_path / "w", shard_mib=0.05, progress=False)
    assert len(done.files) > 1
    for shard in done.files:
        command = [sys.executable, "-m", "wds2idx", shard, str(tmp_path / "theirs.idx")]
        subprocess.run(command, check=True, capture_output=True)
        assert (tmp_path / "theirs.idx").read_text() == Path(shard).with_suffix(".idx").read_text()


def test_dali_reads_the_shards(rich, tmp_path):
    dali = pytest.importorskip("nvidia.dali")
    fn = dali.fn
    done = export_data(rich, tmp_path / "w", shard_mib=0.05, progress=False)
    indices = [str(Path(path).with_suffix(".idx")) for path in done.files]

    @dali.pipeline_def(batch_size=len(ODD), num_threads=1, device_id=None)
    def pipe():
        parts = fn.readers.webdataset(paths=done.files, index_paths=indices, ext=["jpg;png", "cls", "json"])
        return fn.decoders.image(parts[0], device="cpu"), parts[1], parts[2]

    built = pipe()
    built.build()
    images, numbers, records = built.run()
    ds = dataset.open(rich)
    for i in range(len(ds)):
        assert json.loads(bytes(np.array(records[i])), parse_constant=pytest.fail)["id"] == ds.ids[i]
        assert int(bytes(np.array(numbers[i]))) == ds[i]["label"]
        assert np.abs(np.array(images[i]).astype(int) - ds[i]["image"]).max() <= (0 if ds.modes[i] else 2)


def test_labels_are_read_by_name_in_another_order_or_not_at_all(small, tmp_path):
    export_data(small, tmp_path / "w", progress=False)
    export_data(small, tmp_path / "f", "folder", progress=False)
    ds = dataset.open(small)
    order = ["class3", "class1", "class0", "class2"]
    for n, source in enumerate((tmp_path / "w", tmp_path / "f" / "labels.csv")):
        again = back(source, tmp_path / f"{n}.beton", classes=order)
        assert [order[label] for label in again.labels] == [ds.classes[label] for label in ds.labels]
        assert "label" not in back(source, tmp_path / f"{n}n.beton", label_from="none").fields
        with pytest.raises(DataError, match="unknown label 'class3'"):
            back(source, tmp_path / "no.beton", classes=order[1:])


def test_a_table_that_was_edited(small, tmp_path):
    export_data(small, tmp_path / "f", "folder", progress=False)
    table = tmp_path / "f" / "labels.csv"
    lines = table.read_text().splitlines()
    table.write_text(
        "\n".join([lines[0] + ",fold", *(f"{line},{i % 5}" for i, line in enumerate(lines[1:9]))])
    )
    again = back(table, tmp_path / "a.beton")
    assert (
        len(again) == 8
        and again.column("fold").tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
        and again.ids[0] == "id-0"
    )
    table.write_text(table.read_text().replace(",class1,", ",clas1,"))
    with pytest.raises(DataError, match="'label': unknown label 'clas1'; the classes are class0"):
        back(table, tmp_path / "b.beton")
    table.write_text(
        "\n".join(line.rpartition(",")[0].rpartition(",")[0] for line in lines)
    )  # id, label gone
    assert list(back(table, tmp_path / "c.beton").fields) == ["image", "id"]


def test_exif_of_a_stored_jpeg_does_not_turn_the_file(tmp_path):
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((16, 32, 3), np.uint8)).save(file, "JPEG", exif=exif)
    fields = [beton.Field("label", "int")]
    stored = beton.EncodedImage("jpeg", 16, 32, file.getvalue())
    path = made(tmp_path / "e.beton", fields, [("1", {"label": 0, "image": stored})])
    export_data(path, tmp_path / "w", progress=False)
    assert_same(dataset.open(path), back(tmp_path / "w", tmp_path / "b.beton"), images=False)


def test_overwrite_replaces_an_earlier_export_and_nothing_else(small, tmp_path):
    out = tmp_path / "out"
    export_data(small, out, "folder", progress=False)
    with pytest.raises(UsageError, match="not empty; choose another folder, or replace it with --overwrite"):
        export_data(small, out, progress=False)
    (out / "class0" / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"'class0/mine\.txt', which no export wrote"):
        export_data(small, out, overwrite=True, progress=False)
    (out / "class0" / "mine.txt").unlink()
    export_data(small, out, overwrite=True, progress=False)
    names = ["classes.txt", "dataset.json", "small-000000.idx", "small-000000.tar"]
    assert sorted(p.name for p in out.iterdir()) == names
    export_data(dataset.open(small).subset([1]), out, "folder", overwrite=True, progress=False)
    assert sorted(p.name for p in out.iterdir()) == ["class1", "classes.txt", "dataset.json", "labels.csv"]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "x.jpg").write_text("x")
    for overwrite, message in (
        (False, "not empty; choose another folder, or empty it"),
        (True, "no earlier export"),
    ):
        with pytest.raises(UsageError, match=message):
            export_data(small, tmp_path / "photos", overwrite=overwrite, progress=False)
    assert (tmp_path / "photos" / "x.jpg").exists()


def damaged(path):
    """The same file with one byte of its sixth image changed."""
    with dataset.open(path) as ds:
        at = int(ds._readers[0].column("image")[5]["ptr"]) + 700
    raw = bytearray(Path(path).read_bytes())
    raw[at] ^= 1
    Path(path).write_bytes(raw)
    return path


@pytest.mark.parametrize("to", ["webdataset", "folder"])
def test_an_export_that_fails_leaves_nothing(small, tmp_path, monkeypatch, to):
    out = tmp_path / "out"
    export_data(small, out, to, progress=False)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with monkeypatch.context() as patch:

        def stop(self, item, turn):
            raise KeyboardInterrupt

        patch.setattr(exporter._Job, "_plain", stop)
        for target in (out, tmp_path / "new"):
            with pytest.raises(KeyboardInterrupt):
                export_data(small, target, to, overwrite=True, progress=False)
    bad = damaged(small)
    with pytest.raises(CorruptError, match=r"sample 5, id 'id-5'.*checksum does not match; fastload verify"):
        export_data(bad, out, to, overwrite=True, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(exporter, "_save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(DataError, match=r"the disk is full: .* of 4 samples; make room"):
            export_data(dataset.open(bad).subset([1, 2, 3, 4]), out, to, overwrite=True, progress=False)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert not (tmp_path / "new").exists()
    (out / ".partial").mkdir()  # of a process that was killed
    (out / ".partial" / "half.tar").write_text("half")
    export_data(dataset.open(bad).subset([1]), out, to, overwrite=True, progress=False)
    assert read_manifest(out).samples == 1 and not (out / ".partial").exists()


def test_what_cannot_be_exported(small, tmp_path):
    for options, message in (
        ({"to": "tar"}, "webdataset, folder, got 'tar'"),
        ({"shard_mib": 0}, "above 0, got 0"),
        ({"shard_mib": float("nan")}, "above 0, got nan"),
    ):
        with pytest.raises(UsageError, match=message):
            export_data(small, tmp_path / "x", progress=False, **options)
    with pytest.raises(UsageError, match="is a file; name a folder"):
        export_data(small, small)
    with pytest.raises(UsageError, match="does not exist; make it first: mkdir -p"):
        export_data(small, tmp_path / "no" / "x")
    with pytest.raises(DataError, match="shows no samples"):
        export_data(dataset.open(small).subset([]), tmp_path / "x")
    fields = [beton.Field("label", "int")]
    path = made(tmp_path / "n.beton", fields, [("a", {"label": 7})], {"label": ["7"]})
    with pytest.raises(DataError, match="sample 0, id 'a': its 'label' is 7 and has no name"):
        export_data(path, tmp_path / "x", "folder", progress=False)
    assert not (tmp_path / "x").exists()


def test_a_description_that_is_damaged(small, tmp_path):
    export_data(small, tmp_path / "w", progress=False)
    text = tmp_path / "w" / "dataset.json"
    found = json.loads(text.read_text())
    for change, message in (
        ({"version": 2}, "version 2, and this release"),
        ({"fields": [{}]}, "is damaged"),
    ):
        text.write_text(json.dumps({**found, **change}))
        with pytest.raises(DataError, match=message):
            fastload.convert(tmp_path / "w", tmp_path / "x.beton", progress=False)
    found["fields"][0]["key"] = "species"
    text.write_text(json.dumps(found))
    with pytest.raises(DataError, match=r"its \.json has no 'species', which dataset.json lists"):
        fastload.convert(tmp_path / "w", tmp_path / "x.beton", progress=False)


def run(capsys, *args):
    with pytest.raises(SystemExit) as caught:
        main(["export", *map(str, args)])
    out = capsys.readouterr()
    return caught.value.code, out.out, out.err


def test_the_command(small, tmp_path, capsys):
    code, out, _ = run(capsys, small, tmp_path / "w", "--shard-size", "0.05", "--json")
    assert code == 0
    lines = out.splitlines()
    record = json.loads(lines[-1])
    assert record["samples"] == 20 and record["to"] == "webdataset" and len(record["files"]) > 1
    assert lines[-2].startswith(f"{tmp_path / 'w'}: 20 samples in {len(record['files'])} shards, 0.")
    assert record["read_back"] == f"fastload convert {tmp_path / 'w'} again.beton"
    assert run(capsys, small, tmp_path / "f", "--to", "folder")[0] == 0
    for args, message in (
        ((small,), "name the folder to write: fastload export"),
        ((small, tmp_path / "w"), "or replace it with --overwrite"),
        ((small, tmp_path / "w2", "--to", "zip"), "webdataset, folder, got 'zip'"),
        ((small, tmp_path / "w2", "-o", "m.onnx"), "-o is for a run folder, and"),
        ((small, tmp_path / "w2", "--which", "last"), "--which is for a run folder"),
        ((tmp_path, tmp_path / "w2"), "DIR is for a dataset, and"),
        ((tmp_path, "--overwrite", "-o", "m.onnx"), "--overwrite is for a dataset, and"),
        ((tmp_path,), "name the file to write: fastload export"),
        ((tmp_path, "-o", "m.onnx", "--which", "worst"), "best or last, got 'worst'"),
    ):
        code, _, err = run(capsys, *args)
        assert code == 2 and message in err, err
    assert not (tmp_path / "w2").exists()
