"""The keys of a static cache that a single query sees, noted beside its mask.

The mask of a step is a row for each sequence, which transformers makes as an ordinary tensor: a compiled model is given
it. What it says, the first `lengths` keys, is also what the kernel of caches wants to know. It is kept as an attribute
of that tensor: a layer that is handed the tensor itself finds it, one that is handed another (a slice, a sum) does not,
and reads the mask.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Filled", "note", "noted"]

_NAME = "_pallas_flash_filled"


class Filled(NamedTuple):
    """What one query of each sequence attends to, which stands at the last key."""

    lengths: Tensor  # the keys that there are, its own included, (batch,) int32
    left: int | None  # how many keys before its own it sees; None: all
    bias: Tensor | None  # -inf at padding, else 0, (batch or 1, 1, 1, capacity) float32; None: there is none


class _Note(NamedTuple):
    filled: Filled
    version: int  # of the mask: what was written into it since is not in the note


def note(mask: Tensor, position: Tensor, left: int | None, padding: Tensor | None) -> Tensor:
    """The mask (batch, 1, 1, capacity), with a note.

    Args:
      position: of the query in its sequence, one number or (batch,).
      left: as in `Filled`.
      padding: keys that are tokens, booleans (batch or 1, at least capacity); False past the query means nothing.

    Whether there is any padding is asked of the GPU, once for all layers; where a CUDA graph is captured it may be.
    """
    batch, capacity = mask.shape[0], mask.shape[3]
    lengths, bias = (position + 1).to(torch.int32).expand(batch).contiguous(), None
    if padding is not None:
        padding = padding[:, :capacity].bool()
        seen = padding | (torch.arange(capacity, device=mask.device) >= lengths[:, None])
        is_captured = mask.is_cuda and torch.cuda.is_current_stream_capturing()
        if is_captured or not seen.all():
            bias = torch.where(padding, 0.0, -torch.inf)[:, None, None]
    mask = mask.contiguous()
    if mask.is_inference():  # which counts no versions
        with torch.inference_mode(False):
            mask = mask.clone()
    setattr(mask, _NAME, _Note(Filled(lengths, left, bias), mask._version))
    return mask


def noted(mask: object) -> Filled | None:
    """What was noted of a mask; None: nothing was, or the mask was written to since."""
    found: _Note | None = getattr(mask, _NAME, None)
    if found is None or not isinstance(mask, Tensor) or mask._version != found.version:
        return None
    return found.filled
