"""The loading warpgroup of the forward kernel: a warp for queries, one for keys and one for values; and one that takes
tiles, where they are taken.
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_flash.kernels.hopper import tiles
from pallas_flash.kernels.hopper.forward.counter import for_each_taken, take
from pallas_flash.kernels.hopper.forward.tiles import Block, Tile, for_each_tile
from pallas_flash.kernels.hopper.places import Place, locate
from pallas_flash.kernels.hopper.schedule import CHUNK, chunks
from pallas_flash.kernels.mosaic import bias, ptx
from pallas_flash.kernels.mosaic.scheduling import div
from pallas_flash.kernels.mosaic.types import Index

__all__ = ["load", "walk"]


def load_query(block: Block, tile: Tile) -> None:
    """Loads the tile's queries, as soon as a buffer is free."""
    slot = tiles.await_free(block.bars["q_free"], block.schedule.query_buffers, tile.ordinal)
    place = locate(block.gmem, Place.QUERY, tile.batch)
    index = (place.batch, tile.head, place.row(tile.q_tile * block.schedule.block_q))
    tiles.load_tile(block.spec, block.gmem["q"], index, block.smem["q"].at[slot], block.bars["q_full"].at[slot])


def load_ring(block: Block, name: str, tile: Tile) -> None:
    """Loads the tile's key tiles (name "k") or value tiles ("v"), last first, as slots become free; with the key tiles,
    those of a bias of pairs that has a ring.
    """
    full, free = block.bars[f"{name}_full"], block.bars[f"{name}_free"]
    kv_head, place = div(tile.head, block.spec.group), locate(block.gmem, Place.KEY, tile.batch)

    @pl.loop(jnp.int32(0), ptx.scalar(tile.hi - tile.lo))
    def _(i: Index) -> None:
        slot = tiles.await_free(free, block.schedule.num_stages, tile.step + i)
        index = (place.batch, kv_head, place.row((tile.hi - 1 - i) * block.schedule.block_kv))
        tiles.load_tile(block.spec, block.gmem[name], index, block.smem[name].at[slot], full.at[slot])
        if name == "k" and block.schedule.bias_slots:
            load_bias(block, tile, i)


def load_bias(block: Block, tile: Tile, i: Index) -> None:
    """Loads the tile of a bias of pairs of step `i`."""
    s, source = block.schedule, block.gmem["bias"]
    slot = tiles.await_free(block.bars["bias_free"], s.bias_slots, tile.step + i)
    batch, head = bias.place(source, tile.batch, tile.head)
    rows, first = pl.ds(tile.q_tile * s.block_q, s.block_q), (tile.hi - 1 - i) * s.block_kv
    for chunk in range(chunks(s.block_kv)):
        piece = source.at[batch, head, rows, pl.ds(first + chunk * CHUNK, CHUNK)]
        plgpu.copy_gmem_to_smem(piece, block.smem["bias"].at[slot, chunk], block.bars["bias_full"].at[slot])


def walk(block: Block, body: Callable[[Tile], None], gather: Callable[[], None],
         warpgroup: Index | None = None, is_last: bool = False) -> tuple[Index, Index]:
    """Runs `body` on every tile of this block; see `for_each_tile` and `for_each_taken`."""
    if block.takes_tiles:
        return for_each_taken(block, body, warpgroup, is_last)
    return for_each_tile(block, body, gather)


def await_row(block: Block) -> None:
    """Waits until every compute warpgroup has reached the end of its row."""
    plgpu.barrier_wait(block.bars["row_done"])


def load(block: Block) -> None:
    """Runs the loading warpgroup."""
    each = functools.partial(walk, block, gather=functools.partial(await_row, block))
    plgpu.set_max_registers(block.schedule.registers[1], action="decrease")

    @plgpu.warp_map
    def _(warp: Index) -> None:
        @pl.when(warp == 0)
        def _() -> None:
            count, _ = each(functools.partial(load_query, block))
            tiles.drain(block.bars["q_free"], count)

        for number, name in enumerate(("k", "v"), 1):
            @pl.when(warp == number)
            def _(name: str = name) -> None:
                _, steps = each(functools.partial(load_ring, block, name), is_last=name == "k")
                tiles.drain(block.bars[f"{name}_free"], steps)
                if name == "k" and block.schedule.bias_slots:
                    tiles.drain(block.bars["bias_free"], steps)

        if block.takes_tiles:
            pl.when(warp == 3)(functools.partial(take, block))
