"""Keys and values in pages: which page holds which positions of a sequence, and reading them from there.

Page p of sequence b holds its positions from p * page_size on and is `pages[page_table[b, p]]`. Several sequences may
have the same page. An entry of the table outside the pages says that there is none.
"""

import dataclasses

import jax.numpy as jnp

from pallas_flash.arrays import Array, Bool, Float, Int

__all__ = ["Pages", "contiguous", "lack", "page_at", "rows"]


@dataclasses.dataclass(frozen=True)
class Pages:
    """How many pages there are, shared by all sequences, and how many positions each holds."""

    number: int
    size: int

    def __str__(self) -> str:
        return f"{self.number}x{self.size}"


def page_at(page_table: Int[Array, "b p"], pos: Int[Array, "1|b n"], page_size: int) -> Int[Array, "b n"]:
    """The entry of the table for positions in [0, p * page_size)."""
    batch = page_table.shape[0]
    page: Array = jnp.take_along_axis(page_table, jnp.broadcast_to(pos // page_size, (batch, pos.shape[1])), axis=1)
    return page


def lack(pages: Pages, page_table: Int[Array, "b p"], lengths: Int[Array, " b"]) -> Bool[Array, " b"]:
    """Which sequences of so many keys lack a page that some of these keys would lie in. One reduction."""
    first = jnp.arange(page_table.shape[1], dtype=jnp.int32)[None] * pages.size
    is_there = (page_table >= 0) & (page_table < pages.number)
    lacking: Array = jnp.any(~is_there & (first < lengths[:, None]), axis=1)
    return lacking


def contiguous(pages: Float[Array, "n_pages page_size k d"], page_table: Int[Array, "b p"],
               axis: int) -> Float[Array, "b s k d"]:
    """A copy of all keys that the table shows, one after the other; in the layout of the pages. See `rows` for `axis`
    and for missing pages.
    """
    found: Array = pages.at[jnp.clip(page_table, 0, pages.shape[0] - 1)].get(mode="promise_in_bounds")
    found = jnp.moveaxis(found, 1, axis)  # the pages of a sequence, in front of the positions in one
    shape = found.shape
    return found.reshape(*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2:])


def rows(pages: Float[Array, "n_pages page_size k d"], page_table: Int[Array, "b p"], pos: Int[Array, " n"],
         axis: int) -> Float[Array, "b n k d"]:
    """The keys of all sequences at the positions `pos`, which their table covers: a gather of these rows alone.

    Args:
      pages: in either layout.
      axis: that of the positions in a page; the result has the n positions there.

    What a missing page would hold is what some other page does: whoever reads it must mask it.
    """
    size = pages.shape[axis]
    page = jnp.clip(page_at(page_table, pos[None], size), 0, pages.shape[0] - 1)
    row = jnp.broadcast_to((pos % size)[None], page.shape)
    if axis == 1:
        return pages.at[page, row].get(mode="promise_in_bounds")
    return pages.at[page, :, row].get(mode="promise_in_bounds").swapaxes(1, 2)
