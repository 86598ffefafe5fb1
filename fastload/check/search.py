"""Kernels that find copies: a digest of encoded bytes, and the search for look-alikes under the eight orientations.

The search is multi-probe locality-sensitive hashing (Lv et al., 2007) over four 16-bit bands of a 64-bit code, so 50,000
images are compared in seconds and not each with each. The trade-off: a pair that differs in all four bands is missed.

>>> count = look_alikes(units, mean, views, codes, heads, items, limits, 0, 2048, pairs, scores, turns)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastload.kernels.jit import kernel

BANDS, BAND_BITS = 4, 16
_PROBED = 4  # least certain bits of a band, tried both ways
_FAR = 22  # of 64 bits: a candidate that differs in more is not compared further
_MOST_HITS = (
    64  # look-alikes kept for one image and orientation; a crowd is joined by fewer links than all its pairs
)
_WINDOW = 256


@kernel
def digest(data: Any, starts: Any, sizes: Any, shapes: Any, out: Any) -> None:
    """64-bit digests of encoded images: of all bytes up to 4 KiB, of eight windows and the size beyond that.

    ``data`` (n,) uint8 is a file, ``starts`` and ``sizes`` (B,) int64 say where images lie in it, ``shapes`` (B, 2) int64 are their
    heights and widths; fills ``out`` (B,) uint64.
    """
    prime = np.uint64(0x100000001B3)
    for b in range(len(starts)):
        value = np.uint64(0xCBF29CE484222325)
        for number in (sizes[b], shapes[b, 0], shapes[b, 1]):
            value = (value ^ np.uint64(number)) * prime
        windows = 1 if sizes[b] <= 4096 else 8
        length = sizes[b] if windows == 1 else _WINDOW
        for w in range(windows):
            at = starts[b] + (0 if windows == 1 else (sizes[b] - length) * w // (windows - 1))
            for k in range(length):
                value = (value ^ np.uint64(data[at + k])) * prime
        out[b] = value ^ (value >> np.uint64(32))


@kernel
def look_alikes(
    units: Any, mean: Any, views: Any, codes: Any, heads: Any, items: Any, limits: Any, start: Any, stop: Any,
    pairs: Any, scores: Any, turns: Any,
) -> int:  # fmt: skip
    """Images that look like the images [start, stop), turned or mirrored in one of eight ways.

    ``units`` (N, K) float32 descriptors of length 1, ``mean`` (K,) float32 their common part; orientation ``g`` of a descriptor has the
    elements ``units[i, views[g, k, 0]] * views[g, k, 1]``, where ``views`` is (8, K, 2) float32. ``codes`` (N,) uint64 are the signs of the
    first 64 elements of ``units - mean``. ``heads`` (4, 65537) and ``items`` (4, N) int32 list the images by the value of each band.
    ``limits`` (N,) float32: the least cosine for a look-alike; for a pair the larger of the two. Fills ``pairs`` (M, 2) int32 (asked,
    found), ``scores`` (M,) float32 and ``turns`` (M,) int8, and returns how many there are; -1 where M is too small.
    """
    number, length = units.shape
    seen = np.full(number, -1, np.int64)
    turned = np.empty(length, np.float32)
    weakest = np.empty(_PROBED, np.int64)
    count = 0
    for i in range(start, stop):
        for g in range(8):
            norm = np.float32(0.0)
            for k in range(length):
                turned[k] = units[i, np.int64(views[g, k, 0])] * views[g, k, 1] - mean[k]
                norm += turned[k] * turned[k]
            code = np.uint64(0)
            for k in range(64):
                if turned[k] > 0:
                    code |= np.uint64(1) << np.uint64(k)
            scale = np.float32(1.0) / np.sqrt(max(norm, np.float32(1e-12)))
            hits = 0
            for band in range(BANDS):
                first = band * BAND_BITS
                for p in range(_PROBED):
                    weakest[p] = -1
                for p in range(_PROBED):
                    for k in range(BAND_BITS):
                        taken = False
                        for q in range(p):
                            taken |= weakest[q] == k
                        if not taken and (
                            weakest[p] < 0 or abs(turned[first + k]) < abs(turned[first + weakest[p]])
                        ):
                            weakest[p] = k
                key = np.int64((code >> np.uint64(first)) & np.uint64(0xFFFF))
                for probe in range(1 << _PROBED):
                    value = key
                    for p in range(_PROBED):
                        if probe >> p & 1:
                            value ^= np.int64(1) << weakest[p]
                    for at in range(heads[band, value], heads[band, value + 1]):
                        j = items[band, at]
                        if j == i or seen[j] == i * 8 + g:
                            continue
                        seen[j] = i * 8 + g
                        bits = code ^ codes[j]
                        differ = 0
                        while bits:
                            bits &= bits - np.uint64(1)
                            differ += 1
                        if differ > _FAR:
                            continue
                        score = cosine(turned, scale, units[j], mean)
                        if score >= max(limits[i], limits[j]):
                            if count == len(pairs):
                                return -1
                            pairs[count, 0], pairs[count, 1] = i, j
                            scores[count], turns[count] = score, g
                            count += 1
                            hits += 1
                            if hits == _MOST_HITS:
                                break
                    if hits == _MOST_HITS:
                        break
                if hits == _MOST_HITS:
                    break
    return count


@kernel
def cosine(turned: Any, scale: Any, other: Any, mean: Any) -> Any:
    """Cosine of ``turned`` (K,) float32, of length 1 / ``scale``, and ``other - mean``."""
    dot, norm = np.zeros(4, np.float32), np.zeros(4, np.float32)
    for k in range(0, len(turned) - 3, 4):  # four sums: one alone would wait for itself
        for lane in range(4):
            value = other[k + lane] - mean[k + lane]
            dot[lane] += turned[k + lane] * value
            norm[lane] += value * value
    for k in range(len(turned) // 4 * 4, len(turned)):
        value = other[k] - mean[k]
        dot[0] += turned[k] * value
        norm[0] += value * value
    length = np.sqrt(max(norm[0] + norm[1] + norm[2] + norm[3], np.float32(1e-12)))
    return (dot[0] + dot[1] + dot[2] + dot[3]) * scale / length
