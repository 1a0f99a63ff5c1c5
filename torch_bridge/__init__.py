"""PyTorch's scaled_dot_product_attention, computed by pallas_flash.

Importing this registers the operators, and switches off JAX's preallocation of GPU memory unless you chose it
(docs/torch_bridge.md); it does not import JAX.
"""

try:
    import torch as _torch  # noqa: F401  what follows needs it; asked here, so that the message can say what to do
except ModuleNotFoundError as error:
    if error.name != "torch":  # PyTorch is there, and what is missing is its own
        raise
    raise ModuleNotFoundError('torch_bridge needs PyTorch: pip install "pallas_flash[torch]"', name="torch") from error

from torch_bridge import context, flash_attn, flops, memory, transformers
from torch_bridge.activation import activate
from torch_bridge.explanation import (
    explain,
    explain_flash_attention,
    explain_flash_attn_with_kvcache,
    precompile,
)
from torch_bridge.flash import flash_attention
from torch_bridge.lse import combine
from torch_bridge.partial import partial_attention, partial_attention_backward
from torch_bridge.patching import patched
from torch_bridge.records import report
from torch_bridge.sdpa import scaled_dot_product_attention

__all__ = ["activate", "combine", "explain", "explain_flash_attention", "explain_flash_attn_with_kvcache",
           "flash_attention", "flash_attn", "partial_attention", "partial_attention_backward", "patched", "precompile",
           "report", "scaled_dot_product_attention", "transformers"]

memory.share_with_torch()
context.undo_start_of_jax()
flops.register()
