"""What dispatch calls: a spec's kernels with their default schedules, under jit, vmap and shard_map."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_flash import device
from pallas_flash.kernels.hopper import defaults, work
from pallas_flash.kernels.hopper.backward import gradients as backward_kernels
from pallas_flash.kernels.hopper.forward import kernel as forward_kernel
from pallas_flash.kernels.mosaic.batching import vmappable
from pallas_flash.kernels.mosaic.call import partitioned
from pallas_flash.spec import AttentionSpec, Gradients, Operands, Results

__all__ = ["backward", "forward"]


@functools.lru_cache(maxsize=8)
def _forward_on(num_sms: int) -> Any:
    """The forward for a device, chosen when a call is traced, and the same object for the same device."""
    def run(spec: AttentionSpec, q: Any, k: Any, v: Any) -> tuple[Any, ...]:
        schedule = defaults.default_forward(spec, num_sms)
        table = jnp.asarray(work.forward_table(spec, schedule))
        return forward_kernel.launch(spec, schedule)(q, k, v, table)
    return run


@vmappable
def forward(spec: AttentionSpec, operands: Operands) -> Results[jax.Array]:
    """out, in the spec's layout and dtype, and the statistics (`spec.stats_shape`), fp32."""
    run = _forward_on(device.current().num_sms)
    out, stats = partitioned(run, "query key key -> query row", spec, operands.q, operands.k, operands.v)
    return Results(out, stats)


@functools.partial(jax.jit, static_argnums=0)
def _backward(spec: AttentionSpec, q: jax.Array, k: jax.Array, v: jax.Array,
              *saved: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    operands = Operands(q=q, k=k, v=v, bias=None, mask=spec.mask, dropout_seed=None)
    out, stats, dout, dstats = saved
    gradients = backward_kernels.backward(spec, operands, out, stats, dout, dstats)
    return gradients.dq, gradients.dk, gradients.dv


@vmappable
def backward(spec: AttentionSpec, operands: Operands, out: jax.Array, stats: jax.Array, dout: jax.Array,
             dstats: jax.Array) -> Gradients[jax.Array]:
    """Cotangents of q, k and v, in the spec's layout and dtype."""
    roles = "query key key query row query row -> query key key"
    arrays = operands.q, operands.k, operands.v, out, stats, dout, dstats
    dq, dk, dv = partitioned(_backward, roles, spec, *arrays)
    return Gradients(dq=dq, dk=dk, dv=dv, dbias=None)
