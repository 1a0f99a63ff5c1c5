"""What every kernel of decoding takes, as reasons why not; no Mosaic in here, dispatch asks on any machine."""

import jax
import numpy as np

from pallas_flash import padding
from pallas_flash.filled import Filled
from pallas_flash.spec import AttentionSpec

__all__ = ["MAX_DIM", "MAX_ROWS", "MERGED_BYTES", "rows", "why_not"]

MAX_DIM = 256
MAX_ROWS = 64
"""Queries that share a key head, q_len * group: the rows of one tile."""
MERGED_BYTES = 8192
"""Shared memory through which bands are merged (`decode.bands`)."""


def rows(spec: AttentionSpec) -> int:
    """The queries of a key head: row = query * group + query head of the group."""
    return spec.q_len * spec.group


def why_not(spec: AttentionSpec, filled: Filled) -> list[str]:
    """The reasons why no kernel of ours runs `spec`, whose keys are in a cache."""
    padded = padding.padded(spec)
    wide = sorted({type(part).__name__ for part in spec.mask.parts if not all(
        np.dtype(x.dtype) == np.int32 and x.shape[1:] == (1,) for x in jax.tree.leaves(part))})
    rules = (
        (max(spec.d, spec.d_v) <= MAX_DIM,
         f"needs head dimensions from 1 to {MAX_DIM} against a cache, d={spec.d}, d_v={spec.d_v}"),
        (padded == spec,
         f"needs head dimensions that are multiples of {padding.UNIT} (16 bytes, the unit of copies) against a cache, "
         f"which is not copied in each step, d={spec.d}, d_v={spec.d_v} (keep query and the cache padded with zeros to "
         f"d={padded.d}, d_v={padded.d_v}, pass scale={spec.scale:g}, and cut out back)"),
        (rows(spec) <= MAX_ROWS, f"takes at most {MAX_ROWS} queries that share a key head (q_len * q_heads / kv_heads) "
         f"against a cache, there are {rows(spec)} (give it fewer at a time)"),
        (not wide and not filled.rule.has_arrays,
         "takes masks whose arrays are a number for each sequence against a cache only, mask has "
         f"{', '.join(wide) or f'arrays in {filled.rule}'}"),
        (spec.bias is None or (spec.bias.shape[2] == 1 and spec.bias.dtype.name != "float64"),
         "takes a bias of each key against a cache only, (batch, heads, 1, capacity) in 16 or 32 bits, bias is "
         f"{spec.bias} (give it one query at a time, or cast it)"),
        (spec.score is None, f"takes no score function against a cache yet, score={spec.score}"),
        (not spec.dropout_rate and not spec.partial, "takes no dropout and no partial results against a cache yet"),
    )
    return [reason for holds, reason in rules if not holds]
