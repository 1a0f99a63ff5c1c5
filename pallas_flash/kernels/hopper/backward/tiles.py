"""What the roles of a backward kernel share: a block, its walk over tiles, its steps; tiles in global memory."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_flash import masks
from pallas_flash.kernels.hopper import barriers, registers
from pallas_flash.kernels.hopper.backward_schedule import KvSchedule, SplitSchedule
from pallas_flash.kernels.hopper.schedule import CHUNK, rem
from pallas_flash.spec import AttentionSpec

__all__ = ["COMPILER", "Block", "KeyBlock", "Step", "Walk", "chunk_of", "drain", "load_tile", "store_tile"]


COMPILER = plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0,
                                lowering_semantics=plgpu.LoweringSemantics.Lane)


class Walk(NamedTuple):
    """A block's steps: for each of `heads` query heads from `head` on, the tiles [start, stop) of the other axis."""

    head: Any
    heads: int
    start: Any
    full_start: Any  # tiles [full_start, full_stop) need no mask
    full_stop: Any
    stop: Any

    @property
    def steps(self) -> Any:
        """How many there are; none where stop <= start."""
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


class Block[S](NamedTuple):
    """What the roles of one block share. It keeps one tile, of keys or (in `backward.dq`) of queries, and walks over
    tiles of the other axis.
    """

    spec: AttentionSpec
    schedule: S
    gmem: dict[str, Any]  # arrays in global memory, by name
    smem: dict[str, Any]  # buffers in shared memory
    bars: dict[str, Any]  # barriers
    mask: masks.Mask
    batch: Any
    head: Any  # of the tile that it keeps: a key head, or a query head
    tile: Any
    walk: Walk


type KeyBlock = Block[KvSchedule] | Block[SplitSchedule]
"""A block that keeps keys."""


class Step(NamedTuple):
    """One query tile of a walk, for one query head."""

    index: Any  # how many steps came before it
    head: Any
    tile: Any

    def slot(self, slots: int) -> Any:
        """Where a ring of so many slots holds what belongs to the step."""
        return rem(self.index, slots)


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
    registers.store_chunks(x, buffer)
    plgpu.commit_smem()
    count = buffer.shape[0]
    for chunk in range(count):
        piece = chunk_of(spec, target, place, 64, chunk)
        plgpu.copy_smem_to_gmem(buffer.at[chunk], piece, commit_group=chunk == count - 1)


def drain(free: Any, slots: int, steps: Any) -> None:
    """Waits for the last phase of each slot's barrier, which nobody needs: interpret mode wants every phase seen."""
    if barriers.is_interpreted():
        for slot in range(slots):
            pl.when(slot < steps)(functools.partial(plgpu.barrier_wait, free.at[slot]))
