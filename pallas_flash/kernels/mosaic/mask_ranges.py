"""Of a mask that holds arrays: ranges of tiles, and what kernels read of each position, made of its arrays by XLA.

A mask is an intersection of rules of three kinds. An interval rule (Window, InBounds, PrefixLM, packed sequences)
keeps for each query the keys of one interval, and for each key the queries of one; its bounds of a single position are
exact. `SegmentIds` keeps pairs of equal ids, in any order. `Dense` keeps any pairs: its booleans become bits
(`mask_bits`). `mask_rules` refuses all others. From all come tile ranges: for ids from the smallest and the largest one
of each tile, O(tiles^2), sound for ids in any order, tight where they do not decrease; for bits from the words of each
tile. What a range calls partial is looked at pair by pair, by interval, id and bit. Tiles without a pair are skipped at
both ends of a range, not within it; of full tiles the longest run goes unmasked.

Arrays, int32; their first two axes are (batch or 1, heads or 1), and lengths are padded to whole tiles:

    key_tiles    (.., .., tiles, 4)  a `TileRange` of key tiles for the queries of a tile
    query_tiles  (.., .., tiles, 4)  a `TileRange` of query tiles for a key tile; the heads are those of keys
    keys         (.., .., 2, q_len)  the first key that the interval rules keep for a query, and how many
    queries      (.., .., 2, kv_len) the same with queries and keys exchanged
    q_ids        (.., .., 1, q_len)  ids; those of padding are -1 on this side,
    kv_ids       (.., .., 1, kv_len) and -2 on this one, so that they equal nothing
    key_bits     (.., .., words or 1, q_len or 1)  bits of keys for each query
    query_bits   (.., .., words or 1, kv_len or 1) bits of queries for each key

No Mosaic in here: `head_mask` has what kernels do with them.
"""

import functools
import math
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pallas_flash import masks, tiles
from pallas_flash.arithmetic import Positions
from pallas_flash.arrays import Array, Int, Shaped
from pallas_flash.kernels.mosaic import mask_bits
from pallas_flash.spec import AttentionSpec

__all__ = [
    "Ranges", "asked_about", "backward", "both", "ids_of", "interval_rules", "kept_interval", "key_tiles", "names",
    "per_position", "types", "with_longer_run",
]

_MOST_ON_HOST = 1 << 16
"""Positions, or tiles, whose numbers are at most made part of the program."""

type Ranges = tiles.TileRange[Int[Array, "1|b 1|h tiles"]]


def names(mask: masks.Mask, of_keys: bool) -> tuple[str, ...]:
    """Returns the arrays that a kernel reads that walks over keys, or over queries; none if the mask holds no arrays.

    Where a mask has no interval rules, the padding of its ids, or of its bits of keys, stands for the ends of the
    sequences.
    """
    if not mask.has_arrays:
        return ()
    ids, dense = ids_of(mask) is not None, mask_bits.has_bits(mask)
    no_rules = all(isinstance(part, masks.Full | masks.SegmentIds | masks.Dense) for part in mask.parts)
    no_interval = no_rules and (ids or mask_bits.ends_at_keys(mask))
    ranges, interval, bits = (("key_tiles", "keys", "key_bits") if of_keys else
                              ("query_tiles", "queries", "query_bits"))
    return (ranges, *[interval] * (not no_interval), *["q_ids", "kv_ids"] * ids, *[bits] * dense)


def types(spec: AttentionSpec, make: Callable[[masks.Mask], dict[str, Array]]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of each array that `make` makes of the canonical mask that a spec stands for."""
    given: masks.Mask = jax.tree.map(lambda field: jax.ShapeDtypeStruct(field.shape, field.dtype), spec.mask)
    found: dict[str, jax.ShapeDtypeStruct] = jax.eval_shape(make, given)
    return found


def backward(spec: AttentionSpec, mask: masks.Mask, padded_q_block: int, kv: tuple[int, int],
             dq: tuple[int, int] | None) -> dict[str, Array]:
    """The arrays that the kernels of a backward read, of the canonical mask that a spec stands for.

    Args:
      padded_q_block: queries are padded to a multiple of it.
      kv: queries and keys of a tile, in the kernel that keeps keys.
      dq: the same in the one that keeps queries; None: there is none.
    """
    wanted, padded_kv = names(mask, False), kv[1]
    if dq is not None:
        wanted, padded_kv = wanted + names(mask, True), math.lcm(padded_kv, dq[1])
    found = per_position(spec, mask, wanted, (padded_q_block, padded_kv))
    own = kv[1], tiles.cdiv(spec.kv_len, kv[1])
    needed = _of_groups(spec, _query_tiles(spec, mask, own, kv[0], found.get("query_bits")))
    found["query_tiles"] = jnp.stack(needed, axis=-1)
    if dq is not None:
        needed = key_tiles(spec, mask, (dq[0], tiles.cdiv(spec.q_len, dq[0])), dq[1], found.get("key_bits"))
        found["key_tiles"] = jnp.stack(needed, axis=-1)
    return found


# -- ranges of tiles ---------------------------------------------------------------------------------------------------

def interval_rules(spec: AttentionSpec, mask: masks.Mask) -> masks.Mask:
    """The intersection of a mask's interval rules, with the ends of the sequences."""
    rules = [part for part in mask.parts if not isinstance(part, masks.SegmentIds | masks.Dense)]
    return functools.reduce(operator.and_, rules, masks.InBounds(q_len=spec.q_len, kv_len=spec.kv_len))


def ids_of(mask: masks.Mask) -> masks.SegmentIds | None:
    """The part of a mask that has ids."""
    return next((part for part in mask.parts if isinstance(part, masks.SegmentIds)), None)


def _indices(rules: masks.Mask, count: int) -> Positions:
    """0, 1, ..., count - 1: on the host, where rules hold no arrays. What follows is then part of the program, and not
    computed by a kernel in each call.
    """
    on_host = not rules.has_arrays and count <= _MOST_ON_HOST
    return np.arange(count, dtype=np.int32) if on_host else jnp.arange(count, dtype=jnp.int32)


def _bounds(mask: masks.Mask, of_keys: bool, lo: Positions, hi: Positions) -> masks.Bounds:
    """The bounds on the keys (or on the queries) of each of n intervals: (batch or 1, heads or 1, n) each. On the host
    where the intervals are.
    """
    on_host, count = isinstance(lo, np.ndarray), np.shape(lo)
    own = np if on_host else jnp

    def ask(part: masks.Mask) -> masks.Bounds:
        found = part.kv_bounds(lo, hi) if of_keys else part.q_bounds(lo, hi)
        return masks.Bounds(*(own.broadcast_to(own.asarray(x, np.int32), count) for x in found))

    if on_host:
        return masks.Bounds(*(np.asarray(x)[None, None] for x in ask(mask)))
    return masks.over_batch(mask, ask)


def key_tiles(spec: AttentionSpec, mask: masks.Mask, own: tuple[int, int], block_kv: int,
              bits: Array | None) -> Ranges:
    """The key tiles that each query tile needs.

    Args:
      own: queries of a tile, and the number of tiles. Those past the last query are as the last one, or empty.
      bits: "key_bits", where the mask has them.
    """
    block, count = own
    rules, kv_tiles = interval_rules(spec, mask), tiles.cdiv(spec.kv_len, block_kv)
    bounds = _bounds(rules, True, *asked_about(spec, True, _indices(rules, count), block))
    needed = tiles.TileRange(*map(_array, tiles.tile_range(bounds, block_kv, kv_tiles)))
    if bits is not None:
        needed = both(needed, _range_of(*mask_bits.flags(bits, own, (block_kv, kv_tiles))))
    if (ids := ids_of(mask)) is None:
        return needed
    return both(needed, _tiles_with_equal_ids((_array(ids.q_ids), *own), (_array(ids.kv_ids), block_kv, kv_tiles)))


def _query_tiles(spec: AttentionSpec, mask: masks.Mask, own: tuple[int, int], block_q: int,
                 bits: Array | None) -> Ranges:
    """The query tiles that each key tile needs; see `key_tiles`."""
    (block, count), rules, q_tiles = own, interval_rules(spec, mask), tiles.cdiv(spec.q_len, block_q)
    bounds = _bounds(rules, False, *asked_about(spec, False, _indices(rules, count), block))
    needed = tiles.TileRange(*map(_array, tiles.tile_range(bounds, block_q, q_tiles)))
    if bits is not None:
        needed = both(needed, _range_of(*mask_bits.flags(bits, own, (block_q, q_tiles))))
    if (ids := ids_of(mask)) is None:
        return needed
    return both(needed, _tiles_with_equal_ids((_array(ids.kv_ids), *own), (_array(ids.q_ids), block_q, q_tiles)))


def asked_about(spec: AttentionSpec, of_keys: bool, tile: Positions, block: int) -> tuple[Positions, Positions]:
    """The positions [lo, hi) of a tile that the rules are asked about: of queries (which ask for keys) those up to the
    last one; of keys all, because the padding of the last tile must be masked.
    """
    if of_keys:
        return tiles.interval(masks.minimum(tile, tiles.cdiv(spec.q_len, block) - 1), block, spec.q_len)
    return tile * block, tile * block + block


def _array(x: Positions | Shaped) -> Array:
    return jnp.asarray(x)


def _tiles_with_equal_ids(own: tuple[Array, int, int], other: tuple[Array, int, int]) -> Ranges:
    """The tiles of the other side that may hold an id of each tile of this side; of full tiles the first run of them or
    the last, whichever is longer.

    All six numbers of a range are reductions of the same shape: XLA makes them in one kernel.

    Args:
      own, other: ids, (batch or 1, heads or 1, length); positions of a tile, and the number of tiles.
    """
    piece = math.gcd(own[1], other[1])
    first, last, is_one = (x[..., :, None] for x in _extremes(*own, piece))
    other_first, other_last, other_is_one = (x[..., None, :] for x in _extremes(*other, piece))
    some = (first <= other_last) & (other_first <= last)
    full = is_one & other_is_one & (first == other_first)
    before = jnp.pad(full[..., :-1], ((0, 0),) * (full.ndim - 1) + ((1, 0),))  # whether the tile before is full
    tile, count = jax.lax.broadcasted_iota(jnp.int32, some.shape, some.ndim - 1), some.shape[-1]
    smallest = lambda flags: jnp.where(flags, tile, count).min(axis=-1)
    largest = lambda flags: jnp.where(flags, tile + 1, 0).max(axis=-1)
    return with_longer_run((smallest(some), largest(some)), (smallest(full), smallest(before & ~full)),
                           (largest(full & ~before), largest(full)))


def with_longer_run(needed: tuple[Array, Array], first: tuple[Array, Array], last: tuple[Array, Array]) -> Ranges:
    """The range of the needed tiles, whose full ones are the longer of two runs.

    Args:
      needed: the first tile, and one behind the last.
      first: the first run's first tile, and one behind its last.
      last: one behind the last run's first tile (0 where there is none), and one behind its last.
    """
    last = jnp.maximum(last[0] - 1, 0), last[1]
    is_first = first[1] - first[0] >= last[1] - last[0]
    full_start, full_stop = (jnp.where(is_first, a, b) for a, b in zip(first, last))
    return tiles.TileRange(needed[0], full_start, full_stop, needed[1])


def _range_of(some: Array, full: Array) -> Ranges:
    """The range from flags of the other side's tiles, its last axis: from the first to the last tile with some pair,
    and the longest run of full ones.
    """
    tile, count = jax.lax.broadcasted_iota(jnp.int32, some.shape, some.ndim - 1), some.shape[-1]
    before = jax.lax.cummax(jnp.where(full, -1, tile), axis=some.ndim - 1)  # the last tile up to here that is not full
    length = (tile - before).max(axis=-1)
    full_stop = jnp.where(tile - before == length[..., None], tile + 1, count + 1).min(axis=-1)
    return tiles.TileRange(jnp.where(some, tile, count).min(axis=-1), full_stop - length, full_stop,
                           jnp.where(some, tile + 1, 0).max(axis=-1))


def _extremes(ids: Int[Array, "1|b 1|h n"], block: int, count: int, piece: int) -> tuple[Array, Array, Array]:
    """The smallest and the largest id of each tile, and whether it has no other id and no padding; see
    `tiles.id_extremes`. Made of those of pieces, of which a tile is a whole number: where both sides have the same ids,
    and the same pieces, XLA makes them once.
    """
    pieces = block // piece
    smallest, largest, lowest = (
        functools.reduce(function, [x[..., i::pieces] for i in range(pieces)])
        for function, x in zip((jnp.minimum, jnp.maximum, jnp.minimum), tiles.id_extremes(ids, piece, pieces * count)))
    return smallest, largest, (lowest == largest) & (largest >= 0)


def both(a: Ranges, b: Ranges) -> Ranges:
    """The tiles that both ranges need; those are full that are full in both."""
    return _ordered(jnp.maximum(a.start, b.start), jnp.maximum(a.full_start, b.full_start),
                    jnp.minimum(a.full_stop, b.full_stop), jnp.minimum(a.stop, b.stop))


def _ordered(start: Array, full_start: Array, full_stop: Array, stop: Array) -> Ranges:
    """A range whose numbers do not decrease: an empty one begins and ends at the same tile."""
    stop = jnp.maximum(stop, start)
    full_start = jnp.clip(full_start, start, stop)
    return tiles.TileRange(start, full_start, jnp.clip(full_stop, full_start, stop), stop)


def _of_groups(spec: AttentionSpec, needed: Ranges) -> Ranges:
    """The query tiles that a key tile needs in any query head of its group; those are full that are full in all."""
    if needed.start.shape[1] == 1:
        return needed
    shape = (needed.start.shape[0], spec.kv_heads, spec.group, -1)
    start, full_start, full_stop, stop = (x.reshape(shape) for x in needed)
    some = stop > start
    start = jnp.where(some, start, masks.UNBOUNDED).min(axis=2)
    stop = jnp.where(some, stop, 0).max(axis=2)
    return _ordered(jnp.minimum(start, stop), full_start.max(axis=2), full_stop.min(axis=2), stop)


# -- positions ---------------------------------------------------------------------------------------------------------

def per_position(spec: AttentionSpec, mask: masks.Mask, wanted: tuple[str, ...],
                 blocks: tuple[int, int]) -> dict[str, Array]:
    """The wanted arrays with a number for each position, padded to whole blocks of queries and of keys."""
    q_len, kv_len = (tiles.cdiv(length, block) * block for length, block in zip((spec.q_len, spec.kv_len), blocks))
    rules, ids, found = interval_rules(spec, mask), ids_of(mask), {}
    if "keys" in wanted:
        found["keys"] = _kept(rules, True, q_len, spec.kv_len)
    if "queries" in wanted:
        found["queries"] = _kept(rules, False, kv_len, spec.q_len)
    for name, of_keys, rows, columns in (("key_bits", True, q_len, kv_len), ("query_bits", False, kv_len, q_len)):
        if name in wanted:
            found[name] = mask_bits.packed(mask, of_keys, rows, columns)
    if ids is not None:
        found |= {"q_ids": _row_ids(ids.q_ids, q_len, -1), "kv_ids": _row_ids(ids.kv_ids, kv_len, -2)}
    return found


def _row_ids(ids: Shaped, length: int, padding: int) -> Int[Array, "1|b 1|h 1 n"]:
    """Ids up to a length, with one number for all padding."""
    own = _padded(_array(ids), length, padding)
    return jnp.where(own < 0, padding, own)[:, :, None]


def _kept(rules: masks.Mask, of_keys: bool, count: int, other_len: int) -> Int[Array, "1|b 1|h 2 n"]:
    """The interval of keys (or queries) that interval rules keep for each of `count` positions: its first one, and how
    many. Of one position their bounds are exact.
    """
    pos = _indices(rules, count)
    bounds = _bounds(rules, of_keys, pos, pos + 1)
    stack = np.stack if isinstance(pos, np.ndarray) else jnp.stack
    return jnp.asarray(stack(kept_interval(bounds, other_len), axis=2))


def kept_interval(bounds: masks.Bounds, other_len: int) -> tuple[Positions, Positions]:
    """Of the bounds of a single position: the first position of the other side that it keeps, and how many."""
    first = masks.minimum(masks.maximum(masks.maximum(bounds.lo, bounds.full_lo), 0), other_len)
    stop = masks.minimum(masks.minimum(bounds.hi, bounds.full_hi), other_len)
    return first, masks.maximum(stop - first, 0)


def _padded(x: Array, length: int, value: int) -> Array:
    """x, (.., .., n), with `value` up to (.., .., length)."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[-1])), constant_values=value)
