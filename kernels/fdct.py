"""The forward DCT of two 8 x 8 blocks at once, quantised and in stream order, as explicit vector code.

The factors of Arai, Agui and Nakajima ("A fast DCT-SQ scheme for images", 1988): five multiplications for eight points, with the rest of the
scaling folded into the quantisation. In 32-bit floats, each operation rounded by itself, so that each CPU makes the same bits.

>>> quantised(column_a, column_b, stride, stride, factors, factors, block, block + 128)  # addresses, inside of a kernel
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastload.kernels.huffman import ZIGZAG
from fastload.kernels.idct import shuffle, transposed

_I8, _I16, _I32, _I64, _F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_FLOATS, _INTS = ir.VectorType(_F32, 16), ir.VectorType(_I32, 16)
# How much larger than the DCT's the results of eight points are, times the square root of 8.
_SCALES = [1.0] + [np.cos(k * np.pi / 16) * np.sqrt(2) for k in range(1, 8)]


def factors(table: np.ndarray) -> np.ndarray:
    """What the transform's results are multiplied by for a quantisation table (8, 8), rows of vertical frequency: (64,) float32."""
    scale = np.outer(_SCALES, _SCALES) * 8
    return (1 / (table * scale)).astype(np.float32).reshape(64)


def _points(builder: Any, x: list[Any]) -> list[Any]:
    """Eight points, scaled by _SCALES."""
    add, sub = builder.fadd, builder.fsub

    def times(a: Any, factor: float) -> Any:
        return builder.fmul(a, ir.Constant(_FLOATS, [float(np.float32(factor))] * 16))

    half = np.sqrt(0.5)
    sums = [add(x[i], x[7 - i]) for i in range(4)]
    rest = [sub(x[i], x[7 - i]) for i in range(4)]
    outer, inner = add(sums[0], sums[3]), add(sums[1], sums[2])
    far, near = sub(sums[0], sums[3]), sub(sums[1], sums[2])
    turned = times(add(near, far), half)
    low, middle, high = add(rest[3], rest[2]), add(rest[2], rest[1]), add(rest[1], rest[0])
    common = times(sub(low, high), np.sin(np.pi / 8))
    a = add(times(low, np.cos(np.pi / 8) - np.sin(np.pi / 8)), common)
    b = add(times(high, np.cos(np.pi / 8) + np.sin(np.pi / 8)), common)
    c = times(middle, half)
    up, down = add(rest[0], c), sub(rest[0], c)
    return [
        add(outer, inner),
        add(up, b),
        add(far, turned),
        sub(down, a),
        sub(outer, inner),
        add(down, a),
        sub(far, turned),
        sub(up, b),
    ]


@intrinsic
def quantised(typing, a, b, stride_a, stride_b, factors_a, factors_b, out_a, out_b):  # type: ignore[no-untyped-def]
    """Coefficients of the two blocks whose first columns begin at ``a`` and ``b``: 64 int16 each in stream order.

    Samples lie column after column, ``stride`` bytes apart; all arguments but these are addresses. Returns a bit for each
    coefficient that is not 0, lowest first, as two uint64.
    """
    signature = types.UniTuple(types.uint64, 2)(*[types.intp] * 8)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        a, b, stride_a, stride_b, factors_a, factors_b, out_a, out_b = args
        eight = ir.VectorType(_I8, 8)

        def load(address: Any, kind: Any, align: int = 1) -> Any:
            return builder.load(builder.inttoptr(address, kind.as_pointer()), align=align)

        def shifted(address: Any, offset: int) -> Any:
            return builder.add(address, ir.Constant(_I64, offset))

        columns = []
        for i in range(8):
            halves = [
                load(builder.add(base, builder.mul(stride, ir.Constant(_I64, i))), eight)
                for base, stride in ((a, stride_a), (b, stride_b))
            ]
            both = shuffle(builder, *halves, list(range(16)))
            level = builder.sub(builder.zext(both, _INTS), ir.Constant(_INTS, [128] * 16))
            columns.append(builder.sitofp(level, _FLOATS))
        rows = _points(builder, transposed(builder, _points(builder, columns)))
        masks = []
        quantised_rows = []
        for i, row in enumerate(rows):
            scale = shuffle(
                builder,
                *(load(shifted(f, 32 * i), ir.VectorType(_F32, 8), 4) for f in (factors_a, factors_b)),
                list(range(16)),
            )
            value = builder.fmul(row, scale)
            # Rounded half away from 0, as the definition of JPEG has it.
            negative = builder.fcmp_ordered("<", value, ir.Constant(_FLOATS, [0.0] * 16))
            half = builder.select(
                negative, ir.Constant(_FLOATS, [-0.5] * 16), ir.Constant(_FLOATS, [0.5] * 16)
            )
            whole = builder.fptosi(builder.fadd(value, half), _INTS)
            quantised_rows.append(builder.trunc(whole, ir.VectorType(_I16, 16)))
        for block, out in ((0, out_a), (1, out_b)):
            whole = [shuffle(builder, row, row, [8 * block + i for i in range(8)]) for row in quantised_rows]
            while len(whole) > 1:
                size = whole[0].type.count
                whole = [
                    shuffle(builder, whole[i], whole[i + 1], list(range(2 * size)))
                    for i in range(0, len(whole), 2)
                ]
            ordered = shuffle(builder, whole[0], whole[0], [int(place) for place in ZIGZAG])
            builder.store(ordered, builder.inttoptr(out, ordered.type.as_pointer()), align=2)
            nonzero = builder.icmp_signed("!=", ordered, ir.Constant(ordered.type, None))
            masks.append(builder.bitcast(nonzero, _I64))
        return context.make_tuple(builder, sig.return_type, masks)

    return signature, generate
