"""Decoding for Hopper (sm_90a), in Pallas Mosaic GPU: few queries, and a cache of many keys, which are read once.

Reading the keys takes all of the time, so blocks share the keys, not the queries. There is a block for each SM, of one
or more workers: each is a compute warpgroup and a warp that loads, which takes an equal run of the key tiles of all
sequences and heads (`work`); one tile of 64 rows holds all queries that share a key head (`rows`). The
two roles walk the run independently, so loads run ahead as far as the rings allow.

Rings and barriers, of each worker. A barrier is named for the state it announces.

    k_full, k_free    a slot of the ring of key tiles has been loaded / has been read
    v_full, v_free    the same for value tiles
    queries_full, queries_free    the same for the queries of a segment, which may come by TMA ahead of it: behind all
                                  tiles in flight a load by a thread itself takes microseconds

Pages. A tile is loaded in pieces of as many keys as surely lie in one page. Their numbers are loaded from the table one
tile ahead.

Numbers. m_i is the row maximum of products of queries and keys, not scaled (`scores`), which is subtracted before they
are: next to m_i that is exact however large scores are, and the instruction that it costs is small beside reading. l_i
(64, 8) is a row sum that is still spread over columns. P is rounded to the input's type, all else is float32. A head
that several workers share is combined in `combine`; a head that one worker has is written by it.

What a query does not attend to, what the cache holds past a sequence's length for instance, has weight 0, but 0 * NaN
is NaN: the values of tiles that the mask splits are cleaned in shared memory first (`values`).

Lengths are read as they are, above the capacity too, and the table with missing pages (`missing`): a sequence
that has lost keys gets row sums of NaN, of which everything else becomes NaN. So no other kernel runs for them.

Modules that are named without a path are those of `kernels.mosaic.decode`.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_flash.arrays import Array
from pallas_flash.kernels.hopper import memory, registers, tiles, wgmma
from pallas_flash.kernels.hopper.decode import columns, eight_bits
from pallas_flash.kernels.hopper.memory import product_dtype
from pallas_flash.kernels.hopper.registers import Fragment, PerRow
from pallas_flash.kernels.hopper.schedule import ROWS_PER_WARPGROUP, DecodeSchedule
from pallas_flash.kernels.hopper.scratch import CLUSTER_AXIS, allocate
from pallas_flash.kernels.mosaic import ptx
from pallas_flash.kernels.mosaic.decode import added, combine, rows, values
from pallas_flash.kernels.mosaic.decode.bands import merged
from pallas_flash.kernels.mosaic.decode.calls import inputs as inputs_of
from pallas_flash.kernels.mosaic.decode.combine import Sums
from pallas_flash.kernels.mosaic.decode.missing import has_lost_keys
from pallas_flash.kernels.mosaic.decode.work import (
    Segment,
    blocks,
    for_each_segment,
    for_own_part,
    workers,
)
from pallas_flash.kernels.mosaic.interpret import interpreted_as
from pallas_flash.kernels.mosaic.launch import Launch
from pallas_flash.kernels.mosaic.scheduling import div, rem
from pallas_flash.kernels.mosaic.scores import masked, scaled
from pallas_flash.kernels.mosaic.types import Flag, Index, KernelArguments, Ref
from pallas_flash.spec import AttentionSpec

__all__ = ["counters_shape", "launch"]


class Worker(NamedTuple):
    """What the two roles of a worker share: the problem, and references to global memory and to its shared memory."""

    spec: AttentionSpec
    schedule: DecodeSchedule
    number: int  # in its block
    gmem: dict[str, Ref]  # `calls.inputs`; counters, out, stats, ...
    smem: dict[str, Ref]  # k, v, and others that `memory.decode_memory` lists
    bars: dict[str, Ref]  # the barriers

    def for_each_segment(self, body: Callable[[Segment], None]) -> tuple[Array, Array]:
        """Runs `body` on every segment of this worker; returns how many steps and segments there were."""
        if self.schedule.cluster > 1:
            return for_own_part(self.spec, self.schedule, self.gmem, (CLUSTER_AXIS, self.schedule.cluster), body)
        return for_each_segment(self.spec, self.schedule, self.gmem, self.number, body)


def own(refs: dict[str, Ref], number: int) -> dict[str, Ref]:
    """The references of a worker, of those of all (`memory.decode_memory`)."""
    end = f"_{number}"
    return {name.removesuffix(end): ref for name, ref in refs.items() if name.endswith(end)}


# -- loading -----------------------------------------------------------------------------------------------------------

def piece_rows(spec: AttentionSpec, s: DecodeSchedule) -> int:
    """The keys of a tile that are loaded together: those of a page, where there are pages."""
    return s.block_kv if spec.pages is None else math.gcd(spec.pages.size, s.block_kv)


def pages_of(worker: Worker, segment: Segment, kv_tile: Index) -> tuple[Array, ...]:
    """The page of each piece of a key tile; some page that exists where there is none, as in a tile past the end."""
    pages, s = worker.spec.pages, worker.schedule
    if pages is None:
        return ()
    found, table = [], worker.gmem["page_table"]
    for first in range(0, s.block_kv, piece_rows(worker.spec, s)):
        place = jnp.minimum(div(kv_tile * s.block_kv + first, pages.size), table.shape[1] - 1)
        found.append(jnp.clip(table[segment.head.batch, place], 0, pages.number - 1))
    return tuple(found)


def load_tile(worker: Worker, segment: Segment, name: str, kv_tile: Index, slot: Index,
              pages: tuple[Array, ...]) -> None:
    """Starts to load a tile of keys (name "k") or values ("v")."""
    spec, s, full = worker.spec, worker.schedule, worker.bars[f"{name}_full"].at[slot]
    target, first = worker.smem[name].at[slot], kv_tile * s.block_kv
    if spec.cache_scales is not None:
        load_bytes(worker, segment, name, (first, target, full), pages)
        return
    if spec.pages is None:
        tiles.load_tile(spec, worker.gmem[name], (segment.head.batch, segment.head.kv_head, first), target, full)
        return
    count = piece_rows(spec, s)
    for piece, page in enumerate(pages):
        place = page, segment.head.kv_head, rem(first + piece * count, spec.pages.size)
        for chunk in range(target.shape[0]):
            source = tiles.chunk_of(spec, worker.gmem[name], place, count, chunk)
            plgpu.copy_gmem_to_smem(source, target.at[chunk, pl.ds(piece * count, count)], full)


def load_bytes(worker: Worker, segment: Segment, name: str, into: tuple[Index, Ref, Ref],
               pages: tuple[Array, ...]) -> None:
    """Starts to load a tile of keys or values of eight bits, from a key on, into (rows, columns) of shared memory."""
    spec, source, (first, target, full) = worker.spec, worker.gmem[name], into
    places = [(segment.head.batch, first)] if spec.pages is None else [
        (page, rem(first + i * piece_rows(spec, worker.schedule), spec.pages.size)) for i, page in enumerate(pages)]
    count = target.shape[0] // len(places)
    for i, (batch, row) in enumerate(places):
        keys, columns = pl.ds(row, count), pl.ds(batch * 0, target.shape[1])
        index = (batch, keys, segment.head.kv_head) if spec.layout == "BLHD" else (batch, segment.head.kv_head, keys)
        plgpu.copy_gmem_to_smem(source.at[*index, columns], target.at[pl.ds(i * count, count)], full)


def load_queries(worker: Worker, segment: Segment) -> None:
    """Starts to load the queries of a segment."""
    bars, slots = worker.bars, worker.schedule.query_slots
    slot = tiles.await_free(bars["queries_free"], slots, segment.number)
    source = rows.group_of(worker.spec, worker.gmem["q"], segment.head)
    plgpu.copy_gmem_to_smem(source, worker.smem["queries"].at[slot], bars["queries_full"].at[slot])


def load_segment(worker: Worker, segment: Segment) -> None:
    """Loads the key and value tiles of a segment as slots become free, and its queries, if they come ahead."""
    if worker.schedule.query_slots:
        load_queries(worker, segment)

    def load(i: Index, pages: tuple[Array, ...]) -> tuple[Array, ...]:
        for name in ("k", "v"):
            slot = tiles.await_free(worker.bars[f"{name}_free"], worker.schedule.num_stages, segment.step + i)
            load_tile(worker, segment, name, segment.first + i, slot, pages)
        return pages_of(worker, segment, segment.first + i + 1)

    lax.fori_loop(jnp.int32(0), segment.num_tiles, load, pages_of(worker, segment, segment.first))


def load(workers: list[Worker]) -> None:
    """Runs the loading warpgroup, of which one warp has work for each worker."""
    plgpu.set_max_registers(workers[0].schedule.registers[1], action="decrease")

    @plgpu.warp_map
    def _(warp: Index) -> None:
        for worker in workers:
            pl.when(warp == worker.number)(functools.partial(load_all, worker))


def load_all(worker: Worker) -> None:
    """Loads all tiles of a worker, and waits until they have been read."""
    steps, segments = worker.for_each_segment(functools.partial(load_segment, worker))
    for name in ("k", "v"):
        tiles.drain(worker.bars[f"{name}_free"], steps)
    if worker.schedule.query_slots:
        tiles.drain(worker.bars["queries_free"], segments)


# -- computing ---------------------------------------------------------------------------------------------------------

class State(NamedTuple):
    """The online softmax of 64 rows after some tiles."""

    m_i: PerRow
    l_i: Fragment  # (64, 8), sums of every eighth column
    acc: Fragment  # (64, d_v) in the layout ACC


class Queries(NamedTuple):
    """The queries of a segment."""

    tile: Fragment | Ref  # in registers, or in shared memory where they are wide
    unit: PerRow | None  # what their products with keys are to be multiplied with, if the cache is of eight bits


def queries(worker: Worker, segment: Segment) -> Queries:
    """The segment's queries."""
    spec, unit = worker.spec, None
    if slots := worker.schedule.query_slots:
        slot = rem(segment.number, slots)
        plgpu.barrier_wait(worker.bars["queries_full"].at[slot])
        q = rows.queries_of(spec, worker.smem["queries"].at[slot], worker.schedule.bands)
        plgpu.commit_smem()
        plgpu.barrier_arrive(worker.bars["queries_free"].at[slot])
    else:
        q = rows.load_queries(spec, worker.gmem["q"], segment.head, worker.schedule.bands)
    if spec.cache_scales is not None:
        q, unit = eight_bits.narrowed(q)
        unit = unit * eight_bits.scale_of(spec, worker.gmem["k_scale"], segment.head)
    if "q" not in worker.smem:
        return Queries(q, unit)
    # Every warp has multiplied the queries of the segment before.
    ptx.named_sync(ptx.first_free(worker.schedule.workers + 1) + worker.number, ptx.WARPGROUP)
    registers.store_chunks(q, worker.smem["q"])
    plgpu.commit_smem()
    return Queries(worker.smem["q"], unit)


def without_hidden(worker: Worker, segment: Segment, kv_tile: Index, s: Fragment) -> Fragment:
    """Sets scores of a key tile to -inf where the mask does not keep a pair."""
    q_pos, bands = jnp.int32(0), worker.schedule.bands
    if worker.spec.q_len > 1:
        q_pos = div(rows.query_rows(s.shape[1], bands), worker.spec.group)
    kv_pos = rows.key_positions(s.shape[1], kv_tile * worker.schedule.block_kv, bands)
    return masked(s, segment.sequence.mask, q_pos, kv_pos)


def load_bias(worker: Worker, segment: Segment, kv_tile: Index) -> Fragment | None:
    """Loads the bias of a key tile, (64, keys of a band) in the layout TILE; None if there is none."""
    if worker.spec.bias is None:
        return None
    block_kv, bands = worker.schedule.block_kv, worker.schedule.bands
    return added.load_bias(worker.spec, worker.gmem["bias"], segment.head, kv_tile * block_kv, block_kv // bands, bands)


def with_clean_values(worker: Worker, segment: Segment, tile: tuple[Index, Ref], p: Fragment,
                      acc: Fragment) -> Fragment:
    """Cleans the values of a tile that the mask or a bias splits, in shared memory: those that no query of the head
    attends to become 0, and so do NaN and infinity where queries differ in what they attend to. Returns acc with what
    these are in the rows of the queries that do attend to them.

    Args:
      tile: the key tile, and its values.
      p: (64, keys of a band) of the input's type, in the layout TILE; acc: (64, d_v), in the layout TILE.
    """
    kv_tile, found = tile
    first = kv_tile * worker.schedule.block_kv
    lo, hi = (ptx.scalar(x) - first for x in segment.sequence.keys)
    if not values.queries_differ(worker.spec):
        @pl.when((lo > 0) | (hi < worker.schedule.block_kv))
        def _() -> None:
            values.zero_outside(found, lo, hi, registers.CHUNKED)
            plgpu.commit_smem()

        return acc
    has_bad = values.clean(found, lo, hi, registers.CHUNKED)
    plgpu.commit_smem()

    def add_bad(p: Fragment, acc: Fragment) -> Fragment:
        weights = without_hidden(worker, segment, kv_tile, p.astype(jnp.float32))
        bias = load_bias(worker, segment, kv_tile)
        weights = weights if bias is None else added.hidden(weights, bias)
        index = functools.partial(values.key_index, worker.spec, worker.gmem, segment.head)
        return values.add_bad(weights, acc, worker.gmem["v"], lambda i: index(first + i), worker.schedule.bands)

    return lax.cond(has_bad, add_bad, lambda _, acc: acc, p, acc)


def await_tile(worker: Worker, name: str, slot: Index) -> Ref:
    """Waits for a tile of keys or values; returns it, as products read it."""
    bars, tile = worker.bars, worker.smem[name].at[slot]
    plgpu.barrier_wait(bars[f"{name}_full"].at[slot])
    if worker.spec.cache_scales is None:
        return tile
    # Every warp has finished the product that read what is written over: of keys before it met the others for the
    # values after it, of values for the keys after it.
    wide = worker.smem[f"wide_{name}"]
    eight_bits.convert(tile, wide)
    plgpu.commit_smem()
    plgpu.barrier_arrive(bars[f"{name}_free"].at[slot])
    return wide


def free_tile(worker: Worker, name: str, slot: Index) -> None:
    """Gives a tile back that a product has read."""
    if worker.spec.cache_scales is None:
        plgpu.barrier_arrive(worker.bars[f"{name}_free"].at[slot])


def products(worker: Worker, q: Queries, slot: Index) -> Fragment:
    """S = Q K^T of the key tile in a slot, (64, keys of a band) in the layout TILE, in the unit of scores."""
    spec = worker.spec
    s = wgmma.multiply_transposed(q.tile, await_tile(worker, "k", slot), spec.d)
    s = columns.own(plgpu.layout_cast(wgmma.ready(s, 0), registers.TILE), worker.schedule.bands)
    if q.unit is not None:
        s = s * registers.spread(q.unit, s.shape[1])
    s = scaled(spec, s)
    free_tile(worker, "k", slot)
    return s


def step(worker: Worker, segment: Segment, q: Queries, i: Index, state: State) -> State:
    """Adds a key tile: S = Q K^T, its softmax, and O += P V."""
    spec, unit = worker.spec, added.score_unit(worker.spec)
    kv_tile, slot = segment.first + i, rem(segment.step + i, worker.schedule.num_stages)
    bias = load_bias(worker, segment, kv_tile)
    s = products(worker, q, slot)
    hides: bool | Flag = False
    if bias is not None:
        s, hides = added.with_bias(spec, s, bias), added.hides(bias)
    needed = segment.sequence.tiles
    partial = (kv_tile < needed.full_start) | (kv_tile >= needed.full_stop)
    s = lax.cond(partial, functools.partial(without_hidden, worker, segment, kv_tile), lambda s: s, s)
    m_i = jnp.maximum(state.m_i, s.max(axis=1))
    alpha = jnp.exp2((state.m_i - m_i) * unit)
    exponents = (s - registers.spread(m_i, s.shape[1])) * unit
    p = jnp.exp2(exponents if spec.cache_scales is None else exponents + eight_bits.RAISED)
    l_i = state.l_i * registers.spread(alpha, 8) + registers.column_sums(p)
    acc = plgpu.layout_cast(state.acc, registers.TILE) * registers.spread(alpha, spec.d_v)
    p, tile = p.astype(product_dtype(spec)), await_tile(worker, "v", slot)
    clean = functools.partial(with_clean_values, worker, segment, (kv_tile, tile))
    acc = lax.cond(partial | hides, clean, lambda _, acc: acc, p, acc)
    p = columns.placed(p, worker.schedule.bands)
    acc = wgmma.accumulate(plgpu.layout_cast(acc, registers.ACC), p, tile)
    acc = wgmma.ready(acc, 0)
    free_tile(worker, "v", slot)
    return State(m_i, l_i, acc)


def first_state(worker: Worker, segment: Segment) -> State:
    """The state before the first tile: nothing, or the sinks. Row sums of NaN stay NaN: nothing else of a lost sequence
    is kept in registers.
    """
    spec, s = worker.spec, worker.schedule
    is_lost = has_lost_keys(spec, s.block_kv, worker.gmem, segment)
    low = jnp.full((ROWS_PER_WARPGROUP,), added.lowest(spec), jnp.float32)
    m_i = plgpu.layout_cast(low, registers.ROW_LAYOUT)
    nothing = jnp.full((ROWS_PER_WARPGROUP, 8), jnp.where(is_lost, jnp.nan, 0.0), jnp.float32)
    l_i = plgpu.layout_cast(nothing, registers.TILE)
    if spec.sinks is not None:
        m_i, share = added.start_of(
            spec, added.load_sinks(spec, worker.gmem["sinks"], segment.head, segment.part, s.bands))
        l_i = l_i + registers.spread(share if spec.cache_scales is None else share * 2.0**eight_bits.RAISED, 8)
    return State(m_i, l_i, registers.zeros(spec.d_v))


def _meet_cluster_plain(there: Ref) -> None:
    plgpu.barrier_arrive(there)
    plgpu.barrier_wait(there)


@interpreted_as(_meet_cluster_plain)
def meet_cluster(there: Ref) -> None:
    """Waits for the compute warpgroups of all blocks of the cluster; what they wrote to global memory before is seen by
    loads after it. Threads that have come to their end count as there: the loading warpgroup does, at last.
    """
    del there

    @plgpu.inline_mgpu()
    def meet(_: mgpu.LaunchContext) -> None:
        mgpu.utils.inline_ptx("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;",
                              has_side_effects=True, convergent=True)

    meet()


def compute_segment(worker: Worker, segment: Segment) -> None:
    """Computes what this worker has of a head."""
    q = queries(worker, segment)
    start = first_state(worker, segment)
    add_tile = functools.partial(step, worker, segment, q)
    state = lax.fori_loop(jnp.int32(0), segment.num_tiles, add_tile, start)
    sums, acc = Sums(state.m_i, state.l_i.sum(axis=1)), plgpu.layout_cast(state.acc, registers.TILE)
    if (spec := worker.spec).cache_scales is not None:
        lowered = 2.0**-eight_bits.RAISED
        acc = acc * (eight_bits.scale_of(spec, worker.gmem["v_scale"], segment.head) * lowered)
        sums = sums._replace(l_i=sums.l_i * lowered)
    if (bands := worker.schedule.bands) > 1:
        sums, acc = merged(sums, acc, added.score_unit(spec), bands, worker.smem["merging"], is_alone=False)
    result = spec, worker.gmem, segment, sums, acc
    if worker.schedule.cluster > 1:
        combine.leave(*result)
        combine_segment(worker, segment)
        return
    pl.when(segment.is_whole)(functools.partial(combine.finish, *result))

    @pl.when(jnp.logical_not(segment.is_whole))
    def _() -> None:
        combine.leave(*result)
        if not worker.schedule.combines_late:
            combine_segment(worker, segment)


def combine_segment(worker: Worker, segment: Segment) -> None:
    """Combines a head, if all other workers that share it have left their results."""
    s = worker.schedule
    meet = functools.partial(meet_cluster, worker.bars["parts_there"]) if s.cluster > 1 else None
    combine.arrive(worker.spec, worker.gmem, segment, s.parts_at_once, s.pieces_at_once, meet)


def compute(worker: Worker) -> None:
    """Runs the compute warpgroup of a worker."""
    plgpu.set_max_registers(worker.schedule.registers[0], action="increase")
    worker.for_each_segment(functools.partial(compute_segment, worker))
    if worker.schedule.combines_late:
        worker.for_each_segment(lambda segment: pl.when(jnp.logical_not(segment.is_whole))(
            functools.partial(combine_segment, worker, segment)))


# -- launch ------------------------------------------------------------------------------------------------------------

def counters_shape(spec: AttentionSpec, schedule: DecodeSchedule) -> tuple[int]:
    """The shape of the counters: of each worker, how many have left a partial result of the head that begins in it and
    goes on after it.
    """
    return (workers(spec, schedule),)


def launch(spec: AttentionSpec, schedule: DecodeSchedule) -> Launch:
    """The launch that makes out, in the layout of q, and the statistics of rows (`spec.stats_shape`), of the arrays of
    `calls.inputs`. It updates counters (`counters_shape`, int32), which are 0 before and after; where blocks of a
    cluster share a head there are none.
    """
    clustered = schedule.cluster > 1
    counters = () if clustered else ("counters",)
    inputs = (*inputs_of(spec), *counters)
    count = spec.batch * spec.kv_heads * schedule.cluster if clustered else workers(spec, schedule)
    outputs = {"out": jax.ShapeDtypeStruct(spec.out_shape, spec.dtype),
               "stats": jax.ShapeDtypeStruct(spec.stats_shape, jnp.float32),
               **combine.part_types(spec, count)}

    def attention_decode(*refs: *KernelArguments) -> None:
        *arrays, smem, bars = refs
        gmem = dict(zip((*inputs, *outputs), arrays, strict=True))
        all_ = [Worker(spec, schedule, i, gmem, own(smem, i), own(bars, i)) for i in range(schedule.workers)]
        warpgroup = lax.axis_index("warpgroup")
        for worker in all_:
            pl.when(warpgroup == worker.number)(functools.partial(compute, worker))
        pl.when(warpgroup == schedule.workers)(functools.partial(load, all_))

    smem, bars = allocate(memory.decode_memory(spec, schedule))
    if clustered:
        bars["parts_there_0"] = plgpu.ClusterBarrier(collective_axes=(CLUSTER_AXIS,), num_arrivals=1)
    kernel = plgpu.kernel(
        attention_decode, out_type=tuple(outputs.values()), scratch_types=(smem, bars),
        grid=(spec.batch * spec.kv_heads if clustered else blocks(spec, schedule),), grid_names=("block",),
        num_threads=schedule.workers + 1, thread_name="warpgroup", compiler_params=tiles.COMPILER,
        cluster=(schedule.cluster,) if clustered else (), cluster_names=(CLUSTER_AXIS,) if clustered else ())
    return Launch(kernel, inputs, outputs, counters)
