"""Arrays in the registers of a warpgroup, as the kernels with mma.sync have them: what every generation has
(`mosaic.fragments`), and copies from and to global memory.
"""

import functools
import math
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_flash.arrays import Array
from pallas_flash.kernels.mosaic import ptx
from pallas_flash.kernels.mosaic.fragments import (
    COLUMN_LAYOUT,
    ROW_LAYOUT,
    TILE,
    Fragment,
    PerColumn,
    PerRow,
    column_sums,
    load_row,
    positions,
    row_zeros,
    spread,
    stack,
    store_zeros,
    thread_in_tile,
)
from pallas_flash.kernels.mosaic.interpret import interpreted_as
from pallas_flash.kernels.mosaic.types import Index, Ref

__all__ = [
    "COLUMN_LAYOUT", "ROW_LAYOUT", "TILE", "Fragment", "PerColumn", "PerRow", "column_sums", "load_row",
    "load_row_stats", "positions", "row_zeros", "spread", "stack", "store_row_stats", "store_rows", "store_zeros",
    "thread_in_tile", "zeros",
]


def zeros(columns: int) -> Fragment:
    """(64, columns) float32 zeros."""
    return plgpu.layout_cast(jnp.zeros((64, columns), jnp.float32), TILE)


# -- global memory -----------------------------------------------------------------------------------------------------

def _offset(shape: tuple[int, ...], index: tuple[ir.Value, ...]) -> ir.Value:
    """The offset of an element of an array, int64, from the leading indices, int32 values that are not negative."""
    i64 = ir.IntegerType.get_signless(64)
    strides = [math.prod(shape[i + 1:]) for i in range(len(index))]
    terms = [arith.muli(arith.extui(i64, x), mgpu.utils.c(stride, i64)) for x, stride in zip(index, strides)]
    return functools.reduce(arith.addi, terms)


def _store_rows_plain(x: Fragment, ref: Ref, index: tuple[Index, Index, Index], axis: int, column: int = 0) -> None:
    first, length = index[axis], ref.shape[axis]

    def write(i: Array, _: None) -> None:
        @pl.when(first + i < length)
        def inside() -> None:
            at = (*index[:axis], first + i, *index[axis + 1:])
            ref[*at, pl.ds(column, x.shape[1])] = lax.dynamic_index_in_dim(x, i, keepdims=False)

    lax.fori_loop(0, x.shape[0], write, None)


@interpreted_as(_store_rows_plain)
def store_rows(x: Fragment, ref: Ref, index: tuple[Index, Index, Index], axis: int, column: int = 0) -> None:
    """Stores x, (64, columns) of 16 or 32 bits in the layout TILE, to global memory where its rows lie in the array.

    Args:
      ref: an array of four axes in global memory.
      index: of the first row.
      axis: of the three, the one along which the rows lie.
      column: the first column, a multiple of 8.
    """
    shape, half = ref.shape, ref.dtype.itemsize == 2

    @plgpu.inline_mgpu(arg_types=(TILE, plgpu.RefType(), *(ptx.SCALAR,) * 3))
    def store(_: mgpu.LaunchContext, x: mgpu.FragmentedArray, ref: ir.Value, *index: mgpu.FragmentedArray) -> None:
        i32, word = ptx.i32(), ir.VectorType.get((1,), ptx.i32())
        const = lambda value: mgpu.utils.c(value, i32)
        warp, row, quarter = thread_in_tile()
        places = [i.registers.item() for i in index]
        places[axis] = arith.addi(places[axis], arith.addi(arith.muli(warp, const(16)), row))
        start = _offset(shape, (*places, arith.muli(quarter, const(2))))
        element, down = ir.MemRefType(ref.type).element_type, 8 * math.prod(shape[axis + 1:])
        base = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [start], element)
        flat, size = x.registers.reshape(-1, 2), 2 if half else 4
        for i in range(2):
            position = arith.addi(places[axis], const(8 * i))
            inside = arith.cmpi(arith.CmpIPredicate.slt, position, const(shape[axis]))
            for j in range(flat.shape[0]):
                at = f"[$0+{size * (i * down + column + 8 * j)}]"
                if half:
                    pair = [vector.extract(vector.bitcast(word, flat[j, i]), [], [0])]
                    text = f"st.global.b32 {at}, $1;"
                else:
                    pair = [vector.extract(flat[j, i], [], [e]) for e in (0, 1)]
                    text = f"st.global.v2.f32 {at}, {{$1, $2}};"
                mgpu.utils.inline_ptx(text, base, *pair, predicate=inside, has_side_effects=True)

    store(x, ref, *map(ptx.scalar, index))


def _row_elements(row: ir.Value, first: ir.Value, length: int) -> Iterator[tuple[ir.Value, ir.Value, ir.Value]]:
    """For each of a thread's two rows: its index in (rows, length), whether it lies below `length`, and whether this
    thread is the first of the four that hold it.
    """
    i32, i64 = ptx.i32(), ir.IntegerType.get_signless(64)
    const = lambda value: mgpu.utils.c(value, i32)
    warp, own, quarter = thread_in_tile()
    leads = arith.cmpi(arith.CmpIPredicate.eq, quarter, const(0))
    base = arith.muli(arith.extui(i64, row), mgpu.utils.c(length, i64))
    for i in range(2):
        position = arith.addi(first, arith.addi(arith.muli(warp, const(16)), arith.addi(own, const(8 * i))))
        inside = arith.cmpi(arith.CmpIPredicate.slt, position, const(length))
        yield arith.addi(base, arith.extui(i64, position)), inside, leads


def _load_row_stats_plain(ref: Ref, row: Index, first: Index, length: int, otherwise: float) -> PerRow:
    at = first + jnp.arange(64, dtype=jnp.int32)
    return jnp.take(ref[*_unravelled(row, ref.shape[:-1])], at, mode="fill", fill_value=otherwise)


@interpreted_as(_load_row_stats_plain)
def load_row_stats(ref: Ref, row: Index, first: Index, length: int, otherwise: float) -> PerRow:
    """Loads ref[row, first + i] where that lies below `length`, and `otherwise` where it does not.

    Args:
      ref: (rows, length) float32 in global memory, in any shape that flattens to it.
      row, first: int32 scalars.

    Returns:
      (64,) float32 in ROW_LAYOUT.
    """
    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), ptx.SCALAR, ptx.SCALAR),
                       return_type=plgpu.ShapeDtypeStruct((64,), jnp.float32, ROW_LAYOUT))
    def load(_: mgpu.LaunchContext, ref: ir.Value, row: mgpu.FragmentedArray,
             first: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        layout, f32 = ROW_LAYOUT.to_mgpu(), ir.F32Type.get()
        registers = np.empty(layout.registers_shape((64,)), dtype=object)
        missing = mgpu.utils.c(otherwise, f32)
        elements = _row_elements(row.registers.item(), first.registers.item(), length)
        for i, (index, inside, _leads) in enumerate(elements):
            address = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [index], f32)
            asm = "{ .reg .pred p; setp.ne.u32 p, $2, 0; mov.f32 $0, $3; @p ld.global.f32 $0, [$1]; }"
            value = llvm.inline_asm(f32, [address, arith.extui(ptx.i32(), inside), missing], asm, "=&f,l,r,f",
                                    has_side_effects=True)
            registers.reshape(-1)[i] = vector.from_elements(ir.VectorType.get((1,), f32), [value])
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return load(ref, ptx.scalar(row), ptx.scalar(first))


def _store_row_stats_plain(x: PerRow, ref: Ref, row: Index, first: Index, length: int) -> None:
    index = _unravelled(row, ref.shape[:-1])

    def write(i: Array, _: None) -> None:
        @pl.when(first + i < length)
        def inside() -> None:
            ref[*index, first + i] = lax.dynamic_index_in_dim(x, i, keepdims=False)

    lax.fori_loop(0, x.shape[0], write, None)


@interpreted_as(_store_row_stats_plain)
def store_row_stats(x: PerRow, ref: Ref, row: Index, first: Index, length: int) -> None:
    """Stores x[i] to ref[row, first + i] where that lies below `length`.

    Args:
      x: (64,) float32 in ROW_LAYOUT.
      ref: (rows, length) float32 in global memory, in any shape that flattens to it.
      row, first: int32 scalars.
    """
    @plgpu.inline_mgpu(arg_types=(ROW_LAYOUT, plgpu.RefType(), ptx.SCALAR, ptx.SCALAR))
    def store(_: mgpu.LaunchContext, x: mgpu.FragmentedArray, ref: ir.Value, row: mgpu.FragmentedArray,
              first: mgpu.FragmentedArray) -> None:
        elements = _row_elements(row.registers.item(), first.registers.item(), length)
        for register, (index, inside, leads) in zip(x.registers.flat, elements, strict=True):
            address = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [index], ir.F32Type.get())
            mgpu.utils.inline_ptx("st.global.f32 [$0], $1;", address, vector.extract(register, [], [0]),
                                  predicate=arith.andi(leads, inside), has_side_effects=True)

    store(x, ref, ptx.scalar(row), ptx.scalar(first))


def _unravelled(row: Index, shape: tuple[int, ...]) -> tuple[Index, ...]:
    """The indices of a flat row number in `shape`."""
    indices: list[Index] = []
    for size in reversed(shape[1:]):
        indices.insert(0, lax.rem(row, size))
        row = lax.div(row, size)
    return row, *indices
