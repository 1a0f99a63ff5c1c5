"""The online softmax of 64 rows in registers: from scores to weights, and when sums are rescaled.

m_i is in the unit of scores. It need not be the row's maximum, only not far below it: exp(-m_i) cancels in O / l_i.
There are two ways to keep it near enough.

`maximum_within`: every step computes the tile's maximum, and m_i follows where it has fallen behind.

`maximum_at_times`: some steps compute the maximum, and at the other steps it is not computed. bf16 and float32 hold
weights far beyond 1, so a row's scores may rise above its m_i; where its sum says that they have, the next step
computes the maximum. A tile with a row whose weights grow too large before that is given up, and done again with all
maxima (`forward.tiles`).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_flash.arrays import Array, Bool, Float
from pallas_flash.kernels.hopper import registers
from pallas_flash.kernels.hopper.registers import Fragment, PerRow
from pallas_flash.kernels.mosaic import ptx
from pallas_flash.kernels.mosaic.scores import is_far, lowest, score_unit
from pallas_flash.kernels.mosaic.types import Flag
from pallas_flash.spec import AttentionSpec

__all__ = [
    "Earlier", "Exponents", "Maximum", "NextMaximum", "Softmax", "exponents_of", "first_softmax", "given_up",
    "is_heavy", "maximum_at_times", "maximum_of", "maximum_within", "next_softmax", "rescaled",
]

HEAVY = 2.0**14
"""A row sum above it says that scores have risen far above m_i."""
FULL = 2.0**90
"""A row sum above it is given up: to follow it, alpha would have to be so small that float32 flushes it to 0, and with
it weights that count (2^-36 of the row's largest at this limit).
"""


class Maximum(NamedTuple):
    """The row maximum of 64 rows."""

    m_i: PerRow  # in the unit of scores
    start: PerRow  # see `Exponents`


class Exponents(NamedTuple):
    """How exponents of base 2 are made of scores: s unit - start, in one instruction, where start is m_i unit, rounded;
    or (s - start) unit, where start is m_i. That is for scores as far from 0 as float32 reaches (`scores.is_far`).
    """

    unit: float
    of_differences: bool

    def start(self, m_i: PerRow) -> PerRow:
        """The start of a maximum. It is rounded here, once, so that alpha is exactly 1 where m_i stays."""
        return m_i if self.of_differences else ptx.multiply(m_i, self.unit, registers.ROW_LAYOUT)

    def of(self, s: Fragment, start: PerRow) -> Fragment:
        """Exponents of scores."""
        start = registers.spread(start, s.shape[1])
        return (s - start) * self.unit if self.of_differences else s * self.unit - start

    def between(self, old: PerRow, new: PerRow) -> PerRow:
        """How much exponents from one start are larger than those from another."""
        return (old - new) * self.unit if self.of_differences else old - new

    def rounding(self, m_i: PerRow, start: PerRow) -> PerRow:
        """How much more start is than it should be, base 2."""
        return jnp.zeros_like(m_i) if self.of_differences else ptx.multiply_add(m_i, -self.unit, start,
                                                                                registers.ROW_LAYOUT)

    @property
    def lowest(self) -> float:
        """The m_i of rows that have met no key: low, but finite, and so is its product with the unit: its difference
        from -inf is not NaN.
        """
        return float(np.finfo(np.float32).min) if self.of_differences else lowest(self.unit)


def exponents_of(spec: AttentionSpec) -> Exponents:
    """Those of a spec."""
    return Exponents(score_unit(spec), is_far(spec))


def maximum_of(m_i: PerRow, exponents: Exponents) -> Maximum:
    """Adds the start to m_i."""
    return Maximum(m_i, exponents.start(m_i))


class Earlier(NamedTuple):
    """The sums of the weights of 64 rows over keys of other launches: exp2(m_i unit + left), with the unit of
    `Exponents`.
    """

    m_i: PerRow  # in the unit of scores; `Exponents.lowest` of rows that have met no key
    left: PerRow  # base 2; -inf of rows that have met no key


class Softmax(NamedTuple):
    """The state of the online softmax of 64 rows."""

    maximum: Maximum
    l_i: Fragment  # (64, 8), sums of every eighth column
    p: Fragment  # (64, block_kv) of the input's type, the weights of the last tile, not yet multiplied with its values
    alpha: PerRow  # what the accumulator must be multiplied with before p is
    grew: Flag  # whether alpha is not 1 in some row of this warp


type NextMaximum = Callable[[Softmax, Fragment, Exponents], tuple[Maximum, Flag]]
"""The new maximum, and whether it may be another one in some row of this warp, from the state, a tile of scores and how
exponents are made of them.
"""


def first_softmax(s: Fragment, exponents: Exponents, dtype: np.dtype, maximum: Maximum | None = None,
                  earlier: Earlier | None = None) -> Softmax:
    """The state after the first tile of scores.

    Args:
      maximum: that of the tile's rows, if it is known.
      earlier: what the rows begin with, if it is not nothing: the accumulator is that, divided by the sum of weights.
    """
    lowest = exponents.lowest if earlier is None else earlier.m_i
    first = maximum or maximum_of(jnp.maximum(s.max(axis=1), lowest), exponents)
    p = jnp.exp2(exponents.of(s, first.start))
    if earlier is not None:
        start = exponents.start(earlier.m_i)
        left = earlier.left - exponents.rounding(earlier.m_i, start)
        alpha = jnp.exp2(exponents.between(start, first.start) + left)
        l_i = registers.column_sums(p) + registers.spread(alpha * 0.125, 8)  # a part in each of eight columns
        return Softmax(first, l_i, p.astype(dtype), alpha, jnp.bool_(True))
    alpha = plgpu.layout_cast(jnp.ones_like(first.m_i), registers.ROW_LAYOUT)
    return Softmax(first, registers.column_sums(p), p.astype(dtype), alpha, jnp.bool_(False))


def maximum_within(state: Softmax, s: Fragment, exponents: Exponents,
                   slack: float | Float[Array, ""]) -> tuple[Maximum, Flag]:
    """The new maximum, at most `slack` (base 2) too low, and whether it is another one in some row of this warp.

    If one row of a warp needs a rescale, all of its rows take their maximum: it costs nothing more, and keeps them from
    needing one soon.
    """
    (m_i, start), row_max = state.maximum, s.max(axis=1)
    within = row_max - m_i <= slack * (1 / exponents.unit)
    grew = ptx.any_in_warp(jnp.logical_not(within), registers.ROW_LAYOUT)  # so that NaN counts as growth
    everywhere = plgpu.layout_cast(lax.broadcast_in_dim(grew, m_i.shape, []), registers.ROW_LAYOUT)
    new = maximum_of(jnp.maximum(m_i, row_max), exponents)
    return Maximum(jnp.where(everywhere, new.m_i, m_i), jnp.where(everywhere, new.start, start)), grew


def is_heavy(state: Softmax) -> Flag:
    """Whether scores of a row of this warp have risen far above its m_i."""
    return ptx.any_in_warp(state.l_i > HEAVY, registers.TILE)


def maximum_at_times(state: Softmax, s: Fragment, exponents: Exponents, due: Flag, heavy: Flag) -> tuple[Maximum, Flag]:
    """The new maximum, and whether it may be another one: the rows' maximum if it is `due`, the old one if not.

    Args:
      due: the same in every thread of a warp; true where the warp is heavy.
      heavy: see `is_heavy`. Then a row's m_i is also at least what its weights so far add up to, because their maximum
        was not computed; it is infinite where the row is given up.
    """
    def lifted(m_i: PerRow, l_i: Fragment) -> PerRow:
        l_i = l_i.max(axis=1)
        return jnp.where(l_i > FULL, jnp.inf, jnp.where(l_i > HEAVY, m_i + jnp.log2(l_i) * (1 / exponents.unit), m_i))

    def take(s: Fragment, maximum: Maximum, l_i: Fragment) -> Maximum:
        m_i = lax.cond(heavy, lifted, lambda m_i, _: m_i, maximum.m_i, l_i)
        m_i = jnp.maximum(m_i, s.max(axis=1))
        return maximum_of(m_i, exponents)

    return lax.cond(due, take, lambda _, maximum, __: maximum, s, state.maximum, state.l_i), due


def given_up(m_i: PerRow, l_i: PerRow) -> Bool[Array, "64"]:
    """Flags of rows whose weights grew too large. Rows that are NaN because their scores are do not count."""
    return (m_i == jnp.inf) | (l_i > FULL)


def next_softmax(state: Softmax, scores: tuple[Fragment, Exponents], maximum: NextMaximum, held_columns: int,
                 wait: Callable[[], Fragment]) -> tuple[Softmax, Fragment]:
    """The state after another tile of scores, and what `wait` returns: it waits for the product that this overlaps.

    Args:
      scores: and how exponents are made of them.
      maximum: `maximum_within` or `maximum_at_times`.
      held_columns: see `ForwardSchedule`.
    """
    s, exponents = scores
    new, grew = maximum(state, s, exponents)
    weights = lambda s: jnp.exp2(exponents.of(s, new.start))
    dtype, split = state.p.dtype, held_columns or s.shape[1]
    parts = [weights(s[:, :split])]
    acc = wait()
    if split < s.shape[1]:
        parts.append(weights(s[:, split:]))
    alpha = jnp.exp2(exponents.between(state.maximum.start, new.start))
    l_i = state.l_i * registers.spread(alpha, 8) + functools.reduce(jnp.add, map(registers.column_sums, parts))
    return Softmax(new, l_i, registers.concatenate([p.astype(dtype) for p in parts]), alpha, grew), acc


def rescaled(state: Softmax, acc: Fragment) -> Fragment:
    """Multiplies acc with alpha, if some row of the warp needs it. Only registers are touched: the fence that wgmma
    needs is issued with the next product.
    """
    def multiply(acc: Fragment) -> Fragment:
        tile = plgpu.layout_cast(acc, registers.TILE)
        return plgpu.layout_cast(tile * registers.spread(state.alpha, acc.shape[1]), registers.ACC)

    return lax.cond(state.grew, multiply, lambda acc: acc, acc)
