"""The backward's first kernel: it computes the statistics of each query, and prepares what the others add to.

Where a mask may leave queries without keys, it also copies the tiles of q and dout that have such queries, with zeros
for them (`backward.copies`).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_flash import softmax
from pallas_flash.arrays import Array, Bool
from pallas_flash.kernels.hopper import memory, registers, tiles, work
from pallas_flash.kernels.hopper.backward import copies
from pallas_flash.kernels.hopper.backward.statistics import IDLE, Statistics, with_mark
from pallas_flash.kernels.hopper.registers import PerRow
from pallas_flash.kernels.hopper.schedule import CHUNK, ROWS_PER_WARPGROUP, BackwardSchedule, KvSchedule, chunks
from pallas_flash.kernels.hopper.scratch import allocate
from pallas_flash.kernels.mosaic import dropout, ptx
from pallas_flash.kernels.mosaic.launch import Launch
from pallas_flash.kernels.mosaic.scheduling import div, rem
from pallas_flash.kernels.mosaic.scores import is_far, is_large, may_be_large, score_unit, unit
from pallas_flash.kernels.mosaic.types import Flag, Index, KernelArguments, Ref
from pallas_flash.spec import AttentionSpec

__all__ = ["launch"]


def statistics(spec: AttentionSpec, lse: PerRow, rest: PerRow, delta: PerRow) -> dict[Statistics, PerRow]:
    """Computes the backward's statistics of 64 queries from the forward's. A barrier of the warpgroup.

    Queries that attend to nothing, and those past the end (whose lse is -inf too), get weights of 0. Where delta is not
    finite, because a key or value that the query attends to is not, all weights become NaN: those that the mask hides
    are set to 0 afterwards, dP is not.
    """
    nothing, known = lse == -jnp.inf, jnp.abs(delta) < jnp.inf
    lse = jnp.where(known, lse, jnp.nan)
    if is_far(spec):
        start = with_mark(jnp.where(nothing, IDLE, lse), any_large(spec, lse))
        rounding = -rest * score_unit(spec)  # the reference point is lse without the mark
    else:
        start = with_mark(jnp.where(nothing, IDLE, lse * softmax.LOG2E), any_large(spec, lse))
        reference = softmax.reference_point(lse, unit(spec))
        rounding = (ptx.multiply_add(reference, -score_unit(spec), start, registers.ROW_LAYOUT)
                    - rest * score_unit(spec))
    from_delta = -delta / dropout.factor(spec) if spec.dropout_rate else -delta
    return {Statistics.LSE: start, Statistics.DELTA: jnp.where(nothing | jnp.logical_not(known), 0.0, from_delta),
            Statistics.ROUNDING: jnp.where(nothing, 0.0, rounding)}


def any_large(spec: AttentionSpec, lse: PerRow) -> Flag:
    """Whether one of 64 queries is large. A barrier of the warpgroup."""
    if not may_be_large(spec):
        return jnp.bool_(False)
    size = jnp.abs(lse)
    large = is_large(spec, size * softmax.LOG2E) & (size < jnp.inf)
    marks = jnp.where(large, jnp.float32(jnp.inf), jnp.float32(0.0))  # float32 in 64-bit mode, too
    return ptx.any_nonfinite_in_warpgroup(marks, registers.ROW_LAYOUT)


def launch(spec: AttentionSpec, schedule: BackwardSchedule) -> Launch:
    """The launch that reads out and dout once: a block for each 64 queries of a head, one warpgroup.

    It makes the backward's statistics (`Statistics`) of out, dout, the forward's statistics and their cotangent, and
    what later launches need: see `output_types`. Of a partial spec, the cotangent of lse holds -delta, and neither out
    nor dout is read for it.
    """
    outputs, columns = output_types(spec, schedule), chunks(spec.d_v)
    copied, delta_known = copies.COPIED in outputs, spec.partial
    rows_read = () if delta_known else ("out", "dout")
    inputs = (*rows_read, *["dout"] * (copied and delta_known), "stats", "dstats", *["q"] * copied)
    padded = schedule.padded_q(spec)
    count = padded // ROWS_PER_WARPGROUP

    def attention_backward_prepare(*refs: *KernelArguments) -> None:
        *arrays, smem, bars = refs
        gmem = dict(zip((*inputs, *outputs), arrays, strict=True))
        head, batch, q_head, rows = place(spec, schedule, lax.axis_index("block"), count)
        first = rows * ROWS_PER_WARPGROUP
        for i, name in enumerate(rows_read):
            tiles.load_tile(spec, gmem[name], (batch, q_head, first), smem["rows"].at[i], bars["full"])
        zero(spec, schedule, gmem, (batch, q_head, rows))
        lse = registers.load_row_stats(gmem["stats"], 2 * head, first, spec.q_len, -jnp.inf)
        rest = registers.load_row_stats(gmem["stats"], 2 * head + 1, first, spec.q_len, 0.0)
        dlse = registers.load_row_stats(gmem["dstats"], 2 * head, first, spec.q_len, 0.0)
        if rows_read:
            plgpu.barrier_wait(bars["full"])
        chunk = lambda i, c: registers.load_chunks(smem["rows"].at[i], c * CHUNK, CHUNK, spec.dtype).astype(jnp.float32)
        delta = -dlse if delta_known else (
            sum((chunk(0, c) * chunk(1, c) for c in range(columns)), jnp.float32(0.0)).sum(axis=1) - dlse)
        for row, x in statistics(spec, lse, rest, delta).items():
            registers.store_row_stats(x, gmem["statistics"], len(Statistics) * head + int(row), first, padded)
        if copied:
            has_idle = any_idle(spec, schedule, gmem["stats"], (head, rows))
            gmem[copies.COPIED][batch, q_head, rows] = jnp.where(has_idle, jnp.int32(1), jnp.int32(0))
            copy = functools.partial(copy_clean, spec, gmem, (smem["rows"].at[0, pl.ds(0, 1)], bars["copy_full"]))
            pl.when(has_idle)(lambda: copy((batch, q_head, first), lse == -jnp.inf))

    kernel = plgpu.kernel(
        attention_backward_prepare, out_type=tuple(outputs.values()),
        scratch_types=allocate(memory.prepare_memory(spec)),
        grid=(spec.batch * spec.q_heads * count,), grid_names=("block",), num_threads=1, thread_name="warpgroup",
        compiler_params=tiles.COMPILER)
    return Launch(kernel, inputs, outputs)


def place(spec: AttentionSpec, schedule: BackwardSchedule, block: Index, count: int) -> tuple[Index, ...]:
    """The pair of a batch entry and a head, both, and the 64 queries of a block, of so many in each head."""
    if isinstance(schedule.kv, KvSchedule) and schedule.kv.first_writes:
        batch, q_head, rows = work.rows_backwards(spec, schedule.kv, block, count)
        return batch * spec.q_heads + q_head, batch, q_head, rows
    head, rows = div(block, count), rem(block, count)
    return head, div(head, spec.q_heads), rem(head, spec.q_heads), rows


def output_types(spec: AttentionSpec, schedule: BackwardSchedule) -> dict[str, jax.ShapeDtypeStruct]:
    """What the launch makes: the statistics, padded to whole tiles; in the fused form zeros, for dq's float32 sums or,
    if `ordered` or the `first_writes`, for the counts of additions, (batch, q_heads, query tiles); what is copied where
    queries may attend to nothing (`backward.copies`).
    """
    padded = schedule.padded_q(spec)
    types = {"statistics": jax.ShapeDtypeStruct((spec.batch, spec.q_heads, len(Statistics), padded), jnp.float32)}
    if schedule.fused:
        assert isinstance(schedule.kv, KvSchedule)
        shape = memory.dq_acc_shape(spec, schedule.kv)
        counts = schedule.kv.ordered or schedule.kv.first_writes
        types |= ({"additions": jax.ShapeDtypeStruct(shape[:3], jnp.int32)} if counts else
                  {"dq_sums": jax.ShapeDtypeStruct(shape, jnp.float32)})
    return types | copies.types(spec, schedule)


def zero(spec: AttentionSpec, schedule: BackwardSchedule, gmem: dict[str, Ref],
         index: tuple[Index, Index, Index]) -> None:
    """Zeroes the float32 sums of 64 queries, or the count of additions to their tile.

    Args:
      index: (batch, head, 64 queries).
    """
    batch, q_head, rows = index
    per_tile, columns = schedule.kv.block_q // CHUNK, chunks(spec.d)
    if "dq_sums" in gmem:
        tile, row = div(rows, per_tile), rem(rows, per_tile)
        for column in range(columns):
            registers.store_zeros(gmem["dq_sums"].at[batch, q_head, tile, row * columns + column])
    if "additions" in gmem:
        @pl.when(rem(rows, per_tile) == 0)
        def _() -> None:
            gmem["additions"][batch, q_head, div(rows, per_tile)] = jnp.int32(0)


def any_idle(spec: AttentionSpec, schedule: BackwardSchedule, stats: Ref, at: tuple[Index, Index]) -> Flag:
    """Whether a query attends to nothing, of the tile of the kernel of dk and dv in which 64 queries are. A barrier of
    the warpgroup.

    Args:
      stats: the forward's.
      at: (batch and head, 64 queries).
    """
    head, rows = at
    per_tile = schedule.kv.block_q // ROWS_PER_WARPGROUP
    first = div(rows, per_tile) * schedule.kv.block_q
    lse = [registers.load_row_stats(stats, 2 * head, first + i * ROWS_PER_WARPGROUP, spec.q_len, 0.0)
           for i in range(per_tile)]
    idle = functools.reduce(jnp.logical_or, [x == -jnp.inf for x in lse])
    marks = jnp.where(idle, jnp.float32(jnp.inf), jnp.float32(0.0))
    return ptx.any_nonfinite_in_warpgroup(marks, registers.ROW_LAYOUT)


def copy_clean(spec: AttentionSpec, gmem: dict[str, Ref], through: tuple[Ref, Ref], index: tuple[Index, Index, Index],
               idle: Bool[Array, "64"]) -> None:
    """Writes 64 rows of q and of dout to their copies, with zeros where a query attends to nothing.

    Args:
      through: (1, 64, 64) of shared memory, which nobody needs any more, and the barrier of loads to it.
      index: (batch, head, first row).
      idle: whether a query attends to nothing.
    """
    buffer, full = through
    for name, columns in (("q", spec.d), ("dout", spec.d_v)):
        for chunk in range(chunks(columns)):
            plgpu.commit_smem()  # all threads have read what was in the buffer
            source = tiles.chunk_of(spec, gmem[name], index, ROWS_PER_WARPGROUP, chunk)
            plgpu.copy_gmem_to_smem(source, buffer.at[0], full)
            plgpu.barrier_wait(full)
            x = registers.load_chunks(buffer, 0, CHUNK, spec.dtype).astype(jnp.float32)
            x = jnp.where(registers.spread(idle, CHUNK), 0.0, x).astype(spec.dtype)
            tiles.store_tile(spec, x, buffer, gmem[copies.copy_of(name)], (*index, chunk))
            plgpu.wait_smem_to_gmem(0)
