"""The inverse DCT as explicit vector code, two blocks at a time: equal to libjpeg's accurate integer one, sample for sample.

Full size, and 1/2, 1/4 and 1/8 of it with the sums that libjpeg takes for these sizes. A block comes out transposed, one
image column after the other: this saves a transposition here, and it is the layout that lets
:mod:`fastload.kernels.planes` resize along rows first. Sums are exact in 32 bits, so their order does not matter.

>>> full(block, block, quant, quant, column, column, stride, stride)  # addresses, inside of a kernel
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_I8, _I16, _I32, _I64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_FRACTION, _KEPT = 13, 2  # bits behind the point of the constants, and of the sums between the two passes


def _vector(kind: Any, lanes: int) -> Any:
    return ir.VectorType(kind, lanes)


def _constant(lanes: int, value: int) -> Any:
    return ir.Constant(_vector(_I32, lanes), [value] * lanes)


class _Lanes:
    """Arithmetic on vectors of 32-bit integers."""

    def __init__(self, builder: Any, lanes: int) -> None:
        self.builder, self.lanes = builder, lanes

    def times(self, a: Any, factor: float) -> Any:
        return self.builder.mul(a, _constant(self.lanes, round(factor * (1 << _FRACTION))))

    def shifted(self, a: Any, bits: int) -> Any:
        return self.builder.shl(a, _constant(self.lanes, bits))

    def sum(self, *parts: Any) -> Any:
        total = parts[0]
        for part in parts[1:]:
            total = self.builder.add(total, part)
        return total

    def difference(self, a: Any, b: Any) -> Any:
        return self.builder.sub(a, b)

    def rounded(self, a: Any, bits: int, bias: int = 0) -> Any:
        """a / 2**bits + bias, rounded."""
        half = _constant(self.lanes, (1 << (bits - 1)) + (bias << bits))
        return self.builder.ashr(self.builder.add(a, half), _constant(self.lanes, bits))


def _eight(v: _Lanes, x: list[Any]) -> list[Any]:
    """Eight-point inverse DCT without scaling; a None among the inputs is 0."""
    total, minus, times = v.sum, v.difference, v.times
    if x[4] is None:  # only the first four: the terms that are left
        a = b = v.shifted(x[0], _FRACTION)
        base = times(x[2], 0.541196100)
        c, d = base, total(base, times(x[2], 0.765366865))
        z3, z4 = x[3], x[1]
        z5 = times(total(z3, z4), 1.175875602)
        z3 = total(times(z3, -1.961570560), z5)
        z4 = total(times(z4, -0.390180644), z5)
        z1, z2 = times(x[1], -0.899976223), times(x[3], -2.562915447)
        odd = [
            total(z1, z3),
            total(z2, z4),
            total(times(x[3], 3.072711026), z2, z3),
            total(times(x[1], 1.501321110), z1, z4),
        ]
    else:
        a, b = v.shifted(total(x[0], x[4]), _FRACTION), v.shifted(minus(x[0], x[4]), _FRACTION)
        base = times(total(x[2], x[6]), 0.541196100)
        c, d = total(base, times(x[6], -1.847759065)), total(base, times(x[2], 0.765366865))
        z3, z4 = total(x[7], x[3]), total(x[5], x[1])
        z5 = times(total(z3, z4), 1.175875602)
        z3 = total(times(z3, -1.961570560), z5)
        z4 = total(times(z4, -0.390180644), z5)
        z1, z2 = times(total(x[7], x[1]), -0.899976223), times(total(x[5], x[3]), -2.562915447)
        odd = [
            total(times(x[7], 0.298631336), z1, z3),
            total(times(x[5], 2.053119869), z2, z4),
            total(times(x[3], 3.072711026), z2, z3),
            total(times(x[1], 1.501321110), z1, z4),
        ]
    even = [total(a, d), total(b, c), minus(b, c), minus(a, d)]
    first = [total(e, o) for e, o in zip(even, reversed(odd))]
    return first + [minus(e, o) for e, o in zip(reversed(even), odd)]


def _four(v: _Lanes, x: list[Any]) -> list[Any]:
    """Four samples of the eight-point inverse DCT, times 2; input 4 has no share."""
    a = v.shifted(x[0], _FRACTION + 1)
    c = v.sum(v.times(x[2], 1.847759065), v.times(x[6], -0.765366865))
    far = v.sum(
        *(
            v.times(x[i], f)
            for i, f in ((7, -0.211164243), (5, 1.451774981), (3, -2.172734803), (1, 1.061594337))
        )
    )
    near = v.sum(
        *(
            v.times(x[i], f)
            for i, f in ((7, -0.509795579), (5, -0.601344887), (3, 0.899976223), (1, 2.562915447))
        )
    )
    up, down = v.sum(a, c), v.difference(a, c)
    return [v.sum(up, near), v.sum(down, far), v.difference(down, far), v.difference(up, near)]


def _two(v: _Lanes, x: list[Any]) -> list[Any]:
    """Two samples of the eight-point inverse DCT, times 4; of the even inputs only the first has a share."""
    a = v.shifted(x[0], _FRACTION + 2)
    odd = v.sum(
        *(
            v.times(x[i], f)
            for i, f in ((7, -0.720959822), (5, 0.850430095), (3, -1.272758580), (1, 3.624509785))
        )
    )
    return [v.sum(a, odd), v.difference(a, odd)]


def shuffle(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(_vector(_I32, len(lanes)), lanes))


def transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """Both 8 x 8 halves of eight vectors of 16, transposed."""
    for step in (1, 2, 4):
        result: list[Any] = [None] * 8
        for i in range(8):
            if i & step:
                continue
            low, high = [], []
            for lane in range(16):
                # Lanes whose bit `step` differs from the row's change places with those of the row `step` further.
                low.append(lane if not lane & step else 16 + (lane ^ step))
                high.append(16 + lane if lane & step else lane ^ step)
            result[i] = shuffle(builder, rows[i], rows[i + step], low)
            result[i + step] = shuffle(builder, rows[i], rows[i + step], high)
        rows = result
    return rows


def _columns(builder: Any, rows: list[Any], wanted: tuple[int, ...]) -> list[Any]:
    """Lane ``c`` of both halves of each row, as a vector of (rows of the first, rows of the second), for each c wanted."""
    count = len(rows)
    padded = rows
    while len(padded) > 1:  # join all rows to one long vector
        width = 16 * count // len(padded)
        padded = [
            shuffle(builder, padded[i], padded[i + 1], list(range(2 * width)))
            for i in range(0, len(padded), 2)
        ]
    joined = padded[0]
    columns = []
    for c in range(8):
        lanes = [16 * r + 8 * half + c for half in (0, 1) for r in range(count)]
        columns.append(shuffle(builder, joined, joined, lanes) if c in wanted else None)
    return columns


def _load_rows(builder: Any, blocks: list[Any], quants: list[Any], wanted: tuple[int, ...]) -> list[Any]:
    """Dequantised rows of two blocks as vectors of 16; rows that are not wanted are None."""
    eight = _vector(_I16, 8)
    rows: list[Any] = []
    for r in range(8):
        if r not in wanted:
            rows.append(None)
            continue
        halves = []
        for block, quant in zip(blocks, quants):
            at = [
                builder.load(
                    builder.inttoptr(builder.add(a, ir.Constant(_I64, 16 * r)), eight.as_pointer()), align=2
                )
                for a in (block, quant)
            ]
            halves.append(builder.mul(*at))
        both = shuffle(builder, halves[0], halves[1], list(range(16)))
        rows.append(builder.sext(both, _vector(_I32, 16)))
    return rows


def _store_columns(builder: Any, columns: list[Any], outs: list[Any], strides: list[Any]) -> None:
    """Clip to 0..255 and store each vector's halves as one column of either block."""
    size = len(columns)
    lanes = 2 * size
    word = ir.IntType(8 * size)
    for i, column in enumerate(columns):
        for limit, worse in ((0, "<"), (255, ">")):
            bound = _constant(lanes, limit)
            column = builder.select(builder.icmp_signed(worse, column, bound), bound, column)
        levels = builder.trunc(column, _vector(_I8, lanes))
        halves = builder.bitcast(levels, _vector(word, 2))
        for half in (0, 1):
            place = builder.add(outs[half], builder.mul(strides[half], ir.Constant(_I64, i)))
            value = builder.extract_element(halves, ir.Constant(_I32, half))
            builder.store(value, builder.inttoptr(place, word.as_pointer()), align=1)


_Points = Callable[[_Lanes, list[Any]], list[Any]]


def _transform(points: _Points, inputs: tuple[int, ...], size: int) -> Any:
    """A kernel that uses ``inputs`` rows and columns of two blocks and makes ``size`` x ``size`` samples of each."""
    spare = {8: 0, 4: 1, 2: 2}[size]  # bits by which the points are too large

    @intrinsic
    def transform(typing, block_a, block_b, quant_a, quant_b, out_a, out_b, stride_a, stride_b):  # type: ignore[no-untyped-def]
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            rows = _load_rows(builder, args[0:2], args[2:4], inputs)
            wide = _Lanes(builder, 16)
            rows = [wide.rounded(row, _FRACTION - _KEPT + spare) for row in points(wide, rows)]
            if size == 8:
                columns = transposed(builder, rows)
                columns = [c if i in inputs else None for i, c in enumerate(columns)]
            else:
                columns = _columns(builder, rows, inputs)
            narrow = _Lanes(builder, 2 * size)
            columns = [narrow.rounded(c, _FRACTION + _KEPT + 3 + spare, 128) for c in points(narrow, columns)]
            _store_columns(builder, columns, args[4:6], args[6:8])
            return context.get_dummy_value()

        return types.void(*[types.intp] * 8), generate

    return transform


# Arguments of each: addresses of two blocks of 64 int16, of their quantisation tables in the same order, of their first
# columns, and the bytes from column to column.
full = _transform(_eight, tuple(range(8)), 8)
sparse = _transform(
    _eight, (0, 1, 2, 3), 8
)  # the same for blocks without coefficients outside of the first 4 x 4
half = _transform(_four, (0, 1, 2, 3, 5, 6, 7), 4)
quarter = _transform(_two, (0, 1, 3, 5, 7), 2)


@intrinsic
def fill8(typing, out, stride, level):  # type: ignore[no-untyped-def]
    """Eight columns of eight bytes that are all ``level``."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value = builder.mul(args[2], ir.Constant(_I64, 0x0101010101010101))
        for i in range(8):
            place = builder.add(args[0], builder.mul(args[1], ir.Constant(_I64, i)))
            builder.store(value, builder.inttoptr(place, _I64.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 3), generate
