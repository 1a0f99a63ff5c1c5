"""Reasons against a schedule: what the kernels cannot run, or would not fit."""

import dataclasses

import jax.numpy as jnp

from pallas_flash.filled import filled_part
from pallas_flash.kernels.hopper.memory import dq_pieces, smem_bytes
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
from pallas_flash.kernels.hopper.work import completes_in_runs, has_order
from pallas_flash.kernels.mosaic import mask_rules
from pallas_flash.kernels.mosaic.cache_rules import rows
from pallas_flash.kernels.mosaic.mask_bits import BITS, has_bits
from pallas_flash.kernels.mosaic.scores import MOST_BOUNDED, are_bounded
from pallas_flash.padding import UNIT
from pallas_flash.softmax import LOG2E
from pallas_flash.spec import AttentionSpec

__all__ = ["dbias_reasons", "may_come_ahead", "reasons_against"]

AHEAD = 128
"""Bytes of which a copy by TMA takes multiples, in Pallas; slots then begin where TMA writes to."""

CONVERTED = 2048
"""Numbers of eight bits that the threads of a warpgroup convert at a time (`decode.eight_bits`)."""
_Rules = tuple[tuple[bool, str], ...]
"""What must hold, and what is said where it does not."""


def reasons_against(spec: AttentionSpec, schedule: ForwardSchedule | DecodeSchedule | BackwardSchedule,
                    smem_limit: int) -> list[str]:
    """Returns why the kernels cannot run a spec with a schedule; an empty list if they can.

    Args:
      smem_limit: bytes of shared memory that a block may have.
    """
    rules: _Rules
    of_float32 = isinstance(schedule, Float32Schedule | Float32BackwardSchedule)
    if of_float32 != (spec.dtype == jnp.float32):
        return [f"{schedule} is {'only' if of_float32 else 'not'} for float32, dtype is {spec.dtype}"]
    if of_float32:
        rules = _float32_rules(spec, schedule, smem_limit)
    elif filled_part(spec.mask) is not None and not isinstance(schedule, BackwardSchedule):
        rules = _decode_rules(spec, schedule, smem_limit)
    elif isinstance(schedule, DecodeSchedule):
        rules = ((False, f"{schedule} is for keys in a cache"),)
    elif isinstance(schedule, ForwardSchedule):
        rules = _forward_rules(spec, schedule, smem_limit)
    else:
        rules = _backward_rules(spec, schedule, smem_limit)
    return [reason for holds, reason in rules if not holds]


def dbias_reasons(spec: AttentionSpec, s: DbiasSchedule, smem_limit: int) -> list[str]:
    """Returns why the kernel of the gradient of a bias cannot run a spec with a schedule; an empty list if it can.

    Args:
      smem_limit: see `reasons_against`.
    """
    if spec.bias is None or spec.bias.shape[2:] != (spec.q_len, spec.kv_len) or spec.q_len == 1:
        return ["needs a bias of pairs"]
    dims = f"d={spec.d}, d_v={spec.d_v}"
    rules: _Rules = (
        (s.block_kv in (64, 128), f"{s.block_kv=} must be 64 or 128"),
        (s.warpgroups in (1, 2), f"{s.warpgroups=} must be 1 or 2"),
        (s.num_stages >= 2, f"{s.num_stages=} must be 2 or more: queries and douts of a step are there together"),
        (isinstance(spec.batch, int), f"needs a batch size that is a number, batch is {spec.batch}"),
        (spec.dtype.name in ("bfloat16", "float16"), f"needs bfloat16 or float16, dtype is {spec.dtype.name}"),
        (spec.score is None, f"takes no score function, score={spec.score}"),
        (spec.d % UNIT == 0 == spec.d_v % UNIT, f"needs head dimensions that are multiples of {UNIT}, {dims}"),
        (spec.bias.dtype.name in ("bfloat16", "float16", "float32"),
         f"needs a bias in 16 bits or in float32, it is in {spec.bias.dtype}"),
        ((needed := smem_bytes(spec, s)) <= smem_limit,
         f"needs {needed} bytes of shared memory, there are {smem_limit}, {dims}"),
    )
    return [reason for holds, reason in rules if not holds]


def _forward_rules(spec: AttentionSpec, s: ForwardSchedule, smem_limit: int) -> _Rules:
    has_ring = s.bias_slots > 0 and _is_bias_of_pairs_in_16_bits(spec)
    needed = smem_bytes(spec, s if has_ring else dataclasses.replace(s, bias_slots=0))
    registers = (s.block_kv * 3 // 2 + spec.d_v) // 2 + 16 * chunks(spec.d) * s.q_registers
    return (
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
        (s.maxima == 0 or not spec.mask.has_arrays,
         f"{s.maxima=} needs a mask without arrays: with them a row may meet its first key at any step"),
        (s.block_kv % BITS == 0 or not has_bits(spec.mask),
         f"{s.block_kv=} must be a multiple of {BITS} where a mask is dense: its bits come in words"),
        (s.bias_slots >= 0, f"{s.bias_slots=} must not be negative"),
        (s.bias_slots == 0 or (_is_bias_of_pairs_in_16_bits(spec) and s.block_kv % CHUNK == 0),
         f"{s.bias_slots=} needs a bias of pairs in 16 bits, and {s.block_kv=} to be a multiple of {CHUNK}"),
        (not s.bounded or (are_bounded(spec) and s.maxima == 0),
         f"{s.bounded=} needs {s.maxima=} to be 0, bfloat16, and a soft cap of at most {MOST_BOUNDED / LOG2E:.0f} "
         "without a bias or a score function"),
        (s.maxima != 1, f"{s.maxima=} must be 0 or at least 2: step 1 takes the maximum"),
        (s.maxima == 0 or s.block_kv >= ROWS_PER_WARPGROUP,
         f"{s.maxima=} needs {s.block_kv=} of at least {ROWS_PER_WARPGROUP}: a row meets its first key in the first "
         "two steps"),
        (needed <= smem_limit, f"needs {needed} bytes of shared memory, there are {smem_limit}"),
        _mask_rule(spec, s),
    )


def _is_bias_of_pairs_in_16_bits(spec: AttentionSpec) -> bool:
    return spec.bias is not None and spec.bias.shape[2] > 1 and spec.bias.dtype.itemsize == 2


def _mask_rule(spec: AttentionSpec, s: ForwardSchedule | BackwardSchedule) -> tuple[bool, str]:
    return (not s.mask_kernel or mask_rules.kernel_makes(spec),
            f"{s.mask_kernel=} needs a mask with arrays, of intervals, ids and packed sequences, the "
            "same for all heads")


def _float32_rules(spec: AttentionSpec, schedule: ForwardSchedule | DecodeSchedule | BackwardSchedule,
                   smem_limit: int) -> _Rules:
    """Tiles have 64 rows, the unit in which scales are kept; more than two warpgroups have too few registers."""
    parts = (schedule.kv, schedule.dq) if isinstance(schedule, BackwardSchedule) else (schedule,)
    rules: list[tuple[bool, str]] = []
    for s in parts:
        assert isinstance(s, ForwardSchedule | KvSchedule | DqSchedule)
        walked = s.block_q if isinstance(s, KvSchedule) else s.block_kv
        needed = smem_bytes(spec, s)
        rules += [(walked == CHUNK, f"{s} must walk over tiles of {CHUNK} rows, not {walked}"),
                  (1 <= s.warpgroups <= 2, f"{s.warpgroups=} must be 1 or 2"),
                  (not isinstance(s, KvSchedule) or not s.makes_dq, "dq has a kernel of its own"),
                  (needed <= smem_limit, f"{s} needs {needed} bytes of shared memory, there are {smem_limit}")]
    return tuple(rules)


def may_come_ahead(spec: AttentionSpec) -> bool:
    """Whether TMA copies the queries of a key head (`DecodeSchedule.query_slots`)."""
    return rows(spec) * spec.d * spec.dtype.itemsize % AHEAD == 0


def _decode_rules(spec: AttentionSpec, s: ForwardSchedule | DecodeSchedule, smem_limit: int) -> _Rules:
    if isinstance(s, ForwardSchedule):
        return ((False, f"{s} is not for keys in a cache"),)
    needed = smem_bytes(spec, s)
    registers = s.block_kv * 3 // 4 + spec.d_v // 2 + 8 * chunks(spec.d) * 2 * s.q_registers
    return (
        (s.block_kv % 16 == 0 and 16 <= s.block_kv <= 256, f"{s.block_kv=} must be a multiple of 16 and at most 256"),
        (s.num_stages >= 1, f"{s.num_stages=} must be positive"),
        (min(s.parts_at_once, s.pieces_at_once) >= 1,
         f"{s.parts_at_once=} and {s.pieces_at_once=} must be positive"),
        (1 <= s.workers <= 3, f"{s.workers=} must be 1, 2 or 3"),
        (s.cluster in (1, 2, 4, 8, 16) and (s.cluster == 1 or (s.workers == 1 and not s.combines_late)),
         f"{s.cluster=} must be 1, 2, 4, 8 or 16, and 1 if {s.workers=} is not 1 or {s.combines_late=}"),
        (s.query_slots >= 0, f"{s.query_slots=} must not be negative"),
        (s.query_slots == 0 or may_come_ahead(spec),
         f"{s.query_slots=} needs queries of a head of a multiple of {AHEAD} bytes, {rows(spec)=} of d={spec.d}"),
        (s.bands in (1, 2, 4) and s.bands * rows(spec) <= ROWS_PER_WARPGROUP,
         f"{s.bands=} must be 1, 2 or 4, and so many times {rows(spec)} queries at most {ROWS_PER_WARPGROUP}"),
        (s.block_kv % (16 * s.bands) == 0, f"{s.block_kv=} must be a multiple of 16 for each of {s.bands} bands"),
        (spec.cache_scales is None or all(s.block_kv * dim % CONVERTED == 0 for dim in (spec.d, spec.d_v)),
         f"a tile of eight bits must have a multiple of {CONVERTED} numbers, {s.block_kv=}, d={spec.d}, "
         f"d_v={spec.d_v}"),
        (registers + 32 <= s.registers[0],
         f"scores, weights, queries and accumulator need about {registers + 32} registers a thread, there are "
         f"{s.registers[0]}"),
        (needed <= smem_limit, f"needs {needed} bytes of shared memory, there are {smem_limit}"),
    )


def _kv_rules(spec: AttentionSpec, s: KvSchedule) -> _Rules:
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
        (set(s.held) <= set("kv"), f"{s.held=} must name keys (k) or values (v)"),
        (s.dq != "shared" or s.ds_slots > 1, f"{s.dq=} needs {s.ds_slots=} to be 2 or 4"),
        (s.dq != "shared" or not s.pipelined, f"{s.pipelined=} needs another dq"),
        (s.dq == "shared" or not s.paired, f"{s.paired=} needs {s.dq=} to be shared"),
        (not s.ordered or s.dq != "none", f"{s.ordered=} needs dq"),
        (not s.first_writes or (s.dq != "none" and not s.ordered), f"{s.first_writes=} needs dq, and no order"),
        (0 <= s.longest_last <= 8, f"{s.longest_last=} must be at least 0 and at most 8"),
        (not s.bias_ring or _is_bias_of_pairs_in_16_bits(spec), f"{s.bias_ring=} needs a bias of pairs in 16 bits"),
        (not (s.ordered and s.warpgroups and s.block_q) or has_order(spec, s),
         f"{s.ordered=} needs a mask whose bounds name the key tiles of each query tile, one at least"),
        (not s.rounds_dq or (s.ordered and not spec.partial),
         f"{s.rounds_dq=} needs {s.ordered=} to be True, and results that are no terms of sums, {spec.partial=}"),
        (not (s.rounds_dq and s.ordered and s.warpgroups and s.block_q) or completes_in_runs(spec, s),
         f"{s.rounds_dq=} needs a mask with which the query tiles that a block completes follow each other"),
        (not s.pipelined or s.num_stages > 1, f"{s.pipelined=} needs {s.num_stages=} to be 2 or 4"),
        (held + 16 <= s.registers[0], f"dk, dv and scores need {held} registers a thread of {s.registers[0]}"),
    )


def _split_rules(spec: AttentionSpec, s: SplitSchedule) -> _Rules:
    return ((s.num_stages in (1, 2, 4), f"{s.num_stages=} must be 1, 2 or 4"),
            (s.p_slots in (1, 2, 4), f"{s.p_slots=} must be 1, 2 or 4"),
            (max(spec.d, spec.d_v) <= 256, f"d={spec.d} and d_v={spec.d_v} must be at most 256"))


def _wide_rules(spec: AttentionSpec, schedule: BackwardSchedule) -> _Rules:
    parts = schedule.kv, schedule.dv, schedule.dq
    of_keys = {s.cluster for s in (schedule.kv, schedule.dv) if isinstance(s, WideSchedule)}
    made = tuple(s.makes if isinstance(s, WideSchedule) else None for s in parts)
    enough = all(s.num_stages >= 1 and s.slots >= 2 for s in parts if isinstance(s, WideSchedule))
    return ((made == ("dk", "dv", "dq"), f"heads above 256 need kernels of dk, dv and dq of their own, not {made}"),
            (len({s.cluster for s in parts if isinstance(s, WideSchedule)} - {1, 2}) == 0, "cluster must be 1 or 2"),
            (len(of_keys) <= 1, f"dk and dv need the same cluster, not {sorted(of_keys)}: they read the same ranges of "
             "query tiles where the mask holds arrays"),
            (enough, "num_stages must be positive, and slots at least 2: one is freed when the next one is multiplied"),
            _mask_rule(spec, schedule))


def _dq_rules(spec: AttentionSpec, s: DqSchedule) -> _Rules:
    held = (spec.d + 2 * s.block_kv) // 2
    return (
        (s.block_kv % 16 == 0 and 16 <= s.block_kv <= 256, f"{s.block_kv=} must be a multiple of 16 and at most 256"),
        (s.block_kv % BITS == 0 or not has_bits(spec.mask),
         f"{s.block_kv=} must be a multiple of {BITS} where a mask is dense: its bits come in words"),
        (1 <= s.warpgroups <= 3, f"{s.warpgroups=} must be 1, 2 or 3"),
        (s.k_stages >= 1 and s.v_stages >= 1, f"{s.k_stages=} and {s.v_stages=} must be positive"),
        (not s.pipelined or s.k_stages > 1, f"{s.pipelined=} needs {s.k_stages=} to be 2 or more"),
        (held + 16 <= s.registers[0], f"dq and scores need {held} registers a thread of {s.registers[0]}"),
    )


def _backward_rules(spec: AttentionSpec, schedule: BackwardSchedule, smem_limit: int) -> _Rules:
    kv, dq = schedule.kv, schedule.dq
    if any(isinstance(s, WideSchedule) for s in (kv, dq, schedule.dv)):
        return (*_wide_rules(spec, schedule), *_sizes(spec, (kv, dq, schedule.dv), smem_limit))
    assert not isinstance(kv, WideSchedule) and not isinstance(dq, WideSchedule)
    rules = [*(_split_rules(spec, kv) if isinstance(kv, SplitSchedule) else _kv_rules(spec, kv)),
             (schedule.fused == (dq is None), "dq must be written by exactly one kernel"),
             (not (schedule.fused and spec.deterministic) or kv.ordered,
              "deterministic gradients need `ordered`, or the form of two kernels"),
             _mask_rule(spec, schedule)]
    rules += [] if dq is None else _dq_rules(spec, dq)
    return (*rules, *_sizes(spec, (kv, dq), smem_limit))


def _sizes(spec: AttentionSpec, kernels: tuple[KvSchedule | SplitSchedule | DqSchedule | WideSchedule | None, ...],
           smem_limit: int) -> _Rules:
    return tuple(((needed := smem_bytes(spec, s)) <= smem_limit, f"{s} needs {needed} bytes of {smem_limit}")
                 for s in kernels if s is not None)
