"""The operations of a plan on torch's tensors: what a pass needs beside its launches (`beside.py` writes them down).

Each queues a kernel of torch on its current stream, or makes a view; none asks for a value on the host, so that they
may be captured in a CUDA graph. Of two operands of an operation by element one may be a number.
"""

import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from torch_bridge.direct.plan import OPERATIONS, Operation

__all__ = ["Function"]

DTYPES = {"bool": torch.bool, "int32": torch.int32, "float32": torch.float32, "bfloat16": torch.bfloat16,
          "float16": torch.float16}


def _max(a: torch.Tensor | int, b: torch.Tensor | int) -> torch.Tensor:
    if isinstance(a, torch.Tensor):
        return torch.maximum(a, b) if isinstance(b, torch.Tensor) else a.clamp_min(b)
    assert isinstance(b, torch.Tensor)
    return b.clamp_min(a)


def _min(a: torch.Tensor | int, b: torch.Tensor | int) -> torch.Tensor:
    if isinstance(a, torch.Tensor):
        return torch.minimum(a, b) if isinstance(b, torch.Tensor) else a.clamp_max(b)
    assert isinstance(b, torch.Tensor)
    return b.clamp_max(a)


def _shift_right(x: torch.Tensor, n: int) -> torch.Tensor:
    """Zeros come in, whatever the sign."""
    return (x >> n) & ((1 << (32 - n)) - 1)


def _pad(x: torch.Tensor, value: int, *axes: tuple[int, int]) -> torch.Tensor:
    ends = [end for axis in reversed(axes) for end in axis]
    return torch.nn.functional.pad(x, ends, value=value)


def _boundaries(starts: torch.Tensor, tokens: int) -> torch.Tensor:
    """Boundaries that rise from 0 to at most `tokens`: `packed.numbered`'s first result."""
    found = starts.clamp(0, tokens)
    found[:1] = 0
    return found.cummax(0).values


def _sequences(starts: torch.Tensor, tokens: int) -> torch.Tensor:
    """The number of each token's sequence: `packed.numbered`'s second result."""
    at = torch.arange(tokens, dtype=torch.int32, device=starts.device)
    return torch.searchsorted(starts, at, right=True, out_int32=True) - 1


_GATHER = 0x0102040810204080
"""Times eight bytes of 0 or 1, it has byte i as bit 56 + i; no sum of the product carries."""


def _bits(attend: torch.Tensor, axis: int, words: int, rows: int) -> torch.Tensor:
    """Booleans as bits of words, zeros behind: `mask_bits.words_of_keys`, or, along axis 2, of queries. Eight at a
    time: integers of 32 bits for each would be four times the booleans' bytes, written and read twice.
    """
    found = attend if axis == 3 else attend.transpose(2, 3)
    if found.shape[3] == 1:
        packed = -found.to(torch.int32)
    else:
        missing = 32 * words - found.shape[3]
        found = torch.nn.functional.pad(found, (0, missing)) if missing else found.contiguous()
        if found.data_ptr() % 8:
            found = found.clone()
        packed = ((found.view(torch.int64) * _GATHER) >> 56).to(torch.uint8).view(torch.int32)
    missing = rows - packed.shape[2]
    return (torch.nn.functional.pad(packed, (0, 0, 0, missing)) if missing else packed).transpose(2, 3)


_FUNCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "abs": torch.abs, "isfinite": torch.isfinite,
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "max": _max, "min": _min,
    "div": lambda a, b: torch.div(a, b, rounding_mode="trunc"), "and": operator.and_, "or": operator.or_,
    "xor": operator.xor, "not": operator.invert, "neg": operator.neg, "eq": operator.eq, "ne": operator.ne,
    "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge, "shift_left": operator.lshift,
    "shift_right": _shift_right, "where": torch.where, "to": lambda x, dtype: x.to(DTYPES[dtype]),
    "reshape": lambda x, *shape: x.reshape(shape), "expand": lambda x, *shape: x.expand(shape),
    "permute": lambda x, *axes: x.permute(axes),
    "slice": lambda x, *axes: x[tuple(slice(*axis) for axis in axes)], "pad": _pad,
    "concatenate": lambda *given: torch.cat(given[:-1], given[-1]),
    "stack": lambda *given: torch.stack(given[:-1], given[-1]),
    "amax": lambda x, *axes: x.amax(axes), "amin": lambda x, *axes: x.amin(axes),
    "any": lambda x, *axes: x.any(axes), "all": lambda x, *axes: x.all(axes),
    "sum": lambda x, *axes: x.sum(axes, dtype=torch.int32), "cummax": lambda x, axis: x.cummax(axis).values,
    "take": lambda x, i: x.gather(-1, i.to(torch.int64)), "boundaries": _boundaries, "sequences": _sequences,
    "bits": _bits, "clone": torch.Tensor.clone,
}
assert {*_FUNCTIONS} == OPERATIONS


class Function:
    """The operations as a function of what they are given.

    Args:
      operations: in their order.
      given: names of its arguments.
      constants: tensors by name.
      results: names of what it returns.
    """

    def __init__(self, operations: Sequence[Operation], given: Sequence[str], constants: Mapping[str, torch.Tensor],
                 results: Sequence[str]) -> None:
        numbers = [x for operation in operations for x in operation.inputs if not isinstance(x, str)]
        self._known = [*constants.values(), *numbers]
        places = {name: i for i, name in enumerate((*given, *constants))}
        number, first = itertools.count(len(places)), len(given) + len(self._known)
        self._steps = []
        for i, (name, inputs, parameters, output) in enumerate(operations):
            slots = tuple(places[x] if isinstance(x, str) else next(number) for x in inputs)
            self._steps.append((_FUNCTIONS[name], slots, parameters))
            places[output] = first + i
        self._results = [places[name] for name in results]

    def __call__(self, given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """New tensors, which share no memory with those that are given."""
        values: list[Any] = [*given, *self._known]
        for function, slots, parameters in self._steps:
            values.append(function(*(values[i] for i in slots), *parameters))
        return [values[i].contiguous() for i in self._results]
