"""Masks of classes that kernels do not know, with arrays or beside arrays: a score function hides their pairs.

    score'(s, pair) = score(s, pair) where keep(q_pos, kv_pos), else -inf

so that `mosaic.traced` reads their arrays, a number at a time, and the repair paths know them. Where there is no other
function the derivative stays 1: a weight is 0 where the pair is hidden. No tile is skipped for them; for the other
parts of the mask tiles are, as always.

No Mosaic in here: `support` asks on any machine.
"""

import dataclasses
import functools
import operator
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from pallas_flash import masks, scores
from pallas_flash.arrays import Array
from pallas_flash.filled import filled_part
from pallas_flash.kernels.mosaic import mask_rules, traced
from pallas_flash.packed import Packed
from pallas_flash.spec import AttentionSpec, Operands

__all__ = ["Masked", "as_score", "hiding", "own_parts", "why_not"]


@jax.custom_jvp
def _hidden(score: Array, keep: Array) -> Array:
    """-inf where a pair is not kept; the derivative is 1 everywhere."""
    return jnp.where(keep, score, -jnp.inf)


@_hidden.defjvp
def _hidden_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    score, keep = primals
    return jnp.where(keep, score, -jnp.inf), tangents[0]


@dataclasses.dataclass(frozen=True)
class Masked(scores.Score):
    """A score function, if there is one, and what a canonical mask hides."""

    mask: masks.Mask
    function: scores.Score | None

    def __call__(self, score: Array, batch: Array, head: Array, q_pos: Array, kv_pos: Array) -> Array:
        def own(x: Array) -> Array:
            return x[batch if x.shape[0] > 1 else 0, head if x.shape[1] > 1 else 0]

        kept = [jax.tree.map(own, part).keep(q_pos, kv_pos) for part in self.mask.parts]
        keep = functools.reduce(operator.and_, kept)
        if self.function is None:
            hidden: Array = _hidden(score, keep)
            return hidden
        return jnp.where(keep, self.function(score, batch, head, q_pos, kv_pos), -jnp.inf)


def own_parts(spec: AttentionSpec) -> list[masks.Mask]:
    """The parts of a spec's mask that kernels do not know, and a score function could hide the pairs of; none where the
    whole mask is compiled in, against a cache, or beside a bias, which would be added to what is hidden.
    """
    compiled_in = not spec.mask.has_arrays and spec.score is None
    if compiled_in or spec.bias is not None or filled_part(spec.mask) is not None:
        return []
    return [part for part in spec.mask.parts if not mask_rules.is_known(part) and type(part) is not Packed]


def hiding(spec: AttentionSpec) -> AttentionSpec:
    """The spec that `as_score` returns, which only needs to know shapes."""
    if not own_parts(spec):
        return spec
    score = Masked(_joined(own_parts(spec)), spec.score)
    return dataclasses.replace(spec, mask=_joined(_others(spec, spec.mask)), score=score.with_placeholders())


def as_score(spec: AttentionSpec, operands: Operands) -> tuple[AttentionSpec, Operands]:
    """The same problem, whose score function hides the pairs of all parts of the mask that kernels do not know."""
    if not own_parts(spec):
        return spec, operands
    own = [part for part, known in zip(operands.mask.parts, spec.mask.parts, strict=True) if known in own_parts(spec)]
    function = None if spec.score is None else spec.score.filled(operands.score, operands.score_integers)
    score = Masked(_joined(own), function)
    given = operands._replace(mask=_joined(_others(spec, operands.mask)), score=scores.floats(score),
                              score_integers=scores.integers(score))
    return hiding(spec), given


def why_not(spec: AttentionSpec) -> list[str]:
    """The reasons why a score function cannot hide the pairs of a spec's own parts."""
    if not (parts := own_parts(spec)):
        return []
    names = ", ".join(sorted({type(part).__name__ for part in parts}))
    try:
        reasons = traced.why_not(Masked(_joined(parts), None).with_placeholders())
    except Exception as error:  # what keep raises: it was promised positions, not one pair
        reasons = (f"keep must work on one pair, {type(error).__name__}: {error}",)
    return [f"reads masks of other classes pair by pair, as score functions, {names} is none ({reason}; or give its "
            "pairs as Dense)" for reason in reasons]


def _others(spec: AttentionSpec, mask: masks.Mask) -> list[masks.Mask]:
    own = own_parts(spec)
    return [part for part, known in zip(mask.parts, spec.mask.parts, strict=True) if known not in own]


def _joined(parts: Iterable[masks.Mask]) -> masks.Mask:
    return functools.reduce(operator.and_, parts, masks.Full())
