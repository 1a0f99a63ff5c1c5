"""Tiles from global to shared memory by cp.async, 16 bytes a thread: every compute capability since 8.0 has it.

A tile in shared memory is (chunks, rows, 64): columns in chunks of 64, whose rows are 128 bytes. The eight units of 16
bytes of a row are permuted, unit u of row r lies at u ^ (r % 8): eight rows then lie in different banks, whichever unit
ldmatrix reads (`mma`). Rows past the end of the array, and columns past the head's, are filled with zeros by copies of
no bytes. A thread holds one address on each side; the offsets from there are constants.
"""

import functools
import itertools
import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm

from pallas_flash import tiles
from pallas_flash.arrays import Array
from pallas_flash.kernels.ampere.schedule import CHUNK, ROWS
from pallas_flash.kernels.mosaic import ptx
from pallas_flash.kernels.mosaic.interpret import interpreted_as
from pallas_flash.kernels.mosaic.types import Index, Ref
from pallas_flash.spec import AttentionSpec

__all__ = ["COMPILER", "Team", "load_tile", "load_words", "meet", "shared_address",
           "store_own_rows", "sync"]

COMPILER = plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0,
                                lowering_semantics=plgpu.LoweringSemantics.Lane)
"""How every kernel is compiled."""

_UNIT = 8
"""Elements of a 16-bit type in 16 bytes."""
_ROW_BYTES = 2 * CHUNK


class Team(NamedTuple):
    """The warpgroups of a block, which copy together."""

    size: int
    warpgroup: Index
    met: Ref | None  # in interpret mode, and with more than one, the barrier of `sync`

    @property
    def threads(self) -> int:
        return self.size * ptx.WARPGROUP


def _meet_plain(team: Team) -> None:
    if team.met is not None:
        plgpu.barrier_arrive(team.met)
        plgpu.barrier_wait(team.met)


@interpreted_as(_meet_plain)
def meet(team: Team) -> None:
    """Waits for the whole block."""
    del team

    @plgpu.inline_mgpu()
    def wait(_: mgpu.LaunchContext) -> None:
        gpu.barrier()

    wait()


@interpreted_as(lambda: None)
def _arrive() -> None:
    @plgpu.inline_mgpu()
    def wait(_: mgpu.LaunchContext) -> None:
        mgpu.utils.inline_ptx("cp.async.wait_all;", has_side_effects=True)

    wait()


def sync(team: Team) -> None:
    """Waits until what this thread copies has arrived, and then for the whole block."""
    _arrive()
    meet(team)


def _load_tile_plain(team: Team, spec: AttentionSpec, source: Ref, index: tuple[Index, Index, Index],
                     target: Ref) -> None:
    count, rows, _ = target.shape
    (batch, head, first), width, axis = index, source.shape[3], 1 if spec.layout == "BLHD" else 2

    @pl.when(team.warpgroup == 0)
    def copy() -> None:
        whole = source[(batch, slice(None), head) if axis == 1 else (batch, head)]  # (length, width)
        x = jnp.take(whole, first + jnp.arange(rows, dtype=jnp.int32), axis=0, mode="fill", fill_value=0)
        target[...] = jnp.swapaxes(jnp.pad(x, ((0, 0), (0, count * CHUNK - width))).reshape(rows, count, CHUNK), 0, 1)


@interpreted_as(_load_tile_plain)
def load_tile(team: Team, spec: AttentionSpec, source: Ref, index: tuple[Index, Index, Index], target: Ref) -> None:
    """Starts to copy a tile of an array in the spec's layout; every thread of the block takes part.

    Args:
      source: of a 16-bit type, in global memory.
      index: (batch, head, first row).
      target: (chunks, rows, 64) in shared memory; rows a multiple of 16 for each warpgroup.
    """
    count, rows, _ = target.shape
    axis = 1 if spec.layout == "BLHD" else 2
    length, width, down = source.shape[axis], source.shape[3], math.prod(source.shape[axis + 1:])
    at_once = team.threads // _UNIT
    assert rows % at_once == 0

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), *(ptx.SCALAR,) * 3))
    def copy(_: mgpu.LaunchContext, source: ir.Value, target: ir.Value, *index: mgpu.FragmentedArray) -> None:
        const = lambda value: mgpu.utils.c(value, ptx.i32())
        below = lambda x, limit: arith.cmpi(arith.CmpIPredicate.slt, x, const(limit))
        batch, head, first = (x.registers.item() for x in index)
        thread = ptx.moved(mgpu.utils.thread_idx())
        row, unit = arith.shrui(thread, const(3)), arith.andi(thread, const(7))
        position = arith.addi(first, row)
        origin = _global_address(source, axis, (batch, head, position, unit))
        swizzled = arith.muli(arith.xori(unit, arith.andi(row, const(7))), const(16))
        to = arith.addi(shared_address(target), arith.addi(arith.muli(row, const(_ROW_BYTES)), swizzled))
        for chunk in range(count):
            units = (width - chunk * CHUNK) // _UNIT
            in_row = [below(unit, units)] if units < _UNIT else []
            for i in range(0, rows, at_once):
                inside = [below(position, length - i)] * (length % rows > 0) + in_row
                size = arith.select(functools.reduce(arith.andi, inside), const(16), const(0)) if inside else const(16)
                offsets = (chunk * rows + i) * _ROW_BYTES, 2 * (i * down + chunk * CHUNK)
                mgpu.utils.inline_ptx(
                    f"cp.async.cg.shared.global [$0+{offsets[0]}], [$1+{offsets[1]}], 16, $2;", to, origin, size,
                    has_side_effects=True)

    copy(source, target, *map(ptx.scalar, index))


def _global_address(ref: ir.Value, axis: int, place: tuple[ir.Value, ...]) -> ir.Value:
    """The address of a unit of 16 bytes of an array of four axes; `axis` is that of positions.

    Args:
      place: batch, head, position and unit, int32.
    """
    i64, kind = ir.IntegerType.get_signless(64), ir.MemRefType(ref.type)
    shape = list(kind.shape)
    strides = math.prod(shape[1:]), math.prod(shape[4 - axis:]), math.prod(shape[axis + 1:]), _UNIT
    terms = [arith.muli(arith.extui(i64, x), mgpu.utils.c(stride, i64)) for x, stride in zip(place, strides)]
    return mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [functools.reduce(arith.addi, terms)],
                                    kind.element_type)


def shared_address(ref: ir.Value) -> ir.Value:
    """The address of a buffer in shared memory, as a 32-bit integer."""
    return llvm.ptrtoint(ptx.i32(), mgpu.utils.memref_ptr(ref))


def _load_words_plain(team: Team, source: Ref, target: Ref) -> None:
    @pl.when(team.warpgroup == 0)
    def copy() -> None:
        target[...] = source[...]


@interpreted_as(_load_words_plain)
def load_words(team: Team, source: Ref, target: Ref) -> None:
    """Starts to copy `source`, a row of float32 numbers in global memory, of which four for each thread at most."""
    del team
    words = target.shape[0]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    def copy(_: mgpu.LaunchContext, source: ir.Value, target: ir.Value) -> None:
        i32, f32 = ptx.i32(), ir.F32Type.get()
        const = lambda value: mgpu.utils.c(value, i32)
        thread = mgpu.utils.thread_idx()
        origin = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(source), [arith.muli(thread, const(4))], f32)
        to = arith.addi(shared_address(target), arith.muli(thread, const(16)))
        mgpu.utils.inline_ptx("cp.async.cg.shared.global [$0], [$1], 16;", to, origin,
                              predicate=arith.cmpi(arith.CmpIPredicate.slt, thread, const(words // 4)),
                              has_side_effects=True)

    copy(source, target)


def _store_own_rows_plain(spec: AttentionSpec, source: Ref, first: int, target: Ref,
                          index: tuple[Index, Index, Index]) -> None:
    length, width = target.shape[1 if spec.layout == "BLHD" else 2], target.shape[3]
    batch, head, start = index

    def write(i: Array, _: None) -> None:
        @pl.when(start + i < length)
        def inside() -> None:
            place = (batch, start + i, head) if spec.layout == "BLHD" else (batch, head, start + i)
            target[*place, :] = source[:, first + i].reshape(-1)[:width]

    lax.fori_loop(0, ROWS, write, None)


@interpreted_as(_store_own_rows_plain)
def store_own_rows(spec: AttentionSpec, source: Ref, first: int, target: Ref,
                   index: tuple[Index, Index, Index]) -> None:
    """Copies 64 rows of a tile to an array in the spec's layout, where they lie in it, 16 bytes a thread: each warp the
    16 rows that it wrote itself, so that only its own threads have to meet.

    Args:
      source: (chunks, rows, 64) of a 16-bit type in shared memory, as `load_tile` makes it.
      first: of its rows.
      target: in global memory.
      index: (batch, head, first row).
    """
    axis = 1 if spec.layout == "BLHD" else 2
    rows, length, width, down = source.shape[1], target.shape[axis], target.shape[3], math.prod(target.shape[axis + 1:])

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), *(ptx.SCALAR,) * 3))
    def store(_: mgpu.LaunchContext, source: ir.Value, target: ir.Value, *index: mgpu.FragmentedArray) -> None:
        const = lambda value: mgpu.utils.c(value, ptx.i32())
        below = lambda x, limit: arith.cmpi(arith.CmpIPredicate.slt, x, const(limit))
        batch, head, start = (x.registers.item() for x in index)
        mgpu.utils.inline_ptx("bar.warp.sync -1;", has_side_effects=True, convergent=True)
        thread = arith.remui(mgpu.utils.thread_idx(), const(ptx.WARPGROUP))
        warp, lane = arith.shrui(thread, const(5)), arith.andi(thread, const(31))
        row, unit = arith.addi(arith.muli(warp, const(16)), arith.shrui(lane, const(3))), arith.andi(lane, const(7))
        position = arith.addi(start, row)
        to = _global_address(target, axis, (batch, head, position, unit))
        origin = arith.addi(shared_address(source), arith.muli(row, const(_ROW_BYTES)))
        for chunk, i in itertools.product(range(tiles.cdiv(width, CHUNK)), range(0, 16, 4)):
            units = (width - chunk * CHUNK) // _UNIT
            inside = below(arith.addi(position, const(i)), length)
            if units < _UNIT:
                inside = arith.andi(inside, below(unit, units))
            swizzled = arith.muli(arith.xori(unit, arith.andi(arith.addi(row, const(i)), const(7))), const(16))
            offset = (chunk * rows + first + i) * _ROW_BYTES
            words = mgpu.utils.inline_ptx(
                f"ld.shared.v4.b32 {{$0, $1, $2, $3}}, [$4+{offset}];", arith.addi(origin, swizzled),
                result_types=[ptx.i32()] * 4, has_side_effects=True)
            mgpu.utils.inline_ptx(f"st.global.v4.b32 [$0+{2 * (i * down + chunk * CHUNK)}], {{$1, $2, $3, $4}};", to,
                                  *words, predicate=inside, has_side_effects=True)

    store(source, target, *map(ptx.scalar, index))
