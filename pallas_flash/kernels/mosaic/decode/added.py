"""What is added to the softmax of a key head: a bias of each key, and sinks; and the unit of scores that goes with it.

With a bias, scores are kept in the unit 4, (s unit + bias) / 4, which is exact. finfo.min, by which some libraries hide
keys, is then -8.5e37, far enough from the end of float32 that a row maximum can lie below it: keys that all hold it
weigh alike, without the anchor (`AttentionSpec.anchor`) that other kernels are given. Making one reads all of the bias,
in kernels of XLA's. The statistics are those of scores that are not anchored; `calls` shifts them where they are used.

A bias of -inf hides its key from the queries of its head, whatever the score. What such a value holds is cleaned as in
tiles that the mask splits (`decode.values`), in those tiles alone that have one.

A sink is where the softmax of a head starts: m_i, with a row sum of 1. The worker of the head's first tile has it.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_flash import softmax
from pallas_flash.arrays import Array
from pallas_flash.kernels.mosaic import ptx, scores
from pallas_flash.kernels.mosaic.cache_rules import rows
from pallas_flash.kernels.mosaic.decode.rows import in_band, key_positions, own_rows, query_rows
from pallas_flash.kernels.mosaic.decode.work import Head
from pallas_flash.kernels.mosaic.fragments import ROW_LAYOUT, ROWS, TILE, Fragment, PerRow
from pallas_flash.kernels.mosaic.interpret import interpreted_as
from pallas_flash.kernels.mosaic.types import Flag, Index, Ref
from pallas_flash.spec import AttentionSpec

__all__ = ["hidden", "hides", "load_bias", "load_sinks", "lowest", "score_unit", "start_of", "statistics",
           "types", "with_bias"]

_BIAS_UNIT = 4.0
_HIGHEST = 3e38


def types(spec: AttentionSpec) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays that the kernel reads: bias, (1|b 1|h 1 kv_len) as it came, and sinks, (1|b h 1 1) float32."""
    given = {"bias": spec.bias, "sinks": spec.sinks}
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in given.items() if x is not None}


# -- scores ------------------------------------------------------------------------------------------------------------

def _unit(spec: AttentionSpec) -> float:
    return softmax.unit(spec.scale, spec.softcap) if spec.bias is None else _BIAS_UNIT


def score_unit(spec: AttentionSpec) -> float:
    """The unit of scores times log2(e)."""
    return _unit(spec) * softmax.LOG2E


def lowest(spec: AttentionSpec) -> float:
    """The m_i of rows that have met no key: finite, and below any score."""
    return scores.lowest(score_unit(spec)) if spec.bias is None else -9e37


def statistics(spec: AttentionSpec, m_i: Array, l_i: Array) -> tuple[Array, Array]:
    """`softmax.statistics`, in the unit of scores that everyone else has: 1 where there is a bias."""
    lse, rest = softmax.statistics(m_i, l_i, _unit(spec))
    return lse, rest if spec.bias is None else rest * _BIAS_UNIT


def with_bias(spec: AttentionSpec, s: Fragment, bias: Fragment) -> Fragment:
    """Scores with the bias, in the unit 4; -inf where that is."""
    bias = bias.astype(jnp.float32)
    added = s * (softmax.unit(spec.scale, spec.softcap) / _BIAS_UNIT) + bias * (1 / _BIAS_UNIT)
    return jnp.where(bias == -jnp.inf, bias, added)


def hidden(x: Fragment, bias: Fragment) -> Fragment:
    """x, and -inf where the bias hides a pair."""
    bias = bias.astype(jnp.float32)
    return jnp.where(bias == -jnp.inf, bias, x)


# -- the bias ----------------------------------------------------------------------------------------------------------

def _load_bias_plain(spec: AttentionSpec, ref: Ref, head: Head, first: Index, columns: int,
                     bands: int = 1) -> Fragment:
    batch, heads, _, length = ref.shape
    row = jnp.minimum(query_rows(1, bands), rows(spec) - 1)
    of = head.kv_head * spec.group + row % spec.group if heads > 1 else jnp.zeros_like(row)
    key = jnp.minimum(key_positions(columns, first, bands), length - 1)
    return ref[head.batch if batch > 1 else 0][:, 0][of, key]


@interpreted_as(_load_bias_plain)
def load_bias(spec: AttentionSpec, ref: Ref, head: Head, first: Index, columns: int, bands: int = 1) -> Fragment:
    """Loads the bias of a key head's queries and of the keys from `first` on: (64, columns) of its type in the layout
    TILE, each band with the next columns. Rows past the last, and keys past the capacity, hold that of others.
    """
    batch_count, heads, _, length = ref.shape
    width = 2 if length % 2 == 0 else 1  # elements of a load: pairs begin at even places

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *(ptx.SCALAR,) * 3),
                       return_type=plgpu.ShapeDtypeStruct((ROWS, columns), ref.dtype, TILE))
    def load(_: mgpu.LaunchContext, ref: ir.Value, *scalars: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        const = lambda value: mgpu.utils.c(value, ptx.i32())
        # Opaque, or LLVM would keep what follows from them, addresses first, in registers through the loop.
        batch, kv_head, first = (ptx.moved(x.registers.item()) for x in scalars)
        start = first
        element, layout = ir.MemRefType(ref.type).element_type, TILE.to_mgpu()
        kind = ir.VectorType.get((width,), element)
        registers = np.empty(layout.registers_shape((ROWS, columns)), dtype=object)
        flat = registers.reshape(columns // 8, 2)
        for i, row, quarter in own_rows():
            if i and heads == 1:
                flat[:, 1] = flat[:, 0]  # the same for all rows
                continue
            if bands > 1:
                band = arith.divui(row, const(ROWS // bands))
                first, row = arith.addi(start, arith.muli(band, const(columns))), in_band(row, bands)
            own = _head_of(spec, kv_head, row) if heads > 1 else const(0)
            line = _wide_sum(_times(batch, heads) if batch_count > 1 else None, own, length)
            for j in range(columns // 8):
                key, parts = arith.addi(arith.addi(first, const(8 * j)), arith.muli(quarter, const(2))), []
                for e in range(0, 2, width):
                    place = arith.minsi(arith.addi(key, const(e)), const(length - width))
                    at = arith.addi(line, arith.extui(_i64(), place))
                    parts.append(llvm.load(kind, mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [at], element)))
                flat[j, i] = parts[0] if len(parts) == 1 else mgpu.utils.vector_concat(parts)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return load(ref, *map(ptx.scalar, (*head, first)))


@interpreted_as(lambda bias: jnp.any(bias == -jnp.inf))
def hides(bias: Fragment) -> Flag:
    """Whether a bias (64, columns) in the layout TILE is -inf somewhere, uniform over the warpgroup. It is a barrier of
    the warpgroup, too.
    """
    @plgpu.inline_mgpu(arg_types=(TILE,), return_type=plgpu.ShapeDtypeStruct((), jnp.bool_, ptx.SCALAR))
    def vote(_: mgpu.LaunchContext, bias: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        found = []
        for register in {id(x): x for x in bias.registers.flat}.values():
            low = mgpu.utils.c(-math.inf, ir.VectorType(register.type).element_type)
            found += [arith.cmpf(arith.CmpFPredicate.OEQ, vector.extract(register, [], [e]), low) for e in (0, 1)]
        flag = ptx.or_in_warpgroup(functools.reduce(arith.ori, found))
        return mgpu.FragmentedArray.splat(flag, (), is_signed=False)

    return vote(bias)


# -- sinks -------------------------------------------------------------------------------------------------------------

def _load_sinks_plain(spec: AttentionSpec, ref: Ref, head: Head, part: Index, bands: int = 1) -> PerRow:
    row = jnp.minimum(query_rows(1, bands)[:, 0], rows(spec) - 1)
    found = ref[head.batch if ref.shape[0] > 1 else 0][:, 0, 0][head.kv_head * spec.group + row % spec.group]
    return jnp.where((part == 0) & (jnp.arange(ROWS) < ROWS // bands), found, -jnp.inf)


@interpreted_as(_load_sinks_plain)
def load_sinks(spec: AttentionSpec, ref: Ref, head: Head, part: Index, bands: int = 1) -> PerRow:
    """Loads the sinks of a key head's rows, (64,) float32 in ROW_LAYOUT; -inf in all segments but its first, and in all
    bands but the first.
    """
    batch_count, heads, *_ = ref.shape

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *(ptx.SCALAR,) * 3),
                       return_type=plgpu.ShapeDtypeStruct((ROWS,), jnp.float32, ROW_LAYOUT))
    def load(_: mgpu.LaunchContext, ref: ir.Value, *scalars: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        batch, kv_head, part = (x.registers.item() for x in scalars)
        layout, f32 = ROW_LAYOUT.to_mgpu(), ir.F32Type.get()
        registers = np.empty(layout.registers_shape((ROWS,)), dtype=object)
        is_first = arith.cmpi(arith.CmpIPredicate.eq, part, mgpu.utils.c(0, ptx.i32()))
        for i, row, _quarter in own_rows():
            own = _head_of(spec, kv_head, in_band(row, bands))
            at = _wide_sum(_times(batch, heads) if batch_count > 1 else None, own, 1)
            found = llvm.load(f32, mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [at], f32))
            has_sink = is_first
            if bands > 1:
                in_first = arith.cmpi(arith.CmpIPredicate.slt, row, mgpu.utils.c(ROWS // bands, ptx.i32()))
                has_sink = arith.andi(is_first, in_first)
            found = arith.select(has_sink, found, mgpu.utils.c(-math.inf, f32))
            registers.reshape(-1)[i] = vector.from_elements(ir.VectorType.get((1,), f32), [found])
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return load(ref, *map(ptx.scalar, (*head, part)))


def start_of(spec: AttentionSpec, sinks: PerRow) -> tuple[PerRow, PerRow]:
    """m_i and l_i / 8 of rows that have met their sink alone."""
    m_i = jnp.minimum(jnp.maximum(sinks * (1 / _unit(spec)), lowest(spec)), _HIGHEST)
    return m_i, jnp.where(sinks == -jnp.inf, 0.0, 0.125)


# -- where they lie ----------------------------------------------------------------------------------------------------

def _i64() -> ir.Type:
    return ir.IntegerType.get_signless(64)


def _times(x: ir.Value, count: int) -> ir.Value:
    return arith.muli(arith.extui(_i64(), x), mgpu.utils.c(count, _i64()))


def _head_of(spec: AttentionSpec, kv_head: ir.Value, row: ir.Value) -> ir.Value:
    """The query head of a row, or of the last row that there is."""
    const = lambda value: mgpu.utils.c(value, ptx.i32())
    row = arith.minsi(row, const(rows(spec) - 1))
    return arith.addi(arith.muli(kv_head, const(spec.group)), arith.remui(row, const(spec.group)))


def _wide_sum(before: ir.Value | None, index: ir.Value, size: int) -> ir.Value:
    """(before + index) size, 64 bits wide."""
    index = arith.extui(_i64(), index)
    index = index if before is None else arith.addi(before, index)
    return arith.muli(index, mgpu.utils.c(size, _i64()))
