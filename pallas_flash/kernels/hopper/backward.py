"""The backward on Hopper: statistics, then one fused kernel and dq from its sums, or two kernels."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_flash.kernels.hopper import backward_dq, backward_kv, backward_small, backward_split
from pallas_flash.kernels.hopper import backward_schedule as schedules
from pallas_flash.kernels.hopper.backward_schedule import BackwardSchedule, KvSchedule, SplitSchedule
from pallas_flash.spec import AttentionSpec, Gradients, Operands

__all__ = ["backward"]


def backward(spec: AttentionSpec, operands: Operands, out: Any, lse: Any, dout: Any, dlse: Any,
             schedule: BackwardSchedule | None = None) -> Gradients:
    """Cotangents of q, k and v.

    Args:
      out, dout: the forward's result and its cotangent, in the spec's layout.
      lse, dlse: (batch, q_heads, q_len) float32.
    """
    schedule = schedule or schedules.default_backward(spec)
    stats = backward_small.statistics(spec, schedule.padded_q(spec), out, lse, dout, dlse)
    arrays = operands.q, operands.k, operands.v, dout, stats
    if schedule.fused:
        return _fused(spec, schedule, arrays)
    kernel = backward_split if isinstance(schedule.kv, SplitSchedule) else backward_kv
    launch: Any = kernel.launch
    dk, dv = launch(spec, schedule.kv)(*arrays)
    assert schedule.dq is not None
    return Gradients(backward_dq.launch(spec, schedule.dq)(*arrays), dk, dv)


def _fused(spec: AttentionSpec, schedule: BackwardSchedule, arrays: tuple[Any, ...]) -> Gradients:
    assert isinstance(schedule.kv, KvSchedule)
    sums = jax.new_ref(jnp.zeros(schedules.dq_acc_shape(spec, schedule.kv), jnp.float32))
    dk, dv = backward_kv.launch(spec, schedule.kv)(*arrays, sums)
    return Gradients(backward_small.launch_finish(spec, schedule.kv)(sums[...]), dk, dv)
