"""The score function of a call: its name, by which operators know it (score_names.py), and its arrays as tensors.

A function is JAX's: plain, or a `pallas_flash.Score`, whose fields may hold PyTorch's tensors. While torch.compile
traces a call, what is called here of score_names.py is called then, and its results are constants of the program, which
holds for that very function, or class and fields: another has it traced again.
"""

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from torch._dynamo.comptime import ComptimeContext

__all__ = ["Function", "Named", "named"]

Function = Callable[..., object]
"""(score, batch, head, q_pos, kv_pos) -> score of scalars, in jnp; or a `pallas_flash.Score`."""


class Named(NamedTuple):
    """A score function as operators take it."""

    name: str
    floats: torch.Tensor | None  # its arrays that have a gradient, (count,), in the dtype of the scores
    integers: torch.Tensor | None  # its others, (count,) int32


def named(score: Function, query: torch.Tensor) -> Named:
    """The name and the arrays of a score function; raises ValueError for what pallas_flash takes as none."""
    fields = _field_names(type(score))
    is_float64 = query.dtype == torch.float64
    if fields is None:
        if torch.compiler.is_dynamo_compiling():
            from torch._dynamo.comptime import comptime
            comptime(_hold_for_this_function)
        return Named(_name_of(score, (), is_float64), None, None)
    arrays = _arrays(score, query)
    kinds = tuple((tuple(map(operator.index, x.shape)), _kind(x)) for x in arrays)
    if not torch.compiler.is_dynamo_compiling() or (_has_scores(score, fields) and _is_made(score)):
        name = _name_of(score, kinds, is_float64)
    else:
        static = tuple((field, _number(getattr(score, field))) for field in fields
                       if not _is_array(getattr(score, field)))
        names = tuple(field for field in fields if _is_array(getattr(score, field)))
        name = _name_from(type(score), static, names, kinds, is_float64)
    dtype = torch.float64 if is_float64 else torch.float32
    floats = [x.reshape(-1).to(dtype) for x in arrays if x.is_floating_point()]
    integers = [x.reshape(-1).to(torch.int32) for x in arrays if not x.is_floating_point()]
    return Named(name, torch.cat(floats) if floats else None, torch.cat(integers) if integers else None)


def _has_scores(score: object, fields: tuple[str, ...]) -> bool:
    """Whether a `Score` has others in its fields, of which no constant is made one by one."""
    return any(_field_names(type(getattr(score, name))) is not None for name in fields)


def _arrays(score: object, query: torch.Tensor) -> list[torch.Tensor]:
    """The arrays of a `Score`, and of those in its fields, in their order."""
    found = []
    for name in _field_names(type(score)) or ():
        value = getattr(score, name)
        if _field_names(type(value)) is not None:
            found.extend(_arrays(value, query))
        elif _is_array(value):
            found.append(_tensor(f"{type(score).__name__}.{name}", value, query))
    return found


def _is_array(value: object) -> bool:
    return isinstance(value, torch.Tensor | np.ndarray) or _is_of_jax(type(value))


def _tensor(label: str, value: object, query: torch.Tensor) -> torch.Tensor:
    if isinstance(value, np.ndarray):
        value = torch.as_tensor(value.copy(), device=query.device)
    elif not isinstance(value, torch.Tensor):
        if torch.compiler.is_dynamo_compiling():
            from torch._dynamo.comptime import comptime
            comptime(_number_array)
        value = _from_jax(value).to(query.device)
    if value.device != query.device or value.is_complex():
        raise ValueError(f"{label} must be a real tensor on the device of query, {query.device}, got {label}.dtype="
                         f"{value.dtype}, {label}.device={value.device}. Move it.")
    return value


def _number(value: object) -> object:
    """The value itself, of what stands for one of several integers or floats while it is traced, also in a tuple."""
    if isinstance(value, int) and not isinstance(value, bool):
        return operator.index(value)
    if isinstance(value, float) and torch.compiler.is_dynamo_compiling():
        from torch._dynamo.comptime import comptime
        comptime(_specialize)
    elif type(value) is tuple:
        return tuple([_number(part) for part in value])
    return value


def _kind(x: torch.Tensor) -> str:
    return "float" if x.is_floating_point() else "bool" if x.dtype == torch.bool else "int"


# --- what is called while a call is traced, not traced itself --------------------------------------------------------


def _constant[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """`torch.compiler.assume_constant_result`, which imports the compiler."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant
def _field_names(kind: type) -> tuple[str, ...] | None:
    from torch_bridge import score_names
    return score_names.field_names(kind)


@_constant
def _is_made(score: object) -> bool:
    """Whether the object is there: not one that PyTorch will make when the program runs. PyTorch 2.11 cannot tell, and
    raises.
    """
    return not _field_names(type(score)) or bool(vars(score))


@_constant
def _is_of_jax(kind: type) -> bool:
    from torch_bridge import score_names
    return score_names.is_array(kind)


@_constant
def _from_jax(array: object) -> torch.Tensor:
    from torch_bridge import score_names
    found = _arrays_compiled[array] if isinstance(array, int) else array
    return torch.from_numpy(score_names.host(found))  # type: ignore[arg-type]


@_constant
def _name_of(score: object, kinds: tuple[tuple[tuple[int, ...], str], ...], is_float64: bool) -> str:
    from torch_bridge import score_names
    if torch.compiler.is_compiling() and _field_names(type(score)) is None:
        _compiled.append(score)
    return score_names.name_of(score, [score_names.ArrayKind(*x) for x in kinds], is_float64)


@_constant
def _name_from(kind: type, static: tuple[tuple[str, object], ...], names: tuple[str, ...],
               kinds: tuple[tuple[tuple[int, ...], str], ...], is_float64: bool) -> str:
    from torch_bridge import score_names
    return score_names.from_fields(kind, static, names, [score_names.ArrayKind(*x) for x in kinds], is_float64)


_compiled: list[object] = []
"""The plain functions that programs were compiled for, which know them by their addresses: no other may get these."""
_arrays_compiled: list[object] = []
"""The arrays of JAX that programs were compiled for, which hold copies of them and know them by their addresses."""


def _number_array(context: "ComptimeContext") -> None:
    """Puts the number of an array of JAX among `_arrays_compiled` in its place: for PyTorch 2.11 it is no constant."""
    from torch._dynamo.guards import GuardBuilder, install_guard
    from torch._dynamo.variables import ConstantVariable
    tx = context._ComptimeContext__tx  # type: ignore[attr-defined]
    variable = tx.symbolic_locals["value"].realize()
    if variable.source is not None:
        install_guard(variable.source.make_guard(GuardBuilder.ID_MATCH))
    _arrays_compiled.append(variable.value)
    tx.symbolic_locals["value"] = ConstantVariable.create(len(_arrays_compiled) - 1)


def _hold_for_this_function(context: "ComptimeContext") -> None:
    """Has the program that is traced used for this very function alone: torch.compile itself looks at its code, which
    two closures share.
    """
    from torch._dynamo.guards import GuardBuilder, install_guard
    variable = context.get_local("score")._ComptimeVar__variable  # type: ignore[attr-defined]
    source = variable.realize().source
    if source is not None:  # else it is made anew, within the program, from what that is used for
        install_guard(source.make_guard(GuardBuilder.ID_MATCH))


def _specialize(context: "ComptimeContext") -> None:
    """Has the program that is traced used for this very float alone, which is a constant of it."""
    from torch._dynamo.variables import ConstantVariable
    from torch._dynamo.variables.tensor import SymNodeVariable
    tx = context._ComptimeContext__tx  # type: ignore[attr-defined]
    variable = tx.symbolic_locals["value"].realize()
    if isinstance(variable, SymNodeVariable):
        tx.symbolic_locals["value"] = ConstantVariable.create(variable.evaluate_expr(tx.output))
