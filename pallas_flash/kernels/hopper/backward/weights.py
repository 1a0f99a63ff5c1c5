"""P of a tile from products and statistics; in the kernels that keep keys P^T, from K Q^T."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_flash import softmax
from pallas_flash.arrays import Array, Bool
from pallas_flash.kernels.hopper import registers, wgmma, work
from pallas_flash.kernels.hopper.backward.statistics import Statistics, is_marked, without_mark
from pallas_flash.kernels.hopper.backward.tiles import KeyBlock
from pallas_flash.kernels.hopper.places import Place, locate
from pallas_flash.kernels.hopper.registers import Fragment, PerColumn
from pallas_flash.kernels.hopper.schedule import ROWS_PER_WARPGROUP, KvSchedule
from pallas_flash.kernels.mosaic import bias, dropout, ptx
from pallas_flash.kernels.mosaic.completion import Completed, Exponents, completion
from pallas_flash.kernels.mosaic.head_mask import HeadMask
from pallas_flash.kernels.mosaic.scores import is_far, lowest, may_be_large, scaled, score_unit, slope
from pallas_flash.kernels.mosaic.types import Flag, Index
from pallas_flash.kernels.mosaic.walk import Step
from pallas_flash.spec import AttentionSpec

__all__ = ["Corrections", "Kept", "Large", "Lse", "Pairs", "Weights", "kept_of", "lse_of", "rounded", "score_gradients",
           "start_of_dp", "tile_weights", "weights", "without_overflow"]


class Pairs(NamedTuple):
    """The pairs of a (64, n) tile of scores."""

    mask: HeadMask
    first: tuple[Index, Index]  # position of the first query and of the first key
    keys_dim: int  # the axis that runs over keys
    partial: Flag | None  # whether the tile needs the mask; None if no tile does

    def masked(self, y: Fragment) -> Fragment:
        """Sets exponents to -inf where the mask does not keep a pair."""
        return self.mask.hide(y, self.first, self.keys_dim)


class Large(NamedTuple):
    """Exact exponents for tiles in which a query is large (`scores`)."""

    needed: Flag | None  # whether one is; None if none ever is
    exact: Callable[[Exponents], Exponents]  # from exponents


class Corrections(NamedTuple):
    """Corrections to the exponents of few tiles: exact ones where queries are large, and the mask.

    All of it is in one branch: nothing else may stand between products in flight.
    """

    large: Large
    pairs: Pairs | None = None  # None: all are kept
    apart: bool = False  # tiles that need something compute their exponentials, too, in the branch (`KvSchedule`)

    def weights(self, s: Exponents, exponents: Callable[[Exponents], Exponents],
                power: Callable[[Exponents], Exponents]) -> Exponents:
        """Computes power(exponents(s)), corrected."""
        partial = None if self.pairs is None else self.pairs.partial
        flags = [flag for flag in (partial, self.large.needed) if flag is not None]
        if not flags:
            return power(exponents(s))
        needed = functools.reduce(jnp.logical_or, flags)
        if not self.apart:
            return power(lax.cond(needed, self._corrected, lambda y: y, exponents(s)))
        return lax.cond(needed, lambda s: power(self._corrected(exponents(s))), lambda s: power(exponents(s)), s)

    def _corrected(self, y: Exponents) -> Exponents:
        if self.large.needed is not None:
            y = lax.cond(self.large.needed, self.large.exact, lambda y: y, y)
        if self.pairs is None or self.pairs.partial is None:
            return y
        return self.pairs.masked(y)


def weights(spec: AttentionSpec, x: Exponents, lse: Exponents, corrections: Corrections,
            shift: float = 0.0, completed: Completed | None = None) -> tuple[Exponents, Exponents]:
    """Computes P, and P times the slope of scores, from products of queries and keys; both times 2^shift.

    Args:
      x: in the layout TILE.
      lse: in the shape of x, as `Statistics.LSE` has it.
      completed: applies the score function, or adds the bias; None: there is none.
    """
    s, unit = scaled(spec, x), score_unit(spec)
    complete, own_slope = (s, None) if completed is None else completed(s)
    if is_far(spec):
        exponents = lambda s: (s - without_mark(lse)) * unit
    else:
        exponents = lambda s: s * unit - lse
    p = corrections.weights(complete, exponents, lambda y: jnp.exp2(y + shift if shift else y))
    return p, slope(spec, s, p if own_slope is None else jnp.where(p == 0, 0.0, p * own_slope))


def score_gradients(block: KeyBlock, step: Step, p: Fragment, dp: Fragment) -> Fragment:
    """Computes dS of a step from P times the slope, and from dP - delta.

    It is 0 where P is, also where dP is beyond float32: values that a mask hides may be any number. Only tiles that
    need the mask pay for it, in a branch. All tiles do with a soft cap, where the branch makes ptxas spill at d 128;
    with run-time masks, unless tiles that need them are `apart` and there is no dropout (8 bytes); and where a bias or
    a score function may hide pairs in any tile. Where `is_repaired_rounded`, this is left to `without_overflow`.
    """
    spec, partial = block.spec, partial_of(block, step)
    guarded = lambda p, dp: jnp.where(p == 0, 0.0, p * dp)
    is_apart = isinstance(block.schedule, KvSchedule) and block.schedule.apart and not spec.dropout_rate
    anywhere = (spec.mask.has_arrays and not is_apart) or spec.bias is not None or spec.score is not None
    if anywhere or (spec.softcap is not None and partial is not None):
        return guarded(p, dp)
    if partial is None or is_repaired_rounded(block):
        return p * dp
    return lax.cond(partial, guarded, lambda p, dp: p * dp, p, dp)


def is_repaired_rounded(block: KeyBlock) -> bool:
    """Whether dS is set to 0, where P is, after both were rounded: in the fused form's pipelined step, behind whose
    rounding stands a branch anyhow; between exponentials and products, one keeps ptxas from interleaving them.

    P must then be that of the scores, without dropout. In bfloat16 it rounds to 0 only where it is 0.
    """
    spec, s = block.spec, block.schedule
    plain = spec.softcap is None and spec.score is None and not spec.dropout_rate and not spec.mask.has_arrays
    return plain and spec.dtype == jnp.bfloat16 and isinstance(s, KvSchedule) and s.makes_dq and s.pipelined


def without_overflow(block: KeyBlock, step: Step, p: Fragment, ds: Fragment) -> Fragment:
    """Sets dS to 0 where P is, both in the input's type, in tiles that need the mask; see `score_gradients`."""
    partial = partial_of(block, step)
    if partial is None or not is_repaired_rounded(block):
        return ds
    zeroed = lambda p, ds: jnp.where(p.astype(jnp.float32) == 0, 0.0, ds.astype(jnp.float32)).astype(ds.dtype)
    return lax.cond(partial, zeroed, lambda p, ds: ds, p, ds)


class Weights(NamedTuple):
    """P^T and dS^T of a tile, in the input's type, not yet multiplied with its dout and its query."""

    p: Fragment
    ds: Fragment


def rounded(block: KeyBlock, step: Step, p: Fragment, ds: Fragment) -> Weights:
    """Rounds the weights of a step's tile to the input's type."""
    p, ds = p.astype(block.spec.dtype), ds.astype(block.spec.dtype)
    return Weights(p, without_overflow(block, step, p, ds))


def partial_of(block: KeyBlock, step: Step) -> Flag | None:
    """Returns whether the tile of a step needs the mask; None if no tile does."""
    return block.walk.partial(step.tile) if work.kv_work(block.spec, block.schedule).partial else None


class Lse(NamedTuple):
    """lse of a slot's queries."""

    log2: PerColumn
    is_large: Flag | None  # whether one is large (`scores`); None if none ever is


def lse_of(block: KeyBlock, slot: Index) -> Lse:
    """Loads lse of a slot's queries, which must have come.

    It comes before products are issued: behind them, its latency would add to the wait for them (5 % in heads of 64).
    """
    stats = block.smem["stats"].at[slot, int(Statistics.LSE)]
    log2 = plgpu.load(stats, layout=registers.COLUMN_LAYOUT)
    if not may_be_large(block.spec):
        return Lse(log2, None)
    layout = registers.COLUMN_LAYOUT
    marks = (is_marked(plgpu.load(stats.at[pl.ds(i, 8)], layout=layout), layout)
             for i in range(0, block.schedule.block_q, ROWS_PER_WARPGROUP))
    return Lse(log2, functools.reduce(jnp.logical_or, marks))


def start_of_dp(block: KeyBlock, slot: Index) -> Fragment:
    """Loads -delta of a slot's queries into every row of an accumulator."""
    stats = block.smem["stats"].at[slot, int(Statistics.DELTA)]
    return wgmma.settled(registers.stack(plgpu.load(stats, layout=registers.COLUMN_LAYOUT)))


class Kept(NamedTuple):
    """Which weights of a tile dropout keeps."""

    flags: Bool[Array, "64 n"] | None  # None: there is no dropout
    start: Callable[[], Fragment]  # what the accumulator of dP started at

    def weights(self, p: Fragment) -> Fragment:
        """Zeroes the weights p that are dropped."""
        return p if self.flags is None else jnp.where(self.flags, p, 0.0)

    def dp(self, dp: Fragment) -> Fragment:
        """Takes the product out of dP - delta where a weight is dropped."""
        return dp if self.flags is None else jnp.where(self.flags, dp, self.start())


def kept_of(block: KeyBlock, warpgroup: Index, step: Step) -> Kept:
    """Draws for the weights P^T of a step."""
    s = block.schedule

    def start() -> Fragment:
        stats = block.smem["stats"].at[step.slot(s.num_stages), int(Statistics.DELTA)]
        return registers.stack(plgpu.load(stats, layout=registers.COLUMN_LAYOUT))

    if not block.spec.dropout_rate:
        return Kept(None, start)
    first = step.tile * s.block_q, block.tile * s.block_kv + warpgroup * ROWS_PER_WARPGROUP
    draws = dropout.draws(block.spec, block.gmem, (block.batch, step.head), first, 0)
    return Kept(dropout.kept(draws, s.block_q), start)


def without_rounding(block: KeyBlock, step: Step, y: Fragment) -> Fragment:
    """Adds to the exponents of a step, (64, block_q), what lse lost in its rounding.

    It takes 8 columns at a time: with all at once registers would be spilled, for all tiles. Where rows are held, the
    tile is opaque: LLVM would keep addresses of the step in registers that are not left (ptxas 13.5 spilled 12 bytes).
    """
    place = locate(block.gmem, Place.QUERY, block.batch)
    first = place.row((ptx.opaque(step.tile) if block.held else step.tile) * block.schedule.block_q)
    index = (place.batch, step.head, int(Statistics.ROUNDING))

    def part(column: int) -> Fragment:
        rounding = registers.load_row(block.gmem["stats"], index, first + column, 8)
        return y[:, column:column + 8] + registers.stack(rounding)

    return registers.concatenate([part(column) for column in range(0, block.schedule.block_q, 8)])


def completed_by(block: KeyBlock, warpgroup: Index, step: Step, first: tuple[Index, Index]) -> Completed | None:
    """What completes the scores of a step's tile: a bias of pairs that came with the queries, or what `completion`
    finds.
    """
    if not block.schedule.bias_ring:
        return completion(block.spec, block.gmem, (block.batch, step.head), first, 0)
    held = block.smem["bias"].at[step.slot(block.schedule.num_stages), pl.ds(ptx.opaque(warpgroup), 1)]
    highest = -lowest(softmax.unit(block.spec.scale, block.spec.softcap))

    def completed(s: Exponents) -> tuple[Exponents, None]:
        # Keys are finite here (`nonfinite`), but not products of what the bias hides: an infinite one plus -inf is NaN.
        found = bias.with_pairs(block.spec, jnp.minimum(s, highest), registers.load_transposed(held))
        if not block.schedule.makes_dq:  # else dS is handed over, behind a fence, before the slot is freed
            ptx.fence_async_proxy()
        return found, None

    return completed


def tile_weights(block: KeyBlock, warpgroup: Index, step: Step, lse: Lse, s: Fragment,
                 shift: float = 0.0) -> tuple[Fragment, Fragment]:
    """Computes P^T, and P^T times the slope of scores, from s = K Q^T; both times 2^shift."""
    spec, schedule = block.spec, block.schedule
    first = step.tile * schedule.block_q, block.tile * schedule.block_kv + warpgroup * ROWS_PER_WARPGROUP
    pairs = Pairs(block.mask.of_head(step.head), first, 0, partial_of(block, step))
    large = Large(lse.is_large, functools.partial(without_rounding, block, step))
    corrections = Corrections(large, pairs, schedule.apart)
    x = plgpu.layout_cast(s, registers.TILE)
    completed = completed_by(block, warpgroup, step, first)
    p, sloped = weights(spec, x, registers.stack(lse.log2), corrections, shift, completed)
    if schedule.pinned:
        ptx.pin(registers.column_sums(p), registers.TILE)
    return p, sloped
