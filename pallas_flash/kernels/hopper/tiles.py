"""Tiles on their way between global and shared memory: copies by TMA in chunks of 64 columns, and rings.

A ring is a buffer of slots with two barriers each: full when TMA has brought a tile, free when all its readers are
done. Tile i takes the slot i modulo the number of slots.
"""

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_flash.kernels.hopper import registers
from pallas_flash.kernels.hopper.registers import Fragment
from pallas_flash.kernels.hopper.schedule import CHUNK, chunks
from pallas_flash.kernels.mosaic.interpret import interpreted_as
from pallas_flash.kernels.mosaic.scheduling import rem
from pallas_flash.kernels.mosaic.types import Index, Ref
from pallas_flash.spec import AttentionSpec

__all__ = ["COMPILER", "await_free", "chunk_of", "drain", "load_rows", "load_tile", "see_last_phases", "store_result",
           "store_rows", "store_tile"]

COMPILER = plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0,
                                lowering_semantics=plgpu.LoweringSemantics.Lane)
"""How every kernel is compiled."""


def chunk_of(spec: AttentionSpec, ref: Ref, index: tuple[Index, Index, Index], rows: int, chunk: Index) -> Ref:
    """A (rows, 64) piece of an array in the spec's layout, from (batch, head, first row) on; TMA fills and clips what
    lies outside of the array.
    """
    batch, head, first = index
    columns = pl.ds(chunk * CHUNK + batch * 0, CHUNK)  # traced: Pallas refuses plain indices that leave the array
    if spec.layout == "BLHD":
        return ref.at[batch, pl.ds(first, rows), head, columns]
    return ref.at[batch, head, pl.ds(first, rows), columns]


def load_tile(spec: AttentionSpec, source: Ref, index: tuple[Index, Index, Index], target: Ref, full: Ref) -> None:
    """Starts to load a tile into (chunks, rows, 64) of shared memory; each chunk arrives at `full`."""
    count, rows, _ = target.shape
    for chunk in range(count):
        plgpu.copy_gmem_to_smem(chunk_of(spec, source, index, rows, chunk), target.at[chunk], full)


def store_tile(spec: AttentionSpec, x: Fragment, buffer: Ref, target: Ref,
               index: tuple[Index, Index, Index, Index]) -> None:
    """Starts to write x, (64, columns) in the layout TILE, to global memory through (chunks, 64, 64) of shared memory.

    Args:
      index: (batch, head, first row, first chunk) of x in the target.
    """
    registers.store_chunks(x, buffer)
    plgpu.commit_smem()
    batch, head, rows, first = index
    count = chunks(x.shape[1])
    for chunk in range(count):
        piece = chunk_of(spec, target, (batch, head, rows), 64, first + chunk)
        plgpu.copy_smem_to_gmem(buffer.at[chunk], piece, commit_group=chunk == count - 1)


def store_rows(spec: AttentionSpec, x: Fragment, target: Ref, index: tuple[Index, Index, Index, int]) -> None:
    """Writes x, (64, columns) float32 in the layout TILE, to global memory; not through shared memory, of which it
    would need twice as much as what is rounded.

    Args:
      index: (batch, head, first row, first chunk) of x in the target.
    """
    registers.store_rows(x, target, *rows_at(spec, index))


def load_rows(spec: AttentionSpec, source: Ref, index: tuple[Index, Index, Index, int], columns: int) -> Fragment:
    """Loads 64 whole rows of float32 from global memory, (64, columns) in the layout TILE.

    Args:
      index: (batch, head, first row, first chunk).
    """
    return registers.load_rows(source, *rows_at(spec, index), columns)


def rows_at(spec: AttentionSpec,
             index: tuple[Index, Index, Index, int]) -> tuple[tuple[Index, Index, Index], int, int]:
    """The index of the first row, the axis of rows and the first column, as `registers.store_rows` takes them."""
    batch, head, rows, first = index
    axis, place = (1, (batch, rows, head)) if spec.layout == "BLHD" else (2, (batch, head, rows))
    return place, axis, first * CHUNK


def store_result(spec: AttentionSpec, x: Fragment, buffer: Ref, target: Ref,
                 index: tuple[Index, Index, Index, int]) -> None:
    """Starts to write x, float32, as a result of the spec: `store_tile` where it is rounded, else `store_rows`."""
    if spec.partial:
        store_rows(spec, x, target, index)
    else:
        store_tile(spec, x.astype(spec.dtype), buffer, target, index)


def await_free(free: Ref, slots: int, index: Index) -> Index:
    """Waits until tile number `index` of a ring has a slot: what was in it has been read. Returns the slot."""
    slot = rem(index, slots)

    @pl.when(index >= slots)
    def _() -> None:
        plgpu.barrier_wait(free.at[slot])

    return slot


def drain(free: Ref, used: Index) -> None:
    """Waits until the last tiles of a ring, through which `used` have come in all, have been read."""
    slots = free.shape[0]

    @pl.loop(jnp.maximum(used - slots, 0), used)
    def _(i: Index) -> None:
        plgpu.barrier_wait(free.at[rem(i, slots)])


def _see_last_phases_plain(free: Ref, slots: int, used: Index) -> None:
    for slot in range(slots):
        pl.when(slot < used)(functools.partial(plgpu.barrier_wait, free.at[slot]))


@interpreted_as(_see_last_phases_plain)
def see_last_phases(free: Ref, slots: int, used: Index) -> None:
    """Does nothing on a GPU; in interpret mode, which wants every phase of a barrier waited for, waits for the last
    phase of each slot's.
    """
