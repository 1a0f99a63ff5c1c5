"""Which key tiles a block walks: equal runs of one list of all key tiles, found inside the kernel from the lengths.

The list holds, for each sequence and each key head in it, the key tiles that its queries need, first to last; at least
one each, so that every output is written. Worker w of `workers`, a compute warpgroup, takes the tiles from start(w) to
start(w + 1), whole numbers next to each other: no worker has more than one tile more than another, whatever the lengths
are. So a head may begin in one worker and go on in those after it. What a worker has of a head is a segment; a head of
several segments is combined from partial results (`decode.combine`). Each worker has at most two of these: one of a
head that began before it, and one of a head that goes on after it.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from pallas_flash import masks, tiles
from pallas_flash.arithmetic import Positions
from pallas_flash.arrays import Array
from pallas_flash.filled import filled_part, within
from pallas_flash.kernels.mosaic import lanes
from pallas_flash.kernels.mosaic.scheduling import div
from pallas_flash.kernels.mosaic.types import Flag, Index, Ref
from pallas_flash.spec import AttentionSpec

__all__ = ["Head", "Segment", "Sequence", "Sharing", "blocks", "fields", "for_each_segment",
           "for_own_part", "workers"]


class Sharing(Protocol):
    """What is asked of the schedule of a kernel: how the list is cut, and among how many."""

    @property
    def block_kv(self) -> int:
        """Keys of a tile."""

    @property
    def num_blocks(self) -> int:
        """Blocks of the grid at most."""

    @property
    def workers(self) -> int:
        """Compute warpgroups of a block."""


def blocks(spec: AttentionSpec, s: Sharing) -> int:
    """The blocks of the grid: no more than there are key tiles."""
    return min(s.num_blocks, spec.batch * spec.kv_heads * tiles.cdiv(spec.kv_len, s.block_kv))


def workers(spec: AttentionSpec, s: Sharing) -> int:
    """The compute warpgroups of all blocks. Those of one number in their blocks come before those of the next: few
    tiles have an SM each.
    """
    return s.workers * blocks(spec, s)


class Sequence(NamedTuple):
    """A sequence of the batch: its mask, with its own length, and the key tiles that its queries need."""

    mask: masks.Mask
    length: Array  # as it was given: above the capacity if keys are lost
    keys: tuple[Positions, Positions]  # [lo, hi): no query attends to a key outside
    tiles: tiles.TileRange[Array]  # at least one

    @property
    def num_tiles(self) -> Array:
        """How many key tiles there are."""
        return self.tiles.stop - self.tiles.start


def fields(spec: AttentionSpec) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of the mask, (batch or 1, 1) int32 each, by the names under which the kernel has them."""
    found = enumerate(jax.tree.leaves(spec.mask))
    return {f"field{i}": jax.ShapeDtypeStruct(field.shape, field.dtype) for i, field in found}


def sequence(spec: AttentionSpec, s: Sharing, gmem: dict[str, Ref], batch: Index) -> Sequence:
    """The sequence of a batch entry, whose mask is that of the spec with this entry's numbers."""
    numbers = [gmem[name][batch if field.shape[0] > 1 else 0, 0] for name, field in fields(spec).items()]
    mask: masks.Mask = jax.tree.unflatten(jax.tree.structure(spec.mask), numbers)
    part = filled_part(mask)
    assert part is not None
    mask = within(mask, spec.kv_len)
    count = tiles.cdiv(spec.kv_len, s.block_kv)
    bounds = mask.kv_bounds(0, spec.q_len)
    needed = tiles.tile_range(bounds, s.block_kv, count)
    start = jnp.minimum(needed.start, count - 1)
    needed = needed._replace(start=start, stop=jnp.maximum(needed.stop, start + 1))
    return Sequence(mask, part.lengths, (bounds.lo, bounds.hi),
                    tiles.TileRange(*(jnp.asarray(x, jnp.int32) for x in needed)))


class Head(NamedTuple):
    """A key head of a sequence."""

    batch: Index
    kv_head: Index


class Segment(NamedTuple):
    """What one worker has of one head of keys."""

    head: Head
    sequence: Sequence
    first: Index  # key tile
    num_tiles: Index
    step: Index  # how many steps of the rings came before it
    number: Index  # how many segments came before it
    part: Array  # its number among the segments of its head
    parts: Array  # how many segments its head has
    owner: Index  # the worker of the first of them

    def slot(self, part: Index) -> Array:
        """Where the partial result of a segment of this head lies: each worker has two places, for a head that began
        before it and for one that goes on after it.
        """
        return jnp.where(part == 0, 2 * self.owner + 1, 2 * (self.owner + part))

    @property
    def is_whole(self) -> Flag:
        """Whether it is all of its head."""
        whole: Flag = self.parts == 1
        return whole


class _Shares(NamedTuple):
    """How `total` tiles are shared out: the first `more` workers have one more than `each`."""

    each: Array
    more: Array

    def start(self, worker: Index) -> Array:
        """The first tile of a worker."""
        return worker * self.each + jnp.minimum(worker, self.more)

    def owner(self, tile: Index) -> Array:
        """The worker that has a tile."""
        longer = self.more * (self.each + 1)
        later = self.more + lax.div(tile - longer, jnp.maximum(self.each, 1))
        return jnp.where(tile < longer, lax.div(tile, self.each + 1), later)


class _Walk(NamedTuple):
    """Where a worker is: at a tile of the list, in a group of 32 sequences."""

    tile: Array
    group: Array  # its first sequence
    base: Array  # its first tile
    step: Array
    segments: Array


class _List(NamedTuple):
    """The list of all key tiles: how many each sequence has, for all of its heads. A warp looks at 32 at a time."""

    batch: int
    tiles_of: Callable[[Array], Array]  # a sequence

    def of_group(self, first: Array) -> Array:
        """The tiles of a group of sequences."""
        return lanes.total(self.tiles_of, first, self.batch)

    def total(self) -> Array:
        """The tiles of all sequences."""
        groups = jnp.int32(tiles.cdiv(self.batch, lanes.LANES))
        return lax.fori_loop(jnp.int32(0), groups, lambda i, n: n + self.of_group(i * lanes.LANES), jnp.int32(0))

    def passed(self, at: _Walk) -> _Walk:
        """The same tile in its own group."""
        if self.batch <= lanes.LANES:
            return at
        group, base, _ = lax.while_loop(
            lambda x: at.tile >= x[2],
            lambda x: (x[0] + lanes.LANES, x[2], x[2] + self.of_group(x[0] + lanes.LANES)),
            (at.group, at.base, at.base + self.of_group(at.group)))
        return at._replace(group=group, base=base)

    def sequence_at(self, at: _Walk) -> tuple[Array, Array]:
        """The sequence of a tile in its own group, and that sequence's first tile."""
        if self.batch == 1:
            return jnp.int32(0), jnp.int32(0)
        found, before = lanes.find(self.tiles_of, at.group, self.batch, at.tile - at.base)
        return found, at.base + before


def for_each_segment(spec: AttentionSpec, s: Sharing, gmem: dict[str, Ref], own: int,
                     body: Callable[[Segment], None]) -> tuple[Array, Array]:
    """Runs `body` on every segment of worker number `own` of this block; returns how many steps and how many segments
    there were.
    """
    of, count, zero = functools.partial(sequence, spec, s, gmem), workers(spec, s), jnp.int32(0)
    every = _List(spec.batch, lambda batch: of(batch).num_tiles * spec.kv_heads)
    total = every.total()
    shares = _Shares(div(total, count), lax.rem(total, jnp.int32(count)))
    worker = own * blocks(spec, s) + lax.axis_index("block")
    stop = shares.start(worker + 1)

    def one(at: _Walk) -> _Walk:
        at = every.passed(at)
        batch, base = every.sequence_at(at)
        found = of(batch)
        kv_head, offset = (f(at.tile - base, found.num_tiles) for f in (lax.div, lax.rem))
        taken = jnp.minimum(found.num_tiles - offset, stop - at.tile)
        first = base + kv_head * found.num_tiles
        owner, last = shares.owner(first), shares.owner(first + found.num_tiles - 1)
        body(Segment(Head(batch, kv_head), found, found.tiles.start + offset, taken, at.step, at.segments,
                     worker - owner, last - owner + 1, owner))
        return at._replace(tile=at.tile + taken, step=at.step + taken, segments=at.segments + 1)

    end = lax.while_loop(lambda at: at.tile < stop, one, _Walk(shares.start(worker), zero, zero, zero, zero))
    return end.step, end.segments


def for_own_part(spec: AttentionSpec, s: Sharing, gmem: dict[str, Ref], cluster: tuple[str, int],
                 body: Callable[[Segment], None]) -> tuple[Array, Array]:
    """`for_each_segment` where each cluster of blocks has a head: blocks have equal runs of its tiles, perhaps none.

    Args:
      cluster: the name of the axis along which the blocks of a cluster lie, and how many there are.
    """
    axis, count = cluster
    head, part = lax.axis_index("block"), lax.axis_index(axis)
    batch, kv_head = (f(head, jnp.int32(spec.kv_heads)) for f in (lax.div, lax.rem))
    found = sequence(spec, s, gmem, batch)
    first, stop = (lax.div(found.num_tiles * i, jnp.int32(count)) for i in (part, part + 1))
    body(Segment(Head(batch, kv_head), found, found.tiles.start + first, stop - first, jnp.int32(0), jnp.int32(0),
                 part, jnp.int32(count), head * count))
    return stop - first, jnp.int32(1)
