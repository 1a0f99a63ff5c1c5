"""pallas_flash behind an unchanged `torch.nn.functional.scaled_dot_product_attention`, as its CUDA flash backend.

PyTorch's registry of flash attention implementations lets a library replace the kernels of the flash backend, whose
calls have no mask: dense or causal, float16 or bfloat16, with dropout. All other calls run as before. Five operators
have such kernels: SDPA's two, here, and three of flash attention itself, which `torch.nn.attention.varlen` and nested
tensors call (varlen.py); of these, those that this PyTorch has.
"""

import contextvars
import importlib
import warnings
from collections.abc import Callable

import torch

from torch_bridge import kept_lse, ops, varlen
from torch_bridge.arguments import Attention, AttentionBackward, Cotangents, Numbers, Operands, PerArray, Results

__all__ = ["activate"]

NAME = "pallas_flash"


class _Handle:
    """Keeps the registrations alive; PyTorch calls `remove` to restore its own kernels.

    Args:
      put_back: restores the order of the backends.
    """

    def __init__(self, library: torch.library.Library, put_back: Callable[[], None]) -> None:
        self.library: torch.library.Library | None = library
        self._put_back = put_back

    def remove(self) -> None:
        self.library = None
        self._put_back()


def activate() -> None:
    """Makes the CUDA flash backend of torch's own scaled_dot_product_attention run pallas_flash, and PyTorch prefer it
    to the others, which it does not on Hopper GPUs. So it does for `torch.nn.attention.varlen`, in this thread.

    A `torch.nn.attention.sdpa_kernel` context still chooses backends. `restore_flash_attention_impl()`, of
    `torch.nn.attention`, undoes all of it.

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


def _register(device: str = "cuda") -> _Handle:
    library = torch.library.Library("aten", "IMPL", "CUDA")
    with warnings.catch_warnings():  # that a kernel is overridden is the purpose
        warnings.filterwarnings("ignore", message=r"(?s).*[Oo]verrid")
        for name, function in KERNELS.items():
            if hasattr(torch.ops.aten, name):
                library.impl(name, function, "CUDA")
    return _Handle(library, _flash_first(device))


def _flash_first(device: str) -> Callable[[], None]:
    """Has PyTorch prefer its flash backend; returns what puts the order of its backends back.

    It sets that order itself when it first chooses one for CUDA tensors, cuDNN's first on Hopper GPUs: so it does now.
    PyTorch 2.15's varlen_attn reads it only where a variable of the context says so, else takes cuDNN's first.
    """
    x = torch.empty((1, 1, 8, 8), dtype=torch.float16, device=device)
    torch._fused_sdp_choice(x, x, x)
    before: list[int] = torch._C._get_sdp_priority_order()
    flash = torch.nn.attention.SDPBackend.FLASH_ATTENTION.value
    torch._C._set_sdp_priority_order([flash, *(backend for backend in before if backend != flash)])
    is_read: contextvars.ContextVar[bool] | None = getattr(torch.nn.attention, "_sdpa_kernel_uses_priority", None)
    was_read = is_read is not None and is_read.get()
    if is_read is not None:
        is_read.set(True)

    def put_back() -> None:
        torch._C._set_sdp_priority_order(before)
        if is_read is not None:
            is_read.set(was_read)
    return put_back


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
    return out, kept_lse.of(stats), None, None, query.shape[2], key.shape[2], state.view(torch.uint64), offset, empty


def _backward(grad_out: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor,
              logsumexp: torch.Tensor, cum_seq_q: torch.Tensor | None, cum_seq_k: torch.Tensor | None, max_q: int,
              max_k: int, dropout_p: float, is_causal: bool, philox_seed: torch.Tensor, philox_offset: torch.Tensor, *,
              scale: float | None = None) -> tuple[torch.Tensor, ...]:
    """aten::_scaled_dot_product_flash_attention_backward."""
    seed = philox_seed.view(torch.int64).to(torch.int32) if dropout_p > 0 else None
    operands = Operands.of(query, key, value, mask=None, bias=None, seed=seed)
    numbers = _numbers(query, key, is_causal, scale, dropout_p)
    grads = PerArray(*ops.attention_backward(*AttentionBackward(
        operands, numbers, Results(out, kept_lse.stats(logsumexp)), Cotangents(dout=grad_out, dstats=None),
        needs=PerArray(query=True, key=True, value=True, bias=False, score_floats=False)).flat()))
    return grads.query, grads.key, grads.value


KERNELS = {"_scaled_dot_product_flash_attention": _forward, "_scaled_dot_product_flash_attention_backward": _backward,
           **varlen.KERNELS}
"""By the names of their operators in aten."""
