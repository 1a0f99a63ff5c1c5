"""Attention of new queries to a cache on the direct path: which calls take it, with which plan, and their tensors.

One launch of the kernel that shares out the keys of all sequences (docs/kernels.md). Keys and values are read where
they lie, contiguous or in pages; what is not read so, or not by that kernel, is refused with a reason, and
`cached.attend` computes it as attention with lengths. Lengths and the table of pages are read by the kernel alone, so
that a captured CUDA graph is replayed with others.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from torch_bridge import strides
from torch_bridge.arguments import LARGEST_NUMBER, Results
from torch_bridge.direct import attention, cache, guards, requirements, storage
from torch_bridge.direct.launch import ALIGNMENT
from torch_bridge.direct.problem import CacheProblem, Given
from torch_bridge.direct.runner import Runner

__all__ = ["Call", "Known", "Rules", "attend", "is_asked", "is_possible", "learn", "path",
           "prepared", "problem_of", "takes", "why_not", "why_not_direct"]

_DTYPES = (torch.bfloat16, torch.float16)
_UNIT, _MAX_DIM, _MAX_ROWS = 8, 256, 64
_PAGE_UNIT = 16  # positions: smaller pages would be read in pieces of few bytes
_WITH_ADDRESS = (torch.Tensor, torch.nn.Parameter)
_MAX_CALLS = 4096


class Call(NamedTuple):
    """The tensors of a call. In pages, keys and values are (pages, kv_heads, page_length, d)."""

    query: torch.Tensor  # (batch, q_heads, q_len, d)
    key: torch.Tensor  # (batch, kv_heads, capacity, d)
    value: torch.Tensor  # (batch, kv_heads, capacity, d_v)
    lengths: torch.Tensor  # how many keys of each sequence count, those of the queries too, (batch,) int32
    table: torch.Tensor | None = None  # of each sequence its pages in order, (batch, pages) int32
    bias: torch.Tensor | None = None  # added to the scores, (batch or 1, q_heads or 1, 1, capacity)
    sinks: torch.Tensor | None = None  # (q_heads,)

    @property
    def capacity(self) -> int:
        """Positions of a sequence."""
        return self.key.shape[2] * (1 if self.table is None else self.table.shape[1])

    @property
    def needs_grad(self) -> bool:
        """Whether a gradient would be recorded."""
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in self)


class Rules(NamedTuple):
    """The numbers of a call. The query at i stands at position lengths - q_len + i."""

    left: int | None  # it attends to so many keys before its own; None: to all
    right: int | None  # and to so many after
    softcap: float | None
    scale: float | None


def why_not(call: Call, rules: Rules) -> str | None:
    """Why the kernel does not take a call, as far as the call itself says; None: it does. Arguments were checked."""
    query, key, value = call[:3]
    rows, batch = query.shape[2] * (query.shape[1] // max(value.shape[1], 1)), query.shape[0]
    sequences = key.shape[0] if call.table is None else call.table.shape[0]
    fit = (key.shape == (*value.shape[:3], query.shape[3]) and sequences == batch == call.lengths.shape[0]
           and value.shape[1] > 0 and query.shape[1] % value.shape[1] == 0
           and all(x is None or x.device == query.device for x in call))
    conditions = (
        (query.dtype in _DTYPES and query.dtype == key.dtype == value.dtype,
         f"it takes bfloat16 and float16, the same of all, got {query.dtype}, {key.dtype} and {value.dtype}"),
        (all(x.numel() for x in (query, key, value)), "there is no output element or no key"),
        (fit, "the shapes or devices of its tensors do not fit"),  # what checks them says more
        (query.shape[3] % _UNIT == 0 == value.shape[3] % _UNIT and max(query.shape[3], value.shape[3]) <= _MAX_DIM,
         f"it takes head dimensions that are multiples of {_UNIT} up to {_MAX_DIM}, d={query.shape[3]}, "
         f"d_v={value.shape[3]}"),
        (rows <= _MAX_ROWS, f"it takes at most {_MAX_ROWS} queries that share a key head, there are {rows}"),
        (call.table is None or key.shape[2] % _PAGE_UNIT == 0,
         f"it takes pages, and rows of cache_batch_idx, of multiples of {_PAGE_UNIT} positions, got {key.shape[2]}"),
        (rules.left is None or rules.right is None or rules.left + rules.right >= 0,
         f"it takes no such window, ({rules.left}, {rules.right})"),
        (rules.softcap is None or 0 < rules.softcap <= LARGEST_NUMBER, f"it takes no such soft cap, {rules.softcap}"),
        (rules.scale is None or (isinstance(rules.scale, int | float) and abs(rules.scale) <= LARGEST_NUMBER),
         f"it takes no such scale, {rules.scale}"),
        (not call.needs_grad, "it has no gradient"),
        (call.bias is None or call.bias.dtype in (*_DTYPES, torch.float32),
         f"it takes no bias of {None if call.bias is None else call.bias.dtype}"),
        (_layout_of(call) is not None, "it takes dense caches, (batch, length, heads, dim) or with heads before "
         f"length, at multiples of {ALIGNMENT} bytes, strides are {key.stride()} and {value.stride()} of (batch, "
         "heads, length, dim)"),
    )
    return next((reason for holds, reason in conditions if not holds), None)


def _layout_of(call: Call) -> strides.Layout | None:
    """The layout in which keys and values are dense; of two, that in which the query is."""
    order: tuple[strides.Layout, strides.Layout] = (
        ("BLHD", "BHLD") if strides.is_heads_inside(call.query) else ("BHLD", "BLHD"))
    return next((layout for layout in order if all(
        strides.in_layout(x, layout).is_contiguous() and not x.is_neg() and _is_aligned(x)
        for x in (call.key, call.value))), None)


def _is_aligned(x: torch.Tensor) -> bool:
    """Of a tensor that stands for others while torch traces, which has no address: it may be."""
    return type(x) not in _WITH_ADDRESS or not x.data_ptr() % ALIGNMENT


def problem_of(call: Call, rules: Rules) -> CacheProblem:
    """The problem of a call that nothing is against."""
    query, key, value, table, layout = call.query, call.key, call.value, call.table, _layout_of(call)
    assert layout is not None
    given: Given = ("lengths", (query.shape[0],), "int32"),
    if table is not None:
        given += ("page_table", tuple(table.shape), "int32"),
    if call.bias is not None:
        given += ("bias", tuple(call.bias.shape), str(call.bias.dtype).removeprefix("torch.")),
    if call.sinks is not None:
        given += ("sinks", (query.shape[1],), "float32"),
    return CacheProblem(
        layout=layout, dtype="bfloat16" if query.dtype == torch.bfloat16 else "float16", batch=query.shape[0],
        q_heads=query.shape[1], kv_heads=key.shape[1], q_len=query.shape[2], capacity=call.capacity, d=query.shape[3],
        d_v=value.shape[3], pages=None if table is None else (key.shape[0], key.shape[2]),
        window=_window(rules, query.shape[2]), scale=rules.scale, softcap=rules.softcap, given=given)


def _window(rules: Rules, q_len: int) -> tuple[int | None, int | None]:
    """Of one query no key stands behind it: whether it is causal makes no other plan."""
    return rules.left, None if q_len == 1 and rules.right is not None and rules.right >= 0 else rules.right


def is_asked(device: torch.device) -> bool:
    """Whether calls on a device may be taken at all."""
    return device.type in attention.DEVICES and attention.is_on() and _why_not_gpu(device) is None


# What torch.compiler.assume_constant_result does, without importing the compiler: a graph is traced for the answer.
is_asked._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _why_not_gpu(device: torch.device) -> str | None:
    """Why no cache is read on a GPU; None: it is. Asked in every call."""
    return attention.why_not_device(device)


def is_possible(device: torch.device) -> bool:
    """`is_asked`, with what is installed."""
    return is_asked(device) and requirements.why_not() is None


def prepared(call: Call, rules: Rules, device: torch.device) -> bool:
    """Whether the plan of a call that nothing is against is loaded, now at the latest; where it cannot be, a warning
    says why. Shapes, strides and dtypes of its tensors count.
    """
    return attention.direct_of((problem_of(call, rules), device)).try_prepare("decode")


def attend(call: Call, rules: Rules) -> Results | None:
    """out (batch, q_heads, q_len, d_v), dense in the layout of the cache, and the statistics of rows, of which the
    first is lse, sinks and bias included; None: the call is not taken.

    Raises:
      RuntimeError: as `attention.Direct.prepare`.
    """
    if not is_asked(call.query.device):
        return None
    direct = _found(call, rules)
    if direct is None or not direct.try_prepare("decode"):
        return None
    runner, layout = direct.runner("decode"), direct.problem.layout
    assert runner is not None
    query = strides.sharable(strides.in_layout(call.query, layout), ALIGNMENT)
    given = call.lengths[:, None], call.bias, _kernels(call.sinks), call.table
    out, stats = runner((query, *(strides.in_layout(x, layout) for x in (call.key, call.value)),
                         *(strides.sharable(x, ALIGNMENT) for x in given if x is not None)))
    direct.runs.count("decode")
    return Results(strides.in_layout(out, layout), stats)


def takes(call: Call, rules: Rules) -> bool:
    """Whether nothing is against a call, whose arguments need not have been checked; its plan may not be there."""
    return is_asked(call.query.device) and _found(call, rules) is not None


def _kernels(sinks: torch.Tensor | None) -> torch.Tensor | None:
    """Sinks as the kernel reads them."""
    return None if sinks is None else sinks.detach().to(torch.float32)[None, :, None, None]


_known: dict[tuple[object, ...], attention.Direct | None] = {}
"""By all but the numbers in its tensors that decides how a call is computed."""


def _found(call: Call, rules: Rules) -> attention.Direct | None:
    """What runs a call, whether its plan is loaded or not; None: it is not taken. Addresses are asked for each time: a
    cache may be a part of a tensor.
    """
    if call.needs_grad or any(x.data_ptr() % ALIGNMENT for x in (call.key, call.value)):
        return None
    name = (*[(x.shape, x.stride(), x.dtype, x.is_neg()) for x in call[:3]],
            *[x if x is None else (x.shape, x.dtype, x.device) for x in call], rules)
    try:
        return _known[name]
    except KeyError:
        pass
    is_taken = why_not(call, rules) is None and requirements.why_not() is None
    found = attention.direct_of((problem_of(call, rules), call.query.device)) if is_taken else None
    if len(_known) >= _MAX_CALLS:
        _known.clear()
    _known[name] = found
    return found


# --- calls seen before -----------------------------------------------------------------------------------------------
# To check a call and to place its tensors takes longer than to launch it (shortcut.py). Of a call whose tensors are
# like those of one that was launched, as torch looks at them, and whose options are the same, only addresses are new.


class Known(NamedTuple):
    """A kind of calls whose tensors, (batch, length, heads, dim), are read and written where they lie."""

    has: guards.Guard
    options: tuple[object, ...]
    direct: attention.Direct
    runner: Runner
    out: tuple[int, ...]  # the shape

    def attend(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """out (batch, q_len, q_heads, d_v), and lse (batch, q_heads, q_len).

        Args:
          tensors: query, key, value, lengths, and the table of pages if there is one.
        """
        query = tensors[0]
        out = torch.empty(self.out, dtype=query.dtype, device=query.device)
        stats = torch.empty(self.runner.shape_of("stats"), dtype=torch.float32, device=query.device)
        self.runner.run(tensors, (out, stats))
        self.direct.runs.count("decode")
        return out, stats[:, :, 0]


_MAX_RECENT = 4
_recent: list[Known] = []
"""The kinds of the last calls that were learned; never changed, but replaced as a whole."""


def recent(tensors: Sequence[torch.Tensor], options: tuple[object, ...]) -> Known | None:
    """What is known of a call on a device that `is_asked`; None: nothing is, or a tensor is not aligned."""
    for known in _recent:
        if known.options == options and known.has(*tensors):
            bits = 0
            for x in tensors:
                bits |= x.data_ptr()
            return None if bits % ALIGNMENT else known
    return None


def learn(tensors: Sequence[torch.Tensor], options: tuple[object, ...], call: Call, rules: Rules) -> None:
    """Has calls like this one found by `recent`, if it was launched and nothing of it had to be copied.

    Args:
      tensors: all that the caller gave; those of `call` are views of them, or sums of lengths.
    """
    global _recent
    direct = _found(call, rules)
    runner = None if direct is None else direct.runner("decode")
    if direct is None or runner is None or direct.problem.layout != "BLHD" or call.bias is not None:
        return
    if not strides.in_layout(call.query, "BLHD").is_contiguous() or not all(
            x is None or x.is_contiguous() for x in (call.lengths, call.table)) or not all(
            map(storage.is_readable, tensors)):
        return
    has = guards.guard(tensors)
    if has is not guards.never and has(*tensors):
        query = call.query
        out = query.shape[0], query.shape[2], query.shape[1], call.value.shape[3]
        _recent = [Known(has, options, direct, runner, out), *_recent[:_MAX_RECENT - 1]]


# --- what is said of a call ------------------------------------------------------------------------------------------


def why_not_direct(call: Call, rules: Rules) -> str | None:
    """Why a call is not launched; None: it is."""
    device = call.query.device
    if device.type not in attention.DEVICES:
        return f"tensors are on {device}"
    if not attention.is_on():
        return f"{attention.VARIABLE}=0 is set"
    return (why_not(call, rules) or _why_not_gpu(device) or requirements.why_not() or cache.why_not()
            or attention.reason_found(problem_of(call, rules), device, "decode"))


def path(call: Call, rules: Rules) -> str:
    """Of a call that is launched: how, as a line of `explain`."""
    problem, device = problem_of(call, rules), call.query.device
    is_there = cache.is_kept(attention.request(problem, "decode", device))
    return f"path: direct, launched on torch's stream; plan: {'on disk' if is_there else 'to be compiled'}"
