"""Attention to a cache, and appending to one, in graphs that torch traces: operators, and what stands for them.

    pallas_flash::attention_to_cache         taken apart where it is traced: into the operator below, or into attention
                                             with lengths (`attend`), of which derivatives are recorded
    pallas_flash::attention_to_cache_direct  (out, stats) by the kernel of caches, which may be part of a CUDA graph
    pallas_flash::append_to_cache            writes rows in place; declared so, a compiler copies no cache for it

The first has no kernel of its own, so that there is an answer to which of the two it is for tensors without numbers,
and wherever it is called. Eager calls ask the same without an operator (`eager.attend_to_cache`).
"""

import torch

from torch_bridge import eager, flash, ops, strides
from torch_bridge.arguments import Results
from torch_bridge.direct import decoding, tracing
from torch_bridge.direct.decoding import Call, Rules

__all__ = ["append", "attend", "attend_traced", "first_of_pages", "lack", "unknown"]

_TENSORS = "Tensor query, Tensor key, Tensor value, Tensor lengths, Tensor? table, Tensor? bias, Tensor? sinks"
_RULES = "SymInt? left, SymInt? right, float? softcap, float? scale"
_PLAIN = {torch.Tensor, torch.nn.Parameter}


def attend(call: Call, rules: Rules, needs_lse: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(out, lse) as attention with lengths; the keys of pages are copied. Queries before the first key see nothing.

    Returns:
      out (batch, q_heads, q_len, d_v), stored as query is; lse (batch, q_heads, q_len), None if it is not needed.
    """
    query, key, value, lengths, table, bias, sinks = call
    lacking = None
    if table is not None:  # what it holds behind the end of a sequence may be anything
        lacking = lack(table, lengths, *key.transpose(1, 2).shape[:2])
        pages = table.long().clamp(0, key.shape[0] - 1)
        key, value = (x[pages].transpose(1, 2).flatten(2, 3) for x in (key, value))
    left, right, softcap, scale = rules
    has_rule = left is not None or right is not None
    operands, numbers = flash.prepare(
        query, key, value, attn_mask=bias, causal_offset=lengths - query.shape[2] if has_rule else None,
        window=(left, right) if has_rule else None, softcap=softcap, kv_lengths=lengths, scale=scale, sinks=sinks)
    return unknown(*flash.attend(operands, numbers, sinks, needs_lse), lacking)


def lack(table: torch.Tensor, lengths: torch.Tensor, number: int, size: int) -> torch.Tensor:
    """Which sequences lack one of the pages that their first lengths (batch,) positions are in, booleans (batch,).

    Args:
      table: page numbers (batch, pages of a sequence); one that is not in [0, number) is not there.
      size: how many positions a page has.
    """
    is_there = (table >= 0) & (table < number)
    return (~is_there & (first_of_pages(table, size) < lengths[:, None])).any(1)


def first_of_pages(table: torch.Tensor, size: int) -> torch.Tensor:
    """The position of a sequence at which each page of the table begins, (pages of a sequence,)."""
    return torch.arange(0, table.shape[1] * size, size, device=table.device)


def unknown(out: torch.Tensor, lse: torch.Tensor | None,
            lacking: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """NaN for sequences that are lacking keys, as the kernel of caches gives it."""
    if lacking is None:
        return out, lse
    return (out.masked_fill(lacking[:, None, None, None], torch.nan),
            None if lse is None else lse.masked_fill(lacking[:, None, None], torch.nan))


def attend_traced(call: Call, rules: Rules, needs_lse: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`attend`, or the kernel of caches, by an operator: what is compiled calls this."""
    out, lse = torch.ops.pallas_flash.attention_to_cache.default(*call, *rules, needs_lse)
    return out, lse if needs_lse else None


def append(cache: torch.Tensor, new: torch.Tensor, places: torch.Tensor) -> None:
    """Writes new (batch, count, heads, dim) to a cache (rows, length, heads, dim), in place.

    Args:
      places: row * length + position in it, of each of the new, (batch, count) int64.
    """
    if torch.compiler.is_compiling():
        torch.ops.pallas_flash.append_to_cache.default(cache, new, places)
    else:
        _write(cache, new, places)


def _write(cache: torch.Tensor, new: torch.Tensor, places: torch.Tensor) -> None:
    if cache.is_contiguous():
        cache.view(-1, *cache.shape[2:]).index_put_((places,), new)
    else:
        cache.index_put_((places // cache.shape[1], places % cache.shape[1]), new)


# --- the operators ---------------------------------------------------------------------------------------------------


def _attention_to_cache(*args: object) -> tuple[torch.Tensor, torch.Tensor]:
    call, rules, needs_lse = _of(args)
    query, found = call.query, None
    if any(x is not None and torch._C._functorch.is_functorch_wrapped_tensor(x) for x in call):
        pass  # no operator of a kernel alone is mapped
    elif tracing.is_traced() or type(query) not in _PLAIN:
        if tracing.is_direct_to_cache(call, rules):
            found = Results(*torch.ops.pallas_flash.attention_to_cache_direct.default(*call, *rules))
    else:
        found = eager.attend_to_cache(call, rules)
    if found is not None:
        out, lse = strides.with_strides(found.out, _out_strides(call)), found.stats[:, :, 0]
        return out, lse if needs_lse else query.new_empty((0,))
    out, of_rows = attend(call, rules, needs_lse)
    return out, query.new_empty((0,)) if of_rows is None else of_rows


def _of(args: tuple[object, ...]) -> tuple[Call, Rules, bool]:
    count = len(Call._fields)
    return Call._make(args[:count]), Rules._make(args[count:-1]), bool(args[-1])


def _attention_to_cache_direct(*args: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Where a cache is not aligned, which no shape says, it is attention with lengths after all."""
    call, rules, _ = _of((*args, True))
    found = decoding.attend(call, rules)
    if found is None:
        out, lse = attend(call, rules)
        assert lse is not None
        found = Results(out, torch.stack((lse.to(torch.float32), torch.zeros_like(lse, dtype=torch.float32)), 2))
    return strides.with_strides(found.out, _out_strides(call)), found.stats


def _fake_attention_to_cache_direct(*args: object) -> tuple[torch.Tensor, torch.Tensor]:
    call, _, _ = _of((*args, True))
    query = call.query
    out = query.new_empty_strided((*query.shape[:3], call.value.shape[3]), _out_strides(call))
    return out, query.new_empty((*query.shape[:2], 2, query.shape[2]), dtype=torch.float32)


def _out_strides(call: Call) -> tuple[int, int, int, int]:
    return strides.like_query(call.query, call.value.shape[3])


def _append_to_cache(cache: torch.Tensor, new: torch.Tensor, places: torch.Tensor) -> None:
    _write(cache, new, places)
    torch.autograd.graph.increment_version(cache)  # no kernel of autograd's does


ops.library.define(f"attention_to_cache({_TENSORS}, {_RULES}, bool needs_lse) -> (Tensor, Tensor)",
                   tags=[torch.Tag.pt2_compliant_tag])
ops.library.impl("attention_to_cache", _attention_to_cache, "CompositeImplicitAutograd")
ops.library.define(f"attention_to_cache_direct({_TENSORS}, {_RULES}) -> (Tensor, Tensor)", tags=ops.TAGS)
ops.library.define("append_to_cache(Tensor(a!) cache, Tensor new, Tensor places) -> ()", tags=ops.TAGS)
for _key in ("CPU", "CUDA"):
    ops.library.impl("attention_to_cache_direct", _attention_to_cache_direct, _key)
    ops.library.impl("append_to_cache", _append_to_cache, _key)
torch.library.register_fake("pallas_flash::attention_to_cache_direct", _fake_attention_to_cache_direct,
                            lib=ops.library)
torch.library.register_fake("pallas_flash::append_to_cache", lambda cache, new, places: None, lib=ops.library)
