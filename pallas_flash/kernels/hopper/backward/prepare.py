"""The backward's first kernel: it computes the statistics of each query, and zeroes dq's float32 sums."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_flash import softmax
from pallas_flash.kernels.hopper import memory, registers, tiles
from pallas_flash.kernels.hopper.backward.statistics import IDLE, Statistics, with_mark
from pallas_flash.kernels.hopper.schedule import CHUNK, ROWS_PER_WARPGROUP, BackwardSchedule, KvSchedule, chunks
from pallas_flash.kernels.hopper.scores import is_large, may_be_large, score_unit
from pallas_flash.kernels.hopper.scratch import allocate
from pallas_flash.kernels.mosaic import ptx
from pallas_flash.kernels.mosaic.scheduling import div, rem
from pallas_flash.spec import AttentionSpec

__all__ = ["launch_prepare"]


def statistics(spec: AttentionSpec, lse: Any, rest: Any, delta: Any) -> dict[Statistics, Any]:
    """Computes the backward's statistics of 64 queries, each (64,), from the forward's. A barrier of the warpgroup.

    Queries that attend to nothing, and those past the end (whose lse is -inf too), get weights of 0. Where delta is not
    finite, because a key or value that the query attends to is not, all weights become NaN: those that the mask hides
    are set to 0 afterwards, dP is not.
    """
    nothing, known, unit = lse == -jnp.inf, jnp.abs(delta) < jnp.inf, score_unit(spec)
    lse = jnp.where(known, lse, jnp.nan)
    lse_log2 = with_mark(jnp.where(nothing, IDLE, lse * softmax.LOG2E), any_large(spec, lse))
    reference = softmax.reference_point(lse, softmax.unit(spec.scale, spec.softcap))
    rounding = ptx.multiply_add(reference, -unit, lse_log2, registers.ROW_LAYOUT) - rest * unit
    return {Statistics.LSE: lse_log2, Statistics.DELTA: jnp.where(nothing | jnp.logical_not(known), 0.0, -delta),
            Statistics.ROUNDING: jnp.where(nothing, 0.0, rounding)}


def any_large(spec: AttentionSpec, lse: Any) -> Any:
    """Whether one of 64 queries is large. A barrier of the warpgroup."""
    if not may_be_large(spec):
        return jnp.bool_(False)
    size = jnp.abs(lse)
    large = is_large(spec, size * softmax.LOG2E) & (size < jnp.inf)
    marks = jnp.where(large, jnp.float32(jnp.inf), jnp.float32(0.0))  # float32 in 64-bit mode, too
    return ptx.any_nonfinite_in_warpgroup(marks, registers.ROW_LAYOUT)


def launch_prepare(spec: AttentionSpec, schedule: BackwardSchedule) -> Callable[..., tuple[jax.Array, ...]]:
    """The kernel that reads out and dout once: a block for each 64 queries of a head, one warpgroup.

    It is a function of out, dout (the spec's layout), the forward's statistics and their cotangent; it returns the
    backward's statistics (`Statistics`), and zeros for dq's float32 sums where blocks add to them in any order.
    """
    padded, columns = schedule.padded_q(spec), chunks(spec.d_v)
    count = padded // ROWS_PER_WARPGROUP
    shapes: list[tuple[int, ...]] = [(spec.batch, spec.q_heads, len(Statistics), padded)]
    if schedule.fused and not schedule.kv.ordered:
        assert isinstance(schedule.kv, KvSchedule)
        shapes.append(memory.dq_acc_shape(spec, schedule.kv))

    def attention_backward_prepare(out: Any, dout: Any, saved: Any, dsaved: Any, *refs: Any) -> None:
        stats, *sums, smem, bars = refs
        block = lax.axis_index("block")
        head, rows = div(block, count), rem(block, count)
        batch, q_head, first = div(head, spec.q_heads), rem(head, spec.q_heads), rows * ROWS_PER_WARPGROUP
        for i, source in enumerate((out, dout)):
            tiles.load_tile(spec, source, (batch, q_head, first), smem["rows"].at[i], bars["full"])
        if sums:
            zero_sums(spec, schedule.kv.block_q, sums[0], (batch, q_head, rows))
        lse = registers.load_row_stats(saved, 2 * head, first, spec.q_len, -jnp.inf)
        rest = registers.load_row_stats(saved, 2 * head + 1, first, spec.q_len, 0.0)
        dlse = registers.load_row_stats(dsaved, 2 * head, first, spec.q_len, 0.0)
        plgpu.barrier_wait(bars["full"])
        chunk = lambda i, c: registers.load_chunks(smem["rows"].at[i], c * CHUNK, CHUNK, spec.dtype).astype(jnp.float32)
        delta = sum((chunk(0, c) * chunk(1, c) for c in range(columns)), jnp.float32(0.0)).sum(axis=1) - dlse
        store = lambda row, x: registers.store_row_stats(x, stats, len(Statistics) * head + int(row), first, padded)
        for row, x in statistics(spec, lse, rest, delta).items():
            store(row, x)

    kernel = plgpu.kernel(
        attention_backward_prepare, out_type=tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes),
        scratch_types=allocate(memory.prepare_memory(spec)),
        grid=(spec.batch * spec.q_heads * count,), grid_names=("block",), num_threads=1, thread_name="warpgroup",
        compiler_params=tiles.COMPILER)
    return lambda *arrays: tuple(kernel(*arrays))


def zero_sums(spec: AttentionSpec, block_q: int, sums: Any, index: tuple[Any, Any, Any]) -> None:
    """Zeroes the float32 sums of 64 queries."""
    batch, q_head, rows = index
    per_tile, columns = block_q // CHUNK, chunks(spec.d)
    tile, row = div(rows, per_tile), rem(rows, per_tile)
    for column in range(columns):
        registers.store_zeros(sums.at[batch, q_head, tile, row * columns + column])
