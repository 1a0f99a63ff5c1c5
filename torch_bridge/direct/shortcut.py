"""Calls seen before, known by SDPA's own arguments: what was found out about them is not found out again.

To check, broadcast and place a call takes longer than to launch it. A call that took the direct path is remembered by
all that decided so (shapes, strides, dtypes, devices, numbers) if its tensors and results are stored as kernels
read and write them. Of the next such call only the addresses are new. The calls of the last few kinds are known by one
look of torch's own at their tensors (guards.py), the others by a key.
"""

from typing import NamedTuple

import torch

from torch_bridge import records
from torch_bridge.arguments import Numbers, Operands
from torch_bridge.direct import attention, guards
from torch_bridge.direct.launch import ALIGNMENT
from torch_bridge.direct.runner import Runner

__all__ = ["Name", "Shortcut", "find", "find_recent", "learn", "may_know", "name_of"]

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


class _Storage(NamedTuple):
    """How the tensors of a call are stored."""

    out: _Stored
    stats: _Stored
    operands: tuple[_Stored, ...]  # query, key and value
    gradients: tuple[_Stored, ...]  # of these


class Shortcut:
    """The launches of a problem on tensors that are read, and results that are written, where they lie."""

    def __init__(self, direct: attention.Direct, numbers: Numbers, device: torch.device, forward_runner: Runner,
                 stored: _Storage) -> None:
        self.direct, self.numbers, self.device = direct, numbers, device
        self._run_forward, self._run_backward = forward_runner.run, direct.run_backward
        self._runs: records.Runs = direct.runs
        self._out, self._stats, self._operands, self._gradients = stored
        self._are_those_of_a_backward: guards.Guard = guards.never

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """out (batch, q_heads, q_len, d_v), stored as query is, and the statistics of rows."""
        device, empty = self.device, torch.empty_strided
        (shape, wanted, dtype), (of_stats, dense, float32) = self._out, self._stats
        out = empty(shape, wanted, dtype=dtype, device=device)
        stats = empty(of_stats, dense, dtype=float32, device=device)
        self._run_forward((query, key, value), (out, stats))
        self._runs.count("forward")
        return out, stats

    def backward(self, saved: tuple[torch.Tensor, ...], dout: torch.Tensor) -> list[torch.Tensor] | None:
        """The gradients of query, key and value, each stored as its tensor; None: there is no plan, one is of a
        subclass of Tensor, or a hook on saved tensors (`torch.autograd.graph.saved_tensors_hooks`) gave back one that
        is stored otherwise.

        Args:
          saved: query, key, value, out and the statistics of rows.
        """
        given = *saved, dout
        if not self._are_those_of_a_backward(*given) or not all(map(_is_aligned, given)):
            if any(type(x) not in _PLAIN for x in given):
                return None
            stored = zip((*self._operands, self._out, self._stats), saved, strict=True)
            if not all(like.is_like(x, self.device) for like, x in stored) or not self.direct.try_prepare("backward"):
                return None
            if not self._out.is_like(dout, self.device):
                dout = self._out.make(self.device).copy_(dout)
            self._are_those_of_a_backward = guards.guard((*saved, dout))
        grads = [result.make(self.device) for result in self._gradients]
        self._run_backward(saved, dout, grads)
        self._runs.count("backward")
        return grads


class _Known(NamedTuple):
    """A kind of calls that is known at a glance."""

    has: guards.Guard  # whether tensors are like those of such a call
    options: tuple[object, ...]
    shortcut: Shortcut


_MAX_RECENT = 4
_recent: list[_Known] = []
"""The kinds of the last calls that were found by their keys; never changed, but replaced as a whole."""


def find_recent(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *options: object) -> Shortcut | None:
    """The shortcut of a call that is known at a glance; None: nothing is, or a tensor must be copied.

    Args:
      options: the arguments of `name_of` that are not tensors, of the types that it takes.
    """
    for known in _recent:
        if known.options == options and known.has(query, key, value):
            if (known.shortcut.numbers.deterministic == torch.are_deterministic_algorithms_enabled()
                    and _is_aligned(query) and _is_aligned(key) and _is_aligned(value) and attention.is_on()):
                return known.shortcut
            return None
    return None


def _note(name: Name, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, found: Shortcut) -> None:
    """Has calls like this one found at a glance."""
    global _recent
    has = guards.guard((query, key, value))
    if has is not guards.never and has(query, key, value):  # it is not where two are the same tensor
        _recent = [_Known(has, name[_OPTIONS], found), *_recent[:_MAX_RECENT - 1]]


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


_OPTIONS = slice(-4, -1)  # of a name: is_causal, scale, enable_gqa


def find(name: Name, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Shortcut | None:
    """The shortcut of a call; None: there is none yet, or a tensor must be copied."""
    found = _shortcuts.get(name)
    if found is None or not all(map(_is_readable, (query, key, value))):
        return None
    _note(name, query, key, value, found)
    return found


def _is_aligned(tensor: torch.Tensor) -> bool:
    return not tensor.data_ptr() & (ALIGNMENT - 1)


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
        call.direct, numbers, query.device, runner, _Storage(
            _Stored(shape, call.out_strides, query.dtype),
            _Stored(stats, torch.empty(stats, device="meta").stride(), torch.float32), given, gradients))
