"""The forward pass of float32 inputs: the roles, rings and walks of `forward.kernel`, with products of parts.

    S = (Q' K'^T) a_i b_j, O = sum_j (p_ij 2^c_j) V'_j / l_i

Q', K' and V' are parts of rows, and a_i, b_j, 2^c_j their scales (`parts`, `split`). Sums are those of `products`, and
of many tiles those of `sums`.

A warpgroup waits for each product at once, while the other one's are multiplied: a step has 1,536 cycles of products
and about 1,400 of others, so two warpgroups keep the tensor cores busy. Barriers are those of `forward.kernel`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_flash import softmax
from pallas_flash.kernels.hopper import mask_arrays, memory, registers, tiles, work
from pallas_flash.kernels.hopper.float32 import products, sums
from pallas_flash.kernels.hopper.float32.parts import TOP
from pallas_flash.kernels.hopper.float32.softmax import Softmax, Values, begin, natural, weigh
from pallas_flash.kernels.hopper.float32.split import split
from pallas_flash.kernels.hopper.float32.sums import Place
from pallas_flash.kernels.hopper.forward.kernel import skip
from pallas_flash.kernels.hopper.forward.load import load, walk
from pallas_flash.kernels.hopper.forward.tiles import Block, Rows, Tile, rows_of
from pallas_flash.kernels.hopper.memory import in_parts
from pallas_flash.kernels.hopper.registers import Fragment, PerRow
from pallas_flash.kernels.hopper.schedule import ForwardSchedule
from pallas_flash.kernels.hopper.scratch import allocate
from pallas_flash.kernels.mosaic import ptx
from pallas_flash.kernels.mosaic.launch import Launch
from pallas_flash.kernels.mosaic.scheduling import div, rem
from pallas_flash.kernels.mosaic.scores import scaled, score_unit
from pallas_flash.kernels.mosaic.types import Index, KernelArguments
from pallas_flash.spec import AttentionSpec

__all__ = ["launch"]


class Sum(NamedTuple):
    """O: acc, and kept times the rows of out (`sums`)."""

    acc: Fragment  # (64, columns) in the layout TILE
    kept: PerRow  # 0 as long as nothing is stored


class Here(NamedTuple):
    """A warpgroup's rows of a tile."""

    block: Block  # of the problem `in_parts`
    tile: Tile
    rows: Rows
    scale: PerRow  # a_i
    columns: int  # of out

    @property
    def place(self) -> Place:
        """Where out lies."""
        index = self.tile.batch, self.tile.head, self.rows.first, 0
        return Place(self.block.spec, self.block.gmem["out"], index, self.columns)

    def slot(self, kv_tile: Index) -> Index:
        """The slot of the rings that holds a key tile."""
        return self.tile.slot(kv_tile, self.block.schedule.num_stages)

    def of_keys(self, name: str, row: int, kv_tile: Index) -> registers.PerColumn:
        """A row of the scales of a tile of keys, or of values."""
        block = self.block
        index, first = (self.tile.batch, div(self.tile.head, block.spec.group), row), kv_tile * block.schedule.block_kv
        return registers.load_row(block.gmem[f"{name}_scales"], index, first, block.schedule.block_kv)


def scores(here: Here, kv_tile: Index) -> Fragment:
    """Q' K'^T of a key tile, for which it waits."""
    block, slot = here.block, here.slot(kv_tile)
    plgpu.barrier_wait(block.bars["k_full"].at[slot])
    return products.multiply_transposed(here.rows.q(), block.smem["k"].at[slot])


def softmax_of(here: Here, kv_tile: Index, s: Fragment, state: Softmax) -> tuple[Softmax, Fragment]:
    """The state after a key tile, and its weights, from products of parts, which it frees."""
    block, rows, spec = here.block, here.rows, here.block.spec
    plgpu.barrier_arrive(block.bars["k_free"].at[here.slot(kv_tile)])
    of_keys = registers.stack(here.of_keys("k", 0, kv_tile) + here.of_keys("v", 2, kv_tile))
    s = s * registers.spread(here.scale, s.shape[1]) * of_keys
    s = scaled(spec, s)
    seen = work.steps(spec, block.schedule)
    if seen.first_masked or seen.later_masked:
        partial = (kv_tile < rows.full_start) | (kv_tile >= rows.full_stop)
        hide = lambda s: here.tile.mask.hide(s, (rows.first, kv_tile * block.schedule.block_kv), 1)
        s = lax.cond(partial, hide, lambda s: s, s)
    return weigh(state, s, score_unit(spec), Values(here.of_keys("v", 0, kv_tile), here.of_keys("v", 1, kv_tile)))


def next_step(here: Here, step: Index, state: Softmax, total: Sum) -> tuple[Softmax, Sum]:
    """Adds P V' of a step's key tile."""
    kv_tile = here.rows.stop - 1 - step
    block, slot = here.block, here.slot(kv_tile)
    state, p = softmax_of(here, kv_tile, scores(here, kv_tile), state)
    hi, lo = split(p * 2.0**TOP)
    plgpu.barrier_wait(block.bars["v_full"].at[slot])
    acc = products.add(total.acc, state.alpha, (hi, lo), block.smem["v"].at[slot])
    plgpu.barrier_arrive(block.bars["v_free"].at[slot])
    total = Sum(acc, total.kept * state.alpha)
    return state, lax.cond(sums.is_full(step), lambda total: stored(here, total), lambda total: total, total)


def whole(here: Here, total: Sum) -> Fragment:
    """O, (64, columns of out)."""
    return total.acc + here.place.stored(total.kept)


def stored(here: Here, total: Sum) -> Sum:
    """Moves a sum to the rows of out, so that what is in registers is zero."""
    here.place.store(whole(here, total))
    return Sum(sums.zeros(here.columns), registers.row_zeros() + 1)


def finish(here: Here, state: Softmax, total: Sum) -> None:
    """Writes out = O / l_i and the statistics to global memory."""
    block, tile, rows = here.block, here.tile, here.rows
    l_i, statistics = natural(state, score_unit(block.spec))
    head = tile.batch * block.spec.q_heads + tile.head
    for i, x in enumerate(statistics):
        registers.store_row_stats(x, block.gmem["stats"], 2 * head + i, rows.first, block.spec.q_len)
    inverse = softmax.rescale(l_i)
    inverse = inverse * (2 - l_i * inverse)  # the quotient is approximate
    out = whole(here, total) * 2.0**(-2 * TOP) * registers.spread(inverse, here.columns)
    here.place.store(out)


def compute_tile(block: Block, warpgroup: Index, columns: int, tile: Tile) -> None:
    """Computes a warpgroup's rows of a tile."""
    rows, seen = rows_of(block, tile, warpgroup), work.steps(block.spec, block.schedule)
    scales, head = block.gmem["q_scales"], tile.batch * block.spec.q_heads + tile.head
    here = Here(block, tile, rows, registers.load_row_stats(scales, head, rows.first, scales.shape[3], 0.0), columns)
    buffer = rem(tile.ordinal, block.schedule.query_buffers)
    plgpu.barrier_wait(block.bars["q_full"].at[buffer])
    if seen.skips_above:
        skip(block, tile, warpgroup, tile.hi - 1, rows.stop - 1)

    def step(i: Index, carry: tuple[Softmax, Sum]) -> tuple[Softmax, Sum]:
        return next_step(here, i, *carry)

    start = begin(), Sum(sums.zeros(columns), registers.row_zeros())
    state, total = lax.fori_loop(jnp.int32(0), ptx.scalar(rows.stop - rows.start), step, start)
    if seen.skips_below:
        skip(block, tile, warpgroup, rows.start - 1, tile.lo - 1)
    plgpu.barrier_arrive(block.bars["q_free"].at[buffer])
    finish(here, state, total)


def launch(spec: AttentionSpec, schedule: ForwardSchedule) -> Launch:
    """The launch that makes out, in the layout of q, and the statistics of rows, of parts and scales (`split`), and of
    what the mask needs: `work.forward_table`, or arrays of `mask_arrays`, of which it updates "key_tiles".
    """
    wide, arrays = in_parts(spec), mask_arrays.names(spec.mask, of_keys=True)
    names = ("q", "k", "v", "q_scales", "k_scales", "v_scales", *(arrays or ["table"]))
    inputs = tuple(f"{name}_parts" if name in ("q", "k", "v") else name for name in names)
    outputs = {"out": jax.ShapeDtypeStruct(spec.out_shape, jnp.float32),
               "stats": jax.ShapeDtypeStruct(spec.stats_shape, jnp.float32)}

    def attention_forward_float32(*refs: *KernelArguments) -> None:
        *found, smem, bars = refs
        block = Block(wide, schedule, dict(zip((*names, *outputs), found, strict=True)), smem, bars)
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup < schedule.warpgroups)
        def _() -> None:
            plgpu.set_max_registers(schedule.registers[0], action="increase")
            walk(block, lambda tile: compute_tile(block, warpgroup, spec.d_v, tile), lambda: None, warpgroup)

        @pl.when(warpgroup == schedule.warpgroups)
        def _() -> None:
            load(block)

    kernel = plgpu.kernel(
        attention_forward_float32, out_type=tuple(outputs.values()),
        scratch_types=allocate(memory.forward_memory(wide, schedule)),
        grid=(work.forward_blocks(wide, schedule),), grid_names=("block",),
        num_threads=schedule.warpgroups + 1, thread_name="warpgroup", compiler_params=tiles.COMPILER)
    return Launch(kernel, inputs, outputs, ("key_tiles",) * bool(arrays))
