"""Tiles of keys and values on their way to shared memory, some tiles ahead of those that are read.

Each thread copies 16 bytes of every sixteenth row of a tile. Where keys are in pages, it loads the number of the page
of each of these rows from the table one tile before.
"""

import functools
import math

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_flash.arrays import Array, Int
from pallas_flash.kernels.ampere.copies import shared_address
from pallas_flash.kernels.ampere.schedule import CHUNK
from pallas_flash.kernels.mosaic import ptx
from pallas_flash.kernels.mosaic.interpret import interpreted_as
from pallas_flash.kernels.mosaic.types import Index, Ref
from pallas_flash.spec import AttentionSpec

__all__ = ["commit", "load_paged_tile", "pages_of", "wait"]

_UNIT = 8
"""Elements of a 16-bit type in 16 bytes."""
_ROWS = ptx.WARPGROUP // _UNIT
"""Rows that a warpgroup copies at a time."""

Pages = Int[Array, " n"]
"""The page of each row that a thread copies, `_ROWS` apart: element 128 i + t is the i-th of thread t."""


@interpreted_as(lambda: None)
def commit() -> None:
    """Makes a group of the copies that this thread has started since the last one; also of none."""
    @plgpu.inline_mgpu()
    def close(_: mgpu.LaunchContext) -> None:
        mgpu.utils.inline_ptx("cp.async.commit_group;", has_side_effects=True)

    close()


@interpreted_as(lambda pending: None)
def wait(pending: int) -> None:
    """Waits until all but the last `pending` groups of this thread have arrived."""
    @plgpu.inline_mgpu()
    def arrive(_: mgpu.LaunchContext) -> None:
        mgpu.utils.inline_ptx(f"cp.async.wait_group {pending};", has_side_effects=True)

    arrive()


def _row_of_threads(rows: int) -> Int[Array, " n"]:
    """The row of each element of `Pages`, for plain meanings."""
    return jnp.repeat(jnp.arange(rows, dtype=jnp.int32), _UNIT)


def _pages_of_plain(spec: AttentionSpec, table: Ref, batch: Index, first: Index, rows: int) -> Pages:
    assert spec.pages is not None
    place = jnp.minimum((first + _row_of_threads(rows)) // spec.pages.size, table.shape[1] - 1)
    return jnp.clip(table[batch][place], 0, spec.pages.number - 1)


@interpreted_as(_pages_of_plain)
def pages_of(spec: AttentionSpec, table: Ref, batch: Index, first: Index, rows: int) -> Pages:
    """Loads the pages of the keys from `first` on, (8 rows,) int32; some page that exists where there is none."""
    assert spec.pages is not None
    pages, (_, width), count = spec.pages, table.shape, rows // _ROWS
    layout = plgpu.Layout.WG_STRIDED((_UNIT * rows,), vec_size=1)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), ptx.SCALAR, ptx.SCALAR),
                       return_type=plgpu.ShapeDtypeStruct((_UNIT * rows,), jnp.int32, layout))
    def load(_: mgpu.LaunchContext, table: ir.Value, batch: mgpu.FragmentedArray,
             first: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        i64, const = ir.IntegerType.get_signless(64), lambda value: mgpu.utils.c(value, ptx.i32())
        row = arith.shrui(ptx.moved(mgpu.utils.thread_idx()), const(3))
        line = arith.muli(arith.extui(i64, batch.registers.item()), mgpu.utils.c(width, i64))
        registers = np.empty(layout.to_mgpu().registers_shape((_UNIT * rows,)), dtype=object)
        for i in range(count):
            key = arith.addi(arith.addi(first.registers.item(), row), const(_ROWS * i))
            place = arith.minui(arith.divui(key, const(pages.size)), const(width - 1))
            at = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(table), [arith.addi(line, arith.extui(i64, place))],
                                          ptx.i32())
            page = arith.maxsi(arith.minsi(llvm.load(ptx.i32(), at), const(pages.number - 1)), const(0))
            registers.reshape(-1)[i] = vector.from_elements(ir.VectorType.get((1,), ptx.i32()), [page])
        return mgpu.FragmentedArray(_registers=registers, _layout=layout.to_mgpu(), _is_signed=True)

    return load(table, ptx.scalar(batch), ptx.scalar(first))


def _load_paged_tile_plain(spec: AttentionSpec, source: Ref, pages: Pages, kv_head: Index, first: Index,
                           target: Ref) -> None:
    assert spec.pages is not None
    count, rows, _ = target.shape
    place = (first + jnp.arange(rows, dtype=jnp.int32)) % spec.pages.size
    whole = source[:, :, kv_head] if spec.layout == "BLHD" else source[:, kv_head]  # (pages, positions, columns)
    x = jnp.pad(whole[pages[::_UNIT], place], ((0, 0), (0, count * CHUNK - whole.shape[-1])))
    target[...] = jnp.swapaxes(x.reshape(rows, count, CHUNK), 0, 1)


@interpreted_as(_load_paged_tile_plain)
def load_paged_tile(spec: AttentionSpec, source: Ref, pages: Pages, kv_head: Index, first: Index,
                    target: Ref) -> None:
    """Starts to copy a tile of keys or values that lie in pages, as `copies.load_tile` does of others.

    Args:
      source: (pages, positions, heads, columns), or (pages, heads, positions, columns) in the layout "BHLD".
      pages: of its rows (`pages_of`).
      first: the position of its first row in the sequence.
      target: (chunks, rows, 64) in shared memory; rows a multiple of 16.
    """
    assert spec.pages is not None
    size, (count, rows, _), width = spec.pages.size, target.shape, source.shape[3]
    layout = plgpu.Layout.WG_STRIDED((_UNIT * rows,), vec_size=1)
    of_page, down, of_head = math.prod(source.shape[1:]), source.shape[2] * width, width
    if spec.layout == "BHLD":
        down, of_head = of_head, down

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout, ptx.SCALAR, ptx.SCALAR, plgpu.RefType()))
    def copy(_: mgpu.LaunchContext, source: ir.Value, pages: mgpu.FragmentedArray, kv_head: mgpu.FragmentedArray,
             first: mgpu.FragmentedArray, target: ir.Value) -> None:
        i64, const = ir.IntegerType.get_signless(64), lambda value: mgpu.utils.c(value, ptx.i32())
        times = lambda x, n: arith.muli(arith.extui(i64, x), mgpu.utils.c(n, i64))
        thread = ptx.moved(mgpu.utils.thread_idx())
        row, unit = arith.shrui(thread, const(3)), arith.andi(thread, const(7))
        swizzled = arith.muli(arith.xori(unit, arith.andi(row, const(7))), const(16))
        to = arith.addi(shared_address(target), arith.addi(arith.muli(row, const(2 * CHUNK)), swizzled))
        own = arith.addi(times(kv_head.registers.item(), of_head), times(unit, _UNIT))
        for i, page in enumerate(pages.registers.flat):
            key = arith.addi(arith.addi(first.registers.item(), row), const(_ROWS * i))
            terms = own, times(vector.extract(page, [], [0]), of_page), times(arith.remui(key, const(size)), down)
            origin = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(source), [functools.reduce(arith.addi, terms)],
                                              ir.MemRefType(source.type).element_type)
            for chunk in range(count):
                units, copied = (width - chunk * CHUNK) // _UNIT, const(16)
                if units < _UNIT:
                    is_there = arith.cmpi(arith.CmpIPredicate.slt, unit, const(units))
                    copied = arith.select(is_there, const(16), const(0))
                offsets = 2 * (chunk * rows + _ROWS * i) * CHUNK, 2 * chunk * CHUNK
                mgpu.utils.inline_ptx(
                    f"cp.async.cg.shared.global [$0+{offsets[0]}], [$1+{offsets[1]}], 16, $2;", to, origin, copied,
                    has_side_effects=True)

    copy(source, pages, ptx.scalar(kv_head), ptx.scalar(first), target)
