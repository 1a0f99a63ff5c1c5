"""dq on Hopper in a kernel of its own: a block for each query tile, 64 queries a warpgroup; the same bits on every run.

S = Q K^T, P = exp(S - lse), dP = dO V^T, dS = P * (dP - delta), dQ += dS K over the key tiles that the mask needs, from
the last to the first. One more warpgroup loads keys and values through rings.

Barriers: q_full for a warpgroup's query and dout; k_full, k_free, v_full, v_free for slots of the rings.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_flash import softmax
from pallas_flash.arrays import Array
from pallas_flash.kernels.hopper import mask_arrays, memory, registers, tiles, wgmma, work
from pallas_flash.kernels.hopper.backward.statistics import IDLE, Statistics, is_idle
from pallas_flash.kernels.hopper.backward.tiles import Block, QueryBlock
from pallas_flash.kernels.hopper.backward.weights import Corrections, Kept, Large, Pairs, weights
from pallas_flash.kernels.hopper.registers import Fragment, PerRow
from pallas_flash.kernels.hopper.schedule import CHUNK, ROWS_PER_WARPGROUP, DbiasSchedule, DqSchedule, WideSchedule
from pallas_flash.kernels.hopper.scratch import allocate
from pallas_flash.kernels.hopper.slow_rows import SlowRows
from pallas_flash.kernels.mosaic import bias, completion, dropout, ptx, score_function
from pallas_flash.kernels.mosaic.completion import Exponents
from pallas_flash.kernels.mosaic.head_mask import ArrayMask, HeadMask, StaticMask
from pallas_flash.kernels.mosaic.launch import Launch
from pallas_flash.kernels.mosaic.scheduling import div, rem
from pallas_flash.kernels.mosaic.scores import is_far, is_large, may_be_large, scaled
from pallas_flash.kernels.mosaic.types import Flag, Index, KernelArguments, Ref
from pallas_flash.kernels.mosaic.walk import Walk
from pallas_flash.spec import AttentionSpec
from pallas_flash.tiles import TileRange

__all__ = ["Rows", "any_large_in_warp", "block_of", "gradient_type", "inputs", "kept_of", "launch", "references",
           "repaired", "statistic", "tile_weights", "without_rounding"]


class Rows(NamedTuple):
    """A warpgroup's 64 queries."""

    warpgroup: Index
    first: Index  # position
    lse_log2: PerRow
    delta: PerRow  # what the accumulator of dP starts at: -delta; with dropout -delta / factor
    large: Flag | None  # whether some are large (`scores`); None if none ever is

    def own(self, block: QueryBlock, name: str) -> Ref:
        """Selects the warpgroup's queries or douts, (chunks, 64, 64)."""
        return block.smem[name].at[ptx.opaque(self.warpgroup) if block.schedule.opaque else self.warpgroup]


def load_ring(block: Block[DqSchedule], name: str, slots: int) -> None:
    """Loads the key tiles (name "k") or value tiles ("v"), last first, as slots become free."""
    spec = block.spec
    full, free = block.bars[f"{name}_full"], block.bars[f"{name}_free"]

    @pl.loop(0, block.walk.steps)
    def _(i: Index) -> None:
        slot = tiles.await_free(free, slots, i)
        index = (block.batch, div(block.head, spec.group), (block.walk.stop - 1 - i) * block.schedule.block_kv)
        tiles.load_tile(spec, block.gmem[name], index, block.smem[name].at[slot], full.at[slot])

    tiles.see_last_phases(free, slots, block.walk.steps)


def load_role(block: Block[DqSchedule]) -> None:
    """Runs the loading warpgroup: one warp loads queries, douts and keys, another values."""
    s = block.schedule
    plgpu.set_max_registers(s.registers[1], action="decrease")

    @plgpu.warp_map
    def _(warp: Index) -> None:
        @pl.when(warp == 0)
        def _() -> None:
            for i in range(s.warpgroups):
                index = (block.batch, block.head, block.tile * s.block_q + i * ROWS_PER_WARPGROUP)
                full = block.bars["q_full"].at[i]
                for name in ("q", "dout"):
                    tiles.load_tile(block.spec, block.gmem[name], index, block.smem[name].at[i], full)
            load_ring(block, "k", s.k_stages)

        @pl.when(warp == 1)
        def _() -> None:
            load_ring(block, "v", s.v_stages)


def statistic(block: QueryBlock | Block[DbiasSchedule], first: Index, row: Statistics) -> PerRow:
    """Loads a row of the statistics of the 64 queries from `first` on."""
    stats = block.gmem["stats"].at[block.batch, block.head, int(row), pl.ds(first, ROWS_PER_WARPGROUP)]
    return plgpu.load(stats, layout=registers.ROW_LAYOUT, optimized=False)


def any_large_in_warp(spec: AttentionSpec, lse_log2: PerRow) -> Flag | None:
    """Whether one of a warp's 16 queries is large; None if none ever is. A branch on it must not hold a product."""
    if not may_be_large(spec):
        return None
    size = jnp.abs(lse_log2)
    if is_far(spec):  # lse itself, of which finfo.min is none of an idle query
        large = is_large(spec, size * softmax.LOG2E) & (lse_log2 < IDLE / 2)
    else:
        large = is_large(spec, size) & (size < IDLE / 2)
    return ptx.any_in_warp(large, registers.ROW_LAYOUT)


def without_rounding(block: QueryBlock | Block[DbiasSchedule], rows: Rows, y: Exponents) -> Exponents:
    """Adds to exponents, (64, columns) or (64,), what lse lost in its rounding."""
    rounding = statistic(block, rows.first, Statistics.ROUNDING)
    return y + (registers.spread(rounding, y.shape[1]) if len(y.shape) == 2 else rounding)


def tile_weights(block: QueryBlock, rows: Rows, kv_tile: Array, s: Fragment, shift: float = 0.0) -> Fragment:
    """Computes P times the slope of scores, times 2^shift, from s = Q K^T."""
    spec, schedule, first = block.spec, block.schedule, (rows.first, kv_tile * block.schedule.block_kv)
    partial = block.walk.partial(kv_tile) if work.dq_work(spec, schedule).partial else None
    pairs = Pairs(block.mask, first, 1, partial)
    lse_log2 = registers.spread(rows.lse_log2, schedule.block_kv)
    large = Large(rows.large, functools.partial(without_rounding, block, rows))
    completed = completion.completion(spec, block.gmem, (block.batch, block.head), first, 1)
    x = plgpu.layout_cast(s, registers.TILE)
    _, p = weights(spec, x, lse_log2, Corrections(large, pairs), shift, completed)
    if schedule.pinned:
        ptx.pin(registers.column_sums(p), registers.TILE)
    return p


def kept_of(block: QueryBlock, rows: Rows, kv_tile: Array) -> Kept:
    """Draws for the weights of a key tile."""
    columns = block.schedule.block_kv
    start = lambda: registers.spread(rows.delta, columns)
    if not block.spec.dropout_rate:
        return Kept(None, start)
    draws = dropout.draws(block.spec, block.gmem, (block.batch, block.head), (rows.first, kv_tile * columns), 1)
    return Kept(dropout.kept(draws, columns), start)


def free_keys(block: Block[DqSchedule], i: Index) -> None:
    """Frees the keys of step i."""
    plgpu.barrier_arrive(block.bars["k_free"].at[rem(i, block.schedule.k_stages)])


def keys_of(block: Block[DqSchedule], i: Index) -> Ref:
    """Selects the keys of step i."""
    return block.smem["k"].at[rem(i, block.schedule.k_stages)]


def one_step(block: Block[DqSchedule], rows: Rows, i: Array, last: Fragment | None,
             dq: Fragment) -> tuple[Fragment, Fragment]:
    """Computes dS of a key tile, in the input's type, and adds the product of the step before to dq.

    Args:
      last: dS of the step before, in the input's type; None if there is nothing to add.
    """
    spec, s, bars = block.spec, block.schedule, block.bars
    slot, v_slot = rem(i, s.k_stages), rem(i, s.v_stages)
    from_delta = wgmma.settled(registers.spread(rows.delta, s.block_kv))
    plgpu.barrier_wait(bars["k_full"].at[slot])
    scores = wgmma.multiply_transposed(rows.own(block, "q"), block.smem["k"].at[slot], spec.d)
    if last is not None:
        dq = wgmma.accumulate(dq, last, keys_of(block, i - 1))
    plgpu.barrier_wait(bars["v_full"].at[v_slot])
    dp = wgmma.multiply_transposed(rows.own(block, "dout"), block.smem["v"].at[v_slot], spec.d_v, from_delta)
    kv_tile = block.walk.stop - 1 - i
    p = tile_weights(block, rows, kv_tile, wgmma.ready(scores, 1 if last is None else 2))
    kept = kept_of(block, rows, kv_tile)
    ds = p * kept.dp(plgpu.layout_cast(wgmma.ready(dp, 0), registers.TILE))
    plgpu.barrier_arrive(bars["v_free"].at[v_slot])
    if last is not None:
        free_keys(block, i - 1)
    return ds.astype(spec.dtype), dq


def gradient_unpipelined(block: Block[DqSchedule], rows: Rows) -> Fragment:
    """Computes dq of a warpgroup's rows; each step ends with its product."""
    def step(i: Array, dq: Fragment) -> Fragment:
        ds, dq = one_step(block, rows, i, None, dq)
        dq = wgmma.ready(wgmma.accumulate(dq, ds, keys_of(block, i)), 0)
        free_keys(block, i)
        return dq

    return lax.fori_loop(0, block.walk.steps, step, registers.zeros(block.spec.d))


def gradient_pipelined(block: Block[DqSchedule], rows: Rows) -> Fragment:
    """Computes dq of a warpgroup's rows; each tile's is multiplied during the next tile's softmax."""
    def run() -> Fragment:
        ds, dq = one_step(block, rows, jnp.int32(0), None, wgmma.settled(registers.zeros(block.spec.d)))
        ds, dq = lax.fori_loop(1, block.walk.steps, lambda i, carry: one_step(block, rows, i, *carry), (ds, dq))
        dq = wgmma.ready(wgmma.accumulate(dq, ds, keys_of(block, block.walk.steps - 1)), 0)
        free_keys(block, block.walk.steps - 1)
        return dq

    if not work.dq_work(block.spec, block.schedule).empty:
        return run()
    return lax.cond(block.walk.steps > 0, run, lambda: registers.zeros(block.spec.d))


def repaired(block: QueryBlock, rows: Rows, dq: Fragment, first: int = 0) -> Fragment:
    """Returns columns of dq from `first` on, recomputed without the keys that the mask hides if some element is not
    finite (0 * NaN is NaN).

    Rows whose lse is NaN, because they attend to what is not finite, are legitimately NaN, and not counted. Rows that
    attend to nothing are 0, whatever is in their query and dout, of which no copy is read here.
    """
    if not work.dq_work(block.spec, block.schedule).partial:
        return dq
    if work.may_have_idle_queries(block.spec):
        dq = jnp.where(registers.spread(is_idle(rows.lse_log2), dq.shape[1]), 0.0, dq)
    is_nan = registers.spread(jnp.isnan(rows.lse_log2), dq.shape[1])
    spoiled = ptx.any_nonfinite_in_warpgroup(jnp.where(is_nan, 0.0, dq), registers.TILE)
    return lax.cond(spoiled, lambda dq: recompute(block, rows, range(first, first + dq.shape[1])), lambda dq: dq, dq)


def recompute(block: QueryBlock, rows: Rows, of: range) -> Fragment:
    """Sums dS k over the keys that each row attends to, a key at a time, without tensor cores: (64, columns).

    It sums 128 columns at a time: with all at once registers would be spilled, in the kernel's main loop, too.
    """
    spec, block_kv = block.spec, block.schedule.block_kv
    own = SlowRows(spec, {name: rows.own(block, name) for name in ("q", "dout")},
                     {name: block.gmem[name] for name in "kv"}, (block.batch, div(block.head, spec.group)))

    def add(first: int, position: Index, acc: Fragment) -> Fragment:
        large = Large(rows.large, functools.partial(without_rounding, block, rows))
        completed = completion.completion_of_key(spec, block.gmem, (block.batch, block.head), rows.first, position)
        x = own.dot("q", "k", spec.d, position)
        _, p = weights(spec, x, rows.lse_log2, Corrections(large), completed=completed)
        dp = own.dot("dout", "v", spec.d_v, position) + rows.delta
        if spec.dropout_rate:
            place = (block.batch, block.head), rows.first, position
            dp = jnp.where(dropout.kept_of_key(spec, block.gmem, *place), dp, rows.delta)
        ds = (p * dp).astype(spec.dtype).astype(jnp.float32)
        columns = acc.shape[1]
        keep = block.mask.keep(columns, rows.first, position)
        if completed is not None:  # it may hide the pair
            complete, _ = completed(scaled(spec, x))
            keep = completion.keep(spec, block.gmem, (block.batch, block.head), keep, (rows.first, position), complete)
        return acc + jnp.where(keep, registers.spread(ds, columns) * own.row("k", position, first, columns), 0.0)

    def columns_from(first: int) -> Fragment:
        zeros = jnp.zeros((ROWS_PER_WARPGROUP, min(2 * CHUNK, of.stop - first)), jnp.float32)
        kv_pos = (ptx.scalar(block.walk.start * block_kv),
                  ptx.scalar(jnp.minimum(block.walk.stop * block_kv, spec.kv_len)))
        return lax.fori_loop(*kv_pos, functools.partial(add, first), plgpu.layout_cast(zeros, registers.TILE))

    return registers.concatenate([columns_from(first) for first in of[::2 * CHUNK]])


def compute_role(block: Block[DqSchedule], warpgroup: Index) -> None:
    """Runs a compute warpgroup."""
    spec, s = block.spec, block.schedule
    plgpu.set_max_registers(s.registers[0], action="increase")
    first = block.tile * s.block_q + warpgroup * ROWS_PER_WARPGROUP
    lse_log2, delta = (statistic(block, first, row) for row in (Statistics.LSE, Statistics.DELTA))
    rows = Rows(warpgroup, first, lse_log2, delta, any_large_in_warp(spec, lse_log2))
    plgpu.barrier_wait(block.bars["q_full"].at[warpgroup])
    dq = (gradient_pipelined if s.pipelined else gradient_unpipelined)(block, rows)
    dq = repaired(block, rows, plgpu.layout_cast(dq, registers.TILE))
    tiles.store_result(spec, dq * (spec.scale * dropout.factor(spec)), block.smem["q"].at[warpgroup], block.gmem["dq"],
                       (block.batch, block.head, first, 0))
    plgpu.wait_smem_to_gmem(0)


def mask_of(spec: AttentionSpec, schedule: DqSchedule | WideSchedule, gmem: dict[str, Ref],
            index: tuple[Index, Index, Index]) -> tuple[HeadMask, TileRange[Index]]:
    """The mask of a block, and the key tiles that it needs.

    Args:
      index: (batch, head, query tile).
    """
    batch, head, q_tile = index
    if spec.mask.has_arrays:
        mask = ArrayMask(gmem, batch, head)
        return mask, mask.tiles("key_tiles", q_tile)
    static = work.worst_case(spec, schedule)
    return StaticMask(static), work.kv_range(static, spec, schedule, q_tile)


def inputs(spec: AttentionSpec) -> tuple[str, ...]:
    """The arrays that every kernel reads that keeps queries."""
    return ("q", "k", "v", "dout", "statistics", *mask_arrays.names(spec.mask, of_keys=True), *bias.names(spec),
            *dropout.input_types(spec), *score_function.input_types(spec))


def references(spec: AttentionSpec) -> tuple[str, ...]:
    """What the kernels call them."""
    return tuple("stats" if name == "statistics" else name for name in inputs(spec))


def gradient_type(spec: AttentionSpec) -> dict[str, jax.ShapeDtypeStruct]:
    """What they make."""
    return {"dq": jax.ShapeDtypeStruct(spec.operand_shapes.q, spec.result_dtype)}


def block_of[S: DqSchedule | WideSchedule](spec: AttentionSpec, schedule: S,
                                           refs: tuple[dict[str, Ref], dict[str, Ref], dict[str, Ref]]) -> Block[S]:
    """Finds which block runs, of a grid whose blocks keep queries.

    Args:
      refs: arrays in global memory, buffers in shared memory and barriers, by name.
    """
    head, q_tile = work.dq_work(spec, schedule).head_and_tile(lax.axis_index("block"))
    batch, q_head = div(head, spec.q_heads), rem(head, spec.q_heads)
    gmem, smem, bars = refs
    mask, needed = mask_of(spec, schedule, gmem, (batch, q_head, q_tile))
    return Block(spec, schedule, gmem, smem, bars, mask, batch, q_head, q_tile, Walk(q_head, 1, *needed))


def launch(spec: AttentionSpec, schedule: DqSchedule) -> Launch:
    """The launch that makes dq of q, k, v, dout, the statistics, and what mask, bias, dropout and score function need:
    arrays of `mask_arrays`, those of `mosaic.bias`, dropout's keys, and those of `mosaic.score_function`.
    """
    outputs = gradient_type(spec)

    def attention_backward_dq(*refs: *KernelArguments) -> None:
        *arrays, smem, bars = refs
        gmem = dict(zip((*references(spec), *outputs), arrays, strict=True))
        block = block_of(spec, schedule, (gmem, smem, bars))
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup < schedule.warpgroups)
        def _() -> None:
            compute_role(block, warpgroup)

        @pl.when(warpgroup == schedule.warpgroups)
        def _() -> None:
            load_role(block)

    build = functools.partial(
        plgpu.kernel, attention_backward_dq,
        scratch_types=allocate(memory.dq_memory(spec, schedule)),
        grid=(work.dq_work(spec, schedule).blocks,), grid_names=("block",),
        num_threads=schedule.warpgroups + 1, thread_name="warpgroup", compiler_params=tiles.COMPILER)
    return Launch.of(build, inputs(spec), outputs)
