"""Eager calls, straight to what computes them.

PyTorch's dispatcher and the formulas of `register_autograd` took a third of a small call's host time
(docs/notes/torch_bridge.md). The operators of ops.py are needed where something may observe or change a call: the
compiler, a dispatch mode, a transform, a tracer, a subclass of Tensor. Most calls involve none of these:

    the direct path has taken such a call before             _recorder, or its shortcut's forward alone
    nothing intercepts the call, nothing needs a gradient    routes.attend
    nothing intercepts the call                              _Attention, around routes.attend_saving
    ... and query, key and value are parts of one tensor     _OfParts, around the same and routes.write_gradients
    otherwise                                                the operator

The statistics of rows, which only the backward reads, stay what the route made between the two, an array of JAX mostly.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from torch_bridge import derivatives, ops, routes, sharding
from torch_bridge.arguments import AttentionBackward, Cotangents, Numbers, Operands, PerArray, Results, RowAnchor
from torch_bridge.direct import decoding, shortcut
from torch_bridge.interception import functions_intercept, nothing_intercepts

__all__ = ["attend", "attend_again", "attend_parts", "attend_recent", "attend_to_cache", "attend_with_lse",
           "recent_cache", "takes_cache", "with_copies"]

_PLAIN_TYPES = {torch.Tensor, torch.nn.Parameter, type(None)}
_is_excluded = torch._C._dispatch_tls_is_dispatch_key_excluded
_AUTOGRAD = torch._C.DispatchKey.AutogradOther  # excluded together with those of the devices


def attend_recent(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                  options: tuple[object, ...]) -> torch.Tensor | None:
    """`attend_again` for one of the last kinds of calls (`shortcut.find_recent`)."""
    found = shortcut.find_recent(query, key, value, options)
    if found is None or functions_intercept():
        return None
    known, needs_gradients, addresses = found
    if needs_gradients and torch.is_grad_enabled():
        if _is_excluded(_AUTOGRAD):
            return None
        return _recorded(known, query, key, value, addresses)
    return known.forward(addresses, False)[0]


def attend_again(name: shortcut.Name, query: torch.Tensor, key: torch.Tensor,
                 value: torch.Tensor) -> torch.Tensor | None:
    """`attend`'s out for a call of plain tensors that the direct path has taken before, where nothing intercepts this
    one; else None.
    """
    if not nothing_intercepts() or _casts(query):
        return None
    known = shortcut.find(name, query, key, value)
    return None if known is None else _launched(known, query, key, value)


def with_copies(name: shortcut.Name, query: torch.Tensor, key: torch.Tensor,
                value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """key and value for a call of plain tensors that the direct path took before with copies of them, where nothing
    intercepts this one: the same call of these is one that `attend_again` comes to know. None: it is none, or both are
    stored as they should be.
    """
    if not nothing_intercepts() or _casts(query):
        return None
    found = shortcut.with_copies(name, key, value)
    return None if found is None or (found[0] is key and found[1] is value) else found


def _launched(known: shortcut.Shortcut, query: torch.Tensor, key: torch.Tensor,
              value: torch.Tensor) -> torch.Tensor | None:
    addresses = query.data_ptr(), key.data_ptr(), value.data_ptr()
    if not torch.is_grad_enabled() or not (query.requires_grad or key.requires_grad or value.requires_grad):
        return known.forward(addresses, False)[0]
    if _is_excluded(_AUTOGRAD):
        return None
    return _recorded(known, query, key, value, addresses)


def attend(operands: Operands, numbers: Numbers) -> torch.Tensor:
    """Computes out (batch, q_heads, q_len, d_v); draws the seed of dropout.

    Args:
      operands: without a seed.
      numbers: its arguments that are not tensors.
    """
    query, needs_grad = operands.query, _needs_grad(operands)
    if _goes_past_the_operator(operands, needs_grad):
        if numbers.dropout_p > 0:
            operands = operands._replace(seed=ops.draw_seed(query))
        if needs_grad:
            out: torch.Tensor = _Attention.apply(*operands, numbers)
            return out
        return routes.attend(operands, numbers)
    return _by_operator(operands, numbers, needs_grad).out


def _goes_past_the_operator(operands: Operands, needs_grad: bool) -> bool:
    query = operands.query
    return bool(not torch.compiler.is_compiling() and _is_plain(operands) and (query.is_cuda or query.is_cpu)
                and query.numel() and operands.value.numel() and not (needs_grad and _is_excluded(_AUTOGRAD)))


def attend_parts(tensors: tuple[torch.Tensor, ...], operands: Operands, numbers: Numbers) -> torch.Tensor:
    """`attend` of query, key and value that are the parts of tensors (`_parts`): so are their gradients of the tensors'
    gradients, each one tensor, into which kernels write.

    Args:
      operands: of `attend`, which computes the call where query, key and value are others, as autocast makes them,
        or a bias has a gradient, too.
    """
    is_apart = operands.bias is not None and operands.bias.requires_grad
    if (_needs_grad(operands) and not is_apart and _goes_past_the_operator(operands, True)
            and all(type(x) in _PLAIN_TYPES for x in tensors) and _are_parts(operands[:3], tensors)):
        if numbers.dropout_p > 0:
            operands = operands._replace(seed=ops.draw_seed(operands.query))
        out: torch.Tensor = _OfParts.apply(numbers, operands[3:], *tensors)
        return out
    return attend(operands, numbers)


def attend_to_cache(call: decoding.Call, rules: decoding.Rules) -> Results | None:
    """out and the statistics of rows (`decoding.attend`); None: something intercepts the call, or it is not taken."""
    return decoding.attend(call, rules) if _is_untouched(call) else None


def takes_cache(call: decoding.Call, rules: decoding.Rules) -> bool:
    """Whether `attend_to_cache` takes a call, unless its plan cannot be made: so nothing is wrong with it."""
    return _is_untouched(call) and decoding.takes(call, rules)


def _is_untouched(call: decoding.Call) -> bool:
    return not torch.compiler.is_compiling() and _is_plain(call) and not _casts(call.query)


def recent_cache(tensors: Sequence[torch.Tensor], options: tuple[object, ...]) -> decoding.Known | None:
    """What is known of a call to a cache (`decoding.recent`); None: nothing is, or something intercepts it."""
    if torch.compiler.is_compiling() or not nothing_intercepts() or _casts(tensors[0]):
        return None
    return decoding.recent(tensors, options)


def _casts(query: torch.Tensor) -> bool:
    """Whether autocast is on for a call of this query, and changes its tensors, all of query's dtype."""
    return shortcut.autocast_dtype(query) not in (None, query.dtype)


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
        query = operands.query
        is_spread = hasattr(query, "placements")
        operands = operands._replace(seed=sharding.drawn_seed(query) if is_spread else ops.dropout_seed(query, ()))
    return derivatives.functional_attention(operands, numbers, needs_stats)


def _needs_grad(operands: Operands) -> bool:
    query, key, value, bias, score = operands.query, operands.key, operands.value, operands.bias, operands.score_floats
    return torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad
                                        or (bias is not None and bias.requires_grad)
                                        or (score is not None and score.requires_grad))


def _detached(operands: Operands) -> Operands:
    return Operands._make(None if x is None else x.detach() for x in operands)


def _is_plain(tensors: Sequence[torch.Tensor | None]) -> bool:
    """Whether operations on these tensors (or None) dispatch to autograd and their device's kernels only."""
    return nothing_intercepts() and all(type(x) in _PLAIN_TYPES for x in tensors)


class _Context(derivatives.Context, Protocol):
    stats: routes.Stats | None  # None: a tensor, which is saved


class _Attention(torch.autograd.Function):
    """The operator's forward and backward, without the dispatcher: of operands, and of the numbers as one argument."""

    @staticmethod
    def forward(ctx: _Context, *args: *tuple[*tuple[torch.Tensor | None, ...], Numbers]) -> torch.Tensor:
        *tensors, ctx.numbers = args
        operands = Operands._make(tensors)
        out, stats = routes.attend_saving(operands, ctx.numbers)
        ctx.set_materialize_grads(False)
        # A tensor is saved as `_recorder` does: a checkpoint counts what a call and its repetition save.
        saved, ctx.stats = (stats, None) if isinstance(stats, torch.Tensor) else (None, stats)
        ctx.save_for_backward(*operands, out, saved)
        return out

    @staticmethod
    def backward(ctx: _Context, dout: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        flags, saved = ctx.needs_input_grad, ctx.saved_tensors
        if dout is None:
            return (None,) * len(flags)
        (*tensors, out, stats), needs = saved, PerArray.among(flags)
        if stats is None:
            stats = ctx.stats
        grads = _gradients(Operands._make(tensors), ctx.numbers, (out, stats), dout, needs)
        return grads.among_arguments(len(flags))


def _gradients(operands: Operands, numbers: Numbers, results: tuple[torch.Tensor, routes.Stats], dout: torch.Tensor,
               needs: PerArray[bool]) -> PerArray[torch.Tensor | None]:
    out, stats = results
    if not torch.is_grad_enabled() and _is_plain((*operands, out, dout)):
        return routes.gradients(operands, numbers, results, dout, needs)
    # Second derivatives, batches of dout.
    found = ops.attention_backward(*AttentionBackward(
        operands, numbers, Results(out, routes.stats_tensor(stats, out)), Cotangents(dout, None), needs).flat())
    return PerArray(*(grad if needed else None for grad, needed in zip(found, needs, strict=True)))


_Apply = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, tuple[int, ...]], torch.Tensor]
"""(query, key, value, their addresses) -> out, recorded."""


def _recorder(known: shortcut.Shortcut) -> _Apply:
    """Forward and backward of a shortcut as a function of autograd, a class of its own: so it is no argument, and no
    attribute of each context.
    """
    class Launched(torch.autograd.Function):
        """Forward and backward of a shortcut."""

        @staticmethod
        def forward(ctx: derivatives.Context, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                    addresses: tuple[int, ...]) -> torch.Tensor:
            out, stats = known.forward(addresses, True)
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(query, key, value, out, stats)
            return out

        @staticmethod
        def backward(ctx: derivatives.Context, dout: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
            if dout is None:
                return (None,) * 4
            saved, needs = ctx.saved_tensors, ctx.needs_input_grad
            if not torch.is_grad_enabled() and not functions_intercept():
                found = known.backward(saved, dout, nothing_intercepts)
                if found is not None:
                    if needs == _ALL_THREE:
                        dq, dk, dv = found
                        return dq, dk, dv, None
                    return *(grad if needed else None for grad, needed in zip(found, needs)), None
            query, key, value, out, stats = saved
            operands = Operands.of(query, key, value, mask=None, bias=None, seed=None)
            grads = _gradients(operands, known.numbers, (out, stats), dout, PerArray._make((*needs[:3], False, False)))
            return grads.query, grads.key, grads.value, None

    _call_at_once(Launched)
    # `Launched.apply` for tensors that no transform of torch.func has wrapped: PyTorch 2.11 unwraps, in Python, what a
    # transform left behind, which takes 1.6 us.
    found: _Apply = super(torch.autograd.Function, Launched).apply
    return found


_ALL_THREE = (True, True, True, False)


def _call_at_once(function: type[torch.autograd.Function]) -> None:
    """Has autograd's thread call `backward` itself. What it calls of a node is `apply`, which in torch looks for
    `backward`: 0.4 us. That is private: where it is not as this file knows it, nothing is changed.
    """
    node: Any = getattr(function, "_backward_cls", object)
    torchs = getattr(torch.autograd.function, "BackwardCFunction", None)
    if torchs is not None and torchs in node.__bases__ and "apply" in vars(torchs):
        node.apply = function.backward


def _recorded(known: shortcut.Shortcut, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
              addresses: tuple[int, ...]) -> torch.Tensor:
    apply: _Apply | None = known.recorder
    if apply is None:
        apply = known.recorder = _recorder(known)
    return apply(query, key, value, addresses)


# --- query, key and value in one tensor ------------------------------------------------------------------------------


def _parts(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """query, key and value (batch, heads, length, dim) of the tensors that hold them: all three, or a query and the
    other two. The last holds its own in its third axis from the end; (length, heads, dim) is a batch of one.
    """
    *alone, packed = tensors
    return [(x if x.dim() == 4 else x[None]).transpose(1, 2) for x in (*alone, *packed.unbind(-3))]


def _packed(parts: Sequence[torch.Tensor | None], like: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    """The tensors that hold these parts, copied; None where these are None."""
    found = [None if x is None else x.transpose(1, 2) if like[-1].dim() == 5 else x.transpose(1, 2)[0] for x in parts]
    count = len(like) - 1
    inside = [x for x in found[count:] if x is not None]
    return [*found[:count], torch.stack(inside, -3) if inside else None]


def _are_parts(found: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor]) -> bool:
    with torch.no_grad():
        parts = _parts(tensors)
    return all(a.data_ptr() == b.data_ptr() and a.stride() == b.stride() and a.shape == b.shape and a.dtype == b.dtype
               for a, b in zip(parts, found, strict=True))


class _OfParts(torch.autograd.Function):
    """`_Attention` of query, key and value that are parts of tensors, and a tensor's gradient is one, too."""

    @staticmethod
    def forward(ctx: _Context, numbers: Numbers, others: tuple[torch.Tensor | None, ...],
                *tensors: torch.Tensor) -> torch.Tensor:
        ctx.numbers = numbers
        operands = Operands._make((*_parts(tensors), *others))
        are_dense = all(torch.empty_like(x, device="meta").stride() == x.stride() for x in tensors)
        out, stats = routes.attend_saving(operands, numbers, then="backward_of_parts" if are_dense else "backward")
        ctx.set_materialize_grads(False)
        saved, ctx.stats = (stats, None) if isinstance(stats, torch.Tensor) else (None, stats)
        ctx.save_for_backward(*others, out, saved, *tensors)
        return out

    @staticmethod
    def backward(ctx: _Context, dout: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        saved, count, (_, _, *flags) = ctx.saved_tensors, len(Operands._fields) - 3, ctx.needs_input_grad
        if dout is None:
            return (None,) * (2 + len(flags))
        (*others, out, stats), tensors = saved[:count + 2], saved[count + 2:]
        results = out, ctx.stats if stats is None else stats
        operands = Operands._make((*_parts(tensors), *others))
        needs = PerArray(query=flags[0], key=flags[-1], value=flags[-1], bias=False, score_floats=False)
        if not torch.is_grad_enabled() and _is_plain((*operands, out, dout)):
            grads: list[torch.Tensor | None] = [torch.empty_like(x) for x in tensors]
            query, key, value = _parts([x for x in grads if x is not None])
            routes.write_gradients(operands, ctx.numbers, results, dout, needs, (query, key, value))
        else:
            grads = _packed(_gradients(operands, ctx.numbers, results, dout, needs)[:3], tensors)
        return None, None, *(grad if needed else None for grad, needed in zip(grads, flags, strict=True))
