"""Results of bands (`mosaic.decode.rows`) merged into those of one tile: threads at the same place in each band hold
the same element, and exchange it through shared memory.
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, vector

from pallas_flash.arrays import Array
from pallas_flash.kernels.mosaic import ptx
from pallas_flash.kernels.mosaic.cache_rules import MERGED_BYTES
from pallas_flash.kernels.mosaic.decode.combine import Sums
from pallas_flash.kernels.mosaic.fragments import (
    ROW_LAYOUT,
    ROWS,
    TILE,
    Fragment,
    PerRow,
    concatenate,
    spread,
)
from pallas_flash.kernels.mosaic.interpret import interpreted_as
from pallas_flash.kernels.mosaic.types import Ref

__all__ = ["COLUMNS", "merged"]

COLUMNS = MERGED_BYTES // (4 * ROWS)
"""Columns of O that are merged at a time: 16 words of each thread."""

type _Fold = Callable[[ir.Value, ir.Value], ir.Value]


def merged(sums: Sums, acc: Fragment, unit: float, bands: int, ref: Ref,
           is_alone: bool = True) -> tuple[Sums, Fragment]:
    """The sums and O of all bands, in each of them.

    Args:
      sums: of each row (64,), as `acc`, (64, d_v), is relative to its m_i.
      unit: of scores, times log2(e).
      ref: `MERGED_BYTES` of shared memory that nobody uses.
      is_alone: whether this warpgroup is all of its block, else it has a barrier of its own.
    """
    if bands == 1:
        return sums, acc
    m_i = _largest(sums.m_i, bands, ref, is_alone)
    weight = jnp.exp2((sums.m_i - m_i) * unit)
    acc = acc * spread(weight, acc.shape[1])
    parts = [_sum(acc[:, first:first + COLUMNS], bands, ref, TILE, is_alone)
             for first in range(0, acc.shape[1], COLUMNS)]
    return Sums(m_i, _sum(sums.l_i * weight, bands, ref, ROW_LAYOUT, is_alone)), concatenate(parts)


def _banded(x: Array, bands: int) -> list[Array]:
    return list(x.reshape(bands, ROWS // bands, *x.shape[1:]))


def _repeated(x: Array, bands: int) -> Array:
    return jnp.concatenate([x] * bands)


def _largest_plain(x: PerRow, bands: int, ref: Ref, is_alone: bool) -> PerRow:
    del ref, is_alone
    return _repeated(functools.reduce(lambda a, b: jnp.where(b <= a, a, b), _banded(x, bands)), bands)


@interpreted_as(_largest_plain)
def _largest(x: PerRow, bands: int, ref: Ref, is_alone: bool) -> PerRow:
    """The largest of all bands, in the order of bands; of NaN, some."""
    return _folded(lambda a, b: arith.select(arith.cmpf(arith.CmpFPredicate.OLE, b, a), a, b), x, bands, ref,
                   ROW_LAYOUT, is_alone)


def _sum_plain(x: Array, bands: int, ref: Ref, layout: ptx.Layout, is_alone: bool) -> Array:
    del ref, layout, is_alone
    return _repeated(functools.reduce(jnp.add, _banded(x, bands)), bands)


@interpreted_as(_sum_plain)
def _sum(x: Array, bands: int, ref: Ref, layout: ptx.Layout, is_alone: bool) -> Array:
    """The sum of all bands, in the order of bands."""
    return _folded(arith.addf, x, bands, ref, layout, is_alone)


def _folded(fold: _Fold, x: Array, bands: int, ref: Ref, layout: ptx.Layout, is_alone: bool) -> Array:
    @plgpu.inline_mgpu(arg_types=(layout, plgpu.RefType()),
                       return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout))
    def exchange(_: mgpu.LaunchContext, x: mgpu.FragmentedArray, ref: ir.Value) -> mgpu.FragmentedArray:
        const = lambda value: mgpu.utils.c(value, ptx.i32())
        f32, each = ir.F32Type.get(), ptx.WARPGROUP // bands
        values = [vector.extract(register, [], [e]) for register in x.registers.flat
                  for e in range(ir.VectorType(register.type).shape[0])]
        meet = gpu.barrier if is_alone else mgpu.utils.warpgroup_barrier
        thread, start = ptx.moved(mgpu.utils.thread_idx()), llvm.ptrtoint(ptx.i32(), mgpu.utils.memref_ptr(ref))
        thread = thread if is_alone else arith.remui(thread, const(ptx.WARPGROUP))
        own = arith.addi(start, arith.muli(thread, const(4)))
        first = arith.addi(start, arith.muli(arith.remui(thread, const(each)), const(4)))
        meet()
        for i, value in enumerate(values):
            mgpu.utils.inline_ptx(f"st.shared.f32 [$0+{4 * ptx.WARPGROUP * i}], $1;", own, value,
                                  has_side_effects=True)
        meet()
        found = []
        for i in range(len(values)):
            of_bands = [mgpu.utils.inline_ptx(
                f"ld.shared.f32 $0, [$1+{4 * (ptx.WARPGROUP * i + each * band)}];", first, result_types=f32,
                has_side_effects=True) for band in range(bands)]
            found.append(functools.reduce(fold, of_bands))
        rest, registers = iter(found), np.empty(x.registers.shape, dtype=object)
        for i, register in enumerate(x.registers.flat):
            size = ir.VectorType(register.type).shape[0]
            registers.reshape(-1)[i] = vector.from_elements(register.type, [next(rest) for _ in range(size)])
        return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)

    return exchange(x, ref)
