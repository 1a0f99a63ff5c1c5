"""Attention with an O(q_len * kv_len) score matrix, straight from the spec and `mask.keep`: the oracle.

It is plain JAX and differentiated by JAX itself, so forward mode and derivatives of any order work. float64 in,
float64 throughout. Keys that no query attends to and queries that attend to nothing are zeroed first, so NaN in
padding stays there; NaN in a key that some queries attend to and others do not reaches them all (0 * NaN), unlike in
the kernels.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_flash import dropout, masks, paging, quantised, scores, softmax
from pallas_flash.arrays import Array, Bool, Float
from pallas_flash.spec import AttentionSpec, Differentiable, Gradients, Operands, Results

__all__ = ["backward", "forward"]


def _bhld(x: Array, spec: AttentionSpec) -> Array:
    return x if spec.layout == "BHLD" else x.swapaxes(1, 2)


def _keep(spec: AttentionSpec, operands: Operands) -> Bool[Array, "b h t s"]:
    """Which pairs attend; a bias of -inf masks too."""
    q_pos, kv_pos = jnp.arange(spec.q_len, dtype=jnp.int32)[:, None], jnp.arange(spec.kv_len, dtype=jnp.int32)[None, :]
    keep = masks.over_batch(operands.mask, lambda part: part.keep(q_pos, kv_pos))
    if operands.bias is not None:
        keep = keep & (operands.bias != -jnp.inf)
    return jnp.broadcast_to(keep, (spec.batch, spec.q_heads, spec.q_len, spec.kv_len))


def _scores(spec: AttentionSpec, operands: Operands, q: Array, k: Array, keep: Array) -> tuple[Array, float]:
    """Scores, -inf where a pair does not attend, and their unit (see softmax.py)."""
    products = jnp.einsum("bhqd,bhsd->bhqs", q, k, precision=jax.lax.Precision.HIGHEST)
    (s, _), unit = softmax.scores(products, spec.scale, spec.softcap), softmax.unit(spec.scale, spec.softcap)
    function = spec.score_function(operands)
    if function is not None:
        s, keep = _after(function, s * unit, keep)
        unit = 1.0
    if operands.bias is not None:
        bias, anchor = (x.astype(s.dtype) for x in (operands.bias, spec.anchor(operands)))
        s, unit = s * unit + jnp.where(keep, bias, jnp.zeros_like(bias)) - anchor, 1.0
        s = jnp.where(s == -jnp.inf, jnp.finfo(s.dtype).min, s)  # masks of it, twice, stay finite
    return jnp.where(keep, s, -jnp.inf), unit


def _after(function: scores.Score, s: Float[Array, "b h t s"],
           keep: Bool[Array, "b h t s"]) -> tuple[Float[Array, "b h t s"], Bool[Array, "b h t s"]]:
    """The scores after the function, and which pairs attend: where it gives -inf, none do.

    Pairs that do not attend stand for others, so that a derivative that is NaN at them reaches nothing.
    """
    batch, heads, q_len, kv_len = s.shape
    pairs = scores.tile(batch, heads, *(jnp.arange(n, dtype=jnp.int32) for n in (q_len, kv_len)))
    keep = keep & (scores.applied(jax.lax.stop_gradient(function), jax.lax.stop_gradient(s), pairs) != -jnp.inf)
    s, pairs = scores.attending(s, pairs, keep)
    function, s = jax.tree.map(lambda x: jnp.where(keep.any(), x, jax.lax.stop_gradient(x)), (function, s))
    return scores.applied(function, s, pairs), keep


def _drop(spec: AttentionSpec, operands: Operands, p: Float[Array, "b h t s"]) -> Array:
    if operands.dropout_seed is None:
        return p
    batch, head, q_pos, kv_pos = jnp.ogrid[:spec.batch, :spec.q_heads, :spec.q_len, :spec.kv_len]
    place = dropout.moved((batch, head, q_pos, kv_pos), operands.dropout_origin)
    kept = dropout.keep(operands.dropout_seed, *place, spec.dropout_rate)
    return jnp.where(kept, p * dropout.factor(spec.dropout_rate), jnp.zeros_like(p))


class _Rows(NamedTuple):
    """What both passes begin with, (b h t s) and (b h s v)."""

    s: Float[Array, "b h t s"]  # -inf where a pair does not attend
    unit: float
    v: Float[Array, "b h s v"]


def _keys(spec: AttentionSpec, operands: Operands) -> tuple[Array, Array]:
    """k and v as they are without pages and without scales, in the spec's layout."""
    pos, axis, table = jnp.arange(spec.kv_len, dtype=jnp.int32), spec.layout.index("L"), operands.page_table
    if operands.cache_scales is not None:
        of_k, of_v = operands.cache_scales
        return (quantised.rows(operands.k, of_k, table, pos, axis, spec.acc_dtype),
                quantised.rows(operands.v, of_v, table, pos, axis, spec.acc_dtype))
    if table is None:
        return operands.k, operands.v
    k, v = (paging.rows(x, table, pos, axis) for x in (operands.k, operands.v))
    return k, v


def _rows(spec: AttentionSpec, operands: Operands) -> _Rows:
    keep = _keep(spec, operands)
    q, k, v = (_bhld(x, spec).astype(spec.acc_dtype) for x in (operands.q, *_keys(spec, operands)))
    k, v = (jnp.repeat(x, spec.group, axis=1) for x in (k, v))
    q, k, v = (jnp.where(keep.any(axis=axis)[..., None], x, jnp.zeros_like(x)) for x, axis in ((q, 3), (k, 2), (v, 2)))
    return _Rows(*_scores(spec, operands, q, k, keep), v)


def _weighted(spec: AttentionSpec, operands: Operands, p: Array, v: Array) -> Float[Array, "b t h v"]:
    """The weights p, some of them dropped, times v, in the spec's layout."""
    return _bhld(jnp.einsum("bhqs,bhsd->bhqd", _drop(spec, operands, p), v, precision=jax.lax.Precision.HIGHEST), spec)


def forward(spec: AttentionSpec, operands: Operands) -> Results[Array]:
    """out, in the spec's layout and `result_dtype`, and the statistics (`spec.stats_shape`), in `acc_dtype`.

    Of the statistics only lse means something here.
    """
    s, unit, v = _rows(spec, operands)
    row_max = jax.lax.stop_gradient(s.max(axis=-1, keepdims=True, initial=-jnp.inf))
    p = jnp.exp((s - jnp.where(row_max == -jnp.inf, 0.0, row_max)) * unit)
    row_sum = p.sum(axis=-1, keepdims=True)
    nothing = row_sum == 0
    row_sum = jnp.where(nothing, 1.0, row_sum)
    out = _weighted(spec, operands, p / row_sum, v)
    lse = jnp.where(nothing, -jnp.inf, jnp.where(nothing, 0.0, row_max) * unit + jnp.log(row_sum))[..., 0]
    return Results(out=out.astype(spec.result_dtype), stats=jnp.stack([lse, jnp.zeros_like(lse)], axis=2))


def backward(spec: AttentionSpec, operands: Operands, out: Array | None, stats: Array, dout: Array,
             dstats: Array) -> Gradients[Array]:
    """Cotangents of the differentiable operands, by JAX's own differentiation of `forward`; stats are needed only
    where they are those of more keys than the operands have (`AttentionSpec.partial`), out is not.
    """
    # JAX rounds a cotangent to the dtype of its operand.
    wide: Differentiable[Array] = jax.tree.map(
        lambda x: x.astype(spec.gradient_dtype(x.dtype)), operands.differentiable)
    cotangents: Differentiable[Array]
    if spec.partial:
        _, vjp = jax.vjp(lambda given: _sums(spec, Operands.of(given, operands.others), stats[:, :, 0]), wide)
        (cotangents,) = vjp((dout.astype(spec.result_dtype), dstats[:, :, 0]))  # -delta: there is no out
    else:
        _, vjp = jax.vjp(lambda given: forward(spec, Operands.of(given, operands.others)), wide)
        (cotangents,) = vjp(Results(dout.astype(spec.result_dtype), dstats))
    return cotangents.gradients(lambda x: x)


def _sums(spec: AttentionSpec, operands: Operands, lse: Array) -> tuple[Float[Array, "b t h v"], Float[Array, "b h t"]]:
    """These keys' terms of out, and of the sum of all weights, which is 1.

    With lse a constant, the cotangents dout and -delta of the two give the gradient of the softmax: P (dP - delta).
    """
    s, unit, v = _rows(spec, operands)
    p = jnp.exp(s * unit - jnp.where(lse == -jnp.inf, 0.0, lse)[..., None])
    return _weighted(spec, operands, p, v), p.sum(axis=-1)
