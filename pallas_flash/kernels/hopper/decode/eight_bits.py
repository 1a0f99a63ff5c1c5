"""Keys and values that are kept in eight bits (`pallas_flash.quantised`): from float8_e4m3fn to float16.

TMA brings tiles as they are stored, (rows, columns) bytes, dense. The compute warpgroup converts one in registers, 16
numbers of a thread at a time, and writes it to shared memory as wgmma reads it; every e4m3 number is one of float16.
The scales, one of each head, or of each sequence and head, are multiplied in float32: that of keys with scores, that of
values with the sums.

Products are of float16, whatever the queries' type: one instruction converts two numbers, where bfloat16 takes six.
So queries are scaled by a power of two of each row, to below 2^15: what is above 2^-31 of the largest of a row stays
what it is, and the others lose less than 2^-39 of it. Weights are raised by 2^14: those above 2^-39 do not vanish.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_flash.arrays import Array
from pallas_flash.kernels.hopper import registers
from pallas_flash.kernels.hopper.registers import Fragment, PerRow
from pallas_flash.kernels.hopper.schedule import CHUNK
from pallas_flash.kernels.mosaic import ptx
from pallas_flash.kernels.mosaic.decode.work import Head
from pallas_flash.kernels.mosaic.interpret import interpreted_as
from pallas_flash.kernels.mosaic.types import Ref
from pallas_flash.spec import AttentionSpec

__all__ = ["RAISED", "convert", "narrowed", "scale_of"]

_UNIT = 16
"""Numbers of a thread at a time: 16 bytes of what is stored, twice as many of what is written."""
RAISED = 14
"""Weights are 2^14 times what they are elsewhere, and so are their sums."""
_EXPONENT, _BIAS = 23, 127  # of float32


def narrowed(q: Fragment) -> tuple[Fragment, PerRow]:
    """Queries in float16, and the power of two, (64,) float32, that each row of them is to be multiplied with."""
    if q.dtype == jnp.float16:
        return q, registers.row_zeros() + 1.0
    q = q.astype(jnp.float32)
    of_largest = lax.bitcast_convert_type(jnp.abs(q).max(axis=1), jnp.int32) >> _EXPONENT
    raised = jnp.minimum(2 * _BIAS + RAISED - of_largest, 2 * _BIAS - 1)  # exponents; both powers are normal numbers
    factor, inverse = (lax.bitcast_convert_type(x << _EXPONENT, jnp.float32) for x in (raised, 2 * _BIAS - raised))
    return (q * registers.spread(factor, q.shape[1])).astype(jnp.float16), inverse


def scale_of(spec: AttentionSpec, ref: Ref, head: Head) -> Array:
    """The scale of a key head."""
    batch, heads = ref.shape[:2]
    found: Array = ref[head.batch if batch > 1 else 0, head.kv_head * spec.group if heads > 1 else 0, 0, 0]
    return found


def _convert_plain(source: Ref, target: Ref) -> None:
    chunks, rows, _ = target.shape
    x = source[...].astype(target.dtype)
    x = jnp.pad(x, ((0, 0), (0, chunks * CHUNK - x.shape[1])))
    target[...] = x.reshape(rows, chunks, CHUNK).swapaxes(0, 1)


@interpreted_as(_convert_plain)
def convert(source: Ref, target: Ref) -> None:
    """Writes a tile (rows, columns) of float8_e4m3fn as (chunks, rows, 64) of float16, both in shared memory, by a
    warpgroup; `commit_smem` must follow. There are a multiple of 2,048 numbers.
    """
    rows, columns = source.shape
    across = columns // _UNIT
    # Rows of a thread's units that are a multiple of eight apart: their places differ by a constant.
    is_regular = ptx.WARPGROUP % (8 * across) == 0

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(registers.CHUNKED)))
    def emit(_: mgpu.LaunchContext, source: ir.Value, target: ir.Value) -> None:
        const = lambda value: mgpu.utils.c(value, ptx.i32())
        four, element = ir.VectorType.get((4,), ptx.i32()), ir.MemRefType(target.type).element_type
        thread = arith.remui(ptx.moved(mgpu.utils.thread_idx()), const(ptx.WARPGROUP))
        byte, chunk_size = ir.IntegerType.get_signless(8), registers.chunk_bytes(target) // 2
        moved = lambda pointer, count, kind: mgpu.utils.getelementptr(pointer, [const(count)], kind)

        def places(unit: ir.Value) -> tuple[ir.Value, list[ir.Value]]:
            """Where a unit lies, and where its halves go: eight numbers, 16 bytes, which TMA would have swizzled."""
            row, column = _row_and_column(unit, across)
            read = arith.muli(arith.addi(arith.muli(row, const(across)), column), const(_UNIT))
            line = arith.addi(arith.muli(arith.divui(column, const(4)), const(chunk_size)),
                              arith.muli(row, const(CHUNK)))
            found, place = [], arith.muli(arith.remui(column, const(4)), const(2))
            for half in range(2):
                own = arith.xori(arith.addi(place, const(half)), arith.andi(row, const(7)))
                at = arith.addi(line, arith.muli(own, const(8)))
                found.append(mgpu.utils.getelementptr(mgpu.utils.memref_ptr(target), [at], element))
            return mgpu.utils.getelementptr(mgpu.utils.memref_ptr(source), [read], byte), found

        first = places(thread)
        for i in range(rows * across // ptx.WARPGROUP):
            before = i * ptx.WARPGROUP
            if is_regular:
                stored, to = moved(first[0], before * _UNIT, byte), [
                    moved(x, before // across * CHUNK, element) for x in first[1]]
            else:
                stored, to = places(arith.addi(thread, const(before)))
            words = llvm.load(four, stored)
            found = [half for j in range(4) for half in _halves(vector.extract(words, [], [j]))]
            for half, address in enumerate(to):
                llvm.store(vector.from_elements(four, found[4 * half:4 * half + 4]), address)

    emit(source, target)


def _row_and_column(unit: ir.Value, across: int) -> tuple[ir.Value, ir.Value]:
    """The row and the column of a thread's unit, of so many across.

    Eight threads read, and write, at a time. Four of an even row and a chunk and four of the odd row after it and
    another chunk read 128 bytes of different banks, and so they write: the swizzle puts halves of even rows at even
    places, those of odd rows at odd ones.
    """
    const, of = (lambda value: mgpu.utils.c(value, ptx.i32())), across // 4
    if across % 8:  # 64 columns are so anyway
        return arith.divui(unit, const(across)), arith.remui(unit, const(across))
    own = arith.remui(unit, const(2 * across))
    four = arith.divui(own, const(4))
    chunk = arith.remui(four, const(of))
    is_odd = arith.xori(arith.andi(four, const(1)), arith.andi(arith.divui(four, const(of)), const(1)))
    row = arith.addi(arith.muli(arith.divui(unit, const(2 * across)), const(2)), is_odd)
    return row, arith.addi(arith.muli(chunk, const(4)), arith.andi(own, const(3)))


def _halves(word: ir.Value) -> list[ir.Value]:
    """Four numbers of eight bits as two words of two numbers of float16."""
    result = llvm.inline_asm(
        llvm.StructType.get_literal([ptx.i32()] * 2), [word],
        "{ .reg .b16 first, second; mov.b32 {first, second}, $2; "
        "cvt.rn.f16x2.e4m3x2 $0, first; cvt.rn.f16x2.e4m3x2 $1, second; }", "=r,=r,r")
    return [llvm.extractvalue(ptx.i32(), result, [i]) for i in range(2)]
