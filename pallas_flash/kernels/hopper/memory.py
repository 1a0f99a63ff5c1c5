"""The memory of each kernel as data: the buffers and barriers of a block, from which both what the kernel allocates
(`scratch.allocate`) and `smem_bytes` come, and the float32 sums in global memory through which dq goes.

Tiles are kept in chunks of 64 columns: (chunks, rows, 64). A barrier is named for the state it announces. A full one
waits for the chunks that TMA brings, or for the warpgroups that write; a free one for the warpgroups that have read.
"""

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from pallas_flash import quantised, tiles
from pallas_flash.kernels.hopper.schedule import (
    CHUNK,
    ROWS_PER_WARPGROUP,
    DbiasSchedule,
    DecodeSchedule,
    DqSchedule,
    ForwardSchedule,
    KeySchedule,
    KvSchedule,
    SplitSchedule,
    WideSchedule,
    chunks,
)
from pallas_flash.kernels.hopper.work import may_have_idle_queries
from pallas_flash.kernels.mosaic.cache_rules import MERGED_BYTES
from pallas_flash.kernels.mosaic.traced import is_additive
from pallas_flash.spec import AttentionSpec

__all__ = [
    "KINDS", "PARTS", "Barrier", "Buffer", "Kind", "Memory", "dbias_memory", "decode_memory", "dq_acc_shape",
    "dq_memory", "dq_pieces", "finish_memory", "forward_memory", "gradient_memory", "in_parts", "kv_memory",
    "prepare_float32_memory", "prepare_memory", "product_dtype", "smem_bytes", "split_memory", "split_rows_memory",
    "wide_memory",
]

_ALIGNMENT = 1024
"""Each buffer, and all barriers together, begin at a multiple of so many bytes."""
_BARRIER_BYTES = 8
_FLOAT32 = np.dtype("float32")
_STATISTICS = 2  # of each query: where the scores and where dP start
_LOADING_WARPS = 3  # of the forward: for queries, keys and values


class Buffer(NamedTuple):
    """An array in shared memory."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    chunked: bool = True  # (..., rows, 64) of a 16-bit type, swizzled as TMA writes it and wgmma reads it

    @property
    def smem_bytes(self) -> int:
        return _aligned(math.prod(self.shape) * self.dtype.itemsize)


class Barrier(NamedTuple):
    """A barrier for each slot; each waits for so many arrivals, if it is shared from each block of a cluster."""

    name: str
    arrivals: int = 1
    slots: int = 1
    shared: bool = False


class Memory(NamedTuple):
    """What a block of one kernel has in shared memory."""

    buffers: tuple[Buffer, ...]
    barriers: tuple[Barrier, ...] = ()

    @property
    def smem_bytes(self) -> int:
        """Bytes of a block, its barriers included."""
        barriers = sum(barrier.slots for barrier in self.barriers)
        return sum(buffer.smem_bytes for buffer in self.buffers) + _aligned(_BARRIER_BYTES * barriers)


def _aligned(size: int) -> int:
    return _ALIGNMENT * tiles.cdiv(size, _ALIGNMENT)


def _ring(name: str, loads: int, readers: int, slots: int) -> tuple[Barrier, Barrier]:
    """The barriers of a ring: a slot is full after so many loads, and free when so many warpgroups have read it."""
    return Barrier(f"{name}_full", loads, slots), Barrier(f"{name}_free", readers, slots)


def forward_memory(spec: AttentionSpec, s: ForwardSchedule) -> Memory:
    """Query, key and value tiles in rings, and tiles of a bias of pairs; the output, a warpgroup's 64 rows each, where
    it is rounded and does not lie over the query; and what is known of the tile that was taken, where the mask holds
    arrays.
    """
    d, d_v = chunks(spec.d), chunks(spec.d_v)
    buffers = [Buffer("q", (s.query_buffers, d, s.block_q, CHUNK), spec.dtype),
               Buffer("k", (s.num_stages, d, s.block_kv, CHUNK), spec.dtype),
               Buffer("v", (s.num_stages, d_v, s.block_kv, CHUNK), spec.dtype)]
    if s.out_chunks and not spec.partial:
        buffers.append(Buffer("out", (s.warpgroups, min(s.out_chunks, d_v), ROWS_PER_WARPGROUP, CHUNK), spec.dtype))
    barriers = [*_ring("q", d, s.warpgroups, s.query_buffers), *_ring("k", d, s.warpgroups, s.num_stages),
                *_ring("v", d_v, s.warpgroups, s.num_stages)]
    if s.bias_slots:
        assert spec.bias is not None
        across = chunks(s.block_kv)
        buffers.append(Buffer("bias", (s.bias_slots, across, s.block_q, CHUNK), spec.bias.dtype))
        barriers += _ring("bias", across, s.warpgroups, s.bias_slots)
    if s.maxima:
        barriers.append(Barrier("row_done", s.warpgroups))
    if spec.mask.has_arrays:
        buffers.append(Buffer("taken", (1 + s.warpgroups, 4), np.dtype("int32"), chunked=False))
        barriers += _ring("taken", 1, s.warpgroups + _LOADING_WARPS, 1)
    return Memory(tuple(buffers), tuple(barriers))


def product_dtype(spec: AttentionSpec) -> np.dtype:
    """The type of the numbers that decoding multiplies: float16 where keys are kept in eight bits, of which one
    instruction makes two of it, and six make two of bfloat16.
    """
    return spec.dtype if spec.cache_scales is None else np.dtype("float16")


def decode_memory(spec: AttentionSpec, s: DecodeSchedule) -> Memory:
    """Of each worker, whose number ends every name: key and value tiles in rings, which come in pieces of a page each
    where there are pages; the queries, if they are not in registers; where bands are merged; and a key and a value
    tile as products read them, where they are kept in eight bits.
    """
    d, d_v = chunks(spec.d), chunks(spec.d_v)
    pieces = 1 if spec.pages is None else s.block_kv // math.gcd(spec.pages.size, s.block_kv)
    buffers, barriers, loads = [], [], (d, d_v)
    for worker in range(s.workers):
        if spec.cache_scales is None:
            buffers += [Buffer(f"k_{worker}", (s.num_stages, d, s.block_kv, CHUNK), spec.dtype),
                        Buffer(f"v_{worker}", (s.num_stages, d_v, s.block_kv, CHUNK), spec.dtype)]
        else:
            loads = 1, 1
            for name, dim, width in (("k", spec.d, d), ("v", spec.d_v, d_v)):
                buffers += [Buffer(f"{name}_{worker}", (s.num_stages, s.block_kv, dim), quantised.DTYPE, chunked=False),
                            Buffer(f"wide_{name}_{worker}", (width, s.block_kv, CHUNK), product_dtype(spec))]
        if s.bands > 1:
            buffers.append(Buffer(f"merging_{worker}", (MERGED_BYTES // 4,), _FLOAT32, chunked=False))
        if not s.q_registers:
            buffers.append(Buffer(f"q_{worker}", (d, ROWS_PER_WARPGROUP, CHUNK), product_dtype(spec)))
        rings = [*_ring("k", pieces * loads[0], 1, s.num_stages), *_ring("v", pieces * loads[1], 1, s.num_stages)]
        if s.cluster > 1:
            rings.append(Barrier("parts_there", 1, 1, shared=True))
        if s.query_slots:
            of_head = (spec.q_len, spec.group) if spec.layout == "BLHD" else (spec.group, spec.q_len)
            buffers.append(Buffer(f"queries_{worker}", (s.query_slots, *of_head, spec.d), spec.dtype, chunked=False))
            rings += _ring("queries", 1, 1, s.query_slots)
        barriers += [ring._replace(name=f"{ring.name}_{worker}") for ring in rings]
    return Memory(tuple(buffers), tuple(barriers))


def kv_memory(spec: AttentionSpec, s: KvSchedule) -> Memory:
    """Keys and values, rings of queries and douts; in the fused form also dS and dq on their way.

    dq is in pieces of 64 x 64, as they lie in `dq_acc_shape`; each slot's pieces have barriers of their own.
    """
    common = _kv_memory(spec, s, readers=s.warpgroups)
    if not s.makes_dq:
        return common
    handed = s.dq_slots * dq_pieces(spec, s)
    readers = 1 if s.dq == "own" else s.warpgroups
    buffers = (Buffer("ds", (s.ds_slots, s.block_q // CHUNK, s.block_kv, CHUNK), spec.dtype),
               Buffer("dq", (handed, *_PIECE), _FLOAT32, chunked=False))
    barriers = *_ring("dq", 1, 1, handed), *_ring("ds", s.warpgroups, readers, s.ds_slots)
    added = (Barrier("dq_added", s.dq_slots),) if s.rounds_dq else ()
    return Memory(common.buffers + buffers, common.barriers + barriers + added)


def split_memory(spec: AttentionSpec, s: SplitSchedule) -> Memory:
    """Keys and values, rings of queries and douts, which both warpgroups read, and P on its way from one to the other:
    as one number of 16 bits, or as two (`backward.kv_split`).
    """
    common = _kv_memory(spec, s, readers=2)
    parts, dtype = (1, "float16") if is_additive(spec.score) else (2, "bfloat16")
    p = Buffer("p", (s.p_slots, parts * s.block_q // CHUNK, s.block_kv, CHUNK), jnp.dtype(dtype))
    return Memory((*common.buffers, p), common.barriers + _ring("p", 1, 1, s.p_slots))


def _kv_memory(spec: AttentionSpec, s: KeySchedule, readers: int) -> Memory:
    """What all kernels have that keep a key tile. The queries' statistics come with them, in a load of their own."""
    d, d_v = chunks(spec.d), chunks(spec.d_v)
    biases: tuple[Buffer, ...] = ()
    if s.bias_ring:
        assert spec.bias is not None
        biases = (Buffer("bias", (s.num_stages, s.block_kv // CHUNK, s.block_q, CHUNK), spec.bias.dtype),)
    with_q = d + 1 + (s.block_kv // CHUNK) * s.bias_ring
    rings = (_ring("q", with_q + d_v, readers, s.num_stages) if s.together else
             (*_ring("q", with_q, readers, s.num_stages), *_ring("dout", d_v, readers, s.num_stages)))
    return Memory(
        (Buffer("q", (s.num_stages, d, s.block_q, CHUNK), spec.dtype),
         Buffer("dout", (s.num_stages, d_v, s.block_q, CHUNK), spec.dtype), *biases,
         Buffer("k", (d, s.block_kv, CHUNK), spec.dtype), Buffer("v", (d_v, s.block_kv, CHUNK), spec.dtype),
         Buffer("stats", (s.num_stages, _STATISTICS, s.block_q), _FLOAT32, chunked=False)),
        (Barrier("kv_full", d + d_v), *rings))


def dq_memory(spec: AttentionSpec, s: DqSchedule) -> Memory:
    """A query and a dout for each warpgroup, which arrive together; rings of keys and values."""
    d, d_v = chunks(spec.d), chunks(spec.d_v)
    return Memory(
        (Buffer("q", (s.warpgroups, d, ROWS_PER_WARPGROUP, CHUNK), spec.dtype),
         Buffer("dout", (s.warpgroups, d_v, ROWS_PER_WARPGROUP, CHUNK), spec.dtype),
         Buffer("k", (s.k_stages, d, s.block_kv, CHUNK), spec.dtype),
         Buffer("v", (s.v_stages, d_v, s.block_kv, CHUNK), spec.dtype)),
        (Barrier("q_full", d + d_v, s.warpgroups),
         *_ring("k", d, s.warpgroups, s.k_stages), *_ring("v", d_v, s.warpgroups, s.v_stages)))


def wide_memory(spec: AttentionSpec, s: WideSchedule) -> Memory:
    """64 rows that the block keeps; tiles of what stays, in which each chunk has a barrier of its own, and a ring of
    chunks of what passes; the weights on their way from one warpgroup to the other, and P on its way to where dS is
    made. The barriers of both are one array.
    """
    count = {name: chunks(spec.d if name in ("q", "k") else spec.d_v) for name in ("q", "k", "v", "dout")}
    tile = lambda name: (count[name], ROWS_PER_WARPGROUP, CHUNK)
    lead = (1,) if s.makes == "dq" else ()  # as `dq_memory` has them
    buffers = [*(Buffer(name, (*lead, *tile(name)), spec.dtype) for name in s.held),
               Buffer(s.staying, (s.num_stages, *tile(s.staying)), spec.dtype),
               Buffer(s.passing, (s.slots, 1, ROWS_PER_WARPGROUP, CHUNK), spec.dtype),
               Buffer("weights", (1, ROWS_PER_WARPGROUP, CHUNK), spec.dtype)]
    barriers = [Barrier("held_full", sum(count[name] for name in s.held)),
                Barrier("staying_full", 1, s.num_stages * count[s.staying]), Barrier("passing_full", 1, s.slots),
                Barrier("staying_free", 2, s.num_stages, s.cluster > 1),
                Barrier("passing_free", 1, s.slots, s.cluster > 1), *_ring("handed", 1, 1, 1 if s.makes == "dv" else 2)]
    if s.makes != "dv":
        buffers.append(Buffer("p", (1, ROWS_PER_WARPGROUP, CHUNK), jnp.dtype("float16")))
    if s.makes != "dq":
        buffers.append(Buffer("stats", (s.num_stages, _STATISTICS, ROWS_PER_WARPGROUP), _FLOAT32, chunked=False))
        barriers.append(Barrier("stats_full", 1, s.num_stages))
    return Memory(tuple(buffers), tuple(barriers))


def dbias_memory(spec: AttentionSpec, s: DbiasSchedule) -> Memory:
    """A ring of queries with keys and, in turn, douts with values; and the tile of a bias in 16 bits, 64 rows of it for
    each warpgroup, over which its gradient is written.
    """
    assert spec.bias is not None
    widest = chunks(max(spec.d, spec.d_v))  # chunks past the end of an array arrive, too, as zeros
    buffers = [Buffer("rows", (s.num_stages, s.warpgroups, widest, ROWS_PER_WARPGROUP, CHUNK), spec.dtype),
               Buffer("keys", (s.num_stages, widest, s.block_kv, CHUNK), spec.dtype)]
    barriers = [*_ring("ring", (1 + s.warpgroups) * widest, s.warpgroups, s.num_stages)]
    if spec.bias.dtype.itemsize == 2:
        across = chunks(s.block_kv)
        buffers.append(Buffer("bias", (s.warpgroups, across, ROWS_PER_WARPGROUP, CHUNK), spec.bias.dtype))
        barriers += _ring("bias", across, 1, s.warpgroups)
    return Memory(tuple(buffers), tuple(barriers))


def prepare_memory(spec: AttentionSpec) -> Memory:
    """64 rows of out and of dout, which arrive together; where delta is known, neither is read for it. Copies, if there
    may be some (`backward.copies`), go through the first chunk.
    """
    barriers = [Barrier("copy_full", 1)] * may_have_idle_queries(spec)
    if spec.partial:
        rows = Buffer("rows", (1, 1, ROWS_PER_WARPGROUP, CHUNK), spec.dtype)
        return Memory((rows,) * len(barriers), (*barriers,))
    rows = Buffer("rows", (2, chunks(spec.d_v), ROWS_PER_WARPGROUP, CHUNK), spec.dtype)
    return Memory((rows,), (Barrier("full", 2 * chunks(spec.d_v)), *barriers))


def finish_memory(spec: AttentionSpec) -> Memory:
    """64 rows of dq, where it is rounded."""
    if spec.partial:
        return Memory(())
    return Memory((Buffer("dq", (chunks(spec.d), ROWS_PER_WARPGROUP, CHUNK), spec.dtype),))


# -- float32 inputs --------------------------------------------------------------------------------------------------

PARTS = 2
"""The float16 numbers that a float32 number is split into, hi and lo (`float32.parts`)."""


def in_parts(spec: AttentionSpec) -> AttentionSpec:
    """The problem of the arrays of parts, (..., 2 dim) float16 with dim a multiple of 64: the columns of hi, then those
    of lo. Everything is as in `spec` where tiles, rings and masks are concerned; results are float32.
    """
    wide = lambda dim: PARTS * CHUNK * chunks(dim)
    return dataclasses.replace(spec, dtype=np.dtype(np.float16), d=wide(spec.d), d_v=wide(spec.d_v), partial=True)


class Kind(NamedTuple):
    """A gradient: a block keeps tiles of its own rows, and walks over tiles of the other axis."""

    own: tuple[str, ...]
    others: tuple[str, str]  # scores are products of own[0] and others[0]
    added: int  # which of the others is added up

    @property
    def of_queries(self) -> bool:
        """Whether a block keeps queries."""
        return self.own[0] == "q"

    @property
    def stages(self) -> tuple[int, int]:
        """Slots of the rings of the others: what fits with 128 columns."""
        return 2, 2 if len(self.own) == 1 else 1


KINDS = {"dq": Kind(("q", "dout"), ("k", "v"), 0), "dk": Kind(("k", "v"), ("q", "dout"), 0),
         "dv": Kind(("k",), ("q", "dout"), 1)}


def split_rows_memory(columns: int) -> Memory:
    """Of float32 inputs, where they are split: 64 rows as they come, and their parts."""
    count = chunks(columns)
    return Memory((Buffer("rows", (count, ROWS_PER_WARPGROUP, CHUNK), _FLOAT32, chunked=False),
                   Buffer("parts", (PARTS * count, ROWS_PER_WARPGROUP, CHUNK), np.dtype("float16"))),
                  (Barrier("full", count),))


def prepare_float32_memory(spec: AttentionSpec) -> Memory:
    """64 rows of out, unless the spec is partial, and of dout, which arrive together, and the parts of dout."""
    if spec.partial:
        return split_rows_memory(spec.d_v)
    (rows, *others), (full,) = split_rows_memory(spec.d_v)
    return Memory((rows, rows._replace(name="out"), *others), (full._replace(arrivals=2 * full.arrivals),))


def gradient_memory(spec: AttentionSpec, kind: Kind, s: KvSchedule | DqSchedule) -> Memory:
    """Of a gradient of float32 inputs: one or two tiles that a block keeps, and rings of the two that it walks over.
    The spec is that of the parts.
    """
    kept, walked = (s.block_q, s.block_kv) if kind.of_queries else (s.block_kv, s.block_q)
    count = lambda name: chunks(spec.d if name in ("q", "k") else spec.d_v)
    buffers = [Buffer(f"own_{i}", (count(name), kept, CHUNK), spec.dtype) for i, name in enumerate(kind.own)]
    barriers = [Barrier("own_full", sum(map(count, kind.own)))]
    for i, (name, slots) in enumerate(zip(kind.others, kind.stages)):
        buffers.append(Buffer(f"other_{i}", (slots, count(name), walked, CHUNK), spec.dtype))
        barriers += _ring(f"other_{i}", count(name), s.warpgroups, slots)
    return Memory(tuple(buffers), tuple(barriers))


_PIECE = 16, 256
"""64 x 64 float32 numbers of dq, in the order in which the threads of a warpgroup hold them."""


def dq_pieces(spec: AttentionSpec, s: KvSchedule) -> int:
    """64 x 64 pieces of a tile of dq."""
    return s.block_q // CHUNK * chunks(spec.d)


def dq_acc_shape(spec: AttentionSpec, s: KvSchedule) -> tuple[int, ...]:
    """The shape of dq's float32 sums in the fused form: (batch, q_heads, query tiles, pieces, 16, 256)."""
    return spec.batch, spec.q_heads, tiles.cdiv(spec.q_len, s.block_q), dq_pieces(spec, s), *_PIECE


def smem_bytes(spec: AttentionSpec,
               s: (ForwardSchedule | DecodeSchedule | KvSchedule | SplitSchedule | DqSchedule | WideSchedule
                   | DbiasSchedule)) -> int:
    """Shared memory of a block, its barriers included."""
    if spec.dtype == jnp.float32:
        return _float32_bytes(in_parts(spec), s)
    match s:
        case DecodeSchedule():
            memory = decode_memory(spec, s)
        case ForwardSchedule():
            memory = forward_memory(spec, s)
        case KvSchedule():
            memory = kv_memory(spec, s)
        case SplitSchedule():
            memory = split_memory(spec, s)
        case DqSchedule():
            memory = dq_memory(spec, s)
        case WideSchedule():
            memory = wide_memory(spec, s)
        case DbiasSchedule():
            memory = dbias_memory(spec, s)
    return memory.smem_bytes


def _float32_bytes(wide: AttentionSpec,
                   s: (ForwardSchedule | DecodeSchedule | KvSchedule | SplitSchedule | DqSchedule | WideSchedule
                       | DbiasSchedule)) -> int:
    """The same of float32 inputs, of the problem of their parts: of dk or of dv, what needs more."""
    if isinstance(s, ForwardSchedule):
        return forward_memory(wide, s).smem_bytes
    assert isinstance(s, KvSchedule | DqSchedule), s
    names = ("dk", "dv") if isinstance(s, KvSchedule) else ("dq",)
    return max(gradient_memory(wide, KINDS[name], s).smem_bytes for name in names)
