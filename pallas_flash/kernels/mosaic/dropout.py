"""Dropout in registers: which weights of a tile are kept, by the bits of `pallas_flash.dropout`.

A thread of the layout TILE holds rows r, r + 8 and columns c, c + 8 of each square of 16 x 16: the four pairs of one
draw, whether queries are the rows or keys are. So P and P^T cost one draw for four weights.

Kept weights are not multiplied with factor = 1 / keep rate: the results are, in float32. With kept as 0 or 1,

    O = factor (kept P) V / l;    dV = factor (kept P)^T dO;    dS = factor P (kept dP - delta / factor)

so the accumulator of dP starts at -delta / factor, and where a weight is dropped that start takes its place. The sum l
and lse are those of all weights.

The key of each (batch, query head) comes as an array: so a device that has some of them drops what the whole drops.
Where the problem is a part of a larger one, the place of its first query and key there comes behind each key; both are
multiples of `dropout.UNIT`, so that a draw still serves four pairs.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_flash import dropout
from pallas_flash.arrays import Array, Bool, Int
from pallas_flash.kernels.mosaic import fragments, ptx
from pallas_flash.kernels.mosaic.fragments import ROWS, TILE, Fragment, thread_in_tile
from pallas_flash.kernels.mosaic.interpret import interpreted_as
from pallas_flash.kernels.mosaic.types import Index, Ref
from pallas_flash.spec import AttentionSpec, Operands

__all__ = ["Draws", "draws", "factor", "input_types", "inputs", "kept", "kept_of_key", "without_dropped"]

_KEYS = "dropout_keys"


# -- the keys, which the host's program makes --------------------------------------------------------------------------

def input_types(spec: AttentionSpec) -> dict[str, jax.ShapeDtypeStruct]:
    """What a pass takes beside its other arrays: the keys, if there is dropout."""
    shape = spec.batch, spec.q_heads, 4 if spec.dropout_moved else 2
    return {_KEYS: jax.ShapeDtypeStruct(shape, jnp.int32)} if spec.dropout_rate else {}


def inputs(spec: AttentionSpec, operands: Operands) -> tuple[Int[Array, "b h 2|4"], ...]:
    """The arrays of `input_types`: the keys of each batch entry and query head of a problem, and in a part of one the
    positions of its first query and key.
    """
    if operands.dropout_seed is None:
        return ()
    rows = jnp.arange(spec.batch, dtype=jnp.uint32)[:, None], jnp.arange(spec.q_heads, dtype=jnp.uint32)[None, :]
    batch, head, *first = map(jnp.asarray, dropout.moved((*rows, 0, 0), operands.dropout_origin))
    words = [*dropout.keys(operands.dropout_seed, batch, head)]
    if spec.dropout_moved:
        words += [jnp.broadcast_to(x, words[0].shape) for x in first]
    return (lax.bitcast_convert_type(jnp.stack(words, axis=-1), jnp.int32),)


def factor(spec: AttentionSpec) -> float:
    """What results are multiplied with; 1 without dropout, and where nothing is kept: any number will do there."""
    return dropout.factor(spec.dropout_rate) or 1.0


# -- draws -------------------------------------------------------------------------------------------------------------

class Draws(NamedTuple):
    """The draws of a (64, n) tile of weights."""

    rate: float
    key: tuple[Index, Index]  # two words
    first: tuple[Index, Index]  # position of the first query and of the first key: multiples of 16
    keys_dim: int  # the axis that runs over keys


def draws(spec: AttentionSpec, gmem: dict[str, Ref], head: tuple[Index, Index], first: tuple[Index, Index],
          keys_dim: int) -> Draws:
    """The draws of a tile of (batch, query head); `first` counts from the first query and key of the problem."""
    x, y, *origin = _load_key(gmem[_KEYS], head)
    if origin:
        first = origin[0] + first[0], origin[1] + first[1]
    return Draws(spec.dropout_rate, (x, y), first, keys_dim)


@interpreted_as(lambda ref, head: tuple(ref[*head, i] for i in range(ref.shape[2])))
def _load_key(ref: Ref, head: tuple[Index, Index]) -> tuple[Index, ...]:
    """Loads a key, and what is behind it, from global memory where it is used: it takes no registers of the loop."""
    heads, count, word = ref.shape[1], ref.shape[2], plgpu.ShapeDtypeStruct((), jnp.int32, ptx.SCALAR)
    targets = ", ".join(f"${i}" for i in range(count))

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), ptx.SCALAR, ptx.SCALAR), return_type=(word,) * count)
    def load(_: mgpu.LaunchContext, ref: ir.Value, batch: mgpu.FragmentedArray,
             head: mgpu.FragmentedArray) -> tuple[mgpu.FragmentedArray, ...]:
        i32 = ptx.i32()
        row = arith.addi(arith.muli(batch.registers.item(), mgpu.utils.c(heads, i32)), head.registers.item())
        address = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [arith.muli(row, mgpu.utils.c(count, i32))], i32)
        words = llvm.inline_asm(
            llvm.StructType.get_literal([i32] * count), [address],
            f"ld.global.v{count}.u32 {{{targets}}}, [${count}];", "=r," * count + "l", has_side_effects=True)
        return tuple(mgpu.FragmentedArray.splat(llvm.extractvalue(i32, words, [i]), (), is_signed=True)
                     for i in range(count))

    return load(ref, *map(ptx.scalar, head))


def _kept_plain(draws: Draws, columns: int) -> Bool[Array, "64 n"]:
    unsigned = lambda x: lax.bitcast_convert_type(ptx.scalar(x), jnp.uint32)
    shape = ROWS, columns
    q_pos, kv_pos = (unsigned(first) + lax.broadcasted_iota(jnp.uint32, shape, axis)
                     for first, axis in zip(draws.first, (1 - draws.keys_dim, draws.keys_dim)))
    key = unsigned(draws.key[0]), unsigned(draws.key[1])
    return dropout.kept_by(key, q_pos, kv_pos, draws.rate)


@interpreted_as(_kept_plain)
def kept(draws: Draws, columns: int) -> Bool[Array, "64 n"]:
    """Flags of the weights that are kept, (64, columns) in the layout TILE; columns are a multiple of 16."""
    @plgpu.inline_mgpu(arg_types=(ptx.SCALAR,) * 4,
                       return_type=plgpu.ShapeDtypeStruct((ROWS, columns), jnp.bool_, TILE))
    def make(_: mgpu.LaunchContext, *scalars: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        layout, pair = TILE.to_mgpu(), ir.VectorType.get((2,), ir.IntegerType.get_signless(1))
        found = np.empty(layout.registers_shape((ROWS, columns)), dtype=object)
        flat = found.reshape(columns // 8, 2)
        for at, flags in _flags(draws, columns, scalars):
            flat[at] = vector.from_elements(pair, flags)
        return mgpu.FragmentedArray(_registers=found, _layout=layout, _is_signed=False)

    return make(*map(ptx.scalar, (*draws.key, *draws.first)))


def kept_of_key(spec: AttentionSpec, gmem: dict[str, Ref], head: tuple[Index, Index], q_first: Index,
                position: Index) -> Bool[Array, "64"]:
    """Flags of the weights of 64 queries and one key, in the layout ROW_LAYOUT."""
    first = lax.div(ptx.scalar(position), jnp.int32(16)) * 16
    flags = kept(draws(spec, gmem, head, (q_first, first), 1), 16)
    here = fragments.positions(16, 1, first) == position
    return jnp.where(flags & here, jnp.float32(1.0), jnp.float32(0.0)).max(axis=1) > 0


@interpreted_as(lambda draws, p: jnp.where(_kept_plain(draws, p.shape[1]), p, jnp.zeros_like(p)))
def without_dropped(draws: Draws, p: Fragment) -> Fragment:
    """Weights, (64, n) of a 16-bit type in the layout TILE, with zeros for those that are dropped. It masks two at a
    time, after they have been rounded.
    """
    columns = p.shape[1]

    @plgpu.inline_mgpu(arg_types=(TILE, *(ptx.SCALAR,) * 4), return_type=plgpu.ShapeDtypeStruct(p.shape, p.dtype, TILE))
    def drop(_: mgpu.LaunchContext, p: mgpu.FragmentedArray, *scalars: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        const = lambda value: mgpu.utils.c(value, ptx.i32())
        word = ir.VectorType.get((1,), ptx.i32())
        flat = p.registers.reshape(columns // 8, 2)
        found = np.empty_like(flat)
        for at, (low, high) in _flags(draws, columns, scalars):
            mask = arith.ori(arith.select(low, const(0xFFFF), const(0)), arith.select(high, const(-(2**16)), const(0)))
            both = arith.andi(vector.extract(vector.bitcast(word, flat[at]), [], [0]), mask)
            found[at] = vector.bitcast(flat[at].type, vector.from_elements(word, [both]))
        return mgpu.FragmentedArray(_registers=found.reshape(p.registers.shape), _layout=p.layout,
                                    _is_signed=p.is_signed)

    return drop(p, *map(ptx.scalar, (*draws.key, *draws.first)))


type _Flags = tuple[ir.Value, ir.Value]
"""Whether the weights of an even column and of the next one are kept."""


def _flags(draws: Draws, columns: int,
           scalars: tuple[mgpu.FragmentedArray, ...]) -> Iterator[tuple[tuple[int, int], _Flags]]:
    """The flags of each register of this thread, by its index (columns of 8, row & 8) in the layout TILE.

    Args:
      scalars: the key and the first positions, as `draws` has them.
    """
    const = lambda value: mgpu.utils.c(value, ptx.i32())
    *key, q_first, kv_first = (x.registers.item() for x in scalars)
    row_first, column_first = (q_first, kv_first) if draws.keys_dim == 1 else (kv_first, q_first)
    warp, row, quarter = thread_in_tile()
    half = lambda x: arith.divui(x, const(2))  # groups of positions that come before
    row = ptx.moved(arith.addi(half(row_first), arith.addi(arith.muli(warp, const(8)), row)))
    column = ptx.moved(arith.addi(half(column_first), arith.muli(quarter, const(2))))
    for square in range(columns // 16):
        ends = (arith.addi(column, const(8 * square + e)) for e in (0, 1))
        words = [_threefry(key, (row, end) if draws.keys_dim == 1 else (end, row)) for end in ends]
        for j, i in np.ndindex(2, 2):
            q_bit, kv_bit = (i, j) if draws.keys_dim == 1 else (j, i)
            low, high = (_is_kept(word[q_bit], kv_bit, draws.rate) for word in words)
            yield (2 * square + j, i), (low, high)


def _is_kept(word: ir.Value, upper: int, rate: float) -> ir.Value:
    """Whether the upper or lower half of a word reaches the threshold. Halves are compared where the upper one is."""
    threshold = dropout.threshold(rate)
    if threshold == dropout.LEVELS:
        return mgpu.utils.c(0, ir.IntegerType.get_signless(1))
    bits = word if upper else arith.shli(word, mgpu.utils.c(16, ptx.i32()))
    return arith.cmpi(arith.CmpIPredicate.uge, bits, mgpu.utils.c(_signed(threshold << 16), ptx.i32()))


def _threefry(key: list[ir.Value], counter: tuple[ir.Value, ir.Value]) -> tuple[ir.Value, ir.Value]:
    """`dropout.threefry_2x32` with 13 rounds, on 32-bit integers."""
    i32 = ptx.i32()
    const = lambda value: mgpu.utils.c(_signed(value), i32)
    words = (*key, arith.xori(arith.xori(*key), const(dropout.PARITY)))
    x0, x1 = (arith.addi(x, word) for x, word in zip(counter, words))
    for i in range(dropout.ROUNDS):
        x0 = arith.addi(x0, x1)
        distance = const(dropout.ROTATIONS[i // 4 % 2][i % 4])
        x1 = arith.xori(llvm.call_intrinsic(i32, "llvm.fshl.i32", [x1, x1, distance], [], []), x0)
        if i % 4 == 3:
            turn = i // 4 + 1
            x0, x1 = arith.addi(x0, words[turn % 3]), arith.addi(arith.addi(x1, words[(turn + 1) % 3]), const(turn))
    return x0, x1


def _signed(word: int) -> int:
    """The signed 32-bit integer with the bits of an unsigned one."""
    return word - 2**32 if word >= 2**31 else word
