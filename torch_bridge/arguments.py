"""The arguments and results of the operators, by name. Schemas, fake versions and slices are derived from these tuples.

An operator takes its arguments flat, in the order of the fields: `flat` is for the caller and `of` for the operator.
One more array is a field of `Operands`, and of `PerArray` if it has a gradient; where one is forgotten, a type checker
says so.
"""

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, Self, get_type_hints

from torch import Tensor

__all__ = ["SCHEMAS", "Attention", "AttentionBackward", "AttentionDoubleBackward", "Cotangents", "Numbers", "Operands",
           "PerArray", "Results"]


class PerArray[T](NamedTuple):
    """One thing for each tensor that has a gradient: the tensor, its gradient, a tangent, whether one is needed."""

    query: T
    key: T
    value: T
    bias: T

    @classmethod
    def among(cls, per_operand: Sequence[T]) -> "PerArray[T]":
        """Of what is there for each operand, in the order of `Operands`, that of those with a gradient."""
        return cls(*_with_gradient(per_operand))

    def among_arguments(self, count: int) -> tuple[T | None, ...]:
        """In the places of an operator's first `count` arguments, None in those that have no gradient."""
        return (*(getattr(self, name, None) for name in Operands._fields), *[None] * (count - len(Operands._fields)))


class Operands(NamedTuple):
    """The tensors of one call, its axes merged to four."""

    query: Tensor  # (batch, q_heads, q_len, d)
    key: Tensor  # (batch, kv_heads, kv_len, d)
    value: Tensor  # (batch, kv_heads, kv_len, d_v)
    mask: Tensor | None  # booleans, (batch or 1, q_heads or 1, q_len or 1, kv_len or 1)
    bias: Tensor | None  # floats, added to the scores; shaped like a mask
    seed: Tensor | None  # of dropout, (2,) int32

    def with_seed(self, seed: Tensor) -> "Operands":
        """These, and the seed of dropout."""
        query, key, value, mask, bias, _ = self
        return Operands(query, key, value, mask, bias, seed)

    @property
    def differentiable(self) -> PerArray[Tensor | None]:
        """Those that have a gradient."""
        return PerArray(query=self.query, key=self.key, value=self.value, bias=self.bias)

    @property
    def is_empty(self) -> bool:
        """True if there is no output element or no key: results are known without JAX."""
        return 0 in self.query.shape[:3] or 0 in self.value.shape


_with_gradient = operator.itemgetter(*map(Operands._fields.index, PerArray._fields))


class Numbers(NamedTuple):
    """What a call is given beside tensors."""

    causal_offset: int | None  # a query at i attends to the keys up to i + offset; None: to all
    scale: float | None
    dropout_p: float
    deterministic: bool


class Results(NamedTuple):
    """What `attention` returns."""

    out: Tensor  # (batch, q_heads, q_len, d_v)
    stats: Tensor  # of each row lse and its rest, (batch, q_heads, 2, q_len); (0,) if they were not needed


class Cotangents(NamedTuple):
    """Those of `Results`; None is zero."""

    dout: Tensor | None
    dstats: Tensor | None


_OPERANDS, _NUMBERS = len(Operands._fields), len(Operands._fields) + len(Numbers._fields)


class Attention(NamedTuple):
    """The arguments of `attention`."""

    operands: Operands
    numbers: Numbers
    needs_stats: bool

    @classmethod
    def of(cls, args: Sequence[Any]) -> Self:
        return cls(Operands._make(args[:_OPERANDS]), Numbers._make(args[_OPERANDS:_NUMBERS]), *args[_NUMBERS:])

    def flat(self) -> tuple[Any, ...]:
        return *self.operands, *self.numbers, self.needs_stats


class AttentionBackward(NamedTuple):
    """The arguments of `attention_backward`: the forward's, what it returned, and which gradients are needed."""

    operands: Operands
    numbers: Numbers
    results: Results
    cotangents: Cotangents
    needs: PerArray[bool]

    @classmethod
    def of(cls, args: Sequence[Any]) -> Self:
        out, stats, dout, dstats, needs = args[_NUMBERS:]
        return cls(Operands._make(args[:_OPERANDS]), Numbers._make(args[_OPERANDS:_NUMBERS]), Results(out, stats),
                   Cotangents(dout, dstats), PerArray._make(needs))

    def flat(self) -> tuple[Any, ...]:
        return *self.operands, *self.numbers, *self.results, *self.cotangents, [*self.needs]


class AttentionDoubleBackward(NamedTuple):
    """The arguments of `attention_double_backward`: the forward's, tangents of the gradients, and the backward's
    cotangents.
    """

    operands: Operands
    numbers: Numbers
    tangents: PerArray[Tensor | None]
    cotangents: Cotangents

    @classmethod
    def of(cls, args: Sequence[Any]) -> Self:
        *tangents, dout, dstats = args[_NUMBERS:]
        return cls(Operands._make(args[:_OPERANDS]), Numbers._make(args[_OPERANDS:_NUMBERS]), PerArray._make(tangents),
                   Cotangents(dout, dstats))

    def flat(self) -> tuple[Any, ...]:
        return *self.operands, *self.numbers, *self.tangents, *self.cotangents


# --- schemas ---------------------------------------------------------------------------------------------------------

_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", int | None: "SymInt?", float | None: "float?", float: "float",
          bool: "bool"}
_SHORT = {"query": "q", "key": "k", "value": "v"}


def _declared(fields: type[tuple[Any, ...]]) -> str:
    return ", ".join(f"{_TYPES[kind]} {name}" for name, kind in get_type_hints(fields).items())


def _returned(fields: type[tuple[Any, ...]], more: int = 0) -> str:
    return f"({', '.join(['Tensor'] * (len(get_type_hints(fields)) + more))})"


_CALL = f"{_declared(Operands)}, {_declared(Numbers)}"
_TANGENTS = ", ".join(f"Tensor? dd{_SHORT.get(name, name)}" for name in PerArray._fields)

SCHEMAS = {
    "attention": f"({_CALL}, bool needs_stats) -> {_returned(Results)}",
    "attention_backward": f"({_CALL}, {_declared(Results)}, {_declared(Cotangents)}, bool[] needs)"
                          f" -> {_returned(PerArray)}",
    "attention_double_backward": f"({_CALL}, {_TANGENTS}, {_declared(Cotangents)})"
                                 f" -> {_returned(PerArray, len(Cotangents._fields))}",
    "dropout_seed": "(Tensor like, SymInt[] lead) -> Tensor",
}
