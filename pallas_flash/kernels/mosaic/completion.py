"""What completes scores behind scale and soft cap: a bias (`mosaic.bias`), or a score function
(`mosaic.score_function`); of a tile, and, where sums are repaired, of one key. Both may hide pairs by -inf.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_flash.arrays import Bool
from pallas_flash.kernels.mosaic.bias import HeadBias
from pallas_flash.kernels.mosaic.fragments import Fragment, PerRow, spread
from pallas_flash.kernels.mosaic.score_function import HeadScore
from pallas_flash.kernels.mosaic.types import Index, Ref
from pallas_flash.spec import AttentionSpec

__all__ = ["Completed", "Exponents", "applied", "completion", "completion_of_key", "hides_pairs", "keep"]

Exponents = Fragment | PerRow
"""Exponents of a tile, or of 64 pairs, one in each row; and the scores and weights of the same pairs."""

Completed = Callable[[Exponents], tuple[Exponents, Exponents | None]]
"""From scores in the unit of `mosaic.scores.scaled` to the scores of the softmax, and their derivative; None: it is 1.
"""


def hides_pairs(spec: AttentionSpec) -> bool:
    """Whether pairs may be hidden by it that the mask, also with `bias.as_mask`, keeps."""
    return spec.score is not None or (spec.bias is not None and spec.bias.shape[2] > 1)


def applied(spec: AttentionSpec, gmem: dict[str, Ref], head: tuple[Index, Index], s: Fragment,
            first: tuple[Index, Index]) -> Fragment:
    """Completes scores, (64 queries, n keys), of one head, (batch, head).

    Args:
      first: the positions of the first query and of the first key.
    """
    if spec.score is not None:
        return HeadScore(spec, gmem, *head).applied(s, first, 1)
    if spec.bias is not None:
        return HeadBias(spec, gmem, *head).added(s, first, 1)
    return s


def completion(spec: AttentionSpec, gmem: dict[str, Ref], head: tuple[Index, Index], first: tuple[Index, Index],
               keys_dim: int) -> Completed | None:
    """What completes the scores of a tile of one head, (batch, head); None: nothing does.

    Args:
      first: the positions of the first query and of the first key.
      keys_dim: the axis that runs over keys.
    """
    if spec.score is not None:
        return lambda s: HeadScore(spec, gmem, *head).with_slope(s, first, keys_dim)
    if spec.bias is not None:
        return lambda s: (HeadBias(spec, gmem, *head).added(s, first, keys_dim), None)
    return None


def completion_of_key(spec: AttentionSpec, gmem: dict[str, Ref], head: tuple[Index, Index], first: Index,
                      key: Index) -> Completed | None:
    """What completes the scores of the 64 queries from `first` on and one key; None: nothing does."""
    if spec.score is not None:
        return lambda s: HeadScore(spec, gmem, *head).of_key(s, first, key)
    if spec.bias is not None:
        return lambda s: (HeadBias(spec, gmem, *head).added_to_key(s, first, key), None)
    return None


def keep(spec: AttentionSpec, gmem: dict[str, Ref], head: tuple[Index, Index], by_mask: Bool[jax.Array, "64 n"],
         pair: tuple[Index, Index], s: PerRow) -> Bool[jax.Array, "64 n"]:
    """Leaves out the pairs of 64 queries and a key that a bias, or a score function, hides.

    Args:
      by_mask: which of them the mask keeps, the same in each column.
      pair: the positions of the first query and of the key.
      s: their complete scores.
    """
    if spec.bias is not None:
        by_mask = HeadBias(spec, gmem, *head).keep(by_mask, *pair)
    if spec.score is not None:
        by_mask = by_mask & (spread(s, by_mask.shape[1]) != -jnp.inf)
    return by_mask
