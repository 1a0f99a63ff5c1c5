"""Calls of the operators that were launched before: what a compiled program runs.

They are known as those of SDPA are (shortcut.py): by one look at their tensors, and their other arguments. Calls with
masks, biases, seeds or places are none of these, nor are those of which autograd records something.
"""

from typing import NamedTuple

import torch

from torch_bridge.arguments import Attention, AttentionBackward, Numbers, Operands
from torch_bridge.direct import attention, guards, shortcut, storage

__all__ = ["backward", "forward", "learn_backward", "learn_forward"]

_NUM_ARRAYS, _MAX_RECENT = 3, 8
_ALL = [True, True, True, False, False]  # the gradients that are needed
_NUM_RESULTS = 5  # the last arguments of a backward: out, stats, dout, dstats and `needs`


class _Kind(NamedTuple):
    """Of calls of an operator."""

    has: guards.Guard  # whether query, key and value are like those of such a call
    others: tuple[object, ...]
    shortcut: shortcut.Shortcut


_forwards: list[_Kind] = []
_backwards: list[_Kind] = []
"""Those of the last calls that were learned; never changed, but replaced as a whole."""


def forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
            *others: object) -> tuple[torch.Tensor, torch.Tensor] | None:
    """out and stats of the arguments of `attention`; None: no such call is known, or a tensor must be copied.

    Nothing intercepts such a call that changes dispatch keys, of its tensors or of the thread.
    """
    for has, its, found in _forwards:
        if has(query, key, value) and its == others:
            addresses = a, b, c = query.data_ptr(), key.data_ptr(), value.data_ptr()
            if (a | b | c) & shortcut.UNALIGNED or not attention.is_on():
                return None
            needs_stats = bool(others[-1])
            out, stats = found.forward(addresses, needs_stats)
            return out, stats if needs_stats and stats is not None else found.nothing(torch.float32)
    return None


def learn_forward(*args: object) -> None:
    """Has calls like this one, which nothing intercepts and which has run, found by `forward`."""
    global _forwards
    kind = _kind(args[_NUM_ARRAYS:], *Attention.of(args)[:2])
    if kind is not None:
        _forwards = [kind, *_forwards[:_MAX_RECENT - 1]]


def backward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
             *others: object) -> tuple[torch.Tensor, ...] | None:
    """dq, dk, dv, and no dbias and dscore_floats, of the arguments of `attention_backward`; None: as `forward`."""
    out, stats, dout, dstats, needs = others[-_NUM_RESULTS:]
    if dstats is not None or needs != _ALL or not attention.is_on() or not (
            isinstance(out, torch.Tensor) and isinstance(stats, torch.Tensor) and isinstance(dout, torch.Tensor)):
        return None
    others = others[:-_NUM_RESULTS]
    for has, its, found in _backwards:
        if has(query, key, value) and its == others:
            grads = found.backward((query, key, value, out, stats), dout, _never)
            nothing = found.nothing(query.dtype)  # one for both, which have no element to share
            return None if grads is None else (*grads, nothing, nothing)
    return None


def learn_backward(*args: object) -> None:
    """Has calls like this one found by `backward`, as `learn_forward`."""
    global _backwards
    operands, numbers, results, (dout, dstats), needs = AttentionBackward.of(args)
    kind = _kind(args[_NUM_ARRAYS:-_NUM_RESULTS], operands, numbers)
    if kind is None or dout is None or dstats is not None or [*needs] != _ALL:
        return
    if kind.shortcut.learn_backward((operands.query, operands.key, operands.value, *results), dout):
        _backwards = [kind, *_backwards[:_MAX_RECENT - 1]]


def _kind(others: tuple[object, ...], operands: Operands, numbers: Numbers) -> _Kind | None:
    """Of a call with these arguments; None: it did not take the direct path, or a tensor had to be copied."""
    query, key, value, *rest = operands
    if any(x is not None for x in rest) or not shortcut.may_know(query, key, value) or not all(
            map(storage.is_readable, (query, key, value))):
        return None
    found, has = shortcut.made(operands, numbers), guards.guard((query, key, value))
    return _Kind(has, others, found) if found is not None and has(query, key, value) else None


def _never() -> bool:
    return False
