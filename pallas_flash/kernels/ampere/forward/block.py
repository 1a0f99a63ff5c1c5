"""What the stages of the forward kernel share: a block's problem, references, and place."""

from typing import NamedTuple

from pallas_flash import tiles
from pallas_flash.kernels.ampere import copies
from pallas_flash.kernels.ampere.copies import Team
from pallas_flash.kernels.ampere.schedule import ForwardSchedule
from pallas_flash.kernels.mosaic.scheduling import div
from pallas_flash.kernels.mosaic.types import Index, Ref
from pallas_flash.spec import AttentionSpec

__all__ = ["Block"]


class Block(NamedTuple):
    """A block: its query tile, and the key tiles that this needs."""

    spec: AttentionSpec
    schedule: ForwardSchedule
    gmem: dict[str, Ref]  # q, k, v, out, stats
    smem: dict[str, Ref]  # memory.forward_buffers
    team: Team
    batch: Index
    head: Index
    first: Index  # position of the first query
    needed: tiles.TileRange[Index]

    def load(self, name: str, kv_tile: Index) -> None:
        """Starts to load a tile of keys ("k") or values ("v")."""
        index = self.batch, div(self.head, self.spec.group), kv_tile * self.schedule.block_kv
        copies.load_tile(self.team, self.spec, self.gmem[name], index, self.smem[name])
