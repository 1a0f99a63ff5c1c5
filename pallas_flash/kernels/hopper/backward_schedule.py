"""How fast, never what, for the backward: forms, tile sizes, pipeline depths; which are legal, and the defaults.

Two forms. Fused: one kernel walks the query tiles of each key tile, keeps dk and dv in registers and adds its part of
dq to float32 memory; five products a tile; the order of those additions is the machine's, or `ordered`. Two kernels: dk
and dv from key tiles, dq from query tiles; seven products, no memory of its own, and the same bits on every run. No
Mosaic in here.
"""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from pallas_flash import device, masks, tiles
from pallas_flash.kernels.hopper.schedule import CHUNK, ROWS, chunks
from pallas_flash.kernels.mosaic import scheduling
from pallas_flash.spec import AttentionSpec

__all__ = [
    "BackwardSchedule", "DqSchedule", "KvSchedule", "SplitSchedule", "backward_problems", "default_backward",
    "dq_work", "kv_work", "makespan", "may_have_idle_queries", "smem_bytes",
]

_ALIGNMENT = 1024
_BLOCK_STEPS = 1.5  # a block's start and end cost about that many steps
_WORTH = 1.05  # what zeros, their passes and the plain form's atomics cost, about
_BARRIER_BYTES = 8
_FILE_REGISTERS = 512  # of a thread of each warpgroup together: 65,536 / 128


@dataclasses.dataclass(frozen=True)
class KvSchedule:
    """dk and dv, and dq in the fused form: each compute warpgroup keeps dk and dv of 64 keys in registers.

    Attributes:
      block_q: queries of a tile: 64 or 128.
      warpgroups: compute warpgroups, of 64 keys each.
      num_stages: slots of the ring of query and dout tiles.
      dq: who multiplies dS with the keys: "none" (dq has a kernel of its own), "shared" (the compute warpgroups, one
        64 x 64 piece each, one step later, so that they need not meet), or "own" (one more warpgroup).
      ds_slots: slots of the buffer through which dS goes to that product.
      dq_slots: slots of the buffer through which dq goes to memory (`backward.ordered_dq`).
      ordered: the blocks of a head add to dq in one order, so that gradients repeat bit by bit.
      longest_last: if `ordered`, and the first key tiles have the longest blocks, how many eighths of the tiles come
        last, in ascending order.
      order: "in turn": each step ends with its dk and dv; "behind": they are multiplied during the next tile's softmax.
      pinned, opaque: `ptx.pin` behind the exponentials; index keys and values through `ptx.opaque`.
      apart: tiles that need a mask, or exact exponents, have exponentials of their own: no branch stands between the
        exponents and the exponentials of the others.
      section_bytes: what the heads that are worked on at a time may have of q, dout and dq, so that it stays in L2.
    """

    block_q: int = 64
    warpgroups: int = 2
    num_stages: int = 2
    dq: Literal["none", "shared", "own"] = "none"
    ds_slots: int = 2
    dq_slots: int = 1
    ordered: bool = False
    longest_last: int = 2
    order: Literal["in turn", "behind"] = "in turn"
    pinned: bool = True
    opaque: bool = True
    apart: bool = False
    section_bytes: int = 32 << 20

    @property
    def block_kv(self) -> int:
        return ROWS * self.warpgroups

    @property
    def registers(self) -> tuple[int, ...]:
        """Registers a thread of a compute warpgroup, of that of dq where there is one, and of the loading one."""
        if self.dq == "own":
            return (208, 72, 24) if self.warpgroups == 2 else (144, 56, 24)
        return (160, 32) if self.warpgroups == 3 else (240, 24)


@dataclasses.dataclass(frozen=True)
class SplitSchedule:
    """dk and dv of wide heads: one warpgroup keeps dv of 64 keys, another dk; the first hands P to the second.

    Attributes:
      num_stages: slots of the ring of query and dout tiles (64 queries each).
      p_slots: slots of the buffer through which P goes.
      section_bytes: see `KvSchedule`.
    """

    num_stages: int = 2
    p_slots: int = 2
    section_bytes: int = 32 << 20

    block_q = 64
    block_kv = ROWS
    warpgroups = 2
    dq = "none"
    ordered = False
    longest_last = 0
    pinned = False
    apart = False
    registers = (240, 24)


@dataclasses.dataclass(frozen=True)
class DqSchedule:
    """dq in a kernel of its own: each compute warpgroup keeps dq of 64 queries in registers.

    Attributes:
      block_kv: keys of a tile; a multiple of 16.
      warpgroups: compute warpgroups, of 64 queries each.
      k_stages, v_stages: slots of the rings of key tiles and of value tiles.
      behind: a tile's dq is multiplied during the next tile's softmax.
      pinned, opaque: see `KvSchedule`; here the queries and douts are what does not change.
      section_bytes: keys and values that the heads worked on at a time may have.
    """

    block_kv: int = 64
    warpgroups: int = 2
    k_stages: int = 2
    v_stages: int = 2
    behind: bool = False
    pinned: bool = True
    opaque: bool = True
    section_bytes: int = 32 << 20

    @property
    def block_q(self) -> int:
        return ROWS * self.warpgroups

    @property
    def registers(self) -> tuple[int, int]:
        return (160, 32) if self.warpgroups == 3 else (240, 24)


@dataclasses.dataclass(frozen=True)
class BackwardSchedule:
    """`dq` is None in the fused form, where `kv` writes dq too."""

    kv: KvSchedule | SplitSchedule
    dq: DqSchedule | None = None

    @property
    def fused(self) -> bool:
        return self.kv.dq != "none"

    @property
    def padded_q_block(self) -> int:
        """The row statistics are padded to a multiple of this."""
        return math.lcm(self.kv.block_q, 1 if self.dq is None else self.dq.block_q)

    def padded_q(self, spec: AttentionSpec) -> int:
        return tiles.cdiv(spec.q_len, self.padded_q_block) * self.padded_q_block


# -- shared memory -----------------------------------------------------------------------------------------------------

def _tiles(spec: AttentionSpec, s: "KvSchedule | SplitSchedule") -> dict[str, tuple[int, ...]]:
    d, d_v = chunks(spec.d), chunks(spec.d_v)
    return {"q": (s.num_stages, d, s.block_q, CHUNK), "dout": (s.num_stages, d_v, s.block_q, CHUNK),
            "k": (d, s.block_kv, CHUNK), "v": (d_v, s.block_kv, CHUNK)}


def kv_buffers(spec: AttentionSpec, s: KvSchedule) -> dict[str, tuple[int, ...]]:
    """Shapes of the 16-bit buffers: tiles are (chunks, rows, 64)."""
    buffers = _tiles(spec, s)
    if s.dq != "none":
        buffers["ds"] = (s.ds_slots, s.block_q // CHUNK, s.block_kv, CHUNK)
    return buffers


def split_buffers(spec: AttentionSpec, s: SplitSchedule) -> dict[str, tuple[int, ...]]:
    return _tiles(spec, s) | {"p": (s.p_slots, s.block_q // CHUNK, s.block_kv, CHUNK)}


def dq_buffers(spec: AttentionSpec, s: DqSchedule) -> dict[str, tuple[int, ...]]:
    d, d_v = chunks(spec.d), chunks(spec.d_v)
    return {"q": (s.warpgroups, d, ROWS, CHUNK), "dout": (s.warpgroups, d_v, ROWS, CHUNK),
            "k": (s.k_stages, d, s.block_kv, CHUNK), "v": (s.v_stages, d_v, s.block_kv, CHUNK)}


def stats_shape(s: KvSchedule | SplitSchedule) -> tuple[int, ...]:
    """float32: of each query, where the scores and where dP start."""
    return s.num_stages, 2, s.block_q


def dq_pieces(spec: AttentionSpec, s: KvSchedule) -> int:
    """64 x 64 pieces of a tile of dq."""
    return s.block_q // CHUNK * chunks(spec.d)


def dq_acc_shape(spec: AttentionSpec, s: KvSchedule) -> tuple[int, ...]:
    """The float32 sums of the fused form: pieces in the order in which threads hold them, (16, 256) each."""
    q_tiles = tiles.cdiv(spec.q_len, s.block_q)
    return spec.batch, spec.q_heads, q_tiles, dq_pieces(spec, s), 16, 256


def smem_bytes(spec: AttentionSpec, s: KvSchedule | SplitSchedule | DqSchedule) -> int:
    """Shared memory of a block, its barriers included."""
    aligned = lambda size: _ALIGNMENT * tiles.cdiv(size, _ALIGNMENT)
    if isinstance(s, DqSchedule):
        sizes = [2 * math.prod(x) for x in dq_buffers(spec, s).values()]
        barriers = s.warpgroups + 2 * (s.k_stages + s.v_stages)
    elif isinstance(s, SplitSchedule):
        sizes = [2 * math.prod(x) for x in split_buffers(spec, s).values()] + [4 * math.prod(stats_shape(s))]
        barriers = 1 + 4 * s.num_stages + 2 * s.p_slots
    else:
        sizes = [2 * math.prod(x) for x in kv_buffers(spec, s).values()] + [4 * math.prod(stats_shape(s))]
        handed = s.dq_slots * dq_pieces(spec, s) if s.dq != "none" else 0
        sizes += [4 * CHUNK * CHUNK * handed]
        barriers = 1 + 4 * s.num_stages + 2 * (s.ds_slots + handed)
    return sum(aligned(size) for size in sizes) + aligned(_BARRIER_BYTES * barriers)


# -- legality and defaults ---------------------------------------------------------------------------------------------

def _kv_rules(spec: AttentionSpec, s: KvSchedule) -> tuple[tuple[bool, str], ...]:
    held = (spec.d + spec.d_v + 2 * s.block_q) // 2
    whole = spec.d % CHUNK == 0
    return (
        (s.block_q in (64, 128), f"{s.block_q=} must be 64 or 128"),
        (1 <= s.warpgroups <= 3, f"{s.warpgroups=} must be 1, 2 or 3"),
        (s.num_stages in (1, 2, 4), f"{s.num_stages=} must be 1, 2 or 4"),
        (s.ds_slots in (1, 2, 4), f"{s.ds_slots=} must be 1, 2 or 4"),
        (s.dq == "none" or whole, f"{s.dq=} needs d to be a multiple of {CHUNK}, not {spec.d}"),
        (s.dq != "shared" or dq_pieces(spec, s) == s.warpgroups, f"{s.dq=} needs a piece of dq for each warpgroup"),
        (1 <= s.dq_slots <= 3, f"{s.dq_slots=} must be 1, 2 or 3"),
        (s.dq != "shared" or s.ds_slots > 1, f"{s.dq=} needs {s.ds_slots=} to be 2 or 4"),
        (s.dq != "shared" or s.order == "in turn", f"{s.order=} needs another dq"),
        (not s.ordered or s.dq != "none", f"{s.ordered=} needs dq"),
        (0 <= s.longest_last <= 8, f"{s.longest_last=} must be at least 0 and at most 8"),
        (not (s.ordered and s.warpgroups and s.block_q) or has_order(spec, s),
         f"{s.ordered=} needs a mask whose bounds name the key tiles of each query tile, one at least"),
        (s.order != "behind" or s.num_stages > 1, f"{s.order=} needs {s.num_stages=} to be 2 or 4"),
        (held + 16 <= s.registers[0], f"dk, dv and scores need {held} registers a thread of {s.registers[0]}"),
    )


def _split_rules(spec: AttentionSpec, s: SplitSchedule) -> tuple[tuple[bool, str], ...]:
    return ((s.num_stages in (1, 2, 4), f"{s.num_stages=} must be 1, 2 or 4"),
            (s.p_slots in (1, 2, 4), f"{s.p_slots=} must be 1, 2 or 4"),
            (max(spec.d, spec.d_v) <= 256, f"d={spec.d} and d_v={spec.d_v} must be at most 256"))


def _dq_rules(spec: AttentionSpec, s: DqSchedule) -> tuple[tuple[bool, str], ...]:
    held = (spec.d + 2 * s.block_kv) // 2
    return (
        (s.block_kv % 16 == 0 and 16 <= s.block_kv <= 256, f"{s.block_kv=} must be a multiple of 16 and at most 256"),
        (1 <= s.warpgroups <= 3, f"{s.warpgroups=} must be 1, 2 or 3"),
        (s.k_stages >= 1 and s.v_stages >= 1, f"{s.k_stages=} and {s.v_stages=} must be positive"),
        (not s.behind or s.k_stages > 1, f"{s.behind=} needs {s.k_stages=} to be 2 or more"),
        (held + 16 <= s.registers[0], f"dq and scores need {held} registers a thread of {s.registers[0]}"),
    )


def backward_problems(spec: AttentionSpec, schedule: BackwardSchedule, smem_limit: int) -> list[str]:
    """Why a schedule cannot run a spec; empty if it can."""
    kv, dq = schedule.kv, schedule.dq
    rules = [*(_split_rules(spec, kv) if isinstance(kv, SplitSchedule) else _kv_rules(spec, kv)),
             (schedule.fused == (dq is None), "dq must be written by exactly one kernel"),
             (not (schedule.fused and spec.deterministic) or kv.ordered,
              "deterministic gradients need turns, or the form of two kernels")]
    rules += [] if dq is None else _dq_rules(spec, dq)
    for s in (kv, dq):
        if s is not None:
            rules.append(((needed := smem_bytes(spec, s)) <= smem_limit, f"{s} needs {needed} bytes of {smem_limit}"))
    return [problem for holds, problem in rules if not holds]


def default_backward(spec: AttentionSpec) -> BackwardSchedule:
    """The schedule of a spec: a table by head size.

    Heads of 64 and 128 take the fused form: in order if gradients are to repeat, and also where that saves more passes
    over memory than it waits: in sequences that are not long, of which there are many tiles. Two kernels where the
    fused form does not exist, or where gradients are to repeat and the mask gives no order.

    Measured, docs/notes/hopper_backward.md, 2026-11-24 and 2026-11-25; head sizes between the table's: by analogy.
    """
    widest, capped = max(spec.d, spec.d_v), spec.softcap is not None
    if widest == spec.d and spec.d in (64, 128):
        fused = _default_fused(spec, capped)
        if fused is not None:
            return BackwardSchedule(fused)
    if widest <= 64:  # a soft cap takes registers: what is chosen with one is what spills nothing
        return BackwardSchedule(KvSchedule(warpgroups=2 if capped else 3, num_stages=4),
                                DqSchedule(warpgroups=3, k_stages=4, v_stages=4, behind=True))
    if widest <= 128:
        return BackwardSchedule(SplitSchedule() if capped else KvSchedule(), DqSchedule(k_stages=4, behind=True))
    v_stages = 1 if chunks(spec.d) + chunks(spec.d_v) > 6 else 2
    return BackwardSchedule(SplitSchedule(), DqSchedule(block_kv=48 if capped and v_stages == 1 else 64,
                                                        v_stages=v_stages))


def _default_fused(spec: AttentionSpec, capped: bool) -> KvSchedule | None:
    """The fused form for heads of 64 or 128."""
    if spec.d == 64:
        plain = KvSchedule(num_stages=4, dq="own", dq_slots=2, order="in turn" if capped else "behind", pinned=False)
    else:  # unpinned it would spill with a soft cap
        plain = KvSchedule(dq="shared", dq_slots=2, pinned=capped, apart=True)
    ordered = _in_turns(plain, spec.kv_len)
    if (spec.deterministic or _is_worth_waiting(spec, ordered, plain)) and has_order(spec, ordered):
        return ordered
    return None if spec.deterministic else plain


def _in_turns(plain: KvSchedule, kv_len: int) -> KvSchedule:
    """The schedule in turns. L2 does not hold what the blocks of a large section share; in a small one more blocks of a
    head are at work at a time, and wait for each other. Blocks in ascending order walk in step, and share what they
    read, but each waits for the one before it; in long sequences that is little beside its length. Measured,
    docs/notes/hopper_backward.md, 2026-11-25.
    """
    mebibytes, longest_last = (16, 2) if kv_len <= 1024 else (32, 2) if kv_len <= 4096 else (64, 4)
    return dataclasses.replace(plain, ordered=True, longest_last=longest_last, section_bytes=mebibytes << 20)


@functools.lru_cache(maxsize=256)
def _is_worth_waiting(spec: AttentionSpec, ordered: KvSchedule, plain: KvSchedule) -> bool:
    """Whether the blocks of a query tile, which add one after the other, are done before all others are (an addition
    takes about as long as two steps), and the order of turns leaves the SMs hardly more idle than that of lengths.
    """
    q_tiles = _q_ranges(spec, ordered)
    steps = (q_tiles.stop - q_tiles.start).sum() * spec.batch * spec.q_heads
    return (spec.kv_len <= 2048 and bool(steps >= 2 * q_tiles.start.size * device.H100.num_sms)
            and makespan(spec, ordered) <= _WORTH * makespan(spec, plain))


def makespan(spec: AttentionSpec, s: KvSchedule) -> float:
    """Steps until the last block has ended (`scheduling.makespan`)."""
    q_tiles = _q_ranges(spec, s)
    steps = (q_tiles.stop - q_tiles.start) * spec.group + _BLOCK_STEPS
    return scheduling.makespan(kv_work(spec, s), steps, device.H100.num_sms)


# -- which tiles -------------------------------------------------------------------------------------------------------

def kv_mask(spec: AttentionSpec, s: Any) -> masks.Mask:
    """The spec's mask, and where the last key tile is ragged, the keys' end.

    Queries past the end have weights of 0, but NaN where a key is NaN: so also the queries' end, where the last query
    tile is ragged, keys are not cleaned (`backward.nonfinite`), and the mask may leave a key to such queries alone.
    """
    ends = {"kv_len": spec.kv_len} if spec.kv_len % s.block_kv else {}
    keeps_bad_keys = not isinstance(s, DqSchedule) and s.dq == "none"
    if keeps_bad_keys and spec.q_len % s.block_q and not isinstance(spec.mask, masks.Full):
        ends["q_len"] = spec.q_len
    return spec.mask & masks.InBounds(**ends) if ends else spec.mask


@functools.lru_cache(maxsize=256)
def may_have_idle_queries(spec: AttentionSpec) -> bool:
    """Whether the mask's bounds leave room for a query that attends to nothing."""
    pos = np.arange(spec.q_len)
    lo, full_lo, full_hi, hi = (np.broadcast_to(np.clip(x, 0, spec.kv_len), pos.shape)
                                for x in spec.mask.kv_bounds(pos, pos + 1))
    return not np.all(np.maximum(lo, full_lo) < np.minimum(hi, full_hi))


def _work(heads: int, ranges: tiles.TileRange, head_bytes: int, section_bytes: int) -> scheduling.Work:
    """Blocks in sections of about so many bytes."""
    return scheduling.work(heads, ranges, section_bytes // max(head_bytes, 1), device.H100.num_sms)


def q_range(spec: AttentionSpec, s: Any, kv_tile: Any) -> tiles.TileRange:
    """The query tiles that a key tile needs. Not clamped to the real length: the last tile's padding must be masked."""
    return tiles.q_tiles(kv_mask(spec, s), (kv_tile * s.block_kv, (kv_tile + 1) * s.block_kv), s.block_q, spec.q_len)


def kv_range(spec: AttentionSpec, s: Any, q_tile: Any) -> tiles.TileRange:
    """The key tiles that a query tile needs."""
    return tiles.kv_tiles(kv_mask(spec, s), tiles.interval(q_tile, s.block_q, spec.q_len), s.block_kv, spec.kv_len)


def _q_ranges(spec: AttentionSpec, s: Any) -> tiles.TileRange:
    """`q_range` of every key tile, as arrays."""
    count = tiles.cdiv(spec.kv_len, s.block_kv)
    return tiles.TileRange(*(np.broadcast_to(np.asarray(x), (count,)) for x in q_range(spec, s, np.arange(count))))


def _kv_ranges(spec: AttentionSpec, s: Any) -> tiles.TileRange:
    """`kv_range` of every query tile, as arrays."""
    count = tiles.cdiv(spec.q_len, s.block_q)
    return tiles.TileRange(*(np.broadcast_to(np.asarray(x), (count,)) for x in kv_range(spec, s, np.arange(count))))


def turn(spec: AttentionSpec, s: KvSchedule, q_tile: Any, kv_tile: Any) -> Any:
    """How many blocks add to a query tile before that of a key tile, if `ordered`."""
    first, _, _, stop = kv_range(spec, s, q_tile)
    split = kv_work(spec, s).ascending
    return jnp.where(kv_tile >= split, stop - 1 - kv_tile,
                     jnp.maximum(stop - jnp.maximum(first, split), 0) + kv_tile - first)


@functools.lru_cache(maxsize=256)
def has_order(spec: AttentionSpec, s: KvSchedule) -> bool:
    """Whether the key tiles whose blocks come to a query tile are those that the mask's bounds say, and at least one:
    then a block's turn follows from its number.
    """
    q_tiles, (start, _, _, stop) = _q_ranges(spec, s), _kv_ranges(spec, s)
    begin, end = q_tiles.start, np.maximum(q_tiles.start, q_tiles.stop)
    change = np.bincount(begin, minlength=start.size + 1) - np.bincount(end, minlength=start.size + 1)
    count, kv_tile = np.cumsum(change)[:-1], np.arange(begin.size)
    first, last = (sign * tiles.smallest_covering(begin, end, sign * kv_tile, start.size) for sign in (1, -1))
    return bool(np.all((count > 0) & (first == start) & (last == stop - 1) & (count == stop - start)))


@functools.lru_cache(maxsize=256)
def kv_work(spec: AttentionSpec, s: KvSchedule | SplitSchedule) -> scheduling.Work:
    """The blocks of a kernel that keeps key tiles.

    In turns, descending: with a causal mask, or a window, the block of the tile before comes to each query tile later
    by itself. But then the longest blocks may start last, so where they are much longer than others, `longest_last`
    eighths of the tiles come after them, in ascending order.
    """
    q_tiles = _q_ranges(spec, s)
    head_bytes = spec.group * spec.q_len * (2 * (spec.d + spec.d_v) + (4 * spec.d if s.dq != "none" else 0))
    work = _work(spec.batch * spec.kv_heads, q_tiles, head_bytes, s.section_bytes)
    if not s.ordered:
        return work
    length = q_tiles.stop - q_tiles.start
    return work._replace(ascending=work.ascending * s.longest_last // 8 if length.max() >= 1.5 * length.mean() else 0)


@functools.lru_cache(maxsize=256)
def dq_work(spec: AttentionSpec, s: DqSchedule) -> scheduling.Work:
    """The blocks of the kernel that keeps query tiles. A section holds whole groups of heads where it can."""
    head_bytes = 2 * spec.kv_len * (spec.d + spec.d_v) // spec.group
    return _work(spec.batch * spec.q_heads, _kv_ranges(spec, s), head_bytes, s.section_bytes)
