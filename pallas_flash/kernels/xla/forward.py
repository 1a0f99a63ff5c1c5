"""Forward: for each query tile, the online softmax over the key tiles that its mask needs (FlashAttention-2, Dao,
2023)."""

import jax
import jax.numpy as jnp

from pallas_flash import compat, softmax, tiles
from pallas_flash.arrays import Array
from pallas_flash.kernels.xla import blocks, schedule
from pallas_flash.spec import AttentionSpec, Operands, Results

__all__ = ["forward"]


def forward(spec: AttentionSpec, operands: Operands) -> Results[Array]:
    """out, in the spec's layout and `result_dtype`, and the statistics (`spec.stats_shape`), in `acc_dtype`."""
    problem = blocks.prepare(spec, operands, schedule.default(spec), keys_in_place=blocks.is_cached(spec))
    block_q = problem.schedule.block_q

    def q_step(q_tile: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        out, stats = carry
        out_tile, stats_tile = _attend(problem, q_tile)
        return (blocks.update_tile(out, out_tile, q_tile, block_q, problem.q_axis),
                blocks.update_tile(stats, stats_tile, q_tile, block_q, 4))

    padded = problem.num_q_tiles * block_q
    out = jnp.zeros((*problem.q.shape[:-1], spec.d_v), spec.result_dtype)
    stats = jnp.zeros((spec.batch, spec.kv_heads, spec.group, 2, padded), spec.acc_dtype)
    start = compat.vary_like((out, stats), operands)
    out, stats = jax.lax.fori_loop(jnp.int32(0), jnp.int32(problem.num_q_tiles), q_step, start)
    out = jax.lax.slice_in_dim(out, 0, spec.q_len, axis=problem.q_axis)
    return Results(out=out.reshape(spec.out_shape),
                   stats=stats.reshape(*spec.stats_shape[:3], padded)[..., :spec.q_len])


def _attend(problem: blocks.Problem, q_tile: Array) -> tuple[Array, Array]:
    """One query tile's out (in the subscripts of q) and statistics (b, k, g, 2, q)."""
    spec, v_subscripts = problem.spec, problem.k_subscripts.replace("d", "v")
    q = problem.q_tile(problem.q, q_tile)

    def kv_step(kv_tile: Array, carry: tuple[Array, Array, Array], masked: bool) -> tuple[Array, Array, Array]:
        m_i, l_i, acc = carry
        tile = problem.tile_of(q, problem.k_tile(kv_tile), q_tile, kv_tile, masked)
        m_i, l_i, alpha, p = softmax.update(m_i, l_i, tile.s, problem.unit)
        weights = (p if tile.dropped is None else p * tile.dropped).astype(spec.dtype)
        pv = blocks.masked_product(problem, f"bkgqs,{v_subscripts}->bkgqv", weights, tile.keep,
                                   problem.v_tile(kv_tile))
        return m_i, l_i, acc * alpha[..., None] + pv

    rows = (spec.batch, spec.kv_heads, spec.group, problem.schedule.block_q)
    start = (jnp.full(rows, -jnp.inf, spec.acc_dtype), jnp.zeros(rows, spec.acc_dtype),
             jnp.zeros((*rows, spec.d_v), spec.acc_dtype))
    kv_tiles = tiles.kv_tiles(problem.mask, tiles.interval(q_tile, problem.schedule.block_q, spec.q_len),
                              problem.schedule.block_kv, spec.kv_len)
    start = compat.vary_like(start, q, problem.k, problem.v, problem.mask)
    m_i, l_i, acc = tiles.sweep(problem.needed(kv_tiles), kv_step, start)
    out = acc * softmax.rescale(l_i)[..., None]
    # Of a row without a key no NaN is made, not even one that is left out: `checkify` would report it.
    stats = jnp.stack(softmax.statistics(softmax.finite_or_zero(m_i), l_i, problem.unit), axis=3)
    return jnp.einsum(f"bkgqd->{problem.q_subscripts}", out), stats
