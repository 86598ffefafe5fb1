"""Philox against its published vectors and plain Python; permutations as permutations."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastload.kernels import oracle, rng

# Random123's known answers for philox4x32-10.
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_published_vectors(counter, key, expected):
    words = [np.uint64(v) for v in (*counter, *key)]
    assert tuple(int(v) for v in rng.philox(*words)) == expected
    assert oracle.philox(counter, key) == expected


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(0, 60000), st.integers(1, 23))
@settings(max_examples=50, deadline=None)
def test_uniforms_equal_the_oracle(seed, epoch, stream, count):
    samples = np.array([0, 1, 2**32, 2**63 + 5], np.uint64)
    fast = rng.uniforms(seed, epoch, samples, stream, count)
    assert np.array_equal(fast, oracle.uniforms(seed, epoch, samples, stream, count))
    assert fast.min() >= 0 and fast.max() < 1


def test_streams_epochs_and_seeds_differ_and_are_uniform():
    samples = np.arange(20000, dtype=np.uint64)
    base = rng.uniforms(1, 0, samples, 1, 4)
    for other in (
        rng.uniforms(2, 0, samples, 1, 4),
        rng.uniforms(1, 1, samples, 1, 4),
        rng.uniforms(1, 0, samples, 2, 4),
    ):
        assert abs(np.corrcoef(base.ravel(), other.ravel())[0, 1]) < 0.02
    counts, _ = np.histogram(base, 64, (0, 1))
    chi = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert 30 < chi < 110  # 63 degrees of freedom: far beyond 1 in 10,000 on either side


@given(st.integers(1, 5000), st.integers(0, 2**64 - 1), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_permute_is_a_permutation(length, seed, epoch):
    out = rng.permute(np.arange(length), length, seed, epoch)
    assert np.array_equal(np.sort(out), np.arange(length))


def test_permute_is_fair_in_small_domains():
    counts = np.zeros((5, 5))
    for epoch in range(5000):
        counts[np.arange(5), rng.permute(np.arange(5), 5, 9, epoch).astype(int)] += 1
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(1000)


def test_permute_reaches_any_position_of_a_huge_domain_at_once():
    length = 10**12
    positions = np.array([0, 1, length - 1], np.uint64)
    whole = rng.permute(positions, length, 3, 0)
    assert len(set(whole.tolist())) == 3 and whole.max() < length
    assert np.array_equal(rng.permute(positions[1:2], length, 3, 0), whole[1:2])
