"""The gradients of a score function's arrays, in plain JAX: their own walk over query tiles (`query_tiles`).

Each is the sum over all pairs of dS times the function's derivative by the array.
"""

import jax
import jax.numpy as jnp

from pallas_flash import scores, softmax, tiles
from pallas_flash.arrays import Array, Int
from pallas_flash.kernels.mosaic import query_tiles
from pallas_flash.kernels.mosaic.score_function import LOWEST
from pallas_flash.spec import AttentionSpec, Operands, Results

__all__ = ["dscore"]


def dscore(spec: AttentionSpec, operands: Operands, results: Results[Array], cotangents: Results[Array],
           keys: tuple[Int[Array, "b h 2"], ...]) -> tuple[Array, ...]:
    """The gradients of the floating-point arrays, in the order of the function's fields, each in its dtype; sums are
    float32.

    Args:
      operands: those of the call.
      keys: dropout's (`mosaic.dropout.inputs`).
    """
    rows = query_tiles.rows_of(spec, operands, results, cotangents)
    function = _expanded(spec, operands)

    def add(total: tuple[Array, ...], tile: query_tiles.Tile) -> tuple[tuple[Array, ...], None]:
        found = _of_tile(spec, operands, function, tile)
        return tuple(a + b for a, b in zip(total, found, strict=True)), None

    zeros = tuple(map(jnp.zeros_like, scores.floats(function)))
    total, _ = query_tiles.walk(spec, rows, keys, add, zeros)
    wide = tuple(x.astype(spec.gradient_dtype(x.dtype)) for x in operands.score)
    _, pullback = jax.vjp(lambda given: scores.floats(_expanded(spec, operands._replace(score=given))), wide)
    (own,) = pullback(total)
    gradients: tuple[Array, ...] = own
    return gradients


def _expanded(spec: AttentionSpec, operands: Operands) -> scores.Score:
    """The function in the form that tiles read fastest."""
    function = spec.score_function(operands)
    assert function is not None
    return function.expanded(tiles.cdiv(spec.q_len, query_tiles.ROWS) * query_tiles.ROWS, spec.kv_len)


def _of_tile(spec: AttentionSpec, operands: Operands, function: scores.Score,
             tile: query_tiles.Tile) -> tuple[Array, ...]:
    """Computes what a tile of queries adds."""
    at = tile.at
    pairs = scores.tile(spec.batch, spec.q_heads, at.q, at.kv)
    before = query_tiles.products(spec, operands, tile.rows) * softmax.unit(spec.scale, spec.softcap)
    s = scores.applied(function, before, pairs)
    keep = query_tiles.keep_of(spec, operands, at) & (s != -jnp.inf)
    s = scores.even_if_large(jnp.maximum(s, LOWEST))  # as the kernels have it, whose statistics these are
    ds = query_tiles.score_gradients(spec, operands, tile, s, keep)
    return scores.gradients(function, before, pairs, keep, ds)
