"""Score functions as data: what the process that compiles is told of a function of the caller's. JAX alone.

A function is traced for one pair, in float32, as kernels take it (`kernels.mosaic.traced`): once as it is, and once
with its derivative by the score, which rules of its own may decide. Both are lists of JAX's primitives on numbers and
arrays, as JSON:

    arrays    of each array of the function: its shape and dtype, those with a gradient first
    value     [equations, what it returns]: of (*arrays, score, batch, head, q_pos, kv_pos), the score
    jvp       of (*arrays, score, batch, head, q_pos, kv_pos, tangent of the score), the score and its tangent

An equation is [primitive, inputs, parameters]. A value is its number, counted from the arguments on; a constant is
[dtype, shape, its bytes in hexadecimal]. What was traced is what is compiled, and functions that compute the same by
the same steps have the same text, wherever they are written.
"""

import dataclasses
import enum
import functools
import itertools
import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.extend.core import primitives

from pallas_flash import scores
from pallas_flash.arrays import Array, Shaped
from pallas_flash.mask_fields import ArrayField

__all__ = ["UnserializableError", "function", "serialized", "split"]

_PRIMITIVES: dict[str, core.Primitive] = {
    str(x.name): x for x in vars(primitives).values() if isinstance(x, core.Primitive)}
_INLINED = ("jaxpr", "call_jaxpr")
"""The parameters in which a primitive holds a program that is the same as itself."""
_CALLS = ("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "checkpoint", "remat2")


class UnserializableError(ValueError):
    """A function that is computed with something that is no primitive on numbers and arrays."""


def split(like: Sequence[Shaped], whole: Array | None) -> tuple[Array, ...]:
    """Arrays of these shapes and dtypes out of one of one axis; None holds zeros."""
    if whole is None:
        return tuple(jnp.zeros(x.shape, x.dtype) for x in like)
    ends = [*itertools.accumulate(math.prod(x.shape) for x in like)]
    return tuple(whole[start:end].reshape(x.shape).astype(x.dtype)
                 for x, start, end in zip(like, [0, *ends], ends, strict=False))


# --- to text ---------------------------------------------------------------------------------------------------------

def serialized(score: scores.Score) -> str:
    """The text of a function with placeholders for its arrays; raises UnserializableError."""
    floats, integers = scores.floats(score), scores.integers(score)
    arrays = [ArrayField(x.shape, np.dtype(np.float32)) for x in floats] + [ArrayField.of(x) for x in integers]

    def value(*args: Array) -> Array:
        own, (number, *place) = args[:len(arrays)], args[len(arrays):]
        whole = score.filled(own[:len(floats)], own[len(floats):])
        return jnp.asarray(whole(number, *place)).astype(np.float32)

    def jvp(*args: Array) -> tuple[Array, Array]:
        own, (number, *place, tangent) = args[:len(arrays)], args[len(arrays):]
        found: tuple[Array, Array] = jax.jvp(lambda x: value(*own, x, *place), (number,), (tangent,))
        return found

    number, where = jax.ShapeDtypeStruct((), np.float32), [jax.ShapeDtypeStruct((), np.int32)] * 4
    given = [*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays), number, *where]
    with jax.enable_x64(False):
        programs = {"value": jax.make_jaxpr(value)(*given), "jvp": jax.make_jaxpr(jvp)(*given, number)}
    return json.dumps({"arrays": [[x.shape, x.dtype.name] for x in arrays],
                       **{name: _Writer(closed).program() for name, closed in programs.items()}},
                      sort_keys=True, separators=(",", ":"), allow_nan=False)


type _Written = int | list[Any]
"""The number of a value, or a constant."""


class _Writer:
    """Writes a jaxpr down, and what it calls in the place of the call."""

    def __init__(self, closed: core.ClosedJaxpr) -> None:
        self._equations: list[list[Any]] = []
        self._count = len(closed.jaxpr.invars)
        self._results = self._inline(closed.jaxpr, closed.consts, range(self._count))

    def program(self) -> list[Any]:
        """The equations, and what they return."""
        return [self._equations, self._results]

    def _inline(self, jaxpr: core.Jaxpr, consts: Sequence[object], given: Sequence[_Written]) -> list[_Written]:
        values: dict[object, _Written] = dict(zip(jaxpr.invars, given, strict=True))
        values |= zip(jaxpr.constvars, map(_constant, consts), strict=True)

        def read(x: core.Var | core.Literal) -> _Written:
            if isinstance(x, core.Literal):
                assert isinstance(x.aval, jax.core.ShapedArray)
                return _constant(np.asarray(x.val, x.aval.dtype))
            return values[x]
        for equation in jaxpr.eqns:
            values |= zip(equation.outvars, self._equation(equation, [*map(read, equation.invars)]), strict=True)
        return [*map(read, jaxpr.outvars)]

    def _equation(self, equation: core.JaxprEqn, given: list[_Written]) -> Sequence[_Written]:
        name = str(equation.primitive.name)
        if name in _CALLS:
            inner = next(equation.params[x] for x in _INLINED if x in equation.params)
            closed = inner if hasattr(inner, "consts") else core.ClosedJaxpr(inner, ())
            return self._inline(closed.jaxpr, closed.consts, given)
        if _PRIMITIVES.get(name) is not equation.primitive:
            raise UnserializableError(f"it computes {name!r}, which is none of jax.extend.core.primitives")
        params = {key: _parameter(name, x) for key, x in equation.params.items()}
        first, self._count = self._count, self._count + len(equation.outvars)
        self._equations.append([name, given, params])
        return range(first, self._count)


def _constant(x: object) -> list[Any]:
    array = np.asarray(x)
    return [array.dtype.name, array.shape, array.tobytes().hex()]


def _parameter(name: str, x: object) -> object:
    """A primitive's parameter; a dtype by its name."""
    if isinstance(x, np.dtype):
        return {"dtype": x.name}
    if type(x) in (tuple, list):  # not named ones, which would not be made again
        return [_parameter(name, part) for part in x]  # type: ignore[attr-defined]
    if x is None or isinstance(x, bool | str):
        return x
    if isinstance(x, int | np.integer) and not isinstance(x, enum.Enum):
        return int(x)
    if isinstance(x, float) and math.isfinite(x):
        return x
    raise UnserializableError(f"{name!r} is told {type(x).__name__}, which is no number")


# --- from text -------------------------------------------------------------------------------------------------------

class _Program(NamedTuple):
    """Equations, and what they return."""

    equations: list[tuple[core.Primitive, list[_Written], dict[str, object]]]
    results: list[_Written]

    @classmethod
    def of(cls, written: list[Any]) -> "_Program":
        equations, results = written
        return cls([(_PRIMITIVES[name], given, {key: _told(x) for key, x in params.items()})
                    for name, given, params in equations], results)

    def __call__(self, *args: Array) -> list[Any]:
        values: list[Any] = [*args]

        def read(x: _Written) -> Any:
            if isinstance(x, int):
                return values[x]
            kind, shape, data = x
            array = np.frombuffer(bytes.fromhex(data), kind).reshape(shape)
            return array if shape else array[()]
        for primitive, given, params in self.equations:
            found = primitive.bind(*map(read, given), **params)
            values.extend(found if primitive.multiple_results else [found])
        return [*map(read, self.results)]


def _told(x: object) -> object:
    if isinstance(x, dict):
        return np.dtype(x["dtype"])
    return tuple(map(_told, x)) if isinstance(x, list) else x


@functools.lru_cache(maxsize=64)
def function(text: str, name: str) -> scores.Score:
    """The function of a text, with placeholders for its arrays; the same object for the same text.

    Args:
      name: what it is shown as.
    """
    read = json.loads(text)
    kinds = [ArrayField(tuple(shape), np.dtype(dtype)) for shape, dtype in read["arrays"]]
    arrays = {f"array_{i}": kind for i, kind in enumerate(kinds)}
    value, jvp = _Program.of(read["value"]), _Program.of(read["jvp"])

    def call(self: Any, score: Array, *place: Array) -> Array:
        own = tuple(getattr(self, field) for field in arrays)

        @jax.custom_jvp
        def of_score(x: Array) -> Array:
            (found,) = value(*own, x, *place)
            return jnp.asarray(found)

        @of_score.defjvp
        def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
            found, slope = jvp(*own, *primals, *place, *tangents)
            return jnp.asarray(found), jnp.asarray(slope)
        return of_score(score)

    kind = dataclasses.make_dataclass(
        "Serialized", [(field, Any) for field in arrays], bases=(scores.Score,), frozen=True,
        namespace={"__call__": call, "__str__": lambda self: name})
    made: scores.Score = kind(**arrays)
    return made
