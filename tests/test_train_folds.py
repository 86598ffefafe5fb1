"""Splits: each scheme by its properties, files by what can be wrong with them, balance against scikit-learn."""

from __future__ import annotations

import csv
import itertools
import os
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import GroupKFold, KFold, StratifiedGroupKFold, StratifiedKFold

from fastload.errors import DataError, UsageError
from fastload.train.folds import SCHEMES, Folds, check_folds, make_folds

SLOW_MACHINE = settings(max_examples=60, deadline=None)  # a busy core is no reason to fail
MADE = tuple(name for name in SCHEMES if name != "given")


def names(count):
    return [f"class {c}" for c in range(count)]


def make(labels, classes=None, **options):
    """A split of images named by their position."""
    count = labels.shape[1] if labels.ndim == 2 else int(labels.max()) + 1
    return make_folds([f"image {i}" for i in range(len(labels))], labels, classes or names(count), **options)


def holdout(labels, fraction, seed, groups=None):
    return make(labels, scheme="holdout", fraction=fraction, seed=seed, groups=groups).sides(0)


def photos(rng, people, most, classes, by_person=False):
    """(groups, labels) of people with 1 to ``most`` photos each."""
    groups = np.repeat(np.arange(people), rng.integers(1, most + 1, people))
    return groups, rng.integers(0, classes, people)[groups] if by_person else rng.integers(
        0, classes, len(groups)
    )


def table(folds, labels):
    """(K, C) images of each class that each fold of the first repeat holds out."""
    row = folds.vector()
    hot = np.eye(labels.max() + 1)[labels] if labels.ndim == 1 else labels
    return np.stack([hot[row == k].sum(axis=0) for k in range(row.max() + 1)])


# --- all schemes


@SLOW_MACHINE
@given(
    st.sampled_from(MADE), st.integers(40, 90), st.integers(2, 4), st.integers(2, 4), st.integers(1, 3), st.booleans(), st.booleans(),
    st.integers(0, 10**6),
)  # fmt: skip
def test_every_image_is_held_out_once_in_each_repeat(
    scheme, people, classes, k, repeats, several, grouped, seed
):
    rng = np.random.default_rng(seed)
    groups, labels = photos(rng, people, 4, classes)
    if several:
        labels = (rng.random((len(groups), classes)) < 0.3).astype(np.float32)
    by_group = grouped or "group" in scheme
    options = {
        "scheme": scheme, "folds": k, "repeats": repeats, "seed": seed, "groups": groups if by_group else None,
    }  # fmt: skip
    folds = make(labels, **options)
    per_repeat = 1 if scheme == "holdout" else k
    assert folds.repeats == repeats and folds.count == repeats * per_repeat and len(folds) == len(labels)
    held = np.zeros((repeats, len(labels)), dtype=int)
    for fold in range(folds.count):
        train, valid = folds.sides(fold)
        assert sorted([*train, *valid]) == list(range(len(labels))) and len(train) and len(valid)
        assert (np.diff(train) > 0).all() and (np.diff(valid) > 0).all()
        held[fold // per_repeat, valid] += 1
        if "group" in scheme or (scheme in ("auto", "holdout") and by_group):
            assert not set(groups[train]) & set(groups[valid])
        if scheme not in ("kfold", "group"):  # no class loses its last image in training
            hot = labels if several else np.eye(classes)[labels]
            assert ((hot[train].sum(axis=0) > 0) | (hot.sum(axis=0) == 0)).all()
    assert ((held == 1) == (folds.folds >= 0)).all() and held.max() == 1
    if scheme in ("kfold", "group"):
        assert (held == 1).all()
    elif scheme != "holdout":  # only what alone has all images of a class may stay in training
        hot = labels if several else np.eye(classes)[labels].astype(int)
        unit = groups if by_group and scheme != "stratified" else np.arange(len(labels))
        owners = [set(unit[hot[:, c] > 0]) for c in range(classes)]
        alone = {next(iter(units)) for units in owners if len(units) == 1}
        if k > 2:
            assert {int(u) for u in unit[folds.vector() < 0]} <= alone
    again = make(labels, **options)
    assert (again.folds == folds.folds).all()
    assert (make(labels, **{**options, "seed": seed + 1}).folds != folds.folds).any()
    for a, b in itertools.pairwise(folds.folds):
        assert (np.where(a < 0, a, a + per_repeat) != b).any()


@SLOW_MACHINE
@given(st.sampled_from(MADE), st.booleans(), st.integers(0, 10**6))
def test_the_numbers_of_the_classes_do_not_matter(scheme, several, seed):
    rng = np.random.default_rng(seed)
    groups, labels = photos(rng, 30, 4, 4)
    if several:
        labels = (rng.random((len(groups), 4)) < 0.4).astype(np.float32)
    turn = rng.permutation(4)  # old number of each new one
    classes = np.array(names(4))
    turned = labels[:, turn] if several else np.argsort(turn)[labels]
    a = make(labels, list(classes), scheme=scheme, groups=groups, seed=seed)
    b = make(turned, list(classes[turn]), scheme=scheme, groups=groups, seed=seed)
    assert (a.folds == b.folds).all()
    assert several or a.labels == b.labels


# --- stratified


@SLOW_MACHINE
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(2, 7), st.integers(0, 10**6))
def test_stratified_counts_differ_by_at_most_one(counts, k, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    divisible = sum(count for count in counts if count > 1)
    if divisible < k:
        with pytest.raises(DataError, match=r"too few images|nothing can be held out"):
            make(labels, scheme="stratified", folds=k, seed=seed)
        return
    folds = make(labels, scheme="stratified", folds=k, seed=seed)
    got = table(folds, labels)
    assert (np.ptp(got, axis=0) <= 1).all() and np.ptp(got.sum(axis=1)) <= 1
    singles = np.array(counts) == 1
    assert (got.sum(axis=0) == np.where(singles, 0, counts)).all()
    if min(counts) >= k:  # where scikit-learn promises something, ours is the same
        theirs = [len(valid) for _, valid in StratifiedKFold(k).split(labels, labels)]
        assert sorted(theirs) == sorted(got.sum(axis=1))


def test_kfold_has_the_sizes_of_scikit_learn():
    for n, k in itertools.product((10, 11, 23), (2, 3, 10)):
        got = np.bincount(make(np.arange(n) % 3, scheme="kfold", folds=k).vector())
        assert sorted(got) == sorted(len(valid) for _, valid in KFold(k).split(np.zeros(n)))


def test_small_classes_go_as_far_as_they_reach_and_are_named():
    labels = np.array([0] * 20 + [1] * 3 + [2])
    folds = make(labels, ["many", "few", "one"], folds=5)
    assert sorted(table(folds, labels)[:, 1]) == [0, 0, 1, 1, 1]
    assert folds.vector()[-1] == -1
    warned = check_folds(folds, ["many", "few", "one", "none"])
    lacking = np.flatnonzero(table(folds, labels)[:, 1] == 0)
    assert warned == [
        "1 of 4 classes have no image at all: 'none'",
        "1 of 4 classes have no validation image in any fold: 'one'",
        *(f"1 of 4 classes have no validation image in fold {k}: 'few'" for k in lacking),
    ]


def test_classes_all_smaller_than_the_number_of_folds():
    labels = np.repeat(np.arange(10), 3)
    with pytest.raises(ValueError, match="cannot be greater"):
        next(StratifiedKFold(5).split(labels, labels))
    assert (table(make(labels, folds=5), labels).sum(axis=1) == 6).all()


# --- groups


@SLOW_MACHINE
@given(st.integers(4, 60), st.integers(2, 5), st.integers(0, 10**6))
def test_folds_of_groups_are_as_even_as_those_of_scikit_learn(people, k, seed):
    rng = np.random.default_rng(seed)
    groups, labels = photos(rng, max(people, k), 9, 3)
    got = np.bincount(make(labels, scheme="group", groups=groups, folds=k, seed=seed).vector())
    theirs = np.array([len(valid) for _, valid in GroupKFold(k).split(groups, labels, groups)])
    assert got.std() <= theirs.std() + 1.0


def share_spread(row, labels, groups, k):
    """Mean over the classes of the standard deviation over the folds of the share of a class that is held out."""
    several = [c for c in np.unique(labels) if len(np.unique(groups[labels == c])) > 1]
    shares = np.array(
        [[(labels[row == f] == c).sum() / (labels == c).sum() for f in range(k)] for c in several]
    )
    return shares.std(axis=1).mean()


@pytest.mark.filterwarnings("ignore:The least populated class")
@pytest.mark.parametrize("people", [15, 60, 200])
def test_stratified_groups_are_more_even_than_those_of_scikit_learn(people):
    ours, theirs, emptied = [], [], 0
    for seed in range(25):
        rng = np.random.default_rng(seed)
        k = int(rng.integers(2, 6))
        groups, labels = photos(rng, people, 8, 6, by_person=seed % 2 == 0)
        labels = np.minimum(labels, rng.integers(1, 6))  # classes of very different sizes
        row = np.full(len(labels), -1)
        for f, (train, valid) in enumerate(
            StratifiedGroupKFold(k, shuffle=True, random_state=seed).split(labels, labels, groups)
        ):
            row[valid] = f
            emptied += len(np.setdiff1d(labels, labels[train]))
        theirs.append(share_spread(row, labels, groups, k))
        folds = make(labels, groups=groups, folds=k, seed=seed)
        ours.append(share_spread(folds.vector(), labels, groups, k))
        assert all(set(labels[folds.sides(f)[0]]) == set(labels) for f in range(k))
    assert np.mean(ours) <= np.mean(theirs)
    assert np.mean(np.array(ours) > np.array(theirs) + 1e-9) < 0.25


def test_a_class_of_two_groups_is_never_held_out_as_a_whole():
    groups = np.repeat(np.arange(12), 5)
    labels = np.where(groups < 2, 1, 0)
    for seed in range(20):
        row = make(labels, groups=groups, folds=2, seed=seed).vector()
        assert row[0] != row[5] and row.min() == 0


def test_classes_that_two_folds_cannot_both_hold_out():
    # Groups a-b share class 0, b-c class 1, a-c class 2: in two folds any way leaves a class without training.
    groups = np.array(list("aabbccdd"))
    labels = np.array([0, 2, 0, 1, 1, 2, 3, 3])
    groups = np.concatenate([groups, list("ef")])
    labels = np.concatenate([labels, [3, 3]])
    for seed in range(10):
        folds = make(labels, groups=groups, folds=2, seed=seed)
        assert (folds.vector() < 0).sum() == 2
        assert all(set(labels[folds.sides(f)[0]]) == set(labels) for f in range(2))


def test_seeds_differ_in_what_is_together_also_where_all_groups_differ_in_size():
    groups = np.repeat(np.arange(12), np.arange(1, 13))
    labels = np.zeros(len(groups), dtype=int)
    rows = [make(labels, groups=groups, folds=3, seed=seed).vector() for seed in range(6)]
    assert len({frozenset(frozenset(groups[row == k].tolist()) for k in range(3)) for row in rows}) > 1
    assert len({row[-1] for row in rows}) > 1  # the largest group is not always in the first fold
    assert all(np.ptp(np.bincount(row)) <= 1 for row in rows)


def test_images_without_a_group_are_on_their_own():
    groups = np.array(["a", "a", "a", "", "", "", "", ""])
    folds = make(np.zeros(8, dtype=int), groups=groups, scheme="group", folds=2)
    assert len(set(folds.vector()[:3])) == 1 and len(set(folds.vector()[3:])) == 2
    assert check_folds(folds, ["class 0"]) == []


def test_many_images_in_little_time():
    rng = np.random.default_rng(0)
    groups, labels = rng.integers(0, 20_000, 100_000), rng.choice(18, 100_000, p=rng.dirichlet(np.ones(18)))
    start = time.process_time()
    folds = make(labels, groups=groups)
    assert time.process_time() - start < 5
    got = table(folds, labels)
    assert (np.ptp(got, axis=0) <= np.maximum(2, 0.002 * got.sum(axis=0))).all()
    assert check_folds(folds, names(18)) == []


# --- several labels


def test_several_labels_are_spread_better_than_by_chance():
    rng = np.random.default_rng(5)
    labels = (rng.random((600, 8)) < np.array([0.5, 0.3, 0.2, 0.1, 0.05, 0.03, 0.02, 0.015])).astype(
        np.float32
    )
    groups = np.repeat(np.arange(200), 3)
    images, by_group, chance = (
        table(make(labels, folds=5, **options), labels)
        for options in ({}, {"groups": groups}, {"scheme": "kfold"})
    )
    assert (np.ptp(images, axis=0) <= 1).all() and np.ptp(images.sum(axis=1)) <= 5
    assert (np.ptp(by_group, axis=0) <= np.maximum(1, 0.1 * by_group.mean(axis=0))).all()
    assert np.ptp(chance, axis=0).mean() > 4
    assert (images[:, -1] > 0).all()


def test_labels_of_an_image_are_joined():
    labels = np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 1], [1, 1, 1]], dtype=np.float32)
    folds = make(labels, ["car red", "car", "sun"], folds=2, scheme="kfold")
    assert folds.labels == ["car red sun", "", "car", "car red car", "sun", "car red car sun"]
    one = Folds(folds.ids, np.array([[0, 1, 1, 1, 1, 1]]), folds.labels, None, "given")
    assert check_folds(one, ["car red", "car", "sun"]) == [
        "1 of 3 classes have no validation image in fold 0: 'car'",
        "1 of 3 classes have no training image in fold 1: 'car'",
    ]


# --- hold-out


@SLOW_MACHINE
@given(st.lists(st.integers(1, 40), min_size=2, max_size=6), st.floats(0.05, 0.95), st.integers(0, 1000))
def test_stratified_holdout(counts, fraction, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    if max(counts) == 1:
        with pytest.raises(DataError, match="held out"):
            holdout(labels, fraction, seed)
        return
    train, valid = holdout(labels, fraction, seed)
    assert sorted([*train, *valid]) == list(range(len(labels)))
    for label, count in enumerate(counts):
        held = int((labels[valid] == label).sum())
        assert held == 0 if count == 1 else 1 <= held <= count - 1
        assert count == 1 or abs(held - count * fraction) <= 1
    again = holdout(labels, fraction, seed)
    assert (again[0] == train).all() and (again[1] == valid).all()


def test_another_seed_is_another_split():
    labels = np.repeat([0, 1], 50)
    assert not np.array_equal(holdout(labels, 0.2, 0)[1], holdout(labels, 0.2, 1)[1])


@SLOW_MACHINE
@given(st.integers(5, 60), st.integers(2, 4), st.integers(1, 7), st.integers(0, 1000))
def test_no_group_is_on_two_sides_of_a_holdout(people, classes, most, seed):
    groups, labels = photos(np.random.default_rng(seed), people, most, classes)
    try:
        train, valid = holdout(labels, 0.25, seed, groups)
    except DataError:
        return  # no group could go without emptying a class
    assert sorted([*train, *valid]) == list(range(len(labels)))
    assert not set(groups[train]) & set(groups[valid])
    assert set(labels[train]) == set(labels)


def test_grouped_holdout_is_near_the_fraction_of_every_class():
    rng = np.random.default_rng(3)
    groups = np.repeat(np.arange(400), 7)
    labels = (rng.permutation(400) % 6)[groups]
    _, valid = holdout(labels, 0.2, 0, groups)
    share = np.bincount(labels[valid]) / np.bincount(labels)
    assert (abs(share - 0.2) < 0.02).all()


def test_a_holdout_takes_large_and_small_groups_alike():
    rng = np.random.default_rng(0)
    groups, labels = photos(rng, 300, 20, 4)
    sizes = [np.bincount(groups[holdout(labels, 0.2, seed, groups)[1]]) for seed in range(10)]
    mean = np.mean([size[size > 0].mean() for size in sizes])
    assert mean == pytest.approx(len(groups) / 300, rel=0.1)


def test_a_group_with_the_last_image_of_a_class_stays_in_training():
    labels = np.array([0] * 48 + [1])
    groups = np.array([i // 8 for i in range(48)] + [5])
    for seed in range(20):
        train, valid = holdout(labels, 0.25, seed, groups)
        assert 1 in labels[train] and len(valid) in (8, 16)


def test_a_class_of_two_groups_has_one_on_either_side():
    groups = np.repeat(np.arange(14), 7)
    labels = np.where(groups < 2, 1, 0)
    for seed in range(10):
        train, valid = holdout(labels, 0.2, seed, groups)
        assert (labels[train] == 1).sum() == (labels[valid] == 1).sum() == 7


def test_a_holdout_does_not_always_take_the_larger_of_two_groups():
    groups = np.concatenate([np.repeat([0, 1], [10, 4]), np.arange(2, 2002)])
    labels = np.where(groups < 2, 1, 0)
    held = {int((labels[holdout(labels, 0.2, seed, groups)[1]] == 1).sum()) for seed in range(12)}
    assert held == {4, 10}


def test_groups_that_cannot_be_divided():
    with pytest.raises(DataError, match="--valid"):
        holdout(np.array([0, 0, 1, 1]), 0.5, 0, np.array([0, 0, 1, 1]))


def test_holdout_of_several_labels():
    rng = np.random.default_rng(1)
    labels = (rng.random((500, 5)) < [0.5, 0.2, 0.1, 0.05, 0.01]).astype(np.float32)
    _, valid = holdout(labels, 0.2, 0)
    want = labels.sum(axis=0) * 0.2
    assert (abs(labels[valid].sum(axis=0) - want) <= 1).all() and abs(len(valid) - 100) <= 1


# --- a given column


@pytest.mark.parametrize(
    ("column", "numbers"),
    [
        (np.array([3, 7, 3, 20]), [0, 1, 0, 2]),
        (np.array(["b", "a", "b", "c"]), [1, 0, 1, 2]),
        (np.array(["10", "2", "10", "0"]), [2, 1, 2, 0]),
        (np.array([1, -1, 0, 1]), [1, -1, 0, 1]),
        (np.array(["valid", "train", "train", "valid"]), [0, -1, -1, 0]),
    ],
)
def test_values_of_a_column_are_numbered_in_order(column, numbers):
    folds = make(np.array([0, 1, 0, 1]), scheme="given", given=column)
    assert folds.vector().tolist() == numbers and folds.scheme == "given"


def test_a_column_that_holds_nothing_out():
    with pytest.raises(DataError, match=r"holds nothing out.*'train'"):
        make(np.array([0, 1]), scheme="given", given=np.array(["train", "train"]))


def test_a_column_of_one_value_leaves_nothing_to_train_with():
    with pytest.raises(DataError, match="fold 0 must divide 2 images"):
        check_folds(make(np.array([0, 1]), scheme="given", given=np.array([4, 4])), names(2))


# --- what cannot be


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "stratifed"}, "did you mean .*'stratified'"), ({"scheme": "group"}, "give groups.*'group'"),
        ({"folds": 1}, "folds=1"), ({"repeats": 0}, "repeats=0"), ({"fraction": 1.0}, "fraction=1.0"),
        ({"scheme": "given"}, "column of folds"), ({"given": np.zeros(9)}, "'auto'"),
        ({"scheme": "given", "given": np.zeros(9), "repeats": 2}, "2 repeats"),
        ({"groups": np.zeros(8)}, "groups must have one value for each of 9 images, got 8"),
    ],
)  # fmt: skip
def test_wrong_calls(options, message):
    with pytest.raises(UsageError, match=message):
        make(np.arange(9) % 2, **options)


def test_too_few_groups():
    with pytest.raises(DataError, match=r"too few groups, 2 of 5 .*got 5"):
        make(np.zeros(9, dtype=int), groups=np.arange(9) % 3, folds=5, scheme="group")
    with pytest.raises(DataError, match="too few images"):
        make(np.zeros(3, dtype=int), folds=4)
    with pytest.raises(DataError, match="no images"):
        make_folds([], np.zeros(0, dtype=int), ["a"])


def test_no_such_fold():
    with pytest.raises(UsageError, match=r"folds 0 to 4.*got 5"):
        make(np.zeros(9, dtype=int)).sides(5)


@pytest.mark.parametrize(
    "bad", [[[0, 2]], [[-1, -1]], [[0, 1], [0, 1]], [[0, 1], [3, 4]], [[0, 1, 0]], [0, 1], np.zeros((0, 2))]
)
def test_folds_are_numbered_without_gap_and_not_shared_by_repeats(bad):
    with pytest.raises(DataError):
        Folds(["a", "b"], np.array(bad), ["x", "y"], None, "given")


def test_a_group_on_two_sides_is_refused_with_an_example():
    labels, groups = np.arange(40) % 2, np.repeat([f"person {i}" for i in range(10)], 4)
    folds = make(labels, scheme="stratified", groups=groups)
    with pytest.raises(
        DataError, match=r"10 groups are on two sides.*'person 0' with 'image 0' in fold \d and 'image \d'"
    ):
        check_folds(folds, names(2))
    only_second = Folds(
        folds.ids, np.stack([np.repeat([0, 1], 20), folds.folds[0] + 2]), folds.labels, folds.groups, "given"
    )
    with pytest.raises(DataError, match="two sides"):
        check_folds(only_second, names(2))
    held = Folds(folds.ids, np.array([[-1] * 38 + [0] * 2]), folds.labels, folds.groups, "given")
    with pytest.raises(DataError, match=r"'person 9' with 'image 36' in training and 'image 38' in fold 0"):
        check_folds(held, names(2))


def test_a_side_that_is_not_a_side_is_refused(monkeypatch):
    folds = make(np.arange(20) % 2)
    for train, valid in ((np.arange(20), np.arange(2)), (np.arange(3, 20), np.arange(2))):
        monkeypatch.setattr(Folds, "sides", lambda self, k, sides=(train, valid): sides)
        with pytest.raises(DataError, match="two sides"):
            check_folds(folds, names(2))


def test_classes_that_are_missing_on_a_side_are_named_with_the_fold():
    labels = np.array([0, 0, 0, 1, 1, 2])
    folds = make(labels, ["a", "b", "c"], scheme="given", given=np.array([0, 1, 1, 0, 0, -1]))
    assert check_folds(folds, ["a", "b", "c"]) == [
        "1 of 3 classes have no validation image in any fold: 'c'",
        "1 of 3 classes have no training image in fold 0: 'b'",
        "1 of 3 classes have no validation image in fold 1: 'b'",
    ]


# --- files


def some(**options):
    rng = np.random.default_rng(2)
    groups, labels = photos(rng, 20, 4, 3)
    return make(labels, ["a, b", 'say "c"', "ü"], **{"groups": groups, **options})


@pytest.mark.parametrize(
    "options", [{}, {"repeats": 3}, {"scheme": "holdout", "repeats": 2}, {"groups": None}], ids=str
)
def test_a_saved_split_is_the_same_and_fits_another_order(tmp_path, options):
    folds = some(**options)
    folds.save(tmp_path / "new" / "folds.csv")
    read = Folds.load(tmp_path / "new" / "folds.csv")
    assert (read.ids, read.labels, read.groups) == (folds.ids, folds.labels, folds.groups)
    assert (read.folds == folds.folds).all() and read.digest() == folds.digest()
    order = np.random.default_rng(0).permutation(len(folds))
    turned = read.match([folds.ids[i] for i in order])
    assert (turned.folds == folds.folds[:, order]).all()
    assert turned.labels == [folds.labels[i] for i in order]
    assert turned.groups == (None if folds.groups is None else [folds.groups[i] for i in order])
    assert turned.digest() != folds.digest() == turned.match(folds.ids).digest()


def test_the_file_is_a_plain_table(tmp_path):
    folds = some(repeats=2)
    folds.save(tmp_path / "folds.csv")
    with open(tmp_path / "folds.csv", newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    assert head == ["id", "fold", "group", "label"] and len(rows) == 2 * len(folds)
    for i, row in enumerate(rows):
        r, at = divmod(i, len(folds))
        assert row == [folds.ids[at], str(folds.folds[r, at]), folds.groups[at], folds.labels[at]]
    assert os.listdir(tmp_path) == ["folds.csv"]


def test_digest_sees_fold_group_and_label():
    ids, groups, labels = ["a", "b"], ["g", "h"], ["x", "y"]
    digests = {
        Folds(ids, np.array([row]), names, g, "given").digest()
        for row, names, g in itertools.product(([0, 1], [1, 0]), (labels, ["x", "x"]), (groups, None))
    }
    assert len(digests) == 8


def test_the_split_of_a_single_training(tmp_path):
    (tmp_path / "split.csv").write_text("id,fold,group,label\na,train,,x\nb,valid,,y\nc,train,,y\n")
    folds = Folds.load(tmp_path / "split.csv")
    assert folds.vector().tolist() == [-1, 0, -1] and folds.groups is None and folds.count == 1
    assert [side.tolist() for side in folds.match(["c", "b", "a"]).sides(0)] == [[0, 2], [1]]


def test_columns_in_another_order_and_without_groups(tmp_path):
    (tmp_path / "f.csv").write_text("\ufefflabel,note,fold,id\nx,!,1,a\ny,!,0,b\n", encoding="utf-8")
    folds = Folds.load(tmp_path / "f.csv")
    assert (folds.ids, folds.vector().tolist(), folds.labels) == (["a", "b"], [1, 0], ["x", "y"])


def test_a_split_of_other_images():
    folds = some()
    with pytest.raises(
        DataError, match=r"lacks 1 images .*'new'.* the data lack 2 images .*'image 0', 'image 1'"
    ):
        folds.match([*folds.ids[2:], "new"])
    with pytest.raises(
        DataError, match=r"1 ids come more than once in the data.*id of its own, got for example 'image 3'"
    ):
        folds.match([*folds.ids, "image 3"])


@pytest.mark.parametrize(
    "rows", ["a,0,,x\nb,1,,x\na,1,,x\n", "a,0,,x\na,1,,x\nb,1,,x\nb,0,,x\n"], ids=["once", "all"]
)
def test_ids_that_come_twice_in_a_file(tmp_path, rows):
    (tmp_path / "f.csv").write_text("id,fold,group,label\n" + rows)
    with pytest.raises(
        DataError, match=r"come more than once in .*f\.csv.*an id of its own, got for example 'a'"
    ):
        Folds.load(tmp_path / "f.csv")


def test_ids_that_come_twice_in_a_split():
    folds = Folds(["a", "a"], np.array([[0, 1]]), ["x", "x"], None, "given")
    with pytest.raises(DataError, match="more than once in the split"):
        folds.match(["a", "b"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "needs columns"), (b"id,group\na,b\n", "needs columns id, fold, group, label, got 'id, group'"),
        (b"id,fold,group,label\na,0,,x\nb,two,,x\n", "line 3.*'two'"), (b"id,fold,label\na,-2,x\n", "line 2.*'-2'"),
        (b"id,fold,label\na\n", "line 2.*None"), (b"id,fold,label\n", "0 images"), (b"id,fold,label\n\xff\xfe,0,x\n", "UTF-8"),
        (b"id,fold,label\na,0,x\nb,5,x\n", "without a gap.*5"),
    ],
)  # fmt: skip
def test_files_that_are_no_split(tmp_path, content, message):
    (tmp_path / "f.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        Folds.load(tmp_path / "f.csv")


def test_no_file(tmp_path):
    with pytest.raises(UsageError, match="no split at"):
        Folds.load(tmp_path / "none.csv")


def test_short_for_people():
    folds = some(repeats=2)
    assert repr(folds) == f"<Folds: stratified_group, 10 folds in 2 repeats, {len(folds)} images, 20 groups>"
    page = folds._repr_html_()
    assert page.count("<tr>") == 11 and f"<td>{len(folds.sides(3)[1])}</td>" in page
