"""FlashAttention's forward pass for Hopper (sm_90a), in Pallas Mosaic GPU.

Roles. A block has `warpgroups` compute warpgroups, of 64 query rows each, and one that loads: its first warp brings
queries and keys, its second brings values. In a persistent grid every block takes the query tiles that its row of the
table names, longest first, and the roles walk them independently: loads run ahead of the products as far as the rings
allow.

Rings and barriers. A barrier is named for the state it announces.

    q_full, q_free    a query buffer has been loaded / will not be read again
    k_full, k_free    a slot of the ring of key tiles has been loaded / has been read by every compute warpgroup
    v_full, v_free    the same for value tiles

A query tile's key tiles are walked from the last to the first, each taking one step of the rings. A warpgroup starts at
the last tile that its own rows need: it waits for and frees what it skips, because each waiting thread tracks a
barrier's parity.

Overlap. In a step, S = Q K^T of this key tile and O += P V of the one before are in flight together; the softmax of S
runs while P V is still being multiplied, and while the other warpgroups' products are. With `pingpong`, named barriers
hand the tensor cores from warpgroup to warpgroup, so that one's softmax meets the others' products.

Numbers. m_i is the row maximum in base 2 (`scale * log2(e)` times the score), l_i (64, 8) a row sum that is still
spread over columns: it is added up once, at the end. P is rounded to the input's type, all else is float32. With a lazy
`rescale` m_i may stay up to 8 below the maximum, so that P reaches 2^8: it cancels in O / l_i, and costs no accuracy in
floating point.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_flash import softmax
from pallas_flash.kernels.hopper import barriers, products
from pallas_flash.kernels.hopper import schedule as schedules
from pallas_flash.kernels.hopper.schedule import CHUNK, ROWS, ForwardSchedule
from pallas_flash.spec import AttentionSpec

__all__ = ["launch"]

LOWEST = -3e38
"""Row maximum of rows that have seen no key: finite, so that subtracting it from -inf is not NaN."""

SLACK = 8.0
"""How far, in base 2, a row's maximum may grow before a lazy rescale follows it."""


class Block(NamedTuple):
    """What the roles of one block share: the problem, and references to global and shared memory."""

    spec: AttentionSpec
    schedule: ForwardSchedule
    gmem: dict[str, Any]  # q, k, v, table, out, lse
    smem: dict[str, Any]  # schedules.forward_buffers
    bars: dict[str, Any]  # the barriers


class Tile(NamedTuple):
    """A query tile at work."""

    batch: Any
    head: Any
    index: Any  # of the query tile
    lo: Any  # key tiles [lo, hi)
    hi: Any
    turn: Any  # how many tiles came before it in this block
    step: Any  # how many steps of the rings came before it

    def slot(self, kv_tile: Any, num_stages: int) -> Any:
        """The slot of the rings that holds a key tile."""
        return rem(self.step + (self.hi - 1 - kv_tile), num_stages)


class Softmax(NamedTuple):
    """The state of the online softmax of 64 rows."""

    m_i: Any  # (64,), base 2
    l_i: Any  # (64, 8), sums of every eighth column
    p: Any  # (64, block_kv) of the input's type, the weights of the last tile, not yet multiplied with its values


def div(a: Any, b: int) -> Any:
    """a // b for a >= 0, in int32 whatever JAX's 64-bit mode."""
    return lax.div(barriers.scalar(a), jnp.int32(b))


def rem(a: Any, b: int) -> Any:
    """a % b for a >= 0, in int32 whatever JAX's 64-bit mode."""
    return lax.rem(barriers.scalar(a), jnp.int32(b))


# -- tiles -----------------------------------------------------------------------------------------------------------

def for_each_tile(block: Block, work: Callable[[Tile], None]) -> tuple[Any, Any]:
    """Runs `work` on every tile in this block's row of the table; returns how many tiles and steps there were."""
    row, q_tiles = lax.axis_index("block"), -(-block.spec.q_len // block.schedule.block_q)

    def one(carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        number, turn, step = carry
        following = block.gmem["table"][row, turn + 1]  # asked for early: it comes from global memory
        head, index = div(number, q_tiles), rem(number, q_tiles)
        lo, hi = schedules.kv_range(block.spec, block.schedule, index)
        work(Tile(div(head, block.spec.q_heads), rem(head, block.spec.q_heads), index, lo, hi, turn, step))
        return following, turn + 1, barriers.scalar(step + (hi - lo))

    start = (block.gmem["table"][row, 0], jnp.int32(0), jnp.int32(0))
    _, turns, steps = lax.while_loop(lambda carry: carry[0] >= 0, one, start)
    return turns, steps


def global_chunk(block: Block, name: str, place: tuple[Any, Any, Any], rows: int, chunk: int) -> Any:
    """A (rows, 64) piece of q, k, v or out, from (batch, head, first row); TMA fills and clips what lies outside the
    array.
    """
    batch, head, first = place
    nothing = lax.axis_index("block") * 0  # traced: Pallas refuses plain indices that leave the array
    columns = pl.ds(chunk * CHUNK + nothing, CHUNK)
    if block.spec.layout == "BLHD":
        return block.gmem[name].at[batch, pl.ds(first, rows), head, columns]
    return block.gmem[name].at[batch, head, pl.ds(first, rows), columns]


# -- loading ---------------------------------------------------------------------------------------------------------

def load_chunks(block: Block, name: str, place: tuple[Any, Any, Any], slot: Any, full: Any) -> None:
    """Starts to load one tile of q, k or v into a slot of its buffer."""
    _, count, rows, _ = schedules.forward_buffers(block.spec, block.schedule)[name].shape
    for chunk in range(count):
        plgpu.copy_gmem_to_smem(global_chunk(block, name, place, rows, chunk), block.smem[name].at[slot, chunk], full)


def load_query(block: Block, tile: Tile) -> None:
    buffers = block.schedule.query_buffers
    slot = rem(tile.turn, buffers)

    @pl.when(tile.turn >= buffers)
    def _() -> None:
        plgpu.barrier_wait(block.bars["q_free"].at[slot])

    place = (tile.batch, tile.head, tile.index * block.schedule.block_q)
    load_chunks(block, "q", place, slot, block.bars["q_full"].at[slot])


def load_ring(block: Block, tile: Tile, name: str) -> None:
    """Loads the tile's key tiles (name "k") or value tiles ("v"), last first, as slots become free."""
    stages = block.schedule.num_stages
    full, free = block.bars[f"{name}_full"], block.bars[f"{name}_free"]
    kv_head = div(tile.head, block.spec.group)

    @pl.loop(jnp.int32(0), barriers.scalar(tile.hi - tile.lo))
    def _(i: Any) -> None:
        kv_tile = tile.hi - 1 - i
        slot = tile.slot(kv_tile, stages)

        @pl.when(tile.step + i >= stages)
        def _() -> None:
            plgpu.barrier_wait(free.at[slot])

        load_chunks(block, name, (tile.batch, kv_head, kv_tile * block.schedule.block_kv), slot, full.at[slot])


def drain(block: Block, name: str, used: Any) -> None:
    """Waits until the slots of q, k or v that were loaded last are free too, `used` having been loaded in all."""
    free = block.bars[f"{name}_free"]
    slots = free.shape[0]

    @pl.loop(jnp.maximum(used - slots, 0), used)
    def _(i: Any) -> None:
        plgpu.barrier_wait(free.at[rem(i, slots)])


def load(block: Block) -> None:
    """The loading warpgroup."""
    plgpu.set_max_registers(block.schedule.registers[1], action="decrease")

    def keys(tile: Tile) -> None:
        load_query(block, tile)
        load_ring(block, tile, "k")

    @plgpu.warp_map
    def _(warp: Any) -> None:
        @pl.when(warp == 0)
        def _() -> None:
            turns, steps = for_each_tile(block, keys)
            drain(block, "q", turns)
            drain(block, "k", steps)

        @pl.when(warp == 1)
        def _() -> None:
            _, steps = for_each_tile(block, lambda tile: load_ring(block, tile, "v"))
            drain(block, "v", steps)


# -- taking turns ----------------------------------------------------------------------------------------------------

def order(block: Block, warpgroup: Any) -> Any:
    """The named barrier of a warpgroup's turn at the tensor cores."""
    return barriers.first_free(block.schedule.warpgroups + 1) + warpgroup


def await_turn(block: Block, warpgroup: Any) -> None:
    if block.schedule.pingpong and block.schedule.warpgroups > 1:
        barriers.named_sync(order(block, warpgroup), 2 * barriers.WARPGROUP)


def pass_turn(block: Block, warpgroup: Any) -> None:
    count = block.schedule.warpgroups
    if block.schedule.pingpong and count > 1:
        barriers.named_arrive(order(block, rem(warpgroup + 1, count)), 2 * barriers.WARPGROUP)


def skip(block: Block, tile: Tile, warpgroup: Any, first: Any, stop: Any) -> None:
    """Passes the steps of the key tiles first, first - 1, ..., stop + 1, which this warpgroup does not need."""
    @pl.loop(jnp.int32(0), barriers.scalar(first - stop))
    def _(i: Any) -> None:
        slot = tile.slot(first - i, block.schedule.num_stages)
        await_turn(block, warpgroup)
        pass_turn(block, warpgroup)
        for name in ("k", "v"):
            plgpu.barrier_wait(block.bars[f"{name}_full"].at[slot])
            plgpu.barrier_arrive(block.bars[f"{name}_free"].at[slot])


# -- scores and softmax ----------------------------------------------------------------------------------------------

def across(x: Any, columns: int) -> Any:
    """(64,) -> (64, columns)."""
    return lax.broadcast_in_dim(x, (ROWS, columns), [0])


def scaled(spec: AttentionSpec, s: Any) -> tuple[Any, float]:
    """Scores in some unit, and the (positive) unit: their product is the score times log2(e)."""
    if spec.softcap is not None:
        # tanh from exp2: the hardware's tanh has 11 bits.  tanh x = 1 - 2 / (e^2x + 1)
        t = 1 - 2 / (jnp.exp2(s * (2 * softmax.LOG2E * spec.scale / spec.softcap)) + 1)
        return t, spec.softcap * softmax.LOG2E
    if spec.scale <= 0:
        return s * (spec.scale * softmax.LOG2E), 1.0
    return s, spec.scale * softmax.LOG2E


def masked(block: Block, s: Any, first_row: Any, kv_tile: Any) -> Any:
    """s with -inf where the mask does not keep a pair."""
    q_pos = products.positions(s.shape[1], 0, first_row)
    kv_pos = products.positions(s.shape[1], 1, kv_tile * block.schedule.block_kv)
    return jnp.where(schedules.forward_mask(block.spec, block.schedule).keep(q_pos, kv_pos), s, -jnp.inf)


def column_sums(p: Any) -> Any:
    """(64, n) -> (64, 8): sums of every eighth column, without crossing threads."""
    return functools.reduce(jnp.add, [p[:, i:i + 8] for i in range(0, p.shape[1], 8)])


def first_softmax(s: Any, unit: float, dtype: Any) -> Softmax:
    m_i = jnp.maximum(s.max(axis=1) * unit, LOWEST)
    p = jnp.exp2(s * unit - across(m_i, s.shape[1]))
    return Softmax(m_i, column_sums(p), p.astype(dtype))


def grown(block: Block, m_i: Any, row_max: Any) -> tuple[Any, Any]:
    """The new row maximum, and whether any row of this warp (or warpgroup) needs a rescale; None for always."""
    if block.schedule.rescale == "always":
        return jnp.maximum(m_i, row_max), None
    grew = jnp.logical_not(row_max - m_i <= SLACK)  # so that NaN counts as growth
    vote = barriers.any_in_warp if block.schedule.rescale == "warp" else barriers.any_in_warpgroup
    return jnp.where(grew, row_max, m_i), vote(grew, products.ROWS)


def rescaled(needed: Any, alpha: Any, acc: Any, l_i: Any) -> tuple[Any, Any]:
    """acc and l_i times alpha. Only registers are touched: the fence that wgmma needs is issued with the next
    product.
    """
    def multiply(acc: Any, l_i: Any) -> tuple[Any, Any]:
        tile = plgpu.layout_cast(acc, products.TILE)
        return plgpu.layout_cast(tile * across(alpha, acc.shape[1]), products.ACC), l_i * across(alpha, 8)

    return multiply(acc, l_i) if needed is None else lax.cond(needed, multiply, lambda acc, l_i: (acc, l_i), acc, l_i)


# -- the steps of a tile ---------------------------------------------------------------------------------------------

class Rows(NamedTuple):
    """The 64 rows of one warpgroup in a tile."""

    warpgroup: Any
    first: Any  # position of the first row
    start: Any  # key tiles [start, stop), of which [full_start, full_stop) need no mask
    full_start: Any
    full_stop: Any
    stop: Any
    q: Callable[[], Any]  # the rows of the query buffer, (chunks, 64, 64)


def rows_of(block: Block, tile: Tile, warpgroup: Any) -> Rows:
    buffer = rem(tile.turn, block.schedule.query_buffers)

    def q() -> Any:
        index = barriers.opaque(warpgroup) if block.schedule.opaque else warpgroup
        return block.smem["q"].at[buffer, :, pl.ds(index * ROWS, ROWS)]

    first = tile.index * block.schedule.block_q + warpgroup * ROWS
    return Rows(warpgroup, first, *schedules.row_tiles(block.spec, block.schedule, tile.index, warpgroup), q)


def first_step(block: Block, tile: Tile, rows: Rows) -> Softmax:
    """The last key tile of the rows: S and its softmax."""
    kv_tile, bars = rows.stop - 1, block.bars
    slot = tile.slot(kv_tile, block.schedule.num_stages)
    plgpu.barrier_wait(bars["k_full"].at[slot])
    await_turn(block, rows.warpgroup)
    s = products.scores(rows.q(), block.smem["k"].at[slot], block.spec.d)
    pass_turn(block, rows.warpgroup)
    s = plgpu.layout_cast(products.ready(s, 0), products.TILE)
    plgpu.barrier_arrive(bars["k_free"].at[slot])
    s, unit = scaled(block.spec, s)
    if schedules.steps(block.spec, block.schedule).first_masked:
        s = masked(block, s, rows.first, kv_tile)
    return first_softmax(s, unit, block.spec.dtype)


def multiply_values(block: Block, tile: Tile, kv_tile: Any, p: Any, acc: Any) -> tuple[Any, Callable[[], None]]:
    """Issues acc + P V of a key tile; also returns what to call when it is done."""
    slot = tile.slot(kv_tile, block.schedule.num_stages)
    plgpu.barrier_wait(block.bars["v_full"].at[slot])
    acc = products.accumulate(acc, p, block.smem["v"].at[slot])
    return acc, lambda: plgpu.barrier_arrive(block.bars["v_free"].at[slot])


def next_step(block: Block, tile: Tile, rows: Rows, kv_tile: Any, state: Softmax, acc: Any) -> tuple[Softmax, Any]:
    """S of this key tile while P V of the one after it is multiplied, then the softmax of S."""
    bars, slot = block.bars, tile.slot(kv_tile, block.schedule.num_stages)
    plgpu.barrier_wait(bars["k_full"].at[slot])
    await_turn(block, rows.warpgroup)
    s = products.scores(rows.q(), block.smem["k"].at[slot], block.spec.d)
    acc, free_values = multiply_values(block, tile, kv_tile + 1, state.p, acc)
    pass_turn(block, rows.warpgroup)
    s = plgpu.layout_cast(products.ready(s, 1), products.TILE)
    plgpu.barrier_arrive(bars["k_free"].at[slot])
    s, unit = scaled(block.spec, s)
    if schedules.steps(block.spec, block.schedule).later_masked:
        partial = (kv_tile < rows.full_start) | (kv_tile >= rows.full_stop)
        s = lax.cond(partial, lambda s: masked(block, s, rows.first, kv_tile), lambda s: s, s)
    m_i, needed = grown(block, state.m_i, s.max(axis=1) * unit)
    p = jnp.exp2(s * unit - across(m_i, s.shape[1]))
    sums = column_sums(p)
    if block.schedule.pinned:
        barriers.pin(sums, products.TILE)
    acc = products.ready(acc, 0)
    free_values()
    acc, l_i = rescaled(needed, jnp.exp2(state.m_i - m_i), acc, state.l_i)
    return Softmax(m_i, l_i + sums, p.astype(block.spec.dtype)), acc


def finish(block: Block, tile: Tile, rows: Rows, state: Softmax, acc: Any) -> None:
    """out = acc / l and lse, to global memory."""
    l_i = state.l_i.sum(axis=1)
    head = tile.batch * block.spec.q_heads + tile.head
    products.store_row_stats(softmax.finish(state.m_i, l_i), block.gmem["lse"], head, rows.first, block.spec.q_len)
    out = plgpu.layout_cast(acc, products.TILE) * across(softmax.rescale(l_i), acc.shape[1])
    out = out.astype(block.spec.dtype)
    count = schedules.chunks(block.spec.d_v)
    at_once = block.schedule.out_chunks or count
    for chunk in range(0, count, at_once):
        last = min(chunk + at_once, count)
        source = block.smem["out"].at[rows.warpgroup] if block.schedule.out_chunks else rows.q()
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        products.store_chunks(out[:, chunk * CHUNK:min(last * CHUNK, block.spec.d_v)], source)
        plgpu.commit_smem()
        for i in range(chunk, last):
            place = (tile.batch, tile.head, rows.first)
            target = global_chunk(block, "out", place, ROWS, i)
            plgpu.copy_smem_to_gmem(source.at[i - chunk], target, commit_group=i == last - 1)


def compute_tile(block: Block, warpgroup: Any, tile: Tile) -> None:
    """One tile, by one compute warpgroup."""
    rows = rows_of(block, tile, warpgroup)
    seen, buffer = schedules.steps(block.spec, block.schedule), rem(tile.turn, block.schedule.query_buffers)
    plgpu.barrier_wait(block.bars["q_full"].at[buffer])
    if seen.skips_above:
        skip(block, tile, warpgroup, tile.hi - 1, rows.stop - 1)
    state, acc = first_step(block, tile, rows), products.zeros(block.spec.d_v)

    def step(i: Any, carry: tuple[Softmax, Any]) -> tuple[Softmax, Any]:
        return next_step(block, tile, rows, rows.stop - 1 - i, *carry)

    state, acc = lax.fori_loop(jnp.int32(1), barriers.scalar(rows.stop - rows.start), step, (state, acc))
    if block.schedule.out_chunks:
        plgpu.barrier_arrive(block.bars["q_free"].at[buffer])
    acc, free_values = multiply_values(block, tile, rows.start, state.p, acc)
    acc = products.ready(acc, 0)
    free_values()
    if seen.skips_below:
        skip(block, tile, warpgroup, rows.start - 1, tile.lo - 1)
    finish(block, tile, rows, state, acc)
    if not block.schedule.out_chunks:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(block.bars["q_free"].at[buffer])


def compute(block: Block, warpgroup: Any) -> None:
    """A compute warpgroup."""
    plgpu.set_max_registers(block.schedule.registers[0], action="increase")

    @pl.when(warpgroup == block.schedule.warpgroups - 1)
    def _() -> None:
        pass_turn(block, warpgroup)  # the first turn is the first warpgroup's

    for_each_tile(block, functools.partial(compute_tile, block, warpgroup))

    @pl.when(warpgroup == 0)
    def _() -> None:
        await_turn(block, warpgroup)  # the turn that nobody took: a barrier must not be left half full

    plgpu.wait_smem_to_gmem(0)


# -- launch ----------------------------------------------------------------------------------------------------------

def scratch(spec: AttentionSpec, schedule: ForwardSchedule) -> tuple[dict[str, Any], dict[str, Any]]:
    """The buffers and barriers of a block. A buffer is full when each of its chunks has come, free when each warpgroup
    says so.
    """
    shapes = {name: buffer.shape for name, buffer in schedules.forward_buffers(spec, schedule).items()}
    smem = {name: plgpu.SMEM(shape, spec.dtype, transforms=products.CHUNKED) for name, shape in shapes.items()}
    bars = {}
    for name in ("q", "k", "v"):
        slots, count = shapes[name][:2]
        bars[f"{name}_full"] = plgpu.Barrier(num_arrivals=count, num_barriers=slots)
        bars[f"{name}_free"] = plgpu.Barrier(num_arrivals=schedule.warpgroups, num_barriers=slots)
    return smem, bars


def launch(spec: AttentionSpec, schedule: ForwardSchedule) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The kernel of a spec: a function of q, k, v in the spec's layout and of `schedules.forward_table(spec,
    schedule)`.

    It returns out, in the layout of q, and lse, (batch, q_heads, q_len) float32, the natural logarithm.
    """
    smem, bars = scratch(spec, schedule)
    blocks = schedules.forward_table(spec, schedule).shape[0]

    def attention_forward(q: Any, k: Any, v: Any, table: Any, out: Any, lse: Any, smem: Any, bars: Any) -> None:
        block = Block(spec, schedule, {"q": q, "k": k, "v": v, "table": table, "out": out, "lse": lse}, smem, bars)
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup < schedule.warpgroups)
        def _() -> None:
            compute(block, warpgroup)

        @pl.when(warpgroup == schedule.warpgroups)
        def _() -> None:
            load(block)

    kernel = plgpu.kernel(
        attention_forward,
        out_type=(jax.ShapeDtypeStruct(spec.out_shape, spec.dtype), jax.ShapeDtypeStruct(spec.lse_shape, jnp.float32)),
        scratch_types=(smem, bars), grid=(blocks,), grid_names=("block",),
        num_threads=schedule.warpgroups + 1, thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0,
            lowering_semantics=plgpu.LoweringSemantics.Lane))
    return lambda q, k, v, table: tuple(kernel(q, k, v, table))
