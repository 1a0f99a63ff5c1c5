"""The gradient of a bias, in plain JAX: its own walk over query tiles (`query_tiles`).

dbias = sum over queries, and over the axes along which the bias is broadcast, of dS = P * (dP - delta).
"""

import jax
import jax.numpy as jnp

from pallas_flash import compat, softmax
from pallas_flash.arrays import Array, Float
from pallas_flash.kernels.hopper import query_tiles
from pallas_flash.spec import AttentionSpec, Operands, Results

__all__ = ["dbias"]


def dbias(spec: AttentionSpec, operands: Operands, results: Results[Array], cotangents: Results[Array]) -> Array:
    """The gradient of the bias, (batch or 1, heads or 1, 1 or q_len, kv_len), in its dtype; sums are float32.

    Args:
      operands: those of the call.
    """
    assert operands.bias is not None
    rows, firsts = query_tiles.rows_of(spec, operands, results, cotangents)
    shape, dtype = operands.bias.shape, spec.gradient_dtype(operands.bias.dtype)
    broadcast = tuple(axis for axis in (0, 1, 2) if shape[axis] == 1)

    def step(total: Array, first: Array) -> tuple[Array, Array | None]:
        found = _of_tile(spec, operands, first, query_tiles.tile_of(rows, first)).sum(axis=broadcast, keepdims=True)
        return (total + found, None) if shape[2] == 1 else (total, found.astype(dtype))

    zeros = compat.vary_like(jnp.zeros((*shape[:2], 1, shape[3]), jnp.float32), rows)
    total, of_tiles = jax.lax.scan(step, zeros, firsts)
    if of_tiles is None:
        return total.astype(dtype)
    return jnp.moveaxis(of_tiles, 0, 2).reshape(*shape[:2], -1, shape[3])[:, :, :spec.q_len]


def _of_tile(spec: AttentionSpec, operands: Operands, first: Array,
             rows: query_tiles.Rows) -> Float[Array, "b h t s"]:
    """Computes dS of a tile of queries."""
    bias, at = operands.bias, query_tiles.positions(spec, first)
    assert bias is not None
    if bias.shape[2] > 1:
        bias = jnp.take(bias, jnp.minimum(at.q, spec.q_len - 1), axis=2)
    keep = query_tiles.keep_of(spec, operands, at) & (bias != -jnp.inf)
    s = query_tiles.products(spec, operands, rows) * softmax.unit(spec.scale, spec.softcap)
    s = s + bias.astype(jnp.float32) - rows.anchor[..., None]
    return query_tiles.score_gradients(spec, operands, rows, at, s, keep)
