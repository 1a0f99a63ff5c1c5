"""Eager calls, straight to the exchange.

The way through PyTorch's dispatcher and the formulas of `register_autograd` took a third of a small call's host time
(docs/notes/torch_bridge.md). The operators of ops.py are needed where something may look at a call or change it: the
compiler, a dispatch mode, a transform, a tracer, a subclass of Tensor. Most calls have nothing of the kind:

    nothing intercepts the call, nothing needs a gradient    exchange.attend
    nothing intercepts the call                              _Attention, around exchange.attend_saving
    otherwise                                                the operator

The statistics of rows, which only the backward reads, stay an array of JAX between the two.
"""

from typing import Any

import torch
from torch.autograd import forward_ad

from torch_bridge import derivatives, ops

__all__ = ["attend"]

_PLAIN_TYPES = {torch.Tensor, torch.nn.Parameter, type(None)}
# The keys that a thread adds to those of tensors where nothing intercepts calls. Modes, transforms and tracers of every
# kind add their own.
_PLAIN_KEYS = (torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect)
               | torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)).raw_repr()
_included_keys = torch._C._dispatch_tls_local_include_set
_is_excluded = torch._C._dispatch_tls_is_dispatch_key_excluded
_AUTOGRAD = torch._C.DispatchKey.AutogradOther  # excluded together with those of the devices


def attend(tensors: tuple[Any, ...], numbers: tuple[Any, ...], needs_grad: bool) -> torch.Tensor:
    """out (batch, q_heads, q_len, d_v) of an operator's arguments without the seed of dropout, which is drawn here.

    Args:
      tensors: query, key, value; mask and bias or None.
      numbers: causal_offset, scale, dropout_p, deterministic.
      needs_grad: a derivative will be taken.
    """
    query, _, value, *_ = tensors
    drops = numbers[2] > 0
    if (not torch.compiler.is_compiling() and _is_plain(tensors) and (query.is_cuda or query.is_cpu)
            and query.numel() and value.numel() and not (needs_grad and _is_excluded(_AUTOGRAD))):
        problem = (*tensors, ops.draw_seed(query) if drops else None)
        if needs_grad:
            return _Attention.apply(*problem, *numbers)
        return ops.exchange().attend(problem, numbers)
    seed = ops.dropout_seed(query, ()) if drops else None
    return derivatives.functional_attention(*tensors, seed, *numbers, needs_grad)[0]


def _is_plain(tensors: Any) -> bool:
    """Whether operations on these tensors, or None, go to the kernels of their device and to autograd alone."""
    return (not _included_keys().raw_repr() & ~_PLAIN_KEYS and forward_ad._current_level < 0
            and not torch._C._len_torch_function_stack() and all(type(x) in _PLAIN_TYPES for x in tensors))


class _Attention(torch.autograd.Function):
    """The operator's forward and backward, without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> torch.Tensor:
        problem, ctx.numbers = args[:6], args[6:]
        out, ctx.stats = ops.exchange().attend_saving(problem, ctx.numbers)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*problem, out)
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor | None) -> tuple:
        *problem, out = ctx.saved_tensors
        if dout is None:
            return (None,) * 10
        flags, crossing = ctx.needs_input_grad, ops.exchange()
        needs = (flags[0], flags[1], flags[2], flags[4])
        if torch.is_grad_enabled() or not _is_plain((*problem, out, dout)):  # second derivatives, batches of dout
            stats = crossing.stats_tensor(ctx.stats, out)
            grads = ops.attention_backward(*problem, *ctx.numbers, out, stats, dout, None, list(needs))
        else:
            grads = crossing.gradients(problem, ctx.numbers, (out, ctx.stats), dout, needs)
        dq, dk, dv, dbias = (grad if needed else None for grad, needed in zip(grads, needs, strict=True))
        return dq, dk, dv, None, dbias, None, None, None, None, None
