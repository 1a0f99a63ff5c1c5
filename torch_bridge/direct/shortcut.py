"""Calls seen before, known by SDPA's own arguments: what was found out about them is not found out again.

To check, broadcast and place a call takes longer than to launch it. A call that took the direct path is remembered by
all that decided so (shapes, strides, dtypes, devices, numbers) if its tensors and results are stored as kernels
read and write them. Of the next such call only the addresses are new.
"""

from typing import NamedTuple

import torch

from torch_bridge import records
from torch_bridge.arguments import Numbers, Operands
from torch_bridge.direct import attention
from torch_bridge.direct.launch import ALIGNMENT
from torch_bridge.direct.runner import Runner

__all__ = ["Name", "Shortcut", "find", "learn", "may_know", "name_of"]

type Name = tuple[object, ...]
"""Everything but the numbers in its tensors that decides how a call is computed."""

_PLAIN = {torch.Tensor, torch.nn.Parameter}
_MAX_SHORTCUTS = 4096
_shortcuts: dict[Name, "Shortcut"] = {}


class _Stored(NamedTuple):
    """How a tensor is stored."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    def make(self, device: torch.device) -> torch.Tensor:
        """A new tensor."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=device)

    def is_like(self, tensor: torch.Tensor, device: torch.device) -> bool:
        """Whether a tensor is stored like this, and can be read at its address."""
        return (tensor.stride() == self.strides and tensor.shape == self.shape and tensor.dtype == self.dtype
                and tensor.device == device and _is_readable(tensor))


class Shortcut(NamedTuple):
    """The launches of a problem on tensors that are read, and results that are written, where they lie."""

    direct: attention.Direct
    numbers: Numbers
    device: torch.device
    runs: records.Runs
    forward_runner: Runner
    out: _Stored
    stats: _Stored
    operands: tuple[_Stored, ...]  # query, key and value
    gradients: tuple[_Stored, ...]  # of these

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """out (batch, q_heads, q_len, d_v), stored as query is, and the statistics of rows."""
        out, stats = self.out.make(self.device), self.stats.make(self.device)
        self.forward_runner.run((query, key, value), (out, stats))
        self.runs.count("forward")
        return out, stats

    def backward(self, saved: tuple[torch.Tensor, ...], dout: torch.Tensor) -> list[torch.Tensor] | None:
        """The gradients of query, key and value, each stored as its tensor; None: there is no plan, or a hook on saved
        tensors (`torch.autograd.graph.saved_tensors_hooks`) gave back one that is stored otherwise.

        Args:
          saved: query, key, value, out and the statistics of rows.
        """
        stored = zip((*self.operands, self.out, self.stats), saved, strict=True)
        if not all(like.is_like(x, self.device) for like, x in stored) or not self.direct.try_prepare("backward"):
            return None
        if not self.out.is_like(dout, self.device):
            dout = self.out.make(self.device).copy_(dout)
        grads = [result.make(self.device) for result in self.gradients]
        self.direct.run_backward(saved, dout, grads)
        self.runs.count("backward")
        return grads


def may_know(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether calls of these may have shortcuts: plain tensors, with strides, of a device on which the direct path is
    not switched off.
    """
    return (type(query) in _PLAIN and type(key) in _PLAIN and type(value) in _PLAIN
            and query.device.type in attention.DEVICES and attention.is_on()
            and all(x.layout is torch.strided and not x.is_nested for x in (query, key, value)))


def name_of(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool, scale: float | None,
            enable_gqa: bool) -> Name:
    """Of a call without a mask and without dropout."""
    return (query.shape, query.stride(), key.shape, key.stride(), value.shape, value.stride(), query.dtype, key.dtype,
            value.dtype, query.device, key.device, value.device, is_causal, scale, enable_gqa,
            torch.are_deterministic_algorithms_enabled())


def find(name: Name, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Shortcut | None:
    """The shortcut of a call; None: there is none yet, or a tensor must be copied."""
    found = _shortcuts.get(name)
    return found if found is not None and all(map(_is_readable, (query, key, value))) else None


def _is_readable(tensor: torch.Tensor) -> bool:
    """Whether what lies at the tensor's address is its numbers: it may be negated, or have no memory, and be zeros."""
    address = tensor.data_ptr()
    return bool(address) and not address % ALIGNMENT and not tensor.is_neg()


def learn(name: Name, operands: Operands, numbers: Numbers) -> None:
    """Remembers a call that has run, if it took the direct path and nothing of it had to be copied."""
    call = attention.known(operands, numbers)
    if call is None or not call.is_in_place:
        return
    runner = call.direct.runner("forward")
    if runner is None:
        return
    query, _, value, *_ = operands
    shape = (*query.shape[:3], value.shape[3])
    given = tuple(_Stored(tuple(x.shape), x.stride(), x.dtype) for x in operands[:3])
    gradients = tuple(like._replace(strides=wanted) for like, wanted in zip(given, call.grad_strides, strict=True))
    stats = runner.shape_of("stats")
    if len(_shortcuts) >= _MAX_SHORTCUTS:
        _shortcuts.clear()
    _shortcuts[name] = Shortcut(
        call.direct, numbers, query.device, call.direct.runs, runner, _Stored(shape, call.out_strides, query.dtype),
        _Stored(stats, torch.empty(stats, device="meta").stride(), torch.float32), given, gradients)
