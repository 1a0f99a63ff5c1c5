"""Scores in registers, forward and backward: scale, soft cap and mask, and the soft cap's slope.

A score is s * unit (`softmax.unit`), and its weight exp2(s * unit * log2(e) - start). Product and difference are one
instruction, and start is a rounded number: m_i in the forward, lse in the backward. In the forward the rounding is one
factor for all weights of a row. It cancels in O / l_i and is taken out of lse at the end, unless it is so large that
weights overflow (`overflows`). In the backward, what lse lost is added to exponents of rows for which it begins to show
beside the rounding of weights: they are called large (`is_large`).
"""

import jax.numpy as jnp

from pallas_flash import masks, softmax
from pallas_flash.arrays import Array, Bool, Float, Int
from pallas_flash.spec import AttentionSpec

__all__ = [
    "MOST_BOUNDED", "are_bounded", "is_far", "is_large", "largest", "lowest", "masked", "may_be_large", "overflows",
    "scaled", "score_unit", "slope", "tanh", "unit",
]

_EXACT_CAP = 128.0
"""A larger soft cap needs a tanh whose relative error is small: 1 - 2 / (e^2x + 1) errs by about 2^-22."""

MOST_BOUNDED = 80.0
"""Base 2: a soft cap of 55."""

_SERIES = (-0.333332993, 0.133319582, -0.0537866835, 0.0208053842, -0.00590586795)
"""tanh(x) = x + x^3 P(x^2) on [0, 0.6], with a relative error of 3e-9: a minimax fit."""
_SERIES_END = 0.6


# -- from products to exponents ----------------------------------------------------------------------------------------

def unit(spec: AttentionSpec) -> float:
    """The unit of scores once they are complete: 1 where a bias has been added (`mosaic.bias`), or a score function has
    been applied (`mosaic.score_function`).
    """
    return softmax.unit(spec.scale, spec.softcap) if spec.bias is None and spec.score is None else 1.0


def score_unit(spec: AttentionSpec) -> float:
    """The unit of scores times log2(e). A score times it is an exponent of base 2."""
    return unit(spec) * softmax.LOG2E


def scaled(spec: AttentionSpec, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Computes scores in their unit, before a score function and a bias, from the products x of queries and keys."""
    if spec.softcap is None:
        return softmax.scores(x, spec.scale, None)[0]
    return tanh(x * (spec.scale / spec.softcap), exact=spec.softcap > _EXACT_CAP)


def slope(spec: AttentionSpec, s: Float[Array, "..."], p: Float[Array, "..."]) -> Float[Array, "..."]:
    """Multiplies the weights p of scores s with the derivative of the soft cap."""
    return p if spec.softcap is None else jnp.where(p == 0, 0.0, p * (1 - s * s))


def masked(s: Float[Array, "64 n"], mask: masks.Mask, q_pos: Int[Array, "64 n"],
           kv_pos: Int[Array, "64 n"]) -> Float[Array, "64 n"]:
    """Sets scores or exponents to -inf where the mask does not keep a pair.

    Args:
      s: (64, n).
      q_pos, kv_pos: the positions of the pairs, in the shape of s.
    """
    return jnp.where(mask.keep(q_pos, kv_pos), s, -jnp.inf)


def tanh(x: Float[Array, "..."], exact: bool) -> Float[Array, "..."]:
    """Computes tanh from exp2, as the hardware's tanh has 11 bits. If `exact`, its relative error is small, too."""
    t = 1 - 2 / (jnp.exp2(x * (2 * softmax.LOG2E)) + 1)
    if not exact:
        return t
    y = x * x
    series = jnp.full_like(y, _SERIES[-1])
    for coefficient in _SERIES[-2::-1]:
        series = series * y + coefficient
    return jnp.where(jnp.abs(x) < _SERIES_END, x + x * y * series, t)


def lowest(unit: float) -> float:
    """The m_i of rows that have met no key: low, but finite, and so is its product with the unit: its
    difference from -inf is not NaN.
    """
    return -3e38 / max(unit, 1.0)


def is_far(spec: AttentionSpec) -> bool:
    """Whether scores may be as far from 0 as float32 reaches, because no anchor is taken from them (`AttentionSpec.
    anchor`): differences are then taken before they are multiplied with the unit.
    """
    return spec.bias is not None and not spec.is_anchored


# -- large scores ------------------------------------------------------------------------------------------------------

def largest(spec: AttentionSpec) -> float:
    """The largest |lse| log2(e) of a row that is not large: 2^12 in bfloat16, 2^9 in float16.

    There, lse is rounded by at most 2^-12 (2^-15): a sixteenth of what the rounding of weights does.
    """
    return 2.0**19 * float(jnp.finfo(spec.dtype).eps)


def may_be_large(spec: AttentionSpec) -> bool:
    """Whether a row may be large: a soft cap keeps scores below it, but not a bias, nor what a score function makes."""
    is_free = spec.bias is not None or spec.score is not None
    return spec.softcap is None or is_free or spec.softcap * softmax.LOG2E > largest(spec) / 2


def are_bounded(spec: AttentionSpec) -> bool:
    """Whether a soft cap bounds the scores by `MOST_BOUNDED`: exp2 of each, and sums of them, are bfloat16 and float32
    numbers between 2^-80 and 2^111, without a maximum that is subtracted first.
    """
    alone = spec.softcap is not None and spec.bias is None and spec.score is None
    return alone and score_unit(spec) <= MOST_BOUNDED and spec.dtype == jnp.bfloat16


def is_large(spec: AttentionSpec, size_log2: Float[Array, "..."]) -> Bool[Array, "..."]:
    """Flags of rows that are large, from |lse| log2(e); also of those that attend to nothing, whose lse is infinite."""
    return size_log2 > largest(spec)


def overflows(spec: AttentionSpec, start: Float[Array, "..."]) -> Bool[Array, "..."]:
    """Flags of rows whose start is rounded by so much, 8 (float16) or 64 in base 2, that weights may overflow."""
    return jnp.abs(start) > (2.0**27 if spec.dtype == jnp.float16 else 2.0**30)
