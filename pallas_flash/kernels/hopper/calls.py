"""What dispatch calls: a spec's passes with their default schedules, under jit, vmap and shard_map."""

import functools
from collections.abc import Callable

import jax

from pallas_flash.device import Device
from pallas_flash.kernels.hopper import defaults, launches
from pallas_flash.kernels.mosaic.batching import vmappable
from pallas_flash.kernels.mosaic.call import partitioned
from pallas_flash.kernels.mosaic.launch import Pass
from pallas_flash.spec import AttentionSpec, Gradients, Operands, Results

__all__ = ["backward", "forward", "passes"]


_forward, _backward = (functools.lru_cache(maxsize=1024)(launch) for launch in (launches.forward, launches.backward))
"""The same object for the same spec and schedule."""


@functools.lru_cache(maxsize=8)
def _forward_on(device: Device) -> Callable[[AttentionSpec], Pass]:
    """The forward of each spec, and the same object for the same device."""
    return lambda spec: _forward(spec, defaults.default_forward(spec, device))


@functools.lru_cache(maxsize=8)
def _backward_on(device: Device) -> Callable[[AttentionSpec], Pass]:
    """The backward of each spec, and the same object for the same device."""
    return lambda spec: _backward(spec, defaults.default_backward(spec, device))


def passes(spec: AttentionSpec, device: Device) -> tuple[Pass, Pass]:
    """The forward and the backward as lists of launches, which another runtime than JAX can run."""
    return _forward_on(device)(spec), _backward_on(device)(spec)


@vmappable
def forward(spec: AttentionSpec, device: Device, operands: Operands) -> Results[jax.Array]:
    """out, in the spec's layout and `result_dtype`, and the statistics (`spec.stats_shape`), fp32."""
    roles = "query key key -> query row"
    out, stats = partitioned(_forward_on(device), roles, spec, operands.q, operands.k, operands.v)
    return Results(out, stats)


@vmappable
def backward(spec: AttentionSpec, device: Device, operands: Operands, out: jax.Array, stats: jax.Array,
             dout: jax.Array, dstats: jax.Array) -> Gradients[jax.Array]:
    """Cotangents of q, k and v, in the spec's layout and `result_dtype`."""
    roles = "query key key query row query row -> query key key"
    arrays = operands.q, operands.k, operands.v, out, stats, dout, dstats
    dq, dk, dv = partitioned(_backward_on(device), roles, spec, *arrays)
    return Gradients(dq=dq, dk=dk, dv=dv, dbias=None)
