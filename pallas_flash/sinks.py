"""Attention sinks: a logit of each head that takes part in the softmax's denominator and has no value (Xiao et al.,
2023, arXiv:2309.17453; learned, as in gpt-oss).

    lse' = log(exp(lse) + exp(sink))     out' = exp(lse - lse') out

out and lse of any implementation are differentiable, so one pass over out serves all of them, and their kernels do not
know of sinks. It is computed in the dtype of lse, and out' is rounded once more to that of out.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_flash import compat, sharding
from pallas_flash.arrays import Array, Float
from pallas_flash.spec import Layout

__all__ = ["with_sinks"]


def with_sinks(layout: Layout, out: Float[Array, "b t h v"], lse: Float[Array, "b h t"],
               sinks: Float[Array, " h"]) -> tuple[Float[Array, "b t h v"], Float[Array, "b h t"]]:
    """(out, lse) of the softmax that the sinks take part in, from those of the softmax without them.

    A row that attends to nothing, whose lse is -inf (or the smallest number: see `autodiff.forward`), keeps out 0 and
    has the sink as its lse. A sink of -inf changes nothing. Differentiable; the backward keeps out as it came, no copy
    of it in the dtype of lse.
    """
    out, lse, sinks = compat.vary_like((out, lse, sinks), out, lse, sinks)  # sums dsinks over devices that share them
    found: tuple[Array, Array] = _with_sinks(layout, out, lse, sinks)
    return found


@functools.partial(jax.jit, static_argnums=0)
def _with_sinks(layout: Layout, out: Array, lse: Array, sinks: Array) -> tuple[Array, Array]:
    @jax.checkpoint
    def run(out: Array, lse: Array, sinks: Array) -> tuple[Array, Array]:
        share, total = _merged(lse, jnp.broadcast_to(sinks.astype(lse.dtype)[None, :, None], lse.shape))
        share = (share.swapaxes(1, 2) if layout == "BLHD" else share)[..., None]
        return (out.astype(lse.dtype) * share).astype(out.dtype), total
    found: tuple[Array, Array] = sharding.automatic(run, (sharding.place(out), sharding.place(lse)), out, lse, sinks)
    return found


def _merged(lse: Array, sink: Array) -> tuple[Array, Array]:
    """exp(lse - lse') and lse'. The first from sink - lse alone: no difference of infinities where the sink is one, and
    a derivative of full precision where the sink weighs little."""
    nothing, zero = lse <= jnp.finfo(lse.dtype).min, jnp.zeros_like(lse)
    some = jnp.where(nothing, zero, lse)
    share = jnp.where(nothing, zero, jnp.exp(-jnp.logaddexp(zero, sink - some)))
    return share, jnp.where(nothing, sink, jnp.logaddexp(some, sink))
