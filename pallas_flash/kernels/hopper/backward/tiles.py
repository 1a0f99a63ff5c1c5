"""What the roles of a backward kernel share: a block, its walk over tiles, its steps."""

from typing import NamedTuple

import jax.numpy as jnp

from pallas_flash.arrays import Array
from pallas_flash.kernels.hopper.head_mask import HeadMask
from pallas_flash.kernels.hopper.schedule import KvSchedule, SplitSchedule
from pallas_flash.kernels.mosaic.scheduling import rem
from pallas_flash.kernels.mosaic.types import Flag, Index, Ref
from pallas_flash.spec import AttentionSpec

__all__ = ["Block", "HeadAndTile", "KeyBlock", "Step", "Walk"]


type HeadAndTile = tuple[Array, Array]
"""Where a step of a walk is: at a query head, and a tile."""


class Walk(NamedTuple):
    """A block's steps: for each of `heads` query heads from `head` on, the tiles [start, stop) of the other axis."""

    head: Index
    heads: int
    start: Index
    full_start: Index  # tiles [full_start, full_stop) need no mask
    full_stop: Index
    stop: Index

    @property
    def steps(self) -> Index:
        """How many there are; not above 0 where stop <= start."""
        return self.heads * (self.stop - self.start)

    @property
    def first(self) -> HeadAndTile:
        """(head, tile) of the first step."""
        return jnp.asarray(self.head, jnp.int32), jnp.asarray(self.start, jnp.int32)

    def next(self, head: Array, tile: Array) -> HeadAndTile:
        """(head, tile) of the step after this one."""
        if self.heads == 1:
            return head, tile + 1
        last = tile + 1 == self.stop
        return jnp.where(last, head + 1, head), jnp.where(last, self.start, tile + 1)

    def skip(self, count: int, head: Array, tile: Array) -> HeadAndTile:
        """(head, tile) of `count` steps after this one."""
        for _ in range(count):
            head, tile = self.next(head, tile)
        return head, tile

    def partial(self, tile: Array) -> Flag:
        """True where a tile needs the mask."""
        return (tile < self.full_start) | (tile >= self.full_stop)


class Block[S](NamedTuple):
    """What the roles of one block share. It keeps one tile, of keys or (in `backward.dq`) of queries, and walks over
    tiles of the other axis.
    """

    spec: AttentionSpec
    schedule: S
    gmem: dict[str, Ref]  # arrays in global memory, by name
    smem: dict[str, Ref]  # buffers in shared memory
    bars: dict[str, Ref]  # barriers
    mask: HeadMask
    batch: Index
    head: Index  # of the tile that it keeps: a key head, or a query head
    tile: Index
    walk: Walk


type KeyBlock = Block[KvSchedule] | Block[SplitSchedule]
"""A block that keeps keys."""


class Step(NamedTuple):
    """One query tile of a walk, for one query head."""

    ordinal: Index  # how many steps came before it
    head: Array
    tile: Array

    def slot(self, slots: int) -> Index:
        """The slot that belongs to the step, in a ring of so many."""
        return rem(self.ordinal, slots)
