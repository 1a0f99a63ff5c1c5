"""Keys and values in eight bits: float8_e4m3fn numbers, each times a scale of its head, its page or sequence, or both.

    x ~ scale * stored        stored = e4m3(clip(x / scale, -448, 448))

    |scale * stored - x| <= max(|x| / 16, scale / 1024)   where |x| <= 448 scale

e4m3 has three bits of mantissa, its smallest number is 2^-9; x / scale is rounded to float32 before. What is larger
than 448 scales becomes that; NaN stays NaN.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_flash import paging
from pallas_flash.arrays import Array, Float, Int

__all__ = ["DTYPE", "LARGEST", "dequantised", "is_quantised", "paged_scales", "quantise", "rows"]

DTYPE = np.dtype(jnp.float8_e4m3fn)
LARGEST = 448.0


def is_quantised(dtype: np.dtype) -> bool:
    """Whether numbers of a dtype are kept with a scale."""
    return bool(dtype == DTYPE)


def quantise(x: Float[Array, "*a"], scale: Float[Array, "*1"]) -> Array:
    """The stored numbers of x, whose shape scale broadcasts to. Nothing is differentiated."""
    ratio = jax.lax.stop_gradient(x).astype(jnp.float32) / scale
    return jnp.clip(ratio, -LARGEST, LARGEST).astype(DTYPE)


def dequantised(stored: Array, scale: Float[Array, "b n|1 k|1"], axis: int, dtype: np.dtype) -> Array:
    """scale * stored, in a dtype of at least 32 bits, in which that is exact where scale is a power of two.

    Args:
      stored: four axes, the positions being `axis`, 1 or 2, and the heads the other of the two.
      scale: float32, of the batch, positions (or 1 for all) and heads (or 1).
    """
    scale = scale if axis == 1 else scale.swapaxes(1, 2)
    return stored.astype(dtype) * scale[..., None].astype(dtype)


def rows(stored: Array, scale: Float[Array, "n k"], page_table: Int[Array, "b p"] | None, pos: Int[Array, " n"],
         axis: int, dtype: np.dtype) -> Array:
    """scale * stored of all sequences at positions, out of pages if there is a table, else they are all of them."""
    size = stored.shape[axis]
    if page_table is not None:
        stored = paging.rows(stored, page_table, pos, axis)
    return dequantised(stored, paged_scales(scale, page_table, pos[None], size), axis, dtype)


def paged_scales(scale: Float[Array, "n k"], page_table: Int[Array, "b p"] | None, pos: Int[Array, "1|b n"],
                 size: int) -> Float[Array, "1|b n|1 k"]:
    """The scales of keys at positions, from those of pages, or of sequences if there is no table.

    Args:
      scale: (pages or sequences, or 1 for all; kv_heads or 1).
      size: positions of a page.
    """
    if page_table is None or scale.shape[0] == 1:
        return scale[:, None]
    pages = paging.page_at(page_table, pos, size)
    found: Array = scale.at[jnp.clip(pages, 0, scale.shape[0] - 1)].get(mode="promise_in_bounds")
    return found
