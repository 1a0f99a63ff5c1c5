"""Rows that a tile's arithmetic has spoiled, found at its end, and computed again without tensor cores.

A tile that the mask splits is multiplied whole, with weight 0 where the mask does not keep a pair, and 0 * NaN is NaN,
also in a tensor core. And weights grow too large, or their sums with the values do, where scores jump far above an m_i
that nobody looked at (`forward_softmax`): such a tile is done again first, with all maxima (`forward_tiles`). Rows that
are spoiled even then, one warpgroup adds up again, a key at a time: slow, exact to rounding, and never run on finite
values, unless scores are so large (1e8 and more) that float32 cannot hold their differences.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_flash.kernels.hopper import barriers, products
from pallas_flash.kernels.hopper import schedule as schedules
from pallas_flash.kernels.hopper.forward_softmax import LOWEST, given_up, scaled
from pallas_flash.kernels.hopper.forward_tiles import Block, Rows, Tile
from pallas_flash.kernels.hopper.rows_at_rest import RowsAtRest, across, no_sums
from pallas_flash.kernels.hopper.schedule import ROWS, div

__all__ = ["again", "is_spoiled"]


def is_spoiled(block: Block, sums: tuple[Any, Any], acc: Any) -> Any:
    """Whether a row of this warpgroup may have to be computed again; None if none ever does. A barrier of the
    warpgroup.

    Rows whose sum of weights is NaN because their scores are stay NaN: nothing is done for them.

    Args:
      sums: m_i and l_i, (64,).
      acc: (64, d_v) in the layout ACC.
    """
    m_i, l_i = sums
    seen, maxima = schedules.steps(block.spec, block.schedule), block.schedule.maxima
    if not (seen.first_masked or seen.later_masked or maxima):
        return None
    hopeless, suspect = jnp.isnan(l_i), plgpu.layout_cast(acc, products.TILE)
    if maxima:
        too_large = given_up(m_i, l_i)
        hopeless = hopeless & jnp.logical_not(too_large)
        suspect = jnp.where(across(too_large, block.spec.d_v), jnp.inf, suspect)
    suspect = jnp.where(across(hopeless, block.spec.d_v), 0.0, suspect)
    return barriers.any_nonfinite_in_warpgroup(suspect, products.TILE)


def again(block: Block, tile: Tile, rows: Rows) -> tuple[Any, Any, Any]:
    """The online softmax over the keys that each row attends to, one by one: m_i and l_i, (64,), and the sum of
    weighted values, (64, d_v).
    """
    spec, mask = block.spec, schedules.forward_mask(block.spec, block.schedule)
    own = RowsAtRest(spec, {"q": rows.q()}, block.gmem, (tile.batch, div(tile.head, spec.group)))

    def add(position: Any, sums: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        m_i, l_i, acc = sums
        keep = lambda columns: mask.keep(products.positions(columns, 0, rows.first), position)
        s, unit = scaled(spec, own.dot("q", "k", spec.d, position))
        s = jnp.where(keep(8), across(s * unit, 8), -jnp.inf).max(axis=1)
        m_new = jnp.maximum(m_i, s)
        alpha, p = jnp.exp2(m_i - m_new), jnp.exp2(s - m_new)
        values = jnp.where(keep(spec.d_v), across(p, spec.d_v) * own.row("v", position, 0, spec.d_v), 0.0)
        return m_new, l_i * alpha + p, acc * across(alpha, spec.d_v) + values

    block_kv = block.schedule.block_kv
    first, stop = rows.start * block_kv, jnp.minimum(rows.stop * block_kv, spec.kv_len)
    zeros = plgpu.layout_cast(jnp.zeros((ROWS, spec.d_v), jnp.float32), products.TILE)
    start = no_sums() + LOWEST, no_sums(), zeros
    return lax.fori_loop(barriers.scalar(first), barriers.scalar(stop), add, start)
