"""The arguments and results of the operators, by name. Schemas, fake versions and slices are derived from these tuples.

An operator takes its arguments flat, in the order of the fields: `flat` is for the caller and `of` for the operator.
One more array is a field of `Operands`, and of `PerArray` if it has a gradient; where one is forgotten, a type checker
says so.
"""

import operator
from collections.abc import Sequence
from typing import NamedTuple, Self, get_type_hints

import torch
from torch import Tensor

__all__ = ["LARGEST_NUMBER", "SCHEMAS", "Argument", "Attention", "AttentionBackward", "AttentionDoubleBackward",
           "Cotangents", "Numbers", "Operands", "PLACES", "PerArray", "Results", "RowAnchor"]

Argument = Tensor | float | str | Sequence[bool] | None
"""What an operator takes: tensors, numbers, flags and a name."""

LARGEST_NUMBER = 1e30
"""The largest scale and soft cap: that of pallas_flash.spec, whose import would start JAX."""


class PerArray[T](NamedTuple):
    """One thing for each tensor that has a gradient: the tensor, its gradient or tangent, whether one is needed."""

    query: T
    key: T
    value: T
    bias: T
    score_floats: T

    @classmethod
    def among(cls, per_operand: Sequence[T]) -> "PerArray[T]":
        """Selects those with a gradient from one thing for each operand, in the order of `Operands`."""
        return cls(*_with_gradient(per_operand))

    def among_arguments(self, count: int) -> tuple[T | None, ...]:
        """These in the order of an operator's first `count` arguments, None for those that have no gradient."""
        return (*_per_operand((*self, None)), *(None,) * (count - _NUM_OPERANDS))


class Operands(NamedTuple):
    """The tensors of one call, its axes merged to four."""

    query: Tensor  # (batch, q_heads, q_len, d)
    key: Tensor  # (batch, kv_heads, kv_len, d)
    value: Tensor  # (batch, kv_heads, kv_len, d_v)
    mask: Tensor | None  # booleans, (batch or 1, q_heads or 1, q_len or 1, kv_len or 1)
    bias: Tensor | None  # floats, added to the scores; shaped like a mask
    seed: Tensor | None  # of dropout, (2,) int32
    offsets: Tensor | None  # `Numbers.offset` of each batch entry, (batch,) int32
    q_lengths: Tensor | None  # positions from there on are padding, (batch,) int32
    kv_lengths: Tensor | None
    q_ids: Tensor | None  # of segments, (batch, q_len) int32; below 0: padding
    kv_ids: Tensor | None  # (batch, kv_len) int32
    q_starts: Tensor | None  # the boundaries of packed sequences, (sequences + 1,) int32; batch is 1
    kv_starts: Tensor | None
    score_floats: Tensor | None  # the arrays of a score function that have a gradient, one after the other, (count,)
    score_integers: Tensor | None  # its others, (count,) int32

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None, bias: Tensor | None,
           seed: Tensor | None) -> "Operands":
        """Those of SDPA: every query and key counts, and offsets are numbers."""
        return cls(query, key, value, mask, bias, seed, *_NOTHING_ELSE)

    @property
    def places(self) -> tuple[Tensor | None, ...]:
        """What says which positions attend, apart from the mask: all None for SDPA."""
        return self[_PLACES:_SCORE]

    @property
    def differentiable(self) -> PerArray[Tensor | None]:
        """Those that have a gradient."""
        return PerArray(query=self.query, key=self.key, value=self.value, bias=self.bias,
                        score_floats=self.score_floats)

    @property
    def is_empty(self) -> bool:
        """True if there is no output element or no key: results are known without JAX."""
        return 0 in self.query.shape[:3] or 0 in self.value.shape


_NUM_OPERANDS = len(Operands._fields)
_PLACES, _SCORE = Operands._fields.index("seed") + 1, Operands._fields.index("score_floats")
PLACES = Operands._fields[_PLACES:_SCORE]
"""The names of `Operands.places`."""
_NOTHING_ELSE = (None,) * (_NUM_OPERANDS - _PLACES)
_with_gradient = operator.itemgetter(*map(Operands._fields.index, PerArray._fields))
_NO_GRADIENT = len(PerArray._fields)
_per_operand = operator.itemgetter(
    *(PerArray._fields.index(name) if name in PerArray._fields else _NO_GRADIENT for name in Operands._fields))
"""Of (*per_array, None), one for each operand."""


class Numbers(NamedTuple):
    """The arguments of a call that are not tensors."""

    left: int | None  # a query at i attends to the keys from i + offset - left; None: from the first
    right: int | None  # up to i + offset + right, which causal calls have 0; None: to the last
    offset: int
    ends_aligned: bool  # of packed sequences, the offset counts from kv_len - q_len of each
    softcap: float | None
    score: str | None  # the name of a score function (score_names.py)
    scale: float | None
    dropout_p: float
    deterministic: bool
    partial: bool  # out and gradients are terms of sums over several calls: in the dtype of stats, not rounded

    @classmethod
    def of(cls, *, causal_offset: int | None, scale: float | None, dropout_p: float) -> "Numbers":
        """Those of SDPA: causal with an offset, or, for None, without a limit; deterministic as torch is told to be."""
        right, offset = (None, 0) if causal_offset is None else (0, causal_offset)
        return cls(left=None, right=right, offset=offset, ends_aligned=False, softcap=None, score=None, scale=scale,
                   dropout_p=dropout_p, deterministic=torch.are_deterministic_algorithms_enabled(), partial=False)


class Results(NamedTuple):
    """What `attention` returns."""

    out: Tensor  # (batch, q_heads, q_len, d_v)
    stats: Tensor  # of each row lse and its rest, (batch, q_heads, 2, q_len); (0,) if they were not needed


class Cotangents(NamedTuple):
    """The cotangents of `Results`; None is zero."""

    dout: Tensor | None
    dstats: Tensor | None


_NUMBERS = _NUM_OPERANDS + len(Numbers._fields)
_RESULTS = _NUMBERS + len(Results._fields)
_TANGENTS = _NUMBERS + len(PerArray._fields)
"""Where the operands, the numbers, the results and the tangents end among the arguments."""


class Attention(NamedTuple):
    """The arguments of `attention`."""

    operands: Operands
    numbers: Numbers
    needs_stats: bool

    @classmethod
    def of(cls, args: Sequence[object]) -> Self:
        return cls(Operands._make(args[:_NUM_OPERANDS]), Numbers._make(args[_NUM_OPERANDS:_NUMBERS]), bool(args[-1]))

    def flat(self) -> tuple[Argument, ...]:
        return *self.operands, *self.numbers, self.needs_stats


class RowAnchor(NamedTuple):
    """The arguments of `row_anchor`: the forward's."""

    operands: Operands
    numbers: Numbers

    @classmethod
    def of(cls, args: Sequence[object]) -> Self:
        return cls(Operands._make(args[:_NUM_OPERANDS]), Numbers._make(args[_NUM_OPERANDS:]))

    def flat(self) -> tuple[Argument, ...]:
        return *self.operands, *self.numbers


class AttentionBackward(NamedTuple):
    """The arguments of `attention_backward`: the forward's, what it returned, and which gradients are needed.

    The results may be those of more keys than the operands': out and lse of the whole rows, stats being lse alone,
    (batch, q_heads, q_len). The gradients are then the terms of these keys, and have no derivative.
    """

    operands: Operands
    numbers: Numbers
    results: Results
    cotangents: Cotangents
    needs: PerArray[bool]

    @classmethod
    def of(cls, args: Sequence[object]) -> Self:
        needs = args[-1]
        assert isinstance(needs, Sequence)
        return cls(Operands._make(args[:_NUM_OPERANDS]), Numbers._make(args[_NUM_OPERANDS:_NUMBERS]),
                   Results._make(args[_NUMBERS:_RESULTS]), Cotangents._make(args[_RESULTS:-1]), PerArray._make(needs))

    def flat(self) -> tuple[Argument, ...]:
        return *self.operands, *self.numbers, *self.results, *self.cotangents, [*self.needs]


class AttentionDoubleBackward(NamedTuple):
    """The arguments of `attention_double_backward`: the forward's, the tangents, and the backward's cotangents."""

    operands: Operands
    numbers: Numbers
    tangents: PerArray[Tensor | None]
    cotangents: Cotangents

    @classmethod
    def of(cls, args: Sequence[object]) -> Self:
        return cls(Operands._make(args[:_NUM_OPERANDS]), Numbers._make(args[_NUM_OPERANDS:_NUMBERS]),
                   PerArray._make(args[_NUMBERS:_TANGENTS]), Cotangents._make(args[_TANGENTS:]))

    def flat(self) -> tuple[Argument, ...]:
        return *self.operands, *self.numbers, *self.tangents, *self.cotangents


# --- schemas ---------------------------------------------------------------------------------------------------------

_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", int: "SymInt", int | None: "SymInt?",
          float: "float", float | None: "float?", bool: "bool", str | None: "str?"}
_SHORT = {"query": "q", "key": "k", "value": "v"}


def _declared(fields: type[tuple[object, ...]]) -> str:
    return ", ".join(f"{_TYPES[kind]} {name}" for name, kind in get_type_hints(fields).items())


def _returned(fields: type[tuple[object, ...]], more: int = 0) -> str:
    return f"({', '.join(['Tensor'] * (len(get_type_hints(fields)) + more))})"


_CALL = f"{_declared(Operands)}, {_declared(Numbers)}"
_DECLARED_TANGENTS = ", ".join(f"Tensor? dd{_SHORT.get(name, name)}" for name in PerArray._fields)

SCHEMAS = {
    "attention": f"({_CALL}, bool needs_stats) -> {_returned(Results)}",
    "attention_backward": f"({_CALL}, {_declared(Results)}, {_declared(Cotangents)}, bool[] needs)"
                          f" -> {_returned(PerArray)}",
    "attention_double_backward": f"({_CALL}, {_DECLARED_TANGENTS}, {_declared(Cotangents)})"
                                 f" -> {_returned(PerArray, len(Cotangents._fields))}",
    "row_anchor": f"({_CALL}) -> Tensor",
    "dropout_seed": "(Tensor like, SymInt[] lead) -> Tensor",
}
