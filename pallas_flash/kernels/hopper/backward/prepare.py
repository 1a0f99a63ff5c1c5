"""What stands before and after the backward's large kernels: statistics of each query, dq from its float32 sums."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_flash import softmax
from pallas_flash.kernels.hopper import backward_schedule as schedules
from pallas_flash.kernels.hopper import products
from pallas_flash.kernels.hopper.backward import products as grad_products
from pallas_flash.kernels.hopper.backward import tiles as grad_tiles
from pallas_flash.kernels.hopper.backward.tiles import Statistics
from pallas_flash.kernels.hopper.backward_schedule import BackwardSchedule, KvSchedule
from pallas_flash.kernels.hopper.schedule import CHUNK, ROWS, chunks
from pallas_flash.kernels.hopper.scores import largest, may_be_large, score_unit
from pallas_flash.kernels.mosaic import ptx
from pallas_flash.kernels.mosaic.scheduling import div, rem
from pallas_flash.spec import AttentionSpec

__all__ = ["launch_finish", "launch_prepare"]


def statistics(spec: AttentionSpec, lse: Any, rest: Any, delta: Any) -> dict[Statistics, Any]:
    """The backward's statistics of 64 queries, from the forward's, each (64,). A barrier of the warpgroup.

    Queries that attend to nothing, and those past the end (whose lse is -inf too), get weights of 0. Where delta is not
    finite, because a key or value that the query attends to is not, all weights become NaN: those that the mask hides
    are set to 0 afterwards, dP is not.
    """
    nothing, known, unit = lse == -jnp.inf, jnp.abs(delta) < jnp.inf, score_unit(spec)
    lse = jnp.where(known, lse, jnp.nan)
    lse_log2 = grad_tiles.with_mark(jnp.where(nothing, grad_tiles.IDLE, lse * softmax.LOG2E), any_large(spec, lse))
    reference = softmax.reference_point(lse, softmax.unit(spec.scale, spec.softcap))
    rounding = ptx.multiply_add(reference, -unit, lse_log2, products.ROWS) - rest * unit
    return {Statistics.LSE: lse_log2, Statistics.DELTA: jnp.where(nothing | jnp.logical_not(known), 0.0, -delta),
            Statistics.ROUNDING: jnp.where(nothing, 0.0, rounding)}


def any_large(spec: AttentionSpec, lse: Any) -> Any:
    """Whether a query of 64 is large. A barrier of the warpgroup."""
    if not may_be_large(spec):
        return jnp.bool_(False)
    size = jnp.abs(lse)
    large = (size * softmax.LOG2E > largest(spec)) & (size < jnp.inf)
    marks = jnp.where(large, jnp.float32(jnp.inf), jnp.float32(0.0))  # float32 in 64-bit mode, too
    return ptx.any_nonfinite_in_warpgroup(marks, products.ROWS)


def launch_prepare(spec: AttentionSpec, schedule: BackwardSchedule) -> Callable[..., tuple[jax.Array, ...]]:
    """The kernel that reads out and dout once: a block for each 64 queries of a head, one warpgroup.

    It is a function of out, dout (the spec's layout), the forward's statistics and their cotangent; it returns the
    backward's statistics (`Statistics`), and zeros for dq's float32 sums where blocks add to them in any order.
    """
    padded, columns = schedule.padded_q(spec), chunks(spec.d_v)
    count = padded // ROWS
    shapes: list[tuple[int, ...]] = [(spec.batch, spec.q_heads, len(Statistics), padded)]
    if schedule.fused and not schedule.kv.ordered:
        assert isinstance(schedule.kv, KvSchedule)
        shapes.append(schedules.dq_acc_shape(spec, schedule.kv))

    def attention_backward_prepare(out: Any, dout: Any, saved: Any, dsaved: Any, *refs: Any) -> None:
        stats, *sums, smem, full = refs
        block = lax.axis_index("block")
        head, rows = div(block, count), rem(block, count)
        batch, q_head, first = div(head, spec.q_heads), rem(head, spec.q_heads), rows * ROWS
        for i, source in enumerate((out, dout)):
            grad_tiles.load_tile(spec, source, (batch, q_head, first), smem.at[i], full)
        if sums:
            zero_sums(spec, schedule.kv, sums[0], (batch, q_head, rows))
        lse = products.load_row_stats(saved, 2 * head, first, spec.q_len, -jnp.inf)
        rest = products.load_row_stats(saved, 2 * head + 1, first, spec.q_len, 0.0)
        dlse = products.load_row_stats(dsaved, 2 * head, first, spec.q_len, 0.0)
        plgpu.barrier_wait(full)
        chunk = lambda i, c: products.load_chunks(smem.at[i], c * CHUNK, CHUNK, spec.dtype).astype(jnp.float32)
        delta = sum(chunk(0, c) * chunk(1, c) for c in range(columns)).sum(axis=1) - dlse
        store = lambda row, x: products.store_row_stats(x, stats, len(Statistics) * head + int(row), first, padded)
        for row, x in statistics(spec, lse, rest, delta).items():
            store(row, x)

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
