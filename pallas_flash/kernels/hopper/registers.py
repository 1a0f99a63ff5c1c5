"""Arrays in the registers of a warpgroup, as the Hopper kernels have them: what every generation has
(`mosaic.fragments`), accumulators of wgmma, and copies to and from memory.

Tiles in shared memory are (chunks, rows, 64): columns in chunks of 64, a row of a chunk being the 128 bytes that TMA
swizzles. Plain functions of `jax.numpy` do for the rest.
"""

import functools
import math
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_flash.arrays import Array
from pallas_flash.kernels.hopper.schedule import CHUNK
from pallas_flash.kernels.mosaic import ptx
from pallas_flash.kernels.mosaic.fragments import (
    COLUMN_LAYOUT,
    ROW_LAYOUT,
    TILE,
    Fragment,
    PerColumn,
    PerRow,
    column_sums,
    concatenate,
    load_row,
    positions,
    row_zeros,
    spread,
    stack,
    store_zeros,
    thread_in_tile,
)
from pallas_flash.kernels.mosaic.interpret import interpreted_as
from pallas_flash.kernels.mosaic.types import Index, Ref

__all__ = [
    "ACC", "CHUNKED", "COLUMN_LAYOUT", "ROW_LAYOUT", "SWIZZLE_BYTES", "TILE", "Fragment", "PerColumn", "PerRow",
    "chunk_bytes", "column_sums", "concatenate", "load_chunk", "load_chunks", "load_linear", "load_matrices",
    "load_row", "load_row_stats", "load_rows", "load_transposed", "own_element", "positions", "row_zeros", "spread",
    "stack", "store_chunks", "store_linear", "store_row_stats", "store_rows", "store_zeros", "thread_in_tile", "zeros",
]

SWIZZLE_BYTES = 128
"""The widest swizzle: the bytes of a row of a chunk."""
CHUNKED = (plgpu.SwizzleTransform(SWIZZLE_BYTES),)  # type: ignore[abstract]  # JAX leaves the body of `transform_array` empty
"""Transforms of a buffer of shape (..., chunks, rows, 64)."""

ACC = plgpu.Layout._WGMMA_ACC_32BIT
"""(64, columns) as wgmma wants accumulators: one 32-bit register an element."""


def zeros(columns: int) -> Fragment:
    """A (64, columns) accumulator of zeros."""
    return plgpu.layout_cast(jnp.zeros((64, columns), jnp.float32), ACC)


def _store_chunks_plain(x: Fragment, ref: Ref) -> None:
    padded = jnp.pad(x, ((0, 0), (0, ref.shape[0] * CHUNK - x.shape[1])))
    ref[...] = jnp.swapaxes(padded.reshape(64, ref.shape[0], CHUNK), 0, 1)


@interpreted_as(_store_chunks_plain)
def store_chunks(x: Fragment, ref: Ref) -> None:
    """Writes x, (64, columns) in the layout TILE, into ref, (chunks, 64, 64) in shared memory; columns past x get
    any value.
    """
    columns = x.shape[1]
    @plgpu.inline_mgpu(arg_types=(TILE, plgpu.RefType(CHUNKED)))
    def store(_: mgpu.LaunchContext, x: mgpu.FragmentedArray, ref: ir.Value) -> None:
        for chunk in range(-(-columns // CHUNK)):
            part = _padded(x[:, chunk * CHUNK:min((chunk + 1) * CHUNK, columns)])
            part.store_tiled(_core_matrices(ref, chunk), swizzle=SWIZZLE_BYTES)

    store(x, ref)


def _load_chunks_plain(ref: Ref, first: int, columns: int, dtype: np.dtype) -> Fragment:
    del dtype
    return jnp.swapaxes(ref[...], 0, 1).reshape(64, -1)[:, first:first + columns]


@interpreted_as(_load_chunks_plain)
def load_chunks(ref: Ref, first: int, columns: int, dtype: np.dtype) -> Fragment:
    """Loads columns of ref, (chunks, 64, 64) in shared memory: (64, columns) in the layout TILE.

    `first`, where they begin, and their number are multiples of 8.
    """
    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(CHUNKED),),
                       return_type=plgpu.ShapeDtypeStruct((64, columns), dtype, TILE))
    def load(_: mgpu.LaunchContext, ref: ir.Value) -> mgpu.FragmentedArray:
        i32, pair = ptx.i32(), ir.VectorType.get((2,), ir.MemRefType(ref.type).element_type)
        const = lambda value: mgpu.utils.c(value, i32)
        warp, row, quarter = thread_in_tile()
        start = arith.addi(arith.muli(warp, const(16 * CHUNK)), arith.addi(
            arith.muli(row, const(CHUNK)), arith.muli(quarter, const(2))))
        layout = TILE.to_mgpu()
        registers = np.empty(layout.registers_shape((64, columns)), dtype=object)
        flat = registers.reshape(columns // 8, 2)
        for j, i in np.ndindex(flat.shape):
            chunk, column = divmod(first + 8 * j, CHUNK)
            swizzled = arith.muli(arith.xori(row, const(column // 8)), const(8))
            index = arith.addi(arith.addi(start, swizzled), const(chunk * chunk_bytes(ref) // 2 + 8 * i * CHUNK))
            flat[j, i] = llvm.load(pair, mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [index],
                                                                 pair.element_type))
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return load(ref)


@interpreted_as(lambda ref: ref[...])
def load_chunk(ref: Ref) -> Fragment:
    """Loads one chunk of shared memory by ldmatrix: (64, 64) in the layout TILE."""
    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(CHUNKED),),
                       return_type=plgpu.ShapeDtypeStruct((64, 64), ref.dtype, TILE))
    def load(_: mgpu.LaunchContext, ref: ir.Value) -> mgpu.FragmentedArray:
        rows = mgpu.memref_unfold(mgpu.memref_unfold(ref, 0, (None, 8)), 2, (None, CHUNK))
        matrices = mgpu.memref_transpose(rows, (0, 2, 1, 3))
        return mgpu.FragmentedArray.load_tiled(matrices, swizzle=SWIZZLE_BYTES, layout=TILE.to_mgpu())

    return load(ref)


@interpreted_as(lambda ref: jnp.swapaxes(ref[...], 0, 1).reshape(64, -1))
def load_matrices(ref: Ref) -> Fragment:
    """Loads 64 rows of shared memory by ldmatrix, (chunks, 64, 64): (64, columns) in the layout TILE."""
    return _load_matrices(ref, ref.shape[0] * CHUNK, is_transposed=False)


@interpreted_as(lambda ref: ref[0].T)
def load_transposed(ref: Ref) -> Fragment:
    """Loads a chunk of shared memory by ldmatrix, (1, rows, 64), transposed: (64, rows) in the layout TILE.

    The number of rows is a multiple of 16.
    """
    return _load_matrices(ref, ref.shape[1], is_transposed=True)


def _load_matrices(ref: Ref, columns: int, is_transposed: bool) -> Fragment:
    """A fragment, four matrices of 8 x 8 at a time, of 16 columns; each lane names the 16 bytes of one row of one of
    them. The second is of the rows 8 to 15 of a warp, the third and fourth of the columns 8 to 15.
    """
    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(CHUNKED),),
                       return_type=plgpu.ShapeDtypeStruct((64, columns), ref.dtype, TILE))
    def load(_: mgpu.LaunchContext, ref: ir.Value) -> mgpu.FragmentedArray:
        i32, const = ptx.i32(), lambda value: mgpu.utils.c(value, ptx.i32())
        thread = arith.remui(ptx.moved(mgpu.utils.thread_idx()), const(ptx.WARPGROUP))
        warp, lane = arith.divui(thread, const(32)), arith.remui(thread, const(32))
        matrix, row = arith.divui(lane, const(8)), arith.remui(lane, const(8))
        across, below = arith.divui(matrix, const(2)), arith.remui(matrix, const(2))
        start = llvm.ptrtoint(i32, mgpu.utils.memref_ptr(ref))
        if is_transposed:  # 16 rows of memory are 16 columns; a unit of 16 bytes is 8 rows
            first = arith.addi(arith.muli(across, const(8)), row)
            unit = arith.xori(arith.addi(arith.muli(warp, const(2)), below), row)
            start = arith.addi(start, arith.muli(unit, const(16)))
            addresses = [(0, SWIZZLE_BYTES * i) for i in range(0, columns, 16)]
        else:  # a unit is 8 columns
            first = arith.addi(arith.muli(warp, const(16)), arith.addi(arith.muli(below, const(8)), row))
            unit = arith.muli(arith.xori(across, row), const(16))
            addresses = [(16 * (i % CHUNK // 8), i // CHUNK * chunk_bytes(ref)) for i in range(0, columns, 16)]
        start = arith.addi(start, arith.muli(first, const(SWIZZLE_BYTES)))
        layout, words = TILE.to_mgpu(), ir.Type.parse("!llvm.struct<(i32, i32, i32, i32)>")
        registers = np.empty(layout.registers_shape((64, columns)), dtype=object)
        flat = registers.reshape(columns // 16, 4)
        pair = ir.VectorType.get((2,), ir.MemRefType(ref.type).element_type)
        asm = f"ldmatrix.sync.aligned.m8n8.x4{'.trans' * is_transposed}.shared.b16 {{$0, $1, $2, $3}}, [$4];"
        for i, (flipped, offset) in enumerate(addresses):
            address = start if is_transposed else arith.addi(start, arith.xori(unit, const(flipped)))
            found = llvm.inline_asm(words, [arith.addi(address, const(offset))], asm, "=r,=r,=r,=r,r",
                                    has_side_effects=True)
            for j in range(4):
                word = vector.from_elements(ir.VectorType.get((1,), i32), [llvm.extractvalue(i32, found, [j])])
                flat[i, j] = vector.bitcast(pair, word)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return load(ref)


def _store_linear_plain(x: Fragment, ref: Ref) -> None:
    ref[...] = x.reshape(_linear_shape(x.shape[1]))


@interpreted_as(_store_linear_plain)
def store_linear(x: Fragment, ref: Ref) -> None:
    """Writes x, (64, columns) float32 in the layout TILE, into ref, (columns / 4, 256), in the order of threads.

    Nothing moves between threads: each stores four of its own numbers at a time. `load_linear` reads that order back.
    """
    shape = _linear_shape(x.shape[1])
    layout = plgpu.Layout.WG_STRIDED(shape, vec_size=4)

    @plgpu.inline_mgpu(arg_types=(TILE,), return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, layout))
    def reinterpret(_: mgpu.LaunchContext, x: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        registers = list(x.registers.flat)
        pairs = [mgpu.utils.vector_concat([a, b]) for a, b in zip(registers[::2], registers[1::2])]
        return mgpu.FragmentedArray(_registers=np.array(pairs, dtype=object), _layout=layout.to_mgpu(), _is_signed=None)

    ref[...] = reinterpret(x)


@interpreted_as(lambda ref, columns: ref[...].reshape(64, columns))
def load_linear(ref: Ref, columns: int) -> Fragment:
    """Loads what `store_linear` has written, from global memory: (64, columns) float32 in the layout TILE."""
    shape = _linear_shape(columns)
    layout = plgpu.Layout.WG_STRIDED(shape, vec_size=4)

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct((64, columns), jnp.float32, TILE))
    def reinterpret(_: mgpu.LaunchContext, x: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        pairs = [mgpu.utils.vector_slice(register, slice(i, i + 2)) for register in x.registers.flat for i in (0, 2)]
        tile = TILE.to_mgpu()
        registers = np.array(pairs, dtype=object).reshape(tile.registers_shape((64, columns)))
        return mgpu.FragmentedArray(_registers=registers, _layout=tile, _is_signed=None)

    return reinterpret(plgpu.load(ref, layout=layout, optimized=False))


def _linear_shape(columns: int) -> tuple[int, int]:
    return 64 * columns // 256, 256


def _load_row_stats_plain(ref: Ref, row: Index, first: Index, length: int, otherwise: float) -> PerRow:
    index = _unravelled(row, ref.shape[:-1])
    at = lambda i: jnp.where(first + i < length, ref[*index, jnp.minimum(first + i, length - 1)], otherwise)
    return lax.fori_loop(0, 64, lambda i, rows: rows.at[i].set(at(i)), jnp.zeros(64, jnp.float32))


@interpreted_as(_load_row_stats_plain)
def load_row_stats(ref: Ref, row: Index, first: Index, length: int, otherwise: float) -> PerRow:
    """Loads ref[row, first + i] where that lies below `length`, and `otherwise` where it does not.

    Args:
      ref: (rows, length) float32 in global memory, in any shape that flattens to it.
      row, first: int32 scalars.

    Returns:
      (64,) float32 in ROW_LAYOUT.
    """
    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), ptx.SCALAR, ptx.SCALAR),
                       return_type=plgpu.ShapeDtypeStruct((64,), jnp.float32, ROW_LAYOUT))
    def load(_: mgpu.LaunchContext, ref: ir.Value, row: mgpu.FragmentedArray,
             first: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        layout, f32 = ROW_LAYOUT.to_mgpu(), ir.F32Type.get()
        registers = np.empty(layout.registers_shape((64,)), dtype=object)
        missing = mgpu.utils.c(otherwise, f32)
        elements = _row_elements(row.registers.item(), first.registers.item(), length, registers.size)
        for i, (index, inside, _leads) in enumerate(elements):
            address = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [index], f32)
            flag = arith.extui(ptx.i32(), inside)
            asm = "{ .reg .pred p; setp.ne.u32 p, $2, 0; mov.f32 $0, $3; @p ld.global.f32 $0, [$1]; }"
            value = llvm.inline_asm(f32, [address, flag, missing], asm, "=&f,l,r,f", has_side_effects=True)
            registers.reshape(-1)[i] = vector.from_elements(ir.VectorType.get((1,), f32), [value])
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return load(ref, ptx.scalar(row), ptx.scalar(first))


def _store_row_stats_plain(x: PerRow, ref: Ref, row: Index, first: Index, length: int) -> None:
    index = _unravelled(row, ref.shape[:-1])

    def write(i: Array, _: None) -> None:
        @pl.when(first + i < length)
        def inside() -> None:
            ref[*index, first + i] = lax.dynamic_index_in_dim(x, i, keepdims=False)

    lax.fori_loop(0, x.shape[0], write, None)


@interpreted_as(_store_row_stats_plain)
def store_row_stats(x: PerRow, ref: Ref, row: Index, first: Index, length: int) -> None:
    """Stores x[i] to ref[row, first + i] where that lies below `length`; from registers, as TMA wants 16-byte strides.

    Args:
      x: (64,) float32 in ROW_LAYOUT.
      ref: (rows, length) float32 in global memory, in any shape that flattens to it.
      row, first: int32 scalars.
    """
    @plgpu.inline_mgpu(arg_types=(ROW_LAYOUT, plgpu.RefType(), ptx.SCALAR, ptx.SCALAR))
    def store(_: mgpu.LaunchContext, x: mgpu.FragmentedArray, ref: ir.Value, row: mgpu.FragmentedArray,
              first: mgpu.FragmentedArray) -> None:
        registers = list(x.registers.flat)
        elements = _row_elements(row.registers.item(), first.registers.item(), length, len(registers))
        for register, (index, inside, leads) in zip(registers, elements):
            address = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [index], ir.F32Type.get())
            mgpu.utils.inline_ptx("st.global.f32 [$0], $1;", address, vector.extract(register, [], [0]),
                                  predicate=arith.andi(leads, inside), has_side_effects=True)

    store(x, ref, ptx.scalar(row), ptx.scalar(first))


def _store_rows_plain(x: Fragment, ref: Ref, index: tuple[Index, Index, Index], axis: int, column: int) -> None:
    first, length = index[axis], ref.shape[axis]

    def write(i: Array, _: None) -> None:
        @pl.when(first + i < length)
        def inside() -> None:
            at = (*index[:axis], first + i, *index[axis + 1:])
            ref[*at, pl.ds(column, x.shape[1])] = lax.dynamic_index_in_dim(x, i, keepdims=False)

    lax.fori_loop(0, x.shape[0], write, None)


@interpreted_as(_store_rows_plain)
def store_rows(x: Fragment, ref: Ref, index: tuple[Index, Index, Index], axis: int, column: int) -> None:
    """Stores x, (64, columns) float32 in the layout TILE, to global memory where its rows lie in the array; from
    registers: each eight rows of a warp are whole sectors of 32 bytes.

    Args:
      ref: an array of four axes in global memory.
      index: of the first row.
      axis: of the three, the one along which the rows lie.
      column: the first column.
    """
    shape = ref.shape
    strides = [math.prod(shape[i + 1:]) for i in range(3)]

    @plgpu.inline_mgpu(arg_types=(TILE, plgpu.RefType(), *(ptx.SCALAR,) * 3))
    def store(_: mgpu.LaunchContext, x: mgpu.FragmentedArray, ref: ir.Value, *index: mgpu.FragmentedArray) -> None:
        i64, f32 = ir.IntegerType.get_signless(64), ir.F32Type.get()
        const = lambda value: mgpu.utils.c(value, ptx.i32())
        start, places = own_element(index, axis, strides, column)
        flat = x.registers.reshape(-1, 2)  # rows 16 warp + 8 i + row, columns 8 j + 2 quarter + 0, 1
        for i in range(2):
            position = arith.addi(places[axis], const(8 * i))
            inside = arith.cmpi(arith.CmpIPredicate.slt, position, const(shape[axis]))
            for j in range(flat.shape[0]):
                element = arith.addi(start, mgpu.utils.c(8 * i * strides[axis] + 8 * j, i64))
                address = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [element], f32)
                pair = (vector.extract(flat[j, i], [], [e]) for e in (0, 1))
                mgpu.utils.inline_ptx("st.global.v2.f32 [$0], {$1, $2};", address, *pair, predicate=inside,
                                      has_side_effects=True)

    store(x, ref, *map(ptx.scalar, index))


def own_element(index: tuple[mgpu.FragmentedArray, ...], axis: int, strides: list[int],
                 column: int) -> tuple[ir.Value, list[ir.Value]]:
    """The first element that this thread holds of rows in the layout TILE: its number in the array, 64 bits, and its
    index but for the column; of rows along `axis`, whose first is at `index`.
    """
    i32, i64 = ptx.i32(), ir.IntegerType.get_signless(64)
    const = lambda value: mgpu.utils.c(value, i32)
    times = lambda x, n: arith.muli(arith.extui(i64, x), mgpu.utils.c(n, i64))
    warp, row, quarter = thread_in_tile()
    places = [i.registers.item() for i in index]
    places[axis] = arith.addi(places[axis], arith.addi(arith.muli(warp, const(16)), row))
    start = arith.addi(times(quarter, 2), mgpu.utils.c(column, i64))
    return functools.reduce(arith.addi, map(times, places, strides), start), places


def _load_rows_plain(ref: Ref, index: tuple[Index, Index, Index], axis: int, column: int, columns: int) -> Fragment:
    at = (*index[:axis], pl.ds(index[axis], 64), *index[axis + 1:])
    return ref[*at, pl.ds(column, columns)]


@interpreted_as(_load_rows_plain)
def load_rows(ref: Ref, index: tuple[Index, Index, Index], axis: int, column: int, columns: int) -> Fragment:
    """Loads 64 rows that all lie in the array, where `store_rows` stores them: (64, columns) float32 in the layout
    TILE; `columns` is a multiple of 8.
    """
    strides = [math.prod(ref.shape[i + 1:]) for i in range(3)]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *(ptx.SCALAR,) * 3),
                       return_type=plgpu.ShapeDtypeStruct((64, columns), jnp.float32, TILE))
    def load(_: mgpu.LaunchContext, ref: ir.Value, *index: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        i64, f32 = ir.IntegerType.get_signless(64), ir.F32Type.get()
        start, _places = own_element(index, axis, strides, column)
        layout = TILE.to_mgpu()
        registers = np.empty(layout.registers_shape((64, columns)), dtype=object)
        flat = registers.reshape(columns // 8, 2)
        for j, i in np.ndindex(flat.shape):
            element = arith.addi(start, mgpu.utils.c(8 * i * strides[axis] + 8 * j, i64))
            address = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [element], f32)
            flat[j, i] = llvm.load(ir.VectorType.get((2,), f32), address)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return load(ref, *map(ptx.scalar, index))


def _row_elements(row: ir.Value, first: ir.Value, length: int,
                  count: int) -> Iterator[tuple[ir.Value, ir.Value, ir.Value]]:
    """For each register of ROW_LAYOUT: its index in (rows, length), whether it lies below `length`, and whether this
    thread is the first of the four that hold it.
    """
    i32, i64 = ptx.i32(), ir.IntegerType.get_signless(64)
    const = lambda value: mgpu.utils.c(value, i32)
    thread = arith.remui(mgpu.utils.thread_idx(), const(ptx.WARPGROUP))
    lane, warp = arith.remui(thread, const(32)), arith.divui(thread, const(32))
    leads = arith.cmpi(arith.CmpIPredicate.eq, arith.remui(lane, const(4)), const(0))
    base = arith.muli(arith.extui(i64, row), mgpu.utils.c(length, i64))
    for i in range(count):  # rows 16 warp + 8 i + lane / 4, each in four lanes
        local = arith.addi(arith.addi(arith.muli(warp, const(16)), const(8 * i)), arith.divui(lane, const(4)))
        position = arith.addi(first, local)
        inside = arith.cmpi(arith.CmpIPredicate.slt, position, const(length))
        yield arith.addi(base, arith.extui(i64, position)), inside, leads


def _unravelled(row: Index, shape: tuple[int, ...]) -> tuple[Index, ...]:
    """The indices of a flat row number in `shape`."""
    indices: list[Index] = []
    for size in reversed(shape[1:]):
        indices.insert(0, lax.rem(row, size))
        row = lax.div(row, size)
    return row, *indices


def chunk_bytes(ref: ir.Value) -> int:
    """Bytes from one chunk of columns to the next."""
    strides, _ = ir.MemRefType(ref.type).get_strides_and_offset()
    return 2 * strides[0]


def _core_matrices(ref: ir.Value, chunk: int) -> ir.Value:
    """A chunk of a (chunks, rows, 64) buffer, as Mosaic's tiled loads and stores want it."""
    rows = mgpu.memref_unfold(mgpu.memref_slice(ref, chunk), 0, (None, 8))  # (rows / 8, 8, 64)
    return mgpu.memref_transpose(mgpu.memref_unfold(rows, 2, (None, CHUNK)), (0, 2, 1, 3))


def _padded(x: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
    """Adds columns of any value to x, up to a whole chunk."""
    missing = (CHUNK - x.shape[1]) // 8
    if not missing:
        return x
    registers = np.concatenate([x.registers, np.repeat(x.registers[:, -1:], missing, axis=1)], axis=1)
    return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=x.is_signed)
