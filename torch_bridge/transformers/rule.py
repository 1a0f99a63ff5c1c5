"""Which keys a query attends to, as bounds and ids: a boolean tensor (batch, 1, q_len, kv_len) that holds no elements.

Models hand masks on, but some slice, move or add them. Whatever PyTorch operation looks into a `Rule` gets the mask
written out, once, and works on that memory: a view of it, or what is written into it, is the mask from then on. So a
model that does more with a mask than hand it on is slower, not wrong.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from torch_bridge import records

__all__ = ["Bounds", "Rule"]


class Bounds(NamedTuple):
    """The key at j is kept for the query at i if -left <= j - (i + offset) <= right; None: no limit."""

    left: int | None
    right: int | None
    offset: int


class _Written:
    """The mask in memory, if somebody has looked into it; shared by the aliases of a rule."""

    def __init__(self) -> None:
        self.mask: torch.Tensor | None = None


class Rule(torch.Tensor):
    """The pairs that are within the bounds and have equal ids; an id below 0 has no equal.

    Attributes:
      bounds: of positions.
      q_ids: int32 (batch or 1, q_len), or None: all positions have the same id.
      kv_ids: int32 (batch or 1, kv_len), None with q_ids.
    """

    bounds: Bounds
    q_ids: torch.Tensor | None
    kv_ids: torch.Tensor | None
    _written: _Written

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def of(shape: Sequence[int], device: torch.device | str, bounds: Bounds,
           ids: tuple[torch.Tensor, torch.Tensor] | None) -> "Rule":
        """A rule of the shape (batch, 1, q_len, kv_len)."""
        rule: Rule = torch.Tensor._make_wrapper_subclass(
            Rule, tuple(shape), dtype=torch.bool, device=torch.device(device))
        rule.bounds = bounds
        rule.q_ids, rule.kv_ids = (None, None) if ids is None else ids
        rule._written = _Written()
        return rule

    @property
    def is_written_out(self) -> bool:
        """Whether somebody has looked into the mask, and may have changed it: its memory says what it is."""
        return self._written.mask is not None

    def written_out(self) -> torch.Tensor:
        """The same as an ordinary boolean tensor, always in the same memory."""
        if self._written.mask is None:
            self._written.mask = self._computed()
        return self._written.mask

    def _computed(self) -> torch.Tensor:
        left, right, offset = self.bounds
        distance = (torch.arange(self.shape[3], device=self.device)[None, :]
                    - torch.arange(offset, offset + self.shape[2], device=self.device)[:, None])
        keep = torch.ones((1, 1, *distance.shape), dtype=torch.bool, device=self.device)
        if left is not None:
            keep = keep & (distance >= -left)
        if right is not None:
            keep = keep & (distance <= right)
        if self.q_ids is not None and self.kv_ids is not None:
            equal = self.q_ids[:, :, None] == self.kv_ids[:, None, :]
            keep = keep & (equal & (self.q_ids[:, :, None] >= 0))[:, None]
        return keep.expand(self.shape).contiguous()

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]  # torch's stub has no name
        return f"Rule(shape={tuple(self.shape)}, {self.bounds}, ids={self.q_ids is not None})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub leaves out the function
            cls, function: Callable[..., object], types: Sequence[type], args: tuple[object, ...] = (),
            kwargs: Mapping[str, Any] | None = None) -> object:
        kwargs = kwargs or {}
        mask = args[0] if args else None
        if isinstance(mask, Rule) and (function in _ALIASES or (
                function in _COPIES and kwargs.get("dtype") in (None, torch.bool) and not mask.is_written_out)):
            return mask._again(function in _ALIASES, kwargs.get("device"))
        shape = next(tuple(x.shape) for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Rule))
        records.count("mask", "dense", f"attention_mask {shape}", (f"the model calls {function} on it",))
        args, kwargs = pytree.tree_map_only(Rule, Rule.written_out, (args, dict(kwargs)))
        return function(*args, **kwargs)

    def _again(self, is_alias: bool, device: torch.device | None) -> "Rule":
        device = torch.device(device or self.device)
        ids = None if self.q_ids is None or self.kv_ids is None else (self.q_ids.to(device), self.kv_ids.to(device))
        rule = Rule.of(self.shape, device, self.bounds, ids)
        if is_alias:
            rule._written = self._written
        return rule


_ALIASES = {torch.ops.aten.detach.default, torch.ops.aten.alias.default}
_COPIES = {torch.ops.aten.clone.default, torch.ops.aten._to_copy.default}
"""Operations whose result is the same mask."""
