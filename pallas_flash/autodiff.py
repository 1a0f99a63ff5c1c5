"""Differentiation: the custom_vjp around an implementation, its residuals and cotangents. The only file that knows
about it.

The backward recomputes probabilities from q, k and lse (FlashAttention, Dao et al., 2022), so the residuals are the
operands, out and lse; out and lse carry `checkpoint_name`s, so that a remat policy can keep them and the forward runs
once.
"""

import contextlib
import functools
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_flash import device, dispatch, errors, sharding
from pallas_flash.device import Device
from pallas_flash.spec import AttentionSpec, Gradients, Operands

__all__ = ["RESIDUAL_NAMES", "Target", "attend", "backward", "forward"]

RESIDUAL_NAMES = ("pallas_flash_out", "pallas_flash_lse")
"""What a remat policy keeps to avoid a second forward:
jax.checkpoint_policies.save_only_these_names(*RESIDUAL_NAMES)."""


class Target(NamedTuple):
    """What runs, and for which device: schedules may depend on it, so a program is kept for each."""

    name: str
    device: Device


def _on(where: Device | None) -> contextlib.AbstractContextManager[None]:
    """Kernels traced in this context ask `device.current()` and get `where`, or JAX's default."""
    return device.assume(where) if where is not None else contextlib.nullcontext()


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames="where")  # so that calls outside of jit compile once
def forward(spec: AttentionSpec, name: str, operands: Operands, *, where: Device | None = None) -> tuple[Any, Any]:
    """(out, lse) of a spec by the named implementation; what it returns for empty axes needs no kernel.

    `where` is the device, if it is not JAX's default. lse is that of the anchored scores (`AttentionSpec.anchor`): what
    `backward` takes, and `attend` turns into the caller's.
    """
    def run(operands: Operands) -> tuple[Any, Any]:
        if spec.is_empty:
            return jnp.zeros(spec.out_shape, spec.dtype), jnp.full(spec.lse_shape, -jnp.inf, spec.acc_dtype)
        with _on(where):
            return dispatch.get(name).forward(spec, operands)
    return sharding.automatic(run, sharding.result_places(spec, operands), operands)


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames="where")
def backward(spec: AttentionSpec, name: str, operands: Operands, *saved: Any, where: Device | None = None) -> Gradients:
    """Cotangents of q, k, v and bias by the named implementation, from `saved`: out, lse, dout, dlse."""
    def run(operands: Operands, *saved: Any) -> Gradients:
        if spec.is_empty:
            return Gradients(*(None if x is None else jnp.zeros_like(x) for x in operands[:4]))
        with _on(where):
            return dispatch.get(name).backward(spec, operands, *saved)
    return sharding.automatic(run, sharding.gradient_places(operands), operands, *saved)


def attend(spec: AttentionSpec, target: Target, operands: Operands) -> tuple[Any, Any]:
    """(out, lse), differentiable with respect to q, k, v and bias.

    Raises:
      UnsupportedError: on a derivative that the implementation has not: forward mode, or one of second order.
    """
    operands = sharding.vary_together(operands)
    try:
        if dispatch.get(target.name).differentiates_itself:
            out, lse = _forward(spec, target, operands)
        else:
            out, lse = _attend(spec, target, operands[:4], operands[4:])
        return out, _natural(spec, operands, lse) if spec.return_lse and spec.bias is not None else lse
    except TypeError as error:
        if "forward-mode" in str(error):
            raise _no_derivative(target.name, "forward-mode derivatives (jvp)") from error
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
    """`function(spec, target, ...)` whose derivative is our error instead of one from inside a kernel's loops."""
    once = jax.custom_jvp(function, nondiff_argnums=(0, 1))

    @once.defjvp
    def _refuse(spec: AttentionSpec, target: Target, primals: Any, tangents: Any) -> NoReturn:
        raise _no_derivative(target.name, "derivatives of a derivative")
    return once


def _forward(spec: AttentionSpec, target: Target, operands: Operands) -> tuple[Any, Any]:
    return forward(spec, target.name, operands, where=target.device)


def _backward(spec: AttentionSpec, target: Target, operands: Operands, *saved: Any) -> Gradients:
    return backward(spec, target.name, operands, *saved, where=target.device)


_forward_once = _differentiable_once(_forward)
_backward_once = _differentiable_once(_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(spec: AttentionSpec, target: Target, differentiable: Any, others: Any) -> tuple[Any, Any]:
    return _forward(spec, target, Operands(*differentiable, *others))


def _attend_fwd(spec: AttentionSpec, target: Target, differentiable: Any, others: Any) -> tuple[Any, Any]:
    operands = Operands(*differentiable, *others)
    out, lse = _forward_once(spec, target, operands)
    out, lse = (checkpoint_name(x, label) for x, label in zip((out, lse), RESIDUAL_NAMES, strict=True))
    return (out, lse), (operands, out, lse)


def _attend_bwd(spec: AttentionSpec, target: Target, residuals: Any, cotangents: Any) -> tuple[Any, None]:
    return tuple(_backward_once(spec, target, *residuals, *cotangents)), None


_attend.defvjp(_attend_fwd, _attend_bwd)
