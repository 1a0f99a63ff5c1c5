"""Tiles of queries against all keys, in plain JAX: for gradients that the kernels do not make (`dbias`, `dscore`).

Each walks over the tiles once more, with O(length) memory beside its result. No other result depends on them, so XLA
leaves them out of a program that does not ask for them.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_flash import compat, dropout, masks, softmax, tiles
from pallas_flash.arrays import Array, Bool, Float, Int
from pallas_flash.spec import AttentionSpec, Operands, Results

__all__ = ["ROWS", "Positions", "Rows", "Tile", "keep_of", "products", "rows_of", "score_gradients", "walk"]

ROWS = 128


class Rows(NamedTuple):
    """What query tiles need: (b, h, t, ...) each, padded to whole tiles; or a tile of it."""

    q: Float[Array, "b h t d"]
    dout: Float[Array, "b h t v"]
    lse: Float[Array, "b h t"]
    rest: Float[Array, "b h t"]
    delta: Float[Array, "b h t"]
    anchor: Float[Array, "b h t"]


class Positions(NamedTuple):
    """Of a tile's queries, also past the end, and of all keys."""

    q: Int[Array, " t"]
    kv: Int[Array, " s"]


class Tile(NamedTuple):
    """A tile of queries against all keys."""

    rows: Rows
    at: Positions
    key: Int[Array, "b h 2"] | None  # dropout's (`mosaic.dropout.inputs`); None: there is no dropout


def rows_of(spec: AttentionSpec, operands: Operands, results: Results[Array], cotangents: Results[Array]) -> Rows:
    """Prepares what all tiles need."""
    (out, stats), (dout, dstats) = (Results(_heads_first(spec, x.out), x.stats) for x in (results, cotangents))
    delta = softmax.delta(out, dout, dstats[:, :, 0], spec.acc_dtype)
    anchor = jnp.zeros_like(delta)
    if spec.bias is not None:
        anchor = jnp.broadcast_to(spec.anchor(operands)[..., 0].astype(jnp.float32), delta.shape)
    rows = Rows(_heads_first(spec, operands.q), dout, stats[:, :, 0], stats[:, :, 1], delta, anchor)
    padding = tiles.cdiv(spec.q_len, ROWS) * ROWS - spec.q_len
    padded: Rows = jax.tree.map(
        lambda x: jnp.pad(x, [(0, padding) if i == 2 else (0, 0) for i in range(x.ndim)]), rows)
    return padded


def walk[Total](spec: AttentionSpec, rows: Rows, keys: Sequence[Int[Array, "b h 2"]],
                add: Callable[[Total, Tile], tuple[Total, Array | None]], zeros: Total) -> tuple[Total, Array | None]:
    """Runs `add` over the tiles, from zeros; returns the total, and what it gave beside it, stacked.

    Args:
      keys: dropout's (`mosaic.dropout.inputs`).
    """
    def step(total: Total, first: Array) -> tuple[Total, Array | None]:
        own: Rows = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, ROWS, axis=2), rows)
        at = Positions(first + jnp.arange(ROWS, dtype=jnp.int32), jnp.arange(spec.kv_len, dtype=jnp.int32))
        return add(total, Tile(own, at, keys[0] if keys else None))

    firsts = jnp.arange(0, spec.q_len, ROWS, dtype=jnp.int32)
    found: tuple[Total, Array | None] = jax.lax.scan(step, compat.vary_like(zeros, rows), firsts)
    return found


def keep_of(spec: AttentionSpec, operands: Operands, at: Positions) -> Bool[Array, "1|b 1|h t s"]:
    """Which pairs of a tile the mask keeps."""
    keep = masks.over_batch(operands.mask, lambda part: part.keep(at.q[:, None], at.kv[None, :]))
    return keep & (at.q < spec.q_len)[None, None, :, None]


def products(spec: AttentionSpec, operands: Operands, rows: Rows) -> Float[Array, "b h t s"]:
    """Computes the scores of a tile, scaled and soft-capped, in their unit."""
    s, _ = softmax.scores(_product(spec, rows.q, operands.k), spec.scale, spec.softcap)
    return s


def score_gradients(spec: AttentionSpec, operands: Operands, tile: Tile, s: Array,
                    keep: Array) -> Float[Array, "b h t s"]:
    """Computes dS of a tile from its scores s, in the unit 1, of what the softmax is of."""
    rows, at, key = tile
    p = softmax.probabilities(jnp.where(keep, s, -jnp.inf), 1.0, rows.lse, rows.rest)
    dp = _product(spec, rows.dout, operands.v)
    if key is not None:
        words = jax.lax.bitcast_convert_type(key, jnp.uint32)[..., None, None]
        query, position = (x.astype(jnp.uint32) for x in (at.q[None, None, :, None], at.kv[None, None, None, :]))
        if spec.dropout_moved:
            query, position = words[:, :, 2] + query, words[:, :, 3] + position
        kept = dropout.kept_by((words[:, :, 0], words[:, :, 1]), query, position, spec.dropout_rate)
        dp = jnp.where(kept, dp * dropout.factor(spec.dropout_rate), 0.0)
    return jnp.where(keep, p * (dp - rows.delta[..., None]), 0.0)


def _product(spec: AttentionSpec, x: Array, keys: Array) -> Float[Array, "b h t s"]:
    """Multiplies rows with keys, or with values."""
    product = functools.partial(jnp.einsum, "bhtd,bhsd->bhts", preferred_element_type=jnp.float32)
    return product(x, jnp.repeat(_heads_first(spec, keys), spec.group, axis=1))


def _heads_first(spec: AttentionSpec, x: Array) -> Array:
    return x if spec.layout == "BHLD" else x.swapaxes(1, 2)
