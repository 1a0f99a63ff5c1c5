"""The order in which blocks add to dq's float32 sums, where gradients are to repeat bit by bit in the fused form.

Additions in float32 round, so a sum depends on their order. With `BackwardSchedule.ordered` the blocks of a head add to
each query tile in the order of their key tiles: a counter for each query tile says how many have added.

No deadlock, however many more blocks the grid has than are resident. The blocks that a block waits for have lower
numbers: `work.kv_work` gives key tiles in ascending order. A GPU starts blocks in the order of their numbers, and none
leaves its SM before it ends. So of the blocks that have not ended, that of the lowest number has started and waits for
none: it ends, and after it the next. CUDA does not promise that blocks start in this order, but its GPUs do so; the
Hopper kernels stand on it, too.

All blocks of a head walk the query tiles from the last to the first, and at each tile the heads of a group. With a
causal mask the longest blocks, those of the first keys, still start first, and all meet the same tile at the same step:
a block waits in its first step, as long as additions take to be seen, and then finds that its turn has come. (Head by
head, a block of few tiles would wait at each head for one of many: by a model 1.6 times as long for groups of 4.)

An addition is counted when the next step begins: a block that waits for it goes on as soon as that can be.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_flash.arrays import Array
from pallas_flash.kernels.ampere import work
from pallas_flash.kernels.ampere.backward.block import Block
from pallas_flash.kernels.mosaic import ptx
from pallas_flash.kernels.mosaic.interpret import interpreted_as
from pallas_flash.kernels.mosaic.types import Index, Ref
from pallas_flash.kernels.mosaic.walk import Descending, Step

__all__ = ["Turn", "count_last", "count_previous", "turn_of"]


class Turn(NamedTuple):
    """When a block may add to a query tile: once its counter says that `before` blocks have."""

    counters: Ref  # (query tiles,) int32 of a head, in global memory
    tile: Index
    before: Index


def turn_of(block: Block, step: Step) -> Turn | None:
    """When the block may add to a step's query tile; None: in any order."""
    if not block.schedule.ordered:
        return None
    before = work.additions_before(block.spec, block.schedule, step.tile, block.tile)
    return Turn(block.gmem["additions"].at[block.batch, step.head], step.tile, before)


def count_previous(block: Block, step: Step) -> None:
    """Counts what the block added in the step before this one, since which all its threads have met."""
    walk = block.walk
    if isinstance(walk, Descending):
        @pl.when(step.ordinal > 0)
        def count() -> None:
            _count(block, *walk.previous(step.head, step.tile))


def count_last(block: Block) -> None:
    """Counts what the block added in its last step, since which all its threads have met."""
    walk = block.walk
    if isinstance(walk, Descending):
        @pl.when(walk.steps > 0)
        def count() -> None:
            _count(block, *walk.last)


def _count(block: Block, head: Array, tile: Array) -> None:
    _count_addition(block.gmem["additions"].at[block.batch, head], tile, block.team.warpgroup)


def _count_addition_plain(counters: Ref, tile: Index, warpgroup: Index) -> None:
    @pl.when(jnp.asarray(warpgroup) == 0)
    def count() -> None:
        counters[tile] += 1


@interpreted_as(_count_addition_plain)
def _count_addition(counters: Ref, tile: Index, warpgroup: Index) -> None:
    """Adds 1 to a counter, by one thread of the block; whoever acquires it sees what all threads of the block did
    before they met.
    """
    del warpgroup

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), ptx.SCALAR))
    def count(_: mgpu.LaunchContext, counters: ir.Value, tile: mgpu.FragmentedArray) -> None:
        const = lambda value: mgpu.utils.c(value, ptx.i32())
        address = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(counters), [tile.registers.item()], ptx.i32())
        is_first = arith.cmpi(arith.CmpIPredicate.eq, mgpu.utils.thread_idx(), const(0))
        llvm.inline_asm(
            ptx.i32(), [address, arith.extui(ptx.i32(), is_first)],
            "{ .reg .pred p; setp.ne.u32 p, $2, 0; @p red.release.gpu.global.add.u32 [$1], 1; bar.warp.sync -1; "
            "mov.u32 $0, $2; }", "=r,l,r,~{memory}", has_side_effects=True, convergent=True)

    count(counters, ptx.scalar(tile))
