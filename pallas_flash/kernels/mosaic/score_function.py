"""A score function, applied to scores in registers, forward and backward; the gradients of its arrays are `dscore`'s.

The function and its derivative are a program of one pair (`mosaic.traced`), which runs on 8 columns of a tile at a
time. What depends on the row alone is computed once for all of them. Scores are in the unit 1 from here on. -inf hides
a pair; as nothing is known of where that is, the mask of such a problem holds an array (`bias.as_mask`), so that every
tile is looked at for what hidden keys spoil.

Kernels read the function's arrays, one after the other, from global memory: one number for the whole tile where its
place does not depend on positions (a slope of each head), one a row or a column, or one a pair (a table of distances).

Finite scores beyond 2^32 lose their last bit, as in `xla`, and those below -2^126 become that: their exponent of base 2
is a float32 number, so that keys which a function hides by finfo.min weigh alike where a query sees no other.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, math, vector

from pallas_flash import softmax
from pallas_flash.arrays import Array, Float, Int
from pallas_flash.kernels.mosaic import fragments, ptx, traced
from pallas_flash.kernels.mosaic.fragments import ROWS, Fragment, PerRow
from pallas_flash.kernels.mosaic.interpret import interpreted_as
from pallas_flash.kernels.mosaic.traced import Value
from pallas_flash.kernels.mosaic.types import Index, Ref
from pallas_flash.spec import AttentionSpec, Operands

__all__ = ["LOWEST", "HeadScore", "input_types", "inputs"]

_COLUMNS = 8
_LARGE = 2.0**32
LOWEST = -(2.0**126)
"""What finite scores below it become: its exponent of base 2 is a float32 number."""
_ROW, _COLUMN = 0, 1


# -- the arrays, which XLA makes ---------------------------------------------------------------------------------------

def inputs(spec: AttentionSpec, operands: Operands) -> tuple[Array, ...]:
    """What kernels read of the function's arrays; nothing if there is no function."""
    if spec.score is None:
        return ()
    return traced.arrays(spec.score, operands.score, operands.score_integers)


def input_types(spec: AttentionSpec) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of `inputs`, by the names that kernels have for them."""
    fields = () if spec.score is None else traced.fields(spec.score)
    return {f"score_{i}": jax.ShapeDtypeStruct(x.shape, x.dtype) for i, x in enumerate(fields)}


# -- in registers ------------------------------------------------------------------------------------------------------

class HeadScore(NamedTuple):
    """The score function of one batch entry and query head."""

    spec: AttentionSpec
    gmem: dict[str, Ref]
    batch: Index
    head: Index

    def applied(self, s: Fragment, first: tuple[Index, Index], keys_dim: int) -> Fragment:
        """The function of scores.

        Args:
          s: (64, n), in the unit of `mosaic.scores.scaled`, in the layout TILE.
          first: the positions of the first query and of the first key.
          keys_dim: the axis that runs over keys.
        """
        return self._of_tile(s, first, keys_dim, False)[0]

    def with_slope(self, s: Fragment, first: tuple[Index, Index], keys_dim: int) -> tuple[Fragment, Fragment | None]:
        """The function of scores, and its derivative by them; None: it is 1."""
        value, slope = self._of_tile(s, first, keys_dim, True)
        return value, slope

    def of_key(self, s: PerRow, first: Index, key: Index) -> tuple[PerRow, PerRow | None]:
        """The same for 64 queries and one key."""
        own = self._program
        given = self._given(s, (_ROW,)) | {"q_pos": Value(_positions(_ROW, first), (_ROW,)),
                                           "kv_pos": Value(ptx.scalar(key))}
        results = [own.value] if own.is_additive else [own.value, own.slope]
        found = traced.evaluate(own, results, given, self._place, {})
        value, *slope = (_spread(x.x, x.axes, (_ROW,)) for x in found)
        return _fixed(value), slope[0] if slope else None

    def _of_tile(self, s: Fragment, first: tuple[Index, Index], keys_dim: int,
                 wants_slope: bool) -> tuple[Fragment, Fragment | None]:
        # Opaque, or LLVM would keep what follows from them, addresses first, in registers through every loop.
        here = self._replace(batch=ptx.opaque(self.batch), head=ptx.opaque(self.head))
        own, shared = self._program, dict[int, Value]()
        row, column = (ptx.opaque(x) for x in (first if keys_dim == 1 else first[::-1]))
        rows, names = _positions(_ROW, row), ("q_pos", "kv_pos") if keys_dim == 1 else ("kv_pos", "q_pos")
        results = [own.value, own.slope] if wants_slope and not own.is_additive else [own.value]
        parts = []
        for i in range(0, s.shape[1], _COLUMNS):
            columns = _positions(_COLUMN, column + i)
            given = here._given(s[:, i:i + _COLUMNS], (_ROW, _COLUMN)) | {
                names[0]: Value(rows, (_ROW,)), names[1]: Value(columns, (_COLUMN,))}
            found = traced.evaluate(own, results, given, here._place, shared)
            parts.append([_spread(x.x, x.axes, (_ROW, _COLUMN)) for x in found])
        value, *slope = (fragments.concatenate(list(x)) for x in zip(*parts))
        return _within_range(value), slope[0] if slope else None

    @property
    def _program(self) -> traced.Program:
        assert self.spec.score is not None
        return traced.program(self.spec.score)

    def _given(self, s: Array, axes: tuple[int, ...]) -> dict[str, Value]:
        score = s * softmax.unit(self.spec.scale, self.spec.softcap)
        return {"score": Value(score, axes), "batch": Value(ptx.scalar(self.batch)),
                "head": Value(ptx.scalar(self.head))}

    @property
    def _place(self) -> traced.Place:
        return traced.Place(_spread, lambda i, element, axes: _load(self.gmem[f"score_{i}"], element, axes))


def _layout(axes: tuple[int, ...]) -> ptx.Layout:
    return {(): ptx.SCALAR, (_ROW,): fragments.ROW_LAYOUT, (_COLUMN,): fragments.COLUMN_LAYOUT,
            (_ROW, _COLUMN): fragments.TILE}[axes]


def _shape(axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple((ROWS, _COLUMNS)[axis] for axis in axes)


def _spread(x: Array, axes: tuple[int, ...], wanted: tuple[int, ...]) -> Array:
    """Spreads numbers of some axes over more."""
    if axes == wanted:
        return x
    wide = lax.broadcast_in_dim(x, _shape(wanted), [wanted.index(axis) for axis in axes])
    return plgpu.layout_cast(wide, _layout(wanted)) if not axes else wide


@interpreted_as(lambda axis, first: first + jnp.arange((ROWS, _COLUMNS)[axis], dtype=jnp.int32))
def _positions(axis: int, first: Index) -> Int[Array, " n"]:
    """The positions of a tile's rows, or of 8 of its columns, made where they are used."""
    shape, layout = _shape((axis,)), _layout((axis,))

    @plgpu.inline_mgpu(arg_types=(ptx.SCALAR,), return_type=plgpu.ShapeDtypeStruct(shape, jnp.int32, layout))
    def make(_: mgpu.LaunchContext, first: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        const = lambda value: mgpu.utils.c(value, ptx.i32())
        warp, row, quarter = fragments.thread_in_tile()
        own = (arith.addi(arith.muli(warp, const(16)), row), arith.muli(quarter, const(2)))[axis]
        base, target = arith.addi(first.registers.item(), own), layout.to_mgpu()
        places = np.empty(target.registers_shape(shape), dtype=object)
        width = (1, 2)[axis]  # numbers in a register
        for j in range(places.size):
            values = [arith.addi(base, const(8 * j + e)) for e in range(width)]
            places.reshape(-1)[j] = vector.from_elements(ir.VectorType.get((width,), ptx.i32()), values)
        return mgpu.FragmentedArray(_registers=places, _layout=target, _is_signed=True)

    return make(ptx.scalar(first))


def _load(ref: Ref, element: Int[Array, "..."], axes: tuple[int, ...]) -> Array:
    """Loads elements of (n,) in global memory."""
    return _gather(ref, element, axes) if axes else ref[element]


@interpreted_as(lambda ref, element, axes: ref[...][element])
def _gather(ref: Ref, element: Int[Array, "..."], axes: tuple[int, ...]) -> Array:
    """Loads one element for each row, each column, or each pair."""
    dtype, layout = ref.dtype, _layout(axes)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout),
                       return_type=plgpu.ShapeDtypeStruct(element.shape, dtype, layout))
    def load(_: mgpu.LaunchContext, ref: ir.Value, element: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        kind, found = ir.MemRefType(ref.type).element_type, np.empty(element.registers.shape, dtype=object)
        pointer, i64 = mgpu.utils.memref_ptr(ref), ir.IntegerType.get_signless(64)
        for i, register in enumerate(element.registers.flat):
            width = ir.VectorType(register.type).shape[0]
            values = [llvm.load(kind, mgpu.utils.getelementptr(
                pointer, [arith.extui(i64, vector.extract(register, [], [e]))], kind)) for e in range(width)]
            found.reshape(-1)[i] = vector.from_elements(ir.VectorType.get((width,), kind), values)
        signed = True if jnp.issubdtype(dtype, jnp.integer) else None
        return mgpu.FragmentedArray(_registers=found, _layout=element.layout, _is_signed=signed)

    return load(ref, element)


# -- scores that are far from 0 ----------------------------------------------------------------------------------------

def _fixed(s: Float[Array, "..."]) -> Float[Array, "..."]:
    """Brings scores into the range in which exponents are float32 numbers, and clears the last bit of large ones, as
    `pallas_flash.scores.even_if_large` does. Infinities and NaN stay.
    """
    even = lax.bitcast_convert_type(lax.bitcast_convert_type(s, jnp.int32) & -2, jnp.float32)
    s = jnp.where(jnp.abs(s) >= _LARGE, even, s)
    return jnp.where(s == -jnp.inf, s, jnp.maximum(s, LOWEST))


def _within_range(s: Fragment) -> Fragment:
    """`_fixed`, in warps that have a score of 2^32 or more, or a hidden pair."""
    return lax.cond(_any_large_in_warp(s), _fixed, lambda s: s, s)


@interpreted_as(lambda s: jnp.any(jnp.abs(s) >= _LARGE))
def _any_large_in_warp(s: Fragment) -> Array:
    @plgpu.inline_mgpu(arg_types=(fragments.TILE,),
                       return_type=plgpu.ShapeDtypeStruct((), jnp.bool_, ptx.SCALAR))
    def vote(_: mgpu.LaunchContext, s: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        values = [math.absf(vector.extract(register, [], [i])) for register in s.registers.flat for i in range(2)]
        large = arith.cmpf(arith.CmpFPredicate.OGE, functools.reduce(arith.maxnumf, values),
                           mgpu.utils.c(_LARGE, ir.F32Type.get()))
        return mgpu.FragmentedArray.splat(ptx.uniform(large), (), is_signed=False)

    return vote(s)
