"""A head of keys that several blocks share: each leaves a partial result, and the last to arrive combines them.

A partial result is O, not yet divided, and two numbers of each row (`Sums`); of all partial results those rows alone
are kept that there are. The combining warpgroup takes 512 numbers of O at a time, four to a thread, so that all threads
have work however few rows there are.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_flash import softmax, tiles
from pallas_flash.arrays import Array
from pallas_flash.kernels.mosaic import ptx
from pallas_flash.kernels.mosaic.cache_rules import rows
from pallas_flash.kernels.mosaic.decode import added
from pallas_flash.kernels.mosaic.decode.rows import (
    group_of,
    place_of,
    statistic_of,
    store_out,
    store_part,
    store_part_statistics,
    store_statistics,
)
from pallas_flash.kernels.mosaic.decode.work import Head, Segment
from pallas_flash.kernels.mosaic.fragments import ROWS, Fragment, spread
from pallas_flash.kernels.mosaic.interpret import interpreted_as
from pallas_flash.kernels.mosaic.types import Flag, Index, Ref
from pallas_flash.spec import AttentionSpec

__all__ = ["PIECE", "Sums", "arrive", "combine", "finish", "is_last", "leave", "part_size", "part_types",
           "share"]

PIECE = 512
"""Numbers of O that are combined at a time."""
STRIP = plgpu.Layout.WG_STRIDED((PIECE,), vec_size=4)


class Sums(NamedTuple):
    """What is known of each row beside O: l_i is the sum of exp2((s - m_i) unit)."""

    m_i: Array  # in the unit of scores
    l_i: Array


def part_size(spec: AttentionSpec) -> int:
    """Numbers of O in a partial result, in whole pieces."""
    return tiles.cdiv(rows(spec) * spec.d_v, PIECE) * PIECE


# -- who is last -------------------------------------------------------------------------------------------------------

def _is_last_plain(counters: Ref, index: Index, count: Index) -> Flag:
    arrived = counters[index] + 1
    counters[index] = jnp.where(arrived == count, 0, arrived)
    return arrived == count


@interpreted_as(_is_last_plain)
def is_last(counters: Ref, index: Index, count: Index) -> Flag:
    """Counts this warpgroup at counters[index]; true in all of its threads if it is the last of `count`, which sets the
    counter back to 0. What every warpgroup wrote to global memory before is then seen by relaxed loads.
    """
    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), ptx.SCALAR, ptx.SCALAR),
                       return_type=plgpu.ShapeDtypeStruct((), jnp.bool_, ptx.SCALAR))
    def vote(_: mgpu.LaunchContext, ref: ir.Value, index: mgpu.FragmentedArray,
             count: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        barrier = mgpu.utils.warpgroup_barrier_idx(sync=False)
        address = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [index.registers.item()], ptx.i32())
        flag = llvm.inline_asm(ptx.i32(), [barrier, _thread(), address, count.registers.item()], f"""
            {{ .reg .pred leads, last, any; .reg .b32 before, others;
            bar.sync $1, {ptx.WARPGROUP};
            setp.eq.u32 leads, $2, 0; mov.u32 before, 0; sub.u32 others, $4, 1;
            @leads atom.global.acq_rel.gpu.add.u32 before, [$3], 1;
            setp.eq.and.u32 last, before, others, leads;
            @last st.global.u32 [$3], 0;
            bar.red.or.pred any, $1, {ptx.WARPGROUP}, last; selp.u32 $0, 1, 0, any; }}""",
            "=r,r,r,l,r,~{memory}", has_side_effects=True)
        is_set = arith.cmpi(arith.CmpIPredicate.ne, flag, mgpu.utils.c(0, ptx.i32()))
        # Where a branch may diverge, the descriptors of all products leave the uniform registers.
        return mgpu.FragmentedArray.splat(ptx.uniform(is_set), (), is_signed=False)

    return vote(counters, ptx.scalar(index), ptx.scalar(count))


def _thread() -> ir.Value:
    return arith.remui(mgpu.utils.thread_idx(), mgpu.utils.c(ptx.WARPGROUP, ptx.i32()))


# -- pieces ------------------------------------------------------------------------------------------------------------

def _elements(piece: ir.Value) -> ir.Value:
    """The first of the four numbers of a piece that this thread has."""
    const = lambda value: mgpu.utils.c(value, ptx.i32())
    return arith.addi(arith.muli(piece, const(PIECE)), arith.muli(_thread(), const(4)))


def _strip(value: ir.Value) -> mgpu.FragmentedArray:
    layout = STRIP.to_mgpu()
    registers = np.array([value], dtype=object).reshape(layout.registers_shape((PIECE,)))
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def _load_piece_plain(spec: AttentionSpec, acc: Ref, sums: Ref, slot: Index, piece: Index) -> tuple[Array, Sums]:
    row = (piece * PIECE + lax.iota(jnp.int32, PIECE)) // spec.d_v
    return acc[slot, pl.ds(piece * PIECE, PIECE)], Sums(*(sums[slot][row, i] for i in range(2)))


@interpreted_as(_load_piece_plain)
def load_piece(spec: AttentionSpec, acc: Ref, sums: Ref, slot: Index, piece: Index) -> tuple[Array, Sums]:
    """Loads a piece of O of a partial result, (512,) float32 in the layout STRIP, and the sums of each number's row.

    Args:
      acc: (slots, `part_size`) float32; sums: (slots, 64, 2) float32.
    """
    size = acc.shape[1]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), ptx.SCALAR, ptx.SCALAR),
                       return_type=(plgpu.ShapeDtypeStruct((PIECE,), jnp.float32, STRIP),) * 3)
    def load(_: mgpu.LaunchContext, acc: ir.Value, sums: ir.Value, slot: mgpu.FragmentedArray,
             piece: mgpu.FragmentedArray) -> tuple[mgpu.FragmentedArray, ...]:
        i32, i64, f32 = ptx.i32(), ir.IntegerType.get_signless(64), ir.F32Type.get()
        slot, first = slot.registers.item(), _elements(piece.registers.item())
        row = arith.divui(first, mgpu.utils.c(spec.d_v, i32))
        at = arith.addi(arith.muli(arith.extui(i64, slot), mgpu.utils.c(size, i64)), arith.extui(i64, first))
        own = arith.addi(arith.muli(slot, mgpu.utils.c(ROWS, i32)), row)
        own = arith.muli(arith.extui(i64, own), mgpu.utils.c(2, i64))
        numbers = []
        for ref, index, count in ((acc, at, 4), (sums, own, 2)):
            address = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [index], f32)
            found = ", ".join(f"${i}" for i in range(count))
            loaded = llvm.inline_asm(
                llvm.StructType.get_literal([f32] * count), [address],
                f"ld.relaxed.gpu.global.v{count}.f32 {{{found}}}, [${count}];", "=f," * count + "l",
                has_side_effects=True)
            numbers.append([llvm.extractvalue(f32, loaded, [i]) for i in range(count)])
        vec = ir.VectorType.get((4,), f32)
        return (_strip(vector.from_elements(vec, numbers[0])),
                *(_strip(vector.broadcast(vec, x)) for x in numbers[1]))

    found, *of_row = load(acc, sums, ptx.scalar(slot), ptx.scalar(piece))
    return found, Sums(*of_row)


class _Piece(NamedTuple):
    """Results in the layout STRIP: of each number of O, and of its row."""

    out: Array
    lse: Array
    rest: Array


def _store_piece_plain(spec: AttentionSpec, x: _Piece, targets: tuple[Ref, Ref], head: Head, piece: Index) -> None:
    count = rows(spec) * spec.d_v
    place = piece * PIECE + lax.iota(jnp.int32, PIECE)
    out = group_of(spec, targets[0], head)
    old = out[...] if spec.layout == "BLHD" else out[...].swapaxes(0, 1)
    new = jnp.append(old.reshape(-1), jnp.zeros(1, old.dtype)).at[jnp.minimum(place, count)].set(x.out)
    new = new[:count].reshape(old.shape)
    out[...] = new if spec.layout == "BLHD" else new.swapaxes(0, 1)
    heads = pl.ds(head.kv_head * spec.group, spec.group)
    for which, values in enumerate((x.lse, x.rest)):
        old = targets[1][head.batch, heads, which].T
        row = jnp.minimum(place // spec.d_v, rows(spec))
        new = jnp.append(old.reshape(-1), jnp.zeros(1, old.dtype)).at[row].set(values)
        targets[1][head.batch, heads, which] = new[:-1].reshape(old.shape).T


@interpreted_as(_store_piece_plain)
def store_piece(spec: AttentionSpec, x: _Piece, targets: tuple[Ref, Ref], head: Head, piece: Index) -> None:
    """Stores a piece of the output of a key head, of 16 bits, and the statistics of the rows that begin in it.

    Args:
      targets: out and statistics.
    """
    @plgpu.inline_mgpu(arg_types=(STRIP, STRIP, STRIP, plgpu.RefType(), plgpu.RefType(), *(ptx.SCALAR,) * 3))
    def store(_: mgpu.LaunchContext, out: mgpu.FragmentedArray, lse: mgpu.FragmentedArray, rest: mgpu.FragmentedArray,
              *others: *tuple[ir.Value, ir.Value, *tuple[mgpu.FragmentedArray, ...]]) -> None:
        target, stats, *place = others
        batch, kv_head, piece = (x.registers.item() for x in place)
        first, dim = _elements(piece), mgpu.utils.c(spec.d_v, ptx.i32())
        row, column = arith.divui(first, dim), arith.remui(first, dim)
        inside = arith.cmpi(arith.CmpIPredicate.slt, row, mgpu.utils.c(rows(spec), ptx.i32()))
        i64 = ir.IntegerType.get_signless(64)
        at = arith.addi(arith.muli(place_of(spec, (batch, kv_head), row), mgpu.utils.c(spec.d_v, i64)),
                        arith.extui(i64, column))
        element = ir.MemRefType(target.type).element_type
        words = vector.bitcast(ir.VectorType.get((2,), ptx.i32()), out.registers.item())
        mgpu.utils.inline_ptx(
            "st.global.v2.b32 [$0], {$1, $2};", mgpu.utils.getelementptr(mgpu.utils.memref_ptr(target), [at], element),
            *(vector.extract(words, [], [i]) for i in range(2)), predicate=inside, has_side_effects=True)
        begins = arith.cmpi(arith.CmpIPredicate.eq, column, mgpu.utils.c(0, ptx.i32()))
        for which, values in enumerate((lse, rest)):
            address = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(stats),
                                               [statistic_of(spec, (batch, kv_head), row, which)], ir.F32Type.get())
            mgpu.utils.inline_ptx("st.global.f32 [$0], $1;", address, vector.extract(values.registers.item(), [], [0]),
                                  predicate=arith.andi(inside, begins), has_side_effects=True)

    store(*x, *targets, *map(ptx.scalar, (*head, piece)))


# -- one worker's results ----------------------------------------------------------------------------------------------

def finish(spec: AttentionSpec, gmem: dict[str, Ref], segment: Segment, sums: Sums, acc: Fragment) -> None:
    """Writes out = acc / l_i and the statistics of a head that a worker has alone."""
    out = acc * spread(softmax.rescale(sums.l_i), acc.shape[1])
    store_out(spec, out.astype(spec.dtype), gmem["out"], segment.head)
    store_statistics(spec, added.statistics(spec, sums.m_i, sums.l_i), gmem["stats"], segment.head)


def share(spec: AttentionSpec, gmem: dict[str, Ref], segment: Segment, sums: Sums, acc: Fragment,
          at_once: int) -> None:
    """Leaves a partial result of a head that several workers share; the last of them combines."""
    leave(spec, gmem, segment, sums, acc)
    arrive(spec, gmem, segment, at_once)


def leave(spec: AttentionSpec, gmem: dict[str, Ref], segment: Segment, sums: Sums, acc: Fragment) -> None:
    """Leaves a partial result of a head that several workers share."""
    slot = segment.slot(segment.part)
    store_part(spec, acc, gmem["part_acc"], slot)
    store_part_statistics(sums, gmem["part_sums"], slot)


def arrive(spec: AttentionSpec, gmem: dict[str, Ref], segment: Segment, at_once: int, pieces: int = 1,
           meet: Callable[[], None] | None = None) -> None:
    """Says that a partial result is there. The last worker that does combines them; or the first, if all `meet`."""
    def combines() -> Flag:
        if meet is None:
            return is_last(gmem["counters"], segment.owner, segment.parts)
        meet()
        return ptx.scalar(segment.part) == 0

    @pl.when(combines())
    def _() -> None:
        combine(spec, gmem, segment, added.score_unit(spec), at_once, pieces)


def part_types(spec: AttentionSpec, count: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of partial results of `count` workers."""
    return {"part_acc": jax.ShapeDtypeStruct((2 * count, part_size(spec)), jnp.float32),
            "part_sums": jax.ShapeDtypeStruct((2 * count, ROWS, 2), jnp.float32)}


# -- combining ---------------------------------------------------------------------------------------------------------

class _Total(NamedTuple):
    """The sum of some partial results: of O, and of each row."""

    acc: Array
    sums: Sums


def _added(total: _Total, parts: list[tuple[Array, Sums]], unit: float) -> _Total:
    """The total with more partial results. It is kept relative to the largest m_i there is."""
    m_i, l_i = total.sums
    for _, part in parts:
        m_i = jnp.where(part.m_i <= m_i, m_i, part.m_i)  # so that NaN counts as larger
    alpha = jnp.exp2((total.sums.m_i - m_i) * unit)
    acc, l_i = total.acc * alpha, l_i * alpha
    for x, part in parts:
        weight = jnp.exp2((part.m_i - m_i) * unit)
        acc, l_i = acc + weight * x, l_i + weight * part.l_i
    return _Total(acc, Sums(m_i, l_i))


def combine(spec: AttentionSpec, gmem: dict[str, Ref], segment: Segment, unit: float, at_once: int,
            pieces: int = 1) -> None:
    """Combines the partial results of a head, and stores out and statistics.

    Args:
      gmem: part_acc, part_sums, out, stats.
      unit: of scores, times log2(e) (`added.score_unit`).
      at_once: partial results that are loaded together.
      pieces: of O that are, too: a load behind those of keys takes microseconds, and many rows are many pieces.
    """
    count = part_size(spec) // PIECE
    pieces = math.gcd(pieces, count)
    splat = lambda x: plgpu.layout_cast(jnp.full((PIECE,), x, jnp.float32), STRIP)

    def load_some(piece: Index, first: Index) -> list[tuple[Array, Sums]]:
        found = []
        for part in range(at_once):
            slot, there = segment.slot(jnp.minimum(first + part, segment.parts - 1)), first + part < segment.parts
            x, sums = load_piece(spec, gmem["part_acc"], gmem["part_sums"], slot, piece)
            own = Sums(jnp.where(there, sums.m_i, LOWEST), jnp.where(there, sums.l_i, 0.0))
            found.append((jnp.where(there, x, 0.0), own))
        return found

    def finish_piece(piece: Index, total: _Total) -> None:
        acc, sums = total
        out = (acc * softmax.rescale(sums.l_i)).astype(gmem["out"].dtype)
        stats = added.statistics(spec, sums.m_i, sums.l_i)
        store_piece(spec, _Piece(out, *stats), (gmem["out"], gmem["stats"]), segment.head, piece)

    @pl.loop(jnp.int32(0), jnp.int32(count // pieces))
    def _(some: Index) -> None:
        nothing = _Total(splat(0.0), Sums(splat(LOWEST), splat(0.0)))
        rounds = lax.div(segment.parts + (at_once - 1), jnp.int32(at_once))
        own = [some * pieces + i if pieces > 1 else some for i in range(pieces)]

        def add_some(i: Index, totals: list[_Total]) -> list[_Total]:
            loaded = [load_some(piece, i * at_once) for piece in own]
            return [_added(total, parts, unit) for total, parts in zip(totals, loaded, strict=True)]

        totals = lax.fori_loop(jnp.int32(0), rounds, add_some, [nothing] * pieces)
        for piece, total in zip(own, totals, strict=True):
            finish_piece(piece, total)


LOWEST = -3e38
"""The m_i where there is no partial result: low, but finite."""
