"""Listing of folders and CSV files: which samples, which labels, in which order, and what is refused."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastload.errors import DataError, UsageError
from fastload.sources import Source, SourceOptions, open_source
from fastload.sources_base import Names, check_unique, field_names, natural_key, typed


def jpeg(
    colour: tuple[int, int, int] = (10, 20, 30), size: tuple[int, int] = (16, 12), form: str = "JPEG"
) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, form)
    return buffer.getvalue()


def tree(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg())
    return root


def ids(source: Source) -> list[str]:
    return [source.sample(i).id for i in range(len(source))]


def labels(source: Source) -> list[str]:
    names = source.classes["label"]
    return [names[source.sample(i).values["label"]] for i in range(len(source))]


def opened(path: object, **options: object) -> Source:
    return open_source(path, SourceOptions(**options))  # type: ignore[arg-type]


def test_class_folders_in_natural_order(tmp_path: Path) -> None:
    root = tree(tmp_path, "c10/b.jpg", "c2/img10.jpg", "c2/img2.jpg", "c2/sub/img1.jpg", "C1/x.jpg")
    source = opened(root)
    assert source.classes == {"label": ["C1", "c2", "c10"]}
    assert ids(source) == ["C1/x.jpg", "c2/img2.jpg", "c2/img10.jpg", "c2/sub/img1.jpg", "c10/b.jpg"]
    assert labels(source) == ["C1", "c2", "c2", "c2", "c10"]


def test_litter_is_left_out_and_counted_but_content_beats_the_extension(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        "a/1.JPG",
        "a/2.weird",
        "a/noext",
        "a/image.txt",
        "__MACOSX/._1.jpg",
        ".git/x.jpg",
        "a/.hidden.jpg",
    )
    (root / "a" / "notes.txt").write_text("not an image")
    (root / "a" / "Thumbs.db").write_bytes(b"x")
    (root / "classes.csv").write_text("a\n")
    source = opened(root)
    assert ids(source) == ["a/1.JPG", "a/2.weird", "a/image.txt", "a/noext"]
    assert dict(source.ignored) == {"hidden": 4, ".txt": 1, ".csv": 1}
    assert source.classes == {"label": ["a"]}


def test_flat_folder_has_no_label(tmp_path: Path) -> None:
    source = opened(tree(tmp_path, "b.jpg", "a.jpg"))
    assert ids(source) == ["a.jpg", "b.jpg"] and source.fields == []


def test_label_none_takes_every_image_of_a_mixed_tree(tmp_path: Path) -> None:
    root = tree(tmp_path, "loose.jpg", "a/1.jpg")
    assert ids(opened(root, label_from="none")) == ["loose.jpg", "a/1.jpg"]


@pytest.mark.parametrize(
    ("names", "options", "words"),
    [
        (["loose.jpg", "a/1.jpg"], {}, "beside them"),
        (["a.jpg"], {"label_from": "parent"}, "no class folders"),
        (["train/a.jpg", "test/b.jpg"], {}, "splits"),
        ([], {}, "holds no image"),
    ],
)
def test_wrong_shapes_are_refused(
    tmp_path: Path, names: list[str], options: dict[str, str], words: str
) -> None:
    with pytest.raises(DataError, match=words):
        opened(tree(tmp_path, *names), **options)


def test_empty_class_folder_is_refused_unless_it_is_named(tmp_path: Path) -> None:
    root = tree(tmp_path, "a/1.jpg")
    (root / "b").mkdir()
    with pytest.raises(DataError, match="class folder 'b'"):
        opened(root)
    assert opened(root, classes=("a", "b")).classes == {"label": ["a", "b"]}


def test_given_classes_fix_the_order_and_an_unknown_one_names_label_and_sample(tmp_path: Path) -> None:
    root = tree(tmp_path, "cat/1.jpg", "dog/1.jpg")
    source = opened(root, classes=("dog", "cat"))
    assert labels(source) == ["cat", "dog"] and source.classes["label"] == ["dog", "cat"]
    source = opened(root, classes=("dog",))
    assert "unknown label 'cat'" in source.sample(0).error and source.sample(1).error is None  # type: ignore[operator]


def test_regex_gives_class_group_and_more(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        "000012_female_Asian_45/mask1.jpg",
        "000012_female_Asian_45/normal.jpg",
        "000003_male_Asian_9/mask2.jpg",
    )
    pattern = r"regex:(?P<group>\d+)_(?P<gender>\w+?)_\w+_(?P<age>\d+)/(?P<label>[a-z]+)"
    source = opened(root, label_from=pattern)
    assert source.classes == {
        "group": ["000003", "000012"],
        "gender": ["female", "male"],
        "age": ["9", "45"],
        "label": ["mask", "normal"],
    }
    values = [source.sample(i).values for i in range(3)]
    assert [source.classes["group"][v["group"]] for v in values] == ["000003", "000012", "000012"]
    assert [source.classes["label"][v["label"]] for v in values] == ["mask", "mask", "normal"]
    assert [source.classes["age"][v["age"]] for v in values] == ["9", "45", "45"]


def test_regex_that_does_not_match_is_an_error_of_that_sample(tmp_path: Path) -> None:
    source = opened(tree(tmp_path, "a1.jpg", "b.jpg"), label_from=r"regex:(?P<label>[a-z])\d")
    assert source.sample(0).error is None
    assert "'b.jpg'" in source.sample(1).error  # type: ignore[operator]


@pytest.mark.parametrize("bad", ["regex:(", "regex:abc", "regex:", "folder", "column:", "none:x"])
def test_label_from_is_checked_when_made(bad: str) -> None:
    with pytest.raises(UsageError):
        SourceOptions(label_from=bad)


def test_links_that_lead_back_end(tmp_path: Path) -> None:
    root = tree(tmp_path, "a/1.jpg")
    (root / "a" / "again").symlink_to(root / "a", target_is_directory=True)
    (root / "a" / "broken.jpg").symlink_to(root / "nowhere")
    source = opened(root)
    assert ids(source) == ["a/1.jpg", "a/broken.jpg"]
    with pytest.raises(DataError, match="cannot be read"):
        source.sample(1).load()


def test_links_to_other_folders_stand_for_their_images(tmp_path: Path) -> None:
    shared = tree(tmp_path / "shared", "x.jpg")
    root = tree(tmp_path / "root", "a/1.jpg", "b/1.jpg")
    (root / "a" / "all").symlink_to(root, target_is_directory=True)
    for place in ("a/more", "b/more", "c"):
        (root / place).symlink_to(shared, target_is_directory=True)
    source = opened(root)
    assert ids(source) == ["a/1.jpg", "a/more/x.jpg", "b/1.jpg", "b/more/x.jpg", "c/x.jpg"]
    assert labels(source) == ["a", "a", "b", "b", "c"]


def test_a_name_that_is_not_utf8_has_a_storable_id(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    try:
        with open(bytes(folder) + b"/\xff.jpg", "wb") as file:
            file.write(jpeg())
    except OSError:  # file systems that take UTF-8 only
        (folder / "\\xff.jpg").write_bytes(jpeg())
    sample = opened(tmp_path).sample(0)
    assert sample.id == "a/\\xff.jpg" and sample.id.encode() and sample.load() == jpeg()


def table(path: Path, header: list[str], *rows: list[object], delimiter: str = ",") -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(header)
        writer.writerows(rows)
    return path


def test_csv_types_labels_and_titles(tmp_path: Path) -> None:
    tree(tmp_path, "i/1.jpg", "i/2.jpg", "i/3.jpg")
    path = table(
        tmp_path / "t.csv",
        [
            "n",
            "img",
            "species",
            "weight",
            "note",
            "a very long column name",
            "a very long column title",
            "code",
        ],
        [1, "i/1.jpg", "cat", "1.5", "x", 7, 8, "007"],
        [-2, "i/2.jpg", "dog", "", "ü", 7, 8, "1"],
        [3, "i/3.jpg", "cat", "nan", "", 7, 9, "2"],
    )
    source = opened(path, labels=("species",))
    kinds = {field.name: field.kind for field in source.fields}
    assert kinds == {
        "label": "int",
        "n": "int",
        "weight": "float",
        "note": "bytes",
        "a_very_long_colu": "int",
        "a_very_long_co_2": "int",
        "code": "bytes",  # leading zeros would be lost in a number
    }
    assert (
        source.titles["a_very_long_co_2"] == "a very long column title"
        and source.titles["label"] == "species"
    )
    assert labels(source) == ["cat", "dog", "cat"]
    second = source.sample(1)
    assert (second.id, second.source, second.values["n"], second.values["note"]) == (
        "i/2.jpg",
        "i/2.jpg",
        -2,
        "ü".encode(),
    )
    assert math.isnan(second.values["weight"]) and second.load() == jpeg()


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_csv_delimiters_and_root(tmp_path: Path, delimiter: str) -> None:
    tree(tmp_path / "photos", "1.jpg")
    path = table(tmp_path / "t.csv", ["file", "label"], ["1.jpg", 4], delimiter=delimiter)
    source = opened(path, root=str(tmp_path / "photos"))
    assert (
        source.sample(0).values == {"label": 4} and source.classes == {} and source.sample(0).load() == jpeg()
    )


def test_csv_path_column_is_the_one_that_leads_to_files(tmp_path: Path) -> None:
    tree(tmp_path, "1.jpg")
    path = table(tmp_path / "t.csv", ["image", "where"], ["nothing", "1.jpg"])
    assert opened(path).sample(0).source == "1.jpg"
    with pytest.raises(UsageError, match=r"unknown path column 'wher'.*'where'"):
        opened(path, path_column="wher")


def test_csv_absolute_paths_are_stored_relative(tmp_path: Path) -> None:
    tree(tmp_path, "deep/1.jpg")
    path = table(tmp_path / "t.csv", ["path"], [tmp_path / "deep" / "1.jpg"])
    sample = opened(path).sample(0)
    assert (sample.id, sample.source) == ("deep/1.jpg", "deep/1.jpg") and sample.load() == jpeg()


def test_csv_multi_label(tmp_path: Path) -> None:
    tree(tmp_path, "1.jpg", "2.jpg", "3.jpg")
    path = table(tmp_path / "t.csv", ["path", "tags"], ["1.jpg", "b|a"], ["2.jpg", ""], ["3.jpg", "a10"])
    source = opened(path, labels=("tags",), label_sep="|")
    assert source.classes == {"label": ["a", "a10", "b"]}
    assert [source.sample(i).values["label"].tolist() for i in range(3)] == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert source.sample(0).values["label"].dtype == np.float32
    strict = opened(path, labels=("tags",), label_sep="|", classes=("a", "b"))
    assert "unknown label 'a10'" in strict.sample(2).error  # type: ignore[operator]


def test_csv_integer_labels_with_class_names_are_positions(tmp_path: Path) -> None:
    tree(tmp_path, "1.jpg", "2.jpg")
    path = table(tmp_path / "t.csv", ["path", "label"], ["1.jpg", 1], ["2.jpg", 2])
    source = opened(path, classes=("zero", "one"))
    assert source.sample(0).values["label"] == 1 and source.sample(0).error is None
    assert "unknown label '2'" in source.sample(1).error  # type: ignore[operator]


def test_csv_regression_label_and_several_labels(tmp_path: Path) -> None:
    tree(tmp_path, "1.jpg", "2.jpg")
    path = table(tmp_path / "t.csv", ["path", "age", "sex"], ["1.jpg", 1.5, "f"], ["2.jpg", 2, "m"])
    source = opened(path, labels=("age", "sex"))
    assert source.sample(0).values == {"label": 1.5, "sex": 0} and source.classes == {"sex": ["f", "m"]}


@pytest.mark.parametrize(
    ("column", "kind"), [(["1", "", "3"], "int"), (["1.5", "", "3"], "float"), (["a", "", "b"], "int")]
)
def test_a_missing_label_does_not_change_the_kind_of_the_others(
    tmp_path: Path, column: list[str], kind: str
) -> None:
    tree(tmp_path, "1.jpg", "2.jpg", "3.jpg")
    path = table(
        tmp_path / "t.csv", ["path", "label"], *([f"{n + 1}.jpg", text] for n, text in enumerate(column))
    )
    source = opened(path)
    assert source.fields[0].kind == kind and ("label" in source.classes) == (column[0] == "a")
    assert "no label" in source.sample(1).error  # type: ignore[operator]
    if column[0] != "a":
        assert [source.sample(i).values["label"] for i in (0, 2)] == [float(column[0]), 3]


def test_csv_crop_boxes_make_several_samples_of_one_image(tmp_path: Path) -> None:
    tree(tmp_path, "1.jpg")
    header = ["path", "x0", "y0", "x1", "y1"]
    path = table(
        tmp_path / "t.csv", header, ["1.jpg", 0, 0, 4, 4], ["1.jpg", 1, 2, 5, 6.5], ["1.jpg", 1, 2, 5, ""]
    )
    source = opened(path, crop_box=("x0", "y0", "x1", "y1"))
    assert [source.sample(i).box for i in range(3)] == [(0, 0, 4, 4), (1, 2, 5, 6.5), None]
    assert len(set(ids(source))) == 3 and "box" in source.sample(2).error  # type: ignore[operator]


@pytest.mark.parametrize(
    ("text", "options", "kind", "words"),
    [
        ("", {}, DataError, "empty"),
        ("path,label\n", {}, DataError, "no rows"),
        ("path,path\n1.jpg,1.jpg\n", {}, DataError, "two columns"),
        ("path,label\n1.jpg,a\n1.jpg,b\n", {}, DataError, "duplicate id '1.jpg': line 2 and line 3"),
        (
            "path,label\n1.jpg,a\n",
            {"labels": ("lable",)},
            UsageError,
            "unknown label column 'lable'.*'label'",
        ),
        ("path,label\n1.jpg,a\n", {"id_column": "nr"}, UsageError, "unknown id column 'nr'"),
        (
            "path,label\n1.jpg,a\n",
            {"crop_box": ("a", "b", "c", "d")},
            UsageError,
            "unknown crop box column 'a'",
        ),
        ("a,b\nx,y\n", {}, UsageError, "no column of .* leads to files"),
        ("path,label\n1.jpg,a\n", {"shard_ids": True}, UsageError, "--shard-ids does not apply"),
        ('path,label\n1.jpg,"a\n2.jpg,b\n', {}, DataError, "check its quotes"),
        ("path,x\n1.jpg,a\n", {"classes": ("a",)}, UsageError, "needs labels"),
    ],
)
def test_csv_errors(
    tmp_path: Path, text: str, options: dict[str, object], kind: type[Exception], words: str
) -> None:
    tree(tmp_path, "1.jpg")
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(kind, match=words):
        opened(tmp_path / "t.csv", **options)


def test_csv_rows_of_wrong_length_and_empty_labels_are_errors_of_their_samples(tmp_path: Path) -> None:
    tree(tmp_path, "1.jpg", "2.jpg", "3.jpg")
    (tmp_path / "t.csv").write_text("path,label\n1.jpg,a\n2.jpg\n3.jpg,\n")
    source = opened(tmp_path / "t.csv")
    assert source.sample(0).error is None
    assert "line 3" in source.sample(1).error  # type: ignore[operator]
    assert "no label" in source.sample(2).error  # type: ignore[operator]


def test_csv_rows_without_a_path_are_errors_of_their_samples(tmp_path: Path) -> None:
    tree(tmp_path, "1.jpg", "2.jpg")
    (tmp_path / "t.csv").write_text("path,label\n1.jpg,a\n,\n \n2.jpg,b\n,\n")
    source = opened(tmp_path / "t.csv")
    assert ids(source) == ["1.jpg", "line 3", "line 4", "2.jpg", "line 6"]
    assert [source.sample(i).error is None for i in range(5)] == [True, False, False, True, False]
    assert "line 3 of t.csv names no image" in str(source.sample(1).error)


def test_csv_captions_are_no_paths(tmp_path: Path) -> None:
    tree(tmp_path, "1.jpg")
    (tmp_path / "t.csv").write_text("caption,pic\n" + "long " * 200 + ",1.jpg\nwith\0nul,2\0.jpg\n")
    try:
        source = opened(tmp_path / "t.csv")
    except DataError as error:  # Python 3.10's csv module refuses a NUL byte by itself
        assert "NUL" in str(error)
        return
    assert source.sample(0).load() == jpeg()
    with pytest.raises(DataError, match="cannot be read"):
        source.sample(1).load()


def test_csv_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes("path,näme\n".encode("latin-1"))
    with pytest.raises(DataError, match="UTF-8"):
        opened(tmp_path / "t.csv")


def test_a_missing_source_names_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(UsageError, match=r"photo does not exist; did you mean .*photos\?"):
        opened(tmp_path / "photo")
    with pytest.raises(UsageError, match="does not exist; check the name in"):
        opened(tmp_path / "no" / "such" / "folder")
    (tmp_path / "a.zip").write_bytes(b"PK")
    with pytest.raises(UsageError, match="unpack it first"):
        opened(tmp_path / "a.zip")
    with pytest.raises(UsageError, match="__len__ and __getitem__"):
        opened(iter([1]))


def test_fingerprint_sees_names_sizes_and_labels(tmp_path: Path) -> None:
    root = tree(tmp_path, "a/1.jpg", "b/1.jpg")
    seen = {opened(root).fingerprint(), opened(root, classes=("b", "a")).fingerprint()}
    assert opened(root).fingerprint() in seen and len(seen) == 2
    (root / "a" / "1.jpg").write_bytes(jpeg() + b"x")
    assert opened(root).fingerprint() not in seen


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1), unique=True))
def test_natural_order_is_total_and_orders_numbers(names: list[str]) -> None:
    backwards = names[::-1]
    assert sorted(names, key=natural_key) == sorted(backwards, key=natural_key)
    numbers = [f"x{n}y" for n in (10, 9, 100, 1)]
    assert sorted(numbers, key=natural_key) == ["x1y", "x9y", "x10y", "x100y"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(max_size=40), max_size=30))
def test_field_names_fit_the_format_and_differ(titles: list[str]) -> None:
    names = field_names(titles)
    assert len(names) == len(titles) == len(set(names))
    assert all(0 < len(n) <= 16 and n.isascii() and n.isidentifier() for n in names)
    assert not {"image", "label", "index", "count"} & set(names)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=8), max_size=20))
def test_packed_names_are_a_list(parts: list[bytes]) -> None:
    names = Names()
    for part in parts:
        names.append(part)
    assert [names[i] for i in range(len(names))] == parts == list(names)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.integers(-(10**17), 10**17).map(str),
            st.floats().map(repr),
            st.sampled_from(["", "x", " 3 ", "1_0"]),
        ),
        min_size=1,
    )
)
def test_columns_keep_every_value(texts: list[str]) -> None:
    names = Names()
    for text in texts:
        names.append(text.encode())
    column = typed("f", "f", names)
    for i, text in enumerate(texts):
        value = column.get(i)
        if column.field.kind == "bytes":
            assert value == text.encode()
        elif column.field.kind == "int":
            assert value == int(text)
        else:
            expected = float(text) if text.strip() else math.nan
            assert value == expected or (math.isnan(value) and math.isnan(expected))


def test_unique_check_survives_equal_hashes() -> None:
    class Same(str):
        __hash__ = lambda self: 7  # noqa: E731

    different = [Same("a"), Same("b"), Same("c")]
    check_unique(different.__getitem__, 3, str, "")
    with pytest.raises(DataError, match="duplicate id 'a': row 0 and row 2"):
        check_unique([Same("a"), Same("b"), Same("a")].__getitem__, 3, lambda i: f"row {i}", "cure")
