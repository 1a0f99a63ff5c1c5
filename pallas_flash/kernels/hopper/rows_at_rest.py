"""Sums over keys without tensor cores, a key at a time: what repairs a tile in which 0 * NaN has become NaN. Slow, and
exact to rounding.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from pallas_flash.kernels.hopper import products
from pallas_flash.kernels.hopper.schedule import CHUNK, ROWS
from pallas_flash.spec import AttentionSpec

__all__ = ["RowsAtRest", "across"]


def across(x: Any, columns: int) -> Any:
    """(64,) -> (64, columns)."""
    return lax.broadcast_in_dim(x, (ROWS, columns), [0])


class RowsAtRest(NamedTuple):
    """64 queries in shared memory, and one head's keys and values in global memory."""

    spec: AttentionSpec
    smem: dict[str, Any]  # by name: (chunks, 64, 64)
    gmem: dict[str, Any]  # by name: in the spec's layout
    head: tuple[Any, Any]  # batch, kv_head

    def row(self, name: str, position: Any, first: int, columns: int) -> Any:
        """One position's columns from `first` on, in every row: (64, columns) float32."""
        batch, head = self.head
        place = (batch, position, head) if self.spec.layout == "BLHD" else (batch, head, position)
        x = products.load_row(self.gmem[name], place, first, columns).astype(jnp.float32)
        return lax.broadcast_in_dim(x, (ROWS, columns), [1])

    def dot(self, own: str, other: str, dim: int, position: Any) -> Any:
        """The product of each of the 64 rows with one position's row: (64,) float32.

        A chunk at a time: all of a row would not fit the registers.
        """
        total = 0.0
        for first in range(0, dim, CHUNK):
            columns = min(CHUNK, dim - first)
            x = products.load_chunks(self.smem[own], first, columns, self.spec.dtype).astype(jnp.float32)
            total += (x * self.row(other, position, first, columns)).sum(axis=1)
        return total
