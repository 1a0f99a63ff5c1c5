"""P^T and dS^T of a part of a query tile, in the kernels that keep keys."""

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
from pallas_flash.kernels.ampere.work import Meets, met_rows
from pallas_flash.kernels.mosaic import completion, dropout, ptx
from pallas_flash.kernels.mosaic.scores import may_be_large, scaled, score_unit, slope
from pallas_flash.kernels.mosaic.types import Flag, Index, Ref
from pallas_flash.kernels.mosaic.walk import Step

__all__ = ["Part", "dp_kept", "drawn", "kept", "needs", "slopes", "statistic", "weights"]


class Part(NamedTuple):
    """Some queries of a step's tile."""

    step: Step
    slot: Index
    start: Index  # of the tile
    flags: tuple[Flag | None, Flag | None]  # whether the tile needs the mask, and exact exponents; None: none does
    meets: tuple[Meets, ...] | None = None  # how each 64 keys meet it, if that is known; flags[0] is None then

    def tiles(self, block: Block) -> tuple[Ref, Ref]:
        """Its queries and douts in shared memory."""
        rows = pl.ds(self.start, block.schedule.part_q)
        q, dout = (block.smem[name].at[self.slot, :, rows] for name in ("q", "dout"))
        return q, dout

    def rows(self, block: Block) -> slice:
        """The tiles of 64 keys which meet it."""
        return slice(0, block.schedule.row_tiles) if self.meets is None else met_rows(self.meets)

    def partial(self, row_tile: int) -> Flag | bool:
        """Whether 64 keys need the mask."""
        if self.meets is not None:
            return self.meets[row_tile] is Meets.PARTLY
        return False if self.flags[0] is None else self.flags[0]


def needs(block: Block, step: Step, slot: Index) -> tuple[Flag | None, Flag | None]:
    """Whether a tile needs the mask, and exact exponents because a query is large; None where no tile ever does."""
    spec = block.spec
    s = block.schedule
    some = work.kv_work(spec, s).partial and not work.first_tiles(spec, s)
    partial = block.walk.partial(step.tile) if some else None
    if not may_be_large(spec):
        return partial, None
    own = block.smem["stats"].at[slot, int(Statistics.LSE), pl.ds(0, 8)]
    return partial, is_marked(plgpu.load(own, layout=COLUMN_LAYOUT), COLUMN_LAYOUT)


def statistic(block: Block, part: Part, row: Statistics) -> Fragment:
    """A statistic of the part's queries, in every row: (64, part_q)."""
    own = block.smem["stats"].at[part.slot, int(row), pl.ds(part.start, block.schedule.part_q)]
    return registers.stack(plgpu.load(own, layout=COLUMN_LAYOUT))


def corrected(block: Block, part: Part, row_tile: int, y: Fragment) -> Fragment:
    """Adds to exponents what lse lost in its rounding, if a query is large, and hides pairs, if the tile is partial."""
    large, s = part.flags[1], block.schedule
    first = ptx.opaque(part.step.tile * s.block_q + part.start)

    def exact(y: Fragment) -> Fragment:
        index = block.batch, part.step.head, int(Statistics.ROUNDING)
        return y + registers.stack(registers.load_row(block.gmem["stats"], index, first, s.part_q))

    if large is not None:
        y = lax.cond(large, exact, lambda y: y, y)
    if part.partial(row_tile) is not False:
        y = block.mask.of_head(part.step.head).hide(y, (first, block.first_key(row_tile)), 0)
    return y


def weights(block: Block, part: Part, row_tile: int, x: Fragment) -> tuple[Fragment, Fragment]:
    """P^T, and P^T times the slope of the soft cap, from x = K Q^T of the part."""
    spec, s = block.spec, scaled(block.spec, x)
    first = part.step.tile * block.schedule.block_q + part.start, block.first_key(row_tile)
    completed = completion.completion(spec, block.gmem, (block.batch, part.step.head), first, 0)
    complete, own_slope = (s, None) if completed is None else completed(s)
    y = complete * score_unit(spec) - statistic(block, part, Statistics.LSE)
    flags = [flag for flag in part.flags if flag is not None]
    if part.partial(row_tile) is True:
        y = corrected(block, part, row_tile, y)
    elif flags:
        needed = flags[0] if len(flags) == 1 else flags[0] | flags[1]
        y = lax.cond(needed, lambda y: corrected(block, part, row_tile, y), lambda y: y, y)
    p = jnp.exp2(y)
    return p, slope(spec, s, p if own_slope is None else jnp.where(p == 0, 0.0, p * own_slope))


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


def slopes(block: Block, part: Part, row_tile: int, p: Fragment, dp: Fragment) -> Fragment:
    """dS^T = P^T * dP^T. In a tile that needs the mask, and where any tile may hide pairs, 0 where P is: a hidden value
    may be so large that dP overflows, and 0 * inf is NaN.
    """
    plain, guarded = lambda p, dp: p * dp, lambda p, dp: jnp.where(p == 0, 0.0, p * dp)
    partial = part.partial(row_tile)
    if completion.hides_pairs(block.spec) or partial is True:
        return guarded(p, dp)
    return plain(p, dp) if partial is False else lax.cond(partial, guarded, plain, p, dp)
