"""Sums of many products of tiles: a part in registers, the rest in the result's own rows.

An addition to a sum rounds it, and of numbers of one sign the error grows with the root of their number. So what the
tiles of `SECTION` steps give is added up in registers, from zero, and then added to what lies in the rows of the result
in global memory, which only this warpgroup writes and reads: two levels, as in blockwise attention of plain float32.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_flash.arrays import Array
from pallas_flash.kernels.hopper import registers, tiles
from pallas_flash.kernels.hopper.registers import ROW_LAYOUT, TILE, Fragment, PerRow
from pallas_flash.kernels.hopper.schedule import ROWS_PER_WARPGROUP
from pallas_flash.kernels.mosaic import ptx
from pallas_flash.kernels.mosaic.interpret import interpreted_as
from pallas_flash.kernels.mosaic.scheduling import rem
from pallas_flash.kernels.mosaic.types import Flag, Index, Ref
from pallas_flash.spec import AttentionSpec

__all__ = ["SECTION", "Place", "is_full", "zeros"]

SECTION = 8
"""Steps whose products are added up in registers: 512 keys or queries, as many as `xla` multiplies at once."""


class Place(NamedTuple):
    """64 rows of a result in global memory, (64, columns)."""

    spec: AttentionSpec
    target: Ref
    at: tuple[Index, Index, Index, int]  # the `index` of `tiles.store_rows`
    columns: int

    def store(self, x: Fragment) -> None:
        """Writes the rows."""
        tiles.store_rows(self.spec, x, self.target, self.at)

    def stored(self, kept: PerRow) -> Fragment:
        """The rows that were stored, times `kept`: 0 where nothing was stored yet."""
        rows = _load(self.target, kept, *tiles.rows_at(self.spec, self.at), self.columns)
        return rows * registers.spread(kept, self.columns)


def zeros(columns: int) -> Fragment:
    """A sum in registers, (64, columns)."""
    return plgpu.layout_cast(jnp.zeros((ROWS_PER_WARPGROUP, columns), jnp.float32), TILE)


def is_full(step: Index) -> Flag:
    """Whether a sum in registers is to be stored after a step, counted from 0."""
    return rem(step, SECTION) == SECTION - 1


def _load_plain(ref: Ref, kept: PerRow, index: tuple[Index, Index, Index], axis: int, column: int,
                columns: int) -> Fragment:
    first, length = index[axis], ref.shape[axis]

    def read(i: Array, x: Fragment) -> Fragment:
        at = (*index[:axis], jnp.minimum(first + i, length - 1), *index[axis + 1:])
        row = jnp.where((first + i < length) & (kept[i] != 0), ref[*at, pl.ds(column, columns)], 0.0)
        return lax.dynamic_update_index_in_dim(x, row, i, 0)

    return lax.fori_loop(0, 64, read, jnp.zeros((64, columns), jnp.float32))


@interpreted_as(_load_plain)
def _load(ref: Ref, kept: PerRow, index: tuple[Index, Index, Index], axis: int, column: int, columns: int) -> Fragment:
    """Loads 64 rows that `registers.store_rows` stored before in this kernel: (64, columns) float32 in the layout TILE.
    Rows past the array's end, and those of which nothing is kept, are zeros, and not read.
    """
    strides, length = [math.prod(ref.shape[i + 1:]) for i in range(3)], ref.shape[axis]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), ROW_LAYOUT, *(ptx.SCALAR,) * 3),
                       return_type=plgpu.ShapeDtypeStruct((64, columns), jnp.float32, TILE))
    def load(_: mgpu.LaunchContext, ref: ir.Value, kept: mgpu.FragmentedArray,
             *index: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        i64, f32 = ir.IntegerType.get_signless(64), ir.F32Type.get()
        start, places = registers.own_element(index, axis, strides, column)
        layout = TILE.to_mgpu()
        found = np.empty(layout.registers_shape((64, columns)), dtype=object)
        flat = found.reshape(columns // 8, 2)
        for i, register in enumerate(kept.registers.flat):
            position = arith.addi(places[axis], mgpu.utils.c(8 * i, ptx.i32()))
            inside = arith.cmpi(arith.CmpIPredicate.slt, position, mgpu.utils.c(length, ptx.i32()))
            factor = vector.extract(register, [], [0])
            wanted = arith.andi(inside, arith.cmpf(arith.CmpFPredicate.UNE, factor, mgpu.utils.c(0.0, f32)))
            for j in range(columns // 8):
                element = arith.addi(start, mgpu.utils.c(8 * i * strides[axis] + 8 * j, i64))
                address = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [element], f32)
                flat[j, i] = _load_pair(address, arith.extui(ptx.i32(), wanted))
        return mgpu.FragmentedArray(_registers=found, _layout=layout, _is_signed=None)

    return load(ref, kept, *map(ptx.scalar, index))


def _load_pair(address: ir.Value, wanted: ir.Value) -> ir.Value:
    """Two float32 numbers, or zeros. No plain load: LLVM may not move it across the stores, which are `asm`, too."""
    f32 = ir.F32Type.get()
    asm = ("{ .reg .pred p; setp.ne.u32 p, $3, 0; mov.f32 $0, 0f00000000; mov.f32 $1, 0f00000000; "
           "@p ld.global.v2.f32 {$0, $1}, [$2]; }")
    pair = llvm.inline_asm(llvm.StructType.get_literal([f32] * 2), [address, wanted], asm, "=&f,=&f,l,r",
                           has_side_effects=True)
    return vector.from_elements(ir.VectorType.get((2,), f32), [llvm.extractvalue(f32, pair, [i]) for i in (0, 1)])
