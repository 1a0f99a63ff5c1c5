"""What each kind of call from PyTorch costs, launched directly and by DLPack: `python -m bench.bridge_paths --kinds`.

Of a forward alone and of a forward with its gradients: the host's microseconds of an eager call, round by round, and by
a profile the kernels of a call, PyTorch's small ones among them, and the device's microseconds in all of them. A direct
call is taken whatever it costs: `attention.MOST_ALONE` and `MOST_WITH_GRADIENTS` are what this decides. First calls run
side by side. About 50 s on an H200.
"""

import collections
import concurrent.futures
import contextlib
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile

import torch_bridge
from bench import bridge_paths, first_call
from torch_bridge import flash_attn
from torch_bridge.direct import attention

__all__ = ["KINDS", "Kind", "measure"]

Record = dict[str, Any]
Tensors = list[torch.Tensor]
BATCH, HEADS, LENGTH, DIM = 2, 8, 512, 64
SEED = 3
LIMIT = 2e-2
"""Of |direct - DLPack| / |DLPack|."""
_THREADS = 8
_PROFILED = 5  # calls


class Kind(NamedTuple):
    """A kind of calls: (query, key, value), (B, H, L, D) -> out, on a device; of so many queries."""

    name: str
    attend: Callable[[Tensors, str], torch.Tensor]
    q_len: int = LENGTH

    def tensors(self, device: str) -> Tensors:
        """query, key, value, and a cotangent of out."""
        generator = torch.Generator(device).manual_seed(0)
        lengths = self.q_len, LENGTH, LENGTH, self.q_len
        return [torch.randn(BATCH, HEADS, n, DIM, device=device, dtype=torch.bfloat16, generator=generator)
                for n in lengths]


@functools.cache
def _array(make: Callable[[], torch.Tensor], device: str) -> torch.Tensor:
    return make().to(device)


def _with(**arguments: Any) -> Callable[[Tensors, str], torch.Tensor]:
    """`flash_attention` with these arguments; functions, or tuples of them, make tensors."""
    def attend(tensors: Tensors, device: str) -> torch.Tensor:
        given = {name: tuple(_array(y, device) for y in x) if isinstance(x, tuple) else _array(x, device)
                 if callable(x) else x for name, x in arguments.items()}
        out: torch.Tensor = torch_bridge.flash_attention(*tensors, **given)
        return out
    return attend


def _lengths() -> torch.Tensor:
    return torch.tensor([LENGTH, LENGTH // 3], dtype=torch.int32)


def _ids() -> torch.Tensor:
    return (torch.arange(LENGTH, dtype=torch.int32) * 7 // (2 * LENGTH) - 1).expand(BATCH, LENGTH).contiguous()


def _ids_of_one() -> torch.Tensor:
    return torch.ones(BATCH, 1, dtype=torch.int32)


def _starts() -> torch.Tensor:
    return torch.tensor([0, 100, 350, 700, BATCH * LENGTH], dtype=torch.int32)


def _packed(tensors: Tensors, device: str) -> torch.Tensor:
    """The batch as one row of tokens."""
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in tensors)
    starts = _array(_starts, device)
    out = flash_attn.flash_attn_varlen_func(q, k, v, starts, starts, LENGTH, LENGTH, causal=True)
    assert isinstance(out, torch.Tensor)
    return out.unflatten(0, (BATCH, -1)).transpose(1, 2)


def _of_keys() -> torch.Tensor:
    return (torch.arange(BATCH * LENGTH).reshape(BATCH, 1, 1, LENGTH) % 7) > 2


def _of_pairs() -> torch.Tensor:
    return (torch.arange(BATCH * LENGTH * LENGTH).reshape(BATCH, 1, LENGTH, LENGTH) * 7919 % 11) > 3


def _bias_of_keys() -> torch.Tensor:
    return torch.where(_of_keys(), 0.5, -torch.inf)


def _bias_of_pairs() -> torch.Tensor:
    return torch.linspace(-2, 2, HEADS * LENGTH * LENGTH).reshape(1, HEADS, LENGTH, LENGTH).bfloat16()


KINDS = (
    Kind("causal", _with(is_causal=True)),
    Kind("lengths, causal", _with(kv_lengths=_lengths, is_causal=True)),
    Kind("ids, causal", _with(segment_ids=(_ids, _ids), is_causal=True)),
    Kind("ids, one query", _with(segment_ids=(_ids_of_one, _ids)), q_len=1),
    Kind("packed, causal", _packed),
    Kind("dropout, causal", _with(dropout_p=0.1, is_causal=True)),
    Kind("attn_mask of keys", _with(attn_mask=_of_keys)),
    Kind("attn_mask of pairs", _with(attn_mask=_of_pairs)),
    Kind("float attn_mask of keys", _with(attn_mask=_bias_of_keys)),
    Kind("float attn_mask of pairs", _with(attn_mask=_bias_of_pairs)),
)
WAYS = bridge_paths.PATHS[3], bridge_paths.PATHS[2]


def _forward(kind: Kind, tensors: Tensors, device: str) -> Tensors:
    with torch.no_grad():
        return [kind.attend(tensors[:3], device)]


def _both(kind: Kind, tensors: Tensors, device: str) -> Tensors:
    leaves = [x.detach().requires_grad_() for x in tensors[:3]]
    out = kind.attend(leaves, device)
    return [out, *torch.autograd.grad(out, leaves, tensors[3])]


CALLS = {"forward": _forward, "forward and gradients": _both}


def _first(kind: Kind, device: str) -> Tensors:
    """The first calls: a forward alone before, so that each pass is compiled by the thread that calls it."""
    tensors = kind.tensors(device)
    torch.manual_seed(SEED)
    _forward(kind, tensors, device)
    torch.manual_seed(SEED)
    return [x.detach() for x in _both(kind, tensors, device)]


def _checked(kinds: tuple[Kind, ...], device: str) -> dict[str, str]:
    """Compiles everything; why kinds cannot be measured, by name."""
    found: dict[str, list[Any]] = collections.defaultdict(list)
    for way in WAYS:
        with way.taken(), concurrent.futures.ThreadPoolExecutor(1 if device == "cpu" else _THREADS) as pool:
            for kind, task in [(kind, pool.submit(_first, kind, device)) for kind in kinds]:
                error = task.exception()
                found[kind.name].append(task.result() if error is None else f"{way.name}: {error!r}"[:300])
    reasons = {}
    for name, results in found.items():
        failed = [x for x in results if isinstance(x, str)]
        error = math.inf if failed else first_call.largest_error(*results)
        if not error <= LIMIT:
            reasons[name] = "; ".join(failed) or f"the ways differ by {error:.1e}, more than {LIMIT:.1e}"
    return reasons


def _profiled(call: Callable[[], Any]) -> dict[str, float]:
    """Kernels of a call, those of them that are not ours, and the device's microseconds in all."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        for _ in range(_PROFILED):
            call()
        torch.cuda.synchronize()
    events = [x for x in profiler.events() if x.device_type == torch.autograd.DeviceType.CUDA]
    return {"kernels": len(events) / _PROFILED,
            "others": sum("mosaic" not in x.name for x in events) / _PROFILED,
            "device_us": sum(x.device_time for x in events) / _PROFILED}


def _timed(call: Callable[[], Any], repeats: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats * 1e6


def _of_kind(kind: Kind, device: str, rounds: int, repeats: int) -> Iterator[Record]:
    tensors = kind.tensors(device)
    finish = torch.cuda.synchronize if device == "cuda" else lambda: None
    for what, function in CALLS.items():
        call = functools.partial(function, kind, tensors, device)
        times: dict[str, list[float]] = {way.name: [] for way in WAYS}
        for i in range(rounds + 1):
            for way in WAYS if i % 2 else WAYS[::-1]:
                finish()
                with way.taken():
                    spent = _timed(call, repeats)
                times[way.name] += [spent] if i else []
        for way in WAYS:
            finish()
            with way.taken():
                profiled = _profiled(call) if device == "cuda" else {}
            mine = times[way.name]
            yield {"kind": "bridge-kind", "what": what, "case": kind.name, "path": way.name,
                   "host_us": statistics.median(mine), "host_us_range": [min(mine), max(mine)], **profiled}


def measure(device: str, rounds: int, repeats: int, kinds: tuple[Kind, ...] = KINDS) -> Iterator[Record]:
    """All records; a reason in place of those that there cannot be."""
    with contextlib.ExitStack() as stack:
        for name in ("MOST_ALONE", "MOST_WITH_GRADIENTS"):
            stack.enter_context(mock.patch.object(attention, name, math.inf))
        reasons = _checked(kinds, device)
        for kind in kinds:
            if kind.name in reasons:
                yield {"kind": "bridge-kind", "case": kind.name, "reason": reasons[kind.name]}
            else:
                yield from _of_kind(kind, device, rounds, repeats)
