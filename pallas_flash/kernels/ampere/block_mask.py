"""The mask of a block's pairs, in registers."""

import jax.numpy as jnp

from pallas_flash import masks
from pallas_flash.arrays import Array, Bool
from pallas_flash.kernels.ampere import registers
from pallas_flash.kernels.ampere.registers import Fragment
from pallas_flash.kernels.mosaic.scores import masked
from pallas_flash.kernels.mosaic.types import Index

__all__ = ["hide", "keep"]


def hide(mask: masks.Mask, s: Fragment, first: tuple[Index, Index], keys_dim: int) -> Fragment:
    """Sets scores or exponents, (64, n), to -inf where the mask does not keep a pair.

    Args:
      first: the positions of the first query and of the first key.
      keys_dim: the axis that runs over keys.
    """
    columns, (q_first, kv_first) = s.shape[1], first
    q_pos = registers.positions(columns, 1 - keys_dim, q_first)
    return masked(s, mask, q_pos, registers.positions(columns, keys_dim, kv_first))


def keep(mask: masks.Mask, columns: int, first: Index, key: Index) -> Bool[Array, "64 n"]:
    """Whether each of the 64 queries from `first` on attends to a key, in each of so many columns."""
    return jnp.asarray(mask.keep(registers.positions(columns, 0, first), key))
