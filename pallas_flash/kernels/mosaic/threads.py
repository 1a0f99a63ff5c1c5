"""Programs for a number in each thread of a warpgroup.

In a kernel a scalar is one number in each thread, the same one in all. What is computed from `of_block` differs: each
thread runs the same instructions on a place of its own. Scalar arithmetic, comparisons and choices mean then what they
mean to a thread, so that a mask answers each thread about its own position. Such numbers must not decide a branch or
the length of a loop, and go to memory by `store` alone. In interpret mode they are arrays (128,).
"""

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm

from pallas_flash.arithmetic import Positions
from pallas_flash.arrays import Array
from pallas_flash.kernels.mosaic import ptx
from pallas_flash.kernels.mosaic.interpret import interpreted_as
from pallas_flash.kernels.mosaic.types import Index, Ref

__all__ = ["WARP", "load", "meet", "of_block", "smallest", "store", "store_shared"]

WARP = 32
"""Threads of a warp."""

_INT = plgpu.ShapeDtypeStruct((), jnp.int32, ptx.SCALAR)


@interpreted_as(lambda: jnp.arange(ptx.WARPGROUP, dtype=jnp.int32))
def of_block() -> Array:
    """This thread's number in a block of one warpgroup, 0 to 127."""
    @plgpu.inline_mgpu(return_type=_INT)
    def own(_: mgpu.LaunchContext) -> mgpu.FragmentedArray:
        thread = arith.remui(mgpu.utils.thread_idx(), mgpu.utils.c(ptx.WARPGROUP, ptx.i32()))
        return mgpu.FragmentedArray.splat(thread, (), is_signed=True)

    return own()


@interpreted_as(lambda ref, *index: ref[...][index])
def load(ref: Ref, *index: Index) -> Array:
    """ref[index], each thread's own."""
    return ref[index]


def _smallest_plain(x: Array) -> Array:
    x = jnp.broadcast_to(x, (ptx.WARPGROUP,)).reshape(-1, WARP)
    return jnp.repeat(x.min(axis=1), WARP)


@interpreted_as(_smallest_plain)
def smallest(x: Array) -> Array:
    """The smallest of the int32 of a warp's threads, in each of them. All of the warp must come here."""
    @plgpu.inline_mgpu(arg_types=(ptx.SCALAR,), return_type=_INT)
    def reduce(_: mgpu.LaunchContext, x: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        found = nvvm.redux_sync(x.registers.item(), nvvm.ReductionKind.MIN, mgpu.utils.c(-1, ptx.i32()))
        return mgpu.FragmentedArray.splat(found, (), is_signed=True)

    return reduce(x)


def _each_thread(*xs: Positions) -> list[Array]:
    return [jnp.broadcast_to(jnp.asarray(x), (ptx.WARPGROUP,)) for x in xs]


def _store_plain(ref: Ref, index: tuple[Index, ...], values: tuple[Positions, ...], where: Array) -> None:
    place, own, flags = _each_thread(*index), _each_thread(*values), _each_thread(where)[0]

    @pl.loop(jnp.int32(0), jnp.int32(ptx.WARPGROUP))
    def _(thread: Array) -> None:
        @pl.when(flags[thread])
        def _store() -> None:
            for i, x in enumerate(own):
                ref[*(at[thread] for at in place[:-1]), place[-1][thread] + i] = x[thread]


def _flat(ref: Ref, index: tuple[Index, ...]) -> Array:
    """Where an element lies in an array, which has fewer than 2^31 of them."""
    return functools.reduce(lambda at, step: at * step[0] + step[1], zip(ref.shape, index), jnp.int32(0))


@interpreted_as(_store_plain)
def store(ref: Ref, index: tuple[Index, ...], values: tuple[Positions, ...], where: Array) -> None:
    """Stores int32 numbers side by side from ref[index] on, in global memory; only those threads whose flag is set."""
    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *(ptx.SCALAR,) * (2 + len(values))))
    def write(_: mgpu.LaunchContext, ref: ir.Value, at: mgpu.FragmentedArray, flag: mgpu.FragmentedArray,
              *values: mgpu.FragmentedArray) -> None:
        is_set = arith.cmpi(arith.CmpIPredicate.ne, flag.registers.item(), mgpu.utils.c(0, ptx.i32()))
        address = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [at.registers.item()], ptx.i32())
        for i, x in enumerate(values):
            mgpu.utils.inline_ptx(f"st.global.b32 [$0 + {4 * i}], $1;", address, x.registers.item(), predicate=is_set,
                                  has_side_effects=True)

    write(ref, ptx.scalar(_flat(ref, index)), jnp.where(where, jnp.int32(1), jnp.int32(0)), *map(ptx.scalar, values))


def _store_shared_plain(ref: Ref, index: tuple[Index, ...], value: Array) -> None:
    first = ptx.scalar(jnp.arange(ptx.WARPGROUP) % WARP) == 0
    _store_plain(ref, index, (value,), first)


@interpreted_as(_store_shared_plain)
def store_shared(ref: Ref, index: tuple[Index, ...], value: Array) -> None:
    """Stores an int32 to ref[index] in shared memory, the same in all threads of a warp. `meet` must follow."""
    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), ptx.SCALAR, ptx.SCALAR))
    def write(_: mgpu.LaunchContext, ref: ir.Value, at: mgpu.FragmentedArray, x: mgpu.FragmentedArray) -> None:
        address = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [at.registers.item()], ptx.i32())
        llvm.store(x.registers.item(), address)

    write(ref, ptx.scalar(_flat(ref, index)), ptx.scalar(value))


def meet() -> None:
    """Waits until every thread of the block, of one warpgroup, has come here; what they stored is then seen."""
    ptx.named_sync(ptx.first_free(1), ptx.WARPGROUP)
