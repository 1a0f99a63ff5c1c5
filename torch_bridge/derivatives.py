"""Derivatives of the operators: kernels of autograd's dispatch keys, so that every caller of an operator meets them.

    attention                  reverse: attention_backward; forward, in float64: attention_double_backward
    attention_backward         reverse and forward, in float64: attention_double_backward
    attention_double_backward  none: it raises

Let J be the derivative of (out, stats) with respect to x = (query, key, value, bias), c = (dout, dstats), and t a
tangent of x. `attention_backward` is g(x, c) = J^T c, linear in c, and `attention_double_backward` is the gradient of
<g, t> with respect to x and c: with respect to c that is J t, the forward-mode derivative of `attention`. With respect
to x it is H t, where H, the second derivative of <c, (out, stats)>, is symmetric: so it is the forward-mode derivative
of g, too, to which a tangent t_c of c adds g(x, t_c).

A kernel calls a function of a single level of torch.func, as torch's own operators do, so that transforms nest. A
plain `torch.autograd.Function` would start the transforms anew inside an operator, and `register_autograd` has no
forward mode: tangents would be dropped silently.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, NoReturn, Protocol

import torch
import torch.fx.traceback as fx_traceback
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.utils.checkpoint import CheckpointPolicy

from torch_bridge import ops, sharding
from torch_bridge.arguments import (
    Attention,
    AttentionBackward,
    AttentionDoubleBackward,
    Cotangents,
    Numbers,
    Operands,
    PerArray,
    Results,
    RowAnchor,
)
from torch_bridge.direct import repeated, tracing
from torch_bridge.interception import functions_intercept, nothing_intercepts

__all__ = ["Context", "functional_attention"]


_NUM_ARGUMENTS = len(Operands._fields) + len(Numbers._fields)  # with which all operators begin


def functional_attention(operands: Operands, numbers: Numbers, needs_stats: bool) -> Results:
    """`attention`, which saves its stats also where a transform hides from the caller that something requires grad."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        needs_stats = True
    return Results(*ops.attention(*Attention(operands, numbers, needs_stats).flat()))


def _below_autograd[R](operator: torch._ops.OpOverload[..., R], keys: torch._C.DispatchKeySet,
                       args: Sequence[object]) -> R:
    with torch._C._AutoDispatchBelowAutograd():
        return operator.redispatch(keys & torch._C._after_autograd_keyset, *args)


def _recorded(operator: ops.Operator, args: Sequence[object]) -> ops.Operator:
    """The operator itself, or, while a tracer records a call that will be launched directly, that of `ops.DIRECT`."""
    if operator not in ops.DIRECT or not tracing.is_traced():
        return operator
    operands, numbers = RowAnchor.of(args[:_NUM_ARGUMENTS])
    if operator is ops.attention:
        is_direct = tracing.is_direct(operands, numbers, "forward")
    else:
        call = AttentionBackward.of(args)
        # Else lse alone, or with the gradients of a score function's arrays, which goes through DLPack.
        is_launched = call.results.stats.dim() == 4 and not (
            call.needs.score_floats and operands.score_floats is not None)
        is_direct = is_launched and tracing.is_direct(operands, numbers, "backward") and (
            operands.bias is None or not call.needs.bias or tracing.is_direct(operands, numbers, "dbias"))
    return ops.DIRECT[operator] if is_direct else operator


class _Call(NamedTuple):
    """What a kernel was called with, apart from its arguments.

    autograd runs a function's forward and jvp with recording switched off. Outer transforms would take that for the
    user's choice and record nothing, so both run in the modes in which the kernel was called.
    """

    operator: ops.Operator
    keys: torch._C.DispatchKeySet
    grad_mode: bool
    forward_mode: bool

    @contextlib.contextmanager
    def modes(self) -> Iterator[None]:
        with torch.set_grad_enabled(self.grad_mode), forward_ad._set_fwd_grad_enabled(self.forward_mode):
            yield

    def below_autograd(self, args: Sequence[object]) -> tuple[torch.Tensor, ...]:
        with self.modes():
            return _below_autograd(_recorded(self.operator, args), self.keys, args)


class Context(Protocol):
    """What autograd hands to the methods of a function; they keep what is not a tensor as its attributes."""

    numbers: Numbers

    @property
    def saved_tensors(self) -> tuple[torch.Tensor, ...]: ...  # None where None was saved

    @property
    def needs_input_grad(self) -> tuple[bool, ...]: ...

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...


class _Context(Context, Protocol):
    call: _Call
    needs: PerArray[bool]
    lse_alone: bool

    def save_for_forward(self, *tensors: torch.Tensor | None) -> None: ...


def _require_forward_mode(query: torch.Tensor) -> None:
    if query.dtype != torch.float64:
        raise NotImplementedError(
            f"scaled_dot_product_attention has no forward-mode derivative for {query.dtype}: fused kernels compute "
            "reverse mode alone. Use reverse mode (backward, torch.func.vjp, torch.func.jacrev), float64 tensors, or "
            "torch's math backend (torch.nn.attention.sdpa_kernel).")


_Tangents = PerArray[torch.Tensor | None]


def _tangents(given: _Tangents, of: _Tangents) -> _Tangents:
    """The tangents that have the shape of their tensors; None, zero, for others: (0,) marks an unneeded gradient."""
    return PerArray(*(None if x is None or t is None or t.shape != x.shape else t
                      for x, t in zip(of, given, strict=True)))


def _primals(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Drops the tangents of the tensors: with them, the formulas would be differentiated too."""
    return [None if x is None else forward_ad.unpack_dual(x, level=0).primal for x in tensors]


class _Attention(_SingleLevelFunction):
    """`attention`, of its arguments and the `_Call`."""

    @staticmethod
    def forward(ctx: _Context, *given: object) -> tuple[torch.Tensor, ...]:
        *args, call = given
        assert isinstance(call, _Call)
        ctx.call = call
        out, stats = ctx.call.below_autograd(args)
        operands, ctx.numbers, _ = Attention.of(args)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*operands, out, stats)
        ctx.save_for_forward(*operands, out, stats)
        return out, stats

    @staticmethod
    def backward(ctx: _Context, dout: torch.Tensor | None,
                 dstats: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        *tensors, out, stats = ctx.saved_tensors
        operands, needs = Operands._make(tensors), PerArray.among(ctx.needs_input_grad)
        if stats.dim() == 1:  # not asked for: a transform hid from the caller that something requires grad
            out, stats = ops.attention(*Attention(operands, ctx.numbers, needs_stats=True).flat())
        grads = ops.attention_backward(*AttentionBackward(
            operands, ctx.numbers, Results(out, stats), Cotangents(dout, dstats), needs).flat())
        wanted = PerArray(*(grad.to(x.dtype) if needed and x is not None else None  # partial ones are float32
                            for grad, x, needed in zip(grads, operands.differentiable, needs, strict=True)))
        return wanted.among_arguments(len(ctx.needs_input_grad))

    @staticmethod
    def jvp(ctx: _Context, *tangents: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        with ctx.call.modes():
            *tensors, out, stats = _primals(ctx.saved_tensors)
            operands = Operands._make(tensors)
            _require_forward_mode(operands.query)
            of_x = _tangents(PerArray.among(tangents), operands.differentiable)
            cotangents = Cotangents(torch.zeros_like(out), None if stats.dim() == 1 else torch.zeros_like(stats))
            *_, t_out, t_stats = ops.attention_double_backward(*AttentionDoubleBackward(
                operands, ctx.numbers, of_x, cotangents).flat())
            return t_out, t_stats


def _require_own_results(ctx: _Context) -> None:
    if ctx.lse_alone:
        raise RuntimeError("partial_attention_backward has no derivative: its out and logsumexp are functions of more "
                           "keys than its own. For second derivatives differentiate partial_attention, which autograd "
                           "does, in float64.")


class _Backward(_SingleLevelFunction):
    """`attention_backward`. Its derivative is total: it goes through out and stats too, which are functions of x."""

    @staticmethod
    def forward(ctx: _Context, *given: object) -> tuple[torch.Tensor, ...]:
        *args, call = given
        assert isinstance(call, _Call)
        ctx.call = call
        grads = ctx.call.below_autograd(args)
        operands, ctx.numbers, results, cotangents, ctx.needs = AttentionBackward.of(args)
        ctx.lse_alone = results.stats.dim() == 3
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*operands, *cotangents)
        ctx.save_for_forward(*operands, *results, *cotangents)
        return grads

    @staticmethod
    def backward(ctx: _Context, *tangents: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        _require_own_results(ctx)
        *tensors, dout, dstats = ctx.saved_tensors
        operands = Operands._make(tensors)
        ops.require_float64(operands.query)
        of_x = _tangents(PerArray(*tangents), operands.differentiable)
        *grads, of_dout, of_dstats = ops.attention_double_backward(*AttentionDoubleBackward(
            operands, ctx.numbers, of_x, Cotangents(dout, dstats)).flat())
        *_, needs_dout, needs_dstats, _, _ = ctx.needs_input_grad  # the last are `needs` and the call
        needs = PerArray.among(ctx.needs_input_grad)
        wanted = PerArray(*(grad if needed else None for grad, needed in zip(grads, needs, strict=True)))
        return (*wanted.among_arguments(len(ctx.needs_input_grad) - 4), of_dout if needs_dout else None,
                of_dstats if needs_dstats else None, None, None)

    @staticmethod
    def jvp(ctx: _Context, *tangents: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        _require_own_results(ctx)
        with ctx.call.modes():
            *tensors, out, stats, dout, dstats = _primals(ctx.saved_tensors)
            operands = Operands._make(tensors)
            _require_forward_mode(operands.query)
            *_, t_dout, t_dstats, _, _ = tangents
            of_x = _tangents(PerArray.among(tangents), operands.differentiable)
            terms = []
            if any(t is not None for t in of_x):
                terms.append(PerArray(*ops.attention_double_backward(*AttentionDoubleBackward(
                    operands, ctx.numbers, of_x, Cotangents(dout, dstats)).flat())[:len(of_x)]))
            if t_dout is not None or t_dstats is not None:
                terms.append(PerArray(*ops.attention_backward(*AttentionBackward(
                    operands, ctx.numbers, Results(out, stats), Cotangents(t_dout, t_dstats), ctx.needs).flat())))
            return tuple(
                _sum([term[i] for term in terms], x) if needed and x is not None else operands.query.new_zeros((0,))
                for i, (needed, x) in enumerate(zip(ctx.needs, operands.differentiable, strict=True)))


def _sum(terms: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    return sum(terms[1:], terms[0]) if terms else torch.zeros_like(like)


class _DoubleBackward(_SingleLevelFunction):
    """`attention_double_backward`, which has no derivative."""

    @staticmethod
    def forward(ctx: _Context, *given: object) -> tuple[torch.Tensor, ...]:
        *args, call = given
        assert isinstance(call, _Call)
        ctx.call = call
        return ctx.call.below_autograd(args)

    @staticmethod
    def backward(ctx: _Context, *_: object) -> NoReturn:
        raise NotImplementedError(
            "scaled_dot_product_attention has no derivative of its second derivatives or of forward mode: none of the "
            "third order, no jvp of a jvp, no backward of a jvp. For a Hessian use torch.func.hessian, torch.func.jvp "
            "of torch.func.grad, or backward twice; for the rest torch's math backend (torch.nn.attention.sdpa_kernel)."
            " A jvp alone can be compiled under torch.no_grad().")

    jvp = backward


def _computed(operator: ops.Operator, keys: torch._C.DispatchKeySet,
              args: Sequence[object]) -> tuple[torch.Tensor, ...]:
    """A call of which nothing is recorded; where it has been launched directly before, without the rest."""
    again, learn = _REPEATED.get(operator, (None, None))
    if again is not None and not functions_intercept():
        found = again(*args)
        if found is not None:
            return found
    results = _below_autograd(_recorded(operator, args), keys, args)
    if learn is not None and nothing_intercepts() and not torch.compiler.is_compiling():
        learn(*args)
    return results


_REPEATED: dict[ops.Operator, tuple[Callable[..., tuple[torch.Tensor, ...] | None], Callable[..., None]]] = {
    **dict.fromkeys((ops.attention, ops.attention_direct), (repeated.forward, repeated.learn_forward)),
    **dict.fromkeys((ops.attention_backward, ops.attention_backward_direct),
                    (repeated.backward, repeated.learn_backward))}
"""What answers a call that is known, and what learns one."""


def _register(operator: ops.Operator, function: type[_SingleLevelFunction]) -> None:
    def kernel(keys: torch._C.DispatchKeySet, *args: object) -> tuple[torch.Tensor, ...]:
        sharding.register_if_needed()
        is_recorded = torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
        # Only `apply` can tell whether there is a tangent; without one it costs nothing.
        if is_recorded or forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
            with enable_single_level_autograd_function():
                modes = torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled()
                results: tuple[torch.Tensor, ...] = function.apply(  # type: ignore[attr-defined]  # not in torch's stub
                    *args, _Call(operator, keys, *modes))
                return results
        return _computed(operator, keys, args)
    ops.library.impl(operator, kernel, "Autograd", with_keyset=True)


def _kept_seed(keys: torch._C.DispatchKeySet, *args: object) -> torch.Tensor:
    """Draws `dropout_seed` and marks it, for partitioners of a traced graph, as a value to save.

    A partitioner recomputes in the backward what is cheaper to compute than to save, random or not: the gradients would
    belong to another dropout. With a memory budget of 0 it ignores the mark.
    """
    if fx_traceback.has_preserved_node_meta() and torch.is_grad_enabled() and _memory_budget() == 0:
        raise RuntimeError("scaled_dot_product_attention with dropout_p > 0 cannot be compiled for training with an "
                           "activation memory budget of 0: the compiler would draw other numbers for the backward. "
                           "Set torch._functorch.config.activation_memory_budget above 0, for instance to 0.01.")
    meta = fx_traceback.current_meta
    before = meta.get(_POLICY)
    meta[_POLICY] = CheckpointPolicy.MUST_SAVE
    try:
        seed: torch.Tensor = _below_autograd(ops.dropout_seed, keys, args)
        return seed
    finally:
        if before is None:
            del meta[_POLICY]
        else:
            meta[_POLICY] = before


_POLICY = "recompute"  # the key of the CheckpointPolicy in a node's metadata


def _memory_budget() -> float:
    from torch._functorch import config
    budget: float = config.activation_memory_budget
    return budget


ops.library.impl(ops.dropout_seed, _kept_seed, "Autograd", with_keyset=True)
for _forward, _backward in (ops.attention, ops.attention_backward), (*ops.DIRECT.values(),):
    _register(_forward, _Attention)
    _register(_backward, _Backward)
_register(ops.attention_double_backward, _DoubleBackward)
