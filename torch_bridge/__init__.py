"""PyTorch's scaled_dot_product_attention, computed by pallas_flash.

Importing this registers the operators, and switches off JAX's preallocation of GPU memory unless you chose it
(docs/torch_bridge.md); it does not import JAX.
"""

from torch_bridge import context, memory
from torch_bridge.activation import activate
from torch_bridge.explanation import explain
from torch_bridge.sdpa import scaled_dot_product_attention

__all__ = ["activate", "explain", "scaled_dot_product_attention"]

memory.share_with_torch()
context.undo_start_of_jax()
