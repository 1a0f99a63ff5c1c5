"""The queries of a key head, packed into the 64 rows of a tile, on their way between registers and global memory.

Row r is query r // group of query head r % group of the group. Rows are few, so they go without shared memory: each
thread loads the elements of the query that wgmma wants of it, and stores its own of the output. Rows past the last are
zero where they are loaded, and are not stored.

Rows may come in bands: each of 2 or 4 bands of the tile holds all queries again, for keys of its own of each tile of
keys. So few queries keep all warps busy, and no two of these read the same keys. Once bands are merged, the first is
stored as one tile is.
"""

from collections.abc import Callable, Iterator

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_flash import tiles
from pallas_flash.arrays import Array, Int
from pallas_flash.kernels.mosaic import ptx
from pallas_flash.kernels.mosaic.cache_rules import rows
from pallas_flash.kernels.mosaic.decode.work import Head
from pallas_flash.kernels.mosaic.fragments import (
    ROW_LAYOUT,
    ROWS,
    TILE,
    Fragment,
    PerRow,
    positions,
    thread_in_tile,
)
from pallas_flash.kernels.mosaic.interpret import interpreted_as
from pallas_flash.kernels.mosaic.types import Index, Ref
from pallas_flash.spec import AttentionSpec

__all__ = [
    "CHUNK", "group_of", "in_band", "key_positions", "load_queries", "own_rows", "place_of", "queries_of", "query_rows",
    "statistic_of", "store_out", "store_part", "store_part_statistics", "store_statistics", "width",
]


CHUNK = 64
"""Columns of a tile that lie together in shared memory."""


def width(spec: AttentionSpec) -> int:
    """The columns of a query in registers: whole chunks, as in shared memory."""
    return CHUNK * tiles.cdiv(spec.d, CHUNK)


# -- where a row lies --------------------------------------------------------------------------------------------------

def _const(value: int) -> ir.Value:
    return mgpu.utils.c(value, ptx.i32())


def _wide(x: ir.Value) -> ir.Value:
    return arith.extui(ir.IntegerType.get_signless(64), x)


def _times(x: ir.Value, count: int) -> ir.Value:
    return arith.muli(x, mgpu.utils.c(count, ir.IntegerType.get_signless(64)))


def _query_and_head(spec: AttentionSpec, kv_head: ir.Value, row: ir.Value) -> tuple[ir.Value, ir.Value]:
    group = _const(spec.group)
    return arith.divui(row, group), arith.addi(arith.muli(kv_head, group), arith.remui(row, group))


def place_of(spec: AttentionSpec, head: tuple[ir.Value, ir.Value], row: ir.Value) -> ir.Value:
    """The number of a packed row among the rows of q or out, 64 bits wide.

    Args:
      head: batch entry and key head, 32 bits wide, as `row`.
    """
    batch, kv_head = head
    query, q_head = _query_and_head(spec, kv_head, row)
    (outer, count), (inner, inner_count) = (query, spec.q_len), (q_head, spec.q_heads)
    if spec.layout == "BHLD":
        (outer, count), (inner, inner_count) = (inner, inner_count), (outer, count)
    outer = arith.addi(_times(_wide(batch), count), _wide(outer))
    return arith.addi(_times(outer, inner_count), _wide(inner))


def statistic_of(spec: AttentionSpec, head: tuple[ir.Value, ir.Value], row: ir.Value, which: int) -> ir.Value:
    """The index of one of the two statistics of a packed row in (batch, q_heads, 2, q_len), 64 bits wide."""
    batch, kv_head = head
    query, q_head = _query_and_head(spec, kv_head, row)
    lead = arith.addi(_times(_wide(batch), 2 * spec.q_heads), arith.addi(
        _times(_wide(q_head), 2), mgpu.utils.c(which, ir.IntegerType.get_signless(64))))
    return arith.addi(_times(lead, spec.q_len), _wide(query))


def _below(a: ir.Value, b: int) -> ir.Value:
    return arith.cmpi(arith.CmpIPredicate.slt, a, _const(b))


def own_rows() -> Iterator[tuple[int, ir.Value, ir.Value]]:
    """The two rows of a tile that a thread has elements of: 0 or 1, the row, and the thread's quarter of it."""
    warp, row, quarter = thread_in_tile()
    row = arith.addi(arith.muli(warp, _const(16)), row)
    for i in range(2):
        yield i, arith.addi(row, _const(8 * i)), quarter


def in_band(row: ir.Value, bands: int) -> ir.Value:
    """A row of the tile as one of its band."""
    return row if bands == 1 else arith.remui(row, _const(ROWS // bands))


def _own_band(bands: int) -> Array:
    """The band of this warp: the same number in its lanes, not in those of other warps."""
    @plgpu.inline_mgpu(return_type=plgpu.ShapeDtypeStruct((), jnp.int32, ptx.SCALAR))
    def band(_: mgpu.LaunchContext) -> mgpu.FragmentedArray:
        warp, _row, _quarter = thread_in_tile()
        return mgpu.FragmentedArray.splat(arith.divui(warp, _const(4 // bands)), (), is_signed=True)

    return band()


def _key_positions_plain(columns: int, first: Index, bands: int) -> Int[Array, "64 n"]:
    band = jnp.arange(ROWS, dtype=jnp.int32)[:, None] // (ROWS // bands)
    return first + columns * band + jnp.arange(columns, dtype=jnp.int32)[None]


@interpreted_as(_key_positions_plain)
def key_positions(columns: int, first: Index, bands: int) -> Int[Array, "64 n"]:
    """The keys of a tile's columns, (64, columns) int32 in the layout TILE: of the tile of keys that begins at `first`,
    each band has the next `columns`.
    """
    return positions(columns, 1, first if bands == 1 else first + _own_band(bands) * columns)


def _query_rows_plain(columns: int, bands: int) -> Int[Array, "64 n"]:
    row = jnp.arange(ROWS, dtype=jnp.int32)[:, None] % (ROWS // bands)
    return jnp.broadcast_to(row, (ROWS, columns))


@interpreted_as(_query_rows_plain)
def query_rows(columns: int, bands: int) -> Int[Array, "64 n"]:
    """The packed row of each row of a tile, (64, columns) int32 in the layout TILE."""
    return positions(columns, 0, 0 if bands == 1 else _own_band(bands) * -(ROWS // bands))


def _address(ref: ir.Value, index: ir.Value) -> ir.Value:
    return mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [index], ir.MemRefType(ref.type).element_type)


def group_of(spec: AttentionSpec, ref: Ref, head: Head) -> Ref:
    """A head's part of q or out: (q_len, group, columns), or (group, q_len, columns) in the layout "BHLD"."""
    heads = pl.ds(head.kv_head * spec.group, spec.group)
    return ref.at[head.batch, :, heads] if spec.layout == "BLHD" else ref.at[head.batch, heads]


def _put(ptx_code: str, predicate: ir.Value, *args: ir.Value) -> None:
    mgpu.utils.inline_ptx(ptx_code, *args, predicate=predicate, has_side_effects=True)


# -- queries -----------------------------------------------------------------------------------------------------------

def _load_queries_plain(spec: AttentionSpec, ref: Ref, head: Head, bands: int = 1) -> Fragment:
    found = group_of(spec, ref, head)[...]
    return _in_bands(spec, found if spec.layout == "BLHD" else found.swapaxes(0, 1), bands)


def _in_bands(spec: AttentionSpec, found: Array, bands: int) -> Fragment:
    """(q_len, group, columns) as each band of a tile has it, for plain meanings."""
    found = found.reshape(rows(spec), spec.d)
    found = jnp.pad(found, ((0, ROWS // bands - rows(spec)), (0, width(spec) - spec.d)))
    return jnp.tile(found, (bands, 1))


def _words(ref: ir.Value, spec: AttentionSpec, bands: int, start_of: Callable[[ir.Value], ir.Value],
           load: Callable[[ir.Value, ir.Value], ir.Value]) -> mgpu.FragmentedArray:
    """The queries of each band, (64, `width`) of their type in the layout TILE.

    Args:
      start_of: from a row to its first element in ref, 64 bits wide.
      load: from the address of two elements, and whether they are there (int32), to their word, or 0.
    """
    shape = (ROWS, width(spec))
    pair = ir.VectorType.get((2,), ir.MemRefType(ref.type).element_type)
    word = ir.VectorType.get((1,), ptx.i32())
    registers = np.empty(TILE.to_mgpu().registers_shape(shape), dtype=object)
    flat = registers.reshape(shape[1] // 8, 2)  # rows 16 warp + 8 i + row, columns 8 j + 2 quarter + 0, 1
    for i, row, quarter in own_rows():
        row = in_band(row, bands)
        start = arith.addi(start_of(row), _times(_wide(quarter), 2))
        inside = arith.extui(ptx.i32(), _below(row, rows(spec)))
        for j in range(flat.shape[0]):
            x = _const(0)
            if 8 * j < spec.d:
                at = arith.addi(start, mgpu.utils.c(8 * j, ir.IntegerType.get_signless(64)))
                x = load(_address(ref, at), inside)
            flat[j, i] = vector.bitcast(pair, vector.broadcast(word, x))
    return mgpu.FragmentedArray(_registers=registers, _layout=TILE.to_mgpu(), _is_signed=None)


def _word_of(kind: str, address: str) -> Callable[[ir.Value, ir.Value], ir.Value]:
    code = f"{{ .reg .pred p; setp.ne.u32 p, $2, 0; mov.b32 $0, 0; @p ld.{kind}.b32 $0, [$1]; }}"
    return lambda at, inside: llvm.inline_asm(
        ptx.i32(), [at, inside], code, f"=&r,{address},r", has_side_effects=True)


@interpreted_as(_load_queries_plain)
def load_queries(spec: AttentionSpec, ref: Ref, head: Head, bands: int = 1) -> Fragment:
    """Loads the queries of a key head, for each band: (64, `width`) of their type in the layout TILE."""
    shape = (ROWS, width(spec))

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), ptx.SCALAR, ptx.SCALAR),
                       return_type=plgpu.ShapeDtypeStruct(shape, ref.dtype, TILE))
    def load(_: mgpu.LaunchContext, ref: ir.Value, batch: mgpu.FragmentedArray,
             kv_head: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        of = batch.registers.item(), kv_head.registers.item()
        return _words(ref, spec, bands, lambda row: _times(place_of(spec, of, row), spec.d), _word_of("global.nc", "l"))

    return load(ref, ptx.scalar(head.batch), ptx.scalar(head.kv_head))


def _queries_of_plain(spec: AttentionSpec, ref: Ref, bands: int = 1) -> Fragment:
    found = ref[...] if spec.layout == "BLHD" else ref[...].swapaxes(0, 1)
    return _in_bands(spec, found, bands)


@interpreted_as(_queries_of_plain)
def queries_of(spec: AttentionSpec, ref: Ref, bands: int = 1) -> Fragment:
    """What `load_queries` loads, from a head's part of q in shared memory (`group_of`)."""
    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),),
                       return_type=plgpu.ShapeDtypeStruct((ROWS, width(spec)), ref.dtype, TILE))
    def load(_: mgpu.LaunchContext, ref: ir.Value) -> mgpu.FragmentedArray:
        def start_of(row: ir.Value) -> ir.Value:
            if spec.layout == "BHLD":
                query, head = arith.divui(row, _const(spec.group)), arith.remui(row, _const(spec.group))
                row = arith.addi(arith.muli(head, _const(spec.q_len)), query)
            return _times(_wide(row), spec.d)

        return _words(ref, spec, bands, start_of, _word_of("shared", "l"))

    return load(ref)


# -- results -----------------------------------------------------------------------------------------------------------

def _store_out_plain(spec: AttentionSpec, x: Fragment, ref: Ref, head: Head) -> None:
    x = x[:rows(spec)].reshape(spec.q_len, spec.group, -1)
    group_of(spec, ref, head)[...] = x if spec.layout == "BLHD" else x.swapaxes(0, 1)


@interpreted_as(_store_out_plain)
def store_out(spec: AttentionSpec, x: Fragment, ref: Ref, head: Head) -> None:
    """Stores the output of a key head, (64, d_v) of 16 bits in the layout TILE."""
    @plgpu.inline_mgpu(arg_types=(TILE, plgpu.RefType(), ptx.SCALAR, ptx.SCALAR))
    def store(_: mgpu.LaunchContext, x: mgpu.FragmentedArray, ref: ir.Value, batch: mgpu.FragmentedArray,
              kv_head: mgpu.FragmentedArray) -> None:
        flat, word = x.registers.reshape(-1, 2), ir.VectorType.get((1,), ptx.i32())
        for i, row, quarter in own_rows():
            place = place_of(spec, (batch.registers.item(), kv_head.registers.item()), row)
            start = arith.addi(_times(place, spec.d_v), _times(_wide(quarter), 2))
            for j in range(flat.shape[0]):
                at = arith.addi(start, mgpu.utils.c(8 * j, ir.IntegerType.get_signless(64)))
                both = vector.extract(vector.bitcast(word, flat[j, i]), [], [0])
                _put("st.global.b32 [$0], $1;", _below(row, rows(spec)), _address(ref, at), both)

    store(x, ref, ptx.scalar(head.batch), ptx.scalar(head.kv_head))


def _store_statistics_plain(spec: AttentionSpec, x: tuple[PerRow, PerRow], ref: Ref, head: Head) -> None:
    for which, values in enumerate(x):
        own = values[:rows(spec)].reshape(spec.q_len, spec.group).T
        ref[head.batch, pl.ds(head.kv_head * spec.group, spec.group), which] = own


@interpreted_as(_store_statistics_plain)
def store_statistics(spec: AttentionSpec, x: tuple[PerRow, PerRow], ref: Ref, head: Head) -> None:
    """Stores the two statistics of the rows of a key head, each (64,), to (batch, q_heads, 2, q_len)."""
    @plgpu.inline_mgpu(arg_types=(ROW_LAYOUT, ROW_LAYOUT, plgpu.RefType(), ptx.SCALAR, ptx.SCALAR))
    def store(_: mgpu.LaunchContext, a: mgpu.FragmentedArray, b: mgpu.FragmentedArray, ref: ir.Value,
              batch: mgpu.FragmentedArray, kv_head: mgpu.FragmentedArray) -> None:
        head = batch.registers.item(), kv_head.registers.item()
        for i, row, quarter in own_rows():
            leads = arith.andi(_below(row, rows(spec)), _below(quarter, 1))
            for which, values in enumerate((a, b)):
                value = vector.extract(values.registers.reshape(-1)[i], [], [0])
                _put("st.global.f32 [$0], $1;", leads, _address(ref, statistic_of(spec, head, row, which)), value)

    store(*x, ref, ptx.scalar(head.batch), ptx.scalar(head.kv_head))


# -- partial results ---------------------------------------------------------------------------------------------------

def _store_part_plain(spec: AttentionSpec, x: Fragment, ref: Ref, slot: Index) -> None:
    ref[slot, pl.ds(0, rows(spec) * spec.d_v)] = x[:rows(spec)].reshape(-1)


@interpreted_as(_store_part_plain)
def store_part(spec: AttentionSpec, x: Fragment, ref: Ref, slot: Index) -> None:
    """Stores the rows of x, (64, d_v) float32 in the layout TILE, one after the other, to ref[slot]."""
    size = ref.shape[1]

    @plgpu.inline_mgpu(arg_types=(TILE, plgpu.RefType(), ptx.SCALAR))
    def store(_: mgpu.LaunchContext, x: mgpu.FragmentedArray, ref: ir.Value, slot: mgpu.FragmentedArray) -> None:
        flat = x.registers.reshape(-1, 2)
        for i, row, quarter in own_rows():
            start = arith.addi(_times(_wide(slot.registers.item()), size), _wide(arith.addi(
                arith.muli(row, _const(spec.d_v)), arith.muli(quarter, _const(2)))))
            for j in range(flat.shape[0]):
                at = arith.addi(start, mgpu.utils.c(8 * j, ir.IntegerType.get_signless(64)))
                both = (vector.extract(flat[j, i], [], [e]) for e in (0, 1))
                _put("st.global.v2.f32 [$0], {$1, $2};", _below(row, rows(spec)), _address(ref, at), *both)

    store(x, ref, ptx.scalar(slot))


def _store_part_statistics_plain(x: tuple[PerRow, PerRow], ref: Ref, slot: Index) -> None:
    ref[slot] = jnp.stack(x, axis=1)


@interpreted_as(_store_part_statistics_plain)
def store_part_statistics(x: tuple[PerRow, PerRow], ref: Ref, slot: Index) -> None:
    """Stores two numbers for each row, (64,) float32 each, to ref[slot], (64, 2)."""
    @plgpu.inline_mgpu(arg_types=(ROW_LAYOUT, ROW_LAYOUT, plgpu.RefType(), ptx.SCALAR))
    def store(_: mgpu.LaunchContext,
              *args: *tuple[*tuple[mgpu.FragmentedArray, ...], ir.Value, mgpu.FragmentedArray]) -> None:
        *x, ref, slot = args
        for i, row, quarter in own_rows():
            index = arith.addi(arith.muli(slot.registers.item(), _const(ROWS)), row)
            values = (vector.extract(values.registers.reshape(-1)[i], [], [0]) for values in x)
            _put("st.global.v2.f32 [$0], {$1, $2};", _below(quarter, 1), _address(ref, _times(_wide(index), 2)),
                 *values)

    store(*x, ref, ptx.scalar(slot))
