"""What the backward kernels share: the walk over tiles, tiles in global memory, weights from scores.

The statistics of a query are three numbers (`Statistics`). P = exp2(scale log2(e) S - lse log2(e)), where product and
difference are one instruction, rounded once; the accumulator of dP starts at -delta, so that dS = P * dP. Where one of
64 queries is large (`scores`), lse log2(e) is rounded too much, and what it lost is added to the exponents of all 64:
they are exact where S is what it was in the forward, to the bit. That one is, the last bit of all 64 numbers says.
"""

import enum
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_flash import masks
from pallas_flash.kernels.hopper import products
from pallas_flash.kernels.hopper.schedule import CHUNK
from pallas_flash.kernels.hopper.scores import scaled, score_unit
from pallas_flash.kernels.mosaic import ptx
from pallas_flash.kernels.mosaic.interpret import interpreted_as
from pallas_flash.spec import AttentionSpec

__all__ = ["COMPILER", "IDLE", "LOADED", "Corrections", "Statistics", "Walk", "chunk_of", "drain", "is_marked",
           "load_tile", "store_tile", "weights", "with_mark"]


class Statistics(enum.IntEnum):
    """What is known of each query, float32, by the row of the array (batch, q_heads, 3, padded length) that has it."""

    LSE = 0  # lse log2(e), IDLE where a query attends to nothing; the last bit is 1 if one of 64 queries is large
    DELTA = 1  # -delta
    ROUNDING = 2  # how much more LSE is than it should be


IDLE = 3e38
"""Finite: its last bit must be free."""

LOADED = (Statistics.LSE, Statistics.DELTA)
"""What comes to shared memory with each tile; the third is read where it is needed, which is rare."""

COMPILER = plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0,
                                lowering_semantics=plgpu.LoweringSemantics.Lane)


class Walk(NamedTuple):
    """A block's steps: for each of `heads` query heads from `head` on, the tiles [start, stop)."""

    head: Any
    heads: int
    start: Any
    full_start: Any  # tiles [full_start, full_stop) need no mask
    full_stop: Any
    stop: Any

    @property
    def steps(self) -> Any:
        return self.heads * (self.stop - self.start)

    @property
    def first(self) -> tuple[Any, Any]:
        """(head, tile) of the first step."""
        return jnp.asarray(self.head, jnp.int32), jnp.asarray(self.start, jnp.int32)

    def next(self, head: Any, tile: Any) -> tuple[Any, Any]:
        """(head, tile) of the step after this one."""
        if self.heads == 1:
            return head, tile + 1
        last = tile + 1 == self.stop
        return jnp.where(last, head + 1, head), jnp.where(last, self.start, tile + 1)

    def skip(self, count: int, head: Any, tile: Any) -> tuple[Any, Any]:
        """(head, tile) of `count` steps after this one."""
        for _ in range(count):
            head, tile = self.next(head, tile)
        return head, tile

    def partial(self, tile: Any) -> Any:
        """True where a tile needs the mask."""
        return (tile < self.full_start) | (tile >= self.full_stop)


def chunk_of(spec: AttentionSpec, ref: Any, place: tuple[Any, Any, Any], rows: int, chunk: int) -> Any:
    """A (rows, 64) piece of an array in the spec's layout, from (batch, head, first row); TMA fills and clips."""
    batch, head, first = place
    columns = pl.ds(chunk * CHUNK + batch * 0, CHUNK)  # traced: Pallas refuses plain indices that leave the array
    if spec.layout == "BLHD":
        return ref.at[batch, pl.ds(first, rows), head, columns]
    return ref.at[batch, head, pl.ds(first, rows), columns]


def load_tile(spec: AttentionSpec, source: Any, place: tuple[Any, Any, Any], target: Any, full: Any) -> None:
    """Starts to load a tile into (chunks, rows, 64) of shared memory; each chunk arrives at `full`."""
    count, rows, _ = target.shape
    for chunk in range(count):
        plgpu.copy_gmem_to_smem(chunk_of(spec, source, place, rows, chunk), target.at[chunk], full)


def store_tile(spec: AttentionSpec, x: Any, buffer: Any, target: Any, place: tuple[Any, Any, Any]) -> None:
    """Writes x, (64, columns) in the layout TILE, to global memory through (chunks, 64, 64) of shared memory."""
    products.store_chunks(x, buffer)
    plgpu.commit_smem()
    count = buffer.shape[0]
    for chunk in range(count):
        piece = chunk_of(spec, target, place, 64, chunk)
        plgpu.copy_smem_to_gmem(buffer.at[chunk], piece, commit_group=chunk == count - 1)


def _drain_plain(free: Any, slots: int, steps: Any) -> None:
    for slot in range(slots):
        pl.when(slot < steps)(functools.partial(plgpu.barrier_wait, free.at[slot]))


@interpreted_as(_drain_plain)
def drain(free: Any, slots: int, steps: Any) -> None:
    """Does nothing on a GPU; in interpret mode, which wants every phase of a barrier waited for, waits for the last
    phase of each slot's.
    """


def masked(s: Any, mask: masks.Mask, first: tuple[Any, Any], keys_dim: int) -> Any:
    """s with -inf where the mask does not keep a pair.

    Args:
      s: scores whose product with a positive number is the exponent.
      first: position of the first query and of the first key.
      keys_dim: the axis of s that runs over keys.
    """
    q_pos = products.positions(s.shape[1], 1 - keys_dim, first[0])
    kv_pos = products.positions(s.shape[1], keys_dim, first[1])
    return jnp.where(mask.keep(q_pos, kv_pos), s, -jnp.inf)


def with_mark(lse_log2: Any, large: Any) -> Any:
    """lse log2(e) with its last bit set if `large`, a scalar, else cleared."""
    bits = lax.bitcast_convert_type(lse_log2, jnp.int32)
    return lax.bitcast_convert_type(jnp.where(large, bits | 1, bits & -2), jnp.float32)


def is_marked(lse_log2: Any, layout: Any) -> Any:
    """Whether one of 64 queries is large, from any of their numbers; the same in every thread of a warp."""
    return ptx.any_in_warp((lax.bitcast_convert_type(lse_log2, jnp.int32) & 1) != 0, layout)


class Corrections(NamedTuple):
    """What few tiles need beside exp2 of their exponents: exact ones where queries are large, the mask.

    One branch for all of it: nothing else may stand between products in flight.
    """

    partial: Any  # whether the tile needs the mask; None if no tile does
    large: Any  # whether a query is large (`scores`); None if none ever is
    mask: Callable[[Any], Any]  # of exponents: -inf where no pair attends
    exact: Callable[[Any], Any]  # of exponents, where queries are large
    apart: bool = False  # tiles that need something compute their exponentials, too, in the branch (`KvSchedule`)

    def weights(self, s: Any, exponents: Callable[[Any], Any], power: Callable[[Any], Any]) -> Any:
        """power(exponents(s)), corrected."""
        flags = [flag for flag in (self.partial, self.large) if flag is not None]
        if not flags:
            return power(exponents(s))
        needed = functools.reduce(jnp.logical_or, flags)
        if not self.apart:
            return power(lax.cond(needed, self._corrected, lambda y: y, exponents(s)))
        return lax.cond(needed, lambda s: power(self._corrected(exponents(s))), lambda s: power(exponents(s)), s)

    def _corrected(self, y: Any) -> Any:
        if self.large is not None:
            y = lax.cond(self.large, self.exact, lambda y: y, y)
        return y if self.partial is None else self.mask(y)


def weights(spec: AttentionSpec, x: Any, lse_log2: Any, corrections: Corrections,
            shift: float = 0.0) -> tuple[Any, Any]:
    """P, and P times the slope of the soft cap, from a tile of products of queries and keys; both times 2^shift.

    Args:
      x: in the layout TILE.
      lse_log2: in the shape of x.
    """
    s, unit = scaled(spec, x), score_unit(spec)
    p = corrections.weights(s, lambda s: s * unit - lse_log2, lambda y: jnp.exp2(y + shift if shift else y))
    return p, p if spec.softcap is None else jnp.where(p == 0, 0.0, p * (1 - s * s))
