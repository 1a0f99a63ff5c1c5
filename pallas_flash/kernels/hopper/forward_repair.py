"""Rows that a bad value has spoiled without belonging to them, computed again without tensor cores.

A tile that the mask splits is multiplied whole, with weight 0 where the mask does not keep a pair, and 0 * NaN is NaN,
also in a tensor core. That is found at the end of a query tile. Then one warpgroup adds up its 64 rows again, a key at
a time: slow, exact to rounding, and never run on finite values.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_flash.kernels.hopper import barriers, products
from pallas_flash.kernels.hopper import schedule as schedules
from pallas_flash.kernels.hopper.forward_softmax import LOWEST, scaled
from pallas_flash.kernels.hopper.forward_tiles import Block, Rows, Tile
from pallas_flash.kernels.hopper.rows_at_rest import RowsAtRest, across
from pallas_flash.kernels.hopper.schedule import ROWS, div

__all__ = ["repaired"]


def repaired(block: Block, tile: Tile, rows: Rows, sums: tuple[Any, Any], acc: Any,
             lost: Any) -> tuple[tuple[Any, Any], Any]:
    """m_i, l_i and acc, (64, d_v) in the layout ACC: as they are, or computed again if some of them is not finite.

    Rows whose sum of weights is NaN because their scores are stay NaN: nothing is repaired for them, nor for any if
    they are `lost`. The query must still be in shared memory. A barrier of the warpgroup.

    Args:
      sums: m_i and l_i, (64,).
    """
    m_i, l_i = sums
    seen = schedules.steps(block.spec, block.schedule)
    if not (seen.first_masked or seen.later_masked):
        return sums, acc
    acc = plgpu.layout_cast(acc, products.TILE)
    hopeful = jnp.where(across(jnp.isnan(l_i), block.spec.d_v), 0.0, acc)
    spoiled = barriers.any_nonfinite_in_warpgroup(hopeful, products.TILE)
    if lost is not None:
        spoiled = spoiled & jnp.logical_not(lost)
    m_i, l_i, acc = lax.cond(spoiled, lambda *_: again(block, tile, rows), lambda *whole: whole, m_i, l_i, acc)
    return (m_i, l_i), plgpu.layout_cast(acc, products.ACC)


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
    zeros = lambda shape, layout: plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)
    start = (zeros((ROWS,), products.ROWS) + LOWEST, zeros((ROWS,), products.ROWS),
             zeros((ROWS, spec.d_v), products.TILE))
    return lax.fori_loop(barriers.scalar(first), barriers.scalar(stop), add, start)
