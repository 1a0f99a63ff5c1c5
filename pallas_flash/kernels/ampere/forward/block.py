"""What the stages of the forward kernel share: a block's problem, references, and place."""

from typing import NamedTuple

import jax.numpy as jnp

from pallas_flash import tiles
from pallas_flash.arithmetic import Positions
from pallas_flash.kernels.ampere import copies, work
from pallas_flash.kernels.ampere.copies import Team
from pallas_flash.kernels.ampere.registers import Fragment
from pallas_flash.kernels.ampere.schedule import ROWS, ForwardSchedule
from pallas_flash.kernels.mosaic.head_mask import ArrayMask, HeadMask, StaticMask
from pallas_flash.kernels.mosaic.scheduling import div, rem
from pallas_flash.kernels.mosaic.types import Flag, Index, Ref
from pallas_flash.spec import AttentionSpec

__all__ = ["Block"]


class Block(NamedTuple):
    """A block: its query tile, and the key tiles that this needs."""

    spec: AttentionSpec
    schedule: ForwardSchedule
    gmem: dict[str, Ref]  # q, k, v, out, stats; what mask and dropout need
    smem: dict[str, Ref]  # memory.forward_buffers
    team: Team
    batch: Index
    head: Index
    first: Index  # position of the first query
    mask: HeadMask
    needed: tiles.TileRange[Index]
    held: tuple[Fragment, ...] | None = None  # the queries, of each 64 rows, if they are held in registers

    def meets(self, row_tile: int, kv_tile: Index) -> Flag:
        """Whether 64 of the queries need a key tile."""
        found: tiles.TileRange[Index] | tiles.TileRange[Positions]
        match self.mask:
            case ArrayMask() as mask:
                found = mask.tiles("row_tiles", div(self.first, ROWS) + row_tile)
            case StaticMask():
                found = work.row_range(self.spec, self.schedule, self.first + row_tile * ROWS)
        return jnp.asarray((kv_tile >= found.start) & (kv_tile < found.stop))

    def load(self, name: str, kv_tile: Index) -> None:
        """Starts to load a tile of keys ("k") or values ("v")."""
        index = self.batch, div(self.head, self.spec.group), kv_tile * self.schedule.block_kv
        copies.load_tile(self.team, self.spec, self.gmem[name], index, self.tile(name, kv_tile))

    def tile(self, name: str, kv_tile: Index) -> Ref:
        """The slot of a tile of keys ("k") or values ("v")."""
        return self.smem[name].at[rem(kv_tile, self.schedule.num_stages) if self.schedule.num_stages > 1 else 0]
