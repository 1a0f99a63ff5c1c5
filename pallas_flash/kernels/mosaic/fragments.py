"""Tiles in the registers of a warpgroup, as every generation has them: layouts, and helpers on 64 rows.

Warp w of four holds the rows 16 w to 16 w + 15: a thread has, of every 8 columns, two that are next to each other, in
the rows lane / 4 and lane / 4 + 8 of its warp. So accumulators of wgmma and of mma.sync lie, and their left operands.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_flash.arithmetic import Positions
from pallas_flash.arrays import Array, Float, Int
from pallas_flash.kernels.mosaic import ptx
from pallas_flash.kernels.mosaic.interpret import interpreted_as
from pallas_flash.kernels.mosaic.types import Index, Ref

__all__ = [
    "COLUMN_LAYOUT", "ROWS", "ROW_LAYOUT", "TILE", "Fragment", "PerColumn", "PerRow", "column_sums", "concatenate",
    "load_columns", "load_row", "positions", "row_zeros", "spread", "stack", "store_zeros", "thread_in_tile",
]

ROWS = 64
"""Of a tile: 16 for each warp of a warpgroup."""

TILE = plgpu.Layout.WGMMA
"""(64, columns), two elements to a vector: Pallas names the layout after the first instruction that had it."""
ROW_LAYOUT = plgpu.Layout.WGMMA.reduce(1)
"""(64,): a number for each row of a tile."""
COLUMN_LAYOUT = plgpu.Layout.WGMMA.reduce(0)
"""(columns,): a number for each column of a tile."""

Fragment = Float[Array, "64 n"]
"""A tile, in the layout TILE; or in one with the same elements in the same threads."""
PerRow = Float[Array, "64"]
"""A number for each row of a tile, in ROW_LAYOUT."""
PerColumn = Float[Array, "n"]
"""A number for each column of a tile, in COLUMN_LAYOUT."""


def row_zeros() -> PerRow:
    """(64,) float32 zeros in ROW_LAYOUT."""
    return plgpu.layout_cast(jnp.zeros((64,), jnp.float32), ROW_LAYOUT)


def spread(x: PerRow, columns: int) -> Fragment:
    """Spreads x, (64,), over columns: (64, columns), every column of which is x."""
    return lax.broadcast_in_dim(x, (64, columns), [0])


def stack(x: PerColumn) -> Fragment:
    """Stacks x, (n,), 64 times: (64, n), every row of which is x."""
    return lax.broadcast_in_dim(x, (64, x.shape[0]), [1])


def column_sums(x: Fragment) -> Fragment:
    """Sums of every eighth column, (64, n) -> (64, 8), which no two threads share."""
    return functools.reduce(jnp.add, [x[:, i:i + 8] for i in range(0, x.shape[1], 8)])


@interpreted_as(lambda parts: jnp.concatenate(parts, axis=1))
def concatenate(parts: list[Fragment]) -> Fragment:
    """Joins arrays (64, n) of one dtype, in the layout TILE, along their columns."""
    if len(parts) == 1:
        return parts[0]
    shape = (64, sum(part.shape[1] for part in parts))

    @plgpu.inline_mgpu(arg_types=(TILE,) * len(parts),
                       return_type=plgpu.ShapeDtypeStruct(shape, parts[0].dtype, TILE))
    def join(_: mgpu.LaunchContext, *parts: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        registers = np.concatenate([part.registers for part in parts], axis=1)
        return mgpu.FragmentedArray(_registers=registers, _layout=parts[0].layout, _is_signed=parts[0].is_signed)

    return join(*parts)


@interpreted_as(lambda columns, axis, first: first + lax.broadcasted_iota(jnp.int32, (64, columns), axis))
def positions(columns: int, axis: int, first: Positions) -> Int[Array, "64 n"]:
    """Makes first + the index along `axis`, (64, columns) int32 in the layout TILE, where it is used.

    It takes one register a row. Values of `plgpu.broadcasted_iota` do not change in a loop, so LLVM would keep, and
    spill, all of them.
    """
    @plgpu.inline_mgpu(arg_types=(ptx.SCALAR,), return_type=plgpu.ShapeDtypeStruct((64, columns), jnp.int32, TILE))
    def make(_: mgpu.LaunchContext, first: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        i32, pair = ptx.i32(), ir.VectorType.get((2,), ptx.i32())
        const = lambda value: mgpu.utils.c(value, i32)
        thread = arith.remui(mgpu.utils.thread_idx(), const(ptx.WARPGROUP))
        lane = arith.remui(thread, const(32))
        # registers (column / 8, row / 8 % 2): rows 16 warp + 8 i + lane / 4, columns 8 j + 2 (lane % 4) + 0, 1
        own = (arith.addi(arith.muli(arith.divui(thread, const(32)), const(16)), arith.divui(lane, const(4))),
               arith.muli(arith.remui(lane, const(4)), const(2)))[axis]
        base = ptx.moved(arith.addi(first.registers.item(), own))
        layout = TILE.to_mgpu()
        registers = np.empty(layout.registers_shape((64, columns)), dtype=object)
        flat = registers.reshape(columns // 8, 2)
        for j, i in np.ndindex(flat.shape):
            values = [arith.addi(base, const(8 * i if axis == 0 else 8 * j + e)) for e in (0, 1)]
            flat[j, i] = vector.from_elements(pair, values)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=True)

    return make(ptx.scalar(first))


def thread_in_tile() -> tuple[ir.Value, ir.Value, ir.Value]:
    """Warp, row and quarter of a row of this thread in an 8-row group of the layout TILE; made where they are used, or
    LLVM would keep what follows from them through every loop.
    """
    const = lambda value: mgpu.utils.c(value, ptx.i32())
    thread = arith.remui(ptx.moved(mgpu.utils.thread_idx()), const(ptx.WARPGROUP))
    lane = arith.remui(thread, const(32))
    return arith.divui(thread, const(32)), arith.divui(lane, const(4)), arith.remui(lane, const(4))


def _store_zeros_plain(ref: Ref) -> None:
    ref[...] = jnp.zeros(ref.shape, jnp.float32)


@interpreted_as(_store_zeros_plain)
def store_zeros(ref: Ref) -> None:
    """Writes zeros into a float32 buffer of global memory, sixteen bytes at a time."""
    layout = plgpu.Layout.WG_STRIDED(ref.shape, vec_size=4)
    ref[...] = plgpu.layout_cast(jnp.zeros(ref.shape, jnp.float32), layout)


@interpreted_as(lambda ref, index, first, columns: ref[*index, pl.ds(first, columns)])
def load_row(ref: Ref, index: tuple[Index, Index, Index], first: Index, columns: int) -> PerColumn:
    """Loads ref[index][first:first + columns] in COLUMN_LAYOUT, from an array of four axes in global memory, of
    int32 or floating-point numbers; both multiples of 8.
    """
    dtype, (_, second, third, width) = ref.dtype, ref.shape

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *(ptx.SCALAR,) * 4),
                       return_type=plgpu.ShapeDtypeStruct((columns,), dtype, COLUMN_LAYOUT))
    def load(_: mgpu.LaunchContext, ref: ir.Value, *indices: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        i32, i64 = ptx.i32(), ir.IntegerType.get_signless(64)
        a, b, c, first = (arith.extui(i64, x.registers.item()) for x in indices)
        times = lambda x, n: arith.muli(x, mgpu.utils.c(n, i64))
        row = arith.addi(times(arith.addi(times(arith.addi(times(a, second), b), third), c), width), first)
        quarter = thread_in_tile()[2]  # columns 8 j + 2 quarter + 0, 1
        row = arith.addi(row, arith.extui(i64, arith.muli(quarter, mgpu.utils.c(2, i32))))
        element = ir.MemRefType(ref.type).element_type
        layout = COLUMN_LAYOUT.to_mgpu()
        registers = np.empty(layout.registers_shape((columns,)), dtype=object)
        for j in range(columns // 8):
            index = arith.addi(row, mgpu.utils.c(8 * j, i64))
            address = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [index], element)
            registers.reshape(-1)[j] = llvm.load(ir.VectorType.get((2,), element), address)
        signed = True if jnp.issubdtype(dtype, jnp.integer) else None
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=signed)

    return load(ref, *map(ptx.scalar, (*index, first)))


@interpreted_as(lambda ref, index, first, columns: ref[*index[:2], pl.ds(index[2], columns), pl.ds(first, 64)].T)
def load_columns(ref: Ref, index: tuple[Index, Index, Index], first: Index, columns: int) -> Fragment:
    """Loads ref[index + (0, 0, j), first + i] as element (i, j) of (64, columns) in the layout TILE, from an array of
    four axes in global memory: each eight lanes read eight numbers that lie side by side.
    """
    dtype, (_, second, third, width) = ref.dtype, ref.shape

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *(ptx.SCALAR,) * 4),
                       return_type=plgpu.ShapeDtypeStruct((64, columns), dtype, TILE))
    def load(_: mgpu.LaunchContext, ref: ir.Value, *indices: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        i64 = ir.IntegerType.get_signless(64)
        const = lambda value: mgpu.utils.c(value, i64)
        a, b, c, first = (arith.extui(i64, x.registers.item()) for x in indices)
        warp, row, quarter = (arith.extui(i64, x) for x in thread_in_tile())
        line = arith.addi(arith.muli(arith.addi(arith.muli(a, const(second)), b), const(third)), c)
        line = arith.addi(line, arith.muli(quarter, const(2)))
        start = arith.addi(arith.muli(line, const(width)), arith.addi(first, arith.addi(
            arith.muli(warp, const(16)), row)))
        element, layout = ir.MemRefType(ref.type).element_type, TILE.to_mgpu()
        registers = np.empty(layout.registers_shape((64, columns)), dtype=object)
        flat = registers.reshape(columns // 8, 2)
        for j, i in np.ndindex(flat.shape):
            places = (arith.addi(start, const((8 * j + e) * width + 8 * i)) for e in (0, 1))
            pair = [llvm.load(element, mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [place], element))
                    for place in places]
            flat[j, i] = vector.from_elements(ir.VectorType.get((2,), element), pair)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return load(ref, *map(ptx.scalar, (*index, first)))
