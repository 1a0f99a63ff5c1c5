"""The online softmax (Milakov and Gimelshein, 2018; FlashAttention, Dao et al., 2022). Base 2 lives here only.

Scores are multiplied by log2(e) once, so that exponentials are exp2, which GPUs have as an instruction; such values
carry `_log2` in their names. What leaves a kernel (`lse`) is a natural logarithm again. A row that attends to nothing
has lse = -inf, weights 0 and output 0.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["LOG2E", "anchor", "delta", "finish", "probabilities", "rescale", "softcapped", "update"]

LOG2E = math.log2(math.e)


def softcapped(s: Any, softcap: float | None) -> tuple[Any, Any]:
    """softcap * tanh(s / softcap) and its derivative; (s, 1.0) without a cap."""
    if softcap is None:
        return s, 1.0
    t = jnp.tanh(s * (1 / softcap))
    return softcap * t, 1 - t * t


_FAR = 1e3


def anchor(bias: Any) -> Any:
    """What to subtract from scores after the bias is added: the row's largest bias where that is far from 0, else 0.

    softmax does not change. It serves rows of finfo.min, some libraries' way to mask: score and bias round to the bias,
    so every key weighs the same, but the row's lse would be so large that the number of keys is lost in its rounding,
    and with it the gradient. Kernels return lse without the anchor.

    Args:
      bias: (..., kv).

    Returns:
      (..., 1), in the dtype of bias, without a gradient.
    """
    row_max = jax.lax.stop_gradient(bias).max(axis=-1, keepdims=True, initial=-jnp.inf)
    return jnp.where((jnp.abs(row_max) > _FAR) & jnp.isfinite(row_max), row_max, jnp.zeros_like(row_max))


def _finite_or_zero(m_log2: Any) -> Any:
    """A row maximum to subtract: 0 for a row that has seen no key, since -inf - -inf is NaN."""
    return jnp.where(m_log2 == -jnp.inf, jnp.zeros_like(m_log2), m_log2)


def update(m_i: Any, l_i: Any, s_log2: Any) -> tuple[Any, Any, Any, Any]:
    """One step of the online softmax over a tile of scores.

    Args:
      m_i, l_i: running row maximum (base 2) and row sum, (..., q).
      s_log2: scores of the tile times log2(e), (..., q, kv); -inf where a pair does not attend.

    Returns:
      The new m_i and l_i, alpha (what to multiply the accumulator with), and p = exp2(s_log2 - m_i), (..., q, kv).
    """
    m_new = jnp.maximum(m_i, s_log2.max(axis=-1))
    m_safe = _finite_or_zero(m_new)
    alpha = jnp.exp2(m_i - m_safe)
    p = jnp.exp2(s_log2 - m_safe[..., None])
    return m_new, l_i * alpha + p.sum(axis=-1), alpha, p


def rescale(l_i: Any) -> Any:
    """1 / l_i, and 0 for rows that attend to nothing."""
    nothing = l_i == 0
    return jnp.where(nothing, jnp.zeros_like(l_i), 1 / jnp.where(nothing, jnp.ones_like(l_i), l_i))


def finish(m_i: Any, l_i: Any) -> Any:
    """lse, the natural logarithm of the row's sum of exponentials; -inf for rows that attend to nothing."""
    nothing = l_i == 0
    log2_sum = m_i + jnp.log2(jnp.where(nothing, jnp.ones_like(l_i), l_i))
    return jnp.where(nothing, jnp.full_like(l_i, -jnp.inf), log2_sum * (1 / LOG2E))


def probabilities(s_log2: Any, lse: Any) -> Any:
    """softmax(s) from saved statistics: exp2(s_log2 - lse * log2(e)), at most 1; 0 on rows that attend to nothing.

    The minimum matters where |lse| is so large that its rounding shows: an exponential must not overflow then.

    Args:
      s_log2: scores times log2(e), (..., q, kv); -inf where a pair does not attend.
      lse: natural logarithm, (..., q).
    """
    return jnp.minimum(jnp.exp2(s_log2 - _finite_or_zero(lse * LOG2E)[..., None]), 1)


def delta(out: Any, dout: Any, dlse: Any, acc_dtype: Any) -> Any:
    """What the softmax's gradient subtracts from dP: sum(out * dout) - dlse (FlashAttention-2, Dao, 2023).

    Args:
      out, dout: (..., dim); their product is summed in `acc_dtype`.
      dlse: cotangent of lse, (...).

    Returns:
      (...), in `acc_dtype`.
    """
    return jnp.sum(out.astype(acc_dtype) * dout.astype(acc_dtype), axis=-1) - dlse.astype(acc_dtype)
