"""A kernel call as one primitive, so that it runs inside `shard_map`.

Mosaic kernels refuse references that vary over manual mesh axes, and inside `shard_map` every operand does. A primitive
of our own carries that through: outside it the results vary like the operands, inside it the kernel is lowered without
the marks. It computes on each device's own shard, so nothing is lost.

Under `jit` with automatic axes XLA cannot look into it and would gather sharded operands: use `shard_map` there.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import mlir

__all__ = ["sealed"]

_kernel_p = Primitive("pallas_flash_kernel")
_kernel_p.multiple_results = True


def sealed(function: Callable[..., tuple[Any, ...]], *arrays: Any) -> tuple[Any, ...]:
    """function(*arrays), lowered as it is outside of `shard_map`.

    `function` must be the same object for the same computation: it is part of what JAX caches by.
    """
    return tuple(_kernel_p.bind(*arrays, function=function))


def _without_axes(aval: Any) -> Any:
    return jax.core.ShapedArray(aval.shape, aval.dtype)


@_kernel_p.def_abstract_eval
def _abstract(*avals: Any, function: Callable[..., Any]) -> list[Any]:
    results = jax.eval_shape(function, *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals))
    return [avals[0].update(shape=r.shape, dtype=r.dtype) for r in results]


def _lower(ctx: Any, *args: Any, function: Callable[..., Any]) -> Any:
    plain = ctx.replace(avals_in=[_without_axes(aval) for aval in ctx.avals_in],
                        avals_out=[_without_axes(aval) for aval in ctx.avals_out])
    return mlir.lower_fun(function, multiple_results=True)(plain, *args)


mlir.register_lowering(_kernel_p, _lower)
_kernel_p.def_impl(lambda *args, **params: jax.jit(functools.partial(_kernel_p.bind, **params))(*args))
