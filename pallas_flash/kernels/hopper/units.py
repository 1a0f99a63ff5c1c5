"""The units that schedules of the Hopper kernels are counted in."""

from pallas_flash import tiles

__all__ = ["CHUNK", "ROWS_PER_WARPGROUP", "chunks", "two_roles"]

CHUNK = 64
"""Columns of a tile that lie together in shared memory: 128 bytes of a 16-bit type, the widest swizzle."""

ROWS_PER_WARPGROUP = 64
"""Rows of a product that a warpgroup holds: the M of wgmma."""


def chunks(dim: int) -> int:
    """The number of chunks of 64 columns that hold `dim` columns."""
    return tiles.cdiv(dim, CHUNK)


def two_roles(warpgroups: int) -> tuple[int, int]:
    """Registers a thread of so many compute warpgroups, and of one that loads: 65,536 a block at most."""
    return (160, 32) if warpgroups == 3 else (240, 24)
