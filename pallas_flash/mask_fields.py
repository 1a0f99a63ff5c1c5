"""The fields of a mask: which are static and which hold data, and data as kernels expect it."""

import dataclasses
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_flash import errors

__all__ = ["UNBOUNDED", "ArrayField", "as_array", "is_static", "limit", "on_host", "with_lead_axes"]

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
    def of(cls, array: Any) -> "ArrayField":
        return cls(tuple(array.shape), np.dtype(array.dtype))

    def __str__(self) -> str:
        return f"{self.dtype.name}[{'x'.join(map(str, self.shape))}]"


def is_static(value: Any) -> bool:
    """Whether a field's value is a number or a name, part of what a program is compiled for, and not data."""
    return isinstance(value, numbers.Integral | bool | str | None)


def as_array(value: Any) -> Any:
    """`value` itself if it is or stands for an array, else as one."""
    if errors.is_torch(value):
        raise errors.invalid("a mask must hold JAX or NumPy arrays", f"type={type(value).__name__}",
                             "convert it, or give PyTorch tensors to torch_bridge.scaled_dot_product_attention")
    return value if hasattr(value, "dtype") else np.asarray(value)


def on_host(value: Any) -> np.ndarray | None:
    """The numbers of a Python number or a NumPy array; None of anything whose numbers it takes a device to know."""
    return np.asarray(value) if isinstance(value, numbers.Number | np.ndarray | np.generic) else None


def limit(name: str) -> int:
    """Positions beyond it are cut to it: those who say "unlimited" with the largest integer get sums that fit int32."""
    return UNBOUNDED // 2 if name == "offset" else UNBOUNDED


def _cut(owner: str, name: str, array: Any, is_id: bool) -> Any:
    """Integers that fit int32: positions cut at `limit`; ids that do not fit refused, where their values are known."""
    if not jnp.issubdtype(array.dtype, jnp.integer) or array.dtype.itemsize < 4:
        return array
    if not is_id:
        return array.clip(0 if jnp.issubdtype(array.dtype, jnp.unsignedinteger) else -limit(name), limit(name))
    if array.dtype != np.int32 and array.size and _has_values(array):
        values = np.asarray(array)  # jnp would trace it, inside jit
        smallest, largest = int(values.min()), int(values.max())
        if smallest < -2**31 or largest >= 2**31:
            raise errors.invalid(f"{owner}.{name} must fit 32-bit integers", f"values from {smallest} to {largest}",
                                 "number the segments from 0")
    return array


def _has_values(array: Any) -> bool:
    return not isinstance(array, jax.core.Tracer) and getattr(array, "is_fully_addressable", True)


def with_lead_axes(owner: str, name: str, array: Any, position_axes: int) -> Any:
    """A field's array with axes (batch or 1, heads or 1) in front of its position axes, integers as int32."""
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
    array = _cut(owner, name, array, position_axes > 0).reshape(shape)
    return array if array.dtype == dtype else array.astype(dtype)
