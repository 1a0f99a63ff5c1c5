"""torch tensors into JAX computations and back, through DLPack: layout, copies, order of streams.

Only this file imports both runtimes. A call makes, or finds, a `Plan` for its shapes, strides, dtypes and numbers:
spec, layout and jitted functions. Kernels take both layouts, so the plan picks the one that copies the fewest elements;
a tensor that is dense in it (see `copy_reason`) is shared as it is, any other is copied by torch first.

The GPU keeps the order, and the host never waits: unless torch's current stream is idle, JAX's stream waits for it
before reading the first operand, hence before the kernel; torch's current stream waits for the results. Whatever torch
queues there later, such as reuse of the memory of a dropped operand, comes after the kernel. How JAX sees operands:
views.py. How long results live: lifetime.py. What JAX computes: programs.py.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

from pallas_flash import device, dispatch, forks
from pallas_flash.spec import AttentionSpec, Layout
from torch_bridge import context, lifetime, programs, records, score_names, streams, strides, views
from torch_bridge.arguments import Cotangents, Numbers, Operands, PerArray, Results
from torch_bridge.direct import attention, reasons
from torch_bridge.rules import Rule
from torch_bridge.strides import in_layout, with_strides

__all__ = ["ALIGNMENT", "Plan", "attend", "attend_saving", "backward", "copy_reason", "double_backward", "forward",
           "gradients", "jax_device", "make_plan", "plan_for", "row_anchor", "stats_tensor"]

ALIGNMENT = {"cpu": 64, "cuda": 256}
"""Bytes to which a tensor must be aligned to be shared: XLA's need on a CPU, Mosaic GPU's on a GPU."""

_DTYPES = {
    torch.bfloat16: jnp.dtype(jnp.bfloat16), torch.float16: np.dtype(np.float16), torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64), torch.bool: np.dtype(bool), torch.int32: np.dtype(np.int32),
}
_MAX_PLANS = 4096
_LIKE_QUERY = PerArray(query=True, key=True, value=True, bias=False, score_floats=False)
_COTANGENT_LIKE_QUERY = (True, False)  # of dout and dstats
"""Which arrays have their axes in the order of the layout; the others are as the scores."""


# --- plans -----------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """What a call with given shapes, strides, dtypes and numbers runs."""

    program: programs.Program
    decision: dispatch.Decision
    out_strides: tuple[int, int, int, int]  # of (batch, heads, length, dim)
    grad_strides: PerArray[tuple[int, ...] | None]
    forward: programs.Variants[bool]  # of arrays, by whether stats is needed
    backward: programs.Variants[programs.Given]  # of arrays
    runs: records.Runs  # counted

    @property
    def spec(self) -> AttentionSpec:
        return self.program.spec

    @property
    def device(self) -> jax.Device:
        return self.program.where

    @property
    def layout(self) -> Layout:
        return self.program.spec.layout


_plans: dict[tuple[object, ...], Plan] = {}


def plan_for(operands: Operands, numbers: Numbers) -> Plan:
    """The plan of a call, from a table where it has been seen; where it has not, warns of a fallback."""
    query, key, value, mask, bias, _, *places = operands
    name = (query.shape, query.stride(), key.shape, key.stride(), value.shape, value.stride(), query.dtype,
            query.device, mask if mask is None else mask.shape,
            bias if bias is None else (bias.shape, bias.stride(), bias.dtype),
            *[x if x is None else x.shape for x in places], numbers)
    plan = _plans.get(name)
    if plan is None:
        if len(_plans) >= _MAX_PLANS:
            _plans.clear()
        plan = make_plan(operands, numbers)
        dispatch.warn_of_fallback(plan.decision)
        _plans[name] = plan
    return plan


def make_plan(operands: Operands, numbers: Numbers) -> Plan:
    """A new plan, which says nothing of a fallback: no call need follow."""
    query, value = operands.query, operands.value
    spec, rule = _specified(operands, numbers)
    where = jax_device(query.device)
    decision = dispatch.decide(spec, device.of(where))
    program = programs.Program(spec, rule, decision.implementation.name, where)
    return Plan(program, decision, strides.like_query(query, value.shape[3]),
                PerArray(*(None if x is None else _strides_like(x) for x in operands.differentiable)),
                programs.forward(program), programs.backward(program),
                records.Runs(spec, program.name, decision.reasons, _why_not_directly(operands, numbers, decision)))


def _why_not_directly(operands: Operands, numbers: Numbers, decision: dispatch.Decision) -> tuple[str, ...]:
    """Why a call on a GPU is launched by JAX's runtime, as `explain` says it; nothing of one that only is there."""
    if operands.query.device.type not in attention.DEVICES:
        return ()
    reason = reasons.why_not(operands, numbers) or (
        None if decision.implementation.launches else f"{decision.implementation.name!r} is no list of launches")
    return () if reason is None else (f"not launched directly: {reason}",)


def decide(operands: Operands, numbers: Numbers, where: device.Device | None = None) -> dispatch.Decision:
    """What computes a call, on the device of its tensors; None for that asks JAX, which starts its client there."""
    spec, _ = _specified(operands, numbers)
    return dispatch.decide(spec, where or device.of(jax_device(operands.query.device)))


def _specified(operands: Operands, numbers: Numbers) -> tuple[AttentionSpec, Rule]:
    query, key, value, bias = operands.query, operands.key, operands.value, operands.bias
    layout, rule = strides.layout_of(query, key, value), Rule.of(operands, numbers)
    with _precision(query):
        spec = AttentionSpec.of(
            *(_abstract(in_layout(x, layout)) for x in (query, key, value)), layout=layout, softcap=numbers.softcap,
            scale=numbers.scale, dropout_rate=numbers.dropout_p, deterministic=numbers.deterministic,
            partial=numbers.partial)
        given = {name: _abstract(getattr(operands, name)) for name in rule.given}
        spec = spec.masked(rule.mask(spec, given), None if bias is None else _abstract(bias))
        return (spec if numbers.score is None else spec.scored(score_names.function(numbers.score))), rule


def _strides_like(tensor: torch.Tensor) -> tuple[int, ...]:
    """The strides of a gradient: dense, in the storage order of the tensor."""
    return torch.empty_like(tensor, device="meta").stride()


def _abstract(tensor: torch.Tensor) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(tensor.shape), _DTYPES[tensor.dtype])


def _precision(query: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """64-bit JAX for the time of a float64 call, whatever the process has chosen."""
    return jax.enable_x64(True) if query.dtype == torch.float64 else contextlib.nullcontext()


@functools.cache
def jax_device(device: torch.device) -> jax.Device:
    """The JAX device on which the memory of a torch device lies."""
    platform, index = device.type, device.index or 0
    with context.device_kept():  # this is where JAX starts, if it has not
        try:
            candidates = jax.local_devices(backend=platform)
        except RuntimeError as error:
            raise RuntimeError(f"JAX has no {platform} devices, but a tensor is on {device}: install jax[cuda13], and "
                               f"let JAX_PLATFORMS be unset or name {platform} ({error})") from error
    for candidate in candidates:
        if platform == "cpu" or candidate.local_hardware_id == index:
            return candidate
    raise RuntimeError(f"JAX does not see {device}: let CUDA_VISIBLE_DEVICES name it for both runtimes")


# --- arrays from tensors ---------------------------------------------------------------------------------------------


def copy_reason(tensor: torch.Tensor, layout: Layout) -> str | None:
    """Why a (batch, heads, length, dim) tensor is copied on its way to a kernel, or None if its memory is shared."""
    if tensor.is_neg():
        return "its negative bit is set"
    if not in_layout(tensor, layout).is_contiguous():
        axes = "(batch, length, heads, dim)" if layout == "BLHD" else "(batch, heads, length, dim)"
        return f"strides {tuple(tensor.stride())} of shape {tuple(tensor.shape)} are not dense {axes} storage"
    alignment = ALIGNMENT[tensor.device.type]
    if offset := tensor.data_ptr() % alignment:
        return f"its address is {offset} bytes past a multiple of {alignment}"
    return None


def _shared(layout: Layout, q_like: Sequence[torch.Tensor],
            others: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    """Tensors in the layout (`q_like`) and others as they are, copied where necessary; those that are None left out."""
    alignment = ALIGNMENT["cuda" if q_like[0].is_cuda else "cpu"]
    tensors = [strides.sharable(in_layout(tensor, layout), alignment) for tensor in q_like]
    tensors.extend(strides.sharable(tensor, alignment) for tensor in others if tensor is not None)
    return tensors


def _arrays(tensors: Sequence[torch.Tensor], where: jax.Device) -> list[jax.Array]:
    """JAX arrays of tensors from `_shared`. They own nothing; on a GPU, the first comes after torch's stream."""
    if where.platform == "cpu":
        return [views.new(tensor, where) for tensor in tensors]
    first, *rest = tensors
    return [views.ready(first, where), *(views.of(tensor, where) for tensor in rest)]


def _run(plan: Plan, function: Callable[..., list[jax.Array]], q_like: Sequence[torch.Tensor],
         others: Sequence[torch.Tensor | None], known: Sequence[jax.Array] = (),
         num_kept: int = 0) -> tuple[list[torch.Tensor], list[jax.Array]]:
    """Calls a jitted function with these tensors, and with JAX's own arrays after them.

    Returns its results as tensors, and the last `num_kept` as arrays. torch's stream waits for those too, so whatever
    it does next comes after all reads.
    """
    query, results = q_like[0], None
    tensors = _shared(plan.layout, q_like, others)
    try:
        with _precision(query):  # also for the import: JAX 0.12's would round float64
            results = function(*_arrays(tensors, plan.device), *known)
        if query.is_cpu:
            jax.block_until_ready(results)
        return _tensors(results, query, num_kept)  # `tensors`, copies among them, live until torch's stream waits
    except BaseException as error:
        if query.is_cuda:  # torch's stream does not wait then, and the computation may have begun
            torch.cuda.synchronize(query.device)
        elif not isinstance(error, Exception):  # an interrupt, during which the computation may go on
            _interrupted[id(tensors)] = tensors
            if results is not None:
                jax.block_until_ready(results)
                del _interrupted[id(tensors)]
        raise


_interrupted: dict[int, list[torch.Tensor]] = {}
"""CPU tensors that JAX may still read, by id. They stay where nothing tells when it has: a second interrupt while the
first waits, or one before the results are known."""


def _check_place(query: torch.Tensor) -> None:
    """Raises RuntimeError where JAX cannot compute: in a forked process, and during CUDA graph capture."""
    forks.require_no_fork("scaled_dot_product_attention")
    if query.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("scaled_dot_product_attention through DLPack cannot be captured in a CUDA graph: JAX "
                           "launches its kernels on streams of its own. Keep this call outside the graph; "
                           "torch_bridge.explain says why it does not take the direct path, which can be captured.")


# --- tensors from arrays ---------------------------------------------------------------------------------------------


def _tensors(arrays: list[jax.Array], like: torch.Tensor,
             num_kept: int = 0) -> tuple[list[torch.Tensor], list[jax.Array]]:
    """Tensors of all arrays but the last `num_kept`, and those, for torch's current stream on the device of `like`."""
    count = len(arrays) - num_kept
    if like.is_cpu:
        return [from_dlpack(array.__dlpack__()) for array in arrays[:count]], arrays[count:]
    stream = streams.current(like.device.index or 0)
    tensors = [lifetime.export(array, stream) for array in arrays[:count]]
    kept = arrays[count:]
    for array in kept:
        lifetime.order(array, stream)
    return tensors, kept


# --- what the operators call -----------------------------------------------------------------------------------------


def forward(operands: Operands, numbers: Numbers, needs_stats: bool) -> Results:
    """out (batch, q_heads, q_len, d_v), stored as query is, and what the backward needs of each row: stats
    (batch, q_heads, 2, q_len), or (0,) if not needed.
    """
    query = operands.query
    if not needs_stats:
        return Results(attend(operands, numbers), query.new_empty((0,), dtype=strides.stats_dtype(query)))
    (out, stats), _ = _attend_saving(operands, numbers, num_kept=0)
    return Results(out, stats)


def attend(operands: Operands, numbers: Numbers) -> torch.Tensor:
    """`forward`'s out alone."""
    query, key, value, *others = operands
    _check_place(query)
    plan = plan_for(operands, numbers)
    plan.runs.count("forward")
    (out,), _ = _run(plan, plan.forward[False], (query, key, value), others)
    return with_strides(in_layout(out, plan.layout), plan.out_strides)


def attend_saving(operands: Operands, numbers: Numbers) -> tuple[torch.Tensor, jax.Array]:
    """`forward`'s out, and its stats as an array of JAX for `gradients`."""
    (out,), (stats,) = _attend_saving(operands, numbers, num_kept=1)
    return out, stats


def _attend_saving(operands: Operands, numbers: Numbers, num_kept: int) -> tuple[list[torch.Tensor], list[jax.Array]]:
    query, key, value, *others = operands
    _check_place(query)
    plan = plan_for(operands, numbers)
    plan.runs.count("forward")
    tensors, kept = _run(plan, plan.forward[True], (query, key, value), others, num_kept=num_kept)
    tensors[0] = with_strides(in_layout(tensors[0], plan.layout), plan.out_strides)
    return tensors, kept


def row_anchor(operands: Operands, numbers: Numbers) -> torch.Tensor:
    """What lse of the statistics leaves out of the scores' own, (batch, q_heads, q_len): `AttentionSpec.anchor`."""
    query, key, value, *others = operands
    _check_place(query)
    plan = plan_for(operands, numbers)
    plan.runs.count("row anchor")
    (found,), _ = _run(plan, programs.row_anchor(plan.program), (query, key, value), others)
    return found


def stats_tensor(stats: jax.Array, like: torch.Tensor) -> torch.Tensor:
    """`attend_saving`'s stats as a tensor, on the device of `like`."""
    (tensor,), _ = _tensors([stats], like)
    return tensor


def backward(operands: Operands, numbers: Numbers, results: Results, cotangents: Cotangents,
             needs: PerArray[bool]) -> PerArray[torch.Tensor]:
    """The gradients with the storage order of their tensors; (0,) in place of those not needed.

    Args:
      operands, numbers: the forward's.
      results: what it returned.
      cotangents: those of the results.
      needs: which gradients are needed.
    """
    dout, dstats = cotangents
    given = programs.Given(needs, dout is not None, dstats is not None)
    grads = _gradients(operands, numbers, results.out, (dout, dstats, results.stats), (), given)
    return PerArray(*(operands.query.new_empty((0,)) if grad is None else grad for grad in grads))


def gradients(operands: Operands, numbers: Numbers, results: tuple[torch.Tensor, jax.Array], dout: torch.Tensor,
              needs: PerArray[bool]) -> PerArray[torch.Tensor | None]:
    """`backward` with the results of `attend_saving`; None in place of the gradients that are not needed."""
    out, stats = results
    return _gradients(operands, numbers, out, (dout,), (stats,), programs.Given(needs, True, False))


def _gradients(operands: Operands, numbers: Numbers, out: torch.Tensor, others: Sequence[torch.Tensor | None],
               known: Sequence[jax.Array], given: programs.Given) -> PerArray[torch.Tensor | None]:
    """The gradients that are needed.

    Args:
      operands, numbers, out: the forward's.
      others, known: dout, dstats and stats in this order: tensors, arrays.
      given: which gradients are needed, and which of dout and dstats are there.
    """
    query, key, value, *arrays = operands
    _check_place(query)
    plan = plan_for(operands, numbers)
    plan.runs.count("backward")
    needs = PerArray(*(bool(needed and x is not None)
                       for needed, x in zip(given.needs, operands.differentiable, strict=True)))
    given = given._replace(needs=needs)
    dout, *others = others
    moved = (in_layout(out, plan.layout), None if dout is None else in_layout(dout, plan.layout))
    grads, _ = _run(plan, plan.backward[given], (query, key, value), (*arrays, *moved, *others), known)
    rest = iter(grads)
    return PerArray(*(
        with_strides(in_layout(next(rest), plan.layout) if like_query else next(rest), wanted)
        if needed and wanted is not None else None
        for needed, wanted, like_query in zip(given.needs, plan.grad_strides, _LIKE_QUERY, strict=True)))


def double_backward(operands: Operands, numbers: Numbers, tangents: PerArray[torch.Tensor | None],
                    cotangents: Cotangents) -> tuple[torch.Tensor, ...]:
    """The derivative of `backward`, by JAX through the reference implementation; float64.

    Args:
      operands, numbers: the forward's.
      tangents: cotangents of the gradients; None is zero.
      cotangents: as `backward` had them.

    Returns:
      Gradients of the arrays and of the cotangents, in this order; (0,) for those that are None.
    """
    query, key, value, *arrays = operands
    _check_place(query)
    plan = plan_for(operands, numbers)
    records.count("double backward", "reference", str(plan.spec), ())
    present = tuple(x is not None for x in (*tangents, *cotangents))
    inputs = (*operands.differentiable, *cotangents)
    layouts = [plan.layout if like_query else "BHLD" for like_query in (*_LIKE_QUERY, *_COTANGENT_LIKE_QUERY)]
    moved = [None if x is None else in_layout(x, layout)
             for x, layout in zip((*tangents, *cotangents), layouts, strict=True)]
    derivative = programs.double_backward(plan.program)[present]
    results, _ = _run(plan, derivative, (query, key, value), (*arrays, *moved))
    rest = iter(results)
    return tuple(query.new_empty((0,)) if x is None else _like(next(rest), x, layout)
                 for x, layout in zip(inputs, layouts, strict=True))


def _like(result: torch.Tensor, target: torch.Tensor, layout: Layout) -> torch.Tensor:
    return with_strides(in_layout(result, layout), _strides_like(target))
