"""How the fused form adds to dq's float32 sums in global memory: by TMA, one query tile at a time; in one order if
`ordered`.

Slots. The tiles of dq that a block makes come through slots of shared memory. Each slot has a warp, which waits until
the slot is full, starts to add it to global memory, and frees it as soon as it has been read. In a slot, dq_full and
dq_free are barriers for each 64 x 64 piece.

Order. Additions in float32 round, so the result depends on their order, which is nondeterministic. If `ordered`, the
blocks of a head add to each query tile in the order in which they were started, so that gradients repeat bit by bit: a
counter for each query tile says how many have added to it. The first one writes instead, so that nothing need be
zeroed. A block waits only for blocks that started before it, so there is no deadlock (FlashAttention-3's deterministic
mode waits in the same way).

An addition is counted when it has arrived in memory, about 2 us after it started. To avoid that wait, few blocks of a
head run at a time (`work.kv_work`), the order of a head's key tiles keeps them apart, and a block makes
the next tiles while one waits in its slot.

If the `first_writes`, there is no order, but nothing need be zeroed either. The number of a query tile is 0 until a
block claims it (1), and 2 when that block's dq has arrived; others add only then. A block claims a tile when all of its
dq lies in the slot, so that nothing keeps it from writing it: no deadlock. Most find a 2 before their dq is there.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_flash.arrays import Array
from pallas_flash.kernels.hopper import memory, registers, wgmma, work
from pallas_flash.kernels.hopper.backward.tiles import Block
from pallas_flash.kernels.hopper.places import Place, locate
from pallas_flash.kernels.hopper.registers import Fragment
from pallas_flash.kernels.hopper.schedule import KvSchedule
from pallas_flash.kernels.mosaic import ptx
from pallas_flash.kernels.mosaic.interpret import interpreted_as
from pallas_flash.kernels.mosaic.scheduling import div, rem
from pallas_flash.kernels.mosaic.types import Flag, Index, Ref
from pallas_flash.kernels.mosaic.walk import HeadAndTile

__all__ = ["add_dq", "hand_dq_over"]


def hand_dq_over(block: Block[KvSchedule], ordinal: Index, piece: Index, dq: Fragment) -> None:
    """Writes a 64 x 64 piece of dq of a step to its slot; `ordinal` steps came before it."""
    piece_index = rem(ordinal, block.schedule.dq_slots) * memory.dq_pieces(block.spec, block.schedule) + piece
    plgpu.barrier_wait(block.bars["dq_free"].at[piece_index])
    registers.store_linear(plgpu.layout_cast(dq, registers.TILE), block.smem["dq"].at[piece_index])
    wgmma.fence()
    plgpu.barrier_arrive(block.bars["dq_full"].at[piece_index])


def add_dq(block: Block[KvSchedule], slot: int) -> None:
    """Runs the warp of a slot, which adds dq of every `dq_slots`-th step to global memory."""
    s, steps, place = block.schedule, block.walk.steps, locate(block.gmem, Place.QUERY, block.batch)
    before_first = None if place.first is None else div(place.first, s.block_q)  # query tiles
    pieces = memory.dq_pieces(block.spec, s)

    def free(i: Index) -> None:
        @pl.when(i < steps)
        def _() -> None:
            for piece in range(pieces):
                plgpu.barrier_arrive(block.bars["dq_free"].at[slot * pieces + piece])

    def step(i: Array, at: HeadAndTile) -> HeadAndTile:
        first = None
        if s.ordered:
            before = work.additions_before(work.worst_case(block.spec, s), block.spec, s, at[1], block.tile)
            await_additions(block, *at, before)
            first = before == 0
        if s.first_writes:
            seen = additions_seen(block, *at)
            for piece in range(pieces):
                plgpu.barrier_wait(block.bars["dq_full"].at[slot * pieces + piece])
            first = claimed(block, *at, seen) == 0
        head, tile = at
        tile = tile if before_first is None else before_first + tile
        for piece in range(pieces):
            source = block.smem["dq"].at[slot * pieces + piece]
            target = block.gmem["dq"].at[place.batch, head, tile, piece]
            if not s.first_writes:
                plgpu.barrier_wait(block.bars["dq_full"].at[slot * pieces + piece])
            add_to_global(source, target, first)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        free((i + 1) * s.dq_slots + slot)
        if s.ordered:
            plgpu.wait_smem_to_gmem(0)
            count_addition(block, *at)
        if s.first_writes and first is not None:
            @pl.when(first)
            def _() -> None:
                plgpu.wait_smem_to_gmem(0)
                count_written(block, *at)

        return block.walk.skip(s.dq_slots, *at)

    free(slot)
    count = div(steps + (s.dq_slots - 1 - slot), s.dq_slots)
    lax.fori_loop(jnp.int32(0), count, step, block.walk.skip(slot, *block.walk.first))
    plgpu.wait_smem_to_gmem(0)
    if s.rounds_dq:
        plgpu.barrier_arrive(block.bars["dq_added"])


def _add_to_global_plain(source: Ref, target: Ref, first: Flag | None = None) -> None:
    target[...] = source[...] + (target[...] if first is None else jnp.where(first, 0.0, target[...]))


@interpreted_as(_add_to_global_plain)
def add_to_global(source: Ref, target: Ref, first: Flag | None = None) -> None:
    """Starts to add a float32 buffer of shared memory to global memory, or to write it there if it is the first;
    `plgpu.wait_smem_to_gmem` waits for it.
    """
    add = functools.partial(plgpu.copy_smem_to_gmem, source, target, reduction_op="add")
    if first is None:
        add()
    else:
        lax.cond(first, lambda: plgpu.copy_smem_to_gmem(source, target), add)


def _await_additions_plain(block: Block[KvSchedule], head: Index, tile: Index, before: Index) -> None:
    """Makes dq NaN where this block would have to wait: interpreted blocks run one after the other, in order."""
    is_next = block.gmem["additions"][block.batch, head, tile] == before
    dq = block.gmem["dq"].at[block.batch, head, tile]
    dq[...] = jnp.where(is_next, dq[...], jnp.nan)


@interpreted_as(_await_additions_plain)
def await_additions(block: Block[KvSchedule], head: Index, tile: Index, before: Index) -> None:
    """Waits until `before` blocks have added to a query tile: this block's addition, by TMA, comes after theirs.

    All lanes of the warp read the counter.
    """
    _at_counter(block, head, tile, before,
                "{ .reg .pred p; .reg .u32 v; again: ld.acquire.gpu.global.u32 v, [$1]; setp.ne.u32 p, v, $2; "
                "@p bra again; bar.warp.sync -1; fence.proxy.async.global; mov.u32 $0, v; }")


def _count_addition_plain(block: Block[KvSchedule], head: Index, tile: Index) -> None:
    block.gmem["additions"][block.batch, head, tile] += 1


@interpreted_as(_count_addition_plain)
def count_addition(block: Block[KvSchedule], head: Index, tile: Index) -> None:
    """Counts this block's addition to a query tile, which must have arrived in memory."""
    _at_counter(block, head, tile, 1,
                "{ .reg .pred p; .reg .u32 t; bar.warp.sync -1; mov.u32 t, %laneid; setp.eq.u32 p, t, 0; "
                "@p red.release.gpu.global.add.u32 [$1], $2; mov.u32 $0, t; }")


def _additions_seen_plain(block: Block[KvSchedule], head: Index, tile: Index) -> Array:
    found: Array = block.gmem["additions"][block.batch, head, tile]
    return found


@interpreted_as(_additions_seen_plain)
def additions_seen(block: Block[KvSchedule], head: Index, tile: Index) -> Array:
    """Reads the number of a query tile: the same for all lanes of the warp."""
    return _at_counter(block, head, tile, 0, "{ .reg .u32 v; ld.acquire.gpu.global.u32 v, [$1]; "
                                             "shfl.sync.idx.b32 $0, v, 0, 31, 0xffffffff; }")


def _claimed_plain(block: Block[KvSchedule], head: Index, tile: Index, seen: Array) -> Array:
    del seen
    return _additions_seen_plain(block, head, tile)


@interpreted_as(_claimed_plain)
def claimed(block: Block[KvSchedule], head: Index, tile: Index, seen: Array) -> Array:
    """Claims a query tile, or waits until the block that claimed it has written. Returns 0 where this one has, else 2.

    One lane claims; all lanes read the number that says that it was written, as any of them may start to add.
    """
    return _at_counter(block, head, tile, seen,
                       "{ .reg .pred p; .reg .u32 t, v; mov.u32 v, $2; setp.eq.u32 p, v, 2; @p bra done; "
                       "mov.u32 t, %laneid; setp.eq.u32 p, t, 0; @p atom.acquire.gpu.global.cas.b32 v, [$1], 0, 1; "
                       "shfl.sync.idx.b32 v, v, 0, 31, 0xffffffff; setp.eq.u32 p, v, 0; @p bra done; "
                       "again: ld.acquire.gpu.global.u32 v, [$1]; setp.ne.u32 p, v, 2; @p bra again; "
                       "done: bar.warp.sync -1; fence.proxy.async.global; mov.u32 $0, v; }")


def _count_written_plain(block: Block[KvSchedule], head: Index, tile: Index) -> None:
    block.gmem["additions"][block.batch, head, tile] = jnp.int32(2)


@interpreted_as(_count_written_plain)
def count_written(block: Block[KvSchedule], head: Index, tile: Index) -> None:
    """Says that what this block wrote of a query tile has arrived in memory."""
    _at_counter(block, head, tile, 2,
                "{ .reg .pred p; .reg .u32 t; bar.warp.sync -1; mov.u32 t, %laneid; setp.eq.u32 p, t, 0; "
                "@p st.release.gpu.global.u32 [$1], $2; mov.u32 $0, t; }")


def _at_counter(block: Block[KvSchedule], head: Index, tile: Index, number: Index, asm: str) -> Array:
    """Emits PTX with the address of a query tile's counter as $1 and a number as $2; returns what it writes to $0."""
    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *(ptx.SCALAR,) * 4),
                       return_type=plgpu.ShapeDtypeStruct((), jnp.int32, ptx.SCALAR))
    def emit(_: mgpu.LaunchContext, ref: ir.Value, *numbers: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        i64 = ir.IntegerType.get_signless(64)
        *indices, number = (x.registers.item() for x in numbers)
        shape = ir.MemRefType(ref.type).shape
        index = arith.extui(i64, indices[0])
        for size, x in zip(shape[1:], indices[1:]):
            index = arith.addi(arith.muli(index, mgpu.utils.c(size, i64)), arith.extui(i64, x))
        address = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [index], ptx.i32())
        found = llvm.inline_asm(ptx.i32(), [address, number], asm, "=r,l,r,~{memory}", has_side_effects=True,
                                convergent=True)
        return mgpu.FragmentedArray.splat(found, (), is_signed=True)

    result: Array = emit(block.gmem["additions"], *map(ptx.scalar, (block.batch, head, tile, number)))
    return result
