"""Rows that a tile's arithmetic has spoiled, found at its end, and computed again without tensor cores.

A tile that the mask splits is multiplied whole, with weight 0 where the mask does not keep a pair, and 0 * NaN is NaN,
also in a tensor core. And weights grow too large, or their sums with the values do, where scores jump far above an m_i
that nobody looked at (`forward.softmax`): such a tile is done again first, with all maxima (`forward.tiles`). Rows that
are spoiled even then, one warpgroup adds up again, a key at a time: slow, exact to rounding, and never run on finite
values, unless their sums overflow, or weights do because scores are larger than 1e8 (`scores.overflows`).
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_flash.kernels.hopper import products
from pallas_flash.kernels.hopper import schedule as schedules
from pallas_flash.kernels.hopper.forward.softmax import Maximum, given_up, lowest
from pallas_flash.kernels.hopper.forward.tiles import Block, Rows, Tile
from pallas_flash.kernels.hopper.schedule import ROWS
from pallas_flash.kernels.hopper.scores import may_be_large, overflows, scaled, score_unit
from pallas_flash.kernels.hopper.slow_rows import RowsAtRest, across, no_sums
from pallas_flash.kernels.mosaic import ptx
from pallas_flash.kernels.mosaic.scheduling import div
from pallas_flash.spec import AttentionSpec

__all__ = ["again", "is_spoiled", "overflowed"]


def is_spoiled(block: Block, maximum: Maximum, l_i: Any, acc: Any) -> Any:
    """Whether a row of this warpgroup may have to be computed again; None if none ever does. A barrier of the
    warpgroup.

    Rows whose sum of weights is NaN because their scores are stay NaN: nothing is done for them.

    Args:
      l_i: (64,).
      acc: (64, d_v) in the layout ACC.
    """
    spec, seen, maxima = block.spec, schedules.steps(block.spec, block.schedule), block.schedule.maxima
    partial = seen.first_masked or seen.later_masked or maxima > 0
    if not (partial or may_be_large(spec)):
        return None
    too_large = overflowed(spec, maximum) if may_be_large(spec) else l_i < 0
    if maxima:
        too_large = too_large | given_up(maximum.m_i, l_i)
    suspect = jnp.where(too_large, jnp.float32(jnp.inf), jnp.float32(0.0))  # float32 in 64-bit mode, too
    if partial:
        hopeless = jnp.isnan(l_i) & jnp.logical_not(too_large)
        sums = jnp.where(across(hopeless, spec.d_v), 0.0, plgpu.layout_cast(acc, products.TILE))
        return ptx.any_nonfinite_in_warpgroup(jnp.where(across(too_large, spec.d_v), jnp.inf, sums), products.TILE)
    return ptx.any_nonfinite_in_warpgroup(suspect, products.ROWS)


def overflowed(spec: AttentionSpec, maximum: Maximum) -> Any:
    """Rows whose weights may have overflowed by the rounding of their start: (64,) flags."""
    return overflows(spec, maximum.start) & (maximum.m_i != lowest(score_unit(spec)))


def again(block: Block, tile: Tile, rows: Rows) -> tuple[Any, Any]:
    """The online softmax over the keys that each row attends to, one by one: l_i, (64,), and the sum of weighted
    values, (64, d_v).
    """
    spec, mask = block.spec, schedules.forward_mask(block.spec, block.schedule)
    unit = score_unit(spec)
    own = RowsAtRest(spec, {"q": rows.q()}, block.gmem, (tile.batch, div(tile.head, spec.group)))

    def add(position: Any, sums: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        m_i, l_i, acc = sums
        keep = lambda columns: mask.keep(products.positions(columns, 0, rows.first), position)
        s = scaled(spec, own.dot("q", "k", spec.d, position))
        s = jnp.where(keep(8), across(s, 8), -jnp.inf).max(axis=1)
        m_new = jnp.maximum(m_i, s)
        alpha, p = jnp.exp2((m_i - m_new) * unit), jnp.exp2((s - m_new) * unit)
        values = jnp.where(keep(spec.d_v), across(p, spec.d_v) * own.row("v", position, 0, spec.d_v), 0.0)
        return m_new, l_i * alpha + p, acc * across(alpha, spec.d_v) + values

    block_kv = block.schedule.block_kv
    first, stop = rows.start * block_kv, jnp.minimum(rows.stop * block_kv, spec.kv_len)
    zeros = plgpu.layout_cast(jnp.zeros((ROWS, spec.d_v), jnp.float32), products.TILE)
    start = no_sums() + lowest(unit), no_sums(), zeros
    return lax.fori_loop(ptx.scalar(first), ptx.scalar(stop), add, start)[1:]
