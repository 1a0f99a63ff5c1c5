"""The online softmax (Milakov and Gimelshein, 2018; FlashAttention, Dao et al., 2022). Base 2 lives here only.

Exponentials are exp2, which GPUs have as an instruction. Scores are kept as their products came, in some unit: the
score is s * unit, and its exponential exp2(s * unit * log2(e)). Differences are taken before multiplying by the unit: a
compiler may fuse a product into the difference that uses it (FMA) and not round it, while another use of the same
product is rounded. A difference of scores alone is the same everywhere, and exact where they are close to each other.

What leaves a kernel (`lse`) is a natural logarithm. A row that attends to nothing has lse = -inf, weights 0 and
output 0. The backward recomputes weights from scores, exp(s - lse), and float32 holds lse to a relative 2^-23: where
scores are large, so is the error, and a weight that was 1 no longer is. So two numbers are kept for each row, lse and
its rest (`statistics`).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_flash.arrays import Array

__all__ = [
    "LOG2E", "SMALLEST_SCALE", "anchor", "delta", "finite_or_zero", "from_lse", "merge", "merge_rows", "probabilities",
    "reference_point", "rescale", "scores", "shifted", "statistics", "unit", "update",
]

LOG2E = math.log2(math.e)


SMALLEST_SCALE = 1e-30
"""A smaller scale is not used as the unit: lse / scale and -inf * scale may not be float32 numbers."""


def unit(scale: float, softcap: float | None) -> float:
    """The unit of `scores`: positive."""
    if softcap is not None:
        return softcap
    return abs(scale) if abs(scale) >= SMALLEST_SCALE else 1.0


def scores(x: Array, scale: float, softcap: float | None) -> tuple[Array, Array | float]:
    """The scores of the products x in their `unit`, and the derivative of the soft cap.

    s * unit is scale * x, or softcap * tanh(scale * x / softcap).
    """
    if softcap is not None:
        t = jnp.tanh(x * scale * (1 / softcap))
        return t, 1 - t * t
    if abs(scale) < SMALLEST_SCALE:
        return x * scale, 1.0
    return (x if scale > 0 else -x), 1.0


_FAR = 1e3


def anchor(bias: Array) -> Array:
    """What to subtract from scores after the bias is added: the row's largest bias where that is far from 0, else 0.

    The softmax does not change. It matters for rows of finfo.min, with which some libraries mask: score plus bias
    rounds to the bias, so all keys weigh the same, but lse would be so large that rounding loses the number of keys,
    and with it the gradient. Kernels return lse without the anchor.

    Args:
      bias: (..., kv).

    Returns:
      (..., 1), in the dtype of bias, without a gradient.
    """
    row_max = jax.lax.stop_gradient(bias).max(axis=-1, keepdims=True, initial=-jnp.inf)
    return jnp.where((jnp.abs(row_max) > _FAR) & jnp.isfinite(row_max), row_max, jnp.zeros_like(row_max))


def finite_or_zero(m_i: Array) -> Array:
    """A row maximum to subtract: 0 for a row that has seen no key, since -inf - -inf is NaN."""
    return jnp.where(m_i == -jnp.inf, jnp.zeros_like(m_i), m_i)


def update(m_i: Array, l_i: Array, s: Array, unit: float) -> tuple[Array, Array, Array, Array]:
    """One step of the online softmax over a tile of scores.

    Args:
      m_i, l_i: running row maximum, in the unit of s, and row sum, (..., q).
      s: scores of the tile in a unit (`scores`), (..., q, kv); -inf where a pair does not attend.

    Returns:
      The new m_i and l_i, alpha (what to multiply the accumulator with), and p = exp((s - m_i) unit), (..., q, kv).
    """
    m_new = jnp.maximum(m_i, s.max(axis=-1))
    m_safe = finite_or_zero(m_new)
    alpha = jnp.exp2((m_i - m_safe) * (unit * LOG2E))
    p = jnp.exp2((s - m_safe[..., None]) * (unit * LOG2E))
    return m_new, l_i * alpha + p.sum(axis=-1), alpha, p


def rescale(l_i: Array) -> Array:
    """1 / l_i, and 0 for rows that attend to nothing."""
    nothing = l_i == 0
    return jnp.where(nothing, jnp.zeros_like(l_i), 1 / jnp.where(nothing, jnp.ones_like(l_i), l_i))


def reference_point(lse: Array, unit: float) -> Array:
    """lse in the unit of scores, which the backward subtracts from scores.

    Rounded, with the last bit cleared: forward and backward must use the same number, and no compiler can fuse the
    product into a difference through an integer.
    """
    bits = jnp.int64 if lse.dtype == jnp.float64 else jnp.int32
    product = jax.lax.bitcast_convert_type(lse * (1 / unit), bits)
    return jax.lax.bitcast_convert_type(product & -2, lse.dtype)


def statistics(m_i: Array, l_i: Array, unit: float, rounding: Array | float = 0.0) -> tuple[Array, Array]:
    """What is kept for a row of scores s: lse and its rest. l_i is the sum of exp2((s - m_i) unit log2(e) - rounding).

    lse is the natural logarithm of the sum of exp(s unit), -inf for rows that attend to nothing. In the unit of s,
    `reference_point(lse) + rest` is m_i + log(l_i) / unit to many more bits than lse has: the difference of m_i and a
    number next to it is exact.
    """
    nothing = l_i == 0
    log_l = (jnp.log2(jnp.where(nothing, jnp.ones_like(l_i), l_i)) + rounding) * (1 / LOG2E)
    lse = m_i * unit + log_l
    rest = (m_i - reference_point(lse, unit)) + log_l * (1 / unit)
    return jnp.where(nothing, jnp.full_like(l_i, -jnp.inf), lse), jnp.where(nothing, jnp.zeros_like(l_i), rest)


def shifted(stats: Array, by: Array, unit: float) -> Array:
    """The statistics (..., 2, q) of scores that are larger by `by`, (..., q): natural logarithms."""
    lse, rest = stats[..., 0, :], stats[..., 1, :]
    moved, start, step = lse + by, reference_point(lse, unit), by * (1 / unit)
    total = start + step
    of_step = total - start  # and what the sum has lost of both (Knuth's TwoSum): all of lse, beside a huge step
    behind = ((start - (total - of_step)) + (step - of_step)) + rest
    # Of scores that were far, all that is left may be in what lse lost: kernels do not look there if lse is small.
    moved += jnp.where(lse == -jnp.inf, 0.0, (total - reference_point(moved, unit)) + behind) * unit
    lost = (total - reference_point(moved, unit)) + behind
    return jnp.stack([moved, jnp.where(lse == -jnp.inf, rest, lost)], axis=-2)


def merge(a: Array, b: Array, unit: float) -> tuple[Array, Array, Array]:
    """The statistics of rows over two sets of keys, and the shares of the two in the result.

    Args:
      a, b: statistics over each set (`statistics`), lse and its rest in the last axis but one: (..., 2, q).
      unit: that of the scores.

    Returns:
      The statistics over both, (..., 2, q), and what to multiply the output over each set with before they are added,
      (..., q) each: they add up to 1, or are 0 where a row attends to nothing.
    """
    stats, share_a, share_b = merge_rows((a[..., 0, :], a[..., 1, :]), (b[..., 0, :], b[..., 1, :]), unit)
    return jnp.stack(stats, axis=-2), share_a, share_b


def merge_rows(a: tuple[Array, Array], b: tuple[Array, Array],
               unit: float) -> tuple[tuple[Array, Array], Array, Array]:
    """`merge` of lse and its rest as arrays of their own: in registers, too."""
    (lse_a, rest_a), (lse_b, rest_b) = a, b
    # Which is larger the rest says where lse is the same: that of scores which are lost in a bias.
    above = (reference_point(lse_a, unit) - reference_point(lse_b, unit)) + (rest_a - rest_b)
    first = (above >= 0) | (lse_b == -jnp.inf)
    lse, rest = jnp.where(first, lse_a, lse_b), jnp.where(first, rest_a, rest_b)
    other_lse, other_rest = jnp.where(first, lse_b, lse_a), jnp.where(first, rest_b, rest_a)
    nothing = lse == -jnp.inf
    start = finite_or_zero(reference_point(lse, unit))
    below = ((reference_point(other_lse, unit) - start) + (other_rest - rest)) * unit  # as `probabilities` compares
    ratio = jnp.minimum(jnp.exp2(below * LOG2E), 1)
    log_l = jnp.log2(1 + ratio) * (1 / LOG2E)
    merged = lse + log_l
    merged_rest = ((start - finite_or_zero(reference_point(merged, unit))) + rest) + log_l * (1 / unit)
    large = jnp.where(nothing, jnp.zeros_like(lse), 1 / (1 + ratio))
    small = large * ratio
    stats = merged, jnp.where(nothing, jnp.zeros_like(rest), merged_rest)
    return stats, jnp.where(first, large, small), jnp.where(first, small, large)


def from_lse(lse: Array, unit: float) -> tuple[Array, Array]:
    """The statistics of rows of which only lse is known: lse and the rest with which it is exact.

    In the unit of scores, `reference_point(lse) + rest` is lse to 2^-34 of it (float32), so weights recomputed from
    these are off by what lse itself has lost, and no more: float32 holds an lse of 1e4 to 5e-4, and the weights of that
    row are wrong by as large a part of themselves. `statistics` knows more: pass its rest on where there is one.

    Args:
      lse: natural logarithms, (...); -inf for rows that attend to nothing.
    """
    significand, integer = (53, jnp.int64) if lse.dtype == jnp.float64 else (24, jnp.int32)
    kept = significand // 2  # bits of each first half, so that products of halves are exact
    mantissa, exponent = math.frexp(unit)
    unit_high = math.ldexp(round(math.ldexp(mantissa, kept)), exponent - kept)
    point = finite_or_zero(reference_point(lse, unit))
    bits = jax.lax.bitcast_convert_type(point, integer)
    high = jax.lax.bitcast_convert_type(bits & -(1 << (significand - kept)), lse.dtype)
    # The first difference is exact, too: no digit is lost, and a compiler may fuse what it likes.
    left = (finite_or_zero(lse) - high * unit_high) - (point - high) * unit_high
    return lse, (left - point * (unit - unit_high)) * (1 / unit)


def probabilities(s: Array, unit: float, lse: Array, rest: Array) -> Array:
    """softmax(s unit) from saved statistics, at most 1; 0 on rows that attend to nothing.

    Args:
      s: scores in a unit (`scores`), (..., q, kv); -inf where a pair does not attend.
      lse, rest: see `statistics`, (..., q).
    """
    start = finite_or_zero(reference_point(lse, unit))
    return jnp.minimum(jnp.exp2(((s - start[..., None]) - rest[..., None]) * (unit * LOG2E)), 1)


def sinks_gradient(sinks: Array, lse: Array, delta: Array) -> Array:
    """The gradient of sinks, each of which is one more score of its rows, of a key without a value.

    Args:
      sinks: (1 or batch, heads, 1, 1).
      lse: of the softmax with the sinks in it, (batch, heads, q); -inf (or the smallest number) of a row that attends
        to nothing, which is all its sink's.
      delta: see `delta`, (batch, heads, q).

    Returns:
      (1, heads, 1, 1), summed over the batch, in the dtype of delta.
    """
    nothing, own = lse <= jnp.finfo(lse.dtype).min, sinks[..., 0]
    weight = jnp.minimum(jnp.exp(own - jnp.where(nothing, jnp.zeros_like(lse), lse)), 1)
    weight = jnp.where(nothing, jnp.ones_like(weight), jnp.where(own == -jnp.inf, jnp.zeros_like(weight), weight))
    return -(weight * delta).sum(axis=(0, 2))[None, :, None, None]


def delta(out: Array, dout: Array, dlse: Array, acc_dtype: np.dtype) -> Array:
    """What the softmax's gradient subtracts from dP: sum(out * dout) - dlse (FlashAttention-2, Dao, 2023).

    Args:
      out, dout: (..., dim); their product is summed in `acc_dtype`.
      dlse: cotangent of lse, (...).

    Returns:
      (...), in `acc_dtype`.
    """
    return jnp.sum(out.astype(acc_dtype) * dout.astype(acc_dtype), axis=-1) - dlse.astype(acc_dtype)
