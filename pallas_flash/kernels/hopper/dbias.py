"""The gradient of a bias, in plain JAX: its own walk over query tiles, O(length) memory beside it.

dbias = sum over queries, and over the axes along which the bias is broadcast, of dS = P * (dP - delta). No other result
depends on it, so XLA leaves it out of a program that does not ask for it.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_flash import compat, dropout, masks, softmax, tiles
from pallas_flash.arrays import Array, Float, Int
from pallas_flash.kernels.mosaic.call import partitioned
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


def dbias(spec: AttentionSpec, operands: Operands, results: Results[Array], cotangents: Results[Array],
          keys: tuple[Int[Array, "b h 2"], ...]) -> Array:
    """The gradient of the bias, (batch or 1, heads or 1, 1 or q_len, kv_len), in `spec.gradient_dtype` of its dtype;
    sums are float32.

    Split over devices, each computes that of its own batch entries and heads; along axes that the bias does not have,
    an all-reduce adds these up, once, in float32. Under `vmap` each element has a gradient of its own, whether the bias
    is mapped or not, and nothing is split but by XLA's own choice.

    Args:
      operands: those of the call.
      keys: dropout's (`mosaic.dropout.inputs`).
    """
    assert operands.bias is not None
    fields = jax.tree.leaves(operands.mask)
    roles = f"query key key query row query row {'row ' * len(keys)}{'field ' * len(fields)}bias -> bias"
    found: Array = _split(spec, roles)(operands.q, operands.k, operands.v, *results, *cotangents, *keys, *fields,
                                       operands.bias)
    return found


@functools.lru_cache(maxsize=1024)
def _split(spec: AttentionSpec, roles: str) -> jax.custom_batching.custom_vmap:
    @jax.custom_batching.custom_vmap
    def call(*arrays: Array) -> Array:
        return partitioned(_computation, roles, spec, *arrays)[0]

    @call.def_vmap
    def rule(_: int, in_batched: list[bool], *arrays: Array) -> tuple[Array, bool]:
        one = lambda *arrays: _computation(spec)(*arrays)[0]
        return jax.vmap(one, [0 if is_mapped else None for is_mapped in in_batched])(*arrays), True
    return call


@dataclasses.dataclass(frozen=True)
class _Computation:
    """The gradient of a bias as a function of q, k, v, out, stats and the cotangents of these two, of dropout's keys,
    of the arrays of the mask, and of the bias.
    """

    spec: AttentionSpec

    @property
    def result_types(self) -> tuple[jax.ShapeDtypeStruct]:
        bias = self.spec.bias
        assert bias is not None
        return (jax.ShapeDtypeStruct(bias.shape, self.spec.gradient_dtype(bias.dtype)),)

    def __call__(self, *arrays: Array) -> tuple[Array]:
        (q, k, v, *saved), (*rest, bias) = arrays[:7], arrays[7:]
        fields, structure = jax.tree.flatten(self.spec.mask)
        keys = rest[:len(rest) - len(fields)]
        operands = Operands(q=q, k=k, v=v, bias=bias, score=(), mask=jax.tree.unflatten(structure, rest[len(keys):]),
                            score_integers=(), dropout_seed=None, dropout_origin=None, page_table=None)
        return (_gradient(self.spec, operands, _rows(self.spec, operands, saved), keys[0] if keys else None),)


@functools.lru_cache(maxsize=1024)
def _computation(spec: AttentionSpec) -> _Computation:
    """The same object for the same spec."""
    return _Computation(spec)


def _rows(spec: AttentionSpec, operands: Operands, saved: Sequence[Array]) -> _Rows:
    """Those of all queries, padded to whole tiles."""
    out, stats, dout, dstats = saved
    out, dout = _heads_first(spec, out), _heads_first(spec, dout)
    anchor = spec.anchor(operands)[..., 0].astype(jnp.float32)
    delta = softmax.delta(out, dout, dstats[:, :, 0], spec.acc_dtype)
    rows = _Rows(_heads_first(spec, operands.q), dout, stats[:, :, 0], stats[:, :, 1], delta,
                 jnp.broadcast_to(anchor, delta.shape))
    padding = tiles.cdiv(spec.q_len, _ROWS) * _ROWS - spec.q_len
    padded: _Rows = jax.tree.map(
        lambda x: jnp.pad(x, [(0, padding) if i == 2 else (0, 0) for i in range(x.ndim)]), rows)
    return padded


def _gradient(spec: AttentionSpec, operands: Operands, rows: _Rows, key: Int[Array, "b h 2"] | None) -> Array:
    """The walk over query tiles."""
    assert operands.bias is not None
    shape, dtype = operands.bias.shape, spec.gradient_dtype(operands.bias.dtype)
    broadcast = tuple(axis for axis in (0, 1, 2) if shape[axis] == 1)

    def step(total: Array, first: Array) -> tuple[Array, Array | None]:
        tile = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, _ROWS, axis=2), rows)
        found = _of_tile(spec, operands, first, tile, key).sum(axis=broadcast, keepdims=True)
        return (total + found, None) if shape[2] == 1 else (total, found.astype(dtype))

    zeros = compat.vary_like(jnp.zeros((*shape[:2], 1, shape[3]), jnp.float32), rows)
    total, of_tiles = jax.lax.scan(step, zeros, jnp.arange(0, spec.q_len, _ROWS, dtype=jnp.int32))
    if of_tiles is None:
        return total.astype(dtype)
    return jnp.moveaxis(of_tiles, 0, 2).reshape(*shape[:2], -1, shape[3])[:, :, :spec.q_len]


def _of_tile(spec: AttentionSpec, operands: Operands, first: Array, rows: _Rows,
             key: Int[Array, "b h 2"] | None) -> Float[Array, "b h t s"]:
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
    if key is not None:
        words = jax.lax.bitcast_convert_type(key, jnp.uint32)[..., None, None]
        query, at = (x.astype(jnp.uint32) for x in (q_pos[None, None, :, None], kv_pos[None, None, None, :]))
        kept = dropout.kept_by((words[:, :, 0], words[:, :, 1]), query, at, spec.dropout_rate)
        dp = jnp.where(kept, dp * dropout.factor(spec.dropout_rate), 0.0)
    return jnp.where(keep, p * (dp - rows.delta[..., None]), 0.0)


def _heads_first(spec: AttentionSpec, x: Array) -> Array:
    return x if spec.layout == "BHLD" else x.swapaxes(1, 2)
