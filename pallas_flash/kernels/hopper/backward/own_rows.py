"""A compute warpgroup's own rows of a block's keys and values, in shared memory or held in registers."""

from jax.experimental import pallas as pl

from pallas_flash.kernels.hopper import registers
from pallas_flash.kernels.hopper.backward.tiles import Block
from pallas_flash.kernels.hopper.registers import Fragment
from pallas_flash.kernels.hopper.schedule import CHUNK, ROWS_PER_WARPGROUP, KvSchedule
from pallas_flash.kernels.mosaic import ptx
from pallas_flash.kernels.mosaic.types import Index, Ref

__all__ = ["own_rows", "with_held_rows"]


def own_rows(block: Block[KvSchedule], name: str, warpgroup: Index) -> Fragment | Ref:
    """Selects a compute warpgroup's 64 rows of the keys or values: (chunks, 64, 64), or (64, columns) if held."""
    return block.held[name] if name in block.held else own_rows_in_memory(block, name, warpgroup)


def own_rows_in_memory(block: Block[KvSchedule], name: str, warpgroup: Index) -> Ref:
    """Selects a compute warpgroup's 64 rows of the keys or values in shared memory, (chunks, 64, 64)."""
    index = ptx.opaque(warpgroup) if block.schedule.opaque else warpgroup
    return block.smem[name].at[:, pl.ds(index * ROWS_PER_WARPGROUP, ROWS_PER_WARPGROUP)]


def with_held_rows(block: Block[KvSchedule], warpgroup: Index) -> Block[KvSchedule]:
    """Loads the rows that the schedule holds in registers."""
    refs = {name: own_rows_in_memory(block, name, warpgroup) for name in block.schedule.held}
    return block._replace(held={name: registers.load_chunks(ref, 0, ref.shape[0] * CHUNK, block.spec.dtype)
                                for name, ref in refs.items()})
