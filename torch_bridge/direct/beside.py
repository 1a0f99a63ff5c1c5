"""What JAX computes beside the launches of a pass, as operations that torch runs (`operations.py`). JAX alone.

A function of integers, booleans and floats is traced. What of it is known without its arguments is computed here; the
rest is written down operation by operation, each once, in the words of `plan.OPERATIONS`. Arrays are not repeated along
axes along which they are broadcast: such an axis has one element where it is stored. Unsigned words are kept as signed
ones of the same bits.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.extend import core
from jax.typing import ArrayLike

from torch_bridge.direct import intervals
from torch_bridge.direct.plan import Operation, Parameter

__all__ = ["Operation", "Operations", "UntranslatableError", "needed", "traced"]

_FLOATS = {"bfloat16", "float16", "float32"}
_DTYPES = {"bool": "bool", "int32": "int32", "uint32": "int32"} | {name: name for name in sorted(_FLOATS)}
_CALLS = ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call")
_OF_SIGNED = {"max", "min", "div", "lt", "le", "gt", "ge", "clamp", "reduce_max", "reduce_min", "cummax"}
"""What takes the bits of unsigned words for those of signed numbers."""
_NUMBERED = "numbered"
"""The function of `pallas_flash.packed` that torch has an operation for: a search."""
_WORDS = {"words_of_keys": 3, "words_of_queries": 2}
"""The functions of `pallas_flash.kernels.mosaic.mask_bits` that torch has an operation for, and the axis of columns."""
_MOST_BYTES = 1 << 24
"""Of an array that is computed here: larger ones would fill plans."""


class UntranslatableError(RuntimeError):
    """This JAX computes something beside the launches for which there is no operation."""


class Operations(NamedTuple):
    """Operations in their order, and arrays that they read beside those that are given."""

    operations: tuple[Operation, ...]
    constants: dict[str, np.ndarray]


def traced(function: Callable[[dict[str, jax.Array]], dict[str, jax.Array]],
           given: dict[str, jax.ShapeDtypeStruct]) -> Operations:
    """The operations of a function of arrays by name. Outputs of the last ones have the names of what it returns; a
    result that nothing computes, because it is given or known, is a copy.

    Raises:
      UntranslatableError: there is no operation for what it does.
    """
    names: list[str] = []

    def flat(*arrays: jax.Array) -> list[jax.Array]:
        found = function(dict(zip(given, arrays, strict=True)))
        names.extend(found)
        return [*found.values()]

    closed, trace = jax.make_jaxpr(flat)(*given.values()), _Trace()
    arguments = [_Value(name, x.shape, x.shape, x.dtype.name) for name, x in given.items()]
    results = trace.run(closed.jaxpr, closed.consts, arguments)
    for name, x in zip(names, results, strict=True):
        trace.keep(name, x)
    return trace.needed(names)


def needed(operations: Sequence[Operation], names: Sequence[str]) -> tuple[Operation, ...]:
    """Those that the results of these names need."""
    wanted, kept = {*names}, []
    for operation in reversed(operations):
        if operation.output in wanted:
            kept.append(operation)
            wanted |= {x for x in operation.inputs if isinstance(x, str)}
    return tuple(reversed(kept))


class _Value(NamedTuple):
    """An array by the name that an operation, or the caller, gives it; or, if it is known, itself.

    Attributes:
      stored: `shape`, with 1 for axes along which it is the same.
    """

    what: str | np.ndarray
    shape: tuple[int, ...]
    stored: tuple[int, ...]
    dtype: str

    @classmethod
    def known(cls, array: ArrayLike, shape: tuple[int, ...] | None = None, dtype: str | None = None) -> "_Value":
        """What is computed here; `dtype` is JAX's."""
        array = np.asarray(array)
        shape, dtype = array.shape if shape is None else shape, dtype or array.dtype.name
        if array.dtype == np.uint32:
            array = array.view(np.int32)
        if array.size > 1 and (array == array.flat[0]).all():
            array = array[(slice(0, 1),) * array.ndim]
        return cls(array, shape, array.shape, dtype)


def _array(atom: core.Var | core.Literal) -> jax.core.ShapedArray:
    """The shape and dtype of a value in a jaxpr."""
    if not isinstance(atom.aval, jax.core.ShapedArray):
        raise UntranslatableError(f"{atom.aval} is no array")
    return atom.aval


def _quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))
    return found


def _sliced(x: np.ndarray, *axes: tuple[int, int, int]) -> np.ndarray:
    found: np.ndarray = x[tuple(slice(*axis) for axis in axes)]
    return found


def _bits(attend: np.ndarray, axis: int, words: int, rows: int) -> np.ndarray:
    found = attend if axis == 3 else attend.swapaxes(2, 3)
    if found.shape[3] == 1:
        bits = -found.astype(np.int32)
    else:
        found = np.pad(found, ((0, 0), (0, 0), (0, 0), (0, 32 * words - found.shape[3])))
        bits = np.ascontiguousarray(np.packbits(found, axis=-1, bitorder="little")).view("<i4")
    return np.pad(bits, ((0, 0), (0, 0), (0, rows - bits.shape[2]), (0, 0))).swapaxes(2, 3)


_HERE: dict[str, Callable[..., np.ndarray]] = {
    "abs": np.abs, "isfinite": np.isfinite,
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "max": np.maximum, "min": np.minimum, "div": _quotient,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert, "neg": np.negative,
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "shift_left": np.left_shift, "shift_right": lambda x, n: (x.view(np.uint32) >> n.view(np.uint32)).view(np.int32),
    "where": np.where, "to": lambda x, dtype: x.astype(dtype), "reshape": lambda x, *shape: x.reshape(shape),
    "expand": lambda x, *shape: np.broadcast_to(x, shape), "permute": lambda x, *axes: x.transpose(axes),
    "slice": _sliced, "pad": lambda x, value, *axes: np.pad(x, axes, constant_values=value),
    "concatenate": lambda *given: np.concatenate(given[:-1], given[-1]),
    "stack": lambda *given: np.stack(given[:-1], given[-1]),
    "amax": lambda x, *axes: x.max(axes), "amin": lambda x, *axes: x.min(axes),
    "any": lambda x, *axes: x.any(axes), "all": lambda x, *axes: x.all(axes),
    "sum": lambda x, *axes: x.sum(axes, dtype=x.dtype), "cummax": np.maximum.accumulate,
    "bits": _bits, "take": lambda x, i: np.take_along_axis(x, i, -1),
}
"""The operations, of arrays and then of their numbers."""
_BY_ELEMENT = {"abs", "isfinite", "add", "sub", "mul", "max", "min", "div", "and", "or", "xor", "not",
               "neg", "eq", "ne", "lt", "le", "gt", "ge", "shift_left", "shift_right", "where", "to"}
_VIEWS = {"reshape", "expand", "permute", "slice"}
_REDUCTIONS = {"reduce_max": "amax", "reduce_min": "amin", "reduce_or": "any", "reduce_and": "all", "reduce_sum": "sum"}
_FLAGS = {"eq", "ne", "lt", "le", "gt", "ge", "isfinite"}
_NOT_OF_FLOATS = {"div", "reduce_sum", "shift_left", "and", "or", "xor", "not"}
"""What rounds otherwise here than there, or is no operation."""


def _unchanged(name: str, a: _Value, b: _Value) -> _Value | None:
    """The operand that an operation returns as it is, if there is one."""
    if isinstance(a.what, str) and isinstance(b.what, str):
        return a if a.what == b.what and name in {"max", "min", "and", "or"} else None
    if not isinstance(a.what, str) and name in {"max", "add", "mul"}:
        a, b = b, a
    if not isinstance(a.what, str) or isinstance(b.what, str) or b.what.size != 1:
        return None
    number = b.what.item()
    if name == "max" and number == -np.inf:
        return a
    return a if (name in {"add", "sub"} and number == 0) or (name in {"mul", "div"} and number == 1) else None


class _Trace:
    """Operations as they are found."""

    def __init__(self) -> None:
        self._operations: list[Operation] = []
        self._found: dict[tuple[object, ...], str] = {}
        self._constants: dict[str, np.ndarray] = {}
        self._intervals: dict[str, intervals.Interval] = {}
        self._renamed: dict[str, str] = {}  # results that were operations' names before

    # -- equations of JAX ----------------------------------------------------------------------------------------------

    def run(self, jaxpr: core.Jaxpr, consts: Sequence[ArrayLike], arguments: Sequence[_Value]) -> list[_Value]:
        """The results of a jaxpr."""
        values = dict(zip(jaxpr.constvars, map(_Value.known, consts), strict=True))
        values |= zip(jaxpr.invars, arguments, strict=True)

        def read(atom: core.Var | core.Literal) -> _Value:
            if isinstance(atom, core.Literal):
                return _Value.known(np.asarray(atom.val, _array(atom).dtype))
            return values[atom]

        for equation in jaxpr.eqns:
            results = self._equation(equation, [read(x) for x in equation.invars])
            values |= zip(equation.outvars, results, strict=True)
        return [read(x) for x in jaxpr.outvars]

    def _equation(self, equation: core.JaxprEqn, given: list[_Value]) -> list[_Value]:
        name, params = equation.primitive.name, equation.params
        if name in _CALLS:
            if params.get("name") == _NUMBERED:
                return self._numbered(equation, given[0])
            if params.get("name") in _WORDS:
                return [self._words(_WORDS[params["name"]], _array(equation.outvars[0]).shape, given[0])]
            inner = params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"]
            return self.run(inner.jaxpr, inner.consts, given)
        (out,) = equation.outvars
        dtype, shape = _array(out).dtype.name, _array(out).shape
        if unknown := {dtype, *(x.dtype for x in given)} - {*_DTYPES}:
            raise UntranslatableError(f"{name} of {', '.join(sorted(unknown))} is no operation of integers")
        if name in _NOT_OF_FLOATS and _FLOATS & {x.dtype for x in given}:
            raise UntranslatableError(f"{name} of floats is no operation")
        if any(x.dtype == "uint32" for x in given) and name in _OF_SIGNED:
            raise UntranslatableError(f"{name} of unsigned words is no operation")
        found = self._result(equation, given, shape, dtype)
        assert found.shape == shape, (name, found, shape)
        return [found._replace(dtype=dtype)]

    def _result(self, equation: core.JaxprEqn, given: list[_Value], shape: tuple[int, ...], dtype: str) -> _Value:
        name, params = {"is_finite": "isfinite"}.get(equation.primitive.name, equation.primitive.name), equation.params
        if name in _BY_ELEMENT:
            return self._by_element(name, given, shape)
        if name in _REDUCTIONS:
            return self._reduced(_REDUCTIONS[name], given[0], params["axes"], shape)
        rule: Callable[..., _Value] | None = getattr(self, f"_{name}", None)
        if rule is None:
            raise UntranslatableError(f"{name} is no operation that torch is told of")
        return rule(*given, **params | {"shape": shape, "dtype": dtype})

    # -- rules, by the names of JAX's primitives -----------------------------------------------------------------------

    def _shift_right_logical(self, x: _Value, n: _Value, shape: tuple[int, ...], **_: object) -> _Value:
        return self._by_element("shift_right", [x, n], shape)

    def _select_n(self, which: _Value, *cases: _Value, shape: tuple[int, ...], **_: object) -> _Value:
        if which.dtype != "bool" or len(cases) != 2:
            raise UntranslatableError("select_n of more than two cases is no operation")
        if isinstance(which.what, np.ndarray) and which.what.size == 1:
            return cases[int(which.what.item())]
        return self._by_element("where", [self._of_rank(which, shape), cases[1], cases[0]], shape)

    def _clamp(self, low: _Value, x: _Value, high: _Value, shape: tuple[int, ...], **_: object) -> _Value:
        low, high = (self._of_rank(y, shape) for y in (low, high))
        return self._by_element("min", [self._by_element("max", [x, low], shape), high], shape)

    def _convert_element_type(self, x: _Value, dtype: str, shape: tuple[int, ...], **_: object) -> _Value:
        if _DTYPES[x.dtype] == _DTYPES[dtype]:
            return x
        return self._emit("to", [x], (_DTYPES[dtype],), shape, x.stored)

    def _bitcast_convert_type(self, x: _Value, dtype: str, **_: object) -> _Value:
        if {x.dtype, dtype} & _FLOATS:
            raise UntranslatableError(f"the bits of {x.dtype} as {dtype} are no operation")
        return x

    def _stop_gradient(self, x: _Value, **_: object) -> _Value:
        return x

    def _copy(self, x: _Value, **_: object) -> _Value:
        return x

    def _iota(self, dimension: int, shape: tuple[int, ...], **_: object) -> _Value:
        stored = tuple(n if axis == dimension else 1 for axis, n in enumerate(shape))
        return _Value.known(np.arange(shape[dimension], dtype=np.int32).reshape(stored), shape)

    def _broadcast_in_dim(self, x: _Value, shape: tuple[int, ...], broadcast_dimensions: tuple[int, ...],
                          **_: object) -> _Value:
        stored = [1] * len(shape)
        for axis, n in zip(broadcast_dimensions, x.stored, strict=True):
            stored[axis] = n
        return self._reshaped(x, shape, tuple(stored))

    def _reshape(self, x: _Value, shape: tuple[int, ...], dimensions: object = None, **_: object) -> _Value:
        if dimensions is not None:
            raise UntranslatableError("reshape in another order of axes is no operation")
        sizes = [(n, stored) for n, stored in zip(x.shape, x.stored, strict=True) if n != 1]
        if [n for n, _ in sizes] == [n for n in shape if n != 1]:
            kept = iter(stored for _, stored in sizes)
            return self._reshaped(x, shape, tuple(next(kept) if n != 1 else 1 for n in shape))
        return self._reshaped(self._expanded(x), shape, shape)

    def _squeeze(self, x: _Value, shape: tuple[int, ...], **_: object) -> _Value:
        return self._reshape(x, shape)

    def _expand_dims(self, x: _Value, shape: tuple[int, ...], **_: object) -> _Value:
        return self._reshape(x, shape)

    def _transpose(self, x: _Value, permutation: tuple[int, ...], shape: tuple[int, ...], **_: object) -> _Value:
        return self._emit("permute", [x], tuple(permutation), shape, tuple(x.stored[axis] for axis in permutation))

    def _slice(self, x: _Value, shape: tuple[int, ...], start_indices: Sequence[int], limit_indices: Sequence[int],
               strides: Sequence[int] | None, **_: object) -> _Value:
        axes = tuple((0, 1, 1) if n == 1 else axis for n, axis in zip(x.stored, zip(
            start_indices, limit_indices, strides or (1,) * len(shape), strict=True), strict=True))
        stored = tuple(1 if own == 1 else n for own, n in zip(x.stored, shape, strict=True))
        return x._replace(shape=shape) if stored == x.stored else self._emit("slice", [x], axes, shape, stored)

    def _pad(self, x: _Value, value: _Value, shape: tuple[int, ...], padding_config: Sequence[tuple[int, int, int]],
             **_: object) -> _Value:
        if isinstance(value.what, str) or any(low < 0 or high < 0 or inner for low, high, inner in padding_config):
            raise UntranslatableError(f"pad by {padding_config} is no operation")
        axes = tuple((int(low), int(high)) for low, high, _ in padding_config)
        x = self._expanded(x, {axis for axis, ends in enumerate(axes) if any(ends)})
        stored = tuple(n + sum(ends) for n, ends in zip(x.stored, axes, strict=True))
        return self._emit("pad", [x], (value.what.item(), *axes), shape, stored) if stored != x.stored else x

    def _concatenate(self, *given: _Value, dimension: int, shape: tuple[int, ...], **_: object) -> _Value:
        return self._emit("concatenate", [*map(self._expanded, given)], (dimension,), shape, shape)

    def _stack(self, *given: _Value, axis: int, shape: tuple[int, ...], **_: object) -> _Value:
        return self._emit("stack", [*map(self._expanded, given)], (axis,), shape, shape)

    def _cummax(self, x: _Value, axis: int, reverse: bool, shape: tuple[int, ...], **_: object) -> _Value:
        if reverse:
            raise UntranslatableError("cummax from the end is no operation")
        return self._emit("cummax", [x], (axis,), shape, x.stored)

    def _gather(self, x: _Value, indices: _Value, shape: tuple[int, ...], slice_sizes: tuple[int, ...],
                dimension_numbers: jax.lax.GatherDimensionNumbers, mode: object, **_: object) -> _Value:
        """Of elements along the last axis, at indices within it, of which there is one axis more."""
        numbers, last = dimension_numbers, len(x.shape) - 1
        lead = tuple(range(last))
        is_last = ({*slice_sizes} == {1} and (*numbers.collapsed_slice_dims,) == (*numbers.start_index_map,) == (last,)
                   and mode == jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS)
        by_row = (*numbers.operand_batching_dims,) == lead == (*numbers.start_indices_batching_dims,)
        if not is_last or not (by_row or ((*numbers.offset_dims,) == lead and {*x.shape[:-1]} <= {1})):
            raise UntranslatableError(f"gather by {numbers} is no operation")
        indices = self._reshape(indices, (*indices.shape[:-1],) if by_row else (*x.shape[:-1], *indices.shape[:-1]))
        x = self._expanded(x, {last})
        rows = tuple(map(max, zip(x.stored[:-1], indices.stored[:-1], strict=True)))
        x, indices = (self._stored_as(y, (*rows, y.stored[-1])) for y in (x, indices))
        return self._emit("take", [x, indices], (), shape, indices.stored)

    def _numbered(self, equation: core.JaxprEqn, starts: _Value) -> list[_Value]:
        """The results of `packed.numbered`."""
        bounds, numbers = (_array(out).shape for out in equation.outvars)
        rising = self._emit("boundaries", [starts], (numbers[0],), bounds, bounds)
        found = self._emit("sequences", [rising], (numbers[0],), numbers, numbers)
        self._intervals |= {str(rising.what): intervals.Interval(0, numbers[0]),
                            str(found.what): intervals.Interval(0, bounds[0] - 1)}
        return [rising, found]

    def _words(self, axis: int, shape: tuple[int, ...], attend: _Value) -> _Value:
        """The result of `mask_bits.words_of_keys`, or of queries."""
        attend = self._expanded(attend, {2, 3})
        return self._emit("bits", [attend], (axis, *shape[2:]), shape, (*attend.stored[:2], *shape[2:]))._replace(
            dtype="int32")

    # -- operations ----------------------------------------------------------------------------------------------------

    def _by_element(self, name: str, given: list[_Value], shape: tuple[int, ...]) -> _Value:
        stored = np.broadcast_shapes(*(x.stored for x in given))
        if len(given) == 2:
            which = None
            if not _FLOATS & {x.dtype for x in given}:
                a, b = map(self._interval, given)
                answer, which = intervals.decided(name, a, b), intervals.returned(name, a, b)
                if answer is not None:
                    return _Value.known(np.full((1,) * len(shape), answer), shape)
            unchanged = _unchanged(name, *given) if which is None else given[which]
            if unchanged is not None:
                return self._of_rank(unchanged, shape)._replace(shape=shape)
        return self._emit(name, given, (), shape, stored)

    def _interval(self, x: _Value) -> intervals.Interval:
        if isinstance(x.what, str):
            return self._intervals.get(x.what, intervals.FLAGS if x.dtype == "bool" else intervals.ANY)
        return intervals.of_array(x.what)

    def _reduced(self, name: str, x: _Value, axes: Sequence[int], shape: tuple[int, ...]) -> _Value:
        x = self._expanded(x, {*axes}) if name == "sum" else x
        stored = tuple(n for axis, n in enumerate(x.stored) if axis not in axes)
        if all(x.stored[axis] == 1 for axis in axes):
            return self._reshaped(x, shape, stored)
        return self._emit(name, [x], tuple(map(int, axes)), shape, stored)

    def _reshaped(self, x: _Value, shape: tuple[int, ...], stored: tuple[int, ...]) -> _Value:
        if stored == x.stored:
            return x._replace(shape=shape)
        made = next((o for o in self._operations if o.output == x.what), None) if isinstance(x.what, str) else None
        if made is not None and made.name == "reshape" and isinstance(made.inputs[0], str):
            x = x._replace(what=made.inputs[0])
        return self._emit("reshape", [x], stored, shape, stored)

    def _of_rank(self, x: _Value, shape: tuple[int, ...]) -> _Value:
        """A number as an array of this shape; an array as it is."""
        return x if len(x.stored) == len(shape) else self._reshaped(x, shape, (1,) * len(shape))

    def _expanded(self, x: _Value, axes: set[int] | None = None) -> _Value:
        """Repeated along these axes; None: along all."""
        return self._stored_as(x, tuple(n if axes is None or axis in axes else own
                                        for axis, (n, own) in enumerate(zip(x.shape, x.stored, strict=True))))

    def _stored_as(self, x: _Value, stored: tuple[int, ...]) -> _Value:
        if stored == x.stored:
            return x
        if isinstance(x.what, np.ndarray):
            return x._replace(what=np.broadcast_to(x.what, stored), stored=stored)
        return self._emit("expand", [x], stored, x.shape, stored)

    def _emit(self, name: str, given: Sequence[_Value], numbers: tuple[Parameter, ...], shape: tuple[int, ...],
              stored: tuple[int, ...]) -> _Value:
        dtype = ("bool" if name in _FLAGS else str(numbers[0]) if name == "to" else
                 "int32" if name == "bits" else given[0 if name == "take" else -1].dtype)
        arrays = [x.what for x in given if isinstance(x.what, np.ndarray)]
        if len(arrays) == len(given) and name in _HERE:
            with np.errstate(over="ignore"):
                found = _Value.known(_HERE[name](*arrays, *numbers), shape, dtype)
            if isinstance(found.what, np.ndarray) and found.what.nbytes > _MOST_BYTES:
                raise UntranslatableError(f"{name} of {found.stored} numbers would fill a plan")
            return found
        inputs = tuple(self._input(x, name in _BY_ELEMENT and (name != "where" or i != 1)) for i, x in enumerate(given))
        key = name, inputs, numbers
        if key not in self._found:
            self._found[key] = f"%{len(self._found)}"
            self._operations.append(Operation(name, inputs, numbers, self._found[key]))
            if dtype == "bool" or _FLOATS & {dtype, *(x.dtype for x in given)}:
                self._intervals[self._found[key]] = intervals.FLAGS if dtype == "bool" else intervals.ANY
            else:
                self._intervals[self._found[key]] = intervals.of(name, [*map(self._interval, given)], numbers)
        return _Value(self._found[key], shape, stored, dtype)

    def _input(self, x: _Value, may_be_number: bool) -> str | float:
        if isinstance(x.what, str):
            return x.what
        if may_be_number and x.what.size == 1:
            kind = bool if x.what.dtype == np.bool_ else float if x.dtype in _FLOATS else int
            return kind(x.what.item())
        for name, array in self._constants.items():
            if array.dtype == x.what.dtype and array.shape == x.what.shape and (array == x.what).all():
                return name
        name = f"%known{len(self._constants)}"
        self._constants[name] = np.ascontiguousarray(x.what)
        return name

    # -- results -------------------------------------------------------------------------------------------------------

    def keep(self, name: str, x: _Value) -> None:
        """Gives a result its name."""
        if isinstance(x.what, str):
            x = x._replace(what=self._renamed.get(x.what, x.what))
        x = self._expanded(x)
        for operation in self._operations:
            if isinstance(x.what, str) and operation.output == x.what and operation.name not in _VIEWS:
                own, self._renamed[x.what] = operation._replace(output=name), name
                self._operations = [
                    own if o is operation else o._replace(inputs=tuple(name if y == x.what else y for y in o.inputs))
                    for o in self._operations]
                return
        self._operations.append(Operation("clone", (self._input(x, False),), (), name))

    def needed(self, names: Sequence[str]) -> Operations:
        """What the results of these names need."""
        kept = needed(self._operations, names)
        wanted = {*names, *(x for operation in kept for x in operation.inputs)}
        return Operations(kept, {n: x for n, x in self._constants.items() if n in wanted})
