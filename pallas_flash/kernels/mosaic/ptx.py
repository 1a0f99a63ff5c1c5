"""What Pallas has no function for, as inline PTX: named barriers, votes, opaque scalars, pins, a product and a
multiply-add that are rounded once.

Named barriers count threads. Ids 0 to the number of warpgroups belong to Mosaic; `first_free` says where ours start.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, math, nvvm, vector

from pallas_flash import compat
from pallas_flash.arithmetic import Positions
from pallas_flash.arrays import Array
from pallas_flash.kernels.mosaic.interpret import interpreted_as
from pallas_flash.kernels.mosaic.types import Flag, Index

__all__ = [
    "SCALAR", "WARPGROUP", "Layout", "any_in_warp", "any_nonfinite_in_warpgroup", "fence_async_proxy", "first_free",
    "i32", "moved", "multiply", "multiply_add", "named_arrive", "named_sync", "opaque", "or_in_warpgroup", "pin",
    "reciprocal", "scalar", "uniform",
]

WARPGROUP = 128
"""Threads of a warpgroup."""

Layout = compat.RegisterLayout

SCALAR = plgpu.Layout.WG_SPLAT(())
"""The layout of one number that all threads hold."""

_FLAG = plgpu.ShapeDtypeStruct((), jnp.bool_, SCALAR)
_WHOLE_WARP = 0xFFFFFFFF


def scalar(x: Positions) -> Array:
    """Returns x as a traced int32 scalar, also where x is a plain number."""
    return jnp.asarray(x, jnp.int32)


def i32() -> ir.Type:
    """MLIR's 32-bit integer type; needs a context, so it is not a constant."""
    return ir.IntegerType.get_signless(32)


def first_free(warpgroups: int) -> int:
    """The first named barrier that Mosaic leaves alone: it uses 0 and one for each warpgroup."""
    return warpgroups + 1


@interpreted_as(lambda kind, number, threads: None)
def _named_barrier(kind: str, number: Index, threads: int) -> None:
    @plgpu.inline_mgpu(arg_types=(SCALAR,))
    def emit(_: mgpu.LaunchContext, number: mgpu.FragmentedArray) -> None:
        mgpu.utils.inline_ptx(f"bar.{kind} $0, {threads};", number.registers.item(), has_side_effects=True,
                              convergent=True)

    emit(jnp.asarray(number, jnp.int32))


def named_sync(number: Index, threads: int) -> None:
    """Waits until `threads` threads, these included, have come to the named barrier. Warps of a warpgroup come
    together.
    """
    _named_barrier("sync", number, threads)


def named_arrive(number: Index, threads: int) -> None:
    """Counts this warpgroup's threads at the named barrier without waiting."""
    _named_barrier("arrive", number, threads)


@interpreted_as(plgpu.commit_smem)
def fence_async_proxy() -> None:
    """Orders this thread's accesses of shared memory before what TMA does there after a barrier that follows: TMA is a
    proxy of its own. `plgpu.commit_smem` is this and a barrier of the warpgroup.
    """
    @plgpu.inline_mgpu(arg_types=(), return_type=None)
    def fence(_: mgpu.LaunchContext) -> None:
        nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta)

    fence()


@interpreted_as(scalar)
def opaque(x: Positions) -> Array:
    """Returns the scalar x as a value of which the compiler knows nothing.

    LLVM moves descriptors that do not change out of a loop and spills them; indexed by an opaque scalar, they are made
    where they are used, in uniform registers.
    """
    @plgpu.inline_mgpu(arg_types=(SCALAR,), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, SCALAR))
    def move(_: mgpu.LaunchContext, x: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        return mgpu.FragmentedArray.splat(moved(x.registers.item()), (), is_signed=True)

    return move(scalar(x))


def moved(x: ir.Value) -> ir.Value:
    """Returns a 32-bit integer as a value that LLVM neither knows nor moves."""
    return llvm.inline_asm(i32(), [x], "mov.u32 $0, $1;", "=r,r", has_side_effects=True)


def _lane_flag(flags: mgpu.FragmentedArray) -> ir.Value:
    """Returns whether any of the flags that this thread holds is set."""
    bits = [vector.extract(register, [], [0]) for register in flags.registers.flat]
    return functools.reduce(arith.ori, bits)


def or_in_warpgroup(flag: ir.Value) -> ir.Value:
    """Returns whether the flag is set in some thread of the warpgroup. It is a barrier of the warpgroup, too.

    ptxas knows that a vote is uniform over a warp. Of a barrier's result it does not: a branch would diverge.
    """
    barrier = mgpu.utils.warpgroup_barrier_idx(sync=False)
    found = mgpu.utils.inline_ptx(
        f"bar.red.or.pred $0, $1, {WARPGROUP}, $2;", barrier, flag,
        result_types=ir.IntegerType.get_signless(1), has_side_effects=True, convergent=True)
    return uniform(found)


def uniform(flag: ir.Value) -> ir.Value:
    """Returns whether the flag is set in some thread of the warp, as what ptxas knows to be uniform over it."""
    return nvvm.vote_sync(mgpu.utils.c(_WHOLE_WARP, i32()), flag, "any")


@interpreted_as(lambda flags, layout: jnp.any(flags))
def any_in_warp(flags: Array, layout: Layout) -> Flag:
    """Returns whether some flag of the warp is set: uniform over the warp, not over the warpgroup.

    A branch on it must not hold a collective of the warpgroup (wgmma and its fence, a barrier): the other warps may not
    take it.
    """
    @plgpu.inline_mgpu(arg_types=(layout,), return_type=_FLAG)
    def vote(_: mgpu.LaunchContext, flags: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        return mgpu.FragmentedArray.splat(uniform(_lane_flag(flags)), (), is_signed=False)

    return vote(flags)


@interpreted_as(lambda x, layout: jnp.logical_not(jnp.all(jnp.isfinite(x))))
def any_nonfinite_in_warpgroup(x: Array, layout: Layout) -> Flag:
    """Returns whether some element of x is not finite (or a sum of a thread's elements overflows), uniform over the
    warpgroup. It is a barrier of the warpgroup, too.
    """
    @plgpu.inline_mgpu(arg_types=(layout,), return_type=_FLAG)
    def vote(_: mgpu.LaunchContext, x: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        values = [vector.extract(register, [], [i]) for register in x.registers.flat
                  for i in range(ir.VectorType(register.type).shape[0])]
        while len(values) > 1:  # a tree: short chains
            pairs = zip(values[::2], values[1::2], strict=False)
            values = [arith.addf(a, b) for a, b in pairs] + (values[-1:] if len(values) % 2 else [])
        largest = mgpu.utils.c(3.4e38, ir.F32Type.get())
        flag = arith.cmpf(arith.CmpFPredicate.UGT, math.absf(values[0]), largest)
        return mgpu.FragmentedArray.splat(or_in_warpgroup(flag), (), is_signed=False)

    return vote(x)


@interpreted_as(lambda a, b, c, layout: a * b + c)
def multiply_add(a: Array, b: float, c: Array, layout: Layout) -> Array:
    """Returns a b + c, rounded once, of float32 arrays of one axis. Of a plain a * b + c the compiler decides."""
    return _each("fma.rn.f32 $0, $1, $2, $3;", layout, b, a, c)


@interpreted_as(lambda a, b, layout: a * b)
def multiply(a: Array, b: float, layout: Layout) -> Array:
    """Returns a b, rounded, of a float32 array of one axis. A compiler may merge a plain a * b with a difference that
    uses it, and then does not round it.
    """
    return _each("mul.rn.f32 $0, $1, $2;", layout, b, a)


@interpreted_as(lambda x, layout: 1 / x)
def reciprocal(x: Array, layout: Layout) -> Array:
    """Returns 1 / x of a float32 array of numbers that are not subnormal, off by at most one unit of the last place:
    one instruction, where a plain 1 / x takes four, and a / x six. 0 of infinity.
    """
    @plgpu.inline_mgpu(arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout))
    def emit(_: mgpu.LaunchContext, x: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        registers = np.empty(x.registers.shape, dtype=object)
        for i, register in enumerate(x.registers.flat):
            kind = ir.VectorType(register.type)
            found = [mgpu.utils.inline_ptx("rcp.approx.ftz.f32 $0, $1;", vector.extract(register, [], [j]),
                                           result_types=ir.F32Type.get()) for j in range(kind.shape[0])]
            registers.reshape(-1)[i] = vector.from_elements(kind, found)
        return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)

    return emit(x)


def _each(instruction: str, layout: Layout, factor: float, a: Array, *others: Array) -> Array:
    """Applies `instruction` to each element of a, the factor, and the elements of the other arrays."""
    @plgpu.inline_mgpu(arg_types=(layout,) * (1 + len(others)),
                       return_type=plgpu.ShapeDtypeStruct(a.shape, a.dtype, layout))
    def emit(_: mgpu.LaunchContext, a: mgpu.FragmentedArray, *others: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        f32 = ir.F32Type.get()
        kind, b = ir.VectorType.get((1,), f32), mgpu.utils.c(factor, f32)
        registers = np.empty(a.registers.shape, dtype=object)
        for i, elements in enumerate(zip(a.registers.flat, *(x.registers.flat for x in others))):
            x, *rest = (vector.extract(register, [], [0]) for register in elements)
            y = mgpu.utils.inline_ptx(instruction, x, b, *rest, result_types=f32)
            registers.reshape(-1)[i] = vector.from_elements(kind, [y])
        return mgpu.FragmentedArray(_registers=registers, _layout=a.layout, _is_signed=None)

    return emit(a, *others)


@interpreted_as(lambda x, layout: None)
def pin(x: Array, layout: Layout) -> None:
    """Keeps what computes x (finite numbers below 1e38) above the next wgmma wait.

    ptxas may otherwise move the wait above it, and the overlap of softmax and product is gone. A branch that is never
    taken and depends on every element ends the basic block; it is uniform over the warp, or every wgmma would be
    serialised (C7520). Should a score be so large that rounding makes an exponential overflow, the branch does no harm.
    """
    @plgpu.inline_mgpu(arg_types=(layout,), return_type=_FLAG)
    def impossible(_: mgpu.LaunchContext, x: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        values = [vector.extract(register, [], [i]) for register in x.registers.flat
                  for i in range(ir.VectorType(register.type).shape[0])]
        huge = mgpu.utils.c(1e38, ir.F32Type.get())
        flag = arith.cmpf(arith.CmpFPredicate.OGT, functools.reduce(arith.addf, values), huge)
        return mgpu.FragmentedArray.splat(uniform(flag), (), is_signed=False)

    @pl.when(impossible(x))
    def _() -> None:
        @plgpu.inline_mgpu()
        def linger(_: mgpu.LaunchContext) -> None:
            mgpu.utils.inline_ptx("nanosleep.u32 1;", has_side_effects=True)

        linger()
