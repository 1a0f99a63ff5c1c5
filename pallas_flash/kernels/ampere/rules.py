"""Reasons against a schedule: what the kernels cannot run, or would not fit."""

from pallas_flash.filled import filled_part
from pallas_flash.kernels.ampere.memory import mask_bytes, smem_bytes
from pallas_flash.kernels.ampere.schedule import (
    CHUNK,
    ROWS,
    BackwardSchedule,
    DecodeSchedule,
    DqSchedule,
    ForwardSchedule,
    chunks,
)
from pallas_flash.kernels.ampere.work import has_order
from pallas_flash.kernels.mosaic.cache_rules import rows
from pallas_flash.kernels.mosaic.mask_bits import BITS, has_bits
from pallas_flash.kernels.mosaic.mask_rules import kernel_makes
from pallas_flash.spec import AttentionSpec

__all__ = ["dq_fits", "reasons_against"]

_Rules = tuple[tuple[bool, str], ...]
"""What must hold, and what is said where it does not."""

_REGISTERS = 255
"""Of a thread. About 45 of them hold addresses, operands of products, and numbers of rows."""
_OTHERS = 45


def reasons_against(spec: AttentionSpec, schedule: ForwardSchedule | DecodeSchedule | BackwardSchedule,
                    smem_limit: int) -> list[str]:
    """Returns why the kernels cannot run a spec with a schedule; an empty list if they can.

    Args:
      smem_limit: bytes of shared memory that a block may have.
    """
    if isinstance(schedule, BackwardSchedule):
        rules = _backward_rules(spec, schedule)
    elif filled_part(spec.mask) is not None:
        rules = _decode_rules(spec, schedule)
    elif isinstance(schedule, DecodeSchedule):
        rules = ((False, f"{schedule} is for keys in a cache"),)
    else:
        rules = _forward_rules(spec, schedule)
    needed = smem_bytes(spec, schedule)
    if isinstance(schedule, BackwardSchedule) and schedule.dq is not None:
        rules += _dq_rules(spec, schedule.dq)
        needed = max(needed, smem_bytes(spec, schedule.dq))
    if not isinstance(schedule, DecodeSchedule):
        needed = max(needed, mask_bytes(spec, schedule))
        rules += ((not schedule.mask_kernel or kernel_makes(spec), f"{schedule.mask_kernel=} needs a mask with arrays, "
                   "of intervals, ids and packed sequences, the same for all heads"),)
    rules += ((needed <= smem_limit, f"needs {needed} bytes of shared memory, there are {smem_limit}"),)
    return [reason for holds, reason in rules if not holds]


def _forward_rules(spec: AttentionSpec, s: ForwardSchedule) -> _Rules:
    held = s.row_tiles * (s.block_kv + spec.d_v + s.held * CHUNK // 2) // 2
    return (
        (s.block_kv % 16 == 0 and 16 <= s.block_kv <= 128, f"{s.block_kv=} must be a multiple of 16 and at most 128"),
        (s.block_kv % BITS == 0 or not has_bits(spec.mask),
         f"{s.block_kv=} must be a multiple of {BITS} where a mask is dense: its bits come in words"),
        (s.row_tiles in (1, 2), f"{s.row_tiles=} must be 1 or 2"),
        (s.num_stages in (1, 2), f"{s.num_stages=} must be 1 or 2"),
        (not s.held or spec.d <= CHUNK, f"{s.held=} needs heads of up to {CHUNK}"),
        (not s.out_in_rows or (chunks(spec.d_v) <= chunks(spec.d) and spec.result_dtype.itemsize == 2),
         f"{s.out_in_rows=} needs room for out where queries are, and results of 16 bits, d={spec.d}, d_v={spec.d_v} "
         f"and {spec.result_dtype}"),
        (held + _OTHERS <= _REGISTERS, f"scores and accumulator need {held} registers a thread of {_REGISTERS}"),
    )


def _decode_rules(spec: AttentionSpec, s: ForwardSchedule | DecodeSchedule) -> _Rules:
    if isinstance(s, ForwardSchedule):
        return ((False, f"{s} is not for keys in a cache"),)
    if s.bands not in (1, 2, 4):
        return ((False, f"{s.bands=} must be 1, 2 or 4"),)
    keys = s.block_kv // s.bands
    held = spec.d_v // 2 + 16 * chunks(spec.d) * s.q_registers + keys * 3 // 4
    return (
        (rows(spec) * s.bands <= ROWS, f"{s.bands=} of {rows(spec)} queries must be at most {ROWS} rows"),
        (s.block_kv % (16 * s.bands) == 0 and 16 <= keys <= 64,
         f"{s.block_kv=} must be 16, 32, 48 or 64 keys for each of {s.bands=}"),
        (s.num_stages >= 2, f"{s.num_stages=} must be at least 2"),
        (s.parts_at_once >= 1, f"{s.parts_at_once=} must be positive"),
        (held + _OTHERS <= _REGISTERS,
         f"scores, weights, queries and accumulator need {held} registers a thread of {_REGISTERS}"),
    )


def dq_fits(spec: AttentionSpec, s: DqSchedule) -> bool:
    """Whether dq and scores fit in the registers of a thread."""
    return s.row_tiles * (spec.d // 2 + s.block_kv) + _OTHERS <= _REGISTERS


def _dq_rules(spec: AttentionSpec, s: DqSchedule) -> _Rules:
    return (
        (s.block_kv in (32, 64), f"{s.block_kv=} must be 32 or 64"),
        (s.row_tiles in (1, 2), f"{s.row_tiles=} must be 1 or 2"),
        (s.num_stages in (1, 2), f"{s.num_stages=} must be 1 or 2"),
        (dq_fits(spec, s), f"dq and scores need more than the {_REGISTERS} registers of a thread"),
    )


def _backward_rules(spec: AttentionSpec, s: BackwardSchedule) -> _Rules:
    sums = max(spec.d, spec.d_v) if s.split else spec.d + spec.d_v
    if s.halves:
        sums = CHUNK * (chunks(spec.d) + chunks(spec.d_v)) // 2
    held = s.row_tiles * (sums + 2 * s.part_q) // 2
    legal = s.block_q in (32, 64) and s.row_tiles in (1, 2) and s.warpgroups in (1, 2)
    return (
        (not s.split or (s.dq is not None and s.warpgroups == 2 and s.row_tiles == 1),
         f"{s.split=} needs two kernels, two warpgroups and one tile of 64 keys, {s.warpgroups=}, {s.row_tiles=}"),
        (not s.halves or (not s.split and s.warpgroups == 2 and 2 * s.part_q == s.block_q == CHUNK),
         f"{s.halves=} needs two warpgroups and tiles of 64 queries in two parts, {s.warpgroups=}, {s.block_q=}, "
         f"{s.part_q=}, {s.split=}"),
        (not s.halves or not (chunks(spec.d) % 2 or chunks(spec.d_v) % 2),
         f"{s.halves=} needs heads of 65 to 128, or 193 to 256, d={spec.d} and d_v={spec.d_v}"),
        (s.block_q in (32, 64), f"{s.block_q=} must be 32 or 64"),
        (s.part_q % 16 == 0 and 0 < s.part_q <= s.block_q and s.block_q % max(s.part_q, 1) == 0,
         f"{s.part_q=} must be a multiple of 16 that divides {s.block_q=}"),
        (s.part_q % BITS == 0 or not has_bits(spec.mask),
         f"{s.part_q=} must be a multiple of {BITS} where a mask is dense: its bits come in words"),
        (s.warpgroups in (1, 2), f"{s.warpgroups=} must be 1 or 2"),
        (s.row_tiles in (1, 2), f"{s.row_tiles=} must be 1 or 2"),
        (s.num_stages in (1, 2), f"{s.num_stages=} must be 1 or 2"),
        (not spec.deterministic or s.dq is not None or s.ordered,
         f"{s.dq=} must be a schedule, or {s.ordered=} True, where deterministic=True: blocks add to dq in any order"),
        (not s.ordered or s.dq is None, f"{s.ordered=} needs {s.dq=} to be None: nothing is added"),
        (not (s.ordered and legal) or has_order(spec, s),
         f"{s.ordered=} needs a mask without arrays, whose bounds name the key tiles of each query tile"),
        (not s.one_waits or s.ordered, f"{s.one_waits=} needs {s.ordered=} to be True: else none waits"),
        (held + _OTHERS <= _REGISTERS, f"dk, dv and scores need {held} registers a thread of {_REGISTERS}"),
    )
