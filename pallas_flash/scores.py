"""Score functions: what becomes of a score before bias and mask, as a function of itself and of its place.

    score' = f(score, batch, head, q_pos, kv_pos)

`score` is scaled and soft-capped; it and the result are float32 (float64 for float64 input). A function is written for
one pair: all arguments are scalars, traced, and so is the result. It uses jnp, arithmetic and comparisons, never a
Python `if` on an argument. JAX differentiates it.

To write one with numbers or arrays of its own, subclass `Score` as a frozen dataclass and define `__call__`. A field
that holds an array is data: another of the same shape compiles nothing, and where it holds floating-point numbers it
has a gradient. In `__call__` those are of the dtype of the score, so that sums over the pairs are, too. Other fields
are compiled into the program. A plain function that holds no arrays is enough where there is nothing to learn.

Kernels ask this file for a tile of scores at a time: `applied`, `value_and_slope`, `gradients`.
"""

import dataclasses
import dis
import functools
import inspect
import numbers
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pallas_flash import errors, mask_fields
from pallas_flash.arrays import Array, Bool, Float, Int, Shaped
from pallas_flash.mask_fields import ArrayField

__all__ = ["At", "Function", "Pairs", "Score", "applied", "attending", "check_result", "checked", "even_if_large",
           "floats", "gradients", "integers", "is_static", "tile", "value_and_slope"]

Function = Callable[[Array, Array, Array, Array, Array], ArrayLike]
"""A score function: (score, batch, head, q_pos, kv_pos) -> score, all of them scalars."""


class Pairs(NamedTuple):
    """The places of a tile of scores, int32, four axes (batch, head, query, key) each, of the tile's size or 1.

    A tile of a kernel has q_pos (1, 1, q, 1) and kv_pos (1, 1, 1, s), consecutive positions.
    """

    batch: Int[Array, "b 1|h 1 1"]
    head: Int[Array, "1|b h 1 1"]
    q_pos: Int[Array, "1|b 1|h q 1|s"]
    kv_pos: Int[Array, "1|b 1|h 1|q s"]


def tile(batch: int, heads: int, q_pos: Int[Array, " q"], kv_pos: Int[Array, " s"]) -> Pairs:
    """The places of all batch entries and heads at these positions."""
    return Pairs(jnp.arange(batch, dtype=jnp.int32)[:, None, None, None],
                 jnp.arange(heads, dtype=jnp.int32)[None, :, None, None], q_pos[None, None, :, None],
                 kv_pos[None, None, None, :])


def is_static(value: object) -> bool:
    """Whether a field's value is compiled into the program, and not data."""
    holds_arrays = hasattr(value, "dtype") or hasattr(type(value), "with_placeholders")  # a score function, or a mask
    return isinstance(value, np.generic) or not holds_arrays


class Score:
    """Base class; see the module's docstring for what a score function is."""

    is_additive: ClassVar[bool] = False
    """Whether it adds to the score what does not depend on it and has finite derivatives everywhere."""
    is_relative: ClassVar[bool] = False
    """Whether it depends on positions through kv_pos - q_pos alone."""

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        for name in ("is_additive", "is_relative", "on_tile", "expanded"):  # of another function than they are about
            if "__call__" in vars(cls) and name not in vars(cls):
                setattr(cls, name, vars(Score)[name])
        jax.tree_util.register_pytree_with_keys(
            cls, functools.partial(mask_fields.flatten, is_static=is_static),
            functools.partial(mask_fields.unflatten, cls))

    def __call__(self, score: Array, batch: Array, head: Array, q_pos: Array, kv_pos: Array) -> Array:
        """The score of a pair, from what it was before: all are scalars."""
        raise NotImplementedError(f"{type(self).__name__} must define __call__(score, batch, head, q_pos, kv_pos)")

    def on_tile(self, score: Float[Array, "b h q s"], pairs: Pairs) -> Float[Array, "b h q s"]:
        """Calls the function for each pair of a tile."""
        def call(score: Array, *place: Array) -> Array:
            return jnp.asarray(self(score, *place)).astype(score.dtype)
        for axis in reversed(range(4)):
            call = jax.vmap(call, in_axes=(0, *(None if x.shape[axis] == 1 else 0 for x in pairs)))
        return call(score, *(x.squeeze([axis for axis in range(4) if x.shape[axis] == 1]) for x in pairs))

    def expanded(self, q_len: int, kv_len: int) -> "Score":
        """The same function of the positions below these lengths, in the form that tiles read fastest."""
        del q_len, kv_len
        return self

    def require_sizes(self, batch: int, heads: int) -> None:
        """Raises ValueError where an array is of other sizes than these."""

    def __str__(self) -> str:
        defaults = {field.name: field.default for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        shown = [f"{name}={ArrayField.of(value) if hasattr(value, 'shape') else value}"
                 for name, value in mask_fields.values(self).items() if value is not defaults[name]]
        return f"{type(self).__name__}({', '.join(shown)})"

    def with_placeholders(self) -> Self:
        """This function with each array replaced by its `ArrayField`: hashable, what an `AttentionSpec` holds."""
        placeholders: Self = jax.tree.map(ArrayField.of, self)
        return placeholders

    def filled(self, floats: Iterable[Array], integers: Iterable[Array]) -> Self:
        """This function with arrays in place of its own or of its placeholders."""
        floats, integers = iter(floats), iter(integers)
        leaves, structure = jax.tree.flatten(self)
        filled: Self = jax.tree.unflatten(structure, [next(floats if _is_float(x) else integers) for x in leaves])
        return filled


def _is_float(x: Shaped | ArrayField) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.inexact))


def floats(score: "Score | None") -> tuple[Any, ...]:
    """The arrays of a function that have a gradient, or their placeholders, in the order of its fields."""
    return tuple(x for x in jax.tree.leaves(score) if _is_float(x))


def integers(score: "Score | None") -> tuple[Any, ...]:
    """The other arrays of a function, or their placeholders."""
    return tuple(x for x in jax.tree.leaves(score) if not _is_float(x))


# --- what kernels ask ------------------------------------------------------------------------------------------------

def applied(function: Score, score: Float[Array, "b h q s"], pairs: Pairs) -> Float[Array, "b h q s"]:
    """The function of each pair of a tile; -inf hides a pair."""
    return function.on_tile(score, pairs)


def even_if_large(score: Array) -> Array:
    """Clears the last bit of scores from 2^32 on (float64: 2^61), as `softmax.reference_point` does of lse.

    In a row of equal scores, masks of finfo.min say, lse is that score plus the logarithm of the number of keys, which
    is lost where the score is large. The rest of lse holds it if score and lse differ by nothing else.

    Args:
      score: what the softmax is of: after the bias, whose sum with a score may set the last bit again.
    """
    info = jnp.finfo(score.dtype)
    bits = jax.lax.bitcast_convert_type(score, jnp.int64 if info.bits == 64 else jnp.int32)
    even = jax.lax.bitcast_convert_type(bits & -2, score.dtype)
    return jnp.where((abs(score) >= 2.0 ** (info.nmant + 9)) & jnp.isfinite(score), even, score)


def value_and_slope(function: Score, score: Float[Array, "b h q s"],
                    pairs: Pairs) -> tuple[Float[Array, "b h q s"], Float[Array, "b h q s"]]:
    """`applied`, and its derivative with respect to the score."""
    found: tuple[Array, Array] = jax.jvp(lambda s: function.on_tile(s, pairs), (score,), (jnp.ones_like(score),))
    return found


def gradients(function: Score, score: Float[Array, "b h q s"], pairs: Pairs, keep: Bool[Array, "1|b 1|h q s"],
              cotangents: Float[Array, "b h q s"]) -> tuple[Array, ...]:
    """The gradients of the floating-point arrays of a function, summed over a tile.

    Args:
      keep: which pairs attend; the derivatives at others may be anything, NaN too.
      cotangents: those of the function's values.
    """
    given: tuple[Array, ...] = floats(function)
    if not given:
        return ()
    keep = jnp.broadcast_to(keep, score.shape)
    if not function.is_additive:
        score, pairs = attending(score, pairs, keep)
    _, pullback = jax.vjp(lambda x: function.filled(x, integers(function)).on_tile(score, pairs), given)
    (found,) = pullback(jnp.where(keep, cotangents, jnp.zeros_like(cotangents)))
    return tuple(jnp.where(keep.any(), x, jnp.zeros_like(x)) for x in found)


def attending(score: Float[Array, "b h q s"], pairs: Pairs,
              keep: Bool[Array, "b h q s"]) -> tuple[Float[Array, "b h q s"], Pairs]:
    """The tile with each pair that does not attend replaced by one that does: of its head, or where all of the head's
    are hidden, of another. Where a derivative is finite at pairs that attend, it is then finite everywhere, and a
    cotangent of 0 times it is 0. If no pair attends, the one at the front stands for all.
    """
    batch, heads, _, columns = score.shape
    flat = keep.reshape(batch * heads, -1)
    some = flat.any(axis=1)
    donor = jnp.where(some, jnp.arange(batch * heads, dtype=jnp.int32), jax.lax.argmax(some, 0, jnp.int32))
    place = jax.lax.argmax(flat, 1, jnp.int32)[donor]

    def per_head(x: Array) -> Array:
        return x.reshape(batch, heads, 1, 1)
    q_pos, kv_pos = pairs.q_pos.reshape(-1)[place // columns], pairs.kv_pos.reshape(-1)[place % columns]
    found = jax.lax.stop_gradient(score).reshape(batch * heads, -1)[donor, place]
    return jnp.where(keep, score, per_head(found)), Pairs(
        per_head(donor // heads), per_head(donor % heads), jnp.where(keep, pairs.q_pos, per_head(q_pos)),
        jnp.where(keep, pairs.kv_pos, per_head(kv_pos)))


# --- plain functions, and what is checked ----------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class _Plain(Score):
    """A plain function. Equal where it is the same object and holds the same numbers."""

    function: Function
    holds: tuple[tuple[str, object], ...]

    def __str__(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)

    def __call__(self, score: Array, batch: Array, head: Array, q_pos: Array, kv_pos: Array) -> Array:
        return _number(self, self.function(score, batch, head, q_pos, kv_pos))


def _number(score: Score, found: ArrayLike | None) -> Array:
    """What a score function returned, as an array."""
    if found is None:
        raise errors.invalid(f"the score function {score} must return one floating-point number for a pair", "None",
                             "return the score that it makes")
    return jnp.asarray(found)


def _held(function: object, seen: frozenset[int] = frozenset()) -> Iterator[tuple[str, object]]:
    """What a function reads from outside: the names and values of what it closes over, of the globals that it names,
    and of what was bound to it (functools.partial), likewise of the functions among these that come from its module."""
    if isinstance(function, functools.partial):
        yield from ((str(name), value) for name, value in (*enumerate(function.args), *function.keywords.items()))
        function = function.func
    if isinstance(function, types.MethodType):
        yield "self", function.__self__
        function = function.__func__
    if not isinstance(function, types.FunctionType) or id(function) in seen:
        return
    outside, read = inspect.getclosurevars(function), _globals_read(function.__code__)
    of_module = ((name, value) for name, value in outside.globals.items() if name in read)  # not of like attributes
    for name, value in (*outside.nonlocals.items(), *of_module):
        yield name, value
        if getattr(value, "__module__", None) == function.__module__ and callable(value):
            yield from _held(value, seen | {id(function)})


@functools.lru_cache(maxsize=1024)
def _globals_read(code: types.CodeType) -> frozenset[str]:
    return frozenset(x.argval for x in dis.get_instructions(code) if x.opname == "LOAD_GLOBAL")


def _require_no_arrays(name: str, function: Callable[..., object]) -> tuple[tuple[str, object], ...]:
    """The numbers that a function holds; raises ValueError where it holds arrays."""
    held = tuple(_held(function))
    for what, value in held:
        inside = jax.tree.leaves(list(value.values()) if isinstance(value, dict) else value)
        if any(map(_is_array, inside)):
            raise errors.invalid(
                "a score function must not hold arrays, which would have no gradient and be compiled into the program",
                f"{name}, which reads `{what}`, an array",
                "make it a field: @dataclasses.dataclass(frozen=True) class Name(pallas_flash.Score), with the array "
                "as a field and the function as its method __call__(self, score, batch, head, q_pos, kv_pos)")
    return tuple((what, value) for what, value in held if isinstance(value, numbers.Number | str))


def _is_array(x: object) -> bool:
    return isinstance(x, jax.Array | np.ndarray) or errors.is_torch(x)


def checked(score: object) -> Score | None:
    """A `Score`, or a plain function as one; raises ValueError for anything else, and for what cannot be traced."""
    if score is None:
        return None
    if isinstance(score, types.FunctionType | types.MethodType | functools.partial):
        score = _Plain(score, _require_no_arrays(f"score={getattr(score, '__name__', 'a partial')}", score))
    if not isinstance(score, Score):
        raise errors.invalid(
            "score must be a function (score, batch, head, q_pos, kv_pos) -> score, or a pallas_flash.Score",
            f"type(score)={type(score).__name__}", "add an array to the scores as `bias`" if _is_array(score) else
            "write a function, or a class: see pallas_flash.Score")
    kind: type = type(score)
    mask_fields.check_class("score", "score functions", kind)
    _check_method(kind)
    for name, value in mask_fields.values(score).items():
        _check_field(f"{kind.__name__}.{name}", value)
    whole: Score = jax.tree.map(_as_data, score)
    return whole


@functools.lru_cache(maxsize=1024)
def _check_method(kind: type[Score]) -> None:
    _require_no_arrays(f"score={kind.__name__}(...)", kind.__call__)


def _check_field(label: str, value: object) -> None:
    if is_static(value):
        try:
            hash(value)
        except TypeError as error:
            raise errors.invalid(f"{label} must be an array, or be hashable", f"type={type(value).__name__}",
                                 "pass a JAX or NumPy array, or a tuple of numbers") from error
    elif errors.is_torch(value):
        raise errors.invalid(f"{label} must be a JAX or NumPy array", f"type={type(value).__name__}",
                             "convert it, or call torch_bridge.flash_attention")


def _as_data(x: Shaped) -> Shaped:
    """Integers as int32, also in JAX's 64-bit mode."""
    if not jnp.issubdtype(x.dtype, jnp.integer) or x.dtype == jnp.int32:
        return x
    return jax.ShapeDtypeStruct(x.shape, jnp.int32) if isinstance(x, jax.ShapeDtypeStruct) else x.astype(jnp.int32)


def _check_parameters(score: Score) -> None:
    """Raises ValueError unless the function can be called with the score and its place."""
    try:
        parameters = inspect.signature(score.function if isinstance(score, _Plain) else score)
    except ValueError:  # of a function that is not Python's
        return
    try:
        parameters.bind("score", "batch", "head", "q_pos", "kv_pos")
    except TypeError as error:
        raise errors.invalid("a score function must take (score, batch, head, q_pos, kv_pos)", f"{score}{parameters}",
                             "give it these five parameters, also those that it does not use") from error


@functools.lru_cache(maxsize=1024)
def check_result(score: Score, dtype: np.dtype) -> None:
    """Raises ValueError unless a function with placeholders gives one number for a pair, from traced scalars."""
    def as_given(x: Shaped | ArrayField) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, dtype if _is_float(x) else x.dtype)
    number, place = jax.ShapeDtypeStruct((), dtype), jax.ShapeDtypeStruct((), jnp.int32)
    arrays = tuple(tuple(map(as_given, xs)) for xs in (floats(score), integers(score)))
    _check_parameters(score)

    def result(arrays: tuple[tuple[Array, ...], tuple[Array, ...]], *args: Array) -> Array:
        return _number(score, score.filled(*arrays)(*args))
    try:
        traced = jax.make_jaxpr(result)(arrays, number, place, place, place, place)
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError,
            jax.errors.TracerIntegerConversionError) as error:
        raise errors.invalid(f"the score function {score} must work on traced scalars",
                             f"error={type(error).__name__}",
                             "use jnp, arithmetic and comparisons; jnp.where in place of `if`") from error
    (found,) = traced.out_avals
    if found.shape != () or not jnp.issubdtype(found.dtype, jnp.floating):
        raise errors.invalid(f"the score function {score} must return one floating-point number for a pair",
                             f"dtype={found.dtype}, shape={found.shape} for scalars",
                             "index arrays by batch, head and positions down to a scalar")
    if any(isinstance(x, jax.core.Tracer) for x in traced.consts):
        raise errors.invalid(f"the score function {score} must not hold arrays of a program that is being traced",
                             "one that does", "make them fields of a pallas_flash.Score")


@dataclasses.dataclass(frozen=True)
class At(Score):
    """A function at other positions than those of the arrays: within packed sequences, or of a step of decoding.

    Attributes:
      function: the function, which may be relative or additive.
      q_positions, kv_positions: (batch or 1, q_len) and (batch or 1, kv_len) int32, the position of each.
    """

    function: Score
    q_positions: Shaped
    kv_positions: Shaped

    @property
    def is_additive(self) -> bool:  # type: ignore[override]
        return self.function.is_additive

    def __str__(self) -> str:
        return str(self.function)

    def require_sizes(self, batch: int, heads: int) -> None:
        self.function.require_sizes(batch, heads)

    def __call__(self, score: Array, batch: Array, head: Array, q_pos: Array, kv_pos: Array) -> Array:
        at = [jnp.asarray(x)[jnp.minimum(batch, x.shape[0] - 1), jnp.minimum(pos, x.shape[1] - 1)]
              for x, pos in ((self.q_positions, q_pos), (self.kv_positions, kv_pos))]
        return self.function(score, batch, head, *at)
