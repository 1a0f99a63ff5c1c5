"""The shared memory of each kernel as data: its buffers, from which both what it allocates (`scratch`) and `smem_bytes`
come, and the float32 sums in global memory through which dq goes.

Tiles are kept in chunks of 64 columns: (chunks, rows, 64).
"""

import math
from typing import NamedTuple

import numpy as np

from pallas_flash import tiles
from pallas_flash.kernels.ampere.schedule import (
    CHUNK,
    ROWS,
    BackwardSchedule,
    DecodeSchedule,
    DqSchedule,
    ForwardSchedule,
    chunks,
)
from pallas_flash.kernels.ampere.work import may_have_idle_queries
from pallas_flash.spec import AttentionSpec

__all__ = [
    "Buffer", "Schedule", "decode_buffers", "dq_buffers", "dq_sums_shape", "forward_buffers", "kv_buffers",
    "mask_bytes", "prepare_buffers", "smem_bytes",
]

type Schedule = ForwardSchedule | DecodeSchedule | BackwardSchedule | DqSchedule
"""Of a kernel, or of a backward."""

_ALIGNMENT = 1024
"""Each buffer begins at a multiple of so many bytes."""
_FLOAT32 = np.dtype("float32")
_STATISTICS = 2  # of each query: what is subtracted from exponents, and where dP starts


class Buffer(NamedTuple):
    """An array in shared memory."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def smem_bytes(self) -> int:
        return _ALIGNMENT * tiles.cdiv(math.prod(self.shape) * self.dtype.itemsize, _ALIGNMENT)


def forward_buffers(spec: AttentionSpec, s: ForwardSchedule) -> tuple[Buffer, ...]:
    """A tile of queries, and slots of keys and of values."""
    return (Buffer("q", (chunks(spec.d), s.block_q, CHUNK), spec.dtype),
            Buffer("k", (s.num_stages, chunks(spec.d), s.block_kv, CHUNK), spec.dtype),
            Buffer("v", (s.num_stages, chunks(spec.d_v), s.block_kv, CHUNK), spec.dtype))


def decode_buffers(spec: AttentionSpec, s: DecodeSchedule) -> tuple[Buffer, ...]:
    """Slots of keys and values, and the queries of a band, if they are not in registers."""
    q = Buffer("q", (chunks(spec.d), ROWS // s.bands, CHUNK), spec.dtype)
    return (Buffer("k", (s.num_stages, chunks(spec.d), s.block_kv, CHUNK), spec.dtype),
            Buffer("v", (s.num_stages, chunks(spec.d_v), s.block_kv, CHUNK), spec.dtype), *[q] * (not s.q_registers))


def kv_buffers(spec: AttentionSpec, s: BackwardSchedule) -> tuple[Buffer, ...]:
    """Tiles of keys and values, slots of queries and douts with their statistics, and in the fused form dS^T on its way
    to dq; where warpgroups have halves, P^T and dS^T on their way to the other one, too.

    These are in chunks of 64 queries, or of 32.
    """
    d, d_v, width = chunks(spec.d), chunks(spec.d_v), s.part_q if s.halves else min(CHUNK, s.block_q)
    weights = Buffer("ds", (s.block_q // width, s.block_kv, width), spec.dtype)
    passed = (weights, weights._replace(name="p")) if s.halves else (weights,) * (s.dq is None)
    return (Buffer("k", (d, s.block_kv, CHUNK), spec.dtype), Buffer("v", (d_v, s.block_kv, CHUNK), spec.dtype),
            Buffer("q", (s.num_stages, d, s.block_q, CHUNK), spec.dtype),
            Buffer("dout", (s.num_stages, d_v, s.block_q, CHUNK), spec.dtype), *passed,
            Buffer("stats", (s.num_stages, _STATISTICS, s.block_q), _FLOAT32))


def dq_buffers(spec: AttentionSpec, s: DqSchedule) -> tuple[Buffer, ...]:
    """Tiles of queries and douts, and slots of keys and values."""
    return (Buffer("q", (chunks(spec.d), s.block_q, CHUNK), spec.dtype),
            Buffer("dout", (chunks(spec.d_v), s.block_q, CHUNK), spec.dtype),
            Buffer("k", (s.num_stages, chunks(spec.d), s.block_kv, CHUNK), spec.dtype),
            Buffer("v", (s.num_stages, chunks(spec.d_v), s.block_kv, CHUNK), spec.dtype))


def prepare_buffers(spec: AttentionSpec) -> tuple[Buffer, ...]:
    """64 rows of out and of dout, and of q if it is copied. Where delta is known, there is no out, and dout is there
    only if it is copied, too.
    """
    copied = may_have_idle_queries(spec)
    names = ("dout",) * copied if spec.partial else ("out", "dout")
    rows = [Buffer(name, (chunks(spec.d_v), ROWS, CHUNK), spec.dtype) for name in names]
    q = Buffer("q", (chunks(spec.d), ROWS, CHUNK), spec.dtype)
    return *rows, *[q] * copied


def mask_bytes(spec: AttentionSpec, s: ForwardSchedule | BackwardSchedule) -> int:
    """Shared memory of the launch that makes what is read of a mask's arrays, at most: three numbers of each tile."""
    if not s.mask_kernel:
        return 0
    found = [tiles.cdiv(spec.kv_len, s.block_kv)]
    if isinstance(s, BackwardSchedule):
        found = [tiles.cdiv(spec.q_len, s.block_q), *([] if s.dq is None else [tiles.cdiv(spec.kv_len, s.dq.block_kv)])]
    return 12 * 32 * tiles.cdiv(max(found), 32)


def dq_sums_shape(spec: AttentionSpec, s: BackwardSchedule) -> tuple[int, ...]:
    """The shape of dq's float32 sums: (batch, q_heads, query tiles, chunks, numbers of a tile's chunk)."""
    count = tiles.cdiv(spec.q_len, ROWS) * (ROWS // s.block_q)
    return spec.batch, spec.q_heads, count, chunks(spec.d), s.block_q * CHUNK


def smem_bytes(spec: AttentionSpec, s: Schedule) -> int:
    """Shared memory of a block; of a backward in two kernels, that of dk and dv."""
    match s:
        case ForwardSchedule():
            buffers = forward_buffers(spec, s)
        case DecodeSchedule():
            buffers = decode_buffers(spec, s)
        case DqSchedule():
            buffers = dq_buffers(spec, s)
        case BackwardSchedule():
            buffers = kv_buffers(spec, s)
    return sum(buffer.smem_bytes for buffer in buffers)
