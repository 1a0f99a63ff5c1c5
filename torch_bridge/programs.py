"""The jitted functions of a plan: flat arrays in, flat arrays out. JAX alone.

Each is traced once for a spec. The first operand may carry the wait for torch's stream, so no argument is dropped
(keep_unused).
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_flash import autodiff, scores, softmax
from pallas_flash import spec as specs
from pallas_flash.spec import AttentionSpec, Differentiable, Gradients
from torch_bridge import score_names
from torch_bridge.arguments import Operands, PerArray
from torch_bridge.rules import Rule

__all__ = ["Given", "Program", "Variants", "backward", "double_backward", "forward", "row_anchor"]

_MAX_PROGRAMS = 4096


class Program(NamedTuple):
    """What all jitted functions of a plan are made from; hashable."""

    spec: AttentionSpec
    rule: Rule  # makes the mask of the spec from arrays
    name: str  # the implementation
    where: jax.Device

    def operands(self, arrays: Iterator[jax.Array]) -> specs.Operands:
        """The operands at the front of flat arrays: those that there are, in the order of `arguments.Operands`."""
        spec = self.spec
        there = {*self.rule.given, "query", "key", "value"}
        there |= {"bias"} if spec.bias is not None else set()
        there |= {"seed"} if spec.dropout_rate else set()
        there |= score_names.flat(spec.score)
        given = {name: next(arrays) for name in Operands._fields if name in there}
        seed = jax.lax.bitcast_convert_type(given["seed"], jnp.uint32) if spec.dropout_rate else None
        return specs.Operands(
            q=given["query"], k=given["key"], v=given["value"], bias=given.get("bias"),
            score=score_names.split(scores.floats(spec.score), given.get("score_floats")),
            mask=self.rule.mask(spec, {name: given[name] for name in self.rule.given}),
            score_integers=score_names.split(scores.integers(spec.score), given.get("score_integers")),
            dropout_seed=seed, dropout_origin=None, page_table=None)


class Given(NamedTuple):
    """Which gradients a backward is asked for, and which cotangents it is given."""

    needs: PerArray[bool]
    has_dout: bool
    has_dstats: bool


class Variants[N](dict[N, Callable[..., list[jax.Array]]]):
    """Jitted functions by what is needed of them, each made when it is first asked for."""

    def __init__(self, function: Callable[[N, Iterator[jax.Array]], list[jax.Array]], where: jax.Device) -> None:
        self._function, self._where = function, where

    def __missing__(self, needs: N) -> Callable[..., list[jax.Array]]:
        def on_device(*arrays: jax.Array) -> list[jax.Array]:
            with jax.default_device(self._where):  # while tracing: what kernels ask about "the" device
                results = self._function(needs, iter(arrays))
            assert not {*map(id, results)} & {*map(id, arrays)}, "an operand as a result would be memory nobody holds"
            return results
        self[needs] = jax.jit(on_device, keep_unused=True)
        return self[needs]


@functools.lru_cache(maxsize=_MAX_PROGRAMS)
def forward(program: Program) -> Variants[bool]:
    """Of the operands: out, and stats if they are needed."""
    def attention(needs_stats: bool, arrays: Iterator[jax.Array]) -> list[jax.Array]:
        results = autodiff.forward(program.spec, program.name, program.operands(arrays))
        return [results.out, results.stats] if needs_stats else [results.out]
    return Variants(attention, program.where)


@functools.lru_cache(maxsize=_MAX_PROGRAMS)
def row_anchor(program: Program) -> Callable[..., list[jax.Array]]:
    """Of the operands: what the bias was anchored at, (batch, q_heads, q_len) in the dtype of the statistics."""
    def anchor(_: None, arrays: Iterator[jax.Array]) -> list[jax.Array]:
        spec = program.spec
        found = spec.anchor(program.operands(arrays))[..., 0].astype(spec.acc_dtype)
        return [jnp.broadcast_to(found, spec.lse_shape)]
    return Variants(anchor, program.where)[None]


@functools.lru_cache(maxsize=_MAX_PROGRAMS)
def backward(program: Program) -> Variants[Given]:
    """Of the operands, out, the cotangents that are given and stats: the gradients that are needed."""
    spec = program.spec

    def gradients(given: Given, arrays: Iterator[jax.Array]) -> list[jax.Array]:
        operands, out = program.operands(arrays), next(arrays)
        dout = next(arrays) if given.has_dout else jnp.zeros_like(out)
        dstats = next(arrays) if given.has_dstats else None
        stats = _whole_stats(spec, next(arrays))
        results = specs.Results(out=out.astype(spec.dtype), stats=stats)
        cotangents = specs.Results(
            out=dout.astype(spec.dtype), stats=jnp.zeros_like(stats) if dstats is None else dstats)
        grads = _per_array(autodiff.backward(spec, program.name, operands, results, cotangents))
        return [grad for grad, needed in zip(grads, given.needs, strict=True) if needed and grad is not None]
    return Variants(gradients, program.where)


def _whole_stats(spec: AttentionSpec, stats: jax.Array) -> jax.Array:
    """The statistics of rows, of which lse alone may be known."""
    if stats.shape == spec.stats_shape:
        return stats
    assert spec.bias is None, "lse is that of the scores, and statistics are those of the anchored scores"
    return jnp.stack(softmax.from_lse(stats, softmax.unit(spec.scale, spec.softcap)), axis=2)


def _per_array(grads: Gradients[jax.Array]) -> PerArray[jax.Array | None]:
    return PerArray(query=grads.dq, key=grads.dk, value=grads.dv, bias=grads.dbias,
                    score_floats=score_names.joined(grads.dscore))


@functools.lru_cache(maxsize=_MAX_PROGRAMS)
def double_backward(program: Program) -> Variants[tuple[bool, ...]]:
    """Of the operands, tangents and cotangents, those that are `present`: the gradients of operands and cotangents."""
    spec = program.spec

    def derivative(present: tuple[bool, ...], arrays: Iterator[jax.Array]) -> list[jax.Array]:
        operands = program.operands(arrays)
        *tangents, dout, dstats = (next(arrays) if there else None for there in present)

        def first(given: Differentiable[jax.Array], dout: jax.Array | None,
                  dstats: jax.Array | None) -> Gradients[jax.Array]:
            problem = specs.Operands.of(given, operands.others)
            results = autodiff.forward(spec, "reference", problem)
            cotangents = specs.Results(out=_given_or_zero(dout, results.out),
                                       stats=_given_or_zero(dstats, results.stats))
            grads: Gradients[jax.Array] = autodiff.backward(spec, "reference", problem, results, cotangents)
            return grads
        found, vjp = jax.vjp(first, operands.differentiable, dout, dstats)
        of_x, of_dout, of_dstats = vjp(_tangents(PerArray(*tangents), found))
        return [x for x in (*PerArray(query=of_x.q, key=of_x.k, value=of_x.v, bias=of_x.bias,
                                        score_floats=score_names.joined(of_x.score)), of_dout, of_dstats)
                if x is not None]
    return Variants(derivative, program.where)


def _tangents(given: PerArray[jax.Array | None], grads: Gradients[jax.Array]) -> Gradients[jax.Array]:
    """The tangents of gradients, zeros for those that are None."""
    return Gradients(dq=_given_or_zero(given.query, grads.dq), dk=_given_or_zero(given.key, grads.dk),
                     dv=_given_or_zero(given.value, grads.dv),
                     dbias=None if grads.dbias is None else _given_or_zero(given.bias, grads.dbias),
                     dscore=score_names.split(grads.dscore, given.score_floats))


def _given_or_zero(array: jax.Array | None, like: jax.Array) -> jax.Array:
    return jnp.zeros_like(like) if array is None else array
