"""Blend interleaved pixels along a row without transposing them: samples are picked by permutations of bytes.

Neighbouring output samples need source samples that lie near one another: LANES of them are picked from a window of the row with one
instruction for each tap, straight into the upper bytes of 16-bit numbers. LLVM has no general form of such a permutation, so there is one
for AVX-512 (VBMI) and one for AVX2, and other processors are told that there is none. The arithmetic is that of
:mod:`fastload.kernels.planes`: all of them give the same numbers.

>>> wide = windows(BEST)  # inside of a kernel; 0: this processor has no such permutation
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from fastload.kernels.planes import LANES, pointer_to, splat, words

NONE, AVX2, VBMI = 0, 1, 2
PIECES = {NONE: 1, AVX2: 4, VBMI: 1}  # windows of one group of LANES samples
WINDOW = {NONE: 0, AVX2: 16, VBMI: 64}  # bytes of a window
# Taps, the loops over which are unrolled: of a window, of one twice as wide (for wider steps), and of lines. Fewer compile faster.
ONCE, TWICE, LINES = range(2, 6), range(3, 9), range(2, 9)
LEAST, MOST = 2, 8
INDEX = 2 * LANES  # bytes of a group's indexes, behind which its weights lie

_I8, _I16, _I32, _I64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)


def _best() -> int:
    """What the processor that numba compiles for can do, which is not always this one (NUMBA_CPU_NAME)."""
    features = cpu_target.target_context.codegen().magic_tuple()[2].split(",")
    if "+avx512vbmi" in features and "+avx512bw" in features:
        return VBMI
    return AVX2 if "+avx2" in features else NONE


BEST = _best()


def _bytes(count: int) -> Any:
    return ir.VectorType(_I8, count)


def _function(builder: Any, name: str, kind: Any, arguments: int) -> Any:
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind] * arguments), name)


def _product(builder: Any, instructions: int, a: Any, b: Any) -> Any:
    """Upper 16 bits of the products of LANES numbers.

    By name, since LLVM widens a factor outside of a loop if it can, and then no longer sees what the product is.
    """
    if instructions == VBMI:
        return builder.call(_function(builder, "llvm.x86.avx512.pmulhu.w.512", a.type, 2), [a, b])
    multiply = _function(builder, "llvm.x86.avx2.pmulhu.w", words(16), 2)
    halves = []
    for first in (0, 16):
        lanes = ir.Constant(ir.VectorType(_I32, 16), list(range(first, first + 16)))
        halves.append(builder.call(multiply, [builder.shuffle_vector(v, v, lanes) for v in (a, b)]))
    return _concatenated(builder, *halves)


def _load(builder: Any, base: Any, skip: int, kind: Any) -> Any:
    return builder.load(pointer_to(builder, builder.add(base, ir.Constant(_I64, skip)), kind), align=1)


def _concatenated(builder: Any, a: Any, b: Any) -> Any:
    count = 2 * a.type.count
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, count), list(range(count))))


def _for_each_count(builder: Any, taps: Any, counts: range, body: Callable[[int], None]) -> None:
    """Code for each number of taps in ``counts``, of which the right one is run."""
    done = builder.append_basic_block("done")
    switch = builder.switch(taps, done)
    for count in counts:
        block = builder.append_basic_block(f"taps{count}")
        switch.add_case(ir.Constant(_I64, count), block)
        builder.position_at_end(block)
        body(count)
        builder.branch(done)
    builder.position_at_end(done)


def _picked(builder: Any, instructions: int, double: bool, places: list[Any], index: Any, skip: int) -> Any:
    """LANES samples as 16-bit numbers with 8 bits behind the point."""
    if instructions == VBMI:
        kind = _bytes(64)
        low = _load(builder, places[0], skip, kind)
        if double:
            high = _load(builder, places[0], skip + 64, kind)
            permute = _function(builder, "llvm.x86.avx512.vpermi2var.qi.512", kind, 3)
            picked = builder.call(permute, [low, index[0], high])
        else:
            permute = _function(builder, "llvm.x86.avx512.permvar.qi.512", kind, 2)
            picked = builder.call(permute, [low, index[0]])
        wanted = builder.icmp_signed(">=", index[0], ir.Constant(kind, None))
        return builder.bitcast(builder.select(wanted, picked, ir.Constant(kind, None)), words(LANES))
    kind = _bytes(32)
    permute = _function(builder, "llvm.x86.avx2.pshuf.b", kind, 2)
    halves = []
    for i in range(2):

        def pick(index: Any, skip: int, i: int = i) -> Any:
            windows = [_load(builder, places[2 * i + j], skip, _bytes(16)) for j in range(2)]
            return builder.call(permute, [_concatenated(builder, *windows), index])

        if double:
            # Indexes of 128 and more give 0: each half of the window leaves out the other's samples.
            limit = _function(builder, "llvm.uadd.sat.v32i8", kind, 2)
            low = builder.call(limit, [index[i], ir.Constant(kind, [112] * 32)])
            high = builder.sub(index[i], ir.Constant(kind, [16] * 32))
            picked = builder.or_(pick(low, skip), pick(high, skip + 16))
        else:
            picked = pick(index[i], skip)
        halves.append(builder.bitcast(picked, words(16)))
    return _concatenated(builder, *halves)


def _along(instructions: int, double: bool) -> Any:
    @intrinsic
    def along(typing, source, starts, table, taps, groups, line):  # type: ignore[no-untyped-def]
        """line[i] = sum over k < taps of weights[k, i] * source[start + 3 * k + index[i]] for LANES * ``groups`` samples i.

        ``starts`` is the address of an int64 for each window, ``table`` that of INDEX bytes of indexes and ``taps`` * LANES 16-bit
        weights for each group, 64-byte aligned; ``source`` and ``line`` are addresses too. A window is read as a whole for each tap.
        """
        signature = types.void(*[types.intp] * 6)

        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            source, starts, table, taps, groups, line = args
            pieces, kind = PIECES[instructions], words(LANES)

            def body(count: int) -> None:
                with cgutils.for_range(builder, groups) as group:
                    at = builder.add(starts, builder.mul(group.index, ir.Constant(_I64, 8 * pieces)))
                    places = [builder.add(source, _load(builder, at, 8 * i, _I64)) for i in range(pieces)]
                    size = ir.Constant(_I64, INDEX + 2 * LANES * count)
                    at = builder.add(table, builder.mul(group.index, size))
                    width = 64 if instructions == VBMI else 32
                    index = [_load(builder, at, i, _bytes(width)) for i in range(0, 64, width)]
                    # Each product is cut off, by half a unit on average.
                    total: Any = ir.Constant(kind, [count // 2] * LANES)
                    for k in range(count):
                        picked = _picked(builder, instructions, double, places, index, 3 * k)
                        weight = _load(builder, at, INDEX + 2 * LANES * k, kind)
                        total = builder.add(total, _product(builder, instructions, picked, weight))
                    to = builder.add(line, builder.mul(group.index, ir.Constant(_I64, 2 * LANES)))
                    builder.store(total, pointer_to(builder, to, kind), align=2)

            if instructions != NONE:
                _for_each_count(builder, taps, TWICE if double else ONCE, body)
            return context.get_dummy_value()

        return signature, generate

    return along


def _blend_lines(instructions: int) -> Any:
    @intrinsic
    def blend_lines(typing, ring, length, first, taps, weights, step, groups, out):  # type: ignore[no-untyped-def]
        """LANES * ``groups`` bytes from lines of 16-bit samples with 8 bits behind the point, blended and rounded.

        Line ``i`` is the ``i`` % MOST-th of the ``ring`` of lines of ``length`` bytes; ``first`` is the first of them, and ``step`` the bytes
        from weight to weight. Sums stay below 65536: weights add up to at most 65535 + MOST / 2.
        """
        signature = types.void(*[types.intp] * 8)

        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            ring, length, first, taps, weights, step, groups, out = args
            kind = words(LANES)

            def body(count: int) -> None:
                lines, factors = [], []
                for k in range(count):
                    number = builder.and_(
                        builder.add(first, ir.Constant(_I64, k)), ir.Constant(_I64, MOST - 1)
                    )
                    lines.append(builder.add(ring, builder.mul(number, length)))
                    place = builder.add(weights, builder.mul(step, ir.Constant(_I64, k)))
                    factors.append(splat(builder, _load(builder, place, 0, _I16), LANES))
                with cgutils.for_range(builder, groups) as group:
                    skip = builder.mul(group.index, ir.Constant(_I64, 2 * LANES))
                    total: Any = ir.Constant(kind, [128 + count // 2] * LANES)
                    for line, factor in zip(lines, factors):
                        samples = _load(builder, builder.add(line, skip), 0, kind)
                        total = builder.add(total, _product(builder, instructions, samples, factor))
                    levels = builder.trunc(builder.lshr(total, ir.Constant(kind, [8] * LANES)), _bytes(LANES))
                    to = builder.add(out, builder.mul(group.index, ir.Constant(_I64, LANES)))
                    builder.store(levels, pointer_to(builder, to, _bytes(LANES)), align=1)

            if instructions != NONE:
                _for_each_count(builder, taps, LINES, body)
            return context.get_dummy_value()

        return signature, generate

    return blend_lines


along_once = {kind: _along(kind, False) for kind in (NONE, AVX2, VBMI)}
along_twice = {kind: _along(kind, True) for kind in (NONE, AVX2, VBMI)}
blend_lines = {kind: _blend_lines(kind) for kind in (NONE, AVX2, VBMI)}
