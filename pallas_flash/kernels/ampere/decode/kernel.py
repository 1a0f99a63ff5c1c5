"""Decoding with mma.sync and cp.async, in Pallas Mosaic GPU: few queries, and a cache of many keys, each
read once.

Blocks share the keys, not the queries: each takes an equal run of the key tiles of all sequences and heads
(`mosaic.decode.work`), and one tile of 64 rows holds all queries that share a key head (`mosaic.decode.rows`). A block
is one warpgroup, whose threads load and compute; two of them share an SM where shared memory allows it, and hide each
other's waits.

Bands. Of up to 16 queries the tile has four bands, of up to 32 two: each warp has all queries, or half of them, and
multiplies them with keys of its own of each tile. So a key goes from shared memory to registers once, not four times,
and what a tile costs beside its copies is a product of 16 rows, not of 64. Bands are merged at the end of a segment.

Ring. Slot i holds a tile of keys and one of values, which one group of copies brings:

    wait for tile i; barrier, after which nobody reads the slot of tile i - 1; copy tile i + stages - 1 to there
    S = Q K^T; softmax; O += P V

Numbers, lengths, pages that are missing, and values with weight 0 that are not finite: as in the Hopper kernel
(`kernels.hopper.decode.kernel`), by the same code. A warp leaves O as it is where no row's maximum has grown.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_flash.kernels.ampere import copies, memory, mma, registers
from pallas_flash.kernels.ampere.copies import Team
from pallas_flash.kernels.ampere.decode import load, products
from pallas_flash.kernels.ampere.registers import Fragment, PerRow
from pallas_flash.kernels.ampere.schedule import CHUNK, ROWS, DecodeSchedule, chunks
from pallas_flash.kernels.ampere.scratch import allocate
from pallas_flash.kernels.mosaic import ptx
from pallas_flash.kernels.mosaic.decode import added, combine, rows, values
from pallas_flash.kernels.mosaic.decode.bands import merged
from pallas_flash.kernels.mosaic.decode.calls import inputs as inputs_of
from pallas_flash.kernels.mosaic.decode.combine import Sums
from pallas_flash.kernels.mosaic.decode.missing import has_lost_keys
from pallas_flash.kernels.mosaic.decode.work import Segment, blocks, for_each_segment, workers
from pallas_flash.kernels.mosaic.launch import Launch
from pallas_flash.kernels.mosaic.scheduling import div, rem
from pallas_flash.kernels.mosaic.scores import masked, scaled
from pallas_flash.kernels.mosaic.types import Flag, Index, KernelArguments, Ref
from pallas_flash.spec import AttentionSpec

__all__ = ["counters_shape", "launch"]

TEAM = Team(1, 0, None)


class Block(NamedTuple):
    """A segment of a block, with the problem, and references to global and shared memory."""

    spec: AttentionSpec
    schedule: DecodeSchedule
    gmem: dict[str, Ref]  # `mosaic.decode.calls.inputs`; counters, out, stats, part_acc, part_sums
    smem: dict[str, Ref]  # memory.decode_buffers
    segment: Segment

    @property
    def columns(self) -> int:
        """Keys of a band of a tile."""
        return self.schedule.block_kv // self.schedule.bands

    def first_key(self, i: Index) -> Index:
        """The first key of tile i of the segment."""
        return (self.segment.first + i) * self.schedule.block_kv


class State(NamedTuple):
    """The online softmax of 64 rows after some tiles."""

    m_i: PerRow
    l_i: Fragment  # (64, 8), sums of every eighth column
    acc: Fragment  # (64, d_v)


# -- loading -----------------------------------------------------------------------------------------------------------

def pages_of(block: Block, i: Index) -> load.Pages | None:
    """The pages of a tile of the segment; None if keys are not in pages."""
    if block.spec.pages is None:
        return None
    table, batch = block.gmem["page_table"], block.segment.head.batch
    return load.pages_of(block.spec, table, batch, block.first_key(i), block.schedule.block_kv)


def start_to_load(block: Block, i: Index, pages: load.Pages | None) -> None:
    """Starts to load tile i of the segment, if there is one, as a group of copies."""
    spec, (batch, kv_head) = block.spec, block.segment.head
    slot = rem(i, block.schedule.num_stages)

    @pl.when(i < block.segment.num_tiles)
    def _() -> None:
        for name in ("k", "v"):
            source, target = block.gmem[name], block.smem[name].at[slot]
            if pages is None:
                copies.load_tile(TEAM, spec, source, (batch, kv_head, block.first_key(i)), target)
            else:
                load.load_paged_tile(spec, source, pages, kv_head, block.first_key(i), target)

    load.commit()


# -- computing ---------------------------------------------------------------------------------------------------------

def queries(block: Block) -> Fragment | Ref:
    """The segment's queries: in registers, or those of one band in shared memory."""
    q = rows.load_queries(block.spec, block.gmem["q"], block.segment.head, block.schedule.bands)
    if block.schedule.q_registers:
        return q
    for chunk in range(chunks(block.spec.d)):  # read after the barrier of the first tile
        mma.store_rows(q[:, chunk * CHUNK:(chunk + 1) * CHUNK], block.smem["q"], 0, chunk)
    return block.smem["q"]


def without_hidden(block: Block, i: Index, s: Fragment) -> Fragment:
    """Sets scores of a tile to -inf where the mask does not keep a pair."""
    q_pos, bands = jnp.int32(0), block.schedule.bands
    if block.spec.q_len > 1:
        q_pos = div(rows.query_rows(s.shape[1], bands), block.spec.group)
    return masked(s, block.segment.sequence.mask, q_pos, rows.key_positions(s.shape[1], block.first_key(i), bands))


def load_bias(block: Block, i: Index) -> Fragment | None:
    """Loads the bias of a tile, (64, keys of a band); None if there is none."""
    if block.spec.bias is None:
        return None
    return added.load_bias(block.spec, block.gmem["bias"], block.segment.head, block.first_key(i), block.columns,
                           block.schedule.bands)


def with_clean_values(block: Block, tile: tuple[Index, Ref], p: Fragment, acc: Fragment) -> Fragment:
    """Cleans the values of a tile that the mask or a bias splits, in shared memory: those that no query of the head
    attends to become 0, and so do NaN and infinity where queries differ in what they attend to. Returns acc with what
    these are in the rows of the queries that do attend to them.

    Args:
      tile: its number in the segment, and its values.
      p: (64, keys of a band) of the input's type.
    """
    i, found = tile
    first, bands = block.first_key(i), block.schedule.bands
    lo, hi = (ptx.scalar(x) - first for x in block.segment.sequence.keys)
    if not values.queries_differ(block.spec):
        @pl.when((lo > 0) | (hi < block.schedule.block_kv))
        def _() -> None:
            values.zero_outside(found, lo, hi)
            copies.meet(TEAM)

        return acc
    has_bad = values.clean(found, lo, hi)
    copies.meet(TEAM)

    def add_bad(p: Fragment, acc: Fragment) -> Fragment:
        weights = without_hidden(block, i, p.astype(jnp.float32))
        bias = load_bias(block, i)
        weights = weights if bias is None else added.hidden(weights, bias)
        index = functools.partial(values.key_index, block.spec, block.gmem, block.segment.head)
        return values.add_bad(weights, acc, block.gmem["v"], lambda key: index(first + key), bands)

    return lax.cond(has_bad, add_bad, lambda _, acc: acc, p, acc)


def with_maximum(state: State, row_max: PerRow, unit: float) -> State:
    """The state relative to the maximum of another tile, too. A warp rescales where that of one of its rows has grown,
    or is NaN.
    """
    grew = ptx.any_in_warp(jnp.logical_not(row_max <= state.m_i), registers.ROW_LAYOUT)

    def follow(m_i: PerRow, l_i: Fragment, acc: Fragment) -> tuple[PerRow, Fragment, Fragment]:
        highest = jnp.maximum(m_i, row_max)
        alpha = jnp.exp2((m_i - highest) * unit)
        return highest, l_i * registers.spread(alpha, 8), acc * registers.spread(alpha, acc.shape[1])

    return State(*lax.cond(grew, follow, lambda *same: same, *state))


def add_tile(block: Block, q: Fragment | Ref, i: Index, bias: Fragment | None, state: State) -> State:
    """Adds a tile that has arrived: S = Q K^T, its softmax, and O += P V."""
    spec, bands, unit = block.spec, block.schedule.bands, added.score_unit(block.spec)
    slot = rem(i, block.schedule.num_stages)
    s = scaled(spec, products.scores(q, block.smem["k"].at[slot], spec.d, bands))
    hides: bool | Flag = False
    if bias is not None:
        s, hides = added.with_bias(spec, s, bias), added.hides(bias)
    needed, kv_tile = block.segment.sequence.tiles, block.segment.first + i
    partial = (kv_tile < needed.full_start) | (kv_tile >= needed.full_stop)
    s = lax.cond(partial, functools.partial(without_hidden, block, i), lambda s: s, s)
    m_i, l_i, acc = with_maximum(state, s.max(axis=1), unit)
    p = jnp.exp2((s - registers.spread(m_i, s.shape[1])) * unit)
    l_i, p, tile = l_i + registers.column_sums(p), p.astype(spec.dtype), block.smem["v"].at[slot]
    clean = functools.partial(with_clean_values, block, (i, tile))
    acc = lax.cond(partial | hides, clean, lambda _, acc: acc, p, acc)
    return State(m_i, l_i, products.add_values(acc, p, tile, bands))


def first_state(block: Block) -> State:
    """The state before the first tile: nothing, or the sinks. Row sums of NaN stay NaN: nothing else of a lost sequence
    is kept in registers.
    """
    spec, s = block.spec, block.schedule
    is_lost = has_lost_keys(spec, s.block_kv, block.gmem, block.segment)
    m_i = registers.row_zeros() + added.lowest(spec)
    l_i = plgpu.layout_cast(jnp.full((ROWS, 8), jnp.where(is_lost, jnp.nan, 0.0), jnp.float32), registers.TILE)
    if spec.sinks is not None:
        m_i, share = added.start_of(spec, added.load_sinks(
            spec, block.gmem["sinks"], block.segment.head, block.segment.part, s.bands))
        l_i = l_i + registers.spread(share, 8)
    return State(m_i, l_i, registers.zeros(spec.d_v))


def walk(block: Block) -> State:
    """Runs over all tiles of the segment."""
    ahead = block.schedule.num_stages - 1
    for i in range(ahead):
        start_to_load(block, i, pages_of(block, i))
    q, state = queries(block), first_state(block)

    def step(i: Index, carried: tuple[load.Pages | None, State]) -> tuple[load.Pages | None, State]:
        pages, state = carried
        bias = load_bias(block, i)
        load.wait(ahead - 1)
        copies.meet(TEAM)
        start_to_load(block, i + ahead, pages)
        pages = pages_of(block, i + ahead + 1)
        return pages, add_tile(block, q, i, bias, state)

    return lax.fori_loop(jnp.int32(0), block.segment.num_tiles, step, (pages_of(block, ahead), state))[1]


def compute(spec: AttentionSpec, schedule: DecodeSchedule, gmem: dict[str, Ref], smem: dict[str, Ref],
            segment: Segment) -> None:
    """Computes what this block has of a head."""
    copies.meet(TEAM)  # nobody reads the slots of the segment before
    m_i, l_i, acc = walk(Block(spec, schedule, gmem, smem, segment))
    # All copies have arrived; the barriers in there are behind the last read of the slots.
    sums, acc = merged(Sums(m_i, l_i.sum(axis=1)), acc, added.score_unit(spec), schedule.bands, smem["k"])
    result = spec, gmem, segment, sums, acc
    pl.when(segment.is_whole)(functools.partial(combine.finish, *result))
    pl.when(jnp.logical_not(segment.is_whole))(functools.partial(combine.share, *result, schedule.parts_at_once))


# -- launch ------------------------------------------------------------------------------------------------------------

def counters_shape(spec: AttentionSpec, schedule: DecodeSchedule) -> tuple[int]:
    """The shape of the counters: of each block, how many have left a partial result of the head that begins in it and
    goes on after it.
    """
    return (workers(spec, schedule),)


def launch(spec: AttentionSpec, schedule: DecodeSchedule) -> Launch:
    """The launch that makes out, in the layout of q, and the statistics of rows (`spec.stats_shape`), of the arrays of
    `mosaic.decode.calls.inputs`. It updates counters (`counters_shape`, int32), which are 0 before and after.
    """
    inputs = (*inputs_of(spec), "counters")
    outputs = {"out": jax.ShapeDtypeStruct(spec.out_shape, spec.dtype),
               "stats": jax.ShapeDtypeStruct(spec.stats_shape, jnp.float32),
               **combine.part_types(spec, workers(spec, schedule))}

    def attention_decode(*refs: *KernelArguments) -> None:
        *arrays, smem, _ = refs
        gmem = dict(zip((*inputs, *outputs), arrays, strict=True))
        for_each_segment(spec, schedule, gmem, 0, functools.partial(compute, spec, schedule, gmem, smem))

    kernel = plgpu.kernel(
        attention_decode, out_type=tuple(outputs.values()),
        scratch_types=allocate(memory.decode_buffers(spec, schedule)), grid=(blocks(spec, schedule),),
        grid_names=("block",), compiler_params=copies.COMPILER)
    return Launch(kernel, inputs, outputs, ("counters",))
