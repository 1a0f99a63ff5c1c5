"""The mask of a cache: keys fill it up to lengths known when a program runs, and queries stand at their end."""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from pallas_flash import masks, paging
from pallas_flash.arithmetic import Positions, maximum, minimum, where
from pallas_flash.arrays import Array, Bool, Int
from pallas_flash.mask_fields import ArrayField, as_array
from pallas_flash.masks import UNBOUNDED, Bounds

__all__ = ["Filled", "by_number", "filled_part", "lost", "within", "without"]


@dataclasses.dataclass(frozen=True)
class Filled(masks.Mask):
    """The first `lengths` keys of each sequence that `rule` keeps; query i of q_len is at position lengths - q_len + i.

    A query whose position would be negative attends to nothing.

    Attributes:
      rule: a mask of numbers, about positions in the sequence.
      lengths: (batch,) integers, the keys that there are.
      q_len: how many queries there are.
    """

    rule: masks.Mask
    lengths: Any
    q_len: int

    def __str__(self) -> str:
        return f"Filled({self.rule}, lengths={ArrayField.of(as_array(self.lengths))})"

    def canonical(self) -> masks.Mask:
        """As of other masks, but lengths of a program are not clipped here (`within` does it where they are used): XLA
        would run a kernel for it, before each call of a decoding loop.
        """
        x = self.lengths
        if not isinstance(x, jax.Array) or x.dtype != np.int32:
            return super().canonical()
        return dataclasses.replace(self, lengths=x.reshape(*x.shape, *(1,) * (2 - x.ndim)))

    def _position(self, query: Positions) -> Positions:
        position: Positions = query + (self.lengths - self.q_len)
        return position

    def keep(self, q_pos: Positions, kv_pos: Positions) -> Positions:
        position = self._position(q_pos)
        kept: Positions = (position >= 0) & (kv_pos < self.lengths) & self.rule.keep(maximum(position, 0), kv_pos)
        return kept

    def kv_bounds(self, q_lo: Positions, q_hi: Positions) -> Bounds:
        lo, hi = self._position(q_lo), self._position(q_hi)
        found = self.rule.kv_bounds(maximum(lo, 0), maximum(hi, 1)) & Bounds(0, 0, self.lengths, self.lengths)
        some = (hi > 0) & (self.lengths > 0)  # else a bound that widens no union over a batch
        return Bounds(where(some, found.lo, UNBOUNDED), found.full_lo, where(lo >= 0, found.full_hi, 0),
                      where(some, found.hi, 0))

    def q_bounds(self, kv_lo: Positions, kv_hi: Positions) -> Bounds:
        first = self._position(0)
        found = Bounds(*(maximum(x, 0) - first for x in self.rule.q_bounds(kv_lo, kv_hi)))
        return found & Bounds(0, 0, where(kv_hi <= self.lengths, UNBOUNDED, 0),
                              where(kv_lo < self.lengths, UNBOUNDED, 0))


def filled_part(mask: masks.Mask) -> Filled | None:
    """The part of a mask that says that keys are in a cache; None if they are not."""
    return next((part for part in mask.parts if isinstance(part, Filled)), None)


def by_number(mask: masks.Mask, capacity: int) -> masks.Mask:
    """The same mask of queries and keys by number alone, without `Filled`: its rule, moved, among the first keys.

    Queries at negative positions are not left out: they see what the moved rule shows them.

    Args:
      mask: canonical, lengths as they come.

    Raises:
      UnsupportedError: the rule is of a class that does not define `moved`.
    """
    def numbered(part: masks.Mask) -> masks.Mask:
        if not isinstance(part, Filled):
            return part
        lengths = minimum(maximum(part.lengths, 0), capacity)
        return part.rule.moved(lengths - part.q_len, 0) & masks.InBounds(kv_len=lengths)

    return functools.reduce(operator.and_, map(numbered, mask.parts))


def within(mask: masks.Mask, capacity: int) -> masks.Mask:
    """The same mask with lengths of at most the capacity. Negative ones attend to nothing as they are."""
    return _with_lengths(mask, lambda lengths: minimum(lengths, capacity))


def _with_lengths(mask: masks.Mask, new: Callable[[Positions], Positions]) -> masks.Mask:
    def changed(part: object) -> object:
        return dataclasses.replace(part, lengths=new(part.lengths)) if isinstance(part, Filled) else part

    found: masks.Mask = jax.tree.map(changed, mask, is_leaf=lambda part: isinstance(part, Filled))
    return found


def lost(mask: masks.Mask, capacity: int, pages: paging.Pages | None,
         page_table: Int[Array, "b p"] | None) -> Bool[Array, " b"] | None:
    """Which sequences have lost keys: their length is above the capacity, or a page is missing that their keys would
    lie in; one of them where all have the same length. None if keys are not in a cache.

    Args:
      mask: canonical, lengths (batch or 1, heads or 1).
    """
    part = filled_part(mask)
    if part is None:
        return None
    lengths = part.lengths.max(axis=1)
    full: Array = lengths > capacity
    return full if pages is None or page_table is None else full | paging.lack(pages, page_table, lengths)


def without(mask: masks.Mask, which: Bool[Array, " b"] | None) -> masks.Mask:
    """The same mask with lengths of 0 for some sequences (`lost`): nothing of them is read or differentiated."""
    if which is None:
        return mask
    return _with_lengths(mask, lambda lengths: where(which[:, None], 0, lengths))
