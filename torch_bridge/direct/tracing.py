"""Calls in a graph that torch traces: which will be launched directly, and may be part of a CUDA graph.

What decides is what decides in a call (attention.py). Where all sizes are numbers, the plan is found or made and loaded
now: a program that was compiled compiles nothing when it runs.
"""

import sys
from collections.abc import Sequence

import torch

from torch_bridge.arguments import Numbers, Operands
from torch_bridge.direct import apart, attention, decoding, requirements
from torch_bridge.direct.problem import PassName

__all__ = ["is_direct", "is_direct_to_cache", "is_traced"]


def is_traced() -> bool:
    """Whether operators are recorded instead of run."""
    tracer = sys.modules.get("torch.fx.experimental.proxy_tensor")  # which torch.compile and torch.export import
    return tracer is not None and tracer.get_proxy_mode() is not None


def is_direct(operands: Operands, numbers: Numbers, pass_name: PassName) -> bool:
    """Whether a pass of a call of these tensors, which may be fake ones, is launched directly when it runs.

    False also where it might be, but its plan cannot be made now: no GPU is here, or something fails, of which a
    warning tells.
    """
    device = operands.query.device
    if not _is_here(device):
        return False
    if _varies(operands, numbers):
        return attention.why_not(operands, numbers) is None and apart.run(
            _takes, device, attention.of_hopper(operands, numbers))
    return apart.run(_is_prepared, _stored(operands), numbers, device, pass_name)


def is_direct_to_cache(call: decoding.Call, rules: decoding.Rules) -> bool:
    """`is_direct` of a call of the kernel of caches. Addresses are asked for when it runs. False where the capacity is
    a size that varies: a plan is for one, and a cache that grows would have one made for each token.
    """
    device = call.query.device
    if not _is_here(device) or call.needs_grad or any(x is not None and x.device != device for x in call):
        return False
    if _varies(call, rules):
        return not isinstance(call.capacity, torch.SymInt) and decoding.why_not(call, rules) is None and apart.run(
            decoding.is_possible, device)
    return apart.run(_is_prepared_to_cache, _stored(call), rules, device)


def _is_here(device: torch.device) -> bool:
    return device.type in attention.DEVICES and attention.is_on() and (
        device.type != "cuda" or torch.cuda.is_available())


def _varies(tensors: Sequence[torch.Tensor | None], numbers: Sequence[object]) -> bool:
    """Whether a size stands for several."""
    return any(isinstance(n, torch.SymInt) for x in tensors if x is not None for n in (*x.shape, *x.stride())) or any(
        isinstance(n, torch.SymInt) for n in numbers)


def _takes(device: torch.device, only: str) -> bool:
    return attention.why_not_device(device, only) is None and requirements.why_not() is None


_Stored = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


def _stored(tensors: Sequence[torch.Tensor | None]) -> list[_Stored | None]:
    return [None if x is None else (tuple(x.shape), x.stride(), x.dtype) for x in tensors]


def _like(stored: Sequence[_Stored | None]) -> list[torch.Tensor | None]:
    return [None if x is None else torch.empty_strided(x[0], x[1], dtype=x[2], device="meta") for x in stored]


def _is_prepared(stored: list[_Stored | None], numbers: Numbers, device: torch.device, pass_name: PassName) -> bool:
    """Whether the plan is loaded, now at the latest."""
    operands = Operands._make(_like(stored))
    return (attention.why_not(operands, numbers) is None and _takes(device, attention.of_hopper(operands, numbers))
            and attention.prepared(operands, numbers, device, pass_name))


def _is_prepared_to_cache(stored: list[_Stored | None], rules: decoding.Rules, device: torch.device) -> bool:
    call = decoding.Call._make(_like(stored))
    return decoding.is_possible(device) and decoding.why_not(call, rules) is None and decoding.prepared(
        call, rules, device)
