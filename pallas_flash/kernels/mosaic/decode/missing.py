"""Lengths above the capacity, and pages that are not there: whether a sequence has lost keys,
looked up by the warpgroup that computes.
"""

import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_flash.kernels.mosaic import ptx
from pallas_flash.kernels.mosaic.decode.work import Segment
from pallas_flash.kernels.mosaic.interpret import interpreted_as
from pallas_flash.kernels.mosaic.scheduling import div
from pallas_flash.kernels.mosaic.types import Flag, Index, Ref
from pallas_flash.spec import AttentionSpec

__all__ = ["any_missing", "has_lost_keys"]

def has_lost_keys(spec: AttentionSpec, block_kv: int, gmem: dict[str, Ref], segment: Segment) -> Flag:
    """Whether the sequence has lost keys, as far as a worker sees it: the length is too large, or a page of the
    segment's keys is missing. The first segment also looks at the pages before its own, the last at those after.
    """
    pages, length = spec.pages, segment.sequence.length
    is_full: Flag = length > spec.kv_len
    if pages is None:
        return is_full
    used = div(jnp.clip(length, 0, spec.kv_len) + (pages.size - 1), pages.size)
    start, stop = (tile * block_kv for tile in (segment.first, segment.first + segment.num_tiles))
    lo = jnp.where(segment.part == 0, 0, div(start, pages.size))
    hi = jnp.where(segment.part == segment.parts - 1, used, jnp.minimum(div(stop + (pages.size - 1), pages.size), used))
    return is_full | any_missing(gmem["page_table"], segment.head.batch, (lo, hi), pages.number)


_AT_ONCE = 4
"""Entries that a thread loads before it looks at one of them."""


def _any_missing_plain(table: Ref, batch: Index, pages: tuple[Index, Index], number: int) -> Flag:
    row, place = table[batch], jnp.arange(table.shape[1], dtype=jnp.int32)
    is_asked = (place >= pages[0]) & (place < pages[1])
    return jnp.any(is_asked & ((row < 0) | (row >= number)))


@interpreted_as(_any_missing_plain)
def any_missing(table: Ref, batch: Index, pages: tuple[Index, Index], number: int) -> Flag:
    """Returns whether a row of the page table has an entry outside [0, number) at one of the places [lo, hi), uniform
    over the warpgroup. It is a barrier of the warpgroup, too.
    """
    count = table.shape[1]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *(ptx.SCALAR,) * 3),
                       return_type=plgpu.ShapeDtypeStruct((), jnp.bool_, ptx.SCALAR))
    def search(_: mgpu.LaunchContext, ref: ir.Value, *scalars: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        const = lambda value: mgpu.utils.c(value, ptx.i32())
        batch, lo, hi = (x.registers.item() for x in scalars)
        thread = arith.remui(ptx.moved(mgpu.utils.thread_idx()), const(ptx.WARPGROUP))
        row = arith.muli(arith.extui(_i64(), batch), mgpu.utils.c(count, _i64()))
        step = _AT_ONCE * ptx.WARPGROUP
        rounds = arith.divsi(arith.addi(arith.subi(hi, lo), const(step - 1)), const(step))

        @mgpu.utils.fori(rounds, const(0))
        def is_missing(i: ir.Value, any_: ir.Value) -> ir.Value:
            first, entries = arith.addi(arith.addi(lo, thread), arith.muli(i, const(step))), []
            for own in range(_AT_ONCE):
                place = arith.addi(first, const(own * ptx.WARPGROUP))
                index = arith.addi(row, arith.extui(_i64(), arith.minsi(place, arith.subi(hi, const(1)))))
                address = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [index], ptx.i32())
                entries.append(llvm.load(ptx.i32(), address))
            for entry in entries:  # unsigned: a negative one is large
                is_outside = arith.cmpi(arith.CmpIPredicate.uge, entry, const(number))
                any_ = arith.ori(any_, arith.extui(ptx.i32(), is_outside))
            return any_

        found = ptx.or_in_warpgroup(arith.cmpi(arith.CmpIPredicate.ne, is_missing.result, const(0)))
        return mgpu.FragmentedArray.splat(found, (), is_signed=False)

    return search(table, *map(ptx.scalar, (batch, *pages)))


def _i64() -> ir.Type:
    return ir.IntegerType.get_signless(64)
