"""dq with mma.sync alone, a block for each query tile: where bits must repeat, and nothing may be added up in memory.

A block is one warpgroup, and keeps dq of its queries in registers. It walks the key tiles that the mask needs:

    S = Q K^T      P = exp2(S unit - lse)      dP = dO V^T - delta      dS = P * dP      dq += dS K

dS goes from registers to the product with K. K and V have the products of `backward.kv` with rows and columns
exchanged, so weights are the same.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_flash import tiles
from pallas_flash.arrays import Array
from pallas_flash.kernels.ampere import copies, memory, mma, registers, work
from pallas_flash.kernels.ampere.backward.nonfinite import clean_rows
from pallas_flash.kernels.ampere.backward.statistics import Statistics, is_marked
from pallas_flash.kernels.ampere.copies import Team
from pallas_flash.kernels.ampere.registers import ROW_LAYOUT, Fragment, PerRow
from pallas_flash.kernels.ampere.schedule import ROWS, DqSchedule
from pallas_flash.kernels.ampere.scratch import allocate
from pallas_flash.kernels.mosaic import bias, completion, dropout, mask_ranges, score_function
from pallas_flash.kernels.mosaic.head_mask import ArrayMask, HeadMask, StaticMask
from pallas_flash.kernels.mosaic.launch import Launch
from pallas_flash.kernels.mosaic.ptx import scalar
from pallas_flash.kernels.mosaic.scheduling import div, rem
from pallas_flash.kernels.mosaic.scores import may_be_large, scaled, score_unit, slope
from pallas_flash.kernels.mosaic.types import Flag, Index, KernelArguments, Ref
from pallas_flash.kernels.mosaic.walk import Walk
from pallas_flash.spec import AttentionSpec

__all__ = ["launch"]


class Block(NamedTuple):
    """A block: its query tile, and its walk over key tiles."""

    spec: AttentionSpec
    schedule: DqSchedule
    gmem: dict[str, Ref]  # q, k, v, dout, statistics, dq; what mask and dropout need
    smem: dict[str, Ref]  # memory.dq_buffers
    team: Team
    mask: HeadMask
    batch: Index
    head: Index  # of queries
    first: Index  # position of the first query
    walk: Walk

    def slot(self, ordinal: Index) -> Index:
        """The slot of the key tile of a step."""
        return rem(ordinal, self.schedule.num_stages) if self.schedule.num_stages > 1 else 0

    def load(self, ordinal: Index) -> None:
        """Starts to load the keys and values of a step."""
        position = (self.walk.start + ordinal) * self.schedule.block_kv
        for name in "kv":
            index = self.batch, div(self.head, self.spec.group), position
            copies.load_tile(self.team, self.spec, self.gmem[name], index, self.smem[name].at[self.slot(ordinal)])

    def statistic(self, row_tile: int, row: Statistics) -> PerRow:
        """A statistic of 64 of the queries."""
        ref = self.gmem["statistics"]
        at = len(Statistics) * (self.batch * self.spec.q_heads + self.head) + int(row)
        return registers.load_row_stats(ref, at, self.first + row_tile * ROWS, ref.shape[3], 0.0)


class Tile(NamedTuple):
    """A key tile of a step."""

    k: Ref
    v: Ref
    first: Index  # position of the first key
    partial: Flag | None  # whether it needs the mask; None: none does


def weights(block: Block, tile: Tile, row_tile: int, x: Fragment) -> tuple[Fragment, Fragment]:
    """P, and P times the slope of the soft cap, of 64 queries, from x = Q K^T."""
    spec, place = block.spec, (block.first + row_tile * ROWS, tile.first)
    s, lse = scaled(spec, x), block.statistic(row_tile, Statistics.LSE)
    completed = completion.completion(spec, block.gmem, (block.batch, block.head), place, 1)
    complete, own_slope = (s, None) if completed is None else completed(s)
    y = complete * score_unit(spec) - registers.spread(lse, x.shape[1])
    if may_be_large(spec):
        exact = lambda y: y + registers.spread(block.statistic(row_tile, Statistics.ROUNDING), x.shape[1])
        y = lax.cond(is_marked(lse, ROW_LAYOUT), exact, lambda y: y, y)
    if tile.partial is not None:
        y = lax.cond(tile.partial, lambda y: block.mask.hide(y, place, 1), lambda y: y, y)
    p = jnp.exp2(y)
    return p, slope(spec, s, p if own_slope is None else jnp.where(p == 0, 0.0, p * own_slope))


def slopes(block: Block, tile: Tile, row_tile: int, p: Fragment, dp: Fragment) -> Fragment:
    """dS of 64 queries: where dropout drops a weight, without the product in dP; 0 where P is in tiles that need the
    mask, or may hide pairs, because a hidden value may be so large that dP overflows.
    """
    spec, columns = block.spec, p.shape[1]
    if spec.dropout_rate:
        place = block.first + row_tile * ROWS, tile.first
        flags = dropout.kept(dropout.draws(spec, block.gmem, (block.batch, block.head), place, 1), columns)
        dp = jnp.where(flags, dp, registers.spread(block.statistic(row_tile, Statistics.DELTA), columns))
    plain, guarded = lambda p, dp: p * dp, lambda p, dp: jnp.where(p == 0, 0.0, p * dp)
    if completion.hides_pairs(spec):
        return guarded(p, dp)
    return plain(p, dp) if tile.partial is None else lax.cond(tile.partial, guarded, plain, p, dp)


def add_tile(block: Block, tile: Tile, dqs: tuple[Fragment, ...]) -> tuple[Fragment, ...]:
    """Adds a key tile, which has come, to dq."""
    spec, s = block.spec, block.schedule

    def clean() -> None:
        clean_rows(tile.k)
        copies.meet(block.team)

    if completion.hides_pairs(spec):
        clean()
    elif tile.partial is not None:
        pl.when(tile.partial)(clean)
    scores = mma.multiply_transposed(block.smem["q"], tile.k, spec.d)
    start = [registers.spread(block.statistic(i, Statistics.DELTA), s.block_kv) for i in range(s.row_tiles)]
    dps = mma.multiply_transposed(block.smem["dout"], tile.v, spec.d_v, start)
    dss = []
    for i, (x, dp) in enumerate(zip(scores, dps, strict=True)):
        _, sloped = weights(block, tile, i, x)
        dss.append(slopes(block, tile, i, sloped, dp).astype(spec.dtype))
    return mma.accumulate(dqs, dss, tile.k)


def one_step(block: Block, ordinal: Array, dqs: tuple[Fragment, ...]) -> tuple[Fragment, ...]:
    """Adds a key tile, which is on its way, to dq, and starts to load the next one."""
    s, slot, kv_tile = block.schedule, block.slot(ordinal), block.walk.start + ordinal
    copies.sync(block.team)

    def load_next() -> None:
        pl.when(ordinal + 1 < block.walk.steps)(lambda: block.load(ordinal + 1))

    if s.num_stages > 1:
        load_next()
    partial = block.walk.partial(kv_tile) if work.dq_work(block.spec, s).partial else None
    k, v = (block.smem[name].at[slot] for name in "kv")
    dqs = add_tile(block, Tile(k, v, kv_tile * s.block_kv, partial), dqs)
    if s.num_stages == 1:
        copies.meet(block.team)
        load_next()
    return dqs


def compute(block: Block) -> None:
    """Runs a block."""
    spec = block.spec
    for name in ("q", "dout"):
        index = block.batch, block.head, block.first
        copies.load_tile(block.team, spec, block.gmem[name], index, block.smem[name])
    pl.when(block.walk.steps > 0)(lambda: block.load(jnp.int32(0)))
    dqs = (registers.zeros(spec.d),) * block.schedule.row_tiles
    step = lambda i, dqs: one_step(block, i, dqs)
    dqs = lax.fori_loop(jnp.int32(0), scalar(block.walk.steps), step, dqs)
    for i, dq in enumerate(dqs):
        first = block.first + i * ROWS
        axis, place = (1, (block.batch, first, block.head)) if spec.layout == "BLHD" else (
            2, (block.batch, block.head, first))
        x = dq * (spec.scale * dropout.factor(spec))
        registers.store_rows(x.astype(spec.result_dtype), block.gmem["dq"], place, axis)


def block_of(spec: AttentionSpec, s: DqSchedule, gmem: dict[str, Ref], smem: dict[str, Ref]) -> Block:
    """Finds which block runs."""
    pair, q_tile = work.dq_work(spec, s).head_and_tile(lax.axis_index("block"))
    batch, head = div(pair, spec.q_heads), rem(pair, spec.q_heads)
    if spec.mask.has_arrays:
        mask: HeadMask = ArrayMask(gmem, batch, head)
        needed = ArrayMask(gmem, batch, head).tiles("key_tiles", q_tile)
    else:
        mask, needed = StaticMask(work.mask_of(spec, s)), work.kv_range(spec, s, q_tile)
        needed = tiles.TileRange(*map(scalar, needed))
    return Block(spec, s, gmem, smem, Team(1, 0, None), mask, batch, head, q_tile * s.block_q, Walk(head, 1, *needed))


def launch(spec: AttentionSpec, schedule: DqSchedule) -> Launch:
    """The launch that makes dq of q, k, v, dout, the statistics that `backward.prepare` makes, dropout's keys, a score
    function's arrays, and what `mask_arrays` and `mosaic.bias` make.
    """
    inputs = ("q", "k", "v", "dout", "statistics", *dropout.input_types(spec), *score_function.input_types(spec),
              *mask_ranges.names(spec.mask, True), *bias.names(spec))
    outputs = {"dq": jax.ShapeDtypeStruct(spec.operand_shapes.q, spec.result_dtype)}

    def attention_backward_dq(*refs: *KernelArguments) -> None:
        *arrays, smem, _ = refs
        compute(block_of(spec, schedule, dict(zip((*inputs, *outputs), arrays, strict=True)), smem))

    build = functools.partial(
        plgpu.kernel, attention_backward_dq,
        scratch_types=allocate(memory.dq_buffers(spec, schedule)), grid=(work.dq_work(spec, schedule).blocks,),
        grid_names=("block",), compiler_params=copies.COMPILER)
    return Launch.of(build, inputs, outputs)
