"""Sums over many scalars by the 32 lanes of a warp, a scalar each.

In a kernel a scalar is one number in each thread, the same one in all. Here they differ for a moment: each lane
computes the function at an index of its own, by the same instructions, and what they find together is the same in all
again. The function may load numbers and compute with them; it must not branch, and must not have effects.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, nvvm

from pallas_flash.arrays import Array
from pallas_flash.kernels.mosaic import ptx
from pallas_flash.kernels.mosaic.interpret import interpreted_as
from pallas_flash.kernels.mosaic.types import Index

__all__ = ["LANES", "find", "total"]

LANES = 32

Count = Callable[[Array], Array]
"""From an index to a number, both int32; not negative."""

_INT = plgpu.ShapeDtypeStruct((), jnp.int32, ptx.SCALAR)


def _const(value: int) -> ir.Value:
    return mgpu.utils.c(value, ptx.i32())


def _whole_warp() -> ir.Value:
    return _const(-1)


def _lane() -> Array:
    """This thread's lane."""
    @plgpu.inline_mgpu(return_type=_INT)
    def lane(_: mgpu.LaunchContext) -> mgpu.FragmentedArray:
        own = arith.remui(ptx.moved(mgpu.utils.thread_idx()), _const(LANES))
        return mgpu.FragmentedArray.splat(own, (), is_signed=True)

    return lane()


def _of_lane(count: Count, first: Index, stop: int) -> Array:
    """count(first + lane), 0 from `stop` on."""
    index = first + _lane()
    return jnp.where(index < stop, count(jnp.minimum(index, stop - 1)), 0)


def _total_plain(count: Count, first: Index, stop: int) -> Array:
    last = jnp.minimum(ptx.scalar(first) + LANES, stop)
    return lax.fori_loop(ptx.scalar(first), last, lambda i, sum_: sum_ + count(i), jnp.int32(0))


@interpreted_as(_total_plain)
def total(count: Count, first: Index, stop: int) -> Array:
    """The sum of count(i) over the 32 indices from `first` on that lie below `stop`."""
    @plgpu.inline_mgpu(arg_types=(ptx.SCALAR,), return_type=_INT)
    def add(_: mgpu.LaunchContext, x: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        found = nvvm.redux_sync(x.registers.item(), nvvm.ReductionKind.ADD, _whole_warp())
        return mgpu.FragmentedArray.splat(found, (), is_signed=True)

    return add(_of_lane(count, first, stop))


def _find_plain(count: Count, first: Index, stop: int, place: Index) -> tuple[Array, Array]:
    def pass_over(i: Array, found: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        index, before, sum_ = found
        sum_ = sum_ + count(i)
        over = sum_ <= place
        return jnp.where(over, i + 1, index), jnp.where(over, sum_, before), sum_

    last, zero = jnp.minimum(ptx.scalar(first) + LANES, stop), jnp.int32(0)
    index, before, _ = lax.fori_loop(ptx.scalar(first), last, pass_over, (ptx.scalar(first), zero, zero))
    return index, before


@interpreted_as(_find_plain)
def find(count: Count, first: Index, stop: int, place: Index) -> tuple[Array, Array]:
    """Which of the 32 indices from `first` on (below `stop`) a place lies in, if index i takes count(i) places and the
    first one begins at 0; and where that index begins. The place must lie in one of them.
    """
    @plgpu.inline_mgpu(arg_types=(ptx.SCALAR, ptx.SCALAR), return_type=(_INT, _INT))
    def search(_: mgpu.LaunchContext, x: mgpu.FragmentedArray,
               place: mgpu.FragmentedArray) -> tuple[mgpu.FragmentedArray, mgpu.FragmentedArray]:
        own, at = x.registers.item(), place.registers.item()
        lane = arith.remui(ptx.moved(mgpu.utils.thread_idx()), _const(LANES))
        sum_ = own
        for distance in (1, 2, 4, 8, 16):
            other = nvvm.shfl_sync(_whole_warp(), sum_, _const(distance), _const(0), nvvm.ShflKind.up)
            has_other = arith.cmpi(arith.CmpIPredicate.uge, lane, _const(distance))
            sum_ = arith.addi(sum_, arith.select(has_other, other, _const(0)))
        is_over = arith.extui(ptx.i32(), arith.cmpi(arith.CmpIPredicate.sle, sum_, at))
        index = nvvm.redux_sync(is_over, nvvm.ReductionKind.ADD, _whole_warp())
        before = arith.select(arith.trunci(ir.IntegerType.get_signless(1), is_over), sum_, _const(0))
        before = nvvm.redux_sync(before, nvvm.ReductionKind.MAX, _whole_warp())
        splat = lambda x: mgpu.FragmentedArray.splat(x, (), is_signed=True)
        return splat(index), splat(before)

    index, before = search(_of_lane(count, first, stop), ptx.scalar(place))
    return first + index, before
