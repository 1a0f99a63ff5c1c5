"""The mask of one batch entry and head, as kernels ask it pair by pair: a rule of static numbers, or arrays."""

import functools
import operator
from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_flash import masks, tiles
from pallas_flash.arrays import Array, Bool, Int
from pallas_flash.kernels.mosaic import fragments, ptx
from pallas_flash.kernels.mosaic.fragments import ROWS, Fragment
from pallas_flash.kernels.mosaic.mask_bits import BITS
from pallas_flash.kernels.mosaic.scheduling import div, rem
from pallas_flash.kernels.mosaic.scores import masked
from pallas_flash.kernels.mosaic.types import Index, Ref

__all__ = ["ArrayMask", "HeadMask", "StaticMask"]


class StaticMask(NamedTuple):
    """A mask without arrays: the same for all batch entries and heads."""

    mask: masks.Mask

    def of_head(self, head: Index) -> "StaticMask":
        """The mask of another head."""
        del head
        return self

    def load_ahead(self, key: Index) -> None:
        """Loads nothing."""

    def hide(self, s: Fragment, first: tuple[Index, Index], keys_dim: int) -> Fragment:
        """Sets scores or exponents, (64, n) in the layout TILE, to -inf where the mask does not keep a pair.

        Args:
          first: the positions of the first query and of the first key.
          keys_dim: the axis that runs over keys.
        """
        columns, (q_first, kv_first) = s.shape[1], first
        q_pos = fragments.positions(columns, 1 - keys_dim, q_first)
        return masked(s, self.mask, q_pos, fragments.positions(columns, keys_dim, kv_first))

    def keep(self, columns: int, first: Index, key: Index) -> Bool[Array, "64 n"]:
        """Whether each of the 64 queries from `first` on attends to a key, in each of so many columns."""
        return jnp.asarray(self.mask.keep(fragments.positions(columns, 0, first), key))


class ArrayMask(NamedTuple):
    """A mask that holds arrays, as `mask_arrays` has laid them out in global memory; its methods are `StaticMask`'s."""

    gmem: dict[str, Ref]
    batch: Index
    head: Index  # a query head

    def of_head(self, head: Index) -> "ArrayMask":
        """The mask of another head."""
        return self._replace(head=head)

    def tiles(self, name: str, tile: Index) -> tiles.TileRange[Index]:
        """The tiles of the other axis that a tile needs: a row of "key_tiles", or of "query_tiles", whose heads are
        those of keys.
        """
        ref, at = self.gmem[name], self._at(name)
        return tiles.TileRange(*(ref[*at, tile, i] for i in range(4)))

    def load_ahead(self, key: Index) -> None:
        """Brings what `hide` reads of each of the 64 keys from `key` on to L1, as a kernel that keeps them starts: in a
        step nothing hides the 600 cycles that it takes.
        """
        for name, i in (("queries", 0), ("queries", 1), ("kv_ids", 0)):
            if name in self.gmem:
                ptx.pin(self._rows(name, i, key).astype(jnp.float32), fragments.ROW_LAYOUT)

    def hide(self, s: Fragment, first: tuple[Index, Index], keys_dim: int) -> Fragment:
        """Sets scores or exponents to -inf where the mask does not keep a pair."""
        row, column = first if keys_dim == 1 else first[::-1]
        if "q_ids" in self.gmem:
            s = self._with_equal_ids(s, ("q_ids", row), ("kv_ids", column), keys_dim)
        bits = "key_bits" if keys_dim == 1 else "query_bits"
        if bits in self.gmem:
            s = self._with_bits(s, bits, row, column)
        name = "keys" if keys_dim == 1 else "queries"
        return self._within(s, name, row, column) if name in self.gmem else s

    def keep(self, columns: int, first: Index, key: Index) -> Bool[Array, "64 n"]:
        """Whether each of the 64 queries from `first` on attends to a key, in each of so many columns."""
        found = []
        if "keys" in self.gmem:
            start, count = (fragments.spread(self._rows("keys", i, first), columns) for i in range(2))
            found.append((key >= start) & (key < start + count))
        if "q_ids" in self.gmem:
            found.append(fragments.spread(self._rows("q_ids", 0, first), columns)
                         == self.gmem["kv_ids"][*self._at("kv_ids"), 0, key])
        if "key_bits" in self.gmem:
            bit = fragments.positions(columns, 1, 0) * 0 + rem(key, BITS)
            found.append((self._word("key_bits", first, div(key, BITS), columns) >> bit & 1) != 0)
        return functools.reduce(operator.and_, found)

    def _within(self, s: Fragment, name: str, row: Index, column: Index) -> Fragment:
        """Hides what lies outside of each row's interval, 8 columns at a time."""
        start, count = (fragments.spread(self._rows(name, i, row), 8) for i in range(2))
        offset = fragments.positions(8, 1, column) - start
        inside = lambda i: (offset >= -i) & (offset < count - i)
        return fragments.concatenate([jnp.where(inside(i), s[:, i:i + 8], -jnp.inf) for i in range(0, s.shape[1], 8)])

    def _with_equal_ids(self, s: Fragment, rows: tuple[str, Index], columns: tuple[str, Index],
                        keys_dim: int) -> Fragment:
        """Hides pairs whose ids differ."""
        if keys_dim == 0:
            rows, columns = ("kv_ids", rows[1]), ("q_ids", columns[1])
        # Opaque, or LLVM would keep what follows from them, addresses first, in registers through every loop.
        here = self._replace(batch=ptx.opaque(self.batch), head=ptx.opaque(self.head))
        (name, first), own = columns, here._rows(rows[0], 0, ptx.opaque(rows[1]))
        ids = fragments.load_row(self.gmem[name], (*here._at(name), 0), ptx.opaque(first), s.shape[1])
        return jnp.where(fragments.spread(own, s.shape[1]) == fragments.stack(ids), s, -jnp.inf)

    def _with_bits(self, s: Fragment, name: str, row: Index, column: Index) -> Fragment:
        """Hides pairs whose bit is not set, 8 columns at a time: of a word shifted by a thread's own column, the bit of
        every eighth one lies where a constant says.
        """
        here = self._replace(batch=ptx.opaque(self.batch), head=ptx.opaque(self.head))  # as for ids
        row, first_word = ptx.opaque(row), div(ptx.opaque(column), BITS)
        parts = []
        for first in range(0, s.shape[1], BITS):
            word = here._word(name, row, first_word + first // BITS, 8) >> fragments.positions(8, 1, 0)
            for i in range(0, BITS, 8):
                parts.append(jnp.where((word & (1 << i)) != 0, s[:, first + i:first + i + 8], -jnp.inf))
        return fragments.concatenate(parts)

    def _word(self, name: str, row: Index, word: Index, columns: int) -> Array:
        """Loads a word of bits for each of 64 rows, in each of so many columns; one number where rows share it."""
        words, rows = self.gmem[name].shape[2:]
        word = word if words > 1 else 0
        if rows == 1:
            return self.gmem[name][*self._at(name), word, 0]
        return fragments.spread(self._rows(name, word, row), columns)

    def _rows(self, name: str, i: Index, first: Index) -> Int[Array, "64"]:
        """Loads a number for each of 64 rows: row i of an array, from position `first` on."""
        ref = self.gmem[name].at[*self._at(name), i, pl.ds(first, ROWS)]
        return plgpu.load(ref, layout=fragments.ROW_LAYOUT, optimized=False)

    def _at(self, name: str) -> tuple[Index, Index]:
        """Where this batch entry and head lie in an array: its axes are as long, or 1."""
        batch, heads = self.gmem[name].shape[:2]
        return self.batch if batch > 1 else 0, self.head if heads > 1 else 0


HeadMask = StaticMask | ArrayMask
