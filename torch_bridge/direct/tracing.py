"""Calls in a graph that torch traces: which will be launched directly, and may be part of a CUDA graph.

What decides is what decides in a call (attention.py). Where all sizes are numbers, the plan is found or made and loaded
now: a program that was compiled compiles nothing when it runs.
"""

import sys

import torch

from torch_bridge.arguments import Numbers, Operands
from torch_bridge.direct import apart, attention, requirements
from torch_bridge.direct.problem import PassName

__all__ = ["is_direct", "is_traced"]


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
    if device.type not in attention.DEVICES or not attention.is_on() or (
            device.type == "cuda" and not torch.cuda.is_available()):
        return False
    if any(isinstance(n, torch.SymInt) for x in operands if x is not None for n in (*x.shape, *x.stride())) or any(
            isinstance(n, torch.SymInt) for n in numbers):
        return attention.why_not(operands, numbers) is None and apart.run(_takes, device, attention.of_hopper(operands))
    stored = [None if x is None else (tuple(x.shape), x.stride(), x.dtype) for x in operands]
    return apart.run(_is_prepared, stored, numbers, device, pass_name)


def _takes(device: torch.device, only: str) -> bool:
    return attention.why_not_device(device, only) is None and requirements.why_not() is None


_Stored = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


def _is_prepared(stored: list[_Stored | None], numbers: Numbers, device: torch.device, pass_name: PassName) -> bool:
    """Whether the plan is loaded, now at the latest."""
    operands = Operands._make(
        None if x is None else torch.empty_strided(x[0], x[1], dtype=x[2], device="meta") for x in stored)
    return attention.why_not(operands, numbers) is None and _takes(device, attention.of_hopper(operands)) and (
        attention.prepared(operands, numbers, device, pass_name))
