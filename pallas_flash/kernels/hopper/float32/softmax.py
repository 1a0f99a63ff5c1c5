"""The online softmax of 64 rows whose values have scales: v_j = v'_j 2^c_j, a power of two for each key.

The weights that meet v' are p_ij 2^c_j: what matters to a row is how large these products are, and so they decide what
is lost when they are split (`parts`): 2^-39 of the row's largest. A weight is exp2((s_ij - m_i) unit + (c_j - e_i)),
with the row's largest score m_i so far, and a whole number e_i near the largest (s_ij - m_i) unit + c_j: weights are at
most 2^0.5. The difference of scores comes first, since s_ij unit beyond 2^23 is rounded by more than a weight can bear
(`pallas_flash.softmax`). l_i adds up exp2((s_ij - m_i) unit - e_i), which is a weight times 2^-c_j.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from pallas_flash import softmax
from pallas_flash.kernels.hopper import registers
from pallas_flash.kernels.hopper.registers import Fragment, PerColumn, PerRow
from pallas_flash.kernels.mosaic import ptx

__all__ = ["Softmax", "Values", "begin", "natural", "weigh"]

_LOWEST = -3e38
"""The m_i of rows that have met no key: its difference from -inf is not NaN."""
_WHOLE = 1.5 * 2.0**23
"""A float32 number plus it is a whole number, if it is below 2^22."""


class Values(NamedTuple):
    """The scales of a tile's values, in base 2."""

    exponent: PerColumn  # c_j
    inverse: PerColumn  # 2^-c_j


class Softmax(NamedTuple):
    """The state of 64 rows."""

    m_i: PerRow  # in the unit of scores
    start: PerRow  # e_i
    l_i: Fragment  # (64, 8), sums of every eighth column
    alpha: PerRow  # what earlier sums must be multiplied with


def begin() -> Softmax:
    """The state of rows that have met no key."""
    zero = registers.row_zeros()
    return Softmax(zero + _LOWEST, zero, registers.spread(zero, 8), zero)


def weigh(state: Softmax, s: Fragment, unit: float, values: Values) -> tuple[Softmax, Fragment]:
    """The state after one more tile of scores in a unit of base 2, and its weights, (64, keys) float32."""
    columns = s.shape[1]
    exponent, inverse = (registers.stack(x) for x in values)
    m_i = jnp.maximum(state.m_i, s.max(axis=1))
    below = s - registers.spread(m_i, columns)
    step = (state.m_i - m_i) * unit
    top = jnp.maximum((below * unit + exponent).max(axis=1), step + state.start)
    start = ptx.multiply_add(top, 1.0, registers.row_zeros() + _WHOLE, registers.ROW_LAYOUT) - _WHOLE
    p = jnp.exp2(below * unit + (exponent - registers.spread(start, columns)))
    alpha = jnp.exp2(step + (state.start - start))
    l_i = state.l_i * registers.spread(alpha, 8) + registers.column_sums(p * inverse)
    return Softmax(m_i, start, l_i, alpha), p


def natural(state: Softmax, score_unit: float) -> tuple[PerRow, tuple[PerRow, PerRow]]:
    """l_i, (64,), and the statistics of the rows (`softmax.statistics`).

    `start` follows the scales of values, too, so l_i may be far from 1, and lse would be the difference of two large
    numbers: the power of two of l_i moves to start first, which is exact.
    """
    l_i = state.l_i.sum(axis=1)
    bits = lax.bitcast_convert_type(l_i, jnp.int32) & 0x7F800000
    start = state.start + ((bits >> 23) - 127).astype(jnp.float32)
    inverse = lax.bitcast_convert_type((254 << 23) - bits, jnp.float32)
    return l_i, softmax.statistics(state.m_i, l_i * inverse, score_unit / softmax.LOG2E, start)
