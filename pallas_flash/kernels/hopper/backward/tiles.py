"""What the roles of a backward kernel share: a block."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from pallas_flash.kernels.hopper.registers import Fragment
from pallas_flash.kernels.hopper.schedule import DqSchedule, KvSchedule, SplitSchedule, WideSchedule
from pallas_flash.kernels.mosaic.head_mask import HeadMask
from pallas_flash.kernels.mosaic.types import Index, Ref
from pallas_flash.kernels.mosaic.walk import Walk
from pallas_flash.spec import AttentionSpec

__all__ = ["Block", "KeyBlock", "QueryBlock"]


class Block[S](NamedTuple):
    """What the roles of one block share. It keeps one tile, of keys or (in `backward.dq`) of queries, and walks over
    tiles of the other axis.
    """

    spec: AttentionSpec
    schedule: S
    gmem: dict[str, Ref]  # arrays in global memory, by name
    smem: dict[str, Ref]  # buffers in shared memory
    bars: dict[str, Ref]  # barriers
    mask: HeadMask
    batch: Index
    head: Index  # of the tile that it keeps: a key head, or a query head
    tile: Index
    walk: Walk
    held: Mapping[str, Fragment] = MappingProxyType({})  # rows of a compute warpgroup that it keeps in registers


type KeyBlock = Block[KvSchedule] | Block[SplitSchedule] | Block[WideSchedule]
"""A block that keeps keys."""

type QueryBlock = Block[DqSchedule] | Block[WideSchedule]
"""A block that keeps queries."""
