"""scaled_dot_product_attention of nested tensors in the jagged layout: their memory is a row of packed sequences."""

from typing import Protocol, TypeGuard

import torch

from torch_bridge import messages, packed
from torch_bridge.arguments import Numbers, Operands

__all__ = ["attend", "has_ragged_lengths", "prepare"]


class _Jagged(Protocol):
    """What is used of such a tensor, whose class has no stub."""

    def transpose(self, dim0: int, dim1: int) -> "_Jagged": ...
    def contiguous(self) -> "_Jagged": ...
    def lengths(self) -> torch.Tensor | None: ...
    def offsets(self) -> torch.Tensor: ...
    def values(self) -> torch.Tensor: ...


def attend(tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor], attn_mask: object, numbers: Numbers,
           enable_gqa: bool) -> torch.Tensor:
    """out (batch, heads, ragged length, dim), nested as query is; each sequence as if it were alone.

    Args:
      tensors: query, key and value, (batch, heads, ragged length, dim).
      attn_mask: must be None.
      numbers: those of the call.
      enable_gqa: query may have a multiple of the heads of key.
    """
    values, starts = _packed(tensors, attn_mask, enable_gqa)
    out, _ = packed.attend(values, starts, numbers, None, return_lse=False)
    return torch.nested.nested_tensor_from_jagged(out, starts.query).transpose(1, 2)


def prepare(tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor], attn_mask: object, numbers: Numbers,
            enable_gqa: bool) -> tuple[Operands, Numbers]:
    """The arguments of `attend`, as the operator takes them."""
    return packed.prepare(*_packed(tensors, attn_mask, enable_gqa), numbers, None)


def _packed(tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor], attn_mask: object,
            enable_gqa: bool) -> tuple[list[torch.Tensor], packed.Starts]:
    query, key, value = (_by_length(x) for x in _checked(tensors, attn_mask, enable_gqa))
    return [x.values() for x in (query, key, value)], packed.Starts(query.offsets(), key.offsets())


def has_ragged_lengths(tensor: torch.Tensor) -> TypeGuard[_Jagged]:
    """Whether it is (batch, heads, ragged length, dim) in the jagged layout."""
    return tensor.layout is torch.jagged and tensor.dim() == 4 and getattr(tensor, "_ragged_idx", None) == 2


def _by_length(tensor: _Jagged) -> _Jagged:
    """(batch, ragged length, heads, dim) without gaps; a view wherever it can be one."""
    moved = tensor.transpose(1, 2)
    return moved if moved.lengths() is None else moved.contiguous()


def _checked(tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor], attn_mask: object,
             enable_gqa: bool) -> list[_Jagged]:
    query, key, value = tensors
    messages.require_tensors(query=query, key=key, value=value)
    jagged = [x for x in tensors if has_ragged_lengths(x)]
    if len(jagged) < len(tensors):
        given = ", ".join(f"{name}: {x.layout}, {x.dim()} axes"
                          for name, x in zip(("query", "key", "value"), tensors, strict=True))
        raise messages.must(
            "nested query, key and value must all be (batch, heads, ragged length, dim) in the layout torch.jagged",
            given, "Make them (batch, ragged length, heads, dim) and transpose(1, 2)")
    if attn_mask is not None:
        raise messages.must("attn_mask must be None with nested tensors", f"attn_mask={type(attn_mask).__name__}",
                            "Leave it out: padding is not there, and is_causal holds within each sequence")
    if key.shape[2] != value.shape[2]:
        raise messages.must("nested key and value must have the same offsets", messages.shapes(key=key, value=value),
                            "Make one from the offsets of the other")
    if query.shape[0] != key.shape[0] or not (enable_gqa or query.shape[1] == key.shape[1] == value.shape[1]):
        raise messages.leading_axes(query, key, value, enable_gqa)
    return jagged
