"""Random numbers without state: Philox-4x32-10, and permutations that are computed instead of stored.

A draw is a pure function of (seed, epoch, sample, stream), so it does not matter which thread, machine or run asks for
it. Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

>>> uniforms(seed=0, epoch=0, samples=np.arange(4, dtype=np.uint64), stream=1, count=2)  # (4, 2) in [0, 1)
"""

from __future__ import annotations

import numpy as np

from fastload.kernels.jit import kernel

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)
_CHUNK = 64
_FEISTEL_ROUNDS = 8


@kernel
def philox(c0, c1, c2, c3, k0, k1):
    """Four random 32-bit words of a counter (c0..c3) and a key (k0, k1), all given and returned as uint64."""
    for _ in range(10):
        p0, p1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ k0, p1 & _LOW, (p0 >> _SHIFT) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0, c1, c2, c3


@kernel
def _fill(seed, epoch, samples, stream, out):
    count = out.shape[1]
    k0, k1 = seed & _LOW, seed >> _SHIFT
    scale = 1.0 / 4294967296.0
    for i in range(out.shape[0]):
        c0, c1 = samples[i] & _LOW, samples[i] >> _SHIFT
        for block in range((count + 3) // 4):
            # Stream and block share a word: 65,536 streams of 65,536 blocks for each sample and epoch.
            words = philox(c0, c1, epoch & _LOW, (stream << np.uint64(16)) | np.uint64(block), k0, k1)
            for j in range(min(4, count - 4 * block)):
                out[i, 4 * block + j] = words[j] * scale


def uniforms(seed: int, epoch: int, samples: np.ndarray, stream: int, count: int) -> np.ndarray:
    """(len(samples), count) float64 in [0, 1), each a function of (seed, epoch, its sample, stream, its place) only.

    ``samples`` is uint64 (B,), ``seed`` 64 bits, ``epoch`` 32 bits, ``stream`` 16 bits (one for each independent use).
    """
    out = np.empty((len(samples), count), np.float64)
    _fill(np.uint64(seed), np.uint64(epoch), np.ascontiguousarray(samples, np.uint64), np.uint64(stream), out)
    return out


@kernel
def _permute(positions, length, seed, epoch, out):
    # The smallest even number of bits that covers `length`: both Feistel halves are equally wide.
    half = np.uint64(1)
    while (np.uint64(1) << (half + half)) < length:
        half += np.uint64(1)
    mask = (np.uint64(1) << half) - np.uint64(1)
    k0, k1 = seed & _LOW, seed >> _SHIFT
    # Many positions are in the air at once, since each is one long chain of multiplications.
    left, right, place = np.empty(_CHUNK, np.uint64), np.empty(_CHUNK, np.uint64), np.empty(_CHUNK, np.int64)
    for begin in range(0, positions.size, _CHUNK):
        count = min(_CHUNK, positions.size - begin)
        for j in range(count):
            place[j] = begin + j
            left[j], right[j] = positions[begin + j] >> half, positions[begin + j] & mask
        while count > 0:
            for turn in range(_FEISTEL_ROUNDS):
                # 0xFFFF is the stream of permutations; no augmentation uses it.
                stream = np.uint64(0xFFFF0000) | np.uint64(turn)
                for j in range(count):
                    low, high = right[j] & _LOW, right[j] >> _SHIFT
                    word = philox(low, high, epoch & _LOW, stream, k0, k1)[0]
                    left[j], right[j] = right[j], left[j] ^ (word & mask)
            # Cycle walking: a bijection of the larger domain, followed until it comes back into ours.
            left_over = 0
            for j in range(count):
                value = (left[j] << half) | right[j]
                if value < length:
                    out[place[j]] = value
                else:
                    place[left_over], left[left_over], right[left_over] = place[j], left[j], right[j]
                    left_over += 1
            count = left_over


def permute(positions: np.ndarray, length: int, seed: int, epoch: int) -> np.ndarray:
    """Where each of ``positions`` (B,) uint64 below ``length`` goes in the permutation of (seed, epoch); (B,) uint64.

    A Feistel network with cycle walking: each position costs a fraction of a microsecond, whatever ``length`` is.
    """
    out = np.empty(len(positions), np.uint64)
    if length > 0:
        _permute(
            np.ascontiguousarray(positions, np.uint64),
            np.uint64(length),
            np.uint64(seed),
            np.uint64(epoch),
            out,
        )
    return out
