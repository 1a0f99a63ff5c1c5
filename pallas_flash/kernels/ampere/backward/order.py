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

An addition is counted when the next step begins: a block that waits for it goes on as soon as that can be. Either
every warp waits before it adds, or one does earlier, before all meet (`BackwardSchedule.one_waits`).
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
from pallas_flash.kernels.ampere.copies import Team
from pallas_flash.kernels.mosaic import ptx
from pallas_flash.kernels.mosaic.interpret import interpreted_as
from pallas_flash.kernels.mosaic.types import Index, Ref
from pallas_flash.kernels.mosaic.walk import Descending, Step

__all__ = ["Turn", "await_turn", "count_last", "count_previous", "turn_of"]

_WARP = 32
"""Threads of a warp."""


class Turn(NamedTuple):
    """When a block may add to a query tile: once its counter says that `before` blocks have."""

    counters: Ref  # (query tiles,) int32 of a head, in global memory
    tile: Index
    before: Index


def turn_of(block: Block, step: Step) -> Turn | None:
    """When the block may add to a step's query tile; None: in any order, or its turn has come (`await_turn`)."""
    if not block.schedule.ordered or block.schedule.one_waits:
        return None
    return _turn(block, step)


def await_turn(block: Block, step: Step) -> None:
    """Waits, if `one_waits`, until the additions to the step's query tile that come before the block's are counted.
    What any thread of the block adds after all have met comes after these.
    """
    if block.schedule.one_waits:
        _await(_turn(block, step), block.gmem["dq_sums"].at[block.batch, step.head, step.tile], block.team)


def _turn(block: Block, step: Step) -> Turn:
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


def _await_plain(turn: Turn, sums: Ref, team: Team) -> None:
    """Makes dq NaN where this block would have to wait: interpreted blocks run one after the other, in order."""
    @pl.when(jnp.asarray(team.warpgroup) == 0)
    def check() -> None:
        sums[...] = jnp.where(turn.counters[turn.tile] == turn.before, sums[...], jnp.nan)


@interpreted_as(_await_plain)
def _await(turn: Turn, sums: Ref, team: Team) -> None:
    """Waits for a turn: the last warp of the block does, while the others go on to the barrier.

    Why that is enough, by PTX' memory model. The block before met at a barrier after its additions, then one of its
    threads counted with red.release. A thread of this warp reads that count with ld.acquire, so it comes after all of
    them; and the barrier where this block meets next orders all its threads after this one. Causality order is
    transitive over both barriers and the pair of release and acquire, whose scope, the GPU, holds both blocks.

    The first warp is busy at that time: it counts. On 9.0 ld.acquire is a load and an instruction that makes L1 forget
    what it holds, and waits for the load: one warp of the block does both, and no other one waits for them.
    """
    del sums

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), ptx.SCALAR, ptx.SCALAR))
    def wait(_: mgpu.LaunchContext, counters: ir.Value, tile: mgpu.FragmentedArray,
             before: mgpu.FragmentedArray) -> None:
        address = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(counters), [tile.registers.item()], ptx.i32())
        first = mgpu.utils.c(team.threads - _WARP, ptx.i32())
        waits = arith.cmpi(arith.CmpIPredicate.uge, mgpu.utils.thread_idx(), first)
        llvm.inline_asm(
            ptx.i32(), [address, before.registers.item(), arith.extui(ptx.i32(), waits)],
            "{ .reg .pred p; .reg .u32 v; setp.eq.u32 p, $3, 0; @p bra come; again: ld.acquire.gpu.global.u32 v, [$1]; "
            "setp.ne.u32 p, v, $2; @p bra again; come: bar.warp.sync -1; mov.u32 $0, $3; }", "=r,l,r,r,~{memory}",
            has_side_effects=True, convergent=True)

    wait(turn.counters, ptx.scalar(turn.tile), ptx.scalar(turn.before))


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
