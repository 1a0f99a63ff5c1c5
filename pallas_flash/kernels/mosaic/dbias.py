"""The gradient of a bias, in plain JAX: its own walk over query tiles (`query_tiles`). Kernels may take its place.

dbias = sum over queries, and over the axes along which the bias is broadcast, of dS = P * (dP - delta).
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_flash import device, softmax
from pallas_flash.arrays import Array, Float, Int
from pallas_flash.device import Device
from pallas_flash.kernels.mosaic import query_tiles
from pallas_flash.kernels.mosaic.call import Build, Computation, partitioned
from pallas_flash.spec import AttentionSpec, Operands, Results

__all__ = ["dbias", "operands_of", "result_type", "walk"]


def dbias(spec: AttentionSpec, operands: Operands, results: Results[Array], cotangents: Results[Array],
          keys: tuple[Int[Array, "b h 2"], ...], build: Build | None = None) -> Array:
    """The gradient of the bias, (batch or 1, heads or 1, 1 or q_len, kv_len), in `spec.gradient_dtype` of its dtype;
    sums are float32.

    Split over devices, each computes that of its own batch entries and heads; along axes that the bias does not have,
    an all-reduce adds these up, once, in float32. Under `vmap` each element has a gradient of its own, whether the bias
    is mapped or not, and nothing is split but by XLA's own choice.

    Args:
      operands: those of the call.
      keys: dropout's (`mosaic.dropout.inputs`).
      build: makes what computes it of the spec of each device, if it is not always `walk`. Under `vmap` it is.
    """
    assert operands.bias is not None
    fields = jax.tree.leaves(operands.mask)
    roles = f"query key key query row query row {'row ' * len(keys)}{'field ' * len(fields)}bias -> bias"
    call = _split(spec, roles, walk if build is None else build, device.current())
    found: Array = call(operands.q, operands.k, operands.v, *results, *cotangents, *keys, *fields, operands.bias)
    return found


@functools.lru_cache(maxsize=1024)
def _split(spec: AttentionSpec, roles: str, build: Build, where: Device) -> jax.custom_batching.custom_vmap:
    @jax.custom_batching.custom_vmap
    def call(*arrays: Array) -> Array:
        return partitioned(build, roles, spec, *arrays, device=where)[0]

    @call.def_vmap
    def rule(_: int, in_batched: list[bool], *arrays: Array) -> tuple[Array, bool]:
        one = lambda *arrays: walk(spec)(*arrays)[0]
        return jax.vmap(one, [0 if is_mapped else None for is_mapped in in_batched])(*arrays), True
    return call


@dataclasses.dataclass(frozen=True)
class _Computation:
    """See `walk`."""

    spec: AttentionSpec

    @property
    def result_types(self) -> tuple[jax.ShapeDtypeStruct]:
        return (result_type(self.spec),)

    def __call__(self, *arrays: Array) -> tuple[Array]:
        operands, keys = operands_of(self.spec, arrays)
        out, stats, dout, dstats = arrays[3:7]
        rows = query_tiles.rows_of(self.spec, operands, Results(out, stats), Results(dout, dstats))
        return (_gradient(self.spec, operands, rows, keys),)


def result_type(spec: AttentionSpec) -> jax.ShapeDtypeStruct:
    """Shape and dtype of the gradient of the bias."""
    assert spec.bias is not None
    return jax.ShapeDtypeStruct(spec.bias.shape, spec.gradient_dtype(spec.bias.dtype))


def operands_of(spec: AttentionSpec, arrays: Sequence[Array]) -> tuple[Operands, Sequence[Int[Array, "b h 2"]]]:
    """The operands, and dropout's keys, of the arguments of `walk(spec)`."""
    (q, k, v), (*rest, bias) = arrays[:3], arrays[7:]
    fields, structure = jax.tree.flatten(spec.mask)
    keys = rest[:len(rest) - len(fields)]
    mask = jax.tree.unflatten(structure, rest[len(keys):])
    return Operands(q=q, k=k, v=v, bias=bias, score=(), mask=mask, score_integers=(), dropout_seed=None,
                    dropout_origin=None, page_table=None), keys


@functools.lru_cache(maxsize=1024)
def walk(spec: AttentionSpec) -> Computation:
    """The gradient of a bias as a function of q, k, v, out, stats and the cotangents of these two, of dropout's keys,
    of the arrays of the mask, and of the bias. The same object for the same spec.
    """
    return _Computation(spec)


def _gradient(spec: AttentionSpec, operands: Operands, rows: query_tiles.Rows,
              keys: Sequence[Int[Array, "b h 2"]]) -> Array:
    """The walk over query tiles."""
    assert operands.bias is not None
    shape, dtype = operands.bias.shape, spec.gradient_dtype(operands.bias.dtype)
    broadcast = tuple(axis for axis in (0, 1, 2) if shape[axis] == 1)

    def add(total: Array, tile: query_tiles.Tile) -> tuple[Array, Array | None]:
        found = _of_tile(spec, operands, tile).sum(axis=broadcast, keepdims=True)
        return (total + found, None) if shape[2] == 1 else (total, found.astype(dtype))

    zeros = jnp.zeros((*shape[:2], 1, shape[3]), jnp.float32)
    total, of_tiles = query_tiles.walk(spec, rows, keys, add, zeros)
    if of_tiles is None:
        return total.astype(dtype)
    return jnp.moveaxis(of_tiles, 0, 2).reshape(*shape[:2], -1, shape[3])[:, :, :spec.q_len]


def _of_tile(spec: AttentionSpec, operands: Operands, tile: query_tiles.Tile) -> Float[Array, "b h t s"]:
    """Computes dS of a tile of queries."""
    bias, at = operands.bias, tile.at
    assert bias is not None
    if bias.shape[2] > 1:
        bias = jnp.take(bias, jnp.minimum(at.q, spec.q_len - 1), axis=2)
    keep = query_tiles.keep_of(spec, operands, at) & (bias != -jnp.inf)
    s = query_tiles.products(spec, operands, tile.rows) * softmax.unit(spec.scale, spec.softcap)
    s = s + bias.astype(jnp.float32) - tile.rows.anchor[..., None]
    return query_tiles.score_gradients(spec, operands, tile, s, keep)
