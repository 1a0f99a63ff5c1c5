"""Rows that a tile's arithmetic has spoiled: found at the tile's end, and recomputed without tensor cores.

A tile that the mask splits is multiplied whole, with weight 0 where the mask does not keep a pair, and 0 * NaN is NaN,
also in a tensor core. Weights, or their sums with the values, also overflow where scores jump far above an m_i that was
not updated (`forward.softmax`): such a tile is first done again with all maxima (`forward.tiles`). Rows that are
spoiled even then are recomputed by one warpgroup, a key at a time: slow, and exact to rounding. It never happens to
finite values, unless their sums overflow, or weights do because scores are larger than 1e8 (`scores.overflows`).
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_flash.arrays import Array, Bool
from pallas_flash.kernels.hopper import registers, work
from pallas_flash.kernels.hopper.forward import merge
from pallas_flash.kernels.hopper.forward.softmax import Maximum, exponents_of, given_up
from pallas_flash.kernels.hopper.forward.tiles import Block, Rows, Tile
from pallas_flash.kernels.hopper.registers import Fragment, PerRow
from pallas_flash.kernels.hopper.schedule import ROWS_PER_WARPGROUP
from pallas_flash.kernels.hopper.slow_rows import SlowRows
from pallas_flash.kernels.mosaic import dropout, ptx
from pallas_flash.kernels.mosaic.bias import HeadBias
from pallas_flash.kernels.mosaic.scheduling import div
from pallas_flash.kernels.mosaic.score_function import HeadScore
from pallas_flash.kernels.mosaic.scores import is_far, may_be_large, overflows, scaled, score_unit
from pallas_flash.kernels.mosaic.types import Flag, Index
from pallas_flash.spec import AttentionSpec

__all__ = ["is_spoiled", "overflowed", "recompute"]


def is_spoiled(block: Block, maximum: Maximum, l_i: PerRow, acc: Fragment) -> Flag | None:
    """Whether a row of this warpgroup may have to be recomputed; None if none ever does. A barrier of the warpgroup.

    Rows whose sum of weights is NaN because their scores are NaN are legitimately NaN, and not counted.

    Args:
      l_i: (64,).
      acc: (64, d_v) in the layout ACC.
    """
    spec, seen, maxima = block.spec, work.steps(block.spec, block.schedule), block.schedule.maxima
    partial = seen.first_masked or seen.later_masked or maxima > 0
    if not (partial or may_be_large(spec)):
        return None
    none = l_i < 0  # a sum of weights is never negative
    if is_far(spec):  # nothing overflows; a score may be NaN where the bias hides the pair
        return ptx.any_nonfinite_in_warpgroup(plgpu.layout_cast(acc, registers.TILE), registers.TILE)
    too_large = overflowed(spec, maximum) if may_be_large(spec) else none
    if maxima:
        too_large = too_large | given_up(maximum.m_i, l_i)
    if not partial:
        marks = jnp.where(too_large, jnp.float32(jnp.inf), jnp.float32(0.0))  # float32 in 64-bit mode, too
        return ptx.any_nonfinite_in_warpgroup(marks, registers.ROW_LAYOUT)
    is_nan = jnp.isnan(l_i) & jnp.logical_not(too_large)
    sums = jnp.where(registers.spread(is_nan, spec.d_v), 0.0, plgpu.layout_cast(acc, registers.TILE))
    sums = jnp.where(registers.spread(too_large, spec.d_v), jnp.inf, sums)
    return ptx.any_nonfinite_in_warpgroup(sums, registers.TILE)


def overflowed(spec: AttentionSpec, maximum: Maximum) -> Bool[Array, "64"]:
    """Flags of rows whose weights may have overflowed because their start is rounded."""
    return overflows(spec, maximum.start) & (maximum.m_i != exponents_of(spec).lowest)


def kept_pairs(block: Block, tile: Tile, columns: int, place: tuple[Index, Index]) -> Bool[Array, "64 n"]:
    """Whether each of 64 queries attends to a key, in each of so many columns.

    Args:
      place: the positions of the first query and of the key.
    """
    kept = tile.mask.keep(columns, *place)
    if block.spec.bias is None:
        return kept
    return HeadBias(block.spec, block.gmem, tile.batch, tile.head).keep(kept, *place)


def recompute(block: Block, tile: Tile, rows: Rows) -> tuple[PerRow, PerRow, Fragment]:
    """Runs the online softmax over the keys that each row attends to, one by one.

    Returns:
      m_i and l_i, (64,), and the sum of weighted values, (64, d_v).
    """
    spec, unit = block.spec, score_unit(block.spec)
    own = SlowRows(spec, {"q": rows.q()}, block.gmem, (tile.batch, div(tile.head, spec.group)))

    def add(position: Index, sums: tuple[PerRow, PerRow, Fragment]) -> tuple[PerRow, PerRow, Fragment]:
        m_i, l_i, acc = sums
        keep = lambda columns: kept_pairs(block, tile, columns, (rows.first, position))
        s = scaled(spec, own.dot("q", "k", spec.d, position))
        if spec.score is not None:
            s, _ = HeadScore(spec, block.gmem, tile.batch, tile.head).of_key(s, rows.first, position)
        if spec.bias is not None:
            s = HeadBias(spec, block.gmem, tile.batch, tile.head).added_to_key(s, rows.first, position)
        seen = s
        s = jnp.where(keep(8), registers.spread(s, 8), -jnp.inf).max(axis=1)
        m_new = jnp.maximum(m_i, s)
        alpha, p = jnp.exp2((m_i - m_new) * unit), jnp.exp2((s - m_new) * unit)
        kept = p
        if spec.dropout_rate:
            place = (tile.batch, tile.head), rows.first, position
            kept = jnp.where(dropout.kept_of_key(spec, block.gmem, *place), p, 0.0)
        attends = keep(spec.d_v)
        if spec.score is not None:  # which may hide the pair
            attends = attends & (registers.spread(seen, spec.d_v) != -jnp.inf)
        values = jnp.where(attends, registers.spread(kept, spec.d_v) * own.row("v", position, 0, spec.d_v), 0.0)
        return m_new, l_i * alpha + p, acc * registers.spread(alpha, spec.d_v) + values

    block_kv = block.schedule.block_kv
    first, stop = rows.start * block_kv, jnp.minimum(rows.stop * block_kv, spec.kv_len)
    zeros = plgpu.layout_cast(jnp.zeros((ROWS_PER_WARPGROUP, spec.d_v), jnp.float32), registers.TILE)
    start = registers.row_zeros() + exponents_of(spec).lowest, registers.row_zeros(), zeros
    if rows.earlier is not None:
        (m_i, left), out = merge.load(block, tile, rows)
        l_i = jnp.exp2(left)
        start = m_i, l_i, jnp.where(registers.spread(l_i == 0, spec.d_v), 0.0, out * registers.spread(l_i, spec.d_v))
    return lax.fori_loop(ptx.scalar(first), ptx.scalar(stop), add, start)
