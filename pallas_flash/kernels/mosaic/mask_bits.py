"""Dense masks as bits, made of their booleans by XLA beside the launches: an eighth of the bytes, which all heads that
share a mask read.

Bit i of a word says whether the mask keeps the pair of a row and column 32 w + i. Rows are queries and columns keys, or
the reverse. Words lie as (batch or 1, heads or 1, words or 1, rows or 1) int32, the rows of a warp side by side: a load
of a word for each of 8 rows is one sector of 32 bytes. What a mask says for all rows it says once, and where it does
not depend on the column it has one word, of ones or of zeros: a padding mask, (batch, 1, 1, kv_len), takes O(kv_len).

No Mosaic in here: `head_mask` has what kernels do with words.
"""

import functools
import operator

import jax
import jax.numpy as jnp

from pallas_flash import masks
from pallas_flash.arrays import Array, Bool, Int

__all__ = ["BITS", "ends_at_keys", "flags", "has_bits", "packed", "words_of_keys", "words_of_queries"]

BITS = 32
"""Of a word: a tile of keys, or of queries, is a whole number of words."""


def has_bits(mask: masks.Mask) -> bool:
    """Whether a part of a mask is dense."""
    return bool(_dense(mask))


def ends_at_keys(mask: masks.Mask) -> bool:
    """Whether a dense part has a bit for each key: then its padding, zeros, hides what lies past the last key."""
    return any(part.attend.shape[3] > 1 for part in _dense(mask))


def packed(mask: masks.Mask, of_keys: bool, rows: int, columns: int) -> Int[Array, "1|b 1|h 1|words 1|rows"]:
    """Packs the dense parts of a canonical mask, which has such; their padding is zeros.

    Args:
      of_keys: whether columns are keys.
      rows, columns: their padded numbers, `columns` a multiple of 32.
    """
    pack = words_of_keys if of_keys else words_of_queries
    words = (pack(jnp.asarray(part.attend), rows=rows, columns=columns) for part in _dense(mask))
    return functools.reduce(operator.and_, words)


def flags(words: Int[Array, "1|b 1|h 1|words 1|rows"], own: tuple[int, int],
          other: tuple[int, int]) -> tuple[Bool[Array, "1|b 1|h tiles others"], Bool[Array, "1|b 1|h tiles others"]]:
    """Whether some pair of a tile is kept, and whether all are.

    Args:
      own: rows of a tile, and the number of tiles.
      other: columns of a tile, a multiple of 32, and the number of tiles.
    """
    (block, count), (columns, others) = own, other
    some, full = words != 0, words == -1
    for axis, size, number in ((3, block, count), (2, columns // BITS, others)):
        if words.shape[axis] > 1:
            some = _in_tiles(some, axis, size, number).any(axis=axis + 1)
            full = _in_tiles(full, axis, size, number).all(axis=axis + 1)
    shape = *words.shape[:2], count, others
    return jnp.broadcast_to(some.swapaxes(2, 3), shape), jnp.broadcast_to(full.swapaxes(2, 3), shape)


def _in_tiles(x: Array, axis: int, size: int, number: int) -> Array:
    """Splits an axis, which has at least as many elements, into so many tiles of a size."""
    x = jax.lax.slice_in_dim(x, 0, size * number, axis=axis)
    return x.reshape(*x.shape[:axis], number, size, *x.shape[axis + 1:])


def _dense(mask: masks.Mask) -> list[masks.Dense]:
    return [part for part in mask.parts if isinstance(part, masks.Dense)]


@functools.partial(jax.jit, static_argnames=("rows", "columns"))
def words_of_keys(attend: Bool[Array, "1|b 1|h 1|t 1|s"], rows: int,
                  columns: int) -> Int[Array, "1|b 1|h 1|words 1|rows"]:
    """Packs one array along keys. A function of JAX by name, for a runtime with an operation for it."""
    return _words(attend, True, rows, columns)


@functools.partial(jax.jit, static_argnames=("rows", "columns"))
def words_of_queries(attend: Bool[Array, "1|b 1|h 1|t 1|s"], rows: int,
                     columns: int) -> Int[Array, "1|b 1|h 1|words 1|rows"]:
    """Packs one array along queries; as `words_of_keys`."""
    return _words(attend, False, rows, columns)


def _words(attend: Bool[Array, "1|b 1|h 1|t 1|s"], of_keys: bool, rows: int,
           columns: int) -> Int[Array, "1|b 1|h 1|words 1|rows"]:
    """Packs one array. The sum over 32 columns runs over the axis where they lie: no transposed copy of booleans."""
    row_axis, column_axis = (2, 3) if of_keys else (3, 2)
    pad = [(0, 0)] * 4
    for axis, length in ((row_axis, rows), (column_axis, columns)):
        if attend.shape[axis] > 1:
            pad[axis] = 0, length - attend.shape[axis]
    attend = jnp.pad(attend, pad)
    if attend.shape[column_axis] == 1:
        words = -attend.astype(jnp.int32)
    else:
        shape = attend.shape[:column_axis] + (columns // BITS, BITS) + attend.shape[column_axis + 1:]
        bit = jax.lax.broadcasted_iota(jnp.uint32, shape, column_axis + 1)
        words = (attend.reshape(shape).astype(jnp.uint32) << bit).sum(axis=column_axis + 1, dtype=jnp.uint32)
        words = jax.lax.bitcast_convert_type(words, jnp.int32)
    return words.swapaxes(2, 3) if of_keys else words
