"""The mask of one batch entry and head, as kernels ask it pair by pair: a rule of static numbers, or arrays."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_flash import masks, tiles
from pallas_flash.arrays import Array, Bool, Int
from pallas_flash.kernels.hopper import registers
from pallas_flash.kernels.hopper.registers import Fragment
from pallas_flash.kernels.hopper.schedule import ROWS_PER_WARPGROUP
from pallas_flash.kernels.mosaic import ptx
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

    def hide(self, s: Fragment, first: tuple[Index, Index], keys_dim: int) -> Fragment:
        """Sets scores or exponents, (64, n) in the layout TILE, to -inf where the mask does not keep a pair.

        Args:
          first: the positions of the first query and of the first key.
          keys_dim: the axis that runs over keys.
        """
        columns, (q_first, kv_first) = s.shape[1], first
        q_pos = registers.positions(columns, 1 - keys_dim, q_first)
        return masked(s, self.mask, q_pos, registers.positions(columns, keys_dim, kv_first))

    def keep(self, columns: int, first: Index, key: Index) -> Bool[Array, "64 n"]:
        """Whether each of the 64 queries from `first` on attends to a key, in each of so many columns."""
        return jnp.asarray(self.mask.keep(registers.positions(columns, 0, first), key))


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

    def hide(self, s: Fragment, first: tuple[Index, Index], keys_dim: int) -> Fragment:
        """Sets scores or exponents to -inf where the mask does not keep a pair."""
        row, column = first if keys_dim == 1 else first[::-1]
        if "q_ids" in self.gmem:
            s = self._with_equal_ids(s, ("q_ids", row), ("kv_ids", column), keys_dim)
        name = "keys" if keys_dim == 1 else "queries"
        return self._within(s, name, row, column) if name in self.gmem else s

    def keep(self, columns: int, first: Index, key: Index) -> Bool[Array, "64 n"]:
        """Whether each of the 64 queries from `first` on attends to a key, in each of so many columns."""
        found = []
        if "keys" in self.gmem:
            start, count = (registers.spread(self._rows("keys", i, first), columns) for i in range(2))
            found.append((key >= start) & (key < start + count))
        if "q_ids" in self.gmem:
            found.append(registers.spread(self._rows("q_ids", 0, first), columns)
                         == self.gmem["kv_ids"][*self._at("kv_ids"), 0, key])
        return found[0] if len(found) == 1 else found[0] & found[1]

    def _within(self, s: Fragment, name: str, row: Index, column: Index) -> Fragment:
        """Hides what lies outside of each row's interval, 8 columns at a time."""
        start, count = (registers.spread(self._rows(name, i, row), 8) for i in range(2))
        offset = registers.positions(8, 1, column) - start
        inside = lambda i: (offset >= -i) & (offset < count - i)
        return registers.concatenate([jnp.where(inside(i), s[:, i:i + 8], -jnp.inf) for i in range(0, s.shape[1], 8)])

    def _with_equal_ids(self, s: Fragment, rows: tuple[str, Index], columns: tuple[str, Index],
                        keys_dim: int) -> Fragment:
        """Hides pairs whose ids differ."""
        if keys_dim == 0:
            rows, columns = ("kv_ids", rows[1]), ("q_ids", columns[1])
        # Opaque, or LLVM would keep what follows from them, addresses first, in registers through every loop.
        here = self._replace(batch=ptx.opaque(self.batch), head=ptx.opaque(self.head))
        (name, first), own = columns, here._rows(rows[0], 0, ptx.opaque(rows[1]))
        ids = registers.load_row(self.gmem[name], (*here._at(name), 0), ptx.opaque(first), s.shape[1])
        return jnp.where(registers.spread(own, s.shape[1]) == registers.stack(ids), s, -jnp.inf)

    def _rows(self, name: str, i: int, first: Index) -> Int[Array, "64"]:
        """Loads a number for each of 64 rows: row i of an array, from position `first` on."""
        ref = self.gmem[name].at[*self._at(name), i, pl.ds(first, ROWS_PER_WARPGROUP)]
        return plgpu.load(ref, layout=registers.ROW_LAYOUT, optimized=False)

    def _at(self, name: str) -> tuple[Index, Index]:
        """Where this batch entry and head lie in an array: its axes are as long, or 1."""
        batch, heads = self.gmem[name].shape[:2]
        return self.batch if batch > 1 else 0, self.head if heads > 1 else 0


HeadMask = StaticMask | ArrayMask
