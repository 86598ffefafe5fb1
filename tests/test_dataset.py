"""Datasets: views, joins, columns and names against a plain list of what the file was made from."""

import gc
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastload
from fastload import beton, codecs, dataset
from fastload.beton import EncodedImage, Field
from fastload.errors import CorruptError, DataError, UsageError

EXTRA = (
    Field("number", "int"),
    Field("real", "float"),
    Field("text", "bytes"),
    Field("meta", "json"),
    Field("vector", "ndarray", "<f4", (2, 3)),
)


@pytest.fixture
def mixed(beton_file):
    with fastload.open(beton_file(store="mixed", extra=EXTRA)) as ds:
        yield ds


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One raw file of 30 samples whose pixels all say its index; open for the whole module."""
    path = tmp_path_factory.mktemp("dataset") / "numbers.beton"
    writer = beton.Writer(path, [Field("image", "image"), Field("label", "int")], 30)
    for i in range(30):
        image = EncodedImage("raw", 4 + i, 5, np.full((4 + i, 5, 3), i, np.uint8))
        writer.add({"image": image, "label": i % 3}, id=f"id-{i}", source=f"{i}.png")
    writer.finish({"classes": {"label": ["a", "b", "c", "none"]}})
    with fastload.open(path) as ds:
        yield ds


def numbers(ds):
    """What is in a view, read in every way there is; they must agree."""
    found = [int(sample["image"][0, 0, 0]) for sample in ds]
    assert found == [int(i) for i in ds.indices] and len(ds) == len(found)
    assert ds.labels.tolist() == [i % 3 for i in found] and ds.labels.dtype == np.int64
    assert list(ds.ids) == [f"id-{i}" for i in found] and list(ds.sources) == [f"{i}.png" for i in found]
    assert ds.heights.tolist() == [4 + i for i in found] and ds.widths.tolist() == [5] * len(found)
    assert [ds.encoded(i).height for i in range(len(ds))] == ds.heights.tolist()
    return found


def test_a_sample_has_every_field(mixed, picture):
    for i in (0, 1, 7, 19):
        sample = mixed[i]
        assert (
            list(sample)
            == ["image", "label", "number", "real", "text", "meta", "vector"]
            == list(mixed.fields)
        )
        height, width = mixed.heights[i], mixed.widths[i]
        exact = picture(int(height), int(width), i)
        assert sample["image"].shape == (height, width, 3) and sample["image"].dtype == np.uint8
        if i % 2:
            assert np.array_equal(sample["image"], exact)
        else:
            assert np.abs(sample["image"].astype(int) - exact).mean() < 12
        assert (sample["label"], sample["number"], sample["real"]) == (i % 4, i * 10, i / 4)
        assert type(sample["label"]) is int and type(sample["real"]) is float
        assert sample["text"] == (f"text {i}".encode() if i else b"")
        assert sample["meta"] == {"number": i, "list": [i] * 3}
        assert np.array_equal(sample["vector"], np.full((2, 3), i, np.float32))
    assert mixed.modes.tolist() == [0, 1] * 10


def test_a_sample_is_a_copy_that_may_be_written(mixed):
    for i in (0, 1):
        mixed[i]["image"][:] = 0
        mixed[i]["vector"][:] = -1
        assert mixed[i]["image"].max() > 100 and (mixed[i]["vector"] == i).all()
    assert not np.frombuffer(mixed.encoded(0).data, np.uint8).flags.writeable  # the file itself is safe


def test_what_it_says_about_itself(small):
    with fastload.open(small) as ds:
        assert ds.path == small and ds.paths == [small] and len(ds) == 20
        assert ds.classes == ds.class_names("label") == ["class0", "class1", "class2", "class3"]
        assert ds.class_names("image") == [] == ds.class_names("nothing")
        assert ds.info["created_by"] == "tests" and ds.image_field == "image"
        text = repr(ds)
        assert "20 samples" in text and "label: int" in text and "4 classes" in text and small in text


def test_open_takes_paths_of_either_kind(small):
    from pathlib import Path

    for path in (small, Path(small)):
        with fastload.open(path) as ds:
            assert isinstance(ds, fastload.Dataset) and len(ds) == 20


def test_indices_count_from_both_ends(shared):
    assert numbers(shared) == list(range(30))
    for i in range(30):
        assert shared[i - 30]["image"][0, 0, 0] == i and shared.encoded(i - 30).height == 4 + i
        assert shared[np.int64(i)]["image"][0, 0, 0] == i
        assert shared.ids[i - 30] == f"id-{i}"
    for wrong in (30, -31, 10**12):
        with pytest.raises(IndexError, match="dataset of 30"):
            shared[wrong]
        with pytest.raises(IndexError):
            shared.ids[wrong]
    assert shared.ids[2:8:3] == ["id-2", "id-5"] and len(shared.ids) == 30


index = st.integers(-30, 29)


@given(
    st.lists(
        st.one_of(
            st.lists(index, max_size=40).map(lambda x: ("take", x)),
            st.slices(30).map(lambda x: ("slice", x)),
            st.integers(0, 2**30).map(lambda x: ("mask", x)),
        ),
        max_size=4,
    )
)
@settings(max_examples=120, deadline=None)
def test_views_of_views_equal_the_same_steps_on_a_list(shared, steps):
    ds, truth = shared, list(range(30))
    for kind, what in steps:
        if kind == "take":
            chosen = [i for i in what if -len(truth) <= i < len(truth)]
            ds, truth = ds.subset(chosen), [truth[i] for i in chosen]
        elif kind == "slice":
            ds, truth = ds[what], truth[what]
        else:
            mask = np.array([what >> i & 1 for i in range(len(truth))], bool)
            ds, truth = ds.subset(mask), [t for t, keep in zip(truth, mask) if keep]
        assert isinstance(ds, fastload.Dataset)
    assert numbers(ds) == truth
    counts = ds.label_counts()
    assert counts == {name: sum(t % 3 == c for t in truth) for c, name in enumerate(["a", "b", "c", "none"])}


@pytest.mark.parametrize("empty", [[], (), np.empty(0, np.int64), np.zeros(30, bool), range(0)])
def test_an_empty_view_is_a_dataset(shared, empty):
    ds = shared.subset(empty)
    assert len(ds) == 0 and list(ds) == [] and ds.labels.shape == (0,) and ds.heights.shape == (0,)
    assert ds.label_counts() == {"a": 0, "b": 0, "c": 0, "none": 0} and ds.classes == shared.classes
    with pytest.raises(IndexError):
        ds[0]


@pytest.mark.parametrize(
    ("indices", "words"),
    [
        ([0, 30], "index 30 is outside of a dataset of 30"),
        ([-31], "index -31 is outside"),
        ([1.5], "integers, got float64"),
        (["1"], "integers"),
        ([[1, 2]], r"shape \(1, 2\)"),
        (3, "integers"),
        ([True, False], r"one entry for each of 30 samples, got shape \(2,\)"),
    ],
)
def test_indices_that_make_no_sense(shared, indices, words):
    with pytest.raises(UsageError, match=words):
        shared.subset(indices)


def test_a_view_costs_no_pixels_and_no_file(shared):
    views = [shared.subset(np.arange(30)) for _ in range(2000)]
    assert len(os.listdir("/proc/self/fd")) < 200 if os.path.isdir("/proc/self/fd") else True
    assert all(view._readers[0] is shared._readers[0] for view in views)


def test_columns(mixed):
    assert (
        np.array_equal(mixed.column("number"), np.arange(20) * 10)
        and mixed.column("number").dtype == np.int64
    )
    assert (
        np.array_equal(mixed.column("real"), np.arange(20) / 4) and mixed.column("real").dtype == np.float64
    )
    vectors = mixed.column("vector")
    assert (
        vectors.shape == (20, 2, 3)
        and vectors.dtype == np.float32
        and (vectors[:, 1, 2] == np.arange(20)).all()
    )
    view = mixed.subset([5, -1, 5])
    assert view.column("number").tolist() == [50, 190, 50] and view.column("vector")[:, 0, 0].tolist() == [
        5,
        19,
        5,
    ]
    assert view.subset([]).column("vector").shape == (0, 2, 3)
    with pytest.raises(UsageError, match=r"unknown field 'nummer'.*'number'"):
        mixed.column("nummer")
    for name in ("image", "text", "meta"):
        with pytest.raises(UsageError, match=f"{name!r} is of kind"):
            mixed.column(name)


def test_gather_takes_base_indices_in_any_order(mixed):
    view = mixed.subset([9, 4, 0, 4])
    bases = view.indices
    assert view.gather("number", bases).tolist() == [90, 40, 0, 40]
    assert view.gather("text", bases).tolist() == [b"text 9", b"text 4", b"", b"text 4"]
    assert view.gather("meta", bases)[0] == {"number": 9, "list": [9] * 3}
    assert view.gather("vector", bases)[:, 1, 1].tolist() == [9, 4, 0, 4]
    assert view.gather("image", bases)["height"].tolist() == view.heights.tolist()


def make(path, labels, classes=None, kind="int", name="label", extra=()):
    """A file of tiny raw images with these labels."""
    shape = (len(labels[0]),) if kind == "ndarray" else ()
    fields = [Field("image", "image"), Field(name, kind, "<f4" if kind == "ndarray" else None, shape), *extra]
    writer = beton.Writer(path, fields, len(labels))
    for i, label in enumerate(labels):
        image = EncodedImage("raw", 2, 2, np.full((2, 2, 3), i, np.uint8))
        value = np.asarray(label, np.float32) if kind == "ndarray" else label
        writer.add(
            {"image": image, name: value, **{f.name: i for f in extra}}, id=str(i), source=f"{path}:{i}"
        )
    writer.finish({"classes": {name: classes}} if classes else {})
    return fastload.open(path)


def test_labels_without_names_are_counted_by_number(tmp_path):
    with make(tmp_path / "a.beton", [5, -2, 5, 7]) as ds:
        assert ds.classes == [] and ds.label_counts() == {"-2": 1, "5": 2, "7": 1}


def test_a_file_of_several_labels(tmp_path):
    with make(tmp_path / "a.beton", [[1, 0, 1], [0, 0, 1]], ["x", "y", "z"], "ndarray") as ds:
        assert ds.labels.shape == (2, 3) and ds.labels.dtype == np.float32
        assert ds.label_counts() == {"x": 1, "y": 0, "z": 2}
        assert ds.subset([1]).label_counts() == {"x": 0, "y": 0, "z": 1}


def test_another_field_can_be_counted(tmp_path):
    with make(tmp_path / "a.beton", [1, 0, 1], ["no", "yes"], name="mask") as ds:
        assert ds.label_counts("mask") == {"no": 1, "yes": 2}
        assert ds.class_names("mask") == ["no", "yes"] and ds.classes == []
        with pytest.raises(DataError, match=r"has no labels \(fields: image, mask\).*--label-from"):
            _ = ds.labels
        with pytest.raises(DataError, match="no labels"):
            ds.label_counts()


def test_a_label_outside_of_the_names_is_an_error_of_the_data(tmp_path):
    for wrong in (2, -1):
        with make(tmp_path / "a.beton", [0, wrong], ["no", "yes"]) as ds:
            with pytest.raises(DataError, match=f"label {wrong} and names only 2 classes"):
                ds.label_counts()
            assert ds.labels.tolist() == [0, wrong]


def test_files_joined_are_one_dataset(tmp_path):
    parts = [make(tmp_path / f"{n}.beton", list(range(n))) for n in (3, 1, 5)]
    with fastload.concat(parts) as ds:
        assert len(ds) == 9 and ds.labels.tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 4]
        assert ds.paths == [str(tmp_path / f"{n}.beton") for n in (3, 1, 5)] and ds.indices.tolist() == list(
            range(9)
        )
        assert [s["label"] for s in ds] == ds.labels.tolist()
        assert [int(s["image"][0, 0, 0]) for s in ds] == ds.labels.tolist()
        assert ds.sources[3].endswith("1.beton:0") and ds.sources[-1].endswith("5.beton:4")
        assert ds.gather("label", np.array([8, 3, 2])).tolist() == [4, 0, 2] and ds[-1]["label"] == 4
        view = ds.subset([8, 0])
        assert view.labels.tolist() == [4, 0] and view.indices.tolist() == [8, 0]
        assert dataset.verify(ds).samples == 9 and dataset.verify(ds).ok


def test_views_joined_keep_their_order_and_their_files(tmp_path):
    a, b = make(tmp_path / "a.beton", [0, 1, 2, 3]), make(tmp_path / "b.beton", [4, 5, 6])
    both = fastload.concat([b.subset([2, 0]), a, a.subset([3, 3])])
    assert both.labels.tolist() == [6, 4, 0, 1, 2, 3, 3, 3] == [s["label"] for s in both]
    assert both.subset(np.arange(8) % 2 == 0).labels.tolist() == [6, 0, 2, 3]
    assert fastload.concat([both, b]).labels.tolist() == [6, 4, 0, 1, 2, 3, 3, 3, 4, 5, 6]
    assert [both.locate(i)[0].path[-7] for i in range(8)] == list("bbaaaaaa")
    assert len(fastload.concat([a.subset([]), b.subset([])])) == 0


def test_joins_that_cannot_be(tmp_path):
    a = make(tmp_path / "a.beton", [0, 1], ["cat", "dog"])
    with pytest.raises(UsageError, match="at least one dataset, got none"):
        fastload.concat([])
    with pytest.raises(DataError, match=r"classes of 'label' otherwise.*--classes"):
        fastload.concat([a, make(tmp_path / "b.beton", [0, 1], ["dog", "cat"])])
    with pytest.raises(DataError, match=r"c\.beton has the fields.*same"):
        fastload.concat([a, make(tmp_path / "c.beton", [0, 1], ["cat", "dog"], extra=(Field("age", "int"),))])
    with pytest.raises(DataError, match="same"):
        fastload.concat([a, make(tmp_path / "d.beton", [0.0, 1.0], ["cat", "dog"], "float")])


def two_images(path, names):
    writer = beton.Writer(path, [Field(name, "image") for name in names], 1)
    image = EncodedImage("raw", 2, 2, np.zeros((2, 2, 3), np.uint8))
    writer.add(dict.fromkeys(names, image), id="0", source="")
    writer.finish({})
    return fastload.open(path)


def test_which_field_is_the_image(tmp_path):
    assert two_images(tmp_path / "a.beton", ["depth", "image"]).image_field == "image"
    assert two_images(tmp_path / "b.beton", ["photo"]).image_field == "photo"
    ds = two_images(tmp_path / "c.beton", ["left", "right"])
    with pytest.raises(DataError, match=r"2 image fields \(left, right\)"):
        _ = ds.image_field
    assert set(ds[0]) == {"left", "right"}


def test_a_broken_sample_is_named(tmp_path, small):
    with beton.Reader(small) as file:
        at = int(file.metadata["f0"]["ptr"][3])
    data = bytearray(open(small, "rb").read())
    data[at : at + 400] = b"\0" * 400
    path = tmp_path / "broken.beton"
    path.write_bytes(data)
    with fastload.open(path) as ds:
        view = ds.subset([5, 3])
        assert view[0]["label"] == 1
        with pytest.raises(CorruptError, match=r"sample 1, id 'id-3', source 'class3/3.jpg': ") as caught:
            view[1]
        assert (caught.value.index, caught.value.id, caught.value.source) == (1, "id-3", "class3/3.jpg")
        with pytest.raises(CorruptError, match="id-3"):
            list(ds)
        result = fastload.verify(view)
        assert [b["index"] for b in result.bad] == [1] and result.samples == 2 and not result.ok
        assert [b["index"] for b in fastload.verify(str(path)).bad] == [3]


def test_a_jpeg_of_another_size_than_the_file_says(tmp_path):
    path = tmp_path / "a.beton"
    writer = beton.Writer(path, [Field("image", "image")], 1)
    pixels = np.zeros((20, 30, 3), np.uint8)
    writer.add({"image": EncodedImage("jpeg", 20, 31, codecs.encode_jpeg(pixels))}, id="0", source="")
    writer.finish({})
    with (
        fastload.open(path) as ds,
        pytest.raises(CorruptError, match="20 x 30 pixels and the file says 20 x 31"),
    ):
        ds[0]


def test_verify_finds_all_of_it_and_says_whether_there_were_checksums(mixed):
    result = fastload.verify(mixed)
    assert result.ok and result.samples == 20 and result.has_checksums and result.bad == []
    assert fastload.verify(mixed.path) == result
    with pytest.raises(UsageError, match="no such file"):
        fastload.verify("no.beton")


def test_the_context_closes_the_file(small):
    def mapped():
        gc.collect()
        if not os.path.exists("/proc/self/maps"):
            return None  # this system does not tell
        with open("/proc/self/maps") as maps:
            return small in maps.read()

    with fastload.open(small) as ds:
        view, encoded = ds.subset([0]), ds.encoded(0)
        sample = ds[0]
        assert mapped() is not False
    assert sample["image"].shape[2] == 3  # what was read stays
    assert bytes(encoded.data)[:2] == b"\xff\xd8"  # bytes handed out keep their map
    for wrong in (ds, view):
        with pytest.raises(fastload.FastloadError, match="closed"):
            wrong[0]
        for name in ("labels", "heights", "modes"):
            with pytest.raises(UsageError, match=r"small\.beton is closed; open it again"):
                getattr(wrong, name)
    ds.close()  # once more does no harm
    del encoded, ds, view, wrong
    assert not mapped()


def test_opening_and_dropping_leaves_nothing_open(small):
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(300):
        assert fastload.open(small)[0]["label"] == 0
    gc.collect()
    after = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert after <= before + 2


def test_wrong_paths_and_foreign_files(tmp_path):
    with pytest.raises(UsageError, match=r"no such file.*fastload convert"):
        fastload.open(tmp_path / "none.beton")
    with pytest.raises(UsageError, match=r"not a file.*fastload convert"):
        fastload.open(tmp_path)
    for content in (b"", b"x" * 10, b"\x89PNG\r\n\x1a\n" + b"\0" * 100, b"PK\3\4" + b"\0" * 100):
        (tmp_path / "foreign").write_bytes(content)
        with pytest.raises(DataError, match=r"is not a \.beton file"):
            fastload.open(tmp_path / "foreign")
