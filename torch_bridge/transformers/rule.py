"""Which keys a query attends to, as bounds and ids: a boolean tensor (batch, 1, q_len, kv_len) that holds no elements.

Models hand masks on, but some slice, move or add them. Whatever PyTorch operation looks into a `Rule` gets the mask
written out, once, and works on that memory: a view of it, or what is written into it, is the mask from then on. So a
model that does more with a mask than hand it on is slower, not wrong. Only one that takes a mask for numbers to add to
the scores, or for the keys to hide, would be wrong, and gets an error: also of a part or a copy of the mask, which
stays a `Rule`, and of a dense mask that is handed out as one.
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
    _is_over = False

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

    @staticmethod
    def over(mask: torch.Tensor) -> "Rule":
        """An ordinary boolean mask of any shape, written out already, in the same memory: what looks into it may."""
        rule: Rule = torch.Tensor._make_wrapper_subclass(
            Rule, mask.shape, strides=mask.stride(), storage_offset=mask.storage_offset(), dtype=torch.bool,
            device=mask.device)
        rule.bounds, rule.q_ids, rule.kv_ids = Bounds(None, None, 0), None, None
        rule._written, rule._is_over = _Written(), True
        rule._written.mask = mask
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
        _check(function, args, kwargs)
        rules = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Rule)]
        if not all(x._is_over for x in rules):  # a part of one that was counted, or a dense mask, which was, too
            records.count("mask", "dense", f"attention_mask {tuple(rules[0].shape)}",
                          (f"the model calls {function} on it",))
        args, kwargs = pytree.tree_map_only(Rule, Rule.written_out, (args, dict(kwargs)))
        out = function(*args, **kwargs)
        if not isinstance(out, torch.Tensor) or out.dtype != torch.bool:
            return out
        if isinstance(mask, Rule) and out is mask._written.mask and out.shape == mask.shape:  # written in place
            return mask
        return Rule.over(out) if getattr(function, "is_view", False) or _name(function) in _KEEPING else out

    def _again(self, is_alias: bool, device: torch.device | None) -> "Rule":
        device = torch.device(device or self.device)
        ids = None if self.q_ids is None or self.kv_ids is None else (self.q_ids.to(device), self.kv_ids.to(device))
        rule = Rule.of(self.shape, device, self.bounds, ids)
        if is_alias:
            rule._written, rule._is_over = self._written, self._is_over
        return rule


_ALIASES = {torch.ops.aten.detach.default, torch.ops.aten.alias.default}
_COPIES = {torch.ops.aten.clone.default, torch.ops.aten._to_copy.default}
"""Operations whose result is the same mask."""

_KEEPING = {"clone", "_to_copy", "repeat", "repeat_interleave", "cat", "index", "index_select", "constant_pad_nd",
            "bitwise_and", "bitwise_or", "logical_and", "logical_or", "masked_fill", "gather", "tril", "triu",
            "_reshape_copy", "_unsafe_view"}
"""Operations whose result is a mask, too, True where a key is kept, beside views."""
_ARITHMETIC = {"add", "sub", "rsub", "mul", "div", "maximum", "minimum", "baddbmm", "addmm", "addbmm", "addcmul"}


def _name(function: object) -> str:
    packet = getattr(function, "overloadpacket", function)
    return str(getattr(packet, "__name__", "")).removesuffix("_")


def _check(function: object, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
    """Raises where a mask is taken for numbers, or for the keys that are hidden.

    Raises:
      NotImplementedError: arithmetic of a mask and floats; masked_fill of floats by a mask itself, not by what it does
        not keep; where with a fill value for what it keeps.
    """
    name, values = _name(function), [*args, *kwargs.values()]
    if name in _ARITHMETIC:
        wrong = any(isinstance(x, float) or (isinstance(x, torch.Tensor) and x.is_floating_point()) for x in values)
        done = "takes it for numbers, where True would be 1 and False 0"
    elif name in ("masked_fill", "where"):
        condition = 1 if name == "masked_fill" else 0
        wrong = len(args) > condition and isinstance(args[condition], Rule) and (
            _is_filled(args[0]) if name == "masked_fill" else len(args) > 2 and not _is_filled(args[1])
            and _is_filled(args[2]))
        done = "fills where it is True, which is where a key is kept"
    else:
        return
    if wrong:
        raise NotImplementedError(
            "the mask of a model must go to its attention function as it is, a boolean mask that is True where a key "
            f"is kept, got {function} of it: the model applies its mask itself, and {done}. Use "
            'attn_implementation="eager", or "sdpa" where transformers takes it, for this model.')


def _is_filled(x: object) -> bool:
    """Whether x is scores rather than one value."""
    return isinstance(x, torch.Tensor) and x.is_floating_point() and x.dim() > 0
