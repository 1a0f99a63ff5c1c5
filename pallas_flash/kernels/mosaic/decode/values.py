"""Values with weight 0 that are NaN or infinite, in tiles that the mask splits: 0 * NaN is NaN, in a tensor core too.

Where all queries of a head attend to the same keys, which are an interval, what lies outside of it is zeroed in shared
memory. Where they differ, what is not finite is zeroed as well, and added, a key at a time, to the rows of the queries
that do attend to it: their result is not finite either, and that of the others is right. It costs something in those
tiles only where there are such values.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_flash.arrays import Array
from pallas_flash.filled import Filled
from pallas_flash.kernels.mosaic import ptx
from pallas_flash.kernels.mosaic.decode.rows import CHUNK, key_positions
from pallas_flash.kernels.mosaic.decode.work import Head
from pallas_flash.kernels.mosaic.fragments import Fragment, concatenate, load_row, spread, stack
from pallas_flash.kernels.mosaic.interpret import interpreted_as
from pallas_flash.kernels.mosaic.mask_rules import INTERVAL_RULES
from pallas_flash.kernels.mosaic.scheduling import div, rem
from pallas_flash.kernels.mosaic.types import Flag, Index, Ref
from pallas_flash.spec import AttentionSpec

__all__ = ["add_bad", "clean", "key_index", "queries_differ", "zero_outside"]

_UNIT = 8
"""Elements of 16 bits that a thread takes at a time: 16 bytes. A row of a chunk is eight of them, in the order of the
swizzle, which does not matter here.
"""
_Transforms = tuple[plgpu.SwizzleTransform, ...]
_EXPONENTS = {"bf16": 0x7F80, "f16": 0x7C00}
"""The bits that are all set in what is not finite."""


def queries_differ(spec: AttentionSpec) -> bool:
    """Whether one query of a head may attend to a key that another one does not, between keys that both attend to; or
    none, which only rules that are not of intervals do. A bias may hide any key.
    """
    rules = [rule for part in spec.mask.parts for rule in (part.rule.parts if isinstance(part, Filled) else (part,))]
    return spec.q_len > 1 or spec.bias is not None or not all(type(rule) in INTERVAL_RULES for rule in rules)


def _units(ref: ir.Value, chunks: int, count: int) -> list[tuple[ir.Value, ir.Value]]:
    """The row and the address of each unit that this thread has of (chunks, count, 64) in shared memory."""
    const = lambda value: mgpu.utils.c(value, ptx.i32())
    thread = arith.remui(ptx.moved(mgpu.utils.thread_idx()), const(ptx.WARPGROUP))
    row, column = arith.divui(thread, const(8)), arith.muli(arith.remui(thread, const(8)), const(_UNIT))
    found = []
    for first in range(0, count, ptx.WARPGROUP // 8):
        own = arith.addi(row, const(first))
        for chunk in range(chunks):
            at = arith.addi(arith.addi(arith.muli(own, const(CHUNK)), column), const(chunk * _stride(ref)))
            element = ir.MemRefType(ref.type).element_type
            found.append((own, mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [at], element)))
    return found


def _stride(ref: ir.Value) -> int:
    """Elements from one chunk of columns to the next."""
    strides, _ = ir.MemRefType(ref.type).get_strides_and_offset()
    return strides[0]


def _outside(row: ir.Value, lo: mgpu.FragmentedArray, hi: mgpu.FragmentedArray) -> ir.Value:
    below = arith.cmpi(arith.CmpIPredicate.slt, row, lo.registers.item())
    return arith.ori(below, arith.cmpi(arith.CmpIPredicate.sge, row, hi.registers.item()))


def _zero_outside_plain(ref: Ref, lo: Index, hi: Index, transforms: _Transforms = ()) -> None:
    del transforms
    row = lax.broadcasted_iota(jnp.int32, ref.shape, 1)
    ref[...] = jnp.where((row >= lo) & (row < hi), ref[...], jnp.zeros((), ref.dtype))


@interpreted_as(_zero_outside_plain)
def zero_outside(ref: Ref, lo: Index, hi: Index, transforms: _Transforms = ()) -> None:
    """Zeroes the rows outside of [lo, hi) of (chunks, rows, 64) in shared memory, which has the transforms. A barrier
    of the warpgroup must follow, with a fence if products read as TMA does.
    """
    chunks, count, _ = ref.shape

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(transforms), ptx.SCALAR, ptx.SCALAR))
    def zero(_: mgpu.LaunchContext, ref: ir.Value, lo: mgpu.FragmentedArray, hi: mgpu.FragmentedArray) -> None:
        zero = mgpu.utils.c(0, ptx.i32())
        for row, address in _units(ref, chunks, count):
            mgpu.utils.inline_ptx("st.shared.v4.b32 [$0], {$1, $1, $1, $1};", address, zero,
                                  predicate=_outside(row, lo, hi), has_side_effects=True)

    zero(ref, ptx.scalar(lo), ptx.scalar(hi))


def _clean_plain(ref: Ref, lo: Index, hi: Index, transforms: _Transforms = ()) -> Flag:
    del transforms
    _zero_outside_plain(ref, lo, hi)
    is_finite = jnp.isfinite(ref[...])
    ref[...] = jnp.where(is_finite, ref[...], jnp.zeros((), ref.dtype))
    return jnp.logical_not(jnp.all(is_finite))


@interpreted_as(_clean_plain)
def clean(ref: Ref, lo: Index, hi: Index, transforms: _Transforms = ()) -> Flag:
    """`zero_outside`, and zeroes what is not finite in the other rows. Returns whether there was any such element, the
    same in all threads of the warpgroup.
    """
    chunks, count, _ = ref.shape

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(transforms), ptx.SCALAR, ptx.SCALAR),
                       return_type=plgpu.ShapeDtypeStruct((), jnp.bool_, ptx.SCALAR))
    def scan(_: mgpu.LaunchContext, ref: ir.Value, lo: mgpu.FragmentedArray,
             hi: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        four = ir.VectorType.get((4,), ptx.i32())
        const = lambda value: mgpu.utils.c(value, ptx.i32())
        exponent = _EXPONENTS[str(ir.MemRefType(ref.type).element_type)]
        any_bad = const(0)
        for row, address in _units(ref, chunks, count):
            words, kept = llvm.load(four, address), []
            keep = arith.select(_outside(row, lo, hi), const(0), const(-1))
            for i in range(4):
                word = arith.andi(vector.extract(words, [], [i]), keep)
                for half in (0, 16):
                    bits = const(np.int32(np.uint32(exponent << half)).item())
                    is_bad = arith.cmpi(arith.CmpIPredicate.eq, arith.andi(word, bits), bits)
                    own = const(np.int32(np.uint32(0xFFFF << half)).item())
                    bad = arith.select(is_bad, own, const(0))
                    any_bad, word = arith.ori(any_bad, bad), arith.andi(word, arith.xori(bad, const(-1)))
                kept.append(word)
            llvm.store(vector.from_elements(four, kept), address)
        found = ptx.or_in_warpgroup(arith.cmpi(arith.CmpIPredicate.ne, any_bad, const(0)))
        return mgpu.FragmentedArray.splat(found, (), is_signed=False)

    return scan(ref, ptx.scalar(lo), ptx.scalar(hi))


def add_bad(weights: Fragment, acc: Fragment, ref: Ref,
            index: Callable[[Index], tuple[Index, Index, Index]], bands: int = 1) -> Fragment:
    """Adds the values that are not finite to the rows that have weights for them.

    Args:
      weights: (64, keys of a band) float32 in the layout TILE, -inf where a query does not attend to a key.
      acc: (64, d_v) float32 in the layout TILE.
      ref: the values, in global memory.
      index: where the value of a key lies in it, all axes but the last.
    """
    key, dim = key_positions(weights.shape[1], 0, bands), acc.shape[1]

    def one(i: Array, acc: Fragment) -> Fragment:
        own, place = jnp.where(key == i, weights, -jnp.inf).max(axis=1), index(i)

        def added(first: int) -> Fragment:  # few columns at a time: registers are scarce
            stop = min(first + CHUNK, dim)
            value = load_row(ref, place, first, stop - first).astype(jnp.float32)
            bad = jnp.where(jnp.abs(value) < jnp.inf, 0.0, value)
            weight = spread(own, stop - first)
            return acc[:, first:stop] + jnp.where(weight == -jnp.inf, 0.0, weight * stack(bad))

        return concatenate([added(first) for first in range(0, dim, CHUNK)])

    return lax.fori_loop(jnp.int32(0), jnp.int32(bands * weights.shape[1]), one, acc)


def key_index(spec: AttentionSpec, gmem: dict[str, Ref], head: Head, key: Index) -> tuple[Index, Index, Index]:
    """Where a key of a head lies in k and v, or some other key if there is none."""
    batch, kv_head = head
    key = jnp.minimum(key, spec.kv_len - 1)
    if spec.pages is not None:
        page = gmem["page_table"][batch, div(key, spec.pages.size)]
        batch, key = jnp.clip(page, 0, spec.pages.number - 1), rem(key, spec.pages.size)
    return (batch, key, kv_head) if spec.layout == "BLHD" else (batch, kv_head, key)
