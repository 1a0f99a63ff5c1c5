"""Which block works on which tiles, planned on the host: sections of heads, longest tiles first; and index arithmetic.

Two ways to share out the tiles of all heads. A kernel with one block for each SM reads its tiles from a table
(`table`). A kernel with one block for each tile finds it from the block's number (`Work`); the GPU starts blocks in the
order of their numbers. Either way, heads come in sections, so that what the blocks of a section read stays in L2.

No Mosaic in here: tables are made on any machine.
"""

import heapq
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_flash import tiles
from pallas_flash.arithmetic import Positions
from pallas_flash.arrays import Array
from pallas_flash.kernels.mosaic.types import Index

__all__ = ["Work", "div", "in_sections", "makespan", "rem", "table", "work"]

_BLOCKS_MODELLED = 20_000  # of a large grid, the first
_LARGEST_GREEDY_TABLE = 200_000  # tiles


def div(a: Positions, b: int) -> Array:
    """Returns a // b for a >= 0, in int32 whatever JAX's 64-bit mode."""
    return lax.div(jnp.asarray(a, jnp.int32), jnp.int32(b))


def rem(a: Positions, b: int) -> Array:
    """Returns a % b for a >= 0, in int32 whatever JAX's 64-bit mode."""
    return lax.rem(jnp.asarray(a, jnp.int32), jnp.int32(b))


# -- one block for each SM ---------------------------------------------------------------------------------------------

def in_sections(heads: int, section: int, tile_order: np.ndarray) -> np.ndarray:
    """Returns flat tile numbers, head * tiles + tile, section by section; in a section of so many heads, the tiles come
    in `tile_order`, and each tile's heads follow each other.
    """
    every_head = np.arange(heads, dtype=np.int64)
    return np.concatenate([(every_head[None, i:i + section] * tile_order.size + tile_order[:, None]).ravel()
                           for i in range(0, heads, section)])


def table(order: np.ndarray, costs: np.ndarray, blocks: int) -> np.ndarray:
    """Deals tiles to at most so many blocks: each tile to the block that is free first.

    Args:
      order: flat tile numbers, in the order in which they are dealt.
      costs: of these tiles, in any unit.

    Returns:
      (blocks, slots) int32: each block's tile numbers, -1 after the last. The last column is -1.
    """
    blocks = min(blocks, order.size)
    few = order.size <= _LARGEST_GREEDY_TABLE
    owner = _greedy(costs, blocks) if few else _snake(order.size, blocks)
    counts = np.bincount(owner, minlength=blocks)
    dealt = np.full((blocks, counts.max() + 1), -1, np.int32)
    by_owner = np.argsort(owner, kind="stable")
    slot = np.arange(order.size) - np.repeat(np.cumsum(counts) - counts, counts)
    dealt[owner[by_owner], slot] = order[by_owner]
    return dealt


def _greedy(costs: np.ndarray, blocks: int) -> np.ndarray:
    """Returns the block of each tile, if each tile in turn goes to the block with the least work so far."""
    loads = [(0.0, block) for block in range(blocks)]
    owner = np.empty(costs.size, np.int64)
    for i, cost in enumerate(costs.tolist()):
        load, block = loads[0]
        owner[i] = block
        heapq.heapreplace(loads, (load + cost, block))
    return owner


def _snake(count: int, blocks: int) -> np.ndarray:
    """Returns the block of each tile, if they are dealt to blocks 0, 1, 2, ... and back, again and again."""
    row, column = np.divmod(np.arange(count), blocks)
    return np.where(row % 2, blocks - 1 - column, column)


# -- one block for each tile -------------------------------------------------------------------------------------------

class Work(NamedTuple):
    """A kernel's blocks: one for each tile of its axis and each head, in sections of heads.

    The last blocks of a section have its first `ascending` tiles, in ascending order; the blocks before them have the
    others, in descending order. Where the longest tiles are to come first, that is all or none of the tiles. The order
    is the same for all heads, because where blocks add to an array in order, it is the order of additions.
    """

    heads: int  # (batch, head) pairs
    tiles: int  # of the axis that stays
    section: int  # heads of a section; divides `heads`
    ascending: int  # tiles
    empty: bool  # some tile needs no tile of the other axis
    partial: bool  # some tile of the other axis needs the mask

    @property
    def blocks(self) -> int:
        return self.heads * self.tiles

    def head_and_tile(self, block: Index) -> tuple[Array, Array]:
        """Returns the (batch, head) pair and the tile of a block."""
        size = self.section * self.tiles
        rest = rem(block, size)
        tile, head = div(rest, self.section), div(block, size) * self.section + rem(rest, self.section)
        descending = self.tiles - self.ascending
        return head, jnp.where(tile < descending, self.tiles - 1 - tile, tile - descending)


def work(heads: int, ranges: tiles.TileRange[np.ndarray], section: int, num_sms: int) -> Work:
    """Returns the blocks of a kernel, the longest first.

    Args:
      ranges: arrays, one element for each tile of the axis that stays: the tiles of the other axis that it needs.
      section: heads whose data stay in L2 together. A section has more of them where its blocks would be fewer than the
        SMs: the longest tiles of the next section would wait for the shortest ones of this one.
    """
    start, full_start, full_stop, stop = ranges
    count = start.size
    wanted = max(1, section, num_sms // count)
    section = max(n for n in range(1, heads + 1) if heads % n == 0 and n <= wanted)
    length = stop - start
    ascending = count if length[0] >= length[-1] else 0
    return Work(heads, count, section, ascending, empty=bool(np.any(length <= 0)),
                partial=bool(np.any((start < full_start) | (full_stop < stop))))


def makespan(work: Work, costs: np.ndarray, num_sms: int) -> float:
    """Returns when the last block ends, in the unit of `costs`, if no block waits for another and each SM takes the
    next block when it is free. A large grid is taken to be as its first sections.

    Args:
      costs: (tiles,), of a block of each tile.
    """
    order = np.concatenate([np.arange(work.ascending, work.tiles)[::-1], np.arange(work.ascending)])
    sections = min(work.heads // work.section, math.ceil(_BLOCKS_MODELLED / (work.section * work.tiles)))
    modelled = np.tile(np.repeat(costs[order], work.section), sections)
    loads = np.bincount(_greedy(modelled, num_sms), weights=modelled)
    return float(loads.max()) * work.heads / (sections * work.section)
