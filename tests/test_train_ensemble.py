"""Ensembles of simulated members whose strength is known, and the honesty of their scores."""

from __future__ import annotations

import json
import sys
import types
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit, softmax
from scipy.stats import gmean, rankdata
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from fastload.errors import DataError, UsageError
from fastload.train import blend as module
from fastload.train import ensemble as ensembles
from fastload.train import metrics
from fastload.train.blend import METHODS, Blend, fit
from fastload.train.ensemble import Ensemble, Member, nested_folds
from fastload.train.predictions import Predictions


@pytest.fixture(autouse=True)
def one_thread():
    with threadpool_limits(1):  # as in search(): small products on a busy machine
        yield


def member(labels, strength, seed, classes=4, prefix="i", sharp=1.0, **more):
    """Predictions as good as ``strength``: 0 is pure noise. ``labels`` (N,), or (N, C) for several an image."""
    rng = np.random.default_rng(seed)
    several = labels.ndim == 2
    if several:
        probs = expit(sharp * (rng.normal(0, 1, labels.shape) + strength * (2 * labels - 1)))
    else:
        probs = softmax(
            sharp * (rng.normal(0, 1, (len(labels), classes)) + strength * np.eye(classes)[labels]), axis=1
        )
    count = labels.shape[1] if several else classes
    ids, names = [f"{prefix}{i}" for i in range(len(labels))], [f"c{k}" for k in range(count)]
    return Predictions(ids, probs.astype(np.float32), names, labels, multilabel=several, **more)


def truth(n, classes=4, seed=0, several=False):
    rng = np.random.default_rng(seed)
    return (rng.random((n, classes)) < 0.4).astype(np.float32) if several else rng.integers(0, classes, n)


def row(ensemble, name, thresholds=False):
    (found,) = [r for r in ensemble.table if r["name"] == name and r["thresholds"] == thresholds]
    return found


# --- each method against its formula


def equal(method, stack, several=False):
    return Blend(method, [1 / len(stack)] * len(stack)).mix(stack, several)


def test_means_equal_their_formulas():
    stack = np.stack([member(truth(50), 1, s).probs for s in range(3)])
    np.testing.assert_allclose(equal("soft", stack), stack.mean(axis=0), atol=1e-6)
    geometric = gmean(stack, axis=0)
    np.testing.assert_allclose(
        equal("geometric", stack), geometric / geometric.sum(1, keepdims=True), atol=1e-5
    )
    ranks = np.array([[rankdata(stack[m, :, k]) for k in range(4)] for m in range(3)]).mean(axis=0).T
    np.testing.assert_allclose(equal("rank", stack), ranks / ranks.sum(1, keepdims=True), atol=1e-5)
    for method in METHODS[1:5]:
        assert equal(method, stack).dtype == np.float32
        np.testing.assert_allclose(equal(method, stack).sum(axis=1), 1, atol=1e-5)


def test_means_of_several_labels():
    stack = np.stack([member(truth(50, several=True), 1, s).probs for s in range(3)])
    np.testing.assert_allclose(equal("soft", stack, True), stack.mean(axis=0), atol=1e-6)
    yes, no = gmean(stack, axis=0), gmean(1 - stack, axis=0)
    np.testing.assert_allclose(equal("geometric", stack, True), yes / (yes + no), atol=1e-5)
    votes = (stack > 0.5).sum(axis=0)
    assert ((equal("hard", stack, True) > 0.5) == (votes >= 2)).all()


def test_votes_count_and_equal_votes_are_decided_by_the_mean():
    stack = np.array([[[0.5, 0.4, 0.1]], [[0.4, 0.5, 0.1]], [[0.0, 0.05, 0.95]]], np.float32)
    votes = equal("hard", np.concatenate([stack[:2], stack[:1]]))
    assert votes.argmax() == 0 and votes == pytest.approx(np.array([[2 / 3, 1 / 3, 0]]), abs=1e-3)
    assert equal("hard", stack).argmax() == 2  # a vote each; the third is surest
    assert equal("hard", stack[:2, :, ::-1]).argmax() == 1  # equal in all: the lower number
    two = np.array([[[0.9]], [[0.2]]], np.float32)
    assert equal("hard", two, True) > 0.5 and not equal("hard", 1 - two, True) > 0.5


@pytest.mark.parametrize("classes", [2, 4])
def test_stacking_is_scikit_learns_regression(classes):
    labels = truth(120, classes)
    labels[labels == 3] = 2  # a class without images
    stack = np.stack([member(labels, 1, s, classes).probs for s in range(3)])
    got = fit("stacking", stack, labels, "accuracy").mix(stack, False)
    logs = np.log(stack) - np.log(stack).mean(axis=2, keepdims=True)
    x = np.concatenate(list(logs), axis=1)
    model = LogisticRegression(C=0.1, max_iter=2000, tol=1e-6).fit(x, labels)
    np.testing.assert_allclose(got[:, model.classes_], model.predict_proba(x), atol=5e-3)
    np.testing.assert_allclose(got.sum(axis=1), 1, atol=1e-5)
    one = fit("stacking", stack, np.zeros(120, np.int64), "accuracy").mix(stack, False)
    assert (one[:, 0] == 1).all()


def test_stacking_of_several_labels_is_a_regression_for_each_class():
    labels = truth(120, 3, several=True)
    labels[:, 1] = 0
    stack = np.stack([member(labels, 1, s).probs for s in range(3)])
    got = fit("stacking", stack, labels, "accuracy").mix(stack, True)
    for k in (0, 2):
        x = np.log(stack[:, :, k] / (1 - stack[:, :, k])).T
        model = LogisticRegression(C=0.1, max_iter=2000, tol=1e-6).fit(x, labels[:, k])
        np.testing.assert_allclose(got[:, k], model.predict_proba(x)[:, 1], atol=5e-3)
    assert (got[:, 1] < 1e-3).all()


# --- members of known strength


def test_members_with_different_errors_are_better_together():
    labels = truth(600)
    ensemble = Ensemble([member(labels, 1.2, s) for s in range(3)]).search("macro_f1")
    alone = max(r["score"] for r in ensemble.table if r["kind"] == "member")
    for name in ("soft", "geometric", "weighted", "bagged", "stacking"):
        assert row(ensemble, name)["score"] > alone + 0.05, name
    assert ensemble.method != "best" and ensemble.score > alone + 0.05


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("method", ["weighted", "bagged", "stacking"])
def test_a_member_of_pure_noise_is_ignored(method, several):
    labels = truth(500, several=several)
    parts = [member(labels, 1.5, 0), member(labels, 1.5, 1), member(labels, 0, 2, sharp=3)]
    ensemble = Ensemble(parts).search("accuracy", methods=(method, "soft"))
    assert row(ensemble, method)["score"] > row(ensemble, "soft")["score"] + 0.02
    if ensemble.weights is not None:
        assert ensemble.method == method and ensemble.weights.sum() == pytest.approx(1)
        assert ensemble.weights[2] < 0.12 and ensemble.weights[:2].min() > 0.25


def test_weights_begin_at_the_most_likely_mixture():
    """Where every decision is right with equal weights too, the noise still gets none; for log loss it is the optimum."""
    labels = truth(200)
    stack = np.stack([member(labels, 5, 0).probs, member(labels, 0, 1, sharp=0.3).probs])
    assert metrics.score("accuracy", labels, stack.mean(axis=0)) == 1
    weights = np.array(fit("weighted", stack, labels, "accuracy").weights)
    assert weights[1] < 0.05 and weights.sum() == pytest.approx(1)
    stack = np.stack([member(labels, s, i).probs for i, s in enumerate((1.5, 1.0, 0.0))])

    def loss(free):
        w = np.exp([*free, 0]) / np.exp([*free, 0]).sum()
        return metrics.score("log_loss", labels, np.tensordot(w, stack, 1))

    best = minimize(loss, [0, 0], method="Nelder-Mead").fun
    blend = fit("weighted", stack, labels, "log_loss")
    assert metrics.score("log_loss", labels, blend.mix(stack, False)) == pytest.approx(best, abs=1e-4)


def test_fitting_to_noise_is_not_believed(monkeypatch):
    """200 members that know nothing, 100 images: what is fitted looks good where it was fitted, and nowhere else."""
    monkeypatch.setattr(module, "BAGS", 3)  # quicker
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1], 50))
    parts = [member(labels, 0, seed, classes=2) for seed in range(200)]
    stack = np.stack([part.probs for part in parts])
    methods = ("best", "weighted", "bagged", "stacking")
    for method in methods:
        believed = metrics.score("accuracy", labels, fit(method, stack, labels, "accuracy").mix(stack, False))
        assert believed > 0.62 if method == "best" else believed > 0.7, method
    ensemble = Ensemble(parts).search("accuracy", methods=methods)
    chance = 0.5 + 3 * 0.05  # three standard deviations of 100 tosses
    for method in methods:
        assert row(ensemble, method)["score"] < chance, method
    # The best of 200 is too good in the table, as the module says; the nested score of the whole procedure is not.
    assert max(r["score"] for r in ensemble.table) > 0.6
    assert ensemble.score < chance


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("metric", ["macro_f1", "log_loss", "auroc"])
def test_never_worse_than_the_best_member(metric, several):
    for seed in range(2):
        labels = truth(60, 3, seed, several)
        parts = [member(labels, s, 10 * seed + i, classes=3) for i, s in enumerate((2.5, 0.3, 0.1))]
        ensemble = Ensemble(parts).search(metric)
        (chosen,) = [r for r in ensemble.table if r["chosen"]]
        for part in parts:
            assert not metrics.better(metric, part.score(metric), chosen["score"])
        assert ensemble.oof.score(metric) == pytest.approx(chosen["score"])
        for r, part in zip(ensemble.table, parts):
            assert r["score"] == pytest.approx(part.score(metric))  # a member alone is fitted on nothing
        assert [r["name"] for r in ensemble.table[3:]] == list(METHODS)


def test_of_equal_scores_the_simplest_is_taken():
    same = member(truth(60), 1, 0)
    ensemble = Ensemble([same, same, same]).search(
        "accuracy", methods=[m for m in METHODS if m not in ("rank", "stacking")]
    )
    assert ensemble.method == "best" and ensemble.weights.tolist() == [1, 0, 0]
    assert row(ensemble, "member 1")["chosen"]
    assert Ensemble([same, same]).search("accuracy", methods=("bagged", "hard", "soft")).method == "soft"


# --- nesting


@pytest.mark.parametrize("several", [False, True])
def test_labels_of_a_fold_have_no_part_in_its_predictions_or_in_the_choice_for_it(several):
    labels, folds = truth(100, several=several), np.arange(100) % 5
    lied = labels.copy()
    lied[folds == 2] = 1 - lied[folds == 2] if several else 3 - lied[folds == 2]
    made = []
    for true in (labels, lied):
        parts = [replace(member(labels, 1, s), labels=true, folds=folds) for s in range(3)]
        ensemble = Ensemble(parts)
        trial = ensembles._Nested(ensemble, "macro_f1", True, nested_folds(ensemble.base, 0))
        candidates = [(name, flag) for name in METHODS for flag in (False, True)]
        others = frozenset({0, 1, 3, 4})
        made.append((
            [trial.predictions({2: c}, frozenset()) for c in candidates],
            [trial.score(c, others, frozenset({2})) for c in candidates],
            [trial.score(c, others, frozenset()) for c in candidates],
        ))  # fmt: skip
    for one, other in zip(made[0][0], made[1][0]):
        assert (
            (one.probs == other.probs).all() and (one.predicted == other.predicted).all() and len(one) == 20
        )
    assert made[0][1] == made[1][1]
    assert (
        made[0][2] != made[1][2]
    )  # the same question without leaving the fold out would have an answer that knows


def test_search_asks_for_the_choice_without_the_fold_that_it_is_scored_on(monkeypatch):
    asked = []
    choose = ensembles._Nested.choose

    def spy(self, candidates, folds, without):
        asked.append((set(folds), set(without)))
        return choose(self, candidates, folds, without)

    monkeypatch.setattr(ensembles._Nested, "choose", spy)
    Ensemble([member(truth(60), 1, s, folds=np.arange(60) % 4) for s in range(2)]).search("accuracy")
    assert asked == [({0, 1, 2, 3}, set()), *(({0, 1, 2, 3} - {k}, {k}) for k in range(4))]


def test_bootstrap_samples_of_bagging_are_of_whole_groups_of_the_rows_it_may_see(monkeypatch):
    seen = []
    resample = metrics.resample
    monkeypatch.setattr(metrics, "resample", lambda *args: seen.append(args[:2]) or resample(*args))
    people = (np.arange(60) // 3).astype(str)
    Ensemble([member(truth(60), 1, s, groups=people) for s in range(2)]).search(
        "accuracy", methods=("bagged",)
    )
    sizes = {images for _, images in seen}
    assert min(sizes) < 48 <= max(s for s in sizes if s < 60)
    for numbers, images in seen:
        assert np.bincount(numbers).tolist() == [3] * (images // 3)


def test_groups_stay_together_then_folds_then_labels():
    labels = truth(200)
    people = np.random.default_rng(1).integers(0, 40, 200).astype(str)
    part = member(labels, 1, 0)
    for given in (replace(part, groups=people, folds=np.arange(200) % 4), replace(part, groups=people)):
        found = nested_folds(given, 0)
        assert set(found) == set(range(5)) and all(len(set(found[people == p])) == 1 for p in set(people))
        assert (found == nested_folds(given, 0)).all() and (found != nested_folds(given, 1)).any()
    assert nested_folds(replace(part, folds=np.arange(200) % 4 + 7), 0).tolist() == [
        i % 4 for i in range(200)
    ]
    assert set(nested_folds(replace(part, folds=np.arange(200) % 12), 0)) == set(range(5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for given in (part, replace(part, folds=np.zeros(200, np.int64))):  # a hold-out has no folds
            found = nested_folds(given, 0)
            counts = np.array([np.bincount(labels[found == k]) for k in range(5)])
            assert (counts.max(axis=0) - counts.min(axis=0) <= 1).all()
        hot = np.eye(4)[labels]
        for given in (replace(part, labels=hot, multilabel=True), replace(part, labels=hot, groups=people)):
            assert set(nested_folds(given, 0)) == set(range(5))
        few = member(np.array([0, 0, 1, 1, 2]), 1, 0)
        assert set(nested_folds(few, 0)) == set(range(5))
    three = np.repeat(["a", "b", "c"], [150, 40, 10])
    assert set(nested_folds(replace(part, groups=three), 0)) == {0, 1, 2}
    with pytest.raises(DataError, match="got 2"):
        nested_folds(replace(part, groups=np.repeat(["a", "b"], 100)), 0)
    with pytest.raises(DataError, match="got 2"):
        nested_folds(part.take([0, 1]), 0)


def test_groups_come_from_the_member_that_has_them():
    labels = truth(100)
    people = (np.arange(100) // 5).astype(str)
    ensemble = Ensemble([member(labels, 1, 0), member(labels, 1, 1, groups=people)])
    ensemble.search("accuracy", methods=("soft", "bagged"))
    assert (ensemble.oof.groups == people).all()


# --- temperature and thresholds


@pytest.mark.parametrize("several", [False, True])
def test_calibration_of_overconfident_members(several):
    labels = truth(400, several=several)
    parts = [member(labels, 1.0, s, sharp=9) for s in range(2)]
    raw = Ensemble(parts).search("log_loss", methods=("best",))
    cured = Ensemble(parts).search("log_loss", calibrate=True, methods=("best",))
    assert cured.blend.temperature > 2 and raw.blend.temperature is None
    assert cured.score < 0.6 * raw.score
    assert cured.oof.score("accuracy") == pytest.approx(raw.oof.score("accuracy"), abs=0.05)
    together = Ensemble(parts).search("log_loss", calibrate=True)  # of each blend, not of the members
    assert together.score < cured.score - 0.02


@pytest.mark.parametrize("several", [False, True])
def test_thresholds_are_used_where_they_help_others_than_those_they_were_fitted_on(several):
    rng = np.random.default_rng(0)
    if several:
        labels = (rng.random((600, 3)) < 0.15).astype(np.float32)
    else:
        labels = rng.choice(3, 900, p=[0.85, 0.1, 0.05])
    parts = [member(labels, 1.0, s, classes=3) for s in range(2)]
    ensemble = Ensemble(parts).search("macro_f1", thresholds=True, methods=("soft", "weighted"))
    assert row(ensemble, "soft", True)["score"] > row(ensemble, "soft")["score"] + 0.02
    assert ensemble.blend.thresholds is not None and ensemble.oof.decided is not None
    fresh = [replace(member(np.roll(labels, 7, 0), 1.0, 50 + s, classes=3)) for s in range(2)]
    together = ensemble.combine(fresh)
    assert (together.decided != replace(together, decided=None).predicted).any()
    assert together.score("macro_f1") > replace(together, decided=None).score("macro_f1") + 0.02
    assert abs(together.score("macro_f1") - ensemble.score) < 0.1
    with pytest.raises(UsageError, match="log_loss"):
        Ensemble(parts).search("log_loss", thresholds=True)


# --- what fits together


def test_rows_and_classes_are_aligned_by_name():
    labels = truth(80)
    a, b = member(labels, 1, 0), member(labels, 1, 1)
    order = np.random.default_rng(0).permutation(80)
    turned = b.aligned(b.ids, ["c2", "c0", "c3", "c1"]).take(order)
    plain, mixed = (Ensemble([a, other]).search("macro_f1", calibrate=True) for other in (b, turned))
    assert plain.table == mixed.table and plain.blend == mixed.blend and plain.score == mixed.score
    one, two = plain.combine([a, b]), plain.combine([turned, a])
    assert one.ids == a.ids and two.ids == turned.ids and one.classes == two.classes == a.classes
    assert (one.labels == labels).all() and (two.labels == labels[order]).all()
    back = plain.combine([turned.aligned(a.ids, a.classes), a])
    np.testing.assert_allclose(two.probs, back.probs[order], atol=1e-6)


def test_what_does_not_fit_is_named():
    labels = truth(40)
    a, b = member(labels, 1, 0), member(labels, 1, 1)
    for one, other, lacking in ((a, b.take(range(39)), 2), (a.take(range(39)), b, 1)):
        with pytest.raises(DataError, match=rf"'member {lacking}' lacks 1 of the 40.*'i39'"):
            Ensemble([one, other])
    with pytest.raises(DataError, match=r"labels.*another label of 'i3'"):
        Ensemble([a, replace(b, labels=np.where(np.arange(40) == 3, (labels + 1) % 4, labels))])
    with pytest.raises(DataError, match="labels"):
        Ensemble([a, replace(b, labels=np.eye(4)[labels])])
    with pytest.raises(DataError, match=r"'member 2'.*c9"):
        Ensemble([a, replace(b, classes=["c0", "c1", "c2", "c9"])])
    with pytest.raises(DataError, match=r"'member 2'.*more than once"):
        Ensemble([a, b.take([*range(40), 0])])
    probs = b.probs.copy()
    probs[3] = np.nan
    with pytest.raises(DataError, match=r"'member 2'.*got 1"):
        Ensemble([a, replace(b, probs=probs)])
    with pytest.raises(UsageError, match="no member has labels"):
        Ensemble([replace(a, labels=None)])
    for wrong in ([], "runs/a", a):
        with pytest.raises(UsageError, match="list of members"):
            Ensemble(wrong)
    with pytest.raises(UsageError, match="got 3"):
        Ensemble([a, 3])
    ensemble = Ensemble([a, b])
    with pytest.raises(UsageError, match="search"):
        ensemble.combine([a, b])
    with pytest.raises(UsageError, match="stacking"):
        ensemble.search(methods=("staking",))
    with pytest.raises(UsageError, match="macro_f1"):
        ensemble.search("makro_f1")
    with pytest.raises(UsageError, match="at least one"):
        ensemble.search(methods=())
    ensemble.search(methods=("soft",))
    with pytest.raises(UsageError, match="got 1"):
        ensemble.combine([a])
    with pytest.raises(DataError, match="other classes"):
        ensemble.combine([replace(p, classes=list("abcd")) for p in (a, b)])


def test_files_of_other_programs(tmp_path):
    """CSVs of probabilities, and labels beside them."""
    labels = truth(60)
    parts = [member(labels, 1, s) for s in range(2)]
    for i, part in enumerate(parts):
        part.write_csv(tmp_path / f"{i}.csv")
    paths = [tmp_path / "0.csv", str(tmp_path / "1.csv")]
    with pytest.raises(UsageError, match="labels="):
        Ensemble(paths)
    lines = [f"{id},0,c{label}" for id, label in zip(parts[0].ids, labels)]
    (tmp_path / "folds.csv").write_text(
        "id,fold,label\n" + "\n".join(reversed([*lines, "other,0,c1"])) + "\n"
    )
    found = Ensemble(paths, labels=tmp_path / "folds.csv").search("accuracy")
    direct = Ensemble(parts).search("accuracy")
    assert [r["name"] for r in found.table[:2]] == ["0.csv", "1.csv"]
    assert [r["score"] for r in found.table] == pytest.approx([r["score"] for r in direct.table], abs=0.02)
    assert Ensemble(paths, labels=parts[0]).search("accuracy").score == found.score
    (tmp_path / "bad.csv").write_text("id,label\ni0,c7\n")
    with pytest.raises(DataError, match=r"'i0'.*'c7'"):
        Ensemble(paths, labels=tmp_path / "bad.csv")
    (tmp_path / "short.csv").write_text("id,label\ni0,c1\n")
    with pytest.raises(DataError, match="labels: 59 of 60"):
        Ensemble(paths, labels=tmp_path / "short.csv")
    (tmp_path / "head.csv").write_text("name,class\ni0,c1\n")
    with pytest.raises(DataError, match="'name, class'"):
        Ensemble(paths, labels=tmp_path / "head.csv")
    with pytest.raises(UsageError, match=r"none\.csv"):
        Ensemble(paths, labels=tmp_path / "none.csv")


def test_labels_of_several_from_a_file(tmp_path):
    labels = truth(40, 3, several=True)
    part = member(labels, 2, 0)
    part.write_csv(tmp_path / "p.csv")
    rows = [f"{id},{' '.join(f'c{k}' for k in np.flatnonzero(y))}" for id, y in zip(part.ids, labels)]
    (tmp_path / "l.csv").write_text("id,label\n" + "\n".join(rows) + "\n")
    ensemble = Ensemble([tmp_path / "p.csv"], labels=tmp_path / "l.csv")
    assert (ensemble.true == labels).all() and ensemble.several


def test_runs_and_folders_are_members(tmp_path):
    labels = truth(40)
    parts = [member(labels, 1, s) for s in range(3)]
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "c"]
    for folder, part in zip(folders, parts):
        folder.mkdir(parents=True)
        part.save(folder / "oof.npz")
    run = types.SimpleNamespace(folder=folders[2], oof=parts[2])
    ensemble = Ensemble([*folders[:2], run, parts[0], parts[0]]).search("accuracy", methods=("soft",))
    assert [m.name for m in ensemble.members] == [
        str(folders[0]),
        str(folders[1]),
        "c",
        "member 4",
        "member 5",
    ]
    again = Ensemble([folders[2], folders[2]])
    assert [m.name for m in again.members] == [f"{folders[2]} (1)", f"{folders[2]} (2)"]


# --- files, prediction, display


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_saved_and_loaded_it_combines_the_same(tmp_path, method, several):
    labels = truth(80, several=several)
    parts = [member(labels, 1, s) for s in range(3)]
    fresh = [member(labels, 1, 9 + s, prefix="t") for s in range(3)]
    ensemble = Ensemble(parts).search("macro_f1", calibrate=True, thresholds=True, methods=(method,))
    ensemble.save(tmp_path / "e.json")
    loaded = Ensemble.load(tmp_path / "e.json")
    one, two = ensemble.combine(fresh), loaded.combine(fresh)
    assert (one.probs == two.probs).all() and (one.predicted == two.predicted).all()
    assert (
        loaded.blend == ensemble.blend and loaded.table == ensemble.table and repr(loaded) == repr(ensemble)
    )
    assert loaded.method in (method, "best") and loaded.score == ensemble.score and loaded.oof is None
    assert ensemble.oof.multilabel == several and one.multilabel == several and one.ids == fresh[0].ids
    with pytest.raises(UsageError, match="from its members"):
        loaded.search()


def test_paths_are_relative_to_the_file(tmp_path, monkeypatch):
    labels = truth(30)
    for name in ("a", "b"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        member(labels, 1, 0).save(tmp_path / "runs" / name / "oof.npz")
    monkeypatch.chdir(tmp_path)
    Ensemble(["runs/a", tmp_path / "runs" / "b"]).search("accuracy", methods=("soft",)).save("out/e.json")
    written = json.loads(Path("out/e.json").read_text())
    assert [m["path"] for m in written["members"]] == ["../runs/a", "../runs/b"]
    monkeypatch.chdir("/")
    loaded = Ensemble.load(tmp_path / "out" / "e.json")
    assert [m.path for m in loaded.members] == [tmp_path / "runs" / "a", tmp_path / "runs" / "b"]


def test_damaged_files(tmp_path):
    for text in ("", "[]", "{}", '{"members": []}'):
        (tmp_path / "e.json").write_text(text)
        with pytest.raises(DataError, match=r"e\.json"):
            Ensemble.load(tmp_path / "e.json")
    with pytest.raises(UsageError, match=r"none\.json"):
        Ensemble.load(tmp_path / "none.json")


def test_predict_asks_every_member_that_counts(tmp_path, monkeypatch):
    labels = truth(30)
    asked = []

    def predict(run, data, **options):
        asked.append((run, data, options))
        return member(labels, 1, len(asked), prefix="t", seconds=1.0)

    monkeypatch.setitem(sys.modules, "fastload.train.predicting", types.SimpleNamespace(predict=predict))
    names = [tmp_path / name for name in "abc"]
    ensemble = Ensemble([Member(p.name, p, member(labels, 1, i)) for i, p in enumerate(names)])
    ensemble.blend = Blend("weighted", [0.75, 0.0, 0.25])
    got = ensemble.predict("test.beton", tta="hflip", out=tmp_path / "out.csv", batch_size=8)
    assert asked == [(p, "test.beton", {"tta": "hflip", "batch_size": 8}) for p in (names[0], names[2])]
    expected = 0.75 * member(labels, 1, 1).probs + 0.25 * member(labels, 1, 2).probs
    np.testing.assert_allclose(got.probs, expected, atol=1e-6)
    assert got.ids[0] == "t0" and got.seconds == 2
    np.testing.assert_allclose(Predictions.load(tmp_path / "out.csv").probs, expected, atol=1e-5)
    ensemble.members[2] = Member("c.csv", tmp_path / "c.csv", None)
    with pytest.raises(UsageError, match=r"combine\(\).*c\.csv"):
        ensemble.predict("test.beton")
    ensemble.members[1] = Member("m", None, None)  # of no weight: no matter
    ensemble.members[2] = Member("c", tmp_path / "c", None)
    assert len(ensemble.predict("test.beton")) == 30


def test_own_metric_and_display():
    labels = truth(60)

    def half(labels, probs):
        return float((probs.argmax(1) == labels).mean() / 2)

    ensemble = Ensemble([replace(member(labels, 1, 0)), member(labels, 1, 1)])
    assert repr(ensemble) == "Ensemble(2 members, not searched)" and "<table>" not in ensemble._repr_html_()
    ensemble.members[0] = replace(ensemble.members[0], name="<b>")
    assert ensemble.search(half) is ensemble
    assert 0.2 < ensemble.score < 0.5 and ensemble.metric == "half"
    page = ensemble._repr_html_()
    assert (
        "&lt;b&gt;" in page
        and "<b>" not in page
        and "chosen" in page
        and f"{ensemble.score:.4f}" in repr(ensemble)
    )
