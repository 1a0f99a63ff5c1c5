"""How the tensors of a call are stored, as kernels see it: which are read where they lie; which are copied, and why.

Kernels read dense arrays of two layouts, and parts of them: some heads, or some columns of all heads, as in packed
tensors. A tensor is such a part if each of its strides is a multiple of the next inner one.
"""

from collections.abc import Sequence

import torch

from torch_bridge import strides
from torch_bridge.direct.launch import ALIGNMENT
from torch_bridge.direct.problem import Outer

__all__ = ["copy_reason", "given", "is_readable", "layout_of", "outer_of", "shape_given"]

_STARTS, _LEAST_STARTS = {"q_starts", "kv_starts"}, 16
_COLUMNS = 64
"""Kernels read so many at once: of a tensor of fewer, or of no multiple, they would read what is beside it."""


def outer_of(tensor: torch.Tensor, layout: strides.Layout) -> Outer | None:
    """(heads, dim) of the dense array of which a (batch, heads, length, dim) tensor is a part; None: of none that
    kernels read. Axes of one element have any stride.
    """
    x = strides.in_layout(tensor, layout)
    (batch, outer, inner, dim), (by_batch, by_outer, by_inner, by_column) = x.shape, x.stride()
    if 0 in x.shape or (dim > 1 and by_column != 1):
        return None
    columns = by_inner if inner > 1 else dim
    rows = by_outer // columns if outer > 1 and columns else inner
    count = by_batch // (rows * columns) if batch > 1 and rows * columns else outer
    is_exact = ((outer == 1 or by_outer == rows * columns) and (batch == 1 or by_batch == count * rows * columns))
    heads, lengths = (rows, count == outer) if layout == "BLHD" else (count, rows == inner)
    fits = columns >= dim and rows >= inner and count >= outer and lengths
    if not (is_exact and fits and (columns == dim or (dim % _COLUMNS == 0 and _is_aligned(columns, tensor)))):
        return None
    return heads, columns


def _is_aligned(elements: int, tensor: torch.Tensor) -> bool:
    return elements * tensor.element_size() % ALIGNMENT == 0


def layout_of(tensors: Sequence[torch.Tensor]) -> strides.Layout:
    """The layout in which the fewest elements of query, key, value and out are copied; among equals, the query's."""
    query, _, value = tensors
    of_query: tuple[strides.Layout, strides.Layout] = ("BLHD", "BHLD")
    order = of_query if strides.is_heads_inside(query) else of_query[::-1]
    out = torch.empty_strided((*query.shape[:3], value.shape[3]), strides.like_query(query, value.shape[3]),
                              device="meta")
    copied = [sum(x.numel() for x in (*tensors, out) if outer_of(x, layout) is None
                  or (x is out and not strides.in_layout(out, layout).is_contiguous())) for layout in order]
    return order[0] if copied[0] <= copied[1] else order[1]


def is_readable(tensor: torch.Tensor) -> bool:
    """Whether what lies at the tensor's address is its numbers: it may be negated, or have no memory, and be zeros."""
    address = tensor.data_ptr()
    return bool(address) and not address % ALIGNMENT and not tensor.is_neg()


def copy_reason(tensor: torch.Tensor, layout: strides.Layout) -> str | None:
    """Why a (batch, heads, length, dim) tensor is copied on its way to a kernel; None: it is read where it lies."""
    if tensor.is_neg():
        return "its negative bit is set"
    if outer_of(tensor, layout) is None:
        axes = "(batch, length, heads, dim)" if layout == "BLHD" else "(batch, heads, length, dim)"
        return (f"strides {tuple(tensor.stride())} of shape {tuple(tensor.shape)} are those of no part of dense {axes} "
                f"storage: some heads, or {_COLUMNS} columns or a multiple of all")
    if offset := tensor.data_ptr() % ALIGNMENT:
        return f"its address is {offset} bytes past a multiple of {ALIGNMENT}"
    return None


def shape_given(name: str, tensor: torch.Tensor) -> tuple[int, ...]:
    """The shape of which a plan takes a tensor: of boundaries, that of a power of 2 of them."""
    count = tensor.shape[0]
    return (max(_LEAST_STARTS, 1 << (count - 1).bit_length()),) if name in _STARTS else tuple(map(int, tensor.shape))


def given(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor as a plan takes it: boundaries with sequences of no tokens at the end, so that there are as many."""
    missing = shape[0] - tensor.shape[0] if name in _STARTS else 0
    return torch.cat((tensor, tensor[-1:].expand(missing))) if missing else tensor
