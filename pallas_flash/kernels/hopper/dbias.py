"""The gradient of a bias of each key, in plain JAX: its own walk over query tiles, O(length) memory.

dbias = sum over queries, and over the axes along which the bias is broadcast, of dS = P * (dP - delta). No other result
depends on it, so XLA leaves it out of a program that does not ask for it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_flash import dropout, masks, softmax, tiles
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
    """The gradient of the bias, (batch or 1, heads or 1, 1, kv_len), in its dtype; sums are float32.

    Args:
      operands: as the kernels got them: the mask hides what a bias of -inf does.
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

    def add(total: Array, first: Array) -> tuple[Array, None]:
        tile = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, _ROWS, axis=2), rows)
        return total + _of_tile(spec, operands, first, tile), None

    start = jnp.zeros((spec.batch, spec.q_heads, spec.kv_len), jnp.float32)
    total, _ = jax.lax.scan(add, start, firsts)
    broadcast = tuple(axis for axis in (0, 1) if operands.bias.shape[axis] == 1)
    return total.sum(axis=broadcast, keepdims=True)[:, :, None].astype(spec.gradient_dtype(operands.bias.dtype))


def _of_tile(spec: AttentionSpec, operands: Operands, first: Array, rows: _Rows) -> Float[Array, "b h s"]:
    """Sums dS over a tile of queries."""
    k, v = (jnp.repeat(_heads_first(spec, x), spec.group, axis=1) for x in (operands.k, operands.v))
    product = functools.partial(jnp.einsum, "bhtd,bhsd->bhts", preferred_element_type=jnp.float32)
    s, _ = softmax.scores(product(rows.q, k), spec.scale, spec.softcap)
    bias = jnp.asarray(operands.bias).astype(jnp.float32)
    s = s * softmax.unit(spec.scale, spec.softcap) + (bias - rows.anchor[..., None])
    q_pos, kv_pos = first + jnp.arange(_ROWS, dtype=jnp.int32), jnp.arange(spec.kv_len, dtype=jnp.int32)
    keep = masks.over_batch(operands.mask, lambda part: part.keep(q_pos[:, None], kv_pos[None, :]))
    keep = keep & (q_pos < spec.q_len)[None, None, :, None]
    p = softmax.probabilities(jnp.where(keep, s, -jnp.inf), 1.0, rows.lse, rows.rest)
    dp = product(rows.dout, v)
    if operands.dropout_seed is not None:
        batch, head = (x[..., None, None] for x in jnp.ogrid[:spec.batch, :spec.q_heads])
        pairs = batch, head, q_pos[:, None], kv_pos[None, :]
        kept = dropout.keep(operands.dropout_seed, *pairs, spec.dropout_rate)
        dp = jnp.where(kept, dp * dropout.factor(spec.dropout_rate), 0.0)
    return jnp.where(keep, p * (dp - rows.delta[..., None]), 0.0).sum(axis=2)


def _heads_first(spec: AttentionSpec, x: Array) -> Array:
    return x if spec.layout == "BHLD" else x.swapaxes(1, 2)
