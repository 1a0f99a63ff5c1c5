"""The backward's first kernel: it computes the statistics of each query, and zeroes the sums of dq.

Where a mask may leave queries without keys it also copies q and dout, with zeros for these queries.
"""


import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_flash import softmax
from pallas_flash.arrays import Array, Bool
from pallas_flash.kernels.ampere import copies, memory, mma, registers, work
from pallas_flash.kernels.ampere.backward.statistics import IDLE, Statistics, with_mark
from pallas_flash.kernels.ampere.copies import Team
from pallas_flash.kernels.ampere.registers import PerRow
from pallas_flash.kernels.ampere.schedule import CHUNK, ROWS, BackwardSchedule
from pallas_flash.kernels.ampere.scratch import allocate
from pallas_flash.kernels.mosaic import dropout, ptx
from pallas_flash.kernels.mosaic.launch import Launch
from pallas_flash.kernels.mosaic.scheduling import div, rem
from pallas_flash.kernels.mosaic.scores import is_large, may_be_large, score_unit, unit
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
    lse_log2 = with_mark(jnp.where(nothing, IDLE, lse * softmax.LOG2E), any_large(spec, lse))
    reference = softmax.reference_point(lse, unit(spec))
    rounding = ptx.multiply_add(reference, -score_unit(spec), lse_log2, registers.ROW_LAYOUT) - rest * score_unit(spec)
    start = -delta / dropout.factor(spec) if spec.dropout_rate else -delta
    return {Statistics.LSE: lse_log2, Statistics.DELTA: jnp.where(nothing | jnp.logical_not(known), 0.0, start),
            Statistics.ROUNDING: jnp.where(nothing, 0.0, rounding)}


def any_large(spec: AttentionSpec, lse: PerRow) -> Flag:
    """Whether one of 64 queries is large. A barrier of the warpgroup."""
    if not may_be_large(spec):
        return jnp.bool_(False)
    size = jnp.abs(lse)
    large = is_large(spec, size * softmax.LOG2E) & (size < jnp.inf)
    marks = jnp.where(large, jnp.float32(jnp.inf), jnp.float32(0.0))  # float32 in 64-bit mode, too
    return ptx.any_nonfinite_in_warpgroup(marks, registers.ROW_LAYOUT)


def copy_clean(spec: AttentionSpec, buffer: Ref, target: Ref, index: tuple[Index, Index, Index],
               idle: Bool[Array, "64"]) -> None:
    """Writes 64 rows of q or dout to their copy in global memory, with zeros where a query attends to nothing, so that
    whatever is there does not meet a weight of 0.

    Args:
      index: (batch, head, first row).
      idle: whether a query attends to nothing.
    """
    batch, head, first = index
    axis, place = (1, (batch, first, head)) if spec.layout == "BLHD" else (2, index)
    for chunk in range(buffer.shape[0]):
        columns = min(CHUNK, target.shape[3] - chunk * CHUNK)
        x = mma.load_rows(buffer, 0, chunk)[:, :columns].astype(jnp.float32)
        x = jnp.where(registers.spread(idle, columns), 0.0, x).astype(spec.dtype)
        registers.store_rows(x, target, place, axis, chunk * CHUNK)


def output_types(spec: AttentionSpec, schedule: BackwardSchedule) -> dict[str, jax.ShapeDtypeStruct]:
    """What the launch makes: the statistics, padded to whole tiles; in the fused form zeros for dq's float32 sums,
    and for the counters of additions, (batch, q_heads, query tiles), if those have an order; copies of q and dout where
    queries may attend to nothing.
    """
    shape = spec.batch, spec.q_heads, len(Statistics), work.padded_q(spec, schedule)
    types = {"statistics": jax.ShapeDtypeStruct(shape, jnp.float32)}
    if schedule.dq is None:
        types["dq_sums"] = jax.ShapeDtypeStruct(memory.dq_sums_shape(spec, schedule), jnp.float32)
    if schedule.ordered:
        types["additions"] = jax.ShapeDtypeStruct(memory.dq_sums_shape(spec, schedule)[:3], jnp.int32)
    if work.may_have_idle_queries(spec):
        types |= {"clean_q": jax.ShapeDtypeStruct(spec.operand_shapes.q, spec.dtype),
                  "clean_dout": jax.ShapeDtypeStruct(spec.out_shape, spec.dtype)}
    return types


def launch(spec: AttentionSpec, schedule: BackwardSchedule) -> Launch:
    """The launch that reads out and dout once: a block for each 64 queries of a head, one warpgroup.

    It makes the backward's statistics (`Statistics`) of out, dout, the forward's statistics and their cotangent, and
    what later launches need: see `output_types`. Of a partial spec, the cotangent of lse holds -delta, and neither out
    nor dout is read for it.
    """
    outputs, buffers = output_types(spec, schedule), memory.prepare_buffers(spec)
    rows_read = [buffer.name for buffer in buffers if buffer.name != "q"]
    inputs = (*rows_read, "stats", "dstats", *["q"] * ("clean_q" in outputs))
    padded, team = work.padded_q(spec, schedule), Team(1, 0, None)
    count = padded // ROWS

    def attention_backward_prepare(*refs: *KernelArguments) -> None:
        *arrays, smem, _ = refs
        gmem = dict(zip((*inputs, *outputs), arrays, strict=True))
        block = lax.axis_index("block")
        pair, rows = div(block, count), rem(block, count)
        batch, head, first = div(pair, spec.q_heads), rem(pair, spec.q_heads), rows * ROWS
        for name, buffer in smem.items():
            copies.load_tile(team, spec, gmem[name], (batch, head, first), buffer)
        if "dq_sums" in gmem:
            zero(gmem["dq_sums"], (batch, head, rows), schedule)
        for i in range(ROWS // schedule.block_q) if "additions" in gmem else ():
            gmem["additions"][batch, head, rows * (ROWS // schedule.block_q) + i] = jnp.int32(0)
        lse = registers.load_row_stats(gmem["stats"], 2 * pair, first, spec.q_len, -jnp.inf)
        rest = registers.load_row_stats(gmem["stats"], 2 * pair + 1, first, spec.q_len, 0.0)
        dlse = registers.load_row_stats(gmem["dstats"], 2 * pair, first, spec.q_len, 0.0)
        if smem:
            copies.sync(team)
        chunk = lambda name, c: mma.load_rows(smem[name], 0, c).astype(jnp.float32)
        if spec.partial:
            delta = -dlse
        else:
            products = (chunk("out", c) * chunk("dout", c) for c in range(smem["out"].shape[0]))
            delta = sum(products, jnp.float32(0.0)).sum(axis=1) - dlse
        for row, x in statistics(spec, lse, rest, delta).items():
            registers.store_row_stats(x, gmem["statistics"], len(Statistics) * pair + int(row), first, padded)
        for name in ("dout", "q") if "q" in gmem else ():
            copy_clean(spec, smem[name], gmem[f"clean_{name}"], (batch, head, first), lse == -jnp.inf)

    kernel = plgpu.kernel(
        attention_backward_prepare, out_type=tuple(outputs.values()),
        scratch_types=allocate(buffers), grid=(spec.batch * spec.q_heads * count,),
        grid_names=("block",), compiler_params=copies.COMPILER)
    return Launch(kernel, inputs, outputs)


def zero(sums: Ref, index: tuple[Index, Index, Index], schedule: BackwardSchedule) -> None:
    """Zeroes the float32 sums of 64 queries.

    Args:
      index: (batch, head, 64 queries).
    """
    batch, head, rows = index
    per_rows = ROWS // schedule.block_q
    for i in range(per_rows):
        for chunk in range(sums.shape[3]):
            registers.store_zeros(sums.at[batch, head, rows * per_rows + i, chunk])
