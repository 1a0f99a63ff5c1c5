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
plain `torch.autograd.Function` would start the transforms anew inside an operator, and `register_autograd` knows no
forward mode: a tangent would be dropped without a word.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.fx.traceback as fx_traceback
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.utils.checkpoint import CheckpointPolicy

from torch_bridge import ops

__all__ = ["functional_attention"]

_ARRAYS = (0, 1, 2, 4)  # query, key, value, bias among an operator's arguments


def functional_attention(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention`, which saves its stats also where a transform hides from the caller that something requires grad."""
    needs_stats = args[10] or (not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active())
    return ops.attention(*args[:10], needs_stats)


def _below_autograd(operator: Any, keys: Any, args: Sequence[Any]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return operator.redispatch(keys & torch._C._after_autograd_keyset, *args)


class _Call(NamedTuple):
    """What a kernel was called with beside its arguments.

    A function's forward and jvp run with recording switched off, which transforms further out would take for the
    user's choice, and record nothing in silence: so they run in the modes that the kernel met.
    """

    operator: Any
    keys: Any
    grad_mode: bool
    forward_mode: bool

    @contextlib.contextmanager
    def modes(self) -> Iterator[None]:
        with torch.set_grad_enabled(self.grad_mode), forward_ad._set_fwd_grad_enabled(self.forward_mode):
            yield

    def below_autograd(self, args: Sequence[Any]) -> Any:
        with self.modes():
            return _below_autograd(self.operator, self.keys, args)


def _require_forward_mode(query: torch.Tensor) -> None:
    if query.dtype != torch.float64:
        raise NotImplementedError(
            f"scaled_dot_product_attention has no forward-mode derivative for {query.dtype}: fused kernels compute "
            "reverse mode alone. Use reverse mode (backward, torch.func.vjp, torch.func.jacrev), float64 tensors, or "
            "torch's math backend (torch.nn.attention.sdpa_kernel).")


def _tangents(tangents: Sequence[torch.Tensor | None], of: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Those that have the shape of their tensors: (0,) stands for a gradient that was not needed, None for zero."""
    return [None if x is None or t is None or t.shape != x.shape else t for x, t in zip(of, tangents, strict=True)]


def _arrays(tensors: Sequence[Any]) -> list[Any]:
    return [tensors[i] for i in _ARRAYS]


def _primals(tensors: Sequence[Any]) -> list[Any]:
    """The tensors without their tangents: a formula that saw those would be differentiated itself."""
    return [None if x is None else forward_ad.unpack_dual(x, level=0).primal for x in tensors]


class _Attention(_SingleLevelFunction):
    """`attention`: its arguments, and the dispatch keys of the call."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        *args, ctx.call = given
        out, stats = ctx.call.below_autograd(args)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*args[:6], out, stats)
        ctx.save_for_forward(*args[:6], out, stats)
        ctx.numbers = args[6:10]
        return out, stats

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor | None, dstats: torch.Tensor | None) -> tuple:
        *problem, out, stats = ctx.saved_tensors
        needs = _arrays(ctx.needs_input_grad)
        if stats.dim() == 1:  # not asked for: a transform hid from the caller that something requires grad
            out, stats = ops.attention(*problem, *ctx.numbers, True)
        grads = ops.attention_backward(*problem, *ctx.numbers, out, stats, dout, dstats, needs)
        dq, dk, dv, dbias = (grad if needed else None for grad, needed in zip(grads, needs, strict=True))
        return dq, dk, dv, None, dbias, *[None] * 7

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple:
        with ctx.call.modes():
            *problem, out, stats = _primals(ctx.saved_tensors)
            _require_forward_mode(problem[0])
            dout, dstats = torch.zeros_like(out), None if stats.dim() == 1 else torch.zeros_like(stats)
            *_, t_out, t_stats = ops.attention_double_backward(
                *problem, *ctx.numbers, *_tangents(_arrays(tangents), _arrays(problem)), dout, dstats)
            return t_out, t_stats


class _Backward(_SingleLevelFunction):
    """`attention_backward`. Its derivative is total: it goes through out and stats too, which are functions of x."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[torch.Tensor, ...]:
        *args, ctx.call = given
        grads = ctx.call.below_autograd(args)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*args[:6], *args[12:14])
        ctx.save_for_forward(*args[:6], *args[10:14])
        ctx.numbers, ctx.needs = args[6:10], args[14]
        return grads

    @staticmethod
    def backward(ctx: Any, *tangents: torch.Tensor | None) -> tuple:
        *problem, dout, dstats = ctx.saved_tensors
        ops.require_float64(problem[0])
        grads = ops.attention_double_backward(
            *problem, *ctx.numbers, *_tangents(tangents, _arrays(problem)), dout, dstats)
        needs = [ctx.needs_input_grad[i] for i in (*_ARRAYS, 12, 13)]
        *of_x, of_dout, of_dstats = (grad if needed else None for grad, needed in zip(grads, needs, strict=True))
        return *of_x[:3], None, of_x[3], *[None] * 7, of_dout, of_dstats, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple:
        with ctx.call.modes():
            *problem, out, stats, dout, dstats = _primals(ctx.saved_tensors)
            _require_forward_mode(problem[0])
            t_dout, t_dstats = tangents[12:14]
            of_x = _tangents(_arrays(tangents), _arrays(problem))
            terms = []
            if any(t is not None for t in of_x):
                terms.append(ops.attention_double_backward(*problem, *ctx.numbers, *of_x, dout, dstats)[:4])
            if t_dout is not None or t_dstats is not None:
                terms.append(ops.attention_backward(*problem, *ctx.numbers, out, stats, t_dout, t_dstats, ctx.needs))
            return tuple(_sum([term[i] for term in terms], x) if needed else problem[0].new_zeros((0,))
                         for i, (needed, x) in enumerate(zip(ctx.needs, _arrays(problem), strict=True)))


def _sum(terms: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    return sum(terms[1:], terms[0]) if terms else torch.zeros_like(like)


class _DoubleBackward(_SingleLevelFunction):
    """`attention_double_backward`, which has no derivative."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[torch.Tensor, ...]:
        *args, ctx.call = given
        return ctx.call.below_autograd(args)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple:
        raise NotImplementedError(
            "scaled_dot_product_attention has no derivative of its second derivatives or of forward mode: none of the "
            "third order, no jvp of a jvp, no backward of a jvp. For a Hessian use torch.func.hessian, torch.func.jvp "
            "of torch.func.grad, or backward twice; for the rest torch's math backend (torch.nn.attention.sdpa_kernel)."
            " A jvp alone can be compiled under torch.no_grad().")

    jvp = backward


def _register(operator: Any, function: Any) -> None:
    def kernel(keys: Any, *args: Any) -> Any:
        is_recorded = torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
        # A tangent would be seen by `apply` alone, and costs nothing there if there is none.
        if is_recorded or forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
            with enable_single_level_autograd_function():
                modes = torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled()
                return function.apply(*args, _Call(operator, keys, *modes))
        return _below_autograd(operator, keys, args)
    ops.library.impl(operator, kernel, "Autograd", with_keyset=True)


def _kept_seed(keys: Any, *args: Any) -> torch.Tensor:
    """`dropout_seed`, marked for partitioners of a traced graph as a value to save.

    They draw again in the backward whatever they find cheaper to compute than to save, whether it is random or not:
    the gradients would be those of another dropout. With a budget of 0 they heed no mark.
    """
    if fx_traceback.has_preserved_node_meta() and torch.is_grad_enabled() and _memory_budget() == 0:
        raise RuntimeError("scaled_dot_product_attention with dropout_p > 0 cannot be compiled for training with an "
                           "activation memory budget of 0: the compiler would draw other numbers for the backward. "
                           "Set torch._functorch.config.activation_memory_budget above 0, for instance to 0.01.")
    meta = fx_traceback.current_meta
    before = meta.get(_POLICY)
    meta[_POLICY] = CheckpointPolicy.MUST_SAVE
    try:
        return _below_autograd(ops.dropout_seed, keys, args)
    finally:
        if before is None:
            del meta[_POLICY]
        else:
            meta[_POLICY] = before


_POLICY = "recompute"  # where a node's metadata have its CheckpointPolicy


def _memory_budget() -> float:
    from torch._functorch import config
    return config.activation_memory_budget


ops.library.impl(ops.dropout_seed, _kept_seed, "Autograd", with_keyset=True)
_register(ops.attention, _Attention)
_register(ops.attention_backward, _Backward)
_register(ops.attention_double_backward, _DoubleBackward)
