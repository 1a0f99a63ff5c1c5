"""Head dimensions that a kernel cannot address: copies of the arrays with zeros up to the next multiple of 8.

TMA and cp.async read rows in units of 16 bytes, 8 elements of a 16-bit type. Zeros in q and k add nothing to a score,
those in v and dout nothing to dP, and the columns of out, dq, dk and dv that belong to them are cut off. The scale is
that of the problem; neither lse nor dropout's bits depend on a head dimension.

Copies are made around the whole call, before `vmap` folds its axis and before XLA splits the call over devices, which
both leave the head dimension alone. A problem whose dimensions are multiples of 8 passes through untouched.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from pallas_flash.arrays import Array
from pallas_flash.spec import AttentionSpec, Gradients, Operands, Results

__all__ = ["UNIT", "Copies", "copies", "cut_gradients", "cut_results", "padded", "padded_operands", "padded_results"]

UNIT = 8
"""Elements: head dimensions that kernels read are multiples of it."""


def padded(spec: AttentionSpec) -> AttentionSpec:
    """The problem that kernels compute in the place of `spec`; `spec` itself, where nothing is copied."""
    d, d_v = (-(-dim // UNIT) * UNIT for dim in (spec.d, spec.d_v))
    return spec if (d, d_v) == (spec.d, spec.d_v) else dataclasses.replace(spec, d=d, d_v=d_v)


# -- arrays ------------------------------------------------------------------------------------------------------------

def padded_operands(spec: AttentionSpec, operands: Operands) -> Operands:
    """The operands of `padded(spec)`."""
    wide = padded(spec)
    return operands._replace(q=_filled(operands.q, wide.d), k=_filled(operands.k, wide.d),
                             v=_filled(operands.v, wide.d_v))


def padded_results(spec: AttentionSpec, results: Results[Array]) -> Results[Array]:
    """The results of `padded(spec)`, or their cotangents; also without out."""
    return results if results.out is None else results._replace(out=_filled(results.out, padded(spec).d_v))


def cut_results(spec: AttentionSpec, results: Results[Array]) -> Results[Array]:
    """The results of `spec`, of those of `padded(spec)`."""
    return results._replace(out=_cut(results.out, spec.d_v))


def cut_gradients(spec: AttentionSpec, gradients: Gradients[Array]) -> Gradients[Array]:
    """The gradients of `spec`, of those of `padded(spec)`."""
    return gradients._replace(dq=_cut(gradients.dq, spec.d), dk=_cut(gradients.dk, spec.d),
                              dv=_cut(gradients.dv, spec.d_v))


def _filled(x: Array, columns: int) -> Array:
    missing = columns - x.shape[-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x


def _cut(x: Array, columns: int) -> Array:
    return lax.slice_in_dim(x, 0, columns, axis=-1) if x.shape[-1] > columns else x


# -- what `explain` says -----------------------------------------------------------------------------------------------

class Copies(NamedTuple):
    """What is copied for a problem around its kernels, one line for each pass.

    Attributes:
      run: the problem that the forward's kernels compute, whose schedule they have.
      backward_run: the one of the backward's.
      instead: which other problem the forward runs, and why, if it is not the copied one alone.
    """

    run: AttentionSpec
    backward_run: AttentionSpec
    forward: str
    backward: str  # empty: nothing is copied
    instead: str = ""


def copies(spec: AttentionSpec) -> Copies | None:
    """What is copied so that kernels can run `spec`, by name, with the bytes that the copies write; None: nothing."""
    wide = padded(spec)
    if wide == spec:
        return None
    dims = ", ".join(f"{name}={getattr(wide, name)}" for name in ("d", "d_v")
                     if getattr(wide, name) != getattr(spec, name))

    def line(read: tuple[str, ...], made: tuple[str, ...]) -> str:
        read, made = (tuple(name for name in names if _columns(wide, name) > _columns(spec, name))
                      for names in (read, made))
        size = (spec.dtype.itemsize * sum(_rows(wide, name) * _columns(wide, name) for name in read)
                + spec.result_dtype.itemsize * sum(_rows(spec, name) * _columns(spec, name) for name in made))
        cut = f", {', '.join(made)} cut back" if made else ""
        return f"{', '.join(read)} filled with zeros to {dims}{cut}: {size:,} bytes written"

    saved = ("dout",) if spec.partial else ("out", "dout")  # the backward of a part takes no out
    return Copies(wide, wide, line(("q", "k", "v"), ("out",)), line(("q", "k", "v", *saved), ("dq", "dk", "dv")))


def _columns(spec: AttentionSpec, name: str) -> int:
    return spec.d if name.removeprefix("d") in ("q", "k") else spec.d_v


def _rows(spec: AttentionSpec, name: str) -> int:
    of_keys = name.removeprefix("d") in ("k", "v")
    return spec.batch * (spec.kv_len * spec.kv_heads if of_keys else spec.q_len * spec.q_heads)
