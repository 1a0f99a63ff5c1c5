"""Which tiles a block walks.

The mask is asked in two places. In a kernel, for the block's own tiles: the functions that take a `mask` work on traced
numbers too. On the host, for everything that is decided before a kernel runs: tables, sections, the order of blocks,
and which branches can be left out. The host asks one mask, `worst_case`. Of a mask that holds arrays it knows only the
parts that hold none, so no branch is left out; kernels read what they would ask from other arrays (`mask_arrays`).
"""

import functools
import operator
from typing import NamedTuple, overload

import jax.numpy as jnp
import numpy as np

from pallas_flash import masks, tiles
from pallas_flash.arithmetic import Positions
from pallas_flash.arrays import Array
from pallas_flash.kernels.hopper.schedule import (
    ROWS_PER_WARPGROUP,
    DbiasSchedule,
    DqSchedule,
    ForwardSchedule,
    KeySchedule,
    KvSchedule,
    WideSchedule,
)
from pallas_flash.kernels.mosaic import scheduling
from pallas_flash.kernels.mosaic.scheduling import Work
from pallas_flash.kernels.mosaic.types import Index
from pallas_flash.spec import AttentionSpec

__all__ = [
    "Steps", "additions_before", "batch_and_head", "dbias_shape", "dbias_table", "dq_work", "every_loaded",
    "every_q_range", "every_row_block", "forward_blocks", "forward_table", "has_order", "head_bytes", "idle_stop_early",
    "kv_range", "kv_work", "loaded_tiles", "makespan", "may_have_idle_queries", "q_range", "q_tiles",
    "row_tiles", "rows_backwards", "shares_bias", "steps", "tile_order", "worst_case",
]

_BackwardPart = KeySchedule | DqSchedule
_Schedule = ForwardSchedule | _BackwardPart
type _Range = tiles.TileRange[Index] | tiles.TileRange[Positions]
"""In a kernel, where all numbers are scalars; on the host."""

_BLOCK_STEPS = 1.5  # the start and end of a block, or of a tile in the forward, cost about that many steps


# -- the mask ----------------------------------------------------------------------------------------------------------

@functools.lru_cache(maxsize=256)
def worst_case(spec: AttentionSpec, s: _Schedule) -> masks.Mask:
    """The parts of the spec's mask that hold no arrays, and the ends of ragged tiles.

    What the host asks: it keeps every pair that a kernel's mask keeps for any batch entry and head. Where the mask
    holds no arrays, it is also the kernels' mask.
    """
    mask = _static_parts(spec)
    ends = _forward_ends(spec, s) if isinstance(s, ForwardSchedule) else _backward_ends(spec, s)
    return mask & masks.InBounds(**ends) if ends else mask


def _static_parts(spec: AttentionSpec) -> masks.Mask:
    if not spec.mask.has_arrays:
        return spec.mask
    static = [part for part in spec.mask.parts if not part.has_arrays]
    return functools.reduce(operator.and_, static, masks.Full())


def _forward_ends(spec: AttentionSpec, s: ForwardSchedule) -> dict[str, int]:
    """The keys' end, if the last key tile is ragged and the mask lets some query reach past it. Rows past the last
    query need no mask: they are never stored.
    """
    first = np.arange(0, spec.q_len, ROWS_PER_WARPGROUP)
    stop = np.minimum(first + ROWS_PER_WARPGROUP, spec.q_len)
    reach = np.max(_static_parts(spec).kv_bounds(first, stop).hi)
    return {"kv_len": spec.kv_len} if spec.kv_len % s.block_kv and reach > spec.kv_len else {}


def _backward_ends(spec: AttentionSpec, s: _BackwardPart) -> dict[str, int]:
    """The keys' end, if the last key tile is ragged.

    Queries past the end have weights of 0, but a NaN key makes them NaN. So the queries' end too, if the last query
    tile is ragged, keys are not cleaned (`backward.nonfinite`), and the mask may keep a key for such queries alone.
    """
    ends = {"kv_len": spec.kv_len} if spec.kv_len % s.block_kv else {}
    keeps_bad_keys = not isinstance(s, DqSchedule) and not s.makes_dq
    if keeps_bad_keys and spec.q_len % s.block_q and not isinstance(spec.mask, masks.Full):
        ends["q_len"] = spec.q_len
    return ends


@functools.lru_cache(maxsize=256)
def may_have_idle_queries(spec: AttentionSpec) -> bool:
    """Whether the mask's bounds leave room for a query that attends to nothing."""
    if spec.mask.has_arrays:
        return True
    pos = np.arange(spec.q_len)
    lo, full_lo, full_hi, hi = (np.broadcast_to(np.clip(x, 0, spec.kv_len), pos.shape)
                                for x in spec.mask.kv_bounds(pos, pos + 1))
    return not np.all(np.maximum(lo, full_lo) < np.minimum(hi, full_hi))


# -- the forward -------------------------------------------------------------------------------------------------------

def q_tiles(spec: AttentionSpec, schedule: ForwardSchedule) -> int:
    """The number of query tiles of a sequence."""
    return tiles.cdiv(spec.q_len, schedule.block_q)


@overload
def loaded_tiles(mask: masks.Mask, spec: AttentionSpec, schedule: ForwardSchedule,
                 q_tile: Index) -> tuple[Index, Index]: ...


@overload
def loaded_tiles(mask: masks.Mask, spec: AttentionSpec, schedule: ForwardSchedule,
                 q_tile: Positions) -> tuple[Positions, Positions]: ...


def loaded_tiles(mask: masks.Mask, spec: AttentionSpec, schedule: ForwardSchedule,
                 q_tile: Positions) -> tuple[Positions, Positions]:
    """The key tiles [lo, hi) that a query tile loads: at least one, so that rows without keys are written too."""
    rows = tiles.interval(q_tile, schedule.block_q, spec.q_len)
    needed = tiles.kv_tiles(mask, rows, schedule.block_kv, spec.kv_len)
    lo = masks.minimum(needed.start, tiles.cdiv(spec.kv_len, schedule.block_kv) - 1)
    return lo, masks.maximum(needed.stop, lo + 1)


@overload
def row_tiles(mask: masks.Mask, spec: AttentionSpec, schedule: ForwardSchedule, q_tile: Index,
              warpgroup: Index) -> tiles.TileRange[Index]: ...


@overload
def row_tiles(mask: masks.Mask, spec: AttentionSpec, schedule: ForwardSchedule, q_tile: np.ndarray,
              warpgroup: np.ndarray) -> tiles.TileRange[Positions]: ...


def row_tiles(mask: masks.Mask, spec: AttentionSpec, schedule: ForwardSchedule, q_tile: Positions,
              warpgroup: Positions) -> _Range:
    """The key tiles that one warpgroup's 64 rows of a query tile need: at least one, and among the query tile's
    `loaded_tiles`. Rows past the last query walk with the last real ones, as a mask is asked about real intervals only;
    if `idle_stop_early`, they take one step, which nobody reads, and leave the tensor cores to the others.
    """
    own, real = q_tile * schedule.warpgroups + warpgroup, tiles.cdiv(spec.q_len, ROWS_PER_WARPGROUP)
    block = masks.minimum(own, real - 1) if real % schedule.warpgroups else own
    rows = tiles.interval(block, ROWS_PER_WARPGROUP, spec.q_len)
    needed = tiles.kv_tiles(mask, rows, schedule.block_kv, spec.kv_len)
    lo, hi = loaded_tiles(mask, spec, schedule, q_tile)
    stop = masks.minimum(masks.maximum(needed.stop, lo + 1), hi)
    start = masks.maximum(masks.minimum(needed.start, stop - 1), lo)
    if idle_stop_early(spec, schedule):
        start = masks.where(own >= real, stop - 1, start)
    return tiles.TileRange(start, needed.full_start, needed.full_stop, stop)


def idle_stop_early(spec: AttentionSpec, schedule: ForwardSchedule) -> bool:
    """Whether warpgroups of the last query tile whose rows lie past the last query take one step only: where they are
    at least 1 of 16 of all warpgroups of a head.

    Source: an H200, d 64, causal, 192 rows a query tile (docs/notes/hopper_forward.md, 2026-11-30). Of 512 queries 1
    of 9 is idle, of 1,024 2 of 18: 1/9, and 3 of 24 and 14 of 88 steps. 8 % faster. Of 2,048, 4,096 and 16,384 queries
    1 of 33, 2 of 66, 2 of 258, with 15 of 288, 62 of 1,120 and 254 of 16,768 steps: 0, -1 and -4 %.
    """
    real, rows = tiles.cdiv(spec.q_len, ROWS_PER_WARPGROUP), q_tiles(spec, schedule) * schedule.warpgroups
    return 16 * (rows - real) >= rows > 0


def every_loaded(spec: AttentionSpec, schedule: ForwardSchedule) -> tuple[np.ndarray, np.ndarray]:
    """`loaded_tiles` of every query tile: (query tiles,) each."""
    count = q_tiles(spec, schedule)
    lo, hi = loaded_tiles(worst_case(spec, schedule), spec, schedule, np.arange(count))
    return np.broadcast_to(lo, (count,)), np.broadcast_to(hi, (count,))


def every_row_block(spec: AttentionSpec, schedule: ForwardSchedule) -> tiles.TileRange[np.ndarray]:
    """`row_tiles` of every block of 64 rows: (query tiles * warpgroups,) each."""
    q_tile = np.repeat(np.arange(q_tiles(spec, schedule)), schedule.warpgroups)
    warpgroup = np.arange(q_tile.size) % schedule.warpgroups
    return _for_each(q_tile, row_tiles(worst_case(spec, schedule), spec, schedule, q_tile, warpgroup))


def _for_each(tile: np.ndarray, needed: tiles.TileRange[Positions]) -> tiles.TileRange[np.ndarray]:
    """Ranges with a number for each tile, also where the mask gives one for all."""
    return tiles.TileRange(*(np.broadcast_to(np.asarray(x), tile.shape) for x in needed))


class Steps(NamedTuple):
    """What some block of 64 rows meets: the kernel leaves out the code for what none does.

    Key tiles are walked from the last to the first. `first_masked`: the tile walked first may be partial;
    `later_masked`: one of the others; `skips_above`, `skips_below`: a warpgroup does not need the query tile's last,
    first key tiles.
    """

    first_masked: bool
    later_masked: bool
    skips_above: bool
    skips_below: bool


@functools.lru_cache(maxsize=256)
def steps(spec: AttentionSpec, schedule: ForwardSchedule) -> Steps:
    """Asks the mask about every block of rows."""
    if spec.mask.has_arrays:
        return Steps(first_masked=True, later_masked=True, skips_above=True, skips_below=True)
    start, full_start, full_stop, stop = every_row_block(spec, schedule)
    lo, hi = (np.repeat(x, schedule.warpgroups) for x in every_loaded(spec, schedule))
    first, others = stop - 1, stop - 1 > start
    return Steps(
        first_masked=bool(np.any((first >= full_stop) | (first < full_start))),
        later_masked=bool(np.any(others & ((start < full_start) | (first - 1 >= full_stop)))),
        skips_above=bool(np.any(stop < hi)), skips_below=bool(np.any(start > lo)))


@functools.lru_cache(maxsize=64)
def forward_table(spec: AttentionSpec, schedule: ForwardSchedule) -> np.ndarray:
    """Which tiles each block works on: (blocks, slots) int32 of flat tile numbers (batch, head, query tile), then -1.

    Longest first, in sections of heads whose keys and values stay in L2 together; each tile goes to the block that is
    free first. The last column is -1.
    """
    lo, hi = every_loaded(spec, schedule)
    cost = (hi - lo) * _step_costs(spec, schedule) + _BLOCK_STEPS
    section = max(1, _heads_of_section(spec, schedule)) * spec.group
    order = scheduling.in_sections(spec.batch * spec.q_heads, section, np.argsort(-cost, kind="stable"))
    return scheduling.table(order, cost[order % cost.size], schedule.num_blocks)


def _step_costs(spec: AttentionSpec, schedule: ForwardSchedule) -> np.ndarray | int:
    """What a step of each query tile costs: 1, or less where some of the last tile's warpgroups stop early. One alone
    waits for its own products and exponentials, about half of what three take."""
    if not idle_stop_early(spec, schedule):
        return 1
    first = np.arange(q_tiles(spec, schedule)) * schedule.block_q
    busy = np.minimum(tiles.cdiv(spec.q_len, ROWS_PER_WARPGROUP) - first // ROWS_PER_WARPGROUP, schedule.warpgroups)
    return (busy + 1) / (schedule.warpgroups + 1)


def _heads_of_section(spec: AttentionSpec, schedule: ForwardSchedule) -> int:
    """How many key heads stay in L2 together."""
    return schedule.section_bytes // max(2 * spec.kv_len * (spec.d + spec.d_v), 1)


@functools.lru_cache(maxsize=256)
def tile_order(spec: AttentionSpec, schedule: ForwardSchedule) -> Work:
    """The query tiles of all heads in the order in which blocks take them, where the mask holds arrays: in sections,
    and those first that are the longest by the mask's parts without arrays.
    """
    lo, hi = every_loaded(spec, schedule)
    heads = _heads_of_section(spec, schedule) * spec.group
    return scheduling.work(spec.batch * spec.q_heads, tiles.TileRange(lo, lo, hi, hi), heads, schedule.num_blocks)


def shares_bias(spec: AttentionSpec) -> bool:
    """Whether batch entries share a bias of pairs."""
    return spec.bias is not None and spec.bias.shape[2] > 1 and spec.bias.shape[0] == 1 and isinstance(spec.batch, int)


def batch_and_head(spec: AttentionSpec, pair: Index, heads: int) -> tuple[Index, Index]:
    """The batch entry and the head, of so many, of a pair of both in the order of work. Batch entries that share a bias
    come one after the other, so that L2 still has what the first of them has read of it.
    """
    if shares_bias(spec):
        return scheduling.rem(pair, spec.batch), scheduling.div(pair, spec.batch)
    return scheduling.div(pair, heads), scheduling.rem(pair, heads)


def forward_blocks(spec: AttentionSpec, schedule: ForwardSchedule) -> int:
    """The number of blocks: at most one for each tile."""
    return min(schedule.num_blocks, spec.batch * spec.q_heads * q_tiles(spec, schedule))


# -- the backward ------------------------------------------------------------------------------------------------------

@overload
def q_range(mask: masks.Mask, spec: AttentionSpec, s: _BackwardPart, kv_tile: Index) -> tiles.TileRange[Index]: ...


@overload
def q_range(mask: masks.Mask, spec: AttentionSpec, s: _BackwardPart,
            kv_tile: np.ndarray) -> tiles.TileRange[Positions]: ...


def q_range(mask: masks.Mask, spec: AttentionSpec, s: _BackwardPart, kv_tile: Positions) -> _Range:
    """The query tiles that a key tile needs. Its keys are not clamped to the real length: the padding of the last tile
    must be masked.
    """
    return tiles.q_tiles(mask, (kv_tile * s.block_kv, (kv_tile + 1) * s.block_kv), s.block_q, spec.q_len)


@overload
def kv_range(mask: masks.Mask, spec: AttentionSpec, s: _BackwardPart, q_tile: Index) -> tiles.TileRange[Index]: ...


@overload
def kv_range(mask: masks.Mask, spec: AttentionSpec, s: _BackwardPart,
             q_tile: np.ndarray) -> tiles.TileRange[Positions]: ...


def kv_range(mask: masks.Mask, spec: AttentionSpec, s: _BackwardPart, q_tile: Positions) -> _Range:
    """The key tiles that a query tile needs."""
    return tiles.kv_tiles(mask, tiles.interval(q_tile, s.block_q, spec.q_len), s.block_kv, spec.kv_len)


def every_q_range(spec: AttentionSpec, s: _BackwardPart) -> tiles.TileRange[np.ndarray]:
    """`q_range` of every key tile: (key tiles,) each."""
    kv_tile = np.arange(tiles.cdiv(spec.kv_len, s.block_kv))
    return _for_each(kv_tile, q_range(worst_case(spec, s), spec, s, kv_tile))


def _every_kv_range(spec: AttentionSpec, s: _BackwardPart) -> tiles.TileRange[np.ndarray]:
    """`kv_range` of every query tile: (query tiles,) each."""
    q_tile = np.arange(tiles.cdiv(spec.q_len, s.block_q))
    return _for_each(q_tile, kv_range(worst_case(spec, s), spec, s, q_tile))


def _work(spec: AttentionSpec, heads: int, ranges: tiles.TileRange[np.ndarray], head_bytes: int,
          s: _BackwardPart) -> Work:
    """The blocks of a kernel in sections of about `section_bytes`."""
    work = scheduling.work(heads, ranges, s.section_bytes // max(head_bytes, 1), s.num_sms)
    return work._replace(empty=True, partial=True) if spec.mask.has_arrays else work


def head_bytes(spec: AttentionSpec, s: KeySchedule) -> int:
    """Bytes of q, dout and dq's sums of a query head, of which `section_bytes` holds some."""
    return spec.q_len * (2 * (spec.d + spec.d_v) + (4 * spec.d if s.makes_dq else 0))


@functools.lru_cache(maxsize=256)
def kv_work(spec: AttentionSpec, s: KeySchedule) -> Work:
    """The blocks of a kernel that keeps key tiles.

    If `ordered`, descending: with a causal mask, or a window, the block of the tile before reaches each query tile
    later without waiting. But then the longest blocks may start last. So where they are much longer than others,
    `longest_last` eighths of the tiles come after them, in ascending order.
    """
    needed = every_q_range(spec, s)
    work = _work(spec, spec.batch * spec.kv_heads, needed, spec.group * head_bytes(spec, s), s)
    if not (isinstance(s, KvSchedule) and s.ordered):
        return work
    length = needed.stop - needed.start
    return work._replace(ascending=work.ascending * s.longest_last // 8 if length.max() >= 1.5 * length.mean() else 0)


def rows_backwards(spec: AttentionSpec, s: KvSchedule, block: Index, count: int) -> tuple[Index, Index, Index]:
    """The batch entry, the query head and the rows, of so many in each head, of a block of a kernel before or behind
    that of key tiles: backwards in its order of sections, and in a section all heads of some rows before others. So the
    one before ends with what is read first, and the one behind begins with what was written last, while L2 has it; and
    heads that lie side by side in memory are read and written together.
    """
    heads = kv_work(spec, s).section * spec.group
    rest, first = scheduling.rem(block, heads * count), scheduling.div(block, heads * count) * heads
    pair = spec.batch * spec.q_heads - heads - first + scheduling.rem(rest, heads)
    batch, kv_head = batch_and_head(spec, scheduling.div(pair, spec.group), spec.kv_heads)
    rows = count - 1 - scheduling.div(rest, heads)
    return batch, kv_head * spec.group + scheduling.rem(pair, spec.group), rows


@functools.lru_cache(maxsize=256)
def dq_work(spec: AttentionSpec, s: DqSchedule | WideSchedule) -> Work:
    """The blocks of the kernel that keeps query tiles. A section holds whole groups of heads where it can."""
    head_bytes = 2 * spec.kv_len * (spec.d + spec.d_v) // spec.group
    return _work(spec, spec.batch * spec.q_heads, _every_kv_range(spec, s), head_bytes, s)


def dbias_shape(spec: AttentionSpec, s: DbiasSchedule) -> tuple[int, int, int, int]:
    """The shape of the gradient of a bias of pairs, with whole tiles."""
    assert spec.bias is not None
    rows, columns = (tiles.cdiv(n, block) * block for n, block in zip(spec.bias.shape[2:], (s.block_q, s.block_kv)))
    return spec.bias.shape[0], spec.bias.shape[1], rows, columns


@functools.lru_cache(maxsize=64)
def dbias_table(spec: AttentionSpec, s: DbiasSchedule) -> np.ndarray:
    """Which tiles of the gradient of a bias of pairs each block makes: (blocks, 2 + slots) int32. First how many there
    are, then their numbers, of (bias, query tile, key tile), then -1.

    Each tile goes to the block that is free first: one that no query needs costs about half a step, of as many as
    batch entries and heads share the bias.
    """
    batch, heads, rows, columns = dbias_shape(spec, s)
    of_queries = s.tiles.dq
    assert isinstance(of_queries, DqSchedule)
    first, _, _, stop = _every_kv_range(spec, of_queries)
    key_tile = np.arange(columns // s.block_kv)
    needed = (first[:, None] <= key_tile) & (key_tile < stop[:, None])
    sharers = spec.batch // batch * (spec.q_heads // heads)
    costs = np.tile(np.where(needed, sharers, 0).ravel() + 0.5, batch * heads)
    assert needed.shape[0] == rows // s.block_q
    dealt = scheduling.table(np.arange(costs.size), costs, s.num_sms)
    return np.concatenate([(dealt >= 0).sum(axis=1, keepdims=True, dtype=np.int32), dealt], axis=1)


def additions_before(mask: masks.Mask, spec: AttentionSpec, s: KvSchedule, q_tile: Index,
                     kv_tile: Index) -> Array:
    """How many blocks add to a query tile before that of a key tile, if `ordered`."""
    first, _, _, stop = kv_range(mask, spec, s, q_tile)
    split = kv_work(spec, s).ascending
    return jnp.where(kv_tile >= split, stop - 1 - kv_tile,
                     jnp.maximum(stop - jnp.maximum(first, split), 0) + kv_tile - first)


@overload
def last_key_tile(mask: masks.Mask, spec: AttentionSpec, s: KvSchedule, q_tile: Index) -> Index: ...


@overload
def last_key_tile(mask: masks.Mask, spec: AttentionSpec, s: KvSchedule, q_tile: np.ndarray) -> Positions: ...


def last_key_tile(mask: masks.Mask, spec: AttentionSpec, s: KvSchedule, q_tile: Positions) -> Positions:
    """The key tile whose block is the last that adds to a query tile, if `ordered`."""
    first, _, _, stop = kv_range(mask, spec, s, q_tile)
    ascend = masks.minimum(kv_work(spec, s).ascending, stop)  # [first, ascend) come last, if there are any
    return masks.maximum(first, ascend - 1)


@functools.lru_cache(maxsize=256)
def completes_in_runs(spec: AttentionSpec, s: KvSchedule) -> bool:
    """Whether the query tiles to which a block's addition is the last follow each other, for every block."""
    q_tile = np.arange(tiles.cdiv(spec.q_len, s.block_q))
    last = np.broadcast_to(np.asarray(last_key_tile(worst_case(spec, s), spec, s, q_tile)), q_tile.shape)
    runs = 1 + np.count_nonzero(np.diff(last))
    return bool(runs == np.unique(last).size)


@functools.lru_cache(maxsize=256)
def has_order(spec: AttentionSpec, s: KvSchedule) -> bool:
    """Whether the key tiles whose blocks add to a query tile are those that the mask's bounds name, and at least one:
    then `additions_before` follows from a block's number. Nothing is known of a mask that holds arrays.
    """
    if spec.mask.has_arrays or spec.bias is not None or spec.score is not None:
        return False
    needed, (start, _, _, stop) = every_q_range(spec, s), _every_kv_range(spec, s)
    begin, end = needed.start, np.maximum(needed.start, needed.stop)
    change = np.bincount(begin, minlength=start.size + 1) - np.bincount(end, minlength=start.size + 1)
    count, kv_tile = np.cumsum(change)[:-1], np.arange(begin.size)
    first, last = (sign * tiles.smallest_covering(begin, end, sign * kv_tile, start.size) for sign in (1, -1))
    return bool(np.all((count > 0) & (first == start) & (last == stop - 1) & (count == stop - start)))


def makespan(spec: AttentionSpec, s: KvSchedule) -> float:
    """The number of steps until the last block has ended (`scheduling.makespan`)."""
    needed = every_q_range(spec, s)
    costs = (needed.stop - needed.start) * spec.group + _BLOCK_STEPS
    return scheduling.makespan(kv_work(spec, s), costs, s.num_sms)
