"""Tile sizes of the XLA kernels: they change speed and memory, never a result beyond rounding."""

import dataclasses

from pallas_flash import tiles
from pallas_flash.device import Device
from pallas_flash.spec import AttentionSpec

__all__ = ["Schedule", "default"]

TARGET_BLOCK = 512
"""Positions in a tile: large enough for the CPU's matrix products, small enough that a causal mask skips nearly
half."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Positions in a query tile and in a key tile."""

    block_q: int
    block_kv: int


def _even_block(length: int, target: int) -> int:
    """The block that cuts `length` into equal tiles of at most `target`, so that little is padded."""
    return tiles.cdiv(length, tiles.cdiv(length, target))


def default(spec: AttentionSpec, device: Device | None = None) -> Schedule:
    """The schedule of a spec that is not empty, the same on every device."""
    del device
    return Schedule(_even_block(spec.q_len, TARGET_BLOCK), _even_block(spec.kv_len, TARGET_BLOCK))
