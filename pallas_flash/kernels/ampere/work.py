"""Which tiles a block walks.

The mask is asked in a kernel, for the block's own tiles, and on the host, for what is decided before a kernel runs: the
order of blocks, and which branches can be left out. Of a mask that holds arrays the host knows only the parts that hold
none, so no branch is left out; kernels read what they would ask from other arrays (`mask_arrays`).
"""

import enum
import functools
import operator
from collections.abc import Sequence
from typing import overload

import jax.numpy as jnp
import numpy as np

from pallas_flash import masks, tiles
from pallas_flash.arithmetic import Positions
from pallas_flash.arrays import Array
from pallas_flash.kernels.ampere.schedule import ROWS, BackwardSchedule, DqSchedule, ForwardSchedule
from pallas_flash.kernels.mosaic import scheduling
from pallas_flash.kernels.mosaic.scheduling import Work
from pallas_flash.kernels.mosaic.types import Index
from pallas_flash.spec import AttentionSpec

__all__ = [
    "Meets", "additions_before", "dq_work", "forward_work", "has_order", "kv_range", "kv_work", "last_tiles", "mask_of",
    "may_have_idle_queries", "met_rows", "own_q_range", "padded_q", "q_range", "row_range",
]


_QuerySchedule = ForwardSchedule | DqSchedule
_Schedule = _QuerySchedule | BackwardSchedule
type _Range = tiles.TileRange[Index] | tiles.TileRange[Positions]
"""In a kernel, where all numbers are scalars; on the host."""


@functools.lru_cache(maxsize=256)
def mask_of(spec: AttentionSpec, s: _Schedule) -> masks.Mask:
    """The parts of the spec's mask that hold no arrays, and the ends of ragged tiles: a weight must be 0 where copies
    fill with zeros. Where the mask holds no arrays, it is the kernels' mask.

    Queries past the end need no end of their own: they are not stored, and in the backward their lse says that they
    attend to nothing.
    """
    mask = spec.mask
    if mask.has_arrays:
        static = [part for part in mask.parts if not part.has_arrays]
        mask = functools.reduce(operator.and_, static, masks.Full())
    return mask & masks.InBounds(kv_len=spec.kv_len) if spec.kv_len % s.block_kv else mask


@functools.lru_cache(maxsize=256)
def may_have_idle_queries(spec: AttentionSpec) -> bool:
    """Whether the mask's bounds leave room for a query that attends to nothing."""
    if spec.mask.has_arrays:
        return True
    pos = np.arange(spec.q_len)
    lo, full_lo, full_hi, hi = (np.broadcast_to(np.clip(x, 0, spec.kv_len), pos.shape)
                                for x in spec.mask.kv_bounds(pos, pos + 1))
    return not np.all(np.maximum(lo, full_lo) < np.minimum(hi, full_hi))


def padded_q(spec: AttentionSpec, s: BackwardSchedule) -> int:
    """Queries, rounded up to what the backward's statistics are padded to."""
    return tiles.cdiv(spec.q_len, s.padded_q_block) * s.padded_q_block


# -- tiles that all blocks meet alike ----------------------------------------------------------------------------------

class Meets(enum.Enum):
    """How rows meet a tile of columns under a mask."""

    NOT = 0
    PARTLY = 1
    WHOLLY = 2


type Known = tuple[tuple[Meets, ...], ...]
"""Of some tiles, how each 64 rows of a block meet them."""


def met_rows(meets: tuple[Meets, ...]) -> slice:
    """From the first to the last 64 rows that meet a tile."""
    rows = [i for i, kind in enumerate(meets) if kind is not Meets.NOT]
    return slice(rows[0], rows[-1] + 1)


_MOST_KNOWN = 4
"""Tiles that have code of their own."""


def _known(rows: Sequence[tiles.TileRange[Positions]], counts: np.ndarray, stop: np.ndarray) -> Known:
    """How rows meet the last tiles, if that is the same for all blocks, all tiles are met, and some rows need no mask:
    else code of their own gains nothing.

    Args:
      rows: of each 64, the tiles that they need, an element for each block.
      counts: how many tiles there are, an element for each block.
      stop: the end of a block's tiles, an element for each block.
    """
    count = int(counts[0])
    if count > _MOST_KNOWN or np.any(counts != count):
        return ()
    kinds = np.empty((count, len(rows), counts.size), np.int32)
    for i, j in np.ndindex(kinds.shape[:2]):
        tile, (lo, full_lo, full_hi, hi) = stop - 1 - i, rows[j]
        inside, whole = (tile >= lo) & (tile < hi), (tile >= full_lo) & (tile < full_hi)
        kinds[i, j] = np.where(whole, Meets.WHOLLY.value, np.where(inside, Meets.PARTLY.value, Meets.NOT.value))
    alike = np.all(kinds == kinds[..., :1])
    if not alike or np.any(np.all(kinds == Meets.NOT.value, axis=1)) or np.all(kinds == Meets.PARTLY.value):
        return ()
    return tuple(tuple(map(Meets, of_tile)) for of_tile in kinds[..., 0].tolist())


# -- the forward -------------------------------------------------------------------------------------------------------

@overload
def kv_range(spec: AttentionSpec, s: _QuerySchedule, q_tile: Index) -> tiles.TileRange[Index]: ...


@overload
def kv_range(spec: AttentionSpec, s: _QuerySchedule, q_tile: np.ndarray) -> tiles.TileRange[Positions]: ...


def kv_range(spec: AttentionSpec, s: _QuerySchedule, q_tile: Positions) -> _Range:
    """The key tiles that a query tile needs."""
    rows = tiles.interval(q_tile, s.block_q, spec.q_len)
    return tiles.kv_tiles(mask_of(spec, s), rows, s.block_kv, spec.kv_len)


def row_range(spec: AttentionSpec, s: ForwardSchedule, first: Positions) -> tiles.TileRange[Positions]:
    """The key tiles that the 64 queries from `first` on need, past the end of the sequence too."""
    return tiles.kv_tiles(mask_of(spec, s), (first, first + ROWS), s.block_kv, spec.kv_len)


@functools.lru_cache(maxsize=256)
def last_tiles(spec: AttentionSpec, s: ForwardSchedule) -> Known:
    """How each 64 queries of a block meet the last key tiles, those that need the mask, from the last on, if that is
    the same for all blocks; else nothing.
    """
    if not s.peeled or spec.mask.has_arrays:
        return ()
    q_tile = np.arange(tiles.cdiv(spec.q_len, s.block_q))
    _, _, full_stop, stop = (np.broadcast_to(np.asarray(x), q_tile.shape) for x in kv_range(spec, s, q_tile))
    rows = [row_range(spec, s, q_tile * s.block_q + i * ROWS) for i in range(s.row_tiles)]
    return _known(rows, stop - full_stop, stop)


@functools.lru_cache(maxsize=256)
def forward_work(spec: AttentionSpec, s: ForwardSchedule) -> Work:
    """The forward's blocks, one for each query tile and query head. A section holds whole groups of heads where it can.
    """
    return _query_work(spec, s)


def _query_work(spec: AttentionSpec, s: _QuerySchedule) -> Work:
    q_tile = np.arange(tiles.cdiv(spec.q_len, s.block_q))
    head_bytes = 2 * spec.kv_len * (spec.d + spec.d_v) // spec.group
    return _work(spec, spec.batch * spec.q_heads, (q_tile, kv_range(spec, s, q_tile)), head_bytes, s)


# -- the backward ------------------------------------------------------------------------------------------------------

@overload
def q_range(spec: AttentionSpec, s: BackwardSchedule, kv_tile: Index) -> tiles.TileRange[Index]: ...


@overload
def q_range(spec: AttentionSpec, s: BackwardSchedule, kv_tile: np.ndarray) -> tiles.TileRange[Positions]: ...


def q_range(spec: AttentionSpec, s: BackwardSchedule, kv_tile: Positions) -> _Range:
    """The query tiles that a key tile needs. Its keys are not clamped to the real length: the padding of the last tile
    must be masked.
    """
    return own_q_range(spec, s, (kv_tile * s.block_kv, (kv_tile + 1) * s.block_kv))


def own_q_range(spec: AttentionSpec, s: BackwardSchedule,
                keys: tuple[Positions, Positions]) -> tiles.TileRange[Positions]:
    """The query tiles that the keys of an interval need."""
    return tiles.q_tiles(mask_of(spec, s), keys, s.block_q, spec.q_len)


@functools.lru_cache(maxsize=256)
def kv_work(spec: AttentionSpec, s: BackwardSchedule) -> Work:
    """The blocks of the kernel that keeps key tiles, one for each tile and key head; if `ordered`, in ascending order.
    """
    kv_tile = np.arange(tiles.cdiv(spec.kv_len, s.block_kv))
    head_bytes = spec.group * spec.q_len * (2 * (spec.d + spec.d_v) + (4 * spec.d if s.dq is None else 0))
    found = _work(spec, spec.batch * spec.kv_heads, (kv_tile, q_range(spec, s, kv_tile)), head_bytes, s)
    return found._replace(ascending=found.tiles) if s.ordered else found


def _met_keys(spec: AttentionSpec, s: BackwardSchedule, q_tile: Positions) -> _Range:
    """The key tiles that the backward's query tiles need."""
    rows = tiles.interval(q_tile, s.block_q, spec.q_len)
    return tiles.kv_tiles(mask_of(spec, s), rows, s.block_kv, spec.kv_len)


def additions_before(spec: AttentionSpec, s: BackwardSchedule, q_tile: Index, kv_tile: Index) -> Array:
    """How many blocks add to a query tile before that of a key tile, if `ordered`."""
    return jnp.asarray(kv_tile - _met_keys(spec, s, q_tile).start)


@functools.lru_cache(maxsize=256)
def has_order(spec: AttentionSpec, s: BackwardSchedule) -> bool:
    """Whether the key tiles whose blocks add to a query tile follow each other, and begin with the first one that the
    mask's bounds name: then `additions_before` says how many come before. Of a mask that holds arrays nothing is known.
    """
    if spec.mask.has_arrays:
        return False
    kv_tile = np.arange(tiles.cdiv(spec.kv_len, s.block_kv))
    q_tile = np.arange(tiles.cdiv(spec.q_len, s.block_q))
    needed, met = q_range(spec, s, kv_tile), _met_keys(spec, s, q_tile)
    begin, end, start = (np.broadcast_to(x, like.shape) for x, like in (
        (needed.start, kv_tile), (needed.stop, kv_tile), (met.start, q_tile)))
    end = np.maximum(begin, end)
    change = np.bincount(begin, minlength=q_tile.size + 1) - np.bincount(end, minlength=q_tile.size + 1)
    count = np.cumsum(change)[:-1]
    first, last = (sign * tiles.smallest_covering(begin, end, sign * kv_tile, q_tile.size) for sign in (1, -1))
    return bool(np.all((count == 0) | ((first == start) & (count == last - first + 1))))


@functools.lru_cache(maxsize=256)
def dq_work(spec: AttentionSpec, s: DqSchedule) -> Work:
    """The blocks of the kernel of dq alone, one for each query tile and query head."""
    return _query_work(spec, s)


def _work(spec: AttentionSpec, heads: int, needed: tuple[np.ndarray, tiles.TileRange[Positions]], head_bytes: int,
          s: _Schedule) -> Work:
    """The blocks of a kernel in sections of about `section_bytes`.

    Args:
      needed: numbers of tiles, and the tiles of the other axis that they need.
    """
    tile, ranges = needed
    each = tiles.TileRange(*(np.broadcast_to(np.asarray(x), tile.shape) for x in ranges))
    work = scheduling.work(heads, each, s.section_bytes // max(head_bytes, 1), s.num_sms)
    return work._replace(empty=True, partial=True) if spec.mask.has_arrays else work
