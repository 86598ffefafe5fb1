"""Order as arithmetic: permutations, shards that partition, O(1) resume, weights that hold."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastload.errors import UsageError
from fastload.order import Order, balanced_weights


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1), st.integers(0, 50), st.integers(1, 9), st.booleans())
@settings(max_examples=80, deadline=None)
def test_ranks_partition_an_epoch(length, seed, epoch, world, shuffle):
    ranks = [Order(length, seed, shuffle, rank=r, world_size=world) for r in range(world)]
    taken = [order.take(epoch, 0, len(order)) for order in ranks]
    assert [len(t) for t in taken] == [len(order) for order in ranks]
    assert np.array_equal(np.sort(np.concatenate(taken)), np.arange(length))
    whole = Order(length, seed, shuffle)
    merged = np.empty(length, np.int64)
    for r, part in enumerate(taken):
        merged[r::world] = part
    assert np.array_equal(merged, whole.take(epoch, 0, length))  # one global order, whatever the world size


@given(st.integers(1, 2000), st.integers(0, 99), st.data())
@settings(max_examples=60, deadline=None)
def test_any_part_equals_that_part_of_the_whole(length, seed, data):
    weights = data.draw(st.sampled_from([None, np.arange(length) + 1.0]))
    order = Order(length, seed, True, weights)
    start = data.draw(st.integers(0, length))
    stop = data.draw(st.integers(start, length + 5))
    assert np.array_equal(order.take(3, start, stop), order.take(3, 0, length)[start:stop])


def test_epochs_and_seeds_shuffle_anew():
    order = Order(1000, 1, True)
    assert not np.array_equal(order.take(0, 0, 1000), order.take(1, 0, 1000))
    assert not np.array_equal(order.take(0, 0, 1000), Order(1000, 2, True).take(0, 0, 1000))
    fixed = (order.take(0, 0, 1000) == np.arange(1000)).sum()
    assert fixed < 10  # a random permutation has one fixed point on average


def test_dropping_gives_all_ranks_equally_many():
    sizes = {len(Order(103, rank=r, world_size=8, drop_uneven=True)) for r in range(8)}
    assert sizes == {12}


def test_weighted_draws_follow_the_weights():
    weights = np.array([0.0, 1.0, 2.0, 5.0, 0.0])
    order = Order(5, 7, True, weights)
    counts = np.bincount(np.concatenate([order.take(e, 0, 5) for e in range(4000)]), minlength=5)
    assert counts[0] == counts[4] == 0
    expected = 20000 * weights[1:4] / 8
    assert (np.abs(counts[1:4] - expected) < 5 * np.sqrt(expected)).all()


def test_balanced_weights_make_classes_equally_frequent():
    labels = np.array([0] * 90 + [3] * 9 + [7])
    order = Order(100, 0, True, balanced_weights(labels))
    drawn = labels[np.concatenate([order.take(e, 0, 100) for e in range(200)])]
    shares = np.array([(drawn == c).mean() for c in (0, 3, 7)])
    assert np.abs(shares - 1 / 3).max() < 0.02


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 2, "world_size": 2}, "rank"),
        ({"seed": -1}, "seed"),
        ({"weights": np.ones(3)}, "one entry for each of 10"),
        ({"weights": np.zeros(10)}, "not all zero"),
        ({"weights": np.full(10, np.nan)}, "finite"),
        ({"weights": -np.ones(10)}, "negative"),
    ],
)
def test_wrong_arguments(options, words):
    with pytest.raises(UsageError, match=words):
        Order(10, **options)
