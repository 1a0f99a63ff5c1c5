"""torch tensors into JAX computations and back, through DLPack: layout, copies, order of streams.

This file alone imports both runtimes. A call makes, or finds, a `Plan` for its shapes, strides, dtypes and numbers:
spec, layout and a jitted function. Kernels take both layouts, so the plan picks the one in which the fewest elements
are copied; a tensor that is dense in it (see `copy_reason`) is handed over as it is, any other is copied by torch
first.

Order on a GPU, without waiting on the host: unless torch's current stream is at rest, JAX's stream waits for it before
it reads the first operand, hence before the kernel; torch's current stream waits for the results. Whatever torch queues
there later, such as the reuse of the memory of an operand that was dropped, comes after the kernel. What JAX sees of
operands: views.py. How long results live: lifetime.py.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.utils.dlpack import from_dlpack, to_dlpack

from pallas_flash import autodiff, compat, device, dispatch, forks, masks
from pallas_flash.spec import AttentionSpec, Layout, Operands, Results
from torch_bridge import context, lifetime, streams, strides, views

__all__ = ["ALIGNMENT", "Plan", "attend", "attend_saving", "backward", "copy_reason", "double_backward", "forward",
           "gradients", "jax_device", "plan_for", "stats_tensor"]

ALIGNMENT = {"cpu": 64, "cuda": 256}
"""Bytes to which a tensor must be aligned to be shared: XLA's need on a CPU, Mosaic GPU's on a GPU."""

_DTYPES = {
    torch.bfloat16: jnp.dtype(jnp.bfloat16), torch.float16: np.dtype(np.float16), torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64), torch.bool: np.dtype(bool), torch.int32: np.dtype(np.int32),
}
_MAX_PLANS = 4096


# --- plans -----------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """What a call with given shapes, strides, dtypes and numbers runs."""

    spec: AttentionSpec
    decision: dispatch.Decision
    device: jax.Device
    out_strides: tuple[int, int, int, int]  # of (batch, heads, length, dim)
    grad_strides: tuple[tuple[int, ...] | None, ...]  # of dq, dk, dv, dbias
    forward: "_Variants"  # of arrays, by whether stats is needed
    backward: "_Variants"  # of arrays, by which gradients are needed and which cotangents given

    @property
    def layout(self) -> Layout:
        return self.spec.layout


Problem = Sequence[Any]
"""query, key, value (batch, heads, length, dim); mask, bias (each axis 1 or full) or None; seed (2,) int32 or None."""

Numbers = tuple[int | None, float | None, float, bool]
"""causal_offset, scale, dropout_p, deterministic."""

_plans: dict[tuple, Plan] = {}


def plan_for(problem: Problem, numbers: Numbers) -> Plan:
    """The plan of a call, from a table where it has been seen."""
    query, key, value, mask, bias, _ = problem
    name = (query.shape, query.stride(), key.shape, key.stride(), value.shape, value.stride(), query.dtype,
            query.device, mask if mask is None else mask.shape,
            bias if bias is None else (bias.shape, bias.stride(), bias.dtype),
            numbers)
    plan = _plans.get(name)
    if plan is None:
        if len(_plans) >= _MAX_PLANS:
            _plans.clear()
        plan = _plans[name] = _make_plan(problem, numbers)
    return plan


def _make_plan(problem: Problem, numbers: Numbers) -> Plan:
    query, key, value, mask, bias, _ = problem
    causal_offset, scale, dropout_p, deterministic = numbers
    layout = _layout(query, key, value)
    rule: masks.Mask = masks.Full() if causal_offset is None else masks.Causal(int(causal_offset))
    if mask is not None:
        rule = rule & masks.Dense(_abstract(mask))
    with _precision(query):
        spec = AttentionSpec.of(
            *(_abstract(_in_layout(x, layout)) for x in (query, key, value)), layout=layout, mask=rule,
            bias=None if bias is None else _abstract(bias), scale=scale, dropout_rate=dropout_p,
            deterministic=deterministic)
    where = jax_device(query.device)
    decision = dispatch.decide(spec, device.of(where))
    name = decision.implementation.name
    return Plan(spec, decision, where, strides.like_query(query, value.shape[3]),
                tuple(None if x is None else _strides_like(x) for x in (query, key, value, bias)),
                _jitted_forward(spec, name, where), _jitted_backward(spec, name, where))


def _layout(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Layout:
    """The layout in which the fewest elements are copied, the result included; among equals, the query's."""
    order: tuple[Layout, Layout] = ("BLHD", "BHLD") if strides.is_heads_inside(query) else ("BHLD", "BLHD")
    copied = [sum(x.numel() for x in (query, query, key, value) if not _in_layout(x, layout).is_contiguous())
              for layout in order]
    return order[0] if copied[0] <= copied[1] else order[1]


def _strides_like(tensor: torch.Tensor) -> tuple[int, ...]:
    """The strides of a gradient: dense, in the storage order of the tensor."""
    return torch.empty_like(tensor, device="meta").stride()


def _in_layout(tensor: torch.Tensor, layout: Layout) -> torch.Tensor:
    """A view of (batch, heads, length, dim) with the axes in the order of the layout; and back."""
    return tensor if layout == "BHLD" else tensor.transpose(1, 2)


def _abstract(tensor: torch.Tensor) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(tensor.shape), _DTYPES[tensor.dtype])


def _precision(query: torch.Tensor) -> Any:
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


# --- the jitted functions: flat arrays in, flat arrays out -----------------------------------------------------------
# Each is traced once for a spec. keep_unused: the first operand may carry the wait for torch's stream, so it stays.


def _operands(spec: AttentionSpec, arrays: Sequence[Any]) -> tuple[Operands, Sequence[Any]]:
    """The operands at the front of flat arrays (see `_shared`), and the arrays after them."""
    (q, k, v), rest = arrays[:3], list(arrays[3:])
    rule, bias, seed = spec.mask, None, None
    if spec.mask.has_arrays:
        attend = rest.pop(0)
        rule = jax.tree.map(lambda _: attend, spec.mask)
    if spec.bias is not None:
        bias = rest.pop(0)
    if spec.dropout_rate:
        seed = jax.lax.bitcast_convert_type(rest.pop(0), jnp.uint32)
    return Operands(q, k, v, bias, rule, seed), rest


class _Variants(dict[Any, Callable[..., Any]]):
    """Jitted functions by what is needed of them, each made when it is first asked for."""

    def __init__(self, function: Callable[..., Any], where: jax.Device) -> None:
        self._function, self._where = function, where

    def __missing__(self, needs: Any) -> Callable[..., Any]:
        def on_device(*arrays: Any) -> Any:
            with jax.default_device(self._where):  # while tracing: what kernels ask about "the" device
                results = self._function(needs, *arrays)
            assert not {*map(id, results)} & {*map(id, arrays)}, "an operand as a result would be memory nobody holds"
            return results
        self[needs] = jax.jit(on_device, keep_unused=True)
        return self[needs]


@functools.lru_cache(maxsize=_MAX_PLANS)
def _jitted_forward(spec: AttentionSpec, name: str, where: jax.Device) -> _Variants:
    def attention(needs_stats: bool, *arrays: Any) -> Any:
        out, stats = autodiff.forward(spec, name, _operands(spec, arrays)[0])
        return (out, stats) if needs_stats else (out,)
    return _Variants(attention, where)


@functools.lru_cache(maxsize=_MAX_PLANS)
def _jitted_backward(spec: AttentionSpec, name: str, where: jax.Device) -> _Variants:
    def gradients(needs: tuple[bool, ...], *arrays: Any) -> Any:
        operands, (out, *cotangents, stats) = _operands(spec, arrays)
        dout, dstats = _cotangents(cotangents, needs[4:], out, stats)
        grads = autodiff.backward(spec, name, operands, Results(out, stats), Results(dout, dstats))
        return tuple(grad for grad, needed in zip(grads, needs[:4], strict=True) if needed)
    return _Variants(gradients, where)


def _cotangents(given: Sequence[Any], present: Sequence[bool], out: Any, stats: Any) -> list[Any]:
    rest = iter(given)
    return [next(rest) if there else jnp.zeros_like(like) for there, like in zip(present, (out, stats), strict=True)]


# --- arrays from tensors ---------------------------------------------------------------------------------------------


class _OnCpu:
    """A CPU tensor as DLPack's protocol wants it; unlike `torch.Tensor.__dlpack__` also if it requires grad."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __dlpack__(self, **_: Any) -> Any:
        return to_dlpack(self.tensor)


def _sharable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself if its memory can be shared as it is, or else a copy."""
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    if not tensor.is_contiguous():
        return tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT["cuda" if tensor.is_cuda else "cpu"] else tensor


def copy_reason(tensor: torch.Tensor, layout: Layout) -> str | None:
    """Why a (batch, heads, length, dim) tensor is copied on its way to JAX, or None if its memory is shared."""
    if tensor.is_neg():
        return "its negative bit is set"
    if not _in_layout(tensor, layout).is_contiguous():
        axes = "(batch, length, heads, dim)" if layout == "BLHD" else "(batch, heads, length, dim)"
        return f"strides {tuple(tensor.stride())} of shape {tuple(tensor.shape)} are not dense {axes} storage"
    alignment = ALIGNMENT[tensor.device.type]
    if offset := tensor.data_ptr() % alignment:
        return f"its address is {offset} bytes past a multiple of {alignment}"
    return None


def _shared(layout: Layout, q_like: Sequence[torch.Tensor],
            others: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    """Tensors in the layout (`q_like`) and others as they are, copied where necessary; those that are None left out."""
    tensors = [_sharable(_in_layout(tensor, layout)) for tensor in q_like]
    tensors.extend(_sharable(tensor) for tensor in others if tensor is not None)
    return tensors


def _arrays(tensors: Sequence[torch.Tensor], where: jax.Device) -> list[jax.Array]:
    """JAX arrays of tensors from `_shared`. On a GPU they own nothing, and the first comes after torch's stream."""
    if where.platform == "cpu":
        return [compat.from_dlpack(_OnCpu(tensor), where) for tensor in tensors]
    first, *rest = tensors
    return [views.ready(first, where), *(views.of(tensor, where) for tensor in rest)]


def _run(plan: Plan, function: Callable[..., Any], q_like: Sequence[torch.Tensor],
         others: Sequence[torch.Tensor | None], known: Sequence[jax.Array] = (), num_kept: int = 0) -> list[Any]:
    """The results of a jitted function of these tensors, and of JAX's own arrays after them.

    The last `num_kept` results stay arrays. torch's stream waits for them as well: when it may go on, everything has
    been read.
    """
    query = q_like[0]
    tensors = _shared(plan.layout, q_like, others)
    try:
        with _precision(query):  # also for the import: JAX 0.12's would round float64
            results = function(*_arrays(tensors, plan.device), *known)
        return _tensors(results, query, num_kept)  # `tensors`, copies among them, live until torch's stream waits
    except BaseException:
        if query.is_cuda:  # torch's stream does not wait then, and the computation may have begun
            torch.cuda.synchronize(query.device)
        raise


def _check_place(query: torch.Tensor) -> None:
    """Raises RuntimeError where JAX cannot compute: in a forked process, and inside a capture."""
    forks.require_no_fork("scaled_dot_product_attention")
    if query.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("scaled_dot_product_attention through DLPack cannot be captured in a CUDA graph: JAX "
                           "launches its kernels on streams of its own. Keep this call outside the graph.")


# --- tensors from arrays ---------------------------------------------------------------------------------------------


def _tensors(arrays: Sequence[jax.Array], like: torch.Tensor, num_kept: int = 0) -> list[Any]:
    """Tensors of arrays, the last `num_kept` left as they are, for torch's current stream on the device of `like`."""
    count = len(arrays) - num_kept
    if like.is_cpu:
        return [*(from_dlpack(array.__dlpack__()) for array in arrays[:count]), *arrays[count:]]
    stream = streams.current(like.device.index or 0)
    tensors = [lifetime.export(array, stream) for array in arrays[:count]]
    for array in arrays[count:]:
        lifetime.order(array, stream)
    return [*tensors, *arrays[count:]]


def _with_strides(tensor: torch.Tensor, wanted: tuple[int, ...]) -> torch.Tensor:
    """The tensor itself, or a copy, with exactly these strides."""
    if tensor.stride() == wanted:
        return tensor
    if strides.same_memory(tensor.shape, tensor.stride(), wanted):
        return tensor.as_strided(tensor.shape, wanted)
    return torch.empty_strided(tensor.shape, wanted, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


# --- what the operators call -----------------------------------------------------------------------------------------


def forward(problem: Problem, numbers: Numbers, needs_stats: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """out (batch, q_heads, q_len, d_v), stored as query is, and what the backward needs of each row: stats
    (batch, q_heads, 2, q_len), or (0,) if not needed.
    """
    query = problem[0]
    if not needs_stats:
        return attend(problem, numbers), query.new_empty((0,), dtype=strides.stats_dtype(query))
    out, stats = attend_saving(problem, numbers, num_kept=0)
    return out, stats


def attend(problem: Problem, numbers: Numbers) -> torch.Tensor:
    """`forward`'s out alone."""
    _check_place(problem[0])
    plan = plan_for(problem, numbers)
    (out,) = _run(plan, plan.forward[False], problem[:3], problem[3:])
    return _with_strides(_in_layout(out, plan.layout), plan.out_strides)


def attend_saving(problem: Problem, numbers: Numbers, num_kept: int = 1) -> tuple[torch.Tensor, Any]:
    """`forward`'s out, and its stats as an array of JAX (a tensor if nothing is kept) for `gradients`."""
    _check_place(problem[0])
    plan = plan_for(problem, numbers)
    out, stats = _run(plan, plan.forward[True], problem[:3], problem[3:], num_kept=num_kept)
    return _with_strides(_in_layout(out, plan.layout), plan.out_strides), stats


def stats_tensor(stats: jax.Array, like: torch.Tensor) -> torch.Tensor:
    """`attend_saving`'s stats as a tensor, on the device of `like`."""
    (tensor,) = _tensors((stats,), like)
    return tensor


def backward(problem: Problem, numbers: Numbers, results: Sequence[torch.Tensor],
             cotangents: Sequence[torch.Tensor | None], needs: Sequence[bool]) -> tuple[torch.Tensor, ...]:
    """(dq, dk, dv, dbias) with the storage order of their tensors; (0,) in place of those not needed.

    Args:
      problem, numbers: the forward's.
      results: its out and stats.
      cotangents: dout and dstats; None is zero.
      needs: which gradients are needed.
    """
    out, stats = results
    grads = _gradients(problem, numbers, out, (*cotangents, stats), (), (*needs, *(x is not None for x in cotangents)))
    return tuple(problem[0].new_empty((0,)) if grad is None else grad for grad in grads)


def gradients(problem: Problem, numbers: Numbers, results: tuple[torch.Tensor, jax.Array], dout: torch.Tensor,
              needs: Sequence[bool]) -> tuple[torch.Tensor | None, ...]:
    """`backward` with the results of `attend_saving`; None in place of the gradients that are not needed."""
    out, stats = results
    return _gradients(problem, numbers, out, (dout,), (stats,), (*needs, True, False))


def _gradients(problem: Problem, numbers: Numbers, out: torch.Tensor, others: Sequence[torch.Tensor | None],
               known: Sequence[jax.Array], needs: Sequence[bool]) -> tuple[torch.Tensor | None, ...]:
    """(dq, dk, dv, dbias), or None.

    Args:
      problem, numbers, out: the forward's.
      others, known: dout, dstats and stats in this order: tensors, arrays.
      needs: which gradients are needed, and which of dout and dstats are given.
    """
    _check_place(problem[0])
    plan = plan_for(problem, numbers)
    if problem[4] is None:
        needs = (*needs[:3], False, *needs[4:])
    dout, *others = others
    moved = (_in_layout(out, plan.layout), None if dout is None else _in_layout(dout, plan.layout))
    rest = iter(_run(plan, plan.backward[tuple(needs)], problem[:3], (*problem[3:], *moved, *others), known))
    return tuple(_gradient(next(rest), i, plan) if needed else None for i, needed in enumerate(needs[:4]))


def _gradient(grad: torch.Tensor, i: int, plan: Plan) -> torch.Tensor:
    wanted = plan.grad_strides[i]
    assert wanted is not None
    return _with_strides(_in_layout(grad, plan.layout) if i < 3 else grad, wanted)


def double_backward(problem: Problem, numbers: Numbers, tangents: Sequence[torch.Tensor | None],
                    cotangents: Sequence[torch.Tensor | None]) -> tuple[torch.Tensor, ...]:
    """The derivative of `backward`, by JAX through the reference implementation; float64.

    Args:
      problem, numbers: the forward's.
      tangents: cotangents of dq, dk, dv, dbias; None is zero.
      cotangents: dout and dstats, as `backward` had them.

    Returns:
      Gradients of query, key, value, bias, dout, dstats; (0,) for those that are None.
    """
    query, bias = problem[0], problem[4]
    _check_place(query)
    plan = plan_for(problem, numbers)
    present = tuple(x is not None for x in (*tangents, *cotangents))
    *first, dout = (x if x is None else _in_layout(x, plan.layout) for x in (*tangents[:3], cotangents[0]))
    derivative = _jitted_double_backward(plan.spec, plan.device)[present]
    rest = iter(_run(plan, derivative, problem[:3], (*problem[3:], *first, tangents[3], dout, cotangents[1])))
    targets = (*problem[:3], bias, *cotangents)
    return tuple(query.new_empty((0,)) if x is None else _like(next(rest), x, "BHLD" if i in (3, 5) else plan.layout)
                 for i, x in enumerate(targets))


def _like(result: torch.Tensor, target: torch.Tensor, layout: Layout) -> torch.Tensor:
    return _with_strides(_in_layout(result, layout), _strides_like(target))


@functools.lru_cache(maxsize=_MAX_PLANS)
def _jitted_double_backward(spec: AttentionSpec, where: jax.Device) -> _Variants:
    def derivative(needs: tuple[bool, ...], *arrays: Any) -> Any:
        operands, rest = _operands(spec, arrays)
        given = iter(rest)
        tangents, cotangents = ([next(given) if there else None for there in part] for part in (needs[:4], needs[4:]))
        inputs = [*operands[:4], *cotangents]
        places = [i for i, x in enumerate(inputs) if x is not None]

        def first(*values: Any) -> list[Any]:
            full: list[Any] = [None] * len(inputs)
            for i, x in zip(places, values, strict=True):
                full[i] = x
            problem = operands._replace(q=full[0], k=full[1], v=full[2], bias=full[3])
            results = autodiff.forward(spec, "reference", problem)
            dout, dstats = (jnp.zeros_like(y) if x is None else x for x, y in zip(full[4:], results, strict=True))
            grads = autodiff.backward(spec, "reference", problem, results, Results(dout, dstats))
            return [x for x in grads if x is not None]
        grads, vjp = jax.vjp(first, *(inputs[i] for i in places))
        wanted = [x for x, operand in zip(tangents, operands[:4], strict=True) if operand is not None]
        return vjp([jnp.zeros_like(g) if x is None else x for x, g in zip(wanted, grads, strict=True)])
    return _Variants(derivative, where)
