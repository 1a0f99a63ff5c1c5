"""Score functions by name: operators take no Python functions, and a compiled graph keeps none. JAX alone.

A name is a hash of what the function computes: its StableHLO for the scalars of a pair and for its arrays, and that of
its derivatives, which rules of its own (`jax.custom_jvp`) may decide. Functions that are written alike, or are called
alike, and compute something else therefore have two names, and equal ones share what is compiled.

An operator has the arrays of a function as two tensors of one axis: those with a gradient, one after the other, in the
dtype of the scores; and the others, as int32.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from pallas_flash import errors, mask_fields, scores
from pallas_flash.arrays import Array
from pallas_flash.mask_fields import ArrayField
from torch_bridge.direct import score_ir
from torch_bridge.direct.score_ir import split

__all__ = ["ArrayKind", "as_data", "field_names", "fits", "flat", "from_fields", "function", "host", "is_array",
           "joined", "name_of", "split"]


class ArrayKind(NamedTuple):
    """What a name says of an array."""

    shape: tuple[int, ...]
    kind: str  # "float", "int" or "bool"


_functions: dict[str, scores.Score] = {}
"""By name, with placeholders for arrays. None is ever forgotten: a compiled graph may name it."""
_traced: dict[tuple[str, str], Callable[..., list[Array]]] = {}
"""Plain functions, by their names and the dtype of the score."""


def function(name: str) -> scores.Score:
    """The function of a name, with placeholders for its arrays; RuntimeError where this process has not named it."""
    found = _functions.get(name)
    if found is None:
        raise RuntimeError(
            "a compiled graph names a score function by a hash of what it computes, and this process must have seen "
            f"the function before, got score={name!r}, which it has not. Call torch_bridge.flash_attention(..., "
            "score=...) once with the same function, and arrays of the same shapes, before the graph runs; tensors on "
            'the device "meta" will do.')
    return found


@functools.lru_cache(maxsize=1024)
def as_data(name: str) -> tuple[str | None, str]:
    """(the text of the function of a name (score_ir.py), "") or, where it has none, (None, why); raises as `function`.
    """
    try:
        return score_ir.serialized(function(name)), ""
    except score_ir.UnserializableError as error:
        return None, str(error)


def fits(name: str, batch: int, heads: int) -> bool:
    """Whether the arrays of the function of a name are of these sizes, where it asks for them."""
    try:
        function(name).require_sizes(batch, heads)
    except ValueError:
        return False
    return True


def field_names(kind: type) -> tuple[str, ...] | None:
    """The names of the fields of a class of score functions; None: it is none."""
    is_class = issubclass(kind, scores.Score) and dataclasses.is_dataclass(kind)
    return tuple(field.name for field in dataclasses.fields(kind)) if is_class else None


def is_array(kind: type) -> bool:
    """Whether objects of this type are arrays of JAX."""
    return issubclass(kind, jax.Array)


def name_of(score: object, arrays: Sequence[ArrayKind], is_float64: bool) -> str:
    """The name of a plain function, or of a `Score`, whose arrays, which may be of any library, are these; raises
    ValueError where pallas_flash does.
    """
    dtype, is_plain = np.dtype(np.float64 if is_float64 else np.float32), not isinstance(score, scores.Score)
    if isinstance(score, scores.Score):
        leaves, structure = jax.tree.flatten(score)
        if len(leaves) != len(arrays):
            raise errors.invalid(f"a field of {type(score).__name__} must be an array, a number, or another Score",
                                 f"{len(leaves)} arrays, of which {len(arrays)} are in such fields",
                                 "give each array a field of its own")
        for name, value in mask_fields.values(score).items():
            if scores.is_static(value) and any(map(errors.is_torch, jax.tree.leaves(value))):
                raise errors.invalid(f"{type(score).__name__}.{name} must not hold tensors inside a "
                                     f"{type(value).__name__}", "some", "give each tensor a field of its own")
        dtypes = {"float": dtype, "int": np.dtype(np.int32), "bool": np.dtype(bool)}
        score = jax.tree.unflatten(structure, [ArrayField(x.shape, dtypes[x.kind]) for x in arrays])
    with jax.enable_x64(is_float64):
        checked = scores.checked(score)
        assert checked is not None
        return _name(checked, dtype, is_plain)


def from_fields(kind: type[scores.Score], static: Sequence[tuple[str, object]], names: Sequence[str],
                arrays: Sequence[ArrayKind], is_float64: bool) -> str:
    """`name_of` a `Score` that there is not yet, while PyTorch traces what will make it.

    Args:
      static: the names and values of fields that hold no arrays.
      names, arrays: the fields that hold an array, and these.
    """
    made = mask_fields.unflatten(kind, (tuple(names), tuple(static)), [np.zeros((), np.float32)] * len(names))
    return name_of(made, arrays, is_float64)


@functools.lru_cache(maxsize=1024)
def _name(score: scores.Score, dtype: np.dtype, is_plain: bool) -> str:
    scores.check_result(score, dtype)
    kind = type(score)
    digest = hashlib.sha256(repr((kind.__module__, kind.__qualname__, score.is_additive, score.is_relative, str(dtype),
                                  [str(x) for x in jax.tree.leaves(score)])).encode())
    value, number, place = _of_scalars(score), jax.ShapeDtypeStruct((), dtype), jax.ShapeDtypeStruct((), jnp.int32)
    given = tuple(tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in xs)
                  for xs in (scores.floats(score), scores.integers(score)))
    args = *given, number, place, place, place, place
    for piece in _text(value, args):
        digest.update(piece)
    slopes: Callable[..., object] = value
    for _ in range(2 if dtype == np.float64 else 1):  # and in float64 the second derivatives
        slopes = _derivative(slopes)
        try:
            for piece in _text(slopes, args):
                digest.update(piece)
        except (TypeError, ValueError, NotImplementedError):  # there is no such derivative: who asks for it is told
            break
    name = digest.hexdigest()[:32]
    if name not in _functions:
        _functions[name] = _as_traced(name, score, dtype) if is_plain else score
    return name


def _as_traced(name: str, score: scores.Score, dtype: np.dtype) -> "_Traced":
    """A plain function as it is now: what it reads may change. In float32, too, in which kernels look at any."""
    value = _of_scalars(score)
    for each in {dtype, np.dtype(np.float32)}:
        number, place = jax.ShapeDtypeStruct((), each), jax.ShapeDtypeStruct((), jnp.int32)
        with jax.enable_x64(each == np.float64):
            closed = jax.make_jaxpr(lambda *given: value((), (), *given))(number, place, place, place, place)
        _traced[name, str(each)] = jax.extend.core.jaxpr_as_fun(closed)
    return _Traced(name, str(score))


def _of_scalars(score: scores.Score) -> Callable[..., Array]:
    def value(floats: tuple[Array, ...], integers: tuple[Array, ...], number: Array, *place: Array) -> Array:
        return jnp.asarray(score.filled(floats, integers)(number, *place))
    return value


def _derivative(function: Callable[..., object]) -> Callable[..., object]:
    """The gradients of the results of a function of (floats, integers, number, *place), for cotangents of 1."""
    def slopes(floats: tuple[Array, ...], integers: tuple[Array, ...], number: Array, *place: Array) -> object:
        results, pullback = jax.vjp(lambda x, s: function(x, integers, s, *place), floats, number)
        return pullback(jax.tree.map(jnp.ones_like, results))
    return slopes


def _text(function: Callable[..., object], args: tuple[object, ...]) -> Iterator[bytes]:
    """What a function computes, without names and places of its source."""
    traced = jax.jit(function).trace(*args)
    yield traced.lower(lowering_platforms=("cpu",)).as_text().encode()
    for constant in traced.jaxpr.consts:
        array = np.asarray(constant)
        yield repr((array.dtype, array.shape)).encode() + array.tobytes()


@dataclasses.dataclass(frozen=True)
class _Traced(scores.Score):
    """A plain function as it was when it was named. Equal where the names are."""

    name: str
    shown: str = dataclasses.field(compare=False)
    is_additive: ClassVar[bool] = False

    def __str__(self) -> str:
        return self.shown

    def __call__(self, score: Array, batch: Array, head: Array, q_pos: Array, kv_pos: Array) -> Array:
        (found,) = _traced[self.name, str(score.dtype)](score, batch, head, q_pos, kv_pos)
        return found


# --- the arrays of a function in two -----------------------------------------------------------------------------


def flat(score: scores.Score | None) -> set[str]:
    """Which operands hold the arrays of a function."""
    there = {"score_floats": scores.floats(score), "score_integers": scores.integers(score)}
    return {name for name, arrays in there.items() if arrays}


def joined(arrays: Sequence[Array]) -> Array | None:
    """`split`, undone; None of no arrays."""
    return jnp.concatenate([x.reshape(-1) for x in arrays]) if arrays else None


def host(array: Array) -> np.ndarray:
    """A copy of an array of JAX in memory of the host, in a dtype that PyTorch has."""
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        return np.array(array)
    return np.array(array, np.float64 if array.dtype == np.float64 else np.float32)
