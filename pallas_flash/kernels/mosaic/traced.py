"""A score function as kernels take it: traced for one pair, and evaluated on a tile of pairs in registers.

The function and its derivative by the score are traced once, as JAX's primitives. Steps that depend on arrays alone
are computed by XLA before the launch; the others run in the kernel, each on as few numbers as it depends on: one for
the tile, one a row, one a column, or one a pair (`Value`). Primitives that Mosaic GPU does not lower, or lowers to less
than float32, are written in others (`_REWRITTEN`); what is in neither table is a reason of `why_not`.

An array is read one number at a time, as arr[i, j]: `View` follows it through the indexing that jnp makes of that.
No Mosaic in here: `support` asks on any machine.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from pallas_flash import compat, scores
from pallas_flash.arrays import Array
from pallas_flash.kernels.mosaic.scores import tanh
from pallas_flash.masks import ArrayField

__all__ = ["Place", "Program", "Value", "arrays", "evaluate", "fields", "is_additive", "is_light", "program",
           "uses_batch", "why_not"]

INPUTS = ("score", "batch", "head", "q_pos", "kv_pos")
MAX_ELEMENTS = 2**31 - 1
"""Of an array that kernels read: its elements are numbered in int32."""
_DTYPES = ("bool", "int32", "uint32", "float32")


# -- tracing -----------------------------------------------------------------------------------------------------------

class Atom(NamedTuple):
    """What a step takes or makes: a number that is known, or the value of that number in the program."""

    number: int
    known: Any = None

    @property
    def is_known(self) -> bool:
        return self.number < 0


class Step(NamedTuple):
    """One primitive, applied to values."""

    equation: core.JaxprEqn
    inputs: tuple[Atom, ...]
    outputs: tuple[int, ...]

    @property
    def name(self) -> str:
        return str(self.equation.primitive.name)


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A score function of one pair, and its derivative by the score.

    Attributes:
      types: shape and dtype of every value. The first are the arrays of the function, then `INPUTS`.
      prepared: steps that XLA computes of the arrays before the launch.
      steps: those of each pair.
      value, slope: the score and its derivative.
      read: the values that kernels read from global memory, in the order of their arguments.
    """

    types: tuple[jax.ShapeDtypeStruct, ...]
    num_arrays: int
    prepared: tuple[Step, ...]
    steps: tuple[Step, ...]
    value: Atom
    slope: Atom
    read: tuple[int, ...]

    def input(self, name: str) -> int:
        """The number of one of `INPUTS`."""
        return self.num_arrays + INPUTS.index(name)

    def needed(self, results: Sequence[Atom]) -> tuple[Step, ...]:
        """The steps of each pair that these results need."""
        wanted, found = {atom.number for atom in results}, []
        for step in reversed(self.steps):
            if wanted.intersection(step.outputs):
                found.append(step)
                wanted.update(atom.number for atom in step.inputs)
        return tuple(reversed(found))

    @property
    def is_additive(self) -> bool:
        """Whether the derivative by the score is 1 everywhere."""
        return self.slope.is_known and self.slope.known == 1


@functools.lru_cache(maxsize=1024)
def program(function: scores.Score) -> Program:
    """Traces a function with placeholders for its arrays, in float32."""
    given = [tuple(jax.ShapeDtypeStruct(x.shape, np.float32 if kind == "float" else x.dtype) for x in xs)
             for kind, xs in (("float", scores.floats(function)), ("integer", scores.integers(function)))]
    number, place = jax.ShapeDtypeStruct((), np.float32), jax.ShapeDtypeStruct((), np.int32)

    def both(floats: Sequence[Array], integers: Sequence[Array], score: Array, *where: Array) -> tuple[Array, Array]:
        whole = function.filled(floats, integers)
        found: tuple[Array, Array] = jax.jvp(lambda x: jnp.asarray(whole(x, *where)).astype(np.float32), (score,),
                                             (jnp.ones_like(score),))
        return found

    with jax.enable_x64(False):
        closed = jax.make_jaxpr(both)(*given, number, place, place, place, place)
    return _Tracer(closed, sum(map(len, given))).program()


_INLINED = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr",
            "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr", "checkpoint": "jaxpr", "remat2": "jaxpr"}
"""Primitives that hold a program, and the parameter that it is in."""


def _type(x: core.Var | core.Literal) -> jax.core.ShapedArray:
    assert isinstance(x.aval, jax.core.ShapedArray)
    return x.aval


class _Tracer:
    """Numbers the values of a jaxpr, and sorts its steps."""

    def __init__(self, closed: core.ClosedJaxpr, num_arrays: int) -> None:
        self.types: list[jax.ShapeDtypeStruct] = []
        self.steps: list[Step] = []
        self.num_arrays = num_arrays
        inputs = tuple(map(self._new, closed.in_avals))
        self.of_pair = set(range(num_arrays, len(inputs)))
        self.value, self.slope = self._inline(closed, inputs)

    def _new(self, aval: jax.core.ShapedArray) -> Atom:
        self.types.append(jax.ShapeDtypeStruct(aval.shape, aval.dtype))
        return Atom(len(self.types) - 1)

    def _inline(self, closed: core.ClosedJaxpr, given: Sequence[Atom]) -> tuple[Atom, ...]:
        values = dict(zip(closed.jaxpr.invars, given, strict=True))
        values |= {name: Atom(-1, x) for name, x in zip(closed.jaxpr.constvars, closed.consts, strict=True)}

        def atom(x: core.Var | core.Literal) -> Atom:
            if not isinstance(x, core.Literal):
                return values[x]
            return Atom(-1, np.asarray(x.val, _type(x).dtype)[()])
        for equation in closed.jaxpr.eqns:
            inputs = tuple(map(atom, equation.invars))
            values |= zip(equation.outvars, self._step(equation, inputs), strict=True)
        return tuple(map(atom, closed.jaxpr.outvars))

    def _step(self, equation: core.JaxprEqn, inputs: tuple[Atom, ...]) -> tuple[Atom, ...]:
        name, params = str(equation.primitive.name), equation.params
        if name in _INLINED:
            inner = params[_INLINED[name]]
            return self._inline(inner if hasattr(inner, "consts") else core.ClosedJaxpr(inner, ()), inputs)
        if all(x.is_known for x in inputs) and all(_type(x).shape == () for x in equation.outvars):
            with jax.ensure_compile_time_eval():
                found = equation.primitive.bind(*(x.known for x in inputs), **params)
            return tuple(Atom(-1, np.asarray(x)[()]) for x in (found if equation.primitive.multiple_results
                                                              else [found]))
        outputs = tuple(self._new(_type(x)) for x in equation.outvars)
        self.steps.append(Step(equation, inputs, tuple(x.number for x in outputs)))
        if any(x.number in self.of_pair for x in inputs):
            self.of_pair.update(x.number for x in outputs)
        return outputs

    def program(self) -> Program:
        """The program, its steps sorted into those of arrays and those of pairs."""
        is_of_pair = lambda step: bool(self.of_pair.intersection(step.outputs))
        prepared = tuple(step for step in self.steps if not is_of_pair(step))
        steps = tuple(step for step in self.steps if is_of_pair(step))
        whole = Program(tuple(self.types), self.num_arrays, prepared, steps, self.value, self.slope, ())
        needed = whole.needed((self.value, self.slope))
        used = {x.number for step in needed for x in step.inputs} | {self.value.number, self.slope.number}
        read = tuple(i for i in sorted(used) if i >= 0 and i not in self.of_pair)
        return dataclasses.replace(whole, steps=needed, read=read)


def is_additive(function: scores.Score | None) -> bool:
    """Whether the derivative by the score is 1 everywhere, as it is without a function."""
    return function is None or program(function).is_additive


def is_light(function: scores.Score | None) -> bool:
    """Whether it is additive, too, and reads nothing that depends on positions: then it needs few registers."""
    if function is None:
        return True
    own = program(function)
    placed = {own.input("q_pos"), own.input("kv_pos")}
    for step in own.steps:
        if placed.intersection(x.number for x in step.inputs):
            if step.name == "dynamic_slice":
                return False
            placed.update(step.outputs)
    return own.is_additive


def uses_batch(function: scores.Score) -> bool:
    """Whether the score of a pair depends on its batch entry."""
    own = program(function)
    number = own.input("batch")
    return any(x.number == number for step in own.steps for x in step.inputs) or own.value.number == number


def arrays(function: scores.Score, floats: Sequence[Array], integers: Sequence[Array]) -> tuple[Array, ...]:
    """What kernels read, (elements,) each, of the arrays of a function with placeholders; computed by XLA."""
    own = program(function)
    given = *(jnp.asarray(x, np.float32) for x in floats), *integers
    values: dict[int, Array] = dict(enumerate(given))
    # Primitives do not, as functions of jnp do, mark numbers as varying where arrays vary, inside `shard_map`.
    varying = lambda x: compat.vary_like(jnp.asarray(x), given)
    for step in own.prepared:
        inputs = (varying(x.known) if x.is_known else values[x.number] for x in step.inputs)
        primitive = step.equation.primitive
        found = primitive.bind(*inputs, **step.equation.params)
        values |= zip(step.outputs, map(varying, found if primitive.multiple_results else [found]), strict=True)
    flat = (jnp.asarray(values[i]).reshape(-1) for i in own.read)
    return tuple(x.astype(np.int32) if x.dtype == np.bool_ else x for x in flat)


# -- what kernels take -------------------------------------------------------------------------------------------------

_AS_IT_IS = frozenset((
    "abs", "add", "and", "clamp", "convert_element_type", "div", "eq", "erf", "exp", "exp2", "ge", "gt", "le", "log",
    "logistic", "lt", "max", "min", "mul", "ne", "neg", "not", "one_minus_square", "or", "rem", "rsqrt", "select_n",
    "shift_left", "shift_right_arithmetic", "shift_right_logical", "sign", "sqrt", "square", "sub", "xor"))
"""Primitives of numbers that Mosaic GPU lowers."""
_INDEXING = frozenset(("dynamic_slice", "slice", "squeeze", "reshape", "broadcast_in_dim"))
"""Primitives that lead to one number of an array."""


def _integer_pow(x: Array, *, y: int) -> Array:
    if y < 0:
        return 1 / _integer_pow(x, y=-y)
    result, square, rest = None, x, y
    while rest:
        if rest % 2:
            result = square if result is None else result * square
        rest //= 2
        square = square * square if rest else square
    return jnp.ones_like(x) if result is None else result


def _pow(x: Array, y: np.number) -> Array:
    """x^y, y a known number: of a negative x NaN, unless y is whole."""
    if float(y).is_integer():
        return _integer_pow(x, y=int(y))
    return jnp.exp2(float(y) * jnp.log2(x))


def _floor(x: Array) -> Array:
    """Of numbers beyond int32 all are whole."""
    down = x.astype(np.int32).astype(x.dtype)
    return jnp.where(jnp.abs(x) < 2.0**30, jnp.where(down > x, down - 1, down), x)


def _turned(x: Array, function: Callable[[Array], Array]) -> Array:
    """Sine or cosine by the hardware, which wants angles near 0: whole turns are taken out first."""
    turns = _floor(x * (0.5 / math.pi) + 0.5)
    return function((x - turns * 6.28125) - turns * (2 * math.pi - 6.28125))


_REWRITTEN: dict[str, Callable[..., Array]] = {
    "add_any": lambda x, y: x + y,
    "ceil": lambda x: -_floor(-x),
    "cos": lambda x, **_: _turned(x, jnp.cos),
    "erfc": lambda x: 1 - lax.erf(x),
    "copy": lambda x: x,
    "copy_p": lambda x: x,
    "expm1": lambda x, **_: jnp.exp(x) - 1,
    "floor": _floor,
    "integer_pow": _integer_pow,
    "is_finite": lambda x: jnp.abs(x) < jnp.inf,
    "log1p": lambda x, **_: jnp.log(1 + x),
    "pow": _pow,
    "sin": lambda x, **_: _turned(x, jnp.sin),
    "tanh": lambda x, **_: tanh(x, exact=True),
}
"""What other primitives are written as."""


@functools.lru_cache(maxsize=1024)
def why_not(function: scores.Score) -> tuple[str, ...]:
    """The first reason why kernels cannot run a function with placeholders: what is needed, what there is and what to
    do. Others may only follow from it.
    """
    own = program(function)
    views = _ViewTypes(own)
    found = [reason for step in own.steps if (reason := views.reason_against(step))]
    sizes = (math.prod(own.types[i].shape) for i in own.read)
    found += [f"reads arrays of 1 to {MAX_ELEMENTS} elements, score={function} has one of {size}"
              for size in sizes if not 1 <= size <= MAX_ELEMENTS]
    return tuple(found[:1])


class _ViewTypes:
    """Which values are parts of arrays, not numbers."""

    def __init__(self, own: Program) -> None:
        self.own = own
        self.views = {i for i in own.read if own.types[i].shape}

    def reason_against(self, step: Step) -> str | None:
        """Why a step cannot run in a kernel; None: it can. To be asked in the program's order."""
        is_view = step.inputs and (step.inputs[0].number in self.views)
        shapes = [self.own.types[i].shape for i in step.outputs]
        if is_view and step.name in _INDEXING:
            self.views.update(i for i in step.outputs if self.own.types[i].shape)
            return self._indexing_reason(step)
        if step.name == "broadcast_in_dim" and shapes == [()]:
            return None
        if step.name not in _AS_IT_IS and step.name not in _REWRITTEN:
            advice = ("index arrays down to a number, as arr[i, j]" if step.name == "gather" else
                      'write it in others, or name implementation="xla"')
            return f"takes score functions of known primitives, this one computes {step.name!r} ({advice})"
        if any(shapes) or any(x.number in self.views for x in step.inputs):
            return ("takes score functions that compute with numbers, this one computes "
                    f"{step.name!r} of an array {tuple(next(filter(None, shapes), ()))} that depends on the pair "
                    "(index arrays down to a number first)")
        if step.name == "rem" and self.own.types[step.outputs[0]].dtype == np.float32:
            return ("takes remainders of integers only, this score function has one of floats "
                    "(write x - jnp.floor(x / y) * y)")
        if step.name == "pow" and not step.inputs[1].is_known:
            return "takes powers with a constant exponent, this score function has another (write exp(y * log(x)))"
        wide = [str(self.own.types[i].dtype) for i in step.outputs if self.own.types[i].dtype.name not in _DTYPES]
        return (f"computes score functions in float32 and int32, this one computes {step.name!r} in {wide[0]} "
                "(leave out the conversion)") if wide else None

    def _indexing_reason(self, step: Step) -> str | None:
        whole, part = self.own.types[step.inputs[0].number].shape, self.own.types[step.outputs[0]].shape
        strides = step.equation.params.get("strides") or ()
        if step.name in ("dynamic_slice", "slice"):
            fits = all(size in (1, all_) for size, all_ in zip(part, whole)) and set(strides) <= {1}
        else:
            fits = step.name == "squeeze" or (math.prod(whole) == 1 and part == ())
        return None if fits else (f"reads one number of an array for a pair, this score function reads {part} of "
                                  f"{whole} (index it down to a number, as arr[i, j])")


# -- evaluation --------------------------------------------------------------------------------------------------------

class Value(NamedTuple):
    """A number of a tile: one for all pairs (), one a row (0,), one a column (1,), or one a pair (0, 1)."""

    x: Any
    axes: tuple[int, ...] = ()


class View(NamedTuple):
    """A part of an array in global memory."""

    source: int
    at: tuple[Value | None, ...]  # where on each axis of the array; None: all of it
    axes: tuple[int, ...]  # the axes of the array that this part has, also those of which it has one element


@dataclasses.dataclass(frozen=True)
class Place:
    """How a tile lies in registers, and in which arrays it reads.

    Attributes:
      spread: (x, axes, all axes) -> x on more axes.
      load: (number of the array, element, its axes) -> that element of the array, for each number of `element`.
    """

    spread: Callable[[Array, tuple[int, ...], tuple[int, ...]], Array]
    load: Callable[[int, Array, tuple[int, ...]], Array]


def evaluate(own: Program, results: Sequence[Atom], given: dict[str, Value], place: Place,
             shared: dict[int, Value]) -> list[Value]:
    """Computes results of a program for the pairs of a tile.

    Args:
      given: the values of `INPUTS`.
      shared: values that do not depend on the column, from parts of the same rows before; it gets those of this one.
    """
    values: dict[int, Value | View] = {own.input(name): x for name, x in given.items()}
    values.update(shared)
    for i in own.read:
        shape = own.types[i].shape
        values.setdefault(i, View(i, (None,) * len(shape), tuple(range(len(shape)))))

    def value(atom: Atom) -> Value | View:
        return Value(atom.known) if atom.is_known else values[atom.number]
    for step in own.needed(results):
        if step.outputs[0] in values:
            continue
        found = _run(own, step, [value(x) for x in step.inputs], place)
        values[step.outputs[0]] = found
        if isinstance(found, Value) and 1 not in found.axes:
            shared[step.outputs[0]] = found
    return [_number(own, value(x), place) for x in results]


def _run(own: Program, step: Step, inputs: list[Value | View], place: Place) -> Value | View:
    first = inputs[0]
    if isinstance(first, View) and first.axes:
        part = _part(own, step, first, [_number(own, x, place) for x in inputs[1:]])
        return part if part.axes else _number(own, part, place)
    numbers = [_number(own, x, place) for x in inputs]
    if step.name in ("broadcast_in_dim", "reshape", "squeeze"):
        return numbers[0]
    if step.name == "pow":
        return Value(_pow(numbers[0].x, numbers[1].x), numbers[0].axes)
    axes = tuple(sorted({axis for x in numbers for axis in x.axes}))
    wide = [place.spread(x.x, x.axes, axes) for x in numbers]
    if step.name in _REWRITTEN:
        return Value(_REWRITTEN[step.name](*wide, **step.equation.params), axes)
    return Value(step.equation.primitive.bind(*wide, **step.equation.params), axes)


def _part(own: Program, step: Step, view: View, starts: list[Value]) -> View:
    """The part of an array that an indexing primitive takes."""
    if step.name == "squeeze":
        gone = step.equation.params["dimensions"]
        return view._replace(axes=tuple(axis for i, axis in enumerate(view.axes) if i not in gone))
    if step.name in ("reshape", "broadcast_in_dim"):  # of one element
        return view._replace(axes=())
    sizes = own.types[step.outputs[0]].shape
    whole = own.types[step.inputs[0].number].shape
    if step.name == "slice":
        starts = [Value(np.int32(i)) for i in step.equation.params["start_indices"]]
    at = list(view.at)
    for axis, start, size, of in zip(view.axes, starts, sizes, whole, strict=True):
        if size == 1 and of > 1:
            at[axis] = start
    return view._replace(at=tuple(at))


def _number(own: Program, x: Value | View, place: Place) -> Value:
    """The number that a part of an array is."""
    if isinstance(x, Value):
        return x
    shape, stride, element = own.types[x.source].shape, 1, Value(np.int32(0))
    for size, at in reversed(list(zip(shape, x.at, strict=True))):
        if at is not None:
            clipped = jnp.clip(jnp.asarray(at.x, np.int32), 0, size - 1)
            axes = tuple(sorted({*element.axes, *at.axes}))
            sum_ = place.spread(element.x, element.axes, axes) + place.spread(clipped * stride, at.axes, axes)
            element = Value(sum_, axes)
        stride *= size
    found = place.load(own.read.index(x.source), element.x, element.axes)
    return Value(found != 0 if own.types[x.source].dtype == np.bool_ else found, element.axes)


def fields(function: scores.Score) -> tuple[ArrayField, ...]:
    """Shape and dtype of what kernels read."""
    own = program(function)
    kinds = ((math.prod(own.types[i].shape), own.types[i].dtype) for i in own.read)
    return tuple(ArrayField((count,), np.dtype(np.int32) if kind == np.bool_ else np.dtype(kind))
                 for count, kind in kinds)
