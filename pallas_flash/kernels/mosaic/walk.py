"""The walk of a block over the tiles that it meets, and its steps."""

from typing import NamedTuple

import jax.numpy as jnp

from pallas_flash.arrays import Array
from pallas_flash.kernels.mosaic.scheduling import rem
from pallas_flash.kernels.mosaic.types import Flag, Index

__all__ = ["HeadAndTile", "Step", "Walk"]


type HeadAndTile = tuple[Array, Array]
"""Where a step of a walk is: at a query head, and a tile."""


class Walk(NamedTuple):
    """A block's steps: for each of `heads` query heads from `head` on, the tiles [start, stop) of the other axis, or if
    `descending` from the last to the first.
    """

    head: Index
    heads: int
    start: Index
    full_start: Index  # tiles [full_start, full_stop) need no mask
    full_stop: Index
    stop: Index
    descending: bool = False

    @property
    def steps(self) -> Index:
        """How many there are; not above 0 where stop <= start."""
        return self.heads * (self.stop - self.start)

    @property
    def first(self) -> HeadAndTile:
        """(head, tile) of the first step."""
        tile = self.stop - 1 if self.descending else self.start
        return jnp.asarray(self.head, jnp.int32), jnp.asarray(tile, jnp.int32)

    @property
    def last(self) -> HeadAndTile:
        """(head, tile) of the last step."""
        tile = self.start if self.descending else self.stop - 1
        return jnp.asarray(self.head + self.heads - 1, jnp.int32), jnp.asarray(tile, jnp.int32)

    def next(self, head: Array, tile: Array) -> HeadAndTile:
        """(head, tile) of the step after this one."""
        by = -1 if self.descending else 1
        if self.heads == 1:
            return head, tile + by
        last, first = (tile == self.start, self.stop - 1) if self.descending else (tile + 1 == self.stop, self.start)
        return jnp.where(last, head + 1, head), jnp.where(last, first, tile + by)

    def previous(self, head: Array, tile: Array) -> HeadAndTile:
        """(head, tile) of the step before this one, which is not the first."""
        by = 1 if self.descending else -1
        if self.heads == 1:
            return head, tile + by
        is_first = tile == self.first[1]
        return jnp.where(is_first, head - 1, head), jnp.where(is_first, self.last[1], tile + by)

    def skip(self, count: int, head: Array, tile: Array) -> HeadAndTile:
        """(head, tile) of `count` steps after this one."""
        for _ in range(count):
            head, tile = self.next(head, tile)
        return head, tile

    def partial(self, tile: Array) -> Flag:
        """True where a tile needs the mask."""
        return (tile < self.full_start) | (tile >= self.full_stop)


class Step(NamedTuple):
    """One query tile of a walk, for one query head."""

    ordinal: Index  # how many steps came before it
    head: Array
    tile: Array

    def slot(self, slots: int) -> Index:
        """The slot that belongs to the step, in a ring of so many."""
        return rem(self.ordinal, slots)
