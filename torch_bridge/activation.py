"""pallas_flash behind an unchanged `torch.nn.functional.scaled_dot_product_attention`, as its CUDA flash backend.

PyTorch's registry of flash attention implementations lets a library replace the kernels of the flash backend, whose
calls have no mask: dense or causal, float16 or bfloat16, with dropout. All other calls run as before.
"""

import importlib
import warnings

import torch

from torch_bridge import ops
from torch_bridge.arguments import Attention, AttentionBackward, Cotangents, Numbers, Operands, PerArray, Results

__all__ = ["activate"]

NAME = "pallas_flash"


class _Handle:
    """Keeps the registrations alive; PyTorch calls `remove` to restore its own kernels."""

    def __init__(self, library: torch.library.Library | None) -> None:
        self.library = library

    def remove(self) -> None:
        self.library = None


def activate() -> None:
    """Makes the CUDA flash backend of torch's own scaled_dot_product_attention run pallas_flash.

    `torch.nn.attention.restore_flash_attention_impl()` undoes it.

    Raises:
      RuntimeError: this PyTorch has no registry of flash attention implementations, or no CUDA device.
    """
    attention = importlib.import_module("torch.nn.attention")
    if not hasattr(attention, "register_flash_attention_impl"):
        raise RuntimeError(f"PyTorch {torch.__version__} has no torch.nn.attention.register_flash_attention_impl. Call "
                           "torch_bridge.scaled_dot_product_attention, or use torch_bridge.patched(), instead, or "
                           "update PyTorch.")
    if not torch.cuda.is_available():
        raise RuntimeError("activate() replaces kernels of PyTorch's CUDA flash backend, and PyTorch sees no CUDA "
                           "device. torch_bridge.patched() replaces PyTorch's own function for CPU tensors, too.")
    attention.register_flash_attention_impl(NAME, register_fn=_register)
    attention.activate_flash_attention_impl(NAME)


def _register() -> _Handle:
    library = torch.library.Library("aten", "IMPL", "CUDA")
    with warnings.catch_warnings():  # that a kernel is overridden is the purpose
        warnings.filterwarnings("ignore", message=r"(?s).*[Oo]verrid")
        library.impl("_scaled_dot_product_flash_attention", _forward, "CUDA")
        library.impl("_scaled_dot_product_flash_attention_backward", _backward, "CUDA")
    return _Handle(library)


def _numbers(query: torch.Tensor, key: torch.Tensor, is_causal: bool, scale: float | None,
             dropout_p: float) -> Numbers:
    """The numbers of a call. This operator aligns the last query with the last key; for any other alignment its callers
    pass equal lengths.
    """
    return Numbers.of(causal_offset=key.shape[2] - query.shape[2] if is_causal else None, scale=scale,
                      dropout_p=dropout_p)


def _forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout_p: float = 0.0,
             is_causal: bool = False, return_debug_mask: bool = False, *,
             scale: float | None = None) -> tuple[torch.Tensor | int | None, ...]:
    """aten::_scaled_dot_product_flash_attention; the dropout seed is returned as rng_state."""
    if return_debug_mask:
        raise RuntimeError("pallas_flash does not return a debug mask: call with return_debug_mask=False")
    seed = ops.draw_seed(query) if dropout_p > 0 else None
    out, stats = ops.attention(*Attention(
        Operands.of(query, key, value, mask=None, bias=None, seed=seed),
        _numbers(query, key, is_causal, scale, dropout_p), needs_stats=True).flat())
    empty = query.new_empty((0,))
    state = query.new_zeros((2,), dtype=torch.int64) if seed is None else seed.to(torch.int64)
    offset = query.new_empty((), dtype=torch.uint64)
    return out, _lse(stats), None, None, query.shape[2], key.shape[2], state.view(torch.uint64), offset, empty


def _backward(grad_out: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor,
              logsumexp: torch.Tensor, cum_seq_q: torch.Tensor | None, cum_seq_k: torch.Tensor | None, max_q: int,
              max_k: int, dropout_p: float, is_causal: bool, philox_seed: torch.Tensor, philox_offset: torch.Tensor, *,
              scale: float | None = None) -> tuple[torch.Tensor, ...]:
    """aten::_scaled_dot_product_flash_attention_backward."""
    seed = philox_seed.view(torch.int64).to(torch.int32) if dropout_p > 0 else None
    operands = Operands.of(query, key, value, mask=None, bias=None, seed=seed)
    numbers = _numbers(query, key, is_causal, scale, dropout_p)
    grads = PerArray(*ops.attention_backward(*AttentionBackward(
        operands, numbers, Results(out, _stats(logsumexp)), Cotangents(dout=grad_out, dstats=None),
        needs=PerArray(query=True, key=True, value=True, bias=False)).flat()))
    return grads.query, grads.key, grads.value


_BEHIND = 3
"""Unused elements behind the statistics: no other lse has as much memory."""


def _lse(stats: torch.Tensor) -> torch.Tensor:
    """lse (batch, heads, q_len), and after it in the same memory its rest."""
    batch, heads, _, length = stats.shape
    size = batch * heads * length
    memory = stats.new_empty((2 * size + _BEHIND,))
    memory[:2 * size].view(2, batch, heads, length).copy_(stats.movedim(2, 0))
    return memory[:size].view(batch, heads, length)


def _stats(lse: torch.Tensor) -> torch.Tensor:
    """The statistics if lse is as `_lse` returned it; lse itself where it is a copy, or that of more keys."""
    size, memory = lse.numel(), lse.untyped_storage().nbytes() // lse.element_size()
    if memory != 2 * size + _BEHIND or lse.storage_offset() or not lse.is_contiguous():
        return lse
    return lse.as_strided((2, *lse.shape), (size, *lse.stride())).movedim(0, 2).contiguous()
