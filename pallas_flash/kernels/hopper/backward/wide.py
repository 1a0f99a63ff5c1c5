"""dv, dk and dq of heads above 256 on Hopper, a kernel for each: a block for 64 keys, or 64 queries, of which two
compute warpgroups keep half of the columns each, up to 256.

The first makes S and P. For dk and dq the second makes dP and dS, of the P that is handed over as in `kv_split`. Who
makes the weights of the product, P for dv and else dS, multiplies them from registers and hands them over to the other
one, through shared memory. S and P are transposed in the kernels of dk and dv, as in all that keep keys.

All columns are needed twice: for the sums of S and dP, and for the product. So what is multiplied with the weights
*stays* in shared memory for a step (q for dk, dout for dv, k for dq); the other array (dout, q, v) *passes* through a
ring of chunks of 64 columns, each of which is free once it has been multiplied. A third warpgroup loads: one warp each.

Barriers: held_full for the block's own rows; staying_full for each chunk, staying_free for a whole tile, which both
warpgroups read; passing_full, passing_free for chunks; stats_full for the statistics of a tile of queries; handed_full,
handed_free for what is handed over.
"""

import enum
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_flash.arrays import Array
from pallas_flash.kernels.hopper import memory, registers, tiles, wgmma, work
from pallas_flash.kernels.hopper.backward import copies
from pallas_flash.kernels.hopper.backward import dq as dq
from pallas_flash.kernels.hopper.backward import kv as kv
from pallas_flash.kernels.hopper.backward import weights as weights
from pallas_flash.kernels.hopper.backward.kv_split import SHIFT
from pallas_flash.kernels.hopper.backward.nonfinite import without_bad_rows
from pallas_flash.kernels.hopper.backward.statistics import LOADED, Statistics
from pallas_flash.kernels.hopper.backward.tiles import Block
from pallas_flash.kernels.hopper.registers import Fragment
from pallas_flash.kernels.hopper.schedule import CHUNK, ROWS_PER_WARPGROUP, DbiasSchedule, WideSchedule, chunks
from pallas_flash.kernels.hopper.scratch import CLUSTER_AXIS
from pallas_flash.kernels.mosaic import dropout, ptx
from pallas_flash.kernels.mosaic.interpret import interpreted_as
from pallas_flash.kernels.mosaic.launch import Launch
from pallas_flash.kernels.mosaic.scheduling import div, rem
from pallas_flash.kernels.mosaic.types import Flag, Index, KernelArguments, Ref
from pallas_flash.kernels.mosaic.walk import HeadAndTile, Step
from pallas_flash.spec import AttentionSpec

__all__ = ["launch"]

type Wide = Block[WideSchedule]

type Sum = tuple[Fragment, ...]
"""A warpgroup's columns of the result, in the layout ACC; none where all of them are the other's."""


def columns_of(spec: AttentionSpec, name: str) -> int:
    """The columns of q, k, v or dout."""
    return spec.d if name in ("q", "k") else spec.d_v


def half(spec: AttentionSpec, s: WideSchedule, warpgroup: int) -> tuple[int, int]:
    """A warpgroup's part of the result: its first chunk, and its columns."""
    dim = columns_of(spec, s.staying)
    first = (chunks(dim) + 1) // 2
    return (0, min(dim, first * CHUNK)) if warpgroup == 0 else (first, max(dim - first * CHUNK, 0))


def rank(block: Wide) -> Index:
    """Which block of its cluster this one is."""
    return lax.axis_index(CLUSTER_AXIS) if block.schedule.cluster > 1 else 0


def first_row(block: Wide) -> Index:
    """The first of the block's own 64 rows."""
    return (block.tile * block.schedule.cluster + rank(block)) * ROWS_PER_WARPGROUP


# -- the loading warpgroup ---------------------------------------------------------------------------------------------

def source(block: Wide, at: HeadAndTile) -> tuple[Index, Index, Index]:
    """Where the tile of a step begins: (batch, head, row)."""
    head, tile = at
    if block.schedule.makes == "dq":
        head = div(head, block.spec.group)
    return block.batch, head, tile * ROWS_PER_WARPGROUP


def _load_own(block: Wide | Block[DbiasSchedule], piece: Ref, target: Ref, full: Ref) -> None:
    plgpu.copy_gmem_to_smem(piece, target, full)


@interpreted_as(_load_own)
def load_shared(block: Wide | Block[DbiasSchedule], piece: Ref, target: Ref, full: Ref) -> None:
    """Starts to load what all blocks of the cluster load, a part of it each, into the shared memory of all."""
    axes = CLUSTER_AXIS if block.schedule.cluster > 1 else None
    plgpu.copy_gmem_to_smem(piece, target, full, collective_axes=axes)


def load_chunk(block: Wide, name: str, at: tuple[tuple[Index, Index, Index], int], target: Ref, full: Ref) -> None:
    """Starts to load 64 columns of a tile.

    Args:
      at: where the tile begins, and the chunk.
    """
    index, chunk = at

    def load(array: Ref) -> None:
        load_shared(block, tiles.chunk_of(block.spec, array, index, ROWS_PER_WARPGROUP, chunk), target, full)

    copies.with_source(block.gmem, name, copied(block, name, index), load)


def copied(block: Wide, name: str, index: tuple[Index, Index, Index]) -> Flag | None:
    """Whether a tile of an array was copied; None if none is."""
    return copies.is_copied(block.gmem, index) if copies.copy_of(name) in block.gmem else None


def see_end(block: Wide, free: Ref, slots: int, used: Index) -> None:
    """Waits until the other block of the cluster has said for the last time that slots are free: it does so in this
    one's shared memory, which must still be there.
    """
    if block.schedule.cluster > 1:
        tiles.drain(free, used)
    else:
        tiles.see_last_phases(free, slots, used)


def load_staying(block: Wide) -> None:
    """Loads the block's own rows; then tiles of what stays, with the statistics of queries, as slots become free."""
    spec, s, smem, bars = block.spec, block.schedule, block.smem, block.bars
    name, count = s.staying, chunks(columns_of(spec, s.staying))
    for own in s.held:
        target = smem[own].at[0] if s.makes == "dq" else smem[own]
        index = block.batch, block.head, first_row(block)
        load = functools.partial(tiles.load_tile, spec, index=index, target=target, full=bars["held_full"])
        copies.with_source(block.gmem, own, copied(block, own, index), load)

    def step(i: Array, at: HeadAndTile) -> HeadAndTile:
        slot, index = tiles.await_free(bars["staying_free"], s.num_stages, i), source(block, at)
        if s.makes != "dq":
            rows = pl.ds(index[2], ROWS_PER_WARPGROUP)
            stats = block.gmem["stats"].at[block.batch, index[1], pl.ds(0, len(LOADED)), rows]
            plgpu.copy_gmem_to_smem(stats, smem["stats"].at[slot], bars["stats_full"].at[slot])
        for chunk in range(count):
            target, full = smem[name].at[slot, chunk], bars["staying_full"].at[slot * count + chunk]
            load_chunk(block, name, (index, chunk), target, full)
        return block.walk.next(*at)

    lax.fori_loop(0, block.walk.steps, step, block.walk.first)
    see_end(block, bars["staying_free"], s.num_stages, block.walk.steps)


def load_passing(block: Wide) -> None:
    """Loads what passes, chunk after chunk, as slots become free."""
    spec, s, bars = block.spec, block.schedule, block.bars
    name, count = s.passing, chunks(columns_of(spec, s.passing))

    def step(i: Array, at: HeadAndTile) -> HeadAndTile:
        for chunk in range(count):
            slot = tiles.await_free(bars["passing_free"], s.slots, i * count + chunk)
            load_chunk(block, name, (source(block, at), chunk), block.smem[name].at[slot, 0],
                       bars["passing_full"].at[slot])
        return block.walk.next(*at)

    lax.fori_loop(0, block.walk.steps, step, block.walk.first)
    see_end(block, bars["passing_free"], s.slots, block.walk.steps * count)


def load_role(block: Wide) -> None:
    """Runs the loading warpgroup."""
    plgpu.set_max_registers(block.schedule.registers[-1], action="decrease")

    @plgpu.warp_map
    def _(warp: Index) -> None:
        pl.when(warp == 0)(functools.partial(load_staying, block))
        pl.when(warp == 1)(functools.partial(load_passing, block))


def free(block: Wide, name: str, slot: Index, warpgroup: int) -> None:
    """Frees a slot, as far as this warpgroup is concerned, in all blocks of the cluster."""
    if block.schedule.cluster > 1:  # one thread arrives for all
        ptx.named_sync(ptx.first_free(3) + 1 + warpgroup, ptx.WARPGROUP)
    plgpu.barrier_arrive(barrier(block, f"{name}_free", slot))


def barrier(block: Wide, name: str, slot: Index) -> Ref:
    """Selects a barrier; opaque, or ptxas keeps the address of each in a register, and spills some of them."""
    return block.bars[name].at[ptx.opaque(slot)]


# -- products over all columns -----------------------------------------------------------------------------------------

def own(block: Wide, name: str) -> Ref:
    """Selects the block's own rows, (chunks, 64, 64), so that their descriptors are made where they are used."""
    if block.schedule.makes == "dq":
        return block.smem[name].at[ptx.opaque(0)]
    return block.smem[name].at[:, pl.ds(ptx.opaque(0) * ROWS_PER_WARPGROUP, ROWS_PER_WARPGROUP)]


def times_staying(block: Wide, step: Step, rows: Ref) -> Fragment:
    """Computes rows b^T, where b is the tile that stays."""
    s = block.schedule
    dim, slot = columns_of(block.spec, s.staying), step.slot(s.num_stages)
    product = None
    for chunk in range(chunks(dim)):
        plgpu.barrier_wait(barrier(block, "staying_full", slot * chunks(dim) + chunk))
        there = block.smem[s.staying].at[slot, pl.ds(chunk, 1)]
        columns = min(CHUNK, dim - chunk * CHUNK)
        product = wgmma.multiply_transposed(rows.at[pl.ds(chunk, 1)], there, columns, product)
    assert product is not None
    return wgmma.ready(product, 0)


def times_passing(block: Wide, step: Step, rows: Ref, product: Fragment | None = None) -> Fragment:
    """Computes rows b^T, or `product` + rows b^T, where b is the tile that passes; frees its chunks."""
    s = block.schedule
    dim, warpgroup = columns_of(block.spec, s.passing), 0 if s.makes == "dv" else 1
    count = chunks(dim)
    slot: Index = 0
    for chunk in range(count):
        before, slot = slot, rem(step.ordinal * count + chunk, s.slots)
        plgpu.barrier_wait(barrier(block, "passing_full", slot))
        columns = min(CHUNK, dim - chunk * CHUNK)
        product = wgmma.multiply_transposed(rows.at[pl.ds(chunk, 1)], block.smem[s.passing].at[slot], columns, product)
        if chunk:
            wgmma.finish(1)
            free(block, "passing", before, warpgroup)
    assert product is not None
    product = wgmma.ready(product, 0)
    free(block, "passing", slot, warpgroup)
    return product


# -- the weights of a step, in the input's type ------------------------------------------------------------------------

def await_own_half(block: Wide, step: Step, warpgroup: int) -> None:
    """Waits for a warpgroup's columns of the tile that stays."""
    s, (first, columns) = block.schedule, half(block.spec, block.schedule, warpgroup)
    start = step.slot(s.num_stages) * chunks(columns_of(block.spec, s.staying)) + first
    for chunk in range(chunks(columns)):
        plgpu.barrier_wait(barrier(block, "staying_full", start + chunk))


class Handed(enum.IntEnum):
    """What one warpgroup hands over to the other; the buffers have these names."""

    WEIGHTS = 0  # those of the product, in the input's type
    P = 1  # float16(2^15 P), see `kv_split`

    @property
    def buffer(self) -> str:
        return self.name.lower()


def give(block: Wide, step: Step, what: Handed, x: Fragment) -> None:
    """Hands what was made in a step over to the other warpgroup."""
    @pl.when(step.ordinal > 0)
    def _() -> None:
        plgpu.barrier_wait(barrier(block, "handed_free", int(what)))

    registers.store_chunks(x, block.smem[what.buffer])
    plgpu.barrier_arrive(barrier(block, "handed_full", int(what)))


def taken(block: Wide, what: Handed) -> Fragment:
    """Takes what `give` has handed over."""
    plgpu.barrier_wait(barrier(block, "handed_full", int(what)))
    x = registers.load_chunk(block.smem[what.buffer].at[0])
    plgpu.barrier_arrive(barrier(block, "handed_free", int(what)))
    return x


def _see_last_taken_plain(block: Wide, what: Handed) -> None:
    @pl.when(block.walk.steps > 0)
    def _() -> None:
        plgpu.barrier_wait(block.bars["handed_free"].at[int(what)])


@interpreted_as(_see_last_taken_plain)
def see_last_taken(block: Wide, what: Handed) -> None:
    """Does nothing on a GPU; in interpret mode, waits for the last phase of a barrier (`tiles.see_last_phases`)."""


def p_taken(block: Wide, dp: Fragment) -> tuple[Fragment, Fragment]:
    """Takes 2^15 P, and returns it and dp in the unit in which their product is an element of the input's type."""
    p = taken(block, Handed.P).astype(jnp.float32)
    return p, dp * 2.0**-SHIFT if block.spec.dtype == jnp.float16 else dp


def lse_of(block: Wide, step: Step) -> weights.Lse:
    """Loads lse of a step's queries."""
    slot = step.slot(block.schedule.num_stages)
    plgpu.barrier_wait(block.bars["stats_full"].at[slot])
    return weights.lse_of(block, slot)


def p_of_values(block: Wide, step: Step) -> Fragment:
    """Makes P^T for dv."""
    lse = lse_of(block, step)
    p, _ = weights.tile_weights(block, rank(block), step, lse, times_passing(block, step, own(block, "k")))
    p = weights.kept_of(block, rank(block), step).weights(p).astype(block.spec.dtype)
    give(block, step, Handed.WEIGHTS, p)
    await_own_half(block, step, 0)
    return p


def p_taken_for_values(block: Wide, step: Step) -> Fragment:
    """Takes P^T for dv."""
    await_own_half(block, step, 1)
    return taken(block, Handed.WEIGHTS)


def p_for_keys(block: Wide, step: Step) -> Fragment:
    """Makes P^T for dk, and takes dS^T."""
    lse = lse_of(block, step)
    s = times_staying(block, step, own(block, "k"))
    _, p = weights.tile_weights(block, rank(block), step, lse, s, SHIFT)
    give(block, step, Handed.P, p.astype(jnp.float16))
    return taken(block, Handed.WEIGHTS)


def ds_of_keys(block: Wide, step: Step) -> Fragment:
    """Makes dS^T for dk."""
    slot = step.slot(block.schedule.num_stages)
    plgpu.barrier_wait(block.bars["stats_full"].at[slot])
    dp = times_passing(block, step, own(block, "v"), weights.start_of_dp(block, slot))
    dp = weights.kept_of(block, rank(block), step).dp(plgpu.layout_cast(dp, registers.TILE))
    ds = weights.score_gradients(block, step, *p_taken(block, dp)).astype(block.spec.dtype)
    give(block, step, Handed.WEIGHTS, ds)
    await_own_half(block, step, 1)
    return ds


def p_for_queries(block: Wide, step: Step, rows: dq.Rows) -> Fragment:
    """Makes P for dq, and takes dS."""
    s = times_staying(block, step, own(block, "q"))
    give(block, step, Handed.P, dq.tile_weights(block, rows, step.tile, s, SHIFT).astype(jnp.float16))
    return taken(block, Handed.WEIGHTS)


def ds_of_queries(block: Wide, step: Step, rows: dq.Rows) -> Fragment:
    """Makes dS for dq."""
    start = wgmma.settled(registers.spread(rows.delta, block.schedule.block_kv))
    dp = times_passing(block, step, own(block, "dout"), start)
    dp = dq.kept_of(block, rows, step.tile).dp(plgpu.layout_cast(dp, registers.TILE))
    p, dp = p_taken(block, dp)
    ds = (p * dp).astype(block.spec.dtype)
    give(block, step, Handed.WEIGHTS, ds)
    await_own_half(block, step, 1)
    return ds


# -- the compute warpgroups --------------------------------------------------------------------------------------------

def add(block: Wide, step: Step, warpgroup: int, x: Fragment, total: Sum) -> Sum:
    """Adds the product of the weights x and a warpgroup's columns of the tile that stays; frees that."""
    s, (first, columns) = block.schedule, half(block.spec, block.schedule, warpgroup)
    slot = step.slot(s.num_stages)
    for part in total:
        there = block.smem[s.staying].at[slot, pl.ds(first, chunks(columns))]
        total = (wgmma.ready(wgmma.accumulate(part, x, there), 0),)
    free(block, "staying", slot, warpgroup)
    return total


def summed(block: Wide, warpgroup: int, weights_of: Callable[[Wide, Step], Fragment]) -> Sum:
    """Sums over the walk's steps; in the layout TILE."""
    columns = half(block.spec, block.schedule, warpgroup)[1]

    def step(i: Array, carry: tuple[HeadAndTile, Sum]) -> tuple[HeadAndTile, Sum]:
        at, total = carry
        here = Step(i, *at)
        return block.walk.next(*at), add(block, here, warpgroup, weights_of(block, here), total)

    total = (wgmma.settled(registers.zeros(columns)),) if columns else ()
    _, total = lax.fori_loop(0, block.walk.steps, step, (block.walk.first, total))
    return tuple(plgpu.layout_cast(part, registers.TILE) for part in total)


def rows_of(block: Wide) -> dq.Rows:
    """The block's 64 queries."""
    first = first_row(block)
    lse_log2, delta = (dq.statistic(block, first, row) for row in (Statistics.LSE, Statistics.DELTA))
    return dq.Rows(0, first, lse_log2, delta, dq.any_large_in_warp(block.spec, lse_log2))


def gradient(block: Wide, warpgroup: int) -> Sum:
    """A warpgroup's columns of the result, in its unit."""
    spec, makes = block.spec, block.schedule.makes
    unit = dropout.factor(spec)
    if makes == "dv":
        total = summed(block, warpgroup, (p_of_values, p_taken_for_values)[warpgroup])
        return tuple(part * unit for part in total) if spec.dropout_rate else total
    unit = unit * spec.scale * (1 if spec.dtype == jnp.float16 else 2.0**-SHIFT)
    if makes == "dk":
        if warpgroup == 1:
            without_bad_rows(block, "v", 0)
        return tuple(part * unit for part in summed(block, warpgroup, (p_for_keys, ds_of_keys)[warpgroup]))
    rows, first = rows_of(block), half(spec, block.schedule, warpgroup)[0] * CHUNK
    total = summed(block, warpgroup, functools.partial((p_for_queries, ds_of_queries)[warpgroup], rows=rows))
    own_unit = 1 if spec.dtype == jnp.float16 else 2.0**-SHIFT
    return tuple(dq.repaired(block, rows, part * own_unit, first) * (spec.scale * dropout.factor(spec))
                 for part in total)


def compute_role(block: Wide, warpgroup: int) -> None:
    """Runs a compute warpgroup."""
    spec, s = block.spec, block.schedule
    plgpu.set_max_registers(s.registers[0], action="increase")
    plgpu.barrier_wait(block.bars["held_full"])
    total = gradient(block, warpgroup)
    gives = Handed.WEIGHTS if warpgroup == (0 if s.makes == "dv" else 1) else Handed.P
    if s.makes != "dv" or gives is Handed.WEIGHTS:
        see_last_taken(block, gives)
    kv.meet(block)  # the last tile has been multiplied, and may be written over
    first, columns = half(spec, s, warpgroup)
    index = block.batch, block.head, first_row(block), first
    for x in total:
        buffer = block.smem[s.staying].at[0, pl.ds(first, chunks(columns))]
        tiles.store_result(spec, x, buffer, block.gmem[s.makes], index)
    plgpu.wait_smem_to_gmem(0)


def launch(spec: AttentionSpec, schedule: WideSchedule) -> Launch:
    """The launch that makes dk, dv or dq of q, k, v, dout, the statistics and what mask, bias and dropout need."""
    of_queries = schedule.makes == "dq"
    side = dq if of_queries else kv
    blocks = (work.dq_work if of_queries else work.kv_work)(spec, schedule).blocks
    types = dq.gradient_type(spec) if of_queries else kv.gradient_types(spec)
    outputs: dict[str, jax.ShapeDtypeStruct] = {schedule.makes: types[schedule.makes]}

    def run(*refs: *KernelArguments) -> None:
        *arrays, smem, bars = refs
        gmem = dict(zip((*side.references(spec), *outputs), arrays, strict=True))
        block = side.block_of(spec, schedule, (gmem, smem, bars))
        warpgroup = lax.axis_index("warpgroup")
        for i in range(2):
            pl.when(warpgroup == i)(functools.partial(compute_role, block, i))
        pl.when(warpgroup == 2)(functools.partial(load_role, block))

    run.__name__ = f"attention_backward_wide_{schedule.makes}"
    clustered = schedule.cluster > 1
    kernel = plgpu.kernel(
        run, out_type=tuple(outputs.values()), scratch_types=kv.scratch(memory.wide_memory(spec, schedule), schedule),
        grid=(blocks,), grid_names=("block",), num_threads=3, thread_name="warpgroup", compiler_params=tiles.COMPILER,
        cluster=(schedule.cluster,) if clustered else (), cluster_names=(CLUSTER_AXIS,) if clustered else ())
    return Launch(kernel, side.inputs(spec), outputs)
