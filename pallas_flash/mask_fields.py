"""The fields of a mask, or of a score function: which are static and which hold data, and data as kernels expect it."""

import dataclasses
import numbers
from collections.abc import Callable, Iterable
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from pallas_flash import errors
from pallas_flash.arrays import Shaped

__all__ = ["UNBOUNDED", "ArrayField", "FieldArray", "as_array", "check_class", "flatten", "is_static", "limit",
           "on_host", "unflatten", "values", "with_lead_axes"]

UNBOUNDED = 1 << 30
"""A distance beyond any sequence length, small enough to add to an int32 position."""


@dataclasses.dataclass(frozen=True)
class ArrayField:
    """Stands for an array where only its shape and dtype count: in an `AttentionSpec`, which is hashable."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @classmethod
    def of(cls, array: "FieldArray") -> "ArrayField":
        return cls(tuple(array.shape), np.dtype(array.dtype))

    def __str__(self) -> str:
        return f"{self.dtype.name}[{'x'.join(map(str, self.shape))}]"


FieldArray = Shaped | ArrayField
"""What a field that holds data may be."""


def is_static(value: object) -> bool:
    """Whether a field's value is a number or a name, compiled into the program, and not data."""
    return isinstance(value, numbers.Integral | bool | str | None)


def as_array(value: object) -> FieldArray:
    """Returns `value` if it is, or stands for, an array; else converts it to a NumPy array."""
    if errors.is_torch(value):
        raise errors.invalid("a mask must hold JAX or NumPy arrays", f"type={type(value).__name__}",
                             "convert it, or give PyTorch tensors to torch_bridge.flash_attention")
    return value if _is_array(value) else np.asarray(value)


def _is_array(value: object) -> TypeGuard[FieldArray]:
    return hasattr(value, "dtype")


def on_host(value: object) -> np.ndarray | None:
    """The values of a Python number or a NumPy array; None for anything whose values are on a device."""
    return np.asarray(value) if isinstance(value, numbers.Number | np.ndarray | np.generic) else None


def limit(name: str) -> int:
    """Where positions are clipped, so that sums fit int32 also if "unlimited" was given as the largest integer."""
    return UNBOUNDED // 2 if name == "offset" else UNBOUNDED


def _clipped(owner: str, name: str, array: jax.Array | np.ndarray, is_id: bool) -> jax.Array | np.ndarray:
    """Clips positions at `limit`. Ids that do not fit int32 raise ValueError where their values are known, and become
    -1 elsewhere: rounded to 32 bits, they would be equal to others.
    """
    if not jnp.issubdtype(array.dtype, jnp.integer) or array.dtype.itemsize < 4:
        return array
    if not is_id:
        return array.clip(0 if jnp.issubdtype(array.dtype, jnp.unsignedinteger) else -limit(name), limit(name))
    if array.dtype == np.int32 or not array.size:
        return array
    if _has_values(array):
        values = np.asarray(array)  # jnp would trace it, inside jit
        smallest, largest = int(values.min()), int(values.max())
        if smallest < -2**31 or largest >= 2**31:
            raise errors.invalid(f"{owner}.{name} must fit 32-bit integers", f"values from {smallest} to {largest}",
                                 "number the segments from 0")
        return array
    fits = array <= 2**31 - 1
    if not jnp.issubdtype(array.dtype, jnp.unsignedinteger):
        fits &= array >= -2**31
    return jnp.where(fits, array.astype(np.int32), np.int32(-1))


def _has_values(array: jax.Array | np.ndarray) -> bool:
    return not isinstance(array, jax.core.Tracer) and getattr(array, "is_fully_addressable", True)


def with_lead_axes(owner: str, name: str, array: object, position_axes: int) -> FieldArray:
    """Adds missing axes (batch or 1, heads or 1) in front of a field's position axes, and makes integers int32."""
    array = as_array(array)
    lead = array.ndim - position_axes
    if not 0 <= lead <= 2:
        raise errors.invalid(
            f"{owner}.{name} must have {position_axes} to {position_axes + 2} axes ([batch, [heads,]] then positions)",
            f"{name}.shape={tuple(array.shape)}", "reshape it")
    shape = (*array.shape[:lead], *(1,) * (2 - lead), *array.shape[lead:])
    dtype = np.dtype(np.int32) if jnp.issubdtype(array.dtype, jnp.integer) else array.dtype
    if isinstance(array, ArrayField | jax.ShapeDtypeStruct):
        return type(array)(shape, dtype)
    array = _clipped(owner, name, array, position_axes > 0).reshape(shape)
    return array if array.dtype == dtype else array.astype(dtype)


def values(mask: object) -> dict[str, Any]:
    """The values of the fields of a mask or a score function, by name."""
    return {field.name: getattr(mask, field.name) for field in dataclasses.fields(mask)}  # type: ignore[arg-type]


def check_class(argument: str, plural: str, kind: type) -> None:
    """Raises ValueError unless a class of masks or score functions is a frozen dataclass whose fields all count where
    two are compared: else what has been compiled for one, or planned for a part of it, would be used for another.
    """
    if not dataclasses.is_dataclass(kind) or kind.__hash__ is None:
        raise errors.invalid(f"a class of {plural} must be a frozen dataclass",
                             f"{argument}={kind.__name__}(), which is not",
                             f"write @dataclasses.dataclass(frozen=True) above class {kind.__name__}")
    hidden = [field.name for field in dataclasses.fields(kind) if not field.compare]
    if hidden:
        raise errors.invalid(
            f"all fields of a class of {plural} must take part in comparison, or results of one would be computed with "
            "another",
            f"{kind.__name__} with compare=False for {', '.join(hidden)}",
            "leave out compare=False; of arrays only shapes are compared, and values may differ from call to call")


Static = tuple[tuple[str, ...], tuple[tuple[str, object], ...]]
"""The names of the fields that hold data, and the other fields."""


def flatten(mask: object, *, is_static: Callable[[object], bool] = is_static) -> tuple[
        list[tuple[jax.tree_util.GetAttrKey, object]], Static]:
    """Splits a mask, or a score function, into the fields that hold data and the others, as JAX wants a pytree."""
    fields = values(mask)
    # JAX may have unflattened it with an axis number or a flag in place of an array, which must stay data.
    names = getattr(mask, "_data_names", None) or tuple(name for name, value in fields.items() if not is_static(value))
    static = tuple((name, value) for name, value in fields.items() if name not in names)
    return [(jax.tree_util.GetAttrKey(name), fields[name]) for name in names], (names, static)


def unflatten[M](cls: type[M], aux: Static, children: Iterable[object]) -> M:
    """Makes a mask of what `flatten` returned."""
    names, static = aux
    mask = object.__new__(cls)  # __post_init__ checks arrays; a tree may hold anything in their place
    for name, value in (*zip(names, children, strict=True), *static):
        object.__setattr__(mask, name, value)
    object.__setattr__(mask, "_data_names", names)
    return mask
