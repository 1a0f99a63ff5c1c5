"""P^T and dS^T of a part of a query tile, in the kernels that keep keys."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_flash.arrays import Array, Bool
from pallas_flash.kernels.ampere import registers, work
from pallas_flash.kernels.ampere.backward.block import Block
from pallas_flash.kernels.ampere.backward.statistics import Statistics, is_marked
from pallas_flash.kernels.ampere.registers import COLUMN_LAYOUT, Fragment
from pallas_flash.kernels.mosaic import completion, dropout, ptx
from pallas_flash.kernels.mosaic.scores import may_be_large, scaled, score_unit, slope
from pallas_flash.kernels.mosaic.types import Flag, Index, Ref
from pallas_flash.kernels.mosaic.walk import Step

__all__ = ["Part", "dp_kept", "drawn", "kept", "needs", "statistic", "weights", "weights_and_slopes"]


class Part(NamedTuple):
    """Some queries of a step's tile."""

    step: Step
    slot: Index
    start: Index  # of the tile
    flags: tuple[Flag | None, Flag | None]  # whether the tile needs the mask, and exact exponents; None: none does

    def tiles(self, block: Block) -> tuple[Ref, Ref]:
        """Its queries and douts in shared memory."""
        rows = pl.ds(self.start, block.schedule.part_q)
        q, dout = (block.smem[name].at[self.slot, :, rows] for name in ("q", "dout"))
        return q, dout


def needs(block: Block, step: Step, slot: Index) -> tuple[Flag | None, Flag | None]:
    """Whether a tile needs the mask, and exact exponents because a query is large; None where no tile ever does."""
    spec = block.spec
    partial = block.walk.partial(step.tile) if work.kv_work(spec, block.schedule).partial else None
    if not may_be_large(spec):
        return partial, None
    own = block.smem["stats"].at[slot, int(Statistics.LSE), pl.ds(0, 8)]
    return partial, is_marked(plgpu.load(own, layout=COLUMN_LAYOUT), COLUMN_LAYOUT)


def statistic(block: Block, part: Part, row: Statistics) -> Fragment:
    """A statistic of the part's queries, in every row: (64, part_q)."""
    own = block.smem["stats"].at[part.slot, int(row), pl.ds(part.start, block.schedule.part_q)]
    return registers.stack(plgpu.load(own, layout=COLUMN_LAYOUT))


def corrected(block: Block, part: Part, row_tile: int, y: Fragment, *dps: Fragment) -> tuple[Fragment, ...]:
    """Adds to exponents what lse lost in its rounding, if a query is large, and hides pairs, if the tile is partial; of
    a hidden pair dP is 0: its value may be so large that dP overflows, and 0 * inf is NaN.
    """
    (partial, large), s = part.flags, block.schedule
    first = ptx.opaque(part.step.tile * s.block_q + part.start)

    def exact(y: Fragment) -> Fragment:
        index = block.batch, part.step.head, int(Statistics.ROUNDING)
        return y + registers.stack(registers.load_row(block.gmem["stats"], index, first, s.part_q))

    if large is not None:
        y = lax.cond(large, exact, lambda y: y, y)
    if partial is not None:
        y = block.mask.of_head(part.step.head).hide(y, (first, block.first_key(row_tile)), 0)
        dps = tuple(jnp.where(y == -jnp.inf, 0.0, dp) for dp in dps)
    return y, *dps


def corrected_where_needed(block: Block, part: Part, row_tile: int, y: Fragment, *dps: Fragment) -> tuple[
        Fragment, ...]:
    """`corrected` in one branch, which most tiles jump over."""
    flags = [flag for flag in part.flags if flag is not None]
    if not flags:
        return y, *dps
    needed = flags[0] if len(flags) == 1 else flags[0] | flags[1]
    found: tuple[Fragment, ...] = lax.cond(
        needed, functools.partial(corrected, block, part, row_tile), lambda *same: same, y, *dps)
    return found


def exponents(block: Block, part: Part, row_tile: int, x: Fragment) -> tuple[Fragment, Callable[[Fragment], Fragment]]:
    """Those of P^T, from x = K Q^T of the part, not `corrected`; and what makes of P^T its product with the slope of
    the soft cap and of a score function.
    """
    spec, s = block.spec, scaled(block.spec, x)
    first = part.step.tile * block.schedule.block_q + part.start, block.first_key(row_tile)
    completed = completion.completion(spec, block.gmem, (block.batch, part.step.head), first, 0)
    complete, own_slope = (s, None) if completed is None else completed(s)
    sloped = lambda p: slope(spec, s, p if own_slope is None else jnp.where(p == 0, 0.0, p * own_slope))
    return complete * score_unit(spec) - statistic(block, part, Statistics.LSE), sloped


def weights(block: Block, part: Part, row_tile: int, x: Fragment) -> Fragment:
    """P^T, from x = K Q^T of the part."""
    y, _ = exponents(block, part, row_tile, x)
    (y,) = corrected_where_needed(block, part, row_tile, y)
    return jnp.exp2(y)


def weights_and_slopes(block: Block, part: Part, row_tile: int, x: Fragment, dp: Fragment) -> tuple[Fragment, Fragment]:
    """P^T, and dS^T = P^T * dP^T with the slope of scores, from x = K Q^T and dP^T of the part."""
    y, sloped = exponents(block, part, row_tile, x)
    if completion.hides_pairs(block.spec):  # in any tile
        (y,) = corrected_where_needed(block, part, row_tile, y)
        p = jnp.exp2(y)
        return p, jnp.where(p == 0, 0.0, sloped(p) * dp)
    y, dp = corrected_where_needed(block, part, row_tile, y, dp)
    p = jnp.exp2(y)
    return p, sloped(p) * dp


def drawn(block: Block, part: Part, row_tile: int) -> Bool[Array, "64 n"] | None:
    """Which weights of the part dropout keeps; None: all."""
    if not block.spec.dropout_rate:
        return None
    first = part.step.tile * block.schedule.block_q + part.start, block.first_key(row_tile)
    draws = dropout.draws(block.spec, block.gmem, (block.batch, part.step.head), first, 0)
    return dropout.kept(draws, block.schedule.part_q)


def kept(flags: Bool[Array, "64 n"] | None, p: Fragment) -> Fragment:
    """Zeroes the weights that dropout drops (`drawn`)."""
    return p if flags is None else jnp.where(flags, p, 0.0)


def dp_kept(block: Block, part: Part, flags: Bool[Array, "64 n"] | None, dp: Fragment) -> Fragment:
    """Takes the product out of dP where dropout drops a weight (`drawn`)."""
    return dp if flags is None else jnp.where(flags, dp, statistic(block, part, Statistics.DELTA))
