"""What dispatch calls: a spec's passes with their default schedules, under jit, vmap and shard_map."""

import functools

import jax

from pallas_flash.device import Device
from pallas_flash.kernels.hopper import defaults, launches
from pallas_flash.kernels.mosaic.batching import vmappable
from pallas_flash.kernels.mosaic.call import partitioned
from pallas_flash.kernels.mosaic.launch import Pass
from pallas_flash.spec import AttentionSpec, Gradients, Operands, Results

__all__ = ["backward", "forward"]


@functools.lru_cache(maxsize=1024)
def _forward_pass(device: Device, spec: AttentionSpec) -> Pass:
    return launches.forward(spec, defaults.default_forward(spec, device.num_sms))


@functools.lru_cache(maxsize=1024)
def _backward_pass(device: Device, spec: AttentionSpec) -> Pass:
    del device
    return launches.backward(spec, defaults.default_backward(spec))


@functools.lru_cache(maxsize=8)
def _passes_on(device: Device) -> tuple[functools.partial[Pass], functools.partial[Pass]]:
    return functools.partial(_forward_pass, device), functools.partial(_backward_pass, device)


@vmappable
def forward(spec: AttentionSpec, device: Device, operands: Operands) -> Results[jax.Array]:
    """out, in the spec's layout and dtype, and the statistics (`spec.stats_shape`), fp32."""
    roles = "query key key -> query row"
    out, stats = partitioned(_passes_on(device)[0], roles, spec, operands.q, operands.k, operands.v)
    return Results(out, stats)


@vmappable
def backward(spec: AttentionSpec, device: Device, operands: Operands, out: jax.Array, stats: jax.Array,
             dout: jax.Array, dstats: jax.Array) -> Gradients[jax.Array]:
    """Cotangents of q, k and v, in the spec's layout and dtype."""
    roles = "query key key query row query row -> query key key"
    arrays = operands.q, operands.k, operands.v, out, stats, dout, dstats
    dq, dk, dv = partitioned(_passes_on(device)[1], roles, spec, *arrays)
    return Gradients(dq=dq, dk=dk, dv=dv, dbias=None)
