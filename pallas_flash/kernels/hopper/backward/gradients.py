"""The backward on Hopper: statistics, then one fused kernel and dq from its sums, or two kernels."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_flash.kernels.hopper import defaults, memory, work
from pallas_flash.kernels.hopper.backward import dq as dq_kernel
from pallas_flash.kernels.hopper.backward import kv, kv_split, prepare
from pallas_flash.kernels.hopper.backward.finish import launch_finish
from pallas_flash.kernels.hopper.schedule import BackwardSchedule, KvSchedule, SplitSchedule
from pallas_flash.spec import AttentionSpec, Gradients, Operands

__all__ = ["backward"]


def backward(spec: AttentionSpec, operands: Operands, out: jax.Array, stats: jax.Array, dout: jax.Array,
             dstats: jax.Array, schedule: BackwardSchedule | None = None) -> Gradients[jax.Array]:
    """Cotangents of q, k and v.

    Args:
      out, dout: the forward's result and its cotangent, in the spec's layout.
      stats, dstats: the forward's statistics and their cotangent, of which only that of lse counts
        (`spec.stats_shape`), float32.
    """
    assert stats.shape == dstats.shape == spec.stats_shape, (stats.shape, dstats.shape, spec.stats_shape)
    schedule = schedule or defaults.default_backward(spec)
    q = operands.q
    if work.may_have_idle_queries(spec):
        q, dout = (_without_idle_queries(spec, x, stats[:, :, 0]) for x in (q, dout))
    stats, *sums = prepare.launch_prepare(spec, schedule)(out, dout, stats, dstats)
    arrays = q, operands.k, operands.v, dout, stats
    if schedule.fused:
        return _fused(spec, schedule, arrays, sums)
    kernel = kv_split if isinstance(schedule.kv, SplitSchedule) else kv
    launch: Any = kernel.launch
    dk, dv = launch(spec, schedule.kv)(*arrays)
    assert schedule.dq is not None
    return Gradients(dq=dq_kernel.launch(spec, schedule.dq)(*arrays), dk=dk, dv=dv, dbias=None)


def _fused(spec: AttentionSpec, schedule: BackwardSchedule, arrays: tuple[Any, ...],
           zeros: list[Any]) -> Gradients[jax.Array]:
    assert isinstance(schedule.kv, KvSchedule)
    launch, finish = kv.launch(spec, schedule.kv), launch_finish(spec, schedule.kv)
    if schedule.kv.ordered:
        turns = jax.new_ref(jnp.zeros(memory.dq_acc_shape(spec, schedule.kv)[:3], jnp.int32))
        dk, dv, sums = launch(*arrays, turns)
        return Gradients(dq=finish(sums), dk=dk, dv=dv, dbias=None)
    (sums,) = zeros
    ref = jax.new_ref(sums)
    dk, dv = launch(*arrays, ref)
    return Gradients(dq=finish(ref[...]), dk=dk, dv=dv, dbias=None)


def _without_idle_queries(spec: AttentionSpec, x: Any, lse: Any) -> Any:
    """x, q or dout, with zeros where a query attends to nothing: whatever is there must not meet a weight of 0."""
    idle = lse == -jnp.inf
    return jnp.where((idle if spec.layout == "BHLD" else idle.swapaxes(1, 2))[..., None], jnp.zeros((), x.dtype), x)
