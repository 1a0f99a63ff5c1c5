"""`patched()`: PyTorch's own scaled_dot_product_attention is ours for a while, on CPU and CUDA tensors.

    F.scaled_dot_product_attention -> scaled_dot_product_attention (below)
        no context is open                                      what was there before: someone kept the function
        a call that ours does not take                          what was there before, with a warning, and counted
        a torch function mode or a subclass of Tensor sees it   as it would see PyTorch's
        otherwise                                               torch_bridge.scaled_dot_product_attention

The function that is put there never changes, so a compiled or scripted program, or a module that was imported
meanwhile, may keep it. It has no keyword-only arguments, because TorchScript, which compiles its source, has none.
"""

import contextlib
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from torch_bridge import nested, records, sdpa

__all__ = ["patched"]

NAME = "scaled_dot_product_attention"


class _State:
    """How many contexts are open, what was there before the first, and the reasons of the warnings that were given."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.depth = 0
        self.original: Callable[..., Tensor] = torch.nn.functional.scaled_dot_product_attention
        self.warned: set[str] = set()


_state = _State()


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """A context in which `torch.nn.functional.scaled_dot_product_attention` is ours, on CPU and CUDA tensors.

        with torch_bridge.patched():
            model(inputs)  # unchanged; torch_bridge.report() says what ran

    It holds for all threads of the process, since autograd recomputes checkpoints on threads of its own, from where the
    first context is entered to where the last is left, in whatever order, also by an exception. Modules that imported
    the function itself, under its name, use ours as well. It can decorate a function.

    A call that ours does not take (sparse tensors, nested ones of another layout than torch.jagged, DTensors, devices
    other than CPU and CUDA) goes to the function that was there before, with a `pallas_flash.FallbackWarning`, once for
    each reason. TorchScript compiles calls of the function; they come back to Python, so such a program cannot be
    saved. `activate()` replaces kernels of PyTorch's own function instead: CUDA alone, in float16 and bfloat16, also
    for saved programs.
    """
    _enter()
    try:
        yield
    finally:
        _leave()


def _enter() -> None:
    with _state.lock:
        _state.depth += 1
        if _state.depth == 1:
            there = torch.nn.functional.scaled_dot_product_attention
            if there is not scaled_dot_product_attention:
                _state.original = there
            _replace(there, scaled_dot_product_attention)


def _leave() -> None:
    with _state.lock:
        _state.depth -= 1
        if _state.depth == 0:
            _replace(scaled_dot_product_attention, _state.original)


def _replace(old: object, new: object) -> None:
    """In every module that has it under its name; PyTorch's binding itself, in torch._C, stays."""
    for name, module in tuple(sys.modules.items()):
        names = vars(module) if isinstance(module, types.ModuleType) else {}
        if names.get(NAME) is old and not name.startswith(("torch._C", "torch_bridge")):
            setattr(module, NAME, new)


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:
    """`torch_bridge.scaled_dot_product_attention` while a `patched()` context is open."""
    return _attend(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def _attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool,
            scale: float | None, enable_gqa: bool) -> Tensor:
    function: Callable[..., Tensor] = sdpa.scaled_dot_product_attention
    if _state.depth == 0:
        function = _state.original
    elif (reason := _reason_against(query, key, value)) is not None:
        function = _state.original  # which a subclass must see as it is: nested tensors ask for it by name
        _say(reason, query)
    elif has_torch_function((query, key, value)):
        seen: Tensor = handle_torch_function(
            scaled_dot_product_attention, (query, key, value), query, key, value, attn_mask, dropout_p, is_causal,
            scale=scale, enable_gqa=enable_gqa)
        return seen
    return function(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


torch.jit.ignore(_attend)  # a scripted program calls it in Python


def _reason_against(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why a call is left to PyTorch."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            return None  # an error, and ours says which
        if hasattr(tensor, "placements"):
            return f"the operators have no sharding strategy for DTensors, and {name} is one"
        if tensor.layout is torch.jagged:
            if not nested.has_ragged_lengths(tensor):
                return f"it takes jagged tensors (batch, heads, ragged length, dim), and {name} has other axes"
        elif tensor.is_nested or tensor.layout is not torch.strided:
            kind = "nested and" if tensor.is_nested else "of layout"
            return f"it takes strided and jagged tensors, and {name} is {kind} {tensor.layout}"
        if tensor.device.type not in ("cpu", "cuda", "meta"):
            return f"it runs on CPU and CUDA tensors, and {name} is on {tensor.device.type}"
    return None


def _say(reason: str, query: Tensor) -> None:
    """Counts a call that is left to PyTorch, and warns where the reason is new."""
    if torch.compiler.is_compiling():
        return
    records.count("forward", "torch", f"{NAME} with {query.dtype} on {query.device}", (reason,))
    with _state.lock:
        new = reason not in _state.warned
        _state.warned.add(reason)
    if not new:
        return
    from pallas_flash import errors  # imports JAX
    try:
        warnings.warn(errors.fallback(
            "torch's own scaled_dot_product_attention runs a call inside torch_bridge.patched()", [reason],
            "change that to reach pallas_flash; torch_bridge.report() counts such calls"), stacklevel=4)
    except errors.FallbackWarning:  # a filter made it an error, and shall do so in the next call
        _state.warned.discard(reason)
        raise
