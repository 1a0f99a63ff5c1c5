"""What dispatch calls: a spec's kernels with their default schedules, under jit, vmap and shard_map."""

import functools
from typing import Any

import jax.numpy as jnp

from pallas_flash import device
from pallas_flash.kernels.hopper import forward as forward_kernel
from pallas_flash.kernels.hopper import schedule as schedules
from pallas_flash.kernels.hopper.batching import vmappable
from pallas_flash.kernels.hopper.sealing import sealed
from pallas_flash.spec import AttentionSpec, Operands

__all__ = ["forward"]


@functools.lru_cache(maxsize=1024)
def _launch_forward(spec: AttentionSpec, schedule: schedules.ForwardSchedule) -> Any:
    return forward_kernel.launch(spec, schedule)


@vmappable
def forward(spec: AttentionSpec, operands: Operands) -> tuple[Any, Any]:
    """out, in the spec's layout and dtype, and lse (batch, q_heads, q_len), fp32."""
    schedule = schedules.default_forward(spec, device.current().num_sms)
    table = jnp.asarray(schedules.forward_table(spec, schedule))
    return sealed(_launch_forward(spec, schedule), operands.q, operands.k, operands.v, table)
