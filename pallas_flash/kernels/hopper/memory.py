"""The shared memory of a block."""

import math
from typing import NamedTuple

from pallas_flash import tiles
from pallas_flash.kernels.hopper.schedule import (
    CHUNK,
    ROWS,
    DqSchedule,
    ForwardSchedule,
    KvSchedule,
    SplitSchedule,
    chunks,
)
from pallas_flash.spec import AttentionSpec

__all__ = [
    "Buffer", "dq_acc_shape", "dq_buffers", "dq_pieces", "forward_buffers", "forward_smem_bytes", "kv_buffers",
    "smem_bytes", "split_buffers", "stats_shape",
]

_ALIGNMENT = 1024
_BARRIER_BYTES = 8


class Buffer(NamedTuple):
    """A buffer of shared memory, in elements of the spec's type."""

    shape: tuple[int, ...]


def forward_buffers(spec: AttentionSpec, schedule: ForwardSchedule) -> dict[str, Buffer]:
    """Every buffer of the forward kernel, by name: (slots, chunks, rows, 64); out: (warpgroups, chunks, 64, 64)."""
    s = schedule
    out = {"out": Buffer((s.warpgroups, min(s.out_chunks, chunks(spec.d_v)), ROWS, CHUNK))} if s.out_chunks else {}
    return {"q": Buffer((s.query_buffers, chunks(spec.d), s.block_q, CHUNK)),
            "k": Buffer((s.num_stages, chunks(spec.d), s.block_kv, CHUNK)),
            "v": Buffer((s.num_stages, chunks(spec.d_v), s.block_kv, CHUNK)), **out}


def forward_smem_bytes(spec: AttentionSpec, schedule: ForwardSchedule) -> int:
    """Shared memory of a block, its barriers included."""
    data = sum(_ALIGNMENT * tiles.cdiv(2 * math.prod(buffer.shape), _ALIGNMENT)
               for buffer in forward_buffers(spec, schedule).values())
    barriers = 2 * schedule.query_buffers + 4 * schedule.num_stages + (schedule.maxima > 0)
    return data + _ALIGNMENT * tiles.cdiv(_BARRIER_BYTES * barriers, _ALIGNMENT)


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
    """Shapes of the 16-bit buffers of the kernel of wide heads."""
    return _tiles(spec, s) | {"p": (s.p_slots, s.block_q // CHUNK, s.block_kv, CHUNK)}


def dq_buffers(spec: AttentionSpec, s: DqSchedule) -> dict[str, tuple[int, ...]]:
    """Shapes of the 16-bit buffers of the kernel of dq."""
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
