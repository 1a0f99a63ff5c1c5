"""Calls seen before, known by SDPA's own arguments: what was found out about them is not found out again.

To check, broadcast and place a call takes longer than to launch it. A call that took the direct path is remembered by
all that decided so (shapes, strides, dtypes, devices, numbers) if its tensors and results are stored as kernels
read and write them. Of the next such call only the addresses are new. The calls of the last few kinds are known by one
look of torch's own at their tensors (guards.py), the others by a key.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from torch_bridge import streams, strides
from torch_bridge.arguments import Numbers, Operands
from torch_bridge.direct import allocation, attention, guards, storage
from torch_bridge.direct.launch import ALIGNMENT
from torch_bridge.direct.runner import Runner

__all__ = ["Known", "Name", "Shortcut", "UNALIGNED", "autocast_dtype", "find", "find_recent", "learn", "made",
           "may_know", "name_of", "with_copies"]

type Name = tuple[object, ...]
"""Everything but the numbers in its tensors that decides how a call is computed."""

_PLAIN = {torch.Tensor, torch.nn.Parameter}
UNALIGNED = ALIGNMENT - 1
"""The bits of an address that are 0 where it is aligned."""
_Addresses = tuple[int, ...]
# What torch.are_deterministic_algorithms_enabled returns.
_is_deterministic = getattr(torch._C, "_get_deterministic_algorithms", torch.are_deterministic_algorithms_enabled)
_MAX_SHORTCUTS = 4096
_shortcuts: dict[Name, "Shortcut"] = {}
_made: dict[tuple[object, ...], "Shortcut"] = {}
_Copies = tuple[strides.Layout | None, strides.Layout | None]
"""In which layout key and value are copied on their way to a kernel; None: they are not."""
_copied: dict[Name, _Copies] = {}


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
                and tensor.device == device and storage.is_readable(tensor))


class _Storage(NamedTuple):
    """How the tensors of a call are stored."""

    out: _Stored
    stats: _Stored
    operands: tuple[_Stored, ...]  # query, key and value
    gradients: tuple[_Stored, ...]  # of these


class _Backward(NamedTuple):
    """The backward of a shortcut, prepared."""

    has: guards.Guard  # whether tensors are like those of such a backward: what was saved, and the cotangent
    run: Callable[[Sequence[int]], None]
    zeros: int  # the address of the cotangent of the statistics
    add: Callable[[], object]  # counts one


_NO_BACKWARD = _Backward(guards.never, NotImplemented, 0, NotImplemented)


class Shortcut:
    """The launches of a problem on tensors that are read, and results that are written, where they lie."""

    def __init__(self, direct: attention.Direct, numbers: Numbers, device: torch.device, runner: Runner,
                 stored: _Storage) -> None:
        self.direct, self.numbers, self.device = direct, numbers, device
        self._index = device.index if device.type == "cuda" else None
        self._run, self._count, self._empty = runner.run_at, direct.runs.counter("forward"), allocation.maker(device)
        self._out, self._stats, self._operands, self._gradients = stored
        self._unread = None if direct.unread is None else direct.unread.data_ptr()
        self._backward = _NO_BACKWARD
        self.recorder: Callable[..., torch.Tensor] | None = None
        """What has autograd record such a call (eager.py), once one was."""

    def forward(self, addresses: _Addresses, saves: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """out (batch, q_heads, q_len, d_v), stored as query is, and the statistics of rows; where these are not to be
        saved, None if that takes less.

        Args:
          addresses: of query, key and value.
        """
        if self._index is not None and streams.device() != self._index:
            with torch.cuda.device(self._index):
                return self.forward(addresses, saves)
        out, stats, where = self._empty(*self._out), None, self._unread
        if saves or where is None:
            stats = self._empty(*self._stats)
            where = stats.data_ptr()
        self._run((*addresses, out.data_ptr(), where))
        self._count()
        return out, stats

    def backward(self, saved: Sequence[torch.Tensor], dout: torch.Tensor,
                 may_be_learned: Callable[[], bool]) -> tuple[torch.Tensor, ...] | None:
        """The gradients of query, key and value, each stored as its tensor; None: there is no plan, something may
        intercept calls, or a hook on saved tensors (`torch.autograd.graph.saved_tensors_hooks`) gave back one that is
        stored otherwise.

        Args:
          saved: query, key, value, out and the statistics of rows.
          may_be_learned: says of a kind that is not known whether nothing intercepts calls of plain tensors.
        """
        query, key, value, out, stats = saved
        known = self._backward
        if known.has(query, key, value, out, stats, dout):  # first: what is not plain may have no address
            addresses = a, b, c, d, e, f = (query.data_ptr(), key.data_ptr(), value.data_ptr(), out.data_ptr(),
                                            stats.data_ptr(), dout.data_ptr())
            if not (a | b | c | d | e | f) & UNALIGNED:
                return self._launch_backward(addresses, known)
        if not may_be_learned() or any(type(x) not in _PLAIN for x in (*saved, dout)):
            return None
        if not self._are_saved(saved):
            return None
        if not self._out.is_like(dout, self.device):
            dout = self._out.make(self.device).copy_(dout)
        if not self._backward.has(*saved, dout):
            if not self.direct.try_prepare("backward"):
                return None
            self._learn((*saved, dout))
        return self._launch_backward((*(x.data_ptr() for x in saved), dout.data_ptr()), self._backward)

    def nothing(self, dtype: torch.dtype) -> torch.Tensor:
        """A new tensor without elements, the result that was not asked for."""
        if self._index is not None and streams.device() != self._index:
            return torch.empty((0,), dtype=dtype, device=self.device)
        return self._empty((0,), (1,), dtype)

    def learn_backward(self, saved: Sequence[torch.Tensor], dout: torch.Tensor) -> bool:
        """Has the backwards of tensors like these known to `backward`, if they are read where they lie, and one has
        run; returns whether they are.
        """
        fits = (all(type(x) in _PLAIN for x in (*saved, dout)) and self._are_saved(saved)
                and self._out.is_like(dout, self.device) and self.direct.runner("backward") is not None)
        if fits:
            self._learn((*saved, dout))
        return fits

    def _are_saved(self, saved: Sequence[torch.Tensor]) -> bool:
        stored = zip((*self._operands, self._out, self._stats), saved, strict=True)
        return all(like.is_like(x, self.device) for like, x in stored)

    def _learn(self, tensors: Sequence[torch.Tensor]) -> None:
        runner = self.direct.runner("backward")
        assert runner is not None
        self._backward = _Backward(guards.guard(tensors), runner.run_at, self.direct.address_of_zeros(),
                                   self.direct.runs.counter("backward"))

    def _launch_backward(self, addresses: _Addresses, known: _Backward) -> tuple[torch.Tensor, ...]:
        if self._index is not None and streams.device() != self._index:
            with torch.cuda.device(self._index):
                return self._launch_backward(addresses, known)
        _, run, zeros, add = known
        empty, (of_query, of_key, of_value) = self._empty, self._gradients
        dq, dk, dv = empty(*of_query), empty(*of_key), empty(*of_value)
        run((*addresses, zeros, dq.data_ptr(), dk.data_ptr(), dv.data_ptr()))
        add()
        return dq, dk, dv


class Known(NamedTuple):
    """A kind of calls that is known at a glance."""

    options: tuple[object, ...]
    has: guards.Guard  # whether tensors are like those of such a call
    deterministic: bool
    needs_gradients: bool  # of a tensor, if gradients are recorded
    autocast: torch.dtype | None  # that of its tensors, where it was on: `has` knows whether it is, but not to what
    shortcut: Shortcut


_MAX_RECENT = 4
_recent: list[Known] = []
"""The kinds of the last calls that were found by their keys; never changed, but replaced as a whole."""


def find_recent(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                options: tuple[object, ...]) -> tuple[Shortcut, bool, _Addresses] | None:
    """The shortcut of a call that is known at a glance, whether a tensor needs a gradient if they are recorded, and the
    addresses of query, key and value; None: it is not, or a tensor must be copied. Nothing intercepts such a call that
    changes dispatch keys, of its tensors or of the thread.

    Args:
      options: the arguments of `name_of` that are not tensors, of the types that it takes.
    """
    for its, has, deterministic, needs_gradients, autocast, found in _recent:
        if its == options and has(query, key, value):
            if autocast is not None and autocast_dtype(query) != autocast:
                return None
            addresses = a, b, c = query.data_ptr(), key.data_ptr(), value.data_ptr()
            if (a | b | c) & UNALIGNED or deterministic != _is_deterministic() or not attention.is_on():
                return None
            return found, needs_gradients, addresses
    return None


def _note(name: Name, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, found: Shortcut) -> None:
    """Has calls like this one, which nothing intercepts, found at a glance."""
    global _recent
    has = guards.guard((query, key, value))
    if has is not guards.never and has(query, key, value):  # it is not where two are the same tensor
        needs_gradients = query.requires_grad or key.requires_grad or value.requires_grad
        known = Known(name[_OPTIONS], has, found.numbers.deterministic, needs_gradients, autocast_dtype(query), found)
        _recent = [known, *_recent[:_MAX_RECENT - 1]]


def autocast_dtype(query: torch.Tensor) -> torch.dtype | None:
    """What autocast casts floating tensors to in calls of this query (float64 it leaves alone); None: it is off."""
    kind = query.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


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
    if found is None or not all(map(storage.is_readable, (query, key, value))):
        return None
    _note(name, query, key, value, found)
    return found


def learn(name: Name, operands: Operands, numbers: Numbers) -> None:
    """Remembers a call that has run, if it took the direct path and nothing of it had to be copied; or nothing but key
    and value, and which of them (`with_copies`).
    """
    found = made(operands, numbers)
    if found is None:
        copies = _copies(operands, numbers)
        if any(copies):
            if len(_copied) >= _MAX_SHORTCUTS:
                _copied.clear()
            _copied[name] = copies
        return
    if len(_shortcuts) >= _MAX_SHORTCUTS:
        _shortcuts.clear()
    _shortcuts[name] = found


def with_copies(name: Name, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """key and value, as copies that autograd records where kernels do not read them as they are stored; None: nothing
    is known of such a call, or nothing has to be copied.
    """
    copies = _copied.get(name)
    return None if copies is None else (_stored_in(copies[0], key), _stored_in(copies[1], value))


def _stored_in(layout: strides.Layout | None, tensor: torch.Tensor) -> torch.Tensor:
    if layout is None:
        return tensor
    return tensor.contiguous() if layout == "BHLD" else tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _copies(operands: Operands, numbers: Numbers) -> _Copies:
    """In which layout key and value are copied for a call that has run; None of those that are not. Neither is where
    the copies would not do: query is copied, too, or a result.
    """
    call = attention.known(operands, numbers)
    if call is None or call.is_in_place:
        return None, None
    layout = call.direct.problem.layout
    shape = *operands.query.shape[:3], operands.value.shape[3]

    def is_dense(shape: tuple[int, ...], its: tuple[int, ...]) -> bool:
        return strides.in_layout(torch.empty_strided(shape, its, device="meta"), layout).is_contiguous()

    views = [strides.in_layout(x, layout) for x in operands[:3]]
    is_read = [strides.same_memory(x.shape, x.stride(), wanted)
               for x, wanted in zip(views, call.direct.strides, strict=True)]
    is_written = [is_dense(x.shape, its) for x, its in zip(operands[:3], call.grad_strides, strict=True)]
    if not (is_read[0] and is_dense(shape, call.out_strides) and is_written[0]
            and all(written or not read for read, written in zip(is_read, is_written, strict=True))):
        return None, None
    return None if is_read[1] else layout, None if is_read[2] else layout


def made(operands: Operands, numbers: Numbers) -> Shortcut | None:
    """The shortcut of a call that has run; None: it did not take the direct path, or something had to be copied."""
    call = attention.known(operands, numbers)
    if call is None or not call.is_in_place:
        return None
    runner = call.direct.runner("forward")
    if runner is None or runner.program.operations:  # what they make is made in each call
        return None
    kind = call, numbers, *(x.stride() for x in operands[:3])
    found = _made.get(kind)
    if found is None:
        if len(_made) >= _MAX_SHORTCUTS:
            _made.clear()
        found = _made[kind] = _of(call, runner, operands, numbers)
    return found


def _of(call: attention.DirectCall, runner: Runner, operands: Operands, numbers: Numbers) -> Shortcut:
    query, _, value, *_ = operands
    shape = (*query.shape[:3], value.shape[3])
    given = tuple(_Stored(tuple(x.shape), x.stride(), x.dtype) for x in operands[:3])
    gradients = tuple(like._replace(strides=wanted) for like, wanted in zip(given, call.grad_strides, strict=True))
    stats = runner.shape_of("stats")
    return Shortcut(
        call.direct, numbers, query.device, runner, _Storage(
            _Stored(shape, call.out_strides, query.dtype),
            _Stored(stats, torch.empty(stats, device="meta").stride(), torch.float32), given, gradients))
