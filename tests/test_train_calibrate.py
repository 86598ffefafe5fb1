"""Temperature, reliability and thresholds against scikit-learn, scipy, brute force and simulated truth."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, softmax
from sklearn.calibration import calibration_curve
from sklearn.metrics import f1_score, precision_recall_curve

from fastload.errors import DataError, UsageError
from fastload.train import calibrate, metrics
from fastload.train.calibrate import decide, fit_temperature, fit_thresholds, reliability, temper

SLOW_MACHINE = settings(max_examples=30, deadline=None)


def drawn(n=4000, classes=4, seed=0):
    """Logits, and labels drawn from exactly the probabilities that they mean."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (n, classes))
    labels = (softmax(logits, axis=1).cumsum(axis=1) < rng.random((n, 1))).sum(axis=1)
    return labels, logits


# --- temperature


@pytest.mark.parametrize("t", [0.4, 1.0, 3.0])
def test_temperature_of_known_overconfidence_is_found(t):
    labels, logits = drawn()
    said = softmax(logits * t, axis=1)
    assert fit_temperature(labels, said) == pytest.approx(t, rel=0.06)
    np.testing.assert_allclose(temper(said, t), softmax(logits, axis=1), atol=1e-6)
    rng = np.random.default_rng(1)
    hot = (rng.random(logits.shape) < expit(logits)).astype(np.float32)
    said = expit(logits * t)
    assert fit_temperature(hot, said) == pytest.approx(t, rel=0.06)
    np.testing.assert_allclose(temper(said, t, multilabel=True), expit(logits), atol=1e-5)


@SLOW_MACHINE
@given(st.integers(2, 5), st.integers(5, 60), st.integers(0, 2**32 - 1), st.booleans())
def test_no_other_temperature_is_better(classes, n, seed, several):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    probs = rng.dirichlet(np.ones(classes), n)
    if several:
        labels = (rng.random((n, classes)) < probs).astype(np.float32)

    def loss(t):
        return metrics.score("log_loss", labels, temper(probs, t, several).astype(np.float64))

    grid = np.geomspace(calibrate.COLDEST, calibrate.HOTTEST, 60)
    assert loss(fit_temperature(labels, probs)) <= min(map(loss, grid)) + 1e-5


def test_temperature_of_certain_probabilities():
    """Zeros and ones, all right or some wrong: still finite numbers, and no decision changes."""
    labels, probs = np.array([0, 1, 1]), np.eye(2, dtype=np.float32)[[0, 1, 1]]
    assert np.isfinite(temper(probs, fit_temperature(labels, probs))).all()
    wrong = 1 - probs
    t = fit_temperature(labels, wrong)
    assert t == pytest.approx(calibrate.HOTTEST, rel=1e-2)
    assert np.isfinite(temper(wrong, t)).all() and (temper(wrong, t).argmax(1) == wrong.argmax(1)).all()
    hot = temper(probs, 2.0, multilabel=True)
    assert ((hot > 0.5) == (probs > 0.5)).all()
    assert temper(probs, 1.0).dtype == np.float32


# --- reliability


@SLOW_MACHINE
@given(st.integers(1, 200), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_reliability_equals_scikit_learns_curve(n, bins, seed):
    rng = np.random.default_rng(seed)
    probs = rng.integers(0, 13, n) / 12  # some on the edges
    has = rng.integers(0, 2, n)
    has[:2] = [0, 1][: len(has[:2])]
    if n == 1:
        return
    true, said = calibration_curve(has, probs, n_bins=bins)
    got = reliability(has[:, None].astype(np.float32), probs[:, None], bins)
    some = got["count"] > 0
    np.testing.assert_allclose(got["accuracy"][some], true)
    np.testing.assert_allclose(got["confidence"][some], said)
    assert got["ece"] == pytest.approx((abs(true - said) * got["count"][some]).sum() / n)
    assert np.isnan(got["accuracy"][~some]).all() and len(got["edges"]) == bins + 1


def test_reliability_by_hand():
    probs = np.array([[0.9, 0.1], [0.9, 0.1], [0.3, 0.7], [0.4, 0.6]])
    got = reliability(np.array([0, 1, 1, 1]), probs, bins=2)
    assert got["count"].tolist() == [0, 4]
    assert got["ece"] == pytest.approx(abs(3 / 4 - (0.9 + 0.9 + 0.7 + 0.6) / 4))


def test_temperature_lowers_the_calibration_error():
    labels, logits = drawn()
    said = softmax(3 * logits, axis=1)
    better = temper(said, fit_temperature(labels[:2000], said[:2000]))
    assert reliability(labels[2000:], said[2000:])["ece"] > 0.1
    assert reliability(labels[2000:], better[2000:])["ece"] < 0.03
    assert metrics.score("log_loss", labels[2000:], better[2000:]) < metrics.score(
        "log_loss", labels[2000:], said[2000:]
    )


# --- thresholds


def test_factors_repair_a_wrong_prior():
    """A model that learned from balanced classes meets rare ones: on other images macro-F1 rises."""
    rng = np.random.default_rng(0)
    prior = np.array([0.9, 0.07, 0.03])
    labels = rng.choice(3, 6000, p=prior)
    logits = rng.normal(0, 1.2, (6000, 3)) + 1.8 * np.eye(3)[labels]
    balanced = softmax(1.5 * logits, axis=1)
    factors = fit_thresholds(labels[:3000], balanced[:3000])
    assert factors[0] > factors[2]
    test = slice(3000, None)
    plain = f1_score(labels[test], balanced[test].argmax(1), average="macro")
    fitted = f1_score(labels[test], decide(balanced[test], factors, False), average="macro")
    assert fitted > plain + 0.05


@SLOW_MACHINE
@given(st.integers(5, 40), st.integers(0, 2**32 - 1))
def test_two_classes_equal_brute_force(n, seed):
    rng = np.random.default_rng(seed)
    labels, probs = rng.integers(0, 2, n), rng.dirichlet([1, 1], n)
    got = f1_score(labels, decide(probs, fit_thresholds(labels, probs), False), average="macro")
    best = max(
        f1_score(labels, (probs * [1, f]).argmax(1), average="macro") for f in calibrate.FACTORS
    )  # fmt: skip
    assert got >= best - 1e-9


def test_three_classes_are_near_brute_force():
    labels, logits = drawn(150, 3, seed=5)
    probs = softmax(logits - [2, 0, 1], axis=1)
    got = metrics.score("macro_f1", labels, probs, decide(probs, fit_thresholds(labels, probs), False))
    all_factors = itertools.product(2.0 ** np.arange(-4, 4.5, 0.5), repeat=2)
    best = max(metrics.score("macro_f1", labels, probs, (probs * [1, *f]).argmax(1)) for f in all_factors)
    assert got > metrics.score("macro_f1", labels, probs) + 0.05 and got >= best - 0.02


@SLOW_MACHINE
@given(st.integers(2, 30), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_several_labels_get_the_best_f1_that_any_threshold_has(n, classes, seed):
    rng = np.random.default_rng(seed)
    labels = (rng.random((n, classes)) < 0.4).astype(np.float32)
    probs = rng.integers(1, 20, (n, classes)) / 20
    thresholds = fit_thresholds(labels, probs)
    for k in range(classes):
        if not labels[:, k].any():
            assert thresholds[k] == 0.5
            continue
        precision, recall, _ = precision_recall_curve(labels[:, k], probs[:, k])
        best = np.max(2 * precision * recall / np.maximum(precision + recall, 1e-9))
        assert f1_score(labels[:, k], probs[:, k] > thresholds[k]) == pytest.approx(best)


def test_other_metrics_and_no_gain():
    labels, logits = drawn(500)
    probs = softmax(logits, axis=1)
    for metric in ("accuracy", "balanced_accuracy", "quadratic_kappa"):
        decided = decide(probs, fit_thresholds(labels, probs, metric), False)
        assert metrics.score(metric, labels, probs, decided) >= metrics.score(metric, labels, probs)
    perfect = np.eye(4)[labels]
    assert (fit_thresholds(labels, perfect) == 1).all()
    assert (fit_thresholds(perfect, perfect) == 0.5).all()


def test_wrong_use_is_named():
    labels, probs = np.array([0, 1]), np.array([[0.5, 0.5], [np.nan, 0.5]])
    with pytest.raises(UsageError, match="did you mean 'macro_f1'"):
        fit_thresholds(labels, np.eye(2), "macro-f1")
    with pytest.raises(UsageError, match="does not look at"):
        fit_thresholds(labels, np.eye(2), "auroc")
    for fit in (fit_temperature, fit_thresholds, reliability):
        with pytest.raises(DataError, match="1 images with NaN"):
            fit(labels, probs)
        with pytest.raises(DataError, match="none"):
            fit(labels[:0], probs[:0])


def test_of_equally_good_thresholds_the_nearest_to_a_half_is_taken():
    """2/3 with one right of one, and with two right of four."""
    labels, probs = np.array([[1], [0], [0], [1]]), np.array([[0.45], [0.4], [0.35], [0.3]])
    assert fit_thresholds(labels, probs) == pytest.approx([0.425])


@SLOW_MACHINE
@given(st.integers(2, 5), st.integers(0, 2**32 - 1))
def test_what_is_tried_is_what_is_decided(classes, seed):
    rng = np.random.default_rng(seed)
    probs = rng.integers(0, 4, (30, classes)) / 4  # many ties
    factors = rng.choice([0.5, 1.0, 2.0], classes)
    for k in range(classes):
        for value, decided in calibrate._try_factor(np.zeros(30), probs, factors.copy(), k):
            changed = factors.copy()
            changed[k] = value
            assert (decided == decide(probs, changed, False)).all()
