"""Inner loops as explicit vector code, since LLVM's vectoriser does not find them or spends their time on checks.

Sixteen floats are worked on at once: four pixels of one row when rows are blended, one pixel of four rows when columns
are, sixteen numbers of an image when it is normalised. The code is written as LLVM vectors, so each CPU gets its own instructions (AVX-512, AVX2, NEON), and as plain IEEE
multiplications and additions in a fixed order, so each gets the same numbers.

Addresses are plain integers: the callers in :mod:`fastload.kernels.resize` and :mod:`fastload.kernels.pixels` answer for their
bounds.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_I8, _I32, _I64, _F32 = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
_BYTES, _INTS, _FLOATS = ir.VectorType(_I8, 16), ir.VectorType(_I32, 16), ir.VectorType(_F32, 16)
_PIXEL = ir.VectorType(_F32, 4)


def _pointer(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


def _splat(builder: Any, scalar: Any) -> Any:
    vector = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), scalar, ir.Constant(_I32, 0))
    mask = ir.Constant(ir.VectorType(_I32, 16), [0] * 16)
    return builder.shuffle_vector(vector, ir.Constant(_FLOATS, ir.Undefined), mask)


def _blend(channels: int) -> Any:
    @intrinsic
    def blend(typing, source, stride, taps, weights, groups, line):  # type: ignore[no-untyped-def]
        """For each of ``groups`` groups of four pixels: line[pixel, 0..3] = sum over taps of weight * row.

        ``source`` is the address of the first pixel of the first row, ``stride`` the bytes from row to row, ``weights``
        the address of ``taps`` floats, and ``line`` that of the first pixel's four floats; pixels are 64 bytes apart there.
        Three-channel pixels read four bytes past a group's end.
        """
        signature = types.void(*[types.intp] * 6)

        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            source, stride, taps, weights, groups, line = args
            total = cgutils.alloca_once(builder, _FLOATS)
            with cgutils.for_range(builder, groups) as group:
                builder.store(ir.Constant(_FLOATS, None), total)
                at = builder.add(source, builder.mul(group.index, ir.Constant(_I64, 4 * channels)))
                with cgutils.for_range(builder, taps) as tap:
                    address = builder.add(at, builder.mul(tap.index, stride))
                    raw = builder.load(_pointer(builder, address, _BYTES), align=1)
                    if channels == 3:
                        lanes = [0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11]
                        mask = ir.Constant(ir.VectorType(_I32, 16), lanes)
                        raw = builder.shuffle_vector(raw, ir.Constant(_BYTES, ir.Undefined), mask)
                    pixels = builder.sitofp(builder.zext(raw, _INTS), _FLOATS)
                    place = builder.add(weights, builder.mul(tap.index, ir.Constant(_I64, 4)))
                    weight = _splat(builder, builder.load(_pointer(builder, place, _F32), align=4))
                    builder.store(builder.fadd(builder.load(total), builder.fmul(weight, pixels)), total)
                whole = builder.load(total)
                to = builder.add(line, builder.mul(group.index, ir.Constant(_I64, 256)))
                for j in range(4):
                    mask = ir.Constant(ir.VectorType(_I32, 4), [4 * j + c for c in range(4)])
                    part = builder.shuffle_vector(whole, ir.Constant(_FLOATS, ir.Undefined), mask)
                    place = builder.add(to, ir.Constant(_I64, 64 * j))
                    builder.store(part, _pointer(builder, place, _PIXEL), align=4)
            return context.get_dummy_value()

        return signature, generate

    return blend


blend_rgb, blend_rgbx = _blend(3), _blend(4)


@intrinsic
def blend_columns(typing, lines, taps, weights, result, stride):  # type: ignore[no-untyped-def]
    """One output pixel of four rows, rounded and cut to 0..255: four bytes each, the last of them without meaning.

    ``lines`` is the address of the first source pixel (64 bytes each: four rows of four floats), ``weights`` that of ``taps``
    floats, ``result`` that of the pixel in the first row, and ``stride`` the bytes from row to row.
    """
    signature = types.void(*[types.intp] * 5)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        lines, taps, weights, result, stride = args
        total = cgutils.alloca_once(builder, _FLOATS)
        builder.store(ir.Constant(_FLOATS, None), total)
        with cgutils.for_range(builder, taps) as tap:
            place = builder.add(weights, builder.mul(tap.index, ir.Constant(_I64, 4)))
            weight = _splat(builder, builder.load(_pointer(builder, place, _F32), align=4))
            address = builder.add(lines, builder.mul(tap.index, ir.Constant(_I64, 64)))
            pixels = builder.load(_pointer(builder, address, _FLOATS), align=4)
            builder.store(builder.fadd(builder.load(total), builder.fmul(weight, pixels)), total)
        value = builder.fadd(builder.load(total), ir.Constant(_FLOATS, [0.5] * 16))
        for bound, worse in ((0.0, "<"), (255.0, ">")):
            limit = ir.Constant(_FLOATS, [bound] * 16)
            value = builder.select(builder.fcmp_ordered(worse, value, limit), limit, value)
        levels = builder.bitcast(builder.trunc(builder.fptosi(value, _INTS), _BYTES), ir.VectorType(_I32, 4))
        for lane in range(4):
            pixel = builder.extract_element(levels, ir.Constant(_I32, lane))
            place = builder.add(result, builder.mul(stride, ir.Constant(_I64, lane)))
            builder.store(pixel, _pointer(builder, place, _I32), align=1)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def normalise48(typing, source, scales, shifts, groups, out):  # type: ignore[no-untyped-def]
    """out[i] = source[i] * scales[i % 48] + shifts[i % 48] for 48 * ``groups`` bytes, which are 16 pixels a group.

    All are addresses; ``scales`` and ``shifts`` those of 48 floats.
    """
    signature = types.void(*[types.intp] * 5)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        source, scales, shifts, groups, out = args

        def at(base: Any, kind: Any, skip: int) -> Any:
            return _pointer(builder, builder.add(base, ir.Constant(_I64, skip)), kind)

        factors = [builder.load(at(scales, _FLOATS, 64 * i), align=4) for i in range(3)]
        terms = [builder.load(at(shifts, _FLOATS, 64 * i), align=4) for i in range(3)]
        with cgutils.for_range(builder, groups) as group:
            base = builder.add(source, builder.mul(group.index, ir.Constant(_I64, 48)))
            to = builder.add(out, builder.mul(group.index, ir.Constant(_I64, 192)))
            for i in range(3):
                levels = builder.load(at(base, _BYTES, 16 * i), align=1)
                value = builder.sitofp(builder.zext(levels, _INTS), _FLOATS)
                value = builder.fadd(builder.fmul(value, factors[i]), terms[i])
                builder.store(value, at(to, _FLOATS, 64 * i), align=4)
        return context.get_dummy_value()

    return signature, generate
