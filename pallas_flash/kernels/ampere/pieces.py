"""Pieces of 16 x 16 of tiles, and their products: what `mma` and the kernel of decoding put together.

Tiles in shared memory lie as `copies` says; ldmatrix brings 16 x 16 pieces of them to registers. A thread's address
within eight rows is one of four (unit pairs 0 to 3 of a chunk), and what is added to it is a constant.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_flash.kernels.ampere.copies import shared_address
from pallas_flash.kernels.ampere.registers import TILE
from pallas_flash.kernels.ampere.schedule import CHUNK
from pallas_flash.kernels.mosaic import ptx

__all__ = ["K", "Words", "as_tile", "element_of", "multiply", "own_rows", "pieces", "returned", "scalars", "swizzle",
           "words_of", "zeros"]

K = 16

type Words = list[ir.Value]
"""32-bit registers of two elements each."""


def swizzle(row: ir.Value, width: int) -> ir.Value:
    """What the units of 16 bytes of a row, a number below 8, are permuted with in a tile whose chunks have `width`
    columns: eight rows lie in different banks.
    """
    if width == CHUNK:
        return row
    assert width == CHUNK // 2
    return arith.shrui(row, mgpu.utils.c(1, ptx.i32()))


def pieces(ref: ir.Value, along_rows: bool, row: ir.Value | None = None,
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
    swizzled = arith.muli(arith.xori(swizzle(low, width), beside), const(16))
    if column is not None:
        swizzled = arith.xori(swizzled, arith.muli(column, const(2)))
    own = arith.addi(low, arith.muli(down, const(8)))
    start = arith.addi(shared_address(ref), arith.muli(own if row is None else arith.addi(own, row), const(2 * width)))
    addresses = [arith.addi(start, arith.xori(swizzled, const(32 * pair))) for pair in range(width // K)]

    def load(chunk: int, first: int, column: int, transposed: bool) -> Words:
        offset = 2 * (chunk * strides[0] + first * width)
        found = mgpu.utils.inline_ptx(
            f"ldmatrix.sync.aligned.m8n8.x4{'.trans' * transposed}.shared.b16 {{$0, $1, $2, $3}}, [$4+{offset}];",
            addresses[column // K], result_types=[i32] * 4, has_side_effects=True, convergent=True)
        return list(found)

    return load


def own_rows(rows: int = 64) -> ir.Value:
    """The first of the 16 rows of this warp in a tile of 64; in one of 32, two warps share them."""
    const = lambda value: mgpu.utils.c(value, ptx.i32())
    return arith.muli(arith.remui(arith.shrui(mgpu.utils.thread_idx(), const(5)), const(rows // 16)), const(16))


def scalars(x: mgpu.FragmentedArray) -> np.ndarray:
    """The float32 registers of a tile: (columns / 8, 4), as mma.sync orders them."""
    flat = x.registers.reshape(-1, 2)
    found = np.empty((flat.shape[0], 4), dtype=object)
    for j, i in np.ndindex(flat.shape):
        for e in (0, 1):
            found[j, 2 * i + e] = vector.extract(flat[j, i], [], [e])
    return found


def zeros(columns: int) -> np.ndarray:
    """`scalars` of zeros."""
    return np.full((columns // 8, 4), mgpu.utils.c(0.0, ir.F32Type.get()), dtype=object)


def as_tile(scalars: np.ndarray) -> mgpu.FragmentedArray:
    """The opposite of `scalars`."""
    pair, layout = ir.VectorType.get((2,), ir.F32Type.get()), TILE.to_mgpu()
    registers = np.empty((scalars.shape[0], 2), dtype=object)
    for j, i in np.ndindex(registers.shape):
        registers[j, i] = vector.from_elements(pair, list(scalars[j, 2 * i:2 * i + 2]))
    shape = layout.registers_shape((64, 8 * scalars.shape[0]))
    return mgpu.FragmentedArray(_registers=registers.reshape(shape), _layout=layout, _is_signed=None)


def words_of(x: mgpu.FragmentedArray, step: int) -> Words:
    """16 columns of x, of a 16-bit type, as a left operand."""
    word = ir.VectorType.get((1,), ptx.i32())
    flat = x.registers.reshape(-1, 2)[2 * step:2 * step + 2].reshape(-1)
    return [vector.extract(vector.bitcast(word, register), [], [0]) for register in flat]


def multiply(acc: np.ndarray, a: Words, b: Words, element: ir.Type) -> None:
    """Adds the product of 16 x 16 a and 16 x 16 b to acc, (2, 4), in place."""
    f32, kind = ir.F32Type.get(), str(element)
    text = (f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{$0, $1, $2, $3}}, {{$4, $5, $6, $7}}, "
            "{$8, $9}, {$10, $11, $12, $13};")
    constraints = "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f"
    for j in range(min(2, acc.shape[0])):
        made = llvm.inline_asm(llvm.StructType.get_literal([f32] * 4), [*a, *b[2 * j:2 * j + 2], *acc[j]], text,
                               constraints, has_side_effects=False)
        acc[j] = [llvm.extractvalue(f32, made, [i]) for i in range(4)]


def element_of(ref: ir.Value) -> ir.Type:
    """The type of a buffer's elements."""
    return ir.MemRefType(ref.type).element_type


def returned(shape: tuple[int, int], count: int) -> list[plgpu.ShapeDtypeStruct]:
    """What a function returns that makes `count` float32 tiles."""
    return [plgpu.ShapeDtypeStruct(shape, jnp.float32, TILE)] * count
