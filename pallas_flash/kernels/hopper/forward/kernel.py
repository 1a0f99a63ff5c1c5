"""FlashAttention's forward pass for Hopper (sm_90a), in Pallas Mosaic GPU.

Roles. There is a block for each SM, of `warpgroups` compute warpgroups, of 64 query rows each, and one that loads: a
warp of it brings queries, one brings keys and one values. A block takes the query tiles that its row of the table
names, longest first; where the mask holds arrays, it takes one after the other, which a fourth warp does
(`forward.counter`). The roles walk the tiles independently: loads run ahead of the products as far as the rings allow.
With `maxima`, they meet at the end of the row, and walk through it once more for tiles that were given up.

Rings and barriers. A barrier is named for the state it announces.

    q_full, q_free    a query buffer has been loaded / will not be read again
    k_full, k_free    a slot of the ring of key tiles has been loaded / has been read by every compute warpgroup
    v_full, v_free    the same for value tiles
    bias_full, bias_free    the same for tiles of a bias of pairs, which come with the keys
    taken_full, taken_free    a tile has been taken / all roles know it
    row_done          every compute warpgroup has come to the end of the row, and what it has stored has arrived

A query tile's key tiles are walked from the last to the first, each taking one step of the rings. A warpgroup starts at
the last tile that its own rows need: it waits for and frees what it skips, because each waiting thread tracks a
barrier's parity.

Overlap. In a step, S = Q K^T of this key tile and O += P V of the one before are in flight together; the softmax of S
runs while P V is still being multiplied, and while the other warpgroups' products are. With `pingpong`, named barriers
hand the tensor cores from warpgroup to warpgroup, so that one's softmax meets the others' products.

Numbers. m_i is the row maximum of products of queries and keys, not scaled (`scores`); l_i (64, 8) a row sum that is
still spread over columns: it is added up once, at the end. P is rounded to the input's type, all else is float32. m_i
may stay below the maximum (`forward.softmax`): that cancels in O / l_i, but the largest weight of a row is then rounded
like the others. O is rescaled while the next S is multiplied, before its own P V.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_flash import softmax
from pallas_flash.arrays import Array, Float
from pallas_flash.kernels.hopper import mask_arrays, memory, registers, tiles, wgmma, work
from pallas_flash.kernels.hopper.forward import bounded, merge, sinks
from pallas_flash.kernels.hopper.forward.load import load, walk
from pallas_flash.kernels.hopper.forward.repair import is_spoiled, overflowed, recompute
from pallas_flash.kernels.hopper.forward.softmax import (
    NextMaximum,
    Softmax,
    exponents_of,
    first_softmax,
    is_heavy,
    maximum_at_times,
    maximum_within,
    next_softmax,
    rescaled,
)
from pallas_flash.kernels.hopper.forward.tiles import Block, Rows, Tile, rows_of
from pallas_flash.kernels.hopper.registers import Fragment, PerRow
from pallas_flash.kernels.hopper.schedule import CHUNK, ROWS_PER_WARPGROUP, ForwardSchedule, chunks
from pallas_flash.kernels.hopper.scratch import allocate
from pallas_flash.kernels.mosaic import bias, completion, dropout, ptx, score_function
from pallas_flash.kernels.mosaic.launch import Launch
from pallas_flash.kernels.mosaic.scheduling import rem
from pallas_flash.kernels.mosaic.scores import is_far, scaled, unit
from pallas_flash.kernels.mosaic.types import Flag, Index, KernelArguments
from pallas_flash.spec import AttentionSpec

__all__ = ["launch"]


# -- taking turns ----------------------------------------------------------------------------------------------------

def order(block: Block, warpgroup: Index) -> Index:
    """The named barrier of a warpgroup's turn at the tensor cores."""
    return ptx.first_free(block.schedule.warpgroups + 1) + warpgroup


def following(block: Block, warpgroup: Index) -> Index:
    """The named barrier of the turn after a warpgroup's."""
    return order(block, rem(warpgroup + 1, block.schedule.warpgroups))


def takes_turns(block: Block) -> bool:
    """Whether the warpgroups take turns at the tensor cores."""
    return block.schedule.pingpong and block.schedule.warpgroups > 1


def await_turn(block: Block, warpgroup: Index) -> None:
    """Waits for the warpgroup's turn at the tensor cores."""
    if takes_turns(block):
        ptx.named_sync(order(block, warpgroup), 2 * ptx.WARPGROUP)


def pass_turn(block: Block, warpgroup: Index) -> None:
    """Ends the warpgroup's turn, and begins the next one's."""
    if takes_turns(block):
        ptx.named_arrive(following(block, warpgroup), 2 * ptx.WARPGROUP)


def skip(block: Block, tile: Tile, warpgroup: Index, first: Index, stop: Index) -> None:
    """Passes over the key tiles first, first - 1, ..., stop + 1, which this warpgroup does not need."""
    @pl.loop(jnp.int32(0), ptx.scalar(first - stop))
    def _(i: Index) -> None:
        slot = tile.slot(first - i, block.schedule.num_stages)
        await_turn(block, warpgroup)
        pass_turn(block, warpgroup)
        for name in ("k", "v"):
            plgpu.barrier_wait(block.bars[f"{name}_full"].at[slot])
            plgpu.barrier_arrive(block.bars[f"{name}_free"].at[slot])
        if block.schedule.bias_slots:
            slot = tile.slot(first - i, block.schedule.bias_slots)
            plgpu.barrier_wait(block.bars["bias_full"].at[slot])
            plgpu.barrier_arrive(block.bars["bias_free"].at[slot])


# -- the steps of a tile ---------------------------------------------------------------------------------------------

def first_step(block: Block, tile: Tile, rows: Rows) -> Softmax:
    """Computes S of the rows' last key tile and its softmax."""
    kv_tile, bars = rows.stop - 1, block.bars
    slot = tile.slot(kv_tile, block.schedule.num_stages)
    plgpu.barrier_wait(bars["k_full"].at[slot])
    await_turn(block, rows.warpgroup)
    s = wgmma.multiply_transposed(rows.queries, block.smem["k"].at[slot], block.spec.d)
    pass_turn(block, rows.warpgroup)
    s = plgpu.layout_cast(wgmma.ready(s, 0), registers.TILE)
    plgpu.barrier_arrive(bars["k_free"].at[slot])
    s = scores_of(block, tile, rows, kv_tile, s)
    if work.steps(block.spec, block.schedule).first_masked:
        s = without_hidden(block, tile, rows, kv_tile, s)
    known = bounded.zero() if block.schedule.bounded else None
    state = first_softmax(s, exponents_of(block.spec), block.spec.dtype, known, rows.earlier)
    return without_dropped(block, tile, rows, kv_tile, state)


def scores_of(block: Block, tile: Tile, rows: Rows, kv_tile: Index, s: Fragment) -> Fragment:
    """The scores of a key tile, but for the mask, of products of queries and keys."""
    if block.schedule.bounded:
        return bounded.capped(block.spec, s)
    return completed(block, tile, rows, kv_tile, scaled(block.spec, s))


def completed(block: Block, tile: Tile, rows: Rows, kv_tile: Index, s: Fragment) -> Fragment:
    """Applies the score function to scores of a key tile, or adds the bias, if there is one."""
    first = rows.first, kv_tile * block.schedule.block_kv
    if block.schedule.bias_slots:
        return with_bias_tile(block, tile, rows, kv_tile, s)
    return completion.applied(block.spec, block.gmem, (tile.batch, tile.head), s, first)


def with_bias_tile(block: Block, tile: Tile, rows: Rows, kv_tile: Index, s: Fragment) -> Fragment:
    """Adds the tile of a bias of pairs that its ring holds, which `free_bias` frees."""
    slot = tile.slot(kv_tile, block.schedule.bias_slots)
    plgpu.barrier_wait(block.bars["bias_full"].at[slot])
    first = ptx.opaque(rows.warpgroup) * ROWS_PER_WARPGROUP
    held = block.smem["bias"].at[slot, :, pl.ds(first, ROWS_PER_WARPGROUP)]
    return bias.with_pairs(block.spec, s, registers.load_matrices(held))


def free_bias(block: Block, tile: Tile, kv_tile: Index) -> None:
    """Frees the tile of a bias of pairs of an earlier step, where the warpgroup waits anyhow: behind the products that
    it has issued. The fence takes time, and TMA, which writes the slot, is a proxy of its own.
    """
    if block.schedule.bias_slots:
        ptx.fence_async_proxy()
        plgpu.barrier_arrive(block.bars["bias_free"].at[tile.slot(kv_tile, block.schedule.bias_slots)])


def without_hidden(block: Block, tile: Tile, rows: Rows, kv_tile: Index, s: Fragment) -> Fragment:
    """Sets scores of a key tile to -inf where the mask does not keep a pair."""
    return tile.mask.hide(s, (rows.first, kv_tile * block.schedule.block_kv), 1)


def without_dropped(block: Block, tile: Tile, rows: Rows, kv_tile: Index, state: Softmax) -> Softmax:
    """Zeroes the weights of a key tile that dropout drops. The row sum l_i has them."""
    if not block.spec.dropout_rate:
        return state
    first = rows.first, kv_tile * block.schedule.block_kv
    draws = dropout.draws(block.spec, block.gmem, (tile.batch, tile.head), first, 1)
    return state._replace(p=dropout.without_dropped(draws, state.p))


def await_keys(block: Block, tile: Tile, rows: Rows, kv_tile: Index) -> None:
    """Waits for a key tile, if the rows need it."""
    @pl.when(kv_tile >= rows.start)
    def _() -> None:
        plgpu.barrier_wait(block.bars["k_full"].at[tile.slot(kv_tile, block.schedule.num_stages)])


def multiply_values(block: Block, tile: Tile, kv_tile: Index, state: Softmax,
                    acc: Fragment) -> tuple[Fragment, Callable[[Fragment], Fragment]]:
    """Issues acc + P V of a key tile; also returns the function that waits for it, from acc to acc."""
    acc = rescaled(state, acc)
    slot = tile.slot(kv_tile, block.schedule.num_stages)
    plgpu.barrier_wait(block.bars["v_full"].at[slot])
    acc = wgmma.accumulate(acc, state.p, block.smem["v"].at[slot])

    def wait(acc: Fragment) -> Fragment:
        acc = wgmma.ready(acc, 0)
        plgpu.barrier_arrive(block.bars["v_free"].at[slot])
        return acc

    return acc, wait


def next_maximum(block: Block, tile: Tile, rows: Rows, kv_tile: Index, state: Softmax) -> NextMaximum:
    """Chooses how this step finds m_i, see `next_softmax`."""
    maxima = block.schedule.maxima
    if block.schedule.bounded:
        return bounded.no_maximum
    if not maxima:
        return functools.partial(maximum_within, slack=rows.slack)
    i, is_redone = rows.stop - 1 - kv_tile, tile.is_redone != 0
    # With all maxima, only the rounding of start makes weights large.
    heavy = is_heavy(state) & jnp.logical_not(is_redone)
    due = ((i & -i) * maxima > i) | heavy | is_redone
    return functools.partial(maximum_at_times, due=due, heavy=heavy)


def next_step(block: Block, tile: Tile, rows: Rows, kv_tile: Index, state: Softmax,
              acc: Fragment) -> tuple[Softmax, Fragment]:
    """Computes S of a key tile while P V of the step before is multiplied, then the softmax of S."""
    bars, slot = block.bars, tile.slot(kv_tile, block.schedule.num_stages)
    if not block.schedule.held_columns:
        plgpu.barrier_wait(bars["k_full"].at[slot])
    await_turn(block, rows.warpgroup)
    s = wgmma.multiply_transposed(rows.queries, block.smem["k"].at[slot], block.spec.d)
    acc, values_ready = multiply_values(block, tile, kv_tile + 1, state, acc)
    pass_turn(block, rows.warpgroup)
    free_bias(block, tile, kv_tile + 1)
    maximum = next_maximum(block, tile, rows, kv_tile, state)
    s = plgpu.layout_cast(wgmma.ready(s, 1), registers.TILE)
    plgpu.barrier_arrive(bars["k_free"].at[slot])
    s = scores_of(block, tile, rows, kv_tile, s)
    if work.steps(block.spec, block.schedule).later_masked:
        partial = (kv_tile < rows.full_start) | (kv_tile >= rows.full_stop)
        s = lax.cond(partial, functools.partial(without_hidden, block, tile, rows, kv_tile), lambda s: s, s)

    def wait() -> Fragment:
        if block.schedule.held_columns:
            await_keys(block, tile, rows, kv_tile - 1)
        return values_ready(acc)

    state, acc = next_softmax(state, (s, exponents_of(block.spec)), maximum, block.schedule.held_columns, wait)
    return without_dropped(block, tile, rows, kv_tile, state), acc


class Sums(NamedTuple):
    """What remains of 64 rows, each (64,): the sum of exp2((s - m_i) unit - rounding) is l_i."""

    m_i: PerRow  # in the unit of scores
    rounding: PerRow  # base 2
    l_i: PerRow
    left: PerRow | None = None  # with sinks, what acc must be multiplied with


def with_sink(block: Block, sink: Float[Array, ""] | None, sums: Sums) -> Sums:
    """The sums with the sink of the head in them, if there is one."""
    if sink is None:
        return sums
    joined, left = sinks.joined(block.spec, sink, sums[:3])
    return Sums(*joined, left)


def sums_of(block: Block, state: Softmax) -> Sums:
    """Adds up l_i after the last tile, and finds how far start was rounded."""
    m_i, start = state.maximum
    rounding = exponents_of(block.spec).rounding(m_i, start)
    return Sums(m_i, rounding, state.l_i.sum(axis=1))


def finish(block: Block, tile: Tile, rows: Rows, sums: Sums, acc: Fragment) -> None:
    """Writes out = acc / l_i, with the factor of dropout, and the statistics to global memory."""
    m_i, rounding, l_i, left = sums
    stats = softmax.statistics(m_i, l_i, unit(block.spec), rounding)
    if not block.merges:
        head = tile.batch * block.spec.q_heads + tile.head
        for i, x in enumerate(stats):
            registers.store_row_stats(x, block.gmem["stats"], 2 * head + i, rows.first, block.spec.q_len)
    inverse = softmax.rescale(l_i)
    if left is not None:
        inverse = inverse * left
    if block.spec.dropout_rate:
        inverse = inverse * dropout.factor(block.spec)
    out = plgpu.layout_cast(acc, registers.TILE) * registers.spread(inverse, acc.shape[1])
    if block.merges:
        merge.store(block, tile, rows, stats, out)
    elif block.spec.partial:
        tiles.store_rows(block.spec, out, block.gmem["out"], (tile.batch, tile.head, rows.first, 0))
    else:
        store_rounded(block, tile, rows, out.astype(block.spec.dtype))


def finish_once(block: Block, tile: Tile, rows: Rows, sums: Sums, acc: Fragment) -> None:
    """`finish`; where it merges into what is there, only for rows that are real and right: of a tile that was given up,
    those of this warpgroup were either right in the first walk, or are in the second.
    """
    conditions: list[Flag] = []
    if block.merges and not block.all_rows_are_real:
        conditions.append(merge.real(block, rows))
    if block.merges and block.schedule.maxima:
        was_given_up = block.gmem["given_up"][lax.axis_index("block"), rows.warpgroup, tile.column] != 0
        conditions.append(was_given_up == (tile.is_redone != 0))
    if not conditions:
        return finish(block, tile, rows, sums, acc)
    pl.when(functools.reduce(jnp.logical_and, conditions))(lambda: finish(block, tile, rows, sums, acc))
    return None


def store_rounded(block: Block, tile: Tile, rows: Rows, out: Fragment) -> None:
    """Writes out, (64, d_v), to global memory through a buffer, or over the query."""
    count = chunks(block.spec.d_v)
    at_once = block.schedule.out_chunks or count
    for chunk in range(0, count, at_once):
        last = min(chunk + at_once, count)
        source = block.smem["out"].at[rows.warpgroup] if block.schedule.out_chunks else rows.q()
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        piece = out[:, chunk * CHUNK:min(last * CHUNK, block.spec.d_v)]
        tiles.store_tile(block.spec, piece, source, block.gmem["out"], (tile.batch, tile.head, rows.first, chunk))


def give_up(block: Block, tile: Tile, rows: Rows, spoiled: Flag) -> None:
    """Records, in the first walk through the row, whether a tile has to be done again."""
    row, flags = lax.axis_index("block"), block.gmem["given_up"]

    @pl.when(tile.is_redone == 0)
    def _() -> None:
        flags[row, rows.warpgroup, tile.column] = spoiled.astype(jnp.int32)

        @pl.when(spoiled)
        def _some() -> None:
            flags[row, rows.warpgroup, block.any_given_up] = jnp.int32(1)


def repaired(block: Block, tile: Tile, rows: Rows, state: Softmax, acc: Fragment) -> tuple[Sums, Fragment]:
    """Returns the sums and acc, (64, d_v) in the layout ACC, recomputed if a row is spoiled.

    With `maxima`, a spoiled tile is only given up in the first walk, so that all warpgroups do it again together. The
    query must still be in shared memory. A barrier of the warpgroup.
    """
    sums = sums_of(block, state)
    spoiled = is_spoiled(block, state.maximum, sums.l_i, acc)
    if spoiled is None:
        return sums, acc
    if block.schedule.maxima:
        give_up(block, tile, rows, spoiled)
        spoiled = spoiled & (tile.is_redone != 0)

    def repair(sums: Sums, acc: Fragment) -> tuple[Sums, Fragment]:
        m_i, l_i, acc = recompute(block, tile, rows)
        # m_i stays: the backward computes the same product, with the same rounding; a sum in another order differs.
        if is_far(block.spec):  # unless it is NaN, of a score that the bias hides
            lost = jnp.isnan(sums.l_i)
            new = sums._replace(m_i=jnp.where(lost, m_i, sums.m_i), l_i=jnp.where(lost, l_i, sums.l_i))
        else:
            lost = overflowed(block.spec, state.maximum)
            new = Sums(sums.m_i, jnp.where(lost, 0.0, sums.rounding), jnp.where(lost, l_i, sums.l_i))
        return new, acc * registers.spread(new.l_i * softmax.rescale(l_i), acc.shape[1])

    sums, acc = lax.cond(spoiled, repair, lambda *whole: whole, sums, plgpu.layout_cast(acc, registers.TILE))
    return sums, plgpu.layout_cast(acc, registers.ACC)


def end_row(block: Block) -> None:
    """Waits until every compute warpgroup has reached the end of its row, and what they have stored has arrived."""
    plgpu.wait_smem_to_gmem(0)
    plgpu.barrier_arrive(block.bars["row_done"])
    plgpu.barrier_wait(block.bars["row_done"])


def compute_tile(block: Block, warpgroup: Index, tile: Tile) -> None:
    """Computes a warpgroup's rows of a tile."""
    rows, before = rows_of(block, tile, warpgroup), None
    if block.merges and not block.begins:
        earlier, before = merge.load(block, tile, rows)  # on their way while the first products are made
        rows = rows._replace(earlier=earlier)
    seen, buffer = work.steps(block.spec, block.schedule), rem(tile.ordinal, block.schedule.query_buffers)
    plgpu.barrier_wait(block.bars["q_full"].at[buffer])
    if block.schedule.q_registers:
        width = CHUNK * chunks(block.spec.d)
        rows = rows._replace(held=registers.load_chunks(rows.q(), 0, width, block.spec.dtype))
    if seen.skips_above:
        skip(block, tile, warpgroup, tile.hi - 1, rows.stop - 1)
    state = first_step(block, tile, rows)
    acc = registers.zeros(block.spec.d_v) if before is None else merge.accumulator(rows, before)
    if block.schedule.held_columns:
        await_keys(block, tile, rows, rows.stop - 2)

    def step(i: Index, carry: tuple[Softmax, Fragment]) -> tuple[Softmax, Fragment]:
        return next_step(block, tile, rows, rows.stop - 1 - i, *carry)

    state, acc = lax.fori_loop(jnp.int32(1), ptx.scalar(rows.stop - rows.start), step, (state, acc))
    acc, values_ready = multiply_values(block, tile, rows.start, state, acc)
    free_bias(block, tile, rows.start)
    sink = sinks.load(block, tile)  # while the last product runs
    acc = values_ready(acc)
    if seen.skips_below:
        skip(block, tile, warpgroup, rows.start - 1, tile.lo - 1)
    sums, acc = repaired(block, tile, rows, state, acc)
    if block.schedule.out_chunks:
        plgpu.barrier_arrive(block.bars["q_free"].at[buffer])
    finish_once(block, tile, rows, with_sink(block, sink, sums), acc)
    if not block.schedule.out_chunks:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(block.bars["q_free"].at[buffer])


def compute(block: Block, warpgroup: Index) -> None:
    """Runs a compute warpgroup."""
    plgpu.set_max_registers(block.schedule.registers[0], action="increase")

    @pl.when(warpgroup == block.schedule.warpgroups - 1)
    def _() -> None:
        pass_turn(block, warpgroup)  # the first turn is the first warpgroup's

    if block.schedule.maxima:
        block.gmem["given_up"][lax.axis_index("block"), warpgroup, block.any_given_up] = jnp.int32(0)
    walk(block, functools.partial(compute_tile, block, warpgroup), functools.partial(end_row, block), warpgroup)

    @pl.when(warpgroup == 0)
    def _() -> None:
        await_turn(block, warpgroup)  # the last turn, which no warpgroup took: no barrier may be left half full

    plgpu.wait_smem_to_gmem(0)


# -- launch ----------------------------------------------------------------------------------------------------------

def launch(spec: AttentionSpec, schedule: ForwardSchedule, merges: bool = False,
           state: jax.ShapeDtypeStruct | None = None) -> Launch:
    """The launch that makes out, in the layout of q, and the statistics of rows (`spec.stats_shape`), of q, k, v in the
    spec's layout, and of what mask, bias, dropout and score function need: `work.forward_table(spec, schedule)`, or
    arrays of `mask_arrays`, of which it updates "key_tiles"; those of `mosaic.bias`, dropout's keys, those of
    `mosaic.score_function`, and sinks.

    If it `merges`, q, k and v are whole arrays, "places" says where the part's rows lie, and the launch makes nothing:
    it updates "state_out" and "state_stats" (`forward.merge`). If it is the first to merge, `state` is what "state_out"
    is: the launch makes that, and writes only rows of the part; what is in "state_stats" counts as nothing.
    """
    arrays, blocks = mask_arrays.names(spec.mask, of_keys=True), work.forward_blocks(spec, schedule)
    inputs = ("q", "k", "v", *(arrays or ["table"]), *bias.names(spec), *dropout.input_types(spec),
              *score_function.input_types(spec), *sinks.input_types(spec))
    outputs = {} if merges else {"out": jax.ShapeDtypeStruct(spec.out_shape, spec.result_dtype),
                                 "stats": jax.ShapeDtypeStruct(spec.stats_shape, jnp.float32)}
    updates = ("key_tiles",) * bool(arrays)
    if merges:
        merged = ("state_stats",) if state is not None else ("state_out", "state_stats")
        updates, inputs = (*updates, *merged), (*inputs, "places", *merged)
    if state is not None:
        outputs["state_out"] = state
    if schedule.maxima:
        slots = work.forward_table(spec, schedule).shape[1]
        outputs["given_up"] = jax.ShapeDtypeStruct((blocks, schedule.warpgroups, slots), jnp.int32)

    def attention_forward(*refs: *KernelArguments) -> None:
        *found, smem, bars = refs
        block = Block(spec, schedule, dict(zip((*inputs, *outputs), found, strict=True)), smem, bars,
                      begins=state is not None)
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup < schedule.warpgroups)
        def _() -> None:
            compute(block, warpgroup)

        @pl.when(warpgroup == schedule.warpgroups)
        def _() -> None:
            load(block)

    kernel = plgpu.kernel(
        attention_forward,
        out_type=tuple(outputs.values()),
        scratch_types=allocate(memory.forward_memory(spec, schedule)), grid=(blocks,), grid_names=("block",),
        num_threads=schedule.warpgroups + 1, thread_name="warpgroup",
        compiler_params=tiles.COMPILER)
    return Launch(kernel, inputs, outputs, updates)
