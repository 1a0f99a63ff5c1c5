"""The default schedules: tables by head size and shared memory.

The arithmetic, and what was compiled: docs/notes/ampere.md. No schedule here has run on a card of its own generation;
that they stand in this order was measured with prototypes on an H200.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator

from pallas_flash.device import Device
from pallas_flash.filled import filled_part
from pallas_flash.kernels.ampere.memory import Schedule, smem_bytes
from pallas_flash.kernels.ampere.rules import dq_fits, reasons_against
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
from pallas_flash.spec import AttentionSpec

__all__ = ["assume", "default_backward", "default_forward", "with_mask_kernel"]

_SYSTEM_BYTES = 1024 + 128
"""Shared memory of each block that is not its own: CUDA takes 1,024 bytes, and Mosaic has one byte of static memory,
which counts as 128.
"""
_RESERVED = 1024
"""What an SM has beyond the most that one block may ask for."""

_MOST_STAGES = 4
"""Of tiles of a cache: with three on their way, more bytes are in flight than memory needs (docs/notes/ampere.md)."""

_MOST_HELD = 160
"""Registers of a thread for queries against a cache and their output."""

_TOGETHER = 320
"""Columns of d and d_v of which one warpgroup keeps dk and dv."""

_assumed: contextvars.ContextVar[ForwardSchedule | DecodeSchedule | BackwardSchedule | None] = contextvars.ContextVar(
    "assumed", default=None)


@contextlib.contextmanager
def assume(schedule: ForwardSchedule | DecodeSchedule | BackwardSchedule) -> Iterator[None]:
    """Makes `schedule` the default of its pass, for every spec and device, in this thread: for benchmarks. Programs
    that JAX keeps have the schedules that they were traced with: call `jax.clear_caches` before and after.
    """
    token = _assumed.set(schedule)
    try:
        yield
    finally:
        _assumed.reset(token)


def _sharing(spec: AttentionSpec, device: Device, s: Schedule) -> int:
    """How many blocks of a schedule the shared memory of an SM holds."""
    return (device.smem_bytes + _RESERVED) // (smem_bytes(spec, s) + _SYSTEM_BYTES)


def _keeps_less(spec: AttentionSpec, device: Device) -> bool:
    """Whether ptxas needs smaller tiles to keep a loop free of spills: with heads above 64, for 10.x, and where a bias
    or a score function completes scores.
    """
    return (_is_10(device) or _completes(spec)) and max(spec.d, spec.d_v) > 64


def _is_10(device: Device) -> bool:
    """Whether ptxas keeps fewer values in registers for the device than for others."""
    assert device.capability is not None
    return device.capability[0] == 10


def _completes(spec: AttentionSpec) -> bool:
    """Whether a bias or a score function completes scores."""
    return spec.bias is not None or spec.score is not None


def default_forward(spec: AttentionSpec, device: Device) -> ForwardSchedule | DecodeSchedule:
    """Returns the forward's schedule of a spec: key tiles of 64 where two blocks then share an SM, as the registers of
    128 threads allow, or where two of 32 do not either, and nothing is spilled; else of 32. Values wider than 128 leave
    registers for 16 rows a warp; heads up to 64 have two slots, which are 3 % faster, and, if no bias or score function
    needs registers, hold queries there, peel the last tiles, and store out in rows, together 5 to 12 %
    (docs/notes/ampere.md). Of keys in a cache: `_default_decode`.
    """
    if filled_part(spec.mask) is not None:
        return _default_decode(spec, device)
    if isinstance(assumed := _assumed.get(), ForwardSchedule):
        return assumed
    small = max(spec.d, spec.d_v) <= CHUNK
    plain = small and not _completes(spec)
    wide = ForwardSchedule(row_tiles=2 if spec.d_v <= 128 else 1, held=plain, peeled=plain,
                           out_in_rows=plain and not spec.partial, num_sms=device.num_sms)
    narrow = dataclasses.replace(wide, block_kv=32)
    if _keeps_less(spec, device):
        return narrow
    two_slots = dataclasses.replace(wide, num_stages=2)
    if small and _sharing(spec, device, two_slots) >= 2:
        return two_slots
    sharing = _sharing(spec, device, wide)
    return wide if sharing >= 2 or (sharing == 1 and _sharing(spec, device, narrow) == 1) else narrow


def with_mask_kernel[S: (ForwardSchedule, BackwardSchedule)](spec: AttentionSpec, schedule: S, device: Device) -> S:
    """The schedule for another runtime than XLA, which launches what makes the arrays that are read of a mask's, where
    that fits: XLA makes them itself in as little time, PyTorch would in dozens of small kernels.
    """
    found = dataclasses.replace(schedule, mask_kernel=True)
    return schedule if reasons_against(spec, found, device.smem_bytes) else found


def _default_decode(spec: AttentionSpec, device: Device) -> DecodeSchedule:
    """Returns the schedule of a spec whose keys are in a cache: as many bands as the queries leave room for, and of
    tiles of 64 keys, or of 32, as many slots as shared memory has room for, up to 4: twice if it has room for two of
    them twice, as two blocks hide each other's waits, else once. Queries are in registers where the accumulator leaves
    room for them: heads of 256 would spill 64 bytes.
    """
    if isinstance(assumed := _assumed.get(), DecodeSchedule):
        return assumed
    bands = next(count for count in (4, 2, 1) if count * rows(spec) <= ROWS)
    held = spec.d_v // 2 + 16 * chunks(spec.d) <= _MOST_HELD
    # A bias needs as many registers again as scores: up to 220 bytes were spilled.
    sizes = (32,) if spec.bias is not None and spec.d_v > 192 and bands < 4 else (64, 32)
    every = ((DecodeSchedule(min(bands, block_kv // 16), block_kv, num_stages, held), blocks)
             for block_kv in sizes for blocks in (2, 1) for num_stages in range(_MOST_STAGES, 1, -1))
    schedule, blocks = next((s, blocks) for s, blocks in every if _sharing(spec, device, s) >= blocks)
    return dataclasses.replace(schedule, num_blocks=blocks * device.num_sms)


def default_backward(spec: AttentionSpec, device: Device) -> BackwardSchedule:
    """Returns the backward's schedule of a spec, the first for which shared memory has room (twice, if blocks have one
    warpgroup): halves; tiles of 64 queries in two slots, in one slot; of 32 queries; and of 64 keys a block, not 128.

    dk and dv of 64 keys are half a register a column; with more than 320 columns together two warpgroups keep them.
    """
    if isinstance(assumed := _assumed.get(), BackwardSchedule):
        return assumed
    if max(spec.d, spec.d_v) <= 64:
        wide, blocks = BackwardSchedule(num_sms=device.num_sms), 2
    else:
        part = 64 if spec.d + spec.d_v <= 256 and not _keeps_less(spec, device) else 32
        wide, blocks = BackwardSchedule(row_tiles=1, warpgroups=2, part_q=part, num_sms=device.num_sms), 1
    if spec.d + spec.d_v > _TOGETHER:
        wide = dataclasses.replace(wide, split=True, dq=_default_dq(spec, device))
    assert device.capability is not None
    wide = dataclasses.replace(wide, wide_adds=device.capability >= (9, 0))
    one_slot = dataclasses.replace(wide, num_stages=1)
    narrow = dataclasses.replace(one_slot, block_q=32, part_q=32)
    few_keys = dataclasses.replace(narrow, row_tiles=1, warpgroups=1)
    fitting = (s for s in (*_halves(spec, wide), wide, one_slot, narrow) if _sharing(spec, device, s) >= blocks)
    found = next(fitting, few_keys)
    if spec.deterministic:
        found = _repeatable(spec, device, found)
    return found if found.dq is None else dataclasses.replace(found, wide_adds=False)


def _repeatable(spec: AttentionSpec, device: Device, found: BackwardSchedule) -> BackwardSchedule:
    """The schedule with additions to dq in an order, if it is fused and the mask has one, else of two kernels. With an
    order more heads are worked on at a time than L2 holds, so that fewer blocks of a head wait for each other: on an
    H200 faster by 1 % at d 128, whose blocks have 128 keys, and by 4 to 24 % at d 256, where they have 64. There one
    warp waits for the block's turn, 6 % faster at 16,384 tokens; at d 128 and d 64 that is 1 to 5 % slower.
    """
    if found.dq is not None or not has_order(spec, found):
        return dataclasses.replace(found, dq=_default_dq(spec, device))
    section_bytes = (8192 // found.block_kv) << 20
    wide = max(spec.d, spec.d_v) > 128
    return dataclasses.replace(found, ordered=True, one_waits=wide, section_bytes=section_bytes)


def _halves(spec: AttentionSpec, wide: BackwardSchedule) -> list[BackwardSchedule]:
    """Schedules whose warpgroups have halves of the columns of dk and dv, in two slots and in one, if both heads are
    halves of whole chunks, or nearly, and no bias or score function needs registers of its own.
    """
    columns = CHUNK * (chunks(spec.d) + chunks(spec.d_v))
    if chunks(spec.d) % 2 or chunks(spec.d_v) % 2 or columns - spec.d - spec.d_v >= CHUNK // 2 or _completes(spec):
        return []
    two = dataclasses.replace(wide, block_q=64, part_q=32, warpgroups=2, row_tiles=2 if columns <= 256 else 1,
                              num_stages=2, split=False, dq=None, halves=True)
    return [two, dataclasses.replace(two, num_stages=1)]


def _default_dq(spec: AttentionSpec, device: Device) -> DqSchedule:
    """The schedule of a kernel of dq alone, the first that registers have room for, and shared memory twice, or once
    where none has it twice: 32 rows a warp before 16, tiles of 64 keys before 32, two slots before one.
    """
    most = 1 if _completes(spec) and spec.d > 64 else 2  # a score function needs registers of its own
    every = [DqSchedule(block_kv, row_tiles, num_stages, num_sms=device.num_sms)
             for row_tiles in (2, 1)[2 - most:] for block_kv in (64, 32) for num_stages in (2, 1)]
    fitting = [s for blocks in (2, 1) for s in every if _sharing(spec, device, s) >= blocks and dq_fits(spec, s)]
    return fitting[0]
