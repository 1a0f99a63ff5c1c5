"""How the fused form adds to dq's float32 sums in global memory: by TMA, a query tile at a time, in turns if `ordered`.

Slots. The tiles of dq that a block makes come through slots of shared memory, each in the care of a warp of its own,
which waits until the slot is full, starts to add it to memory, and frees it as soon as it has been read. In a slot,
dq_full and dq_free are barriers for each 64 x 64 piece.

Turns. Additions in float32 round, so their order shows. If `ordered`, the blocks of a head come to each query tile in
the order in which they were started, so that gradients repeat bit by bit: a counter for each query tile says how many
have added to it. The first one writes instead, so that nothing need be zeroed. A block waits only for blocks that
started before it, so there is no deadlock (FlashAttention-3's deterministic mode waits in the same way).

That a turn has passed is known about 2 us after an addition started: it must have arrived in memory. So that nobody
waits that long, few blocks of a head are at work at a time (`backward_schedule.kv_work`), the order of a head's key
tiles keeps them apart, and a block makes the next tiles while one waits in its slot.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_flash.kernels.hopper import backward_schedule as schedules
from pallas_flash.kernels.hopper import products
from pallas_flash.kernels.hopper.backward import products as grad_products
from pallas_flash.kernels.mosaic import ptx
from pallas_flash.kernels.mosaic.interpret import interpreted_as
from pallas_flash.kernels.mosaic.scheduling import div, rem

__all__ = ["add_dq", "hand_dq_over"]


def hand_dq_over(block: Any, step: Any, piece: Any, dq: Any) -> None:
    """Writes a 64 x 64 piece of the dq of the step with that number to its slot."""
    index = rem(step, block.schedule.dq_slots) * schedules.dq_pieces(block.spec, block.schedule) + piece
    plgpu.barrier_wait(block.bars["dq_free"].at[index])
    grad_products.store_linear(plgpu.layout_cast(dq, products.TILE), block.smem["dq"].at[index])
    grad_products.fence()
    plgpu.barrier_arrive(block.bars["dq_full"].at[index])


def add_dq(block: Any, slot: int) -> None:
    """The warp that takes a slot of dq to global memory: every `dq_slots`-th step."""
    s, steps = block.schedule, block.walk.steps
    pieces = schedules.dq_pieces(block.spec, s)

    def free(i: Any) -> None:
        @pl.when(i < steps)
        def _() -> None:
            for piece in range(pieces):
                plgpu.barrier_arrive(block.bars["dq_free"].at[slot * pieces + piece])

    def step(i: Any, at: tuple[Any, Any]) -> tuple[Any, Any]:
        first = None
        if s.ordered:
            place = schedules.turn(block.spec, s, at[1], block.kv_tile)
            await_turn(block, *at, place)
            first = place == 0
        for piece in range(pieces):
            source, target = block.smem["dq"].at[slot * pieces + piece], block.gmem["dq"].at[block.batch, *at, piece]
            plgpu.barrier_wait(block.bars["dq_full"].at[slot * pieces + piece])
            grad_products.add_to_global(source, target, first)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        free((i + 1) * s.dq_slots + slot)
        if s.ordered:
            plgpu.wait_smem_to_gmem(0)
            pass_turn(block, *at)
        return block.walk.skip(s.dq_slots, *at)

    free(slot)
    count = div(steps + (s.dq_slots - 1 - slot), s.dq_slots)
    lax.fori_loop(jnp.int32(0), count, step, block.walk.skip(slot, *block.walk.first))
    plgpu.wait_smem_to_gmem(0)


def _await_turn_plain(block: Any, head: Any, tile: Any, place: Any) -> None:
    """Makes dq NaN where it is not this block's turn: interpreted blocks run one after the other, in order."""
    in_turn = block.gmem["turns"][block.batch, head, tile] == place
    dq = block.gmem["dq"].at[block.batch, head, tile]
    dq[...] = jnp.where(in_turn, dq[...], jnp.nan)


@interpreted_as(_await_turn_plain)
def await_turn(block: Any, head: Any, tile: Any, place: Any) -> None:
    """Waits until `place` blocks have added to a query tile: then this block's addition, by TMA, comes after theirs.

    All lanes of the warp read the counter.
    """
    _at_counter(block, head, tile, place,
                "{ .reg .pred p; .reg .u32 v; again: ld.acquire.gpu.global.u32 v, [$1]; setp.ne.u32 p, v, $2; "
                "@p bra again; bar.warp.sync -1; fence.proxy.async.global; mov.u32 $0, v; }")


def _pass_turn_plain(block: Any, head: Any, tile: Any) -> None:
    block.gmem["turns"][block.batch, head, tile] += 1


@interpreted_as(_pass_turn_plain)
def pass_turn(block: Any, head: Any, tile: Any) -> None:
    """Counts this block: what this warp has added to the query tile has arrived in memory."""
    _at_counter(block, head, tile, 1,
                "{ .reg .pred p; .reg .u32 t; bar.warp.sync -1; mov.u32 t, %laneid; setp.eq.u32 p, t, 0; "
                "@p red.release.gpu.global.add.u32 [$1], $2; mov.u32 $0, t; }")


def _at_counter(block: Any, head: Any, tile: Any, number: Any, asm: str) -> None:
    """Inline PTX with the address of a query tile's counter as $1 and a number as $2; $0 is written and not used."""
    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *(ptx.SCALAR,) * 4))
    def emit(_: Any, ref: ir.Value, *numbers: Any) -> None:
        i64 = ir.IntegerType.get_signless(64)
        *place, number = (x.registers.item() for x in numbers)
        shape = ir.MemRefType(ref.type).shape
        index = arith.extui(i64, place[0])
        for size, x in zip(shape[1:], place[1:]):
            index = arith.addi(arith.muli(index, mgpu.utils.c(size, i64)), arith.extui(i64, x))
        address = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [index], ptx.i32())
        llvm.inline_asm(ptx.i32(), [address, number], asm, "=r,l,r,~{memory}", has_side_effects=True,
                        convergent=True)

    emit(block.gmem["turns"], *map(ptx.scalar, (block.batch, head, tile, number)))
