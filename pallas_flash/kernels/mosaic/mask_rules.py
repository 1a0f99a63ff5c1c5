"""Which masks that hold arrays the kernels know; no Mosaic in here, dispatch asks on any machine."""

import jax

from pallas_flash import masks
from pallas_flash.packed import Packed
from pallas_flash.spec import AttentionSpec

__all__ = ["INTERVAL_RULES", "is_known", "kernel_makes", "why_not"]

INTERVAL_RULES = (masks.Full, masks.Window, masks.InBounds, masks.PrefixLM)
"""The masks that keep for each query the keys of one interval, and for each key the queries of one; and whose bounds
say which, exactly, for a single position.
"""


def why_not(spec: AttentionSpec) -> list[str]:
    """The reasons why kernels do not know a spec's mask. One without arrays may be of any class. Where one part holds
    arrays, as what a bias or a score function hides does, they know all parts by class.
    """
    mask = spec.mask
    if not mask.has_arrays and spec.bias is None and spec.score is None:
        return []
    own = sorted({type(part).__name__ for part in mask.parts if not is_known(part)})
    ids = sum(type(part) is masks.SegmentIds for part in mask.parts)
    rules = (
        (not own, "takes arrays in, and beside, Causal, Window, InBounds, PrefixLM, SegmentIds, Dense and packed "
         f"sequences of these rules only, mask has {', '.join(own)} (give lengths as InBounds, documents as "
         "SegmentIds, any pairs as Dense; a mask without arrays may be of any class where there is no bias "
         "and no score function)"),
        (ids <= 1, f"takes one SegmentIds, mask has {ids} (give each pair of their ids a number of its own)"),
    )
    return [reason for holds, reason in rules if not holds]


_LONGEST = 1 << 19
"""Positions of a side of which one launch makes ranges: the extremes of its tiles, of 32 at least, fit into shared
memory.
"""


def kernel_makes(spec: AttentionSpec) -> bool:
    """Whether one launch makes what kernels read of the mask's arrays (`mask_kernel`): of intervals, ids and packed
    sequences, the same for all heads.
    """
    known = all(type(part) in (*INTERVAL_RULES, masks.SegmentIds, Packed) for part in spec.mask.parts)
    shared = all(x.shape[1] == 1 for x in jax.tree.leaves(spec.mask))
    fits = max(spec.q_len, spec.kv_len) <= _LONGEST
    return spec.mask.has_arrays and known and shared and fits and not why_not(spec)


def is_known(part: masks.Mask) -> bool:
    """Whether a part of a mask keeps the keys of one interval for each query, pairs of equal ids, or what bits say."""
    if type(part) is Packed:
        return all(type(rule) in INTERVAL_RULES for rule in part.rule.parts)
    return type(part) in (*INTERVAL_RULES, masks.SegmentIds, masks.Dense)
