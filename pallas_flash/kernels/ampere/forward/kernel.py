"""FlashAttention's forward pass with mma.sync and cp.async, in Pallas Mosaic GPU.

A block is one warpgroup, and has one query tile, of two tiles of 64 rows in registers: 32 rows a warp, so that each
piece of keys or values that ldmatrix brings serves two products. It walks the key tiles that the mask needs, from the
last to the first. There is one buffer for keys and one for values:

    keys     | load K(j)  | S = Q K(j)^T |          load K(j - 1)          | S = Q K(j - 1)^T
    values   | O += P V   |  load V(j)   |       softmax of S, O += P V(j) |  load V(j - 1)
             ^ sync       ^ sync         ^ sync                            ^ sync

Two blocks share an SM where registers and shared memory allow it, and hide each other's waits. With two slots for keys
and for values blocks meet once a tile. Queries of up to 64 columns may stay in registers.

Numbers. m_i is the row maximum of products of queries and keys, not scaled (`mosaic.scores`); l_i (64, 8) a row sum
that is still spread over columns: it is added up once, at the end. P is rounded to the input's type, all else is
float32.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_flash import softmax, tiles
from pallas_flash.kernels.ampere import copies, mask_arrays, memory, mma, registers, work
from pallas_flash.kernels.ampere.copies import Team
from pallas_flash.kernels.ampere.forward.block import Block
from pallas_flash.kernels.ampere.forward.repair import Sums, repaired
from pallas_flash.kernels.ampere.forward.softmax import State, next_state, start
from pallas_flash.kernels.ampere.registers import Fragment
from pallas_flash.kernels.ampere.schedule import CHUNK, ROWS, ForwardSchedule
from pallas_flash.kernels.ampere.scratch import allocate
from pallas_flash.kernels.ampere.work import Meets, met_rows
from pallas_flash.kernels.mosaic import bias, completion, dropout, ptx, score_function
from pallas_flash.kernels.mosaic.head_mask import ArrayMask, HeadMask, StaticMask
from pallas_flash.kernels.mosaic.launch import Launch
from pallas_flash.kernels.mosaic.scheduling import div, rem
from pallas_flash.kernels.mosaic.scores import scaled, score_unit, unit
from pallas_flash.kernels.mosaic.types import Flag, Index, KernelArguments, Ref
from pallas_flash.spec import AttentionSpec

__all__ = ["launch"]


type States = tuple[State, ...]
"""Of each 64 rows."""


def products(block: Block, meets: list[Flag] | None, k: Ref) -> tuple[Fragment, ...]:
    """S = Q K^T of each 64 rows; of rows that do not meet the tile, any finite numbers."""
    q, spec = block.smem["q"], block.spec
    if meets is None:
        return mma.multiply_transposed(q if block.held is None else block.held, k, spec.d)

    def of_rows(i: int) -> Fragment:
        own = q.at[:, pl.ds(i * ROWS, ROWS)] if block.held is None else block.held[i:i + 1]
        (s,) = mma.multiply_transposed(own, k, spec.d)
        return s

    return tuple(lax.cond(meets_it, functools.partial(of_rows, i), lambda: registers.zeros(block.schedule.block_kv))
                 for i, meets_it in enumerate(meets))


def add_values(v: Ref, meets: list[Flag] | None, states: list[State], weights: list[Fragment]) -> States:
    """O += P V of each 64 rows; rows that do not meet the tile have no weights."""
    accs = [state.acc for state in states]
    if meets is None:
        new = mma.accumulate(accs, weights, v)
    else:
        new = tuple(lax.cond(meets_it, lambda acc, p: mma.accumulate([acc], [p], v)[0], lambda acc, _: acc, acc, p)
                    for meets_it, acc, p in zip(meets, accs, weights, strict=True))
    return tuple(state._replace(acc=acc) for state, acc in zip(states, new, strict=True))


def kept(block: Block, first: tuple[Index, Index], p: Fragment) -> Fragment:
    """Zeroes the weights that dropout drops, whose first query and key are given. The row sum l_i has them."""
    if not block.spec.dropout_rate:
        return p
    draws = dropout.draws(block.spec, block.gmem, (block.batch, block.head), first, 1)
    return dropout.without_dropped(draws, p)


def weights_of(block: Block, row_tile: int, first: Index, state: State, x: Fragment,
               masked: bool) -> tuple[State, Fragment]:
    """The next state of 64 rows, and P, from S of the keys from `first` on."""
    spec, place = block.spec, (block.first + row_tile * ROWS, first)
    x = completion.applied(spec, block.gmem, (block.batch, block.head), scaled(spec, x), place)
    if masked:
        x = block.mask.hide(x, place, 1)
    state, p = next_state(state, x, score_unit(spec), block.schedule.slack, spec.dtype)
    return state, kept(block, place, p)


def scores_of(block: Block, kv_tile: Index, multiply: Callable[[Ref], tuple[Fragment, ...]]) -> tuple[Fragment, ...]:
    """What `multiply` makes of a tile of keys, which is on its way; starts to load the one before it, or its values."""
    copies.sync(block.team)
    k = block.tile("k", kv_tile)

    def load_next(*names: str) -> None:
        @pl.when(kv_tile > block.needed.start)
        def load() -> None:
            for name in names:
                block.load(name, kv_tile - 1)

    if block.schedule.num_stages > 1:
        load_next("k", "v")
        return multiply(k)
    block.load("v", kv_tile)
    scores = multiply(k)
    copies.sync(block.team)
    load_next("k")
    return scores


def step(block: Block, kv_tile: Index, states: States, masked: bool) -> States:
    """Adds a tile of keys, which is on its way, and starts to load the one before it."""
    s, first = block.schedule, kv_tile * block.schedule.block_kv
    meets = [block.meets(i, kv_tile) for i in range(s.row_tiles)] if masked and s.row_tiles > 1 else None
    scores = scores_of(block, kv_tile, functools.partial(products, block, meets))
    new, weights = [], []
    for i, (state, x) in enumerate(zip(states, scores, strict=True)):
        state, p = weights_of(block, i, first, state, x, masked)
        new.append(state)
        weights.append(p)
    return add_values(block.tile("v", kv_tile), meets, new, weights)


def peeled_step(block: Block, kv_tile: Index, states: States, meets: tuple[Meets, ...]) -> States:
    """`step`, where it is known how each 64 rows meet the tile: those that do not are left out."""
    first, own = kv_tile * block.schedule.block_kv, met_rows(meets)
    q = block.smem["q"].at[:, pl.ds(own.start * ROWS, (own.stop - own.start) * ROWS)]
    multiply = lambda k: mma.multiply_transposed(q if block.held is None else block.held[own], k, block.spec.d)
    found = [weights_of(block, i, first, states[i], x, meets[i] is Meets.PARTLY)
             for i, x in zip(range(own.start, own.stop), scores_of(block, kv_tile, multiply), strict=True)]
    new = add_values(block.tile("v", kv_tile), None, [state for state, _ in found], [p for _, p in found])
    return *states[:own.start], *new, *states[own.stop:]


def walk(block: Block) -> States:
    """Runs over all key tiles, from the last to the first: those that need the mask, those that do not, and again those
    that do.
    """
    first, full_first, full_stop, stop = block.needed
    states = (start(score_unit(block.spec), block.spec.d_v),) * block.schedule.row_tiles
    partial = work.forward_work(block.spec, block.schedule).partial
    parts = ((full_stop, stop, True), (full_first, full_stop, False), (first, full_first, True))
    peeled = work.last_tiles(block.spec, block.schedule)
    for i, meets in enumerate(peeled):
        states = peeled_step(block, stop - 1 - i, states, meets)
    for lo, hi, masked in parts[bool(peeled):] if partial else ((first, stop, False),):
        def one(i: Index, states: States, hi: Index = hi, masked: bool = masked) -> States:
            return step(block, hi - 1 - i, states, masked)

        states = lax.fori_loop(jnp.int32(0), ptx.scalar(hi - lo), one, states)
    return states


def finish(block: Block, row_tile: int, sums: Sums, acc: Fragment) -> None:
    """Writes out = acc / l_i, with the factor of dropout, and the statistics of 64 rows to global memory."""
    spec, first = block.spec, block.first + row_tile * ROWS
    m_i, rounding, l_i = sums
    row = 2 * (block.batch * spec.q_heads + block.head)
    for i, x in enumerate(softmax.statistics(m_i, l_i, unit(spec), rounding)):
        registers.store_row_stats(x, block.gmem["stats"], row + i, first, spec.q_len)
    inverse = softmax.rescale(l_i)
    if spec.dropout_rate:
        inverse = inverse * dropout.factor(spec)
    out = (acc * registers.spread(inverse, acc.shape[1])).astype(spec.result_dtype)
    if block.schedule.out_in_rows:  # the warp has read its queries for the last time, and no other one reads them
        for chunk in range(tiles.cdiv(spec.d_v, CHUNK)):
            mma.store_rows(out[:, CHUNK * chunk:CHUNK * (chunk + 1)], block.smem["q"], row_tile * ROWS, chunk)
        index = block.batch, block.head, first
        copies.store_own_rows(spec, block.smem["q"], row_tile * ROWS, block.gmem["out"], index)
        return
    axis, index = (1, (block.batch, first, block.head)) if spec.layout == "BLHD" else (2, (block.batch, block.head,
                                                                                           first))
    registers.store_rows(out, block.gmem["out"], index, axis)


def compute(block: Block) -> None:
    """Runs a block."""
    spec = block.spec
    copies.load_tile(block.team, spec, block.gmem["q"], (block.batch, block.head, block.first), block.smem["q"])
    for name in "kv" if block.schedule.num_stages > 1 else "k":
        block.load(name, jnp.maximum(block.needed.stop - 1, 0))
    if block.schedule.held:
        copies.sync(block.team)
        block = block._replace(held=tuple(mma.load_rows(block.smem["q"], i * ROWS, 0)
                                          for i in range(block.schedule.row_tiles)))
    for i, state in enumerate(walk(block)):
        finish(block, i, *repaired(block, i, state))


def mask_of(spec: AttentionSpec, schedule: ForwardSchedule, gmem: dict[str, Ref],
            index: tuple[Index, Index, Index]) -> tuple[HeadMask, tiles.TileRange[Index]]:
    """The mask of a block's head, and the key tiles that its queries need.

    Args:
      index: (batch, head, query tile).
    """
    batch, head, q_tile = index
    if spec.mask.has_arrays:
        mask = ArrayMask(gmem, batch, head)
        return mask, mask.tiles("key_tiles", q_tile)
    needed = work.kv_range(spec, schedule, q_tile)
    return StaticMask(work.mask_of(spec, schedule)), tiles.TileRange(*map(ptx.scalar, needed))


def launch(spec: AttentionSpec, schedule: ForwardSchedule) -> Launch:
    """The launch that makes out, in the layout of q, and the statistics of rows (`spec.stats_shape`), of q, k and v in
    the spec's layout, of dropout's keys, a score function's arrays, and of what `mask_arrays` and `mosaic.bias` make.
    """
    inputs = ("q", "k", "v", *dropout.input_types(spec), *score_function.input_types(spec),
              *mask_arrays.forward_names(spec, schedule), *bias.names(spec))
    outputs = {"out": jax.ShapeDtypeStruct(spec.out_shape, spec.result_dtype),
               "stats": jax.ShapeDtypeStruct(spec.stats_shape, jnp.float32)}
    blocks = work.forward_work(spec, schedule)

    def attention_forward(*refs: *KernelArguments) -> None:
        *arrays, smem, _ = refs
        pair, q_tile = blocks.head_and_tile(lax.axis_index("block"))
        batch, head = div(pair, spec.q_heads), rem(pair, spec.q_heads)
        gmem = dict(zip((*inputs, *outputs), arrays, strict=True))
        mask, needed = mask_of(spec, schedule, gmem, (batch, head, q_tile))
        first = q_tile * schedule.block_q
        compute(Block(spec, schedule, gmem, smem, Team(1, 0, None), batch, head, first, mask, needed))

    kernel = plgpu.kernel(
        attention_forward, out_type=tuple(outputs.values()),
        scratch_types=allocate(memory.forward_buffers(spec, schedule)), grid=(blocks.blocks,), grid_names=("block",),
        compiler_params=copies.COMPILER)
    return Launch(kernel, inputs, outputs)
