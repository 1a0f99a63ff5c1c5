"""Differentiation: the custom_vjp around an implementation, its residuals and cotangents. The only file that knows
about it.

The backward recomputes probabilities from q, k and lse (FlashAttention, Dao et al., 2022), so the residuals are the
operands, out and lse; out and lse carry `checkpoint_name`s, so that a remat policy can keep them and the forward runs
once.
"""

import functools
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_flash import dispatch, errors, sharding
from pallas_flash.spec import AttentionSpec, Gradients, Operands

__all__ = ["RESIDUAL_NAMES", "attend", "backward", "forward"]

RESIDUAL_NAMES = ("pallas_flash_out", "pallas_flash_lse")
"""What a remat policy keeps to avoid a second forward:
jax.checkpoint_policies.save_only_these_names(*RESIDUAL_NAMES)."""


@functools.partial(jax.jit, static_argnums=(0, 1))  # so that calls outside of jit are compiled once
def forward(spec: AttentionSpec, name: str, operands: Operands) -> tuple[Any, Any]:
    """(out, lse) of a spec by the named implementation; what it returns for empty axes needs no kernel.

    lse is that of the anchored scores (`AttentionSpec.anchor`): what `backward` takes, and `attend` turns into the
    caller's.
    """
    def run(operands: Operands) -> tuple[Any, Any]:
        if spec.is_empty:
            return jnp.zeros(spec.out_shape, spec.dtype), jnp.full(spec.lse_shape, -jnp.inf, spec.acc_dtype)
        return dispatch.get(name).forward(spec, operands)
    return sharding.automatic(run, sharding.result_places(spec, operands), operands)


@functools.partial(jax.jit, static_argnums=(0, 1))
def backward(spec: AttentionSpec, name: str, operands: Operands, out: Any, lse: Any, dout: Any, dlse: Any) -> Gradients:
    """Cotangents of q, k, v and bias by the named implementation, from the forward's results and their cotangents."""
    def run(operands: Operands, *saved: Any) -> Gradients:
        if spec.is_empty:
            return Gradients(*(None if x is None else jnp.zeros_like(x) for x in operands[:4]))
        return dispatch.get(name).backward(spec, operands, *saved)
    return sharding.automatic(run, sharding.gradient_places(operands), operands, out, lse, dout, dlse)


def attend(spec: AttentionSpec, name: str, operands: Operands) -> tuple[Any, Any]:
    """(out, lse), differentiable with respect to q, k, v and bias.

    Raises:
      UnsupportedError: on a derivative that the implementation has not: forward mode, or one of second order.
    """
    operands = sharding.vary_together(operands)
    try:
        if dispatch.get(name).differentiates_itself:
            out, lse = forward(spec, name, operands)
        else:
            out, lse = _attend(spec, name, operands[:4], operands[4:])
        return out, _natural(spec, operands, lse) if spec.return_lse and spec.bias is not None else lse
    except TypeError as error:
        if "forward-mode" in str(error):
            raise _no_derivative(name, "forward-mode derivatives (jvp)") from error
        raise


@functools.partial(jax.jit, static_argnums=0)
def _natural(spec: AttentionSpec, operands: Operands, lse: Any) -> Any:
    """The lse of the scores themselves from that of the anchored ones."""
    def run(operands: Operands, lse: Any) -> Any:
        return lse if spec.is_empty else lse + spec.anchor(operands)[..., 0].astype(lse.dtype)
    return sharding.automatic(run, sharding.result_places(spec, operands)[1], operands, lse)


def _no_derivative(name: str, what: str) -> errors.UnsupportedError:
    return errors.unsupported(f"implementation={name!r} has a reverse-mode derivative only", [f"{what} were asked for"],
                              'use implementation="reference", which has derivatives of any order and mode')


def _differentiable_once(function: Any) -> Any:
    """`function(spec, name, ...)` whose derivative is our error instead of one from inside a kernel's loops."""
    once = jax.custom_jvp(function, nondiff_argnums=(0, 1))

    @once.defjvp
    def _refuse(spec: AttentionSpec, name: str, primals: Any, tangents: Any) -> NoReturn:
        raise _no_derivative(name, "derivatives of a derivative")
    return once


_forward_once = _differentiable_once(forward)
_backward_once = _differentiable_once(backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(spec: AttentionSpec, name: str, differentiable: Any, others: Any) -> tuple[Any, Any]:
    return forward(spec, name, Operands(*differentiable, *others))


def _attend_fwd(spec: AttentionSpec, name: str, differentiable: Any, others: Any) -> tuple[Any, Any]:
    operands = Operands(*differentiable, *others)
    out, lse = _forward_once(spec, name, operands)
    out, lse = (checkpoint_name(x, label) for x, label in zip((out, lse), RESIDUAL_NAMES, strict=True))
    return (out, lse), (operands, out, lse)


def _attend_bwd(spec: AttentionSpec, name: str, residuals: Any, cotangents: Any) -> tuple[Any, None]:
    return tuple(_backward_once(spec, name, *residuals, *cotangents)), None


_attend.defvjp(_attend_fwd, _attend_bwd)
