"""The default schedules: tables by head size, whose rows cite the measurements that put them there."""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_flash.device import Device
from pallas_flash.filled import filled_part
from pallas_flash.kernels.hopper.memory import smem_bytes
from pallas_flash.kernels.hopper.rules import dbias_reasons, may_come_ahead, reasons_against
from pallas_flash.kernels.hopper.schedule import (
    CHUNK,
    ROWS_PER_WARPGROUP,
    BackwardSchedule,
    DbiasSchedule,
    DecodeSchedule,
    DqSchedule,
    Float32BackwardSchedule,
    Float32Schedule,
    ForwardSchedule,
    KvSchedule,
    SplitSchedule,
    WideSchedule,
    chunks,
)
from pallas_flash.kernels.hopper.work import (
    completes_in_runs,
    every_loaded,
    every_q_range,
    every_row_block,
    has_order,
    head_bytes,
    kv_work,
    makespan,
    worst_case,
)
from pallas_flash.kernels.mosaic import mask_score, scores
from pallas_flash.kernels.mosaic.cache_rules import rows
from pallas_flash.kernels.mosaic.mask_bits import has_bits
from pallas_flash.kernels.mosaic.mask_ranges import ids_of
from pallas_flash.kernels.mosaic.mask_rules import kernel_makes
from pallas_flash.kernels.mosaic.traced import is_additive, is_light
from pallas_flash.spec import AttentionSpec
from pallas_flash.tiles import cdiv

__all__ = ["assume", "default_backward", "default_dbias", "default_forward", "default_parts", "has_keys_kernel",
           "has_mask_kernel"]

_SHORT_ROWS = 1280  # keys
_SHORT_SEQUENCE = 1024  # keys
_ROUNDED_BY_BLOCKS = 512  # queries, and keys
_MOST_COLUMNS = 256  # of dk, dv or dq that a warpgroup keeps of 64 rows
_SECTION_HEADS = 16  # query heads
_MOST_SECTION_BYTES = 256 << 20
_WORTH = 1.05  # about what the plain form's zeros, passes over memory and atomics cost, as a factor of its time


type _Schedule = ForwardSchedule | DecodeSchedule | BackwardSchedule

_assumed: contextvars.ContextVar[_Schedule | None] = contextvars.ContextVar("assumed", default=None)


@contextlib.contextmanager
def assume(schedule: _Schedule) -> Iterator[None]:
    """Makes `schedule` the default of its pass, for every spec and device, in this thread: for benchmarks. Programs
    that JAX keeps have the schedules that they were traced with: call `jax.clear_caches` before and after.
    """
    token = _assumed.set(schedule)
    try:
        yield
    finally:
        _assumed.reset(token)


def default_forward(spec: AttentionSpec, device: Device) -> ForwardSchedule | DecodeSchedule:
    """Returns the forward's schedule of a spec, from a table by head size.

    Measured up to 64, 128 and 256, and 192 with values of 128: docs/notes/hopper_forward.md, 2026-11-22 and 2026-11-25
    (`maxima` and sections too). By analogy: other head sizes up to 192. What fits, not measured: above 256
    (docs/notes/hopper_features.md, 2026-11-29), and float32 (2026-11-30).
    """
    spec = mask_score.hiding(spec)
    if filled_part(spec.mask) is not None:
        return _default_decode(spec, device)
    if isinstance(assumed := _assumed.get(), ForwardSchedule):
        return assumed
    if spec.dtype == jnp.float32:
        return Float32Schedule(num_blocks=device.num_sms)
    widest, over_query = max(spec.d, spec.d_v), 2 < chunks(spec.d_v) <= chunks(spec.d)
    narrow_values = chunks(spec.d_v) <= 2
    # Registers: a bias of keys needs a few more than the kernels for 64 with a soft cap (160 a thread, of three
    # warpgroups) and for 128 (240, 64 of them queries) have left, one of pairs than those for 64 without one; they
    # would be spilled in the loop.
    # A score function that is not light may need any number: up to 460 bytes in the loop of the one for 64.
    completed = spec.bias is not None or spec.score is not None
    many = (_is_tight(spec) and spec.bias is not None) or not is_light(spec.score)
    rows = (
        (64, ForwardSchedule(block_kv=128, warpgroups=2 if many else 3, held_columns=0)),
        (128, ForwardSchedule(block_kv=128, q_registers=not completed or scores.is_far(spec))),
        (192, ForwardSchedule(block_kv=128, query_buffers=1, out_chunks=1) if narrow_values else
              ForwardSchedule(block_kv=96, query_buffers=1, out_chunks=0 if over_query else 2)),
        (256, ForwardSchedule(block_kv=64, query_buffers=1, out_chunks=2, slack=0.75)),
        (320, ForwardSchedule(block_kv=64, query_buffers=1, out_chunks=0, slack=0.75)),
        (384, ForwardSchedule(block_kv=32 if has_bits(spec.mask) else 48, query_buffers=1, out_chunks=0)),
        (512, ForwardSchedule(block_kv=32, query_buffers=1, out_chunks=0)),
    )
    schedule = next(schedule for limit, schedule in rows if widest <= limit)
    # With arrays of a mask, bounded scores spill: 28 bytes at 128, 4 of them in the loop at 64.
    bounded = scores.are_bounded(spec) and not jax.tree.leaves(spec.mask)
    maxima = _default_maxima(spec, schedule) if schedule.block_kv == 128 and not bounded else 0
    # 16 MiB of keys stay in L2, 32 do not, where there are many queries and outputs to a key between two uses of it:
    # in short sequences, and in somewhat longer ones where each query tile walks over all keys of a section.
    short = spec.kv_len <= _SHORT_SEQUENCE or (spec.kv_len <= 2 * _SHORT_SEQUENCE and _is_uniform(spec, schedule))
    section_bytes = schedule.section_bytes // 2 if short else schedule.section_bytes
    chosen = dataclasses.replace(schedule, num_blocks=device.num_sms, maxima=maxima, bounded=bounded,
                                 section_bytes=section_bytes)
    return _with_bias_ring(spec, chosen, device)


def _with_bias_ring(spec: AttentionSpec, schedule: ForwardSchedule, device: Device) -> ForwardSchedule:
    """Returns the schedule with a ring of two tiles of a bias of pairs, if there is one in 16 bits and the ring fits:
    with one query buffer, and the output over it, where it must.
    """
    if not _has_bias_of_pairs(spec):
        return schedule
    candidates = (dataclasses.replace(schedule, bias_slots=2),
                  dataclasses.replace(schedule, bias_slots=2, query_buffers=1, out_chunks=0))
    return next((s for s in candidates if not reasons_against(spec, s, device.smem_bytes)), schedule)


def has_mask_kernel(spec: AttentionSpec) -> bool:
    """Whether another runtime than XLA launches what makes the arrays that are read of a mask's. XLA makes them itself
    in as little time (docs/notes/hopper_features.md, 2026-11-30); PyTorch would in dozens of small kernels.
    """
    return spec.dtype != jnp.float32 and kernel_makes(spec)


def has_keys_kernel(spec: AttentionSpec) -> bool:
    """Whether another runtime than XLA launches what makes dropout's keys: PyTorch would in 120 small kernels."""
    return bool(spec.dropout_rate) and not spec.dropout_moved


def _default_decode(spec: AttentionSpec, device: Device) -> DecodeSchedule:
    """Returns the schedule of a spec whose keys are in a cache: queries in registers up to 192, where they and the
    accumulator fit; and as many stages as fit, up to 6.

    Measured: heads of 64, 128 and 256, docs/notes/hopper_decode.md, 2026-11-30. By analogy: the others.
    """
    if isinstance(assumed := _assumed.get(), DecodeSchedule):
        return assumed
    # A bias needs as many registers again as scores: in tiles of 64 keys, 136 bytes were spilled; and what converts
    # keys of eight bits 36: those alone of which 32 are no whole number of conversions, of 224 columns say.
    needs_more = spec.bias is not None or spec.cache_scales is not None
    base = _of_long_runs(spec, device)
    most = _most_workers(spec, base, device)
    candidates = (
        dataclasses.replace(base, block_kv=block_kv, q_registers=held, num_stages=stages, workers=workers)
        for block_kv in ([32] if needs_more and spec.d_v > 192 else []) + [DecodeSchedule.block_kv]
        for workers in range(most, 0, -1)
        for held in ([True, False] if spec.d <= 192 else [False])
        for stages in range(DecodeSchedule.num_stages, 0, -1))
    return next(schedule for schedule in candidates if not reasons_against(spec, schedule, device.smem_bytes))


_LONG_RUN = 32
"""Tiles of a block from which on its loads are so far ahead that all others wait behind them."""


def _has_long_runs(spec: AttentionSpec, device: Device) -> bool:
    """Whether each block has `_LONG_RUN` tiles or more if the cache is full."""
    tiles = spec.batch * spec.kv_heads * cdiv(spec.kv_len, DecodeSchedule.block_kv)
    return tiles >= _LONG_RUN * device.num_sms


def _has_many_rows(spec: AttentionSpec) -> bool:
    """Whether a partial result is more than what is loaded of it at a time."""
    return rows(spec) * spec.d_v > 512


def _of_long_runs(spec: AttentionSpec, device: Device) -> DecodeSchedule:
    """A decoding schedule, of which some fields hold where a full cache gives each worker many tiles: nobody waits for
    the queries of the next segment, nor to combine the last one unless there are so many that to find them again takes
    longer. Of few queries, each warp computes the weights of its own keys.
    """
    schedule, heads = DecodeSchedule(num_blocks=device.num_sms), spec.batch * spec.kv_heads
    if not _has_long_runs(spec, device):
        return schedule
    schedule = dataclasses.replace(schedule, query_slots=2 if may_come_ahead(spec) else 0,
                                   combines_late=heads <= 2 * device.num_sms)
    if _has_many_rows(spec):
        schedule = dataclasses.replace(schedule, pieces_at_once=4, parts_at_once=2)
    is_few = 4 * rows(spec) <= ROWS_PER_WARPGROUP and spec.bias is None and max(spec.d, spec.d_v) <= 128
    return dataclasses.replace(schedule, bands=4 if schedule.combines_late and is_few else 1)


def _most_workers(spec: AttentionSpec, base: DecodeSchedule, device: Device) -> int:
    """The compute warpgroups of a block of decoding, if shared memory has room for them and their stages.

    Of eight bits, what one converts and computes takes longer than to read them: two; in long runs at d = d_v = 64,
    where a tile is read in 0.24 us and a step takes 0.8 us, three.

    In 16 bits one keeps up, but not where a segment begins or ends. In long runs a second one reads on meanwhile, with
    half of what is in flight, three stages of 32 KB each. Not where a head has more partial results, of two workers
    an SM, than are loaded together; for few queries and without a bias, as it was measured.
    """
    is_long, heads = _has_long_runs(spec, device), spec.batch * spec.kv_heads
    if spec.cache_scales is not None:
        return 3 if is_long and spec.d == spec.d_v == CHUNK else 2
    is_like_measured = chunks(spec.d) + chunks(spec.d_v) == 4 and spec.bias is None and not _has_many_rows(spec)
    parts = cdiv(2 * device.num_sms, heads) + 1
    return 2 if is_long and is_like_measured and parts <= base.parts_at_once else 1


@functools.lru_cache(maxsize=256)
def _is_uniform(spec: AttentionSpec, schedule: ForwardSchedule) -> bool:
    """Whether all query tiles walk over the same key tiles."""
    if spec.q_len == 0:
        return True
    return all(np.unique(end).size == 1 for end in every_loaded(spec, schedule))


@functools.lru_cache(maxsize=256)
def _default_maxima(spec: AttentionSpec, schedule: ForwardSchedule) -> int:
    """Returns `ForwardSchedule.maxima`: how often the row maximum is taken. Taking it rarely pays where rows walk over
    many tiles. Where there are short rows too, the output's error is theirs, and the long ones may round a little more.
    """
    # Of arrays, and of what a bias hides, nothing is known: a row may meet its first key at any step.
    if spec.q_len == 0 or spec.mask.has_arrays or spec.bias is not None or spec.score is not None:
        return 0
    start, *_, stop = (x[:cdiv(spec.q_len, ROWS_PER_WARPGROUP)] for x in every_row_block(spec, schedule))
    shortest, longest = np.min(stop - start), np.max(stop - start)
    if spec.dtype != jnp.bfloat16 or longest * schedule.block_kv <= _SHORT_ROWS:
        return 0
    pos = np.arange(spec.q_len)
    stops = worst_case(spec, schedule).kv_bounds(pos, pos + 1).hi
    last = np.broadcast_to(np.minimum(stops, spec.kv_len), pos.shape) - 1
    if np.any((last >= 0) & (last // schedule.block_kv < stop[pos // ROWS_PER_WARPGROUP] - 2)):
        return 0  # a row that meets its first key at a step without a maximum would be given up
    return 2 if 4 * shortest <= longest else 4


def default_backward(spec: AttentionSpec, device: Device) -> BackwardSchedule:
    """Returns the backward's schedule of a spec, from a table by head size.

    Heads of 64 and 128 take the fused form: `ordered` if gradients are to repeat, and also where that saves more time
    in passes over memory than blocks spend waiting: in sequences that are not long, if there are many tiles. Two
    kernels where the fused form does not exist, or where gradients are to repeat and the mask gives no order.

    Measured: docs/notes/hopper_backward.md, 2026-11-24 and 2026-11-25. By analogy: head sizes between the table's.
    """
    spec = mask_score.hiding(spec)
    if isinstance(assumed := _assumed.get(), BackwardSchedule):
        return assumed
    if max(spec.d, spec.d_v) > _MOST_COLUMNS:
        dk, dv, dq = (_default_wide(spec, device, makes) for makes in ("dk", "dv", "dq"))
        return BackwardSchedule(dk, dq, dv)
    fused = _default_fused(spec, device) if _may_be_fused(spec) else None
    if fused is not None:
        return BackwardSchedule(fused)
    two = Float32BackwardSchedule() if spec.dtype == jnp.float32 else _default_two_kernels(spec)
    assert isinstance(two.dq, DqSchedule)
    return dataclasses.replace(two, kv=dataclasses.replace(two.kv, num_sms=device.num_sms),
                               dq=dataclasses.replace(two.dq, num_sms=device.num_sms))


def default_parts(spec: AttentionSpec, device: Device) -> KvSchedule | None:
    """The schedule of the backward of parts that add to the same sums of dq (`merging`); None: there is none. The sums
    are not `ordered`.
    """
    return _plain_fused(spec, device) if _may_be_fused(spec) else None


def _may_be_fused(spec: AttentionSpec) -> bool:
    """Whether there is a fused form, and it spills no registers."""
    # In the loop: with 128, 208 bytes with soft cap and dropout, 28 with a bias of keys, 104 with that and a soft cap;
    # with 64 or 128, 52 to 96 with a bias of pairs from global memory, and 8 to 324 with a score function that is not
    # light, or beside a soft cap.
    capped_with_dropout = spec.softcap is not None and spec.dropout_rate > 0
    biased = (spec.d == 128 and spec.bias is not None) or _has_bias_of_pairs(spec)
    spills = (spec.d == 128 and capped_with_dropout) or (biased and not _takes_bias_ring(spec))
    spills = spills or not is_light(spec.score) or (spec.score is not None and spec.softcap is not None)
    return max(spec.d, spec.d_v) == spec.d and spec.d in (64, 128) and not spills and spec.dtype != jnp.float32


def _default_wide(spec: AttentionSpec, device: Device, makes: Literal["dk", "dv", "dq"]) -> WideSchedule:
    """Returns the schedule of one of the kernels of heads above 256, of which none was measured: two tiles of what
    stays where they fit, else one, and as many slots as fit beside them, up to 8.
    """
    candidates = (WideSchedule(makes, stages, slots, num_sms=device.num_sms // WideSchedule.cluster)
                  for stages in (2, 1) for slots in range(8, 1, -1))
    return next(schedule for schedule in candidates if smem_bytes(spec, schedule) <= device.smem_bytes)


def default_dbias(spec: AttentionSpec, device: Device) -> DbiasSchedule | None:
    """The default schedule of the kernel of the gradient of a bias of pairs; None where there is none, because the bias
    is another one, or heads are too wide for its tiles: `mosaic.dbias` then walks in plain JAX.
    """
    schedule = DbiasSchedule(num_sms=device.num_sms)
    return None if dbias_reasons(spec, schedule, device.smem_bytes) else schedule


def _default_two_kernels(spec: AttentionSpec) -> BackwardSchedule:
    """Returns the schedule of the form with a kernel for dk and dv, and one for dq."""
    widest, tight = max(spec.d, spec.d_v), _is_tight(spec)
    both = (spec.softcap is not None and _has_bias_of_pairs(spec)) or not is_additive(spec.score)
    few = tight or not is_light(spec.score)  # registers are left
    if widest <= 64:  # where scores take registers: what spills nothing
        return BackwardSchedule(KvSchedule(warpgroups=2 if few else 3, num_stages=4),
                                DqSchedule(warpgroups=2 if both else 3, k_stages=4, v_stages=4, pipelined=True))
    if widest <= 128:
        return BackwardSchedule(SplitSchedule() if tight else KvSchedule(), DqSchedule(k_stages=4, pipelined=True))
    v_stages = 1 if chunks(spec.d) + chunks(spec.d_v) > 6 else 2
    completed = spec.bias is not None or spec.score is not None
    narrow = 32 if has_bits(spec.mask) or completed else 48  # bits come in words of 32 keys
    return BackwardSchedule(SplitSchedule(), DqSchedule(block_kv=narrow if few and v_stages == 1 else 64,
                                                        v_stages=v_stages))


def _has_bias_of_pairs(spec: AttentionSpec) -> bool:
    return spec.bias is not None and spec.bias.shape[2] > 1


def _is_tight(spec: AttentionSpec) -> bool:
    """Whether scores need more registers than products alone: for a soft cap, a bias of pairs, or a score function with
    a derivative of its own.
    """
    return spec.softcap is not None or _has_bias_of_pairs(spec) or not is_additive(spec.score)


def _default_fused(spec: AttentionSpec, device: Device) -> KvSchedule | None:
    """Returns the fused form for heads of 64 or 128; None if gradients are to repeat and the mask gives no order."""
    plain = _plain_fused(spec, device)
    ordered = _in_order(plain, spec.kv_len)
    if (spec.deterministic or _is_worth_waiting(spec, ordered, plain)) and has_order(spec, ordered):
        return dataclasses.replace(ordered, rounds_dq=_may_round_dq(spec, ordered))
    if spec.deterministic:
        return None
    return dataclasses.replace(plain, paired=_may_pair(spec), first_writes=_saves_zeros(spec))


def _saves_zeros(spec: AttentionSpec) -> bool:
    """Whether the first block to add to a query tile of dq writes it, which saves zeros and a pass over them: 1.03 to
    1.05 times as fast with documents; beside a bias of pairs no gain was seen (H200, docs/notes/hopper_features.md,
    2026-11-30). Not timed beside other biases and score functions; with dropout, d 128, ptxas would spill 8 bytes.
    """
    return spec.mask.has_arrays and spec.bias is None and spec.score is None and not spec.dropout_rate


def _may_pair(spec: AttentionSpec) -> bool:
    """Whether steps of the fused form that add in any order are paired: in heads of 128, where scores meet nothing but
    a mask of positions.

    Measured: docs/notes/hopper_backward.md, 2026-11-30, causal, S 4,096 and 16,384. By analogy: other masks, float16.
    """
    more = spec.bias is not None or spec.score is not None or spec.mask.has_arrays
    return spec.d == 128 and spec.softcap is None and not spec.dropout_rate and not spec.partial and not more


def _may_round_dq(spec: AttentionSpec, ordered: KvSchedule) -> bool:
    """Whether blocks round the sums of dq that they complete: in short sequences, where that takes less time than one
    more kernel, which reads all sums from memory. In longer ones too many are completed by the blocks that end last.

    Measured: docs/notes/hopper_backward.md, 2026-11-30, S 512 to 2,048. By analogy: shorter ones.
    """
    short = max(spec.q_len, spec.kv_len) <= _ROUNDED_BY_BLOCKS
    # With a soft cap, 128 spills 4 bytes (ptxas 13.5).
    return short and spec.softcap is None and not spec.partial and completes_in_runs(spec, ordered)


def _takes_bias_ring(spec: AttentionSpec) -> bool:
    """Whether tiles of a bias of pairs come with the queries of the fused form, and it spills no registers: with 128
    and segment ids 12 bytes, in the loop; a soft cap and dropout were not tried.
    """
    more = spec.softcap is not None or spec.dropout_rate or spec.score is not None
    return scores.is_far(spec) and not more and (spec.d == 64 or ids_of(spec.mask) is None)


def _plain_fused(spec: AttentionSpec, device: Device) -> KvSchedule:
    """Returns the fused form in which blocks add to dq in any order."""
    ring = _takes_bias_ring(spec)
    num_sms, capped = device.num_sms, spec.softcap is not None
    if spec.d == 64:
        plain = KvSchedule(num_stages=4, dq="own", dq_slots=2, pipelined=not capped, pinned=False, num_sms=num_sms,
                           bias_ring=ring)
        # Others have no registers left; nor has a kernel without a mask, with ptxas 13.5 (12 bytes), nor one whose keys
        # are opaque (4 bytes in the loop). Of a bias or a score function, what it hides is an array of the mask by the
        # time a kernel is made (`bias.hiding`).
        reads_arrays = spec.mask.has_arrays or spec.bias is not None or spec.score is not None
        may_hold = not (capped or spec.dropout_rate or reads_arrays) and bool(kv_work(spec, plain).partial)
        return dataclasses.replace(plain, held="k", opaque=False) if may_hold else plain
    # Unpinned it would spill with a soft cap.
    plain = KvSchedule(dq="shared", dq_slots=1 if ring else 2, pinned=capped, apart=True, num_sms=num_sms,
                       bias_ring=ring)
    return _with_long_sections(spec, plain) if spec.mask.has_arrays else plain


def _with_long_sections(spec: AttentionSpec, plain: KvSchedule) -> KvSchedule:
    """Returns the schedule with sections of 16 query heads, of at most 256 MiB, where these are more.

    What a block has to do is known at run time alone, so the longest are not first; but each key tile comes in all
    heads of a section before the next one does, so documents end together. Their blocks walk in step, so L2 need not
    hold the section. Measured with documents of 1,024, ragged ones and one of 16,384, d 128:
    docs/notes/hopper_features.md, 2026-11-30.
    """
    wanted = min(_SECTION_HEADS * head_bytes(spec, plain), _MOST_SECTION_BYTES)
    return dataclasses.replace(plain, section_bytes=max(plain.section_bytes, wanted))


def _in_order(plain: KvSchedule, kv_len: int) -> KvSchedule:
    """Returns the `ordered` schedule that corresponds to a plain one.

    L2 does not hold what the blocks of a large section share; in a small one more blocks of a head are at work at a
    time, and wait for each other. Blocks in ascending order walk in step, and share what they read, but each waits for
    the one before it; in long sequences that is little beside a block's length. Measured:
    docs/notes/hopper_backward.md, 2026-11-25.
    """
    mebibytes, longest_last = (16, 2) if kv_len <= 1024 else (32, 2) if kv_len <= 4096 else (64, 4)
    return dataclasses.replace(plain, ordered=True, longest_last=longest_last, section_bytes=mebibytes << 20)


@functools.lru_cache(maxsize=256)
def _is_worth_waiting(spec: AttentionSpec, ordered: KvSchedule, plain: KvSchedule) -> bool:
    """Whether `ordered` costs little: the blocks that add to a query tile, one after the other, are done before all
    others are (an addition takes about as long as two steps), and the SMs are hardly more idle than with the longest
    blocks first.
    """
    needed = every_q_range(spec, ordered)
    steps = (needed.stop - needed.start).sum() * spec.batch * spec.q_heads
    return (spec.kv_len <= 2048 and bool(steps >= 2 * needed.start.size * plain.num_sms)
            and makespan(spec, ordered) <= _WORTH * makespan(spec, plain))
