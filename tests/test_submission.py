"""Submission files against templates written by hand, each of a kind that a competition has used."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastload.errors import DataError, UsageError
from fastload.train.predictions import Predictions
from fastload.train.submission import check_sample, write_submission

CLASSES = ["cat", "dog", "emu"]
PROBS = np.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.2, 0.5, 0.3]], np.float32)
IDS = ["a", "b", "c"]


def answers(ids=IDS, probs=PROBS, classes=CLASSES, **options) -> Predictions:
    return Predictions(list(ids), np.asarray(probs, np.float32), list(classes), **options)


def fill(folder: Path, sample: str, predictions: Predictions | None = None, name: str = "sample.csv"):
    (folder / name).write_text(sample, encoding="utf-8")
    done = write_submission(predictions or answers(), folder / name, folder / "out.csv")
    return (folder / "out.csv").read_text(encoding="utf-8").splitlines(), done


def test_class_names_in_the_order_and_under_the_names_of_the_template(tmp_path):
    rows, done = fill(tmp_path, "Image Id,What is it?\nc,cat\na,cat\nb,cat\n")
    assert rows == ["Image Id,What is it?", "c,dog", "a,cat", "b,emu"]
    assert done.rows == 3 and done.unused == 0 and "class names" in done.note and "exactly" in done.note


def test_numbers_where_the_template_has_numbers(tmp_path):
    rows, done = fill(tmp_path, "id,label\na,0\nb,0\nc,0\n")
    assert rows[1:] == ["a,0", "b,2", "c,1"]
    assert "class numbers (0 is 'cat', 2 is 'emu')" in done.note


def test_classes_that_are_numbers_keep_their_names(tmp_path):
    """Folder names sort as text: class number 1 is called 10."""
    rows, done = fill(tmp_path, "id,label\na,2\nb,2\nc,2\n", answers(classes=["1", "10", "2"]))
    assert rows[1:] == ["a,1", "b,2", "c,10"] and "class names" in done.note
    rows, done = fill(tmp_path, "id,label\na,0\nb,0\nc,0\n", answers(classes=["001", "010", "002"]))
    assert rows[1:] == ["a,1", "b,2", "c,10"] and "class names as numbers" in done.note


def test_an_empty_or_strange_example_means_names(tmp_path):
    rows, done = fill(tmp_path, "id,label\na,\nb,\nc,\n")
    assert rows[1:] == ["a,cat", "b,emu", "c,dog"] and "class names" in done.note
    rows, done = fill(tmp_path, "id,label\na,?\nb,?\nc,?\n")
    assert rows[1:] == ["a,cat", "b,emu", "c,dog"] and "'?' of the template is none" in done.note


def test_a_column_for_each_class_is_matched_by_name(tmp_path):
    rows, done = fill(tmp_path, "id,emu,cat,dog\nb,0.33,0.33,0.33\na,0.33,0.33,0.33\nc,0,0,0\n")
    assert rows == ["id,emu,cat,dog", "b,0.6,0.1,0.3", "a,0.1,0.7,0.2", "c,0.3,0.2,0.5"]
    assert "a column of probabilities for each class" in done.note
    rows, done = fill(tmp_path, "id,0,1,2\nb,1,1,1\na,1,1,1\nc,1,1,1\n")
    assert rows[1] == "b,0.1,0.3,0.6" and "by class number" in done.note


def test_a_column_for_the_probability_of_one_of_two_classes(tmp_path):
    two = answers(probs=[[0.9, 0.1], [0.4, 0.6], [0.5, 0.5]], classes=["healthy", "ill"])
    rows, done = fill(tmp_path, "id,target\na,0.5\nb,0.5\nc,0.5\n", two)
    assert rows[1:] == ["a,0.1", "b,0.6", "c,0.5"] and "probability of 'ill'" in done.note
    rows, _ = fill(tmp_path, "id,healthy\na,0.5\nb,0.5\nc,0.5\n", two)
    assert rows[1:] == ["a,0.9", "b,0.4", "c,0.5"]
    rows, _ = fill(tmp_path, "id,target\na,0\nb,0\nc,1\n", two)  # whole numbers are classes
    assert rows[1:] == ["a,0", "b,1", "c,0"]


def test_several_labels_an_image(tmp_path):
    many = answers(probs=[[0.9, 0.1, 0.8], [0.1, 0.2, 0.3], [0.2, 0.6, 0.4]], multilabel=True)
    rows, _ = fill(tmp_path, "id,labels\na,cat emu\nb,dog\nc,cat\n", many)
    assert rows[1:] == ["a,cat emu", "b,", "c,dog"]
    rows, _ = fill(tmp_path, "id,labels\na,0 1\nb,0 1\nc,2\n", many)
    assert rows[1:] == ["a,0 2", "b,", "c,1"]
    rows, _ = fill(tmp_path, "id,cat,dog,emu\na,0,0,0\nb,0,0,0\nc,0,0,0\n", many)
    assert rows[1] == "a,0.9,0.1,0.8"


def test_decisions_by_thresholds_are_what_is_written(tmp_path):
    rows, _ = fill(tmp_path, "id,label\na,cat\nb,cat\nc,cat\n", answers(decided=np.array([2, 2, 0])))
    assert rows[1:] == ["a,emu", "b,emu", "c,cat"]


def test_ids_by_their_stem_where_they_do_not_match(tmp_path):
    many = answers(ids=["test/a.jpg", "test/b.jpg", "test/c.jpg"])
    rows, done = fill(tmp_path, "id,label\na,cat\nc.png,cat\n", many)
    assert rows[1:] == ["a,cat", "c.png,dog"] and done.unused == 1
    assert "without folder and extension" in done.note and "1 predictions not asked for" in done.note
    twice = answers(ids=["x/a.jpg", "y/a.jpg", "c"])
    with pytest.raises(DataError, match=r"several predictions have an id .* got 'a'"):
        fill(tmp_path, "id,label\na,cat\n", twice)
    rows, _ = fill(tmp_path, "id,label\nc,cat\n", twice)  # the ambiguous ones are not asked for
    assert rows[1:] == ["c,dog"]


def test_missing_ids_are_named_and_nothing_is_written(tmp_path):
    sample = "id,label\na,cat\n" + "".join(f"m{i},cat\n" for i in range(7))
    with pytest.raises(
        DataError, match=r"7 of 8 ids .* got 'm0', 'm1', 'm2', 'm3', 'm4' and more .*such as 'a'"
    ):
        fill(tmp_path, sample)
    assert not (tmp_path / "out.csv").exists()
    with pytest.raises(DataError, match="7 of 8"):
        check_sample(tmp_path / "sample.csv", IDS)


def test_columns_that_fit_no_template(tmp_path):
    with pytest.raises(DataError, match="unknown columns: 'cow', classes without a column: 'emu'"):
        fill(tmp_path, "id,cat,dog,cow\na,0,0,0\n")
    with pytest.raises(DataError, match="classes without a column: 'emu'"):
        fill(tmp_path, "id,cat,dog\na,0,0\n")
    with pytest.raises(DataError, match="no sample submission"):
        fill(tmp_path, "id,label\n")
    with pytest.raises(DataError, match="no sample submission"):
        fill(tmp_path, "id\na\n")
    with pytest.raises(UsageError, match="cannot read the sample submission: No such file"):
        write_submission(answers(), tmp_path / "nothing.csv", tmp_path / "out.csv")
    (tmp_path / "b.csv").write_bytes(b"id,label\n\xff\xfe,cat\n")
    with pytest.raises(UsageError, match="UTF-8"):
        write_submission(answers(), tmp_path / "b.csv", tmp_path / "out.csv")


def test_tabs_a_byte_order_mark_and_quotes(tmp_path):
    (tmp_path / "s.tsv").write_text("\ufeffid\tlabel\na\tcat\n", encoding="utf-8")
    write_submission(answers(), tmp_path / "s.tsv", tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text().splitlines() == ["id,label", "a,cat"]
    rows, _ = fill(tmp_path, 'id,label\n"a, b",cat\n', answers(ids=["a, b", "b", "c"]))
    assert rows[1] == '"a, b",cat'


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_every_row_is_the_prediction_of_its_id(tmp_path_factory, data):
    """Whatever the order of ids, classes and columns."""
    folder = tmp_path_factory.mktemp("s")
    ids = data.draw(
        st.lists(st.text("abcxyz-0123", min_size=1, max_size=6), min_size=1, max_size=8, unique=True)
    )
    classes = data.draw(st.permutations(CLASSES))
    probs = np.random.default_rng(len(ids)).dirichlet(np.ones(3), len(ids)).astype(np.float32)
    asked, columns = data.draw(st.permutations(ids)), data.draw(st.permutations(CLASSES))
    with open(folder / "s.csv", "w", newline="") as file:
        csv.writer(file).writerows([["id", *columns], *([id, 0, 0, 0] for id in asked)])
    write_submission(answers(ids, probs, classes), folder / "s.csv", folder / "out.csv")
    with open(folder / "out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == asked
    for row in rows:
        for name in classes:
            assert float(row[name]) == pytest.approx(
                probs[ids.index(row["id"]), classes.index(name)], rel=1e-5
            )
