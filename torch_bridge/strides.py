"""Strides and dtypes of results: arithmetic on shapes and strides, shared by the operators and by their fake versions;
and tensors, copied where they are stored otherwise than is wanted, for both ways to the kernels.

A result keeps the storage order of the tensor that it belongs to, as PyTorch's fused backends do: `out` that of the
query, a gradient that of its input (of its copy, where autograd records that a key or value was copied). Axes of size
1 and broadcast axes (stride 0) say nothing about order.
"""

from collections.abc import Sequence
from typing import Literal

import torch

__all__ = ["Layout", "dense", "in_layout", "is_heads_inside", "layout_of", "like_query", "placed", "same_memory",
           "sharable", "stats_dtype", "with_strides"]

Layout = Literal["BLHD", "BHLD"]
"""As `pallas_flash.spec.Layout`, which would import JAX."""


def is_heads_inside(tensor: torch.Tensor) -> bool:
    """True if a (batch, heads, length, dim) tensor is stored as (batch, length, heads, dim)."""
    heads, length = tensor.shape[1:3]
    inner, outer = tensor.stride(1), tensor.stride(2)
    return bool(heads > 1 and length > 1 and inner > 0 and outer > inner)


def dense(shape: Sequence[int], heads_inside: bool) -> tuple[int, int, int, int]:
    """Strides of (batch, heads, length, dim) without gaps, stored in that order or with the heads inside the length."""
    _, heads, length, dim = (_at_least_one(size) for size in shape)
    plane = heads * length * dim
    return (plane, dim, heads * dim, 1) if heads_inside else (plane, length * dim, dim, 1)


def _at_least_one(size: int) -> int:
    return torch.sym_max(size, 1)  # type: ignore[return-value]  # a SymInt, while torch traces


def like_query(query: torch.Tensor, d_v: int) -> tuple[int, int, int, int]:
    """The strides of `out` (batch, heads, q_len, d_v): the storage order of the query."""
    return dense((*query.shape[:3], d_v), is_heads_inside(query))


def stats_dtype(query: torch.Tensor) -> torch.dtype:
    """The dtype in which the statistics of rows are kept."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def same_memory(shape: Sequence[int], a: Sequence[int], b: Sequence[int]) -> bool:
    """True if two strides address the same elements: they may differ on axes of one element, or if there is none."""
    return 0 in shape or all(x == y for size, x, y in zip(shape, a, b, strict=True) if size != 1)


def layout_of(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Layout:
    """The layout in which the fewest elements are copied, the result included; among equals, the query's."""
    order: tuple[Layout, Layout] = ("BLHD", "BHLD") if is_heads_inside(query) else ("BHLD", "BLHD")
    copied = [sum(x.numel() for x in (query, query, key, value) if not in_layout(x, layout).is_contiguous())
              for layout in order]
    return order[0] if copied[0] <= copied[1] else order[1]


def in_layout(tensor: torch.Tensor, layout: Layout) -> torch.Tensor:
    """A view of (batch, heads, length, dim) with the axes in the order of the layout; and back."""
    return tensor if layout == "BHLD" else tensor.transpose(1, 2)


def sharable(tensor: torch.Tensor, alignment: int) -> torch.Tensor:
    """The tensor itself if it is dense, at an address that is a multiple of `alignment` bytes; or else a copy."""
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    if not tensor.is_contiguous():
        return tensor.contiguous()
    address = tensor.data_ptr()
    return tensor if address and not address % alignment else tensor.clone()  # 0: torch's own zeros, without memory


def placed(tensor: torch.Tensor, wanted: tuple[int, ...], alignment: int) -> torch.Tensor:
    """The tensor itself if it lies at these strides, at an address that is a multiple of `alignment` bytes; or else a
    copy.
    """
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    address = tensor.data_ptr()
    if address and not address % alignment and same_memory(tensor.shape, tensor.stride(), wanted):
        return tensor
    return torch.empty_strided(tensor.shape, wanted, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def with_strides(tensor: torch.Tensor, wanted: tuple[int, ...]) -> torch.Tensor:
    """The tensor itself, or a copy, with exactly these strides."""
    if tensor.stride() == wanted:
        return tensor
    if same_memory(tensor.shape, tensor.stride(), wanted):
        return tensor.as_strided(tensor.shape, wanted)
    return torch.empty_strided(tensor.shape, wanted, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
