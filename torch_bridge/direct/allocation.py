"""New tensors in 0.3 us of the host instead of 1.3.

So long takes `torch.empty_strided` to read its arguments and to find its kernel, five to six times in a call and its
gradients. What torch's compiler has its programs call makes the same tensor. It is private: where torch has none of it,
`torch.empty_strided` is called.
"""

import contextlib
import importlib
from collections.abc import Callable

import torch

__all__ = ["Maker", "maker"]

Maker = Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], torch.Tensor]
"""(shape, strides, dtype) -> a tensor without contents."""


def maker(device: torch.device) -> Maker:
    """What makes tensors on a device. A GPU must be the thread's current one when it is called."""
    with contextlib.suppress(ImportError, AttributeError, TypeError, RuntimeError):
        found: Maker = getattr(importlib.import_module("torch._C._dynamo.guards"), f"_empty_strided_{device.type}")
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            x = found((2, 3), (1, 2), torch.bfloat16)
        if (x.shape, x.stride(), x.dtype, x.device.type) == ((2, 3), (1, 2), torch.bfloat16, device.type):
            return found
    return lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype, device=device)
