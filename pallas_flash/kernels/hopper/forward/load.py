"""The loading warpgroup of the forward kernel: a warp for queries, one for keys and one for values."""

import functools
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_flash.kernels.hopper import schedule as schedules
from pallas_flash.kernels.hopper.forward.tiles import Block, Tile, for_each_tile, global_chunk
from pallas_flash.kernels.mosaic import ptx
from pallas_flash.kernels.mosaic.scheduling import div, rem

__all__ = ["load"]


def load_chunks(block: Block, name: str, place: tuple[Any, Any, Any], slot: Any, full: Any) -> None:
    """Starts to load one tile of q, k or v into a slot of its buffer."""
    _, count, rows, _ = schedules.forward_buffers(block.spec, block.schedule)[name].shape
    for chunk in range(count):
        plgpu.copy_gmem_to_smem(global_chunk(block, name, place, rows, chunk), block.smem[name].at[slot, chunk], full)


def load_query(block: Block, tile: Tile) -> None:
    """Loads the tile's queries, as soon as a buffer is free."""
    buffers = block.schedule.query_buffers
    slot = rem(tile.turn, buffers)

    @pl.when(tile.turn >= buffers)
    def _() -> None:
        plgpu.barrier_wait(block.bars["q_free"].at[slot])

    place = (tile.batch, tile.head, tile.index * block.schedule.block_q)
    load_chunks(block, "q", place, slot, block.bars["q_full"].at[slot])


def load_ring(block: Block, name: str, tile: Tile) -> None:
    """Loads the tile's key tiles (name "k") or value tiles ("v"), last first, as slots become free."""
    stages = block.schedule.num_stages
    full, free = block.bars[f"{name}_full"], block.bars[f"{name}_free"]
    kv_head = div(tile.head, block.spec.group)

    @pl.loop(jnp.int32(0), ptx.scalar(tile.hi - tile.lo))
    def _(i: Any) -> None:
        kv_tile = tile.hi - 1 - i
        slot = tile.slot(kv_tile, stages)

        @pl.when(tile.step + i >= stages)
        def _() -> None:
            plgpu.barrier_wait(free.at[slot])

        load_chunks(block, name, (tile.batch, kv_head, kv_tile * block.schedule.block_kv), slot, full.at[slot])


def drain(block: Block, name: str, used: Any) -> None:
    """Waits until the slots of q, k or v that were loaded last are free too, `used` having been loaded in all."""
    free = block.bars[f"{name}_free"]
    slots = free.shape[0]

    @pl.loop(jnp.maximum(used - slots, 0), used)
    def _(i: Any) -> None:
        plgpu.barrier_wait(free.at[rem(i, slots)])


def await_row(block: Block) -> None:
    """Waits until every compute warpgroup has come to the end of its row."""
    plgpu.barrier_wait(block.bars["row_done"])


def load(block: Block) -> None:
    """The loading warpgroup."""
    walk = functools.partial(for_each_tile, block, gather=functools.partial(await_row, block))
    plgpu.set_max_registers(block.schedule.registers[1], action="decrease")

    @plgpu.warp_map
    def _(warp: Any) -> None:
        @pl.when(warp == 0)
        def _() -> None:
            turns, _ = walk(functools.partial(load_query, block))
            drain(block, "q", turns)

        for number, name in enumerate(("k", "v"), 1):
            @pl.when(warp == number)
            def _(name: str = name) -> None:
                _, steps = walk(functools.partial(load_ring, block, name))
                drain(block, name, steps)
