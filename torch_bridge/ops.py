"""The operators: schemas, fake versions, autograd and vmap rules, all registered at import and without importing JAX.

    pallas_flash::attention                  (out, lse)
    pallas_flash::attention_backward         (dq, dk, dv, dbias)
    pallas_flash::attention_double_backward  the derivative of that; float64 only

Every tensor has four axes (batch, heads, length, dim); `sdpa.py` sees to it. A result that is not asked for (lse, or a
gradient that nothing needs) is an empty tensor of shape (0,). JAX is imported by the first call that computes.
"""

from collections.abc import Sequence
from typing import Any

import torch

from torch_bridge import strides

__all__ = ["attention", "attention_backward", "attention_double_backward", "exchange", "functional_attention"]

NAMESPACE = "pallas_flash"
PROBLEM = "Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? bias, Tensor? seed"
NUMBERS = "SymInt? causal_offset, float? scale, float dropout_p, bool deterministic"
SCHEMAS = {
    "attention": f"({PROBLEM}, {NUMBERS}, bool needs_lse) -> (Tensor, Tensor)",
    "attention_backward": f"({PROBLEM}, {NUMBERS}, Tensor out, Tensor lse, Tensor? dout, Tensor? dlse, bool[] needs)"
                          " -> (Tensor, Tensor, Tensor, Tensor)",
    "attention_double_backward": f"({PROBLEM}, {NUMBERS}, Tensor? ddq, Tensor? ddk, Tensor? ddv, Tensor? ddbias,"
                                 " Tensor? dout, Tensor? dlse) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
}

_library = torch.library.Library(NAMESPACE, "DEF")
# A graph must hand over the strides that the fake version saw; and JAX's streams cannot be captured in a CUDA graph.
_tags = [getattr(torch.Tag, name) for name in ("pt2_compliant_tag", "needs_exact_strides", "cudagraph_unsafe")
         if hasattr(torch.Tag, name)]
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema, tags=_tags)

attention = torch.ops.pallas_flash.attention.default
attention_backward = torch.ops.pallas_flash.attention_backward.default
attention_double_backward = torch.ops.pallas_flash.attention_double_backward.default


# --- computing -------------------------------------------------------------------------------------------------------


def exchange() -> Any:
    """The module that imports JAX, when the first call needs it."""
    from torch_bridge import exchange as module
    return module


def _is_empty(query: torch.Tensor, value: torch.Tensor) -> bool:
    """True if there is no output element or no key: results are known without JAX."""
    return 0 in query.shape[:3] or 0 in value.shape


def _attention(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if _is_empty(args[0], args[2]):
        out, lse = _fake_attention(*args)
        return out.zero_(), lse.fill_(-torch.inf)
    return exchange().forward(args[:6], args[6:10], args[10])


def _attention_backward(*args: Any) -> tuple[torch.Tensor, ...]:
    *_, dout, dlse, needs = args
    if _is_empty(args[0], args[2]) or (dout is None and dlse is None):
        return tuple(grad.zero_() for grad in _fake_attention_backward(*args))
    return exchange().backward(args[:6], args[6:10], args[10:12], (dout, dlse), needs)


def _attention_double_backward(*args: Any) -> tuple[torch.Tensor, ...]:
    _require_float64(args[0])
    if _is_empty(args[0], args[2]):
        return tuple(grad.zero_() for grad in _fake_attention_double_backward(*args))
    return exchange().double_backward(args[:6], args[6:10], args[10:14], args[14:])


for _key in ("CPU", "CUDA"):
    _library.impl("attention", _attention, _key)
    _library.impl("attention_backward", _attention_backward, _key)
    _library.impl("attention_double_backward", _attention_double_backward, _key)


# --- fake versions: shapes, dtypes and exact strides -----------------------------------------------------------------


def _gradients(tensors: Sequence[torch.Tensor | None], needs: Sequence[bool]) -> list[torch.Tensor]:
    """Uninitialised gradients with the storage order of their tensors, and (0,) in place of those not needed."""
    query = tensors[0]
    assert query is not None
    return [torch.empty_like(tensor) if needed and tensor is not None else query.new_empty((0,))
            for tensor, needed in zip(tensors, needs, strict=True)]


def _fake_attention(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    query, _, value, *_, needs_lse = args
    out = query.new_empty_strided((*query.shape[:3], value.shape[3]), strides.like_query(query, value.shape[3]))
    return out, query.new_empty(query.shape[:3] if needs_lse else (0,), dtype=strides.lse_dtype(query))


def _fake_attention_backward(*args: Any) -> tuple[torch.Tensor, ...]:
    query, key, value, _, bias, *_, needs = args
    return tuple(_gradients((query, key, value, bias), needs))


def _fake_attention_double_backward(*args: Any) -> tuple[torch.Tensor, ...]:
    query, key, value, _, bias, *_, dout, dlse = args
    tensors = (query, key, value, bias, dout, dlse)
    return tuple(_gradients(tensors, [tensor is not None for tensor in tensors]))


torch.library.register_fake("pallas_flash::attention", _fake_attention, lib=_library)
torch.library.register_fake("pallas_flash::attention_backward", _fake_attention_backward, lib=_library)
torch.library.register_fake("pallas_flash::attention_double_backward", _fake_attention_double_backward, lib=_library)


# --- autograd --------------------------------------------------------------------------------------------------------


def _save_forward(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:6], *output)
    ctx.numbers = inputs[6:10]


def _differentiate_forward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None,
                           operator: Any = attention_backward) -> tuple:
    *problem, out, lse = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 2, 4)]
    if lse.dim() == 1:  # not asked for: a transform hid from the caller that something requires grad
        out, lse = attention(*problem, *ctx.numbers, True)
    grads = operator(*problem, *ctx.numbers, out, lse, dout, dlse, needs)
    dq, dk, dv, dbias = (grad if needed else None for grad, needed in zip(grads, needs, strict=True))
    return dq, dk, dv, None, dbias, *[None] * 6


def _save_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:6], *inputs[12:14])
    ctx.numbers = inputs[6:10]


def _require_float64(query: torch.Tensor) -> None:
    if query.dtype != torch.float64:
        raise RuntimeError(f"the backward of scaled_dot_product_attention has no derivative for {query.dtype}: fused "
                           "kernels recompute the probabilities. For second derivatives use float64 tensors, or "
                           "torch's math backend.")


def _differentiate_backward(ctx: Any, *tangents: torch.Tensor | None) -> tuple:
    *problem, dout, dlse = ctx.saved_tensors
    _require_float64(problem[0])
    # The derivative is total: it goes through out and lse too, which are functions of query, key, value and bias.
    needed = (problem[0], problem[1], problem[2], problem[4])
    tangents = tuple(None if x is None or t is None or t.shape != x.shape else t
                     for x, t in zip(needed, tangents, strict=True))  # (0,) stands for a gradient that was not needed
    grads = attention_double_backward(*problem, *ctx.numbers, *tangents, dout, dlse)
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 2, 4, 12, 13)]
    gq, gk, gv, gbias, gdout, gdlse = (grad if needed else None for grad, needed in zip(grads, needs, strict=True))
    return gq, gk, gv, None, gbias, *[None] * 7, gdout, gdlse, None


torch.library.register_autograd("pallas_flash::attention", _differentiate_forward,
                                setup_context=_save_forward, lib=_library)
torch.library.register_autograd("pallas_flash::attention_backward", _differentiate_backward,
                                setup_context=_save_backward, lib=_library)


# --- vmap: the mapped axis joins the batch ---------------------------------------------------------------------------


def _mapped_first(args: Sequence[Any], axes: Sequence[int | None], size: int) -> list[Any]:
    """The arguments with the mapped axis of every tensor in front, broadcast where it has none; numbers as they are."""
    return [arg if not isinstance(arg, torch.Tensor) else arg.expand(size, *arg.shape) if axis is None
            else arg.movedim(axis, 0) for arg, axis in zip(args, axes, strict=True)]


def _into_batch(arg: Any, batch: int) -> Any:
    """(size, batch or 1, ...) -> (size * batch, ...); numbers as they are."""
    if not isinstance(arg, torch.Tensor):
        return arg
    return arg.expand(-1, batch, *arg.shape[2:]).flatten(0, 1)


def _from_batch(grad: torch.Tensor, tensor: torch.Tensor | None, size: int, batch: int) -> torch.Tensor:
    """The gradient of a mapped tensor (size, batch or 1, ...) from that of its expanded, merged self."""
    if grad.dim() == 1 or tensor is None:
        return grad.expand(size, 0)
    grad = grad.unflatten(0, (size, batch))
    return grad.sum(1, keepdim=True) if tensor.shape[1] == 1 and batch > 1 else grad


def _one_by_one(operator: Any, size: int, args: Sequence[Any]) -> tuple:
    """The results of each mapped element, stacked: dropout draws by batch index, so elements cannot share a batch."""
    results = [operator(*(arg[i] if isinstance(arg, torch.Tensor) else arg for arg in args)) for i in range(size)]
    return tuple(torch.stack(column) for column in zip(*results, strict=True))


def _vmap_attention(info: Any, in_dims: tuple, *args: Any) -> tuple:
    size = info.batch_size
    args = tuple(_mapped_first(args, in_dims, size))
    if args[5] is not None:
        return _one_by_one(attention, size, args), (0, 0)
    batch = args[0].shape[1]
    out, lse = attention(*(_into_batch(arg, batch) for arg in args))
    lse = lse.expand(size, 0) if lse.dim() == 1 else lse.unflatten(0, (size, batch))
    return (out.unflatten(0, (size, batch)), lse), (0, 0)


def _vmap_attention_backward(info: Any, in_dims: tuple, *args: Any) -> tuple:
    size = info.batch_size
    args = tuple(_mapped_first(args, (*in_dims[:14], None), size))
    if args[5] is not None:
        return _one_by_one(attention_backward, size, args), (0, 0, 0, 0)
    batch = args[0].shape[1]
    grads = attention_backward(*(_into_batch(arg, batch) for arg in args))
    return tuple(_from_batch(grad, args[i], size, batch) for grad, i in zip(grads, (0, 1, 2, 4), strict=True)), (0,) * 4


def _vmap_attention_double_backward(info: Any, in_dims: tuple, *args: Any) -> tuple:
    args = tuple(_mapped_first(args, in_dims, info.batch_size))
    return _one_by_one(attention_double_backward, info.batch_size, args), (0,) * 6


torch.library.register_vmap("pallas_flash::attention", _vmap_attention, lib=_library)
torch.library.register_vmap("pallas_flash::attention_backward", _vmap_attention_backward, lib=_library)
torch.library.register_vmap("pallas_flash::attention_double_backward", _vmap_attention_double_backward, lib=_library)


# --- torch.func ------------------------------------------------------------------------------------------------------


class _Functional(torch.autograd.Function):
    """`attention` for torch.func's grad, vjp and jacrev, which refuse the formulas of `register_autograd`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return attention(*args[:10], True)

    setup_context = staticmethod(_save_forward)

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple:
        return _differentiate_forward(ctx, dout, dlse, operator=_FunctionalBackward.apply)


class _FunctionalBackward(torch.autograd.Function):
    """`attention_backward` for torch.func, which always records the graph of a backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[torch.Tensor, ...]:
        return attention_backward(*args)

    setup_context = staticmethod(_save_backward)
    backward = staticmethod(_differentiate_backward)


def functional_attention(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention`, also inside torch.func's transforms."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return _Functional.apply(*args)
    return attention(*args)
