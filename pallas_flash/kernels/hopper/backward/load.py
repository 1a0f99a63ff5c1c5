"""The warp that loads in the kernels that keep keys."""

import functools

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_flash.arrays import Array
from pallas_flash.kernels.hopper import tiles
from pallas_flash.kernels.hopper.backward.copies import is_copied, with_source
from pallas_flash.kernels.hopper.backward.statistics import LOADED
from pallas_flash.kernels.hopper.backward.tiles import KeyBlock
from pallas_flash.kernels.hopper.places import Place, locate
from pallas_flash.kernels.hopper.schedule import CHUNK
from pallas_flash.kernels.mosaic import bias
from pallas_flash.kernels.mosaic.scheduling import rem
from pallas_flash.kernels.mosaic.types import Index
from pallas_flash.kernels.mosaic.walk import HeadAndTile

__all__ = ["load"]


def load_bias(block: KeyBlock, at: HeadAndTile, slot: Index) -> None:
    """Loads the tile of a bias of pairs of a step with its queries: a chunk of 64 keys for each compute warpgroup."""
    s, source, (head, tile) = block.schedule, block.gmem["bias"], at
    place, rows = bias.place(source, block.batch, head), pl.ds(tile * s.block_q, s.block_q)
    for chunk in range(s.block_kv // CHUNK):
        piece = source.at[*place, rows, pl.ds(block.tile * s.block_kv + chunk * CHUNK, CHUNK)]
        plgpu.copy_gmem_to_smem(piece, block.smem["bias"].at[slot, chunk], block.bars["q_full"].at[slot])


def load(block: KeyBlock) -> None:
    """Loads keys and values once; then queries with their statistics, and douts, as slots become free."""
    spec, s, gmem, smem, bars = block.spec, block.schedule, block.gmem, block.smem, block.bars
    names = ("q",) if s.together else ("q", "dout")
    place = locate(gmem, Place.KEY, block.batch)
    keys = (place.batch, block.head, place.row(block.tile * s.block_kv))
    tiles.load_tile(spec, gmem["k"], keys, smem["k"], bars["kv_full"])
    tiles.load_tile(spec, gmem["v"], keys, smem["v"], bars["kv_full"])
    queries = locate(gmem, Place.QUERY, block.batch)

    def step(i: Array, at: HeadAndTile) -> HeadAndTile:
        head, tile = at
        slot, first = rem(i, s.num_stages), queries.row(tile * s.block_q)
        index = (queries.batch, head, first)
        copied = is_copied(gmem, index)

        def load_next(name: str, stats: bool) -> None:
            if name in names:
                tiles.await_free(bars[f"{name}_free"], s.num_stages, i)
            full = bars[f"{name if name in names else 'q'}_full"].at[slot]
            load_from = functools.partial(tiles.load_tile, spec, index=index, target=smem[name].at[slot], full=full)
            with_source(gmem, name, copied, load_from)
            if stats and s.bias_ring:
                load_bias(block, (head, tile), slot)
            if stats:
                source = gmem["stats"].at[queries.batch, head, pl.ds(0, len(LOADED)), pl.ds(first, s.block_q)]
                plgpu.copy_gmem_to_smem(source, smem["stats"].at[slot], full)

        load_next("q", True)
        load_next("dout", False)
        return block.walk.next(head, tile)

    lax.fori_loop(0, block.walk.steps, step, block.walk.first)
    for name in names:
        tiles.see_last_phases(bars[f"{name}_free"], s.num_stages, block.walk.steps)
