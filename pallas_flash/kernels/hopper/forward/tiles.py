"""What the roles of the forward kernel share: a block's references, the tiles it works on, and a warpgroup's rows.

A block's tiles are those in its row of the table, or, where the mask holds arrays, those that it takes
(`forward.counter`). Where the schedule has `maxima`, the block walks through its row a second time, and stops at the
tiles that some warpgroup gave up (`forward.softmax`): in those, every step takes the maximum. `given_up`, (blocks,
warpgroups, columns) int32 in global memory, says for each column of the table whether its tile was given up; its last
column says whether any was.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_flash.arrays import Array, Float
from pallas_flash.kernels.hopper import work
from pallas_flash.kernels.hopper.forward.softmax import Earlier
from pallas_flash.kernels.hopper.registers import Fragment
from pallas_flash.kernels.hopper.schedule import ROWS_PER_WARPGROUP, ForwardSchedule
from pallas_flash.kernels.mosaic import ptx
from pallas_flash.kernels.mosaic.head_mask import ArrayMask, HeadMask, StaticMask
from pallas_flash.kernels.mosaic.scheduling import div, rem
from pallas_flash.kernels.mosaic.types import Flag, Index, Ref
from pallas_flash.spec import AttentionSpec
from pallas_flash.tiles import TileRange

__all__ = ["Block", "Rows", "Tile", "for_each_tile", "rows_of"]


class Block(NamedTuple):
    """What the roles of one block share: the problem, and references to global and shared memory."""

    spec: AttentionSpec
    schedule: ForwardSchedule
    gmem: dict[str, Ref]  # q, k, v, out, stats; table, or `mask_arrays`; given_up, with `maxima`
    smem: dict[str, Ref]  # memory.forward_memory
    bars: dict[str, Ref]  # the barriers
    begins: bool = False  # of launches that merge, the first: what is in the state counts as nothing

    @property
    def takes_tiles(self) -> bool:
        """Whether blocks take their tiles, instead of having them from a table."""
        return self.spec.mask.has_arrays

    @property
    def merges(self) -> bool:
        """Whether results are merged into those of other launches, in place (`forward.merge`)."""
        return "places" in self.gmem

    @property
    def all_rows_are_real(self) -> bool:
        """Whether tiles divide the queries."""
        return self.spec.q_len % self.schedule.block_q == 0

    @property
    def any_given_up(self) -> int:
        """The column of `given_up` that says whether any tile was."""
        return self.gmem["given_up"].shape[2] - 1

    def mask_of(self, batch: Index, head: Index) -> HeadMask:
        """The mask of a batch entry and head."""
        if self.spec.mask.has_arrays:
            return ArrayMask(self.gmem, batch, head)
        return StaticMask(work.worst_case(self.spec, self.schedule))


class Tile(NamedTuple):
    """A query tile that a block works on."""

    batch: Index
    head: Index
    q_tile: Index
    lo: Index  # key tiles [lo, hi)
    hi: Index
    ordinal: Index  # how many tiles came before it in this block
    step: Index  # how many steps of the rings came before it
    mask: HeadMask
    column: Index = 0  # of this block's row of the table
    is_redone: Index = 0  # 1 if it was given up before, else 0
    needed: TileRange[Index] | None = None  # by this warpgroup's rows, where that was announced

    def slot(self, kv_tile: Index, num_stages: int) -> Index:
        """The slot of the rings that holds a key tile."""
        return rem(self.step + (self.hi - 1 - kv_tile), num_stages)


def for_each_tile(block: Block, body: Callable[[Tile], None], gather: Callable[[], None]) -> tuple[Index, Index]:
    """Runs `body` on every tile in this block's row of the table, and once more on those that were given up; returns
    how many tiles and steps there were.

    Args:
      gather: waits until every compute warpgroup has reached the end of the row.
    """
    row, table, q_tiles = lax.axis_index("block"), block.gmem["table"], work.q_tiles(block.spec, block.schedule)
    worst_case = work.worst_case(block.spec, block.schedule)

    def one(carry: tuple[Array, Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array, Array]:
        number, column, is_redone, ordinal, step = carry
        following = table[row, column + 1]  # loaded early, as it comes from global memory
        pair, q_tile = div(number, q_tiles), rem(number, q_tiles)
        lo, hi = work.loaded_tiles(worst_case, block.spec, block.schedule, q_tile)
        batch, head = div(pair, block.spec.q_heads), rem(pair, block.spec.q_heads)
        mask = block.mask_of(batch, head)
        body(Tile(batch, head, q_tile, lo, hi, ordinal, step, mask, column, is_redone))
        at = following, column + 1, is_redone
        if block.schedule.maxima:
            at = lax.cond((following < 0) | (is_redone != 0), functools.partial(given_up_from, block, gather),
                          lambda *at: at, *at)
        # Opaque: where all tiles have as many steps, LLVM would work out a slot from the step within the tile, and the
        # descriptors of wgmma would leave the uniform registers.
        return *at, ordinal + 1, ptx.opaque(step + (hi - lo))

    none = jnp.int32(0)
    *_, count, steps = lax.while_loop(lambda carry: carry[0] >= 0, one, (table[row, 0], *(none,) * 4))
    return count, steps


def given_up_from(block: Block, gather: Callable[[], None], number: Array, column: Array,
                  is_redone: Array) -> tuple[Array, Array, Array]:
    """Finds the first tile from a column on (from the start, if `is_redone` is 0) that was given up.

    Returns:
      Its number, negative if there is none; its column; 1.
    """
    row, table, given_up = lax.axis_index("block"), block.gmem["table"], block.gmem["given_up"]

    def is_given_up(column: Index) -> Flag:
        flags = [given_up[row, warpgroup, column] for warpgroup in range(block.schedule.warpgroups)]
        return functools.reduce(jnp.maximum, flags) != 0

    def start() -> tuple[Array, Array]:
        gather()
        any_given_up = is_given_up(block.any_given_up)
        return jnp.where(any_given_up, table[row, 0], -1), jnp.int32(0)

    at = lax.cond(is_redone == 0, start, lambda: (number, column))
    number, column = lax.while_loop(lambda at: (at[0] >= 0) & jnp.logical_not(is_given_up(at[1])),
                                   lambda at: (table[row, at[1] + 1], at[1] + 1), at)
    return number, column, jnp.int32(1)


class Rows(NamedTuple):
    """The 64 rows of one warpgroup in a tile."""

    warpgroup: Index
    first: Index  # position of the first row
    start: Index  # key tiles [start, stop), of which [full_start, full_stop) need no mask
    full_start: Index
    full_stop: Index
    stop: Index
    slack: float | Float[Array, ""]  # by how much m_i may stay below the maximum, base 2
    q: Callable[[], Ref]  # the rows of the query buffer, (chunks, 64, 64)
    earlier: Earlier | None = None  # what a launch that merges goes on from
    held: Fragment | None = None  # (64, d) of the input's type, where the query is kept in registers

    @property
    def queries(self) -> Fragment | Ref:
        """The rows' queries, in registers or in shared memory."""
        return self.q() if self.held is None else self.held


def rows_of(block: Block, tile: Tile, warpgroup: Index) -> Rows:
    """The rows of a warpgroup in a tile."""
    buffer = rem(tile.ordinal, block.schedule.query_buffers)

    def q() -> Ref:
        index = ptx.opaque(warpgroup) if block.schedule.opaque else warpgroup
        return block.smem["q"].at[buffer, :, pl.ds(index * ROWS_PER_WARPGROUP, ROWS_PER_WARPGROUP)]

    s = block.schedule
    needed: TileRange[Index] = (
        work.row_tiles(work.worst_case(block.spec, s), block.spec, s, tile.q_tile, warpgroup)
        if tile.needed is None else tile.needed)
    slack: float | Float[Array, ""] = s.slack
    if block.spec.kv_len > s.long_keys:
        is_long = needed.stop - needed.start > s.long_keys // s.block_kv
        slack = jnp.where(is_long, jnp.float32(s.long_slack), jnp.float32(s.slack))
    return Rows(warpgroup, tile.q_tile * s.block_q + warpgroup * ROWS_PER_WARPGROUP, *needed, slack, q)
