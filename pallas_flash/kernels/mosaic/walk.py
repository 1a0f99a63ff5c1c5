"""The walk of a block over the tiles that it meets, and its steps."""

from typing import NamedTuple

import jax.numpy as jnp

from pallas_flash.arrays import Array
from pallas_flash.kernels.mosaic.scheduling import rem
from pallas_flash.kernels.mosaic.types import Flag, Index

__all__ = ["Descending", "HeadAndTile", "Step", "Walk"]


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


class Descending(Walk):
    """A walk from the last tile to the first: at each tile all heads, before the next tile."""

    __slots__ = ()

    @property
    def first(self) -> HeadAndTile:
        return jnp.asarray(self.head, jnp.int32), jnp.asarray(self.stop - 1, jnp.int32)

    @property
    def last(self) -> HeadAndTile:
        """(head, tile) of the last step."""
        return jnp.asarray(self.head + self.heads - 1, jnp.int32), jnp.asarray(self.start, jnp.int32)

    def next(self, head: Array, tile: Array) -> HeadAndTile:
        if self.heads == 1:
            return head, tile - 1
        is_last = head + 1 == self.head + self.heads
        return jnp.where(is_last, self.head, head + 1), jnp.where(is_last, tile - 1, tile)

    def previous(self, head: Array, tile: Array) -> HeadAndTile:
        """(head, tile) of the step before this one, which is not the first."""
        if self.heads == 1:
            return head, tile + 1
        is_first = head == self.head
        return jnp.where(is_first, self.head + self.heads - 1, head - 1), jnp.where(is_first, tile + 1, tile)


class Step(NamedTuple):
    """One query tile of a walk, for one query head."""

    ordinal: Index  # how many steps came before it
    head: Array
    tile: Array

    def slot(self, slots: int) -> Index:
        """The slot that belongs to the step, in a ring of so many."""
        return rem(self.ordinal, slots)
