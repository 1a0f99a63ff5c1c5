"""What dispatch calls: a spec's passes with their default schedules, under jit, vmap and shard_map."""

import functools
from collections.abc import Callable

import jax

from pallas_flash.device import Device
from pallas_flash.kernels.hopper import defaults, dropout, launches
from pallas_flash.kernels.mosaic.batching import vmappable
from pallas_flash.kernels.mosaic.call import partitioned
from pallas_flash.kernels.mosaic.launch import Pass
from pallas_flash.spec import AttentionSpec, Gradients, Operands, Results

__all__ = ["backward", "forward"]


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


def forward(spec: AttentionSpec, operands: Operands) -> Results[jax.Array]:
    """out, in the spec's layout and `result_dtype`, and the statistics (`spec.stats_shape`), fp32."""
    return _run_forward(spec, _without_seed(operands), dropout.inputs(spec, operands))


def backward(spec: AttentionSpec, operands: Operands, out: jax.Array, stats: jax.Array, dout: jax.Array,
             dstats: jax.Array) -> Gradients[jax.Array]:
    """Cotangents of q, k and v, in the spec's layout and `result_dtype`."""
    results, cotangents, keys = Results(out, stats), Results(dout, dstats), dropout.inputs(spec, operands)
    return _run_backward(spec, _without_seed(operands), results, cotangents, keys)


def _without_seed(operands: Operands) -> Operands:
    """Those that have batch entries: dropout's keys, made of the seed, have them, too."""
    return operands._replace(dropout_seed=None)


@vmappable
def _run_forward(spec: AttentionSpec, device: Device, operands: Operands,
                 keys: tuple[jax.Array, ...]) -> Results[jax.Array]:
    roles = f"query key key {'row ' * len(keys)}-> query row"
    out, stats = partitioned(_forward_on(device), roles, spec, operands.q, operands.k, operands.v, *keys)
    return Results(out, stats)


@vmappable
def _run_backward(spec: AttentionSpec, device: Device, operands: Operands, results: Results[jax.Array],
                  cotangents: Results[jax.Array], keys: tuple[jax.Array, ...]) -> Gradients[jax.Array]:
    roles = f"query key key query row query row {'row ' * len(keys)}-> query key key"
    arrays = operands.q, operands.k, operands.v, *results, *cotangents, *keys
    dq, dk, dv = partitioned(_backward_on(device), roles, spec, *arrays)
    return Gradients(dq=dq, dk=dk, dv=dv, dbias=None)
