"""What the annotations of kernels are written with, beside `pallas_flash.arrays`. No Mosaic in here."""

from types import EllipsisType
from typing import Protocol

import numpy as np
from jax.experimental import pallas as pl
from jax.ref import AbstractRef
from jax.typing import ArrayLike

from pallas_flash.arrays import Array, Bool

__all__ = ["Flag", "Index", "KernelArguments", "Ref"]

Index = int | Array
"""One number, plain or a traced int32: of a block, a warpgroup, a slot, a step."""

Flag = Bool[Array, ""]

_Subscript = int | Array | slice | pl.Slice | EllipsisType


class _Part(Protocol):
    """What `Ref.at` returns."""

    def __getitem__(self, index: _Subscript | tuple[_Subscript, ...]) -> "Ref": ...


class Ref(AbstractRef):
    """A reference to an array, or to barriers, in global or shared memory; or to a part of it.

    JAX annotates its references as AbstractRef, without what they can do. This says it; there are no objects of it.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    at: _Part  # type: ignore[assignment]  # JAX has a descriptor of its own there, which mypy takes for a tuple

    def __getitem__(self, index: _Subscript | tuple[_Subscript, ...]) -> Array:
        raise NotImplementedError

    def __setitem__(self, index: _Subscript | tuple[_Subscript, ...], value: ArrayLike) -> None:
        raise NotImplementedError


KernelArguments = tuple[*tuple[Ref, ...], dict[str, Ref], dict[str, Ref]]
"""What the body of a kernel is called with: its inputs and outputs in global memory, then by name what `allocate`
describes: buffers in shared memory, and barriers.
"""
