"""Backward: for each key tile, over the query tiles that its mask needs, five products (FlashAttention-2, Dao, 2023).

With P = exp(S - lse): dV = P^T dO; dP = dO V^T; dS = P * (dP - delta); dQ = dS K; dK = dS^T Q. Tiles run one after the
other, so the order of the sums is fixed and the gradients are bit-equal on every run.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_flash import compat, paging, quantised, scores, softmax, tiles
from pallas_flash.arrays import Array, Float
from pallas_flash.kernels.xla import blocks, schedule
from pallas_flash.spec import AttentionSpec, Gradients, Operands

__all__ = ["backward"]


def backward(spec: AttentionSpec, operands: Operands, out: Array | None, stats: Array, dout: Array,
             dstats: Array) -> Gradients[Array]:
    """Cotangents of the differentiable operands, in `spec.gradient_dtype`.

    Args:
      out, dout: the forward's result and its cotangent, in the spec's layout.
      stats, dstats: the forward's statistics and their cotangent, of which only that of lse counts
        (`spec.stats_shape`). Without out, dstats hold -delta (`autodiff.without_out`).

    Keys and values in pages are gathered first, and those with scales multiplied; these have no gradient: 0.
    """
    if operands.cache_scales is not None:
        pos, axis = jnp.arange(spec.kv_len, dtype=jnp.int32), spec.layout.index("L")
        k, v = (quantised.rows(x, scale, operands.page_table, pos, axis, spec.acc_dtype)
                for x, scale in zip((operands.k, operands.v), operands.cache_scales, strict=True))
        found = backward(dataclasses.replace(spec, pages=None, cache_scales=None),
                         operands._replace(k=k, v=v, page_table=None, cache_scales=None), out, stats, dout, dstats)
        return found._replace(dk=jnp.zeros_like(operands.k), dv=jnp.zeros_like(operands.v))
    if operands.page_table is not None:
        operands, to_pages = _gathered(spec, operands, operands.page_table)
        found = backward(spec.paged(None), operands, out, stats, dout, dstats)
        return found._replace(dk=to_pages(found.dk), dv=to_pages(found.dv))
    problem = blocks.prepare(spec, operands, schedule.default(spec))
    saved = _saved(problem, out, stats, dout, dstats)
    acc, result = spec.acc_dtype, spec.result_dtype

    def kv_step(kv_tile: Array, carry: tuple[Array, Array, _Sums]) -> tuple[Array, Array, _Sums]:
        dk, dv, sums = carry
        dk_tile, dv_tile, sums = _key_tile(problem, saved, kv_tile, sums)
        dk, dv = (blocks.update_tile(whole, tile, kv_tile, problem.schedule.block_kv, problem.kv_axis)
                  for whole, tile in ((dk, dk_tile), (dv, dv_tile)))
        return dk, dv, sums

    sums = _Sums(dq=jnp.zeros(problem.q.shape, acc),
                 dbias=None if problem.bias is None else jnp.zeros(problem.bias.shape, acc),
                 dscore=tuple(map(jnp.zeros_like, scores.floats(problem.score))))
    start = compat.vary_like((jnp.zeros(problem.k.shape, result), jnp.zeros(problem.v.shape, result), sums),
                             operands, dout, dstats)
    dk, dv, (dq, dbias, dscore) = jax.lax.fori_loop(
        jnp.int32(0), jnp.int32(problem.num_kv_tiles), kv_step, start)
    dk, dv = (jax.lax.slice_in_dim(x, 0, spec.kv_len, axis=spec.layout.index("L")) for x in (dk, dv))
    dq = jax.lax.slice_in_dim(dq, 0, spec.q_len, axis=problem.q_axis).reshape(operands.q.shape).astype(result)
    if operands.bias is not None and dbias is not None:
        dbias = dbias[tuple(slice(size) for size in operands.bias.shape)]
        dbias = dbias.astype(spec.gradient_dtype(operands.bias.dtype))
    return Gradients(dq=dq, dk=dk, dv=dv, dbias=dbias, dscore=_of_operands(problem, operands, dscore))


class _Sums(NamedTuple):
    """Running sums over all tiles, in `acc_dtype`; those of the score function are of its expanded arrays."""

    dq: Array
    dbias: Array | None
    dscore: tuple[Array, ...]


def _of_operands(problem: blocks.Problem, operands: Operands, dscore: tuple[Array, ...]) -> tuple[Array, ...]:
    """The gradients of the score function's arrays from those of the expanded ones."""
    spec = problem.spec

    def expanded(given: tuple[Array, ...]) -> tuple[Array, ...]:
        return scores.floats(blocks.expanded_score(spec, operands._replace(score=given), problem.schedule))
    wide = tuple(x.astype(spec.gradient_dtype(x.dtype)) for x in operands.score)
    found: tuple[Array, ...] = jax.vjp(expanded, wide)[1](dscore)[0]
    return found


def _gathered(spec: AttentionSpec, operands: Operands,
              page_table: Array) -> tuple[Operands, Callable[[Array], Array]]:
    """The operands with keys and values one after the other, and what adds up their gradients page by page."""
    pos, axis = jnp.arange(spec.kv_len, dtype=jnp.int32), spec.layout.index("L")
    read = functools.partial(paging.rows, page_table=page_table, pos=pos, axis=axis)

    def to_pages(gradient: Array) -> Array:
        pages = jax.ShapeDtypeStruct((*spec.operand_shapes.k[:3], gradient.shape[3]), spec.acc_dtype)
        (summed,) = jax.linear_transpose(read, pages)(gradient.astype(spec.acc_dtype))
        rounded: Array = summed.astype(gradient.dtype)
        return rounded
    return operands._replace(k=read(operands.k), v=read(operands.v), page_table=None), to_pages


class _Saved(NamedTuple):
    """What the forward kept and the cotangent of out, padded to whole tiles; rows are (b, k, g, q)."""

    dout: Float[Array, "b q k g v"]  # in the layout "BLHD"
    lse: Float[Array, "b k g q"]
    rest: Float[Array, "b k g q"]
    delta: Float[Array, "b k g q"]


def _saved(problem: blocks.Problem, out: Array | None, stats: Array, dout: Array, dstats: Array) -> _Saved:
    spec, padded = problem.spec, problem.num_q_tiles * problem.schedule.block_q
    lse, rest, dlse = stats[:, :, 0], stats[:, :, 1], dstats[:, :, 0]
    axis = spec.layout.index("L")
    if out is None:
        delta = -dlse
    else:
        delta = softmax.delta(out, dout, dlse if spec.layout == "BHLD" else dlse.swapaxes(1, 2), spec.acc_dtype)
        delta = delta if spec.layout == "BHLD" else delta.swapaxes(1, 2)
    lse, rest, delta = (problem.split_heads(blocks.pad(x, padded, 2)) for x in (lse, rest, delta))
    return _Saved(blocks.split_q_heads(blocks.pad(dout, padded, axis), spec), lse, rest, delta)


def _key_tile(problem: blocks.Problem, saved: _Saved, kv_tile: Array, sums: _Sums) -> tuple[Array, Array, _Sums]:
    """One key tile's dk and dv, and the sums with what it adds to them."""
    block_q, block_kv = problem.schedule.block_q, problem.schedule.block_kv
    k, v = problem.k_tile(kv_tile), problem.v_tile(kv_tile)

    def q_step(q_tile: Array, carry: tuple[Array, Array, _Sums], masked: bool) -> tuple[Array, Array, _Sums]:
        dk, dv, (dq, dbias, dscore) = carry
        dk_part, dv_part, dq_part, ds, tile = _tile_gradients(problem, saved, k, v, q_tile, kv_tile, masked)
        dq = blocks.update_tile(dq, problem.q_tile(dq, q_tile) + dq_part, q_tile, block_q, problem.q_axis)
        if dbias is not None:
            dbias = _add_dbias(problem, dbias, ds, q_tile, kv_tile)
        dscore_part = problem.score_gradients(tile, q_tile, kv_tile, ds)
        dscore = tuple(whole + part for whole, part in zip(dscore, dscore_part, strict=True))
        return dk + dk_part, dv + dv_part, _Sums(dq, dbias, dscore)

    acc = problem.spec.acc_dtype
    start = compat.vary_like((jnp.zeros(k.shape, acc), jnp.zeros(v.shape, acc), sums), sums.dq)
    # Not clamped to the real length: the last key tile's padding must be masked, its products would not be finite.
    interval = (kv_tile * block_kv, (kv_tile + 1) * block_kv)
    q_tiles = tiles.q_tiles(problem.mask, interval, block_q, problem.spec.q_len)
    return tiles.sweep(problem.needed(q_tiles), q_step, start)


def _tile_gradients(problem: blocks.Problem, saved: _Saved, k: Array, v: Array, q_tile: Array, kv_tile: Array,
                    masked: bool) -> tuple[Array, Array, Array, Array, blocks.Tile]:
    """dk, dv, dq of one tile in the subscripts of k, v and q, dS before score function, scale and soft cap,
    (b, k, g, q, s), and the tile."""
    spec = problem.spec
    q, dout = problem.q_tile(problem.q, q_tile), problem.q_tile(saved.dout, q_tile)
    lse, rest, delta = (blocks.slice_tile(x, q_tile, problem.schedule.block_q, 3)
                        for x in (saved.lse, saved.rest, saved.delta))
    q_sub, k_sub = problem.q_subscripts, problem.k_subscripts
    o_sub, v_sub = q_sub.replace("d", "v"), k_sub.replace("d", "v")
    tile = problem.tile_of(q, k, q_tile, kv_tile, masked)
    p = softmax.probabilities(tile.s, problem.unit, lse, rest)
    dp = problem.einsum(f"{o_sub},{v_sub}->bkgqs", dout, v)
    weights = p if tile.dropped is None else p * tile.dropped
    ds = p * ((dp if tile.dropped is None else dp * tile.dropped) - delta[..., None])
    ds_qk = ds * tile.slope * spec.scale
    if tile.keep is not None:  # lse, delta, dp and slope may be anything, NaN too, where a pair does not attend
        weights, ds, ds_qk = (jnp.where(tile.keep, x, jnp.zeros_like(x)) for x in (weights, ds, ds_qk))
    ds_qk = ds_qk.astype(spec.dtype)

    def product(subscripts: str, weights: Array, x: Array) -> Array:
        return blocks.masked_product(problem, subscripts, weights, tile.keep, x)
    return (product(f"bkgqs,{q_sub}->{k_sub}", ds_qk, q),
            product(f"bkgqs,{o_sub}->{v_sub}", weights.astype(spec.dtype), dout),
            product(f"bkgqs,{k_sub}->{q_sub}", ds_qk, k), ds, tile)


def _add_dbias(problem: blocks.Problem, dbias: Array, ds: Array, q_tile: Array, kv_tile: Array) -> Array:
    """Adds dS, summed over the axes along which the bias is broadcast."""
    spec = problem.spec
    ds = ds.reshape(spec.batch, spec.q_heads, *ds.shape[3:])
    axes = tuple(axis for axis, size in enumerate(dbias.shape) if size == 1)
    part = ds.sum(axis=axes, keepdims=True)
    zero = np.int32(0)
    start = (zero, zero, zero if 2 in axes else q_tile * problem.schedule.block_q,
             zero if 3 in axes else kv_tile * problem.schedule.block_kv)
    return jax.lax.dynamic_update_slice(dbias, jax.lax.dynamic_slice(dbias, start, part.shape) + part, start)
