"""The backward's first kernel of float32 inputs: it computes the statistics of each query, and splits dout.

Queries that attend to nothing get zeros for dout: whatever is there does not meet a weight of 0. Their statistics are
not those of 16-bit inputs: lse stays in the unit of scores, with its rest beside it (`softmax.statistics`), and weights
are made of differences of scores. So what lse loses where scores are large reaches no weight, in any row.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_flash import softmax
from pallas_flash.kernels.hopper import registers, tiles
from pallas_flash.kernels.hopper.backward.statistics import IDLE, Statistics
from pallas_flash.kernels.hopper.float32.split import Rows, factors, load_rows, output_types, size_of, store_parts
from pallas_flash.kernels.hopper.memory import prepare_float32_memory
from pallas_flash.kernels.hopper.registers import PerRow
from pallas_flash.kernels.hopper.schedule import ROWS_PER_WARPGROUP, BackwardSchedule
from pallas_flash.kernels.hopper.scratch import allocate
from pallas_flash.kernels.mosaic.launch import Launch
from pallas_flash.kernels.mosaic.scheduling import div, rem
from pallas_flash.kernels.mosaic.scores import unit
from pallas_flash.kernels.mosaic.types import KernelArguments
from pallas_flash.spec import AttentionSpec

__all__ = ["launch"]


def statistics(spec: AttentionSpec, lse: PerRow, rest: PerRow, delta: PerRow) -> dict[Statistics, PerRow]:
    """Computes the backward's statistics of 64 queries from the forward's: LSE is lse in the unit of scores, ROUNDING
    its rest, and DELTA -delta.

    Queries that attend to nothing, and those past the end (whose lse is -inf too), get weights of 0. Where delta is not
    finite, all weights become NaN: those that the mask hides are set to 0 afterwards.
    """
    nothing, known = lse == -jnp.inf, jnp.abs(delta) < jnp.inf
    reference = softmax.reference_point(jnp.where(known, lse, jnp.nan), unit(spec))
    return {Statistics.LSE: jnp.where(nothing, IDLE, reference),
            Statistics.DELTA: jnp.where(nothing | jnp.logical_not(known), 0.0, -delta),
            Statistics.ROUNDING: jnp.where(nothing, 0.0, rest)}


def launch(spec: AttentionSpec, schedule: BackwardSchedule) -> Launch:
    """The launch that reads out and dout once: a block for each 64 queries of a head, one warpgroup.

    It makes the backward's statistics (`Statistics`) of out, dout, the forward's statistics and their cotangent, and
    the parts and factors of dout. Of a partial spec, the cotangent of lse holds -delta, and out is not read.
    """
    padded = schedule.padded_q(spec)
    outputs = {"statistics": jax.ShapeDtypeStruct((spec.batch, spec.q_heads, len(Statistics), padded), jnp.float32),
               **output_types(spec, "dout", 1)}
    loaded = {"dout": "rows"} if spec.partial else {"out": "out", "dout": "rows"}
    inputs, count = (*loaded, "stats", "dstats"), padded // ROWS_PER_WARPGROUP

    def attention_prepare_float32(*refs: *KernelArguments) -> None:
        *arrays, smem, bars = refs
        gmem = dict(zip((*inputs, *outputs), arrays, strict=True))
        block = lax.axis_index("block")
        head, first = div(block, count), rem(block, count) * ROWS_PER_WARPGROUP
        index = div(head, spec.q_heads), rem(head, spec.q_heads), first
        for name, buffer in loaded.items():
            tiles.load_tile(spec, gmem[name], index, smem[buffer], bars["full"])
        lse = registers.load_row_stats(gmem["stats"], 2 * head, first, spec.q_len, -jnp.inf)
        rest = registers.load_row_stats(gmem["stats"], 2 * head + 1, first, spec.q_len, 0.0)
        dlse = registers.load_row_stats(gmem["dstats"], 2 * head, first, spec.q_len, 0.0)
        plgpu.barrier_wait(bars["full"])
        rows, idle = Rows(smem["rows"], smem["parts"]), lse == -jnp.inf
        product = lambda chunk: (load_rows(smem["out"], chunk) * rows.load(chunk)).sum(axis=1)
        products = [] if spec.partial else map(product, range(rows.chunks))
        delta = sum(products, registers.row_zeros()) - dlse
        for row, x in statistics(spec, lse, rest, delta).items():
            registers.store_row_stats(x, gmem["statistics"], len(Statistics) * head + int(row), first, padded)
        size = jnp.where(idle, 0.0, size_of(map(rows.load, range(rows.chunks))))
        inverse, (factor,) = factors(size)
        scales = gmem["dout_scales"]
        registers.store_row_stats(factor, scales, head, first, scales.shape[3])
        store_parts(spec, rows, inverse, idle | (size == jnp.inf), gmem["dout_parts"], index)

    kernel = plgpu.kernel(
        attention_prepare_float32, out_type=tuple(outputs.values()),
        scratch_types=allocate(prepare_float32_memory(spec)),
        grid=(spec.batch * spec.q_heads * count,), grid_names=("block",), num_threads=1, thread_name="warpgroup",
        compiler_params=tiles.COMPILER)
    return Launch(kernel, inputs, outputs)
