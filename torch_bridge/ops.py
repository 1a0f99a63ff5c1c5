"""The operators: schemas, fake versions and vmap rules, all registered at import and without importing JAX.

    pallas_flash::attention                  (out, stats): of each row lse and its rest, which the backward needs
    pallas_flash::attention_backward         (dq, dk, dv, dbias, dscore_floats)
    pallas_flash::attention_double_backward  the derivative of that; float64 only
    pallas_flash::row_anchor                 what a bias was anchored at, which lse of stats leaves out; no derivative
    pallas_flash::dropout_seed               two numbers from torch's generator

Their arguments: arguments.py. How they are differentiated: derivatives.py.

Arrays of numbers have four axes (batch, heads, length, dim); `sdpa.py` sees to it. With `Numbers.partial`, out and the
gradients have the dtype of stats (`partial.py`). A result that is not asked for (stats, or a gradient that nothing
needs) is an empty tensor of shape (0,). The first call that computes imports JAX.
"""

import functools
from collections.abc import Sequence
from typing import Protocol

import torch
from torch._functorch.pyfunctorch import VmapInterpreter, retrieve_current_functorch_interpreter

from torch_bridge import routes, strides
from torch_bridge.arguments import (
    SCHEMAS,
    Attention,
    AttentionBackward,
    AttentionDoubleBackward,
    Numbers,
    Operands,
    PerArray,
    RowAnchor,
)

__all__ = ["DIRECT", "TAGS", "attention", "attention_backward", "attention_backward_direct", "attention_direct",
           "attention_double_backward", "draw_seed", "dropout_seed", "library", "require_float64", "row_anchor"]

NAMESPACE = "pallas_flash"
library = torch.library.Library(NAMESPACE, "DEF")
# Graphs must pass the strides that the fake version saw, and JAX's streams cannot be captured in a CUDA graph.
TAGS = [getattr(torch.Tag, name) for name in ("pt2_compliant_tag", "needs_exact_strides") if hasattr(torch.Tag, name)]
_OUTSIDE_GRAPHS = [torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else []
_RANDOM = [torch.Tag.nondeterministic_seeded]
for _name, _schema in SCHEMAS.items():
    library.define(_name + _schema, tags=TAGS + _OUTSIDE_GRAPHS + _RANDOM * (_name == "dropout_seed"))
for _name in ("attention", "attention_backward"):
    library.define(f"{_name}_direct{SCHEMAS[_name]}", tags=TAGS)

type Operator = torch._ops.OpOverload[..., tuple[torch.Tensor, ...]]

attention: Operator = torch.ops.pallas_flash.attention.default
attention_backward: Operator = torch.ops.pallas_flash.attention_backward.default
attention_direct: Operator = torch.ops.pallas_flash.attention_direct.default
attention_backward_direct: Operator = torch.ops.pallas_flash.attention_backward_direct.default
DIRECT = {attention: attention_direct, attention_backward: attention_backward_direct}
"""What stands in traced graphs for calls whose kernels are launched directly (direct/tracing.py): the same operator,
which the compiler may put into a CUDA graph. Tags belong to operators, not to calls.
"""
attention_double_backward: Operator = torch.ops.pallas_flash.attention_double_backward.default
row_anchor = torch.ops.pallas_flash.row_anchor.default
dropout_seed = torch.ops.pallas_flash.dropout_seed.default


# --- computing -------------------------------------------------------------------------------------------------------


def _attention(*args: object, in_graph: bool = False) -> tuple[torch.Tensor, ...]:
    call = Attention.of(args)
    if call.operands.is_empty:
        out, stats = _fake_attention(*args)
        return out.zero_(), stats.fill_(-torch.inf)  # nothing reads the statistics
    return routes.forward(*call, in_graph)


def _attention_backward(*args: object, in_graph: bool = False) -> tuple[torch.Tensor, ...]:
    call = AttentionBackward.of(args)
    if call.operands.is_empty or all(x is None for x in call.cotangents):
        return tuple(grad.zero_() for grad in _fake_attention_backward(*args))
    return routes.backward(*call, in_graph)


def _attention_double_backward(*args: object) -> tuple[torch.Tensor, ...]:
    call = AttentionDoubleBackward.of(args)
    require_float64(call.operands.query)
    if call.operands.is_empty:
        return tuple(grad.zero_() for grad in _fake_attention_double_backward(*args))
    from torch_bridge import exchange  # imports JAX
    return exchange.double_backward(*call)


def _row_anchor(*args: object) -> torch.Tensor:
    call = RowAnchor.of(args)
    if call.operands.is_empty:
        return _fake_row_anchor(*args).zero_()
    from torch_bridge import exchange
    return exchange.row_anchor(*call)


def require_float64(query: torch.Tensor) -> None:
    """Raises RuntimeError where `attention_double_backward` has no kernel."""
    if query.dtype != torch.float64:
        raise RuntimeError(f"the backward of scaled_dot_product_attention has no derivative for {query.dtype}: fused "
                           "kernels recompute the probabilities. For second derivatives use float64 tensors, or "
                           "torch's math backend.")


def draw_seed(like: torch.Tensor, lead: Sequence[int] = ()) -> torch.Tensor:
    """Seeds of dropout (*lead, 2), int32, from the generator of the device of `like`; the host waits for nothing."""
    return torch.randint(-(2**31), 2**31, (*lead, 2), dtype=torch.int32, device=like.device)


for _key in ("CPU", "CUDA"):
    library.impl("dropout_seed", draw_seed, _key)
    library.impl("row_anchor", _row_anchor, _key)
    for _suffix, _in_graph in (("", False), ("_direct", True)):
        library.impl(f"attention{_suffix}", functools.partial(_attention, in_graph=_in_graph), _key)
        library.impl(f"attention_backward{_suffix}", functools.partial(_attention_backward, in_graph=_in_graph), _key)
    library.impl("attention_double_backward", _attention_double_backward, _key)


# --- fake versions: shapes, dtypes and exact strides -----------------------------------------------------------------


def _gradients(like: Sequence[torch.Tensor | None], needs: Sequence[bool], query: torch.Tensor,
               dtype: torch.dtype | None = None) -> tuple[torch.Tensor, ...]:
    """Uninitialised gradients with the storage order and, for None, the dtype of their tensors; (0,) in place of those
    not needed.
    """
    return tuple(torch.empty_like(tensor, dtype=dtype) if needed and tensor is not None else query.new_empty((0,))
                 for tensor, needed in zip(like, needs, strict=True))


def _fake_attention(*args: object) -> tuple[torch.Tensor, ...]:
    call = Attention.of(args)
    query, d_v = call.operands.query, call.operands.value.shape[3]
    out = query.new_empty_strided((*query.shape[:3], d_v), strides.like_query(query, d_v),
                                  dtype=strides.stats_dtype(query) if call.numbers.partial else None)
    stats = (*query.shape[:2], 2, query.shape[2]) if call.needs_stats else (0,)
    return out, query.new_empty(stats, dtype=strides.stats_dtype(query))


def _fake_attention_backward(*args: object) -> tuple[torch.Tensor, ...]:
    call = AttentionBackward.of(args)
    query = call.operands.query
    return _gradients(call.operands.differentiable, call.needs, query,
                      strides.stats_dtype(query) if call.numbers.partial else None)


def _fake_attention_double_backward(*args: object) -> tuple[torch.Tensor, ...]:
    call = AttentionDoubleBackward.of(args)
    like = (*call.operands.differentiable, *call.cotangents)
    return _gradients(like, [x is not None for x in like], call.operands.query)


def _fake_row_anchor(*args: object) -> torch.Tensor:
    query = RowAnchor.of(args).operands.query
    return query.new_empty(query.shape[:3], dtype=strides.stats_dtype(query))


def _fake_dropout_seed(like: torch.Tensor, lead: Sequence[int]) -> torch.Tensor:
    return like.new_empty((*lead, 2), dtype=torch.int32)


torch.library.register_fake("pallas_flash::dropout_seed", _fake_dropout_seed, lib=library)
torch.library.register_fake("pallas_flash::row_anchor", _fake_row_anchor, lib=library)
for _suffix in ("", "_direct"):
    torch.library.register_fake(f"pallas_flash::attention{_suffix}", _fake_attention, lib=library)
    torch.library.register_fake(f"pallas_flash::attention_backward{_suffix}", _fake_attention_backward, lib=library)
torch.library.register_fake("pallas_flash::attention_double_backward", _fake_attention_double_backward, lib=library)


# --- vmap: the mapped axis joins the batch ---------------------------------------------------------------------------


def _mapped_first(args: Sequence[object], axes: Sequence[int | None], size: int) -> list[object]:
    """Moves the mapped axis of every tensor to the front, and expands those without one; numbers stay as they are."""
    return [arg if not isinstance(arg, torch.Tensor) else arg.expand(size, *arg.shape) if axis is None
            else arg.movedim(axis, 0) for arg, axis in zip(args, axes, strict=True)]


def _into_batch(arg: object, batch: int) -> object:
    """Reshapes (size, batch or 1, ...) to (size * batch, ...); numbers stay as they are."""
    if not isinstance(arg, torch.Tensor):
        return arg
    return arg.expand(-1, batch, *arg.shape[2:]).flatten(0, 1)


def _from_batch(grad: torch.Tensor, tensor: torch.Tensor | None, size: int, batch: int) -> torch.Tensor:
    """Turns the gradient (size * batch, ...) of a merged tensor into that of the tensor (size, batch or 1, ...)."""
    if grad.dim() == 1 or tensor is None:
        return grad.expand(size, 0)
    grad = grad.unflatten(0, (size, batch))
    return grad.sum(1, keepdim=True) if tensor.shape[1] == 1 and batch > 1 else grad


def _one_by_one(operator: Operator, size: int, args: Sequence[object]) -> tuple[torch.Tensor, ...]:
    """Calls the operator once for each mapped element and stacks the results."""
    results = [operator(*(arg[i] if isinstance(arg, torch.Tensor) else arg for arg in args)) for i in range(size)]
    return tuple(torch.stack(column) for column in zip(*results, strict=True))


def _share_no_batch(operands: Operands, numbers: Numbers) -> bool:
    """Random bits and score functions depend on the batch index, and packed sequences have no batch."""
    return operands.seed is not None or operands.q_starts is not None or numbers.score is not None


class _VmapInfo(Protocol):
    batch_size: int


_Mapped = tuple[tuple[torch.Tensor, ...], tuple[int, ...]]
"""The results of a vmap rule, and the mapped axis of each."""


def _vmap_attention(info: _VmapInfo, in_dims: tuple[int | None, ...], *args: object) -> _Mapped:
    size = info.batch_size
    args = tuple(_mapped_first(args, in_dims, size))
    operands, numbers, _ = Attention.of(args)
    if _share_no_batch(operands, numbers):
        return _one_by_one(attention, size, args), (0, 0)
    batch = operands.query.shape[1]
    out, stats = attention(*(_into_batch(arg, batch) for arg in args))
    stats = stats.expand(size, 0) if stats.dim() == 1 else stats.unflatten(0, (size, batch))
    return (out.unflatten(0, (size, batch)), stats), (0, 0)


def _vmap_attention_backward(info: _VmapInfo, in_dims: tuple[int | None, ...], *args: object) -> _Mapped:
    size, axes = info.batch_size, (0,) * len(PerArray._fields)
    args = tuple(_mapped_first(args, (*in_dims[:-1], None), size))  # torch has one for each of the flags in `needs`
    operands, numbers, *_ = AttentionBackward.of(args)
    if _share_no_batch(operands, numbers):
        return _one_by_one(attention_backward, size, args), axes
    batch = operands.query.shape[1]
    grads = attention_backward(*(_into_batch(arg, batch) for arg in args))
    return tuple(_from_batch(grad, x, size, batch)
                 for grad, x in zip(grads, operands.differentiable, strict=True)), axes


def _vmap_row_anchor(info: _VmapInfo, in_dims: tuple[int | None, ...],
                     *args: object) -> tuple[torch.Tensor, int]:
    size = info.batch_size
    args = tuple(_mapped_first(args, in_dims, size))
    operands, numbers = RowAnchor.of(args)
    if _share_no_batch(operands, numbers):
        each = [[arg[i] if isinstance(arg, torch.Tensor) else arg for arg in args] for i in range(size)]
        return torch.stack([row_anchor(*one) for one in each]), 0
    batch = operands.query.shape[1]
    return row_anchor(*(_into_batch(arg, batch) for arg in args)).unflatten(0, (size, batch)), 0


def _vmap_attention_double_backward(info: _VmapInfo, in_dims: tuple[int | None, ...], *args: object) -> _Mapped:
    results = _one_by_one(attention_double_backward, info.batch_size, _mapped_first(args, in_dims, info.batch_size))
    return results, (0,) * len(results)


torch.library.register_vmap("pallas_flash::row_anchor", _vmap_row_anchor, lib=library)
for _suffix in ("", "_direct"):
    torch.library.register_vmap(f"pallas_flash::attention{_suffix}", _vmap_attention, lib=library)
    torch.library.register_vmap(f"pallas_flash::attention_backward{_suffix}", _vmap_attention_backward, lib=library)
torch.library.register_vmap("pallas_flash::attention_double_backward", _vmap_attention_double_backward, lib=library)


def _vmap_dropout_seed(keys: torch._C.DispatchKeySet, like: torch.Tensor, lead: Sequence[int]) -> torch.Tensor:
    """One seed for all mapped elements, or one for each, as the caller of `torch.vmap` chose; or torch's error."""
    interpreter = retrieve_current_functorch_interpreter()
    assert isinstance(interpreter, VmapInterpreter)
    randomness, level = interpreter.randomness(), interpreter.level()
    if randomness == "error":
        raise RuntimeError("vmap: called random operation scaled_dot_product_attention(dropout_p > 0) while in "
                           "randomness error mode. Pass randomness=\"same\" or randomness=\"different\" to vmap.")
    like, _ = torch._C._functorch._unwrap_batched(like, level)
    with torch._C._ExcludeDispatchKeyGuard(_VMAP_KEYS):  # so that the call goes to the next outer transform
        if randomness == "same":
            shared: torch.Tensor = dropout_seed(like, lead)
            return shared
        seeds = dropout_seed(like, (interpreter.batch_size(), *lead))
    mapped: torch.Tensor = torch._C._functorch._add_batch_dim(seeds, 0, level)
    return mapped


_VMAP_KEYS = (torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchVmapMode)
              | torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchBatched))
library.impl("dropout_seed", _vmap_dropout_seed, "FuncTorchVmapMode", with_keyset=True)
