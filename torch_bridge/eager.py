"""Eager calls, straight to what computes them.

PyTorch's dispatcher and the formulas of `register_autograd` took a third of a small call's host time
(docs/notes/torch_bridge.md). The operators of ops.py are needed where something may observe or change a call: the
compiler, a dispatch mode, a transform, a tracer, a subclass of Tensor. Most calls involve none of these:

    nothing intercepts the call, nothing needs a gradient    routes.attend
    nothing intercepts the call                              _Attention, around routes.attend_saving
    otherwise                                                the operator

The statistics of rows, which only the backward reads, stay what the route made between the two, an array of JAX mostly.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch.autograd import forward_ad

from torch_bridge import derivatives, ops, routes
from torch_bridge.arguments import AttentionBackward, Cotangents, Numbers, Operands, PerArray, Results, RowAnchor

__all__ = ["attend", "attend_with_lse"]

_PLAIN_TYPES = {torch.Tensor, torch.nn.Parameter, type(None)}
# The keys that a thread adds to those of tensors where nothing intercepts calls. Modes, transforms and tracers of every
# kind add their own.
_PLAIN_KEYS = (torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect)
               | torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)).raw_repr()
_included_keys = torch._C._dispatch_tls_local_include_set
_is_excluded = torch._C._dispatch_tls_is_dispatch_key_excluded
_AUTOGRAD = torch._C.DispatchKey.AutogradOther  # excluded together with those of the devices


def attend(operands: Operands, numbers: Numbers) -> torch.Tensor:
    """Computes out (batch, q_heads, q_len, d_v); draws the seed of dropout.

    Args:
      operands: without a seed.
      numbers: its arguments that are not tensors.
    """
    query, needs_grad = operands.query, _needs_grad(operands)
    if (not torch.compiler.is_compiling() and _is_plain(operands) and (query.is_cuda or query.is_cpu)
            and query.numel() and operands.value.numel() and not (needs_grad and _is_excluded(_AUTOGRAD))):
        if numbers.dropout_p > 0:
            operands = operands._replace(seed=ops.draw_seed(query))
        if needs_grad:
            out: torch.Tensor = _Attention.apply(*operands, numbers)
            return out
        return routes.attend(operands, numbers)
    return _by_operator(operands, numbers, needs_grad).out


def attend_with_lse(operands: Operands, numbers: Numbers) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend`'s out, and lse (batch, q_heads, q_len), a natural logarithm; both are differentiable."""
    out, stats = _by_operator(operands, numbers, needs_stats=True)
    lse = stats[:, :, 0]
    if operands.bias is not None:
        with torch.no_grad():
            anchor = ops.row_anchor(*RowAnchor(_detached(operands), numbers._replace(dropout_p=0.0)).flat())
        lse = lse + anchor
    return out, lse


def _by_operator(operands: Operands, numbers: Numbers, needs_stats: bool) -> Results:
    if numbers.dropout_p > 0:
        operands = operands._replace(seed=ops.dropout_seed(operands.query, ()))
    return derivatives.functional_attention(operands, numbers, needs_stats)


def _needs_grad(operands: Operands) -> bool:
    query, key, value, bias = operands.query, operands.key, operands.value, operands.bias
    return torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad
                                        or (bias is not None and bias.requires_grad))


def _detached(operands: Operands) -> Operands:
    return Operands._make(None if x is None else x.detach() for x in operands)


def _is_plain(tensors: Sequence[torch.Tensor | None]) -> bool:
    """Whether operations on these tensors (or None) dispatch to autograd and their device's kernels only."""
    return (not _included_keys().raw_repr() & ~_PLAIN_KEYS and forward_ad._current_level < 0
            and not torch._C._len_torch_function_stack() and all(type(x) in _PLAIN_TYPES for x in tensors))


class _Context(derivatives.Context, Protocol):
    stats: routes.Stats


class _Attention(torch.autograd.Function):
    """The operator's forward and backward, without the dispatcher: of operands, and of the numbers as one argument."""

    @staticmethod
    def forward(ctx: _Context, *args: Any) -> torch.Tensor:
        *tensors, ctx.numbers = args
        operands = Operands._make(tensors)
        out, ctx.stats = routes.attend_saving(operands, ctx.numbers)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*operands, out)
        return out

    @staticmethod
    def backward(ctx: _Context, dout: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        flags, saved = ctx.needs_input_grad, ctx.saved_tensors
        if dout is None:
            return (None,) * len(flags)
        operands, out, needs = Operands._make(saved[:-1]), saved[-1], PerArray.among(flags)
        if not torch.is_grad_enabled() and _is_plain((*saved, dout)):
            grads = routes.gradients(operands, ctx.numbers, (out, ctx.stats), dout, needs)
        else:  # second derivatives, batches of dout
            results = Results(out, routes.stats_tensor(ctx.stats, out))
            found = ops.attention_backward(*AttentionBackward(
                operands, ctx.numbers, results, Cotangents(dout, None), needs).flat())
            grads = PerArray(*(grad if needed else None for grad, needed in zip(found, needs, strict=True)))
        return grads.among_arguments(len(flags))
