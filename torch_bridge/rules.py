"""Which pairs attend, from the numbers of a call and those of its tensors that say so: a `Mask` of pallas_flash.

The same function makes the mask of placeholders that a spec holds and, while a program is traced, that of its arrays.
JAX alone.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from pallas_flash import masks
from pallas_flash.arrays import Shaped
from pallas_flash.packed import Packing
from pallas_flash.spec import AttentionSpec

if TYPE_CHECKING:
    from torch_bridge.arguments import Numbers, Operands

__all__ = ["TENSORS", "Rule"]

TENSORS = ("mask", "offsets", "q_lengths", "kv_lengths", "q_ids", "kv_ids", "q_starts", "kv_starts")
"""The operands that say which pairs attend, in the order of `Operands`."""


class Rule(NamedTuple):
    """A mask but for its arrays; hashable."""

    left: int | None  # as in `Numbers`
    right: int | None
    offset: int
    ends_aligned: bool
    given: tuple[str, ...]  # the operands it is made from

    @classmethod
    def of(cls, operands: "Operands", numbers: "Numbers") -> "Rule":
        left, right = (None if side is None else int(side) for side in (numbers.left, numbers.right))
        return cls(left, right, int(numbers.offset), numbers.ends_aligned,
                   tuple(name for name in TENSORS if getattr(operands, name) is not None))

    def mask(self, spec: AttentionSpec, arrays: Mapping[str, Shaped]) -> masks.Mask:
        """The canonical mask of the problem `spec`, which need not hold it; `arrays` by name, or placeholders."""
        rule = self._window(arrays)
        if "q_starts" in arrays:
            packing = Packing(arrays["q_starts"], arrays["kv_starts"], None, None,
                              "last" if self.ends_aligned else "first")
            rule = masks.checked(packing.mask(rule, spec, batched=False))
        if "mask" in arrays:
            rule = rule & masks.Dense(arrays["mask"])
        if "q_lengths" in arrays or "kv_lengths" in arrays:
            rule = rule & masks.InBounds(*(arrays.get(name, masks.UNBOUNDED) for name in ("q_lengths", "kv_lengths")))
        if "q_ids" in arrays:
            rule = rule & masks.SegmentIds(arrays["q_ids"], arrays["kv_ids"])
        return rule.canonical()

    def _window(self, arrays: Mapping[str, Shaped]) -> masks.Mask:
        if self.left is None and self.right is None:
            return masks.Full()
        left, right = (masks.UNBOUNDED if side is None else side for side in (self.left, self.right))
        offset: Any = arrays.get("offsets", self.offset)  # a placeholder, while a spec is made
        return masks.Window(left, right, offset)
