"""Keys and values that are kept in eight bits (`pallas_flash.quantised`): from float8_e4m3fn to the queries' type.

TMA brings tiles as they are stored, (rows, columns) bytes, dense. The compute warpgroup converts one in registers, 16
numbers of a thread at a time, and writes it to shared memory as wgmma reads it; every e4m3 number is one of 16 bits.
The scales, one of each head, or of each sequence and head, are multiplied in float32: that of keys with scores, that of
values with the sums.
"""

import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_flash.arrays import Array
from pallas_flash.kernels.hopper import registers
from pallas_flash.kernels.hopper.schedule import CHUNK
from pallas_flash.kernels.mosaic import ptx
from pallas_flash.kernels.mosaic.decode.work import Head
from pallas_flash.kernels.mosaic.interpret import interpreted_as
from pallas_flash.kernels.mosaic.types import Ref
from pallas_flash.spec import AttentionSpec

__all__ = ["convert", "scale_of"]

_UNIT = 16
"""Numbers of a thread at a time: 16 bytes of what is stored, twice as many of what is written."""
_HALF_OF = {
    "f16": "cvt.rn.f16x2.e4m3x2 {out}, {pair};",
    # There is no conversion to bfloat16 on Hopper. Each of the numbers is one of float16, too.
    "bf16": "cvt.rn.f16x2.e4m3x2 both, {pair}; mov.b32 {{lo, hi}}, both; cvt.f32.f16 a, lo; cvt.f32.f16 b, hi; "
            "cvt.rn.bf16x2.f32 {out}, b, a;",
}


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
    """Writes a tile (rows, columns) of float8_e4m3fn as (chunks, rows, 64) of 16 bits, both in shared memory, by a
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
            found = [half for j in range(4) for half in _halves(vector.extract(words, [], [j]), str(element))]
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


def _halves(word: ir.Value, element: str) -> list[ir.Value]:
    """Four numbers of eight bits as two words of two numbers of 16."""
    code = " ".join(_HALF_OF[element].format(out=f"${i}", pair=pair) for i, pair in enumerate(("first", "second")))
    result = llvm.inline_asm(
        llvm.StructType.get_literal([ptx.i32()] * 2), [word],
        "{ .reg .b16 first, second, lo, hi; .reg .b32 both; .reg .f32 a, b; mov.b32 {first, second}, $2; "
        f"{code} }}", "=r,=r,r")
    return [llvm.extractvalue(ptx.i32(), result, [i]) for i in range(2)]
