"""The gradient of a bias of pairs on Hopper, in tiles of 64 queries a warpgroup and a few keys, of each bias; the same
bits on every run.

    dbias = sum of dS = P * (dP - delta) over the batch entries and query heads that share the bias

P = exp(S - lse) and dP = dO V^T are computed once more; the sum stays in registers, so that there are neither float32
sums in global memory nor additions to it. One more warpgroup loads the tiles of one (batch entry, query head) after the
other, queries with keys and douts with values in turn through one ring, so that a load is as far ahead as there are
slots. Those whose mask keeps no pair of the tile are left out by both sides. A bias in 16 bits comes to shared memory
once, and its gradient is written over it. A block takes tile after tile (`work.dbias_table`), so that the next one is
loaded while this one is computed and written.

Nothing is multiplied by dS here, so what is hidden cannot spoil what is not, and no row is computed again.

Barriers: ring_full, ring_free for slots of the ring; bias_full for a warpgroup's rows of the bias, or their place,
bias_free when the gradient has left them.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_flash.arrays import Array
from pallas_flash.kernels.hopper import mask_arrays, memory, registers, tiles, wgmma, work
from pallas_flash.kernels.hopper.backward import copies, dq
from pallas_flash.kernels.hopper.backward.statistics import Statistics
from pallas_flash.kernels.hopper.backward.tiles import Block
from pallas_flash.kernels.hopper.backward.weights import Corrections, Kept, Large, Pairs, weights
from pallas_flash.kernels.hopper.registers import Fragment
from pallas_flash.kernels.hopper.schedule import CHUNK, ROWS_PER_WARPGROUP, DbiasSchedule
from pallas_flash.kernels.hopper.scratch import allocate
from pallas_flash.kernels.mosaic import bias, dropout, fragments, ptx
from pallas_flash.kernels.mosaic.completion import Completed, completion
from pallas_flash.kernels.mosaic.head_mask import ArrayMask
from pallas_flash.kernels.mosaic.launch import Launch
from pallas_flash.kernels.mosaic.scheduling import div, rem
from pallas_flash.kernels.mosaic.types import Flag, Index, KernelArguments, Ref
from pallas_flash.kernels.mosaic.walk import Walk
from pallas_flash.spec import AttentionSpec

__all__ = ["launch"]


class Sharers(NamedTuple):
    """The batch entries and query heads that share a bias, one after the other."""

    batches: int
    heads: int

    @classmethod
    def of(cls, spec: AttentionSpec) -> "Sharers":
        """Those of each bias of a spec."""
        assert spec.bias is not None
        return cls(spec.batch // spec.bias.shape[0], spec.q_heads // spec.bias.shape[1])

    @property
    def number(self) -> int:
        """How many pairs of a batch entry and a head."""
        return self.batches * self.heads


class Tile(NamedTuple):
    """A tile of a bias: a block of queries, which says nothing of a batch entry and head, and a key tile."""

    block: Block[DbiasSchedule]
    place: tuple[Index, Index]  # of the bias in its array
    kv_tile: Array

    @property
    def kv_first(self) -> Index:
        """The position of the first key."""
        return self.kv_tile * self.block.schedule.block_kv

    def of(self, i: Index) -> Block[DbiasSchedule]:
        """The block for batch entry and query head number i of those that share the bias."""
        block, sharers = self.block, Sharers.of(self.block.spec)
        batch = self.place[0] if sharers.batches == 1 else div(i, sharers.heads)
        head = self.place[1] if sharers.heads == 1 else rem(i, sharers.heads)
        mask = ArrayMask(block.gmem, batch, head)
        return block._replace(mask=mask, batch=batch, head=head,
                              walk=Walk(head, 1, *mask.tiles("key_tiles", block.tile)))

    def needs(self, walk: Walk) -> Flag:
        """Whether a mask keeps some pair of the tile."""
        return jnp.logical_and(walk.start <= self.kv_tile, self.kv_tile < walk.stop)

    def for_each[C](self, body: Callable[[Block[DbiasSchedule], Array, C], C], first: Array,
                    carry: C) -> tuple[Array, C]:
        """Runs carry = body(block, number, carry) for all that need the tile, with numbers from `first` on. Returns the
        number behind the last, too.
        """
        def step(i: Array, state: tuple[Array, C]) -> tuple[Array, C]:
            block = self.of(i)
            return lax.cond(self.needs(block.walk), lambda number, carry: (number + 1, body(block, number, carry)),
                            lambda *state: state, *state)

        count = jnp.int32(Sharers.of(self.block.spec).number)
        found: tuple[Array, C] = lax.fori_loop(jnp.int32(0), count, step, (first, carry))
        return found


def for_each_tile[C](block: Block[DbiasSchedule], body: Callable[[Tile, Array, C], C], carry: C) -> C:
    """Runs carry = body(tile, ordinal, carry) for the tiles that this block takes, a row of the table."""
    row, table = lax.axis_index("block"), block.gmem["tiles"]
    _, heads, rows, columns = work.dbias_shape(block.spec, block.schedule)
    q_tiles, kv_tiles = rows // block.schedule.block_q, columns // block.schedule.block_kv

    def step(i: Array, state: tuple[Array, C]) -> tuple[Array, C]:
        number, carry = state
        following = table[row, i + 2]  # on its way meanwhile
        rest, kv_tile = div(number, kv_tiles), rem(number, kv_tiles)
        pair, q_tile = div(rest, q_tiles), rem(rest, q_tiles)
        tile = Tile(block._replace(tile=q_tile), (div(pair, heads), rem(pair, heads)), kv_tile)
        return following, body(tile, i, carry)

    return lax.fori_loop(jnp.int32(0), table[row, 0], step, (table[row, 1], carry))[1]


# -- the loading warpgroup ---------------------------------------------------------------------------------------------

def load_ring(whole: Block[DbiasSchedule]) -> None:
    """Loads queries with keys, then douts with values, of one step after the other, as slots become free."""
    full, free, s = whole.bars["ring_full"], whole.bars["ring_free"], whole.schedule

    def load(tile: Tile, block: Block[DbiasSchedule], number: Array, _: None) -> None:
        spec, smem = block.spec, block.smem
        for turn, (rows, keys) in enumerate((("q", "k"), ("dout", "v"))):
            slot = tiles.await_free(free, s.num_stages, 2 * number + turn)
            for i in range(s.warpgroups):
                index = block.batch, block.head, block.tile * s.block_q + i * ROWS_PER_WARPGROUP
                start = functools.partial(tiles.load_tile, spec, index=index, target=smem["rows"].at[slot, i],
                                          full=full.at[slot])
                copies.with_source(block.gmem, rows, copies.is_copied(block.gmem, index), start)
            index = block.batch, div(block.head, spec.group), tile.kv_first
            tiles.load_tile(spec, block.gmem[keys], index, smem["keys"].at[slot], full.at[slot])

    def load_all(tile: Tile, _: Array, number: Array) -> Array:
        return tile.for_each(functools.partial(load, tile), number, None)[0]

    tiles.see_last_phases(free, s.num_stages, 2 * for_each_tile(whole, load_all, jnp.int32(0)))


def piece(tile: Tile, ref: Ref, warpgroup: Index, first: int, columns: int) -> Ref:
    """Selects columns from `first` on of a warpgroup's rows of the tile, in the bias or in its gradient."""
    batch, head = tile.place
    rows = pl.ds(tile.block.tile * tile.block.schedule.block_q + warpgroup * ROWS_PER_WARPGROUP, ROWS_PER_WARPGROUP)
    return ref.at[batch, head, rows, pl.ds(tile.kv_first + first, columns)]


def load_bias(tile: Tile) -> None:
    """Starts to load a tile of the bias."""
    block = tile.block
    for i in range(block.schedule.warpgroups):
        for chunk in range(block.schedule.block_kv // CHUNK):
            plgpu.copy_gmem_to_smem(piece(tile, block.gmem["bias"], i, chunk * CHUNK, CHUNK),
                                    block.smem["bias"].at[i, chunk], block.bars["bias_full"].at[i])


def leave_bias(tile: Tile) -> None:
    """Says that the place of a tile of the bias is free for its gradient, of zeros."""
    block = tile.block
    for i in range(block.schedule.warpgroups):
        for _ in range(block.schedule.block_kv // CHUNK):  # as many arrivals as there are loads
            plgpu.barrier_arrive(block.bars["bias_full"].at[i])


def load_biases(block: Block[DbiasSchedule]) -> None:
    """Loads those tiles of the bias that something needs, as the gradients of the tiles before leave their place."""
    free, warpgroups = block.bars["bias_free"], block.schedule.warpgroups

    def load(tile: Tile, ordinal: Array, _: None) -> None:
        for i in range(warpgroups):
            pl.when(ordinal > 0)(functools.partial(plgpu.barrier_wait, free.at[i]))
        count, _ = tile.for_each(lambda block, number, carry: carry, jnp.int32(0), None)
        lax.cond(count > 0, functools.partial(load_bias, tile), functools.partial(leave_bias, tile))

    for_each_tile(block, load, None)
    tiles.see_last_phases(free, warpgroups, warpgroups)  # each block takes a tile


def load_role(block: Block[DbiasSchedule]) -> None:
    """Runs the loading warpgroup: a warp fills the ring, and another loads the bias, if it comes to shared memory."""
    plgpu.set_max_registers(block.schedule.registers[1], action="decrease")

    @plgpu.warp_map
    def _(warp: Index) -> None:
        @pl.when(warp == 0)
        def _() -> None:
            load_ring(block)

        if "bias" in block.smem:
            pl.when(warp == 1)(functools.partial(load_biases, block))


# -- the compute warpgroups --------------------------------------------------------------------------------------------

def completed_by(block: Block[DbiasSchedule], rows: dq.Rows, kv_first: Index) -> Completed | None:
    """What adds the bias to scores: from shared memory, or from global memory."""
    if "bias" not in block.smem:
        return completion(block.spec, block.gmem, (block.batch, block.head), (rows.first, kv_first), 1)
    held = own(block, rows.warpgroup, block.smem["bias"])

    def completed(s: Fragment) -> tuple[Fragment, None]:
        added = registers.load_matrices(held)
        hidden = added.astype(jnp.float32) == -jnp.inf  # where keys may be anything
        return jnp.where(hidden, -jnp.inf, bias.with_pairs(block.spec, s, added)), None

    return completed


def bias_columns(block: Block[DbiasSchedule], warpgroup: Index, first: int, columns: int) -> Fragment:
    """Loads columns of a warpgroup's rows of the bias from shared memory."""
    return registers.load_chunks(own(block, warpgroup, block.smem["bias"]), first, columns, block.smem["bias"].dtype)


def own(block: Block[DbiasSchedule], warpgroup: Index, ref: Ref) -> Ref:
    """Selects what belongs to a warpgroup."""
    return ref.at[ptx.opaque(warpgroup) if block.schedule.opaque else warpgroup]


def await_bias(block: Block[DbiasSchedule], warpgroup: Index) -> None:
    """Waits for a warpgroup's rows of the bias, or for their place."""
    if "bias" in block.smem:
        plgpu.barrier_wait(block.bars["bias_full"].at[warpgroup])


def score_gradients(tile: Tile, warpgroup: Index, block: Block[DbiasSchedule], number: Array,
                    is_first: Flag) -> Fragment:
    """Computes dS of the tile of one batch entry and query head, the first of a tile or not, but for dropout's factor:
    (64, block_kv) float32. It is 0 where P is, whatever dP is.
    """
    spec, s, bars, smem = block.spec, block.schedule, block.bars, block.smem
    slot, v_slot = (rem(2 * number + turn, s.num_stages) for turn in range(2))
    first = block.tile * s.block_q + warpgroup * ROWS_PER_WARPGROUP
    lse_log2, delta = (dq.statistic(block, first, row) for row in (Statistics.LSE, Statistics.DELTA))
    rows = dq.Rows(warpgroup, first, lse_log2, delta, dq.any_large_in_warp(spec, lse_log2))
    from_delta = wgmma.settled(registers.spread(delta, s.block_kv))
    plgpu.barrier_wait(bars["ring_full"].at[slot])
    scores = wgmma.multiply_transposed(own(block, warpgroup, smem["rows"].at[slot]), smem["keys"].at[slot], spec.d)
    plgpu.barrier_wait(bars["ring_full"].at[v_slot])
    dp = wgmma.multiply_transposed(own(block, warpgroup, smem["rows"].at[v_slot]), smem["keys"].at[v_slot], spec.d_v,
                                   from_delta)
    pl.when(is_first)(functools.partial(await_bias, block, warpgroup))
    x = plgpu.layout_cast(wgmma.ready(scores, 1), registers.TILE)
    plgpu.barrier_arrive(bars["ring_free"].at[slot])
    p = tile_weights(tile, block, rows, x)
    kept = kept_of(tile, block, rows)
    dp = kept.dp(plgpu.layout_cast(wgmma.ready(dp, 0), registers.TILE))
    plgpu.barrier_arrive(bars["ring_free"].at[v_slot])
    return jnp.where(p == 0, 0.0, p * dp)


def tile_weights(tile: Tile, block: Block[DbiasSchedule], rows: dq.Rows, x: Fragment) -> Fragment:
    """Computes P from the products x of queries and keys. The bias is added behind a soft cap, whose slope is not its
    gradient's.
    """
    first = rows.first, tile.kv_first
    pairs = Pairs(block.mask, first, 1, block.walk.partial(tile.kv_tile))
    large = Large(rows.large, functools.partial(dq.without_rounding, block, rows))
    lse_log2 = registers.spread(rows.lse_log2, block.schedule.block_kv)
    p, _ = weights(block.spec, x, lse_log2, Corrections(large, pairs),
                   completed=completed_by(block, rows, tile.kv_first))
    return p


def kept_of(tile: Tile, block: Block[DbiasSchedule], rows: dq.Rows) -> Kept:
    """Draws for the weights of the tile."""
    columns = block.schedule.block_kv
    start = lambda: registers.spread(rows.delta, columns)
    if not block.spec.dropout_rate:
        return Kept(None, start)
    draws = dropout.draws(block.spec, block.gmem, (block.batch, block.head), (rows.first, tile.kv_first), 1)
    return Kept(dropout.kept(draws, columns), start)


def store(tile: Tile, warpgroup: Index, total: Fragment) -> None:
    """Writes the gradient of a warpgroup's rows of the tile: through shared memory, whose place it frees, or from
    registers if it is float32.
    """
    block, target, columns = tile.block, tile.block.gmem["dbias"], total.shape[1]
    if target.dtype.itemsize == 4:
        for first in range(0, columns, CHUNK):
            place = piece(tile, target, warpgroup, first, CHUNK)
            place[...] = total[:, first:first + CHUNK]
        if "bias" in block.smem:  # in 16 bits, of a partial spec
            ptx.fence_async_proxy()
            plgpu.barrier_arrive(block.bars["bias_free"].at[warpgroup])
        return
    buffer = block.smem["bias"].at[warpgroup]
    registers.store_chunks(total.astype(target.dtype), buffer)
    plgpu.commit_smem()
    for chunk in range(columns // CHUNK):
        plgpu.copy_smem_to_gmem(buffer.at[chunk], piece(tile, target, warpgroup, chunk * CHUNK, CHUNK))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(block.bars["bias_free"].at[warpgroup])


def without_hidden(tile: Tile, warpgroup: Index, total: Fragment) -> Fragment:
    """The gradient with 0 where the bias is -inf: lse of a row may be NaN, and so its weights there."""
    block, parts = tile.block, []
    for first in range(0, total.shape[1], 8):
        if "bias" in block.smem:
            held = bias_columns(block, warpgroup, first, 8)
        else:
            held = plgpu.load(piece(tile, block.gmem["bias"], warpgroup, first, 8), layout=fragments.TILE,
                              optimized=False)
        parts.append(jnp.where(held.astype(jnp.float32) == -jnp.inf, 0.0, total[:, first:first + 8]))
    return fragments.concatenate(parts)


def compute_role(block: Block[DbiasSchedule], warpgroup: Index) -> None:
    """Runs a compute warpgroup."""
    spec, s = block.spec, block.schedule
    plgpu.set_max_registers(s.registers[0], action="increase")

    def compute(tile: Tile, _: Array, first: Array) -> Array:
        def add(block: Block[DbiasSchedule], number: Array, total: Fragment) -> Fragment:
            return total + score_gradients(tile, warpgroup, block, number, number == first)

        zeros = plgpu.layout_cast(jnp.zeros((ROWS_PER_WARPGROUP, s.block_kv), jnp.float32), registers.TILE)
        number, total = tile.for_each(add, first, zeros)
        pl.when(number == first)(functools.partial(await_bias, block, warpgroup))
        total = lax.cond(number > first, functools.partial(without_hidden, tile, warpgroup), lambda total: total, total)
        store(tile, warpgroup, total * dropout.factor(spec))
        return number

    for_each_tile(block, compute, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)


# -- the launch --------------------------------------------------------------------------------------------------------

def launch(spec: AttentionSpec, schedule: DbiasSchedule, dtype: np.dtype) -> Launch:
    """The launch that makes the gradient of a bias of pairs, in a dtype, of q, k, v, dout, the statistics, the tiles of
    each block, and what mask, bias and dropout need, as `backward.dq` has it.

    Args:
      spec: with a mask that holds arrays (`bias.as_mask`).
      dtype: that of the bias, or float32.
    """
    extra = (*mask_arrays.names(spec.mask, of_keys=True), *bias.names(spec), *dropout.input_types(spec),
             *copies.names(spec))
    inputs = ("q", "k", "v", "dout", "statistics", *extra, "tiles")

    def attention_backward_dbias(*refs: *KernelArguments) -> None:
        *arrays, smem, bars = refs
        gmem = dict(zip((*inputs, "dbias"), arrays, strict=True))
        gmem["stats"] = gmem.pop("statistics")
        none = jnp.int32(0)
        block = Block(spec, schedule, gmem, smem, bars, ArrayMask(gmem, none, none), none, none, none,
                      Walk(none, 1, none, none, none, none))
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup < schedule.warpgroups)
        def _() -> None:
            compute_role(block, warpgroup)

        @pl.when(warpgroup == schedule.warpgroups)
        def _() -> None:
            load_role(block)

    outputs = {"dbias": jax.ShapeDtypeStruct(work.dbias_shape(spec, schedule), dtype)}
    kernel = plgpu.kernel(
        attention_backward_dbias, out_type=tuple(outputs.values()),
        scratch_types=allocate(memory.dbias_memory(spec, schedule)), grid=work.dbias_table(spec, schedule).shape[:1],
        grid_names=("block",), num_threads=schedule.warpgroups + 1, thread_name="warpgroup",
        compiler_params=tiles.COMPILER)
    return Launch(kernel, inputs, outputs)
