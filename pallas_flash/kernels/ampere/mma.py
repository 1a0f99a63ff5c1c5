"""Matrix products by mma.sync, m16n8k16, of tiles in shared memory and in registers; they are synchronous.

Tiles in shared memory lie as `copies` says; ldmatrix brings 16 x 16 pieces of them to registers. A right operand that
is loaded serves several left ones: with 32 rows a warp, two tiles of 64 rows, the tensor cores are the limit, with 16
rows shared memory is. A thread's address within eight rows is one of four (unit pairs 0 to 3 of a chunk), and what is
added to it is a constant.
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_flash.kernels.ampere.copies import shared_address
from pallas_flash.kernels.ampere.registers import TILE, Fragment, thread_in_tile
from pallas_flash.kernels.ampere.schedule import CHUNK
from pallas_flash.kernels.mosaic import ptx
from pallas_flash.kernels.mosaic.interpret import interpreted_as
from pallas_flash.kernels.mosaic.types import Ref

__all__ = ["accumulate", "add_outer", "load_rows", "multiply_transposed", "store_rows"]

_K = 16

type Words = list[ir.Value]
"""32-bit registers of two elements each."""


def _swizzle(row: ir.Value, width: int) -> ir.Value:
    """What the units of 16 bytes of a row, a number below 8, are permuted with in a tile whose chunks have `width`
    columns: eight rows lie in different banks.
    """
    if width == CHUNK:
        return row
    assert width == CHUNK // 2
    return arith.shrui(row, mgpu.utils.c(1, ptx.i32()))


# -- pieces ------------------------------------------------------------------------------------------------------------

def _pieces(ref: ir.Value, along_rows: bool, row: ir.Value | None = None,
            column: ir.Value | None = None) -> Callable[[int, int, int, bool], Words]:
    """A function that loads a 16 x 16 piece of a tile (chunks, rows, 64 or 32) by ldmatrix: four matrices of 8 x 8.

    Its arguments: chunk, first row and first column of the piece, and whether the matrices are transposed.

    Args:
      along_rows: the second matrix lies below the first; otherwise beside it.
      row, column: added to the first ones, int32; None: nothing. column is a multiple of 16, and what is added to it
        must not carry: they have no bit in common.
    """
    i32 = ptx.i32()
    const = lambda value: mgpu.utils.c(value, i32)
    lane = arith.remui(mgpu.utils.thread_idx(), const(32))
    low, second, third = (arith.andi(arith.shrui(lane, const(n)), const(mask)) for n, mask in ((0, 7), (3, 1), (4, 1)))
    down, beside = (second, third) if along_rows else (third, second)
    strides, _ = ir.MemRefType(ref.type).get_strides_and_offset()
    width = strides[1]
    swizzled = arith.muli(arith.xori(_swizzle(low, width), beside), const(16))
    if column is not None:
        swizzled = arith.xori(swizzled, arith.muli(column, const(2)))
    own = arith.addi(low, arith.muli(down, const(8)))
    start = arith.addi(shared_address(ref), arith.muli(own if row is None else arith.addi(own, row), const(2 * width)))
    addresses = [arith.addi(start, arith.xori(swizzled, const(32 * pair))) for pair in range(width // _K)]

    def load(chunk: int, first: int, column: int, transposed: bool) -> Words:
        offset = 2 * (chunk * strides[0] + first * width)
        found = mgpu.utils.inline_ptx(
            f"ldmatrix.sync.aligned.m8n8.x4{'.trans' * transposed}.shared.b16 {{$0, $1, $2, $3}}, [$4+{offset}];",
            addresses[column // _K], result_types=[i32] * 4, has_side_effects=True, convergent=True)
        return list(found)

    return load


def _own_rows(rows: int = 64) -> ir.Value:
    """The first of the 16 rows of this warp in a tile of 64; in one of 32, two warps share them."""
    const = lambda value: mgpu.utils.c(value, ptx.i32())
    return arith.muli(arith.remui(arith.shrui(mgpu.utils.thread_idx(), const(5)), const(rows // 16)), const(16))


def _scalars(x: mgpu.FragmentedArray) -> np.ndarray:
    """The float32 registers of a tile: (columns / 8, 4), as mma.sync orders them."""
    flat = x.registers.reshape(-1, 2)
    found = np.empty((flat.shape[0], 4), dtype=object)
    for j, i in np.ndindex(flat.shape):
        for e in (0, 1):
            found[j, 2 * i + e] = vector.extract(flat[j, i], [], [e])
    return found


def _zeros(columns: int) -> np.ndarray:
    return np.full((columns // 8, 4), mgpu.utils.c(0.0, ir.F32Type.get()), dtype=object)


def _as_tile(scalars: np.ndarray) -> mgpu.FragmentedArray:
    """The opposite of `_scalars`."""
    pair, layout = ir.VectorType.get((2,), ir.F32Type.get()), TILE.to_mgpu()
    registers = np.empty((scalars.shape[0], 2), dtype=object)
    for j, i in np.ndindex(registers.shape):
        registers[j, i] = vector.from_elements(pair, list(scalars[j, 2 * i:2 * i + 2]))
    shape = layout.registers_shape((64, 8 * scalars.shape[0]))
    return mgpu.FragmentedArray(_registers=registers.reshape(shape), _layout=layout, _is_signed=None)


def _words(x: mgpu.FragmentedArray, step: int) -> Words:
    """16 columns of x, of a 16-bit type, as a left operand."""
    word = ir.VectorType.get((1,), ptx.i32())
    flat = x.registers.reshape(-1, 2)[2 * step:2 * step + 2].reshape(-1)
    return [vector.extract(vector.bitcast(word, register), [], [0]) for register in flat]


def _multiply(acc: np.ndarray, a: Words, b: Words, element: ir.Type) -> None:
    """Adds the product of 16 x 16 a and 16 x 16 b to acc, (2, 4), in place."""
    f32, kind = ir.F32Type.get(), str(element)
    text = (f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{$0, $1, $2, $3}}, {{$4, $5, $6, $7}}, "
            "{$8, $9}, {$10, $11, $12, $13};")
    constraints = "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f"
    for j in range(min(2, acc.shape[0])):
        made = llvm.inline_asm(llvm.StructType.get_literal([f32] * 4), [*a, *b[2 * j:2 * j + 2], *acc[j]], text,
                               constraints, has_side_effects=False)
        acc[j] = [llvm.extractvalue(f32, made, [i]) for i in range(4)]


def _element(ref: ir.Value) -> ir.Type:
    return ir.MemRefType(ref.type).element_type


def _returned(shape: tuple[int, int], count: int) -> list[plgpu.ShapeDtypeStruct]:
    return [plgpu.ShapeDtypeStruct(shape, jnp.float32, TILE)] * count


# -- products ----------------------------------------------------------------------------------------------------------

def _columns(ref: Ref) -> Fragment:
    """(chunks, rows, 64) as (rows, columns), for plain meanings."""
    x = ref[...]
    return jnp.swapaxes(x, 0, 1).reshape(x.shape[1], -1)


def _multiply_transposed_plain(a_ref: Ref, b_ref: Ref, d: int,
                               start: Sequence[Fragment] | None = None) -> tuple[Fragment, ...]:
    del d  # the columns past it are zeros
    a, b = _columns(a_ref), _columns(b_ref)
    parts = [jnp.dot(a[i:i + 64], b.T, preferred_element_type=jnp.float32) for i in range(0, a.shape[0], 64)]
    return tuple(parts if start is None else map(jnp.add, start, parts))


@interpreted_as(_multiply_transposed_plain)
def multiply_transposed(a_ref: Ref, b_ref: Ref, d: int,
                        start: Sequence[Fragment] | None = None) -> tuple[Fragment, ...]:
    """Computes a b^T, or start + a b^T: (64, n) float32 for each 64 rows of a.

    Args:
      a_ref: (chunks, 64 m, 64) in shared memory.
      b_ref: (chunks, n, 64) in shared memory; n a multiple of 16.
      d: the columns that count; up to a multiple of 16 the rest must be zero.
      start: m arrays (64, n) float32, or None.
    """
    n, count = b_ref.shape[1], a_ref.shape[1] // 64

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), *[TILE] * len(start or ())),
                       return_type=_returned((64, n), count))
    def product(_: mgpu.LaunchContext, a: ir.Value, b: ir.Value,
                *start: mgpu.FragmentedArray) -> list[mgpu.FragmentedArray]:
        accs = [_scalars(x) for x in start] or [_zeros(n) for _ in range(count)]
        a_piece, b_piece = _pieces(a, True, _own_rows()), _pieces(b, False)
        for column in range(0, d, _K):
            at = divmod(column, CHUNK)
            left = [a_piece(at[0], 64 * m, at[1], False) for m in range(count)]
            for row in range(0, n, 16):
                right = b_piece(at[0], row, at[1], False)
                for acc, words in zip(accs, left):
                    _multiply(acc[row // 8:row // 8 + 2], words, right, _element(b))
        return [_as_tile(acc) for acc in accs]

    return tuple(product(a_ref, b_ref, *(start or ())))


def _accumulate_plain(accs: Sequence[Fragment], ps: Sequence[Fragment], v_ref: Ref) -> tuple[Fragment, ...]:
    v = _columns(v_ref)
    return tuple(acc + jnp.dot(p, v[:, :acc.shape[1]], preferred_element_type=jnp.float32)
                 for acc, p in zip(accs, ps, strict=True))


@interpreted_as(_accumulate_plain)
def accumulate(accs: Sequence[Fragment], ps: Sequence[Fragment], v_ref: Ref) -> tuple[Fragment, ...]:
    """Computes acc + p v for each pair: (64, columns) float32.

    Args:
      accs: each (64, columns) float32; columns a multiple of 8.
      ps: each (64, keys) of v's type; keys a multiple of 16.
      v_ref: (chunks, keys, 64) in shared memory.
    """
    (_, columns), keys, count = accs[0].shape, ps[0].shape[1], len(accs)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *[TILE] * (2 * count)), return_type=_returned((64, columns), count))
    def product(_: mgpu.LaunchContext, v: ir.Value, *tiles: mgpu.FragmentedArray) -> list[mgpu.FragmentedArray]:
        sums, ps = [_scalars(x) for x in tiles[:count]], tiles[count:]
        piece = _pieces(v, True)
        for key in range(0, keys, _K):
            left = [_words(p, key // _K) for p in ps]
            for column in range(0, columns, 16):
                right = piece(column // CHUNK, key, column % CHUNK, True)
                for acc, words in zip(sums, left):
                    _multiply(acc[column // 8:column // 8 + 2], words, right, _element(v))
        return [_as_tile(acc) for acc in sums]

    return tuple(product(v_ref, *accs, *ps))


def _load_rows_plain(ref: Ref, first: int, chunk: int) -> Fragment:
    x = ref[chunk][first:first + 64]
    return jnp.tile(x, (64 // x.shape[0], 1))


@interpreted_as(_load_rows_plain)
def load_rows(ref: Ref, first: int, chunk: int) -> Fragment:
    """Loads 64 rows of one chunk of shared memory, from row `first` on: (64, 64) of a 16-bit type. Of a tile of 32 rows
    it loads each twice.
    """
    rows = min(64, ref.shape[1])

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct((64, CHUNK), ref.dtype, TILE))
    def load(_: mgpu.LaunchContext, ref: ir.Value) -> mgpu.FragmentedArray:
        pair, layout = ir.VectorType.get((2,), _element(ref)), TILE.to_mgpu()
        piece = _pieces(ref, True, _own_rows(rows))
        words = [word for column in range(0, CHUNK, _K) for word in piece(chunk, first, column, False)]
        registers = np.array([mgpu.utils.bitcast(word, pair) for word in words], dtype=object)
        return mgpu.FragmentedArray(_registers=registers.reshape(layout.registers_shape((64, CHUNK))), _layout=layout,
                                    _is_signed=None)

    return load(ref)


def _store_rows_plain(x: Fragment, ref: Ref, first: int, chunk: int, column: int = 0) -> None:
    rows = min(64, ref.shape[1])
    ref[chunk, pl.ds(first, rows), pl.ds(column, x.shape[1])] = x[:rows]


@interpreted_as(_store_rows_plain)
def store_rows(x: Fragment, ref: Ref, first: int, chunk: int, column: int = 0) -> None:
    """Writes x, (64, n) of a 16-bit type, into one chunk of shared memory, from row `first` and `column` on. Into a
    tile of 32 rows, the same numbers twice.
    """
    rows = min(64, ref.shape[1])

    @plgpu.inline_mgpu(arg_types=(TILE, plgpu.RefType()))
    def store(_: mgpu.LaunchContext, x: mgpu.FragmentedArray, ref: ir.Value) -> None:
        const = lambda value: mgpu.utils.c(value, ptx.i32())
        warp, row, quarter = thread_in_tile()
        strides, _offset = ir.MemRefType(ref.type).get_strides_and_offset()
        width = strides[1]
        warp = arith.remui(warp, const(rows // 16)) if rows < 64 else warp
        own = arith.addi(row, arith.muli(warp, const(16)))
        start = arith.addi(shared_address(ref), arith.addi(arith.muli(own, const(2 * width)),
                                                           arith.muli(quarter, const(4))))
        word, flat = ir.VectorType.get((1,), ptx.i32()), x.registers.reshape(-1, 2)
        for j in range(flat.shape[0]):
            unit = arith.xori(_swizzle(row, width), const(column // 8 + j))
            address = arith.addi(start, arith.muli(unit, const(16)))
            for i in range(2):
                offset = 2 * (chunk * strides[0] + (first + 8 * i) * width)
                mgpu.utils.inline_ptx(f"st.shared.b32 [$0+{offset}], $1;", address,
                                      vector.extract(vector.bitcast(word, flat[j, i]), [], [0]), has_side_effects=True)

    store(x, ref)


def _warp_in_square() -> tuple[ir.Value, ir.Value]:
    """Row and column of this warp, if the four of a warpgroup share a tile as 2 x 2."""
    const = lambda value: mgpu.utils.c(value, ptx.i32())
    warp = arith.andi(arith.shrui(mgpu.utils.thread_idx(), const(5)), const(3))
    return arith.shrui(warp, const(1)), arith.andi(warp, const(1))


def _add_outer_plain(a_ref: Ref, b_ref: Ref, target: Ref) -> None:
    a = jnp.swapaxes(a_ref[...], 0, 1).reshape(a_ref.shape[1], -1)
    target[...] = target[...] + jnp.dot(a.T, b_ref[0], preferred_element_type=jnp.float32).reshape(-1)


@interpreted_as(_add_outer_plain)
def add_outer(a_ref: Ref, b_ref: Ref, target: Ref) -> None:
    """Adds a^T b, (columns of a, 64), to float32 sums in global memory, in any order, in the order of threads: each
    instruction adds 128 bytes a warp that lie together. The warps share the product as 2 x 2.

    Args:
      a_ref: (1, keys, 64 or 32) in shared memory.
      b_ref: (1, keys, 64) in shared memory.
      target: (columns of a * 64,) in global memory.
    """
    (_, keys, rows), f32 = a_ref.shape, ir.F32Type
    count = rows // 32  # pieces of 16 rows of a warp

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 3)
    def add(_: mgpu.LaunchContext, a: ir.Value, b: ir.Value, target: ir.Value) -> None:
        const = lambda value: mgpu.utils.c(value, ptx.i32())
        down, beside = _warp_in_square()
        a_piece = _pieces(a, False, column=arith.muli(down, const(rows // 2)))
        b_piece = _pieces(b, True, column=arith.muli(beside, const(32)))
        sums = [_zeros(32) for _ in range(count)]
        for key in range(0, keys, _K):
            left = [a_piece(0, key, 16 * m, True) for m in range(count)]
            for column in (0, 16):
                right = b_piece(0, key, column, True)
                for acc, words in zip(sums, left):
                    _multiply(acc[column // 8:column // 8 + 2], words, right, _element(b))
        thread = arith.remui(mgpu.utils.thread_idx(), const(ptx.WARPGROUP))
        base = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(target), [thread], f32.get())
        for i, x in enumerate(np.concatenate(sums).flat):
            mgpu.utils.inline_ptx(f"red.global.add.f32 [$0+{4 * ptx.WARPGROUP * i}], $1;", base, x,
                                  has_side_effects=True)

    add(a_ref, b_ref, target)
