"""Arithmetic on positions that are plain numbers on the host or traced values in a program: the same code for both."""

from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["Positions", "maximum", "minimum", "where"]

Positions = int | np.ndarray | jax.Array
"""Positions of queries or keys, plain or traced, and what is computed from them, booleans included."""


def _numpy_for(*values: object) -> ModuleType:
    """numpy for plain numbers, so that tile tables made on the host stay there; jax.numpy as soon as a value is
    JAX's."""
    return jnp if any(isinstance(value, jax.Array) for value in values) else np


def _are_plain(*values: object) -> bool:
    return all(isinstance(value, int | np.bool_) for value in values)


def maximum(a: Positions, b: Positions) -> Positions:
    """Elementwise maximum of positions, plain or traced; plain numbers stay plain, without a type of their own."""
    return max(a, b) if _are_plain(a, b) else _numpy_for(a, b).maximum(a, b)


def minimum(a: Positions, b: Positions) -> Positions:
    """Elementwise minimum of positions, plain or traced."""
    return min(a, b) if _are_plain(a, b) else _numpy_for(a, b).minimum(a, b)


def where(condition: Positions, a: Positions, b: Positions) -> Positions:
    """Elementwise choice between positions, plain or traced."""
    if _are_plain(condition, a, b):
        return a if condition else b
    if _are_plain(a, b):  # in JAX's 64-bit mode their choice would be int64, traced positions are int32
        a, b = np.int32(a), np.int32(b)  # type: ignore[assignment]
    chosen: Positions = _numpy_for(condition, a, b).where(condition, a, b)
    return chosen
