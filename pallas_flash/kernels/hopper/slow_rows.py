"""Sums over keys without tensor cores, one key at a time: slow, and exact to rounding.

They repair tiles in which a weight of 0 met a NaN: 0 * NaN is NaN.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_flash.kernels.hopper import registers
from pallas_flash.kernels.hopper.places import Place, locate
from pallas_flash.kernels.hopper.registers import Fragment, PerRow
from pallas_flash.kernels.hopper.schedule import CHUNK
from pallas_flash.kernels.mosaic.types import Index, Ref
from pallas_flash.spec import AttentionSpec

__all__ = ["SlowRows", "over_chunks"]


def over_chunks[C](dim: int, body: Callable[[Index, int, C], C], carry: C) -> C:
    """Runs carry = body(chunk, columns, carry) for each chunk of a row of `dim` columns.

    It is a loop, not unrolled: its bodies are slow and rare, and would be most of a kernel's code and compile time.
    """
    whole, rest = divmod(dim, CHUNK)
    if whole > 1:
        carry = lax.fori_loop(jnp.int32(0), jnp.int32(whole), lambda i, carry: body(i, CHUNK, carry), carry)
    elif whole:
        carry = body(0, CHUNK, carry)
    return body(whole, rest, carry) if rest else carry


class SlowRows(NamedTuple):
    """64 queries in shared memory, and one head's keys and values in global memory."""

    spec: AttentionSpec
    smem: dict[str, Ref]  # by name: (chunks, 64, 64)
    gmem: dict[str, Ref]  # by name: in the spec's layout
    head: tuple[Index, Index]  # batch, kv_head

    def row(self, name: str, position: Index, first: Index, columns: int) -> Fragment:
        """Loads columns of one key or value into every row: (64, columns) float32."""
        (batch, head), place = self.head, locate(self.gmem, Place.KEY, self.head[0])
        batch, position = place.batch, place.row(position)
        index = (batch, position, head) if self.spec.layout == "BLHD" else (batch, head, position)
        x = registers.load_row(self.gmem[name], index, first, columns).astype(jnp.float32)
        return registers.stack(x)

    def dot(self, own: str, other: str, dim: int, position: Index) -> PerRow:
        """Multiplies each of the 64 rows in shared memory with one row in global memory: (64,) float32."""
        def add(chunk: Index, columns: int, total: PerRow) -> PerRow:
            x = registers.load_chunks(self.smem[own].at[pl.ds(chunk, 1)], 0, columns, self.spec.dtype)
            return total + (x.astype(jnp.float32) * self.row(other, position, chunk * CHUNK, columns)).sum(axis=1)

        return over_chunks(dim, add, registers.row_zeros())
