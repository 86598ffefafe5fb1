"""The device side of :mod:`fastload.kernels.gpu_rng`: Triton code, imported by that module alone, when it first launches something.

Philox is Triton's own, which is that of :mod:`fastload.kernels.rng`: keyed by the seed, its counter the sample's two words, the epoch,
and stream and block in one. The trade-off: what changes from call to call is not specialised, so an epoch of 1 compiles nothing anew.

>>> uniforms_kernel[(programs,)](samples, out, samples.numel(), low, high, epoch, stream, COUNT, BLOCKS, BLOCK)
"""

from __future__ import annotations

import triton
import triton.language as tl

ROUNDS = tl.constexpr(8)  # of the Feistel network


@triton.jit
def _unsigned(word):
    return word.to(tl.int32).to(tl.uint32, bitcast=True)


@triton.jit
def _philox(low, high, c0, c1, epoch, stream):
    """Four words (each uint32) of counters ``c0``, ``c1`` uint32 blocks; ``stream`` is a block, too, or a number."""
    seed = (_unsigned(high).to(tl.uint64) << 32) | _unsigned(low).to(tl.uint64)
    zero = tl.zeros_like(c0)
    return tl.philox(seed, c0, c1, zero + _unsigned(epoch), zero + stream)


@triton.jit
def _store(out, row, place, word, used, COUNT: tl.constexpr):
    uniform = word.to(tl.float64) * (1.0 / 4294967296.0)
    tl.store(out + row * COUNT + place, uniform, mask=used & (place < COUNT))


@triton.jit(do_not_specialize=["count", "low", "high", "epoch", "stream"])
def uniforms_kernel(
    samples, out, count, low, high, epoch, stream, COUNT: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Write ``out`` (count, COUNT) float64. A lane makes four neighbours of a row, one block of Philox."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, block = at // BLOCKS, (at % BLOCKS).to(tl.uint32)
    used = row < count
    sample = tl.load(samples + row, mask=used, other=0)
    c0, c1 = sample.to(tl.uint32), (sample >> 32).to(tl.uint32)
    w0, w1, w2, w3 = _philox(low, high, c0, c1, epoch, _unsigned(stream) | block)
    place = block.to(tl.int64) * 4
    _store(out, row, place, w0, used, COUNT)
    _store(out, row, place + 1, w1, used, COUNT)
    _store(out, row, place + 2, w2, used, COUNT)
    _store(out, row, place + 3, w3, used, COUNT)


@triton.jit(do_not_specialize=["count", "length", "low", "high", "epoch", "half"])
def permute_kernel(positions, out, count, length, low, high, epoch, half, BLOCK: tl.constexpr):
    """Write ``out`` (count,) int64: positions by a Feistel network, again and again until they are below ``length``."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(positions + at, mask=at < count, other=0)
    bits = half.to(tl.int64)
    mask = (tl.full((), 1, tl.int64) << bits) - 1
    moving = at < count
    while tl.max(moving.to(tl.int32), axis=0) > 0:
        left, right = value >> bits, value & mask
        for turn in tl.static_range(ROUNDS):
            # Stream 0xFFFF, as a signed word.
            stream = _unsigned(tl.full((), -65536 + turn, tl.int32))
            word, _, _, _ = _philox(
                low, high, right.to(tl.uint32), (right >> 32).to(tl.uint32), epoch, stream
            )
            left, right = right, left ^ (word.to(tl.int64) & mask)
        value = tl.where(moving, (left << bits) | right, value)
        moving = moving & (value >= length)
    tl.store(out + at, value, mask=at < count)
