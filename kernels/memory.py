"""Loads and stores at plain addresses, for kernels that read a bit stream faster than array indexing can.

Nothing here checks anything: the callers in :mod:`fastload.kernels.huffman`, :mod:`fastload.kernels.planes` and
:mod:`fastload.kernels.decode` answer for their bounds. Numbers are little-endian unless the name says otherwise.

>>> bits = load_be64(address)  # inside of a kernel
"""

from __future__ import annotations

import time
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_I64 = ir.IntType(64)


def _loader(width: int, result: Any, swap: bool = False, signed: bool = False) -> Any:
    @intrinsic
    def load(typing, address):  # type: ignore[no-untyped-def]
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            pointer = builder.inttoptr(args[0], ir.IntType(width).as_pointer())
            value = builder.load(pointer, align=1)
            if swap:
                value = builder.bswap(value)
            if width == 64:
                return value
            return builder.sext(value, _I64) if signed else builder.zext(value, _I64)

        return result(types.intp), generate

    return load


load_u8 = _loader(8, types.int64)
load_u16 = _loader(16, types.int64)
load_u32 = _loader(32, types.int64)
load_i64 = _loader(64, types.int64)
load_i16 = _loader(16, types.int64, signed=True)
load_be64 = _loader(64, types.uint64, swap=True)


def _storer(width: int, swap: bool = False) -> Any:
    @intrinsic
    def store(typing, address, value):  # type: ignore[no-untyped-def]
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            value = args[1] if width == 64 else builder.trunc(args[1], ir.IntType(width))
            if swap:
                value = builder.bswap(value)
            builder.store(value, builder.inttoptr(args[0], ir.IntType(width).as_pointer()), align=1)
            return context.get_dummy_value()

        return types.void(types.intp, types.int64), generate

    return store


store_u8, store_u16, store_u32 = _storer(8), _storer(16), _storer(32)
store_be32 = _storer(32, swap=True)


@intrinsic
def zero_block(typing, address):  # type: ignore[no-untyped-def]
    """Set the 128 bytes of a block of 64 coefficients to 0."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vector = ir.VectorType(ir.IntType(16), 32)
        for part in (0, 64):
            place = builder.inttoptr(builder.add(args[0], ir.Constant(_I64, part)), vector.as_pointer())
            builder.store(ir.Constant(vector, None), place, align=2)
        return context.get_dummy_value()

    return types.void(types.intp), generate


@intrinsic
def copy32(typing, source, to):  # type: ignore[no-untyped-def]
    """Copy 32 bytes and return a mask of those that are 0xFF, the first byte in the lowest bit."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vector = ir.VectorType(ir.IntType(8), 32)
        data = builder.load(builder.inttoptr(args[0], vector.as_pointer()), align=1)
        builder.store(data, builder.inttoptr(args[1], vector.as_pointer()), align=1)
        mask = builder.icmp_unsigned("==", data, ir.Constant(vector, [255] * 32))
        return builder.zext(builder.bitcast(mask, ir.IntType(32)), _I64)

    return types.int64(types.intp, types.intp), generate


@intrinsic
def lowest_set(typing, mask):  # type: ignore[no-untyped-def]
    """The place of the lowest set bit of a uint64 that is not 0."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), generate


@intrinsic
def bit_length(typing, value):  # type: ignore[no-untyped-def]
    """Bits of a number that is not negative, 0 for 0."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.sub(ir.Constant(_I64, 64), builder.ctlz(args[0], ir.Constant(ir.IntType(1), 0)))

    return types.int64(types.int64), generate


@intrinsic
def lowest_bit(typing, mask):  # type: ignore[no-untyped-def]
    """The place of the lowest set bit; ``mask`` is not 0."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), generate


@intrinsic
def copy_bytes(typing, source, to, count):  # type: ignore[no-untyped-def]
    """Copy ``count`` bytes between two places that do not overlap."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        source, to = (builder.inttoptr(args[i], byte) for i in (0, 1))
        cgutils.raw_memcpy(builder, to, source, args[2], ir.Constant(_I64, 1), align=1)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), generate


@intrinsic
def prefetch(typing, source, count):  # type: ignore[no-untyped-def]
    """Ask for ``count`` bytes before they are needed; they need not exist."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        lines = builder.ashr(builder.add(args[1], ir.Constant(_I64, 63)), ir.Constant(_I64, 6))
        with cgutils.for_range(builder, lines) as line:
            place = builder.add(args[0], builder.shl(line.index, ir.Constant(_I64, 6)))
            read, near, data = (ir.Constant(number, i) for i in (0, 3, 1))
            builder.call(function, [builder.inttoptr(place, byte), read, near, data])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), generate


@intrinsic
def reverse16(typing, source, to):  # type: ignore[no-untyped-def]
    """Copy 16 pixels of three bytes in reverse order."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vector = ir.VectorType(ir.IntType(8), 48)
        data = builder.load(builder.inttoptr(args[0], vector.as_pointer()), align=1)
        order = [3 * (15 - i // 3) + i % 3 for i in range(48)]
        mask = ir.Constant(ir.VectorType(ir.IntType(32), 48), order)
        turned = builder.shuffle_vector(data, ir.Constant(vector, ir.Undefined), mask)
        builder.store(turned, builder.inttoptr(args[1], vector.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), generate


@intrinsic
def nanoseconds(typing):  # type: ignore[no-untyped-def]
    """The monotonic clock, int64; the same as Python's ``time.monotonic_ns``."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        # By name, so that a kernel that was cached on disk finds it again.
        kind = ir.FunctionType(ir.IntType(32), [ir.IntType(32), _I64.as_pointer()])
        function = cgutils.get_or_insert_function(builder.module, kind, "clock_gettime")
        with builder.goto_entry_block():
            seconds = builder.alloca(ir.ArrayType(_I64, 2))
        base = builder.bitcast(seconds, _I64.as_pointer())
        builder.call(function, [ir.Constant(ir.IntType(32), time.CLOCK_MONOTONIC), base])
        whole = builder.load(base)
        rest = builder.load(builder.gep(base, [ir.Constant(ir.IntType(32), 1)]))
        return builder.add(builder.mul(whole, ir.Constant(_I64, 10**9)), rest)

    return types.int64(), generate


def inlined(function: Any) -> Any:
    """A part of a kernel that must not cost a call: its state stays in registers."""
    return numba.njit(nogil=True, error_model="numpy", forceinline=True)(function)


def part(function: Any) -> Any:
    """A part of a kernel, only called by kernels: it is compiled into theirs, and not cached by itself."""
    return numba.njit(nogil=True, error_model="numpy")(function)


@inlined
def address(array):
    """Where an array begins, signed: numba's own address is unsigned, and its sum with a signed number a float."""
    return np.int64(array.ctypes.data)


__all__ = [
    "address",
    "bit_length",
    "copy32",
    "copy_bytes",
    "inlined",
    "load_be64",
    "load_i16",
    "load_i64",
    "load_u8",
    "load_u16",
    "load_u32",
    "lowest_bit",
    "lowest_set",
    "nanoseconds",
    "part",
    "prefetch",
    "reverse16",
    "store_be32",
    "store_u8",
    "store_u16",
    "store_u32",
    "zero_block",
]
