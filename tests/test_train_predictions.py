"""Probabilities on their way through files and orders: nothing is lost, mixed up or taken for something else."""

from __future__ import annotations

import csv
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastload.errors import DataError, UsageError
from fastload.train.predictions import Predictions

NAMES = ["cat", "dog, large", "ünïcode"]


def made(count=5, several=False, seed=0, **more) -> Predictions:
    rng = np.random.default_rng(seed)
    probs = rng.random((count, 3)).astype(np.float32)
    labels = (rng.random((count, 3)) > 0.5).astype(np.float32) if several else rng.integers(0, 3, count)
    if not several:
        probs /= probs.sum(axis=1, keepdims=True)
    ids = [f'a/{i} "x",é.jpg' for i in range(count)]
    return Predictions(ids, probs, NAMES, labels, multilabel=several, **more)


@pytest.mark.parametrize("several", [False, True])
def test_npz_keeps_everything(tmp_path, several):
    groups, folds = np.array(["p1", "p2", "p1", "", "é"]), np.arange(5) % 2
    one = made(several=several, groups=groups, folds=folds)
    one.save(tmp_path / "p.npz")
    again = Predictions.load(tmp_path / "p.npz")
    assert again.ids == one.ids and again.classes == NAMES and again.multilabel == several
    for name in ("probs", "labels", "groups", "folds"):
        np.testing.assert_array_equal(getattr(again, name), getattr(one, name))
    assert again.decided is None


@pytest.mark.parametrize("several", [False, True])
def test_csv_is_read_by_its_columns(tmp_path, several):
    one = made(several=several)
    one.write_csv(tmp_path / "p.csv")
    with open(tmp_path / "p.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == one.ids and rows[0]["prediction"] == one.predicted_names()[0]
    again = Predictions.load(tmp_path / "p.csv")
    assert again.ids == one.ids and again.classes == NAMES and again.labels is None
    np.testing.assert_allclose(again.probs, one.probs, atol=1e-6)
    assert again.multilabel == several


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(0, 1000), st.booleans())
def test_aligning_moves_rows_and_columns_together(count, seed, several):
    one = made(count, several, seed)
    rng = np.random.default_rng(seed)
    rows, columns = rng.permutation(count), rng.permutation(3)
    ids, classes = [one.ids[i] for i in rows], [NAMES[c] for c in columns]
    turned = one.aligned(ids, classes)
    for i, id in enumerate(ids):
        at = one.ids.index(id)
        assert {c: turned.probs[i, k] for k, c in enumerate(classes)} == {
            c: one.probs[at, k] for k, c in enumerate(NAMES)
        }
    for metric in ("accuracy", "macro_f1"):
        assert turned.score(metric) == pytest.approx(one.score(metric))
    back = turned.aligned(one.ids, NAMES)
    np.testing.assert_array_equal(back.probs, one.probs)
    np.testing.assert_array_equal(back.true, one.true)


def test_what_decides_instead_of_the_largest_probability():
    one = made(4)
    other = made(4, decided=(one.probs.argmax(1) + 1) % 3)
    assert other.predicted.tolist() == ((one.probs.argmax(1) + 1) % 3).tolist()
    assert other.score("accuracy") == (other.true == other.predicted).mean()
    assert other.take([2, 0]).predicted.tolist() == other.predicted[[2, 0]].tolist()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda p: p.aligned([*p.ids, "nobody"], NAMES), DataError, "1 of 6 images have no prediction"),
        (lambda p: p.aligned(p.ids, [*NAMES[:2], "bird"]), DataError, "'bird', 'ünïcode'"),
        (
            lambda p: Predictions(["a", "a"], p.probs[:2], NAMES).aligned(["a"], NAMES),
            DataError,
            "more than once",
        ),
        (lambda p: Predictions(p.ids, p.probs[:2], NAMES), DataError, "one row for each of 5 ids"),
        (lambda p: Predictions(p.ids, p.probs, NAMES, p.true[:2]), DataError, "labels must have 5 rows"),
        (
            lambda p: Predictions(p.ids, p.probs, NAMES, note="a flat folder").score(),
            UsageError,
            "a flat folder",
        ),
    ],
)
def test_what_does_not_fit_together(call, error, words):
    with pytest.raises(error, match=re.escape(words)):
        call(made())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name,p_a\nx,1\n", "a column 'id' first"), ("id,a\nx,1\n", "'p_<class>'"), ("id,p_a,p_b\nx,1\n", "line 2"),
        ("id,p_a\nx,much\n", "line 2"), ("id,p_a,p_b\nx,1.5,-0.5\n", "no probabilities"), ("id,p_a\nx,nan\n", "no probabilities"),
    ],
)  # fmt: skip
def test_csv_files_that_are_none(tmp_path, text, words):
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(DataError, match=re.escape(words)):
        Predictions.load(tmp_path / "p.csv")


def test_other_files(tmp_path):
    with pytest.raises(UsageError, match="no predictions at"):
        Predictions.load(tmp_path / "none.npz")
    with pytest.raises(UsageError, match="finished run"):
        Predictions.load(tmp_path)
    (tmp_path / "bad.npz").write_bytes(b"PK no zip")
    with pytest.raises(DataError, match="no predictions of fastload"):
        Predictions.load(tmp_path / "bad.npz")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    with pytest.raises(DataError, match="no predictions of fastload"):
        Predictions.load(tmp_path / "other.npz")
