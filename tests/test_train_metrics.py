"""Metrics against scikit-learn, and the bootstrap against what it claims."""

from __future__ import annotations

import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from fastload.errors import DataError, UsageError
from fastload.train import metrics
from fastload.train.config import Config

SLOW_MACHINE = settings(max_examples=60, deadline=None)  # a busy core is no reason to fail


@pytest.fixture(autouse=True)
def no_own_metrics(monkeypatch):
    monkeypatch.setattr(metrics, "_USER", {})


def made(classes, n, seed, ties=False):
    """Labels and float32 probabilities; with ``ties`` few distinct values."""
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.ones(classes), n)
    if ties:
        probs = rng.integers(1, 4, (n, classes)).astype(np.float64)
        probs /= 16
    return rng.integers(0, classes, n), probs


def macro(fn, labels, probs):
    """``fn(has the class, probability)``, mean over the classes that some images have and some have not."""
    several = labels.ndim == 2
    columns = [labels[:, k] > 0.5 if several else labels == k for k in range(probs.shape[1])]
    values = [fn(has, probs[:, k]) for k, has in enumerate(columns) if 0 < has.sum() < len(has)]
    return np.mean(values) if values else np.nan


# --- one label an image


@SLOW_MACHINE
@given(st.integers(2, 8), st.integers(1, 60), st.integers(0, 2**32 - 1), st.booleans(), st.booleans())
def test_every_metric_equals_scikit_learn(classes, n, seed, ties, own_decision):
    labels, probs = made(classes, n, seed, ties)
    decided = np.random.default_rng(seed + 1).integers(0, classes, n) if own_decision else None
    given_ = probs.argmax(1) if decided is None else decided
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = {
            "accuracy": sk.accuracy_score(labels, given_),
            "balanced_accuracy": sk.balanced_accuracy_score(labels, given_),
            "macro_f1": sk.f1_score(labels, given_, average="macro"),
            "micro_f1": sk.f1_score(labels, given_, average="micro"),
            "weighted_f1": sk.f1_score(labels, given_, average="weighted"),
            "kappa": sk.cohen_kappa_score(labels, given_),
            "auroc": macro(sk.roc_auc_score, labels, probs),
            "average_precision": macro(sk.average_precision_score, labels, probs),
            # scikit-learn wants rows that sum to 1
            "log_loss": -np.log(probs[np.arange(n), labels]).mean()
            if ties
            else sk.log_loss(labels, probs, labels=np.arange(classes)),
        }
        quadratic = sk.cohen_kappa_score(labels, given_, weights="quadratic", labels=np.arange(classes))
    got = metrics.summary(labels, probs, decided)
    assert set(got) - {"top5"} == set(expected) and ("top5" in got) == (classes > 5)
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, abs=1e-9, nan_ok=True), name
        assert metrics.score(name, labels, probs, decided) == got[name] or np.isnan(value)
    assert metrics.score("quadratic_kappa", labels, probs, decided) == pytest.approx(
        quadratic, abs=1e-9, nan_ok=True
    )
    assert metrics.score("loss", labels, probs) == got["log_loss"]
    table = metrics.confusion(labels, given_, classes)
    assert table.dtype == np.int64
    assert (table == sk.confusion_matrix(labels, given_, labels=np.arange(classes))).all()


def test_top5_equals_scikit_learn_and_ties_go_to_the_lower_class():
    labels, probs = made(9, 300, 1)
    assert metrics.score("top5", labels, probs) == sk.top_k_accuracy_score(
        labels, probs, k=5, labels=range(9)
    )
    flat = np.full((9, 9), 1 / 9)
    assert metrics.score("top5", np.arange(5), flat[:5]) == 1
    assert metrics.score("top5", np.arange(5, 9), flat[:4]) == 0
    assert metrics.score("top5", np.arange(3), np.full((3, 3), 1 / 3)) == 1


def test_classes_that_no_image_has_are_left_out_of_the_means():
    labels = np.array([0, 0, 1, 1])
    probs = np.array([[0.8, 0.1, 0.1], [0.4, 0.5, 0.1], [0.3, 0.6, 0.1], [0.2, 0.7, 0.1]])
    assert metrics.score("auroc", labels, probs) == 1
    assert metrics.score("average_precision", labels, probs) == 1
    assert metrics.score("macro_f1", labels, probs) == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert metrics.score("balanced_accuracy", labels, probs) == 0.75


def test_one_class_has_no_auroc_and_nothing_has_no_score():
    labels, probs = np.zeros(4, np.int64), np.array([[0.9, 0.1]] * 4)
    assert np.isnan(metrics.score("auroc", labels, probs)) and np.isnan(metrics.score("kappa", labels, probs))
    assert metrics.score("accuracy", labels, probs) == metrics.score("macro_f1", labels, probs) == 1
    assert metrics.score("accuracy", labels, np.ones((4, 1))) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for several in (np.zeros(0, np.int64), np.zeros((0, 3), np.float32)):
            empty = metrics.summary(several, np.zeros((0, 3), np.float32))
            assert all(np.isnan(value) for value in empty.values())


def test_log_loss_of_a_certain_mistake_is_finite():
    wrong = np.array([[0.0, 1.0]], dtype=np.float32)
    assert 80 < metrics.score("log_loss", np.array([0]), wrong) < 100
    assert 80 < metrics.score("log_loss", np.array([[1, 0]]), wrong) < 100


@pytest.mark.parametrize("several", [False, True])
def test_nan_probabilities_make_every_score_nan_and_are_never_better(several):
    labels, probs = made(7, 20, 0)
    labels = np.eye(7)[labels] if several else labels
    probs[3, 2] = np.nan
    assert all(np.isnan(value) for value in metrics.summary(labels, probs).values())
    decided = np.zeros_like(labels, dtype=bool if several else np.int64)
    known = metrics.summary(labels, probs, decided)  # a decision that was made can be scored
    assert {name for name, value in known.items() if np.isnan(value)} == {
        "log_loss", "auroc", "average_precision", *(() if several else ("top5",)),
    }  # fmt: skip


def test_decisions_do_not_touch_metrics_of_probabilities():
    labels, probs = made(7, 50, 0)
    decided = np.roll(labels, 1)
    for name in ("log_loss", "auroc", "average_precision", "top5"):
        assert metrics.score(name, labels, probs, decided) == metrics.score(name, labels, probs)
    for name in ("accuracy", "macro_f1", "kappa", "quadratic_kappa"):
        assert metrics.score(name, labels, probs, decided) != metrics.score(name, labels, probs)


# --- several labels an image


@SLOW_MACHINE
@given(st.integers(1, 6), st.integers(1, 50), st.integers(0, 2**32 - 1), st.booleans())
def test_several_labels_equal_scikit_learn(classes, n, seed, ties):
    rng = np.random.default_rng(seed)
    labels = (rng.random((n, classes)) < rng.random(classes)).astype(np.float32)
    probs = rng.integers(1, 8, (n, classes)) / 8 if ties else rng.random((n, classes))
    given_ = probs > 0.5
    seen = [k for k in range(classes) if labels[:, k].any() or given_[:, k].any()]
    both = [k for k in range(classes) if 0 < labels[:, k].sum() < n]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kappas = [sk.cohen_kappa_score(labels[:, k], given_[:, k], labels=[0, 1]) for k in range(classes)]
        expected = {
            "accuracy": 1 - sk.hamming_loss(labels, given_),
            "balanced_accuracy": np.mean([sk.balanced_accuracy_score(labels[:, k], given_[:, k]) for k in both])
            if both
            else np.nan,
            "macro_f1": np.mean([sk.f1_score(labels[:, k], given_[:, k]) for k in seen]) if seen else np.nan,
            "micro_f1": sk.f1_score(labels.ravel(), given_.ravel()) if seen else np.nan,
            "weighted_f1": sk.f1_score(labels, given_, average="weighted") if labels.any() else np.nan,
            "kappa": np.nan if np.isnan(kappas).all() else np.nanmean(kappas),
            "log_loss": np.mean([sk.log_loss(labels[:, k], probs[:, k], labels=[0, 1]) for k in range(classes)]),
            "auroc": macro(sk.roc_auc_score, labels, probs),
            "average_precision": macro(sk.average_precision_score, labels, probs),
        }  # fmt: skip
    if classes == 1:  # scikit-learn takes a single column for one label an image
        expected["weighted_f1"] = expected["macro_f1"] if labels.any() else np.nan
    got = metrics.summary(labels, probs)
    assert set(got) == set(expected)
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, abs=1e-6, nan_ok=True), name


@pytest.mark.parametrize("name", ["top5", "quadratic_kappa"])
def test_what_has_no_meaning_for_several_labels_says_so(name):
    with pytest.raises(UsageError, match="several labels"):
        metrics.score(name, np.eye(7), np.eye(7))


# --- names, own metrics, wrong input


def test_unknown_metric_names_the_nearest():
    with pytest.raises(UsageError, match="macro_f1"):
        metrics.check_metric("marco_f1")
    with pytest.raises(UsageError, match="auroc"):
        metrics.score("auc", np.zeros(1, np.int64), np.ones((1, 1)))
    for name in (*metrics.NAMES, "loss"):
        metrics.check_metric(name)


def test_own_metric_and_callables():
    labels, probs = made(3, 40, 0)

    def brier(labels, probs):
        return float(((probs - np.eye(3)[labels]) ** 2).sum(axis=1).mean())

    with pytest.raises(UsageError):
        Config(metric="brier")
    metrics.register("brier", brier, higher_is_better=False)
    assert Config(metric="brier").metric == "brier"
    expected = np.mean([((p - (np.arange(3) == y)) ** 2).sum() for p, y in zip(probs, labels)])
    for metric in ("brier", brier):
        assert metrics.score(metric, labels, probs) == pytest.approx(expected)
        assert metrics.brief(labels, probs, metric)["brier"] == pytest.approx(expected)
        low, high = metrics.bootstrap(metric, labels, probs, draws=50)
        assert low < expected < high
    assert not metrics.higher_is_better("brier") and metrics.higher_is_better(brier)
    assert metrics.better("brier", 0.1, 0.2) and not metrics.better("brier", 0.2, 0.1)
    with pytest.raises(UsageError, match="another name"):
        metrics.register("accuracy", brier)


def test_better():
    nan = float("nan")
    assert metrics.better("accuracy", 0.2, 0.1) and not metrics.better("accuracy", 0.1, 0.1)
    assert metrics.better("log_loss", 0.1, 0.2) and not metrics.better("loss", 0.2, 0.1)
    assert metrics.better("accuracy", 0.0, None) and metrics.better("accuracy", 0.0, nan)
    assert not any(
        metrics.better(name, nan, old) for name in ("accuracy", "loss") for old in (None, 0.5, nan)
    )


def test_wrong_input_is_named():
    with pytest.raises(UsageError, match=r"\(3,\)"):
        metrics.score("accuracy", np.zeros(3, np.int64), np.ones((4, 2)))
    with pytest.raises(DataError, match="got 2"):
        metrics.score("accuracy", np.array([0, 2]), np.ones((2, 2)))
    with pytest.raises(DataError, match="got -1"):
        metrics.score("log_loss", np.array([0, -1]), np.ones((2, 2)))
    with pytest.raises(UsageError, match="decided"):
        metrics.score("accuracy", np.zeros(4, np.int64), np.ones((4, 2)), np.zeros(3))


def test_brief_is_a_part_of_the_summary_and_needs_no_scikit_learn():
    labels, probs = made(7, 50, 0)
    whole = metrics.summary(labels, probs)
    line = metrics.brief(labels, probs, "auroc")
    assert line == {
        "valid_loss": whole["log_loss"],
        **{k: whole[k] for k in ("accuracy", "macro_f1", "auroc")},
    }
    assert metrics.brief(labels, probs, "loss")["loss"] == whole["log_loss"]
    assert set(metrics.brief(labels, probs, "accuracy")) == {"valid_loss", "accuracy", "macro_f1"}
    code = (
        "import sys, numpy as np; from fastload.train import metrics; metrics.check_metric('kappa');"
        "[metrics.brief(np.arange(6), np.eye(6), m) for m in metrics.NAMES];"
        "print([m for m in ('sklearn', 'scipy', 'torch') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_per_class_equals_scikit_learn():
    labels, probs = made(4, 80, 2)
    labels[labels == 3] = 0  # a class without images
    probs[:, 2] = 0  # one that is never given
    rows = metrics.per_class(labels, probs, ["a", "b", "c", "d"])
    given_ = probs.argmax(1)
    expected = sk.precision_recall_fscore_support(labels, given_, labels=range(4), zero_division=np.nan)
    for k, row in enumerate(rows):
        assert row["name"] == "abcd"[k]
        for name, column in zip(("precision", "recall", "f1", "support"), expected):
            assert row[name] == pytest.approx(column[k], nan_ok=True), (k, name)
    assert [row["auroc"] for row in rows[:3]] == pytest.approx(
        [sk.roc_auc_score(labels == k, probs[:, k]) for k in range(3)]
    )
    assert np.isnan(rows[3]["auroc"]) and np.isnan(rows[2]["precision"]) and rows[2]["recall"] == 0
    hot = metrics.per_class(np.eye(4)[labels], probs, ["a", "b", "c", "d"], decided=np.eye(4)[given_] > 0)
    for one, other in zip(rows, hot):
        assert one == pytest.approx(other, nan_ok=True)


# --- bootstrap


@pytest.mark.parametrize("name", metrics.NAMES)
def test_counting_images_twice_is_the_same_as_having_them_twice(name):
    """What the bootstrap relies on, for every metric."""
    labels, probs = made(6, 40, 3, ties=True)
    w = np.random.default_rng(0).integers(0, 4, 40)
    rows = np.repeat(np.arange(40), w)
    for y in (labels, np.eye(6)[labels]):
        if y.ndim == 2 and name in ("top5", "quadratic_kappa"):
            continue
        got = metrics._weigher(name, y, probs, None)(w.astype(np.float64))
        assert got == pytest.approx(metrics.score(name, y[rows], probs[rows]))


def test_bootstrap_of_two_groups_by_hand():
    """One group all right, one all wrong: a draw is 0, 1/2 or 1, with a chance of 1/4, 1/2 and 1/4."""
    labels = np.array([0, 0, 1, 1])
    probs = np.eye(2)[[0, 0, 0, 0]]
    people = np.array(["ann", "ann", "bob", "bob"])
    assert metrics.bootstrap("accuracy", labels, probs, people) == (0, 1)
    assert metrics.bootstrap("accuracy", labels, probs, people, level=0.4) == (0.5, 0.5)
    assert metrics.bootstrap("accuracy", labels, probs, people, decided=labels) == (1, 1)
    rng = np.random.default_rng(0)
    for _ in range(20):
        w = metrics.resample(np.array([0, 0, 1, 1]), 4, rng)
        assert w[0] == w[1] and w[2] == w[3] and w.sum() == 4


def test_bootstrap_of_images_equals_scipy():
    from scipy.stats import binom

    labels = np.zeros(200, np.int64)
    probs = np.eye(2)[np.repeat([0, 1], [150, 50])]
    low, high = metrics.bootstrap("accuracy", labels, probs, draws=4000)
    assert [low, high] == pytest.approx(np.array(binom(200, 0.75).interval(0.95)) / 200, abs=0.006)


def test_interval_by_group_covers_the_truth_where_one_by_image_does_not():
    rng = np.random.default_rng(0)
    people = np.repeat(np.arange(40), 10)
    covered = np.zeros(2)
    for trial in range(100):
        right = np.repeat(rng.random(40) < 0.7, 10)  # a model knows a person or does not
        probs = np.eye(2)[np.where(right, 0, 1)]
        for i, groups in enumerate((people, None)):
            low, high = metrics.bootstrap(
                "accuracy", np.zeros(400, np.int64), probs, groups, draws=300, seed=trial
            )
            covered[i] += low <= 0.7 <= high
    assert covered[0] >= 87 and covered[1] < 60


def test_bootstrap_where_it_can_say_nothing():
    labels, probs = made(2, 6, 0)
    assert np.isnan(metrics.bootstrap("accuracy", labels, probs, groups=np.zeros(6))).all()
    assert np.isnan(metrics.bootstrap("accuracy", labels[:1], probs[:1])).all()
    assert np.isnan(metrics.bootstrap("auroc", np.zeros(6, np.int64), probs)).all()
    with pytest.raises(UsageError, match="level"):
        metrics.bootstrap("accuracy", labels, probs, level=95)


def test_bootstrap_is_repeatable_and_quick():
    labels, probs = made(18, 10_000, 0)
    start = time.process_time()
    first = metrics.bootstrap("macro_f1", labels, probs, groups=np.arange(10_000) // 7)
    assert time.process_time() - start < 4
    assert first == metrics.bootstrap("macro_f1", labels, probs, groups=np.arange(10_000) // 7)
    assert first != metrics.bootstrap("macro_f1", labels, probs, groups=np.arange(10_000) // 7, seed=1)
