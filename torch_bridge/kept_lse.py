"""lse as PyTorch's flash backend keeps it, and behind it, unknown to PyTorch, the rest of the statistics."""

import torch

__all__ = ["of", "stats"]

_BEHIND = 3
"""Unused elements behind the statistics: no other lse has as much memory."""


def of(rows: torch.Tensor) -> torch.Tensor:
    """lse (batch, heads, q_len), and after it in the same memory its rest."""
    batch, heads, _, length = rows.shape
    size = batch * heads * length
    memory = rows.new_empty((2 * size + _BEHIND,))
    memory[:2 * size].view(2, batch, heads, length).copy_(rows.movedim(2, 0))
    return memory[:size].view(batch, heads, length)


def stats(lse: torch.Tensor) -> torch.Tensor:
    """The statistics if lse is as `of` returned it; lse itself where it is a copy, or that of more keys."""
    size, memory = lse.numel(), lse.untyped_storage().nbytes() // lse.element_size()
    if memory != 2 * size + _BEHIND or lse.storage_offset() or not lse.is_contiguous():
        return lse
    return lse.as_strided((2, *lse.shape), (size, *lse.stride())).movedim(0, 2).contiguous()
