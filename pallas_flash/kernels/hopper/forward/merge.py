"""Results of 64 rows merged, in registers, into those of the same queries over other keys: what XLA would do in a pass
of its own, which reads and writes each result once more.
"""

from pallas_flash import softmax
from pallas_flash.kernels.hopper import registers, tiles
from pallas_flash.kernels.hopper.forward.tiles import Block, Rows, Tile
from pallas_flash.kernels.hopper.places import Place, locate
from pallas_flash.kernels.hopper.registers import Fragment, PerRow
from pallas_flash.kernels.mosaic.scores import unit

__all__ = ["merge"]


def merge(block: Block, tile: Tile, rows: Rows, stats: tuple[PerRow, PerRow], out: Fragment) -> None:
    """Merges statistics, and out (64, d_v) in the layout TILE, into the rows of the state that "places" names.

    No other warpgroup of the launch may have the same rows of the state. All loads are issued before the first is used.
    """
    spec, state = block.spec, block.gmem["state_stats"]
    place = locate(block.gmem, Place.STATE, tile.batch)
    first, length = place.row(rows.first), state.shape[3]
    line, index = 2 * (place.batch * spec.q_heads + tile.head), (place.batch, tile.head, first, 0)
    before = tiles.load_rows(spec, block.gmem["state_out"], index, spec.d_v)
    lse, rest = (registers.load_row_stats(state, line + i, first, length, 0.0) for i in (0, 1))
    merged, old, new = softmax.merge_rows((lse, rest), stats, unit(spec))
    for i, x in enumerate(merged):
        registers.store_row_stats(x, state, line + i, first, length)
    out = before * registers.spread(old, spec.d_v) + out * registers.spread(new, spec.d_v)
    tiles.store_rows(spec, out, block.gmem["state_out"], index)
