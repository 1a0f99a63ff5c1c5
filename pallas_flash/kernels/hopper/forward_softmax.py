"""The online softmax of 64 rows in registers: from scores to weights, and when sums are rescaled."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_flash import softmax
from pallas_flash.kernels.hopper import barriers, products
from pallas_flash.kernels.hopper import schedule as schedules
from pallas_flash.kernels.hopper.forward_tiles import Block
from pallas_flash.kernels.hopper.rows_at_rest import across
from pallas_flash.kernels.hopper.schedule import SMALLEST_SCALE
from pallas_flash.spec import AttentionSpec

__all__ = ["Softmax", "column_sums", "first_softmax", "grown", "masked", "rescaled", "scaled"]

LOWEST = -3e38
"""Row maximum of rows that have seen no key: finite, so that subtracting it from -inf is not NaN."""


class Softmax(NamedTuple):
    """The state of the online softmax of 64 rows."""

    m_i: Any  # (64,), base 2
    l_i: Any  # (64, 8), sums of every eighth column
    p: Any  # (64, block_kv) of the input's type, the weights of the last tile, not yet multiplied with its values


def scaled(spec: AttentionSpec, s: Any) -> tuple[Any, float]:
    """Scores in some unit, and the (positive) unit: their product is the score times log2(e)."""
    if spec.softcap is not None:
        # tanh from exp2: the hardware's tanh has 11 bits.  tanh x = 1 - 2 / (e^2x + 1)
        t = 1 - 2 / (jnp.exp2(s * (2 * softmax.LOG2E * spec.scale / spec.softcap)) + 1)
        return t, spec.softcap * softmax.LOG2E
    if spec.scale < SMALLEST_SCALE:
        return s * (spec.scale * softmax.LOG2E), 1.0
    return s, spec.scale * softmax.LOG2E


def masked(block: Block, s: Any, first_row: Any, kv_tile: Any) -> Any:
    """s with -inf where the mask does not keep a pair."""
    q_pos = products.positions(s.shape[1], 0, first_row)
    kv_pos = products.positions(s.shape[1], 1, kv_tile * block.schedule.block_kv)
    return jnp.where(schedules.forward_mask(block.spec, block.schedule).keep(q_pos, kv_pos), s, -jnp.inf)


def column_sums(p: Any) -> Any:
    """(64, n) -> (64, 8): sums of every eighth column, without crossing threads."""
    return functools.reduce(jnp.add, [p[:, i:i + 8] for i in range(0, p.shape[1], 8)])


def first_softmax(s: Any, unit: float, dtype: Any) -> Softmax:
    """The state after the first tile of scores."""
    m_i = jnp.maximum(s.max(axis=1) * unit, LOWEST)
    p = jnp.exp2(s * unit - across(m_i, s.shape[1]))
    return Softmax(m_i, column_sums(p), p.astype(dtype))


def grown(m_i: Any, row_max: Any, slack: Any) -> tuple[Any, Any]:
    """The new row maximum, and whether any row of this warp needs a rescale."""
    grew = jnp.logical_not(row_max - m_i <= slack)  # so that NaN counts as growth
    return jnp.where(grew, row_max, m_i), barriers.any_in_warp(grew, products.ROWS)


def rescaled(needed: Any, alpha: Any, acc: Any, l_i: Any) -> tuple[Any, Any]:
    """acc and l_i times alpha, if `needed`. Only registers are touched: the fence that wgmma needs is issued with the
    next product.
    """
    def multiply(acc: Any, l_i: Any) -> tuple[Any, Any]:
        tile = plgpu.layout_cast(acc, products.TILE)
        return plgpu.layout_cast(tile * across(alpha, acc.shape[1]), products.ACC), l_i * across(alpha, 8)

    return lax.cond(needed, multiply, lambda acc, l_i: (acc, l_i), acc, l_i)
