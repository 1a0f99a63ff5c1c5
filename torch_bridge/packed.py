"""Packed sequences: (tokens, heads, dim), sequence j being the tokens starts[j] to starts[j + 1]. Nothing is padded.

Boundaries are tensors of the operator; `pallas_flash.packed` makes a mask of them, so a row of tokens is one sequence
of the kernels, in which tiles between sequences are skipped.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from torch_bridge import flash, messages, sdpa
from torch_bridge.arguments import Numbers, Operands

__all__ = ["Starts", "attend", "check", "parts", "positions_from_the_end", "prepare"]


class Starts(NamedTuple):
    """The boundaries of the sequences, (sequences + 1,) integers that start at 0 and never fall."""

    query: torch.Tensor
    key: torch.Tensor


def attend(tensors: Sequence[torch.Tensor], starts: Starts, numbers: Numbers,
           bias: torch.Tensor | None, return_lse: bool,
           whole: tuple[torch.Tensor, ...] | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """out (tokens, q_heads, d_v) and lse (q_heads, tokens), None if it is not asked for.

    Args:
      tensors: query (tokens, q_heads, d), key (tokens, kv_heads, d) and value (tokens, kv_heads, d_v).
      starts: the boundaries, which have passed `check`.
      numbers: those of the call; its sides and offset count within each sequence.
      bias: added to the scores, broadcastable to (1, q_heads, tokens of query, tokens of key).
      return_lse: whether lse is needed.
      whole: as in `flash.attend`.
    """
    out, lse = flash.attend(*prepare(tensors, starts, numbers, bias), None, return_lse, whole)
    return out[0].transpose(0, 1), None if lse is None else lse[0]


def prepare(tensors: Sequence[torch.Tensor], starts: Starts, numbers: Numbers,
            bias: torch.Tensor | None) -> tuple[Operands, Numbers]:
    """The arguments of `attend`, as the operator takes them."""
    query, key, value = (x[None].transpose(1, 2) for x in tensors)
    call = sdpa.prepare(query, key, value, bias, numbers.dropout_p, False, numbers.scale, True)
    operands = call.operands._replace(q_starts=starts.query.to(torch.int32), kv_starts=starts.key.to(torch.int32))
    return operands, numbers._replace(scale=call.numbers.scale, dropout_p=call.numbers.dropout_p)


def parts(name: str, tensor: torch.Tensor, axes: int, count: int) -> tuple[torch.Tensor, ...]:
    """The tensors that are packed in the third axis from the end."""
    messages.require_tensors(**{name: tensor})
    if tensor.dim() != axes or tensor.shape[-3] != count:
        shape = "(batch, seqlen, " if axes == 5 else "(tokens, "
        raise messages.must(f"{name} must be {shape}{count}, heads, dim)", f"{name}.shape={tuple(tensor.shape)}",
                            "Stack the tensors in that axis")
    return tensor.unbind(-3)


def positions_from_the_end(starts: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each token, how many of its sequence come after it, and the number of its sequence; both (tokens,).

    For padding the first is below 0, and the second the number of the last sequence.
    """
    at, last = torch.arange(tokens, device=starts.device), starts.shape[0] - 1
    sequence = torch.searchsorted(starts[1:].contiguous(), at, right=True)
    return starts[(sequence + 1).clamp(max=last)] - 1 - at, sequence.clamp(max=max(last - 1, 0))


def check(starts: Starts, device: torch.device, tokens: tuple[int, int]) -> None:
    """Raises unless both are (sequences + 1,) integers on the device, of the same sequences, and, as far as the host
    knows them, rise from 0 to the numbers of tokens of query and key.
    """
    for name, given, count in (("of queries", starts.query, tokens[0]), ("of keys", starts.key, tokens[1])):
        if not isinstance(given, torch.Tensor):
            raise TypeError(f"the boundaries {name} of packed sequences must be a Tensor, not {type(given).__name__}. "
                            "Wrap them: torch.tensor(boundaries, dtype=torch.int32) on the device of the tensors.")
        if given.dim() != 1 or not given.shape[0] or given.dtype not in (torch.int32, torch.int64) or (
                given.device != device):
            raise messages.must(f"the boundaries {name} must be (sequences + 1,) integers, int32, on {device}",
                                f"shape={tuple(given.shape)}, dtype={given.dtype}, device={given.device}",
                                "Pass the cumulative sum of the lengths, with 0 in front")
        if flash.is_on_host(given) and (given[0] != 0 or given[-1] > count or (given.diff() < 0).any()):
            raise messages.must(f"the boundaries {name} must start at 0, never fall and end at {count}, the number of "
                                "tokens, or before", f"{given.tolist()}",
                                "Pass the cumulative sum of the lengths, with 0 in front")
    if starts.query.shape != starts.key.shape:
        raise messages.must("the boundaries of queries and of keys must be of the same sequences", messages.shapes(
            query=starts.query, key=starts.key), "Repeat a boundary for a sequence without queries, or without keys")
