"""Matrix products by mma.sync, m16n8k16, of tiles in shared memory and in registers; they are synchronous.

A right operand that is loaded (`pieces`) serves several left ones: with 32 rows a warp, two tiles of 64 rows, the
tensor cores are the limit, with 16 rows shared memory is.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_flash.kernels.ampere.copies import shared_address
from pallas_flash.kernels.ampere.pieces import (
    K,
    as_tile,
    element_of,
    multiply,
    own_rows,
    pieces,
    returned,
    scalars,
    swizzle,
    words_of,
    zeros,
)
from pallas_flash.kernels.ampere.registers import TILE, Fragment, thread_in_tile
from pallas_flash.kernels.ampere.schedule import CHUNK
from pallas_flash.kernels.mosaic import ptx
from pallas_flash.kernels.mosaic.interpret import interpreted_as
from pallas_flash.kernels.mosaic.types import Index, Ref

__all__ = ["accumulate", "add_outer", "load_rows", "multiply_transposed", "store_rows"]


# -- products ----------------------------------------------------------------------------------------------------------

def _columns(ref: Ref) -> Fragment:
    """(chunks, rows, 64) as (rows, columns), for plain meanings."""
    x = ref[...]
    return jnp.swapaxes(x, 0, 1).reshape(x.shape[1], -1)


def _multiply_transposed_plain(a: Ref | tuple[Fragment, ...], b_ref: Ref, d: int,
                               start: Sequence[Fragment] | None = None) -> tuple[Fragment, ...]:
    del d  # the columns past it are zeros
    left, b = jnp.concatenate(a) if isinstance(a, tuple) else _columns(a), _columns(b_ref)
    parts = [jnp.dot(left[i:i + 64], b.T, preferred_element_type=jnp.float32) for i in range(0, left.shape[0], 64)]
    return tuple(parts if start is None else map(jnp.add, start, parts))


@interpreted_as(_multiply_transposed_plain)
def multiply_transposed(a: Ref | tuple[Fragment, ...], b_ref: Ref, d: int,
                        start: Sequence[Fragment] | None = None) -> tuple[Fragment, ...]:
    """Computes a b^T, or start + a b^T: (64, n) float32 for each 64 rows of a.

    Args:
      a: (chunks, 64 m, 64) in shared memory; or held in registers, m arrays (64, 64) of b's type, if d is at most 64.
      b_ref: (chunks, n, 64) in shared memory; n a multiple of 16.
      d: the columns that count; up to a multiple of 16 the rest must be zero.
      start: m arrays (64, n) float32, or None.
    """
    n, lefts, kind = (b_ref.shape[1], a, TILE) if isinstance(a, tuple) else (b_ref.shape[1], (a,), plgpu.RefType())
    count = len(a) if isinstance(a, tuple) else a.shape[1] // 64

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *[kind] * len(lefts), *[TILE] * len(start or ())),
                       return_type=returned((64, n), count))
    def product(_: mgpu.LaunchContext, b: ir.Value, *operands: Any) -> list[mgpu.FragmentedArray]:
        accs = [scalars(x) for x in operands[len(lefts):]] or [zeros(n) for _ in range(count)]
        a_piece, b_piece = None if kind is TILE else pieces(operands[0], True, own_rows()), pieces(b, False)
        for column in range(0, d, K):
            at = divmod(column, CHUNK)
            left = [words_of(x, column // K) for x in operands[:count]] if a_piece is None else [
                a_piece(at[0], 64 * m, at[1], False) for m in range(count)]
            for row in range(0, n, 16):
                right = b_piece(at[0], row, at[1], False)
                for acc, words in zip(accs, left):
                    multiply(acc[row // 8:row // 8 + 2], words, right, element_of(b))
        return [as_tile(acc) for acc in accs]

    return tuple(product(b_ref, *lefts, *(start or ())))


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

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *[TILE] * (2 * count)), return_type=returned((64, columns), count))
    def product(_: mgpu.LaunchContext, v: ir.Value, *tiles: mgpu.FragmentedArray) -> list[mgpu.FragmentedArray]:
        sums, ps = [scalars(x) for x in tiles[:count]], tiles[count:]
        piece = pieces(v, True)
        for key in range(0, keys, K):
            left = [words_of(p, key // K) for p in ps]
            for column in range(0, columns, 16):
                right = piece(column // CHUNK, key, column % CHUNK, True)
                for acc, words in zip(sums, left):
                    multiply(acc[column // 8:column // 8 + 2], words, right, element_of(v))
        return [as_tile(acc) for acc in sums]

    return tuple(product(v_ref, *accs, *ps))


def _load_rows_plain(ref: Ref, first: int, chunk: int) -> Fragment:
    x = ref[chunk][first:first + 64]
    return jnp.tile(x, (64 // x.shape[0], 1))


@interpreted_as(_load_rows_plain)
def load_rows(ref: Ref, first: int, chunk: int) -> Fragment:
    """Loads 64 rows of one chunk of shared memory, of 64 or 32 columns, from row `first` on: (64, columns) of a 16-bit
    type. Of a tile of 32 rows it loads each twice.
    """
    rows, columns = min(64, ref.shape[1]), ref.shape[2]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct((64, columns), ref.dtype, TILE))
    def load(_: mgpu.LaunchContext, ref: ir.Value) -> mgpu.FragmentedArray:
        pair, layout = ir.VectorType.get((2,), element_of(ref)), TILE.to_mgpu()
        piece = pieces(ref, True, own_rows(rows))
        words = [word for column in range(0, columns, K) for word in piece(chunk, first, column, False)]
        registers = np.array([mgpu.utils.bitcast(word, pair) for word in words], dtype=object)
        return mgpu.FragmentedArray(_registers=registers.reshape(layout.registers_shape((64, columns))),
                                    _layout=layout, _is_signed=None)

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
            unit = arith.xori(swizzle(row, width), const(column // 8 + j))
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


def _add_outer_plain(a_ref: Ref, b_ref: Ref, target: Ref, wide: bool,
                     turn: tuple[Ref, Index, Index] | None = None) -> None:
    del wide
    if turn is not None:  # interpreted blocks run one after the other, so that none may have to wait
        counters, tile, before = turn
        target[...] = jnp.where(counters[tile] == before, target[...], jnp.nan)
    a = jnp.swapaxes(a_ref[...], 0, 1).reshape(a_ref.shape[1], -1)
    target[...] = target[...] + jnp.dot(a.T, b_ref[0], preferred_element_type=jnp.float32).reshape(-1)


@interpreted_as(_add_outer_plain)
def add_outer(a_ref: Ref, b_ref: Ref, target: Ref, wide: bool,
              turn: tuple[Ref, Index, Index] | None = None) -> None:
    """Adds a^T b, (columns of a, 64), to float32 sums in global memory, in any order, in the order of threads: each
    instruction adds 128 bytes a warp that lie together, or 512. The warps share the product as 2 x 2.

    Args:
      a_ref: (1, keys, 64 or 32), or (2, keys, 32), in shared memory.
      b_ref: (1, keys, 64) in shared memory.
      target: (columns of a * 64,) in global memory.
      wide: a thread adds four numbers at a time, which compute capability 9.0 has.
      turn: int32 counters in global memory, which one, and the number that it must have first; None: no order.
    """
    (chunks, keys, rows), f32, at_once = a_ref.shape, ir.F32Type, 4 if wide else 1
    count = chunks * rows // 32  # pieces of 16 rows of a warp
    narrow = "red.global.add.f32 [$0+{}], $1;"
    add_text = "red.relaxed.gpu.global.add.v4.f32 [$0+{}], {{$1, $2, $3, $4}};" if wide else narrow

    kinds = (plgpu.RefType(),) * 3 + (() if turn is None else (plgpu.RefType(), ptx.SCALAR, ptx.SCALAR))

    @plgpu.inline_mgpu(arg_types=kinds)
    def add(_: mgpu.LaunchContext, a: ir.Value, b: ir.Value, target: ir.Value, *turn: Any) -> None:
        const = lambda value: mgpu.utils.c(value, ptx.i32())
        down, beside = _warp_in_square()
        own = {"row": const(keys)} if chunks == 2 else {"column": const(rows // 2)}
        a_piece = pieces(a, False, **{axis: arith.muli(down, size) for axis, size in own.items()})
        b_piece = pieces(b, True, column=arith.muli(beside, const(32)))
        sums = [zeros(32) for _ in range(count)]
        for key in range(0, keys, K):
            left = [a_piece(0, key, 16 * m, True) for m in range(count)]
            for column in (0, 16):
                right = b_piece(0, key, column, True)
                for acc, words in zip(sums, left):
                    multiply(acc[column // 8:column // 8 + 2], words, right, element_of(b))
        if turn:
            _await(turn[0], *(x.registers.item() for x in turn[1:]))
        thread = arith.remui(mgpu.utils.thread_idx(), const(ptx.WARPGROUP))
        first = arith.muli(thread, const(at_once)) if wide else thread
        base = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(target), [first], f32.get())
        for i, xs in enumerate(np.concatenate(sums).reshape(-1, at_once)):
            mgpu.utils.inline_ptx(add_text.format(4 * at_once * ptx.WARPGROUP * i), base, *xs, has_side_effects=True)

    if turn is None:
        add(a_ref, b_ref, target)
    else:
        counters, tile, before = turn
        add(a_ref, b_ref, target, counters, ptx.scalar(tile), ptx.scalar(before))


def _await(counters: ir.Value, tile: ir.Value, before: ir.Value) -> None:
    """Waits until a counter in global memory is `before`; what this thread does next comes after what was counted."""
    address = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(counters), [tile], ptx.i32())
    text = ("{ .reg .pred p; .reg .u32 v; again: ld.acquire.gpu.global.u32 v, [$1]; setp.ne.u32 p, v, $2; "
            "@p bra again; bar.warp.sync -1; mov.u32 $0, v; }")
    llvm.inline_asm(ptx.i32(), [address, before], text, "=r,l,r,~{memory}", has_side_effects=True, convergent=True)
