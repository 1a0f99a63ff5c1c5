"""Which key tiles a block walks: equal runs of one list of all key tiles, found inside the kernel from the lengths.

The list holds, for each sequence and each key head in it, the key tiles that its queries need, first to last; at least
one each, so that every output is written. Block w of `blocks` takes the tiles from start(w) to start(w + 1), whole
numbers next to each other: no block has more than one tile more than another, whatever the lengths are. So a head may
begin in one block and go on in those after it. What a block has of a head is a segment; a head of several segments is
combined from partial results (`decode.combine`). Each block has at most two of these: one of a head that began before
it, and one of a head that goes on after it.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_flash import masks, tiles
from pallas_flash.arithmetic import Positions
from pallas_flash.arrays import Array
from pallas_flash.kernels.hopper.schedule import DecodeSchedule
from pallas_flash.kernels.mosaic.scheduling import div
from pallas_flash.kernels.mosaic.types import Flag, Index, Ref
from pallas_flash.spec import AttentionSpec

__all__ = ["Head", "Segment", "Sequence", "blocks", "fields", "for_each_segment", "rows"]


def rows(spec: AttentionSpec) -> int:
    """The queries of a key head: row = query * group + query head of the group."""
    return spec.q_len * spec.group


def blocks(spec: AttentionSpec, s: DecodeSchedule) -> int:
    """The blocks of the grid: one for each SM, and no more than there are key tiles."""
    return min(s.num_blocks, spec.batch * spec.kv_heads * tiles.cdiv(spec.kv_len, s.block_kv))


class Sequence(NamedTuple):
    """A sequence of the batch: its mask, with its own length, and the key tiles that its queries need."""

    mask: masks.Mask
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


def sequence(spec: AttentionSpec, s: DecodeSchedule, gmem: dict[str, Ref], batch: Index) -> Sequence:
    """The sequence of a batch entry, whose mask is that of the spec with this entry's numbers."""
    numbers = [gmem[name][batch if field.shape[0] > 1 else 0, 0] for name, field in fields(spec).items()]
    mask: masks.Mask = jax.tree.unflatten(jax.tree.structure(spec.mask), numbers)
    if spec.kv_len % s.block_kv:
        mask = mask & masks.InBounds(kv_len=spec.kv_len)  # a length may say more
    count = tiles.cdiv(spec.kv_len, s.block_kv)
    bounds = mask.kv_bounds(0, spec.q_len)
    needed = tiles.tile_range(bounds, s.block_kv, count)
    start = jnp.minimum(needed.start, count - 1)
    needed = needed._replace(start=start, stop=jnp.maximum(needed.stop, start + 1))
    return Sequence(mask, (bounds.lo, bounds.hi), tiles.TileRange(*(jnp.asarray(x, jnp.int32) for x in needed)))


class Head(NamedTuple):
    """A key head of a sequence."""

    batch: Index
    kv_head: Index


class Segment(NamedTuple):
    """What one block has of one head of keys."""

    head: Head
    sequence: Sequence
    first: Index  # key tile
    num_tiles: Index
    step: Index  # how many steps of the rings came before it
    part: Array  # its number among the segments of its head
    parts: Array  # how many segments its head has
    owner: Index  # the block of the first of them

    def slot(self, part: Index) -> Array:
        """Where the partial result of a segment of this head lies: each block has two places, for a head that began
        before it and for one that goes on after it.
        """
        return jnp.where(part == 0, 2 * self.owner + 1, 2 * (self.owner + part))

    @property
    def is_whole(self) -> Flag:
        """Whether it is all of its head."""
        whole: Flag = self.parts == 1
        return whole


class _Shares(NamedTuple):
    """How `total` tiles are shared out: the first `more` blocks have one more than `each`."""

    each: Array
    more: Array

    def start(self, block: Index) -> Array:
        """The first tile of a block."""
        return block * self.each + jnp.minimum(block, self.more)

    def owner(self, tile: Index) -> Array:
        """The block that has a tile."""
        longer = self.more * (self.each + 1)
        later = self.more + lax.div(tile - longer, jnp.maximum(self.each, 1))
        return jnp.where(tile < longer, lax.div(tile, self.each + 1), later)


class _Walk(NamedTuple):
    """Where a block is: at a tile of the list, in a sequence whose tiles begin at `base`."""

    tile: Array
    batch: Array
    base: Array
    step: Array


def for_each_segment(spec: AttentionSpec, s: DecodeSchedule, gmem: dict[str, Ref],
                     body: Callable[[Segment], None]) -> Array:
    """Runs `body` on every segment of this block; returns how many steps there were."""
    of, count = functools.partial(sequence, spec, s, gmem), blocks(spec, s)
    zero = jnp.int32(0)
    total = lax.fori_loop(zero, jnp.int32(spec.batch), lambda b, n: n + of(b).num_tiles, zero) * spec.kv_heads
    shares = _Shares(div(total, count), lax.rem(total, jnp.int32(count)))
    block = lax.axis_index("block")
    stop = shares.start(block + 1)

    def end(batch: Array, base: Array) -> Array:
        return base + of(batch).num_tiles * spec.kv_heads

    def one(at: _Walk) -> _Walk:
        batch, base, _ = lax.while_loop(
            lambda x: at.tile >= x[2], lambda x: (x[0] + 1, x[2], end(x[0] + 1, x[2])),
            (at.batch, at.base, end(at.batch, at.base)))
        found = of(batch)
        kv_head, offset = (f(at.tile - base, found.num_tiles) for f in (lax.div, lax.rem))
        taken = jnp.minimum(found.num_tiles - offset, stop - at.tile)
        first = base + kv_head * found.num_tiles
        owner, last = shares.owner(first), shares.owner(first + found.num_tiles - 1)
        body(Segment(Head(batch, kv_head), found, found.tiles.start + offset, taken, at.step, block - owner,
                     last - owner + 1, owner))
        return _Walk(at.tile + taken, batch, base, at.step + taken)

    start = _Walk(shares.start(block), zero, zero, zero)
    return lax.while_loop(lambda at: at.tile < stop, one, start).step
