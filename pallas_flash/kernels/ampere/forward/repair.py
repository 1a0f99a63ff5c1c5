"""Rows that a tile's arithmetic has spoiled: found at the tile's end, and recomputed without tensor cores.

A tile that the mask splits is multiplied whole, with weight 0 where the mask does not keep a pair, and 0 * NaN is NaN,
also in a tensor core. Weights also overflow where the rounding of m_i unit does (`mosaic.scores.overflows`). Such rows
are recomputed by their warp, a key at a time: slow, and exact to rounding. It never happens to finite values, unless
their sums overflow, or scores are larger than 1e8.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_flash import softmax
from pallas_flash.arrays import Array, Bool
from pallas_flash.kernels.ampere import mma, registers, work
from pallas_flash.kernels.ampere.forward.block import Block
from pallas_flash.kernels.ampere.forward.softmax import State
from pallas_flash.kernels.ampere.registers import Fragment, PerRow
from pallas_flash.kernels.ampere.schedule import CHUNK, ROWS
from pallas_flash.kernels.ampere.slow_rows import SlowRows, over_chunks
from pallas_flash.kernels.mosaic import completion, dropout, ptx
from pallas_flash.kernels.mosaic.scheduling import div
from pallas_flash.kernels.mosaic.scores import lowest, may_be_large, overflows, scaled, score_unit
from pallas_flash.kernels.mosaic.types import Flag, Index

__all__ = ["Sums", "repaired"]


class Sums(NamedTuple):
    """What remains of 64 rows, each (64,): the sum of exp2((s - m_i) unit - rounding) is l_i."""

    m_i: PerRow  # in the unit of scores
    rounding: PerRow  # base 2
    l_i: PerRow


def repaired(block: Block, row_tile: int, state: State) -> tuple[Sums, Fragment]:
    """Adds up l_i after the last tile; returns the sums and acc, (64, d_v), recomputed if a row of the warp is spoiled.
    """
    rounding = ptx.multiply_add(state.m_i, -score_unit(block.spec), state.begin, registers.ROW_LAYOUT)
    sums = Sums(state.m_i, rounding, state.l_i.sum(axis=1))
    spoiled = _is_spoiled(block, state, sums.l_i)
    if spoiled is None:
        return sums, state.acc

    def repair(sums: Sums, acc: Fragment) -> tuple[Sums, Fragment]:
        l_i, acc = _recompute(block, row_tile)
        # m_i stays: the backward computes the same product, with the same rounding; a sum in another order differs.
        lost = _overflowed(block, state)
        new = Sums(sums.m_i, jnp.where(lost, 0.0, sums.rounding), jnp.where(lost, l_i, sums.l_i))
        return new, acc * registers.spread(new.l_i * softmax.rescale(l_i), acc.shape[1])

    return lax.cond(spoiled, repair, lambda *whole: whole, sums, state.acc)


def _is_spoiled(block: Block, state: State, l_i: PerRow) -> Flag | None:
    """Whether a row of this warp may have to be recomputed; None if none ever does.

    Rows whose sum of weights is NaN because their scores are NaN are legitimately NaN, and not counted.
    """
    spec, partial = block.spec, work.forward_work(block.spec, block.schedule).partial
    flags = []
    if may_be_large(spec):
        flags.append(ptx.any_in_warp(_overflowed(block, state), registers.ROW_LAYOUT))
    if partial:
        sums = jnp.where(registers.spread(jnp.isnan(l_i), spec.d_v), 0.0, state.acc)
        flags.append(ptx.any_in_warp(jnp.logical_not(jnp.abs(sums) < jnp.inf), registers.TILE))
    if not flags:
        return None
    return flags[0] if len(flags) == 1 else flags[0] | flags[1]


def _overflowed(block: Block, state: State) -> Bool[Array, "64"]:
    """Flags of rows whose weights may have overflowed because their start is rounded."""
    return overflows(block.spec, state.begin) & (state.m_i != lowest(score_unit(block.spec)))


def _recompute(block: Block, row_tile: int) -> tuple[PerRow, Fragment]:
    """Runs the online softmax over the keys that each row attends to, one by one.

    Returns:
      l_i, (64,), and the sum of weighted values, (64, d_v).
    """
    spec, unit, first = block.spec, score_unit(block.spec), block.first + row_tile * ROWS
    own, head = (block.batch, block.head), SlowRows(spec, block.gmem, (block.batch, div(block.head, spec.group)))

    def product(position: Index) -> PerRow:
        def add(chunk: Index, columns: int, total: PerRow) -> PerRow:
            x = mma.load_rows(block.smem["q"].at[pl.ds(chunk, 1)], row_tile * ROWS, 0)[:, :columns]
            return total + (x.astype(jnp.float32) * head.row("k", position, chunk * CHUNK, columns)).sum(axis=1)

        return over_chunks(spec.d, add, registers.row_zeros())

    def add(position: Index, sums: tuple[PerRow, PerRow, Fragment]) -> tuple[PerRow, PerRow, Fragment]:
        m_i, l_i, acc = sums
        s = complete = scaled(spec, product(position))
        if (completed := completion.completion_of_key(spec, block.gmem, own, first, position)) is not None:
            s = complete = completed(s)[0]
        keep = lambda columns: completion.keep(
            spec, block.gmem, own, block.mask.keep(columns, first, position), (first, position), complete)
        s = jnp.where(keep(8), registers.spread(s, 8), -jnp.inf).max(axis=1)
        m_new = jnp.maximum(m_i, s)
        alpha, p = jnp.exp2((m_i - m_new) * unit), jnp.exp2((s - m_new) * unit)
        kept = p
        if spec.dropout_rate:
            kept = jnp.where(dropout.kept_of_key(spec, block.gmem, own, first, position), p, 0.0)
        weighted = registers.spread(kept, spec.d_v) * head.row("v", position, 0, spec.d_v)
        return (m_new, l_i * alpha + p,
                acc * registers.spread(alpha, spec.d_v) + jnp.where(keep(spec.d_v), weighted, 0.0))

    s = block.schedule
    stop = jnp.minimum(block.needed.stop * s.block_kv, spec.kv_len)
    zeros = registers.row_zeros() + lowest(unit), registers.row_zeros(), registers.zeros(spec.d_v)
    return lax.fori_loop(ptx.scalar(block.needed.start * s.block_kv), ptx.scalar(stop), add, zeros)[1:]
