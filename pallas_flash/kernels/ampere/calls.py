"""What dispatch calls: a spec's passes with their default schedules, under jit, vmap and shard_map."""

import functools
from collections.abc import Callable

import jax

from pallas_flash.device import Device
from pallas_flash.kernels.ampere import defaults, launches
from pallas_flash.kernels.ampere.schedule import BackwardSchedule, ForwardSchedule
from pallas_flash.kernels.mosaic.batching import vmappable
from pallas_flash.kernels.mosaic.call import Computation, partitioned
from pallas_flash.spec import AttentionSpec, Gradients, Operands, Results

__all__ = ["backward", "forward"]


@functools.lru_cache(maxsize=1024)
def _forward(spec: AttentionSpec, schedule: ForwardSchedule) -> Computation:
    """The same object for the same spec and schedule."""
    return launches.forward(spec, schedule)


@functools.lru_cache(maxsize=1024)
def _backward(spec: AttentionSpec, schedule: BackwardSchedule) -> Computation:
    """The same object for the same spec and schedule."""
    return launches.backward(spec, schedule)


@functools.lru_cache(maxsize=8)
def _forward_on(device: Device) -> Callable[[AttentionSpec], Computation]:
    """The forward of each spec, and the same object for the same device."""
    return lambda spec: _forward(spec, defaults.default_forward(spec, device))


@functools.lru_cache(maxsize=8)
def _backward_on(device: Device) -> Callable[[AttentionSpec], Computation]:
    """The backward of each spec, and the same object for the same device."""
    return lambda spec: _backward(spec, defaults.default_backward(spec, device))


def forward(spec: AttentionSpec, operands: Operands) -> Results[jax.Array]:
    """out, in the spec's layout and `result_dtype`, and the statistics (`spec.stats_shape`), fp32."""
    return _run_forward(spec, operands)


def backward(spec: AttentionSpec, operands: Operands, out: jax.Array, stats: jax.Array, dout: jax.Array,
             dstats: jax.Array) -> Gradients[jax.Array]:
    """Cotangents of q, k and v, in the spec's layout and `result_dtype`."""
    return _run_backward(spec, operands, Results(out, stats), Results(dout, dstats))


@vmappable
def _run_forward(spec: AttentionSpec, device: Device, operands: Operands) -> Results[jax.Array]:
    arrays = operands.q, operands.k, operands.v
    out, stats = partitioned(_forward_on(device), "query key key -> query row", spec, *arrays)
    return Results(out, stats)


@vmappable
def _run_backward(spec: AttentionSpec, device: Device, operands: Operands, results: Results[jax.Array],
                  cotangents: Results[jax.Array]) -> Gradients[jax.Array]:
    roles = "query key key query row query row -> query key key"
    arrays = operands.q, operands.k, operands.v, *results, *cotangents
    dq, dk, dv = partitioned(_backward_on(device), roles, spec, *arrays)
    return Gradients(dq=dq, dk=dk, dv=dv, dbias=None, dscore=())
