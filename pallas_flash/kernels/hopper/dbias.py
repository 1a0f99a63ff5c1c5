"""The gradient of a bias, in plain JAX: its own walk over query tiles, O(length) memory beside it.

dbias = sum over queries, and over the axes along which the bias is broadcast, of dS = P * (dP - delta). No other result
depends on it, so XLA leaves it out of a program that does not ask for it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_flash import compat, dropout, masks, softmax, tiles
from pallas_flash.arrays import Array, Float
from pallas_flash.spec import AttentionSpec, Operands, Results

__all__ = ["dbias"]

_ROWS = 128


class _Rows(NamedTuple):
    """What a query tile needs: (b, h, t, ...) each, padded."""

    q: Float[Array, "b h t d"]
    dout: Float[Array, "b h t v"]
    lse: Float[Array, "b h t"]
    rest: Float[Array, "b h t"]
    delta: Float[Array, "b h t"]
    anchor: Float[Array, "b h t"]


def dbias(spec: AttentionSpec, operands: Operands, results: Results[Array], cotangents: Results[Array]) -> Array:
    """The gradient of the bias, (batch or 1, heads or 1, 1 or q_len, kv_len), in its dtype; sums are float32.

    Args:
      operands: those of the call.
    """
    assert operands.bias is not None
    (out, stats), (dout, dstats) = (Results(_heads_first(spec, x.out), x.stats) for x in (results, cotangents))
    anchor = spec.anchor(operands)[..., 0].astype(jnp.float32)
    delta = softmax.delta(out, dout, dstats[:, :, 0], spec.acc_dtype)
    rows = _Rows(_heads_first(spec, operands.q), dout, stats[:, :, 0], stats[:, :, 1], delta,
                 jnp.broadcast_to(anchor, delta.shape))
    firsts = jnp.arange(0, spec.q_len, _ROWS, dtype=jnp.int32)
    padding = tiles.cdiv(spec.q_len, _ROWS) * _ROWS - spec.q_len
    rows = jax.tree.map(lambda x: jnp.pad(x, [(0, padding) if i == 2 else (0, 0) for i in range(x.ndim)]), rows)

    shape, dtype = operands.bias.shape, spec.gradient_dtype(operands.bias.dtype)
    broadcast = tuple(axis for axis in (0, 1, 2) if shape[axis] == 1)

    def step(total: Array, first: Array) -> tuple[Array, Array | None]:
        tile = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, _ROWS, axis=2), rows)
        found = _of_tile(spec, operands, first, tile).sum(axis=broadcast, keepdims=True)
        return (total + found, None) if shape[2] == 1 else (total, found.astype(dtype))

    zeros = compat.vary_like(jnp.zeros((*shape[:2], 1, shape[3]), jnp.float32), rows)
    total, of_tiles = jax.lax.scan(step, zeros, firsts)
    if of_tiles is None:
        return total.astype(dtype)
    return jnp.moveaxis(of_tiles, 0, 2).reshape(*shape[:2], -1, shape[3])[:, :, :spec.q_len]


def _of_tile(spec: AttentionSpec, operands: Operands, first: Array, rows: _Rows) -> Float[Array, "b h t s"]:
    """Computes dS of a tile of queries."""
    k, v = (jnp.repeat(_heads_first(spec, x), spec.group, axis=1) for x in (operands.k, operands.v))
    product = functools.partial(jnp.einsum, "bhtd,bhsd->bhts", preferred_element_type=jnp.float32)
    s, _ = softmax.scores(product(rows.q, k), spec.scale, spec.softcap)
    q_pos, kv_pos = first + jnp.arange(_ROWS, dtype=jnp.int32), jnp.arange(spec.kv_len, dtype=jnp.int32)
    assert operands.bias is not None
    bias = operands.bias
    if bias.shape[2] > 1:
        bias = jnp.take(bias, jnp.minimum(q_pos, spec.q_len - 1), axis=2)
    keep = masks.over_batch(operands.mask, lambda part: part.keep(q_pos[:, None], kv_pos[None, :]))
    keep = keep & (q_pos < spec.q_len)[None, None, :, None] & (bias != -jnp.inf)
    bias = bias.astype(jnp.float32)
    s = s * softmax.unit(spec.scale, spec.softcap) + bias - rows.anchor[..., None]
    p = softmax.probabilities(jnp.where(keep, s, -jnp.inf), 1.0, rows.lse, rows.rest)
    dp = product(rows.dout, v)
    if operands.dropout_seed is not None:
        batch, head = (x[..., None, None] for x in jnp.ogrid[:spec.batch, :spec.q_heads])
        pairs = batch, head, q_pos[:, None], kv_pos[None, :]
        kept = dropout.keep(operands.dropout_seed, *pairs, spec.dropout_rate)
        dp = jnp.where(kept, dp * dropout.factor(spec.dropout_rate), 0.0)
    return jnp.where(keep, p * (dp - rows.delta[..., None]), 0.0)


def _heads_first(spec: AttentionSpec, x: Array) -> Array:
    return x if spec.layout == "BHLD" else x.swapaxes(1, 2)
