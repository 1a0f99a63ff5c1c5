"""Rows whose sum a masked-out value has spoiled, computed again: 0 * NaN is NaN, also in a tensor core.

A tile that the mask splits is multiplied whole, with weight 0 where the mask does not keep a pair; NaN or Inf in such a
value makes the product NaN. It is found at the end of a query tile, from the accumulator. Then one warpgroup adds up
its 64 rows again, a key at a time and without tensor cores: slow, exact to rounding, and never run on finite values.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_flash.kernels.hopper import barriers, products
from pallas_flash.kernels.hopper import schedule as schedules
from pallas_flash.kernels.hopper.forward_softmax import scaled
from pallas_flash.kernels.hopper.forward_tiles import Block, Rows, Tile
from pallas_flash.kernels.hopper.rows_at_rest import RowsAtRest, across
from pallas_flash.kernels.hopper.schedule import ROWS, div

__all__ = ["repaired"]


def repaired(block: Block, tile: Tile, rows: Rows, sums: tuple[Any, Any], acc: Any) -> Any:
    """acc, (64, d_v) in the layout ACC, or the same sums without what the mask hides, if some element is not finite.

    Rows whose sum of weights is NaN stay NaN: nothing is repaired for them. The query must still be in shared memory. A
    barrier of the warpgroup.

    Args:
      sums: m_i and l_i, (64,).
    """
    m_i, l_i = sums
    seen = schedules.steps(block.spec, block.schedule)
    if not (seen.first_masked or seen.later_masked):
        return acc
    acc = plgpu.layout_cast(acc, products.TILE)
    hopeless = across(jnp.isnan(l_i), block.spec.d_v)
    spoiled = barriers.any_nonfinite_in_warpgroup(jnp.where(hopeless, 0.0, acc), products.TILE)
    acc = lax.cond(spoiled, lambda acc: again(block, tile, rows, m_i), lambda acc: acc, acc)
    return plgpu.layout_cast(acc, products.ACC)


def again(block: Block, tile: Tile, rows: Rows, m_i: Any) -> Any:
    """The sum of exp2(s - m_i) v over the keys that each row attends to, (64, d_v)."""
    spec, mask = block.spec, schedules.forward_mask(block.spec, block.schedule)
    own = RowsAtRest(spec, {"q": rows.q()}, block.gmem, (tile.batch, div(tile.head, spec.group)))

    def add(position: Any, acc: Any) -> Any:
        s, unit = scaled(spec, own.dot("q", "k", spec.d, position))
        p = jnp.exp2(s * unit - m_i).astype(spec.dtype).astype(jnp.float32)
        keep = mask.keep(products.positions(spec.d_v, 0, rows.first), position)
        return acc + jnp.where(keep, across(p, spec.d_v) * own.row("v", position, 0, spec.d_v), 0.0)

    block_kv = block.schedule.block_kv
    first, stop = rows.start * block_kv, jnp.minimum(rows.stop * block_kv, spec.kv_len)
    zeros = plgpu.layout_cast(jnp.zeros((ROWS, spec.d_v), jnp.float32), products.TILE)
    return lax.fori_loop(barriers.scalar(first), barriers.scalar(stop), add, zeros)
