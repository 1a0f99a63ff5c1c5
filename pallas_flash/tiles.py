"""From positions to tiles: the only block arithmetic of the project, and the only form of a loop over tiles.

The tiles of one axis that a tile of the other axis needs form one interval, split into three: partial, full, partial
(`TileRange`). Full tiles need no mask. Everything works on plain and on traced numbers.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np

from pallas_flash import masks
from pallas_flash.arithmetic import Positions

__all__ = [
    "TileRange", "all_partial", "attended_pairs", "cdiv", "div", "id_extremes", "interval", "kv_tiles", "q_tiles",
    "smallest_covering", "sweep", "tile_range", "union",
]

Carry = TypeVar("Carry")


def div(a: Positions, b: int) -> Positions:
    """a // b for a >= 0. Traced, it is a division that truncates: rounding towards minus infinity costs more, in a
    kernel and in compiling it.
    """
    return jax.lax.div(a, jnp.asarray(b, a.dtype)) if isinstance(a, jax.Array) else a // b


@overload
def cdiv(a: int, b: int) -> int: ...


@overload
def cdiv(a: Positions, b: int) -> Positions: ...


def cdiv(a: Positions, b: int) -> Positions:
    """Ceiling of a / b for a >= 0."""
    return div(a + b - 1, b)


class TileRange[T](NamedTuple):
    """Tile indices: [start, full_start) partial, [full_start, full_stop) full, [full_stop, stop) partial."""

    start: T
    full_start: T
    full_stop: T
    stop: T


def interval(tile: Positions, block: int, length: int) -> tuple[Positions, Positions]:
    """The positions [lo, hi) of a tile, clamped to the real length: what a mask is asked about."""
    return tile * block, masks.minimum((tile + 1) * block, length)


def _clip(x: Positions, lo: Positions, hi: Positions) -> Positions:
    return masks.minimum(masks.maximum(x, lo), hi)


def tile_range(bounds: masks.Bounds, block: int, num_tiles: int) -> TileRange[Positions]:
    """The tiles of `block` positions that `bounds` calls partial and full; the one place where positions become
    tiles."""
    end = num_tiles * block
    lo, hi = _clip(bounds.lo, 0, end), _clip(bounds.hi, 0, end)
    start = div(lo, block)
    stop = masks.where(hi > lo, cdiv(hi, block), start)
    full_start = _clip(cdiv(_clip(bounds.full_lo, 0, end), block), start, stop)
    full_stop = _clip(div(_clip(bounds.full_hi, 0, end), block), full_start, stop)
    return TileRange(start, full_start, full_stop, stop)


def id_extremes(ids: jax.Array, block: int, count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The smallest id that is no padding, the largest, and the smallest of all, of each of `count` tiles of `block`
    positions: (.., n) -> (.., count) int32 each.

    Ids below 0 are padding. Where there are no others, the smallest is above the largest, which is then -1. Two tiles
    can hold equal ids where their intervals from smallest to largest meet, and hold a single one where all three agree.
    What lies past the end does not count.
    """
    missing = block * count - ids.shape[-1]
    assert missing >= 0, (ids.shape, block, count)
    none = jnp.iinfo(jnp.int32).max  # or an id

    def whole(padding: int) -> jax.Array:
        padded = jnp.pad(ids, [*[(0, 0)] * (ids.ndim - 1), (0, missing)], constant_values=padding)
        return padded.reshape(*ids.shape[:-1], count, block)

    known = whole(-1)
    smallest = jnp.where(known < 0, none, known).min(axis=-1)
    return smallest, jnp.maximum(known.max(axis=-1), -1), whole(none).min(axis=-1)


def union(bounds: masks.Bounds) -> masks.Bounds:
    """Bounds that hold for every element of batched bounds: what a loop shared by a batch must cover."""
    if isinstance(bounds.lo, int | np.integer):
        return bounds
    lo, full_lo, full_hi, hi = (x if isinstance(x, jax.Array) else np.asarray(x) for x in bounds)
    return masks.Bounds(lo.min(), full_lo.max(), full_hi.min(), hi.max())


def _shared_bounds(mask: masks.Mask, question: Callable[[masks.Mask], masks.Bounds]) -> masks.Bounds:
    return union(masks.over_batch(mask, question)) if mask.has_arrays else question(mask)


def kv_tiles(mask: masks.Mask, q_interval: tuple[Positions, Positions], block_kv: int,
             kv_len: int) -> TileRange[Positions]:
    """The key tiles that the queries of `q_interval` need, for all (batch, head) at once."""
    bounds = _shared_bounds(mask, lambda part: part.kv_bounds(*q_interval))
    return tile_range(bounds, block_kv, cdiv(kv_len, block_kv))


def q_tiles(mask: masks.Mask, kv_interval: tuple[Positions, Positions], block_q: int,
            q_len: int) -> TileRange[Positions]:
    """The query tiles that the keys of `kv_interval` need, for all (batch, head) at once."""
    bounds = _shared_bounds(mask, lambda part: part.q_bounds(*kv_interval))
    return tile_range(bounds, block_q, cdiv(q_len, block_q))


def all_partial(tiles: TileRange[Positions]) -> TileRange[Positions]:
    """The same tiles, all of which need a mask."""
    return tiles._replace(full_start=tiles.stop, full_stop=tiles.stop)


def sweep(tiles: TileRange[Positions], step: Callable[[jax.Array, Carry, bool], Carry], carry: Carry) -> Carry:
    """Runs `step(tile, carry, masked)` over the partial tiles of a range, on both sides of the full ones, then with
    masked=False over the full ones.

    Two loops, or one where a side is known to be empty: each holds a copy of the step, and compiling those is most of
    what compiling takes.
    """
    before, full = tiles.full_start - tiles.start, tiles.full_stop - tiles.full_start

    def partial(i: jax.Array, carry: Carry) -> Carry:
        return step(jnp.int32(tiles.start) + i + jnp.where(i < before, 0, jnp.int32(full)), carry, True)

    def whole(tile: jax.Array, carry: Carry) -> Carry:
        return step(tile, carry, False)
    count = before + (tiles.stop - tiles.full_stop)
    if not _is_known_empty(0, count):
        carry = jax.lax.fori_loop(jnp.int32(0), jnp.int32(count), partial, carry)
    if not _is_known_empty(tiles.full_start, tiles.full_stop):
        carry = jax.lax.fori_loop(jnp.int32(tiles.full_start), jnp.int32(tiles.full_stop), whole, carry)
    return carry


def _is_known_empty(lo: Positions, hi: Positions) -> bool:
    """Whether [lo, hi) is empty without looking at a traced number."""
    return lo is hi or (isinstance(lo, int | np.integer) and isinstance(hi, int | np.integer) and lo >= hi)


def smallest_covering(begin: np.ndarray, end: np.ndarray, value: np.ndarray, size: int) -> np.ndarray:
    """For each position, the smallest value whose interval [begin, end) covers it; the largest int64 where none does.

    Each interval is the union of two of length 2^level, which may overlap; those of a level are then halved, from the
    longest: O((size + intervals) log size).
    """
    level = np.frexp(np.maximum(end - begin, 1))[1] - 1
    found, empty = np.full(size, np.iinfo(np.int64).max), begin >= end
    for step in reversed(range(size.bit_length())):
        wider, found = found, found.copy()
        found[1 << step:] = np.minimum(found[1 << step:], wider[:size - (1 << step)])
        for at in (begin, end - (1 << step)):
            here = (level == step) & ~empty
            np.minimum.at(found, at[here], value[here])
    return found


def _row_chunks(q_len: int, kv_len: int) -> Iterator[np.ndarray]:
    rows = max(1, (1 << 24) // max(kv_len, 1))
    for lo in range(0, q_len, rows):
        yield np.arange(lo, min(lo + rows, q_len))


def attended_pairs(mask: masks.Mask, q_len: int, kv_len: int) -> int:
    """The number of (query, key) pairs that a mask without arrays keeps: the work that an attention cannot avoid.

    Rows whose bounds say everything are counted from the bounds, the others by asking `keep`.
    """
    pos = np.arange(q_len)
    lo, full_lo, full_hi, hi = (np.clip(np.broadcast_to(x, pos.shape), 0, kv_len) for x in mask.kv_bounds(pos, pos + 1))
    exact = (lo >= hi) | ((full_lo <= lo) & (full_hi >= hi))
    counted = int(np.sum(np.maximum(hi - lo, 0)[exact], dtype=np.int64))
    kv_pos = np.arange(kv_len)[None, :]
    for rows in _row_chunks(q_len, kv_len):
        if not exact[rows].all():
            kept = np.asarray(mask.keep(pos[rows][:, None], kv_pos))
            counted += int(np.sum(kept[~exact[rows]], dtype=np.int64))
    return counted
