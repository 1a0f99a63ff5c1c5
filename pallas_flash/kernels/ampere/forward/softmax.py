"""The online softmax of 64 rows in registers: from scores to weights, and when sums are rescaled.

m_i is in the unit of scores. It need not be the row's maximum, only not far below it: exp(-m_i) cancels in O / l_i. So
m_i follows the maximum only where it has fallen behind by more than the schedule's slack. A branch that a warp takes
alone is safe: mma.sync is of a warp.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_flash.kernels.ampere import registers
from pallas_flash.kernels.ampere.registers import Fragment, PerRow
from pallas_flash.kernels.mosaic import ptx
from pallas_flash.kernels.mosaic.scores import lowest

__all__ = ["State", "next_state", "start"]


class State(NamedTuple):
    """What is known of 64 rows after some tiles of keys."""

    m_i: PerRow  # in the unit of scores
    begin: PerRow  # m_i unit, rounded: what is subtracted from s unit
    l_i: Fragment  # (64, 8), sums of every eighth column
    acc: Fragment  # (64, d_v), the sum of weighted values


def start(unit: float, d_v: int) -> State:
    """The state before the first tile."""
    m_i = registers.row_zeros() + lowest(unit)
    return State(m_i, _begin(m_i, unit), registers.zeros(8), registers.zeros(d_v))


def _begin(m_i: PerRow, unit: float) -> PerRow:
    """m_i unit, rounded once: what forward and backward subtract must be the same number."""
    return ptx.multiply(m_i, unit, registers.ROW_LAYOUT)


def next_state(state: State, s: Fragment, unit: float, slack: float, dtype: np.dtype) -> tuple[State, Fragment]:
    """The state with the maximum and the sum of another tile of scores, and its weights in `dtype`, whose product with
    the values is still to be added to `acc`.
    """
    m_i, row_max = state.m_i, s.max(axis=1)
    within = row_max - m_i <= slack * (1 / unit)
    grew = ptx.any_in_warp(jnp.logical_not(within), registers.ROW_LAYOUT)  # so that NaN counts as growth

    def follow(m_i: PerRow, begin: PerRow, l_i: Fragment, acc: Fragment) -> tuple[PerRow, PerRow, Fragment, Fragment]:
        highest = jnp.maximum(m_i, row_max)
        new = jnp.where(highest > m_i, _begin(highest, unit), begin)  # where m_i stays, alpha is 1
        alpha = jnp.exp2(begin - new)
        return highest, new, l_i * registers.spread(alpha, 8), acc * registers.spread(alpha, acc.shape[1])

    m_i, begin, l_i, acc = lax.cond(grew, follow, lambda *same: same, *state)
    p = jnp.exp2(s * unit - registers.spread(begin, s.shape[1]))
    return State(m_i, begin, l_i + registers.column_sums(p), acc), p.astype(dtype)
