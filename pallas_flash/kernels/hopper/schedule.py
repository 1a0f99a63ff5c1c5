"""How fast, never what: the tile sizes and pipeline depths of the Hopper kernels, which of them are legal, and the
defaults.

No Mosaic in here: dispatch reads this file on any machine. Shared memory is described once, by `forward_buffers`; the
kernel allocates exactly that, and `smem_bytes` adds it up.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from pallas_flash import masks, tiles
from pallas_flash.kernels.mosaic import scheduling
from pallas_flash.spec import AttentionSpec

__all__ = [
    "Buffer", "ForwardSchedule", "Steps", "chunks", "default_forward", "forward_buffers", "forward_mask",
    "forward_problems", "forward_table", "kv_range", "q_tiles", "row_tiles", "smem_bytes", "steps",
]

CHUNK = 64
ROWS = 64
_ALIGNMENT = 1024
_BARRIER_BYTES = 8
_SHORT_ROWS = 1280
_SHORT_SEQUENCE = 1024


@dataclasses.dataclass(frozen=True)
class ForwardSchedule:
    """The forward kernel's shape: one block for each SM takes tile after tile.

    Attributes:
      block_kv: keys of a tile; a multiple of 16.
      warpgroups: compute warpgroups, of 64 query rows each.
      num_stages: slots of the ring of key tiles, and of that of value tiles.
      query_buffers: query tiles in shared memory; with 2, the next one is loaded while this one is used.
      out_chunks: 64-column chunks of the output buffer of a warpgroup; fewer than the output has: written in turns; 0:
        the output is written over the query, which then cannot be replaced before it has left.
      pingpong: the warpgroups take turns at the tensor cores.
      maxima: the row maximum is taken at the steps i = 1, 2, 3, ... whose lowest set bit is more than i / maxima (2:
        1, 2, 4, 8, ...; 4: 1, 2, 3, 4, 6, 8, 12, 16, 24, ...), and not looked at in the others: weights then reach far
        beyond 1, which bf16 can hold; tiles in which they reach too far are given up and done again, with a maximum in
        each step. 0: looked at in every step, with a slack.
      slack: without `maxima`, a warp multiplies its accumulator when the maximum of a row grows by more than 2^slack. 0
        keeps the largest weight of a row at 1, which bf16 holds exactly; above 0 there are fewer rescales, and the
        largest weight is rounded like the others.
      long_slack, long_keys: the slack of rows that walk over more than so many keys, where single weights matter less.
      held_columns: so many columns of weights are computed before the waits for the next key tile and for the product
        that they overlap, the others after them, while the first are rounded. The first wait is a branch, above which
        they stay. 0: the compiler waits for the product where it likes, and the next step for its key tile.
      opaque: index the query through an opaque scalar (`ptx.opaque`).
      num_blocks: blocks of the grid: the SMs of the device.
      section_bytes: keys and values that a section of heads may have, so that they stay in L2 while their tiles are
        worked on.
      q_registers: the query is held in registers.
    """

    block_kv: int
    warpgroups: int = 2
    num_stages: int = 2
    query_buffers: int = 2
    out_chunks: int = 4
    pingpong: bool = True
    maxima: int = 0
    slack: float = 1.0
    long_slack: float = 2.0
    long_keys: int = 8192
    held_columns: int = 32
    opaque: bool = True
    num_blocks: int = 132
    section_bytes: int = 32 << 20
    q_registers: bool = False

    @property
    def block_q(self) -> int:
        return ROWS * self.warpgroups

    @property
    def registers(self) -> tuple[int, int]:
        """Registers a thread of the compute warpgroups and of the loading one; 65,536 in all."""
        return (160, 32) if self.warpgroups == 3 else (240, 24)


class Buffer(NamedTuple):
    """A buffer of shared memory, in elements of the spec's type."""

    shape: tuple[int, ...]


def chunks(dim: int) -> int:
    """Chunks of 64 columns that hold `dim` columns."""
    return tiles.cdiv(dim, CHUNK)


def forward_buffers(spec: AttentionSpec, schedule: ForwardSchedule) -> dict[str, Buffer]:
    """Every buffer of the forward kernel, by name: (slots, chunks, rows, 64); out: (warpgroups, chunks, 64, 64)."""
    s = schedule
    out = {"out": Buffer((s.warpgroups, min(s.out_chunks, chunks(spec.d_v)), ROWS, CHUNK))} if s.out_chunks else {}
    return {"q": Buffer((s.query_buffers, chunks(spec.d), s.block_q, CHUNK)),
            "k": Buffer((s.num_stages, chunks(spec.d), s.block_kv, CHUNK)),
            "v": Buffer((s.num_stages, chunks(spec.d_v), s.block_kv, CHUNK)), **out}


def smem_bytes(spec: AttentionSpec, schedule: ForwardSchedule) -> int:
    """Shared memory of a block, its barriers included."""
    data = sum(_ALIGNMENT * tiles.cdiv(2 * math.prod(buffer.shape), _ALIGNMENT)
               for buffer in forward_buffers(spec, schedule).values())
    barriers = 2 * schedule.query_buffers + 4 * schedule.num_stages + (schedule.maxima > 0)
    return data + _ALIGNMENT * tiles.cdiv(_BARRIER_BYTES * barriers, _ALIGNMENT)


def forward_problems(spec: AttentionSpec, schedule: ForwardSchedule, smem_limit: int) -> list[str]:
    """Why a schedule cannot run a spec; empty if it can."""
    s, needed = schedule, smem_bytes(spec, schedule)
    registers = (s.block_kv * 3 // 2 + spec.d_v) // 2 + 16 * chunks(spec.d) * s.q_registers
    rules = (
        (s.block_kv % 16 == 0 and 16 <= s.block_kv <= 256, f"{s.block_kv=} must be a multiple of 16 and at most 256"),
        (1 <= s.warpgroups <= 3, f"{s.warpgroups=} must be 1, 2 or 3"),
        (s.num_stages >= 1 and s.query_buffers >= 1, f"{s.num_stages=} and {s.query_buffers=} must be positive"),
        (s.out_chunks > 0 or chunks(spec.d_v) <= chunks(spec.d), f"{s.out_chunks=} needs d_v no wider than d"),
        (registers + 32 <= s.registers[0],
         f"scores, weights and accumulator need about {registers + 32} registers a thread, there are {s.registers[0]}"),
        (s.held_columns % 16 == 0 and 0 <= s.held_columns <= s.block_kv,
         f"{s.held_columns=} must be a multiple of 16 and at most {s.block_kv=}"),
        (s.maxima == 0 or spec.dtype == jnp.bfloat16,
         f"{s.maxima=} needs weights in bfloat16: {spec.dtype} cannot hold large ones"),
        (s.maxima != 1, f"{s.maxima=} must be 0 or at least 2: step 1 takes the maximum"),
        (s.maxima == 0 or s.block_kv >= ROWS,
         f"{s.maxima=} needs {s.block_kv=} of at least {ROWS}: a row meets its first key in the first two steps"),
        (needed <= smem_limit, f"needs {needed} bytes of shared memory, there are {smem_limit}"),
    )
    return [problem for holds, problem in rules if not holds]


def default_forward(spec: AttentionSpec, num_sms: int = 132) -> ForwardSchedule:
    """The schedule of a spec: a table by head size.

    Up to 64, 128 and 256, and 192 with values of 128: measured, docs/notes/hopper_forward.md, 2026-11-22 and
    2026-11-25 (`maxima` and sections too); others up to 192: by analogy.
    """
    widest, over_query = max(spec.d, spec.d_v), 2 < chunks(spec.d_v) <= chunks(spec.d)
    narrow_values = chunks(spec.d_v) <= 2
    rows = (
        (64, ForwardSchedule(block_kv=128, warpgroups=3, held_columns=0)),
        (128, ForwardSchedule(block_kv=128, q_registers=True)),
        (192, ForwardSchedule(block_kv=128, query_buffers=1, out_chunks=1) if narrow_values else
              ForwardSchedule(block_kv=96, query_buffers=1, out_chunks=0 if over_query else 2)),
        (256, ForwardSchedule(block_kv=64, query_buffers=1, out_chunks=2, slack=0.75)),
    )
    schedule = next(schedule for limit, schedule in rows if widest <= limit)
    maxima = _default_maxima(spec, schedule) if schedule.block_kv == 128 else 0
    # 16 MiB of keys stay in L2, 32 do not, where there are many queries and outputs to a key between two uses of it:
    # in short sequences, and in somewhat longer ones where each query tile walks over all keys of a section.
    short = spec.kv_len <= _SHORT_SEQUENCE or (spec.kv_len <= 2 * _SHORT_SEQUENCE and _is_uniform(spec, schedule))
    section_bytes = schedule.section_bytes // 2 if short else schedule.section_bytes
    return dataclasses.replace(schedule, num_blocks=num_sms, maxima=maxima, section_bytes=section_bytes)


@functools.lru_cache(maxsize=256)
def _is_uniform(spec: AttentionSpec, schedule: ForwardSchedule) -> bool:
    """Whether all query tiles walk over the same key tiles."""
    if spec.q_len == 0:
        return True
    return all(np.unique(end).size == 1 for end in kv_range(spec, schedule, np.arange(q_tiles(spec, schedule))))


@functools.lru_cache(maxsize=256)
def _default_maxima(spec: AttentionSpec, schedule: ForwardSchedule) -> int:
    """How often the row maximum is taken. Never looking pays where rows walk over many tiles; where there are short
    rows too, the output's error is theirs, and the long ones may round a little more.
    """
    if spec.q_len == 0:
        return 0
    start, *_, stop = _every_row_block(spec, schedule)
    shortest, longest = np.min(stop - start), np.max(stop - start)
    if spec.dtype != jnp.bfloat16 or longest * schedule.block_kv <= _SHORT_ROWS:
        return 0
    pos = np.arange(spec.q_len)
    last = np.broadcast_to(np.minimum(spec.mask.kv_bounds(pos, pos + 1).hi, spec.kv_len), pos.shape) - 1
    if np.any((last >= 0) & (last // schedule.block_kv < stop[pos // ROWS] - 2)):
        return 0  # a row that meets its first key late, where nobody looks, would be given up
    return 2 if 4 * shortest <= longest else 4


@functools.lru_cache(maxsize=256)
def forward_mask(spec: AttentionSpec, schedule: ForwardSchedule) -> masks.Mask:
    """The spec's mask, and the keys' end where the last key tile is ragged and the mask lets some query reach past it.

    Rows past the last query need no mask: they are never stored.
    """
    first = np.arange(0, spec.q_len, ROWS)
    reach = np.max(spec.mask.kv_bounds(first, np.minimum(first + ROWS, spec.q_len)).hi)
    if spec.kv_len % schedule.block_kv == 0 or reach <= spec.kv_len:
        return spec.mask
    return spec.mask & masks.InBounds(kv_len=spec.kv_len)


def q_tiles(spec: AttentionSpec, schedule: ForwardSchedule) -> int:
    """Query tiles of a sequence."""
    return tiles.cdiv(spec.q_len, schedule.block_q)


def kv_range(spec: AttentionSpec, schedule: ForwardSchedule, q_tile: Any) -> tuple[Any, Any]:
    """The key tiles [lo, hi) that a query tile loads: at least one, so that rows without keys are written too."""
    rows = tiles.interval(q_tile, schedule.block_q, spec.q_len)
    needed = tiles.kv_tiles(forward_mask(spec, schedule), rows, schedule.block_kv, spec.kv_len)
    lo = masks.minimum(needed.start, tiles.cdiv(spec.kv_len, schedule.block_kv) - 1)
    return lo, masks.maximum(needed.stop, lo + 1)


def row_tiles(spec: AttentionSpec, schedule: ForwardSchedule, q_tile: Any, warpgroup: Any) -> tiles.TileRange:
    """The key tiles that one warpgroup's 64 rows of a query tile need: at least one, inside the query tile's
    `kv_range`. Rows past the last query walk with the last real ones: a mask is asked about real intervals only.
    """
    block, real = q_tile * schedule.warpgroups + warpgroup, tiles.cdiv(spec.q_len, ROWS)
    if real % schedule.warpgroups:
        block = masks.minimum(block, real - 1)
    needed = tiles.kv_tiles(forward_mask(spec, schedule), tiles.interval(block, ROWS, spec.q_len), schedule.block_kv,
                            spec.kv_len)
    lo, hi = kv_range(spec, schedule, q_tile)
    stop = masks.minimum(masks.maximum(needed.stop, lo + 1), hi)
    start = masks.maximum(masks.minimum(needed.start, stop - 1), lo)
    return tiles.TileRange(start, needed.full_start, needed.full_stop, stop)


class Steps(NamedTuple):
    """What some row block of a problem meets, so that the kernel leaves out what none does.

    Key tiles are walked from the last to the first. `first_masked`: the tile walked first may be partial;
    `later_masked`: one of the others; `skips_above`, `skips_below`: a warpgroup does not need the query tile's last,
    first key tiles.
    """

    first_masked: bool
    later_masked: bool
    skips_above: bool
    skips_below: bool


def _every_row_block(spec: AttentionSpec, schedule: ForwardSchedule) -> tuple[np.ndarray, ...]:
    """`row_tiles` of all blocks of 64 rows."""
    q_tile = np.repeat(np.arange(q_tiles(spec, schedule)), schedule.warpgroups)
    needed = row_tiles(spec, schedule, q_tile, np.arange(q_tile.size) % schedule.warpgroups)
    return tuple(np.broadcast_to(x, q_tile.shape) for x in needed)


@functools.lru_cache(maxsize=256)
def steps(spec: AttentionSpec, schedule: ForwardSchedule) -> Steps:
    """Asks the mask about every block of rows."""
    start, full_start, full_stop, stop = _every_row_block(spec, schedule)
    q_tile = np.repeat(np.arange(q_tiles(spec, schedule)), schedule.warpgroups)
    lo, hi = (np.broadcast_to(x, q_tile.shape) for x in kv_range(spec, schedule, q_tile))
    first, others = stop - 1, stop - 1 > start
    return Steps(
        first_masked=bool(np.any((first >= full_stop) | (first < full_start))),
        later_masked=bool(np.any(others & ((start < full_start) | (first - 1 >= full_stop)))),
        skips_above=bool(np.any(stop < hi)), skips_below=bool(np.any(start > lo)))


@functools.lru_cache(maxsize=64)
def forward_table(spec: AttentionSpec, schedule: ForwardSchedule) -> np.ndarray:
    """Which tiles each block works on: (blocks, slots) int32 of flat tile numbers (batch, head, query tile), -1 after
    the last.

    Longest first, in sections of heads whose keys and values stay in L2 together; each tile goes to the block that is
    free first. The last column is -1.
    """
    count = q_tiles(spec, schedule)
    lo, hi = (np.broadcast_to(x, (count,)) for x in kv_range(spec, schedule, np.arange(count)))
    cost = hi - lo + 1.5  # a tile's start and end cost about that many steps
    head_bytes = 2 * spec.kv_len * (spec.d + spec.d_v)
    section = max(1, schedule.section_bytes // max(head_bytes, 1)) * spec.group
    order = scheduling.in_sections(spec.batch * spec.q_heads, section, np.argsort(-cost, kind="stable"))
    return scheduling.table(order, cost[order % count], schedule.num_blocks)
