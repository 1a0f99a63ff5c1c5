"""Turns at dq's float32 sums: the blocks of a head add to a query tile in a fixed order, so that gradients repeat bit
by bit (FlashAttention-3's deterministic mode waits in the same way).

A counter for each query tile says how many key tiles have been added. The last key tile that a query tile needs comes
first, and the blocks of a head start in that order: with a causal mask each block then finds its turn has come, two
steps after the block before it passed. A block waits only for blocks that started before it, so there is no deadlock.
"""

from typing import Any

from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_flash.kernels.hopper import backward_schedule as schedules
from pallas_flash.kernels.hopper import barriers

__all__ = ["adds_first", "await_turn", "pass_turn"]


def _before(block: Any, tile: Any) -> Any:
    """How many key tiles come before this block's in the order of a query tile."""
    return schedules.kv_range(block.spec, block.schedule, tile).stop - 1 - block.kv_tile


def adds_first(block: Any, tile: Any) -> Any:
    """Whether nothing comes before this block at a query tile: then there is nothing yet to add to."""
    return _before(block, tile) == 0


def await_turn(block: Any, head: Any, tile: Any) -> None:
    """Waits until every key tile that comes before this block's has been added to a query tile. All threads look."""
    _at_counter(block, head, tile, _before(block, tile),
                "{ .reg .pred p; .reg .u32 v; again: ld.acquire.gpu.global.u32 v, [$1]; setp.ne.u32 p, v, $2; "
                "@p bra again; bar.warp.sync -1; mov.u32 $0, v; }")


def pass_turn(block: Any, head: Any, tile: Any, threads: int) -> None:
    """Counts this block's key tile: what `threads` threads have added to the query tile has arrived in memory."""
    _at_counter(block, head, tile, threads - 1,
                "{ .reg .pred p; .reg .u32 t; bar.warp.sync -1; mov.u32 t, %tid.x; and.b32 t, t, $2; "
                "setp.eq.u32 p, t, 0; @p red.release.gpu.global.add.u32 [$1], 1; mov.u32 $0, t; }")


def _at_counter(block: Any, head: Any, tile: Any, number: Any, ptx: str) -> None:
    if barriers.is_interpreted():
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *(barriers.SCALAR,) * 4))
    def emit(_: Any, ref: ir.Value, *numbers: Any) -> None:
        i64 = ir.IntegerType.get_signless(64)
        *place, number = (x.registers.item() for x in numbers)
        shape = ir.MemRefType(ref.type).shape
        index = arith.extui(i64, place[0])
        for size, x in zip(shape[1:], place[1:]):
            index = arith.addi(arith.muli(index, mgpu.utils.c(size, i64)), arith.extui(i64, x))
        address = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [index], barriers.i32())
        llvm.inline_asm(barriers.i32(), [address, number], ptx, "=r,l,r,~{memory}", has_side_effects=True)

    emit(block.gmem["turns"], *map(barriers.scalar, (block.batch, head, tile, number)))
