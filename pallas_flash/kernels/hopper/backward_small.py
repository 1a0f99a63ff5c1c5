"""What stands before and after the backward's large kernels: statistics of each query, dq from its float32 sums."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_flash import softmax
from pallas_flash.kernels.hopper import backward_products as grad_products
from pallas_flash.kernels.hopper import backward_schedule as schedules
from pallas_flash.kernels.hopper import backward_tiles as grad_tiles
from pallas_flash.kernels.hopper import products
from pallas_flash.kernels.hopper.backward_schedule import BackwardSchedule, KvSchedule
from pallas_flash.kernels.hopper.schedule import CHUNK, ROWS, chunks, div, rem
from pallas_flash.spec import AttentionSpec

__all__ = ["launch_finish", "launch_prepare"]


def starts(spec: AttentionSpec, lse: Any, delta: Any) -> tuple[Any, Any]:
    """Where the scores and dP of each query start (see `backward_tiles`).

    Queries that attend to nothing, and those past the end (whose lse is -inf too), get weights of 0. Where delta is not
    finite, because a key or value that the query attends to is not, all weights become NaN: those that the mask hides
    are set to 0 afterwards, dP is not.
    """
    nothing = lse == -jnp.inf
    known = jnp.abs(delta) < jnp.inf
    lse, delta = jnp.where(known, lse, jnp.nan), jnp.where(known, delta, 0.0)
    if grad_tiles.starts_at_lse(spec):
        start = jnp.where(nothing, -jnp.inf, lse * (-1 / spec.scale))
    else:
        start = jnp.where(nothing, jnp.inf, lse * softmax.LOG2E)
    return start, jnp.where(nothing, 0.0, -delta)


def launch_prepare(spec: AttentionSpec, schedule: BackwardSchedule) -> Callable[..., tuple[jax.Array, ...]]:
    """The kernel that reads out and dout once: a block for each 64 queries of a head, one warpgroup.

    It is a function of out, dout (the spec's layout), lse and dlse (batch, q_heads, q_len); it returns the statistics,
    (batch, q_heads, 2, padded length) float32, and zeros for dq's float32 sums where blocks add to them in any order.
    """
    padded, columns = schedule.padded_q(spec), chunks(spec.d_v)
    count = padded // ROWS
    shapes: list[tuple[int, ...]] = [(spec.batch, spec.q_heads, 2, padded)]
    if schedule.fused and not schedule.kv.ordered:
        assert isinstance(schedule.kv, KvSchedule)
        shapes.append(schedules.dq_acc_shape(spec, schedule.kv))

    def attention_backward_prepare(out: Any, dout: Any, lse: Any, dlse: Any, stats: Any, *rest: Any) -> None:
        *sums, smem, full = rest
        block = lax.axis_index("block")
        head, rows = div(block, count), rem(block, count)
        batch, q_head, first = div(head, spec.q_heads), rem(head, spec.q_heads), rows * ROWS
        for i, source in enumerate((out, dout)):
            grad_tiles.load_tile(spec, source, (batch, q_head, first), smem.at[i], full)
        if sums:
            zero_sums(spec, schedule.kv, sums[0], (batch, q_head, rows))
        lse_i = products.load_row_stats(lse, head, first, spec.q_len, -jnp.inf)
        dlse_i = products.load_row_stats(dlse, head, first, spec.q_len, 0.0)
        plgpu.barrier_wait(full)
        chunk = lambda i, c: products.load_chunks(smem.at[i], c * CHUNK, CHUNK, spec.dtype).astype(jnp.float32)
        delta = sum(chunk(0, c) * chunk(1, c) for c in range(columns)).sum(axis=1) - dlse_i
        for i, x in enumerate(starts(spec, lse_i, delta)):
            products.store_row_stats(x, stats, 2 * head + i, first, padded)

    kernel = plgpu.kernel(
        attention_backward_prepare, out_type=tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes),
        scratch_types=(plgpu.SMEM((2, columns, ROWS, CHUNK), spec.dtype, transforms=products.CHUNKED),
                       plgpu.Barrier(num_arrivals=2 * columns)),
        grid=(spec.batch * spec.q_heads * count,), grid_names=("block",), num_threads=1, thread_name="warpgroup",
        compiler_params=grad_tiles.COMPILER)
    return lambda *arrays: tuple(kernel(*arrays))


def zero_sums(spec: AttentionSpec, schedule: Any, sums: Any, place: tuple[Any, Any, Any]) -> None:
    """Zeros for the float32 sums of 64 queries."""
    batch, q_head, rows = place
    per_tile, columns = schedule.block_q // CHUNK, chunks(spec.d)
    tile, row = div(rows, per_tile), rem(rows, per_tile)
    for column in range(columns):
        grad_products.store_zeros(sums.at[batch, q_head, tile, row * columns + column])


def launch_finish(spec: AttentionSpec, schedule: KvSchedule) -> Callable[..., jax.Array]:
    """The kernel that makes dq of its float32 sums: a block for each 64 queries, one warpgroup."""
    per_tile, columns = schedule.block_q // CHUNK, chunks(spec.d)
    shape = schedules.dq_acc_shape(spec, schedule)
    count = shape[2] * per_tile

    def attention_backward_finish(acc: Any, dq: Any, smem: Any) -> None:
        block = lax.axis_index("block")
        head, rows = div(block, count), rem(block, count)
        batch, q_head = div(head, spec.q_heads), rem(head, spec.q_heads)
        tile, row = div(rows, per_tile), rem(rows, per_tile)
        for column in range(columns):
            piece = acc.at[batch, q_head, tile, row * columns + column]
            x = (grad_products.from_linear(piece, CHUNK) * spec.scale).astype(spec.dtype)
            products.store_chunks(x, smem.at[column:column + 1])
        plgpu.commit_smem()
        for column in range(columns):
            target = grad_tiles.chunk_of(spec, dq, (batch, q_head, rows * CHUNK), CHUNK, column)
            plgpu.copy_smem_to_gmem(smem.at[column], target)
        plgpu.wait_smem_to_gmem(0)

    dq_type = jax.ShapeDtypeStruct(spec.shape(spec.q_len, spec.q_heads, spec.d), spec.dtype)
    return plgpu.kernel(
        attention_backward_finish, out_type=dq_type,
        scratch_types=(plgpu.SMEM((columns, CHUNK, CHUNK), spec.dtype, transforms=products.CHUNKED),),
        grid=(spec.batch * spec.q_heads * count,), grid_names=("block",), num_threads=1, thread_name="warpgroup",
        compiler_params=grad_tiles.COMPILER)
