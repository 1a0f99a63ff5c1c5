"""Results of 64 rows that go on from those of the same queries over other keys: what XLA would do in a pass of its own,
which reads and writes each result once more.

The online softmax does not begin with nothing, but with what the state says of its rows: out is the accumulator, lse
the maximum. So rows of the state are asked for as a tile begins, and first needed behind its first softmax: nothing
waits for them.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_flash import softmax
from pallas_flash.arrays import Array, Bool
from pallas_flash.kernels.hopper import registers, tiles
from pallas_flash.kernels.hopper.forward.softmax import Earlier, exponents_of
from pallas_flash.kernels.hopper.forward.tiles import Block, Rows, Tile
from pallas_flash.kernels.hopper.places import Place, locate
from pallas_flash.kernels.hopper.registers import Fragment, PerRow
from pallas_flash.kernels.mosaic import ptx
from pallas_flash.kernels.mosaic.scores import unit
from pallas_flash.kernels.mosaic.types import Index

__all__ = ["accumulator", "load", "real", "store"]


def real(block: Block, rows: Rows) -> Bool[Array, ""]:
    """Whether a warpgroup has rows of this part; where tiles do not divide it, those of another may lie behind them."""
    return ptx.scalar(rows.first) < block.spec.q_len


def load(block: Block, tile: Tile, rows: Rows) -> tuple[Earlier, Fragment]:
    """What the state has of a warpgroup's rows: the sums of their weights, and out, (64, d_v) in the layout TILE."""
    lse, rest, out = _loaded(block, tile, rows)
    unit_, nothing = unit(block.spec), lse == -jnp.inf
    start = softmax.finite_or_zero(softmax.reference_point(lse, unit_))
    m_i = start + rest  # the maximum itself where scores are so large that it hides the sum
    left = ((start - m_i) + rest) * exponents_of(block.spec).unit
    return Earlier(jnp.where(nothing, exponents_of(block.spec).lowest, m_i), jnp.where(nothing, -jnp.inf, left)), out


def accumulator(rows: Rows, before: Fragment) -> Fragment:
    """The accumulator that a tile begins with, in the layout ACC, from the state's out in the layout TILE: zeros in
    rows that have met no key, of which the state may hold anything.
    """
    assert rows.earlier is not None
    nothing = registers.spread(rows.earlier.left == -jnp.inf, before.shape[1])
    return plgpu.layout_cast(jnp.where(nothing, 0.0, before), registers.ACC)


def _loaded(block: Block, tile: Tile, rows: Rows) -> tuple[PerRow, PerRow, Fragment]:
    """lse, its rest and out of rows that are real; of others, nothing."""
    def found() -> tuple[PerRow, PerRow, Fragment]:
        line, first, index = _place(block, tile, rows)
        stats = block.gmem["state_stats"]
        lse, rest = (registers.load_row_stats(stats, line + i, first, stats.shape[3], 0.0) for i in (0, 1))
        return lse, rest, tiles.load_rows(block.spec, block.gmem["state_out"], index, block.spec.d_v)

    def none() -> tuple[PerRow, PerRow, Fragment]:
        zeros = plgpu.layout_cast(jnp.zeros((64, block.spec.d_v), jnp.float32), registers.TILE)
        return registers.row_zeros() - jnp.inf, registers.row_zeros(), zeros

    return found() if block.all_rows_are_real else lax.cond(real(block, rows), found, none)


def store(block: Block, tile: Tile, rows: Rows, stats: tuple[PerRow, PerRow], out: Fragment) -> None:
    """Writes statistics, and out (64, d_v) in the layout TILE, to the rows of the state that "places" names.

    No other warpgroup of the launch may have the same rows of the state.
    """
    line, first, index = _place(block, tile, rows)
    state = block.gmem["state_stats"]
    for i, x in enumerate(stats):
        registers.store_row_stats(x, state, line + i, first, state.shape[3])
    tiles.store_rows(block.spec, out, block.gmem["state_out"], index)


def _place(block: Block, tile: Tile, rows: Rows) -> tuple[Index, Index, tuple[Index, Index, Index, int]]:
    """Where the rows lie in the state: the line of lse in its statistics and the first row there, and in out."""
    place = locate(block.gmem, Place.STATE, tile.batch)
    first = place.row(rows.first)
    return 2 * (place.batch * block.spec.q_heads + tile.head), first, (place.batch, tile.head, first, 0)
