"""The container: round trips, FFCV on both sides, resuming, damage, and size."""

import json
import os
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
import simplejpeg

from fastload import beton, codecs, dataset
from fastload.beton import EncodedImage, Field, layout
from fastload.errors import CorruptError, DataError, FastloadError, UsageError

EVERY_KIND = (
    Field("number", "int"),
    Field("real", "float"),
    Field("text", "bytes"),
    Field("meta", "json"),
    Field("vector", "ndarray", "<f4", (2, 3)),
)


def test_round_trip_of_every_kind(beton_file, picture):
    with beton.Reader(beton_file(store="mixed", extra=EVERY_KIND)) as file:
        assert len(file) == 20 and file.info["created_by"] == "tests"
        for i in (0, 7, 19):
            assert file.value(i, "number") == i * 10 and file.value(i, "real") == i / 4
            assert file.value(i, "text") == (f"text {i}".encode() if i else b"")
            assert file.value(i, "meta") == {"number": i, "list": [i] * 3}
            assert np.array_equal(file.value(i, "vector"), np.full((2, 3), i, np.float32))
            assert file.strings("id")[i] == f"id-{i}" and file.strings("source")[i] == f"class{i % 4}/{i}.jpg"
            assert file.checksum_matches(i) is True
        raw = file.image(3)
        assert raw.mode == "raw" and np.array_equal(dataset.decode(raw), picture(raw.height, raw.width, 3))


def test_no_allocation_crosses_a_page_even_when_pages_must_grow(tmp_path):
    path = tmp_path / "pages.beton"
    writer = beton.Writer(path, [Field("image", "image")], 40)
    for i in range(40):
        side = 2000 if i == 25 else 400  # one raw image of 12 MB among those of 480 kB
        pixels = np.full((side, side, 3), i, np.uint8)
        writer.add({"image": EncodedImage("raw", side, side, pixels)}, id=str(i), source=str(i))
    writer.finish({})
    with beton.Reader(path) as file:
        assert file.page_size == 1 << 24
        first = file.allocations["ptr"] // file.page_size
        last = (file.allocations["ptr"] + file.allocations["size"] - 1) // file.page_size
        assert np.array_equal(first, last)
        assert all(file.image(i).data[0] == i for i in range(40))


FFCV_EPOCH = """
import sys
import numpy as np
from ffcv.fields.basics import IntDecoder
from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder, SimpleRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.reader import Reader

path, out, whole = sys.argv[1:]
decoder = SimpleRGBImageDecoder() if whole == "whole" else RandomResizedCropRGBImageDecoder((32, 32))
columns = {"names": np.array(list(Reader(path).handlers))}
for os_cache in (True, False):  # both of FFCV's ways to get at the bytes
    pipelines = {"image": [decoder], "label": [IntDecoder()]}
    loader = Loader(path, 10, 1, os_cache, OrderOption.SEQUENTIAL, pipelines=pipelines, drop_last=False)
    batches = [[np.array(part) for part in batch] for batch in loader]
    for number, parts in enumerate(zip(*batches)):
        columns[f"{os_cache}{number}"] = np.concatenate(parts)
np.savez(out, **columns)
"""


def ffcv_epoch(path, out, kind):
    """One epoch through FFCV's Loader, in a process of its own: it changes types that numba shares between all users, and
    kernels compiled after that in the same process can fail."""
    pytest.importorskip("ffcv", reason="the ffcv extra is not installed")
    done = subprocess.run(
        [sys.executable, "-c", FFCV_EPOCH, path, str(out), kind], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return np.load(out)


def test_ffcv_reads_every_sample_of_ours(beton_file, tmp_path):
    read = ffcv_epoch(beton_file(count=37, store="mixed", extra=EVERY_KIND), tmp_path / "read.npz", "crops")
    assert read["names"].tolist() == ["image", "label", "number", "real", "text", "meta", "vector"]
    for os_cache in ("True", "False"):
        assert read[f"{os_cache}0"].shape == (37, 32, 32, 3)
        assert np.array_equal(read[f"{os_cache}1"].ravel(), np.arange(37) % 4)
        assert np.array_equal(read[f"{os_cache}2"].ravel(), np.arange(37) * 10)
        assert np.array_equal(read[f"{os_cache}6"][:, 0, 0], np.arange(37))


def test_ffcv_decodes_our_jpeg_to_the_same_pixels(beton_file, tmp_path):
    path = beton_file(count=12, size=(48, 80))
    theirs = ffcv_epoch(path, tmp_path / "read.npz", "whole")["True0"]
    ds = dataset.open(path)
    # FFCV asks libjpeg-turbo for the fast inverse DCT and smooth chroma; so asked, it gives the same bits here.
    same = [
        simplejpeg.decode_jpeg(ds.encoded(i).data, "RGB", fastdct=True, fastupsample=False) for i in range(12)
    ]
    assert np.array_equal(np.stack(same), theirs)


@pytest.mark.parametrize("mode", ["jpg", "raw", "smart", "proportion"])
@pytest.mark.parametrize("workers", [1, 3])
def test_we_read_files_that_ffcv_wrote(tmp_path, mode, workers, picture):
    pytest.importorskip("ffcv", reason="the ffcv extra is not installed")
    from ffcv.fields import BytesField, FloatField, IntField, JSONField, NDArrayField, RGBImageField
    from ffcv.writer import DatasetWriter

    class Source:
        def __len__(self):
            return 30

        def __getitem__(self, i):
            pixels = picture(30 + i, 50, int(i))
            text = np.frombuffer(f"text {i}".encode(), np.uint8)
            return pixels, int(i) % 3, i / 2, text, {"n": int(i)}, np.full((2, 2), i, np.int32)

    path = str(tmp_path / "theirs.beton")
    fields = {
        "image": RGBImageField(write_mode=mode, smart_threshold=6000),
        "label": IntField(),
        "real": FloatField(),
        "text": BytesField(),
        "meta": JSONField(),
        "grid": NDArrayField(np.dtype("int32"), (2, 2)),
    }
    DatasetWriter(path, fields, num_workers=workers).from_indexed_dataset(Source(), chunksize=4)
    with dataset.open(path) as ds:
        assert len(ds) == 30 and ds.classes == [] and ds.ids[7] == "7"
        assert np.array_equal(ds.labels, np.arange(30) % 3) and np.array_equal(ds.heights, 30 + np.arange(30))
        for i in range(30):
            sample = ds[i]
            exact = picture(30 + i, 50, i)
            difference = np.abs(sample["image"].astype(int) - exact)
            assert difference.max() == 0 if ds.modes[i] == layout.RAW else difference.mean() < 12
            assert (
                sample["real"] == i / 2
                and sample["text"] == f"text {i}".encode()
                and sample["meta"] == {"n": i}
            )
            assert np.array_equal(sample["grid"], np.full((2, 2), i))
        assert {"jpg": {0}, "raw": {1}}.get(mode, {0, 1}) == set(ds.modes.tolist())
        assert dataset.verify(ds).ok and not dataset.verify(ds).has_checksums


def _write(path, resume, stop=None, count=300, fingerprint="same"):
    fields = [Field("image", "image"), Field("label", "int")]
    writer = beton.Writer(path, fields, count, fingerprint=fingerprint, resume=resume)
    began = writer.consumed
    for i in range(began, count):
        if i == stop:
            return writer, began
        if i % 7 == 3:
            writer.skip({"id": str(i), "source": f"s{i}", "reason": "test"})
        else:
            pixels = np.full((20, 20 + i % 5, 3), i % 256, np.uint8)
            image = EncodedImage("raw", 20, 20 + i % 5, pixels)
            writer.add({"image": image, "label": i}, id=str(i), source=f"s{i}")
    assert len(writer.skipped) == len(range(3, count, 7))
    writer.finish({"x": 1})
    return writer, began


@pytest.mark.parametrize("stop", [0, 1, 65, 130, 299])
def test_resuming_gives_the_bytes_of_an_uninterrupted_run(tmp_path, stop):
    _write(tmp_path / "whole.beton", False)
    writer, _ = _write(tmp_path / "cut.beton", False, stop)
    writer.abort(keep=True)
    assert not (tmp_path / "cut.beton").exists()
    _, began = _write(tmp_path / "cut.beton", True)
    assert began == stop
    assert (tmp_path / "cut.beton").read_bytes() == (tmp_path / "whole.beton").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut.beton", "whole.beton"]


def test_a_torn_journal_and_lost_data_cost_samples_but_not_correctness(tmp_path):
    _write(tmp_path / "whole.beton", False)
    rng = np.random.default_rng(0)
    for trial in range(25):
        path = tmp_path / f"torn{trial}.beton"
        writer, _ = _write(path, False, 200)
        writer.abort(keep=True)
        for name in (".journal", ".partial"):
            file = str(path) + name
            size = os.path.getsize(file)
            os.truncate(file, int(rng.integers(size // 2, size + 1)))
        _, began = _write(path, True)
        assert 0 <= began <= 200
        assert path.read_bytes() == (tmp_path / "whole.beton").read_bytes()


def test_a_journal_of_other_work_is_not_resumed(tmp_path):
    writer, _ = _write(tmp_path / "a.beton", False, 50)
    writer.abort(keep=True)
    with pytest.raises(UsageError, match="other images or options"):
        _write(tmp_path / "a.beton", True, fingerprint="different")


def test_abort_leaves_nothing(tmp_path):
    writer, _ = _write(tmp_path / "a.beton", False, 50)
    writer.abort(keep=False)
    assert list(tmp_path.iterdir()) == []


def test_the_writer_refuses_what_the_format_cannot_hold(tmp_path):
    with pytest.raises(UsageError, match="16 ASCII"):
        Field("a name that is too long", "int")
    with pytest.raises(UsageError, match="kind"):
        Field("x", "tensor")
    with pytest.raises(UsageError, match="dtype and"):
        Field("x", "ndarray")
    with pytest.raises(UsageError, match="no folder"):
        beton.Writer(tmp_path / "none" / "a.beton", [Field("x", "int")], 1)
    with pytest.raises(UsageError, match="it is a folder"):
        beton.Writer(tmp_path, [Field("x", "int")], 1)
    writer = beton.Writer(tmp_path / "a.beton", [Field("x", "int"), Field("y", "ndarray", "<f4", (2,))], 1)
    with pytest.raises(DataError, match="no value"):
        writer.add({"x": 1}, id="0", source="")
    with pytest.raises(DataError, match="64 bits"):
        writer.add({"x": 2**63, "y": [1, 2]}, id="0", source="")
    with pytest.raises(DataError, match="shape"):
        writer.add({"x": 1, "y": [1, 2, 3]}, id="0", source="")
    writer.add({"x": 1, "y": [1, 2]}, id="0", source="")
    with pytest.raises(UsageError, match="made for 1"):
        writer.add({"x": 1, "y": [1, 2]}, id="1", source="")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"real": "abc"}, "takes a float"),
        ({"number": np.float32(3.7)}, "takes a int"),
        ({"number": "7"}, "takes a int"),
        ({"number": None}, "takes a int"),
        ({"id": "b\udc80"}, "Unicode"),
    ],
)
def test_a_sample_that_is_refused_leaves_the_file_whole(tmp_path, wrong, words):
    path = tmp_path / "a.beton"
    writer = beton.Writer(path, [Field("image", "image"), Field("real", "float"), Field("number", "int")], 3)
    image = EncodedImage("raw", 4, 4, bytes(48))
    good = {"image": image, "real": 1.5, "number": 7}
    writer.add(good, id="0", source="")
    with pytest.raises(DataError, match=words):
        writer.add(
            {**good, **{k: v for k, v in wrong.items() if k != "id"}}, id=wrong.get("id", "1"), source=""
        )
    writer.add(good, id="2", source="")
    writer.finish({})
    with dataset.open(path) as ds:
        assert list(ds.ids) == ["0", "2"] and dataset.verify(ds).ok and ds[1]["number"] == 7


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda b: b[:10], "not a .beton"),
        (lambda b: b"", "only 0 bytes"),
        (lambda b: b"\x89PNG" + b[4:], "version"),
        (lambda b: b"\x03" + b[1:], "version 3"),
        (lambda b: b[: len(b) // 2], "truncated"),
        (lambda b: b[:-5], "cut short"),
        (lambda b: b[:2] + b"\xff\xff" + b[4:], "fields"),
        (lambda b: b[:8] + b"\xff" * 8 + b[16:], "truncated"),
    ],
)
def test_files_that_are_no_beton_say_so(tmp_path, small, damage, words):
    path = tmp_path / "bad.beton"
    path.write_bytes(damage(open(small, "rb").read()))
    with pytest.raises(DataError, match=words):
        beton.Reader(path)


def test_an_index_of_a_later_version_is_refused(tmp_path, small):
    data = bytearray(open(small, "rb").read())
    at = data.index(layout.MAGIC) + 8
    data[at] = 9
    (tmp_path / "new.beton").write_bytes(data)
    with pytest.raises(DataError, match=r"version 9.*update fastload"):
        beton.Reader(tmp_path / "new.beton")


def test_wrong_paths(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        beton.Reader(tmp_path / "none.beton")
    with pytest.raises(UsageError, match="not a file"):
        beton.Reader(tmp_path)


def _everything(ds):
    """All that can be read of a dataset: sample by sample the value or the class of the error."""
    for i in range(min(len(ds), 25)):
        try:
            sample = ds[i]
            yield (
                i,
                {k: v.tobytes() if isinstance(v, np.ndarray) else v for k, v in sample.items()},
                ds.ids[i],
            )
        except FastloadError as error:
            yield i, type(error), None


@pytest.mark.parametrize("seed", range(4))
def test_random_bytes_changed_give_an_error_or_are_found_by_verify(tmp_path, beton_file, seed):
    """Whatever is changed: no crash, no foreign error, and what verify calls good is what was written."""
    path = beton_file(store="mixed", extra=EVERY_KIND, count=8)
    good = open(path, "rb").read()
    with dataset.open(path) as ds:
        truth = list(_everything(ds))
    rng = np.random.default_rng(seed)
    opened = wrong = 0
    tables = layout.HEADER.itemsize + 7 * layout.DESCRIPTOR.itemsize + 8 * 80
    for trial in range(150):
        bad = bytearray(good)
        top = [60, tables, len(good), len(good)][trial % 4]
        low = len(good) - 1200 if trial % 4 == 3 else 0
        for _ in range(int(rng.integers(1, 8))):
            bad[int(rng.integers(low, top))] = int(rng.integers(0, 256))
        target = tmp_path / "fuzz.beton"
        target.write_bytes(bad)
        try:
            ds = dataset.open(target)
        except FastloadError:
            continue
        opened += 1
        listed = {entry["index"] for entry in dataset.verify(ds.subset(range(min(len(ds), 25)))).bad}
        found = list(_everything(ds))
        ds.close()
        if bytes(bad) == good:
            continue
        for (i, value, _), (_, expected, _) in zip(found, truth):
            # Names are compared through their section's checksum.
            if value != expected and not isinstance(value, type):
                wrong += 1
                # Found, unless the damage took the anchor or the descriptors, which say what there is to check.
                assert i in listed or None in listed or bad[:tables] != good[:tables]
    assert opened > 20 and wrong > 3  # the test saw both kinds


def test_a_changed_pixel_is_found(tmp_path, beton_file):
    path = beton_file(store="raw", count=5)
    with beton.Reader(path) as file:
        at = int(file.allocations["ptr"][2]) + 10
    data = bytearray(open(path, "rb").read())
    data[at] ^= 1
    changed = tmp_path / "changed.beton"
    changed.write_bytes(data)
    result = dataset.verify(changed)
    assert [entry["index"] for entry in result.bad] == [2] and "checksum" in result.bad[0]["reason"]
    assert result.bad[0]["id"] == "id-2" and result.bad[0]["source"] == "class2/2.jpg"


def test_addresses_outside_of_the_file_are_refused(tmp_path, small):
    with beton.Reader(small) as file:
        start = layout.HEADER.itemsize + 2 * layout.DESCRIPTOR.itemsize
        stride = file.metadata.dtype.itemsize
    for value in (0, 5, 2**40, 2**63, 2**64 - 1):
        data = bytearray(open(small, "rb").read())
        data[start + 3 * stride + 5 : start + 3 * stride + 13] = value.to_bytes(8, "little")
        bad = tmp_path / "address.beton"
        bad.write_bytes(data)
        with dataset.open(bad) as ds, pytest.raises(CorruptError, match="sample 3"):
            ds[3]


def test_ten_million_samples_open_at_once(tmp_path):
    """A made file of 10,000,000 rows, sparse on disk: opening and one access touch the index only."""
    path, count = tmp_path / "huge.beton", 10_000_000
    fields = [Field("image", "image"), Field("label", "int")]
    dtype = layout.metadata_dtype(fields)
    rows_at = layout.HEADER.itemsize + 2 * layout.DESCRIPTOR.itemsize
    data_at = rows_at + count * dtype.itemsize
    jpeg = codecs.encode_jpeg(np.full((16, 16, 3), 77, np.uint8))
    table_at = (data_at + len(jpeg) + 7) // 8 * 8
    with open(path, "wb") as file:
        header = np.array([(2, 2, 1 << 23, count, table_at)], layout.HEADER)
        file.write(header.tobytes() + b"".join(layout.encode_descriptor(f).tobytes() for f in fields))
        row = np.zeros(1, dtype)
        row["f0"], row["f1"] = (0, 16, 16, data_at), 5
        file.seek(rows_at + (count - 1) * dtype.itemsize)
        file.write(row.tobytes())
        file.seek(data_at)
        file.write(jpeg)
        file.truncate(table_at + count * layout.ALLOCATION.itemsize)
        file.seek(table_at + (count - 1) * layout.ALLOCATION.itemsize)
        file.write(np.array([(count - 1, data_at, len(jpeg))], layout.ALLOCATION).tobytes())
    began = time.perf_counter()
    with dataset.open(path) as ds:
        sample = ds[count - 1]
        seconds = time.perf_counter() - began
        assert len(ds) == count and sample["label"] == 5 and sample["image"].shape == (16, 16, 3)
    assert seconds < 2


def test_the_golden_file_reads_for_ever():
    """Written by release 0.1.0 (index version 1); the values are those its makers put in, not what we read today."""
    path = os.path.join(os.path.dirname(__file__), "golden", "v1.beton")
    with dataset.open(path) as ds:
        assert len(ds) == 4 and ds.classes == ["cat", "dog"] and ds.info["created_by"] == "fastload 0.1.0"
        assert list(ds.ids) == ["a/0", "a/1", "b/2", "b/3"] and list(ds.sources)[3] == "b/3.png"
        assert ds.labels.tolist() == [0, 0, 1, 1] and ds.column("weight").tolist() == [0.5, 1.5, 2.5, 3.5]
        assert dataset.verify(ds).ok and ds.modes.tolist() == [0, 1, 0, 1]
        y, x = np.mgrid[:24, :40]
        for i, sample in enumerate(ds):
            expected = np.stack([x * 6, y * 10, np.full_like(x, 60 * i)], axis=2)
            assert np.abs(sample["image"].astype(int) - expected).max() <= (0 if i % 2 else 12)
            assert sample["note"] == {"i": i} and sample["text"] == b"t" * i


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index["sections"].update(crc=[float("inf"), 1, 1]),
        lambda index: index.update(sections=[1, 2]),
        lambda index: index["sections"].pop("id_text"),
        lambda index: index["sections"]["id_ends"].__setitem__(1, 13),
        lambda index: index.update(sections={"crc": [0, -5, 0]}),
        lambda index: index.update(info=3),
    ],
)
def test_an_index_that_lies_with_a_right_checksum_is_damage(tmp_path, small, change):
    data = bytearray(open(small, "rb").read())
    at = data.index(layout.MAGIC)
    anchor = np.frombuffer(bytes(data[at : at + layout.ANCHOR.itemsize]), layout.ANCHOR)
    start = int(anchor["index_ptr"][0])
    length = int.from_bytes(data[start : start + 8], "little")
    index = json.loads(bytes(data[start + 8 : start + 8 + length]))
    change(index)
    blob = json.dumps(index).encode().ljust(length)
    data[start + 8 : start + 8 + length] = blob
    data[at + 12 : at + 16] = zlib.crc32(blob).to_bytes(4, "little")
    (tmp_path / "liar.beton").write_bytes(data)
    with pytest.raises(DataError, match="truncated or damaged"):
        beton.Reader(tmp_path / "liar.beton")


@pytest.mark.parametrize("store", ["jpeg", "raw", "mixed"])
def test_spans_are_those_of_the_images_and_mark_the_damaged(tmp_path, beton_file, store):
    """Metadata rows are overwritten at random: a span is marked where, and only where, the image itself is an error."""
    path = beton_file(f"{store}.beton", store=store, count=24)
    content = bytearray(open(path, "rb").read())
    with beton.Reader(path) as reader:
        row = reader.metadata.dtype.itemsize
        begin = 24 + len(reader.fields) * 1041  # behind header and descriptors
    rng = np.random.default_rng(3)
    marked = whole = 0
    for trial in range(60):
        changed = bytearray(content)
        for _ in range(rng.integers(0, 12)):
            at = begin + row * int(rng.integers(0, 24)) + int(rng.integers(0, 13))  # of the image's 13 bytes
            changed[at] = int(rng.choice([0, 1, 2, 255, int(rng.integers(0, 256))]))
        damaged = tmp_path / f"{trial}.beton"
        damaged.write_bytes(changed)
        with beton.Reader(damaged) as reader:
            order = rng.permutation(24)
            spans = reader.spans(order)
            for place, index in enumerate(order.tolist()):
                try:
                    image = reader.image(index)
                except DataError:
                    assert spans.starts[place] == -1 and spans.sizes[place] == 0
                    marked += 1
                    continue
                start, size = int(spans.starts[place]), int(spans.sizes[place])
                assert size == image.data.nbytes and bool(spans.raw[place]) == (image.mode == "raw")
                assert spans.shapes[place].tolist() == [image.height, image.width]
                assert np.shares_memory(reader.data[start : start + size], image.data) or size == 0
                assert np.array_equal(reader.data[start : start + size], image.data)
                whole += 1
    assert marked > 20 and whole > 500
